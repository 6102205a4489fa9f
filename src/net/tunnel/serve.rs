//! The end that provides services: streams of others become connections to targets.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::rustls::pki_types::CertificateDer;
use quinn::{Connection, Incoming, RecvStream, SendStream, VarInt};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::introduction::{self, Caller};
use super::stream::{Carried, Live, Status, StreamError};
use super::{Export, STREAMS_MAX, Tunnels, pump, transport, udp};
use crate::engine::overlay::ServiceKind;
use crate::engine::types::{NodeId, PublicKey, ServiceName};
use crate::net::plane::FarEnd;
use crate::net::{MEMBERS_CHECK, identity};

/// How long a caller may take to name the service that it wants.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the target of a service may take to accept a connection.
const TARGET_TIMEOUT: Duration = Duration::from_secs(5);
/// Tunnels that others may have open to this node.
const INCOMING_MAX: usize = 4_096;
/// Those of one caller: a tunnel each to some services, of a few strands.
const CALLER_MAX: usize = 32;

/// Streams of one caller, over all its tunnels: each takes a file descriptor here.
const CALLER_STREAMS_MAX: usize = STREAMS_MAX as usize;

/// How many tunnels, or streams, each caller has open to this node.
#[derive(Default)]
struct Callers(Mutex<BTreeMap<NodeId, usize>>);

/// One of them, until it is dropped.
struct Place {
    callers: Arc<Callers>,
    caller: NodeId,
}

impl Callers {
    fn enter(self: &Arc<Self>, caller: NodeId, max: usize) -> Option<Place> {
        let mut callers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let open = callers.entry(caller).or_default();
        if *open >= max {
            return None;
        }
        *open += 1;
        Some(Place { callers: self.clone(), caller })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut callers = self.callers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = callers.get_mut(&self.caller) {
            *open -= 1;
            if *open == 0 {
                callers.remove(&self.caller);
            }
        }
    }
}

/// Counts a stream of somebody else for as long as it is open.
struct Served<'a>(&'a Tunnels);

impl<'a> Served<'a> {
    fn begin(tunnels: &'a Tunnels) -> Self {
        tunnels.served.fetch_add(1, Ordering::Relaxed);
        Self(tunnels)
    }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        self.0.served.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) async fn accept_tunnels(tunnels: Arc<Tunnels>) {
    let (callers, streams) = (Arc::new(Callers::default()), Arc::new(Callers::default()));
    loop {
        let incoming = tokio::select! {
            () = tunnels.stop.cancelled() => return,
            incoming = tunnels.endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else { return };
        if tunnels.endpoint.open_connections() > INCOMING_MAX {
            tunnels.plane.counters().count("too-many-tunnels");
            incoming.refuse();
            continue;
        }
        let serving = serve_tunnel(tunnels.clone(), callers.clone(), streams.clone(), incoming);
        tunnels.tasks.spawn(serving);
    }
}

async fn serve_tunnel(
    tunnels: Arc<Tunnels>,
    callers: Arc<Callers>,
    streams: Arc<Callers>,
    incoming: Incoming,
) {
    let tries = tunnels.plane.tries(FarEnd::from_addr(incoming.remote_address()));
    let mut config = tunnels.server.clone();
    config.transport_config(transport(None, &tries));
    let Ok(connecting) = incoming.accept_with(Arc::new(config)) else { return };
    let Ok(connection) = connecting.await else { return };
    let Some(key) = caller(&connection) else {
        tunnels.plane.counters().count("tunnel-from-nobody");
        connection.close(VarInt::from_u32(2), b"identity does not fit the address");
        return;
    };
    let caller = key.node_id();
    let Some(_place) = callers.enter(caller, CALLER_MAX) else {
        tunnels.plane.counters().count("too-many-tunnels");
        connection.close(VarInt::from_u32(3), b"too many tunnels of one node");
        return;
    };
    let far_end = FarEnd::from_addr(connection.remote_address());
    let route_key =
        far_end.and_then(|end| Some((end, tunnels.plane.set_key(end, &connection, &tries)?)));
    match Caller::introduced(&connection, key, &tunnels.members).await {
        Ok(member) => serve_member(&tunnels, &member, caller, &streams, connection).await,
        Err(why) => {
            tunnels.plane.counters().count("tunnel-from-stranger");
            introduction::refuse(&connection, why);
        }
    }
    if let Some((far_end, number)) = route_key {
        tunnels.plane.take_key(far_end, Some(number));
    }
}

/// Serves a caller's streams and datagrams for as long as it belongs to the network.
async fn serve_member(
    tunnels: &Arc<Tunnels>,
    member: &Caller,
    caller: NodeId,
    streams: &Arc<Callers>,
    connection: Connection,
) {
    let live = Live::new(connection);
    let mut changes = tunnels.members_changes();
    let mut check = tokio::time::interval(MEMBERS_CHECK);
    loop {
        let judge_anew = tokio::select! {
            stream = live.connection.accept_bi() => {
                let Ok((send, recv)) = stream else { return };
                let place = streams.enter(caller, CALLER_STREAMS_MAX);
                let (tunnels, live) = (tunnels.clone(), live.clone());
                tokio::spawn(async move {
                    let _served = Served::begin(&tunnels);
                    let serving = serve(send, recv, (caller, place), &tunnels, &live);
                    if let Err(why) = live.while_open(serving).await {
                        tunnels.failed(&caller, why.as_str());
                    }
                });
                false
            }
            datagram = live.connection.read_datagram() => {
                let Ok(datagram) = datagram else { return };
                if let Err(why) = live.flows.deliver(&datagram) {
                    tunnels.plane.counters().count(why);
                }
                false
            }
            changed = changes.changed() => changed.is_ok(),
            _ = check.tick() => true,
        };
        if judge_anew && let Err(why) = member.judge(&tunnels.members) {
            tunnels.plane.counters().count("tunnel-of-former-member");
            return introduction::refuse(&live.connection, why);
        }
    }
}

/// The identity that TLS proved, when the overlay address is that identity's.
fn caller(connection: &Connection) -> Option<PublicKey> {
    let identity = connection.peer_identity()?;
    let certificates = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    let certificate = libp2p_tls::certificate::parse(certificates.first()?).ok()?;
    let key = identity::public_key(&certificate.peer_id())?;
    let far_end = FarEnd::from_addr(connection.remote_address())?;
    (far_end.node == key.node_id()).then_some(key)
}

async fn serve(
    mut send: SendStream,
    mut recv: RecvStream,
    (caller, place): (NodeId, Option<Place>),
    tunnels: &Tunnels,
    live: &Live,
) -> Result<(), StreamError> {
    let hello = tokio::time::timeout(HELLO_TIMEOUT, read_name(&mut recv)).await.ok().flatten();
    let name = hello.ok_or(StreamError::Broken)?;
    let found = find(&name, caller, tunnels);
    let known = found.as_ref().ok().map(|(name, _)| name.clone());
    let found = found.map(|(_, export)| export);
    let found = found.and_then(|export| place.is_some().then_some(export).ok_or(StreamError::Busy));
    let result = match found {
        Ok(export) if export.kind == ServiceKind::Udp => {
            udp::serve(tunnels, live, &mut send, &mut recv, export.target).await
        }
        Ok(export) => serve_tcp(live, &mut send, &mut recv, &export).await,
        Err(error) => Err(error),
    };
    if let (Err(StreamError::TargetUnreachable), Some(name)) = (&result, known) {
        tunnels.doubt(name);
    }
    let status = match &result {
        Ok(()) => return Ok(()),
        Err(StreamError::UnknownService) => Status::UnknownService,
        Err(StreamError::NotAllowed) => Status::NotAllowed,
        Err(StreamError::TargetUnreachable) => Status::TargetUnreachable,
        Err(StreamError::Busy) => Status::Busy,
        Err(_) => {
            let _ = send.reset(VarInt::from_u32(1));
            let _ = recv.stop(VarInt::from_u32(1));
            return result;
        }
    };
    let _ = send.write_all(&[status as u8]).await;
    let _ = send.finish();
    let _ = recv.stop(VarInt::from_u32(1));
    result
}

async fn read_name(recv: &mut RecvStream) -> Option<Vec<u8>> {
    let length = recv.read_u16().await.ok()?;
    let mut name = vec![0; usize::from(length).min(254)];
    recv.read_exact(&mut name).await.ok()?;
    Some(name)
}

fn find(
    name: &[u8],
    caller: NodeId,
    tunnels: &Tunnels,
) -> Result<(ServiceName, Export), StreamError> {
    let name: Option<ServiceName> = std::str::from_utf8(name).ok().and_then(|n| n.parse().ok());
    let export = name.and_then(|name| Some((tunnels.exported(&name)?, name)));
    let (export, name) = export.ok_or(StreamError::UnknownService)?;
    let may = export.allowed.is_empty() || export.allowed.contains(&caller);
    may.then_some((name, export)).ok_or(StreamError::NotAllowed)
}

async fn serve_tcp(
    live: &Live,
    send: &mut SendStream,
    recv: &mut RecvStream,
    export: &Export,
) -> Result<(), StreamError> {
    let connecting = tokio::time::timeout(TARGET_TIMEOUT, TcpStream::connect(export.target));
    let Ok(Ok(tcp)) = connecting.await else { return Err(StreamError::TargetUnreachable) };
    let mut tcp = Carried::new(tcp);
    let accepted = send.write_all(&[Status::Accepted as u8]).await;
    accepted.map_err(|_| StreamError::Broken)?;
    let (tcp_read, mut tcp_write) = tcp.tcp.split();
    let uncounted = AtomicU64::new(0);
    let down = pump::from_tcp(&tcp_read, send, &uncounted);
    let up = pump::to_tcp(recv, &mut tcp_write, &uncounted, &live.stalls);
    let result = tokio::try_join!(up, down).map(|_| ());
    tcp.ended = result.is_ok();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_caller_leaves_room_for_others() {
        let callers = Arc::new(Callers::default());
        let mut places: Vec<_> =
            (0..CALLER_MAX).map(|_| callers.enter(NodeId([1; 8]), CALLER_MAX)).collect();
        assert!(places.iter().all(Option::is_some));
        assert!(callers.enter(NodeId([1; 8]), CALLER_MAX).is_none());
        assert!(callers.enter(NodeId([2; 8]), CALLER_MAX).is_some());
        places.pop();
        assert!(callers.enter(NodeId([1; 8]), CALLER_MAX).is_some(), "a place that became free");
        places.clear();
        assert!(callers.0.lock().unwrap().is_empty(), "nothing is kept of who is gone");
    }
}
