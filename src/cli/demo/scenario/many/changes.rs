//! Nodes come, providers and nodes go.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use futures::future::try_join_all;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use super::names::name_of;
use super::*;
use crate::api::types::{Reach, Resolved};

/// Between two looks at what has changed.
const LOOK: Duration = Duration::from_millis(5);
/// A fifth of the nodes.
const KILLED: usize = NODES.len() / 5;
/// Every pair must keep its route for so long after it has one.
const STAYS: Duration = Duration::from_secs(3);
/// Longest wait for any recovery: what the mission allows, and some.
const RECOVERY_MAX: Duration = Duration::from_secs(45);
/// Between two new streams while a provider is gone, and how long each is waited for.
const STREAM_EVERY: Duration = Duration::from_millis(20);
const STREAM_MAX: Duration = Duration::from_secs(10);
const REPLICATED: &str = "replicated.local";
/// Who provides that, the owner first.
const PROVIDERS: [&str; 2] = ["N10", "N20"];

/// New nodes join, one after the other, until each can resolve a name.
pub(super) async fn join(mesh: &mut Mesh) -> anyhow::Result<Vec<Figure>> {
    let path = format!("/v1/services/{}", name_of(NODES[NODES.len() / 2]));
    let (mut whole_ms, mut inner_ms) = (Vec::new(), Vec::new());
    for name in NEWCOMERS {
        let begun = Instant::now();
        mesh.add(name)?;
        mesh.wait_up(name).await?;
        let client = mesh.client(name);
        while client.get::<Resolved>(&path).await.is_err() {
            if begun.elapsed() > PATIENCE {
                bail!("{name} joined and resolves nothing");
            }
            tokio::time::sleep(LOOK).await;
        }
        let resolved = Instant::now();
        whole_ms.push((resolved - begun).as_secs_f64() * 1e3);
        let status: Status = client.get("/v1/status").await?;
        inner_ms.push((status.uptime_s - resolved.elapsed().as_secs_f64()) * 1e3);
    }
    let of = NEWCOMERS.len();
    let floor = |figure: Figure| figure.below(10_000.0);
    Ok(vec![
        floor(figure(
            format!("join until it can resolve, from the start of its process, p50 of {of}"),
            quantile(&whole_ms, 0.5),
            "ms",
        ))
        .at_most(1_000.0),
        floor(figure("  slowest", quantile(&whole_ms, 1.0), "ms")),
        figure("  from the start of the node in it, p50", quantile(&inner_ms, 0.5), "ms")
            .at_most(1_000.0),
        figure("  slowest", quantile(&inner_ms, 1.0), "ms"),
    ])
}

/// Kills a fifth of the nodes, and waits until each of the others has a route to each other one that
/// leads over living nodes.
pub(super) async fn lose_nodes(
    started: Instant,
    mesh: &mut Mesh,
    random: &mut Pcg64Mcg,
) -> anyhow::Result<Vec<Figure>> {
    let mut all: Vec<&'static str> = NODES.to_vec();
    all.retain(|name| !PROVIDERS.contains(name) && *name != CONSUMER);
    all.shuffle(random);
    let killed = all.split_off(all.len() - KILLED);
    // Those that joined later stay and count too.
    let alive = |mesh: &Mesh| -> Vec<&'static str> {
        mesh.running().into_iter().filter(|name| !killed.contains(name)).collect()
    };
    let survivors = alive(mesh);
    let without_before = missing(mesh, &survivors).await?;
    for name in &killed {
        mesh.kill(name)?;
    }
    let begun = Instant::now();
    let (mut since, mut first, mut looks) = (None, None, 0_usize);
    let took = loop {
        let without = missing(mesh, &survivors).await?;
        let now = begun.elapsed();
        first.get_or_insert(without);
        looks += 1;
        if without > 0 {
            since = None;
        } else if now.saturating_sub(*since.get_or_insert(now)) >= STAYS {
            break since;
        }
        if now > RECOVERY_MAX {
            break None;
        }
        tokio::time::sleep(LOOK).await;
    };
    let pairs = survivors.len() * (survivors.len() - 1);
    say(
        started,
        &format!(
            "{} of {pairs} pairs without a route at first, {without_before} before; {looks} looks",
            first.unwrap_or_default(),
        ),
    );
    let what =
        format!("{KILLED} of {} killed: until every remaining pair has a route", NODES.len());
    let mut recovered = figure(what, took.map(|took| took.as_secs_f64()), "s");
    recovered = recovered.below(30.0).at_most(5.0);
    if took.is_none() {
        recovered.why_not = Some(format!("not within {} s", RECOVERY_MAX.as_secs()));
    }
    let links: Vec<f64> =
        status(mesh, &survivors).await?.iter().map(|status| status.links_up as f64).collect();
    Ok(vec![recovered, figure("  links of a node then, fewest", quantile(&links, 0.0), "")])
}

/// How many ordered pairs of nodes have no route that leads over these nodes only.
async fn missing(mesh: &Mesh, nodes: &[&'static str]) -> anyhow::Result<usize> {
    let ids: BTreeSet<String> =
        mesh.ids().into_iter().filter(|(_, name)| nodes.contains(name)).map(|(id, _)| id).collect();
    let asked = nodes.iter().map(|name| {
        let client = mesh.client(name);
        async move { client.get::<Vec<Reach>>("/v1/routes").await }
    });
    let answers = try_join_all(asked).await?;
    let reached = answers.iter().map(|reached| {
        let good = reached.iter().filter(|reach| {
            let leads = |route: &Vec<String>| route.iter().all(|node| ids.contains(node));
            ids.contains(&reach.node) && reach.route.as_ref().is_some_and(leads)
        });
        nodes.len() - 1 - good.count().min(nodes.len() - 1)
    });
    Ok(reached.sum())
}

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

/// Opens a stream to the service through a SOCKS5 proxy (RFC 1928) and returns what it says.
async fn ask(proxy: SocketAddr) -> anyhow::Result<u8> {
    let mut stream = TcpStream::connect(proxy).await?;
    stream.write_all(&[5, 1, 0]).await?;
    let mut chosen = [0; 2];
    stream.read_exact(&mut chosen).await?;
    let name = REPLICATED.as_bytes();
    let mut request = vec![5, 1, 0, 3, name.len() as u8];
    request.extend_from_slice(name);
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

/// Two nodes provide a name; that to which a consumer's streams go is killed.
pub(super) async fn lose_provider(started: Instant, mesh: &mut Mesh) -> anyhow::Result<Figure> {
    let what = "provider killed: until a new stream reaches the replica";
    match measure_failover(mesh).await {
        Ok(took) => {
            let took = took.map(|took| took.as_secs_f64() * 1e3);
            let mut failover = figure(what, took, "ms").at_most(1_000.0);
            if took.is_none() {
                failover.why_not = Some(format!("not within {} s", RECOVERY_MAX.as_secs()));
            }
            Ok(failover)
        }
        Err(error) => {
            say(started, &format!("not measured: {error}"));
            let mut failover = figure(what, None, "ms").at_most(1_000.0);
            failover.why_not = Some(format!("not measured: {error}"));
            Ok(failover)
        }
    }
}

/// How long it takes; `None` when it never happens. An error says why there are no two providers.
async fn measure_failover(mesh: &mut Mesh) -> anyhow::Result<Option<Duration>> {
    let services = [Named::start(0).await?, Named::start(1).await?];
    let [owner, other] = PROVIDERS.map(|name| mesh.client(name));
    let publish = |service: &Named| json!({ "name": REPLICATED, "to": format!("tcp://{}", service.address), "ttl_s": 600 });
    let _: Value = owner.post("/v1/services", &publish(&services[0])).await?;
    let other_id = other.get::<Status>("/v1/status").await?.node;
    let asked = json!({ "peer": other_id, "expires_s": 3_600 });
    let path = format!("/v1/services/{REPLICATED}/delegations");
    let delegated = owner.post::<Value>(&path, &asked).await;
    let delegated = delegated.context("this version has no replicas under one owner")?;
    let mut body = publish(&services[1]);
    body["delegation"] = delegated["delegation"].clone();
    let _: Value = other.post("/v1/services", &body).await?;

    let consumer: Client = mesh.client(CONSUMER);
    let path = format!("/v1/services/{REPLICATED}");
    let begun = Instant::now();
    while consumer.get::<Resolved>(&path).await.map_or(0, |found| found.providers.len()) < 2 {
        if begun.elapsed() > PATIENCE {
            bail!("the consumer never heard of two providers");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let proxy = consumer.get::<Status>("/v1/status").await?.socks;
    let proxy: SocketAddr = proxy.context("the consumer has no proxy")?.parse()?;
    let used = tokio::time::timeout(STREAM_MAX, ask(proxy)).await??;
    let provider = PROVIDERS.get(usize::from(used)).context("nobody else answers")?;
    mesh.kill(provider)?;
    let killed = Instant::now();
    let mut streams = JoinSet::new();
    let mut every = tokio::time::interval(STREAM_EVERY);
    loop {
        tokio::select! {
            _ = every.tick() => {
                streams.spawn(tokio::time::timeout(STREAM_MAX, ask(proxy)));
            }
            Some(answer) = streams.join_next() => {
                if let Ok(Ok(Ok(answer))) = answer
                    && answer != used
                {
                    return Ok(Some(killed.elapsed()));
                }
            }
        }
        if killed.elapsed() > RECOVERY_MAX {
            return Ok(None);
        }
    }
}
