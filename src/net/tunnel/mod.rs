//! Tunnels: end-to-end QUIC over the overlay, authenticated with the nodes' own identities, and
//! TCP connections as its streams.
//!
//! A stream begins with the name of the service (two bytes of length, big endian, then the text).
//! The answer begins with one status byte. Data may follow the name at once. The provider checks
//! its allow list against the identity that TLS proved.
//!
//! `local` is the end that opened the tunnel, `serve` the one that provides the service.

mod local;
mod serve;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, VarInt};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use local::{LocalEnd, accept_tcp};
use serve::accept_tunnels;

use super::identity::{self, Identity};
use super::overlay_socket::{OverlaySocket, endpoint_config};
use super::plane::{DataPlane, FarEnd};
use crate::engine::overlay::ServiceKind;
use crate::engine::types::{NodeId, PublicKey, ServiceName, TunnelId};

/// How long a tunnel may take to come up.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a good-bye may take to leave.
pub const GOODBYE: Duration = Duration::from_millis(300);
/// Streams of one tunnel at one time.
const STREAMS_MAX: u32 = 1_024;
/// QUIC packet size (bytes). The overlay rides on streams and fragments nothing; larger packets
/// cost less each, smaller ones mix better on slow links.
const PACKET_BYTES: u16 = 4_096;
/// Silence after which a tunnel is given up.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Silence after which a tunnel sends something to stay open.
const KEEP_ALIVE: Duration = Duration::from_secs(4);
const COPY_BYTES: usize = 64 * 1024;
const PROTOCOL: &[u8] = b"meshwise-tunnel/1";

/// Why a tunnel could not be opened. One line: what, why, what to do.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The local address is taken or not of this machine.
    #[error("cannot listen on {address}: {error}; choose another with --listen")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What the system said.
        error: std::io::Error,
    },
    /// The provider did not answer.
    #[error("{provider} did not answer within {} s ({reason}); see 'meshwise route explain' for the routes to it", CONNECT_TIMEOUT.as_secs())]
    Unreachable {
        /// Who.
        provider: String,
        /// What QUIC said.
        reason: String,
    },
    /// TLS could not be set up.
    #[error("cannot set up the tunnel's encryption: {0}")]
    Crypto(String),
}

/// The answer to a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Accepted = 0,
    UnknownService = 1,
    NotAllowed = 2,
    TargetUnreachable = 3,
}

impl Status {
    fn refused(byte: u8) -> &'static str {
        match byte {
            1 => "stream-refused-unknown-service",
            2 => "stream-refused-not-allowed",
            3 => "stream-refused-target-unreachable",
            _ => "stream-refused",
        }
    }
}

/// A service of this node.
#[derive(Clone, Debug)]
pub struct Export {
    /// Where its TCP connections go.
    pub target: SocketAddr,
    /// Who may connect; everybody when empty.
    pub allowed: Vec<NodeId>,
}

/// A tunnel of this node.
#[derive(Clone, Debug)]
pub struct TunnelInfo {
    /// Which.
    pub tunnel: TunnelId,
    /// To what.
    pub service: ServiceName,
    /// How the service speaks.
    pub kind: ServiceKind,
    /// The node behind it.
    pub provider: PublicKey,
    /// Where it accepts TCP connections.
    pub listen: SocketAddr,
    /// Bytes sent and received through it.
    pub bytes: (u64, u64),
    /// TCP connections accepted so far.
    pub connections: u64,
    /// Those that are open now.
    pub open: u64,
}

#[derive(Default)]
struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
    connections: AtomicU64,
    open: AtomicU64,
}

struct OpenTunnel {
    service: ServiceName,
    kind: ServiceKind,
    provider: PublicKey,
    listen: SocketAddr,
    traffic: Arc<Traffic>,
    stop: CancellationToken,
}

/// All tunnels of a node, in both directions.
pub struct Tunnels {
    identity: Identity,
    endpoint: Endpoint,
    plane: Arc<DataPlane>,
    exports: ArcSwap<BTreeMap<ServiceName, Export>>,
    open: Mutex<BTreeMap<TunnelId, OpenTunnel>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Tunnels {
    /// Starts to accept tunnels from others.
    ///
    /// # Errors
    /// [`TunnelError::Crypto`].
    pub fn start(
        identity: &Identity,
        plane: Arc<DataPlane>,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<Arc<Self>, TunnelError> {
        let crypto = |error: &dyn std::fmt::Display| TunnelError::Crypto(error.to_string());
        let mut tls =
            libp2p_tls::make_server_config(&identity.keypair()).map_err(|error| crypto(&error))?;
        tls.alpn_protocols = vec![PROTOCOL.to_vec()];
        tls.key_log = Arc::new(quinn::rustls::NoKeyLog {});
        let quic = QuicServerConfig::try_from(tls).map_err(|error| crypto(&error))?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(quic));
        server.transport_config(transport());
        server.migration(false);
        let socket = OverlaySocket::new(plane.clone())
            .ok_or_else(|| TunnelError::Crypto("the overlay socket is taken".into()))?;
        let config = endpoint_config(identity, PACKET_BYTES).map_err(|error| crypto(&error))?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint =
            Endpoint::new_with_abstract_socket(config, Some(server), Arc::new(socket), runtime)
                .map_err(|error| crypto(&error))?;
        let tunnels = Arc::new(Self {
            identity: identity.clone(),
            endpoint,
            plane,
            exports: ArcSwap::default(),
            open: Mutex::default(),
            tasks: tasks.clone(),
            stop: stop.clone(),
        });
        tasks.spawn(accept_tunnels(tunnels.clone()));
        Ok(tunnels)
    }

    /// Serves a name from now on.
    pub fn export(&self, name: ServiceName, export: Export) {
        self.exports.rcu(|exports| {
            let mut exports = BTreeMap::clone(exports);
            exports.insert(name.clone(), export.clone());
            exports
        });
    }

    /// No longer serves a name.
    pub fn unexport(&self, name: &ServiceName) {
        self.exports.rcu(|exports| {
            let mut exports = BTreeMap::clone(exports);
            exports.remove(name);
            exports
        });
    }

    /// What is served under a name.
    pub fn exported(&self, name: &ServiceName) -> Option<Export> {
        self.exports.load().get(name).cloned()
    }

    /// Opens a tunnel to a provider that the engine has a route to, and accepts TCP connections
    /// for it on `listen`. Returns the address, with the port that was chosen when it was 0.
    ///
    /// # Errors
    /// [`TunnelError`]; nothing stays open.
    pub async fn open(
        self: &Arc<Self>,
        tunnel: TunnelId,
        provider: PublicKey,
        service: ServiceName,
        kind: ServiceKind,
        listen: SocketAddr,
    ) -> Result<SocketAddr, TunnelError> {
        let listen_error = |error| TunnelError::Listen { address: listen, error };
        let listener = TcpListener::bind(listen).await.map_err(listen_error)?;
        let listen = listener.local_addr().map_err(listen_error)?;
        let connection = self.connect(tunnel, &provider).await?;
        let traffic = Arc::new(Traffic::default());
        let stop = self.stop.child_token();
        let local = LocalEnd {
            tunnels: self.clone(),
            tunnel,
            provider,
            service: service.clone(),
            connection: tokio::sync::Mutex::new((connection, None)),
            traffic: traffic.clone(),
            stop: stop.clone(),
        };
        self.tasks.spawn(accept_tcp(listener, Arc::new(local)));
        let open = OpenTunnel { service, kind, provider, listen, traffic, stop };
        self.lock_open().insert(tunnel, open);
        Ok(listen)
    }

    /// Counts a connection that failed, and says so in the log: the first one of a kind, and then
    /// ever more seldom.
    fn failed(&self, service: &dyn std::fmt::Display, why: &'static str) {
        let times = self.plane.counters().count_nth(why);
        if times.is_power_of_two() {
            tracing::warn!(%service, times, "a connection failed: {why}");
        }
    }

    /// Closes a tunnel. Returns whether it was open.
    pub fn close_one(&self, tunnel: TunnelId) -> bool {
        let closed = self.lock_open().remove(&tunnel);
        closed.inspect(|tunnel| tunnel.stop.cancel()).is_some()
    }

    /// Closes everything, also what others opened, and gives the good-byes a moment to leave.
    pub async fn close(&self) {
        self.endpoint.close(VarInt::from_u32(0), b"node stops");
        let _ = tokio::time::timeout(GOODBYE, self.endpoint.wait_idle()).await;
    }

    /// The tunnels of this node.
    pub fn list(&self) -> Vec<TunnelInfo> {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let info = |(tunnel, open): (&TunnelId, &OpenTunnel)| TunnelInfo {
            tunnel: *tunnel,
            service: open.service.clone(),
            kind: open.kind,
            provider: open.provider,
            listen: open.listen,
            bytes: (load(&open.traffic.sent), load(&open.traffic.received)),
            connections: load(&open.traffic.connections),
            open: load(&open.traffic.open),
        };
        self.lock_open().iter().map(info).collect()
    }

    fn lock_open(&self) -> std::sync::MutexGuard<'_, BTreeMap<TunnelId, OpenTunnel>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connect(
        &self,
        tunnel: TunnelId,
        provider: &PublicKey,
    ) -> Result<Connection, TunnelError> {
        let unreachable = |reason: String| TunnelError::Unreachable {
            provider: provider.node_id().to_string(),
            reason,
        };
        let crypto = |error: &dyn std::fmt::Display| TunnelError::Crypto(error.to_string());
        let peer = identity::peer_id(provider);
        let peer = peer.ok_or_else(|| TunnelError::Crypto("the key is no identity".into()))?;
        let mut tls = libp2p_tls::make_client_config(&self.identity.keypair(), Some(peer))
            .map_err(|error| crypto(&error))?;
        tls.alpn_protocols = vec![PROTOCOL.to_vec()];
        tls.key_log = Arc::new(quinn::rustls::NoKeyLog {});
        tls.resumption = quinn::rustls::client::Resumption::disabled();
        let quic = QuicClientConfig::try_from(tls).map_err(|error| crypto(&error))?;
        let mut client = quinn::ClientConfig::new(Arc::new(quic));
        client.transport_config(transport());
        let far_end = FarEnd { node: provider.node_id(), tunnel, ours: true };
        let address = far_end.to_addr();
        self.plane.take_key(far_end, None);
        // The verifier checks the peer id; QUIC only wants some server name.
        let connecting = self.endpoint.connect_with(client, address, "l");
        let connecting = connecting.map_err(|error| unreachable(error.to_string()))?;
        let connected = match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(connected) => connected.map_err(|error| unreachable(error.to_string()))?,
            Err(_) => return Err(unreachable("no answer".into())),
        };
        self.plane.set_key(far_end, &connected);
        Ok(connected)
    }
}

fn transport() -> Arc<quinn::TransportConfig> {
    let mut transport = quinn::TransportConfig::default();
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(16 * u64::from(PACKET_BYTES));
    transport
        .max_concurrent_bidi_streams(STREAMS_MAX.into())
        .max_concurrent_uni_streams(0u32.into())
        .max_idle_timeout(IDLE_TIMEOUT.try_into().ok())
        .keep_alive_interval(Some(KEEP_ALIVE))
        .stream_receive_window(VarInt::from_u32(4 << 20))
        .receive_window(VarInt::from_u32(16 << 20))
        .send_window(16 << 20)
        .initial_rtt(Duration::from_millis(150))
        .initial_mtu(PACKET_BYTES)
        .min_mtu(PACKET_BYTES)
        .mtu_discovery_config(None)
        .congestion_controller_factory(Arc::new(congestion))
        .datagram_receive_buffer_size(None);
    Arc::new(transport)
}

/// Does the work until the tunnel is lost: one half of a connection may be over already and would
/// not notice.
async fn while_open(
    connection: &Connection,
    work: impl Future<Output = Result<(), &'static str>>,
) -> Result<(), &'static str> {
    tokio::select! {
        biased;
        result = work => result,
        _ = connection.closed() => Err("tunnel-lost"),
    }
}

/// Copies until the end and passes the end on, so that half-closed connections work.
async fn copy(
    from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    count: &AtomicU64,
) -> Result<(), &'static str> {
    let mut from = BufReader::with_capacity(COPY_BYTES, from);
    let copied = tokio::io::copy_buf(&mut from, &mut to).await.map_err(|_| "stream-broken")?;
    count.fetch_add(copied, Ordering::Relaxed);
    to.shutdown().await.map_err(|_| "stream-broken")
}
