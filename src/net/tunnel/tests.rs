//! Two nodes whose data planes are joined in this process: no swarm admits anybody here, as between
//! the two ends of a tunnel of several hops.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::engine::forward::{Binding, ForwardingSnapshot};
use crate::engine::overlay::membership::{Author, Membership, Revocation};
use crate::engine::overlay::wire::Signed;
use crate::engine::overlay::{Credential, Roster};
use crate::engine::types::Route;
use crate::net::flows::hold;
use crate::net::link::{LANES, Link};
use crate::net::{now, watch as watching};

const TUNNEL: TunnelId = TunnelId(1);
const HOUR: Duration = Duration::from_secs(3_600);
/// Shorter than the silence after which QUIC gives a connection up.
const PATIENCE: Duration = Duration::from_secs(30);

fn root() -> ed25519_dalek::SigningKey {
    ed25519_dalek::SigningKey::from_bytes(&[9; 32])
}

struct End {
    key: PublicKey,
    members: Members,
    plane: Arc<DataPlane>,
    tunnels: Arc<Tunnels>,
    /// How long what it sends is under way.
    delay: Duration,
}

impl End {
    /// A node of key 9's network, or one that only says so.
    fn start(is_member: bool, stop: &CancellationToken) -> Self {
        let identity = Identity::generate();
        let key = identity.public_key();
        let author = Author::root(root());
        let credential = match is_member {
            true => Credential::issue(&author.key, &key, now(), now() + HOUR),
            false => Credential::default(),
        };
        let roster = Roster::new(author.public(), credential);
        let members: Members = Arc::new(ArcSwap::from_pointee(roster));
        // Nobody reads what the planes report; their queue is bounded.
        let (events, _) = tokio::sync::mpsc::channel(1);
        let plane = Arc::new(DataPlane::new(key.node_id(), events));
        tokio::spawn(watching::run(plane.clone(), stop.clone()));
        let tasks = TaskTracker::new();
        let tunnels = Tunnels::start(&identity, members.clone(), plane.clone(), &tasks, stop);
        Self { key, members, plane, tunnels: tunnels.unwrap(), delay: Duration::ZERO }
    }

    /// A link to another node, and a route over it.
    fn link(&self, to: &Self) {
        let link = Arc::new(Link::new(to.key.node_id(), None));
        assert!(self.plane.add_link(link.clone()));
        for lane in 0..LANES {
            let (link, from, to) = (link.clone(), self.key.node_id(), to.plane.clone());
            let (delay, (sender, mut arriving)) = (self.delay, tokio::sync::mpsc::channel(1_024));
            tokio::spawn(async move {
                loop {
                    let mut buffer = Vec::new();
                    link.take(lane, &mut buffer);
                    if buffer.is_empty() {
                        link.ready(lane).await;
                    } else if sender.send((tokio::time::Instant::now(), buffer)).await.is_err() {
                        return;
                    }
                }
            });
            tokio::spawn(async move {
                while let Some((sent, buffer)) = arriving.recv().await {
                    if delay > Duration::ZERO {
                        tokio::time::sleep_until(sent + delay).await;
                    }
                    let mut frames = &buffer[..];
                    while let [high, low, rest @ ..] = frames {
                        let length = usize::from(u16::from_be_bytes([*high, *low]));
                        to.received(from, rest[..length].to_vec());
                        frames = &rest[length..];
                    }
                }
            });
        }
        self.routes(to, &[TUNNEL], None);
    }

    /// These tunnels have routes to another node, over the link to it, and want so much set aside.
    fn routes(&self, to: &Self, tunnels: &[TunnelId], reserved: Option<u64>) {
        let binding = Binding {
            destination: to.key.node_id(),
            route: Route::new([self.key.node_id(), to.key.node_id()]).ok(),
            reachable: true,
            route_id: 1,
            backup: None,
            copies: false,
            capacity: None,
            reserved,
        };
        let bindings = tunnels.iter().map(|tunnel| (*tunnel, binding.clone()));
        let tunnels = bindings.collect();
        let snapshot = ForwardingSnapshot { tunnels, ..ForwardingSnapshot::default() };
        self.plane.set_snapshot(Arc::new(snapshot));
    }

    /// This node hears that the root has revoked a key.
    fn hears_of_revocation(&self, key: PublicKey) {
        let mut membership = Membership::new(Roster::clone(&self.members.load()));
        let revocation = Revocation { key, at: now() };
        membership.revoke(&Signed::seal(&Author::root(root()), &revocation)).unwrap();
        self.members.store(membership.roster().clone());
        self.tunnels.members_changed();
    }

    fn counted(&self, word: &str) -> u64 {
        self.plane.counters().dropped().get(word).copied().unwrap_or_default()
    }
}

/// A caller with a tunnel to a provider of an echo. Returns where the tunnel accepts connections.
async fn open(caller: &End, provider: &End) -> Result<SocketAddr, TunnelError> {
    open_with(caller, provider, vec![TUNNEL], None).await
}

/// The same, with these strands, of which the first has a route and perhaps a reservation.
async fn open_with(
    caller: &End,
    provider: &End,
    strands: Vec<TunnelId>,
    reserved: Option<u64>,
) -> Result<SocketAddr, TunnelError> {
    let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = echo.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = echo.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    let (service, kind): (ServiceName, _) = ("a.local".parse().unwrap(), ServiceKind::Tcp);
    provider.tunnels.export(service.clone(), Export { kind, target, allowed: vec![] });
    caller.link(provider);
    provider.link(caller);
    caller.routes(provider, &[TUNNEL], reserved);
    let listen = "127.0.0.1:0".parse().ok();
    let provider = provider.key;
    let new = NewTunnel { strands, provider, service, kind, listen, door: None };
    let opened = caller.tunnels.open(new);
    opened.await.map(|listen| listen.unwrap())
}

/// Says something and hears it again.
async fn echo(mut stream: TcpStream) -> std::io::Result<TcpStream> {
    let exchange = async {
        stream.write_all(b"hello").await?;
        stream.read_exact(&mut [0; 5]).await
    };
    tokio::time::timeout(PATIENCE, exchange).await.expect("neither an answer nor an end")?;
    Ok(stream)
}

/// Waits for the end of a connection that says nothing.
async fn ends(mut stream: TcpStream) {
    let ended = tokio::time::timeout(PATIENCE, stream.read(&mut [0])).await;
    let ended = ended.expect("the connection goes on");
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
}

#[tokio::test]
async fn a_caller_that_is_put_out_loses_its_tunnel_and_gets_no_other() {
    let stop = CancellationToken::new();
    let (caller, provider) = (End::start(true, &stop), End::start(true, &stop));
    let address = open(&caller, &provider).await.unwrap();
    let stream = echo(TcpStream::connect(address).await.unwrap()).await;
    let stream = stream.expect("a member is served");

    // The caller's own node has not heard of it: it is the provider that ends the tunnel.
    provider.hears_of_revocation(caller.key);
    ends(stream).await;
    assert_eq!(provider.counted("tunnel-of-former-member"), 1);
    let again = echo(TcpStream::connect(address).await.unwrap()).await;
    assert!(again.is_err(), "nothing is served");
    stop.cancel();
}

#[tokio::test]
async fn a_strand_that_gets_its_route_late_is_there_for_streams_that_come_together() {
    let stop = CancellationToken::new();
    let (caller, provider) = (End::start(true, &stop), End::start(true, &stop));
    let second = TunnelId(TUNNEL.0 + 1);
    let address = open_with(&caller, &provider, vec![TUNNEL, second], None).await.unwrap();
    let local = caller.tunnels.lock_open()[&TUNNEL].local.clone();
    assert!(local.strands[1].live().is_none(), "there is no route for it");
    caller.routes(&provider, &[TUNNEL, second], None);
    let connecting = async {
        while local.strands[1].live().is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, connecting).await.expect("nobody connects it");
    let streams = (0..8).map(|_| async {
        echo(TcpStream::connect(address).await.unwrap()).await.expect("it is served")
    });
    let streams = futures::future::join_all(streams).await;
    let open = [0, 1].map(|strand: usize| local.strands[strand].open.load(Ordering::Relaxed));
    assert_eq!((open, streams.len()), ([4, 4], 8));
    stop.cancel();
}

#[tokio::test]
async fn a_tunnel_with_a_reservation_is_connected_again_though_nobody_uses_it() {
    let stop = CancellationToken::new();
    let (caller, provider) = (End::start(true, &stop), End::start(true, &stop));
    open_with(&caller, &provider, vec![TUNNEL], Some(1_000)).await.unwrap();
    let local = caller.tunnels.lock_open()[&TUNNEL].local.clone();
    for _ in 0..2 {
        let before = local.strands[0].live().expect("it is open").connection.stable_id();
        local.cut("as when the provider was restarted");
        let connecting = async {
            while local.strands[0].live().is_none_or(|l| l.connection.stable_id() == before) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, connecting).await.expect("nobody connects it");
    }
    stop.cancel();
}

/// QUIC tries a large packet as soon as the handshake is done, which a new tunnel does not let pass.
#[tokio::test]
async fn the_congestion_controllers_of_both_ends_know_what_was_not_let_pass() {
    let stop = CancellationToken::new();
    let (caller, provider) = (End::start(true, &stop), End::start(true, &stop));
    let address = open(&caller, &provider).await.unwrap();
    echo(TcpStream::connect(address).await.unwrap()).await.expect("it is served");
    let far_end = |node: &End, ours| FarEnd { node: node.key.node_id(), tunnel: TUNNEL, ours };
    let ends = [(&caller, far_end(&provider, true)), (&provider, far_end(&caller, false))];
    for (end, far_end) in ends {
        let flow = end.plane.flows.of(far_end).expect("it is open");
        let tries = hold(&flow).tries.clone();
        assert!(Arc::strong_count(&tries) > 2, "a connection shares them");
        let tried = async {
            while !tries.were_withheld() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, tried).await.expect("nothing is tried");
    }
    let local = caller.tunnels.lock_open()[&TUNNEL].local.clone();
    let connection = local.strands[0].live().expect("it is open").connection.clone();
    let tries = hold(&caller.plane.flows.of(far_end(&provider, true)).unwrap()).tries.clone();
    let before = connection.congestion_state().window();
    tries.withhold(100_000, std::time::Instant::now());
    assert!(connection.congestion_state().window() >= before.max(100_000));
    stop.cancel();
}

#[tokio::test]
async fn a_caller_without_a_credential_is_not_served() {
    let stop = CancellationToken::new();
    let (caller, provider) = (End::start(false, &stop), End::start(true, &stop));
    let address = open(&caller, &provider).await.unwrap();
    let stream = echo(TcpStream::connect(address).await.unwrap()).await;
    assert!(stream.is_err());
    assert!(provider.counted("tunnel-from-stranger") > 0);
    stop.cancel();
}

#[tokio::test]
async fn tunnels_to_a_provider_that_is_put_out_end() {
    let stop = CancellationToken::new();
    let (caller, provider) = (End::start(true, &stop), End::start(true, &stop));
    let address = open(&caller, &provider).await.unwrap();
    let stream = echo(TcpStream::connect(address).await.unwrap()).await;
    let stream = stream.expect("a member is served");
    caller.hears_of_revocation(provider.key);
    ends(stream).await;
    let error = open(&caller, &provider).await.unwrap_err();
    assert!(matches!(error, TunnelError::Revoked(node) if node == provider.key.node_id()));
    stop.cancel();
}

#[tokio::test]
async fn the_first_stream_of_a_tunnel_waits_for_nothing_but_the_way() {
    const ROUND_TRIP: Duration = Duration::from_secs(1);
    let stop = CancellationToken::new();
    let start = || End { delay: ROUND_TRIP / 2, ..End::start(true, &stop) };
    let (caller, provider) = (start(), start());
    let begun = std::time::Instant::now();
    let address = open(&caller, &provider).await.unwrap();
    echo(TcpStream::connect(address).await.unwrap()).await.expect("it is served");
    let took = begun.elapsed();
    // One for the handshake and one for the echo; a probe time-out is three.
    assert!((2 * ROUND_TRIP..4 * ROUND_TRIP).contains(&took), "{took:?}");
    stop.cancel();
}
