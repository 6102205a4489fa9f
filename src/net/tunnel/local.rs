//! The end that opened a tunnel: connections on its local address become streams.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quinn::VarInt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::strands::{self, Strand};
use super::stream::{Live, StreamError, TunnelStream};
use super::{EndToEnd, STREAMS_MAX, Traffic, TunnelError, Tunnels, udp};
use crate::engine::overlay::ServiceKind;
use crate::engine::types::{PublicKey, ServiceName, TunnelId};

/// How long a new stream waits for a route when none is alive, and how often it looks.
const NO_ROUTE_WAIT: Duration = Duration::from_secs(3);
/// See [`NO_ROUTE_WAIT`].
const NO_ROUTE_POLL: Duration = Duration::from_millis(50);
/// How long a failed connection speaks for the next ones.
pub(super) const FAILURE_SPEAKS: Duration = Duration::from_secs(1);
/// How long a tunnel that opens waits for its other strands once the first is connected.
const OTHERS_WAIT: Duration = Duration::from_secs(1);
/// How often it looks later whether there is a route for those that had none.
const OTHERS_POLL: Duration = Duration::from_millis(250);
/// The longest of these intervals; each is twice the one before, as the far end may refuse.
const OTHERS_POLL_MAX: Duration = Duration::from_secs(30);

/// A tunnel of this node.
pub(super) struct LocalEnd {
    pub(super) service: ServiceName,
    pub(super) kind: ServiceKind,
    pub(super) provider: PublicKey,
    pub(super) strands: Vec<LocalStrand>,
    pub(super) traffic: Traffic,
    pub(super) stop: CancellationToken,
    /// Held while a strand is chosen, so that streams that begin together spread.
    choosing: Mutex<()>,
}

/// One of its connections.
pub(super) struct LocalStrand {
    pub(super) tunnel: TunnelId,
    live: Mutex<Option<Arc<Live>>>,
    /// Held while it is made anew; when that failed last.
    connecting: tokio::sync::Mutex<Option<Instant>>,
    pub(super) open: AtomicU64,
}

impl LocalStrand {
    /// The connection, unless it was lost.
    pub(super) fn live(&self) -> Option<Arc<Live>> {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.as_ref().filter(|live| live.is_open()).cloned()
    }

    /// How its connection sees the route, unless it was lost.
    pub(super) fn end_to_end(&self) -> Option<EndToEnd> {
        let path = self.live()?.connection.stats().path;
        Some(EndToEnd {
            tunnel: self.tunnel,
            rtt: path.rtt,
            window: path.cwnd,
            packet_bytes: path.current_mtu,
            sent: path.sent_packets,
            lost: path.lost_packets,
            slowed: path.congestion_events,
        })
    }
}

/// Counts a stream for as long as it is open.
pub(super) struct OpenStream {
    local: Arc<LocalEnd>,
    strand: usize,
}

impl OpenStream {
    fn new(local: &Arc<LocalEnd>, strand: usize) -> Self {
        local.strands[strand].open.fetch_add(1, Ordering::Relaxed);
        local.traffic.open.fetch_add(1, Ordering::Relaxed);
        Self { local: local.clone(), strand }
    }

    pub(super) fn traffic(&self) -> &Traffic {
        &self.local.traffic
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.local.strands[self.strand].open.fetch_sub(1, Ordering::Relaxed);
        self.local.traffic.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl LocalEnd {
    pub(super) fn new(
        strands: &[TunnelId],
        provider: PublicKey,
        service: ServiceName,
        kind: ServiceKind,
        stop: CancellationToken,
    ) -> Self {
        let strand = |tunnel: &TunnelId| LocalStrand {
            tunnel: *tunnel,
            live: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
            open: AtomicU64::new(0),
        };
        Self {
            service,
            kind,
            provider,
            strands: strands.iter().map(strand).collect(),
            traffic: Traffic::default(),
            stop,
            choosing: Mutex::default(),
        }
    }

    /// Ends its connections.
    pub(super) fn close(&self) {
        self.stop.cancel();
        self.cut("tunnel closed");
    }

    /// Ends its connections as they are now.
    pub(super) fn cut(&self, why: &str) {
        for live in self.strands.iter().filter_map(LocalStrand::live) {
            live.connection.close(VarInt::from_u32(0), why.as_bytes());
        }
    }
}

impl Tunnels {
    /// Connects those strands of a new tunnel that have a route. Only the first has to succeed.
    pub(super) async fn connect_all(
        self: &Arc<Self>,
        local: &Arc<LocalEnd>,
    ) -> Result<(), TunnelError> {
        let routed = |index: &usize| self.plane.is_reachable(local.strands[*index].tunnel);
        let others = (1..local.strands.len()).filter(routed);
        let others: Vec<_> = others.map(|index| self.connect_soon(local, index)).collect();
        self.connect_strand(local, 0).await?;
        let all = futures::future::join_all(others.into_iter().flatten());
        let _ = tokio::time::timeout(OTHERS_WAIT, all).await;
        Ok(())
    }

    /// Connects the other strands of a tunnel that is open as soon as they have a route, so that streams
    /// which come all at once find them there: each stays where it began.
    pub(super) async fn connect_others(self: Arc<Self>, local: Arc<LocalEnd>) {
        let connected = async |index: usize| {
            let strand = &local.strands[index];
            let mut pause = OTHERS_POLL;
            while strand.live().is_none() {
                tokio::time::sleep(pause).await;
                if self.plane.is_reachable(strand.tunnel) {
                    self.reconnect(&local, index).await;
                }
                pause = (pause * 2).min(OTHERS_POLL_MAX);
            }
        };
        tokio::select! {
            () = local.stop.cancelled() => {}
            _ = futures::future::join_all((1..local.strands.len()).map(connected)) => {}
        }
    }

    /// Connects a tunnel with a reservation anew whenever its connection is lost, also while nobody uses it:
    /// nodes set bandwidth aside for who proves to be a caller of the provider.
    pub(super) async fn stay_connected(self: Arc<Self>, local: Arc<LocalEnd>) {
        let strand = &local.strands[0];
        let connecting = async {
            let mut pause = OTHERS_POLL;
            loop {
                if let Some(live) = strand.live() {
                    let begun = Instant::now();
                    live.connection.closed().await;
                    if begun.elapsed() > OTHERS_POLL_MAX {
                        pause = OTHERS_POLL;
                    }
                }
                tokio::time::sleep(pause).await;
                if self.plane.is_reachable(strand.tunnel) {
                    self.reconnect(&local, 0).await;
                    pause = (pause * 2).min(OTHERS_POLL_MAX);
                }
            }
        };
        tokio::select! {
            () = local.stop.cancelled() => {}
            () = connecting => {}
        }
    }

    async fn connect_strand(
        self: &Arc<Self>,
        local: &Arc<LocalEnd>,
        index: usize,
    ) -> Result<Arc<Live>, TunnelError> {
        let strand = &local.strands[index];
        let live = Live::new(self.connect(strand.tunnel, &local.provider, &local.stop).await?);
        if local.kind == ServiceKind::Udp {
            self.tasks.spawn(udp::deliver(self.clone(), local.clone(), live.clone()));
        }
        *strand.live.lock().unwrap_or_else(PoisonError::into_inner) = Some(live.clone());
        if local.stop.is_cancelled() {
            local.close();
        }
        Ok(live)
    }

    /// A lost strand's connection, made anew.
    async fn reconnect(self: &Arc<Self>, local: &Arc<LocalEnd>, index: usize) -> Option<Arc<Live>> {
        let strand = &local.strands[index];
        let mut failed_at = strand.connecting.lock().await;
        if let Some(live) = strand.live() {
            return Some(live);
        }
        // Those who waited for the same failure do not each try again.
        if failed_at.is_some_and(|at| at.elapsed() < FAILURE_SPEAKS) {
            return None;
        }
        let live = self.connect_strand(local, index).await.ok();
        *failed_at = if live.is_some() { None } else { Some(Instant::now()) };
        live
    }

    /// Makes a lost strand anew in the background, unless that is under way.
    fn connect_soon(
        self: &Arc<Self>,
        local: &Arc<LocalEnd>,
        index: usize,
    ) -> Option<tokio::task::JoinHandle<()>> {
        if local.strands[index].connecting.try_lock().is_err() {
            return None;
        }
        let (tunnels, local) = (self.clone(), local.clone());
        Some(self.tasks.spawn(async move {
            let stop = local.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                _ = tunnels.reconnect(&local, index) => {}
            }
        }))
    }

    /// Opens a stream for somebody.
    pub(super) async fn begin(
        self: &Arc<Self>,
        local: &Arc<LocalEnd>,
    ) -> Result<TunnelStream, StreamError> {
        let stream = self.begin_uncounted(local).await?;
        local.traffic.connections.fetch_add(1, Ordering::Relaxed);
        Ok(stream)
    }

    /// Opens a stream through a tunnel and names the service.
    pub(super) async fn begin_uncounted(
        self: &Arc<Self>,
        local: &Arc<LocalEnd>,
    ) -> Result<TunnelStream, StreamError> {
        // A moment for the route to come back; then better an error than a connection that hangs.
        let deadline = Instant::now() + NO_ROUTE_WAIT;
        let reachable = |strand: &LocalStrand| self.plane.is_reachable(strand.tunnel);
        let first = loop {
            if let Some(first) = local.strands.iter().position(reachable) {
                break first;
            }
            if Instant::now() >= deadline {
                return Err(StreamError::NoRoute);
            }
            tokio::time::sleep(NO_ROUTE_POLL).await;
        };
        let (live, open) = match self.choose(local) {
            Some(chosen) => chosen,
            None => {
                let live = self.reconnect(local, first).await.ok_or(StreamError::Unreachable)?;
                (live, OpenStream::new(local, first))
            }
        };
        let (mut send, recv) = live.connection.open_bi().await.map_err(|_| StreamError::Lost)?;
        let name = local.service.as_str().as_bytes();
        let mut hello = (name.len() as u16).to_be_bytes().to_vec();
        hello.extend(name);
        send.write_all(&hello).await.map_err(|_| StreamError::Lost)?;
        Ok(TunnelStream { live, send, recv, accepted: false, open })
    }

    /// The best strand that is connected; those that are not are made anew meanwhile.
    fn choose(self: &Arc<Self>, local: &Arc<LocalEnd>) -> Option<(Arc<Live>, OpenStream)> {
        let _choosing = local.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let lives: Vec<_> = local.strands.iter().map(LocalStrand::live).collect();
        let mut known = Vec::with_capacity(lives.len());
        for (index, (strand, live)) in local.strands.iter().zip(&lives).enumerate() {
            let reachable = self.plane.is_reachable(strand.tunnel);
            if live.is_none() && reachable && local.strands.len() > 1 {
                self.connect_soon(local, index);
            }
            known.push(Strand {
                usable: live.is_some() && reachable,
                capacity: self.plane.capacity(strand.tunnel),
                open: strand.open.load(Ordering::Relaxed),
            });
        }
        let chosen = strands::choose(&known)?;
        let live = lives.into_iter().nth(chosen).flatten()?;
        Some((live, OpenStream::new(local, chosen)))
    }
}

pub(super) async fn accept_tcp(tunnels: Arc<Tunnels>, listener: TcpListener, local: Arc<LocalEnd>) {
    // As many as the tunnel carries; further ones wait in the system's queue.
    let places = Arc::new(tokio::sync::Semaphore::new(STREAMS_MAX as usize));
    loop {
        let accepting = async {
            let place = places.clone().acquire_owned().await.ok();
            listener.accept().await.map(|(tcp, _)| (tcp, place))
        };
        let accepted = tokio::select! {
            () = local.stop.cancelled() => return,
            accepted = accepting => accepted,
        };
        let Ok((tcp, place)) = accepted else {
            // Out of file descriptors, mostly: others have to close some first.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (tunnels, local) = (tunnels.clone(), local.clone());
        tunnels.tasks.clone().spawn(async move {
            let _place = place;
            tokio::select! {
                () = local.stop.cancelled() => {}
                result = carry(&tunnels, &local, tcp) => {
                    if let Err(why) = result {
                        tunnels.failed(&local.service, why.as_str());
                    }
                }
            }
        });
    }
}

async fn carry(
    tunnels: &Arc<Tunnels>,
    local: &Arc<LocalEnd>,
    tcp: TcpStream,
) -> Result<(), StreamError> {
    tunnels.begin(local).await?.carry(tcp).await
}
