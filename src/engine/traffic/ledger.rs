//! What the links of this node have promised: the admission of reservations.
//!
//! The rule:
//! - All promises of a link together are at most [`SHARE_MAX`] of its capacity, so that traffic
//!   without a promise, and a forecast that was too high, have room.
//! - What came from one neighbour gets at most half of that ([`INGRESS_SHARE_MAX`]): nobody can
//!   take a link away from the others by asking first.
//! - A promise is soft state. It is renewed by asking again, each slice, and is forgotten after
//!   [`LIFETIME`] of silence, so that a crash needs no clean-up.
//! - Who was refused has nothing: a renewal that no longer fits, because the link has become
//!   slower, gives up what it had, which makes room for the others.
//! - A tunnel that moves asks under the number of its new route. Where old and new route share a
//!   link, the newer number wins, and a late release of the older one changes nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use super::FlowKey;
use crate::engine::types::{NodeId, Timestamp};

/// Largest part of a link's capacity that is promised.
pub const SHARE_MAX: f64 = 0.8;
/// Largest part of a link's capacity that is promised to flows from one neighbour.
pub const INGRESS_SHARE_MAX: f64 = SHARE_MAX / 2.0;
/// Promises of one link; further ones are refused.
pub const ENTRIES_MAX: usize = 1_024;
/// How long a promise lives without being asked for again: two slices of 10 s and a half.
pub const LIFETIME: Duration = Duration::from_secs(25);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// For which flow.
    pub flow: FlowKey,
    /// Number of the flow's route.
    pub route_id: u32,
    /// Rate (bytes/s); 0 releases.
    pub rate: u64,
}

/// The link has not enough left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{available} bytes/s are left")]
pub struct Refusal {
    /// What it has left for this flow (bytes/s).
    pub available: u64,
}

#[derive(Clone, Copy, Debug)]
struct Promise {
    route_id: u32,
    rate: u64,
    until: Timestamp,
}

/// The promises of all links of this node. Callers ask only for links that exist, and say when
/// one is gone.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    links: BTreeMap<NodeId, BTreeMap<FlowKey, Promise>>,
}

impl Ledger {
    /// Asks the link to a neighbour, which can carry `capacity` (bytes/s), to set a rate aside.
    /// Returns until when it does, which for a release is now.
    ///
    /// # Errors
    /// [`Refusal`]; the flow then has nothing on this link.
    pub fn ask(
        &mut self,
        link: NodeId,
        claim: &Claim,
        capacity: f64,
        now: Timestamp,
    ) -> Result<Timestamp, Refusal> {
        let promises = self.links.entry(link).or_default();
        promises.retain(|_, promise| promise.until > now);
        match promises.get(&claim.flow) {
            Some(newer) if newer.route_id > claim.route_id => return Ok(newer.until),
            _ => promises.remove(&claim.flow),
        };
        if claim.rate == 0 {
            return Ok(now);
        }
        let available = available(promises, claim.flow.ingress, capacity);
        if claim.rate > available || promises.len() >= ENTRIES_MAX {
            let full = promises.len() >= ENTRIES_MAX;
            return Err(Refusal { available: if full { 0 } else { available } });
        }
        let until = now + LIFETIME;
        let promise = Promise { route_id: claim.route_id, rate: claim.rate, until };
        promises.insert(claim.flow, promise);
        Ok(until)
    }

    /// A link is gone, and its promises with it.
    pub fn forget(&mut self, link: NodeId) {
        self.links.remove(&link);
    }

    /// A flow is over. Returns the links that had promised it something.
    pub fn end(&mut self, flow: FlowKey) -> Vec<NodeId> {
        let had = self
            .links
            .iter_mut()
            .filter_map(|(link, promises)| promises.remove(&flow).map(|_| *link));
        had.collect()
    }

    /// What the link to a neighbour has promised (bytes/s).
    pub fn promised(&self, link: NodeId, now: Timestamp) -> u64 {
        let promises = self.links.get(&link).into_iter().flat_map(BTreeMap::values);
        promises.filter(|promise| promise.until > now).map(|promise| promise.rate).sum()
    }
}

/// What is left for flows from `ingress` (bytes/s).
fn available(promises: &BTreeMap<FlowKey, Promise>, ingress: NodeId, capacity: f64) -> u64 {
    // Saturates: a capacity that is no number is none.
    let part = |share: f64| (share * capacity) as u64;
    let sum = |flows: &mut dyn Iterator<Item = (&FlowKey, &Promise)>| -> u64 {
        flows.map(|(_, promise)| promise.rate).sum()
    };
    let all = sum(&mut promises.iter());
    let same = sum(&mut promises.iter().filter(|(flow, _)| flow.ingress == ingress));
    let left = part(SHARE_MAX).saturating_sub(all);
    left.min(part(INGRESS_SHARE_MAX).saturating_sub(same))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::types::TunnelId;

    const LINK: NodeId = NodeId([9; 8]);

    fn claim(ingress: u8, tunnel: u16, route_id: u32, rate: u64) -> Claim {
        let flow = FlowKey {
            ingress: NodeId([ingress; 8]),
            source: NodeId([7; 8]),
            target: NodeId([8; 8]),
            tunnel: TunnelId(tunnel),
        };
        Claim { flow, route_id, rate }
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp(1_000_000) + Duration::from_secs(seconds)
    }

    #[test]
    fn one_neighbour_gets_half_of_what_may_be_promised() {
        let mut ledger = Ledger::default();
        let capacity = 1_000.0;
        assert_eq!(ledger.ask(LINK, &claim(1, 1, 1, 300), capacity, at(0)), Ok(at(25)));
        let refused = ledger.ask(LINK, &claim(1, 2, 1, 200), capacity, at(0));
        assert_eq!(refused, Err(Refusal { available: 100 }));
        assert!(ledger.ask(LINK, &claim(2, 1, 1, 400), capacity, at(0)).is_ok());
        let refused = ledger.ask(LINK, &claim(3, 1, 1, 200), capacity, at(0));
        assert_eq!(refused, Err(Refusal { available: 100 }), "800 for all");
        assert!(ledger.ask(NodeId([5; 8]), &claim(3, 1, 1, 200), capacity, at(0)).is_ok());
        assert_eq!(ledger.promised(LINK, at(0)), 700);
        assert_eq!(ledger.end(claim(1, 1, 1, 0).flow), [LINK]);
        assert_eq!(
            (ledger.promised(LINK, at(0)), ledger.end(claim(1, 1, 1, 0).flow)),
            (400, vec![])
        );
        ledger.forget(LINK);
        assert_eq!(ledger.promised(LINK, at(0)), 0);
    }

    #[test]
    fn a_promise_is_renewed_released_and_forgotten() {
        let mut ledger = Ledger::default();
        let mut ask =
            |tunnel, rate, s| ledger.ask(LINK, &claim(1, tunnel, 1, rate), 1_000.0, at(s));
        assert!(ask(1, 400, 0).is_ok());
        assert!(ask(1, 400, 20).is_ok(), "its own promise is not in its way");
        assert!(ask(2, 400, 44).is_err());
        assert!(ask(2, 400, 45).is_ok(), "25 s after the renewal");
        assert_eq!(ask(2, 0, 46), Ok(at(46)));
        assert!(ask(3, 400, 46).is_ok());
        assert_eq!(ask(3, 500, 47), Err(Refusal { available: 400 }));
        assert_eq!(ledger.promised(LINK, at(47)), 0, "who was refused has nothing");
    }

    #[test]
    fn the_newer_route_wins() {
        let mut ledger = Ledger::default();
        let mut ask =
            |route_id, rate| ledger.ask(LINK, &claim(1, 1, route_id, rate), 1_000.0, at(0));
        assert!(ask(1, 100).is_ok());
        assert!(ask(2, 200).is_ok());
        assert!(ask(1, 0).is_ok());
        assert_eq!(ledger.promised(LINK, at(0)), 200);
    }

    #[test]
    fn promises_are_bounded_and_a_link_that_slows_down_gives_them_up() {
        let mut ledger = Ledger::default();
        for tunnel in 0..ENTRIES_MAX as u16 {
            assert!(ledger.ask(LINK, &claim(1, tunnel, 1, 1), 1e9, at(0)).is_ok());
        }
        let over = ledger.ask(LINK, &claim(1, 2_000, 1, 1), 1e9, at(0));
        assert_eq!(over, Err(Refusal { available: 0 }));
        assert!(ledger.ask(LINK, &claim(1, 5, 1, 1), 1e9, at(0)).is_ok(), "a renewal");
        assert!(ledger.ask(LINK, &claim(1, 6, 1, 1), 1_000.0, at(0)).is_err());
        for wrong in [f64::NAN, -1.0, 0.0] {
            assert!(ledger.ask(LINK, &claim(1, 7, 1, 1), wrong, at(0)).is_err());
        }
    }

    proptest! {
        #[test]
        fn promises_stay_below_the_capacity(
            asks in proptest::collection::vec(
                (0u8..4, 0u16..8, 0u32..3, 0u64..600, 0u64..40), 1..200),
        ) {
            let mut ledger = Ledger::default();
            let capacity = 1_000.0;
            let mut now = at(0);
            let mut granted: BTreeMap<FlowKey, (u32, u64, Timestamp)> = BTreeMap::new();
            for (ingress, tunnel, route_id, rate, tenths) in asks {
                now = now + Duration::from_millis(100 * tenths);
                let claim = claim(ingress, tunnel, route_id, rate);
                let known = granted.get(&claim.flow).filter(|(_, _, until)| *until > now);
                let is_late = known.is_some_and(|(newest, ..)| *newest > route_id);
                match ledger.ask(LINK, &claim, capacity, now) {
                    Ok(_) if is_late => {}
                    Ok(until) if rate > 0 => {
                        prop_assert_eq!(until, now + LIFETIME);
                        granted.insert(claim.flow, (route_id, rate, until));
                    }
                    _ => {
                        granted.remove(&claim.flow);
                    }
                }
                let alive = granted.iter().filter(|(_, (_, _, until))| *until > now);
                let rates: Vec<(u8, u64)> =
                    alive.map(|(flow, (_, rate, _))| (flow.ingress.0[0], *rate)).collect();
                let all: u64 = rates.iter().map(|(_, rate)| rate).sum();
                prop_assert_eq!(ledger.promised(LINK, now), all);
                prop_assert!(all <= 800);
                for ingress in 0..4 {
                    let of_one = rates.iter().filter(|(from, _)| *from == ingress);
                    prop_assert!(of_one.map(|(_, rate)| rate).sum::<u64>() <= 400);
                }
            }
            prop_assert_eq!(ledger.promised(LINK, now + LIFETIME), 0);
        }
    }
}
