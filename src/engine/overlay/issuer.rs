//! What only the holder of a network's root key does: invite, let in, renew, revoke, grant names.
//!
//! An invitation is a secret that lets a number of nodes in until it expires. The issuer keeps its
//! hash; the token that people pass on holds the secret itself. Redeeming goes to the issuer, who
//! counts: that is what makes "once" true.

use std::collections::BTreeMap;
use std::time::Duration;

use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::membership::{Author, CREDENTIAL_LIFETIME, Credential, NameGrant, Revocation};
use super::wire::Signed;
use crate::engine::types::{PublicKey, ServiceName, Timestamp};

/// Invitations open at one time.
pub const INVITATIONS_MAX: usize = 1_000;
/// Nodes of a network: credentials that the issuer keeps track of.
pub const MEMBERS_MAX: usize = 10_000;
/// Longest time that an invitation may last.
pub const INVITATION_LIFETIME_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Most nodes that one invitation may let in.
pub const USES_MAX: u32 = 1_000;
/// Most names that the root may have granted.
pub const GRANTS_MAX: usize = 10_000;

/// Bytes of an invitation's secret: 128 bits, not to be guessed within any lifetime.
pub const SECRET_BYTES: usize = 16;
/// An invitation's secret.
pub type Secret = [u8; SECRET_BYTES];

/// Why nobody was let in. The text is told to whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum NotLetIn {
    /// Another node holds the root key.
    #[error(
        "this node does not hold the root key of the network; ask the one that made the invitation"
    )]
    NotIssuer,
    /// Nobody was invited with this secret, or it was used as often as it may be.
    #[error("the invitation is unknown here or used up: ask for a new one")]
    Unknown,
    /// The invitation's time is over.
    #[error("the invitation has expired: ask for a new one")]
    Expired,
    /// The key was revoked.
    #[error("the root of this network has revoked this key, which is final")]
    Revoked,
    /// [`MEMBERS_MAX`] reached.
    #[error("the network has as many members as it can have ({MEMBERS_MAX})")]
    Full,
    /// The request was not understood.
    #[error("the request was not understood: compare the versions of the two nodes")]
    Malformed,
    /// Many ask at once.
    #[error("too many ask to join just now: try again in a minute")]
    Busy,
}

/// An open invitation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// How many nodes it still lets in.
    pub uses_left: u32,
    /// When it ends.
    pub expires_at: Timestamp,
}

/// A node that was let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issued {
    /// When its newest credential was signed.
    pub issued_at: Timestamp,
    /// When that ends.
    pub expires_at: Timestamp,
    /// Whether it was revoked.
    pub revoked: bool,
}

/// What the issuer must remember over restarts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Open invitations by the SHA-256 of their secret.
    pub invitations: BTreeMap<[u8; 32], Invitation>,
    /// Who was let in.
    pub issued: BTreeMap<PublicKey, Issued>,
}

/// The holder of the root key.
#[derive(Clone)]
pub struct Issuer {
    root: SigningKey,
    ledger: Ledger,
}

impl Issuer {
    /// Starts from what was kept.
    pub fn new(root: SigningKey, ledger: Ledger) -> Self {
        Self { root, ledger }
    }

    /// What must be kept.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Opens an invitation with a secret that the driver drew. `None` when [`INVITATIONS_MAX`] are
    /// open. `uses` and `lifetime` are clamped to [`USES_MAX`] and [`INVITATION_LIFETIME_MAX`].
    pub fn invite(
        &mut self,
        secret: &Secret,
        uses: u32,
        lifetime: Duration,
        now: Timestamp,
    ) -> Option<Invitation> {
        self.ledger.invitations.retain(|_, invitation| invitation.expires_at > now);
        if self.ledger.invitations.len() >= INVITATIONS_MAX {
            return None;
        }
        let invitation = Invitation {
            uses_left: uses.clamp(1, USES_MAX),
            expires_at: now + lifetime.min(INVITATION_LIFETIME_MAX),
        };
        self.ledger.invitations.insert(Sha256::digest(secret).into(), invitation.clone());
        Some(invitation)
    }

    /// Lets a key in that shows an invitation's secret. A key that was let in before gets a new
    /// credential without using the invitation up, so that an answer that was lost costs nothing.
    ///
    /// # Errors
    /// [`NotLetIn`].
    pub fn redeem(
        &mut self,
        secret: &Secret,
        key: &PublicKey,
        now: Timestamp,
    ) -> Result<Credential, NotLetIn> {
        let hash: [u8; 32] = Sha256::digest(secret).into();
        let known = self.ledger.issued.get(key).map(|issued| issued.revoked);
        if known == Some(true) {
            return Err(NotLetIn::Revoked);
        }
        let invitation = self.ledger.invitations.get_mut(&hash).ok_or(NotLetIn::Unknown)?;
        if invitation.expires_at <= now {
            return Err(NotLetIn::Expired);
        }
        if known.is_none() {
            // A used-up invitation stays until it expires, for the sake of those it has let in.
            if invitation.uses_left == 0 {
                return Err(NotLetIn::Unknown);
            }
            if self.ledger.issued.len() >= MEMBERS_MAX {
                return Err(NotLetIn::Full);
            }
            invitation.uses_left -= 1;
        }
        Ok(self.sign(key, now))
    }

    /// Signs a new credential for a member.
    ///
    /// # Errors
    /// [`NotLetIn::Unknown`] for a key that was never let in, [`NotLetIn::Revoked`].
    pub fn renew(&mut self, key: &PublicKey, now: Timestamp) -> Result<Credential, NotLetIn> {
        match self.ledger.issued.get(key) {
            None => Err(NotLetIn::Unknown),
            Some(issued) if issued.revoked => Err(NotLetIn::Revoked),
            Some(_) => Ok(self.sign(key, now)),
        }
    }

    /// Lets a key in at the word of the operator, without an invitation.
    ///
    /// # Errors
    /// [`NotLetIn::Revoked`], [`NotLetIn::Full`].
    pub fn certify(&mut self, key: &PublicKey, now: Timestamp) -> Result<Credential, NotLetIn> {
        match self.ledger.issued.get(key) {
            Some(issued) if issued.revoked => Err(NotLetIn::Revoked),
            None if self.ledger.issued.len() >= MEMBERS_MAX => Err(NotLetIn::Full),
            _ => Ok(self.sign(key, now)),
        }
    }

    /// Takes a key's membership back.
    pub fn revoke(&mut self, key: &PublicKey, now: Timestamp) -> Signed {
        if let Some(issued) = self.ledger.issued.get_mut(key) {
            issued.revoked = true;
        }
        Signed::seal(&Author::root(self.root.clone()), &Revocation { key: *key, at: now })
    }

    /// Gives a name to an owner.
    pub fn grant(&self, name: &ServiceName, owner: &PublicKey, now: Timestamp) -> Signed {
        let grant = NameGrant { name: name.clone(), owner: *owner, at: now };
        Signed::seal(&Author::root(self.root.clone()), &grant)
    }

    fn sign(&mut self, key: &PublicKey, now: Timestamp) -> Credential {
        let expires_at = now + CREDENTIAL_LIFETIME;
        let issued = Issued { issued_at: now, expires_at, revoked: false };
        self.ledger.issued.insert(*key, issued);
        Credential::issue(&self.root, key, now, expires_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::overlay::membership::{Membership, Roster};

    const NOW: Timestamp = Timestamp(1_000_000_000_000);
    const HOUR: Duration = Duration::from_secs(3_600);

    fn key(byte: u8) -> SigningKey {
        SigningKey::from_bytes(&[byte; 32])
    }

    fn public(byte: u8) -> PublicKey {
        PublicKey(key(byte).verifying_key().to_bytes())
    }

    fn issuer() -> Issuer {
        Issuer::new(key(9), Ledger::default())
    }

    #[test]
    fn an_invitation_lets_in_as_many_as_it_says_and_survives_a_restart() {
        let mut issuer = issuer();
        issuer.invite(&[1; 16], 2, HOUR, NOW).unwrap();
        let credential = issuer.redeem(&[1; 16], &public(1), NOW).unwrap();
        assert!(
            Roster::new(public(9), credential.clone()).check(&public(1), &credential, NOW).is_ok()
        );
        let ledger: Ledger =
            postcard::from_bytes(&postcard::to_stdvec(issuer.ledger()).unwrap()).unwrap();
        let mut issuer = Issuer::new(key(9), ledger);
        assert!(
            issuer.redeem(&[1; 16], &public(1), NOW).is_ok(),
            "asks again: the answer was lost"
        );
        assert!(issuer.redeem(&[1; 16], &public(2), NOW).is_ok());
        assert_eq!(issuer.redeem(&[1; 16], &public(3), NOW), Err(NotLetIn::Unknown), "used up");
        assert!(issuer.redeem(&[1; 16], &public(2), NOW).is_ok());
        assert_eq!(issuer.redeem(&[2; 16], &public(3), NOW), Err(NotLetIn::Unknown));
    }

    #[test]
    fn an_invitation_expires() {
        let mut issuer = issuer();
        issuer.invite(&[1; 16], 1, HOUR, NOW).unwrap();
        assert_eq!(issuer.redeem(&[1; 16], &public(1), NOW + HOUR), Err(NotLetIn::Expired));
        let long = issuer.invite(&[2; 16], 1, 10_000 * HOUR, NOW).unwrap();
        assert_eq!(long.expires_at, NOW + INVITATION_LIFETIME_MAX);
    }

    #[test]
    fn the_revoked_get_nothing_again() {
        let mut issuer = issuer();
        issuer.invite(&[1; 16], 9, HOUR, NOW).unwrap();
        let credential = issuer.redeem(&[1; 16], &public(1), NOW).unwrap();
        let mut membership = Membership::new(Roster::new(public(9), Credential::default()));
        assert_eq!(membership.admit(&public(1), &credential, NOW), Ok(()));
        let revocation = issuer.revoke(&public(1), NOW);
        assert_eq!(membership.revoke(&revocation), Ok(Some(public(1))));
        for refused in [
            issuer.redeem(&[1; 16], &public(1), NOW),
            issuer.renew(&public(1), NOW),
            issuer.certify(&public(1), NOW),
        ] {
            assert_eq!(refused, Err(NotLetIn::Revoked));
        }
        assert_eq!(issuer.renew(&public(2), NOW), Err(NotLetIn::Unknown));
        assert!(issuer.certify(&public(2), NOW).is_ok() && issuer.renew(&public(2), NOW).is_ok());
    }

    #[test]
    fn open_invitations_are_bounded_and_ended_ones_make_room() {
        let mut issuer = issuer();
        for index in 0..INVITATIONS_MAX {
            let mut secret = [0; 16];
            secret[..8].copy_from_slice(&index.to_be_bytes());
            issuer.invite(&secret, 1, HOUR, NOW).unwrap();
        }
        assert_eq!(issuer.invite(&[9; 16], 1, HOUR, NOW), None);
        assert!(issuer.invite(&[9; 16], 1, HOUR, NOW + HOUR).is_some());
    }
}
