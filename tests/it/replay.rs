//! Replay of traces: small worlds in which it is known what is right.

use std::path::Path;
use std::process::Command;

use meshwise::learn::TrainConfig;
use meshwise::learn::trace::TraceRow;
use meshwise::replay::{NAMES, Quantity, ReplayConfig, Run, TRAININGS, TraceWorld, report, run};
use polars::prelude::{Column, DataFrame, ParquetWriter};
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
        own_probes: true,
        trainings: TRAININGS,
        out: None,
        force: false,
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
        .args([
            "replay",
            "--seeds",
            "2",
            "--decisions",
            "3000",
            "--trainings",
            "1",
            "--json",
            "--trace",
        ])
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
    assert_eq!(names, NAMES);
    for policy in report["policies"].as_array().unwrap() {
        for field in ["mean", "p50", "p95", "p99"] {
            assert!(policy["latency_ms"][field].as_f64().unwrap() > 0.0);
        }
        for field in ["relative_to_direct", "share_of_oracle_gain", "worse_than_direct_10pct"] {
            assert!(policy[field].is_f64(), "{field}");
        }
        assert!(policy["route_changes_per_hour"].is_f64());
        for field in ["relative_to_direct", "share_of_oracle_gain", "worse_than_direct_10pct"] {
            assert!(policy["ci"][field].is_array(), "{field}");
        }
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
        "slack_ln",
        "excess_over_moving_average_ln",
    ] {
        assert!(report["prediction"][field].is_f64(), "{field}");
    }
    assert!(report["prediction"]["skill_vs_best_naive"]["ci"].is_array());
    assert_eq!(report["prediction"]["calibration"].as_array().unwrap().len(), 10);
    let rule = &report["best_fixed_rule"];
    assert!(
        rule["mean_ms"].as_f64().unwrap() > 0.0 && rule["rule"]["centre"].is_string(),
        "{rule}"
    );
    let estimators = &report["estimators"];
    assert!(estimators["estimates"]["doubly_robust"]["value"].is_f64(), "{estimators}");
    assert!(report["models_trained"].as_u64().unwrap() > 0);
    assert_eq!(report["rows"], 7_920);
    let own = report["policies"][8]["relative_to_direct"].as_f64().unwrap();
    assert!(own < 0.95, "a link in five is worth avoiding: {own}");
    let left = [
        "decisions.parquet",
        "training_rows.parquet",
        "latency_cdf.svg",
        "regret.svg",
        "calibration.svg",
        "coverage.svg",
    ];
    for file in left {
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
    refuses_what_is_there_unless_forced(&trace, out.path());
}

/// Another replay into the same folder.
fn refuses_what_is_there_unless_forced(trace: &Path, out: &Path) {
    let notes = out.join("notes.txt");
    std::fs::write(&notes, "mine").unwrap();
    let before = std::fs::read(out.join("meshwise.db")).unwrap();
    let again = |more: &[&str]| {
        let mut replay = Command::new(env!("CARGO_BIN_EXE_meshwise"));
        replay.args(["replay", "--decisions", "500", "--no-learning", "--json", "--trace"]);
        replay.arg(trace).arg("--out").arg(out).args(more).output().unwrap()
    };
    let refused = again(&[]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("is not empty") && said.contains("--force"), "{said}");
    assert!(refused.stdout.is_empty() && said.lines().count() == 1, "{said}");
    assert_eq!(std::fs::read(out.join("meshwise.db")).unwrap(), before, "touched");
    let replaced = again(&["--force"]);
    assert!(replaced.status.success(), "{replaced:?}");
    let reader = meshwise::store::Reader::open(out.join("meshwise.db")).unwrap();
    assert_eq!(reader.counts().unwrap().tables[0].rows, 7_920, "not twice");
    assert!(!out.join("training_rows.parquet").exists(), "nothing was trained");
    assert!(std::fs::read_dir(out.join("models")).unwrap().next().is_none());
    assert_eq!(std::fs::read_to_string(notes).unwrap(), "mine");
}

/// Node 0 is a good relay, and of two directions of a link one is measured rarely.
#[test]
fn the_live_rule_and_the_last_value_on_its_own_measurements_stand_beside_it() {
    let world = world(relays_pay);
    let played = run(&world, &config(Some(2), true), 1).unwrap();
    let rows = report::policies(&[played]);
    let relative =
        |name: &str| rows.iter().find(|row| row.name == name).unwrap().relative_to_direct.unwrap();
    let oracle = relative("oracle");
    for name in ["last+worth", "meshwise-live"] {
        assert!((oracle..0.75).contains(&relative(name)), "{name}: {}", relative(name));
    }
    // Balanced, a relay has to save a fifth; here it saves 40 %.
    assert!(relative("meshwise-live-balanced") < 0.8, "{}", relative("meshwise-live-balanced"));
    let fair = ReplayConfig { own_probes: false, ..config(Some(2), false) };
    let played = run(&world, &fair, 1).unwrap();
    let at = |name| NAMES.iter().position(|known| *known == name).unwrap();
    let (last, worth) = (at("last"), at("last+worth"));
    assert!(!played.outcomes.is_empty());
    assert!(played.outcomes.iter().all(|o| o.relays[last] == o.relays[worth]), "the same rotation");
}

#[test]
fn the_live_rule_stays_where_there_is_only_noise() {
    let world = world(only_noise);
    let played = run(&world, &config(None, true), 1).unwrap();
    let live = relative(played, "meshwise-live");
    assert!(live < 1.1, "{live}");
}

#[test]
fn round_trips_of_nothing_and_links_measured_once_are_no_trap() {
    let row = |t_s: f64, src: &str, dst: &str, rtt_ms| TraceRow {
        t_s,
        src: src.into(),
        dst: dst.into(),
        rtt_ms: Some(rtt_ms),
        throughput_mbps: None,
        changepoint: false,
    };
    let mut rows = Vec::new();
    for round in 0..60 {
        for (src, dst, ms) in [("a", "b", 9.0), ("a", "c", 0.001), ("c", "b", 3.0), ("b", "c", 4.0)]
        {
            let ms = if round % 7 == 3 { 0.001 } else { ms };
            rows.push(row(f64::from(round) * 60.0, src, dst, ms));
        }
    }
    let world = TraceWorld::new(&rows, Quantity::Latency).unwrap();
    let played = run(&world, &config(None, false), 1).unwrap();
    assert!(!played.outcomes.is_empty());
    assert!(played.outcomes.iter().all(|o| o.costs_ms.iter().all(|ms| ms.is_finite())));
    assert!(played.forecasts.iter().all(|f| f.forecast_ms.is_finite()), "no number");
}

#[test]
fn a_trace_without_anything_to_score_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.parquet");
    // One moment: there is no later measurement of anything.
    let columns = vec![
        Column::new("t_s".into(), [0.0, 0.0]),
        Column::new("src".into(), ["a", "b"]),
        Column::new("dst".into(), ["b", "a"]),
        Column::new("rtt_ms".into(), [20.0_f32, 20.0]),
    ];
    let mut frame = DataFrame::new(2, columns).unwrap();
    ParquetWriter::new(std::fs::File::create(&path).unwrap()).finish(&mut frame).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_meshwise"))
        .args(["replay", "--json", "--trace"])
        .arg(&path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.contains("no decision could be scored") && last.contains("moments"), "{said}");
    assert!(output.stdout.is_empty());
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
