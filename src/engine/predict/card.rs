//! The parts of a model card: how the heads did on the test rows.

use serde::{Deserialize, Serialize};

use super::forest::Score;

/// The latency head on the test rows of one class of paths.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassCard {
    /// `1 hop`, `2 hops` or `3+ hops`.
    pub class: String,
    /// Answered test rows of the class.
    pub rows: usize,
    /// This model.
    pub model: Score,
    /// The moving average on the same rows.
    pub moving_average: Score,
    /// The last value on the same rows.
    pub last_value: Score,
    /// The robust level on the same rows.
    pub level: Score,
    /// Share of rows inside the interval, 0 to 1.
    pub coverage: f64,
    /// Mean width of the interval, ln(ms).
    pub width_ln: f64,
}

/// The reliability head on the test rows, beside the share of probes delivered before: what one
/// would say without looking at the route.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReliabilityCard {
    /// Test rows, lost ones included.
    pub rows: usize,
    /// Lost probes among them.
    pub lost: usize,
    /// Mean squared error of the probability (Brier, 1950), 0 to 1; smaller is better.
    pub brier: f64,
    /// The same of the base rate.
    pub brier_base: f64,
    /// Mean negative log-likelihood (nats); smaller is better.
    pub log_loss: f64,
    /// The same of the base rate.
    pub log_loss_base: f64,
}

/// Fewest lost probes among the test rows before a reliability head may take part in decisions. A
/// guess: with fewer, one of them decides which is better.
pub const LOSSES_TEST_MIN: usize = 10;

impl ReliabilityCard {
    /// Whether the head may take part in decisions: it was measured on lost probes, and does better
    /// than the base rate.
    pub fn earns_its_place(&self) -> bool {
        self.lost >= LOSSES_TEST_MIN
            && self.brier < self.brier_base
            && self.log_loss < self.log_loss_base
    }
}

/// How the ranking rule was chosen: every rule of a grid was played over the choices between routes
/// that the calibration rows hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankingCard {
    /// Choices between two routes or more to the same end.
    pub choices: u32,
    /// Mean round trip of a choice by the rule that was there before (ms); 0 without choices.
    pub default_ms: f64,
    /// The same by the model's rule; equal where no other rule surely saved something.
    pub chosen_ms: f64,
}

/// The throughput head on the test rows whose bandwidth was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThroughputCard {
    /// Rows fitted on.
    pub rows_train: usize,
    /// Test rows.
    pub rows_test: usize,
    /// Factor that the leaves were multiplied by, 0 to 1; 0: the reference alone.
    pub shrink: f64,
    /// Root mean squared error of ln(bytes/s).
    pub rmse_ln: f64,
    /// The same of its reference alone.
    pub rmse_ln_reference: f64,
    /// The same of the last bandwidth that the same route had delivered, or the mean of the rows
    /// fitted on where it had delivered none; `None` in older files.
    #[serde(default)]
    pub rmse_ln_last: Option<f64>,
    /// Share of rows inside the interval, 0 to 1.
    pub coverage: f64,
    /// Mean width of the interval, ln(bytes/s).
    pub width_ln: f64,
}

impl ThroughputCard {
    /// Whether the head may take part in decisions: it was measured, and does at least as well as
    /// its reference and as the last value.
    pub fn earns_its_place(&self) -> bool {
        self.rows_test > 0
            && self.rmse_ln <= self.rmse_ln_reference
            && self.rmse_ln_last.is_none_or(|last| self.rmse_ln <= last)
    }
}
