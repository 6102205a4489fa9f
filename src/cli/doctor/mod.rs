//! `meshwise doctor`

mod files;
mod running;

use std::path::PathBuf;

use serde::Serialize;

use super::{Context, output, settings};
use crate::api::ClientError;
use crate::api::types::{Reachability, Status};

/// Check what this node needs, and say what to do about what is missing. Looks at the running node
/// when there is one, else at its files. Exit code 1 when something is broken.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Settings of the node, as given to 'meshwise node'.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// Works, but less well than it could.
    Warning,
    /// Does not work.
    Broken,
}

impl Verdict {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Broken => "BROKEN",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Check {
    what: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do, when there is something to do.
    advice: Option<String>,
}

impl Check {
    fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Ok, found: found.into(), advice: None }
    }

    fn note(what: &'static str, found: impl Into<String>) -> Self {
        Self { verdict: Verdict::Note, ..Self::ok(what, found) }
    }

    fn warning(what: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warning, advice: Some(advice.into()), ..Self::ok(what, found) }
    }

    fn broken(what: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Broken, advice: Some(advice.into()), ..Self::ok(what, found) }
    }
}

pub(super) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    let config = settings::load(args.config.as_deref())?;
    let dir = &context.data_dir;
    let client = context.client();
    let asked = match client.get::<Status>("/v1/status").await {
        Ok(status) => client.get::<Reachability>("/v1/reach").await.map(|reach| (status, reach)),
        Err(error) => Err(error),
    };
    let mut checks = vec![files::data_dir(dir), files::disk(dir, &config), files::membership(dir)];
    match asked {
        Ok((status, reach)) => checks.extend(running::all(&status, &reach)),
        Err(ClientError::NoNode { .. }) => {
            checks.push(files::no_node(dir));
            checks.push(files::store(dir));
            checks.push(files::models(dir));
            checks.extend(files::listening(&config));
            checks.extend(files::bootstrap(&config));
        }
        Err(error) => checks.push(Check::broken(
            "node",
            error.to_string(),
            "stop the node and start it again, with this very program",
        )),
    }
    report(&checks, context)
}

fn report(checks: &[Check], context: &Context) -> anyhow::Result<()> {
    let broken = checks.iter().filter(|check| check.verdict == Verdict::Broken).count();
    if context.json {
        let sound = broken == 0;
        output::json(&serde_json::json!({ "sound": sound, "checks": checks }))?;
    } else {
        let mut table = output::table(&["check", "", "found"]);
        for check in checks {
            table.add_row([check.what, check.verdict.as_str(), &check.found]);
            if let Some(advice) = &check.advice {
                table.add_row(["", "", &format!("-> {advice}")]);
            }
        }
        output::rows(&table, "nothing was checked")?;
    }
    match broken {
        0 => Ok(()),
        1 => anyhow::bail!("something is broken; see what is marked above"),
        _ => anyhow::bail!("{broken} things are broken; see what is marked above"),
    }
}
