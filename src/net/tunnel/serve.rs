//! The end that provides services: streams of others become TCP connections to targets.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use quinn::rustls::pki_types::CertificateDer;
use quinn::{Connection, RecvStream, SendStream, VarInt};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::{Status, Tunnels, copy, while_open};
use crate::engine::types::{NodeId, ServiceName};
use crate::net::identity;
use crate::net::plane::FarEnd;

/// How long a caller may take to name the service that it wants.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the target of a service may take to accept a connection.
const TARGET_TIMEOUT: Duration = Duration::from_secs(5);
/// Tunnels that others may have open to this node.
const INCOMING_MAX: usize = 4_096;

pub(super) async fn accept_tunnels(tunnels: Arc<Tunnels>) {
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
        let tunnels = tunnels.clone();
        tunnels.tasks.clone().spawn(async move {
            let Ok(connection) = incoming.await else { return };
            let Some(caller) = caller(&connection) else {
                tunnels.plane.counters().count("tunnel-from-nobody");
                connection.close(VarInt::from_u32(2), b"identity does not fit the address");
                return;
            };
            let far_end = FarEnd::from_addr(connection.remote_address());
            let key = far_end.and_then(|end| Some((end, tunnels.plane.set_key(end, &connection)?)));
            while let Ok((send, recv)) = connection.accept_bi().await {
                let tunnels = tunnels.clone();
                let connection = connection.clone();
                tokio::spawn(async move {
                    let serving = serve(send, recv, caller, &tunnels);
                    if let Err(why) = while_open(&connection, serving).await {
                        tunnels.failed(&caller, why);
                    }
                });
            }
            if let Some((far_end, key)) = key {
                tunnels.plane.take_key(far_end, Some(key));
            }
        });
    }
}

/// The identity that TLS proved, when the overlay address is that identity's.
fn caller(connection: &Connection) -> Option<NodeId> {
    let identity = connection.peer_identity()?;
    let certificates = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    let certificate = libp2p_tls::certificate::parse(certificates.first()?).ok()?;
    let node = identity::public_key(&certificate.peer_id())?.node_id();
    let far_end = FarEnd::from_addr(connection.remote_address())?;
    (far_end.node == node).then_some(node)
}

async fn serve(
    mut send: SendStream,
    mut recv: RecvStream,
    caller: NodeId,
    tunnels: &Tunnels,
) -> Result<(), &'static str> {
    let connected = async {
        let hello = async {
            let length = recv.read_u16().await.ok()?;
            let mut name = vec![0; usize::from(length).min(254)];
            recv.read_exact(&mut name).await.ok()?;
            Some(name)
        };
        let name = tokio::time::timeout(HELLO_TIMEOUT, hello).await.ok().flatten().ok_or(None)?;
        let name = std::str::from_utf8(&name).ok().and_then(|name| name.parse().ok());
        let exports = tunnels.exports.load();
        let export = name.and_then(|name: ServiceName| exports.get(&name));
        let export = export.ok_or(Some(Status::UnknownService))?;
        if !export.allowed.is_empty() && !export.allowed.contains(&caller) {
            return Err(Some(Status::NotAllowed));
        }
        let connecting = tokio::time::timeout(TARGET_TIMEOUT, TcpStream::connect(export.target));
        match connecting.await {
            Ok(Ok(tcp)) => Ok(tcp),
            _ => Err(Some(Status::TargetUnreachable)),
        }
    };
    let tcp = match connected.await {
        Ok(tcp) => tcp,
        Err(None) => return Err("stream-broken"),
        Err(Some(status)) => {
            let _ = send.write_all(&[status as u8]).await;
            let _ = send.finish();
            let _ = recv.stop(VarInt::from_u32(1));
            return Err(Status::refused(status as u8));
        }
    };
    let _ = tcp.set_nodelay(true);
    send.write_all(&[Status::Accepted as u8]).await.map_err(|_| "stream-broken")?;
    let (tcp_read, tcp_write) = tcp.into_split();
    let uncounted = AtomicU64::new(0);
    let down = copy(tcp_read, &mut send, &uncounted);
    let up = copy(&mut recv, tcp_write, &uncounted);
    let result = tokio::try_join!(up, down).map(|_| ());
    if result.is_err() {
        let _ = send.reset(VarInt::from_u32(1));
        let _ = recv.stop(VarInt::from_u32(1));
    }
    result
}
