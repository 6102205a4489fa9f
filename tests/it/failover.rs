//! Routes that are lost under traffic: real nodes on loopback.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use meshwise::config::EmulatedLink;
use meshwise::engine::event::ServiceSpec;
use meshwise::engine::overlay::{Objective, ServiceKind};
use meshwise::engine::types::ServiceName;
use meshwise::node::TunnelOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;

use crate::mesh::{A, B, Diamond, S, T};
use crate::support::{PATIENCE, eventually, service};

/// Bytes of a transfer, in each direction.
const TRANSFER: usize = 20_000_000;

/// Bytes that no part of can be mistaken for another.
fn numbered(bytes: usize) -> Vec<u8> {
    (0..bytes.div_ceil(8) as u64).flat_map(u64::to_be_bytes).take(bytes).collect()
}

/// A relay passes nothing on any more, though it stays connected.
async fn silence(diamond: &Diamond, relay: usize) {
    for neighbour in [S, T] {
        let neighbour = diamond.ids[neighbour].to_string();
        let silent = EmulatedLink { neighbour: neighbour.clone(), loss: 1.0, ..Default::default() };
        let id = neighbour.parse().unwrap();
        assert!(diamond.nodes[relay].handle().emulate(id, silent).await.unwrap());
    }
}

async fn dropped(diamond: &Diamond, node: usize, why: &'static str) -> u64 {
    let count = move |view: &mut meshwise::node::View<'_>| {
        view.net.plane().counters().dropped().get(why).copied().unwrap_or(0)
    };
    diamond.nodes[node].handle().inspect(count).await.unwrap()
}

/// Sends a transfer through an echo service, and does something in its middle. Returns the longest
/// time (ms) in which nothing arrived.
async fn transfer(diamond: &mut Diamond, mut in_the_middle: impl AsyncFnMut(&mut Diamond)) -> u128 {
    let address = diamond.tunnel().await;
    let sent = numbered(TRANSFER);
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let expected = sent.clone();
    let writing = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let (mut got, mut buffer) = (0, vec![0; 64 * 1024]);
    let (mut longest, mut last, mut done) = (Duration::ZERO, Instant::now(), false);
    loop {
        let reading = tokio::time::timeout(PATIENCE, read.read(&mut buffer));
        let count = reading.await.expect("the connection goes on").unwrap();
        if count == 0 {
            break;
        }
        assert!(expected.get(got..got + count) == Some(&buffer[..count]), "other bytes at {got}");
        got += count;
        longest = longest.max(last.elapsed());
        last = Instant::now();
        if got > TRANSFER / 4 && !done {
            done = true;
            in_the_middle(diamond).await;
        }
    }
    writing.await.unwrap();
    assert_eq!(got, TRANSFER, "not one byte less");
    longest.as_millis()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_does_not_lose_a_byte_to_a_relay_that_falls_silent() {
    let mut diamond = Diamond::start().await;
    let mut left = None;
    let stalled_ms = transfer(&mut diamond, async |diamond| {
        let relay = diamond.relay().await;
        silence(diamond, relay).await;
        left = Some(relay);
    });
    let stalled_ms = stalled_ms.await;
    let relay = diamond.relay().await;
    assert_eq!(Some(A + B - relay), left, "the other relay carried the rest");
    println!("longest time without a byte: {stalled_ms} ms");
    println!("silences: {}", dropped(&diamond, S, "route-silent").await);
    println!("left too early: {}", dropped(&diamond, S, "route-left-too-early").await);
    for node in [S, T] {
        assert_eq!(dropped(&diamond, node, "forged").await, 0);
        assert_eq!(dropped(&diamond, node, "replayed").await, 0);
    }
    diamond.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_does_not_lose_a_byte_to_a_relay_that_stops() {
    let mut diamond = Diamond::start().await;
    let stalled_ms = transfer(&mut diamond, async |diamond| {
        let relay = diamond.relay().await;
        diamond.nodes.remove(relay).stop().await;
    });
    println!("longest time without a byte: {} ms", stalled_ms.await);
    diamond.stop().await;
}

/// A UDP service that counts what it gets, by the first byte.
async fn counter() -> (std::net::SocketAddr, Arc<[AtomicU64; 2]>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let counts = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let counted = counts.clone();
    tokio::spawn(async move {
        let mut buffer = [0; 100];
        while socket.recv(&mut buffer).await.is_ok() {
            counted[usize::from(buffer[0])].fetch_add(1, Ordering::Relaxed);
        }
    });
    (address, counts)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_messages_of_a_reliability_tunnel_survive_losses_on_its_routes() {
    const MESSAGES: u64 = 1_500;
    // Three probes in a row are lost one time in 600: seldom probes declare a route dead seldom.
    let diamond = Diamond::start_with(|config| {
        let probing = &mut config.probing;
        (probing.active_route_ms, probing.candidate_route_ms) = (1_000, 1_000);
        probing.link_ms = 500;
    })
    .await;
    let (target, counts) = counter().await;
    let name: ServiceName = "count.local".parse().unwrap();
    let udp = ServiceSpec { kind: ServiceKind::Udp, ..service("count.local") };
    diamond.nodes[T].handle().publish(udp, target).await.unwrap();
    let user = diamond.nodes[S].handle();
    user.resolve(name.clone(), true).await.unwrap();
    let mut clients = Vec::new();
    for (number, objective) in [(0, Objective::Latency), (1, Objective::Reliability)] {
        let options = TunnelOptions { objective: Some(objective), ..TunnelOptions::default() };
        let listen = "127.0.0.1:0".parse().unwrap();
        let (_, address) = user.open_tunnel(name.clone(), listen, options).await.unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.connect(address).await.unwrap();
        client.send(&[number]).await.unwrap();
        clients.push((client, number));
    }
    let count = |number: usize| counts[number].load(Ordering::Relaxed);
    eventually("both flows are open", || async { count(0) > 0 && count(1) > 0 }).await;
    eventually("both tunnels have a backup", || async {
        let backed = |view: &mut meshwise::node::View<'_>| {
            view.engine.tunnels().filter(|(_, to)| to.backup.is_some()).count()
        };
        user.inspect(backed).await.unwrap() == 2
    })
    .await;
    for relay in [A, B] {
        let neighbour = diamond.ids[relay].to_string();
        let lossy = EmulatedLink { neighbour, loss: 0.12, ..EmulatedLink::default() };
        assert!(user.emulate(diamond.ids[relay], lossy).await.unwrap());
    }
    let before = [count(0), count(1)];
    for _ in 0..MESSAGES {
        for (client, number) in &clients {
            client.send(&[*number, 1, 2, 3]).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    eventually("nothing arrives any more", || async {
        let before = [count(0), count(1)];
        tokio::time::sleep(Duration::from_secs(1)).await;
        before == [count(0), count(1)]
    })
    .await;
    let share = |number: usize| (count(number) - before[number]) as f64 / MESSAGES as f64;
    println!("arrived: {:.3} for latency, {:.3} for reliability", share(0), share(1));
    assert!(share(0) < 0.91, "{}: the links lose 12 %", share(0));
    assert!(share(1) > 0.95, "{}: both lose the same 1.4 %", share(1));
    diamond.stop().await;
}
