//! What came of decisions: what was forecast for the route in use, and what its next probe
//! measured.

use super::StoreError;
use super::reader::{Reader, signed, unsigned};

/// Newest decisions that are looked at: the very last may wait for its probe still.
const DECISIONS_MAX: i64 = 16;
/// A probe that leaves later than this after the decision says nothing about it (µs).
const PROBE_AFTER_US_MAX: u64 = 10_000_000;

/// A decision and the next probe of the route that was in use after it.
#[derive(Clone, Debug, PartialEq)]
pub struct OutcomeRow {
    /// When it was decided (µs since the epoch).
    pub at_us: u64,
    /// Version of the model that decided.
    pub model_version: String,
    /// The route in use after it, `id>id>id`.
    pub route: String,
    /// The model's forecast (ms).
    pub predicted_ms: Option<f64>,
    /// Lower and upper end of its interval (ms).
    pub predicted_interval_ms: Option<(f64, f64)>,
    /// The moving average's forecast (ms).
    pub moving_average_ms: Option<f64>,
    /// When the probe left (µs since the epoch).
    pub probed_us: u64,
    /// Its round-trip time (µs); `None` when it was lost.
    pub rtt_us: Option<u64>,
}

impl Reader {
    /// The newest decision about a destination (node id) whose route was probed since, within
    /// 10 s; `None` when there is none among the last few.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn latest_outcome(&self, destination: &str) -> Result<Option<OutcomeRow>, StoreError> {
        let sql = "SELECT at_us, model_version, route, predicted_ms, predicted_low_ms,
                   predicted_high_ms, moving_average_ms
                   FROM (SELECT id, at_us, model_version FROM decision WHERE destination = ?1
                         ORDER BY at_us DESC, id DESC LIMIT ?2) AS newest
                   JOIN candidate ON decision_id = newest.id AND chosen = 1
                   ORDER BY at_us DESC, newest.id DESC";
        let decisions = self.rows(sql, (destination, DECISIONS_MAX), |row| {
            let low: Option<f64> = row.get(4)?;
            Ok(OutcomeRow {
                at_us: unsigned(row, 0)?,
                model_version: row.get(1)?,
                route: row.get(2)?,
                predicted_ms: row.get(3)?,
                predicted_interval_ms: low.zip(row.get(5)?),
                moving_average_ms: row.get(6)?,
                probed_us: 0,
                rtt_us: None,
            })
        })?;
        let sql = "SELECT sent_us, rtt_us FROM probe WHERE kind = 'route' AND route = ?1
                   AND sent_us BETWEEN ?2 AND ?3 ORDER BY sent_us, id LIMIT 1";
        for mut outcome in decisions {
            let until_us = outcome.at_us.saturating_add(PROBE_AFTER_US_MAX);
            let parameters = (&outcome.route, signed(outcome.at_us), signed(until_us));
            let probes = self.rows(sql, parameters, |row| {
                Ok((unsigned(row, 0)?, row.get::<_, Option<i64>>(1)?.map(|us| us as u64)))
            })?;
            if let Some((probed_us, rtt_us)) = probes.first() {
                (outcome.probed_us, outcome.rtt_us) = (*probed_us, *rtt_us);
                return Ok(Some(outcome));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::{ProbeKind, Sample};

    use crate::engine::predict::Prediction;
    use crate::engine::route::{Candidate, Decision};
    use crate::engine::types::{NodeId, Route, Timestamp};
    use crate::store::{Retention, Writer};

    fn route(relay: u8) -> Route {
        Route::new([1, relay, 2].map(|byte| NodeId([byte; 8]))).unwrap()
    }

    fn decision(at_us: u64, predicted_ms: f64) -> Decision {
        let candidate = |relay| {
            let mut candidate = Candidate::unknown(route(relay));
            candidate.forecast.model = Some(Prediction {
                interval_ms: Some((1.0, 99.0)),
                ..Prediction::of_latency(predicted_ms)
            });
            candidate.forecast.moving_average = Some(Prediction::of_latency(7.0));
            candidate
        };
        Decision::held(at_us, vec![candidate(8), candidate(9)], 1)
    }

    #[test]
    fn the_next_probe_of_the_chosen_route_is_the_outcome() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let writer = Writer::start(&path, Retention::default()).unwrap();
        let start = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64;
        let outcome = || {
            writer.flush().unwrap();
            Reader::open(&path).unwrap().latest_outcome(&NodeId([2; 8]).to_string()).unwrap()
        };
        let probe = |relay, after_us: u64, rtt_us: Option<u64>| {
            let sent_at = Timestamp(start + after_us);
            let done_at = Timestamp(sent_at.0 + 1_000);
            let (kind, route) = (ProbeKind::Route, route(relay));
            writer.write(Sample::Probe { kind, route, sent_at, done_at, rtt_us });
        };
        assert_eq!(outcome(), None);
        writer.decision(decision(start, 20.0), 1);
        probe(8, 1_000, Some(5_000));
        assert_eq!(outcome(), None, "another route was probed");
        probe(9, 2_000, Some(21_000));
        probe(9, 3_000, Some(99_000));
        let found = outcome().unwrap();
        assert_eq!((found.at_us, found.probed_us), (start, start + 2_000));
        assert_eq!((found.predicted_ms, found.rtt_us), (Some(20.0), Some(21_000)));
        assert_eq!(found.predicted_interval_ms, Some((1.0, 99.0)));
        assert_eq!(found.route, route(9).to_string());
        // The next decision has no outcome yet, then a lost probe.
        writer.decision(decision(start + 10_000, 30.0), 1);
        assert_eq!(outcome().unwrap().at_us, start);
        probe(9, 11_000, None);
        let found = outcome().unwrap();
        assert_eq!((found.at_us, found.rtt_us), (start + 10_000, None));
        let elsewhere = Reader::open(&path).unwrap().latest_outcome("0303030303030303").unwrap();
        assert_eq!(elsewhere, None);
    }
}
