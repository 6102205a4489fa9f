//! Learn: from the store to a model that the router may use. Only this module knows polars and
//! smartcore.
//!
//! The way of the data:
//!
//! 1. [`feature_frame`] turns probes and link states into one row per answered route probe, with
//!    the features as they were known when the probe left. The engine computes the same numbers
//!    online; a test compares them to 1e-9.
//! 2. [`train()`] holds out the newest rows, fits gradient-boosted trees to ln(ms) of the others
//!    (its distance from the last value),
//!    measures the interval and the score on the held-out ones, beside the baselines.
//! 3. [`ModelRegistry`] keeps every version as one file; the alias `champion` names the one in
//!    use. A version becomes champion only when it does at least as well as the moving average.
//! 4. [`realised_accuracy`] compares what was forecast live with what then happened.
//! 5. [`export()`] writes probes, link states, feature rows and decisions as Parquet for any other
//!    tool.
//!
//! What the offline side cannot know: a restarted node begins with empty histories, and forgets
//! the route probed longest ago when it has more than a thousand; here the past is whole. It
//! begins [`HISTORY_LEAD_US`] before the first row, coordinates and credibility with it.
//!
//! Everything here blocks and uses several threads: call it from a process or thread of its own.

pub mod dataset;
pub mod evaluate;
pub mod export;
mod frames;
mod links;
mod nodes;
#[cfg(test)]
mod random_history;
pub mod registry;
mod routes;
pub mod train;
mod windows;

use std::path::{Path, PathBuf};

use polars::error::PolarsError;

use crate::engine::measure::ProbeKind;
use crate::engine::predict::{ForestModel, ModelError};
use crate::store::{Reader, StoreError};

pub use dataset::feature_frame;
pub use evaluate::{Realised, realised_accuracy};
pub use export::{Exported, ExportedTable, export, refuse_unless_empty};
pub use registry::{ListedModel, ModelRegistry};
pub use train::{ROWS_MIN, TrainConfig, train};

/// History that is read before the first training row (µs): 2 hours. A candidate route is probed
/// every few seconds, so that its windows are full long before.
pub const HISTORY_LEAD_US: u64 = 2 * 3_600 * 1_000_000;

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
    #[error("cannot {doing}: {source}; if it is a file, check permissions and free space")]
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
    /// A version name that could leave the folder, or that is no name.
    #[error(
        "'{0}' is no model version: use 1 to 64 lower-case letters, digits, dots and hyphens, a \
         letter or digit first"
    )]
    VersionName(String),
    /// Another model has this name already.
    #[error("'{0}' exists with another content; choose another version name")]
    VersionTaken(PathBuf),
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
    #[error("cannot {doing} '{path}': {source}; check permissions and free space")]
    File {
        /// What was attempted.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
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

/// A trained model and whether it may route traffic.
#[derive(Clone, Debug)]
pub struct TrainOutcome {
    /// The model, already in the registry.
    pub model: ForestModel,
    /// Whether it is the champion now.
    pub promoted: bool,
    /// Why it was promoted or not, in one line for people.
    pub reason: String,
}

/// Trains on everything that the store holds, saves the model, and makes it champion when it
/// earns its place. `now_us` is the time of training (µs since the epoch).
///
/// # Errors
/// [`LearnError`]; the champion stays what it was.
pub fn train_from_store(
    store_path: &Path,
    models_dir: &Path,
    config: &TrainConfig,
    now_us: u64,
) -> Result<TrainOutcome, LearnError> {
    let reader = Reader::open(store_path)?;
    let from_us = reader.newest_route_probes_since(config.rows_max)?.unwrap_or(0);
    let lead_us = from_us.saturating_sub(HISTORY_LEAD_US);
    let probes = reader.probes(ProbeKind::Route, lead_us)?;
    let frame = feature_frame(&probes, &reader.link_states(lead_us)?, from_us)?;
    let model = train(&frame, config, now_us)?;
    let registry = ModelRegistry::new(models_dir);
    registry.save(&model)?;
    let promoted = model.card.earns_its_place();
    if promoted {
        registry.set_champion(&model.version)?;
    }
    let (own, average) = (&model.card.model, &model.card.moving_average);
    let reason = format!(
        "{}: {:.1} % of {} later rows predicted well (moving average {:.1} %), error {:.4} ln(ms) \
         (moving average {:.4})",
        if promoted { "promoted" } else { "not promoted" },
        100.0 * own.accuracy,
        model.card.rows_test,
        100.0 * average.accuracy,
        own.rmse_ln,
        average.rmse_ln,
    );
    Ok(TrainOutcome { model, promoted, reason })
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
        assert!(champion.version.starts_with("v1800000000000-"), "{}", champion.version);
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
        assert_eq!(registry.list().unwrap().len(), 1);
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
        assert_eq!(card.rows_train + card.rows_test, 200);
        assert_eq!(card.trained_from_us, 1_700_000_200_000_000);
    }
}
