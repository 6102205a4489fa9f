//! Who is let in and who is put out: the engine's handlers for invitations, revocations and granted
//! names. The rules are in [`super::overlay::membership`] and [`super::overlay::issuer`].

use std::time::Duration;

use super::Engine;
use super::event::{Answer, CommandError, Notice, Output, RequestId, Verdict};
use super::overlay::issuer::{Issuer, NotLetIn, Secret};
use super::overlay::membership::{Credential, NameGrant, NetworkState};
use super::overlay::wire::{
    self, GossipMessage, JOIN_BYTES_MAX, JoinRequest, JoinResponse, Signed, WireError,
};
use super::types::{NodeId, PublicKey, ServiceName, Timestamp};

/// Between two tries to renew this node's credential.
const RENEWAL_RETRY: Duration = Duration::from_secs(3_600);

impl Engine {
    /// What must be kept of the network over a restart.
    pub fn network(&self) -> NetworkState {
        let network = &self.config.network;
        NetworkState {
            name: network.name.clone(),
            root: network.root,
            issuer: network.issuer,
            addresses: network.addresses.clone(),
            credential: self.author.credential.clone(),
            revocations: self.membership.roster().revocations().cloned().collect(),
            grants: self.services.registry().grants().cloned().collect(),
            ledger: self.issuer.as_ref().map(|issuer| issuer.ledger().clone()).unwrap_or_default(),
        }
    }

    /// Name of the network that this node belongs to, for people.
    pub fn network_name(&self) -> &str {
        &self.config.network.name
    }

    /// The node that signs credentials of this network.
    pub fn network_issuer(&self) -> PublicKey {
        self.config.network.issuer
    }

    /// Has the network kept when it changed: once, whatever changed in this step, and before anybody
    /// is told of it.
    pub(super) fn keep_network(&mut self) {
        if std::mem::take(&mut self.keep) {
            let network = self.network();
            self.outputs.push_front(Output::KeepNetwork(Box::new(network)));
        }
    }

    pub(super) fn invite(
        &mut self,
        request: RequestId,
        secret: &Secret,
        uses: u32,
        lifetime: Duration,
        now: Timestamp,
    ) {
        let answer = match &mut self.issuer {
            None => Err(CommandError::NotIssuer),
            Some(issuer) => issuer
                .invite(secret, uses, lifetime, now)
                .map(|invitation| Answer::Invited { expires_at: invitation.expires_at })
                .ok_or(CommandError::Busy("the open invitations")),
        };
        self.keep |= answer.is_ok();
        self.outputs.push_back(Output::Answer { request, answer });
    }

    pub(super) fn certify(&mut self, request: RequestId, key: &PublicKey, now: Timestamp) {
        let answer = match &mut self.issuer {
            None => Err(CommandError::NotIssuer),
            Some(issuer) => {
                let certified = issuer.certify(key, now).map(Answer::Certified);
                certified.map_err(CommandError::NotLetIn)
            }
        };
        self.keep |= answer.is_ok();
        self.outputs.push_back(Output::Answer { request, answer });
    }

    /// Somebody wants to be let in, or a member wants a new credential.
    pub(super) fn join_asked(&mut self, from: &PublicKey, bytes: &[u8], now: Timestamp) -> Vec<u8> {
        let issued = |issuer: &Option<Issuer>| {
            issuer.as_ref().and_then(|issuer| issuer.ledger().issued.get(from).cloned())
        };
        let before = issued(&self.issuer);
        let response: JoinResponse = match (&mut self.issuer, wire::decode(bytes, JOIN_BYTES_MAX)) {
            (None, _) => Err(NotLetIn::NotIssuer),
            (_, Err(_)) => Err(NotLetIn::Malformed),
            (Some(issuer), Ok(JoinRequest::Redeem(secret))) => issuer.redeem(&secret, from, now),
            (Some(issuer), Ok(JoinRequest::Renew)) => issuer.renew(from, now),
        };
        if let Err(why) = &response {
            self.dropped("join", format!("{}: {why}", from.node_id()));
        }
        self.keep |= issued(&self.issuer) != before;
        wire::encode(&response)
    }

    /// Renews this node's credential when the last third of its time has begun: the issuer by itself,
    /// the others by asking it, every [`RENEWAL_RETRY`] while it is connected.
    pub(super) fn renew_if_due(&mut self, now: Timestamp) {
        let credential = &self.author.credential;
        let lifetime = credential.expires_at.since(credential.issued_at);
        if credential.expires_at.since(now) >= lifetime / 3 || self.renew_at > now {
            return;
        }
        let me = self.key();
        if let Some(issuer) = &mut self.issuer {
            self.renew_at = now + RENEWAL_RETRY;
            let renewed = issuer.certify(&me, now).map_err(|why| why.to_string());
            if let Err(why) = renewed.and_then(|own| self.take_credential(&me, own, now)) {
                self.dropped("renewal", why);
            }
            return;
        }
        let issuer = self.config.network.issuer.node_id();
        if self.peers.contains_key(&issuer) {
            self.renew_at = now + RENEWAL_RETRY;
            self.outputs.push_back(Output::RequestRenewal(issuer));
        }
    }

    pub(super) fn renewal_received(&mut self, from: NodeId, bytes: &[u8], now: Timestamp) {
        let me = self.key();
        let renewed = match wire::decode::<JoinResponse>(bytes, JOIN_BYTES_MAX) {
            Ok(Ok(credential)) => self.take_credential(&me, credential, now),
            Ok(Err(why)) => Err(why.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(why) = renewed {
            self.dropped("renewal", format!("from {from}: {why}"));
        }
    }

    fn take_credential(
        &mut self,
        me: &PublicKey,
        credential: Credential,
        now: Timestamp,
    ) -> Result<(), String> {
        let roster = self.membership.roster();
        roster.check(me, &credential, now).map_err(|why| why.to_string())?;
        if credential.expires_at <= self.author.credential.expires_at {
            return Err("it does not last longer than the one that is here".into());
        }
        self.author.credential = credential.clone();
        self.services.set_author(self.author.clone());
        self.membership.renew(credential);
        self.outputs.push_back(Output::Roster(self.membership.roster().clone()));
        self.keep = true;
        Ok(())
    }

    pub(super) fn revoke(&mut self, request: RequestId, key: &PublicKey, now: Timestamp) {
        let answer = match &mut self.issuer {
            None => Err(CommandError::NotIssuer),
            Some(_) if *key == self.author.public() => Err(CommandError::RevokesItself),
            Some(issuer) => {
                let signed = issuer.revoke(key, now);
                match self.put_out(&signed, now) {
                    Ok(_) => {
                        let message = wire::encode(&GossipMessage::Revocation(signed));
                        self.outputs.push_back(Output::Publish(message));
                        Ok(Answer::Done)
                    }
                    Err(_) => Err(CommandError::Busy("the revocations")),
                }
            }
        };
        self.outputs.push_back(Output::Answer { request, answer });
    }

    pub(super) fn revocation_received(&mut self, signed: &Signed, now: Timestamp) -> Verdict {
        match self.put_out(signed, now) {
            Ok(true) => Verdict::Accept,
            Ok(false) => Verdict::Ignore,
            Err(error) => {
                self.dropped("revocation", error.to_string());
                Verdict::Reject
            }
        }
    }

    /// Takes a revocation and forgets everything that the revoked key has said.
    fn put_out(&mut self, signed: &Signed, now: Timestamp) -> Result<bool, WireError> {
        let Some(key) = self.membership.revoke(signed)? else { return Ok(false) };
        let node = key.node_id();
        self.outputs.push_back(Output::Roster(self.membership.roster().clone()));
        self.keep = true;
        self.services.forget(&key);
        self.bootstrapper.forget(node);
        self.advertisements.remove(&node);
        if let Some(token) = self.gossip.forget(node).and_then(|held| held.token) {
            let verdict = Verdict::Ignore;
            self.outputs.push_back(Output::GossipVerdict { token, verdict });
        }
        let changes = self.graph.forget(node);
        self.links_changed(changes, now);
        if self.peers.contains_key(&node) {
            self.outputs.push_back(Output::Disconnect(node));
            self.peer_disconnected(node, now);
        }
        self.notice(Notice::Revoked { node });
        Ok(true)
    }

    pub(super) fn grant(
        &mut self,
        request: RequestId,
        name: &ServiceName,
        owner: &PublicKey,
        now: Timestamp,
    ) {
        let answer = match &self.issuer {
            None => Err(CommandError::NotIssuer),
            Some(issuer) => {
                let signed = issuer.grant(name, owner, now);
                match self.grant_received(&signed, now) {
                    Verdict::Accept => {
                        let message = wire::encode(&GossipMessage::Grant(signed));
                        self.outputs.push_back(Output::Publish(message));
                        Ok(Answer::Done)
                    }
                    _ => Err(CommandError::Busy("the granted names")),
                }
            }
        };
        self.outputs.push_back(Output::Answer { request, answer });
    }

    pub(super) fn grant_received(&mut self, signed: &Signed, now: Timestamp) -> Verdict {
        match self.membership.open_of_root::<NameGrant>(signed) {
            Ok(grant) => {
                if !self.services.grant(grant, signed.clone(), now, &mut self.outputs) {
                    return Verdict::Ignore;
                }
                self.keep = true;
                Verdict::Accept
            }
            Err(error) => {
                self.dropped("name-grant", error.to_string());
                Verdict::Reject
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;

    use super::super::EngineConfig;
    use super::super::event::{Command, Input};
    use super::super::overlay::issuer::RENEWAL_MIN;
    use super::super::overlay::membership::{Author, CREDENTIAL_LIFETIME, Revocation};
    use super::super::overlay::wire::SyncResponse;
    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000_000_000);

    fn key(byte: u8) -> SigningKey {
        SigningKey::from_bytes(&[byte; 32])
    }

    fn public(byte: u8) -> PublicKey {
        PublicKey(key(byte).verifying_key().to_bytes())
    }

    /// Node 1, which has founded network 9.
    fn founder() -> Engine {
        let network = NetworkState::found(&key(9), "home", &public(1), NOW);
        Engine::new(EngineConfig { root: Some(key(9)), ..EngineConfig::new(key(1), network) }, NOW)
    }

    /// What an input leads to.
    fn outputs(engine: &mut Engine, input: Input, now: Timestamp) -> Vec<Output> {
        engine.handle(now, input);
        std::iter::from_fn(|| engine.poll_output()).collect()
    }

    /// What is to be kept, and at which place among the outputs.
    fn kept(outputs: &[Output]) -> Vec<(usize, &NetworkState)> {
        let kept = outputs.iter().enumerate().filter_map(|(at, output)| match output {
            Output::KeepNetwork(state) => Some((at, &**state)),
            _ => None,
        });
        kept.collect()
    }

    #[test]
    fn the_issuer_renews_its_own_credential_and_goes_on_living() {
        let mut engine = founder();
        let lifetime = CREDENTIAL_LIFETIME;
        engine.handle_timeout(NOW + lifetime / 2);
        assert_eq!(engine.author.credential.issued_at, NOW, "there is time");
        let late = NOW + (lifetime - Duration::from_secs(86_400));
        engine.handle_timeout(late);
        let renewed = engine.author.credential.clone();
        assert_eq!(renewed.issued_at, late);
        let roster = engine.membership.roster();
        assert_eq!(roster.check(&public(1), &renewed, NOW + lifetime + lifetime / 2), Ok(()));
        assert_eq!(roster.credential, renewed, "shown to others from now on");
    }

    #[test]
    fn many_changes_at_once_are_kept_once() {
        let mut engine = founder();
        let revoked = |byte| Revocation { key: public(byte), at: NOW };
        let root = Author::root(key(9));
        let signed = (20..40).map(|byte| Signed::seal(&root, &revoked(byte)));
        let messages = signed.map(GossipMessage::Revocation).collect();
        let bytes = wire::encode(&SyncResponse { peers: Vec::new(), messages });
        let from = public(2).node_id();
        let received = |bytes: &Vec<u8>| Input::SyncReceived { from, bytes: bytes.clone() };
        let first = outputs(&mut engine, received(&bytes), NOW);
        let [(_, state)] = kept(&first)[..] else { panic!("kept once") };
        assert_eq!(state.revocations.len(), 20);
        assert!(kept(&outputs(&mut engine, received(&bytes), NOW)).is_empty(), "nothing is new");
    }

    #[test]
    fn what_somebody_is_told_was_kept_before_and_asking_again_keeps_nothing() {
        let mut engine = founder();
        let (request, secret, lifetime) = (1, [7; 16], Duration::from_secs(60));
        let invite = Command::Invite { request, secret, uses: 1, lifetime };
        let invited = outputs(&mut engine, Input::Command(invite), NOW);
        let answered = |output: &Output| {
            matches!(output, Output::Answer { .. } | Output::JoinAnswer { token: 3, .. })
        };
        let [(at, _)] = kept(&invited)[..] else { panic!("kept once") };
        assert!(Some(at) < invited.iter().position(answered));

        let bytes = wire::encode(&JoinRequest::Redeem(secret));
        let ask = |byte| Input::JoinAsked { token: 3, from: public(byte), bytes: bytes.clone() };
        let first = outputs(&mut engine, ask(2), NOW);
        let [(at, state)] = kept(&first)[..] else { panic!("kept once") };
        assert!(Some(at) < first.iter().position(answered));
        assert!(state.ledger.issued.contains_key(&public(2)));
        for (byte, now) in [(2, NOW + RENEWAL_MIN / 2), (3, NOW), (2, NOW + 2 * lifetime)] {
            let again = outputs(&mut engine, ask(byte), now);
            assert!(again.iter().any(answered) && kept(&again).is_empty(), "{byte} at {now:?}");
        }
    }
}
