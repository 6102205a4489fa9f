//! This node's part in the service registry: what it publishes, what it asks, and the requests
//! that wait for the DHT.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::engine::event::{Answer, CommandError, Notice, Output, RequestId, ServiceSpec, Verdict};
use crate::engine::joining::verdict_on;
use crate::engine::measure::{EventKind, Sample};
use crate::engine::overlay::membership::{Author, Membership, NameGrant};
use crate::engine::overlay::registry::{self, RecordError};
use crate::engine::overlay::wire::{self, GOSSIP_BYTES_MAX, GossipMessage, Signed};
use crate::engine::overlay::{ServiceRecord, ServiceRegistry};
use crate::engine::types::{PublicKey, ServiceName, Timestamp};

/// Most requests that wait for the DHT at one time.
pub const PENDING_MAX: usize = 1_024;
/// How long the DHT may take: longer than any query of it.
const PENDING_TIMEOUT: Duration = Duration::from_secs(25);
/// Most services of one node.
pub const OWN_MAX: usize = 256;
/// The request id of publications that nobody waits for.
const NOBODY: RequestId = 0;

struct Pending {
    kind: EventKind,
    name: ServiceName,
    started_at: Timestamp,
    sequence: u64,
}

struct Own {
    spec: ServiceSpec,
    republish_at: Timestamp,
}

/// What this node publishes, and the registry of everybody's records.
pub struct Services {
    author: Author,
    registry: ServiceRegistry,
    own: BTreeMap<ServiceName, Own>,
    pending: BTreeMap<RequestId, Pending>,
}

type Outputs = VecDeque<Output>;

impl Services {
    pub(super) fn new(author: Author) -> Self {
        Self {
            author,
            registry: ServiceRegistry::default(),
            own: BTreeMap::new(),
            pending: BTreeMap::new(),
        }
    }

    /// Signs with another credential from now on.
    pub(super) fn set_author(&mut self, author: Author) {
        self.author = author;
    }

    /// See [`ServiceRegistry::grant`].
    pub(super) fn grant(&mut self, grant: NameGrant, signed: Signed) -> bool {
        self.registry.grant(grant, signed)
    }

    /// Forgets the records of a provider that was put out.
    pub(super) fn forget(&mut self, provider: &PublicKey) {
        self.registry.forget(provider);
    }

    /// Everybody's records.
    pub fn registry(&self) -> &ServiceRegistry {
        &self.registry
    }

    /// What this node publishes.
    pub fn own(&self) -> impl Iterator<Item = &ServiceSpec> + '_ {
        self.own.values().map(|own| &own.spec)
    }

    pub(super) fn signed(&self) -> impl Iterator<Item = &Signed> + '_ {
        self.registry.signed()
    }

    pub(super) fn accept(
        &mut self,
        signed: &Signed,
        membership: &mut Membership,
        now: Timestamp,
    ) -> (Verdict, Option<RecordError>) {
        match self.registry.accept(signed, membership, now) {
            Ok(_) => (Verdict::Accept, None),
            Err(RecordError::Stale { .. } | RecordError::Expired) => (Verdict::Ignore, None),
            Err(error @ (RecordError::Full | RecordError::ForeignName { .. })) => {
                (Verdict::Ignore, Some(error))
            }
            Err(RecordError::Wire(error)) => (verdict_on(&error), Some(error.into())),
            Err(error) => (Verdict::Reject, Some(error)),
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
                let pending =
                    Pending { kind: EventKind::Registration, name, started_at: now, sequence };
                self.pending.insert(request, pending);
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
            Some(own) => self
                .issue(&own.spec, true, NOBODY, membership, now, outputs)
                .map(|_| Answer::Withdrawn)
                .map_err(CommandError::from),
            None => Err(CommandError::NotPublishedHere(name.clone())),
        };
        outputs.push_back(Output::Answer { request, answer });
    }

    pub(super) fn resolve(
        &mut self,
        request: RequestId,
        name: ServiceName,
        from_dht: bool,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        let known = self.providers(&name, now);
        if !from_dht && !known.is_empty() {
            outputs.push_back(event(EventKind::Lookup, &name, now, now, true));
            let answer = Ok(Answer::Resolved { providers: known, from_gossip: true });
            outputs.push_back(Output::Answer { request, answer });
        } else if self.pending.len() >= PENDING_MAX {
            let error = CommandError::Busy("the look-ups under way");
            outputs.push_back(Output::Answer { request, answer: Err(error) });
        } else {
            let pending = Pending {
                kind: EventKind::Lookup,
                name: name.clone(),
                started_at: now,
                sequence: 0,
            };
            self.pending.insert(request, pending);
            outputs.push_back(Output::DhtGet { request, name });
        }
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
        outputs.push_back(event(pending.kind, &pending.name, pending.started_at, now, succeeded));
        let answer = match error {
            None => Ok(Answer::Published { sequence: pending.sequence }),
            Some(reason) => Err(CommandError::NotStored { name: pending.name, reason }),
        };
        outputs.push_back(Output::Answer { request, answer });
    }

    pub(super) fn found(
        &mut self,
        request: RequestId,
        records: &[Vec<u8>],
        membership: &mut Membership,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        let Some(pending) = self.pending.remove(&request) else { return };
        // Only what the DHT itself delivered counts as found there.
        let mut providers = BTreeMap::new();
        for bytes in records {
            let Ok(signed) = wire::decode::<Signed>(bytes, GOSSIP_BYTES_MAX) else { continue };
            let Ok(record) = registry::verify(&signed, membership.roster(), now) else { continue };
            if record.name != pending.name {
                continue;
            }
            let refused = self.registry.accept(&signed, membership, now).err();
            let taken = matches!(refused, None | Some(RecordError::Stale { .. }));
            if taken && self.registry.resolve(&record.name, now).any(|(key, _)| key == signed.key) {
                providers.insert(signed.key, record);
            }
        }
        let succeeded = !providers.is_empty();
        outputs.push_back(event(pending.kind, &pending.name, pending.started_at, now, succeeded));
        let answer = if succeeded {
            Ok(Answer::Resolved { providers: providers.into_iter().collect(), from_gossip: false })
        } else {
            Err(CommandError::UnknownName(pending.name))
        };
        outputs.push_back(Output::Answer { request, answer });
    }

    pub(super) fn republish_due(
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
        self.own.values().map(|own| own.republish_at).min()
    }

    /// Forgets expired records, and answers what the DHT left unanswered.
    pub(super) fn expire(
        &mut self,
        membership: &mut Membership,
        now: Timestamp,
        outputs: &mut Outputs,
    ) {
        self.registry.expire(now);
        let late = self.pending.iter().filter(|(_, p)| now.since(p.started_at) > PENDING_TIMEOUT);
        let late: Vec<(RequestId, EventKind)> = late.map(|(id, p)| (*id, p.kind)).collect();
        for (request, kind) in late {
            match kind {
                EventKind::Lookup => self.found(request, &[], membership, now, outputs),
                _ => self.stored(request, Some("no answer".into()), now, outputs),
            }
        }
    }

    fn providers(&self, name: &ServiceName, now: Timestamp) -> Vec<(PublicKey, ServiceRecord)> {
        self.registry.resolve(name, now).map(|(key, record)| (key, record.clone())).collect()
    }

    fn remember(&mut self, spec: ServiceSpec, now: Timestamp) {
        let republish_at = now + Duration::from_secs(u64::from(spec.ttl_s)) / 3;
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
        let sequence = now.as_micros().max(known.map_or(0, |known| known + 1));
        let record = ServiceRecord {
            name: spec.name.clone(),
            kind: spec.kind,
            owner: me,
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
