//! The libp2p swarm: connections, identify, Kademlia, gossip, synchronisation, mDNS.
//!
//! One task owns it. It turns what happens into inputs for the engine and carries out commands;
//! it decides nothing. A peer counts as connected when a connection to it is
//! [admitted](super::admission).

mod listening;
mod peers;
mod waiting;
mod ways;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use libp2p::swarm::{ListenError, SwarmEvent};
use libp2p::{
    Multiaddr, PeerId, Swarm, SwarmBuilder, gossipsub, identify, kad, mdns, noise,
    request_response, tcp, yamux,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::address::{check_dial, ip_of};
use super::admission::Crowded;
use super::behaviour::{Behaviour, BehaviourEvent, InsideEvent, Protocols, Wanted};
use super::control::Control;
use super::dht::Dht;
use super::firewall::Firewall;
use super::identity::{self, Identity};
use super::plane::DataPlane;
use super::reach::{Gateway, Reach, SharedReach};
use super::tls::LinkTls;
use super::{MEMBERS_CHECK, Members, NetError, lanes, now};
use crate::config::{Config, NetworkConfig};
use crate::engine::event::{Input, Output, Verdict};
use crate::engine::overlay::wire::{self, JoinRequest, PeerAddresses, SyncRequest};
use crate::engine::types::{NodeId, PublicKey};
pub use listening::Listening;
use listening::{heard, listen_on, lost};
use peers::Peer;
use waiting::{Message, Waiting};
use ways::Ways;

/// Gossip that waits for a first subscriber; the oldest makes room.
const UNHEARD_MAX: usize = 256;
/// Questions that may wait for the engine; the oldest makes room.
const UNANSWERED_MAX: usize = 4_096;
/// How often a peer that does not answer is asked again.
const SYNC_FAILURES_MAX: u32 = 3;
/// Connections carry link lanes; only those without any are closed after this.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// How long a connection may take until both sides have proved their keys. A stranger that does not
/// go on holds one of the places of strangers for as long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// Where to say how this node is reached.
    pub reach: SharedReach,
    /// Where to count what it says and hears.
    pub control: Arc<Control>,
    /// Where inputs for the engine go.
    pub events: mpsc::Sender<Input>,
    /// Where commands come from.
    pub commands: mpsc::Receiver<Output>,
    /// Who waits for the tasks.
    pub tasks: &'a TaskTracker,
    /// Ends the tasks.
    pub stop: &'a CancellationToken,
}

/// Where to listen, when all addresses of the settings are some.
///
/// # Errors
/// [`NetError::Address`] and [`NetError::Bootstrap`].
pub fn check_addresses(network: &NetworkConfig) -> Result<Vec<Multiaddr>, NetError> {
    let parse =
        |text: &String| text.parse::<Multiaddr>().map_err(|_| NetError::Address(text.clone()));
    for text in &network.bootstrap {
        check_dial(&parse(text)?)
            .map_err(|why| NetError::Bootstrap { address: text.clone(), why })?;
    }
    network.listen.iter().map(parse).collect()
}

/// Builds the swarm, listens, and spawns its task. Returns where it listens.
///
/// # Errors
/// [`NetError`], when an address is wrong or taken.
pub async fn start(start: Start<'_>) -> Result<Listening, NetError> {
    let network = &start.config.network;
    let build = |error: &dyn std::fmt::Display| NetError::Build(error.to_string());
    let listen = check_addresses(network)?;
    let protocols = Protocols::new(&start.members.load().root.node_id().to_string())?;
    let only_loopback = listen.iter().all(|addr| ip_of(addr).is_some_and(|ip| ip.is_loopback()));
    let emulation = &start.config.emulation;
    let wanted = Wanted {
        mdns: network.mdns && !only_loopback,
        upnp: network.nat && !only_loopback,
        nat: network.nat && (!only_loopback || emulation.enabled),
    };
    *start.reach.lock() = Reach {
        mdns: wanted.mdns,
        nat: wanted.nat,
        bootstrap: network.bootstrap.iter().map(|text| (text.clone(), None)).collect(),
        gateway: if wanted.upnp { Gateway::Searching } else { Gateway::Off },
        ..Reach::default()
    };
    let mut firewall = Firewall::default();
    if emulation.enabled {
        let keys = emulation.unreachable.iter().map(|text| identity::parse_peer_id(text));
        let keys: Vec<_> = keys.collect::<Result<_, _>>().map_err(|error| build(&error))?;
        let peers = keys.iter().filter_map(identity::peer_id).collect();
        firewall = Firewall::new(peers, emulation.behind_nat);
    }
    let members = start.members.clone();
    let mut swarm = SwarmBuilder::with_existing_identity(start.identity.keypair())
        .with_tokio()
        .with_tcp(
            tcp::Config::default(),
            (LinkTls::new, noise::Config::new),
            yamux::Config::default,
        )
        .map_err(|error| build(&error))?
        .with_quic()
        .with_relay_client(noise::Config::new, yamux::Config::default)
        .map_err(|error| build(&error))?
        .with_behaviour(|key, relayed| {
            Behaviour::new(key, &protocols, members, firewall, wanted, relayed)
        })
        .map_err(|error| build(&error))?
        .with_swarm_config(|config| config.with_idle_connection_timeout(IDLE_TIMEOUT))
        .with_connection_timeout(HANDSHAKE_TIMEOUT)
        .build();
    let incoming = swarm.behaviour().inside.stream.new_control().accept(protocols.link.clone());
    let incoming = incoming.map_err(|error| build(&error))?;
    start.tasks.spawn(lanes::accept(incoming, start.plane.clone(), start.stop.child_token()));
    let listening = Arc::new(Mutex::new(BTreeSet::new()));
    let early = listen_on(&mut swarm, listen, &listening).await?;
    let mut task = Task {
        listening: listening.clone(),
        swarm,
        protocols,
        me: start.identity.public_key(),
        members: start.members,
        plane: start.plane,
        events: start.events,
        peers: BTreeMap::new(),
        heard_early: BTreeMap::new(),
        by_node: BTreeMap::new(),
        dht: Dht::default(),
        gossip: Waiting::default(),
        control: start.control,
        questions: BTreeMap::new(),
        joins: BTreeMap::new(),
        next_token: 0,
        unheard: VecDeque::new(),
        ways: Ways::default(),
        reach: start.reach,
        emulated: emulation.enabled,
        stop: start.stop.clone(),
    };
    for address in task.swarm.listeners().cloned().collect::<Vec<_>>() {
        task.offer(&address);
    }
    start.tasks.spawn(task.run(start.commands, early));
    Ok(listening)
}

struct Task {
    listening: Listening,
    swarm: Swarm<Behaviour>,
    protocols: Protocols,
    me: PublicKey,
    members: Members,
    plane: Arc<DataPlane>,
    events: mpsc::Sender<Input>,
    /// Admitted peers.
    peers: BTreeMap<PeerId, Peer>,
    by_node: BTreeMap<NodeId, PeerId>,
    /// Where peers listen that are not admitted yet.
    heard_early: BTreeMap<PeerId, Vec<Multiaddr>>,
    dht: Dht,
    gossip: Waiting,
    control: Arc<Control>,
    /// Questions that the engine has not answered yet, oldest first.
    questions: BTreeMap<u64, request_response::ResponseChannel<Vec<u8>>>,
    joins: BTreeMap<u64, request_response::ResponseChannel<Vec<u8>>>,
    next_token: u64,
    unheard: VecDeque<Vec<u8>>,
    ways: Ways,
    reach: SharedReach,
    /// Links are emulated: loopback addresses are as good as others.
    emulated: bool,
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
        let mut check = tokio::time::interval(MEMBERS_CHECK);
        check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let dht_at = tokio::time::Instant::from_std(self.dht.next_timeout());
            let input = tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep_until(dht_at) => self.dht_timeout(),
                _ = check.tick() => {
                    self.put_out_strangers();
                    self.seek_relays();
                    Vec::new()
                }
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
        let kad = &mut self.swarm.behaviour_mut().inside.kad;
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
            Output::RequestSync { node, bytes } => {
                if let Some(peer) = self.by_node.get(&node) {
                    self.control.sync_said.count(1, bytes.len());
                    behaviour.inside.sync.send_request(peer, bytes);
                }
            }
            Output::SyncRefused { token } => {
                self.questions.remove(&token);
            }
            Output::PeerScore(node, score) => {
                if let Some(peer) = self.by_node.get(&node) {
                    behaviour.inside.gossipsub.set_application_score(peer, score);
                }
            }
            Output::SyncResponse { token, bytes } => {
                if let Some(channel) = self.questions.remove(&token) {
                    self.control.sync_said.count(1, bytes.len());
                    let _ = behaviour.inside.sync.send_response(channel, bytes);
                }
            }
            Output::Publish(bytes) => self.publish(bytes),
            Output::GossipVerdict { token, verdict } => {
                if let Some(Message { id, from, bytes }) = self.gossip.remove(token) {
                    let gossipsub = &mut behaviour.inside.gossipsub;
                    let acceptance = match verdict {
                        Verdict::Accept => {
                            let mesh = gossipsub.mesh_peers(&self.protocols.topic.hash()).count();
                            self.control.gossip_said.count(mesh.saturating_sub(1), bytes);
                            gossipsub::MessageAcceptance::Accept
                        }
                        Verdict::Ignore => gossipsub::MessageAcceptance::Ignore,
                        Verdict::Reject => gossipsub::MessageAcceptance::Reject,
                    };
                    gossipsub.report_message_validation_result(&id, &from, acceptance);
                }
            }
            Output::DhtPut { request, name, bytes } => {
                let kad = &mut behaviour.inside.kad;
                return self.dht.put(kad, &self.me, request, &name, bytes).into_iter().collect();
            }
            Output::DhtGet { request, name } => {
                self.dht.get(&mut behaviour.inside.kad, request, name);
            }
            Output::Disconnect(node) => self.disconnect(node),
            Output::Roster(_) => self.put_out_strangers(),
            Output::JoinAnswer { token, bytes } => {
                if let Some(channel) = self.joins.remove(&token) {
                    let _ = behaviour.join.send_response(channel, bytes);
                }
            }
            Output::RequestRenewal(node) => {
                if let Some(peer) = self.by_node.get(&node) {
                    behaviour.join.send_request(peer, wire::encode(&JoinRequest::Renew));
                }
            }
            Output::SendProbe { .. }
            | Output::KeepNetwork(_)
            | Output::KeepPins(_)
            | Output::Forwarding(_)
            | Output::CheckService { .. }
            | Output::Record(_)
            | Output::Decision(_)
            | Output::Choice(_)
            | Output::Answer { .. }
            | Output::Notice(_) => {}
        }
        Vec::new()
    }

    /// Publishes, and keeps what nobody heard until somebody listens.
    fn publish(&mut self, bytes: Vec<u8>) {
        let topic = self.protocols.topic.hash();
        let gossipsub = &mut self.swarm.behaviour_mut().inside.gossipsub;
        match gossipsub.publish(topic, bytes.clone()) {
            // To every peer, so that an author does not depend on its mesh (flood publishing).
            Ok(_) => self.control.gossip_said.count(self.peers.len(), bytes.len()),
            Err(gossipsub::PublishError::Duplicate) => {}
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
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.connected(peer_id, connection_id, &endpoint);
                Vec::new()
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, num_established, .. } => {
                self.closed(&peer_id, connection_id);
                let gone = num_established == 0;
                gone.then(|| self.disconnected(&peer_id)).flatten().into_iter().collect()
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                self.offer(&address);
                heard(&mut self.swarm, &self.listening, address);
                Vec::new()
            }
            SwarmEvent::ListenerClosed { listener_id, .. } => {
                self.listener_closed(listener_id);
                Vec::new()
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                lost(&mut self.swarm, &self.listening, address);
                Vec::new()
            }
            SwarmEvent::IncomingConnectionError {
                error: ListenError::Denied { cause }, ..
            } => {
                let crowded = cause.downcast_ref::<Crowded>();
                let why = crowded.map_or("connection-refused", |crowded| crowded.as_str());
                self.plane.counters().count(why);
                Vec::new()
            }
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => {
                self.not_connected(peer_id, &error);
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn behaviour_event(&mut self, event: BehaviourEvent) -> Vec<Input> {
        match event {
            BehaviourEvent::Admission(event) => self.admission_event(event),
            BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. }) => {
                self.identified(peer_id, &info)
            }
            BehaviourEvent::Join(request_response::Event::Message {
                peer,
                connection_id,
                message,
            }) => self.join_message(peer, connection_id, message).into_iter().collect(),
            BehaviourEvent::Join(request_response::Event::OutboundFailure { .. }) => {
                self.plane.counters().count("renewal-failed");
                Vec::new()
            }
            BehaviourEvent::Inside(InsideEvent::Tests(event)) => {
                self.tested(event);
                Vec::new()
            }
            BehaviourEvent::Inside(InsideEvent::Punch(event)) => {
                self.punched(&event);
                Vec::new()
            }
            BehaviourEvent::Upnp(event) => {
                self.gateway(event);
                Vec::new()
            }
            BehaviourEvent::Inside(event) => self.inside_event(event),
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

    /// Something that members said.
    fn inside_event(&mut self, event: InsideEvent) -> Vec<Input> {
        let next_token = {
            self.next_token += 1;
            self.next_token
        };
        match event {
            InsideEvent::Kad(kad::Event::OutboundQueryProgressed { id, result, step, .. }) => {
                let kad = &mut self.swarm.behaviour_mut().inside.kad;
                let roster = self.members.load();
                let dht = &mut self.dht;
                dht.progressed(kad, id, result, step.last, &roster, now()).into_iter().collect()
            }
            InsideEvent::Gossipsub(gossipsub::Event::Message {
                propagation_source,
                message_id,
                message,
            }) => {
                let bytes = message.data;
                self.control.gossip_heard.count(1, bytes.len());
                let from = self.peers.get(&propagation_source).map(|peer| peer.key().node_id());
                let waits =
                    Message { id: message_id, from: propagation_source, bytes: bytes.len() };
                let now = std::time::Instant::now();
                match (from, self.gossip.add(next_token, waits, now)) {
                    (Some(from), Ok(())) => vec![Input::Gossip { token: next_token, from, bytes }],
                    (None, Ok(())) => {
                        self.gossip.remove(next_token);
                        Vec::new()
                    }
                    (_, Err(Message { id, from, .. })) => {
                        self.plane.counters().count("gossip-queue-full");
                        let ignored = gossipsub::MessageAcceptance::Ignore;
                        let gossipsub = &mut self.swarm.behaviour_mut().inside.gossipsub;
                        gossipsub.report_message_validation_result(&id, &from, ignored);
                        Vec::new()
                    }
                }
            }
            InsideEvent::Gossipsub(gossipsub::Event::Subscribed { .. }) => {
                for bytes in std::mem::take(&mut self.unheard) {
                    self.publish(bytes);
                }
                Vec::new()
            }
            InsideEvent::Sync(request_response::Event::Message { peer, message, .. }) => {
                match message {
                    request_response::Message::Request { request, channel, .. } => {
                        self.control.sync_heard.count(1, request.len());
                        let Some(known) = self.peers.get(&peer) else { return Vec::new() };
                        let (token, from) = (next_token, known.key().node_id());
                        self.ask_engine(token, channel);
                        vec![Input::SyncRequested { token, from, bytes: request }]
                    }
                    request_response::Message::Response { response, .. } => {
                        self.control.sync_heard.count(1, response.len());
                        let key = identity::public_key(&peer);
                        let input = |key: PublicKey| Input::SyncReceived {
                            from: key.node_id(),
                            bytes: response,
                        };
                        key.map(input).into_iter().collect()
                    }
                }
            }
            InsideEvent::Sync(request_response::Event::OutboundFailure { peer, .. }) => {
                self.plane.counters().count("sync-failed");
                if let Some(known) = self.peers.get_mut(&peer)
                    && known.sync_failures < SYNC_FAILURES_MAX
                {
                    known.sync_failures += 1;
                    // What this node has was said before; what it gets twice does no harm.
                    let everything = wire::encode(&SyncRequest::default());
                    self.swarm.behaviour_mut().inside.sync.send_request(&peer, everything);
                }
                Vec::new()
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
}
