use ed25519_dalek::SigningKey;

use super::*;
use crate::engine::lookups::{ABSENT_FOR, RETRY_AFTER};
use crate::engine::measure::HealthPolicy;
use crate::engine::overlay::membership::{Credential, NameGrant, Roster};
use crate::engine::overlay::wire::GOSSIP_BYTES_MAX;
use crate::engine::overlay::{Objective, ServiceKind};

const START: Timestamp = Timestamp(1_000_000_000_000);

/// Of key 9's network.
fn author(byte: u8) -> Author {
    let key = SigningKey::from_bytes(&[byte; 32]);
    let root = SigningKey::from_bytes(&[9; 32]);
    let public = PublicKey(key.verifying_key().to_bytes());
    let until = START + Duration::from_secs(86_400);
    let credential = Credential::issue(&root, &public, START, until);
    Author { key, credential }
}

fn name() -> ServiceName {
    "a.local".parse().unwrap()
}

fn spec() -> ServiceSpec {
    ServiceSpec {
        name: name(),
        kind: ServiceKind::Tcp,
        metadata: BTreeMap::new(),
        allowed: vec![],
        ttl_s: 600,
        objective: Objective::Balanced,
        delegation: None,
        health: HealthPolicy::of_kind(ServiceKind::Tcp),
    }
}

/// The services of one node.
struct Node {
    services: Services,
    membership: Membership,
    /// Without links.
    graph: OverlayGraph,
    outputs: Outputs,
}

impl Node {
    fn new(byte: u8) -> Self {
        let root = Author::root(SigningKey::from_bytes(&[9; 32])).public();
        let roster = Roster::new(root, author(byte).credential);
        Self {
            services: Services::new(author(byte), Vec::new(), 1),
            membership: Membership::new(roster),
            graph: OverlayGraph::default(),
            outputs: Outputs::new(),
        }
    }

    fn publish(&mut self, spec: ServiceSpec, now: Timestamp) {
        self.services.publish(1, spec, &mut self.membership, now, &mut self.outputs);
    }

    fn resolve(&mut self, request: RequestId, now: Timestamp) {
        self.services.resolve(request, name(), false, &self.graph, now, &mut self.outputs);
    }

    fn found(&mut self, search: RequestId, records: &[Signed], now: Timestamp) {
        let records: Vec<Vec<u8>> = records.iter().map(wire::encode).collect();
        let (membership, outputs) = (&mut self.membership, &mut self.outputs);
        self.services.found(search, &records, membership, &self.graph, now, outputs);
    }

    fn timeout(&mut self, now: Timestamp) {
        self.services.handle_timeout(&mut self.membership, now, &mut self.outputs);
    }

    fn accept(&mut self, signed: &Signed, now: Timestamp) -> Verdict {
        let (membership, outputs) = (&mut self.membership, &mut self.outputs);
        self.services.accept(signed, membership, &self.graph, || true, now, outputs).0
    }

    /// The record that it sends by gossip, and nothing of what it did before.
    fn said(&mut self) -> Option<Signed> {
        let outputs: Vec<Output> = self.outputs.drain(..).collect();
        outputs.iter().rev().find_map(|output| match output {
            Output::Publish(bytes) => match wire::decode(bytes, GOSSIP_BYTES_MAX) {
                Ok(GossipMessage::Service(signed)) => Some(signed),
                _ => None,
            },
            _ => None,
        })
    }

    /// The searches that it wants done, and what it answers.
    fn did(&mut self) -> (Vec<RequestId>, BTreeMap<RequestId, Result<Answer, CommandError>>) {
        let (mut searches, mut answers) = (Vec::new(), BTreeMap::new());
        for output in self.outputs.drain(..) {
            match output {
                Output::DhtGet { request, .. } => searches.push(request),
                Output::Answer { request, answer } => {
                    answers.insert(request, answer);
                }
                _ => {}
            }
        }
        (searches, answers)
    }
}

fn sequence(signed: &Signed) -> u64 {
    signed.open::<ServiceRecord>().unwrap().sequence
}

#[test]
fn a_provider_whose_clock_went_back_overtakes_what_it_said_before() {
    let hour = Duration::from_secs(3_600);
    let mut before = Node::new(1);
    // Within what clocks may differ, but ahead.
    let ahead = START + hour + Duration::from_secs(200);
    before.publish(spec(), ahead);
    let earlier = before.said().unwrap();

    let now = START + hour;
    let mut node = Node::new(1);
    node.publish(spec(), now);
    let first = node.said().unwrap();
    assert!(sequence(&first) < sequence(&earlier));
    assert_eq!(node.accept(&earlier, now), Verdict::Accept);
    let due = node.services.next_timeout().unwrap();
    assert!(due <= now + RECLAIM_AFTER, "not only after a third of its time to live");
    node.timeout(due);
    let reclaimed = node.said().unwrap();
    assert_eq!(sequence(&reclaimed), sequence(&earlier) + 1);
    let mut other = Node::new(2);
    for (signed, verdict) in
        [(&earlier, Verdict::Accept), (&first, Verdict::Ignore), (&reclaimed, Verdict::Accept)]
    {
        assert_eq!(other.accept(signed, now), verdict);
    }
}

#[test]
fn renewals_come_before_a_third_of_the_time_to_live_and_not_together() {
    let mut node = Node::new(1);
    let mut due = Vec::new();
    for index in 0..20 {
        let name = format!("{index}.local").parse().unwrap();
        node.publish(ServiceSpec { name, ..spec() }, START);
    }
    node.outputs.clear();
    while due.len() < 20 {
        let at = node.services.next_timeout().unwrap();
        node.timeout(at);
        let puts = node.outputs.drain(..).filter(|output| matches!(output, Output::DhtPut { .. }));
        due.extend(puts.map(|_| at.since(START).as_secs()));
    }
    assert!(due.iter().all(|second| (159..=200).contains(second)), "{due:?}");
    due.dedup();
    assert!(due.len() > 10, "{due:?}");
}

#[test]
fn look_ups_of_an_unknown_name_cost_two_searches_and_then_nothing_for_a_while() {
    let mut node = Node::new(1);
    node.resolve(1, START);
    node.resolve(2, START);
    assert_eq!(node.did(), (vec![1], BTreeMap::new()), "one search for both");
    node.found(1, &[], START);
    assert_eq!(node.did(), (vec![], BTreeMap::new()));
    let again = START + RETRY_AFTER;
    assert_eq!(node.services.next_timeout(), Some(again));
    node.timeout(again);
    assert_eq!(node.did().0, [1]);
    node.found(1, &[], again);
    let (searches, answers) = node.did();
    assert!(searches.is_empty());
    let unknown = Err(CommandError::UnknownName(name()));
    assert_eq!(answers, [(1, unknown.clone()), (2, unknown.clone())].into());
    for request in 3..100 {
        node.resolve(request, again);
        assert_eq!(node.did(), (vec![], [(request, unknown.clone())].into()));
    }
    node.services.resolve(100, name(), true, &node.graph, again, &mut node.outputs);
    assert_eq!(node.did().0, [100], "who insists on the DHT is not fobbed off");
    node.resolve(101, again + ABSENT_FOR);
    assert_eq!(node.did().0, [101]);
}

#[test]
fn a_record_that_arrives_meanwhile_answers_who_waits() {
    let mut provider = Node::new(2);
    provider.publish(spec(), START);
    let record = provider.said().unwrap();
    let mut node = Node::new(1);
    node.resolve(1, START);
    node.found(1, &[], START);
    node.did();
    node.accept(&record, START);
    let (_, answers) = node.did();
    let Some(Ok(Answer::Resolved { providers, from_gossip: true })) = answers.get(&1) else {
        panic!("{answers:?}")
    };
    assert_eq!(providers[0].0, author(2).public());
    node.timeout(START + RETRY_AFTER);
    assert!(node.did().0.is_empty(), "nothing to search for any more");

    // The same from the DHT, and a name that was absent is searched for no more.
    let mut node = Node::new(1);
    node.services.lookups.set_absent(name(), START);
    node.accept(&record, START);
    node.resolve(1, START);
    assert!(matches!(node.did().1[&1], Ok(Answer::Resolved { from_gossip: true, .. })));
    let mut node = Node::new(1);
    node.resolve(1, START);
    node.found(1, &[record], START);
    assert!(matches!(node.did().1[&1], Ok(Answer::Resolved { from_gossip: false, .. })));
}

#[test]
fn a_second_owner_is_named_once_wherever_it_turns_up_and_trust_lets_it_in() {
    let record = |byte: u8, at: Timestamp| {
        let mut provider = Node::new(byte);
        provider.publish(spec(), at);
        provider.said().unwrap()
    };
    let mut node = Node::new(1);
    node.accept(&record(2, START), START);
    node.outputs.clear();
    let foreign = record(3, START);
    assert_eq!(node.accept(&foreign, START), Verdict::Ignore);
    let notices = |node: &mut Node| {
        let outputs = node.outputs.drain(..);
        outputs.filter(|output| matches!(output, Output::Notice(Notice::ForeignName(_)))).count()
    };
    assert_eq!(notices(&mut node), 1);
    node.accept(&record(3, START + RECLAIM_AFTER), START);
    assert_eq!(notices(&mut node), 0, "said already");

    // The node's own claim is refused in the same words, and so is what only the DHT knows.
    node.publish(spec(), START);
    let Some(Err(CommandError::Refused(error))) = node.did().1.remove(&1) else { panic!() };
    assert!(error.to_string().contains(&author(2).public().node_id().to_string()), "{error}");
    let expired = START + Duration::from_secs(1_200);
    node.services.expire(expired, &mut node.outputs);
    node.outputs.clear();
    node.resolve(2, expired);
    let later = record(3, expired);
    node.found(2, std::slice::from_ref(&later), expired);
    assert!(node.did().1.is_empty(), "its owner's may be found yet");
    node.found(2, std::slice::from_ref(&later), expired);
    assert!(matches!(&node.did().1[&2], Err(CommandError::Refused(error)) if error.is_foreign()));

    // What another one has withdrawn is nobody's.
    let mut gone = Node::new(3);
    gone.publish(spec(), expired);
    let withdrawal = (&mut gone.membership, &mut gone.outputs);
    gone.services.withdraw(9, &name(), withdrawal.0, expired, withdrawal.1);
    let tombstone = gone.said().unwrap();
    node.resolve(4, expired);
    (0..2).for_each(|_| node.found(4, std::slice::from_ref(&tombstone), expired));
    assert_eq!(node.did().1[&4], Err(CommandError::UnknownName(name())));

    node.services.trust(3, &name(), &author(3).public(), expired, &mut node.outputs);
    let kept = node.outputs.iter().find_map(|output| match output {
        Output::KeepPins(pins) => Some(pins.clone()),
        _ => None,
    });
    assert_eq!(kept.unwrap()[0].owner, author(3).public(), "over restarts too");
    assert_eq!(node.did().1[&3], Ok(Answer::Done));
    assert_eq!(node.accept(&later, expired), Verdict::Accept);
    assert_eq!(node.services.conflicts().count(), 0);

    let mut own = Node::new(1);
    own.publish(spec(), START);
    own.services.trust(2, &name(), &author(2).public(), START, &mut own.outputs);
    assert_eq!(own.did().1[&2], Err(CommandError::PublishedHere(name())));
}

#[test]
fn an_owner_delegates_its_names_and_no_others_and_the_replica_publishes_in_its_name() {
    let (mut owner, mut replica) = (Node::new(1), Node::new(2));
    let day = Duration::from_secs(86_400);
    let long = owner.services.delegate(&name(), &author(2).public(), 300 * day, START).unwrap();
    let said: Delegation = long.open().unwrap();
    assert_eq!(said.expires_at, author(1).credential.expires_at, "not longer than its own");
    let own = owner.services.delegate(&name(), &author(1).public(), day, START);
    assert_eq!(own, Err(CommandError::DelegatesToItself(name())));
    replica.publish(ServiceSpec { delegation: Some(long.clone()), ..spec() }, START);
    let record = replica.said().unwrap();
    let mut other = Node::new(3);
    assert_eq!(other.accept(&record, START), Verdict::Accept);
    assert_eq!(other.services.registry().owner(&name()), Some(author(1).public()));
    let foreign = other.services.delegate(&name(), &author(2).public(), day, START);
    assert!(matches!(foreign, Err(CommandError::Refused(error)) if error.is_foreign()));
    other.publish(ServiceSpec { delegation: Some(long), ..spec() }, START);
    let answers = other.did().1;
    let Some(Err(CommandError::Refused(error))) = answers.get(&1) else { panic!("{answers:?}") };
    assert!(matches!(error, RecordError::NotOwner { .. }), "not delegated to this one: {error}");
}

#[test]
fn a_name_that_the_root_gives_to_another_is_withheld_and_published_again_when_it_is_given_back() {
    let mut node = Node::new(1);
    node.publish(spec(), START);
    assert!(node.said().is_some());
    let root = Author::root(SigningKey::from_bytes(&[9; 32]));
    let give = |node: &mut Node, to: u8, at: Timestamp| {
        let grant = NameGrant { name: name(), owner: author(to).public(), at };
        let signed = Signed::seal(&root, &grant);
        assert!(node.services.grant(grant, signed, at, &mut node.outputs));
    };
    let second = |s: u64| START + Duration::from_secs(s);
    give(&mut node, 2, second(1));
    let told = node.outputs.drain(..).any(|output| {
        matches!(output, Output::Notice(Notice::NameGranted { owner, .. })
            if owner == author(2).public().node_id())
    });
    assert!(told);
    let withheld: Vec<_> = node.services.withheld().map(|(spec, why)| (&spec.name, why)).collect();
    assert!(matches!(&withheld[..], [(_, RecordError::Granted { .. })]), "{withheld:?}");
    node.timeout(second(500));
    assert!(node.said().is_none(), "not its any more");
    give(&mut node, 1, second(501));
    node.timeout(second(501));
    assert!(node.said().is_some(), "at once");
    assert_eq!(node.services.withheld().count(), 0);
}
