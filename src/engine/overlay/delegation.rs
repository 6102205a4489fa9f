//! How several nodes provide one name: the owner lets another node publish it, by a signed
//! [`Delegation`] that travels inside that node's records, so that everybody can judge a record alone.
//! People pass it on as a text.

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize};

use super::wire::{self, Payload, Signed, WireError};
use crate::engine::types::{PublicKey, ServiceName, Timestamp};

const PREFIX: &str = "meshwise-delegation-1-";
/// Longest delegation (bytes): two keys, two signatures, a name and times, with room.
pub const DELEGATION_BYTES_MAX: usize = 1_024;

/// The owner of a name lets a node provide it. Who signs it is the owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delegation {
    /// The name.
    pub name: ServiceName,
    /// Who may publish it.
    pub provider: PublicKey,
    /// When it ends.
    pub expires_at: Timestamp,
}

impl Payload for Delegation {
    const DOMAIN: &'static [u8] = b"meshwise/delegation/1\0";

    fn check(&self) -> Result<(), WireError> {
        Ok(())
    }
}

/// A text that is no delegation. What it should have been is said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DelegationTextError {
    /// Something else.
    #[error(
        "this is no delegation; one begins with {PREFIX} and is printed by 'meshwise service delegate' \
         at the node that owns the name"
    )]
    Kind,
    /// Cut off or changed on the way.
    #[error("the delegation is damaged; copy all of it")]
    Damaged,
}

/// The text that people pass on.
pub fn to_text(signed: &Signed) -> String {
    format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&wire::encode(signed)))
}

/// Reads [`to_text`]'s text, and what it says. Whether its owner belongs to the network is judged
/// with the record that it comes in.
///
/// # Errors
/// [`DelegationTextError`].
pub fn from_text(text: &str) -> Result<(Signed, Delegation), DelegationTextError> {
    let rest = text.trim().strip_prefix(PREFIX).ok_or(DelegationTextError::Kind)?;
    if rest.len() > 2 * DELEGATION_BYTES_MAX {
        return Err(DelegationTextError::Damaged);
    }
    let bytes =
        BASE64URL_NOPAD.decode(rest.as_bytes()).map_err(|_| DelegationTextError::Damaged)?;
    let signed: Signed =
        wire::decode(&bytes, DELEGATION_BYTES_MAX).map_err(|_| DelegationTextError::Damaged)?;
    let delegation = signed.open().map_err(|_| DelegationTextError::Damaged)?;
    Ok((signed, delegation))
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use proptest::prelude::*;

    use super::*;
    use crate::engine::overlay::membership::{Author, Credential};

    #[test]
    fn a_delegation_survives_being_passed_on_and_damage_is_named() {
        let root = SigningKey::from_bytes(&[9; 32]);
        let key = SigningKey::from_bytes(&[1; 32]);
        let public = PublicKey(key.verifying_key().to_bytes());
        let credential = Credential::issue(&root, &public, Timestamp(0), Timestamp(u64::MAX));
        let name =
            format!("{}.{}.{}.{}", "a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(61));
        let delegation = Delegation {
            name: name.parse().unwrap(),
            provider: PublicKey([2; 32]),
            expires_at: Timestamp(u64::MAX),
        };
        let signed = Signed::seal(&Author { key, credential }, &delegation);
        assert!(wire::encode(&signed).len() <= DELEGATION_BYTES_MAX, "the longest fits");
        let text = to_text(&signed);
        assert_eq!(from_text(&format!(" {text}\n")), Ok((signed.clone(), delegation)));
        assert_eq!(from_text(&text[..text.len() - 4]), Err(DelegationTextError::Damaged));
        assert_eq!(from_text("hello"), Err(DelegationTextError::Kind));
        let forged = Signed { key: PublicKey([7; 32]), ..signed };
        assert_eq!(from_text(&to_text(&forged)), Err(DelegationTextError::Damaged));
    }

    proptest! {
        #[test]
        fn arbitrary_texts_never_panic(text in ".{0,300}", rest in "[A-Za-z0-9_-]{0,600}") {
            let _ = from_text(&text);
            let _ = from_text(&format!("{PREFIX}{rest}"));
        }
    }
}
