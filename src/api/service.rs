//! Services as the control API shows and takes them.

use serde::{Deserialize, Serialize};

use crate::engine::event::ServiceSpec;
use crate::engine::measure::HealthPolicy;
use crate::engine::overlay::{Load, Objective, ServiceRecord};
use crate::engine::types::PublicKey;
use crate::node::{View, peer_id_text};

/// One entry of `GET /v1/services`, and of `GET /v1/services/NAME`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Service {
    /// The name.
    pub name: String,
    /// `tcp`, `http` or `udp`.
    pub kind: String,
    /// What it wants from its routes.
    pub objective: Objective,
    /// Short id of the provider.
    pub provider: String,
    /// Its peer id.
    pub provider_peer_id: String,
    /// Short id of the node that owns the name; several providers under one owner are replicas.
    pub owner: String,
    /// Its peer id.
    pub owner_peer_id: String,
    /// Where its connections go, when it is this node's.
    pub target: Option<String>,
    /// Sequence number of the record.
    pub sequence: u64,
    /// Time to live of the record (s).
    pub ttl_s: u32,
    /// Nodes that may connect; everybody when empty.
    pub allowed: Vec<String>,
    /// `up`, `suspect` or `down`, `unreachable` when no link leads to the provider, or `withheld` when this
    /// node would provide it but the name belongs to another owner; none while nobody knows, as for a
    /// service that is not checked.
    pub health: Option<String>,
    /// Why its last check failed, of a service of this node: `timed-out`, `refused`, `broken`, `status`, `body`
    /// or `command`.
    #[serde(default)]
    pub why: Option<String>,
    /// How long it takes to answer (ms).
    pub response_ms: Option<f64>,
    /// Who says so: `local`, at the provider, or `end-to-end`, through a tunnel of this node.
    pub checked: Option<String>,
    /// How many nodes provide the name.
    pub providers: usize,
    /// How much the provider carries, when it said so lately.
    pub load: Option<Load>,
}

/// `GET /v1/services/NAME`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Resolved {
    /// Who provides it.
    pub providers: Vec<Service>,
    /// `gossip` when it was known already, else `dht`.
    pub source: String,
    /// How long it took (ms).
    pub took_ms: f64,
}

/// `POST /v1/services`. What is left out is as it was, where this node publishes the name already.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    /// The name.
    pub name: String,
    /// `tcp://HOST:PORT`, `http://HOST:PORT` or `udp://HOST:PORT`.
    #[serde(default)]
    pub to: Option<String>,
    /// Node ids that may connect; everybody when empty.
    #[serde(default)]
    pub allow: Option<Vec<String>>,
    /// Time to live of each record (s).
    #[serde(default)]
    pub ttl_s: Option<u32>,
    /// What it wants from its routes.
    #[serde(default)]
    pub objective: Option<Objective>,
    /// What the owner of the name printed with `meshwise service delegate`, when that is another node.
    #[serde(default)]
    pub delegation: Option<String>,
    /// How it is checked; by a connection where its kind has some.
    #[serde(default)]
    pub check: Option<HealthPolicy>,
}

/// Answer to `POST /v1/services`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Published {
    /// The name.
    pub name: String,
    /// Sequence number of the record.
    pub sequence: u64,
    /// How long it took until a majority stored it (ms).
    pub took_ms: f64,
    /// What was left out and is as it was before, in words.
    #[serde(default)]
    pub kept: Vec<String>,
    /// What is wrong with its target just now, in words.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// Longest delegation (s): a year, to which the engine cuts longer ones.
pub const DELEGATION_S_MAX: u64 = 365 * 86_400;

/// `POST /v1/services/NAME/delegations`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delegate {
    /// Node id or peer id of who may publish the name.
    pub peer: String,
    /// For how long (s).
    pub expires_s: u64,
}

/// Answer to it
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Delegated {
    /// The name.
    pub name: String,
    /// Short id of who may publish it.
    pub provider: String,
    /// When it ends (µs since the epoch): not later than the owner's own credential.
    pub expires_us: u64,
    /// The text for `meshwise service publish --delegation`.
    pub delegation: String,
}

/// `POST /v1/services/NAME/owner`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trust {
    /// Node id or peer id of the owner.
    pub owner: String,
}

/// Answer to it
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Trusted {
    /// The name.
    pub name: String,
    /// Short id of its owner from now on.
    pub owner: String,
    /// Its peer id.
    pub owner_peer_id: String,
}

impl Service {
    /// From a record and what the node knows of its provider.
    pub fn of(key: &PublicKey, record: &ServiceRecord, view: &View<'_>) -> Self {
        let (services, node) = (view.engine.services(), key.node_id());
        let known = services.health(&record.name, node, view.now);
        let is_there = view.is_reached(node);
        let health = match known {
            _ if !is_there => Some("unreachable"),
            known => known.map(|known| known.health.as_str()),
        };
        let own = node == view.engine.me();
        let failure = known.and_then(|known| known.failure).filter(|_| own);
        Self {
            health: health.map(Into::into),
            why: failure.map(|failure| failure.as_str().into()),
            response_ms: known.and_then(|known| known.response_ms),
            checked: known.map(|known| known.by.as_str().into()),
            providers: services.registry().resolve(&record.name, view.now).count(),
            load: services.load(node, view.now),
            name: record.name.to_string(),
            kind: record.kind.as_str().into(),
            objective: record.objective,
            provider: key.node_id().to_string(),
            provider_peer_id: peer_id_text(key),
            owner: record.owner.node_id().to_string(),
            owner_peer_id: peer_id_text(&record.owner),
            target: None,
            sequence: record.sequence,
            ttl_s: record.ttl_s,
            allowed: record.allowed.iter().map(ToString::to_string).collect(),
        }
    }
}

impl Service {
    /// What this node publishes although the name belongs to another owner.
    pub fn withheld(spec: &ServiceSpec, view: &View<'_>) -> Self {
        let (services, me) = (view.engine.services(), view.engine.key());
        let owner = services.registry().owner(&spec.name).unwrap_or(me);
        Self {
            health: Some("withheld".into()),
            why: None,
            response_ms: None,
            checked: None,
            providers: services.registry().resolve(&spec.name, view.now).count(),
            load: None,
            name: spec.name.to_string(),
            kind: spec.kind.as_str().into(),
            objective: spec.objective,
            provider: me.node_id().to_string(),
            provider_peer_id: peer_id_text(&me),
            owner: owner.node_id().to_string(),
            owner_peer_id: peer_id_text(&owner),
            target: None,
            sequence: 0,
            ttl_s: spec.ttl_s,
            allowed: spec.allowed.iter().map(ToString::to_string).collect(),
        }
    }
}
