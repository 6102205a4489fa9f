//! Providers of replicated names are killed, one after the other.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use super::*;
use crate::api::types::Resolved;

/// Who provides a replicated name, the owner first; each pair one of its own.
const PAIRS: [[&str; 2]; 5] =
    [["N10", "N20"], ["N05", "N15"], ["N08", "N25"], ["N12", "N22"], ["N18", "N28"]];
/// Between two new streams while a provider is gone, and how long each is waited for.
const STREAM_EVERY: Duration = Duration::from_millis(20);
const STREAM_MAX: Duration = Duration::from_secs(10);
/// Pause before the next one is killed, beside the time that the one before takes to start again.
const PAUSE: Duration = Duration::from_secs(5);

/// A service that says who it is, and ends the connection.
struct Named {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Named {
    async fn start(letter: u8) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(&[letter]).await;
            }
        });
        Ok(Self { address, task })
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Opens a stream to a service through a SOCKS5 proxy (RFC 1928) and returns what it says.
async fn ask(proxy: SocketAddr, name: &str) -> anyhow::Result<u8> {
    let mut stream = TcpStream::connect(proxy).await?;
    stream.write_all(&[5, 1, 0]).await?;
    let mut chosen = [0; 2];
    stream.read_exact(&mut chosen).await?;
    let mut request = vec![5, 1, 0, 3, u8::try_from(name.len())?];
    request.extend_from_slice(name.as_bytes());
    request.extend_from_slice(&80_u16.to_be_bytes());
    stream.write_all(&request).await?;
    // The bound address is one in numbers, of version 4 or 6.
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    if head[1] != 0 {
        bail!("the proxy refused: code {}", head[1]);
    }
    let mut bound = vec![0; if head[3] == 4 { 18 } else { 6 }];
    stream.read_exact(&mut bound).await?;
    Ok(stream.read_u8().await?)
}

/// Two nodes provide a name; that to which a consumer's streams go is killed, and started again. So
/// with each pair.
pub(super) async fn lose_providers(
    started: Instant,
    mesh: &mut Mesh,
) -> anyhow::Result<Vec<Figure>> {
    let what = format!(
        "provider killed: until a new stream reaches the replica, worst of {}",
        PAIRS.len()
    );
    let mut took_ms = Vec::new();
    for (number, pair) in (1..).zip(PAIRS) {
        match lose_provider(mesh, pair, &format!("replicated-{number}.local")).await {
            Ok((killed, None)) => {
                let why = format!("no stream reached the replica of {killed} in {RECOVERY_MAX:?}");
                say(started, &why);
                let mut worst = figure(what, None, "ms").at_most(1_000.0);
                worst.why_not = Some(why);
                return Ok(vec![worst]);
            }
            Ok((killed, Some(took))) => {
                let took = took.as_secs_f64() * 1e3;
                say(
                    started,
                    &format!("{killed} killed, a stream at the replica {took:.0} ms later"),
                );
                took_ms.push(took);
            }
            Err(error) => {
                say(started, &format!("not measured: {error}"));
                let mut worst = figure(what, None, "ms").at_most(1_000.0);
                worst.why_not = Some(format!("not measured: {error}"));
                return Ok(vec![worst]);
            }
        }
    }
    Ok(vec![
        figure(what, quantile(&took_ms, 1.0), "ms").at_most(1_000.0),
        figure("  median", quantile(&took_ms, 0.5), "ms"),
    ])
}

/// Who was killed and how long it took; `None` when it does not happen in [`RECOVERY_MAX`]. An error says
/// why there are no two providers.
async fn lose_provider(
    mesh: &mut Mesh,
    pair: [&'static str; 2],
    name: &str,
) -> anyhow::Result<(&'static str, Option<Duration>)> {
    let services = [Named::start(0).await?, Named::start(1).await?];
    let [owner, other] = pair.map(|node| mesh.client(node));
    let publish = |service: &Named| json!({ "name": name, "to": format!("tcp://{}", service.address), "ttl_s": 600 });
    let _: Value = owner.post("/v1/services", &publish(&services[0])).await?;
    let other_id = other.get::<Status>("/v1/status").await?.node;
    let asked = json!({ "peer": other_id, "expires_s": 3_600 });
    let path = format!("/v1/services/{name}/delegations");
    let delegated: Value = owner.post(&path, &asked).await?;
    let mut body = publish(&services[1]);
    body["delegation"] = delegated["delegation"].clone();
    let _: Value = other.post("/v1/services", &body).await?;

    let consumer: Client = mesh.client(CONSUMER);
    let path = format!("/v1/services/{name}");
    let begun = Instant::now();
    while consumer.get::<Resolved>(&path).await.map_or(0, |found| found.providers.len()) < 2 {
        if begun.elapsed() > PATIENCE {
            bail!("the consumer never heard of two providers");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let proxy = consumer.get::<Status>("/v1/status").await?.socks;
    let proxy: SocketAddr = proxy.context("the consumer has no proxy")?.parse()?;
    let used = tokio::time::timeout(STREAM_MAX, ask(proxy, name)).await??;
    let killed = *pair.get(usize::from(used)).context("nobody else answers")?;
    mesh.kill(killed)?;
    let took = until_other(proxy, name, used).await;
    mesh.restart(killed)?;
    mesh.wait_up(killed).await?;
    tokio::time::sleep(PAUSE).await;
    Ok((killed, took))
}

/// Opens streams until another provider than `used` answers, and returns how long that took.
async fn until_other(proxy: SocketAddr, name: &str, used: u8) -> Option<Duration> {
    let begun = Instant::now();
    let mut streams = JoinSet::new();
    let mut every = tokio::time::interval(STREAM_EVERY);
    while begun.elapsed() <= RECOVERY_MAX {
        tokio::select! {
            _ = every.tick() => {
                let name = name.to_owned();
                let asking = async move { ask(proxy, &name).await };
                streams.spawn(tokio::time::timeout(STREAM_MAX, asking));
            }
            Some(answer) = streams.join_next() => {
                if let Ok(Ok(Ok(answer))) = answer
                    && answer != used
                {
                    return Some(begun.elapsed());
                }
            }
        }
    }
    None
}
