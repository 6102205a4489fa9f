//! The libp2p swarm: connections, identify, Kademlia, gossip, synchronisation, mDNS.
//!
//! One task owns it. It turns what happens into inputs for the engine and carries out commands;
//! it decides nothing. A peer counts as connected when identify showed that it speaks the
//! protocols of the same network.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::StreamExt;
use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::{DialError, SwarmEvent};
use libp2p::{
    Multiaddr, PeerId, Swarm, SwarmBuilder, gossipsub, identify, kad, mdns, noise,
    request_response, tcp, yamux,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::behaviour::{Behaviour, BehaviourEvent, Protocols};
use super::dht::Dht;
use super::identity::{self, Identity};
use super::plane::DataPlane;
use super::{Members, NetError, lanes};
use crate::config::Config;
use crate::engine::event::{Input, Output, Verdict};
use crate::engine::overlay::wire::{ADDRESSES_MAX, PeerAddresses};
use crate::engine::types::{NodeId, PublicKey, Timestamp};

/// Gossip that waits for a first subscriber; the oldest makes room.
const UNHEARD_MAX: usize = 256;
/// Gossip messages, and questions, that may wait for the engine; the oldest makes room.
const UNANSWERED_MAX: usize = 4_096;
/// Questions kept of peers that are not identified yet.
const EARLY_MAX: usize = 64;
/// How often a peer that does not answer is asked again.
const SYNC_FAILURES_MAX: u32 = 3;
/// How long the listeners may take to come up.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections carry link lanes; only those without any are closed after this.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);

/// Where a node listens, as multiaddresses with its peer id. Changes with the interfaces.
pub type Listening = Arc<Mutex<BTreeSet<String>>>;

/// What the swarm starts with.
pub struct Start<'a> {
    /// Settings.
    pub config: &'a Config,
    /// Who this node is.
    pub identity: &'a Identity,
    /// Who belongs to the network.
    pub members: Members,
    /// Where datagrams go.
    pub plane: Arc<DataPlane>,
    /// Where inputs for the engine go.
    pub events: mpsc::Sender<Input>,
    /// Where commands come from.
    pub commands: mpsc::Receiver<Output>,
    /// Who waits for the tasks.
    pub tasks: &'a TaskTracker,
    /// Ends the tasks.
    pub stop: &'a CancellationToken,
}

/// Builds the swarm, listens, and spawns its task. Returns where it listens.
///
/// # Errors
/// [`NetError`], when an address is wrong or taken.
pub async fn start(start: Start<'_>) -> Result<Listening, NetError> {
    let network = &start.config.network;
    let build = |error: &dyn std::fmt::Display| NetError::Build(error.to_string());
    let parse =
        |text: &String| text.parse::<Multiaddr>().map_err(|_| NetError::Address(text.clone()));
    let listen: Vec<Multiaddr> = network.listen.iter().map(parse).collect::<Result<_, _>>()?;
    for text in &network.bootstrap {
        check_dial(&parse(text)?)
            .map_err(|why| NetError::Bootstrap { address: text.clone(), why })?;
    }
    let protocols = Protocols::new(&start.members.load().root.node_id().to_string())?;
    let only_loopback = listen.iter().all(|addr| ip_of(addr).is_some_and(|ip| ip.is_loopback()));
    let mdns = network.mdns && !only_loopback;
    let mut swarm = SwarmBuilder::with_existing_identity(start.identity.keypair())
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .map_err(|error| build(&error))?
        .with_quic()
        .with_behaviour(|key| Behaviour::new(key, &protocols, start.members.clone(), mdns))
        .map_err(|error| build(&error))?
        .with_swarm_config(|config| config.with_idle_connection_timeout(IDLE_TIMEOUT))
        .build();
    if start.config.emulation.enabled {
        for text in &start.config.emulation.unreachable {
            let key = identity::parse_peer_id(text).map_err(|error| build(&error))?;
            if let Some(peer) = identity::peer_id(&key) {
                swarm.behaviour_mut().blocked.block_peer(peer);
            }
        }
    }
    let incoming = swarm.behaviour().stream.new_control().accept(protocols.link.clone());
    let incoming = incoming.map_err(|error| build(&error))?;
    start.tasks.spawn(lanes::accept(incoming, start.plane.clone(), start.stop.child_token()));
    let listening = Arc::new(Mutex::new(BTreeSet::new()));
    let early = listen_on(&mut swarm, listen, &listening).await?;
    let task = Task {
        listening: listening.clone(),
        swarm,
        protocols,
        me: start.identity.public_key(),
        members: start.members,
        plane: start.plane,
        events: start.events,
        peers: BTreeMap::new(),
        early: Vec::new(),
        by_node: BTreeMap::new(),
        dht: Dht::default(),
        gossip: BTreeMap::new(),
        questions: BTreeMap::new(),
        next_token: 0,
        unheard: VecDeque::new(),
        stop: start.stop.clone(),
    };
    start.tasks.spawn(task.run(start.commands, early));
    Ok(listening)
}

/// Listens on all addresses and waits until each listener is up. Returns what else happened
/// meanwhile.
async fn listen_on(
    swarm: &mut Swarm<Behaviour>,
    addresses: Vec<Multiaddr>,
    listening: &Listening,
) -> Result<Vec<SwarmEvent<BehaviourEvent>>, NetError> {
    let failed = |address: &Multiaddr, reason: String| NetError::Listen {
        address: address.to_string(),
        reason,
    };
    let mut waiting: HashMap<ListenerId, Multiaddr> = HashMap::new();
    for address in addresses {
        check_free(&address).map_err(|error| failed(&address, error.to_string()))?;
        let id = swarm.listen_on(address.clone());
        let id = id.map_err(|error| failed(&address, innermost(&error)))?;
        waiting.insert(id, address);
    }
    let mut early = Vec::new();
    let deadline = tokio::time::Instant::now() + LISTEN_TIMEOUT;
    while !waiting.is_empty() {
        let event = tokio::time::timeout_at(deadline, swarm.select_next_some()).await;
        match event {
            Ok(SwarmEvent::NewListenAddr { listener_id, address }) => {
                waiting.remove(&listener_id);
                heard(swarm, listening, address);
            }
            Ok(SwarmEvent::ListenerClosed { listener_id, reason: Err(error), .. }) => {
                if let Some(address) = waiting.get(&listener_id) {
                    return Err(failed(address, error.to_string()));
                }
            }
            Ok(event) => early.push(event),
            Err(_) => {
                let address = waiting.values().next().expect("the loop ends when it is empty");
                return Err(failed(address, "it did not come up".into()));
            }
        }
    }
    Ok(early)
}

/// A listener has a new address. What peers are told of providers is built from these.
fn heard(swarm: &mut Swarm<Behaviour>, listening: &Listening, address: Multiaddr) {
    swarm.add_external_address(address.clone());
    let address = address.with(Protocol::P2p(*swarm.local_peer_id())).to_string();
    listening.lock().unwrap_or_else(PoisonError::into_inner).insert(address);
}

/// Why an address cannot be dialled, in words for a person.
fn check_dial(address: &Multiaddr) -> Result<(), &'static str> {
    match ip_of(address) {
        None => Err("it does not begin with /ip4/ or /ip6/ and names are not looked up"),
        Some(_) => Ok(()),
    }
}

/// Whether a TCP port is free. libp2p shares its ports, so it would not notice another node on it.
fn check_free(address: &Multiaddr) -> std::io::Result<()> {
    let port = address.iter().find_map(|part| match part {
        Protocol::Tcp(port) => Some(port),
        _ => None,
    });
    match (ip_of(address), port) {
        (Some(ip), Some(port)) if port != 0 => std::net::TcpListener::bind((ip, port)).map(|_| ()),
        _ => Ok(()),
    }
}

/// The cause at the bottom of an error, which is what the system said.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    address.iter().find_map(|part| match part {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.into()),
        _ => None,
    })
}

/// The time of the system's clock.
pub(super) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(since.as_micros() as u64)
}

struct Peer {
    /// Ends the link.
    link: CancellationToken,
    sync_failures: u32,
}

struct Task {
    listening: Listening,
    swarm: Swarm<Behaviour>,
    protocols: Protocols,
    me: PublicKey,
    members: Members,
    plane: Arc<DataPlane>,
    events: mpsc::Sender<Input>,
    /// Identified peers.
    peers: BTreeMap<PeerId, Peer>,
    /// Questions of peers that are not identified yet.
    early: Vec<(PeerId, request_response::ResponseChannel<Vec<u8>>)>,
    by_node: BTreeMap<NodeId, PeerId>,
    dht: Dht,
    /// Messages and questions that the engine has not answered yet, oldest first.
    gossip: BTreeMap<u64, (gossipsub::MessageId, PeerId)>,
    questions: BTreeMap<u64, request_response::ResponseChannel<Vec<u8>>>,
    next_token: u64,
    unheard: VecDeque<Vec<u8>>,
    stop: CancellationToken,
}

impl Task {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Output>,
        early: Vec<SwarmEvent<BehaviourEvent>>,
    ) {
        for event in early {
            for input in self.event(event) {
                let _ = self.events.send(input).await;
            }
        }
        loop {
            let dht_at = tokio::time::Instant::from_std(self.dht.next_timeout());
            let input = tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep_until(dht_at) => self.dht_timeout(),
                event = self.swarm.select_next_some() => self.event(event),
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => return,
                },
            };
            for input in input {
                if self.events.send(input).await.is_err() {
                    return;
                }
            }
        }
    }

    /// Ends searches that have taken long enough, and counts what the DHT's store refused.
    fn dht_timeout(&mut self) -> Vec<Input> {
        let kad = &mut self.swarm.behaviour_mut().kad;
        let inputs = self.dht.handle_timeout(kad, std::time::Instant::now());
        for (why, times) in kad.store_mut().take_refused() {
            (0..times).for_each(|_| self.plane.counters().count(why));
        }
        inputs
    }

    /// Does what the engine wants done, as far as it is the swarm's.
    fn command(&mut self, command: Output) -> Vec<Input> {
        let behaviour = self.swarm.behaviour_mut();
        match command {
            Output::Dial(addresses) => self.dial(&addresses),
            Output::RequestSync(node) => {
                if let Some(peer) = self.by_node.get(&node) {
                    behaviour.sync.send_request(peer, ());
                }
            }
            Output::SyncResponse { token, bytes } => {
                if let Some(channel) = self.questions.remove(&token) {
                    let _ = behaviour.sync.send_response(channel, bytes);
                }
            }
            Output::Publish(bytes) => self.publish(bytes),
            Output::GossipVerdict { token, verdict } => {
                if let Some((id, from)) = self.gossip.remove(&token) {
                    let acceptance = match verdict {
                        Verdict::Accept => gossipsub::MessageAcceptance::Accept,
                        Verdict::Ignore => gossipsub::MessageAcceptance::Ignore,
                        Verdict::Reject => gossipsub::MessageAcceptance::Reject,
                    };
                    let gossipsub = &mut behaviour.gossipsub;
                    gossipsub.report_message_validation_result(&id, &from, acceptance);
                }
            }
            Output::DhtPut { request, name, bytes } => {
                let kad = &mut behaviour.kad;
                return self.dht.put(kad, &self.me, request, &name, bytes).into_iter().collect();
            }
            Output::DhtGet { request, name } => {
                self.dht.get(&mut behaviour.kad, request, name);
            }
            Output::Disconnect(node) => {
                if let Some(peer) = self.by_node.get(&node) {
                    let _ = self.swarm.disconnect_peer_id(*peer);
                }
            }
            Output::SendProbe { .. }
            | Output::JoinAnswer { .. }
            | Output::RequestRenewal(_)
            | Output::Roster(_)
            | Output::KeepNetwork(_)
            | Output::KeepPins(_)
            | Output::Forwarding(_)
            | Output::Record(_)
            | Output::Decision(_)
            | Output::Answer { .. }
            | Output::Notice(_) => {}
        }
        Vec::new()
    }

    /// Dials one peer at all its addresses together.
    fn dial(&mut self, texts: &[String]) {
        let mut addresses: Vec<Multiaddr> = texts.iter().filter_map(|t| t.parse().ok()).collect();
        addresses.retain(|address| check_dial(address).is_ok());
        let peer = addresses.iter().flat_map(Multiaddr::iter).find_map(|part| match part {
            Protocol::P2p(peer) => Some(peer),
            _ => None,
        });
        let options = match (peer, addresses.first()) {
            (Some(peer), _) if self.swarm.is_connected(&peer) => return,
            (Some(peer), _) => DialOpts::peer_id(peer).addresses(addresses).build(),
            (None, Some(address)) => DialOpts::from(address.clone()),
            (None, None) => return self.plane.counters().count("dial-wrong-address"),
        };
        if self.swarm.dial(options).is_err() {
            self.plane.counters().count("dial-refused");
        }
    }

    /// Publishes, and keeps what nobody heard until somebody listens.
    fn publish(&mut self, bytes: Vec<u8>) {
        let topic = self.protocols.topic.hash();
        let gossipsub = &mut self.swarm.behaviour_mut().gossipsub;
        match gossipsub.publish(topic, bytes.clone()) {
            Ok(_) | Err(gossipsub::PublishError::Duplicate) => {}
            Err(gossipsub::PublishError::NoPeersSubscribedToTopic) => {
                if self.unheard.len() >= UNHEARD_MAX {
                    self.unheard.pop_front();
                }
                self.unheard.push_back(bytes);
            }
            Err(_) => self.plane.counters().count("gossip-not-sent"),
        }
    }

    fn event(&mut self, event: SwarmEvent<BehaviourEvent>) -> Vec<Input> {
        match event {
            SwarmEvent::Behaviour(event) => self.behaviour_event(event),
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, .. } => {
                self.early.retain(|(peer, _)| *peer != peer_id);
                let Some(peer) = self.peers.remove(&peer_id) else { return Vec::new() };
                peer.link.cancel();
                let Some(key) = identity::public_key(&peer_id) else { return Vec::new() };
                self.by_node.remove(&key.node_id());
                vec![Input::PeerDisconnected(key.node_id())]
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                heard(&mut self.swarm, &self.listening, address);
                Vec::new()
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.swarm.remove_external_address(&address);
                let address = address.with(Protocol::P2p(*self.swarm.local_peer_id())).to_string();
                self.listening.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
                Vec::new()
            }
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => {
                self.plane.counters().count("dial-failed");
                match &error {
                    DialError::Transport(tried) if self.peers.is_empty() => {
                        for (address, _) in tried {
                            tracing::warn!("nobody answers at {address}; trying again later");
                        }
                    }
                    _ => tracing::debug!(?peer_id, %error, "could not connect"),
                }
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn behaviour_event(&mut self, event: BehaviourEvent) -> Vec<Input> {
        let next_token = {
            self.next_token += 1;
            self.next_token
        };
        match event {
            BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. }) => {
                self.identified(peer_id, &info)
            }
            BehaviourEvent::Kad(kad::Event::OutboundQueryProgressed {
                id, result, step, ..
            }) => {
                let kad = &mut self.swarm.behaviour_mut().kad;
                let roster = self.members.load();
                let dht = &mut self.dht;
                dht.progressed(kad, id, result, step.last, &roster, now()).into_iter().collect()
            }
            BehaviourEvent::Gossipsub(gossipsub::Event::Message {
                propagation_source,
                message_id,
                message,
            }) => {
                if self.gossip.len() >= UNANSWERED_MAX {
                    self.gossip.pop_first();
                }
                self.gossip.insert(next_token, (message_id, propagation_source));
                vec![Input::Gossip { token: next_token, bytes: message.data }]
            }
            BehaviourEvent::Gossipsub(gossipsub::Event::Subscribed { .. }) => {
                for bytes in std::mem::take(&mut self.unheard) {
                    self.publish(bytes);
                }
                Vec::new()
            }
            BehaviourEvent::Sync(request_response::Event::Message { peer, message, .. }) => {
                match message {
                    request_response::Message::Request { channel, .. } => {
                        if !self.peers.contains_key(&peer) {
                            // Answered when identify has shown that it is of this network.
                            if self.early.len() < EARLY_MAX {
                                self.early.push((peer, channel));
                            }
                            return Vec::new();
                        }
                        self.ask_engine(next_token, channel);
                        vec![Input::SyncRequested { token: next_token }]
                    }
                    request_response::Message::Response { response, .. } => {
                        let key = identity::public_key(&peer);
                        let input = |key: PublicKey| Input::SyncReceived {
                            from: key.node_id(),
                            bytes: response,
                        };
                        key.map(input).into_iter().collect()
                    }
                }
            }
            BehaviourEvent::Sync(request_response::Event::OutboundFailure { peer, .. }) => {
                self.plane.counters().count("sync-failed");
                if let Some(known) = self.peers.get_mut(&peer)
                    && known.sync_failures < SYNC_FAILURES_MAX
                {
                    known.sync_failures += 1;
                    self.swarm.behaviour_mut().sync.send_request(&peer, ());
                }
                Vec::new()
            }
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => {
                let mut peers: BTreeMap<PeerId, Vec<String>> = BTreeMap::new();
                for (peer, address) in found {
                    if let Ok(address) = address.with_p2p(peer) {
                        peers.entry(peer).or_default().push(address.to_string());
                    }
                }
                let heard_of = |(peer, addresses)| {
                    let key = identity::public_key(&peer)?;
                    Some(Input::PeerHeardOf(PeerAddresses { key, addresses }))
                };
                peers.into_iter().filter_map(heard_of).collect()
            }
            _ => Vec::new(),
        }
    }

    fn ask_engine(&mut self, token: u64, channel: request_response::ResponseChannel<Vec<u8>>) {
        if self.questions.len() >= UNANSWERED_MAX {
            self.questions.pop_first();
        }
        self.questions.insert(token, channel);
    }

    /// A peer showed who it is and what it speaks.
    fn identified(&mut self, peer: PeerId, info: &identify::Info) -> Vec<Input> {
        let Some(key) = identity::public_key(&peer) else { return Vec::new() };
        if info.protocol_version != self.protocols.network {
            self.plane.counters().count("peer-of-another-network");
            let _ = self.swarm.disconnect_peer_id(peer);
            return Vec::new();
        }
        let is_new = !self.peers.contains_key(&peer);
        let usable = |address: &&Multiaddr| {
            check_dial(address).is_ok() && !ip_of(address).is_some_and(|ip| ip.is_unspecified())
        };
        let usable: Vec<&Multiaddr> = info.listen_addrs.iter().filter(usable).collect();
        let mut addresses = Vec::new();
        for address in usable.into_iter().take(ADDRESSES_MAX) {
            if is_new {
                self.swarm.behaviour_mut().kad.add_address(&peer, address.clone());
            }
            if let Ok(address) = address.clone().with_p2p(peer) {
                addresses.push(address.to_string());
            }
        }
        let mut inputs = Vec::new();
        if is_new {
            let link = self.stop.child_token();
            self.peers.insert(peer, Peer { link: link.clone(), sync_failures: 0 });
            self.by_node.insert(key.node_id(), peer);
            if self.plane.may_link(key.node_id()) {
                tokio::spawn(lanes::maintain(
                    self.swarm.behaviour().stream.new_control(),
                    self.protocols.link.clone(),
                    peer,
                    key.node_id(),
                    self.plane.clone(),
                    self.events.clone(),
                    link,
                ));
            }
            inputs.push(Input::PeerConnected(key));
        }
        inputs.push(Input::PeerHeardOf(PeerAddresses { key, addresses }));
        let early = std::mem::take(&mut self.early);
        let (mine, others) = early.into_iter().partition(|(asker, _)| *asker == peer);
        self.early = others;
        let mine: Vec<_> = mine;
        for (_, channel) in mine {
            self.next_token += 1;
            self.ask_engine(self.next_token, channel);
            inputs.push(Input::SyncRequested { token: self.next_token });
        }
        inputs
    }
}
