//! The training rows: one per answered route probe, with the features known when it left.
//!
//! Known at `sent_us` is what was completed or accepted strictly before it. Per route, rolling
//! windows are laid over the completed and over the answered probes in order of completion; an
//! as-of join looks up the newest window before each probe, and the newest state of each of its
//! links. What is not known is [`MISSING`], as online.

use polars::prelude::*;

use super::frames::{Ids, frame, newest_before, rtt_ms};
use super::links::link_features;
use super::windows::{ANSWERED_WINDOWS, answered_windows, completed_windows};
use super::{LearnError, frame_error};
use crate::engine::measure::ProbeKind;
use crate::engine::predict::FeatureVector;
use crate::engine::predict::schema::{FEATURES, MISSING};
use crate::store::{LinkStateRow, ProbeRow};

/// Columns before the features: which probe, and what it measured.
pub const KEY_COLUMNS: [&str; 4] = ["route", "sent_us", "done_us", "rtt_ms"];

const MICROS_PER_DAY: i64 = 86_400_000_000;

/// One row per answered route probe sent at `from_us` or later (µs since the epoch), in order of
/// `sent_us`: `route`, `sent_us`, `done_us`, `rtt_ms`, then the columns of [`FEATURES`] in order.
/// Earlier probes and link states are history only. The inputs may be in any order.
///
/// # Errors
/// [`LearnError::Frame`] when polars refuses, which no input is known to cause.
pub fn feature_frame(
    probes: &[ProbeRow],
    link_states: &[LinkStateRow],
    from_us: u64,
) -> Result<DataFrame, LearnError> {
    build(probes, link_states, from_us).map_err(frame_error("compute the features"))
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
    from_us: u64,
) -> PolarsResult<DataFrame> {
    let mut ids = Ids::default();
    let mut completed: Vec<&ProbeRow> =
        probes.iter().filter(|probe| probe.kind == ProbeKind::Route).collect();
    completed.sort_by_key(|probe| probe.done_us);
    let answered: Vec<&ProbeRow> =
        completed.iter().copied().filter(|probe| probe.rtt_us.is_some()).collect();
    let mut rows: Vec<&ProbeRow> =
        answered.iter().copied().filter(|probe| probe.sent_us >= from_us).collect();
    rows.sort_by_key(|probe| probe.sent_us);

    let sent_us: Vec<i64> = rows.iter().map(|probe| probe.sent_us as i64).collect();
    let route_ids: Vec<u32> = rows.iter().map(|probe| ids.of(&probe.route)).collect();
    let left = frame(vec![
        Column::new("route_id".into(), &route_ids),
        Column::new("sent_us".into(), &sent_us),
    ])?;
    let known = |right: &DataFrame, on: &str| newest_before(&left, right, "route_id", on);
    let completions = known(&completed_windows(&completed, &mut ids)?, "completed_us")?;
    let answers = known(&answered_windows(&answered, &mut ids)?, "answered_us")?;
    let links = link_features(&rows, link_states)?;

    let ages = completions.column("completed_us")?.i64()?.iter().zip(&sent_us);
    let route_age = ages.map(|(at, sent)| at.map_or(MISSING, |at| (sent - at) as f64 / 1e6));
    let route_age: Vec<f64> = route_age.collect();
    let last = values(&answers, "route_last_ms")?;
    let residual = last
        .iter()
        .zip(&links.rtt_sum_ms)
        .map(|(last, sum)| if *last == MISSING || *sum == MISSING { MISSING } else { last - sum });
    let residual: Vec<f64> = residual.collect();
    let angles: Vec<f64> = sent_us
        .iter()
        .map(|us| (us % MICROS_PER_DAY) as f64 / MICROS_PER_DAY as f64 * std::f64::consts::TAU)
        .collect();

    let mut columns = vec![
        Column::new("route".into(), rows.iter().map(|p| p.route.as_str()).collect::<Vec<_>>()),
        Column::new("done_us".into(), rows.iter().map(|p| p.done_us as i64).collect::<Vec<_>>()),
        Column::new("rtt_ms".into(), rows.iter().map(|p| rtt_ms(p)).collect::<Vec<_>>()),
        Column::new("sent_us".into(), sent_us),
        Column::new("route_last_ms".into(), last),
        Column::new("route_age_s".into(), route_age),
        Column::new("route_residual_ms".into(), residual),
        Column::new("hour_sin".into(), angles.iter().map(|a| a.sin()).collect::<Vec<_>>()),
        Column::new("hour_cos".into(), angles.iter().map(|a| a.cos()).collect::<Vec<_>>()),
    ];
    for name in ["route_loss", "route_failure_streak"] {
        columns.push(Column::new(name.into(), values(&completions, name)?));
    }
    for name in ANSWERED_WINDOWS {
        columns.push(Column::new(name.into(), values(&answers, name)?));
    }
    columns.extend(links.into_columns());
    frame(columns)?.select(KEY_COLUMNS.into_iter().chain(FEATURES.iter().map(|f| f.name)))
}

fn values(frame: &DataFrame, name: &str) -> PolarsResult<Vec<f64>> {
    Ok(frame.column(name)?.f64()?.iter().map(|value| value.unwrap_or(MISSING)).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;
    use crate::engine::measure::{LinkHistories, LinkQuality, RouteHistories};
    use crate::engine::predict::route_features;
    use crate::engine::types::{NodeId, Route, Timestamp};

    fn route(nodes: &[u8]) -> Route {
        Route::new(nodes.iter().map(|byte| NodeId([*byte; 8])).collect::<Vec<_>>()).unwrap()
    }

    /// What happened, as the store holds it.
    #[derive(Default)]
    struct History {
        probes: Vec<ProbeRow>,
        link_states: Vec<LinkStateRow>,
    }

    /// Draws probes over routes of 1 to 4 hops, overlapping in time, a fifth of them lost, and
    /// states of all their links, some withdrawn, some without bandwidth, one never advertised.
    fn random_history(seed: u64) -> History {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let routes = [
            route(&[1, 2]),
            route(&[1, 3, 2]),
            route(&[1, 4, 3, 2]),
            route(&[1, 3, 4, 5, 2]),
            route(&[1, 9, 2]),
        ];
        let mut history = History::default();
        let mut last_us = 1_700_000_000_000_000;
        let mut done = std::collections::BTreeSet::new();
        for _ in 0..900 {
            last_us += random.random_range(1..2_000_000);
            let route = &routes[random.random_range(0..routes.len())];
            if random.random_bool(0.3) {
                let links: Vec<_> = route.links().collect();
                let (origin, neighbour) = links[random.random_range(0..links.len())];
                if origin == NodeId([9; 8]) {
                    continue;
                }
                let quality = LinkQuality {
                    rtt_ms: random.random_range(0.1..300.0),
                    jitter_ms: random.random_range(0.0..30.0),
                    loss: random.random_range(0.0..1.0),
                    bandwidth: random.random_bool(0.5).then(|| random.random_range(1e3..1e7)),
                    utilisation: random.random_range(0.0..1.0),
                };
                history.link_states.push(LinkStateRow {
                    at_us: last_us,
                    origin: origin.to_string(),
                    neighbour: neighbour.to_string(),
                    quality: random.random_bool(0.9).then_some(quality),
                });
                continue;
            }
            // Heavy-tailed, so that an inexact running sum would show.
            let rtt_us = 10_f64.powf(random.random_range(2.0..7.5)) as u64;
            let mut done_us = last_us + rtt_us;
            while !done.insert(done_us) {
                done_us += 1;
            }
            history.probes.push(ProbeRow {
                kind: ProbeKind::Route,
                route: route.to_string(),
                hops: route.hop_count() as u32,
                sent_us: last_us,
                done_us,
                rtt_us: random.random_bool(0.8).then_some(rtt_us),
            });
        }
        history
    }

    /// The features of each answered probe as the engine computes them, by the time it left.
    fn online(history: &History) -> BTreeMap<u64, FeatureVector> {
        enum Happening<'a> {
            Completed(&'a ProbeRow),
            LinkState(&'a LinkStateRow),
            Sent(&'a ProbeRow),
        }
        let mut happenings: Vec<(u64, Happening<'_>)> = Vec::new();
        for probe in &history.probes {
            happenings.push((probe.sent_us, Happening::Sent(probe)));
            happenings.push((probe.done_us, Happening::Completed(probe)));
        }
        let states = history.link_states.iter();
        happenings.extend(states.map(|state| (state.at_us, Happening::LinkState(state))));
        happenings.sort_by_key(|(at, _)| *at);

        let mut histories = RouteHistories::default();
        let mut links = LinkHistories::default();
        let mut features = BTreeMap::new();
        for (at, happening) in happenings {
            match happening {
                Happening::Completed(probe) => {
                    let route: Route = probe.route.parse().unwrap();
                    histories.probed(&route, Timestamp(at), probe.rtt_us);
                    links.delivered(&route, probe.rtt_us);
                }
                Happening::LinkState(state) => {
                    let neighbour: NodeId = state.neighbour.parse().unwrap();
                    let change = [(neighbour, state.quality)];
                    links.advertised(state.origin.parse().unwrap(), Timestamp(at), change);
                }
                Happening::Sent(probe) if probe.rtt_us.is_some() => {
                    let route: Route = probe.route.parse().unwrap();
                    let history = histories.of(&route);
                    features.insert(at, route_features(&route, &links, history, Timestamp(at)));
                }
                Happening::Sent(_) => {}
            }
        }
        features
    }

    fn column_us(frame: &DataFrame, name: &str) -> Vec<u64> {
        frame.column(name).unwrap().i64().unwrap().no_null_iter().map(|us| us as u64).collect()
    }

    #[test]
    fn offline_and_online_features_agree_on_random_histories() {
        for seed in 0..5 {
            let history = random_history(seed);
            let expected = online(&history);
            let frame = feature_frame(&history.probes, &history.link_states, 0).unwrap();
            assert_eq!(frame.height(), expected.len());
            assert!(frame.height() > 300, "{}", frame.height());
            let rows = feature_rows(&frame).unwrap();
            let mut known = [0; FEATURES.len()];
            let mut missing = [0; FEATURES.len()];
            for (sent_us, row) in column_us(&frame, "sent_us").into_iter().zip(&rows) {
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
            // that can be missing is missing somewhere.
            assert!(known.iter().all(|count| *count > 50), "{known:?}");
            let always = ["hop_count", "hour_sin", "hour_cos"];
            for (index, feature) in FEATURES.iter().enumerate() {
                assert_eq!(missing[index] == 0, always.contains(&feature.name), "{}", feature.name);
            }
        }
    }

    #[test]
    fn the_order_of_the_rows_and_of_the_columns_is_fixed() {
        let mut history = random_history(7);
        let frame = feature_frame(&history.probes, &history.link_states, 0).unwrap();
        let names: Vec<&str> = frame.get_column_names().iter().map(|name| name.as_str()).collect();
        assert_eq!(names[..4], KEY_COLUMNS);
        assert!(names[4..].iter().copied().eq(FEATURES.iter().map(|feature| feature.name)));
        assert!(column_us(&frame, "sent_us").is_sorted());
        history.probes.reverse();
        history.link_states.reverse();
        let again = feature_frame(&history.probes, &history.link_states, 0).unwrap();
        assert!(frame.equals_missing(&again));
    }

    #[test]
    fn earlier_probes_are_history_and_no_rows() {
        let history = random_history(8);
        let whole = feature_frame(&history.probes, &history.link_states, 0).unwrap();
        let from_us = column_us(&whole, "sent_us")[100];
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
            route: route(&[1, 2]).to_string(),
            hops: 1,
            sent_us,
            done_us,
            rtt_us: Some(done_us - sent_us),
        };
        let probes = [probe(1_000, 9_000), probe(9_000, 10_000), probe(9_001, 11_000)];
        let states = [state(999, 1.0), state(9_000, 2.0)];
        let frame = feature_frame(&probes, &states, 0).unwrap();
        assert_eq!(values(&frame, "route_last_ms").unwrap(), [MISSING, MISSING, 8.0]);
        assert_eq!(values(&frame, "link_rtt_sum_ms").unwrap(), [1.0, 1.0, 2.0]);
        assert_eq!(values(&frame, "route_jitter_ms").unwrap(), [MISSING; 3]);
    }

    #[test]
    fn nothing_gives_an_empty_frame_with_all_columns() {
        let history = random_history(9);
        for states in [&history.link_states[..], &[]] {
            let frame = feature_frame(&[], states, 0).unwrap();
            assert_eq!(frame.shape(), (0, KEY_COLUMNS.len() + FEATURES.len()));
        }
        let frame = feature_frame(&history.probes, &[], 0).unwrap();
        let sums = values(&frame, "link_rtt_sum_ms").unwrap();
        assert!(sums.iter().all(|sum| *sum == MISSING));
    }
}
