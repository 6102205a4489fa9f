//! Values that repeat: held samples, constants, and a coarse resolution.

use std::collections::BTreeMap;

use super::{Series, Warning, row_count};
use crate::learn::evaluate::{ACCURATE_MS, ACCURATE_SHARE};

/// Steps that clocks and tools round to (ms), coarse to fine. 15.625 is the timer of Windows, 4
/// the tick of many Linux kernels.
const STEPS_MS: [f64; 17] = [
    1_000.0, 500.0, 200.0, 100.0, 50.0, 20.0, 15.625, 10.0, 5.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1,
    0.01, FINEST_MS,
];
/// The finest resolution that matters: the store counts microseconds.
const FINEST_MS: f64 = 0.001;
/// Share of the values that must be multiples of a step.
const ON_STEP_SHARE: f64 = 0.99;
/// Multiples of a step that must occur, so that a constant is not taken for a step.
const MULTIPLES_MIN: usize = 3;
/// How far a value may lie beside a multiple, as a share of the value: that of a 32-bit float.
const ROUNDING: f64 = 1e-6;

/// Changes that a route must show before its repeats are judged.
const CHANGES_MIN: usize = 4;
/// Median change (steps) up to which the resolution explains any number of repeats.
const SMALL_CHANGE_STEPS: f64 = 2.0;
/// Share of unexplained repeats that is worth a warning: by so much 'last value' is too good.
pub const HELD_SHARE: f64 = 0.05;

/// Values that make a constant suspicious.
const CONSTANT_ROWS: usize = 20;
/// A resolution of this share of the value explains a constant. Queues and clocks move any round
/// trip by more than 1 %.
const CONSTANT_STEP_SHARE: f64 = 0.01;

/// Step from which values are coarse, as a share of their median. A guess: a quarter of the
/// tolerance.
const COARSE_SHARE: f64 = ACCURATE_SHARE / 4.0;

/// The largest step that the values are multiples of; the finest when there is none.
pub(super) fn step_ms(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let count = values.clone().count() as f64;
    let fits = |step: f64| {
        let (mut on, mut multiples) = (0_usize, std::collections::BTreeSet::new());
        for value in values.clone() {
            let multiple = (value / step).round();
            if (value - multiple * step).abs() <= ROUNDING * value.abs() {
                on += 1;
                if multiples.len() < MULTIPLES_MIN {
                    multiples.insert(multiple as i64);
                }
            }
        }
        multiples.len() >= MULTIPLES_MIN && on as f64 >= ON_STEP_SHARE * count
    };
    STEPS_MS.into_iter().find(|step| fits(*step)).unwrap_or(FINEST_MS)
}

/// Repeats of one route.
struct Repeats {
    /// Pairs of consecutive values.
    pairs: usize,
    /// Of these, equal ones.
    equal: usize,
    /// Equal ones beyond what the resolution or a stable route explains.
    held: f64,
}

/// Two things explain that a value equals the one before. Values far apart in time are equal as
/// often on a stable route, spikes or not: what is held is equal to its neighbours only. And slow
/// drift changes by one step now and then: were changes two-sided geometric with the median that
/// they have, so many of them would be zero.
fn repeats(series: &Series<'_>, step_ms: f64) -> Repeats {
    let values: Vec<f64> = series.values().collect();
    let pairs = values.len().saturating_sub(1);
    let mut runs = values.clone();
    runs.dedup();
    let changes = runs.len().saturating_sub(1);
    let equal = pairs - changes;
    let none = Repeats { pairs, equal, held: 0.0 };
    if changes < CHANGES_MIN {
        return none;
    }
    let step_ms = step_ms.max(self::step_ms(values.iter().copied()));
    let mut steps: Vec<f64> =
        runs.windows(2).map(|pair| (pair[1] - pair[0]).abs() / step_ms).collect();
    steps.sort_unstable_by(f64::total_cmp);
    let change = super::median(&steps);
    if change <= SMALL_CHANGE_STEPS {
        return none;
    }
    let ratio = 0.5_f64.powf(1.0 / change);
    let drift = (1.0 - ratio) / (1.0 + ratio);
    let explained = drift.max(collisions(values)) * pairs as f64;
    Repeats { held: (equal as f64 - explained).max(0.0), ..none }
}

/// Probability that two of at least two values, drawn at random, are equal.
fn collisions(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let count = values.len() as f64;
    let same = values.chunk_by(|a, b| a == b).map(|run| run.len() as f64);
    same.map(|run| run * (run - 1.0)).sum::<f64>() / (count * (count - 1.0))
}

pub(super) fn held(all: &[Series<'_>], step_ms: f64) -> Option<Warning> {
    let (mut pairs, mut equal, mut held, mut routes) = (0, 0, 0.0, 0);
    for series in all {
        let repeats = repeats(series, step_ms);
        pairs += repeats.pairs;
        equal += repeats.equal;
        held += repeats.held;
        routes += usize::from(repeats.held > HELD_SHARE * repeats.pairs as f64);
    }
    let count = pairs.max(1) as f64;
    let (equal, share) = (equal as f64 / count, held / count);
    (share > HELD_SHARE).then(|| Warning {
        name: "held-samples",
        seen: format!(
            "{:.1} % of values equal the one before; {:.1} %, on {routes} of {} routes, are \
             more than the resolution ({step_ms} ms) and stable routes explain",
            100.0 * equal,
            100.0 * share,
            all.len(),
        ),
        why: "a sample that is held until the next one is measured makes 'last value' exact: it \
              predicts the copy, not the network",
        advice: "keep only the first row of each held run, with the time at which it was measured",
        figures: BTreeMap::from([("equal_share", equal), ("held_share", share)]),
    })
}

pub(super) fn constant(all: &[Series<'_>], step_ms: f64) -> Option<Warning> {
    let is_constant = |series: &&Series<'_>| {
        let mut values = series.values();
        let Some(first) = values.next() else { return false };
        let (count, same) =
            values.fold((1, true), |(count, same), value| (count + 1, same && value == first));
        same && count >= CONSTANT_ROWS && step_ms <= CONSTANT_STEP_SHARE * first
    };
    let constant: Vec<&Series<'_>> = all.iter().filter(is_constant).collect();
    let first = constant.first()?;
    let rows: usize = constant.iter().map(|series| series.rows.len()).sum();
    let share = rows as f64 / row_count(all) as f64;
    Some(Warning {
        name: "constant",
        seen: format!(
            "{} of {} routes, with {:.1} % of the rows, never change, such as {}, at a resolution \
             of {step_ms} ms",
            constant.len(),
            all.len(),
            100.0 * share,
            first.key,
        ),
        why: "no network is that steady: these are placeholders or a stuck probe, and anybody \
              predicts them exactly",
        advice: "leave these routes out of every accuracy",
        figures: BTreeMap::from([("routes", constant.len() as f64), ("share", share)]),
    })
}

pub(super) fn quantised(all: &[Series<'_>], step_ms: f64, median_ms: f64) -> Option<Warning> {
    if step_ms < ACCURATE_MS && step_ms < COARSE_SHARE * median_ms {
        return None;
    }
    let (mut pairs, mut good, mut faked) = (0_usize, 0_usize, 0.0);
    for series in all {
        let values: Vec<f64> = series.values().collect();
        for pair in values.windows(2) {
            let tolerance = (ACCURATE_SHARE * pair[1]).max(ACCURATE_MS);
            let difference = (pair[1] - pair[0]).abs();
            pairs += 1;
            if difference <= tolerance {
                good += 1;
                faked += beyond(difference, tolerance, step_ms);
            }
        }
    }
    if pairs == 0 {
        return None;
    }
    let count = pairs as f64;
    let (good, faked) = (good as f64 / count, faked / count);
    Some(Warning {
        name: "quantised",
        seen: format!(
            "values are multiples of {step_ms} ms (median {median_ms:.1} ms); 'last value' is right \
             in {:.1} %, and {:.1} % may be right by rounding alone",
            100.0 * good,
            100.0 * faked,
        ),
        why: "rounding hides differences below the step: predictions look exact where the truth \
              moved, and errors near the tolerance are decided by the rounding",
        advice: "state the step beside the accuracy, and do not read differences below the faked \
                 share; measure with a finer clock",
        figures: BTreeMap::from([
            ("step_ms", step_ms),
            ("last_value_accuracy", good),
            ("faked_share", faked),
        ]),
    })
}

/// Probability that two values, each anywhere within half a step of its recorded one, differ by
/// more than the tolerance, when the recorded ones differ by `difference`, which is not more. The
/// rounding errors of both together are triangular between a step below and a step above.
fn beyond(difference: f64, tolerance: f64, step: f64) -> f64 {
    let tail = |distance: f64| (1.0 - (distance / step).min(1.0)).powi(2) / 2.0;
    tail(tolerance - difference) + tail(tolerance + difference)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::super::tests::{Rows, found, names, sound};
    use super::*;

    /// Each value kept for so many rows of its route.
    fn hold(rows: &mut Rows, length: usize) {
        let mut last: Option<(String, Option<f64>)> = None;
        for (index, (key, _, value)) in rows.iter_mut().enumerate() {
            match &last {
                Some((same, kept)) if same == key && index % length != 0 => *value = *kept,
                _ => last = Some((key.clone(), *value)),
            }
        }
    }

    fn round(rows: &mut Rows, step: f64) {
        for (_, _, value) in rows {
            *value = value.map(|value| (value / step).round().max(1.0) * step);
        }
    }

    #[test]
    fn held_samples_are_seen_whatever_their_length() {
        for length in [2, 5, 40] {
            let mut rows = sound(1);
            hold(&mut rows, length);
            assert_eq!(names(&rows), ["held-samples"], "{length}");
            let equal = 1.0 - 1.0 / length as f64;
            let figures = &found(&rows)[0].figures;
            assert!((figures["equal_share"] - equal).abs() < 0.02, "{figures:?}");
            assert!(figures["held_share"] > 0.8 * equal, "{figures:?}");
        }
    }

    #[test]
    fn held_samples_are_seen_through_a_coarse_step() {
        let mut rows = sound(1);
        // Noise of twenty steps and more, each value held four times.
        rows.iter_mut().for_each(|(_, _, value)| *value = value.map(|value| 50.0 * value));
        round(&mut rows, 10.0);
        assert_eq!(names(&rows), ["quantised"]);
        hold(&mut rows, 4);
        assert_eq!(names(&rows), ["held-samples", "quantised"]);
    }

    #[test]
    fn a_stable_or_drifting_route_at_a_coarse_step_is_not_held() {
        let mut random = Pcg64Mcg::seed_from_u64(4);
        let drifting = |index: usize| 500.0 + 300.0 * (index as f64 / 40.0).sin();
        for drifts in [false, true] {
            let mut rows = sound(1);
            for (index, (_, _, value)) in rows.iter_mut().enumerate() {
                // Noise far below the step; now and then a spike of many.
                let spikes = !drifts && random.random_bool(0.05);
                let spike = if spikes { random.random_range(100.0..900.0) } else { 0.0 };
                let level = if drifts { drifting(index) } else { 200.0 };
                *value = value.and(Some(level + spike));
            }
            round(&mut rows, 10.0);
            let warnings = found(&rows);
            let [only] = &warnings[..] else { panic!("{warnings:?}") };
            assert_eq!((only.name, only.figures["step_ms"]), ("quantised", 10.0));
        }
    }

    #[test]
    fn the_step_is_found_and_what_it_fakes() {
        let mut random = Pcg64Mcg::seed_from_u64(3);
        // Anywhere between 10 and 30 ms: most of what looks right at 20 ms steps is not.
        let truth: Vec<f64> = (0..4_000).map(|_| random.random_range(10.0..30.0)).collect();
        let good = truth.windows(2).filter(|pair| {
            (pair[1] - pair[0]).abs() <= (ACCURATE_SHARE * pair[1]).max(ACCURATE_MS)
        });
        let good = good.count() as f64 / 3_999.0;
        for (step, fakes) in [(0.1, false), (4.0, true), (10.0, true)] {
            let mut rows: Rows = truth
                .iter()
                .enumerate()
                .map(|(index, value)| (format!("{}", index / 800), index as u64, Some(*value)))
                .collect();
            round(&mut rows, step);
            let warnings = found(&rows);
            let quantised = warnings.iter().find(|warning| warning.name == "quantised");
            assert_eq!(quantised.is_some(), fakes, "{step}");
            let Some(Warning { figures, .. }) = quantised else { continue };
            assert_eq!(figures["step_ms"], step);
            let faked = figures["last_value_accuracy"] - good;
            // An upper bound on what was gained, and of its order.
            assert!(figures["faked_share"] > faked - 0.02, "{figures:?}, {faked}");
            assert!(figures["faked_share"] < 0.4, "{figures:?}, {faked}");
        }
    }

    #[test]
    fn steps_are_told_from_chance_and_from_constants() {
        let step = |values: &[f64]| step_ms(values.iter().copied());
        assert_eq!(step(&[10.0, 20.0, 40.0, 70.0]), 10.0);
        assert_eq!(step(&[15.625, 31.25, 46.875]), 15.625);
        assert_eq!(step(&[10.0, 20.0, 40.0, 70.5]), 0.5);
        assert_eq!(step(&[f64::from(10.1_f32), f64::from(20.3_f32), f64::from(40.4_f32)]), 0.1);
        assert_eq!(step(&[100.0, 100.0, 100.0]), FINEST_MS);
        assert_eq!(step(&[]), FINEST_MS);
    }

    #[test]
    fn what_is_rounded_away_is_that_of_two_even_errors() {
        assert_eq!(beyond(0.0, 5.0, 10.0), 0.25);
        assert_eq!(beyond(0.0, 10.0, 10.0), 0.0);
        assert_eq!(beyond(10.0, 10.0, 10.0), 0.5);
        assert_eq!(beyond(0.0, 0.0, 10.0), 1.0);
    }

    #[test]
    fn a_route_that_never_changes_is_named() {
        let mut rows = sound(1);
        for (key, _, value) in &mut rows {
            if key == "route 3" {
                *value = Some(80.0);
            }
        }
        let warnings = found(&rows);
        let [only] = &warnings[..] else { panic!("{warnings:?}") };
        assert!(only.name == "constant" && only.seen.contains("route 3"), "{only:?}");
        round(&mut rows, 10.0);
        assert_eq!(names(&rows), ["quantised"], "the step explains it");
    }
}
