//! Export: what was measured and decided, as Parquet, partitioned by UTC day, for any other tool.
//!
//! `<out>/<table>/day=YYYY-MM-DD/part-0.parquet`, hive style: the day is in the path and not in
//! the file. Tables: `probe` (both kinds), `link_state`, `route_slice` (what the traffic of tunnels met
//! on their routes), `service_probe` (checks of services), `route_features`, which is the frame that
//! training uses, `decision`, and `candidate` with the forecasts and scores of each route that was
//! weighed (its features are left out: `route_features` has those of its next probe). The day is
//! that of `sent_us` or `at_us`. A table without rows is one file without rows, of the day 1970-01-01, so
//! that a reader finds its columns. What stays behind: slices of links, events, peers, and the choices and bounds that a
//! node learns its own rule from. Features are 32-bit floats, which is what XGBoost computes with;
//! seven digits are more than a measurement has, and most of an export are features.

use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::Path;

use polars::prelude::*;

use super::dataset::feature_frame;
use super::{LearnError, file_error, frame_error};
use crate::engine::measure::ProbeKind;
use crate::engine::predict::schema::FEATURES;
use crate::store::{
    CandidateRow, DecisionRow, LinkStateRow, ProbeRow, Reader, RouteSliceRow, ServiceProbeRow,
};

/// The tables, in the order of the report.
const TABLES: [&str; 7] = [
    "probe",
    "link_state",
    "route_slice",
    "service_probe",
    "route_features",
    "decision",
    "candidate",
];
const PART: &str = "part-0.parquet";
const DAY: &str = "day";
const MICROS_PER_DAY: i64 = 86_400_000_000;

/// What was written of one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportedTable {
    /// Its name, which is also its folder's.
    pub table: &'static str,
    /// Its rows.
    pub rows: usize,
    /// Its files, one a day; one of an empty table.
    pub files: usize,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// All tables, empty ones included.
    pub tables: Vec<ExportedTable>,
}

/// Writes them to `out`, which is made when it is missing. With `force`, the files of
/// an earlier export there are replaced; nothing else in the folder is touched.
///
/// # Errors
/// [`LearnError::NotEmpty`], [`LearnError::Store`], [`LearnError::Frame`], [`LearnError::File`].
/// Files already written stay; each is whole.
pub fn export(store_path: &Path, out: &Path, force: bool) -> Result<Exported, LearnError> {
    let reader = Reader::open(store_path)?;
    refuse_unless_empty(out, force)?;
    let link_states = reader.link_states(0)?;
    let route_probes = reader.probes(ProbeKind::Route, 0)?;
    let features = feature_frame(&route_probes, &link_states, 0)?;
    let mut probes = reader.probes(ProbeKind::Link, 0)?;
    probes.extend(route_probes);
    probes.sort_by_key(|probe| probe.sent_us);

    let decisions = reader.decisions(0)?;

    let wrong = frame_error("lay out the tables");
    let frames = [
        (probe_frame(&probes).map_err(&wrong)?, "sent_us"),
        (link_state_frame(&link_states).map_err(&wrong)?, "at_us"),
        (route_slice_frame(&reader.route_slices(0)?).map_err(&wrong)?, "at_us"),
        (service_probe_frame(&reader.service_probes(0)?).map_err(&wrong)?, "started_us"),
        (narrow(features).map_err(&wrong)?, "sent_us"),
        (decision_frame(&decisions).map_err(&wrong)?, "at_us"),
        (candidate_frame(&decisions).map_err(&wrong)?, "at_us"),
    ];
    let mut tables = Vec::new();
    for (table, (frame, time)) in TABLES.into_iter().zip(frames) {
        let folder = out.join(table);
        remove_earlier(&folder)?;
        let files = write_days(&folder, &frame, time)?;
        tables.push(ExportedTable { table, rows: frame.height(), files });
    }
    Ok(Exported { tables })
}

/// Whether an export may go there: the folder is missing or empty, or `force` is set.
///
/// # Errors
/// [`LearnError::NotEmpty`], [`LearnError::File`] when it cannot be read.
pub fn refuse_unless_empty(out: &Path, force: bool) -> Result<(), LearnError> {
    let is_empty = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == ErrorKind::NotFound => true,
        Err(error) => return Err(file_error("read the folder", out)(error)),
    };
    if is_empty || force { Ok(()) } else { Err(LearnError::NotEmpty(out.to_owned())) }
}

fn probe_frame(probes: &[ProbeRow]) -> PolarsResult<DataFrame> {
    let text = |value: fn(&ProbeRow) -> &str| probes.iter().map(value).collect::<Vec<_>>();
    let micros = |value: fn(&ProbeRow) -> i64| probes.iter().map(value).collect::<Vec<_>>();
    let rtt_us: Vec<Option<i64>> = probes.iter().map(|p| p.rtt_us.map(|us| us as i64)).collect();
    let columns = vec![
        Column::new("kind".into(), text(|p| p.kind.as_str())),
        Column::new("route".into(), text(|p| &p.route)),
        Column::new("hops".into(), probes.iter().map(|p| p.hops).collect::<Vec<_>>()),
        Column::new("sent_us".into(), micros(|p| p.sent_us as i64)),
        Column::new("done_us".into(), micros(|p| p.done_us as i64)),
        Column::new("rtt_us".into(), rtt_us),
    ];
    DataFrame::new(probes.len(), columns)
}

fn link_state_frame(states: &[LinkStateRow]) -> PolarsResult<DataFrame> {
    let text = |value: fn(&LinkStateRow) -> &str| states.iter().map(value).collect::<Vec<_>>();
    let number =
        |value: fn(&LinkStateRow) -> Option<f64>| states.iter().map(value).collect::<Vec<_>>();
    let columns = vec![
        Column::new("at_us".into(), states.iter().map(|s| s.at_us as i64).collect::<Vec<_>>()),
        Column::new("origin".into(), text(|s| &s.origin)),
        Column::new("neighbour".into(), text(|s| &s.neighbour)),
        Column::new("rtt_ms".into(), number(|s| s.quality.map(|q| q.rtt_ms))),
        Column::new("jitter_ms".into(), number(|s| s.quality.map(|q| q.jitter_ms))),
        Column::new("loss".into(), number(|s| s.quality.map(|q| q.loss))),
        Column::new("bandwidth".into(), number(|s| s.quality.and_then(|q| q.bandwidth))),
        Column::new("utilisation".into(), number(|s| s.quality.map(|q| q.utilisation))),
    ];
    DataFrame::new(states.len(), columns)
}

fn route_slice_frame(slices: &[RouteSliceRow]) -> PolarsResult<DataFrame> {
    let count = |value: fn(&RouteSliceRow) -> u64| {
        slices.iter().map(|s| value(s) as i64).collect::<Vec<_>>()
    };
    let rtt_us: Vec<Option<i64>> = slices.iter().map(|s| s.rtt_us.map(|us| us as i64)).collect();
    let tunnels: Vec<u32> = slices.iter().map(|s| u32::from(s.tunnel)).collect();
    let routes: Vec<&str> = slices.iter().map(|s| s.route.as_str()).collect();
    let columns = vec![
        Column::new("at_us".into(), count(|s| s.at_us)),
        Column::new("tunnel".into(), tunnels),
        Column::new("route".into(), routes),
        Column::new("route_id".into(), slices.iter().map(|s| s.route_id).collect::<Vec<_>>()),
        Column::new("sent_datagrams".into(), count(|s| s.sent_datagrams)),
        Column::new("received_datagrams".into(), count(|s| s.received_datagrams)),
        Column::new("sent_bytes".into(), count(|s| s.sent_bytes)),
        Column::new("marked_datagrams".into(), count(|s| s.marked_datagrams)),
        Column::new("rtt_us".into(), rtt_us),
        Column::new("back_sent".into(), count(|s| s.back_sent)),
        Column::new("back_received".into(), count(|s| s.back_received)),
        Column::new("duration_us".into(), count(|s| s.duration_us)),
    ];
    DataFrame::new(slices.len(), columns)
}

fn service_probe_frame(probes: &[ServiceProbeRow]) -> PolarsResult<DataFrame> {
    let text = |value: fn(&ServiceProbeRow) -> &str| probes.iter().map(value).collect::<Vec<_>>();
    let us = |value: fn(&ServiceProbeRow) -> u64| {
        probes.iter().map(|p| value(p) as i64).collect::<Vec<_>>()
    };
    let response: Vec<Option<i64>> =
        probes.iter().map(|p| p.response_us.map(|us| us as i64)).collect();
    let failure: Vec<Option<&str>> = probes.iter().map(|p| p.failure.as_deref()).collect();
    let columns = vec![
        Column::new("vantage".into(), text(|p| &p.vantage)),
        Column::new("service".into(), text(|p| &p.service)),
        Column::new("provider".into(), text(|p| &p.provider)),
        Column::new("started_us".into(), us(|p| p.started_us)),
        Column::new("done_us".into(), us(|p| p.done_us)),
        Column::new("response_us".into(), response),
        Column::new("failure".into(), failure),
    ];
    DataFrame::new(probes.len(), columns)
}

/// The features as 32-bit floats; key columns stay as they are.
fn narrow(mut features: DataFrame) -> PolarsResult<DataFrame> {
    for feature in FEATURES {
        let column = features.column(feature.name)?.cast(&DataType::Float32)?;
        features.with_column(column)?;
    }
    Ok(features)
}

fn decision_frame(decisions: &[DecisionRow]) -> PolarsResult<DataFrame> {
    let text = |value: fn(&DecisionRow) -> &str| decisions.iter().map(value).collect::<Vec<_>>();
    let integer = |value: fn(&DecisionRow) -> i64| decisions.iter().map(value).collect::<Vec<_>>();
    let chosen: Vec<Option<&str>> = decisions.iter().map(|d| d.chosen_route.as_deref()).collect();
    let tunnels: Vec<Option<u32>> = decisions.iter().map(|d| d.tunnel.map(u32::from)).collect();
    let columns = vec![
        Column::new("decision_id".into(), integer(|d| d.id)),
        Column::new("at_us".into(), integer(|d| d.at_us as i64)),
        Column::new("tunnel".into(), tunnels),
        Column::new("destination".into(), text(|d| &d.destination)),
        Column::new("reason".into(), text(|d| &d.reason)),
        Column::new("changed".into(), decisions.iter().map(|d| d.changed).collect::<Vec<_>>()),
        Column::new("model_version".into(), text(|d| &d.model_version)),
        Column::new(
            "propensity".into(),
            decisions.iter().map(|d| d.propensity).collect::<Vec<_>>(),
        ),
        Column::new("chosen_route".into(), chosen),
        Column::new("calculation_us".into(), integer(|d| d.calculation_us as i64)),
    ];
    DataFrame::new(decisions.len(), columns)
}

fn candidate_frame(decisions: &[DecisionRow]) -> PolarsResult<DataFrame> {
    let rows: Vec<(&DecisionRow, u32, &CandidateRow)> = decisions
        .iter()
        .flat_map(|d| d.candidates.iter().zip(0..).map(move |(c, rank)| (d, rank, c)))
        .collect();
    let integer =
        |value: fn(&DecisionRow) -> i64| rows.iter().map(|r| value(r.0)).collect::<Vec<_>>();
    let number =
        |value: fn(&CandidateRow) -> f64| rows.iter().map(|r| value(r.2)).collect::<Vec<_>>();
    let forecast = |value: fn(&CandidateRow) -> Option<f64>| {
        rows.iter().map(|row| value(row.2)).collect::<Vec<_>>()
    };
    let flag =
        |value: fn(&CandidateRow) -> bool| rows.iter().map(|r| value(r.2)).collect::<Vec<_>>();
    let columns = vec![
        Column::new("decision_id".into(), integer(|d| d.id)),
        Column::new("at_us".into(), integer(|d| d.at_us as i64)),
        Column::new("rank".into(), rows.iter().map(|row| row.1).collect::<Vec<_>>()),
        Column::new("route".into(), rows.iter().map(|r| r.2.route.as_str()).collect::<Vec<_>>()),
        Column::new("alive".into(), flag(|c| c.alive)),
        Column::new("chosen".into(), flag(|c| c.chosen)),
        Column::new("score".into(), number(|c| c.score)),
        Column::new("baseline_score".into(), number(|c| c.baseline_score)),
        Column::new("predicted_ms".into(), forecast(|c| c.predicted_ms)),
        Column::new("predicted_low_ms".into(), forecast(|c| c.predicted_interval_ms.map(|i| i.0))),
        Column::new("predicted_high_ms".into(), forecast(|c| c.predicted_interval_ms.map(|i| i.1))),
        Column::new("moving_average_ms".into(), forecast(|c| c.moving_average_ms)),
        Column::new("last_value_ms".into(), forecast(|c| c.last_value_ms)),
        Column::new("propensity".into(), forecast(|c| c.propensity)),
    ];
    DataFrame::new(rows.len(), columns)
}

/// Removes what an earlier export wrote in a table's folder, and nothing else.
fn remove_earlier(folder: &Path) -> Result<(), LearnError> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries {
        let day = entry.map_err(file_error("read the folder", folder))?.path();
        let is_day = day.file_name().is_some_and(|n| n.to_string_lossy().starts_with("day="));
        let part = day.join(PART);
        if is_day && part.is_file() {
            fs::remove_file(&part).map_err(file_error("remove", &part))?;
            // Fails when somebody put other files there; those stay.
            drop(fs::remove_dir(&day));
        }
    }
    Ok(())
}

/// One file a day; returns their number.
fn write_days(folder: &Path, frame: &DataFrame, time: &str) -> Result<usize, LearnError> {
    let mut days = by_day(frame, time).map_err(frame_error("split a table by day"))?;
    if days.is_empty() {
        days.push((0, frame.clone()));
    }
    let mut files = 0;
    for (day, mut part) in days {
        let folder = folder.join(format!("{DAY}={}", date(day)));
        fs::create_dir_all(&folder).map_err(file_error("make the folder", &folder))?;
        write_part(&folder, &mut part)?;
        files += 1;
    }
    Ok(files)
}

/// The rows of each day, with its number since the epoch.
fn by_day(frame: &DataFrame, time: &str) -> PolarsResult<Vec<(i64, DataFrame)>> {
    let days: Vec<i64> =
        frame.column(time)?.i64()?.no_null_iter().map(|us| us.div_euclid(MICROS_PER_DAY)).collect();
    let mut with_day = frame.clone();
    with_day.with_column(Column::new(DAY.into(), days))?;
    let parts = with_day.partition_by_stable([DAY], true)?.into_iter().map(|part| {
        let day = part.column(DAY)?.i64()?.get(0).unwrap_or_default();
        Ok((day, part.drop(DAY)?))
    });
    parts.collect()
}

fn write_part(folder: &Path, part: &mut DataFrame) -> Result<(), LearnError> {
    let path = folder.join(PART);
    let beside = folder.join(format!("{PART}.tmp"));
    let wrong = file_error("write", &path);
    let mut file = BufWriter::new(File::create(&beside).map_err(&wrong)?);
    ParquetWriter::new(&mut file).finish(part).map_err(frame_error("write a Parquet file"))?;
    file.flush().map_err(&wrong)?;
    file.get_ref().sync_all().map_err(&wrong)?;
    fs::rename(&beside, &path).map_err(wrong)
}

/// `YYYY-MM-DD` of a day since the epoch, UTC (Hinnant, "chrono-compatible low-level date
/// algorithms", civil_from_days).
fn date(day: i64) -> String {
    let shifted = day + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day_of_month = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day_of_month:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::service::{CheckFailure, Subject};
    use crate::engine::measure::{LinkQuality, RouteReport, Sample, Vantage};

    use crate::engine::predict::Prediction;
    use crate::engine::route::{Candidate, Decision};
    use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};
    use crate::store::{Retention, Writer};

    /// Probes every 10 minutes over two days (2023-11-14 and 15), with one lost in ten.
    fn filled(path: &Path) {
        let writer = Writer::start(path, Retention::default()).unwrap();
        let route = Route::new([NodeId([1; 8]), NodeId([2; 8])]).unwrap();
        let start_us = 1_699_920_000_000_000_u64;
        for index in 0..288 {
            let at = Timestamp(start_us + index * 600_000_000);
            let kind = if index % 2 == 0 { ProbeKind::Route } else { ProbeKind::Link };
            let done_at = Timestamp(at.0 + 9_000);
            let rtt_us = (index % 10 != 0).then_some(9_000);
            writer.write(Sample::Probe {
                kind,
                route: route.clone(),
                sent_at: at,
                done_at,
                rtt_us,
            });
        }
        let quality = LinkQuality {
            rtt_ms: 9.0,
            jitter_ms: 0.0,
            loss: 0.0,
            bandwidth: None,
            utilisation: 0.5,
        };
        let (origin, neighbour) = (route.source(), route.destination());
        for (at, quality) in [(start_us + 1, Some(quality)), (start_us + 2, None)] {
            writer.write(Sample::LinkState { at: Timestamp(at), origin, neighbour, quality });
        }
        let report = RouteReport {
            route: route.clone(),
            route_id: 1,
            sent: 20,
            received: 19,
            bytes: 30_000,
            marked: 2,
            rtt_us: Some(9_000),
            back_sent: 18,
            back_received: 17,
            back_marked: 0,
            duration_us: 500_000,
        };
        writer.write(Sample::RouteSlice { at: Timestamp(start_us), tunnel: TunnelId(1), report });
        for (index, result) in [Ok(700), Err(CheckFailure::Status)].into_iter().enumerate() {
            let (name, vantage) = ("a.local".parse().unwrap(), Vantage::Local);
            let subject = Subject { name, provider: origin, vantage };
            let started_at = Timestamp(start_us + index as u64);
            writer.write(Sample::ServiceProbe { subject, started_at, done_at: started_at, result });
        }
        writer.decision(decision(start_us + 3, &route, 3), 1);
        writer.decision(decision(start_us + 86_400_000_000, &route, 0), 1);
        writer.flush().unwrap();
    }

    /// The last candidate is the one in use.
    fn decision(at_us: u64, route: &Route, candidates: usize) -> Decision {
        let mut candidate = Candidate::unknown(route.clone());
        candidate.forecast.moving_average = Some(Prediction::of_latency(9.0));
        Decision {
            candidates: vec![candidate.clone(); candidates],
            chosen: candidates.checked_sub(1),
            model_version: "moving-average".into(),
            ..Decision::held(at_us, vec![candidate], 0)
        }
    }

    fn read(path: &Path) -> DataFrame {
        ParquetReader::new(File::open(path).unwrap()).finish().unwrap()
    }

    #[test]
    fn a_parquet_reader_finds_every_row_in_its_day() {
        let folder = tempfile::tempdir().unwrap();
        let (store, out) = (folder.path().join("store.db"), folder.path().join("a/b"));
        filled(&store);
        let exported = export(&store, &out, false).unwrap();
        // 144 route probes, of which every fifth is lost.
        let expected = [
            ("probe", 288, 2),
            ("link_state", 2, 1),
            ("route_slice", 1, 1),
            ("service_probe", 2, 1),
            ("route_features", 144, 2),
            ("decision", 2, 2),
            ("candidate", 3, 1),
        ];
        let told: Vec<_> = exported.tables.iter().map(|t| (t.table, t.rows, t.files)).collect();
        assert_eq!(told, expected);
        let mut sent_us = Vec::new();
        for day in ["2023-11-14", "2023-11-15"] {
            let probes = read(&out.join(format!("probe/day={day}/part-0.parquet")));
            assert_eq!(probes.shape(), (144, 6));
            sent_us.extend(probes.column("sent_us").unwrap().i64().unwrap().no_null_iter());
        }
        assert_eq!(sent_us.len(), 288);
        assert!(sent_us.is_sorted());
        let states = read(&out.join("link_state/day=2023-11-14/part-0.parquet"));
        assert_eq!(states.column("rtt_ms").unwrap().f64().unwrap().to_vec(), [Some(9.0), None]);
        let slices = read(&out.join("route_slice/day=2023-11-14/part-0.parquet"));
        let counts =
            ["sent_datagrams", "received_datagrams", "marked_datagrams", "rtt_us", "back_sent"];
        let first = |name| slices.column(name).unwrap().i64().unwrap().get(0).unwrap();
        assert_eq!(counts.map(first), [20, 19, 2, 9_000, 18]);
        let checks = read(&out.join("service_probe/day=2023-11-14/part-0.parquet"));
        let failures = checks.column("failure").unwrap().str().unwrap();
        assert_eq!(failures.iter().collect::<Vec<_>>(), [None, Some("status")]);
        let features = read(&out.join("route_features/day=2023-11-15/part-0.parquet"));
        assert_eq!(features.width(), 4 + FEATURES.len());
        let means = features.column("route_mean5_ms").unwrap().f32().unwrap();
        assert!(means.iter().all(|mean| mean.is_some_and(|mean| (mean - 9.0).abs() < 1e-6)));
        assert_eq!(features.column("rtt_ms").unwrap().dtype(), &DataType::Float64);
        let decisions = read(&out.join("decision/day=2023-11-14/part-0.parquet"));
        let candidates = read(&out.join("candidate/day=2023-11-14/part-0.parquet"));
        let id = |frame: &DataFrame| frame.column("decision_id").unwrap().i64().unwrap().get(0);
        assert_eq!(id(&decisions), id(&candidates));
        let chosen = candidates.column("chosen").unwrap().bool().unwrap();
        assert_eq!(chosen.iter().collect::<Vec<_>>(), [Some(false), Some(false), Some(true)]);
        let average = candidates.column("moving_average_ms").unwrap().f64().unwrap().get(2);
        assert_eq!(
            (average, candidates.column("last_value_ms").unwrap().null_count()),
            (Some(9.0), 3)
        );
    }

    #[test]
    fn an_earlier_export_is_replaced_only_when_forced() {
        let folder = tempfile::tempdir().unwrap();
        let (store, out) = (folder.path().join("store.db"), folder.path().join("out"));
        filled(&store);
        export(&store, &out, false).unwrap();
        let notes = out.join("notes.txt");
        fs::write(&notes, "mine").unwrap();
        let stale = out.join("probe/day=2001-01-01");
        fs::create_dir_all(&stale).unwrap();
        fs::write(stale.join(PART), "old").unwrap();
        assert!(matches!(export(&store, &out, false), Err(LearnError::NotEmpty(_))));
        assert!(stale.exists());
        let exported = export(&store, &out, true).unwrap();
        assert_eq!(exported.tables[0].rows, 288);
        assert!(!stale.exists(), "or a reader would count it");
        assert_eq!(fs::read_to_string(notes).unwrap(), "mine");
        assert_eq!(read(&out.join("probe/day=2023-11-14/part-0.parquet")).height(), 144);
    }

    #[test]
    fn an_empty_store_gives_every_table_with_its_columns() {
        let folder = tempfile::tempdir().unwrap();
        let (store, out) = (folder.path().join("store.db"), folder.path().join("out"));
        assert!(matches!(export(&store, &out, false), Err(LearnError::Store(_))));
        drop(Writer::start(&store, Retention::default()).unwrap());
        let exported = export(&store, &out, false).unwrap();
        assert!(exported.tables.iter().all(|table| table.rows == 0 && table.files == 1));
        for (table, width) in TABLES.into_iter().zip([6, 8, 12, 7, 4 + FEATURES.len(), 10, 14]) {
            let part = read(&out.join(table).join("day=1970-01-01/part-0.parquet"));
            assert_eq!(part.shape(), (0, width), "{table}");
        }
        // Filled since: the empty files are gone.
        filled(&store);
        export(&store, &out, true).unwrap();
        assert!(!out.join("probe/day=1970-01-01").exists());
    }

    #[test]
    fn dates_of_known_days() {
        for (day, text) in [
            (0, "1970-01-01"),
            (-1, "1969-12-31"),
            (11_016, "2000-02-29"),
            (19_675, "2023-11-14"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(date(day), text);
        }
    }
}
