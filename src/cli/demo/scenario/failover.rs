//! Cut, killed, turned slow: how long until traffic flows again.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;

use super::bulk::{BulkService, download};
use super::echo::{EchoService, Pinger};
use super::{Figure, diamond, figure, quantile, route, start, tunnel};
use crate::cli::demo::mesh::Mesh;
use crate::cli::demo::{PATIENCE, say};
use crate::engine::overlay::Objective;

const CUTS: usize = 20;
const SLOWED: usize = 5;
/// Pings before, and after a cut.
const BEFORE: Duration = Duration::from_secs(1);
const AFTER: Duration = Duration::from_secs(3);
/// Longest wait until a mended link is in use again, or its alternative is warm.
const MENDED: Duration = Duration::from_secs(15);
/// What "slower for good" means (ms, one way; the round trip grows by twice as much).
const SLOWER_MS: f64 = 50.0;
/// Bytes of the transfer during which a relay is killed.
const TRANSFER_BYTES: u64 = 1_000_000_000;

/// Waits until the tunnel of S has a route in use and a backup.
async fn wait_warm(mesh: &Mesh) -> anyhow::Result<Vec<String>> {
    let begun = Instant::now();
    loop {
        let tunnels: Vec<crate::api::types::Tunnel> = mesh.client("S").get("/v1/tunnels").await?;
        if tunnels.iter().all(|tunnel| tunnel.reachable && tunnel.backup.is_some()) {
            return route(mesh, "S").await;
        }
        ensure!(begun.elapsed() < MENDED, "the tunnel has no second route");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The middle link of the route in use falls silent, again and again.
pub(super) async fn cut(started: Instant, folder: &Path) -> anyhow::Result<Vec<Figure>> {
    let mut mesh = start(started, folder, diamond()).await?;
    let echo = EchoService::start().await?;
    let to = format!("tcp://{}", echo.address);
    let opened = tunnel(&mesh, "S", "echo.local", to, Objective::Balanced).await?;
    let mut pinger = Pinger::connect(opened.listen.parse()?).await?;
    let mut gaps_ms = Vec::new();
    for number in 1..=CUTS {
        wait_warm(&mesh).await?;
        pinger.ping(BEFORE).await?;
        let in_use = route(&mesh, "S").await?;
        let (a, b) = (in_use[1].clone(), in_use[2].clone());
        let (pings, cut) = tokio::join!(pinger.ping(AFTER), async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let at = Instant::now();
            mesh.change(&a, &b, |link| link.loss = 1.0).await?;
            anyhow::Ok(at)
        });
        let gap_ms = pings?.longest_gap_ms(cut?);
        gaps_ms.push(gap_ms);
        say(started, &format!("cut {number} of {CUTS}: {a}-{b} silent, outage {gap_ms:.0} ms"));
        mesh.change(&a, &b, |_| ()).await?;
        // Both ways are to be warm again before the next cut.
        tokio::time::sleep(Duration::from_secs(4)).await;
    }
    mesh.stop().await;
    Ok(vec![
        figure(
            format!("outage after a silent cut, median of {CUTS}"),
            quantile(&gaps_ms, 0.5),
            "ms",
        )
        .at_most(300.0),
        figure("  worst", quantile(&gaps_ms, 1.0), "ms").at_most(600.0),
    ])
}

/// The link in use gets slower for good.
pub(super) async fn slow(started: Instant, folder: &Path) -> anyhow::Result<Vec<Figure>> {
    let mut mesh = start(started, folder, diamond()).await?;
    let echo = EchoService::start().await?;
    let to = format!("tcp://{}", echo.address);
    let opened = tunnel(&mesh, "S", "echo.local", to, Objective::Balanced).await?;
    let mut pinger = Pinger::connect(opened.listen.parse()?).await?;
    let mut left_ms = Vec::new();
    for number in 1..=SLOWED {
        wait_warm(&mesh).await?;
        pinger.ping(Duration::from_secs(5)).await?;
        let in_use = route(&mesh, "S").await?;
        let (a, b) = (in_use[1].clone(), in_use[2].clone());
        let at = Instant::now();
        mesh.change(&a, &b, |link| link.delay_ms += SLOWER_MS).await?;
        let (pings, left) = tokio::join!(pinger.ping(AFTER), async {
            while route(&mesh, "S").await? == in_use {
                ensure!(at.elapsed() < PATIENCE, "the slower route was never left");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            anyhow::Ok(at.elapsed().as_secs_f64() * 1e3)
        });
        pings?;
        let left = left?;
        left_ms.push(left);
        say(started, &format!("{number} of {SLOWED}: {a}-{b} slower, left after {left:.0} ms"));
        mesh.change(&a, &b, |_| ()).await?;
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    mesh.stop().await;
    Ok(vec![
        figure("+100 ms for good: left after, median", quantile(&left_ms, 0.5), "ms"),
        figure("  slowest", quantile(&left_ms, 1.0), "ms").at_most(2_000.0),
    ])
}

/// A relay in use dies during a transfer.
pub(super) async fn kill(started: Instant, folder: &Path) -> anyhow::Result<Vec<Figure>> {
    let mut mesh = start(started, folder, diamond()).await?;
    let bulk = BulkService::start(TRANSFER_BYTES).await?;
    let to = format!("tcp://{}", bulk.address);
    let opened = tunnel(&mesh, "S", "bulk.local", to, Objective::Balanced).await?;
    let in_use = wait_warm(&mesh).await?;
    let victim = in_use[1].clone();
    say(started, &format!("S receives 1 GB over {}", in_use.join("-")));
    let transfer = tokio::spawn(download(opened.listen.parse()?, Duration::from_secs(600)));
    tokio::time::sleep(Duration::from_secs(3)).await;
    mesh.kill(&victim)?;
    let killed = Instant::now();
    say(started, &format!("relay {victim} is killed"));
    let got = transfer.await??;
    mesh.stop().await;
    ensure!(got.ended > killed, "the transfer was over before the relay died");
    let equal = got.bytes == TRANSFER_BYTES && got.hash == bulk.hash;
    let stalls = got.gaps.iter().filter(|(at, _)| *at > killed).map(|(_, ms)| *ms);
    let stall_ms = stalls.fold(0.0, f64::max);
    let took_s = got.took.as_secs_f64();
    let whole = f64::from(u8::from(equal));
    Ok(vec![
        figure("transfer whole, SHA-256 equal", Some(whole), "").at_least(1.0),
        figure("longest stall after SIGKILL of a relay", Some(stall_ms), "ms").at_most(500.0),
        figure("rate", Some(got.bytes as f64 * 8e-6 / took_s), "Mbit/s"),
    ])
}
