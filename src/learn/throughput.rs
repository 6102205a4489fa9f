//! The throughput head: what bandwidth a route will deliver.
//!
//! Its rows are those with a bandwidth: on a node slices of real traffic ([`super::slices`]), in a
//! replay every measurement. They are split by time on their own, because traffic is rarer than
//! probes and comes when it wants.
//!
//! The head starts from the narrowest advertised link when enough rows know one. Beside it stands
//! what one would say without it: that reference, and the last value, the newest bandwidth that the
//! same route had delivered before (the mean of the fit rows where it had delivered none). A head
//! that one of them beats on the test rows [has no place] in decisions; the card shows it.
//!
//! [has no place]: ThroughputCard::earns_its_place

use std::collections::BTreeMap;
use std::time::Instant;

use super::head::{self, Example, Fitted};
use super::rows::{example, parts};
use super::{LearnError, TrainConfig, TrainRow};
use crate::engine::predict::{Head, Reference, ThroughputCard};

/// Fewest fit rows with a bandwidth for a throughput head. A guess.
pub const THROUGHPUT_ROWS_MIN: usize = 200;
/// Fewest rows to calibrate on, and to test on.
const ROWS_HELD_MIN: usize = super::train::ROWS_HELD_MIN;
/// The head starts from the links' bandwidth when this share of its rows know it.
pub const BANDWIDTH_KNOWN_MIN: f64 = 0.5;

const TARGET: &str = "ln_route_bandwidth_bytes_s";

/// Fits and judges the head on rows with a bandwidth, in order of `sent_us`; `None` when they are
/// too few.
///
/// # Errors
/// [`LearnError::Fit`].
pub(super) fn fit(
    rows: &[TrainRow],
    config: &TrainConfig,
) -> Result<Option<(Head, ThroughputCard)>, LearnError> {
    let parts = parts(rows, config);
    let of = |row, reference| Some((row, with_bandwidth(row, reference)?));
    let all = parts.known(|row| of(row, Reference::Zero));
    let known = parts.known(|row| of(row, Reference::LinkBandwidth));
    let enough = known.fit.len() as f64 >= BANDWIDTH_KNOWN_MIN * all.fit.len() as f64
        && !known.calibrate.is_empty()
        && !known.test.is_empty();
    let (reference, examples) =
        if enough { (Reference::LinkBandwidth, known) } else { (Reference::Zero, all) };
    let held = examples.calibrate.len().min(examples.test.len());
    if examples.fit.len() < THROUGHPUT_ROWS_MIN || held < ROWS_HELD_MIN {
        return Ok(None);
    }
    let since = Instant::now();
    let test = plain(&examples.test);
    let Fitted { head, shrink, .. } = {
        let (fit, calibrate) = (plain(&examples.fit), plain(&examples.calibrate));
        head::fit(TARGET, reference, &fit, &calibrate, &config.boosting())?
    };
    super::train::told("throughput", examples.fit.len(), since);
    let held = head::held_on(&head, &test);
    let (rmse_ln, rmse_ln_reference) = head::rmse_ln(&head, &test);
    let mean =
        examples.fit.iter().map(|(_, row)| row.truth_ln).sum::<f64>() / examples.fit.len() as f64;
    let card = ThroughputCard {
        rows_train: examples.fit.len(),
        rows_test: test.len(),
        shrink,
        rmse_ln,
        rmse_ln_reference,
        rmse_ln_last: Some(rmse_ln_last(rows, &examples.test, mean)),
        coverage: held.coverage,
        width_ln: held.width,
    };
    Ok(Some((head, card)))
}

fn plain<'a>(rows: &[(&TrainRow, Example<'a>)]) -> Vec<Example<'a>> {
    rows.iter().map(|(_, example)| *example).collect()
}

fn with_bandwidth(row: &TrainRow, reference: Reference) -> Option<Example<'_>> {
    example(row, row.bandwidth?.ln(), reference)
}

/// Root mean squared error (ln units) of the last value of each route on test rows, which are
/// among `rows`; `unknown` stands in for it on a route without one.
fn rmse_ln_last(rows: &[TrainRow], test: &[(&TrainRow, Example<'_>)], unknown: f64) -> f64 {
    let mut delivered: BTreeMap<u64, Vec<(u64, f64)>> = BTreeMap::new();
    let mut rows = rows.iter().peekable();
    let mut squares = 0.0;
    for (row, example) in test {
        while let Some(before) = rows.next_if(|before| before.sent_us < row.sent_us) {
            let Some(bandwidth) = before.bandwidth else { continue };
            delivered.entry(before.key.route).or_default().push((before.done_us, bandwidth.ln()));
        }
        let own = delivered.get(&row.key.route);
        let last = own.and_then(|own| own.iter().rev().find(|(done_us, _)| *done_us < row.sent_us));
        squares += (example.truth_ln - last.map_or(unknown, |(_, ln)| *ln)).powi(2);
    }
    (squares / test.len().max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;
    use crate::engine::measure::{LinkQuality, RouteReport, Sample};
    use crate::engine::predict::{ForestModel, QualityModel};
    use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};
    use crate::learn::{RouteKey, train_from_store};
    use crate::store::{Retention, Writer};

    const START_US: u64 = 1_700_000_000_000_000;

    /// A store of a node with two routes. Every 10 s the links are advertised anew, each route is
    /// probed, and a slice of traffic ends on each: `slice` says its rate (bytes/s) and the share
    /// of marked datagrams, by the route, the step and the share of it that is taken by others. Links
    /// advertise a bandwidth where it is `known`.
    fn store_of(
        path: &Path,
        known: bool,
        mut slice: impl FnMut(usize, u64, f64) -> Option<(f64, f64)>,
    ) {
        let mut random = Pcg64Mcg::seed_from_u64(11);
        let writer = Writer::start(path, Retention::default()).unwrap();
        let node = |byte| NodeId([byte; 8]);
        let routes = [vec![node(1), node(2)], vec![node(1), node(3), node(2)]];
        let routes = routes.map(|nodes| Route::new(nodes).unwrap());
        for step in 0..450_u64 {
            let mut now = START_US + step * 10_000_000;
            let mut stamp = || {
                now += 1_000;
                Timestamp(now)
            };
            let taken: [f64; 2] = std::array::from_fn(|_| random.random_range(0.0..0.9));
            for (route, taken) in routes.iter().zip(taken) {
                for (origin, neighbour) in route.links() {
                    let quality = Some(LinkQuality {
                        rtt_ms: 10.0,
                        jitter_ms: 1.0,
                        loss: 0.0,
                        bandwidth: known.then_some(1e6),
                        utilisation: taken,
                    });
                    writer.write(Sample::LinkState { at: stamp(), origin, neighbour, quality });
                }
                let (sent_at, done_at) = (stamp(), stamp());
                let (kind, rtt_us) = (crate::engine::measure::ProbeKind::Route, Some(1_000));
                let route = route.clone();
                writer.write(Sample::Probe { kind, route, sent_at, done_at, rtt_us });
            }
            for (index, route) in routes.iter().enumerate() {
                let Some((rate, marked)) = slice(index, step, taken[index]) else { continue };
                let sent = (rate / 120.0) as u64;
                let report = RouteReport {
                    route: route.clone(),
                    route_id: 1,
                    sent,
                    received: sent,
                    bytes: sent * 1_200,
                    marked: (sent as f64 * marked) as u64,
                    rtt_us: Some(10_000),
                    back_sent: 1,
                    back_received: 1,
                    back_marked: 0,
                    duration_us: 9_900_000,
                };
                let at = Timestamp(START_US + step * 10_000_000 + 9_990_000 + index as u64);
                writer.write(Sample::RouteSlice { at, tunnel: TunnelId(index as u16), report });
            }
        }
        writer.flush().unwrap();
    }

    fn trained(
        known: bool,
        slice: impl FnMut(usize, u64, f64) -> Option<(f64, f64)>,
    ) -> ForestModel {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store.db");
        store_of(&store, known, slice);
        let config = TrainConfig { trees: 30, learning_rate: 0.3, ..TrainConfig::default() };
        train_from_store(&store, &folder.path().join("models"), &config, 1).unwrap().model
    }

    /// A route whose links are known, with so much of them taken.
    fn asked(taken: f64) -> crate::engine::predict::FeatureVector {
        use crate::engine::predict::schema::{FEATURES, index};
        let mut features = [0.0; FEATURES.len()];
        for (name, value) in [
            ("hop_count", 1.0),
            ("link_utilisation_max", taken),
            ("link_bandwidth_min", 1e6),
            ("route_last_ms", 1.0),
            ("route_mean5_ms", 1.0),
            ("route_median3_ms", 1.0),
            ("route_median_5_ms", 1.0),
        ] {
            features[index(name)] = value;
        }
        features
    }

    #[test]
    fn the_traffic_of_a_node_teaches_what_its_routes_deliver() {
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let mut delivered =
            |taken: f64| Some((1e6 * (1.0 - taken) * random.random_range(0.9..1.1), 0.05));
        let model = trained(true, |_, _, taken| delivered(taken));
        let card = model.card.throughput.unwrap();
        let last = card.rmse_ln_last.unwrap();
        assert!(card.rows_train > 500 && card.rows_test > 150, "{card:?}");
        assert!(card.rmse_ln < 0.3 * last && card.rmse_ln < 0.3 * card.rmse_ln_reference);
        assert!(card.earns_its_place() && (card.coverage - 0.9).abs() < 0.06, "{card:?}");
        for taken in [0.1, 0.5, 0.8] {
            let bandwidth = model.predict(&asked(taken)).unwrap().bandwidth.unwrap();
            assert!((bandwidth / (1e6 * (1.0 - taken))).ln().abs() < 0.25, "{taken}: {bandwidth}");
        }
        // Without a word of the links it starts from what was delivered on the whole.
        let unknown = trained(false, |_, _, taken| delivered(taken));
        assert_eq!(unknown.throughput.unwrap().reference, Reference::Zero);
        let card = unknown.card.throughput.unwrap();
        assert!(card.rmse_ln < 0.4 * card.rmse_ln_last.unwrap(), "{card:?}");
        // The other heads are those of the same node without traffic.
        let without = trained(true, |_, _, _| None);
        assert_eq!((&model.latency, &model.reliability), (&without.latency, &without.reliability));
        assert_eq!((without.throughput, without.card.throughput), (None, None));
    }

    #[test]
    fn traffic_that_the_route_did_not_hold_up_teaches_nothing() {
        let model = trained(true, |_, _, taken| Some((1e5 * (1.0 - taken), 0.0)));
        assert_eq!((model.throughput, model.card.throughput), (None, None));
    }

    #[test]
    fn a_head_that_the_last_value_beats_is_told_and_not_used() {
        let mut random = Pcg64Mcg::seed_from_u64(2);
        let mut wander = [12.0_f64; 2];
        // What a route delivers wanders off, whatever its links say.
        let model = trained(true, |route, step, _| {
            let drift = if step < 300 { 0.0 } else { -0.02 };
            wander[route] += drift + random.random_range(-0.02..0.02);
            Some((wander[route].exp(), 0.05))
        });
        let card = model.card.throughput.unwrap();
        assert!(card.rmse_ln > card.rmse_ln_last.unwrap() && !card.earns_its_place(), "{card:?}");
        assert!(model.throughput.is_some());
        assert_eq!(model.predict(&asked(0.5)).unwrap().bandwidth, None);
        let told = &model.card.known_failures;
        assert!(told.iter().any(|f| f.contains("the last value of the route")), "{told:?}");
    }

    #[test]
    fn the_last_value_is_that_of_the_same_route_and_known_in_time() {
        let row = |route, sent_us, done_us, bandwidth: f64| TrainRow {
            key: RouteKey { route, ends: 0 },
            sent_us,
            done_us,
            rtt_ms: None,
            bandwidth: Some(bandwidth),
            features: asked(0.0),
        };
        // The second value of route 1 comes too late for the last row, that of route 2 has no other.
        let rows =
            [row(1, 0, 10, 2.0), row(2, 5, 15, 8.0), row(1, 20, 30, 4.0), row(1, 30, 40, 2.0)];
        let error = |test: &[usize]| {
            let test = test.iter().map(|at| &rows[*at]);
            let test: Vec<_> =
                test.map(|row| (row, with_bandwidth(row, Reference::Zero).unwrap())).collect();
            rmse_ln_last(&rows, &test, 8.0_f64.ln())
        };
        assert!(error(&[3]) < 1e-12, "2 as the first");
        assert!((error(&[2, 3]) - 2.0_f64.ln() / 2.0_f64.sqrt()).abs() < 1e-12);
        assert!(error(&[1]) < 1e-12, "what stands in");
    }
}
