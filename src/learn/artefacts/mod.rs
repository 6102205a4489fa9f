//! The artefact guard: what in the measurements themselves makes an accuracy look better than it
//! is. Ask it before quoting one.
//!
//! | Warning | What it looks for |
//! |---|---|
//! | `held-samples` | values that repeat although their changes are far above the resolution |
//! | `constant` | routes whose value never changes although the resolution would show it |
//! | `quantised` | values that are multiples of a coarse step |
//! | `no-failures` | not one lost probe among many |
//! | `failures-as-values` | many values exactly at the maximum, far above the rest |
//! | `survivors` | silence that follows bad values more often than others |
//! | `complete-grid` | every route measured in every round of days: the others were removed |
//! | `few-routes` | too few routes to say anything of others |
//! | `dominant-route` | one route holds most of the rows |
//!
//! It works on plain triples, so that it takes the store's probes and a trace alike. No warning
//! means that none of these was found, not that the data are sound.

mod repeats;
mod survival;

use std::collections::BTreeMap;

use serde::Serialize;

/// Rows below which nothing is said: shares of less are chance.
pub const ROWS_MIN: usize = 200;
/// Rows without a single loss that are believed. By the rule of three (Hanley and
/// Lippman-Hand, 1983) none in 3,000 bounds the loss rate at 0.1 %, which healthy wired paths
/// over the Internet reach; fewer rows prove nothing.
pub const LOSSLESS_ROWS_MAX: usize = 3_000;
/// Share of values exactly at the maximum from which it is a time-out. A free tail has its
/// maximum once.
const AT_MAXIMUM_SHARE: f64 = 0.000_5;
/// Rows at the maximum below which it is chance.
const AT_MAXIMUM_ROWS: usize = 10;
/// A time-out lies this many times above the median; below, it may be the usual value.
const AT_MAXIMUM_FACTOR: f64 = 5.0;
/// Routes below which an accuracy says nothing of any other. A guess.
pub const ROUTES_MIN: usize = 5;
/// Rows that make a route count as measured at all.
const ROUTE_ROWS_MIN: usize = 10;
/// Share of the rows from which one route is the figure.
pub const DOMINANT_SHARE: f64 = 0.8;

/// One measurement of one route or link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observation<'a> {
    /// Which route or link.
    pub key: &'a str,
    /// When (µs since any fixed moment).
    pub at_us: u64,
    /// The round trip (ms); `None` when it was lost.
    pub value_ms: Option<f64>,
}

/// An artefact that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Warning {
    /// Its name, as listed in the module's text.
    pub name: &'static str,
    /// What was seen, with numbers.
    pub seen: String,
    /// Why an accuracy on such data misleads.
    pub why: &'static str,
    /// What to do about it.
    pub advice: &'static str,
    /// The numbers behind `seen`, by name; shares are 0 to 1.
    pub figures: BTreeMap<&'static str, f64>,
}

/// One route's measurements, in order of time.
struct Series<'a> {
    key: &'a str,
    rows: Vec<(u64, Option<f64>)>,
}

impl Series<'_> {
    /// The values, lost ones left out.
    fn values(&self) -> impl Iterator<Item = f64> + '_ {
        self.rows.iter().filter_map(|(_, value)| *value)
    }
}

/// Every artefact found in these measurements; none in fewer than [`ROWS_MIN`]. Values that are
/// no numbers count as lost. The rows may be in any order.
pub fn artefacts(observations: &[Observation<'_>]) -> Vec<Warning> {
    if observations.len() < ROWS_MIN {
        return Vec::new();
    }
    let mut by_key: BTreeMap<&str, Vec<(u64, Option<f64>)>> = BTreeMap::new();
    for Observation { key, at_us, value_ms } in observations {
        let value_ms = value_ms.filter(|value| value.is_finite());
        by_key.entry(key).or_default().push((*at_us, value_ms));
    }
    let mut all: Vec<Series<'_>> =
        by_key.into_iter().map(|(key, rows)| Series { key, rows }).collect();
    all.iter_mut().for_each(|series| series.rows.sort_by_key(|(at_us, _)| *at_us));
    let mut values: Vec<f64> = all.iter().flat_map(Series::values).collect();
    values.sort_unstable_by(f64::total_cmp);
    let step_ms = repeats::step_ms(values.iter().copied());
    [
        repeats::held(&all, step_ms),
        repeats::constant(&all, step_ms),
        repeats::quantised(&all, step_ms, median(&values)),
        no_failures(&all),
        failures_as_values(&all, &values),
        survival::survivors(&all),
        survival::complete_grid(&all),
        few_routes(&all),
        dominant_route(&all),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn row_count(all: &[Series<'_>]) -> usize {
    all.iter().map(|series| series.rows.len()).sum()
}

/// The middle of sorted values; 0 of none.
fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

fn no_failures(all: &[Series<'_>]) -> Option<Warning> {
    let rows = row_count(all);
    let lost = all.iter().flat_map(|series| &series.rows).any(|(_, value)| value.is_none());
    (!lost && rows > LOSSLESS_ROWS_MAX).then(|| Warning {
        name: "no-failures",
        seen: format!("not one of {rows} probes was lost"),
        why: "real paths lose some; time-outs that are no rows make a model that never predicts a \
              failure, and an accuracy over the easy cases only",
        advice: "record every time-out as a row without a value; until then, quote the accuracy as \
                 'of answered probes'",
        figures: BTreeMap::from([("rows", rows as f64)]),
    })
}

fn failures_as_values(all: &[Series<'_>], sorted: &[f64]) -> Option<Warning> {
    let maximum = *sorted.last()?;
    // Each time anew: a maximum that is held is one.
    let arrivals = |series: &Series<'_>| {
        let mut values: Vec<f64> = series.values().collect();
        values.dedup();
        values.into_iter().filter(|value| *value == maximum).count()
    };
    let at_maximum: usize = all.iter().map(arrivals).sum();
    let share = at_maximum as f64 / sorted.len() as f64;
    let median = median(sorted);
    let many = at_maximum >= AT_MAXIMUM_ROWS && share >= AT_MAXIMUM_SHARE;
    (many && maximum >= AT_MAXIMUM_FACTOR * median).then(|| Warning {
        name: "failures-as-values",
        seen: format!(
            "{at_maximum} times among {} values one is exactly the maximum, {maximum} ms (median {median:.1} ms)",
            sorted.len()
        ),
        why: "that is how a time-out looks that was stored as a latency: whoever predicts the \
              limit is exactly right, and losses are counted as slow answers",
        advice: "store these rows as lost, without a value",
        figures: BTreeMap::from([("share", share), ("maximum_ms", maximum)]),
    })
}

fn few_routes(all: &[Series<'_>]) -> Option<Warning> {
    let routes = all.iter().filter(|series| series.rows.len() >= ROUTE_ROWS_MIN).count();
    (routes < ROUTES_MIN).then(|| Warning {
        name: "few-routes",
        seen: format!("{routes} routes with at least {ROUTE_ROWS_MIN} rows"),
        why: "the accuracy is that of these few and says nothing of any other",
        advice: "measure more routes, or name them beside the figure",
        figures: BTreeMap::from([("routes", routes as f64)]),
    })
}

fn dominant_route(all: &[Series<'_>]) -> Option<Warning> {
    let largest = all.iter().max_by_key(|series| series.rows.len())?;
    let share = largest.rows.len() as f64 / row_count(all) as f64;
    (all.len() > 1 && share > DOMINANT_SHARE).then(|| Warning {
        name: "dominant-route",
        seen: format!("{:.1} % of the rows are of {}", 100.0 * share, largest.key),
        why: "an accuracy over all rows is the accuracy of this one",
        advice: "average over routes instead of rows",
        figures: BTreeMap::from([("share", share)]),
    })
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    /// Owned observations, for tests to spoil.
    pub(super) type Rows = Vec<(String, u64, Option<f64>)>;

    pub(super) fn found(rows: &Rows) -> Vec<Warning> {
        let row = |(key, at_us, value_ms): &'_ (String, u64, Option<f64>)| {
            (key.clone(), *at_us, *value_ms)
        };
        let rows: Vec<(String, u64, Option<f64>)> = rows.iter().map(row).collect();
        let observations: Vec<Observation<'_>> = rows
            .iter()
            .map(|(key, at_us, value_ms)| Observation { key, at_us: *at_us, value_ms: *value_ms })
            .collect();
        artefacts(&observations)
    }

    pub(super) fn names(rows: &Rows) -> Vec<&'static str> {
        found(rows).into_iter().map(|warning| warning.name).collect()
    }

    /// Twenty routes, each measured 300 times, about every 10 s: a level, noise of 10 %, now and
    /// then a spike, 1 % lost, 5 % not measured. Nothing is wrong with them.
    pub(super) fn sound(seed: u64) -> Rows {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let mut rows = Rows::new();
        for route in 0..20 {
            let level: f64 = random.random_range(20.0..200.0);
            for index in 0..300_u64 {
                let at_us = index * 10_000_000 + random.random_range(0..1_000_000);
                let spike = if random.random_bool(0.03) { 5.0 } else { 1.0 };
                let value: f64 = level * random.random_range(0.9..1.1) * spike;
                let value = (value * 1e3).round() / 1e3;
                let answered = !random.random_bool(0.01);
                if !random.random_bool(0.05) {
                    rows.push((format!("route {route}"), at_us, answered.then_some(value)));
                }
            }
        }
        rows
    }

    #[test]
    fn sound_data_give_no_warning() {
        for seed in 0..10 {
            assert_eq!(found(&sound(seed)), [], "seed {seed}");
        }
    }

    #[test]
    fn of_few_rows_nothing_is_said() {
        let rows: Rows = (0..ROWS_MIN as u64).map(|at| ("a".into(), at, Some(10.0))).collect();
        assert!(!names(&rows).is_empty());
        assert_eq!(names(&rows[1..].to_vec()), [""; 0]);
        assert_eq!(names(&Rows::new()), [""; 0]);
    }

    #[test]
    fn a_log_without_any_loss_is_implausible() {
        let mut rows = sound(1);
        rows.iter_mut().for_each(|(_, _, value)| *value = value.or(Some(50.0)));
        assert_eq!(names(&rows), ["no-failures"]);
        rows.truncate(LOSSLESS_ROWS_MAX);
        assert_eq!(names(&rows), [""; 0], "too few to tell");
    }

    #[test]
    fn time_outs_stored_as_latencies_are_seen() {
        let mut rows = sound(1);
        rows.iter_mut().for_each(|(_, _, value)| *value = value.or(Some(5_000.0)));
        assert_eq!(names(&rows), ["no-failures", "failures-as-values"]);
        assert_eq!(found(&rows)[1].figures["maximum_ms"], 5_000.0);
    }

    #[test]
    fn few_routes_and_a_dominant_one_are_named() {
        let all = sound(1);
        let one = |row: &(String, u64, Option<f64>)| row.0 == "route 1";
        let mut rows: Rows = all.iter().filter(|row| one(row)).cloned().collect();
        assert_eq!(names(&rows), ["few-routes"]);
        let mut others = all.iter().filter(|row| !one(row)).cloned();
        rows.extend(others.by_ref().take(rows.len() / 5));
        assert_eq!(names(&rows), ["few-routes", "dominant-route"]);
        assert!(found(&rows)[1].seen.contains("route 1"));
        rows.extend(others.take(2 * rows.len()));
        assert_eq!(names(&rows), ["few-routes"]);
    }

    #[test]
    fn values_that_are_no_numbers_count_as_lost() {
        let mut rows = sound(1);
        rows.iter_mut().for_each(|(_, _, value)| *value = value.or(Some(f64::NAN)));
        assert_eq!(names(&rows), [""; 0]);
        rows.iter_mut().for_each(|(_, _, value)| *value = Some(f64::INFINITY));
        assert_eq!(names(&rows), [""; 0], "all lost");
    }
}
