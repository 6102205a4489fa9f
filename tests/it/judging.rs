//! Judging a model on the log of a node that explores: the real engine in a simulated world, where it
//! is known what every route costs.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use meshwise::engine::Intervals;
use meshwise::engine::event::Command as EngineCommand;
use meshwise::engine::measure::ProbeKind;
use meshwise::engine::overlay::Objective;
use meshwise::engine::predict::Prediction;
use meshwise::engine::route::PathPolicy;
use meshwise::engine::types::{Timestamp, TunnelId};
use meshwise::learn::{Preference, judge, logged_decisions};
use meshwise::sim::{LinkModel, World};
use meshwise::store::{Reader, Retention, Writer};

const START: Timestamp = Timestamp(1_760_000_000_000_000);
/// Tunnels of node 0 to node 4, over the relays 1, 2 and 3.
const TUNNELS: u16 = 4;

/// What node 0 measured and decided in so many hours, in a store. Three ways of 60, 64 and 66 ms.
fn log_of(explore: f64, hours: u64, folder: &Path) {
    let mut world = World::new(3, START);
    let intervals = Intervals {
        link_probe: Duration::from_secs(10),
        active_probe: Duration::from_secs(2),
        candidate_probe: Duration::from_secs(5),
        decide: Duration::from_secs(5),
    };
    let paths = PathPolicy { explore, ..PathPolicy::default() };
    for index in 0..5 {
        let bootstrap: &[usize] = match index {
            0 => &[],
            1..=3 => &[0],
            _ => &[1, 2, 3],
        };
        world.add_node(bootstrap, paths, intervals);
    }
    for (relay, delay_ms) in [(1, 15.0), (2, 16.0), (3, 16.5)] {
        let link = LinkModel { jitter_ms: 2.0, ..LinkModel::delay(delay_ms) };
        world.set_link(0, relay, link);
        world.set_link(relay, 4, link);
    }
    world.run_for(Duration::from_secs(60));
    for tunnel in 1..=TUNNELS {
        let destination = world.id(4);
        let open = EngineCommand::OpenTunnel {
            tunnel: TunnelId(tunnel),
            destination,
            forced: None,
            objective: Objective::Latency,
            beside: None,
            reserve: None,
        };
        world.command(0, open);
    }
    world.run_for(Duration::from_secs(hours * 3_600));
    assert_eq!(world.breaches(), [""; 0]);
    let writer = Writer::start(folder.join("meshwise.db"), Retention::default()).unwrap();
    for (at, sample) in world.samples(0).iter().enumerate() {
        writer.write(sample.clone());
        if at % 1_000 == 0 {
            writer.flush().unwrap();
        }
    }
    for (at, decision) in world.decisions(0).iter().enumerate() {
        writer.decision(decision.clone(), 1);
        if at % 100 == 0 {
            writer.flush().unwrap();
        }
    }
    writer.flush().unwrap();
    assert_eq!(writer.dropped(), 0);
}

fn judge_by_command(folder: &Path, name: &str, json: bool) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshwise"));
    command.args(["model", "judge", name, "--data-dir"]).arg(folder);
    if json {
        command.arg("--json");
    }
    command.output().unwrap()
}

#[test]
fn the_estimate_from_the_log_of_a_node_that_explores_holds_the_truth() {
    let folder = tempfile::tempdir().unwrap();
    // A node stays on its route; each other one is to be tried a hundred times.
    log_of(0.1, 9, folder.path());
    let reader = Reader::open(folder.path().join("meshwise.db")).unwrap();
    // Somebody who would always take the same way, and thinks that it is quick.
    let probes = reader.probes(ProbeKind::Route, 0).unwrap();
    let mut means: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for probe in probes.iter().filter(|probe| probe.hops == 2) {
        let Some(rtt_us) = probe.rtt_us else { continue };
        let (sum, count) = means.entry(&probe.route).or_default();
        *sum += rtt_us as f64 / 1e3;
        *count += 1.0;
    }
    let mut relays: Vec<(&str, f64)> =
        means.into_iter().map(|(route, (sum, count))| (route, sum / count)).collect();
    relays.sort_by(|a, b| a.1.total_cmp(&b.1));
    assert_eq!(relays.len(), 3, "{relays:?}");
    for (favourite, truth_ms) in relays {
        let logged = logged_decisions(&reader, 0, |rows| {
            Preference::lowest(rows, |row| {
                Some(Prediction::of_latency(if row.route == favourite { 40.0 } else { 70.0 }))
            })
        });
        let logged = logged.unwrap();
        // Where the favourite had no chance, another one was taken.
        let decisions: Vec<_> = logged
            .decisions
            .into_iter()
            .filter(|decision| decision.predicted.contains(&40.0))
            .collect();
        assert!(decisions.len() > 1_500, "{}", decisions.len());
        let found = judge(&decisions).unwrap();
        let robust = found.doubly_robust;
        assert!(robust.low <= truth_ms && truth_ms <= robust.high, "{truth_ms}: {found:?}");
        assert!(robust.high - robust.low < 12.0, "{found:?}");
        assert!((found.snips.value - truth_ms).abs() < 1.0, "{truth_ms}: {found:?}");
        assert!(found.direct_method.value < 45.0, "it believes the model");
    }
    let output = judge_by_command(folder.path(), "moving-average", true);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let estimate = &said["estimates"]["doubly_robust"];
    let [low, high, log] = [&estimate["low"], &estimate["high"], &said["log"]["value"]]
        .map(|number| number.as_f64().unwrap());
    assert!(low < log && high > 58.0 && high - low < 2.0, "{said}");
    assert!(said["estimates"]["effective_sample_size"].as_f64().unwrap() > 100.0, "{said}");
    assert!(said["agreement"].as_f64().unwrap() > 0.5, "{said}");
    let text = judge_by_command(folder.path(), "level", false);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("doubly robust") && text.contains("worth "), "{text}");
}

#[test]
fn the_log_of_a_node_that_does_not_explore_is_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    log_of(0.0, 1, folder.path());
    let output = judge_by_command(folder.path(), "moving-average", true);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stdout.is_empty() && said.lines().count() == 1, "{said}");
    for word in
        ["moving-average cannot be judged", "100 are needed", "learning.explore", "left out"]
    {
        assert!(said.contains(word), "{word}: {said}");
    }
}
