//! How large the packets of a tunnel may be.
//!
//! A large packet costs little more than a small one, at both ends and at each relay, but it takes
//! long on a slow link, where others wait behind it. So packets have at most [`PACKET_BYTES`], until
//! the tunnel has sent at [`FAST`] for [`WINDOW`], at which the largest one takes a millisecond. QUIC
//! tries them from time to time; what it tries on a slower tunnel is lost here, which it takes for a
//! path that carries no more, and not for congestion.
//!
//! Once QUIC has learned that large packets arrive it sends them until many are lost, so that one that
//! was tried in time is not taken back when the tunnel moves to a slower route.

use std::time::Duration;

use crate::engine::types::Timestamp;

/// QUIC packet size (bytes). The overlay rides on streams and fragments nothing; larger packets
/// cost less each, smaller ones mix better on slow links.
pub(super) const PACKET_BYTES: u16 = 4_096;
/// The same on a fast route.
pub(super) const LARGE_BYTES: u16 = 16_000;
/// From which rate on a tunnel is fast (bytes/s): 128 Mbit/s.
const FAST: u64 = 16_000_000;
/// How long it has to be: a burst into an empty queue is no rate.
const WINDOW: Duration = Duration::from_millis(100);

/// See the module documentation. Time is an argument.
#[derive(Debug, Default)]
pub(super) struct Pace {
    since: Timestamp,
    bytes: u64,
    /// Large packets may pass.
    is_fast: bool,
}

impl Pace {
    /// A packet of so many bytes is to leave. Returns false when it is too large.
    pub(super) fn allows(&mut self, bytes: usize, now: Timestamp) -> bool {
        let took = now.since(self.since);
        if took >= WINDOW {
            let rate = self.bytes as f64 / took.as_secs_f64();
            self.is_fast |= rate >= FAST as f64;
            (self.since, self.bytes) = (now, 0);
        }
        let fits = bytes <= usize::from(PACKET_BYTES) || self.is_fast;
        self.bytes += if fits { bytes as u64 } else { 0 };
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends packets of 4,096 bytes at a rate for 300 ms, and returns whether a large one passes then.
    fn large_at(rate: u64) -> bool {
        let mut pace = Pace::default();
        let start = Timestamp(5_000_000);
        let packets = rate * 3 / 10 / u64::from(PACKET_BYTES);
        for number in 0..packets {
            let now = start + Duration::from_micros(number * 300_000 / packets);
            assert!(pace.allows(PACKET_BYTES.into(), now));
        }
        pace.allows(LARGE_BYTES.into(), start + Duration::from_millis(300))
    }

    #[test]
    fn large_packets_pass_on_fast_tunnels_only() {
        assert!(!large_at(1_250_000) && !large_at(FAST - 1_000_000) && large_at(FAST + 1_000_000));
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
