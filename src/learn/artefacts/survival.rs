//! Survivor bias: rows that are missing because they would have been bad.

use std::collections::BTreeMap;

use super::{Series, Warning, row_count};

/// Rows below which a route's usual interval and level are not known.
const SERIES_ROWS_MIN: usize = 10;
/// A gap this many times the usual one is a silence; one lost round is not.
const SILENCE_GAPS: f64 = 3.0;
/// Quantile of a route's values above which they are bad.
const BAD_QUANTILE: f64 = 0.9;
/// Silences below which nothing is said.
const SILENCES_MIN: usize = 20;
/// How many times likelier silence must be after a bad value. A guess: less does not move an
/// accuracy by what one would quote.
const RATIO_MIN: f64 = 1.5;
/// How many standard errors the difference must be: 4 is chance once in 30,000.
const ERRORS_MIN: f64 = 4.0;

/// Routes, rows a route and time (µs: one day) from which a complete grid is no chance. Machines,
/// networks and their paths do not all live for days.
const GRID_ROUTES: usize = 20;
const GRID_ROWS: usize = 10;
const GRID_US: u64 = 86_400_000_000;

/// Values by what came after them.
#[derive(Default)]
struct Followed {
    values: usize,
    by_silence: usize,
}

impl Followed {
    fn share(&self) -> f64 {
        self.by_silence as f64 / self.values.max(1) as f64
    }
}

/// Compares what follows bad and lost values with what follows the others. Silence includes the
/// end of a route's rows, when that is long before the end of all.
pub(super) fn survivors(all: &[Series<'_>]) -> Option<Warning> {
    let end_us = all.iter().filter_map(|series| series.rows.last()).map(|(at, _)| *at).max()?;
    let (mut bad, mut rest) = (Followed::default(), Followed::default());
    for series in all.iter().filter(|series| series.rows.len() >= SERIES_ROWS_MIN) {
        let rows = &series.rows;
        let mut gaps: Vec<u64> = rows.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
        gaps.sort_unstable();
        let silence_us = SILENCE_GAPS * gaps[gaps.len() / 2] as f64;
        let mut values: Vec<f64> = series.values().collect();
        values.sort_unstable_by(f64::total_cmp);
        let limit = values.get((BAD_QUANTILE * values.len() as f64) as usize);
        for (index, (at_us, value)) in rows.iter().enumerate() {
            let next_us = rows.get(index + 1).map_or(end_us, |(at_us, _)| *at_us);
            let silent = (next_us - at_us) as f64 > silence_us;
            if index + 1 == rows.len() && !silent {
                continue;
            }
            let is_bad = value.zip(limit).is_none_or(|(value, limit)| value > *limit);
            let side = if is_bad { &mut bad } else { &mut rest };
            side.values += 1;
            side.by_silence += usize::from(silent);
        }
    }
    let silences = bad.by_silence + rest.by_silence;
    let overall = silences as f64 / (bad.values + rest.values).max(1) as f64;
    let spread = 1.0 / bad.values.max(1) as f64 + 1.0 / rest.values.max(1) as f64;
    let error = (overall * (1.0 - overall) * spread).sqrt();
    let significant = bad.share() - rest.share() > ERRORS_MIN * error;
    let relevant = silences >= SILENCES_MIN && bad.share() > RATIO_MIN * rest.share();
    (significant && relevant).then(|| Warning {
        name: "survivors",
        seen: format!(
            "silence of {SILENCE_GAPS} intervals or more follows {:.2} % of {} bad values (lost, or \
             among the route's worst tenth) and {:.2} % of {} others",
            100.0 * bad.share(),
            bad.values,
            100.0 * rest.share(),
            rest.values,
        ),
        why: "what turns bad is no longer measured, so that the rows left are better and steadier \
              than the network was",
        advice: "go on probing what turned bad, at least rarely, or count each silence as a loss",
        figures: BTreeMap::from([
            ("after_bad_share", bad.share()),
            ("after_others_share", rest.share()),
            ("silences", silences as f64),
        ]),
    })
}

/// Whether every route has as many rows over the same days.
pub(super) fn complete_grid(all: &[Series<'_>]) -> Option<Warning> {
    let span = |series: &Series<'_>| {
        let (first, last) = (series.rows.first()?.0, series.rows.last()?.0);
        Some((series.rows.len(), first, last))
    };
    let (rows, first_us, last_us) = span(all.first()?)?;
    let long = rows >= GRID_ROWS && last_us - first_us >= GRID_US;
    // A round takes time: within one interval is the same round.
    let interval_us = (last_us - first_us) / rows as u64;
    let same = |series: &Series<'_>| {
        span(series).is_some_and(|(count, first, last)| {
            count == rows
                && first.abs_diff(first_us) <= interval_us
                && last.abs_diff(last_us) <= interval_us
        })
    };
    (long && all.len() >= GRID_ROUTES && all.iter().all(same)).then(|| {
        let days = (last_us - first_us) as f64 / GRID_US as f64;
        Warning {
            name: "complete-grid",
            seen: format!(
                "each of {} routes has a row in each of {rows} rounds over {days:.1} days ({} rows)",
                all.len(),
                row_count(all)
            ),
            why: "nodes that failed, left or came in between were removed: only the steadiest are \
                  left, and nothing here shows how a model does on the others",
            advice: "state that the figures are of survivors; where the raw data exist, keep all \
                     nodes and leave rows out instead of nodes",
            figures: BTreeMap::from([("routes", all.len() as f64), ("days", days)]),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Rows, found, names, sound};

    /// Takes away the rows of a route for a while after each row that `ends` it.
    fn silence(rows: &mut Rows, mut ends: impl FnMut(Option<f64>) -> bool, length_us: u64) {
        let mut until: (String, u64) = (String::new(), 0);
        rows.retain(|(key, at_us, value)| {
            if *key == until.0 && *at_us < until.1 {
                return false;
            }
            if ends(*value) {
                until = (key.clone(), at_us.saturating_add(length_us));
            }
            true
        });
    }

    #[test]
    fn silence_after_bad_values_is_seen() {
        for length_us in [60_000_000, u64::MAX] {
            let mut rows = Rows::new();
            // Enough routes that the end of each is one of many.
            for seed in 0..5 {
                let more = sound(seed).into_iter();
                rows.extend(more.map(|(key, at, value)| (format!("{seed} {key}"), at, value)));
            }
            let mut bad = 0;
            let every_fourth = |value: Option<f64>| {
                bad += usize::from(value.is_none_or(|value| value > 300.0));
                value.is_none_or(|value| value > 300.0) && bad % 4 == 0
            };
            let before = rows.len();
            silence(&mut rows, every_fourth, length_us);
            assert!(rows.len() < before);
            assert_eq!(names(&rows), ["survivors"], "{length_us}");
            let figures = &found(&rows)[0].figures;
            assert!(figures["after_bad_share"] > 2.0 * figures["after_others_share"]);
        }
    }

    #[test]
    fn silence_by_chance_is_none() {
        let mut rows = sound(1);
        let mut row = 0;
        let every_hundredth = |_| {
            row += 1;
            row % 100 == 0
        };
        silence(&mut rows, every_hundredth, 60_000_000);
        assert_eq!(names(&rows), [""; 0]);
    }

    #[test]
    fn a_grid_without_a_hole_over_days_is_one_of_survivors() {
        let hour_us = 3_600_000_000_u64;
        let at = |index: usize| index as u64 * hour_us;
        let grid = |rounds: usize| -> Rows {
            (0..25 * rounds)
                .map(|index| {
                    let (route, round) = (index / rounds, index % rounds);
                    let value = 50.0 + (index * index % 9_973) as f64 / 1e3;
                    let answered = index % 50 != 0;
                    (format!("{route:02}"), at(round) + route as u64, answered.then_some(value))
                })
                .collect()
        };
        assert_eq!(names(&grid(48)), ["complete-grid"]);
        assert_eq!(names(&grid(20)), [""; 0], "less than a day");
        let mut holed = grid(48);
        holed.remove(100);
        assert_eq!(names(&holed), [""; 0]);
    }
}
