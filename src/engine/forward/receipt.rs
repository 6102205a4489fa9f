//! What one end of a tunnel has received from the other, and how it says so.

use std::collections::VecDeque;

use super::header::{DatagramKind, Header};

/// Sequence numbers below the highest one that are remembered, to know a replay.
pub const REPLAY_WINDOW: u64 = 1_024;
/// Newest routes of a direction that are counted; what older ones bring counts as stale.
pub const ROUTES_MAX: usize = 4;
const WORDS: usize = REPLAY_WINDOW as usize / 64;

/// What was received over one route of a tunnel, in one direction: the payload of a receipt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// Highest sequence number; 0 before the first.
    pub highest: u64,
    /// Datagrams, each counted once.
    pub received: u64,
    /// Those that had met congestion.
    pub marked: u64,
    /// Those that were no beats.
    pub packets: u64,
}

impl Receipt {
    /// Length of an encoded receipt (bytes): four numbers, big endian.
    pub const BYTES: usize = 32;

    /// As the payload of a datagram.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let words = [self.highest, self.received, self.marked, self.packets];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_be_bytes());
        }
        bytes
    }

    /// From a payload; `None` when it has another length.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = payload.try_into().ok()?;
        let word = |at: usize| {
            bytes[at..at + 8].iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte))
        };
        let (highest, received) = (word(0), word(8));
        Some(Self { highest, received, marked: word(16), packets: word(24) })
    }
}

/// Up to where the node that opened a tunnel has received: the payload of a beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Number of the newest route that brought something.
    pub route_id: u32,
    /// Highest sequence number on it.
    pub highest: u64,
}

impl Seen {
    /// Length when encoded (bytes): two numbers, big endian.
    pub const BYTES: usize = 12;

    /// As the payload of a datagram.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.route_id.to_be_bytes());
        bytes[4..].copy_from_slice(&self.highest.to_be_bytes());
        bytes
    }

    /// From a payload; `None` when it has another length.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = payload.try_into().ok()?;
        let word = |part: &[u8]| part.iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        Some(Self { route_id: word(&bytes[..4]) as u32, highest: word(&bytes[4..]) })
    }
}

/// What a datagram that proves itself is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// It is counted.
    New,
    /// It was here before.
    Replayed,
    /// Too old to know.
    Stale,
}

#[derive(Clone, Debug)]
struct Window {
    route_id: u32,
    counts: Receipt,
    seen: [u64; WORDS],
}

/// What arrived over the newest routes of one direction of a tunnel.
#[derive(Clone, Debug, Default)]
pub struct Arrivals {
    /// By route number, highest last.
    windows: VecDeque<Window>,
}

impl Arrivals {
    /// A datagram of a tunnel arrived that proves itself.
    pub fn heard(&mut self, header: &Header) -> Heard {
        let route_id = header.route_id;
        let at = self.windows.partition_point(|window| window.route_id < route_id);
        if self.windows.get(at).is_none_or(|window| window.route_id != route_id) {
            if at == 0 && self.windows.len() >= ROUTES_MAX {
                return Heard::Stale;
            }
            let fresh = Window { route_id, counts: Receipt::default(), seen: [0; WORDS] };
            self.windows.insert(at, fresh);
        }
        let heard = self.windows.get_mut(at).map_or(Heard::Stale, |w| w.heard(header));
        if self.windows.len() > ROUTES_MAX {
            self.windows.pop_front();
        }
        heard
    }

    /// What arrived over one route; nothing when it is not known.
    pub fn over(&self, route_id: u32) -> Receipt {
        let window = self.windows.iter().find(|window| window.route_id == route_id);
        window.map_or_else(Receipt::default, |window| window.counts)
    }

    /// Up to where the newest route brought something.
    pub fn newest(&self) -> Option<Seen> {
        let window = self.windows.back()?;
        Some(Seen { route_id: window.route_id, highest: window.counts.highest })
    }
}

impl Window {
    fn heard(&mut self, header: &Header) -> Heard {
        let sequence = header.sequence;
        let highest = self.counts.highest;
        if sequence == 0 || sequence.saturating_add(REPLAY_WINDOW) <= highest {
            return Heard::Stale;
        }
        if sequence > highest {
            let steps = (sequence - highest).min(REPLAY_WINDOW);
            for skipped in 0..steps {
                self.set(sequence - skipped, false);
            }
            self.counts.highest = sequence;
        } else if self.seen[Self::word(sequence)] & Self::bit(sequence) != 0 {
            return Heard::Replayed;
        }
        self.set(sequence, true);
        self.counts.received += 1;
        self.counts.marked += u64::from(header.congestion);
        self.counts.packets += u64::from(header.kind != DatagramKind::Beat);
        Heard::New
    }

    fn set(&mut self, sequence: u64, seen: bool) {
        let word = &mut self.seen[Self::word(sequence)];
        *word = if seen { *word | Self::bit(sequence) } else { *word & !Self::bit(sequence) };
    }

    fn word(sequence: u64) -> usize {
        (sequence % REPLAY_WINDOW) as usize / 64
    }

    fn bit(sequence: u64) -> u64 {
        1 << (sequence % 64)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::types::{NodeId, Route, TunnelId};

    fn datagram(kind: DatagramKind, route_id: u32, sequence: u64) -> Header {
        let route = Route::new([NodeId([1; 8]), NodeId([2; 8])]).unwrap();
        Header::new(kind, TunnelId(1), route_id, sequence, route)
    }

    fn heard(arrivals: &mut Arrivals, route_id: u32, sequence: u64) -> Heard {
        arrivals.heard(&datagram(DatagramKind::Data, route_id, sequence))
    }

    #[test]
    fn beats_and_marks_are_counted_apart() {
        let mut arrivals = Arrivals::default();
        for sequence in 1..=6 {
            let beat = sequence % 3 == 0;
            let kind = if beat { DatagramKind::Beat } else { DatagramKind::Data };
            let header = Header { congestion: sequence == 1, ..datagram(kind, 1, sequence) };
            assert_eq!(arrivals.heard(&header), Heard::New);
            assert_eq!(arrivals.heard(&header), Heard::Replayed);
        }
        let expected = Receipt { highest: 6, received: 6, marked: 1, packets: 4 };
        assert_eq!(arrivals.over(1), expected);
    }

    #[test]
    fn old_routes_make_room_and_are_stale() {
        let mut arrivals = Arrivals::default();
        for route_id in 1..=6 {
            assert_eq!(heard(&mut arrivals, route_id, 5), Heard::New);
        }
        assert_eq!(heard(&mut arrivals, 2, 6), Heard::Stale);
        assert_eq!(heard(&mut arrivals, 3, 5), Heard::Replayed);
        assert_eq!(arrivals.newest(), Some(Seen { route_id: 6, highest: 5 }));
        let expected = Receipt { highest: 5, received: 1, marked: 0, packets: 1 };
        assert_eq!(arrivals.over(6), expected);
        assert_eq!((arrivals.over(2), arrivals.windows.len()), (Receipt::default(), ROUTES_MAX));
    }

    #[test]
    fn what_leaves_the_window_is_stale() {
        let mut arrivals = Arrivals::default();
        let mut heard = |sequence| heard(&mut arrivals, 1, sequence);
        heard(REPLAY_WINDOW + 1);
        assert_eq!(heard(1), Heard::Stale);
        assert_eq!(heard(2), Heard::New);
        assert_eq!(heard(0), Heard::Stale);
        assert_eq!(heard(u64::MAX), Heard::New);
    }

    proptest! {
        #[test]
        fn each_datagram_counts_once(steps in proptest::collection::vec(1u64..900, 1..300)) {
            let (mut arrivals, mut known) = (Arrivals::default(), BTreeSet::new());
            let mut highest = 0;
            for step in steps {
                // Around the highest one, now and then far ahead.
                let sequence = (highest + step).saturating_sub(600).max(1);
                let expected = if known.insert(sequence) { Heard::New } else { Heard::Replayed };
                if sequence + REPLAY_WINDOW > highest {
                    prop_assert_eq!(heard(&mut arrivals, 7, sequence), expected);
                }
                highest = highest.max(sequence);
            }
            prop_assert_eq!(arrivals.over(7).received, known.len() as u64);
        }

        #[test]
        fn payloads_survive_the_wire(counts: [u64; 4], route_id: u32) {
            let [highest, received, marked, packets] = counts;
            let receipt = Receipt { highest, received, marked, packets };
            prop_assert_eq!(Receipt::decode(&receipt.encode()), Some(receipt));
            let seen = Seen { route_id, highest };
            prop_assert_eq!(Seen::decode(&seen.encode()), Some(seen));
            prop_assert_eq!(Receipt::decode(&seen.encode()), None);
            prop_assert_eq!(Seen::decode(&receipt.encode()), None);
        }
    }
}
