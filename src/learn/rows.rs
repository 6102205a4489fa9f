//! The rows of training, and their split by time.

use sha2::{Digest, Sha256};

use super::evaluate::RTT_MS_MIN;
use super::head::Example;
use super::{LearnError, TrainConfig};
use crate::engine::predict::schema::MISSING;
use crate::engine::predict::{FeatureVector, MovingAverage, QualityModel, Reference};

/// Fewest answered rows for training. A guess: below, the newest fifth says nothing.
pub const ROWS_MIN: usize = 100;

/// Which route a row is of, and between which ends: equal for equal names, on every machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteKey {
    /// Of the whole route.
    pub route: u64,
    /// Of its first and its last node.
    pub ends: u64,
}

impl RouteKey {
    /// The key of a route that is written as in the store: `source>relay>destination`.
    pub fn of(route: &str) -> Self {
        let source = route.split('>').next().unwrap_or(route);
        let destination = route.rsplit('>').next().unwrap_or(route);
        Self { route: hash(&[route]), ends: hash(&[source, ">", destination]) }
    }
}

/// The first 8 bytes of SHA-256.
fn hash(parts: &[&str]) -> u64 {
    let mut hasher = Sha256::new();
    parts.iter().for_each(|part| hasher.update(part));
    hasher.finalize().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// One probe of a route, or one slice of traffic over it: what was known when it left, and what came
/// of it. A row without a round trip is a lost probe, or with a bandwidth a slice of traffic.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainRow {
    /// Which route it is of.
    pub key: RouteKey,
    /// When it left or began (µs since the epoch).
    pub sent_us: u64,
    /// When the answer came, the probe was given up or the slice ended (µs since the epoch).
    pub done_us: u64,
    /// Round-trip time (ms); `None`: lost, or not probed.
    pub rtt_ms: Option<f64>,
    /// Bandwidth of the route (bytes/s), when it was measured.
    pub bandwidth: Option<f64>,
    /// The features as they were known at `sent_us`.
    pub features: FeatureVector,
}

impl TrainRow {
    /// Whether it is a slice of traffic and no probe.
    pub fn is_traffic(&self) -> bool {
        self.rtt_ms.is_none() && self.bandwidth.is_some()
    }
}

/// The newest of the wanted rows with a history, in order of `sent_us`, their numbers made sound.
pub(super) fn usable_rows(
    rows: &[TrainRow],
    rows_max: usize,
    wanted: impl Fn(&TrainRow) -> bool,
) -> Vec<TrainRow> {
    let usable = |row: &&TrainRow| {
        wanted(row)
            && row.rtt_ms.is_none_or(f64::is_finite)
            && MovingAverage.predict(&row.features).is_some()
    };
    let mut rows: Vec<TrainRow> = rows.iter().filter(usable).copied().collect();
    rows.sort_by_key(|row| (row.sent_us, row.done_us));
    rows.drain(..rows.len().saturating_sub(rows_max));
    for row in &mut rows {
        row.rtt_ms = row.rtt_ms.map(|rtt_ms| rtt_ms.max(RTT_MS_MIN));
        row.bandwidth = row.bandwidth.filter(|bandwidth| bandwidth.is_finite() && *bandwidth > 0.0);
        for value in &mut row.features {
            // A tree learner cannot order what is no number.
            *value = if value.is_finite() { *value } else { MISSING };
        }
    }
    rows
}

/// Something for each part of the split.
pub(super) struct Parts<T> {
    pub(super) fit: T,
    pub(super) calibrate: T,
    pub(super) test: T,
}

/// Splits rows in order of time, oldest to newest.
///
/// # Errors
/// [`LearnError::TooFewRows`].
pub(super) fn split<'a>(
    rows: &'a [TrainRow],
    config: &TrainConfig,
) -> Result<Parts<&'a [TrainRow]>, LearnError> {
    let answered = rows.iter().filter(|row| row.rtt_ms.is_some()).count();
    if answered < ROWS_MIN {
        return Err(LearnError::TooFewRows {
            rows: answered,
            needed: ROWS_MIN,
            what: "route probes (answered, with a history)",
        });
    }
    Ok(parts(rows, config))
}

/// The same, however few they are.
pub(super) fn parts<'a>(rows: &'a [TrainRow], config: &TrainConfig) -> Parts<&'a [TrainRow]> {
    let share = |share: f64| (rows.len() as f64 * share).ceil() as usize;
    let (before, test) = rows.split_at(rows.len() - share(config.test_share));
    let (fit, calibrate) =
        before.split_at(before.len().saturating_sub(share(config.calibrate_share)));
    Parts { fit, calibrate, test }
}

impl<'a> Parts<&'a [TrainRow]> {
    /// What `map` makes of the rows of each part, without those that were completed only after
    /// the next part had begun.
    pub(super) fn known<T>(&self, map: impl Fn(&'a TrainRow) -> Option<T>) -> Parts<Vec<T>> {
        let known = |rows: &'a [TrainRow], next: &[TrainRow]| {
            let end_us = next.first().map_or(u64::MAX, |row| row.sent_us);
            rows.iter().filter(|row| row.done_us < end_us).filter_map(&map).collect()
        };
        Parts {
            fit: known(self.fit, self.calibrate),
            calibrate: known(self.calibrate, self.test),
            test: known(self.test, &[]),
        }
    }
}

/// A row as a head sees it; `None` when its reference is not known.
pub(super) fn example(row: &TrainRow, truth_ln: f64, reference: Reference) -> Option<Example<'_>> {
    Some(Example {
        sent_us: row.sent_us,
        done_us: row.done_us,
        features: &row.features,
        truth_ln,
        reference_ln: reference.ln(&row.features)?,
    })
}

/// The reference that is unknown on fewest rows and nearest to their truth.
pub(super) fn best_reference(rows: &[TrainRow]) -> Reference {
    let cost = |reference: Reference| {
        let (mut unknown, mut error) = (0, 0.0);
        for row in rows {
            let Some(rtt_ms) = row.rtt_ms else { continue };
            match reference.ln(&row.features) {
                Some(ln) => error += (rtt_ms.ln() - ln).abs(),
                None => unknown += 1,
            }
        }
        (unknown, error)
    };
    let (level, last) = (cost(Reference::Level), cost(Reference::LastValue));
    if last < level { Reference::LastValue } else { Reference::Level }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_tells_routes_and_their_ends_apart() {
        let [direct, over, other, back] = ["a>b", "a>c>b", "a>c>d", "b>c>a"].map(RouteKey::of);
        assert_eq!(direct.ends, over.ends);
        assert_ne!(direct.route, over.route);
        assert!(over.ends != other.ends && over.ends != back.ends && over.route != other.route);
        // The same on every machine: models trained anywhere from the same rows are equal.
        assert_eq!(direct.route, direct.ends);
        assert_eq!(direct.route, 0x998a_5be8_8dc5_c0d4, "SHA-256 of a>b");
    }
}
