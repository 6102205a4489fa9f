//! The socket that QUIC believes to be UDP: packets leave and arrive over overlay routes.
//!
//! Congestion marks become ECN, so the end-to-end congestion controller reacts before the loss.
//! `endpoint_config` makes QUIC's stateless resets survive a restart, so that a node that comes
//! back ends the connections that it no longer knows instead of leaving them to time out.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use hmac::{Hmac, KeyInit, Mac};
use quinn::crypto::{CryptoError, HmacKey};
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use quinn_proto::HashedConnectionIdGenerator;
use sha2::Sha256;
use tokio::sync::mpsc;

use super::identity::Identity;
use super::plane::{DataPlane, FarEnd, Inbound};
use crate::engine::types::TunnelId;

/// Packets that are handed over at once: quinn gives no more.
const SEGMENTS_MAX: usize = 10;

/// See the module documentation.
pub struct OverlaySocket {
    plane: Arc<DataPlane>,
    inbound: Mutex<mpsc::Receiver<Inbound>>,
}

impl OverlaySocket {
    /// The socket of a data plane; `None` when it was taken before.
    pub fn new(plane: Arc<DataPlane>) -> Option<Self> {
        let inbound = plane.take_inbound()?;
        Some(Self { plane, inbound: Mutex::new(inbound) })
    }
}

/// Keys the stateless resets (RFC 9000, section 10.3).
struct ResetKey([u8; 32]);

impl ResetKey {
    fn mac(&self, data: &[u8]) -> Hmac<Sha256> {
        let mac = Hmac::<Sha256>::new_from_slice(&self.0);
        let mut mac = mac.expect("HMAC takes a key of any length");
        mac.update(data);
        mac
    }
}

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature: &mut [u8]) {
        signature.copy_from_slice(&self.mac(data).finalize().into_bytes());
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        self.mac(data).verify_slice(signature).map_err(|_| CryptoError)
    }
}

/// What QUIC needs to know of this endpoint. The keys of connection ids and resets follow from
/// the identity: a peer accepts a reset of a node that has forgotten it.
///
/// # Errors
/// When QUIC cannot use packets of this size.
pub(super) fn endpoint_config(
    identity: &Identity,
    packet_bytes: u16,
) -> Result<quinn::EndpointConfig, quinn::ConfigError> {
    let reset_key = ResetKey(identity.derived_secret("quic-reset"));
    let mut config = quinn::EndpointConfig::new(Arc::new(reset_key));
    let secret = identity.derived_secret("quic-connection-id");
    let key = secret.iter().take(8).fold(0u64, |key, byte| key << 8 | u64::from(*byte));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(key)));
    config.max_udp_payload_size(packet_bytes)?;
    Ok(config)
}

impl fmt::Debug for OverlaySocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OverlaySocket of {}", self.plane.me())
    }
}

/// Sending never waits: a full queue on the way loses the packet, and QUIC sends it again.
#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for OverlaySocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let length = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        self.plane.send_packets(transmit.destination, transmit.contents.chunks(length));
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut inbound = self.inbound.lock().unwrap_or_else(PoisonError::into_inner);
        let mut filled = 0;
        while filled < buffers.len().min(meta.len()) {
            match inbound.poll_recv(context) {
                Poll::Ready(Some(inbound)) => {
                    let packet = inbound.packet();
                    let length = packet.len();
                    if length == 0 || length > buffers[filled].len() {
                        self.plane.counters().count("packet-size");
                        continue;
                    }
                    buffers[filled][..length].copy_from_slice(packet);
                    let ecn =
                        if inbound.congestion { EcnCodepoint::Ce } else { EcnCodepoint::Ect0 };
                    meta[filled] = RecvMeta {
                        addr: inbound.from,
                        len: length,
                        stride: length,
                        ecn: Some(ecn),
                        dst_ip: None,
                    };
                    filled += 1;
                }
                Poll::Ready(None) if filled == 0 => {
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        if filled == 0 { Poll::Pending } else { Poll::Ready(Ok(filled)) }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(FarEnd { node: self.plane.me(), tunnel: TunnelId(1), ours: true }.to_addr())
    }

    fn may_fragment(&self) -> bool {
        false
    }

    fn max_transmit_segments(&self) -> usize {
        SEGMENTS_MAX
    }
}
