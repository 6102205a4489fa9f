use std::sync::Arc;

use arc_swap::ArcSwap;
use ed25519_dalek::SigningKey;
use futures::StreamExt;
use libp2p::kad::ProviderRecord;
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, Swarm, SwarmBuilder, noise, tcp, yamux};

use super::checked::Limits;
use super::*;
use crate::engine::overlay::membership::{Membership, Revocation};
use crate::engine::overlay::wire::{Objective, ServiceKind};
use crate::engine::overlay::{Author, Credential};

const NOW: Timestamp = Timestamp(1_000_000_000_000);

/// Of key 9's network.
fn key(byte: u8) -> Author {
    let key = SigningKey::from_bytes(&[byte; 32]);
    let root = SigningKey::from_bytes(&[9; 32]);
    let public = PublicKey(key.verifying_key().to_bytes());
    let credential = Credential::issue(&root, &public, NOW, NOW + 1_000 * CLOCK_SKEW);
    Author { key, credential }
}

fn public(byte: u8) -> PublicKey {
    key(byte).public()
}

fn peer(byte: u8) -> PeerId {
    identity::peer_id(&public(byte)).unwrap()
}

fn service(sequence: u64) -> ServiceRecord {
    ServiceRecord {
        name: "a.local".parse().unwrap(),
        kind: ServiceKind::Tcp,
        owner: public(1),
        delegation: None,
        metadata: BTreeMap::new(),
        sequence,
        issued_at: NOW,
        ttl_s: 60,
        objective: Objective::Balanced,
        allowed: vec![],
        withdrawn: false,
    }
}

/// A record signed by `signer`, under the key of `under`.
fn sealed(service: &ServiceRecord, signer: u8, under: u8) -> Record {
    let value = wire::encode(&Signed::seal(&key(signer), service));
    Record::new(record_key(&service.name, &public(under)), value)
}

fn record(sequence: u64, signer: u8, under: u8) -> Record {
    sealed(&service(sequence), signer, under)
}

fn store_at(clock: fn() -> Timestamp) -> CheckedStore {
    let roster = Roster::new(public(9), key(1).credential);
    CheckedStore::new(peer(8), Arc::new(ArcSwap::from_pointee(roster)), clock)
}

fn store() -> CheckedStore {
    store_at(|| NOW)
}

/// Why the store refused; nothing when it did not.
fn put(store: &mut CheckedStore, record: Record) -> Option<&'static str> {
    store.put(record).err().map(|_| store.last_refused())
}

#[test]
fn only_valid_records_under_their_own_key_are_stored_and_older_ones_replace_nothing() {
    let mut store = store();
    assert_eq!(put(&mut store, record(5, 1, 1)), None);
    assert_eq!(put(&mut store, record(4, 1, 1)), Some("dht-record-stale"));
    assert_eq!(put(&mut store, record(6, 2, 1)), Some("dht-record-invalid"), "by somebody else");
    assert_eq!(put(&mut store, record(6, 1, 2)), Some("dht-foreign-key"));
    let mut garbage = record(6, 1, 1);
    garbage.value.truncate(20);
    assert_eq!(put(&mut store, garbage), Some("dht-record-malformed"));
    let stranger = Author { credential: Credential::default(), ..key(3) };
    let its = ServiceRecord { owner: public(3), ..service(1) };
    let value = wire::encode(&Signed::seal(&stranger, &its));
    let its = Record::new(record_key(&its.name, &public(3)), value);
    assert_eq!(put(&mut store, its), Some("dht-record-invalid"), "no member");
    assert_eq!(put(&mut store, record(6, 1, 1)), None);
    assert_eq!(put(&mut store, record(6, 1, 1)), None, "the same again, by another node");
    let twin = ServiceRecord { ttl_s: 61, ..service(6) };
    assert_eq!(put(&mut store, sealed(&twin, 1, 1)), Some("dht-record-stale"));
    let stored = store.get(&record_key(&service(1).name, &public(1))).unwrap().into_owned();
    let ends = stored.expires.unwrap().duration_since(Instant::now());
    assert!(ends <= Duration::from_secs(60) + CLOCK_SKEW, "not longer than it says");
    let roster = Roster::new(public(9), key(1).credential);
    assert_eq!(checked::verify(&stored, &roster, NOW).unwrap().service.sequence, 6);
    assert_eq!(store.take_refused().values().sum::<u64>(), 6);
    assert!(store.take_refused().is_empty());
}

#[test]
fn a_tombstone_stays_as_long_as_what_it_replaced_could_be_replayed() {
    let mut store = store();
    let long = ServiceRecord { ttl_s: 86_400, ..service(1) };
    assert_eq!(put(&mut store, sealed(&long, 1, 1)), None);
    let gone = ServiceRecord { withdrawn: true, ttl_s: 3, ..service(2) };
    assert_eq!(put(&mut store, sealed(&gone, 1, 1)), None);
    store.expire(Instant::now() + Duration::from_secs(80_000));
    assert_eq!(put(&mut store, sealed(&long, 1, 1)), Some("dht-record-stale"));
    store.expire(Instant::now() + Duration::from_secs(90_000));
    assert_eq!(store.records().count(), 0);
    assert_eq!(put(&mut store, sealed(&long, 1, 1)), None, "the place is free");
}

#[test]
fn a_provider_that_floods_the_store_pushes_nobody_out_and_who_is_put_out_leaves() {
    let mut store = store();
    let limits = Limits { records: 6, records_per_provider: 4, ..Limits::default() };
    store.set_limits(limits);
    let named = |provider: u8, index: u32| {
        let name = format!("{index}.of-{provider}.local").parse().unwrap();
        let owner = public(provider);
        let service = ServiceRecord { name, owner, ttl_s: 100 - index, ..service(1) };
        sealed(&service, provider, provider)
    };
    for index in 0..4 {
        assert_eq!(put(&mut store, named(2, index)), None);
    }
    assert_eq!(put(&mut store, named(2, 4)), Some("dht-too-many-of-one"));
    for index in 0..3 {
        assert_eq!(put(&mut store, named(1, index)), None);
    }
    assert_eq!(store.records().count(), 6);
    let first = record_key(&"3.of-2.local".parse().unwrap(), &public(2));
    assert!(store.get(&first).is_none(), "the largest made room: what would have ended first");
    assert_eq!(put(&mut store, named(2, 3)), Some("dht-store-full"));
    store.remove(&record_key(&"0.of-1.local".parse().unwrap(), &public(1)));
    assert_eq!(put(&mut store, named(2, 3)), None);

    let mut membership = Membership::new(Roster::new(public(9), key(1).credential));
    let root = Author::root(SigningKey::from_bytes(&[9; 32]));
    membership.revoke(&Signed::seal(&root, &Revocation { key: public(2), at: NOW })).unwrap();
    store.set_members(membership.roster().clone());
    store
        .add_provider(ProviderRecord::new(providers_key(&service(1).name), peer(1), vec![]))
        .unwrap();
    let provided = providers_key(&service(1).name);
    assert!(store.add_provider(ProviderRecord::new(provided.clone(), peer(2), vec![])).is_err());
    store.expire(Instant::now());
    assert_eq!((store.records().count(), store.providers(&provided).len()), (2, 1));
}

#[test]
fn providers_are_noted_under_hashes_of_names_and_boundedly() {
    let mut store = store();
    let limits = Limits { provided_per_peer: 3, providers_per_name: 2, ..Limits::default() };
    store.set_limits(limits);
    let add = |store: &mut CheckedStore, key: RecordKey, provider: u8| {
        let record = ProviderRecord::new(key, peer(provider), vec![]);
        store.add_provider(record).err().map(|_| store.last_refused())
    };
    assert_eq!(add(&mut store, RecordKey::new(&"something"), 1), Some("dht-foreign-key"));
    let named = |text: &str| providers_key(&text.parse().unwrap());
    assert_eq!(add(&mut store, named("a.local"), 1), None);
    assert_eq!(add(&mut store, named("a.local"), 1), None, "again");
    assert_eq!(add(&mut store, named("a.local"), 2), None);
    assert_eq!(add(&mut store, named("a.local"), 3), Some("dht-store-full"));
    assert_eq!(add(&mut store, named("b.local"), 1), None);
    assert_eq!(add(&mut store, named("c.local"), 1), None);
    assert_eq!(add(&mut store, named("d.local"), 1), Some("dht-too-many-of-one"));
    store.remove_provider(&named("c.local"), &peer(1));
    assert_eq!(add(&mut store, named("d.local"), 1), None);
    let expired = ProviderRecord {
        expires: Some(Instant::now()),
        ..ProviderRecord::new(named("d.local"), peer(2), vec![])
    };
    store.add_provider(expired).unwrap();
    assert_eq!(store.providers(&named("d.local")).len(), 2);
    store.expire(Instant::now());
    assert_eq!(store.providers(&named("d.local")).len(), 1);
    assert_eq!(add(&mut store, named("a.local"), 8), Some("dht-store-full"));
    assert_eq!(add(&mut store, named("b.local"), 8), None);
    assert_eq!(store.provided().count(), 1, "its own");
}

#[test]
fn a_name_is_asked_for_by_a_multihash() {
    let key = providers_key(&"a.local".parse().unwrap());
    assert_eq!(key.as_ref().len(), 34);
    assert_eq!(key.as_ref()[..2], [0x12, 0x20], "sha2-256, 32 bytes");
    assert_eq!(key.as_ref()[2..], Sha256::digest(b"/meshwise/providers/a.local")[..]);
}

#[test]
fn the_newest_of_the_answers_wins_and_the_second_is_waited_for_shortly() {
    let begun = Instant::now();
    let name: ServiceName = "a.local".parse().unwrap();
    let mut get = Get::new(name, false, begun);
    get.providers.insert(public(1), Found::default());
    get.providers.insert(public(2), Found::default());
    assert!(!get.answered(&public(1), 5, vec![5], None), "what is stored here hurries nothing");
    assert_eq!(get.ends_at, begun + GET_TIMEOUT);
    let ms = |ms: u64| begun + Duration::from_millis(ms);
    assert!(get.answered(&public(1), 4, vec![4], Some(ms(10))), "two have answered");
    assert_eq!(get.ends_at, ms(10) + GRACE_INCOMPLETE);
    assert!(!get.answered(&public(2), 1, vec![1], Some(ms(20))));
    assert_eq!(get.ends_at, ms(20) + GRACE, "everything is here once");
    get.answered(&public(2), 7, vec![7], Some(ms(30)));
    let mut records = get.records();
    records.sort();
    assert_eq!(records, [vec![5], vec![7]]);

    let mut far = Get::new("a.local".parse().unwrap(), false, begun);
    far.providers.insert(public(1), Found::default());
    far.answered(&public(1), 1, vec![1], Some(ms(400)));
    assert_eq!(far.ends_at, ms(800), "as long again as the first one took");
}

/// A node that speaks nothing but Kademlia, on loopback.
async fn node(byte: u8, clock: fn() -> Timestamp) -> (Swarm<Kad>, Multiaddr) {
    let mut secret = [byte; 32];
    let pair = libp2p::identity::Keypair::ed25519_from_bytes(&mut secret).unwrap();
    let roster = Roster::new(public(9), key(1).credential);
    let members: Members = Arc::new(ArcSwap::from_pointee(roster));
    let kad = with_clock(StreamProtocol::new("/test/kad"), peer(byte), members, clock);
    let mut swarm = SwarmBuilder::with_existing_identity(pair)
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|_| kad)
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(GET_TIMEOUT))
        .build();
    swarm.listen_on("/ip4/127.0.0.1/tcp/0".parse().unwrap()).unwrap();
    loop {
        if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
            return (swarm, address);
        }
    }
}

/// Runs a node until its DHT says something; the others answer.
async fn until_input(me: &mut Swarm<Kad>, dht: &mut Dht, others: Vec<Swarm<Kad>>) -> Input {
    let mut tasks = tokio::task::JoinSet::new();
    for mut other in others {
        tasks.spawn(async move {
            loop {
                other.select_next_some().await;
            }
        });
    }
    let roster = Roster::new(public(9), key(1).credential);
    loop {
        let due = tokio::time::Instant::from_std(dht.next_timeout());
        let input = tokio::select! {
            () = tokio::time::sleep_until(due) => {
                dht.handle_timeout(me.behaviour_mut(), Instant::now()).pop()
            }
            event = me.select_next_some() => match event {
                SwarmEvent::Behaviour(kad::Event::OutboundQueryProgressed { id, result, step, .. }) => {
                    dht.progressed(me.behaviour_mut(), id, result, step.last, &roster, NOW)
                }
                _ => None,
            },
        };
        if let Some(input) = input {
            return input;
        }
    }
}

#[tokio::test]
async fn who_refuses_a_record_does_not_count_as_having_stored_it() {
    let late: fn() -> Timestamp = || NOW + 10 * CLOCK_SKEW;
    for (clock, stored) in [((|| NOW) as fn() -> Timestamp, true), (late, false)] {
        let (mut me, _) = node(1, || NOW).await;
        let (other, address) = node(2, clock).await;
        me.behaviour_mut().add_address(&peer(2), address);
        let bytes = wire::encode(&Signed::seal(&key(1), &service(1)));
        let mut dht = Dht::default();
        let name = service(1).name;
        let at_once = dht.put(me.behaviour_mut(), &public(1), 7, &name, bytes);
        assert!(at_once.is_none());
        let input = until_input(&mut me, &mut dht, vec![other]).await;
        let Input::DhtStored { request: 7, error } = input else { panic!("it was a put") };
        assert_eq!(error.is_none(), stored, "{error:?}");
    }
}

/// Where nobody listens.
fn nowhere() -> Multiaddr {
    "/ip4/127.0.0.1/tcp/1".parse().unwrap()
}

#[tokio::test]
async fn when_most_of_those_that_are_known_are_gone_those_that_are_found_decide() {
    let (mut me, _) = node(1, || NOW).await;
    let (other, address) = node(2, || NOW).await;
    me.behaviour_mut().add_address(&peer(2), address);
    for gone in [3, 4, 5] {
        me.behaviour_mut().add_address(&peer(gone), nowhere());
    }
    let bytes = wire::encode(&Signed::seal(&key(1), &service(1)));
    let mut dht = Dht::default();
    dht.put(me.behaviour_mut(), &public(1), 7, &service(1).name, bytes);
    let input = until_input(&mut me, &mut dht, vec![other]).await;
    assert!(matches!(input, Input::DhtStored { request: 7, error: None }));
    assert!(dht.spreads.is_empty());
}

#[tokio::test]
async fn nodes_that_only_the_search_finds_get_the_record_too() {
    let (mut me, _) = node(1, || NOW).await;
    let (mut known, address) = node(2, || NOW).await;
    let (mut far, far_address) = node(3, || NOW).await;
    me.behaviour_mut().add_address(&peer(2), address);
    known.behaviour_mut().add_address(&peer(3), far_address);
    let bytes = wire::encode(&Signed::seal(&key(1), &service(1)));
    let mut dht = Dht::default();
    let name = service(1).name;
    dht.put(me.behaviour_mut(), &public(1), 7, &name, bytes);
    let arrives = async {
        let key = record_key(&name, &public(1));
        while far.behaviour_mut().store_mut().get(&key).is_none() {
            far.select_next_some().await;
        }
    };
    let runs = async {
        let mut told = 0;
        let roster = Roster::new(public(9), key(1).credential);
        loop {
            let event = tokio::select! {
                event = me.select_next_some() => event,
                _ = known.select_next_some() => continue,
            };
            if let SwarmEvent::Behaviour(kad::Event::OutboundQueryProgressed {
                id,
                result,
                step,
                ..
            }) = event
            {
                let kad = me.behaviour_mut();
                told +=
                    usize::from(dht.progressed(kad, id, result, step.last, &roster, NOW).is_some());
                assert!(told <= 1, "said once");
            }
        }
    };
    tokio::select! {
        () = arrives => {}
        () = runs => {}
        () = tokio::time::sleep(Duration::from_secs(30)) => panic!("it did not arrive"),
    }
}

#[tokio::test]
async fn one_node_that_kept_an_old_record_does_not_bring_it_back() {
    let (mut me, _) = node(4, || NOW).await;
    let name = service(1).name;
    let mut others = Vec::new();
    for (byte, sequence) in [(2, 1), (3, 2)] {
        let (mut other, address) = node(byte, || NOW).await;
        let store = other.behaviour_mut().store_mut();
        store.put(record(sequence, 1, 1)).unwrap();
        // Kademlia names no provider without an address.
        let somewhere = vec!["/ip4/127.0.0.1/tcp/1".parse().unwrap()];
        let provider = ProviderRecord::new(providers_key(&name), peer(1), somewhere);
        store.add_provider(provider).unwrap();
        me.behaviour_mut().add_address(&peer(byte), address);
        others.push(other);
    }
    let mut dht = Dht::default();
    dht.get(me.behaviour_mut(), 7, name);
    let input = until_input(&mut me, &mut dht, others).await;
    let Input::DhtFound { request: 7, records } = input else { panic!("it was a get") };
    let found: Vec<u64> = records
        .iter()
        .map(|bytes| wire::decode::<Signed>(bytes, GOSSIP_BYTES_MAX).unwrap())
        .map(|signed| signed.open::<ServiceRecord>().unwrap().sequence)
        .collect();
    assert_eq!(found, [2]);
    assert!(dht.gets.is_empty());
}

#[tokio::test]
async fn a_provider_that_this_node_does_not_know_of_yet_is_found_beside_those_that_it_does() {
    let (mut me, _) = node(4, || NOW).await;
    let name = service(1).name;
    let somewhere: Vec<Multiaddr> = vec!["/ip4/127.0.0.1/tcp/1".parse().unwrap()];
    let note = |store: &mut CheckedStore, byte: u8| {
        let key = providers_key(&service(1).name);
        store.add_provider(ProviderRecord::new(key, peer(byte), somewhere.clone())).unwrap();
    };
    let by_5 = ServiceRecord { owner: public(5), ..service(1) };
    note(me.behaviour_mut().store_mut(), 1);
    let mut others = Vec::new();
    for (byte, provider) in [(2, 1), (3, 5)] {
        let (mut other, address) = node(byte, || NOW).await;
        let store = other.behaviour_mut().store_mut();
        store.put(record(1, 1, 1)).unwrap();
        store.put(sealed(&by_5, 5, 5)).unwrap();
        note(store, provider);
        me.behaviour_mut().add_address(&peer(byte), address);
        others.push(other);
    }
    let mut dht = Dht::default();
    dht.get(me.behaviour_mut(), 7, name);
    let input = until_input(&mut me, &mut dht, others).await;
    let Input::DhtFound { request: 7, records } = input else { panic!("it was a get") };
    assert_eq!(records.len(), 2);
}
