//! How real nodes find each other: dead and silent bootstrap addresses, the peer cache.

use std::path::Path;

use meshwise::config::Config;
use meshwise::engine::types::NodeId;
use meshwise::node::{DATABASE, Identity, Node, NodeOptions};
use meshwise::store::Reader;
use tokio::net::TcpListener;

use crate::support::{config, eventually, listening, prepare, start};

async fn again(data_dir: &Path, config: Config) -> Node {
    Node::start(NodeOptions { config, data_dir: data_dir.to_owned(), trainer: None }).await.unwrap()
}

async fn peers(node: &Node) -> Vec<NodeId> {
    node.handle().inspect(|view| view.engine.peers().keys().copied().collect()).await.unwrap()
}

/// An address of this machine where nobody listens.
async fn dead(ip: &str) -> String {
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    format!("/ip4/{ip}/tcp/{}", listener.local_addr().unwrap().port())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_by_the_first_address_that_answers() {
    let folder = tempfile::tempdir().unwrap();
    let first = start(&folder.path().join("first"), &Identity::generate(), config(vec![])).await;
    // Two refuse, two take the connection and never say a word: a dial there lasts until it times
    // out.
    let silent = [
        TcpListener::bind("127.0.0.2:0").await.unwrap(),
        TcpListener::bind("127.0.0.3:0").await.unwrap(),
    ];
    let mut addresses = vec![dead("127.0.0.4").await, dead("127.0.0.5").await];
    for listener in &silent {
        let address = listener.local_addr().unwrap();
        addresses.push(format!("/ip4/{}/tcp/{}", address.ip(), address.port()));
    }
    addresses.extend(listening(&first).await);
    let node =
        start(&folder.path().join("node"), &Identity::generate(), config(addresses.clone())).await;
    eventually("it has joined", || async {
        node.handle().inspect(|view| view.engine.joined_after().is_some()).await.unwrap()
    })
    .await;
    let results = node.handle().inspect(|view| view.net.reach().bootstrap).await.unwrap();
    assert_eq!(results[&addresses[4]], Some(Ok(())));
    for silent in &addresses[2..4] {
        assert_eq!(results[silent], None, "it did not wait for that dial");
    }
    eventually("the results of the others are known", || async {
        let results = node.handle().inspect(|view| view.net.reach().bootstrap).await.unwrap();
        addresses[..2]
            .iter()
            .all(|dead| matches!(&results[dead], Some(Err(why)) if why.contains("refused")))
    })
    .await;
    node.stop().await;
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_rejoins_by_its_cache_when_every_bootstrap_address_is_dead() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let (gone, stays) = (Identity::generate(), Identity::generate());
    let first = start(&dir("gone"), &gone, config(vec![])).await;
    let bootstrap = listening(&first).await;
    let other = start(&dir("stays"), &stays, config(bootstrap.clone())).await;
    let identity = Identity::generate();
    prepare(&dir("node"), &identity);
    let node = again(&dir("node"), config(bootstrap.clone())).await;
    eventually("it is connected with both, and knows where they listen", || async {
        let known = node.handle().inspect(|view| view.engine.known_peers(view.now).len()).await;
        known.unwrap() == 2
    })
    .await;
    node.stop().await;
    first.stop().await;
    eventually("the other node is alone", || async { peers(&other).await.is_empty() }).await;
    let kept = Reader::open(dir("node").join(DATABASE)).unwrap().peers().unwrap();
    assert_eq!(kept.len(), 2);

    let node = again(&dir("node"), config(bootstrap)).await;
    eventually("it is back", || async { peers(&node).await == [stays.node_id()] }).await;
    node.stop().await;
    other.stop().await;
}
