//! Features online: what the engine knows of a route right now, as numbers.

use super::schema::{
    FEATURES, FeatureVector, LINK_STATISTICS, MAXIMA, MEDIAN_20, MISSING, ROUTE_STATISTICS, index,
};
use crate::engine::measure::window_statistics::ln_ratio;
use crate::engine::measure::{LinkHistories, LinkHistory, RouteHistory, STATISTICS, WINDOW};
use crate::engine::types::{Route, Timestamp};

const MICROS_PER_DAY: u64 = 86_400_000_000;

/// Features of a route at `now`. `history` is `None` for a route that was never probed.
///
/// A link that its sender does not advertise is described by what its far end advertises; when
/// neither does, all features of the links are [`MISSING`].
pub fn route_features(
    route: &Route,
    links: &LinkHistories,
    history: Option<&RouteHistory>,
    now: Timestamp,
) -> FeatureVector {
    let mut features = [MISSING; FEATURES.len()];
    features[const { index("hop_count") }] = route.hop_count() as f64;
    let hops: Option<Vec<&LinkHistory>> = route
        .links()
        .map(|(a, b)| {
            let live = |link: &&LinkHistory| link.quality().is_some();
            links.link(a, b).filter(live).or_else(|| links.link(b, a).filter(live))
        })
        .collect();
    if let Some(hops) = &hops {
        link_features(&mut features, hops, now);
    }
    reverse_features(&mut features, route, links);
    node_features(&mut features, route, links);
    if let Some(history) = history {
        history_features(&mut features, history, now);
    }
    let share_of_day = (now.as_micros() % MICROS_PER_DAY) as f64 / MICROS_PER_DAY as f64;
    let angle = share_of_day * std::f64::consts::TAU;
    features[const { index("hour_sin") }] = angle.sin();
    features[const { index("hour_cos") }] = angle.cos();
    features
}

fn seconds(now: Timestamp, then: Timestamp) -> f64 {
    now.since(then).as_micros() as f64 / 1e6
}

/// The advertised qualities and the statistics of all links.
fn link_features(features: &mut FeatureVector, hops: &[&LinkHistory], now: Timestamp) {
    let mut sums = [0.0; STATISTICS.len()];
    let (mut last_max, mut queueing_sum, mut queueing_max) = (0.0_f64, 0.0, 0.0_f64);
    let (mut jitter_sum, mut delivered, mut utilisation_max) = (0.0, 1.0, 0.0_f64);
    let (mut age_max, mut count_min, mut withdrawals_max) = (0.0_f64, WINDOW, 0);
    let mut maxima = [0.0_f64; MAXIMA.len()];
    let (mut jitter_max, mut loss_max, mut streak_max) = (0.0_f64, 0.0_f64, 0);
    let (mut utilisation_sum, mut age_sum) = (0.0, 0.0);
    let (mut measured_age_sum, mut measured_age_max) = (0.0, 0.0_f64);
    let (mut bandwidth_min, mut failure_age_min) = (f64::INFINITY, f64::INFINITY);
    for hop in hops {
        let (Some(statistics), Some(quality)) = (hop.statistics(), hop.quality()) else { return };
        for (sum, value) in sums.iter_mut().zip(statistics.values) {
            *sum += value;
        }
        for (most, (statistic, _)) in maxima.iter_mut().zip(MAXIMA) {
            *most = most.max(statistics.values[statistic]);
        }
        let last = statistics.values[0];
        let queueing = last - statistics.values[STATISTICS.len() - 1];
        last_max = last_max.max(last);
        queueing_sum += queueing;
        queueing_max = queueing_max.max(queueing);
        jitter_sum += quality.jitter_ms;
        jitter_max = jitter_max.max(quality.jitter_ms);
        loss_max = loss_max.max(quality.loss);
        streak_max = streak_max.max(hop.failure_streak());
        delivered *= 1.0 - quality.loss;
        utilisation_max = utilisation_max.max(quality.utilisation);
        bandwidth_min = quality.bandwidth.map_or(bandwidth_min, |b| bandwidth_min.min(b));
        utilisation_sum += quality.utilisation;
        let (age, measured_age) = (seconds(now, hop.changed_at()), seconds(now, hop.measured_at()));
        (age_max, age_sum) = (age_max.max(age), age_sum + age);
        measured_age_max = measured_age_max.max(measured_age);
        measured_age_sum += measured_age;
        count_min = count_min.min(statistics.count);
        withdrawals_max = withdrawals_max.max(hop.withdrawals());
        if let Some(at) = hop.withdrawn_at() {
            failure_age_min = failure_age_min.min(seconds(now, at));
        }
    }
    features[LINK_STATISTICS..][..STATISTICS.len()].copy_from_slice(&sums);
    features[const { index("link_last_max_ms") }] = last_max;
    features[const { index("link_queueing_sum_ms") }] = queueing_sum;
    features[const { index("link_queueing_max_ms") }] = queueing_max;
    features[const { index("link_jitter_sum_ms") }] = jitter_sum;
    features[const { index("link_loss") }] = 1.0 - delivered;
    features[const { index("link_utilisation_max") }] = utilisation_max;
    if bandwidth_min.is_finite() {
        features[const { index("link_bandwidth_min") }] = bandwidth_min;
    }
    features[const { index("link_age_max_s") }] = age_max;
    features[const { index("link_count_min") }] = count_min as f64;
    features[const { index("link_withdrawals_max") }] = withdrawals_max as f64;
    if failure_age_min.is_finite() {
        features[const { index("link_failure_age_min_s") }] = failure_age_min;
    }
    for (most, (_, feature)) in maxima.into_iter().zip(MAXIMA) {
        features[feature] = most;
    }
    features[const { index("link_jitter_max_ms") }] = jitter_max;
    features[const { index("link_loss_max") }] = loss_max;
    features[const { index("link_failure_streak_max") }] = streak_max as f64;
    features[const { index("link_utilisation_sum") }] = utilisation_sum;
    features[const { index("link_age_sum_s") }] = age_sum;
    features[const { index("link_measured_age_max_s") }] = measured_age_max;
    features[const { index("link_measured_age_sum_s") }] = measured_age_sum;
    let [trend, drift, spread] = shape(features, LINK_STATISTICS);
    features[const { index("link_trend_ln") }] = trend;
    features[const { index("link_drift_ln") }] = drift;
    features[const { index("link_spread_ln") }] = spread;
}

/// What the far ends advertise of the links; nothing when one of them advertises nothing.
fn reverse_features(features: &mut FeatureVector, route: &Route, links: &LinkHistories) {
    let (mut last_sum, mut median_sum) = (0.0, 0.0);
    let (mut delivered, mut utilisation_max) = (1.0, 0.0_f64);
    for (a, b) in route.links() {
        let said = links.link(b, a).and_then(|link| Some((link.quality()?, link.statistics()?)));
        let Some((quality, statistics)) = said else { return };
        last_sum += quality.rtt_ms;
        median_sum += statistics.values[MEDIAN_20];
        delivered *= 1.0 - quality.loss;
        utilisation_max = utilisation_max.max(quality.utilisation);
    }
    features[const { index("link_reverse_sum_ms") }] = last_sum;
    features[const { index("link_reverse_median_20_sum_ms") }] = median_sum;
    features[const { index("link_reverse_loss") }] = 1.0 - delivered;
    features[const { index("link_reverse_utilisation_max") }] = utilisation_max;
}

/// What the neighbourhood says: the advertisers, the coordinates.
fn node_features(features: &mut FeatureVector, route: &Route, links: &LinkHistories) {
    let senders = || route.links().map(|(sender, _)| sender);
    if let Some(most) = senders().filter_map(|node| links.deviation_ln(node)).reduce(f64::max) {
        features[const { index("node_deviation_max_ln") }] = most;
    }
    if let Some(least) = senders().filter_map(|node| links.credibility(node)).reduce(f64::min) {
        features[const { index("credibility_min") }] = least;
    }
    let coordinates = links.coordinates();
    if let Some(sum) = route.links().map(|(a, b)| coordinates.rtt_ms(a, b)).sum::<Option<f64>>() {
        features[const { index("coordinate_sum_ms") }] = sum;
    }
    if let Some(direct) = coordinates.rtt_ms(route.source(), route.destination()) {
        features[const { index("coordinate_direct_ms") }] = direct;
    }
}

/// What the route itself delivered.
fn history_features(features: &mut FeatureVector, history: &RouteHistory, now: Timestamp) {
    features[const { index("route_loss") }] = history.loss();
    features[const { index("route_failure_streak") }] = f64::from(history.failure_streak());
    features[const { index("route_age_s") }] = seconds(now, history.last_done_at());
    features[const { index("route_count") }] = history.completed().min(WINDOW as u64) as f64;
    if let Some(at) = history.lost_at() {
        features[const { index("route_failure_age_s") }] = seconds(now, at);
    }
    if let Some(jitter) = history.jitter_ms() {
        features[const { index("route_jitter_ms") }] = jitter;
    }
    let Some(statistics) = history.statistics() else { return };
    features[ROUTE_STATISTICS..][..STATISTICS.len()].copy_from_slice(&statistics.values);
    let (last, min) = (statistics.values[0], statistics.values[STATISTICS.len() - 1]);
    features[const { index("route_above_min_ms") }] = last - min;
    let claimed = features[LINK_STATISTICS];
    if claimed != MISSING {
        features[const { index("route_residual_ms") }] = last - claimed;
    }
    let [trend, drift, spread] = shape(features, ROUTE_STATISTICS);
    features[const { index("route_trend_ln") }] = trend;
    features[const { index("route_drift_ln") }] = drift;
    features[const { index("route_spread_ln") }] = spread;
}

/// Last over mean of 5, mean of 5 over mean of 60, 90th percentile over median of 20, each ln, of
/// the statistics that begin at `first`.
fn shape(features: &FeatureVector, first: usize) -> [f64; 3] {
    let of = |link: usize| features[first + link - LINK_STATISTICS];
    let mean5 = of(const { index("link_mean5_sum_ms") });
    [
        ln_ratio(of(const { index("link_last_sum_ms") }), mean5),
        ln_ratio(mean5, of(const { index("link_mean60_sum_ms") })),
        ln_ratio(
            of(const { index("link_p90_20_sum_ms") }),
            of(const { index("link_median_20_sum_ms") }),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::{LinkQuality, RouteHistories};
    use crate::engine::predict::schema::index_of;
    use crate::engine::types::NodeId;

    fn at(features: &FeatureVector, name: &str) -> f64 {
        features[index_of(name).unwrap()]
    }

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    fn route() -> Route {
        Route::new([node(1), node(2), node(3)]).unwrap()
    }

    #[test]
    fn the_statistics_stand_in_the_order_of_the_schema() {
        for (offset, name) in STATISTICS.iter().enumerate() {
            assert_eq!(FEATURES[LINK_STATISTICS + offset].name, format!("link_{name}_sum_ms"));
            assert_eq!(FEATURES[ROUTE_STATISTICS + offset].name, format!("route_{name}_ms"));
        }
        assert_eq!((STATISTICS[0], STATISTICS[STATISTICS.len() - 1]), ("last", "min60"));
    }

    #[test]
    fn an_unknown_route_has_only_hops_and_time() {
        let links = LinkHistories::default();
        let features = route_features(&route(), &links, None, Timestamp(21_600_000_000));
        assert_eq!(at(&features, "hop_count"), 2.0);
        assert!((at(&features, "hour_sin") - 1.0).abs() < 1e-12, "06:00 is a quarter turn");
        let missing = features.iter().filter(|value| **value == MISSING).count();
        assert_eq!(missing, FEATURES.len() - 3);
    }

    #[test]
    fn link_and_route_features_of_known_values() {
        let quality = |rtt_ms, bandwidth| {
            Some(LinkQuality { rtt_ms, jitter_ms: 1.0, loss: 0.5, bandwidth, utilisation: 0.25 })
        };
        let mut links = LinkHistories::default();
        let first = [(node(2), quality(8.0, None))];
        links.advertised(node(1), Timestamp(500_000), first);
        links.advertised(node(1), Timestamp(600_000), [(node(2), None)]);
        let again = [(node(2), quality(12.0, Some(5e5)))];
        links.advertised(node(1), Timestamp(1_000_000), again);
        // The second link only its far end advertises.
        links.advertised(node(3), Timestamp(3_000_000), [(node(2), quality(20.0, None))]);
        let mut histories = RouteHistories::default();
        for (at, rtt) in [(1, Some(40_000)), (2, Some(50_000)), (3, None)] {
            histories.probed(&route(), Timestamp(at * 1_000_000), rtt);
        }
        let now = Timestamp(4_000_000);
        let features = route_features(&route(), &links, histories.of(&route()), now);
        for (name, value) in [
            ("link_last_sum_ms", 32.0),
            ("link_last_max_ms", 20.0),
            ("link_mean5_sum_ms", 30.0),
            ("link_queueing_sum_ms", 4.0),
            ("link_queueing_max_ms", 4.0),
            ("link_jitter_sum_ms", 2.0),
            ("link_jitter_max_ms", 1.0),
            ("link_median_20_max_ms", 20.0),
            ("link_p90_20_max_ms", 20.0),
            ("link_error60_max_ms", 2.0_f64.sqrt()),
            ("link_loss_max", 0.5),
            ("link_failure_streak_max", 3.0),
            ("link_utilisation_sum", 0.5),
            ("link_age_sum_s", 4.0),
            ("link_measured_age_max_s", 3.0),
            ("link_measured_age_sum_s", 4.0),
            ("link_loss", 0.75),
            ("link_bandwidth_min", 5e5),
            ("link_utilisation_max", 0.25),
            ("link_age_max_s", 3.0),
            ("link_count_min", 1.0),
            ("link_withdrawals_max", 1.0),
            ("link_failure_age_min_s", 3.4),
            ("link_trend_ln", (32.0_f64 / 30.0).ln()),
            ("node_deviation_max_ln", (12.0_f64 / 10.0).ln()),
            ("route_last_ms", 50.0),
            ("route_mean5_ms", 45.0),
            ("route_median_20_ms", 45.0),
            ("route_above_min_ms", 10.0),
            ("route_jitter_ms", 10.0),
            ("route_loss", 1.0 / 3.0),
            ("route_failure_streak", 1.0),
            ("route_failure_age_s", 1.0),
            ("route_age_s", 1.0),
            ("route_count", 3.0),
            ("route_residual_ms", 18.0),
            ("route_trend_ln", (50.0_f64 / 45.0).ln()),
            ("route_drift_ln", 0.0),
        ] {
            assert!((at(&features, name) - value).abs() < 1e-12, "{name}: {}", at(&features, name));
        }
        for name in ["link_reverse_sum_ms", "link_reverse_median_20_sum_ms", "link_reverse_loss"] {
            assert_eq!(at(&features, name), MISSING, "nobody says 2 to 1");
        }
        links.advertised(node(2), now, [(node(1), quality(7.0, None))]);
        let features = route_features(&route(), &links, None, now);
        for (name, value) in [
            ("link_reverse_sum_ms", 27.0),
            ("link_reverse_median_20_sum_ms", 27.0),
            ("link_reverse_loss", 0.75),
            ("link_reverse_utilisation_max", 0.25),
        ] {
            assert!((at(&features, name) - value).abs() < 1e-12, "{name}: {}", at(&features, name));
        }
        assert!(at(&features, "coordinate_sum_ms") > 0.0);
    }
}
