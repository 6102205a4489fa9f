//! `meshwise tunnel`

use super::{Context, output};
use crate::api::types::{OpenTunnel, Tunnel};
use crate::engine::overlay::Objective;

/// Carry local connections to a service.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Open a tunnel to a service and accept its TCP connections, or UDP datagrams, on a local
    /// address.
    Open {
        /// Name of the service.
        name: String,
        /// Local address; port 0 takes any free one.
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
        listen: String,
        /// Fix the relays instead of having routes chosen (node ids or peer ids, in order,
        /// separated by commas; empty for the direct link).
        #[arg(long, value_name = "NODES")]
        via: Option<String>,
        /// What it wants from its routes [default: what the service wants].
        #[arg(long, value_parser = super::objective())]
        objective: Option<Objective>,
        /// Spread connections over this many routes, 1 to 4 [default: 2 for throughput, else the
        /// setting routing.paths].
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=4))]
        paths: Option<u8>,
    },
    /// List the open tunnels.
    List,
    /// Close a tunnel.
    Close {
        /// Its number, from `tunnel list`.
        tunnel: u16,
    },
}

pub(super) async fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    let client = context.client();
    match verb {
        Verb::Open { name, listen, via, objective, paths } => {
            let split = |via: String| {
                let relays = via.split(',').map(str::trim).filter(|relay| !relay.is_empty());
                relays.map(str::to_owned).collect()
            };
            let paths = paths.map(usize::from);
            let via = via.map(split);
            let body = OpenTunnel { service: name, listen, via, objective, paths };
            let tunnel: Tunnel = client.post("/v1/tunnels", &body).await?;
            if context.json {
                return output::json(&tunnel);
            }
            output::print(&format!(
                "tunnel {}: {} ({}) -> {} over {}",
                tunnel.tunnel,
                tunnel.listen,
                tunnel.kind,
                tunnel.service,
                routes(&tunnel, " and ")
            ))
        }
        Verb::List => {
            let tunnels: Vec<Tunnel> = client.get("/v1/tunnels").await?;
            if context.json {
                return output::json(&tunnels);
            }
            let columns = [
                "tunnel",
                "listen",
                "service",
                "kind",
                "objective",
                "state",
                "open",
                "total",
                "sent",
                "received",
                "route",
            ];
            let mut table = output::table(&columns);
            for tunnel in &tunnels {
                table.add_row([
                    tunnel.tunnel.to_string(),
                    tunnel.listen.clone(),
                    tunnel.service.clone(),
                    tunnel.kind.clone(),
                    tunnel.objective.to_string(),
                    if tunnel.reachable { "up".into() } else { "no route".into() },
                    tunnel.open_connections.to_string(),
                    tunnel.connections.to_string(),
                    output::bytes(tunnel.sent_bytes),
                    output::bytes(tunnel.received_bytes),
                    routes(tunnel, "\n"),
                ]);
            }
            output::rows(&table, "no tunnels are open")
        }
        Verb::Close { tunnel } => {
            let done: serde_json::Value = client.delete(&format!("/v1/tunnels/{tunnel}")).await?;
            if context.json {
                return output::json(&done);
            }
            output::print(&format!("closed tunnel {tunnel}"))
        }
    }
}

/// The routes of a tunnel, one for each of its paths.
fn routes(tunnel: &Tunnel, between: &str) -> String {
    let routes: Vec<String> = tunnel.paths.iter().map(|route| output::route(route)).collect();
    if routes.is_empty() { "-".into() } else { routes.join(between) }
}
