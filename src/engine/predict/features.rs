//! Features online: what the engine knows of a route right now, as numbers.

use super::schema::{FEATURES, FeatureVector, MISSING, index_of};
use crate::engine::measure::window_statistics::{
    ln_ratio, mean, mean_absolute_difference, quantile,
};
use crate::engine::measure::{HISTORY_WINDOW, LinkQuality, RouteHistory};
use crate::engine::types::Timestamp;

/// The newest accepted advertisement of one link, as seen from its sending end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkFact {
    /// What was advertised.
    pub quality: LinkQuality,
    /// When it was accepted here.
    pub accepted_at: Timestamp,
}

const MICROS_PER_DAY: u64 = 86_400_000_000;

/// Features of a route at `now`.
///
/// `links` holds one entry a hop, `None` where no advertisement is known; one unknown link makes
/// all link features [`MISSING`]. `history` is `None` for a route that was never probed.
pub fn route_features(
    links: &[Option<LinkFact>],
    history: Option<&RouteHistory>,
    now: Timestamp,
) -> FeatureVector {
    let mut features = [MISSING; FEATURES.len()];
    let mut set = |name: &str, value: Option<f64>| {
        if let (Some(index), Some(value)) = (index_of(name), value) {
            features[index] = value;
        }
    };

    set("hop_count", Some(links.len() as f64));
    let facts: Option<Vec<LinkFact>> = links.iter().copied().collect();
    let rtt_sum = facts.as_ref().map(|facts| facts.iter().map(|f| f.quality.rtt_ms).sum::<f64>());
    if let Some(facts) = &facts {
        let sum = |value: fn(&LinkQuality) -> f64| facts.iter().map(|f| value(&f.quality)).sum();
        let max = |value: fn(&LinkQuality) -> f64| {
            facts.iter().map(|f| value(&f.quality)).fold(0.0, f64::max)
        };
        set("link_rtt_sum_ms", rtt_sum);
        set("link_rtt_max_ms", Some(max(|q| q.rtt_ms)));
        set("link_jitter_sum_ms", Some(sum(|q| q.jitter_ms)));
        let delivered: f64 = facts.iter().map(|f| 1.0 - f.quality.loss).product();
        set("link_loss", Some(1.0 - delivered));
        let bandwidths = facts.iter().filter_map(|f| f.quality.bandwidth);
        set("link_bandwidth_min", bandwidths.reduce(f64::min));
        set("link_utilisation_max", Some(max(|q| q.utilisation)));
        let oldest = facts.iter().map(|f| f.accepted_at).min();
        set("link_age_max_s", oldest.map(|at| now.since(at).as_micros() as f64 / 1e6));
    }

    if let Some(history) = history {
        let newest = history.rtts_ms(HISTORY_WINDOW);
        let last = newest.last().copied();
        set("route_last_ms", last);
        set("route_p10_ms", quantile(&newest, 0.1));
        set("route_median_ms", quantile(&newest, 0.5));
        set("route_p90_ms", quantile(&newest, 0.9));
        set("route_jitter_ms", mean_absolute_difference(&newest));
        set("route_loss", Some(history.loss()));
        set("route_failure_streak", Some(f64::from(history.failure_streak())));
        set("route_age_s", Some(now.since(history.last_done_at()).as_micros() as f64 / 1e6));
        let (mean5, mean20) = (mean(&newest[newest.len().saturating_sub(5)..]), mean(&newest));
        set("route_mean5_ms", mean5);
        set("route_mean20_ms", mean20);
        set("route_trend_ln", last.zip(mean5).map(|(last, mean)| ln_ratio(last, mean)));
        set("route_drift_ln", mean5.zip(mean20).map(|(short, long)| ln_ratio(short, long)));
        set("route_residual_ms", last.zip(rtt_sum).map(|(last, sum)| last - sum));
    }

    let share_of_day = (now.as_micros() % MICROS_PER_DAY) as f64 / MICROS_PER_DAY as f64;
    let angle = share_of_day * std::f64::consts::TAU;
    set("hour_sin", Some(angle.sin()));
    set("hour_cos", Some(angle.cos()));
    features
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::RouteHistories;
    use crate::engine::types::{NodeId, Route};

    fn at(features: &FeatureVector, name: &str) -> f64 {
        features[index_of(name).unwrap()]
    }

    #[test]
    fn an_unknown_route_has_only_hops_and_time() {
        let features = route_features(&[None, None], None, Timestamp(21_600_000_000));
        assert_eq!(at(&features, "hop_count"), 2.0);
        assert!((at(&features, "hour_sin") - 1.0).abs() < 1e-12, "06:00 is a quarter turn");
        assert_eq!(features.iter().filter(|value| **value == MISSING).count(), 20);
    }

    #[test]
    fn link_and_route_features_of_known_values() {
        let fact = |rtt_ms, loss, bandwidth, at| {
            Some(LinkFact {
                quality: LinkQuality { rtt_ms, jitter_ms: 1.0, loss, bandwidth, utilisation: 0.25 },
                accepted_at: Timestamp(at),
            })
        };
        let route = Route::new([NodeId([1; 8]), NodeId([2; 8]), NodeId([3; 8])]).unwrap();
        let mut histories = RouteHistories::default();
        for (at, rtt) in [(1, Some(40_000)), (2, Some(50_000)), (3, None)] {
            histories.probed(&route, Timestamp(at * 1_000_000), rtt);
        }
        let features = route_features(
            &[fact(10.0, 0.5, Some(5e5), 1_000_000), fact(20.0, 0.5, None, 3_000_000)],
            histories.of(&route),
            Timestamp(4_000_000),
        );
        for (name, value) in [
            ("link_rtt_sum_ms", 30.0),
            ("link_rtt_max_ms", 20.0),
            ("link_jitter_sum_ms", 2.0),
            ("link_loss", 0.75),
            ("link_bandwidth_min", 5e5),
            ("link_utilisation_max", 0.25),
            ("link_age_max_s", 3.0),
            ("route_last_ms", 50.0),
            ("route_mean5_ms", 45.0),
            ("route_median_ms", 45.0),
            ("route_jitter_ms", 10.0),
            ("route_loss", 1.0 / 3.0),
            ("route_failure_streak", 1.0),
            ("route_age_s", 1.0),
            ("route_residual_ms", 20.0),
            ("route_trend_ln", (50.0_f64 / 45.0).ln()),
            ("route_drift_ln", 0.0),
        ] {
            assert!((at(&features, name) - value).abs() < 1e-12, "{name}");
        }
    }
}
