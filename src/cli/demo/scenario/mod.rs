//! `meshwise demo --scenario NAME`: one figure of the data plane each, measured over real nodes on
//! loopback and emulated links, or all of the control plane, among 30 nodes; in the run that prints it.

mod bulk;
mod echo;
mod failover;
mod load;
mod many;
mod process;
mod speed;
mod streams;

use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use serde::Serialize;

use super::mesh::{Mesh, Plan, Wire, wire};
use super::{Context, PATIENCE, output, say};
use crate::api::types::{OpenTunnel, Publish, Published, Tunnel};
use crate::engine::overlay::Objective;

pub(super) use echo::serve as serve_echo;
pub(super) use speed::relay_tcp;

/// What to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Scenario {
    /// Silent cuts of the link in use, 20 in a row
    Cut,
    /// A relay killed during a transfer of 1 GB
    Kill,
    /// The link in use gets 100 ms slower for good
    Slow,
    /// What a relay adds to the round trip
    Latency,
    /// A link at twice its capacity
    Overload,
    /// Two disjoint paths at once
    Paths,
    /// Bytes a second and CPU over 0 to 3 relays
    Throughput,
    /// Memory of 10,000 idle connections
    Streams,
    /// Registration, discovery, joins, recovery and idle cost of 30 nodes
    Mesh,
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
struct Figure {
    what: String,
    value: Option<f64>,
    unit: &'static str,
    /// What the mission asks for at least, and whether larger is better.
    #[serde(skip_serializing_if = "Option::is_none")]
    floor: Option<(f64, bool)>,
    /// What was aimed at, and whether larger is better.
    #[serde(skip_serializing_if = "Option::is_none")]
    aim: Option<(f64, bool)>,
    /// Whether the aim was reached; a missing value never does.
    #[serde(skip_serializing_if = "Option::is_none")]
    reached: Option<bool>,
    /// Why it was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<String>,
}

fn figure(what: impl Into<String>, value: Option<f64>, unit: &'static str) -> Figure {
    let (floor, aim, reached, why_not) = (None, None, None, None);
    Figure { what: what.into(), value, unit, floor, aim, reached, why_not }
}

impl Figure {
    fn below(self, floor: f64) -> Self {
        Self { floor: Some((floor, false)), ..self }
    }

    fn above(self, floor: f64) -> Self {
        Self { floor: Some((floor, true)), ..self }
    }

    /// What is to be said about it, when it is not as it should be.
    fn remark(&self) -> &str {
        let is_below = |(floor, larger): (f64, bool)| {
            let value = self.value.unwrap_or(f64::NAN);
            if larger { value <= floor } else { value >= floor }
        };
        match (&self.why_not, self.value) {
            (Some(why), None) => why,
            (None, None) if self.aim.is_some() || self.floor.is_some() => "not measured",
            _ if self.floor.is_some_and(is_below) => "below the floor",
            _ if self.reached == Some(false) => "not reached",
            _ => "",
        }
    }

    fn at_most(self, aim: f64) -> Self {
        let reached = Some(self.value.is_some_and(|value| value <= aim));
        Self { aim: Some((aim, false)), reached, ..self }
    }

    fn at_least(self, aim: f64) -> Self {
        let reached = Some(self.value.is_some_and(|value| value >= aim));
        Self { aim: Some((aim, true)), reached, ..self }
    }
}

/// Runs a scenario in `folder` and prints its figures. An aim that is missed is printed as such;
/// it is no error.
pub(super) async fn run(
    scenario: Scenario,
    started: Instant,
    folder: &Path,
    minutes: u64,
    context: &Context,
) -> anyhow::Result<()> {
    let figures = match scenario {
        Scenario::Cut => failover::cut(started, folder).await?,
        Scenario::Kill => failover::kill(started, folder).await?,
        Scenario::Slow => failover::slow(started, folder).await?,
        Scenario::Latency => speed::latency(started, folder).await?,
        Scenario::Overload => load::overload(started, folder).await?,
        Scenario::Paths => load::paths(started, folder).await?,
        Scenario::Throughput => speed::throughput(started, folder).await?,
        Scenario::Streams => streams::idle(started, folder, minutes).await?,
        Scenario::Mesh => many::figures(started, folder).await?,
    };
    if context.json {
        return output::json(&figures);
    }
    let has_floor = figures.iter().any(|figure| figure.floor.is_some());
    let mut columns = vec!["figure", "measured", "aim", ""];
    if has_floor {
        columns.insert(2, "floor");
    }
    let mut table = output::table(&columns);
    for figure in &figures {
        let digits = if figure.value.is_some_and(|value| value.abs() < 10.0) { 2 } else { 0 };
        let bound = |bound: Option<(f64, bool)>, [more, less]: [&str; 2]| {
            let text = |(bound, larger)| {
                format!("{} {bound} {}", if larger { more } else { less }, figure.unit)
            };
            bound.map(text).unwrap_or_default()
        };
        let mut row = vec![
            figure.what.clone(),
            format!("{} {}", output::number(figure.value, digits), figure.unit),
            bound(figure.aim, [">=", "<="]),
            figure.remark().to_owned(),
        ];
        if has_floor {
            row.insert(2, bound(figure.floor, [">", "<"]));
        }
        table.add_row(row);
    }
    output::print("")?;
    output::rows(&table, "")
}

/// Two ways of three links from S to T: 60 and 90 ms there and back, as in the measurements of
/// other overlays.
fn diamond() -> Plan {
    let wires = vec![
        wire("S", "A", 10.0),
        wire("A", "C", 10.0),
        wire("C", "T", 10.0),
        wire("S", "B", 15.0),
        wire("B", "D", 15.0),
        wire("D", "T", 15.0),
    ];
    Plan::plain(&["S", "A", "B", "C", "D", "T"], wires)
}

/// S, so many relays in a row, T.
fn line(relays: usize, delay_ms: f64) -> Plan {
    let nodes: &[&'static str] = &["S", "A", "B", "C"][..=relays];
    let nodes: Vec<&'static str> = nodes.iter().copied().chain(["T"]).collect();
    let wires: Vec<Wire> = nodes.windows(2).map(|pair| wire(pair[0], pair[1], delay_ms)).collect();
    Plan::plain(&nodes, wires)
}

/// Starts the nodes and waits until all know each other.
async fn start(started: Instant, folder: &Path, plan: Plan) -> anyhow::Result<Mesh> {
    say(started, &format!("starting {} nodes on loopback", plan.nodes.len()));
    let mesh = Mesh::start(folder, plan).await?;
    mesh.wait_joined(PATIENCE).await?;
    Ok(mesh)
}

/// Publishes what listens at `to` on T and opens a tunnel to it on `from`.
async fn tunnel(
    mesh: &Mesh,
    from: &str,
    name: &str,
    to: String,
    objective: Objective,
) -> anyhow::Result<Tunnel> {
    let body = Publish {
        name: name.into(),
        to: Some(to),
        allow: None,
        ttl_s: None,
        objective: Some(objective),
        delegation: None,
        check: None,
    };
    let _: Published = mesh.client("T").post("/v1/services", &body).await?;
    let listen = "127.0.0.1:0".into();
    let open = OpenTunnel {
        service: name.into(),
        listen,
        via: None,
        objective: None,
        paths: None,
        reserve: None,
    };
    Ok(mesh.client(from).post("/v1/tunnels", &open).await?)
}

/// The route that a node's tunnel to a service uses now.
async fn route(mesh: &Mesh, from: &str) -> anyhow::Result<Vec<String>> {
    let tunnels: Vec<Tunnel> = mesh.client(from).get("/v1/tunnels").await?;
    let route = tunnels.into_iter().next().and_then(|tunnel| tunnel.route);
    let route = route.context("the tunnel has lost its route")?;
    Ok(route.iter().map(|id| mesh.name(id)).collect())
}

fn quantile(values: &[f64], share: f64) -> Option<f64> {
    crate::engine::measure::window_statistics::quantile(values, share)
}
