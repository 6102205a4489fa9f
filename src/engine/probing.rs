//! Links come and go, probes leave and return: what is measured, and what follows at once. When
//! to probe what is decided by [`super::measure::prober`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::RngExt;

use super::Engine;
use super::event::{Notice, Output};
use super::measure::prober::TARGETS_MAX;
use super::measure::window_statistics::quantile;
use super::measure::{ProbeKind, Sample};
use super::predict::route_features;
use super::predict::watch::Alarm;
use super::route::graph::LinkChange;
use super::types::{NodeId, Route, Timestamp};

/// Shortest time that a probe is given to come back (ms): a loaded machine answers within it.
const PROBE_TIMEOUT_MS_MIN: f64 = 250.0;
/// Longest time that a probe is given to come back (ms).
const PROBE_TIMEOUT_MS_MAX: f64 = 2_000.0;
/// Time between two probes of a link that nobody uses, that is steady, in a mesh that is not restless; never
/// less than between those of other links. With [`AGAIN_AFTER`] such a link that falls silent is down as
/// soon as one that is probed every second without hurry: 2 s, twice 0.5 s, and the time-out.
const IDLE_LINK_PROBE: Duration = Duration::from_secs(2);
/// A link of which a probe was lost is probed again when this share of the time between two probes has
/// passed since that one.
const AGAIN_AFTER: f64 = 0.5;

impl Engine {
    pub(super) fn link_up(&mut self, node: NodeId) {
        self.aim = true;
        if !self.links.connected(node) {
            self.dropped("link", format!("{node} is one neighbour too many"));
        }
    }

    pub(super) fn link_down(&mut self, node: NodeId, now: Timestamp) {
        if self.links.disconnected(node) {
            self.notice(Notice::Link { neighbour: node, up: false });
            self.graph.own_link(self.me, node, false);
            self.link_went(self.me, node, now);
            self.aim = true;
        }
    }

    /// Notes in the store what is now known of each link; a link that went, came or got slower is a
    /// reason to decide about the tunnels that it concerns.
    pub(super) fn links_changed(&mut self, changes: Vec<LinkChange>, at: Timestamp) {
        // One advertisement is one origin's; an expiry may name several.
        let kept = if self.keeps_histories { changes.as_slice() } else { &[] };
        for said in kept.chunk_by(|(one, ..), (other, ..)| one == other) {
            let links = said.iter().map(|(_, neighbour, quality)| (*neighbour, *quality));
            self.advertised.advertised(said[0].0, at, links);
        }
        self.links_advertised(&changes, at);
        for (origin, neighbour, quality) in changes {
            self.record(Sample::LinkState { at, origin, neighbour, quality });
        }
    }

    /// From now on histories of links are kept, beginning with what is advertised.
    pub(super) fn begin_histories(&mut self, now: Timestamp) {
        if std::mem::replace(&mut self.keeps_histories, true) {
            return;
        }
        let at = self.stamp(now);
        for (origin, links) in self.graph.advertised() {
            let links = links.iter().map(|(neighbour, quality)| (*neighbour, Some(*quality)));
            self.advertised.advertised(origin, at, links);
        }
    }

    /// Sends a probe and returns its id.
    pub(super) fn send_probe(&mut self, kind: ProbeKind, route: Route, now: Timestamp) -> u64 {
        let timeout_ms = match kind {
            ProbeKind::Link => self.links.probe_timeout_ms(
                route.destination(),
                PROBE_TIMEOUT_MS_MIN,
                PROBE_TIMEOUT_MS_MAX,
            ),
            ProbeKind::Route => {
                let rtts = self.histories.of(&route).map(|history| history.rtts_ms(5));
                let median = quantile(&rtts.unwrap_or_default(), 0.5);
                median.map_or(PROBE_TIMEOUT_MS_MAX, |median| {
                    (3.0 * median).clamp(PROBE_TIMEOUT_MS_MIN, PROBE_TIMEOUT_MS_MAX)
                })
            }
        };
        let sent_at = self.stamp(now);
        if kind == ProbeKind::Route {
            let (links, history) = (&self.advertised, self.histories.of(&route));
            let features = || route_features(&route, links, history, sent_at);
            self.predictor.probe_sent(sent_at, route.destination(), features);
        }
        let timeout = Duration::from_secs_f64(timeout_ms / 1e3);
        let id = self.prober.sent(kind, route.clone(), sent_at, timeout);
        self.outputs.push_back(Output::SendProbe { id, route });
        id
    }

    pub(super) fn probe_answered(&mut self, id: u64, rtt_us: u64, now: Timestamp) {
        self.pinged(id, Some(rtt_us));
        if let Some(probe) = self.prober.answered(id) {
            self.probe_completed(probe.kind, probe.route, probe.sent_at, Some(rtt_us), now);
        }
    }

    pub(super) fn probe_completed(
        &mut self,
        kind: ProbeKind,
        route: Route,
        sent_at: Timestamp,
        rtt_us: Option<u64>,
        now: Timestamp,
    ) {
        let done_at = self.stamp(now);
        match kind {
            ProbeKind::Link => {
                let neighbour = route.destination();
                let was_steady = self.links.is_steady(neighbour);
                let turned = self.links.probed(neighbour, rtt_us);
                self.aim |= was_steady != self.links.is_steady(neighbour);
                if rtt_us.is_none() {
                    let after = self.config.intervals.link_probe.mul_f64(AGAIN_AFTER);
                    self.prober.again_by(&(kind, route.clone()), now.max(sent_at + after));
                }
                if turned {
                    let up = rtt_us.is_some();
                    self.notice(Notice::Link { neighbour, up });
                    self.graph.own_link(self.me, neighbour, up);
                    self.aim = true;
                    if up {
                        self.way_came(now);
                    } else {
                        self.link_went(self.me, neighbour, now);
                    }
                }
            }
            ProbeKind::Route => {
                let was_dead = self.histories.is_dead(&route);
                self.histories.probed(&route, done_at, rtt_us);
                self.advertised.delivered(&route, rtt_us);
                match self.predictor.probe_completed(sent_at, rtt_us, now) {
                    Some((version, Alarm::Worse(loss))) => {
                        self.notice(Notice::ModelWithdrawn { version, loss });
                        self.decide_all(now);
                    }
                    Some((version, Alarm::Drift)) => self.notice(Notice::ModelDrift { version }),
                    None => {}
                }
                let is_dead = self.histories.is_dead(&route);
                if was_dead != is_dead {
                    self.route_turned(&route, now);
                }
                let rtt_ms = rtt_us.map(|rtt_us| rtt_us as f64 / 1e3);
                self.predictor.comparing_mut().met(&route, sent_at, rtt_ms);
                if let Some(rtt_ms) = rtt_ms {
                    self.route_met(&route, rtt_ms, now);
                }
            }
        }
        self.record(Sample::Probe { kind, route, sent_at, done_at, rtt_us });
    }

    pub(super) fn aim_probes(&mut self, now: Timestamp) {
        let intervals = self.config.intervals;
        let mut targets = BTreeMap::new();
        let ways = self.router.tunnels().flat_map(|(_, destination)| {
            let current = destination.current.iter().map(|(route, _)| route);
            current.chain(&destination.candidates)
        });
        let used: BTreeSet<NodeId> = ways.map(|route| route.nodes()[1]).collect();
        let is_restless = self.churn.is_restless(self.peers.len(), now);
        for (neighbour, _, _) in self.links.all() {
            let is_idle = !used.contains(&neighbour) && self.links.is_steady(neighbour);
            let interval = match is_idle && !is_restless {
                true => intervals.link_probe.max(IDLE_LINK_PROBE),
                false => intervals.link_probe,
            };
            if let Ok(route) = Route::new([self.me, neighbour]) {
                targets.insert((ProbeKind::Link, route), interval);
            }
        }
        // Links first, then what is in use, then what might be, as far as there is room.
        let current = self.router.tunnels().filter_map(|(_, d)| d.current.as_ref());
        for (route, _) in current.take(TARGETS_MAX - targets.len()) {
            targets.insert((ProbeKind::Route, route.clone()), intervals.active_probe);
        }
        for route in self.router.tunnels().flat_map(|(_, destination)| &destination.candidates) {
            if targets.len() >= TARGETS_MAX {
                break;
            }
            let target = (ProbeKind::Route, route.clone());
            targets.entry(target).or_insert(intervals.candidate_probe);
        }
        let random = &mut self.random;
        self.prober.set_targets(&targets, now, || random.random());
    }
}
