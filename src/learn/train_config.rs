//! How to train.

use super::regressor::Boosting;
use super::{LearnError, registry};
use crate::engine::predict::Reference;

/// How to train.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// Decides which rows each tree sees.
    pub seed: u64,
    /// Share of rows to calibrate on, 0.05 to 0.45.
    pub calibrate_share: f64,
    /// Share of rows to test on, the newest, 0.05 to 0.45.
    pub test_share: f64,
    /// Trees of a regression head, 1 to 1,000.
    pub trees: usize,
    /// Depth of a tree, 1 to 8.
    pub depth: u16,
    /// Weight of each tree, above 0, at most 1.
    pub learning_rate: f64,
    /// Fewest rows in a leaf, 1 or more; with many rows it is 2 per mille of a tree's rows.
    pub min_child_weight: usize,
    /// Share of rows that each tree sees, above 0, at most 1 (Friedman, 2002).
    pub subsample: f64,
    /// What the latency trees predict the distance from; `None` chooses.
    pub reference: Option<Reference>,
    /// Only the newest so many rows are used.
    pub rows_max: usize,
    /// Name of the version; `None` makes one of time and content.
    pub version: Option<String>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            calibrate_share: 0.2,
            test_share: 0.2,
            trees: 100,
            depth: 4,
            learning_rate: 0.1,
            min_child_weight: 5,
            subsample: 0.5,
            reference: None,
            rows_max: 50_000,
            version: None,
        }
    }
}

impl TrainConfig {
    /// Whether all parameters are in range.
    ///
    /// # Errors
    /// [`LearnError::Config`], [`LearnError::VersionName`].
    pub(super) fn check(&self) -> Result<(), LearnError> {
        let unit = |value: f64| value > 0.0 && value <= 1.0;
        let held = |share: f64| (0.05..=0.45).contains(&share);
        let (calibrate, test) = (self.calibrate_share, self.test_share);
        let (rate, subsample) = (self.learning_rate, self.subsample);
        let trees = (1..=1_000).contains(&self.trees);
        let latency = [Reference::LastValue, Reference::MovingAverage, Reference::Level];
        let reference = self.reference.is_none_or(|reference| latency.contains(&reference));
        let checks = [
            ("calibrate_share", calibrate.to_string(), "0.05 to 0.45", held(calibrate)),
            ("test_share", test.to_string(), "0.05 to 0.45", held(test)),
            ("trees", self.trees.to_string(), "1 to 1000", trees),
            ("depth", self.depth.to_string(), "1 to 8", (1..=8).contains(&self.depth)),
            ("learning_rate", rate.to_string(), "above 0 and at most 1", unit(rate)),
            ("min_child_weight", "0".into(), "1 or more", self.min_child_weight >= 1),
            ("subsample", subsample.to_string(), "above 0 and at most 1", unit(subsample)),
            ("reference", format!("{:?}", self.reference), "a latency", reference),
        ];
        for (name, value, range, good) in checks {
            if !good {
                return Err(LearnError::Config { name, value, range });
            }
        }
        self.version.as_deref().map_or(Ok(()), registry::check_version)
    }

    /// The part that the regressor needs.
    pub(super) fn boosting(&self) -> Boosting {
        Boosting {
            seed: self.seed,
            trees: self.trees,
            depth: self.depth,
            learning_rate: self.learning_rate,
            leaf_rows_min: self.min_child_weight,
            subsample: self.subsample,
            clip: f64::INFINITY,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_out_of_range_are_named() {
        let default = TrainConfig::default;
        default().check().unwrap();
        for (name, config) in [
            ("trees", TrainConfig { trees: 0, ..default() }),
            ("depth", TrainConfig { depth: 9, ..default() }),
            ("learning_rate", TrainConfig { learning_rate: f64::NAN, ..default() }),
            ("subsample", TrainConfig { subsample: 1.5, ..default() }),
            ("calibrate_share", TrainConfig { calibrate_share: 0.5, ..default() }),
            ("test_share", TrainConfig { test_share: 0.0, ..default() }),
            ("reference", TrainConfig { reference: Some(Reference::Zero), ..default() }),
            ("min_child_weight", TrainConfig { min_child_weight: 0, ..default() }),
        ] {
            let error = config.check().unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
        let config = TrainConfig { version: Some("../x".into()), ..default() };
        assert!(matches!(config.check(), Err(LearnError::VersionName(_))));
    }
}
