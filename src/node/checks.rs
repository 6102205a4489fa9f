//! Carries out the checks of services that the engine asks for.
//!
//! A check of a target takes [`TIMEOUT`] at most, one through a tunnel [`TUNNEL_TIMEOUT`]; of each kind
//! [`AT_ONCE`] run at one time, so that others' slow services do not keep this node's own from being
//! checked; the rest wait and their time begins later. An answer of HTTP is read up to
//! [`BODY_BYTES_MAX`], a body only where something is looked for in it. A command runs in a process
//! group of its own, which is killed when its time is over or the node stops; what it prints goes
//! nowhere, and it finds the service in the variables `MESHWISE_NAME` and `MESHWISE_TARGET`.

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::engine::event::Input;
use crate::engine::measure::HealthCheck;
use crate::engine::measure::service::{CheckFailure, Subject, WATCHED_MAX};
use crate::engine::types::ServiceName;
use crate::net::tunnel::{StreamError, Tunnels};

/// Longest check of a target. A guess: who waits longer for a service calls it broken.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest check through a tunnel: the provider may take [`TIMEOUT`] to connect to its target.
const TUNNEL_TIMEOUT: Duration = Duration::from_secs(10);
/// Checks that run at one time. A guess: each takes a descriptor, and some a process.
const AT_ONCE: usize = 32;
/// Most of an answer that is searched for a text (bytes).
const BODY_BYTES_MAX: usize = 1 << 20;

/// Runs checks; those under way end with it.
pub(super) struct Checks {
    tunnels: Arc<Tunnels>,
    places: Arc<Semaphore>,
    tunnel_places: Arc<Semaphore>,
    results: mpsc::Sender<Input>,
    running: JoinSet<()>,
}

impl Checks {
    /// The results arrive at the receiver.
    pub(super) fn new(tunnels: Arc<Tunnels>) -> (Self, mpsc::Receiver<Input>) {
        let (results, receiver) = mpsc::channel(WATCHED_MAX);
        let places = || Arc::new(Semaphore::new(AT_ONCE));
        let (places, tunnel_places) = (places(), places());
        (Self { tunnels, places, tunnel_places, results, running: JoinSet::new() }, receiver)
    }

    /// Begins a check.
    pub(super) fn begin(&mut self, id: u64, subject: Subject, check: Option<HealthCheck>) {
        while self.running.try_join_next().is_some() {}
        let places = if check.is_some() { &self.places } else { &self.tunnel_places };
        let (places, results) = (places.clone(), self.results.clone());
        let tunnels = self.tunnels.clone();
        self.running.spawn(async move {
            let _place = places.acquire_owned().await.ok();
            let begun = Instant::now();
            let result = match check {
                Some(check) => here(&tunnels, &subject.name, &check).await,
                None => through_tunnel(&tunnels, &subject).await,
            };
            let took_us = begun.elapsed().as_micros() as u64;
            let _ =
                results.send(Input::ServiceChecked { id, result: result.map(|()| took_us) }).await;
        });
    }
}

async fn in_time(
    limit: Duration,
    work: impl Future<Output = Result<(), CheckFailure>>,
) -> Result<(), CheckFailure> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(CheckFailure::TimedOut))
}

async fn here(
    tunnels: &Tunnels,
    name: &ServiceName,
    check: &HealthCheck,
) -> Result<(), CheckFailure> {
    let Some(export) = tunnels.exported(name) else { return Err(CheckFailure::Refused) };
    in_time(TIMEOUT, check_target(name, export.target, check)).await
}

async fn check_target(
    name: &ServiceName,
    target: SocketAddr,
    check: &HealthCheck,
) -> Result<(), CheckFailure> {
    match check {
        HealthCheck::None => Ok(()),
        HealthCheck::Tcp => connect(target).await.map(drop),
        HealthCheck::Http { path, status, contains } => {
            http(name, target, path, *status, contains.as_deref()).await
        }
        HealthCheck::Command(command) => run(name, target, command).await,
    }
}

async fn connect(target: SocketAddr) -> Result<TcpStream, CheckFailure> {
    TcpStream::connect(target).await.map_err(|_| CheckFailure::Refused)
}

async fn http(
    name: &ServiceName,
    target: SocketAddr,
    path: &str,
    status: Option<u16>,
    contains: Option<&str>,
) -> Result<(), CheckFailure> {
    let io = TokioIo::new(connect(target).await?);
    let broken = |_| CheckFailure::Broken;
    let handshake = hyper::client::conn::http1::handshake(io).await;
    let (mut sender, connection) = handshake.map_err(broken)?;
    let asking = async {
        let request = Request::get(path)
            .header("host", name.as_str())
            .header("user-agent", "meshwise-check")
            .header("connection", "close")
            .body(Empty::<Bytes>::new())
            .map_err(|_| CheckFailure::Broken)?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let got = response.status().as_u16();
        let is_right = status.map_or((200..400).contains(&got), |status| status == got);
        if !is_right {
            return Err(CheckFailure::Status);
        }
        let Some(text) = contains else { return Ok(()) };
        let body = Limited::new(response.into_body(), BODY_BYTES_MAX).collect().await;
        let body = body.map_err(|_| CheckFailure::Body)?.to_bytes();
        let found = body.windows(text.len()).any(|window| window == text.as_bytes());
        found.then_some(()).ok_or(CheckFailure::Body)
    };
    // The connection moves only while it is polled, and is closed with the check.
    tokio::pin!(connection);
    tokio::pin!(asking);
    tokio::select! {
        biased;
        result = &mut asking => result,
        // It may end with the last byte of the answer, which is then here.
        _ = &mut connection => asking.await,
    }
}

/// A child and all that it started, until it is dropped.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let id = self.0.id().and_then(|id| rustix::process::Pid::from_raw(id as i32));
        if let Some(id) = id {
            let _ = rustix::process::kill_process_group(id, rustix::process::Signal::KILL);
        }
    }
}

async fn run(name: &ServiceName, target: SocketAddr, command: &str) -> Result<(), CheckFailure> {
    let child = Command::new("sh")
        .args(["-c", command])
        .env("MESHWISE_NAME", name.as_str())
        .env("MESHWISE_TARGET", target.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut group = Group(child.map_err(|_| CheckFailure::Command)?);
    let ended = group.0.wait().await.map_err(|_| CheckFailure::Command)?;
    ended.success().then_some(()).ok_or(CheckFailure::Command)
}

async fn through_tunnel(tunnels: &Arc<Tunnels>, subject: &Subject) -> Result<(), CheckFailure> {
    let mut open = tunnels.list().into_iter();
    let tunnel = open
        .find(|info| info.service == subject.name && info.provider.node_id() == subject.provider);
    let tunnel = tunnel.ok_or(CheckFailure::Unreachable)?.tunnel;
    in_time(TUNNEL_TIMEOUT, async {
        tunnels.probe(tunnel).await.map_err(|error| match error {
            StreamError::TargetUnreachable | StreamError::UnknownService => CheckFailure::Refused,
            StreamError::NotAllowed => CheckFailure::NotAllowed,
            StreamError::Closed
            | StreamError::NoRoute
            | StreamError::Unreachable
            | StreamError::Lost => CheckFailure::Unreachable,
            _ => CheckFailure::Broken,
        })
    })
    .await
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    fn name() -> ServiceName {
        "a.local".parse().unwrap()
    }

    /// Answers every request so, and closes.
    async fn answering(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut request = Vec::new();
                    while !request.ends_with(b"\r\n\r\n") {
                        let Ok(byte) = stream.read_u8().await else { return };
                        request.push(byte);
                    }
                    let request = String::from_utf8(request).unwrap();
                    assert!(request.starts_with("GET /health HTTP/1.1\r\n"), "{request}");
                    assert!(request.contains("host: a.local\r\n"), "{request}");
                    let _ = stream.write_all(answer.as_bytes()).await;
                });
            }
        });
        address
    }

    async fn nobody() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    #[tokio::test]
    async fn a_target_is_judged_by_its_status_and_by_what_it_says() {
        let asks = |status, contains: Option<&str>| HealthCheck::Http {
            path: "/health".into(),
            status,
            contains: contains.map(Into::into),
        };
        let well = answering("HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nall ok\n").await;
        let open_ended = answering("HTTP/1.1 200 OK\r\n\r\nall ok until the end").await;
        let ill = answering("HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n").await;
        let moved = answering("HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n").await;
        let mute = answering("").await;
        let other = answering("SSH-2.0-x\r\n").await;
        for (target, check, expected) in [
            (well, asks(None, None), Ok(())),
            (well, asks(Some(200), Some("ok")), Ok(())),
            (well, asks(Some(204), None), Err(CheckFailure::Status)),
            (well, asks(None, Some("fine")), Err(CheckFailure::Body)),
            (open_ended, asks(None, Some("the end")), Ok(())),
            (ill, asks(None, None), Err(CheckFailure::Status)),
            (ill, asks(Some(503), None), Ok(())),
            (moved, asks(None, None), Ok(())),
            (mute, asks(None, None), Err(CheckFailure::Broken)),
            (other, asks(None, None), Err(CheckFailure::Broken)),
            (nobody().await, asks(None, None), Err(CheckFailure::Refused)),
            (well, HealthCheck::Tcp, Ok(())),
            (nobody().await, HealthCheck::Tcp, Err(CheckFailure::Refused)),
            (nobody().await, HealthCheck::None, Ok(())),
        ] {
            assert_eq!(check_target(&name(), target, &check).await, expected, "{check:?}");
        }
    }

    #[tokio::test]
    async fn a_body_without_end_is_read_no_further_than_its_bound() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            while stream.write_all(&[b'.'; 65_536]).await.is_ok() {}
        });
        let contains = Some("never".into());
        let check = HealthCheck::Http { path: "/".into(), status: None, contains };
        let checked = in_time(Duration::from_secs(60), check_target(&name(), target, &check)).await;
        assert_eq!(checked, Err(CheckFailure::Body));
    }

    #[tokio::test]
    async fn a_command_counts_by_its_code_and_does_not_outlive_its_time() {
        let target = nobody().await;
        let command = |text: &str| HealthCheck::Command(text.into());
        let told = format!("test $MESHWISE_NAME = a.local && test $MESHWISE_TARGET = {target}");
        assert_eq!(check_target(&name(), target, &command(&told)).await, Ok(()));
        for wrong in ["exit 3", "no-such-program-at-all"] {
            let checked = check_target(&name(), target, &command(wrong)).await;
            assert_eq!(checked, Err(CheckFailure::Command), "{wrong}");
        }
        // The shell's child would write this later, if it lived.
        let folder = tempfile::tempdir().unwrap();
        let (begun, late) = (folder.path().join("begun"), folder.path().join("late"));
        let slow = format!("touch {}; (sleep 2; touch {}) & wait", begun.display(), late.display());
        let limit = Duration::from_millis(1_500);
        let slow = command(&slow);
        let checked = in_time(limit, check_target(&name(), target, &slow)).await;
        assert_eq!(checked, Err(CheckFailure::TimedOut));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(begun.exists() && !late.exists(), "its whole group is gone");
    }
}
