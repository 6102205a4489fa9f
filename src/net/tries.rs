//! What a packet that only tries a size may cost.
//!
//! QUIC tries larger packets from time to time, and counts each as under way until it is acknowledged
//! or lost. One that is not let pass ([`pace`](super::pace)) is never acknowledged. It may be larger
//! than the congestion window of a tunnel on which little is sent; then nothing else leaves before
//! QUIC's probe time-out (RFC 9002, section 6.2), the round trip and 25 ms later. So the data plane tells
//! the congestion controller of the tunnel what it has not let pass, and the window is larger by that
//! for as long as QUIC counts it.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, CubicConfig};
use quinn_proto::RttEstimator;

/// The shortest time after which QUIC takes a packet for lost (RFC 9002's timer granularity).
const LOSS_DELAY_MIN: Duration = Duration::from_millis(1);

/// A packet that was not let pass.
#[derive(Clone, Copy, Debug)]
struct Withheld {
    bytes: u64,
    at: Instant,
    /// When QUIC takes it for lost; not known before something later was acknowledged.
    lost_at: Option<Instant>,
}

/// The newest packet of a tunnel that was not let pass; QUIC tries one at a time. Shared by the data plane
/// and the congestion controller.
#[derive(Debug, Default)]
pub(super) struct Tries(Mutex<Option<Withheld>>);

impl Tries {
    fn lock(&self) -> MutexGuard<'_, Option<Withheld>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A packet of so many bytes is not let pass.
    pub(super) fn withhold(&self, bytes: usize, now: Instant) {
        *self.lock() = Some(Withheld { bytes: bytes as u64, at: now, lost_at: None });
    }

    /// Whether anything was not let pass, and is not known to be over.
    #[cfg(test)]
    pub(super) fn were_withheld(&self) -> bool {
        self.lock().is_some()
    }

    /// A packet that was sent at this time was acknowledged. `smoothed` is the round-trip time, `threshold`
    /// after how many of them a packet that was overtaken counts as lost.
    ///
    /// QUIC counts from the larger of the newest and the smoothed round-trip time, which it works out after
    /// this. It is better to end too soon, which holds back a little, than too late, when as much as was
    /// not let pass leaves at once.
    fn acknowledged(&self, sent: Instant, now: Instant, smoothed: Duration, threshold: f32) {
        let mut withheld = self.lock();
        let is_over = |withheld: &Withheld| withheld.lost_at.is_some_and(|at| at <= now);
        *withheld = withheld.filter(|withheld| !is_over(withheld));
        if let Some(withheld) = withheld.as_mut()
            && sent > withheld.at
        {
            let newest = now.saturating_duration_since(sent);
            // As RFC 9002 smooths, section 5.3.
            let rtt = newest.max((7 * smoothed + newest) / 8);
            withheld.lost_at = Some(withheld.at + rtt.mul_f32(threshold).max(LOSS_DELAY_MIN));
        }
    }

    /// So much is under way as QUIC counts.
    fn under_way(&self, bytes: u64) {
        let mut withheld = self.lock();
        if withheld.is_some_and(|withheld| bytes < withheld.bytes) {
            *withheld = None;
        }
    }

    /// Bytes that QUIC counts as under way and that are not.
    fn counted(&self, now: Instant) -> u64 {
        let withheld = self.lock();
        let counts = |withheld: &Withheld| withheld.lost_at.is_none_or(|at| now < at);
        withheld.filter(counts).map_or(0, |withheld| withheld.bytes)
    }
}

/// CUBIC (RFC 9438), but packets that were not let pass take no place in its window.
pub(super) struct Congestion {
    pub(super) cubic: Arc<CubicConfig>,
    pub(super) tries: Arc<Tries>,
    /// Round trips after which a packet that was overtaken counts as lost.
    pub(super) time_threshold: f32,
}

impl ControllerFactory for Congestion {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let cubic = self.cubic.clone().build(now, current_mtu);
        Box::new(Window { cubic, tries: self.tries.clone(), time_threshold: self.time_threshold })
    }
}

struct Window {
    cubic: Box<dyn Controller>,
    tries: Arc<Tries>,
    time_threshold: f32,
}

impl Controller for Window {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.tries.acknowledged(sent, now, rtt.get(), self.time_threshold);
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.tries.under_way(in_flight);
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window().saturating_add(self.tries.counted(Instant::now()))
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        let (cubic, tries) = (self.cubic.clone_box(), self.tries.clone());
        Box::new(Self { cubic, tries, time_threshold: self.time_threshold })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRY: u64 = 26_000;
    const RTT: Duration = Duration::from_millis(10);
    const THRESHOLD: f32 = 1.25;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_was_not_let_pass_is_counted_until_quic_takes_it_for_lost() {
        let (tries, start) = (Tries::default(), Instant::now());
        assert_eq!(tries.counted(start), 0);
        tries.withhold(TRY as usize, start);
        tries.acknowledged(start - ms(1), start + ms(9), RTT, THRESHOLD);
        tries.under_way(TRY + 100);
        assert_eq!(tries.counted(start + ms(1_000)), TRY, "QUIC waits for something later");
        tries.acknowledged(start + ms(1), start + ms(11), RTT, THRESHOLD);
        assert_eq!(tries.counted(start + ms(12)), TRY);
        assert_eq!(tries.counted(start + ms(13)), 0, "1.25 round trips after it left");
        tries.acknowledged(start + ms(2), start + ms(42), RTT, THRESHOLD);
        assert_eq!(tries.counted(start + ms(42)), 0, "what is over does not begin again");
    }

    #[test]
    fn the_newest_round_trip_counts_also_when_it_is_shorter_and_a_very_short_one_as_a_millisecond()
    {
        let (tries, start) = (Tries::default(), Instant::now());
        tries.withhold(TRY as usize, start);
        tries.acknowledged(start + ms(1), start + ms(3), RTT, THRESHOLD);
        assert_eq!(tries.counted(start + ms(11)), TRY);
        assert_eq!(tries.counted(start + ms(12)), 0, "1.25 times 9 ms");
        tries.withhold(TRY as usize, start);
        tries.acknowledged(start + ms(30), start + ms(40), RTT, THRESHOLD);
        assert_eq!(tries.counted(start + ms(40)), 0);
        tries.withhold(TRY as usize, start);
        let near = Duration::from_micros(100);
        tries.acknowledged(start + near, start + 2 * near, near, THRESHOLD);
        assert_eq!(tries.counted(start + 9 * near), TRY);
        assert_eq!(tries.counted(start + ms(1)), 0);
    }

    #[test]
    fn it_is_over_when_less_is_under_way() {
        let (tries, start) = (Tries::default(), Instant::now());
        tries.withhold(TRY as usize, start);
        tries.under_way(TRY);
        assert_eq!(tries.counted(start), TRY);
        tries.under_way(TRY - 1);
        assert_eq!(tries.counted(start), 0);
    }

    #[test]
    fn the_window_is_larger_by_what_was_not_let_pass() {
        let mut cubic = CubicConfig::default();
        cubic.initial_window(16_384);
        let tries = Arc::new(Tries::default());
        let congestion =
            Congestion { cubic: Arc::new(cubic), tries: tries.clone(), time_threshold: THRESHOLD };
        let controller = Arc::new(congestion).build(Instant::now(), 4_096);
        tries.withhold(TRY as usize, Instant::now());
        assert_eq!((controller.window(), controller.initial_window()), (16_384 + TRY, 16_384));
        assert_eq!(controller.clone_box().window(), 16_384 + TRY);
    }
}
