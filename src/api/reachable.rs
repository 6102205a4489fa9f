//! How the node reaches others and is reached, as JSON.

use serde::{Deserialize, Serialize};

use crate::node::{FOREIGN, Gateway, View};

/// A configured bootstrap address.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BootstrapAddress {
    /// As configured.
    pub address: String,
    /// Whether a node answered there the last time; `None` before there was a result.
    pub answered: Option<bool>,
    /// What the system said, when none did.
    pub error: Option<String>,
    /// Whether one did that is of another network.
    #[serde(default)]
    pub foreign: bool,
}

/// An address of this node that a member tried to reach.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TestedAddress {
    /// Multiaddress.
    pub address: String,
    /// Whether the member could.
    pub reachable: bool,
    /// Why not.
    pub error: Option<String>,
}

/// `GET /v1/reach`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reachability {
    /// Whether the local network is searched for nodes.
    pub mdns: bool,
    /// Whether anything is done about NAT.
    pub nat: bool,
    /// The configured bootstrap addresses.
    pub bootstrap: Vec<BootstrapAddress>,
    /// The tests of this node's addresses.
    pub tested: Vec<TestedAddress>,
    /// The gateway of the local network: `off`, `searching`, `none`, `not-routable` or `maps`.
    pub gateway: String,
    /// Addresses that it maps to this node.
    pub mapped: Vec<String>,
    /// Peer ids of those that are connected over another member only.
    pub relayed: Vec<String>,
    /// By how much this node's clock is ahead of the members' median (ms), with what their messages
    /// took to come; `None` while none was heard.
    pub clock_ahead_ms: Option<f64>,
    /// How many members that is from.
    pub clock_members: usize,
    /// Advertisements of members that were refused for their time or for other reasons.
    pub advertisements_refused: u64,
}

impl Reachability {
    /// From the node's state.
    pub fn of(view: &mut View<'_>) -> Self {
        let reach = view.net.reach();
        let bootstrap = reach.bootstrap.into_iter().map(|(address, result)| BootstrapAddress {
            address,
            answered: result.as_ref().map(Result::is_ok),
            foreign: matches!(&result, Some(Err(why)) if why == FOREIGN),
            error: result.and_then(Result::err),
        });
        let tested = reach.tested.into_iter().map(|(address, result)| TestedAddress {
            address,
            reachable: result.is_ok(),
            error: result.err(),
        });
        let (gateway, mapped) = match reach.gateway {
            Gateway::Off => ("off", Vec::new()),
            Gateway::Searching => ("searching", Vec::new()),
            Gateway::NotFound => ("none", Vec::new()),
            Gateway::NotRoutable => ("not-routable", Vec::new()),
            Gateway::Maps(addresses) => ("maps", addresses.into_iter().collect()),
        };
        let me = view.engine.me();
        let ages = view.engine.graph().ages_us().filter(|(origin, _)| *origin != me);
        let mut ages: Vec<i64> = ages.map(|(_, age_us)| age_us).collect();
        ages.sort_unstable();
        Self {
            mdns: reach.mdns,
            nat: reach.nat,
            bootstrap: bootstrap.collect(),
            tested: tested.collect(),
            gateway: gateway.into(),
            mapped,
            relayed: reach.relayed.into_iter().collect(),
            clock_ahead_ms: ages.get(ages.len() / 2).map(|age_us| *age_us as f64 / 1e3),
            clock_members: ages.len(),
            advertisements_refused: view.dropped.get("link-state").copied().unwrap_or_default(),
        }
    }
}
