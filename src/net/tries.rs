//! What QUIC tries in vain does not hold up what it sends.
//!
//! QUIC tries from time to time, and as soon as a connection is there, whether larger packets arrive. What
//! is on trial counts as under way, so that beside one of 26 KB nothing else fits a congestion window of
//! 16 KB. One that [`pace`](super::pace) has not let pass never arrives, and QUIC takes it for lost only when
//! something that left later is acknowledged. As nothing may leave, that is after its probe time-out: 25 ms
//! and three times the round trip of the handshake, at both ends one after the other. Therefore the window
//! is larger by what was not let pass, until something that left after it is acknowledged.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;

/// What of one connection was not let pass, and QUIC takes for under way: at most the newest try.
#[derive(Debug, Default)]
pub(super) struct Tries(Mutex<Option<(Instant, u64)>>);

impl Tries {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Instant, u64)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A packet of so many bytes was not let pass.
    pub(super) fn refused(&self, bytes: usize, now: Instant) {
        *self.lock() = Some((now, bytes as u64));
    }

    /// What left at `sent` was acknowledged.
    fn acknowledged(&self, sent: Instant) {
        let mut tried = self.lock();
        if tried.is_some_and(|(at, _)| sent > at) {
            *tried = None;
        }
    }

    /// How much it is (bytes).
    fn bytes(&self) -> u64 {
        self.lock().map_or(0, |(_, bytes)| bytes)
    }
}

/// Makes the congestion controller of one connection.
pub(super) struct Congestion {
    /// The controller behind it.
    pub(super) cubic: Arc<CubicConfig>,
    /// What of the connection's packets is not let pass.
    pub(super) tries: Arc<Tries>,
}

impl ControllerFactory for Congestion {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let controller = self.cubic.clone().build(now, current_mtu);
        Box::new(Beside { controller, tries: self.tries.clone() })
    }
}

/// A controller whose window has room for what was tried in vain beside everything else.
struct Beside {
    controller: Box<dyn Controller>,
    tries: Arc<Tries>,
}

impl Controller for Beside {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.controller.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.tries.acknowledged(sent);
        self.controller.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.controller.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.controller.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.controller.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.controller.window().saturating_add(self.tries.bytes())
    }

    fn metrics(&self) -> ControllerMetrics {
        self.controller.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { controller: self.controller.clone_box(), tries: self.tries.clone() })
    }

    fn initial_window(&self) -> u64 {
        self.controller.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_window_has_room_for_what_was_not_let_pass_until_something_later_arrived() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let tries = Arc::new(Tries::default());
        let congestion = Congestion { cubic: Arc::default(), tries: tries.clone() };
        let mut controller = Arc::new(congestion).build(start, 1_200);
        let usual = controller.window();
        tries.refused(26_000, at(10));
        assert_eq!(controller.clone_box().window(), usual + 26_000);
        tries.acknowledged(at(9));
        assert_eq!(controller.window(), usual + 26_000, "it left before");
        tries.refused(40_000, at(20));
        assert_eq!(controller.window(), usual + 40_000, "one is on trial at a time");
        tries.acknowledged(at(21));
        assert_eq!(controller.window(), usual);
        controller.on_congestion_event(at(30), at(25), false, 1_200);
        assert!(controller.window() < usual, "the controller behind it decides");
    }
}
