//! Before a node runs: its data directory founds a network, or joins one by a token.
//!
//! A node that was started without either has founded a network of its own. As long as it has let nobody
//! in, joining another one replaces it; its files are renamed, never deleted.

use std::path::Path;

use super::network::{self, Network, NetworkError};
use super::{Clock, Identity, JoinError, NodeError, join, peer_id_text, take};
use crate::engine::overlay::membership::{Credential, NetworkState, NotMember};
use crate::engine::overlay::token::{Invite, Token, is_network_name};
use crate::engine::types::Timestamp;

/// Why a data directory did not found or join a network. One line: what, why, what to do.
#[derive(Debug, thiserror::Error)]
pub enum JoiningError {
    /// A node runs there, or the directory or its identity is unusable.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// It has a network already, or the files that say so are unusable.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The invitation is over, or its issuer was not reached or did not let this node in.
    #[error(transparent)]
    NotLetIn(#[from] JoinError),
    /// A certificate of another node.
    #[error(
        "this certificate is for {wanted}, but this node is {me}; ask for one with that peer id"
    )]
    OtherKey {
        /// Peer id that it was made for.
        wanted: String,
        /// Peer id of this node.
        me: String,
    },
    /// What came back does not let this node in.
    #[error("{0}")]
    NotMember(#[from] NotMember),
}

/// What joining came to.
#[derive(Clone, Debug)]
pub struct Joined {
    /// What is kept of the network.
    pub state: NetworkState,
    /// It was this node's network before, and nothing had to be done.
    pub already: bool,
    /// Name of the network of its own that was set aside.
    pub set_aside: Option<String>,
}

/// Founds a network in a data directory that has none, on which no node runs.
///
/// # Errors
/// [`JoiningError`]; nothing is changed.
pub fn create_network(data_dir: &Path, name: &str) -> Result<(Identity, Network), JoiningError> {
    if !is_network_name(name) {
        return Err(NetworkError::Name(name.to_owned()).into());
    }
    let (_lock, identity) = take(data_dir)?;
    let network = Network::found(name, &identity.public_key(), Clock::default().now());
    network.save_new(data_dir)?;
    Ok((identity, network))
}

/// Joins the network of a token with a data directory on which no node runs: redeems an invitation at
/// its issuer, or takes a certificate. A membership that is still valid is left as it is.
///
/// # Errors
/// [`JoiningError`]; the network that was there is there still.
pub async fn join_network(data_dir: &Path, token: &Token) -> Result<Joined, JoiningError> {
    join_with(data_dir, token, Clock::default().now(), join).await
}

async fn join_with(
    data_dir: &Path,
    token: &Token,
    now: Timestamp,
    redeem: impl AsyncFnOnce(&Identity, &Invite) -> Result<Credential, JoinError>,
) -> Result<Joined, JoiningError> {
    let (_lock, identity) = take(data_dir)?;
    let me = identity.public_key();
    let root = match token {
        Token::Invite(invite) => invite.root,
        Token::Certificate(certificate) => certificate.root,
    };
    let known = Network::load(data_dir)?;
    let (member, other) = match known {
        Some(known) if known.state.root == root => (Some(known.state), None),
        Some(known) if !known.is_alone(&me) => return Err(known.is_there(data_dir).into()),
        other => (None, other),
    };
    if let Some(state) = &member {
        let valid = state.membership().roster().check(&me, &state.credential, now);
        let lasts_longer = match token {
            Token::Invite(_) => false,
            Token::Certificate(new) => new.credential.expires_at > state.credential.expires_at,
        };
        match valid {
            Ok(()) if !lasts_longer => {
                return Ok(Joined { state: state.clone(), already: true, set_aside: None });
            }
            Err(NotMember::Revoked) => return Err(NotMember::Revoked.into()),
            _ => {}
        }
    }
    let new = match token {
        Token::Invite(invite) => {
            let credential = redeem(&identity, invite).await?;
            let (name, issuer) = (&invite.name, invite.issuer);
            let mut state = NetworkState::joined(name, root, issuer, credential);
            let issuer = peer_id_text(&issuer);
            let addresses = invite.addresses.iter();
            state.addresses = addresses.map(|address| with_peer(address, &issuer)).collect();
            state
        }
        Token::Certificate(new) if new.key != me => {
            let (wanted, me) = (peer_id_text(&new.key), peer_id_text(&me));
            return Err(JoiningError::OtherKey { wanted, me });
        }
        Token::Certificate(new) => {
            NetworkState::joined(&new.name, root, new.issuer, new.credential.clone())
        }
    };
    new.membership().roster().check(&me, &new.credential, now)?;
    let state = match member {
        Some(mut state) => {
            state.credential = new.credential;
            state.issuer = new.issuer;
            if !new.addresses.is_empty() {
                state.addresses = new.addresses;
            }
            network::keep(data_dir, &state)?;
            state
        }
        None => {
            if let Some(other) = &other {
                other.set_aside(data_dir)?;
            }
            Network { state: new.clone(), root: None }.save_new(data_dir)?;
            new
        }
    };
    Ok(Joined { state, already: false, set_aside: other.map(|other| other.state.name) })
}

/// An address that leads to this peer and nobody else.
fn with_peer(address: &str, peer: &str) -> String {
    match address.split_once("/p2p/") {
        Some((place, _)) => format!("{place}/p2p/{peer}"),
        None => format!("{address}/p2p/{peer}"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::overlay::issuer::Issuer;
    use crate::engine::overlay::token::Certificate;

    const DAY: Duration = Duration::from_secs(86_400);

    fn now() -> Timestamp {
        Clock::default().now()
    }

    /// Another node's network with one open invitation, and its token.
    fn elsewhere(now: Timestamp) -> (Network, Issuer, Invite) {
        let founder = Identity::generate().public_key();
        let network = Network::found("home", &founder, now);
        let root = network.root.clone().unwrap();
        let mut issuer = Issuer::new(root, network.state.ledger.clone());
        let expires_at = issuer.invite(&[7; 16], 1, DAY, now).unwrap().expires_at;
        let invite = Invite {
            name: "home".into(),
            root: network.state.root,
            issuer: founder,
            addresses: vec!["/ip4/10.0.0.1/tcp/4747".into()],
            secret: [7; 16],
            expires_at,
        };
        (network, issuer, invite)
    }

    fn certificate(network: &Network, issuer: &mut Issuer, me: &Identity, at: Timestamp) -> Token {
        let key = me.public_key();
        let credential = issuer.certify(&key, at).unwrap();
        let (name, root, issuer) = ("home".into(), network.state.root, network.state.issuer);
        Token::Certificate(Certificate { name, root, issuer, key, credential })
    }

    async fn redeem_at(
        data_dir: &Path,
        issuer: &mut Issuer,
        invite: &Invite,
        now: Timestamp,
    ) -> Result<Joined, JoiningError> {
        let token = Token::Invite(invite.clone());
        let redeem = async |me: &Identity, invite: &Invite| {
            Ok(issuer.redeem(&invite.secret, &me.public_key(), now).unwrap())
        };
        join_with(data_dir, &token, now, redeem).await
    }

    async fn nobody(_: &Identity, _: &Invite) -> Result<Credential, JoinError> {
        panic!("nobody is to be asked")
    }

    #[tokio::test]
    async fn an_invitation_is_redeemed_once_kept_and_renewed_when_it_is_over() {
        let (dir, start) = (tempfile::tempdir().unwrap(), now());
        let (_, mut issuer, mut invite) = elsewhere(start);
        let joined = redeem_at(dir.path(), &mut issuer, &invite, start).await.unwrap();
        assert!(!joined.already && joined.set_aside.is_none());
        let kept = Network::load(dir.path()).unwrap().unwrap();
        assert_eq!((&kept.state, kept.root.is_none()), (&joined.state, true));
        let issuer_id = peer_id_text(&invite.issuer);
        assert_eq!(kept.state.addresses, [format!("/ip4/10.0.0.1/tcp/4747/p2p/{issuer_id}")]);
        let token = Token::Invite(invite.clone());
        let again = join_with(dir.path(), &token, start, nobody).await.unwrap();
        assert!(again.already);
        let late = start + 200 * DAY;
        invite.expires_at = late + DAY;
        issuer.invite(&[8; 16], 1, DAY, late).unwrap();
        invite.secret = [8; 16];
        let renewed = redeem_at(dir.path(), &mut issuer, &invite, late).await.unwrap();
        assert!(!renewed.already && renewed.state.credential.expires_at > late);
        assert_eq!(Network::load(dir.path()).unwrap().unwrap().state, renewed.state);
    }

    #[tokio::test]
    async fn a_certificate_is_for_one_key_and_of_one_root() {
        let (dir, start) = (tempfile::tempdir().unwrap(), now());
        let (network, mut issuer, _) = elsewhere(start);
        let me = Identity::load_or_create(dir.path()).unwrap();
        let other = certificate(&network, &mut issuer, &Identity::generate(), start);
        let refused = join_with(dir.path(), &other, start, nobody).await;
        assert!(matches!(refused, Err(JoiningError::OtherKey { .. })), "{refused:?}");
        let mut forged = certificate(&network, &mut issuer, &me, start);
        if let Token::Certificate(forged) = &mut forged {
            forged.credential.expires_at = start + 9_999 * DAY;
        }
        let refused = join_with(dir.path(), &forged, start, nobody).await;
        assert!(matches!(refused, Err(JoiningError::NotMember(NotMember::Forged))), "{refused:?}");
        let good = certificate(&network, &mut issuer, &me, start);
        assert!(!join_with(dir.path(), &good, start, nobody).await.unwrap().already);
        assert!(join_with(dir.path(), &good, start, nobody).await.unwrap().already);
        let longer = certificate(&network, &mut issuer, &me, start + DAY);
        let joined = join_with(dir.path(), &longer, start + DAY, nobody).await.unwrap();
        assert!(!joined.already && joined.state.credential.issued_at == start + DAY);
    }

    #[tokio::test]
    async fn a_network_of_its_own_is_set_aside_but_not_once_somebody_else_is_in() {
        let (dir, start) = (tempfile::tempdir().unwrap(), now());
        let (identity, own) = create_network(dir.path(), "mine").unwrap();
        let (network, mut issuer, _) = elsewhere(start);
        let token = certificate(&network, &mut issuer, &identity, start);
        let joined = join_with(dir.path(), &token, start, nobody).await.unwrap();
        assert_eq!(joined.set_aside.as_deref(), Some("mine"));
        let root = own.state.root.node_id();
        for file in [network::ROOT_FILE, network::STATE_FILE] {
            let aside = dir.path().join(format!("{file}.{root}"));
            std::fs::rename(aside, dir.path().join(file)).unwrap();
        }
        let mut back = Network::load(dir.path()).unwrap().unwrap();
        assert_eq!((&back.state, back.root.is_some()), (&own.state, true), "nothing was lost");
        let mut own_issuer = Issuer::new(back.root.take().unwrap(), back.state.ledger.clone());
        own_issuer.certify(&Identity::generate().public_key(), start).unwrap();
        back.state.ledger = own_issuer.ledger().clone();
        network::keep(dir.path(), &back.state).unwrap();
        let refused = join_with(dir.path(), &token, start, nobody).await;
        let founded = matches!(&refused, Err(JoiningError::Network(NetworkError::Founded { .. })));
        assert!(founded, "{refused:?}");
        assert_eq!(Network::load(dir.path()).unwrap().unwrap().state, back.state);
    }

    #[test]
    fn a_network_is_not_created_twice_or_under_a_running_node() {
        let dir = tempfile::tempdir().unwrap();
        let bad = create_network(dir.path(), "Home!");
        assert!(matches!(bad, Err(JoiningError::Network(NetworkError::Name(_)))));
        let held = take(dir.path()).unwrap();
        let busy = create_network(dir.path(), "home");
        assert!(matches!(busy, Err(JoiningError::Node(NodeError::InUse { .. }))));
        drop(held);
        create_network(dir.path(), "home").unwrap();
        let again = create_network(dir.path(), "home");
        assert!(matches!(again, Err(JoiningError::Network(NetworkError::Founded { .. }))));
    }
}
