//! Nodes that others cannot open connections to, on loopback: tests of addresses by members, circuits
//! over a member, holes.

use std::path::Path;

use meshwise::config::Config;
use meshwise::engine::measure::LinkState;
use meshwise::engine::types::NodeId;
use meshwise::node::{Identity, Node, peer_id_text};

use crate::support::{config, eventually, listening, only_links_to, start};

/// Who takes part.
struct Three {
    hub: Identity,
    hidden: Identity,
    other: Identity,
}

impl Three {
    fn new() -> Self {
        Self {
            hub: Identity::generate(),
            hidden: Identity::generate(),
            other: Identity::generate(),
        }
    }

    /// With everything about NAT on loopback; all may have links.
    fn settings(
        &self,
        bootstrap: Vec<String>,
        behind_nat: bool,
        unreachable: Option<&Identity>,
    ) -> Config {
        let mut config = config(bootstrap);
        config.network.nat = true;
        let all = [&self.hub, &self.hidden, &self.other].map(Identity::node_id);
        config.emulation = only_links_to(&all);
        config.emulation.behind_nat = behind_nat;
        let unreachable = unreachable.map(|peer| peer_id_text(&peer.public_key()));
        config.emulation.unreachable = unreachable.into_iter().collect();
        config
    }
}

async fn peers(node: &Node) -> Vec<NodeId> {
    node.handle().inspect(|view| view.engine.peers().keys().copied().collect()).await.unwrap()
}

async fn is_linked(node: &Node, other: NodeId) -> bool {
    let up = move |view: &mut meshwise::node::View<'_>| {
        view.engine.links().any(|(node, state, _)| node == other && state == LinkState::Up)
    };
    node.handle().inspect(up).await.unwrap()
}

async fn relayed(node: &Node) -> usize {
    node.handle().inspect(|view| view.net.reach().relayed.len()).await.unwrap()
}

async fn counted(node: &Node, word: &'static str) -> u64 {
    let count = move |view: &mut meshwise::node::View<'_>| {
        view.net.plane().counters().dropped().get(word).copied().unwrap_or_default()
    };
    node.handle().inspect(count).await.unwrap()
}

/// A hub, and a node behind a NAT that is reached over it.
async fn hub_and_hidden(folder: &Path, all: &Three, unreachable: Option<&Identity>) -> [Node; 2] {
    let hub = start(&folder.join("hub"), &all.hub, all.settings(vec![], false, None)).await;
    let config = all.settings(listening(&hub).await, true, unreachable);
    let node = start(&folder.join("hidden"), &all.hidden, config).await;
    eventually("it hears that nobody can reach it", || async {
        node.handle().inspect(|view| view.net.reach().is_unreachable()).await.unwrap()
    })
    .await;
    eventually("it is reached over the hub", || async {
        listening(&node).await.iter().any(|address| address.contains("/p2p-circuit/"))
    })
    .await;
    let me = all.hidden.node_id();
    eventually("the hub tells others how to reach it", || async {
        let told = move |view: &mut meshwise::node::View<'_>| {
            let addresses = view.engine.peers().get(&me).map(|peer| peer.addresses.clone());
            addresses.unwrap_or_default().iter().any(|address| address.contains("/p2p-circuit"))
        };
        hub.handle().inspect(told).await.unwrap()
    })
    .await;
    [hub, node]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_cannot_reach_each_other_are_connected_over_a_third() {
    let folder = tempfile::tempdir().unwrap();
    let all = Three::new();
    let [hub, hidden] = hub_and_hidden(folder.path(), &all, Some(&all.other)).await;
    let config = all.settings(listening(&hub).await, false, Some(&all.hidden));
    let node = start(&folder.path().join("node"), &all.other, config).await;
    let ids = [all.hidden.node_id(), all.other.node_id()];
    eventually("they are connected", || async {
        peers(&node).await.contains(&ids[0]) && peers(&hidden).await.contains(&ids[1])
    })
    .await;
    assert_eq!([relayed(&node).await, relayed(&hidden).await], [1, 1]);
    eventually("both have links with the hub", || async {
        let hub = all.hub.node_id();
        is_linked(&node, hub).await && is_linked(&hidden, hub).await
    })
    .await;
    assert!(!is_linked(&node, ids[0]).await, "for control messages only");
    assert!(!is_linked(&hidden, ids[1]).await, "for control messages only");
    for node in [node, hidden, hub] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hole_is_punched_and_the_circuit_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let all = Three::new();
    let [hub, hidden] = hub_and_hidden(folder.path(), &all, None).await;
    let config = all.settings(listening(&hub).await, true, None);
    let node = start(&folder.path().join("node"), &all.other, config).await;
    eventually("they are linked", || async {
        is_linked(&node, all.hidden.node_id()).await
            && is_linked(&hidden, all.other.node_id()).await
    })
    .await;
    assert!(counted(&hidden, "hole-punched").await + counted(&node, "hole-punched").await > 0);
    eventually("the circuit is given up", || async {
        relayed(&node).await == 0 && relayed(&hidden).await == 0
    })
    .await;
    for node in [node, hidden, hub] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_can_be_reached_hears_so_and_asks_for_no_relay() {
    let folder = tempfile::tempdir().unwrap();
    let all = Three::new();
    let hub = start(&folder.path().join("hub"), &all.hub, all.settings(vec![], false, None)).await;
    let config = all.settings(listening(&hub).await, false, None);
    let node = start(&folder.path().join("node"), &all.other, config).await;
    eventually("a member could reach it", || async {
        let tested = node.handle().inspect(|view| view.net.reach().tested).await.unwrap();
        tested.values().any(Result::is_ok)
    })
    .await;
    assert!(listening(&node).await.iter().all(|address| !address.contains("/p2p-circuit")));
    node.stop().await;
    hub.stop().await;
}
