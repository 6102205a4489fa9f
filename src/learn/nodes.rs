//! What was known of the nodes of a route when a probe left: their deviation from their own
//! normal, their credibility, their coordinates.

use polars::prelude::PolarsResult;

use super::frames::{Claim, Ids, Moments, Probe, newest_before};
use super::links::Links;
use super::windows::LAST;
use crate::engine::measure::LinkHistories;
use crate::engine::measure::window_statistics::{ln_ratio, quantile};
use crate::engine::predict::FeatureVector;
use crate::engine::predict::schema::{MEDIAN_20, index};
use crate::engine::types::Timestamp;

/// Fills in the largest deviation of the senders of each row. One advertisement is what an
/// origin says at one moment; `links` are those of `claims`.
pub(super) fn deviation_features(
    rows: &[&Probe<'_>],
    claims: &[Claim],
    links: &Links,
    features: &mut [FeatureVector],
) -> PolarsResult<()> {
    let mut ids = Ids::default();
    let (mut known, mut deviations_ln, mut start) = (Moments::default(), Vec::new(), 0);
    for advertisement in advertisements(claims) {
        let end = start + advertisement.len();
        let said = links.advertised[start..end].iter().flatten();
        let ratios = said.map(|link| {
            let statistics = &link.summary.statistics;
            ln_ratio(statistics[LAST], statistics[MEDIAN_20])
        });
        if let Some(median) = quantile(&ratios.collect::<Vec<_>>(), 0.5) {
            known.push(ids.of(advertisement[0].origin), advertisement[0].at_us);
            deviations_ln.push(median);
        }
        start = end;
    }
    let mut asked = Moments::default();
    for probe in rows {
        for (sender, _) in probe.route.links() {
            asked.push(ids.of(sender), probe.row.sent_us);
        }
    }
    let newest = newest_before(&asked, &known)?;
    let mut newest = newest.into_iter();
    for (probe, features) in rows.iter().zip(features) {
        let senders = newest.by_ref().take(probe.route.hop_count());
        if let Some(most) = senders.flatten().map(|at| deviations_ln[at]).reduce(f64::max) {
            features[const { index("node_deviation_max_ln") }] = most;
        }
    }
    Ok(())
}

/// Fills in what depends on the order of everything that happened: coordinates and credibility.
/// The engine's own rules are played through once, with everything strictly before each row.
/// `rows` are in order of departure, `completed` of completion, `claims` of acceptance.
pub(super) fn replayed_features(
    rows: &[&Probe<'_>],
    claims: &[Claim],
    completed: &[Probe<'_>],
    features: &mut [FeatureVector],
) {
    let mut links = LinkHistories::default();
    let mut advertisements = advertisements(claims).peekable();
    let mut completions = completed.iter().peekable();
    for (probe, features) in rows.iter().zip(features) {
        loop {
            let earlier = |at_us: &u64| *at_us < probe.row.sent_us;
            let said_us = advertisements.peek().map(|said| said[0].at_us).filter(earlier);
            let done_us = completions.peek().map(|done| done.row.done_us).filter(earlier);
            match (said_us, done_us) {
                (None, None) => break,
                (Some(said_us), done_us) if done_us.is_none_or(|done_us| said_us <= done_us) => {
                    let Some(said) = advertisements.next() else { break };
                    let changes = said.iter().map(|claim| (claim.neighbour, claim.quality));
                    links.advertised(said[0].origin, Timestamp(said_us), changes);
                }
                _ => {
                    let Some(done) = completions.next() else { break };
                    links.delivered(&done.route, done.row.rtt_us);
                }
            }
        }
        let route = &probe.route;
        let credibilities = route.links().filter_map(|(sender, _)| links.credibility(sender));
        if let Some(least) = credibilities.reduce(f64::min) {
            features[const { index("credibility_min") }] = least;
        }
        let distance_ms = |(a, b)| links.coordinates().rtt_ms(a, b);
        if let Some(sum) = route.links().map(distance_ms).sum::<Option<f64>>() {
            features[const { index("coordinate_sum_ms") }] = sum;
        }
        if let Some(direct) = distance_ms((route.source(), route.destination())) {
            features[const { index("coordinate_direct_ms") }] = direct;
        }
    }
}

fn advertisements(claims: &[Claim]) -> impl Iterator<Item = &[Claim]> {
    claims.chunk_by(|one, other| (one.at_us, one.origin) == (other.at_us, other.origin))
}
