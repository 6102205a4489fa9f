//! The targets of a world's services, and the checks of them.
//!
//! A target answers after [`ANSWER_MS`], unless it is broken; then it refuses connections. A provider may
//! refuse one user. A check
//! through a tunnel takes a round trip of the tunnel's route beside that. How a service is to be
//! checked makes no difference here.

use super::{Event, World, ms};
use crate::engine::event::Input;
use crate::engine::measure::Vantage;
use crate::engine::measure::service::{CheckFailure, Subject};
use crate::engine::types::{NodeId, Route, ServiceName};

/// How long a target takes to answer a check (ms).
const ANSWER_MS: f64 = 1.0;
/// How long a check waits for an answer that does not come (ms).
const TIMEOUT_MS: f64 = 5_000.0;

impl World {
    /// The target of a service of a node refuses connections from now on.
    pub fn break_target(&mut self, node: usize, name: &ServiceName) {
        self.broken.insert((node, name.clone()));
    }

    /// It accepts them again.
    pub fn mend_target(&mut self, node: usize, name: &ServiceName) {
        self.broken.remove(&(node, name.clone()));
    }

    /// A provider does not let a node use its service from now on.
    pub fn refuse_user(&mut self, node: usize, name: &ServiceName, user: usize) {
        self.refused.insert((node, name.clone(), user));
    }

    pub(super) fn check_service(&mut self, index: usize, id: u64, subject: &Subject) {
        let there = match subject.vantage {
            Vantage::Local => Some(0.0),
            Vantage::EndToEnd => self.round_trip(index, subject.provider),
        };
        let provider = self.by_id.get(&subject.provider).copied();
        let (after_ms, result) = match (there, provider) {
            (Some(rtt_ms), Some(node))
                if self.refused.contains(&(node, subject.name.clone(), index)) =>
            {
                (rtt_ms, Err(CheckFailure::NotAllowed))
            }
            (Some(rtt_ms), Some(node)) if self.broken.contains(&(node, subject.name.clone())) => {
                (rtt_ms + ANSWER_MS, Err(CheckFailure::Refused))
            }
            (Some(rtt_ms), Some(_)) => {
                (rtt_ms + ANSWER_MS, Ok((1e3 * (rtt_ms + ANSWER_MS)) as u64))
            }
            _ => (TIMEOUT_MS, Err(CheckFailure::Unreachable)),
        };
        let input = Box::new(Input::ServiceChecked { id, result });
        self.plan(self.now + ms(after_ms), Event::Input(index, input));
    }

    /// How long a round trip through a node's tunnel to another one takes (ms); `None` when it does
    /// not come back.
    fn round_trip(&mut self, index: usize, to: NodeId) -> Option<f64> {
        let route = self.route_in_use(index, to)?;
        Some(self.traverse(&route)? + self.traverse(&route.reversed())?)
    }

    fn route_in_use(&self, index: usize, to: NodeId) -> Option<Route> {
        let engine = self.nodes[index].engine.as_ref()?;
        let mut tunnels = engine.tunnels().filter(|(_, tunnel)| tunnel.node == to);
        tunnels.find_map(|(_, tunnel)| tunnel.current.clone()).map(|(route, _)| route)
    }
}
