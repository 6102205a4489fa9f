//! `meshwise model`

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::{Context, output, route};
use crate::api::ClientError;
use crate::api::types::{Explanation, Reloaded};
use crate::engine::predict::ForestModel;
use crate::learn::{ModelRegistry, TrainConfig, train_from_store};
use crate::node::{DATABASE, MODELS};

/// Train, list and ask models.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Train a model on everything measured so far. It is used when it does at least as well as
    /// the moving average on the newest measurements, which it is not shown.
    Train {
        /// Decides which rows each tree sees; the same rows and seed give the same model.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Trees.
        #[arg(long, default_value_t = TrainConfig::default().trees)]
        trees: usize,
        /// Depth of each tree.
        #[arg(long, default_value_t = TrainConfig::default().depth)]
        depth: u16,
        /// Run at the lowest priority and leave it to the caller to tell the node, as scheduled
        /// training does.
        #[arg(long)]
        background: bool,
    },
    /// List all versions.
    List,
    /// Show what a version was trained on and how it did.
    Show {
        /// Which [default: the one in use].
        version: Option<String>,
    },
    /// Ask the running node's model about the routes to a service or a node.
    Predict {
        /// Name of a service, node id or peer id.
        target: String,
    },
}

impl Verb {
    /// Whether it needs only files.
    pub(super) fn is_offline(&self) -> bool {
        matches!(self, Self::List | Self::Show { .. })
    }
}

fn registry(context: &Context) -> ModelRegistry {
    ModelRegistry::new(context.data_dir.join(MODELS))
}

pub(super) fn offline(verb: &Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::List => list(context),
        Verb::Show { version } => show(version.as_deref(), context),
        Verb::Train { .. } | Verb::Predict { .. } => Ok(()),
    }
}

pub(super) async fn run(verb: &Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::Train { seed, trees, depth, background } => {
            let config =
                TrainConfig { seed: *seed, trees: *trees, depth: *depth, ..TrainConfig::default() };
            train(config, *background, context).await
        }
        Verb::Predict { target } => {
            let answer: Explanation = context.client().get(&format!("/v1/routes/{target}")).await?;
            if context.json {
                return output::json(&answer);
            }
            route::print_candidates(&answer)?;
            output::print(&format!("\n{} decides; milliseconds, round trip", answer.model_version))
        }
        Verb::List | Verb::Show { .. } => Ok(()),
    }
}

async fn train(config: TrainConfig, background: bool, context: &Context) -> anyhow::Result<()> {
    if background {
        // Lowest priority: routing comes first.
        let _ = rustix::process::nice(19);
    } else {
        // How long each head took, for people.
        let log = tracing_subscriber::fmt().with_writer(std::io::stderr);
        log.with_env_filter("meshwise=info").without_time().with_target(false).init();
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now_us = since.as_micros() as u64;
    let (database, models) = (context.data_dir.join(DATABASE), context.data_dir.join(MODELS));
    eprintln!("training on {} ...", database.display());
    let task =
        tokio::task::spawn_blocking(move || train_from_store(&database, &models, &config, now_us));
    let outcome = task.await??;
    let mut in_use_by_node = None;
    if outcome.promoted && !background {
        let reloaded = context.client().post::<Reloaded>("/v1/model/reload", &json!({})).await;
        in_use_by_node = match reloaded {
            Ok(reloaded) => Some(reloaded.version.as_ref() == Some(&outcome.model.version)),
            Err(ClientError::NoNode { .. }) => None,
            Err(error) => return Err(error.into()),
        };
    }
    if context.json {
        return output::json(&json!({
            "version": outcome.model.version,
            "promoted": outcome.promoted,
            "reason": outcome.reason,
            "in_use_by_node": in_use_by_node,
            "card": outcome.model.card,
        }));
    }
    output::print(&outcome.model.version)?;
    output::print(&outcome.reason)?;
    match in_use_by_node {
        Some(true) => output::print("the running node uses it from now on"),
        Some(false) => output::print("the running node uses another version"),
        None => Ok(()),
    }
}

fn list(context: &Context) -> anyhow::Result<()> {
    let models = registry(context).list()?;
    if context.json {
        let entry = |listed: &crate::learn::ListedModel| match &listed.model {
            Ok(model) => json!({
                "version": listed.version, "champion": listed.champion, "card": model.card,
            }),
            Err(error) => json!({
                "version": listed.version, "champion": listed.champion, "error": error.to_string(),
            }),
        };
        return output::json(&models.iter().map(entry).collect::<Vec<_>>());
    }
    let columns = ["", "version", "trained", "rows", "accuracy", "(average)", "error", "(average)"];
    let mut table = output::table(&columns);
    for listed in &models {
        let mark = if listed.champion { "*" } else { "" };
        match &listed.model {
            Ok(model) => {
                let card = &model.card;
                let percent = |share: f64| format!("{:.1} %", 100.0 * share);
                table.add_row([
                    mark.to_owned(),
                    listed.version.clone(),
                    output::time(card.created_us),
                    card.rows_train.to_string(),
                    percent(card.model.accuracy),
                    percent(card.moving_average.accuracy),
                    format!("{:.4}", card.model.rmse_ln),
                    format!("{:.4}", card.moving_average.rmse_ln),
                ]);
            }
            Err(error) => {
                table.add_row([mark.to_owned(), listed.version.clone(), "damaged".into()]);
                eprintln!("meshwise: {error}");
            }
        }
    }
    output::rows(&table, "no models yet; train one with 'meshwise model train'")
}

fn show(version: Option<&str>, context: &Context) -> anyhow::Result<()> {
    let registry = registry(context);
    let model = match version {
        Some(version) => registry.load(version)?,
        None => registry.champion()?.ok_or_else(|| {
            anyhow::anyhow!("no model is in use; train one with 'meshwise model train'")
        })?,
    };
    if context.json {
        return output::json(&json!({
            "version": model.version,
            "target": model.latency.target,
            "schema_hash": model.schema_hash,
            "feature_names": model.feature_names,
            "trees": model.latency.trees.roots.len(),
            "nodes": model.latency.trees.feature.len(),
            "interval": model.latency.interval,
            "card": model.card,
        }));
    }
    print_card(&model)
}

fn print_card(model: &ForestModel) -> anyhow::Result<()> {
    let card = &model.card;
    output::print(&format!(
        "{}\ntrained  {} on {} rows from {} to {}\nfit      {}\nschema   {}, {} features\n\
         trees    {} with {} nodes\n",
        model.version,
        output::time(card.created_us),
        card.rows_train,
        output::time(card.trained_from_us),
        output::time(card.trained_to_us),
        card.parameters,
        model.schema_hash,
        model.feature_names.len(),
        model.latency.trees.roots.len(),
        model.latency.trees.feature.len(),
    ))?;
    let mut table = output::table(&["on later rows", "accuracy", "mae ms", "rmse ln"]);
    for (name, score) in [
        ("model", card.model),
        ("moving average", card.moving_average),
        ("last value", card.last_value),
    ] {
        table.add_row([
            format!("{name} ({} rows)", card.rows_test),
            format!("{:.1} %", 100.0 * score.accuracy),
            format!("{:.2}", score.mae_ms),
            format!("{:.4}", score.rmse_ln),
        ]);
    }
    output::rows(&table, "")?;
    let interval = model.latency.interval;
    output::print(&format!(
        "\n{:.0} % interval: {:+.1} % to {:+.1} % around the prediction",
        100.0 * interval.coverage,
        100.0 * interval.low.exp_m1(),
        100.0 * interval.high.exp_m1(),
    ))
}
