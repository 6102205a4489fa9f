//! What would another model have chosen, and what would that have cost? Answered from this node's own
//! log, without letting the model decide.
//!
//! The judged policy takes, of the candidates that the log gave a chance ([`super::logged`]), the one of
//! the lowest pessimistic bound by the model's forecast alone, neither mixed with the baselines nor held
//! back by a margin. Only decisions later than everything that the model was fitted on count, so
//! that its forecasts can serve as the direct model.

use std::path::Path;

use serde::Serialize;

use super::compare::Named;
use super::logged::{Logged, Preference, logged_decisions};
use super::offpolicy::{Estimate, Estimates, judge, mean_cost};
use super::{LearnError, ModelRegistry};
use crate::engine::predict::{FeatureVector, Prediction, QualityModel};
use crate::store::{CandidateRow, Reader};

/// What a model's choices would have cost on logged decisions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judged {
    /// Version, or name of the baseline.
    pub version: String,
    /// When the first and the last of the decisions was made (µs since the epoch).
    pub from_us: u64,
    /// See `from_us`.
    pub to_us: u64,
    /// Mean round trip that the model's choices would have had (ms).
    pub estimates: Estimates,
    /// Mean round trip that the log's own choices had on the same decisions (ms).
    pub log: Estimate,
    /// Share of the decisions in which the model would have chosen as the log did.
    pub agreement: f64,
    /// Decisions left out: one candidate had all the probability.
    pub without_choice: usize,
    /// Decisions left out: no probe of the chosen route was answered in time.
    pub without_outcome: usize,
    /// Decisions left out: the model had no forecast for a candidate.
    pub without_preference: usize,
}

/// Judges a version, `champion`, `challenger`, `moving-average`, `last-value` or `level` on the decisions of
/// a store.
///
/// # Errors
/// [`LearnError::NotJudged`] when the log does not tell enough, and others when store or model cannot be
/// read.
pub fn judge_in_store(
    store_path: &Path,
    models_dir: &Path,
    name: &str,
) -> Result<Judged, LearnError> {
    let named = Named::find(&ModelRegistry::new(models_dir), name)?;
    let reader = Reader::open(store_path)?;
    let since_us = named.saw_to_us().saturating_add(1);
    let policy = |rows: &[CandidateRow]| Preference::lowest(rows, |row| ask(named.model(), row));
    let logged = logged_decisions(&reader, since_us, policy)?;
    let version = named.name().to_owned();
    let estimates = judge(&logged.decisions).map_err(|error| LearnError::NotJudged {
        version: version.clone(),
        why: format!("{}; {}", error, left_out(&logged)),
    })?;
    let agrees = logged.decisions.iter().filter(|decision| decision.target[decision.chosen] > 0.5);
    let (from_us, to_us) = logged.span_us.unwrap_or_default();
    Ok(Judged {
        version,
        from_us,
        to_us,
        estimates,
        log: mean_cost(&logged.decisions),
        agreement: agrees.count() as f64 / logged.decisions.len() as f64,
        without_choice: logged.without_choice,
        without_outcome: logged.without_outcome,
        without_preference: logged.without_preference,
    })
}

/// The forecast from what was known at the decision; `None` of rows under another feature schema.
pub(super) fn ask(model: &dyn QualityModel, row: &CandidateRow) -> Option<Prediction> {
    let features: FeatureVector = row.features.as_slice().try_into().ok()?;
    model.predict(&features).filter(Prediction::is_sane)
}

fn left_out(logged: &Logged) -> String {
    format!(
        "left out were {} decisions in which one route had all the probability, {} without an answered \
         probe after them and {} without a forecast",
        logged.without_choice, logged.without_outcome, logged.without_preference
    )
}
