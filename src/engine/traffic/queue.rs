//! What waits in front of a link: a fair queue in two levels that marks instead of growing.
//!
//! The rule, after FQ-CoDel (RFC 8290) without CoDel's control law:
//! - Datagrams wait by flow, flows by the neighbour that they come from (this node itself is one).
//!   Neighbours share the link by start-time fair queueing (Goyal, Vin and Cheng, 1996), each with
//!   the weight of its active flows, but at most [`WEIGHT_MAX`]: one that floods with a thousand
//!   flows counts as eight. Flows of one neighbour share by deficit round robin with a quantum of
//!   one tunnel packet; a flow that had nothing waiting goes first, so that who sends little waits
//!   little.
//! - A flow with a reservation goes before the others as far as its token bucket reaches. It stays
//!   in order: it is the flow that goes first, not single datagrams.
//! - Control datagrams (probes, beats, receipts and the like) go before everything, for at most a
//!   tenth of the bytes; beyond that they are a flow like others.
//! - A datagram that waited longer than [`MARK_AFTER`] is marked, which the congestion controller
//!   at the end of the tunnel reacts to (a step, as in DCTCP and L4S, RFC 9332). Where much has piled
//!   up ([`PILE_BYTES`]) marks begin when waits have been so long for [`STANDING`]: what waited
//!   because the machine was busy elsewhere leaves together, and says nothing about the link. On a
//!   slow link, few bytes wait as long. A flow that does not react, because its datagrams have waited
//!   longer than [`DROP_AFTER`] for [`PATIENCE`], loses those from its head, but never its only one.
//! - Bytes and flows are bounded. What is too much is taken from the longest flow of the neighbour
//!   with most bytes for its weight.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::FlowKey;
use super::bucket::Bucket;
use crate::engine::types::{NodeId, Timestamp};

/// Streams to each neighbour in each direction. A flow stays on one of them.
pub const LANES: usize = 2;
/// Bytes that may wait in front of one link: 160 ms at 100 Mbit/s.
pub const BYTES_MAX: usize = 2_000_000;
/// Flows that may wait in front of one link, as in the default of FQ-CoDel.
pub const FLOWS_MAX: usize = 1_024;
/// A wait that is marked. A guess: two tunnel packets at 8 Mbit/s.
pub const MARK_AFTER: Duration = Duration::from_millis(8);
/// How long waits must be longer than that where much has piled up: longer than the scheduler of a
/// busy machine keeps a thread waiting as a rule. A guess.
pub const STANDING: Duration = Duration::from_millis(10);
/// So much (bytes): what 64 Mbit/s carry in the time of a wait that is marked.
pub const PILE_BYTES: usize = 64_000;
/// A wait that no flow is allowed for long.
pub const DROP_AFTER: Duration = Duration::from_millis(60);
/// How long a flow may wait longer than that (CoDel's interval, RFC 8289): a stall of the
/// transport passes, an overload stays.
pub const PATIENCE: Duration = Duration::from_millis(100);
/// Most flows for which one neighbour counts.
pub const WEIGHT_MAX: usize = 8;
/// What a flow may send in its turn (bytes): a tunnel packet with its header.
const QUANTUM: i64 = 4_352;
/// Control datagrams take one byte in so many.
const CONTROL_PART: usize = 10;
/// What control datagrams may take at once (bytes).
const CONTROL_BURST: usize = 16_384;
/// Least common multiple of the weights 1 to [`WEIGHT_MAX`], so that virtual time is whole.
const VIRTUAL_BYTE: u64 = 840;
/// How far an ingress may fall behind in virtual time while its lane is closed, and catch up
/// later at the expense of others: four turns of each of its flows.
const LAG_MAX: u64 = 4 * QUANTUM as u64 * VIRTUAL_BYTE;
/// Reservations that one link's queue knows; as many as its ledger.
const GRANTS_MAX: usize = super::ledger::ENTRIES_MAX;

/// How urgent a datagram is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It tells nodes about routes.
    Control,
    /// A tunnel's packet.
    Data,
}

/// What left the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Popped<T> {
    /// The datagram.
    pub item: T,
    /// Its length (bytes).
    pub bytes: usize,
    /// The lane that it goes to.
    pub lane: usize,
    /// It is to be marked.
    pub marked: bool,
    /// How long it waited.
    pub waited: Duration,
}

struct Waiting<T> {
    item: T,
    bytes: usize,
    since: Timestamp,
}

struct Flow<T> {
    key: FlowKey,
    lane: usize,
    items: VecDeque<Waiting<T>>,
    bytes: usize,
    deficit: i64,
    /// From when on its datagrams are marked; `None` while none waits longer than [`MARK_AFTER`].
    marks_from: Option<Timestamp>,
    /// Since when its datagrams have waited longer than [`DROP_AFTER`].
    late_since: Option<Timestamp>,
}

/// What waits from one neighbour. Its flows are named by their place in the queue's table.
#[derive(Default)]
struct Ingress {
    /// Flows that had nothing waiting before.
    fresh: VecDeque<usize>,
    old: VecDeque<usize>,
    /// Datagrams by lane.
    waiting: [usize; LANES],
    bytes: usize,
    /// Virtual time up to which it has been served.
    served: u64,
}

impl Ingress {
    fn weight(&self) -> u64 {
        (self.fresh.len() + self.old.len()).clamp(1, WEIGHT_MAX) as u64
    }

    fn is_idle(&self) -> bool {
        self.waiting.iter().all(|count| *count == 0)
    }

    fn flows(&self) -> impl Iterator<Item = usize> + '_ {
        self.fresh.iter().chain(&self.old).copied()
    }
}

/// See the module documentation. Time is an argument and never goes back.
pub struct FairQueue<T> {
    bytes_max: usize,
    flows_max: usize,
    table: Vec<Flow<T>>,
    free: Vec<usize>,
    places: BTreeMap<FlowKey, usize>,
    ingresses: BTreeMap<NodeId, Ingress>,
    /// Virtual time: where the ingress that was served last began.
    clock: u64,
    control: VecDeque<(usize, Waiting<T>)>,
    control_credit: usize,
    grants: BTreeMap<FlowKey, (Bucket, Timestamp)>,
    /// Flows that may have a reservation and something waiting.
    reserved: VecDeque<usize>,
    waiting: [usize; LANES],
    bytes: usize,
    dropped: u64,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self::with_limits(BYTES_MAX, FLOWS_MAX)
    }
}

impl<T> FairQueue<T> {
    /// An empty queue with limits of its own, at least one datagram and one flow.
    pub fn with_limits(bytes_max: usize, flows_max: usize) -> Self {
        Self {
            bytes_max,
            flows_max: flows_max.max(1),
            table: Vec::new(),
            free: Vec::new(),
            places: BTreeMap::new(),
            ingresses: BTreeMap::new(),
            clock: 0,
            control: VecDeque::new(),
            control_credit: CONTROL_BURST,
            grants: BTreeMap::new(),
            reserved: VecDeque::new(),
            waiting: [0; LANES],
            bytes: 0,
            dropped: 0,
        }
    }

    /// Bytes that wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Datagrams that were dropped since the queue exists.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Lets a flow go before others at `rate` (bytes/s) until a time; 0 ends that.
    pub fn grant(&mut self, flow: FlowKey, rate: u64, until: Timestamp, now: Timestamp) {
        self.grants.retain(|_, (_, until)| *until > now);
        if rate == 0 {
            self.grants.remove(&flow);
        } else if let Some((bucket, known_until)) = self.grants.get_mut(&flow) {
            bucket.set_rate(rate, now);
            *known_until = until;
        } else if self.grants.len() < GRANTS_MAX {
            self.grants.insert(flow, (Bucket::new(rate, now), until));
            let place = self.places.get(&flow).filter(|place| !self.reserved.contains(place));
            self.reserved.extend(place.copied());
        }
    }

    /// Adds a datagram. Those of a flow stay on the lane of its first one, below [`LANES`].
    pub fn push(
        &mut self,
        key: FlowKey,
        lane: usize,
        class: Class,
        bytes: usize,
        item: T,
        now: Timestamp,
    ) {
        let waiting = Waiting { item, bytes, since: now };
        if class == Class::Control && bytes <= self.control_credit {
            self.control_credit -= bytes;
            self.control.push_back((lane, waiting));
            self.bytes += bytes;
            self.waiting[lane] += 1;
        } else {
            let Some(place) = self.place(key, lane) else {
                self.dropped += 1;
                return;
            };
            let flow = &mut self.table[place];
            let lane = flow.lane;
            flow.items.push_back(waiting);
            flow.bytes += bytes;
            self.bytes += bytes;
            self.waiting[lane] += 1;
            if let Some(ingress) = self.ingresses.get_mut(&key.ingress) {
                ingress.waiting[lane] += 1;
                ingress.bytes += bytes;
            }
        }
        while self.bytes > self.bytes_max && self.drop_longest() {}
    }

    /// Takes the datagram whose turn it is among those for lanes that are `open`.
    pub fn pop(&mut self, now: Timestamp, open: impl Fn(usize) -> bool) -> Option<Popped<T>> {
        if !(0..LANES).any(|lane| self.waiting[lane] > 0 && open(lane)) {
            return None;
        }
        let index = self.control.iter().position(|(lane, _)| open(*lane));
        if let Some((lane, first)) = index.and_then(|index| self.control.remove(index)) {
            self.bytes -= first.bytes;
            self.waiting[lane] -= 1;
            let waited = now.since(first.since);
            return Some(Popped {
                item: first.item,
                bytes: first.bytes,
                lane,
                marked: false,
                waited,
            });
        }
        let popped = self.pop_reserved(now, &open).or_else(|| self.pop_fair(now, &open))?;
        let credit = self.control_credit + popped.bytes / CONTROL_PART;
        self.control_credit = credit.min(CONTROL_BURST);
        Some(popped)
    }

    fn pop_reserved(&mut self, now: Timestamp, open: impl Fn(usize) -> bool) -> Option<Popped<T>> {
        for _ in 0..self.reserved.len() {
            let place = self.reserved.pop_front()?;
            let flow = &self.table[place];
            let Some((bucket, until)) = self.grants.get_mut(&flow.key) else { continue };
            if *until <= now {
                continue;
            }
            self.reserved.push_back(place);
            let next = flow.items.front().filter(|_| open(flow.lane));
            if next.is_some_and(|next| bucket.take(next.bytes, now)) {
                let popped = self.take(place, now);
                self.tidy(self.table[place].key.ingress);
                return popped;
            }
        }
        None
    }

    fn pop_fair(&mut self, now: Timestamp, open: impl Fn(usize) -> bool) -> Option<Popped<T>> {
        let has_open =
            |ingress: &Ingress| (0..LANES).any(|lane| ingress.waiting[lane] > 0 && open(lane));
        let ready = self.ingresses.iter_mut().filter(|(_, ingress)| has_open(ingress));
        let (name, ingress) = ready.min_by_key(|(_, ingress)| ingress.served)?;
        let name = *name;
        ingress.served = ingress.served.max(self.clock.saturating_sub(LAG_MAX));
        self.clock = self.clock.max(ingress.served);
        loop {
            let ingress = self.ingresses.get_mut(&name)?;
            let table = &mut self.table;
            let next =
                |flows: &VecDeque<usize>| flows.iter().position(|place| open(table[*place].lane));
            let (flows, index, was_fresh) = match next(&ingress.fresh) {
                Some(index) => (&mut ingress.fresh, index, true),
                None => {
                    let index = next(&ingress.old)?;
                    (&mut ingress.old, index, false)
                }
            };
            let place = flows[index];
            let flow = &mut table[place];
            if !flow.items.is_empty() && flow.deficit > 0 {
                let popped = self.take(place, now)?;
                self.table[place].deficit -= popped.bytes as i64;
                if let Some(ingress) = self.ingresses.get_mut(&name) {
                    ingress.served += popped.bytes as u64 * VIRTUAL_BYTE / ingress.weight();
                }
                self.tidy(name);
                return Some(popped);
            }
            flows.remove(index);
            if flow.items.is_empty() && (!was_fresh || ingress.old.is_empty()) {
                self.release(place);
                continue;
            }
            if flow.deficit <= 0 {
                flow.deficit += QUANTUM;
            }
            ingress.old.push_back(place);
        }
    }

    /// Takes the first datagram of a flow that is not too late.
    fn take(&mut self, place: usize, now: Timestamp) -> Option<Popped<T>> {
        loop {
            let first = self.remove_first(place)?;
            let flow = &mut self.table[place];
            let waited = now.since(first.since);
            if waited <= MARK_AFTER {
                (flow.marks_from, flow.late_since) = (None, None);
            } else if waited > DROP_AFTER {
                let late_since = *flow.late_since.get_or_insert(now);
                if now.since(late_since) >= PATIENCE && !flow.items.is_empty() {
                    self.dropped += 1;
                    continue;
                }
            }
            let (bytes, lane) = (first.bytes, flow.lane);
            let begins = if flow.bytes < PILE_BYTES { now } else { now + STANDING };
            let marked = waited > MARK_AFTER && now >= *flow.marks_from.get_or_insert(begins);
            return Some(Popped { item: first.item, bytes, lane, marked, waited });
        }
    }

    fn remove_first(&mut self, place: usize) -> Option<Waiting<T>> {
        let flow = &mut self.table[place];
        let first = flow.items.pop_front()?;
        flow.bytes -= first.bytes;
        self.bytes -= first.bytes;
        self.waiting[flow.lane] -= 1;
        if let Some(ingress) = self.ingresses.get_mut(&flow.key.ingress) {
            ingress.waiting[flow.lane] -= 1;
            ingress.bytes -= first.bytes;
        }
        Some(first)
    }

    /// Where a flow waits; a new one gets a place, at the expense of the neighbour with most
    /// flows. `None` when that is its own.
    fn place(&mut self, key: FlowKey, lane: usize) -> Option<usize> {
        if let Some(place) = self.places.get(&key) {
            return Some(*place);
        }
        if self.places.len() >= self.flows_max {
            let flows = |ingress: &Ingress| ingress.fresh.len() + ingress.old.len();
            let (name, most) = self.ingresses.iter_mut().max_by_key(|(_, i)| flows(i))?;
            let name = *name;
            if name == key.ingress {
                return None;
            }
            let victim = most.old.pop_back().or_else(|| most.fresh.pop_back())?;
            while self.remove_first(victim).is_some() {
                self.dropped += 1;
            }
            self.release(victim);
            self.tidy(name);
        }
        let place = self.free.pop().unwrap_or(self.table.len());
        if place == self.table.len() {
            let items = VecDeque::new();
            self.table.push(Flow {
                key,
                lane,
                items,
                bytes: 0,
                deficit: 0,
                marks_from: None,
                late_since: None,
            });
        }
        let flow = &mut self.table[place];
        (flow.key, flow.lane, flow.deficit) = (key, lane, QUANTUM);
        (flow.marks_from, flow.late_since) = (None, None);
        self.places.insert(key, place);
        let clock = self.clock;
        if !self.ingresses.contains_key(&key.ingress) {
            // Who was served ahead of the others is remembered until they have caught up.
            self.ingresses.retain(|_, ingress| !ingress.is_idle() || ingress.served > clock);
        }
        let ingress = self.ingresses.entry(key.ingress).or_default();
        if ingress.is_idle() {
            ingress.served = ingress.served.max(clock);
        }
        ingress.fresh.push_back(place);
        if self.grants.contains_key(&key) {
            self.reserved.push_back(place);
        }
        Some(place)
    }

    /// Forgets an empty flow.
    fn release(&mut self, place: usize) {
        self.places.remove(&self.table[place].key);
        self.reserved.retain(|reserved| *reserved != place);
        self.free.push(place);
    }

    /// Forgets the flows of a neighbour of which nothing waits any more.
    fn tidy(&mut self, name: NodeId) {
        let Some(ingress) = self.ingresses.get_mut(&name) else { return };
        if !ingress.is_idle() {
            return;
        }
        let (mut fresh, mut old) =
            (std::mem::take(&mut ingress.fresh), std::mem::take(&mut ingress.old));
        for place in fresh.drain(..).chain(old.drain(..)) {
            self.release(place);
        }
        if let Some(ingress) = self.ingresses.get_mut(&name) {
            (ingress.fresh, ingress.old) = (fresh, old);
        }
    }

    /// Drops the first datagram of the longest flow of who has most for its weight. Returns false
    /// when nothing waits.
    fn drop_longest(&mut self) -> bool {
        let waiting = self.ingresses.iter().filter(|(_, ingress)| ingress.bytes > 0);
        let share = |ingress: &Ingress| ingress.bytes as u64 * VIRTUAL_BYTE / ingress.weight();
        let longest = waiting.max_by_key(|(_, ingress)| share(ingress)).and_then(|(name, most)| {
            Some((*name, most.flows().max_by_key(|place| self.table[*place].bytes)?))
        });
        let found = match longest {
            Some((name, place)) => {
                let found = self.remove_first(place).is_some();
                self.tidy(name);
                found
            }
            None => self.control.pop_front().is_some_and(|(lane, first)| {
                self.bytes -= first.bytes;
                self.waiting[lane] -= 1;
                true
            }),
        };
        self.dropped += u64::from(found);
        found
    }
}

#[cfg(test)]
mod tests;
