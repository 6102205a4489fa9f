//! `meshwise route`

use super::{Context, output};
use crate::api::types::Explanation;

/// Look at routes, and at why one was chosen.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// List the candidate routes to a service or a node.
    List {
        /// Name of a service, node id or peer id.
        target: String,
    },
    /// Show why the route in use was chosen: forecasts, scores, and what they are made from.
    Explain {
        /// Name of a service, node id or peer id.
        target: String,
    },
}

pub(super) async fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    let (target, explain) = match verb {
        Verb::List { target } => (target, false),
        Verb::Explain { target } => (target, true),
    };
    let answer: Explanation = context.client().get(&format!("/v1/routes/{target}")).await?;
    if context.json {
        return output::json(&answer);
    }
    print_candidates(&answer)?;
    if explain { print_reasons(&answer) } else { Ok(()) }
}

/// The table of candidates, also for `model predict`.
pub(super) fn print_candidates(answer: &Explanation) -> anyhow::Result<()> {
    let mut table = output::table(&[
        "",
        "score",
        "on average",
        "predicted",
        "interval",
        "moving avg",
        "last",
        "route",
    ]);
    for candidate in &answer.candidates {
        let mark = match (candidate.chosen, candidate.alive) {
            (true, _) => "*",
            (false, true) => "",
            (false, false) => "dead",
        };
        let interval = candidate.interval_ms;
        table.add_row([
            mark.to_owned(),
            format!("{:.3}", candidate.score),
            format!("{:.3}", candidate.baseline_score),
            output::number(candidate.predicted_ms, 1),
            interval.map_or_else(|| "-".into(), |(low, high)| format!("{low:.1}..{high:.1}")),
            output::number(candidate.moving_average_ms, 1),
            output::number(candidate.last_value_ms, 1),
            output::route(&candidate.route),
        ]);
    }
    output::rows(&table, "no route is known")
}

fn print_reasons(answer: &Explanation) -> anyhow::Result<()> {
    let why = match answer.reason.as_str() {
        "first" => "it is the best of the candidates",
        "better" => "it was better than the one before by more than the margin",
        "current-dead" => "the one before died",
        "best" => "it is still the best",
        "within-margin" => "another is better, but by less than the margin",
        "held" => "another is better, but the last change is too recent",
        "forced" => "its path was fixed with --via",
        _ => "no candidate is alive",
    };
    let subject = if answer.candidates.iter().any(|candidate| candidate.chosen) {
        "* is in use: "
    } else {
        "No route is in use: "
    };
    output::print(&format!(
        "\n{subject}{why}.\nDecided by {} at {}; milliseconds, round trip.",
        answer.model_version,
        output::time(answer.at_us)
    ))?;
    let Some(chosen) = answer.candidates.iter().position(|candidate| candidate.chosen) else {
        return Ok(());
    };
    let other = (0..answer.candidates.len()).find(|index| *index != chosen);
    let columns: &[&str] =
        if other.is_some() { &["feature", "in use", "best other"] } else { &["feature", "in use"] };
    let mut table = output::table(columns);
    for (name, value) in &answer.candidates[chosen].features {
        let mut row = vec![name.clone(), format!("{value:.3}")];
        if let Some(other) = other {
            let value = answer.candidates[other].features.get(name).copied();
            row.push(output::number(value, 3));
        }
        table.add_row(row);
    }
    output::print("")?;
    output::rows(&table, "")
}
