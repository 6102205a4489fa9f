//! `meshwise status`

use super::{Context, output};
use crate::api::types::Status;

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
    row("joined", if status.joined { "yes" } else { "no" }.into());
    for address in &status.listening {
        row("listening", address.clone());
    }
    row("peers", format!("{}, {} links up", status.peers, status.links_up));
    row("nodes known", status.nodes_known.to_string());
    row("tunnels", status.tunnels.to_string());
    row("decides", status.model.clone());
    if let Some(error) = &status.model_error {
        row("champion refused", error.clone());
    }
    if let Some(card) = &status.model_card {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        row(
            "held-out accuracy",
            format!(
                "{} (moving average {})",
                percent(card.model.accuracy),
                percent(card.moving_average.accuracy)
            ),
        );
    }
    if let Some(error) = &status.last_training_error {
        row("last training", error.clone());
    }
    let calculation = status.route_calculation_us;
    if let (Some(p50), Some(p99)) = (calculation.p50, calculation.p99) {
        row("route calculation", format!("{p50:.0} µs median, {p99:.0} µs p99"));
    }
    let forwarded = status.forwarded;
    row(
        "forwarded",
        format!("{} datagrams, {}", forwarded.datagrams, output::bytes(forwarded.bytes)),
    );
    for (why, count) in &status.dropped {
        row("dropped", format!("{count} {why}"));
    }
    if let Some(error) = &status.store_error {
        row("database", error.clone());
    }
    output::rows(&table, "")
}
