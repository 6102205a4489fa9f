//! What is a reason to decide about a tunnel before its time: links and routes that come, go or turn
//! bad, and what the data plane says of routes in use: that one is lost, and what traffic met on each.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Engine;
use super::deciding::{Expected, UNREACHABLE_AFTER};
use super::event::Notice;
use super::measure::suspects::DELIVERS;
use super::measure::{RouteReport, Sample};
use super::route::Decision;
use super::route::graph::LinkChange;
use super::types::{NodeId, Route, Timestamp, TunnelId};

/// Traffic on a route becomes a sample for each such time.
pub const ROUTE_SLICE: Duration = Duration::from_secs(10);
/// Datagrams that a report must cover before its loss says anything: one lost is 2 points.
const LOSS_DATAGRAMS_MIN: u64 = 50;

/// What traffic met on the route in use of each tunnel since its last sample; one for each open
/// tunnel at most.
#[derive(Clone, Debug, Default)]
pub(super) struct RouteTotals(BTreeMap<TunnelId, RouteReport>);

fn has_link(route: &Route, a: NodeId, b: NodeId) -> bool {
    route.links().any(|link| link == (a, b) || link == (b, a))
}

impl Engine {
    // --- when to decide ------------------------------------------------------------------------

    /// All tunnels, because forecasts come from somebody else now.
    pub(super) fn decide_all(&mut self, now: Timestamp) {
        for (tunnel, _) in self.router.tunnels() {
            self.deciding.by(tunnel, now);
        }
    }

    /// A link is gone: the tunnels that use it, or would fall back on it, are decided at once.
    pub(super) fn link_went(&mut self, a: NodeId, b: NodeId, now: Timestamp) {
        for (tunnel, destination) in self.router.tunnels() {
            let current = destination.current.iter().map(|(route, _)| route);
            let backup = destination.backup.iter().map(|backup| &backup.route);
            if current.chain(backup).any(|route| has_link(route, a, b)) {
                self.deciding.by(tunnel, now);
            }
        }
    }

    /// A link or a route is there that was not: tunnels without a route are decided soon.
    pub(super) fn way_came(&mut self, now: Timestamp) {
        for (tunnel, destination) in self.router.tunnels() {
            if !destination.reachable {
                self.deciding.by(tunnel, now + UNREACHABLE_AFTER);
            }
        }
    }

    /// Links as an advertisement describes them now.
    pub(super) fn links_advertised(&mut self, changes: &[LinkChange], now: Timestamp) {
        for (origin, neighbour, _) in changes.iter().filter(|(.., quality)| quality.is_none()) {
            self.link_went(*origin, *neighbour, now);
        }
        let mut there = changes.iter().filter(|(.., quality)| quality.is_some()).peekable();
        if there.peek().is_none() {
            return;
        }
        self.way_came(now);
        let said: Vec<(NodeId, NodeId)> =
            there.map(|(origin, other, _)| (*origin, *other)).collect();
        for (tunnel, destination) in self.router.tunnels() {
            let Some((route, _)) = &destination.current else { continue };
            let is_one =
                said.iter().any(|(origin, neighbour)| has_link(route, *origin, *neighbour));
            if let Some(links_ms) = is_one.then(|| self.links_ms(route)).flatten() {
                self.deciding.advertised(tunnel, links_ms, now);
            }
        }
    }

    /// A route died, or lives again.
    pub(super) fn route_turned(&mut self, route: &Route, now: Timestamp) {
        for (tunnel, destination) in self.router.tunnels() {
            let current = destination.current.as_ref().is_some_and(|(current, _)| current == route);
            let backup = destination.backup.as_ref().is_some_and(|backup| backup.route == *route);
            if current || backup || destination.candidates.contains(route) {
                self.deciding.by(tunnel, now);
            }
        }
    }

    /// A probe over a route came back after so long (ms).
    pub(super) fn route_met(&mut self, route: &Route, rtt_ms: f64, now: Timestamp) {
        for (tunnel, destination) in self.router.tunnels() {
            if destination.current.as_ref().is_some_and(|(current, _)| current == route) {
                self.deciding.met(tunnel, rtt_ms, None, now);
            }
        }
    }

    /// What a decision was made on, of the route that is in use after it.
    pub(super) fn expected(&self, decision: &Decision) -> Expected {
        let chosen = decision.chosen.and_then(|index| decision.candidates.get(index));
        chosen.map_or_else(Expected::default, |chosen| Expected {
            rtt_ms: chosen.forecast.best().map(|best| best.latency_ms),
            links_ms: self.links_ms(&chosen.route),
            loss: self.probe_loss(&chosen.route).max(1.0 - chosen.delivers()),
        })
    }

    /// Share of the newest probes over a route that were lost.
    fn probe_loss(&self, route: &Route) -> f64 {
        self.histories.of(route).map_or(0.0, |history| history.loss())
    }

    /// Share of what is sent over a route that arrives, as its links claim and probes over it say, the
    /// lower of the two; `None` while a link is not advertised.
    fn claimed(&self, route: &Route) -> Option<f64> {
        let links = route.links().map(|(a, b)| Some(1.0 - self.graph.quality(a, b)?.loss));
        let claimed: f64 = links.product::<Option<f64>>()?;
        Some(claimed.min(1.0 - self.probe_loss(route)))
    }

    /// Sum of the advertised round-trip times of a route's links (ms).
    fn links_ms(&self, route: &Route) -> Option<f64> {
        route.links().map(|(a, b)| Some(self.graph.quality(a, b)?.rtt_ms)).sum()
    }

    // --- what the data plane says --------------------------------------------------------------

    /// A route of a tunnel no longer answers, because node `at` of it said so or by its silence:
    /// the backup is in use, and the tunnel is decided at once. What is said of a route that was left
    /// already has no effect.
    pub(super) fn route_lost(
        &mut self,
        tunnel: TunnelId,
        route_id: u32,
        at: Option<usize>,
        now: Timestamp,
    ) {
        let Some(used) = self.router.tunnel(tunnel) else { return };
        if route_id > used.route_id {
            return self.catch_up(tunnel, now);
        }
        let used = (route_id == used.route_id).then_some(&used.current);
        let Some((route, _)) = used.cloned().flatten() else { return };
        self.histories.silenced(&route, now);
        // Who says that a link is gone has not looked beyond it.
        if at.is_none() && self.suspects.silent(&route, now) {
            self.doubt_relays(now);
        }
        let at = at.and_then(|index| route.nodes().get(index).copied());
        self.notice(Notice::RouteLost { tunnel, at });
        if self.router.moved_to_backup(tunnel, now)
            && let Some((route, _)) = self.router.tunnel(tunnel).and_then(|t| t.current.clone())
        {
            let route = Some(route);
            self.notice(Notice::RouteChanged { tunnel, route, reason: "backup" });
        }
        self.deciding.by(tunnel, now);
    }

    /// The data plane uses a backup that is none any more: the route in use gets a number that it
    /// follows.
    fn catch_up(&mut self, tunnel: TunnelId, now: Timestamp) {
        self.router.renumber(tunnel);
        self.deciding.by(tunnel, now);
    }

    /// What traffic met: summed up to samples, and held against what the relays' links claim; a route
    /// that turned bad is decided about.
    pub(super) fn routes_reported(
        &mut self,
        reports: Vec<(TunnelId, RouteReport)>,
        now: Timestamp,
    ) {
        for (tunnel, report) in reports {
            if report.received > 0 {
                self.suspects.answered(report.route.destination());
            }
            let Some(used) = self.router.tunnel(tunnel) else { continue };
            if report.route_id > used.route_id {
                self.catch_up(tunnel, now);
            } else if report.route_id == used.route_id
                && let Some(rtt_us) = report.rtt_us
            {
                let lost = report.sent.saturating_sub(report.received);
                let loss = lost as f64 / report.sent.max(1) as f64;
                let loss = (report.sent >= LOSS_DATAGRAMS_MIN).then_some(loss);
                self.deciding.met(tunnel, rtt_us as f64 / 1e3, loss, now);
            }
            if let Some(claimed) = self.claimed(&report.route) {
                self.honesty.carried(&report, claimed, now);
            }
            self.add_to_totals(tunnel, report, now);
        }
        self.doubt_relays(now);
    }

    /// Relays that deliver less than they claim, and those that may be gone, are avoided.
    pub(super) fn doubt_relays(&mut self, now: Timestamp) {
        let mut doubted = self.honesty.doubted(now);
        for node in self.suspects.suspected(now) {
            doubted.insert(node, DELIVERS);
        }
        self.graph.doubt(doubted);
    }

    fn add_to_totals(&mut self, tunnel: TunnelId, report: RouteReport, now: Timestamp) {
        let total = self.totals.0.get(&tunnel);
        if total.is_some_and(|total| total.route_id != report.route_id) {
            self.close_totals(tunnel, now);
        }
        let total = match self.totals.0.remove(&tunnel) {
            Some(total) => total.and(report),
            None => report,
        };
        let is_full = total.duration_us >= ROUTE_SLICE.as_micros() as u64;
        self.totals.0.insert(tunnel, total);
        if is_full {
            self.close_totals(tunnel, now);
        }
    }

    /// What was summed up of a tunnel becomes a sample.
    pub(super) fn close_totals(&mut self, tunnel: TunnelId, now: Timestamp) {
        if let Some(report) = self.totals.0.remove(&tunnel) {
            let at = self.stamp(now);
            self.record(Sample::RouteSlice { at, tunnel, report });
        }
    }
}
