//! Services in Kademlia: a provider record under the name says who provides it, and one signed
//! value for each provider says how.
//!
//! - **Publishing** is done when a majority of the nodes that are responsible for a record, as far as they
//!   are known, have checked and stored it (`checked`): the nearest of those that this node knows are
//!   asked at once. Then it searches for nearer ones, which get the record too; when there was no
//!   majority before, that of those it finds decides.
//! - **Reading** waits for [`ANSWERS`] other nodes that know providers, and for [`ANSWERS`] copies of each
//!   provider's record, and takes the newest: one node that kept an old record cannot bring it
//!   back. Once every provider's record is here in one copy it waits as long again as that took, at least
//!   [`GRACE`]; once there is any, at least [`GRACE_INCOMPLETE`]; and [`GET_TIMEOUT`] in all. What this
//!   node itself stores counts as one answer and hurries nothing.

mod checked;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use libp2p::kad::store::RecordStore;
use libp2p::kad::{
    self, AddProviderOk, GetProvidersOk, GetRecordOk, QueryId, QueryResult, Quorum, Record,
    RecordKey,
};
use libp2p::{PeerId, StreamProtocol};
use sha2::{Digest, Sha256};

use super::{Members, identity};
use crate::engine::event::{Input, RequestId};
use crate::engine::overlay::Roster;
use crate::engine::overlay::registry::CLOCK_SKEW;
use crate::engine::overlay::wire::{self, GOSSIP_BYTES_MAX, ServiceRecord, Signed, TTL_S_MAX};
use crate::engine::types::{PublicKey, ServiceName, Timestamp};

pub use checked::{CheckedStore, RECORDS_MAX};

/// Kademlia's k: how many nodes are responsible for a key (Maymounkov and Mazières, 2002).
pub const REPLICATION: usize = 20;
/// Nodes that a search asks at a time. Kademlia has 3; with 10, as go-libp2p asks, the twenty nearest are
/// found in two or three round trips instead of seven.
pub const PARALLELISM: NonZeroUsize = NonZeroUsize::new(10).expect("10 is not 0");
/// How many nodes have to say the same thing, each in its own version, before the newest counts.
pub const ANSWERS: usize = 2;
/// How long a second answer is waited for at least when everything is here once: long enough for a
/// slower node of those that are asked at a time.
pub const GRACE: Duration = Duration::from_millis(50);
/// How long the rest is waited for at least when something is here.
pub const GRACE_INCOMPLETE: Duration = Duration::from_millis(250);
/// How long one search may take.
pub const GET_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a publication waits, once its record is stored, until the provider is noted everywhere:
/// nobody acknowledges that.
pub const PROVIDING_GRACE: Duration = Duration::from_millis(100);
/// How often expired records are removed.
pub const SWEEP: Duration = Duration::from_secs(10);
/// Most providers whose records one search asks for.
const PROVIDERS_ASKED_MAX: usize = checked::PROVIDERS_PER_NAME_MAX;
const PROVIDERS: &[u8] = b"/meshwise/providers/";
const SERVICE: &[u8] = b"/meshwise/service/";
/// A multihash says which hash it is, and how long: SHA2-256, 32 bytes.
const SHA2_256: [u8; 2] = [0x12, 32];

/// Kademlia over checked records.
pub type Kad = kad::Behaviour<CheckedStore>;

/// Kademlia as a server, with every limit set.
pub fn behaviour(protocol: StreamProtocol, me: PeerId, members: Members) -> Kad {
    with_clock(protocol, me, members, super::now)
}

fn with_clock(
    protocol: StreamProtocol,
    me: PeerId,
    members: Members,
    clock: fn() -> Timestamp,
) -> Kad {
    let mut config = kad::Config::new(protocol);
    config
        // What is put goes through the store, which refuses; only so is an acknowledgement honest.
        .set_record_filtering(kad::StoreInserts::Unfiltered)
        .set_query_timeout(Duration::from_secs(15))
        .set_parallelism(PARALLELISM)
        .set_record_ttl(Some(Duration::from_secs(u64::from(TTL_S_MAX)) + CLOCK_SKEW))
        .set_provider_record_ttl(Some(checked::PROVIDER_TTL))
        .set_max_packet_size(4 * GOSSIP_BYTES_MAX);
    let store = CheckedStore::new(me, members, clock);
    let mut kad = Kad::with_config(me, store, config);
    kad.set_mode(Some(kad::Mode::Server));
    kad
}

/// The key under which the providers of a name are found: a multihash, so that implementations that
/// ask by content identifier can ask too.
fn providers_key(name: &ServiceName) -> RecordKey {
    let digest = Sha256::digest([PROVIDERS, name.as_str().as_bytes()].concat());
    RecordKey::from([&SHA2_256[..], &digest].concat())
}

fn is_providers_key(key: &RecordKey) -> bool {
    let key = key.as_ref();
    key.len() == SHA2_256.len() + 32 && key.starts_with(&SHA2_256)
}

/// The key under which one provider's record is found.
fn record_key(name: &ServiceName, provider: &PublicKey) -> RecordKey {
    RecordKey::from([SERVICE, name.as_str().as_bytes(), b"/", &provider.0].concat())
}

#[derive(Default)]
struct Put {
    record_done_at: Option<Instant>,
    providing_done: bool,
    error: Option<String>,
}

/// A record on its way to those who are responsible for it.
struct Spread {
    request: RequestId,
    record: Record,
    /// A majority of them did.
    stored: bool,
}

/// What was found of one provider so far.
#[derive(Default)]
struct Found {
    answers: usize,
    /// Sequence number and bytes.
    newest: Option<(u64, Vec<u8>)>,
}

struct Get {
    name: ServiceName,
    /// Answers that named providers, and how many are enough.
    lists: usize,
    lists_wanted: usize,
    providers: BTreeMap<PublicKey, Found>,
    running: usize,
    began_at: Instant,
    ends_at: Instant,
}

impl Get {
    /// `knows` says whether this node's own store names providers, which is the first answer then and
    /// counts for nothing: a new provider may not have reached it.
    fn new(name: ServiceName, knows: bool, now: Instant) -> Self {
        Self {
            name,
            lists: 0,
            lists_wanted: ANSWERS + usize::from(knows),
            providers: BTreeMap::new(),
            running: 1,
            began_at: now,
            ends_at: now + GET_TIMEOUT,
        }
    }

    /// Takes one answer about a provider, `at` when it came from another node. Returns whether enough
    /// have answered.
    fn answered(
        &mut self,
        provider: &PublicKey,
        sequence: u64,
        bytes: Vec<u8>,
        at: Option<Instant>,
    ) -> bool {
        let Some(found) = self.providers.get_mut(provider) else { return true };
        found.answers += 1;
        if found.newest.as_ref().is_none_or(|(known, _)| *known < sequence) {
            found.newest = Some((sequence, bytes));
        }
        let enough = found.answers >= ANSWERS;
        if let Some(now) = at {
            let complete = self.providers.values().all(|found| found.answers > 0);
            let grace = if complete { GRACE } else { GRACE_INCOMPLETE };
            self.ends_at = self.ends_at.min(now + grace.max(now - self.began_at));
        }
        enough
    }

    fn records(self) -> Vec<Vec<u8>> {
        let newest = self.providers.into_values().filter_map(|found| found.newest);
        newest.map(|(_, bytes)| bytes).collect()
    }
}

#[derive(Clone, Copy)]
enum Query {
    /// The record of this spread, to the nearest nodes that are known.
    Record(u64),
    /// The search for nearer ones.
    Nearest(u64),
    /// The record, to those that were found, when there was no majority before.
    Again(u64),
    Providing(RequestId),
    Providers(RequestId),
    Value(RequestId, PublicKey),
}

/// The queries under way.
pub struct Dht {
    queries: HashMap<QueryId, Query>,
    puts: BTreeMap<RequestId, Put>,
    /// By a number of their own: publications that nobody waits for have no other.
    spreads: BTreeMap<u64, Spread>,
    next_spread: u64,
    gets: BTreeMap<RequestId, Get>,
    sweep_at: Instant,
}

impl Default for Dht {
    fn default() -> Self {
        Self {
            queries: HashMap::new(),
            puts: BTreeMap::new(),
            spreads: BTreeMap::new(),
            next_spread: 0,
            gets: BTreeMap::new(),
            sweep_at: Instant::now() + SWEEP,
        }
    }
}

impl Dht {
    /// Stores a record: done when a majority of the nodes that are responsible for it, as far as
    /// they are known, has stored it. A node without peers stores it itself.
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
        let record = Record {
            key: record_key(name, me),
            value: bytes,
            publisher: identity::peer_id(me),
            expires: Some(Instant::now() + Duration::from_secs(u64::from(ttl_s)) + CLOCK_SKEW),
        };
        let target = kad::KBucketKey::new(record.key.clone());
        let nearest: BTreeSet<PeerId> = kad
            .get_closest_local_peers(&target)
            .take(REPLICATION)
            .map(kad::KBucketKey::into_preimage)
            .collect();
        let known = nearest.len();
        let started = kad.store_mut().put(record.clone()).and_then(|()| {
            if known > 0 {
                let query = put_to(kad, &record, &nearest, majority(known));
                let spread = Spread { request, record, stored: false };
                self.next_spread += 1;
                self.spreads.insert(self.next_spread, spread);
                self.queries.insert(query, Query::Record(self.next_spread));
            }
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
            Err(_) => {
                let why = kad.store_mut().last_refused();
                let error = format!("this node's own store refused it ({why})");
                Some(Input::DhtStored { request, error: Some(error) })
            }
        }
    }

    /// Searches the records of a name.
    pub fn get(&mut self, kad: &mut Kad, request: RequestId, name: ServiceName) {
        let key = providers_key(&name);
        let query = kad.get_providers(key.clone());
        // Asking has removed those that have expired.
        let knows = !kad.store_mut().providers(&key).is_empty();
        self.queries.insert(query, Query::Providers(request));
        self.gets.insert(request, Get::new(name, knows, Instant::now()));
    }

    /// When [`Dht::handle_timeout`] wants to be called.
    pub fn next_timeout(&self) -> Instant {
        let puts = self.puts.values().filter_map(|put| put.record_done_at);
        let puts = puts.map(|at| at + PROVIDING_GRACE);
        let gets = self.gets.values().map(|get| get.ends_at);
        puts.chain(gets).fold(self.sweep_at, Instant::min)
    }

    /// Ends what has taken long enough, and removes what has expired. Returns what is to be told to
    /// the engine.
    pub fn handle_timeout(&mut self, kad: &mut Kad, now: Instant) -> Vec<Input> {
        if self.sweep_at <= now {
            self.sweep_at = now + SWEEP;
            kad.store_mut().expire(now);
        }
        let late = self.gets.iter().filter(|(_, get)| get.ends_at <= now);
        let late: Vec<RequestId> = late.map(|(request, _)| *request).collect();
        let mut inputs: Vec<Input> =
            late.into_iter().filter_map(|request| self.end_get(kad, request)).collect();
        let is_late = |put: &Put| put.record_done_at.is_some_and(|at| at + PROVIDING_GRACE <= now);
        let late = self.puts.iter().filter(|(_, put)| is_late(put));
        let late: Vec<RequestId> = late.map(|(request, _)| *request).collect();
        for request in late {
            let error = self.puts.remove(&request).and_then(|put| put.error);
            inputs.push(Input::DhtStored { request, error });
        }
        inputs
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
        let query = *self.queries.get(&id)?;
        if last {
            self.queries.remove(&id);
        }
        match (query, result) {
            (Query::Record(spread), QueryResult::PutRecord(result)) => {
                let under_way = self.spreads.get_mut(&spread)?;
                under_way.stored = result.is_ok();
                let (request, key) = (under_way.request, under_way.record.key.clone());
                let query = kad.get_closest_peers(key.to_vec());
                self.queries.insert(query, Query::Nearest(spread));
                match result {
                    Ok(_) => self.record_done(request, None),
                    Err(_) => None,
                }
            }
            (Query::Nearest(spread), QueryResult::GetClosestPeers(result)) => {
                let found = match result {
                    Ok(found) => found.peers,
                    Err(kad::GetClosestPeersError::Timeout { peers, .. }) => peers,
                };
                let under_way = self.spreads.get(&spread)?;
                let found: BTreeSet<PeerId> = found.into_iter().map(|peer| peer.peer_id).collect();
                if under_way.stored || found.is_empty() {
                    let Spread { request, record, stored, .. } = self.spreads.remove(&spread)?;
                    // Those asked before too: who had to be dialled first may not have got it.
                    if !found.is_empty() {
                        put_to(kad, &record, &found, Quorum::One);
                    }
                    let nobody = (!stored).then(|| "nobody stored it".to_owned());
                    return nobody.and_then(|why| self.record_done(request, Some(why)));
                }
                let query = put_to(kad, &under_way.record, &found, majority(found.len()));
                self.queries.insert(query, Query::Again(spread));
                None
            }
            (Query::Again(spread), QueryResult::PutRecord(result)) => {
                let request = self.spreads.remove(&spread)?.request;
                let error = result.err().map(|error| match error {
                    kad::PutRecordError::QuorumFailed { success, quorum, .. } => {
                        format!("{} of {quorum} nodes stored it", success.len())
                    }
                    kad::PutRecordError::Timeout { success, quorum, .. } => {
                        format!("{} of {quorum} nodes stored it in time", success.len())
                    }
                });
                self.record_done(request, error)
            }
            (Query::Providing(request), QueryResult::StartProviding(result)) => {
                let failed = !matches!(result, Ok(AddProviderOk { .. }));
                self.put_step(request, |put| {
                    put.providing_done = true;
                    if failed {
                        put.error.get_or_insert_with(|| "nobody noted the provider".into());
                    }
                })
            }
            (Query::Providers(request), QueryResult::GetProviders(result)) => {
                if let Ok(GetProvidersOk::FoundProviders { providers, .. }) = result {
                    let keys = providers.iter().filter_map(identity::public_key).collect();
                    if self.ask_providers(kad, request, keys) && !last {
                        finish(kad, id);
                    }
                }
                if last { self.get_step(request) } else { None }
            }
            (Query::Value(request, provider), QueryResult::GetRecord(result)) => {
                // A node that answers with something else does not end the search.
                if let Ok(GetRecordOk::FoundRecord(found)) = result
                    && let Ok(valid) = checked::verify(&found.record, roster, now)
                    && valid.provider == provider
                    && let Some(get) = self.gets.get_mut(&request)
                {
                    let (sequence, bytes) = (valid.service.sequence, found.record.value);
                    let at = found.peer.map(|_| Instant::now());
                    if get.answered(&provider, sequence, bytes, at) && !last {
                        finish(kad, id);
                    }
                }
                if last { self.get_step(request) } else { None }
            }
            _ => None,
        }
    }

    fn record_done(&mut self, request: RequestId, error: Option<String>) -> Option<Input> {
        self.put_step(request, |put| {
            put.record_done_at = Some(Instant::now());
            put.error = error;
        })
    }

    fn put_step(&mut self, request: RequestId, step: impl FnOnce(&mut Put)) -> Option<Input> {
        let put = self.puts.get_mut(&request)?;
        step(put);
        if put.record_done_at.is_some() && put.providing_done {
            let error = self.puts.remove(&request)?.error;
            return Some(Input::DhtStored { request, error });
        }
        None
    }

    /// Takes the providers that a node named, and asks for the records of new ones. Returns whether
    /// enough nodes have named providers.
    fn ask_providers(&mut self, kad: &mut Kad, request: RequestId, keys: Vec<PublicKey>) -> bool {
        let Some(get) = self.gets.get_mut(&request) else { return true };
        if keys.is_empty() {
            return false;
        }
        get.lists += 1;
        for key in keys {
            if !get.providers.contains_key(&key) && get.providers.len() < PROVIDERS_ASKED_MAX {
                get.providers.insert(key, Found::default());
                let query = kad.get_record(record_key(&get.name, &key));
                self.queries.insert(query, Query::Value(request, key));
                get.running += 1;
            }
        }
        get.lists >= get.lists_wanted
    }

    fn get_step(&mut self, request: RequestId) -> Option<Input> {
        let get = self.gets.get_mut(&request)?;
        get.running -= 1;
        if get.running > 0 {
            return None;
        }
        let records = self.gets.remove(&request)?.records();
        Some(Input::DhtFound { request, records })
    }

    /// Ends a search with what it has found.
    fn end_get(&mut self, kad: &mut Kad, request: RequestId) -> Option<Input> {
        let records = self.gets.remove(&request)?.records();
        self.queries.retain(|id, query| {
            let is_its =
                matches!(query, Query::Providers(of) | Query::Value(of, _) if *of == request);
            if is_its {
                finish(kad, *id);
            }
            !is_its
        });
        Some(Input::DhtFound { request, records })
    }
}

/// More than half of so many.
fn majority(of: usize) -> Quorum {
    NonZeroUsize::new(of / 2 + 1).map_or(Quorum::One, Quorum::N)
}

fn put_to(kad: &mut Kad, record: &Record, peers: &BTreeSet<PeerId>, quorum: Quorum) -> QueryId {
    let peers: Vec<PeerId> = peers.iter().copied().collect();
    kad.put_record_to(record.clone(), peers.into_iter(), quorum)
}

fn finish(kad: &mut Kad, id: QueryId) {
    if let Some(mut query) = kad.query_mut(&id) {
        query.finish();
    }
}

#[cfg(test)]
mod tests;
