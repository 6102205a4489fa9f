use ed25519_dalek::SigningKey;

use super::*;
use crate::engine::overlay::membership::{Author, Credential, Revocation};
use crate::engine::overlay::wire::{Objective, ServiceKind};

/// Of key 9's network.
fn key(byte: u8) -> Author {
    let key = SigningKey::from_bytes(&[byte; 32]);
    let root = SigningKey::from_bytes(&[9; 32]);
    let public = PublicKey(key.verifying_key().to_bytes());
    let credential = Credential::issue(&root, &public, seconds(0), seconds(1_000_000));
    Author { key, credential }
}

fn public(byte: u8) -> PublicKey {
    key(byte).public()
}

struct Registry(ServiceRegistry, Membership);

impl Registry {
    fn new() -> Self {
        let roster = Roster::new(public(9), key(1).credential);
        Self(ServiceRegistry::default(), Membership::new(roster))
    }

    fn accept(&mut self, signed: &Signed, now: Timestamp) -> Result<Accepted, RecordError> {
        self.0.accept(signed, &mut self.1, now).map(|(_, accepted)| accepted)
    }
}

fn seconds(s: u64) -> Timestamp {
    Timestamp(s * 1_000_000)
}

fn record(owner: u8, sequence: u64) -> ServiceRecord {
    ServiceRecord {
        name: "a.local".parse().unwrap(),
        kind: ServiceKind::Tcp,
        owner: public(owner),
        delegation: None,
        metadata: BTreeMap::new(),
        sequence,
        issued_at: seconds(1_000),
        ttl_s: 60,
        objective: Objective::Balanced,
        allowed: vec![],
        withdrawn: false,
    }
}

fn name() -> ServiceName {
    "a.local".parse().unwrap()
}

#[test]
fn newer_wins_and_a_tombstone_is_not_undone_by_replay() {
    let mut registry = Registry::new();
    let now = seconds(1_001);
    let first = Signed::seal(&key(1), &record(1, 1));
    assert_eq!(registry.accept(&first, now), Ok(Accepted::New));
    assert!(matches!(registry.accept(&first, now), Err(RecordError::Stale { .. })));
    let second = Signed::seal(&key(1), &record(1, 2));
    assert_eq!(registry.accept(&second, now), Ok(Accepted::Updated));
    let gone = ServiceRecord { withdrawn: true, ..record(1, 3) };
    let gone = Signed::seal(&key(1), &gone);
    assert_eq!(registry.accept(&gone, now), Ok(Accepted::Withdrawn));
    assert_eq!(registry.0.resolve(&name(), now).count(), 0);
    assert!(registry.accept(&second, now).is_err(), "replay");
    assert_eq!(registry.0.resolve(&name(), now).count(), 0);
}

#[test]
fn a_short_tombstone_outlives_the_long_record_that_it_replaced() {
    let mut registry = Registry::new();
    let long = ServiceRecord { ttl_s: 86_400, ..record(1, 1) };
    let long = Signed::seal(&key(1), &long);
    registry.accept(&long, seconds(1_001)).unwrap();
    let gone = ServiceRecord { withdrawn: true, ..record(1, 2) };
    registry.accept(&Signed::seal(&key(1), &gone), seconds(1_002)).unwrap();
    registry.0.expire(seconds(10_000));
    let replayed = registry.accept(&long, seconds(10_000));
    assert!(matches!(replayed, Err(RecordError::Stale { .. })), "{replayed:?}");
}

#[test]
fn a_name_belongs_to_its_first_owner() {
    let mut registry = Registry::new();
    let now = seconds(1_001);
    registry.accept(&Signed::seal(&key(1), &record(1, 1)), now).unwrap();
    let error = registry.accept(&Signed::seal(&key(2), &record(2, 9)), now).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&public(1).node_id().to_string()), "{text}");
    assert!(text.contains(&public(2).node_id().to_string()), "{text}");
    let stolen = Signed::seal(&key(2), &record(1, 9));
    assert!(matches!(registry.accept(&stolen, now), Err(RecordError::NotOwner { .. })));
}

#[test]
fn records_end_with_their_time_and_do_not_come_from_the_future() {
    let mut registry = Registry::new();
    let signed = Signed::seal(&key(1), &record(1, 1));
    assert_eq!(registry.accept(&signed, seconds(699)), Err(RecordError::FromTheFuture));
    assert_eq!(registry.accept(&signed, seconds(1_360)), Err(RecordError::Expired));
    registry.accept(&signed, seconds(1_359)).unwrap();
    assert_eq!(registry.0.resolve(&name(), seconds(1_359)).count(), 1);
    assert_eq!(registry.0.resolve(&name(), seconds(1_360)).count(), 0);
    registry.0.expire(seconds(1_360));
    assert_eq!(registry.0.signed().count(), 0);
}

/// A record of `provider`, who shows what `owner` signed for `delegate` until `expires_at`.
fn replica(provider: u8, owner: u8, delegate: u8, expires_at: Timestamp) -> Signed {
    let delegation = Delegation { name: name(), provider: public(delegate), expires_at };
    let delegation = Some(Signed::seal(&key(owner), &delegation));
    Signed::seal(&key(provider), &ServiceRecord { delegation, ..record(owner, 1) })
}

#[test]
fn replicas_are_those_to_whom_the_owner_has_delegated_the_name() {
    let mut registry = Registry::new();
    let (now, late) = (seconds(1_001), seconds(1_030));
    registry.accept(&Signed::seal(&key(1), &record(1, 1)), now).unwrap();
    assert_eq!(registry.accept(&replica(2, 1, 2, late), now), Ok(Accepted::New));
    let providers: Vec<PublicKey> = registry.0.resolve(&name(), now).map(|(key, _)| key).collect();
    assert_eq!(providers.len(), 2);
    assert!(registry.0.resolve(&name(), now).all(|(_, record)| record.owner == public(1)));
    let refused = registry.accept(&replica(3, 1, 2, late), now);
    assert!(matches!(refused, Err(RecordError::NotOwner { .. })), "it was for another node");
    let refused = registry.accept(&replica(3, 2, 3, late), now).unwrap_err();
    assert!(refused.is_foreign(), "a replica has nothing to delegate: {refused}");
    let by_another = ServiceRecord { owner: public(1), ..record(2, 9) };
    let other = Delegation { name: name(), provider: public(3), expires_at: late };
    let delegation = Some(Signed::seal(&key(2), &other));
    let stolen = Signed::seal(&key(3), &ServiceRecord { delegation, ..by_another });
    assert!(matches!(registry.accept(&stolen, now), Err(RecordError::NotOwner { .. })));
    let elsewhere = Delegation { name: "b.local".parse().unwrap(), ..other };
    let delegation = Some(Signed::seal(&key(1), &elsewhere));
    let stolen = Signed::seal(&key(3), &ServiceRecord { delegation, ..record(1, 9) });
    assert!(matches!(registry.accept(&stolen, now), Err(RecordError::NotOwner { .. })));
}

#[test]
fn a_replica_ends_with_its_delegation_and_with_the_membership_of_its_owner() {
    let mut registry = Registry::new();
    let late = seconds(1_030);
    registry.accept(&replica(2, 1, 2, late), seconds(1_001)).unwrap();
    let end = late + CLOCK_SKEW;
    assert_eq!(registry.0.resolve(&name(), Timestamp(end.0 - 1)).count(), 1);
    assert_eq!(registry.0.resolve(&name(), end).count(), 0, "before the record's own end");
    registry.0.expire(end);
    let refused = registry.accept(&replica(2, 1, 2, late), end);
    assert!(matches!(refused, Err(RecordError::DelegationExpired { .. })), "{refused:?}");

    registry.accept(&replica(2, 1, 2, late), seconds(1_001)).unwrap();
    let root = Author::root(SigningKey::from_bytes(&[9; 32]));
    let revocation = Revocation { key: public(1), at: seconds(1_002) };
    registry.1.revoke(&Signed::seal(&root, &revocation)).unwrap();
    registry.0.forget(&public(1));
    assert_eq!(registry.0.signed().count(), 0);
    assert_eq!(registry.0.owner(&name()), None, "its names are free");
    let refused = registry.accept(&replica(2, 1, 2, late), seconds(1_003));
    assert!(matches!(refused, Err(RecordError::Delegation(_))), "{refused:?}");
}

#[test]
fn a_name_stays_with_its_owner_after_its_records_until_somebody_says_otherwise() {
    let mut registry = Registry::new();
    registry.accept(&Signed::seal(&key(1), &record(1, 1)), seconds(1_001)).unwrap();
    registry.0.expire(seconds(1_360));
    assert_eq!(registry.0.signed().count(), 0);
    let later = |owner: u8| {
        Signed::seal(&key(owner), &ServiceRecord { issued_at: seconds(2_000), ..record(owner, 2) })
    };
    let now = seconds(2_000);
    assert!(registry.accept(&later(2), now).unwrap_err().is_foreign(), "pinned");
    let mut again = Registry::new();
    again.0.pins_mut().restore(registry.0.pins().list().collect());
    let error = again.accept(&later(2), now).unwrap_err().to_string();
    for word in ["service trust", "network grant", "service delegate"] {
        assert!(error.contains(word), "{error}");
    }
    again.0.trust(&name(), &public(2), now).unwrap();
    assert_eq!(again.accept(&later(2), now), Ok(Accepted::New));
    assert!(again.accept(&later(1), now).unwrap_err().is_foreign());

    // What the root says beats both.
    let grant = NameGrant { name: name(), owner: public(1), at: now };
    let root = Author::root(SigningKey::from_bytes(&[9; 32]));
    assert!(again.0.grant(grant.clone(), Signed::seal(&root, &grant)));
    assert_eq!(again.0.resolve(&name(), now).count(), 0, "records of others go");
    assert_eq!(again.accept(&later(1), now), Ok(Accepted::New));
    let refused = again.0.trust(&name(), &public(2), now);
    assert!(matches!(refused, Err(RecordError::Granted { .. })), "{refused:?}");
    assert_eq!(again.0.trust(&name(), &public(1), now), Ok(()));
}

#[test]
fn a_provider_of_many_names_pushes_nobody_out() {
    let mut registry = Registry::new();
    registry.0 = ServiceRegistry::with_limits(6, 4);
    let now = seconds(1_001);
    let named = |provider: u8, index: u64| {
        let name = format!("{index}.of-{provider}.local").parse().unwrap();
        // Those with lower numbers end later.
        let ttl_s = 100 - index as u32;
        Signed::seal(&key(provider), &ServiceRecord { name, ttl_s, ..record(provider, 1) })
    };
    let count = |registry: &Registry, provider: u8| {
        registry.0.list(now).filter(|(key, _)| *key == public(provider)).count()
    };
    for index in 0..4 {
        registry.accept(&named(2, index), now).unwrap();
    }
    let refused = registry.accept(&named(2, 4), now);
    assert_eq!(refused, Err(RecordError::TooMany(public(2).node_id())));
    for index in 0..3 {
        registry.accept(&named(1, index), now).unwrap();
    }
    assert_eq!((count(&registry, 1), count(&registry, 2)), (3, 3), "the largest made room");
    let kept: Vec<String> = registry.0.list(now).map(|(_, r)| r.name.to_string()).collect();
    assert!(!kept.contains(&"3.of-2.local".to_owned()), "what would have ended first: {kept:?}");
    assert_eq!(registry.accept(&named(1, 3), now), Err(RecordError::Full));
    assert_eq!(registry.accept(&named(2, 3), now), Err(RecordError::Full));
    registry.accept(&named(3, 0), now).unwrap();
    assert_eq!(count(&registry, 3), 1);
    registry.0.expire(seconds(2_000));
    assert_eq!(registry.accept(&named(2, 4), now), Ok(Accepted::New), "the places are free again");
}
