//! How many samples a second go into the store, from [`Writer::write`] to the last commit. The
//! bound is 100,000.
//!
//! `cargo bench --bench store`

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use meshwise::engine::measure::{ProbeKind, Sample};
use meshwise::engine::types::{NodeId, Route, Timestamp};
use meshwise::store::{QUEUE_MAX, Retention, Writer};

/// Samples written in one go.
const SAMPLES: u64 = 200_000;
/// Samples after which the writer is waited for: more than it queues would be dropped.
const WAIT_EVERY: u64 = QUEUE_MAX as u64 / 2;

/// Link and route probes of 1 to 4 hops in turn, one in twenty lost.
fn samples() -> Vec<Sample> {
    let routes: Vec<Route> = (0..64_u8)
        .filter_map(|index| {
            let hops = 1 + index % 4;
            let nodes = (0..=hops).map(|hop| NodeId([index, hop, 3, 4, 5, 6, 7, 8]));
            Route::new(nodes.collect::<Vec<_>>()).ok()
        })
        .collect();
    let sample = |(index, route): (u64, &Route)| {
        let sent_us = 1_700_000_000_000_000 + index * 10;
        let rtt_us = (index % 20 != 0).then_some(20_000 + index % 977);
        Sample::Probe {
            kind: if route.hop_count() == 1 { ProbeKind::Link } else { ProbeKind::Route },
            route: route.clone(),
            sent_at: Timestamp(sent_us),
            done_at: Timestamp(sent_us + rtt_us.unwrap_or(1_000_000)),
            rtt_us,
        }
    };
    (0..SAMPLES).zip(routes.iter().cycle()).map(sample).collect()
}

fn write(writer: &Writer, samples: Vec<Sample>) {
    for (index, sample) in (1..).zip(samples) {
        writer.write(sample);
        if index % WAIT_EVERY == 0 {
            writer.flush().expect("the store takes rows");
        }
    }
    writer.flush().expect("the store takes rows");
    assert_eq!((writer.dropped(), writer.errors()), (0, 0));
}

fn bench(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let samples = samples();
    let mut number = 0;
    let mut group = criterion.benchmark_group("store");
    group.sample_size(10).throughput(Throughput::Elements(SAMPLES));
    group.bench_function("200,000 probe samples", |bencher| {
        bencher.iter_batched(
            || {
                number += 1;
                let path = folder.path().join(format!("{number}.db"));
                let writer = Writer::start(path, Retention::default()).expect("a new store");
                (writer, samples.clone())
            },
            |(writer, samples)| {
                write(&writer, samples);
                writer
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
