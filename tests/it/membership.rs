//! Who is let in, who is not, and who is put out: real nodes and a plain libp2p node on loopback.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, SwarmBuilder, gossipsub, identify, kad, noise, ping,
    tcp, yamux,
};
use meshwise::config::Config;
use meshwise::engine::event::{Command, Input};
use meshwise::engine::overlay::token::Invite;
use meshwise::engine::overlay::{NetworkState, NotLetIn, NotMember};
use meshwise::engine::types::{NodeId, ServiceName};
use meshwise::node::network::Network;
use meshwise::node::{Clock, Identity, JoinError, Node, NodeOptions, TunnelOptions, join};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;

use crate::support::{PATIENCE, config, echo_server, eventually, listening, service};

const NAME: &str = "secret.local";
const DAY: Duration = Duration::from_secs(86_400);

/// A first node, which founds a network of its own, and that network.
pub async fn found(data_dir: &Path, config: Config) -> (Node, Network) {
    let node = run(data_dir, config).await;
    let network = Network::load(data_dir).unwrap().unwrap();
    (node, network)
}

async fn run(data_dir: &Path, config: Config) -> Node {
    let options = NodeOptions { config, data_dir: data_dir.to_owned(), trainer: None };
    Node::start(options).await.unwrap()
}

/// A node whose credential the root signed so long ago.
pub async fn member(network: &Network, age: Duration, data_dir: &Path, config: Config) -> Node {
    std::fs::create_dir_all(data_dir).unwrap();
    let identity = Identity::generate();
    identity.save_new(data_dir).unwrap();
    let now = Clock::default().now().as_micros();
    let then = meshwise::engine::types::Timestamp(now - age.as_micros() as u64);
    network.admit(&identity.public_key(), then).unwrap().save_new(data_dir).unwrap();
    run(data_dir, config).await
}

pub async fn peers(node: &Node) -> Vec<NodeId> {
    node.handle().inspect(|view| view.engine.peers().keys().copied().collect()).await.unwrap()
}

/// What the data plane of a node counted under a word.
pub async fn counted(node: &Node, word: &'static str) -> u64 {
    let count = move |view: &mut meshwise::node::View<'_>| {
        view.net.plane().counters().dropped().get(word).copied().unwrap_or_default()
    };
    node.handle().inspect(count).await.unwrap()
}

/// Has a node's engine carry out a command, without waiting for the answer.
async fn command(node: &Node, command: Command) {
    let now = Clock::default().now();
    let carry_out = move |view: &mut meshwise::node::View<'_>| {
        view.engine.handle(now, Input::Command(command));
    };
    node.handle().inspect(carry_out).await.unwrap();
}

fn name() -> ServiceName {
    NAME.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_networks_do_not_mix() {
    let folder = tempfile::tempdir().unwrap();
    let (one, _) = found(&folder.path().join("one"), config(vec![])).await;
    one.handle().publish(service(NAME), echo_server().await).await.unwrap();
    let settings = config(listening(&one).await);
    let (other, _) = found(&folder.path().join("other"), settings).await;
    eventually("it notices that the node there is of another network", || async {
        counted(&other, "admission-foreign").await > 0
    })
    .await;
    assert!(peers(&one).await.is_empty() && peers(&other).await.is_empty());
    assert!(other.handle().resolve(name(), true).await.is_err());
    one.stop().await;
    other.stop().await;
}

/// What any libp2p node speaks, with the names of our protocols.
#[derive(NetworkBehaviour)]
struct Plain {
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    kad: kad::Behaviour<kad::store::MemoryStore>,
    gossipsub: gossipsub::Behaviour,
    sync: request_response::cbor::Behaviour<Vec<u8>, Vec<u8>>,
    stream: libp2p_stream::Behaviour,
}

pub fn protocol(network: &Network, name: &str) -> StreamProtocol {
    let root = network.state.root.node_id();
    StreamProtocol::try_from_owned(format!("/meshwise/{root}/{name}")).unwrap()
}

pub fn topic(network: &Network) -> gossipsub::IdentTopic {
    gossipsub::IdentTopic::new(format!("meshwise/{}/2", network.state.root.node_id()))
}

/// Gossip as nodes speak it: gossipsub signs nothing, and names messages by what is in them.
pub fn gossip() -> gossipsub::Behaviour {
    let name = |message: &gossipsub::Message| {
        gossipsub::MessageId::from(Sha256::digest(&message.data).to_vec())
    };
    let config = gossipsub::ConfigBuilder::default()
        .validation_mode(gossipsub::ValidationMode::Anonymous)
        .message_id_fn(name)
        .build();
    gossipsub::Behaviour::new(gossipsub::MessageAuthenticity::Anonymous, config.unwrap()).unwrap()
}

fn plain(network: &Network) -> Swarm<Plain> {
    let root = network.state.root.node_id();
    let (kad, sync) = (protocol(network, "kad/1"), protocol(network, "sync/2"));
    let behaviour = |key: &libp2p::identity::Keypair| {
        let me = key.public().to_peer_id();
        let mut gossipsub = gossip();
        gossipsub.subscribe(&topic(network)).unwrap();
        let mut kad = kad::Behaviour::with_config(
            me,
            kad::store::MemoryStore::new(me),
            kad::Config::new(kad),
        );
        kad.set_mode(Some(kad::Mode::Server));
        let version = format!("/meshwise/{root}/1");
        Plain {
            identify: identify::Behaviour::new(identify::Config::new(version, key.public())),
            ping: ping::Behaviour::default(),
            kad,
            gossipsub,
            sync: request_response::cbor::Behaviour::new(
                [(sync, ProtocolSupport::Full)],
                request_response::Config::default(),
            ),
            stream: libp2p_stream::Behaviour::new(),
        }
    };
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(behaviour)
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(PATIENCE))
        .build()
}

/// What a stranger got until it was disconnected.
#[derive(Debug, Default, PartialEq, Eq)]
struct Got {
    protocols: Vec<String>,
    pings: usize,
    sync_refusals: usize,
    /// Answers of Kademlia, subscriptions and messages of gossip, answers of the synchronisation.
    secrets: Vec<String>,
}

/// Asks for everything there is until the connection ends.
async fn intrude(swarm: &mut Swarm<Plain>, peer: PeerId, address: Multiaddr) -> Got {
    let mut got = Got::default();
    swarm.behaviour_mut().kad.add_address(&peer, address.clone());
    swarm.dial(address).unwrap();
    let key = kad::RecordKey::from([b"/meshwise/providers/", NAME.as_bytes()].concat());
    let until_closed = async {
        loop {
            match swarm.select_next_some().await {
                SwarmEvent::ConnectionEstablished { .. } => {
                    swarm.behaviour_mut().sync.send_request(&peer, Vec::new());
                    swarm.behaviour_mut().kad.get_providers(key.clone());
                    swarm.behaviour_mut().kad.get_closest_peers(PeerId::random());
                }
                SwarmEvent::ConnectionClosed { num_established: 0, .. } => return,
                SwarmEvent::Behaviour(PlainEvent::Identify(identify::Event::Received {
                    info,
                    ..
                })) => got.protocols.extend(info.protocols.iter().map(ToString::to_string)),
                SwarmEvent::Behaviour(PlainEvent::Ping(ping)) => {
                    got.pings += usize::from(ping.result.is_ok());
                }
                SwarmEvent::Behaviour(PlainEvent::Sync(event)) => match event {
                    request_response::Event::OutboundFailure {
                        error: request_response::OutboundFailure::UnsupportedProtocols,
                        ..
                    } => got.sync_refusals += 1,
                    event => got.secrets.push(format!("{event:?}")),
                },
                SwarmEvent::Behaviour(PlainEvent::Gossipsub(event)) => match event {
                    gossipsub::Event::GossipsubNotSupported { .. } => {}
                    event => got.secrets.push(format!("{event:?}")),
                },
                SwarmEvent::Behaviour(PlainEvent::Kad(kad::Event::OutboundQueryProgressed {
                    stats,
                    ..
                })) if stats.num_successes() > 0 => got.secrets.push(format!("{stats:?}")),
                _ => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, until_closed).await.expect("it was not disconnected");
    got
}

/// Shows no credential, and returns what the node says to that.
async fn told(swarm: &mut Swarm<Plain>, peer: PeerId, network: &Network) -> String {
    let mut control = swarm.behaviour().stream.new_control();
    let admission = protocol(network, "admission/1");
    let asking = async {
        let mut stream = control.open_stream(peer, admission).await.unwrap();
        // A greeting with an empty credential: no times and no signature.
        stream.write_all(&[0, 4, 0, 0, 0, 0]).await.unwrap();
        stream.flush().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        answer
    };
    let mut asking = std::pin::pin!(asking);
    let answer = loop {
        tokio::select! {
            answer = &mut asking => break answer,
            _ = swarm.select_next_some() => {}
        }
    };
    assert_eq!(answer[2], 2, "a refusal: {answer:?}");
    String::from_utf8(answer[4..].to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_gets_identify_and_ping_and_is_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = config(vec![]);
    settings.network.nat = true;
    settings.emulation.enabled = true;
    let (node, network) = found(&folder.path().join("node"), settings).await;
    let settings = config(listening(&node).await);
    let friend = member(&network, Duration::ZERO, &folder.path().join("friend"), settings).await;
    friend.handle().publish(service(NAME), echo_server().await).await.unwrap();
    eventually("there is something to hear", || async {
        node.handle().resolve(name(), false).await.is_ok()
    })
    .await;

    let mut swarm = plain(&network);
    let address: Multiaddr = listening(&node).await[0].parse().unwrap();
    let peer = match address.iter().last().unwrap() {
        libp2p::multiaddr::Protocol::P2p(peer) => peer,
        part => panic!("{part} is no peer id"),
    };
    let got = intrude(&mut swarm, peer, address.clone()).await;
    assert!(got.pings > 0, "{got:?}");
    assert!(got.sync_refusals > 0, "{got:?}");
    assert_eq!(got.secrets, [""; 0]);
    let offers = |name: &str| got.protocols.iter().any(|protocol| protocol.contains(name));
    assert!(offers("admission/1") && offers("join/1") && offers("ipfs/ping"), "{got:?}");
    for name in ["kad", "meshsub", "sync", "link", "circuit", "autonat", "dcutr"] {
        assert!(!offers(name), "{name} is for members: {got:?}");
    }
    assert!(counted(&node, "admission-timed-out").await > 0);

    swarm.dial(address).unwrap();
    let why = told(&mut swarm, peer, &network).await;
    assert_eq!(why, NotMember::NoCredential.to_string());
    let closed = async {
        while !matches!(swarm.select_next_some().await, SwarmEvent::ConnectionClosed { .. }) {}
    };
    tokio::time::timeout(PATIENCE, closed).await.expect("it was not disconnected");
    assert!(counted(&node, "admission-stranger").await > 0);
    assert_eq!(peers(&node).await, [friend.handle().key().node_id()]);
    friend.stop().await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_member_is_put_out_by_everybody_and_its_tunnel_ends() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let (issuer, network) = found(&dir("issuer"), config(vec![])).await;
    let settings = config(listening(&issuer).await);
    let provider = member(&network, Duration::ZERO, &dir("provider"), settings.clone()).await;
    let caller = member(&network, Duration::ZERO, &dir("caller"), settings).await;
    let (target, mut ended) = echo_that_tells().await;
    provider.handle().publish(service(NAME), target).await.unwrap();
    eventually("all are connected and the service is known", || async {
        let all = [peers(&issuer).await, peers(&provider).await, peers(&caller).await];
        all.iter().all(|peers| peers.len() == 2)
            && caller.handle().resolve(name(), false).await.is_ok()
    })
    .await;
    let any = "127.0.0.1:0".parse().unwrap();
    let opened = caller.handle().open_tunnel(name(), any, TunnelOptions::default()).await;
    let mut stream = tokio::net::TcpStream::connect(opened.unwrap().1).await.unwrap();
    let mut echo = [0; 5];
    stream.write_all(b"hello").await.unwrap();
    stream.read_exact(&mut echo).await.unwrap();

    let begun = Instant::now();
    command(&issuer, Command::Revoke { request: 0, key: caller.handle().key() }).await;
    eventually("nobody is connected with it", || async {
        let others = [peers(&issuer).await, peers(&provider).await];
        others.iter().all(|peers| peers.len() == 1) && peers(&caller).await.is_empty()
    })
    .await;
    // At the provider: its good-bye may not reach the caller any more.
    tokio::time::timeout(PATIENCE, ended.recv()).await.expect("its tunnel goes on").unwrap();
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(10), "put out and its tunnel ended after {took:?}");
    eventually("it is told why when it comes back", || async {
        counted(&caller, "admission-refused-by-peer").await > 0
    })
    .await;
    assert!(peers(&caller).await.is_empty());
    assert_eq!(peers(&issuer).await, [provider.handle().key().node_id()]);
    for node in [caller, provider, issuer] {
        node.stop().await;
    }
}

/// An echo server that tells of each connection that ended.
async fn echo_that_tells() -> (SocketAddr, mpsc::Receiver<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, ended) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let sender = sender.clone();
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = sender.send(()).await;
            });
        }
    });
    (address, ended)
}

/// Opens an invitation at a node, and returns it as it would be passed on.
async fn invite(issuer: &Node, secret: u8, lifetime: Duration) -> Invite {
    let secret = [secret; 16];
    command(issuer, Command::Invite { request: 0, secret, uses: 1, lifetime }).await;
    let state = issuer.handle().inspect(|view| view.engine.network()).await.unwrap();
    Invite {
        name: state.name,
        root: state.root,
        issuer: state.issuer,
        addresses: listening(issuer).await,
        secret,
        expires_at: Clock::default().now() + DAY,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invitation_lets_one_node_in_and_not_two() {
    let folder = tempfile::tempdir().unwrap();
    let (issuer, _) = found(&folder.path().join("issuer"), config(vec![])).await;
    let open = invite(&issuer, 1, DAY).await;
    let (first, second) = (Identity::generate(), Identity::generate());
    let credential = join(&first, &open).await.unwrap();
    let again = join(&first, &open).await;
    assert!(again.is_ok(), "an answer that was lost costs nothing");
    match join(&second, &open).await {
        Err(JoinError::Refused { why: NotLetIn::Unknown, .. }) => {}
        other => panic!("used up: {other:?}"),
    }
    let late = invite(&issuer, 2, Duration::ZERO).await;
    match join(&second, &late).await {
        Err(JoinError::Refused { why: NotLetIn::Expired, .. }) => {}
        other => panic!("expired: {other:?}"),
    }

    let dir = folder.path().join("first");
    std::fs::create_dir_all(&dir).unwrap();
    first.save_new(&dir).unwrap();
    let state = NetworkState::joined(&open.name, open.root, open.issuer, credential);
    Network { state, root: None }.save_new(&dir).unwrap();
    let node = run(&dir, config(open.addresses)).await;
    eventually("who was let in is connected", || async {
        peers(&issuer).await == [first.node_id()]
    })
    .await;
    node.stop().await;
    issuer.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_member_is_refused_and_one_in_its_last_third_gets_a_new_credential() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let (issuer, network) = found(&dir("issuer"), config(vec![])).await;
    let settings = config(listening(&issuer).await);
    let expired = member(&network, 100 * DAY, &dir("expired"), settings.clone()).await;
    eventually("it is told why", || async {
        counted(&expired, "admission-refused-by-peer").await > 0
    })
    .await;
    assert!(counted(&issuer, "admission-stranger").await > 0);
    assert!(peers(&issuer).await.is_empty() && peers(&expired).await.is_empty());

    let old = dir("old");
    let ends = |node: &Node| {
        let handle = node.handle().clone();
        async move { handle.inspect(|view| view.engine.network().credential.expires_at).await }
    };
    std::fs::create_dir_all(&old).unwrap();
    let identity = Identity::generate();
    command(&issuer, Command::Certify { request: 0, key: identity.public_key() }).await;
    identity.save_new(&old).unwrap();
    let then = Clock::default().now().as_micros() - (80 * DAY).as_micros() as u64;
    let admitted =
        network.admit(&identity.public_key(), meshwise::engine::types::Timestamp(then)).unwrap();
    let before = admitted.state.credential.expires_at;
    admitted.save_new(&old).unwrap();
    let node = run(&old, settings).await;
    eventually("it has a new credential", || async { ends(&node).await.unwrap() > before }).await;
    for node in [node, expired, issuer] {
        node.stop().await;
    }
}
