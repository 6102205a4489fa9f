//! The whole contract between the engine and whoever drives it: what goes in, what comes out.
//!
//! A driver (the node, or the simulator) hands every [`Input`] to
//! [`Engine::handle`](super::Engine::handle) with the time at which it happened, carries out every
//! [`Output`] in order, and calls [`Engine::handle_timeout`](super::Engine::handle_timeout) when
//! [`Engine::next_timeout`](super::Engine::next_timeout) has come.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::engine::forward::ForwardingSnapshot;
use crate::engine::measure::service::{CheckFailure, Subject};
use crate::engine::measure::{Health, HealthCheck, HealthPolicy, LinkReport, RouteReport, Sample};
use crate::engine::overlay::Pin;
use crate::engine::overlay::issuer::{NotLetIn, Secret};
use crate::engine::overlay::membership::{Credential, NetworkState, Roster};
use crate::engine::overlay::topology::Reshape;
use crate::engine::overlay::wire::{Objective, PeerAddresses, ServiceKind, ServiceRecord, Signed};
use crate::engine::predict::watch::LiveLoss;
use crate::engine::predict::{KnownChoice, QualityModel};
use crate::engine::route::Decision;
use crate::engine::traffic::message::Bottleneck;
use crate::engine::types::{NodeId, PublicKey, Route, ServiceName, Timestamp, TunnelId};

/// Names a request across [`Command`] and [`Output::Answer`]; the driver draws it.
pub type RequestId = u64;

/// Something that happened.
#[expect(
    clippy::large_enum_variant,
    reason = "only a command that publishes is large, and those are few"
)]
pub enum Input {
    /// A peer is connected, and showed that it belongs to the network.
    PeerConnected(PublicKey),
    /// The last connection to a peer closed.
    PeerDisconnected(NodeId),
    /// A peer said where it listens.
    PeerHeardOf(PeerAddresses),
    /// Datagrams can now be sent to this neighbour.
    LinkUp(NodeId),
    /// They no longer can.
    LinkDown(NodeId),
    /// A peer asks for [`Output::SyncResponse`].
    SyncRequested {
        /// Hands the answer back to the right question.
        token: u64,
        /// Who asks.
        from: NodeId,
        /// A [`SyncRequest`](crate::engine::overlay::wire::SyncRequest), unverified.
        bytes: Vec<u8>,
    },
    /// A peer answered [`Output::RequestSync`].
    SyncReceived {
        /// Who answered.
        from: NodeId,
        /// The answer, unverified.
        bytes: Vec<u8>,
    },
    /// Somebody asks to be let in, or a member for a new credential.
    JoinAsked {
        /// Hands the answer back to the right question.
        token: u64,
        /// Who asks.
        from: PublicKey,
        /// A [`JoinRequest`](crate::engine::overlay::wire::JoinRequest), unverified.
        bytes: Vec<u8>,
    },
    /// The issuer answered [`Output::RequestRenewal`].
    RenewalReceived {
        /// Who answered.
        from: NodeId,
        /// A [`JoinResponse`](crate::engine::overlay::wire::JoinResponse), unverified.
        bytes: Vec<u8>,
    },
    /// A peer that does not let this node in showed this revocation, unverified.
    RevocationShown(Box<Signed>),
    /// A gossip message arrived.
    Gossip {
        /// Hands the verdict back to the right message.
        token: u64,
        /// The peer that it came from, which need not be its author.
        from: NodeId,
        /// The message, unverified.
        bytes: Vec<u8>,
    },
    /// A probe came back.
    ProbeAnswered {
        /// From [`Output::SendProbe`].
        id: u64,
        /// Round-trip time as the data plane measured it (µs).
        rtt_us: u64,
    },
    /// The data plane's counters of the last slice.
    Slice(Vec<(NodeId, LinkReport)>),
    /// The data plane has left a silent route for the backup that the snapshot names.
    RouteSilent {
        /// The tunnel.
        tunnel: TunnelId,
        /// Number of the route that it left.
        route_id: u32,
    },
    /// The same, because a node of the route said that its next link is gone.
    RouteBroken {
        /// The tunnel.
        tunnel: TunnelId,
        /// Number of the route that it left.
        route_id: u32,
        /// Index in the route of the node that said so.
        at: usize,
    },
    /// What the traffic of tunnels in use met on their routes since the last report.
    Routes(Vec<(TunnelId, RouteReport)>),
    /// What the nodes of a route say to a reservation.
    ReserveAnswered {
        /// For which tunnel.
        tunnel: TunnelId,
        /// Number of the route that was asked.
        route_id: u32,
        /// The link that has not enough left, in the error; `None` when nobody answered.
        result: Result<(), Option<Bottleneck>>,
    },
    /// The DHT stored a record, or did not.
    DhtStored {
        /// From [`Output::DhtPut`].
        request: RequestId,
        /// What went wrong.
        error: Option<String>,
    },
    /// The DHT was searched.
    DhtFound {
        /// From [`Output::DhtGet`].
        request: RequestId,
        /// Records found, unverified.
        records: Vec<Vec<u8>>,
    },
    /// A check of a service ended.
    ServiceChecked {
        /// From [`Output::CheckService`].
        id: u64,
        /// How long the service took (µs), or why it failed.
        result: Result<u64, CheckFailure>,
    },
    /// A stream to a service failed, of this node or to it.
    ServiceDoubted {
        /// Which service.
        name: ServiceName,
        /// Who provides it.
        provider: NodeId,
    },
    /// What this node carries and uses, once a slice.
    Usage(Usage),
    /// A new model, or none.
    Model(Option<Arc<dyn QualityModel>>),
    /// A new model in shadow, which is asked and never decides, or none.
    Challenger(Option<Arc<dyn QualityModel>>),
    /// Somebody wants something.
    Command(Command),
}

/// What a person or a program asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Offer a service under a name.
    Publish {
        /// Comes back with the answer.
        request: RequestId,
        /// What to offer.
        service: ServiceSpec,
    },
    /// Stop offering it.
    Withdraw {
        /// Comes back with the answer.
        request: RequestId,
        /// Which.
        name: ServiceName,
    },
    /// Who provides a name?
    Resolve {
        /// Comes back with the answer.
        request: RequestId,
        /// Which.
        name: ServiceName,
        /// Ask the DHT even when gossip brought the record already.
        from_dht: bool,
    },
    /// How long does it take to a node and back?
    Ping {
        /// Comes back with the answer.
        request: RequestId,
        /// Which.
        node: NodeId,
    },
    /// Open an invitation to the network.
    Invite {
        /// Comes back with the answer.
        request: RequestId,
        /// The driver draws it.
        secret: Secret,
        /// How many nodes it lets in.
        uses: u32,
        /// How long it lasts.
        lifetime: Duration,
    },
    /// Let a key in without an invitation.
    Certify {
        /// Comes back with the answer.
        request: RequestId,
        /// Which.
        key: PublicKey,
    },
    /// Put a key out, for good.
    Revoke {
        /// Comes back with the answer.
        request: RequestId,
        /// Which.
        key: PublicKey,
    },
    /// Give a name to an owner.
    Grant {
        /// Comes back with the answer.
        request: RequestId,
        /// The name.
        name: ServiceName,
        /// To whom.
        owner: PublicKey,
    },
    /// Let another node publish a name of this node's.
    Delegate {
        /// Comes back with the answer.
        request: RequestId,
        /// The name.
        name: ServiceName,
        /// Who may publish it.
        provider: PublicKey,
        /// For how long.
        lifetime: Duration,
    },
    /// From now on this owner has the name, as far as this node is concerned.
    Trust {
        /// Comes back with the answer.
        request: RequestId,
        /// The name.
        name: ServiceName,
        /// Its owner.
        owner: PublicKey,
    },
    /// Route a tunnel to a node.
    OpenTunnel {
        /// The driver draws it.
        tunnel: TunnelId,
        /// The far end.
        destination: NodeId,
        /// A fixed path instead of a chosen one.
        forced: Option<Route>,
        /// What it wants from its routes.
        objective: Objective,
        /// Another tunnel of this node to the same far end, whose relays it is to avoid.
        beside: Option<TunnelId>,
        /// Bandwidth to be set aside for it on its route (bytes/s).
        reserve: Option<u64>,
    },
    /// No longer.
    CloseTunnel(TunnelId),
}

/// What a node carries for others, and what it uses of others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tunnels that end here.
    pub tunnels: u32,
    /// Streams and UDP flows that are open to its services.
    pub streams: u32,
    /// The services to which it has tunnels that carry TCP, with their providers.
    pub services: BTreeSet<(ServiceName, NodeId)>,
}

/// A service as its operator describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceSpec {
    /// The name.
    pub name: ServiceName,
    /// How it speaks.
    pub kind: ServiceKind,
    /// Free text for people.
    pub metadata: BTreeMap<String, String>,
    /// Nodes that may connect; everybody when empty.
    pub allowed: Vec<NodeId>,
    /// Time to live of each record (s).
    pub ttl_s: u32,
    /// What it wants from its routes.
    pub objective: Objective,
    /// What lets this node publish the name of another owner: a
    /// [`Delegation`](crate::engine::overlay::Delegation), signed by the owner.
    pub delegation: Option<Signed>,
    /// How it is checked; nobody else is told.
    pub health: HealthPolicy,
}

/// Something to be done.
pub enum Output {
    /// Connect to a peer at one of these multiaddresses.
    Dial(Vec<String>),
    /// Ask a peer for its peer list, and for what it has of gossip and this node has not.
    RequestSync {
        /// Whom.
        node: NodeId,
        /// A [`SyncRequest`](crate::engine::overlay::wire::SyncRequest).
        bytes: Vec<u8>,
    },
    /// Answer [`Input::SyncRequested`].
    SyncResponse {
        /// From the question.
        token: u64,
        /// The answer.
        bytes: Vec<u8>,
    },
    /// Leave [`Input::SyncRequested`] without an answer.
    SyncRefused {
        /// From the question.
        token: u64,
    },
    /// Answer [`Input::JoinAsked`].
    JoinAnswer {
        /// From the question.
        token: u64,
        /// The answer.
        bytes: Vec<u8>,
    },
    /// Ask this peer, the issuer, for a new credential.
    RequestRenewal(NodeId),
    /// Who belongs to the network from now on; connections of others end.
    Roster(Arc<Roster>),
    /// Close every connection to this peer.
    Disconnect(NodeId),
    /// What a peer's gossip is worth from now on: 0 for everybody who sends nothing wrong, else less
    /// (see [`GossipManager`](crate::engine::overlay::GossipManager)).
    PeerScore(NodeId, f64),
    /// Keep this over restarts.
    KeepNetwork(Box<NetworkState>),
    /// Keep over restarts to whom names belong, as far as it was seen.
    KeepPins(Vec<Pin>),
    /// Tell everybody.
    Publish(Vec<u8>),
    /// Whether a gossip message may travel on; said once for each, a moment later for one that had to wait.
    GossipVerdict {
        /// From [`Input::Gossip`].
        token: u64,
        /// What becomes of it.
        verdict: Verdict,
    },
    /// Send a probe over this route and report the answer.
    SendProbe {
        /// Comes back with the answer.
        id: u64,
        /// Where to; the last node answers.
        route: Route,
    },
    /// What the data plane forwards by from now on.
    Forwarding(Arc<ForwardingSnapshot>),
    /// Store a signed record under a name.
    DhtPut {
        /// Comes back with the result.
        request: RequestId,
        /// The name.
        name: ServiceName,
        /// The signed record.
        bytes: Vec<u8>,
    },
    /// Search the records of a name.
    DhtGet {
        /// Comes back with the result.
        request: RequestId,
        /// The name.
        name: ServiceName,
    },
    /// Check a service; every check is to be answered.
    CheckService {
        /// Comes back with the result.
        id: u64,
        /// What, and from where.
        subject: Subject,
        /// How; `None` through this node's tunnel to the provider.
        check: Option<HealthCheck>,
    },
    /// Keep this observation.
    Record(Sample),
    /// Keep this decision.
    Decision(Box<Decision>),
    /// Keep this choice, of which it became known what each route cost.
    Choice(Box<KnownChoice>),
    /// Answer a command.
    Answer {
        /// From the command.
        request: RequestId,
        /// Done, or why not.
        answer: Result<Answer, CommandError>,
    },
    /// For the log.
    Notice(Notice),
}

/// What becomes of a gossip message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Valid and new: it travels on.
    Accept,
    /// Valid, but known already or of no use: it ends here.
    Ignore,
    /// Malformed or forged: it ends here.
    Reject,
}

/// What a command achieved.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Published, and acknowledged by a majority of the responsible nodes that are known; or, on a
    /// node without peers, stored by itself.
    Published {
        /// Sequence number of the record.
        sequence: u64,
    },
    /// Withdrawn.
    Withdrawn,
    /// A probe was sent over the route that a tunnel would take.
    Pinged {
        /// Which.
        route: Route,
        /// Its round trip (µs); `None` when it did not come back in time.
        rtt_us: Option<u64>,
    },
    /// The invitation is open.
    Invited {
        /// When it ends.
        expires_at: Timestamp,
    },
    /// The key was let in.
    Certified(Credential),
    /// The owner's signed delegation.
    Delegated(Signed),
    /// It is done.
    Done,
    /// The providers found.
    Resolved {
        /// Keys and records.
        providers: Vec<(PublicKey, ServiceRecord)>,
        /// Known already, without asking the DHT.
        from_gossip: bool,
    },
}

/// Why a command failed. The text says what, why, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// Nobody provides this name.
    #[error("nobody publishes {0}; see 'meshwise service list' for the names known here")]
    UnknownName(ServiceName),
    /// No route to a node is alive.
    #[error("no route leads to {0}; see 'meshwise route list' for the nodes that can be reached")]
    NoRoute(NodeId),
    /// The name is not published by this node.
    #[error("this node does not publish {0}; see 'meshwise service list'")]
    NotPublishedHere(ServiceName),
    /// The registry refused the record.
    #[error("{0}")]
    Refused(#[from] crate::engine::overlay::RecordError),
    /// A name of this node's own that would be another's.
    #[error("this node publishes {0} itself; run 'meshwise service withdraw {0}' first")]
    PublishedHere(ServiceName),
    /// A delegation to oneself.
    #[error("the owner of {0} needs no delegation to publish it")]
    DelegatesToItself(ServiceName),
    /// The DHT did not store the record on a majority of the responsible nodes.
    #[error(
        "{name} was announced by gossip, but the DHT did not store it: {reason}; try again when more nodes are connected"
    )]
    NotStored {
        /// The name.
        name: ServiceName,
        /// What the DHT said.
        reason: String,
    },
    /// Another node holds the root key.
    #[error(
        "this node does not hold the root key of its network; run this at the node where the network was created"
    )]
    NotIssuer,
    /// The issuer would put itself out.
    #[error("this is the node that holds the root key; it cannot revoke itself")]
    RevokesItself,
    /// The key cannot be let in.
    #[error("{0}")]
    NotLetIn(NotLetIn),
    /// Too many at once.
    #[error("{0} are as many as this node takes at once; try again later")]
    Busy(&'static str),
}

/// What [`Notice::Dropped`] says of a message whose time no clock near ours can have.
pub const CLOCK: &str = "clock";

/// Something a person may want to read in the log, and a counter may count.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// A link is made or given up, for the shape of the mesh.
    Shape(Reshape),
    /// The root put a key out.
    Revoked {
        /// Its node.
        node: NodeId,
    },
    /// The mesh's state arrived from a first peer.
    Joined,
    /// Every bootstrap round failed.
    BootstrapGaveUp,
    /// The root has granted a name that this node publishes to another owner: it is withdrawn.
    NameGranted {
        /// Which.
        name: ServiceName,
        /// To whom.
        owner: NodeId,
    },
    /// Somebody publishes a name that belongs to another owner. Said once for each name and claimant.
    ForeignName(crate::engine::overlay::RecordError),
    /// A message was dropped.
    Dropped {
        /// What kind.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// A link came up or went down.
    Link {
        /// The neighbour.
        neighbour: NodeId,
        /// Carries traffic now.
        up: bool,
    },
    /// The health of a service changed, or is known for the first time: by this node's own checks, or
    /// by the word of its provider.
    ServiceHealth {
        /// Which, and who says so.
        subject: Subject,
        /// How it is now.
        health: Health,
        /// Why the last check failed, when this node made it.
        failure: Option<CheckFailure>,
    },
    /// A tunnel changed its route.
    RouteChanged {
        /// The tunnel.
        tunnel: TunnelId,
        /// The new route, `None` when there is none.
        route: Option<Route>,
        /// Why.
        reason: &'static str,
    },
    /// A route in use no longer answers; its tunnel is decided at once.
    RouteLost {
        /// The tunnel.
        tunnel: TunnelId,
        /// The node that said so; `None` when the route fell silent.
        at: Option<NodeId>,
    },
    /// The model did worse than the moving average, which decides from now on.
    ModelWithdrawn {
        /// Version of the model.
        version: String,
        /// By how much, and over how many probes.
        loss: LiveLoss,
    },
    /// The residuals of the model changed: it is time to train again.
    ModelDrift {
        /// Version of the model.
        version: String,
    },
}
