//! How far away each node of a route is, as JSON. Units are in the names.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::types::route_ids;
use crate::engine::measure::window_statistics::quantile;
use crate::engine::types::Route;

/// `GET /v1/routes/NAME|NODE|PEER/trace`, with `?tunnel=NUMBER` over the route of this one
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Trace {
    /// The route, source first: the one in use, or the one that would be.
    pub route: Vec<String>,
    /// Its nodes, in the order in which datagrams reach them.
    pub nodes: Vec<TracedNode>,
}

/// One node of a route.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TracedNode {
    /// Its node id.
    pub node: String,
    /// Median round trip to it along the route (ms); none when no probe came back.
    pub rtt_ms: Option<f64>,
    /// How much longer that is than to the node before it, which jitter may make less than nothing (ms);
    /// none when one of the two is not known.
    pub link_ms: Option<f64>,
    /// Probes that were sent.
    pub probes: usize,
    /// Those that did not come back.
    pub lost: usize,
}

impl Trace {
    /// `measured` has for each node after the source how many probes were sent, and what those that came
    /// back took.
    pub(super) fn of<'a>(
        route: &Route,
        measured: impl Iterator<Item = (usize, &'a [Duration])>,
    ) -> Self {
        let route = route_ids(route);
        let mut before_ms = Some(0.0);
        let nodes = route.iter().skip(1).zip(measured).map(|(node, (probes, round_trips))| {
            let took_ms: Vec<f64> = round_trips.iter().map(|d| d.as_secs_f64() * 1e3).collect();
            let rtt_ms = quantile(&took_ms, 0.5);
            let link_ms = rtt_ms.zip(before_ms).map(|(here, before)| here - before);
            before_ms = rtt_ms;
            let lost = probes - round_trips.len();
            TracedNode { node: node.clone(), rtt_ms, link_ms, probes, lost }
        });
        Self { nodes: nodes.collect(), route }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::NodeId;

    #[test]
    fn links_are_the_differences_of_what_is_known() {
        let route = Route::new([1, 2, 3, 4, 5].map(|byte| NodeId([byte; 8]))).unwrap();
        let ms = Duration::from_millis;
        let measured = [vec![ms(10), ms(11), ms(90)], vec![ms(31)], vec![], vec![ms(60)]];
        let trace = Trace::of(&route, measured.iter().map(|round_trips| (3, &round_trips[..])));
        let found: Vec<_> = trace.nodes.iter().map(|n| (n.rtt_ms, n.link_ms, n.lost)).collect();
        let expected = [
            (Some(11.0), Some(11.0), 0),
            (Some(31.0), Some(20.0), 2),
            (None, None, 3),
            (Some(60.0), None, 2),
        ];
        assert_eq!(found, expected);
        assert_eq!((trace.route.len(), &trace.nodes[0].node), (5, &trace.route[1]));
    }
}
