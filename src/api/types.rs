//! What the control API says and takes, as JSON. Units are in the names.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::engine::event::ServiceSpec;
use crate::engine::measure::{HealthPolicy, LinkQuality, LinkState};
use crate::engine::overlay::{Load, Objective, ServiceRecord};
use crate::engine::route::ReservationState;
use crate::engine::types::{PublicKey, Route};

pub use super::learning::{Learning, MixFigures, WorstMix};
pub use super::network::{
    Certified, Certify, Grant, Granted, Invite, Invited, Member, Members, Network, Revoke, Revoked,
};
pub use super::reach::Reach;
pub use super::reachable::{BootstrapAddress, Reachability, TestedAddress};
pub use super::trace::{Trace, TracedNode};
use crate::node::{View, peer_id_text};

pub use super::explain::{
    Attribution, Contribution, Counterfactual, DoubtedRelay, Explanation, Outcome, RouteCandidate,
};

/// `GET /v1/status`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Short id.
    pub node: String,
    /// libp2p peer id.
    pub peer_id: String,
    /// Program version.
    pub version: String,
    /// Time since the start (s).
    pub uptime_s: f64,
    /// Whether the mesh's state arrived from a peer.
    pub joined: bool,
    /// How long that took (ms).
    pub join_ms: Option<f64>,
    /// What it belongs to.
    pub network: Network,
    /// Multiaddresses.
    pub listening: Vec<String>,
    /// Where the SOCKS5 proxy listens; none when it is off.
    pub socks: Option<String>,
    /// Connected peers.
    pub peers: usize,
    /// Links that carry traffic.
    pub links_up: usize,
    /// Nodes whose advertisements are known.
    pub nodes_known: usize,
    /// Tunnels of this node.
    pub tunnels: usize,
    /// What decides: a model version or `moving-average`.
    pub model: String,
    /// How well the model in use did on what it was not trained on; `meshwise model show` has the
    /// whole card.
    pub accuracy: Option<Accuracy>,
    /// Why the champion on disk is not in use.
    pub model_error: Option<String>,
    /// Forecasts of the model that failed and were replaced by the moving average.
    pub model_failures: u64,
    /// The life of the models.
    pub learning: Learning,
    /// When the last scheduled training ended (µs since the epoch).
    pub last_training_us: Option<u64>,
    /// What went wrong with it.
    pub last_training_error: Option<String>,
    /// How long route calculations took (µs).
    pub route_calculation_us: Quantiles,
    /// The links, in order of neighbour.
    pub links: Vec<Link>,
    /// What the data plane did.
    pub forwarded: Forwarded,
    /// What was said and heard by gossip and synchronisation.
    #[serde(default)]
    pub control: Control,
    /// Dropped messages and datagrams, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Rows that did not fit the queue to the database.
    pub samples_dropped: u64,
    /// What the database said last when it failed.
    pub store_error: Option<String>,
}

/// Shares of the forecasts that were close to what was measured later, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Of the model.
    pub model: f64,
    /// Of the moving average.
    pub moving_average: f64,
}

/// Median and 99th percentile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Median.
    pub p50: Option<f64>,
    /// 99th percentile.
    pub p99: Option<f64>,
}

/// The sending side of one link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// Node id of the neighbour.
    pub neighbour: String,
    /// How long datagrams waited for their turn in the last 10 to 20 s.
    pub queue_ms: QueueWait,
    /// Datagrams sent since the link is up.
    pub sent: u64,
    /// Datagrams marked because they waited, since the link is up.
    pub marked: u64,
    /// Datagrams dropped because too much waited, since the link is up.
    pub dropped: u64,
    /// What it is expected to carry (bytes/s), pessimistically; the configured reference while
    /// nothing is known.
    pub capacity: Option<f64>,
}

/// Quantiles of the wait in a link's queue (ms); none when nothing was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QueueWait {
    /// Median.
    pub p50: Option<f64>,
    /// 95th percentile.
    pub p95: Option<f64>,
    /// 99th percentile.
    pub p99: Option<f64>,
}

/// What was passed on for others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forwarded {
    /// Datagrams.
    pub datagrams: u64,
    /// Bytes, headers included.
    pub bytes: u64,
}

/// Gossip and synchronisation since the start, without what the libraries and the network add.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    /// Gossip that arrived, without duplicates.
    pub gossip_heard: Told,
    /// Gossip sent, a copy for each receiver.
    pub gossip_said: Told,
    /// Questions and answers of synchronisation that arrived.
    pub sync_heard: Told,
    /// Those sent.
    pub sync_said: Told,
}

/// How much was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// Messages.
    pub messages: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Control {
    fn look(view: &View<'_>) -> Self {
        let told = |(messages, bytes)| Told { messages, bytes };
        let control = view.net.control();
        Self {
            gossip_heard: told(control.gossip_heard.so_far()),
            gossip_said: told(control.gossip_said.so_far()),
            sync_heard: told(control.sync_heard.so_far()),
            sync_said: told(control.sync_said.so_far()),
        }
    }
}

/// One entry of `GET /v1/peers`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Peer {
    /// Short id.
    pub node: String,
    /// libp2p peer id.
    pub peer_id: String,
    /// Where it listens.
    pub addresses: Vec<String>,
    /// `up`, `down`, `new`, or `none` without a link.
    pub link: String,
    /// Its quality.
    pub quality: Option<LinkQuality>,
}

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
    /// Those of them that were taken for lost, and sent again.
    pub lost_packets: u64,
    /// How often the congestion controller slowed down, for marks or loss.
    pub slowed: u64,
}

/// Answer to `POST /v1/peers/NODE/ping`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pinged {
    /// Short id of the node.
    pub node: String,
    /// The route that the probe took there and back.
    pub route: Vec<String>,
    /// How long that took (ms); none when it did not come back in time.
    pub rtt_ms: Option<f64>,
}

/// `POST /v1/model/reload`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reloaded {
    /// Version in use now.
    pub version: Option<String>,
}

/// Any error.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// One line: what, why, what to do.
    pub error: String,
}

pub(super) fn route_ids(route: &Route) -> Vec<String> {
    route.nodes().iter().map(ToString::to_string).collect()
}

impl Status {
    /// From the node's state, and where its proxy listens.
    pub fn of(view: &mut View<'_>, socks: Option<SocketAddr>) -> Self {
        let plane = view.net.plane().counters();
        let (datagrams, bytes) = plane.forwarded();
        let dropped = plane.dropped().into_iter().chain(view.dropped.clone());
        let last_training = view.last_training;
        Self {
            node: view.engine.me().to_string(),
            peer_id: peer_id_text(&view.engine.key()),
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_s: view.now.since(view.started_at).as_secs_f64(),
            joined: view.engine.joined_after().is_some(),
            join_ms: view.engine.joined_after().map(|after| after.as_secs_f64() * 1e3),
            network: Network::look(view),
            listening: view.net.listening(),
            socks: socks.map(|address| address.to_string()),
            peers: view.engine.peers().len(),
            links_up: view.engine.links().filter(|(_, state, _)| *state == LinkState::Up).count(),
            nodes_known: view.engine.graph().origins().count(),
            tunnels: view.net.tunnels().list().len(),
            model: view.engine.predictor().version(),
            accuracy: view.model.map(|(_, card)| Accuracy {
                model: card.model.accuracy,
                moving_average: card.moving_average.accuracy,
            }),
            model_error: view.model_error.cloned(),
            model_failures: view.engine.predictor().failures(),
            learning: Learning::of(view),
            last_training_us: last_training.map(|(at, _)| at.as_micros()),
            last_training_error: last_training.and_then(|(_, result)| result.clone().err()),
            route_calculation_us: Quantiles {
                p50: view.calculations.quantile_us(0.5),
                p99: view.calculations.quantile_us(0.99),
            },
            links: Link::list(view),
            forwarded: Forwarded { datagrams, bytes },
            control: Control::look(view),
            dropped: dropped.map(|(why, count)| (why.to_owned(), count)).collect(),
            samples_dropped: view.writer.dropped(),
            store_error: view.writer.last_error(),
        }
    }
}

impl Link {
    fn list(view: &View<'_>) -> Vec<Self> {
        let capacities: BTreeMap<_, _> = view.engine.capacities().collect();
        let links = view.net.plane().links().into_iter();
        let link = links.map(|(neighbour, counters)| {
            let ms = |wait: std::time::Duration| wait.as_secs_f64() * 1e3;
            let waits = counters.waits;
            Self {
                neighbour: neighbour.to_string(),
                queue_ms: QueueWait {
                    p50: waits.map(|waits| ms(waits.p50)),
                    p95: waits.map(|waits| ms(waits.p95)),
                    p99: waits.map(|waits| ms(waits.p99)),
                },
                sent: counters.sent,
                marked: counters.marked,
                dropped: counters.dropped,
                capacity: capacities.get(&neighbour).copied(),
            }
        });
        link.collect()
    }
}

impl Peer {
    /// All connected peers.
    pub fn list(view: &mut View<'_>) -> Vec<Self> {
        let links: BTreeMap<_, _> =
            view.engine.links().map(|(node, state, quality)| (node, (state, quality))).collect();
        let peers = view.engine.peers().iter();
        let peer = peers.map(|(node, peer)| {
            let link = links.get(node);
            Self {
                node: node.to_string(),
                peer_id: peer_id_text(&peer.key),
                addresses: peer.addresses.clone(),
                link: match link {
                    Some((LinkState::Up, _)) => "up",
                    Some((LinkState::Down, _)) => "down",
                    Some((LinkState::New, _)) => "new",
                    None => "none",
                }
                .into(),
                quality: link.and_then(|(_, quality)| *quality),
            }
        });
        peer.collect()
    }
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
