//! More than fits: an overloaded link, and two paths for one tunnel.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::bulk::{BulkService, download};
use super::{Figure, figure, quantile, start, tunnel};
use crate::api::types::{Status, Tunnel};
use crate::cli::demo::mesh::{Plan, wire};
use crate::cli::demo::say;
use crate::engine::overlay::Objective;

/// Nodes that send over the narrow link, each enough to fill half of it.
const SOURCES: [&str; 4] = ["S", "A", "B", "C"];
/// The narrow link (bytes/s): 10 Mbit/s.
const NARROW: f64 = 1_250_000.0;
/// Each of two disjoint paths (bytes/s): 20 Mbit/s.
const PATH: f64 = 2_500_000.0;
const SETTLE: Duration = Duration::from_secs(4);
const LOADED: Duration = Duration::from_secs(10);
/// More than goes through.
const BYTES: u64 = 10_000_000_000;

/// Four tunnels that could fill it twice share a link of 10 Mbit/s.
pub(super) async fn overload(started: Instant, folder: &Path) -> anyhow::Result<Vec<Figure>> {
    let fast = 2.0 * NARROW / SOURCES.len() as f64;
    let mut wires: Vec<_> = SOURCES.iter().map(|name| wire(name, "R", 5.0).rate(fast)).collect();
    wires.push(wire("R", "T", 5.0).rate(NARROW));
    let mut mesh =
        start(started, folder, Plan::plain(&["R", "S", "A", "B", "C", "T"], wires)).await?;
    let bulk = BulkService::endless(BYTES).await?;
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for name in SOURCES {
        let to = format!("tcp://{}", bulk.address);
        let opened = tunnel(&mesh, name, "bulk.local", to, Objective::Balanced).await?;
        addresses.push(opened.listen.parse()?);
    }
    tokio::time::sleep(SETTLE).await;
    say(started, "four tunnels receive over a link of 10 Mbit/s");
    let mut transfers = JoinSet::new();
    for address in addresses {
        transfers.spawn(download(address, LOADED));
    }
    let mut shares = Vec::new();
    while let Some(done) = transfers.join_next().await {
        shares.push(done??.bytes as f64 / LOADED.as_secs_f64());
    }
    let status: Status = mesh.client("T").get("/v1/status").await?;
    mesh.stop().await;
    let link = status.links.iter().max_by_key(|link| link.sent);
    let sent = link.map(|link| link.sent as f64);
    let share = |part: Option<u64>| Some(100.0 * part? as f64 / (sent? + part? as f64));
    let total: f64 = shares.iter().sum();
    let fair = total / shares.len() as f64;
    let unfair = shares.iter().map(|rate| 100.0 * (rate - fair).abs() / fair).fold(0.0, f64::max);
    Ok(vec![
        figure("of 10 Mbit/s in use", Some(total * 8e-6), "Mbit/s"),
        figure("loss", share(link.map(|link| link.dropped)), "%").at_most(1.0),
        figure("marked", share(link.map(|link| link.marked)), "%"),
        figure("queueing delay, p95", link.and_then(|link| link.queue_ms.p95), "ms").at_most(20.0),
        figure("largest distance from a fair share", Some(unfair), "%").at_most(20.0),
        figure("smallest rate", quantile(&shares, 0.0).map(|rate| rate * 8e-6), "Mbit/s"),
    ])
}

/// One tunnel over two disjoint ways of 20 Mbit/s each.
pub(super) async fn paths(started: Instant, folder: &Path) -> anyhow::Result<Vec<Figure>> {
    let wires = [("S", "A"), ("A", "T"), ("S", "B"), ("B", "T")];
    let wires = wires.iter().map(|(a, b)| wire(a, b, 5.0).rate(PATH)).collect();
    let mut mesh = start(started, folder, Plan::plain(&["S", "A", "B", "T"], wires)).await?;
    let bulk = BulkService::endless(BYTES).await?;
    let to = format!("tcp://{}", bulk.address);
    let opened = tunnel(&mesh, "S", "bulk.local", to, Objective::Throughput).await?;
    let address: SocketAddr = opened.listen.parse()?;
    tokio::time::sleep(SETTLE).await;
    let mut transfers = JoinSet::new();
    for _ in 0..8 {
        transfers.spawn(download(address, LOADED));
    }
    tokio::time::sleep(LOADED / 2).await;
    let tunnels: Vec<Tunnel> = mesh.client("S").get("/v1/tunnels").await?;
    for path in tunnels.iter().flat_map(|tunnel| &tunnel.paths) {
        say(started, &format!("in use: {}", mesh.names(path)));
    }
    let mut bytes = 0;
    while let Some(done) = transfers.join_next().await {
        bytes += done??.bytes;
    }
    mesh.stop().await;
    let rate = bytes as f64 / LOADED.as_secs_f64();
    Ok(vec![
        figure("eight streams over two paths of 20 Mbit/s", Some(rate * 8e-6), "Mbit/s"),
        figure("  of their sum", Some(100.0 * rate / (2.0 * PATH)), "%").at_least(85.0),
    ])
}
