//! Learn: from the store to a model that the router may use. Only this module knows polars,
//! smartcore and linfa.
//!
//! The way of the data:
//!
//! 1. [`feature_frame`] turns probes and link states into one row per completed route probe, with
//!    the features as they were known when the probe left. The engine computes the same numbers
//!    online; a test compares them to 1e-9.
//! 2. [`train()`], or [`train_rows`] without a frame, fits latency, throughput and reliability on
//!    the oldest rows, chooses shrinkage, scale and intervals on later ones, and judges all of it
//!    on the newest, beside the baselines.
//! 3. [`ModelRegistry`] keeps every version as one file; the alias `champion` names the one in
//!    use, `challenger` the one in shadow, and a history leads back to earlier champions.
//! 4. [`promotion`] decides which model is which: a challenger must be better on later rows.
//! 5. [`realised_accuracy`] compares what was forecast live with what then happened, [`compare`]
//!    any two models on the same rows, [`judge_in_store`] says what another one's choices would have
//!    cost on the decisions that were logged, and [`artefacts()`] what in the measurements themselves makes
//!    such figures too good.
//! 6. [`export()`] writes probes, link states, feature rows and decisions as Parquet for any
//!    other tool; [`import_file`] takes back what XGBoost made of them.
//!
//! What the offline side cannot know: a restarted node begins with empty histories, and forgets
//! the route probed longest ago when it has more than a thousand; here the past is whole. It
//! begins [`HISTORY_LEAD_US`] before the first row, coordinates and credibility with it.
//!
//! Everything here blocks and uses several threads: call it from a process or thread of its own.

pub mod artefacts;
mod card;
pub mod choices;
pub mod compare;
mod conformal;
pub mod dataset;
pub mod evaluate;
pub mod export;
pub mod first;
mod frame_rows;
mod frames;
mod head;
pub mod history;
pub mod import;
pub mod judging;
mod links;
pub mod logged;
mod nodes;
pub mod offpolicy;
pub mod promotion;
#[cfg(test)]
mod random_history;
mod ranking;
pub mod registry;
mod regressor;
mod reliability;
mod routes;
mod rows;
mod shift;
mod slices;
mod throughput;
pub mod trace;
pub mod train;
mod train_config;
pub mod training_rows;
mod windows;
mod xgboost;

use std::path::{Path, PathBuf};

use polars::error::PolarsError;

use crate::engine::measure::ProbeKind;
use crate::engine::predict::{ForestModel, ModelError};
use crate::store::{Reader, StoreError, what_to_do};

pub use artefacts::{Observation, Warning, artefacts};
pub use compare::{Comparison, compare_in_store};
pub use dataset::feature_frame;
pub use evaluate::{Realised, realised_accuracy, score};
pub use export::{Exported, ExportedTable, export, refuse_unless_empty};
pub use frame_rows::train;
pub use head::COVERAGE;
pub use history::{Action, Change, History, Shift};
pub use import::{ImportOptions, Imported, import_file, import_xgboost};
pub use judging::{Judged, judge_in_store};
pub use logged::{Logged, Preference, logged_decisions};
pub use offpolicy::{Estimate, Estimates, LoggedDecision, OffPolicyError, judge};
pub use promotion::{Difference, Judgement};
pub use registry::{ListedModel, ModelRegistry};
pub use rows::{ROWS_MIN, RouteKey, TrainRow};
pub use train::train_rows;
pub use train_config::TrainConfig;
pub use training_rows::{TrainedRows, write_training_rows};

/// History that is read before the first training row (µs): 2 hours. A candidate route is probed
/// every few seconds, so that its windows are full long before.
pub const HISTORY_LEAD_US: u64 = 2 * 3_600 * 1_000_000;

/// The commit that this program was built from, 12 hexadecimal digits, or what the variable
/// `MESHWISE_COMMIT` said then; `unknown` without either.
pub const COMMIT: &str = env!("MESHWISE_COMMIT");

/// Learning that did not succeed. The router goes on with the model it has.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// The measurements cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Not enough measurements yet.
    #[error(
        "{rows} usable {what}, {needed} are needed; keep a tunnel open for a while, so that routes \
         are probed, and train again"
    )]
    TooFewRows {
        /// Answered route probes with a known history.
        rows: usize,
        /// How many it takes.
        needed: usize,
        /// Which rows were counted.
        what: &'static str,
    },
    /// Too little was measured since the models that are compared were trained.
    #[error(
        "{rows} usable route probes that neither model was fitted on, {needed} are needed; keep a tunnel \
         open, and wait until {} more were measured", needed - rows
    )]
    TooFewLater {
        /// Answered route probes with a known history.
        rows: usize,
        /// How many it takes: more.
        needed: usize,
    },
    /// A parameter outside its range.
    #[error("{name} is {value}, it must be {range}; change it and train again")]
    Config {
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        range: &'static str,
    },
    /// A table could not be computed, read or written.
    #[error("cannot {doing}: {source}; if it is a file, {}", what_to_do(.doing))]
    Frame {
        /// What was attempted.
        doing: &'static str,
        /// What polars says.
        source: PolarsError,
    },
    /// The library did not fit a model.
    #[error(
        "the model could not be fitted ({0}); report it with the output of 'meshwise data stats'"
    )]
    Fit(String),
    /// A file of another program that cannot become a model.
    #[error("the model cannot be imported: {0}")]
    Import(String),
    /// A version name that could leave the folder, or that is no name.
    #[error(
        "'{0}' is no model version: use 1 to 64 lower-case letters, digits, dots and hyphens, a \
         letter or digit first"
    )]
    VersionName(String),
    /// Another model has this name already.
    #[error("'{0}' exists with another content; choose another version name")]
    VersionTaken(PathBuf),
    /// An alias that holds no version.
    #[error(
        "'{path}' should hold the name of a model version and holds '{found}'; choose one with \
         'meshwise model promote VERSION'"
    )]
    Alias {
        /// The file.
        path: PathBuf,
        /// Its beginning.
        found: String,
    },
    /// An alias that names nothing yet.
    #[error(
        "there is no {0}; see 'meshwise model list', or train a model with 'meshwise model train'"
    )]
    NoAlias(&'static str),
    /// The history of champions cannot be read.
    #[error(
        "the history '{path}' is damaged ({why}); move it away: then there is no way back to earlier \
         champions, and nothing else is lost"
    )]
    History {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No such version in the registry.
    #[error("there is no model '{path}'; see 'meshwise model list', or train one")]
    NoSuchVersion {
        /// The file that is missing.
        path: PathBuf,
    },
    /// A model file is there and cannot be used.
    #[error("'{path}' cannot be used: {source}")]
    Model {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ModelError,
    },
    /// A file or folder refused an operation.
    #[error("cannot {doing} '{path}': {source}; {}", what_to_do(.doing))]
    File {
        /// What was attempted.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A trace with a row that cannot be.
    #[error(
        "the trace '{path}' cannot be used: {what}; see 'meshwise replay --help' for the format"
    )]
    Trace {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A log that does not tell what a model's choices would have cost.
    #[error("{version} cannot be judged on what was logged: {why}")]
    NotJudged {
        /// The model.
        version: String,
        /// Why, and what to do.
        why: String,
    },
    /// An export would mix with what is there.
    #[error("'{0}' is not empty; name another folder, or replace an earlier export with --force")]
    NotEmpty(PathBuf),
}

/// For `map_err`: a polars error with what was attempted.
fn frame_error(doing: &'static str) -> impl Fn(PolarsError) -> LearnError {
    move |source| LearnError::Frame { doing, source }
}

/// For `map_err`: a file error with what was attempted and where.
fn file_error(doing: &'static str, path: &Path) -> impl Fn(std::io::Error) -> LearnError {
    move |source| LearnError::File { doing, path: path.to_owned(), source }
}

/// A trained model and its place.
#[derive(Clone, Debug)]
pub struct TrainOutcome {
    /// The model, already in the registry.
    pub model: ForestModel,
    /// Whether it is the champion now.
    pub promoted: bool,
    /// Why it was promoted or not, in one line for people.
    pub reason: String,
    /// What became of the challenger before, if there was one.
    pub judged: Option<Judgement>,
}

/// Judges the challenger on everything that the store holds, notes how far the features have shifted
/// since the champion's training, then trains a new model, saves it and
/// [gives it its place](promotion). `now_us` (µs since the epoch) goes into the history only: the
/// same measurements, seed and program give the same file, whenever it is trained. Of the program
/// only [`COMMIT`] is in the file, which is written into the card here; a version that another
/// commit has trained to the same model stays as it is.
///
/// # Errors
/// [`LearnError`]; what was judged before stays judged.
pub fn train_from_store(
    store_path: &Path,
    models_dir: &Path,
    config: &TrainConfig,
    now_us: u64,
) -> Result<TrainOutcome, LearnError> {
    let reader = Reader::open(store_path)?;
    let from_us = newest_from_us(&reader, config.rows_max, 0)?;
    let carried = slices::carried(&reader.route_slices(from_us)?);
    let rows = rows_since(&reader, from_us, &carried)?;
    let registry = ModelRegistry::new(models_dir);
    let judged = promotion::judge_challenger(&registry, &rows, now_us)?;
    shift::note(&registry, &rows, now_us)?;
    let newest_us = rows.iter().map(|row| row.done_us).max().unwrap_or(0);
    let mut model = train_rows(&rows, config, newest_us)?;
    model.card.commit = Some(COMMIT.into());
    registry.save(&model)?;
    let (promoted, reason) = promotion::place(&registry, &model, now_us)?;
    Ok(TrainOutcome { model, promoted, reason, judged })
}

/// The newest `rows_max` answered rows of a store that left after `after_us` (µs since the
/// epoch), with what was lost between them, with as much history before as features need.
fn newest_rows(
    reader: &Reader,
    rows_max: usize,
    after_us: u64,
) -> Result<Vec<TrainRow>, LearnError> {
    rows_since(reader, newest_from_us(reader, rows_max, after_us)?, &[])
}

fn newest_from_us(reader: &Reader, rows_max: usize, after_us: u64) -> Result<u64, LearnError> {
    let from_us = reader.newest_route_probes_since(rows_max)?.unwrap_or(0);
    Ok(from_us.max(after_us.saturating_add(1)))
}

/// The rows of what left at `from_us` or later: the probes of a store, and these slices.
fn rows_since(
    reader: &Reader,
    from_us: u64,
    carried: &[slices::Carried],
) -> Result<Vec<TrainRow>, LearnError> {
    let lead_us = from_us.saturating_sub(HISTORY_LEAD_US);
    let probes = reader.probes(ProbeKind::Route, lead_us)?;
    let states = reader.link_states(lead_us)?;
    let (frame, bandwidths) = dataset::frame_with_traffic(&probes, &states, carried, from_us)?;
    let mut rows = frame_rows::rows_of(&frame)?;
    rows.iter_mut().zip(bandwidths).for_each(|(row, bandwidth)| row.bandwidth = bandwidth);
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::Sample;
    use crate::engine::types::{NodeId, Route, Timestamp};
    use crate::store::{Retention, Writer};

    /// Route probes once a second whose round trip is what `rtt_us` says.
    fn store_of(path: &Path, count: u64, rtt_us: fn(u64) -> u64) {
        let writer = Writer::start(path, Retention::default()).unwrap();
        let route = Route::new([NodeId([1; 8]), NodeId([2; 8])]).unwrap();
        for index in 0..count {
            let sent_us = 1_700_000_000_000_000 + index * 1_000_000;
            writer.write(Sample::Probe {
                kind: ProbeKind::Route,
                route: route.clone(),
                sent_at: Timestamp(sent_us),
                done_at: Timestamp(sent_us + rtt_us(index)),
                rtt_us: Some(rtt_us(index)),
            });
        }
        writer.flush().unwrap();
    }

    fn config() -> TrainConfig {
        TrainConfig { trees: 30, ..TrainConfig::default() }
    }

    #[test]
    fn a_model_that_foresees_the_rhythm_is_promoted() {
        let folder = tempfile::tempdir().unwrap();
        let (store, models) = (folder.path().join("store.db"), folder.path().join("models"));
        // High and low in turn: the mean of the past is always wrong, the last value too.
        store_of(&store, 400, |index| if index % 2 == 0 { 20_000 } else { 80_000 });
        let outcome = train_from_store(&store, &models, &config(), 1_800_000_000_000_000).unwrap();
        assert!(outcome.promoted, "{}", outcome.reason);
        let card = &outcome.model.card;
        assert!(card.model.accuracy > 0.9 && card.moving_average.accuracy < 0.1, "{card:?}");
        let champion = ModelRegistry::new(&models).champion().unwrap().unwrap();
        assert_eq!(champion, outcome.model);
        let newest_ms = (1_700_000_000_000_000_u64 + 399 * 1_000_000 + 80_000) / 1_000;
        let name = format!("v{newest_ms}-");
        assert!(champion.version.starts_with(&name), "{}", champion.version);
        assert_eq!(card.created_us / 1_000, newest_ms);
        assert_eq!(card.commit.as_deref(), Some(COMMIT));
        assert_eq!(card.profile.len(), crate::engine::predict::schema::FEATURES.len());
    }

    #[test]
    fn a_model_that_is_worse_is_kept_and_not_promoted() {
        let folder = tempfile::tempdir().unwrap();
        let (store, models) = (folder.path().join("store.db"), folder.path().join("models"));
        // High and low in turn, until that ends: what was learned is wrong from then on.
        store_of(&store, 400, |index| if index < 300 && index % 2 == 0 { 80_000 } else { 20_000 });
        let outcome = train_from_store(&store, &models, &config(), 1).unwrap();
        assert!(!outcome.promoted, "{}", outcome.reason);
        let registry = ModelRegistry::new(&models);
        assert_eq!(registry.champion().unwrap(), None);
        assert_eq!(registry.challenger().unwrap(), Some(outcome.model));
        assert_eq!(registry.list().unwrap().len(), 1);
    }

    #[test]
    fn the_same_data_and_seed_give_the_same_file_at_any_time() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store.db");
        store_of(&store, 400, |index| 20_000 + index * 7_919 % 10_007);
        let trained = |name: &str, seed, now_us| {
            let models = folder.path().join(name);
            let config = TrainConfig { seed, ..config() };
            let outcome = train_from_store(&store, &models, &config, now_us).unwrap();
            let path = models.join(format!("{}.json", outcome.model.version));
            (outcome.model.version, std::fs::read(path).unwrap())
        };
        let first = trained("a", 1, 1_800_000_000_000_000);
        assert_eq!(trained("b", 1, 1_900_000_000_000_000), first);
        assert_ne!(trained("c", 2, 1_800_000_000_000_000).0, first.0);
    }

    #[test]
    fn a_challenger_is_judged_on_what_came_after_it_before_the_next_one_takes_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let (store, models) = (folder.path().join("store.db"), folder.path().join("models"));
        let rhythm = |index| if index % 2 == 0 { 20_000 } else { 80_000 };
        store_of(&store, 300, rhythm);
        let first = train_from_store(&store, &models, &config(), 1).unwrap();
        assert!(first.promoted && first.judged.is_none(), "{}", first.reason);
        // Another rule from now on: the first model is always wrong.
        let shifted = |index| {
            let early = index < 300;
            if index % 2 == 0 && early || index % 3 == 0 && !early { 20_000 } else { 80_000 }
        };
        let fill = |from: u64, to: u64| {
            let writer = Writer::start(&store, Retention::default()).unwrap();
            let route = Route::new([NodeId([1; 8]), NodeId([2; 8])]).unwrap();
            for index in from..to {
                let sent_us = 1_700_000_000_000_000 + index * 1_000_000;
                writer.write(Sample::Probe {
                    kind: ProbeKind::Route,
                    route: route.clone(),
                    sent_at: Timestamp(sent_us),
                    done_at: Timestamp(sent_us + shifted(index)),
                    rtt_us: Some(shifted(index)),
                });
            }
            writer.flush().unwrap();
        };
        fill(300, 1_200);
        let second = train_from_store(&store, &models, &config(), 2).unwrap();
        assert!(!second.promoted && second.judged.is_none(), "{}", second.reason);
        let shift = ModelRegistry::new(&models).history().unwrap().shift.unwrap();
        assert_eq!((shift.version, shift.rows, shift.at_us), (first.model.version.clone(), 900, 2));
        fill(1_200, 1_500);
        let third = train_from_store(&store, &models, &config(), 3).unwrap();
        let judged = third.judged.unwrap();
        assert_eq!(judged.challenger, second.model.version);
        assert_eq!(judged.rival, first.model.version);
        assert!(judged.promoted, "{}", judged.reason);
        assert_eq!(judged.difference.unwrap().rows, 300, "only what came after it");
        let registry = ModelRegistry::new(&models);
        assert_eq!(registry.champion_version().unwrap(), Some(judged.challenger));
        assert_eq!(registry.challenger_version().unwrap(), Some(third.model.version));
    }

    #[test]
    fn a_route_slower_than_everything_before_is_still_predicted() {
        let folder = tempfile::tempdir().unwrap();
        let (store, models) = (folder.path().join("store.db"), folder.path().join("models"));
        // Ever slower: the newest rows lie far above everything that was fitted on.
        store_of(&store, 400, |index| 10_000 + index * index * 10);
        let card = train_from_store(&store, &models, &config(), 1).unwrap().model.card;
        assert!(card.model.accuracy > 0.99 && card.model.rmse_ln < 0.02, "{card:?}");
    }

    #[test]
    fn too_few_rows_are_counted_in_the_message() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store.db");
        store_of(&store, 60, |_| 5_000);
        let error = train_from_store(&store, folder.path(), &config(), 1).unwrap_err();
        // The first probe has no history to predict from.
        let text = error.to_string();
        assert!(text.contains("59") && text.contains("100"), "{text}");
    }

    #[test]
    fn only_the_newest_rows_are_read_with_their_history() {
        let folder = tempfile::tempdir().unwrap();
        let (store, models) = (folder.path().join("store.db"), folder.path().join("models"));
        store_of(&store, 400, |index| 20_000 + index);
        let config = TrainConfig { rows_max: 200, ..config() };
        let card = train_from_store(&store, &models, &config, 1).unwrap().model.card;
        assert_eq!(card.rows_train + card.rows_calibrate + card.rows_test, 200);
        assert_eq!(card.trained_from_us, 1_700_000_200_000_000);
    }
}
