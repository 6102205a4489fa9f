//! This node's part in the service registry: what it publishes, what it asks, and the publications
//! that wait for the DHT.

mod resolving;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use crate::engine::event::{Answer, CommandError, Notice, Output, RequestId, ServiceSpec, Verdict};
use crate::engine::joining::verdict_on;
use crate::engine::lookups::Lookups;
use crate::engine::measure::{EventKind, HealthCheck, Sample};
use crate::engine::overlay::RecordError;
use crate::engine::overlay::membership::{Author, Membership, NameGrant};
use crate::engine::overlay::wire::{self, GossipMessage, Signed};
use crate::engine::overlay::{Delegation, Pin, ServiceRecord, ServiceRegistry};
use crate::engine::route::OverlayGraph;
use crate::engine::types::{NodeId, PublicKey, ServiceName, Timestamp};
use crate::engine::watching::Watching;

/// Most publications that wait for the DHT at one time.
pub const PENDING_MAX: usize = 1_024;
/// How long the DHT may take: longer than any query of it.
const PENDING_TIMEOUT: Duration = Duration::from_secs(25);
/// Most services of one node.
pub const OWN_MAX: usize = 256;
/// Most conflicts of owners that are remembered, so that each is said once.
const CONFLICTS_MAX: usize = 256;
/// Longest life of a delegation: a year.
pub const DELEGATION_LIFETIME_MAX: Duration = Duration::from_secs(365 * 86_400);
/// When a newer record of this node arrives, which it must have signed before its clock went back, it
/// signs a newer one still after this. Two nodes with one key would go on doing so.
const RECLAIM_AFTER: Duration = Duration::from_secs(1);
/// By how much of a third of its time to live a record may be renewed sooner, so that the nodes of a
/// mesh that started together do not all renew theirs together.
const JITTER: f64 = 0.2;
/// The request id of publications that nobody waits for.
const NOBODY: RequestId = 0;

struct Pending {
    name: ServiceName,
    started_at: Timestamp,
    sequence: u64,
}

pub(super) struct Own {
    spec: ServiceSpec,
    republish_at: Timestamp,
}

/// What this node publishes, and the registry of everybody's records.
pub struct Services {
    author: Author,
    registry: ServiceRegistry,
    pub(super) own: BTreeMap<ServiceName, Own>,
    pending: BTreeMap<RequestId, Pending>,
    lookups: Lookups,
    /// Who was refused a name that belongs to another owner.
    conflicts: BTreeMap<ServiceName, PublicKey>,
    /// Its own, so that publishing changes nothing else that is drawn.
    pub(super) random: Pcg64Mcg,
    /// How services are.
    pub(super) watching: Watching,
}

type Outputs = VecDeque<Output>;

impl Services {
    pub(super) fn new(author: Author, pins: Vec<Pin>, seed: u64) -> Self {
        let mut registry = ServiceRegistry::default();
        registry.pins_mut().restore(pins);
        Self {
            author,
            registry,
            own: BTreeMap::new(),
            pending: BTreeMap::new(),
            lookups: Lookups::default(),
            conflicts: BTreeMap::new(),
            random: Pcg64Mcg::seed_from_u64(seed),
            watching: Watching::default(),
        }
    }

    /// Signs with another credential from now on.
    pub(super) fn set_author(&mut self, author: Author) {
        self.author = author;
    }

    /// See [`ServiceRegistry::grant`]. A name that this node publishes is withdrawn, or published again
    /// when it is given back.
    pub(super) fn grant(
        &mut self,
        grant: NameGrant,
        signed: Signed,
        now: Timestamp,
        outputs: &mut Outputs,
    ) -> bool {
        let (name, owner) = (grant.name.clone(), grant.owner);
        self.conflicts.remove(&name);
        if !self.registry.grant(grant, signed) {
            return false;
        }
        let mine = self.own.get(&name).map(|own| self.owner_of(&own.spec) == owner);
        if mine == Some(false) {
            let owner = owner.node_id();
            outputs.push_back(Output::Notice(Notice::NameGranted { name, owner }));
        } else if let Some(own) = self.own.get_mut(&name) {
            own.republish_at = now;
        }
        true
    }

    /// What this node publishes and may not, because the name belongs to another owner, and why.
    pub fn withheld(&self) -> impl Iterator<Item = (&ServiceSpec, RecordError)> + '_ {
        self.own().filter_map(|spec| {
            let why = self.registry.check_owner(&spec.name, &self.owner_of(spec)).err()?;
            Some((spec, why))
        })
    }

    /// See [`ServiceRegistry::trust`].
    pub(super) fn trust(
        &mut self,
        request: RequestId,
        name: &ServiceName,
        owner: &PublicKey,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        let elsewhere = self.own.get(name).is_some_and(|own| self.owner_of(&own.spec) != *owner);
        let answer = if elsewhere {
            Err(CommandError::PublishedHere(name.clone()))
        } else {
            self.registry.trust(name, owner, now).map_err(CommandError::from)
        };
        if answer.is_ok() {
            self.conflicts.remove(name);
            self.lookups.set_present(name);
        }
        self.keep_pins(outputs);
        outputs.push_back(Output::Answer { request, answer: answer.map(|()| Answer::Done) });
    }

    /// Lets another node publish a name of this node's, not for longer than this node's own
    /// credential lasts.
    pub(super) fn delegate(
        &mut self,
        name: &ServiceName,
        provider: &PublicKey,
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<Signed, CommandError> {
        let me = self.author.public();
        if *provider == me {
            return Err(CommandError::DelegatesToItself(name.clone()));
        }
        self.registry.check_owner(name, &me)?;
        let until = now + lifetime.min(DELEGATION_LIFETIME_MAX);
        let credential = &self.author.credential;
        let of_root = credential.signature.is_empty();
        let expires_at = if of_root { until } else { until.min(credential.expires_at) };
        let delegation = Delegation { name: name.clone(), provider: *provider, expires_at };
        Ok(Signed::seal(&self.author, &delegation))
    }

    /// Who was refused a name that belongs to another owner.
    pub fn conflicts(&self) -> impl Iterator<Item = (&ServiceName, &PublicKey)> + '_ {
        self.conflicts.iter()
    }

    /// Forgets the records of a provider that was put out.
    pub(super) fn forget(&mut self, provider: &PublicKey) {
        self.registry.forget(provider);
        self.forget_heartbeat(provider.node_id());
    }

    /// Everybody's records.
    pub fn registry(&self) -> &ServiceRegistry {
        &self.registry
    }

    /// What this node publishes.
    pub fn own(&self) -> impl Iterator<Item = &ServiceSpec> + '_ {
        self.own.values().map(|own| &own.spec)
    }

    /// This node's id.
    pub(super) fn me(&self) -> NodeId {
        self.author.public().node_id()
    }

    /// How a service of this node is checked.
    pub(super) fn check_of(&self, name: &ServiceName) -> Option<HealthCheck> {
        self.own.get(name).map(|own| own.spec.health.check.clone())
    }

    /// All records as they were signed.
    pub fn signed(&self) -> impl Iterator<Item = &Signed> + '_ {
        self.registry.signed()
    }

    pub(super) fn accept(
        &mut self,
        signed: &Signed,
        membership: &mut Membership,
        graph: &OverlayGraph,
        may: impl FnOnce() -> bool,
        now: Timestamp,
        outputs: &mut Outputs,
    ) -> (Verdict, Option<RecordError>) {
        match self.registry.accept_if(signed, membership, may, now) {
            Ok((name, _)) => {
                self.lookups.set_present(&name);
                self.answer_known(&name, graph, now, outputs);
                if signed.key == self.author.public()
                    && let Some(own) = self.own.get_mut(&name)
                {
                    own.republish_at = own.republish_at.min(now + RECLAIM_AFTER);
                }
                (Verdict::Accept, None)
            }
            Err(
                RecordError::Stale { .. }
                | RecordError::Expired
                | RecordError::DelegationExpired { .. },
            ) => (Verdict::Ignore, None),
            Err(RecordError::Wire(error)) => (verdict_on(&error), Some(error.into())),
            Err(RecordError::Delegation(error)) => {
                (verdict_on(&error), Some(RecordError::Delegation(error)))
            }
            Err(error @ RecordError::NotOwner { .. }) => (Verdict::Reject, Some(error)),
            Err(error) => {
                if error.is_foreign() {
                    self.conflict(signed, &error, outputs);
                }
                (Verdict::Ignore, Some(error))
            }
        }
    }

    /// Says once that somebody publishes a name that is not his.
    fn conflict(&mut self, signed: &Signed, error: &RecordError, outputs: &mut Outputs) {
        let Ok(record) = signed.open::<ServiceRecord>() else { return };
        let is_news = self.conflicts.get(&record.name) != Some(&record.owner);
        let has_room = self.conflicts.len() < CONFLICTS_MAX;
        if is_news && (has_room || self.conflicts.contains_key(&record.name)) {
            self.conflicts.insert(record.name, record.owner);
            outputs.push_back(Output::Notice(Notice::ForeignName(error.clone())));
        }
    }

    pub(super) fn publish(
        &mut self,
        request: RequestId,
        spec: ServiceSpec,
        membership: &mut Membership,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        let full = self.own.len() >= OWN_MAX && !self.own.contains_key(&spec.name);
        if full || self.pending.len() >= PENDING_MAX {
            let error = CommandError::Busy("the services of this node");
            outputs.push_back(Output::Answer { request, answer: Err(error) });
            return;
        }
        let name = spec.name.clone();
        match self.issue(&spec, false, request, membership, now, outputs) {
            Ok(sequence) => {
                self.pending.insert(request, Pending { name, started_at: now, sequence });
                self.remember(spec, now);
            }
            Err(error) => {
                outputs.push_back(Output::Answer { request, answer: Err(error.into()) });
            }
        }
    }

    pub(super) fn withdraw(
        &mut self,
        request: RequestId,
        name: &ServiceName,
        membership: &mut Membership,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        let answer = match self.own.remove(name) {
            Some(own) => {
                self.unwatch_own(name);
                self.issue(&own.spec, true, NOBODY, membership, now, outputs)
                    .map(|_| Answer::Withdrawn)
                    .map_err(CommandError::from)
            }
            None => Err(CommandError::NotPublishedHere(name.clone())),
        };
        outputs.push_back(Output::Answer { request, answer });
    }

    pub(super) fn stored(
        &mut self,
        request: RequestId,
        error: Option<String>,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        let Some(pending) = self.pending.remove(&request) else { return };
        let succeeded = error.is_none();
        let kind = EventKind::Registration;
        outputs.push_back(event(kind, &pending.name, pending.started_at, now, succeeded));
        let answer = match error {
            None => Ok(Answer::Published { sequence: pending.sequence }),
            Some(reason) => Err(CommandError::NotStored { name: pending.name, reason }),
        };
        outputs.push_back(Output::Answer { request, answer });
    }

    /// Renews records, and repeats searches.
    pub(super) fn handle_timeout(
        &mut self,
        membership: &mut Membership,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        self.republish_due(membership, now, outputs);
        for (request, name) in self.lookups.take_due(now) {
            outputs.push_back(Output::DhtGet { request, name });
        }
    }

    fn republish_due(
        &mut self,
        membership: &mut Membership,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        let due: Vec<ServiceSpec> = self
            .own
            .values()
            .filter(|own| own.republish_at <= now)
            .map(|own| own.spec.clone())
            .collect();
        for spec in due {
            if let Err(error) = self.issue(&spec, false, NOBODY, membership, now, outputs) {
                let why = format!("{} was not renewed: {error}", spec.name);
                outputs.push_back(Output::Notice(Notice::Dropped { what: "own-service", why }));
            }
            self.remember(spec, now);
        }
    }

    /// Publishes everything again at this time, if not before.
    pub(super) fn renew_by(&mut self, at: Timestamp) {
        for own in self.own.values_mut() {
            own.republish_at = own.republish_at.min(at);
        }
    }

    pub(super) fn next_timeout(&self) -> Option<Timestamp> {
        let renewal = self.own.values().map(|own| own.republish_at).min();
        renewal.into_iter().chain(self.lookups.next_timeout()).min()
    }

    /// Forgets expired records, and answers what the DHT left unanswered.
    pub(super) fn expire(&mut self, now: Timestamp, outputs: &mut Outputs) {
        self.registry.expire(now);
        self.expire_heartbeats(now);
        self.keep_pins(outputs);
        let late = self.pending.iter().filter(|(_, p)| now.since(p.started_at) > PENDING_TIMEOUT);
        let late: Vec<RequestId> = late.map(|(id, _)| *id).collect();
        for request in late {
            self.stored(request, Some("no answer".into()), now, outputs);
        }
        for question in self.lookups.late(now) {
            let error = CommandError::UnknownName(question.0.clone());
            self.not_found(&question, &error, now, outputs);
        }
    }

    fn keep_pins(&mut self, outputs: &mut Outputs) {
        if self.registry.pins_mut().take_changed() {
            outputs.push_back(Output::KeepPins(self.registry.pins().list().collect()));
        }
    }

    fn owner_of(&self, spec: &ServiceSpec) -> PublicKey {
        spec.delegation.as_ref().map_or_else(|| self.author.public(), |signed| signed.key)
    }

    fn remember(&mut self, spec: ServiceSpec, now: Timestamp) {
        let sooner = 1.0 - JITTER * self.random.random::<f64>();
        let third = Duration::from_secs(u64::from(spec.ttl_s)) / 3;
        let republish_at = now + third.mul_f64(sooner);
        let before = self.own.get(&spec.name).map(|own| &own.spec.health);
        if before.is_some_and(|before| *before != spec.health) {
            self.unwatch_own(&spec.name);
        }
        self.watch_own(&spec, now);
        self.own.insert(spec.name.clone(), Own { spec, republish_at });
    }

    /// Signs a record, takes it into the registry, and sends it by gossip and to the DHT.
    fn issue(
        &mut self,
        spec: &ServiceSpec,
        withdrawn: bool,
        request: RequestId,
        membership: &mut Membership,
        now: Timestamp,
        outputs: &mut Outputs,
    ) -> Result<u64, RecordError> {
        let me = self.author.public();
        let known = self.registry.sequence(&spec.name, me.node_id());
        let sequence = now.as_micros().max(known.map_or(0, |known| known.saturating_add(1)));
        let record = ServiceRecord {
            name: spec.name.clone(),
            kind: spec.kind,
            owner: self.owner_of(spec),
            delegation: spec.delegation.clone(),
            metadata: spec.metadata.clone(),
            sequence,
            issued_at: now,
            ttl_s: spec.ttl_s,
            objective: spec.objective,
            allowed: spec.allowed.clone(),
            withdrawn,
        };
        let signed = Signed::seal(&self.author, &record);
        self.registry.accept(&signed, membership, now)?;
        self.lookups.set_present(&spec.name);
        let bytes = wire::encode(&signed);
        let message = wire::encode(&GossipMessage::Service(signed));
        outputs.push_back(Output::Publish(message));
        outputs.push_back(Output::DhtPut { request, name: spec.name.clone(), bytes });
        Ok(sequence)
    }
}

fn event(
    kind: EventKind,
    name: &ServiceName,
    started_at: Timestamp,
    done_at: Timestamp,
    succeeded: bool,
) -> Output {
    Output::Record(Sample::Event {
        kind,
        subject: name.to_string(),
        started_at,
        done_at,
        succeeded,
    })
}

#[cfg(test)]
mod tests;
