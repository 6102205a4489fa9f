//! What the simple policies know: a few numbers for each directed link, in square tables.
//!
//! A link that was never measured in its own direction is described by the other direction.

use super::world::{Quantity, TraceWorld};

/// Gain of the moving average.
const AVERAGE_GAIN: f64 = 0.5;
/// Gain of jitter, error and loss.
const SLOW_GAIN: f64 = 0.25;

/// The numbers of one link.
#[derive(Clone, Copy, Debug)]
pub struct Numbers {
    /// First value known (ms).
    pub first: f64,
    /// Last value (ms).
    pub last: f64,
    /// Exponential moving average, gain 0.5 (ms).
    pub average: f64,
    /// Smoothed absolute difference of consecutive values (ms).
    pub jitter: f64,
    /// Smoothed absolute error of the moving average (ms).
    pub error: f64,
    /// Smoothed share of lost measurements.
    pub loss: f64,
    /// Number, sum and sum of squares of all values.
    pub count: f64,
    sum: f64,
    squares: f64,
    /// Counts all measurements, so that the fresher direction is known.
    stamp: u64,
}

impl Numbers {
    /// Of a first value.
    fn new(ms: f64, stamp: u64) -> Self {
        Self {
            first: ms,
            last: ms,
            average: ms,
            jitter: 0.0,
            error: 0.0,
            loss: 0.0,
            count: 1.0,
            sum: ms,
            squares: ms * ms,
            stamp,
        }
    }

    fn push(&mut self, ms: f64, stamp: u64) {
        self.stamp = stamp;
        self.jitter += SLOW_GAIN * ((ms - self.last).abs() - self.jitter);
        self.error += SLOW_GAIN * ((ms - self.average).abs() - self.error);
        self.loss -= SLOW_GAIN * self.loss;
        self.last = ms;
        self.average += AVERAGE_GAIN * (ms - self.average);
        self.count += 1.0;
        self.sum += ms;
        self.squares += ms * ms;
    }

    /// Mean of all values (ms).
    pub fn mean(&self) -> f64 {
        self.sum / self.count
    }

    /// Standard error of the mean (ms); of a single value, half of it.
    pub fn standard_error(&self) -> f64 {
        if self.count < 2.0 {
            return self.mean() / 2.0;
        }
        let variance = (self.squares / self.count - self.mean().powi(2)).max(0.0);
        (variance / self.count).sqrt()
    }
}

/// The numbers of all links.
#[derive(Clone, Debug)]
pub struct Knowledge {
    nodes: usize,
    quantity: Quantity,
    links: Vec<Option<Numbers>>,
    exists: Vec<bool>,
    fresher: bool,
    stamp: u64,
}

impl Knowledge {
    /// Nothing known yet but which links there are. `fresher`: a link is described by whichever
    /// direction was measured last, as is right when a budget lets one end do it for both.
    pub fn new(
        nodes: usize,
        quantity: Quantity,
        fresher: bool,
        links: impl IntoIterator<Item = (usize, usize)>,
    ) -> Self {
        let mut exists = vec![false; nodes * nodes];
        links.into_iter().for_each(|(src, dst)| exists[src * nodes + dst] = true);
        Self { nodes, quantity, links: vec![None; nodes * nodes], exists, fresher, stamp: 0 }
    }

    /// Whether there is a direct link, measured or not.
    pub fn is_link(&self, (src, dst): (usize, usize)) -> bool {
        self.exists[src * self.nodes + dst]
    }

    /// A link was measured, or a measurement of it was lost.
    pub fn measured(&mut self, src: usize, dst: usize, ms: Option<f64>) {
        self.stamp += 1;
        let link = &mut self.links[src * self.nodes + dst];
        match (link.as_mut(), ms) {
            (Some(numbers), Some(ms)) => numbers.push(ms, self.stamp),
            (Some(numbers), None) => numbers.loss += SLOW_GAIN * (1.0 - numbers.loss),
            (None, Some(ms)) => *link = Some(Numbers::new(ms, self.stamp)),
            (None, None) => {}
        }
    }

    /// What is known of a link, by its own direction or else the other one, or by the fresher
    /// one.
    pub fn link(&self, src: usize, dst: usize) -> Option<&Numbers> {
        let of = |a: usize, b: usize| self.links[a * self.nodes + b].as_ref();
        match (of(src, dst), of(dst, src)) {
            (Some(own), Some(other)) if self.fresher && other.stamp > own.stamp => Some(other),
            (own, other) => own.or(other),
        }
    }

    /// A number of a route; infinite when a link is unknown.
    pub fn route(
        &self,
        pair: (usize, usize),
        relay: Option<usize>,
        of: impl Fn(&Numbers) -> f64,
    ) -> f64 {
        TraceWorld::route_cost(self.quantity, pair, relay, |a, b| {
            self.link(a, b).map_or(f64::INFINITY, &of)
        })
    }

    /// Every relay that a pair could use.
    pub fn relays(&self, (src, dst): (usize, usize)) -> impl Iterator<Item = usize> + '_ {
        (0..self.nodes).filter(move |relay| *relay != src && *relay != dst)
    }

    /// The route of least cost: direct (`None`) or over one of these relays.
    pub fn best(
        &self,
        pair: (usize, usize),
        relays: impl Iterator<Item = usize>,
        of: impl Fn(&Numbers) -> f64,
    ) -> (Option<usize>, f64) {
        let direct = (None, self.route(pair, None, &of));
        let others = relays.map(|relay| (Some(relay), self.route(pair, Some(relay), &of)));
        others.fold(direct, |best, other| if other.1 < best.1 { other } else { best })
    }
}
