//! Tunnels as the control API shows and takes them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::types::route_ids;
use crate::engine::overlay::Objective;
use crate::engine::route::ReservationState;
use crate::node::View;

/// `POST /v1/tunnels`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenTunnel {
    /// Name of the service.
    pub service: String,
    /// Local address, port 0 for any.
    pub listen: String,
    /// Node ids of the relays, to fix the path.
    #[serde(default)]
    pub via: Option<Vec<String>>,
    /// What the tunnel wants from its routes, instead of what the service says.
    #[serde(default)]
    pub objective: Option<Objective>,
    /// How many routes it uses at one time, 1 to 4.
    #[serde(default)]
    pub paths: Option<usize>,
    /// Bandwidth to be set aside for it, in each direction (bytes/s).
    #[serde(default)]
    pub reserve: Option<u64>,
}

/// One entry of `GET /v1/tunnels`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tunnel {
    /// Its number.
    pub tunnel: u16,
    /// To what.
    pub service: String,
    /// How that speaks: `tcp`, `http` or `udp`.
    pub kind: String,
    /// What the tunnel wants from its routes.
    pub objective: Objective,
    /// Short id of the provider.
    pub provider: String,
    /// Where it accepts connections; `socks` when the node's proxy opened it.
    pub listen: String,
    /// The route in use.
    pub route: Option<Vec<String>>,
    /// All routes that carry its connections now, that one included.
    pub paths: Vec<Vec<String>>,
    /// How many it may use; fewer are in use while there are no more different ones.
    pub paths_wanted: usize,
    /// How long the route in use has been in use (ms).
    pub moved_ms: Option<f64>,
    /// The route that would replace it.
    pub backup: Option<Vec<String>>,
    /// How often the route changed, the first choice included.
    pub route_changes: u32,
    /// Whether any route to the provider is alive.
    pub reachable: bool,
    /// Connections, or UDP flows, that it has carried since it was opened.
    pub connections: u64,
    /// Those that are open now.
    pub open_connections: u64,
    /// Bytes sent through it.
    pub sent_bytes: u64,
    /// Bytes received through it.
    pub received_bytes: u64,
    /// Bandwidth to be set aside for it, in each direction (bytes/s).
    pub reserved: Option<u64>,
    /// Whether it was: `pending`, `granted` or `refused`.
    pub reservation: Option<String>,
    /// What is wrong with all providers of its service just now, in words: they are down, or do not let
    /// this node in.
    #[serde(default)]
    pub trouble: Option<String>,
    /// Its QUIC connections that are open, one for each of its paths.
    #[serde(default)]
    pub ends: Vec<EndToEnd>,
}

/// How a tunnel's QUIC connection sees its route, from end to end
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EndToEnd {
    /// Number of the tunnel, or of the further path.
    pub tunnel: u16,
    /// Smoothed RTT (ms), queues and processing at both ends included.
    pub rtt_ms: f64,
    /// What the congestion controller lets be under way (bytes).
    pub window_bytes: u64,
    /// Largest packet in use (bytes).
    pub packet_bytes: u16,
    /// Packets sent since the connection was made.
    pub sent_packets: u64,
    /// Those that were taken for lost, without those that tried a larger size.
    pub lost_packets: u64,
    /// How often the congestion controller slowed down, for marks or loss.
    pub slowed: u64,
}

impl Tunnel {
    /// From an open tunnel and the engine's view of it.
    pub fn of(info: &crate::node::TunnelInfo, view: &View<'_>) -> Self {
        let bound: BTreeMap<_, _> = view.engine.tunnels().collect();
        let destination = bound.get(&info.tunnel).copied();
        let strands = info.strands.iter().filter_map(|strand| bound.get(strand));
        let paths = strands.clone().filter_map(|strand| strand.current.as_ref());
        let current = destination.and_then(|d| d.current.as_ref());
        let reservation = destination.and_then(|d| d.reservation);
        Self {
            tunnel: info.tunnel.0,
            service: info.service.to_string(),
            kind: info.kind.as_str().into(),
            objective: destination.map(|d| d.objective).unwrap_or_default(),
            provider: info.provider.node_id().to_string(),
            listen: info.listen.map_or_else(|| "socks".into(), |listen| listen.to_string()),
            route: current.map(|(route, _)| route_ids(route)),
            paths: paths.map(|(route, _)| route_ids(route)).collect(),
            paths_wanted: info.strands.len(),
            moved_ms: current.map(|(_, since)| view.now.since(*since).as_secs_f64() * 1e3),
            backup: destination.and_then(|d| d.backup.as_ref()).map(|b| route_ids(&b.route)),
            route_changes: destination.map_or(0, |d| d.changes),
            reachable: strands.clone().any(|strand| strand.reachable),
            connections: info.connections,
            open_connections: info.open,
            sent_bytes: info.bytes.0,
            received_bytes: info.bytes.1,
            reserved: reservation.map(|reservation| reservation.rate),
            trouble: super::trouble::of_service(&info.service, view),
            ends: info.ends.iter().map(EndToEnd::of).collect(),
            reservation: reservation.map(|reservation| {
                let state = match reservation.state {
                    ReservationState::Pending => "pending",
                    ReservationState::Granted => "granted",
                    ReservationState::Refused(_) => "refused",
                };
                state.into()
            }),
        }
    }
}

impl EndToEnd {
    fn of(end: &crate::node::EndToEnd) -> Self {
        Self {
            tunnel: end.tunnel.0,
            rtt_ms: end.rtt.as_secs_f64() * 1e3,
            window_bytes: end.window,
            packet_bytes: end.packet_bytes,
            sent_packets: end.sent,
            lost_packets: end.lost,
            slowed: end.slowed,
        }
    }
}
