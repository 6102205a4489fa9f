//! Checks of services, kept and read.

use rusqlite::{Connection, params};

use super::reader::{signed, unsigned};
use super::rows::integer;
use super::{Reader, StoreError};
use crate::engine::measure::service::{CheckFailure, Subject};
use crate::engine::types::Timestamp;

/// A row of `service_probe`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceProbeRow {
    /// From where: `local` at the provider, or `end-to-end` through a tunnel.
    pub vantage: String,
    /// The service.
    pub service: String,
    /// Who provides it.
    pub provider: String,
    /// When the check began (µs since the epoch).
    pub started_us: u64,
    /// When it ended, or when waiting for it did (µs since the epoch).
    pub done_us: u64,
    /// How long the service took (µs); `None` when it failed.
    pub response_us: Option<u64>,
    /// Why it failed; `None` when it did not.
    pub failure: Option<String>,
}

/// Keeps a check.
pub(super) fn keep(
    connection: &Connection,
    subject: &Subject,
    (started_at, done_at): (Timestamp, Timestamp),
    result: Result<u64, CheckFailure>,
) -> rusqlite::Result<usize> {
    let sql = "INSERT INTO service_probe
               (vantage, service, provider, started_us, done_us, response_us, failure)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
    connection.prepare_cached(sql)?.execute(params![
        subject.vantage.as_str(),
        subject.name.as_str(),
        subject.provider.to_string(),
        integer(started_at.as_micros()),
        integer(done_at.as_micros()),
        result.ok().map(integer),
        result.err().map(CheckFailure::as_str),
    ])
}

impl Reader {
    /// Checks of services that began at `since_us` (µs since the epoch) or later, in order of time.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn service_probes(&self, since_us: u64) -> Result<Vec<ServiceProbeRow>, StoreError> {
        let sql = "SELECT vantage, service, provider, started_us, done_us, response_us, failure
                   FROM service_probe WHERE started_us >= ?1 ORDER BY started_us, id";
        self.rows(sql, [signed(since_us)], |row| {
            Ok(ServiceProbeRow {
                vantage: row.get(0)?,
                service: row.get(1)?,
                provider: row.get(2)?,
                started_us: unsigned(row, 3)?,
                done_us: unsigned(row, 4)?,
                response_us: row.get::<_, Option<i64>>(5)?.map(|us| us as u64),
                failure: row.get(6)?,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::{Sample, Vantage};
    use crate::engine::types::NodeId;
    use crate::store::{Retention, Writer};

    #[test]
    fn a_failed_check_is_a_row_like_any_other_and_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let writer = Writer::start(folder.path().join("a.db"), Retention::default()).unwrap();
        let provider = NodeId([7; 8]);
        let start = 1_760_000_000_000_000;
        for (index, result) in [Ok(1_500), Err(CheckFailure::TimedOut)].into_iter().enumerate() {
            let vantage = if index == 0 { Vantage::Local } else { Vantage::EndToEnd };
            let started_at = Timestamp(start + index as u64);
            let subject = Subject { name: "a.local".parse().unwrap(), provider, vantage };
            let done_at = Timestamp(start + 9);
            writer.write(Sample::ServiceProbe { subject, started_at, done_at, result });
        }
        writer.flush().unwrap();
        let reader = Reader::open(writer.path()).unwrap();
        let first = ServiceProbeRow {
            vantage: "local".into(),
            service: "a.local".into(),
            provider: provider.to_string(),
            started_us: start,
            done_us: start + 9,
            response_us: Some(1_500),
            failure: None,
        };
        let second = ServiceProbeRow {
            vantage: "end-to-end".into(),
            started_us: start + 1,
            response_us: None,
            failure: Some("timed-out".into()),
            ..first.clone()
        };
        assert_eq!(reader.service_probes(0).unwrap(), [first, second.clone()]);
        assert_eq!(reader.service_probes(start + 1).unwrap(), [second]);
        let sql = "SELECT checks, failed_percent, mean_ms, last_failure FROM service_health
                   ORDER BY vantage";
        let of = |row: &rusqlite::Row<'_>| {
            let mean: Option<f64> = row.get(2)?;
            Ok((
                row.get::<_, i64>(0)?,
                row.get::<_, f64>(1)?,
                mean,
                row.get::<_, Option<String>>(3)?,
            ))
        };
        let view = reader.rows(sql, [], of).unwrap();
        let expected = [(1, 100.0, None, Some("timed-out".into())), (1, 0.0, Some(1.5), None)];
        assert_eq!(view, expected);
    }
}
