//! Empirical-Bayes estimates of the mean RTT of every link, measured often, once or never.
//!
//! Links that were measured often speak for themselves; others are drawn towards what their two
//! nodes have in common with the rest of the network. Prior: RTT from i to j is a_i + b_j (access
//! links), with a variance that is itself estimated from how far measured links lie from it; each
//! link's own mean counts by its standard error (Efron and Morris, 1975). Small samples borrow
//! their variance from all links, in proportion to the prior and not to their own mean: a few lucky
//! values must not pass for precise ones. The reverse direction counts as a fraction of a sample.

use std::collections::BTreeMap;

/// Sender and receiver of a directed link.
pub type Ends = (usize, usize);

/// What was measured of one directed link.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// Mean (ms).
    pub mean_ms: f64,
    /// Population standard deviation (ms).
    pub deviation_ms: f64,
    /// Number of values; 0: none.
    pub count: f64,
}

impl Measured {
    /// Of values (ms).
    pub fn of(values_ms: &[f64]) -> Self {
        if values_ms.is_empty() {
            return Self::default();
        }
        let count = values_ms.len() as f64;
        let mean_ms = values_ms.iter().sum::<f64>() / count;
        let squares: f64 = values_ms.iter().map(|ms| (ms - mean_ms).powi(2)).sum();
        Self { mean_ms, deviation_ms: (squares / count).sqrt(), count }
    }
}

/// What is believed of one directed link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Believed {
    /// Mean (ms), above 0.
    pub mean_ms: f64,
    /// Standard deviation of that belief (ms).
    pub deviation_ms: f64,
}

/// A value of the reverse direction counts as this many of the direction itself: the paths are
/// shared, queues are not (chosen on the Seattle traces among 0, 0.3 and 1).
const REVERSE_WEIGHT: f64 = 0.3;
/// A link's variance counts against this many values' worth of the network's.
const VARIANCE_PRIOR: f64 = 10.0;
/// Fewest values of links whose variance tells the network's.
const VARIANCE_COUNT_MIN: f64 = 3.0;
/// Values beyond which a link weighs no more in the fit of the node effects.
const FIT_COUNT_MAX: f64 = 20.0;
/// Sweeps of the alternating fit of node effects; it converges within a few.
const SWEEPS: usize = 8;
/// Values beyond which a link weighs no more in how far links lie from the prior.
const EXCESS_COUNT_MAX: f64 = 10.0;
/// Smallest standard deviation of the prior, as a share of it, and smallest prior, as a share of the
/// mean of all links.
const PRIOR_SHARE_MIN: f64 = 0.1;

/// Beliefs of directed links between nodes 0 to `nodes - 1`; `links` holds both directions of each.
/// `None` when no link was measured.
pub fn beliefs(nodes: usize, links: &BTreeMap<Ends, Measured>) -> Option<BTreeMap<Ends, Believed>> {
    let of = |ends: Ends| links.get(&ends).copied().unwrap_or_default();
    let pooled: Vec<(Ends, Measured)> =
        links.iter().map(|(&(a, b), own)| ((a, b), pool(*own, of((b, a))))).collect();
    let known = || pooled.iter().filter(|(_, link)| link.count > 0.0);
    let number = known().count() as f64;
    if number == 0.0 {
        return None;
    }
    let grand_ms = (known().map(|(_, link)| link.mean_ms).sum::<f64>() / number).max(1e-3);
    let (from, to) = node_effects(nodes, &pooled, grand_ms);
    let prior_ms = |(a, b): Ends| (from[a] + to[b]).max(PRIOR_SHARE_MIN * grand_ms);
    let variation = variation(pooled.iter().map(|(ends, link)| (link, prior_ms(*ends))));
    let error2 = |link: &Measured, prior_ms: f64| {
        let own = link.deviation_ms.powi(2) * link.count;
        let borrowed = variation * prior_ms.powi(2) * VARIANCE_PRIOR;
        (own + borrowed) / (link.count + VARIANCE_PRIOR) / link.count
    };
    let excess = |(ends, link): &(Ends, Measured)| {
        let (weight, prior_ms) = (link.count.min(EXCESS_COUNT_MAX), prior_ms(*ends));
        let excess = (link.mean_ms - prior_ms).powi(2) - error2(link, prior_ms);
        (link.count > 0.0).then(|| (weight * excess / prior_ms.powi(2), weight))
    };
    let excesses = pooled.iter().filter_map(excess);
    let (sum, weights) = excesses.fold((0.0, 0.0), |(s, w), (more, weight)| (s + more, w + weight));
    let relative2 = (sum / weights).max(PRIOR_SHARE_MIN.powi(2));
    let belief = |(ends, link): &(Ends, Measured)| {
        let prior_ms = prior_ms(*ends);
        let prior2 = relative2 * prior_ms.powi(2);
        if link.count == 0.0 {
            return (*ends, Believed { mean_ms: prior_ms, deviation_ms: prior2.sqrt() });
        }
        let error2 = error2(link, prior_ms);
        let weight = prior2 / (prior2 + error2);
        let believed = Believed {
            mean_ms: weight * link.mean_ms + (1.0 - weight) * prior_ms,
            deviation_ms: (weight * error2).sqrt(),
        };
        (*ends, believed)
    };
    Some(pooled.iter().map(belief).collect())
}

/// What every link is expected to be by its two nodes alone, from one value a link where there is
/// one, row by row; all the same without any.
pub fn additive(nodes: usize, values: &[Option<f64>]) -> Vec<f64> {
    let measured: Vec<(Ends, Measured)> = values
        .iter()
        .enumerate()
        .filter_map(|(at, value)| {
            let measured = Measured { mean_ms: (*value)?, deviation_ms: 0.0, count: 1.0 };
            Some(((at / nodes, at % nodes), measured))
        })
        .collect();
    let known = values.iter().flatten();
    let grand = known.clone().sum::<f64>() / known.count().max(1) as f64;
    let (from, to) = node_effects(nodes, &measured, grand);
    (0..nodes * nodes).map(|index| from[index / nodes] + to[index % nodes]).collect()
}

/// A link with its reverse direction at [`REVERSE_WEIGHT`].
fn pool(own: Measured, reverse: Measured) -> Measured {
    let (n, m) = (own.count, REVERSE_WEIGHT * reverse.count);
    if n + m == 0.0 {
        return Measured::default();
    }
    let mean_ms = (n * own.mean_ms + m * reverse.mean_ms) / (n + m);
    let about = |link: Measured| link.deviation_ms.powi(2) + (link.mean_ms - mean_ms).powi(2);
    let variance = (n * about(own) + m * about(reverse)) / (n + m);
    Measured { mean_ms, deviation_ms: variance.sqrt(), count: n + m }
}

/// Squared deviation of values as a share of the squared prior (ms), over all values of links that
/// were measured a few times: a mean and not a median, so that heavy tails count. 1 without any.
fn variation<'a>(links: impl Iterator<Item = (&'a Measured, f64)>) -> f64 {
    let often = links.filter(|(link, _)| link.count >= VARIANCE_COUNT_MIN);
    let (deviations, priors) = often.fold((0.0, 0.0), |(deviations, priors), (link, prior_ms)| {
        let deviation2 = link.count * link.deviation_ms.powi(2);
        (deviations + deviation2, priors + link.count * prior_ms.powi(2))
    });
    if priors > 0.0 { deviations / priors } else { 1.0 }
}

/// Effects of senders and receivers, fitted by alternating weighted means.
fn node_effects(nodes: usize, pooled: &[(Ends, Measured)], grand_ms: f64) -> (Vec<f64>, Vec<f64>) {
    let mut from = vec![grand_ms / 2.0; nodes];
    let mut to = from.clone();
    for _ in 0..SWEEPS {
        for sender in [true, false] {
            let mut sums = vec![(0.0, 0.0); nodes];
            for ((a, b), link) in pooled.iter().filter(|(_, link)| link.count > 0.0) {
                let weight = link.count.min(FIT_COUNT_MAX);
                let (own, other) = if sender { (*a, to[*b]) } else { (*b, from[*a]) };
                sums[own].0 += weight * (link.mean_ms - other);
                sums[own].1 += weight;
            }
            let effects = if sender { &mut from } else { &mut to };
            for (effect, (sum, weight)) in effects.iter_mut().zip(sums) {
                if weight > 0.0 {
                    *effect = sum / weight;
                }
            }
        }
    }
    (from, to)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    fn all_of(link: Measured) -> BTreeMap<Ends, Measured> {
        (0..400).map(|i| ((i / 20, i % 20), link)).collect()
    }

    /// Twenty nodes with access delays; each link is measured `count` times with noise.
    fn network(
        count: usize,
        noise: f64,
    ) -> (BTreeMap<Ends, Measured>, impl Fn(usize, usize) -> f64) {
        let mut random = Pcg64Mcg::seed_from_u64(3);
        let access: Vec<f64> = (0..20).map(|_| random.random_range(10.0..100.0)).collect();
        let truth = move |a: usize, b: usize| access[a] + access[b];
        let mut measured = all_of(Measured::default());
        for a in 0..20 {
            for b in (0..20).filter(|b| *b != a && (a + *b) % 3 != 0) {
                let mut draw = || truth(a, b) * random.random_range(1.0 - noise..1.0 + noise);
                let values: Vec<f64> = (0..count).map(|_| draw()).collect();
                let mean_ms = values.iter().sum::<f64>() / count as f64;
                let squares: f64 = values.iter().map(|ms| (ms - mean_ms).powi(2)).sum();
                let deviation_ms = (squares / count as f64).sqrt();
                let count = count as f64;
                measured.insert((a, b), Measured { mean_ms, deviation_ms, count });
            }
        }
        (measured, truth)
    }

    fn error(
        believed: impl Fn(Ends) -> f64,
        truth: impl Fn(usize, usize) -> f64,
        seen: bool,
    ) -> f64 {
        let all = (0..400).filter(|i| i / 20 != i % 20 && ((i / 20 + i % 20) % 3 != 0) == seen);
        let errors: Vec<f64> =
            all.map(|i| (believed((i / 20, i % 20)) / truth(i / 20, i % 20) - 1.0).abs()).collect();
        errors.iter().sum::<f64>() / errors.len() as f64
    }

    #[test]
    fn noisy_means_get_better_and_links_never_measured_are_foreseen() {
        let (measured, truth) = network(3, 0.8);
        let believed = beliefs(20, &measured).unwrap();
        let own = error(|i| measured[&i].mean_ms, &truth, true);
        let shrunk = error(|i| believed[&i].mean_ms, &truth, true);
        assert!(shrunk < 0.6 * own, "{shrunk} against {own}");
        assert!(error(|i| believed[&i].mean_ms, &truth, false) < 0.15);
        assert!(believed.values().all(|b| b.mean_ms > 0.0 && b.deviation_ms.is_finite()));
    }

    #[test]
    fn a_few_lucky_values_do_not_pass_for_precise_ones() {
        let (mut measured, truth) = network(20, 0.8);
        let mean_ms = 0.3 * truth(1, 3);
        let lucky_link = Measured { mean_ms, deviation_ms: 0.1 * mean_ms, count: 2.0 };
        measured.insert((1, 3), lucky_link);
        measured.insert((3, 1), Measured::default());
        let believed = beliefs(20, &measured).unwrap()[&(1, 3)];
        let usual = truth(1, 3);
        assert!(
            believed.mean_ms + 2.0 * believed.deviation_ms > 0.8 * usual,
            "{believed:?}, {usual}"
        );
    }

    #[test]
    fn what_was_measured_often_speaks_for_itself() {
        let (mut measured, _) = network(60, 0.05);
        let slow = Measured { mean_ms: 500.0, deviation_ms: 5.0, count: 60.0 };
        measured.extend([((1, 3), slow), ((3, 1), slow)]);
        let believed = beliefs(20, &measured).unwrap();
        assert!((believed[&(1, 3)].mean_ms - 500.0).abs() < 10.0, "{:?}", believed[&(1, 3)]);
        assert_eq!(beliefs(20, &all_of(Measured::default())), None);
    }
}
