//! Many connections that do nothing.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::process::rss_bytes;
use super::speed::helper;
use super::{Figure, figure, line, start, tunnel};
use crate::cli::demo::say;
use crate::engine::overlay::Objective;

const STREAMS: usize = 10_000;
const SETTLE: Duration = Duration::from_secs(10);

/// Opens 10,000 connections through one tunnel, each used once, and leaves them alone.
pub(super) async fn idle(
    started: Instant,
    folder: &Path,
    minutes: u64,
) -> anyhow::Result<Vec<Figure>> {
    let mut mesh = start(started, folder, line(1, 0.0)).await?;
    // A process of its own: both ends of all connections would not fit into one.
    let (_echo, address) = helper(&["--tcp-echo"]).await?;
    let to = format!("tcp://{address}");
    let opened = tunnel(&mesh, "S", "echo.local", to, Objective::Balanced).await?;
    tokio::time::sleep(SETTLE).await;
    let memory = || ["S", "T"].map(|name| rss_bytes(mesh.pid(name)).unwrap_or(f64::NAN));
    let before = memory();
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
    let after = memory();
    let each = |at: usize| Some((after[at] - before[at]) / STREAMS as f64 / 1e3);
    let mut figures = vec![
        figure("connections open", Some(open.len() as f64), "").at_least(STREAMS as f64),
        figure("memory of each at the caller", each(0), "KB").at_most(20.0),
        figure("memory of each at the provider", each(1), "KB").at_most(20.0),
    ];
    if minutes > 0 {
        say(started, &format!("waiting {minutes} minutes"));
        tokio::time::sleep(Duration::from_secs(60 * minutes)).await;
        let later = memory();
        for (at, name) in ["caller", "provider"].into_iter().enumerate() {
            let growth = 100.0 * (later[at] - after[at]) / after[at];
            figures.push(figure(format!("growth of the {name}'s memory"), Some(growth), "%"));
        }
    }
    drop(open);
    mesh.stop().await;
    Ok(figures)
}
