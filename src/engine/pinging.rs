//! Pings: a probe over the route that a tunnel to a node would take now, for somebody who waits for
//! the answer. It is a sample like any other probe of a route.

use std::collections::BTreeMap;

use super::Engine;
use super::event::{Answer, CommandError, Output, RequestId};
use super::measure::ProbeKind;
use super::types::{NodeId, Route, Timestamp};

/// Most pings under way.
pub const PINGS_MAX: usize = 64;

/// Pings under way, by the number of the probe.
pub(super) type Pings = BTreeMap<u64, (RequestId, Route)>;

impl Engine {
    pub(super) fn ping(&mut self, request: RequestId, destination: NodeId, now: Timestamp) {
        let chosen = self.explain(destination, now);
        let route = chosen.chosen.and_then(|index| chosen.candidates.get(index));
        let error = match route.map(|candidate| candidate.route.clone()) {
            _ if self.pings.len() >= PINGS_MAX => CommandError::Busy("the pings under way"),
            None => CommandError::NoRoute(destination),
            Some(route) => {
                let id = self.send_probe(ProbeKind::Route, route.clone(), now);
                self.pings.insert(id, (request, route));
                return;
            }
        };
        self.outputs.push_back(Output::Answer { request, answer: Err(error) });
    }

    /// A probe came back, or did not.
    pub(super) fn pinged(&mut self, id: u64, rtt_us: Option<u64>) {
        if let Some((request, route)) = self.pings.remove(&id) {
            let answer = Ok(Answer::Pinged { route, rtt_us });
            self.outputs.push_back(Output::Answer { request, answer });
        }
    }
}
