//! What the links of a route were advertised as when a probe left.

use std::collections::BTreeMap;

use polars::prelude::PolarsResult;

use super::frames::{Claim, Ids, Moments, Probe, newest_before};
use super::windows::{LAST, MIN, Summary, failures, shape, summaries};
use crate::engine::measure::{LinkQuality, STATISTICS, WINDOW};
use crate::engine::predict::FeatureVector;
use crate::engine::predict::schema::{LINK_STATISTICS, MAXIMA, MEDIAN_20, MISSING, index};
use crate::engine::types::NodeId;

/// A link that is advertised, with its past up to then.
pub(super) struct Advertised {
    at_us: u64,
    /// When the advertised RTT was last another than the one before.
    measured_us: u64,
    quality: LinkQuality,
    pub(super) summary: Summary,
    withdrawals: usize,
    withdrawn_us: Option<u64>,
    failure_streak: usize,
}

/// For each claim what is known of its link by then; `None` for a withdrawal. The key of a past
/// is the link and the end that speaks of it.
pub(super) struct Links {
    ids: Ids<(NodeId, NodeId)>,
    moments: Moments,
    pub(super) advertised: Vec<Option<Advertised>>,
}

impl Links {
    /// Of all claims, in order of time.
    pub(super) fn of(claims: &[Claim]) -> PolarsResult<Self> {
        let mut ids = Ids::default();
        let keys: Vec<u32> = claims.iter().map(|c| ids.of((c.origin, c.neighbour))).collect();
        let events: Vec<(u64, bool)> =
            claims.iter().map(|claim| (claim.at_us, claim.quality.is_none())).collect();
        let pasts = failures(&keys, &events, WINDOW);
        let fails = |claim: &Claim| claim.quality.is_none_or(|quality| quality.loss > 0.0);
        let events: Vec<(u64, bool)> =
            claims.iter().map(|claim| (claim.at_us, fails(claim))).collect();
        let streaks = failures(&keys, &events, WINDOW);
        let mut measured = BTreeMap::new();
        let rtts = keys.iter().zip(claims).filter_map(|(k, c)| Some((*k, c.quality?.rtt_ms)));
        let (rtt_keys, rtts_ms): (Vec<u32>, Vec<f64>) = rtts.unzip();
        let mut summaries = summaries(&rtt_keys, &rtts_ms)?.into_iter();
        let pasts = keys.iter().zip(claims).zip(pasts.into_iter().zip(streaks));
        let advertised = pasts.map(|((key, claim), (past, streak))| {
            let quality = claim.quality?;
            let measured = measured.entry(*key).or_insert((quality.rtt_ms, claim.at_us));
            if measured.0 != quality.rtt_ms {
                *measured = (quality.rtt_ms, claim.at_us);
            }
            Some(Advertised {
                at_us: claim.at_us,
                measured_us: measured.1,
                quality,
                summary: summaries.next()?,
                withdrawals: past.recent,
                withdrawn_us: past.last_us,
                failure_streak: streak.streak.min(WINDOW),
            })
        });
        let advertised = advertised.collect();
        let moments = keys.into_iter().zip(claims).map(|(key, claim)| (key, claim.at_us)).collect();
        Ok(Self { ids, moments, advertised })
    }

    /// Fills in the features of the links of each row: those that the sender advertises, or else
    /// the far end. One unknown link, and nothing is said of the route's links.
    pub(super) fn features(
        &mut self,
        rows: &[&Probe<'_>],
        features: &mut [FeatureVector],
    ) -> PolarsResult<()> {
        let (mut forth, mut back) = (Moments::default(), Moments::default());
        for probe in rows {
            for (from, to) in probe.route.links() {
                forth.push(self.ids.of((from, to)), probe.row.sent_us);
                back.push(self.ids.of((to, from)), probe.row.sent_us);
            }
        }
        let known = |asked| -> PolarsResult<Vec<Option<&Advertised>>> {
            let newest = newest_before(asked, &self.moments)?.into_iter();
            Ok(newest.map(|position| self.advertised[position?].as_ref()).collect())
        };
        let (forth, back) = (known(&forth)?, known(&back)?);
        let mut start = 0;
        for (probe, features) in rows.iter().zip(features) {
            let hops = start..start + probe.route.hop_count();
            start = hops.end;
            if let Some(links) = back[hops.clone()].iter().copied().collect::<Option<Vec<_>>>() {
                fold_reverse(&links, features);
            }
            let links = hops.map(|hop| forth[hop].or(back[hop])).collect::<Option<Vec<_>>>();
            if let Some(links) = links {
                fold(&links, probe.row.sent_us, features);
            }
        }
        Ok(())
    }
}

/// The features over what the far ends of all links of a route advertise.
fn fold_reverse(links: &[&Advertised], features: &mut FeatureVector) {
    let sum = |value: fn(&Advertised) -> f64| links.iter().map(|link| value(link)).sum();
    features[const { index("link_reverse_sum_ms") }] = sum(|link| link.quality.rtt_ms);
    features[const { index("link_reverse_median_20_sum_ms") }] =
        sum(|link| link.summary.statistics[MEDIAN_20]);
    features[const { index("link_reverse_loss") }] =
        1.0 - links.iter().map(|link| 1.0 - link.quality.loss).product::<f64>();
    features[const { index("link_reverse_utilisation_max") }] =
        links.iter().map(|link| link.quality.utilisation).fold(0.0, f64::max);
}

/// The features over all links of a route.
fn fold(links: &[&Advertised], sent_us: u64, features: &mut FeatureVector) {
    let each = |value: fn(&Advertised) -> f64| links.iter().map(move |link| value(link));
    let most = |value| each(value).fold(0.0, f64::max);
    let queueing = |link: &Advertised| {
        let statistics = &link.summary.statistics;
        statistics[LAST] - statistics[MIN]
    };
    let mut sums = [0.0; STATISTICS.len()];
    for (index, sum) in sums.iter_mut().enumerate() {
        *sum = links.iter().map(|link| link.summary.statistics[index]).sum();
    }
    let age_s = |at_us: u64| (sent_us - at_us) as f64 / 1e6;
    let bandwidths = links.iter().filter_map(|link| link.quality.bandwidth);
    let counts = each(|link| link.summary.count as f64);
    let failure_ages = links.iter().filter_map(|link| link.withdrawn_us.map(age_s));
    let [trend, drift, spread] = shape(&sums);

    features[LINK_STATISTICS..][..STATISTICS.len()].copy_from_slice(&sums);
    features[const { index("link_last_max_ms") }] = most(|link| link.summary.statistics[LAST]);
    for (statistic, feature) in MAXIMA {
        features[feature] =
            links.iter().map(|link| link.summary.statistics[statistic]).fold(0.0, f64::max);
    }
    features[const { index("link_queueing_sum_ms") }] = each(queueing).sum();
    features[const { index("link_queueing_max_ms") }] = most(queueing);
    features[const { index("link_jitter_sum_ms") }] = each(|link| link.quality.jitter_ms).sum();
    features[const { index("link_jitter_max_ms") }] = most(|link| link.quality.jitter_ms);
    features[const { index("link_loss_max") }] = most(|link| link.quality.loss);
    features[const { index("link_failure_streak_max") }] = most(|link| link.failure_streak as f64);
    features[const { index("link_loss") }] =
        1.0 - each(|link| 1.0 - link.quality.loss).product::<f64>();
    features[const { index("link_bandwidth_min") }] =
        bandwidths.reduce(f64::min).unwrap_or(MISSING);
    features[const { index("link_utilisation_max") }] = most(|link| link.quality.utilisation);
    features[const { index("link_utilisation_sum") }] = each(|link| link.quality.utilisation).sum();
    let ages = || links.iter().map(|link| age_s(link.at_us));
    features[const { index("link_age_max_s") }] = ages().fold(0.0, f64::max);
    features[const { index("link_age_sum_s") }] = ages().sum();
    let measured_ages = || links.iter().map(|link| age_s(link.measured_us));
    features[const { index("link_measured_age_max_s") }] = measured_ages().fold(0.0, f64::max);
    features[const { index("link_measured_age_sum_s") }] = measured_ages().sum();
    features[const { index("link_count_min") }] = counts.reduce(f64::min).unwrap_or(MISSING);
    features[const { index("link_withdrawals_max") }] = most(|link| link.withdrawals as f64);
    features[const { index("link_failure_age_min_s") }] =
        failure_ages.reduce(f64::min).unwrap_or(MISSING);
    features[const { index("link_trend_ln") }] = trend;
    features[const { index("link_drift_ln") }] = drift;
    features[const { index("link_spread_ln") }] = spread;
}
