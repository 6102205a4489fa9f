//! Training: from rows to a model with all heads, judged on the newest rows.
//!
//! The rule:
//! - Rows on which not even the moving average has an opinion are left out: online, the model is
//!   not asked there either.
//! - The split is by time, in three: the oldest rows are fitted on, on the next everything else is
//!   chosen (`head`, `reliability`), the newest only judge.
//!   No row is fitted whose answer came after the first calibration probe had left, because
//!   nobody could have known it then; nor is one calibrated on that was answered after the first
//!   test probe.
//! - What the latency trees predict is how far ln(ms) lies above a reference that is known when
//!   the probe leaves, so that levels never seen can be predicted: the better one of [`Level`] and
//!   [`LastValue`] on the calibration rows, unless the configuration says which.
//! - How pessimistic and with which margin forecasts are compared is chosen on the calibration rows
//!   too (`ranking`).
//! - Lost probes are rows of the reliability head, rows with a bandwidth those of the throughput
//!   head (`throughput`), which are split by time among themselves. A head without enough rows is
//!   left out, and the card says so.
//!
//! [`Level`]: crate::engine::predict::Level
//! [`LastValue`]: crate::engine::predict::LastValue

use std::time::Instant;

use sha2::{Digest, Sha256};

use super::card::{judge_latency, judge_reliability, known_failures};
use super::head::{self, Example, Fitted};
use super::ranking;
use super::reliability::{self, Outcome};
use super::rows::{Parts, best_reference, example, split, usable_rows};
use super::train_config::TrainConfig;
use super::{LearnError, TrainRow, throughput};
use crate::engine::predict::profile::profile;
use crate::engine::predict::schema::{FEATURES, schema_hash};
use crate::engine::predict::{
    FORMAT, FORMAT_VERSION, ForestModel, ModelCard, Reference, ReliabilityCard, ReliabilityHead,
};

/// Fewest answered rows to fit on, after the split.
pub const ROWS_FIT_MIN: usize = 50;
/// Fewest answered rows to calibrate on, and to test on: below, a 90 % interval is all there is.
pub const ROWS_HELD_MIN: usize = 10;

const LATENCY_TARGET: &str = "ln_route_rtt_ms";

/// Trains on rows in any order. `now_us` is the time of training (µs since the epoch). The same
/// rows and seed give the same model.
///
/// # Errors
/// [`LearnError::TooFewRows`], [`LearnError::Config`], [`LearnError::VersionName`],
/// [`LearnError::Fit`].
pub fn train_rows(
    rows: &[TrainRow],
    config: &TrainConfig,
    now_us: u64,
) -> Result<ForestModel, LearnError> {
    config.check()?;
    let probes = usable_rows(rows, config.rows_max, |row| !row.is_traffic());
    let carried = usable_rows(rows, config.rows_max, |row| row.bandwidth.is_some());
    let parts = split(&probes, config)?;
    let reference = config.reference.unwrap_or_else(|| best_reference(parts.calibrate));
    let (latency, examples) = fit_latency(&parts, reference, config)?;
    let (throughput, throughput_card) = throughput::fit(&carried, config)?.unzip();
    let reliability = fit_reliability(&parts, config.seed);

    let Fitted { head, shrink, clip } = latency;
    let (ranking, ranking_card) = ranking::choose(&head, &parts.known(Some).calibrate);
    let boosting = config.boosting();
    let mut card = ModelCard {
        created_us: now_us,
        trained_from_us: examples.fit[0].sent_us,
        trained_to_us: examples.fit.iter().map(|row| row.done_us).max().unwrap_or_default(),
        rows_train: examples.fit.len(),
        rows_calibrate: examples.calibrate.len(),
        seed: config.seed,
        parameters: format!(
            "smartcore XGRegressor, tree by tree with Huber's loss: trees={} depth={} \
             learning_rate={} min_child_weight={} subsample={} clip={clip:.4} shrink={shrink}",
            boosting.trees,
            boosting.depth,
            boosting.learning_rate,
            boosting.leaf_rows_min,
            boosting.subsample,
        ),
        shrink,
        ranking: Some(ranking_card),
        throughput: throughput_card,
        reliability: reliability.as_ref().ok().map(|(_, card)| *card),
        profile: profile(&examples.fit.iter().map(|row| row.features).collect::<Vec<_>>()),
        ..ModelCard::default()
    };
    let (reliability, without) = match reliability {
        Ok((head, _)) => (Some(head), None),
        Err(why) => (None, Some(why)),
    };
    let version = match &config.version {
        Some(version) => version.clone(),
        None => {
            let content = (&head, throughput.as_ref(), reliability.as_ref(), &ranking);
            version_of(&content, now_us)
        }
    };
    let mut model = ForestModel {
        format: FORMAT.into(),
        format_version: FORMAT_VERSION,
        version,
        schema_hash: schema_hash(),
        feature_names: FEATURES.iter().map(|feature| feature.name.to_owned()).collect(),
        latency: head,
        throughput,
        reliability,
        ranking,
        card: ModelCard::default(),
    };
    judge_latency(&model, &examples.test, &mut card);
    card.known_failures = known_failures(&card);
    card.known_failures.extend(without);
    model.card = card;
    Ok(model)
}

fn fit_latency<'a>(
    parts: &Parts<&'a [TrainRow]>,
    reference: Reference,
    config: &TrainConfig,
) -> Result<(Fitted, Parts<Vec<Example<'a>>>), LearnError> {
    let examples = parts.known(|row| example(row, row.rtt_ms?.ln(), reference));
    for (rows, needed, what) in [
        (examples.fit.len(), ROWS_FIT_MIN, "rows to fit on, before those held out"),
        (examples.calibrate.len(), ROWS_HELD_MIN, "rows to calibrate on"),
        (examples.test.len(), ROWS_HELD_MIN, "rows to test on"),
    ] {
        if rows < needed {
            return Err(LearnError::TooFewRows { rows, needed, what });
        }
    }
    let since = Instant::now();
    let (fit, calibrate) = (&examples.fit, &examples.calibrate);
    let fitted = head::fit(LATENCY_TARGET, reference, fit, calibrate, &config.boosting())?;
    told("latency", examples.fit.len(), since);
    Ok((fitted, examples))
}

fn fit_reliability(
    parts: &Parts<&[TrainRow]>,
    seed: u64,
) -> Result<(ReliabilityHead, ReliabilityCard), String> {
    let outcomes = parts.known(|row| Some((&row.features, row.rtt_ms.is_some())));
    let since = Instant::now();
    let head = reliability::fit(&outcomes.fit, &outcomes.calibrate, seed)?;
    told("reliability", outcomes.fit.len(), since);
    let before: Vec<Outcome<'_>> = [outcomes.fit, outcomes.calibrate].concat();
    let card = judge_reliability(&head, &before, &outcomes.test);
    Ok((head, card))
}

pub(super) fn told(head: &str, rows: usize, since: Instant) {
    tracing::info!("{head} head: {rows} rows fitted in {:.1} s", since.elapsed().as_secs_f64());
}

/// Time (ms since the epoch) and content: sorts by age, and two models never share a name.
fn version_of(content: &impl serde::Serialize, now_us: u64) -> String {
    let text = serde_json::to_vec(content).unwrap_or_default();
    let digest = Sha256::digest(text);
    let hash: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("v{}-{hash}", now_us / 1_000)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;
    use crate::engine::predict::schema::{MISSING, index_of};
    use crate::engine::predict::{FeatureVector, QualityModel};
    use crate::learn::RouteKey;

    /// Rows once a second; `fill` sets features and returns the round trip (ms).
    fn rows(count: u64, mut fill: impl FnMut(u64, &mut FeatureVector) -> f64) -> Vec<TrainRow> {
        let row = |index: u64| {
            let mut features = [MISSING; FEATURES.len()];
            let rtt_ms = Some(fill(index, &mut features));
            let sent_us = index * 1_000_000;
            TrainRow {
                key: RouteKey::default(),
                sent_us,
                done_us: sent_us + 500_000,
                rtt_ms,
                bandwidth: None,
                features,
            }
        };
        (0..count).map(row).collect()
    }

    fn set(row: &mut FeatureVector, name: &str, value: f64) {
        row[index_of(name).unwrap()] = value;
    }

    fn quick() -> TrainConfig {
        TrainConfig { trees: 25, learning_rate: 0.3, ..TrainConfig::default() }
    }

    /// The round trip is three times the links' when they are busy; the past looks the same in
    /// both cases.
    fn hidden_rule(random: &mut Pcg64Mcg, row: &mut FeatureVector) -> f64 {
        let (links, busy) = (random.random_range(10.0..100.0), random.random_range(0.0..1.0));
        set(row, "link_last_sum_ms", links);
        set(row, "link_utilisation_max", busy);
        set(row, "route_mean5_ms", 2.0 * links);
        set(row, "route_last_ms", random.random_range(1.0..3.0) * links);
        links * if busy > 0.5 { 3.0 } else { 1.0 } * random.random_range(0.97..1.03)
    }

    #[test]
    fn the_model_finds_a_rule_that_the_baselines_cannot_see() {
        let mut random = Pcg64Mcg::seed_from_u64(2);
        let rows = rows(700, |_, row| hidden_rule(&mut random, row));
        let config = TrainConfig { trees: 50, ..quick() };
        let model = train_rows(&rows, &config, 42_000_000).unwrap();
        let card = &model.card;
        assert!(card.model.accuracy > 0.8, "{card:?}");
        assert!(card.moving_average.accuracy < 0.3 && card.last_value.accuracy < 0.5, "{card:?}");
        assert!(card.model.rmse_ln < card.moving_average.rmse_ln && card.earns_its_place());
        assert_eq!((card.rows_train, card.rows_calibrate, card.rows_test), (420, 140, 140));
        assert_eq!((card.trained_from_us, card.trained_to_us), (0, 419_500_000));
        // Later rows of the same world: the interval holds what it states.
        let mut inside = 0;
        for _ in 0..500 {
            let mut row = [MISSING; FEATURES.len()];
            let truth = hidden_rule(&mut random, &mut row);
            let (low, high) = model.predict(&row).unwrap().interval_ms.unwrap();
            inside += usize::from(low <= truth && truth <= high);
        }
        assert!((425..=490).contains(&inside), "{inside} of 500 in a 90 % interval");
        let file = ForestModel::from_json(model.to_json().as_bytes()).unwrap();
        assert_eq!(file, model, "the file is accepted and exact");
    }

    #[test]
    fn high_and_low_in_turn_are_foreseen() {
        // The mean of the past is always wrong, the last value too.
        let turn = |index: u64| if index.is_multiple_of(2) { 20.0 } else { 80.0 };
        let rows = rows(400, |index, row| {
            set(row, "route_mean5_ms", 44.0 + turn(index) / 10.0);
            set(row, "route_last_ms", turn(index + 1));
            turn(index)
        });
        let model = train_rows(&rows, &TrainConfig { trees: 30, ..TrainConfig::default() }, 0);
        let card = model.unwrap().card;
        assert!(card.model.accuracy > 0.9 && card.moving_average.accuracy < 0.1, "{card:?}");
    }

    #[test]
    fn the_same_rows_and_seed_give_the_same_trees() {
        let mut random = Pcg64Mcg::seed_from_u64(3);
        let forwards = rows(200, |_, row| hidden_rule(&mut random, row));
        let backwards: Vec<TrainRow> = forwards.iter().rev().copied().collect();
        let train_with = |seed, rows: &[TrainRow]| {
            train_rows(rows, &TrainConfig { seed, ..quick() }, 1_000_000).unwrap()
        };
        let first = train_with(7, &forwards);
        assert_eq!(first, train_with(7, &forwards));
        assert_eq!(first, train_with(7, &backwards), "the order of the rows does not matter");
        let other = train_with(8, &forwards);
        assert_ne!(first.latency.trees, other.latency.trees);
        assert_ne!(first.version, other.version);
        assert!(first.version.starts_with("v1000-"), "{}", first.version);
        assert_eq!(first.version.len(), 14);
    }

    #[test]
    fn no_row_is_used_that_was_answered_after_the_next_part_began() {
        let mut rows = rows(200, |_, row| {
            set(row, "route_mean5_ms", 5.0);
            set(row, "route_last_ms", 5.0);
            5.0
        });
        // Rows before both boundaries, at 120 and 160, are answered 25 s and 12 s late.
        rows[100..120].iter_mut().for_each(|row| row.done_us += 25_000_000);
        rows[150..160].iter_mut().for_each(|row| row.done_us += 12_000_000);
        let card = train_rows(&rows, &quick(), 0).unwrap().card;
        assert_eq!((card.rows_train, card.rows_calibrate, card.rows_test), (100, 30, 40));
        assert!(card.trained_to_us < 120_000_000, "{}", card.trained_to_us);
    }

    /// Rows of a world with routes of 1 to 3 hops whose noise differs by the jitter, where busy
    /// links lose and slow probes; of every second answered row the bandwidth is known.
    fn world(seed: u64, count: u64) -> Vec<TrainRow> {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let row = |index: u64| {
            let mut features = [MISSING; FEATURES.len()];
            let hops = random.random_range(1..4_u32);
            let (base, busy) = (random.random_range(10.0..100.0), random.random_range(0.0..1.0));
            let jitter = if random.random_bool(0.5) { 0.02 } else { 0.4 };
            let around =
                |random: &mut Pcg64Mcg| base * (jitter * random.random_range(-1.0_f64..1.0)).exp();
            set(&mut features, "hop_count", hops.into());
            set(&mut features, "link_utilisation_max", busy);
            set(&mut features, "route_jitter_ms", jitter * base);
            set(&mut features, "route_spread_ln", jitter);
            set(&mut features, "link_bandwidth_min", base * 1e4);
            let [last, median3, median5, mean5] = std::array::from_fn(|_| around(&mut random));
            set(&mut features, "route_last_ms", last);
            set(&mut features, "route_median3_ms", median3);
            set(&mut features, "route_median_5_ms", median5);
            set(&mut features, "route_mean5_ms", mean5);
            let busy_now = busy > 0.7;
            let lost = random.random_bool(if busy_now { 0.3 } else { 0.01 });
            let rtt_ms = around(&mut random) * if busy_now { 1.5 } else { 1.0 };
            let bandwidth = base * 1e4 * if busy_now { 0.25 } else { 0.8 };
            TrainRow {
                key: RouteKey::default(),
                sent_us: index * 1_000_000,
                done_us: index * 1_000_000 + 500_000,
                rtt_ms: (!lost).then_some(rtt_ms),
                bandwidth: (index.is_multiple_of(2) && !lost)
                    .then_some(bandwidth * random.random_range(0.9..1.1)),
                features,
            }
        };
        (0..count).map(row).collect()
    }

    #[test]
    fn all_heads_are_fitted_and_judged_on_later_rows() {
        let model = train_rows(&world(1, 1_500), &quick(), 0).unwrap();
        let card = &model.card;
        assert_eq!(model.latency.reference, Reference::Level);
        assert!(card.shrink > 0.0 && card.earns_its_place(), "{card:?}");
        assert!(card.model.rmse_ln < 0.9 * card.level.rmse_ln, "{card:?}");
        // One split's coverage lies within 5 points of what it states; the mean of eight within 3.
        let others = (2..9).map(|seed| train_rows(&world(seed, 1_500), &quick(), 0).unwrap());
        let coverage = others.map(|other| other.card.coverage).sum::<f64>() + card.coverage;
        assert!((coverage / 8.0 - 0.9).abs() < 0.03, "{}", coverage / 8.0);
        let classes: Vec<&str> = card.classes.iter().map(|class| class.class.as_str()).collect();
        assert_eq!(classes, ["1 hop", "2 hops", "3+ hops"]);
        assert_eq!(card.classes.iter().map(|class| class.rows).sum::<usize>(), card.rows_test);

        let reliability = card.reliability.unwrap();
        assert_eq!(reliability.rows - reliability.lost, card.rows_test);
        assert!(reliability.lost > 15 && reliability.brier < 0.9 * reliability.brier_base);
        assert!(reliability.log_loss < 0.9 * reliability.log_loss_base, "{reliability:?}");

        let throughput = card.throughput.unwrap();
        assert_eq!(model.throughput.as_ref().unwrap().reference, Reference::LinkBandwidth);
        assert!(throughput.rmse_ln < 0.3 * throughput.rmse_ln_reference, "{throughput:?}");
        assert!((throughput.coverage - 0.9).abs() < 0.06, "{throughput:?}");

        let file = ForestModel::from_json(model.to_json().as_bytes()).unwrap();
        assert_eq!(file, model);
        let prediction = model.predict(&world(2, 1)[0].features).unwrap();
        assert!(prediction.delivery.is_some() && prediction.bandwidth.is_some());
    }

    #[test]
    fn the_scale_model_tells_quiet_from_noisy_routes() {
        let model = train_rows(&world(3, 1_500), &quick(), 0).unwrap();
        assert!(model.latency.scale.is_some());
        let mut inside = [(0, 0); 2];
        let mut widths = [0.0; 2];
        for row in world(4, 1_000) {
            let Some(rtt_ms) = row.rtt_ms else { continue };
            let noisy = usize::from(row.features[index_of("route_spread_ln").unwrap()] > 0.1);
            let (low, high) = model.predict(&row.features).unwrap().interval_ms.unwrap();
            inside[noisy].0 += u32::from(low <= rtt_ms && rtt_ms <= high);
            inside[noisy].1 += 1;
            widths[noisy] += (high / low).ln();
        }
        let [quiet, noisy] = inside.map(|(inside, all)| f64::from(inside) / f64::from(all));
        assert!(quiet > 0.8 && noisy > 0.8, "{quiet} {noisy}");
        assert!(widths[1] > 4.0 * widths[0], "{widths:?}");
        // Noise that is the same everywhere needs none.
        let mut random = Pcg64Mcg::seed_from_u64(5);
        let mut same = world(5, 1_000);
        for row in &mut same {
            let level = Reference::Level.ln(&row.features).unwrap();
            row.rtt_ms = Some((level + random.random_range(-0.1..0.1)).exp());
        }
        assert_eq!(train_rows(&same, &quick(), 0).unwrap().latency.scale, None);
    }

    #[test]
    fn where_nothing_can_be_learned_the_reference_alone_is_left() {
        let mut random = Pcg64Mcg::seed_from_u64(6);
        let (mut worse, mut sum) = (0, 0.0);
        for seed in 0..5 {
            let mut rows = world(10 + seed, 600);
            for row in &mut rows {
                let level = Reference::Level.ln(&row.features).unwrap();
                row.rtt_ms = Some((level + random.random_range(-0.3..0.3)).exp());
            }
            let card = train_rows(&rows, &quick(), 0).unwrap().card;
            let excess = card.model.rmse_ln / card.level.rmse_ln - 1.0;
            worse += u32::from(excess > 0.03);
            sum += card.shrink;
        }
        assert!(worse == 0 && sum < 1.6, "{worse} {sum}");
    }

    #[test]
    fn heads_without_rows_are_left_out_and_that_is_told() {
        let mut rows = world(7, 400);
        for row in &mut rows {
            row.rtt_ms = row.rtt_ms.or(Some(50.0));
            row.bandwidth = Some(f64::NAN);
        }
        let model = train_rows(&rows, &quick(), 0).unwrap();
        assert!(model.reliability.is_none() && model.throughput.is_none());
        let card = &model.card;
        assert_eq!((card.reliability, card.throughput), (None, None));
        let told = |text| card.known_failures.iter().any(|failure| failure.contains(text));
        assert!(told("no forecast of delivery: 0 lost probes"), "{:?}", card.known_failures);
    }

    #[test]
    fn the_nearer_reference_is_chosen() {
        let mut random = Pcg64Mcg::seed_from_u64(9);
        let mut reference = |near: &str, far: &[&str]| {
            let rows = rows(150, |_, row| {
                let rtt_ms = random.random_range(10.0..50.0);
                set(row, near, rtt_ms * 1.01);
                far.iter().for_each(|name| set(row, name, rtt_ms * random.random_range(0.5..2.0)));
                rtt_ms
            });
            train_rows(&rows, &quick(), 0).unwrap().latency.reference
        };
        let medians = ["route_median3_ms", "route_median_5_ms", "route_mean5_ms"];
        assert_eq!(reference("route_last_ms", &medians), Reference::LastValue);
        let level = ["route_last_ms", "route_median_5_ms", "route_mean5_ms"];
        assert_eq!(reference("route_median3_ms", &level), Reference::Level);
        // What is not known cannot be a reference.
        assert_eq!(reference("route_last_ms", &["route_mean5_ms"]), Reference::LastValue);
    }

    #[test]
    fn strange_inputs_give_a_model_or_a_clear_error() {
        let known = |row: &mut FeatureVector| {
            set(row, "route_mean5_ms", 5.0);
            set(row, "route_last_ms", 5.0);
        };
        type Fill = fn(u64) -> f64;
        let infinite: Fill =
            |index| if index.is_multiple_of(2) { f64::INFINITY } else { f64::NEG_INFINITY };
        let fine: [(&str, f64, Fill); 4] = [
            ("constant target", 5.0, |_| MISSING),
            ("zero round trip", 0.0, |_| MISSING),
            ("no numbers", 7.0, |_| f64::NAN),
            ("infinite numbers", 9.0, infinite),
        ];
        for (what, rtt_ms, second) in fine {
            let rows = rows(120, |index, row| {
                known(row);
                row[1] = second(index);
                rtt_ms
            });
            let model = train_rows(&rows, &quick(), 0).expect(what);
            ForestModel::from_json(model.to_json().as_bytes()).expect(what);
        }
        let unknown = train_rows(&rows(500, |_, _| 5.0), &quick(), 0).unwrap_err();
        assert!(matches!(unknown, LearnError::TooFewRows { rows: 0, needed: 100, .. }));
        let few = rows(99, |_, row| {
            known(row);
            5.0
        });
        let few = train_rows(&few, &quick(), 0).unwrap_err().to_string();
        assert!(few.contains("99") && few.contains("100"), "{few}");
        let wrong = train_rows(&[], &TrainConfig { trees: 0, ..quick() }, 0).unwrap_err();
        assert!(matches!(wrong, LearnError::Config { name: "trees", .. }));
    }
}
