//! Gossip that waits for the engine to say what becomes of it.
//!
//! However much of it there is, and however long it takes to verify, only so much waits: the swarm never
//! stands still for it, and the rest of the engine's queue is for everything else. A peer that floods
//! takes only its own share. What finds no room is not passed on, and is counted.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use libp2p::{PeerId, gossipsub};

/// Messages that wait, a quarter of what may wait for the engine.
pub(super) const WAITING_MAX: usize = crate::net::EVENTS_MAX / 4;
/// Those of one peer.
pub(super) const WAITING_PER_PEER_MAX: usize = 256;
/// Whose verdict has not come by then gets none: the command was lost. Gossipsub itself forgets an
/// unverified message after 5 s.
const VERDICT_MAX: Duration = Duration::from_secs(10);

/// One of them.
#[derive(Debug)]
pub(super) struct Message {
    /// As gossipsub names it.
    pub(super) id: gossipsub::MessageId,
    /// Who forwarded it.
    pub(super) from: PeerId,
    /// Its length.
    pub(super) bytes: usize,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    messages: BTreeMap<u64, (Message, Instant)>,
    by_peer: BTreeMap<PeerId, usize>,
}

impl Waiting {
    /// One more waits under this token; tokens grow.
    ///
    /// # Errors
    /// The message, when there is no room.
    pub(super) fn add(
        &mut self,
        token: u64,
        message: Message,
        now: Instant,
    ) -> Result<(), Message> {
        self.forget_lost(now);
        let of_peer = self.by_peer.get(&message.from).copied().unwrap_or_default();
        if self.messages.len() >= WAITING_MAX || of_peer >= WAITING_PER_PEER_MAX {
            return Err(message);
        }
        *self.by_peer.entry(message.from).or_default() += 1;
        self.messages.insert(token, (message, now));
        Ok(())
    }

    /// It waits no longer.
    pub(super) fn remove(&mut self, token: u64) -> Option<Message> {
        let (message, _) = self.messages.remove(&token)?;
        if let Some(count) = self.by_peer.get_mut(&message.from) {
            *count -= 1;
            if *count == 0 {
                self.by_peer.remove(&message.from);
            }
        }
        Some(message)
    }

    fn forget_lost(&mut self, now: Instant) {
        while let Some((token, (_, since))) = self.messages.first_key_value()
            && now.duration_since(*since) >= VERDICT_MAX
        {
            self.remove(*token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(from: PeerId) -> Message {
        Message { id: gossipsub::MessageId::from(vec![1]), from, bytes: 1 }
    }

    #[test]
    fn a_peer_and_all_have_a_bound_and_what_is_lost_makes_room() {
        let (mut waiting, now) = (Waiting::default(), Instant::now());
        let peers: Vec<PeerId> = (0..5).map(|_| PeerId::random()).collect();
        let mut token = 0;
        let mut add = |waiting: &mut Waiting, peer: usize, now| {
            token += 1;
            waiting.add(token, message(peers[peer]), now).is_ok()
        };
        let fits = (0..1_000).filter(|_| add(&mut waiting, 0, now)).count();
        assert_eq!(fits, WAITING_PER_PEER_MAX);
        assert!(add(&mut waiting, 1, now), "others have room");
        assert!(waiting.remove(1).is_some() && waiting.remove(1).is_none());
        assert!(add(&mut waiting, 0, now) && !add(&mut waiting, 0, now));
        let fits = (0..5_000).filter(|turn| add(&mut waiting, 1 + turn % 4, now)).count();
        assert_eq!(fits, WAITING_MAX - WAITING_PER_PEER_MAX - 1);
        assert!(!add(&mut waiting, 4, now));
        assert!(add(&mut waiting, 0, now + VERDICT_MAX));
        assert_eq!((waiting.messages.len(), waiting.by_peer.len()), (1, 1));
    }
}
