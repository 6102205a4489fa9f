//! How large the packets of a tunnel may be.
//!
//! A large packet costs little more than a small one, at both ends and at each relay, but it takes
//! long on a slow link, where others wait behind it. So packets have at most [`PACKET_BYTES`], until
//! the tunnel has sent at a rate for [`WINDOW`] at which larger ones take a millisecond or two
//! ([`STEPS`]). QUIC tries them from time to time; what it tries on a slower tunnel is lost here, which it
//! takes for a path that carries no more, and not for congestion ([`tries`](super::tries)).
//!
//! Once QUIC has learned that large packets arrive it sends them until many are lost, so that one that
//! was tried in time is not taken back when the tunnel moves to a slower route.

use std::time::Duration;

use crate::engine::types::Timestamp;

/// QUIC packet size (bytes). The overlay rides on streams and fragments nothing; larger packets
/// cost less each, smaller ones mix better on slow links.
pub(super) const PACKET_BYTES: u16 = 4_096;
/// The same on a fast route: the middle of the smallest and the largest, which QUIC tries first.
const MIDDLE_BYTES: u16 = u16::midpoint(PACKET_BYTES, LARGE_BYTES);
/// The same on a very fast route.
pub(super) const LARGE_BYTES: u16 = 48_000;
/// How far apart QUIC's tries are at least (bytes): so far that it tries these sizes and no others.
pub(super) const MINIMUM_CHANGE: u16 = (LARGE_BYTES - MIDDLE_BYTES) / 2 + 2;
/// From which rate on (bytes/s) which packets may pass (bytes): from 128 and from 384 Mbit/s on.
const STEPS: [(f64, u16); 2] = [(16e6, MIDDLE_BYTES), (48e6, LARGE_BYTES)];
/// How long it has to be: a burst into an empty queue is no rate.
const WINDOW: Duration = Duration::from_millis(100);

/// See the module documentation. Time is an argument.
#[derive(Debug)]
pub(super) struct Pace {
    since: Timestamp,
    bytes: u64,
    /// How large a packet may be (bytes).
    at_most: u16,
}

impl Default for Pace {
    fn default() -> Self {
        Self { since: Timestamp(0), bytes: 0, at_most: PACKET_BYTES }
    }
}

impl Pace {
    /// A packet of so many bytes is to leave. Returns false when it is too large.
    pub(super) fn allows(&mut self, bytes: usize, now: Timestamp) -> bool {
        let took = now.since(self.since);
        if took >= WINDOW {
            let rate = self.bytes as f64 / took.as_secs_f64();
            let reached = STEPS.into_iter().filter(|(from, _)| rate >= *from);
            self.at_most = reached.fold(self.at_most, |at_most, (_, bytes)| at_most.max(bytes));
            (self.since, self.bytes) = (now, 0);
        }
        let fits = bytes <= usize::from(self.at_most);
        self.bytes += if fits { bytes as u64 } else { 0 };
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends packets of 4,096 bytes at a rate for 300 ms, and returns which passes then.
    fn largest_at(rate: u64) -> u16 {
        let mut pace = Pace::default();
        let start = Timestamp(5_000_000);
        let packets = rate * 3 / 10 / u64::from(PACKET_BYTES);
        for number in 0..packets {
            let now = start + Duration::from_micros(number * 300_000 / packets);
            assert!(pace.allows(PACKET_BYTES.into(), now));
        }
        let passes = |bytes: &u16| pace.allows((*bytes).into(), start + Duration::from_millis(300));
        [LARGE_BYTES, MIDDLE_BYTES, PACKET_BYTES].into_iter().find(passes).unwrap()
    }

    /// The sizes that QUIC tries, where those up to `carried` arrive (RFC 8899, as quinn has it).
    fn tried(carried: u16) -> Vec<u16> {
        let (mut lower, mut upper, mut last) = (PACKET_BYTES, LARGE_BYTES, PACKET_BYTES);
        let mut tried = Vec::new();
        loop {
            if last <= carried {
                lower = last
            } else {
                upper = last - 1
            }
            let next = u16::midpoint(lower, upper);
            last = match next.abs_diff(last) {
                change if change >= MINIMUM_CHANGE => next,
                _ if upper.saturating_sub(last) >= MINIMUM_CHANGE => upper,
                _ => return tried,
            };
            tried.push(last);
        }
    }

    #[test]
    fn quic_tries_the_sizes_that_may_pass_and_no_others() {
        assert_eq!(tried(PACKET_BYTES), [MIDDLE_BYTES]);
        for carried in [MIDDLE_BYTES, LARGE_BYTES] {
            assert_eq!(tried(carried), [MIDDLE_BYTES, LARGE_BYTES]);
        }
    }

    #[test]
    fn large_packets_pass_on_fast_tunnels_only() {
        for (rate, expected) in [
            (1_250_000, PACKET_BYTES),
            (15_000_000, PACKET_BYTES),
            (17_000_000, MIDDLE_BYTES),
            (47_000_000, MIDDLE_BYTES),
            (49_000_000, LARGE_BYTES),
        ] {
            assert_eq!(largest_at(rate), expected, "{rate}");
        }
    }

    #[test]
    fn a_burst_is_no_rate_and_what_once_was_fast_may_go_on() {
        let mut pace = Pace::default();
        let start = Timestamp(5_000_000);
        let ms = Duration::from_millis;
        (0..20).for_each(|_| assert!(pace.allows(4_000, start)));
        assert!(!pace.allows(16_000, start + ms(99)) && !pace.allows(16_000, start + ms(100)));
        (0..500).for_each(|_| assert!(pace.allows(4_000, start + ms(150))));
        assert!(pace.allows(16_000, start + ms(200)) && pace.allows(16_000, start + ms(9_000)));
    }
}
