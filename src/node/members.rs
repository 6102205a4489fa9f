//! What the operator of a running node does about membership: invite, certify, revoke, grant a name,
//! and see who is in.

use std::collections::BTreeMap;
use std::time::Duration;

use super::handle::{NodeHandle, RequestError};
use super::{Identity, View};
use crate::engine::event::{Answer, Command};
use crate::engine::overlay::issuer::{SECRET_BYTES, Secret};
use crate::engine::overlay::token::{Certificate, Invite};
use crate::engine::overlay::wire::{ADDRESS_BYTES_MAX, ADDRESSES_MAX};
use crate::engine::types::{NodeId, PublicKey, ServiceName, Timestamp};

/// A node of the network, as far as this one knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub key: PublicKey,
    /// When its newest credential was signed and when it ends; `None` when none was seen.
    pub times: Option<(Timestamp, Timestamp)>,
    /// Whether it is connected to this node.
    pub connected: bool,
    /// Whether the root has put it out.
    pub revoked: bool,
}

/// Who is in the network, as far as this node knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    /// With the list of all that were let in, which the node with the root key keeps; elsewhere it
    /// is only who was seen.
    pub complete: bool,
    /// In order of key, this node included.
    pub list: Vec<Member>,
}

impl Members {
    fn look(view: &View<'_>) -> Self {
        let engine = &view.engine;
        let (membership, issuer) = (engine.membership(), engine.issuer());
        let roster = membership.roster();
        let peers = engine.peers().values().map(|peer| &peer.key);
        let mut times: BTreeMap<PublicKey, Option<(Timestamp, Timestamp)>> =
            peers.chain(roster.revoked()).map(|key| (*key, None)).collect();
        let me = engine.key();
        let seen = membership.seen().chain([(&me, &roster.credential)]);
        times.extend(seen.map(|(key, c)| (*key, Some((c.issued_at, c.expires_at)))));
        // What the issuer has signed last counts, whatever its node shows still.
        let issued = issuer.into_iter().flat_map(|issuer| &issuer.ledger().issued);
        times.extend(issued.map(|(key, i)| (*key, Some((i.issued_at, i.expires_at)))));
        let member = |(key, times): (PublicKey, _)| Member {
            key,
            times,
            connected: engine.peers().contains_key(&key.node_id()),
            revoked: roster.is_revoked(&key),
        };
        Self { complete: issuer.is_some(), list: times.into_iter().map(member).collect() }
    }
}

impl NodeHandle {
    /// Opens an invitation for `uses` nodes, and returns what its token says. The addresses are
    /// `addresses` (multiaddress text), then where this node listens, as many as fit.
    ///
    /// # Errors
    /// [`RequestError::Command`] on a node without the root key, or with too many open invitations.
    pub async fn invite(
        &self,
        uses: u32,
        lifetime: Duration,
        addresses: Vec<String>,
    ) -> Result<Invite, RequestError> {
        let secret = draw_secret();
        let invited = move |request| Command::Invite { request, secret, uses, lifetime };
        let Answer::Invited { expires_at } = self.ask(invited).await? else {
            return Err(RequestError::Stopped);
        };
        let about = |view: &mut View<'_>| {
            let root = view.engine.membership().roster().root;
            let name = view.engine.network_name().to_owned();
            (name, root, view.engine.network_issuer(), view.net.listening())
        };
        let (name, root, issuer, listening) = self.inspect(about).await?;
        let mut addresses = addresses;
        addresses.extend(entrances(&listening));
        addresses.truncate(ADDRESSES_MAX);
        Ok(Invite { name, root, issuer, addresses, secret, expires_at })
    }

    /// Lets a key in without an invitation, and returns what its token says.
    ///
    /// # Errors
    /// [`RequestError::Command`] on a node without the root key, or for a key that was revoked.
    pub async fn certify(&self, key: PublicKey) -> Result<Certificate, RequestError> {
        let certified = move |request| Command::Certify { request, key };
        let Answer::Certified(credential) = self.ask(certified).await? else {
            return Err(RequestError::Stopped);
        };
        let about = |view: &mut View<'_>| {
            let root = view.engine.membership().roster().root;
            (view.engine.network_name().to_owned(), root, view.engine.network_issuer())
        };
        let (name, root, issuer) = self.inspect(about).await?;
        Ok(Certificate { name, root, issuer, key, credential })
    }

    /// Puts a key out of the network, for good.
    ///
    /// # Errors
    /// [`RequestError::Command`] on a node without the root key, or for its own key.
    pub async fn revoke(&self, key: PublicKey) -> Result<(), RequestError> {
        self.ask(move |request| Command::Revoke { request, key }).await.map(|_| ())
    }

    /// Gives a name to an owner.
    ///
    /// # Errors
    /// [`RequestError::Command`] on a node without the root key.
    pub async fn grant(&self, name: ServiceName, owner: PublicKey) -> Result<(), RequestError> {
        self.ask(move |request| Command::Grant { request, name, owner }).await.map(|_| ())
    }

    /// Who is in the network.
    ///
    /// # Errors
    /// [`RequestError::Stopped`].
    pub async fn members(&self) -> Result<Members, RequestError> {
        self.inspect(|view| Members::look(view)).await
    }

    /// The key of a node that this one has met or let in, or that claims a name.
    ///
    /// # Errors
    /// [`RequestError::UnknownKey`].
    pub async fn key_of(&self, node: NodeId) -> Result<PublicKey, RequestError> {
        if let Some(key) = self.inspect(move |view| view.engine.key_of(node)).await? {
            return Ok(key);
        }
        let mut members = self.members().await?.list.into_iter();
        let member = members.find(|member| member.key.node_id() == node);
        member.map(|member| member.key).ok_or(RequestError::UnknownKey(node))
    }
}

/// From the operating system's randomness: the secret half of an Ed25519 key is nothing else.
fn draw_secret() -> Secret {
    let random = Identity::generate().signing_key().to_bytes();
    let mut secret = [0; SECRET_BYTES];
    secret.copy_from_slice(&random[..SECRET_BYTES]);
    secret
}

/// Where others can reach this node, of where it listens: addresses of this machine alone only when
/// there are no others, and none that need the name of a network card. Without the peer id, which a
/// token holds already.
fn entrances(listening: &[String]) -> Vec<String> {
    let places = listening.iter().filter_map(|address| address.split("/p2p/").next());
    let places = places
        .filter(|address| address.len() <= ADDRESS_BYTES_MAX && !address.starts_with("/ip6/fe80:"));
    let (near, far): (Vec<&str>, Vec<&str>) = places.partition(|address| is_loopback(address));
    let chosen = if far.is_empty() { near } else { far };
    chosen.into_iter().map(str::to_owned).collect()
}

/// Whether only this machine can use an address.
fn is_loopback(address: &str) -> bool {
    address.starts_with("/ip4/127.") || address.starts_with("/ip6/::1/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invitation_names_addresses_that_others_can_use() {
        let listening = [
            "/ip4/127.0.0.1/tcp/4747/p2p/X",
            "/ip4/192.168.1.2/tcp/4747/p2p/X",
            "/ip6/fe80::1/tcp/4747/p2p/X",
            "/ip6/::1/tcp/4747/p2p/X",
        ]
        .map(str::to_owned);
        assert_eq!(entrances(&listening), ["/ip4/192.168.1.2/tcp/4747"]);
        assert_eq!(entrances(&listening[..1]), ["/ip4/127.0.0.1/tcp/4747"]);
        assert!(entrances(&listening[2..3]).is_empty());
    }

    #[test]
    fn no_two_secrets_are_the_same() {
        assert_ne!(draw_secret(), draw_secret());
    }
}
