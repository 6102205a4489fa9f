//! Messages between nodes, their bounds, and the signed envelope.
//!
//! Encoding is postcard (compact, no self-description; the protocol name carries the version).
//! Every decoder takes arbitrary bytes: what is too long, malformed or out of range is an error
//! and costs no more memory than the message itself.

use std::collections::BTreeMap;

use ed25519_dalek::{Signature, Signer, VerifyingKey};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::checked::CheckedSignatures;
use super::issuer::{NotLetIn, Secret};
use super::membership::{Author, Credential, NotMember};
use crate::engine::measure::{LinkQuality, link::NEIGHBOURS_MAX};
use crate::engine::types::{NodeId, PublicKey, ServiceName, Timestamp};

/// Longest gossip message (bytes). An advertisement of 64 links takes about 3,000.
pub const GOSSIP_BYTES_MAX: usize = 16 * 1024;
/// Longest answer to a synchronisation request (bytes).
pub const SYNC_BYTES_MAX: usize = 1024 * 1024;
/// Most peers in a peer list.
pub const SYNC_PEERS_MAX: usize = 128;
/// Most messages in a synchronisation answer: everything of a mesh of a thousand nodes, as long as
/// it fits [`SYNC_BYTES_MAX`].
pub const SYNC_MESSAGES_MAX: usize = 4_096;
/// Most addresses kept of one peer.
pub const ADDRESSES_MAX: usize = 8;
/// Longest address (bytes).
pub const ADDRESS_BYTES_MAX: usize = 256;
/// Most messages that a synchronisation request says are known: those beyond are sent again.
pub const SYNC_HAVE_MAX: usize = 16_384;
/// Longest synchronisation request (bytes).
pub const SYNC_REQUEST_BYTES_MAX: usize = SYNC_HAVE_MAX * size_of::<Fingerprint>() + 8;
/// Most entries in a record's metadata, and longest key or value (bytes).
pub const METADATA_MAX: usize = 16;
/// See [`METADATA_MAX`].
pub const METADATA_BYTES_MAX: usize = 256;
/// Longest time to live (s): a day.
pub const TTL_S_MAX: u32 = 86_400;
/// Most callers in an allow list.
pub const ALLOWED_MAX: usize = 256;

/// Bytes that are not the message they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than the message may be.
    #[error("{length} bytes exceed the limit of {limit}")]
    TooLong {
        /// Bytes received.
        length: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// Not the encoding of this message.
    #[error("malformed message")]
    Malformed,
    /// A number, list or text beyond its bound.
    #[error("{0} is out of range")]
    OutOfRange(&'static str),
    /// The signature does not fit the content and the key.
    #[error("the signature is wrong")]
    Signature,
    /// Who signed does not belong to the network.
    #[error("its author is no member: {0}")]
    NotMember(#[from] NotMember),
}

/// Something that travels signed.
pub trait Payload: Serialize + DeserializeOwned {
    /// Prefix of what is signed, so that a signature of one kind of message never passes for
    /// another kind.
    const DOMAIN: &'static [u8];

    /// Checks everything that the types do not.
    ///
    /// # Errors
    /// [`WireError::OutOfRange`], naming what is.
    fn check(&self) -> Result<(), WireError>;
}

/// Names a signed message among those of one network: the first bytes of its signature.
pub type Fingerprint = [u8; 8];

/// A payload with the key and the signature of whoever says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// Who says it.
    pub key: PublicKey,
    /// Why one should listen.
    pub credential: Credential,
    /// The encoded payload, as it was signed.
    pub body: Vec<u8>,
    /// Ed25519 signature (64 bytes) over the domain and the body.
    pub signature: Vec<u8>,
}

impl Signed {
    /// Encodes and signs a payload.
    pub fn seal<T: Payload>(author: &Author, payload: &T) -> Self {
        let body = encode(payload);
        let signature = author.key.sign(&signed_bytes::<T>(&body)).to_bytes().to_vec();
        Self { key: author.public(), credential: author.credential.clone(), body, signature }
    }

    /// Its name, by which two nodes find out what one of them lacks. Who forges one only keeps
    /// something from itself.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut first = Fingerprint::default();
        first.iter_mut().zip(&self.signature).for_each(|(to, from)| *to = *from);
        first
    }

    /// Verifies the signature, decodes and checks the payload. Whether who signed belongs to the
    /// network is for [`Membership::open`](super::membership::Membership::open).
    ///
    /// # Errors
    /// [`WireError`]; nothing of an unverified payload is returned.
    pub fn open<T: Payload>(&self) -> Result<T, WireError> {
        self.open_with(None)
    }

    /// The same, when others may have verified the signature already.
    ///
    /// # Errors
    /// [`WireError`]; nothing of an unverified payload is returned.
    pub fn open_with<T: Payload>(
        &self,
        checked: Option<&CheckedSignatures>,
    ) -> Result<T, WireError> {
        match checked {
            Some(checked) => checked.check::<T>(self, || self.verify::<T>())?,
            None => self.verify::<T>()?,
        }
        let payload: T = decode(&self.body, GOSSIP_BYTES_MAX)?;
        payload.check()?;
        Ok(payload)
    }

    fn verify<T: Payload>(&self) -> Result<(), WireError> {
        let key = VerifyingKey::from_bytes(&self.key.0).map_err(|_| WireError::Signature)?;
        let signature = Signature::from_slice(&self.signature).map_err(|_| WireError::Signature)?;
        key.verify_strict(&signed_bytes::<T>(&self.body), &signature)
            .map_err(|_| WireError::Signature)
    }
}

fn signed_bytes<T: Payload>(body: &[u8]) -> Vec<u8> {
    [T::DOMAIN, body].concat()
}

/// Encodes a message.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    postcard::to_stdvec(message).expect("messages hold only sized data, which always encodes")
}

/// Decodes a message of at most `limit` bytes that fills its bytes.
///
/// # Errors
/// [`WireError::TooLong`] or [`WireError::Malformed`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8], limit: usize) -> Result<T, WireError> {
    if bytes.len() > limit {
        return Err(WireError::TooLong { length: bytes.len(), limit });
    }
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        _ => Err(WireError::Malformed),
    }
}

/// What a node says of its links.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkStateAdvertisement {
    /// Higher replaces lower. Starts from the clock (µs), so that it grows over restarts.
    pub sequence: u64,
    /// The links that are up, at most [`NEIGHBOURS_MAX`].
    pub links: BTreeMap<NodeId, LinkQuality>,
}

impl Payload for LinkStateAdvertisement {
    const DOMAIN: &'static [u8] = b"meshwise/link-state/1\0";

    fn check(&self) -> Result<(), WireError> {
        if self.links.len() > NEIGHBOURS_MAX {
            return Err(WireError::OutOfRange("the number of links"));
        }
        if !self.links.values().all(LinkQuality::is_sane) {
            return Err(WireError::OutOfRange("a link's quality"));
        }
        Ok(())
    }
}

/// How a service speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceKind {
    /// A stream of bytes.
    Tcp,
    /// HTTP over a stream of bytes.
    Http,
    /// Datagrams.
    Udp,
}

impl ServiceKind {
    /// The name used by the control API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::Udp => "udp",
        }
    }
}

/// What a service wants from its routes. On the wire it is a number, in files and the control API
/// a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// The score with all four terms.
    #[default]
    Balanced,
    /// Short round-trip times.
    Latency,
    /// Much room for its bytes.
    Throughput,
    /// Few losses.
    Reliability,
}

impl Objective {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Balanced, Self::Latency, Self::Throughput, Self::Reliability];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::Latency => "latency",
            Self::Throughput => "throughput",
            Self::Reliability => "reliability",
        }
    }
}

impl std::fmt::Display for Objective {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|objective| objective.as_str() == text);
        found.ok_or_else(|| {
            let all = Self::ALL.map(Self::as_str).join(", ");
            format!("'{text}' is no objective; write one of {all}")
        })
    }
}

/// Who provides a service, signed by the provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRecord {
    /// The name.
    pub name: ServiceName,
    /// How it speaks.
    pub kind: ServiceKind,
    /// The key that owns the name: the provider's, or that of whoever signed the delegation.
    pub owner: PublicKey,
    /// What lets a provider publish the name of another owner: a
    /// [`Delegation`](super::delegation::Delegation), signed by the owner.
    pub delegation: Option<Signed>,
    /// Free text for people, at most [`METADATA_MAX`] entries.
    pub metadata: BTreeMap<String, String>,
    /// Higher replaces lower. Starts from the clock (µs), so that it grows over restarts.
    pub sequence: u64,
    /// When it was signed.
    pub issued_at: Timestamp,
    /// How long it is valid after that (s).
    pub ttl_s: u32,
    /// What it wants from its routes.
    pub objective: Objective,
    /// The nodes that may connect; everybody when empty.
    pub allowed: Vec<NodeId>,
    /// A tombstone: the provider left.
    pub withdrawn: bool,
}

impl Payload for ServiceRecord {
    const DOMAIN: &'static [u8] = b"meshwise/service/2\0";

    fn check(&self) -> Result<(), WireError> {
        let short = |text: &String| text.len() <= METADATA_BYTES_MAX;
        if self.metadata.len() > METADATA_MAX
            || !self.metadata.iter().all(|(key, value)| short(key) && short(value))
        {
            return Err(WireError::OutOfRange("the metadata"));
        }
        if self.allowed.len() > ALLOWED_MAX {
            return Err(WireError::OutOfRange("the allow list"));
        }
        if !(1..=TTL_S_MAX).contains(&self.ttl_s) {
            return Err(WireError::OutOfRange("the time to live"));
        }
        Ok(())
    }
}

/// What travels by gossip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GossipMessage {
    /// A [`LinkStateAdvertisement`].
    LinkState(Signed),
    /// A [`ServiceRecord`].
    Service(Signed),
    /// A [`Revocation`](super::membership::Revocation), by the root.
    Revocation(Signed),
    /// A [`NameGrant`](super::membership::NameGrant), by the root.
    Grant(Signed),
    /// A [`Heartbeat`](super::heartbeat::Heartbeat), by a provider about itself.
    Heartbeat(Signed),
}

/// What a node asks of the one that let it in, or shall let it in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinRequest {
    /// Shows an invitation's secret.
    Redeem(Secret),
    /// Shows nothing: the issuer knows its members.
    Renew,
}

/// Longest [`JoinRequest`] and [`JoinResponse`] (bytes).
pub const JOIN_BYTES_MAX: usize = 256;

/// The answer: a credential for the key that asked.
pub type JoinResponse = Result<Credential, NotLetIn>;

/// A peer and where it listens, as multiaddress text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAddresses {
    /// The peer.
    pub key: PublicKey,
    /// Where it listens, at most [`ADDRESSES_MAX`].
    pub addresses: Vec<String>,
}

/// What a node says when it asks a new neighbour: what it need not be told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncRequest {
    /// Messages that it has, at most [`SYNC_HAVE_MAX`].
    pub have: Vec<Fingerprint>,
}

impl SyncRequest {
    /// Decodes and checks a request.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WireError> {
        let request: Self = decode(bytes, SYNC_REQUEST_BYTES_MAX)?;
        if request.have.len() > SYNC_HAVE_MAX {
            return Err(WireError::OutOfRange("the number of messages"));
        }
        Ok(request)
    }
}

/// What a node tells a new neighbour: peers to connect to, and the newest gossip.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncResponse {
    /// The peer list, at most [`SYNC_PEERS_MAX`].
    pub peers: Vec<PeerAddresses>,
    /// Advertisements and records, at most [`SYNC_MESSAGES_MAX`].
    pub messages: Vec<GossipMessage>,
}

impl SyncResponse {
    /// Decodes and checks an answer.
    ///
    /// # Errors
    /// [`WireError`]. Messages inside are not verified yet.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WireError> {
        let response: Self = decode(bytes, SYNC_BYTES_MAX)?;
        if response.peers.len() > SYNC_PEERS_MAX {
            return Err(WireError::OutOfRange("the peer list"));
        }
        if response.messages.len() > SYNC_MESSAGES_MAX {
            return Err(WireError::OutOfRange("the number of messages"));
        }
        let fits = |peer: &PeerAddresses| {
            peer.addresses.len() <= ADDRESSES_MAX
                && peer.addresses.iter().all(|address| address.len() <= ADDRESS_BYTES_MAX)
        };
        if !response.peers.iter().all(fits) {
            return Err(WireError::OutOfRange("a peer's addresses"));
        }
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> Author {
        Author::root(SigningKey::from_bytes(&[byte; 32]))
    }

    fn record() -> ServiceRecord {
        ServiceRecord {
            name: "a.local".parse().unwrap(),
            kind: ServiceKind::Tcp,
            owner: key(1).public(),
            delegation: None,
            metadata: BTreeMap::new(),
            sequence: 7,
            issued_at: Timestamp(1),
            ttl_s: 60,
            objective: Objective::Balanced,
            allowed: vec![],
            withdrawn: false,
        }
    }

    #[test]
    fn what_was_sealed_opens_and_nothing_else() {
        let sealed = Signed::seal(&key(1), &record());
        assert_eq!(sealed.open::<ServiceRecord>(), Ok(record()));
        for byte in 0..sealed.body.len() {
            let mut forged = sealed.clone();
            forged.body[byte] ^= 1;
            assert_eq!(forged.open::<ServiceRecord>(), Err(WireError::Signature));
        }
        let mut other = sealed.clone();
        other.key = key(2).public();
        assert_eq!(other.open::<ServiceRecord>(), Err(WireError::Signature));
        assert_eq!(
            sealed.open::<LinkStateAdvertisement>(),
            Err(WireError::Signature),
            "a signature of one kind is none of another"
        );
    }

    #[test]
    fn values_out_of_range_are_refused_even_when_signed() {
        for wrong in [
            ServiceRecord { ttl_s: 0, ..record() },
            ServiceRecord { ttl_s: u32::MAX, ..record() },
            ServiceRecord { allowed: vec![NodeId([0; 8]); 257], ..record() },
            ServiceRecord { metadata: [("k".to_owned(), "v".repeat(300))].into(), ..record() },
        ] {
            let result = Signed::seal(&key(1), &wrong).open::<ServiceRecord>();
            assert!(matches!(result, Err(WireError::OutOfRange(_))));
        }
    }

    #[test]
    fn kinds_and_objectives_keep_their_numbers() {
        let kinds = [ServiceKind::Tcp, ServiceKind::Http, ServiceKind::Udp];
        assert_eq!(kinds.map(|kind| encode(&kind)), [[0], [1], [2]]);
        let objectives = [
            Objective::Balanced,
            Objective::Latency,
            Objective::Throughput,
            Objective::Reliability,
        ];
        assert_eq!(objectives.map(|objective| encode(&objective)), [[0], [1], [2], [3]]);
        assert_eq!(objectives, Objective::ALL);
        for objective in objectives {
            let word = objective.to_string();
            assert_eq!(word.parse(), Ok(objective));
            assert_eq!(serde_json::to_string(&objective).unwrap(), format!("\"{word}\""));
        }
        assert!("fast".parse::<Objective>().unwrap_err().contains("reliability"));
    }

    #[test]
    fn bytes_left_over_and_bytes_too_many_are_refused() {
        let mut bytes = encode(&GossipMessage::Service(Signed::seal(&key(1), &record())));
        assert!(decode::<GossipMessage>(&bytes, GOSSIP_BYTES_MAX).is_ok());
        bytes.push(0);
        assert_eq!(decode::<GossipMessage>(&bytes, GOSSIP_BYTES_MAX), Err(WireError::Malformed));
        assert!(matches!(
            decode::<GossipMessage>(&vec![0; GOSSIP_BYTES_MAX + 1], GOSSIP_BYTES_MAX),
            Err(WireError::TooLong { .. })
        ));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = SyncResponse::from_bytes(&bytes);
            let _ = SyncRequest::from_bytes(&bytes);
            let _ = decode::<LinkStateAdvertisement>(&bytes, GOSSIP_BYTES_MAX);
            let _ = decode::<ServiceRecord>(&bytes, GOSSIP_BYTES_MAX);
            if let Ok(GossipMessage::LinkState(signed) | GossipMessage::Service(signed)) =
                decode(&bytes, GOSSIP_BYTES_MAX)
            {
                prop_assert!(signed.open::<ServiceRecord>().is_err());
            }
        }

        #[test]
        fn sync_answers_survive_the_wire(
            addresses in proptest::collection::vec("[a-z/0-9]{0,40}", 0..8),
        ) {
            let response = SyncResponse {
                peers: vec![PeerAddresses { key: record().owner, addresses }],
                messages: vec![GossipMessage::Service(Signed::seal(&key(1), &record()))],
            };
            prop_assert_eq!(SyncResponse::from_bytes(&encode(&response)), Ok(response));
        }
    }
}
