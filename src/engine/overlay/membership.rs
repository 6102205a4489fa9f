//! Who belongs to a network.
//!
//! A network is an Ed25519 key, its *root*. A node belongs to it when the root has signed a
//! [`Credential`] for the node's key, the credential is in its time, and the root has not revoked the
//! key. Every signed message carries the credential of who signed it, so that whoever holds the root's
//! public key can judge a message by itself, in any order.
//!
//! Revocations are final: a revoked key never belongs to this network again, whatever credential it
//! shows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use super::checked::{CheckedSignatures, OpenedLinkState};
use super::issuer::{Issuer, Ledger};
use super::registry::CLOCK_SKEW;
use super::wire::{Payload, Signed, WireError};
use crate::engine::types::{PublicKey, ServiceName, Timestamp};

/// Most revocations kept; beyond, further ones are refused and counted: time for a new network.
pub const REVOCATIONS_MAX: usize = 10_000;
/// Most credentials remembered as verified; beyond, they are verified again.
pub const VERIFIED_MAX: usize = 4_096;
/// How long a credential lasts unless said otherwise.
pub const CREDENTIAL_LIFETIME: Duration = Duration::from_secs(90 * 86_400);
const CREDENTIAL_DOMAIN: &[u8] = b"meshwise/credential/1\0";

/// The root's word that a key belongs to its network. The key and the root are not in it: both are
/// known to whoever checks, and are part of what is signed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential {
    /// When it was signed.
    pub issued_at: Timestamp,
    /// When it ends.
    pub expires_at: Timestamp,
    /// Ed25519 signature (64 bytes) by the root; empty for the root's own messages.
    pub signature: Vec<u8>,
}

impl Credential {
    /// Lets `key` in until `expires_at`.
    pub fn issue(
        root: &SigningKey,
        key: &PublicKey,
        issued_at: Timestamp,
        expires_at: Timestamp,
    ) -> Self {
        let root_key = PublicKey(root.verifying_key().to_bytes());
        let text = credential_bytes(&root_key, key, issued_at, expires_at);
        Self { issued_at, expires_at, signature: root.sign(&text).to_bytes().to_vec() }
    }
}

fn credential_bytes(
    root: &PublicKey,
    key: &PublicKey,
    issued_at: Timestamp,
    expires_at: Timestamp,
) -> Vec<u8> {
    let times = [issued_at.as_micros().to_be_bytes(), expires_at.as_micros().to_be_bytes()];
    [CREDENTIAL_DOMAIN, &root.0, &key.0, &times.concat()].concat()
}

/// Why a key does not belong to the network. The text is told to the peer concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum NotMember {
    /// It shows no credential.
    #[error("no credential of this network: ask one of its members for 'meshwise network invite'")]
    NoCredential,
    /// The root did not sign this credential for this key.
    #[error("the credential was not signed by the root of this network for this key")]
    Forged,
    /// Its time is over.
    #[error("the credential has expired: ask for a new invitation")]
    Expired,
    /// Its time has not begun.
    #[error("the credential is not valid yet: compare the clocks")]
    NotYet,
    /// The root has taken it back.
    #[error("the root of this network has revoked this key")]
    Revoked,
}

/// What is needed to judge who belongs: the root and who was revoked. Shared with the network as a
/// snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roster {
    /// The network's root.
    pub root: PublicKey,
    /// This node's own credential.
    pub credential: Credential,
    revoked: BTreeMap<PublicKey, Signed>,
}

impl Roster {
    /// A roster without revocations.
    pub fn new(root: PublicKey, credential: Credential) -> Self {
        Self { root, credential, revoked: BTreeMap::new() }
    }

    /// Whether a key belongs to the network at `now`.
    ///
    /// # Errors
    /// [`NotMember`] says why not.
    pub fn check(
        &self,
        key: &PublicKey,
        credential: &Credential,
        now: Timestamp,
    ) -> Result<(), NotMember> {
        self.check_time(key, credential, now)?;
        if *key == self.root {
            return Ok(());
        }
        if credential.signature.is_empty() {
            return Err(NotMember::NoCredential);
        }
        let (issued_at, expires_at) = (credential.issued_at, credential.expires_at);
        let text = credential_bytes(&self.root, key, issued_at, expires_at);
        let root = VerifyingKey::from_bytes(&self.root.0).map_err(|_| NotMember::Forged)?;
        let signature =
            Signature::from_slice(&credential.signature).map_err(|_| NotMember::Forged)?;
        root.verify_strict(&text, &signature).map_err(|_| NotMember::Forged)
    }

    /// Everything but the signature, which does not change with time.
    fn check_time(
        &self,
        key: &PublicKey,
        credential: &Credential,
        now: Timestamp,
    ) -> Result<(), NotMember> {
        if self.is_revoked(key) {
            return Err(NotMember::Revoked);
        }
        if *key == self.root || credential.signature.is_empty() {
            return Ok(());
        }
        if credential.issued_at > now + CLOCK_SKEW {
            return Err(NotMember::NotYet);
        }
        if credential.expires_at + CLOCK_SKEW <= now {
            return Err(NotMember::Expired);
        }
        Ok(())
    }

    /// Whether the root has revoked this key.
    pub fn is_revoked(&self, key: &PublicKey) -> bool {
        self.revoked.contains_key(key)
    }

    /// The root's word that this key is revoked.
    pub fn revocation(&self, key: &PublicKey) -> Option<&Signed> {
        self.revoked.get(key)
    }

    /// The keys that the root has revoked.
    pub fn revoked(&self) -> impl Iterator<Item = &PublicKey> + '_ {
        self.revoked.keys()
    }

    /// All revocations as they were signed.
    pub fn revocations(&self) -> impl Iterator<Item = &Signed> + '_ {
        self.revoked.values()
    }

    /// Verifies a message of a member: first whether who signed it belongs to the network, then the
    /// signature itself.
    ///
    /// # Errors
    /// [`WireError::NotMember`] and what [`Signed::open`] says.
    pub fn open<T: Payload>(&self, signed: &Signed, now: Timestamp) -> Result<T, WireError> {
        self.check(&signed.key, &signed.credential, now)?;
        signed.open()
    }
}

/// The engine's view: a [`Roster`], and which credentials were verified already, since every message
/// carries one.
#[derive(Clone, Debug)]
pub struct Membership {
    roster: Arc<Roster>,
    verified: BTreeMap<PublicKey, Credential>,
    checked: Option<Arc<CheckedSignatures>>,
}

impl Membership {
    /// Starts from what was kept.
    pub fn new(roster: Roster) -> Self {
        Self { roster: Arc::new(roster), verified: BTreeMap::new(), checked: None }
    }

    /// Shares what was verified with the other nodes of a simulated world.
    pub fn sharing(self, checked: Option<Arc<CheckedSignatures>>) -> Self {
        Self { checked, ..self }
    }

    /// The snapshot for the network.
    pub fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    /// The keys whose credentials were seen, with them. At most [`VERIFIED_MAX`].
    pub fn seen(&self) -> impl Iterator<Item = (&PublicKey, &Credential)> + '_ {
        self.verified.iter()
    }

    /// As [`Roster::open`], with each credential verified once.
    ///
    /// # Errors
    /// As [`Roster::open`].
    pub fn open<T: Payload>(&mut self, signed: &Signed, now: Timestamp) -> Result<T, WireError> {
        self.admit(&signed.key, &signed.credential, now)?;
        signed.open_with(self.checked.as_deref())
    }

    /// The same for an advertisement, which is kept as it was signed.
    ///
    /// # Errors
    /// As [`Roster::open`].
    pub fn open_link_state(
        &mut self,
        signed: Signed,
        now: Timestamp,
    ) -> Result<OpenedLinkState, WireError> {
        self.admit(&signed.key, &signed.credential, now)?;
        match &self.checked {
            Some(checked) => checked.open(signed),
            None => OpenedLinkState::open(signed),
        }
    }

    /// As [`Roster::check`], with each credential verified once.
    ///
    /// # Errors
    /// As [`Roster::check`].
    pub fn admit(
        &mut self,
        key: &PublicKey,
        credential: &Credential,
        now: Timestamp,
    ) -> Result<(), NotMember> {
        if self.verified.get(key) == Some(credential) {
            return self.roster.check_time(key, credential, now);
        }
        let verify = || self.roster.check(key, credential, now);
        match &self.checked {
            Some(checked) => {
                self.roster.check_time(key, credential, now)?;
                checked.credential(key, credential, verify)?;
            }
            None => verify()?,
        }
        if self.verified.len() >= VERIFIED_MAX {
            self.verified.pop_first();
        }
        self.verified.insert(*key, credential.clone());
        Ok(())
    }

    /// Takes a new credential of this node.
    pub fn renew(&mut self, credential: Credential) {
        Arc::make_mut(&mut self.roster).credential = credential;
    }

    /// Takes a revocation. `Ok(None)` when it is known already.
    ///
    /// # Errors
    /// [`WireError`] when the root did not sign it, or [`REVOCATIONS_MAX`] are known.
    pub fn revoke(&mut self, signed: &Signed) -> Result<Option<PublicKey>, WireError> {
        let revocation: Revocation = self.open_of_root(signed)?;
        if self.roster.is_revoked(&revocation.key) {
            return Ok(None);
        }
        if self.roster.revoked.len() >= REVOCATIONS_MAX {
            return Err(WireError::OutOfRange("the number of revocations"));
        }
        self.verified.remove(&revocation.key);
        Arc::make_mut(&mut self.roster).revoked.insert(revocation.key, signed.clone());
        Ok(Some(revocation.key))
    }

    /// Verifies a message that only the root may sign.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn open_of_root<T: Payload>(&self, signed: &Signed) -> Result<T, WireError> {
        if signed.key != self.roster.root {
            return Err(WireError::Signature);
        }
        signed.open()
    }
}

/// The root takes a key's membership back, for good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// Whose.
    pub key: PublicKey,
    /// When.
    pub at: Timestamp,
}

impl Payload for Revocation {
    const DOMAIN: &'static [u8] = b"meshwise/revocation/1\0";

    fn check(&self) -> Result<(), WireError> {
        Ok(())
    }
}

/// The root gives a name to an owner, whoever was first seen with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameGrant {
    /// The name.
    pub name: ServiceName,
    /// To whom.
    pub owner: PublicKey,
    /// When; a later grant of the same name replaces an earlier one.
    pub at: Timestamp,
}

impl Payload for NameGrant {
    const DOMAIN: &'static [u8] = b"meshwise/name-grant/1\0";

    fn check(&self) -> Result<(), WireError> {
        Ok(())
    }
}

/// What a node keeps of its network over restarts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkState {
    /// Its name, for people.
    pub name: String,
    /// The network.
    pub root: PublicKey,
    /// The node that signs credentials.
    pub issuer: PublicKey,
    /// Where the issuer listened when it let this node in, as multiaddress text: a way in when no
    /// other one is known.
    pub addresses: Vec<String>,
    /// This node's own.
    pub credential: Credential,
    /// Who was revoked.
    pub revocations: Vec<Signed>,
    /// Which names were granted.
    pub grants: Vec<Signed>,
    /// What the issuer keeps; empty elsewhere.
    pub ledger: Ledger,
}

impl NetworkState {
    /// Founds a network: the first node is its own issuer.
    pub fn found(root: &SigningKey, name: &str, key: &PublicKey, now: Timestamp) -> Self {
        let mut issuer = Issuer::new(root.clone(), Ledger::default());
        let credential = issuer.certify(key, now).expect("an empty ledger has room");
        let root = PublicKey(root.verifying_key().to_bytes());
        let mut state = Self::joined(name, root, *key, credential);
        state.ledger = issuer.ledger().clone();
        state
    }

    /// A node that was let in.
    pub fn joined(name: &str, root: PublicKey, issuer: PublicKey, credential: Credential) -> Self {
        Self {
            name: name.to_owned(),
            root,
            issuer,
            addresses: Vec::new(),
            credential,
            revocations: Vec::new(),
            grants: Vec::new(),
            ledger: Ledger::default(),
        }
    }

    /// A roster with the revocations that were kept. What was not signed by the root is left out.
    pub fn membership(&self) -> Membership {
        let mut membership = Membership::new(Roster::new(self.root, self.credential.clone()));
        for signed in &self.revocations {
            let _ = membership.revoke(signed);
        }
        membership
    }
}

/// Who signs: a key with its credential.
#[derive(Clone)]
pub struct Author {
    /// The key.
    pub key: SigningKey,
    /// Why others believe it.
    pub credential: Credential,
}

impl Author {
    /// The root itself, which needs no credential.
    pub fn root(key: SigningKey) -> Self {
        Self { key, credential: Credential::default() }
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.key.verifying_key().to_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::overlay::wire::LinkStateAdvertisement;

    const NOW: Timestamp = Timestamp(1_000_000_000_000);
    const DAY: Duration = Duration::from_secs(86_400);

    fn key(byte: u8) -> SigningKey {
        SigningKey::from_bytes(&[byte; 32])
    }

    fn public(byte: u8) -> PublicKey {
        PublicKey(key(byte).verifying_key().to_bytes())
    }

    /// Of key 9's network.
    fn member(byte: u8) -> Author {
        let credential = Credential::issue(&key(9), &public(byte), NOW, NOW + DAY);
        Author { key: key(byte), credential }
    }

    fn membership() -> Membership {
        Membership::new(Roster::new(public(9), member(1).credential))
    }

    fn said_by(author: &Author) -> Signed {
        Signed::seal(author, &LinkStateAdvertisement { sequence: 1, links: BTreeMap::new() })
    }

    fn opens(
        membership: &mut Membership,
        signed: &Signed,
        now: Timestamp,
    ) -> Result<(), WireError> {
        let with_cache = membership.open::<LinkStateAdvertisement>(signed, now).map(|_| ());
        let without = membership.roster().open::<LinkStateAdvertisement>(signed, now).map(|_| ());
        assert_eq!(with_cache, without, "the cache changes nothing");
        with_cache
    }

    #[test]
    fn only_keys_that_the_root_let_in_are_heard() {
        let mut membership = membership();
        assert_eq!(opens(&mut membership, &said_by(&member(2)), NOW), Ok(()));
        let stranger = Author { key: key(3), credential: Credential::default() };
        let refused = opens(&mut membership, &said_by(&stranger), NOW);
        assert_eq!(refused, Err(WireError::NotMember(NotMember::NoCredential)));
        let borrowed = Author { key: key(3), credential: member(2).credential };
        let refused = opens(&mut membership, &said_by(&borrowed), NOW);
        assert_eq!(refused, Err(WireError::NotMember(NotMember::Forged)));
        let own_root = Credential::issue(&key(3), &public(3), NOW, NOW + DAY);
        let refused =
            opens(&mut membership, &said_by(&Author { key: key(3), credential: own_root }), NOW);
        assert_eq!(refused, Err(WireError::NotMember(NotMember::Forged)));
        let mut longer = member(2);
        longer.credential.expires_at = NOW + 10 * DAY;
        let refused = opens(&mut membership, &said_by(&longer), NOW);
        assert_eq!(refused, Err(WireError::NotMember(NotMember::Forged)));
    }

    #[test]
    fn a_credential_has_its_time_even_when_it_was_verified_before() {
        let mut membership = membership();
        let signed = said_by(&member(2));
        assert_eq!(opens(&mut membership, &signed, NOW), Ok(()));
        let late = NOW + DAY + CLOCK_SKEW;
        let refused = opens(&mut membership, &signed, late);
        assert_eq!(refused, Err(WireError::NotMember(NotMember::Expired)));
        let early = Timestamp(NOW.as_micros() - 2 * CLOCK_SKEW.as_micros() as u64);
        let refused = opens(&mut membership, &signed, early);
        assert_eq!(refused, Err(WireError::NotMember(NotMember::NotYet)));
    }

    #[test]
    fn a_revocation_is_the_roots_alone_and_final() {
        let mut membership = membership();
        opens(&mut membership, &said_by(&member(2)), NOW).unwrap();
        let revocation = Revocation { key: public(2), at: NOW };
        let forged = Signed::seal(&member(1), &revocation);
        assert_eq!(membership.revoke(&forged), Err(WireError::Signature));
        let signed = Signed::seal(&Author::root(key(9)), &revocation);
        assert_eq!(membership.revoke(&signed), Ok(Some(public(2))));
        assert_eq!(membership.revoke(&signed), Ok(None), "known");
        let refused = opens(&mut membership, &said_by(&member(2)), NOW);
        assert_eq!(refused, Err(WireError::NotMember(NotMember::Revoked)));
        let renewed = Credential::issue(&key(9), &public(2), NOW + DAY, NOW + 2 * DAY);
        let again = Author { key: key(2), credential: renewed };
        let refused = opens(&mut membership, &said_by(&again), NOW + DAY);
        assert_eq!(refused, Err(WireError::NotMember(NotMember::Revoked)), "for good");
    }

    #[test]
    fn what_was_verified_is_bounded() {
        let mut membership = membership();
        for index in 0..VERIFIED_MAX {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&index.to_be_bytes());
            membership.verified.insert(PublicKey(bytes), Credential::default());
        }
        membership.admit(&public(2), &member(2).credential, NOW).unwrap();
        assert_eq!(membership.seen().count(), VERIFIED_MAX);
        assert!(membership.seen().any(|(key, _)| *key == public(2)));
    }
}
