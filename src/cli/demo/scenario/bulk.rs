//! Bulk transfers: a service that sends, and a client that counts, hashes and times.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Bytes written at a time, different at every place of the stream.
const BLOCK: usize = 64 * 1024;
/// Shorter pauses are not noted.
const GAP_MIN: Duration = Duration::from_millis(50);

/// Sends so many bytes to everybody who connects, until dropped.
pub(super) struct BulkService {
    pub(super) address: SocketAddr,
    /// SHA-256 of what is sent.
    pub(super) hash: [u8; 32],
    #[expect(dead_code, reason = "ends with the service")]
    task: Aborting,
}

/// The block of a stream that begins at `number` times [`BLOCK`].
fn block(number: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    for (index, word) in (0_u64..).zip(block.chunks_exact_mut(8)) {
        let place = number * BLOCK as u64 + 8 * index;
        word.copy_from_slice(&place.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    }
    block
}

fn sizes(bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    let whole = BLOCK as u64;
    (0..bytes.div_ceil(whole)).map(move |n| (n, (bytes - n * whole).min(whole) as usize))
}

impl BulkService {
    /// Sends so many bytes, whose hash is known.
    pub(super) async fn start(bytes: u64) -> anyhow::Result<Self> {
        let mut hash = Sha256::new();
        sizes(bytes).for_each(|(number, size)| hash.update(&block(number)[..size]));
        Ok(Self { hash: hash.finalize().into(), ..Self::endless(bytes).await? })
    }

    /// Sends more than anybody reads.
    pub(super) async fn endless(bytes: u64) -> anyhow::Result<Self> {
        Self::sending(bytes, block).await
    }

    /// The same, but always the same block, which costs nothing to make.
    pub(super) async fn cheap(bytes: u64) -> anyhow::Result<Self> {
        let same: Arc<[u8]> = block(1).into();
        Self::sending(bytes, move |_| same.clone()).await
    }

    async fn sending<B: AsRef<[u8]> + Send>(
        bytes: u64,
        block: impl Fn(u64) -> B + Clone + Send + 'static,
    ) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let block = block.clone();
                tokio::spawn(async move {
                    for (number, size) in sizes(bytes) {
                        let block = block(number);
                        if stream.write_all(&block.as_ref()[..size]).await.is_err() {
                            return;
                        }
                    }
                    let _ = stream.shutdown().await;
                });
            }
        });
        Ok(Self { address, hash: [0; 32], task: Aborting(task) })
    }
}

struct Aborting(JoinHandle<()>);

impl Drop for Aborting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What came.
pub(super) struct Downloaded {
    pub(super) bytes: u64,
    pub(super) hash: [u8; 32],
    pub(super) took: Duration,
    pub(super) ended: Instant,
    /// Pauses: when each ended, and how long it was (ms).
    pub(super) gaps: Vec<(Instant, f64)>,
}

/// Counts what comes for so long (bytes), and does nothing else with it: what reads is not to be what
/// is measured.
pub(super) async fn drain(address: SocketAddr, during: Duration) -> anyhow::Result<u64> {
    let mut stream = TcpStream::connect(address).await?;
    let (mut bytes, mut buffer) = (0, vec![0; 256 * 1024]);
    let reading = async {
        loop {
            match stream.read(&mut buffer).await? {
                0 => return anyhow::Ok(()),
                count => bytes += count as u64,
            }
        }
    };
    if let Ok(ended) = tokio::time::timeout(during, reading).await {
        ended?;
    }
    Ok(bytes)
}

/// Reads until the end of the stream, or for so long.
pub(super) async fn download(address: SocketAddr, during: Duration) -> anyhow::Result<Downloaded> {
    let mut stream = TcpStream::connect(address).await?;
    let begun = Instant::now();
    let deadline = tokio::time::sleep(during);
    tokio::pin!(deadline);
    let (mut hash, mut bytes, mut gaps) = (Sha256::new(), 0, Vec::new());
    let mut buffer = vec![0; 256 * 1024];
    let mut last = begun;
    loop {
        let count = tokio::select! {
            () = &mut deadline => break,
            read = stream.read(&mut buffer) => read?,
        };
        let now = Instant::now();
        if now - last > GAP_MIN {
            gaps.push((now, (now - last).as_secs_f64() * 1e3));
        }
        last = now;
        if count == 0 {
            break;
        }
        bytes += count as u64;
        hash.update(&buffer[..count]);
    }
    let (took, hash) = (begun.elapsed(), hash.finalize().into());
    Ok(Downloaded { bytes, hash, took, ended: last, gaps })
}
