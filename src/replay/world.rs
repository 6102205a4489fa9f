//! A trace as a world: which links there are, what is measured when, and what an outcome is.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};

use crate::engine::types::NodeId;
use crate::learn::trace::TraceRow;

/// More distinct moments than this, and moments are grouped into rounds.
const SYNCHRONOUS_MOMENTS_MAX: usize = 5_000;
/// Most nodes of a trace: what is known of links is kept in square tables.
pub const NODES_MAX: usize = 1_000;

/// A measurement of a link.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Seconds since the trace began.
    pub t_s: f64,
    /// Value: round-trip time (ms), or milliseconds a megabit takes for a replay of throughput.
    pub ms: f64,
    /// Start of a new level, by a person's label.
    pub changepoint: bool,
}

/// What happened on one directed link, in order of time.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Answered measurements.
    pub samples: Vec<Sample>,
    /// Moments of measurements without a reply (s).
    pub lost_s: Vec<f64>,
}

/// The whole trace.
pub struct TraceWorld {
    /// Names of the nodes, ascending.
    pub names: Vec<String>,
    /// Their ids.
    pub ids: Vec<NodeId>,
    /// Links by source and destination.
    pub links: BTreeMap<(usize, usize), Link>,
    /// Begin of each round (s), ascending, and one past the last.
    pub rounds: Vec<f64>,
    /// Pairs that a decision can be made for.
    pub pairs: Vec<(usize, usize)>,
    /// Rows of the trace.
    pub rows: usize,
}

/// Which column of the trace is replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Round-trip time.
    Latency,
    /// Throughput, as the time that a megabit takes: the narrowest hop counts.
    Throughput,
}

impl TraceWorld {
    /// Indexes the rows, which are sorted by time.
    ///
    /// # Errors
    /// In words, when there is nothing to replay.
    pub fn new(rows: &[TraceRow], quantity: Quantity) -> Result<Self, String> {
        let names: BTreeSet<&str> = rows.iter().flat_map(|r| [&*r.src, &*r.dst]).collect();
        let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
        if names.len() > NODES_MAX {
            return Err(format!(
                "it has {} nodes, at most {NODES_MAX} can be replayed",
                names.len()
            ));
        }
        let index = |name: &str| names.binary_search_by(|n| n.as_str().cmp(name)).unwrap_or(0);
        let mut links: BTreeMap<(usize, usize), Link> = BTreeMap::new();
        for row in rows {
            let key = (index(&row.src), index(&row.dst));
            let value = match quantity {
                Quantity::Latency => row.rtt_ms,
                Quantity::Throughput => {
                    row.throughput_mbps.filter(|mbps| *mbps > 0.0).map(|mbps| 1_000.0 / mbps)
                }
            };
            let link = links.entry(key).or_default();
            let changepoint = row.changepoint;
            match value {
                Some(ms) => link.samples.push(Sample { t_s: row.t_s, ms, changepoint }),
                None if quantity == Quantity::Latency && row.throughput_mbps.is_none() => {
                    link.lost_s.push(row.t_s);
                }
                None => {}
            }
        }
        links.retain(|_, link| !link.samples.is_empty());
        if links.is_empty() {
            return Err("it holds no measurement of the quantity that is replayed".into());
        }
        let rounds = rounds(&links);
        let pairs = pairs(&links, names.len());
        let ids = names.iter().map(|name| node_id(name)).collect();
        Ok(Self { ids, links, rounds, pairs, names, rows: rows.len() })
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.names.len()
    }

    /// What a route over `relay`, or direct, costs when its hops cost `of(link)`.
    pub fn route_cost(
        quantity: Quantity,
        (src, dst): (usize, usize),
        relay: Option<usize>,
        of: impl Fn(usize, usize) -> f64,
    ) -> f64 {
        match (relay, quantity) {
            (None, _) => of(src, dst),
            (Some(relay), Quantity::Latency) => of(src, relay) + of(relay, dst),
            (Some(relay), Quantity::Throughput) => of(src, relay).max(of(relay, dst)),
        }
    }
}

/// The first 8 bytes of the SHA-256 of the name.
fn node_id(name: &str) -> NodeId {
    let digest = Sha256::digest(name);
    let mut id = [0; 8];
    id.copy_from_slice(&digest[..8]);
    NodeId(id)
}

/// Each moment of a trace that was measured in rounds; for others, steps of the median gap
/// between measurements of one link, empty ones left out.
fn rounds(links: &BTreeMap<(usize, usize), Link>) -> Vec<f64> {
    let all = links.values().flat_map(|link| link.samples.iter().map(|sample| sample.t_s));
    let mut moments: Vec<f64> = all.collect();
    moments.sort_by(f64::total_cmp);
    let last = moments.last().copied().unwrap_or(0.0);
    let mut distinct = moments.clone();
    distinct.dedup();
    let mut rounds = if distinct.len() <= SYNCHRONOUS_MOMENTS_MAX {
        distinct
    } else {
        let gaps = links.values().flat_map(|link| link.samples.windows(2));
        let mut gaps: Vec<f64> = gaps.map(|pair| pair[1].t_s - pair[0].t_s).collect();
        gaps.sort_by(f64::total_cmp);
        let step = gaps.get(gaps.len() / 2).copied().unwrap_or(1.0).max(1e-3);
        moments.iter_mut().for_each(|t_s| *t_s = (*t_s / step).floor() * step);
        moments.dedup();
        moments
    };
    rounds.push(last + 1e-6);
    rounds
}

/// Pairs with a choice of at least two routes; where no pair has one, all pairs with a link.
fn pairs(links: &BTreeMap<(usize, usize), Link>, nodes: usize) -> Vec<(usize, usize)> {
    let mut routes = vec![0_u32; nodes * nodes];
    let mut out: Vec<Vec<usize>> = vec![Vec::new(); nodes];
    for &(src, dst) in links.keys() {
        routes[src * nodes + dst] += 1;
        out[src].push(dst);
    }
    for (src, relays) in out.iter().enumerate() {
        for &relay in relays {
            for &dst in out[relay].iter().filter(|dst| **dst != src) {
                routes[src * nodes + dst] += 1;
            }
        }
    }
    let with = |least: u32| {
        let all = (0..nodes).flat_map(|src| (0..nodes).map(move |dst| (src, dst)));
        all.filter(|(src, dst)| src != dst && routes[src * nodes + dst] >= least).collect()
    };
    let pairs: Vec<(usize, usize)> = with(2);
    if pairs.is_empty() { with(1) } else { pairs }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(t_s: f64, src: &str, dst: &str, rtt_ms: Option<f64>) -> TraceRow {
        let (src, dst) = (src.to_owned(), dst.to_owned());
        TraceRow { t_s, src, dst, rtt_ms, throughput_mbps: None, changepoint: false }
    }

    #[test]
    fn a_pair_is_one_with_a_choice() {
        let rows = [
            row(0.0, "phone", "a", Some(10.0)),
            row(0.0, "phone", "b", None),
            row(0.0, "a", "server", Some(0.1)),
            row(0.0, "b", "server", Some(0.1)),
            row(9.0, "phone", "b", Some(20.0)),
        ];
        let world = TraceWorld::new(&rows, Quantity::Latency).unwrap();
        assert_eq!(world.names, ["a", "b", "phone", "server"]);
        assert_eq!(world.pairs, [(2, 3)]);
        assert_eq!(world.links[&(2, 1)].lost_s, [0.0]);
        assert_eq!(world.rounds[..2], [0.0, 9.0]);
        assert!(TraceWorld::new(&rows, Quantity::Throughput).is_err());
    }

    #[test]
    fn without_any_choice_every_link_is_a_pair() {
        let rows = [row(0.0, "a", "b", Some(1.0)), row(5.0, "c", "b", Some(1.0))];
        let world = TraceWorld::new(&rows, Quantity::Latency).unwrap();
        assert_eq!(world.pairs, [(0, 1), (2, 1)]);
    }

    #[test]
    fn a_route_is_as_slow_as_its_sum_and_as_wide_as_its_narrowest_hop() {
        let cost = |quantity| {
            TraceWorld::route_cost(quantity, (0, 1), Some(2), |a, _| if a == 0 { 3.0 } else { 5.0 })
        };
        assert_eq!((cost(Quantity::Latency), cost(Quantity::Throughput)), (8.0, 5.0));
    }
}
