//! Tables, migrations by `user_version`, and the look at a file before it is touched.
//!
//! A migration is one entry of [`MIGRATIONS`]; entry `n` brings version `n` to `n + 1`, in one
//! transaction. Entries are never edited once released.

use std::fs;
use std::io::Read;
use std::path::Path;

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

use super::StoreError;

/// Marks the file as ours in its header: "mesw" in ASCII.
pub const APPLICATION_ID: i32 = 0x6d65_7377;
/// Version of the tables that this program writes.
pub const SCHEMA_VERSION: i64 = MIGRATIONS.len() as i64;
/// First bytes of every SQLite database (file format, section 1.3).
const MAGIC: &[u8; 16] = b"SQLite format 3\0";

const MIGRATIONS: [&str; 8] =
    [TABLES_1, SHADOW_2, ROUTE_SLICE_3, PEER_4, PROPENSITY_5, SERVICE_PROBE_6, CHOICE_7, INDEX_8];

const TABLES_1: &str = "
CREATE TABLE probe (
    id      INTEGER PRIMARY KEY,
    kind    TEXT NOT NULL CHECK (kind IN ('link', 'route')),
    route   TEXT NOT NULL,
    hops    INTEGER NOT NULL CHECK (hops >= 1),
    sent_us INTEGER NOT NULL,
    done_us INTEGER NOT NULL CHECK (done_us >= sent_us),
    rtt_us  INTEGER CHECK (rtt_us >= 0)
) STRICT;
CREATE INDEX probe_by_time ON probe (kind, sent_us);

CREATE TABLE link_state (
    id          INTEGER PRIMARY KEY,
    at_us       INTEGER NOT NULL,
    origin      TEXT NOT NULL,
    neighbour   TEXT NOT NULL,
    rtt_ms      REAL CHECK (rtt_ms >= 0),
    jitter_ms   REAL CHECK (jitter_ms >= 0),
    loss        REAL CHECK (loss BETWEEN 0 AND 1),
    bandwidth   REAL CHECK (bandwidth >= 0),
    utilisation REAL CHECK (utilisation BETWEEN 0 AND 1),
    CHECK ((rtt_ms IS NULL) = (loss IS NULL))
) STRICT;
CREATE INDEX link_state_by_time ON link_state (at_us);

CREATE TABLE slice (
    id                INTEGER PRIMARY KEY,
    at_us             INTEGER NOT NULL,
    neighbour         TEXT NOT NULL,
    sent_bytes        INTEGER NOT NULL,
    sent_datagrams    INTEGER NOT NULL,
    dropped_datagrams INTEGER NOT NULL,
    busy_us           INTEGER NOT NULL,
    duration_us       INTEGER NOT NULL
) STRICT;
CREATE INDEX slice_by_time ON slice (at_us);

CREATE TABLE event (
    id         INTEGER PRIMARY KEY,
    kind       TEXT NOT NULL CHECK (kind IN ('join', 'registration', 'lookup')),
    subject    TEXT NOT NULL,
    started_us INTEGER NOT NULL,
    done_us    INTEGER NOT NULL CHECK (done_us >= started_us),
    succeeded  INTEGER NOT NULL CHECK (succeeded IN (0, 1))
) STRICT;
CREATE INDEX event_by_time ON event (started_us);

CREATE TABLE decision (
    id             INTEGER PRIMARY KEY,
    at_us          INTEGER NOT NULL,
    tunnel         INTEGER,
    destination    TEXT NOT NULL,
    reason         TEXT NOT NULL,
    changed        INTEGER NOT NULL CHECK (changed IN (0, 1)),
    model_version  TEXT NOT NULL,
    propensity     REAL NOT NULL CHECK (propensity BETWEEN 0 AND 1),
    chosen_route   TEXT,
    calculation_us INTEGER NOT NULL
) STRICT;
CREATE INDEX decision_by_time ON decision (at_us);

CREATE TABLE candidate (
    decision_id       INTEGER NOT NULL REFERENCES decision (id) ON DELETE CASCADE,
    rank              INTEGER NOT NULL,
    route             TEXT NOT NULL,
    alive             INTEGER NOT NULL CHECK (alive IN (0, 1)),
    chosen            INTEGER NOT NULL CHECK (chosen IN (0, 1)),
    score             REAL NOT NULL,
    baseline_score    REAL NOT NULL,
    predicted_ms      REAL,
    predicted_low_ms  REAL,
    predicted_high_ms REAL,
    moving_average_ms REAL,
    last_value_ms     REAL,
    features          TEXT NOT NULL,
    PRIMARY KEY (decision_id, rank)
) STRICT, WITHOUT ROWID;

CREATE VIEW route_quality AS
SELECT route,
       count(*) AS probes,
       round(100.0 * (count(*) - count(rtt_us)) / count(*), 2) AS lost_percent,
       round(avg(rtt_us) / 1000.0, 3) AS mean_ms,
       min(rtt_us) / 1000.0 AS min_ms,
       max(rtt_us) / 1000.0 AS max_ms,
       datetime(max(done_us) / 1000000, 'unixepoch') AS last_utc
FROM probe WHERE kind = 'route' GROUP BY route;

CREATE VIEW forecast AS
SELECT datetime(at_us / 1000000, 'unixepoch') AS at_utc,
       tunnel, destination, reason, model_version, rank, route, alive, chosen,
       round(score, 4) AS score,
       round(baseline_score, 4) AS baseline_score,
       round(predicted_ms, 3) AS predicted_ms,
       round(predicted_low_ms, 3) AS predicted_low_ms,
       round(predicted_high_ms, 3) AS predicted_high_ms,
       round(moving_average_ms, 3) AS moving_average_ms,
       round(last_value_ms, 3) AS last_value_ms
FROM decision JOIN candidate ON candidate.decision_id = decision.id;
";

/// What the model in shadow forecast.
const SHADOW_2: &str = "
ALTER TABLE decision ADD COLUMN challenger_version TEXT;
ALTER TABLE candidate ADD COLUMN challenger_ms REAL;
DROP VIEW forecast;
CREATE VIEW forecast AS
SELECT datetime(at_us / 1000000, 'unixepoch') AS at_utc,
       tunnel, destination, reason, model_version, challenger_version, rank, route, alive, chosen,
       round(score, 4) AS score,
       round(baseline_score, 4) AS baseline_score,
       round(predicted_ms, 3) AS predicted_ms,
       round(predicted_low_ms, 3) AS predicted_low_ms,
       round(predicted_high_ms, 3) AS predicted_high_ms,
       round(challenger_ms, 3) AS challenger_ms,
       round(moving_average_ms, 3) AS moving_average_ms,
       round(last_value_ms, 3) AS last_value_ms
FROM decision JOIN candidate ON candidate.decision_id = decision.id;
";

/// What traffic met on the routes of tunnels.
const ROUTE_SLICE_3: &str = "
CREATE TABLE route_slice (
    id                 INTEGER PRIMARY KEY,
    at_us              INTEGER NOT NULL,
    tunnel             INTEGER NOT NULL,
    route              TEXT NOT NULL,
    route_id           INTEGER NOT NULL,
    sent_datagrams     INTEGER NOT NULL,
    received_datagrams INTEGER NOT NULL,
    sent_bytes         INTEGER NOT NULL,
    marked_datagrams   INTEGER NOT NULL,
    rtt_us             INTEGER CHECK (rtt_us >= 0),
    back_sent          INTEGER NOT NULL,
    back_received      INTEGER NOT NULL,
    duration_us        INTEGER NOT NULL
) STRICT;
CREATE INDEX route_slice_by_time ON route_slice (at_us);
";

/// Who was connected, and where it listened.
const PEER_4: &str = "
CREATE TABLE peer (
    key       BLOB PRIMARY KEY CHECK (length(key) = 32),
    addresses TEXT NOT NULL,
    seen_us   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX peer_by_time ON peer (seen_us);
";

/// With which probability each candidate was taken; unknown of earlier decisions, which logged only
/// that of the choice.
const PROPENSITY_5: &str = "
ALTER TABLE candidate ADD COLUMN propensity REAL CHECK (propensity BETWEEN 0 AND 1);
";

/// Checks of services.
const SERVICE_PROBE_6: &str = "
CREATE TABLE service_probe (
    id          INTEGER PRIMARY KEY,
    vantage     TEXT NOT NULL CHECK (vantage IN ('local', 'end-to-end')),
    service     TEXT NOT NULL,
    provider    TEXT NOT NULL,
    started_us  INTEGER NOT NULL,
    done_us     INTEGER NOT NULL CHECK (done_us >= started_us),
    response_us INTEGER CHECK (response_us >= 0),
    failure     TEXT,
    CHECK ((response_us IS NULL) = (failure IS NOT NULL))
) STRICT;
CREATE INDEX service_probe_by_time ON service_probe (started_us);

CREATE VIEW service_health AS
SELECT service, provider, vantage,
       count(*) AS checks,
       round(100.0 * count(failure) / count(*), 2) AS failed_percent,
       round(avg(response_us) / 1000.0, 3) AS mean_ms,
       max(response_us) / 1000.0 AS max_ms,
       (SELECT failure FROM service_probe AS last
        WHERE last.service = service_probe.service AND last.provider = service_probe.provider
              AND last.vantage = service_probe.vantage AND failure IS NOT NULL
        ORDER BY started_us DESC LIMIT 1) AS last_failure,
       datetime(max(done_us) / 1000000, 'unixepoch') AS last_utc
FROM service_probe GROUP BY service, provider, vantage;
";

/// By which rule routes are compared, and what it is learned from.
const CHOICE_7: &str = "
CREATE TABLE choice (
    id          INTEGER PRIMARY KEY,
    at_us       INTEGER NOT NULL,
    destination TEXT NOT NULL,
    volatility  REAL NOT NULL CHECK (volatility >= 0),
    stay        INTEGER CHECK (stay >= 0),
    offers      TEXT NOT NULL
) STRICT;
CREATE INDEX choice_by_time ON choice (at_us);
ALTER TABLE decision ADD COLUMN rule TEXT;
ALTER TABLE candidate ADD COLUMN bound_ms REAL;
DROP VIEW forecast;
CREATE VIEW forecast AS
SELECT datetime(at_us / 1000000, 'unixepoch') AS at_utc,
       tunnel, destination, reason, model_version, challenger_version, rule, rank, route, alive, chosen,
       round(score, 4) AS score,
       round(baseline_score, 4) AS baseline_score,
       round(predicted_ms, 3) AS predicted_ms,
       round(predicted_low_ms, 3) AS predicted_low_ms,
       round(predicted_high_ms, 3) AS predicted_high_ms,
       round(challenger_ms, 3) AS challenger_ms,
       round(bound_ms, 3) AS bound_ms,
       round(moving_average_ms, 3) AS moving_average_ms,
       round(last_value_ms, 3) AS last_value_ms
FROM decision JOIN candidate ON candidate.decision_id = decision.id;
";

/// Which decisions about a destination came last.
const INDEX_8: &str = "CREATE INDEX decision_by_destination ON decision (destination, at_us);";

/// How closely a file is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Check {
    /// Only whose it is.
    Header,
    /// Every page too (`quick_check`).
    Pages,
}

/// What is at `path`, without touching it: `None` when there is nothing, else the schema version
/// of our store, 0 for an empty file.
pub(super) fn inspect(path: &Path, check: Check) -> Result<Option<i64>, StoreError> {
    let damaged = |why: String| StoreError::Damaged { path: path.to_owned(), why };
    let length = match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => metadata.len(),
        Ok(_) => return Err(damaged("it is not a file".into())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(damaged(error.to_string())),
    };
    if length == 0 {
        return Ok(Some(0));
    }
    let mut start = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(16).read_to_end(&mut start));
    read.map_err(|error| damaged(error.to_string()))?;
    if start != MAGIC {
        return Err(damaged("it does not begin like a database".into()));
    }

    // Read-only, so that closing it leaves both the file and its log alone.
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let wrong = |source| error(path, "read", source);
    let connection = Connection::open_with_flags(path, flags).map_err(wrong)?;
    let number = |sql| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).map_err(wrong);
    let application = number("PRAGMA application_id")? as i32;
    let tables = number("SELECT count(*) FROM sqlite_schema")?;
    if application != APPLICATION_ID && (application != 0 || tables > 0) {
        return Err(StoreError::Foreign { path: path.to_owned(), found: application });
    }
    let version = number("PRAGMA user_version")?;
    if version > SCHEMA_VERSION {
        return Err(StoreError::Newer { path: path.to_owned(), found: version });
    }
    if check == Check::Pages {
        let said = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0));
        let said: String = said.map_err(wrong)?;
        if said != "ok" {
            return Err(damaged(said.replace('\n', " ")));
        }
    }
    Ok(Some(version))
}

/// Applies the migrations after `version`, all in one transaction.
pub(super) fn migrate(connection: &mut Connection, version: i64) -> rusqlite::Result<()> {
    if version >= SCHEMA_VERSION {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Asked again under the lock: another process may have been faster.
    let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    for tables in MIGRATIONS.iter().skip(usize::try_from(version).unwrap_or(0)) {
        transaction.execute_batch(tables)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    transaction.commit()
}

/// SQLite's word for what went wrong, as ours.
pub(super) fn error(path: &Path, doing: &'static str, source: rusqlite::Error) -> StoreError {
    match source.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            StoreError::Damaged { path: path.to_owned(), why: source.to_string() }
        }
        _ => StoreError::Sqlite { doing, path: path.to_owned(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    /// Opening is refused as `expected`, and no byte of the file changes.
    fn refused(path: &Path, expected: fn(&StoreError) -> bool) {
        let before = fs::read(path).unwrap();
        let error = Store::open(path).err().expect("it must be refused");
        assert!(expected(&error), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert_eq!(fs::read(path).unwrap(), before, "touched");
    }

    fn is_damaged(error: &StoreError) -> bool {
        matches!(error, StoreError::Damaged { .. })
    }

    #[test]
    fn a_missing_and_an_empty_file_become_a_store() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["missing.db", "empty.db"] {
            let path = folder.path().join(name);
            if name == "empty.db" {
                fs::write(&path, "").unwrap();
            }
            let store = Store::open(&path).unwrap();
            let number = |name| {
                store.connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).unwrap()
            };
            assert_eq!(number("user_version"), SCHEMA_VERSION);
            assert_eq!(number("application_id"), i64::from(APPLICATION_ID));
            assert_eq!(number("auto_vacuum"), 2, "incremental");
            assert_eq!(number("synchronous"), 1, "normal");
            drop(store);
            Store::open(&path).unwrap();
        }
        let nowhere = folder.path().join("no/such/folder.db");
        assert!(matches!(Store::open(nowhere), Err(StoreError::NoFolder(_))));
    }

    #[test]
    fn a_store_of_the_first_version_is_brought_up_to_date_with_its_rows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let old = Connection::open(&path).unwrap();
        old.execute_batch(TABLES_1).unwrap();
        old.execute_batch(
            "INSERT INTO decision VALUES (1, 5, 4, 't', 'held', 0, 'v1', 1.0, 'a>t', 7);
             INSERT INTO candidate VALUES (1, 0, 'a>t', 1, 1, 0.5, 0.4, 2.0, 1.0, 3.0, 2.5, 2.4, '[]');",
        )
        .unwrap();
        old.pragma_update(None, "application_id", APPLICATION_ID).unwrap();
        old.pragma_update(None, "user_version", 1).unwrap();
        drop(old);
        let early = crate::store::Reader::open(&path).err().expect("a reader must not migrate");
        assert!(matches!(early, StoreError::Older { found: 1, .. }), "{early}");
        drop(Store::open(&path).unwrap());
        let reader = crate::store::Reader::open(&path).unwrap();
        let decision = reader.latest_decisions(1).unwrap().remove(0);
        assert_eq!((decision.model_version.as_str(), decision.challenger_version), ("v1", None));
        let candidate = &decision.candidates[0];
        assert_eq!((candidate.predicted_ms, candidate.challenger_ms), (Some(2.0), None));
        assert_eq!((decision.propensity, candidate.propensity), (1.0, None));
        assert!(reader.route_slices(0).unwrap().is_empty());
        assert!(reader.peers().unwrap().is_empty());
        assert!(reader.service_probes(0).unwrap().is_empty());
        assert!(reader.choices(9).unwrap().is_empty());
        let unknown: (Option<String>, Option<f64>) = Connection::open(&path)
            .unwrap()
            .query_row("SELECT rule, bound_ms FROM forecast", [], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .unwrap();
        assert_eq!(unknown, (None, None));
    }

    #[test]
    fn garbage_and_other_files_are_refused_untouched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        fs::write(&path, "all work and no play makes a node a dull boy".repeat(100)).unwrap();
        refused(&path, is_damaged);
        fs::write(&path, "x").unwrap();
        refused(&path, is_damaged);
        assert!(is_damaged(&Store::open(folder.path()).err().unwrap()), "a folder");
    }

    #[test]
    fn a_truncated_or_overwritten_store_is_refused_untouched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        drop(Store::open(&path).unwrap());
        let whole = fs::read(&path).unwrap();
        for length in [100, 4_096, whole.len() / 2, whole.len() - 1_000] {
            fs::write(&path, &whole[..length]).unwrap();
            refused(&path, is_damaged);
        }
        let mut overwritten = whole;
        overwritten[4_096..3 * 4_096].fill(0xa5);
        fs::write(&path, overwritten).unwrap();
        refused(&path, is_damaged);
    }

    #[test]
    fn the_database_of_another_program_is_refused_untouched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other.db");
        let other = Connection::open(&path).unwrap();
        other.execute_batch("CREATE TABLE cookie (name TEXT)").unwrap();
        drop(other);
        refused(&path, |error| matches!(error, StoreError::Foreign { found: 0, .. }));
        let other = Connection::open(&path).unwrap();
        other.pragma_update(None, "application_id", 7).unwrap();
        drop(other);
        refused(&path, |error| matches!(error, StoreError::Foreign { found: 7, .. }));
    }

    #[test]
    fn a_newer_store_is_refused_untouched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = Store::open(&path).unwrap();
        store.connection.pragma_update(None, "user_version", SCHEMA_VERSION + 1).unwrap();
        drop(store);
        refused(
            &path,
            |error| matches!(error, StoreError::Newer { found, .. } if *found == SCHEMA_VERSION + 1),
        );
    }
}
