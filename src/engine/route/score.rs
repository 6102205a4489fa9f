//! The score of a route: what an objective wants, on forecast quality.
//!
//! Balanced is the mission's formula, taken hop by hop:
//!
//! ```text
//! hop   = 0.4 latency + 0.3 bandwidth + 0.2 reliability + 0.1 (1 - congestion)
//! route = mean of its hops x 0.97^(hops - 1)
//!
//! latency     1 / (1 + ms / 100), the forecast round trip of the whole route
//! bandwidth   min(1, bytes/s / reference), reference 1,000,000 bytes/s; the forecast of the route,
//!             else what is advertised of the link; 1 when neither is known
//! reliability 1 - loss of the link, or the forecast delivery of the route where that is less
//! congestion  utilisation of the link
//! ```
//!
//! A forecast is of the route, so every hop carries the same latency term: taken hop by hop, a
//! detour of two short links would look better than one direct link of the same total.
//!
//! The other objectives look at the route as a whole, because who wants room or few losses is not
//! helped by the mean of a wide and a narrow link:
//!
//! ```text
//! route = (l latency + b bandwidth + r reliability + c (1 - congestion)) x h^(hops - 1)
//!
//! bandwidth   left / (left + reference), left: the forecast of the route, else what is left on the
//!             link with the least; 0.5 when neither is known
//! reliability 1 / (1 + loss / 0.01), loss from end to end
//! congestion  utilisation of the fullest link
//!                  l     b     r     c     h
//! latency         .85   .05   .05   .05   .995
//! throughput      .10   .75   .05   .10   .97
//! reliability     .10   .05   .80   .05   .97
//! ```
//!
//! The loss from end to end is the larger one of what was measured and what is forecast. Measured is
//! what the links claim, corrected by what probes over the whole route met ([`end_to_end_loss`]). A
//! forecast is there while its head has earned its place (see `engine::predict`'s `delivery`); it makes
//! a route worse, never better than what was just measured.
//!
//! What relays deliver of real traffic, as a share of what their links claim
//! ([`Honesty`](crate::engine::measure::Honesty)), counts as loss in the reliability term of every
//! objective, and every score is multiplied by it: the other terms come from claims and from probes, which
//! such relays let pass.

use crate::engine::measure::{LinkQuality, end_to_end_loss};
use crate::engine::overlay::wire::Objective;

/// Latency at which the latency term is one half (ms).
const LATENCY_HALF_MS: f64 = 100.0;
/// Factor for each hop after the first. At 0.97 a relay pays when it saves a fifth of a direct
/// 100 ms; chosen by hand.
pub const HOP_PENALTY: f64 = 0.97;
/// The same for the latency objective: the round trip holds what a hop costs in time already. A relay pays
/// when it saves 2 % of a direct 100 ms; chosen by hand.
pub const HOP_PENALTY_LATENCY: f64 = 0.995;
/// Loss from end to end at which the reliability term of a whole route is one half: at 1 % TCP over
/// 100 ms is down to about 1.5 Mbit/s (Mathis et al., 1997).
const LOSS_HALF: f64 = 0.01;
/// Bandwidth term of a whole route of which it is not known.
const BANDWIDTH_UNKNOWN: f64 = 0.5;

/// What the terms of a score are taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terms {
    /// The mean over the hops.
    Hops,
    /// The route as a whole: its narrowest link, its loss from end to end.
    Route,
}

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
    /// Bandwidth that scores 1, or one half for a route as a whole (bytes/s).
    pub bandwidth_reference: f64,
    /// What the terms are taken from.
    pub terms: Terms,
    /// Factor for each hop after the first, above 0 to 1.
    pub hop_penalty: f64,
}

impl ScoreWeights {
    /// The weights of an objective.
    pub fn of(objective: Objective) -> Self {
        let [latency, bandwidth, reliability, congestion] = match objective {
            Objective::Balanced => return Self::default(),
            Objective::Latency => [0.85, 0.05, 0.05, 0.05],
            Objective::Throughput => [0.10, 0.75, 0.05, 0.10],
            Objective::Reliability => [0.10, 0.05, 0.80, 0.05],
        };
        let hop_penalty = match objective {
            Objective::Latency => HOP_PENALTY_LATENCY,
            _ => HOP_PENALTY,
        };
        let terms = Terms::Route;
        let others = Self::default();
        Self { latency, bandwidth, reliability, congestion, terms, hop_penalty, ..others }
    }
}

impl Default for ScoreWeights {
    fn default() -> Self {
        Self {
            latency: 0.4,
            bandwidth: 0.3,
            reliability: 0.2,
            congestion: 0.1,
            bandwidth_reference: 1_000_000.0,
            terms: Terms::Hops,
            hop_penalty: HOP_PENALTY,
        }
    }
}

/// What is known of a route when it is scored.
#[derive(Clone, Copy, Debug)]
pub struct RouteQuality<'a> {
    /// What is advertised of its links.
    pub links: &'a [LinkQuality],
    /// Share of the newest probes over the whole route that were lost, 0 to 1.
    pub loss: f64,
    /// How many probes that is a share of.
    pub probes: usize,
    /// Share that its relays deliver of what their links claim, above 0 to 1.
    pub delivers: f64,
    /// Forecast round trip (ms).
    pub forecast_ms: f64,
    /// Forecast of the bandwidth that a tunnel gets (bytes/s); `None` when nobody forecasts it.
    pub forecast_bandwidth: Option<f64>,
    /// Forecast probability that the route delivers, 0 to 1; `None` when nobody forecasts it.
    pub forecast_delivery: Option<f64>,
}

impl RouteQuality<'_> {
    /// Loss from end to end, 0 to 1.
    fn total_loss(&self) -> f64 {
        let claimed = 1.0 - self.links.iter().map(|link| 1.0 - link.loss).product::<f64>();
        let measured = end_to_end_loss(claimed, self.loss, self.probes);
        1.0 - self.forecast(1.0 - measured) * self.delivers
    }

    /// The share delivered: what was measured, or the forecast where that is less.
    fn forecast(&self, measured: f64) -> f64 {
        self.forecast_delivery.map_or(measured, |forecast| forecast.min(measured))
    }

    /// What a tunnel gets (bytes/s): the forecast, else what is left on the link with the least;
    /// `None` when that is not known of every one.
    fn left(&self) -> Option<f64> {
        if self.forecast_bandwidth.is_some() {
            return self.forecast_bandwidth;
        }
        let left = self.links.iter().map(|link| Some(link.bandwidth? * (1.0 - link.utilisation)));
        left.reduce(|least, left| Some(least?.min(left?))).flatten()
    }
}

/// Score of a route, 0 to 1. 0 for a route without links.
pub fn route_score(weights: &ScoreWeights, route: &RouteQuality<'_>) -> f64 {
    if route.links.is_empty() {
        return 0.0;
    }
    let hops = route.links.len() as f64;
    let latency = latency_term(route.forecast_ms);
    let sum = |bandwidth: f64, reliability: f64, utilisation: f64| {
        weights.latency * latency
            + weights.bandwidth * bandwidth
            + weights.reliability * reliability
            + weights.congestion * (1.0 - utilisation)
    };
    let reference = weights.bandwidth_reference;
    let terms = match weights.terms {
        Terms::Hops => {
            let hop_score = |link: &LinkQuality| {
                let bandwidth = route.forecast_bandwidth.or(link.bandwidth);
                let bandwidth = bandwidth.map_or(1.0, |b| (b / reference).min(1.0));
                let delivered = route.forecast(1.0 - link.loss) * route.delivers;
                sum(bandwidth, delivered, link.utilisation)
            };
            route.links.iter().map(hop_score).sum::<f64>() / hops
        }
        Terms::Route => {
            let bandwidth = route.left().map_or(BANDWIDTH_UNKNOWN, |b| b / (b + reference));
            let reliability = 1.0 / (1.0 + route.total_loss() / LOSS_HALF);
            let fullest = route.links.iter().map(|link| link.utilisation).fold(0.0, f64::max);
            sum(bandwidth, reliability, fullest)
        }
    };
    terms * factor(weights, route.links.len(), route.delivers)
}

/// What the sum of the terms is multiplied by: for a route of `hops` links whose relays deliver this
/// share of what they claim.
pub fn factor(weights: &ScoreWeights, hops: usize, delivers: f64) -> f64 {
    weights.hop_penalty.powf(hops as f64 - 1.0) * delivers
}

/// What a route with this [`factor`] that scores `score` with `forecast_ms` would score with `other_ms`
/// instead, when everything else stays as it is.
pub fn score_for_forecast(
    weights: &ScoreWeights,
    factor: f64,
    score: f64,
    forecast_ms: f64,
    other_ms: f64,
) -> f64 {
    score + weights.latency * factor * (latency_term(other_ms) - latency_term(forecast_ms))
}

/// The forecast round trip (ms) with which a route would score `target`, when everything else
/// stays as it is: a route with this [`factor`] that scores `score` with `forecast_ms`. `None` when no
/// round trip would do; a route without latency in its score has none either.
pub fn forecast_for_score(
    weights: &ScoreWeights,
    factor: f64,
    score: f64,
    forecast_ms: f64,
    target: f64,
) -> Option<f64> {
    // The score is a straight line in the latency term, see the module's documentation.
    let latency = latency_term(forecast_ms) + (target - score) / (weights.latency * factor);
    (latency > 0.0 && latency <= 1.0).then(|| LATENCY_HALF_MS * (1.0 / latency - 1.0))
}

fn latency_term(ms: f64) -> f64 {
    1.0 / (1.0 + ms / LATENCY_HALF_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(rtt_ms: f64) -> LinkQuality {
        LinkQuality { rtt_ms, jitter_ms: 0.0, loss: 0.0, bandwidth: None, utilisation: 0.0 }
    }

    fn quality(links: &[LinkQuality], forecast_ms: f64) -> RouteQuality<'_> {
        RouteQuality {
            links,
            loss: 0.0,
            probes: 0,
            delivers: 1.0,
            forecast_ms,
            forecast_bandwidth: None,
            forecast_delivery: None,
        }
    }

    const OBJECTIVES: [Objective; 4] =
        [Objective::Balanced, Objective::Latency, Objective::Throughput, Objective::Reliability];

    fn delivering(
        delivers: f64,
        weights: &ScoreWeights,
        links: &[LinkQuality],
        forecast_ms: f64,
    ) -> f64 {
        route_score(weights, &RouteQuality { delivers, ..quality(links, forecast_ms) })
    }

    fn score_for(weights: &ScoreWeights, links: &[LinkQuality], forecast_ms: f64) -> f64 {
        delivering(1.0, weights, links, forecast_ms)
    }

    fn score(links: &[LinkQuality], forecast_ms: f64) -> f64 {
        score_for(&ScoreWeights::default(), links, forecast_ms)
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
    fn the_forecast_for_a_score_gives_that_score_for_every_objective() {
        for (weights, delivers) in
            OBJECTIVES.map(ScoreWeights::of).into_iter().zip([1.0, 0.7, 1.0, 0.4])
        {
            let links = [LinkQuality { loss: 0.1, ..link(20.0) }, link(30.0), link(1.0)];
            let score = |ms| delivering(delivers, &weights, &links, ms);
            let factor = factor(&weights, 3, delivers);
            let now = score(80.0);
            for wanted_ms in [0.0, 1.0, 79.0, 200.0, 5_000.0] {
                let target = score(wanted_ms);
                let found = forecast_for_score(&weights, factor, now, 80.0, target).unwrap();
                assert!((found - wanted_ms).abs() < 1e-6, "{found} {wanted_ms}");
                let other = score_for_forecast(&weights, factor, now, 80.0, wanted_ms);
                assert!((other - target).abs() < 1e-12, "{other} {target}");
            }
            for target in [score(0.0) + 1e-9, score(f64::INFINITY) - 1e-9] {
                assert_eq!(forecast_for_score(&weights, factor, now, 80.0, target), None);
            }
            let deaf = ScoreWeights { latency: 0.0, ..weights };
            assert_eq!(forecast_for_score(&deaf, 1.0, 0.5, 80.0, 0.6), None);
            assert_eq!(forecast_for_score(&deaf, 1.0, 0.5, 80.0, 0.5), None);
        }
    }

    #[test]
    fn a_whole_route_is_as_wide_as_its_narrowest_link_and_loses_what_all_lose() {
        let wide = |left: f64, loss| LinkQuality {
            bandwidth: Some(left * 2.0),
            utilisation: 0.5,
            loss,
            ..link(10.0)
        };
        let free = LinkQuality { utilisation: 0.0, ..wide(9_000_000.0, 0.1) };
        let links = [wide(4_000_000.0, 0.1), wide(1_000_000.0, 0.0), free];
        let of = |objective, links: &[LinkQuality], loss, probes| {
            let quality = RouteQuality { loss, probes, ..quality(links, 100.0) };
            route_score(&ScoreWeights::of(objective), &quality)
        };
        let penalty = HOP_PENALTY * HOP_PENALTY;
        let reliability = 1.0 / (1.0 + 0.19 / 0.01);
        let expected = 0.1 * 0.5 + 0.75 * 0.5 + 0.05 * reliability + 0.1 * 0.5;
        let found = of(Objective::Throughput, &links, 0.0, 0);
        assert!((found - expected * penalty).abs() < 1e-12, "{found}");
        let unknown = [links[0], LinkQuality { bandwidth: None, ..links[1] }, links[2]];
        let found = of(Objective::Throughput, &unknown, 0.0, 0);
        assert!((found - expected * penalty).abs() < 1e-12, "0.5 as well: {found}");
        // 20 probes of which 8 were lost, and links that claim to lose nothing: 8 in 80.
        let clean = [wide(1_000_000.0, 0.0)];
        let found = of(Objective::Reliability, &clean, 0.4, 20);
        let expected = 0.1 * 0.5 + 0.05 * 0.5 + 0.8 / (1.0 + 0.1 / 0.01) + 0.05 * 0.5;
        assert!((found - expected).abs() < 1e-12, "{found}");
        let balanced = |loss, probes| of(Objective::Balanced, &clean, loss, probes);
        assert_eq!(balanced(0.4, 20), balanced(0.0, 0));
    }

    #[test]
    fn what_relays_keep_back_makes_every_objective_leave_for_a_route_that_is_much_slower() {
        for weights in OBJECTIVES.map(ScoreWeights::of) {
            let score = |delivers, ms| delivering(delivers, &weights, &[link(10.0); 2], ms);
            assert!(score(0.7, 40.0) < 0.7 * score(1.0, 40.0));
            assert!(score(0.7, 40.0) < score(1.0, 80.0));
        }
        let hop = LinkQuality { loss: 0.1, ..link(50.0) };
        let balanced = delivering(0.5, &ScoreWeights::default(), &[hop; 2], 100.0);
        let expected = (0.4 / 2.0 + 0.3 + 0.2 * 0.9 * 0.5 + 0.1) * HOP_PENALTY * 0.5;
        assert!((balanced - expected).abs() < 1e-12, "{balanced}");
        let reliable = delivering(0.5, &ScoreWeights::of(Objective::Reliability), &[hop], 100.0);
        let expected = 0.1 * 0.5 + 0.05 * 0.5 + 0.8 / (1.0 + 0.55 / 0.01) + 0.05;
        assert!((reliable - expected * 0.5).abs() < 1e-12, "{reliable}");
    }

    #[test]
    fn a_forecast_of_bandwidth_stands_for_what_is_advertised() {
        let links = [
            LinkQuality { bandwidth: Some(4_000_000.0), utilisation: 0.5, ..link(10.0) },
            LinkQuality { bandwidth: None, utilisation: 0.5, ..link(10.0) },
        ];
        let of = |objective, forecast_bandwidth| {
            let quality = RouteQuality { forecast_bandwidth, ..quality(&links, 100.0) };
            route_score(&ScoreWeights::of(objective), &quality) / HOP_PENALTY
        };
        let rest = 0.1 * 0.5 + 0.05 + 0.1 * 0.5;
        for (forecast, term) in [(None, 0.5), (Some(3_000_000.0), 0.75), (Some(250_000.0), 0.2)] {
            let found = of(Objective::Throughput, forecast);
            assert!((found - rest - 0.75 * term).abs() < 1e-12, "{forecast:?}: {found}");
        }
        let rest = 0.4 * 0.5 + 0.2 + 0.1 * 0.5;
        for (forecast, term) in [(None, 1.0), (Some(3_000_000.0), 1.0), (Some(250_000.0), 0.25)] {
            let found = of(Objective::Balanced, forecast);
            assert!((found - rest - 0.3 * term).abs() < 1e-12, "{forecast:?}: {found}");
        }
    }

    #[test]
    fn a_forecast_of_loss_counts_when_it_is_worse_than_what_was_measured() {
        let links = [LinkQuality { loss: 0.1, ..link(10.0) }, link(10.0)];
        let of = |objective, forecast_delivery| {
            let quality =
                RouteQuality { forecast_delivery, delivers: 0.5, ..quality(&links, 100.0) };
            route_score(&ScoreWeights::of(objective), &quality) / HOP_PENALTY / 0.5
        };
        let rest = 0.4 * 0.5 + 0.3 + 0.1;
        for (forecast, delivered) in [(None, 0.95), (Some(0.95), 0.925), (Some(0.6), 0.6)] {
            let found = of(Objective::Balanced, forecast);
            assert!((found - rest - 0.2 * delivered * 0.5).abs() < 1e-12, "{forecast:?}: {found}");
        }
        let rest = 0.1 * 0.5 + 0.05 * 0.5 + 0.05;
        for (forecast, delivered) in [(None, 0.9), (Some(0.95), 0.9), (Some(0.6), 0.6)] {
            let found = of(Objective::Reliability, forecast);
            let term = 1.0 / (1.0 + (1.0 - delivered * 0.5) / LOSS_HALF);
            assert!((found - rest - 0.8 * term).abs() < 1e-12, "{forecast:?}: {found}");
        }
    }

    #[test]
    fn the_weights_of_every_objective_add_up_to_one() {
        for weights in OBJECTIVES.map(ScoreWeights::of) {
            let sum =
                weights.latency + weights.bandwidth + weights.reliability + weights.congestion;
            assert!((sum - 1.0).abs() < 1e-12);
        }
        assert_eq!(ScoreWeights::of(Objective::Balanced), ScoreWeights::default());
    }

    #[test]
    fn a_better_forecast_scores_better_and_all_scores_are_within_one() {
        let links = [link(20.0), link(20.0)];
        assert!(score(&links, 40.0) > score(&links, 60.0));
        assert!(score(&[link(0.0)], 0.0) <= 1.0);
        assert_eq!(score(&[], 1.0), 0.0);
    }
}
