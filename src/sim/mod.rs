//! The other driver of the same engine: virtual time, one seed, modelled links.
//!
//! A [`World`] holds engines and carries out their outputs over links with delay, jitter, loss and,
//! where one is given, a rate. Tunnels that are told to send do so datagram by datagram, through data
//! planes that decide as those of real nodes do. Nothing here waits: an hour of a ten-node network
//! takes about a second. The same seed gives the same world to the last byte.
//!
//! After every event the world checks what must always hold, see [`World::breaches`].

#![deny(clippy::disallowed_types, clippy::disallowed_methods)]

mod agenda;
mod check;
mod connections;
mod control;
mod dht;
mod gossip;
mod plane;
mod reserving;
mod space;
mod targets;
mod traffic;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::SigningKey;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use crate::engine::event::{Answer, Command, CommandError, Input, Notice, Output, RequestId};
use crate::engine::forward::ForwardingSnapshot;
use crate::engine::measure::Sample;
use crate::engine::overlay::{
    Author, BootstrapPolicy, CheckedSignatures, Credential, NetworkState,
};
use crate::engine::route::graph::Topology;
use crate::engine::route::{Decision, PathPolicy};
use crate::engine::types::{NodeId, PublicKey, Route, ServiceName, Timestamp, TunnelId};
use crate::engine::{Engine, EngineConfig, Intervals};
use agenda::Agenda;
pub use control::{Control, Told};
use dht::Held;
use gossip::Gossip;
use plane::{Datagram, Plane};
pub use space::{CONNECTION_TIMEOUT, Space};
use traffic::Queue;
pub use traffic::{Traffic, Travelled};
pub use walk::Fate;

/// How a link behaves, in each direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkModel {
    /// One-way delay (ms).
    pub delay_ms: f64,
    /// Largest deviation from it (ms), uniform on both sides.
    pub jitter_ms: f64,
    /// Share of datagrams lost, 0 to 1.
    pub loss: f64,
    /// What each direction carries (bytes/s); without a limit when `None`. Probes do not queue.
    pub rate: Option<f64>,
}

impl LinkModel {
    /// A link with this one-way delay, without jitter or loss.
    pub fn delay(delay_ms: f64) -> Self {
        Self { delay_ms, jitter_ms: 0.0, loss: 0.0, rate: None }
    }
}

/// Root key of the world's network, which node 0 holds.
const ROOT_SECRET: [u8; 32] = [255; 32];
/// Delay of control messages on a connection (ms one way), when no link model says otherwise.
const CONTROL_DELAY_MS: f64 = 5.0;
/// Time that a DHT operation takes (ms).
const DHT_DELAY_MS: f64 = 40.0;

enum Event {
    Input(usize, Box<Input>),
    Wake(usize),
    Gossip { from: usize, to: usize, number: u64 },
    Datagram(Box<Datagram>),
    Send(usize, TunnelId, u32),
    Watch(usize),
    Slice,
    Lost(usize, usize),
}

/// What an answer of an engine belongs to.
enum Token {
    /// A question of this node.
    Sync(usize),
    /// This message, at this node.
    Gossip { number: u64, at: usize },
}

struct Node {
    config: EngineConfig,
    /// `None` while the node is not running.
    engine: Option<Box<Engine>>,
    connected: BTreeSet<usize>,
    /// How far its clock is ahead of the world's (µs).
    ahead_us: i64,
    /// With whom it was connected when it stopped.
    remembered: Vec<usize>,
    /// What it holds for the DHT.
    held: Held,
    wake_at: Timestamp,
    plane: Plane,
    forwarding: Arc<ForwardingSnapshot>,
    /// What it observed.
    samples: Vec<Sample>,
    decisions: Vec<Decision>,
    answers: BTreeMap<RequestId, Result<Answer, CommandError>>,
    /// What it dropped and why, and how often.
    dropped: BTreeMap<(&'static str, String), u64>,
}

impl Node {
    /// The time as this node has it, when it is `now`.
    fn clock(&self, now: Timestamp) -> Timestamp {
        Timestamp(now.0.saturating_add_signed(self.ahead_us))
    }
}

/// A simulated network.
pub struct World {
    now: Timestamp,
    random: Pcg64Mcg,
    nodes: Vec<Node>,
    by_id: BTreeMap<NodeId, usize>,
    keys: Vec<PublicKey>,
    links: BTreeMap<(usize, usize), LinkModel>,
    droppers: BTreeMap<usize, f64>,
    queues: BTreeMap<(usize, usize), Queue>,
    sliced: bool,
    agenda: Agenda<Event>,
    gossip: Gossip,
    control: Control,
    tokens: BTreeMap<u64, Token>,
    next_token: u64,
    space: Option<Space>,
    /// Nodes that are cut off from all others.
    cut_off: BTreeSet<usize>,
    /// Nodes and services whose targets refuse connections.
    broken: BTreeSet<(usize, ServiceName)>,
    /// Providers and services, and users that they refuse.
    refused: BTreeSet<(usize, ServiceName, usize)>,
    checked: Arc<CheckedSignatures>,
    lean: bool,
    breaches: Vec<String>,
}

impl World {
    /// An empty world that begins at `start`.
    pub fn new(seed: u64, start: Timestamp) -> Self {
        Self {
            now: start,
            random: Pcg64Mcg::seed_from_u64(seed),
            nodes: Vec::new(),
            by_id: BTreeMap::new(),
            keys: Vec::new(),
            links: BTreeMap::new(),
            droppers: BTreeMap::new(),
            queues: BTreeMap::new(),
            sliced: false,
            agenda: Agenda::default(),
            gossip: Gossip::default(),
            control: Control::default(),
            tokens: BTreeMap::new(),
            next_token: 0,
            space: None,
            cut_off: BTreeSet::new(),
            broken: BTreeSet::new(),
            refused: BTreeSet::new(),
            checked: Arc::default(),
            lean: false,
            breaches: Vec::new(),
        }
    }

    /// For a thousand nodes: samples and decisions are not kept from now on, and nodes that are added
    /// keep histories of links only from their first tunnel on.
    pub fn stay_lean(&mut self) {
        self.lean = true;
    }

    /// Adds a node that bootstraps from these nodes, and returns its index.
    pub fn add_node(
        &mut self,
        bootstrap: &[usize],
        paths: PathPolicy,
        intervals: Intervals,
    ) -> usize {
        let index = self.nodes.len();
        let mut secret = [0; 32];
        secret[..8].copy_from_slice(&(index as u64 + 1).to_le_bytes());
        let key = SigningKey::from_bytes(&secret);
        let public = PublicKey(key.verifying_key().to_bytes());
        let addresses = bootstrap.iter().map(|index| address(*index)).collect();
        let root_key = SigningKey::from_bytes(&ROOT_SECRET);
        let credential = Credential::issue(&root_key, &public, Timestamp(0), Timestamp(u64::MAX));
        let root = PublicKey(root_key.verifying_key().to_bytes());
        let config = EngineConfig {
            root: (index == 0).then_some(root_key),
            bootstrap: BootstrapPolicy { addresses, ..BootstrapPolicy::default() },
            paths,
            intervals,
            checked: Some(self.checked.clone()),
            late_histories: self.lean,
            ..EngineConfig::new(key, NetworkState::joined("world", root, root, credential))
        };
        self.nodes.push(Node {
            config,
            engine: None,
            connected: BTreeSet::new(),
            ahead_us: 0,
            remembered: Vec::new(),
            held: Held::new(),
            wake_at: self.now,
            plane: Plane::default(),
            forwarding: Arc::default(),
            samples: Vec::new(),
            decisions: Vec::new(),
            answers: BTreeMap::new(),
            dropped: BTreeMap::new(),
        });
        self.by_id.insert(public.node_id(), index);
        self.keys.push(public);
        self.start(index);
        index
    }

    /// Starts a node that is not running; it remembers nothing but its identity and where to join.
    pub fn start(&mut self, index: usize) {
        self.start_from(index, &[]);
    }

    /// Starts a node that is not running and remembers with whom it was connected when it stopped, as
    /// a real node does.
    pub fn restart(&mut self, index: usize) {
        let remembered = std::mem::take(&mut self.nodes[index].remembered);
        self.start_from(index, &remembered);
    }

    fn start_from(&mut self, index: usize, remembered: &[usize]) {
        let seed = self.random.random();
        if self.is_running(index) {
            return;
        }
        for peer in self.nodes[index].connected.clone() {
            self.close(index, peer);
        }
        let node = &mut self.nodes[index];
        let mut config = EngineConfig { seed, ..node.config.clone() };
        config.bootstrap.addresses.extend(remembered.iter().map(|peer| address(*peer)));
        node.engine = Some(Box::new(Engine::new(config, node.clock(self.now))));
        node.wake_at = self.now;
        self.plan(self.now, Event::Wake(index));
    }

    /// Starts a node again, with a clock that is so far ahead of the world's (µs), or behind it.
    pub fn set_clock(&mut self, index: usize, ahead_us: i64) {
        self.kill(index);
        self.nodes[index].ahead_us = ahead_us;
        self.start(index);
    }

    /// Whether a node is running.
    pub fn is_running(&self, index: usize) -> bool {
        self.nodes[index].engine.is_some()
    }

    /// Whether two nodes are connected.
    pub fn is_connected(&self, a: usize, b: usize) -> bool {
        self.nodes[a].connected.contains(&b)
    }

    /// Whether something that one node sends to another arrives there: they are connected, both are
    /// running, and they are not cut apart.
    pub fn carries(&self, a: usize, b: usize) -> bool {
        let running = self.is_running(a) && self.is_running(b);
        running && self.is_connected(a, b) && !self.is_parted(a, b)
    }

    /// Sets how the link between two nodes behaves. Nodes without a link cannot connect, unless
    /// [`World::lay_out`] was called.
    pub fn set_link(&mut self, a: usize, b: usize, model: LinkModel) {
        self.links.insert((a.min(b), a.max(b)), model);
        if model.rate.is_some() {
            self.begin_slices();
        }
    }

    /// Stops a node: its neighbours see their connections close.
    pub fn kill(&mut self, index: usize) {
        self.stop(index);
        for peer in self.nodes[index].connected.clone() {
            self.close(index, peer);
        }
    }

    fn stop(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        (node.engine, node.plane, node.forwarding, node.held) = Default::default();
        node.remembered = node.connected.iter().copied().collect();
        self.gossip_stops(index);
    }

    /// The virtual time.
    pub fn now(&self) -> Timestamp {
        self.now
    }

    /// Id of a node.
    pub fn id(&self, index: usize) -> NodeId {
        self.keys[index].node_id()
    }

    /// The route over these nodes.
    ///
    /// # Panics
    /// When they form none.
    pub fn route(&self, indices: &[usize]) -> Route {
        let nodes: Vec<NodeId> = indices.iter().map(|index| self.id(*index)).collect();
        Route::new(nodes).expect("the caller names 2 to 9 different nodes")
    }

    /// What a node signs with, for those that sign what their engine would not.
    pub fn author(&self, index: usize) -> Author {
        let EngineConfig { key, network, .. } = &self.nodes[index].config;
        Author { key: key.clone(), credential: network.credential.clone() }
    }

    /// The engine of a node.
    ///
    /// # Panics
    /// When the node is not running.
    pub fn engine(&self, index: usize) -> &Engine {
        self.nodes[index].engine.as_ref().expect("the caller names a node that is running")
    }

    /// The route that a running node would take to another one now, by all that decides; `None` when it has
    /// none, or does not run.
    pub fn would_take(&mut self, index: usize, to: usize) -> Option<Route> {
        let (to, now) = (self.id(to), self.now);
        let decision = self.nodes[index].engine.as_mut()?.explain(to, now);
        let mut candidates = decision.candidates;
        Some(candidates.swap_remove(decision.chosen?).route)
    }

    /// The links of the mesh as a node sees them.
    ///
    /// # Panics
    /// When the node is not running.
    pub fn topology(&mut self, index: usize) -> Arc<Topology> {
        let engine = self.nodes[index].engine.as_mut();
        engine.expect("the caller names a node that is running").topology()
    }

    /// What a node observed so far.
    pub fn samples(&self, index: usize) -> &[Sample] {
        &self.nodes[index].samples
    }

    /// What a node decided so far.
    pub fn decisions(&self, index: usize) -> &[Decision] {
        &self.nodes[index].decisions
    }

    /// What a node dropped and why, and how often; nothing in a world that stays lean.
    pub fn dropped(&self, index: usize) -> &BTreeMap<(&'static str, String), u64> {
        &self.nodes[index].dropped
    }

    /// By what a node forwards now.
    pub fn forwarding(&self, index: usize) -> &ForwardingSnapshot {
        &self.nodes[index].forwarding
    }

    /// The answer to a command.
    pub fn answer(
        &self,
        index: usize,
        request: RequestId,
    ) -> Option<&Result<Answer, CommandError>> {
        self.nodes[index].answers.get(&request)
    }

    /// Hands a command to a node.
    pub fn command(&mut self, index: usize, command: Command) {
        self.input(index, Input::Command(command));
    }

    /// Hands an input to a node, now; nothing happens when it is not running.
    pub fn input(&mut self, index: usize, input: Input) {
        let now = self.nodes[index].clock(self.now);
        if let Some(engine) = &mut self.nodes[index].engine {
            engine.handle(now, input);
            self.drain(index);
        }
    }

    /// A node asks another one for what it knows, whatever its engine thinks of it.
    pub fn ask_sync(&mut self, from: usize, of: usize, bytes: Vec<u8>) {
        let token = self.draw_token(Token::Sync(from));
        let from = self.id(from);
        self.input(of, Input::SyncRequested { token, from, bytes });
    }

    /// Lets time pass.
    pub fn run_for(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some((at, event)) = self.agenda.next_until(end) {
            self.now = at;
            self.happen(event);
        }
        self.now = end;
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Input(index, input) => match *input {
                // The connection that it tells of is gone again.
                Input::PeerConnected(key) if !self.is_there(index, key.node_id()) => {}
                Input::LinkUp(node) if !self.is_there(index, node) => {}
                Input::LinkUp(node) if self.is_given_up(index, self.by_id[&node]) => {}
                input => self.input(index, input),
            },
            Event::Wake(index) => {
                let node = &mut self.nodes[index];
                let now = node.clock(self.now);
                if let Some(engine) = &mut node.engine
                    && node.wake_at <= self.now
                {
                    engine.handle_timeout(now);
                    self.drain(index);
                }
            }
            Event::Gossip { from, to, number } => self.gossip_arrived(from, to, number),
            Event::Datagram(datagram) => self.received(datagram),
            Event::Send(index, tunnel, turn) => self.send_next(index, tunnel, turn),
            Event::Watch(index) => self.watch(index),
            Event::Slice => self.slice_over(),
            Event::Lost(a, b) => self.connection_lost(a, b),
        }
    }

    fn drain(&mut self, index: usize) {
        while let Some(output) = self.nodes[index].engine.as_mut().and_then(|e| e.poll_output()) {
            self.carry_out(index, output);
        }
        let node = &mut self.nodes[index];
        let Some(engine) = &node.engine else { return };
        let now = node.clock(self.now);
        let wake_at = self.now + engine.next_timeout(now).since(now);
        if node.wake_at != wake_at || wake_at == self.now {
            node.wake_at = wake_at;
            // A microsecond at least, so that a wish to be called at once cannot stop time.
            self.plan(wake_at.max(self.now + Duration::from_micros(1)), Event::Wake(index));
        }
    }

    fn draw_token(&mut self, token: Token) -> u64 {
        self.next_token += 1;
        self.tokens.insert(self.next_token, token);
        self.next_token
    }

    fn carry_out(&mut self, index: usize, output: Output) {
        match output {
            Output::Dial(addresses) => addresses.iter().for_each(|text| self.dial(index, text)),
            Output::RequestSync { node, bytes } => {
                let Some(&peer) = self.by_id.get(&node) else { return };
                let token = self.draw_token(Token::Sync(index));
                self.count_sync(&bytes);
                let from = self.id(index);
                self.tell(index, peer, Input::SyncRequested { token, from, bytes });
            }
            Output::SyncRefused { token } => drop(self.tokens.remove(&token)),
            Output::SyncResponse { token, bytes } => {
                if let Some(Token::Sync(asker)) = self.tokens.remove(&token) {
                    self.count_sync(&bytes);
                    let from = self.id(index);
                    self.tell(index, asker, Input::SyncReceived { from, bytes });
                }
            }
            Output::Publish(bytes) => self.gossip(index, bytes),
            Output::GossipVerdict { token, verdict } => {
                if let Some(Token::Gossip { number, at }) = self.tokens.remove(&token) {
                    self.judged(at, number, verdict);
                }
            }
            Output::SendProbe { id, route } => {
                let there = self.traverse(&route);
                let back = there.and_then(|_| self.traverse(&route.reversed()));
                if let (Some(there), Some(back)) = (there, back) {
                    let rtt = Duration::from_secs_f64((there + back) / 1e3);
                    let rtt_us = rtt.as_micros() as u64;
                    let input = Box::new(Input::ProbeAnswered { id, rtt_us });
                    self.plan(self.now + rtt, Event::Input(index, input));
                }
            }
            Output::DhtPut { request, name, bytes } => {
                self.dht_put(index, &name, &bytes);
                let input = Box::new(Input::DhtStored { request, error: None });
                self.plan(self.now + ms(DHT_DELAY_MS), Event::Input(index, input));
            }
            Output::DhtGet { request, name } => {
                let records = self.dht_get(index, &name);
                let input = Box::new(Input::DhtFound { request, records });
                self.plan(self.now + ms(DHT_DELAY_MS), Event::Input(index, input));
            }
            Output::CheckService { id, subject, .. } => self.check_service(index, id, &subject),
            Output::Record(_) | Output::Decision(_) | Output::Notice(_) if self.lean => {}
            // A simulated node learns its rule anew when it starts.
            Output::Choice(_) => {}
            Output::Notice(Notice::Dropped { what, why }) => {
                *self.nodes[index].dropped.entry((what, why)).or_default() += 1;
            }
            Output::Record(sample) => self.nodes[index].samples.push(sample),
            Output::Decision(decision) => self.nodes[index].decisions.push(*decision),
            Output::Answer { request, answer } => {
                self.nodes[index].answers.insert(request, answer);
            }
            Output::Forwarding(snapshot) => {
                let before = std::mem::replace(&mut self.nodes[index].forwarding, snapshot);
                self.follow_shape(index, &before.unlinked);
                self.check_snapshot(index);
                self.snapshot_taken(index);
            }
            Output::Disconnect(peer) => {
                let there = self.by_id[&peer];
                self.nodes[index].connected.remove(&there);
                if self.nodes[there].connected.remove(&index) {
                    let input = Input::PeerDisconnected(self.id(index));
                    self.plan(self.now, Event::Input(there, Box::new(input)));
                }
            }
            Output::JoinAnswer { .. }
            | Output::RequestRenewal(_)
            | Output::Roster(_)
            | Output::KeepNetwork(_)
            | Output::KeepPins(_)
            | Output::PeerScore(..)
            | Output::Notice(_) => {}
        }
    }

    /// One-way time over a route (ms), or `None` when the datagram is lost on the way.
    fn traverse(&mut self, route: &Route) -> Option<f64> {
        let mut total_ms = 0.0;
        for (a, b) in route.links() {
            let (a, b) = (*self.by_id.get(&a)?, *self.by_id.get(&b)?);
            let model = self.link(a, b)?;
            let connected = self.is_running(b) && self.nodes[a].connected.contains(&b);
            if !connected || self.random.random::<f64>() < model.loss {
                return None;
            }
            let jitter = (2.0 * self.random.random::<f64>() - 1.0) * model.jitter_ms;
            total_ms += (model.delay_ms + jitter).max(0.0);
        }
        Some(total_ms)
    }

    fn tell(&mut self, from: usize, to: usize, input: Input) {
        if self.is_parted(from, to) {
            return;
        }
        let delay = self.control_delay_ms(from, to);
        self.plan(self.now + ms(delay), Event::Input(to, Box::new(input)));
    }

    fn control_delay_ms(&self, from: usize, to: usize) -> f64 {
        self.link(from, to).map_or(CONTROL_DELAY_MS, |link| link.delay_ms)
    }

    fn plan(&mut self, at: Timestamp, event: Event) {
        self.agenda.plan(at, event);
    }
}

fn ms(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

fn address(index: usize) -> String {
    format!("sim/{index}")
}
