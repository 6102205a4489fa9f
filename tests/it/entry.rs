//! How local programs enter the mesh: the SOCKS5 proxy, UDP services, and many streams at once.

use std::net::SocketAddr;
use std::time::Duration;

use meshwise::engine::event::ServiceSpec;
use meshwise::engine::overlay::{Objective, ServiceKind};
use meshwise::engine::types::TunnelId;
use meshwise::node::{Identity, Node, TunnelInfo, TunnelOptions};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use crate::support::{PATIENCE, config, echo_server, eventually, listening, service, start};

const NAME: &str = "byronwade.local";
const CONNECTED: u8 = 0;
const NOT_ALLOWED: u8 = 2;
const UNKNOWN_NAME: u8 = 4;
const REFUSED: u8 = 5;
const COMMAND_NOT_SUPPORTED: u8 = 7;

/// A provider and a user with a proxy, linked directly.
struct Pair {
    _folder: TempDir,
    provider: Node,
    user: Node,
}

impl Pair {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let identity = Identity::generate();
        let provider = start(&at("provider"), &identity, config(Vec::new())).await;
        let mut with_proxy = config(listening(&provider).await);
        with_proxy.entry.socks = "127.0.0.1:0".into();
        let user = start(&at("user"), &Identity::generate(), with_proxy).await;
        let pair = Self { _folder: folder, provider, user };
        let joined = |view: &mut meshwise::node::View<'_>| view.engine.joined_after().is_some();
        eventually("the user has joined", || async {
            pair.user.handle().inspect(joined).await.unwrap()
        })
        .await;
        pair
    }

    async fn publish(&self, service: ServiceSpec, target: SocketAddr) {
        let name = service.name.clone();
        self.provider.handle().publish(service, target).await.unwrap();
        eventually("the user knows the service", || async {
            self.user.handle().resolve(name.clone(), false).await.is_ok()
        })
        .await;
    }

    async fn open(&self, name: &str, options: TunnelOptions) -> (TunnelId, SocketAddr) {
        let any = "127.0.0.1:0".parse().unwrap();
        self.user.handle().open_tunnel(name.parse().unwrap(), any, options).await.unwrap()
    }

    fn tunnel(&self) -> TunnelInfo {
        let tunnels = self.user.handle().tunnels();
        assert_eq!(tunnels.len(), 1, "one tunnel");
        tunnels.into_iter().next().unwrap()
    }

    fn proxy(&self) -> SocketAddr {
        self.user.handle().socks().unwrap()
    }

    async fn dropped(&self, node: &Node, why: &'static str) -> u64 {
        let count = move |view: &mut meshwise::node::View<'_>| {
            view.net.plane().counters().dropped().get(why).copied().unwrap_or_default()
        };
        node.handle().inspect(count).await.unwrap()
    }

    async fn stop(self) {
        self.user.stop().await;
        self.provider.stop().await;
    }
}

fn kind(name: &str, kind: ServiceKind) -> ServiceSpec {
    ServiceSpec { kind, ..service(name) }
}

/// Asks the proxy for a name, as RFC 1928 has it. Returns the code of the answer.
async fn connect(proxy: SocketAddr, name: &str) -> (TcpStream, u8) {
    ask(proxy, 1, 3, &[&[name.len() as u8], name.as_bytes()].concat()).await
}

async fn ask(proxy: SocketAddr, command: u8, kind: u8, host: &[u8]) -> (TcpStream, u8) {
    let mut tcp = TcpStream::connect(proxy).await.unwrap();
    tcp.write_all(&[5, 2, 2, 0]).await.unwrap();
    let mut method = [0; 2];
    tcp.read_exact(&mut method).await.unwrap();
    assert_eq!(method, [5, 0]);
    let head = [&[5, command, 0, kind][..], host, &80u16.to_be_bytes()].concat();
    tcp.write_all(&head).await.unwrap();
    let mut answer = [0; 10];
    tcp.read_exact(&mut answer).await.unwrap();
    assert_eq!((answer[0], answer[2], answer[3]), (5, 0, 1));
    (tcp, answer[1])
}

/// Sends `bytes`, closes the sending half, and reads to the end.
async fn exchange(mut tcp: TcpStream, bytes: &[u8]) -> Vec<u8> {
    let (mut read, mut write) = tcp.split();
    let send = async {
        write.write_all(bytes).await?;
        write.shutdown().await
    };
    let mut answer = Vec::new();
    let receive = read.read_to_end(&mut answer);
    let both = async { tokio::try_join!(send, receive) };
    tokio::time::timeout(PATIENCE, both).await.unwrap().unwrap();
    answer
}

/// Answers one request with the name that it was for, and closes.
async fn web_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                let request = String::from_utf8(request).unwrap();
                let host = request.lines().find_map(|line| line.strip_prefix("Host: ")).unwrap();
                let page = format!("hello from {host}");
                let length = page.len();
                let head =
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close");
                stream.write_all(format!("{head}\r\n\r\n{page}").as_bytes()).await.unwrap();
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_fetches_a_page_by_its_name() {
    let pair = Pair::start().await;
    pair.publish(kind(NAME, ServiceKind::Http), web_server().await).await;
    let proxy = format!("socks5h://{}", pair.proxy());
    let mut connections = 0;
    for _ in 0..2 {
        let curl = tokio::process::Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "60", "--proxy", &proxy])
            .args(["--noproxy", "", &format!("http://{NAME}/")])
            .output()
            .await;
        match curl {
            Ok(output) => {
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                let page = String::from_utf8_lossy(&output.stdout).into_owned();
                assert_eq!(page, format!("hello from {NAME}"), "{error}");
                connections += 1;
            }
            Err(error) => eprintln!("without curl ({error}) only our own client is tried"),
        }
        let (tcp, code) = connect(pair.proxy(), NAME).await;
        assert_eq!(code, CONNECTED);
        let page =
            exchange(tcp, format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n").as_bytes()).await;
        assert!(page.ends_with(b"hello from byronwade.local"), "{page:?}");
        connections += 1;
    }
    let tunnel = pair.tunnel();
    assert_eq!((tunnel.listen, tunnel.connections), (None, connections), "all share one tunnel");
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_proxy_says_why_not() {
    let pair = Pair::start().await;
    let proxy = pair.proxy();
    assert_eq!(connect(proxy, "nobody.local").await.1, UNKNOWN_NAME);
    assert_eq!(ask(proxy, 1, 1, &[127, 0, 0, 1]).await.1, NOT_ALLOWED, "no exit");
    assert_eq!(connect(proxy, "127.0.0.1").await.1, NOT_ALLOWED, "no exit");
    assert_eq!(ask(proxy, 3, 1, &[0; 4]).await.1, COMMAND_NOT_SUPPORTED, "UDP ASSOCIATE");

    let target = echo_server().await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    pair.publish(service("down.local"), nobody).await;
    assert_eq!(connect(proxy, "down.local").await.1, REFUSED);
    let only_itself = vec![pair.provider.handle().key().node_id()];
    let private = ServiceSpec { allowed: only_itself, ..service("private.local") };
    pair.publish(private, target).await;
    assert_eq!(connect(proxy, "private.local").await.1, NOT_ALLOWED);
    pair.publish(kind("udp.local", ServiceKind::Udp), target).await;
    assert_eq!(connect(proxy, "udp.local").await.1, COMMAND_NOT_SUPPORTED);

    // What this node itself provides is reached without a tunnel.
    pair.user.handle().publish(service("mine.local"), target).await.unwrap();
    let (tcp, code) = connect(proxy, "mine.local").await;
    assert_eq!(code, CONNECTED);
    assert_eq!(exchange(tcp, b"here").await, b"here");

    pair.publish(service(NAME), target).await;
    let (tcp, code) = connect(proxy, NAME).await;
    assert_eq!(code, CONNECTED);
    assert_eq!(exchange(tcp, b"there").await, b"there");
    let name = || NAME.parse().unwrap();
    pair.provider.handle().withdraw(name()).await.unwrap();
    eventually("a name that was withdrawn is unknown", || async {
        connect(proxy, NAME).await.1 == UNKNOWN_NAME
    })
    .await;

    // A person who speaks something else is not kept waiting.
    let mut tcp = TcpStream::connect(proxy).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut nothing = Vec::new();
    let read = tokio::time::timeout(PATIENCE, tcp.read_to_end(&mut nothing)).await.unwrap();
    assert!(read.is_err() || nothing.is_empty());
    assert_eq!(pair.dropped(&pair.user, "socks-malformed").await, 1);
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_direction_of_a_connection_through_the_proxy_ends_by_itself() {
    let pair = Pair::start().await;
    // Answers only once the request has ended.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            stream.read_to_end(&mut request).await.unwrap();
            request.reverse();
            stream.write_all(&request).await.unwrap();
        }
    });
    pair.publish(service(NAME), target).await;
    let mut request: Vec<u8> = (0..3_000_000u32).map(|index| (index % 251) as u8).collect();
    let (tcp, code) = connect(pair.proxy(), NAME).await;
    assert_eq!(code, CONNECTED);
    let answer = exchange(tcp, &request).await;
    request.reverse();
    assert!(answer == request, "{} of {} bytes", answer.len(), request.len());
    eventually("nothing stays open", || async { pair.tunnel().open == 0 }).await;
    let bytes = pair.tunnel().bytes;
    assert_eq!(bytes, (3_000_000, 3_000_000));
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn udp_clients_each_have_their_flow() {
    let pair = Pair::start().await;
    // Says to each flow what it got, and as the how manieth.
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let target = server.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_536];
        let mut seen = std::collections::BTreeMap::<SocketAddr, u8>::new();
        while let Ok((length, from)) = server.recv_from(&mut buffer).await {
            let count = seen.entry(from).or_default();
            *count += 1;
            let answer = [&[*count], &buffer[..length]].concat();
            server.send_to(&answer, from).await.unwrap();
        }
    });
    pair.publish(kind("dns.local", ServiceKind::Udp), target).await;
    let (tunnel, address) = pair.open("dns.local", TunnelOptions::default()).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.connect(address).await.unwrap();
        clients.push(client);
    }
    let largest = vec![9; 3_900];
    let mut answer = vec![0; 65_536];
    for (round, payload) in [&b"first"[..], b"", &largest].into_iter().enumerate() {
        for (index, client) in clients.iter().enumerate() {
            let sent = [payload, &[index as u8]].concat();
            client.send(&sent).await.unwrap();
        }
        for (index, client) in clients.iter().enumerate() {
            let receiving = client.recv(&mut answer);
            let length = tokio::time::timeout(PATIENCE, receiving).await.unwrap().unwrap();
            assert_eq!(answer[0], round as u8 + 1, "flow {index}");
            assert_eq!(answer[1..length], [payload, &[index as u8]].concat());
        }
    }
    assert_eq!(pair.tunnel().open, 3);
    assert_eq!(pair.tunnel().connections, 3);
    let sent: u64 = 3 * (5 + 1 + 1 + 3_900 + 1);
    assert_eq!(pair.tunnel().bytes, (sent, sent + 9), "answers are one byte longer");

    clients[0].send(&vec![1; 9_000]).await.unwrap();
    eventually("what does not fit a packet is counted", || async {
        pair.dropped(&pair.user, "udp-too-large").await == 1
    })
    .await;
    clients[0].send(b"still").await.unwrap();
    let receiving = clients[0].recv(&mut answer);
    let length = tokio::time::timeout(PATIENCE, receiving).await.unwrap().unwrap();
    assert_eq!(answer[1..length], *b"still");
    assert_eq!(pair.tunnel().bytes, (sent + 5, sent + 9 + 6), "and does not count as sent");
    assert!(pair.user.handle().close_tunnel(tunnel).await.unwrap());
    eventually("the address is free again", || async { UdpSocket::bind(address).await.is_ok() })
        .await;
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_connections_are_open_at_once() {
    const CONNECTIONS: usize = 2_000;
    let pair = Pair::start().await;
    pair.publish(service(NAME), echo_server().await).await;
    let (_, address) = pair.open(NAME, TunnelOptions::default()).await;
    let mut open = Vec::new();
    // The system's queue of a listener is short: not all of them in one moment.
    for batch in 0..CONNECTIONS / 100 {
        let connecting = (0..100).map(|_| TcpStream::connect(address));
        for (index, tcp) in futures(connecting).await.into_iter().enumerate() {
            let mut tcp = tcp.unwrap();
            let number = (batch * 100 + index) as u32;
            tcp.write_all(&number.to_be_bytes()).await.unwrap();
            open.push(tcp);
        }
    }
    for (number, tcp) in open.iter_mut().enumerate() {
        let reading = tcp.read_u32();
        let answer = tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
        assert_eq!(answer, number as u32);
    }
    assert_eq!(pair.tunnel().open, CONNECTIONS as u64, "all at once");
    drop(open);
    eventually("all are closed", || async { pair.tunnel().open == 0 }).await;
    pair.stop().await;
}

async fn futures<T: Send + 'static>(
    all: impl Iterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let tasks: Vec<_> = all.map(tokio::spawn).collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.unwrap());
    }
    results
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_reads_hurts_nobody_else() {
    const SILENT: usize = 8;
    const SO_MANY: usize = 40;
    let pair = Pair::start().await;
    // Sends for as long as anybody takes it.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move { while stream.write_all(&[7; 65_536]).await.is_ok() {} });
        }
    });
    pair.publish(service("flood.local"), target).await;
    let (_, flood) = pair.open("flood.local", TunnelOptions::default()).await;
    let mut silent = Vec::new();
    for _ in 0..SILENT {
        silent.push(TcpStream::connect(flood).await.unwrap());
    }
    // One that reads, on the same QUIC connection: it gets more than all windows hold.
    let mut reader = TcpStream::connect(flood).await.unwrap();
    let mut buffer = vec![0; 1 << 16];
    let mut read = 0;
    while read < 40_000_000 {
        let reading = reader.read(&mut buffer);
        read += tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
    }
    drop(reader);
    let received = || pair.tunnel().bytes.1;
    eventually("those who do not read get nothing more", || async {
        let before = received();
        tokio::time::sleep(Duration::from_millis(500)).await;
        received() == before
    })
    .await;
    assert_eq!(pair.tunnel().open, SILENT as u64, "they stay open");
    let mut first = [0; 1_000];
    silent[0].read_exact(&mut first).await.unwrap();
    assert_eq!(first, [7; 1_000], "and go on when they read");
    // So many that they fill the window of the whole QUIC connection.
    while silent.len() < SO_MANY {
        silent.push(TcpStream::connect(flood).await.unwrap());
    }
    eventually("some have to go", || async {
        pair.dropped(&pair.user, "stream-stalled").await > 0
    })
    .await;
    let mut reader = TcpStream::connect(flood).await.unwrap();
    let mut read = 0;
    while read < 10_000_000 {
        let reading = reader.read(&mut buffer);
        read += tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
    }
    assert!(pair.tunnel().open >= 24, "no more of them than has to be");
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_whose_tunnel_is_lost_is_reset_at_both_ends() {
    let pair = Pair::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    pair.publish(service(NAME), listener.local_addr().unwrap()).await;
    let (tunnel, address) = pair.open(NAME, TunnelOptions::default()).await;
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"half").await.unwrap();
    let (mut target, _) = listener.accept().await.unwrap();
    let mut half = [0; 4];
    target.read_exact(&mut half).await.unwrap();
    target.write_all(b"half").await.unwrap();
    client.read_exact(&mut half).await.unwrap();
    assert!(pair.user.handle().close_tunnel(tunnel).await.unwrap());
    for (end, tcp) in [("client", &mut client), ("target", &mut target)] {
        let reading = tokio::time::timeout(PATIENCE, tcp.read_u8()).await.unwrap();
        let error = reading.unwrap_err().kind();
        assert_eq!(error, std::io::ErrorKind::ConnectionReset, "{end}: no end of a stream");
    }
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_of_two_paths_has_two_strands_and_closes_both() {
    let pair = Pair::start().await;
    let wide = ServiceSpec { objective: Objective::Throughput, ..service(NAME) };
    pair.publish(wide, echo_server().await).await;
    let (tunnel, address) = pair.open(NAME, TunnelOptions::default()).await;
    let strands = pair.tunnel().strands;
    assert_eq!((strands.len(), strands[0]), (2, tunnel));
    let bound = |view: &mut meshwise::node::View<'_>| {
        view.engine.tunnels().map(|(tunnel, _)| tunnel).collect::<Vec<_>>()
    };
    assert_eq!(pair.user.handle().inspect(bound).await.unwrap(), strands);
    let exchanges = (0..8u8).map(|byte| async move {
        let tcp = TcpStream::connect(address).await.unwrap();
        exchange(tcp, &vec![byte; 300_000]).await == vec![byte; 300_000]
    });
    assert_eq!(futures(exchanges).await, [true; 8]);
    let one = TunnelOptions { paths: Some(1), ..TunnelOptions::default() };
    let (other, _) = pair.open(NAME, one).await;
    let tunnels = pair.user.handle().tunnels();
    let other = tunnels.iter().find(|info| info.tunnel == other).unwrap();
    assert_eq!(other.strands.len(), 1, "who opens it decides");
    let many = tunnels.iter().find(|info| info.tunnel == tunnel).unwrap();
    let ends: Vec<TunnelId> = many.ends.iter().map(|end| end.tunnel).collect();
    // The others connect behind it.
    assert!(ends.first() == Some(&tunnel) && strands.starts_with(&ends), "{ends:?} of {strands:?}");
    for end in &many.ends {
        assert!(!end.rtt.is_zero() && end.window > 0 && end.packet_bytes >= 4_096, "{end:?}");
        assert!(end.sent > 0 && end.lost < end.sent, "{end:?}");
    }
    pair.user.handle().close_tunnel(tunnel).await.unwrap();
    let left = pair.user.handle().inspect(bound).await.unwrap();
    assert_eq!(left, [other.tunnel], "nothing of it is left");
    pair.stop().await;
}
