//! The other driver of the same engine: virtual time, one seed, modelled links.
//!
//! A [`World`] holds engines and carries out their outputs over links with delay, jitter and
//! loss. Nothing here waits: an hour of a ten-node network takes about a second. The same seed
//! gives the same world to the last byte.

#![deny(clippy::disallowed_types, clippy::disallowed_methods)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::SigningKey;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use crate::engine::event::{Answer, Command, CommandError, Input, Output, RequestId, Verdict};
use crate::engine::forward::{self, DatagramKind, ForwardingSnapshot, Header, HeaderView, decide};
use crate::engine::measure::Sample;
use crate::engine::overlay::wire::PeerAddresses;
use crate::engine::overlay::{BootstrapPolicy, Credential, NetworkState};
use crate::engine::route::{Decision, PathPolicy};
use crate::engine::types::{NodeId, PublicKey, Route, ServiceName, Timestamp, TunnelId};
use crate::engine::{Engine, EngineConfig, Intervals};

/// How a link behaves, in each direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkModel {
    /// One-way delay (ms).
    pub delay_ms: f64,
    /// Largest deviation from it (ms), uniform on both sides.
    pub jitter_ms: f64,
    /// Share of datagrams lost, 0 to 1.
    pub loss: f64,
}

impl LinkModel {
    /// A link with this one-way delay, without jitter or loss.
    pub fn delay(delay_ms: f64) -> Self {
        Self { delay_ms, jitter_ms: 0.0, loss: 0.0 }
    }
}

/// Root key of the world's network, which node 0 holds.
const ROOT_SECRET: [u8; 32] = [255; 32];
/// Delay of control messages on a connection (ms one way), when no link model says otherwise.
const CONTROL_DELAY_MS: f64 = 5.0;
/// Time that a DHT operation takes (ms).
const DHT_DELAY_MS: f64 = 40.0;

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It arrived.
    Delivered,
    /// A link lost it.
    Lost,
    /// The next node was gone, or no neighbour any more.
    NoLink,
}

enum Event {
    Input(usize, Box<Input>),
    Wake(usize),
    Gossip { to: usize, bytes: Vec<u8> },
}

struct Node {
    engine: Engine,
    alive: bool,
    connected: BTreeSet<usize>,
    seen: BTreeSet<u64>,
    wake_at: Timestamp,
    /// What it observed.
    samples: Vec<Sample>,
    decisions: Vec<Decision>,
    forwarding: Arc<ForwardingSnapshot>,
    answers: BTreeMap<RequestId, Result<Answer, CommandError>>,
}

/// A simulated network.
pub struct World {
    now: Timestamp,
    random: Pcg64Mcg,
    nodes: Vec<Node>,
    by_id: BTreeMap<NodeId, usize>,
    keys: Vec<PublicKey>,
    links: BTreeMap<(usize, usize), LinkModel>,
    events: BTreeMap<u64, Event>,
    queue: BinaryHeap<Reverse<(Timestamp, u64)>>,
    next_event: u64,
    tokens: BTreeMap<u64, (usize, Vec<u8>)>,
    next_token: u64,
    dht: BTreeMap<ServiceName, BTreeMap<usize, Vec<u8>>>,
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
            events: BTreeMap::new(),
            queue: BinaryHeap::new(),
            next_event: 0,
            tokens: BTreeMap::new(),
            next_token: 0,
            dht: BTreeMap::new(),
        }
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
            key,
            network: NetworkState::joined("world", root, root, credential),
            root: (index == 0).then_some(root_key),
            pins: Vec::new(),
            bootstrap: BootstrapPolicy { addresses, ..BootstrapPolicy::default() },
            paths,
            intervals,
            prediction: true,
            seed: self.random.random(),
        };
        self.nodes.push(Node {
            engine: Engine::new(config, self.now),
            alive: true,
            connected: BTreeSet::new(),
            seen: BTreeSet::new(),
            wake_at: self.now,
            samples: Vec::new(),
            decisions: Vec::new(),
            forwarding: Arc::default(),
            answers: BTreeMap::new(),
        });
        self.by_id.insert(public.node_id(), index);
        self.keys.push(public);
        self.push(self.now, Event::Wake(index));
        index
    }

    /// Sets how the link between two nodes behaves. Nodes without a link cannot connect.
    pub fn set_link(&mut self, a: usize, b: usize, model: LinkModel) {
        self.links.insert((a.min(b), a.max(b)), model);
    }

    /// Stops a node: its neighbours see their connections close.
    pub fn kill(&mut self, index: usize) {
        self.nodes[index].alive = false;
        for peer in std::mem::take(&mut self.nodes[index].connected) {
            self.nodes[peer].connected.remove(&index);
            let input = Input::PeerDisconnected(self.id(index));
            self.push(self.now, Event::Input(peer, Box::new(input)));
        }
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

    /// The engine of a node.
    pub fn engine(&self, index: usize) -> &Engine {
        &self.nodes[index].engine
    }

    /// What a node observed so far.
    pub fn samples(&self, index: usize) -> &[Sample] {
        &self.nodes[index].samples
    }

    /// What a node decided so far.
    pub fn decisions(&self, index: usize) -> &[Decision] {
        &self.nodes[index].decisions
    }

    /// By what a node forwards now.
    pub fn forwarding(&self, index: usize) -> &ForwardingSnapshot {
        &self.nodes[index].forwarding
    }

    /// Sends a datagram of a tunnel as the forwarding parts of the nodes would: the source route
    /// of its binding, hop by hop, each relay deciding by itself. Returns the nodes that had it, the
    /// source first, and what became of it at the last one; `None` when the tunnel has no route.
    ///
    /// # Panics
    /// When the engine bound a route that no datagram can carry.
    pub fn forward(&mut self, source: usize, tunnel: TunnelId) -> Option<(Vec<usize>, Fate)> {
        let route = self.nodes[source].forwarding.tunnels.get(&tunnel)?.route.clone()?;
        let mut header = Header::new(DatagramKind::Data, tunnel, 0, 0, route.clone());
        let mut at = vec![source];
        loop {
            let (here, next) = (at[at.len() - 1], route.nodes().get(at.len()).copied()?);
            let next = *self.by_id.get(&next)?;
            let link = self.link(here, next);
            let connected = self.nodes[here].connected.contains(&next);
            if !connected || !self.nodes[next].alive {
                return Some((at, Fate::NoLink));
            }
            if self.random.random::<f64>() < link.map_or(1.0, |link| link.loss) {
                return Some((at, Fate::Lost));
            }
            let bytes = header.encode(&[]);
            let view = HeaderView::parse(&bytes).expect("what was encoded parses");
            let neighbours = &self.nodes[next].connected;
            let is_neighbour =
                |id: NodeId| self.by_id.get(&id).is_some_and(|n| neighbours.contains(n));
            let verdict = decide(&view, self.id(next), self.id(here), is_neighbour);
            at.push(next);
            match verdict {
                forward::Verdict::Deliver => return Some((at, Fate::Delivered)),
                forward::Verdict::Drop(_) => return Some((at, Fate::NoLink)),
                forward::Verdict::Forward(_) => header.position += 1,
            }
        }
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

    /// Hands an input to a node, now.
    pub fn input(&mut self, index: usize, input: Input) {
        let now = self.now;
        self.nodes[index].engine.handle(now, input);
        self.drain(index);
    }

    /// Lets time pass.
    pub fn run_for(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some(Reverse((at, id))) = self.queue.peek().copied() {
            if at > end {
                break;
            }
            self.queue.pop();
            let Some(event) = self.events.remove(&id) else { continue };
            self.now = at;
            self.happen(event);
        }
        self.now = end;
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Input(index, input) => {
                if self.nodes[index].alive {
                    self.input(index, *input);
                }
            }
            Event::Wake(index) => {
                let node = &mut self.nodes[index];
                if node.alive && node.wake_at <= self.now {
                    node.engine.handle_timeout(self.now);
                    self.drain(index);
                }
            }
            Event::Gossip { to, bytes } => {
                let id = message_id(&bytes);
                if self.nodes[to].alive && self.nodes[to].seen.insert(id) {
                    self.next_token += 1;
                    let token = self.next_token;
                    self.tokens.insert(token, (to, bytes.clone()));
                    self.input(to, Input::Gossip { token, bytes });
                }
            }
        }
    }

    fn drain(&mut self, index: usize) {
        while let Some(output) = self.nodes[index].engine.poll_output() {
            self.carry_out(index, output);
        }
        let wake_at = self.nodes[index].engine.next_timeout(self.now).max(self.now);
        if self.nodes[index].wake_at != wake_at || wake_at == self.now {
            self.nodes[index].wake_at = wake_at;
            // A microsecond at least, so that a wish to be called at once cannot stop time.
            self.push(wake_at.max(self.now + Duration::from_micros(1)), Event::Wake(index));
        }
    }

    fn carry_out(&mut self, index: usize, output: Output) {
        match output {
            Output::Dial(addresses) => addresses.iter().for_each(|text| self.dial(index, text)),
            Output::RequestSync(peer) => {
                let Some(&peer) = self.by_id.get(&peer) else { return };
                self.next_token += 1;
                self.tokens.insert(self.next_token, (index, Vec::new()));
                let input = Input::SyncRequested { token: self.next_token };
                self.send(index, peer, input);
            }
            Output::SyncResponse { token, bytes } => {
                if let Some((asker, _)) = self.tokens.remove(&token) {
                    let from = self.id(index);
                    self.send(index, asker, Input::SyncReceived { from, bytes });
                }
            }
            Output::Publish(bytes) => {
                self.nodes[index].seen.insert(message_id(&bytes));
                self.spread(index, &bytes);
            }
            Output::GossipVerdict { token, verdict } => {
                let message = self.tokens.remove(&token);
                if let (Verdict::Accept, Some((_, bytes))) = (verdict, message) {
                    self.spread(index, &bytes);
                }
            }
            Output::SendProbe { id, route } => {
                let there = self.traverse(&route);
                let back = there.and_then(|_| self.traverse(&route.reversed()));
                if let (Some(there), Some(back)) = (there, back) {
                    let rtt = Duration::from_secs_f64((there + back) / 1e3);
                    let rtt_us = rtt.as_micros() as u64;
                    let input = Box::new(Input::ProbeAnswered { id, rtt_us });
                    self.push(self.now + rtt, Event::Input(index, input));
                }
            }
            Output::DhtPut { request, name, bytes } => {
                self.dht.entry(name).or_default().insert(index, bytes);
                let input = Box::new(Input::DhtStored { request, error: None });
                self.push(self.now + ms(DHT_DELAY_MS), Event::Input(index, input));
            }
            Output::DhtGet { request, name } => {
                let records = self.dht.get(&name).into_iter().flatten();
                let records = records.map(|(_, bytes)| bytes.clone()).collect();
                let input = Box::new(Input::DhtFound { request, records });
                self.push(self.now + ms(DHT_DELAY_MS), Event::Input(index, input));
            }
            Output::Record(sample) => self.nodes[index].samples.push(sample),
            Output::Decision(decision) => self.nodes[index].decisions.push(*decision),
            Output::Answer { request, answer } => {
                self.nodes[index].answers.insert(request, answer);
            }
            Output::Forwarding(snapshot) => self.nodes[index].forwarding = snapshot,
            Output::Disconnect(peer) => {
                let there = self.by_id[&peer];
                self.nodes[index].connected.remove(&there);
                if self.nodes[there].connected.remove(&index) {
                    let input = Input::PeerDisconnected(self.id(index));
                    self.push(self.now, Event::Input(there, Box::new(input)));
                }
            }
            Output::JoinAnswer { .. }
            | Output::RequestRenewal(_)
            | Output::Roster(_)
            | Output::KeepNetwork(_)
            | Output::KeepPins(_)
            | Output::Notice(_) => {}
        }
    }

    fn dial(&mut self, from: usize, text: &str) {
        let Some(to) = text.strip_prefix("sim/").and_then(|t| t.parse::<usize>().ok()) else {
            return;
        };
        let linked = self.link(from, to).is_some();
        if to >= self.nodes.len() || to == from || !linked || !self.nodes[to].alive {
            return;
        }
        if !self.nodes[from].connected.insert(to) {
            return;
        }
        self.nodes[to].connected.insert(from);
        for (here, there) in [(from, to), (to, from)] {
            let key = self.keys[there];
            let heard = PeerAddresses { key, addresses: vec![address(there)] };
            for input in
                [Input::PeerConnected(key), Input::PeerHeardOf(heard), Input::LinkUp(key.node_id())]
            {
                self.send(there, here, input);
            }
        }
    }

    /// One-way time over a route (ms), or `None` when the datagram is lost on the way.
    fn traverse(&mut self, route: &Route) -> Option<f64> {
        let mut total_ms = 0.0;
        for (a, b) in route.links() {
            let (a, b) = (*self.by_id.get(&a)?, *self.by_id.get(&b)?);
            let model = self.link(a, b)?;
            let connected = self.nodes[a].connected.contains(&b);
            if !connected || !self.nodes[b].alive || self.random.random::<f64>() < model.loss {
                return None;
            }
            let jitter = (2.0 * self.random.random::<f64>() - 1.0) * model.jitter_ms;
            total_ms += (model.delay_ms + jitter).max(0.0);
        }
        Some(total_ms)
    }

    fn spread(&mut self, from: usize, bytes: &[u8]) {
        for to in self.nodes[from].connected.clone() {
            let delay = self.link(from, to).map_or(CONTROL_DELAY_MS, |link| link.delay_ms);
            self.push(self.now + ms(delay), Event::Gossip { to, bytes: bytes.to_vec() });
        }
    }

    fn send(&mut self, from: usize, to: usize, input: Input) {
        let delay = self.link(from, to).map_or(CONTROL_DELAY_MS, |link| link.delay_ms);
        self.push(self.now + ms(delay), Event::Input(to, Box::new(input)));
    }

    fn link(&self, a: usize, b: usize) -> Option<LinkModel> {
        self.links.get(&(a.min(b), a.max(b))).copied()
    }

    fn push(&mut self, at: Timestamp, event: Event) {
        self.next_event += 1;
        self.events.insert(self.next_event, event);
        self.queue.push(Reverse((at, self.next_event)));
    }
}

fn ms(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

fn address(index: usize) -> String {
    format!("sim/{index}")
}

/// FNV-1a, 64 bit: enough to tell the messages of one simulation apart.
fn message_id(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
