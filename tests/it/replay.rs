//! Replay of traces: small worlds in which it is known what is right.

use std::path::Path;
use std::process::Command;

use meshwise::learn::TrainConfig;
use meshwise::learn::trace::TraceRow;
use meshwise::replay::{Quantity, ReplayConfig, Run, TraceWorld, report, run};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

const NODES: usize = 10;
const ROUNDS: usize = 90;

/// A round trip (ms) by source, destination, round and a draw from 0 to 1.
type Rtt = fn(usize, usize, usize, f64) -> f64;

fn world(rtt_ms: Rtt) -> TraceWorld {
    let mut random = Pcg64Mcg::seed_from_u64(7);
    let mut rows = Vec::new();
    for round in 0..ROUNDS {
        for src in 0..NODES {
            for dst in (0..NODES).filter(|dst| *dst != src) {
                rows.push(TraceRow {
                    t_s: round as f64 * 60.0,
                    src: format!("n{src}"),
                    dst: format!("n{dst}"),
                    rtt_ms: Some(rtt_ms(src, dst, round, random.random_range(0.0..1.0))),
                    throughput_mbps: None,
                    changepoint: false,
                });
            }
        }
    }
    TraceWorld::new(&rows, Quantity::Latency).unwrap()
}

fn config(probes: Option<usize>, learning: bool) -> ReplayConfig {
    ReplayConfig {
        trace: "in-memory".into(),
        quantity: Quantity::Latency,
        probes,
        seeds: vec![1],
        decisions: Some(3_000),
        learning,
        out: None,
        train: TrainConfig { trees: 20, ..TrainConfig::default() },
    }
}

/// Mean cost of a policy over that of the direct route.
fn relative(run: Run, policy: &str) -> f64 {
    let rows = report::policies(&[run]);
    rows.iter().find(|row| row.name == policy).unwrap().relative_to_direct.unwrap()
}

/// Node 0 is a good relay; direct links are long.
fn relays_pay(src: usize, dst: usize, _: usize, draw: f64) -> f64 {
    let base = if src == 0 || dst == 0 { 30.0 } else { 100.0 };
    base * (0.95 + 0.1 * draw)
}

/// All links are alike, and half of the time three times as slow: there is nothing to gain.
fn only_noise(_: usize, _: usize, _: usize, draw: f64) -> f64 {
    if draw < 0.5 { 50.0 } else { 150.0 }
}

#[test]
fn where_relaying_pays_it_is_found_with_all_or_few_measurements() {
    let world = world(relays_pay);
    for probes in [None, Some(2)] {
        let played = run(&world, &config(probes, false), 1).unwrap();
        let found = relative(played, "meshwise");
        // Eight of nine pairs gain 40 %, those of node 0 nothing.
        assert!(found < 0.7, "{probes:?}: {found}");
    }
}

#[test]
fn where_there_is_only_noise_it_stays_with_the_direct_route() {
    let world = world(only_noise);
    // Enough decisions a round for it to have learned that when the scoring begins.
    let config = ReplayConfig { decisions: Some(12_000), ..config(None, false) };
    let naive = relative(run(&world, &config, 1).unwrap(), "last");
    let own = relative(run(&world, &config, 1).unwrap(), "meshwise");
    assert!(own < 1.02, "{own}");
    assert!(naive > 1.1, "chasing the last value costs: {naive}");
}

#[test]
fn the_same_seed_gives_the_same_run_and_another_seed_another() {
    let world = world(relays_pay);
    let costs = |seed| {
        let played = run(&world, &config(Some(3), true), seed).unwrap();
        assert!(played.models_trained > 0);
        played.outcomes.iter().map(|outcome| outcome.costs_ms).collect::<Vec<_>>()
    };
    let first = costs(1);
    assert!(first.len() > 1_000);
    assert_eq!(format!("{first:?}"), format!("{:?}", costs(1)));
    assert_ne!(format!("{first:?}"), format!("{:?}", costs(2)));
}

#[test]
fn the_command_prints_every_figure_and_leaves_its_files() {
    let trace = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/trace.parquet");
    let out = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_meshwise"))
        .args(["replay", "--seeds", "2", "--decisions", "3000", "--json", "--trace"])
        .arg(&trace)
        .arg("--out")
        .arg(out.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let names: Vec<&str> = report["policies"]
        .as_array()
        .unwrap()
        .iter()
        .map(|policy| policy["name"].as_str().unwrap())
        .collect();
    let expected = [
        "direct",
        "static",
        "last",
        "ewma",
        "four-metric",
        "random4",
        "ucb1",
        "via",
        "meshwise",
        "oracle",
        "split-oracle",
    ];
    assert_eq!(names, expected);
    for policy in report["policies"].as_array().unwrap() {
        for field in ["mean", "p50", "p95", "p99"] {
            assert!(policy["latency_ms"][field].as_f64().unwrap() > 0.0);
        }
        for field in ["relative_to_direct", "share_of_oracle_gain", "worse_than_direct_10pct"] {
            assert!(policy[field].is_f64(), "{field}");
        }
        assert!(policy["route_changes_per_hour"].is_f64() && policy["ci"].is_object());
    }
    for field in [
        "accuracy",
        "accuracy_10pct",
        "accuracy_15pct",
        "mdape",
        "one_minus_nmae",
        "spearman",
        "coverage_90",
        "width_90",
    ] {
        assert!(report["prediction"][field].is_f64(), "{field}");
    }
    assert!(report["prediction"]["skill_vs_best_naive"]["ci"].is_array());
    let estimators = &report["estimators"];
    assert!(estimators["estimates"]["doubly_robust"]["value"].is_f64(), "{estimators}");
    assert!(report["models_trained"].as_u64().unwrap() > 0);
    assert_eq!(report["rows"], 7_920);
    let own = report["policies"][8]["relative_to_direct"].as_f64().unwrap();
    assert!(own < 0.95, "a link in five is worth avoiding: {own}");
    for file in ["decisions.parquet", "latency_cdf.svg", "regret.svg", "calibration.svg"] {
        let length = std::fs::metadata(out.path().join(file)).unwrap().len();
        assert!(length > 1_000, "{file}: {length}");
    }
    // The folder is a data directory to the other commands.
    let stats = Command::new(env!("CARGO_BIN_EXE_meshwise"))
        .args(["data", "stats", "--data-dir"])
        .arg(out.path())
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&stats.stdout).contains("7920"), "{stats:?}");
}

#[test]
fn what_is_no_trace_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.parquet");
    for (content, words) in
        [(None, "cannot read the trace"), (Some("nonsense"), "cannot read the trace")]
    {
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let output = Command::new(env!("CARGO_BIN_EXE_meshwise"))
            .args(["replay", "--trace"])
            .arg(&path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(words) && said.lines().count() == 1, "{said}");
    }
}
