//! Signatures that were found right, remembered by the nodes of one simulated world together.
//!
//! Gossip brings the same message to every node, and every node checks its signature: in a world of
//! n nodes the same n times, which would be most of what it costs. Nothing is believed unchecked: what
//! differs in a single byte from what was checked is checked by itself. For the same reason what an
//! advertisement says is kept once. A real node has no use for this, because it hears of each message
//! once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::membership::Credential;
use super::wire::{LinkStateAdvertisement, Payload, Signed, WireError};
use crate::engine::measure::LinkQuality;
use crate::engine::types::{NodeId, PublicKey};

/// Signatures that are remembered; the one known longest makes room.
pub const CHECKED_MAX: usize = 16_384;

/// An advertisement that was opened: kept once, by however many nodes.
#[derive(Clone, Debug)]
pub struct OpenedLinkState {
    /// As it was signed.
    pub signed: Arc<Signed>,
    /// Its sequence number.
    pub sequence: u64,
    /// The links that are up.
    pub links: Arc<BTreeMap<NodeId, LinkQuality>>,
}

impl OpenedLinkState {
    /// Verifies and decodes an advertisement.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn open(signed: Signed) -> Result<Self, WireError> {
        let LinkStateAdvertisement { sequence, links } = signed.open()?;
        Ok(Self { signed: Arc::new(signed), sequence, links: Arc::new(links) })
    }
}

/// See the module documentation.
#[derive(Debug, Default)]
pub struct CheckedSignatures(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// By signature.
    right: BTreeMap<Vec<u8>, Right>,
    order: VecDeque<Vec<u8>>,
}

/// What a signature was found right for.
#[derive(Clone, Debug)]
enum Right {
    LinkState(OpenedLinkState),
    Other(&'static [u8], Signed),
    Member(PublicKey, Credential),
}

impl CheckedSignatures {
    /// Opens an advertisement, unless it was opened before.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn open(&self, signed: Signed) -> Result<OpenedLinkState, WireError> {
        if let Some(Right::LinkState(opened)) = self.known().right.get(&signed.signature)
            && *opened.signed == signed
        {
            return Ok(opened.clone());
        }
        let opened = OpenedLinkState::open(signed)?;
        self.remember(&opened.signed.signature, Right::LinkState(opened.clone()));
        Ok(opened)
    }

    /// Checks a signature, unless it was found right before for the same message.
    pub(super) fn check<T: Payload>(
        &self,
        signed: &Signed,
        verify: impl FnOnce() -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        let is_it = |right: &Right| matches!(right, Right::Other(domain, known) if *domain == T::DOMAIN && known == signed);
        if self.known().right.get(&signed.signature).is_some_and(is_it) {
            return Ok(());
        }
        verify()?;
        self.remember(&signed.signature, Right::Other(T::DOMAIN, signed.clone()));
        Ok(())
    }

    /// Checks a credential, unless it was found right before for the same key.
    pub(super) fn credential<E>(
        &self,
        key: &PublicKey,
        credential: &Credential,
        verify: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let is_it = |right: &Right| matches!(right, Right::Member(known, shown) if known == key && shown == credential);
        if self.known().right.get(&credential.signature).is_some_and(is_it) {
            return Ok(());
        }
        verify()?;
        self.remember(&credential.signature, Right::Member(*key, credential.clone()));
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, signature: &[u8], right: Right) {
        let mut known = self.known();
        if known.right.insert(signature.to_vec(), right).is_none() {
            known.order.push_back(signature.to_vec());
        }
        if known.order.len() > CHECKED_MAX
            && let Some(oldest) = known.order.pop_front()
        {
            known.right.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use ed25519_dalek::SigningKey;

    use super::super::membership::Author;
    use super::super::wire::ServiceRecord;
    use super::*;

    #[test]
    fn the_same_message_is_checked_once_and_another_one_by_itself() {
        let checked = CheckedSignatures::default();
        let count = Cell::new(0);
        let signed = |body: u8, signature: u8| Signed {
            key: PublicKey([1; 32]),
            credential: Credential::default(),
            body: vec![body],
            signature: vec![signature; 64],
        };
        let counted = |result| {
            count.set(count.get() + 1);
            result
        };
        let check =
            |message: Signed, result| checked.check::<ServiceRecord>(&message, || counted(result));
        for _ in 0..3 {
            assert_eq!(check(signed(1, 1), Ok(())), Ok(()));
        }
        assert_eq!(count.get(), 1);
        let wrong = || Err(WireError::Signature);
        for _ in 0..2 {
            assert_eq!(check(signed(2, 1), wrong()), wrong(), "another body");
            assert_eq!(check(signed(1, 2), wrong()), wrong(), "another signature");
            let other = checked.check::<LinkStateAdvertisement>(&signed(1, 1), || counted(wrong()));
            assert_eq!(other, wrong(), "another kind");
        }
        assert_eq!(count.get(), 7, "what is wrong is not remembered");
        assert_eq!(check(signed(1, 1), wrong()), Ok(()));
    }

    #[test]
    fn an_advertisement_is_kept_once_and_a_forged_one_never() {
        let checked = CheckedSignatures::default();
        let key = Author::root(SigningKey::from_bytes(&[1; 32]));
        let signed =
            Signed::seal(&key, &LinkStateAdvertisement { sequence: 7, links: BTreeMap::new() });
        let first = checked.open(signed.clone()).unwrap();
        let second = checked.open(signed.clone()).unwrap();
        assert!(first.sequence == 7 && Arc::ptr_eq(&first.links, &second.links));
        let forged = Signed { body: vec![9, 0], ..signed };
        assert!(matches!(checked.open(forged), Err(WireError::Signature)));
    }
}
