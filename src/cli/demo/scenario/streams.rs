//! Many connections that do nothing.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::process::rss_bytes;
use super::speed::helper;
use super::{Figure, figure, line, start, tunnel};
use crate::cli::demo::mesh::Mesh;
use crate::cli::demo::say;
use crate::engine::overlay::Objective;

const STREAMS: usize = 10_000;
/// Growth (percent) that is none: pages that were never touched before. A guess.
const GROWTH_MAX: f64 = 2.0;
const SETTLE: Duration = Duration::from_secs(10);

/// Opens 10,000 connections through one tunnel, each used once, and leaves them alone.
pub(super) async fn idle(
    started: Instant,
    folder: &Path,
    minutes: u64,
) -> anyhow::Result<Vec<Figure>> {
    let [ours, theirs] = ["used", "unused"].map(|name| folder.join(name));
    for folder in [&ours, &theirs] {
        std::fs::create_dir(folder)?;
    }
    let mut mesh = start(started, &ours, line(1, 0.0)).await?;
    // What nodes take in the same time that carry nothing: their stores and histories fill.
    let mut unused = start(started, &theirs, line(1, 0.0)).await?;
    // A process of its own: both ends of all connections would not fit into one.
    let (_echo, address) = helper(&["--tcp-echo"]).await?;
    let to = format!("tcp://{address}");
    let opened = tunnel(&mesh, "S", "echo.local", to, Objective::Balanced).await?;
    tokio::time::sleep(SETTLE).await;
    let memory = |mesh: &Mesh| ["S", "T"].map(|name| rss_bytes(mesh.pid(name)).unwrap_or(f64::NAN));
    let before = memory(&mesh);
    let mut open = Vec::with_capacity(STREAMS);
    for number in 0..STREAMS {
        let mut stream = TcpStream::connect(&opened.listen).await?;
        stream.write_all(b"hello").await?;
        let mut answer = [0; 5];
        let answered = tokio::time::timeout(SETTLE, stream.read_exact(&mut answer)).await;
        answered
            .with_context(|| format!("connection {number} got no answer"))?
            .with_context(|| format!("connection {number} was closed"))?;
        open.push(stream);
        if open.len().is_multiple_of(2_000) {
            say(started, &format!("{} connections are open", open.len()));
        }
    }
    tokio::time::sleep(SETTLE).await;
    let (after, unused_after) = (memory(&mesh), memory(&unused));
    let each = |at: usize| Some((after[at] - before[at]) / STREAMS as f64 / 1e3);
    let mut figures = vec![
        figure("connections open", Some(open.len() as f64), "").at_least(STREAMS as f64),
        figure("memory of each at the caller", each(0), "KB").at_most(20.0),
        figure("memory of each at the provider", each(1), "KB").at_most(20.0),
    ];
    if minutes > 0 {
        say(started, &format!("waiting {minutes} minutes"));
        tokio::time::sleep(Duration::from_secs(60 * minutes)).await;
        let (later, unused_later) = (memory(&mesh), memory(&unused));
        for (at, name) in ["caller", "provider"].into_iter().enumerate() {
            let percent = |bytes: f64| Some(100.0 * bytes / after[at]);
            let growth = later[at] - after[at];
            let usual = unused_later[at] - unused_after[at];
            figures.extend([
                figure(format!("growth of the {name}'s memory"), percent(growth), "%"),
                figure("  of that without connections", percent(usual), "%"),
                figure("  because of them", percent(growth - usual), "%").at_most(GROWTH_MAX),
            ]);
        }
    }
    drop(open);
    mesh.stop().await;
    unused.stop().await;
    Ok(figures)
}
