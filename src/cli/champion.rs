//! `meshwise model promote`, `rollback` and `compare`: which model decides.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::{Context, output};
use crate::api::ClientError;
use crate::api::types::Reloaded;
use crate::engine::predict::profile::PSI_ALERT;
use crate::learn::compare::{Figures, PATH_CLASSES};
use crate::learn::{Action, Change, Comparison, ModelRegistry, compare_in_store};
use crate::node::{DATABASE, MODELS};

/// Shifted features that are named in the text; `--json` has all.
pub(super) const SHIFTED_MAX: usize = 5;

/// Now (µs since the epoch).
pub(super) fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}

/// Has the running node load champion and challenger again; whether it uses this champion then,
/// `None` without a running node.
pub(super) async fn reload(
    context: &Context,
    champion: Option<&str>,
) -> anyhow::Result<Option<bool>> {
    match context.client().post::<Reloaded>("/v1/model/reload", &json!({})).await {
        Ok(reloaded) => Ok(Some(reloaded.version.as_deref() == champion)),
        Err(ClientError::NoNode { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What that means for people.
pub(super) fn print_in_use(in_use: Option<bool>) -> anyhow::Result<()> {
    match in_use {
        Some(true) => output::print("the running node uses it from now on"),
        Some(false) => output::print("the running node uses another version"),
        None => Ok(()),
    }
}

pub(super) async fn promote(name: &str, context: &Context) -> anyhow::Result<()> {
    let registry = ModelRegistry::new(context.data_dir.join(MODELS));
    let version = registry.resolve(name)?;
    let change = registry.promote(&version, now_us(), "promoted by hand")?;
    let in_use = reload(context, Some(&version)).await?;
    if context.json {
        return print_json(&Some(version), change.as_ref(), in_use);
    }
    output::print(&match change {
        Some(Change { from: Some(from), .. }) => format!("{version} is the champion, {from} was"),
        Some(_) => format!("{version} is the champion"),
        None => format!("{version} is the champion already"),
    })?;
    print_in_use(in_use)
}

/// Who decides without a champion, why, and how that is changed.
pub(super) fn no_champion(registry: &ModelRegistry) -> anyhow::Result<String> {
    if registry.list()?.is_empty() {
        let text =
            "the moving average decides: no model is in use; train one with 'meshwise model train'";
        return Ok(text.into());
    }
    let why = match registry.history()?.changes.pop_back() {
        Some(Change { action: Action::RolledBack, from: Some(from), at_us, reason, .. }) => {
            format!("'{from}' was rolled back at {} ({reason})", output::time(at_us))
        }
        _ => "no model is in use".into(),
    };
    Ok(format!(
        "the moving average decides: {why}; 'meshwise model promote VERSION' takes one of 'meshwise model \
         list' into use"
    ))
}

pub(super) async fn rollback(context: &Context) -> anyhow::Result<()> {
    let registry = ModelRegistry::new(context.data_dir.join(MODELS));
    if registry.champion_version()?.is_none() {
        anyhow::bail!("there is nothing to go back to: {}", no_champion(&registry)?);
    }
    let change = registry.rollback(now_us(), "rolled back by hand")?;
    let in_use = reload(context, change.to.as_deref()).await?;
    if context.json {
        return print_json(&change.to, Some(&change), in_use);
    }
    let from = change.from.as_deref().unwrap_or("nothing");
    output::print(&match &change.to {
        Some(to) => format!("{to} is the champion again, {from} was"),
        None => format!("{from} is out of use; there is no champion, the moving average decides"),
    })?;
    print_in_use(in_use)
}

fn print_json(
    champion: &Option<String>,
    change: Option<&Change>,
    in_use: Option<bool>,
) -> anyhow::Result<()> {
    let changed = change.is_some();
    output::json(&json!({
        "champion": champion, "changed": changed, "change": change, "in_use_by_node": in_use,
    }))
}

pub(super) fn compare(a: Option<&str>, b: Option<&str>, context: &Context) -> anyhow::Result<()> {
    let (database, models) = (context.data_dir.join(DATABASE), context.data_dir.join(MODELS));
    let comparison = compare_in_store(&database, &models, a, b)?;
    if context.json {
        return output::json(&comparison);
    }
    print_comparison(&comparison)
}

fn print_comparison(comparison: &Comparison) -> anyhow::Result<()> {
    let mut table = output::table(&[
        "on the same rows",
        "path",
        "rows",
        "accuracy",
        "mae ms",
        "rmse ln",
        "error ln",
        "inside",
        "width ms",
    ]);
    let percent = |share: Option<f64>| {
        share.map_or_else(|| "-".into(), |share| format!("{:.1} %", 100.0 * share))
    };
    let mut row = |name: &str, path: &str, figures: &Figures| {
        let score = figures.score;
        table.add_row([
            name.to_owned(),
            path.to_owned(),
            figures.rows.to_string(),
            percent(Some(score.accuracy)),
            format!("{:.2}", score.mae_ms),
            format!("{:.4}", score.rmse_ln),
            format!("{:.4}", figures.loss_ln),
            percent(figures.coverage),
            output::number(figures.width_ms, 2),
        ]);
    };
    for contestant in &comparison.contestants {
        row(&contestant.name, "all", &contestant.all);
        for (path, figures) in PATH_CLASSES.iter().zip(&contestant.by_path) {
            if figures.rows > 0 {
                row("", path, figures);
            }
        }
    }
    output::rows(&table, "")?;
    let [a, b] = [0, 1].map(|index| comparison.contestants[index].name.as_str());
    let difference = comparison.difference;
    let verdict = if difference.high_ln < 0.0 {
        format!("{a} is better")
    } else if difference.low_ln > 0.0 {
        format!("{b} is better")
    } else {
        "no difference beyond chance".into()
    };
    output::print(&format!(
        "\nerror of {a} minus that of {b}: {:+.4} ln(ms), 95 % interval {:+.4} to {:+.4} (blocks of \
         {} rows): {verdict}\nmeasured {} to {}, later than what either was fitted on",
        difference.mean_ln,
        difference.low_ln,
        difference.high_ln,
        difference.block,
        output::time(comparison.from_us),
        output::time(comparison.to_us),
    ))?;
    if !comparison.choices.is_empty() {
        let mut table = output::table(&["choices by", "decisions", "mean ms", "decided ms"]);
        for choice in &comparison.choices {
            table.add_row([
                choice.name.clone(),
                choice.decisions.to_string(),
                format!("{:.2}", choice.mean_ms),
                format!("{:.2}", choice.decided_ms),
            ]);
        }
        output::print("")?;
        output::rows(&table, "")?;
    }
    for contestant in &comparison.contestants {
        let name = &contestant.name;
        if let Some(live) = &contestant.live {
            output::print(&format!(
                "{name} live: {:.1} % of {} forecasts came true, mean error {:.2} ms (moving \
                 average {:.1} %, {:.2} ms)",
                100.0 * live.model.accuracy,
                live.rows,
                live.model.mae_ms,
                100.0 * live.moving_average.accuracy,
                live.moving_average.mae_ms,
            ))?;
        }
        if contestant.failures > 0 {
            output::print(&format!(
                "{name}: {} forecasts were missing or absurd",
                contestant.failures
            ))?;
        }
        if !contestant.shifted.is_empty() {
            let named = contestant.shifted.iter().take(SHIFTED_MAX);
            let named: Vec<_> = named.map(|(feature, psi)| format!("{feature} {psi:.2}")).collect();
            output::print(&format!(
                "{name}: {} features shifted since its training (stability index above {PSI_ALERT}), \
                 most of all {}",
                contestant.shifted.len(),
                named.join(", ")
            ))?;
        }
    }
    Ok(())
}
