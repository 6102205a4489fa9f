//! What the control API says and takes, as JSON. Units are in the names.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::engine::measure::{LinkQuality, LinkState};
use crate::engine::types::Route;

pub use super::learning::{Learning, MixFigures, WorstMix};
pub use super::network::{
    Certified, Certify, Grant, Granted, Invite, Invited, Member, Members, Network, Revoke, Revoked,
};
pub use super::reach::Reach;
pub use super::reachable::{BootstrapAddress, Reachability, TestedAddress};
pub use super::service::{
    DELEGATION_S_MAX, Delegate, Delegated, Publish, Published, Resolved, Service, Trust, Trusted,
};
pub use super::trace::{Trace, TracedNode};
pub use super::tunnel::{EndToEnd, OpenTunnel, Tunnel};
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
