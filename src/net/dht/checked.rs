//! What a node stores for the DHT: only records that it would believe itself.
//!
//! Kademlia puts everything through [`CheckedStore`], its own publications too, and acknowledges a
//! record only when the store has taken it. A record must be valid ([`registry::verify`]), lie under its
//! provider's own key, and be newer than what is there. It is kept no longer than it says itself; a
//! tombstone is kept as long as what it replaced would have been, so that replaying that one is
//! stale.
//!
//! One provider has at most [`RECORDS_PER_PROVIDER_MAX`] records here, one peer is noted as provider of
//! at most [`PROVIDED_PER_PEER_MAX`] names; and when all places are taken, the largest holder makes room.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::kad::store::{Error, RecordStore, Result};
use libp2p::kad::{ProviderRecord, Record, RecordKey};

use super::{is_providers_key, record_key};
use crate::engine::overlay::Roster;
use crate::engine::overlay::registry;
use crate::engine::overlay::shares::Shares;
use crate::engine::overlay::wire::{self, GOSSIP_BYTES_MAX, ServiceRecord, Signed};
use crate::engine::types::{PublicKey, Timestamp};
use crate::net::{Members, identity};

/// Records kept, and names whose providers are kept.
pub const RECORDS_MAX: usize = 10_000;
/// Records kept of one provider, as in the registry of the engine.
pub const RECORDS_PER_PROVIDER_MAX: usize = registry::RECORDS_PER_PROVIDER_MAX;
/// Names that one peer is noted as provider of.
pub const PROVIDED_PER_PEER_MAX: usize = 512;
/// Providers noted of one name; a further one is refused.
pub const PROVIDERS_PER_NAME_MAX: usize = 32;

/// How many there may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) records: usize,
    pub(super) records_per_provider: usize,
    pub(super) provided_per_peer: usize,
    pub(super) providers_per_name: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            records: RECORDS_MAX,
            records_per_provider: RECORDS_PER_PROVIDER_MAX,
            provided_per_peer: PROVIDED_PER_PEER_MAX,
            providers_per_name: PROVIDERS_PER_NAME_MAX,
        }
    }
}

struct Stored {
    record: Record,
    provider: PublicKey,
    sequence: u64,
}

/// The store behind Kademlia.
pub struct CheckedStore {
    me: PeerId,
    members: Members,
    clock: fn() -> Timestamp,
    limits: Limits,
    records: HashMap<RecordKey, Stored>,
    /// Records by provider.
    records_of: Shares,
    /// By key of a name.
    providers: HashMap<RecordKey, Vec<ProviderRecord>>,
    /// Names by the peer that says it provides them.
    names_of: Shares,
    refused: BTreeMap<&'static str, u64>,
    last_refused: &'static str,
}

impl CheckedStore {
    /// An empty store of the node `me`, which asks `clock` for the time.
    pub fn new(me: PeerId, members: Members, clock: fn() -> Timestamp) -> Self {
        Self {
            me,
            members,
            clock,
            limits: Limits::default(),
            records: HashMap::new(),
            records_of: Shares::default(),
            providers: HashMap::new(),
            names_of: Shares::default(),
            refused: BTreeMap::new(),
            last_refused: "",
        }
    }

    #[cfg(test)]
    pub(super) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    #[cfg(test)]
    pub(super) fn set_members(&mut self, roster: std::sync::Arc<Roster>) {
        self.members.store(roster);
    }

    /// Why records were refused since this was last asked, and how often.
    pub fn take_refused(&mut self) -> BTreeMap<&'static str, u64> {
        std::mem::take(&mut self.refused)
    }

    /// Why the last record was refused that was.
    pub fn last_refused(&self) -> &'static str {
        self.last_refused
    }

    /// Forgets what has expired, and what members said who were put out since.
    pub fn expire(&mut self, now: Instant) {
        let roster = self.members.load_full();
        let (records_of, names_of) = (&mut self.records_of, &mut self.names_of);
        self.records.retain(|_, stored| {
            let kept = !stored.record.is_expired(now) && !roster.is_revoked(&stored.provider);
            if !kept {
                records_of.remove(&stored.provider);
            }
            kept
        });
        self.providers.retain(|_, list| {
            list.retain(|record| {
                let key = identity::public_key(&record.provider);
                let belongs = key.is_some_and(|key| !roster.is_revoked(&key));
                let kept = !record.is_expired(now) && belongs;
                if let (false, Some(key)) = (kept, &key) {
                    names_of.remove(key);
                }
                kept
            });
            !list.is_empty()
        });
    }

    fn refuse(&mut self, why: &'static str, error: Error) -> Result<()> {
        *self.refused.entry(why).or_default() += 1;
        self.last_refused = why;
        Err(error)
    }

    fn try_put(&mut self, mut record: Record) -> std::result::Result<(), (&'static str, Error)> {
        let now = (self.clock)();
        let invalid = |why| (why, Error::ValueTooLarge);
        let roster = self.members.load_full();
        let checked = verify(&record, &roster, now).map_err(invalid)?;
        let ends = Instant::now() + checked.expires_at.since(now);
        record.expires = match self.records.get(&record.key) {
            Some(known) => {
                let same = known.sequence == checked.service.sequence
                    && known.record.value == record.value;
                if known.sequence >= checked.service.sequence && !same {
                    return Err(invalid("dht-record-stale"));
                }
                // Kademlia's own limit, which falls with the distance, is not for what must not
                // come back.
                Some(known.record.expires.map_or(ends, |known| known.max(ends)))
            }
            None => {
                self.make_room(&checked.provider)?;
                self.records_of.add(&checked.provider);
                Some(record.expires.map_or(ends, |expires| expires.min(ends)))
            }
        };
        let Checked { provider, service, .. } = checked;
        let stored = Stored { provider, sequence: service.sequence, record };
        self.records.insert(stored.record.key.clone(), stored);
        Ok(())
    }

    fn make_room(
        &mut self,
        provider: &PublicKey,
    ) -> std::result::Result<(), (&'static str, Error)> {
        let full = ("dht-store-full", Error::MaxRecords);
        if self.records_of.of(provider) >= self.limits.records_per_provider {
            return Err(("dht-too-many-of-one", Error::MaxRecords));
        }
        if self.records.len() < self.limits.records {
            return Ok(());
        }
        let largest = self.records_of.gives_way_to(provider).ok_or(full.clone())?;
        let theirs = self.records.iter().filter(|(_, stored)| stored.provider == largest);
        let first = theirs.min_by_key(|(_, stored)| stored.record.expires).map(|(k, _)| k.clone());
        self.remove(&first.ok_or(full)?);
        Ok(())
    }

    fn try_add(
        &mut self,
        record: ProviderRecord,
    ) -> std::result::Result<(), (&'static str, Error)> {
        let refuse = |why| (why, Error::MaxProvidedKeys);
        if !is_providers_key(&record.key) {
            return Err(refuse("dht-foreign-key"));
        }
        let key = identity::public_key(&record.provider).ok_or(refuse("dht-record-invalid"))?;
        if self.members.load().is_revoked(&key) {
            return Err(refuse("dht-record-invalid"));
        }
        let list = self.providers.get_mut(&record.key);
        if let Some(known) =
            list.and_then(|list| list.iter_mut().find(|known| known.provider == record.provider))
        {
            *known = record;
            return Ok(());
        }
        let named = self.providers.get(&record.key).map(Vec::len);
        if self.names_of.of(&key) >= self.limits.provided_per_peer {
            return Err(refuse("dht-too-many-of-one"));
        }
        if named.is_some_and(|providers| providers >= self.limits.providers_per_name)
            || (named.is_none() && self.providers.len() >= self.limits.records)
        {
            return Err(refuse("dht-store-full"));
        }
        self.names_of.add(&key);
        self.providers.entry(record.key.clone()).or_default().push(record);
        Ok(())
    }
}

impl RecordStore for CheckedStore {
    type RecordsIter<'a> = std::vec::IntoIter<Cow<'a, Record>>;
    type ProvidedIter<'a> = std::vec::IntoIter<Cow<'a, ProviderRecord>>;

    fn get(&self, key: &RecordKey) -> Option<Cow<'_, Record>> {
        self.records.get(key).map(|stored| Cow::Borrowed(&stored.record))
    }

    fn put(&mut self, record: Record) -> Result<()> {
        self.try_put(record).or_else(|(why, error)| self.refuse(why, error))
    }

    fn remove(&mut self, key: &RecordKey) {
        if let Some(stored) = self.records.remove(key) {
            self.records_of.remove(&stored.provider);
        }
    }

    fn records(&self) -> Self::RecordsIter<'_> {
        let records = self.records.values().map(|stored| Cow::Borrowed(&stored.record));
        records.collect::<Vec<_>>().into_iter()
    }

    fn add_provider(&mut self, record: ProviderRecord) -> Result<()> {
        self.try_add(record).or_else(|(why, error)| self.refuse(why, error))
    }

    fn providers(&self, key: &RecordKey) -> Vec<ProviderRecord> {
        self.providers.get(key).cloned().unwrap_or_default()
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        let all = self.providers.values().flatten();
        let mine = all.filter(|record| record.provider == self.me).map(Cow::Borrowed);
        mine.collect::<Vec<_>>().into_iter()
    }

    fn remove_provider(&mut self, key: &RecordKey, provider: &PeerId) {
        let Some(list) = self.providers.get_mut(key) else { return };
        let Some(index) = list.iter().position(|record| record.provider == *provider) else {
            return;
        };
        list.swap_remove(index);
        if list.is_empty() {
            self.providers.remove(key);
        }
        if let Some(key) = identity::public_key(provider) {
            self.names_of.remove(&key);
        }
    }
}

/// What a record says, once it is known to be valid.
pub(super) struct Checked {
    pub(super) service: ServiceRecord,
    pub(super) provider: PublicKey,
    pub(super) expires_at: Timestamp,
}

/// A valid record under its right key.
pub(super) fn verify(
    record: &Record,
    roster: &Roster,
    now: Timestamp,
) -> std::result::Result<Checked, &'static str> {
    let signed: Signed =
        wire::decode(&record.value, GOSSIP_BYTES_MAX).map_err(|_| "dht-record-malformed")?;
    let verified = registry::verify(&signed, roster, now);
    let (service, expires_at) = verified.map_err(|_| "dht-record-invalid")?;
    if record.key != record_key(&service.name, &signed.key) {
        return Err("dht-foreign-key");
    }
    Ok(Checked { service, provider: signed.key, expires_at })
}

/// How long a provider is noted: as long as the longest record, which is renewed after a third.
pub(super) const PROVIDER_TTL: Duration =
    Duration::from_secs(wire::TTL_S_MAX as u64 + registry::CLOCK_SKEW.as_secs());
