//! What the route itself delivered before a probe left.

use polars::prelude::PolarsResult;

use super::frames::{Moments, Probe, newest_before};
use super::windows::{LAST, MIN, failures, jitters, shape, summaries};
use crate::engine::measure::{HISTORY_WINDOW, STATISTICS, WINDOW};
use crate::engine::predict::FeatureVector;
use crate::engine::predict::schema::{LINK_STATISTICS, MISSING, ROUTE_STATISTICS, index};

/// Fills in the features of each route's own history. `completed` is in order of completion; the
/// features of the links are there already.
pub(super) fn route_features(
    rows: &[&Probe<'_>],
    completed: &[Probe<'_>],
    features: &mut [FeatureVector],
) -> PolarsResult<()> {
    let asked: Moments = rows.iter().map(|probe| (probe.route_id, probe.row.sent_us)).collect();
    let moments = |probes: &[&Probe<'_>]| -> Moments {
        probes.iter().map(|probe| (probe.route_id, probe.row.done_us)).collect()
    };
    let completed: Vec<&Probe<'_>> = completed.iter().collect();
    let keys: Vec<u32> = completed.iter().map(|probe| probe.route_id).collect();
    let events: Vec<(u64, bool)> =
        completed.iter().map(|probe| (probe.row.done_us, probe.row.rtt_us.is_none())).collect();
    let failures = failures(&keys, &events, HISTORY_WINDOW);
    let newest = newest_before(&asked, &moments(&completed))?;
    for ((features, probe), position) in features.iter_mut().zip(rows).zip(newest) {
        let Some(position) = position else { continue };
        let age_s = |at_us: u64| (probe.row.sent_us - at_us) as f64 / 1e6;
        let past = &failures[position];
        let share = past.recent as f64 / past.events.min(HISTORY_WINDOW) as f64;
        features[const { index("route_loss") }] = share;
        features[const { index("route_failure_streak") }] = past.streak as f64;
        features[const { index("route_failure_age_s") }] = past.last_us.map_or(MISSING, age_s);
        features[const { index("route_age_s") }] = age_s(completed[position].row.done_us);
        features[const { index("route_count") }] = past.events.min(WINDOW) as f64;
    }

    let answered = completed.iter().copied().filter(|probe| probe.row.rtt_us.is_some());
    let answered: Vec<&Probe<'_>> = answered.collect();
    let keys: Vec<u32> = answered.iter().map(|probe| probe.route_id).collect();
    let rtts_ms: Vec<f64> = answered.iter().filter_map(|probe| probe.rtt_ms()).collect();
    let summaries = summaries(&keys, &rtts_ms)?;
    let jitters = jitters(&keys, &rtts_ms, HISTORY_WINDOW)?;
    let newest = newest_before(&asked, &moments(&answered))?;
    for (features, position) in features.iter_mut().zip(newest) {
        let Some(position) = position else { continue };
        let statistics = &summaries[position].statistics;
        features[ROUTE_STATISTICS..][..STATISTICS.len()].copy_from_slice(statistics);
        features[const { index("route_above_min_ms") }] = statistics[LAST] - statistics[MIN];
        features[const { index("route_jitter_ms") }] = jitters[position].unwrap_or(MISSING);
        let claimed_ms = features[LINK_STATISTICS];
        if claimed_ms != MISSING {
            features[const { index("route_residual_ms") }] = statistics[LAST] - claimed_ms;
        }
        let [trend, drift, spread] = shape(statistics);
        features[const { index("route_trend_ln") }] = trend;
        features[const { index("route_drift_ln") }] = drift;
        features[const { index("route_spread_ln") }] = spread;
    }
    Ok(())
}
