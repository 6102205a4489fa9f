//! When to probe what: each target at its own interval, answers matched, silence timed out.
//!
//! A probe over one hop measures a link, a probe over a whole route measures the route; both are
//! the same datagram. New targets start at a random phase, so that probes do not travel in packs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::sample::ProbeKind;
use crate::engine::types::{Route, Timestamp};

/// Probes without an answer at one time; when there are more, the oldest counts as lost.
pub const OUTSTANDING_MAX: usize = 4_096;
/// Targets probed at one time; further ones wait until others are gone.
pub const TARGETS_MAX: usize = 1_024;

/// A probe on its way.
#[derive(Clone, Debug, PartialEq)]
pub struct Outstanding {
    /// Link or route.
    pub kind: ProbeKind,
    /// Where it went.
    pub route: Route,
    /// When it left.
    pub sent_at: Timestamp,
    deadline: Timestamp,
}

/// Schedules probes and matches answers.
#[derive(Clone, Debug, Default)]
pub struct Prober {
    next_id: u64,
    due: BTreeMap<(ProbeKind, Route), (Timestamp, Duration)>,
    outstanding: BTreeMap<u64, Outstanding>,
    deadlines: BTreeSet<(Timestamp, u64)>,
}

impl Prober {
    /// A prober whose ids begin at `first_id`, drawn at random so that nobody guesses them.
    pub fn new(first_id: u64) -> Self {
        Self { next_id: first_id, ..Self::default() }
    }

    /// Sets what is to be probed, at most [`TARGETS_MAX`] targets, and how often. Known targets keep their phase; `phase` is drawn
    /// for each new one, 0 to 1.
    pub fn set_targets(
        &mut self,
        targets: &BTreeMap<(ProbeKind, Route), Duration>,
        now: Timestamp,
        mut phase: impl FnMut() -> f64,
    ) {
        self.due.retain(|target, _| targets.contains_key(target));
        for (target, interval) in targets {
            match self.due.get_mut(target) {
                Some((due, old)) if old != interval => {
                    *old = *interval;
                    *due = (*due).min(now + *interval);
                }
                Some(_) => {}
                None => {
                    let first = now + interval.mul_f64(phase().clamp(0.0, 1.0));
                    self.due.insert(target.clone(), (first, *interval));
                }
            }
        }
    }

    /// Probes a target that was silent again at this time, if not before.
    pub fn again_by(&mut self, target: &(ProbeKind, Route), at: Timestamp) {
        if let Some((due, _)) = self.due.get_mut(target) {
            *due = (*due).min(at);
        }
    }

    /// The targets that are due now, each scheduled again.
    pub fn take_due(&mut self, now: Timestamp) -> Vec<(ProbeKind, Route)> {
        let mut taken = Vec::new();
        for (target, (due, interval)) in &mut self.due {
            if *due <= now {
                // From the schedule, not from now: lateness of one round is not passed on.
                *due = if *due + *interval > now { *due + *interval } else { now + *interval };
                taken.push(target.clone());
            }
        }
        taken
    }

    /// Notes that a probe leaves, and returns its id.
    pub fn sent(
        &mut self,
        kind: ProbeKind,
        route: Route,
        sent_at: Timestamp,
        timeout: Duration,
    ) -> u64 {
        self.next_id = self.next_id.wrapping_add(1);
        let deadline = sent_at + timeout;
        self.deadlines.insert((deadline, self.next_id));
        self.outstanding.insert(self.next_id, Outstanding { kind, route, sent_at, deadline });
        self.next_id
    }

    /// Matches an answer; `None` when it came too late, or nobody asked.
    pub fn answered(&mut self, id: u64) -> Option<Outstanding> {
        let probe = self.outstanding.remove(&id)?;
        self.deadlines.remove(&(probe.deadline, id));
        Some(probe)
    }

    /// Probes whose time is over, or that exceed [`OUTSTANDING_MAX`], oldest first, with their ids.
    pub fn take_lost(&mut self, now: Timestamp) -> Vec<(u64, Outstanding)> {
        let mut lost = Vec::new();
        while let Some((deadline, id)) = self.deadlines.first().copied() {
            if deadline > now && self.outstanding.len() <= OUTSTANDING_MAX {
                break;
            }
            self.deadlines.remove(&(deadline, id));
            lost.extend(self.outstanding.remove(&id).map(|probe| (id, probe)));
        }
        lost
    }

    /// When the next probe is due or lost.
    pub fn next_timeout(&self) -> Option<Timestamp> {
        let due = self.due.values().map(|(due, _)| *due).min();
        let lost = self.deadlines.first().map(|(deadline, _)| *deadline);
        due.into_iter().chain(lost).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::NodeId;

    fn target(byte: u8) -> (ProbeKind, Route) {
        (ProbeKind::Link, Route::new([NodeId([0; 8]), NodeId([byte; 8])]).unwrap())
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp(ms * 1_000)
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn targets_are_due_at_their_interval_and_keep_their_phase() {
        let mut prober = Prober::default();
        let targets = BTreeMap::from([(target(1), SECOND)]);
        prober.set_targets(&targets, at(0), || 0.5);
        assert_eq!(prober.next_timeout(), Some(at(500)));
        assert_eq!(prober.take_due(at(500)).len(), 1);
        assert!(prober.take_due(at(1_499)).is_empty());
        prober.set_targets(&targets, at(1_000), || 0.9);
        assert_eq!(prober.take_due(at(1_500)).len(), 1);
        prober.again_by(&target(1), at(1_700));
        prober.again_by(&target(1), at(1_900));
        prober.again_by(&target(2), at(1_700));
        assert_eq!(prober.next_timeout(), Some(at(1_700)), "sooner, not later");
        assert_eq!(prober.take_due(at(1_700)), [target(1)]);
        assert_eq!(prober.next_timeout(), Some(at(2_700)));
        prober.set_targets(&BTreeMap::new(), at(1_600), || 0.0);
        assert_eq!(prober.next_timeout(), None);
    }

    #[test]
    fn silence_is_a_loss_once() {
        let mut prober = Prober::default();
        let (kind, route) = target(1);
        let lost = prober.sent(kind, route.clone(), at(0), SECOND);
        let answered = prober.sent(kind, route, at(0), SECOND);
        assert!(prober.answered(answered).is_some());
        assert!(prober.answered(answered).is_none(), "only once");
        assert!(prober.take_lost(at(999)).is_empty());
        assert_eq!(prober.take_lost(at(1_000)).len(), 1);
        assert!(prober.answered(lost).is_none(), "too late");
        assert_eq!(prober.next_timeout(), None);
    }

    #[test]
    fn outstanding_probes_are_bounded() {
        let mut prober = Prober::default();
        let (kind, route) = target(1);
        for _ in 0..OUTSTANDING_MAX + 2 {
            prober.sent(kind, route.clone(), at(0), SECOND);
        }
        assert_eq!(prober.take_lost(at(0)).len(), 2);
    }
}
