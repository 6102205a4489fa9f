//! `meshwise tunnel`

use super::{Context, output};
use crate::api::types::{OpenTunnel, Tunnel};

/// Carry local connections to a service.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Open a tunnel to a service and accept connections for it on a local address.
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
        Verb::Open { name, listen, via } => {
            let split = |via: String| {
                let relays = via.split(',').map(str::trim).filter(|relay| !relay.is_empty());
                relays.map(str::to_owned).collect()
            };
            let body = OpenTunnel { service: name, listen, via: via.map(split), objective: None };
            let tunnel: Tunnel = client.post("/v1/tunnels", &body).await?;
            if context.json {
                return output::json(&tunnel);
            }
            let route = tunnel.route.as_deref().map_or_else(|| "-".into(), output::route);
            output::print(&format!(
                "tunnel {}: {} -> {} over {route}",
                tunnel.tunnel, tunnel.listen, tunnel.service
            ))
        }
        Verb::List => {
            let tunnels: Vec<Tunnel> = client.get("/v1/tunnels").await?;
            if context.json {
                return output::json(&tunnels);
            }
            let columns = [
                "tunnel", "listen", "service", "state", "open", "total", "sent", "received",
                "route",
            ];
            let mut table = output::table(&columns);
            for tunnel in &tunnels {
                table.add_row([
                    tunnel.tunnel.to_string(),
                    tunnel.listen.clone(),
                    tunnel.service.clone(),
                    if tunnel.reachable { "up".into() } else { "no route".into() },
                    tunnel.open_connections.to_string(),
                    tunnel.connections.to_string(),
                    output::bytes(tunnel.sent_bytes),
                    output::bytes(tunnel.received_bytes),
                    tunnel.route.as_deref().map_or_else(|| "-".into(), output::route),
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
