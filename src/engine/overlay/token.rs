//! The texts that people pass on: an invitation's token, and a credential made for a known key.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize};

use super::issuer::Secret;
use super::membership::Credential;
use super::wire::{self, ADDRESS_BYTES_MAX, ADDRESSES_MAX};
use crate::engine::types::{PublicKey, Timestamp};

const INVITATION: &str = "meshwise-invitation-1-";
const CERTIFICATE: &str = "meshwise-certificate-1-";
/// Longest token (bytes of text).
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// Longest name of a network (bytes).
pub const NAME_BYTES_MAX: usize = 32;

/// A text that is no token. What it should have been is said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Neither an invitation nor a certificate.
    #[error(
        "this is neither an invitation nor a certificate; an invitation begins with {INVITATION} \
         and is printed by 'meshwise network invite'"
    )]
    Kind,
    /// Cut off or changed on the way.
    #[error("the token is damaged; copy all of it")]
    Damaged,
}

/// What lets a node join: printed by the issuer, typed at the new node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invite {
    /// Name of the network, for people.
    pub name: String,
    /// The network.
    pub root: PublicKey,
    /// Who lets in.
    pub issuer: PublicKey,
    /// Where the issuer listens, as multiaddress text; at most [`ADDRESSES_MAX`].
    pub addresses: Vec<String>,
    /// Proves that one was invited.
    pub secret: Secret,
    /// When it ends.
    pub expires_at: Timestamp,
}

/// A credential for one key, passed on by hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// Name of the network, for people.
    pub name: String,
    /// The network.
    pub root: PublicKey,
    /// Who signed and can renew it.
    pub issuer: PublicKey,
    /// Whom it lets in.
    pub key: PublicKey,
    /// The credential.
    pub credential: Credential,
}

/// Either.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token {
    /// To be redeemed at the issuer.
    Invite(Invite),
    /// To be kept as it is.
    Certificate(Certificate),
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (prefix, bytes) = match self {
            Self::Invite(invite) => (INVITATION, wire::encode(invite)),
            Self::Certificate(certificate) => (CERTIFICATE, wire::encode(certificate)),
        };
        write!(f, "{prefix}{}", BASE64URL_NOPAD.encode(&bytes))
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::Damaged);
        }
        let bytes =
            |rest: &str| BASE64URL_NOPAD.decode(rest.as_bytes()).map_err(|_| TokenError::Damaged);
        let (token, name) = if let Some(rest) = text.strip_prefix(INVITATION) {
            let invite: Invite =
                wire::decode(&bytes(rest)?, TOKEN_BYTES_MAX).map_err(|_| TokenError::Damaged)?;
            let fits = invite.addresses.len() <= ADDRESSES_MAX
                && invite.addresses.iter().all(|address| address.len() <= ADDRESS_BYTES_MAX);
            if !fits {
                return Err(TokenError::Damaged);
            }
            let name = invite.name.clone();
            (Self::Invite(invite), name)
        } else if let Some(rest) = text.strip_prefix(CERTIFICATE) {
            let certificate: Certificate =
                wire::decode(&bytes(rest)?, TOKEN_BYTES_MAX).map_err(|_| TokenError::Damaged)?;
            let name = certificate.name.clone();
            (Self::Certificate(certificate), name)
        } else {
            return Err(TokenError::Kind);
        };
        if is_network_name(&name) { Ok(token) } else { Err(TokenError::Damaged) }
    }
}

/// Whether a text can be the name of a network: 1 to [`NAME_BYTES_MAX`] lower-case letters, digits and
/// hyphens.
pub fn is_network_name(text: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn invite() -> Invite {
        Invite {
            name: "home".into(),
            root: PublicKey([1; 32]),
            issuer: PublicKey([2; 32]),
            addresses: vec!["/ip4/127.0.0.1/tcp/4747".into()],
            secret: [3; 16],
            expires_at: Timestamp(4),
        }
    }

    #[test]
    fn tokens_survive_being_passed_on_and_damage_is_named() {
        let certificate = Certificate {
            name: "home".into(),
            root: PublicKey([1; 32]),
            issuer: PublicKey([2; 32]),
            key: PublicKey([5; 32]),
            credential: Credential::default(),
        };
        for token in [Token::Invite(invite()), Token::Certificate(certificate)] {
            let text = token.to_string();
            assert_eq!(format!(" {text}\n").parse(), Ok(token));
            assert_eq!(text[..text.len() - 3].parse::<Token>(), Err(TokenError::Damaged));
        }
        assert_eq!("hello".parse::<Token>(), Err(TokenError::Kind));
        let wrong = Token::Invite(Invite { name: "Ä".into(), ..invite() });
        assert_eq!(wrong.to_string().parse::<Token>(), Err(TokenError::Damaged));
        let many = vec!["/a".to_owned(); ADDRESSES_MAX + 1];
        let wrong = Token::Invite(Invite { addresses: many, ..invite() });
        assert_eq!(wrong.to_string().parse::<Token>(), Err(TokenError::Damaged));
    }

    proptest! {
        #[test]
        fn arbitrary_texts_never_panic(text in ".{0,300}", rest in "[A-Za-z0-9_-]{0,300}") {
            let _ = text.parse::<Token>();
            let _ = format!("{INVITATION}{rest}").parse::<Token>();
            let _ = format!("{CERTIFICATE}{rest}").parse::<Token>();
        }
    }
}
