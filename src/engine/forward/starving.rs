//! Whether a route delivers what a tunnel sends, or answers questions only.
//!
//! A relay that throws away or changes every packet of a tunnel and passes its beats on is not
//! silent: each beat is answered. But the answer says how much has arrived, and counts packets apart from
//! beats, which may be lost too. Of the datagrams that a receipt covers, those are packets that were no
//! beats; a route *withholds* when none of them has arrived, and *starves* its tunnel when this has been so for [`STARVED_FOR`] and [`STARVED_MIN`]
//! packets. The time is for packets that a beat has overtaken in a queue. One that arrives ends it.
//!
//! In the other direction what arrives says it: so many datagrams in such a time whose tags are wrong,
//! over the route in use, and none in between that proves itself.
//!
//! A relay that does this to a part of the packets loses them, as far as receipts go, and is found by
//! [`Honesty`](crate::engine::measure::Honesty).

use std::collections::VecDeque;
use std::time::Duration;

use super::receipt::Receipt;
use crate::engine::types::Timestamp;

/// How long nothing may arrive: longer than queues hold a packet back, shorter than a person waits.
pub const STARVED_FOR: Duration = Duration::from_millis(300);
/// Packets of which one must arrive: with 30 % loss, all are lost one time in 400.
pub const STARVED_MIN: u64 = 5;
/// Beats that no receipt covers and that are remembered: 1.28 s of the most frequent ones.
const BEATS_MAX: usize = 64;

/// What a receipt says of the packets that it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Some have arrived, or there were none.
    Delivers,
    /// None has arrived.
    Withholds,
    /// None for long. Said once, and then again as if it had just begun.
    Starves,
}

/// See the module documentation. Time is an argument.
#[derive(Clone, Debug, Default)]
pub struct Starving {
    /// Sequence numbers of beats that no receipt covers yet, oldest first.
    beats: VecDeque<u64>,
    /// What the newest receipt said.
    covered: Receipt,
    out: Drought,
    back: Drought,
}

/// Packets in a row of which none was good.
#[derive(Clone, Copy, Debug, Default)]
struct Drought {
    packets: u64,
    since: Option<Timestamp>,
}

impl Drought {
    /// So many more were no good. Returns whether that is too much.
    fn lasts(&mut self, packets: u64, now: Timestamp) -> bool {
        self.packets += packets;
        let since = *self.since.get_or_insert(now);
        let too_long = self.packets >= STARVED_MIN && now.since(since) >= STARVED_FOR;
        if too_long {
            *self = Self::default();
        }
        too_long
    }
}

impl Starving {
    /// A beat leaves with this sequence number.
    pub fn beat(&mut self, sequence: u64) {
        if self.beats.len() >= BEATS_MAX {
            self.beats.pop_front();
        }
        self.beats.push_back(sequence);
    }

    /// A receipt over the route in use.
    pub fn receipt(&mut self, receipt: Receipt, now: Timestamp) -> Delivery {
        let Some(covers) = receipt.highest.checked_sub(self.covered.highest) else {
            return Delivery::Delivers;
        };
        let mut beats = 0;
        while self.beats.front().is_some_and(|beat| *beat <= receipt.highest) {
            self.beats.pop_front();
            beats += 1;
        }
        let packets = covers.saturating_sub(beats);
        let arrived = receipt.packets.saturating_sub(self.covered.packets);
        self.covered = receipt;
        if arrived > 0 || self.out.packets + packets == 0 {
            self.out = Drought::default();
            return Delivery::Delivers;
        }
        if self.out.lasts(packets, now) { Delivery::Starves } else { Delivery::Withholds }
    }

    /// A datagram arrived over the route in use whose tag is wrong. Returns whether the route starves
    /// the tunnel.
    pub fn forged(&mut self, now: Timestamp) -> bool {
        self.back.lasts(1, now)
    }

    /// A packet of the far end proved itself.
    pub fn heard(&mut self) {
        self.back = Drought::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Timestamp {
        Timestamp(1_000_000 + ms * 1_000)
    }

    /// A route whose packets (two between beats, 100 ms apart) arrive until `from`, and again from
    /// `until` on; when it starved (ms).
    fn starved(from: u64, until: u64) -> Vec<u64> {
        let (mut starving, mut receipt) = (Starving::default(), Receipt::default());
        let mut found = Vec::new();
        for step in 1..=50 {
            let now = step * 100;
            receipt.highest += 3;
            receipt.packets += if (from..until).contains(&now) { 0 } else { 2 };
            starving.beat(receipt.highest);
            if starving.receipt(receipt, at(now)) == Delivery::Starves {
                found.push(now);
            }
        }
        found
    }

    #[test]
    fn a_route_that_answers_and_delivers_nothing_is_found_once_a_while() {
        assert_eq!(starved(9_000, 9_000), [0; 0], "all is well");
        assert_eq!(starved(1_000, 1_300), [0; 0], "a short stall");
        assert_eq!(starved(1_000, 1_800), [1_300, 1_700], "300 ms each, and from anew");
        assert_eq!(starved(100, 450), [400], "from the beginning");
    }

    #[test]
    fn some_packets_are_enough_and_beats_alone_say_nothing() {
        let mut starving = Starving::default();
        let receipt = |highest, packets| Receipt { highest, packets, ..Receipt::default() };
        for beat in 1..200 {
            starving.beat(beat);
            assert_eq!(starving.receipt(receipt(beat, 0), at(100 * beat)), Delivery::Delivers);
        }
        // A third of what follows arrives.
        for step in 1..50 {
            let said = starving.receipt(receipt(199 + 3 * step, step), at(20_000 + step));
            assert_eq!(said, Delivery::Delivers);
        }
        assert_eq!(starving.receipt(receipt(200, 0), at(90_000)), Delivery::Delivers, "overtaken");
        for (ms, expected) in [(0, Delivery::Withholds), (299, Delivery::Withholds)] {
            let highest = 400 + ms;
            assert_eq!(starving.receipt(receipt(highest, 49), at(95_000 + ms)), expected);
        }
        assert_eq!(starving.receipt(receipt(701, 49), at(95_300)), Delivery::Starves);
    }

    #[test]
    fn beats_that_are_lost_too_do_not_hide_the_packets_that_arrive() {
        let mut starving = Starving::default();
        let mut receipt = Receipt::default();
        // Of five beats and two packets in each 100 ms, two and one arrive.
        for step in 1..=100u64 {
            (1..=5).for_each(|beat| starving.beat(receipt.highest + beat));
            receipt.highest += 7;
            (receipt.received, receipt.packets) = (3 * step, step);
            assert_eq!(starving.receipt(receipt, at(100 * step)), Delivery::Delivers);
        }
    }

    #[test]
    fn wrong_tags_count_until_one_is_right() {
        let mut starving = Starving::default();
        let forged = |starving: &mut Starving, ms| starving.forged(at(ms));
        assert!((0..4).all(|n| !forged(&mut starving, n)));
        assert!(forged(&mut starving, 300), "five in 300 ms");
        assert!((0..50).all(|n| !forged(&mut starving, 400 + n)), "not for long enough");
        starving.heard();
        assert!((0..4).all(|n| !forged(&mut starving, 1_000 + 100 * n)), "too few");
        assert!(forged(&mut starving, 1_400));
    }
}
