//! Where this node's traffic can go, as JSON.

use serde::{Deserialize, Serialize};

use super::types::route_ids;
use crate::engine::types::NodeId;
use crate::node::View;

/// One entry of `GET /v1/routes`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reach {
    /// Short id of a node that is known.
    pub node: String,
    /// The route that a tunnel opened now would take; none while no route is alive.
    pub route: Option<Vec<String>>,
    /// What is forecast for it (ms).
    pub forecast_ms: Option<f64>,
}

impl Reach {
    /// The nodes that are known to have links, this one left out.
    pub(super) fn nodes(view: &mut View<'_>) -> Vec<NodeId> {
        let me = view.engine.me();
        view.engine.graph().origins().map(|(node, _)| node).filter(|node| *node != me).collect()
    }

    /// How traffic would get to a node.
    pub(super) fn look(node: NodeId, view: &mut View<'_>) -> Self {
        let decision = view.engine.explain(node, view.now);
        let chosen = decision.chosen.and_then(|index| decision.candidates.get(index));
        Self {
            node: node.to_string(),
            route: chosen.map(|candidate| route_ids(&candidate.route)),
            forecast_ms: chosen.and_then(|c| Some(c.forecast.best()?.latency_ms)),
        }
    }
}
