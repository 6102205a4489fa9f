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
                let found = match result {
                    Ok(GetRecordOk::FoundRecord(found)) => Some(found.record.value),
                    _ => None,
                };
                if found.is_some() && !last {
                    // One record that verifies is enough; the engine checks it again.
                    if let Some(mut query) = kad.query_mut(&id) {
                        query.finish();
                    }
                }
                if let (Some(value), Some(get)) = (found, self.gets.get_mut(&request)) {
                    get.records.push(value);
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
pub fn inbound(kad: &mut Kad, request: InboundRequest, now: Timestamp) -> Result<(), &'static str> {
    match request {
        InboundRequest::PutRecord { record: Some(mut record), .. } => {
            let offered = verify(&record, now)?;
            let known = kad.store_mut().get(&record.key).map(|known| known.into_owned());
            let known = known.and_then(|known| verify(&known, now).ok());
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
fn verify(record: &Record, now: Timestamp) -> Result<ServiceRecord, &'static str> {
    let signed: Signed =
        wire::decode(&record.value, GOSSIP_BYTES_MAX).map_err(|_| "dht-record-malformed")?;
    let service = registry::verify(&signed, now).map_err(|_| "dht-record-invalid")?;
    if record.key != record_key(&service.name, &signed.key) {
        return Err("dht-foreign-key");
    }
    Ok(service)
}
