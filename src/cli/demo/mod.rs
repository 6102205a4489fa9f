//! `meshwise demo`: six real nodes as processes of this program on loopback, over emulated links.
//!
//! ```text
//!        A --- C
//!      /   \ /   \
//!     S     X     T        every line is a link
//!      \   / \   /
//!        B --- D
//! ```
//!
//! Datagrams travel along the lines only. S and T cannot reach each other at all; the other nodes
//! can connect for control messages (Kademlia needs that), without delay.
//!
//! The demo only uses what a person could use: the program, its configuration file and its
//! control API. Each figure is measured in the run that prints it.

mod figures;
mod load;
mod mesh;
mod scenario;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::signal::unix::{SignalKind, signal};

use super::{Context, output};
use crate::api::types::{Explanation, OpenTunnel, Publish, Published, Resolved, Status, Tunnel};
use crate::engine::measure::ProbeKind;
use crate::engine::overlay::Objective;
use crate::learn::realised_accuracy;
use crate::node::DATABASE;
use crate::store::Reader;
use figures::{AddedLatency, Figures};
use load::{Load, WebService};
use mesh::{Mesh, Plan};

/// Run a local mesh of real nodes that learns, loses links and a relay, and shows what happened.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Keep identities, databases, models and logs of all nodes in this new folder.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Show one figure of the data plane, or the control plane among 30 nodes, instead.
    #[arg(long, value_name = "NAME")]
    scenario: Option<scenario::Scenario>,
    /// Minutes that the idle connections of `--scenario streams` are left alone.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "scenario",
          value_parser = clap::value_parser!(u64).range(0..=60))]
    minutes: u64,
    /// Relay TCP connections to an address, as a measure of comparison.
    #[arg(long, value_name = "ADDRESS", hide = true)]
    tcp_relay: Option<SocketAddr>,
    /// Echo what TCP connections bring.
    #[arg(long, hide = true)]
    tcp_echo: bool,
}

const SERVICE: &str = "byronwade.local";
/// Names published and looked up for the averages, the service itself included.
const NAMES: usize = 5;
/// Look-ups of each name in the DHT.
const LOOKUPS_EACH: usize = 20;
/// Longest demo: a run that is not through by then has failed.
const RUN_MAX: Duration = Duration::from_secs(118);
/// The same of a scenario, beside the minutes asked for.
const SCENARIO_MAX: Duration = Duration::from_secs(600);
/// Longest wait for any one thing to happen.
const PATIENCE: Duration = Duration::from_secs(20);
/// Traffic and measuring before the model; the source trains when this is over.
pub(super) const LEARN_S: u64 = 40;
/// Longest training: half a second on an idle machine, but everybody else comes first.
const TRAINING_MAX: Duration = Duration::from_secs(30);
/// Traffic while the model's forecasts are compared with what then happens.
const PREDICT: Duration = Duration::from_secs(15);
/// Traffic after the degradation, and after the kill.
const AFTER: Duration = Duration::from_secs(8);
/// What the degradation adds to a link, each way (ms).
const DEGRADED_MS: f64 = 100.0;

fn say(started: Instant, text: &str) {
    eprintln!("[{:5.1} s] {text}", started.elapsed().as_secs_f64());
}

pub(super) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    if let Some(target) = args.tcp_relay {
        return scenario::relay_tcp(target).await;
    }
    if args.tcp_echo {
        return scenario::serve_echo().await;
    }
    let started = Instant::now();
    let scratch = tempfile::tempdir()?;
    let folder = match &args.keep {
        Some(folder) => {
            std::fs::create_dir(folder).with_context(|| {
                format!("cannot keep the data in {}: it must be a new folder", folder.display())
            })?;
            folder.clone()
        }
        None => scratch.path().to_owned(),
    };
    if let Some(chosen) = args.scenario {
        let longest = SCENARIO_MAX + Duration::from_secs(60 * args.minutes);
        let shown = scenario::run(chosen, started, &folder, args.minutes, context);
        return within(longest, shown).await;
    }
    let outcome = within(RUN_MAX, play(started, &folder)).await?;
    if context.json {
        output::json(&outcome)?;
    } else {
        outcome.print()?;
    }
    match outcome.missed().as_slice() {
        [] => Ok(()),
        missed => bail!("below the floor: {}", missed.join(", ")),
    }
}

/// Runs something that may be interrupted and must be through in time.
async fn within<T>(
    longest: Duration,
    running: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        outcome = tokio::time::timeout(longest, running) => outcome.unwrap_or_else(|_| {
            bail!("not through after {} s; is this machine very busy?", longest.as_secs())
        }),
        _ = tokio::signal::ctrl_c() => bail!("interrupted; all nodes were ended"),
        _ = terminate.recv() => bail!("terminated; all nodes were ended"),
    }
}

async fn play(started: Instant, folder: &std::path::Path) -> anyhow::Result<Figures> {
    let mut figures = Figures::default();

    say(started, "starting six nodes on loopback");
    let plan = Plan::demo();
    let mut mesh = Mesh::start(folder, plan.clone()).await?;
    figures.join_ms = mesh.wait_joined(PATIENCE).await?;
    let (source, target) = (mesh.client("S"), mesh.client("T"));
    say(started, "all have joined; S and T have no link");

    let web = WebService::start().await?;
    for index in 0..NAMES {
        let name = if index == 0 { SERVICE.into() } else { format!("demo-{index}.local") };
        let to = format!("http://{}", web.address());
        let objective = Objective::Balanced;
        let body = Publish {
            name: name.clone(),
            to: Some(to),
            allow: None,
            ttl_s: None,
            objective: Some(objective),
            delegation: None,
            check: None,
        };
        let published: Published = target.post("/v1/services", &body).await?;
        figures.registrations_ms.push(published.took_ms);
        for _ in 0..LOOKUPS_EACH {
            let path = format!("/v1/services/{name}?dht=true");
            figures.lookups += 1;
            if let Ok(resolved) = source.get::<Resolved>(&path).await {
                figures.discoveries_ms.push(resolved.took_ms);
            }
        }
    }
    say(started, &format!("T publishes {SERVICE}; S finds it in the DHT"));

    let listen = "127.0.0.1:0".into();
    let open = OpenTunnel {
        service: SERVICE.into(),
        listen,
        via: None,
        objective: None,
        paths: None,
        reserve: None,
    };
    let tunnel: Tunnel = source.post("/v1/tunnels", &open).await?;
    let first = tunnel.route.clone().unwrap_or_default();
    figures.hops = first.len().saturating_sub(1);
    let address: SocketAddr = tunnel.listen.parse()?;
    say(started, &format!("S opens a tunnel over {}; HTTP requests begin", mesh.names(&first)));

    let load = Load::start(address, source.clone(), mesh.ids());
    let waiting = Instant::now();
    let model = loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let status: Status = source.get("/v1/status").await?;
        if status.model != "moving-average" {
            break Some(status.model);
        }
        let (done, failed) = load.counts();
        if waiting.elapsed().as_secs().is_multiple_of(10) {
            say(started, &format!("measuring and learning: {done} requests, {failed} failed"));
        }
        let trained = status.last_training_us.is_some();
        if trained || waiting.elapsed() > Duration::from_secs(LEARN_S) + TRAINING_MAX {
            if let Some(error) = &status.last_training_error {
                say(started, &format!("training failed: {error}"));
            }
            break None;
        }
    };
    match &model {
        Some(version) => say(started, &format!("S has trained {version} and routes on it")),
        None => say(started, "no model did better than the moving average, which goes on deciding"),
    }
    let predicting_since_us = now_us();
    tokio::time::sleep(PREDICT).await;
    let explained: Explanation = source.get(&format!("/v1/routes/{SERVICE}")).await?;
    say(started, "every candidate route, as S sees it now (ms, round trip; * in use):");
    for line in candidate_lines(&explained, &mesh) {
        eprintln!("            {line}");
    }
    let quiet_until = Instant::now();

    let before = current_route(&source).await?;
    let (from, to) = (mesh.name(&before[1]), mesh.name(&before[2]));
    let degraded = Instant::now();
    mesh.change(&from, &to, |link| link.delay_ms += DEGRADED_MS).await?;
    say(started, &format!("the link {from}-{to} in use gets {DEGRADED_MS} ms slower"));
    let moved = loop {
        let now = current_route(&source).await?;
        if !now.windows(2).any(|link| link == &before[1..3]) {
            break Some(now);
        }
        if degraded.elapsed() > PATIENCE {
            break None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    if let Some(now) = &moved {
        let took = degraded.elapsed().as_secs_f64() * 1e3;
        figures.degrade_reaction_ms = Some(took);
        say(started, &format!("traffic moved to {} after {took:.0} ms", mesh.names(now)));
    } else {
        say(started, "traffic did not leave the degraded link");
    }
    tokio::time::sleep(AFTER.saturating_sub(degraded.elapsed())).await;

    let route = current_route(&source).await?;
    let victim = mesh.name(&route[1]);
    mesh.kill(&victim)?;
    let killed = Instant::now();
    say(started, &format!("relay {victim}, in use, is killed outright"));
    tokio::time::sleep(AFTER).await;
    let finished = load.finish().await;
    figures.failover_ms = finished.longest_gap_ms(killed);
    let after = current_route(&source).await.unwrap_or_default();
    say(started, &format!("traffic goes on over {}", mesh.names(&after)));

    let status: Status = source.get("/v1/status").await?;
    figures.route_calculation_us = status.route_calculation_us;
    figures.requests = finished.requests();
    figures.added_latency_ms = AddedLatency::of(&plan, &finished, quiet_until);
    mesh.stop().await;

    let reader = Reader::open(mesh.data_dir("S").join(DATABASE))?;
    let probes = reader.probes(ProbeKind::Route, predicting_since_us)?;
    let forecasts = reader.candidate_predictions(predicting_since_us)?;
    let realised = realised_accuracy(&forecasts, &probes)?;
    figures.set_prediction(&realised, model, reader.probes(ProbeKind::Route, 0)?.len());
    let counts = reader.counts()?;
    let measured = ["probe", "link_state", "slice", "event"];
    let tables = counts.tables.iter().filter(|table| measured.contains(&table.table));
    figures.samples = tables.map(|table| table.rows).sum();
    figures.wall_s = started.elapsed().as_secs_f64();
    Ok(figures)
}

fn candidate_lines(explained: &Explanation, mesh: &Mesh) -> Vec<String> {
    let mut table =
        output::table(&["", "route", "measured", "moving avg", "predicted", "interval"]);
    for candidate in &explained.candidates {
        table.add_row([
            if candidate.chosen { "*".into() } else { String::new() },
            mesh.names(&candidate.route),
            output::number(candidate.last_value_ms, 1),
            output::number(candidate.moving_average_ms, 1),
            output::number(candidate.predicted_ms, 1),
            candidate
                .interval_ms
                .map_or_else(|| "-".into(), |(low, high)| format!("{low:.1}..{high:.1}")),
        ]);
    }
    table.lines().collect()
}

async fn current_route(source: &crate::api::Client) -> anyhow::Result<Vec<String>> {
    let tunnels: Vec<Tunnel> = source.get("/v1/tunnels").await?;
    let route = tunnels.into_iter().next().and_then(|tunnel| tunnel.route);
    route.filter(|route| route.len() >= 3).context("the tunnel has lost its route")
}

fn now_us() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap_or_default().as_micros() as u64
}
