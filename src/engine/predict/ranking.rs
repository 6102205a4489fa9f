//! How forecasts become a choice, and how the rule for that is chosen on what happened.
//!
//! The lowest of many noisy forecasts is too low (the optimiser's curse; Smith and Winkler,
//! 2006), so routes are compared by a bound, which may be pessimistic, on what is forecast or on what is believed,
//! and another route must beat the direct one, or the one in use, by a margin. How pessimistic and which margin is right depends on the
//! network: the [`RankingTuner`] replays every [`Ranking`] of a small grid on choices whose outcomes
//! became known, and keeps the one that would have cost least among those that seldom do harm; training does the same with the rules
//! about forecasts on the rows that it calibrates on.

use serde::{Deserialize, Serialize};

use super::foresight::CHANGE_MAX;
use super::ledger::{Ledger, Paid};
use super::model::RTT_MS_MIN;
use crate::engine::measure::worth::VOLATILITY_MAX;

/// What a route's bound is built on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Centre {
    /// The forecast: right in the median, follows changes.
    Forecast,
    /// The robust level, as [`super::Level`].
    Level,
    /// The mean, drawn towards what is usual in this network as far as the link is little known
    /// ([`super::posterior`]): right where outliers are the cost.
    Mean,
    /// The larger of last value and level: leaves at the first bad value, returns with the level.
    Cautious,
    /// Between level and plain mean, as far as the newest values lie closer together than all, and
    /// than is usual at the link's ends: a new level counts at once, one of the outliers that come
    /// again does not ([`blend_ms`]).
    Blend,
}

/// Centres that a route can be compared by.
pub const CENTRES_COUNT: usize = 5;
/// Position of each centre in a [`Prospect`].
const CENTRES: [Centre; CENTRES_COUNT] =
    [Centre::Forecast, Centre::Level, Centre::Mean, Centre::Cautious, Centre::Blend];
/// What a steady link's values differ by all the same (share): a floor under deviations that are
/// compared. A guess; nothing depends on it where values differ at all.
const STEADY_SHARE: f64 = 0.003;

/// What [`Centre::Blend`] is for one link. All in ms, 0 or more: its robust level, the mean and
/// the deviation of all values, the deviation of the newest ones, and the usual deviation of the
/// links of its noisier end.
///
/// With deviations d, the level's share is d_all^2 / (d_all^2 + d_newest^2 + d_end^2): a half on a
/// quiet link, near one after a lasting change, a third at a loaded node, whose spikes come again
/// and count, because the cost of a route is linear in them. On later frames of the PlanetLab trace
/// this saved more than level or mean alone, each with its best multiple of the deviation.
pub fn blend_ms(level: f64, mean: f64, all: f64, newest: f64, end: f64) -> f64 {
    let all = all.powi(2) + (STEADY_SHARE * level).powi(2);
    let share = all / (all + newest.powi(2) + end.powi(2)).max(f64::MIN_POSITIVE);
    share * level + (1.0 - share) * mean
}
/// Multiples of the spread that are tried.
pub const PESSIMISMS: [f64; 5] = [0.0, 0.25, 0.5, 1.0, 2.0];
/// Margins that are tried; 1: stay for ever.
pub const MARGINS: [f64; 8] = [0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 1.0];
/// Weights of staleness that are tried.
const STALENESSES: [f64; 3] = [0.0, 0.02, 0.1];
/// Intervals of silence beyond which a link grows no staler.
pub const STALE_INTERVALS_MAX: f64 = 300.0;
/// Choices with known outcome before the tuner trusts them more than the default.
pub const CHOICES_MIN: u32 = 500;
/// Beyond this share above what the direct route cost, a choice has done harm.
const HARM_SHARE: f64 = 0.1;
/// Choices of one block, of a replay and of a node: a quarter of an hour of tunnels to one destination.
const BLOCK_CHOICES: u32 = 300;
const BLOCK_CHOICES_NODE: u32 = 25;
/// Standard errors by which a rule's saving must be sure. The best of hundreds of rules is two better by luck:
/// on the Seattle trace with a budget, what was taken with 2 was worse than the first rule in two of five seeds. What
/// four cost is time: on the carriers' trace no other rule was taken at all.
const SURENESS: f64 = 4.0;

/// A rule that turns forecasts into a choice.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ranking {
    /// What the bound is built on.
    pub centre: Centre,
    /// Spreads added to the centre before routes are compared; 0 to 10.
    pub pessimism: f64,
    /// Share that each usual interval of silence beyond the first adds to a link, because silence
    /// is a sign; 0 to 1.
    pub staleness: f64,
    /// Share by which another route's bound must lie below that of the route to stay on; 0 to 1.
    pub margin: f64,
}

impl Default for Ranking {
    fn default() -> Self {
        Self { centre: Centre::Blend, pessimism: 0.0, staleness: 0.02, margin: 0.005 }
    }
}

/// One route as the rules see it: for each [`Centre`] its value and its spread (ms).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prospect {
    /// In the order of [`Centre`]; above 0.
    pub centre_ms: [f64; CENTRES_COUNT],
    /// How far outcomes lie around each; 0 or more.
    pub spread_ms: [f64; CENTRES_COUNT],
    /// Weight of what the forecast foresees beyond the level, 0 to 1, which [`Centre::Blend`] adds; `None`
    /// where no model forecasts.
    pub foresight: Option<f64>,
    /// Sum over the links of their level times the usual intervals by which they are overdue, at
    /// most [`STALE_INTERVALS_MAX`].
    pub stale_ms: f64,
}

impl Ranking {
    /// The rule of a network before outcomes are known, by how much its links change from value to
    /// value (mean absolute ln ratio): where they hardly do, small gains are real; beyond
    /// [`VOLATILITY_MAX`] a tenth must be gained, by the mean that is
    /// believed. That belief is drawn towards the usual already, so that no pessimism is added to it: on the
    /// Seattle trace, halves of it and samples of its nodes, adding the doubt did more harm and gained less.
    pub fn of_volatility(volatility: f64) -> Self {
        if volatility <= VOLATILITY_MAX {
            return Self::default();
        }
        Self { centre: Centre::Mean, pessimism: 0.0, staleness: 0.0, margin: 0.1 }
    }

    /// Compares forecasts as they are: the rule of forecasters that do not say how far off they are.
    pub const PLAIN: Self =
        Self { centre: Centre::Forecast, pessimism: 0.0, staleness: 0.0, margin: 0.0 };

    /// The rule of a model for which none was chosen. The pessimism was chosen on the PlanetLab and
    /// Seattle traces: a quarter to a half of the deviation did best on both.
    pub const FORECAST: Self = Self { pessimism: 0.25, ..Self::PLAIN };

    /// The bound (ms) by which this rule compares a route, [`RTT_MS_MIN`] or more.
    pub fn bound_ms(&self, prospect: &Prospect) -> f64 {
        let index = CENTRES.iter().position(|centre| *centre == self.centre).unwrap_or(0);
        let [forecast, level, ..] = prospect.centre_ms;
        let centre = prospect.centre_ms[index];
        let foreseen = match self.centre {
            Centre::Blend => {
                let most = CHANGE_MAX * centre;
                prospect.foresight.unwrap_or(0.0) * (forecast - level).clamp(-most, most)
            }
            _ => 0.0,
        };
        let spread = self.pessimism * prospect.spread_ms[index];
        (centre + foreseen + spread + self.staleness * prospect.stale_ms).max(RTT_MS_MIN)
    }

    /// Index of the route to take: the lowest bound, unless the route to stay on (the direct one,
    /// or where there is none the one in use) is not beaten by the margin. `None` without routes.
    pub fn choose(&self, prospects: &[Prospect], stay: Option<usize>) -> Option<usize> {
        let bounds = prospects.iter().map(|prospect| self.bound_ms(prospect)).enumerate();
        let (best, bound) = bounds.min_by(|(_, a), (_, b)| a.total_cmp(b))?;
        match stay {
            Some(at) if bound >= self.bound_ms(&prospects[at]) * (1.0 - self.margin) => Some(at),
            _ => Some(best),
        }
    }
}

fn grid(stalenesses: &[f64], margins: &[f64]) -> Vec<Ranking> {
    let mut rules = Vec::new();
    for centre in CENTRES {
        for pessimism in PESSIMISMS {
            for staleness in stalenesses {
                for margin in margins {
                    let (staleness, margin) = (*staleness, *margin);
                    rules.push(Ranking { centre, pessimism, staleness, margin });
                }
            }
        }
    }
    rules
}

/// Finds the rule that would have cost least.
#[derive(Clone, Debug)]
pub struct RankingTuner(Ledger);

impl Default for RankingTuner {
    fn default() -> Self {
        Self::new(Ranking::default())
    }
}

impl RankingTuner {
    /// Has seen nothing; `fallback` is the rule to use until another surely did better.
    pub fn new(fallback: Ranking) -> Self {
        Self(Ledger::new(grid(&STALENESSES, &MARGINS), fallback, BLOCK_CHOICES))
    }

    /// The same for a node: without staleness, as silent links are withdrawn; without a margin that
    /// nothing can beat, as tunnels without a direct route would never leave what they were on first.
    pub fn of_node(fallback: Ranking) -> Self {
        let margins = &MARGINS[..MARGINS.len() - 1];
        Self(Ledger::new(grid(&[0.0], margins), fallback, BLOCK_CHOICES_NODE))
    }

    /// Changes the fallback, unless another rule has replaced it by then. What was learned beside the
    /// one before is forgotten.
    pub fn set_fallback(&mut self, fallback: Ranking) {
        let before = self.0.default_rule();
        if fallback != before && self.best() == before {
            self.0 = self.0.beside(fallback);
        }
    }

    /// The outcomes (ms) of all routes of a choice became known; `direct` is the one beside which others do
    /// harm, if there is one.
    pub fn observe(
        &mut self,
        prospects: &[Prospect],
        stay: Option<usize>,
        direct: Option<usize>,
        outcomes_ms: &[f64],
    ) {
        if prospects.len() != outcomes_ms.len() || prospects.len() < 2 {
            return;
        }
        let direct_ms = direct.map_or(f64::INFINITY, |at| outcomes_ms[at]);
        self.0.add(|_, rule| {
            let cost = rule.choose(prospects, stay).map_or(0.0, |at| outcomes_ms[at]);
            Paid { cost, harm: cost > direct_ms * (1.0 + HARM_SHARE) }
        });
    }

    /// The choices of one moment are complete; a block ends with a moment, never within one.
    pub fn end_round(&mut self) {
        self.0.end_round();
    }

    /// What each rule paid so far.
    pub fn ledger(&self) -> &Ledger {
        &self.0
    }

    /// The rule that surely saved most against the fallback, once enough choices were seen; else
    /// the fallback.
    pub fn best(&self) -> Ranking {
        self.0.best(CHOICES_MIN, SURENESS)
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    fn prospect(centre_ms: f64, spread_ms: f64) -> Prospect {
        let centre_ms = [centre_ms; CENTRES_COUNT];
        Prospect { centre_ms, spread_ms: [spread_ms; CENTRES_COUNT], ..Prospect::default() }
    }

    #[test]
    fn the_direct_route_stays_until_it_is_beaten_by_the_margin() {
        let rule = Ranking { centre: Centre::Level, pessimism: 1.0, staleness: 0.0, margin: 0.1 };
        let direct = prospect(100.0, 0.0);
        let choose = |other| rule.choose(&[direct, other], Some(0));
        assert_eq!(choose(prospect(89.0, 0.0)), Some(1));
        assert_eq!(choose(prospect(91.0, 0.0)), Some(0));
        assert_eq!(choose(prospect(70.0, 25.0)), Some(0), "uncertain");
        assert_eq!(rule.choose(&[direct, prospect(99.0, 0.0)], None), Some(1));
        assert_eq!(rule.choose(&[], None), None);
    }

    #[test]
    fn a_lasting_change_counts_at_once_and_a_spike_at_a_loaded_node_does_not() {
        let blend = |newest, end| blend_ms(20.0, 50.0, 30.0, newest, end);
        assert!(blend(1.0, 0.0) < 20.1, "the newest agree: a new level");
        assert!((blend(30.0, 0.0) - 35.0).abs() < 0.1, "they differ as all do");
        assert!((blend(30.0, 30.0) - 40.0).abs() < 0.1, "and so do all links of that node");
        assert_eq!(blend_ms(20.0, 20.0, 0.0, 0.0, 0.0), 20.0);
        assert_eq!(blend_ms(0.0, 0.0, 0.0, 0.0, 0.0), 0.0, "no division by nothing");
    }

    #[test]
    fn where_forecasts_are_noise_the_tuner_learns_to_stay() {
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let mut tuner = RankingTuner::default();
        assert_eq!(tuner.best(), Ranking::default());
        for _ in 0..6_000 {
            // All relays cost 30 % more than the direct route; the forecasts are mostly noise.
            let mut prospects = vec![prospect(100.0, 5.0)];
            let mut outcomes = vec![100.0];
            for _ in 0..8 {
                prospects.push(prospect(130.0 * random.random_range(0.6..1.4), 5.0));
                outcomes.push(130.0);
            }
            tuner.observe(&prospects, Some(0), Some(0), &outcomes);
            tuner.end_round();
        }
        assert!(tuner.best().margin >= 0.2, "{:?}", tuner.best());
    }

    #[test]
    fn a_rule_that_saves_much_and_often_does_harm_is_not_taken() {
        let learned = |harm_every: usize| {
            let mut tuner = RankingTuner::new(Ranking { margin: 1.0, ..Ranking::default() });
            for round in 0..6_000 {
                let detour = if round % harm_every == 0 { 250.0 } else { 50.0 };
                let prospects = [prospect(200.0, 0.0), prospect(180.0, 0.0)];
                tuner.observe(&prospects, Some(0), Some(0), &[200.0, detour]);
                tuner.end_round();
            }
            tuner.best().margin
        };
        assert_eq!(learned(40), 1.0, "2.5 % of its choices");
        assert!(learned(60) < 0.1);
    }

    #[test]
    fn whatever_is_foreseen_a_bound_stays_above_0() {
        // A spiking route whose blend is far from its level already.
        let spiking = Prospect {
            centre_ms: [120.0, 550.0, 125.0, 700.0, 291.0],
            ..Prospect::certain(1.0, 0.0)
        };
        for foresight in [None, Some(0.5), Some(1.0)] {
            let prospect = Prospect { foresight, ..spiking };
            for rule in RankingTuner::default().ledger().rules() {
                let bound_ms = rule.bound_ms(&prospect);
                assert!(bound_ms >= 100.0, "{rule:?}: {bound_ms}");
            }
        }
        assert!(Ranking::default().bound_ms(&Prospect::default()) > 0.0);
    }

    #[test]
    fn a_volatile_network_begins_with_a_cautious_rule() {
        let cautious = Ranking::of_volatility(VOLATILITY_MAX + 0.01);
        assert!(cautious.margin > Ranking::of_volatility(VOLATILITY_MAX).margin);
        let mut tuner = RankingTuner::default();
        tuner.set_fallback(cautious);
        assert_eq!(tuner.best(), cautious);
        for _ in 0..6_000 {
            tuner.observe(
                &[prospect(100.0, 0.0), prospect(99.0, 0.0)],
                Some(0),
                Some(0),
                &[100.0, 50.0],
            );
            tuner.end_round();
        }
        let learned = tuner.best();
        assert!(learned.margin < 0.01, "{learned:?}");
        tuner.set_fallback(Ranking::default());
        assert_eq!(tuner.best(), learned, "outcomes count for more than volatility");
    }

    #[test]
    fn where_the_forecast_knows_more_than_the_level_it_is_followed() {
        let mut random = Pcg64Mcg::seed_from_u64(2);
        let mut tuner = RankingTuner::default();
        for _ in 0..6_000 {
            let truth: Vec<f64> = (0..4).map(|_| random.random_range(50.0..150.0)).collect();
            let prospects: Vec<Prospect> = truth
                .iter()
                .map(|ms| Prospect {
                    centre_ms: [*ms, 100.0, 100.0, 100.0, 100.0],
                    spread_ms: [1.0; CENTRES_COUNT],
                    ..Prospect::default()
                })
                .collect();
            tuner.observe(&prospects, Some(0), Some(0), &truth);
            tuner.end_round();
        }
        assert_eq!(tuner.best().centre, Centre::Forecast);
        assert!(tuner.best().margin < 0.05);
    }
}
