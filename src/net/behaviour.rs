//! What a node speaks with libp2p: the behaviours, their protocols and their limits.
//!
//! With everybody: identify, ping, [admission](super::admission) and requests to [join](super::join).
//! With members: what is [`Inside`], behind the [gate](super::gate): also relaying and the tests of
//! addresses, so that no stranger is relayed, or has this node dial anybody.

use std::time::Duration;

use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    PeerId, StreamProtocol, autonat, connection_limits, dcutr, gossipsub, identify, mdns, ping,
    relay, request_response, upnp,
};
use sha2::{Digest, Sha256};

use super::admission::Admission;
use super::firewall::Firewall;
use super::gate::{Gated, Gates};
use super::join::{self, Joining};
use super::{Members, NetError, dht};
use crate::engine::overlay::wire::{GOSSIP_BYTES_MAX, SYNC_BYTES_MAX, SYNC_REQUEST_BYTES_MAX};

/// Connections that others may have open to this node, and all connections together.
const CONNECTIONS_MAX: (u32, u32) = (256, 512);
/// Handshakes under way in each direction. More than strangers may have open, so that they do not
/// use them up.
const PENDING_MAX: u32 = 128;
/// Pings are answered for others' sake; links are measured by probes of our own.
const PING_INTERVAL: Duration = Duration::from_secs(3_600);
/// Members that may be reached over this node at one time: half of the connections that others may
/// have open to it.
const RESERVATIONS_MAX: usize = 128;
/// Connections between others over this node at one time.
const CIRCUITS_MAX: usize = 128;
/// Of those, from one member.
const CIRCUITS_PER_PEER_MAX: usize = 16;
/// How long one such connection lasts; whoever needs it opens it anew.
const CIRCUIT_TIME_MAX: Duration = Duration::from_secs(2 * 3_600);
/// What one such connection carries (bytes, each way). They are for control messages, of which a
/// node has some kilobytes a second at most; a guess.
const CIRCUIT_BYTES_MAX: u64 = 64 << 20;

/// How long the score of a peer that left is kept: as long as the engine shuns it.
const RETAIN_SCORE: Duration = crate::engine::overlay::gossip::SHUN_FOR;

/// Those that may refuse a connection come first: a later refusal would leave traces in the others.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    pub(super) limits: connection_limits::Behaviour,
    pub(super) firewall: Firewall,
    pub(super) admission: Admission,
    pub(super) identify: identify::Behaviour,
    pub(super) ping: ping::Behaviour,
    pub(super) join: Joining,
    pub(super) mdns: Toggle<mdns::tokio::Behaviour>,
    pub(super) upnp: Toggle<upnp::tokio::Behaviour>,
    pub(super) inside: Gated<Inside>,
}

/// What is spoken with members only.
#[derive(NetworkBehaviour)]
pub(super) struct Inside {
    pub(super) kad: dht::Kad,
    pub(super) gossipsub: gossipsub::Behaviour,
    pub(super) sync: request_response::cbor::Behaviour<Vec<u8>, Vec<u8>>,
    pub(super) stream: libp2p_stream::Behaviour,
    /// Reaching others, and being reached, over a member.
    pub(super) relayed: relay::client::Behaviour,
    /// Letting members reach each other over this node.
    pub(super) relay: Toggle<relay::Behaviour>,
    pub(super) punch: Toggle<dcutr::Behaviour>,
    /// Having this node's addresses tested.
    pub(super) tests: Toggle<autonat::v2::client::Behaviour>,
    /// Testing those of other members.
    pub(super) tester: Toggle<autonat::v2::server::Behaviour>,
}

/// Which of the optional ones run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    /// Search the local network for nodes.
    pub(super) mdns: bool,
    /// Ask the gateway to map ports.
    pub(super) upnp: bool,
    /// Everything else about NAT.
    pub(super) nat: bool,
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The protocols of one network, which hold the id of its root: nodes of different networks have no
/// protocol in common but identify and ping.
pub(super) struct Protocols {
    pub(super) network: String,
    pub(super) admission: StreamProtocol,
    pub(super) join: StreamProtocol,
    pub(super) kad: StreamProtocol,
    pub(super) sync: StreamProtocol,
    pub(super) link: StreamProtocol,
    pub(super) topic: gossipsub::IdentTopic,
}

impl Protocols {
    pub(super) fn new(network: &str) -> Result<Self, NetError> {
        let protocol = |name: &str| {
            StreamProtocol::try_from_owned(format!("/meshwise/{network}/{name}"))
                .map_err(|error| NetError::Build(error.to_string()))
        };
        Ok(Self {
            network: format!("/meshwise/{network}/1"),
            admission: protocol("admission/1")?,
            join: protocol("join/1")?,
            kad: protocol("kad/1")?,
            sync: protocol("sync/2")?,
            link: protocol("link/4")?,
            topic: gossipsub::IdentTopic::new(format!("meshwise/{network}/2")),
        })
    }
}

impl Behaviour {
    pub(super) fn new(
        key: &libp2p::identity::Keypair,
        protocols: &Protocols,
        members: Members,
        firewall: Firewall,
        wanted: Wanted,
        relayed: relay::client::Behaviour,
    ) -> Result<Self, BoxError> {
        let me = key.public().to_peer_id();
        let gates = Gates::default();
        let limits = connection_limits::ConnectionLimits::default()
            .with_max_pending_incoming(Some(PENDING_MAX))
            .with_max_pending_outgoing(Some(PENDING_MAX))
            .with_max_established_incoming(Some(CONNECTIONS_MAX.0))
            .with_max_established(Some(CONNECTIONS_MAX.1))
            .with_max_established_per_peer(Some(4));
        let mdns = wanted.mdns.then(|| mdns::tokio::Behaviour::new(mdns::Config::default(), me));
        let identify = identify::Config::new(protocols.network.clone(), key.public())
            .with_agent_version(concat!("meshwise/", env!("CARGO_PKG_VERSION")).into())
            // A way over a relay is found later than the connection.
            .with_push_listen_addr_updates(true);
        let ping = ping::Config::new().with_interval(PING_INTERVAL);
        Ok(Self {
            limits: connection_limits::Behaviour::new(limits),
            firewall,
            admission: Admission::new(protocols.admission.clone(), members.clone(), gates.clone()),
            identify: identify::Behaviour::new(identify),
            ping: ping::Behaviour::new(ping),
            join: join::joining(protocols.join.clone()),
            mdns: Toggle::from(mdns.transpose()?),
            upnp: Toggle::from(wanted.upnp.then(upnp::tokio::Behaviour::default)),
            inside: Gated::new(gates, Inside::new(me, protocols, members, wanted.nat, relayed)?),
        })
    }
}

impl Inside {
    fn new(
        me: PeerId,
        protocols: &Protocols,
        members: Members,
        nat: bool,
        relayed: relay::client::Behaviour,
    ) -> Result<Self, BoxError> {
        let kad = dht::behaviour(protocols.kad.clone(), me, members);
        let gossip_config = gossipsub::ConfigBuilder::default()
            .heartbeat_initial_delay(Duration::from_millis(100))
            .validate_messages()
            // Our messages are signed themselves. What gossipsub would sign on top is verified for each
            // copy that arrives, five of six of which are dropped as duplicates.
            .validation_mode(gossipsub::ValidationMode::Anonymous)
            .message_id_fn(|message: &gossipsub::Message| {
                gossipsub::MessageId::from(Sha256::digest(&message.data).to_vec())
            })
            // The decoder counts up to 8 KiB of what follows in the stream against this.
            .max_transmit_size(GOSSIP_BYTES_MAX + 16 * 1024)
            .build()?;
        let authenticity = gossipsub::MessageAuthenticity::Anonymous;
        let mut gossipsub: gossipsub::Behaviour =
            gossipsub::Behaviour::new(authenticity, gossip_config)?;
        gossipsub.subscribe(&protocols.topic)?;
        let (score, thresholds) = scoring();
        gossipsub.with_peer_score(score, thresholds)?;
        let codec = request_response::cbor::codec::Codec::<Vec<u8>, Vec<u8>>::default()
            // CBOR spends up to two bytes on each byte of a list.
            .set_request_size_maximum(2 * SYNC_REQUEST_BYTES_MAX as u64 + 16)
            .set_response_size_maximum(2 * SYNC_BYTES_MAX as u64 + 16);
        let sync = request_response::cbor::Behaviour::with_codec(
            codec,
            [(protocols.sync.clone(), request_response::ProtocolSupport::Full)],
            request_response::Config::default().with_max_concurrent_streams(8),
        );
        let relay = || {
            relay::Behaviour::new(
                me,
                relay::Config {
                    max_reservations: RESERVATIONS_MAX,
                    max_circuits: CIRCUITS_MAX,
                    max_circuits_per_peer: CIRCUITS_PER_PEER_MAX,
                    max_circuit_duration: CIRCUIT_TIME_MAX,
                    max_circuit_bytes: CIRCUIT_BYTES_MAX,
                    ..relay::Config::default()
                },
            )
        };
        Ok(Self {
            kad,
            gossipsub,
            sync,
            stream: libp2p_stream::Behaviour::new(),
            relayed,
            relay: Toggle::from(nat.then(relay)),
            punch: Toggle::from(nat.then(|| dcutr::Behaviour::new(me))),
            tests: Toggle::from(nat.then(autonat::v2::client::Behaviour::default)),
            tester: Toggle::from(nat.then(autonat::v2::server::Behaviour::default)),
        })
    }
}

/// How gossipsub thinks of peers: as the engine says ([`Output::PeerScore`]), and a little worse of those
/// that break its own rules. Not of those that are slow, quiet, or many behind one address: members have
/// names, and are bounded per address when they connect.
///
/// [`Output::PeerScore`]: crate::engine::event::Output::PeerScore
fn scoring() -> (gossipsub::PeerScoreParams, gossipsub::PeerScoreThresholds) {
    let score = gossipsub::PeerScoreParams {
        app_specific_weight: 1.0,
        ip_colocation_factor_weight: 0.0,
        slow_peer_weight: 0.0,
        // A busy machine breaks some promises; a hundred in a few seconds are no accident. A guess.
        behaviour_penalty_weight: -0.1,
        behaviour_penalty_threshold: 20.0,
        behaviour_penalty_decay: 0.8,
        retain_score: RETAIN_SCORE,
        ..gossipsub::PeerScoreParams::default()
    };
    (score, gossipsub::PeerScoreThresholds::default())
}
