use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::config::{Config, EmulatedLink};
use crate::engine::event::ServiceSpec;
use crate::engine::measure::HealthPolicy;
use crate::engine::overlay::Objective;
use crate::net::tunnel::Export;
use crate::node::network::Network;
use crate::node::{Clock, Identity, Node, NodeOptions};

/// A user and two providers of one name, each linked to the user only.
struct Three {
    _folder: tempfile::TempDir,
    nodes: Vec<Node>,
    name: ServiceName,
    providers: Vec<Provider>,
}

const USER: usize = 0;

/// Says which provider it belongs to, and then nothing more.
async fn greeter(number: u8) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut tcp, _)) = listener.accept().await {
            tcp.write_all(&[number]).await.unwrap();
            open.push(tcp);
        }
    });
    address
}

impl Three {
    /// Two providers cannot publish one name yet: the second one serves it without a record.
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let identities: Vec<Identity> = (0..3).map(|_| Identity::generate()).collect();
        let ids: Vec<NodeId> = identities.iter().map(Identity::node_id).collect();
        let now = Clock::default().now();
        let network = Network::found("test", &identities[USER].public_key(), now);
        let (mut nodes, mut bootstrap) = (Vec::<Node>::new(), Vec::new());
        for (index, identity) in identities.iter().enumerate() {
            let data_dir = folder.path().join(index.to_string());
            std::fs::create_dir(&data_dir).unwrap();
            identity.save_new(&data_dir).unwrap();
            let admitted = network.admit(&identity.public_key(), now).unwrap();
            admitted.save_new(&data_dir).unwrap();
            let mut config = Config::default();
            config.network.listen = vec!["/ip4/127.0.0.1/tcp/0".into()];
            config.network.bootstrap = std::mem::take(&mut bootstrap);
            config.network.mdns = false;
            config.learning.retrain_s = 0;
            config.entry.socks = String::new();
            (config.probing.active_route_ms, config.probing.candidate_route_ms) = (100, 200);
            let neighbours = if index == USER { &ids[1..] } else { &ids[..1] };
            let link =
                |id: &NodeId| EmulatedLink { neighbour: id.to_string(), ..Default::default() };
            config.emulation.enabled = true;
            config.emulation.links = neighbours.iter().map(link).collect();
            let options = NodeOptions { config, data_dir, trainer: None };
            nodes.push(Node::start(options).await.unwrap());
            bootstrap = nodes[USER].handle.inspect(|view| view.net.listening()).await.unwrap();
        }
        let name: ServiceName = "a.local".parse().unwrap();
        let service = ServiceSpec {
            name: name.clone(),
            kind: ServiceKind::Tcp,
            metadata: BTreeMap::new(),
            allowed: Vec::new(),
            ttl_s: 600,
            objective: Objective::Balanced,
            delegation: None,
            health: HealthPolicy::of_kind(ServiceKind::Tcp),
        };
        nodes[1].handle.publish(service, greeter(1).await).await.unwrap();
        let (kind, target) = (ServiceKind::Tcp, greeter(2).await);
        let export = Export { kind, target, allowed: Vec::new() };
        nodes[2].handle.tunnels.export(name.clone(), export);
        let user = nodes[USER].handle.clone();
        let linked = || async {
            let sound = user.sound(&name, ids[1..].to_vec()).await.unwrap();
            sound.len() == 2 && user.resolve(name.clone(), false).await.is_ok()
        };
        eventually("the user has heard of both", linked).await;
        let (records, _) = user.resolve(name.clone(), false).await.unwrap();
        let record = records[0].1.clone();
        let providers = (1..3).map(|index| (nodes[index].handle.key(), record.clone())).collect();
        Self { _folder: folder, nodes, name, providers }
    }

    fn entrance(&self) -> Entrance {
        Entrance::new(self.nodes[USER].handle.clone(), TunnelOptions::default(), None)
    }

    /// What a provider sends is lost from now on.
    async fn silence(&self, provider: usize) {
        let user = self.nodes[USER].handle.key().node_id();
        let neighbour = user.to_string();
        let silent = EmulatedLink { neighbour, loss: 1.0, ..EmulatedLink::default() };
        assert!(self.nodes[provider].handle.emulate(user, silent).await.unwrap());
    }

    async fn stop(self) {
        for node in self.nodes {
            node.stop().await;
        }
    }
}

async fn eventually<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// A local program's connection that is carried over a stream, once the provider has greeted it, and
/// which one that is.
async fn carried(connected: Connected) -> (TcpStream, u8) {
    let Connected::Tunnel(stream) = connected else { panic!("no service of this node") };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let program = TcpStream::connect(listener.local_addr().unwrap());
    let (program, accepted) = tokio::join!(program, listener.accept());
    tokio::spawn(stream.carry(accepted.unwrap().0));
    let mut program = program.unwrap();
    let number = program.read_u8().await.unwrap();
    (program, number)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_a_provider_falls_silent_connections_go_to_the_next_one_and_its_own_are_ended() {
    let three = Three::start().await;
    let entrance = three.entrance();
    let connect = || async {
        let connected = entrance.connect_to(&three.name, three.providers.clone()).await;
        let Ok(connected) = connected else { panic!("{:?}", connected.err()) };
        carried(connected).await
    };
    let (mut first, number) = connect().await;
    assert_eq!(number, 1, "the first in the list");
    three.silence(1).await;
    let begun = Instant::now();
    let (mut second, number) = connect().await;
    println!("the other provider accepted after {} ms", begun.elapsed().as_millis());
    assert_eq!(number, 2);
    let lost = tokio::spawn(async move { first.read_u8().await });
    eventually("nobody waits for the lost one any more", || async {
        entrance.watch().await.unwrap();
        lost.is_finished()
    })
    .await;
    println!("its connections were ended after {} ms", begun.elapsed().as_millis());
    let lost = lost.await.unwrap().unwrap_err();
    assert_eq!(lost.kind(), std::io::ErrorKind::ConnectionReset, "and not as if complete");
    let (_third, number) = connect().await;
    assert_eq!(number, 2);
    let still = tokio::time::timeout(Duration::from_millis(300), second.read_u8()).await;
    assert!(still.is_err(), "the others go on");
    let providers: Vec<PublicKey> =
        three.nodes[USER].handle.tunnels().iter().map(|info| info.provider).collect();
    assert_eq!(providers, [three.providers[1].0]);
    three.stop().await;
}
