//! Traces: measurements of real paths in one Parquet file, read for the replay.
//!
//! One row a fresh measurement: `t_s` (f64, seconds since the trace began), `src` and `dst`
//! (text), `rtt_ms` (f32, null: no reply), `throughput_mbps` (f32, null: not measured, may be
//! absent), `changepoint` (bool, may be absent). A round trip below [`RTT_MS_MIN`] is read as that:
//! no ratio of zeros is a number.

use std::fs::File;
use std::path::Path;

use polars::prelude::*;

use super::evaluate::RTT_MS_MIN;
use super::{LearnError, file_error, frame_error};

/// Most rows of a trace: more would not fit beside what is learned from them.
pub const TRACE_ROWS_MAX: usize = 20_000_000;

/// One measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceRow {
    /// Seconds since the trace began, 0 or more.
    pub t_s: f64,
    /// Who measured.
    pub src: String,
    /// To whom.
    pub dst: String,
    /// Round-trip time (ms), above 0; `None`: no reply, or only throughput was measured.
    pub rtt_ms: Option<f64>,
    /// TCP throughput (Mbit/s).
    pub throughput_mbps: Option<f64>,
    /// A person labelled this sample as the start of a new level.
    pub changepoint: bool,
}

/// Reads a trace, sorted by time; rows of one moment keep their order.
///
/// # Errors
/// [`LearnError::File`] when the file cannot be opened, [`LearnError::Frame`] when it is not
/// Parquet or lacks a column, [`LearnError::Trace`] when a row is absurd.
pub fn read_trace(path: &Path) -> Result<Vec<TraceRow>, LearnError> {
    let file = File::open(path).map_err(file_error("read the trace", path))?;
    let wrong = frame_error("read the trace");
    let frame = ParquetReader::new(file).finish().map_err(&wrong)?;
    let absurd = |what: String| LearnError::Trace { path: path.to_owned(), what };
    if frame.height() == 0 || frame.height() > TRACE_ROWS_MAX {
        return Err(absurd(format!("it has {} rows", frame.height())));
    }
    let mut rows = rows_of(&frame).map_err(&wrong)?;
    for (index, row) in rows.iter_mut().enumerate() {
        if let Some(end) = [("src", &row.src), ("dst", &row.dst)].iter().find(|e| e.1.is_empty()) {
            return Err(absurd(format!("row {index} has no {}", end.0)));
        }
        let number = |value: Option<f64>| value.is_none_or(|v| v.is_finite() && v >= 0.0);
        let good = row.t_s.is_finite() && row.t_s >= 0.0 && row.src != row.dst;
        if !good || !number(row.rtt_ms) || !number(row.throughput_mbps) {
            return Err(absurd(format!("row {index} is {row:?}")));
        }
        row.rtt_ms = row.rtt_ms.map(|rtt_ms| rtt_ms.max(RTT_MS_MIN));
    }
    rows.sort_by(|a, b| a.t_s.total_cmp(&b.t_s));
    Ok(rows)
}

fn rows_of(frame: &DataFrame) -> PolarsResult<Vec<TraceRow>> {
    let number = |name: &str| -> PolarsResult<Vec<Option<f64>>> {
        let column = frame.column(name)?.cast(&DataType::Float64)?;
        Ok(column.f64()?.iter().collect())
    };
    let text = |name: &str| -> PolarsResult<Vec<String>> {
        let column = frame.column(name)?.str()?;
        Ok(column.iter().map(|text| text.unwrap_or_default().to_owned()).collect())
    };
    let has = |name: &str| frame.column(name).is_ok();
    let (times, rtts) = (number("t_s")?, number("rtt_ms")?);
    let none = || vec![None; frame.height()];
    let throughputs = if has("throughput_mbps") { number("throughput_mbps")? } else { none() };
    let changes: Vec<bool> = if has("changepoint") {
        frame.column("changepoint")?.bool()?.iter().map(|at| at.unwrap_or(false)).collect()
    } else {
        vec![false; frame.height()]
    };
    let ends = text("src")?.into_iter().zip(text("dst")?);
    let values = times.into_iter().zip(rtts).zip(throughputs.into_iter().zip(changes));
    let row = |((src, dst), ((t_s, rtt_ms), (throughput_mbps, changepoint)))| TraceRow {
        t_s: Option::unwrap_or(t_s, f64::NAN),
        src,
        dst,
        rtt_ms,
        throughput_mbps,
        changepoint,
    };
    Ok(ends.zip(values).map(row).collect())
}

/// A decision of one policy, for the Parquet file of a replay.
#[derive(Clone, Debug)]
pub struct ReplayDecisionRow {
    /// Seed of the run.
    pub seed: u64,
    /// Moment of the decision (seconds since the trace began).
    pub t_s: f64,
    /// Source, destination and relay; `None`: direct.
    pub src: String,
    /// Destination.
    pub dst: String,
    /// The policy.
    pub policy: &'static str,
    /// The relay that was chosen; `None`: the direct link.
    pub relay: Option<String>,
    /// What the choice cost (ms).
    pub cost_ms: f64,
    /// What the direct link cost (ms); `None` where there is none.
    pub direct_ms: Option<f64>,
    /// What meshwise forecast for its choice (ms).
    pub forecast_ms: Option<f64>,
}

/// Writes all decisions of a replay as one Parquet file.
///
/// # Errors
/// [`LearnError::File`] or [`LearnError::Frame`] when it cannot be written.
pub fn write_decisions(path: &Path, rows: &[ReplayDecisionRow]) -> Result<(), LearnError> {
    let text = |value: fn(&ReplayDecisionRow) -> &str| rows.iter().map(value).collect::<Vec<_>>();
    let relays: Vec<Option<&str>> = rows.iter().map(|row| row.relay.as_deref()).collect();
    let columns = vec![
        Column::new("seed".into(), rows.iter().map(|r| r.seed as i64).collect::<Vec<_>>()),
        Column::new("t_s".into(), rows.iter().map(|r| r.t_s).collect::<Vec<_>>()),
        Column::new("src".into(), text(|r| &r.src)),
        Column::new("dst".into(), text(|r| &r.dst)),
        Column::new("policy".into(), text(|r| r.policy)),
        Column::new("relay".into(), relays),
        Column::new("cost_ms".into(), rows.iter().map(|r| r.cost_ms).collect::<Vec<_>>()),
        Column::new("direct_ms".into(), rows.iter().map(|r| r.direct_ms).collect::<Vec<_>>()),
        Column::new("forecast_ms".into(), rows.iter().map(|r| r.forecast_ms).collect::<Vec<_>>()),
    ];
    let wrong = frame_error("write the decisions");
    let mut frame = DataFrame::new(rows.len(), columns).map_err(&wrong)?;
    let file = File::create(path).map_err(file_error("write", path))?;
    ParquetWriter::new(file).finish(&mut frame).map_err(wrong)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, columns: Vec<Column>) {
        let mut frame = DataFrame::new(columns[0].len(), columns).unwrap();
        ParquetWriter::new(File::create(path).unwrap()).finish(&mut frame).unwrap();
    }

    fn columns(t_s: [f64; 2], rtt_ms: [Option<f32>; 2]) -> Vec<Column> {
        vec![
            Column::new("t_s".into(), t_s.to_vec()),
            Column::new("src".into(), vec!["a", "b"]),
            Column::new("dst".into(), vec!["b", "a"]),
            Column::new("rtt_ms".into(), rtt_ms.to_vec()),
        ]
    }

    #[test]
    fn rows_are_sorted_and_a_null_is_a_loss() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.parquet");
        write(&path, columns([7.0, 3.0], [Some(20.0), None]));
        let rows = read_trace(&path).unwrap();
        assert_eq!((rows[0].t_s, rows[0].rtt_ms, rows[0].src.as_str()), (3.0, None, "b"));
        assert_eq!((rows[1].rtt_ms, rows[1].throughput_mbps), (Some(20.0), None));
        assert!(!rows[1].changepoint);
    }

    #[test]
    fn a_round_trip_of_nothing_is_the_least_that_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.parquet");
        write(&path, columns([7.0, 3.0], [Some(0.0), Some(20.0)]));
        let rtts: Vec<_> = read_trace(&path).unwrap().iter().map(|row| row.rtt_ms).collect();
        assert_eq!(rtts, [Some(20.0), Some(RTT_MS_MIN)]);
    }

    #[test]
    fn a_row_without_an_end_is_refused_by_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.parquet");
        for (column, other) in [("src", "dst"), ("dst", "src")] {
            for missing in [None, Some("")] {
                let mut all = columns([1.0, 2.0], [Some(1.0), None]);
                all.retain(|kept| kept.name() != column);
                all.push(Column::new(column.into(), vec![Some("x"), missing]));
                write(&path, all);
                let error = read_trace(&path).unwrap_err().to_string();
                assert!(error.contains(&format!("row 1 has no {column};")), "{error}");
                assert!(!error.contains(other), "{error}");
            }
        }
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.parquet");
        assert!(matches!(read_trace(&path), Err(LearnError::File { .. })));
        std::fs::write(&path, "not parquet").unwrap();
        assert!(matches!(read_trace(&path), Err(LearnError::Frame { .. })));
        for absurd in [
            columns([-1.0, 3.0], [None, None]),
            columns([f64::NAN, 3.0], [None, None]),
            columns([1.0, 3.0], [Some(-5.0), None]),
        ] {
            write(&path, absurd);
            assert!(matches!(read_trace(&path), Err(LearnError::Trace { .. })));
        }
        let mut lacking = columns([1.0, 2.0], [None, None]);
        lacking.pop();
        write(&path, lacking);
        assert!(matches!(read_trace(&path), Err(LearnError::Frame { .. })));
    }
}
