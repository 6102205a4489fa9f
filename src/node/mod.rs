//! The process: one driver loop over the engine, the network, the store and the trainer.
//!
//! [`Node::start`] brings everything up; [`NodeHandle`] is how the control API and tests talk to
//! the driver, and `socks` how local programs reach services by name. Everything that changes state goes through the driver's one `select!`
//! (`driver`); `retrain` runs training in a child process and hands the new model over.

mod checks;
mod clock;
mod doors;
mod driver;
mod entrance;
mod handle;
mod hot_swap;
mod joining;
mod members;
mod names;
pub mod network;
mod providers;
mod published;
mod refusal;
mod retrain;
mod socks;
mod tunnels;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::config::Config;
use crate::engine::predict::CHOICES_REMEMBERED_MAX;
use crate::engine::{Engine, EngineConfig};
use crate::learn::ModelRegistry;
use crate::net::Net;
use crate::store::{Reader, Retention, StoreError, Writer};

pub use crate::net::identity::{FILE as IDENTITY_FILE, Identity, parse_peer_id, peer_id_text};
pub use crate::net::join::{JOIN_TIMEOUT, JoinError, join};
pub use crate::net::reach::{FOREIGN, Gateway, Reach};
pub use crate::net::tunnel::{EndToEnd, TunnelInfo};
pub use clock::Clock;
pub use driver::{CalculationTimes, View};
use handle::Request;
pub use handle::{NodeHandle, RequestError};
pub use joining::{Joined, JoiningError, create_network, join_network};
pub use members::{Member, Members};
use network::Network;
pub use tunnels::TunnelOptions;

/// Name of the database within the data directory.
pub const DATABASE: &str = "meshwise.db";
/// Name of the folder of models within the data directory.
pub const MODELS: &str = "models";
/// Requests that may wait for the driver.
const REQUESTS_MAX: usize = 1_024;
/// Why a node could not start. One line: what, why, what to do.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The data directory cannot be made.
    #[error("cannot use the data directory {path}: {error}; choose another with --data-dir")]
    DataDir {
        /// Which.
        path: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// Another process holds it.
    #[error(
        "another node runs on the data directory {path}; stop it, or choose another with --data-dir"
    )]
    InUse {
        /// Which.
        path: String,
    },
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// The files that say which network it belongs to are unusable.
    #[error(transparent)]
    Network(#[from] network::NetworkError),
    /// The network did not start.
    #[error(transparent)]
    Net(#[from] crate::net::NetError),
    /// The list of published services is unusable.
    #[error("{0}")]
    Published(String),
    /// The list of names and their owners is unusable.
    #[error("{0}")]
    Names(String),
    /// The database is unusable.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl NodeError {
    /// Whether an address that was given is none.
    pub fn is_wrong_usage(&self) -> bool {
        use crate::net::NetError;
        matches!(self, Self::Net(NetError::Address(_) | NetError::Bootstrap { .. }))
    }
}

/// Where a node keeps its things, and how it behaves.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Settings.
    pub config: Config,
    /// Identity, database, models, control socket.
    pub data_dir: PathBuf,
    /// The `meshwise` program, which trains as a child process; `None` for no scheduled training.
    pub trainer: Option<PathBuf>,
}

impl NodeOptions {
    /// Sees whether a node can be started with these settings, without writing anything.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn check(&self) -> Result<(), NodeError> {
        self.config.check()?;
        crate::net::check_addresses(&self.config.network)?;
        Ok(())
    }
}

/// A running node. Dropping it without [`Node::stop`] ends it less politely.
pub struct Node {
    handle: NodeHandle,
    driver: tokio::task::JoinHandle<()>,
    /// Ends the proxy with the node.
    _proxy: Option<DropGuard>,
    _doors: doors::CloseDoors,
    _lock: std::fs::File,
}

impl Node {
    /// Starts a node.
    ///
    /// # Errors
    /// [`NodeError`]; nothing keeps running.
    pub async fn start(options: NodeOptions) -> Result<Self, NodeError> {
        options.check()?;
        let data_dir = &options.data_dir;
        let (lock, identity) = take(data_dir)?;
        let clock = Clock::default();
        let network = match Network::load(data_dir)? {
            Some(network) => network,
            None => {
                let key = identity.public_key();
                let network = Network::found(network::DEFAULT_NAME, &key, clock.now());
                network.save_new(data_dir)?;
                let name = network::DEFAULT_NAME;
                tracing::info!("founded the network '{name}'; see 'meshwise network --help'");
                network
            }
        };
        let published = published::Published::load(data_dir).map_err(NodeError::Published)?;
        let pins = names::load(data_dir).map_err(NodeError::Names)?;
        let storage = &options.config.storage;
        let retention = Retention {
            max_age: Duration::from_secs(u64::from(storage.max_age_days) * 86_400),
            max_bytes: u64::from(storage.max_mb) * 1_000_000,
        };
        let writer = Writer::start(data_dir.join(DATABASE), retention)?;
        let models = ModelRegistry::new(data_dir.join(MODELS));
        let config = &options.config;
        raise_descriptor_limit();
        keep_heap();
        let mut bootstrap = config.bootstrap_policy();
        bootstrap.addresses.extend(network.state.addresses.iter().cloned());
        match Reader::open(data_dir.join(DATABASE)).and_then(|reader| reader.peers()) {
            Ok(known) => bootstrap.known = known,
            Err(error) => tracing::warn!("{error}; joining by configured addresses only"),
        }
        let mut engine = Engine::new(
            EngineConfig {
                root: network.root,
                degree: config.network.degree,
                pins,
                bootstrap,
                paths: config.path_policy(),
                intervals: config.intervals(),
                prediction: config.learning.predict,
                seed: clock.now().as_micros(),
                ..EngineConfig::new(identity.signing_key(), network.state)
            },
            clock.now(),
        );
        match Reader::open(data_dir.join(DATABASE))
            .and_then(|reader| reader.choices(CHOICES_REMEMBERED_MAX))
        {
            Ok(choices) => {
                tracing::debug!("{} choices of earlier are known", choices.len());
                engine.remember(&choices);
            }
            Err(error) => tracing::warn!("{error}; how to compare routes is learned anew"),
        }
        if engine.membership().roster().is_revoked(&engine.key()) {
            tracing::error!("{}", RequestError::Revoked);
        }
        let (net, events) =
            Net::start(config, &identity, engine.membership().roster().clone()).await?;
        let proxy = socks::listen(&config.entry.socks).await;
        let (requests, receiver) = mpsc::channel(REQUESTS_MAX);
        let handle = NodeHandle {
            me: identity.public_key(),
            requests,
            tunnels: net.tunnels().clone(),
            models: Arc::new(models),
            published: Arc::new(published),
            data_dir: data_dir.clone(),
            paths: config.routing.paths,
            doors: Arc::default(),
            socks: proxy.as_ref().and_then(|proxy| proxy.local_addr().ok()),
        };
        let driver =
            driver::Driver::new(engine, net, writer, clock, &options, handle.models.clone());
        let driver = tokio::spawn(driver.run(events, receiver));
        handle.publish_again();
        let _proxy = proxy.map(|proxy| {
            let stop = CancellationToken::new();
            tokio::spawn(socks::run(proxy, handle.clone(), stop.clone()));
            stop.drop_guard()
        });
        let _doors = doors::CloseDoors(handle.doors.clone());
        Ok(Self { handle, driver, _proxy, _doors, _lock: lock })
    }

    /// How to talk to it.
    pub fn handle(&self) -> &NodeHandle {
        &self.handle
    }

    /// Stops it: says good-bye, commits what was measured.
    pub async fn stop(self) {
        drop(self._proxy);
        drop(self._doors);
        let _ = self.handle.requests.send(Request::Stop).await;
        let _ = self.driver.await;
    }
}

/// Takes a data directory for this process, makes it where there is none, and reads or makes its
/// identity. It is free again when the file is dropped.
fn take(data_dir: &Path) -> Result<(std::fs::File, Identity), NodeError> {
    let path = data_dir.display().to_string();
    let dir_error = |error| NodeError::DataDir { path: path.clone(), error };
    create_private(data_dir).map_err(dir_error)?;
    let lock = lock(data_dir).map_err(dir_error)?;
    let lock = lock.ok_or_else(|| NodeError::InUse { path: path.clone() })?;
    let identity = Identity::load_or_create(data_dir).map_err(crate::net::NetError::from)?;
    Ok((lock, identity))
}

/// Makes the data directory readable by its owner only; one that is there stays as it is.
fn create_private(data_dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir)
}

/// Every connection that is carried takes a file descriptor, of which processes may by default have
/// 1,024; most systems let them have more when they ask.
fn raise_descriptor_limit() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit) {
            tracing::debug!("the limit of open files stays as it is: {error}");
        }
    }
}

/// Freed memory that a heap keeps (bytes): more than the batches that a relay has under way.
const HEAP_KEPT: usize = 4 << 20;

/// Has the C library keep freed memory. That of GNU gives the end of a heap back to the system from 128 KiB
/// on, which a relay frees and takes again with each batch, and the kernel clears every page anew: 3 % of its
/// time. Freeing a piece that has a mapping of its own raises the bound to twice the piece (mallopt(3),
/// `M_MMAP_THRESHOLD`); nothing is written to it, so that it costs no memory.
fn keep_heap() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(HEAP_KEPT / 2)));
}

/// Takes the data directory for this process; `None` when another one has it.
fn lock(data_dir: &Path) -> std::io::Result<Option<std::fs::File>> {
    let mut options = std::fs::OpenOptions::new();
    let options = options.create(true).truncate(false).write(true);
    let file = options.open(data_dir.join("lock"))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(std::fs::TryLockError::WouldBlock) => Ok(None),
        Err(std::fs::TryLockError::Error(error)) => Err(error),
    }
}
