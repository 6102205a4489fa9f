//! Who serves what: the rules by which service records are accepted, replaced and forgotten.
//!
//! - A record is signed by its provider. The provider is its owner, or shows a delegation by the owner,
//!   who must be a member too. Several providers under one owner are replicas.
//! - For one name and provider a higher sequence number wins; the same or a lower one is stale.
//!   A tombstone is a record like any other and is kept until it expires, so that replaying the
//!   record it replaced never brings the service back.
//! - A name belongs to the owner to whom the root granted it, or else to the one that it is pinned to:
//!   the first one seen, or the one that this node's operator trusts ([`super::pins`]). A second
//!   owner is an error that names both.
//! - A record expires `ttl_s` after it was issued, and with its delegation. Clocks may differ by
//!   [`CLOCK_SKEW`].
//! - A provider issues its record again after a third of its time to live.
//! - One provider has at most [`RECORDS_PER_PROVIDER_MAX`] records. When all places are taken, the
//!   provider with most records makes room for one with fewer, so that nobody is pushed out by
//!   somebody who floods names.

use std::collections::BTreeMap;
use std::time::Duration;

use super::delegation::Delegation;
use super::issuer::GRANTS_MAX;
use super::membership::{Membership, NameGrant, Roster};
use super::pins::Pins;
use super::shares::Shares;
use super::wire::{ServiceRecord, Signed, WireError};
use crate::engine::types::{NodeId, PublicKey, ServiceName, Timestamp};

/// Records kept.
pub const RECORDS_MAX: usize = 10_000;
/// Records kept of one provider: those of all its services, and as many tombstones.
pub const RECORDS_PER_PROVIDER_MAX: usize = 512;
/// How far two clocks may differ.
pub const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// What an accepted record changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Signed by somebody who does not own it and shows no delegation by the owner.
    #[error(
        "the record of {name} is signed by {provider}, to whom its owner {owner} has not delegated it"
    )]
    NotOwner {
        /// The name.
        name: ServiceName,
        /// Who signed.
        provider: NodeId,
        /// Who owns.
        owner: NodeId,
    },
    /// The delegation is not one by a member.
    #[error("the delegation is not valid: {0}")]
    Delegation(WireError),
    /// The delegation's time is over.
    #[error(
        "the delegation has expired; run 'meshwise service delegate' at its owner {owner} again"
    )]
    DelegationExpired {
        /// Who has to sign a new one.
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
    /// The name belongs to the first owner seen.
    #[error(
        "{name} belongs to {owner}, the owner first seen or trusted here, not to {claimant}; choose another \
         name, or have 'meshwise service delegate' run at {owner}; if it is {claimant}'s by right, run \
         'meshwise service trust {name} {claimant}' here, or 'meshwise network grant {name} {claimant}' \
         at the node that holds the root key"
    )]
    ForeignName {
        /// The name.
        name: ServiceName,
        /// To whom it belongs.
        owner: NodeId,
        /// Who wants it.
        claimant: NodeId,
    },
    /// The name belongs to the owner that the root named.
    #[error(
        "the root of the network has granted {name} to {owner}, and not to {claimant}; choose another \
         name, or have 'meshwise service delegate' run at {owner}; only 'meshwise network grant {name} \
         {claimant}' at the node that holds the root key changes that"
    )]
    Granted {
        /// The name.
        name: ServiceName,
        /// To whom it was granted.
        owner: NodeId,
        /// Who wants it.
        claimant: NodeId,
    },
    /// [`RECORDS_PER_PROVIDER_MAX`] reached.
    #[error(
        "{0} has as many records as one provider may have, tombstones included; withdrawn ones make \
         room when they expire"
    )]
    TooMany(NodeId),
    /// More changes than a provider may make.
    #[error("{0} changes its records too often")]
    TooOften(NodeId),
    /// [`RECORDS_MAX`] reached.
    #[error("the registry is full, and nobody has more records than this provider")]
    Full,
}

impl RecordError {
    /// Whether it is about whose name it is.
    pub fn is_foreign(&self) -> bool {
        matches!(self, Self::ForeignName { .. } | Self::Granted { .. })
    }
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
#[derive(Clone, Debug)]
pub struct ServiceRegistry {
    entries: BTreeMap<(ServiceName, NodeId), Entry>,
    /// By provider.
    shares: Shares,
    pins: Pins,
    grants: BTreeMap<ServiceName, (NameGrant, Signed)>,
    /// Of all records, and of one provider's.
    limits: (usize, usize),
}

impl Default for ServiceRegistry {
    fn default() -> Self {
        Self::with_limits(RECORDS_MAX, RECORDS_PER_PROVIDER_MAX)
    }
}

impl ServiceRegistry {
    /// Other bounds than [`RECORDS_MAX`] and [`RECORDS_PER_PROVIDER_MAX`], for tests.
    pub fn with_limits(all: usize, per_provider: usize) -> Self {
        Self {
            entries: BTreeMap::new(),
            shares: Shares::default(),
            pins: Pins::default(),
            grants: BTreeMap::new(),
            limits: (all, per_provider),
        }
    }

    /// Verifies a record and takes it. Returns its name, and what it changed.
    ///
    /// # Errors
    /// [`RecordError`], with nothing changed.
    pub fn accept(
        &mut self,
        signed: &Signed,
        membership: &mut Membership,
        now: Timestamp,
    ) -> Result<(ServiceName, Accepted), RecordError> {
        self.accept_if(signed, membership, || true, now)
    }

    /// The same, when the provider may change something now. That is asked last: only who signs what
    /// is valid and new can use up what it may.
    ///
    /// # Errors
    /// [`RecordError`], with nothing changed.
    pub fn accept_if(
        &mut self,
        signed: &Signed,
        membership: &mut Membership,
        may: impl FnOnce() -> bool,
        now: Timestamp,
    ) -> Result<(ServiceName, Accepted), RecordError> {
        let record = membership.open(signed, now)?;
        let expires_at = check(&record, signed, membership.roster(), now)?;
        self.check_owner(&record.name, &record.owner)?;
        let key = (record.name.clone(), signed.key.node_id());
        let known = self.entries.get(&key);
        let accepted = match known {
            Some(known) if known.record.sequence >= record.sequence => {
                return Err(RecordError::Stale {
                    known: known.record.sequence,
                    offered: record.sequence,
                });
            }
            _ if record.withdrawn => Accepted::Withdrawn,
            Some(known) if !known.record.withdrawn => Accepted::Updated,
            _ => Accepted::New,
        };
        let forget_at = known.map_or(expires_at, |known| known.forget_at.max(expires_at));
        if !may() {
            return Err(RecordError::TooOften(key.1));
        }
        if known.is_none() {
            self.make_room(&signed.key)?;
            self.shares.add(&signed.key);
        }
        let name = record.name.clone();
        if !self.grants.contains_key(&name) {
            self.pins.seen(&name, &record.owner, now);
        }
        self.entries.insert(key, Entry { record, signed: signed.clone(), expires_at, forget_at });
        Ok((name, accepted))
    }

    /// Takes a name that the root, whose signature was verified, has given to an owner. Records of
    /// others for it are forgotten. Returns whether it is news.
    pub fn grant(&mut self, grant: NameGrant, signed: Signed) -> bool {
        match self.grants.get(&grant.name) {
            Some((known, _)) if known.at >= grant.at => return false,
            None if self.grants.len() >= GRANTS_MAX => return false,
            _ => {}
        }
        self.retain(|(name, _), entry| *name != grant.name || entry.record.owner == grant.owner);
        self.pins.remove(&grant.name);
        self.grants.insert(grant.name.clone(), (grant, signed));
        true
    }

    /// Takes the operator's word that a name belongs to this owner. Records of others for it are
    /// forgotten.
    ///
    /// # Errors
    /// [`RecordError::Granted`] when the root has granted it to another one.
    pub fn trust(
        &mut self,
        name: &ServiceName,
        owner: &PublicKey,
        now: Timestamp,
    ) -> Result<(), RecordError> {
        if self.grants.contains_key(name) {
            return self.check_owner(name, owner);
        }
        self.retain(|(known, _), entry| known != name || entry.record.owner == *owner);
        self.pins.set(name.clone(), *owner, now);
        Ok(())
    }

    /// All granted names as they were signed.
    pub fn grants(&self) -> impl Iterator<Item = &Signed> + '_ {
        self.grants.values().map(|(_, signed)| signed)
    }

    /// To whom names belong because they were seen first or are trusted.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// The same, to restore them and to ask whether they changed.
    pub fn pins_mut(&mut self) -> &mut Pins {
        &mut self.pins
    }

    /// The key that a name belongs to.
    pub fn owner(&self, name: &ServiceName) -> Option<PublicKey> {
        let granted = self.grants.get(name).map(|(grant, _)| grant.owner);
        // A pin may have had to make room; the records that are here still hold the name.
        let held = || self.of(name).next().map(|entry| entry.record.owner);
        granted.or_else(|| self.pins.owner(name)).or_else(held)
    }

    /// Whether a name may be this one's.
    ///
    /// # Errors
    /// [`RecordError::Granted`] or [`RecordError::ForeignName`], naming both owners.
    pub fn check_owner(&self, name: &ServiceName, claimant: &PublicKey) -> Result<(), RecordError> {
        let Some(owner) = self.owner(name).filter(|owner| owner != claimant) else { return Ok(()) };
        let (name, owner, claimant) = (name.clone(), owner.node_id(), claimant.node_id());
        Err(if self.grants.contains_key(&name) {
            RecordError::Granted { name, owner, claimant }
        } else {
            RecordError::ForeignName { name, owner, claimant }
        })
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

    /// Forgets everything of somebody who no longer belongs to the network: what it provides, what
    /// others provide in its name, and its names.
    pub fn forget(&mut self, key: &PublicKey) {
        self.retain(|_, entry| entry.signed.key != *key && entry.record.owner != *key);
        self.pins.forget(key);
    }

    /// Forgets what has expired.
    pub fn expire(&mut self, now: Timestamp) {
        self.retain(|_, entry| entry.forget_at > now);
        self.pins.expire(now);
    }

    fn retain(&mut self, keep: impl Fn(&(ServiceName, NodeId), &Entry) -> bool) {
        let shares = &mut self.shares;
        self.entries.retain(|key, entry| {
            let kept = keep(key, entry);
            if !kept {
                shares.remove(&entry.signed.key);
            }
            kept
        });
    }

    fn make_room(&mut self, provider: &PublicKey) -> Result<(), RecordError> {
        if self.shares.of(provider) >= self.limits.1 {
            return Err(RecordError::TooMany(provider.node_id()));
        }
        if self.entries.len() < self.limits.0 {
            return Ok(());
        }
        let largest = self.shares.gives_way_to(provider).ok_or(RecordError::Full)?;
        let theirs = self.entries.iter().filter(|(_, entry)| entry.signed.key == largest);
        let first = theirs.min_by_key(|(_, entry)| entry.forget_at).map(|(key, _)| key.clone());
        self.entries.remove(&first.ok_or(RecordError::Full)?);
        self.shares.remove(&largest);
        Ok(())
    }

    fn of(&self, name: &ServiceName) -> impl Iterator<Item = &Entry> + '_ {
        let from = (name.clone(), NodeId([0; 8]));
        let to = (name.clone(), NodeId([u8::MAX; 8]));
        self.entries.range(from..=to).map(|(_, entry)| entry)
    }
}

/// Verifies one record by itself: membership, signatures, ranges, ownership, time. This is also what a
/// node checks before it stores a record for the DHT. Returns it, and when it ends.
///
/// # Errors
/// [`RecordError`].
pub fn verify(
    signed: &Signed,
    roster: &Roster,
    now: Timestamp,
) -> Result<(ServiceRecord, Timestamp), RecordError> {
    let record = roster.open(signed, now)?;
    let expires_at = check(&record, signed, roster, now)?;
    Ok((record, expires_at))
}

/// Checks ownership and time; returns when the record ends.
fn check(
    record: &ServiceRecord,
    signed: &Signed,
    roster: &Roster,
    now: Timestamp,
) -> Result<Timestamp, RecordError> {
    let mut expires_at = record.issued_at + ttl(record) + CLOCK_SKEW;
    if record.owner != signed.key {
        let delegated_until = check_delegation(record, &signed.key, roster, now)? + CLOCK_SKEW;
        if delegated_until <= now {
            return Err(RecordError::DelegationExpired { owner: record.owner.node_id() });
        }
        expires_at = expires_at.min(delegated_until);
    }
    if record.issued_at > now + CLOCK_SKEW {
        return Err(RecordError::FromTheFuture);
    }
    if expires_at <= now {
        return Err(RecordError::Expired);
    }
    Ok(expires_at)
}

/// Whether the owner has let this provider publish; returns until when.
fn check_delegation(
    record: &ServiceRecord,
    provider: &PublicKey,
    roster: &Roster,
    now: Timestamp,
) -> Result<Timestamp, RecordError> {
    let not_owner = || RecordError::NotOwner {
        name: record.name.clone(),
        provider: provider.node_id(),
        owner: record.owner.node_id(),
    };
    let signed = record.delegation.as_ref().filter(|signed| signed.key == record.owner);
    let signed = signed.ok_or_else(not_owner)?;
    let delegation: Delegation = roster.open(signed, now).map_err(RecordError::Delegation)?;
    let is_for_it = delegation.name == record.name && delegation.provider == *provider;
    if is_for_it { Ok(delegation.expires_at) } else { Err(not_owner()) }
}

fn ttl(record: &ServiceRecord) -> Duration {
    Duration::from_secs(u64::from(record.ttl_s))
}

#[cfg(test)]
mod tests;
