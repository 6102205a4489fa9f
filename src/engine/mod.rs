//! The control plane as a pure state machine: no async, no sockets, no files, no clock, no
//! operating-system randomness.
//!
//! The call protocol: [`Engine::handle`] takes an [`Input`] with the time at which it happened;
//! then [`Engine::poll_output`] is called until it returns `None`; [`Engine::next_timeout`] says
//! when [`Engine::handle_timeout`] wants to be called. Time never goes back. Given the same
//! inputs, times and seed, the outputs are the same.
//!
//! This file dispatches. What to do is decided by the policies: [`measure`] says how good a link
//! is and when to probe, [`predict`] forecasts, [`route`] chooses, [`forward`] passes datagrams
//! on, [`overlay`] joins, advertises and keeps the registry.

#![deny(clippy::disallowed_types, clippy::disallowed_methods)]

mod admission;
mod deciding;
pub mod event;
mod failover;
pub mod forward;
mod inspect;
mod joining;
mod lookups;
pub mod measure;
pub mod overlay;
mod pinging;
pub mod predict;
mod probing;
pub mod route;
mod services;
mod settling;
mod shaping;
pub mod traffic;
pub mod types;
mod watching;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::SigningKey;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use deciding::Deciding;
use event::{Answer, Command, Input, Notice, Output};
use failover::RouteTotals;
use forward::ForwardingSnapshot;
use measure::churn::ChurnDetector;
use measure::prober::Prober;
use measure::{Honesty, LinkHistories, QualityMonitor, RouteHistories, Sample, Suspects};
use overlay::reunion::Reunion;
use overlay::topology::TopologyManager;
use overlay::wire::Signed;
use overlay::{
    Advertiser, Author, BootstrapPolicy, CheckedSignatures, GossipManager, Issuer, Membership,
    NetworkBootstrapper, NetworkState, Pin,
};
use predict::{KnownChoice, QualityModel, RoutePredictor};
use route::{IntelligentRouter, OverlayGraph, PathPolicy};
use services::Services;
use types::{NodeId, PublicKey, Timestamp};
pub use watching::ProviderHealth;

/// How often expired advertisements and records are looked for.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(5);
/// How often a node asks one of its peers for what it may have missed, give or take half of it: gossip
/// goes over connections that lose nothing, so that this repairs what a full queue or a broken
/// connection cost. A guess.
pub const RESYNC: Duration = Duration::from_secs(120);
/// Most connected peers that the engine keeps track of.
pub const PEERS_MAX: usize = 512;

/// Links that a node wants to have, unless said otherwise.
pub const DEGREE: usize = 8;

/// How often to measure and decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intervals {
    /// Between two probes of a link.
    pub link_probe: Duration,
    /// Between two probes of a route in use.
    pub active_probe: Duration,
    /// Between two probes of a route that might be used.
    pub candidate_probe: Duration,
    /// Between two decisions about a tunnel.
    pub decide: Duration,
}

impl Default for Intervals {
    fn default() -> Self {
        Self {
            link_probe: Duration::from_secs(1),
            active_probe: Duration::from_millis(250),
            candidate_probe: Duration::from_secs(1),
            decide: Duration::from_secs(2),
        }
    }
}

/// What an engine is made with.
#[derive(Clone)]
pub struct EngineConfig {
    /// This node's identity.
    pub key: SigningKey,
    /// The network that it belongs to.
    pub network: NetworkState,
    /// The root key of the network, on the node that issues credentials.
    pub root: Option<SigningKey>,
    /// To whom names belong, as far as it was seen before.
    pub pins: Vec<Pin>,
    /// How to join.
    pub bootstrap: BootstrapPolicy,
    /// How routes are found and chosen.
    pub paths: PathPolicy,
    /// How often to measure and decide.
    pub intervals: Intervals,
    /// Links that this node wants to have; more while the mesh is restless.
    pub degree: usize,
    /// Whether a trained model may decide; otherwise the moving average does.
    pub prediction: bool,
    /// Seed of all randomness.
    pub seed: u64,
    /// What the other nodes of a simulated world have checked already; `None` in a real node.
    pub checked: Option<Arc<CheckedSignatures>>,
    /// Whether the histories of links begin with the first tunnel, and not with the node. A node
    /// without tunnels needs none, but the forecasts of its first one are worse for a while; in a
    /// simulated world of a thousand nodes they are most of the memory.
    pub late_histories: bool,
}

impl EngineConfig {
    /// A member of a network with the defaults of everything else, that knows nobody to join through.
    pub fn new(key: SigningKey, network: NetworkState) -> Self {
        Self {
            key,
            network,
            root: None,
            pins: Vec::new(),
            bootstrap: BootstrapPolicy::default(),
            paths: PathPolicy::default(),
            intervals: Intervals::default(),
            degree: DEGREE,
            prediction: true,
            seed: 0,
            checked: None,
            late_histories: false,
        }
    }
}

/// A connected peer.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its identity.
    pub key: PublicKey,
    /// Where it listens, as multiaddress text.
    pub addresses: Vec<String>,
    /// When it connected.
    pub since: Timestamp,
}

/// The state machine. See the module documentation for the call protocol.
pub struct Engine {
    config: EngineConfig,
    me: NodeId,
    author: Author,
    membership: Membership,
    issuer: Option<Issuer>,
    /// Not before is a new credential asked for again.
    renew_at: Timestamp,
    random: Pcg64Mcg,
    started_at: Timestamp,
    last_stamp: Timestamp,
    joined_at: Option<Timestamp>,
    peers: BTreeMap<NodeId, Peer>,
    bootstrapper: NetworkBootstrapper,
    topology: TopologyManager,
    churn: ChurnDetector,
    reunion: Reunion,
    /// Connected peers without a link.
    unlinked: BTreeSet<NodeId>,
    /// Peers of which it is not known yet whether they link too.
    pending: BTreeSet<NodeId>,
    links: QualityMonitor,
    advertised: LinkHistories,
    /// Whether those are kept.
    keeps_histories: bool,
    histories: RouteHistories,
    honesty: Honesty,
    suspects: Suspects,
    prober: Prober,
    pings: pinging::Pings,
    gossip: GossipManager,
    advertiser: Advertiser,
    /// When the next advertisement is due, and for which revision of the links that holds.
    advertise_at: (u64, Option<Timestamp>),
    graph: OverlayGraph,
    advertisements: BTreeMap<NodeId, Arc<Signed>>,
    services: Services,
    predictor: RoutePredictor,
    router: IntelligentRouter,
    snapshot: Arc<ForwardingSnapshot>,
    deciding: Deciding,
    totals: RouteTotals,
    expire_at: Timestamp,
    /// When a peer is asked what this node may have missed.
    resync_at: Timestamp,
    /// Peers whose gossip was dropped unread since one was asked.
    flooders: BTreeSet<NodeId>,
    /// Links, tunnels or candidates changed: what is probed has to follow.
    aim: bool,
    /// What must be kept of the network changed.
    keep: bool,
    outputs: VecDeque<Output>,
}

impl Engine {
    /// An engine that starts at `now`.
    pub fn new(mut config: EngineConfig, now: Timestamp) -> Self {
        let network = &config.network;
        let author = Author { key: config.key.clone(), credential: network.credential.clone() };
        let me = author.public().node_id();
        let membership = network.membership().sharing(config.checked.clone());
        let mut services = Services::new(author.clone(), config.pins.clone(), config.seed);
        for signed in &network.grants {
            if let Ok(grant) = membership.open_of_root(signed) {
                // Nothing is published yet that it could concern.
                services.grant(grant, signed.clone(), now, &mut VecDeque::new());
            }
        }
        let issuer = config.root.clone().map(|root| Issuer::new(root, network.ledger.clone()));
        let mut random = Pcg64Mcg::seed_from_u64(config.seed);
        let mut bootstrap = std::mem::take(&mut config.bootstrap);
        let roster = membership.roster();
        bootstrap.known.retain(|known| !roster.is_revoked(&known.peer.key));
        Self {
            me,
            author,
            membership,
            issuer,
            renew_at: now,
            prober: Prober::new(random.random()),
            pings: pinging::Pings::default(),
            random,
            started_at: now,
            last_stamp: now,
            joined_at: None,
            peers: BTreeMap::new(),
            bootstrapper: NetworkBootstrapper::new(bootstrap, now),
            topology: TopologyManager::default(),
            churn: ChurnDetector::default(),
            reunion: Reunion::default(),
            unlinked: BTreeSet::new(),
            pending: BTreeSet::new(),
            links: QualityMonitor::default(),
            advertised: LinkHistories::default(),
            keeps_histories: !config.late_histories,
            histories: RouteHistories::default(),
            honesty: Honesty::default(),
            suspects: Suspects::default(),
            gossip: GossipManager::default(),
            advertiser: Advertiser::default(),
            advertise_at: (0, None),
            graph: OverlayGraph::default(),
            advertisements: BTreeMap::new(),
            services,
            predictor: RoutePredictor::new(config.prediction),
            router: IntelligentRouter::new(me, config.paths, config.seed),
            snapshot: Arc::default(),
            deciding: Deciding::default(),
            totals: RouteTotals::default(),
            expire_at: now + EXPIRY_INTERVAL,
            resync_at: now + RESYNC,
            flooders: BTreeSet::new(),
            aim: false,
            keep: false,
            outputs: VecDeque::new(),
            config,
        }
    }

    /// Learns how to compare routes from choices of an earlier life, in order of time.
    pub fn remember(&mut self, choices: &[KnownChoice]) {
        self.predictor.comparing_mut().remember(choices);
    }

    /// Takes what happened at `now`.
    pub fn handle(&mut self, now: Timestamp, input: Input) {
        match input {
            Input::PeerConnected(key) => self.peer_connected(key, now),
            Input::PeerDisconnected(node) => self.peer_disconnected(node, now),
            Input::PeerHeardOf(peer) => self.peer_heard_of(&peer, now),
            Input::LinkUp(node) => self.link_up(node),
            Input::LinkDown(node) => self.link_down(node, now),
            Input::SyncRequested { token, from, bytes } => {
                self.sync_requested(token, from, &bytes, now);
            }
            Input::SyncReceived { from, bytes } => self.sync_received(from, &bytes, now),
            Input::JoinAsked { token, from, bytes } => {
                let bytes = self.join_asked(&from, &bytes, now);
                self.outputs.push_back(Output::JoinAnswer { token, bytes });
            }
            Input::RenewalReceived { from, bytes } => self.renewal_received(from, &bytes, now),
            Input::RevocationShown(signed) => drop(self.revocation_received(&signed, now)),
            Input::Gossip { token, from, bytes } => self.gossip_received(token, from, &bytes, now),
            Input::ProbeAnswered { id, rtt_us } => self.probe_answered(id, rtt_us, now),
            Input::Slice(reports) => {
                for (neighbour, report) in reports {
                    self.links.report(neighbour, &report);
                    let at = self.stamp(now);
                    self.record(Sample::Slice { at, neighbour, report });
                }
                // What the links can carry has changed, and others' reservations depend on it.
                self.aim = true;
            }
            Input::RouteSilent { tunnel, route_id } => self.route_lost(tunnel, route_id, None, now),
            Input::RouteBroken { tunnel, route_id, at } => {
                self.route_lost(tunnel, route_id, Some(at), now);
            }
            Input::ReserveAnswered { tunnel, route_id, result } => {
                if self.router.reserve_answered(tunnel, route_id, result) {
                    self.deciding.by(tunnel, now);
                }
            }
            Input::Routes(reports) => self.routes_reported(reports, now),
            Input::DhtStored { request, error } => {
                self.services.stored(request, error, now, &mut self.outputs);
            }
            Input::DhtFound { request, records } => {
                let membership = &mut self.membership;
                let (graph, outputs) = (&self.graph, &mut self.outputs);
                self.services.found(request, &records, membership, graph, now, outputs);
            }
            Input::ServiceChecked { id, result } => self.service_checked(id, result, now),
            Input::ServiceDoubted { name, provider } => {
                self.service_doubted(&name, provider, now);
            }
            Input::Usage(usage) => self.usage(&usage, now),
            Input::Model(model) => self.set_model(model, now),
            Input::Challenger(model) => self.predictor.set_challenger(model),
            Input::Command(command) => self.command(command, now),
        }
        self.settle(now);
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        for (id, lost) in self.prober.take_lost(now) {
            self.pinged(id, None);
            self.probe_completed(lost.kind, lost.route, lost.sent_at, None, now);
        }
        for (kind, route) in self.prober.take_due(now) {
            self.send_probe(kind, route, now);
        }
        if self.bootstrapper.next_timeout().is_some_and(|at| at <= now) {
            self.bootstrap(now);
        }
        if self.topology.next_timeout().is_some_and(|at| at <= now) {
            self.shape(now);
        }
        if self.reunion.next_timeout().is_some_and(|at| at <= now) {
            self.reunite(now);
        }
        self.release_held(now);
        if self.resync_at <= now {
            self.resync(now);
        }
        if self.expire_at <= now {
            self.expire_at = now + EXPIRY_INTERVAL;
            self.judge_all(now);
            self.renew_if_due(now);
            let changes = self.graph.expire(self.me, now);
            self.links_changed(changes, now);
            // Doubts fade.
            self.suspects.expire(now);
            self.doubt_relays(now);
            let graph = &self.graph;
            self.advertisements.retain(|origin, _| graph.is_origin(*origin));
            self.services.expire(now, &mut self.outputs);
            if self.router.tunnels().next().is_some() {
                self.look_at_links(now);
            }
        }
        self.watch_services(now);
        self.services.handle_timeout(&mut self.membership, now, &mut self.outputs);
        self.settle(now);
    }

    /// When [`Engine::handle_timeout`] wants to be called next.
    pub fn next_timeout(&self, now: Timestamp) -> Timestamp {
        [
            self.prober.next_timeout(),
            self.bootstrapper.next_timeout(),
            self.topology.next_timeout(),
            self.reunion.next_timeout(),
            self.advertise_at.1.map(|at| at.max(now)),
            self.gossip.next_timeout(),
            self.services.next_timeout(),
            self.services.watch_at(),
            self.deciding.next_timeout(),
        ]
        .into_iter()
        .flatten()
        .fold(self.expire_at.min(self.resync_at), Timestamp::min)
    }

    /// The next thing to do, in order.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    // --- commands ------------------------------------------------------------------------------

    fn set_model(&mut self, model: Option<Arc<dyn QualityModel>>, now: Timestamp) {
        self.predictor.set_model(model);
        self.decide_all(now);
    }

    fn command(&mut self, command: Command, now: Timestamp) {
        match command {
            Command::Publish { request, service } => {
                let membership = &mut self.membership;
                self.services.publish(request, service, membership, now, &mut self.outputs);
            }
            Command::Withdraw { request, name } => {
                let membership = &mut self.membership;
                self.services.withdraw(request, &name, membership, now, &mut self.outputs);
            }
            Command::Resolve { request, name, from_dht } => {
                let (graph, outputs) = (&self.graph, &mut self.outputs);
                self.services.resolve(request, name, from_dht, graph, now, outputs);
            }
            Command::Ping { request, node } => self.ping(request, node, now),
            Command::Invite { request, secret, uses, lifetime } => {
                self.invite(request, &secret, uses, lifetime, now);
            }
            Command::Certify { request, key } => self.certify(request, &key, now),
            Command::Revoke { request, key } => self.revoke(request, &key, now),
            Command::Grant { request, name, owner } => self.grant(request, &name, &owner, now),
            Command::Delegate { request, name, provider, lifetime } => {
                let answer = self.services.delegate(&name, &provider, lifetime, now);
                let answer = answer.map(Answer::Delegated);
                self.outputs.push_back(Output::Answer { request, answer });
            }
            Command::Trust { request, name, owner } => {
                self.services.trust(request, &name, &owner, now, &mut self.outputs);
            }
            Command::OpenTunnel { tunnel, destination, forced, objective, beside, reserve } => {
                self.begin_histories(now);
                self.look_at_links(now);
                if self.router.open(tunnel, destination, forced, objective, beside) {
                    if let Some(rate) = reserve {
                        self.router.reserve(tunnel, rate);
                    }
                    self.deciding.open(tunnel, now);
                } else {
                    self.dropped("tunnel", "too many are open".into());
                }
            }
            Command::CloseTunnel(tunnel) => {
                self.router.close(tunnel);
                self.deciding.close(tunnel);
                self.close_totals(tunnel, now);
                self.aim = true;
            }
        }
    }

    // --- for all handlers ---------------------------------------------------------------------

    /// The time of an observation: `now`, but never the same twice.
    fn stamp(&mut self, now: Timestamp) -> Timestamp {
        self.last_stamp = now.max(Timestamp(self.last_stamp.0 + 1));
        self.last_stamp
    }

    fn record(&mut self, sample: Sample) {
        self.outputs.push_back(Output::Record(sample));
    }

    fn notice(&mut self, notice: Notice) {
        self.outputs.push_back(Output::Notice(notice));
    }

    fn dropped(&mut self, what: &'static str, why: String) {
        self.notice(Notice::Dropped { what, why });
    }
}
