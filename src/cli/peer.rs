//! `meshwise peer`

use std::time::Duration;

use super::{Context, output};
use crate::api::types::{Peer, Pinged};
use crate::engine::measure::window_statistics::quantile;

/// Between two pings.
const PING_EVERY: Duration = Duration::from_secs(1);

/// Look at connected peers, and at the way to them.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// List the connected peers and the quality of the links to them.
    List,
    /// Measure the way to a node and back, over the route that a tunnel to it would take now.
    Ping {
        /// Node id or peer id.
        node: String,
        /// How many probes, one a second.
        #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1_000))]
        count: u32,
    },
}

pub(super) async fn run(verb: &Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::List => list(context).await,
        Verb::Ping { node, count } => ping(node, *count, context).await,
    }
}

/// Fails when no probe came back.
async fn ping(node: &str, count: u32, context: &Context) -> anyhow::Result<()> {
    let client = context.client();
    let path = format!("/v1/peers/{node}/ping");
    let mut every = tokio::time::interval(PING_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut all: Vec<Pinged> = Vec::new();
    for _ in 0..count {
        every.tick().await;
        let pinged: Pinged = client.post(&path, &()).await?;
        if !context.json {
            let route = pinged.route.join(" - ");
            output::print(&match pinged.rtt_ms {
                Some(ms) => format!("{ms:.2} ms over {route}"),
                None => format!("no answer over {route}"),
            })?;
        }
        all.push(pinged);
    }
    if context.json {
        output::json(&all)?;
    }
    let answered: Vec<f64> = all.iter().filter_map(|pinged| pinged.rtt_ms).collect();
    if answered.is_empty() {
        anyhow::bail!("{node} did not answer; see 'meshwise route explain {node}'");
    }
    if !context.json {
        let median = quantile(&answered, 0.5).unwrap_or_default();
        eprintln!("{} of {count} came back, median {median:.2} ms", answered.len());
    }
    Ok(())
}

async fn list(context: &Context) -> anyhow::Result<()> {
    let peers: Vec<Peer> = context.client().get("/v1/peers").await?;
    if context.json {
        return output::json(&peers);
    }
    let mut table =
        output::table(&["node", "link", "rtt ms", "jitter ms", "loss", "rate", "busy", "peer id"]);
    for peer in &peers {
        let quality = peer.quality;
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let dash = || "-".to_owned();
        table.add_row([
            peer.node.clone(),
            peer.link.clone(),
            output::number(quality.map(|q| q.rtt_ms), 2),
            output::number(quality.map(|q| q.jitter_ms), 2),
            quality.map_or_else(dash, |q| percent(q.loss)),
            quality
                .and_then(|q| q.bandwidth)
                .map_or_else(dash, |b| format!("{}/s", output::bytes(b as u64))),
            quality.map_or_else(dash, |q| percent(q.utilisation)),
            peer.peer_id.clone(),
        ]);
    }
    output::rows(&table, "no peers are connected")
}
