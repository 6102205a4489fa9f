//! Store: everything that was observed and decided, in one SQLite file. Only this module knows
//! rusqlite.
//!
//! | Table | One row is |
//! |---|---|
//! | `probe` | a link or route probe, answered (`rtt_us`) or lost (NULL) |
//! | `link_state` | what an accepted advertisement says of one link; NULL quality: withdrawn |
//! | `slice` | what the data plane counted on one link in one slice |
//! | `route_slice` | what the traffic of a tunnel met on its route, by the far end's receipts |
//! | `service_probe` | a check of a service, answered (`response_us`) or failed (`failure`) |
//! | `event` | a join, registration or look-up with its duration |
//! | `choice` | a choice of which it is known what each route would have cost |
//! | `decision` | a choice of route, with reason, model version and propensity |
//! | `candidate` | one route weighed in a decision: features, forecasts, scores |
//! | `peer` | a peer that was connected: its key, where it listens, when it was seen last |
//!
//! The views `route_quality`, `forecast` and `service_health` are for people with a `sqlite3` prompt. Routes are
//! text `id>id>id`, units stand last in the column names, times are µs since the Unix epoch.
//!
//! Durability: write-ahead log with `synchronous=NORMAL`. One [`Writer`] thread owns the
//! connection and commits at latest every [`COMMIT_INTERVAL`]; a killed process loses at most
//! what was not committed, and the file is never torn. Writing never blocks the caller: when the
//! queue is full, rows are dropped and counted. A [`Reader`] sees committed rows, in this or
//! another process.
//!
//! A file that is damaged, of another program or of a newer version is refused by name, and
//! nothing in it is touched.

mod choices;
mod decisions;
mod outcome;
mod peers;
mod reader;
mod retention;
mod rows;
mod schema;
mod service_probes;
mod writer;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::Connection;

pub use decisions::FEATURES_APART;
pub use outcome::OutcomeRow;
pub use peers::PEERS_KEPT_MAX;
pub use reader::{
    CandidatePredictionRow, CandidateRow, Counts, DecisionRow, LinkStateRow, ProbeRow, Reader,
    RouteSliceRow, TableCount,
};
pub use retention::Retention;
pub use schema::{APPLICATION_ID, SCHEMA_VERSION};
pub use service_probes::ServiceProbeRow;
pub use writer::{BATCH_ROWS_MAX, COMMIT_INTERVAL, FLUSH_WAIT_MAX, QUEUE_MAX, Writer};

/// How long a statement waits for another process's lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// The log file is cut back to this after a checkpoint (bytes), so that one large transaction
/// does not occupy the disk for ever.
const LOG_BYTES_MAX: i64 = 16 << 20;

/// What to do about a file that refused an operation, which is named by what was done: one that was read
/// needs no free space.
pub(crate) fn what_to_do(doing: &str) -> &'static str {
    match doing.starts_with("read") || doing.starts_with("open") {
        true => "see that this user may read it",
        false => "check permissions and free space",
    }
}

/// A store that cannot be used. Nothing was changed in the file.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be made, because its folder is missing.
    #[error("cannot make the store '{0}': its folder does not exist; create it or choose another")]
    NoFolder(PathBuf),
    /// Nothing to read yet.
    #[error("there is no store at '{0}' yet; start the node once, or name another file")]
    Missing(PathBuf),
    /// Truncated, overwritten, or not SQLite at all.
    #[error(
        "the store '{path}' is damaged or no database ({why}); move it away together with its -wal \
         and -shm files, and a new one is made"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What SQLite says.
        why: String,
    },
    /// A sound database, of somebody else.
    #[error(
        "'{path}' is a database of another program (application id {found:#010x}); name another \
         file for the store"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its application id.
        found: i32,
    },
    /// Written by a newer meshwise.
    #[error(
        "the store '{path}' has schema version {found}, this program knows {SCHEMA_VERSION}; \
         upgrade meshwise or move the file away"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// A reader met an older file, which only a writer may bring up to date.
    #[error(
        "the store '{path}' has the older schema version {found}; start the node once, which brings \
         it up to date"
    )]
    Older {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// SQLite refused an operation: permissions, locks, space.
    #[error("cannot {doing} the store '{path}': {source}; {}", what_to_do(.doing))]
    Sqlite {
        /// What was attempted.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What SQLite says.
        source: rusqlite::Error,
    },
    /// The writer thread could not be started.
    #[error("cannot start the writer of the store '{path}': {source}; close other programs")]
    Thread {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Rows could not be committed now; they are kept and tried again.
    #[error("the store '{path}' does not take rows ({why}); free disk space, it goes on by itself")]
    NotWritten {
        /// The file.
        path: PathBuf,
        /// The last error.
        why: String,
    },
}

/// An open, checked store of the current schema version, ready for writing.
pub struct Store {
    connection: Connection,
    path: PathBuf,
}

impl Store {
    /// Opens the store and brings it up to date; makes one where there is none.
    ///
    /// # Errors
    /// [`StoreError`], with the file as it was.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref();
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        if folder.is_some_and(|folder| !folder.is_dir()) {
            return Err(StoreError::NoFolder(path.to_owned()));
        }
        let found = schema::inspect(path, schema::Check::Pages)?;
        let wrong = |doing| move |source| schema::error(path, doing, source);
        let mut connection = Connection::open(path).map_err(wrong("open"))?;
        Self::configure(&connection).map_err(wrong("configure"))?;
        schema::migrate(&mut connection, found.unwrap_or(0)).map_err(wrong("migrate"))?;
        Ok(Self { connection, path: path.to_owned() })
    }

    fn configure(connection: &Connection) -> rusqlite::Result<()> {
        connection.busy_timeout(BUSY_TIMEOUT)?;
        // Before the first table, or it has no effect: lets retention give pages back.
        connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.pragma_update(None, "foreign_keys", "ON")?;
        connection.pragma_update(None, "journal_size_limit", LOG_BYTES_MAX)?;
        connection.set_prepared_statement_cache_capacity(32);
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Deletes what exceeds the retention and returns the number of rows deleted (those of
    /// `candidate` not counted).
    ///
    /// # Errors
    /// [`StoreError::Sqlite`]; what was deleted until then stays deleted.
    pub fn prune(&mut self, retention: &Retention) -> Result<u64, StoreError> {
        let mut deleted = 0;
        loop {
            match retention::step(&mut self.connection, retention) {
                Ok(0) => return Ok(deleted),
                Ok(rows) => deleted += rows,
                Err(source) => return Err(schema::error(&self.path, "prune", source)),
            }
        }
    }
}
