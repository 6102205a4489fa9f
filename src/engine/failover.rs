//! What the data plane says of routes in use: that one is lost, and what traffic met on each.

use super::Engine;
use super::event::Notice;
use super::measure::{RouteReport, Sample};
use super::types::{Timestamp, TunnelId};

impl Engine {
    /// A route of a tunnel no longer answers, because node `at` of it said so or by its silence:
    /// the tunnel is decided at once. What is said of a route that was left already has no effect.
    pub(super) fn route_lost(
        &mut self,
        tunnel: TunnelId,
        route_id: u32,
        at: Option<usize>,
        now: Timestamp,
    ) {
        let used = self.router.tunnel(tunnel).filter(|used| used.route_id == route_id);
        let Some((route, _)) = used.and_then(|used| used.current.clone()) else { return };
        self.histories.silenced(&route, now);
        let at = at.and_then(|index| route.nodes().get(index).copied());
        self.notice(Notice::RouteLost { tunnel, at });
        self.decide_at = now;
    }

    pub(super) fn routes_reported(
        &mut self,
        reports: Vec<(TunnelId, RouteReport)>,
        now: Timestamp,
    ) {
        for (tunnel, report) in reports {
            let at = self.stamp(now);
            self.record(Sample::RouteSlice { at, tunnel, report });
        }
    }
}
