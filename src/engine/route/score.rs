//! The score of a route: the mission's formula, on forecast quality.
//!
//! ```text
//! hop   = 0.4 latency + 0.3 bandwidth + 0.2 reliability + 0.1 (1 - congestion)
//! route = mean of its hops x 0.97^(hops - 1)
//!
//! latency     1 / (1 + ms / 100), the forecast round trip of the whole route
//! bandwidth   min(1, bytes/s / reference), reference 1,000,000 bytes/s; 1 when not known
//! reliability 1 - loss
//! congestion  utilisation of the link
//! ```
//!
//! The forecast is of the route, so every hop carries the same latency term: taken hop by hop, a
//! detour of two short links would look better than one direct link of the same total.

use crate::engine::measure::LinkQuality;

/// Latency at which the latency term is one half (ms).
const LATENCY_HALF_MS: f64 = 100.0;
/// Factor for each hop after the first. At 0.97 a relay pays when it saves a fifth of a direct
/// 100 ms; chosen by hand.
pub const HOP_PENALTY: f64 = 0.97;

/// Weights of the four terms, and the reference for bandwidth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoreWeights {
    /// Weight of latency.
    pub latency: f64,
    /// Weight of bandwidth.
    pub bandwidth: f64,
    /// Weight of reliability.
    pub reliability: f64,
    /// Weight of being free.
    pub congestion: f64,
    /// Bandwidth that scores 1 (bytes/s).
    pub bandwidth_reference: f64,
}

impl Default for ScoreWeights {
    fn default() -> Self {
        Self {
            latency: 0.4,
            bandwidth: 0.3,
            reliability: 0.2,
            congestion: 0.1,
            bandwidth_reference: 1_000_000.0,
        }
    }
}

/// Score of a route, 0 to 1, from the quality of its links and its forecast round trip (ms).
/// 0 for a route without links.
pub fn route_score(weights: &ScoreWeights, links: &[LinkQuality], forecast_ms: f64) -> f64 {
    if links.is_empty() {
        return 0.0;
    }
    let hops = links.len() as f64;
    let latency = latency_term(forecast_ms);
    let hop_score = |link: &LinkQuality| {
        let bandwidth = link.bandwidth.map_or(1.0, |b| (b / weights.bandwidth_reference).min(1.0));
        weights.latency * latency
            + weights.bandwidth * bandwidth
            + weights.reliability * (1.0 - link.loss)
            + weights.congestion * (1.0 - link.utilisation)
    };
    links.iter().map(hop_score).sum::<f64>() / hops * HOP_PENALTY.powf(hops - 1.0)
}

/// What a route of `hops` links that scores `score` with `forecast_ms` would score with `other_ms`
/// instead, when everything else stays as it is.
pub fn score_for_forecast(
    weights: &ScoreWeights,
    hops: usize,
    score: f64,
    forecast_ms: f64,
    other_ms: f64,
) -> f64 {
    score + slope(weights, hops) * (latency_term(other_ms) - latency_term(forecast_ms))
}

/// The forecast round trip (ms) with which a route would score `target`, when everything else
/// stays as it is: a route of `hops` links that scores `score` with `forecast_ms`. `None` when no
/// round trip would do; a route without latency in its score has none either.
pub fn forecast_for_score(
    weights: &ScoreWeights,
    hops: usize,
    score: f64,
    forecast_ms: f64,
    target: f64,
) -> Option<f64> {
    let latency = latency_term(forecast_ms) + (target - score) / slope(weights, hops);
    (latency > 0.0 && latency <= 1.0).then(|| LATENCY_HALF_MS * (1.0 / latency - 1.0))
}

fn latency_term(ms: f64) -> f64 {
    1.0 / (1.0 + ms / LATENCY_HALF_MS)
}

/// How much the score of a route rises with its latency term: it is a straight line in that, see
/// the module's documentation.
fn slope(weights: &ScoreWeights, hops: usize) -> f64 {
    weights.latency * HOP_PENALTY.powf(hops as f64 - 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(rtt_ms: f64) -> LinkQuality {
        LinkQuality { rtt_ms, jitter_ms: 0.0, loss: 0.0, bandwidth: None, utilisation: 0.0 }
    }

    fn score(links: &[LinkQuality], forecast_ms: f64) -> f64 {
        route_score(&ScoreWeights::default(), links, forecast_ms)
    }

    #[test]
    fn one_hop_is_the_formula_as_written() {
        let hop = LinkQuality {
            rtt_ms: 50.0,
            loss: 0.1,
            bandwidth: Some(250_000.0),
            utilisation: 0.4,
            jitter_ms: 0.0,
        };
        let expected = 0.4 / 2.0 + 0.3 * 0.25 + 0.2 * 0.9 + 0.1 * 0.6;
        assert!((score(&[hop], 100.0) - expected).abs() < 1e-12);
    }

    #[test]
    fn hops_are_averaged_and_length_is_penalised() {
        let expected = 0.4 / 1.4 + 0.6;
        assert!((score(&[link(10.0), link(30.0)], 40.0) - expected * HOP_PENALTY).abs() < 1e-12);
        assert!(score(&[link(40.0)], 40.0) > score(&[link(20.0), link(20.0)], 40.0));
    }

    #[test]
    fn the_forecast_for_a_score_gives_that_score() {
        let weights = ScoreWeights::default();
        let links = [LinkQuality { loss: 0.1, ..link(20.0) }, link(30.0), link(1.0)];
        let now = score(&links, 80.0);
        for wanted_ms in [0.0, 1.0, 79.0, 200.0, 5_000.0] {
            let target = score(&links, wanted_ms);
            let found = forecast_for_score(&weights, 3, now, 80.0, target).unwrap();
            assert!((found - wanted_ms).abs() < 1e-6, "{found} {wanted_ms}");
            let score = score_for_forecast(&weights, 3, now, 80.0, wanted_ms);
            assert!((score - target).abs() < 1e-12, "{score} {target}");
        }
        for target in [score(&links, 0.0) + 1e-9, score(&links, f64::INFINITY) - 1e-9] {
            assert_eq!(forecast_for_score(&weights, 3, now, 80.0, target), None);
        }
        let deaf = ScoreWeights { latency: 0.0, ..weights };
        assert_eq!(forecast_for_score(&deaf, 1, 0.5, 80.0, 0.6), None);
        assert_eq!(forecast_for_score(&deaf, 1, 0.5, 80.0, 0.5), None);
    }

    #[test]
    fn a_better_forecast_scores_better_and_all_scores_are_within_one() {
        let links = [link(20.0), link(20.0)];
        assert!(score(&links, 40.0) > score(&links, 60.0));
        assert!(score(&[link(0.0)], 0.0) <= 1.0);
        assert_eq!(score(&[], 1.0), 0.0);
    }
}
