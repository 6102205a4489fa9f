//! `meshwise peer`

use super::{Context, output};
use crate::api::types::Peer;

/// Look at connected peers.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// List the connected peers and the quality of the links to them.
    List,
}

pub(super) async fn run(verb: &Verb, context: &Context) -> anyhow::Result<()> {
    let Verb::List = verb;
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
