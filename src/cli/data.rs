//! `meshwise data`

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Context, output, sample};
use crate::engine::measure::ProbeKind;
use crate::learn::{Exported, Observation, Warning, artefacts, export, realised_accuracy};
use crate::node::DATABASE;
use crate::store::{ProbeRow, Reader};

/// Look at the measurements, and export them.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Count what was measured, warn of what makes it misleading, and compare forecasts with what
    /// then happened.
    Stats {
        /// Look at the measurements and forecasts of the last so many hours.
        #[arg(long, default_value_t = 24)]
        hours: u64,
    },
    /// Write measurements and features as Parquet, one folder a day.
    Export {
        /// Folder to write to.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Replace an earlier export there.
        #[arg(long)]
        force: bool,
    },
    /// Generate measurements of a simulated mesh, and export them: data to look at without a
    /// network.
    Sample(sample::Args),
}

pub(super) fn run(verb: &Verb, context: &Context) -> anyhow::Result<()> {
    let database = context.data_dir.join(DATABASE);
    match verb {
        Verb::Stats { hours } => stats(&Reader::open(&database)?, *hours, context),
        Verb::Export { out, force } => {
            eprintln!("reading {} ...", database.display());
            let exported = export(&database, out, *force)?;
            report(out, &exported, context)
        }
        Verb::Sample(args) => sample::run(args, context),
    }
}

/// Says what an export wrote.
pub(super) fn report(out: &Path, exported: &Exported, context: &Context) -> anyhow::Result<()> {
    if context.json {
        let tables = exported
            .tables
            .iter()
            .map(|table| json!({ "table": table.table, "rows": table.rows, "files": table.files }));
        return output::json(&json!({ "out": out, "tables": tables.collect::<Vec<_>>() }));
    }
    for table in &exported.tables {
        let path = out.join(table.table);
        let (rows, files) = (table.rows, table.files);
        output::print(&format!("{rows} rows in {files} files under {}", path.display()))?;
    }
    Ok(())
}

fn stats(reader: &Reader, hours: u64, context: &Context) -> anyhow::Result<()> {
    let counts = reader.counts()?;
    let newest = counts.tables.iter().filter_map(|table| table.last_us).max().unwrap_or(0);
    let since_us = newest.saturating_sub(hours.saturating_mul(3_600_000_000));
    let probes = reader.probes(ProbeKind::Route, since_us)?;
    let links = reader.probes(ProbeKind::Link, since_us)?;
    let found = [("route", guard(&probes)), ("link", guard(&links))];
    let warnings = || found.iter().flat_map(|(of, all)| all.iter().map(move |one| (*of, one)));
    let realised = realised_accuracy(&reader.candidate_predictions(since_us)?, &probes)?;
    if context.json {
        let tables = counts.tables.iter().map(|table| {
            json!({
                "table": table.table, "rows": table.rows,
                "first_us": table.first_us, "last_us": table.last_us,
            })
        });
        return output::json(&json!({
            "file_bytes": counts.file_bytes,
            "tables": tables.collect::<Vec<_>>(),
            "warnings": warnings()
                .map(|(of, warning)| json!({
                    "probes": of, "name": warning.name, "seen": warning.seen,
                    "why": warning.why, "advice": warning.advice, "figures": warning.figures,
                }))
                .collect::<Vec<_>>(),
            "forecasts": {
                "rows": realised.rows,
                "model": realised.model,
                "moving_average": realised.moving_average,
                "last_value": realised.last_value,
            },
        }));
    }
    let mut table = output::table(&["table", "rows", "first", "last"]);
    for count in &counts.tables {
        let time = |us: Option<u64>| us.map_or_else(|| "-".into(), output::time);
        table.add_row([
            count.table.to_owned(),
            count.rows.to_string(),
            time(count.first_us),
            time(count.last_us),
        ]);
    }
    output::rows(&table, "")?;
    output::print(&format!("{} on disk\n", output::bytes(counts.file_bytes)))?;
    for (of, Warning { name, seen, why, advice, .. }) in warnings() {
        let text =
            format!("warning: {name}, {of} probes\n  {seen}\n  why  {why}\n  do   {advice}\n");
        output::print(&text)?;
    }
    let mut table = output::table(&["forecasts that came true", "accuracy", "mae ms"]);
    let scores = [
        ("model", realised.model),
        ("moving average", Some(realised.moving_average)),
        ("last value", Some(realised.last_value)),
    ];
    for (name, score) in scores {
        let Some(score) = score.filter(|_| realised.rows > 0) else { continue };
        table.add_row([
            format!("{name} ({} probes)", realised.rows),
            format!("{:.1} %", 100.0 * score.accuracy),
            format!("{:.2}", score.mae_ms),
        ]);
    }
    output::rows(&table, "no forecasts to compare yet; open a tunnel and wait a little")
}

/// What in these probes makes an accuracy misleading.
fn guard(probes: &[ProbeRow]) -> Vec<Warning> {
    let observations = probes.iter().map(|probe| Observation {
        key: &probe.route,
        at_us: probe.sent_us,
        value_ms: probe.rtt_us.map(|us| us as f64 / 1e3),
    });
    artefacts(&observations.collect::<Vec<_>>())
}
