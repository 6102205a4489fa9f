//! UDP over a tunnel: each client address is a flow, a flow's payloads are QUIC datagrams.
//!
//! A flow has a stream, which names the service and is answered like any other, and lives as long as
//! that. A QUIC datagram is the number of that stream (8 bytes, big endian) and one payload. Nothing
//! is sent again, and nothing is put in order: what does not fit or has to wait too long is dropped
//! and counted.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{RecvStream, SendDatagramError, SendStream, StreamId, VarInt};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

use super::Tunnels;
use super::local::{FAILURE_SPEAKS, LocalEnd};
use super::pump::read_with;
use super::stream::{Live, Status, StreamError};

/// Flows of one tunnel at one time.
pub(super) const FLOWS_MAX: usize = 1_024;
/// Payloads of one flow that wait, also for the provider to accept it.
const WAITING_MAX: usize = 32;
/// Silence after which the caller ends a flow; the provider gives it twice as long.
const FLOW_IDLE: Duration = Duration::from_secs(60);
/// Length of the stream's number.
const NUMBER_BYTES: usize = 8;
/// The word for payloads that fit no packet.
const TOO_LARGE: &str = "udp-too-large";
/// A UDP payload is not larger (bytes).
const PAYLOAD_MAX: usize = 65_535;

/// The flows of one QUIC connection: where what arrives for them goes.
#[derive(Default)]
pub(super) struct Flows(Mutex<BTreeMap<u64, Arc<Outlet>>>);

struct Outlet {
    socket: Arc<UdpSocket>,
    /// Whereto, on a socket that is not connected.
    client: Option<SocketAddr>,
    delivered: AtomicU64,
}

/// A flow's place, until it is dropped.
struct Entry<'a> {
    flows: &'a Flows,
    number: u64,
    outlet: Arc<Outlet>,
    seen: u64,
}

impl Flows {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Arc<Outlet>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(
        &self,
        stream: StreamId,
        socket: Arc<UdpSocket>,
        client: Option<SocketAddr>,
    ) -> Option<Entry<'_>> {
        let number = u64::from(VarInt::from(stream));
        let outlet = Arc::new(Outlet { socket, client, delivered: AtomicU64::new(0) });
        let mut flows = self.lock();
        if flows.len() >= FLOWS_MAX {
            return None;
        }
        flows.insert(number, outlet.clone());
        Some(Entry { flows: self, number, outlet, seen: 0 })
    }

    /// Hands a payload to its flow. Returns its size, or why it was dropped.
    pub(super) fn deliver(&self, datagram: &[u8]) -> Result<usize, &'static str> {
        let (number, payload) =
            datagram.split_first_chunk::<NUMBER_BYTES>().ok_or("udp-malformed")?;
        let outlet = self.lock().get(&u64::from_be_bytes(*number)).cloned();
        let outlet = outlet.ok_or("udp-without-flow")?;
        outlet.delivered.fetch_add(1, Ordering::Relaxed);
        let sent = match outlet.client {
            Some(client) => outlet.socket.try_send_to(payload, client),
            None => outlet.socket.try_send(payload),
        };
        sent.map_err(|_| "udp-not-taken")
    }
}

impl Entry<'_> {
    /// Whether something was delivered since the last call.
    fn was_active(&mut self) -> bool {
        let delivered = self.outlet.delivered.load(Ordering::Relaxed);
        std::mem::replace(&mut self.seen, delivered) != delivered
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.flows.lock().remove(&self.number);
    }
}

/// Hands what arrives on a connection of this node's own to its flows, until it is closed.
pub(super) async fn deliver(tunnels: Arc<Tunnels>, local: Arc<LocalEnd>, live: Arc<Live>) {
    while let Ok(datagram) = live.connection.read_datagram().await {
        match live.flows.deliver(&datagram) {
            Ok(bytes) => local.traffic.received.fetch_add(bytes as u64, Ordering::Relaxed),
            Err(why) => tunnels.plane.counters().count_nth(why),
        };
    }
}

/// Returns whether QUIC took the payload; it may still be lost on the way.
fn send(tunnels: &Tunnels, live: &Live, datagram: Bytes) -> bool {
    let why = match live.connection.send_datagram(datagram) {
        Ok(()) => return true,
        Err(SendDatagramError::ConnectionLost(_)) => return false,
        Err(SendDatagramError::TooLarge) => TOO_LARGE,
        Err(SendDatagramError::UnsupportedByPeer | SendDatagramError::Disabled) => {
            "udp-not-supported"
        }
    };
    let limit = live.connection.max_datagram_size().filter(|_| why == TOO_LARGE);
    tunnels.failed_with(&"udp", why, || {
        let bytes = limit?.saturating_sub(NUMBER_BYTES);
        Some(format!("a payload has at most {bytes} bytes here"))
    });
    false
}

/// Waits until the far end ends a stream. Nothing but its end may come.
async fn ended(recv: &mut RecvStream) -> Result<(), StreamError> {
    match recv.read(&mut [0]).await {
        Ok(None) => Ok(()),
        _ => Err(StreamError::Broken),
    }
}

/// Makes flows of what arrives at a tunnel's local address.
pub(super) async fn accept_udp(tunnels: Arc<Tunnels>, socket: UdpSocket, local: Arc<LocalEnd>) {
    let socket = Arc::new(socket);
    let mut flows: BTreeMap<SocketAddr, mpsc::Sender<BytesMut>> = BTreeMap::new();
    let mut buffer = vec![0; PAYLOAD_MAX];
    loop {
        let received = tokio::select! {
            () = local.stop.cancelled() => return,
            received = socket.recv_from(&mut buffer) => received,
        };
        let Ok((length, client)) = received else {
            // About an earlier answer that its client did not take, mostly.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let mut datagram = BytesMut::with_capacity(NUMBER_BYTES + length);
        datagram.extend_from_slice(&[0; NUMBER_BYTES]);
        datagram.extend_from_slice(&buffer[..length]);
        let flow = match flows.get(&client).filter(|flow| !flow.is_closed()) {
            Some(flow) => flow,
            None => {
                if flows.len() >= FLOWS_MAX {
                    flows.retain(|_, flow| !flow.is_closed());
                }
                if flows.len() >= FLOWS_MAX {
                    tunnels.failed(&local.service, "udp-too-many-flows");
                    continue;
                }
                let (flow, waiting) = mpsc::channel(WAITING_MAX);
                let work = run(tunnels.clone(), local.clone(), socket.clone(), client, waiting);
                tunnels.tasks.spawn(work);
                flows.insert(client, flow);
                &flows[&client]
            }
        };
        if flow.try_send(datagram).is_err() {
            tunnels.plane.counters().count("udp-queue-full");
        }
    }
}

/// One flow of the end that opened the tunnel.
async fn run(
    tunnels: Arc<Tunnels>,
    local: Arc<LocalEnd>,
    socket: Arc<UdpSocket>,
    client: SocketAddr,
    mut waiting: mpsc::Receiver<BytesMut>,
) {
    let result = tokio::select! {
        () = local.stop.cancelled() => return,
        result = flow(&tunnels, &local, socket, client, &mut waiting) => result,
    };
    if let Err(why) = result {
        tunnels.failed(&local.service, why.as_str());
        // Not a new flow for each payload that follows.
        tokio::time::sleep(FAILURE_SPEAKS).await;
    }
}

async fn flow(
    tunnels: &Arc<Tunnels>,
    local: &Arc<LocalEnd>,
    socket: Arc<UdpSocket>,
    client: SocketAddr,
    waiting: &mut mpsc::Receiver<BytesMut>,
) -> Result<(), StreamError> {
    let mut stream = tunnels.begin(local).await?;
    stream.accepted().await?;
    let live = stream.live.clone();
    let entry = live.flows.enter(stream.send.id(), socket, Some(client));
    let mut entry = entry.ok_or(StreamError::Busy)?;
    let number = entry.number.to_be_bytes();
    loop {
        tokio::select! {
            datagram = waiting.recv() => {
                let Some(mut datagram) = datagram else { break };
                datagram[..NUMBER_BYTES].copy_from_slice(&number);
                let bytes = (datagram.len() - NUMBER_BYTES) as u64;
                if send(tunnels, &live, datagram.freeze()) {
                    local.traffic.sent.fetch_add(bytes, Ordering::Relaxed);
                }
            }
            over = ended(&mut stream.recv) => return over,
            () = tokio::time::sleep(FLOW_IDLE) => if !entry.was_active() { break },
        }
    }
    let _ = stream.send.finish();
    Ok(())
}

/// One flow of the end that provides the service, whose stream is not answered yet.
pub(super) async fn serve(
    tunnels: &Tunnels,
    live: &Live,
    send_stream: &mut SendStream,
    recv: &mut RecvStream,
    target: SocketAddr,
) -> Result<(), StreamError> {
    let connected = async {
        let any: SocketAddr = match target {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any).await?;
        socket.connect(target).await?;
        std::io::Result::Ok(Arc::new(socket))
    };
    let socket = connected.await.map_err(|_| StreamError::TargetUnreachable)?;
    let entry = live.flows.enter(send_stream.id(), socket.clone(), None);
    let mut entry = entry.ok_or(StreamError::Busy)?;
    let accepted = send_stream.write_all(&[Status::Accepted as u8]).await;
    accepted.map_err(|_| StreamError::Broken)?;
    let number = entry.number.to_be_bytes();
    loop {
        tokio::select! {
            ready = socket.readable() => {
                ready.map_err(|_| StreamError::Broken)?;
                match read_with(&number, true, |buffer| socket.try_recv_buf(buffer)) {
                    Ok(datagram) => {
                        send(tunnels, live, datagram);
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    // Nothing listens at the target: UDP says so for each payload.
                    Err(_) => tunnels.plane.counters().count("udp-target-unreachable"),
                }
            }
            over = ended(recv) => {
                let _ = send_stream.finish();
                return over;
            }
            () = tokio::time::sleep(2 * FLOW_IDLE) => if !entry.was_active() { return Ok(()) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quinn::{Dir, Side};

    #[tokio::test]
    async fn payloads_find_their_flow_for_as_long_as_it_lasts() {
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let to = client.local_addr().unwrap();
        let stream = |index| StreamId::new(Side::Client, Dir::Bi, index);
        let flows = Flows::default();
        socket.writable().await.unwrap();
        let mut entry = flows.enter(stream(3), socket.clone(), Some(to)).unwrap();
        let datagram = |number: u64| [&number.to_be_bytes()[..], b"payload"].concat();
        assert!(!entry.was_active());
        assert_eq!(flows.deliver(&datagram(entry.number)), Ok(7));
        assert!(entry.was_active() && !entry.was_active());
        let mut buffer = [0; 100];
        let (length, from) = client.recv_from(&mut buffer).await.unwrap();
        assert_eq!((&buffer[..length], from), (&b"payload"[..], socket.local_addr().unwrap()));

        assert_eq!(flows.deliver(&datagram(entry.number + 1)), Err("udp-without-flow"));
        assert_eq!(flows.deliver(&[0; NUMBER_BYTES - 1]), Err("udp-malformed"));
        let number = entry.number;
        drop(entry);
        assert_eq!(flows.deliver(&datagram(number)), Err("udp-without-flow"));

        let enter = |index| flows.enter(stream(index), socket.clone(), None);
        let full: Vec<_> = (0..FLOWS_MAX as u64).map(enter).collect();
        assert!(full.iter().all(Option::is_some));
        assert!(enter(FLOWS_MAX as u64).is_none(), "no more than it bears");
    }
}
