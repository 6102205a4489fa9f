//! Split-conformal intervals and the measure that they are compared by.

use crate::engine::predict::Interval;

/// A residual on the ln scale and how far off such forecasts are expected to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scored {
    /// Truth minus forecast.
    pub(super) residual: f64,
    /// Above 0.
    pub(super) scale: f64,
}

/// The interval that holds `coverage` of the residuals, in units of scale (normalised conformal
/// prediction; Lei et al., 2018, section 5.2), with separate tails: each end lies at rank
/// `ceil((n + 1) q)` of its side, which is the finite-sample correction.
pub(super) fn conformal(rows: &[Scored], coverage: f64) -> Interval {
    let mut ratios: Vec<f64> = rows.iter().map(|row| row.residual / row.scale).collect();
    ratios.sort_by(f64::total_cmp);
    let count = ratios.len();
    let q = 1.0 - (1.0 - coverage) / 2.0;
    let rank = (((count + 1) as f64 * q).ceil() as usize).clamp(1, count.max(1));
    let at = |index: usize| ratios.get(index).copied().unwrap_or(0.0);
    Interval { coverage, low: at(count.saturating_sub(rank)), high: at(rank - 1) }
}

/// How an interval did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Held {
    /// Share of rows inside, 0 to 1.
    pub(super) coverage: f64,
    /// Mean width (ln units).
    pub(super) width: f64,
    /// Mean interval score: the width, plus `2 / (1 - coverage)` times the distance of what lies
    /// outside (Gneiting and Raftery, 2007, section 6.2). Smaller is better, and the best is the
    /// interval whose coverage is right in every condition, not only on average.
    pub(super) score: f64,
}

/// Measures an interval on rows; all zero without any.
pub(super) fn held(interval: &Interval, rows: &[Scored]) -> Held {
    let penalty = 2.0 / (1.0 - interval.coverage);
    let mut sum = Held::default();
    for Scored { residual, scale } in rows {
        let (low, high) = (interval.low * scale, interval.high * scale);
        let outside = (low - residual).max(residual - high).max(0.0);
        sum.coverage += f64::from(u8::from(outside == 0.0));
        sum.width += high - low;
        sum.score += high - low + penalty * outside;
    }
    let count = rows.len().max(1) as f64;
    Held { coverage: sum.coverage / count, width: sum.width / count, score: sum.score / count }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(residuals: impl Iterator<Item = f64>) -> Vec<Scored> {
        residuals.map(|residual| Scored { residual, scale: 1.0 }).collect()
    }

    #[test]
    fn conformal_ranks_are_those_of_the_paper() {
        // 19 residuals at 90 %: rank ceil(20 * 0.95) = 19 from each side.
        let interval = conformal(&plain((1..=19).map(f64::from)), 0.9);
        assert_eq!((interval.low, interval.high), (1.0, 19.0));
        // 99: rank 95.
        let interval = conformal(&plain((1..=99).map(f64::from).rev()), 0.9);
        assert_eq!((interval.low, interval.high), (5.0, 95.0));
        // 25: rank ceil(26 * 0.95) = 25, not ceil(25 * 0.95) = 24.
        let interval = conformal(&plain((1..=25).map(f64::from)), 0.9);
        assert_eq!((interval.low, interval.high), (1.0, 25.0));
        let nothing = conformal(&[], 0.9);
        assert_eq!((nothing.low, nothing.high), (0.0, 0.0));
    }

    #[test]
    fn the_scale_is_the_unit_of_the_interval() {
        let rows: Vec<Scored> = (1..=99)
            .map(|rank| {
                let scale = if rank % 2 == 0 { 10.0 } else { 0.1 };
                Scored { residual: f64::from(rank - 50) * scale, scale }
            })
            .collect();
        let interval = conformal(&rows, 0.9);
        assert_eq!((interval.low, interval.high), (-45.0, 45.0));
        let constant: Vec<Scored> = rows.iter().map(|row| Scored { scale: 1.0, ..*row }).collect();
        let (own, other) = (held(&interval, &rows), held(&conformal(&constant, 0.9), &constant));
        assert!(own.score < 0.7 * other.score, "{own:?} {other:?}");
    }

    #[test]
    fn a_held_interval_of_known_values() {
        let interval = Interval { coverage: 0.9, low: -1.0, high: 2.0 };
        let rows = [
            Scored { residual: 0.0, scale: 1.0 },
            Scored { residual: 2.0, scale: 1.0 },
            Scored { residual: 5.0, scale: 2.0 },
            Scored { residual: -1.5, scale: 1.0 },
        ];
        let held = held(&interval, &rows);
        assert_eq!((held.coverage, held.width), (0.5, (3.0 + 3.0 + 6.0 + 3.0) / 4.0));
        assert!((held.score - (15.0 + 20.0 * (1.0 + 0.5)) / 4.0).abs() < 1e-9, "{held:?}");
    }
}
