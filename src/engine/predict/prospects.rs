//! What the ranking rules compare: from the newest values of links and routes to [`Prospect`]s.
//!
//! A link is described by its own newest values, filled up with the other direction's where it has few, and
//! by what its two nodes' links are like ([`super::posterior`], [`blend_ms`]). A route is the sum of its
//! links, until it has been measured from end to end often enough to speak for itself.

use std::collections::BTreeMap;

use super::posterior::{Ends, Measured, beliefs};
use super::ranking::{CENTRES_COUNT, Prospect, blend_ms};
use crate::engine::measure::window_statistics::quantile;

/// Values of which a level is made; where a link has fewer, the reverse direction fills up, and a
/// route that has fewer is described by its links.
pub const LEVEL_VALUES: usize = 5;
/// Values of which means and deviations are made.
pub const MEAN_VALUES: usize = 60;
/// Newest values whose deviation says whether the level is a new one.
const NEWEST_VALUES: usize = 3;
/// Links of a node that must have been measured before their usual deviation says something of
/// the node: of one or two it is the link's own.
const NODE_LINKS_MIN: usize = 8;
/// Share of a link's deviation in the spread of its mean, beside the mean's own error: of two
/// links with one mean, the steadier one is the safer choice. Without it, 4.3 % of the decisions on the
/// Seattle trace were over 10 % worse than direct by a rule that adds one spread.
const TAIL_SHARE: f64 = 0.25;

/// What is known of one directed link.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evidence {
    /// The newest values (ms), oldest first, at most [`MEAN_VALUES`]; the other direction's among them
    /// where there are fewer than [`LEVEL_VALUES`].
    pub values_ms: Vec<f64>,
    /// What the direction's own values are on average.
    pub own: Measured,
    /// Usual intervals by which the next value is overdue, 0 or more.
    pub overdue: f64,
}

/// What the newest values of something say.
#[derive(Clone, Copy, Debug)]
struct Summary {
    last: f64,
    level: f64,
    mean: f64,
    /// Deviation of all values, and of the newest ones.
    wide: f64,
    newest: f64,
    /// Of the values of the level and of all, on average.
    spread: f64,
}

impl Summary {
    /// `None` without a value.
    fn of(all: &[f64]) -> Option<Self> {
        let last = *all.last()?;
        let tail = |count: usize| &all[all.len().saturating_sub(count)..];
        let median = |count| quantile(tail(count), 0.5).unwrap_or(last);
        let wide = deviation(all);
        Some(Self {
            last,
            level: (median(NEWEST_VALUES) + median(LEVEL_VALUES)) / 2.0,
            mean: all.iter().sum::<f64>() / all.len() as f64,
            wide,
            newest: deviation(tail(NEWEST_VALUES)),
            spread: (deviation(tail(LEVEL_VALUES)) + wide) / 2.0,
        })
    }

    /// With the usual deviation of the links of its noisier end, what is believed of the mean, and
    /// the usual intervals by which it is overdue. The first centre, the forecast, is the level: models
    /// see routes.
    fn prospect(&self, end: f64, (mean, doubt): (f64, f64), overdue: f64) -> Prospect {
        let Self { last, level, spread, .. } = *self;
        let blend = blend_ms(level, self.mean, self.wide, self.newest, end);
        Prospect {
            centre_ms: [level, level, mean, level.max(last), blend],
            spread_ms: [spread, spread, doubt + TAIL_SHARE * self.wide, spread, spread],
            stale_ms: level * overdue,
            foresight: None,
        }
    }
}

impl Prospect {
    /// Of a route by its own newest values (ms), oldest first; `None` of fewer than [`LEVEL_VALUES`].
    pub fn of_values(values_ms: &[f64]) -> Option<Self> {
        let known = Summary::of(values_ms).filter(|_| values_ms.len() >= LEVEL_VALUES)?;
        let error = known.wide / (values_ms.len() as f64).sqrt();
        Some(known.prospect(0.0, (known.mean, error), 0.0))
    }

    /// Of a route of which nothing is known but a round trip (ms) and how far off it may be (ms).
    pub fn certain(ms: f64, spread_ms: f64) -> Self {
        let (centre_ms, spread_ms) = ([ms; CENTRES_COUNT], [spread_ms; CENTRES_COUNT]);
        Self { centre_ms, spread_ms, ..Self::default() }
    }

    /// With what is forecast for this route (ms), how far off such forecasts are (ms), and, where a model made
    /// the forecast, the weight of what it foresees beyond the level.
    pub fn foreseeing(
        mut self,
        forecast_ms: f64,
        spread_ms: Option<f64>,
        foresight: Option<f64>,
    ) -> Self {
        self.centre_ms[0] = forecast_ms;
        if let Some(spread_ms) = spread_ms {
            self.spread_ms[0] = spread_ms;
        }
        Self { foresight, ..self }
    }

    /// This link and the next one of a route, one after the other.
    pub fn and(&self, next: &Self) -> Self {
        self.joined(next, |a, b| a + b)
    }

    /// Two parts of a route, with each number of one joined with that of the other.
    pub fn joined(&self, other: &Self, join: impl Fn(f64, f64) -> f64) -> Self {
        let each = |a: &[f64; CENTRES_COUNT], b: &[f64; CENTRES_COUNT]| {
            std::array::from_fn(|at| join(a[at], b[at]))
        };
        Self {
            centre_ms: each(&self.centre_ms, &other.centre_ms),
            spread_ms: each(&self.spread_ms, &other.spread_ms),
            stale_ms: join(self.stale_ms, other.stale_ms),
            foresight: None,
        }
    }
}

/// The prospects of all links between nodes 0 to `nodes - 1` of which there is a value. `links` holds
/// both directions of each link.
pub fn prospects(nodes: usize, links: &BTreeMap<Ends, Evidence>) -> BTreeMap<Ends, Prospect> {
    let own = links.iter().map(|(ends, link)| (*ends, link.own)).collect();
    let Some(believed) = beliefs(nodes, &own) else { return BTreeMap::new() };
    let known: Vec<(Ends, Summary, f64)> = links
        .iter()
        .filter_map(|(ends, link)| Some((*ends, Summary::of(&link.values_ms)?, link.overdue)))
        .collect();
    let mut usual = vec![0.0; nodes];
    for of_node in known.chunk_by(|((one, _), ..), ((other, _), ..)| one == other) {
        let wide: Vec<f64> = of_node.iter().map(|(_, summary, _)| summary.wide).collect();
        if wide.len() >= NODE_LINKS_MIN {
            usual[of_node[0].0.0] = quantile(&wide, 0.5).unwrap_or(0.0);
        }
    }
    let prospect = |(ends, summary, overdue): &(Ends, Summary, f64)| {
        let believed = believed.get(ends)?;
        let end = usual[ends.0].max(usual[ends.1]);
        let mean = (believed.mean_ms, believed.deviation_ms);
        Some((*ends, summary.prospect(end, mean, *overdue)))
    };
    known.iter().filter_map(prospect).collect()
}

fn deviation(values: &[f64]) -> f64 {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    (values.iter().map(|ms| (ms - mean).powi(2)).sum::<f64>() / count).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::{Centre, Ranking};

    fn centre(prospect: &Prospect, centre: Centre) -> f64 {
        Ranking { centre, pessimism: 0.0, staleness: 0.0, margin: 0.0 }.bound_ms(prospect)
    }

    #[test]
    fn a_route_speaks_for_itself_once_it_was_measured_often_enough() {
        assert_eq!(Prospect::of_values(&[10.0; LEVEL_VALUES - 1]), None);
        let route = Prospect::of_values(&[10.0, 10.0, 10.0, 10.0, 60.0]).unwrap();
        assert_eq!(centre(&route, Centre::Level), 10.0, "one outlier");
        assert_eq!(centre(&route, Centre::Mean), 20.0);
        assert_eq!(centre(&route, Centre::Cautious), 60.0);
        let blend = centre(&route, Centre::Blend);
        assert!(10.0 < blend && blend < 20.0, "{blend}");
        let slower = Prospect::of_values(&[10.0, 10.0, 60.0, 60.0, 60.0]).unwrap();
        assert!((centre(&slower, Centre::Blend) - 60.0).abs() < 1.0, "a new level: {slower:?}");
    }

    #[test]
    fn the_links_of_a_route_add_up() {
        let link = |ms: f64, overdue: f64| {
            let own = Measured { mean_ms: ms, deviation_ms: 0.0, count: 5.0 };
            Evidence { values_ms: vec![ms; 5], own, overdue }
        };
        let reverse = || Evidence { values_ms: vec![30.0; 5], ..Evidence::default() };
        let links = BTreeMap::from([
            ((0, 1), link(10.0, 0.0)),
            ((1, 0), link(10.0, 0.0)),
            ((1, 2), link(30.0, 2.0)),
            ((2, 1), reverse()),
            ((0, 2), Evidence::default()),
        ]);
        let links = prospects(3, &links);
        assert!(!links.contains_key(&(0, 2)), "nothing was ever measured");
        let route = links[&(0, 1)].and(&links[&(1, 2)]);
        assert_eq!((centre(&route, Centre::Level), route.stale_ms), (40.0, 60.0));
        assert_eq!(centre(&links[&(2, 1)], Centre::Level), 30.0, "by the other direction");
        assert_eq!(prospects(3, &BTreeMap::new()), BTreeMap::new());
    }

    #[test]
    fn at_a_node_whose_links_all_spike_the_mean_counts_more() {
        let spiky = [vec![20.0; 8], vec![200.0; 2], vec![20.0; 3]].concat();
        let mean_ms = spiky.iter().sum::<f64>() / spiky.len() as f64;
        let own = Measured { mean_ms, deviation_ms: deviation(&spiky), count: 13.0 };
        let of = |count: usize| {
            let link = Evidence { values_ms: spiky.clone(), own, overdue: 0.0 };
            let both = |at: usize| [((0, at), link.clone()), ((at, 0), link.clone())];
            let links = (1..=count).flat_map(both).collect();
            centre(&prospects(count + 1, &links)[&(0, 1)], Centre::Blend)
        };
        assert!(of(NODE_LINKS_MIN - 1) < 20.5, "{}", of(NODE_LINKS_MIN - 1));
        assert!(of(NODE_LINKS_MIN) > 30.0, "{}", of(NODE_LINKS_MIN));
    }
}
