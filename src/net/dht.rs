//! Services in Kademlia: a provider record under the name says who provides it, and one signed
//! value for each provider says how.
//!
//! Nothing unverified is stored for others: values must be signed by the provider in their key
//! and newer than what is there.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use libp2p::kad::store::{MemoryStore, RecordStore};
use libp2p::kad::{
    self, AddProviderOk, GetProvidersOk, GetRecordOk, InboundRequest, QueryId, QueryResult, Quorum,
    Record, RecordKey,
};

use super::identity;
use crate::engine::event::{Input, RequestId};
use crate::engine::overlay::Roster;
use crate::engine::overlay::registry::{self, CLOCK_SKEW};
use crate::engine::overlay::wire::{self, GOSSIP_BYTES_MAX, ServiceRecord, Signed};
use crate::engine::types::{PublicKey, ServiceName, Timestamp};

/// Records and provided names kept for others; beyond, new ones are refused and counted.
pub const RECORDS_MAX: usize = 10_000;
/// Kademlia's k: how many nodes are responsible for a key (Maymounkov and Mazières, 2002).
pub const REPLICATION: usize = 20;
const PROVIDERS: &[u8] = b"/meshwise/providers/";
const SERVICE: &[u8] = b"/meshwise/service/";

type Kad = kad::Behaviour<MemoryStore>;

/// The key under which the providers of a name are found.
fn providers_key(name: &ServiceName) -> RecordKey {
    RecordKey::from([PROVIDERS, name.as_str().as_bytes()].concat())
}

/// The key under which one provider's record is found.
fn record_key(name: &ServiceName, provider: &PublicKey) -> RecordKey {
    RecordKey::from([SERVICE, name.as_str().as_bytes(), b"/", &provider.0].concat())
}

#[derive(Default)]
struct Put {
    record_done: bool,
    providing_done: bool,
    error: Option<String>,
}

struct Get {
    name: ServiceName,
    asked: BTreeSet<PublicKey>,
    running: usize,
    records: Vec<Vec<u8>>,
}

enum Query {
    Record(RequestId),
    Providing(RequestId),
    Providers(RequestId),
    Value(RequestId),
}

/// The queries under way.
#[derive(Default)]
pub struct Dht {
    queries: HashMap<QueryId, Query>,
    puts: BTreeMap<RequestId, Put>,
    gets: BTreeMap<RequestId, Get>,
}

impl Dht {
    /// Stores a record: done when a majority of the nodes that are responsible for it, as far as
    /// they are known, has acknowledged it. (Kademlia's acknowledgement says that the record
    /// arrived; a node that refuses it sends the same.) A node without peers stores it itself.
    pub fn put(
        &mut self,
        kad: &mut Kad,
        me: &PublicKey,
        request: RequestId,
        name: &ServiceName,
        bytes: Vec<u8>,
    ) -> Option<Input> {
        let record = wire::decode::<Signed>(&bytes, GOSSIP_BYTES_MAX).ok();
        let record = record.and_then(|signed| signed.open::<ServiceRecord>().ok());
        let withdrawn = record.as_ref().is_some_and(|record| record.withdrawn);
        let ttl_s = record.map_or(1, |record| record.ttl_s);
        let known: usize = kad.kbuckets().map(|bucket| bucket.num_entries()).sum();
        let majority = known.min(REPLICATION) / 2 + 1;
        let quorum = NonZeroUsize::new(majority.min(known.max(1))).map_or(Quorum::One, Quorum::N);
        let record = Record {
            key: record_key(name, me),
            value: bytes,
            publisher: None,
            expires: Some(Instant::now() + Duration::from_secs(u64::from(ttl_s)) + CLOCK_SKEW),
        };
        let started = kad.put_record(record, quorum).and_then(|query| {
            self.queries.insert(query, Query::Record(request));
            if withdrawn {
                // The tombstone takes the record's place; nobody is led to it any more.
                kad.stop_providing(&providers_key(name));
                return Ok(None);
            }
            kad.start_providing(providers_key(name)).map(Some)
        });
        match started {
            Ok(None) => None,
            Ok(Some(query)) if known > 0 => {
                self.queries.insert(query, Query::Providing(request));
                self.puts.insert(request, Put::default());
                None
            }
            Ok(Some(_)) => Some(Input::DhtStored { request, error: None }),
            Err(error) => Some(Input::DhtStored { request, error: Some(error.to_string()) }),
        }
    }

    /// Searches the records of a name.
    pub fn get(&mut self, kad: &mut Kad, request: RequestId, name: ServiceName) {
        let query = kad.get_providers(providers_key(&name));
        self.queries.insert(query, Query::Providers(request));
        let get = Get { name, asked: BTreeSet::new(), running: 1, records: Vec::new() };
        self.gets.insert(request, get);
    }

    /// Takes the progress of a query; returns what is to be told to the engine.
    pub fn progressed(
        &mut self,
        kad: &mut Kad,
        id: QueryId,
        result: QueryResult,
        last: bool,
        roster: &Roster,
        now: Timestamp,
    ) -> Option<Input> {
        let query = self.queries.get(&id)?;
        let input = match (query, result) {
            (Query::Record(request), QueryResult::PutRecord(result)) => {
                let error = result.err().map(|error| match error {
                    kad::PutRecordError::QuorumFailed { success, quorum, .. } => {
                        format!("{} of {quorum} nodes stored it", success.len())
                    }
                    kad::PutRecordError::Timeout { success, quorum, .. } => {
                        format!("{} of {quorum} nodes stored it in time", success.len())
                    }
                });
                self.put_step(*request, |put| {
                    put.record_done = true;
                    put.error = error;
                })
            }
            (Query::Providing(request), QueryResult::StartProviding(result)) => {
                let failed = !matches!(result, Ok(AddProviderOk { .. }));
                self.put_step(*request, |put| {
                    put.providing_done = true;
                    if failed {
                        put.error.get_or_insert_with(|| "nobody noted the provider".into());
                    }
                })
            }
            (Query::Providers(request), QueryResult::GetProviders(result)) => {
                let request = *request;
                if let Ok(GetProvidersOk::FoundProviders { providers, .. }) = result {
                    let keys = providers.iter().filter_map(identity::public_key);
                    self.ask_providers(kad, request, keys.collect(), id);
                }
                if last { self.get_step(request) } else { None }
            }
            (Query::Value(request), QueryResult::GetRecord(result)) => {
                let request = *request;
                // A node that answers with something else does not end the search.
                if let Ok(GetRecordOk::FoundRecord(found)) = result
                    && verify(&found.record, roster, now).is_ok()
                    && let Some(get) = self.gets.get_mut(&request)
                {
                    get.records.push(found.record.value);
                    if let Some(mut query) = kad.query_mut(&id) {
                        query.finish();
                    }
                }
                if last { self.get_step(request) } else { None }
            }
            _ => None,
        };
        if last {
            self.queries.remove(&id);
        }
        input
    }

    fn put_step(&mut self, request: RequestId, step: impl FnOnce(&mut Put)) -> Option<Input> {
        let put = self.puts.get_mut(&request)?;
        step(put);
        if put.record_done && put.providing_done {
            let error = self.puts.remove(&request)?.error;
            return Some(Input::DhtStored { request, error });
        }
        None
    }

    /// Asks for the records of providers that were not asked for yet, and stops searching for
    /// more: the first node that knows providers knows all of them, up to what it missed.
    fn ask_providers(
        &mut self,
        kad: &mut Kad,
        request: RequestId,
        keys: Vec<PublicKey>,
        id: QueryId,
    ) {
        let Some(get) = self.gets.get_mut(&request) else { return };
        if keys.is_empty() {
            return;
        }
        for key in keys {
            if get.asked.insert(key) {
                let query = kad.get_record(record_key(&get.name, &key));
                self.queries.insert(query, Query::Value(request));
                get.running += 1;
            }
        }
        if let Some(mut query) = kad.query_mut(&id) {
            query.finish();
        }
    }

    fn get_step(&mut self, request: RequestId) -> Option<Input> {
        let get = self.gets.get_mut(&request)?;
        get.running -= 1;
        if get.running > 0 {
            return None;
        }
        let records = self.gets.remove(&request)?.records;
        Some(Input::DhtFound { request, records })
    }
}

/// Stores what another node asks us to store, if it is valid. Returns why not.
pub fn inbound(
    kad: &mut Kad,
    request: InboundRequest,
    roster: &Roster,
    now: Timestamp,
) -> Result<(), &'static str> {
    match request {
        InboundRequest::PutRecord { record: Some(mut record), .. } => {
            let offered = verify(&record, roster, now)?;
            let known = kad.store_mut().get(&record.key).map(|known| known.into_owned());
            let known = known.and_then(|known| verify(&known, roster, now).ok());
            if known.is_some_and(|known| known.sequence > offered.sequence) {
                return Err("dht-record-stale");
            }
            // Not longer than the record itself says, whatever its sender says.
            let ends_at =
                offered.issued_at + Duration::from_secs(u64::from(offered.ttl_s)) + CLOCK_SKEW;
            let ends = Instant::now() + ends_at.since(now);
            record.expires = Some(record.expires.map_or(ends, |expires| expires.min(ends)));
            kad.store_mut().put(record).map_err(|_| "dht-store-full")
        }
        InboundRequest::AddProvider { record: Some(provider) } => {
            if !provider.key.as_ref().starts_with(PROVIDERS) {
                return Err("dht-foreign-key");
            }
            kad.store_mut().add_provider(provider).map_err(|_| "dht-store-full")
        }
        _ => Ok(()),
    }
}

/// A valid record under its right key.
fn verify(record: &Record, roster: &Roster, now: Timestamp) -> Result<ServiceRecord, &'static str> {
    let signed: Signed =
        wire::decode(&record.value, GOSSIP_BYTES_MAX).map_err(|_| "dht-record-malformed")?;
    let service = registry::verify(&signed, roster, now).map_err(|_| "dht-record-invalid")?;
    if record.key != record_key(&service.name, &signed.key) {
        return Err("dht-foreign-key");
    }
    Ok(service)
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use libp2p::{PeerId, StreamProtocol};

    use super::*;
    use crate::engine::overlay::wire::{Objective, ServiceKind};
    use crate::engine::overlay::{Author, Credential};

    const NOW: Timestamp = Timestamp(1_000_000_000);

    /// Of key 9's network.
    fn key(byte: u8) -> Author {
        let key = SigningKey::from_bytes(&[byte; 32]);
        let root = SigningKey::from_bytes(&[9; 32]);
        let public = PublicKey(key.verifying_key().to_bytes());
        let credential = Credential::issue(&root, &public, NOW, NOW + CLOCK_SKEW);
        Author { key, credential }
    }

    fn public(byte: u8) -> PublicKey {
        key(byte).public()
    }

    fn roster() -> Roster {
        Roster::new(public(9), key(1).credential)
    }

    /// A record of provider 1, signed by `signer`, under the key of `under`.
    fn record(sequence: u64, signer: u8, under: u8) -> Record {
        let service = ServiceRecord {
            name: "a.local".parse().unwrap(),
            kind: ServiceKind::Tcp,
            owner: public(1),
            metadata: BTreeMap::new(),
            sequence,
            issued_at: NOW,
            ttl_s: 60,
            objective: Objective::Balanced,
            allowed: vec![],
            withdrawn: false,
        };
        let value = wire::encode(&Signed::seal(&key(signer), &service));
        Record::new(record_key(&service.name, &public(under)), value)
    }

    fn kad() -> Kad {
        let me = PeerId::random();
        let config = kad::Config::new(StreamProtocol::new("/test/kad"));
        kad::Behaviour::with_config(me, MemoryStore::new(me), config)
    }

    #[test]
    fn only_valid_records_under_their_own_key_are_stored_and_older_ones_replace_nothing() {
        let mut kad = kad();
        let mut store = |record: Record| {
            let source = PeerId::random();
            let connection = libp2p::swarm::ConnectionId::new_unchecked(1);
            let request = InboundRequest::PutRecord { source, connection, record: Some(record) };
            inbound(&mut kad, request, &roster(), NOW)
        };
        assert_eq!(store(record(5, 1, 1)), Ok(()));
        assert_eq!(store(record(4, 1, 1)), Err("dht-record-stale"));
        assert_eq!(store(record(6, 2, 1)), Err("dht-record-invalid"), "signed by somebody else");
        assert_eq!(store(record(6, 1, 2)), Err("dht-foreign-key"));
        let mut garbage = record(6, 1, 1);
        garbage.value.truncate(20);
        assert_eq!(store(garbage), Err("dht-record-malformed"));
        assert_eq!(store(record(6, 1, 1)), Ok(()));
        let key = record_key(&"a.local".parse().unwrap(), &public(1));
        let stored = kad.store_mut().get(&key).unwrap().into_owned();
        assert_eq!(verify(&stored, &roster(), NOW).unwrap().sequence, 6);
        let ends = stored.expires.unwrap().duration_since(Instant::now());
        assert!(ends <= Duration::from_secs(60) + CLOCK_SKEW, "not longer than it says");
    }

    #[test]
    fn names_that_are_no_services_are_not_provided_for() {
        let mut kad = kad();
        let provider = |key: RecordKey| InboundRequest::AddProvider {
            record: Some(kad::ProviderRecord::new(key, PeerId::random(), vec![])),
        };
        let foreign = provider(RecordKey::new(&"something"));
        assert_eq!(inbound(&mut kad, foreign, &roster(), NOW), Err("dht-foreign-key"));
        let ours = provider(providers_key(&"a.local".parse().unwrap()));
        assert_eq!(inbound(&mut kad, ours, &roster(), NOW), Ok(()));
    }
}
