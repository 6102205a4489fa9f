//! Training on a schedule, in a child process of the `meshwise` program at low priority, so that neither
//! its load nor its crash reaches the router.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// Longest training; a child that takes longer is ended.
const TRAINING_MAX: Duration = Duration::from_secs(1_800);

/// Starts `meshwise model train` on a data directory and waits for it.
///
/// # Errors
/// One line: what the child said, or why it could not run.
pub async fn train(program: &Path, data_dir: &Path) -> Result<(), String> {
    let mut command = Command::new(program);
    command.args(["model", "train", "--background", "--data-dir"]).arg(data_dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = tokio::time::timeout(TRAINING_MAX, command.output());
    match output.await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().rev().find(|line| !line.trim().is_empty());
            Err(last.unwrap_or("it ended without a word").to_owned())
        }
        Ok(Err(error)) => Err(format!("cannot start the trainer: {error}")),
        Err(_) => Err(format!("it took longer than {} s", TRAINING_MAX.as_secs())),
    }
}
