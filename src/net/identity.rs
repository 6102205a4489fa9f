//! The node's key on disk, and the two spellings of an identity: the raw Ed25519 key that the
//! engine knows, and the libp2p peer id that people see in multiaddresses.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use ed25519_dalek::SigningKey;
use libp2p::PeerId;
use libp2p::identity::{self, Keypair};
use sha2::{Digest, Sha256};

use crate::engine::types::{NodeId, PublicKey};

/// Name of the key file within the data directory.
pub const FILE: &str = "identity.key";

/// A key file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Cannot be read or written.
    #[error("cannot use the identity file {path}: {error}")]
    Io {
        /// Which file.
        path: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// Not 32 bytes.
    #[error(
        "{path} is not an identity: {length} bytes instead of 32; restore it, or move it away to get a new identity"
    )]
    Damaged {
        /// Which file.
        path: String,
        /// Its length (bytes).
        length: usize,
    },
    /// Others may read it.
    #[error("{path} can be read by others (mode {mode:o}); run 'chmod 600' on it")]
    Exposed {
        /// Which file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
}

/// A node's Ed25519 identity.
#[derive(Clone)]
pub struct Identity {
    secret: [u8; 32],
}

impl Identity {
    /// A new one from the operating system's randomness.
    pub fn generate() -> Self {
        let pair = identity::ed25519::Keypair::generate();
        let mut secret = [0; 32];
        secret.copy_from_slice(pair.secret().as_ref());
        Self { secret }
    }

    /// Reads the key file of a data directory, or makes one (mode 0600).
    ///
    /// # Errors
    /// [`IdentityError`]; a file that is there is never overwritten.
    pub fn load_or_create(data_dir: &Path) -> Result<Self, IdentityError> {
        let path = data_dir.join(FILE);
        let text = path.display().to_string();
        let io = |error| IdentityError::Io { path: text.clone(), error };
        if path.exists() {
            let mode = fs::metadata(&path).map_err(io)?.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                return Err(IdentityError::Exposed { path: text, mode });
            }
            let bytes = fs::read(&path).map_err(io)?;
            let secret = bytes
                .as_slice()
                .try_into()
                .map_err(|_| IdentityError::Damaged { path: text.clone(), length: bytes.len() })?;
            return Ok(Self { secret });
        }
        let identity = Self::generate();
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(&path).map_err(io)?;
        file.write_all(&identity.secret).and_then(|()| file.sync_all()).map_err(io)?;
        Ok(identity)
    }

    /// Writes this identity into a data directory that has none.
    ///
    /// # Errors
    /// [`IdentityError::Io`], also when there is one already.
    pub fn save_new(&self, data_dir: &Path) -> Result<(), IdentityError> {
        let path = data_dir.join(FILE);
        let io = |error| IdentityError::Io { path: path.display().to_string(), error };
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(&path).map_err(io)?;
        file.write_all(&self.secret).map_err(io)
    }

    /// For the engine's signatures.
    pub fn signing_key(&self) -> SigningKey {
        SigningKey::from_bytes(&self.secret)
    }

    /// A secret derived from this identity for one purpose, the same after a restart.
    pub(super) fn derived_secret(&self, purpose: &str) -> [u8; 32] {
        let mut hasher = Sha256::new();
        hasher.update("meshwise/derived-secret/1\0");
        hasher.update(purpose);
        hasher.update([0]);
        hasher.update(self.secret);
        hasher.finalize().into()
    }

    /// The public half.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(self.signing_key().verifying_key().to_bytes())
    }

    /// The short id.
    pub fn node_id(&self) -> NodeId {
        self.public_key().node_id()
    }

    /// For libp2p.
    pub fn keypair(&self) -> Keypair {
        Keypair::ed25519_from_bytes(self.secret).expect("any 32 bytes are an Ed25519 secret")
    }
}

/// The libp2p peer id of a key; `None` when the bytes are no point of the curve.
pub fn peer_id(key: &PublicKey) -> Option<PeerId> {
    let key = identity::ed25519::PublicKey::try_from_bytes(&key.0).ok()?;
    Some(identity::PublicKey::from(key).to_peer_id())
}

/// The key of a libp2p peer id; `None` when it is not an Ed25519 identity.
pub fn public_key(peer: &PeerId) -> Option<PublicKey> {
    let hash: &libp2p::multihash::Multihash<64> = peer.as_ref();
    if hash.code() != 0 {
        return None;
    }
    let key = identity::PublicKey::try_decode_protobuf(hash.digest()).ok()?;
    Some(PublicKey(key.try_into_ed25519().ok()?.to_bytes()))
}

/// The peer id of a key as text; the node id where there is none.
pub fn peer_id_text(key: &PublicKey) -> String {
    peer_id(key).map_or_else(|| key.node_id().to_string(), |peer| peer.to_string())
}

/// Parses a peer id.
///
/// # Errors
/// One line that says what is expected.
pub fn parse_peer_id(text: &str) -> Result<PublicKey, String> {
    let wrong = || format!("'{text}' is not a peer id; it begins with 12D3KooW");
    let peer: PeerId = text.parse().map_err(|_| wrong())?;
    public_key(&peer).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_name_the_same_identity() {
        let identity = Identity::generate();
        let key = identity.public_key();
        let peer = peer_id(&key).unwrap();
        assert_eq!(identity.keypair().public().to_peer_id(), peer);
        assert_eq!(public_key(&peer), Some(key));
        assert_eq!(parse_peer_id(&peer_id_text(&key)), Ok(key));
        assert!(parse_peer_id("12D3KooW").is_err());
    }

    #[test]
    fn the_key_file_is_private_kept_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::load_or_create(dir.path()).unwrap();
        let again = Identity::load_or_create(dir.path()).unwrap();
        assert_eq!(first.public_key(), again.public_key());
        assert!(first.save_new(dir.path()).is_err());
        let path = dir.path().join(FILE);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            Identity::load_or_create(dir.path()),
            Err(IdentityError::Exposed { mode: 0o644, .. })
        ));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, b"short").unwrap();
        assert!(matches!(
            Identity::load_or_create(dir.path()),
            Err(IdentityError::Damaged { length: 5, .. })
        ));
    }
}
