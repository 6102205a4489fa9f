//! How long one core takes to train each head on 100,000 rows, all features in use, as training says by itself. The
//! bound is 60 s a head.
//!
//! `cargo bench --bench train`

use std::time::Instant;

use meshwise::engine::predict::schema::{FEATURES, index_of};
use meshwise::learn::{RouteKey, TrainConfig, TrainRow, train_rows};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// Answered probes, and slices, that are fitted on; calibration and test take two fifths of all.
const FITTED: u64 = 100_000;
/// One probe of so many is lost.
const LOST_EVERY: u64 = 10;
const ROWS: u64 = FITTED * 5 / 3 * LOST_EVERY / (LOST_EVERY - 1);

/// Every feature differs from row to row; the answer depends on a dozen of them and on chance.
fn rows() -> Vec<TrainRow> {
    let mut random = Pcg64Mcg::seed_from_u64(1);
    let at = |name| index_of(name).expect("a feature of the schema");
    let (last, mean, busy) =
        (at("route_last_ms"), at("route_mean5_ms"), at("link_utilisation_max"));
    let row = |number: u64| {
        let mut features = std::array::from_fn(|_| random.random_range(1.0..100.0));
        features[busy] = random.random_range(0.0..1.0);
        features[mean] = features[last] * random.random_range(0.8..1.25);
        let some: f64 = (0..FEATURES.len()).step_by(7).map(|index| features[index]).sum();
        let slower = if features[busy] > 0.7 { 1.5 } else { 1.0 };
        let rtt_ms = features[last] * slower * (1.0 + some / 5_000.0);
        TrainRow {
            sent_us: number * 1_000_000,
            done_us: number * 1_000_000 + 500_000,
            rtt_ms: Some(rtt_ms * random.random_range(0.9..1.1)),
            bandwidth: None,
            key: RouteKey::of("a>b"),
            features,
        }
    };
    (0..ROWS).map(row).collect()
}

fn main() {
    tracing_subscriber::fmt().with_target(false).with_ansi(false).without_time().init();
    let probes = rows();
    let lost = |(number, row): (usize, &TrainRow)| TrainRow {
        rtt_ms: row.rtt_ms.filter(|_| !(number as u64).is_multiple_of(LOST_EVERY)),
        ..*row
    };
    let slice = |row: &TrainRow| TrainRow {
        rtt_ms: None,
        bandwidth: row.rtt_ms.map(|ms| 1e9 / ms),
        ..*row
    };
    let slices = probes[..(FITTED * 5 / 3) as usize].iter().map(slice);
    let rows: Vec<TrainRow> = probes.iter().enumerate().map(lost).chain(slices).collect();
    let config = TrainConfig { rows_max: rows.len(), ..TrainConfig::default() };
    let started = Instant::now();
    let model = train_rows(&rows, &config, 0).expect("enough rows");
    let took_s = started.elapsed().as_secs_f64();
    assert!(model.throughput.is_some() && model.reliability.is_some(), "three heads");
    println!(
        "all with scales, intervals and card: {} probes and as many slices of {} features in {took_s:.1} s",
        model.card.rows_train,
        FEATURES.len()
    );
}
