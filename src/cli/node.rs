//! `meshwise node`

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use super::champion::now_us;
use super::{Context, network, output, settings};
use crate::api::{MetricsServer, Server};
use crate::config::Config;
use crate::learn::first::install_first;
use crate::node::{MODELS, Node, NodeOptions};

/// Run a node until it is interrupted. Without any setting it listens on port 4747, finds other
/// nodes of its network on the local network, and keeps its data in the user's data directory. Started
/// for the first time without a token, it founds a network of its own.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Settings as TOML; `--print-config` shows all of them.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// First join the network of this token, from `network invite` on a node that is in it; `-` reads
    /// it from standard input. Nothing happens when the node belongs to that network already.
    #[arg(long, value_name = "TOKEN")]
    join: Option<String>,
    /// Listen here instead; may be given several times.
    #[arg(long, value_name = "MULTIADDRESS")]
    listen: Vec<String>,
    /// Look for the network at this node too; may be given several times.
    #[arg(long, value_name = "MULTIADDRESS")]
    bootstrap: Vec<String>,
    /// Offer the SOCKS5 proxy for names of the mesh here instead of on 127.0.0.1:1080; "" for none.
    #[arg(long, value_name = "ADDRESS", value_parser = proxy)]
    socks: Option<String>,
    /// Do not search the local network for nodes.
    #[arg(long)]
    no_mdns: bool,
    /// Let the moving average decide instead of a model.
    #[arg(long)]
    no_predict: bool,
    /// Print all settings with their defaults and exit.
    #[arg(long)]
    print_config: bool,
}

/// An address and a port, or nothing.
fn proxy(text: &str) -> Result<String, String> {
    match text.parse::<SocketAddr>() {
        Ok(address) => Ok(address.to_string()),
        Err(_) if text.is_empty() => Ok(String::new()),
        Err(_) => Err("write an address and a port as in 127.0.0.1:1080, or \"\" for none".into()),
    }
}

pub(super) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    if args.print_config {
        return output::print(&Config::template());
    }
    let mut config = settings::load(args.config.as_deref())?;
    if !args.listen.is_empty() {
        config.network.listen = args.listen;
    }
    if let Some(address) = args.socks {
        config.entry.socks = address;
    }
    config.network.bootstrap.extend(args.bootstrap);
    config.network.mdns &= !args.no_mdns;
    config.learning.predict &= !args.no_predict;

    let filter = EnvFilter::try_from_env("MESHWISE_LOG")
        .unwrap_or_else(|_| EnvFilter::new("meshwise=info,warn,libp2p_kad=error"));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours);
    log.with_target(false).with_writer(std::io::stderr).init();

    // Before anything else runs, so that no signal is missed.
    let mut terminate = signal(SignalKind::terminate())?;
    let data_dir = context.data_dir.clone();
    let trainer = std::env::current_exe().ok();
    let options = NodeOptions { config, data_dir: data_dir.clone(), trainer };
    // A typing error founds and joins nothing.
    options.check()?;
    let config = &options.config;
    if let Some(token) = &args.join {
        let joined = network::join(token, &data_dir).await?;
        tracing::info!("{}", network::said(&joined));
    }
    let shipped = config.learning.predict && config.learning.shipped_model;
    let models = data_dir.join(MODELS);
    match if shipped { install_first(&models, now_us()) } else { Ok(false) } {
        Ok(true) => tracing::info!("starting with the shipped model, until one is learned here"),
        Ok(false) => {}
        // The moving average decides then.
        Err(error) => tracing::warn!("no shipped model: {error}"),
    }
    let wanted = config.entry.socks.clone();
    let wanted_metrics = config.entry.metrics.clone();
    let node = Node::start(options).await?;
    let server = Server::start(node.handle().clone())?;
    let metrics = match &wanted_metrics[..] {
        "" => None,
        // As without the proxy: what a node is for goes on.
        address => match MetricsServer::start(node.handle().clone(), address).await {
            Ok(server) => Some(server),
            Err(error) => {
                tracing::warn!("{error}");
                None
            }
        },
    };
    let (status, network) = node
        .handle()
        .inspect(|view| (view.net.listening(), crate::api::types::Network::look(view)))
        .await?;
    if context.json {
        let node_id = node.handle().key().node_id().to_string();
        let socks = node.handle().socks().map(|address| address.to_string());
        let about = serde_json::json!({
            "node": node_id, "network": network, "listening": status, "socks": socks,
        });
        output::json(&about)?;
    } else {
        output::print(&format!("node       {}", node.handle().key().node_id()))?;
        output::print(&format!("network    {} (root {})", network.name, network.root))?;
        for address in &status {
            output::print(&format!("listening  {address}"))?;
        }
        let proxy = match node.handle().socks() {
            Some(address) => format!("socks5h://{address}"),
            None if wanted.is_empty() => "off".into(),
            None => format!("none, {wanted} cannot be used"),
        };
        output::print(&format!("proxy      {proxy}"))?;
        if let Some(metrics) = &metrics {
            output::print(&format!("metrics    http://{}/metrics", metrics.address()))?;
        }
    }
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
    tracing::info!("stopping");
    drop((server, metrics));
    node.stop().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_has_an_address_or_is_off() {
        assert_eq!(proxy("127.0.0.1:1080"), Ok("127.0.0.1:1080".into()));
        assert_eq!(proxy(""), Ok(String::new()));
        for wrong in ["1080", "localhost:1080", "off"] {
            assert!(proxy(wrong).unwrap_err().contains("\"\" for none"), "{wrong}");
        }
    }
}
