//! What relays cost: added latency, throughput, CPU; a chain of plain TCP relays beside them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

use super::bulk::{BulkService, drain};
use super::echo::{EchoService, Pinger};
use super::process::cpu_s;
use super::{Figure, figure, line, quantile, route, start, tunnel};
use crate::cli::demo::mesh::Mesh;
use crate::cli::demo::{PATIENCE, say};
use crate::engine::overlay::Objective;

const RELAYS_MAX: usize = 3;
/// Pings of one line: 600.
const PINGING: Duration = Duration::from_secs(30);
/// Each transfer.
const TRANSFER: Duration = Duration::from_secs(5);
/// More than anything sends in that time.
const BYTES: u64 = 100_000_000_000;

/// Waits until the tunnel of S has a route over the whole line.
async fn wait_route(mesh: &Mesh, hops: usize) -> anyhow::Result<()> {
    let begun = Instant::now();
    while route(mesh, "S").await.map_or(0, |route| route.len()) != hops + 1 {
        if begun.elapsed() > PATIENCE {
            bail!("the tunnel found no route over {hops} links");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Round trips of 20 messages a second over 0 to 3 relays, nothing else going on.
pub(super) async fn latency(started: Instant, folder: &Path) -> anyhow::Result<Vec<Figure>> {
    let mut measured = Vec::new();
    for relays in 0..=RELAYS_MAX {
        let folder = folder.join(format!("line{relays}"));
        std::fs::create_dir(&folder)?;
        let mut mesh = start(started, &folder, line(relays, 0.0)).await?;
        let echo = EchoService::start().await?;
        let to = format!("tcp://{}", echo.address);
        let opened = tunnel(&mesh, "S", "echo.local", to, Objective::Balanced).await?;
        wait_route(&mesh, relays + 1).await?;
        let mut pinger = Pinger::connect(opened.listen.parse()?).await?;
        pinger.ping(Duration::from_secs(2)).await?;
        let rtts_ms = pinger.ping(PINGING).await?.rtts_ms();
        let at = |share| quantile(&rtts_ms, share).unwrap_or(f64::NAN);
        say(
            started,
            &format!("{relays} relays: round trip {:.2} ms, p99 {:.2} ms", at(0.5), at(0.99)),
        );
        measured.push((at(0.5), at(0.99)));
        mesh.stop().await;
    }
    // A relay forwards each way, so that a round trip meets it twice: what is added is counted for
    // the round trip, the larger number.
    // The p99 is that of the line with one relay, counted from the median without one: rare delays of
    // the machine meet any line, the difference of two p99 would be chance, and a third of what three
    // relays add would hide a rare delay of one.
    let added = (measured[RELAYS_MAX].0 - measured[0].0) / RELAYS_MAX as f64;
    let mut figures = vec![
        figure("round trip without a relay, median", Some(measured[0].0), "ms"),
        figure("added by a relay to the round trip, median of three", Some(added), "ms")
            .at_most(0.5),
        figure("  p99 of one", Some(measured[1].1 - measured[0].0), "ms").at_most(2.0),
    ];
    for (relays, (_, p99)) in measured.iter().enumerate() {
        figures.push(figure(format!("round trip over {relays} relays, p99"), Some(*p99), "ms"));
    }
    Ok(figures)
}

/// Bytes a second of so many connections at once.
async fn rate(address: SocketAddr, streams: usize) -> anyhow::Result<f64> {
    let mut transfers = JoinSet::new();
    for _ in 0..streams {
        transfers.spawn(drain(address, TRANSFER));
    }
    let mut bytes = 0;
    while let Some(done) = transfers.join_next().await {
        bytes += done??;
    }
    Ok(bytes as f64 / TRANSFER.as_secs_f64())
}

/// What a transfer cost each role (s/GB), in the order in which they were given.
async fn costly(
    address: SocketAddr,
    streams: usize,
    pids: &[(&'static str, Option<u32>)],
) -> anyhow::Result<(f64, Vec<(&'static str, f64)>)> {
    let before: Vec<f64> = pids.iter().map(|(_, pid)| cpu_s(*pid)).collect();
    let rate = rate(address, streams).await?;
    let gigabytes = (rate * TRANSFER.as_secs_f64() / 1e9).max(1e-9);
    let costs = pids.iter().zip(&before);
    let costs = costs.map(|((role, pid), before)| (*role, (cpu_s(*pid) - before) / gigabytes));
    Ok((rate, costs.collect()))
}

/// Single stream and eight, over 0 to 3 relays, and over plain TCP relays.
pub(super) async fn throughput(started: Instant, folder: &Path) -> anyhow::Result<Vec<Figure>> {
    let bulk = BulkService::cheap(BYTES).await?;
    let mbit = |rate: f64| rate * 8e-6;
    let mut figures = Vec::new();
    for relays in 0..=RELAYS_MAX {
        let folder = folder.join(format!("line{relays}"));
        std::fs::create_dir(&folder)?;
        let mut mesh = start(started, &folder, line(relays, 0.0)).await?;
        let to = format!("tcp://{}", bulk.address);
        let opened = tunnel(&mesh, "S", "bulk.local", to, Objective::Balanced).await?;
        wait_route(&mesh, relays + 1).await?;
        let address: SocketAddr = opened.listen.parse()?;
        let mut pids = vec![("caller", mesh.pid("S")), ("provider", mesh.pid("T"))];
        let between = ["A", "B", "C"].iter().take(relays);
        pids.extend(between.map(|name| ("relay", mesh.pid(name))));
        let (one, cpu) = costly(address, 1, &pids).await?;
        let (eight, cpu_eight) = costly(address, 8, &pids).await?;
        mesh.stop().await;

        let (chain, first) = Chain::start(relays, bulk.address).await?;
        let pids: Vec<_> = chain.children.iter().map(|child| ("plain relay", child.id())).collect();
        let (plain, plain_cpu) = costly(first, 1, &pids).await?;
        let plain_eight = rate(first, 8).await?;
        drop(chain);
        let over = format!("{relays} relays");
        say(started, &format!("{over}: {:.0} Mbit/s, plain TCP {:.0}", mbit(one), mbit(plain)));
        figures.push(figure(format!("{over}: one stream"), Some(mbit(one)), "Mbit/s"));
        figures.push(figure("  of one over plain TCP relays", Some(100.0 * one / plain), "%"));
        figures.push(figure("  one stream over plain TCP relays", Some(mbit(plain)), "Mbit/s"));
        figures.push(figure("  eight streams", Some(mbit(eight)), "Mbit/s"));
        figures.push(figure("  eight over plain TCP relays", Some(mbit(plain_eight)), "Mbit/s"));
        for (what, costs) in [("", cpu), (", eight streams", cpu_eight), ("", plain_cpu)] {
            for (role, cost) in by_role(&costs) {
                figures.push(figure(format!("  CPU of the {role}{what}"), Some(cost), "s/GB"));
            }
        }
    }
    Ok(figures)
}

/// The mean of each role.
fn by_role(costs: &[(&'static str, f64)]) -> BTreeMap<&'static str, f64> {
    let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for (role, cost) in costs {
        let (sum, count) = sums.entry(role).or_default();
        (*sum, *count) = (*sum + cost, *count + 1.0);
    }
    sums.into_iter().map(|(role, (sum, count))| (role, sum / count)).collect()
}

/// Processes that relay TCP and do nothing else.
struct Chain {
    children: Vec<Child>,
}

impl Chain {
    /// So many in a row in front of `target`, and where the first one listens.
    async fn start(relays: usize, target: SocketAddr) -> anyhow::Result<(Self, SocketAddr)> {
        let (mut children, mut next) = (Vec::new(), target);
        for _ in 0..relays {
            let (child, listens) = helper(&["--tcp-relay", &next.to_string()]).await?;
            children.push(child);
            next = listens;
        }
        Ok((Self { children }, next))
    }
}

/// Starts this program as a helper of the demo that says where it listens. Dropping it ends it.
pub(super) async fn helper(arguments: &[&str]) -> anyhow::Result<(Child, SocketAddr)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("demo").args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn()?;
    let out = child.stdout.take().context("its output is ours")?;
    let said = BufReader::new(out).lines().next_line().await?;
    Ok((child, said.context("a helper of the demo did not start")?.parse()?))
}

/// Prints where it listens, and relays every connection to `target`, for ever.
pub(in crate::cli::demo) async fn relay_tcp(target: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    crate::cli::output::print(&listener.local_addr()?.to_string())?;
    loop {
        let (mut from, _) = listener.accept().await?;
        tokio::spawn(async move {
            let mut to = TcpStream::connect(target).await?;
            tokio::io::copy_bidirectional(&mut from, &mut to).await
        });
    }
}
