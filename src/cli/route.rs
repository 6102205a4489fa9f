//! `meshwise route`

use super::{Context, explain, output};
use crate::api::types::{Explanation, Reach, RouteCandidate, Trace};

/// The feature that is the rate of a route's narrowest link (bytes/s), as advertised.
const NARROWEST: &str = "link_bandwidth_min";

/// What the columns of the candidates mean.
const LEGEND: &str = "
score: 0 to 1, more is better; on average: what it is by the moving average alone
predicted, interval, moving avg, last: round trip (ms); compared by: the bound (ms) that the score counts
delivers: share of packets that are forecast to arrive; -: not known, or no model forecasts it";

/// Look at routes, and at why one was chosen.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// List the candidate routes to a service or a node; without one, the route to every node that
    /// is known.
    List {
        /// Name of a service, node id or peer id.
        target: Option<String>,
    },
    /// Show why the route in use was chosen: forecasts and what each feature adds, scores, what
    /// would have turned the decision, and what came of the last one.
    Explain {
        /// Name of a service, node id or peer id.
        target: String,
        /// Of several tunnels there this one, by its number from `tunnel list`.
        #[arg(long, value_name = "N")]
        tunnel: Option<u16>,
    },
    /// Measure how far away each node of the route in use is. Probes go before data at each queue: what
    /// a full queue adds is not in it.
    Trace {
        /// Name of a service, node id or peer id.
        target: String,
        /// Of several tunnels there this one, by its number from `tunnel list`.
        #[arg(long, value_name = "N")]
        tunnel: Option<u16>,
    },
}

pub(super) async fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    let (target, tunnel, reasons) = match verb {
        Verb::List { target: None } => return list_all(context).await,
        Verb::List { target: Some(target) } => (target, None, false),
        Verb::Explain { target, tunnel } => (target, tunnel, true),
        Verb::Trace { target, tunnel } => return trace(&target, tunnel, context).await,
    };
    let path = format!("/v1/routes/{target}{}", query(tunnel));
    let answer: Explanation = context.client().get(&path).await?;
    if context.json {
        return output::json(&answer);
    }
    print_candidates(&answer)?;
    if reasons { explain::reasons(&answer) } else { Ok(()) }
}

async fn list_all(context: &Context) -> anyhow::Result<()> {
    let reached: Vec<Reach> = context.client().get("/v1/routes").await?;
    if context.json {
        return output::json(&reached);
    }
    let mut table = output::table(&["node", "forecast ms", "route"]);
    for Reach { node, route, forecast_ms } in &reached {
        let route = route.as_deref().map_or_else(|| "none is alive".into(), output::route);
        table.add_row([node.clone(), output::number(*forecast_ms, 1), route]);
    }
    output::rows(&table, "no other node is known")
}

/// What a path ends with when a tunnel is meant.
fn query(tunnel: Option<u16>) -> String {
    tunnel.map_or_else(String::new, |tunnel| format!("?tunnel={tunnel}"))
}

async fn trace(target: &str, tunnel: Option<u16>, context: &Context) -> anyhow::Result<()> {
    let path = format!("/v1/routes/{target}/trace{}", query(tunnel));
    let traced: Trace = context.client().get(&path).await?;
    if context.json {
        return output::json(&traced);
    }
    let mut table = output::table(&["", "node", "round trip", "link", "lost"]);
    for (number, node) in (1..).zip(&traced.nodes) {
        let ms = |ms: Option<f64>| ms.map_or_else(|| "-".into(), |ms| format!("{ms:.2} ms"));
        table.add_row([
            number.to_string(),
            node.node.clone(),
            ms(node.rtt_ms),
            ms(node.link_ms),
            format!("{} of {}", node.lost, node.probes),
        ]);
    }
    output::rows(&table, "")
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
        "compared by",
        "bandwidth",
        "delivers",
        "route",
    ]);
    for candidate in &answer.candidates {
        let mark = match candidate {
            RouteCandidate { chosen: true, .. } => "*",
            RouteCandidate { alive: false, .. } => "dead",
            RouteCandidate { held: true, .. } => "held",
            RouteCandidate { refused: true, .. } => "refused",
            _ => "",
        };
        let interval = candidate.interval_ms;
        let bandwidth = candidate.features.get(NARROWEST);
        table.add_row([
            mark.to_owned(),
            format!("{:.3}", candidate.score),
            format!("{:.3}", candidate.baseline_score),
            output::number(candidate.predicted_ms, 1),
            interval.map_or_else(|| "-".into(), |(low, high)| format!("{low:.1}..{high:.1}")),
            output::number(candidate.moving_average_ms, 1),
            output::number(candidate.last_value_ms, 1),
            output::number(candidate.bound_ms, 1),
            bandwidth.map_or_else(|| "-".into(), |rate| format!("{:.1} Mbit/s", rate * 8.0 / 1e6)),
            candidate.predicted_delivery.map_or_else(|| "-".into(), percent),
            output::route(&candidate.route),
        ]);
    }
    output::rows(&table, "no route is known")?;
    if answer.candidates.is_empty() {
        return Ok(());
    }
    output::print(LEGEND)
}

/// A share with one digit behind the point.
fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bandwidth_that_is_shown_is_a_feature() {
        assert!(crate::engine::predict::schema::index_of(NARROWEST).is_some());
    }
}
