//! Members that lie, strangers that forge, floods and wrong clocks, against the real engine in
//! simulated worlds: what the honest nodes still achieve. What needs sockets is in `sockets`.

use std::collections::BTreeMap;
use std::time::Duration;

use ed25519_dalek::SigningKey;
use meshwise::engine::Intervals;
use meshwise::engine::event::{Answer, CLOCK, Command, Input, ServiceSpec};
use meshwise::engine::measure::{HealthPolicy, LinkQuality};
use meshwise::engine::overlay::gossip;
use meshwise::engine::overlay::membership::{NameGrant, Revocation};
use meshwise::engine::overlay::registry::CLOCK_SKEW;
use meshwise::engine::overlay::wire::{self, GOSSIP_BYTES_MAX, SYNC_BYTES_MAX, SYNC_PEERS_MAX};
use meshwise::engine::overlay::{
    Author, Credential, GossipMessage, LinkStateAdvertisement, Objective, PeerAddresses,
    ServiceKind, ServiceRecord, Signed, SyncRequest, SyncResponse,
};
use meshwise::engine::route::PathPolicy;
use meshwise::engine::route::graph::LIFETIME;
use meshwise::engine::types::{NodeId, PublicKey, ServiceName, Timestamp, TunnelId};
use meshwise::sim::{LinkModel, Traffic, World};

#[cfg(feature = "node")]
mod sockets;

const START: Timestamp = Timestamp(1_760_000_000_000_000);
const TUNNEL: TunnelId = TunnelId(1);
const NAME: &str = "files.local";
const HOUR_US: i64 = 3_600_000_000;
/// 20 datagrams a second.
const PINGS: Traffic = Traffic { every: Duration::from_millis(50), bytes: 100 };
/// In every mesh here: who provides, who asks, and who is not honest.
const PROVIDER: usize = 1;
const ASKER: usize = 2;
const MALLORY: usize = 5;
/// Who holds the root key.
const ISSUER: usize = 0;
const HONEST: std::ops::Range<usize> = 0..MALLORY;

const fn seconds(s: u64) -> Duration {
    Duration::from_secs(s)
}

fn add(world: &mut World, bootstrap: &[usize]) -> usize {
    world.add_node(bootstrap, PathPolicy::default(), Intervals::default())
}

/// Five honest nodes and Mallory, all linked with each other; the provider has published.
fn mesh(seed: u64) -> World {
    let mut world = World::new(seed, START);
    for node in 0..=MALLORY {
        let before: Vec<usize> = (0..node).collect();
        add(&mut world, &before);
        before.iter().for_each(|other| world.set_link(node, *other, LinkModel::delay(10.0)));
    }
    world.run_for(seconds(10));
    publish(&mut world, PROVIDER, 1, NAME);
    world.run_for(seconds(1));
    world
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn spec(text: &str) -> ServiceSpec {
    ServiceSpec {
        delegation: None,
        name: name(text),
        kind: ServiceKind::Tcp,
        metadata: BTreeMap::new(),
        allowed: vec![],
        ttl_s: 600,
        objective: Objective::Balanced,
        health: HealthPolicy::of_kind(ServiceKind::Tcp),
    }
}

fn publish(world: &mut World, node: usize, request: u64, text: &str) {
    world.command(node, Command::Publish { request, service: spec(text) });
}

/// Who provides a name, as a node knows it.
fn providers(world: &World, node: usize, text: &str) -> Vec<NodeId> {
    let name = name(text);
    let registry = world.engine(node).services().registry();
    registry.resolve(&name, world.now()).map(|(key, _)| key.node_id()).collect()
}

/// Every honest node finds the provider and nobody else, without the DHT and with it.
fn all_find_the_provider(world: &mut World, request: u64) {
    let provider = world.id(PROVIDER);
    for node in HONEST {
        assert_eq!(providers(world, node, NAME), [provider], "node {node}");
        world.command(node, Command::Resolve { request, name: name(NAME), from_dht: true });
    }
    world.run_for(seconds(1));
    for node in HONEST {
        let Some(Ok(Answer::Resolved { providers, .. })) = world.answer(node, request) else {
            panic!("node {node}: {:?}", world.answer(node, request))
        };
        let found: Vec<NodeId> = providers.iter().map(|(key, _)| key.node_id()).collect();
        assert_eq!(found, [provider], "node {node}");
    }
}

/// The provider's record as the others have it.
fn record(world: &World) -> (Signed, ServiceRecord) {
    let registry = world.engine(ASKER).services().registry();
    let signed = registry.signed().next().unwrap().clone();
    let record = signed.open().unwrap();
    (signed, record)
}

/// How often a node dropped something with these words as the reason.
fn dropped(world: &World, node: usize, words: &str) -> u64 {
    let all = world.dropped(node).iter();
    all.filter(|((_, why), _)| why.contains(words)).map(|(_, times)| times).sum()
}

/// A member of another network, which it founded itself.
fn stranger(byte: u8) -> Author {
    let (key, root) = (SigningKey::from_bytes(&[byte; 32]), SigningKey::from_bytes(&[254; 32]));
    let public = PublicKey(key.verifying_key().to_bytes());
    let credential = Credential::issue(&root, &public, Timestamp(0), Timestamp(u64::MAX));
    Author { key, credential }
}

fn service(signed: Signed) -> GossipMessage {
    GossipMessage::Service(signed)
}

#[test]
fn forged_records_and_departures_change_nothing() {
    let mut world = mesh(1);
    let (mallory, other) = (world.author(MALLORY), stranger(77));
    let (theirs, known) = record(&world);
    let later = ServiceRecord { sequence: known.sequence + 1, ..known.clone() };
    let gone = ServiceRecord { withdrawn: true, ..later.clone() };
    let mine = ServiceRecord { owner: mallory.public(), ..later.clone() };
    let mine_gone = ServiceRecord { owner: mallory.public(), ..gone.clone() };
    let borrowed = Author { credential: theirs.credential.clone(), ..mallory.clone() };
    let own = |author: &Author| ServiceRecord { owner: author.public(), ..later.clone() };
    let revoked = Revocation { key: theirs.key, at: world.now() };
    let grant = NameGrant { name: name(NAME), owner: mallory.public(), at: world.now() };
    let as_theirs = |signed: Signed| Signed { key: theirs.key, ..signed };
    let forged = [
        // Other content under the provider's signature: a departure among it.
        service(Signed { body: wire::encode(&later), ..theirs.clone() }),
        service(Signed { body: wire::encode(&gone), ..theirs.clone() }),
        // Signed by Mallory, in the provider's name.
        service(as_theirs(Signed::seal(&mallory, &later))),
        service(as_theirs(Signed::seal(&mallory, &gone))),
        // Mallory says of another's name that it is the provider's, or its own, or gone.
        service(Signed::seal(&mallory, &later)),
        service(Signed::seal(&mallory, &gone)),
        service(Signed::seal(&mallory, &mine)),
        service(Signed::seal(&mallory, &mine_gone)),
        // Whoever is no member, with a credential of its own network and with somebody else's.
        service(Signed::seal(&other, &own(&other))),
        service(Signed::seal(&Author { key: other.key.clone(), ..borrowed }, &own(&other))),
        // What only the root may say.
        GossipMessage::Revocation(Signed::seal(&mallory, &revoked)),
        GossipMessage::Grant(Signed::seal(&mallory, &grant)),
    ];
    for (request, message) in (10..).zip(forged) {
        let before: Vec<u64> = HONEST.map(|node| world.dropped(node).values().sum()).collect();
        world.gossip(MALLORY, wire::encode(&message));
        world.run_for(seconds(1));
        all_find_the_provider(&mut world, request);
        for (node, before) in HONEST.zip(before) {
            let after: u64 = world.dropped(node).values().sum();
            assert_eq!(after, before + 1, "node {node} says why it dropped {message:?}");
        }
    }
    let known_nodes = world.engine(ASKER).graph().origins().count();
    assert_eq!(known_nodes, MALLORY + 1, "and nobody was put out");
}

#[test]
fn replayed_records_bring_nothing_back() {
    let mut world = mesh(2);
    let (first, _) = record(&world);
    publish(&mut world, PROVIDER, 2, NAME);
    world.run_for(seconds(1));
    let (second, newest) = record(&world);
    let replay = |world: &mut World, signed: &Signed| {
        world.gossip(MALLORY, wire::encode(&service(signed.clone())));
        world.run_for(seconds(1));
    };
    replay(&mut world, &first);
    assert_eq!(record(&world).1, newest, "an older record replaces no newer one");
    world.command(PROVIDER, Command::Withdraw { request: 3, name: name(NAME) });
    world.run_for(seconds(1));
    for after in [0, 60, 500, 1_000] {
        world.run_for(seconds(after));
        for signed in [&first, &second] {
            replay(&mut world, signed);
            for node in HONEST {
                assert!(providers(&world, node, NAME).is_empty(), "node {node} after {after} s");
            }
        }
    }
    // A node that starts after the departure is told by its peers, and by Mallory.
    let late = add(&mut world, &[0, MALLORY]);
    world.run_for(seconds(10));
    replay(&mut world, &second);
    assert!(providers(&world, late, NAME).is_empty());
    publish(&mut world, PROVIDER, 4, NAME);
    world.run_for(seconds(1));
    all_find_the_provider(&mut world, 5);
}

#[test]
fn nothing_that_a_revoked_member_said_is_believed_again() {
    let mut world = mesh(3);
    publish(&mut world, MALLORY, 1, "bait.local");
    world.run_for(seconds(1));
    let (author, key) = (world.author(MALLORY), world.author(MALLORY).public());
    assert_eq!(providers(&world, ASKER, "bait.local"), [key.node_id()]);
    world.command(0, Command::Revoke { request: 1, key });
    world.run_for(seconds(1));
    world.kill(MALLORY);
    // An accomplice passes on what the revoked node signs.
    let accomplice = HONEST.end - 1;
    let bait = ServiceRecord {
        delegation: None,
        name: name("bait.local"),
        kind: ServiceKind::Tcp,
        owner: key,
        metadata: BTreeMap::new(),
        sequence: world.now().as_micros(),
        issued_at: world.now(),
        ttl_s: 600,
        objective: Objective::Balanced,
        allowed: vec![],
        withdrawn: false,
    };
    world.gossip(accomplice, wire::encode(&service(Signed::seal(&author, &bait))));
    let links = [ASKER, 0].map(|node| (world.id(node), 1.0));
    lie(&mut world, accomplice, &author, &links);
    world.run_for(seconds(5));
    for node in HONEST.filter(|node| *node != accomplice) {
        assert!(providers(&world, node, "bait.local").is_empty(), "node {node}");
        assert!(!world.engine(node).graph().is_origin(key.node_id()), "node {node}");
        assert!(dropped(&world, node, "has revoked this key") >= 2, "node {node}");
    }
    all_find_the_provider(&mut world, 6);
}

/// Somebody says that its links, to these nodes, are so quick (ms) and lose nothing; `through` is who
/// tells the others.
fn lie(world: &mut World, through: usize, author: &Author, links: &[(NodeId, f64)]) {
    let quality = |rtt_ms| LinkQuality {
        rtt_ms,
        jitter_ms: 0.0,
        loss: 0.0,
        bandwidth: Some(1e9),
        utilisation: 0.0,
    };
    let links = links.iter().map(|(node, rtt_ms)| (*node, quality(*rtt_ms))).collect();
    // Ahead of what its engine says, and no further than clocks may differ.
    let sequence = (world.now() + seconds(60)).as_micros();
    let said = Signed::seal(author, &LinkStateAdvertisement { sequence, links });
    world.gossip(through, wire::encode(&GossipMessage::LinkState(said)));
}

/// A world of these links, by one-way delay (ms), where each node joins through those before it, and
/// node 0 has a tunnel to the last honest one.
fn world_of(seed: u64, nodes: usize, links: &[(usize, usize, f64)]) -> World {
    let mut world = World::new(seed, START);
    for node in 0..nodes {
        let before: Vec<usize> = (0..node).collect();
        add(&mut world, &before);
    }
    for (a, b, delay_ms) in links {
        world.set_link(*a, *b, LinkModel { jitter_ms: 0.5, ..LinkModel::delay(*delay_ms) });
    }
    world.run_for(seconds(10));
    world
}

fn open(world: &mut World, to: usize) {
    let destination = world.id(to);
    let (forced, beside, reserve) = (None, None, None);
    let (tunnel, objective) = (TUNNEL, Objective::Balanced);
    let open = Command::OpenTunnel { tunnel, destination, forced, objective, beside, reserve };
    world.command(0, open);
    world.run_for(Duration::from_millis(100));
    world.send(0, TUNNEL, PINGS);
}

/// The share of so many seconds in which the tunnel of node 0 went through a node that lies
/// once a second.
fn share(
    world: &mut World,
    through: usize,
    duration_s: u64,
    mut lies: impl FnMut(&mut World),
) -> f64 {
    let mut used = 0;
    for _ in 0..duration_s {
        lies(world);
        world.run_for(seconds(1));
        let (_, destination) = world.engine(0).tunnels().next().unwrap();
        let route = &destination.current.as_ref().unwrap().0;
        used += usize::from(route.relays().contains(&world.id(through)));
    }
    used as f64 / duration_s as f64
}

#[test]
fn a_link_that_only_one_end_says_carries_nothing() {
    // 0 - 1 - 2 honestly in 60 ms; the liar, 3, is near node 0 and says it is near node 2 too.
    let links = [(0, 1, 15.0), (1, 2, 15.0), (0, 3, 5.0)];
    let mut world = world_of(10, 4, &links);
    let (liar, far, near) = (world.author(3), world.id(2), world.id(0));
    let nobody = NodeId([9; 8]);
    let lies = |world: &mut World| {
        lie(world, 3, &liar, &[(near, 1.0), (far, 1.0), (nobody, 1.0)]);
    };
    (0..3).for_each(|_| {
        lies(&mut world);
        world.run_for(seconds(1));
    });
    let said = world.engine(0).graph().quality(liar.public().node_id(), far);
    assert_eq!(said.map(|said| said.rtt_ms), Some(1.0), "the lie has arrived");
    assert!(!world.engine(0).graph().is_link(liar.public().node_id(), far));
    open(&mut world, 2);
    assert_eq!(share(&mut world, 3, 120, lies), 0.0);
    let travelled = world.travelled(0, TUNNEL);
    assert!(travelled.arrived + 5 >= travelled.sent, "{travelled:?}");
    let liar = world.id(3);
    let mut candidates = world.decisions(0).iter().flat_map(|decision| &decision.candidates);
    assert!(candidates.all(|candidate| !candidate.route.relays().contains(&liar)));
}

#[test]
fn two_that_invent_a_link_between_them_lose_their_traffic_within_a_minute() {
    // The liars, 3 and 4, are near one end each, and have no link with each other.
    let links = [(0, 1, 15.0), (1, 2, 15.0), (0, 3, 5.0), (4, 2, 5.0)];
    let mut world = world_of(11, 5, &links);
    let (one, other) = (world.author(3), world.author(4));
    let [near, far, a, b] = [0, 2, 3, 4].map(|node| world.id(node));
    let lies = |world: &mut World| {
        lie(world, 3, &one, &[(near, 10.0), (b, 1.0)]);
        lie(world, 4, &other, &[(far, 10.0), (a, 1.0)]);
    };
    (0..3).for_each(|_| {
        lies(&mut world);
        world.run_for(seconds(1));
    });
    assert!(world.engine(0).graph().is_link(a, b), "both ends say so");
    open(&mut world, 2);
    let first = share(&mut world, 3, 60, lies);
    let before = world.travelled(0, TUNNEL);
    let later = share(&mut world, 3, 300, lies);
    let after = world.travelled(0, TUNNEL);
    println!("{first} of the first minute, {later} of five more; {before:?}, {after:?}");
    assert!(later < 0.02, "{later}");
    let lost = (after.sent - before.sent).saturating_sub(after.arrived - before.arrived);
    assert!(lost * 50 < after.sent - before.sent, "{before:?} {after:?}");
}

#[test]
fn who_says_1_ms_where_it_is_80_loses_its_traffic_within_a_minute() {
    // Over the honest 1: 60 ms. Over the liar, 3: 100 ms, of which it says 21.
    let links = [(0, 1, 15.0), (1, 2, 15.0), (0, 3, 10.0), (3, 2, 40.0)];
    let mut world = world_of(12, 4, &links);
    let liar = world.author(3);
    let (near, far) = (world.id(0), world.id(2));
    let lies = |world: &mut World| lie(world, 3, &liar, &[(near, 20.0), (far, 1.0)]);
    (0..3).for_each(|_| {
        lies(&mut world);
        world.run_for(seconds(1));
    });
    open(&mut world, 2);
    let first = share(&mut world, 3, 60, lies);
    let later = share(&mut world, 3, 300, lies);
    println!("{first} of the first minute, {later} of five more");
    assert!(later < 0.02, "{later}");
    let [liar, honest] = [3, 1].map(|node| world.id(node));
    assert!(world.engine(0).credibility(liar) < world.engine(0).credibility(honest));
}

/// Members that one member let in by an invitation of many uses, none of them honest.
fn sybils(world: &mut World, count: u8) -> Vec<Author> {
    let keys = (0..count).map(|byte| SigningKey::from_bytes(&[100 + byte % 100; 32]));
    let mut authors = Vec::new();
    for (key, request) in keys.zip(9_000..) {
        let public = PublicKey(key.verifying_key().to_bytes());
        world.command(ISSUER, Command::Certify { request, key: public });
        world.run_for(Duration::from_millis(1));
        let Some(Ok(Answer::Certified(credential))) = world.answer(ISSUER, request) else {
            panic!("the issuer lets {request} in: {:?}", world.answer(ISSUER, request))
        };
        authors.push(Author { key, credential: credential.clone() });
    }
    authors
}

#[test]
fn a_hundred_members_of_one_invitation_take_no_route_no_name_and_nobodys_place() {
    let mut world = mesh(23);
    let sybils = sybils(&mut world, 100);
    let nodes: Vec<NodeId> = sybils.iter().map(|sybil| sybil.public().node_id()).collect();
    let (_, known) = record(&world);
    open(&mut world, PROVIDER);
    for round in 0..20 {
        for (index, sybil) in sybils.iter().enumerate() {
            // A short link to everybody honest, and to some of the others.
            let honest = HONEST.map(|node| (world.id(node), 0.1));
            let others = (1..20).map(|step| (nodes[(index + step) % nodes.len()], 0.1));
            let claimed: Vec<(NodeId, f64)> = honest.chain(others).collect();
            lie(&mut world, MALLORY, sybil, &claimed);
            // Somebody else's name, and one of its own for each round.
            for text in [NAME.to_owned(), format!("s{index}-{round}.local")] {
                let record = ServiceRecord {
                    delegation: None,
                    name: name(&text),
                    owner: sybil.public(),
                    sequence: world.now().as_micros(),
                    issued_at: world.now(),
                    ..known.clone()
                };
                let message = service(Signed::seal(sybil, &record));
                world.gossip(MALLORY, wire::encode(&message));
            }
        }
        world.run_for(seconds(1));
    }
    for node in HONEST {
        let graph = world.engine(node).graph();
        let reached = graph.reached_from(world.id(node));
        assert!(nodes.iter().all(|sybil| !reached.contains(sybil)), "node {node}");
        let missing = HONEST.filter(|other| !reached.contains(&world.id(*other))).count();
        assert_eq!(missing, 0, "node {node}");
    }
    let travelled = world.travelled(0, TUNNEL);
    assert!(travelled.arrived + 5 >= travelled.sent && travelled.sent > 300, "{travelled:?}");
    all_find_the_provider(&mut world, 60);
    // There is room for who comes later.
    let newcomer = add(&mut world, &[0, 1]);
    HONEST.for_each(|other| world.set_link(newcomer, other, LinkModel::delay(10.0)));
    world.run_for(seconds(10));
    publish(&mut world, newcomer, 1, "new.local");
    world.run_for(seconds(2));
    let id = world.id(newcomer);
    for node in HONEST {
        assert_eq!(providers(&world, node, "new.local"), [id], "node {node}");
    }
    assert_eq!(providers(&world, newcomer, NAME), [world.id(PROVIDER)]);
}

#[test]
fn a_flood_of_gossip_keeps_nobody_from_what_the_others_say() {
    let mut world = mesh(20);
    let author = world.author(MALLORY);
    let neighbours: Vec<(NodeId, f64)> = HONEST.map(|node| (world.id(node), 20.0)).collect();
    open(&mut world, ASKER);
    world.run_for(seconds(5));
    let before = world.travelled(0, TUNNEL);
    // A hundred messages a second: news of its links, records, origins that do not exist, and noise.
    for (turn, byte) in (0..600_u64).zip((0..250).cycle()) {
        lie(&mut world, MALLORY, &author, &neighbours);
        let text = format!("junk-{turn}.local");
        let issued_at = world.now();
        let (_, known) = record(&world);
        let junk = ServiceRecord {
            delegation: None,
            name: name(&text),
            owner: author.public(),
            sequence: issued_at.as_micros(),
            issued_at,
            ..known
        };
        world.gossip(MALLORY, wire::encode(&service(Signed::seal(&author, &junk))));
        lie(&mut world, MALLORY, &stranger(byte), &neighbours);
        world.gossip(MALLORY, vec![byte; 1_000]);
        world.run_for(Duration::from_millis(40));
    }
    publish(&mut world, PROVIDER, 30, "new.local");
    world.run_for(seconds(1));
    assert!(matches!(world.answer(PROVIDER, 30), Some(Ok(Answer::Published { .. }))));
    for node in HONEST {
        assert_eq!(providers(&world, node, "new.local"), [world.id(PROVIDER)], "node {node}");
        assert_eq!(world.engine(node).graph().origins().count(), MALLORY + 1, "node {node}");
    }
    all_find_the_provider(&mut world, 31);
    let after = world.travelled(0, TUNNEL);
    let lost = (after.sent - before.sent).saturating_sub(after.arrived - before.arrived);
    assert!(lost <= 5, "{before:?} {after:?}");
    assert_eq!(world.breaches(), [] as [String; 0]);
    let parted = HONEST.filter(|node| world.is_connected(*node, MALLORY));
    assert_eq!(parted.count(), 0, "nobody has to do with who sends that");
}

#[test]
fn a_member_that_changes_its_links_all_the_time_is_told_of_at_its_rate_and_its_last_word_counts() {
    const FOR_S: u64 = 10;
    let mut world = mesh(23);
    let (author, liar) = (world.author(MALLORY), world.id(MALLORY));
    let neighbour = world.id(ASKER);
    let before: Vec<u64> = HONEST.map(|node| world.passed_on(node)).collect();
    let mut rtt_ms = 20.0;
    // 200 a second, each valid and newer; and as often a new record of the same service.
    for turn in 0..FOR_S * 200 {
        rtt_ms += 0.01;
        lie(&mut world, MALLORY, &author, &[(neighbour, rtt_ms)]);
        let issued_at = world.now();
        let (_, known) = record(&world);
        let owner = author.public();
        let sequence = known.sequence + turn;
        let name = name("flapping.local");
        let record = ServiceRecord { name, owner, sequence, issued_at, ..known };
        world.gossip(MALLORY, wire::encode(&service(Signed::seal(&author, &record))));
        world.run_for(Duration::from_millis(5));
    }
    publish(&mut world, PROVIDER, 30, "new.local");
    world.run_for(seconds(1));
    let seconds_s = (FOR_S + 1) as f64;
    let links_max = gossip::LINK_STATES_BURST + gossip::LINK_STATES_PER_S * seconds_s;
    let records_max = gossip::RECORDS_BURST + gossip::RECORDS_PER_S * seconds_s;
    for (node, before) in HONEST.zip(before) {
        let passed_on = (world.passed_on(node) - before) as f64;
        // What the six nodes say of themselves meanwhile.
        let usual = 60.0;
        assert!(passed_on <= links_max + records_max + usual, "node {node}: {passed_on}");
        assert!(passed_on > links_max, "node {node}: {passed_on}");
        assert_eq!(providers(&world, node, "new.local"), [world.id(PROVIDER)], "node {node}");
        let quality = world.engine(node).graph().quality(liar, neighbour);
        assert_eq!(quality.map(|quality| quality.rtt_ms), Some(rtt_ms), "node {node}");
        assert!(dropped(&world, node, "advertises its links too often") > 1_000, "node {node}");
        assert!(dropped(&world, node, "changes its records too often") > 1_000, "node {node}");
        assert!(world.is_connected(node, MALLORY), "nothing that it said was wrong");
    }
    all_find_the_provider(&mut world, 31);
}

#[test]
fn who_forges_is_disconnected_and_may_come_back_later() {
    let mut world = mesh(24);
    let connected = |world: &World| HONEST.filter(|n| world.is_connected(*n, MALLORY)).count();
    assert_eq!(connected(&world), MALLORY);
    for byte in 0..40 {
        world.gossip(MALLORY, vec![byte; 100]);
        world.run_for(Duration::from_millis(100));
    }
    assert_eq!(connected(&world), 0);
    all_find_the_provider(&mut world, 60);
    world.run_for(gossip::SHUN_FOR / 2);
    assert_eq!(connected(&world), 0, "whoever dials");
    world.run_for(gossip::SHUN_FOR / 2 + seconds(120));
    assert!(connected(&world) > 0);
}

#[test]
fn who_asks_for_everything_all_the_time_is_not_answered() {
    let mut world = mesh(25);
    let from = world.id(MALLORY);
    let ask = |have| wire::encode(&SyncRequest { have });
    let said = |world: &World| {
        world.control().kinds().find(|(kind, _)| *kind == "sync").map(|(_, told)| told).unwrap()
    };
    let everything = said(&world);
    world.ask_sync(MALLORY, ASKER, ask(vec![]));
    let first = said(&world).bytes - everything.bytes;
    // Who has everything is told next to nothing.
    let engine = world.engine(ASKER);
    let (records, links) = (engine.services().signed(), engine.advertised());
    let have = records.chain(links).map(Signed::fingerprint).collect();
    let before = said(&world);
    world.ask_sync(MALLORY, ASKER, ask(have));
    let second = said(&world).bytes - before.bytes;
    assert!(second * 2 < first, "{first} bytes, then {second}");
    for _ in 0..100 {
        world.ask_sync(MALLORY, ASKER, ask(vec![]));
    }
    let answers = said(&world).messages - everything.messages;
    assert!(answers as f64 <= gossip::SYNCS_BURST, "{answers}");
    assert!(dropped(&world, ASKER, &format!("from {from}: it asks too often")) >= 90);
}

#[test]
fn messages_that_are_too_long_or_too_many_are_refused_and_cost_nothing() {
    let mut world = mesh(21);
    world.gossip(MALLORY, vec![0; GOSSIP_BYTES_MAX + 1]);
    world.run_for(seconds(1));
    for node in HONEST {
        assert_eq!(dropped(&world, node, "exceed the limit"), 1, "node {node}");
    }
    let key = world.author(MALLORY).public();
    let peer = |addresses| PeerAddresses { key, addresses };
    let answers = [
        (vec![0; SYNC_BYTES_MAX + 1], "exceed the limit"),
        (
            wire::encode(&SyncResponse {
                peers: vec![peer(vec![]); SYNC_PEERS_MAX + 1],
                messages: vec![],
            }),
            "the peer list is out of range",
        ),
        (
            wire::encode(&SyncResponse {
                peers: vec![peer(vec!["x".repeat(10_000)])],
                messages: vec![],
            }),
            "a peer's addresses is out of range",
        ),
        // A list that claims 2^32 entries.
        (vec![0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0], "malformed"),
    ];
    let from = world.id(MALLORY);
    for (bytes, why) in answers {
        let before = dropped(&world, ASKER, why);
        world.input(ASKER, Input::SyncReceived { from, bytes });
        assert_eq!(dropped(&world, ASKER, why), before + 1, "{why}");
    }
    all_find_the_provider(&mut world, 40);
}

/// Whether a node says that its clock and another one's differ.
fn said_of(world: &World, node: usize, other: NodeId) -> bool {
    let about = other.to_string();
    world.dropped(node).keys().any(|(what, why)| *what == CLOCK && why.contains(&about))
}

#[test]
fn clocks_that_are_wrong_by_hours_harm_only_their_own_node() {
    for ahead in [3 * HOUR_US, -3 * HOUR_US] {
        let mut world = mesh(22);
        world.set_clock(MALLORY, ahead);
        // What it said before is forgotten.
        world.run_for(LIFETIME + seconds(30));
        publish(&mut world, MALLORY, 50, "late.local");
        world.run_for(seconds(5));
        let wrong = world.id(MALLORY);
        for node in HONEST {
            assert!(providers(&world, node, "late.local").is_empty(), "node {node}");
            assert!(!world.engine(node).graph().is_origin(wrong), "node {node}");
            assert!(said_of(&world, node, wrong), "node {node}: {:?}", world.dropped(node));
        }
        let mut all = HONEST.map(|node| world.id(node));
        let says_so = all.all(|node| said_of(&world, MALLORY, node));
        assert!(says_so, "it says so of everybody: {:?}", world.dropped(MALLORY));
        all_find_the_provider(&mut world, 51);
        for node in HONEST {
            assert_eq!(world.engine(node).graph().origins().count(), MALLORY, "node {node}");
        }
        // Its clock is set right.
        world.set_clock(MALLORY, 0);
        world.run_for(seconds(10));
        publish(&mut world, MALLORY, 52, "late.local");
        world.run_for(seconds(5));
        for node in HONEST {
            assert_eq!(providers(&world, node, "late.local"), [wrong], "node {node}");
            assert!(world.engine(node).graph().is_origin(wrong), "node {node}");
        }
    }
}

#[test]
fn a_node_whose_clock_is_set_back_by_minutes_is_heard_again_at_once() {
    let mut world = mesh(23);
    let restarted = world.id(MALLORY);
    world.set_clock(MALLORY, 4 * 60_000_000);
    world.run_for(seconds(30));
    let heard = |world: &World| -> Vec<Option<u64>> {
        HONEST.map(|node| world.engine(node).graph().sequence(restarted)).collect()
    };
    let before = heard(&world);
    assert!(before.iter().all(|said| said.is_some_and(|at| at > world.now().0)), "{before:?}");
    world.set_clock(MALLORY, 0);
    world.run_for(seconds(15));
    let after = heard(&world);
    assert!(before.iter().zip(&after).all(|(before, after)| after > before), "{after:?}");
}

#[test]
fn a_node_whose_clock_is_minutes_behind_is_heard_all_the_time_or_never() {
    for (minutes, is_heard) in [(4, true), (11, true), (14, false), (16, false)] {
        let mut world = mesh(25);
        let late = world.id(MALLORY);
        world.set_clock(MALLORY, -minutes * 60_000_000);
        // What it said before is forgotten.
        world.run_for(LIFETIME + CLOCK_SKEW);
        let looks = (0..60).map(|_| {
            world.run_for(seconds(10));
            HONEST.map(|node| world.engine(node).graph().is_origin(late)).collect()
        });
        let looks: Vec<Vec<bool>> = looks.collect();
        let is_right = |heard: &Vec<bool>| heard.iter().all(|heard| *heard == is_heard);
        assert!(looks.iter().all(is_right), "{minutes} min behind: {looks:?}");
    }
}

#[test]
fn what_had_to_be_dropped_unread_is_asked_for_soon() {
    let mut world = mesh(24);
    world.run_for(seconds(5));
    let asked = |world: &World| {
        let sync = world.control().kinds().find(|(kind, _)| *kind == "sync");
        sync.map_or(0, |(_, told)| told.messages)
    };
    let quiet = asked(&world);
    world.run_for(seconds(11));
    assert_eq!(asked(&world), quiet, "nobody asks within seconds as a rule");
    let known = world.engine(ASKER).services().signed().next().expect("a record").clone();
    let (from, bytes) = (world.id(MALLORY), wire::encode(&GossipMessage::Service(known)));
    for token in 0..gossip::FORWARDED_BURST as u64 + 10 {
        let bytes = bytes.clone();
        world.input(ASKER, Input::Gossip { token: u64::MAX - token, from, bytes });
    }
    world.run_for(seconds(11));
    assert_eq!(asked(&world), quiet + 2, "a question and its answer");
}
