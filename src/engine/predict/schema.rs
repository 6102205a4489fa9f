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
pub const FEATURES: [Feature; 23] = [
    feature("hop_count", "links of the route"),
    feature("link_rtt_sum_ms", "sum of the advertised link RTTs"),
    feature("link_rtt_max_ms", "largest advertised link RTT"),
    feature("link_jitter_sum_ms", "sum of the advertised link jitters"),
    feature("link_loss", "1 - product of (1 - advertised link loss)"),
    feature("link_bandwidth_min", "smallest advertised bandwidth (bytes/s)"),
    feature("link_utilisation_max", "largest advertised utilisation"),
    feature("link_age_max_s", "age of the oldest advertisement on the route"),
    feature("route_last_ms", "last answered end-to-end RTT"),
    feature("route_mean5_ms", "mean of the last 5 answered"),
    feature("route_mean20_ms", "mean of the last 20 answered"),
    feature("route_p10_ms", "10th percentile of the last 20 answered"),
    feature("route_median_ms", "median of the last 20 answered"),
    feature("route_p90_ms", "90th percentile of the last 20 answered"),
    feature("route_jitter_ms", "mean absolute difference within the last 20 answered"),
    feature("route_loss", "share lost of the last 20 completed"),
    feature("route_failure_streak", "lost in a row up to now"),
    feature("route_age_s", "time since the last completed probe"),
    feature("route_residual_ms", "last answered RTT minus the sum of the links"),
    feature("route_trend_ln", "ln of the last answered over the mean of the last 5"),
    feature("route_drift_ln", "ln of the mean of the last 5 over the mean of the last 20"),
    feature("hour_sin", "sine of the UTC time of day"),
    feature("hour_cos", "cosine of the UTC time of day"),
];

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
