//! Traffic: who may send over a link, how much, and in which order.
//!
//! [`FairQueue`] is what waits in front of a link, [`Ledger`] what the links of this node have
//! promised, [`Asking`] what a tunnel asks for and when, [`message`] what nodes say to each other
//! about promises, [`Capacity`] what a link is expected to carry, and [`Allowance`] what a neighbour may
//! have this node do.

mod allowance;
mod aside;
mod asking;
pub(in crate::engine) mod bucket;
mod capacity;
mod ledger;
pub mod message;
mod queue;
mod waits;

pub use allowance::{ANSWERS_RATE, Allowance, Passing};
pub use aside::{Grant, Request};
pub use asking::{ASKS_MAX, Asked, Asking, PATIENCE, RENEW_EVERY, State, Step, Way};
pub use capacity::{CAPACITY_UNKNOWN, Capacity};
pub use ledger::{Claim, LIFETIME, Ledger, Refusal, SHARE_MAX};
pub use queue::{Class, DROP_AFTER, FairQueue, LANES, MARK_AFTER, PILE_BYTES, Popped, STANDING};
pub use waits::{RecentWaits, WaitQuantiles};

use crate::engine::forward::{DatagramKind, HeaderView};
use crate::engine::types::{NodeId, TunnelId};

/// One direction of one tunnel, as a node on its route sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowKey {
    /// The neighbour that it comes from; this node itself for what starts here.
    pub ingress: NodeId,
    /// First node of the route.
    pub source: NodeId,
    /// Last node of the route.
    pub target: NodeId,
    /// The tunnel; 0 for probes.
    pub tunnel: TunnelId,
}

/// The flow and the class of a datagram that is about to leave for the next node of its route;
/// `None` for bytes that are no datagram.
pub fn classify(bytes: &[u8]) -> Option<(FlowKey, Class)> {
    let view = HeaderView::parse(bytes).ok()?;
    let flow = FlowKey {
        ingress: view.ingress(),
        source: view.source(),
        target: view.target(),
        tunnel: view.tunnel(),
    };
    let is_data = view.kind() == DatagramKind::Data;
    Some((flow, if is_data { Class::Data } else { Class::Control }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::forward::Header;
    use crate::engine::types::Route;

    #[test]
    fn a_flow_is_named_by_where_it_comes_from_and_its_ends() {
        let node = |byte| NodeId([byte; 8]);
        let route = Route::new((1..=4).map(node).collect::<Vec<_>>()).unwrap();
        let header = |kind, position| Header {
            position,
            ..Header::new(kind, TunnelId(9), 1, 5, route.clone())
        };
        for (position, ingress) in [(1, 1), (2, 1), (3, 2)] {
            let bytes = header(DatagramKind::Data, position).encode(b"x");
            let (flow, class) = classify(&bytes).unwrap();
            let expected = FlowKey {
                ingress: node(ingress),
                source: node(1),
                target: node(4),
                tunnel: TunnelId(9),
            };
            assert_eq!((flow, class), (expected, Class::Data));
        }
        for kind in [DatagramKind::Beat, DatagramKind::Receipt, DatagramKind::Reserve] {
            assert_eq!(classify(&header(kind, 1).encode(b"")).unwrap().1, Class::Control);
        }
        assert_eq!(classify(&[0; 100]), None);
    }
}
