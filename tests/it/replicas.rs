//! Services that break on real nodes: their checks, whom others are led to, and what becomes of the
//! connections through tunnels.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use meshwise::engine::ProviderHealth;
use meshwise::engine::event::ServiceSpec;
use meshwise::engine::measure::{Health, HealthCheck, HealthPolicy};
use meshwise::engine::overlay::{ServiceKind, delegation, wire};
use meshwise::engine::types::{NodeId, PublicKey, ServiceName};
use meshwise::node::{DATABASE, Identity, Node, TunnelOptions, View};
use meshwise::store::Reader;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::support::{PATIENCE, config, eventually, listening, service, start};

const NAME: &str = "replicated.local";
const PROVIDERS: usize = 2;
const USER: usize = 2;

fn name() -> ServiceName {
    NAME.parse().unwrap()
}

fn checked(check: HealthCheck) -> HealthPolicy {
    HealthPolicy { check, interval_ms: 500, failures: 2 }
}

/// Tells each connection which server it is, and keeps it open.
struct Greeter {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Greeter {
    async fn start(number: u8, address: &str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = tokio::spawn(async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                // Goes on after the listener.
                tokio::spawn(async move {
                    if tcp.write_all(&[number]).await.is_ok() {
                        let _ = tcp.read_u8().await;
                    }
                });
            }
        });
        Self { address, accepting }
    }

    /// Accepts no more connections; those that are open stay.
    async fn stop(self) -> SocketAddr {
        self.accepting.abort();
        let _ = self.accepting.await;
        self.address
    }
}

/// Two providers of one name, and a user with a proxy.
struct Three {
    _folder: TempDir,
    nodes: Vec<Option<Node>>,
    greeters: Vec<Option<Greeter>>,
}

impl Three {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (mut nodes, mut greeters, mut bootstrap) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..=PROVIDERS {
            let mut settings = config(bootstrap.clone());
            if index == USER {
                settings.entry.socks = "127.0.0.1:0".into();
            }
            let dir = folder.path().join(index.to_string());
            let node = start(&dir, &Identity::generate(), settings).await;
            bootstrap.extend(listening(&node).await);
            nodes.push(Some(node));
            greeters.push(Some(Greeter::start(index as u8, "127.0.0.1:0").await));
        }
        let three = Self { _folder: folder, nodes, greeters };
        for index in 0..=PROVIDERS {
            let peers = |view: &mut View<'_>| view.engine.peers().len();
            eventually("all are connected", || async {
                three.node(index).handle().inspect(peers).await.unwrap() == PROVIDERS
            })
            .await;
        }
        let spec = || ServiceSpec { health: checked(HealthCheck::Tcp), ..service(NAME) };
        let (owner, replica) = (three.node(0).handle(), three.node(1).handle());
        owner.publish(spec(), three.target(0)).await.unwrap();
        let day = Duration::from_secs(86_400);
        let (text, _) = owner.delegate(name(), replica.key(), day).await.unwrap();
        let (signed, _) = delegation::from_text(&text).unwrap();
        let spec = ServiceSpec { delegation: Some(signed), ..spec() };
        replica.publish(spec, three.target(1)).await.unwrap();
        three.eventually_named(&[0, 1]).await;
        three
    }

    fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().unwrap()
    }

    fn key(&self, index: usize) -> PublicKey {
        self.node(index).handle().key()
    }

    fn target(&self, index: usize) -> SocketAddr {
        self.greeters[index].as_ref().unwrap().address
    }

    async fn eventually_named(&self, providers: &[usize]) {
        let mut expected: Vec<NodeId> =
            providers.iter().map(|index| self.key(*index).node_id()).collect();
        expected.sort();
        eventually("the right providers are named", || async {
            let found = self.node(USER).handle().resolve(name(), false).await;
            let Ok((found, _)) = found else { return false };
            let mut found: Vec<NodeId> = found.iter().map(|(key, _)| key.node_id()).collect();
            found.sort();
            found == expected
        })
        .await;
    }

    async fn open(&self) -> (meshwise::engine::types::TunnelId, SocketAddr) {
        let any = "127.0.0.1:0".parse().unwrap();
        let user = self.node(USER).handle();
        user.open_tunnel(name(), any, TunnelOptions::default()).await.unwrap()
    }

    async fn stop(self) {
        for node in self.nodes.into_iter().flatten() {
            node.stop().await;
        }
    }
}

/// A connection that was greeted, and by whom.
async fn greeted(address: SocketAddr) -> std::io::Result<(TcpStream, usize)> {
    let mut tcp = TcpStream::connect(address).await?;
    let greeting = tokio::time::timeout(PATIENCE, tcp.read_u8()).await.unwrap()?;
    Ok((tcp, usize::from(greeting)))
}

/// The same through a SOCKS5 proxy.
async fn greeted_by_proxy(proxy: SocketAddr) -> (TcpStream, usize) {
    let mut tcp = TcpStream::connect(proxy).await.unwrap();
    let request = [&[5, 1, 0, 5, 1, 0, 3, NAME.len() as u8][..], NAME.as_bytes(), &[0, 80]];
    tcp.write_all(&request.concat()).await.unwrap();
    let mut answer = [0; 12];
    tcp.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer[..4], [5, 0, 5, 0], "{answer:?}");
    let greeting = tokio::time::timeout(PATIENCE, tcp.read_u8()).await.unwrap().unwrap();
    (tcp, usize::from(greeting))
}

async fn health(node: &Node, service: &str, provider: NodeId) -> Option<ProviderHealth> {
    let service: ServiceName = service.parse().unwrap();
    let look =
        move |view: &mut View<'_>| view.engine.services().health(&service, provider, view.now);
    node.handle().inspect(look).await.unwrap()
}

async fn eventually_is(node: &Node, service: &str, provider: NodeId, expected: Health) {
    eventually("the service has this health", || async {
        health(node, service, provider).await.is_some_and(|known| known.health == expected)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_a_target_dies_connections_reach_the_replica_and_open_ones_are_reset() {
    let mut three = Three::start().await;
    let (_, address) = three.open().await;
    let proxy = three.node(USER).handle().socks().unwrap();
    let (mut open, dead) = greeted(address).await.unwrap();
    let other = 1 - dead;
    let provider = three.key(dead).node_id();
    eventually_is(three.node(USER), NAME, provider, Health::Up).await;

    let target = three.greeters[dead].take().unwrap().stop().await;
    let begun = Instant::now();
    // At once: before anybody else can know.
    let (_kept, number) = greeted(address).await.unwrap();
    assert_eq!(number, other);
    assert_eq!(greeted_by_proxy(proxy).await.1, other);
    println!("the replica accepted after {} ms", begun.elapsed().as_millis());
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    eventually_is(three.node(USER), NAME, provider, Health::Down).await;
    println!("known as down after {} ms", begun.elapsed().as_millis());
    three.eventually_named(&[other]).await;
    // Its target would have kept this one open for ever.
    let lost = tokio::time::timeout(PATIENCE, open.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(lost.kind(), std::io::ErrorKind::ConnectionReset);
    println!("its open connection was reset after {} ms", begun.elapsed().as_millis());
    assert_eq!(greeted(address).await.unwrap().1, other);

    three.greeters[dead] = Some(Greeter::start(dead as u8, &target.to_string()).await);
    eventually_is(three.node(USER), NAME, provider, Health::Up).await;
    three.eventually_named(&[0, 1]).await;
    let checks = Reader::open(three.node(dead).handle().data_dir().join(DATABASE)).unwrap();
    eventually("failures are kept with their reason", || async {
        let kept = checks.service_probes(0).unwrap();
        let failed = kept.iter().filter(|row| row.failure.as_deref() == Some("refused")).count();
        failed >= 2 && kept.iter().any(|row| row.response_us.is_some())
    })
    .await;
    three.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_moves_to_another_provider_when_its_own_leaves_and_keeps_its_address() {
    let mut three = Three::start().await;
    let (tunnel, address) = three.open().await;
    let gone = greeted(address).await.unwrap().1;
    let other = 1 - gone;
    three.nodes[gone].take().unwrap().stop().await;
    let begun = Instant::now();
    eventually("a connection reaches the other provider", || async {
        greeted(address).await.is_ok_and(|(_, number)| number == other)
    })
    .await;
    println!("the replica accepted after {} ms", begun.elapsed().as_millis());
    let key = three.key(other);
    let user = three.node(USER).handle().clone();
    eventually("the tunnel to the other one is the only one", || async {
        let tunnels = user.tunnels();
        tunnels.len() == 1 && tunnels[0].provider == key && tunnels[0].listen == Some(address)
    })
    .await;
    assert!(user.close_tunnel(tunnel).await.unwrap(), "also by its first number");
    assert!(!user.close_tunnel(tunnel).await.unwrap());
    assert!(user.tunnels().is_empty());
    eventually("nothing listens any more", || async { TcpStream::connect(address).await.is_err() })
        .await;
    three.stop().await;
}

/// Answers each request with this status, and a body that names it.
async fn web_server(status: Arc<AtomicU16>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let status = status.load(Ordering::Relaxed);
            let body = format!("state: {status}");
            let length = body.len();
            let head =
                format!("HTTP/1.1 {} Told\r\nContent-Length: {length}\r\n", status / 10 * 10);
            let _ = tcp.write_all(format!("{head}\r\n{body}").as_bytes()).await;
            let mut rest = [0; 1_024];
            let _ = tokio::time::timeout(Duration::from_secs(1), tcp.read(&mut rest)).await;
        }
    });
    address
}

async fn pair(folder: &Path) -> (Node, Node) {
    let provider = start(&folder.join("a"), &Identity::generate(), config(vec![])).await;
    let bootstrap = listening(&provider).await;
    let user = start(&folder.join("b"), &Identity::generate(), config(bootstrap)).await;
    let joined = |view: &mut View<'_>| view.engine.joined_after().is_some();
    eventually("the user has joined", || async { user.handle().inspect(joined).await.unwrap() })
        .await;
    (provider, user)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_body_and_commands_are_checked_and_others_hear_the_result_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (provider, user) = pair(folder.path()).await;
    let id = provider.handle().key().node_id();
    let is = async |service: &str, expected| {
        eventually_is(&provider, service, id, expected).await;
        eventually_is(&user, service, id, expected).await;
    };
    let status = Arc::new(AtomicU16::new(200));
    let web = web_server(status.clone()).await;
    let contains = Some("state: 200".into());
    let http = HealthCheck::Http { path: "/health".into(), status: None, contains };
    let kind = ServiceKind::Http;
    let spec = ServiceSpec { kind, health: checked(http), ..service("web.local") };
    provider.handle().publish(spec, web).await.unwrap();
    is("web.local", Health::Up).await;
    let known = health(&user, "web.local", id).await.unwrap();
    assert!(known.response_ms.is_some_and(|ms| ms > 0.0), "{known:?}");
    // 201 is answered as 200, but the body says something else.
    for wrong in [503, 201] {
        status.store(wrong, Ordering::Relaxed);
        is("web.local", Health::Down).await;
        status.store(200, Ordering::Relaxed);
        is("web.local", Health::Up).await;
    }

    let works = folder.path().join("it-works");
    std::fs::write(&works, "").unwrap();
    let command = format!("test -e {}", works.display());
    let health = checked(HealthCheck::Command(command.clone()));
    let spec = ServiceSpec { kind: ServiceKind::Udp, health, ..service("udp.local") };
    provider.handle().publish(spec, "127.0.0.1:9".parse().unwrap()).await.unwrap();
    is("udp.local", Health::Up).await;
    std::fs::remove_file(&works).unwrap();
    is("udp.local", Health::Down).await;
    std::fs::write(&works, "").unwrap();
    is("udp.local", Health::Up).await;
    let heard = |view: &mut View<'_>| {
        let signed = view.engine.services().registry().signed();
        signed.flat_map(wire::encode).collect::<Vec<u8>>()
    };
    let heard = user.handle().inspect(heard).await.unwrap();
    let holds = |text: &[u8]| heard.windows(text.len()).any(|window| window == text);
    assert!(holds(b"udp.local") && !holds(command.as_bytes()), "the command stays where it is");
    user.stop().await;
    provider.stop().await;
}
