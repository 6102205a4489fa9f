//! Link conditions for demonstrations: delay, jitter, loss, rate, and a slow swing of the delay,
//! applied to datagrams before they enter a lane.
//!
//! Off unless `[emulation] enabled = true`. Released by a thread of its own, because timers of the
//! runtime tick in milliseconds and would add up to one for every hop.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::link::Link;
use crate::config::{EmulatedLink, EmulationConfig};
use crate::engine::types::{NodeId, ParseError};

/// Datagrams under way in the emulator of one node; beyond, they are lost.
const WAITING_MAX: usize = 65_536;
/// Backlog of a rate-limited link beyond which datagrams are dropped.
const BACKLOG_MAX: Duration = Duration::from_millis(200);
/// Backlog beyond which datagrams are marked.
const BACKLOG_MARK: Duration = Duration::from_millis(20);

struct Waiting {
    release_at: Instant,
    order: u64,
    link: Arc<Link>,
    bytes: Vec<u8>,
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
pub struct Fate {
    /// How long it is held back.
    pub delay: Duration,
    /// Time in which it occupied the rate-limited link.
    pub busy: Duration,
    /// Whether it met a backlog.
    pub marked: bool,
}

/// The emulator of one node.
pub struct Emulator {
    state: Mutex<State>,
    waiting: SyncSender<Waiting>,
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
        let (waiting, receiver) = sync_channel(WAITING_MAX);
        std::thread::Builder::new()
            .name("emulation".into())
            .spawn(move || release(&receiver))
            .map_err(|error| error.to_string())?;
        let state = State {
            links,
            free_at: BTreeMap::new(),
            random: Pcg64Mcg::seed_from_u64(since_epoch().as_micros() as u64),
            order: 0,
        };
        Ok(Some(Arc::new(Self { state: Mutex::new(state), waiting })))
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

    /// Takes a datagram for a link. Returns false when it is lost.
    pub(super) fn submit(&self, link: &Arc<Link>, mut bytes: Vec<u8>) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(fate) = state.fate(link.neighbour(), bytes.len(), now, since_epoch()) else {
            return false;
        };
        state.order += 1;
        let order = state.order;
        drop(state);
        link.note_busy(fate.busy);
        if fate.marked {
            crate::engine::forward::Header::mark_congestion(&mut bytes);
        }
        let waiting = Waiting { release_at: now + fate.delay, order, link: link.clone(), bytes };
        match self.waiting.try_send(waiting) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        }
    }
}

impl State {
    fn fate(
        &mut self,
        neighbour: NodeId,
        bytes: usize,
        now: Instant,
        since_epoch: Duration,
    ) -> Option<Fate> {
        let Some(link) = self.links.get(&neighbour) else {
            return Some(Fate { delay: Duration::ZERO, busy: Duration::ZERO, marked: false });
        };
        if self.random.random::<f64>() < link.loss {
            return None;
        }
        let (mut backlog, mut busy) = (Duration::ZERO, Duration::ZERO);
        if link.rate > 0.0 {
            let free_at = self.free_at.entry(neighbour).or_insert(now);
            backlog = free_at.saturating_duration_since(now);
            if backlog > BACKLOG_MAX {
                return None;
            }
            busy = Duration::from_secs_f64(bytes as f64 / link.rate);
            *free_at = now + backlog + busy;
        }
        let jitter = (2.0 * self.random.random::<f64>() - 1.0) * link.jitter_ms;
        let wave = if link.wave_period_s > 0.0 {
            let turn = since_epoch.as_secs_f64() / link.wave_period_s * std::f64::consts::TAU;
            link.wave_ms * (1.0 - turn.cos()) / 2.0
        } else {
            0.0
        };
        let delay_ms = (link.delay_ms + jitter + wave).max(0.0);
        let delay = backlog + busy + Duration::from_secs_f64(delay_ms / 1e3);
        Some(Fate { delay, busy, marked: backlog > BACKLOG_MARK })
    }
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Releases datagrams in order of their time, until the emulator is gone.
fn release(receiver: &Receiver<Waiting>) {
    let mut heap: BinaryHeap<Reverse<Waiting>> = BinaryHeap::new();
    loop {
        let wait = heap.peek().map_or(Duration::from_secs(3_600), |Reverse(first)| {
            first.release_at.saturating_duration_since(Instant::now())
        });
        if wait.is_zero() {
            if let Some(Reverse(first)) = heap.pop() {
                first.link.enqueue(first.bytes);
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
            if heap.len() > WAITING_MAX {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let fate = state.fate(PEER, 100, now, Duration::from_secs(second)).unwrap();
            let ms = fate.delay.as_secs_f64() * 1e3;
            assert!((low..=high).contains(&ms), "{ms}");
        }
    }

    #[test]
    fn a_rate_makes_a_queue_that_marks_and_then_drops() {
        let mut state = state(EmulatedLink { rate: 100_000.0, ..EmulatedLink::default() });
        let now = Instant::now();
        let fates: Vec<Option<Fate>> =
            (0..40).map(|_| state.fate(PEER, 1_000, now, Duration::ZERO)).collect();
        assert_eq!(fates[0].unwrap().delay, Duration::from_millis(10));
        assert!(!fates[2].unwrap().marked && fates[3].unwrap().marked);
        assert_eq!(fates.iter().filter(|fate| fate.is_none()).count(), 19);
    }

    #[test]
    fn loss_has_its_share() {
        let mut state = state(EmulatedLink { loss: 0.25, ..EmulatedLink::default() });
        let now = Instant::now();
        let lost =
            (0..10_000).filter(|_| state.fate(PEER, 1, now, Duration::ZERO).is_none()).count();
        assert!((2_300..2_700).contains(&lost), "{lost}");
    }
}
