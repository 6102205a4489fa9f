//! The watch over the model that decides: is it still better than the moving average?
//!
//! When a route probe leaves, the forecasts of its round trip are kept; when it comes back, the
//! absolute error of ln(ms) of each enters an exponentially weighted mean, the model's and the
//! moving average's over the same probes. The error is that of the logarithm because a forecast is
//! good when it is within a share of the truth, on a short route as on a long one; but one of less than
//! [`NOTICED_MS`] counts as none: such errors are those of the processors, as between nodes of one
//! machine, and nobody notices them. A probe that was lost says nothing about latency and is left out.
//!
//! The model is *worse* when, over at least [`PROBES_MIN`] probes, its mean exceeds the moving
//! average's by more than the slack. A forecast that is missing or absurd costs what the moving
//! average's costs and [`FAILURE_LN`] more, so that a model that never predicts is found out too.
//!
//! Beside that, [`Adwin`] looks for a change in the mean of the model's residuals, which is a
//! reason to train again, whether or not the model is still better.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::drift::Adwin;
use super::model::ln_error;
use crate::engine::measure::prober::OUTSTANDING_MAX;
use crate::engine::types::Timestamp;

/// Probes before the watch says anything: half a minute of a tunnel with 8 candidates, over which
/// the mean of errors that scatter by 10 % is known to 1 %.
pub const PROBES_MIN: u64 = 300;
/// Probes after which a loss weighs 1/e. A guess: a minute of a tunnel with 8 candidates.
pub const MEMORY_PROBES: u64 = 600;
/// Share of the moving average's loss by which the model's may exceed it.
pub const SLACK_SHARE: f64 = 0.1;
/// And by this much in any case, ln(ms): half a per cent.
pub const SLACK_LN: f64 = 0.005;
/// Extra loss of a forecast that is missing or absurd: that of an error by the factor e.
pub const FAILURE_LN: f64 = 1.0;

/// Least error of a forecast that counts (ms). A guess.
pub const NOTICED_MS: f64 = 0.5;

/// A forecast (ms); `None` when it was missing or absurd.
pub type Opinion = Option<f64>;

/// Rolling losses of a model and of the moving average over the same completed route probes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LiveLoss {
    /// Probes so far.
    pub probes: u64,
    /// Forecasts of the model among them that were missing or absurd.
    pub failures: u64,
    /// The model's weighted mean absolute error of ln(ms), errors below [`NOTICED_MS`] as 0.
    pub model_ln: f64,
    /// The moving average's.
    pub moving_average_ln: f64,
}

impl LiveLoss {
    fn add(&mut self, model: Opinion, moving_average_ms: f64, truth_ms: f64) {
        let error = |ms: f64| match (ms - truth_ms).abs() < NOTICED_MS {
            true => 0.0,
            false => ln_error(ms, truth_ms).abs(),
        };
        let average = error(moving_average_ms);
        let loss = model.map_or(average + FAILURE_LN, error);
        self.probes += 1;
        self.failures += u64::from(model.is_none());
        // The plain mean at first: no loss weighs more because it came early.
        let weight = 1.0 / self.probes.min(MEMORY_PROBES) as f64;
        self.model_ln += weight * (loss - self.model_ln);
        self.moving_average_ln += weight * (average - self.moving_average_ln);
    }

    /// Whether the model has done worse than the moving average, by more than the slack and over
    /// enough probes.
    pub fn is_worse(&self) -> bool {
        let allowed = self.moving_average_ln * (1.0 + SLACK_SHARE) + SLACK_LN;
        self.probes >= PROBES_MIN && self.model_ln > allowed
    }
}

/// Forecasts of one probe that is on its way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expected {
    /// The moving average's (ms).
    pub moving_average_ms: f64,
    /// That of the model that decides; `None` when there is none.
    pub champion: Option<Opinion>,
    /// That of the model in shadow; `None` when there is none.
    pub challenger: Option<Opinion>,
}

/// What the watch found out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alarm {
    /// The model that decides does worse than the moving average.
    Worse(LiveLoss),
    /// The mean of its residuals has changed.
    Drift,
}

/// Sets outcomes beside what was expected.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    waiting: BTreeMap<Timestamp, Expected>,
    champion: LiveLoss,
    challenger: LiveLoss,
    residuals: Adwin,
    drifts: u64,
    drifted_at: Option<Timestamp>,
}

impl Watch {
    /// Another model decides from now on: what the one before did is no longer of interest.
    pub fn champion_replaced(&mut self) {
        self.waiting.clear();
        self.champion = LiveLoss::default();
        self.residuals = Adwin::default();
    }

    /// Another model is in shadow from now on.
    pub fn challenger_replaced(&mut self) {
        self.waiting.clear();
        self.challenger = LiveLoss::default();
    }

    /// A route probe left at `sent_at`, which no other probe of this node did.
    pub fn sent(&mut self, sent_at: Timestamp, expected: Expected) {
        if self.waiting.len() >= OUTSTANDING_MAX {
            self.waiting.pop_first();
        }
        self.waiting.insert(sent_at, expected);
    }

    /// A route probe that left at `sent_at` came back at `now` after `rtt_us`, or was lost.
    pub fn completed(
        &mut self,
        sent_at: Timestamp,
        rtt_us: Option<u64>,
        now: Timestamp,
    ) -> Option<Alarm> {
        let expected = self.waiting.remove(&sent_at)?;
        let truth_ms = rtt_us? as f64 / 1e3;
        if let Some(challenger) = expected.challenger {
            self.challenger.add(challenger, expected.moving_average_ms, truth_ms);
        }
        let champion = expected.champion?;
        self.champion.add(champion, expected.moving_average_ms, truth_ms);
        if self.champion.is_worse() {
            return Some(Alarm::Worse(self.champion));
        }
        if champion.is_some_and(|ms| self.residuals.push(-ln_error(ms, truth_ms))) {
            self.drifts += 1;
            self.drifted_at = Some(now);
            return Some(Alarm::Drift);
        }
        None
    }

    /// The model that decides beside the moving average.
    pub fn champion(&self) -> LiveLoss {
        self.champion
    }

    /// The model in shadow beside the moving average.
    pub fn challenger(&self) -> LiveLoss {
        self.challenger
    }

    /// How often the residuals drifted since the start, and when last.
    pub fn drifts(&self) -> (u64, Option<Timestamp>) {
        (self.drifts, self.drifted_at)
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    /// The first alarm within `probes` probes of about 50 ms, and the probe at which it came. The
    /// moving average is off by up to 10 %; the model says what `model` makes of truth and index.
    fn first_alarm(
        probes: u64,
        mut model: impl FnMut(f64, u64, &mut Pcg64Mcg) -> Opinion,
    ) -> Option<(u64, Alarm)> {
        let mut random = Pcg64Mcg::seed_from_u64(5);
        let mut watch = Watch::default();
        (1..=probes).find_map(|index| {
            let truth_ms = random.random_range(40.0..60.0);
            let expected = Expected {
                moving_average_ms: truth_ms * random.random_range(0.9..1.1),
                champion: Some(model(truth_ms, index, &mut random)),
                challenger: None,
            };
            let at = Timestamp(index * 10);
            watch.sent(at, expected);
            let alarm = watch.completed(at, Some((truth_ms * 1e3) as u64), Timestamp(at.0 + 1));
            alarm.map(|alarm| (index, alarm))
        })
    }

    fn worse(found: Option<(u64, Alarm)>) -> Option<u64> {
        found.filter(|(_, alarm)| matches!(alarm, Alarm::Worse(_))).map(|(index, _)| index)
    }

    #[test]
    fn a_model_that_is_better_or_as_good_stays() {
        let better =
            |truth: f64, _, random: &mut Pcg64Mcg| Some(truth * random.random_range(0.95..1.05));
        assert_eq!(first_alarm(20_000, better), None);
        let as_good =
            |truth: f64, _, random: &mut Pcg64Mcg| Some(truth * random.random_range(0.9..1.1));
        assert_eq!(first_alarm(20_000, as_good), None);
    }

    #[test]
    fn a_model_that_is_worse_is_found_out_at_the_earliest_moment_allowed() {
        let worse_by_far = |truth: f64, _, _: &mut Pcg64Mcg| Some(truth * 1.3);
        assert_eq!(worse(first_alarm(20_000, worse_by_far)), Some(PROBES_MIN));
        let a_little_worse =
            |truth: f64, _, random: &mut Pcg64Mcg| Some(truth * random.random_range(0.8..1.2));
        assert_eq!(worse(first_alarm(20_000, a_little_worse)), Some(PROBES_MIN));
    }

    #[test]
    fn between_nodes_of_one_machine_no_error_is_noticed() {
        let worse_within = |truth_ms: f64| {
            let mut loss = LiveLoss::default();
            for _ in 0..PROBES_MIN {
                loss.add(Some(2.0 * truth_ms), truth_ms, truth_ms);
            }
            loss.is_worse()
        };
        assert!(!worse_within(0.4));
        assert!(worse_within(0.6));
    }

    #[test]
    fn a_model_that_never_predicts_or_is_absurd_is_found_out() {
        let found = first_alarm(20_000, |_, _, _| None);
        assert_eq!(worse(found), Some(PROBES_MIN));
        let Some((_, Alarm::Worse(loss))) = found else { panic!("{found:?}") };
        assert_eq!(loss.failures, PROBES_MIN);
        let mostly_silent =
            |truth, index: u64, _: &mut Pcg64Mcg| index.is_multiple_of(2).then_some(truth);
        assert_eq!(worse(first_alarm(20_000, mostly_silent)), Some(PROBES_MIN));
    }

    #[test]
    fn a_good_model_that_turns_bad_is_found_out_within_its_memory() {
        let turning = |truth: f64, index: u64, random: &mut Pcg64Mcg| {
            let off = if index > 5_000 { 1.25 } else { 1.0 };
            Some(truth * off * random.random_range(0.97..1.03))
        };
        let mut random = Pcg64Mcg::seed_from_u64(6);
        let mut watch = Watch::default();
        let mut drift_at = None;
        let found = (1..=10_000_u64).find(|index| {
            let truth_ms = random.random_range(40.0..60.0);
            let expected = Expected {
                moving_average_ms: truth_ms * random.random_range(0.9..1.1),
                champion: Some(turning(truth_ms, *index, &mut random)),
                challenger: None,
            };
            watch.sent(Timestamp(*index), expected);
            let rtt_us = Some((truth_ms * 1e3) as u64);
            match watch.completed(Timestamp(*index), rtt_us, Timestamp(*index)) {
                Some(Alarm::Worse(_)) => true,
                Some(Alarm::Drift) => {
                    drift_at.get_or_insert(*index);
                    false
                }
                None => false,
            }
        });
        let found = found.expect("it is found");
        assert!((5_001..=5_000 + MEMORY_PROBES).contains(&found), "{found}");
        let drift_at = drift_at.expect("the drift is noticed first");
        assert!((5_001..found).contains(&drift_at), "{drift_at}");
        let (alarms, last) = watch.drifts();
        assert!(alarms >= 1 && last >= Some(Timestamp(drift_at)));
    }

    #[test]
    fn lost_probes_and_unknown_ones_say_nothing_and_what_waits_is_bounded() {
        let mut watch = Watch::default();
        let expected =
            Expected { moving_average_ms: 10.0, champion: Some(None), challenger: Some(None) };
        watch.sent(Timestamp(1), expected);
        assert_eq!(watch.completed(Timestamp(1), None, Timestamp(2)), None);
        assert_eq!(watch.completed(Timestamp(1), Some(10), Timestamp(2)), None);
        assert_eq!((watch.champion().probes, watch.challenger().probes), (0, 0));
        for at in 0..2 * OUTSTANDING_MAX as u64 {
            watch.sent(Timestamp(at), expected);
        }
        assert_eq!(watch.waiting.len(), OUTSTANDING_MAX);
        watch.champion_replaced();
        assert!(watch.waiting.is_empty());
    }
}
