//! A slow link between two real nodes: what is too much waits in the link's queue, is marked, and
//! the tunnels' congestion controllers react.

use meshwise::config::EmulatedLink;
use meshwise::engine::types::ServiceName;
use meshwise::node::{Identity, TunnelOptions};

use crate::support::{
    config, echo_server, eventually, exchange, listening, only_links_to, service, start,
};

/// Rate of the link (bytes/s): 10 Mbit/s.
const RATE: f64 = 1_250_000.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnels_share_a_slow_link_by_its_marks() {
    let folder = tempfile::tempdir().unwrap();
    let identities = [Identity::generate(), Identity::generate()];
    let mut nodes = Vec::new();
    let mut bootstrap = Vec::new();
    for (index, identity) in identities.iter().enumerate() {
        let neighbour = identities[1 - index].node_id();
        let mut config = config(bootstrap.clone());
        config.emulation = only_links_to(&[neighbour]);
        for link in &mut config.emulation.links {
            *link = EmulatedLink { rate: RATE, delay_ms: 10.0, ..link.clone() };
        }
        let node = start(&folder.path().join(index.to_string()), identity, config).await;
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
    let mut addresses = Vec::new();
    for _ in 0..2 {
        let listen = "127.0.0.1:0".parse().unwrap();
        let options = TunnelOptions::default();
        addresses.push(user.open_tunnel(name.clone(), listen, options).await.unwrap().1);
    }
    let bytes: Vec<u8> = (0..2_000_000u32).map(|index| (index % 251) as u8).collect();
    let (one, other) =
        tokio::try_join!(exchange(addresses[0], &bytes), exchange(addresses[1], &bytes)).unwrap();
    assert!(one == bytes && other == bytes, "not one byte lost, doubled or in another order");
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
