//! The router: for each tunnel the candidate routes, their forecasts and scores, and the choice.
//!
//! A candidate is alive while both ends of each of its links advertise it and its last probes
//! were not all lost. When the current route dies, the backup that was prepared for that is taken,
//! else a candidate that shares none of its relays, because nobody knows yet which of them died.
//!
//! A route that failed of late is kept back while there is another. When that other one turns bad and no
//! free route is better, those that are kept back are weighed against it by their scores.
//!
//! A tunnel that was opened beside another one keeps off the relays of that one, and of those that
//! were opened beside it with lower numbers: in this order, so that they do not chase each other. While
//! there is no route left for it but theirs it gets none.
//!
//! A tunnel with a reservation whose route refuses moves to the next candidate at once, until one
//! grants or [`RESERVE_TRIES`] have refused.
//!
//! Where the operator wants it, a share of the decisions tries another route ([`super::explore`]).

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::candidate::{Decision, Knowledge, Overlap, Wanted, disjoint, held_back, weigh};
use super::destination::{Destination, Reservation, ReservationState};
use super::explore::Explorer;
use super::finding::Finding;
use super::graph::OverlayGraph;
use super::score::ScoreWeights;
use super::switching::{Current, Reason, SwitchingPolicy};
use crate::engine::overlay::wire::Objective;
use crate::engine::traffic::CAPACITY_UNKNOWN;
use crate::engine::traffic::message::Bottleneck;
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// Most tunnels of one node. A guess: 16 times what a busy desktop opens.
pub const TUNNELS_MAX: usize = 1_024;
/// Within this time no more than a share of the tunnels leaves its route for one that is merely
/// better, so that the others see what the first ones do to it.
pub const MOVES_INTERVAL: Duration = Duration::from_millis(500);
/// That share is one in so many.
const MOVES_SHARE: usize = 8;
/// And so many may always.
const MOVES_MIN: usize = 4;

/// Routes that are asked for a reservation, one after the other. A refusal takes a round trip.
pub const RESERVE_TRIES: usize = 3;

/// How candidates are found, scored and changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PathPolicy {
    /// Candidate routes (k of the k shortest paths), 1 or more.
    pub candidates: usize,
    /// Longest candidate (links), 1 to [`crate::engine::types::MAX_ROUTE_HOPS`]; where none is that
    /// short, that many.
    pub max_hops: usize,
    /// Weights of the score for the balanced objective.
    pub weights: ScoreWeights,
    /// What a link is counted on to carry while it was never busy (bytes/s).
    pub capacity_unknown: f64,
    /// Damping.
    pub switching: SwitchingPolicy,
    /// Share of decisions that may try another route, 0 to [`super::explore::EXPLORE_MAX`].
    pub explore: f64,
}

impl Default for PathPolicy {
    fn default() -> Self {
        Self {
            candidates: 8,
            max_hops: 4,
            weights: ScoreWeights::default(),
            capacity_unknown: CAPACITY_UNKNOWN,
            switching: SwitchingPolicy::default(),
            explore: 0.0,
        }
    }
}

impl PathPolicy {
    /// Weights of the score for an objective.
    pub fn weights_for(&self, objective: Objective) -> ScoreWeights {
        match objective {
            Objective::Balanced => self.weights,
            _ => ScoreWeights {
                bandwidth_reference: self.weights.bandwidth_reference,
                ..ScoreWeights::of(objective)
            },
        }
    }
}

/// The tunnels of this node and their routes.
pub struct IntelligentRouter {
    policy: PathPolicy,
    tunnels: BTreeMap<TunnelId, Destination>,
    finding: Finding,
    explorer: Explorer,
    /// When tunnels moved to what is merely better, within [`MOVES_INTERVAL`].
    moves: VecDeque<Timestamp>,
}

impl IntelligentRouter {
    /// A router without tunnels; `seed` is that of what it explores.
    pub fn new(me: NodeId, policy: PathPolicy, seed: u64) -> Self {
        let finding = Finding::new(me, policy.candidates, policy.max_hops);
        let explorer = Explorer::new(policy.explore, seed);
        Self { policy, tunnels: BTreeMap::new(), finding, explorer, moves: VecDeque::new() }
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
        self.close(tunnel);
        self.tunnels.insert(tunnel, Destination::new(node, forced, objective, beside));
        true
    }

    /// Bandwidth (bytes/s) is to be set aside for a tunnel.
    pub fn reserve(&mut self, tunnel: TunnelId, rate: u64) {
        if let Some(destination) = self.tunnels.get_mut(&tunnel) {
            let state = ReservationState::Pending;
            destination.reservation = Some(Reservation { rate, state });
        }
    }

    /// Whether it was, as the nodes of the route with this number say. Returns whether another route
    /// is to be asked: the tunnel has to be decided now.
    pub fn reserve_answered(
        &mut self,
        tunnel: TunnelId,
        route_id: u32,
        answer: Result<(), Option<Bottleneck>>,
    ) -> bool {
        let destination = self.tunnels.get_mut(&tunnel);
        let asked = destination.filter(|destination| destination.route_id == route_id);
        asked.is_some_and(|destination| destination.reserve_answered(answer))
    }

    /// Forgets a tunnel. Returns whether it was there.
    pub fn close(&mut self, tunnel: TunnelId) -> bool {
        let Some(closed) = self.tunnels.remove(&tunnel) else { return false };
        if !self.tunnels.values().any(|other| other.node == closed.node) {
            self.finding.forget(closed.node);
        }
        true
    }

    /// One tunnel; `None` when it is not open.
    pub fn tunnel(&self, tunnel: TunnelId) -> Option<&Destination> {
        self.tunnels.get(&tunnel)
    }

    /// All tunnels, in order of id.
    pub fn tunnels(&self) -> impl Iterator<Item = (TunnelId, &Destination)> + '_ {
        self.tunnels.iter().map(|(id, destination)| (*id, destination))
    }

    /// Decides for one tunnel, whose route in use may have turned bad; `None` when it is not open.
    pub fn decide(
        &mut self,
        tunnel: TunnelId,
        know: &mut Knowledge<'_>,
        turned_bad: bool,
        now: Timestamp,
    ) -> Option<Decision> {
        let returned = self.tunnels.get_mut(&tunnel)?.return_home();
        let wanted = self.wanted(tunnel)?;
        let routes = self.routes(tunnel, &wanted, know.graph)?;
        let in_use = self.tunnels.get(&tunnel)?.current.as_ref().map(|(route, _)| route);
        let mut candidates = weigh(&self.policy, &wanted, routes, in_use, know, now);
        let destination = self.tunnels.get(&tunnel)?;
        let at = |route: &Route| candidates.iter().position(|c| c.route == *route);
        let alive = |index: &usize| candidates[*index].alive;
        let current = destination.current.as_ref();
        let current_at = current.and_then(|(route, _)| at(route));
        let mut best = candidates.iter().position(|candidate| candidate.alive);
        let ranking = know.predictor.ranking();
        if current.is_none()
            && best.is_some_and(|i| candidates[i].standing.overlap == Overlap::Same)
        {
            best = None;
        }
        let to_beat = |index: usize| {
            // Against the best the least speaks: a route against which more does has no claim to stay.
            match best {
                Some(best) if candidates[best].standing < candidates[index].standing => 0.0,
                _ => candidates[index].score,
            }
        };
        let view = current.map(|(_, since)| Current {
            score: current_at.filter(alive).map(to_beat),
            since: *since,
            turned_bad,
        });
        let damping =
            current.map_or(0.0, |(_, since)| self.policy.switching.margin_after(now.since(*since)));
        let best_score = best.map(|index| candidates[index].score);
        let is_current = best.is_some() && best == current_at;
        let (mut change, mut reason) =
            self.policy.switching.decide(view, best_score, is_current, now);
        if turned_bad
            && matches!(reason, Reason::Best | Reason::WithinMargin)
            && let Some(held) = current_at.and_then(|index| held_back(&candidates, index))
        {
            let score = Some(candidates[held].score);
            let (moves, why) = self.policy.switching.decide(view, score, false, now);
            if why != Reason::WithinMargin {
                (best, change, reason) = (Some(held), moves, why);
            }
        }
        if reason == Reason::CurrentDead
            && let Some((dead, _)) = current
        {
            // The data plane may have moved to the backup already.
            let backup = destination.backup.as_ref().and_then(|backup| at(&backup.route));
            let apart = || candidates.iter().position(|c| c.alive && disjoint(&c.route, dead));
            best = backup.filter(alive).or_else(apart).or(best);
        }
        if destination.asks_another()
            && let (Some(best), Some(current)) = (best, current_at)
            && candidates[best].standing < candidates[current].standing
        {
            (change, reason) = (true, Reason::Refused);
        }
        if reason == Reason::Better && !self.may_move(now) {
            (change, reason) = (false, Reason::Capped);
        }
        let mut chosen = match reason {
            Reason::NoRoute => None,
            _ if change => best,
            _ => current_at,
        };
        if let Some(usual) = chosen {
            let stays = matches!(reason, Reason::Best | Reason::WithinMargin);
            let may = stays && wanted.reserve.is_none() && self.has_room_to_move(now);
            let drawn = self.explorer.draw(&mut candidates, usual, may);
            if drawn != usual {
                (chosen, reason) = (Some(drawn), Reason::Explored);
                self.tunnels.get_mut(&tunnel)?.explore(candidates[drawn].route.clone(), now);
            }
        }
        let destination = self.tunnels.get_mut(&tunnel)?;
        if change && let Some(index) = chosen {
            let refused = std::mem::take(&mut destination.refused);
            destination.move_to(candidates[index].route.clone(), now);
            if reason == Reason::Refused {
                destination.refused = refused;
            }
        }
        // Only what could be taken teaches which rule takes the right one.
        let able = candidates.first().map(|first| first.standing);
        let offers = candidates.iter().filter(|c| c.alive && Some(c.standing) == able);
        let offers: Vec<_> = offers.filter_map(|c| Some((c, c.prospect?))).collect();
        let stay = offers.iter().position(|(candidate, _)| candidate.stays);
        let offers = offers.into_iter().map(|(c, prospect)| (c.route.clone(), prospect));
        know.predictor.offered(destination.node, now, offers, stay);
        destination.settle_reservation();
        destination.reachable = reason != Reason::NoRoute;
        destination.candidates = candidates.iter().map(|c| c.route.clone()).collect();
        let (node, is_forced) = (destination.node, destination.forced.is_some());
        let in_use = destination.current.as_ref().map(|(route, _)| route.clone());
        let backup = match in_use {
            Some(route) if !is_forced => self.tunnels[&tunnel]
                .choose_backup(&candidates, |route| self.backed_up_over(route, tunnel))
                .or_else(|| self.finding.apart_from(node, &[route], know.graph))
                .filter(|backup| know.is_alive(backup)),
            _ => None,
        };
        self.tunnels.get_mut(&tunnel)?.set_backup(backup);
        let reason = if is_forced && reason != Reason::NoRoute { Reason::Forced } else { reason };
        Some(Decision {
            at: now,
            tunnel: Some(tunnel),
            destination: node,
            wanted,
            candidates,
            chosen,
            reason,
            changed: change || reason == Reason::Explored || returned && chosen.is_some(),
            model_version: know.predictor.version(),
            ranking,
            damping,
            challenger_version: know.predictor.challenger_version(),
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
    pub fn explain(&mut self, node: NodeId, know: &mut Knowledge<'_>, now: Timestamp) -> Decision {
        let wanted = Wanted::default();
        let mut routes = self.finding.routes(node, know.graph);
        let direct = self.finding.direct(node, know.graph);
        if let Some(direct) = direct.filter(|direct| !routes.contains(direct)) {
            routes.push(direct);
        }
        if !self.tunnels.values().any(|tunnel| tunnel.node == node) {
            self.finding.forget(node);
        }
        let mut candidates = weigh(&self.policy, &wanted, routes, None, know, now);
        let chosen = candidates.iter().position(|candidate| candidate.alive);
        if let Some(index) = chosen {
            candidates[index].propensity = 1.0;
        }
        Decision {
            at: now,
            tunnel: None,
            destination: node,
            wanted,
            candidates,
            chosen,
            reason: if chosen.is_some() { Reason::First } else { Reason::NoRoute },
            changed: false,
            model_version: know.predictor.version(),
            ranking: know.predictor.ranking(),
            damping: 0.0,
            challenger_version: know.predictor.challenger_version(),
        }
    }

    /// What a tunnel wants; `None` when it is not open.
    fn wanted(&self, tunnel: TunnelId) -> Option<Wanted> {
        let destination = self.tunnels.get(&tunnel)?;
        let before = |id: TunnelId, other: &Destination| {
            other.node == destination.node
                && destination
                    .beside
                    .is_some_and(|first| id == first || other.beside == Some(first) && id < tunnel)
        };
        let avoid = self.tunnels().filter(|(id, other)| *id != tunnel && before(*id, other));
        let avoid = avoid.filter_map(|(_, other)| Some(other.current.as_ref()?.0.clone()));
        Some(Wanted {
            objective: destination.objective,
            avoid: avoid.collect(),
            reserve: destination.reservation.map(|reservation| reservation.rate),
            refused: destination.refused.iter().map(|(route, _)| route.clone()).collect(),
        })
    }

    /// All routes to weigh for a tunnel: the k shortest and the disjoint one beside the first, the
    /// route in use and its backup, one that shares no relay with it, and one that is apart from
    /// what is to be avoided.
    fn routes(
        &mut self,
        tunnel: TunnelId,
        wanted: &Wanted,
        graph: &mut OverlayGraph,
    ) -> Option<Vec<Route>> {
        let destination = self.tunnels.get(&tunnel)?;
        if let Some(forced) = &destination.forced {
            return Some(vec![forced.clone()]);
        }
        let node = destination.node;
        let current = destination.current.as_ref().map(|(route, _)| route.clone());
        let backup = destination.backup.as_ref().map(|backup| backup.route.clone());
        let mut routes = self.finding.routes(node, graph);
        // Whatever others advertise, the direct link is weighed.
        let direct = self.finding.direct(node, graph);
        for route in direct.into_iter().chain(current.iter().cloned()).chain(backup) {
            if !routes.contains(&route) {
                routes.push(route);
            }
        }
        if let Some(current) = current
            && !routes.iter().any(|route| disjoint(route, &current))
        {
            routes.extend(self.finding.apart_from(node, &[current], graph));
        }
        if !routes.iter().any(|route| wanted.is_apart(route)) {
            routes.extend(self.finding.apart_from(node, &wanted.avoid, graph));
        }
        Some(routes)
    }

    /// How many other tunnels the busiest relay of a route is to take over when their routes die.
    fn backed_up_over(&self, route: &Route, tunnel: TunnelId) -> usize {
        let others = || self.tunnels().filter(|(id, _)| *id != tunnel);
        let backups = || others().filter_map(|(_, other)| other.backup.as_ref());
        let over = |relay| backups().filter(|b| b.route.relays().contains(relay)).count();
        route.relays().iter().map(over).max().unwrap_or(0)
    }

    /// Whether one more tunnel may move to what is merely better; counts it.
    fn may_move(&mut self, now: Timestamp) -> bool {
        let allowed = self.has_room_to_move(now);
        if allowed {
            self.moves.push_back(now);
        }
        allowed
    }

    /// Whether fewer have moved of late than may.
    fn has_room_to_move(&mut self, now: Timestamp) -> bool {
        while self.moves.front().is_some_and(|at| now.since(*at) >= MOVES_INTERVAL) {
            self.moves.pop_front();
        }
        self.moves.len() < (self.tunnels.len() / MOVES_SHARE).max(MOVES_MIN)
    }
}
