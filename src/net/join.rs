//! Joining: one request and one answer, which a stranger may exchange with any node of the network.
//!
//! The request is a [`JoinRequest`], the answer a [`JoinResponse`], each in postcard and as long as
//! its half of the stream, at most [`JOIN_BYTES_MAX`]. The node that answers knows who asks by the key
//! that the connection proved, and the one that asks, who answers: it dials the issuer's peer id.

use std::io;
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, StreamExt};
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::{DialError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, StreamProtocol, Swarm, SwarmBuilder, noise, tcp, yamux};

use super::address::check_dial;
use super::behaviour::Protocols;
use super::identity::{self, Identity};
use super::now;
use crate::engine::overlay::registry::CLOCK_SKEW;
use crate::engine::overlay::token::Invite;
use crate::engine::overlay::wire::{self, JOIN_BYTES_MAX, JoinRequest, JoinResponse};
use crate::engine::overlay::{Credential, NotLetIn, NotMember, Roster};

/// How long joining may take in all.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Requests and answers as they are.
#[derive(Clone, Default)]
pub(super) struct Raw;

pub(super) type Joining = request_response::Behaviour<Raw>;

/// The behaviour of both sides.
pub(super) fn joining(protocol: StreamProtocol) -> Joining {
    let config = request_response::Config::default()
        .with_request_timeout(JOIN_TIMEOUT)
        .with_max_concurrent_streams(2);
    Joining::with_codec(Raw, [(protocol, ProtocolSupport::Full)], config)
}

async fn read<T: AsyncRead + Unpin + Send>(stream: &mut T) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.take(JOIN_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).await?;
    if bytes.len() > JOIN_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "longer than it may be"));
    }
    Ok(bytes)
}

impl request_response::Codec for Raw {
    type Protocol = StreamProtocol;
    type Request = Vec<u8>;
    type Response = Vec<u8>;

    async fn read_request<T: AsyncRead + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        stream: &mut T,
    ) -> io::Result<Vec<u8>> {
        read(stream).await
    }

    async fn read_response<T: AsyncRead + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        stream: &mut T,
    ) -> io::Result<Vec<u8>> {
        read(stream).await
    }

    async fn write_request<T: AsyncWrite + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        stream: &mut T,
        request: Vec<u8>,
    ) -> io::Result<()> {
        stream.write_all(&request).await
    }

    async fn write_response<T: AsyncWrite + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        stream: &mut T,
        response: Vec<u8>,
    ) -> io::Result<()> {
        stream.write_all(&response).await
    }
}

/// Where invitations come from.
const INVITE: &str = "'meshwise network invite' on the node that made this one";

/// The end of the sentence that asks for a new invitation.
fn where_from(why: &NotLetIn) -> String {
    match why {
        NotLetIn::Unknown | NotLetIn::Expired => format!(", of {INVITE}"),
        _ => String::new(),
    }
}

/// Why a node did not join. One line: what, why, what to do.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The invitation's time is over.
    #[error("the invitation to '{0}' has expired: ask for a new one, of {INVITE}")]
    Expired(String),
    /// This very node made the invitation.
    #[error("this node made the invitation itself; use it at the node that is to join")]
    Own,
    /// The invitation holds no address that can be dialled.
    #[error(
        "the invitation says no address of the node that made it; let that node listen on one that \
         can be reached from here, and ask for a new invitation"
    )]
    NoAddress,
    /// The issuer does not answer.
    #[error(
        "the node that made the invitation does not answer at {addresses} ({reason}); see that it \
         runs and can be reached from here"
    )]
    Unreachable {
        /// Where it was tried.
        addresses: String,
        /// What the system said.
        reason: String,
    },
    /// It is reached and says nothing to the request.
    #[error(
        "the node that made the invitation broke off ({0}); it may be busy, try again in a minute"
    )]
    BrokenOff(String),
    /// The issuer does not let this node in.
    #[error("cannot join '{name}': {why}{}", where_from(.why))]
    Refused {
        /// Name of the network.
        name: String,
        /// What the issuer said.
        why: NotLetIn,
    },
    /// What the issuer sent is no credential of the network.
    #[error(
        "the answer to the invitation is no valid credential ({0}); compare the clocks and versions of the two nodes"
    )]
    Invalid(String),
    /// The network stack does not start.
    #[error("cannot start the network: {0}")]
    Build(String),
}

/// Redeems an invitation at its issuer: the node with this identity belongs to the network from then
/// on. Takes at most [`JOIN_TIMEOUT`]; asking again after an answer that was lost is safe.
///
/// # Errors
/// [`JoinError`].
pub async fn join(identity: &Identity, invite: &Invite) -> Result<Credential, JoinError> {
    // The issuer's clock decides; this one may be wrong.
    if invite.expires_at + CLOCK_SKEW <= now() {
        return Err(JoinError::Expired(invite.name.clone()));
    }
    if invite.issuer == identity.public_key() {
        return Err(JoinError::Own);
    }
    let issuer = identity::peer_id(&invite.issuer).ok_or(JoinError::NoAddress)?;
    let addresses = addresses(invite, issuer);
    if addresses.is_empty() {
        return Err(JoinError::NoAddress);
    }
    let mut swarm = swarm(identity, invite)?;
    let request = wire::encode(&JoinRequest::Redeem(invite.secret));
    swarm.behaviour_mut().send_request_with_addresses(&issuer, request, addresses);
    let asking = tokio::time::timeout(JOIN_TIMEOUT, answer(&mut swarm));
    let reason = match asking.await {
        Ok(Ok(bytes)) => return accept(identity, invite, &bytes),
        Ok(Err(Silence::BrokenOff(reason))) => return Err(JoinError::BrokenOff(reason)),
        Ok(Err(Silence::Unreachable(reason))) => reason,
        Err(_) => format!("no answer within {} s", JOIN_TIMEOUT.as_secs()),
    };
    Err(JoinError::Unreachable { addresses: invite.addresses.join(", "), reason })
}

/// Where the issuer can be dialled; no other peer can answer there.
fn addresses(invite: &Invite, issuer: PeerId) -> Vec<Multiaddr> {
    let parsed = invite.addresses.iter().filter_map(|text| text.parse::<Multiaddr>().ok());
    let usable = parsed.filter(|address| check_dial(address).is_ok());
    usable.filter_map(|address| address.with_p2p(issuer).ok()).collect()
}

fn swarm(identity: &Identity, invite: &Invite) -> Result<Swarm<Joining>, JoinError> {
    let build = |error: &dyn std::fmt::Display| JoinError::Build(error.to_string());
    let protocols = Protocols::new(&invite.root.node_id().to_string());
    let protocol = protocols.map_err(|error| build(&error))?.join;
    Ok(SwarmBuilder::with_existing_identity(identity.keypair())
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .map_err(|error| build(&error))?
        .with_quic()
        .with_behaviour(|_| joining(protocol))
        .map_err(|error| build(&error))?
        .build())
}

/// Why there is no answer.
enum Silence {
    Unreachable(String),
    BrokenOff(String),
}

async fn answer(swarm: &mut Swarm<Joining>) -> Result<Vec<u8>, Silence> {
    use request_response::{Event, Message, OutboundFailure};
    let mut dialled = String::from("it cannot be dialled");
    loop {
        match swarm.select_next_some().await {
            SwarmEvent::Behaviour(Event::Message {
                message: Message::Response { response, .. },
                ..
            }) => return Ok(response),
            SwarmEvent::Behaviour(Event::OutboundFailure { error, .. }) => {
                return Err(match error {
                    OutboundFailure::DialFailure => Silence::Unreachable(dialled),
                    OutboundFailure::UnsupportedProtocols => {
                        Silence::BrokenOff("it is of another network now".into())
                    }
                    error => Silence::BrokenOff(error.to_string()),
                });
            }
            SwarmEvent::OutgoingConnectionError { error, .. } => dialled = reason(&error),
            _ => {}
        }
    }
}

/// What the system said to a dial, in short.
fn reason(error: &DialError) -> String {
    match error {
        DialError::Transport(tried) => match tried.first() {
            Some((_, error)) => super::address::innermost(error),
            None => "it cannot be dialled".into(),
        },
        DialError::WrongPeerId { .. } => "another node answers there".into(),
        error => error.to_string(),
    }
}

/// Judges an answer.
fn accept(identity: &Identity, invite: &Invite, bytes: &[u8]) -> Result<Credential, JoinError> {
    let response: JoinResponse = wire::decode(bytes, JOIN_BYTES_MAX)
        .map_err(|error| JoinError::Invalid(error.to_string()))?;
    let name = invite.name.clone();
    let credential = response.map_err(|why| JoinError::Refused { name, why })?;
    let roster = Roster::new(invite.root, credential.clone());
    let verdict = roster.check(&identity.public_key(), &credential, now());
    verdict.map_err(|why: NotMember| JoinError::Invalid(why.to_string()))?;
    Ok(credential)
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;

    use super::*;
    use crate::engine::types::{PublicKey, Timestamp};

    fn invite() -> Invite {
        let root = SigningKey::from_bytes(&[9; 32]);
        Invite {
            name: "home".into(),
            root: PublicKey(root.verifying_key().to_bytes()),
            issuer: Identity::generate().public_key(),
            addresses: vec![],
            secret: [3; 16],
            expires_at: now() + Duration::from_secs(60),
        }
    }

    #[tokio::test]
    async fn what_cannot_work_is_said_at_once() {
        let identity = Identity::generate();
        let late = Invite { expires_at: Timestamp(1), ..invite() };
        assert!(matches!(join(&identity, &late).await, Err(JoinError::Expired(_))));
        let own = Invite { issuer: identity.public_key(), ..invite() };
        assert!(matches!(join(&identity, &own).await, Err(JoinError::Own)));
        assert!(matches!(join(&identity, &invite()).await, Err(JoinError::NoAddress)));
        let somebody = identity::peer_id(&Identity::generate().public_key()).unwrap();
        let elsewhere = format!("/ip4/127.0.0.1/tcp/1/p2p/{somebody}");
        let other = Invite { addresses: vec!["/dns4/a/tcp/1".into(), elsewhere], ..invite() };
        assert!(matches!(join(&identity, &other).await, Err(JoinError::NoAddress)));
        let closed = Invite { addresses: vec!["/ip4/127.0.0.1/tcp/1".into()], ..invite() };
        let error = join(&identity, &closed).await.unwrap_err();
        assert!(matches!(error, JoinError::Unreachable { .. }));
        let text = error.to_string();
        assert!(text.contains("/tcp/1") && text.contains("refused"), "{text}");
    }

    #[test]
    fn only_a_credential_of_the_root_for_this_key_is_taken() {
        let (identity, invite) = (Identity::generate(), invite());
        let signed = |root: u8, key: &PublicKey| -> JoinResponse {
            let root = SigningKey::from_bytes(&[root; 32]);
            Ok(Credential::issue(&root, key, now(), now() + Duration::from_secs(60)))
        };
        let judge = |response: &JoinResponse| accept(&identity, &invite, &wire::encode(response));
        assert!(judge(&signed(9, &identity.public_key())).is_ok());
        for wrong in [signed(8, &identity.public_key()), signed(9, &invite.issuer)] {
            assert!(matches!(judge(&wrong), Err(JoinError::Invalid(_))));
        }
        let refused = judge(&Err(NotLetIn::Unknown)).unwrap_err().to_string();
        assert!(refused.contains("'home'") && refused.contains("used up"), "{refused}");
        assert!(refused.contains("'meshwise network invite'"), "{refused}");
        assert!(matches!(accept(&identity, &invite, &[7]), Err(JoinError::Invalid(_))));
    }
}
