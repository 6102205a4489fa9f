//! A SOCKS5 proxy (RFC 1928) through which local programs reach services by their names.
//!
//! Without authentication, CONNECT to a domain name only: the name is resolved in the mesh, and the
//! port is that of the service whatever the program asks for. An address in numbers is refused: a
//! node is no exit to the internet. All connections to a name share one tunnel, which is opened for
//! the first one and closed when it has not been used for some time. The answer says whether the
//! provider has accepted the stream.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::handle::{NodeHandle, RequestError};
use super::tunnels::TunnelOptions;
use crate::engine::event::CommandError;
use crate::engine::overlay::ServiceKind;
use crate::engine::types::{PublicKey, ServiceName, TunnelId};
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

/// The tunnel that the connections to a name share.
#[derive(Default)]
struct Shared {
    tunnel: Option<(TunnelId, PublicKey)>,
    failed: Option<(Instant, Reply)>,
    used_at: Option<Instant>,
}

struct Proxy {
    node: NodeHandle,
    /// By name; each is held while its tunnel is being opened.
    shared: Mutex<BTreeMap<ServiceName, Arc<Mutex<Shared>>>>,
}

/// Serves until `stop`.
pub(super) async fn run(listener: TcpListener, node: NodeHandle, stop: CancellationToken) {
    let proxy = Arc::new(Proxy { node, shared: Mutex::default() });
    let places = Arc::new(Semaphore::new(STREAMS_MAX as usize));
    let mut connections = JoinSet::new();
    let mut sweep = tokio::time::interval(SWEEP);
    loop {
        let accepting = async {
            let place = places.clone().acquire_owned().await.ok();
            listener.accept().await.map(|(tcp, _)| (tcp, place))
        };
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => {}
            _ = sweep.tick() => proxy.sweep().await,
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
        let (_, record) = providers.first().ok_or(Reply::UnknownName)?;
        if record.kind == ServiceKind::Udp {
            return Err(Reply::CommandNotSupported);
        }
        let providers: Vec<PublicKey> = providers.iter().map(|(key, _)| *key).collect();
        if providers.first() == Some(&self.node.key()) {
            let target = self.node.target(name).ok_or(Reply::UnknownName)?;
            let connecting = tokio::time::timeout(TARGET_TIMEOUT, TcpStream::connect(target));
            let connected = connecting.await.ok().and_then(Result::ok);
            return connected.map(Connected::Here).ok_or(Reply::Refused);
        }
        for again in [true, false] {
            let tunnel = self.tunnel_to(name, &providers).await?;
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

    /// The tunnel to a name, opened when there is none to one of its providers.
    async fn tunnel_to(
        &self,
        name: &ServiceName,
        providers: &[PublicKey],
    ) -> Result<TunnelId, Reply> {
        let shared = self.shared.lock().await.entry(name.clone()).or_default().clone();
        let mut shared = shared.lock().await;
        if let Some((tunnel, provider)) = shared.tunnel {
            let open = self.node.tunnels().iter().any(|info| info.tunnel == tunnel);
            if open && providers.contains(&provider) {
                shared.used_at = Some(Instant::now());
                return Ok(tunnel);
            }
            shared.tunnel = None;
            self.close_soon(tunnel);
        }
        // Those who waited for the same failure do not each try again.
        if let Some((at, reply)) = shared.failed
            && at.elapsed() < FAILURE_SPEAKS
        {
            return Err(reply);
        }
        match self.node.open(name.clone(), None, TunnelOptions::default()).await {
            Ok((tunnel, _)) => {
                let provider = self.node.tunnels().into_iter().find(|info| info.tunnel == tunnel);
                shared.tunnel = provider.map(|info| (tunnel, info.provider));
                shared.used_at = Some(Instant::now());
                shared.failed = None;
                Ok(tunnel)
            }
            Err(error) => {
                tracing::warn!("the proxy cannot reach {name}: {error}");
                let reply = Reply::from(&error);
                shared.failed = Some((Instant::now(), reply));
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

    /// Closes tunnels that are idle, and forgets names without one.
    async fn sweep(&self) {
        let open = self.node.tunnels();
        self.shared.lock().await.retain(|_, shared| {
            // Somebody has it, or is about to take it: it is in use.
            if Arc::strong_count(shared) > 1 {
                return true;
            }
            let Ok(mut held) = shared.try_lock() else { return true };
            let Some((tunnel, _)) = held.tunnel else {
                return held.failed.is_some_and(|(at, _)| at.elapsed() < FAILURE_SPEAKS);
            };
            let Some(info) = open.iter().find(|info| info.tunnel == tunnel) else { return false };
            if info.open > 0 {
                held.used_at = Some(Instant::now());
            }
            let idle = held.used_at.is_none_or(|at| at.elapsed() >= TUNNEL_IDLE);
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
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_and_everything_else_is_refused() {
        let name = |text: &str| wanted(CONNECT, 3, text.as_bytes());
        assert_eq!(name("ByronWade.local"), Ok("byronwade.local".parse().unwrap()));
        assert_eq!(name("byronwade.local."), Ok("byronwade.local".parse().unwrap()));
        for address in ["127.0.0.1", "::1"] {
            assert_eq!(name(address), Err(Reply::NotAllowed), "no exit, also when written out");
        }
        assert_eq!(wanted(CONNECT, 1, &[127, 0, 0, 1]), Err(Reply::NotAllowed));
        assert_eq!(wanted(CONNECT, 4, b"local.local.loca"), Err(Reply::NotAllowed));
        for wrong in ["", "a..b", "a b", "-a"] {
            assert_eq!(name(wrong), Err(Reply::UnknownName));
        }
        assert_eq!(wanted(CONNECT, 3, &[0xff]), Err(Reply::UnknownName));
        for command in [0, 2, 3, 9] {
            assert_eq!(wanted(command, 3, b"a.local"), Err(Reply::CommandNotSupported));
        }
    }

    #[tokio::test]
    async fn an_address_that_is_taken_is_no_proxy_and_no_error() {
        assert!(listen("").await.is_none());
        let taken = listen("127.0.0.1:0").await.unwrap();
        assert!(listen(&taken.local_addr().unwrap().to_string()).await.is_none());
    }
}
