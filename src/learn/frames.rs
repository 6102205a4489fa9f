//! Small helpers on polars frames that the feature builders share.

use std::collections::HashMap;

use polars::prelude::*;

use crate::store::ProbeRow;

/// Small numbers for texts, so that joins compare integers.
#[derive(Default)]
pub(super) struct Ids<'a>(HashMap<&'a str, u32>);

impl<'a> Ids<'a> {
    pub(super) fn of(&mut self, text: &'a str) -> u32 {
        let next = self.0.len() as u32;
        *self.0.entry(text).or_insert(next)
    }
}

pub(super) fn frame(columns: Vec<Column>) -> PolarsResult<DataFrame> {
    DataFrame::new(columns.first().map_or(0, Column::len), columns)
}

pub(super) fn rtt_ms(probe: &ProbeRow) -> f64 {
    probe.rtt_us.unwrap_or(0) as f64 / 1e3
}

/// For each row of `left` the newest row of `right` with the same key whose time is strictly
/// before `sent_us`. Both are in order of time within a key.
pub(super) fn newest_before(
    left: &DataFrame,
    right: &DataFrame,
    key: &str,
    on: &str,
) -> PolarsResult<DataFrame> {
    let backward = AsofStrategy::Backward;
    left.join_asof_by(right, "sent_us", on, [key], [key], backward, None, false, false)
}
