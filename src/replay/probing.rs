//! What is measured when: the trace holds more than a budget allows to know.

use rand::seq::SliceRandom;
use rand_pcg::Pcg64Mcg;

use super::policy::Pair;
use super::world::{Link, Sample, TraceWorld};

/// One measurement that can be made in a round.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// From and to.
    pub pair: Pair,
    /// When (s).
    pub t_s: f64,
    /// Value (ms); `None`: no reply.
    pub ms: Option<f64>,
    /// Start of a new level, by a person's label.
    pub changepoint: bool,
}

struct Position<'w> {
    pair: Pair,
    link: &'w Link,
    next: usize,
    next_lost: usize,
}

/// A cursor over the samples of all links.
pub struct Cursor<'w> {
    links: Vec<Position<'w>>,
    /// Position of each link's outcome in its samples; `usize::MAX` without one.
    next: Vec<Option<(usize, Sample)>>,
    nodes: usize,
}

impl<'w> Cursor<'w> {
    /// At the begin of the trace.
    pub fn new(world: &'w TraceWorld) -> Self {
        let nodes = world.nodes();
        let links = world
            .links
            .iter()
            .map(|(pair, link)| Position { pair: *pair, link, next: 0, next_lost: 0 })
            .collect();
        Self { links, next: vec![None; nodes * nodes], nodes }
    }

    /// Sets the outcome of every link: its first sample at or after `t_s`; a link measured once
    /// for all stays what it was.
    pub fn outcomes_at(&mut self, t_s: f64) {
        for position in &mut self.links {
            let samples = &position.link.samples;
            while samples.get(position.next).is_some_and(|sample| sample.t_s < t_s) {
                position.next += 1;
            }
            let constant = (samples.len() == 1).then(|| (0, samples[0]));
            let next = samples.get(position.next).map(|sample| (position.next, *sample));
            self.next[position.pair.0 * self.nodes + position.pair.1] = next.or(constant);
        }
    }

    /// Whether any link from a node has an outcome.
    pub fn leads_on(&self, src: usize) -> bool {
        (0..self.nodes).any(|dst| self.outcome(src, dst).is_some())
    }

    /// Whether any link to a node has an outcome.
    pub fn leads_to(&self, dst: usize) -> bool {
        (0..self.nodes).any(|src| self.outcome(src, dst).is_some())
    }

    /// The outcome of a link, and its position among the link's samples.
    pub fn outcome(&self, src: usize, dst: usize) -> Option<(usize, Sample)> {
        self.next[src * self.nodes + dst]
    }

    /// All measurements from where the cursor stands to a moment, by source and time.
    pub fn measurements(&mut self, until_s: f64) -> Vec<Probe> {
        let mut all: Vec<Probe> = Vec::new();
        for Position { pair, link, next, next_lost } in &mut self.links {
            while let Some(sample) = link.samples.get(*next).filter(|s| s.t_s < until_s) {
                let (t_s, ms, changepoint) = (sample.t_s, Some(sample.ms), sample.changepoint);
                all.push(Probe { pair: *pair, t_s, ms, changepoint });
                *next += 1;
            }
            while let Some(&t_s) = link.lost_s.get(*next_lost).filter(|t_s| **t_s < until_s) {
                all.push(Probe { pair: *pair, t_s, ms: None, changepoint: false });
                *next_lost += 1;
            }
        }
        all.sort_by(|a, b| a.pair.0.cmp(&b.pair.0).then(a.t_s.total_cmp(&b.t_s)));
        all
    }
}

/// Chooses the measurements of a round within a budget: first the links that neither end measured
/// for longest, or those that are worth most. A round trip is the same from both ends, and
/// advertisements tell what the other end measured: none is measured twice in a round.
pub struct Prober {
    nodes: usize,
    budget: Option<usize>,
    /// Round, plus one, in which each directed link was measured last.
    measured_in: Vec<usize>,
}

impl Prober {
    /// `budget`: links that each node measures a round; `None`: all.
    pub fn new(nodes: usize, budget: Option<usize>) -> Self {
        Self { nodes, budget, measured_in: vec![0; nodes * nodes] }
    }

    /// The measurements to make, in the order given; `all` is sorted by source. `worth`: of each
    /// two nodes, row by row.
    pub fn choose(
        &mut self,
        all: &[Probe],
        round: usize,
        worth: Option<&[f64]>,
        random: &mut Pcg64Mcg,
    ) -> Vec<Probe> {
        let Some(budget) = self.budget else { return all.to_vec() };
        let mut sources: Vec<&[Probe]> = all.chunk_by(|a, b| a.pair.0 == b.pair.0).collect();
        sources.shuffle(random);
        let mut chosen = Vec::new();
        for probes in sources {
            let mut probes = probes.to_vec();
            probes.shuffle(random);
            probes.sort_by_key(|probe| (self.last_round(probe.pair), probe.pair));
            probes.dedup_by_key(|probe| probe.pair);
            probes.shuffle(random);
            probes.sort_by_key(|probe| self.last_round(probe.pair));
            if let Some(worth) = worth {
                let key = |probe: &Probe| {
                    let done = self.last_round(probe.pair) > round;
                    (done, -worth[probe.pair.0 * self.nodes + probe.pair.1])
                };
                probes.sort_by(|a, b| {
                    let (a, b) = (key(a), key(b));
                    a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
                });
            }
            for probe in probes.into_iter().take(budget) {
                self.measured_in[probe.pair.0 * self.nodes + probe.pair.1] = round + 1;
                chosen.push(probe);
            }
        }
        chosen.sort_by(|a, b| a.pair.0.cmp(&b.pair.0).then(a.t_s.total_cmp(&b.t_s)));
        chosen
    }

    fn last_round(&self, (src, dst): Pair) -> usize {
        let of = |a: usize, b: usize| self.measured_in[a * self.nodes + b];
        of(src, dst).max(of(dst, src))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn a_budget_is_kept_and_nothing_is_measured_twice_before_all_were_once() {
        let mut all = Vec::new();
        for src in 0..7 {
            for dst in (0..7).filter(|dst| *dst != src) {
                all.push(Probe { pair: (src, dst), t_s: 0.0, ms: Some(1.0), changepoint: false });
            }
        }
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let mut prober = Prober::new(7, Some(2));
        let mut pairs = std::collections::BTreeSet::new();
        for round in 0..2 {
            let chosen = prober.choose(&all, round, None, &mut random);
            assert_eq!(chosen.len(), 14);
            let ends =
                |probe: &Probe| (probe.pair.0.min(probe.pair.1), probe.pair.0.max(probe.pair.1));
            pairs.extend(chosen.iter().map(ends));
        }
        assert!(pairs.len() >= 19, "of 21: {}", pairs.len());
    }
}
