//! Promotion: which model decides.
//!
//! A newly trained model is the *challenger*. It is judged on *later* rows, those of probes that
//! left after the newest row that its training saw, held-out ones included: the held-out rows
//! have chosen its interval and perhaps more, so that it looks better on them than it is.
//!
//! - The loss of a row is the absolute error of ln(ms). What counts in the end is the share of
//!   forecasts within 20 % of the truth, and whether one is depends on this error alone; unlike the
//!   share it also tells a near miss from a far one, and unlike its square it is not made by a few
//!   rows.
//! - The differences of the losses, challenger minus champion, row by row in order of time, are not
//!   independent: probes of one route in one minute err together. Their mean gets a 95 % interval by
//!   the moving-block bootstrap (Künsch, "The jackknife and the bootstrap for general stationary
//!   observations", Annals of Statistics 1989), with blocks of about n^(1/3) rows.
//! - The challenger becomes champion when the whole interval lies below 0. Without a champion it is
//!   enough that its mean loss does not exceed the moving average's, which is what decides then.
//! - A model is judged once, just before the next one is trained, which then takes its place:
//!   nobody gets a second draw.
//!
//! The first model of a registry without a champion need not wait: it becomes champion at once when
//! its card says so ([`earns_its_place`]), since the watch (`engine::predict::watch`) drops it again
//! should its held-out rows have been luck.
//!
//! [`earns_its_place`]: crate::engine::predict::ModelCard::earns_its_place

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use serde::Serialize;

use super::{LearnError, ModelRegistry, TrainRow};
use crate::engine::predict::watch::FAILURE_LN;
use crate::engine::predict::{
    ForestModel, MovingAverage, Prediction, QualityModel, RTT_MS_MIN, ln_error,
};

/// Fewest later rows to judge on. A guess: 6 blocks of the rule n^(1/3) in each of 30 draws.
pub const LATER_ROWS_MIN: usize = 200;
/// Resamples of the bootstrap: the ends of a 95 % interval are the 25th from either side.
pub const RESAMPLES: usize = 1_000;
/// Share of resampled means within the interval.
pub const CONFIDENCE: f64 = 0.95;
/// Seed of the resamples: the same rows give the same judgement.
pub const SEED: u64 = 1;

/// A mean of paired differences with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Mean difference of the losses, ln(ms); below 0 the first one is better.
    pub mean_ln: f64,
    /// Lower end of the 95 % interval.
    pub low_ln: f64,
    /// Upper end.
    pub high_ln: f64,
    /// Rows compared.
    pub rows: usize,
    /// Rows of a block.
    pub block: usize,
}

/// Rows of a block for this many rows: n^(1/3), rounded up, the order that minimises the error of
/// the estimated variance (Künsch 1989; Hall, Horowitz and Jing 1995).
pub fn block_length(rows: usize) -> usize {
    (rows as f64).cbrt().ceil().max(1.0) as usize
}

/// Moving-block bootstrap of the mean of differences in order of time; `block` rows a block, at
/// most all. `None` without differences.
pub fn paired_difference(differences: &[f64], block: usize, seed: u64) -> Option<Difference> {
    let rows = differences.len();
    if rows == 0 {
        return None;
    }
    let block = block.clamp(1, rows);
    let mut sums = vec![0.0];
    for difference in differences {
        sums.push(sums[sums.len() - 1] + difference);
    }
    let of = |from: usize, count: usize| sums[from + count] - sums[from];
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    let mut resampled = || {
        let mut sum = 0.0;
        let mut left = rows;
        while left > 0 {
            // The last block is cut off, so that each resample has as many rows as the original.
            let count = block.min(left);
            sum += of(random.random_range(0..=rows - block), count);
            left -= count;
        }
        sum / rows as f64
    };
    let mut means: Vec<f64> = (0..RESAMPLES).map(|_| resampled()).collect();
    means.sort_unstable_by(f64::total_cmp);
    let outside = (RESAMPLES as f64 * (1.0 - CONFIDENCE) / 2.0).round() as usize;
    Some(Difference {
        mean_ln: sums[rows] / rows as f64,
        low_ln: means[outside],
        high_ln: means[RESAMPLES - 1 - outside],
        rows,
        block,
    })
}

/// A row that forecasts can be compared on: answered, and with an opinion of the moving average,
/// without which no model is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fair<'a> {
    pub(super) row: &'a TrainRow,
    /// What happened (ms).
    pub(super) truth_ms: f64,
    /// What the moving average says.
    pub(super) average: Prediction,
}

/// The rows among these, in order of time.
pub(super) fn fair(rows: &[TrainRow]) -> Vec<Fair<'_>> {
    let mut found: Vec<Fair<'_>> = rows
        .iter()
        .filter_map(|row| {
            let truth_ms = row.rtt_ms.filter(|ms| ms.is_finite())?.max(RTT_MS_MIN);
            Some(Fair { row, truth_ms, average: MovingAverage.predict(&row.features)? })
        })
        .collect();
    found.sort_by_key(|fair| fair.row.sent_us);
    found
}

impl Fair<'_> {
    /// What the router acts on: the model's forecast, or the moving average's when that is missing
    /// or absurd. Says whether it is the model's.
    pub(super) fn forecast(&self, model: &dyn QualityModel) -> (Prediction, bool) {
        let own = model.predict(&self.row.features).filter(Prediction::is_sane);
        (own.unwrap_or(self.average), own.is_some())
    }

    /// Absolute error of that, ln(ms), and [`FAILURE_LN`] more when it is not the model's own.
    pub(super) fn loss_ln(&self, model: &dyn QualityModel) -> f64 {
        let (forecast, own) = self.forecast(model);
        let failure = if own { 0.0 } else { FAILURE_LN };
        ln_error(forecast.latency_ms, self.truth_ms).abs() + failure
    }
}

/// What became of a challenger.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judgement {
    /// Its version.
    pub challenger: String,
    /// What it was compared with: the champion's version, or `moving-average`.
    pub rival: String,
    /// Challenger minus rival; `None` without later rows.
    pub difference: Option<Difference>,
    /// Whether it is the champion now.
    pub promoted: bool,
    /// Why, in one line for people.
    pub reason: String,
}

/// The rule, on rows of which only those later than `after_us` are looked at (µs since the epoch).
/// `rival` is the champion, if there is one that can be used.
pub fn judge(
    rows: &[TrainRow],
    after_us: u64,
    challenger: &dyn QualityModel,
    rival: Option<&dyn QualityModel>,
) -> Judgement {
    let later: Vec<TrainRow> = rows.iter().filter(|row| row.sent_us > after_us).copied().collect();
    let against = rival.unwrap_or(&MovingAverage);
    let differences: Vec<f64> =
        fair(&later).iter().map(|row| row.loss_ln(challenger) - row.loss_ln(against)).collect();
    let difference = paired_difference(&differences, block_length(differences.len()), SEED);
    let enough = difference.filter(|difference| difference.rows >= LATER_ROWS_MIN);
    let promoted = enough.is_some_and(|difference| match rival {
        Some(_) => difference.high_ln < 0.0,
        None => difference.mean_ln <= 0.0,
    });
    let name = challenger.version();
    let reason = match (enough, difference) {
        (Some(Difference { mean_ln, low_ln, high_ln, rows, .. }), _) => format!(
            "{name} {}: its error on {rows} later rows differs from that of {} by {mean_ln:+.4} \
             ln(ms), 95 % interval {low_ln:+.4} to {high_ln:+.4}",
            if promoted { "promoted" } else { "not promoted" },
            against.version(),
        ),
        (None, few) => format!(
            "{name} not promoted: {} later rows, {LATER_ROWS_MIN} are needed",
            few.map_or(0, |difference| difference.rows),
        ),
    };
    let (challenger, rival) = (name.to_owned(), against.version().to_owned());
    Judgement { challenger, rival, difference, promoted, reason }
}

/// Judges the registry's challenger on these rows, and promotes it when it is better. `None`
/// when there is none that can be used. `now_us` goes into the history.
///
/// # Errors
/// As [`ModelRegistry::promote`].
pub fn judge_challenger(
    registry: &ModelRegistry,
    rows: &[TrainRow],
    now_us: u64,
) -> Result<Option<Judgement>, LearnError> {
    let Some(challenger) = usable(registry.challenger()) else { return Ok(None) };
    let champion = usable(registry.champion());
    let rival = champion.as_ref().map(|model| model as &dyn QualityModel);
    let judgement = judge(rows, challenger.card.created_us, &challenger, rival);
    if judgement.promoted {
        registry.promote(&challenger.version, now_us, &judgement.reason)?;
    }
    Ok(Some(judgement))
}

/// Gives a saved, newly trained model its place: champion at once, or challenger. Returns whether
/// it is champion and why.
///
/// # Errors
/// As [`ModelRegistry::promote`].
pub fn place(
    registry: &ModelRegistry,
    model: &ForestModel,
    now_us: u64,
) -> Result<(bool, String), LearnError> {
    let champion = usable(registry.champion());
    if champion.as_ref().is_some_and(|champion| champion.version == model.version) {
        return Ok((true, "the same data gave the champion again".into()));
    }
    let (own, average) = (&model.card.model, &model.card.moving_average);
    let did = format!(
        "{:.1} % of {} later rows predicted well (moving average {:.1} %), error {:.4} ln(ms) \
         (moving average {:.4})",
        100.0 * own.accuracy,
        model.card.rows_test,
        100.0 * average.accuracy,
        own.rmse_ln,
        average.rmse_ln,
    );
    if champion.is_some() {
        registry.set_challenger(Some(&model.version))?;
        return Ok((false, format!("challenger, in shadow until it is judged: {did}")));
    }
    let had_to_go = registry.history()?.had_to_go(&model.version);
    if model.card.earns_its_place() && !had_to_go {
        let reason = format!("promoted: {did}");
        registry.promote(&model.version, now_us, &reason)?;
        return Ok((true, reason));
    }
    registry.set_challenger(Some(&model.version))?;
    Ok((false, format!("not promoted: {did}")))
}

/// A model that cannot be used is as good as none here: the next training replaces it.
fn usable(model: Result<Option<ForestModel>, LearnError>) -> Option<ForestModel> {
    model.ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::FeatureVector;
    use crate::engine::predict::schema::{FEATURES, MISSING, index_of};
    use crate::learn::RouteKey;
    use crate::learn::registry::tests::model;

    /// Predicts the truth, which stands in the first feature, times e to the power of this.
    struct Off(&'static str, f64);

    impl QualityModel for Off {
        fn version(&self) -> &str {
            self.0
        }

        fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
            Some(Prediction::of_latency(features[0] * self.1.exp()))
        }
    }

    /// Rows once a second, from 1 s; the moving average is off by `average_ln`.
    pub(crate) fn rows(count: u64, average_ln: f64) -> Vec<TrainRow> {
        let mut random = Pcg64Mcg::seed_from_u64(9);
        let row = |index: u64| {
            let truth_ms: f64 = random.random_range(20.0..80.0);
            let mut features = [MISSING; FEATURES.len()];
            features[0] = truth_ms;
            features[index_of("route_mean5_ms").unwrap()] = truth_ms * average_ln.exp();
            TrainRow {
                key: RouteKey::default(),
                sent_us: index * 1_000_000,
                done_us: index * 1_000_000 + 1,
                rtt_ms: Some(truth_ms),
                bandwidth: None,
                features,
            }
        };
        (1..=count).map(row).collect()
    }

    /// An autoregressive series around `mean`, with deviation 1.
    fn dependent(random: &mut Pcg64Mcg, count: usize, mean: f64) -> Vec<f64> {
        let mut value = 0.0;
        let mut next = || {
            let sum: f64 = (0..12).map(|_| random.random_range(0.0..1.0)).sum();
            value = 0.5 * value + 0.75_f64.sqrt() * (sum - 6.0);
            mean + value
        };
        (0..100).for_each(|_| _ = next());
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn the_interval_covers_the_mean_of_dependent_rows_and_single_rows_do_not() {
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let (mut blocks, mut single) = (0, 0);
        for seed in 0..200 {
            let series = dependent(&mut random, 1_000, 0.3);
            let covers = |block| {
                let found = paired_difference(&series, block, seed).unwrap();
                usize::from(found.low_ln <= 0.3 && 0.3 <= found.high_ln)
            };
            blocks += covers(block_length(series.len()));
            single += covers(1);
        }
        assert!((178..=199).contains(&blocks), "{blocks} of 200 with blocks");
        assert!(single < 165, "{single} of 200 row by row: the series is not dependent");
    }

    #[test]
    fn the_bootstrap_is_deterministic_and_knows_its_mean() {
        let series: Vec<f64> = (0..500).map(|index| f64::from(index % 7)).collect();
        let found = paired_difference(&series, 8, 3).unwrap();
        assert_eq!(paired_difference(&series, 8, 3), Some(found));
        assert_ne!(paired_difference(&series, 8, 4), Some(found));
        assert!((found.mean_ln - series.iter().sum::<f64>() / 500.0).abs() < 1e-12);
        assert!(found.low_ln < found.mean_ln && found.mean_ln < found.high_ln);
        assert_eq!(paired_difference(&[], 8, 3), None);
        let one = paired_difference(&[2.0], 8, 3).unwrap();
        assert_eq!((one.low_ln, one.high_ln, one.block), (2.0, 2.0, 1));
        assert_eq!([1, 8, 9, 1_000].map(block_length), [1, 2, 3, 10]);
    }

    #[test]
    fn a_challenger_is_promoted_only_when_it_is_surely_better_on_later_rows() {
        let rows = rows(600, 0.1);
        let judged = |challenger: f64, champion: f64| {
            let champion = Off("v1", champion);
            judge(&rows, 100_000_000, &Off("v2", challenger), Some(&champion))
        };
        let better = judged(0.01, 0.05);
        assert!(better.promoted, "{}", better.reason);
        assert_eq!(better.difference.unwrap().rows, 500, "only what is later than 100 s");
        assert!((better.difference.unwrap().mean_ln + 0.04).abs() < 1e-9);
        assert!(!judged(0.05, 0.01).promoted);
        assert!(!judged(0.05, 0.05).promoted, "no difference is no reason");
        let few = judge(&rows, 401_000_000, &Off("v2", 0.01), Some(&Off("v1", 0.05)));
        assert!(!few.promoted && few.reason.contains("199 later rows"), "{}", few.reason);
        let none = judge(&rows, 600_000_000, &Off("v2", 0.01), None);
        assert!(!none.promoted && none.difference.is_none());
    }

    #[test]
    fn without_a_champion_it_must_not_be_worse_than_the_moving_average() {
        let rows = rows(300, 0.1);
        for (off, promoted) in [(0.05, true), (0.1, true), (0.15, false), (f64::NAN, false)] {
            let judgement = judge(&rows, 0, &Off("v2", off), None);
            assert_eq!(judgement.rival, "moving-average");
            assert_eq!(judgement.promoted, promoted, "{}", judgement.reason);
        }
    }

    #[test]
    fn lost_probes_and_unknown_routes_are_not_compared() {
        let mut rows = rows(10, 0.1);
        rows[0].rtt_ms = None;
        rows[1].rtt_ms = Some(f64::NAN);
        rows[2].features = [MISSING; FEATURES.len()];
        rows.reverse();
        let found = fair(&rows);
        assert_eq!(found.len(), 7);
        assert!(found.is_sorted_by_key(|fair| fair.row.sent_us));
    }

    /// A registry with these models; each card says that it earns its place when `good`.
    fn registry(folder: &std::path::Path, models: &[(&str, bool)]) -> ModelRegistry {
        let registry = ModelRegistry::new(folder);
        for (version, good) in models {
            registry.save(&carded(version, *good)).unwrap();
        }
        registry
    }

    fn carded(version: &str, good: bool) -> ForestModel {
        let mut model = model(version, 0.0);
        model.card.rows_test = 100;
        model.card.moving_average.accuracy = if good { 0.0 } else { 1.0 };
        model
    }

    #[test]
    fn the_first_good_model_decides_at_once_and_the_next_ones_wait() {
        let folder = tempfile::tempdir().unwrap();
        let models = [("v1", false), ("v2", true), ("v3", true)];
        let registry = registry(folder.path(), &models);
        let versions =
            || (registry.champion_version().unwrap(), registry.challenger_version().unwrap());
        let some = |text: &str| Some(text.to_owned());
        let put = |version, good| place(&registry, &carded(version, good), 5).unwrap().0;
        assert!(!put("v1", false));
        assert_eq!(versions(), (None, some("v1")));
        assert!(put("v2", true));
        assert_eq!(versions(), (some("v2"), some("v1")));
        assert!(!put("v3", true));
        assert_eq!(versions(), (some("v2"), some("v3")));
        assert!(put("v2", true), "trained again on the same data");
        assert_eq!(versions(), (some("v2"), some("v3")));
        // One that had to go does not come back without being judged.
        registry.rollback(6, "worse").unwrap();
        assert_eq!(versions().0, None);
        assert!(!put("v2", true));
        assert_eq!(versions(), (None, some("v2")));
    }

    #[test]
    fn a_registry_s_challenger_is_judged_and_takes_over() {
        let folder = tempfile::tempdir().unwrap();
        let registry = ModelRegistry::new(folder.path());
        assert_eq!(judge_challenger(&registry, &[], 1).unwrap(), None);
        // Both predict the last value times a constant: 0.1 is their leaf.
        for (version, base) in [("v1", 0.1), ("v2", -0.1)] {
            registry.save(&model(version, base)).unwrap();
        }
        registry.promote("v1", 1, "a test").unwrap();
        registry.set_challenger(Some("v2")).unwrap();
        let mut rows = rows(300, 0.1);
        for row in &mut rows {
            row.features[index_of("route_last_ms").unwrap()] = row.features[0];
        }
        let judgement = judge_challenger(&registry, &rows, 77).unwrap().unwrap();
        assert!(judgement.promoted, "{}", judgement.reason);
        assert_eq!(registry.champion_version().unwrap().as_deref(), Some("v2"));
        assert_eq!(registry.challenger_version().unwrap(), None);
        let change = registry.history().unwrap().changes.pop_back().unwrap();
        assert_eq!((change.at_us, change.from.as_deref()), (77, Some("v1")));
        assert_eq!(change.reason, judgement.reason);
    }
}
