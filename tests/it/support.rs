//! What the tests with real nodes share.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use meshwise::config::{Config, EmulatedLink, EmulationConfig, NetworkConfig, ProbingConfig};
use meshwise::engine::event::ServiceSpec;
use meshwise::engine::measure::{HealthCheck, HealthPolicy};
use meshwise::engine::overlay::{Objective, ServiceKind};
use meshwise::engine::types::NodeId;
use meshwise::node::network::Network;
use meshwise::node::{Clock, Identity, Node, NodeOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Longest wait for anything on a machine that may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `what` is so.
pub async fn eventually<F: Future<Output = bool>>(what: &str, is_so: impl FnMut() -> F) {
    within(PATIENCE, what, is_so).await;
}

/// Waits until `what` is so, for at most so long.
pub async fn within<F: Future<Output = bool>>(
    limit: Duration,
    what: &str,
    mut is_so: impl FnMut() -> F,
) {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// A node on loopback: any free port, no multicast, no proxy, quick probes, no scheduled training.
pub fn config(bootstrap: Vec<String>) -> Config {
    let mut config = Config {
        network: NetworkConfig {
            listen: vec!["/ip4/127.0.0.1/tcp/0".into()],
            bootstrap,
            mdns: false,
            nat: false,
            degree: NetworkConfig::default().degree,
        },
        probing: ProbingConfig {
            link_ms: 200,
            active_route_ms: 100,
            candidate_route_ms: 200,
            decide_ms: 200,
        },
        ..Config::default()
    };
    config.learning.retrain_s = 0;
    config.entry.socks = String::new();
    config
}

/// Emulation that only restricts which links exist.
pub fn only_links_to(neighbours: &[NodeId]) -> EmulationConfig {
    let link = |neighbour: &NodeId| EmulatedLink {
        neighbour: neighbour.to_string(),
        ..EmulatedLink::default()
    };
    EmulationConfig {
        enabled: true,
        unreachable: Vec::new(),
        behind_nat: false,
        links: neighbours.iter().map(link).collect(),
    }
}

/// The network of all tests' nodes; its issuer is not running.
pub fn network() -> &'static Network {
    static NETWORK: OnceLock<Network> = OnceLock::new();
    NETWORK.get_or_init(|| {
        let founder = Identity::generate().public_key();
        Network::found("test", &founder, Clock::default().now())
    })
}

/// Makes the data directory of a member with this identity.
pub fn prepare(data_dir: &Path, identity: &Identity) {
    std::fs::create_dir_all(data_dir).unwrap();
    identity.save_new(data_dir).unwrap();
    let admitted = network().admit(&identity.public_key(), Clock::default().now());
    admitted.unwrap().save_new(data_dir).unwrap();
}

/// Starts a node with this identity.
pub async fn start(data_dir: &Path, identity: &Identity, config: Config) -> Node {
    prepare(data_dir, identity);
    let options = NodeOptions { config, data_dir: data_dir.to_owned(), trainer: None };
    Node::start(options).await.unwrap()
}

/// Where a node listens.
pub async fn listening(node: &Node) -> Vec<String> {
    node.handle().inspect(|view| view.net.listening()).await.unwrap()
}

/// A TCP service whose target hears of nobody but its users.
pub fn service(name: &str) -> ServiceSpec {
    ServiceSpec {
        name: name.parse().unwrap(),
        kind: ServiceKind::Tcp,
        metadata: std::collections::BTreeMap::new(),
        allowed: Vec::new(),
        ttl_s: 600,
        objective: Objective::Balanced,
        delegation: None,
        health: HealthPolicy {
            check: HealthCheck::None,
            ..HealthPolicy::of_kind(ServiceKind::Tcp)
        },
    }
}

/// A TCP server that sends back what it gets, until its side is closed.
pub async fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    address
}

/// Sends `bytes`, closes the sending half, and reads to the end.
pub async fn exchange(address: SocketAddr, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address).await?;
    let (mut read, mut write) = stream.split();
    let send = async {
        write.write_all(bytes).await?;
        write.shutdown().await
    };
    let mut answer = Vec::new();
    let receive = read.read_to_end(&mut answer);
    tokio::try_join!(send, receive)?;
    Ok(answer)
}
