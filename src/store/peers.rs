//! The peer cache: who was connected, so that a node finds back when no configured address answers.

use rusqlite::{Connection, params};

use super::reader::{signed, unsigned};
use super::{Reader, StoreError};
use crate::engine::overlay::KnownPeer;
use crate::engine::overlay::bootstrap::KNOWN_MAX;
use crate::engine::overlay::wire::PeerAddresses;
use crate::engine::types::{PublicKey, Timestamp};

/// Peers that are kept: as many as a node remembers while it runs. Those seen last stay.
pub const PEERS_KEPT_MAX: usize = KNOWN_MAX;

/// Keeps peers, and forgets those seen longest ago beyond [`PEERS_KEPT_MAX`].
pub(super) fn keep(connection: &Connection, peers: &[KnownPeer]) -> rusqlite::Result<()> {
    let sql = "INSERT INTO peer (key, addresses, seen_us) VALUES (?1, ?2, ?3)
               ON CONFLICT (key) DO UPDATE SET addresses = excluded.addresses,
               seen_us = excluded.seen_us";
    let mut statement = connection.prepare_cached(sql)?;
    for KnownPeer { peer, seen_at } in peers {
        let addresses = serde_json::to_string(&peer.addresses).unwrap_or_else(|_| "[]".into());
        statement.execute(params![peer.key.0, addresses, signed(seen_at.as_micros())])?;
    }
    let sql = "DELETE FROM peer WHERE key IN
               (SELECT key FROM peer ORDER BY seen_us DESC, key LIMIT -1 OFFSET ?1)";
    connection.prepare_cached(sql)?.execute([signed(PEERS_KEPT_MAX as u64)])?;
    Ok(())
}

impl Reader {
    /// The peers that were connected, the one seen last first.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn peers(&self) -> Result<Vec<KnownPeer>, StoreError> {
        let sql = "SELECT key, addresses, seen_us FROM peer ORDER BY seen_us DESC, key";
        self.rows(sql, [], |row| {
            let addresses: String = row.get(1)?;
            let addresses = serde_json::from_str(&addresses).unwrap_or_default();
            let peer = PeerAddresses { key: PublicKey(row.get(0)?), addresses };
            Ok(KnownPeer { peer, seen_at: Timestamp(unsigned(row, 2)?) })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Retention, Writer};

    fn known(index: u64, seen_us: u64) -> KnownPeer {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&index.to_le_bytes());
        let addresses = vec![format!("/ip4/10.0.0.1/tcp/{index}")];
        let peer = PeerAddresses { key: PublicKey(key), addresses };
        KnownPeer { peer, seen_at: Timestamp(seen_us) }
    }

    #[test]
    fn the_newest_peers_are_kept_each_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let writer = Writer::start(&path, Retention::default()).unwrap();
        let many = PEERS_KEPT_MAX as u64 + 10;
        writer.peers((0..many).map(|index| known(index, 1_000 + index)).collect());
        let mut moved = known(0, 9_000);
        moved.peer.addresses = vec!["/ip4/10.0.0.2/tcp/1".into()];
        writer.peers(vec![moved.clone(), known(10, 1_010)]);
        drop(writer);
        let peers = Reader::open(&path).unwrap().peers().unwrap();
        assert_eq!(peers.len(), PEERS_KEPT_MAX);
        assert_eq!(peers[0], moved, "with its new address");
        assert_eq!(peers[1], known(many - 1, 1_000 + many - 1));
        assert_eq!(peers[PEERS_KEPT_MAX - 1], known(11, 1_011), "the oldest made room");
    }
}
