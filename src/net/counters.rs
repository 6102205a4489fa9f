//! What the data plane counts: passed on, and dropped by reason. Whoever floods a node is counted for
//! each datagram, so that counting takes no lock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;

/// What was counted since the node started.
#[derive(Debug, Default)]
pub struct Counters {
    forwarded_datagrams: AtomicU64,
    forwarded_bytes: AtomicU64,
    /// By reason. Reasons are words of this program, so that there are few.
    dropped: ArcSwap<BTreeMap<&'static str, Arc<AtomicU64>>>,
}

impl Counters {
    /// Counts a drop.
    pub fn count(&self, why: &'static str) {
        self.count_nth(why);
    }

    /// Counts a drop, and returns how many there are of this kind.
    pub fn count_nth(&self, why: &'static str) -> u64 {
        let one_more = |count: &AtomicU64| count.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(count) = self.dropped.load().get(why) {
            return one_more(count);
        }
        self.dropped.rcu(|dropped| {
            let mut dropped = BTreeMap::clone(dropped);
            dropped.entry(why).or_default();
            dropped
        });
        self.dropped.load().get(why).map_or(0, |count| one_more(count))
    }

    /// A datagram of so many bytes is passed on for others.
    pub(super) fn forwards(&self, bytes: usize) {
        self.forwarded_datagrams.fetch_add(1, Ordering::Relaxed);
        self.forwarded_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Datagrams and bytes passed on for others.
    pub fn forwarded(&self) -> (u64, u64) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (load(&self.forwarded_datagrams), load(&self.forwarded_bytes))
    }

    /// Drops by reason.
    pub fn dropped(&self) -> BTreeMap<&'static str, u64> {
        let dropped = self.dropped.load();
        dropped.iter().map(|(why, count)| (*why, count.load(Ordering::Relaxed))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_when_all_count_at_once() {
        let counters = Counters::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1_000 {
                        ["a", "b", "c"].into_iter().for_each(|why| counters.count(why));
                    }
                });
            }
        });
        assert_eq!(counters.dropped(), BTreeMap::from([("a", 4_000), ("b", 4_000), ("c", 4_000)]));
        assert_eq!(counters.count_nth("a"), 4_001);
    }
}
