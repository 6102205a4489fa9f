//! What nodes say to each other about reservations: the payloads of the datagram kinds
//! [`Reserve`](crate::engine::forward::DatagramKind::Reserve) and
//! [`ReserveAnswer`](crate::engine::forward::DatagramKind::ReserveAnswer).
//!
//! ```text
//! reserve          0..8    rate (bytes/s, big endian); 0 releases
//! reserve answer   byte 0  0 granted, 1 the link to the next node of the route is full,
//!                          2 the link to the node before is full (the way of the answers)
//!                  byte 1  index in the route of the request of the node that says so
//!                  2..10   what that link has left (bytes/s, big endian); 0 when granted
//! ```

use crate::engine::types::{MAX_ROUTE_HOPS, NodeId, Route};

/// Largest rate that can be asked for (bytes/s): the largest of an emulated link.
pub const RATE_MAX: u64 = 1_000_000_000_000;
const RESERVE_BYTES: usize = 8;
const ANSWER_BYTES: usize = 10;

/// Bytes that are no such payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Too few or too many bytes.
    #[error("wrong length")]
    Length,
    /// A rate above [`RATE_MAX`].
    #[error("rate out of range")]
    Rate,
    /// An unknown status.
    #[error("unknown status")]
    Status,
    /// A position that no route has, or that has no such link.
    #[error("position out of range")]
    Position,
}

/// Which of the two links of a node on a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// To the next node: the way of the requests.
    Next,
    /// To the node before: the way of the answers.
    Previous,
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Every node of the route has set the rate aside. `position` is the last node's.
    Granted {
        /// Index of who says so in the route of the request.
        position: u8,
    },
    /// A node has not.
    Refused {
        /// Its index in the route of the request.
        position: u8,
        /// Which of its links is too full.
        side: Side,
        /// What that link has left (bytes/s).
        available: u64,
    },
}

/// The link that refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bottleneck {
    /// Where it begins.
    pub from: NodeId,
    /// Where it ends.
    pub to: NodeId,
    /// What it has left (bytes/s).
    pub available: u64,
}

/// The payload of a request for `rate` (bytes/s, at most [`RATE_MAX`]; 0 releases).
pub fn encode_reserve(rate: u64) -> [u8; RESERVE_BYTES] {
    rate.min(RATE_MAX).to_be_bytes()
}

/// The rate (bytes/s) of a request.
///
/// # Errors
/// [`MessageError`], for arbitrary bytes.
pub fn decode_reserve(bytes: &[u8]) -> Result<u64, MessageError> {
    let rate = u64::from_be_bytes(bytes.try_into().map_err(|_| MessageError::Length)?);
    if rate > RATE_MAX { Err(MessageError::Rate) } else { Ok(rate) }
}

impl Answer {
    /// The payload.
    pub fn encode(self) -> [u8; ANSWER_BYTES] {
        let (status, position, available) = match self {
            Self::Granted { position } => (0, position, 0),
            Self::Refused { position, side: Side::Next, available } => (1, position, available),
            Self::Refused { position, side: Side::Previous, available } => (2, position, available),
        };
        let mut bytes = [0; ANSWER_BYTES];
        bytes[0] = status;
        bytes[1] = position;
        bytes[2..].copy_from_slice(&available.min(RATE_MAX).to_be_bytes());
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// [`MessageError`], for arbitrary bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let bytes: [u8; ANSWER_BYTES] = bytes.try_into().map_err(|_| MessageError::Length)?;
        let [status, position, available @ ..] = bytes;
        let available = u64::from_be_bytes(available);
        let last = MAX_ROUTE_HOPS as u8;
        let (answer, positions) = match status {
            0 if available > 0 => return Err(MessageError::Rate),
            0 => (Self::Granted { position }, 1..=last),
            1 => (Self::Refused { position, side: Side::Next, available }, 0..=last - 1),
            2 => (Self::Refused { position, side: Side::Previous, available }, 1..=last),
            _ => return Err(MessageError::Status),
        };
        if available > RATE_MAX {
            return Err(MessageError::Rate);
        }
        if positions.contains(&position) { Ok(answer) } else { Err(MessageError::Position) }
    }

    /// What the answer means for the route of the request, when `speaker` sent it: `None` when
    /// the position names another node, or none, or a link that the route has not.
    pub fn resolve(self, route: &Route, speaker: NodeId) -> Option<Result<(), Bottleneck>> {
        let nodes = route.nodes();
        let speaks = |position: u8| nodes.get(usize::from(position)) == Some(&speaker);
        match self {
            Self::Granted { position } => {
                let is_last = usize::from(position) + 1 == nodes.len();
                (is_last && speaks(position)).then_some(Ok(()))
            }
            Self::Refused { position, side, available } => {
                let at = usize::from(position);
                let to = match side {
                    Side::Next => nodes.get(at + 1),
                    Side::Previous => at.checked_sub(1).and_then(|before| nodes.get(before)),
                };
                let bottleneck = |to: &NodeId| Bottleneck { from: speaker, to: *to, available };
                to.filter(|_| speaks(position)).map(|to| Err(bottleneck(to)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn payloads_are_as_documented_and_bounded() {
        assert_eq!(encode_reserve(0x0102), [0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(decode_reserve(&encode_reserve(u64::MAX)), Ok(RATE_MAX));
        assert_eq!(decode_reserve(&u64::MAX.to_be_bytes()), Err(MessageError::Rate));
        assert_eq!(decode_reserve(&[0; 7]), Err(MessageError::Length));
        let refused = Answer::Refused { position: 2, side: Side::Next, available: 0x0304 };
        assert_eq!(refused.encode(), [1, 2, 0, 0, 0, 0, 0, 0, 3, 4]);
        let with = |status, position, available: u64| {
            let mut bytes = [status, position, 0, 0, 0, 0, 0, 0, 0, 0];
            bytes[2..].copy_from_slice(&available.to_be_bytes());
            Answer::decode(&bytes)
        };
        assert_eq!(with(3, 1, 0), Err(MessageError::Status));
        assert_eq!(with(0, 1, 1), Err(MessageError::Rate));
        assert_eq!(with(1, 1, RATE_MAX + 1), Err(MessageError::Rate));
        assert_eq!(with(1, 8, 5), Err(MessageError::Position), "the last node has no next one");
        assert_eq!(with(2, 0, 5), Err(MessageError::Position), "the first has none before");
        assert_eq!(with(0, 9, 0), Err(MessageError::Position));
        assert!(with(2, 8, 5).is_ok());
    }

    #[test]
    fn an_answer_names_the_link_only_for_the_node_that_has_it() {
        let node = |byte| NodeId([byte; 8]);
        let route = Route::new([node(0), node(1), node(2)]).unwrap();
        let refused = |position, side| Answer::Refused { position, side, available: 7 };
        let link =
            |from, to| Some(Err(Bottleneck { from: node(from), to: node(to), available: 7 }));
        assert_eq!(refused(1, Side::Next).resolve(&route, node(1)), link(1, 2));
        assert_eq!(refused(1, Side::Previous).resolve(&route, node(1)), link(1, 0));
        assert_eq!(refused(1, Side::Next).resolve(&route, node(2)), None, "another node");
        assert_eq!(refused(2, Side::Next).resolve(&route, node(2)), None, "no such link");
        assert_eq!(Answer::Granted { position: 2 }.resolve(&route, node(2)), Some(Ok(())));
        assert_eq!(Answer::Granted { position: 1 }.resolve(&route, node(1)), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..12)) {
            if let Ok(rate) = decode_reserve(&bytes) {
                prop_assert_eq!(&encode_reserve(rate)[..], &bytes[..]);
            }
            if let Ok(answer) = Answer::decode(&bytes) {
                prop_assert_eq!(&answer.encode()[..], &bytes[..]);
            }
        }

        #[test]
        fn answers_survive_the_wire(
            position in 1u8..8, next: bool, available in 0..=RATE_MAX, granted: bool,
        ) {
            let side = if next { Side::Next } else { Side::Previous };
            let answer = if granted {
                Answer::Granted { position }
            } else {
                Answer::Refused { position, side, available }
            };
            prop_assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
    }
}
