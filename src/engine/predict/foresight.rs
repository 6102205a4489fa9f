//! How much of what a model foresees comes true.
//!
//! A forecast that lies beyond the level of the newest round trips foresees a change. What routes are
//! compared by holds such a change as far as changes that were foreseen came true beyond what the blend
//! ([`super::Centre::Blend`]) says without it: the slope, through zero, of (truth - blend) over
//! (forecast - level), both as shares of the blend, by least squares. A model that only follows noise has
//! a slope of 0, and then decides nothing.

use super::ranking::Prospect;

/// What is left of the sums after an observation: about the last 2,000 count.
const MEMORY: f64 = 0.9995;
/// Largest change that counts, as a share of the blend, so that one outlier cannot do much.
pub const CHANGE_MAX: f64 = 0.5;
/// Sum of squared changes that a slope of 0 counts for, until more is known: 50 of a twentieth.
const DOUBT: f64 = 50.0 * 0.05 * 0.05;

/// See the module documentation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Foresight {
    /// Sum of products of what was foreseen and what came, and of squares of what was foreseen.
    together: f64,
    alone: f64,
}

impl Foresight {
    /// The share that comes true, 0 to 1.
    pub fn weight(&self) -> f64 {
        (self.together / (self.alone + DOUBT)).clamp(0.0, 1.0)
    }

    /// A route then took so long (ms). Where no model made a forecast nothing is learned.
    pub fn observe(&mut self, prospect: &Prospect, truth_ms: f64) {
        let [forecast, level, _, _, blend] = prospect.centre_ms;
        let share = |ms: f64| (ms / blend).clamp(-CHANGE_MAX, CHANGE_MAX);
        let (foreseen, came) = (share(forecast - level), share(truth_ms - blend));
        if prospect.foresight.is_some() && foreseen.is_finite() && came.is_finite() {
            self.together = MEMORY * self.together + foreseen * came;
            self.alone = MEMORY * self.alone + foreseen * foreseen;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(comes_true: impl Fn(usize) -> f64) -> f64 {
        let mut foresight = Foresight::default();
        for at in 0..4_000 {
            let change = if at % 2 == 0 { 10.0 } else { -10.0 };
            let prospect =
                Prospect::certain(100.0, 0.0).foreseeing(100.0 + change, None, Some(0.0));
            foresight.observe(&prospect, 100.0 + change * comes_true(at));
        }
        foresight.weight()
    }

    #[test]
    fn the_weight_is_the_share_that_comes_true() {
        assert_eq!(Foresight::default().weight(), 0.0, "nothing came true yet");
        assert!((observed(|_| 0.3) - 0.3).abs() < 0.01, "{}", observed(|_| 0.3));
        assert!(observed(|_| 1.0) > 0.99);
        assert!(observed(|at| if at % 4 < 2 { 3.0 } else { -3.0 }) < 0.05, "noise");
        assert_eq!(observed(|_| -1.0), 0.0, "the opposite came");
        let mut foresight = Foresight::default();
        foresight.observe(&Prospect::certain(1.0, 0.0), 2.0);
        let nothing = Prospect { foresight: Some(1.0), ..Prospect::default() };
        foresight.observe(&nothing, f64::NAN);
        assert_eq!(foresight, Foresight::default());
    }
}
