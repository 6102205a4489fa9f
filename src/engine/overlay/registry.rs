//! Who serves what: the rules by which service records are accepted, replaced and forgotten.
//!
//! - A record is signed by its provider, and the provider must be its owner.
//! - For one name and provider a higher sequence number wins; the same or a lower one is stale.
//!   A tombstone is a record like any other and is kept until it expires, so that replaying the
//!   record it replaced never brings the service back.
//! - A name belongs to the owner first seen for it, until all its records are gone. A second
//!   owner is an error that names both.
//! - A record expires `ttl_s` after it was issued. Clocks may differ by [`CLOCK_SKEW`].
//! - A provider issues its record again after a third of its time to live.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::CheckedSignatures;
use super::wire::{ServiceRecord, Signed, WireError};
use crate::engine::types::{NodeId, PublicKey, ServiceName, Timestamp};

/// Records kept; beyond, new names are refused and counted.
pub const RECORDS_MAX: usize = 10_000;
/// How far two clocks may differ.
pub const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// What an accepted record changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// The first of this provider for this name.
    New,
    /// A newer one.
    Updated,
    /// The provider left.
    Withdrawn,
}

/// Why a record was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Malformed, out of range, or not signed by its provider.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Signed by somebody who does not own it.
    #[error("the record of {name} is signed by {provider}, who is not its owner {owner}")]
    NotOwner {
        /// The name.
        name: ServiceName,
        /// Who signed.
        provider: NodeId,
        /// Who owns.
        owner: NodeId,
    },
    /// Not newer than the known one.
    #[error("sequence {offered} is not newer than {known}")]
    Stale {
        /// Sequence number of the known record.
        known: u64,
        /// Sequence number of this one.
        offered: u64,
    },
    /// Its time is over.
    #[error("the record has expired")]
    Expired,
    /// Issued further ahead than clocks may differ.
    #[error("the record comes from the future; compare the clocks of the two nodes")]
    FromTheFuture,
    /// The name belongs to another key.
    #[error("{name} belongs to {owner}; {claimant} may not publish it, choose another name")]
    ForeignName {
        /// The name.
        name: ServiceName,
        /// To whom it belongs.
        owner: NodeId,
        /// Who wants it.
        claimant: NodeId,
    },
    /// [`RECORDS_MAX`] reached.
    #[error("the registry holds {RECORDS_MAX} records and takes no new ones")]
    Full,
}

#[derive(Clone, Debug)]
struct Entry {
    record: ServiceRecord,
    signed: Signed,
    /// When the record ends.
    expires_at: Timestamp,
    /// When it may be forgotten: not before any older record of the same provider has expired,
    /// or that one could be replayed.
    forget_at: Timestamp,
}

/// All known records.
#[derive(Clone, Debug, Default)]
pub struct ServiceRegistry {
    entries: BTreeMap<(ServiceName, NodeId), Entry>,
    checked: Option<Arc<CheckedSignatures>>,
}

impl ServiceRegistry {
    /// An empty registry; `checked` is what others have checked already.
    pub fn new(checked: Option<Arc<CheckedSignatures>>) -> Self {
        Self { entries: BTreeMap::new(), checked }
    }

    /// Verifies a record and takes it.
    ///
    /// # Errors
    /// [`RecordError`], with nothing changed.
    pub fn accept(&mut self, signed: &Signed, now: Timestamp) -> Result<Accepted, RecordError> {
        let record = verify_with(signed, self.checked.as_deref(), now)?;
        let provider = signed.key.node_id();
        if let Some(owner) = self.owner(&record.name, now)
            && owner != record.owner
        {
            return Err(RecordError::ForeignName {
                name: record.name,
                owner: owner.node_id(),
                claimant: provider,
            });
        }
        let key = (record.name.clone(), provider);
        let known = self.entries.get(&key);
        match known {
            Some(known) if known.record.sequence >= record.sequence => {
                return Err(RecordError::Stale {
                    known: known.record.sequence,
                    offered: record.sequence,
                });
            }
            None if self.entries.len() >= RECORDS_MAX => return Err(RecordError::Full),
            _ => {}
        }
        let accepted = match known {
            _ if record.withdrawn => Accepted::Withdrawn,
            Some(known) if !known.record.withdrawn => Accepted::Updated,
            _ => Accepted::New,
        };
        let expires_at = record.issued_at + ttl(&record) + CLOCK_SKEW;
        let forget_at = known.map_or(expires_at, |known| known.forget_at.max(expires_at));
        self.entries.insert(key, Entry { record, signed: signed.clone(), expires_at, forget_at });
        Ok(accepted)
    }

    /// The key that a name belongs to.
    pub fn owner(&self, name: &ServiceName, now: Timestamp) -> Option<PublicKey> {
        self.of(name).find(|entry| entry.forget_at > now).map(|entry| entry.record.owner)
    }

    /// Sequence number of the newest record of a provider, tombstones included.
    pub fn sequence(&self, name: &ServiceName, provider: NodeId) -> Option<u64> {
        self.entries.get(&(name.clone(), provider)).map(|entry| entry.record.sequence)
    }

    /// Living providers of a name, with their keys.
    pub fn resolve(
        &self,
        name: &ServiceName,
        now: Timestamp,
    ) -> impl Iterator<Item = (PublicKey, &ServiceRecord)> + '_ {
        self.of(name)
            .filter(move |entry| !entry.record.withdrawn && entry.expires_at > now)
            .map(|entry| (entry.signed.key, &entry.record))
    }

    /// All living records.
    pub fn list(&self, now: Timestamp) -> impl Iterator<Item = (PublicKey, &ServiceRecord)> + '_ {
        self.entries
            .values()
            .filter(move |entry| !entry.record.withdrawn && entry.expires_at > now)
            .map(|entry| (entry.signed.key, &entry.record))
    }

    /// All records as they were signed, tombstones included, for a new neighbour.
    pub fn signed(&self) -> impl Iterator<Item = &Signed> + '_ {
        self.entries.values().map(|entry| &entry.signed)
    }

    /// Forgets what has expired.
    pub fn expire(&mut self, now: Timestamp) {
        self.entries.retain(|_, entry| entry.forget_at > now);
    }

    fn of(&self, name: &ServiceName) -> impl Iterator<Item = &Entry> + '_ {
        let from = (name.clone(), NodeId([0; 8]));
        let to = (name.clone(), NodeId([u8::MAX; 8]));
        self.entries.range(from..=to).map(|(_, entry)| entry)
    }
}

/// Verifies one record by itself: signature, ranges, ownership, time. This is also what a node
/// checks before it stores a record for the DHT.
///
/// # Errors
/// [`RecordError`].
pub fn verify(signed: &Signed, now: Timestamp) -> Result<ServiceRecord, RecordError> {
    verify_with(signed, None, now)
}

fn verify_with(
    signed: &Signed,
    checked: Option<&CheckedSignatures>,
    now: Timestamp,
) -> Result<ServiceRecord, RecordError> {
    let record: ServiceRecord = signed.open_with(checked)?;
    if record.owner != signed.key {
        return Err(RecordError::NotOwner {
            name: record.name,
            provider: signed.key.node_id(),
            owner: record.owner.node_id(),
        });
    }
    if record.issued_at > now + CLOCK_SKEW {
        return Err(RecordError::FromTheFuture);
    }
    if record.issued_at + ttl(&record) + CLOCK_SKEW <= now {
        return Err(RecordError::Expired);
    }
    Ok(record)
}

fn ttl(record: &ServiceRecord) -> Duration {
    Duration::from_secs(u64::from(record.ttl_s))
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;

    use super::*;
    use crate::engine::overlay::wire::{Objective, ServiceKind};

    fn key(byte: u8) -> SigningKey {
        SigningKey::from_bytes(&[byte; 32])
    }

    fn public(byte: u8) -> PublicKey {
        PublicKey(key(byte).verifying_key().to_bytes())
    }

    fn seconds(s: u64) -> Timestamp {
        Timestamp(s * 1_000_000)
    }

    fn record(owner: u8, sequence: u64) -> ServiceRecord {
        ServiceRecord {
            name: "a.local".parse().unwrap(),
            kind: ServiceKind::Tcp,
            owner: public(owner),
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
        let mut registry = ServiceRegistry::default();
        let now = seconds(1_001);
        let first = Signed::seal(&key(1), &record(1, 1));
        assert_eq!(registry.accept(&first, now), Ok(Accepted::New));
        assert!(matches!(registry.accept(&first, now), Err(RecordError::Stale { .. })));
        let second = Signed::seal(&key(1), &record(1, 2));
        assert_eq!(registry.accept(&second, now), Ok(Accepted::Updated));
        let gone = ServiceRecord { withdrawn: true, ..record(1, 3) };
        let gone = Signed::seal(&key(1), &gone);
        assert_eq!(registry.accept(&gone, now), Ok(Accepted::Withdrawn));
        assert_eq!(registry.resolve(&name(), now).count(), 0);
        assert!(registry.accept(&second, now).is_err(), "replay");
        assert_eq!(registry.resolve(&name(), now).count(), 0);
    }

    #[test]
    fn a_short_tombstone_outlives_the_long_record_that_it_replaced() {
        let mut registry = ServiceRegistry::default();
        let long = ServiceRecord { ttl_s: 86_400, ..record(1, 1) };
        let long = Signed::seal(&key(1), &long);
        registry.accept(&long, seconds(1_001)).unwrap();
        let gone = ServiceRecord { withdrawn: true, ..record(1, 2) };
        registry.accept(&Signed::seal(&key(1), &gone), seconds(1_002)).unwrap();
        registry.expire(seconds(10_000));
        let replayed = registry.accept(&long, seconds(10_000));
        assert!(matches!(replayed, Err(RecordError::Stale { .. })), "{replayed:?}");
    }

    #[test]
    fn a_name_belongs_to_its_first_owner() {
        let mut registry = ServiceRegistry::default();
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
        let mut registry = ServiceRegistry::default();
        let signed = Signed::seal(&key(1), &record(1, 1));
        assert_eq!(registry.accept(&signed, seconds(699)), Err(RecordError::FromTheFuture));
        assert_eq!(registry.accept(&signed, seconds(1_360)), Err(RecordError::Expired));
        registry.accept(&signed, seconds(1_359)).unwrap();
        assert_eq!(registry.resolve(&name(), seconds(1_359)).count(), 1);
        assert_eq!(registry.resolve(&name(), seconds(1_360)).count(), 0);
        registry.expire(seconds(1_360));
        assert_eq!(registry.signed().count(), 0);
    }
}
