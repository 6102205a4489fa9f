//! What the features of the training data looked like, and how far newer ones are from that.
//!
//! The profile of a feature is its deciles on the training rows. The population stability index
//! compares shares of rows between those borders: `sum (new - old) ln(new / old)`. Above 0.25 is
//! commonly called a major shift (Siddiqi, "Credit Risk Scorecards", 2006). It is an alert for
//! people; what decides is the error.

use serde::{Deserialize, Serialize};

use super::schema::{FEATURES, FeatureVector, MISSING};

/// Intervals that the training rows are divided into.
pub const BINS: usize = 10;
/// Above this a feature has shifted.
pub const PSI_ALERT: f64 = 0.25;
/// A share that is empty counts as this much, or its logarithm would be infinite.
const SHARE_MIN: f64 = 1e-4;
/// The time of day always shifts between training and now, and means nothing by itself.
const NOT_COMPARED: [&str; 2] = ["hour_sin", "hour_cos"];

/// How one feature was distributed over the training rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureProfile {
    /// Inner borders of the intervals, ascending; fewer than 9 when many values are equal.
    pub borders: Vec<f64>,
    /// Share of rows in each interval, one more than borders; a value on a border belongs to the
    /// interval below it.
    pub shares: Vec<f64>,
    /// Share of rows on which the feature was not known.
    pub missing: f64,
}

impl FeatureProfile {
    /// Of the values of one feature.
    fn of(values: &[f64]) -> Self {
        let mut known: Vec<f64> = values.iter().copied().filter(|v| *v != MISSING).collect();
        known.sort_unstable_by(f64::total_cmp);
        let mut borders: Vec<f64> = Vec::new();
        for decile in 1..BINS {
            let Some(border) = known.get(known.len() * decile / BINS).copied() else { break };
            // The largest value as a border would leave an interval above it that nothing is in.
            if borders.last() != Some(&border) && known.last() != Some(&border) {
                borders.push(border);
            }
        }
        let (shares, missing) = shares(&borders, values);
        Self { borders, shares, missing }
    }

    /// Population stability index of other values of this feature, 0 or more.
    fn psi(&self, values: &[f64]) -> f64 {
        let (shares, missing) = shares(&self.borders, values);
        let pairs = self.shares.iter().copied().zip(shares).chain([(self.missing, missing)]);
        let term = |(old, new): (f64, f64)| {
            let (old, new) = (old.max(SHARE_MIN), new.max(SHARE_MIN));
            (new - old) * (new / old).ln()
        };
        pairs.map(term).sum()
    }
}

/// Share of values in each interval, and of missing ones.
fn shares(borders: &[f64], values: &[f64]) -> (Vec<f64>, f64) {
    let mut counts = vec![0_usize; borders.len() + 1];
    let mut missing = 0_usize;
    for value in values {
        if *value == MISSING {
            missing += 1;
        } else {
            counts[borders.partition_point(|border| border < value)] += 1;
        }
    }
    let share = |count: usize| count as f64 / values.len().max(1) as f64;
    (counts.into_iter().map(share).collect(), share(missing))
}

/// The profiles of all features, in schema order; empty without rows.
pub fn profile(rows: &[&FeatureVector]) -> Vec<FeatureProfile> {
    if rows.is_empty() {
        return Vec::new();
    }
    let column = |index: usize| rows.iter().map(|row| row[index]).collect::<Vec<f64>>();
    (0..FEATURES.len()).map(|index| FeatureProfile::of(&column(index))).collect()
}

/// Features whose index of these rows exceeds [`PSI_ALERT`], with it, the largest first. Empty
/// without rows, and for a profile of another number of features.
pub fn shifted(profiles: &[FeatureProfile], rows: &[&FeatureVector]) -> Vec<(&'static str, f64)> {
    if rows.is_empty() || profiles.len() != FEATURES.len() {
        return Vec::new();
    }
    let compared = FEATURES.iter().zip(profiles).enumerate();
    let mut found: Vec<(&'static str, f64)> = compared
        .filter(|(_, (feature, _))| !NOT_COMPARED.contains(&feature.name))
        .map(|(index, (feature, profile))| {
            let values: Vec<f64> = rows.iter().map(|row| row[index]).collect();
            (feature.name, profile.psi(&values))
        })
        .filter(|(_, psi)| *psi > PSI_ALERT)
        .collect();
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    found
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;
    use crate::engine::predict::schema::index_of;

    fn rows(seed: u64, fill: impl Fn(&mut FeatureVector, &mut Pcg64Mcg)) -> Vec<FeatureVector> {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let row = |_| {
            let mut row = [MISSING; FEATURES.len()];
            row[0] = f64::from(random.random_range(1..4_u8));
            row[1] = random.random_range(0.0..100.0);
            fill(&mut row, &mut random);
            row
        };
        (0..2_000).map(row).collect()
    }

    fn names(old: &[FeatureVector], new: &[FeatureVector]) -> Vec<&'static str> {
        let (old, new): (Vec<_>, Vec<_>) = (old.iter().collect(), new.iter().collect());
        shifted(&profile(&old), &new).into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn only_what_shifted_is_named() {
        let old = rows(1, |_, _| {});
        assert!(names(&old, &rows(2, |_, _| {})).is_empty());
        assert_eq!(names(&old, &rows(2, |row, _| row[1] += 60.0)), [FEATURES[1].name]);
        assert_eq!(names(&old, &rows(2, |row, _| row[1] = MISSING)), [FEATURES[1].name]);
        assert_eq!(names(&old, &rows(2, |row, _| row[0] = 1.0)), [FEATURES[0].name]);
        let hour = index_of("hour_sin").unwrap();
        assert!(names(&old, &rows(2, |row, _| row[hour] = 0.5)).is_empty());
    }

    #[test]
    fn a_known_index() {
        let old: Vec<f64> = (0..1_000).map(f64::from).collect();
        let profile = FeatureProfile::of(&old);
        assert_eq!((profile.borders.len(), profile.missing), (9, 0.0));
        assert!((profile.shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!(profile.psi(&old).abs() < 1e-12);
        // All in the lowest tenth (of which 101 of 1,000 values were): 0.899 ln(1/0.101), and nine
        // empty ones.
        let lowest = profile.psi(&[0.0; 50]);
        let empty: f64 =
            profile.shares[1..].iter().map(|old| (1e-4 - old) * (1e-4 / old).ln()).sum();
        let expected = (1.0 - 0.101) * (1.0_f64 / 0.101).ln() + empty;
        assert!((lowest - expected).abs() < 1e-9, "{lowest} {expected}");
    }

    #[test]
    fn constants_missing_values_and_nothing_are_profiled() {
        let constant = FeatureProfile::of(&[3.0; 10]);
        assert_eq!((constant.borders.len(), constant.shares.as_slice()), (0, &[1.0][..]));
        assert_eq!(FeatureProfile::of(&[MISSING; 4]).missing, 1.0);
        assert!(profile(&[]).is_empty());
        let row = [1.0; FEATURES.len()];
        assert!(shifted(&[], &[&row]).is_empty());
        assert!(shifted(&profile(&[&row]), &[]).is_empty());
    }
}
