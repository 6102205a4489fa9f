//! The demo's traffic: a small HTTP service, and clients that ask it steadily through the tunnel.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::routing::get;
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::Client;
use crate::api::types::Tunnel;

/// Clients, each with one connection that it keeps.
const CLIENTS: u32 = 4;
/// Between two requests of one client.
const INTERVAL: Duration = Duration::from_millis(100);
/// A request without an answer in this time has failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of each answer.
const BODY_BYTES: usize = 1_000;
/// How often the tunnel's route is noted.
const ROUTE_INTERVAL: Duration = Duration::from_millis(50);

/// A small HTTP service on loopback.
pub(super) struct WebService {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl WebService {
    pub(super) async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let body = Bytes::from(vec![b'm'; BODY_BYTES]);
        let router = Router::new().route("/", get(move || std::future::ready(body.clone())));
        let task = tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { address, task })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for WebService {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// When it left.
    pub(super) begun: Instant,
    /// The same, in seconds since the epoch.
    pub(super) begun_s: f64,
    /// How long the answer took; `None` when there was none.
    pub(super) took: Option<Duration>,
}

/// Requests in all, and those that failed.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Requests {
    pub(super) total: usize,
    pub(super) failed: usize,
}

type Shared<T> = Arc<Mutex<Vec<T>>>;

fn push<T>(list: &Shared<T>, value: T) {
    list.lock().unwrap_or_else(PoisonError::into_inner).push(value);
}

fn take<T>(list: &Shared<T>) -> Vec<T> {
    std::mem::take(&mut *list.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Steady requests until [`Load::finish`].
pub(super) struct Load {
    asked: Shared<Asked>,
    routes: Shared<(Instant, Vec<&'static str>)>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Load {
    /// Asks through the tunnel at `address`, and notes the route that `source` uses.
    pub(super) fn start(
        address: SocketAddr,
        source: Client,
        names: BTreeMap<String, &'static str>,
    ) -> Self {
        let (asked, routes) = (Shared::default(), Shared::default());
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        for client in 0..CLIENTS {
            let phase = INTERVAL * client / CLIENTS;
            tasks.spawn(ask_steadily(address, phase, Arc::clone(&asked), stop.clone()));
        }
        let (noted, stopped) = (Arc::clone(&routes), stop.clone());
        tasks.spawn(async move {
            while !stopped.is_cancelled() {
                if let Ok(tunnels) = source.get::<Vec<Tunnel>>("/v1/tunnels").await {
                    let route = tunnels.into_iter().next().and_then(|tunnel| tunnel.route);
                    let letters = route.iter().flatten().filter_map(|id| names.get(id).copied());
                    push(&noted, (Instant::now(), letters.collect()));
                }
                tokio::time::sleep(ROUTE_INTERVAL).await;
            }
        });
        Self { asked, routes, stop, tasks }
    }

    /// Requests so far, and those that failed.
    pub(super) fn counts(&self) -> (usize, usize) {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        (asked.len(), asked.iter().filter(|asked| asked.took.is_none()).count())
    }

    /// Waits for the requests under way.
    pub(super) async fn finish(mut self) -> Finished {
        let stopped = Instant::now();
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        let mut asked = take(&self.asked);
        asked.sort_by_key(|asked| asked.begun);
        Finished { asked, routes: take(&self.routes), stopped }
    }
}

/// What the clients saw.
pub(super) struct Finished {
    /// All requests, in the order in which they left.
    pub(super) asked: Vec<Asked>,
    routes: Vec<(Instant, Vec<&'static str>)>,
    /// When the last request may have left.
    stopped: Instant,
}

impl Finished {
    pub(super) fn requests(&self) -> Requests {
        let failed = self.asked.iter().filter(|asked| asked.took.is_none()).count();
        Requests { total: self.asked.len(), failed }
    }

    /// The longest time without an answered request after `from` (ms); `None` when none was
    /// answered after it.
    pub(super) fn longest_gap_ms(&self, from: Instant) -> Option<f64> {
        let answers = self.asked.iter().filter_map(|asked| Some(asked.begun + asked.took?));
        let mut answers: Vec<Instant> = answers.filter(|at| *at >= from).collect();
        answers.sort();
        answers.first()?;
        // Silence at the end is a gap too.
        answers.push(self.stopped);
        let starts = std::iter::once(&from).chain(&answers);
        let gaps = starts.zip(&answers).map(|(a, b)| b.saturating_duration_since(*a));
        gaps.max().map(|gap| gap.as_secs_f64() * 1e3)
    }

    /// The route that was in use during the whole request; `None` when it changed around it.
    pub(super) fn route_during(&self, asked: &Asked) -> Option<&[&'static str]> {
        let end = asked.begun + asked.took?;
        let after = self.routes.partition_point(|(at, _)| *at < asked.begun);
        let until = self.routes.partition_point(|(at, _)| *at <= end);
        let noted = self.routes.get(after.checked_sub(1)?..=until)?;
        let route = &noted.first()?.1;
        noted.iter().all(|(_, other)| other == route).then_some(route)
    }
}

async fn ask_steadily(
    address: SocketAddr,
    phase: Duration,
    asked: Shared<Asked>,
    stop: CancellationToken,
) {
    tokio::time::sleep(phase).await;
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut connection = None;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        // Connecting is local; the request is what travels.
        let mut sender = match connection.take() {
            Some(sender) => sender,
            None => match connect(address).await {
                Ok(sender) => sender,
                Err(_) => {
                    push(&asked, ask_failed());
                    continue;
                }
            },
        };
        let (begun, begun_s) = (Instant::now(), epoch_s());
        let answered = tokio::time::timeout(REQUEST_TIMEOUT, ask(&mut sender)).await;
        let good = matches!(answered, Ok(Ok(BODY_BYTES)));
        push(&asked, Asked { begun, begun_s, took: good.then(|| begun.elapsed()) });
        connection = good.then_some(sender);
    }
}

fn ask_failed() -> Asked {
    Asked { begun: Instant::now(), begun_s: epoch_s(), took: None }
}

fn epoch_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

async fn connect(address: SocketAddr) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// One request; returns the length of the answer.
async fn ask(sender: &mut SendRequest<Empty<Bytes>>) -> anyhow::Result<usize> {
    sender.ready().await?;
    let request = Request::get("/").header("host", super::SERVICE).body(Empty::new())?;
    let response = sender.send_request(request).await?;
    anyhow::ensure!(response.status().is_success(), "status {}", response.status());
    Ok(response.into_body().collect().await?.to_bytes().len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_after_the_last_answer_is_a_gap() {
        let from = Instant::now();
        let at = |ms| from + Duration::from_millis(ms);
        let asked = |begun, took: Option<u64>| Asked {
            begun: at(begun),
            begun_s: 0.0,
            took: took.map(Duration::from_millis),
        };
        let mut finished = Finished {
            asked: vec![asked(0, Some(10)), asked(100, Some(300)), asked(450, None)],
            routes: vec![],
            stopped: at(500),
        };
        assert_eq!(finished.longest_gap_ms(from), Some(390.0));
        finished.stopped = at(8_000);
        assert_eq!(finished.longest_gap_ms(from), Some(7_600.0));
        assert_eq!(finished.longest_gap_ms(at(500)), None, "no answer after it at all");
        assert_eq!((finished.requests().total, finished.requests().failed), (3, 1));
    }
}
