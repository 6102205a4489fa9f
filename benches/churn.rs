//! Simulated churn and partitions, at full size: the real engine of up to 1,000 nodes in virtual time,
//! and what must hold all the time (`tests/it/churning.rs`). Prints one line for each figure, and all
//! of them as JSON at the end. Ends with 1 when an invariant did not hold or a floor was missed.
//!
//! `cargo bench --no-default-features --bench churn` takes about an hour; names of figures as arguments
//! choose some: `-- churn halves restart bootstrap fifth week thousand revocation traffic`.

#[path = "../tests/it/churning.rs"]
mod churning;

use std::time::{Duration, Instant};

use churning::{
    Mesh, Recovered, Sent, availability, churn, join_without_the_first, lose, part_and_heal,
    restart_all, revoke, sent, swing,
};
use serde_json::{Value, json};

/// Virtual hours of a week.
const WEEK_HOURS: u64 = 168;
/// Floors of the mission. Until every service resolves everywhere after a partition or a mass restart.
const PARTITION_MAX: Duration = Duration::from_secs(60);
/// Until every pair has a route again, whatever happened.
const RECOVERY_MAX: Duration = Duration::from_secs(30);
/// Until a newcomer can resolve every service.
const JOIN_MAX: Duration = Duration::from_secs(10);
/// Until all that can hear of a revocation have, and those that were cut off when they are back: `seconds`
/// in the words.
const REVOKED_MAX: [Duration; 2] = [Duration::from_secs(5), PARTITION_MAX];
/// Share of the time in which one of two replicas can be used.
const AVAILABILITY_MIN: f64 = 0.995;
/// Share of look-ups that find a living service.
const DISCOVERY_MIN: f64 = 0.98;

/// Prints a line, and says the same as JSON.
type Figure = fn() -> (String, Value);

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let figures: [(&str, Figure); 9] = [
        ("halves", halves),
        ("restart", restart),
        ("bootstrap", bootstrap),
        ("fifth", fifth),
        ("revocation", revocation),
        ("traffic", traffic),
        ("churn", churned),
        ("thousand", thousand),
        ("week", week),
    ];
    let (mut all, mut well) = (serde_json::Map::new(), true);
    for (name, figure) in figures {
        if !chosen.is_empty() && !chosen.iter().any(|wanted| wanted == name) {
            continue;
        }
        let begun = Instant::now();
        let (line, value) = figure();
        println!("{name:10} {line} ({:.0} s)", begun.elapsed().as_secs_f64());
        let wrong = value.get("wrong").and_then(Value::as_array);
        for what in wrong.into_iter().flatten() {
            println!("{name:10} WRONG: {what}");
            well = false;
        }
        all.insert(name.to_owned(), value);
    }
    println!("{}", Value::Object(all));
    if !well {
        std::process::exit(1);
    }
}

fn text(took: Option<Duration>) -> String {
    took.map_or("not".to_owned(), |took| format!("{:.1} s", took.as_secs_f64()))
}

fn seconds(took: Option<Duration>) -> Option<f64> {
    took.map(|took| took.as_secs_f64())
}

/// Says so when something took longer than it may, or did not happen.
fn late(what: &str, took: Option<Duration>, limit: Duration, wrong: &mut Vec<String>) {
    if took.is_none_or(|took| took > limit) {
        wrong.push(format!("{what} after {}, floor {} s", text(took), limit.as_secs()));
    }
}

fn recovered(what: &str, runs: &[Recovered]) -> (String, Value) {
    let mut wrong = Vec::new();
    for run in runs {
        late("services resolve", run.services, PARTITION_MAX, &mut wrong);
        late("pairs have routes", run.routes, RECOVERY_MAX, &mut wrong);
    }
    let services: Vec<Option<f64>> = runs.iter().map(|run| seconds(run.services)).collect();
    let routes: Vec<Option<f64>> = runs.iter().map(|run| seconds(run.routes)).collect();
    let said: Vec<String> =
        runs.iter().map(|run| format!("{} / {}", text(run.services), text(run.routes))).collect();
    let line = format!("{what}: every service resolves / every pair has a route: {said:?}");
    (line, json!({ "services_s": services, "routes_s": routes, "wrong": wrong }))
}

fn halves() -> (String, Value) {
    let run = |seed| part_and_heal(&mut Mesh::new(seed, 200, 50), Duration::from_secs(600));
    let runs: Vec<Recovered> = (1..=3).map(run).collect();
    recovered("halves of 200 nodes cut apart for 10 min, 3 seeds", &runs)
}

fn restart() -> (String, Value) {
    let runs: Vec<Recovered> =
        (1..=3).map(|seed| restart_all(&mut Mesh::new(seed, 200, 50))).collect();
    recovered("200 nodes restarted within 5 s, 3 seeds", &runs)
}

fn fifth() -> (String, Value) {
    let runs: Vec<Recovered> =
        (1..=5).map(|seed| lose(&mut Mesh::new(seed, 200, 50), 0.2)).collect();
    recovered("a fifth of 200 nodes vanishes, 5 seeds", &runs)
}

fn revocation() -> (String, Value) {
    let mut wrong = Vec::new();
    let run = |seed| {
        let mut mesh = Mesh::new(seed, 200, 1);
        let took = revoke(&mut mesh);
        (took, mesh.wrong)
    };
    let runs: Vec<_> = (1..=3).map(run).collect();
    wrong.extend(runs.iter().flat_map(|(_, wrong)| wrong.clone()));
    let runs: Vec<_> = runs.into_iter().map(|(took, _)| took).collect();
    for (heard, all) in &runs {
        late("all have heard", *heard, REVOKED_MAX[0], &mut wrong);
        late("those that were cut off have heard", *all, REVOKED_MAX[1], &mut wrong);
    }
    let said: Vec<String> =
        runs.iter().map(|(heard, all)| format!("{} / {}", text(*heard), text(*all))).collect();
    let line = format!(
        "200 nodes, a fifth cut off, 3 seeds: until all others know / all after healing: {said:?}"
    );
    let runs: Vec<_> = runs.iter().map(|(heard, all)| [seconds(*heard), seconds(*all)]).collect();
    (line, json!({ "heard_and_all_s": runs, "wrong": wrong }))
}

/// Gossip and synchronisation of each node, in a mesh in which nothing happens and in one of which one
/// link swings.
fn traffic() -> (String, Value) {
    let (mut lines, mut values) = (Vec::new(), serde_json::Map::new());
    for nodes in [10, 100, 1_000] {
        let mut mesh = Mesh::new(1, nodes, nodes / 10);
        mesh.world.run_for(Duration::from_secs(120));
        let idle = sent(&mut mesh, 120, |_, _| {});
        let swings = sent(&mut mesh, 60, swing);
        let all = |sent: &Sent| {
            let bytes: f64 = sent.values().map(|(_, bytes)| bytes).sum();
            // Names of messages travel together.
            let whole = sent.iter().filter(|(kind, _)| **kind != "announcement");
            let messages: f64 = whole.map(|(_, (messages, _))| messages).sum();
            format!("{:.2} kB/s in {messages:.1} messages/s", bytes / 1e3)
        };
        lines.push(format!("{nodes} nodes: idle {}, one link swings {}", all(&idle), all(&swings)));
        values.insert(nodes.to_string(), json!({ "idle": idle, "one_link_swings": swings }));
    }
    (lines.join("; "), Value::Object(values))
}

fn bootstrap() -> (String, Value) {
    let took = join_without_the_first(&mut Mesh::new(1, 200, 50), 50);
    let mut wrong = Vec::new();
    took.iter().for_each(|took| late("a newcomer has joined", *took, JOIN_MAX, &mut wrong));
    let mut joined: Vec<Duration> = took.iter().flatten().copied().collect();
    joined.sort();
    let (middle, last) = (joined.get(joined.len() / 2).copied(), joined.last().copied());
    let line = format!(
        "the 3 first of 200 gone, 50 newcomers know two of them and one other: {} joined, p50 {}, last {}",
        joined.len(),
        text(middle),
        text(last)
    );
    let value = json!({
        "joined": joined.len(), "p50_s": seconds(middle), "max_s": seconds(last), "wrong": wrong,
    });
    (line, value)
}

fn churned() -> (String, Value) {
    churn_of(200, 50, 1_800, 10_000, 2)
}

fn thousand() -> (String, Value) {
    churn_of(1_000, 100, 600, 5_000, 30)
}

fn churn_of(
    nodes: usize,
    services: usize,
    for_s: u64,
    lookups: u64,
    every: u64,
) -> (String, Value) {
    let mut mesh = Mesh::new(1, nodes, services);
    let churned = churn(&mut mesh, 0.3, for_s, lookups, every);
    let counted = churned.lookups;
    let share = 100.0 * counted.found as f64 / counted.made as f64;
    let mut wrong = churned.wrong.clone();
    if counted.made == 0 || share < 100.0 * DISCOVERY_MIN {
        wrong.push(format!("{share:.3} % of {} look-ups were found", counted.made));
    }
    let line = format!(
        "{nodes} nodes, 30 %/h for {for_s} s ({} left): {share:.3} % of {} look-ups found; out of \
         reach for {} at most; {} breaches {:?}",
        churned.left,
        counted.made,
        text(Some(churned.worst_reach)),
        churned.wrong.len(),
        churned.wrong.iter().take(5).collect::<Vec<_>>(),
    );
    let value = json!({
        "nodes": nodes, "left": churned.left, "lookups": counted.made, "found": counted.found,
        "worst_reach_s": churned.worst_reach.as_secs_f64(), "wrong": wrong,
    });
    (line, value)
}

fn week() -> (String, Value) {
    let mut mesh = Mesh::new(1, 10, 0);
    let tally = availability(&mut mesh, 0.3, WEEK_HOURS);
    let share = |of: u64| 100.0 * tally.served as f64 / of as f64;
    let line = format!(
        "10 nodes for a week, 30 %/h leave for 60 s, two replicas: served at {:.4} % of {} looks, \
         {:.4} % of those at which a replica lived",
        share(tally.looks),
        tally.looks,
        share(tally.possible)
    );
    let mut wrong = Vec::new();
    if tally.looks == 0 || tally.served as f64 / (tally.looks as f64) < AVAILABILITY_MIN {
        wrong.push(format!("served at {} of {} looks", tally.served, tally.looks));
    }
    let value = json!({
        "looks": tally.looks, "possible": tally.possible, "served": tally.served, "wrong": wrong,
    });
    (line, value)
}
