//! Whether the route in use still delivers, by what is sent over it anyway.
//!
//! The node that opened a tunnel asks the far end for receipts: with a datagram of the tunnel's own
//! at most every [`ASK_GAP`], and with a beat every [`BEAT`] while there is nothing to send and the
//! tunnel is in use. An answer settles its question and all before it. A question is overdue after
//! the smoothed round-trip time and four deviations of it (RFC 6298, section 2); from then on beats
//! follow each other by [`ASK_GAP`]. The route is silent when [`SILENT_ASKS`] questions are open and
//! the oldest is [`GRACE`] more than overdue.
//!
//! Who was late itself says nothing about the route: a driver that calls [`RouteWatch::due`] much
//! later than [`RouteWatch::next_timeout`] first gets time to read what waits for it. A move that
//! proves wrong makes the watch more patient.
//!
//! Pure: time is an argument, and the sequence numbers are those of the datagrams.

use std::collections::VecDeque;
use std::time::Duration;

use crate::engine::types::Timestamp;

/// Shortest time between two questions.
pub const ASK_GAP: Duration = Duration::from_millis(20);
/// Time between two questions while there is nothing to send.
pub const BEAT: Duration = Duration::from_millis(100);
/// How long after the last packet a tunnel counts as in use.
pub const IN_USE: Duration = Duration::from_secs(10);
/// Open questions that make a silence: at 1 % loss, one false alarm in a million.
pub const SILENT_ASKS: usize = 3;
/// How much longer than overdue the oldest question must be open: two further questions.
pub const GRACE: Duration = Duration::from_millis(40);
/// Shortest time until a question is overdue: a busy machine answers within it. A guess.
const PATIENCE_MIN: Duration = Duration::from_millis(40);
/// Longest time until a question is overdue.
const PATIENCE_MAX: Duration = Duration::from_secs(1);
/// The same while no round-trip time of the route is known: with [`GRACE`] three beats.
const PATIENCE_UNKNOWN: Duration = Duration::from_millis(260);
/// Added to what the round-trip times say: granularity of timers and of the scheduler.
const PATIENCE_SLACK: Duration = Duration::from_millis(10);
/// Open questions that are remembered: at [`ASK_GAP`] more than [`PATIENCE_MAX`].
const ASKS_MAX: usize = 64;
/// Lateness of the driver beyond which it is to read first, and for how long.
const LATE: Duration = Duration::from_millis(15);
/// See [`LATE`].
const READ_FIRST: Duration = Duration::from_millis(30);
/// How long after a move an answer over the route that was left proves it wrong.
const WRONG_WITHIN: Duration = Duration::from_secs(1);
/// Largest factor on the patience.
const FACTOR_MAX: f64 = 4.0;
/// How long until the factor is halved.
const FACTOR_HALVES: Duration = Duration::from_secs(10);

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// A beat is to be sent, and noted with [`RouteWatch::beat`].
    Beat,
    /// The route is silent. Said once, until something is answered or the route changes.
    Silent,
}

/// Watches one tunnel of this node. See the module documentation for the rule.
#[derive(Clone, Debug)]
pub struct RouteWatch {
    used_at: Option<Timestamp>,
    /// Open questions, oldest first.
    asks: VecDeque<(u64, Timestamp)>,
    asked_at: Option<Timestamp>,
    /// Smoothed round-trip time and its deviation (µs).
    rtt_us: Option<(f64, f64)>,
    factor: f64,
    factor_at: Timestamp,
    read_until: Timestamp,
    silent: bool,
    left_at: Option<Timestamp>,
}

impl Default for RouteWatch {
    fn default() -> Self {
        Self {
            used_at: None,
            asks: VecDeque::new(),
            asked_at: None,
            rtt_us: None,
            factor: 1.0,
            factor_at: Timestamp::default(),
            read_until: Timestamp::default(),
            silent: false,
            left_at: None,
        }
    }
}

impl RouteWatch {
    /// The tunnel takes another route: nothing is open, and its round-trip time is not known.
    pub fn moved(&mut self, now: Timestamp) {
        self.left_at = self.silent.then_some(now);
        self.asks.clear();
        self.asked_at = None;
        self.rtt_us = None;
        self.silent = false;
    }

    /// A packet leaves. Returns whether it is to ask for a receipt.
    pub fn sent(&mut self, sequence: u64, now: Timestamp) -> bool {
        self.used_at = Some(now);
        let asks = self.asked_at.is_none_or(|at| now.since(at) >= ASK_GAP);
        if asks {
            self.beat(sequence, now);
        }
        asks
    }

    /// A beat leaves; it always asks.
    pub fn beat(&mut self, sequence: u64, now: Timestamp) {
        self.asked_at = Some(now);
        if self.asks.len() >= ASKS_MAX {
            // The oldest says how long it has been.
            self.asks.remove(1);
        }
        self.asks.push_back((sequence, now));
    }

    /// A packet of the far end arrived: the tunnel is in use.
    pub fn heard(&mut self, now: Timestamp) {
        self.used_at = Some(now);
    }

    /// The question with this sequence number was answered. Returns its round-trip time (µs);
    /// `None` when it was not open.
    pub fn receipt(&mut self, asked: u64, now: Timestamp) -> Option<u64> {
        let at = self.asks.iter().position(|(sequence, _)| *sequence == asked)?;
        let (_, sent_at) = self.asks.drain(..=at).next_back()?;
        self.silent = false;
        let rtt_us = now.since(sent_at).as_micros() as u64;
        let measured = rtt_us as f64;
        self.rtt_us = Some(match self.rtt_us {
            None => (measured, measured / 2.0),
            Some((smoothed, deviation)) => {
                let off = (smoothed - measured).abs();
                (smoothed * 7.0 / 8.0 + measured / 8.0, deviation * 3.0 / 4.0 + off / 4.0)
            }
        });
        Some(rtt_us)
    }

    /// An answer arrived over a route that was left. Returns whether leaving it was wrong; then the
    /// watch is more patient for a while.
    pub fn answered_late(&mut self, now: Timestamp) -> bool {
        let wrong = self.left_at.is_some_and(|at| now.since(at) <= WRONG_WITHIN);
        if wrong {
            self.left_at = None;
            self.factor = (self.factor_at(now) * 2.0).min(FACTOR_MAX);
            self.factor_at = now;
        }
        wrong
    }

    /// Smoothed round-trip time of the route (µs); `None` before the first receipt.
    pub fn rtt_us(&self) -> Option<u64> {
        self.rtt_us.map(|(smoothed, _)| smoothed as u64)
    }

    /// Whether packets travelled within [`IN_USE`].
    pub fn is_in_use(&self, now: Timestamp) -> bool {
        self.used_at.is_some_and(|at| now.since(at) < IN_USE)
    }

    /// What is due at `now`.
    pub fn due(&mut self, now: Timestamp) -> Option<Due> {
        if !self.is_in_use(now) {
            self.asks.clear();
            self.silent = false;
            return None;
        }
        let due_at = self.next_timeout(now)?;
        if now < due_at {
            return None;
        }
        if now > due_at + LATE {
            self.read_until = now + READ_FIRST;
        }
        if self.silent_at(now).is_some_and(|at| at <= now) {
            self.silent = true;
            return Some(Due::Silent);
        }
        (self.beat_at(now) <= now).then_some(Due::Beat)
    }

    /// When [`RouteWatch::due`] wants to be called; `None` while the tunnel is not in use.
    pub fn next_timeout(&self, now: Timestamp) -> Option<Timestamp> {
        let beat_at = self.is_in_use(now).then(|| self.beat_at(now))?;
        Some(self.silent_at(now).map_or(beat_at, |at| at.min(beat_at)))
    }

    fn beat_at(&self, now: Timestamp) -> Timestamp {
        let Some(asked_at) = self.asked_at else { return now };
        let regular = asked_at + BEAT;
        match self.asks.front() {
            Some((_, oldest)) if !self.silent => {
                let hurried = (*oldest + self.patience(now)).max(asked_at + ASK_GAP);
                hurried.min(regular)
            }
            _ => regular,
        }
    }

    fn silent_at(&self, now: Timestamp) -> Option<Timestamp> {
        if self.silent || self.asks.len() < SILENT_ASKS {
            return None;
        }
        let (_, oldest) = self.asks.front()?;
        Some((*oldest + self.patience(now) + GRACE).max(self.read_until))
    }

    fn patience(&self, now: Timestamp) -> Duration {
        let known = self.rtt_us.map(|(smoothed, deviation)| {
            Duration::from_micros((smoothed + 4.0 * deviation) as u64) + PATIENCE_SLACK
        });
        let patience = known.map_or(PATIENCE_UNKNOWN, |known| known.max(PATIENCE_MIN));
        patience.min(PATIENCE_MAX).mul_f64(self.factor_at(now))
    }

    fn factor_at(&self, now: Timestamp) -> f64 {
        let halvings = now.since(self.factor_at).as_secs_f64() / FACTOR_HALVES.as_secs_f64();
        (self.factor * 0.5f64.powi(halvings as i32)).max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START_MS: u64 = 1_000_000;

    fn at(ms: u64) -> Timestamp {
        Timestamp((START_MS + ms) * 1_000)
    }

    /// A route with this round-trip time that answers until `cut_ms`. Data every `data_ms` for
    /// `until_ms`; returns when silence was noticed (ms) and the watch.
    fn run(
        rtt_ms: u64,
        data_ms: Option<u64>,
        cut_ms: u64,
        until_ms: u64,
    ) -> (Option<u64>, RouteWatch) {
        let mut watch = RouteWatch::default();
        let mut answers = VecDeque::new();
        let mut sequence = 0;
        watch.heard(at(0));
        for now in 0..until_ms {
            while answers.front().is_some_and(|(_, back)| *back <= now) {
                let (asked, _) = answers.pop_front().unwrap();
                watch.receipt(asked, at(now)).unwrap();
            }
            let mut asked = false;
            if data_ms.is_some_and(|every| now % every == 0) {
                sequence += 1;
                asked = watch.sent(sequence, at(now));
            }
            match watch.due(at(now)) {
                Some(Due::Beat) => {
                    sequence += 1;
                    watch.beat(sequence, at(now));
                    asked = true;
                }
                Some(Due::Silent) => return (Some(now), watch),
                None => {}
            }
            if asked && now + rtt_ms / 2 < cut_ms {
                answers.push_back((sequence, now + rtt_ms));
            }
        }
        (None, watch)
    }

    #[test]
    fn a_route_that_answers_is_never_silent() {
        for rtt_ms in [1, 20, 60, 250] {
            for data_ms in [Some(1), Some(7), Some(50), Some(130)] {
                let (silent, watch) = run(rtt_ms, data_ms, u64::MAX, 8_000);
                assert_eq!(silent, None, "{rtt_ms} {data_ms:?}");
                assert!(watch.rtt_us().unwrap().abs_diff(rtt_ms * 1_000) <= 1_000);
            }
        }
    }

    #[test]
    fn a_silence_is_noticed_within_three_beats_whatever_is_sent() {
        for data_ms in [Some(1), Some(50), None] {
            let (silent, _) = run(60, data_ms, 5_000, 9_000);
            let after = silent.unwrap() - 5_000;
            assert!((60..=300).contains(&after), "{data_ms:?} {after}");
        }
        let (silent, _) = run(60, Some(1), 0, 9_000);
        assert!((290..=310).contains(&silent.unwrap()), "nothing known: {silent:?}");
    }

    #[test]
    fn an_idle_tunnel_is_left_alone() {
        let (silent, mut watch) = run(20, None, u64::MAX, 9_900);
        assert_eq!(silent, None);
        let idle = at(10_050);
        assert_eq!((watch.due(idle), watch.next_timeout(idle)), (None, None));
        assert!(watch.sent(900, at(20_000)), "the next packet asks again");
    }

    #[test]
    fn questions_are_as_far_apart_as_they_have_to_be() {
        let mut watch = RouteWatch::default();
        let asked = (0..100).filter(|ms| watch.sent(*ms, at(*ms))).count();
        assert_eq!(asked, 5);
    }

    #[test]
    fn one_answer_settles_what_was_asked_before_and_only_once() {
        let mut watch = RouteWatch::default();
        for ask in 0..4 {
            watch.sent(ask, at(ask * 20));
        }
        assert_eq!(watch.receipt(2, at(90)), Some(50_000));
        assert_eq!(watch.receipt(2, at(95)), None, "replayed");
        assert_eq!(watch.receipt(1, at(95)), None, "overtaken");
        assert_eq!(watch.asks.len(), 1);
        assert_eq!(watch.receipt(77, at(95)), None, "never asked");
    }

    #[test]
    fn a_driver_that_was_late_reads_first() {
        let (_, mut watch) = run(20, Some(10), u64::MAX, 2_000);
        let last = at(2_600);
        for ask in 0..4 {
            watch.beat(10_000 + ask, at(2_000 + ask));
        }
        assert_ne!(watch.due(last), Some(Due::Silent), "it slept for half a second");
        watch.receipt(10_003, at(2_605)).unwrap();
        assert_ne!(watch.due(at(2_640)), Some(Due::Silent));
    }

    #[test]
    fn a_move_that_was_wrong_makes_patient_for_a_while() {
        let (silent, mut watch) = run(60, Some(10), 2_000, 4_000);
        let now = at(silent.unwrap());
        let before = watch.patience(now);
        watch.moved(now);
        assert!(watch.answered_late(now + Duration::from_millis(30)));
        assert!(!watch.answered_late(now + Duration::from_millis(31)), "once");
        assert_eq!(watch.factor_at(now + Duration::from_millis(40)), 2.0);
        assert_eq!(watch.factor_at(now + 3 * FACTOR_HALVES), 1.0);
        watch.rtt_us = Some((1_000.0, 0.0));
        assert_eq!(watch.patience(now + Duration::from_millis(40)), 2 * PATIENCE_MIN);
        assert!(before > PATIENCE_MIN);
        watch.moved(now);
        assert!(!watch.answered_late(now), "it was not left for its silence");
    }

    #[test]
    fn open_questions_are_bounded_and_the_oldest_is_kept() {
        let mut watch = RouteWatch::default();
        for ask in 0..1_000 {
            watch.beat(ask, at(ask));
        }
        assert_eq!((watch.asks.len(), watch.asks[0].0), (ASKS_MAX, 0));
    }
}
