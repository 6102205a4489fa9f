//! Decisions that can be judged afterwards, and what is kept for it.
//!
//! The features of the candidates are most of a decision, 3 kB each, and a tunnel is decided every few
//! seconds: with all of them, an idle tunnel would fill a gigabyte in a day. Judging and choosing a rule
//! need decisions that lie [`FEATURES_APART`] from each other, so that only those keep them. Which those
//! are depends on the times alone, never on what was chosen, or judging would be biased.

use std::time::Duration;

use rusqlite::{Connection, Row, params};

use super::reader::{signed, unsigned};
use super::{DecisionRow, Reader, StoreError};
use crate::engine::route::{Decision, Reason};

/// The columns of `decision`, as [`header`] reads them.
pub(super) const COLUMNS: &str = "id, at_us, tunnel, destination, reason, changed, model_version,
                                  decision.propensity, chosen_route, calculation_us,
                                  challenger_version";

/// Of each destination, so far apart are the decisions that keep their features, at least.
pub const FEATURES_APART: Duration = Duration::from_secs(10);

/// Had a choice and made one: neither forced nor without any route.
const CHOSE: &str =
    "tunnel IS NOT NULL AND chosen_route IS NOT NULL AND reason NOT IN ('forced', 'no-route')";
const HAS_FEATURES: &str =
    "EXISTS (SELECT 1 FROM candidate WHERE decision_id = decision.id AND features <> '[]')";

/// Whether a decision that is not stored yet is to keep its features.
pub(super) fn keeps_features(
    connection: &Connection,
    decision: &Decision,
) -> rusqlite::Result<bool> {
    let chose = decision.tunnel.is_some()
        && decision.chosen.is_some()
        && !matches!(decision.reason, Reason::Forced | Reason::NoRoute);
    if !chose {
        return Ok(false);
    }
    let sql = format!(
        "SELECT NOT EXISTS (SELECT 1 FROM decision WHERE at_us > ?1 AND at_us <= ?2
         AND destination = ?3 AND {CHOSE} AND {HAS_FEATURES})"
    );
    let at_us = signed(decision.at.as_micros());
    let from_us = at_us.saturating_sub(FEATURES_APART.as_micros() as i64);
    let mut statement = connection.prepare_cached(&sql)?;
    let destination = decision.destination.to_string();
    statement.query_row(params![from_us, at_us, destination], |row| row.get(0))
}

impl Reader {
    /// Decisions for a tunnel, made at `since_us` (µs since the epoch) or later, that had a choice
    /// and made one: neither forced nor without any route, and that kept their features. Of each
    /// destination, whose tunnels share the probes of its routes, those that are at least `apart_us`
    /// after the one before. With their candidates, in order of time.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn decisions_apart(
        &self,
        since_us: u64,
        apart_us: u64,
    ) -> Result<Vec<DecisionRow>, StoreError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM decision WHERE at_us >= ?1 AND {CHOSE} AND {HAS_FEATURES}
             ORDER BY at_us, id"
        );
        let mut decisions = self.rows(&sql, [signed(since_us)], header)?;
        let mut kept_us = std::collections::BTreeMap::new();
        decisions.retain(|decision| {
            let due = kept_us
                .get(&decision.destination)
                .is_none_or(|last| decision.at_us.saturating_sub(*last) >= apart_us);
            if due {
                kept_us.insert(decision.destination.clone(), decision.at_us);
            }
            due
        });
        self.with_candidates(decisions)
    }

    /// Reads the candidates of each decision.
    pub(super) fn with_candidates(
        &self,
        mut decisions: Vec<DecisionRow>,
    ) -> Result<Vec<DecisionRow>, StoreError> {
        for decision in &mut decisions {
            decision.candidates = self.candidates(decision.id)?;
        }
        Ok(decisions)
    }
}

/// A decision without its candidates, from [`COLUMNS`].
pub(super) fn header(row: &Row<'_>) -> rusqlite::Result<DecisionRow> {
    Ok(DecisionRow {
        id: row.get(0)?,
        at_us: unsigned(row, 1)?,
        tunnel: row.get(2)?,
        destination: row.get(3)?,
        reason: row.get(4)?,
        changed: row.get(5)?,
        model_version: row.get(6)?,
        propensity: row.get(7)?,
        chosen_route: row.get(8)?,
        calculation_us: unsigned(row, 9)?,
        challenger_version: row.get(10)?,
        candidates: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::engine::route::Candidate;
    use crate::engine::types::{NodeId, Route};
    use crate::store::{Retention, Writer};

    fn decision(at_us: u64, destination: u8, reason: Reason) -> Decision {
        let route = Route::new([1, destination].map(|byte| NodeId([byte; 8]))).unwrap();
        Decision { reason, ..Decision::held(at_us, vec![Candidate::unknown(route)], 0) }
    }

    #[test]
    fn features_are_kept_of_decisions_that_lie_apart_and_nothing_else_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let writer = Writer::start(&path, Retention::default()).unwrap();
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64;
        let at = |second: u64| now + second * 1_000_000;
        // What was forced takes nobody's place.
        writer.decision(decision(at(0), 2, Reason::Forced), 1);
        for second in (1..60).step_by(2) {
            writer.decision(decision(at(second), 2, Reason::Held), 1);
            writer.decision(decision(at(second), 3, Reason::Held), 1);
        }
        writer.flush().unwrap();
        let reader = Reader::open(&path).unwrap();
        let all = reader.latest_decisions(100).unwrap();
        assert_eq!(all.len(), 61);
        assert!(all.iter().all(|decision| decision.candidates.len() == 1));
        let apart_us = FEATURES_APART.as_micros() as u64;
        let kept = reader.decisions_apart(0, apart_us).unwrap();
        let times: Vec<u64> = kept.iter().map(|decision| decision.at_us).collect();
        let seconds = (1..60).step_by(10).flat_map(|second| [at(second); 2]);
        assert_eq!(times, seconds.collect::<Vec<_>>());
        let has = |decision: &DecisionRow| !decision.candidates[0].features.is_empty();
        assert!(kept.iter().all(has));
        assert_eq!(all.iter().filter(|decision| has(decision)).count(), kept.len());
    }
}
