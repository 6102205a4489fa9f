//! What the data plane forwards by: an immutable picture that the engine replaces as a whole.

use std::collections::{BTreeMap, BTreeSet};

use crate::engine::types::{NodeId, Route, TunnelId};

/// A route to move to as soon as the one in use is lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// The route.
    pub route: Route,
    /// Its number: higher than that of the route in use, and no other route's.
    pub route_id: u32,
}

/// How the datagrams of one tunnel travel.
#[derive(Clone, Debug, PartialEq)]
pub struct Binding {
    /// The far end.
    pub destination: NodeId,
    /// The route in use; `None` while there is none.
    pub route: Option<Route>,
    /// Whether any candidate is alive; the route stays as it was when none is.
    pub reachable: bool,
    /// Number of that route.
    pub route_id: u32,
    /// A route that shares no relay with it and is alive; none for a path that is fixed.
    pub backup: Option<Backup>,
    /// Whether small packets travel over the backup too.
    pub copies: bool,
    /// What is left on the fullest link of the route (bytes/s); `None` when unknown.
    pub capacity: Option<f64>,
    /// What every node of the route is to set aside for the tunnel, in both directions (bytes/s).
    pub reserved: Option<u64>,
}

/// The tunnels of this node and their routes, and its links.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ForwardingSnapshot {
    /// By tunnel.
    pub tunnels: BTreeMap<TunnelId, Binding>,
    /// Neighbours that are connected and silent.
    pub down: BTreeSet<NodeId>,
    /// Connected peers that no link is kept to.
    pub unlinked: BTreeSet<NodeId>,
    /// What the link to a neighbour is expected to carry (bytes/s), pessimistically.
    pub capacity: BTreeMap<NodeId, f64>,
}
