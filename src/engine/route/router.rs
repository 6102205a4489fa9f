//! The router: for each tunnel the candidate routes, their forecasts and scores, and the choice.
//!
//! A candidate is alive while both ends of each of its links advertise it and its last probes
//! were not all lost. When the current route dies, a candidate that shares none of its relays is
//! preferred, because nobody knows yet which of them died.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::graph::{OverlayGraph, Topology};
use super::path::{disjoint_backup, k_shortest};
use super::score::{ScoreWeights, route_score, score_for_forecast};
use super::switching::{Current, Reason, SwitchingPolicy};
use crate::engine::forward::Backup;
use crate::engine::measure::{LinkHistories, LinkQuality, RouteHistories};
use crate::engine::overlay::wire::Objective;
use crate::engine::predict::{Forecast, Ranking, RoutePredictor, route_features};
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// Most tunnels of one node. A guess: 16 times what a busy desktop opens.
pub const TUNNELS_MAX: usize = 1_024;

/// How candidates are found, scored and changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PathPolicy {
    /// Candidate routes (k of the k shortest paths), 1 or more.
    pub candidates: usize,
    /// Longest candidate (links), 1 to [`crate::engine::types::MAX_ROUTE_HOPS`].
    pub max_hops: usize,
    /// Weights of the score.
    pub weights: ScoreWeights,
    /// Damping.
    pub switching: SwitchingPolicy,
}

impl Default for PathPolicy {
    fn default() -> Self {
        Self {
            candidates: 8,
            max_hops: 4,
            weights: ScoreWeights::default(),
            switching: SwitchingPolicy::default(),
        }
    }
}

/// One route that was weighed.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// The route.
    pub route: Route,
    /// Whether it can carry traffic now.
    pub alive: bool,
    /// What is forecast for it.
    pub forecast: Forecast,
    /// Score on the forecast in use, 0 to 1; 0 when dead.
    pub score: f64,
    /// Score on the moving average, 0 to 1; 0 when dead.
    pub baseline_score: f64,
}

impl Candidate {
    /// The score that another route has to beat while this one is in use: what this one would score
    /// if its bound were lower by the margin (a share, 0 to 1).
    pub fn score_to_beat(&self, weights: &ScoreWeights, margin: f64) -> f64 {
        let Some(bound_ms) = self.forecast.best().map(|best| best.bound_ms) else {
            return self.score;
        };
        let lower_ms = bound_ms * (1.0 - margin);
        score_for_forecast(weights, self.route.hop_count(), self.score, bound_ms, lower_ms)
    }
}

/// A choice among candidates, with everything that is needed to judge it later.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// When.
    pub at: Timestamp,
    /// For which tunnel; `None` when somebody only asked.
    pub tunnel: Option<TunnelId>,
    /// Where to.
    pub destination: NodeId,
    /// All candidates, best score first.
    pub candidates: Vec<Candidate>,
    /// Index of the route in use after the decision.
    pub chosen: Option<usize>,
    /// Why.
    pub reason: Reason,
    /// Whether the route in use changed.
    pub changed: bool,
    /// Version of the model whose forecasts decided.
    pub model_version: String,
    /// How its forecasts were compared; the margin protects the route in use of a tunnel.
    pub ranking: Ranking,
    /// Version of the model that was asked in shadow.
    pub challenger_version: Option<String>,
    /// Probability with which the policy makes this choice: 1, it does not explore by chance.
    pub propensity: f64,
}

/// A tunnel's destination and the route in use.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The far end.
    pub node: NodeId,
    /// The path that the operator fixed.
    pub forced: Option<Route>,
    /// What the tunnel wants from its routes.
    pub objective: Objective,
    /// Another tunnel to the same node, whose relays this one is to avoid.
    pub beside: Option<TunnelId>,
    /// The route in use, and since when.
    pub current: Option<(Route, Timestamp)>,
    /// Whether any candidate was alive in the last decision.
    pub reachable: bool,
    /// How often the route in use changed, the first choice included.
    pub changes: u32,
    /// Number of the route in use, which travels in datagrams; grows with each change.
    pub route_id: u32,
    /// The shortest route that shares no relay with the one in use, while it is alive; none for a
    /// path that is fixed.
    pub backup: Option<Backup>,
    /// Every route that was weighed in the last decision.
    pub candidates: Vec<Route>,
    /// The highest route number that was given away.
    numbered: u32,
    paths: Option<(Arc<Topology>, Vec<Route>)>,
}

impl Destination {
    /// Takes a route into use. The backup already has its number.
    fn move_to(&mut self, route: Route, now: Timestamp) {
        let prepared = self.backup.take().filter(|backup| backup.route == route);
        self.route_id = prepared.map_or_else(|| self.next_number(), |backup| backup.route_id);
        self.changes = self.changes.wrapping_add(1);
        self.current = Some((route, now));
    }

    /// Keeps the backup in line with the route in use; a new one gets the next number.
    fn set_backup(&mut self, route: Option<Route>) {
        let same = |backup: &Backup| Some(&backup.route) == route.as_ref();
        if self.backup.as_ref().is_some_and(same) {
            return;
        }
        self.backup = route.map(|route| Backup { route, route_id: self.next_number() });
    }

    fn next_number(&mut self) -> u32 {
        self.numbered = self.numbered.wrapping_add(1);
        self.numbered
    }
}

/// The tunnels of this node and their routes.
pub struct IntelligentRouter {
    me: NodeId,
    policy: PathPolicy,
    tunnels: BTreeMap<TunnelId, Destination>,
}

/// What a decision is made from.
pub struct Knowledge<'a> {
    /// The links that exist.
    pub graph: &'a mut OverlayGraph,
    /// What was advertised of links over time.
    pub links: &'a LinkHistories,
    /// What routes delivered.
    pub histories: &'a RouteHistories,
    /// Who forecasts.
    pub predictor: &'a mut RoutePredictor,
}

impl IntelligentRouter {
    /// A router without tunnels.
    pub fn new(me: NodeId, policy: PathPolicy) -> Self {
        Self { me, policy, tunnels: BTreeMap::new() }
    }

    /// Binds a tunnel to a destination. Returns false when [`TUNNELS_MAX`] are open.
    pub fn open(
        &mut self,
        tunnel: TunnelId,
        node: NodeId,
        forced: Option<Route>,
        objective: Objective,
        beside: Option<TunnelId>,
    ) -> bool {
        if self.tunnels.len() >= TUNNELS_MAX && !self.tunnels.contains_key(&tunnel) {
            return false;
        }
        let destination = Destination {
            node,
            forced,
            objective,
            beside,
            current: None,
            reachable: false,
            changes: 0,
            route_id: 0,
            backup: None,
            candidates: Vec::new(),
            numbered: 0,
            paths: None,
        };
        self.tunnels.insert(tunnel, destination);
        true
    }

    /// Forgets a tunnel. Returns whether it was there.
    pub fn close(&mut self, tunnel: TunnelId) -> bool {
        self.tunnels.remove(&tunnel).is_some()
    }

    /// One tunnel; `None` when it is not open.
    pub fn tunnel(&self, tunnel: TunnelId) -> Option<&Destination> {
        self.tunnels.get(&tunnel)
    }

    /// All tunnels, in order of id.
    pub fn tunnels(&self) -> impl Iterator<Item = (TunnelId, &Destination)> + '_ {
        self.tunnels.iter().map(|(id, destination)| (*id, destination))
    }

    /// Decides for one tunnel; `None` when it is not open.
    pub fn decide(
        &mut self,
        tunnel: TunnelId,
        know: &mut Knowledge<'_>,
        now: Timestamp,
    ) -> Option<Decision> {
        let destination = self.tunnels.get_mut(&tunnel)?;
        let mut routes = match &destination.forced {
            Some(forced) => vec![forced.clone()],
            None => candidate_routes(self.me, &self.policy, destination, know.graph),
        };
        if let Some((current, _)) = &destination.current
            && !routes.contains(current)
        {
            routes.push(current.clone());
        }
        let candidates = weigh(&self.policy, routes, know, now);
        let current = destination.current.as_ref();
        let current_at = current.and_then(|(r, _)| candidates.iter().position(|c| c.route == *r));
        let ranking = know.predictor.ranking();
        let to_beat = |i: usize| candidates[i].score_to_beat(&self.policy.weights, ranking.margin);
        let view = current.map(|(_, since)| Current {
            score: current_at.filter(|i| candidates[*i].alive).map(to_beat),
            since: *since,
        });
        let mut best = candidates.iter().position(|candidate| candidate.alive);
        let best_score = best.map(|index| candidates[index].score);
        let is_current = best.is_some() && best == current_at;
        let (change, reason) = self.policy.switching.decide(view, best_score, is_current, now);
        if reason == Reason::CurrentDead
            && let Some((dead, _)) = current
        {
            let shares = |c: &Candidate| c.route.relays().iter().any(|r| dead.relays().contains(r));
            best = candidates.iter().position(|c| c.alive && !shares(c)).or(best);
        }
        let chosen = match reason {
            Reason::NoRoute => None,
            _ if change => best,
            _ => current_at,
        };
        if change && let Some(index) = chosen {
            destination.move_to(candidates[index].route.clone(), now);
        }
        destination.reachable = reason != Reason::NoRoute;
        let topology = know.graph.topology();
        let current = destination.current.as_ref().filter(|_| destination.forced.is_none());
        let backup = current
            .and_then(|(route, _)| disjoint_backup(&topology, route, self.policy.max_hops))
            .map(|(backup, _)| backup)
            .filter(|backup| !know.histories.is_dead(backup));
        destination.set_backup(backup);
        destination.candidates = candidates.iter().map(|c| c.route.clone()).collect();
        let reason = match reason {
            Reason::NoRoute => reason,
            _ if destination.forced.is_some() => Reason::Forced,
            _ => reason,
        };
        Some(Decision {
            at: now,
            tunnel: Some(tunnel),
            destination: destination.node,
            candidates,
            chosen,
            reason,
            changed: change,
            model_version: know.predictor.version(),
            ranking,
            challenger_version: know.predictor.challenger_version(),
            propensity: 1.0,
        })
    }

    /// The data plane has left the route in use for the backup. Returns false when there is none.
    pub fn moved_to_backup(&mut self, tunnel: TunnelId, now: Timestamp) -> bool {
        let Some(destination) = self.tunnels.get_mut(&tunnel) else { return false };
        let Some(backup) = destination.backup.clone() else { return false };
        destination.move_to(backup.route, now);
        true
    }

    /// Gives the route in use a number above all that were given to this tunnel, so that the data
    /// plane takes it.
    pub fn renumber(&mut self, tunnel: TunnelId) {
        if let Some(destination) = self.tunnels.get_mut(&tunnel) {
            destination.route_id = destination.next_number();
        }
    }

    /// What would be decided for a destination to which no tunnel is open.
    pub fn explain(&self, node: NodeId, know: &mut Knowledge<'_>, now: Timestamp) -> Decision {
        let topology = know.graph.topology();
        let policy = &self.policy;
        let found = k_shortest(&topology, self.me, node, policy.candidates, policy.max_hops);
        let routes = found.into_iter().map(|(route, _)| route).collect();
        let candidates = weigh(policy, routes, know, now);
        let chosen = candidates.iter().position(|candidate| candidate.alive);
        Decision {
            at: now,
            tunnel: None,
            destination: node,
            candidates,
            chosen,
            reason: if chosen.is_some() { Reason::First } else { Reason::NoRoute },
            changed: false,
            model_version: know.predictor.version(),
            ranking: know.predictor.ranking(),
            challenger_version: know.predictor.challenger_version(),
            propensity: 1.0,
        }
    }
}

/// The k shortest paths and the disjoint backup; searched again only when the graph changed.
fn candidate_routes(
    me: NodeId,
    policy: &PathPolicy,
    destination: &mut Destination,
    graph: &mut OverlayGraph,
) -> Vec<Route> {
    let topology = graph.topology();
    if let Some((searched, routes)) = &destination.paths
        && Arc::ptr_eq(searched, &topology)
    {
        return routes.clone();
    }
    let found = k_shortest(&topology, me, destination.node, policy.candidates, policy.max_hops);
    let mut routes: Vec<Route> = found.into_iter().map(|(route, _)| route).collect();
    let backup = routes.first().and_then(|best| disjoint_backup(&topology, best, policy.max_hops));
    if let Some((backup, _)) = backup
        && !routes.contains(&backup)
    {
        routes.push(backup);
    }
    destination.paths = Some((topology, routes.clone()));
    routes
}

/// Forecasts and scores, best first; dead ones last.
fn weigh(
    policy: &PathPolicy,
    routes: Vec<Route>,
    know: &mut Knowledge<'_>,
    now: Timestamp,
) -> Vec<Candidate> {
    let mut candidates: Vec<Candidate> = routes
        .into_iter()
        .map(|route| {
            let history = know.histories.of(&route);
            let forecast =
                know.predictor.forecast(route_features(&route, know.links, history, now));
            let links: Option<Vec<LinkQuality>> =
                route.links().map(|(a, b)| know.graph.quality(a, b)).collect();
            let alive = route.links().all(|(a, b)| know.graph.is_link(a, b))
                && !know.histories.is_dead(&route);
            let score =
                |prediction: Option<crate::engine::predict::Prediction>| match (&links, prediction)
                {
                    (Some(links), Some(prediction)) if alive => {
                        route_score(&policy.weights, links, prediction.bound_ms)
                    }
                    _ => 0.0,
                };
            Candidate {
                score: score(forecast.best()),
                baseline_score: score(forecast.moving_average),
                route,
                alive,
                forecast,
            }
        })
        .collect();
    candidates.sort_by(|a, b| {
        let by_score = b.alive.cmp(&a.alive).then(b.score.total_cmp(&a.score));
        by_score.then_with(|| a.route.cmp(&b.route))
    });
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::{FeatureVector, LastValue, Prediction, QualityModel};
    use crate::engine::route::counterfactual;

    const TUNNEL: TunnelId = TunnelId(1);

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    fn route(nodes: &[u8]) -> Route {
        Route::new(nodes.iter().copied().map(node).collect::<Vec<_>>()).unwrap()
    }

    /// S=0, T=9, relays 1 (10 ms links), 2 (20 ms links), joined 1-2.
    struct World {
        graph: OverlayGraph,
        links: LinkHistories,
        histories: RouteHistories,
        predictor: RoutePredictor,
        router: IntelligentRouter,
        sequence: u64,
    }

    impl World {
        fn new() -> Self {
            let mut world = Self {
                graph: OverlayGraph::default(),
                links: LinkHistories::default(),
                histories: RouteHistories::default(),
                predictor: RoutePredictor::new(true),
                router: IntelligentRouter::new(node(0), PathPolicy::default()),
                sequence: 0,
            };
            world.links(&[(0, 1, 10.0), (1, 9, 10.0), (0, 2, 20.0), (2, 9, 20.0), (1, 2, 5.0)]);
            world
        }

        fn links(&mut self, links: &[(u8, u8, f64)]) {
            self.sequence += 1;
            for me in [0, 1, 2, 9] {
                let mine = links.iter().filter_map(|(a, b, rtt_ms)| {
                    let other = if *a == me {
                        b
                    } else if *b == me {
                        a
                    } else {
                        return None;
                    };
                    let quality = LinkQuality {
                        rtt_ms: *rtt_ms,
                        jitter_ms: 0.0,
                        loss: 0.0,
                        bandwidth: None,
                        utilisation: 0.0,
                    };
                    Some((node(*other), quality))
                });
                let mine: BTreeMap<NodeId, LinkQuality> = mine.collect();
                let said = mine.iter().map(|(other, quality)| (*other, Some(*quality)));
                self.links.advertised(node(me), Timestamp(0), said);
                self.graph.accept(node(me), self.sequence, mine, Timestamp(0)).unwrap();
            }
        }

        fn decide(&mut self, at_s: u64) -> Decision {
            let mut know = Knowledge {
                graph: &mut self.graph,
                links: &self.links,
                histories: &self.histories,
                predictor: &mut self.predictor,
            };
            self.router.decide(TUNNEL, &mut know, Timestamp(at_s * 1_000_000)).unwrap()
        }

        fn open(&mut self) {
            assert!(self.router.open(TUNNEL, node(9), None, Objective::Balanced, None));
        }

        fn current(&self) -> Route {
            self.router.tunnels[&TUNNEL].current.clone().unwrap().0
        }
    }

    #[test]
    fn the_best_route_is_chosen_and_its_backup_is_disjoint() {
        let mut world = World::new();
        world.open();
        let decision = world.decide(0);
        assert_eq!((decision.reason, decision.changed), (Reason::First, true));
        assert_eq!(world.current(), route(&[0, 1, 9]));
        let expected = Backup { route: route(&[0, 2, 9]), route_id: 2 };
        assert_eq!(world.router.tunnels[&TUNNEL].backup, Some(expected));
        assert_eq!(decision.candidates.len(), 4);
    }

    #[test]
    fn a_route_that_turned_bad_is_left_by_margin_and_hold() {
        let mut world = World::new();
        world.open();
        world.decide(0);
        for _ in 0..5 {
            world.histories.probed(&route(&[0, 1, 9]), Timestamp(1), Some(200_000));
        }
        assert_eq!(world.decide(1).reason, Reason::Held);
        assert_eq!(world.decide(3).reason, Reason::Better);
        assert_ne!(world.current(), route(&[0, 1, 9]));
    }

    /// Forecasts the last value of the route.
    struct LastWithMargin(f64);

    impl QualityModel for LastWithMargin {
        fn version(&self) -> &str {
            "test"
        }

        fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
            LastValue.predict(features)
        }

        fn ranking(&self) -> Ranking {
            Ranking { margin: self.0, ..Ranking::PLAIN }
        }
    }

    /// A tunnel on 0-1-9, whose last round trip is `in_use_ms`, beside 0-2-9 with `other_ms`.
    fn decided_with(margin: f64, in_use_ms: f64, other_ms: f64) -> Decision {
        let mut world = World::new();
        world.router.policy.switching.margin = 0.0;
        world.predictor.set_model(Some(Arc::new(LastWithMargin(margin))));
        world.router.open(TUNNEL, node(9), None, Objective::default(), None);
        world.decide(0);
        assert_eq!(world.current(), route(&[0, 1, 9]));
        let measured = [(&[0, 1, 9][..], in_use_ms), (&[0, 2, 9], other_ms)];
        for (nodes, ms) in measured {
            for _ in 0..5 {
                let rtt_us = (ms * 1e3) as u64;
                world.histories.probed(&route(nodes), Timestamp(1), Some(rtt_us));
            }
        }
        for nodes in [&[0, 1, 2, 9][..], &[0, 2, 1, 9]] {
            world.histories.probed(&route(nodes), Timestamp(1), Some(900_000));
        }
        world.decide(10)
    }

    #[test]
    fn the_route_in_use_is_left_only_for_a_bound_that_is_lower_by_the_margin() {
        for (margin, other_ms, reason) in [
            (0.0, 90.0, Reason::Better),
            (0.2, 90.0, Reason::WithinMargin),
            (0.2, 81.0, Reason::WithinMargin),
            (0.2, 79.0, Reason::Better),
            (0.2, 70.0, Reason::Better),
            (0.2, 110.0, Reason::Best),
            (1.0, 1.0, Reason::WithinMargin),
        ] {
            let decision = decided_with(margin, 100.0, other_ms);
            assert_eq!(decision.reason, reason, "{margin} {other_ms}");
            assert_eq!(decision.ranking.margin, margin);
        }
    }

    #[test]
    fn the_counterfactual_of_a_decision_is_where_the_router_turns() {
        for (margin, in_use_ms, other_ms) in
            [(0.0, 100.0, 90.0), (0.2, 100.0, 90.0), (0.2, 80.0, 95.0)]
        {
            let policy = PathPolicy {
                switching: SwitchingPolicy { margin: 0.0, ..SwitchingPolicy::default() },
                ..PathPolicy::default()
            };
            let stays = decided_with(margin, in_use_ms, in_use_ms * 1.5);
            assert_eq!(stays.reason, Reason::Best);
            let found = counterfactual(&policy, &stays).unwrap();
            let below = found.falls_below_ms.unwrap();
            assert!(!decided_with(margin, in_use_ms, below + 0.01).changed, "{below}");
            assert!(decided_with(margin, in_use_ms, below - 0.01).changed, "{below}");
            let stays = decided_with(margin, other_ms * 0.9, other_ms);
            let above = counterfactual(&policy, &stays).unwrap().rises_above_ms.unwrap();
            assert!(!decided_with(margin, above - 0.01, other_ms).changed, "{above}");
            assert!(decided_with(margin, above + 0.01, other_ms).changed, "{above}");
        }
    }

    #[test]
    fn a_dead_route_is_left_at_once_for_one_that_shares_no_relay() {
        let mut world = World::new();
        // The way over both relays is far better than the way over the second alone.
        world.links(&[(0, 1, 10.0), (1, 9, 10.0), (0, 2, 60.0), (2, 9, 10.0), (1, 2, 5.0)]);
        world.open();
        world.decide(0);
        for _ in 0..3 {
            world.histories.probed(&route(&[0, 1, 9]), Timestamp(1), None);
        }
        assert_eq!(world.decide(0).reason, Reason::CurrentDead);
        assert_eq!(world.current(), route(&[0, 2, 9]));
    }

    #[test]
    fn a_withdrawn_link_kills_its_routes() {
        let mut world = World::new();
        world.open();
        world.decide(0);
        world.links(&[(0, 1, 10.0), (0, 2, 20.0), (2, 9, 20.0), (1, 2, 5.0)]);
        assert_eq!(world.decide(0).reason, Reason::CurrentDead);
        assert_eq!(world.current(), route(&[0, 2, 9]));
        world.links(&[(0, 1, 10.0)]);
        let decision = world.decide(1);
        assert_eq!((decision.reason, decision.chosen), (Reason::NoRoute, None));
    }

    #[test]
    fn a_forced_path_stays() {
        let mut world = World::new();
        let forced = Some(route(&[0, 2, 1, 9]));
        world.router.open(TUNNEL, node(9), forced, Objective::Balanced, None);
        let decision = world.decide(0);
        assert_eq!((decision.reason, decision.candidates.len()), (Reason::Forced, 1));
        assert_eq!(world.current(), route(&[0, 2, 1, 9]));
        assert_eq!(world.router.tunnels[&TUNNEL].backup, None, "it is not left");
    }

    #[test]
    fn a_route_number_names_one_route_and_the_backup_takes_its_own_along() {
        let mut world = World::new();
        world.open();
        world.decide(0);
        let kill = |world: &mut World, relay: u8| {
            for _ in 0..3 {
                world.histories.probed(&route(&[0, relay, 9]), Timestamp(1), None);
            }
            world.decide(0);
            let used = &world.router.tunnels[&TUNNEL];
            (used.changes, used.route_id, used.backup.as_ref().map(|backup| backup.route_id))
        };
        assert_eq!(kill(&mut world, 1), (2, 2, None), "the backup, and no other way that lives");
        world.histories.probed(&route(&[0, 1, 9]), Timestamp(2), Some(1_000));
        world.decide(0);
        let backup = world.router.tunnels[&TUNNEL].backup.clone().unwrap();
        assert_eq!((backup.route, backup.route_id), (route(&[0, 1, 9]), 3), "a new number");
        assert_eq!(kill(&mut world, 2).1, 3);
    }
}
