//! Comparison: any two models, the moving average and the last value on the same rows, and each
//! model's live forecasts against what then happened.
//!
//! The rows are the newest of the store that neither model was fitted on. Held-out rows of their
//! training are among them, because otherwise there would be nothing to see for a while after each
//! training; promotion, which decides, does without.

use std::path::Path;

use serde::Serialize;

pub use super::card::PATH_CLASSES;
use super::card::class_of;
use super::choices::{Choice, choices};
use super::promotion::{self, Difference, Fair, block_length, fair, paired_difference};
use super::{LearnError, ModelRegistry, Realised, TrainRow, newest_rows, realised_accuracy, score};
use crate::engine::measure::ProbeKind;
use crate::engine::predict::profile::shifted;
use crate::engine::predict::{
    ForestModel, LastValue, Level, MovingAverage, QualityModel, Score, ln_error,
};
use crate::store::{CandidatePredictionRow, Reader};

/// Rows that are compared at most, the newest.
pub const ROWS_MAX: usize = 20_000;
/// Rows that are compared at least.
pub const ROWS_MIN: usize = 20;

/// How forecasts did on some rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Rows.
    pub rows: usize,
    /// Share predicted well, mean absolute error, root mean squared error of ln(ms).
    #[serde(flatten)]
    pub score: Score,
    /// Mean absolute error of ln(ms).
    pub loss_ln: f64,
    /// Share of rows inside the interval, of those that have one.
    pub coverage: Option<f64>,
    /// Mean width of the interval (ms).
    pub width_ms: Option<f64>,
}

/// One of those compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Contestant {
    /// Version, or name of the baseline.
    pub name: String,
    /// Forecasts that were missing or absurd; the moving average's stands in for them.
    pub failures: usize,
    /// On all rows.
    pub all: Figures,
    /// On the rows of each of [`PATH_CLASSES`].
    pub by_path: [Figures; PATH_CLASSES.len()],
    /// Its forecasts while it decided or was in shadow, on the same stretch of time.
    pub live: Option<Live>,
    /// Features that have shifted since its training, with their population stability index.
    pub shifted: Vec<(&'static str, f64)>,
}

/// Logged forecasts of one model that could be compared with what then happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Live {
    /// Probes.
    pub rows: usize,
    /// The model's.
    pub model: Score,
    /// The moving average's on the same probes.
    pub moving_average: Score,
}

/// Two models beside each other and the baselines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// When the first and the last of the rows left (µs since the epoch).
    pub from_us: u64,
    /// See `from_us`.
    pub to_us: u64,
    /// The two, and the baselines that are not among them.
    pub contestants: Vec<Contestant>,
    /// Loss of the first minus that of the second.
    pub difference: Difference,
    /// What choices by each would have cost in the decisions of the same stretch of time; empty without
    /// decisions all of whose candidates were probed.
    pub choices: Vec<Choice>,
}

/// Compares `a` and `b` on the newest rows of a store. A name is a version, `champion`,
/// `challenger`, `moving-average`, `last-value` or `level`. By default the champion meets the challenger, or
/// the moving average when there is none.
///
/// # Errors
/// [`LearnError::NoAlias`], [`LearnError::TooFewLater`], and others when store or models cannot be
/// read.
pub fn compare_in_store(
    store_path: &Path,
    models_dir: &Path,
    a: Option<&str>,
    b: Option<&str>,
) -> Result<Comparison, LearnError> {
    let registry = ModelRegistry::new(models_dir);
    let a = Named::find(&registry, a.unwrap_or("champion"))?;
    let b = match b {
        Some(name) => Named::find(&registry, name)?,
        None => match registry.challenger_version()? {
            Some(version) if version != a.name() => Named::find(&registry, &version)?,
            _ => Named::MovingAverage,
        },
    };
    let reader = Reader::open(store_path)?;
    let after_us = a.saw_to_us().max(b.saw_to_us());
    let rows = newest_rows(&reader, ROWS_MAX, after_us)?;
    let mut comparison = compare(&rows, &[&a, &b])?;
    let predictions = reader.candidate_predictions(comparison.from_us)?;
    let probes = reader.probes(ProbeKind::Route, comparison.from_us)?;
    let named = with_baselines(&[&a, &b], &BASELINES);
    comparison.choices = choices(&reader, comparison.from_us, &named)?;
    for contestant in &mut comparison.contestants {
        let realised = realised_accuracy(&forecasts_of(&predictions, &contestant.name), &probes)?;
        contestant.live = live(&realised);
    }
    Ok(comparison)
}

/// What every model is compared with.
static BASELINES: [Named; 3] = [Named::MovingAverage, Named::LastValue, Named::Level];

/// A model or a baseline.
#[derive(Clone, Debug)]
pub(super) enum Named {
    Model(Box<ForestModel>),
    MovingAverage,
    LastValue,
    Level,
}

impl Named {
    /// By version, alias or name of a baseline.
    pub(super) fn find(registry: &ModelRegistry, name: &str) -> Result<Self, LearnError> {
        Ok(match name {
            "moving-average" => Self::MovingAverage,
            "last-value" => Self::LastValue,
            "level" => Self::Level,
            name => Self::Model(Box::new(registry.load(&registry.resolve(name)?)?)),
        })
    }

    /// Who forecasts.
    pub(super) fn model(&self) -> &dyn QualityModel {
        match self {
            Self::Model(model) => model.as_ref(),
            Self::MovingAverage => &MovingAverage,
            Self::LastValue => &LastValue,
            Self::Level => &Level,
        }
    }

    /// Version, or name of the baseline.
    pub(super) fn name(&self) -> &str {
        self.model().version()
    }

    /// The newest moment of which its training saw something, rows that were held out for its
    /// calibration and card included (µs since the epoch); 0 of a baseline.
    pub(super) fn saw_to_us(&self) -> u64 {
        match self {
            Self::Model(model) => model.card.created_us,
            _ => 0,
        }
    }
}

/// These, and the baselines that are not among them.
fn with_baselines<'n>(named: &[&'n Named; 2], baselines: &'n [Named]) -> Vec<&'n Named> {
    let others = baselines.iter().filter(|other| named.iter().all(|n| n.name() != other.name()));
    named.iter().copied().chain(others).collect()
}

/// The first two of these, and the baselines that are not among them, on these rows.
fn compare(rows: &[TrainRow], named: &[&Named; 2]) -> Result<Comparison, LearnError> {
    let fair = fair(rows);
    let (Some(first), Some(last), true) = (fair.first(), fair.last(), fair.len() >= ROWS_MIN)
    else {
        return Err(LearnError::TooFewLater { rows: fair.len(), needed: ROWS_MIN });
    };
    let [a, b] = named.map(Named::model);
    let differences: Vec<f64> = fair.iter().map(|row| row.loss_ln(a) - row.loss_ln(b)).collect();
    let block = block_length(differences.len());
    let difference = paired_difference(&differences, block, promotion::SEED);
    let contestants =
        with_baselines(named, &BASELINES).into_iter().map(|one| contestant(&fair, one));
    Ok(Comparison {
        from_us: first.row.sent_us,
        to_us: last.row.sent_us,
        contestants: contestants.collect(),
        difference: difference.expect("there are rows"),
        choices: Vec::new(),
    })
}

fn contestant(fair: &[Fair<'_>], named: &Named) -> Contestant {
    let model = named.model();
    let class = |row: &Fair<'_>| class_of(&row.row.features);
    let of = |wanted: usize| figures(model, &mut fair.iter().filter(|row| class(row) == wanted));
    let features: Vec<_> = fair.iter().map(|row| &row.row.features).collect();
    Contestant {
        name: named.name().to_owned(),
        failures: fair.iter().filter(|row| !row.forecast(model).1).count(),
        all: figures(model, &mut fair.iter()),
        by_path: std::array::from_fn(of),
        live: None,
        shifted: match named {
            Named::Model(model) => shifted(&model.card.profile, &features),
            _ => Vec::new(),
        },
    }
}

fn figures(model: &dyn QualityModel, rows: &mut dyn Iterator<Item = &Fair<'_>>) -> Figures {
    let (mut pairs, mut loss, mut inside, mut width, mut intervals) = (Vec::new(), 0.0, 0, 0.0, 0);
    for row in rows {
        let forecast = row.forecast(model).0;
        pairs.push((row.truth_ms, forecast.latency_ms));
        loss += ln_error(forecast.latency_ms, row.truth_ms).abs();
        if let Some((low, high)) = forecast.interval_ms {
            intervals += 1;
            inside += usize::from(low <= row.truth_ms && row.truth_ms <= high);
            width += high - low;
        }
    }
    let rows = pairs.len();
    let share = |sum: f64| (intervals > 0).then(|| sum / intervals as f64);
    Figures {
        rows,
        score: score(pairs),
        loss_ln: loss / rows.max(1) as f64,
        coverage: share(inside as f64),
        width_ms: share(width),
    }
}

/// The logged forecasts of one version, whether it decided or was in shadow.
fn forecasts_of(logged: &[CandidatePredictionRow], version: &str) -> Vec<CandidatePredictionRow> {
    let own = |row: &CandidatePredictionRow| {
        let predicted_ms = if row.model_version == version {
            row.predicted_ms
        } else if row.challenger_version.as_deref() == Some(version) {
            row.challenger_ms
        } else {
            return None;
        };
        Some(CandidatePredictionRow { predicted_ms, ..row.clone() })
    };
    logged.iter().filter_map(own).collect()
}

fn live(realised: &Realised) -> Option<Live> {
    let (rows, moving_average) = (realised.rows, realised.moving_average);
    realised.model.map(|model| Live { rows, model, moving_average })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::{FEATURES, MISSING, index_of};
    use crate::learn::RouteKey;
    use crate::learn::registry::tests::model;

    /// A true model and one that is 10 % too high, on rows whose average is 50 % too high.
    fn rows(count: u64) -> Vec<TrainRow> {
        let row = |index: u64| {
            let truth_ms = 50.0 + (index % 10) as f64;
            let mut features = [MISSING; FEATURES.len()];
            let mut set = |name: &str, value| features[index_of(name).unwrap()] = value;
            set("hop_count", (1 + index % 4) as f64);
            set("route_last_ms", truth_ms);
            set("route_mean5_ms", 1.5 * truth_ms);
            set("route_median3_ms", 1.2 * truth_ms);
            set("route_median_5_ms", 1.2 * truth_ms);
            let (sent_us, done_us) = (1_000 + index, 2_000 + index);
            let key = RouteKey::default();
            TrainRow { key, sent_us, done_us, rtt_ms: Some(truth_ms), bandwidth: None, features }
        };
        (0..count).map(row).collect()
    }

    fn named(version: &str, off_ln: f64) -> Named {
        Named::Model(Box::new(model(version, off_ln - 0.1)))
    }

    #[test]
    fn all_are_compared_on_the_same_rows_and_by_path_class() {
        let (good, bad) = (named("v1", 0.0), named("v2", 0.1));
        let found = compare(&rows(400), &[&good, &bad]).unwrap();
        let names: Vec<_> = found.contestants.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["v1", "v2", "moving-average", "last-value", "level"]);
        assert_eq!((found.from_us, found.to_us), (1_000, 1_399));
        for contestant in &found.contestants {
            assert_eq!(contestant.all.rows, 400);
            assert_eq!(contestant.by_path.each_ref().map(|class| class.rows), [100, 100, 200]);
            assert_eq!(contestant.failures, 0);
        }
        let [first, second, average, ..] = &found.contestants[..] else { unreachable!("five") };
        assert!(first.all.loss_ln < 1e-12 && (second.all.loss_ln - 0.1).abs() < 1e-12);
        assert!((average.all.loss_ln - 1.5_f64.ln()).abs() < 1e-12);
        assert_eq!((first.all.score.accuracy, average.all.score.accuracy), (1.0, 0.0));
        // The interval is a factor of e on both sides.
        let e = std::f64::consts::E;
        assert_eq!((first.all.coverage, average.all.coverage), (Some(1.0), None));
        let mean_ms = 54.5;
        assert!((first.all.width_ms.unwrap() - mean_ms * (e - 1.0 / e)).abs() < 1e-9);
        let difference = found.difference;
        assert!((difference.mean_ln + 0.1).abs() < 1e-12 && difference.high_ln < 0.0);
        assert_eq!((difference.rows, difference.block), (400, 8));
        let json = serde_json::to_value(&found).unwrap();
        assert!(json["contestants"][0]["all"]["accuracy"].is_number(), "{json}");
    }

    #[test]
    fn a_baseline_may_be_named_and_a_silent_model_is_counted() {
        let silent = named("v1", f64::NAN);
        let found = compare(&rows(100), &[&silent, &Named::LastValue]).unwrap();
        let names: Vec<_> = found.contestants.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["v1", "last-value", "moving-average", "level"]);
        assert_eq!(found.contestants[0].failures, 100);
        assert_eq!(found.contestants[0].all, found.contestants[2].all, "it stands in");
        assert!(found.difference.low_ln > 1.0, "and failing has its price");
    }

    #[test]
    fn shifted_features_are_named_and_too_few_rows_refused() {
        let features: Vec<_> = rows(400).iter().map(|row| row.features).collect();
        let mut known = model("v1", -0.1);
        known.card.profile =
            crate::engine::predict::profile::profile(&features.iter().collect::<Vec<_>>());
        let known = Named::Model(Box::new(known));
        let found = compare(&rows(400), &[&known, &Named::MovingAverage]).unwrap();
        assert!(found.contestants[0].shifted.is_empty());
        let mut slower = rows(400);
        for row in &mut slower {
            row.features[index_of("route_last_ms").unwrap()] *= 2.0;
        }
        let found = compare(&slower, &[&known, &Named::MovingAverage]).unwrap();
        let names: Vec<_> = found.contestants[0].shifted.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["route_last_ms"]);
        let few = compare(&rows(19), &[&known, &Named::MovingAverage]).unwrap_err().to_string();
        assert!(few.contains("19") && few.contains("20 are needed"), "{few}");
    }

    #[test]
    fn forecasts_are_those_of_one_version_in_use_or_in_shadow() {
        let logged = |model: &str, shadow: Option<&str>| CandidatePredictionRow {
            route: "a>b".into(),
            at_us: 1,
            predicted_ms: Some(10.0),
            moving_average_ms: Some(20.0),
            last_value_ms: Some(30.0),
            model_version: model.into(),
            challenger_ms: Some(40.0),
            challenger_version: shadow.map(str::to_owned),
        };
        let all = [
            logged("v1", Some("v2")),
            logged("v2", None),
            logged("v2", Some("v3")),
            logged("v3", None),
        ];
        let of = |version| -> Vec<_> {
            forecasts_of(&all, version).iter().map(|row| row.predicted_ms).collect()
        };
        assert_eq!(of("v2"), [Some(40.0), Some(10.0), Some(10.0)]);
        assert_eq!(of("v1"), [Some(10.0)]);
        assert!(of("moving-average").is_empty());
    }
}
