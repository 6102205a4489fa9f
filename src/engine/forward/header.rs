//! The overlay datagram header.
//!
//! ```text
//! byte 0      version, 1
//! byte 1      kind: 0 data, 1 probe, 2 probe answer
//! byte 2      flags: bit 0 congestion experienced, bit 1 towards the node that opened the tunnel;
//!             the others are 0
//! byte 3      position: index in the route of the node that receives this copy
//! byte 4      node count of the route, 2 to 9
//! 5..7        tunnel id of the node that opened the tunnel (big endian); 0 for probes
//! 7..11       route id: how often the tunnel had changed its route
//! 11..19      sequence number; for probes their id
//! 19..        the route, 8 bytes a node, source first
//! then        payload
//! ```

use crate::engine::types::{MAX_ROUTE_HOPS, NodeId, ParseError, Route, TunnelId};

/// Longest payload (bytes): a QUIC packet of the largest size that tunnels use, with room.
pub const PAYLOAD_BYTES_MAX: usize = 16 * 1024;
/// Largest tunnel id: the sixteenth bit is free for who keeps both directions apart.
pub const TUNNEL_ID_MAX: u16 = 0x7fff;
const VERSION: u8 = 1;
const FIXED_BYTES: usize = 19;
const FLAG_CONGESTION: u8 = 1;
const FLAG_REPLY: u8 = 2;
const POSITION_AT: usize = 3;
const FLAGS_AT: usize = 2;

/// What a datagram is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatagramKind {
    /// A packet of a tunnel.
    Data,
    /// To be answered by the last node.
    Probe,
    /// The answer, on the reversed route.
    ProbeAnswer,
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
    /// Index of the receiving node in the route, 1 or more.
    pub position: u8,
    /// The tunnel.
    pub tunnel: TunnelId,
    /// The tunnel's route number.
    pub route_id: u32,
    /// Sequence number, or the probe's id.
    pub sequence: u64,
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
    /// Bytes that this header takes.
    pub fn length(&self) -> usize {
        FIXED_BYTES + 8 * self.route.nodes().len()
    }

    /// The datagram with this header.
    pub fn encode(&self, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.length() + payload.len());
        bytes.push(VERSION);
        bytes.push(match self.kind {
            DatagramKind::Data => 0,
            DatagramKind::Probe => 1,
            DatagramKind::ProbeAnswer => 2,
        });
        let congestion = if self.congestion { FLAG_CONGESTION } else { 0 };
        bytes.push(congestion | if self.reply { FLAG_REPLY } else { 0 });
        bytes.push(self.position);
        bytes.push(self.route.nodes().len() as u8);
        bytes.extend(self.tunnel.0.to_be_bytes());
        bytes.extend(self.route_id.to_be_bytes());
        bytes.extend(self.sequence.to_be_bytes());
        for node in self.route.nodes() {
            bytes.extend(node.0);
        }
        bytes.extend(payload);
        bytes
    }

    /// Reads a datagram: the header and the payload.
    ///
    /// # Errors
    /// [`HeaderError`], for arbitrary bytes.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), HeaderError> {
        if bytes.len() < FIXED_BYTES {
            return Err(HeaderError::Truncated);
        }
        if bytes[0] != VERSION {
            return Err(HeaderError::Version);
        }
        let kind = match bytes[1] {
            0 => DatagramKind::Data,
            1 => DatagramKind::Probe,
            2 => DatagramKind::ProbeAnswer,
            _ => return Err(HeaderError::Kind),
        };
        if bytes[FLAGS_AT] & !(FLAG_CONGESTION | FLAG_REPLY) != 0 {
            return Err(HeaderError::Kind);
        }
        let (position, count) = (bytes[POSITION_AT], usize::from(bytes[4]));
        if !(2..=MAX_ROUTE_HOPS + 1).contains(&count)
            || !(1..count).contains(&usize::from(position))
        {
            return Err(HeaderError::Route);
        }
        let end = FIXED_BYTES + 8 * count;
        if bytes.len() < end {
            return Err(HeaderError::Truncated);
        }
        if bytes.len() - end > PAYLOAD_BYTES_MAX {
            return Err(HeaderError::Oversized);
        }
        let nodes: Vec<NodeId> = bytes[FIXED_BYTES..end]
            .chunks_exact(8)
            .map(|chunk| NodeId(chunk.try_into().expect("chunks of exactly 8")))
            .collect();
        let route = Route::new(nodes).map_err(|error| match error {
            ParseError::RouteLoop(_) => HeaderError::Loop,
            _ => HeaderError::Route,
        })?;
        let word = |at: usize, length: usize| {
            bytes[at..at + length].iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte))
        };
        let tunnel = TunnelId(word(5, 2) as u16);
        let is_data = kind == DatagramKind::Data;
        if tunnel.0 > TUNNEL_ID_MAX || (is_data && tunnel.0 == 0) {
            return Err(HeaderError::Tunnel);
        }
        let header = Self {
            kind,
            congestion: bytes[FLAGS_AT] & FLAG_CONGESTION != 0,
            reply: bytes[FLAGS_AT] & FLAG_REPLY != 0,
            position,
            tunnel,
            route_id: word(7, 4) as u32,
            sequence: word(11, 8),
            route,
        };
        Ok((header, &bytes[end..]))
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

    fn header(nodes: u8) -> Header {
        Header {
            kind: DatagramKind::Data,
            congestion: false,
            reply: false,
            position: 1,
            tunnel: TunnelId(7),
            route_id: 0x0102_0304,
            sequence: 0x0102_0304_0506_0708,
            route: Route::new((0..nodes).map(|n| NodeId([n; 8])).collect::<Vec<_>>()).unwrap(),
        }
    }

    #[test]
    fn the_layout_is_as_documented() {
        let bytes = header(2).encode(b"hi");
        assert_eq!(&bytes[..19], [1, 0, 0, 1, 2, 0, 7, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(bytes.len(), 19 + 16 + 2);
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
        assert_eq!(with(0, 2), HeaderError::Version);
        assert_eq!(with(1, 3), HeaderError::Kind);
        assert_eq!(with(2, 4), HeaderError::Kind);
        assert_eq!(with(3, 0), HeaderError::Route);
        assert_eq!(with(3, 3), HeaderError::Route);
        assert_eq!(with(4, 10), HeaderError::Route);
        assert_eq!(with(5, 0x80), HeaderError::Tunnel);
        assert_eq!(with(6, 0), HeaderError::Tunnel);
        assert_eq!(with(4, 4), HeaderError::Truncated);
        let mut looping = good.clone();
        looping.copy_within(19..27, 35);
        assert_eq!(Header::decode(&looping).unwrap_err(), HeaderError::Loop);
        let long = header(2).encode(&vec![0; PAYLOAD_BYTES_MAX + 1]);
        assert_eq!(Header::decode(&long).unwrap_err(), HeaderError::Oversized);
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
