//! What the links of a route were advertised as when a probe left.

use std::collections::HashMap;

use polars::prelude::*;

use super::frames::{frame, newest_before};
use crate::engine::predict::schema::MISSING;
use crate::store::{LinkStateRow, ProbeRow};

/// The link features, one value a row.
#[derive(Default)]
pub(super) struct LinkFeatures {
    hop_count: Vec<f64>,
    pub(super) rtt_sum_ms: Vec<f64>,
    rtt_max_ms: Vec<f64>,
    jitter_sum_ms: Vec<f64>,
    loss: Vec<f64>,
    bandwidth_min: Vec<f64>,
    utilisation_max: Vec<f64>,
    age_max_s: Vec<f64>,
}

impl LinkFeatures {
    pub(super) fn into_columns(self) -> Vec<Column> {
        [
            ("hop_count", self.hop_count),
            ("link_rtt_sum_ms", self.rtt_sum_ms),
            ("link_rtt_max_ms", self.rtt_max_ms),
            ("link_jitter_sum_ms", self.jitter_sum_ms),
            ("link_loss", self.loss),
            ("link_bandwidth_min", self.bandwidth_min),
            ("link_utilisation_max", self.utilisation_max),
            ("link_age_max_s", self.age_max_s),
        ]
        .into_iter()
        .map(|(name, values)| Column::new(name.into(), values))
        .collect()
    }
}

/// Looks up the newest state of every hop of every row, and folds the hops of each row.
pub(super) fn link_features(
    rows: &[&ProbeRow],
    link_states: &[LinkStateRow],
) -> PolarsResult<LinkFeatures> {
    let mut ids: HashMap<(&str, &str), u32> = HashMap::new();
    let mut id = |from, to| {
        let next = ids.len() as u32;
        *ids.entry((from, to)).or_insert(next)
    };
    let mut states: Vec<&LinkStateRow> = link_states.iter().collect();
    states.sort_by_key(|state| state.at_us);
    let quality = |value: fn(&LinkStateRow) -> Option<f64>| {
        states.iter().map(|state| value(state)).collect::<Vec<Option<f64>>>()
    };
    let state_ids: Vec<u32> = states.iter().map(|s| id(&s.origin, &s.neighbour)).collect();
    let right = frame(vec![
        Column::new("link_id".into(), state_ids),
        Column::new("link_us".into(), states.iter().map(|s| s.at_us as i64).collect::<Vec<_>>()),
        Column::new("rtt_ms".into(), quality(|s| s.quality.map(|q| q.rtt_ms))),
        Column::new("jitter_ms".into(), quality(|s| s.quality.map(|q| q.jitter_ms))),
        Column::new("loss".into(), quality(|s| s.quality.map(|q| q.loss))),
        Column::new("bandwidth".into(), quality(|s| s.quality.and_then(|q| q.bandwidth))),
        Column::new("utilisation".into(), quality(|s| s.quality.map(|q| q.utilisation))),
    ])?;

    let (mut hops, mut link_ids, mut sent_us) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let nodes: Vec<&str> = row.route.split('>').collect();
        hops.push(nodes.len().saturating_sub(1));
        for pair in nodes.windows(2) {
            link_ids.push(id(pair[0], pair[1]));
            sent_us.push(row.sent_us as i64);
        }
    }
    let left = frame(vec![
        Column::new("link_id".into(), link_ids),
        Column::new("sent_us".into(), &sent_us),
    ])?;
    let found = newest_before(&left, &right, "link_id", "link_us")?;
    let at_us: Vec<Option<i64>> = found.column("link_us")?.i64()?.to_vec();
    let column = |name| found.column(name)?.f64().map(Float64Chunked::to_vec);
    let (rtt, jitter, loss) = (column("rtt_ms")?, column("jitter_ms")?, column("loss")?);
    let (bandwidth, utilisation) = (column("bandwidth")?, column("utilisation")?);

    let mut features = LinkFeatures::default();
    let mut start = 0;
    for hop_count in hops {
        let hops = start..start + hop_count;
        start = hops.end;
        // One unknown or withdrawn link, and nothing can be said of the route's links.
        let known = rtt[hops.clone()].iter().all(Option::is_some);
        let of = |values: &[Option<f64>], fold: fn(f64, f64) -> f64, first: f64| {
            let values = values[hops.clone()].iter().flatten().copied();
            if known { values.fold(first, fold) } else { MISSING }
        };
        let add = |a: f64, b: f64| a + b;
        let delivered = of(&loss, |a, loss| a * (1.0 - loss), 1.0);
        let narrowest = of(&bandwidth, f64::min, f64::INFINITY);
        let oldest_us = at_us[hops.clone()].iter().flatten().min().filter(|_| known);
        let age = oldest_us.map(|at| (sent_us[hops.start] - at) as f64 / 1e6);
        features.hop_count.push(hop_count as f64);
        features.rtt_sum_ms.push(of(&rtt, add, 0.0));
        features.rtt_max_ms.push(of(&rtt, f64::max, 0.0));
        features.jitter_sum_ms.push(of(&jitter, add, 0.0));
        features.loss.push(if known { 1.0 - delivered } else { MISSING });
        features.bandwidth_min.push(if narrowest.is_finite() { narrowest } else { MISSING });
        features.utilisation_max.push(of(&utilisation, f64::max, 0.0));
        features.age_max_s.push(age.unwrap_or(MISSING));
    }
    Ok(features)
}
