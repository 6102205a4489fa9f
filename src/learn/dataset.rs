//! The training rows: one per completed route probe, with the features known when it left.
//!
//! Known at `sent_us` is what was completed or accepted strictly before it. Rolling windows are
//! laid over the answered probes of each route and over what each end says of each link; as-of
//! joins look up the newest window before each probe. What depends on the order of everything is
//! replayed. What is not known is [`MISSING`], as online.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use polars::prelude::*;

use super::frames::{Claim, Probe};
use super::links::Links;
use super::nodes::{deviation_features, replayed_features};
use super::routes::route_features;
use super::slices::Carried;
use super::{LearnError, frame_error};
use crate::engine::measure::ProbeKind;
use crate::engine::predict::FeatureVector;
use crate::engine::predict::schema::{FEATURES, MISSING, index};
use crate::engine::types::{ParseError, Route};
use crate::store::{LinkStateRow, ProbeRow};

/// Columns before the features: which probe, and what it measured.
pub const KEY_COLUMNS: [&str; 4] = ["route", "sent_us", "done_us", "rtt_ms"];

const MICROS_PER_DAY: u64 = 86_400_000_000;

/// One row per completed route probe sent at `from_us` or later (µs since the epoch), in order of
/// `sent_us`: `route`, `sent_us`, `done_us`, `rtt_ms` (null: lost), then the columns of [`FEATURES`] in order.
/// Earlier probes and link states are history only. The inputs may be in any order.
///
/// # Errors
/// [`LearnError::Frame`] when a route or a node has an unreadable name, or when polars refuses,
/// which no other input is known to cause.
pub fn feature_frame(
    probes: &[ProbeRow],
    link_states: &[LinkStateRow],
    from_us: u64,
) -> Result<DataFrame, LearnError> {
    frame_with_traffic(probes, link_states, &[], from_us).map(|(frame, _)| frame)
}

/// The same with a row for each slice of traffic that began at `from_us` or later, too, whose
/// `rtt_ms` is null, and beside each row the bandwidth (bytes/s) that it shows.
///
/// # Errors
/// As [`feature_frame`].
pub(super) fn frame_with_traffic(
    probes: &[ProbeRow],
    link_states: &[LinkStateRow],
    carried: &[Carried],
    from_us: u64,
) -> Result<(DataFrame, Vec<Option<f64>>), LearnError> {
    build(probes, link_states, carried, from_us).map_err(frame_error("compute the features"))
}

/// The feature columns of a frame as rows.
///
/// # Errors
/// [`LearnError::Frame`] when a column is missing or of another type.
pub fn feature_rows(frame: &DataFrame) -> Result<Vec<FeatureVector>, LearnError> {
    let wrong = frame_error("read the features");
    let mut rows = vec![[MISSING; FEATURES.len()]; frame.height()];
    for (index, feature) in FEATURES.iter().enumerate() {
        let column = frame.column(feature.name).map_err(&wrong)?;
        for (row, value) in rows.iter_mut().zip(column.f64().map_err(&wrong)?.iter()) {
            // A tree learner cannot order what is no number.
            row[index] = value.filter(|value| value.is_finite()).unwrap_or(MISSING);
        }
    }
    Ok(rows)
}

fn build(
    probes: &[ProbeRow],
    link_states: &[LinkStateRow],
    carried: &[Carried],
    from_us: u64,
) -> PolarsResult<(DataFrame, Vec<Option<f64>>)> {
    let unreadable = |error: ParseError| polars_err!(ComputeError: "{error}");
    let mut routes = HashMap::new();
    let probes = probes.iter().filter(|row| row.kind == ProbeKind::Route);
    let mut completed = parsed(probes, &mut routes).map_err(unreadable)?;
    completed.sort_by_key(|probe| probe.row.done_us);
    let moments = carried.iter().map(|carried| &carried.moment);
    let moments = parsed(moments, &mut routes).map_err(unreadable)?;
    let claims = claims(link_states).map_err(unreadable)?;
    let bandwidths = carried.iter().map(|carried| Some(carried.bandwidth));
    let mut asked: Vec<(&Probe<'_>, Option<f64>)> =
        completed.iter().map(|probe| (probe, None)).chain(moments.iter().zip(bandwidths)).collect();
    asked.retain(|(probe, _)| probe.row.sent_us >= from_us);
    asked.sort_by_key(|(probe, _)| probe.row.sent_us);
    let (rows, bandwidths): (Vec<&Probe<'_>>, Vec<Option<f64>>) = asked.into_iter().unzip();

    let mut features = vec![[MISSING; FEATURES.len()]; rows.len()];
    for (features, probe) in features.iter_mut().zip(&rows) {
        let share_of_day = (probe.row.sent_us % MICROS_PER_DAY) as f64 / MICROS_PER_DAY as f64;
        let (sin, cos) = (share_of_day * std::f64::consts::TAU).sin_cos();
        features[const { index("hop_count") }] = probe.route.hop_count() as f64;
        features[const { index("hour_sin") }] = sin;
        features[const { index("hour_cos") }] = cos;
    }
    let mut links = Links::of(&claims)?;
    links.features(&rows, &mut features)?;
    route_features(&rows, &completed, &mut features)?;
    deviation_features(&rows, &claims, &links, &mut features)?;
    replayed_features(&rows, &claims, &completed, &mut features);

    let micros = |value: fn(&Probe<'_>) -> u64| -> Vec<i64> {
        rows.iter().map(|probe| value(probe) as i64).collect()
    };
    let routes: Vec<&str> = rows.iter().map(|probe| probe.row.route.as_str()).collect();
    let rtts_ms: Vec<Option<f64>> = rows.iter().map(|probe| probe.rtt_ms()).collect();
    let mut columns = vec![
        Column::new(KEY_COLUMNS[0].into(), routes),
        Column::new(KEY_COLUMNS[1].into(), micros(|probe| probe.row.sent_us)),
        Column::new(KEY_COLUMNS[2].into(), micros(|probe| probe.row.done_us)),
        Column::new(KEY_COLUMNS[3].into(), rtts_ms),
    ];
    for (index, feature) in FEATURES.iter().enumerate() {
        let values: Vec<f64> = features.iter().map(|row| row[index]).collect();
        columns.push(Column::new(feature.name.into(), values));
    }
    Ok((DataFrame::new(rows.len(), columns)?, bandwidths))
}

/// The rows with their routes, which are numbered in `routes`.
fn parsed<'a>(
    rows: impl Iterator<Item = &'a ProbeRow>,
    routes: &mut HashMap<&'a str, (Route, u32)>,
) -> Result<Vec<Probe<'a>>, ParseError> {
    let mut all = Vec::new();
    for row in rows {
        let next = routes.len() as u32;
        let (route, route_id) = match routes.entry(&row.route) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(new) => new.insert((row.route.parse()?, next)).clone(),
        };
        all.push(Probe { row, route, route_id });
    }
    Ok(all)
}

/// What was advertised, in order of acceptance; within one advertisement in the order in which
/// the engine takes it in.
fn claims(link_states: &[LinkStateRow]) -> Result<Vec<Claim>, ParseError> {
    let claims = link_states.iter().map(|row| {
        let (origin, neighbour) = (row.origin.parse()?, row.neighbour.parse()?);
        Ok(Claim { at_us: row.at_us, origin, neighbour, quality: row.quality })
    });
    let mut claims = claims.collect::<Result<Vec<_>, ParseError>>()?;
    claims.sort_by_key(|claim| (claim.at_us, claim.origin, claim.neighbour));
    Ok(claims)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::{LinkQuality, WINDOW};
    use crate::engine::types::NodeId;
    use crate::learn::random_history::{online, random_history};

    fn micros(frame: &DataFrame, name: &str) -> Vec<u64> {
        frame.column(name).unwrap().i64().unwrap().no_null_iter().map(|us| us as u64).collect()
    }

    fn values(frame: &DataFrame, name: &str) -> Vec<f64> {
        frame.column(name).unwrap().f64().unwrap().no_null_iter().collect()
    }

    #[test]
    fn offline_and_online_features_agree_on_random_histories() {
        for seed in 0..5 {
            let history = random_history(seed, 2_500);
            let expected = online(&history);
            let frame = feature_frame(&history.probes, &history.link_states, 0).unwrap();
            assert_eq!(frame.height(), expected.len());
            assert!(frame.height() > 1_000, "{}", frame.height());
            let rows = feature_rows(&frame).unwrap();
            let mut known = [0; FEATURES.len()];
            let mut missing = [0; FEATURES.len()];
            for (sent_us, row) in micros(&frame, "sent_us").into_iter().zip(&rows) {
                for (index, online) in expected[&sent_us].iter().enumerate() {
                    let name = FEATURES[index].name;
                    assert!(
                        (row[index] - online).abs() <= 1e-9 * online.abs().max(1.0),
                        "seed {seed}, {name} at {sent_us}: offline {}, online {online}",
                        row[index]
                    );
                    known[index] += usize::from(*online != MISSING);
                    missing[index] += usize::from(*online == MISSING);
                }
            }
            // The comparison means something: every feature is known somewhere, every feature
            // that can be missing is missing somewhere, the longest windows are full and roll.
            assert!(known.iter().all(|count| *count > 50), "{known:?}");
            let always = ["hop_count", "hour_sin", "hour_cos"];
            for (index, feature) in FEATURES.iter().enumerate() {
                assert_eq!(missing[index] == 0, always.contains(&feature.name), "{}", feature.name);
            }
            for name in ["link_count_min", "route_count"] {
                let counts = values(&frame, name);
                let full = counts.iter().filter(|count| **count == WINDOW as f64).count();
                assert!(full > 50, "{name}: {full}");
            }
        }
    }

    #[test]
    fn a_slice_of_traffic_has_the_features_of_the_moment_in_which_it_began() {
        let mut history = random_history(6, 1_500);
        let plain = feature_frame(&history.probes, &history.link_states, 0).unwrap();
        // Over the routes of the probes, each in between two things that happened.
        let began = history.probes.iter().step_by(9).map(|probe| ProbeRow {
            sent_us: probe.sent_us + 1,
            done_us: probe.done_us + 10_000_000,
            rtt_us: None,
            ..probe.clone()
        });
        history.asked = began.collect();
        let expected = online(&history);
        let carried = history.asked.iter().enumerate();
        let carried: Vec<Carried> = carried
            .map(|(index, moment)| Carried { moment: moment.clone(), bandwidth: index as f64 })
            .collect();
        let (frame, bandwidths) =
            frame_with_traffic(&history.probes, &history.link_states, &carried, 0).unwrap();
        assert_eq!(frame.height(), expected.len());
        let mut compared = 0;
        let rows = feature_rows(&frame).unwrap();
        for ((sent_us, row), bandwidth) in
            micros(&frame, "sent_us").into_iter().zip(&rows).zip(&bandwidths)
        {
            let Some(bandwidth) = bandwidth else { continue };
            assert_eq!(carried[*bandwidth as usize].moment.sent_us, sent_us);
            for (index, online) in expected[&sent_us].iter().enumerate() {
                let name = FEATURES[index].name;
                let near = (row[index] - online).abs() <= 1e-9 * online.abs().max(1.0);
                assert!(near, "{name} at {sent_us}: offline {}, online {online}", row[index]);
            }
            compared += 1;
        }
        assert!(compared > 100 && compared == carried.len(), "{compared}");
        // They are rows and no history: those of the probes are what they were.
        let keep = BooleanChunked::from_iter(bandwidths.iter().map(Option::is_none));
        assert!(frame.filter(&keep).unwrap().equals_missing(&plain));
        let from_us = micros(&frame, "sent_us")[300];
        let (later, beside) =
            frame_with_traffic(&history.probes, &history.link_states, &carried, from_us).unwrap();
        assert_eq!((later.height(), beside.len()), (frame.height() - 300, frame.height() - 300));
    }

    #[test]
    fn the_order_of_the_rows_and_of_the_columns_is_fixed() {
        let mut history = random_history(7, 900);
        let frame = feature_frame(&history.probes, &history.link_states, 0).unwrap();
        let names: Vec<&str> = frame.get_column_names().iter().map(|name| name.as_str()).collect();
        assert_eq!(names[..4], KEY_COLUMNS);
        assert!(names[4..].iter().copied().eq(FEATURES.iter().map(|feature| feature.name)));
        assert!(micros(&frame, "sent_us").is_sorted());
        history.probes.reverse();
        history.link_states.reverse();
        let again = feature_frame(&history.probes, &history.link_states, 0).unwrap();
        assert!(frame.equals_missing(&again));
    }

    #[test]
    fn earlier_probes_are_history_and_no_rows() {
        let history = random_history(8, 900);
        let whole = feature_frame(&history.probes, &history.link_states, 0).unwrap();
        let from_us = micros(&whole, "sent_us")[100];
        let later = feature_frame(&history.probes, &history.link_states, from_us).unwrap();
        assert!(later.equals_missing(&whole.slice(100, whole.height() - 100)));
    }

    #[test]
    fn what_happens_at_the_moment_of_sending_is_not_known_yet() {
        let name = |byte| NodeId([byte; 8]).to_string();
        let state = |at_us, rtt_ms| LinkStateRow {
            at_us,
            origin: name(1),
            neighbour: name(2),
            quality: Some(LinkQuality {
                rtt_ms,
                jitter_ms: 0.0,
                loss: 0.0,
                bandwidth: None,
                utilisation: 0.0,
            }),
        };
        let probe = |sent_us, done_us| ProbeRow {
            kind: ProbeKind::Route,
            route: format!("{}>{}", name(1), name(2)),
            hops: 1,
            sent_us,
            done_us,
            rtt_us: Some(done_us - sent_us),
        };
        let probes = [probe(1_000, 9_000), probe(9_000, 10_000), probe(9_001, 11_000)];
        let states = [state(999, 1.0), state(9_000, 2.0)];
        let frame = feature_frame(&probes, &states, 0).unwrap();
        assert_eq!(values(&frame, "route_last_ms"), [MISSING, MISSING, 8.0]);
        assert_eq!(values(&frame, "link_last_sum_ms"), [1.0, 1.0, 2.0]);
        assert_eq!(values(&frame, "route_jitter_ms"), [MISSING; 3]);
        assert_eq!(values(&frame, "node_deviation_max_ln"), [0.0, 0.0, (2.0_f64 / 1.5).ln()]);
        let credibility = values(&frame, "credibility_min");
        assert_eq!(credibility[..2], [MISSING; 2]);
        assert!(credibility[2] < 1.0, "8 ms were delivered where 2 are claimed");
        let coordinate = values(&frame, "coordinate_sum_ms");
        assert!(coordinate[0] == coordinate[1] && coordinate[1] != coordinate[2]);
    }

    #[test]
    fn nothing_gives_an_empty_frame_with_all_columns() {
        let history = random_history(9, 900);
        for states in [&history.link_states[..], &[]] {
            let frame = feature_frame(&[], states, 0).unwrap();
            assert_eq!(frame.shape(), (0, KEY_COLUMNS.len() + FEATURES.len()));
        }
        let frame = feature_frame(&history.probes, &[], 0).unwrap();
        assert!(values(&frame, "link_last_sum_ms").iter().all(|sum| *sum == MISSING));
    }

    #[test]
    fn an_unreadable_name_is_an_error_that_shows_it() {
        let mut history = random_history(10, 50);
        history.probes[3].route = "a>b".into();
        let error = feature_frame(&history.probes, &[], 0).unwrap_err().to_string();
        assert!(error.contains("'a'"), "{error}");
    }
}
