//! A SOCKS5 proxy (RFC 1928) through which local programs reach services by their names.
//!
//! Without authentication, CONNECT to a domain name only: the name is resolved in the mesh, and the
//! port is that of the service whatever the program asks for. An address in numbers is refused: a
//! node is no exit to the internet. The answer says whether a provider has accepted the stream; which
//! one is chosen, and over which tunnel, says `entrance`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::entrance::{Connected, Entrance, SWEEP, WATCH};
use super::handle::NodeHandle;
use super::refusal::Refusal;
use super::tunnels::TunnelOptions;
use crate::engine::types::ServiceName;
use crate::net::tunnel::STREAMS_MAX;

/// How long a program may take to say what it wants.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
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

impl From<Refusal> for Reply {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Failure => Self::Failure,
            Refusal::NoConnections => Self::CommandNotSupported,
            Refusal::NotAllowed => Self::NotAllowed,
            Refusal::NoRoute => Self::NoRoute,
            Refusal::UnknownName => Self::UnknownName,
            Refusal::Refused => Self::Refused,
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

struct Proxy {
    node: NodeHandle,
    entrance: Entrance,
}

/// Serves until `stop`.
pub(super) async fn run(listener: TcpListener, node: NodeHandle, stop: CancellationToken) {
    let entrance = Entrance::new(node.clone(), TunnelOptions::default(), None);
    let proxy = Arc::new(Proxy { node, entrance });
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
            _ = sweep.tick() => proxy.entrance.sweep(),
            _ = watch.tick() => if proxy.entrance.watch().await.is_err() { return },
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
            let advice = || Some("it speaks no SOCKS5; with curl: --proxy socks5h://".into());
            self.node.tunnels.failed_with(&"proxy", "socks-malformed", advice);
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
        let (providers, _) = resolved.map_err(|error| Refusal::from(&error))?;
        Ok(self.entrance.connect_to(name, providers).await?)
    }
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
