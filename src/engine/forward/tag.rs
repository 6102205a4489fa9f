//! What proves that a datagram comes from an end of its tunnel: the first 8 bytes of HMAC-SHA-256
//! (RFC 2104) with a key that only the two ends have, because it comes from their TLS handshake.
//!
//! The tag covers what relays must not change and what a stranger must not claim: kind, flags
//! without the congestion mark, node count, tunnel, route id, sequence number, route, and the
//! payload. The payload of data is left out: it is a QUIC packet, which proves itself. The position
//! and the congestion mark change on the way.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::header::{DatagramKind, FLAG_CONGESTION, Header};

/// The key of a tunnel's two ends.
#[derive(Clone)]
pub struct RouteKey(Hmac<Sha256>);

impl RouteKey {
    /// From 32 secret bytes.
    pub fn new(secret: &[u8; 32]) -> Self {
        Self(Hmac::new_from_slice(secret).expect("HMAC takes keys of any length"))
    }
}

impl fmt::Debug for RouteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RouteKey")
    }
}

impl Header {
    /// Sets the tag.
    pub fn seal(&mut self, key: &RouteKey, payload: &[u8]) {
        self.tag = self.tag_of(key, payload);
    }

    /// Whether the tag is that of this key, header and payload.
    pub fn verifies(&self, key: &RouteKey, payload: &[u8]) -> bool {
        self.tag == self.tag_of(key, payload)
    }

    /// Never 0, which says that there is no tag.
    fn tag_of(&self, key: &RouteKey, payload: &[u8]) -> u64 {
        let mut mac = key.0.clone();
        let count = self.route.nodes().len() as u8;
        mac.update(&[self.kind as u8, self.flags() & !FLAG_CONGESTION, count]);
        mac.update(&self.tunnel.0.to_be_bytes());
        mac.update(&self.route_id.to_be_bytes());
        mac.update(&self.sequence.to_be_bytes());
        for node in self.route.nodes() {
            mac.update(&node.0);
        }
        if self.kind != DatagramKind::Data {
            mac.update(payload);
        }
        let digest = mac.finalize().into_bytes();
        digest[..8].iter().fold(0u64, |tag, byte| tag << 8 | u64::from(*byte)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::{NodeId, Route, TunnelId};

    fn route(nodes: &[u8]) -> Route {
        Route::new(nodes.iter().map(|n| NodeId([*n; 8])).collect::<Vec<_>>()).unwrap()
    }

    fn sealed(kind: DatagramKind, key: &RouteKey) -> Header {
        let mut header = Header::new(kind, TunnelId(7), 3, 9, route(&[1, 2, 3]));
        header.seal(key, b"payload");
        header
    }

    #[test]
    fn a_tag_holds_for_what_was_sealed_and_for_nothing_else() {
        let key = RouteKey::new(&[1; 32]);
        let good = sealed(DatagramKind::Receipt, &key);
        assert!(good.verifies(&key, b"payload"));
        assert!(!good.verifies(&RouteKey::new(&[2; 32]), b"payload"));
        assert!(!good.verifies(&key, b"payloae"));
        let untagged = Header { tag: 0, ..good.clone() };
        assert!(!untagged.verifies(&key, b"payload"));
        for forged in [
            Header { kind: DatagramKind::Beat, ..good.clone() },
            Header { reply: true, ..good.clone() },
            Header { receipt: true, ..good.clone() },
            Header { copy: true, ..good.clone() },
            Header { resumed: true, ..good.clone() },
            Header { tunnel: TunnelId(8), ..good.clone() },
            Header { route_id: 4, ..good.clone() },
            Header { sequence: 10, ..good.clone() },
            Header { route: route(&[1, 4, 3]), ..good.clone() },
        ] {
            assert!(!forged.verifies(&key, b"payload"), "{forged:?}");
        }
    }

    #[test]
    fn bytes_cannot_move_between_the_route_and_the_payload() {
        let key = RouteKey::new(&[1; 32]);
        let good = sealed(DatagramKind::Receipt, &key);
        let shorter = Header { route: route(&[1, 2]), ..good };
        assert!(!shorter.verifies(&key, &[&[3; 8], &b"payload"[..]].concat()));
    }

    #[test]
    fn what_changes_on_the_way_and_what_proves_itself_is_left_out() {
        let key = RouteKey::new(&[1; 32]);
        let data = sealed(DatagramKind::Data, &key);
        let arrived = Header { congestion: true, position: 2, ..data };
        assert!(arrived.verifies(&key, b"another packet"));
    }
}
