//! The online mix: forecasts of the model and of the baselines, weighted by how well each did of
//! late, so that a model that turns bad costs little.
//!
//! The rule is AdaHedge (de Rooij, van Erven, Gruenwald and Koolen, 2014, "Follow the leader if
//! you can, hedge if you must") with all sums forgotten by [`MEMORY`] a round. An expert's weight
//! is proportional to `exp(-rate * its discounted loss)`, and the rate is `ln EXPERTS` over the
//! discounted sum of *mixability gaps*: how much the weighted mean loss exceeded
//! `-ln(sum of weight * exp(-rate * loss)) / rate`. While the experts agree the gaps are small and
//! the rate is high; where they differ it adapts by itself, whether errors are 1 % or 50 %.
//!
//! The loss is the distance between forecast and truth on the ln scale. A round in which every
//! expert is off by more than a factor e, as at a time-out, teaches nothing and is not counted. So
//! that one wild forecast cannot do much, experts are brought to within [`SPREAD_MAX`] of the
//! moving average. An expert without a forecast is given the mix's own loss in that round
//! (Freund, Schapire, Singer and Warmuth, 1997).
//!
//! **The guarantee.** After any sequence, the summed loss of the mix exceeds that of each expert,
//! the moving average among them, by at most [`Mix::slack`] = 2 * the sum of the gaps so far.
//! Why: the regret of AdaHedge is at most twice its summed gaps, whatever the range of the losses
//! (section 2 of the paper). Dividing round `t` by `MEMORY^t` turns the forgetful rule into
//! AdaHedge on growing losses, so that each discounted regret is at most twice the discounted
//! gaps. A plain sum is the discounted one plus `1 - MEMORY` times all discounted ones before it,
//! of regrets and of gaps alike. The slack is thus measured while it arises. A gap is at most the
//! spread of the losses in its round, at most an eighth of the rate times that spread squared
//! (Hoeffding), and 0 while the weight lies on one expert.

/// What is mixed, in the order of the arrays.
pub const EXPERTS: [&str; 4] = ["model", "moving-average", "last-value", "level"];
/// Position of the moving average.
const MOVING_AVERAGE: usize = 1;
/// What is left of the sums after a round: about the last 50 observations count.
pub const MEMORY: f64 = 0.98;
/// Furthest that an expert may be from the moving average (ln units): a factor e.
pub const SPREAD_MAX: f64 = 1.0;
/// A truth further than this from every forecast (ln units) is not learned from.
pub const LOSS_MAX: f64 = 1.0;

const COUNT: usize = EXPERTS.len();

/// Weights of the experts for one stream of forecasts, such as those of the routes to one node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    /// Discounted loss of each expert.
    losses: [f64; COUNT],
    /// Discounted sum of the mixability gaps.
    gaps: f64,
    /// Plain sum of the mixability gaps.
    gaps_all: f64,
    /// Plain sum of the mix's losses less those of the moving average.
    excess: f64,
    /// Rounds that were counted.
    rounds: u64,
}

impl Default for Mix {
    fn default() -> Self {
        Self::new()
    }
}

impl Mix {
    /// Equal weights.
    pub fn new() -> Self {
        Self { losses: [0.0; COUNT], gaps: 0.0, gaps_all: 0.0, excess: 0.0, rounds: 0 }
    }

    /// Weights of the experts in the order of [`EXPERTS`]; they sum to 1.
    pub fn weights(&self) -> [f64; COUNT] {
        self.weights_at(self.rate())
    }

    /// Learning rate; infinite until the experts have differed.
    fn rate(&self) -> f64 {
        (COUNT as f64).ln() / self.gaps
    }

    fn weights_at(&self, rate: f64) -> [f64; COUNT] {
        let best = self.losses.iter().copied().fold(f64::INFINITY, f64::min);
        let weight = |loss: f64| {
            // At an infinite rate the best share everything.
            if loss == best { 1.0 } else { (-rate * (loss - best)).exp() }
        };
        let weights = self.losses.map(weight);
        let sum: f64 = weights.iter().sum();
        weights.map(|weight| weight / sum)
    }

    /// The mixed forecast (ln unit) of forecasts (ln unit) in the order of [`EXPERTS`]; `None`
    /// when nobody has one.
    pub fn combine(&self, ln_forecasts: [Option<f64>; COUNT]) -> Option<f64> {
        mean(&self.weights(), &tamed(ln_forecasts))
    }

    /// What became of forecasts, the same that [`Mix::combine`] was given.
    pub fn observe(&mut self, ln_truth: f64, ln_forecasts: [Option<f64>; COUNT]) {
        let losses = tamed(ln_forecasts).map(|forecast| Some((forecast? - ln_truth).abs()));
        let least = losses.iter().flatten().copied().fold(f64::INFINITY, f64::min);
        if !ln_truth.is_finite() || least > LOSS_MAX {
            return;
        }
        // What is known fades before the round is judged; that changes no weight.
        let faded =
            Self { losses: self.losses.map(|sum| MEMORY * sum), gaps: MEMORY * self.gaps, ..*self };
        let rate = faded.rate();
        let weights = faded.weights_at(rate);
        let Some(own) = mean(&weights, &losses) else { return };
        let said = mean(&weights, &tamed(ln_forecasts)).map_or(own, |ln| (ln - ln_truth).abs());
        let excess = said - losses[MOVING_AVERAGE].unwrap_or(said);
        let losses = losses.map(|loss| loss.unwrap_or(own));
        // The mix loss at an infinite rate is the least loss of those with weight.
        let awake = losses.iter().zip(weights).filter(|(_, weight)| *weight > 0.0);
        let least = awake.map(|(loss, _)| *loss).fold(f64::INFINITY, f64::min);
        let mixed = if rate.is_finite() {
            let terms = losses.iter().zip(weights);
            let sum: f64 =
                terms.map(|(loss, weight)| weight * (-rate * (loss - least)).exp()).sum();
            least - sum.ln() / rate
        } else {
            least
        };
        let gap = (own - mixed).max(0.0);
        let summed = std::array::from_fn(|expert| faded.losses[expert] + losses[expert]);
        *self = Self {
            losses: summed,
            gaps: faded.gaps + gap,
            gaps_all: self.gaps_all + gap,
            excess: self.excess + excess,
            rounds: self.rounds + 1,
        };
    }

    /// By how much the summed loss of the mix can exceed that of any expert so far (ln units).
    pub fn slack(&self) -> f64 {
        2.0 * self.gaps_all
    }

    /// By how much the summed loss of the mix does exceed the moving average's so far (ln units), at
    /// most [`Mix::slack`]; below 0 when the mix did better.
    pub fn excess(&self) -> f64 {
        self.excess
    }

    /// Forecasts so far whose truth was learned from.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }
}

/// Forecasts that are numbers, brought to within [`SPREAD_MAX`] of the moving average, or of the
/// first there is.
fn tamed(ln_forecasts: [Option<f64>; COUNT]) -> [Option<f64>; COUNT] {
    let known = ln_forecasts.map(|forecast| forecast.filter(|ln| ln.is_finite()));
    let centre = known[MOVING_AVERAGE].or_else(|| known.iter().rev().copied().flatten().next());
    let Some(centre) = centre else { return known };
    known.map(|forecast| Some(forecast?.clamp(centre - SPREAD_MAX, centre + SPREAD_MAX)))
}

/// Weighted mean over the values that are known.
fn mean(weights: &[f64; COUNT], values: &[Option<f64>; COUNT]) -> Option<f64> {
    let (mut sum, mut weight_sum, mut plain, mut count) = (0.0, 0.0, 0.0, 0.0);
    for (weight, value) in weights.iter().zip(values) {
        let Some(value) = value else { continue };
        sum += weight * value;
        weight_sum += weight;
        plain += value;
        count += 1.0;
    }
    if count == 0.0 {
        None
    } else if weight_sum > 0.0 {
        Some(sum / weight_sum)
    } else {
        // All weight lies on experts that are silent now.
        Some(plain / count)
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    const ROUNDS: usize = 2_000;

    /// Summed losses of the mix and of each expert, and the mix.
    fn play(
        seed: u64,
        mut draw: impl FnMut(usize, &mut Pcg64Mcg) -> (f64, [Option<f64>; COUNT]),
    ) -> (f64, [f64; COUNT], Mix) {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let mut mix = Mix::new();
        let (mut own, mut others) = (0.0, [0.0; COUNT]);
        for round in 0..ROUNDS {
            let (truth, forecasts) = draw(round, &mut random);
            let weights = mix.weights();
            assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{weights:?}");
            let loss = (mix.combine(forecasts).unwrap() - truth).abs();
            own += loss;
            for (sum, forecast) in others.iter_mut().zip(forecasts) {
                *sum += forecast.map_or(loss, |forecast| (forecast - truth).abs());
            }
            mix.observe(truth, forecasts);
        }
        (own, others, mix)
    }

    fn noise(random: &mut Pcg64Mcg, width: f64) -> f64 {
        random.random_range(-width..width)
    }

    #[test]
    fn the_mix_is_never_worse_than_any_expert_by_more_than_the_slack() {
        type Draw = fn(usize, &mut Pcg64Mcg) -> (f64, [Option<f64>; COUNT]);
        // Name, sequence, and the most that the mix may exceed the moving average by, a round.
        let worlds: [(&str, Draw, f64); 7] = [
            (
                "the model is always right",
                |_, random| {
                    (3.0, [Some(3.0), Some(3.0 + noise(random, 0.2)), Some(3.2), Some(2.9)])
                },
                0.0,
            ),
            (
                "the model is always bad",
                |_, random| {
                    (3.0, [Some(3.9), Some(3.0 + noise(random, 0.05)), Some(3.3), Some(3.4)])
                },
                0.005,
            ),
            (
                "good, then bad",
                |round, random| {
                    let off = if round < ROUNDS / 2 { 0.0 } else { 0.8 };
                    (3.0, [Some(3.0 + off), Some(3.0 + noise(random, 0.1)), Some(3.3), Some(3.3)])
                },
                0.0,
            ),
            (
                "the model turns with every round",
                |round, random| {
                    let off = if round % 2 == 0 { 0.0 } else { 0.4 };
                    (3.0, [Some(3.0 + off), Some(3.1 + noise(random, 0.05)), Some(3.2), Some(3.2)])
                },
                0.02,
            ),
            (
                "whoever did best is wrong next",
                |round, _| {
                    let off = |expert: usize| if round % COUNT == expert { 0.0 } else { 0.5 };
                    (3.0, std::array::from_fn(|expert| Some(3.0 + off(expert))))
                },
                0.12,
            ),
            (
                "bursts of a wild model, silent at times",
                |round, random| {
                    let model = if random.random_bool(0.3) {
                        None
                    } else {
                        Some(3.0 + noise(random, 0.02))
                    };
                    let wild = (round / 100) % 2 == 1;
                    let model = if wild { model.map(|_| 9.0) } else { model };
                    (
                        3.0,
                        [
                            model,
                            Some(3.0 + noise(random, 0.1)),
                            Some(3.0 + noise(random, 0.2)),
                            None,
                        ],
                    )
                },
                0.03,
            ),
            (
                "tiny errors",
                |_, random| {
                    (3.0, [Some(3.001), Some(3.0 + noise(random, 0.004)), Some(3.01), Some(3.0)])
                },
                0.0,
            ),
        ];
        for (world, draw, slack_a_round) in worlds {
            for seed in 0..5 {
                let (own, others, mix) = play(seed, draw);
                let slack = mix.slack();
                assert!(mix.excess() <= slack && mix.rounds() > 0, "{world}: {mix:?}");
                for (name, other) in EXPERTS.iter().zip(others) {
                    // In the world of wild models their own loss is not what they are charged.
                    assert!(own <= other + slack + 1e-9, "{world}: {own} {name} {other} {slack}");
                }
                let average = others[MOVING_AVERAGE];
                assert!((mix.excess() - (own - average)).abs() < 1e-9, "{world}: {mix:?}");
                let over = (own - average) / ROUNDS as f64;
                assert!(over <= slack_a_round, "{world}: {over} a round, {own} {average}");
            }
        }
    }

    #[test]
    fn the_best_expert_gets_the_weight_and_loses_it_when_it_turns_bad() {
        let mut mix = Mix::new();
        assert_eq!(mix.weights(), [0.25; COUNT]);
        let forecasts = |model| [Some(model), Some(3.1), Some(3.2), Some(2.8)];
        for _ in 0..100 {
            mix.observe(3.0, forecasts(3.0));
        }
        assert!(mix.weights()[0] > 0.9, "{:?}", mix.weights());
        let mut rounds = 0;
        while mix.weights()[0] > 0.1 {
            mix.observe(3.0, forecasts(3.6));
            rounds += 1;
        }
        assert!(rounds < 40, "{rounds}");
    }

    #[test]
    fn silence_wild_forecasts_and_time_outs_do_no_harm() {
        let mut mix = Mix::new();
        assert_eq!(mix.combine([None; COUNT]), None);
        mix.observe(3.0, [None; COUNT]);
        assert_eq!(mix, Mix::new());
        let alone = [None, None, Some(2.5), None];
        assert_eq!(mix.combine(alone), Some(2.5));
        let wild = [Some(1e300), Some(3.0), Some(f64::NAN), None];
        assert_eq!(mix.combine(wild), Some(3.5), "brought to a factor e of the average");
        mix.observe(3.0, wild);
        let before = mix;
        mix.observe(9.0, [Some(3.0), Some(3.1), Some(3.0), Some(3.0)]);
        mix.observe(f64::NAN, [Some(3.0); COUNT]);
        assert_eq!(mix, before, "nobody could have known");
        // All weight on experts that are silent now.
        for _ in 0..500 {
            mix.observe(3.0, [Some(3.0), Some(3.5), None, None]);
        }
        let left = mix.combine([None, Some(3.5), None, None]).unwrap();
        assert!((left - 3.5).abs() < 1e-12, "{left}");
    }
}
