//! The writer: one thread owns the connection, a bounded queue feeds it.
//!
//! The rule:
//! - [`Writer::write`] and [`Writer::decision`] never wait. A full queue drops the row and counts
//!   it.
//! - A batch is committed [`COMMIT_INTERVAL`] after its first row, or when it holds
//!   [`BATCH_ROWS_MAX`].
//! - A batch that cannot be committed (full disk, lock) is kept and tried again at the same
//!   interval; meanwhile the queue fills. A row that the schema refuses is skipped. Both are
//!   counted and the last error is kept as text.
//! - Retention runs every [`RETENTION_INTERVAL`], one chunk between two batches.
//! - Dropping the writer commits what it holds and ends the thread.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel,
};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::rows::{self, Row};
use super::{Retention, Store, StoreError, retention};
use crate::engine::measure::Sample;
use crate::engine::overlay::KnownPeer;
use crate::engine::predict::KnownChoice;
use crate::engine::route::Decision;

/// Rows that wait at most; further ones are dropped. A guess: a minute of the busiest node.
pub const QUEUE_MAX: usize = 65_536;
/// Rows committed at once at most.
pub const BATCH_ROWS_MAX: usize = 10_000;
/// A row is committed at latest this long after the writer took it.
pub const COMMIT_INTERVAL: Duration = Duration::from_millis(200);
/// A flush gives up after this.
pub const FLUSH_WAIT_MAX: Duration = Duration::from_secs(30);
/// Time between two applications of the retention.
const RETENTION_INTERVAL: Duration = Duration::from_secs(600);
/// Pause of a flush that waits for room in the queue.
const FLUSH_PAUSE: Duration = Duration::from_millis(2);

enum Message {
    Row(Row),
    /// Commit everything before this and say how it went.
    Flush(SyncSender<Result<(), String>>),
}

#[derive(Default)]
struct Shared {
    /// Messages in the queue. `sync_channel` would bound it too, but has all its places from the
    /// start: a queue that is nearly empty takes one after the other, and with that ever more memory.
    waiting: AtomicUsize,
    dropped: AtomicU64,
    errors: AtomicU64,
    last_error: Mutex<Option<String>>,
    closing: AtomicBool,
}

impl Shared {
    /// Takes a place in the queue, if there is one.
    fn enter(&self) -> bool {
        let enter = |waiting| (waiting < QUEUE_MAX).then_some(waiting + 1);
        self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter).is_ok()
    }

    fn failed(&self, count: u64, error: &rusqlite::Error) {
        self.errors.fetch_add(count, Ordering::Relaxed);
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }
}

/// Takes rows for the store. Share it in an `Arc`; it may be used from every thread.
pub struct Writer {
    path: PathBuf,
    /// `None` only while it is being dropped.
    queue: Option<Sender<Message>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl Writer {
    /// Opens the store and starts its thread.
    ///
    /// # Errors
    /// As [`Store::open`], and [`StoreError::Thread`].
    pub fn start(path: impl AsRef<Path>, retention: Retention) -> Result<Self, StoreError> {
        let store = Store::open(path)?;
        let path = store.path().to_owned();
        let (queue, receiver) = channel();
        let shared = Arc::new(Shared::default());
        let worker = Worker {
            store,
            batch: Vec::new(),
            commit_at: Instant::now(),
            retention,
            retain_at: Instant::now(),
            shared: shared.clone(),
        };
        let thread = thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || worker.run(&receiver))
            .map_err(|source| StoreError::Thread { path: path.clone(), source })?;
        Ok(Self { path, queue: Some(queue), thread: Some(thread), shared })
    }

    /// Hands over an observation. Never waits; dropped and counted when the queue is full.
    pub fn write(&self, sample: Sample) {
        self.send(Row::Sample(sample));
    }

    /// Hands over a decision and how long it took to make (µs). Never waits; dropped and counted
    /// when the queue is full.
    pub fn decision(&self, decision: Decision, calculation_us: u64) {
        self.send(Row::Decision(Box::new(decision), calculation_us));
    }

    /// Hands over a choice that became known. Never waits; dropped and counted when the queue is full.
    pub fn choice(&self, choice: KnownChoice) {
        self.send(Row::Choice(Box::new(choice)));
    }

    /// Hands over who is connected. Never waits; dropped and counted when the queue is full.
    pub fn peers(&self, peers: Vec<KnownPeer>) {
        self.send(Row::Peers(peers));
    }

    /// Waits until every row handed over before is committed, at most [`FLUSH_WAIT_MAX`].
    ///
    /// # Errors
    /// [`StoreError::NotWritten`] when the store does not take the rows now; they are kept and
    /// tried again.
    pub fn flush(&self) -> Result<(), StoreError> {
        let not_written = |why: Option<String>| StoreError::NotWritten {
            path: self.path.clone(),
            why: why.or_else(|| self.last_error()).unwrap_or_else(|| "its writer is busy".into()),
        };
        let (reply, answer) = sync_channel(1);
        let until = Instant::now() + FLUSH_WAIT_MAX;
        while !self.shared.enter() {
            if Instant::now() >= until {
                return Err(not_written(None));
            }
            thread::sleep(FLUSH_PAUSE);
        }
        let asked = self.queue.as_ref().is_some_and(|q| q.send(Message::Flush(reply)).is_ok());
        if !asked {
            return Err(not_written(None));
        }
        match answer.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(result) => result.map_err(|why| not_written(Some(why))),
            Err(_) => Err(not_written(None)),
        }
    }

    /// Rows that were handed over and will never be in the store.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Attempts to write that failed.
    pub fn errors(&self) -> u64 {
        self.shared.errors.load(Ordering::Relaxed)
    }

    /// The last error, as text.
    pub fn last_error(&self) -> Option<String> {
        self.shared.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn send(&self, row: Row) {
        let send = |queue: &Sender<Message>| queue.send(Message::Row(row)).is_ok();
        if !self.shared.enter() || !self.queue.as_ref().is_some_and(send) {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by its own hook; there is nothing to add.
            drop(thread.join());
        }
    }
}

struct Worker {
    store: Store,
    batch: Vec<Row>,
    /// When the batch is due; meaningless while it is empty.
    commit_at: Instant,
    retention: Retention,
    retain_at: Instant,
    shared: Arc<Shared>,
}

impl Worker {
    fn run(mut self, queue: &Receiver<Message>) {
        loop {
            match self.next(queue) {
                Ok(Message::Row(row)) => {
                    if self.batch.is_empty() {
                        self.commit_at = Instant::now() + COMMIT_INTERVAL;
                    }
                    self.batch.push(row);
                    if self.batch.len() == BATCH_ROWS_MAX {
                        self.commit_at = Instant::now();
                    }
                }
                Ok(Message::Flush(reply)) => {
                    let result = self.commit().map_err(|error| error.to_string());
                    // Nobody may be waiting any more.
                    drop(reply.try_send(result));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    if self.commit().is_err() {
                        self.give_up(queue);
                    }
                    return;
                }
            }
            if !self.batch.is_empty() && Instant::now() >= self.commit_at {
                let failed = self.commit().is_err();
                if failed && self.shared.closing.load(Ordering::Relaxed) {
                    return self.give_up(queue);
                }
            }
            if Instant::now() >= self.retain_at {
                self.retain();
            }
        }
    }

    /// The next message; a time-out when something else is due.
    fn next(&self, queue: &Receiver<Message>) -> Result<Message, RecvTimeoutError> {
        let due = match self.batch.is_empty() {
            true => self.retain_at,
            false => self.retain_at.min(self.commit_at),
        };
        let wait = due.saturating_duration_since(Instant::now());
        if self.batch.len() >= BATCH_ROWS_MAX {
            // It could not be committed: the rest waits in the queue, which is bounded.
            thread::sleep(wait.min(COMMIT_INTERVAL));
            return Err(RecvTimeoutError::Timeout);
        }
        let message = match queue.try_recv() {
            Ok(message) => message,
            Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            Err(TryRecvError::Empty) => queue.recv_timeout(wait)?,
        };
        self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        Ok(message)
    }

    fn commit(&mut self) -> rusqlite::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        match rows::insert(&mut self.store.connection, &self.batch) {
            Ok(refused) => {
                self.batch.clear();
                for error in &refused {
                    self.shared.failed(1, error);
                }
                self.shared.dropped.fetch_add(refused.len() as u64, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => {
                self.shared.failed(1, &error);
                self.commit_at = Instant::now() + COMMIT_INTERVAL;
                Err(error)
            }
        }
    }

    /// The process ends and the store takes nothing: counts what is lost.
    fn give_up(&self, queue: &Receiver<Message>) {
        let waiting = queue.try_iter().filter(|m| matches!(m, Message::Row(_))).count();
        self.shared.dropped.fetch_add((self.batch.len() + waiting) as u64, Ordering::Relaxed);
    }

    fn retain(&mut self) {
        match retention::step(&mut self.store.connection, &self.retention) {
            // More may exceed it: go on after the next look at the queue.
            Ok(1..) => {}
            Ok(0) => self.retain_at = Instant::now() + RETENTION_INTERVAL,
            Err(error) => {
                self.shared.failed(1, &error);
                self.retain_at = Instant::now() + RETENTION_INTERVAL;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::{EventKind, LinkQuality, LinkReport, ProbeKind, RouteReport};
    use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};
    use crate::store::{Reader, RouteSliceRow};

    fn probe(at_us: u64) -> Sample {
        Sample::Probe {
            kind: ProbeKind::Route,
            route: Route::new([NodeId([1; 8]), NodeId([2; 8])]).unwrap(),
            sent_at: Timestamp(at_us),
            done_at: Timestamp(at_us + 10),
            rtt_us: (!at_us.is_multiple_of(7)).then_some(9),
        }
    }

    fn now_us() -> u64 {
        std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64
    }

    #[test]
    fn rows_survive_the_writer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let writer = Writer::start(&path, Retention::default()).unwrap();
        let now = now_us();
        for index in 0..100 {
            writer.write(probe(now + index));
        }
        let node = NodeId([3; 8]);
        let quality = LinkQuality {
            rtt_ms: 1.5,
            jitter_ms: 0.5,
            loss: 0.25,
            bandwidth: None,
            utilisation: 1.0,
        };
        for quality in [Some(quality), None] {
            let at = Timestamp(now);
            writer.write(Sample::LinkState { at, origin: node, neighbour: node, quality });
        }
        let report = LinkReport { sent_bytes: 5, ..LinkReport::default() };
        writer.write(Sample::Slice { at: Timestamp(now), neighbour: node, report });
        let route = Route::new([NodeId([1; 8]), NodeId([2; 8])]).unwrap();
        for (tunnel, rtt_us) in [(TunnelId(4), Some(7)), (TunnelId(5), None)] {
            let report = RouteReport {
                route: route.clone(),
                route_id: u32::MAX,
                sent: 10,
                received: 9,
                bytes: 8,
                marked: 6,
                rtt_us,
                back_sent: 5,
                back_received: 3,
                back_marked: 0,
                duration_us: 2,
            };
            writer.write(Sample::RouteSlice { at: Timestamp(now + 1), tunnel, report });
        }
        writer.write(Sample::Event {
            kind: EventKind::Lookup,
            subject: "byronwade.local".into(),
            started_at: Timestamp(now),
            done_at: Timestamp(now + 1),
            succeeded: false,
        });
        writer.flush().unwrap();
        let reader = Reader::open(&path).unwrap();
        let probes = reader.probes(ProbeKind::Route, 0).unwrap();
        assert_eq!(probes.len(), 100);
        assert!(probes.iter().any(|row| row.rtt_us.is_none()));
        assert_eq!(reader.probes(ProbeKind::Route, now + 90).unwrap().len(), 10);
        assert!(reader.probes(ProbeKind::Link, 0).unwrap().is_empty());
        let states = reader.link_states(0).unwrap();
        assert_eq!(states[0].quality, Some(quality));
        assert_eq!((states.len(), states[1].quality), (2, None));
        let rows: Vec<u64> = reader.counts().unwrap().tables.iter().map(|t| t.rows).collect();
        assert_eq!(rows, [100, 2, 1, 2, 0, 1, 0, 0, 0]);
        let expected = RouteSliceRow {
            at_us: now + 1,
            tunnel: 4,
            route: route.to_string(),
            route_id: u32::MAX,
            sent_datagrams: 10,
            received_datagrams: 9,
            sent_bytes: 8,
            marked_datagrams: 6,
            rtt_us: Some(7),
            back_sent: 5,
            back_received: 3,
            duration_us: 2,
        };
        let slices = reader.route_slices(now + 1).unwrap();
        assert_eq!(slices[1], RouteSliceRow { tunnel: 5, rtt_us: None, ..expected.clone() });
        assert_eq!((slices.len(), &slices[0]), (2, &expected));
        assert!(reader.route_slices(now + 2).unwrap().is_empty());
        drop(writer);
        assert_eq!(reader.probes(ProbeKind::Route, 0).unwrap(), probes);
    }

    #[test]
    fn a_killed_process_loses_only_the_last_batch() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let writer = Writer::start(&path, Retention::default()).unwrap();
        let now = now_us();
        for index in 0..500 {
            writer.write(probe(now + index));
        }
        thread::sleep(COMMIT_INTERVAL + Duration::from_millis(300));
        writer.write(probe(now + 500));
        // What a kill leaves behind: the file and its log, as they are now.
        let copy = folder.path().join("copy.db");
        for end in ["", "-wal"] {
            std::fs::copy(format!("{}{end}", path.display()), format!("{}{end}", copy.display()))
                .unwrap();
        }
        let after = Store::open(&copy).expect("sound");
        drop(after);
        let rows = Reader::open(&copy).unwrap().probes(ProbeKind::Route, 0).unwrap();
        assert!((500..=501).contains(&rows.len()), "{}", rows.len());
    }

    #[test]
    fn a_full_queue_drops_and_counts_and_never_waits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let writer = Writer::start(&path, Retention::default()).unwrap();
        // Another process holds the lock: nothing can be committed.
        let other = rusqlite::Connection::open(&path).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let now = now_us();
        let extra = 1_000;
        let count = (QUEUE_MAX + BATCH_ROWS_MAX + extra) as u64;
        for index in 0..count {
            writer.write(probe(now + index));
        }
        let dropped = writer.dropped();
        assert!(dropped >= extra as u64, "{dropped}");
        other.execute_batch("ROLLBACK").unwrap();
        writer.flush().unwrap();
        let counts = Reader::open(&path).unwrap().counts().unwrap();
        assert_eq!(counts.tables[0].rows, count - dropped);
        assert_eq!(writer.dropped(), dropped);
    }

    #[test]
    fn a_full_disk_keeps_the_batch_and_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("store.db")).unwrap();
        store.connection.pragma_update(None, "max_page_count", 1).unwrap();
        let shared = Arc::new(Shared::default());
        let (now, path) = (Instant::now(), store.path().to_owned());
        let mut worker = Worker {
            batch: (0..2_000).map(|index| Row::Sample(probe(index))).collect(),
            commit_at: now,
            retention: Retention::default(),
            retain_at: now,
            shared: shared.clone(),
            store,
        };
        assert!(worker.commit().is_err());
        assert_eq!(worker.batch.len(), 2_000);
        assert!(shared.last_error.lock().unwrap().as_ref().unwrap().contains("full"));
        worker.store.connection.pragma_update(None, "max_page_count", 1_000_000).unwrap();
        worker.commit().unwrap();
        let counts = Reader::open(path).unwrap().counts().unwrap();
        assert_eq!(counts.tables[0].rows, 2_000);
    }

    #[test]
    fn a_row_that_the_schema_refuses_does_not_hold_up_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let writer = Writer::start(folder.path().join("a.db"), Retention::default()).unwrap();
        let now = now_us();
        let Sample::Probe { kind, route, .. } = probe(now) else { unreachable!() };
        let (sent_at, done_at) = (Timestamp(now), Timestamp(now - 1));
        writer.write(Sample::Probe { kind, route, sent_at, done_at, rtt_us: None });
        writer.write(probe(now));
        writer.flush().unwrap();
        assert_eq!((writer.errors(), writer.dropped()), (1, 1));
        assert!(writer.last_error().unwrap().contains("CHECK"));
        let counts = Reader::open(writer.path()).unwrap().counts().unwrap();
        assert_eq!(counts.tables[0].rows, 1);
    }
}
