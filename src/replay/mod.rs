//! Replay: the deciding parts of the engine driven over a trace of real measurements in virtual time, beside
//! other policies, a baseline and oracles.
//!
//! The way of the data:
//!
//! 1. [`TraceWorld`] indexes the trace: what is measured when, and what an outcome is (the first
//!    fresh measurement of each hop at or after the decision).
//! 2. [`run()`] plays it round by round for one seed: decisions for random pairs are made with what
//!    was known before the round; then each node measures its links, all of them or as many as its
//!    budget allows, and everybody hears of it by advertisement before the next round.
//! 3. [`meshwise`] holds the parts of the engine that decide: link histories, features, model,
//!    mix, interval and ranking. Models are trained on schedule on what was measured so far.
//! 4. [`policy`] and [`bandit`] hold what it is compared with, and [`live`] the rule that a node runs.
//! 5. [`report`] turns decisions into figures with intervals, [`charts`] into pictures.
//!
//! Nothing is learned from an outcome before the moment in which it is measured. With a budget, the
//! simple policies share the measurements of a fair rotation, and meshwise spends the same budget on
//! what is worth measuring ([`crate::engine::measure::worth`]). What of its lead is measuring and what is
//! the model is told apart by `last+worth`, the last value on meshwise's measurements, and by
//! [`ReplayConfig::own_probes`].
//!
//! The rule of the row `meshwise` is the replay's: a node does not tune its ranking on outcomes. The live
//! router shares the features, the model, the mix and the interval; it compares scores of the
//! forecast's pessimistic bound, by the rule that was chosen when the model was trained. That is what the
//! rows `meshwise-live` (for what is replayed) and `meshwise-live-balanced` (as a node does when nothing is
//! said) show.
//!
//! What a replay leaves out: the gossip, probe timers and datagrams of the engine (the trace says
//! what can be measured when; `sim` shows those), and the effect of traffic on the paths.

pub mod bandit;
pub mod charts;
pub mod estimates;
pub mod judged;
pub mod knowledge;
mod life;
pub mod live;
pub mod meshwise;
mod outcome;
pub mod output;
pub mod policy;
pub mod probing;
pub mod report;
pub mod run;
pub mod world;

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;

use crate::engine::predict::Ranking;
use crate::learn::trace::{TraceRow, read_trace};
use crate::learn::{LearnError, TrainConfig};
pub use policy::NAMES;
use report::{HindsightReport, PolicyReport, PredictionReport};
pub use run::{Run, run};
pub use world::{Quantity, TraceWorld};

/// Decisions of one seed when nothing else is said.
const DECISIONS: usize = 40_000;
/// Share of the rounds that only fill the histories.
const WARMUP_SHARE: f64 = 1.0 / 3.0;
/// Trainings after the warm-up, unless said otherwise.
pub const TRAININGS: usize = 6;

/// How to replay.
#[derive(Clone, Debug)]
pub struct ReplayConfig {
    /// The trace.
    pub trace: PathBuf,
    /// Which column is replayed.
    pub quantity: Quantity,
    /// Links that each node measures a round; `None`: all that the trace holds.
    pub probes: Option<usize>,
    /// The seeds, one run each.
    pub seeds: Vec<u64>,
    /// Decisions of a seed; `None`: about 40,000.
    pub decisions: Option<usize>,
    /// Whether models are trained; without, meshwise decides on level and spread alone.
    pub learning: bool,
    /// Whether meshwise chooses by itself what it measures; without, it shares the fair rotation of the
    /// others.
    pub own_probes: bool,
    /// Trainings after the warm-up, 1 or more; one more where rounds do not divide evenly.
    pub trainings: usize,
    /// Where to leave decisions, pictures, measurements, training rows and the last model.
    pub out: Option<PathBuf>,
    /// Replace what an earlier replay left there.
    pub force: bool,
    /// How models are trained.
    pub train: TrainConfig,
}

impl ReplayConfig {
    fn warmup_rounds(&self, rounds: usize) -> usize {
        ((rounds as f64 * WARMUP_SHARE).ceil() as usize).clamp(1, rounds.saturating_sub(1).max(1))
    }

    fn retrain_rounds(&self, rounds: usize) -> usize {
        ((rounds - self.warmup_rounds(rounds)) / self.trainings.max(1)).max(1)
    }

    fn decisions_per_round(&self, rounds: usize, pairs: usize) -> usize {
        self.decisions.unwrap_or(DECISIONS).div_ceil(rounds.max(1)).clamp(1, pairs)
    }
}

/// A replay that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The trace cannot be read, or training failed.
    #[error(transparent)]
    Learn(#[from] LearnError),
    /// The trace holds nothing to decide.
    #[error("'{trace}' cannot be replayed: {what}")]
    Trace {
        /// The file.
        trace: PathBuf,
        /// Why.
        what: String,
    },
    /// Nothing could be scored.
    #[error("'{trace}': no decision could be scored: {why}")]
    Unscored {
        /// The file.
        trace: PathBuf,
        /// Why.
        why: String,
    },
    /// A picture could not be written.
    #[error("{0}; check permissions and free space")]
    Output(String),
    /// A run ended in a panic.
    #[error("a run stopped unexpectedly; report it with the trace and the seed")]
    Stopped,
}

/// What a replay gave.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The trace's file name.
    pub trace: String,
    /// Rows of the trace.
    pub rows: usize,
    /// Measurements written to the store of the output folder, for 'data stats', 'data export' and
    /// 'model train'; 0 without one.
    pub rows_stored: u64,
    /// Nodes.
    pub nodes: usize,
    /// Rounds.
    pub rounds: usize,
    /// Pairs that decisions were made for.
    pub pairs: usize,
    /// Links that each node measured a round; null: all.
    pub probes: Option<usize>,
    /// The seeds.
    pub seeds: Vec<u64>,
    /// Scored decisions of all seeds.
    pub decisions: usize,
    /// Decisions left out because a chosen link was never measured again.
    pub decisions_dropped: usize,
    /// One row a policy.
    pub policies: Vec<PolicyReport>,
    /// The forecasts; null without any.
    pub prediction: Option<PredictionReport>,
    /// The best fixed ranking rule in hindsight; null where no decision has the outcomes of all candidates.
    pub best_fixed_rule: Option<HindsightReport>,
    /// Estimates from logged decisions, checked against the truth; null without enough decisions.
    pub estimators: Option<judged::JudgedReport>,
    /// Models trained in all seeds.
    pub models_trained: usize,
    /// Models put into use in all seeds.
    pub models_promoted: usize,
    /// The ranking rule at the end of each seed.
    pub rankings: Vec<Ranking>,
    /// Weights of the mix at the end of each seed: model, moving average, last value, level.
    pub weights: Vec<[f64; 4]>,
    /// Files left in the output folder.
    pub files: Vec<String>,
    /// Wall-clock time (s).
    pub wall_s: f64,
}

/// Reads the trace and plays every seed, two at a time. `progress` is told of each seed that is
/// done.
///
/// # Errors
/// [`ReplayError`].
pub fn replay(config: &ReplayConfig, progress: impl Fn(u64) + Sync) -> Result<Report, ReplayError> {
    let begun = Instant::now();
    let rows: Vec<TraceRow> = read_trace(&config.trace)?;
    let world = TraceWorld::new(&rows, config.quantity)
        .map_err(|what| ReplayError::Trace { trace: config.trace.clone(), what })?;
    drop(rows);
    if let Some(out) = &config.out {
        output::make_room(out, config.force)?;
    }
    let mut runs = Vec::new();
    for seeds in config.seeds.chunks(2) {
        let done: Vec<Result<Run, ReplayError>> = std::thread::scope(|scope| {
            let play = |seed: &u64| {
                let (seed, world, progress) = (*seed, &world, &progress);
                scope.spawn(move || {
                    let result = run(world, config, seed);
                    progress(seed);
                    result
                })
            };
            let running: Vec<_> = seeds.iter().map(play).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or(Err(ReplayError::Stopped))
            };
            running.into_iter().map(join).collect()
        });
        for run in done {
            runs.push(run?);
        }
    }
    if runs.iter().all(|run| run.outcomes.is_empty()) {
        return Err(unscored(config, &world, &runs));
    }
    let stored = fill_store(config, &world)?;
    let mut files = Vec::new();
    if let Some(out) = &config.out {
        files = output::write(out, &world, config, &runs)?;
    }
    let name = config.trace.file_name().unwrap_or_default();
    let report = Report {
        trace: name.to_string_lossy().into_owned(),
        rows: world.rows,
        rows_stored: stored,
        nodes: world.nodes(),
        rounds: world.rounds.len() - 1,
        pairs: world.pairs.len(),
        probes: config.probes,
        seeds: config.seeds.clone(),
        decisions: runs.iter().map(|run| run.outcomes.len()).sum(),
        decisions_dropped: runs.iter().map(|run| run.dropped).sum(),
        policies: report::policies(&runs),
        prediction: report::prediction(&runs, &world.names),
        best_fixed_rule: report::best_fixed_rule(&runs),
        estimators: judged::check(&runs),
        models_trained: runs.iter().map(|run| run.models_trained).sum(),
        models_promoted: runs.iter().map(|run| run.models_promoted).sum(),
        rankings: runs.iter().map(|run| run.ranking).collect(),
        weights: runs.iter().map(|run| run.weights).collect(),
        files,
        wall_s: begun.elapsed().as_secs_f64(),
    };
    Ok(report)
}

/// Why no decision has an outcome.
fn unscored(config: &ReplayConfig, world: &TraceWorld, runs: &[Run]) -> ReplayError {
    let dropped: usize = runs.iter().map(|run| run.dropped).sum();
    let why = match (dropped, world.rounds.len() - 1) {
        (0, rounds @ 0..=2) => format!(
            "it has measurements of {rounds} moments, and the first third only fills the histories; \
             replay a longer trace"
        ),
        (0, _) => "no link is measured again after the first third; replay a longer trace".into(),
        (dropped, _) => format!(
            "in each of {dropped} decisions some policy took a route of which a link is never measured \
             again; replay a trace that measures its links again and again"
        ),
    };
    ReplayError::Unscored { trace: config.trace.clone(), why }
}

/// Writes the measurements into the store of the output folder; without one, none are written.
fn fill_store(config: &ReplayConfig, world: &TraceWorld) -> Result<u64, ReplayError> {
    let Some(out) = &config.out else { return Ok(0) };
    if config.quantity == Quantity::Throughput {
        return Ok(0);
    }
    output::fill_store(&out.join(output::STORE), world)
}
