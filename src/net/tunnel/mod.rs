//! Tunnels: end-to-end QUIC over the overlay, authenticated with the nodes' own identities, and
//! TCP connections and UDP flows as its streams.
//!
//! The caller first shows that it belongs to the network (`introduction`).
//! A stream begins with the name of the service (two bytes of length, big endian, then the text).
//! The answer begins with one status byte. Data may follow the name at once. The provider checks
//! its allow list against the identity that TLS proved.
//!
//! `local` is the end that opened the tunnel, over one QUIC connection or several (`strands`), and
//! `serve` the one that provides the service; `stream` and `pump` carry TCP, `udp` carries UDP.

mod introduction;
mod local;
mod pump;
mod serve;
mod strands;
mod stream;
mod udp;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, VarInt};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use local::{LocalEnd, accept_tcp};
use serve::accept_tunnels;
pub use stream::{StreamError, TunnelStream};

use super::Members;
use super::identity::{self, Identity};
use super::overlay_socket::{OverlaySocket, endpoint_config};
use super::pace::{LARGE_BYTES, MINIMUM_CHANGE, PACKET_BYTES};
use super::plane::{DataPlane, FarEnd};
use super::tries::{Congestion, Tries};
use crate::engine::event::Input;
use crate::engine::overlay::ServiceKind;
use crate::engine::types::{NodeId, PublicKey, ServiceName, TunnelId};

/// How long a tunnel may take to come up.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a good-bye may take to leave.
pub const GOODBYE: Duration = Duration::from_millis(300);
/// Streams of one QUIC connection at one time.
pub const STREAMS_MAX: u32 = 16_384;
/// Handshakes of others that wait; quinn answers further ones with a refusal.
const HANDSHAKES_MAX: usize = 1_024;
/// How often QUIC tries whether larger packets arrive.
const TRY_LARGER_EVERY: Duration = Duration::from_secs(2);
/// Silence after which a tunnel is given up.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Silence after which the end that opened a tunnel sends something to keep it open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// What one stream may have under way or unread (bytes).
const STREAM_WINDOW: u32 = 2 << 20;
/// The same for all streams of a connection.
const RECEIVE_WINDOW: u32 = 64 << 20;
/// What a connection may have sent and not acknowledged (bytes).
const SEND_WINDOW: u64 = 16 << 20;
/// Round-trip time before the first is measured: a route of a few hops.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Congestion window at the start (packets): about what RFC 6928 allows (10 packets of 1,460 bytes).
/// Thirty-two of these large ones filled a link of 10 Mbit/s for a tenth of a second.
const INITIAL_WINDOW_PACKETS: u64 = 4;
/// Packets (and below, round trips) by which a packet may be overtaken before it counts as lost. A
/// change of route reorders, and is no congestion; QUIC knows duplicates of the newest 128 packets.
const PACKET_THRESHOLD: u32 = 64;
/// See [`PACKET_THRESHOLD`]; RFC 9002 recommends 9/8.
const TIME_THRESHOLD: f32 = 1.25;
/// Probe time-outs without an answer after which the congestion window starts anew (RFC 9002
/// recommends 3): an outage is as a rule a route that is being replaced.
const PERSISTENT_CONGESTION: u32 = 10;
/// Datagrams received and not yet handed on (bytes).
const DATAGRAMS_RECEIVED: usize = 1 << 20;
/// Datagrams that wait to be sent (bytes); the oldest make room.
const DATAGRAMS_WAITING: usize = 256 << 10;
const PROTOCOL: &[u8] = b"meshwise-tunnel/3";

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
    /// The provider is no longer a member of the network.
    #[error("the root of this network has revoked {0}; choose another provider")]
    Revoked(NodeId),
    /// TLS could not be set up.
    #[error("cannot set up the tunnel's encryption: {0}")]
    Crypto(String),
}

/// A service of this node.
#[derive(Clone, Debug)]
pub struct Export {
    /// How it speaks.
    pub kind: ServiceKind,
    /// Where its connections go.
    pub target: SocketAddr,
    /// Who may connect; everybody when empty.
    pub allowed: Vec<NodeId>,
}

/// A tunnel of this node.
#[derive(Clone, Debug)]
pub struct TunnelInfo {
    /// Which.
    pub tunnel: TunnelId,
    /// The numbers of all its strands; the first is that of the tunnel.
    pub strands: Vec<TunnelId>,
    /// To what.
    pub service: ServiceName,
    /// How the service speaks.
    pub kind: ServiceKind,
    /// The node behind it.
    pub provider: PublicKey,
    /// Where it accepts connections; nowhere when the node's proxy uses it.
    pub listen: Option<SocketAddr>,
    /// Bytes sent and received through it.
    pub bytes: (u64, u64),
    /// Connections or flows that were carried so far.
    pub connections: u64,
    /// Those that are open now.
    pub open: u64,
    /// Its QUIC connections that are open, one a strand.
    pub ends: Vec<EndToEnd>,
}

/// How a tunnel's QUIC connection sees its route, from end to end.
#[derive(Clone, Copy, Debug)]
pub struct EndToEnd {
    /// The strand.
    pub tunnel: TunnelId,
    /// Smoothed RTT, queues and processing at both ends included.
    pub rtt: Duration,
    /// What the congestion controller lets be under way (bytes).
    pub window: u64,
    /// Largest packet in use (bytes).
    pub packet_bytes: u16,
    /// Packets sent, also those that only tried a larger size.
    pub sent: u64,
    /// Those that were taken for lost, without those that tried a size.
    pub lost: u64,
    /// How often the congestion controller slowed down, for marks or loss.
    pub slowed: u64,
}

#[derive(Default)]
struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
    connections: AtomicU64,
    open: AtomicU64,
}

/// A tunnel to be opened.
#[derive(Clone, Debug)]
pub struct NewTunnel {
    /// The numbers of its strands, at least one; the first is that of the tunnel.
    pub strands: Vec<TunnelId>,
    /// The node that provides the service.
    pub provider: PublicKey,
    /// To what.
    pub service: ServiceName,
    /// How that speaks.
    pub kind: ServiceKind,
    /// Where to accept connections, port 0 for any; nowhere for streams that the node itself opens.
    pub listen: Option<SocketAddr>,
    /// Where the node accepts the connections that become those streams.
    pub door: Option<SocketAddr>,
}

struct OpenTunnel {
    local: Arc<LocalEnd>,
    listen: Option<SocketAddr>,
}

enum Listener {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Listener {
    async fn bind(kind: ServiceKind, address: SocketAddr) -> std::io::Result<(Self, SocketAddr)> {
        if kind == ServiceKind::Udp {
            let socket = UdpSocket::bind(address).await?;
            let address = socket.local_addr()?;
            return Ok((Self::Udp(socket), address));
        }
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok((Self::Tcp(listener), address))
    }
}

/// All tunnels of a node, in both directions.
pub struct Tunnels {
    identity: Identity,
    members: Members,
    /// Says that `members` has changed.
    changes: watch::Sender<()>,
    /// How to shake hands with callers.
    server: quinn::ServerConfig,
    endpoint: Endpoint,
    plane: Arc<DataPlane>,
    exports: ArcSwap<BTreeMap<ServiceName, Export>>,
    /// Streams and flows of others that are open.
    served: AtomicU32,
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
        members: Members,
        plane: Arc<DataPlane>,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<Arc<Self>, TunnelError> {
        let crypto = |error: &dyn std::fmt::Display| TunnelError::Crypto(error.to_string());
        let mut tls =
            super::tls::server_config(&identity.keypair()).map_err(|error| crypto(&error))?;
        tls.alpn_protocols = vec![PROTOCOL.to_vec()];
        let quic = QuicServerConfig::try_from(tls).map_err(|error| crypto(&error))?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(quic));
        server.migration(false).max_incoming(HANDSHAKES_MAX);
        let socket = OverlaySocket::new(plane.clone())
            .ok_or_else(|| TunnelError::Crypto("the overlay socket is taken".into()))?;
        let config = endpoint_config(identity, LARGE_BYTES).map_err(|error| crypto(&error))?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = Endpoint::new_with_abstract_socket(
            config,
            Some(server.clone()),
            Arc::new(socket),
            runtime,
        )
        .map_err(|error| crypto(&error))?;
        let tunnels = Arc::new(Self {
            identity: identity.clone(),
            members,
            changes: watch::Sender::default(),
            server,
            endpoint,
            plane,
            exports: ArcSwap::default(),
            served: AtomicU32::new(0),
            open: Mutex::default(),
            tasks: tasks.clone(),
            stop: stop.clone(),
        });
        tasks.spawn(accept_tunnels(tunnels.clone()));
        Ok(tunnels)
    }

    /// The roster has changed: ends what connects this node with former members.
    pub(super) fn members_changed(&self) {
        self.changes.send_replace(());
        let roster = self.members.load();
        for open in self.lock_open().values() {
            if roster.is_revoked(&open.local.provider) {
                open.local.cut("the root of this network has revoked the provider");
            }
        }
    }

    fn members_changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
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

    /// Opens a tunnel to a provider that the engine has routes to. Returns where it accepts
    /// connections, with the port that was chosen when it was 0.
    ///
    /// # Errors
    /// [`TunnelError`]; nothing stays open.
    pub async fn open(
        self: &Arc<Self>,
        tunnel: NewTunnel,
    ) -> Result<Option<SocketAddr>, TunnelError> {
        let NewTunnel { strands, provider, service, kind, listen, door } = tunnel;
        let Some(first) = strands.first().copied() else { return Ok(None) };
        let listener = match listen {
            Some(address) => {
                let bound = Listener::bind(kind, address).await;
                Some(bound.map_err(|error| TunnelError::Listen { address, error })?)
            }
            None => None,
        };
        let stop = self.stop.child_token();
        // Also when whoever asked goes away meanwhile.
        let guard = stop.clone().drop_guard();
        let local = Arc::new(LocalEnd::new(&strands, provider, service, kind, stop));
        if let Err(error) = self.connect_all(&local).await {
            local.close();
            return Err(error);
        }
        if local.strands.len() > 1 {
            self.tasks.spawn(self.clone().connect_others(local.clone()));
        }
        if self.plane.is_reserving(first) {
            self.tasks.spawn(self.clone().stay_connected(local.clone()));
        }
        let mut listen = door;
        if let Some((listener, address)) = listener {
            listen = Some(address);
            match listener {
                Listener::Tcp(tcp) => {
                    self.tasks.spawn(accept_tcp(self.clone(), tcp, local.clone()))
                }
                Listener::Udp(socket) => {
                    self.tasks.spawn(udp::accept_udp(self.clone(), socket, local.clone()))
                }
            };
        }
        self.lock_open().insert(first, OpenTunnel { local, listen });
        guard.disarm();
        Ok(listen)
    }

    /// Opens a stream through a tunnel of this node.
    ///
    /// # Errors
    /// [`StreamError`].
    pub async fn stream(self: &Arc<Self>, tunnel: TunnelId) -> Result<TunnelStream, StreamError> {
        let local = self.lock_open().get(&tunnel).map(|open| open.local.clone());
        let local = local.ok_or(StreamError::Closed)?;
        tokio::select! {
            () = local.stop.cancelled() => Err(StreamError::Closed),
            stream = self.begin(&local) => stream,
        }
    }

    /// Whether the provider of a tunnel of this node accepts a stream, which nobody counts.
    ///
    /// # Errors
    /// [`StreamError`].
    pub async fn probe(self: &Arc<Self>, tunnel: TunnelId) -> Result<(), StreamError> {
        let local = self.lock_open().get(&tunnel).map(|open| open.local.clone());
        let local = local.ok_or(StreamError::Closed)?;
        self.begin_uncounted(&local).await?.accepted().await
    }

    /// Tunnels of others that end here, and their streams and flows that are open.
    pub fn served(&self) -> (u32, u32) {
        let ours: usize = self.lock_open().values().map(|open| open.local.strands.len()).sum();
        let tunnels = self.endpoint.open_connections().saturating_sub(ours);
        let streams = self.served.load(Ordering::Relaxed);
        (u32::try_from(tunnels).unwrap_or(u32::MAX), streams)
    }

    /// The target of a service of this node does not answer: the engine looks at it soon.
    fn doubt(&self, name: ServiceName) {
        let provider = self.identity.node_id();
        // A full queue has others like this one.
        let _ = self.plane.events.try_send(Input::ServiceDoubted { name, provider });
    }

    /// Whether a tunnel of this node is open, a route to its provider is alive, and the provider answers.
    pub fn is_reachable(&self, tunnel: TunnelId) -> bool {
        let open = self.lock_open();
        let strands = open.get(&tunnel).map_or(&[][..], |open| &open.local.strands);
        let is_there = |tunnel| self.plane.is_reachable(tunnel) && self.plane.answers(tunnel);
        strands.iter().any(|strand| is_there(strand.tunnel))
    }

    /// Counts a connection that failed, and says so in the log: the first one of a kind, and then
    /// ever more seldom.
    pub fn failed(&self, service: &dyn std::fmt::Display, why: &'static str) {
        self.failed_with(service, why, || None);
    }

    /// The same, with what to do about it.
    pub fn failed_with(
        &self,
        service: &dyn std::fmt::Display,
        why: &'static str,
        advice: impl FnOnce() -> Option<String>,
    ) {
        let times = self.plane.counters().count_nth(why);
        if times.is_power_of_two() {
            let advice = advice().map(|advice| format!(": {advice}")).unwrap_or_default();
            tracing::warn!(%service, times, "a connection failed: {why}{advice}");
        }
    }

    /// Closes a tunnel. Returns the numbers of its strands, `None` when it was not open.
    pub fn close_one(&self, tunnel: TunnelId) -> Option<Vec<TunnelId>> {
        let closed = self.lock_open().remove(&tunnel)?;
        closed.local.close();
        Some(closed.local.strands.iter().map(|strand| strand.tunnel).collect())
    }

    /// Closes everything, also what others opened, and gives the good-byes a moment to leave.
    pub async fn close(&self) {
        self.endpoint.close(VarInt::from_u32(0), b"node stops");
        let _ = tokio::time::timeout(GOODBYE, self.endpoint.wait_idle()).await;
    }

    /// The tunnels of this node.
    pub fn list(&self) -> Vec<TunnelInfo> {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let info = |(tunnel, OpenTunnel { local, listen }): (&TunnelId, &OpenTunnel)| TunnelInfo {
            tunnel: *tunnel,
            strands: local.strands.iter().map(|strand| strand.tunnel).collect(),
            service: local.service.clone(),
            kind: local.kind,
            provider: local.provider,
            listen: *listen,
            bytes: (load(&local.traffic.sent), load(&local.traffic.received)),
            connections: load(&local.traffic.connections),
            open: load(&local.traffic.open),
            ends: local.strands.iter().filter_map(|strand| strand.end_to_end()).collect(),
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
        stop: &CancellationToken,
    ) -> Result<Connection, TunnelError> {
        let unreachable = |reason: String| TunnelError::Unreachable {
            provider: provider.node_id().to_string(),
            reason,
        };
        let crypto = |error: &dyn std::fmt::Display| TunnelError::Crypto(error.to_string());
        if self.members.load().is_revoked(provider) {
            return Err(TunnelError::Revoked(provider.node_id()));
        }
        let peer = identity::peer_id(provider);
        let peer = peer.ok_or_else(|| TunnelError::Crypto("the key is no identity".into()))?;
        let mut tls = super::tls::client_config(&self.identity.keypair(), Some(peer))
            .map_err(|error| crypto(&error))?;
        tls.alpn_protocols = vec![PROTOCOL.to_vec()];
        let quic = QuicClientConfig::try_from(tls).map_err(|error| crypto(&error))?;
        let mut client = quinn::ClientConfig::new(Arc::new(quic));
        let tries = Arc::default();
        client.transport_config(transport(Some(KEEP_ALIVE), &tries));
        let far_end = FarEnd { node: provider.node_id(), tunnel, ours: true };
        let address = far_end.to_addr();
        self.plane.take_key(far_end, None);
        self.plane.flows.note_tries(far_end, &tries);
        // The verifier checks the peer id; QUIC only wants some server name.
        let connecting = self.endpoint.connect_with(client, address, "l");
        let connecting = connecting.map_err(|error| unreachable(error.to_string()))?;
        let connected = match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(connected) => connected.map_err(|error| unreachable(error.to_string()))?,
            Err(_) => return Err(unreachable("no answer".into())),
        };
        if let Some(number) = self.plane.set_key(far_end, &connected, &tries) {
            let (plane, connection, stop) = (self.plane.clone(), connected.clone(), stop.clone());
            let provider = provider.node_id();
            self.tasks.spawn(async move {
                tokio::select! {
                    error = connection.closed() => {
                        if let Some(why) = introduction::refused(&error) {
                            tracing::warn!(%provider, "it takes this node for no member: {why:?}");
                        }
                    }
                    // Whoever asked for the tunnel may be gone, and nobody else closes it.
                    () = stop.cancelled() => connection.close(VarInt::from_u32(0), b"tunnel closed"),
                }
                plane.closed(far_end, number);
            });
        }
        introduction::show(&connected, &self.members).await.map_err(unreachable)?;
        Ok(connected)
    }
}

fn transport(keep_alive: Option<Duration>, tries: &Arc<Tries>) -> Arc<quinn::TransportConfig> {
    let mut transport = quinn::TransportConfig::default();
    let mut larger = quinn::MtuDiscoveryConfig::default();
    larger.upper_bound(LARGE_BYTES).minimum_change(MINIMUM_CHANGE).interval(TRY_LARGER_EVERY);
    let mut cubic = quinn::congestion::CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW_PACKETS * u64::from(PACKET_BYTES));
    let (cubic, tries) = (Arc::new(cubic), tries.clone());
    let congestion = Congestion { cubic, tries, time_threshold: TIME_THRESHOLD };
    transport
        .max_concurrent_bidi_streams(STREAMS_MAX.into())
        // The caller's introduction.
        .max_concurrent_uni_streams(1u32.into())
        .max_idle_timeout(IDLE_TIMEOUT.try_into().ok())
        .keep_alive_interval(keep_alive)
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .send_window(SEND_WINDOW)
        .initial_rtt(INITIAL_RTT)
        .initial_mtu(PACKET_BYTES)
        .min_mtu(PACKET_BYTES)
        .mtu_discovery_config(Some(larger))
        .packet_threshold(PACKET_THRESHOLD)
        .time_threshold(TIME_THRESHOLD)
        .persistent_congestion_threshold(PERSISTENT_CONGESTION)
        .congestion_controller_factory(Arc::new(congestion))
        .datagram_receive_buffer_size(Some(DATAGRAMS_RECEIVED))
        .datagram_send_buffer_size(DATAGRAMS_WAITING);
    Arc::new(transport)
}
