//! Hostile hosts and members on real connections: a flood of identities without credentials, and a
//! member that sends what no node of ours would. What the others still achieve.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use ed25519_dalek::SigningKey;
use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::multiaddr::Protocol;
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::{NetworkBehaviour, SwarmEvent, dummy};
use libp2p::{Multiaddr, PeerId, Swarm, SwarmBuilder, gossipsub, kad, noise, tcp, yamux};
use meshwise::api::Server;
use meshwise::engine::forward::{DatagramKind, Header, PAYLOAD_BYTES_MAX};
use meshwise::engine::overlay::wire::{self, GOSSIP_BYTES_MAX};
use meshwise::engine::overlay::{Author, GossipMessage, LinkStateAdvertisement, Signed};
use meshwise::engine::types::{NodeId, Route, TunnelId};
use meshwise::net::gate::{Gated, Gates};
use meshwise::net::plane::UNPROVED_INBOUND_MAX;
use meshwise::node::network::Network;
use meshwise::node::{Clock, Node, parse_peer_id};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, UnixStream};
use tokio_util::sync::CancellationToken;

use super::NAME;
use crate::membership::{counted, found, gossip, member, peers, protocol, topic};
use crate::support::{
    PATIENCE, config, echo_server, eventually, exchange, listening, service, within,
};

/// Identities of one host.
const SYBILS: usize = 100;
/// How soon each comes back. All of them live in this process, which has two cores at best: a hundred
/// handshakes a second are what it can bear beside the nodes that it is about.
const AGAIN: Duration = Duration::from_secs(1);
/// Members of one host, more than may be connected from one address.
const ACCOMPLICES: usize = 40;
/// Longest wait for a place among the sybils of one's own address: they are turned away the sooner the
/// more often they come back.
const LONG_PATIENCE: Duration = Duration::from_secs(180);
/// The host that they are on. Nodes take who connects from 127.0.0.1 for a part of this machine.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// Carries connections on to a node, from [`ELSEWHERE`]. Returns where it listens.
async fn from_elsewhere(node: SocketAddr, stop: CancellationToken) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap();
    let carrying = async move {
        while let Ok((mut near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let socket = TcpSocket::new_v4()?;
                socket.bind((ELSEWHERE, 0).into())?;
                let mut far = socket.connect(node).await?;
                tokio::io::copy_bidirectional(&mut near, &mut far).await
            });
        }
    };
    tokio::spawn(async move { stop.run_until_cancelled(carrying).await });
    here
}

/// Connects, says nothing, and comes back when it is thrown out.
async fn sybil(address: Multiaddr, stop: CancellationToken) {
    let mut swarm = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|_| dummy::Behaviour)
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(PATIENCE))
        .build();
    let lives = async {
        loop {
            swarm.dial(address.clone()).unwrap();
            loop {
                match swarm.select_next_some().await {
                    SwarmEvent::ConnectionClosed { .. }
                    | SwarmEvent::OutgoingConnectionError { .. } => break,
                    _ => {}
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::select! { () = stop.cancelled() => {} () = lives => {} }
}

fn socket_address(address: &Multiaddr) -> SocketAddr {
    let mut parts = address.iter();
    match (parts.next(), parts.next()) {
        (Some(Protocol::Ip4(ip)), Some(Protocol::Tcp(port))) => (ip, port).into(),
        _ => panic!("{address} is not IPv4 and TCP"),
    }
}

async fn resolves(node: &Node, from_dht: bool) -> bool {
    let name = NAME.parse().unwrap();
    node.handle().resolve(name, from_dht).await.is_ok_and(|(found, _)| found.len() == 1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_identities_without_credentials_keep_no_member_out() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let (node, network) = found(&dir("node"), config(vec![])).await;
    let settings = config(listening(&node).await);
    let old = member(&network, Duration::ZERO, &dir("old"), settings.clone()).await;
    old.handle().publish(service(NAME), echo_server().await).await.unwrap();
    eventually("the old member is known", async || resolves(&node, false).await).await;

    let stop = CancellationToken::new();
    let address: Multiaddr = listening(&node).await[0].parse().unwrap();
    let at = from_elsewhere(socket_address(&address), stop.clone()).await;
    let at: Multiaddr = format!("/ip4/{}/tcp/{}", at.ip(), at.port()).parse().unwrap();
    for _ in 0..SYBILS {
        tokio::spawn(sybil(at.clone(), stop.clone()));
    }
    eventually("they use up what strangers may have", async || {
        counted(&node, "too-many-strangers").await > 0
    })
    .await;
    // One from this machine, and one that has nothing but the address of the sybils.
    let new = member(&network, Duration::ZERO, &dir("new"), settings).await;
    let same = config(vec![at.to_string()]);
    let neighbour = member(&network, Duration::ZERO, &dir("neighbour"), same).await;
    for node in [&new, &neighbour] {
        within(LONG_PATIENCE, "a new member is connected and finds the service", async || {
            resolves(node, false).await && resolves(node, true).await
        })
        .await;
    }
    let key = old.handle().key().node_id();
    assert!(peers(&node).await.contains(&key), "the old member is still there");
    let any = "127.0.0.1:0".parse().unwrap();
    let opened = new.handle().open_tunnel(NAME.parse().unwrap(), any, Default::default()).await;
    assert_eq!(exchange(opened.unwrap().1, b"hello").await.unwrap(), b"hello");
    assert_eq!(peers(&node).await.len(), 3, "and nobody else");
    stop.cancel();
    for node in [new, neighbour, old, node] {
        node.stop().await;
    }
}

/// What a member may speak.
#[derive(NetworkBehaviour)]
struct Inside {
    kad: kad::Behaviour<kad::store::MemoryStore>,
    gossipsub: gossipsub::Behaviour,
    sync: request_response::cbor::Behaviour<Vec<u8>, Vec<u8>>,
}

#[derive(NetworkBehaviour)]
struct Speaker {
    stream: libp2p_stream::Behaviour,
    inside: Gated<Inside>,
}

fn speaker(network: &Network, gates: Gates, identity: libp2p::identity::Keypair) -> Swarm<Speaker> {
    let behaviour = |key: &libp2p::identity::Keypair| {
        let me = key.public().to_peer_id();
        let mut gossipsub = gossip();
        gossipsub.subscribe(&topic(network)).unwrap();
        let store = kad::store::MemoryStore::new(me);
        let kad_config = kad::Config::new(protocol(network, "kad/1"));
        let sync = [(protocol(network, "sync/2"), ProtocolSupport::Full)];
        let inside = Inside {
            kad: kad::Behaviour::with_config(me, store, kad_config),
            gossipsub,
            sync: request_response::cbor::Behaviour::new(sync, Default::default()),
        };
        Speaker { stream: libp2p_stream::Behaviour::new(), inside: Gated::new(gates, inside) }
    };
    SwarmBuilder::with_existing_identity(identity)
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(behaviour)
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(PATIENCE))
        .build()
}

/// A member that is no node of ours: it has shown its credential and may speak.
struct Member {
    swarm: Swarm<Speaker>,
    peer: PeerId,
    author: Author,
    /// Whether the node said that it listens to gossip.
    subscribed: bool,
}

impl Member {
    async fn admitted(network: &Network, address: Multiaddr) -> Self {
        Self::connect(network, address).await.expect("the node has room")
    }

    /// `None` when the node has no room.
    async fn connect(network: &Network, address: Multiaddr) -> Option<Self> {
        let gates = Gates::default();
        let identity = libp2p::identity::Keypair::generate_ed25519();
        let secret = identity.clone().try_into_ed25519().unwrap().secret();
        let secret: [u8; 32] = secret.as_ref().try_into().unwrap();
        let mut swarm = speaker(network, gates.clone(), identity);
        let key = parse_peer_id(&swarm.local_peer_id().to_string()).unwrap();
        let credential = network.admit(&key, Clock::default().now()).unwrap().state.credential;
        let hello = [&[0], &wire::encode(&credential)[..]].concat();
        let Some(Protocol::P2p(peer)) = address.iter().last() else {
            panic!("{address} has no peer id")
        };
        swarm.behaviour_mut().inside.kad.add_address(&peer, address.clone());
        swarm.dial(address).unwrap();
        let author = Author { key: SigningKey::from_bytes(&secret), credential };
        let mut member = Self { swarm, peer, author, subscribed: false };
        let connection = loop {
            match member.next().await {
                SwarmEvent::ConnectionEstablished { connection_id, .. } => break connection_id,
                SwarmEvent::OutgoingConnectionError { .. } => return None,
                _ => {}
            }
        };
        let mut control = member.swarm.behaviour().stream.new_control();
        let admission = protocol(network, "admission/1");
        let showing = async {
            let mut stream = control.open_stream(peer, admission).await.ok()?;
            stream.write_all(&[0, hello.len() as u8]).await.ok()?;
            stream.write_all(&hello).await.ok()?;
            stream.flush().await.ok()?;
            let mut answer = [0; 3];
            stream.read_exact(&mut answer).await.ok()?;
            assert_eq!(answer[2], 1, "welcome");
            // The node speaks as soon as it has read the verdict.
            gates.of(connection).open_inbound();
            stream.write_all(&[0, 1, 3]).await.ok()?;
            stream.close().await.ok()
        };
        let shown = tokio::time::timeout(Duration::from_secs(20), member.drive(showing)).await;
        shown.ok().flatten()?;
        gates.of(connection).open_outbound();
        Some(member)
    }

    /// Waits until gossip is spoken.
    async fn subscribed(&mut self) {
        let begun = Instant::now();
        while !self.subscribed {
            assert!(begun.elapsed() < PATIENCE, "gossip is not spoken");
            let a_while = tokio::time::sleep(Duration::from_millis(50));
            self.drive(a_while).await;
        }
    }

    async fn next(&mut self) -> SwarmEvent<SpeakerEvent> {
        let event = self.swarm.select_next_some().await;
        self.subscribed |= matches!(
            event,
            SwarmEvent::Behaviour(SpeakerEvent::Inside(InsideEvent::Gossipsub(
                gossipsub::Event::Subscribed { .. },
            )))
        );
        event
    }

    /// Whether the next thing that happens is the end of the connection.
    async fn is_closed(&mut self) -> bool {
        matches!(self.next().await, SwarmEvent::ConnectionClosed { .. })
    }

    /// Does something while the swarm runs.
    async fn drive<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = self.next() => {}
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_sends_what_no_node_would_disturbs_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let (node, network) = found(&dir("node"), config(vec![])).await;
    let settings = config(listening(&node).await);
    let provider = member(&network, Duration::ZERO, &dir("provider"), settings.clone()).await;
    let asker = member(&network, Duration::ZERO, &dir("asker"), settings).await;
    provider.handle().publish(service(NAME), echo_server().await).await.unwrap();
    let address: Multiaddr = listening(&node).await[0].parse().unwrap();
    let mut hostile = Member::admitted(&network, address).await;
    eventually("it counts as a peer", async || peers(&node).await.len() == 3).await;
    hostile.subscribed().await;

    let topic = topic(&network);
    let key = provider.handle().key();
    let record_key = [b"/meshwise/service/", NAME.as_bytes(), b"/", &key.0].concat();
    let providers_key = [b"/meshwise/providers/", NAME.as_bytes()].concat();
    let garbage = |length: usize, number: u8| vec![number; length];
    for number in 0..20 {
        let behaviour = hostile.swarm.behaviour_mut();
        for length in [10, GOSSIP_BYTES_MAX + 1, 60_000] {
            let _ = behaviour.inside.gossipsub.publish(topic.clone(), garbage(length, number));
        }
        for (key, length) in [(&record_key, 200), (&record_key, 60_000), (&providers_key, 10)] {
            let record = kad::Record::new(key.clone(), garbage(length, number));
            let _ = behaviour.inside.kad.put_record(record, kad::Quorum::One);
        }
        let _ = behaviour.inside.kad.start_providing(kad::RecordKey::from(providers_key.clone()));
        behaviour.inside.sync.send_request(&hostile.peer, garbage(200, number));
        // A request to join of a megabyte, and an answer that nobody waits for.
        let mut control = behaviour.stream.new_control();
        let (peer, join) = (hostile.peer, protocol(&network, "join/1"));
        let asking = async {
            if let Ok(mut stream) = control.open_stream(peer, join).await {
                let _ = stream.write_all(&vec![number; 1 << 20]).await;
                let _ = stream.close().await;
            }
        };
        let asking = tokio::time::timeout(Duration::from_millis(100), asking);
        let _ = hostile.drive(asking).await;
    }
    // The member goes on meanwhile.
    let stop = CancellationToken::new();
    let goes_on = {
        let stop = stop.clone();
        tokio::spawn(async move {
            let forever = hostile.drive(std::future::pending::<()>());
            tokio::select! { () = stop.cancelled() => {} () = forever => {} }
        })
    };
    eventually("garbage is counted", async || dropped(&node).await > 0).await;
    for from_dht in [false, true] {
        eventually("the service is found, and nobody else under its name", async || {
            resolves(&asker, from_dht).await && resolves(&node, from_dht).await
        })
        .await;
    }
    provider.handle().publish(service("new.local"), echo_server().await).await.unwrap();
    for name in [NAME, "new.local"] {
        let any = "127.0.0.1:0".parse().unwrap();
        eventually("the record has arrived", async || {
            asker.handle().resolve(name.parse().unwrap(), false).await.is_ok()
        })
        .await;
        let name = name.parse().unwrap();
        let opened = asker.handle().open_tunnel(name, any, Default::default()).await;
        assert_eq!(exchange(opened.unwrap().1, b"hello").await.unwrap(), b"hello");
    }
    stop.cancel();
    goes_on.await.unwrap();
    for node in [asker, provider, node] {
        node.stop().await;
    }
}

/// A tunnel to the service carries something there and back.
async fn reaches_the_service(node: &Node) {
    let any = "127.0.0.1:0".parse().unwrap();
    let opened = node.handle().open_tunnel(NAME.parse().unwrap(), any, Default::default()).await;
    assert_eq!(exchange(opened.unwrap().1, b"hello").await.unwrap(), b"hello");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_valid_gossip_keeps_nobody_from_look_ups_and_streams() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let (node, network) = found(&dir("node"), config(vec![])).await;
    let settings = config(listening(&node).await);
    let provider = member(&network, Duration::ZERO, &dir("provider"), settings.clone()).await;
    let asker = member(&network, Duration::ZERO, &dir("asker"), settings).await;
    provider.handle().publish(service(NAME), echo_server().await).await.unwrap();
    let address: Multiaddr = listening(&node).await[0].parse().unwrap();
    let mut hostile = Member::admitted(&network, address).await;
    hostile.subscribed().await;

    // 2,000 a second, each newer than the one before, for as long as the test lasts.
    let (stop, topic) = (CancellationToken::new(), topic(&network));
    let author = hostile.author.clone();
    let flooding = async move {
        let mut sequence = Clock::default().now().as_micros();
        loop {
            for _ in 0..100 {
                sequence += 1;
                let links = Default::default();
                let said = Signed::seal(&author, &LinkStateAdvertisement { sequence, links });
                let bytes = wire::encode(&GossipMessage::LinkState(said));
                let _ =
                    hostile.swarm.behaviour_mut().inside.gossipsub.publish(topic.clone(), bytes);
            }
            hostile.drive(tokio::time::sleep(Duration::from_millis(50))).await;
        }
    };
    let flood = {
        let stop = stop.clone();
        tokio::spawn(async move {
            tokio::select! { () = stop.cancelled() => {} () = flooding => {} }
        })
    };
    eventually("the flood is noticed", async || {
        let word = "link-state-too-often";
        let count = move |view: &mut meshwise::node::View<'_>| view.dropped.get(word).copied();
        node.handle().inspect(count).await.unwrap().unwrap_or_default() > 100
    })
    .await;
    for from_dht in [false, true] {
        eventually("the service is found", async || resolves(&asker, from_dht).await).await;
    }
    reaches_the_service(&asker).await;
    provider.handle().publish(service("new.local"), echo_server().await).await.unwrap();
    eventually("what is new arrives", async || {
        asker.handle().resolve("new.local".parse().unwrap(), false).await.is_ok()
    })
    .await;
    stop.cancel();
    flood.await.unwrap();
    for node in [asker, provider, node] {
        node.stop().await;
    }
}

/// A datagram as a lane carries it.
fn frame(datagram: &[u8]) -> Vec<u8> {
    [&(datagram.len() as u16).to_be_bytes(), datagram].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_neighbour_that_floods_its_lanes_hurts_nobody_elses_tunnel() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let (node, network) = found(&dir("node"), config(vec![])).await;
    let settings = config(listening(&node).await);
    let asker = member(&network, Duration::ZERO, &dir("asker"), settings).await;
    node.handle().publish(service(NAME), echo_server().await).await.unwrap();
    eventually("the service is known", async || resolves(&asker, false).await).await;
    let any = "127.0.0.1:0".parse().unwrap();
    let opened = asker.handle().open_tunnel(NAME.parse().unwrap(), any, Default::default()).await;
    let (tunnel, address) = opened.unwrap();
    assert_eq!(exchange(address, b"hello").await.unwrap(), b"hello");

    let at: Multiaddr = listening(&node).await[0].parse().unwrap();
    let mut hostile = Member::admitted(&network, at).await;
    let me = parse_peer_id(&hostile.swarm.local_peer_id().to_string()).unwrap().node_id();
    let [them, friend] = [&node, &asker].map(|node| node.handle().key().node_id());
    let to = |kind, nodes: &[NodeId], position, tunnel, payload: &[u8]| {
        let route = Route::new(nodes.to_vec()).unwrap();
        let header = Header::new(kind, TunnelId(tunnel), 1, 7, route);
        Header { position, tag: 9, ..header }.encode(payload)
    };
    let (data, direct) = (DatagramKind::Data, [me, them]);
    let mut looping = to(data, &[me, friend, them], 2, 1, b"x");
    looping.copy_within(27..35, 35);
    let bad = [
        to(data, &direct, 1, 1, b"cut off")[..30].to_vec(),
        looping,
        to(data, &[me, friend], 1, 1, b"for another"),
        to(data, &[friend, them], 1, tunnel.0, b"as if it came from the friend"),
        to(data, &[me, them, NodeId([7; 8])], 1, 1, b"to nobody"),
        to(data, &[friend, me, them], 2, tunnel.0, b"into the friend's tunnel"),
        to(DatagramKind::Beat, &[friend, me, them], 2, tunnel.0, b"the same"),
        to(DatagramKind::Receipt, &direct, 1, 1, b"nobody asked"),
        to(DatagramKind::Probe, &direct, 1, 0, b""),
        to(data, &direct, 1, 1, &[0xc0; 1_200]),
    ];
    // More of these at once than what proves nothing has places.
    let small = frame(&to(data, &direct, 1, 1, b"?")).repeat(2 * UNPROVED_INBOUND_MAX);
    let others = bad.iter().flat_map(|datagram| frame(datagram)).collect::<Vec<u8>>().repeat(20);
    let long = frame(&to(data, &direct, 1, 1, &vec![0; PAYLOAD_BYTES_MAX + 1]));
    let batch = [small, others, long].concat();
    let stop = CancellationToken::new();
    let flooding = {
        let (mut control, stop) = (hostile.swarm.behaviour().stream.new_control(), stop.clone());
        let (peer, lane) = (hostile.peer, protocol(&network, "link/4"));
        tokio::spawn(async move {
            let flood = async {
                let mut stream = control.open_stream(peer, lane).await.unwrap();
                stream.read_exact(&mut [0]).await.unwrap();
                let begun = Instant::now();
                let mut datagrams = 0;
                while !stop.is_cancelled() {
                    stream.write_all(&batch).await.unwrap();
                    datagrams += 2 * UNPROVED_INBOUND_MAX + 20 * bad.len() + 1;
                }
                println!(
                    "{:.0} bad datagrams a second",
                    datagrams as f64 / begun.elapsed().as_secs_f64()
                );
                // A frame that no lane carries ends it.
                stream.write_all(&[0xff; 100]).await.unwrap();
                stream.flush().await.unwrap();
                while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {}
            };
            hostile.drive(flood).await;
        })
    };
    let reasons = [
        "malformed",
        "misaddressed",
        "wrong-neighbour",
        "no-link",
        "forged",
        "not-for-this-node",
        "probe-rate",
        "unproved-queue-full",
    ];
    for why in reasons {
        eventually(why, async || counted(&node, why).await > 0).await;
    }
    let bytes: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_be_bytes).take(1_000_000).collect();
    for _ in 0..3 {
        let begun = Instant::now();
        assert!(exchange(address, &bytes).await.unwrap() == bytes, "other bytes");
        println!("a megabyte there and back in {:?}", begun.elapsed());
        assert!(begun.elapsed() < PATIENCE);
    }
    for quiet in ["inbound-queue-full", "event-queue-full", "replayed"] {
        assert_eq!(counted(&node, quiet).await, 0, "{quiet}");
    }
    for why in ["route-silent", "route-starves"] {
        assert_eq!(counted(&asker, why).await, 0, "{why}");
    }
    stop.cancel();
    flooding.await.unwrap();
    assert_eq!(counted(&node, "oversized-frame").await, 1);
    for node in [asker, node] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_members_of_one_address_leave_room_for_others() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let (node, network) = found(&dir("node"), config(vec![])).await;
    let settings = config(listening(&node).await);
    let old = member(&network, Duration::ZERO, &dir("old"), settings.clone()).await;
    old.handle().publish(service(NAME), echo_server().await).await.unwrap();
    let stop = CancellationToken::new();
    let address: Multiaddr = listening(&node).await[0].parse().unwrap();
    let at = from_elsewhere(socket_address(&address), stop.clone()).await;
    let Some(peer @ Protocol::P2p(_)) = address.iter().last() else { panic!("{address}") };
    let at: Multiaddr = format!("/ip4/{}/tcp/{}", at.ip(), at.port()).parse().unwrap();
    let at = at.with(peer);
    for _ in 0..ACCOMPLICES {
        let (network, at) = (network.clone(), at.clone());
        let lives = async move {
            loop {
                if let Some(mut member) = Member::connect(&network, at.clone()).await {
                    while !member.is_closed().await {}
                }
                tokio::time::sleep(AGAIN).await;
            }
        };
        let stop = stop.clone();
        tokio::spawn(async move {
            tokio::select! { () = stop.cancelled() => {} () = lives => {} }
        });
    }
    eventually("the address has as many as it may", async || {
        counted(&node, "too-many-members-of-an-address").await > 0
    })
    .await;
    let new = member(&network, Duration::ZERO, &dir("new"), settings).await;
    eventually("a new member is connected and finds the service", async || {
        resolves(&new, false).await && resolves(&new, true).await
    })
    .await;
    reaches_the_service(&new).await;
    let connected = peers(&node).await;
    assert!(connected.len() < ACCOMPLICES, "{} are connected", connected.len());
    assert!(connected.contains(&old.handle().key().node_id()));
    stop.cancel();
    for node in [new, old, node] {
        node.stop().await;
    }
}

/// What a node's engine dropped of gossip.
async fn dropped(node: &Node) -> u64 {
    let count = |view: &mut meshwise::node::View<'_>| view.dropped.get("gossip").copied();
    node.handle().inspect(count).await.unwrap().unwrap_or_default()
}

/// Sends a request to the control API, and returns the status of the answer.
async fn post(data_dir: &Path, path: &str, body: &[u8]) -> u16 {
    let mut stream = UnixStream::connect(data_dir.join("api.sock")).await.unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(&[head.as_bytes(), body].concat()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8_lossy(&answer);
    answer.split(' ').nth(1).unwrap_or_default().parse().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_api_refuses_what_is_too_long_or_too_deep() {
    let folder = tempfile::tempdir().unwrap();
    let (node, _) = found(folder.path(), config(vec![])).await;
    let server = Server::start(node.handle().clone()).unwrap();
    let deep = [("[", 60_000), ("{\"name\":", 7_000), ("[{\"a\":", 10_000)];
    for path in ["/v1/services", "/v1/tunnels", "/v1/network/invitations", "/v1/emulation"] {
        for (part, times) in deep {
            let status = post(folder.path(), path, part.repeat(times).as_bytes()).await;
            assert!((400..500).contains(&status), "{path}: {status}");
        }
        let long = post(folder.path(), path, &vec![b' '; 1 << 20]).await;
        assert_eq!(long, 413, "{path}");
    }
    let target = echo_server().await;
    let body = format!(r#"{{"name":"{NAME}","to":"tcp://{target}","ttl_s":60}}"#);
    assert_eq!(post(folder.path(), "/v1/services", body.as_bytes()).await, 200);
    assert!(resolves(&node, false).await);
    drop(server);
    node.stop().await;
}
