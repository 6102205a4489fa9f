//! Tunnels: end-to-end QUIC over the overlay, authenticated with the nodes' own identities, and
//! TCP connections as its streams.
//!
//! A stream begins with the name of the service (two bytes of length, big endian, then the text).
//! The answer begins with one status byte. Data may follow the name at once. The provider checks
//! its allow list against the identity that TLS proved.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::rustls::pki_types::CertificateDer;
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::identity::{self, Identity};
use super::overlay_socket::{OverlaySocket, endpoint_config};
use super::plane::{DataPlane, FarEnd};
use crate::engine::types::{NodeId, PublicKey, ServiceName, TunnelId};

/// How long a tunnel may take to come up.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a new connection waits for a route when none is alive, and how often it looks.
const NO_ROUTE_WAIT: Duration = Duration::from_secs(3);
/// See [`NO_ROUTE_WAIT`].
const NO_ROUTE_POLL: Duration = Duration::from_millis(50);
/// How long a good-bye may take to leave.
pub const GOODBYE: Duration = Duration::from_millis(300);
/// How long a caller may take to name the service that it wants.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a failed connection speaks for the next ones.
const FAILURE_SPEAKS: Duration = Duration::from_secs(1);
/// How long the target of a service may take to accept a connection.
const TARGET_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams of one tunnel at one time.
const STREAMS_MAX: u32 = 1_024;
/// Tunnels that others may have open to this node.
const INCOMING_MAX: usize = 4_096;
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
        let open = OpenTunnel { service, provider, listen, traffic, stop };
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
        let address = FarEnd { node: provider.node_id(), tunnel, ours: true }.to_addr();
        // The verifier checks the peer id; QUIC only wants some server name.
        let connecting = self.endpoint.connect_with(client, address, "l");
        let connecting = connecting.map_err(|error| unreachable(error.to_string()))?;
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(connected) => connected.map_err(|error| unreachable(error.to_string())),
            Err(_) => Err(unreachable("no answer".into())),
        }
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

// --- the end that opened the tunnel ------------------------------------------------------------

struct LocalEnd {
    tunnels: Arc<Tunnels>,
    tunnel: TunnelId,
    provider: PublicKey,
    service: ServiceName,
    connection: tokio::sync::Mutex<(Connection, Option<Instant>)>,
    traffic: Arc<Traffic>,
    stop: CancellationToken,
}

impl LocalEnd {
    /// The connection, made anew when it was lost.
    async fn connection(&self) -> Option<Connection> {
        let mut locked = self.connection.lock().await;
        let (connection, failed_at) = &mut *locked;
        if connection.close_reason().is_some() {
            // Those who waited for the same failure do not each try again.
            if failed_at.is_some_and(|at| at.elapsed() < FAILURE_SPEAKS) {
                return None;
            }
            match self.tunnels.connect(self.tunnel, &self.provider).await {
                Ok(new) => *connection = new,
                Err(_) => {
                    *failed_at = Some(Instant::now());
                    return None;
                }
            }
        }
        Some(connection.clone())
    }
}

async fn accept_tcp(listener: TcpListener, local: Arc<LocalEnd>) {
    // As many as the tunnel carries; further ones wait in the system's queue.
    let places = Arc::new(tokio::sync::Semaphore::new(STREAMS_MAX as usize));
    loop {
        let accepting = async {
            let place = places.clone().acquire_owned().await.ok();
            listener.accept().await.map(|(tcp, _)| (tcp, place))
        };
        let accepted = tokio::select! {
            () = local.stop.cancelled() => break,
            accepted = accepting => accepted,
        };
        let Ok((tcp, place)) = accepted else {
            // Out of file descriptors, mostly: others have to close some first.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        local.traffic.connections.fetch_add(1, Ordering::Relaxed);
        let local = local.clone();
        local.traffic.open.fetch_add(1, Ordering::Relaxed);
        local.tunnels.tasks.clone().spawn(async move {
            let _place = place;
            let stop = local.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                result = carry(tcp, &local) => {
                    if let Err(why) = result {
                        local.tunnels.failed(&local.service, why);
                    }
                }
            }
            local.traffic.open.fetch_sub(1, Ordering::Relaxed);
        });
    }
    local.connection.lock().await.0.close(VarInt::from_u32(0), b"tunnel closed");
}

/// Carries one TCP connection through the tunnel.
async fn carry(tcp: TcpStream, local: &LocalEnd) -> Result<(), &'static str> {
    let _ = tcp.set_nodelay(true);
    // A moment for the route to come back; then better an error than a connection that hangs.
    let deadline = Instant::now() + NO_ROUTE_WAIT;
    while !local.tunnels.plane.is_reachable(local.tunnel) {
        if Instant::now() >= deadline {
            return Err("tunnel-no-route");
        }
        tokio::time::sleep(NO_ROUTE_POLL).await;
    }
    let connection = local.connection().await.ok_or("tunnel-unreachable")?;
    let (mut send, mut recv) = connection.open_bi().await.map_err(|_| "tunnel-lost")?;
    let name = local.service.as_str().as_bytes();
    let mut hello = (name.len() as u16).to_be_bytes().to_vec();
    hello.extend(name);
    send.write_all(&hello).await.map_err(|_| "tunnel-lost")?;
    let (tcp_read, tcp_write) = tcp.into_split();
    let up = copy(tcp_read, &mut send, &local.traffic.sent);
    let down = async {
        let status = recv.read_u8().await.map_err(|_| "tunnel-lost")?;
        if status != Status::Accepted as u8 {
            return Err(Status::refused(status));
        }
        copy(&mut recv, tcp_write, &local.traffic.received).await
    };
    let result = while_open(&connection, async { tokio::try_join!(up, down).map(|_| ()) }).await;
    if result.is_err() {
        let _ = send.reset(VarInt::from_u32(1));
        let _ = recv.stop(VarInt::from_u32(1));
    }
    result
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

// --- the end that provides the service ---------------------------------------------------------

async fn accept_tunnels(tunnels: Arc<Tunnels>) {
    loop {
        let incoming = tokio::select! {
            () = tunnels.stop.cancelled() => return,
            incoming = tunnels.endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else { return };
        if tunnels.endpoint.open_connections() > INCOMING_MAX {
            tunnels.plane.counters().count("too-many-tunnels");
            incoming.refuse();
            continue;
        }
        let tunnels = tunnels.clone();
        tunnels.tasks.clone().spawn(async move {
            let Ok(connection) = incoming.await else { return };
            let Some(caller) = caller(&connection) else {
                tunnels.plane.counters().count("tunnel-from-nobody");
                connection.close(VarInt::from_u32(2), b"identity does not fit the address");
                return;
            };
            while let Ok((send, recv)) = connection.accept_bi().await {
                let tunnels = tunnels.clone();
                let connection = connection.clone();
                tokio::spawn(async move {
                    let serving = serve(send, recv, caller, &tunnels);
                    if let Err(why) = while_open(&connection, serving).await {
                        tunnels.failed(&caller, why);
                    }
                });
            }
        });
    }
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

/// The identity that TLS proved, when the overlay address is that identity's.
fn caller(connection: &Connection) -> Option<NodeId> {
    let identity = connection.peer_identity()?;
    let certificates = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    let certificate = libp2p_tls::certificate::parse(certificates.first()?).ok()?;
    let node = identity::public_key(&certificate.peer_id())?.node_id();
    let far_end = FarEnd::from_addr(connection.remote_address())?;
    (far_end.node == node).then_some(node)
}

async fn serve(
    mut send: SendStream,
    mut recv: RecvStream,
    caller: NodeId,
    tunnels: &Tunnels,
) -> Result<(), &'static str> {
    let connected = async {
        let hello = async {
            let length = recv.read_u16().await.ok()?;
            let mut name = vec![0; usize::from(length).min(254)];
            recv.read_exact(&mut name).await.ok()?;
            Some(name)
        };
        let name = tokio::time::timeout(HELLO_TIMEOUT, hello).await.ok().flatten().ok_or(None)?;
        let name = std::str::from_utf8(&name).ok().and_then(|name| name.parse().ok());
        let exports = tunnels.exports.load();
        let export = name.and_then(|name: ServiceName| exports.get(&name));
        let export = export.ok_or(Some(Status::UnknownService))?;
        if !export.allowed.is_empty() && !export.allowed.contains(&caller) {
            return Err(Some(Status::NotAllowed));
        }
        let connecting = tokio::time::timeout(TARGET_TIMEOUT, TcpStream::connect(export.target));
        match connecting.await {
            Ok(Ok(tcp)) => Ok(tcp),
            _ => Err(Some(Status::TargetUnreachable)),
        }
    };
    let tcp = match connected.await {
        Ok(tcp) => tcp,
        Err(None) => return Err("stream-broken"),
        Err(Some(status)) => {
            let _ = send.write_all(&[status as u8]).await;
            let _ = send.finish();
            let _ = recv.stop(VarInt::from_u32(1));
            return Err(Status::refused(status as u8));
        }
    };
    let _ = tcp.set_nodelay(true);
    send.write_all(&[Status::Accepted as u8]).await.map_err(|_| "stream-broken")?;
    let (tcp_read, tcp_write) = tcp.into_split();
    let uncounted = AtomicU64::new(0);
    let down = copy(tcp_read, &mut send, &uncounted);
    let up = copy(&mut recv, tcp_write, &uncounted);
    let result = tokio::try_join!(up, down).map(|_| ());
    if result.is_err() {
        let _ = send.reset(VarInt::from_u32(1));
        let _ = recv.stop(VarInt::from_u32(1));
    }
    result
}
