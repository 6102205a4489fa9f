//! A datagram's header where it lies: what a relay needs, read without allocating.

use super::header::{
    DatagramKind, FIXED_BYTES, FLAG_CONGESTION, FLAG_COPY, FLAG_RECEIPT, FLAG_REPLY, FLAG_RESUMED,
    FLAGS_AT, Header, HeaderError, PAYLOAD_BYTES_MAX, POSITION_AT, TUNNEL_ID_MAX, VERSION,
};
use crate::engine::types::{MAX_ROUTE_HOPS, NodeId, Route, TunnelId};

const ALL_FLAGS: u8 = FLAG_CONGESTION | FLAG_REPLY | FLAG_RECEIPT | FLAG_COPY | FLAG_RESUMED;
const NODE_BYTES: usize = 8;

/// A datagram whose header has been checked as [`Header::decode`] checks it.
#[derive(Clone, Copy, Debug)]
pub struct HeaderView<'a> {
    bytes: &'a [u8],
    kind: DatagramKind,
}

impl<'a> HeaderView<'a> {
    /// Checks a datagram.
    ///
    /// # Errors
    /// [`HeaderError`], for arbitrary bytes.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, HeaderError> {
        if bytes.len() < FIXED_BYTES {
            return Err(HeaderError::Truncated);
        }
        if bytes[0] != VERSION {
            return Err(HeaderError::Version);
        }
        let kind = DatagramKind::from_byte(bytes[1]).ok_or(HeaderError::Kind)?;
        if bytes[FLAGS_AT] & !ALL_FLAGS != 0 {
            return Err(HeaderError::Kind);
        }
        let view = Self { bytes, kind };
        let count = view.node_count();
        if !(2..=MAX_ROUTE_HOPS + 1).contains(&count) || !(1..count).contains(&view.position()) {
            return Err(HeaderError::Route);
        }
        if bytes.len() < view.length() {
            return Err(HeaderError::Truncated);
        }
        if bytes.len() - view.length() > PAYLOAD_BYTES_MAX {
            return Err(HeaderError::Oversized);
        }
        if (1..count).any(|index| (0..index).any(|before| view.node(before) == view.node(index))) {
            return Err(HeaderError::Loop);
        }
        let tunnel = view.tunnel().0;
        if tunnel > TUNNEL_ID_MAX || (kind.has_tunnel() && tunnel == 0) {
            return Err(HeaderError::Tunnel);
        }
        Ok(view)
    }

    /// What it is for.
    pub fn kind(&self) -> DatagramKind {
        self.kind
    }

    /// The tunnel.
    pub fn tunnel(&self) -> TunnelId {
        TunnelId(self.word(5, 2) as u16)
    }

    /// Index of the receiving node in the route, 1 or more.
    pub fn position(&self) -> usize {
        usize::from(self.bytes[POSITION_AT])
    }

    /// The node that sent it first.
    pub fn source(&self) -> NodeId {
        self.node(0)
    }

    /// The last node of the route.
    pub fn target(&self) -> NodeId {
        self.node(self.node_count() - 1)
    }

    /// The node from which the sending one has it; that itself at the source.
    pub fn ingress(&self) -> NodeId {
        self.node(self.position().saturating_sub(2))
    }

    /// The node before the receiving one.
    pub fn from(&self) -> NodeId {
        self.node(self.position() - 1)
    }

    /// The receiving node.
    pub fn at(&self) -> NodeId {
        self.node(self.position())
    }

    /// The node after the receiving one; `None` when it has arrived.
    pub fn next(&self) -> Option<NodeId> {
        let next = self.position() + 1;
        (next < self.node_count()).then(|| self.node(next))
    }

    /// What follows the header.
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[self.length()..]
    }

    /// The header as values.
    pub(super) fn to_header(self) -> Result<Header, HeaderError> {
        let has = |flag| self.bytes[FLAGS_AT] & flag != 0;
        let nodes = (0..self.node_count()).map(|index| self.node(index));
        Ok(Header {
            kind: self.kind,
            congestion: has(FLAG_CONGESTION),
            reply: has(FLAG_REPLY),
            receipt: has(FLAG_RECEIPT),
            copy: has(FLAG_COPY),
            resumed: has(FLAG_RESUMED),
            position: self.bytes[POSITION_AT],
            tunnel: self.tunnel(),
            route_id: self.word(7, 4) as u32,
            sequence: self.word(11, 8),
            tag: self.word(19, 8),
            route: Route::new(nodes.collect::<Vec<_>>()).map_err(|_| HeaderError::Route)?,
        })
    }

    fn node_count(&self) -> usize {
        usize::from(self.bytes[4])
    }

    fn length(&self) -> usize {
        FIXED_BYTES + NODE_BYTES * self.node_count()
    }

    fn node(&self, index: usize) -> NodeId {
        NodeId(self.word(FIXED_BYTES + NODE_BYTES * index, NODE_BYTES).to_be_bytes())
    }

    /// A big endian number of at most 8 bytes.
    fn word(&self, at: usize, length: usize) -> u64 {
        let bytes = &self.bytes[at..at + length];
        bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn datagram(nodes: u8, position: u8, kind: DatagramKind) -> Vec<u8> {
        let route = Route::new((0..nodes).map(|n| NodeId([n; 8])).collect::<Vec<_>>()).unwrap();
        let header = Header { position, ..Header::new(kind, TunnelId(9), 5, 77, route) };
        header.encode(b"payload")
    }

    #[test]
    fn a_view_names_the_nodes_around_the_receiver() {
        let bytes = datagram(4, 2, DatagramKind::Beat);
        let view = HeaderView::parse(&bytes).unwrap();
        let around = (view.source(), view.from(), view.at(), view.next());
        let node = |byte| NodeId([byte; 8]);
        assert_eq!(around, (node(0), node(1), node(2), Some(node(3))));
        assert_eq!((view.kind(), view.tunnel()), (DatagramKind::Beat, TunnelId(9)));
        assert_eq!(view.payload(), b"payload");
        let arrived = datagram(4, 3, DatagramKind::Beat);
        assert_eq!(HeaderView::parse(&arrived).unwrap().next(), None);
    }

    proptest! {
        #[test]
        fn a_view_and_a_decoded_header_agree(
            nodes in 2u8..=9,
            kind in 0u8..8,
            changes in proptest::collection::vec((0usize..120, any::<u8>()), 0..3),
            small in proptest::collection::vec((0usize..28, 0u8..12), 0..2),
            twins in proptest::option::of((0usize..9, 0usize..9)),
            cut in 0usize..40,
        ) {
            let kind = DatagramKind::from_byte(kind).unwrap();
            let mut bytes = datagram(nodes, nodes / 2, kind);
            for (at, byte) in changes.into_iter().chain(small) {
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
            }
            let place = |node: usize| FIXED_BYTES + NODE_BYTES * (node % usize::from(nodes));
            if let Some((one, other)) = twins {
                bytes.copy_within(place(one)..place(one) + NODE_BYTES, place(other));
            }
            bytes.truncate(bytes.len() - cut.saturating_sub(30));
            match (HeaderView::parse(&bytes), Header::decode(&bytes)) {
                (Ok(view), Ok((header, payload))) => {
                    let nodes = header.route.nodes();
                    let position = usize::from(header.position);
                    prop_assert_eq!(view.position(), position);
                    prop_assert_eq!(view.source(), nodes[0]);
                    prop_assert_eq!(view.target(), *nodes.last().unwrap());
                    prop_assert_eq!(view.ingress(), nodes[position.max(2) - 2]);
                    prop_assert_eq!(view.from(), nodes[position - 1]);
                    prop_assert_eq!(view.at(), nodes[position]);
                    prop_assert_eq!(view.next(), nodes.get(position + 1).copied());
                    prop_assert_eq!((view.kind(), view.tunnel()), (header.kind, header.tunnel));
                    prop_assert_eq!(view.payload(), payload);
                    prop_assert_eq!(header.encode(payload), bytes);
                }
                (Err(one), Err(other)) => prop_assert_eq!(one, other),
                (view, decoded) => prop_assert!(false, "{:?} but {:?}", view, decoded),
            }
        }
    }
}
