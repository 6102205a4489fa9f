//! An echo service, and a client that sends 20 messages a second over one connection.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Between two messages.
pub(super) const INTERVAL: Duration = Duration::from_millis(50);

/// Sends back what it receives, until dropped.
pub(super) struct EchoService {
    pub(super) address: SocketAddr,
    task: JoinHandle<()>,
}

impl EchoService {
    pub(super) async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                tokio::spawn(async move {
                    let (mut reader, mut writer) = stream.into_split();
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        });
        Ok(Self { address, task })
    }
}

impl Drop for EchoService {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Prints where it listens, and echoes for ever.
pub(in crate::cli::demo) async fn serve() -> anyhow::Result<()> {
    let service = EchoService::start().await?;
    crate::cli::output::print(&service.address.to_string())?;
    std::future::pending().await
}

/// Messages that came back: when, and after how long (ms).
pub(super) struct Pings {
    pub(super) answers: Vec<(Instant, f64)>,
    /// When the last message may have come back.
    pub(super) until: Instant,
}

impl Pings {
    /// The longest silence (ms) from a moment on, and at its end.
    pub(super) fn longest_gap_ms(&self, from: Instant) -> f64 {
        let times = self.answers.iter().map(|(at, _)| *at).filter(|at| *at >= from);
        let times: Vec<Instant> = [from].into_iter().chain(times).chain([self.until]).collect();
        let gaps = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3);
        gaps.fold(0.0, f64::max)
    }

    /// All round trips (ms).
    pub(super) fn rtts_ms(&self) -> Vec<f64> {
        self.answers.iter().map(|(_, ms)| *ms).collect()
    }
}

/// A connection to the echo service that stays.
pub(super) struct Pinger {
    reader: tokio::net::tcp::OwnedReadHalf,
    writer: tokio::net::tcp::OwnedWriteHalf,
}

impl Pinger {
    pub(super) async fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (reader, writer) = stream.into_split();
        Ok(Self { reader, writer })
    }

    /// Sends for so long, and waits half a second more for what is under way.
    pub(super) async fn ping(&mut self, during: Duration) -> anyhow::Result<Pings> {
        let begun = Instant::now();
        let until = begun + during;
        let writer = &mut self.writer;
        let send = async move {
            let mut ticks = tokio::time::interval(INTERVAL);
            while Instant::now() < until {
                ticks.tick().await;
                let since = begun.elapsed().as_micros() as u64;
                writer.write_all(&since.to_be_bytes()).await?;
            }
            anyhow::Ok(())
        };
        let reader = &mut self.reader;
        let mut answers = Vec::new();
        let answered = &mut answers;
        let receive = async move {
            let mut message = [0; 8];
            let end = tokio::time::sleep(during + Duration::from_millis(500));
            tokio::pin!(end);
            loop {
                tokio::select! {
                    () = &mut end => return anyhow::Ok(()),
                    read = reader.read_exact(&mut message) => { read?; }
                }
                let took = begun.elapsed().as_micros() as u64;
                let took = took.saturating_sub(u64::from_be_bytes(message));
                answered.push((Instant::now(), took as f64 / 1e3));
            }
        };
        let (sent, received) = tokio::join!(send, receive);
        sent?;
        received?;
        Ok(Pings { answers, until })
    }
}
