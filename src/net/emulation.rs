//! Link conditions for demonstrations: delay, jitter, loss, rate, and a slow swing of the delay,
//! applied to datagrams between a link's queue and its lanes. Also what a relay may do that is not
//! honest: it loses or damages tunnels' packets and lets all else pass.
//!
//! The emulator takes from the queue at the link's rate, so that what is too much waits there, as
//! in front of a real link; it has no queue of its own. A link without conditions bypasses it.
//!
//! Off unless `[emulation] enabled = true`. Released by a thread of its own, because timers of the
//! runtime tick in milliseconds and would add up to one for every hop.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::atomic::{AtomicUsize, Ordering as Atomic};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::link::{Link, Queues};
use crate::config::{EmulatedLink, EmulationConfig};
use crate::engine::forward::{DatagramKind, HeaderView};
use crate::engine::types::{NodeId, ParseError};

/// Datagrams under way in the emulator of one node; beyond, they are lost.
const WAITING_MAX: usize = 65_536;
/// How far ahead of its rate a link takes from its queue, so that a late timer costs no throughput.
const AHEAD: Duration = Duration::from_millis(2);

/// How much of its time a link makes up for when its timer was later than that.
const CATCH_UP: Duration = Duration::from_millis(50);

struct Waiting {
    release_at: Instant,
    order: u64,
    link: Arc<Link>,
    /// A datagram that arrives on a lane; without one, the link may take more.
    datagram: Option<(usize, Vec<u8>)>,
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        (self.release_at, self.order) == (other.release_at, other.order)
    }
}

impl Eq for Waiting {}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.release_at, self.order).cmp(&(other.release_at, other.order))
    }
}

struct State {
    links: BTreeMap<NodeId, EmulatedLink>,
    free_at: BTreeMap<NodeId, Instant>,
    random: Pcg64Mcg,
    order: u64,
}

/// What becomes of a datagram.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Fate {
    /// How long until it is at the other end; `None` when it is lost.
    delay: Option<Duration>,
    /// Time in which it occupies the rate-limited link.
    busy: Duration,
}

/// Whether a link takes a datagram now.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Gate {
    /// It has no conditions.
    Bypassed,
    Open,
    /// It will at this time.
    Closed(Instant),
}

/// The emulator of one node.
pub struct Emulator {
    state: Mutex<State>,
    waiting: Sender<Waiting>,
    /// How many are under way.
    count: Arc<AtomicUsize>,
}

impl Emulator {
    /// Starts the emulator, when it is enabled.
    ///
    /// # Errors
    /// One line, when a neighbour is not a node id or the thread cannot start.
    pub fn start(config: &EmulationConfig) -> Result<Option<Arc<Self>>, String> {
        if !config.enabled {
            return Ok(None);
        }
        let mut links = BTreeMap::new();
        for link in &config.links {
            links.insert(
                link.neighbour.parse().map_err(|e| format!("emulation: {e}"))?,
                link.clone(),
            );
        }
        let (waiting, receiver) = channel();
        let count = Arc::new(AtomicUsize::new(0));
        let released = count.clone();
        std::thread::Builder::new()
            .name("emulation".into())
            .spawn(move || release(&receiver, &released))
            .map_err(|error| error.to_string())?;
        let state = State {
            links,
            free_at: BTreeMap::new(),
            random: Pcg64Mcg::seed_from_u64(since_epoch().as_micros() as u64),
            order: 0,
        };
        Ok(Some(Arc::new(Self { state: Mutex::new(state), waiting, count })))
    }

    /// The neighbours that links may exist to, when `config` emulates.
    ///
    /// # Errors
    /// One line, when one is not a node id.
    pub fn neighbours(config: &EmulationConfig) -> Result<Option<BTreeSet<NodeId>>, String> {
        if !config.enabled {
            return Ok(None);
        }
        let parse = |link: &EmulatedLink| link.neighbour.parse();
        let neighbours: Result<_, ParseError> = config.links.iter().map(parse).collect();
        neighbours.map(Some).map_err(|error| format!("emulation: {error}"))
    }

    /// Changes the conditions towards one neighbour.
    pub fn set(&self, neighbour: NodeId, link: EmulatedLink) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.links.insert(neighbour, link);
    }

    /// Takes from a link's queue what its conditions let go now, and comes back when they will
    /// let go more.
    pub(super) fn take_from(&self, link: &Arc<Link>, queues: &mut Queues) {
        let (now, queue_now, epoch) = (Instant::now(), link.now(), since_epoch());
        // Something waited for the timer: the link was busy all the time, however late it is.
        let busy_since =
            if queues.will_wake { now.checked_sub(CATCH_UP).unwrap_or(now) } else { now };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let gate = state.gate(link.neighbour(), now);
            queues.is_emulated = gate != Gate::Bypassed;
            match gate {
                Gate::Bypassed => return,
                Gate::Closed(until) => {
                    if queues.is_waiting() && !queues.will_wake {
                        queues.will_wake = self.schedule(&mut state, until, link, None);
                    }
                    return;
                }
                Gate::Open => {}
            }
            let Some((lane, mut bytes)) = queues.pop_emulated(queue_now) else { return };
            let fate = state.fate(link.neighbour(), bytes.len(), now, busy_since, epoch);
            link.note_busy(fate.busy);
            if let Some(delay) = fate.delay
                && state.passes(link.neighbour(), &mut bytes)
            {
                self.schedule(&mut state, now + delay, link, Some((lane, bytes)));
            }
        }
    }

    /// Returns false when as much as possible is under way.
    fn schedule(
        &self,
        state: &mut State,
        release_at: Instant,
        link: &Arc<Link>,
        datagram: Option<(usize, Vec<u8>)>,
    ) -> bool {
        state.order += 1;
        let waiting = Waiting { release_at, order: state.order, link: link.clone(), datagram };
        let enter = |count| (count < WAITING_MAX).then_some(count + 1);
        self.count.fetch_update(Atomic::Relaxed, Atomic::Relaxed, enter).is_ok()
            && self.waiting.send(waiting).is_ok()
    }
}

impl State {
    fn gate(&self, neighbour: NodeId, now: Instant) -> Gate {
        let Some(link) = self.links.get(&neighbour) else { return Gate::Bypassed };
        let conditions = [
            link.delay_ms,
            link.jitter_ms,
            link.loss,
            link.data_loss,
            link.data_damage,
            link.rate,
            link.wave_ms,
        ];
        if conditions.iter().all(|value| *value == 0.0) {
            return Gate::Bypassed;
        }
        let free_at = self.free_at.get(&neighbour).filter(|_| link.rate > 0.0);
        match free_at {
            Some(free_at) if *free_at > now + AHEAD => Gate::Closed(*free_at - AHEAD / 2),
            _ => Gate::Open,
        }
    }

    /// Damages a packet of a tunnel, or not. Returns false when it is lost.
    fn passes(&mut self, neighbour: NodeId, datagram: &mut [u8]) -> bool {
        let Some(link) = self.links.get(&neighbour) else { return true };
        let (loss, damage) = (link.data_loss, link.data_damage);
        if loss + damage == 0.0 || !is_packet(datagram) {
            return true;
        }
        if self.random.random::<f64>() < damage
            && let Some(last) = datagram.last_mut()
        {
            *last ^= 1;
        }
        self.random.random::<f64>() >= loss
    }

    fn fate(
        &mut self,
        neighbour: NodeId,
        bytes: usize,
        now: Instant,
        busy_since: Instant,
        since_epoch: Duration,
    ) -> Fate {
        let Some(link) = self.links.get(&neighbour) else {
            return Fate { delay: Some(Duration::ZERO), busy: Duration::ZERO };
        };
        let (mut until_sent, mut busy) = (Duration::ZERO, Duration::ZERO);
        if link.rate > 0.0 {
            busy = Duration::from_secs_f64(bytes as f64 / link.rate);
            let free_at = self.free_at.entry(neighbour).or_insert(now);
            *free_at = (*free_at).max(busy_since) + busy;
            until_sent = free_at.saturating_duration_since(now);
        }
        if self.random.random::<f64>() < link.loss {
            return Fate { delay: None, busy };
        }
        let jitter = (2.0 * self.random.random::<f64>() - 1.0) * link.jitter_ms;
        let wave = if link.wave_period_s > 0.0 {
            let turn = since_epoch.as_secs_f64() / link.wave_period_s * std::f64::consts::TAU;
            link.wave_ms * (1.0 - turn.cos()) / 2.0
        } else {
            0.0
        };
        let delay_ms = (link.delay_ms + jitter + wave).max(0.0);
        Fate { delay: Some(until_sent + Duration::from_secs_f64(delay_ms / 1e3)), busy }
    }
}

fn is_packet(datagram: &[u8]) -> bool {
    HeaderView::parse(datagram).is_ok_and(|view| view.kind() == DatagramKind::Data)
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Hands on datagrams in order of their time, until the emulator is gone.
fn release(receiver: &Receiver<Waiting>, count: &AtomicUsize) {
    let mut heap: BinaryHeap<Reverse<Waiting>> = BinaryHeap::new();
    loop {
        let wait = heap.peek().map_or(Duration::from_secs(3_600), |Reverse(first)| {
            first.release_at.saturating_duration_since(Instant::now())
        });
        if wait.is_zero() {
            if let Some(Reverse(first)) = heap.pop() {
                count.fetch_sub(1, Atomic::Relaxed);
                match first.datagram {
                    Some((lane, bytes)) => first.link.arrived(lane, bytes),
                    None => first.link.wake(),
                }
            }
            continue;
        }
        match receiver.recv_timeout(wait) {
            Ok(waiting) => heap.push(Reverse(waiting)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        while let Ok(waiting) = receiver.try_recv() {
            heap.push(Reverse(waiting));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::forward::Header;
    use crate::engine::types::{Route, TunnelId};

    const PEER: NodeId = NodeId([1; 8]);

    fn state(link: EmulatedLink) -> State {
        State {
            links: BTreeMap::from([(PEER, link)]),
            free_at: BTreeMap::new(),
            random: Pcg64Mcg::seed_from_u64(1),
            order: 0,
        }
    }

    #[test]
    fn delay_jitter_and_wave_add_up() {
        let link = EmulatedLink {
            delay_ms: 10.0,
            jitter_ms: 2.0,
            wave_ms: 20.0,
            wave_period_s: 8.0,
            ..EmulatedLink::default()
        };
        let mut state = state(link);
        let now = Instant::now();
        for (second, low, high) in [(0, 8.0, 12.0), (4, 28.0, 32.0), (8, 8.0, 12.0)] {
            let fate = state.fate(PEER, 100, now, now, Duration::from_secs(second));
            let ms = fate.delay.unwrap().as_secs_f64() * 1e3;
            assert!((low..=high).contains(&ms), "{ms}");
        }
    }

    #[test]
    fn a_rate_closes_the_gate_until_the_link_is_nearly_free() {
        let mut state = state(EmulatedLink { rate: 100_000.0, ..EmulatedLink::default() });
        let now = Instant::now();
        let ms = Duration::from_millis;
        assert_eq!(state.gate(PEER, now), Gate::Open);
        let fate = state.fate(PEER, 1_000, now, now, Duration::ZERO);
        assert_eq!(fate, Fate { delay: Some(ms(10)), busy: ms(10) });
        assert_eq!(state.gate(PEER, now), Gate::Closed(now + ms(9)));
        assert_eq!(state.gate(PEER, now + ms(9)), Gate::Open);
        let fate = state.fate(PEER, 1_000, now + ms(9), now + ms(9), Duration::ZERO);
        assert_eq!(fate.delay, Some(ms(11)), "no time of the link is lost");
        let fate = state.fate(PEER, 1_000, now + ms(50), now + ms(50), Duration::ZERO);
        assert_eq!(fate.delay, Some(ms(10)), "an idle link saves nothing up");
        let late = now + ms(70);
        let fate = state.fate(PEER, 1_000, late, late - CATCH_UP, Duration::ZERO);
        assert_eq!(fate.delay, Some(ms(0)), "a late timer costs a busy link nothing");
    }

    #[test]
    fn a_link_without_conditions_bypasses_the_emulator() {
        let now = Instant::now();
        assert_eq!(state(EmulatedLink::default()).gate(PEER, now), Gate::Bypassed);
        assert_eq!(state(EmulatedLink::default()).gate(NodeId([2; 8]), now), Gate::Bypassed);
        let lossy = EmulatedLink { loss: 0.1, ..EmulatedLink::default() };
        assert_eq!(state(lossy).gate(PEER, now), Gate::Open);
    }

    #[test]
    fn a_dishonest_relay_harms_packets_and_nothing_else() {
        let datagram = |kind| {
            let route = Route::new([NodeId([0; 8]), PEER]).unwrap();
            Header::new(kind, TunnelId(1), 1, 1, route).encode(b"payload")
        };
        for (loss, damage) in [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)] {
            let link = EmulatedLink { data_loss: loss, data_damage: damage, ..Default::default() };
            let mut state = state(link);
            for kind in [DatagramKind::Data, DatagramKind::Beat, DatagramKind::Receipt] {
                let mut bytes = datagram(kind);
                let is_data = kind == DatagramKind::Data;
                assert_eq!(state.passes(PEER, &mut bytes), !(is_data && loss > 0.0));
                assert_eq!(bytes != datagram(kind), is_data && damage > 0.0);
            }
        }
    }

    #[test]
    fn loss_has_its_share() {
        let mut state = state(EmulatedLink { loss: 0.25, ..EmulatedLink::default() });
        let now = Instant::now();
        let lost = (0..10_000)
            .filter(|_| state.fate(PEER, 1, now, now, Duration::ZERO).delay.is_none())
            .count();
        assert!((2_300..2_700).contains(&lost), "{lost}");
    }
}
