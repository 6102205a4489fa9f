//! Tells the program which commit it is built from, for the cards of the models that it trains:
//! `MESHWISE_COMMIT` is the variable of that name, where it is set, else the commit that is checked
//! out here, else `unknown` (an unpacked archive). Local changes do not show.

use std::env;
use std::path::Path;
use std::process::Command;

const NAME: &str = "MESHWISE_COMMIT";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={NAME}");
    let given = env::var(NAME).ok().filter(|commit| !commit.is_empty());
    let commit = given.or_else(checked_out).unwrap_or_else(|| "unknown".into());
    println!("cargo::rustc-env={NAME}={commit}");
}

/// The commit, when this folder is the top of a checkout: not that of another project around it.
fn checked_out() -> Option<String> {
    let top = git(&["rev-parse", "--show-toplevel"])?;
    let here = env::var_os("CARGO_MANIFEST_DIR")?;
    if Path::new(&top).canonicalize().ok()? != Path::new(&here).canonicalize().ok()? {
        return None;
    }
    // Written at every commit and checkout, in a second work tree too.
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
    if Path::new(&log).exists() {
        println!("cargo::rerun-if-changed={log}");
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}

/// What git says; `None` when there is no git, or it refuses.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    let said = said.trim();
    (output.status.success() && !said.is_empty()).then(|| said.to_owned())
}
