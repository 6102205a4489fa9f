//! The end that opened a tunnel: TCP connections on its local address become streams.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use quinn::{Connection, VarInt};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::{STREAMS_MAX, Status, Traffic, Tunnels, copy, while_open};
use crate::engine::types::{PublicKey, ServiceName, TunnelId};

/// How long a new connection waits for a route when none is alive, and how often it looks.
const NO_ROUTE_WAIT: Duration = Duration::from_secs(3);
/// See [`NO_ROUTE_WAIT`].
const NO_ROUTE_POLL: Duration = Duration::from_millis(50);
/// How long a failed connection speaks for the next ones.
const FAILURE_SPEAKS: Duration = Duration::from_secs(1);

pub(super) struct LocalEnd {
    pub(super) tunnels: Arc<Tunnels>,
    pub(super) tunnel: TunnelId,
    pub(super) provider: PublicKey,
    pub(super) service: ServiceName,
    /// The connection, and when making it anew failed last.
    pub(super) connection: tokio::sync::Mutex<(Connection, Option<Instant>)>,
    pub(super) traffic: Arc<Traffic>,
    pub(super) stop: CancellationToken,
}

impl LocalEnd {
    /// The connection, made anew when it was lost.
    async fn connection(&self) -> Option<Connection> {
        let mut locked = self.connection.lock().await;
        let (connection, failed_at) = &mut *locked;
        if connection.close_reason().is_some() {
            // Those who waited for the same failure do not each try again.
            if failed_at.is_some_and(|at| at.elapsed() < FAILURE_SPEAKS) {
                return None;
            }
            match self.tunnels.connect(self.tunnel, &self.provider).await {
                Ok(new) => *connection = new,
                Err(_) => {
                    *failed_at = Some(Instant::now());
                    return None;
                }
            }
        }
        Some(connection.clone())
    }
}

pub(super) async fn accept_tcp(listener: TcpListener, local: Arc<LocalEnd>) {
    // As many as the tunnel carries; further ones wait in the system's queue.
    let places = Arc::new(tokio::sync::Semaphore::new(STREAMS_MAX as usize));
    loop {
        let accepting = async {
            let place = places.clone().acquire_owned().await.ok();
            listener.accept().await.map(|(tcp, _)| (tcp, place))
        };
        let accepted = tokio::select! {
            () = local.stop.cancelled() => break,
            accepted = accepting => accepted,
        };
        let Ok((tcp, place)) = accepted else {
            // Out of file descriptors, mostly: others have to close some first.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        local.traffic.connections.fetch_add(1, Ordering::Relaxed);
        let local = local.clone();
        local.traffic.open.fetch_add(1, Ordering::Relaxed);
        local.tunnels.tasks.clone().spawn(async move {
            let _place = place;
            let stop = local.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                result = carry(tcp, &local) => {
                    if let Err(why) = result {
                        local.tunnels.failed(&local.service, why);
                    }
                }
            }
            local.traffic.open.fetch_sub(1, Ordering::Relaxed);
        });
    }
    local.connection.lock().await.0.close(VarInt::from_u32(0), b"tunnel closed");
}

/// Carries one TCP connection through the tunnel.
async fn carry(tcp: TcpStream, local: &LocalEnd) -> Result<(), &'static str> {
    let _ = tcp.set_nodelay(true);
    // A moment for the route to come back; then better an error than a connection that hangs.
    let deadline = Instant::now() + NO_ROUTE_WAIT;
    while !local.tunnels.plane.is_reachable(local.tunnel) {
        if Instant::now() >= deadline {
            return Err("tunnel-no-route");
        }
        tokio::time::sleep(NO_ROUTE_POLL).await;
    }
    let connection = local.connection().await.ok_or("tunnel-unreachable")?;
    let (mut send, mut recv) = connection.open_bi().await.map_err(|_| "tunnel-lost")?;
    let name = local.service.as_str().as_bytes();
    let mut hello = (name.len() as u16).to_be_bytes().to_vec();
    hello.extend(name);
    send.write_all(&hello).await.map_err(|_| "tunnel-lost")?;
    let (tcp_read, tcp_write) = tcp.into_split();
    let up = copy(tcp_read, &mut send, &local.traffic.sent);
    let down = async {
        let status = recv.read_u8().await.map_err(|_| "tunnel-lost")?;
        if status != Status::Accepted as u8 {
            return Err(Status::refused(status));
        }
        copy(&mut recv, tcp_write, &local.traffic.received).await
    };
    let result = while_open(&connection, async { tokio::try_join!(up, down).map(|_| ()) }).await;
    if result.is_err() {
        let _ = send.reset(VarInt::from_u32(1));
        let _ = recv.stop(VarInt::from_u32(1));
    }
    result
}
