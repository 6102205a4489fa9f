//! What a provider says of itself: that it lives, how much it carries, and which of its services do
//! not work.
//!
//! - Only nodes that publish services say it; of all others their advertisements tell that they live.
//! - Every [`PERIOD`], and at once when the health of a service changed, but not more often than once
//!   a [`GAP`].
//! - It names at most [`SERVICES_MAX`] services, the worst first. Nothing is known of the health of one
//!   that it does not name.
//! - A provider speaks of its own services only: whom others cannot reach they keep to themselves.
//! - A higher sequence number wins. It is a time of the provider's clock, and one far from here is not
//!   believed, or it could be replayed for as long. What was not renewed for [`LIFETIME`] is forgotten.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::registry::CLOCK_SKEW;
use super::wire::{Payload, Signed, WireError};
use crate::engine::measure::Health;
use crate::engine::measure::service::Checked;
use crate::engine::types::{NodeId, ServiceName, Timestamp};

/// Longest time between two heartbeats of a provider; a fifth less by chance, so that those who
/// started together do not all speak together.
pub const PERIOD: Duration = Duration::from_secs(60);
/// Shortest time between two heartbeats.
pub const GAP: Duration = Duration::from_secs(1);
/// How long the word of a provider counts: three periods.
pub const LIFETIME: Duration = Duration::from_secs(180);
/// Most services that a heartbeat names: with the longest names it still fits a gossip message.
pub const SERVICES_MAX: usize = 48;
/// Providers whose heartbeats are kept.
pub const HEARTBEATS_MAX: usize = 2_048;

/// How much a provider carries for others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Tunnels that end at it.
    pub tunnels: u32,
    /// Streams and UDP flows that are open to its services.
    pub streams: u32,
    /// Utilisation of its busiest link (per cent), 0 to 100.
    pub utilisation: u8,
}

/// How one service is, as its provider sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceState {
    /// Which.
    pub name: ServiceName,
    /// How it is.
    pub health: Health,
    /// How long it takes to answer a check there (µs); `None` before it ever did.
    pub response_us: Option<u32>,
}

/// What a provider says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Higher replaces lower. Starts from the clock (µs), so that it grows over restarts.
    pub sequence: u64,
    /// How much it carries.
    pub load: Load,
    /// How its services are, at most [`SERVICES_MAX`], each once.
    pub services: Vec<ServiceState>,
}

impl Payload for Heartbeat {
    const DOMAIN: &'static [u8] = b"meshwise/heartbeat/1\0";

    fn check(&self) -> Result<(), WireError> {
        if self.services.len() > SERVICES_MAX {
            return Err(WireError::OutOfRange("the number of services"));
        }
        if self.load.utilisation > 100 {
            return Err(WireError::OutOfRange("the utilisation"));
        }
        Ok(())
    }
}

/// Why a heartbeat is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Not newer than the known one.
    Stale,
    /// From a time that is over by so much.
    Behind(Duration),
    /// From a time so far ahead.
    Ahead(Duration),
    /// [`HEARTBEATS_MAX`] others are known.
    Full,
    /// It says more than it may.
    TooOften,
}

/// The newest word of one provider.
#[derive(Clone, Debug)]
pub struct Heard {
    sequence: u64,
    at: Timestamp,
    load: Load,
    services: BTreeMap<ServiceName, (Health, Option<u32>)>,
    /// As it was signed, for newcomers.
    signed: Signed,
}

/// What all providers said last.
#[derive(Clone, Debug, Default)]
pub struct Heartbeats(BTreeMap<NodeId, Heard>);

impl Heartbeats {
    /// Takes a heartbeat that was verified. Returns the services whose health it changes.
    ///
    /// # Errors
    /// [`Refused`], with nothing changed.
    pub fn accept(
        &mut self,
        signed: &Signed,
        heartbeat: Heartbeat,
        may: impl FnOnce() -> bool,
        now: Timestamp,
    ) -> Result<Vec<(ServiceName, Health)>, Refused> {
        let Heartbeat { sequence, load, services } = heartbeat;
        let said_at = Timestamp(sequence);
        if said_at + LIFETIME + CLOCK_SKEW <= now {
            return Err(Refused::Behind(now.since(said_at)));
        }
        if said_at > now + CLOCK_SKEW {
            return Err(Refused::Ahead(said_at.since(now)));
        }
        let origin = signed.key.node_id();
        let before = match self.0.get(&origin) {
            Some(known) if known.sequence >= sequence => return Err(Refused::Stale),
            None if self.0.len() >= HEARTBEATS_MAX => return Err(Refused::Full),
            _ if !may() => return Err(Refused::TooOften),
            known => known.map(|known| &known.services),
        };
        let services: BTreeMap<_, _> =
            services.into_iter().map(|s| (s.name, (s.health, s.response_us))).collect();
        let health = |(health, _): &(Health, Option<u32>)| *health;
        let was = |name: &ServiceName| before.and_then(|before| before.get(name)).map(health);
        let changes = services.iter().map(|(name, state)| (name.clone(), health(state)));
        let changes = changes.filter(|(name, health)| was(name) != Some(*health)).collect();
        let signed = signed.clone();
        self.0.insert(origin, Heard { sequence, at: now, load, services, signed });
        Ok(changes)
    }

    /// How a provider says that its service is, and how long that takes to answer there (µs).
    pub fn service(
        &self,
        name: &ServiceName,
        provider: NodeId,
        now: Timestamp,
    ) -> Option<(Health, Option<u32>)> {
        let heard = self.0.get(&provider).filter(|heard| heard.at + LIFETIME > now)?;
        heard.services.get(name).copied()
    }

    /// How much a provider says that it carries.
    pub fn load(&self, provider: NodeId, now: Timestamp) -> Option<Load> {
        let heard = self.0.get(&provider).filter(|heard| heard.at + LIFETIME > now)?;
        Some(heard.load)
    }

    /// Heartbeats that count still, for a new neighbour, by their own time too: handed from node to node,
    /// what was said would never grow old.
    pub fn signed(&self, now: Timestamp) -> impl Iterator<Item = &Signed> + '_ {
        let counts = move |heard: &&Heard| {
            heard.at + LIFETIME > now && Timestamp(heard.sequence) + LIFETIME > now
        };
        let heard = self.0.values().filter(counts);
        heard.map(|heard| &heard.signed)
    }

    /// Forgets what was not renewed. A sequence number is kept as long as an older heartbeat could be
    /// replayed.
    pub fn expire(&mut self, now: Timestamp) {
        self.0.retain(|_, heard| {
            heard.at + LIFETIME > now || Timestamp(heard.sequence) + LIFETIME + CLOCK_SKEW > now
        });
    }

    /// Forgets a provider that was put out.
    pub fn forget(&mut self, provider: NodeId) {
        self.0.remove(&provider);
    }
}

/// When this node says its own, and what.
#[derive(Clone, Debug, Default)]
pub struct Heart {
    said_at: Option<Timestamp>,
    due_at: Option<Timestamp>,
    sequence: u64,
}

impl Heart {
    /// There is something to say within a period; `random` is drawn uniformly from 0 to 1.
    pub fn begin(&mut self, random: f64, now: Timestamp) {
        self.due_at.get_or_insert(now + PERIOD.mul_f64(1.0 - random / 5.0));
    }

    /// There is news.
    pub fn hurry(&mut self, now: Timestamp) {
        let soonest = self.said_at.map_or(now, |at| now.max(at + GAP));
        self.due_at = Some(self.due_at.map_or(soonest, |at| at.min(soonest)));
    }

    /// Others have a heartbeat of this node with this sequence number. When it is newer than all that were said
    /// since the node started, its clock was set back: what it says next is newer, and is said soon.
    pub fn outdone(&mut self, sequence: u64, now: Timestamp) {
        if sequence > self.sequence {
            self.sequence = sequence;
            // Who has said nothing yet has nothing to say again.
            if self.said_at.is_some() {
                self.hurry(now);
            }
        }
    }

    /// When it is due.
    pub fn due_at(&self) -> Option<Timestamp> {
        self.due_at
    }

    /// Says how the services are that this node has checked; nothing when it is not due.
    pub fn beat(
        &mut self,
        load: Load,
        services: impl Iterator<Item = (ServiceName, Checked)>,
        now: Timestamp,
    ) -> Option<Heartbeat> {
        self.due_at.filter(|at| *at <= now)?;
        (self.due_at, self.said_at) = (None, Some(now));
        self.sequence = now.as_micros().max(self.sequence + 1);
        let state = |(name, checked): (ServiceName, Checked)| {
            let response_us = checked.response_ms.map(|ms| (ms * 1e3) as u32);
            ServiceState { name, health: checked.health, response_us }
        };
        let mut services: Vec<ServiceState> = services.map(state).collect();
        services.sort_by_key(|state| std::cmp::Reverse(state.health));
        services.truncate(SERVICES_MAX);
        Some(Heartbeat { sequence: self.sequence, load, services })
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use proptest::prelude::*;

    use super::*;
    use crate::engine::overlay::Author;
    use crate::engine::overlay::wire::{GOSSIP_BYTES_MAX, GossipMessage, decode, encode};

    const NOW: Timestamp = Timestamp(1_760_000_000_000_000);

    fn author(byte: u8) -> Author {
        Author::root(SigningKey::from_bytes(&[byte; 32]))
    }

    fn name(text: &str) -> ServiceName {
        text.parse().unwrap()
    }

    fn says(text: &str, health: Health) -> ServiceState {
        ServiceState { name: name(text), health, response_us: Some(7) }
    }

    fn accept(
        heard: &mut Heartbeats,
        by: u8,
        sequence: Timestamp,
        services: Vec<ServiceState>,
    ) -> Result<Vec<(ServiceName, Health)>, Refused> {
        let heartbeat = Heartbeat { sequence: sequence.0, load: Load::default(), services };
        heard.accept(&Signed::seal(&author(by), &heartbeat), heartbeat, || true, NOW)
    }

    #[test]
    fn the_newest_word_of_a_provider_counts_for_its_own_services_and_for_its_time() {
        let mut heard = Heartbeats::default();
        let (one, two) = (author(1).public().node_id(), author(2).public().node_id());
        let down = vec![says("a.local", Health::Down), says("b.local", Health::Up)];
        let changes = accept(&mut heard, 1, NOW, down).unwrap();
        assert_eq!(changes, [(name("a.local"), Health::Down), (name("b.local"), Health::Up)]);
        let known = |heard: &Heartbeats, node, at| heard.service(&name("a.local"), node, at);
        assert_eq!(known(&heard, one, NOW), Some((Health::Down, Some(7))));
        assert_eq!(known(&heard, two, NOW), None, "another provider of the same name");
        assert_eq!(heard.signed(NOW).count(), 1);
        assert_eq!(accept(&mut heard, 1, NOW, vec![]), Err(Refused::Stale), "replayed");
        let later = NOW + Duration::from_secs(1);
        let up = vec![says("a.local", Health::Up), says("b.local", Health::Up)];
        assert_eq!(accept(&mut heard, 1, later, up).unwrap(), [(name("a.local"), Health::Up)]);
        assert_eq!(heard.signed(NOW).count(), 1, "newcomers hear of what works too");
        assert_eq!(heard.signed(NOW + LIFETIME).count(), 0, "and not of what was long ago");
        assert_eq!(known(&heard, one, NOW + LIFETIME), None, "silent for too long");
        heard.expire(NOW + LIFETIME);
        assert_eq!(accept(&mut heard, 1, NOW, vec![]), Err(Refused::Stale), "replayed later");
        heard.expire(later + LIFETIME + CLOCK_SKEW);
        assert!(heard.0.is_empty());
    }

    #[test]
    fn what_was_said_long_ago_is_not_handed_on_by_who_heard_it_late() {
        let mut heard = Heartbeats::default();
        let said_at = Timestamp(NOW.0 - (LIFETIME - Duration::from_secs(9)).as_micros() as u64);
        accept(&mut heard, 1, said_at, vec![says("a.local", Health::Up)]).unwrap();
        assert_eq!(heard.signed(NOW + Duration::from_secs(8)).count(), 1);
        assert_eq!(heard.signed(NOW + Duration::from_secs(9)).count(), 0);
        let provider = author(1).public().node_id();
        let at = NOW + Duration::from_secs(9);
        assert!(heard.service(&name("a.local"), provider, at).is_some(), "it counts here");
    }

    #[test]
    fn times_that_cannot_be_are_refused_and_providers_are_bounded() {
        let mut heard = Heartbeats::default();
        let ahead = NOW + CLOCK_SKEW + Duration::from_secs(1);
        let refused = accept(&mut heard, 1, ahead, vec![]);
        assert_eq!(refused, Err(Refused::Ahead(CLOCK_SKEW + Duration::from_secs(1))));
        let age = LIFETIME + CLOCK_SKEW;
        let old = Timestamp(NOW.0 - age.as_micros() as u64);
        assert_eq!(accept(&mut heard, 1, old, vec![]), Err(Refused::Behind(age)));
        let signed = Signed::seal(
            &author(1),
            &Heartbeat { sequence: NOW.0, load: Load::default(), services: vec![] },
        );
        for index in 0..=HEARTBEATS_MAX as u64 {
            let mut other = signed.clone();
            other.key.0[..8].copy_from_slice(&index.to_le_bytes());
            let heartbeat = Heartbeat { sequence: NOW.0, load: Load::default(), services: vec![] };
            let full = index == HEARTBEATS_MAX as u64;
            assert_eq!(heard.accept(&other, heartbeat, || true, NOW).is_err(), full, "{index}");
        }
        heard.forget(signed.key.node_id());
    }

    #[test]
    fn the_longest_heartbeat_fits_a_gossip_message_and_a_longer_one_is_refused() {
        let long = [[b'a'; 63]; 4].map(|label| String::from_utf8(label.to_vec()).unwrap());
        let mut long = long.join(".");
        long.truncate(250);
        let mut services: Vec<ServiceState> = (0..SERVICES_MAX)
            .map(|index| ServiceState {
                name: name(&format!("{index:03}{}", &long[3..])),
                health: Health::Down,
                response_us: Some(u32::MAX),
            })
            .collect();
        let load = Load { tunnels: u32::MAX, streams: u32::MAX, utilisation: 100 };
        let heartbeat = Heartbeat { sequence: u64::MAX, load, services: services.clone() };
        let signed = Signed::seal(&author(1), &heartbeat);
        assert_eq!(signed.open::<Heartbeat>(), Ok(heartbeat.clone()));
        let bytes = encode(&GossipMessage::Heartbeat(signed)).len();
        assert!(bytes <= GOSSIP_BYTES_MAX - 1_024, "{bytes}");
        services.push(says("one.more", Health::Up));
        let load = Load { utilisation: 101, ..load };
        for wrong in [Heartbeat { services, ..heartbeat.clone() }, Heartbeat { load, ..heartbeat }]
        {
            let opened = Signed::seal(&author(1), &wrong).open::<Heartbeat>();
            assert!(matches!(opened, Err(WireError::OutOfRange(_))));
        }
    }

    #[test]
    fn it_beats_once_a_period_and_at_once_for_news() {
        let at = |ms: u64| NOW + Duration::from_millis(ms);
        let checked =
            |health| Checked { health, response_ms: Some(2.5), failure: None, at: NOW, since: NOW };
        let none = std::iter::empty::<(ServiceName, Checked)>;
        let mut heart = Heart::default();
        assert_eq!((heart.due_at(), heart.beat(Load::default(), none(), NOW)), (None, None));
        heart.begin(1.0, NOW);
        assert_eq!(heart.due_at(), Some(NOW + PERIOD * 4 / 5));
        heart.hurry(NOW);
        let services = [("a.local", Health::Up), ("b.local", Health::Down)];
        let services = services.map(|(text, health)| (name(text), checked(health)));
        let first = heart.beat(Load::default(), services.into_iter(), NOW).unwrap();
        let order: Vec<&str> = first.services.iter().map(|state| state.name.as_str()).collect();
        assert_eq!(order, ["b.local", "a.local"], "the worst first");
        assert_eq!(first.services[0].response_us, Some(2_500));
        assert_eq!(heart.due_at(), None, "there may be nothing left to say");
        heart.begin(0.0, NOW);
        heart.hurry(at(10));
        assert_eq!(heart.due_at(), Some(NOW + GAP), "not more often");
        assert_eq!(heart.beat(Load::default(), none(), at(999)), None);
        let second = heart.beat(Load::default(), none(), at(1_000)).unwrap();
        assert!(second.sequence > first.sequence);
    }

    #[test]
    fn a_clock_that_was_set_back_does_not_make_unheard() {
        let at = |s: u64| NOW + Duration::from_secs(s);
        let beat = |heart: &mut Heart, now| heart.beat(Load::default(), std::iter::empty(), now);
        let mut heart = Heart::default();
        heart.outdone(at(90).0, NOW);
        assert_eq!(heart.due_at(), None, "it has said nothing yet");
        heart.hurry(NOW);
        assert_eq!(beat(&mut heart, NOW).unwrap().sequence, at(90).0 + 1);
        heart.outdone(at(90).0 + 1, NOW);
        assert_eq!(heart.due_at(), None, "its own word");
        heart.outdone(at(95).0, NOW);
        assert_eq!(heart.due_at(), Some(NOW + GAP));
        assert_eq!(beat(&mut heart, NOW + GAP).unwrap().sequence, at(95).0 + 1);
        heart.hurry(at(99));
        assert_eq!(
            beat(&mut heart, at(99)).unwrap().sequence,
            at(99).0,
            "the clock is right again"
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            if let Ok(heartbeat) = decode::<Heartbeat>(&bytes, GOSSIP_BYTES_MAX) {
                let _ = heartbeat.check();
            }
        }
    }
}
