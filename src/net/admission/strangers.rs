//! What strangers may cost: how many connections of theirs are open at one time, and how often they
//! may ask to join.
//!
//! An address has a small share of each, so that one host cannot use everything up: of handshakes, which
//! last as long as the network takes, and of identities that have proved their key and wait. An address
//! that a member came from is let in beyond what all strangers may have together, so that a flood from
//! elsewhere does not keep the member out. When a share is used up, the stranger that has waited longest
//! makes room, once it has had [`GRACE`]: a member needs less. Who had to make room is turned away at the
//! end of its next handshakes, for [`BAR`] and each time four times as long: identities that come back
//! again and again and say nothing soon take no places, and a new member of the same address finds one.
//! Members have a share too: an address has at most [`MEMBERS_PER_SOURCE_MAX`] connections of theirs, so
//! that one host with many certificates does not fill a node's connections. 127.0.0.1 and ::1 have no share: whoever connects
//! from there runs on this machine, where whole meshes are tried out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::swarm::ConnectionId;

/// Connections from one address that have proved their key and are not admitted yet.
pub(super) const PER_SOURCE_MAX: usize = 8;
/// Connections from one address that still shake hands.
pub(super) const HANDSHAKES_PER_SOURCE_MAX: usize = 16;
/// Connections of members from one address, which may be that of an office: a guess.
pub(super) const MEMBERS_PER_SOURCE_MAX: usize = 32;
/// How long an identity that had to make room is turned away the first time, and at most.
pub(super) const BAR: (Duration, Duration) = (Duration::from_secs(8), Duration::from_secs(128));
/// How many times as long it is the next time.
const BAR_FACTOR: u32 = 4;
/// Identities that are remembered for this; the one whose bar ends first makes room.
const BARRED_MAX: usize = 4_096;
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

/// No room for another connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Crowded {
    /// Of a stranger.
    #[error("as many connections wait for admission as may")]
    Strangers,
    /// Of a stranger that was here just now and said nothing.
    #[error("this identity had its time to show a credential")]
    Barred,
    /// Of this address.
    #[error("members of this address have as many connections as they may")]
    Members,
}

impl Crowded {
    /// Under what it is counted.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Strangers => "too-many-strangers",
            Self::Barred => "stranger-comes-back",
            Self::Members => "too-many-members-of-an-address",
        }
    }
}

/// How long a stranger may wait undisturbed: a few round trips to the other side of the world.
pub(super) const GRACE: Duration = Duration::from_secs(1);

struct Visitor {
    /// `None` for connections over a relay.
    source: Option<Source>,
    /// Who it is, once it has proved its key.
    peer: Option<PeerId>,
    since: Instant,
    /// What became of it.
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No verdict yet.
    Waits,
    Member,
    /// Made to leave.
    Leaves,
}

/// Connections that others opened to this node.
#[derive(Default)]
pub(super) struct Strangers {
    visitors: BTreeMap<ConnectionId, Visitor>,
    friends: BTreeSet<Source>,
    /// Identities that had to make room: until when they are turned away, and for how long that was.
    barred: BTreeMap<PeerId, (Instant, Duration)>,
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
        let is_here = source.is_some_and(Source::is_here);
        if self.is_full_of_members(source) {
            return Err(Crowded::Members);
        }
        let waiting = self.visitors.values().filter(|visitor| visitor.state == State::Waits);
        let (mut all, mut shaking) = (0, 0);
        for stranger in waiting {
            all += 1;
            shaking += usize::from(stranger.source == source && stranger.peer.is_none());
        }
        if shaking >= HANDSHAKES_PER_SOURCE_MAX && !is_here {
            return Err(Crowded::Strangers);
        }
        let is_friend = source.is_some_and(|source| self.friends.contains(&source));
        let leaves = match all >= STRANGERS_MAX && !is_friend {
            true => Some(self.make_room(now, |_| true)?),
            false => None,
        };
        let (peer, since, state) = (None, now, State::Waits);
        self.visitors.insert(connection, Visitor { source, peer, since, state });
        Ok(leaves)
    }

    /// The one that has waited longest leaves, among those that count here.
    fn make_room(
        &mut self,
        now: Instant,
        counts: impl Fn(&Visitor) -> bool,
    ) -> Result<(PeerId, ConnectionId), Crowded> {
        let waits = |visitor: &Visitor| {
            visitor.state == State::Waits
                && counts(visitor)
                && now.duration_since(visitor.since) >= GRACE
        };
        let waiting = self.visitors.iter_mut().filter(|(_, visitor)| waits(visitor));
        let known = waiting.filter_map(|(id, visitor)| Some((visitor.peer?, *id, visitor)));
        let longest = known.min_by_key(|(.., visitor)| visitor.since);
        let (peer, id, visitor) = longest.ok_or(Crowded::Strangers)?;
        visitor.state = State::Leaves;
        self.bar(peer, now);
        Ok((peer, id))
    }

    fn bar(&mut self, peer: PeerId, now: Instant) {
        let before = self.barred.get(&peer).map(|(_, lasted)| *lasted * BAR_FACTOR);
        if before.is_none()
            && self.barred.len() >= BARRED_MAX
            && let Some(first) = self.barred.iter().min_by_key(|(_, (until, _))| *until)
        {
            let first = *first.0;
            self.barred.remove(&first);
        }
        let lasts = before.unwrap_or(BAR.0).min(BAR.1);
        self.barred.insert(peer, (now + lasts, lasts));
    }

    /// It has proved its key, and waits from now on. Returns the one that is to be closed for it.
    pub(super) fn proved(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        now: Instant,
    ) -> Result<Option<(PeerId, ConnectionId)>, Crowded> {
        let Some(visitor) = self.visitors.get(&connection) else { return Ok(None) };
        let source = visitor.source;
        let is_here = source.is_some_and(Source::is_here);
        if !is_here && self.barred.get(&peer).is_some_and(|(until, _)| *until > now) {
            return Err(Crowded::Barred);
        }
        let same = |visitor: &Visitor| {
            let waits = visitor.state == State::Waits && visitor.peer.is_some();
            waits && visitor.source == source
        };
        let crowded = self.visitors.values().filter(|visitor| same(visitor)).count();
        let leaves = match crowded >= PER_SOURCE_MAX && !is_here {
            true => Some(self.make_room(now, same)?),
            false => None,
        };
        if let Some(visitor) = self.visitors.get_mut(&connection) {
            (visitor.peer, visitor.since) = (Some(peer), now);
        }
        Ok(leaves)
    }

    /// It was admitted; unless members of its address have enough connections already.
    pub(super) fn admitted(&mut self, connection: ConnectionId) -> Result<(), Crowded> {
        let Some(visitor) = self.visitors.get(&connection) else { return Ok(()) };
        let (source, peer) = (visitor.source, visitor.peer);
        let is_full = self.is_full_of_members(source);
        if let Some(visitor) = self.visitors.get_mut(&connection) {
            visitor.state = if is_full { State::Leaves } else { State::Member };
        }
        if is_full {
            return Err(Crowded::Members);
        }
        if let Some(peer) = peer {
            self.barred.remove(&peer);
        }
        if let Some(source) = source.filter(|source| !source.is_here())
            && self.friends.insert(source)
            && self.friends.len() > FRIENDS_MAX
        {
            self.friends.pop_first();
        }
        Ok(())
    }

    /// Relays, over which a connection has no address, bound what comes over them themselves.
    fn is_full_of_members(&self, source: Option<Source>) -> bool {
        if source.is_none_or(Source::is_here) {
            return false;
        }
        let same = |visitor: &&Visitor| visitor.state == State::Member && visitor.source == source;
        self.visitors.values().filter(same).count() >= MEMBERS_PER_SOURCE_MAX
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

    /// A stranger comes and proves its key. Returns who leaves for it.
    fn stay(
        strangers: &mut Strangers,
        connection: usize,
        ip: Option<IpAddr>,
        peer: PeerId,
        now: Instant,
    ) -> Result<Option<PeerId>, Crowded> {
        let first = strangers.enter(id(connection), ip, now)?;
        let second = strangers.proved(id(connection), peer, now);
        if second.is_err() {
            strangers.leave(id(connection));
        }
        Ok(first.or(second?).map(|(peer, leaves)| {
            strangers.leave(leaves);
            peer
        }))
    }

    #[test]
    fn one_address_has_a_share_and_all_have_a_bound() {
        let (mut strangers, now) = (Strangers::default(), Instant::now());
        let crowded = Err(Crowded::Strangers);
        for connection in 0..HANDSHAKES_PER_SOURCE_MAX {
            assert_eq!(enter(&mut strangers, connection, ip(1)), Ok(()));
        }
        assert_eq!(enter(&mut strangers, 100, ip(1)), Err(Crowded::Strangers));
        assert_eq!(enter(&mut strangers, 100, ip(2)), Ok(()), "another address");
        for connection in 0..PER_SOURCE_MAX {
            assert_eq!(strangers.proved(id(connection), PeerId::random(), now), Ok(None));
        }
        assert_eq!(strangers.proved(id(14), PeerId::random(), now), crowded);
        strangers.leave(id(14));
        strangers.leave(id(0));
        assert_eq!(stay(&mut strangers, 0, ip(1), PeerId::random(), now), Ok(None), "free again");
        strangers.admitted(id(0)).unwrap();
        let next = stay(&mut strangers, 101, ip(1), PeerId::random(), now);
        assert_eq!(next, Ok(None), "the admitted do not count");
        assert_eq!(strangers.proved(id(15), PeerId::random(), now), crowded);

        let mut strangers = Strangers::default();
        for connection in 0..STRANGERS_MAX {
            assert_eq!(enter(&mut strangers, connection, ip(connection)), Ok(()));
        }
        assert_eq!(enter(&mut strangers, 1_000, ip(1_000)), Err(Crowded::Strangers));
    }

    #[test]
    fn who_has_waited_longest_makes_room_and_is_turned_away_for_a_while() {
        let (mut strangers, now) = (Strangers::default(), Instant::now());
        let peers: Vec<PeerId> = (0..20).map(|_| PeerId::random()).collect();
        for (connection, peer) in peers.iter().take(PER_SOURCE_MAX).enumerate() {
            let at = now + Duration::from_millis(connection as u64);
            assert_eq!(stay(&mut strangers, connection, ip(1), *peer, at), Ok(None));
        }
        let mut next = |peer: usize, at| stay(&mut strangers, 100 + peer, ip(1), peers[peer], at);
        assert_eq!(next(10, now + GRACE / 2), Err(Crowded::Strangers), "everybody has a while");
        let later = now + 2 * GRACE;
        assert_eq!(next(10, later), Ok(Some(peers[0])));
        assert_eq!(next(11, later), Ok(Some(peers[1])));
        assert_eq!(next(0, later), Err(Crowded::Barred));
        assert_eq!(next(1, later + BAR.0 / 2), Err(Crowded::Barred));
        assert_eq!(next(0, later + BAR.0), Ok(Some(peers[2])));
        let again = later + 2 * BAR.0;
        for peer in 12..12 + PER_SOURCE_MAX {
            assert!(next(peer, again).is_ok(), "all others make room for these");
        }
        assert_eq!(next(0, again + BAR.0), Err(Crowded::Barred), "longer each time");
        assert!(next(0, again + BAR_FACTOR * BAR.0).is_ok());
    }

    /// A hundred identities of one address that come back every 250 ms and say nothing, and somebody
    /// new of the same address whose handshake takes 300 ms and who tries every two seconds.
    #[test]
    fn a_hundred_identities_of_one_address_do_not_keep_out_a_new_one_of_it() {
        let mut random = Pcg64::seed_from_u64(2);
        for _ in 0..20 {
            let (mut strangers, begun) = (Strangers::default(), Instant::now());
            let sybils: Vec<PeerId> = (0..100).map(|_| PeerId::random()).collect();
            // When each sybil comes, and whether it is in.
            let mut here: Vec<Option<usize>> = vec![None; sybils.len()];
            let (mut number, mut now, mut entered) = (0, begun, None);
            let mut next = begun + Duration::from_secs(2);
            let me = PeerId::random();
            let joined = loop {
                now += Duration::from_micros(random.random_range(0..5_000));
                let sybil = random.random_range(0..sybils.len());
                number += 1;
                if here[sybil].is_none()
                    && let Ok(leaves) = stay(&mut strangers, number, ip(1), sybils[sybil], now)
                {
                    here[sybil] = Some(number);
                    if leaves == Some(me) {
                        entered = None;
                    }
                    here.iter_mut().zip(&sybils).for_each(|(here, peer)| {
                        if leaves == Some(*peer) {
                            *here = None;
                        }
                    });
                }
                if entered.is_none() && now >= next {
                    next = now + Duration::from_secs(2);
                    number += 1;
                    let place = stay(&mut strangers, number, ip(1), me, now);
                    entered = place.is_ok().then_some(now);
                }
                if entered.is_some_and(|at| now.duration_since(at) >= GRACE / 3) {
                    break now.duration_since(begun);
                }
                assert!(now.duration_since(begun) < Duration::from_secs(60), "kept out");
            };
            assert!(joined < Duration::from_secs(60));
        }
    }

    #[test]
    fn the_members_of_one_address_have_a_bound_too() {
        let (mut strangers, now) = (Strangers::default(), Instant::now());
        for connection in 0..MEMBERS_PER_SOURCE_MAX {
            stay(&mut strangers, connection, ip(1), PeerId::random(), now).unwrap();
            assert_eq!(strangers.admitted(id(connection)), Ok(()));
        }
        assert_eq!(enter(&mut strangers, 100, ip(1)), Err(Crowded::Members));
        assert_eq!(enter(&mut strangers, 100, ip(2)), Ok(()), "another address");
        strangers.leave(id(0));
        enter(&mut strangers, 101, ip(1)).unwrap();
        enter(&mut strangers, 102, ip(1)).unwrap();
        assert_eq!(strangers.admitted(id(101)), Ok(()));
        assert_eq!(strangers.admitted(id(102)), Err(Crowded::Members), "they came at once");
        let here = Some(IpAddr::from([127, 0, 0, 1]));
        for connection in 200..300 {
            enter(&mut strangers, connection, here).unwrap();
            assert_eq!(strangers.admitted(id(connection)), Ok(()), "on this machine");
        }
    }

    #[test]
    fn a_flood_does_not_keep_a_member_out_that_comes_back() {
        let mut strangers = Strangers::default();
        enter(&mut strangers, 2_000, ip(2_000)).unwrap();
        strangers.admitted(id(2_000)).unwrap();
        strangers.leave(id(2_000));
        for connection in 0..STRANGERS_MAX {
            enter(&mut strangers, connection, ip(connection)).unwrap();
        }
        assert_eq!(enter(&mut strangers, 2_001, ip(2_001)), Err(Crowded::Strangers));
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
                let proved = strangers.proved(id(tries), PeerId::random(), now);
                leaves = leaves.or(proved.ok().flatten());
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
        assert_eq!(enter(&mut strangers, 1_000, here), Err(Crowded::Strangers));
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
