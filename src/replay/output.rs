//! What a replay leaves in its folder: every decision as Parquet, pictures, the measurements in a
//! store, the rows of a last training, and the last model.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::meshwise::EPOCH_S;
use super::policy::{MESHWISE, NAMES};
use super::run::Run;
use super::{Quantity, ReplayConfig, ReplayError, TraceWorld, charts};
use crate::engine::measure::{ProbeKind, Sample};
use crate::engine::types::{Route, Timestamp};
use crate::learn::trace::{ReplayDecisionRow, write_decisions};
use crate::learn::{
    COMMIT, LearnError, ModelRegistry, TrainedRows, refuse_unless_empty, write_training_rows,
};
use crate::store::{QUEUE_MAX, Retention, Writer};

/// File of all decisions.
pub const DECISIONS: &str = "decisions.parquet";
/// File of all measurements: the name that a node gives its own, so that the folder is a data
/// directory to 'data stats', 'data export' and 'model train'.
pub const STORE: &str = "meshwise.db";

/// File of the rows that a model was trained on at the end of each seed.
pub const TRAINING_ROWS: &str = "training_rows.parquet";
/// Folder of the models.
const MODELS: &str = "models";
/// How the names of a replay's models begin.
const VERSIONS: &str = "replay-";

/// Makes the folder, or refuses it when something is in it. With `force`, removes what an earlier replay
/// left there and nothing else; a folder with a store that is no replay's is refused all the same.
///
/// # Errors
/// [`LearnError::NotEmpty`], [`LearnError::File`].
pub fn make_room(folder: &Path, force: bool) -> Result<(), LearnError> {
    // A node's data directory has a store of this name too.
    let is_replay = folder.join(DECISIONS).exists() || !folder.join(STORE).exists();
    refuse_unless_empty(folder, force && is_replay)?;
    let wrong = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| LearnError::File { doing, path, source }
    };
    fs::create_dir_all(folder).map_err(wrong("make the folder", folder))?;
    let log = |end: &str| format!("{STORE}{end}");
    let mut old: Vec<PathBuf> = [DECISIONS, TRAINING_ROWS, STORE, &log("-wal"), &log("-shm")]
        .map(|n| folder.join(n))
        .into();
    old.extend(charts::FILES.map(|name| folder.join(name)));
    if let Ok(models) = fs::read_dir(folder.join(MODELS)) {
        let is_ours = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(VERSIONS))
        };
        old.extend(models.filter_map(|entry| Some(entry.ok()?.path())).filter(is_ours));
    }
    for path in old {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(wrong("remove", &path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Writes everything into `folder`, which is there, and returns the names of the files.
///
/// # Errors
/// [`ReplayError::Learn`] when a file cannot be written, [`ReplayError::Output`] for a picture.
pub fn write(
    folder: &Path,
    world: &TraceWorld,
    config: &ReplayConfig,
    runs: &[Run],
) -> Result<Vec<String>, ReplayError> {
    let mut files = vec![DECISIONS.to_owned()];
    write_decisions(&folder.join(DECISIONS), &decisions(world, runs))?;
    let pictures = charts::draw(folder, runs).map_err(ReplayError::Output)?;
    files.extend(pictures.into_iter().map(str::to_owned));
    let model = runs.first().and_then(|run| run.champion.as_ref());
    if let Some(model) = model.filter(|_| config.quantity == Quantity::Latency) {
        let registry = ModelRegistry::new(folder.join(MODELS));
        let mut model = model.as_ref().clone();
        model.card.commit = Some(COMMIT.into());
        registry.save(&model)?;
        files.push(format!("{MODELS}/{}.json", model.version));
    }
    let trained = runs.iter().filter_map(|run| {
        let trained = run.trained.as_ref()?;
        Some(TrainedRows { seed: run.seed, rows: &trained.rows, model: &trained.model })
    });
    let trained: Vec<TrainedRows<'_>> = trained.collect();
    if !trained.is_empty() {
        write_training_rows(&folder.join(TRAINING_ROWS), &trained, &config.train)?;
        files.push(TRAINING_ROWS.into());
    }
    Ok(files)
}

fn decisions(world: &TraceWorld, runs: &[Run]) -> Vec<ReplayDecisionRow> {
    let mut rows = Vec::new();
    for run in runs {
        for outcome in &run.outcomes {
            for (policy, name) in NAMES.into_iter().enumerate() {
                let own = policy == MESHWISE;
                rows.push(ReplayDecisionRow {
                    seed: run.seed,
                    t_s: outcome.t_s,
                    src: world.names[outcome.pair.0].clone(),
                    dst: world.names[outcome.pair.1].clone(),
                    policy: name,
                    relay: outcome.relays[policy].map(|relay| world.names[relay].clone()),
                    cost_ms: outcome.costs_ms[policy],
                    direct_ms: outcome.direct_ms.is_finite().then_some(outcome.direct_ms),
                    forecast_ms: own.then_some(outcome.forecast_ms),
                });
            }
        }
    }
    rows
}

/// Writes every measurement of the trace into a store, as probes of one-link routes, and returns
/// how many there were.
///
/// # Errors
/// [`ReplayError::Learn`] when the store cannot be written.
pub fn fill_store(path: &Path, world: &TraceWorld) -> Result<u64, ReplayError> {
    let writer = Writer::start(path, Retention::default()).map_err(LearnError::from)?;
    let mut written = 0;
    for (&(src, dst), link) in &world.links {
        let Ok(route) = Route::new([world.ids[src], world.ids[dst]]) else { continue };
        let answered = link.samples.iter().map(|sample| (sample.t_s, Some(sample.ms)));
        let lost = link.lost_s.iter().map(|t_s| (*t_s, None));
        for (t_s, ms) in answered.chain(lost) {
            let at = |ms: f64| Timestamp(((EPOCH_S + t_s + ms / 1e3) * 1e6) as u64);
            let rtt_us = ms.map(|ms| (ms * 1e3) as u64);
            writer.write(Sample::Probe {
                kind: ProbeKind::Route,
                route: route.clone(),
                sent_at: at(0.0),
                done_at: at(ms.unwrap_or(1_000.0)),
                rtt_us,
            });
            written += 1;
            // The queue is bounded and drops what it cannot hold.
            if written % (QUEUE_MAX as u64 / 2) == 0 {
                writer.flush().map_err(LearnError::from)?;
            }
        }
    }
    writer.flush().map_err(LearnError::from)?;
    Ok(written)
}
