//! How services are: checks of this node's own and of those that it uses, the word of other providers,
//! and what follows from both. The rules themselves are in [`super::measure::service`] and
//! [`super::overlay::heartbeat`].
//!
//! Of another's service this node believes the worse of two: what its provider says, and what its own
//! checks through the tunnel say. The second stays here, so that nobody can talk down what others
//! provide.
//!
//! A provider whose service is down, or to whom no links lead that both of their ends have, is not
//! named while another one is known that works. Its record stays: it is named again as soon as it
//! works, and forgotten when its own time is over.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::RngExt;

use super::Engine;
use super::event::{Notice, Output, ServiceSpec, Usage, Verdict};
use super::joining::verdict_on;
use super::measure::service::{
    CheckFailure, Checked, END_TO_END_INTERVAL, Ended, FAILURES, Subject,
};
use super::measure::{Health, HealthCheck, Sample, ServiceMonitor, Vantage};
use super::overlay::heartbeat::{Heart, Heartbeat, Heartbeats, Refused};
use super::overlay::wire::{self, GossipMessage, Signed};
use super::overlay::{Load, ServiceRecord};
use super::route::OverlayGraph;
use super::services::Services;
use super::types::{NodeId, PublicKey, ServiceName, Timestamp};

/// What is known of the health of a provider's service.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProviderHealth {
    /// The worse of what the provider says and of what this node's own checks say.
    pub health: Health,
    /// How long it takes to answer (ms): through this node's tunnel where it has one, else at the
    /// provider.
    pub response_ms: Option<f64>,
    /// Why the last check failed, where this node checks it itself; `None` when it did not.
    pub failure: Option<CheckFailure>,
    /// Whose word that is: `EndToEnd` when this node's own checks through a tunnel say so.
    pub by: Vantage,
}

/// What this node watches and has heard.
#[derive(Default)]
pub(super) struct Watching {
    pub(super) monitor: ServiceMonitor,
    heartbeats: Heartbeats,
    heart: Heart,
    load: Load,
}

impl Watching {
    /// What a node's own checks of its own service say, or of another's through a tunnel.
    fn checked(&self, name: &ServiceName, provider: NodeId, vantage: Vantage) -> Option<Checked> {
        let subject = Subject { name: name.clone(), provider, vantage };
        self.monitor.known(&subject).copied()
    }

    fn next_timeout(&self) -> Option<Timestamp> {
        [self.monitor.next_timeout(), self.heart.due_at()].into_iter().flatten().min()
    }
}

impl Services {
    /// How a provider's service is; `None` while nobody knows, as for one that is not checked.
    pub fn health(
        &self,
        name: &ServiceName,
        provider: NodeId,
        now: Timestamp,
    ) -> Option<ProviderHealth> {
        let watching = &self.watching;
        let of = |checked: Checked, by| ProviderHealth {
            health: checked.health,
            response_ms: checked.response_ms,
            failure: checked.failure,
            by,
        };
        if let Some(checked) = watching.checked(name, provider, Vantage::Local) {
            return Some(of(checked, Vantage::Local));
        }
        let said = watching.heartbeats.service(name, provider, now).map(|(health, us)| {
            let response_ms = us.map(|us| f64::from(us) / 1e3);
            ProviderHealth { health, response_ms, failure: None, by: Vantage::Local }
        });
        let own = watching.checked(name, provider, Vantage::EndToEnd);
        match (said, own.map(|checked| of(checked, Vantage::EndToEnd))) {
            (Some(said), Some(own)) if said.health > own.health => Some(said),
            (said, own) => own.or(said),
        }
    }

    /// How much a provider says that it carries.
    pub fn load(&self, provider: NodeId, now: Timestamp) -> Option<Load> {
        self.watching.heartbeats.load(provider, now)
    }

    /// The living providers of a name that should be used: without those that are down or gone, unless
    /// all are.
    pub fn providers(
        &self,
        name: &ServiceName,
        graph: &OverlayGraph,
        now: Timestamp,
    ) -> Vec<(PublicKey, ServiceRecord)> {
        let living = self.registry().resolve(name, now);
        self.usable(name, living.map(|(key, record)| (key, record.clone())), graph, now)
    }

    /// Those of the providers of a name that should be used.
    pub(super) fn usable<R>(
        &self,
        name: &ServiceName,
        providers: impl Iterator<Item = (PublicKey, R)>,
        graph: &OverlayGraph,
        now: Timestamp,
    ) -> Vec<(PublicKey, R)> {
        let providers: Vec<(PublicKey, R)> = providers.collect();
        if providers.len() < 2 {
            return providers;
        }
        let reached = graph.reached_from(self.me());
        let is_down =
            |node| self.health(name, node, now).is_some_and(|known| known.health == Health::Down);
        let works = |node: NodeId| reached.contains(&node) && !is_down(node);
        // A node that has just joined has no link yet, and reaches nobody.
        let may_work = |node: NodeId| reached.len() == 1 && !is_down(node);
        for is_good in [&works as &dyn Fn(NodeId) -> bool, &may_work] {
            if providers.iter().any(|(key, _)| is_good(key.node_id())) {
                return providers.into_iter().filter(|(key, _)| is_good(key.node_id())).collect();
            }
        }
        providers
    }

    /// Watches a service of this node as its operator wants it.
    pub(super) fn watch_own(&mut self, spec: &ServiceSpec, now: Timestamp) {
        let provider = self.me();
        let subject = Subject { name: spec.name.clone(), provider, vantage: Vantage::Local };
        let (watching, random) = (&mut self.watching, &mut self.random);
        watching.heart.begin(random.random(), now);
        if spec.health.check == HealthCheck::None {
            return watching.monitor.unwatch(&subject);
        }
        let interval = Duration::from_millis(spec.health.interval_ms);
        watching.monitor.watch(subject, interval, spec.health.failures, now);
    }

    /// No longer watches a service of this node.
    pub(super) fn unwatch_own(&mut self, name: &ServiceName) {
        let provider = self.me();
        let subject = Subject { name: name.clone(), provider, vantage: Vantage::Local };
        self.watching.monitor.unwatch(&subject);
    }

    /// Watches through tunnels what this node uses now, and nothing else.
    fn watch_used(&mut self, used: &BTreeSet<(ServiceName, NodeId)>, now: Timestamp) {
        let monitor = &mut self.watching.monitor;
        let is_over = |subject: &&Subject| {
            let is_used = used.contains(&(subject.name.clone(), subject.provider));
            subject.vantage == Vantage::EndToEnd && !is_used
        };
        let over: Vec<Subject> = monitor.subjects().filter(is_over).cloned().collect();
        over.iter().for_each(|subject| monitor.unwatch(subject));
        for (name, provider) in used {
            let vantage = Vantage::EndToEnd;
            let subject = Subject { name: name.clone(), provider: *provider, vantage };
            monitor.watch(subject, END_TO_END_INTERVAL, FAILURES, now);
        }
    }

    /// Heartbeats of other providers that count still.
    pub(super) fn heartbeats(&self, now: Timestamp) -> impl Iterator<Item = &Signed> + '_ {
        self.watching.heartbeats.signed(now)
    }

    /// When something is to be checked or said.
    pub(super) fn watch_at(&self) -> Option<Timestamp> {
        self.watching.next_timeout()
    }

    /// Forgets what providers said too long ago.
    pub(super) fn expire_heartbeats(&mut self, now: Timestamp) {
        self.watching.heartbeats.expire(now);
    }

    /// Forgets what a provider said that was put out.
    pub(super) fn forget_heartbeat(&mut self, provider: NodeId) {
        self.watching.heartbeats.forget(provider);
    }
}

impl Engine {
    /// Begins the checks that are due, and says this node's heartbeat.
    pub(super) fn watch_services(&mut self, now: Timestamp) {
        if self.services.watch_at().is_none_or(|at| at > now) {
            return;
        }
        for check in self.services.watching.monitor.take_abandoned(now) {
            self.service_checked(check, Err(CheckFailure::TimedOut), now);
        }
        for (id, subject) in self.services.watching.monitor.take_due(now) {
            let check = match subject.vantage {
                Vantage::Local => self.services.check_of(&subject.name),
                Vantage::EndToEnd => None,
            };
            self.outputs.push_back(Output::CheckService { id, subject, check });
        }
        self.beat(now);
    }

    pub(super) fn service_checked(
        &mut self,
        id: u64,
        result: Result<u64, CheckFailure>,
        now: Timestamp,
    ) {
        let Some(ended) = self.services.watching.monitor.checked(id, result, now) else { return };
        let Ended { subject, began_at, now: known, changed } = ended;
        let done_at = self.stamp(now);
        let started_at = began_at.min(done_at);
        self.record(Sample::ServiceProbe { subject: subject.clone(), started_at, done_at, result });
        if changed {
            if subject.vantage == Vantage::Local {
                self.services.watching.heart.hurry(now);
            }
            self.health_changed(subject, known.health, known.failure);
        }
        self.beat(now);
    }

    /// A stream to a provider's service failed, here or there: looks at it soon.
    pub(super) fn service_doubted(&mut self, name: &ServiceName, provider: NodeId, now: Timestamp) {
        for vantage in [Vantage::Local, Vantage::EndToEnd] {
            let subject = Subject { name: name.clone(), provider, vantage };
            self.services.watching.monitor.hurry(&subject, now);
        }
    }

    /// What this node carries, and what it uses.
    pub(super) fn usage(&mut self, usage: &Usage, now: Timestamp) {
        let busiest = self.links.up().map(|(_, quality)| quality.utilisation);
        let busiest = busiest.fold(0.0, f64::max);
        self.services.watching.load = Load {
            tunnels: usage.tunnels,
            streams: usage.streams,
            utilisation: (busiest.clamp(0.0, 1.0) * 100.0).round() as u8,
        };
        self.services.watch_used(&usage.services, now);
    }

    pub(super) fn heartbeat_received(&mut self, signed: &Signed, now: Timestamp) -> Verdict {
        let origin = signed.key.node_id();
        let heartbeat: Heartbeat = match self.membership.open(signed, now) {
            Ok(heartbeat) => heartbeat,
            Err(error) => {
                self.dropped("heartbeat", error.to_string());
                return verdict_on(&error);
            }
        };
        if origin == self.me {
            if self.may_outdo(heartbeat.sequence, now) {
                self.services.watching.heart.outdone(heartbeat.sequence, now);
            }
            return Verdict::Ignore;
        }
        let may = || self.gossip.may_beat(origin, now);
        match self.services.watching.heartbeats.accept(signed, heartbeat, may, now) {
            Ok(changes) => {
                // What it says of names that it does not provide is nobody's concern.
                let registry = self.services.registry();
                let provides = |(name, _): &(ServiceName, Health)| {
                    registry.resolve(name, now).any(|(key, _)| key == signed.key)
                };
                let changes: Vec<_> = changes.into_iter().filter(provides).collect();
                for (name, health) in changes {
                    let vantage = Vantage::Local;
                    self.health_changed(Subject { name, provider: origin, vantage }, health, None);
                }
                Verdict::Accept
            }
            Err(Refused::Stale) => Verdict::Ignore,
            Err(Refused::Behind(by)) => self.other_clock(origin, by, "behind"),
            Err(Refused::Ahead(by)) => self.other_clock(origin, by, "ahead of"),
            Err(Refused::TooOften) => {
                self.dropped("heartbeat-too-often", format!("{origin} beats too often"));
                Verdict::Ignore
            }
            Err(Refused::Full) => {
                self.dropped("heartbeat", "too many providers are known".into());
                Verdict::Ignore
            }
        }
    }

    fn health_changed(&mut self, subject: Subject, health: Health, failure: Option<CheckFailure>) {
        self.notice(Notice::ServiceHealth { subject, health, failure });
    }

    /// Says this node's heartbeat when it is due.
    fn beat(&mut self, now: Timestamp) {
        let Services { watching, own, random, .. } = &mut self.services;
        let Watching { monitor, heart, load, .. } = watching;
        let subjects = own.keys().map(|name| Subject {
            name: name.clone(),
            provider: self.me,
            vantage: Vantage::Local,
        });
        let known = subjects.filter_map(|subject| {
            let checked = *monitor.known(&subject)?;
            Some((subject.name, checked))
        });
        let Some(heartbeat) = heart.beat(*load, known, now) else { return };
        if own.is_empty() {
            return;
        }
        heart.begin(random.random(), now);
        let signed = Signed::seal(&self.author, &heartbeat);
        let message = wire::encode(&GossipMessage::Heartbeat(signed));
        self.outputs.push_back(Output::Publish(message));
    }
}
