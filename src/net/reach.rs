//! What the network has found out about how this node reaches others and is reached, for whoever
//! asks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What came of a dial to a node that speaks nothing of this network's.
pub const FOREIGN: &str = "it is of another network";
/// Addresses of this node whose test is remembered; those beyond are tested and forgotten.
const TESTED_MAX: usize = 32;

/// What is known of the gateway of the local network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Gateway {
    /// Nobody asks for one.
    #[default]
    Off,
    /// It has not answered yet.
    Searching,
    /// There is none that maps ports.
    NotFound,
    /// There is one, which is itself behind another.
    NotRoutable,
    /// It maps ports: addresses of this node from outside.
    Maps(BTreeSet<String>),
}

/// What is known now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Whether the local network is searched for nodes.
    pub mdns: bool,
    /// Whether anything is done about NAT.
    pub nat: bool,
    /// The configured bootstrap addresses, and what came of the last dial; `None` before there is
    /// a result.
    pub bootstrap: BTreeMap<String, Option<Result<(), String>>>,
    /// Addresses of this node that a member tried to reach, and how that went.
    pub tested: BTreeMap<String, Result<(), String>>,
    /// What the gateway does.
    pub gateway: Gateway,
    /// Peers that are connected over another member only.
    pub relayed: BTreeSet<String>,
}

impl Reach {
    /// Keeps the result of a test.
    pub(super) fn tested(&mut self, address: String, result: Result<(), String>) {
        if self.tested.len() < TESTED_MAX || self.tested.contains_key(&address) {
            self.tested.insert(address, result);
        }
    }

    /// Whether members tried to reach this node and none could.
    pub fn is_unreachable(&self) -> bool {
        !self.tested.is_empty() && self.tested.values().all(Result::is_err)
    }
}

/// Shared by the swarm's task with whoever looks.
#[derive(Clone, Debug, Default)]
pub struct SharedReach(Arc<Mutex<Reach>>);

impl SharedReach {
    pub(super) fn lock(&self) -> MutexGuard<'_, Reach> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_that_answers_is_enough() {
        let mut reach = Reach::default();
        assert!(!reach.is_unreachable(), "nobody has tried");
        reach.tested("/ip4/10.0.0.1/tcp/1".into(), Err("refused".into()));
        assert!(reach.is_unreachable());
        for port in 0..2 * TESTED_MAX {
            reach.tested(format!("/ip4/10.0.0.2/tcp/{port}"), Err("refused".into()));
        }
        assert_eq!(reach.tested.len(), TESTED_MAX);
        reach.tested("/ip4/10.0.0.1/tcp/1".into(), Ok(()));
        assert!(!reach.is_unreachable());
    }
}
