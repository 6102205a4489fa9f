use std::collections::BTreeMap;

use ed25519_dalek::SigningKey;

use super::*;
use crate::engine::EngineConfig;
use crate::engine::measure::Health;
use crate::engine::overlay::gossip::FORWARDED_BURST;
use crate::engine::overlay::heartbeat::{SERVICES_MAX, ServiceState};
use crate::engine::overlay::{
    Author, Credential, Heartbeat, LinkStateAdvertisement, Load, NetworkState, Objective,
    ServiceKind, ServiceRecord,
};
use crate::engine::route::graph::LIFETIME;

const NOW: Timestamp = Timestamp(1_760_000_000_000_000);

/// A member of the network of key 255.
fn author(number: u16) -> Author {
    let mut secret = [1; 32];
    secret[..2].copy_from_slice(&number.to_le_bytes());
    let key = SigningKey::from_bytes(&secret);
    let root = SigningKey::from_bytes(&[255; 32]);
    let public = PublicKey(key.verifying_key().to_bytes());
    let credential = Credential::issue(&root, &public, Timestamp(0), Timestamp(u64::MAX));
    Author { key, credential }
}

/// The engine of member 0.
fn engine(seed: u64) -> Engine {
    let Author { key, credential } = author(0);
    let root = PublicKey(SigningKey::from_bytes(&[255; 32]).verifying_key().to_bytes());
    let network = NetworkState::joined("home", root, root, credential);
    Engine::new(EngineConfig { seed, ..EngineConfig::new(key, network) }, NOW)
}

fn outputs(engine: &mut Engine) -> Vec<Output> {
    std::iter::from_fn(|| engine.poll_output()).collect()
}

/// What it dropped since the last look, and why.
fn dropped(engine: &mut Engine) -> Vec<(&'static str, String)> {
    let dropped = outputs(engine).into_iter().filter_map(|output| match output {
        Output::Notice(Notice::Dropped { what, why }) => Some((what, why)),
        _ => None,
    });
    dropped.collect()
}

/// The messages of a synchronisation answer.
fn told(engine: &mut Engine, now: Timestamp) -> Vec<GossipMessage> {
    let bytes = engine.sync_response(&BTreeSet::new(), now);
    SyncResponse::from_bytes(&bytes).unwrap().messages
}

fn record(author: &Author, name: &str) -> GossipMessage {
    let record = ServiceRecord {
        name: name.parse().unwrap(),
        kind: ServiceKind::Tcp,
        owner: author.public(),
        delegation: None,
        metadata: BTreeMap::new(),
        sequence: NOW.0,
        issued_at: NOW,
        ttl_s: 3_600,
        objective: Objective::Balanced,
        allowed: vec![],
        withdrawn: false,
    };
    GossipMessage::Service(Signed::seal(author, &record))
}

/// One of about 12,000 bytes.
fn long_heartbeat(author: &Author) -> GossipMessage {
    let label = "a".repeat(60);
    let state = |index| ServiceState {
        name: format!("{index:03}.{label}.{label}.{label}.{label}").parse().unwrap(),
        health: Health::Up,
        response_us: None,
    };
    let services = (0..SERVICES_MAX).map(state).collect();
    let heartbeat = Heartbeat { sequence: NOW.0, load: Load::default(), services };
    GossipMessage::Heartbeat(Signed::seal(author, &heartbeat))
}

#[test]
fn newcomers_are_told_all_records_before_any_heartbeat() {
    const RECORDS: usize = 300;
    let mut engine = engine(1);
    for number in 1..=100 {
        let beat = long_heartbeat(&author(number));
        assert_eq!(engine.message(beat, None, NOW), Some(Verdict::Accept));
    }
    for index in 0..RECORDS {
        let record = record(&author(1), &format!("{index}.local"));
        assert_eq!(engine.message(record, None, NOW), Some(Verdict::Accept));
    }
    for _ in 0..4 {
        let told = told(&mut engine, NOW);
        let is_record = |message: &GossipMessage| matches!(message, GossipMessage::Service(_));
        assert!(told.iter().take(RECORDS).all(is_record));
        assert!(told.len() > RECORDS + 50, "heartbeats get the rest: {}", told.len());
        assert!(told.len() < RECORDS + 100, "there is no room for all: {}", told.len());
    }
}

#[test]
fn links_that_nobody_would_take_any_more_are_not_told() {
    let (mut node, mut newcomer) = (engine(1), engine(2));
    let links = LinkStateAdvertisement { sequence: NOW.0, links: BTreeMap::new() };
    let word = GossipMessage::LinkState(Signed::seal(&author(1), &links));
    assert_eq!(node.message(word.clone(), None, NOW), Some(Verdict::Accept));
    let too_old = NOW + LIFETIME;
    let last = Timestamp(too_old.0 - 1);
    assert_eq!((told(&mut node, last).len(), told(&mut node, too_old).len()), (1, 0));
    assert_eq!(newcomer.message(word.clone(), None, too_old), Some(Verdict::Ignore));
    assert_eq!(newcomer.message(word, None, last), Some(Verdict::Accept));
}

#[test]
fn who_sends_too_much_is_not_who_is_asked_what_was_missed() {
    let flooder = author(1).public();
    let others = [author(2).public(), author(3).public()];
    let asked = |engine: &mut Engine| -> Vec<NodeId> {
        engine.handle_timeout(NOW + RESYNC_SOON);
        let asked = outputs(engine).into_iter().filter_map(|output| match output {
            Output::RequestSync { node, .. } => Some(node),
            _ => None,
        });
        asked.collect()
    };
    for (seed, others) in (0..10).flat_map(|seed| [(seed, &others[..]), (seed, &others[..0])]) {
        let mut engine = engine(seed);
        for key in others.iter().chain([&flooder]) {
            engine.peer_connected(*key, NOW);
        }
        for _ in 0..FORWARDED_BURST as u64 {
            engine.gossip.hears(flooder.node_id(), NOW);
        }
        engine.gossip_received(1, flooder.node_id(), &[], NOW);
        outputs(&mut engine);
        let asked = asked(&mut engine);
        let is_right = |node: &NodeId| match others {
            [] => *node == flooder.node_id(),
            others => others.iter().any(|other| other.node_id() == *node),
        };
        assert!(asked.len() == 1 && asked.iter().all(is_right), "seed {seed}: {asked:?}");
    }
}

#[test]
fn what_this_node_said_by_a_clock_that_was_ahead_is_told_as_that() {
    let mut engine = engine(1);
    let sequence = (NOW + Duration::from_secs(7 * 60)).0;
    let links = LinkStateAdvertisement { sequence, links: BTreeMap::new() };
    let beat = Heartbeat { sequence, load: Load::default(), services: vec![] };
    let words = [
        GossipMessage::LinkState(Signed::seal(&author(0), &links)),
        GossipMessage::Heartbeat(Signed::seal(&author(0), &beat)),
    ];
    for word in words {
        assert_eq!(engine.message(word, None, NOW), Some(Verdict::Ignore));
        let dropped = dropped(&mut engine);
        let [(what, why)] = &dropped[..] else { panic!("{dropped:?}") };
        assert_eq!(*what, CLOCK);
        assert!(why.contains("this node") && why.contains("7 min ahead"), "{why}");
        assert!(why.contains("set back") && !why.contains("our clock"), "{why}");
    }
}
