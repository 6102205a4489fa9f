//! When to leave a route: damped for what is merely better, at once for what is dead. One that has turned
//! bad is kept half as long: with the time to notice it, it is left within 2 s.

use std::time::Duration;

use crate::engine::types::Timestamp;

/// Time in use from which the margin shrinks. A guess: 30 regular decisions.
pub const SETTLED: Duration = Duration::from_secs(60);
/// What is left of it in the end: 0.5 % of the score, more than a jitter of 2 ms moves it on a route of 60 ms.
pub const SETTLED_SHARE: f64 = 0.25;

/// How much better a route must be, and how long a choice is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SwitchingPolicy {
    /// Relative gain in score below which the current route stays. 0.02 is about 12 ms on a
    /// three-hop route of 60 ms; jitter of 2 ms moves the score by a fifth of it.
    pub margin: f64,
    /// Shortest time between two voluntary changes.
    pub hold: Duration,
}

impl Default for SwitchingPolicy {
    fn default() -> Self {
        Self { margin: 0.02, hold: Duration::from_secs(2) }
    }
}

/// Why a decision came out as it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There was no route before.
    First,
    /// The best candidate is better by more than the margin.
    Better,
    /// The current route is dead or gone; damping does not apply.
    CurrentDead,
    /// The current route is the best one.
    Best,
    /// Another is better, but not by the margin.
    WithinMargin,
    /// Another is better by the margin, but the last change is too recent.
    Held,
    /// Another is better by the margin, but many of the node's tunnels have just moved.
    Capped,
    /// The current route has refused the bandwidth that is to be set aside: the next one is asked.
    Refused,
    /// The current route is kept, and another one that is nearly as good was drawn to be tried until the
    /// next decision.
    Explored,
    /// The operator fixed the path.
    Forced,
    /// No candidate is alive; or, for one of several paths that has no route yet, none but those of
    /// the others.
    NoRoute,
}

impl Reason {
    /// The name used in the store and in `--json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Better => "better",
            Self::CurrentDead => "current-dead",
            Self::Best => "best",
            Self::WithinMargin => "within-margin",
            Self::Held => "held",
            Self::Capped => "capped",
            Self::Refused => "refused",
            Self::Explored => "explored",
            Self::Forced => "forced",
            Self::NoRoute => "no-route",
        }
    }
}

/// The current route as the policy sees it.
#[derive(Clone, Copy, Debug)]
pub struct Current {
    /// Its score now; `None` when it is dead or no longer a candidate.
    pub score: Option<f64>,
    /// When it was chosen.
    pub since: Timestamp,
    /// It is much worse than when it was decided for.
    pub turned_bad: bool,
}

impl SwitchingPolicy {
    /// The margin for a route that has been in use for so long: the whole one within [`SETTLED`], then
    /// less and less, down to [`SETTLED_SHARE`] of it. It is there against flapping, and who moves every few
    /// minutes for what is better does not flap.
    pub fn margin_after(&self, in_use: Duration) -> f64 {
        let share = SETTLED.as_secs_f64() / in_use.max(SETTLED).as_secs_f64();
        self.margin * share.max(SETTLED_SHARE)
    }

    /// Shortest time between a change and a voluntary one, of a route that has turned bad or not.
    pub fn kept_for(&self, turned_bad: bool) -> Duration {
        if turned_bad { self.hold / 2 } else { self.hold }
    }

    /// Whether to move to the best candidate, and why. `best_is_current` says that they are one.
    pub fn decide(
        &self,
        current: Option<Current>,
        best_score: Option<f64>,
        best_is_current: bool,
        now: Timestamp,
    ) -> (bool, Reason) {
        let Some(best_score) = best_score else { return (false, Reason::NoRoute) };
        let Some(current) = current else { return (true, Reason::First) };
        let Some(score) = current.score else { return (true, Reason::CurrentDead) };
        if best_is_current {
            (false, Reason::Best)
        } else if best_score <= score * (1.0 + self.margin_after(now.since(current.since))) {
            (false, Reason::WithinMargin)
        } else if now.since(current.since) < self.kept_for(current.turned_bad) {
            (false, Reason::Held)
        } else {
            (true, Reason::Better)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATE: Timestamp = Timestamp(10_000_000);

    fn current(score: Option<f64>) -> Option<Current> {
        Some(Current { score, since: Timestamp(0), turned_bad: false })
    }

    #[test]
    fn damping_holds_what_is_merely_better_and_never_what_is_dead() {
        let policy = SwitchingPolicy::default();
        let decide = |current, best, same, now| policy.decide(current, best, same, now);
        assert_eq!(decide(None, None, false, LATE), (false, Reason::NoRoute));
        assert_eq!(decide(None, Some(0.5), false, LATE), (true, Reason::First));
        assert_eq!(decide(current(Some(0.5)), Some(0.5), true, LATE), (false, Reason::Best));
        let small = decide(current(Some(0.5)), Some(0.505), false, LATE);
        assert_eq!(small, (false, Reason::WithinMargin));
        assert_eq!(decide(current(Some(0.5)), Some(0.6), false, LATE), (true, Reason::Better));
        let settled = Timestamp(1_800_000_000);
        assert_eq!(decide(current(Some(0.5)), Some(0.505), false, settled), (true, Reason::Better));
        let hardly = decide(current(Some(0.5)), Some(0.502), false, Timestamp(u64::MAX));
        assert_eq!(hardly, (false, Reason::WithinMargin));
        let early = Timestamp(1_000_000);
        assert_eq!(decide(current(Some(0.5)), Some(0.6), false, early), (false, Reason::Held));
        assert_eq!(decide(current(None), Some(0.1), false, early), (true, Reason::CurrentDead));
        let bad = current(Some(0.5)).map(|current| Current { turned_bad: true, ..current });
        assert_eq!(decide(bad, Some(0.6), false, early), (true, Reason::Better));
        let sooner = Timestamp(900_000);
        assert_eq!(decide(bad, Some(0.6), false, sooner), (false, Reason::Held));
    }
}
