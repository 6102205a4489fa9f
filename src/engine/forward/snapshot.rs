//! What the data plane forwards by: an immutable picture that the engine replaces as a whole.

use std::collections::BTreeMap;

use crate::engine::types::{NodeId, Route, TunnelId};

/// How the datagrams of one tunnel travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The far end.
    pub destination: NodeId,
    /// The route in use; `None` while there is none.
    pub route: Option<Route>,
    /// Whether any candidate is alive; the route stays as it was when none is.
    pub reachable: bool,
    /// Number of that route.
    pub route_id: u32,
    /// The best route that shares no relay with it.
    pub backup: Option<Route>,
}

/// The tunnels of this node and their routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForwardingSnapshot {
    /// By tunnel.
    pub tunnels: BTreeMap<TunnelId, Binding>,
}
