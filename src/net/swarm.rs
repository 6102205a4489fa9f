//! The libp2p swarm: connections, identify, Kademlia, gossip, synchronisation, mDNS.
//!
//! One task owns it. It turns what happens into inputs for the engine and carries out commands;
//! it decides nothing. A peer counts as connected when identify showed that it speaks the
//! protocols of the same network.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::StreamExt;
use libp2p::allow_block_list::{self, BlockedPeers};
use libp2p::core::transport::ListenerId;
use libp2p::kad::store::MemoryStore;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, SwarmBuilder, connection_limits, gossipsub, identify,
    kad, mdns, noise, request_response, tcp, yamux,
};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::dht::{self, Dht};
use super::identity::{self, Identity};
use super::plane::DataPlane;
use super::{NetError, links};
use crate::config::Config;
use crate::engine::event::{Input, RequestId, Verdict};
use crate::engine::overlay::registry::TTL_S_MAX;
use crate::engine::overlay::wire::{GOSSIP_BYTES_MAX, PeerAddresses, SYNC_BYTES_MAX};
use crate::engine::types::{NodeId, PublicKey, ServiceName, Timestamp};

/// Connections that others may have open to this node, and all connections together.
const CONNECTIONS_MAX: (u32, u32) = (256, 512);
/// Handshakes under way in each direction.
const PENDING_MAX: u32 = 64;
/// Gossip that waits for a first subscriber; the oldest makes room.
const UNHEARD_MAX: usize = 256;
/// Questions kept of peers that are not identified yet.
const EARLY_MAX: usize = 64;
/// How often a peer that does not answer is asked again.
const SYNC_FAILURES_MAX: u32 = 3;
/// How long the listeners may take to come up.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections carry link lanes; only those without any are closed after this.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);

/// What the swarm is asked to do.
#[derive(Debug)]
pub enum SwarmCommand {
    /// See [`Output::Dial`](crate::engine::event::Output::Dial).
    Dial(String),
    /// See [`Output::RequestSync`](crate::engine::event::Output::RequestSync).
    RequestSync(NodeId),
    /// See [`Output::SyncResponse`](crate::engine::event::Output::SyncResponse).
    SyncResponse {
        /// From the question.
        token: u64,
        /// The answer.
        bytes: Vec<u8>,
    },
    /// See [`Output::Publish`](crate::engine::event::Output::Publish).
    Publish(Vec<u8>),
    /// See [`Output::GossipVerdict`](crate::engine::event::Output::GossipVerdict).
    Verdict {
        /// From the message.
        token: u64,
        /// What becomes of it.
        verdict: Verdict,
    },
    /// See [`Output::DhtPut`](crate::engine::event::Output::DhtPut).
    Put {
        /// Comes back.
        request: RequestId,
        /// Under which name.
        name: ServiceName,
        /// The signed record.
        bytes: Vec<u8>,
    },
    /// See [`Output::DhtGet`](crate::engine::event::Output::DhtGet).
    Get {
        /// Comes back.
        request: RequestId,
        /// Which name.
        name: ServiceName,
    },
}

#[derive(NetworkBehaviour)]
struct Behaviour {
    limits: connection_limits::Behaviour,
    blocked: allow_block_list::Behaviour<BlockedPeers>,
    identify: identify::Behaviour,
    kad: kad::Behaviour<MemoryStore>,
    gossipsub: gossipsub::Behaviour,
    mdns: Toggle<mdns::tokio::Behaviour>,
    sync: request_response::cbor::Behaviour<(), Vec<u8>>,
    stream: libp2p_stream::Behaviour,
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

struct Protocols {
    network: String,
    kad: StreamProtocol,
    sync: StreamProtocol,
    link: StreamProtocol,
    topic: gossipsub::IdentTopic,
}

impl Protocols {
    fn new(network: &str) -> Result<Self, NetError> {
        let protocol = |name: &str| {
            StreamProtocol::try_from_owned(format!("/meshwise/{network}/{name}/1"))
                .map_err(|error| NetError::Build(error.to_string()))
        };
        Ok(Self {
            network: format!("/meshwise/{network}/1"),
            kad: protocol("kad")?,
            sync: protocol("sync")?,
            link: protocol("link")?,
            topic: gossipsub::IdentTopic::new(format!("meshwise/{network}/1")),
        })
    }
}

impl Behaviour {
    fn new(
        key: &libp2p::identity::Keypair,
        protocols: &Protocols,
        mdns: bool,
    ) -> Result<Self, BoxError> {
        let me = key.public().to_peer_id();
        let limits = connection_limits::ConnectionLimits::default()
            .with_max_pending_incoming(Some(PENDING_MAX))
            .with_max_pending_outgoing(Some(PENDING_MAX))
            .with_max_established_incoming(Some(CONNECTIONS_MAX.0))
            .with_max_established(Some(CONNECTIONS_MAX.1))
            .with_max_established_per_peer(Some(4));
        let mut kad_config = kad::Config::new(protocols.kad.clone());
        kad_config
            .set_record_filtering(kad::StoreInserts::FilterBoth)
            .set_query_timeout(Duration::from_secs(15))
            .set_record_ttl(Some(Duration::from_secs(u64::from(TTL_S_MAX))))
            .set_max_packet_size(4 * GOSSIP_BYTES_MAX);
        let mut kad = kad::Behaviour::with_config(me, MemoryStore::new(me), kad_config);
        kad.set_mode(Some(kad::Mode::Server));
        let gossip_config = gossipsub::ConfigBuilder::default()
            .heartbeat_initial_delay(Duration::from_millis(100))
            .validate_messages()
            .message_id_fn(|message: &gossipsub::Message| {
                gossipsub::MessageId::from(Sha256::digest(&message.data).to_vec())
            })
            // The decoder counts up to 8 KiB of what follows in the stream against this.
            .max_transmit_size(GOSSIP_BYTES_MAX + 16 * 1024)
            .build()?;
        let authenticity = gossipsub::MessageAuthenticity::Signed(key.clone());
        let mut gossipsub: gossipsub::Behaviour =
            gossipsub::Behaviour::new(authenticity, gossip_config)?;
        gossipsub.subscribe(&protocols.topic)?;
        let mdns = mdns.then(|| mdns::tokio::Behaviour::new(mdns::Config::default(), me));
        let codec = request_response::cbor::codec::Codec::<(), Vec<u8>>::default()
            .set_request_size_maximum(64)
            // CBOR spends up to two bytes on each byte of a list.
            .set_response_size_maximum(2 * SYNC_BYTES_MAX as u64 + 16);
        let sync = request_response::cbor::Behaviour::with_codec(
            codec,
            [(protocols.sync.clone(), request_response::ProtocolSupport::Full)],
            request_response::Config::default().with_max_concurrent_streams(8),
        );
        let identify = identify::Config::new(protocols.network.clone(), key.public())
            .with_agent_version(concat!("meshwise/", env!("CARGO_PKG_VERSION")).into());
        Ok(Self {
            limits: connection_limits::Behaviour::new(limits),
            blocked: allow_block_list::Behaviour::default(),
            identify: identify::Behaviour::new(identify),
            kad,
            gossipsub,
            mdns: Toggle::from(mdns.transpose()?),
            sync,
            stream: libp2p_stream::Behaviour::new(),
        })
    }
}

/// What the swarm starts with.
pub struct Start<'a> {
    /// Settings.
    pub config: &'a Config,
    /// Who this node is.
    pub identity: &'a Identity,
    /// Where datagrams go.
    pub plane: Arc<DataPlane>,
    /// Where inputs for the engine go.
    pub events: mpsc::Sender<Input>,
    /// Where commands come from.
    pub commands: mpsc::Receiver<SwarmCommand>,
    /// Who waits for the tasks.
    pub tasks: &'a TaskTracker,
    /// Ends the tasks.
    pub stop: &'a CancellationToken,
}

/// Builds the swarm, listens, and spawns its task. Returns where it listens.
///
/// # Errors
/// [`NetError`], when an address is wrong or taken.
pub async fn start(start: Start<'_>) -> Result<Vec<String>, NetError> {
    let network = &start.config.network;
    let build = |error: &dyn std::fmt::Display| NetError::Build(error.to_string());
    let parse =
        |text: &String| text.parse::<Multiaddr>().map_err(|_| NetError::Address(text.clone()));
    let listen: Vec<Multiaddr> = network.listen.iter().map(parse).collect::<Result<_, _>>()?;
    let bootstrap: Result<Vec<Multiaddr>, _> = network.bootstrap.iter().map(parse).collect();
    bootstrap?;
    let protocols = Protocols::new(&network.name)?;
    let only_loopback = listen.iter().all(|addr| ip_of(addr).is_some_and(|ip| ip.is_loopback()));
    let mdns = network.mdns && !only_loopback;
    let mut swarm = SwarmBuilder::with_existing_identity(start.identity.keypair())
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .map_err(|error| build(&error))?
        .with_quic()
        .with_behaviour(|key| Behaviour::new(key, &protocols, mdns))
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
    start.tasks.spawn(links::accept(incoming, start.plane.clone(), start.stop.child_token()));
    let listening = listen_on(&mut swarm, listen).await?;
    let task = Task {
        swarm,
        protocols,
        me: start.identity.public_key(),
        public: network.public,
        plane: start.plane,
        events: start.events,
        peers: BTreeMap::new(),
        early: Vec::new(),
        by_node: BTreeMap::new(),
        dht: Dht::default(),
        gossip: HashMap::new(),
        questions: HashMap::new(),
        next_token: 0,
        unheard: VecDeque::new(),
        stop: start.stop.clone(),
    };
    start.tasks.spawn(task.run(start.commands));
    Ok(listening)
}

/// Listens on all addresses and waits until each listener is up.
async fn listen_on(
    swarm: &mut Swarm<Behaviour>,
    addresses: Vec<Multiaddr>,
) -> Result<Vec<String>, NetError> {
    let failed = |address: &Multiaddr, reason: String| NetError::Listen {
        address: address.to_string(),
        reason,
    };
    let mut waiting: HashMap<ListenerId, Multiaddr> = HashMap::new();
    for address in addresses {
        let id = swarm.listen_on(address.clone());
        let id = id.map_err(|error| failed(&address, innermost(&error)))?;
        waiting.insert(id, address);
    }
    let me = *swarm.local_peer_id();
    let mut listening = Vec::new();
    let deadline = tokio::time::Instant::now() + LISTEN_TIMEOUT;
    while !waiting.is_empty() {
        let event = tokio::time::timeout_at(deadline, swarm.select_next_some()).await;
        match event {
            Ok(SwarmEvent::NewListenAddr { listener_id, address }) => {
                waiting.remove(&listener_id);
                swarm.add_external_address(address.clone());
                listening.push(address.with(Protocol::P2p(me)).to_string());
            }
            Ok(SwarmEvent::ListenerClosed { listener_id, reason: Err(error), .. }) => {
                if let Some(address) = waiting.get(&listener_id) {
                    return Err(failed(address, error.to_string()));
                }
            }
            Ok(_) => {}
            Err(_) => {
                let address = waiting.values().next().expect("the loop ends when it is empty");
                return Err(failed(address, "it did not come up".into()));
            }
        }
    }
    listening.sort();
    Ok(listening)
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

/// Loopback, link-local, private (RFC 1918) or unique local (RFC 4193).
fn is_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(mapped) => is_local(mapped.into()),
            None => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
        },
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(since.as_micros() as u64)
}

struct Peer {
    /// Ends the link.
    link: CancellationToken,
    sync_failures: u32,
}

struct Task {
    swarm: Swarm<Behaviour>,
    protocols: Protocols,
    me: PublicKey,
    public: bool,
    plane: Arc<DataPlane>,
    events: mpsc::Sender<Input>,
    /// Identified peers.
    peers: BTreeMap<PeerId, Peer>,
    /// Questions of peers that are not identified yet.
    early: Vec<(PeerId, request_response::ResponseChannel<Vec<u8>>)>,
    by_node: BTreeMap<NodeId, PeerId>,
    dht: Dht,
    gossip: HashMap<u64, (gossipsub::MessageId, PeerId)>,
    questions: HashMap<u64, request_response::ResponseChannel<Vec<u8>>>,
    next_token: u64,
    unheard: VecDeque<Vec<u8>>,
    stop: CancellationToken,
}

impl Task {
    async fn run(mut self, mut commands: mpsc::Receiver<SwarmCommand>) {
        loop {
            let input = tokio::select! {
                () = self.stop.cancelled() => return,
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

    fn command(&mut self, command: SwarmCommand) -> Vec<Input> {
        let behaviour = self.swarm.behaviour_mut();
        match command {
            SwarmCommand::Dial(address) => self.dial(&address),
            SwarmCommand::RequestSync(node) => {
                if let Some(peer) = self.by_node.get(&node) {
                    behaviour.sync.send_request(peer, ());
                }
            }
            SwarmCommand::SyncResponse { token, bytes } => {
                if let Some(channel) = self.questions.remove(&token) {
                    let _ = behaviour.sync.send_response(channel, bytes);
                }
            }
            SwarmCommand::Publish(bytes) => self.publish(bytes),
            SwarmCommand::Verdict { token, verdict } => {
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
            SwarmCommand::Put { request, name, bytes } => {
                let ttl = Duration::from_secs(u64::from(TTL_S_MAX));
                let kad = &mut behaviour.kad;
                return self
                    .dht
                    .put(kad, &self.me, request, &name, bytes, ttl)
                    .into_iter()
                    .collect();
            }
            SwarmCommand::Get { request, name } => {
                self.dht.get(&mut behaviour.kad, request, name);
            }
        }
        Vec::new()
    }

    fn dial(&mut self, text: &str) {
        let Ok(address) = text.parse::<Multiaddr>() else {
            return self.plane.counters().count("dial-wrong-address");
        };
        if !self.public && ip_of(&address).is_some_and(|ip| !is_local(ip)) {
            return self.plane.counters().count("dial-public-address");
        }
        let peer = address.iter().find_map(|part| match part {
            Protocol::P2p(peer) => Some(peer),
            _ => None,
        });
        let options = match peer {
            Some(peer) if self.swarm.is_connected(&peer) => return,
            Some(peer) => DialOpts::peer_id(peer).addresses(vec![address]).build(),
            None => DialOpts::from(address),
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
            SwarmEvent::ConnectionEstablished { peer_id, endpoint, .. } => {
                let ip = ip_of(endpoint.get_remote_address());
                if !self.public && !ip.is_some_and(is_local) {
                    self.plane.counters().count("connection-public-address");
                    let _ = self.swarm.disconnect_peer_id(peer_id);
                }
                Vec::new()
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, .. } => {
                self.early.retain(|(peer, _)| *peer != peer_id);
                let Some(peer) = self.peers.remove(&peer_id) else { return Vec::new() };
                peer.link.cancel();
                let Some(key) = identity::public_key(&peer_id) else { return Vec::new() };
                self.by_node.remove(&key.node_id());
                vec![Input::PeerDisconnected(key.node_id())]
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                self.swarm.add_external_address(address);
                Vec::new()
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.swarm.remove_external_address(&address);
                Vec::new()
            }
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => {
                self.plane.counters().count("dial-failed");
                tracing::debug!(?peer_id, %error, "could not connect");
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
                self.dht.progressed(kad, id, result, step.last).into_iter().collect()
            }
            BehaviourEvent::Kad(kad::Event::InboundRequest { request }) => {
                let kad = &mut self.swarm.behaviour_mut().kad;
                if let Err(why) = dht::inbound(kad, request, now()) {
                    self.plane.counters().count(why);
                }
                Vec::new()
            }
            BehaviourEvent::Gossipsub(gossipsub::Event::Message {
                propagation_source,
                message_id,
                message,
            }) => {
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
                        self.questions.insert(next_token, channel);
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
                let found: HashSet<(PeerId, Multiaddr)> = found.into_iter().collect();
                for (peer, address) in found {
                    let address = address.with_p2p(peer).unwrap_or_else(|address| address);
                    self.dial(&address.to_string());
                }
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// A peer showed who it is and what it speaks.
    fn identified(&mut self, peer: PeerId, info: &identify::Info) -> Vec<Input> {
        let Some(key) = identity::public_key(&peer) else { return Vec::new() };
        if info.protocol_version != self.protocols.network {
            self.plane.counters().count("peer-of-another-network");
            let _ = self.swarm.disconnect_peer_id(peer);
            return Vec::new();
        }
        let mut addresses = Vec::new();
        for address in &info.listen_addrs {
            if ip_of(address)
                .is_some_and(|ip| ip.is_unspecified() || (!self.public && !is_local(ip)))
            {
                continue;
            }
            self.swarm.behaviour_mut().kad.add_address(&peer, address.clone());
            if let Ok(address) = address.clone().with_p2p(peer) {
                addresses.push(address.to_string());
            }
        }
        let mut inputs = Vec::new();
        if !self.peers.contains_key(&peer) {
            let link = self.stop.child_token();
            self.peers.insert(peer, Peer { link: link.clone(), sync_failures: 0 });
            self.by_node.insert(key.node_id(), peer);
            if self.plane.may_link(key.node_id()) {
                tokio::spawn(links::maintain(
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
            self.questions.insert(self.next_token, channel);
            inputs.push(Input::SyncRequested { token: self.next_token });
        }
        inputs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_addresses_are_told_from_public_ones() {
        for local in
            ["127.0.0.1", "10.1.2.3", "192.168.1.1", "169.254.0.1", "::1", "fd00::1", "fe80::1"]
        {
            assert!(is_local(local.parse().unwrap()), "{local}");
        }
        for public in ["1.1.1.1", "2001:db8::1", "::ffff:8.8.8.8", "100.64.0.1"] {
            assert!(!is_local(public.parse().unwrap()), "{public}");
        }
    }
}
