//! How long one core takes to train the latency head on 100,000 rows, all features in use. The
//! bound is 60 s.
//!
//! `cargo bench --bench train`

use std::time::Instant;

use meshwise::engine::predict::schema::{FEATURES, index_of};
use meshwise::learn::{RouteKey, TrainConfig, TrainRow, train_rows};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// Rows that are fitted on; calibration and test take two fifths of all.
const FITTED: u64 = 100_000;
const ROWS: u64 = FITTED * 5 / 3;

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
    let rows = rows();
    let config = TrainConfig { rows_max: rows.len(), ..TrainConfig::default() };
    let started = Instant::now();
    let model = train_rows(&rows, &config, 0).expect("enough rows");
    let took_s = started.elapsed().as_secs_f64();
    assert!(model.throughput.is_none() && model.reliability.is_none(), "one head");
    println!(
        "latency head with scale, interval and card: {} rows x {} features in {took_s:.1} s",
        model.card.rows_train,
        FEATURES.len()
    );
}
