//! To whom names belong as far as this node has seen, kept in a file of the data directory: a restart
//! must not make the next claimant of a name its first.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::handle::{NodeHandle, RequestError};
use super::{parse_peer_id, peer_id_text};
use crate::engine::event::{Answer, Command};
use crate::engine::overlay::{Pin, delegation};
use crate::engine::types::{PublicKey, ServiceName, Timestamp};

/// Name of the file within the data directory.
pub const FILE: &str = "names.json";

/// One name, as stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// Peer id.
    owner: String,
    /// Microseconds since the epoch.
    seen_us: u64,
}

/// Reads the file of a data directory; there may be none.
///
/// # Errors
/// One line, when the file cannot be read or is damaged. It is not touched.
pub fn load(data_dir: &Path) -> Result<Vec<Pin>, String> {
    let path = data_dir.join(FILE);
    let what = |error: &dyn std::fmt::Display| {
        let path = path.display();
        format!(
            "cannot read {path}: {error}; move it away to trust the first owner of each name anew"
        )
    };
    let entries: BTreeMap<ServiceName, Entry> = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| what(&error))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
        Err(error) => return Err(what(&error)),
    };
    let pin = |(name, entry): (ServiceName, Entry)| {
        let owner = parse_peer_id(&entry.owner).map_err(|error| what(&error))?;
        Ok(Pin { name, owner, seen_at: Timestamp(entry.seen_us) })
    };
    entries.into_iter().map(pin).collect()
}

/// Replaces the file.
///
/// # Errors
/// One line; the file that was there is there still.
pub fn keep(data_dir: &Path, pins: impl Iterator<Item = Pin>) -> Result<(), String> {
    let path: PathBuf = data_dir.join(FILE);
    let part = path.with_extension("part");
    let entry = |pin: Pin| {
        let owner = peer_id_text(&pin.owner);
        (pin.name, Entry { owner, seen_us: pin.seen_at.as_micros() })
    };
    let entries: BTreeMap<ServiceName, Entry> = pins.map(entry).collect();
    let written = serde_json::to_vec_pretty(&entries)
        .map_err(std::io::Error::other)
        .and_then(|bytes| std::fs::write(&part, bytes))
        .and_then(|()| std::fs::rename(&part, &path));
    written.map_err(|error| format!("{} could not be written ({error})", path.display()))
}

impl NodeHandle {
    /// Lets another node publish a name of this node's. Returns the text to be passed on, and when it
    /// ends.
    ///
    /// # Errors
    /// [`RequestError::Command`], when the name belongs to somebody else.
    pub async fn delegate(
        &self,
        name: ServiceName,
        provider: PublicKey,
        lifetime: std::time::Duration,
    ) -> Result<(String, Timestamp), RequestError> {
        let ask = move |request| Command::Delegate { request, name, provider, lifetime };
        match self.ask(ask).await? {
            Answer::Delegated(signed) => {
                let text = delegation::to_text(&signed);
                let said = delegation::from_text(&text).map_err(|_| RequestError::Stopped)?.1;
                Ok((text, said.expires_at))
            }
            _ => Err(RequestError::Stopped),
        }
    }

    /// From now on `owner` has this name, as far as this node is concerned.
    ///
    /// # Errors
    /// [`RequestError::Command`], when the root has granted it to somebody else, or this node publishes
    /// it.
    pub async fn trust(&self, name: ServiceName, owner: PublicKey) -> Result<(), RequestError> {
        self.ask(move |request| Command::Trust { request, name, owner }).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Identity;

    #[test]
    fn owners_of_names_survive_a_restart_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(dir.path()), Ok(Vec::new()));
        let owner = Identity::generate().public_key();
        let pin = Pin { name: "a.local".parse().unwrap(), owner, seen_at: Timestamp(7) };
        keep(dir.path(), [pin.clone()].into_iter()).unwrap();
        assert_eq!(load(dir.path()), Ok(vec![pin]));
        keep(dir.path(), std::iter::empty()).unwrap();
        assert_eq!(load(dir.path()), Ok(Vec::new()));
        let wrong = r#"{"a.local": {"owner": "nobody", "seen_us": 1}}"#;
        for text in ["{\"a.local\":", wrong] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            assert!(load(dir.path()).unwrap_err().contains(FILE));
        }
    }
}
