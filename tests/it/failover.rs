//! Routes that are lost under traffic: real nodes on loopback.

use std::time::{Duration, Instant};

use meshwise::config::EmulatedLink;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::mesh::{A, B, Diamond, S, T};
use crate::support::PATIENCE;

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
