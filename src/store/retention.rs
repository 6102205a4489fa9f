//! Retention: the oldest rows go, by age and by size, a chunk at a time.
//!
//! "Now" is the newest row, but never later than the system's clock: a node that was off for a
//! month keeps its past until it measures again, and a row from a clock that ran ahead does not
//! sweep away the rest. Chunks are small, so that the writer gets back to its queue soon.
//!
//! Where room is short, decisions older than [`DECISIONS_KEPT`] go first: they are most of the rows, and
//! can be judged on a day of them, while models learn from what was measured, over weeks.

use std::time::{Duration, SystemTime};

use rusqlite::{Connection, params};

/// Decisions of so long stay as long as any measurement does.
pub const DECISIONS_KEPT: Duration = Duration::from_secs(86_400);

/// How much of the past is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Rows older than this are deleted.
    pub max_age: Duration,
    /// When the rows occupy more than this (bytes), the oldest are deleted.
    pub max_bytes: u64,
}

impl Default for Retention {
    /// 30 days and 1 GiB. A guess: a month shows the rhythm of weeks, and a router's disk has
    /// that much to spare.
    fn default() -> Self {
        Self { max_age: Duration::from_secs(30 * 86_400), max_bytes: 1 << 30 }
    }
}

/// One table, or the part of one that an index keeps in order of time.
struct Part {
    table: &'static str,
    time: &'static str,
    only: &'static str,
    /// Rows deleted at once; a decision takes about nine candidates with it.
    chunk: i64,
}

const DECISIONS: Part = Part { table: "decision", time: "at_us", only: "TRUE", chunk: 200 };

const PARTS: [Part; 9] = [
    Part { table: "probe", time: "sent_us", only: "kind = 'link'", chunk: 2_000 },
    Part { table: "probe", time: "sent_us", only: "kind = 'route'", chunk: 2_000 },
    Part { table: "link_state", time: "at_us", only: "TRUE", chunk: 2_000 },
    Part { table: "slice", time: "at_us", only: "TRUE", chunk: 2_000 },
    Part { table: "route_slice", time: "at_us", only: "TRUE", chunk: 2_000 },
    Part { table: "service_probe", time: "started_us", only: "TRUE", chunk: 2_000 },
    Part { table: "event", time: "started_us", only: "TRUE", chunk: 2_000 },
    Part { table: "choice", time: "at_us", only: "TRUE", chunk: 50 },
    DECISIONS,
];

impl Part {
    fn time_of(
        &self,
        connection: &Connection,
        function: &str,
        until_us: i64,
    ) -> rusqlite::Result<Option<i64>> {
        let Self { table, time, only, .. } = self;
        let sql = format!("SELECT {function}({time}) FROM {table} WHERE {only} AND {time} <= ?1");
        connection.prepare_cached(&sql)?.query_row([until_us], |row| row.get(0))
    }

    fn delete_until(&self, connection: &Connection, until_us: i64) -> rusqlite::Result<u64> {
        let Self { table, time, only, chunk } = self;
        let sql = format!(
            "DELETE FROM {table} WHERE id IN (SELECT id FROM {table}
             WHERE {only} AND {time} <= ?1 ORDER BY {time} LIMIT ?2)"
        );
        connection.prepare_cached(&sql)?.execute(params![until_us, chunk]).map(|rows| rows as u64)
    }
}

/// Deletes one chunk of what exceeds the retention and returns the rows deleted; 0 when nothing
/// exceeds it.
pub(super) fn step(connection: &mut Connection, retention: &Retention) -> rusqlite::Result<u64> {
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let clock_us = micros(clock);
    let mut newest_us = None;
    for part in &PARTS {
        newest_us = newest_us.max(part.time_of(connection, "max", clock_us)?);
    }
    if let Some(newest_us) = newest_us {
        let until_us = newest_us.saturating_sub(micros(retention.max_age)).saturating_sub(1);
        for part in &PARTS {
            let deleted = part.delete_until(connection, until_us)?;
            if deleted > 0 {
                return Ok(deleted);
            }
        }
    }
    if live_bytes(connection)? > retention.max_bytes {
        if let Some(newest_us) = newest_us {
            let until_us = newest_us.saturating_sub(micros(DECISIONS_KEPT));
            let deleted = DECISIONS.delete_until(connection, until_us)?;
            if deleted > 0 {
                return Ok(deleted);
            }
        }
        let mut oldest: Option<(i64, &Part)> = None;
        for part in &PARTS {
            if let Some(time_us) = part.time_of(connection, "min", i64::MAX)?
                && oldest.is_none_or(|(least_us, _)| time_us < least_us)
            {
                oldest = Some((time_us, part));
            }
        }
        if let Some((_, part)) = oldest {
            return part.delete_until(connection, i64::MAX);
        }
    }
    // Nothing left to delete: give the free pages back to the file system. The rows that the
    // pragma returns must be drained, or it stops after the first page.
    let mut statement = connection.prepare("PRAGMA incremental_vacuum")?;
    let mut rows = statement.query([])?;
    while rows.next()?.is_some() {}
    Ok(0)
}

/// Bytes that rows and indices occupy; free pages do not count, deleting cannot shrink those.
fn live_bytes(connection: &Connection) -> rusqlite::Result<u64> {
    let number = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let pages = number("page_count")? - number("freelist_count")?;
    Ok(pages.max(0) as u64 * number("page_size")?.max(0) as u64)
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::{ProbeKind, Sample};
    use crate::engine::types::{NodeId, Route, Timestamp};
    use crate::store::rows::{Row, insert};
    use crate::store::{Reader, Store};

    fn filled(path: &std::path::Path, times_us: impl Iterator<Item = u64>) -> Store {
        let mut store = Store::open(path).unwrap();
        let route = Route::new([NodeId([1; 8]), NodeId([2; 8])]).unwrap();
        let rows: Vec<Row> = times_us
            .map(|us| Sample::Probe {
                kind: ProbeKind::Route,
                route: route.clone(),
                sent_at: Timestamp(us),
                done_at: Timestamp(us + 1),
                rtt_us: Some(1),
            })
            .map(Row::Sample)
            .collect();
        assert!(insert(&mut store.connection, &rows).unwrap().is_empty());
        store
    }

    fn times(path: &std::path::Path) -> Vec<u64> {
        let rows = Reader::open(path).unwrap().probes(ProbeKind::Route, 0).unwrap();
        rows.iter().map(|row| row.sent_us).collect()
    }

    #[test]
    fn age_counts_from_the_newest_row_and_deletes_the_oldest_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let mut store = filled(&path, (0..5_000).map(|second| second * 1_000_000));
        let retention = Retention { max_age: Duration::from_secs(999), max_bytes: u64::MAX };
        assert_eq!(store.prune(&retention).unwrap(), 4_000);
        let kept = times(&path);
        assert_eq!((kept.len(), kept[0], kept[999]), (1_000, 4_000_000_000, 4_999_000_000));
        assert_eq!(store.prune(&retention).unwrap(), 0);
    }

    #[test]
    fn a_row_from_a_clock_that_ran_ahead_sweeps_nothing_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let year_2200 = 7_258_118_400_000_000;
        let mut store = filled(&path, [1_000_000, 2_000_000, year_2200].into_iter());
        let retention = Retention { max_age: Duration::from_secs(60), max_bytes: u64::MAX };
        assert_eq!(store.prune(&retention).unwrap(), 0);
        assert_eq!(times(&path).len(), 3);
    }

    #[test]
    fn size_deletes_the_oldest_and_gives_the_pages_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let mut store = filled(&path, (0..20_000).map(|second| second * 1_000_000));
        let full = live_bytes(&store.connection).unwrap();
        let retention = Retention { max_age: Duration::MAX, max_bytes: full / 2 };
        let deleted = store.prune(&retention).unwrap() as usize;
        assert!(live_bytes(&store.connection).unwrap() <= full / 2);
        let kept = times(&path);
        assert_eq!(kept.len(), 20_000 - deleted);
        assert!(kept.len() > 5_000, "{}", kept.len());
        assert_eq!(kept.last(), Some(&19_999_000_000), "the newest stay");
        drop(store);
        assert!(std::fs::metadata(&path).unwrap().len() <= full / 2 + 65_536);
    }

    #[test]
    fn where_room_is_short_decisions_older_than_a_day_go_before_measurements() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let hour_us = 3_600_000_000;
        let mut store = filled(&path, (0..2_000).map(|index| index * hour_us / 40));
        for hour in 0..50_u64 {
            let sql = "INSERT INTO decision (at_us, destination, reason, changed, model_version,
                       propensity, calculation_us) VALUES (?1, ?2, 'held', 0, 'v', 1, 1)";
            let long = "x".repeat(20_000);
            store.connection.execute(sql, params![(hour * hour_us) as i64, long]).unwrap();
        }
        let full = live_bytes(&store.connection).unwrap();
        let retention = Retention { max_age: Duration::MAX, max_bytes: full - 100_000 };
        store.prune(&retention).unwrap();
        let count = |sql| store.connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
        assert_eq!(count("SELECT count(*) FROM probe"), 2_000);
        // The newest row is of hour 49.975.
        assert_eq!(count("SELECT min(at_us) / 3600000000 FROM decision"), 26);
        // Still too much: now the oldest of all.
        let full = live_bytes(&store.connection).unwrap();
        store.prune(&Retention { max_age: Duration::MAX, max_bytes: full - 20_000 }).unwrap();
        let count = |sql| store.connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
        assert!(count("SELECT count(*) FROM probe") < 2_000);
        assert_eq!(count("SELECT count(*) FROM decision"), 24);
    }
}
