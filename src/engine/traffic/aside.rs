//! What a node on a route sets aside for both directions of a tunnel: on both of its links, or on
//! neither.

use super::message::Side;
use super::{Claim, FlowKey, LIFETIME, Ledger};
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// What a tunnel asks a node of its route for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The route.
    pub route: &'a Route,
    /// Index of the node in it.
    pub at: usize,
    /// The tunnel.
    pub tunnel: TunnelId,
    /// Number of the route.
    pub route_id: u32,
    /// How much, in each direction (bytes/s); 0 gives up what is set aside.
    pub rate: u64,
}

/// What the link to a neighbour lets a flow send before others from now on (bytes/s), for
/// [`LIFETIME`]; 0 is nothing.
pub type Grant = (NodeId, FlowKey, u64);

impl Request<'_> {
    /// The links to the node after and to the one before, with the flow of each.
    fn sides(&self, me: NodeId) -> impl Iterator<Item = (Side, NodeId, FlowKey)> + use<> {
        let (nodes, tunnel) = (self.route.nodes(), self.tunnel);
        let next = nodes.get(self.at + 1).copied();
        let previous = self.at.checked_sub(1).and_then(|before| nodes.get(before)).copied();
        let (first, last) = (self.route.source(), self.route.destination());
        let flow = |ingress: Option<NodeId>, source, target| {
            let ingress = ingress.unwrap_or(me);
            FlowKey { ingress, source, target, tunnel }
        };
        let sides = [
            (Side::Next, next, flow(previous, first, last)),
            (Side::Previous, previous, flow(next, last, first)),
        ];
        sides.into_iter().filter_map(|(side, neighbour, flow)| Some((side, neighbour?, flow)))
    }
}

impl Ledger {
    /// Sets a rate aside on both links of `me` that a request concerns, or on neither.
    /// `capacity` (bytes/s) is `None` for a link that is not there: it has nothing, and holds nothing.
    /// `grants` takes what the links are to be told, in order.
    ///
    /// # Errors
    /// Which link has not so much left, and what it has (bytes/s).
    pub fn set_aside(
        &mut self,
        me: NodeId,
        request: &Request<'_>,
        capacity: impl Fn(NodeId) -> Option<f64>,
        now: Timestamp,
        grants: &mut Vec<Grant>,
    ) -> Result<(), (Side, u64)> {
        let Request { route_id, rate, .. } = *request;
        let mut given = Vec::new();
        for (side, neighbour, flow) in request.sides(me) {
            let claim = Claim { flow, route_id, rate };
            let refused = match capacity(neighbour) {
                Some(capacity) => match self.ask(neighbour, &claim, capacity, now) {
                    Ok(until) if rate == 0 && until <= now => {
                        grants.push((neighbour, flow, 0));
                        None
                    }
                    Ok(until) if rate > 0 && until == now + LIFETIME => {
                        grants.push((neighbour, flow, rate));
                        given.push((neighbour, flow));
                        None
                    }
                    // Another request, over a newer route, holds it.
                    Ok(_) => None,
                    Err(refusal) => {
                        grants.push((neighbour, flow, 0));
                        Some(refusal.available)
                    }
                },
                None => (rate > 0).then_some(0),
            };
            if let Some(available) = refused {
                for (neighbour, flow) in given {
                    let _ = self.ask(neighbour, &Claim { flow, route_id, rate: 0 }, 0.0, now);
                    grants.push((neighbour, flow, 0));
                }
                return Err((side, available));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    #[test]
    fn both_directions_are_set_aside_or_none() {
        let route = Route::new([node(0), node(1), node(2)]).unwrap();
        let ask = |rate| Request { route: &route, at: 1, tunnel: TunnelId(7), route_id: 1, rate };
        let now = Timestamp(1_000_000);
        let mut ledger = Ledger::default();
        let mut try_with = |rate, back: Option<f64>| {
            let mut grants = Vec::new();
            let capacity = |to| if to == node(2) { Some(1_000.0) } else { back };
            let result = ledger.set_aside(node(1), &ask(rate), capacity, now, &mut grants);
            let grants: Vec<_> = grants.into_iter().map(|(to, _, rate)| (to, rate)).collect();
            let held = (ledger.promised(node(2), now), ledger.promised(node(0), now));
            (result, grants, held)
        };
        let both = |rate| vec![(node(2), rate), (node(0), rate)];
        let undone = vec![(node(2), 300), (node(0), 0), (node(2), 0)];
        let refused = (Err((Side::Previous, 40)), undone, (0, 0));
        assert_eq!(try_with(300, Some(100.0)), refused);
        let gone = (Err((Side::Previous, 0)), vec![(node(2), 300), (node(2), 0)], (0, 0));
        assert_eq!(try_with(300, None), gone);
        assert_eq!(try_with(300, Some(1_000.0)), (Ok(()), both(300), (300, 300)));
        assert_eq!(try_with(0, Some(1_000.0)), (Ok(()), both(0), (0, 0)));
    }
}
