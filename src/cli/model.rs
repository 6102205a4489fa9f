//! `meshwise model`

use serde_json::json;

use super::{Context, champion, explain, import, judge, output, route};
use crate::api::types::Explanation;
use crate::engine::predict::ForestModel;
use crate::learn::{ModelRegistry, TrainConfig, train_from_store};
use crate::node::{DATABASE, MODELS};

/// Train, list and ask models.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Train a model on everything measured so far. Without a champion it becomes champion when it
    /// does at least as well as the moving average on the newest measurements, which it is not
    /// shown; otherwise it runs in shadow as challenger. The challenger before is judged first: it
    /// becomes champion when it is better on what was measured after its training.
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
        /// Name of the version [default: time and content].
        #[arg(long)]
        name: Option<String>,
        /// Run when nobody else wants the processor (Linux's idle class where 'chrt' is installed, else
        /// the lowest priority), in at most 4 GiB of memory, and leave it to the caller to tell the
        /// node, as scheduled training does.
        #[arg(long)]
        background: bool,
    },
    /// List all versions.
    List,
    /// Show what a version was trained on and how it did.
    Show {
        /// A version, champion or challenger [default: the one in use].
        version: Option<String>,
    },
    /// Compare two models and the baselines on the newest measurements, the same ones for all.
    Compare {
        /// A version, champion, challenger, moving-average, last-value or level [default: champion].
        a: Option<String>,
        /// Another one [default: challenger, or moving-average when there is none].
        b: Option<String>,
    },
    /// Estimate what a model's choices would have cost, from the decisions of this node that were made by
    /// others. Needs 'learning.explore' above 0 for a while.
    Judge {
        /// A version, champion, challenger, moving-average, last-value or level.
        version: String,
    },
    /// Make a version the one in use.
    Promote {
        /// A version, or `challenger`.
        version: String,
    },
    /// Take the model in use out of use and go back to the one before, or to the moving average.
    Rollback,
    /// Show what the forecast for the route in use is made of: what each feature adds.
    Explain {
        /// Name of a service, node id or peer id.
        target: String,
    },
    /// Take over a model that XGBoost trained elsewhere, on an export ('data export').
    Import(import::Args),
    /// Ask the running node's model about the routes to a service or a node.
    Predict {
        /// Name of a service, node id or peer id.
        target: String,
    },
}

impl Verb {
    /// Whether it needs only files.
    pub(super) fn is_offline(&self) -> bool {
        matches!(
            self,
            Self::List
                | Self::Show { .. }
                | Self::Compare { .. }
                | Self::Judge { .. }
                | Self::Import(_)
        )
    }
}

fn registry(context: &Context) -> ModelRegistry {
    ModelRegistry::new(context.data_dir.join(MODELS))
}

pub(super) fn offline(verb: &Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::List => list(context),
        Verb::Show { version } => show(version.as_deref(), context),
        Verb::Compare { a, b } => champion::compare(a.as_deref(), b.as_deref(), context),
        Verb::Judge { version } => judge::run(version, context),
        Verb::Import(args) => import::run(args, context),
        _ => Ok(()),
    }
}

pub(super) async fn run(verb: &Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::Train { seed, trees, depth, name, background } => {
            let config = TrainConfig {
                seed: *seed,
                trees: *trees,
                depth: *depth,
                version: name.clone(),
                ..TrainConfig::default()
            };
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
        Verb::Promote { version } => champion::promote(version, context).await,
        Verb::Rollback => champion::rollback(context).await,
        Verb::Explain { target } => explain::model(target, context).await,
        Verb::List
        | Verb::Show { .. }
        | Verb::Compare { .. }
        | Verb::Judge { .. }
        | Verb::Import(_) => Ok(()),
    }
}

async fn train(config: TrainConfig, background: bool, context: &Context) -> anyhow::Result<()> {
    if background {
        super::background::give_way()?;
    } else {
        // How long each head took, for people.
        let log = tracing_subscriber::fmt().with_writer(std::io::stderr);
        log.with_env_filter("meshwise=info")
            .without_time()
            .with_target(false)
            .with_ansi(false)
            .init();
    }
    let now_us = champion::now_us();
    let (database, models) = (context.data_dir.join(DATABASE), context.data_dir.join(MODELS));
    eprintln!("training on {} ...", database.display());
    let task =
        tokio::task::spawn_blocking(move || train_from_store(&database, &models, &config, now_us));
    let outcome = task.await??;
    let in_use_by_node = match background {
        true => None,
        false => champion::reload(context, Some(&outcome.model.version)).await?,
    };
    if context.json {
        return output::json(&json!({
            "version": outcome.model.version,
            "promoted": outcome.promoted,
            "reason": outcome.reason,
            "judged": outcome.judged,
            "in_use_by_node": in_use_by_node,
            "card": outcome.model.card,
        }));
    }
    if let Some(judged) = &outcome.judged {
        output::print(&format!("judged: {}", judged.reason))?;
    }
    output::print(&outcome.model.version)?;
    output::print(&outcome.reason)?;
    champion::print_in_use(in_use_by_node.filter(|_| outcome.promoted))
}

fn list(context: &Context) -> anyhow::Result<()> {
    let models = registry(context).list()?;
    if context.json {
        let entry = |listed: &crate::learn::ListedModel| match &listed.model {
            Ok(model) => json!({
                "version": listed.version, "champion": listed.champion,
                "challenger": listed.challenger, "card": model.card,
            }),
            Err(error) => json!({
                "version": listed.version, "champion": listed.champion,
                "challenger": listed.challenger, "error": error.to_string(),
            }),
        };
        return output::json(&models.iter().map(entry).collect::<Vec<_>>());
    }
    let columns =
        ["", "version", "data until", "rows", "accuracy", "(average)", "error", "(average)"];
    let mut table = output::table(&columns);
    for listed in &models {
        let mark = match (listed.champion, listed.challenger) {
            (true, _) => "*",
            (false, true) => "shadow",
            (false, false) => "",
        };
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
    if models.is_empty() {
        return output::print("no models yet; train one with 'meshwise model train'");
    }
    if !models.iter().any(|listed| listed.champion) {
        table.add_row(["*", "moving-average"]);
    }
    output::rows(&table, "")?;
    output::print(
        "\n* decides; accuracy and error (rmse of ln(ms)) are on each model's own later rows: 'meshwise model \
         compare' puts two on the same",
    )
}

fn show(version: Option<&str>, context: &Context) -> anyhow::Result<()> {
    let registry = registry(context);
    let model = match version {
        Some(version) => registry.load(&registry.resolve(version)?)?,
        None => match registry.champion()? {
            Some(model) => model,
            None => anyhow::bail!("{}", champion::no_champion(&registry)?),
        },
    };
    if context.json {
        return output::json(&json!({
            "version": model.version,
            "target": model.latency.target,
            "schema_hash": model.schema_hash,
            "feature_names": model.feature_names,
            "trees": model.latency.trees.roots.len(),
            "nodes": model.latency.trees.nodes.len(),
            "interval": model.latency.interval,
            "ranking": model.ranking,
            "card": model.card,
        }));
    }
    print_card(&model)
}

/// The ranking rule, and what it was chosen on. Routers find one of their own.
fn ranking(model: &ForestModel) -> String {
    let rule =
        super::explain::rule(model.ranking.centre, model.ranking.pessimism, model.ranking.margin);
    let why = match &model.card.ranking {
        None => "not chosen on data".into(),
        Some(card) if card.chosen_ms == card.default_ms => {
            format!("the default: in {} choices no other rule surely saved", card.choices)
        }
        Some(card) => format!(
            "in {} choices {:.2} ms instead of {:.2} by the default",
            card.choices, card.chosen_ms, card.default_ms
        ),
    };
    format!("where models are judged by their forecasts alone, {rule} ({why})")
}

fn print_card(model: &ForestModel) -> anyhow::Result<()> {
    let card = &model.card;
    let trained = match card.rows_train {
        0 => output::time(card.created_us),
        rows => format!(
            "{} on {rows} rows from {} to {}",
            output::time(card.created_us),
            output::time(card.trained_from_us),
            output::time(card.trained_to_us),
        ),
    };
    output::print(&format!(
        "{}\ntrained  {trained}\nfit      {}\ncommit   {}\nschema   {}, {} features\n\
         trees    {} with {} nodes\nranking  {}\n",
        model.version,
        card.parameters,
        card.commit.as_deref().unwrap_or("not recorded"),
        model.schema_hash,
        model.feature_names.len(),
        model.latency.trees.roots.len(),
        model.latency.trees.nodes.len(),
        ranking(model),
    ))?;
    if card.rows_test == 0 {
        return output::print("not measured: there were no rows to judge it on");
    }
    let columns = [
        "on later rows",
        "rows",
        "accuracy",
        "mae ms",
        "rmse ln",
        "average's",
        "last's",
        "level's",
    ];
    let mut table = output::table(&columns);
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let whole = ("all", card.rows_test, card.model);
    let whole = (whole, [card.moving_average, card.last_value, card.level]);
    let classes = card
        .classes
        .iter()
        .map(|c| ((c.class.as_str(), c.rows, c.model), [c.moving_average, c.last_value, c.level]));
    for ((name, rows, own), baselines) in std::iter::once(whole).chain(classes) {
        table.add_row([
            name.to_owned(),
            rows.to_string(),
            percent(own.accuracy),
            format!("{:.2}", own.mae_ms),
            format!("{:.4}", own.rmse_ln),
            format!("{:.4}", baselines[0].rmse_ln),
            format!("{:.4}", baselines[1].rmse_ln),
            format!("{:.4}", baselines[2].rmse_ln),
        ]);
    }
    output::rows(&table, "")?;
    output::print(&format!(
        "\n{:.0} % interval: held {} of later rows, mean width {:.3} ln(ms)",
        100.0 * model.latency.interval.coverage,
        percent(card.coverage),
        card.width_ln,
    ))?;
    if let Some(reliability) = &card.reliability {
        output::print(&format!(
            "reliability: Brier score {:.4} (base rate {:.4}), log loss {:.4} (base rate {:.4}), {}",
            reliability.brier,
            reliability.brier_base,
            reliability.log_loss,
            reliability.log_loss_base,
            if reliability.earns_its_place() { "decides" } else { "not used" },
        ))?;
    }
    if let Some(throughput) = &card.throughput {
        let last = throughput.rmse_ln_last.map(|last| format!(", last value's {last:.4}"));
        output::print(&format!(
            "throughput: rmse ln {:.4} on {} later rows (reference's {:.4}{}), {}",
            throughput.rmse_ln,
            throughput.rows_test,
            throughput.rmse_ln_reference,
            last.unwrap_or_default(),
            if throughput.earns_its_place() { "decides" } else { "not used" },
        ))?;
    }
    for failure in &card.known_failures {
        output::print(&format!("known failure: {failure}"))?;
    }
    Ok(())
}
