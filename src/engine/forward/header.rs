//! The overlay datagram header, version 4.
//!
//! ```text
//! byte 0      version, 4
//! byte 1      kind: 0 data, 1 probe, 2 probe answer, 3 beat, 4 receipt, 5 broken, 6 reserve,
//!             7 reserve answer
//! byte 2      flags: bit 0 congestion experienced, bit 1 towards the node that opened the tunnel,
//!             bit 2 a receipt is wanted at once, bit 3 a copy, bit 4 the route before this one
//!             fell silent; the others are 0
//! byte 3      position: index in the route of the node that receives this copy
//! byte 4      node count of the route, 2 to 9
//! 5..7        tunnel id of the node that opened the tunnel (big endian); 0 for probes
//! 7..11       route id: names one route of the tunnel, higher is newer
//! 11..19      sequence number, growing within a tunnel, a direction and a route id; for probes
//!             and their answers the probe's id
//! 19..27      tag of the tunnel's two ends, see [`RouteKey`](super::RouteKey); 0 without a key
//! 27..        the route, 8 bytes a node, source first
//! then        payload
//! ```

use super::view::HeaderView;
use crate::engine::types::{Route, TunnelId};

/// Longest payload (bytes): a QUIC packet of the largest size that tunnels use, with room.
pub const PAYLOAD_BYTES_MAX: usize = 48 * 1024;
/// Largest tunnel id: the sixteenth bit is free for who keeps both directions apart.
pub const TUNNEL_ID_MAX: u16 = 0x7fff;
pub(super) const VERSION: u8 = 4;
/// Length of a header without its route (bytes).
pub const FIXED_BYTES: usize = 27;
pub(super) const FLAG_CONGESTION: u8 = 1;
pub(super) const FLAG_REPLY: u8 = 2;
pub(super) const FLAG_RECEIPT: u8 = 4;
pub(super) const FLAG_COPY: u8 = 8;
pub(super) const FLAG_RESUMED: u8 = 16;
pub(super) const POSITION_AT: usize = 3;
pub(super) const FLAGS_AT: usize = 2;

/// What a datagram is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatagramKind {
    /// A packet of a tunnel.
    Data = 0,
    /// To be answered by the last node.
    Probe = 1,
    /// The answer, on the reversed route.
    ProbeAnswer = 2,
    /// A sign of life of a tunnel that has nothing to send; asks for a receipt.
    Beat = 3,
    /// What the far end of a tunnel has received, on the reversed route.
    Receipt = 4,
    /// A relay says that its next link of the route is gone, on the reversed route so far.
    Broken = 5,
    /// Asks every node of the route to set bandwidth aside.
    Reserve = 6,
    /// Whether they did, on the reversed route.
    ReserveAnswer = 7,
}

impl DatagramKind {
    const ALL: [Self; 8] = [
        Self::Data,
        Self::Probe,
        Self::ProbeAnswer,
        Self::Beat,
        Self::Receipt,
        Self::Broken,
        Self::Reserve,
        Self::ReserveAnswer,
    ];

    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }

    /// Whether it belongs to a tunnel; probes do not.
    pub fn has_tunnel(self) -> bool {
        !matches!(self, Self::Probe | Self::ProbeAnswer)
    }
}

/// A decoded header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is for.
    pub kind: DatagramKind,
    /// A queue on the way was filling up.
    pub congestion: bool,
    /// It travels towards the node that opened the tunnel.
    pub reply: bool,
    /// The far end is to send a receipt at once.
    pub receipt: bool,
    /// It also travels over another route, and does not move the way back.
    pub copy: bool,
    /// The route before this one fell silent.
    pub resumed: bool,
    /// Index of the receiving node in the route, 1 or more.
    pub position: u8,
    /// The tunnel.
    pub tunnel: TunnelId,
    /// The tunnel's route number.
    pub route_id: u32,
    /// Sequence number, or the probe's id.
    pub sequence: u64,
    /// Proves that an end of the tunnel sent it, see [`Header::seal`]; 0 when it does not.
    pub tag: u64,
    /// The source route.
    pub route: Route,
}

/// Bytes that are not a datagram; each is a counted drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Shorter than its header.
    #[error("truncated")]
    Truncated,
    /// Longer than any datagram.
    #[error("oversized")]
    Oversized,
    /// Another version.
    #[error("unknown version")]
    Version,
    /// An unknown kind, or a flag that must be 0.
    #[error("unknown kind or flag")]
    Kind,
    /// Too few or too many nodes, or a position outside.
    #[error("route length or position out of range")]
    Route,
    /// A tunnel id out of range.
    #[error("tunnel id out of range")]
    Tunnel,
    /// A node occurs twice.
    #[error("the route has a loop")]
    Loop,
}

impl Header {
    /// The header of a datagram that leaves its source: at position 1, without flags and tag.
    pub fn new(
        kind: DatagramKind,
        tunnel: TunnelId,
        route_id: u32,
        sequence: u64,
        route: Route,
    ) -> Self {
        Self {
            kind,
            congestion: false,
            reply: false,
            receipt: false,
            copy: false,
            resumed: false,
            position: 1,
            tunnel,
            route_id,
            sequence,
            tag: 0,
            route,
        }
    }

    /// The way back to the source from the node that this datagram has reached; `None` at a position
    /// that the route has not.
    pub fn way_back(&self) -> Option<Route> {
        let so_far = self.route.nodes().get(..=usize::from(self.position))?;
        Route::new(so_far.iter().rev().copied().collect::<Vec<_>>()).ok()
    }

    /// Bytes that this header takes.
    pub fn length(&self) -> usize {
        FIXED_BYTES + 8 * self.route.nodes().len()
    }

    pub(super) fn flags(&self) -> u8 {
        let flags = [
            (self.congestion, FLAG_CONGESTION),
            (self.reply, FLAG_REPLY),
            (self.receipt, FLAG_RECEIPT),
            (self.copy, FLAG_COPY),
            (self.resumed, FLAG_RESUMED),
        ];
        flags.into_iter().filter(|(is_set, _)| *is_set).fold(0, |all, (_, flag)| all | flag)
    }

    /// The datagram with this header.
    pub fn encode(&self, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.length() + payload.len());
        bytes.push(VERSION);
        bytes.push(self.kind as u8);
        bytes.push(self.flags());
        bytes.push(self.position);
        bytes.push(self.route.nodes().len() as u8);
        bytes.extend(self.tunnel.0.to_be_bytes());
        bytes.extend(self.route_id.to_be_bytes());
        bytes.extend(self.sequence.to_be_bytes());
        bytes.extend(self.tag.to_be_bytes());
        for node in self.route.nodes() {
            bytes.extend(node.0);
        }
        bytes.extend(payload);
        bytes
    }

    /// Reads a datagram that has arrived: the header and the payload.
    ///
    /// # Errors
    /// [`HeaderError`], for arbitrary bytes.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), HeaderError> {
        let view = HeaderView::parse(bytes)?;
        Ok((view.to_header()?, view.payload()))
    }

    /// Moves an encoded datagram one position on, in place.
    pub fn advance(bytes: &mut [u8]) {
        bytes[POSITION_AT] += 1;
    }

    /// Marks an encoded datagram as having met congestion, in place.
    pub fn mark_congestion(bytes: &mut [u8]) {
        bytes[FLAGS_AT] |= FLAG_CONGESTION;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::types::NodeId;

    fn header(nodes: u8) -> Header {
        let route = Route::new((0..nodes).map(|n| NodeId([n; 8])).collect::<Vec<_>>()).unwrap();
        let tag = 0x1112_1314_1516_1718;
        let kind = DatagramKind::Data;
        let sequence = 0x0102_0304_0506_0708;
        Header { tag, ..Header::new(kind, TunnelId(7), 0x0102_0304, sequence, route) }
    }

    #[test]
    fn the_layout_is_as_documented() {
        let bytes = header(2).encode(b"hi");
        assert_eq!(&bytes[..19], [4, 0, 0, 1, 2, 0, 7, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(bytes[19..27], [0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);
        assert_eq!(
            bytes[27..],
            [[0; 8], [1; 8]].concat().into_iter().chain(*b"hi").collect::<Vec<_>>()
        );
        for (byte, kind) in (0..).zip(DatagramKind::ALL) {
            assert_eq!(Header { kind, ..header(2) }.encode(b"")[1], byte);
            assert_eq!(DatagramKind::from_byte(byte), Some(kind));
        }
        for (flag, marked) in [
            (1, Header { congestion: true, ..header(2) }),
            (2, Header { reply: true, ..header(2) }),
            (4, Header { receipt: true, ..header(2) }),
            (8, Header { copy: true, ..header(2) }),
            (16, Header { resumed: true, ..header(2) }),
        ] {
            let bytes = marked.encode(b"");
            assert_eq!(bytes[2], flag);
            assert_eq!(Header::decode(&bytes), Ok((marked, &[][..])));
        }
    }

    #[test]
    fn marks_and_positions_change_in_place() {
        let mut bytes = header(3).encode(b"payload");
        Header::mark_congestion(&mut bytes);
        Header::advance(&mut bytes);
        let (decoded, payload) = Header::decode(&bytes).unwrap();
        assert_eq!(decoded, Header { congestion: true, position: 2, ..header(3) });
        assert_eq!(payload, b"payload");
    }

    #[test]
    fn each_kind_of_wrong_bytes_has_its_name() {
        let good = header(3).encode(b"");
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            Header::decode(&bytes).unwrap_err()
        };
        assert_eq!(with(0, 1), HeaderError::Version);
        assert_eq!(with(1, 8), HeaderError::Kind);
        assert_eq!(with(2, 32), HeaderError::Kind);
        assert_eq!(with(3, 0), HeaderError::Route);
        assert_eq!(with(3, 3), HeaderError::Route);
        assert_eq!(with(4, 10), HeaderError::Route);
        assert_eq!(with(5, 0x80), HeaderError::Tunnel);
        assert_eq!(with(6, 0), HeaderError::Tunnel);
        assert_eq!(with(4, 4), HeaderError::Truncated);
        let mut looping = good.clone();
        looping.copy_within(27..35, 43);
        assert_eq!(Header::decode(&looping).unwrap_err(), HeaderError::Loop);
        let long = header(2).encode(&vec![0; PAYLOAD_BYTES_MAX + 1]);
        assert_eq!(Header::decode(&long).unwrap_err(), HeaderError::Oversized);
        let probe = Header { kind: DatagramKind::Probe, tunnel: TunnelId(0), ..header(3) };
        assert!(Header::decode(&probe.encode(b"")).is_ok(), "a probe has no tunnel");
        let beat = Header { kind: DatagramKind::Beat, ..probe };
        assert_eq!(Header::decode(&beat.encode(b"")).unwrap_err(), HeaderError::Tunnel);
        for length in 0..good.len() {
            assert_eq!(Header::decode(&good[..length]).unwrap_err(), HeaderError::Truncated);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok((header, payload)) = Header::decode(&bytes) {
                prop_assert_eq!(header.encode(payload), bytes);
            }
        }

        #[test]
        fn datagrams_survive_the_wire(
            nodes in 2u8..=9,
            payload in proptest::collection::vec(any::<u8>(), 0..100),
            sequence: u64,
            reply: bool,
        ) {
            let header = Header { sequence, reply, position: nodes - 1, ..header(nodes) };
            let bytes = header.encode(&payload);
            prop_assert_eq!(Header::decode(&bytes), Ok((header, &payload[..])));
        }
    }
}
