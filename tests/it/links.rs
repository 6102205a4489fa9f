//! A slow link between two real nodes: what is too much waits in the link's queue, is marked, and
//! the tunnels' congestion controllers react.

use std::path::Path;
use std::time::Instant;

use meshwise::config::EmulatedLink;
use meshwise::engine::types::ServiceName;
use meshwise::node::{Identity, Node, RequestError, TunnelOptions};

use crate::support::{
    config, echo_server, eventually, exchange, listening, only_links_to, service, start,
};

/// Rate of the link (bytes/s): 10 Mbit/s.
const RATE: f64 = 1_250_000.0;

/// A user and the provider of an echo service with one link of [`RATE`] between them.
async fn two_nodes(folder: &Path, identities: &[Identity; 2]) -> (Vec<Node>, ServiceName) {
    let mut nodes = Vec::new();
    let mut bootstrap = Vec::new();
    for (index, identity) in identities.iter().enumerate() {
        let neighbour = identities[1 - index].node_id();
        let mut config = config(bootstrap.clone());
        config.routing.capacity_unknown = RATE;
        config.emulation = only_links_to(&[neighbour]);
        for link in &mut config.emulation.links {
            *link = EmulatedLink { rate: RATE, delay_ms: 10.0, ..link.clone() };
        }
        let node = start(&folder.join(index.to_string()), identity, config).await;
        bootstrap = listening(&node).await;
        nodes.push(node);
    }
    let (user, provider) = (nodes[0].handle(), nodes[1].handle());
    eventually("the nodes know each other", || async {
        user.inspect(|view| view.engine.graph().origins().count() == 2).await.unwrap()
    })
    .await;
    let name: ServiceName = "echo.local".parse().unwrap();
    provider.publish(service("echo.local"), echo_server().await).await.unwrap();
    user.resolve(name.clone(), true).await.unwrap();
    (nodes, name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnels_share_a_slow_link_by_its_marks() {
    let folder = tempfile::tempdir().unwrap();
    let identities = [Identity::generate(), Identity::generate()];
    let (nodes, name) = two_nodes(folder.path(), &identities).await;
    let user = nodes[0].handle();
    let mut addresses = Vec::new();
    for _ in 0..2 {
        let listen = "127.0.0.1:0".parse().unwrap();
        let options = TunnelOptions::default();
        addresses.push(user.open_tunnel(name.clone(), listen, options).await.unwrap().1);
    }
    let bytes: Vec<u8> = (0..2_000_000u32).map(|index| (index % 251) as u8).collect();
    let timed = async |address| {
        let begun = Instant::now();
        let answer = exchange(address, &bytes).await.unwrap();
        assert!(answer == bytes, "not one byte lost, doubled or in another order");
        begun.elapsed()
    };
    let (one, other) = tokio::join!(timed(addresses[0]), timed(addresses[1]));
    // How fair the shares are, 'demo --scenario overload' measures.
    println!("{one:?} and {other:?}");
    let neighbour = identities[1].node_id();
    let count = move |view: &mut meshwise::node::View<'_>| {
        view.net.plane().links().get(&neighbour).copied().unwrap()
    };
    let counters = user.inspect(count).await.unwrap();
    println!("{counters:?}");
    assert!(counters.marked > 0 && counters.waits.is_some(), "{counters:?}");
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_sets_aside_what_it_can_and_refuses_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let identities = [Identity::generate(), Identity::generate()];
    let (nodes, name) = two_nodes(folder.path(), &identities).await;
    let user = nodes[0].handle();
    let open = || {
        let listen = "127.0.0.1:0".parse().unwrap();
        let options = TunnelOptions { reserve: Some(250_000), ..TunnelOptions::default() };
        user.open_tunnel(name.clone(), listen, options)
    };
    let (first, address) = open().await.unwrap();
    open().await.unwrap();
    assert_eq!(exchange(address, b"hello").await.unwrap(), b"hello");
    let refused = open().await.unwrap_err();
    let text = refused.to_string();
    let RequestError::InsufficientBandwidth { rate: 250_000, bottleneck, .. } = refused else {
        panic!("{text}");
    };
    let [from, to] = [0, 1].map(|index: usize| identities[index].node_id());
    assert_eq!((bottleneck.from, bottleneck.to, bottleneck.available), (from, to, 0));
    let said = format!("2.0 Mbit/s free for this node: at most 0.0, over the link {from}-{to};");
    assert!(text.contains(&said), "{text}");
    assert_eq!(user.tunnels().len(), 2, "it is closed again");
    assert!(user.close_tunnel(first).await.unwrap());
    eventually("what the first one had is free", || async { open().await.is_ok() }).await;
    for node in nodes {
        node.stop().await;
    }
}
