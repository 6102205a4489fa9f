//! How long one decision's forecasts take: 8 candidate routes. The bound is 20 µs.
//!
//! - By a latency head alone: 100 trees of depth 4 and a scale model of 40.
//! - As on a node: what [`RoutePredictor::forecast`] does with the shipped model, all heads that have
//!   earned their place, the baselines, the mix and the interval.
//!
//! Explanations, which are made on request only, beside them.
//!
//! `cargo bench --no-default-features --bench predict`

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use meshwise::engine::predict::schema::{FEATURES, MISSING, index, schema_hash};
use meshwise::engine::predict::{
    FORMAT, FORMAT_VERSION, FeatureVector, ForestModel, Head, Interval, ModelCard, QualityModel,
    Ranking, Reference, RoutePredictor, Trees,
};
use meshwise::engine::types::{NodeId, Timestamp};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

const SHIPPED: &[u8] = include_bytes!("../models/first.json");
const THERE: NodeId = NodeId([1; 8]);
const CANDIDATES: usize = 8;
/// Decisions that are forecast in turn: more than the processor's branch prediction remembers.
const DECISIONS: usize = 512;

fn grow(trees: &mut Trees, random: &mut Pcg64Mcg, depth: u32) -> u32 {
    let node = if depth == 0 {
        trees.push_leaf(random.random_range(-0.1..0.1))
    } else {
        let feature = random.random_range(0..FEATURES.len() as u16);
        let parent = trees.push_split(feature, random.random_range(0.0..100.0));
        let left = grow(trees, random, depth - 1);
        let right = grow(trees, random, depth - 1);
        trees.set_children(parent, left, right);
        parent
    };
    trees.cover[node as usize] = f64::from(1_u32 << depth);
    node
}

fn forest(random: &mut Pcg64Mcg, count: usize) -> Trees {
    let mut trees = Trees::default();
    for _ in 0..count {
        let root = grow(&mut trees, random, 4);
        trees.roots.push(root);
    }
    trees
}

fn model(random: &mut Pcg64Mcg) -> ForestModel {
    ForestModel {
        format: FORMAT.into(),
        format_version: FORMAT_VERSION,
        version: "bench".into(),
        schema_hash: schema_hash(),
        feature_names: FEATURES.iter().map(|feature| feature.name.to_owned()).collect(),
        latency: Head {
            target: "ln_route_rtt_ms".into(),
            reference: Reference::LastValue,
            trees: forest(random, 100),
            scale: Some(forest(random, 40)),
            interval: Interval { coverage: 0.9, low: -1.0, high: 1.0 },
        },
        throughput: None,
        reliability: None,
        ranking: Ranking::default(),
        card: ModelCard::default(),
    }
}

fn row(random: &mut Pcg64Mcg) -> FeatureVector {
    let mut row: FeatureVector = std::array::from_fn(|_| {
        if random.random_bool(0.1) { MISSING } else { random.random_range(0.0..100.0) }
    });
    row[index("route_last_ms")] = random.random_range(1.0..100.0);
    row
}

fn predict(criterion: &mut Criterion) {
    let mut random = Pcg64Mcg::seed_from_u64(0);
    let model = model(&mut random);
    let model: &dyn QualityModel = &model;
    let rows: Vec<FeatureVector> = (0..CANDIDATES * DECISIONS).map(|_| row(&mut random)).collect();
    let mut decisions = rows.chunks(CANDIDATES).cycle();
    criterion.bench_function("forecast 8 candidates", |bencher| {
        bencher.iter(|| {
            for row in decisions.next().into_iter().flatten() {
                black_box(model.predict(black_box(row)));
            }
        });
    });
    let shipped = ForestModel::from_json(SHIPPED).expect("a test reads it, too");
    let mut predictor = RoutePredictor::new(true);
    predictor.set_model(Some(Arc::new(shipped)));
    for (at, row) in (0..).map(Timestamp).zip(&rows[..100]) {
        predictor.probe_sent(at, THERE, || *row);
        predictor.probe_completed(at, Some(30_000), at);
    }
    let mut decisions = rows.chunks(CANDIDATES).cycle();
    criterion.bench_function("forecast 8 candidates as a node", |bencher| {
        bencher.iter(|| {
            for row in decisions.next().into_iter().flatten() {
                black_box(predictor.forecast(THERE, black_box(*row)));
            }
        });
    });
    let mut rows = rows.iter().cycle();
    criterion.bench_function("explain 1 forecast", |bencher| {
        bencher.iter(|| black_box(rows.next().and_then(|row| model.explain(black_box(row)))));
    });
}

criterion_group!(benches, predict);
criterion_main!(benches);
