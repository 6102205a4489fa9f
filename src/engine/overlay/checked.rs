//! Signatures that were found right, remembered by the nodes of one simulated world together.
//!
//! Gossip brings the same message to every node, and every node checks its signature: in a world of
//! n nodes the same n times, which would be most of what it costs. Nothing is believed unchecked: what
//! differs in a single byte from what was checked is checked by itself. A real node has no use for
//! this, because it hears of each message once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use super::wire::{Signed, WireError};

/// Signatures that are remembered; the one known longest makes room.
pub const CHECKED_MAX: usize = 16_384;

/// See the module documentation.
#[derive(Debug, Default)]
pub struct CheckedSignatures(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// By signature: the domain and the message.
    right: BTreeMap<Vec<u8>, (&'static [u8], Signed)>,
    order: VecDeque<Vec<u8>>,
}

impl CheckedSignatures {
    /// Checks a signature, unless it was found right before for the same message.
    pub(super) fn check(
        &self,
        domain: &'static [u8],
        signed: &Signed,
        verify: impl FnOnce() -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |known: &(&[u8], Signed)| known.0 == domain && known.1 == *signed;
        if lock().right.get(&signed.signature).is_some_and(is_it) {
            return Ok(());
        }
        verify()?;
        let mut known = lock();
        if known.right.insert(signed.signature.clone(), (domain, signed.clone())).is_none() {
            known.order.push_back(signed.signature.clone());
        }
        if known.order.len() > CHECKED_MAX
            && let Some(oldest) = known.order.pop_front()
        {
            known.right.remove(&oldest);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::engine::types::PublicKey;

    #[test]
    fn the_same_message_is_checked_once_and_another_one_by_itself() {
        let checked = CheckedSignatures::default();
        let count = Cell::new(0);
        let signed = |body: u8, signature: u8| Signed {
            key: PublicKey([1; 32]),
            body: vec![body],
            signature: vec![signature; 64],
        };
        let check = |domain, message: Signed, result| {
            checked.check(domain, &message, || {
                count.set(count.get() + 1);
                result
            })
        };
        for _ in 0..3 {
            assert_eq!(check(b"a", signed(1, 1), Ok(())), Ok(()));
        }
        assert_eq!(count.get(), 1);
        let wrong = Err(WireError::Signature);
        for _ in 0..2 {
            assert_eq!(check(b"a", signed(2, 1), wrong.clone()), wrong, "another body");
            assert_eq!(check(b"b", signed(1, 1), wrong.clone()), wrong, "another domain");
            assert_eq!(check(b"a", signed(1, 2), wrong.clone()), wrong, "another signature");
        }
        assert_eq!(count.get(), 7, "what is wrong is not remembered");
        assert_eq!(check(b"a", signed(1, 1), wrong), Ok(()));
    }
}
