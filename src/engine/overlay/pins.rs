//! To whom names belong as far as this node has seen: a name is pinned to its first owner, as SSH pins
//! a host's key. The pins are kept over restarts.
//!
//! A pin lapses [`PIN_LIFETIME`] after the last record of its owner was seen. It is replaced at once
//! only by what the operator says (`service trust`), or by a grant of the root, which the registry
//! looks at first. There are at most [`PINS_MAX`] pins, and [`PINS_PER_OWNER_MAX`] of one owner:
//! beyond, the pin of the largest holder that was not seen for longest makes room.

use std::collections::BTreeMap;
use std::time::Duration;

use super::shares::Shares;
use crate::engine::types::{PublicKey, ServiceName, Timestamp};

/// How long a name stays with its owner after the last record was seen: 30 days.
pub const PIN_LIFETIME: Duration = Duration::from_secs(30 * 86_400);
/// How exactly it is known when a name was last seen: a day, so that what is kept changes rarely.
pub const SEEN_STEP: Duration = Duration::from_secs(86_400);
/// Most pins.
pub const PINS_MAX: usize = 10_000;
/// Most pins of one owner.
pub const PINS_PER_OWNER_MAX: usize = 512;

/// A name and its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The name.
    pub name: ServiceName,
    /// To whom it belongs.
    pub owner: PublicKey,
    /// When a record was last seen, to [`SEEN_STEP`].
    pub seen_at: Timestamp,
}

/// All pins.
#[derive(Clone, Debug)]
pub struct Pins {
    by_name: BTreeMap<ServiceName, (PublicKey, Timestamp)>,
    shares: Shares,
    limits: (usize, usize),
    changed: bool,
}

impl Default for Pins {
    fn default() -> Self {
        Self::with_limits(PINS_MAX, PINS_PER_OWNER_MAX)
    }
}

impl Pins {
    /// Other bounds than [`PINS_MAX`] and [`PINS_PER_OWNER_MAX`], for tests; both 1 or more.
    pub fn with_limits(all: usize, per_owner: usize) -> Self {
        Self {
            by_name: BTreeMap::new(),
            shares: Shares::default(),
            limits: (all, per_owner),
            changed: false,
        }
    }

    /// Takes up what was kept.
    pub fn restore(&mut self, kept: Vec<Pin>) {
        for pin in kept {
            self.set(pin.name, pin.owner, pin.seen_at);
        }
        self.changed = false;
    }

    /// What is to be kept.
    pub fn list(&self) -> impl Iterator<Item = Pin> + '_ {
        self.by_name.iter().map(|(name, (owner, seen_at))| Pin {
            name: name.clone(),
            owner: *owner,
            seen_at: *seen_at,
        })
    }

    /// The owner of a name.
    pub fn owner(&self, name: &ServiceName) -> Option<PublicKey> {
        self.by_name.get(name).map(|(owner, _)| *owner)
    }

    /// A record of this owner was seen. Another owner's pin stays.
    pub fn seen(&mut self, name: &ServiceName, owner: &PublicKey, now: Timestamp) {
        match self.by_name.get_mut(name) {
            Some((pinned, seen_at)) if pinned == owner => {
                if now.since(*seen_at) >= SEEN_STEP {
                    *seen_at = now;
                    self.changed = true;
                }
            }
            Some(_) => {}
            None => self.set(name.clone(), *owner, now),
        }
    }

    /// Pins a name to this owner, whoever had it.
    pub fn set(&mut self, name: ServiceName, owner: PublicKey, now: Timestamp) {
        self.remove(&name);
        if self.shares.of(&owner) >= self.limits.1 {
            self.make_room(&owner);
        } else if self.by_name.len() >= self.limits.0 {
            let largest = self.shares.gives_way_to(&owner);
            let largest = largest.or_else(|| (self.shares.of(&owner) > 0).then_some(owner));
            match largest.or_else(|| self.longest_unseen(|_| true).map(|(_, owner)| owner)) {
                Some(holder) => self.make_room(&holder),
                None => return,
            }
        }
        self.shares.add(&owner);
        self.by_name.insert(name, (owner, now));
        self.changed = true;
    }

    /// Forgets one name.
    pub fn remove(&mut self, name: &ServiceName) {
        if let Some((owner, _)) = self.by_name.remove(name) {
            self.shares.remove(&owner);
            self.changed = true;
        }
    }

    /// Forgets the names of an owner who was put out.
    pub fn forget(&mut self, owner: &PublicKey) {
        let theirs = self.by_name.iter().filter(|(_, (pinned, _))| pinned == owner);
        let theirs: Vec<ServiceName> = theirs.map(|(name, _)| name.clone()).collect();
        theirs.iter().for_each(|name| self.remove(name));
    }

    /// Forgets what was not seen for [`PIN_LIFETIME`].
    pub fn expire(&mut self, now: Timestamp) {
        let late = self.by_name.iter().filter(|(_, (_, seen_at))| *seen_at + PIN_LIFETIME <= now);
        let late: Vec<ServiceName> = late.map(|(name, _)| name.clone()).collect();
        late.iter().for_each(|name| self.remove(name));
    }

    /// Whether what is to be kept has changed since this was last asked.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    fn make_room(&mut self, holder: &PublicKey) {
        if let Some((name, _)) = self.longest_unseen(|owner| owner == holder) {
            self.remove(&name);
        }
    }

    fn longest_unseen(&self, of: impl Fn(&PublicKey) -> bool) -> Option<(ServiceName, PublicKey)> {
        let theirs = self.by_name.iter().filter(|(_, (owner, _))| of(owner));
        let (name, (owner, _)) = theirs.min_by_key(|(_, (_, seen_at))| *seen_at)?;
        Some((name.clone(), *owner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> PublicKey {
        PublicKey([byte; 32])
    }

    fn name(text: &str) -> ServiceName {
        text.parse().unwrap()
    }

    fn day(day: u64) -> Timestamp {
        Timestamp(day * 86_400_000_000)
    }

    #[test]
    fn a_name_stays_with_its_first_owner_until_it_was_not_seen_for_long_or_somebody_says_so() {
        let mut pins = Pins::default();
        pins.seen(&name("a.local"), &key(1), day(1));
        pins.seen(&name("a.local"), &key(2), day(2));
        assert_eq!(pins.owner(&name("a.local")), Some(key(1)));
        pins.seen(&name("a.local"), &key(1), day(20));
        pins.expire(day(49));
        assert_eq!(pins.owner(&name("a.local")), Some(key(1)), "seen on day 20");
        pins.expire(day(50));
        assert_eq!(pins.owner(&name("a.local")), None);
        pins.seen(&name("a.local"), &key(2), day(51));
        pins.set(name("a.local"), key(3), day(51));
        assert_eq!(pins.owner(&name("a.local")), Some(key(3)));
        pins.forget(&key(3));
        assert_eq!(pins.owner(&name("a.local")), None);
    }

    #[test]
    fn what_is_kept_comes_back_and_changes_rarely() {
        let mut pins = Pins::default();
        pins.seen(&name("a.local"), &key(1), day(1));
        assert!(pins.take_changed() && !pins.take_changed());
        pins.seen(&name("a.local"), &key(1), Timestamp(day(2).as_micros() - 1));
        assert!(!pins.take_changed(), "the same day");
        pins.seen(&name("a.local"), &key(1), day(2));
        assert!(pins.take_changed());
        let mut again = Pins::default();
        again.restore(pins.list().collect());
        assert_eq!(again.owner(&name("a.local")), Some(key(1)));
        assert!(!again.take_changed());
        assert!(again.list().eq(pins.list()));
    }

    #[test]
    fn an_owner_of_many_names_pushes_out_only_its_own() {
        let mut pins = Pins::with_limits(4, 3);
        pins.seen(&name("mine.local"), &key(1), day(1));
        for index in 0..20 {
            pins.seen(&name(&format!("flood-{index}.local")), &key(2), day(2 + index));
        }
        assert_eq!(pins.list().count(), 4);
        assert_eq!(pins.owner(&name("mine.local")), Some(key(1)), "the oldest of all");
        assert_eq!(pins.owner(&name("flood-19.local")), Some(key(2)));
        pins.seen(&name("new.local"), &key(3), day(30));
        assert_eq!(pins.owner(&name("new.local")), Some(key(3)));
        assert_eq!(pins.owner(&name("flood-17.local")), None, "the largest holder makes room");
        let mut roomy = Pins::with_limits(9, 3);
        for index in 0..20 {
            roomy.seen(&name(&format!("flood-{index}.local")), &key(2), day(2 + index));
        }
        assert_eq!(roomy.list().count(), 3, "also where there is room");
        for index in 0..9 {
            pins.seen(&name(&format!("other-{index}.local")), &key(10 + index), day(40));
            assert_eq!(pins.list().count(), 4, "never more");
        }
    }
}
