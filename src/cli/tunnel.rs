//! `meshwise tunnel`

use std::net::SocketAddr;

use super::{Context, output};
use crate::api::types::{OpenTunnel, Tunnel};
use crate::engine::overlay::Objective;
use crate::engine::traffic::message::RATE_MAX;
use crate::engine::types::ServiceName;

/// Carry local connections to a service.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Open a tunnel to a service and accept its TCP connections, or UDP datagrams, on a local
    /// address.
    Open {
        /// Name of the service.
        name: ServiceName,
        /// Local address; port 0 takes any free one.
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0", value_parser = listen)]
        listen: SocketAddr,
        /// Fix the relays between this node and the provider instead of having routes chosen (node
        /// ids or peer ids, in order, separated by commas; "" for the direct link).
        #[arg(long, value_name = "NODES")]
        via: Option<String>,
        /// What it wants from its routes [default: what the service wants].
        #[arg(long, value_parser = super::objective())]
        objective: Option<Objective>,
        /// Spread connections over this many routes, 1 to 4, or as many as there are [default: 2 for
        /// throughput, else the setting routing.paths].
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=4))]
        paths: Option<u8>,
        /// Have this much set aside on every link of its route, in each direction (such as
        /// 5mbit; kbit, mbit or gbit a second); the best routes are asked one after the other.
        #[arg(long, value_name = "RATE", value_parser = rate)]
        reserve: Option<u64>,
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
        Verb::Open { name, listen, via, objective, paths, reserve } => {
            let split = |via: String| {
                let relays = via.split(',').map(str::trim).filter(|relay| !relay.is_empty());
                relays.map(str::to_owned).collect()
            };
            let paths = paths.map(usize::from);
            let via = via.map(split);
            let (service, listen) = (name.to_string(), listen.to_string());
            let body = OpenTunnel { service, listen, via, objective, paths, reserve };
            let tunnel: Tunnel = client.post("/v1/tunnels", &body).await?;
            if context.json {
                return output::json(&tunnel);
            }
            output::print(&format!(
                "tunnel {}: {} ({}) -> {} over {}{}{}",
                tunnel.tunnel,
                tunnel.listen,
                tunnel.kind,
                tunnel.service,
                routes(&tunnel, " and "),
                fewer(tunnel.paths.len(), tunnel.paths_wanted),
                // Where it was refused, nothing was opened.
                if body.reserve.is_some() { ", the bandwidth is reserved" } else { "" },
            ))?;
            if let Some(trouble) = &tunnel.trouble {
                eprintln!("{trouble}: connections fail until that changes");
            }
            Ok(())
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
                "reserved",
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
                    reserved(tunnel),
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

/// What is set aside for a tunnel, and whether it is.
fn reserved(tunnel: &Tunnel) -> String {
    let Some(rate) = tunnel.reserved else { return "-".into() };
    let state = tunnel.reservation.as_deref().unwrap_or("pending");
    format!("{:.1} Mbit/s {state}", rate as f64 * 8.0 / 1e6)
}

/// An address and a port.
fn listen(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        let port = text.rsplit(':').next().and_then(|port| port.parse::<u16>().ok());
        format!("write an address and a port, as in 127.0.0.1:{}", port.unwrap_or(9000))
    })
}

/// A rate such as 5mbit, in bytes/s.
fn rate(text: &str) -> Result<u64, String> {
    let wrong = || {
        let most = RATE_MAX / 125_000_000;
        format!("a rate is a number with kbit, mbit or gbit, such as 5mbit, up to {most}gbit")
    };
    let units = [("kbit", 125.0), ("mbit", 125_000.0), ("gbit", 125_000_000.0)];
    let text = text.to_ascii_lowercase();
    let split = |(unit, bytes)| text.strip_suffix(unit).map(|number| (number, bytes));
    let (number, bytes): (&str, f64) = units.into_iter().find_map(split).ok_or_else(wrong)?;
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let rate = number * bytes;
    if (1.0..=RATE_MAX as f64).contains(&rate) { Ok(rate as u64) } else { Err(wrong()) }
}

/// The routes of a tunnel, one for each of its paths.
fn routes(tunnel: &Tunnel, between: &str) -> String {
    let routes: Vec<String> = tunnel.paths.iter().map(|route| output::route(route)).collect();
    if routes.is_empty() { "-".into() } else { routes.join(between) }
}

/// What there is to say when a tunnel has fewer routes than it may use, as the end of a sentence.
fn fewer(paths: usize, wanted: usize) -> String {
    if paths >= wanted {
        return String::new();
    }
    format!(
        " ({paths} of {wanted} paths: no more different routes are known; it takes them when they come)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_routes_than_paths_are_told() {
        assert_eq!((fewer(1, 1), fewer(2, 2)), (String::new(), String::new()));
        assert!(fewer(3, 4).starts_with(" (3 of 4 paths: no more different routes"));
    }

    #[test]
    fn rates_are_in_bits_and_bounded() {
        assert_eq!(rate("5mbit"), Ok(625_000));
        assert_eq!((rate("1.5 Gbit"), rate("8kbit")), (Ok(187_500_000), Ok(1_000)));
        assert_eq!(rate("8000gbit"), Ok(RATE_MAX));
        for wrong in ["0mbit", "0.001kbit", "8001gbit", "5", "mbit", "-1mbit", "nanmbit", "infmbit"]
        {
            assert!(rate(wrong).unwrap_err().contains("5mbit"), "{wrong}");
        }
    }
}
