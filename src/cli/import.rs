//! `meshwise model import`

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::{Context, output};
use crate::engine::predict::Reference;
use crate::learn::{ImportOptions, import_file};
use crate::node::{DATABASE, MODELS};

/// Take over a model that XGBoost trained elsewhere.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// XGBoost's JSON model, written by Booster.save_model("NAME.json"); objective
    /// reg:squarederror on ln(rtt_ms), trained with missing=-1000000.
    file: PathBuf,
    /// Name of the version [default: made of time and content].
    #[arg(long)]
    version: Option<String>,
    /// The base margin in training was the logarithm of this: zero (none was used), last-value,
    /// moving-average or level.
    #[arg(long, default_value = "zero", value_parser = reference)]
    reference: Reference,
}

fn reference(text: &str) -> Result<Reference, String> {
    let known = serde_json::from_value(Value::String(text.to_owned())).ok();
    known
        .filter(|reference| *reference != Reference::LinkBandwidth)
        .ok_or_else(|| "it must be zero, last-value, moving-average or level".to_owned())
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let options = ImportOptions {
        version: args.version.clone(),
        reference: args.reference,
        now_us: since.as_micros() as u64,
    };
    let (store, models) = (context.data_dir.join(DATABASE), context.data_dir.join(MODELS));
    let imported = import_file(&args.file, &store, &models, &options)?;
    let (model, card) = (&imported.model, &imported.model.card);
    if context.json {
        return output::json(&json!({
            "version": model.version,
            "rows": imported.rows,
            "interval": model.latency.interval,
            "card": card,
        }));
    }
    output::print(&model.version)?;
    output::print(&card.parameters)?;
    if imported.rows == 0 {
        return output::print(
            "its interval is a guess; import it again, under another name, when this node has \
             measured more",
        );
    }
    output::print(&format!(
        "{:.1} % of {} route probes predicted well (moving average {:.1} %), error {:.4} ln(ms) \
         (moving average {:.4})",
        100.0 * card.model.accuracy,
        imported.rows,
        100.0 * card.moving_average.accuracy,
        card.model.rmse_ln,
        card.moving_average.rmse_ln,
    ))
}
