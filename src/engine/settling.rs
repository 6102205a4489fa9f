//! What follows from the state after every input and whenever something is due: the advertisement, decisions,
//! what is probed, and the forwarding snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::RngExt;

use super::Engine;
use super::event::{Notice, Output};
use super::forward::{Binding, ForwardingSnapshot};
use super::measure::{LinkQuality, LinkState};
use super::overlay::wire::{self, GossipMessage, Objective, Signed};
use super::route::candidate::Knowledge;
use super::route::router::MOVES_INTERVAL;
use super::route::{Destination, Reason};
use super::types::{NodeId, Timestamp, TunnelId};

impl Engine {
    /// Brings everything that follows from the state up to date: advertisement, decisions,
    /// probing, the forwarding snapshot.
    pub(super) fn settle(&mut self, now: Timestamp) {
        self.keep_network();
        let is_due = self.advertise_at.1.is_some_and(|at| at <= now);
        if is_due || self.advertise_at.0 != self.links.revision() {
            self.advertise(now);
        }
        for tunnel in self.deciding.due(now) {
            self.decide(tunnel, now);
            self.aim = true;
        }
        if !std::mem::take(&mut self.aim) {
            return;
        }
        self.aim_probes(now);
        let snapshot = self.forwarding();
        if *self.snapshot != snapshot {
            self.snapshot = Arc::new(snapshot);
            self.outputs.push_back(Output::Forwarding(self.snapshot.clone()));
        }
    }

    /// Tells the mesh about the links when it is time, and notes when that is next.
    fn advertise(&mut self, now: Timestamp) {
        let links: BTreeMap<NodeId, LinkQuality> = self.links.up().collect();
        if let Some(advertisement) = self.advertiser.poll(&links, now) {
            let signed = Signed::seal(&self.author, &advertisement);
            let at = self.stamp(now);
            let sequence = advertisement.sequence;
            if let Ok(changes) = self.graph.accept(self.me, sequence, advertisement.links, at) {
                self.links_changed(changes, at);
            }
            self.advertisements.insert(self.me, Arc::new(signed.clone()));
            let bytes = wire::encode(&GossipMessage::LinkState(signed));
            self.outputs.push_back(Output::Publish(bytes));
        }
        self.advertise_at = (self.links.revision(), self.advertiser.due_at(&links, now));
    }

    /// What is known of all links is brought up to date, where routes are compared.
    pub(super) fn look_at_links(&mut self, now: Timestamp) {
        self.predictor.comparing_mut().refresh(&self.advertised, &self.histories, now);
    }

    fn decide(&mut self, tunnel: TunnelId, now: Timestamp) {
        let mut know = Knowledge {
            graph: &mut self.graph,
            links: &self.advertised,
            histories: &self.histories,
            predictor: &mut self.predictor,
        };
        let used = self.router.tunnel(tunnel);
        let explored = used.is_some_and(Destination::is_exploring);
        let used = used.and_then(|used| used.usual().cloned());
        // What was only tried says nothing against the route that was decided for.
        let turned_bad = self.deciding.has_turned_bad(tunnel) && !explored;
        let decision = self.router.decide(tunnel, &mut know, turned_bad, now);
        for known in self.predictor.comparing_mut().take_known() {
            self.outputs.push_back(Output::Choice(Box::new(known)));
        }
        let Some(decision) = decision else { return self.deciding.close(tunnel) };
        let expected = self.expected(&decision);
        let (interval, random) = (self.config.intervals.decide, self.random.random());
        self.deciding.decided(tunnel, expected, now, interval, random);
        // What held a better route back ends before the next regular time.
        match decision.reason {
            Reason::Held => {
                let hold = self.config.paths.switching.kept_for(turned_bad);
                if let Some((_, since)) = &used {
                    self.deciding.by(tunnel, *since + hold);
                }
            }
            Reason::Capped => self.deciding.by(tunnel, now + MOVES_INTERVAL),
            _ => {}
        }
        match (decision.reason, used) {
            (Reason::CurrentDead, Some((left, _))) => self.histories.failed(&left, now),
            (Reason::Better, Some((left, _))) if turned_bad => self.histories.failed(&left, now),
            (Reason::Held | Reason::Capped, _) if turned_bad => self.deciding.still_bad(tunnel),
            _ => {}
        }
        if decision.changed {
            let route = decision.chosen.map(|index| decision.candidates[index].route.clone());
            let reason = decision.reason.as_str();
            self.notice(Notice::RouteChanged { tunnel, route, reason });
        }
        self.outputs.push_back(Output::Decision(Box::new(decision)));
    }

    fn forwarding(&self) -> ForwardingSnapshot {
        let binding = |destination: &Destination| Binding {
            destination: destination.node,
            route: destination.current.as_ref().map(|(route, _)| route.clone()),
            reachable: destination.reachable,
            route_id: destination.route_id,
            backup: destination.backup.clone(),
            copies: destination.objective == Objective::Reliability,
            capacity: destination
                .current
                .as_ref()
                .and_then(|(route, _)| self.graph.residual(route)),
            reserved: destination.reservation.map(|reservation| reservation.rate),
        };
        let tunnels = self.router.tunnels().map(|(id, destination)| (id, binding(destination)));
        let down = self.links.all().filter(|(_, state, _)| *state == LinkState::Down);
        ForwardingSnapshot {
            tunnels: tunnels.collect(),
            down: down.map(|(node, ..)| node).collect(),
            unlinked: self.unlinked.clone(),
            capacity: self.capacities().collect(),
        }
    }
}
