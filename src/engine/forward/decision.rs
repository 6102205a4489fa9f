//! What to do with a datagram: pass it on, take it, or drop it and say why.
//!
//! A relay keeps no state. It checks that the datagram was meant for it, that it came from the
//! neighbour that the route names, and that the next node is a neighbour too.

use super::view::HeaderView;
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
    header: &HeaderView<'_>,
    me: NodeId,
    from: NodeId,
    is_neighbour: impl Fn(NodeId) -> bool,
) -> Verdict {
    if header.at() != me {
        return Verdict::Drop(Drop::Misaddressed);
    }
    if header.from() != from {
        return Verdict::Drop(Drop::WrongNeighbour);
    }
    match header.next() {
        None => Verdict::Deliver,
        Some(next) if is_neighbour(next) => Verdict::Forward(next),
        Some(_) => Verdict::Drop(Drop::NoLink),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::forward::{DatagramKind, Header};
    use crate::engine::types::{Route, TunnelId};

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    #[test]
    fn only_what_the_route_says_is_forwarded_or_taken() {
        let at = |position| {
            let route = Route::new([node(0), node(1), node(2)]).unwrap();
            let header = Header::new(DatagramKind::Data, TunnelId(1), 0, 0, route);
            Header { position, ..header }.encode(b"")
        };
        let decide = |position, me, from, is_neighbour: fn(NodeId) -> bool| {
            let bytes = at(position);
            super::decide(&HeaderView::parse(&bytes).unwrap(), node(me), node(from), is_neighbour)
        };
        let linked = |_: NodeId| true;
        assert_eq!(decide(1, 1, 0, linked), Verdict::Forward(node(2)));
        assert_eq!(decide(2, 2, 1, linked), Verdict::Deliver);
        assert_eq!(decide(1, 2, 0, linked), Verdict::Drop(Drop::Misaddressed));
        assert_eq!(decide(2, 2, 0, linked), Verdict::Drop(Drop::WrongNeighbour));
        assert_eq!(decide(1, 1, 0, |_| false), Verdict::Drop(Drop::NoLink));
    }
}
