//! Random histories for the tests: what a store may hold, and the engine's features of it.

use std::collections::{BTreeMap, BTreeSet};

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use crate::engine::measure::{LinkHistories, LinkQuality, ProbeKind, RouteHistories};
use crate::engine::predict::{FeatureVector, route_features};
use crate::engine::types::{NodeId, Route, Timestamp};
use crate::store::{LinkStateRow, ProbeRow};

/// What happened, as the store holds it.
#[derive(Default)]
pub(crate) struct History {
    pub(crate) probes: Vec<ProbeRow>,
    pub(crate) link_states: Vec<LinkStateRow>,
    /// Moments to compute features for in which nothing happened.
    pub(crate) asked: Vec<ProbeRow>,
}

/// The routes probed, node by node. Nobody ever mentions node 9.
const ROUTES: [&[u8]; 6] =
    [&[1, 2], &[1, 3, 2], &[1, 4, 3, 2], &[1, 3, 4, 5, 2], &[1, 6, 2], &[1, 3, 9]];
/// Who advertises links to whom. Only the far end speaks of 5 to 2 and of 6 to 2, nobody of 6 to 1.
const NEIGHBOURS: [(u8, &[u8]); 5] =
    [(1, &[2, 3, 4, 6]), (2, &[1, 3, 5, 6]), (3, &[1, 2, 4]), (4, &[1, 3, 5]), (5, &[3, 4])];

/// Draws `count` probes and advertisements. The probes overlap in time, a fifth is lost. An
/// advertisement speaks of several links, withdraws some, and knows the bandwidth of some.
pub(crate) fn random_history(seed: u64, count: usize) -> History {
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    let node = |byte| NodeId([byte; 8]);
    let mut history = History::default();
    let mut last_us = 1_700_000_000_000_000;
    let mut done = BTreeSet::new();
    for draw in 0..count {
        last_us += random.random_range(1..2_000_000);
        // Nothing is known of the first probes.
        if draw >= 20 && random.random_bool(0.3) {
            let (origin, neighbours) = NEIGHBOURS[random.random_range(0..NEIGHBOURS.len())];
            for neighbour in neighbours {
                if random.random_bool(0.2) {
                    continue;
                }
                // Some links lose nothing, and some RTTs are repeated.
                let rtts_ms = [7.0, heavy_tailed(&mut random)];
                let quality = LinkQuality {
                    rtt_ms: rtts_ms[usize::from(random.random_bool(0.7))],
                    jitter_ms: random.random_range(0.0..30.0),
                    loss: if random.random_bool(0.5) { 0.0 } else { random.random_range(0.0..1.0) },
                    bandwidth: random.random_bool(0.5).then(|| random.random_range(1e3..1e7)),
                    utilisation: random.random_range(0.0..1.0),
                };
                history.link_states.push(LinkStateRow {
                    at_us: last_us,
                    origin: node(origin).to_string(),
                    neighbour: node(*neighbour).to_string(),
                    quality: random.random_bool(0.9).then_some(quality),
                });
            }
            continue;
        }
        let nodes = ROUTES[random.random_range(0..ROUTES.len())].iter().map(|byte| node(*byte));
        let route = Route::new(nodes.collect::<Vec<_>>()).unwrap();
        let rtt_us = (heavy_tailed(&mut random) * 1e3) as u64;
        let mut done_us = last_us + rtt_us;
        while !done.insert(done_us) {
            done_us += 1;
        }
        history.probes.push(ProbeRow {
            kind: ProbeKind::Route,
            route: route.to_string(),
            hops: route.hop_count() as u32,
            sent_us: last_us,
            done_us,
            rtt_us: random.random_bool(0.8).then_some(rtt_us),
        });
    }
    history
}

/// 0.1 ms to half a minute, so that an inexact running sum would show.
fn heavy_tailed(random: &mut Pcg64Mcg) -> f64 {
    10_f64.powf(random.random_range(-1.0..4.5))
}

/// The features of each route probe as the engine computes them, by the time it left, and of each
/// moment asked for.
pub(crate) fn online(history: &History) -> BTreeMap<u64, FeatureVector> {
    enum Happening<'a> {
        Completed(&'a ProbeRow),
        Advertised(&'a [LinkStateRow]),
        Sent(&'a ProbeRow),
    }
    let mut happenings: Vec<(u64, Happening<'_>)> = Vec::new();
    for probe in &history.probes {
        happenings.push((probe.sent_us, Happening::Sent(probe)));
        happenings.push((probe.done_us, Happening::Completed(probe)));
    }
    happenings.extend(history.asked.iter().map(|asked| (asked.sent_us, Happening::Sent(asked))));
    let advertisements = history.link_states.chunk_by(|one, other| one.at_us == other.at_us);
    happenings.extend(advertisements.map(|said| (said[0].at_us, Happening::Advertised(said))));
    happenings.sort_by_key(|(at, _)| *at);

    let mut histories = RouteHistories::default();
    let mut links = LinkHistories::default();
    let mut features = BTreeMap::new();
    for (at, happening) in happenings {
        match happening {
            Happening::Completed(probe) => {
                let route: Route = probe.route.parse().unwrap();
                histories.probed(&route, Timestamp(at), probe.rtt_us);
                links.delivered(&route, probe.rtt_us);
            }
            Happening::Advertised(said) => {
                let changes = said.iter().map(|row| (row.neighbour.parse().unwrap(), row.quality));
                links.advertised(said[0].origin.parse().unwrap(), Timestamp(at), changes);
            }
            Happening::Sent(probe) => {
                let route: Route = probe.route.parse().unwrap();
                let known = histories.of(&route);
                features.insert(at, route_features(&route, &links, known, Timestamp(at)));
            }
        }
    }
    features
}
