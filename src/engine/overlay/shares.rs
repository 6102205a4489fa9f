//! Who holds how many places of something bounded, so that whoever holds most makes room, and nobody
//! can push others out by taking many.

use std::collections::BTreeMap;

use crate::engine::types::PublicKey;

/// Places by holder. It does not know what the places are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shares(BTreeMap<PublicKey, usize>);

impl Shares {
    /// One more.
    pub fn add(&mut self, holder: &PublicKey) {
        *self.0.entry(*holder).or_default() += 1;
    }

    /// One less.
    pub fn remove(&mut self, holder: &PublicKey) {
        if let Some(count) = self.0.get_mut(holder) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(holder);
            }
        }
    }

    /// How many this one holds.
    pub fn of(&self, holder: &PublicKey) -> usize {
        self.0.get(holder).copied().unwrap_or_default()
    }

    /// Who has to make room for one more of `newcomer` when all places are taken: the largest holder,
    /// unless the newcomer would then hold more than that one.
    pub fn gives_way_to(&self, newcomer: &PublicKey) -> Option<PublicKey> {
        let (largest, count) = self.0.iter().max_by_key(|(_, count)| **count)?;
        (*count > self.of(newcomer) + 1).then_some(*largest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_holder_makes_room_and_only_for_smaller_ones() {
        let key = |byte| PublicKey([byte; 32]);
        let mut shares = Shares::default();
        (0..3).for_each(|_| shares.add(&key(1)));
        (0..2).for_each(|_| shares.add(&key(2)));
        assert_eq!(shares.gives_way_to(&key(3)), Some(key(1)));
        assert_eq!(shares.gives_way_to(&key(2)), None, "it would be the largest itself");
        assert_eq!(shares.gives_way_to(&key(1)), None);
        shares.remove(&key(1));
        assert_eq!((shares.of(&key(1)), shares.of(&key(9))), (2, 0));
        (0..2).for_each(|_| shares.remove(&key(1)));
        assert_eq!(shares.of(&key(1)), 0);
    }
}
