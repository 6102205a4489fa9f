//! Training on a schedule, in a child process of the `meshwise` program that gives way to all others,
//! in bounded memory, so that neither its load nor its crash reaches the router.
//!
//! It is time to train when the interval is over, when enough new measurements have come, or when
//! the residuals of the model in use have drifted; one training at a time, and with a pause
//! between two.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::config::LearningConfig;
use crate::engine::types::Timestamp;

/// Longest training; a child that takes longer is ended.
const TRAINING_MAX: Duration = Duration::from_secs(1_800);
/// Shortest time from the end of a training to the next one, unless the interval is shorter still:
/// new rows and drift must not keep a core busy.
pub const PAUSE_MIN: Duration = Duration::from_secs(600);

/// Why it is time to train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The interval is over.
    Interval,
    /// Enough new rows have come.
    NewRows,
    /// The residuals of the model in use drifted.
    Drift,
}

impl Reason {
    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interval => "the interval is over",
            Self::NewRows => "enough new measurements",
            Self::Drift => "the errors of the model have drifted",
        }
    }
}

/// When to train.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// `None`: never.
    every: Option<Duration>,
    /// New rows that are a reason; 0 for none.
    rows: u64,
    due_at: Timestamp,
    not_before: Timestamp,
    new_rows: u64,
    drifted: bool,
    running: bool,
}

impl Schedule {
    /// A schedule that begins at `now`.
    pub fn new(learning: &LearningConfig, now: Timestamp) -> Self {
        let first = now + Duration::from_secs(learning.first_train_s);
        Self {
            every: (learning.retrain_s > 0).then(|| Duration::from_secs(learning.retrain_s)),
            rows: learning.retrain_rows,
            due_at: first,
            not_before: first,
            new_rows: 0,
            drifted: false,
            running: false,
        }
    }

    /// A row that a model can learn from was recorded.
    pub fn new_row(&mut self) {
        self.new_rows += 1;
    }

    /// The residuals of the model in use drifted.
    pub fn drifted(&mut self) {
        self.drifted = true;
    }

    /// When to look at [`Schedule::take_due`]; `None` while a training runs, and without a schedule.
    pub fn next(&self) -> Option<Timestamp> {
        self.every.filter(|_| !self.running)?;
        Some(if self.wish().is_some() { self.not_before.min(self.due_at) } else { self.due_at })
    }

    /// Says that a training has to begin at `now`, and why; it counts as running until
    /// [`Schedule::ended`].
    pub fn take_due(&mut self, now: Timestamp) -> Option<Reason> {
        let every = self.every.filter(|_| self.next().is_some_and(|at| at <= now))?;
        let reason = self.wish().unwrap_or(Reason::Interval);
        self.due_at = now + every;
        (self.new_rows, self.drifted, self.running) = (0, false, true);
        Some(reason)
    }

    /// The training is over.
    pub fn ended(&mut self, now: Timestamp) {
        self.running = false;
        self.not_before = now + self.every.map_or(PAUSE_MIN, |every| every.min(PAUSE_MIN));
        self.due_at = self.due_at.max(self.not_before);
    }

    /// Whether a training runs.
    pub fn is_running(&self) -> bool {
        self.running
    }

    fn wish(&self) -> Option<Reason> {
        match self.drifted {
            true => Some(Reason::Drift),
            false => (self.rows > 0 && self.new_rows >= self.rows).then_some(Reason::NewRows),
        }
    }
}

/// Starts `meshwise model train` on a data directory and waits for it.
///
/// # Errors
/// One line: what the child said, or why it could not run.
pub async fn train(program: &Path, data_dir: &Path) -> Result<(), String> {
    let mut command = Command::new(program);
    command.args(["model", "train", "--background", "--data-dir"]).arg(data_dir);
    // Its last line is what is told, and that should be the error.
    command.env("RUST_BACKTRACE", "0");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = tokio::time::timeout(TRAINING_MAX, command.output());
    match output.await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().rev().find(|line| !line.trim().is_empty());
            let status = output.status;
            Err(match last {
                Some(last) if status.code().is_some() => last.to_owned(),
                Some(last) => format!("{last} ({status})"),
                None => format!("it ended with {status}"),
            })
        }
        Ok(Err(error)) => Err(format!("cannot start the trainer: {error}")),
        Err(_) => Err(format!("it took longer than {} s", TRAINING_MAX.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(retrain_s: u64, retrain_rows: u64) -> Schedule {
        let learning = LearningConfig {
            retrain_s,
            retrain_rows,
            first_train_s: 100,
            ..LearningConfig::default()
        };
        Schedule::new(&learning, at(0))
    }

    fn at(s: u64) -> Timestamp {
        Timestamp(s * 1_000_000)
    }

    #[test]
    fn the_interval_counts_from_the_start_of_a_training() {
        let mut schedule = schedule(3_600, 0);
        assert_eq!(schedule.next(), Some(at(100)));
        assert_eq!(schedule.take_due(at(99)), None);
        assert_eq!(schedule.take_due(at(100)), Some(Reason::Interval));
        assert_eq!((schedule.next(), schedule.take_due(at(9_999))), (None, None), "one at a time");
        schedule.ended(at(200));
        assert_eq!(schedule.next(), Some(at(3_700)));
        // One that took longer than the interval still leaves a pause.
        schedule.take_due(at(3_700));
        schedule.ended(at(8_000));
        assert_eq!(schedule.next(), Some(at(8_600)));
    }

    #[test]
    fn new_rows_and_drift_do_not_wait_for_the_interval_but_for_the_pause() {
        let mut schedule = schedule(3_600, 3);
        (0..3).for_each(|_| schedule.new_row());
        assert_eq!(schedule.next(), Some(at(100)), "not before the first one is allowed");
        assert_eq!(schedule.take_due(at(100)), Some(Reason::NewRows));
        schedule.drifted();
        schedule.ended(at(150));
        assert_eq!(schedule.next(), Some(at(750)));
        assert_eq!(schedule.take_due(at(749)), None);
        assert_eq!(schedule.take_due(at(750)), Some(Reason::Drift));
        schedule.ended(at(800));
        assert_eq!(schedule.next(), Some(at(4_350)), "what was seen to is no reason any more");
    }

    #[test]
    fn a_short_interval_is_its_own_pause_and_none_is_never() {
        let mut short = schedule(1, 0);
        short.take_due(at(100));
        short.ended(at(101));
        assert_eq!(short.next(), Some(at(102)));
        let mut off = schedule(0, 1);
        off.new_row();
        off.drifted();
        assert_eq!((off.next(), off.take_due(at(99_999))), (None, None));
    }

    #[tokio::test]
    async fn a_child_that_is_killed_is_an_error_and_nothing_more() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        for (script, word) in [
            ("echo 'memory allocation failed' >&2; kill -ABRT $$", "allocation failed (signal: 6"),
            ("echo 'first' >&2; echo 'too few rows' >&2; exit 1", "too few rows"),
            ("kill -KILL $$", "signal: 9"),
            ("exit 3", "exit status: 3"),
        ] {
            let program = folder.path().join("trainer");
            std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).unwrap();
            let error = train(&program, folder.path()).await.unwrap_err();
            assert!(error.contains(word), "{error}");
            assert_eq!(error.lines().count(), 1);
        }
        let missing = train(&folder.path().join("nobody"), folder.path()).await.unwrap_err();
        assert!(missing.contains("cannot start"), "{missing}");
    }
}
