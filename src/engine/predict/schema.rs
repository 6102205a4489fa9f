//! The feature schema: names, order, units, missing values. One list for both sides.
//!
//! The engine computes these online ([`super::route_features`]), `learn` computes them offline
//! from the store with polars; a test draws random histories and compares. A model carries
//! [`schema_hash`] and is refused under another schema.

use sha2::{Digest, Sha256};

/// Stands for "not known". Far outside the range of every feature, because the tree learner
/// cannot order NaN.
pub const MISSING: f64 = -1_000_000.0;

/// Features of a route at one moment, in the order of [`FEATURES`].
pub type FeatureVector = [f64; FEATURES.len()];

/// One feature.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// Column name; ends in its unit.
    pub name: &'static str,
    /// What it says.
    pub meaning: &'static str,
}

const fn feature(name: &'static str, meaning: &'static str) -> Feature {
    Feature { name, meaning }
}

/// All features, in order. Appending or changing one changes [`schema_hash`].
pub const FEATURES: [Feature; 88] = [
    feature("hop_count", "links of the route"),
    feature("link_last_sum_ms", "sum over the links: last value advertised RTT"),
    feature("link_mean5_sum_ms", "sum over the links: mean of the last 5 advertised RTTs"),
    feature("link_mean20_sum_ms", "sum over the links: mean of the last 20 advertised RTTs"),
    feature("link_mean60_sum_ms", "sum over the links: mean of the last 60 advertised RTTs"),
    feature("link_median3_sum_ms", "sum over the links: median of the last 3 advertised RTTs"),
    feature(
        "link_p10_5_sum_ms",
        "sum over the links: 10th percentile of the last 5 advertised RTTs",
    ),
    feature(
        "link_p25_5_sum_ms",
        "sum over the links: 25th percentile of the last 5 advertised RTTs",
    ),
    feature("link_median_5_sum_ms", "sum over the links: median of the last 5 advertised RTTs"),
    feature(
        "link_p90_5_sum_ms",
        "sum over the links: 90th percentile of the last 5 advertised RTTs",
    ),
    feature(
        "link_p10_20_sum_ms",
        "sum over the links: 10th percentile of the last 20 advertised RTTs",
    ),
    feature(
        "link_p25_20_sum_ms",
        "sum over the links: 25th percentile of the last 20 advertised RTTs",
    ),
    feature("link_median_20_sum_ms", "sum over the links: median of the last 20 advertised RTTs"),
    feature(
        "link_p90_20_sum_ms",
        "sum over the links: 90th percentile of the last 20 advertised RTTs",
    ),
    feature(
        "link_p10_60_sum_ms",
        "sum over the links: 10th percentile of the last 60 advertised RTTs",
    ),
    feature(
        "link_p25_60_sum_ms",
        "sum over the links: 25th percentile of the last 60 advertised RTTs",
    ),
    feature("link_median_60_sum_ms", "sum over the links: median of the last 60 advertised RTTs"),
    feature(
        "link_p90_60_sum_ms",
        "sum over the links: 90th percentile of the last 60 advertised RTTs",
    ),
    feature(
        "link_error60_sum_ms",
        "sum over the links: standard error of the mean of the last 60 advertised RTTs",
    ),
    feature(
        "link_deviation5_sum_ms",
        "sum over the links: standard deviation of the last 5 advertised RTTs",
    ),
    feature(
        "link_deviation60_sum_ms",
        "sum over the links: standard deviation of the last 60 advertised RTTs",
    ),
    feature("link_min60_sum_ms", "sum over the links: smallest of the last 60 advertised RTTs"),
    feature("link_last_max_ms", "largest last advertised link RTT"),
    feature("link_queueing_sum_ms", "sum of the link RTTs above their smallest of the last 60"),
    feature("link_queueing_max_ms", "largest link RTT above its smallest of the last 60"),
    feature(
        "link_reverse_sum_ms",
        "sum of the last RTTs that the far ends advertise for the links",
    ),
    feature("link_jitter_sum_ms", "sum of the advertised link jitters"),
    feature("link_loss", "1 - product of (1 - advertised link loss)"),
    feature("link_bandwidth_min", "smallest advertised bandwidth (bytes/s)"),
    feature("link_utilisation_max", "largest advertised utilisation"),
    feature("link_age_max_s", "age of the oldest advertisement on the route"),
    feature("link_count_min", "fewest advertisements of a link so far, at most 60"),
    feature("link_withdrawals_max", "most withdrawals of a link among its last 60 changes"),
    feature("link_failure_age_min_s", "time since the last withdrawal of a link on the route"),
    feature("link_trend_ln", "ln of the summed last over the summed mean of the last 5"),
    feature("link_drift_ln", "ln of the summed mean of the last 5 over that of the last 60"),
    feature(
        "link_spread_ln",
        "ln of the summed 90th percentile over the summed median, of the last 20",
    ),
    feature("link_median_20_max_ms", "largest median of the last 20 advertised RTTs of a link"),
    feature(
        "link_p90_20_max_ms",
        "largest 90th percentile of the last 20 advertised RTTs of a link",
    ),
    feature(
        "link_error60_max_ms",
        "largest standard error of the mean of the last 60 advertised RTTs of a link",
    ),
    feature("link_jitter_max_ms", "largest advertised link jitter"),
    feature("link_loss_max", "largest advertised link loss"),
    feature(
        "link_failure_streak_max",
        "most advertisements of a link in a row, up to now, that told of losses or withdrew it, at most 60",
    ),
    feature("link_utilisation_sum", "sum of the advertised utilisations"),
    feature("link_age_sum_s", "sum of the ages of the links' advertisements"),
    feature(
        "link_measured_age_max_s",
        "longest time since the advertised RTT of a link was another than before",
    ),
    feature(
        "link_measured_age_sum_s",
        "sum over the links: time since the advertised RTT was another than before",
    ),
    feature(
        "link_reverse_median_20_sum_ms",
        "sum over the links: median of the last 20 RTTs that the far ends advertise",
    ),
    feature("link_reverse_loss", "1 - product of (1 - loss that the far ends advertise)"),
    feature("link_reverse_utilisation_max", "largest utilisation that the far ends advertise"),
    feature(
        "node_deviation_max_ln",
        "largest median, over the links of a sender on the route, of ln(last / median of 20)",
    ),
    feature("credibility_min", "smallest credibility of an advertiser on the route, 0 to 1"),
    feature("coordinate_sum_ms", "sum of the links' RTTs by network coordinates"),
    feature("coordinate_direct_ms", "RTT between the ends by network coordinates"),
    feature("route_last_ms", "end to end: last value answered"),
    feature("route_mean5_ms", "end to end: mean of the last 5 answered"),
    feature("route_mean20_ms", "end to end: mean of the last 20 answered"),
    feature("route_mean60_ms", "end to end: mean of the last 60 answered"),
    feature("route_median3_ms", "end to end: median of the last 3 answered"),
    feature("route_p10_5_ms", "end to end: 10th percentile of the last 5 answered"),
    feature("route_p25_5_ms", "end to end: 25th percentile of the last 5 answered"),
    feature("route_median_5_ms", "end to end: median of the last 5 answered"),
    feature("route_p90_5_ms", "end to end: 90th percentile of the last 5 answered"),
    feature("route_p10_20_ms", "end to end: 10th percentile of the last 20 answered"),
    feature("route_p25_20_ms", "end to end: 25th percentile of the last 20 answered"),
    feature("route_median_20_ms", "end to end: median of the last 20 answered"),
    feature("route_p90_20_ms", "end to end: 90th percentile of the last 20 answered"),
    feature("route_p10_60_ms", "end to end: 10th percentile of the last 60 answered"),
    feature("route_p25_60_ms", "end to end: 25th percentile of the last 60 answered"),
    feature("route_median_60_ms", "end to end: median of the last 60 answered"),
    feature("route_p90_60_ms", "end to end: 90th percentile of the last 60 answered"),
    feature("route_error60_ms", "end to end: standard error of the mean of the last 60 answered"),
    feature("route_deviation5_ms", "end to end: standard deviation of the last 5 answered"),
    feature("route_deviation60_ms", "end to end: standard deviation of the last 60 answered"),
    feature("route_min60_ms", "end to end: smallest of the last 60 answered"),
    feature("route_above_min_ms", "last answered RTT above the smallest of the last 60"),
    feature("route_jitter_ms", "mean absolute difference within the last 20 answered"),
    feature("route_loss", "share lost of the last 20 completed"),
    feature("route_failure_streak", "lost in a row up to now"),
    feature("route_failure_age_s", "time since the last lost probe"),
    feature("route_age_s", "time since the last completed probe"),
    feature("route_count", "completed probes so far, at most 60"),
    feature("route_residual_ms", "last answered RTT minus the sum of the links"),
    feature("route_trend_ln", "ln of the last answered over the mean of the last 5"),
    feature("route_drift_ln", "ln of the mean of the last 5 over the mean of the last 60"),
    feature("route_spread_ln", "ln of the 90th percentile over the median, of the last 20"),
    feature("hour_sin", "sine of the UTC time of day"),
    feature("hour_cos", "cosine of the UTC time of day"),
];

/// First feature of the statistics over links; those of [`STATISTICS`] follow in order.
///
/// [`STATISTICS`]: crate::engine::measure::STATISTICS
pub const LINK_STATISTICS: usize = index("link_last_sum_ms");
/// First feature of the statistics over the route's own history.
pub const ROUTE_STATISTICS: usize = index("route_last_ms");

/// Among the statistics, the median of the last 20.
pub const MEDIAN_20: usize = index("link_median_20_sum_ms") - LINK_STATISTICS;
/// Statistics whose maximum over the links is a feature, too: the position among the statistics, and
/// that feature.
pub const MAXIMA: [(usize, usize); 3] = [
    (MEDIAN_20, index("link_median_20_max_ms")),
    (index("link_p90_20_sum_ms") - LINK_STATISTICS, index("link_p90_20_max_ms")),
    (index("link_error60_sum_ms") - LINK_STATISTICS, index("link_error60_max_ms")),
];

/// Position of a feature that is known to exist; a name that does not exist fails to compile
/// where the result is a constant.
pub const fn index(name: &str) -> usize {
    let name = name.as_bytes();
    let mut at = 0;
    while at < FEATURES.len() {
        let other = FEATURES[at].name.as_bytes();
        let mut byte = 0;
        while byte < name.len() && byte < other.len() && name[byte] == other[byte] {
            byte += 1;
        }
        if byte == name.len() && byte == other.len() {
            return at;
        }
        at += 1;
    }
    panic!("no such feature")
}

/// Position of a feature by name.
pub fn index_of(name: &str) -> Option<usize> {
    FEATURES.iter().position(|feature| feature.name == name)
}

/// The first 16 hexadecimal digits of the SHA-256 over all names, meanings and the missing
/// value.
pub fn schema_hash() -> String {
    let mut hasher = Sha256::new();
    for feature in FEATURES {
        hasher.update(feature.name);
        hasher.update([0]);
        hasher.update(feature.meaning);
        hasher.update([0]);
    }
    hasher.update(MISSING.to_le_bytes());
    hasher.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for (index, feature) in FEATURES.iter().enumerate() {
            assert_eq!(index_of(feature.name), Some(index));
        }
        assert_eq!(schema_hash().len(), 16);
    }
}
