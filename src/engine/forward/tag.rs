//! What proves that a datagram comes from an end of its tunnel: the first 8 bytes of HMAC-SHA-256
//! (RFC 2104) with a key that only the two ends have, because it comes from their TLS handshake.
//!
//! The tag covers what relays must not change and what a stranger must not claim: kind, flags
//! without the congestion mark, node count, tunnel, route id, sequence number, route, and the
//! payload. The position and the congestion mark change on the way.
//!
//! Of the payload, which may be long, HMAC gets the length and a short stand-in for each
//! [`BLOCK_BYTES`]: the universal hash NH (Black, Halevi, Krawczyk, Krovetz and Rogaway, 1999, "UMAC",
//! section 4; here with words of 64 bits, as in VMAC), under keys of its own. Whoever has no key finds
//! another block with the same stand-in by chance only, once in 2^64, as for the tag itself; and it
//! costs a tenth of what SHA-256 would. A packet of QUIC proves itself too, but only to QUIC: without
//! this, a relay that changes what it forwards would be said to deliver it.

use std::fmt;
use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::header::{FLAG_CONGESTION, Header};

/// Payload bytes with one stand-in: 48 of them for the largest payload.
const BLOCK_BYTES: usize = 1_024;
const WORDS: usize = BLOCK_BYTES / 8;
/// What the keys of the payload's hash are derived for.
const PAYLOAD_LABEL: &[u8] = b"meshwise payload";

/// The keys of a tunnel's two ends.
#[derive(Clone)]
pub struct RouteKey {
    mac: Hmac<Sha256>,
    /// One for each word of a block.
    payload: Arc<[u64; WORDS]>,
}

impl RouteKey {
    /// From 32 secret bytes.
    pub fn new(secret: &[u8; 32]) -> Self {
        let mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes keys of any length");
        let mut payload = [0; WORDS];
        for (number, keys) in (0u8..).zip(payload.chunks_mut(4)) {
            let derived = mac.clone().chain_update(PAYLOAD_LABEL).chain_update([number]).finalize();
            for (key, bytes) in keys.iter_mut().zip(derived.into_bytes().chunks(8)) {
                *key = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
            }
        }
        Self { mac, payload: Arc::new(payload) }
    }

    /// What stands for a block; a short one counts as if zeros followed.
    fn hash(&self, block: &[u8]) -> u128 {
        let (keys, _) = self.payload.as_chunks::<2>();
        let (pairs, rest) = block.as_chunks::<16>();
        let product = |pair: &[u8; 16], keys: &[u64; 2]| {
            let words = u128::from_le_bytes(*pair);
            let first = (words as u64).wrapping_add(keys[0]);
            let second = ((words >> 64) as u64).wrapping_add(keys[1]);
            u128::from(first) * u128::from(second)
        };
        let products = pairs.iter().zip(keys).map(|(pair, keys)| product(pair, keys));
        let sum = products.fold(0, u128::wrapping_add);
        if rest.is_empty() {
            return sum;
        }
        let mut last = [0; 16];
        last[..rest.len()].copy_from_slice(rest);
        sum.wrapping_add(product(&last, &keys[pairs.len()]))
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
        let mut mac = key.mac.clone();
        let count = self.route.nodes().len() as u8;
        mac.update(&[self.kind as u8, self.flags() & !FLAG_CONGESTION, count]);
        mac.update(&self.tunnel.0.to_be_bytes());
        mac.update(&self.route_id.to_be_bytes());
        mac.update(&self.sequence.to_be_bytes());
        for node in self.route.nodes() {
            mac.update(&node.0);
        }
        mac.update(&(payload.len() as u32).to_be_bytes());
        for block in payload.chunks(BLOCK_BYTES) {
            mac.update(&key.hash(block).to_le_bytes());
        }
        let digest = mac.finalize().into_bytes();
        digest[..8].iter().fold(0u64, |tag, byte| tag << 8 | u64::from(*byte)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::forward::DatagramKind;
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
    fn what_changes_on_the_way_is_left_out() {
        let key = RouteKey::new(&[1; 32]);
        let data = sealed(DatagramKind::Data, &key);
        let arrived = Header { congestion: true, position: 2, ..data };
        assert!(arrived.verifies(&key, b"payload"));
    }

    #[test]
    fn every_bit_and_the_length_of_a_packet_are_covered() {
        let key = RouteKey::new(&[1; 32]);
        for length in [1, 7, 16, 100, BLOCK_BYTES, 2 * BLOCK_BYTES + 13] {
            let packet: Vec<u8> = (0..length).map(|at| at as u8).collect();
            let mut header = sealed(DatagramKind::Data, &key);
            header.seal(&key, &packet);
            assert!(header.verifies(&key, &packet));
            for bit in 0..8 * length {
                let mut changed = packet.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                assert!(!header.verifies(&key, &changed), "bit {bit} of {length} bytes");
            }
            for other in [&packet[..length - 1], &[&packet[..], &[0]].concat(), b""] {
                assert!(!header.verifies(&key, other), "{} bytes for {length}", other.len());
            }
        }
    }

    #[test]
    fn blocks_cannot_change_places() {
        let key = RouteKey::new(&[1; 32]);
        let [one, other] = [[1; BLOCK_BYTES], [2; BLOCK_BYTES]];
        let mut header = sealed(DatagramKind::Data, &key);
        header.seal(&key, &[one, other].concat());
        assert!(!header.verifies(&key, &[other, one].concat()));
    }
}
