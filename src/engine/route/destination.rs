//! A tunnel as the router sees it: where to, the route in use, and the one to move to when that is
//! lost.

use super::candidate::{Candidate, disjoint};
use super::router::RESERVE_TRIES;
use crate::engine::forward::Backup;
use crate::engine::overlay::wire::Objective;
use crate::engine::traffic::message::Bottleneck;
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// Share of the best backup's score that another one must have to be worth as much: about 18 ms on
/// a two-hop route of 60 ms, balanced.
const BACKUP_SHARE: f64 = 0.97;

/// What became of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservationState {
    /// Nothing was answered yet.
    Pending,
    /// Every node of the route has set the rate aside.
    Granted,
    /// No route that was asked can. Of the links because of which they cannot, this one has most left;
    /// `None` when nobody answered. The route in use is asked again each slice.
    Refused(Option<Bottleneck>),
}

/// Bandwidth that a tunnel is to have for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// How much, in each direction (bytes/s).
    pub rate: u64,
    /// Whether it has it.
    pub state: ReservationState,
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
    /// The route to move to when the one in use is lost: alive, sharing no relay with it, and of
    /// such ones the best scored or nearly; none for a path that is fixed.
    pub backup: Option<Backup>,
    /// Every route that was weighed in the last decision.
    pub candidates: Vec<Route>,
    /// Bandwidth set aside for it on the route in use.
    pub reservation: Option<Reservation>,
    /// Routes that have refused it since it was asked for anew, oldest first, and why; at most
    /// [`RESERVE_TRIES`].
    pub(super) refused: Vec<(Route, Option<Bottleneck>)>,
    /// Where it returns to, and since when it was there, while it explores.
    home: Option<(Route, Timestamp)>,
    /// The highest route number that was given away.
    numbered: u32,
}

impl Destination {
    pub(super) fn new(
        node: NodeId,
        forced: Option<Route>,
        objective: Objective,
        beside: Option<TunnelId>,
    ) -> Self {
        Self {
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
            reservation: None,
            refused: Vec::new(),
            home: None,
            numbered: 0,
        }
    }

    /// The route in use was asked to set bandwidth aside. Returns whether another is to be asked.
    pub(super) fn reserve_answered(&mut self, answer: Result<(), Option<Bottleneck>>) -> bool {
        let Some(reservation) = &mut self.reservation else { return false };
        match (answer, reservation.state, &self.current) {
            (Ok(()), ..) => reservation.state = ReservationState::Granted,
            // Asked again after all have refused: it stays where it is.
            (Err(bottleneck), ReservationState::Refused(_), _) | (Err(bottleneck), _, None) => {
                reservation.state = ReservationState::Refused(bottleneck);
            }
            (Err(bottleneck), _, Some((route, _))) => {
                self.refused.push((route.clone(), bottleneck));
                reservation.state = ReservationState::Pending;
                return true;
            }
        }
        false
    }

    /// Whether the route in use has refused, and another may be asked.
    pub(super) fn asks_another(&self) -> bool {
        self.has_refused() && self.refused.len() < RESERVE_TRIES
    }

    fn has_refused(&self) -> bool {
        let current = self.current.as_ref().map(|(route, _)| route);
        self.refused.iter().any(|(refused, _)| Some(refused) == current)
    }

    /// After a decision: when the route in use has refused, and no other was taken, all have.
    pub(super) fn settle_reservation(&mut self) {
        let Some(reservation) = &self.reservation else { return };
        if reservation.state == ReservationState::Pending && self.has_refused() {
            let rate = reservation.rate;
            let bottlenecks = self.refused.drain(..).filter_map(|(_, bottleneck)| bottleneck);
            // Of equal ones that of the route which was asked before.
            let wider = |best: Bottleneck, next: Bottleneck| match next.available > best.available {
                true => next,
                false => best,
            };
            let state = ReservationState::Refused(bottlenecks.reduce(wider));
            self.reservation = Some(Reservation { rate, state });
        }
    }

    /// Takes a route into use, which has refused nothing. The backup already has its number.
    pub(super) fn move_to(&mut self, route: Route, now: Timestamp) {
        let prepared = self.backup.take().filter(|backup| backup.route == route);
        self.route_id = prepared.map_or_else(|| self.next_number(), |backup| backup.route_id);
        self.changes = self.changes.wrapping_add(1);
        self.refused.clear();
        self.home = None;
        self.current = Some((route, now));
    }

    /// Tries a route until the next decision.
    pub(super) fn explore(&mut self, route: Route, now: Timestamp) {
        let home = self.current.clone();
        self.move_to(route, now);
        self.home = home;
    }

    /// Ends the trial. Returns whether there was one.
    pub(super) fn return_home(&mut self) -> bool {
        let Some((route, since)) = self.home.take() else { return false };
        self.move_to(route, since);
        true
    }

    /// Whether the route in use is only tried.
    pub fn is_exploring(&self) -> bool {
        self.home.is_some()
    }

    /// The route that was decided for, and since when: the one in use, or the one that it returns to.
    pub fn usual(&self) -> Option<&(Route, Timestamp)> {
        self.home.as_ref().or(self.current.as_ref())
    }

    /// Keeps the backup in line with the route in use; a new one gets the next number.
    pub(super) fn set_backup(&mut self, route: Option<Route>) {
        let same = |backup: &Backup| Some(&backup.route) == route.as_ref();
        if self.backup.as_ref().is_some_and(same) {
            return;
        }
        self.backup = route.map(|route| Backup { route, route_id: self.next_number() });
    }

    /// A number above all that were given.
    pub(super) fn next_number(&mut self) -> u32 {
        self.numbered = self.numbered.wrapping_add(1);
        self.numbered
    }

    /// Which candidate should be the backup: of those that live, share no relay with the route in use
    /// and are not kept back, the best or one within [`BACKUP_SHARE`] of it. Among these the one that is the
    /// backup already, else the one whose busiest relay backs up the fewest other tunnels, by
    /// `load`: what kills many routes at once must not send all their traffic to one relay.
    pub(super) fn choose_backup(
        &self,
        candidates: &[Candidate],
        load: impl Fn(&Route) -> usize,
    ) -> Option<Route> {
        let (current, _) = self.current.as_ref()?;
        let able = || candidates.iter().filter(|c| c.alive && disjoint(&c.route, current));
        // One that fails again and again only where there is no other.
        let held = able().map(|candidate| candidate.standing.held).min()?;
        let able = || able().filter(|candidate| candidate.standing.held == held);
        let best = able().map(|candidate| candidate.score).reduce(f64::max)?;
        let good = || able().filter(|candidate| candidate.score >= best * BACKUP_SHARE);
        let kept = self.backup.as_ref().map(|backup| &backup.route);
        let chosen = good().find(|candidate| Some(&candidate.route) == kept);
        let chosen = chosen.or_else(|| {
            good().min_by(|a, b| {
                load(&a.route).cmp(&load(&b.route)).then(b.score.total_cmp(&a.score))
            })
        });
        chosen.map(|candidate| candidate.route.clone())
    }
}
