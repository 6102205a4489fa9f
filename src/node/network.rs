//! Which network a node belongs to, kept in two files of the data directory: what was signed for it,
//! and, where the network was created, the root key.
//!
//! A node without these files founds a network of its own, so that a first node needs no setting.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ed25519_dalek::SigningKey;

use super::Identity;
use crate::engine::overlay::membership::{Credential, NetworkState};
use crate::engine::overlay::token::NAME_BYTES_MAX;
use crate::engine::overlay::wire;
use crate::engine::types::{PublicKey, Timestamp};

/// Name of the file that says which network it is.
pub const STATE_FILE: &str = "network.state";
/// Name of the file with the network's root key.
pub const ROOT_FILE: &str = "root.key";
/// Name of a network that was founded without being asked for.
pub const DEFAULT_NAME: &str = "default";
/// Longest state (bytes): every revocation, grant and member at its bound.
const STATE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Network files that cannot be used. One line: what, why, what to do.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Cannot be read or written.
    #[error("cannot use {path}: {error}")]
    Io {
        /// Which file.
        path: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// Not what was written.
    #[error("{path} is damaged; restore it, or move it away and join the network again")]
    Damaged {
        /// Which file.
        path: String,
    },
    /// Others may read the root key.
    #[error("{path} can be read by others (mode {mode:o}); run 'chmod 600' on it")]
    Exposed {
        /// Which file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// The node is in a network already.
    #[error(
        "this node belongs to the network '{name}' already; choose another --data-dir, or move {path} away"
    )]
    Belongs {
        /// Name of the network.
        name: String,
        /// The state file.
        path: String,
    },
    /// The node has founded a network already.
    #[error(
        "this node has founded the network '{name}' already (a node that is started without one founds \
         '{DEFAULT_NAME}' by itself); choose another --data-dir, or move {path} and {ROOT_FILE} away"
    )]
    Founded {
        /// Name of the network.
        name: String,
        /// The state file.
        path: String,
    },
    /// There is a root key and nothing that says of which network.
    #[error("{path} is there without {STATE_FILE} beside it; restore that, or move the key away")]
    RootAlone {
        /// The root key.
        path: String,
    },
    /// Not the name of a network.
    #[error(
        "'{0}' cannot be the name of a network: it has 1 to {NAME_BYTES_MAX} lower-case letters, digits \
         and hyphens"
    )]
    Name(String),
}

/// A network and, on the node that issues credentials, its root key.
#[derive(Clone)]
pub struct Network {
    /// What is kept.
    pub state: NetworkState,
    /// The root key.
    pub root: Option<SigningKey>,
}

impl Network {
    /// Founds a network of its own for this node.
    pub fn found(name: &str, key: &PublicKey, now: Timestamp) -> Self {
        let root = Identity::generate().signing_key();
        Self { state: NetworkState::found(&root, name, key, now), root: Some(root) }
    }

    /// What another node of this network keeps, when this one lets it in; `None` on a node without the
    /// root key.
    pub fn admit(&self, key: &PublicKey, now: Timestamp) -> Option<Self> {
        let until = now + crate::engine::overlay::membership::CREDENTIAL_LIFETIME;
        let credential = Credential::issue(self.root.as_ref()?, key, now, until);
        let (name, root, issuer) = (&self.state.name, self.state.root, self.state.issuer);
        Some(Self { state: NetworkState::joined(name, root, issuer, credential), root: None })
    }

    /// Whether it was founded by this node, and nobody else was ever let in.
    pub fn is_alone(&self, me: &PublicKey) -> bool {
        self.root.is_some() && self.state.ledger.issued.keys().all(|key| key == me)
    }

    /// Reads the files of a data directory; `None` when there are none.
    ///
    /// # Errors
    /// [`NetworkError`]; nothing is touched.
    pub fn load(data_dir: &Path) -> Result<Option<Self>, NetworkError> {
        let path = data_dir.join(STATE_FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(&path, error)),
        };
        let state: NetworkState =
            wire::decode(&bytes, STATE_BYTES_MAX).map_err(|_| damaged(&path))?;
        let root = load_root(&data_dir.join(ROOT_FILE))?;
        let root = root.filter(|root| root.verifying_key().to_bytes() == state.root.0);
        Ok(Some(Self { state, root }))
    }

    /// Writes the files of a data directory that has none.
    ///
    /// # Errors
    /// [`NetworkError::Belongs`] or [`NetworkError::Founded`] where there is a network already.
    pub fn save_new(&self, data_dir: &Path) -> Result<(), NetworkError> {
        if let Some(known) = Self::load(data_dir)? {
            return Err(known.is_there(data_dir));
        }
        if let Some(root) = &self.root {
            let path = data_dir.join(ROOT_FILE);
            let mut options = fs::OpenOptions::new();
            let options = options.write(true).create_new(true).mode(0o600);
            let mut file = options.open(&path).map_err(|error| match error.kind() {
                std::io::ErrorKind::AlreadyExists => {
                    NetworkError::RootAlone { path: path.display().to_string() }
                }
                _ => io(&path, error),
            })?;
            let written = file.write_all(&root.to_bytes()).and_then(|()| file.sync_all());
            written.map_err(|error| io(&path, error))?;
        }
        keep(data_dir, &self.state)
    }

    /// Says that a data directory holds this network already.
    pub(super) fn is_there(&self, data_dir: &Path) -> NetworkError {
        let name = self.state.name.clone();
        let path = data_dir.join(STATE_FILE).display().to_string();
        match self.root {
            Some(_) => NetworkError::Founded { name, path },
            None => NetworkError::Belongs { name, path },
        }
    }

    /// Renames the files of this network, so that the data directory has none; the root's id is added
    /// to their names. Nothing is deleted.
    pub(super) fn set_aside(&self, data_dir: &Path) -> Result<(), NetworkError> {
        for file in [ROOT_FILE, STATE_FILE] {
            let path = data_dir.join(file);
            let aside = data_dir.join(format!("{file}.{}", self.state.root.node_id()));
            fs::rename(&path, aside).map_err(|error| io(&path, error))?;
        }
        Ok(())
    }
}

/// Replaces the state file.
///
/// # Errors
/// [`NetworkError::Io`]; the file that was there is there still.
pub fn keep(data_dir: &Path, state: &NetworkState) -> Result<(), NetworkError> {
    let path = data_dir.join(STATE_FILE);
    let part = path.with_extension("part");
    let write = || {
        let mut options = fs::OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&part)?;
        file.write_all(&wire::encode(state))?;
        file.sync_all()?;
        fs::rename(&part, &path)?;
        // The new name too: an invitation that was used up must not come back.
        fs::File::open(data_dir)?.sync_all()
    };
    write().map_err(|error| io(&path, error))
}

fn load_root(path: &PathBuf) -> Result<Option<SigningKey>, NetworkError> {
    let mode = match fs::metadata(path) {
        Ok(metadata) => metadata.permissions().mode() & 0o777,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(path, error)),
    };
    if mode & 0o077 != 0 {
        return Err(NetworkError::Exposed { path: path.display().to_string(), mode });
    }
    let bytes = fs::read(path).map_err(|error| io(path, error))?;
    let secret = bytes.as_slice().try_into().map_err(|_| damaged(path))?;
    Ok(Some(SigningKey::from_bytes(secret)))
}

fn io(path: &Path, error: std::io::Error) -> NetworkError {
    NetworkError::Io { path: path.display().to_string(), error }
}

fn damaged(path: &Path) -> NetworkError {
    NetworkError::Damaged { path: path.display().to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000_000_000);

    #[test]
    fn a_network_is_kept_and_not_overwritten_and_its_root_key_is_private() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Network::load(dir.path()).unwrap().is_none());
        let key = Identity::generate().public_key();
        let network = Network::found("home", &key, NOW);
        network.save_new(dir.path()).unwrap();
        let again = Network::load(dir.path()).unwrap().unwrap();
        assert_eq!(again.state, network.state);
        assert!(again.root.is_some());
        assert!(matches!(network.save_new(dir.path()), Err(NetworkError::Founded { .. })));
        let root = dir.path().join(ROOT_FILE);
        fs::set_permissions(&root, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Network::load(dir.path()), Err(NetworkError::Exposed { .. })));
        fs::set_permissions(&root, fs::Permissions::from_mode(0o600)).unwrap();
        let state = dir.path().join(STATE_FILE);
        fs::rename(&state, dir.path().join("elsewhere")).unwrap();
        assert!(matches!(network.save_new(dir.path()), Err(NetworkError::RootAlone { .. })));
        fs::rename(dir.path().join("elsewhere"), &state).unwrap();
        fs::remove_file(&root).unwrap();
        assert!(Network::load(dir.path()).unwrap().unwrap().root.is_none());
        assert!(matches!(network.save_new(dir.path()), Err(NetworkError::Belongs { .. })));
        fs::write(dir.path().join(STATE_FILE), b"x").unwrap();
        assert!(matches!(Network::load(dir.path()), Err(NetworkError::Damaged { .. })));
    }

    #[test]
    fn who_is_admitted_belongs_and_admits_nobody() {
        let (first, second) = (Identity::generate(), Identity::generate());
        let network = Network::found("home", &first.public_key(), NOW);
        let other = network.admit(&second.public_key(), NOW).unwrap();
        let roster = network.state.membership();
        let check = roster.roster().check(&second.public_key(), &other.state.credential, NOW);
        assert_eq!(check, Ok(()));
        assert!(other.admit(&first.public_key(), NOW).is_none());
    }
}
