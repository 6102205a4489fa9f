//! Services that break and recover in simulated worlds: what is checked, who hears of it, and whom a name
//! leads to meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use meshwise::engine::Intervals;
use meshwise::engine::event::{Answer, Command, Input, ServiceSpec, Usage};
use meshwise::engine::measure::service::CheckFailure;
use meshwise::engine::measure::{Health, HealthCheck, HealthPolicy, Sample, Vantage};
use meshwise::engine::overlay::heartbeat::{GAP, Heartbeat, LIFETIME, PERIOD, ServiceState};
use meshwise::engine::overlay::wire::{self, GossipMessage};
use meshwise::engine::overlay::{Delegation, Load, Objective, ServiceKind, Signed};
use meshwise::engine::route::PathPolicy;
use meshwise::engine::types::{NodeId, ServiceName, Timestamp, TunnelId};
use meshwise::sim::{LinkModel, World};

const START: Timestamp = Timestamp(1_760_000_000_000_000);
const OWNER: usize = 0;
const REPLICA: usize = 1;
const USER: usize = 2;
const NAME: &str = "replicated.local";
/// From the first failed check to the third: one suspicion later each.
const DOWN_WITHIN: Duration = Duration::from_secs(8);

fn name() -> ServiceName {
    NAME.parse().unwrap()
}

fn spec() -> ServiceSpec {
    ServiceSpec {
        name: name(),
        kind: ServiceKind::Tcp,
        metadata: BTreeMap::new(),
        allowed: vec![],
        ttl_s: 3_600,
        objective: Objective::Balanced,
        delegation: None,
        health: HealthPolicy::of_kind(ServiceKind::Tcp),
    }
}

/// What the replica publishes.
fn replica(world: &World) -> ServiceSpec {
    let provider = world.author(REPLICA).public();
    let expires_at = START + Duration::from_secs(86_400);
    let delegation = Delegation { name: name(), provider, expires_at };
    let delegation = Signed::seal(&world.author(OWNER), &delegation);
    ServiceSpec { delegation: Some(delegation), ..spec() }
}

/// Owner, replica, user and a fourth node, all linked, and a name with two providers.
struct Two {
    world: World,
    asked: u64,
}

impl Two {
    fn new(seed: u64) -> Self {
        let mut world = World::new(seed, START);
        for index in 0..4 {
            let bootstrap: Vec<usize> = (0..index).collect();
            world.add_node(&bootstrap, PathPolicy::default(), Intervals::default());
        }
        for a in 0..4 {
            for b in a + 1..4 {
                world.set_link(a, b, LinkModel::delay(10.0));
            }
        }
        world.run_for(Duration::from_secs(5));
        world.command(OWNER, Command::Publish { request: 1, service: spec() });
        let service = replica(&world);
        world.command(REPLICA, Command::Publish { request: 1, service });
        world.run_for(Duration::from_secs(5));
        Self { world, asked: 1_000 }
    }

    /// Whom the name leads to, as a node says.
    fn providers(&mut self, at: usize) -> BTreeSet<usize> {
        self.asked += 1;
        let request = self.asked;
        let resolve = Command::Resolve { request, name: name(), from_dht: false };
        self.world.command(at, resolve);
        self.world.run_for(Duration::from_millis(1));
        let Some(Ok(Answer::Resolved { providers, .. })) = self.world.answer(at, request) else {
            return BTreeSet::new();
        };
        let nodes: Vec<NodeId> = providers.iter().map(|(key, _)| key.node_id()).collect();
        (0..4).filter(|index| nodes.contains(&self.world.id(*index))).collect()
    }

    fn health(&self, at: usize, of: usize) -> Option<Health> {
        let services = self.world.engine(at).services();
        services.health(&name(), self.world.id(of), self.world.now()).map(|known| known.health)
    }

    /// Lets time pass until it is so; returns how long that took.
    fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) -> Duration {
        let begun = self.world.now();
        while !is_so(self) {
            let passed = self.world.now().since(begun);
            assert!(passed < Duration::from_secs(300), "not within five minutes: {what}");
            self.world.run_for(Duration::from_millis(100));
        }
        self.world.now().since(begun)
    }

    fn both(&mut self, at: usize) -> bool {
        self.providers(at) == BTreeSet::from([OWNER, REPLICA])
    }

    fn end(self) {
        assert_eq!(self.world.breaches(), &[] as &[String]);
    }
}

#[test]
fn a_service_that_breaks_is_suspect_then_down_and_its_replica_is_named_until_it_recovers() {
    let mut two = Two::new(1);
    assert_eq!(two.health(USER, OWNER), Some(Health::Up), "as its provider says");
    assert!(two.both(USER));
    two.world.break_target(OWNER, &name());
    two.until("it is suspect there", |two| two.health(OWNER, OWNER) == Some(Health::Suspect));
    assert!(two.both(USER), "one failure is no reason to leave");
    two.until("others hear of it", |two| two.health(USER, OWNER) == Some(Health::Suspect));
    assert!(two.both(USER), "suspect is not down");
    let took = two.until("it is down", |two| two.health(USER, OWNER) == Some(Health::Down));
    assert!(took <= DOWN_WITHIN, "{took:?}");
    for node in [USER, 3] {
        assert_eq!(two.providers(node), BTreeSet::from([REPLICA]), "at node {node}");
    }
    // Its record is not gone, only not used.
    let world = &two.world;
    let records = world.engine(USER).services().registry().resolve(&name(), world.now()).count();
    assert_eq!(records, 2);
    two.world.mend_target(OWNER, &name());
    two.until("it is back by itself", |two| two.both(USER) && two.both(3));
    two.until("and trusted", |two| two.health(USER, OWNER) == Some(Health::Up));

    // Time-outs and failures are samples, with the reason.
    let samples = two.world.samples(OWNER).iter();
    let results: Vec<_> = samples
        .filter_map(|sample| match sample {
            Sample::ServiceProbe { subject, started_at, done_at, result } => {
                assert!(subject.vantage == Vantage::Local && started_at < done_at);
                Some(*result)
            }
            _ => None,
        })
        .collect();
    assert!(results.iter().filter(|result| **result == Err(CheckFailure::Refused)).count() >= 3);
    assert!(results.iter().filter(|result| result.is_ok()).count() >= 3);
    two.end();
}

#[test]
fn when_all_providers_are_down_they_are_named_still() {
    let mut two = Two::new(2);
    for node in [OWNER, REPLICA] {
        two.world.break_target(node, &name());
    }
    two.until("both are down", |two| {
        [OWNER, REPLICA].iter().all(|node| two.health(USER, *node) == Some(Health::Down))
    });
    assert!(two.both(USER));
    two.end();
}

#[test]
fn a_provider_that_is_gone_is_not_named_beside_another_and_is_back_with_its_links() {
    let mut two = Two::new(3);
    two.world.part([OWNER].into());
    let took = two.until("it is hidden", |two| two.providers(USER) == BTreeSet::from([REPLICA]));
    assert!(took <= Duration::from_secs(10), "as soon as nobody has a link to it: {took:?}");
    let records =
        two.world.engine(USER).services().registry().resolve(&name(), two.world.now()).count();
    assert_eq!(records, 2, "not deleted: its time is not over");
    let alone = |two: &mut Two| two.providers(OWNER) == BTreeSet::from([OWNER]);
    let took = two.until("nor does it name who is gone", alone);
    assert!(took <= Duration::from_secs(10), "{took:?}");
    two.world.heal();
    two.until("it is back", |two| two.both(USER));
    two.end();
}

#[test]
fn what_a_user_cannot_reach_it_avoids_and_nobody_else_does() {
    let mut two = Two::new(4);
    let destination = two.world.id(OWNER);
    two.world.command(
        USER,
        Command::OpenTunnel {
            tunnel: TunnelId(1),
            destination,
            forced: None,
            objective: Objective::Balanced,
            beside: None,
            reserve: None,
        },
    );
    two.world.run_for(Duration::from_secs(2));
    let usage = Usage { services: [(name(), destination)].into(), ..Usage::default() };
    two.world.input(USER, Input::Usage(usage));
    let ends = |two: &mut Two| {
        let known = two.world.engine(USER).services();
        known.health(&name(), destination, two.world.now()).unwrap().by == Vantage::EndToEnd
    };
    two.until("the first check through the tunnel", ends);
    two.world.refuse_user(OWNER, &name(), USER);
    let before = two.health(USER, OWNER);
    assert_eq!(before, Some(Health::Up));
    let doubt = Input::ServiceDoubted { name: name(), provider: destination };
    two.world.input(USER, doubt);
    let took = two.until("it is suspect to its user", |two| two.health(USER, OWNER) != before);
    assert!(took <= Duration::from_secs(2), "a bad experience is followed up: {took:?}");
    two.until("it is down to its user", |two| two.health(USER, OWNER) == Some(Health::Down));
    assert_eq!(two.providers(USER), BTreeSet::from([REPLICA]));
    assert!(two.both(3), "a suspicion is nobody else's business");
    // No longer used, no longer judged.
    two.world.input(USER, Input::Usage(Usage::default()));
    assert!(two.both(USER));
    two.end();
}

#[test]
fn nobody_speaks_for_another_provider_nor_from_another_time() {
    let mut two = Two::new(5);
    let state = ServiceState { name: name(), health: Health::Down, response_us: None };
    let heartbeat = |at: Timestamp| Heartbeat {
        sequence: at.0,
        load: Load::default(),
        services: vec![state.clone()],
    };
    let say = |two: &mut Two, from: usize, signed: Signed| {
        two.world.gossip(from, wire::encode(&GossipMessage::Heartbeat(signed)));
        two.world.run_for(Duration::from_secs(1));
    };
    let now = two.world.now();
    // Node 3 says that its own service of this name is down; it provides none.
    let own = Signed::seal(&two.world.author(3), &heartbeat(now));
    say(&mut two, 3, own);
    assert!(two.both(USER));
    // In the owner's name, with another's signature.
    let mut forged = Signed::seal(&two.world.author(3), &heartbeat(now));
    forged.key = two.world.author(OWNER).public();
    forged.credential = two.world.author(OWNER).credential;
    say(&mut two, 3, forged);
    assert!(two.both(USER));
    let rejected = |two: &Two, word: &str| {
        let dropped = two.world.dropped(USER);
        dropped.iter().any(|((_, why), _)| why.contains(word))
    };
    assert!(rejected(&two, "signature"));
    // By the owner itself, but of tomorrow: it could be replayed for a day.
    let author = two.world.author(OWNER);
    let tomorrow = two.world.now() + Duration::from_secs(86_400);
    say(&mut two, 3, Signed::seal(&author, &heartbeat(tomorrow)));
    assert!(two.both(USER) && rejected(&two, "ahead of our clock"));
    // A true one that its owner does not hear, which would say otherwise at once; replayed after the recovery.
    let old = Signed::seal(&author, &heartbeat(two.world.now()));
    let bytes = wire::encode(&GossipMessage::Heartbeat(old.clone()));
    let from = two.world.id(3);
    two.world.input(USER, Input::Gossip { token: u64::MAX, from, bytes });
    assert_eq!(two.providers(USER), BTreeSet::from([REPLICA]));
    two.until("the owner has said otherwise", |two| two.both(USER));
    say(&mut two, 3, old);
    assert!(two.both(USER), "replayed");
    two.end();
}

#[test]
fn a_newcomer_hears_at_once_how_services_are() {
    let mut two = Two::new(6);
    two.world.break_target(OWNER, &name());
    two.until("it is down", |two| two.health(USER, OWNER) == Some(Health::Down));
    // So that no heartbeat of the owner itself is what the newcomer hears.
    two.world.kill(3);
    two.world.run_for(GAP);
    two.world.start(3);
    let took = two.until("it knows the replica", |two| !two.providers(3).is_empty());
    assert!(took < PERIOD / 4, "{took:?}");
    assert_eq!(two.health(3, OWNER), Some(Health::Down));
    assert_eq!(two.health(3, REPLICA), Some(Health::Up), "and what is not");
    assert_eq!(two.providers(3), BTreeSet::from([REPLICA]));
    two.end();
}

#[test]
fn the_word_of_a_provider_that_is_gone_ends_and_unchecked_services_have_none() {
    let mut two = Two::new(7);
    let health = HealthPolicy { check: HealthCheck::None, ..spec().health };
    let plain: ServiceName = "plain.local".parse().unwrap();
    let service = ServiceSpec { name: plain.clone(), health, ..spec() };
    two.world.command(OWNER, Command::Publish { request: 2, service });
    two.world.run_for(2 * PERIOD);
    let owner = two.world.id(OWNER);
    let services = two.world.engine(USER).services();
    assert_eq!(services.health(&plain, owner, two.world.now()), None);
    assert!(services.load(owner, two.world.now()).is_some());
    two.world.vanish(OWNER);
    two.world.run_for(LIFETIME + Duration::from_secs(1));
    assert_eq!(two.health(USER, OWNER), None);
    assert_eq!(two.world.engine(USER).services().load(owner, two.world.now()), None);
    two.end();
}

#[test]
fn a_provider_whose_clock_is_set_back_by_minutes_is_heard_again_at_once() {
    let mut two = Two::new(8);
    let restart = |two: &mut Two, ahead_us: i64| {
        two.world.set_clock(REPLICA, ahead_us);
        let service = replica(&two.world);
        two.world.command(REPLICA, Command::Publish { request: 2, service });
    };
    restart(&mut two, 4 * 60_000_000);
    two.world.run_for(GAP * 10);
    let said = |two: &Two| two.health(USER, REPLICA);
    assert_eq!(said(&two), Some(Health::Up));
    restart(&mut two, 0);
    two.world.run_for(GAP * 10);
    two.world.break_target(REPLICA, &name());
    let took = two.until("it is down", |two| said(two) == Some(Health::Down));
    assert!(took <= DOWN_WITHIN + GAP, "{took:?}");
    two.end();
}
