//! Who may publish a name, on real nodes: replicas under one owner, foreign owners, what a restart
//! remembers, and what the DHT says.

use std::collections::BTreeSet;
use std::time::Duration;

use meshwise::engine::event::{CommandError, Input, ServiceSpec};
use meshwise::engine::overlay::wire::{self, GossipMessage};
use meshwise::engine::overlay::{Signed, delegation};
use meshwise::engine::types::{NodeId, ServiceName};
use meshwise::node::{Identity, Node, NodeOptions, RequestError, View};
use tempfile::TempDir;

use crate::support::{config, echo_server, eventually, listening, service, start};

const NAME: &str = "replicated.local";
const OWNER: usize = 0;
const REPLICA: usize = 1;
const OTHER: usize = 2;

fn name() -> ServiceName {
    NAME.parse().unwrap()
}

/// Nodes that are all connected to the first one.
struct Mesh {
    folder: TempDir,
    nodes: Vec<Option<Node>>,
    ids: Vec<NodeId>,
    bootstrap: Vec<String>,
}

impl Mesh {
    async fn start(count: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (mut nodes, mut ids, mut bootstrap) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..count {
            let identity = Identity::generate();
            let dir = folder.path().join(index.to_string());
            let node = start(&dir, &identity, config(bootstrap.clone())).await;
            bootstrap.extend(listening(&node).await);
            ids.push(identity.node_id());
            nodes.push(Some(node));
        }
        let mesh = Self { folder, nodes, ids, bootstrap };
        for index in 0..count {
            let peers = |view: &mut View<'_>| view.engine.peers().len();
            eventually("all are connected", || async {
                mesh.node(index).handle().inspect(peers).await.unwrap() + 1 == count
            })
            .await;
        }
        mesh
    }

    fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().unwrap()
    }

    async fn restart(&mut self, index: usize) {
        if let Some(node) = self.nodes[index].take() {
            node.stop().await;
        }
        let data_dir = self.folder.path().join(index.to_string());
        let config = config(self.bootstrap.clone());
        let options = NodeOptions { config, data_dir, trainer: None };
        self.nodes[index] = Some(Node::start(options).await.unwrap());
    }

    /// Publishes at the owner, and at the replica in its name.
    async fn publish(&self) {
        let target = echo_server().await;
        let owner = self.node(OWNER).handle();
        owner.publish(service(NAME), target).await.unwrap();
        let replica = self.node(REPLICA).handle();
        let day = Duration::from_secs(86_400);
        let (text, _) = owner.delegate(name(), replica.key(), day).await.unwrap();
        let (signed, _) = delegation::from_text(&text).unwrap();
        let spec = ServiceSpec { delegation: Some(signed), ..service(NAME) };
        replica.publish(spec, target).await.unwrap();
    }

    /// The providers that a node finds, in its registry or in the DHT.
    async fn providers(&self, index: usize, from_dht: bool) -> BTreeSet<NodeId> {
        let found = self.node(index).handle().resolve(name(), from_dht).await;
        let Ok((providers, from_gossip)) = found else { return BTreeSet::new() };
        assert!(!(from_dht && from_gossip));
        let owner = self.node(OWNER).handle().key();
        assert!(providers.iter().all(|(_, record)| record.owner == owner));
        providers.iter().map(|(key, _)| key.node_id()).collect()
    }

    async fn eventually_provided(&self, index: usize, from_dht: bool, by: &[usize]) {
        let expected: BTreeSet<NodeId> = by.iter().map(|index| self.ids[*index]).collect();
        eventually("the right nodes provide it", || async {
            self.providers(index, from_dht).await == expected
        })
        .await;
    }

    async fn stop(self) {
        for node in self.nodes.into_iter().flatten() {
            node.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_under_one_owner_are_found_together_and_survive_a_restart() {
    let mut mesh = Mesh::start(4).await;
    mesh.publish().await;
    for from_dht in [false, true] {
        mesh.eventually_provided(OTHER, from_dht, &[OWNER, REPLICA]).await;
    }
    // What it said last, to be replayed when it is gone.
    let owner = mesh.ids[OWNER];
    let said = move |view: &mut View<'_>| -> Vec<Signed> {
        let signed = view.engine.services().registry().signed();
        signed.filter(|signed| signed.key.node_id() == owner).cloned().collect()
    };
    let old = mesh.node(OTHER).handle().inspect(said).await.unwrap();
    assert_eq!(old.len(), 1);
    mesh.node(OWNER).handle().withdraw(name()).await.unwrap();
    for from_dht in [false, true] {
        mesh.eventually_provided(OTHER, from_dht, &[REPLICA]).await;
    }
    let bytes = wire::encode(&GossipMessage::Service(old[0].clone()));
    let replay = move |view: &mut View<'_>| {
        view.engine.handle(view.now, Input::Gossip { token: u64::MAX, from: owner, bytes });
    };
    mesh.node(OTHER).handle().inspect(replay).await.unwrap();
    mesh.eventually_provided(OTHER, false, &[REPLICA]).await;

    mesh.restart(REPLICA).await;
    for from_dht in [false, true] {
        mesh.eventually_provided(OTHER, from_dht, &[REPLICA]).await;
    }
    mesh.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_owner_is_refused_and_named_also_after_a_restart_until_it_is_trusted() {
    let mut mesh = Mesh::start(4).await;
    mesh.publish().await;
    mesh.eventually_provided(OTHER, false, &[OWNER, REPLICA]).await;
    let target = echo_server().await;
    let refused = async |mesh: &Mesh| {
        let error = mesh.node(OTHER).handle().publish(service(NAME), target).await.unwrap_err();
        let foreign = matches!(
            &error,
            RequestError::Command(CommandError::Refused(error)) if error.is_foreign()
        );
        let text = error.to_string();
        assert!(foreign, "{text}");
        for node in [OWNER, OTHER] {
            assert!(text.contains(&mesh.ids[node].to_string()), "{text}");
        }
        assert!(text.contains("service trust") && text.contains("network grant"), "{text}");
    };
    refused(&mesh).await;
    // Nobody provides it any more, and the claimant starts anew: the name is the owner's still.
    mesh.node(REPLICA).handle().withdraw(name()).await.unwrap();
    mesh.nodes[OWNER].take().unwrap().stop().await;
    mesh.restart(OTHER).await;
    refused(&mesh).await;

    let claimant = mesh.node(OTHER).handle().key();
    mesh.node(OTHER).handle().trust(name(), claimant).await.unwrap();
    // The others still refuse it, and gossip does not bring it to them; the DHT holds both.
    mesh.node(OTHER).handle().publish(service(NAME), target).await.unwrap();
    let consumer = mesh.node(3).handle();
    eventually("only what is another's is left", || async {
        let found = consumer.resolve(name(), false).await;
        matches!(found, Err(RequestError::Command(CommandError::Refused(_))))
    })
    .await;
    let key = consumer.key_of(mesh.ids[OTHER]).await.unwrap();
    consumer.trust(name(), key).await.unwrap();
    eventually("the claimant's is found", || async {
        let found = consumer.resolve(name(), false).await;
        found.is_ok_and(|(providers, _)| {
            let owners: Vec<_> = providers.iter().map(|(key, r)| (*key, r.owner)).collect();
            owners == [(claimant, claimant)]
        })
    })
    .await;
    mesh.stop().await;
}
