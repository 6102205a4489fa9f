//! Readers: committed rows as plain structs, ordered by time.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, Params, Row};

use super::decisions::{COLUMNS, header};
use super::schema::{self, Check, SCHEMA_VERSION};
use super::{BUSY_TIMEOUT, StoreError};
use crate::engine::measure::{LinkQuality, ProbeKind};

/// A row of `probe`.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeRow {
    /// Link or whole route.
    pub kind: ProbeKind,
    /// `id>id>id`.
    pub route: String,
    /// Number of links.
    pub hops: u32,
    /// When it left (µs since the epoch).
    pub sent_us: u64,
    /// When the answer came or waiting ended (µs since the epoch).
    pub done_us: u64,
    /// Round-trip time (µs); `None` when lost.
    pub rtt_us: Option<u64>,
}

/// A row of `link_state`.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkStateRow {
    /// When it was accepted (µs since the epoch).
    pub at_us: u64,
    /// The advertiser.
    pub origin: String,
    /// The other end.
    pub neighbour: String,
    /// The quality; `None` when the link was withdrawn.
    pub quality: Option<LinkQuality>,
}

/// A row of `route_slice`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteSliceRow {
    /// End of the time that it covers (µs since the epoch).
    pub at_us: u64,
    /// The tunnel.
    pub tunnel: u16,
    /// `id>id>id`.
    pub route: String,
    /// Number of that route within the tunnel.
    pub route_id: u32,
    /// Datagrams sent over it.
    pub sent_datagrams: u64,
    /// Those that the far end has received.
    pub received_datagrams: u64,
    /// Bytes sent over it, headers included.
    pub sent_bytes: u64,
    /// Datagrams received that had met congestion.
    pub marked_datagrams: u64,
    /// Smoothed round-trip time by the receipts (µs); `None` without a receipt.
    pub rtt_us: Option<u64>,
    /// Datagrams that the far end sent back.
    pub back_sent: u64,
    /// Those that this node has received.
    pub back_received: u64,
    /// Length of the time that it covers (µs).
    pub duration_us: u64,
}

/// What was forecast for one candidate of a decision.
#[derive(Clone, Debug, PartialEq)]
pub struct CandidatePredictionRow {
    /// `id>id>id`.
    pub route: String,
    /// When (µs since the epoch).
    pub at_us: u64,
    /// The model's forecast (ms); `None` when no model was asked or it failed.
    pub predicted_ms: Option<f64>,
    /// The moving average's (ms).
    pub moving_average_ms: Option<f64>,
    /// The last value's (ms).
    pub last_value_ms: Option<f64>,
    /// Version of the model that decided.
    pub model_version: String,
    /// The forecast of the model in shadow (ms).
    pub challenger_ms: Option<f64>,
    /// Its version.
    pub challenger_version: Option<String>,
}

/// A row of `candidate`.
#[derive(Clone, Debug, PartialEq)]
pub struct CandidateRow {
    /// `id>id>id`.
    pub route: String,
    /// Whether it could carry traffic.
    pub alive: bool,
    /// Whether it was the route in use after the decision.
    pub chosen: bool,
    /// Score on the forecast in use, 0 to 1.
    pub score: f64,
    /// Score on the moving average, 0 to 1.
    pub baseline_score: f64,
    /// The model's forecast (ms).
    pub predicted_ms: Option<f64>,
    /// Lower and upper end of its interval (ms).
    pub predicted_interval_ms: Option<(f64, f64)>,
    /// The forecast of the model in shadow (ms).
    pub challenger_ms: Option<f64>,
    /// The moving average's forecast (ms).
    pub moving_average_ms: Option<f64>,
    /// The last value's forecast (ms).
    pub last_value_ms: Option<f64>,
    /// Probability with which the decision took it, 0 to 1; `None` when it was not logged.
    pub propensity: Option<f64>,
    /// The features, in schema order; empty where they were not kept (`FEATURES_APART`).
    pub features: Vec<f64>,
}

/// A row of `decision` with its candidates.
#[derive(Clone, Debug, PartialEq)]
pub struct DecisionRow {
    /// Number of the row.
    pub id: i64,
    /// When (µs since the epoch).
    pub at_us: u64,
    /// For which tunnel; `None` when somebody only asked.
    pub tunnel: Option<u16>,
    /// Where to.
    pub destination: String,
    /// Why.
    pub reason: String,
    /// Whether the route in use changed.
    pub changed: bool,
    /// Version of the model that decided.
    pub model_version: String,
    /// Version of the model that was asked in shadow.
    pub challenger_version: Option<String>,
    /// Probability with which the policy makes this choice.
    pub propensity: f64,
    /// The route in use after the decision.
    pub chosen_route: Option<String>,
    /// How long the decision took (µs).
    pub calculation_us: u64,
    /// What was weighed, best score first.
    pub candidates: Vec<CandidateRow>,
}

/// How much one table holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableCount {
    /// Its name.
    pub table: &'static str,
    /// Its rows.
    pub rows: u64,
    /// Time of the oldest row (µs since the epoch); `None` when empty.
    pub first_us: Option<u64>,
    /// Time of the newest row (µs since the epoch); `None` when empty.
    pub last_us: Option<u64>,
}

/// How much the store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    /// All tables, in the order of [`crate::store`]'s list.
    pub tables: Vec<TableCount>,
    /// Size of the file and its log (bytes).
    pub file_bytes: u64,
}

/// A read-only view of a store, beside the writer and in any process.
pub struct Reader {
    connection: Connection,
    path: PathBuf,
}

/// What [`candidate`] reads, in its order.
const CANDIDATE_COLUMNS: &str = "route, alive, chosen, score, baseline_score, predicted_ms,
                                 predicted_low_ms, predicted_high_ms, moving_average_ms,
                                 last_value_ms, challenger_ms, candidate.propensity";

impl Reader {
    /// Opens a store for reading. Pages are not checked: the writer does that.
    ///
    /// # Errors
    /// [`StoreError`]; an older or empty file is [`StoreError::Older`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref();
        match schema::inspect(path, Check::Header)? {
            None => return Err(StoreError::Missing(path.to_owned())),
            Some(found) if found < SCHEMA_VERSION => {
                return Err(StoreError::Older { path: path.to_owned(), found });
            }
            Some(_) => {}
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let wrong = |source| schema::error(path, "open", source);
        let connection = Connection::open_with_flags(path, flags).map_err(wrong)?;
        connection.busy_timeout(BUSY_TIMEOUT).map_err(wrong)?;
        Ok(Self { connection, path: path.to_owned() })
    }

    /// Rows of each table, their time span, and the size of the file.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`] or [`StoreError::Damaged`], as all readers.
    pub fn counts(&self) -> Result<Counts, StoreError> {
        let parts = [
            ("probe", "sent_us", "probe"),
            ("link_state", "at_us", "link_state"),
            ("slice", "at_us", "slice"),
            ("route_slice", "at_us", "route_slice"),
            ("service_probe", "started_us", "service_probe"),
            ("event", "started_us", "event"),
            ("choice", "at_us", "choice"),
            ("decision", "at_us", "decision"),
            ("candidate", "at_us", "candidate JOIN decision ON decision.id = decision_id"),
        ];
        let mut tables = Vec::new();
        for (table, time, from) in parts {
            let sql = format!("SELECT count(*), min({time}), max({time}) FROM {from}");
            tables.extend(self.rows(&sql, [], |row| {
                Ok(TableCount {
                    table,
                    rows: unsigned(row, 0)?,
                    first_us: row.get::<_, Option<i64>>(1)?.map(|us| us as u64),
                    last_us: row.get::<_, Option<i64>>(2)?.map(|us| us as u64),
                })
            })?);
        }
        let size = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
        let mut log = self.path.clone().into_os_string();
        log.push("-wal");
        Ok(Counts { tables, file_bytes: size(&self.path) + size(Path::new(&log)) })
    }

    /// Probes of one kind that left at `since_us` (µs since the epoch) or later, in order of
    /// `sent_us`.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn probes(&self, kind: ProbeKind, since_us: u64) -> Result<Vec<ProbeRow>, StoreError> {
        let sql = "SELECT route, hops, sent_us, done_us, rtt_us FROM probe
                   WHERE kind = ?1 AND sent_us >= ?2 ORDER BY sent_us, id";
        self.rows(sql, (kind.as_str(), signed(since_us)), |row| {
            Ok(ProbeRow {
                kind,
                route: row.get(0)?,
                hops: row.get(1)?,
                sent_us: unsigned(row, 2)?,
                done_us: unsigned(row, 3)?,
                rtt_us: row.get::<_, Option<i64>>(4)?.map(|us| us as u64),
            })
        })
    }

    /// When the oldest of the newest `count` answered route probes left (µs since the epoch);
    /// `None` when there are fewer.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn newest_route_probes_since(&self, count: usize) -> Result<Option<u64>, StoreError> {
        let sql = "SELECT sent_us FROM probe WHERE kind = 'route' AND rtt_us IS NOT NULL
                   ORDER BY sent_us DESC LIMIT 1 OFFSET ?1";
        let skip = signed(count.saturating_sub(1) as u64);
        Ok(self.rows(sql, [skip], |row| unsigned(row, 0))?.first().copied())
    }

    /// Link states accepted at `since_us` (µs since the epoch) or later, in order of `at_us`.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn link_states(&self, since_us: u64) -> Result<Vec<LinkStateRow>, StoreError> {
        let sql = "SELECT at_us, origin, neighbour, rtt_ms, jitter_ms, loss, bandwidth, utilisation
                   FROM link_state WHERE at_us >= ?1 ORDER BY at_us, id";
        self.rows(sql, [signed(since_us)], |row| {
            let quality = match row.get::<_, Option<f64>>(3)? {
                None => None,
                Some(rtt_ms) => Some(LinkQuality {
                    rtt_ms,
                    jitter_ms: row.get(4)?,
                    loss: row.get(5)?,
                    bandwidth: row.get(6)?,
                    utilisation: row.get(7)?,
                }),
            };
            Ok(LinkStateRow {
                at_us: unsigned(row, 0)?,
                origin: row.get(1)?,
                neighbour: row.get(2)?,
                quality,
            })
        })
    }

    /// What traffic met on routes at `since_us` (µs since the epoch) or later, in order of `at_us`.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn route_slices(&self, since_us: u64) -> Result<Vec<RouteSliceRow>, StoreError> {
        let sql = "SELECT at_us, tunnel, route, route_id, sent_datagrams, received_datagrams,
                   sent_bytes, marked_datagrams, rtt_us, back_sent, back_received, duration_us
                   FROM route_slice WHERE at_us >= ?1 ORDER BY at_us, id";
        self.rows(sql, [signed(since_us)], |row| {
            Ok(RouteSliceRow {
                at_us: unsigned(row, 0)?,
                tunnel: row.get(1)?,
                route: row.get(2)?,
                route_id: row.get(3)?,
                sent_datagrams: unsigned(row, 4)?,
                received_datagrams: unsigned(row, 5)?,
                sent_bytes: unsigned(row, 6)?,
                marked_datagrams: unsigned(row, 7)?,
                rtt_us: row.get::<_, Option<i64>>(8)?.map(|us| us as u64),
                back_sent: unsigned(row, 9)?,
                back_received: unsigned(row, 10)?,
                duration_us: unsigned(row, 11)?,
            })
        })
    }

    /// Forecasts of decisions made at `since_us` (µs since the epoch) or later, in order of time.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn candidate_predictions(
        &self,
        since_us: u64,
    ) -> Result<Vec<CandidatePredictionRow>, StoreError> {
        let sql = "SELECT route, at_us, predicted_ms, moving_average_ms, last_value_ms,
                   model_version, challenger_ms, challenger_version FROM decision JOIN candidate ON decision_id = decision.id
                   WHERE at_us >= ?1 ORDER BY at_us, decision_id, rank";
        self.rows(sql, [signed(since_us)], |row| {
            Ok(CandidatePredictionRow {
                route: row.get(0)?,
                at_us: unsigned(row, 1)?,
                predicted_ms: row.get(2)?,
                moving_average_ms: row.get(3)?,
                last_value_ms: row.get(4)?,
                model_version: row.get(5)?,
                challenger_ms: row.get(6)?,
                challenger_version: row.get(7)?,
            })
        })
    }

    /// The newest `limit` decisions with their candidates, oldest first.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn latest_decisions(&self, limit: usize) -> Result<Vec<DecisionRow>, StoreError> {
        let sql = format!("SELECT {COLUMNS} FROM decision ORDER BY at_us DESC, id DESC LIMIT ?1");
        let mut decisions = self.rows(&sql, [signed(limit as u64)], header)?;
        decisions.reverse();
        self.with_candidates(decisions)
    }

    /// Decisions made at `since_us` (µs since the epoch) or later, in order of time, with their
    /// candidates. The features of these are left out (an empty list): they are most of the store.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn decisions(&self, since_us: u64) -> Result<Vec<DecisionRow>, StoreError> {
        let sql = format!(
            "SELECT {COLUMNS}, {CANDIDATE_COLUMNS} FROM decision
             LEFT JOIN candidate ON decision_id = id
             WHERE at_us >= ?1 ORDER BY at_us, id, rank"
        );
        let mut decisions: Vec<DecisionRow> = Vec::new();
        self.rows(&sql, [signed(since_us)], |row| {
            let decision = header(row)?;
            if decisions.last().is_none_or(|last| last.id != decision.id) {
                decisions.push(decision);
            }
            let has_candidate = row.get::<_, Option<String>>(11)?.is_some();
            if let Some(last) = decisions.last_mut().filter(|_| has_candidate) {
                last.candidates.push(candidate(row, 11)?);
            }
            Ok(())
        })?;
        Ok(decisions)
    }

    pub(super) fn candidates(&self, decision: i64) -> Result<Vec<CandidateRow>, StoreError> {
        let sql = format!(
            "SELECT {CANDIDATE_COLUMNS}, features FROM candidate WHERE decision_id = ?1
             ORDER BY rank"
        );
        self.rows(&sql, [decision], |row| {
            let features: String = row.get(12)?;
            let features = serde_json::from_str(&features).unwrap_or_default();
            Ok(CandidateRow { features, ..candidate(row, 0)? })
        })
    }

    pub(super) fn rows<T>(
        &self,
        sql: &str,
        parameters: impl Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StoreError> {
        let collect = || {
            let mut statement = self.connection.prepare_cached(sql)?;
            statement.query_map(parameters, read)?.collect::<rusqlite::Result<Vec<T>>>()
        };
        collect().map_err(|source| schema::error(&self.path, "read", source))
    }
}

/// [`CANDIDATE_COLUMNS`] from `first` on; without its features.
fn candidate(row: &Row<'_>, first: usize) -> rusqlite::Result<CandidateRow> {
    let low: Option<f64> = row.get(first + 6)?;
    Ok(CandidateRow {
        route: row.get(first)?,
        alive: row.get(first + 1)?,
        chosen: row.get(first + 2)?,
        score: row.get(first + 3)?,
        baseline_score: row.get(first + 4)?,
        predicted_ms: row.get(first + 5)?,
        predicted_interval_ms: low.zip(row.get(first + 7)?),
        moving_average_ms: row.get(first + 8)?,
        last_value_ms: row.get(first + 9)?,
        features: Vec::new(),
        challenger_ms: row.get(first + 10)?,
        propensity: row.get(first + 11)?,
    })
}

pub(super) fn unsigned(row: &Row<'_>, index: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(index).map(|value| value.max(0) as u64)
}

pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::MISSING;
    use crate::engine::predict::{Prediction, Ranking};
    use crate::engine::route::{Candidate, Decision};
    use crate::engine::types::{NodeId, Route, TunnelId};
    use crate::store::{Retention, Store, Writer};

    fn decision(at_us: u64) -> Decision {
        let candidate = |relay: u8, model: Option<Prediction>| {
            let route = Route::new([1, relay, 2].map(|byte| NodeId([byte; 8]))).unwrap();
            let unknown = Candidate::unknown(route);
            let mut candidate = Candidate { bound_ms: Some(22.5), score: 0.75, ..unknown };
            candidate.forecast.features[3] = 0.1 + 0.2;
            candidate.forecast.model = model;
            candidate.forecast.challenger = model.and(Some(Prediction::of_latency(21.0)));
            candidate.forecast.moving_average = Some(Prediction::of_latency(25.0));
            candidate.forecast.last_value = Some(Prediction::of_latency(26.0));
            candidate
        };
        let model =
            Some(Prediction { interval_ms: Some((15.0, 30.0)), ..Prediction::of_latency(20.0) });
        let decision = Decision::held(at_us, vec![candidate(7, model), candidate(8, None)], 1);
        let tunnel = Some(TunnelId(4));
        Decision { tunnel, challenger_version: Some("v2".into()), ..decision }
    }

    #[test]
    fn decisions_come_back_with_their_candidates() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let writer = Writer::start(&path, Retention::default()).unwrap();
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64;
        // Far enough from each other that all keep their features.
        let at = |index: u64| now + index * crate::store::FEATURES_APART.as_micros() as u64;
        for index in 0..3 {
            writer.decision(decision(at(index)), 77);
        }
        let nothing = Decision { candidates: Vec::new(), chosen: None, ..decision(now - 1) };
        writer.decision(nothing, 1);
        writer.flush().unwrap();
        let reader = Reader::open(&path).unwrap();
        let found = reader.latest_decisions(2).unwrap();
        assert_eq!(found.iter().map(|d| d.at_us).collect::<Vec<_>>(), [at(1), at(2)]);
        let newest = &found[1];
        assert_eq!((newest.tunnel, newest.reason.as_str()), (Some(4), "held"));
        assert_eq!((newest.calculation_us, newest.changed), (77, false));
        let [first, second] = &newest.candidates[..] else { panic!("{newest:?}") };
        assert_eq!(first.predicted_interval_ms, Some((15.0, 30.0)));
        assert_eq!((first.challenger_ms, second.challenger_ms), (Some(21.0), None));
        assert_eq!(newest.challenger_version.as_deref(), Some("v2"));
        assert_eq!((first.chosen, second.chosen), (false, true));
        assert_eq!((newest.propensity, first.propensity), (0.5, Some(0.5)));
        assert_eq!(newest.chosen_route.as_ref(), Some(&second.route));
        assert_eq!(second.features[3], 0.1 + 0.2, "to the last bit");
        assert_eq!(second.features[0], MISSING);
        let mut without = reader.decisions(at(1)).unwrap();
        for (decision, whole) in without.iter_mut().zip(&found) {
            for (candidate, whole) in decision.candidates.iter_mut().zip(&whole.candidates) {
                assert!(candidate.features.is_empty());
                candidate.features.clone_from(&whole.features);
            }
        }
        assert_eq!(without, found);
        let all = reader.decisions(0).unwrap();
        assert_eq!(all.iter().map(|d| d.candidates.len()).collect::<Vec<_>>(), [0, 2, 2, 2]);
        let predictions = reader.candidate_predictions(at(2)).unwrap();
        let told: Vec<_> = predictions.iter().map(|p| (p.predicted_ms, p.last_value_ms)).collect();
        assert_eq!(told, [(Some(20.0), Some(26.0)), (None, Some(26.0))]);
        let shadow: Vec<_> = predictions
            .iter()
            .map(|p| (p.challenger_ms, p.challenger_version.as_deref()))
            .collect();
        assert_eq!(shadow, [(Some(21.0), Some("v2")), (None, Some("v2"))]);
        let sql = "SELECT rule, bound_ms FROM forecast WHERE rank = 1 LIMIT 1";
        let compared = reader.rows(sql, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        let rule = serde_json::to_string(&Ranking::PLAIN).unwrap();
        assert_eq!(compared, [(rule, 22.5)]);
        for view in ["route_quality", "forecast"] {
            let sql = format!("SELECT count(*) FROM {view}");
            assert_eq!(reader.rows(&sql, [], |row| unsigned(row, 0)).unwrap().len(), 1);
        }
    }

    #[test]
    fn candidates_go_with_their_decision() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let writer = Writer::start(&path, Retention::default()).unwrap();
        for second in 0..10 {
            writer.decision(decision(second * 1_000_000), 1);
        }
        drop(writer);
        let mut store = Store::open(&path).unwrap();
        let max_age = std::time::Duration::from_secs(3);
        store.prune(&Retention { max_age, max_bytes: u64::MAX }).unwrap();
        let rows: Vec<u64> =
            Reader::open(&path).unwrap().counts().unwrap().tables.iter().map(|t| t.rows).collect();
        assert_eq!(rows, [0, 0, 0, 0, 0, 0, 0, 4, 8]);
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        assert!(matches!(Reader::open(&path), Err(StoreError::Missing(_))));
        std::fs::write(&path, "").unwrap();
        assert!(matches!(Reader::open(&path), Err(StoreError::Older { found: 0, .. })));
        std::fs::write(&path, "rubbish").unwrap();
        assert!(matches!(Reader::open(&path), Err(StoreError::Damaged { .. })));
    }
}
