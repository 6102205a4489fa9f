//! The three steps of admission, on one stream of a connection.
//!
//! | | whoever dialled | | whoever was dialled |
//! |---|---|---|---|
//! | 1 | shows its credential | `Hello` -> | judges it, and serves its streams from now on |
//! | 2 | judges it, serves, and opens streams from now on | <- `Welcome` | shows its own |
//! | 3 | | `Ready` -> | opens streams from now on |
//!
//! Instead of each step `Refused` says why not; who was revoked is shown the revocation (`Revoked`), which
//! it can verify, unlike a text. A frame is two bytes of length (big endian) and the
//! postcard encoding of a [`Frame`]. Whose credential it must be is known: the connection has proved
//! the key.

use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use serde::{Deserialize, Serialize};

use super::{ADMISSION_TIMEOUT, Gate};
use crate::engine::overlay::wire::{self, Signed};
use crate::engine::overlay::{Credential, NotMember};
use crate::engine::types::PublicKey;
use crate::net::{Members, now};

/// Longest frame (bytes): a refusal's text, and some.
const FRAME_BYTES_MAX: usize = 512;
/// Most of a refusal's text that is kept (characters).
const TEXT_MAX: usize = 200;
/// How long a refused peer may take to read why.
const LINGER: Duration = Duration::from_secs(1);

/// One step, or its refusal. See the module documentation.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Frame {
    /// Step 1.
    Hello(Credential),
    /// Step 2.
    Welcome(Credential),
    /// Instead of any step: why.
    Refused(String),
    /// Step 3.
    Ready,
    /// Instead of any step: the root's word that the other side's key is out, a
    /// [`Revocation`](crate::engine::overlay::membership::Revocation).
    Revoked(Signed),
}

impl Frame {
    /// From the bytes that follow the length.
    ///
    /// # Errors
    /// [`Failure::Malformed`], for arbitrary bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Failure> {
        wire::decode(bytes, FRAME_BYTES_MAX).map_err(|_| Failure::Malformed)
    }
}

/// Why a connection was not admitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The peer is no member, and is told so.
    #[error("it is no member: {0}")]
    Stranger(#[from] NotMember),
    /// The peer takes this node for no member. What it says is not to be trusted.
    #[error("it does not let this node in: {0:?}")]
    Refused(String),
    /// The peer showed that the root has revoked this node's key, as it says: unverified.
    #[error("it shows that this node was revoked")]
    Revoked(Box<Signed>),
    /// The peer does not speak the protocol: it is of another network, or no node of ours at all.
    #[error("it speaks no protocol of this network")]
    Foreign,
    /// The peer said nothing, or not enough.
    #[error("no verdict within {} s", ADMISSION_TIMEOUT.as_secs())]
    TimedOut,
    /// The stream broke off.
    #[error("the handshake broke off")]
    Broken,
    /// The peer said what it may not say here.
    #[error("the handshake was not understood")]
    Malformed,
}

impl Failure {
    /// A word for counters.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Stranger(_) => "admission-stranger",
            Self::Refused(_) | Self::Revoked(_) => "admission-refused-by-peer",
            Self::Foreign => "admission-foreign",
            Self::TimedOut => "admission-timed-out",
            Self::Broken => "admission-broken",
            Self::Malformed => "admission-malformed",
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(_: std::io::Error) -> Self {
        Self::Broken
    }
}

/// The part of whoever dialled. Returns the other side's credential; a stranger is still to be
/// [told](tell).
pub(super) async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    key: PublicKey,
    members: &Members,
    gate: &Gate,
) -> Result<Credential, Failure> {
    let own = members.load().credential.clone();
    send(stream, &Frame::Hello(own)).await?;
    let credential = match receive(stream).await? {
        Frame::Welcome(credential) => credential,
        Frame::Refused(text) => return Err(refused(&text)),
        Frame::Revoked(signed) => return Err(Failure::Revoked(Box::new(signed))),
        Frame::Hello(_) | Frame::Ready => return Err(Failure::Malformed),
    };
    members.load().check(&key, &credential, now())?;
    gate.open_inbound();
    gate.open_outbound();
    send(stream, &Frame::Ready).await?;
    // The other side may have closed it already.
    let _ = stream.close().await;
    Ok(credential)
}

/// The part of whoever was dialled. Returns the other side's credential; a stranger is still to be
/// [told](tell).
pub(super) async fn answer<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    key: PublicKey,
    members: &Members,
    gate: &Gate,
) -> Result<Credential, Failure> {
    let Frame::Hello(credential) = receive(stream).await? else {
        return Err(Failure::Malformed);
    };
    members.load().check(&key, &credential, now())?;
    // Before the other side hears of it: it opens streams as soon as it does.
    gate.open_inbound();
    let own = members.load().credential.clone();
    send(stream, &Frame::Welcome(own)).await?;
    match receive(stream).await? {
        Frame::Ready => {}
        Frame::Refused(text) => return Err(refused(&text)),
        Frame::Revoked(signed) => return Err(Failure::Revoked(Box::new(signed))),
        Frame::Hello(_) | Frame::Welcome(_) => return Err(Failure::Malformed),
    }
    gate.open_outbound();
    let _ = stream.close().await;
    Ok(credential)
}

/// Tells the other side, which has this key, why it is not admitted.
pub(super) async fn tell<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    key: PublicKey,
    members: &Members,
    why: NotMember,
) {
    let frame = match members.load().revocation(&key) {
        Some(revocation) => Frame::Revoked(revocation.clone()),
        None => Frame::Refused(why.to_string()),
    };
    let telling = async {
        send(&mut stream, &frame).await?;
        stream.close().await?;
        // Until it has read it: what is under way is lost with the connection.
        let _ = stream.read(&mut [0]).await;
        Ok::<(), Failure>(())
    };
    let _ = tokio::time::timeout(LINGER, telling).await;
}

fn refused(text: &str) -> Failure {
    Failure::Refused(text.chars().take(TEXT_MAX).collect())
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, frame: &Frame) -> Result<(), Failure> {
    let bytes = wire::encode(frame);
    let length = u16::try_from(bytes.len()).map_err(|_| Failure::Malformed)?;
    stream.write_all(&[&length.to_be_bytes()[..], &bytes].concat()).await?;
    stream.flush().await?;
    Ok(())
}

async fn receive<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Frame, Failure> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).await?;
    let length = usize::from(u16::from_be_bytes(length));
    if length > FRAME_BYTES_MAX {
        return Err(Failure::Malformed);
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    Frame::decode(&bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arc_swap::ArcSwap;
    use ed25519_dalek::SigningKey;
    use proptest::prelude::*;
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;
    use crate::engine::overlay::Roster;
    use crate::engine::overlay::membership::{Author, Membership, Revocation};
    use crate::net::gate::tests::openings;

    fn public(byte: u8) -> PublicKey {
        PublicKey(SigningKey::from_bytes(&[byte; 32]).verifying_key().to_bytes())
    }

    /// A member of the network of `root`.
    fn members(root: u8, byte: u8) -> Members {
        let hour = Duration::from_secs(3_600);
        let signer = SigningKey::from_bytes(&[root; 32]);
        let credential = Credential::issue(&signer, &public(byte), now(), now() + hour);
        Arc::new(ArcSwap::from_pointee(Roster::new(public(root), credential)))
    }

    type Side = (Result<(), Failure>, [bool; 2]);

    /// Keys 1 and 2 meet. What each says, and which halves of its gate are open then.
    async fn meet(dials: Members, listens: Members) -> (Side, Side) {
        let (one, other) = tokio::io::duplex(64);
        let (gate, other_gate) = (Gate::default(), Gate::default());
        let (mut one, mut other) = (one.compat(), other.compat());
        let asks = async {
            let said = ask(&mut one, public(2), &dials, &gate).await;
            if let Err(Failure::Stranger(why)) = said {
                tell(one, public(2), &dials, why).await;
            }
            said
        };
        let answers = async {
            let said = answer(&mut other, public(1), &listens, &other_gate).await;
            if let Err(Failure::Stranger(why)) = said {
                tell(other, public(1), &listens, why).await;
            }
            said
        };
        let (asked, answered) = tokio::join!(asks, answers);
        let side = |said: Result<Credential, Failure>, gate| (said.map(|_| ()), openings(gate));
        (side(asked, &gate), side(answered, &other_gate))
    }

    #[tokio::test]
    async fn two_members_open_for_each_other() {
        let (one, other) = meet(members(9, 1), members(9, 2)).await;
        assert_eq!((one, other), ((Ok(()), [true, true]), (Ok(()), [true, true])));
    }

    #[tokio::test]
    async fn a_stranger_is_told_why_by_either_side_and_nothing_opens_towards_it() {
        let (one, other) = meet(members(8, 1), members(9, 2)).await;
        let text = NotMember::Forged.to_string();
        assert_eq!(one, (Err(Failure::Refused(text.clone())), [false, false]));
        assert_eq!(other, (Err(Failure::Stranger(NotMember::Forged)), [false, false]));
        // The one that was dialled shows another's credential.
        let borrowed = members(9, 3).load().credential.clone();
        let impostor = Arc::new(ArcSwap::from_pointee(Roster::new(public(9), borrowed)));
        let (one, other) = meet(members(9, 1), impostor).await;
        assert_eq!(one, (Err(Failure::Stranger(NotMember::Forged)), [false, false]));
        assert_eq!(other, (Err(Failure::Refused(text)), [true, false]));
    }

    #[tokio::test]
    async fn who_was_revoked_is_shown_the_revocation() {
        let root = Author::root(SigningKey::from_bytes(&[9; 32]));
        let signed = Signed::seal(&root, &Revocation { key: public(1), at: now() });
        let knows = |byte| {
            let mut membership = Membership::new(members(9, byte).load().as_ref().clone());
            membership.revoke(&signed).unwrap();
            Arc::new(ArcSwap::new(membership.roster().clone()))
        };
        let shown = Err(Failure::Revoked(Box::new(signed.clone())));
        let (one, other) = meet(members(9, 1), knows(2)).await;
        assert_eq!((one.0, other.0), (shown, Err(Failure::Stranger(NotMember::Revoked))));
    }

    #[tokio::test]
    async fn frames_are_bounded_and_in_order() {
        for wrong in [vec![0xff; 600], vec![0, 1, 3], vec![0, 1, 9]] {
            let (mut stranger, other) = tokio::io::duplex(1024);
            tokio::io::AsyncWriteExt::write_all(&mut stranger, &wrong).await.unwrap();
            drop(stranger);
            let gate = Gate::default();
            let said = answer(&mut other.compat(), public(1), &members(9, 2), &gate).await;
            assert_eq!((said, openings(&gate)), (Err(Failure::Malformed), [false, false]));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_frames_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
            let mut stream = futures::io::Cursor::new(bytes);
            let _ = futures::executor::block_on(receive(&mut stream));
        }
    }
}
