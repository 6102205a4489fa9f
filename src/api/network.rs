//! What the control API says and does about the network that the node belongs to. Units are in the
//! names.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};

use super::server::{Answer, wrong};
use crate::engine::overlay::issuer::{INVITATION_LIFETIME_MAX, USES_MAX};
use crate::engine::overlay::membership::Credential;
use crate::engine::overlay::token::Token;
use crate::engine::overlay::wire::{ADDRESS_BYTES_MAX, ADDRESSES_MAX};
use crate::engine::types::{NodeId, PublicKey, ServiceName};
use crate::node::network::Network as Files;
use crate::node::{Member as Seen, NodeHandle, View, parse_peer_id, peer_id_text};

/// `GET /v1/network`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name, for people.
    pub name: String,
    /// Short id of its root key.
    pub root: String,
    /// Short id of the node that signs credentials.
    pub issuer: String,
    /// Its peer id.
    pub issuer_peer_id: String,
    /// Whether this node holds the root key.
    pub holds_root_key: bool,
    /// When this node's credential was signed (µs since the epoch).
    pub issued_us: u64,
    /// When it ends (µs since the epoch).
    pub expires_us: u64,
    /// Whether the root has revoked this node, as far as it knows.
    #[serde(default)]
    pub revoked: bool,
    /// Nodes whose credentials were seen, this one included; none when the node does not run.
    pub members_seen: Option<usize>,
}

/// One entry of `GET /v1/network/members`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Short id.
    pub node: String,
    /// libp2p peer id.
    pub peer_id: String,
    /// When its newest credential was signed (µs since the epoch).
    pub since_us: Option<u64>,
    /// When that ends (µs since the epoch).
    pub expires_us: Option<u64>,
    /// Whether it is this node itself.
    pub this: bool,
    /// Whether it is connected to this node.
    pub connected: bool,
    /// Whether the root has put it out.
    pub revoked: bool,
}

/// `GET /v1/network/members`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// Whether the list holds all that were let in, as it does on the node with the root key;
    /// elsewhere it is who was seen.
    pub complete: bool,
    /// The members.
    pub members: Vec<Member>,
}

/// `POST /v1/network/invitations`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invite {
    /// How many nodes it lets in, 1 to 1,000.
    pub uses: u32,
    /// How long it lasts (s), 1 to 30 days.
    pub expires_s: u64,
    /// Multiaddresses of this node that it does not know itself, such as that of a router in front
    /// of it.
    #[serde(default)]
    pub addresses: Vec<String>,
}

/// Answer to `POST /v1/network/invitations`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invited {
    /// What to type at the other node.
    pub token: String,
    /// Name of the network.
    pub network: String,
    /// How many nodes it lets in.
    pub uses: u32,
    /// When it ends (µs since the epoch).
    pub expires_us: u64,
    /// Where the new node will look for this one.
    pub addresses: Vec<String>,
}

/// `POST /v1/network/certificates`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Certify {
    /// Peer id of whom to let in.
    pub peer: String,
}

/// Answer to `POST /v1/network/certificates`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certified {
    /// What to type at that node.
    pub token: String,
    /// Name of the network.
    pub network: String,
    /// Its short id.
    pub node: String,
    /// Its peer id.
    pub peer_id: String,
    /// When the certificate ends (µs since the epoch).
    pub expires_us: u64,
}

/// `POST /v1/network/revocations`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoke {
    /// Peer id of whom to put out, or node id of a member that is known.
    pub peer: String,
}

/// Answer to `POST /v1/network/revocations`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// Short id.
    pub node: String,
    /// Peer id.
    pub peer_id: String,
}

/// `POST /v1/network/grants`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// Name of a service.
    pub name: String,
    /// Peer id of the owner, or node id of a member that is known.
    pub peer: String,
}

/// Answer to `POST /v1/network/grants`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// The name.
    pub name: String,
    /// Short id of the owner.
    pub node: String,
    /// Its peer id.
    pub peer_id: String,
}

impl Network {
    /// From the running node.
    pub fn look(view: &View<'_>) -> Self {
        let engine = &view.engine;
        let roster = engine.membership().roster();
        let me = engine.key();
        let others = engine.membership().seen().filter(|(key, _)| **key != me).count();
        let (name, issuer) = (engine.network_name(), engine.network_issuer());
        let holds = engine.issuer().is_some();
        let about = Self::new(name, &roster.root, &issuer, holds, &roster.credential);
        Self { members_seen: Some(others + 1), revoked: roster.is_revoked(&me), ..about }
    }

    /// From the files of the data directory of the node with this key.
    pub fn of(files: &Files, me: &PublicKey) -> Self {
        let state = &files.state;
        let holds = files.root.is_some();
        let revoked = state.membership().roster().is_revoked(me);
        let about = Self::new(&state.name, &state.root, &state.issuer, holds, &state.credential);
        Self { revoked, ..about }
    }

    fn new(
        name: &str,
        root: &PublicKey,
        issuer: &PublicKey,
        holds_root_key: bool,
        credential: &Credential,
    ) -> Self {
        Self {
            name: name.to_owned(),
            root: root.node_id().to_string(),
            issuer: issuer.node_id().to_string(),
            issuer_peer_id: peer_id_text(issuer),
            holds_root_key,
            issued_us: credential.issued_at.as_micros(),
            expires_us: credential.expires_at.as_micros(),
            revoked: false,
            members_seen: None,
        }
    }
}

impl Member {
    fn of(member: &Seen, me: &PublicKey) -> Self {
        Self {
            node: member.key.node_id().to_string(),
            peer_id: peer_id_text(&member.key),
            since_us: member.times.map(|(since, _)| since.as_micros()),
            expires_us: member.times.map(|(_, until)| until.as_micros()),
            this: member.key == *me,
            connected: member.connected,
            revoked: member.revoked,
        }
    }
}

pub(super) async fn about(State(node): State<NodeHandle>) -> Answer<Network> {
    Ok(Json(node.inspect(|view| Network::look(view)).await?))
}

pub(super) async fn members(State(node): State<NodeHandle>) -> Answer<Members> {
    let found = node.members().await?;
    let me = node.key();
    let members = found.list.iter().map(|member| Member::of(member, &me)).collect();
    Ok(Json(Members { complete: found.complete, members }))
}

pub(super) async fn invite(
    State(node): State<NodeHandle>,
    Json(body): Json<Invite>,
) -> Answer<Invited> {
    let Invite { uses, expires_s, addresses } = body;
    let longest = INVITATION_LIFETIME_MAX.as_secs();
    if !(1..=USES_MAX).contains(&uses) {
        return Err(wrong(format!("an invitation lets in 1 to {USES_MAX} nodes, not {uses}")));
    }
    if !(1..=longest).contains(&expires_s) {
        return Err(wrong(format!("an invitation lasts 1 s to {} days", longest / 86_400)));
    }
    if addresses.len() > ADDRESSES_MAX {
        return Err(wrong(format!("an invitation holds at most {ADDRESSES_MAX} addresses")));
    }
    if let Some(address) = addresses.iter().find(|address| !is_address(address)) {
        return Err(wrong(format!(
            "'{address}' is not an address to connect to; write for example /ip4/203.0.113.5/tcp/4747"
        )));
    }
    let invite = node.invite(uses, Duration::from_secs(expires_s), addresses).await?;
    Ok(Json(Invited {
        network: invite.name.clone(),
        uses,
        expires_us: invite.expires_at.as_micros(),
        addresses: invite.addresses.clone(),
        token: Token::Invite(invite).to_string(),
    }))
}

pub(super) async fn certify(
    State(node): State<NodeHandle>,
    Json(body): Json<Certify>,
) -> Answer<Certified> {
    let key = parse_peer_id(&body.peer).map_err(wrong)?;
    let certificate = node.certify(key).await?;
    Ok(Json(Certified {
        network: certificate.name.clone(),
        node: key.node_id().to_string(),
        peer_id: peer_id_text(&key),
        expires_us: certificate.credential.expires_at.as_micros(),
        token: Token::Certificate(certificate).to_string(),
    }))
}

pub(super) async fn revoke(
    State(node): State<NodeHandle>,
    Json(body): Json<Revoke>,
) -> Answer<Revoked> {
    let key = key_of(&node, &body.peer).await?;
    node.revoke(key).await?;
    Ok(Json(Revoked { node: key.node_id().to_string(), peer_id: peer_id_text(&key) }))
}

pub(super) async fn grant(
    State(node): State<NodeHandle>,
    Json(body): Json<Grant>,
) -> Answer<Granted> {
    let name: ServiceName = body.name.parse().map_err(wrong)?;
    let owner = key_of(&node, &body.peer).await?;
    node.grant(name.clone(), owner).await?;
    Ok(Json(Granted {
        name: name.to_string(),
        node: owner.node_id().to_string(),
        peer_id: peer_id_text(&owner),
    }))
}

/// The key of a peer id, or of the node id of a member that is known.
pub(super) async fn key_of(
    node: &NodeHandle,
    text: &str,
) -> Result<PublicKey, super::server::Failure> {
    match text.parse::<NodeId>() {
        Ok(id) => Ok(node.key_of(id).await?),
        Err(_) => parse_peer_id(text).map_err(|_| {
            let see = "see 'meshwise network members'";
            wrong(format!("'{text}' is neither a node id nor a peer id; {see}"))
        }),
    }
}

/// Whether a text looks like a multiaddress that begins with an IP address; names are not looked up.
fn is_address(text: &str) -> bool {
    text.len() <= ADDRESS_BYTES_MAX && (text.starts_with("/ip4/") || text.starts_with("/ip6/"))
}
