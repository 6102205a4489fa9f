//! What strangers may cost: how many connections of theirs are open at one time, and how often they
//! may ask to join.
//!
//! An address has a small share of each, so that one host cannot use everything up. An address that a
//! member came from is let in beyond what all strangers may have together, so that a flood from
//! elsewhere does not keep the member out. When a share is used up, the stranger that has waited longest
//! makes room, once it has had [`GRACE`]: a member needs less for its handshake, and gets in beside
//! those that come back again and again and say nothing. 127.0.0.1 and ::1 have no share: whoever connects
//! from there runs on this machine, where whole meshes are tried out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::swarm::ConnectionId;

/// Connections from one address that are not admitted yet, with those that still shake hands.
pub(super) const PER_SOURCE_MAX: usize = 8;
/// The same from everywhere. A flood is admitted to this many handshakes in each [`GRACE`], a member
/// among them with the same chance as each of the others.
pub(super) const STRANGERS_MAX: usize = 256;
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
        [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()].contains(&self.0)
    }
}

/// No room for another stranger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("as many connections wait for admission as may")]
pub struct Crowded;

/// How long a stranger may wait undisturbed: a few round trips to the other side of the world.
pub(super) const GRACE: Duration = Duration::from_secs(1);

struct Visitor {
    /// `None` for connections over a relay.
    source: Option<Source>,
    /// Who it is, once it has proved its key.
    peer: Option<PeerId>,
    since: Instant,
    /// Admitted, or made to leave: no stranger that waits.
    settled: bool,
}

/// Connections that others opened to this node.
#[derive(Default)]
pub(super) struct Strangers {
    visitors: BTreeMap<ConnectionId, Visitor>,
    friends: BTreeSet<Source>,
    joins: Joins,
}

impl Strangers {
    /// A connection begins. Returns the one that is to be closed for it.
    pub(super) fn enter(
        &mut self,
        connection: ConnectionId,
        ip: Option<IpAddr>,
        now: Instant,
    ) -> Result<Option<(PeerId, ConnectionId)>, Crowded> {
        let source = ip.map(Source::of);
        let strangers = self.visitors.values().filter(|visitor| !visitor.settled);
        let (mut all, mut same) = (0, 0);
        for stranger in strangers {
            all += 1;
            same += usize::from(stranger.source == source);
        }
        let is_here = source.is_some_and(Source::is_here);
        let is_friend = source.is_some_and(|source| self.friends.contains(&source));
        let mut leaves = None;
        if same >= PER_SOURCE_MAX && !is_here {
            leaves = Some(self.make_room(now, |visitor| visitor.source == source)?);
        } else if all >= STRANGERS_MAX && !is_friend {
            leaves = Some(self.make_room(now, |_| true)?);
        }
        let (peer, since, settled) = (None, now, false);
        self.visitors.insert(connection, Visitor { source, peer, since, settled });
        Ok(leaves)
    }

    /// The one that has waited longest leaves, among those that count here.
    fn make_room(
        &mut self,
        now: Instant,
        counts: impl Fn(&Visitor) -> bool,
    ) -> Result<(PeerId, ConnectionId), Crowded> {
        let waits = |visitor: &Visitor| {
            !visitor.settled && counts(visitor) && now.duration_since(visitor.since) >= GRACE
        };
        let waiting = self.visitors.iter_mut().filter(|(_, visitor)| waits(visitor));
        let known = waiting.filter_map(|(id, visitor)| Some((visitor.peer?, *id, visitor)));
        let (peer, id, visitor) = known.min_by_key(|(.., visitor)| visitor.since).ok_or(Crowded)?;
        visitor.settled = true;
        Ok((peer, id))
    }

    /// It has proved its key.
    pub(super) fn proved(&mut self, connection: ConnectionId, peer: PeerId) {
        if let Some(visitor) = self.visitors.get_mut(&connection) {
            visitor.peer = Some(peer);
        }
    }

    /// It was admitted.
    pub(super) fn admitted(&mut self, connection: ConnectionId) {
        let Some(visitor) = self.visitors.get_mut(&connection) else { return };
        visitor.settled = true;
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
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64;

    use super::*;

    fn id(number: usize) -> ConnectionId {
        ConnectionId::new_unchecked(number)
    }

    /// A stranger comes.
    fn enter(
        strangers: &mut Strangers,
        connection: usize,
        ip: Option<IpAddr>,
    ) -> Result<(), Crowded> {
        let leaves = strangers.enter(id(connection), ip, Instant::now())?;
        assert_eq!(leaves, None, "all came just now");
        Ok(())
    }

    fn ip(number: usize) -> Option<IpAddr> {
        Some(IpAddr::from([192, 0, (number >> 8) as u8, number as u8]))
    }

    #[test]
    fn one_address_has_a_share_and_all_have_a_bound() {
        let mut strangers = Strangers::default();
        for connection in 0..PER_SOURCE_MAX {
            assert_eq!(enter(&mut strangers, connection, ip(1)), Ok(()));
        }
        assert_eq!(enter(&mut strangers, 100, ip(1)), Err(Crowded));
        assert_eq!(enter(&mut strangers, 100, ip(2)), Ok(()), "another address");
        strangers.leave(id(0));
        assert_eq!(enter(&mut strangers, 0, ip(1)), Ok(()), "a place that became free");
        strangers.admitted(id(0));
        assert_eq!(enter(&mut strangers, 101, ip(1)), Ok(()), "the admitted do not count");
        assert_eq!(enter(&mut strangers, 102, ip(1)), Err(Crowded));

        let mut strangers = Strangers::default();
        for connection in 0..STRANGERS_MAX {
            assert_eq!(enter(&mut strangers, connection, ip(connection)), Ok(()));
        }
        assert_eq!(enter(&mut strangers, 1_000, ip(1_000)), Err(Crowded));
    }

    #[test]
    fn who_has_waited_longest_and_proved_its_key_makes_room() {
        let (mut strangers, now) = (Strangers::default(), Instant::now());
        let peer = PeerId::random();
        for connection in 0..PER_SOURCE_MAX {
            let at = now + Duration::from_millis(connection as u64);
            assert_eq!(strangers.enter(id(connection), ip(1), at), Ok(None));
        }
        strangers.proved(id(2), peer);
        strangers.proved(id(3), peer);
        let mut next = |number: usize, at| strangers.enter(id(100 + number), ip(1), now + at);
        assert_eq!(next(0, GRACE / 2), Err(Crowded), "everybody has a while");
        assert_eq!(next(1, 2 * GRACE), Ok(Some((peer, id(2)))));
        assert_eq!(next(2, 2 * GRACE), Ok(Some((peer, id(3)))));
        assert_eq!(next(3, 2 * GRACE), Err(Crowded), "the others are still shaking hands");
    }

    #[test]
    fn a_flood_does_not_keep_a_member_out_that_comes_back() {
        let mut strangers = Strangers::default();
        enter(&mut strangers, 2_000, ip(2_000)).unwrap();
        strangers.admitted(id(2_000));
        strangers.leave(id(2_000));
        for connection in 0..STRANGERS_MAX {
            enter(&mut strangers, connection, ip(connection)).unwrap();
        }
        assert_eq!(enter(&mut strangers, 2_001, ip(2_001)), Err(Crowded));
        assert_eq!(enter(&mut strangers, 2_001, ip(2_000)), Ok(()));
    }

    /// 400 connections a second from a thousand addresses that say nothing, and somebody new whose
    /// handshake takes 300 ms and who tries every one to two seconds.
    #[test]
    fn a_flood_from_everywhere_does_not_keep_out_who_tries_again() {
        let mut random = Pcg64::seed_from_u64(1);
        for _ in 0..50 {
            let (mut strangers, mut now) = (Strangers::default(), Instant::now());
            let (mut next, mut entered, mut tries) = (now, None, 0);
            let joined = loop {
                now += Duration::from_micros(random.random_range(0..5_000));
                tries += 1;
                let from = ip(random.random_range(1..1_000));
                let mut leaves = strangers.enter(id(tries), from, now).ok().flatten();
                strangers.proved(id(tries), PeerId::random());
                if now >= next && entered.is_none() {
                    next = now + Duration::from_millis(random.random_range(1_000..2_000));
                    let place = strangers.enter(id(0), ip(1_000), now);
                    entered = place.is_ok().then_some(now);
                    leaves = leaves.or(place.ok().flatten());
                }
                let Some((_, leaves)) = leaves else { continue };
                strangers.leave(leaves);
                if let Some(entered) = entered
                    && (leaves == id(0) || now.duration_since(entered) > GRACE / 3)
                {
                    break leaves != id(0);
                }
                assert!(tries < 10_000, "kept out for 25 s");
            };
            assert!(joined, "nobody is thrown out who is quick");
        }
    }

    #[test]
    fn loopback_has_no_share_but_the_bound_of_all() {
        let mut strangers = Strangers::default();
        let here = Some(IpAddr::from([127, 0, 0, 1]));
        for connection in 0..STRANGERS_MAX {
            assert_eq!(enter(&mut strangers, connection, here), Ok(()));
        }
        assert_eq!(enter(&mut strangers, 1_000, here), Err(Crowded));
    }

    #[test]
    fn a_host_with_many_ipv6_addresses_is_one_source() {
        let of = |text: &str| Source::of(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert!(of("::1").is_here() && of("127.0.0.1").is_here());
        assert!(!of("127.0.0.2").is_here());
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
