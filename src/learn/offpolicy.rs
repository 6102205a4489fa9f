//! Judging a policy on decisions that another one made.
//!
//! A log tells the cost of what was chosen, never of what was not. With the probability that each
//! candidate had, the mean cost that another policy would have had on the same decisions can be
//! estimated all the same. With `w = target / propensity` of the chosen candidate:
//!
//! | estimate | formula | right when |
//! |---|---|---|
//! | direct method | mean of `sum target x predicted` | the direct model is right |
//! | IPS | mean of `w x cost` | the propensities are right |
//! | SNIPS | `sum w x cost / sum w` | the propensities are right and there are many decisions; steadier than IPS |
//! | doubly robust | mean of `sum target x predicted + w x (cost - predicted of the chosen)` | either is right |
//!
//! IPS is Horvitz and Thompson (1952), SNIPS Swaminathan and Joachims ("The self-normalized
//! estimator for counterfactual learning", 2015), doubly robust Dudik, Langford and Li (2011). The
//! effective sample size is Kish's (1965), `(sum w)^2 / sum w^2`: so many decisions of the judged
//! policy's own would tell as much.
//!
//! Each decision is judged alone: what a policy changes for the decisions after it (a switch not
//! made, a probe not sent) is not seen. Weights are never clipped, so that nothing here is biased
//! towards the policy that wrote the log.
//!
//! **Intervals** are of 95 %, for the mean cost on these same decisions. They are normal, moved out where the
//! terms are skewed (Hall, 1992, "On the removal of skewness by transformation": costs have long tails, and a
//! log that met few of the high ones says too little), with the larger of two standard errors. One is the deviation of the terms. Where exploration is rare it
//! is too small in just those logs that miss the rare, heavily weighted choices; the other one
//! therefore takes the spread of the weights from the propensities themselves (expected
//! `w^2 = sum target^2 / propensity`) and only the squared residual from the log. In simulated
//! worlds with an effective size of about 100 and three kinds of wrong direct model, the first
//! alone covered the truth in 82 to 97 % of runs and the larger of the two in 96 to 98 %;
//! percentile and studentised bootstraps, with two of the models, in 85 to 96 %. A test repeats
//! the part that is promised. The interval of the direct method is only the deviation over
//! decisions: it cannot know how wrong the model is.

use serde::Serialize;

/// Smallest effective size that is judged on. With fewer the normal approximation and the spread
/// of the residuals rest on a handful of decisions; the project's own limit.
pub const EFFECTIVE_SIZE_MIN: f64 = 100.0;
/// Largest share of the judged policy's choices that the log may never make. Each such choice
/// counts as free in IPS and rests on the model alone in doubly robust; a thousandth is below any
/// interval that such an effective size gives.
pub const UNSUPPORTED_MAX: f64 = 0.001;
/// What rounding may take from a sum of probabilities.
const SUM_TOLERANCE: f64 = 1e-6;
/// Standard errors on each side of a normal interval of 95 %.
const NORMAL_95: f64 = 1.959_964;
/// Skewness of a mean below which its distribution counts as normal.
const BEND_MIN: f64 = 1e-6;
/// What helps against a log without exploration.
const HOW_TO_EXPLORE: &str = "judge on a log whose policy gives every candidate a probability \
                              above 0: that of a node with 'learning.explore' above 0, or as \
                              'meshwise replay' draws them from a trace";

/// One decision of the log, with what is needed to judge another policy on it. The three lists
/// are of the same candidates in the same order.
#[derive(Clone, Debug, PartialEq)]
pub struct LoggedDecision {
    /// Probability of each candidate under the policy that wrote the log; sum 1.
    pub propensities: Vec<f64>,
    /// Index of the one that was chosen.
    pub chosen: usize,
    /// What the chosen one turned out to cost, such as ms; lower is better.
    pub cost: f64,
    /// Probability of each candidate under the policy to be judged; sum 1.
    pub target: Vec<f64>,
    /// The direct model's cost of each candidate, in the unit of `cost`. It must not have been
    /// fitted on this decision's own outcome.
    pub predicted: Vec<f64>,
}

/// A mean cost and its interval of 95 %, in the unit of the costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The estimate.
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// What the judged policy would have cost on the logged decisions, by each estimator.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimates {
    /// From the direct model alone.
    pub direct_method: Estimate,
    /// Inverse propensity score.
    pub ips: Estimate,
    /// Self-normalised inverse propensity score.
    pub snips: Estimate,
    /// Doubly robust: the one to quote.
    pub doubly_robust: Estimate,
    /// Kish's effective sample size, [`EFFECTIVE_SIZE_MIN`] to `decisions`.
    pub effective_sample_size: f64,
    /// Decisions judged on.
    pub decisions: usize,
}

/// A log on which this policy cannot be judged.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OffPolicyError {
    /// A decision contradicts itself.
    #[error("decision {index} cannot be used: {what}; correct it or leave it out")]
    Decision {
        /// Its index.
        index: usize,
        /// What is wrong with it.
        what: String,
    },
    /// The log could not have made the choices that it is to be judged by.
    #[error(
        "the log has no exploration: {percent:.1} % of the judged policy's choices in {decisions} \
         decisions had probability 0 there, so nothing is known of their outcome; {HOW_TO_EXPLORE}"
    )]
    NoExploration {
        /// Choices without support (%).
        percent: f64,
        /// Decisions in the log.
        decisions: usize,
    },
    /// The policies agree too seldom, or there are too few decisions.
    #[error(
        "{decisions} decisions with a choice are worth only {effective:.1} of its own, {needed} are \
         needed; log for longer, or with more exploration: start the node with 'learning.explore' above \
         0 (it is 0 by default, and then there is nothing to judge by)"
    )]
    TooFew {
        /// The effective sample size.
        effective: f64,
        /// [`EFFECTIVE_SIZE_MIN`].
        needed: f64,
        /// Decisions in the log.
        decisions: usize,
    },
}

/// Estimates the mean cost of the judged policy on the decisions of the log.
///
/// # Errors
/// [`OffPolicyError`], when the estimate would mean nothing.
pub fn judge(decisions: &[LoggedDecision]) -> Result<Estimates, OffPolicyError> {
    let mut terms = Vec::with_capacity(decisions.len());
    let mut unsupported = 0.0;
    for (index, decision) in decisions.iter().enumerate() {
        check(decision).map_err(|what| OffPolicyError::Decision { index, what })?;
        let pairs = decision.target.iter().zip(&decision.propensities);
        unsupported += pairs.filter(|(_, p)| **p == 0.0).map(|(target, _)| target).sum::<f64>();
        terms.push(Term::of(decision));
    }
    let count = decisions.len();
    let unsupported = unsupported / count.max(1) as f64;
    if unsupported > UNSUPPORTED_MAX {
        let percent = 100.0 * unsupported;
        return Err(OffPolicyError::NoExploration { percent, decisions: count });
    }
    let weights: f64 = terms.iter().map(|term| term.weight).sum();
    let squares: f64 = terms.iter().map(|term| term.weight * term.weight).sum();
    let effective = if squares > 0.0 { weights * weights / squares } else { 0.0 };
    if effective < EFFECTIVE_SIZE_MIN {
        let needed = EFFECTIVE_SIZE_MIN;
        return Err(OffPolicyError::TooFew { effective, needed, decisions: count });
    }

    let (direct, direct_variance) = moments(terms.iter().map(|term| term.direct));
    let snips = terms.iter().map(|term| term.weight * term.cost).sum::<f64>() / weights;
    let around_snips = weighted(&terms, |term| (0.0, term.cost - snips));
    Ok(Estimates {
        direct_method: interval(direct, direct_variance, count),
        ips: weighted(&terms, |term| (0.0, term.cost)),
        // What is estimated here is the distance from `snips`, which is 0.
        snips: Estimate {
            value: snips,
            low: snips + around_snips.low,
            high: snips + around_snips.high,
        },
        doubly_robust: weighted(&terms, |term| (term.direct, term.cost - term.predicted)),
        effective_sample_size: effective,
        decisions: count,
    })
}

/// Mean cost of what the log itself chose, of two decisions or more.
pub fn mean_cost(decisions: &[LoggedDecision]) -> Estimate {
    let (mean, variance) = moments(decisions.iter().map(|decision| decision.cost));
    interval(mean, variance, decisions.len())
}

/// What the estimators need of one decision.
struct Term {
    /// Target over propensity of the chosen candidate.
    weight: f64,
    /// Expected square of the weight, over what the log might have chosen.
    square: f64,
    cost: f64,
    /// The direct model's cost of the chosen candidate.
    predicted: f64,
    /// The direct model's cost of the judged policy.
    direct: f64,
}

impl Term {
    fn of(decision: &LoggedDecision) -> Self {
        let LoggedDecision { propensities, chosen, cost, target, predicted } = decision;
        let pairs = target.iter().zip(propensities).filter(|(_, propensity)| **propensity > 0.0);
        Self {
            weight: target[*chosen] / propensities[*chosen],
            square: pairs.map(|(target, propensity)| target * target / propensity).sum(),
            cost: *cost,
            predicted: predicted[*chosen],
            direct: target.iter().zip(predicted).map(|(target, cost)| target * cost).sum(),
        }
    }
}

/// The mean of `base + weight x residual`, with the larger of the two standard errors.
fn weighted(terms: &[Term], parts: impl Fn(&Term) -> (f64, f64)) -> Estimate {
    let (value, seen) = moments(terms.iter().map(|term| {
        let (base, residual) = parts(term);
        base + term.weight * residual
    }));
    let (_, base_variance) = moments(terms.iter().map(|term| parts(term).0));
    let (mut weights, mut first, mut second, mut expected) = (0.0, 0.0, 0.0, 0.0);
    for term in terms {
        let (_, residual) = parts(term);
        weights += term.weight;
        first += term.weight * residual;
        second += term.weight * residual * residual;
        expected += term.square;
    }
    let spread = expected / terms.len() as f64 * second / weights - (first / weights).powi(2);
    let third = terms.iter().map(|term| {
        let (base, residual) = parts(term);
        (base + term.weight * residual - value).powi(3)
    });
    let third = third.sum::<f64>() / terms.len() as f64;
    let skewness = if seen > 1e-12 * value * value { third / seen.powf(1.5) } else { 0.0 };
    skewed(value, seen.max(spread + base_variance), skewness, terms.len())
}

/// Mean and sample variance of at least two values.
fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let (count, sum) = values.clone().fold((0.0, 0.0), |(n, sum), value| (n + 1.0, sum + value));
    let mean = sum / count;
    let squares: f64 = values.map(|value| (value - mean).powi(2)).sum();
    (mean, squares / (count - 1.0))
}

/// The interval of a mean of skewed terms: the normal one, each end moved out to where Hall's transformation of
/// Student's t puts it, if that is farther.
fn skewed(value: f64, variance: f64, skewness: f64, count: usize) -> Estimate {
    let error = (variance.max(0.0) / count as f64).sqrt();
    let bend = skewness / (count as f64).sqrt();
    let at = |quantile: f64| {
        let bent = 3.0 / bend * ((1.0 + bend * (quantile - bend / 6.0)).cbrt() - 1.0);
        if bend.abs() > BEND_MIN && bent.abs() > quantile.abs() { bent } else { quantile }
    };
    Estimate { value, low: value - error * at(NORMAL_95), high: value - error * at(-NORMAL_95) }
}

fn interval(value: f64, variance: f64, count: usize) -> Estimate {
    let half = NORMAL_95 * (variance.max(0.0) / count as f64).sqrt();
    Estimate { value, low: value - half, high: value + half }
}

/// What is wrong with a decision, in words.
fn check(decision: &LoggedDecision) -> Result<(), String> {
    let LoggedDecision { propensities, chosen, cost, target, predicted } = decision;
    let count = propensities.len();
    if target.len() != count || predicted.len() != count {
        let (targets, costs) = (target.len(), predicted.len());
        return Err(format!(
            "{count} propensities, {targets} target probabilities and {costs} predicted costs, \
             which should be as many"
        ));
    }
    if *chosen >= count {
        return Err(format!("candidate {chosen} of {count} was chosen"));
    }
    for (what, list) in [("propensities", propensities), ("target probabilities", target)] {
        if let Some(wrong) = list.iter().find(|p| !(0.0..=1.0 + SUM_TOLERANCE).contains(*p)) {
            return Err(format!("one of the {what} is {wrong}, not 0 to 1"));
        }
        let sum: f64 = list.iter().sum();
        if (sum - 1.0).abs() > SUM_TOLERANCE {
            return Err(format!("the {what} sum to {sum}, not 1"));
        }
    }
    if propensities[*chosen] == 0.0 {
        return Err("the chosen candidate has propensity 0".into());
    }
    if let Some(wrong) = predicted.iter().chain([cost]).find(|value| !value.is_finite()) {
        return Err(format!("a cost is {wrong}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    const CANDIDATES: usize = 4;

    /// Box and Muller's.
    fn normal(random: &mut Pcg64Mcg) -> f64 {
        let (u, v): (f64, f64) = (random.random_range(1e-12..1.0), random.random_range(0.0..1.0));
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    fn lowest(costs: &[f64]) -> usize {
        (0..costs.len()).min_by(|a, b| costs[*a].total_cmp(&costs[*b])).unwrap()
    }

    /// A log of a policy that ranks by blurred costs and explores in a share of its decisions,
    /// the judged policy (it ranks by the true costs), and that one's true mean cost. `model`
    /// makes the direct model's costs from the true ones.
    fn world(
        seed: u64,
        count: usize,
        explore: f64,
        model: fn(f64, &mut Pcg64Mcg) -> f64,
    ) -> (Vec<LoggedDecision>, f64) {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let mut truth = 0.0;
        let log = (0..count).map(|_| {
            let costs: Vec<f64> =
                (0..CANDIDATES).map(|_| (4.0 + 0.5 * normal(&mut random)).exp()).collect();
            let blurred: Vec<f64> =
                costs.iter().map(|cost| cost * (0.3 * normal(&mut random)).exp()).collect();
            let mut propensities = vec![explore / CANDIDATES as f64; CANDIDATES];
            propensities[lowest(&blurred)] += 1.0 - explore;
            let chosen = match random.random_bool(explore) {
                true => random.random_range(0..CANDIDATES),
                false => lowest(&blurred),
            };
            let mut target = vec![0.0; CANDIDATES];
            target[lowest(&costs)] = 1.0;
            truth += costs[lowest(&costs)] / count as f64;
            let noise = (0.5 * normal(&mut random) - 0.125).exp();
            let predicted = costs.iter().map(|cost| model(*cost, &mut random)).collect();
            let cost = costs[chosen] * noise;
            LoggedDecision { propensities, chosen, cost, target, predicted }
        });
        let log = log.collect();
        (log, truth)
    }

    fn covers(estimate: Estimate, truth: f64) -> bool {
        (estimate.low..=estimate.high).contains(&truth)
    }

    /// Of 200 seeded worlds: in how many each interval holds the truth, and the mean relative
    /// errors of the estimates; in the order direct method, IPS, SNIPS, doubly robust.
    fn runs(count: usize, model: fn(f64, &mut Pcg64Mcg) -> f64) -> ([usize; 4], [f64; 4]) {
        let (mut covered, mut errors) = ([0; 4], [0.0; 4]);
        for seed in 0..200 {
            let (log, truth) = world(seed, count, 0.2, model);
            let found = judge(&log).unwrap();
            let all = [found.direct_method, found.ips, found.snips, found.doubly_robust];
            for (index, estimate) in all.into_iter().enumerate() {
                covered[index] += usize::from(covers(estimate, truth));
                errors[index] += (estimate.value / truth - 1.0) / 200.0;
            }
        }
        (covered, errors)
    }

    #[test]
    fn the_doubly_robust_interval_covers_the_truth_whatever_the_model() {
        let good = |cost: f64, _: &mut Pcg64Mcg| 1.05 * cost;
        let biased = |cost: f64, _: &mut Pcg64Mcg| 0.4 * cost;
        let wild = |cost: f64, random: &mut Pcg64Mcg| cost * normal(random).exp();
        for model in [good, biased, wild] {
            let (covered, errors) = runs(1_500, model);
            let [_, ips, snips, doubly_robust] = covered;
            assert!(doubly_robust >= 180, "{covered:?}");
            assert!(ips >= 180 && snips >= 180, "{covered:?}");
            assert!(errors[1..].iter().all(|error| error.abs() < 0.02), "{errors:?}");
        }
    }

    #[test]
    fn a_biased_model_misleads_the_direct_method_and_not_the_others() {
        let (covered, errors) = runs(1_500, |cost, _| 0.4 * cost);
        assert_eq!(covered[0], 0);
        assert!((errors[0] + 0.6).abs() < 0.01, "{errors:?}");
        assert!(errors[1].abs() < 0.02 && errors[3].abs() < 0.02, "{errors:?}");
    }

    #[test]
    fn with_a_right_model_doubly_robust_is_far_narrower_than_ips() {
        let (log, _) = world(1, 3_000, 0.2, |cost, _| cost);
        let found = judge(&log).unwrap();
        let width = |estimate: Estimate| estimate.high - estimate.low;
        assert!(width(found.doubly_robust) < 0.6 * width(found.ips), "{found:?}");
        assert!(width(found.snips) < 0.8 * width(found.ips), "{found:?}");
    }

    fn decision(propensities: &[f64], chosen: usize, cost: f64, target: &[f64]) -> LoggedDecision {
        LoggedDecision {
            propensities: propensities.to_vec(),
            chosen,
            cost,
            target: target.to_vec(),
            predicted: vec![10.0, 20.0],
        }
    }

    #[test]
    fn estimates_of_a_log_worked_out_by_hand() {
        // Half of the log chose the first (cost 12), half the second (cost 30).
        let log: Vec<LoggedDecision> = (0..1_000)
            .map(|i| decision(&[0.5, 0.5], i % 2, [12.0, 30.0][i % 2], &[0.25, 0.75]))
            .collect();
        let found = judge(&log).unwrap();
        let close = |estimate: Estimate, value: f64| {
            assert!((estimate.value - value).abs() < 1e-9, "{estimate:?}, not {value}");
        };
        close(found.direct_method, 0.25 * 10.0 + 0.75 * 20.0);
        close(found.ips, 0.25 * 12.0 + 0.75 * 30.0);
        close(found.snips, 0.25 * 12.0 + 0.75 * 30.0);
        close(found.doubly_robust, 17.5 + 0.25 * 2.0 + 0.75 * 10.0);
        // Weights of 0.5 and 1.5: (1000)^2 / (500 x 0.25 + 500 x 2.25).
        assert!((found.effective_sample_size - 800.0).abs() < 1e-9);
        assert_eq!(found.decisions, 1_000);
        // Terms of 6 and 45, half of each: their deviation is 19.5.
        let half = NORMAL_95 * (19.5_f64.powi(2) / 999.0).sqrt();
        assert!((found.ips.high - found.ips.value - half).abs() < 1e-9, "{:?}", found.ips);
    }

    #[test]
    fn a_log_that_missed_its_rare_choices_does_not_look_certain() {
        let log = vec![decision(&[0.9, 0.1], 0, 12.0, &[0.5, 0.5]); 1_000];
        let found = judge(&log).unwrap();
        // All terms are equal. Expected squares of the weights: 0.25 / 0.9 + 0.25 / 0.1.
        let variance = (0.25 / 0.9 + 0.25 / 0.1) * 144.0 - 144.0;
        let half = NORMAL_95 * (variance / 1_000.0_f64).sqrt();
        assert!((found.ips.high - found.ips.value - half).abs() < 1e-9, "{:?}", found.ips);
    }

    #[test]
    fn snips_moves_with_the_costs_and_ips_does_not_quite() {
        let (mut log, _) = world(2, 2_000, 0.2, |cost, _| cost);
        let before = judge(&log).unwrap();
        log.iter_mut().for_each(|decision| decision.cost += 1_000.0);
        let after = judge(&log).unwrap();
        assert!((after.snips.value - before.snips.value - 1_000.0).abs() < 1e-6);
        assert!((after.ips.value - before.ips.value - 1_000.0).abs() > 1.0);
    }

    #[test]
    fn too_small_an_effective_size_is_refused_with_the_number() {
        let (log, _) = world(3, 300, 0.2, |cost, _| cost);
        let Err(error @ OffPolicyError::TooFew { effective, .. }) = judge(&log) else {
            panic!("{:?}", judge(&log))
        };
        assert!(effective > 10.0 && effective < 100.0, "{effective}");
        assert!(error.to_string().contains(&format!("{effective:.1}")), "{error}");
        assert!(error.to_string().contains("300") && error.to_string().contains("100"), "{error}");
        assert!(matches!(judge(&[]), Err(OffPolicyError::TooFew { decisions: 0, .. })));
    }

    #[test]
    fn a_log_without_exploration_judges_only_its_own_policy() {
        let own = vec![decision(&[1.0, 0.0], 0, 12.0, &[1.0, 0.0]); 500];
        let found = judge(&own).unwrap();
        assert_eq!((found.ips.value, found.effective_sample_size), (12.0, 500.0));
        // The policies agree in 400 of 500: many, and still nothing is known of the others.
        let mut other = own;
        other[..100].iter_mut().for_each(|decision| decision.target = vec![0.0, 1.0]);
        let error = judge(&other).unwrap_err();
        assert_eq!(error, OffPolicyError::NoExploration { percent: 20.0, decisions: 500 });
        let text = error.to_string();
        assert!(text.contains("no exploration") && text.contains("20.0 %"), "{text}");
        assert!(text.contains("probability above 0"), "{text}");
    }

    #[test]
    fn a_decision_that_contradicts_itself_is_named() {
        let good = decision(&[0.5, 0.5], 0, 12.0, &[0.25, 0.75]);
        let wrong = |change: fn(&mut LoggedDecision), words: &str| {
            let mut log = vec![good.clone(); 200];
            change(&mut log[7]);
            let error = judge(&log).unwrap_err().to_string();
            assert!(error.contains("decision 7 ") && error.contains(words), "{error}");
        };
        wrong(|d| d.propensities = vec![0.0, 1.0], "propensity 0");
        wrong(|d| d.propensities = vec![0.5, 0.4], "sum to 0.9");
        wrong(|d| d.propensities = vec![f64::NAN, 0.5], "NaN");
        wrong(|d| d.target = vec![1.5, -0.5], "1.5");
        wrong(|d| d.target = vec![0.5, 0.4], "target probabilities sum to 0.9");
        wrong(|d| d.target = vec![1.0], "1 target");
        wrong(|d| d.predicted = vec![1.0; 3], "3 predicted");
        wrong(|d| d.predicted[1] = f64::INFINITY, "inf");
        wrong(|d| d.cost = f64::NAN, "NaN");
        wrong(|d| d.chosen = 2, "candidate 2 of 2");
    }
}
