//! What strangers may cost: how many connections of theirs are open at one time, and how often they
//! may ask to join.
//!
//! An address has a small share of each, so that one host cannot use everything up. An address that a
//! member came from is let in beyond what all strangers may have together, so that a flood from
//! elsewhere does not keep the member out. Loopback has no share: whoever connects from there runs on
//! this machine, where whole meshes are tried out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use libp2p::swarm::ConnectionId;

/// Connections from one address that are not admitted yet, with those that still shake hands.
pub(super) const PER_SOURCE_MAX: usize = 8;
/// The same from everywhere.
pub(super) const STRANGERS_MAX: usize = 64;
/// Addresses of members that are remembered.
const FRIENDS_MAX: usize = 1_024;
/// Requests to join from one address within [`JOIN_PERIOD`].
const JOINS_PER_SOURCE_MAX: u32 = 4;
/// The same from everywhere.
const JOINS_MAX: u32 = 64;
/// See [`JOINS_MAX`].
const JOIN_PERIOD: Duration = Duration::from_secs(60);

/// Where a connection comes from: an IPv4 address or the /64 of an IPv6 address, which is what one
/// host has of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Source(IpAddr);

impl Source {
    pub(super) fn of(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V6(ip) if !ip.is_loopback() => {
                let network = u128::from(ip) >> 64 << 64;
                Ipv6Addr::from(network).into()
            }
            ip => ip,
        })
    }

    fn is_here(self) -> bool {
        self.0.is_loopback()
    }
}

/// No room for another stranger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("as many connections wait for admission as may")]
pub struct Crowded;

struct Visitor {
    /// `None` for connections over a relay.
    source: Option<Source>,
    admitted: bool,
}

/// Connections that others opened to this node.
#[derive(Default)]
pub(super) struct Strangers {
    visitors: BTreeMap<ConnectionId, Visitor>,
    friends: BTreeSet<Source>,
    joins: Joins,
}

impl Strangers {
    /// A connection begins.
    pub(super) fn enter(
        &mut self,
        connection: ConnectionId,
        ip: Option<IpAddr>,
    ) -> Result<(), Crowded> {
        let source = ip.map(Source::of);
        let strangers = self.visitors.values().filter(|visitor| !visitor.admitted);
        let (mut all, mut same) = (0, 0);
        for stranger in strangers {
            all += 1;
            same += usize::from(stranger.source == source);
        }
        let is_here = source.is_some_and(Source::is_here);
        let is_friend = source.is_some_and(|source| self.friends.contains(&source));
        if (all >= STRANGERS_MAX && !is_friend) || (same >= PER_SOURCE_MAX && !is_here) {
            return Err(Crowded);
        }
        self.visitors.insert(connection, Visitor { source, admitted: false });
        Ok(())
    }

    /// It was admitted.
    pub(super) fn admitted(&mut self, connection: ConnectionId) {
        let Some(visitor) = self.visitors.get_mut(&connection) else { return };
        visitor.admitted = true;
        let source = visitor.source.filter(|source| !source.is_here());
        if let Some(source) = source
            && self.friends.insert(source)
            && self.friends.len() > FRIENDS_MAX
        {
            self.friends.pop_first();
        }
    }

    /// It ended.
    pub(super) fn leave(&mut self, connection: ConnectionId) {
        self.visitors.remove(&connection);
    }

    /// Whether a connection may ask to join, or for a new credential, just now.
    pub(super) fn may_join(&mut self, connection: ConnectionId, now: Instant) -> bool {
        let source = self.visitors.get(&connection).and_then(|visitor| visitor.source);
        self.joins.allow(source, now)
    }
}

/// Requests to join in the current period.
#[derive(Default)]
struct Joins {
    since: Option<Instant>,
    all: u32,
    by_source: BTreeMap<Option<Source>, u32>,
}

impl Joins {
    fn allow(&mut self, source: Option<Source>, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.duration_since(since) >= JOIN_PERIOD) {
            *self = Self { since: Some(now), ..Self::default() };
        }
        let same = self.by_source.get(&source).copied().unwrap_or_default();
        let is_here = source.is_some_and(Source::is_here);
        if self.all >= JOINS_MAX || (same >= JOINS_PER_SOURCE_MAX && !is_here) {
            return false;
        }
        self.all += 1;
        self.by_source.insert(source, same + 1);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: usize) -> ConnectionId {
        ConnectionId::new_unchecked(number)
    }

    fn ip(number: usize) -> Option<IpAddr> {
        Some(IpAddr::from([192, 0, 2, number as u8]))
    }

    #[test]
    fn one_address_has_a_share_and_all_have_a_bound() {
        let mut strangers = Strangers::default();
        for connection in 0..PER_SOURCE_MAX {
            assert_eq!(strangers.enter(id(connection), ip(1)), Ok(()));
        }
        assert_eq!(strangers.enter(id(100), ip(1)), Err(Crowded));
        assert_eq!(strangers.enter(id(100), ip(2)), Ok(()), "another address");
        strangers.leave(id(0));
        assert_eq!(strangers.enter(id(0), ip(1)), Ok(()), "a place that became free");
        strangers.admitted(id(0));
        assert_eq!(strangers.enter(id(101), ip(1)), Ok(()), "the admitted do not count");
        assert_eq!(strangers.enter(id(102), ip(1)), Err(Crowded));

        let mut strangers = Strangers::default();
        for connection in 0..STRANGERS_MAX {
            assert_eq!(strangers.enter(id(connection), ip(connection)), Ok(()));
        }
        assert_eq!(strangers.enter(id(100), ip(100)), Err(Crowded));
    }

    #[test]
    fn a_flood_does_not_keep_a_member_out_that_comes_back() {
        let mut strangers = Strangers::default();
        strangers.enter(id(1_000), ip(200)).unwrap();
        strangers.admitted(id(1_000));
        strangers.leave(id(1_000));
        for connection in 0..STRANGERS_MAX {
            strangers.enter(id(connection), ip(connection)).unwrap();
        }
        assert_eq!(strangers.enter(id(1_001), ip(201)), Err(Crowded));
        assert_eq!(strangers.enter(id(1_001), ip(200)), Ok(()));
    }

    #[test]
    fn loopback_has_no_share_but_the_bound_of_all() {
        let mut strangers = Strangers::default();
        let here = Some(IpAddr::from([127, 0, 0, 1]));
        for connection in 0..STRANGERS_MAX {
            assert_eq!(strangers.enter(id(connection), here), Ok(()));
        }
        assert_eq!(strangers.enter(id(100), here), Err(Crowded));
    }

    #[test]
    fn a_host_with_many_ipv6_addresses_is_one_source() {
        let of = |text: &str| Source::of(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert!(of("::1").is_here() && of("127.0.0.9").is_here());
    }

    #[test]
    fn asking_to_join_is_bounded_per_address_and_in_all_and_a_new_minute_begins() {
        let (mut joins, now) = (Joins::default(), Instant::now());
        let source = |number| ip(number).map(Source::of);
        for _ in 0..JOINS_PER_SOURCE_MAX {
            assert!(joins.allow(source(1), now));
        }
        assert!(!joins.allow(source(1), now));
        for number in 2..=(JOINS_MAX - JOINS_PER_SOURCE_MAX + 1) as usize {
            assert!(joins.allow(source(number), now));
        }
        assert!(!joins.allow(source(100), now));
        assert!(!joins.allow(source(1), now + JOIN_PERIOD / 2));
        assert!(joins.allow(source(1), now + JOIN_PERIOD));
    }
}
