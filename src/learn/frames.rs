//! Small helpers that the feature builders share: numbers for keys, and the as-of join.

use std::collections::HashMap;
use std::hash::Hash;

use polars::prelude::*;

use crate::engine::measure::LinkQuality;
use crate::engine::types::{NodeId, Route};
use crate::store::ProbeRow;

/// A completed route probe, parsed.
pub(super) struct Probe<'a> {
    pub(super) row: &'a ProbeRow,
    pub(super) route: Route,
    /// Equal for probes over the same route.
    pub(super) route_id: u32,
}

impl Probe<'_> {
    /// Round-trip time (ms); `None` when it was lost.
    pub(super) fn rtt_ms(&self) -> Option<f64> {
        self.row.rtt_us.map(|rtt_us| rtt_us as f64 / 1e3)
    }
}

/// What an accepted advertisement says of one link, parsed.
#[derive(Clone, Copy)]
pub(super) struct Claim {
    pub(super) at_us: u64,
    pub(super) origin: NodeId,
    pub(super) neighbour: NodeId,
    /// `None`: withdrawn.
    pub(super) quality: Option<LinkQuality>,
}

/// Small numbers for keys, so that joins compare integers.
pub(super) struct Ids<K>(HashMap<K, u32>);

impl<K> Default for Ids<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash> Ids<K> {
    pub(super) fn of(&mut self, key: K) -> u32 {
        let next = self.0.len() as u32;
        *self.0.entry(key).or_insert(next)
    }
}

/// A key and a time for each row of something, in order of time.
#[derive(Default)]
pub(super) struct Moments {
    keys: Vec<u32>,
    at_us: Vec<i64>,
}

impl Moments {
    pub(super) fn push(&mut self, key: u32, at_us: u64) {
        self.keys.push(key);
        self.at_us.push(at_us as i64);
    }

    fn frame(&self, time: &str, positions: Option<Column>) -> PolarsResult<DataFrame> {
        let mut columns =
            vec![Column::new("key".into(), &self.keys), Column::new(time.into(), &self.at_us)];
        columns.extend(positions);
        DataFrame::new(self.keys.len(), columns)
    }
}

impl FromIterator<(u32, u64)> for Moments {
    fn from_iter<I: IntoIterator<Item = (u32, u64)>>(moments: I) -> Self {
        let mut all = Self::default();
        moments.into_iter().for_each(|(key, at_us)| all.push(key, at_us));
        all
    }
}

/// For each moment asked for, the position of the newest known one with the same key that lies
/// strictly before it.
pub(super) fn newest_before(asked: &Moments, known: &Moments) -> PolarsResult<Vec<Option<usize>>> {
    let positions: Vec<u32> = (0..known.keys.len() as u32).collect();
    let left = asked.frame("asked_us", None)?;
    let right = known.frame("known_us", Some(Column::new("position".into(), positions)))?;
    let (key, backward) = (["key"], AsofStrategy::Backward);
    let found =
        left.join_asof_by(&right, "asked_us", "known_us", key, key, backward, None, false, false)?;
    let found = found.column("position")?.u32()?;
    Ok(found.iter().map(|position| position.map(|position| position as usize)).collect())
}
