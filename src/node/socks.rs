//! A SOCKS5 proxy (RFC 1928) through which local programs reach services by their names.
//!
//! Without authentication, CONNECT to a domain name only: the name is resolved in the mesh, and the
//! port is that of the service whatever the program asks for. An address in numbers is refused: a
//! node is no exit to the internet. All connections to a provider of a name share one tunnel, which
//! is opened for the first one and closed when it has not been used for some time. The answer says
//! whether a provider has accepted the stream. Of several providers the first that accepts is taken
//! (`providers`); when it is lost, its connections are ended, and new ones go to the next.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::handle::{NodeHandle, RequestError};
use super::providers::{Standing, first, order};
use super::tunnels::TunnelOptions;
use crate::engine::event::CommandError;
use crate::engine::overlay::{ServiceKind, ServiceRecord};
use crate::engine::types::{NodeId, PublicKey, ServiceName, TunnelId};
use crate::net::tunnel::{STREAMS_MAX, StreamError, TunnelStream};

/// How long a program may take to say what it wants.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the target of a service of this node may take to accept a connection.
const TARGET_TIMEOUT: Duration = Duration::from_secs(5);
/// A tunnel that carried nothing for this long is closed.
const TUNNEL_IDLE: Duration = Duration::from_secs(600);
/// How often to look for such tunnels.
const SWEEP: Duration = Duration::from_secs(30);
/// How long a tunnel that did not come up speaks for the next connections.
const FAILURE_SPEAKS: Duration = Duration::from_secs(1);
/// How often to look whether providers can still be reached.
const WATCH: Duration = Duration::from_millis(250);
/// After how long without a route to a provider its connections are ended, when there is another.
const LOST_FOR: Duration = Duration::from_secs(1);
/// For how long a provider that failed is tried after the others.
const DOUBT: Duration = Duration::from_secs(10);
/// SOCKS version 5.
const VERSION: u8 = 5;
/// No authentication.
const NO_AUTHENTICATION: u8 = 0;
/// None of the offered ways to authenticate will do.
const NO_METHOD: u8 = 0xff;
/// The command to connect.
const CONNECT: u8 = 1;

/// What a program is answered: the codes of RFC 1928, section 6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    Succeeded = 0,
    Failure = 1,
    NotAllowed = 2,
    NoRoute = 3,
    UnknownName = 4,
    Refused = 5,
    CommandNotSupported = 7,
    AddressNotSupported = 8,
}

impl From<&RequestError> for Reply {
    fn from(error: &RequestError) -> Self {
        match error {
            RequestError::Command(CommandError::UnknownName(_)) => Self::UnknownName,
            RequestError::NoRoute(_) | RequestError::Tunnel(_) => Self::NoRoute,
            _ => Self::Failure,
        }
    }
}

impl From<StreamError> for Reply {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::NoRoute | StreamError::Unreachable => Self::NoRoute,
            StreamError::UnknownService => Self::UnknownName,
            StreamError::NotAllowed => Self::NotAllowed,
            StreamError::TargetUnreachable => Self::Refused,
            _ => Self::Failure,
        }
    }
}

/// Listens where the setting says. When that is impossible the node runs without a proxy, and the
/// log says so.
pub(super) async fn listen(setting: &str) -> Option<TcpListener> {
    let address: SocketAddr = setting.parse().ok()?;
    match TcpListener::bind(address).await {
        Ok(listener) => {
            if !address.ip().is_loopback() {
                tracing::warn!("whoever can connect to the proxy on {address} acts as this node");
            }
            Some(listener)
        }
        Err(error) => {
            tracing::warn!(
                "no SOCKS5 proxy: cannot listen on {address}: {error}; set socks in the section \
                 [entry] to another address, or to \"\" for none"
            );
            None
        }
    }
}

/// What the connections to one provider of a name share.
#[derive(Default)]
struct Shared {
    known: std::sync::Mutex<Known>,
    /// Held while the tunnel is being opened.
    opening: Mutex<()>,
}

#[derive(Default)]
struct Known {
    tunnel: Option<TunnelId>,
    /// Why there is none.
    failed: Option<(Instant, Reply)>,
    used_at: Option<Instant>,
    accepted_at: Option<Instant>,
    /// When a connection failed, and none was accepted since.
    doubted_at: Option<Instant>,
    /// Since when no route to it is alive.
    lost_at: Option<Instant>,
    /// Others provide the same.
    has_others: bool,
}

impl Shared {
    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Provider = (PublicKey, ServiceRecord);

struct Proxy {
    node: NodeHandle,
    shared: std::sync::Mutex<BTreeMap<(ServiceName, NodeId), Arc<Shared>>>,
}

/// Serves until `stop`.
pub(super) async fn run(listener: TcpListener, node: NodeHandle, stop: CancellationToken) {
    let proxy = Arc::new(Proxy { node, shared: std::sync::Mutex::default() });
    let places = Arc::new(Semaphore::new(STREAMS_MAX as usize));
    let mut connections = JoinSet::new();
    let mut sweep = tokio::time::interval(SWEEP);
    let mut watch = tokio::time::interval(WATCH);
    watch.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let accepting = async {
            let place = places.clone().acquire_owned().await.ok();
            listener.accept().await.map(|(tcp, _)| (tcp, place))
        };
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => {}
            _ = sweep.tick() => proxy.sweep(),
            _ = watch.tick() => proxy.watch(),
            accepted = accepting => match accepted {
                Ok((tcp, place)) => {
                    let proxy = proxy.clone();
                    connections.spawn(async move {
                        let _place = place;
                        proxy.serve(tcp).await;
                    });
                }
                // Out of file descriptors, mostly: others have to close some first.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }
}

impl Proxy {
    async fn serve(&self, mut tcp: TcpStream) {
        let _ = tcp.set_nodelay(true);
        let head = tokio::time::timeout(HEAD_TIMEOUT, read_head(&mut tcp)).await;
        let Ok(Ok(wanted)) = head else {
            // Somebody who does not speak SOCKS5, or has gone.
            self.node.tunnels.failed(&"proxy", "socks-malformed");
            return;
        };
        let connected = match &wanted {
            Ok(name) => self.connect(name).await,
            Err(reply) => Err(*reply),
        };
        let reply = connected.as_ref().err().copied().unwrap_or(Reply::Succeeded);
        if answer(&mut tcp, reply).await.is_err() {
            return;
        }
        match connected {
            Ok(Connected::Tunnel(stream)) => {
                if let Err(why) = stream.carry(tcp).await {
                    self.node.tunnels.failed(&"proxy", why.as_str());
                }
            }
            Ok(Connected::Here(mut target)) => {
                let _ = tokio::io::copy_bidirectional(&mut tcp, &mut target).await;
            }
            Err(_) => {}
        }
    }

    async fn connect(&self, name: &ServiceName) -> Result<Connected, Reply> {
        let resolved = self.node.resolve(name.clone(), false).await;
        let (providers, _) = resolved.map_err(|error| Reply::from(&error))?;
        self.connect_to(name, providers).await
    }

    /// Connects to whichever of the providers accepts first.
    async fn connect_to(
        &self,
        name: &ServiceName,
        providers: Vec<Provider>,
    ) -> Result<Connected, Reply> {
        let able = |(_, record): &Provider| record.kind != ServiceKind::Udp;
        let providers: Vec<Provider> = providers.into_iter().filter(able).collect();
        if providers.is_empty() {
            return Err(Reply::CommandNotSupported);
        }
        let providers = self.in_order(name, providers).await?;
        let connected = first(providers, |provider| self.connect_one(name, provider)).await;
        connected.map_err(|failures| {
            // What a provider answered says more than that another one did not.
            let telling = |reply: &Reply| match reply {
                Reply::NoRoute => 0,
                Reply::Failure => 1,
                _ => 2,
            };
            failures.into_iter().max_by_key(telling).unwrap_or(Reply::Failure)
        })
    }

    async fn in_order(
        &self,
        name: &ServiceName,
        providers: Vec<Provider>,
    ) -> Result<Vec<Provider>, Reply> {
        let has_others = providers.len() > 1;
        let nodes = providers.iter().map(|(key, _)| key.node_id());
        let linked = match has_others {
            true => self.node.linked(nodes).await.map_err(|error| Reply::from(&error))?,
            false => nodes.collect(),
        };
        let known = providers.into_iter().map(|provider| {
            let node = provider.0.node_id();
            let shared = self.shared_with(name, node);
            let mut known = shared.known();
            known.has_others = has_others;
            let doubted = known.doubted_at.is_some_and(|at| at.elapsed() < DOUBT);
            let reachable = |tunnel| self.node.tunnels.is_reachable(tunnel);
            let standing = match known.tunnel {
                _ if provider.0 == self.node.key() => Standing::Here,
                _ if doubted => Standing::Doubtful,
                Some(tunnel) if reachable(tunnel) => Standing::InUse,
                None if linked.contains(&node) => Standing::Fresh,
                _ => Standing::Doubtful,
            };
            (provider, standing, known.accepted_at)
        });
        Ok(order(known.collect()))
    }

    fn shared_with(&self, name: &ServiceName, node: NodeId) -> Arc<Shared> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.entry((name.clone(), node)).or_default().clone()
    }

    async fn connect_one(
        &self,
        name: &ServiceName,
        provider: Provider,
    ) -> Result<Connected, Reply> {
        if provider.0 == self.node.key() {
            let target = self.node.target(name).ok_or(Reply::UnknownName)?;
            let connecting = tokio::time::timeout(TARGET_TIMEOUT, TcpStream::connect(target));
            let connected = connecting.await.ok().and_then(Result::ok);
            return connected.map(Connected::Here).ok_or(Reply::Refused);
        }
        let shared = self.shared_with(name, provider.0.node_id());
        let connected = self.connect_over(name, &shared, provider).await;
        let mut known = shared.known();
        let now = Some(Instant::now());
        match connected {
            Ok(_) => (known.accepted_at, known.doubted_at) = (now, None),
            Err(_) => known.doubted_at = now,
        }
        connected
    }

    async fn connect_over(
        &self,
        name: &ServiceName,
        shared: &Shared,
        provider: Provider,
    ) -> Result<Connected, Reply> {
        for again in [true, false] {
            let tunnel = self.tunnel_to(name, shared, provider.clone()).await?;
            let opened = async {
                let mut stream = self.node.stream(tunnel).await?;
                stream.accepted().await?;
                Ok(stream)
            };
            match opened.await {
                Ok(stream) => return Ok(Connected::Tunnel(Box::new(stream))),
                // Closed since, by a person or because it was idle, or its provider was restarted.
                Err(StreamError::Closed | StreamError::Lost) if again => {}
                Err(error) => {
                    self.node.tunnels.failed(name, error.as_str());
                    return Err(error.into());
                }
            }
        }
        Err(Reply::Failure)
    }

    /// The tunnel to a provider, opened when there is none.
    async fn tunnel_to(
        &self,
        name: &ServiceName,
        shared: &Shared,
        provider: Provider,
    ) -> Result<TunnelId, Reply> {
        let _opening = shared.opening.lock().await;
        {
            let mut known = shared.known();
            let open = self.node.tunnels();
            let tunnel = known.tunnel;
            if let Some(tunnel) = tunnel.filter(|id| open.iter().any(|info| info.tunnel == *id)) {
                known.used_at = Some(Instant::now());
                return Ok(tunnel);
            }
            known.tunnel = None;
            // Those who waited for the same failure do not each try again.
            if let Some((at, reply)) = known.failed
                && at.elapsed() < FAILURE_SPEAKS
            {
                return Err(reply);
            }
        }
        let opened = self.node.open_to(name.clone(), provider, None, TunnelOptions::default());
        let opened = opened.await;
        let mut known = shared.known();
        let now = Instant::now();
        match opened {
            Ok((tunnel, _)) => {
                known.tunnel = Some(tunnel);
                (known.used_at, known.failed, known.lost_at) = (Some(now), None, None);
                Ok(tunnel)
            }
            Err(error) => {
                tracing::warn!("the proxy cannot reach {name}: {error}");
                let reply = Reply::from(&error);
                known.failed = Some((now, reply));
                Err(reply)
            }
        }
    }

    fn close_soon(&self, tunnel: TunnelId) {
        let node = self.node.clone();
        tokio::spawn(async move {
            let _ = node.close_tunnel(tunnel).await;
        });
    }

    /// Closes tunnels to providers that cannot be reached any more while others provide the same:
    /// the programs that use them begin anew, and better at once than after QUIC's time-out.
    fn watch(&self) {
        let all = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        for ((name, provider), shared) in all.iter() {
            let mut known = shared.known();
            let Some(tunnel) = known.tunnel else { continue };
            if self.node.tunnels.is_reachable(tunnel) {
                known.lost_at = None;
                continue;
            }
            let lost_at = *known.lost_at.get_or_insert_with(Instant::now);
            if known.has_others && lost_at.elapsed() >= LOST_FOR {
                tracing::warn!("{provider} is lost, others provide {name} too: closing its tunnel");
                (known.tunnel, known.lost_at) = (None, None);
                self.close_soon(tunnel);
            }
        }
    }

    /// Closes tunnels that are idle, and forgets providers without one.
    fn sweep(&self) {
        let open = self.node.tunnels();
        let mut all = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, shared| {
            // Somebody has it, or is about to take it: it is in use.
            if Arc::strong_count(shared) > 1 {
                return true;
            }
            let mut known = shared.known();
            let Some(tunnel) = known.tunnel else {
                return known.doubted_at.is_some_and(|at| at.elapsed() < DOUBT);
            };
            let Some(info) = open.iter().find(|info| info.tunnel == tunnel) else { return false };
            if info.open > 0 {
                known.used_at = Some(Instant::now());
            }
            let idle = known.used_at.is_none_or(|at| at.elapsed() >= TUNNEL_IDLE);
            if idle {
                self.close_soon(tunnel);
            }
            !idle
        });
    }
}

enum Connected {
    Tunnel(Box<TunnelStream>),
    /// The service is this node's own.
    Here(TcpStream),
}

/// Reads what a program wants: a name, or what it is to be told instead. Reads not a byte more: data
/// may follow at once.
async fn read_head(tcp: &mut TcpStream) -> std::io::Result<Result<ServiceName, Reply>> {
    let not_socks = || std::io::Error::from(std::io::ErrorKind::InvalidData);
    let mut greeting = [0; 2];
    tcp.read_exact(&mut greeting).await?;
    if greeting[0] != VERSION {
        return Err(not_socks());
    }
    let mut methods = vec![0; usize::from(greeting[1])];
    tcp.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        tcp.write_all(&[VERSION, NO_METHOD]).await?;
        return Err(not_socks());
    }
    tcp.write_all(&[VERSION, NO_AUTHENTICATION]).await?;
    let mut request = [0; 4];
    tcp.read_exact(&mut request).await?;
    if request[0] != VERSION {
        return Err(not_socks());
    }
    let length = match request[3] {
        1 => 4,
        3 => usize::from(tcp.read_u8().await?),
        4 => 16,
        _ => return Ok(Err(Reply::AddressNotSupported)),
    };
    let mut host = vec![0; length];
    tcp.read_exact(&mut host).await?;
    let _port = tcp.read_u16().await?;
    Ok(wanted(request[1], request[3], &host))
}

fn wanted(command: u8, address_type: u8, host: &[u8]) -> Result<ServiceName, Reply> {
    if command != CONNECT {
        return Err(Reply::CommandNotSupported);
    }
    let text = std::str::from_utf8(host).map_err(|_| Reply::UnknownName)?;
    if address_type != 3 || text.parse::<IpAddr>().is_ok() {
        return Err(Reply::NotAllowed);
    }
    text.strip_suffix('.').unwrap_or(text).parse().map_err(|_| Reply::UnknownName)
}

async fn answer(tcp: &mut TcpStream, reply: Reply) -> std::io::Result<()> {
    // The address that was bound means nothing here: 0.0.0.0, port 0.
    tcp.write_all(&[VERSION, reply as u8, 0, 1, 0, 0, 0, 0, 0, 0]).await
}

#[cfg(test)]
mod tests;
