//! What the mesh settles at, and what it costs when nobody wants anything.

use std::time::{Duration, Instant};

use super::{NODES, median_and_most, status};
use crate::cli::demo::mesh::Mesh;
use crate::cli::demo::say;
use crate::cli::demo::scenario::process::{cpu_s, loopback_bytes, rss_bytes};
use crate::cli::demo::scenario::{Figure, figure, quantile};
use crate::engine::overlay::topology::SETTLED_INTERVAL;

/// The links have settled when their number was the same for so long.
const UNCHANGED: Duration = SETTLED_INTERVAL;
/// Longest wait for that.
const SETTLE_MAX: Duration = Duration::from_secs(150);
/// How long the nodes are watched doing nothing.
const QUIET: Duration = Duration::from_secs(30);

/// Links of each node.
async fn degrees(mesh: &Mesh) -> anyhow::Result<Vec<f64>> {
    let all = status(mesh, &NODES).await?;
    Ok(all.iter().map(|status| status.links_up as f64).collect())
}

/// Waits until the nodes neither make nor give up links.
pub(super) async fn settle(started: Instant, mesh: &Mesh) -> anyhow::Result<Vec<Figure>> {
    let begun = Instant::now();
    let (mut links, mut since) = (degrees(mesh).await?, Instant::now());
    let first: f64 = links.iter().sum();
    while since.elapsed() < UNCHANGED && begun.elapsed() < SETTLE_MAX {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let now = degrees(mesh).await?;
        if now != links {
            (links, since) = (now, Instant::now());
        }
    }
    let sum: f64 = links.iter().sum();
    let settled = (since.elapsed() >= UNCHANGED).then(|| (since - begun).as_secs_f64());
    say(started, &format!("{:.0} links, {:.0} at first", sum / 2.0, first / 2.0));
    let mut took = figure("links settled after", settled, "s");
    if settled.is_none() {
        took.why_not = Some(format!("still changing after {} s", SETTLE_MAX.as_secs()));
    }
    Ok(vec![
        took,
        figure("links of a node, fewest", quantile(&links, 0.0), ""),
        figure("  median", quantile(&links, 0.5), ""),
        figure("  most", quantile(&links, 1.0), ""),
    ])
}

/// Memory, CPU and traffic while nothing is asked of the nodes.
pub(super) async fn idle(mesh: &Mesh) -> anyhow::Result<Vec<Figure>> {
    let pids = NODES.map(|name| mesh.pid(name));
    let (begun, cpu, carried) = (Instant::now(), pids.map(cpu_s), loopback_bytes());
    tokio::time::sleep(QUIET).await;
    let wall_s = begun.elapsed().as_secs_f64();
    let shares = pids.iter().zip(cpu).map(|(pid, before)| 100.0 * (cpu_s(*pid) - before) / wall_s);
    let shares: Vec<f64> = shares.collect();
    let carried = loopback_bytes().zip(carried).map(|(after, before)| after - before);
    let memory: Vec<f64> = pids.iter().filter_map(|pid| Some(rss_bytes(*pid)? / 1e6)).collect();
    let each = carried.map(|bytes| bytes / wall_s / NODES.len() as f64 / 1e3);
    let mut figures = Vec::new();
    for (what, values, unit, aim) in
        [("memory of an idle node", memory, "MB", 60.0), ("CPU of an idle node", shares, "%", 2.0)]
    {
        figures.extend(median_and_most(what, &values, unit).map(|figure| figure.at_most(aim)));
    }
    figures.push(figure("traffic on loopback by idle node, all headers included", each, "kB/s"));
    Ok(figures)
}
