//! The command line: what was typed ([`Cli`], clap types) is parsed apart from what it does (one
//! file a group). Data goes to standard output, talk to standard error. Exit code 0 done, 1
//! failed with one line (what, why, what to do), 2 wrong usage.

mod background;
mod champion;
mod data;
mod demo;
mod doctor;
mod drops;
mod explain;
mod import;
mod judge;
mod model;
mod network;
mod node;
mod output;
mod peer;
mod replay;
mod route;
mod sample;
mod service;
mod settings;
mod status;
mod tunnel;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, Subcommand};

use crate::api::Client;
use crate::engine::overlay::Objective;

/// A peer-to-peer routing node that forecasts route quality and routes real traffic on the
/// forecast.
#[derive(Debug, Parser)]
#[command(name = "meshwise", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    /// What the node keeps: identity, database, models, control socket
    /// [default: $MESHWISE_DATA_DIR, else meshwise in the user's data directory].
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Print one JSON document instead of a table.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Group,
}

#[derive(Debug, Subcommand)]
enum Group {
    /// Run a local mesh of real nodes that learns, loses links and a relay, and shows what happened.
    Demo(demo::Args),
    /// Run a node.
    Node(node::Args),
    /// Found a network, let nodes in, put nodes out.
    #[command(subcommand)]
    Network(network::Verb),
    /// Publish, find and withdraw services.
    #[command(subcommand)]
    Service(service::Verb),
    /// Carry local connections to a service.
    #[command(subcommand)]
    Tunnel(tunnel::Verb),
    /// Look at routes, and at why one was chosen.
    #[command(subcommand)]
    Route(route::Verb),
    /// Look at connected peers, and at the way to them.
    #[command(subcommand)]
    Peer(peer::Verb),
    /// Train, list and ask models.
    #[command(subcommand)]
    Model(model::Verb),
    /// Look at the measurements, and export them.
    #[command(subcommand)]
    Data(data::Verb),
    /// Replay a trace of real measurements: every policy side by side, and the learning.
    Replay(replay::Args),
    /// Show what the running node is doing.
    Status,
    /// Check what the node needs, and say what to do.
    Doctor(doctor::Args),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// What every command gets.
struct Context {
    data_dir: PathBuf,
    /// As it was typed.
    data_dir_typed: Option<PathBuf>,
    json: bool,
}

impl Context {
    fn client(&self) -> Client {
        Client::new(&self.data_dir)
    }

    /// What another command needs to be about the same node, with a space before it.
    fn where_flag(&self) -> String {
        let typed =
            self.data_dir_typed.as_deref().map(|dir| format!(" --data-dir {}", dir.display()));
        typed.unwrap_or_default()
    }
}

/// Parses the arguments, does what they say, and returns the exit code.
pub fn run() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        let said = error.print();
        if let (Ok(()), Some(tip)) = (said, elsewhere(&error)) {
            eprintln!("\n  tip: {tip}");
        }
        std::process::exit(error.exit_code());
    });
    if let Group::Completions { shell } = &cli.command {
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut Cli::command(), "meshwise", &mut script);
        return output::finish(output::print(&String::from_utf8_lossy(&script)));
    }
    output::finish(execute(cli))
}

/// What to type instead of a verb whose group was left out.
fn elsewhere(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::String(verb)) = error.get(ContextKind::InvalidSubcommand) else {
        return None;
    };
    let command = Cli::command();
    let has = |group: &&clap::Command| group.find_subcommand(verb).is_some();
    let groups = command.get_subcommands().filter(has);
    let there: Vec<_> =
        groups.map(|group| format!("'meshwise {} {verb}'", group.get_name())).collect();
    (!there.is_empty()).then(|| format!("there is {}", there.join(", ")))
}

/// The variable by which an operator says how many threads carry traffic; the runtime reads it.
const WORKERS: &str = "TOKIO_WORKER_THREADS";

fn execute(cli: Cli) -> anyhow::Result<()> {
    let data_dir_typed = cli.data_dir;
    let data_dir = match data_dir_typed.clone() {
        Some(dir) => dir,
        None => default_data_dir()?,
    };
    let context = Context { data_dir, data_dir_typed, json: cli.json };
    // Commands that work on files need no runtime.
    match cli.command {
        Group::Model(verb) if verb.is_offline() => return model::offline(&verb, &context),
        Group::Data(verb) => return data::run(&verb, &context),
        Group::Replay(args) => return replay::run(&args, &context),
        _ => {}
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if matches!(cli.command, Group::Node(_)) && std::env::var_os(WORKERS).is_none() {
        runtime.worker_threads(workers());
    }
    runtime.enable_all().build()?.block_on(async {
        match cli.command {
            Group::Demo(args) => demo::run(args, &context).await,
            Group::Node(args) => node::run(args, &context).await,
            Group::Network(verb) => network::run(verb, &context).await,
            Group::Service(verb) => service::run(verb, &context).await,
            Group::Tunnel(verb) => tunnel::run(verb, &context).await,
            Group::Route(verb) => route::run(verb, &context).await,
            Group::Peer(verb) => peer::run(&verb, &context).await,
            Group::Model(verb) => model::run(&verb, &context).await,
            Group::Status => status::run(&context).await,
            Group::Doctor(args) => doctor::run(args, &context).await,
            Group::Data(_) | Group::Replay(_) | Group::Completions { .. } => Ok(()),
        }
    })
}

/// Threads of a node that carry traffic: half of the cores. A datagram passes from task to task; where
/// each wakes another thread, that costs a relay a fifth of its time, and the programs that its tunnels
/// serve, and the kernel's part of each packet, want cores too.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1))
}

/// Reads an objective, and lets shells complete it.
fn objective() -> impl TypedValueParser<Value = Objective> {
    let words = PossibleValuesParser::new(Objective::ALL.map(Objective::as_str));
    words.try_map(|word| word.parse::<Objective>())
}

fn default_data_dir() -> anyhow::Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(dir) = variable("MESHWISE_DATA_DIR") {
        return Ok(dir.into());
    }
    if let Some(dir) = variable("XDG_DATA_HOME") {
        return Ok(PathBuf::from(dir).join("meshwise"));
    }
    let home = variable("HOME").ok_or_else(|| {
        anyhow::anyhow!("no home directory is set; say where to keep data with --data-dir")
    })?;
    Ok(PathBuf::from(home).join(".local/share/meshwise"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
