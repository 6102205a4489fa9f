//! `meshwise status`

use super::champion::SHIFTED_MAX;
use super::{Context, output};
use crate::api::types::{Learning, Link, MixFigures, Status, Told};
use crate::engine::predict::watch::LiveLoss;
use crate::learn::Action;

pub(super) async fn run(context: &Context) -> anyhow::Result<()> {
    let status: Status = context.client().get("/v1/status").await?;
    if context.json {
        return output::json(&status);
    }
    let mut table = output::table(&["", ""]);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("node", format!("{} ({})", status.node, status.peer_id));
    row("version", format!("{}, up {:.0} s", status.version, status.uptime_s));
    let network = &status.network;
    row("network", format!("{} (root {})", network.name, network.root));
    row("belongs until", super::network::until(network));
    if let Some(seen) = network.members_seen {
        row("members seen", seen.to_string());
    }
    row("joined", if status.joined { "yes" } else { "no" }.into());
    for address in &status.listening {
        row("listening", address.clone());
    }
    let proxy = status.socks.as_ref().map(|address| format!("socks5h://{address}"));
    row("proxy", proxy.unwrap_or_else(|| "off".into()));
    row("peers", format!("{}, {} links up", status.peers, status.links_up));
    for link in &status.links {
        row("link", link_line(link));
    }
    row("nodes known", status.nodes_known.to_string());
    row("tunnels", status.tunnels.to_string());
    row("decides", status.model.clone());
    if let Some(error) = &status.model_error {
        row("champion refused", error.clone());
    }
    if let Some(accuracy) = &status.accuracy {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        row(
            "held-out accuracy",
            format!(
                "{} (moving average {})",
                percent(accuracy.model),
                percent(accuracy.moving_average)
            ),
        );
    }
    learning_rows(&status, &mut row);
    let calculation = status.route_calculation_us;
    if let (Some(p50), Some(p99)) = (calculation.p50, calculation.p99) {
        row("route calculation", format!("{p50:.0} µs median, {p99:.0} µs p99"));
    }
    let forwarded = status.forwarded;
    row(
        "forwarded",
        format!("{} datagrams, {}", forwarded.datagrams, output::bytes(forwarded.bytes)),
    );
    let control = status.control;
    for (name, heard, said) in [
        ("gossip", control.gossip_heard, control.gossip_said),
        ("synchronisation", control.sync_heard, control.sync_said),
    ] {
        row(name, format!("heard {}, said {}", told(heard, &status), told(said, &status)));
    }
    for (why, count) in &status.dropped {
        let meaning = super::drops::meaning(why).map(|meaning| format!(": {meaning}"));
        row("dropped", format!("{count} {why}{}", meaning.unwrap_or_default()));
    }
    if let Some(error) = &status.store_error {
        row("database", error.clone());
    }
    output::rows(&table, "")
}

/// How much was told, and the bytes that this is in a second on average.
fn told(told: Told, status: &Status) -> String {
    let per_s = told.bytes as f64 / status.uptime_s.max(1.0);
    let (all, per_s) = (output::bytes(told.bytes), output::bytes(per_s as u64));
    format!("{} in {} messages ({per_s}/s)", all, told.messages)
}

/// A link's queue and what it can carry.
fn link_line(link: &Link) -> String {
    let Link { neighbour, queue_ms, sent, marked, dropped, capacity } = link;
    let capacity = capacity.map_or_else(
        || "capacity unknown".to_owned(),
        |rate| format!("{}/s expected", output::bytes(rate as u64)),
    );
    format!(
        "{neighbour}: {capacity}, queue {} ms median, {} ms p99, {sent} sent, {marked} marked, {dropped} dropped",
        output::number(queue_ms.p50, 1),
        output::number(queue_ms.p99, 1),
    )
}

/// How the models do, and what became of them.
fn learning_rows(status: &Status, row: &mut impl FnMut(&str, String)) {
    let Learning { challenger, champion_live, challenger_live, last_change, .. } = &status.learning;
    let live = |loss: &LiveLoss| {
        format!(
            "error {:.4} ln(ms), moving average {:.4}, {} probes, {} failed",
            loss.model_ln, loss.moving_average_ln, loss.probes, loss.failures
        )
    };
    if let Some(loss) = champion_live {
        row("live", live(loss));
    }
    if let Some(mix) = &status.learning.mix {
        let weights = mix.weights.iter().map(|(name, weight)| format!("{name} {weight:.2}"));
        let weights = weights.collect::<Vec<_>>().join(", ");
        let MixFigures { excess_ln, slack_ln, .. } = mix;
        row(
            "mix",
            format!("{weights}; {excess_ln:+.3} ln(ms) beside the average, slack {slack_ln:.3}"),
        );
    }
    let rule = &status.learning.rule;
    let said = super::explain::rule(rule.centre, rule.pessimism, rule.margin);
    row("rule", format!("{said}; learned from {} choices", rule.choices));
    if let Some(challenger) = challenger {
        row("in shadow", challenger.clone());
    }
    if let Some(loss) = challenger_live {
        row("shadow live", live(loss));
    }
    if let Some(change) = last_change {
        let name = match change.action {
            Action::Promoted => "last promotion",
            Action::RolledBack => "last roll-back",
        };
        row(name, format!("{}: {}", output::time(change.at_us), change.reason));
    }
    if let Some(at_us) = status.last_training_us {
        let result = status.last_training_error.as_deref().unwrap_or("done");
        row("last training", format!("{}: {result}", output::time(at_us)));
    }
    if status.learning.training {
        row("training", "runs now".into());
    }
    let shifted = &status.learning.features_shifted;
    if !shifted.is_empty() {
        let named = shifted.iter().take(SHIFTED_MAX);
        let named: Vec<_> = named.map(|(feature, index)| format!("{feature} {index:.2}")).collect();
        let named = named.join(", ");
        row(
            "features shifted",
            format!("{} since the model's training, most of all {named}", shifted.len()),
        );
    }
    if let Some(at_us) = status.learning.last_drift_us {
        let alerts = status.learning.drift_alerts;
        row("drift alerts", format!("{alerts}, the last at {}", output::time(at_us)));
    }
}
