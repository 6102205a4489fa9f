//! What to do with a datagram: pass it on, take it, or drop it and say why.
//!
//! A relay keeps no state. It checks that the datagram was meant for it, that it came from the
//! neighbour that the route names, and that the next node is a neighbour too.

use super::header::Header;
use crate::engine::types::NodeId;

/// What to do with a datagram that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send it on to this neighbour, one position further.
    Forward(NodeId),
    /// It has arrived.
    Deliver,
    /// Drop and count.
    Drop(Drop),
}

/// Why a datagram is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Drop {
    /// The route names another node at this position.
    Misaddressed,
    /// It did not come from the node before us in the route.
    WrongNeighbour,
    /// The next node is not a neighbour.
    NoLink,
}

impl Drop {
    /// The name used in counters.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Misaddressed => "misaddressed",
            Self::WrongNeighbour => "wrong-neighbour",
            Self::NoLink => "no-link",
        }
    }
}

/// Decides for a datagram that `me` received from the neighbour `from`.
pub fn decide(
    header: &Header,
    me: NodeId,
    from: NodeId,
    is_neighbour: impl Fn(NodeId) -> bool,
) -> Verdict {
    let nodes = header.route.nodes();
    let position = usize::from(header.position);
    if nodes[position] != me {
        return Verdict::Drop(Drop::Misaddressed);
    }
    if nodes[position - 1] != from {
        return Verdict::Drop(Drop::WrongNeighbour);
    }
    match nodes.get(position + 1) {
        None => Verdict::Deliver,
        Some(next) if is_neighbour(*next) => Verdict::Forward(*next),
        Some(_) => Verdict::Drop(Drop::NoLink),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::forward::DatagramKind;
    use crate::engine::types::{Route, TunnelId};

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    #[test]
    fn only_what_the_route_says_is_forwarded_or_taken() {
        let at = |position| Header {
            kind: DatagramKind::Data,
            congestion: false,
            reply: false,
            position,
            tunnel: TunnelId(1),
            route_id: 0,
            sequence: 0,
            route: Route::new([node(0), node(1), node(2)]).unwrap(),
        };
        let decide = |position, me, from| {
            super::decide(&at(position), node(me), node(from), |n| n != node(9))
        };
        assert_eq!(decide(1, 1, 0), Verdict::Forward(node(2)));
        assert_eq!(decide(2, 2, 1), Verdict::Deliver);
        assert_eq!(decide(1, 2, 0), Verdict::Drop(Drop::Misaddressed));
        assert_eq!(decide(2, 2, 0), Verdict::Drop(Drop::WrongNeighbour));
        let lonely = super::decide(&at(1), node(1), node(0), |_| false);
        assert_eq!(lonely, Verdict::Drop(Drop::NoLink));
    }
}
