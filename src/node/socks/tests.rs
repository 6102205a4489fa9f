use super::*;
use crate::config::{Config, EmulatedLink};
use crate::engine::event::ServiceSpec;
use crate::engine::overlay::Objective;
use crate::net::tunnel::Export;
use crate::node::network::Network;
use crate::node::{Clock, Identity, Node, NodeOptions};

#[test]
fn names_are_taken_and_everything_else_is_refused() {
    let name = |text: &str| wanted(CONNECT, 3, text.as_bytes());
    assert_eq!(name("ByronWade.local"), Ok("byronwade.local".parse().unwrap()));
    assert_eq!(name("byronwade.local."), Ok("byronwade.local".parse().unwrap()));
    for address in ["127.0.0.1", "::1"] {
        assert_eq!(name(address), Err(Reply::NotAllowed), "no exit, also when written out");
    }
    assert_eq!(wanted(CONNECT, 1, &[127, 0, 0, 1]), Err(Reply::NotAllowed));
    assert_eq!(wanted(CONNECT, 4, b"local.local.loca"), Err(Reply::NotAllowed));
    for wrong in ["", "a..b", "a b", "-a"] {
        assert_eq!(name(wrong), Err(Reply::UnknownName));
    }
    assert_eq!(wanted(CONNECT, 3, &[0xff]), Err(Reply::UnknownName));
    for command in [0, 2, 3, 9] {
        assert_eq!(wanted(command, 3, b"a.local"), Err(Reply::CommandNotSupported));
    }
}

#[tokio::test]
async fn an_address_that_is_taken_is_no_proxy_and_no_error() {
    assert!(listen("").await.is_none());
    let taken = listen("127.0.0.1:0").await.unwrap();
    assert!(listen(&taken.local_addr().unwrap().to_string()).await.is_none());
}

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
        };
        nodes[1].handle.publish(service, greeter(1).await).await.unwrap();
        let (kind, target) = (ServiceKind::Tcp, greeter(2).await);
        let export = Export { kind, target, allowed: Vec::new() };
        nodes[2].handle.tunnels.export(name.clone(), export);
        let user = nodes[USER].handle.clone();
        let linked = || async {
            let linked = user.linked(ids[1..].iter().copied()).await.unwrap();
            linked.len() == 2 && user.resolve(name.clone(), false).await.is_ok()
        };
        eventually("the user has heard of both", linked).await;
        let (records, _) = user.resolve(name.clone(), false).await.unwrap();
        let record = records[0].1.clone();
        let providers = (1..3).map(|index| (nodes[index].handle.key(), record.clone())).collect();
        Self { _folder: folder, nodes, name, providers }
    }

    fn proxy(&self) -> Proxy {
        Proxy { node: self.nodes[USER].handle.clone(), shared: std::sync::Mutex::default() }
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
    let proxy = three.proxy();
    let connect = || async {
        let connected = proxy.connect_to(&three.name, three.providers.clone()).await;
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
        proxy.watch();
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
