//! Reader: decisions that can be judged afterwards.

use rusqlite::Row;

use super::reader::{signed, unsigned};
use super::{DecisionRow, Reader, StoreError};

/// The columns of `decision`, as [`header`] reads them.
pub(super) const COLUMNS: &str = "id, at_us, tunnel, destination, reason, changed, model_version,
                                  decision.propensity, chosen_route, calculation_us,
                                  challenger_version";

impl Reader {
    /// Decisions for a tunnel, made at `since_us` (µs since the epoch) or later, that had a choice
    /// and made one: neither forced nor without any route. Of each destination, whose tunnels share the
    /// probes of its routes, those that are at least `apart_us` after the one before; which those are depends on the times alone, never on what
    /// was chosen. With their candidates, in order of time.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn decisions_apart(
        &self,
        since_us: u64,
        apart_us: u64,
    ) -> Result<Vec<DecisionRow>, StoreError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM decision WHERE at_us >= ?1 AND tunnel IS NOT NULL
             AND chosen_route IS NOT NULL AND reason NOT IN ('forced', 'no-route')
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
