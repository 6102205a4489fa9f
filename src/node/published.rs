//! What a node publishes, kept in a file of the data directory, so that a node that is started
//! again publishes it again by itself.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::engine::event::ServiceSpec;
use crate::engine::measure::HealthPolicy;
use crate::engine::overlay::delegation;
use crate::engine::overlay::wire::{Objective, ServiceKind};
use crate::engine::types::{NodeId, ServiceName};

/// Name of the file within the data directory.
pub const FILE: &str = "published.json";

/// One published service, as stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    kind: ServiceKind,
    target: SocketAddr,
    metadata: BTreeMap<String, String>,
    allowed: Vec<String>,
    ttl_s: u32,
    #[serde(default)]
    objective: Objective,
    /// As `meshwise service delegate` printed it.
    #[serde(default)]
    delegation: Option<String>,
    /// As its kind is checked when it is missing.
    #[serde(default)]
    health: Option<HealthPolicy>,
}

/// The file and what it holds.
#[derive(Debug)]
pub struct Published {
    path: PathBuf,
    entries: Mutex<BTreeMap<ServiceName, Entry>>,
}

impl Published {
    /// Reads the file of a data directory; there may be none.
    ///
    /// # Errors
    /// One line, when the file cannot be read or is damaged. It is not touched.
    pub fn load(data_dir: &Path) -> Result<Self, String> {
        let path = data_dir.join(FILE);
        let what = |error: &dyn std::fmt::Display| {
            let path = path.display();
            format!("cannot read {path}: {error}; move it away and publish the services again")
        };
        let entries = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| what(&error))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(what(&error)),
        };
        Ok(Self { path, entries: Mutex::new(entries) })
    }

    /// The names of all services.
    pub fn names(&self) -> Vec<ServiceName> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// A service and its target; `None` when it is not kept, or its allow list cannot be read,
    /// which must not become "everybody", or its delegation, without which this node would claim the
    /// name for itself.
    pub fn service(&self, name: &ServiceName) -> Option<(ServiceSpec, SocketAddr)> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.get(name)?;
        let allowed: Result<Vec<NodeId>, _> = entry.allowed.iter().map(|id| id.parse()).collect();
        let allowed = allowed
            .inspect_err(|error| tracing::warn!("{name} is not published again: {error}"))
            .ok()?;
        let delegation = entry.delegation.as_deref().map(delegation::from_text).transpose();
        let delegation = delegation
            .inspect_err(|error| tracing::warn!("{name} is not published again: {error}"))
            .ok()?;
        let usual = HealthPolicy::of_kind(entry.kind);
        let health = entry.health.clone().unwrap_or_else(|| usual.clone());
        let health = match health.fits(entry.kind) {
            Ok(()) => health,
            Err(why) => {
                tracing::warn!("{name} is checked as usual: {why}");
                usual
            }
        };
        let spec = ServiceSpec {
            name: name.clone(),
            kind: entry.kind,
            metadata: entry.metadata.clone(),
            allowed,
            ttl_s: entry.ttl_s,
            objective: entry.objective,
            delegation: delegation.map(|(signed, _)| signed),
            health,
        };
        Some((spec, entry.target))
    }

    /// Keeps a service.
    pub fn insert(&self, spec: &ServiceSpec, target: SocketAddr) {
        let entry = Entry {
            kind: spec.kind,
            target,
            metadata: spec.metadata.clone(),
            allowed: spec.allowed.iter().map(ToString::to_string).collect(),
            ttl_s: spec.ttl_s,
            objective: spec.objective,
            delegation: spec.delegation.as_ref().map(delegation::to_text),
            health: Some(spec.health.clone()),
        };
        self.change(|entries| {
            entries.insert(spec.name.clone(), entry);
        });
    }

    /// Forgets a service. Returns whether it was kept.
    pub fn remove(&self, name: &ServiceName) -> bool {
        let mut removed = false;
        self.change(|entries| removed = entries.remove(name).is_some());
        removed
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<ServiceName, Entry>)) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let before = entries.clone();
        change(&mut entries);
        if *entries == before {
            return;
        }
        let part = self.path.with_extension("part");
        let written = serde_json::to_vec_pretty(&*entries)
            .map_err(std::io::Error::other)
            .and_then(|bytes| std::fs::write(&part, bytes))
            .and_then(|()| std::fs::rename(&part, &self.path));
        if let Err(error) = written {
            let path = self.path.display();
            tracing::warn!("{path} could not be written ({error}): a restart forgets the change");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::HealthCheck;
    use crate::engine::overlay::wire::Signed;
    use crate::engine::overlay::{Author, Delegation};
    use crate::engine::types::Timestamp;
    use crate::node::Identity;

    fn delegation() -> Signed {
        let provider = Identity::generate().public_key();
        let name = "a.local".parse().unwrap();
        let delegation = Delegation { name, provider, expires_at: Timestamp(1) };
        Signed::seal(&Author::root(Identity::generate().signing_key()), &delegation)
    }

    #[test]
    fn what_is_published_survives_a_restart_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let spec = ServiceSpec {
            name: "a.local".parse().unwrap(),
            kind: ServiceKind::Tcp,
            metadata: BTreeMap::new(),
            allowed: vec![NodeId([7; 8])],
            ttl_s: 60,
            objective: Objective::Reliability,
            delegation: Some(delegation()),
            health: HealthPolicy {
                check: HealthCheck::Http {
                    path: "/health".into(),
                    status: Some(204),
                    contains: Some("ok".into()),
                },
                interval_ms: 1_000,
                failures: 2,
            },
        };
        let target: SocketAddr = "127.0.0.1:80".parse().unwrap();
        Published::load(dir.path()).unwrap().insert(&spec, target);
        let again = Published::load(dir.path()).unwrap();
        assert_eq!(again.names(), std::slice::from_ref(&spec.name));
        assert_eq!(again.service(&spec.name), Some((spec.clone(), target)));
        assert!(again.remove(&spec.name) && !again.remove(&spec.name));
        assert!(Published::load(dir.path()).unwrap().names().is_empty());
        let earlier = r#"{"a.local": {"kind": "Tcp", "target": "127.0.0.1:80", "metadata": {},
                          "allowed": [], "ttl_s": 60}}"#;
        std::fs::write(dir.path().join(FILE), earlier).unwrap();
        let (kept, _) = Published::load(dir.path()).unwrap().service(&spec.name).unwrap();
        assert_eq!(kept.objective, Objective::Balanced, "of a file without objectives");
        assert_eq!(kept.delegation, None);
        assert_eq!(kept.health, HealthPolicy::of_kind(ServiceKind::Tcp), "nor checks");
        let damaged = earlier.replace("60}", r#"60, "delegation": "meshwise-delegation-1-AA"}"#);
        std::fs::write(dir.path().join(FILE), damaged).unwrap();
        assert_eq!(Published::load(dir.path()).unwrap().service(&spec.name), None, "not its own");
        std::fs::write(dir.path().join(FILE), "{\"a.local\":").unwrap();
        assert!(Published::load(dir.path()).unwrap_err().contains(FILE));
    }
}
