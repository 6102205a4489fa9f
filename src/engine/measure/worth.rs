//! What is worth measuring next, when not everything can be.
//!
//! A measurement is worth its price when it may change a choice: the link must be doubted, and it
//! must lie on a route that could be the best one of some pair, were the link as good as it may
//! be (optimism in the face of uncertainty; Lai and Robbins, 1985). Most links of a mesh are never
//! part of such a route.

/// What is known of the round trip between two nodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Known {
    /// Last value (ms), above 0.
    pub last_ms: f64,
    /// Sum of the absolute ln ratios of consecutive values, and how many there are.
    pub changes: (f64, f64),
    /// Rounds since the last one, 0 or more.
    pub age_rounds: f64,
}

/// Least doubt of a link measured a round ago, as a share of its round trip; what its two nodes'
/// links change by from value to value is added. This and the five below were chosen on the
/// PlanetLab trace at 8 links a node a round.
const DOUBT_MIN: f64 = 0.02;
/// Doubt of a link that was only triangulated.
const DOUBT_TRIANGULATED: f64 = 1.1;
/// Changes by which a node's volatility is drawn towards that of all nodes.
const CHANGES_PRIOR: f64 = 5.0;
/// Volatility of all nodes before anything changed, and how many changes that counts for.
pub const VOLATILITY_PRIOR: (f64, f64) = (0.05, 20.0);
/// Volatility of all nodes above which nothing is worth more than anything else: links that were
/// quick once are not the quick ones next time, and measuring them again and again would only
/// collect lucky values. 0.02 on the PlanetLab trace, 0.2 on the carriers', 0.7 on the Seattle one.
pub const VOLATILITY_MAX: f64 = 0.4;
/// Most rounds for which doubt grows; it grows with their root, as a random walk's.
const AGE_ROUNDS_MAX: f64 = 10.0;
/// A route counts e times less for each such share by which it is slower than the best.
const LEAD: f64 = 0.05;
/// Every link is worth this share of the mean, so that none is forgotten.
const FLOOR: f64 = 0.1;

/// Triangulated round trips (ms): midway between the largest difference and the smallest sum over
/// a third node (Hotz, 1994). `None` for pairs without a third node known to both, and for the
/// diagonal. `known` is square, row by row, and symmetric.
pub fn triangulated(nodes: usize, known: &[Option<f64>]) -> Vec<Option<f64>> {
    let between = |a: usize, b: usize| {
        let thirds = (0..nodes).filter(|k| *k != a && *k != b);
        let ends = thirds.filter_map(|k| Some((known[a * nodes + k]?, known[b * nodes + k]?)));
        let bounds = ends.fold(None, |bounds: Option<(f64, f64)>, (x, y)| {
            let (low, high) = bounds.unwrap_or((0.0, f64::INFINITY));
            Some((low.max((x - y).abs()), high.min(x + y)))
        });
        bounds.filter(|_| a != b).map(|(low, high)| f64::midpoint(low, high))
    };
    (0..nodes * nodes).map(|index| between(index / nodes, index % nodes)).collect()
}

/// How much a measurement between each two nodes is worth, 0 or more; only the order means
/// anything. `known` is square, row by row, and symmetric; so is the answer. `None` when all are
/// alike: nothing is known yet, or too volatile.
pub fn worth(nodes: usize, known: &[Option<Known>]) -> Option<Vec<f64>> {
    if known.iter().all(Option::is_none) || volatility_of_all(known) > VOLATILITY_MAX {
        return None;
    }
    let lasts: Vec<Option<f64>> = known.iter().map(|link| link.map(|l| l.last_ms)).collect();
    let triangulated = triangulated(nodes, &lasts);
    let volatility = volatility_of_nodes(nodes, known);
    let believed: Vec<(f64, f64)> = (0..nodes * nodes)
        .map(|index| match (known[index], triangulated[index]) {
            (Some(link), _) => {
                let both = (volatility[index / nodes] + volatility[index % nodes]) / 2.0;
                let age = link.age_rounds.clamp(1.0, AGE_ROUNDS_MAX);
                (link.last_ms, (DOUBT_MIN + both) * age.sqrt())
            }
            (None, Some(ms)) => (ms, DOUBT_TRIANGULATED),
            (None, None) => (f64::INFINITY, DOUBT_TRIANGULATED),
        })
        .collect();
    let mean = |a: usize, b: usize| believed[a * nodes + b].0;
    let at_best = |a: usize, b: usize| {
        let (ms, doubt) = believed[a * nodes + b];
        ms * (1.0 - doubt.min(0.9))
    };
    let mut use_of = vec![0.0; nodes * nodes];
    for src in 0..nodes {
        for dst in (0..nodes).filter(|dst| *dst != src) {
            let relays = || (0..nodes).filter(|k| *k != src && *k != dst);
            let best = relays().map(|k| mean(src, k) + mean(k, dst)).fold(mean(src, dst), f64::min);
            if !best.is_finite() {
                continue;
            }
            let weight = |ms: f64| (-(ms / best - 1.0).max(0.0) / LEAD).exp();
            use_of[src * nodes + dst] += weight(at_best(src, dst));
            for relay in relays() {
                let weight = weight(at_best(src, relay) + at_best(relay, dst));
                use_of[src * nodes + relay] += weight;
                use_of[relay * nodes + dst] += weight;
            }
        }
    }
    let floor = FLOOR * use_of.iter().sum::<f64>() / (nodes * nodes).max(1) as f64;
    let of = |index: usize| {
        let reverse = index % nodes * nodes + index / nodes;
        (use_of[index] + use_of[reverse] + floor) * believed[index].1
    };
    Some((0..nodes * nodes).map(of).collect())
}

/// By how much links change from value to value (mean absolute ln ratio), drawn towards 5 % while
/// few changes are known.
pub fn volatility_of_all(known: &[Option<Known>]) -> f64 {
    let changes = known.iter().flatten().map(|link| link.changes);
    let changes = changes.fold((0.0, 0.0), |sum, next| (sum.0 + next.0, sum.1 + next.1));
    volatility(VOLATILITY_PRIOR, changes)
}

/// The same from what is expected and how many changes that counts for, the sum of the absolute ln ratios, and
/// how many there are.
pub fn volatility((expected, weight): (f64, f64), (total, count): (f64, f64)) -> f64 {
    (total + expected * weight) / (count + weight)
}

/// The same of the links of each node, drawn towards that of all.
fn volatility_of_nodes(nodes: usize, known: &[Option<Known>]) -> Vec<f64> {
    let of_all = volatility_of_all(known);
    let of = |node: usize| {
        let changes = known[node * nodes..][..nodes].iter().flatten().map(|link| link.changes);
        let sum = changes.fold((0.0, 0.0), |sum, next| (sum.0 + next.0, sum.1 + next.1));
        (sum.0 + CHANGES_PRIOR * of_all) / (sum.1 + CHANGES_PRIOR)
    };
    (0..nodes).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A square and symmetric table of the round trips of `ms`, all measured alike.
    fn table(nodes: usize, ms: impl Fn(usize, usize) -> Option<f64>) -> Vec<Option<Known>> {
        let of = |a: usize, b: usize| {
            (a != b).then(|| ms(a.min(b), a.max(b))).flatten().map(|last_ms| Known {
                last_ms,
                changes: (0.2, 2.0),
                age_rounds: 3.0,
            })
        };
        (0..nodes * nodes).map(|index| of(index / nodes, index % nodes)).collect()
    }

    #[test]
    fn triangles_bound_what_was_never_measured() {
        // Nodes on a line at 0, 10 and 40: between the outer ones lie 30 to 50.
        let known = [None, Some(10.0), None, Some(10.0), None, Some(40.0), None, Some(40.0), None];
        let found = triangulated(3, &known);
        assert_eq!(found[2], Some(40.0));
        assert_eq!(found[0], None, "a node to itself");
        assert_eq!(found[1], None, "no third node knows both");
    }

    #[test]
    fn what_may_shorten_routes_is_worth_more_than_a_slow_detour() {
        // Node 0 is near to all; 1 to 4 are far from each other, and 5 is far from everybody.
        let ms = |a: usize, b: usize| {
            Some(if b == 5 {
                500.0
            } else if a == 0 {
                10.0
            } else {
                100.0
            })
        };
        let worth = worth(6, &table(6, ms)).unwrap();
        assert!(worth[1] > 2.0 * worth[6 + 2], "a hub's link before a bypassed one: {worth:?}");
        assert_eq!(worth[1], worth[6], "both directions are one");
        assert!(worth.iter().all(|value| value.is_finite() && *value >= 0.0));
    }

    #[test]
    fn a_doubted_link_is_worth_more_than_a_known_one() {
        let mut known = table(4, |_, _| Some(50.0));
        let alike = worth(4, &known).unwrap();
        for index in [1, 4] {
            known[index].as_mut().unwrap().age_rounds = 9.0;
        }
        let aged = worth(4, &known).unwrap();
        assert!(aged[1] > 1.5 * alike[1] && aged[2] <= alike[2] * 1.5, "{aged:?} {alike:?}");
        for index in [8, 9, 2, 6] {
            known[index].as_mut().unwrap().changes = (2.0, 2.0);
        }
        let volatile = worth(4, &known).unwrap();
        assert!(volatile[11] > 1.3 * aged[11], "a node whose other links change");
        known[1] = None;
        known[4] = None;
        assert!(worth(4, &known).unwrap()[1] > aged[1], "never measured");
        assert!(worth(4, &[None; 16]).is_none());
        let wild = |link: &mut Option<Known>| {
            link.iter_mut().for_each(|link| link.changes = (80.0, 100.0));
        };
        known.iter_mut().for_each(wild);
        assert!(worth(4, &known).is_none(), "all are alike");
    }
}
