//! Printing: tables for people, JSON for scripts, one line for an error.

use std::io::Write;
use std::process::ExitCode;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::api::ClientError;
use crate::node::NodeError;

/// Exit code of wrong usage, as clap has it.
const WRONG_USAGE: u8 = 2;

/// Options that make no sense together. One line: what, why, what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongUsage(pub String);

/// Turns the result of a command into the exit code, and says the error in one line.
pub fn finish(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let text = error.to_string().replace('\n', " ");
            let _ = writeln!(std::io::stderr(), "meshwise: {text}");
            if is_wrong_usage(&error) { WRONG_USAGE.into() } else { ExitCode::FAILURE }
        }
    }
}

/// Whether nothing was tried, because what was typed makes no sense.
fn is_wrong_usage(error: &anyhow::Error) -> bool {
    let of_client = error.downcast_ref::<ClientError>().is_some_and(ClientError::is_wrong_usage);
    let of_client = of_client || error.is::<WrongUsage>();
    of_client || error.downcast_ref::<NodeError>().is_some_and(NodeError::is_wrong_usage)
}

/// Whoever read our output has seen enough, as `head` does.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Prints text to standard output.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    if !text.ends_with('\n') {
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(())
}

/// Prints one JSON document.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

/// A table with these columns.
pub fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if columns.iter().any(|column| !column.is_empty()) {
        table.set_header(columns.iter().map(|column| column.to_uppercase()));
    }
    table
}

/// Prints a table, or a line when it is empty.
pub fn rows(table: &Table, when_empty: &str) -> anyhow::Result<()> {
    if table.is_empty() {
        return print(when_empty);
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    print(&lines.join("\n"))
}

/// A number with `digits` decimals, or a dash.
pub fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.digits$}"))
}

/// A point in time (µs since the epoch) for people.
pub fn time(us: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_micros(us);
    humantime::format_rfc3339_seconds(at).to_string()
}

/// Bytes for people.
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1_000.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1_000.0;
    }
    format!("{value:.1} TB")
}

/// A route for people: short ids, arrows.
pub fn route(nodes: &[String]) -> String {
    nodes.join(" > ")
}
