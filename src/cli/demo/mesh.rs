//! The demo's nodes: processes of this program, their configuration, and the emulated links.

use std::collections::BTreeMap;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::process::{Child, Command};

use crate::api::Client;
use crate::api::types::{Quantiles, Status};
use crate::config::{
    Config, EmulatedLink, EmulationConfig, EntryConfig, LearningConfig, NetworkConfig,
    ProbingConfig, RoutingConfig,
};

use crate::node::network::Network;
use crate::node::{Clock, Identity, peer_id_text};

/// One link of a mesh, the same in both directions.
#[derive(Clone, Debug)]
pub(super) struct Wire {
    a: &'static str,
    b: &'static str,
    /// What it is like; the neighbour is filled in for each end.
    link: EmulatedLink,
}

/// A link without loss, jitter or limit. `delay_ms` is one way.
pub(super) fn wire(a: &'static str, b: &'static str, delay_ms: f64) -> Wire {
    Wire { a, b, link: EmulatedLink { delay_ms, ..EmulatedLink::default() } }
}

impl Wire {
    /// Limits the rate (bytes/s).
    pub(super) fn rate(mut self, rate: f64) -> Self {
        self.link.rate = rate;
        self
    }

    /// As links of the world are: each datagram is up to so many ms early or late, some are lost.
    fn worldly(mut self, jitter_ms: f64, loss: f64) -> Self {
        (self.link.jitter_ms, self.link.loss) = (jitter_ms, loss);
        self
    }

    /// Height and period of a slow swing of the delay (ms, s), as of a path that is busy at times.
    fn wave(mut self, wave_ms: f64, wave_period_s: f64) -> Self {
        (self.link.wave_ms, self.link.wave_period_s) = (wave_ms, wave_period_s);
        self
    }

    fn joins(&self, a: &str, b: &str) -> bool {
        [(self.a, self.b), (self.b, self.a)].contains(&(a, b))
    }
}

/// What runs.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The nodes, in the order in which they start.
    pub(super) nodes: Vec<&'static str>,
    /// The links between them.
    pub(super) wires: Vec<Wire>,
    /// These two cannot reach each other at all.
    pub(super) apart: Option<(&'static str, &'static str)>,
    /// How often everything is measured.
    pub(super) probing: ProbingConfig,
    /// The node that trains a model, once.
    pub(super) learner: Option<&'static str>,
    /// Nodes of an [open](Plan::open) mesh that offer the SOCKS5 proxy.
    pub(super) proxies: Vec<&'static str>,
    /// Whether datagrams travel along these links only; otherwise nothing is emulated, and the nodes
    /// make the links that they want.
    pub(super) emulated: bool,
}

/// Nodes of an open mesh whose addresses every node is given to join through.
const BOOTSTRAP: usize = 3;
/// Ports drawn until one is free for TCP and UDP.
const PORT_TRIES: usize = 20;

impl Plan {
    /// The demo's: the upper way is the fastest; the two crossing links swing by far more than a
    /// moving average can follow.
    pub(super) fn demo() -> Self {
        let wires = [
            wire("S", "A", 8.0),
            wire("S", "B", 12.0),
            wire("A", "C", 10.0).wave(6.0, 20.0),
            wire("A", "D", 12.0).wave(40.0, 14.0),
            wire("B", "C", 14.0).wave(40.0, 10.0),
            wire("B", "D", 14.0).wave(6.0, 16.0),
            wire("C", "T", 8.0),
            wire("D", "T", 12.0),
        ];
        let worldly = |wire: Wire| wire.worldly(1.0, 0.001).rate(12_500_000.0);
        Self {
            nodes: vec!["S", "A", "B", "C", "D", "T"],
            wires: wires.into_iter().map(worldly).collect(),
            apart: Some(("S", "T")),
            probing: ProbingConfig {
                link_ms: 500,
                active_route_ms: 250,
                candidate_route_ms: 500,
                decide_ms: 500,
            },
            learner: Some("S"),
            proxies: Vec::new(),
            emulated: true,
        }
    }

    /// These links, with the settings that a node has when nothing is configured.
    pub(super) fn plain(nodes: &[&'static str], wires: Vec<Wire>) -> Self {
        let linked = wires.iter().any(|wire| wire.joins("S", "T"));
        Self {
            nodes: nodes.to_vec(),
            wires,
            apart: (!linked).then_some(("S", "T")),
            probing: ProbingConfig::default(),
            learner: None,
            proxies: Vec::new(),
            emulated: true,
        }
    }

    /// Nodes with the default settings, as far as they can share a machine: they listen on loopback,
    /// do not search the local network, and have no proxy unless told to.
    pub(super) fn open(nodes: &[&'static str], proxies: &[&'static str]) -> Self {
        Self {
            apart: None,
            proxies: proxies.to_vec(),
            emulated: false,
            ..Self::plain(nodes, Vec::new())
        }
    }

    /// The emulated round trip of a route (ms) for a request between two times (s since the
    /// epoch): what the links alone take on average, swings included. `None` for a route that
    /// uses no emulated link.
    pub(super) fn emulated_rtt_ms(
        &self,
        route: &[&str],
        begun_s: f64,
        ended_s: f64,
    ) -> Option<f64> {
        let mut total = 0.0;
        for pair in route.windows(2) {
            let wire = self.wires.iter().find(|wire| wire.joins(pair[0], pair[1]))?;
            let swing = |at_s: f64| {
                let (height, period) = (wire.link.wave_ms, wire.link.wave_period_s);
                let turn = if period > 0.0 { at_s / period * std::f64::consts::TAU } else { 0.0 };
                height * (1.0 - turn.cos()) / 2.0
            };
            total += 2.0 * wire.link.delay_ms + swing(begun_s) + swing(ended_s);
        }
        Some(total)
    }
}

struct Process {
    identity: Identity,
    data_dir: PathBuf,
    port: u16,
    child: Option<Child>,
}

/// Draws a port that is free for TCP and UDP. It stays so while what is returned is held.
fn draw_port() -> anyhow::Result<(u16, (TcpListener, UdpSocket))> {
    let mut error = None;
    for _ in 0..PORT_TRIES {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        match UdpSocket::bind(address) {
            Ok(socket) => return Ok((address.port(), (listener, socket))),
            Err(taken) => error = Some(taken),
        }
    }
    bail!("no port is free for both TCP and UDP: {error:?}")
}

/// Running nodes. Dropping it ends them.
pub(super) struct Mesh {
    folder: PathBuf,
    plan: Plan,
    network: Network,
    processes: BTreeMap<&'static str, Process>,
}

impl Mesh {
    /// Starts all nodes under `folder`.
    pub(super) async fn start(folder: &Path, plan: Plan) -> anyhow::Result<Self> {
        let founder = Identity::generate().public_key();
        let network = Network::found("demo", &founder, Clock::default().now());
        let names = plan.nodes.clone();
        let folder = folder.to_owned();
        let mut mesh = Self { folder, plan, network, processes: BTreeMap::new() };
        // Held until all are drawn, so that no port is drawn twice.
        let mut held = Vec::new();
        for &name in &names {
            held.push(mesh.draw(name)?);
        }
        drop(held);
        for name in names {
            mesh.launch(name).with_context(|| format!("cannot start node {name}"))?;
            mesh.wait_up(name).await?;
        }
        Ok(mesh)
    }

    /// Starts one more node, and does not wait for it.
    pub(super) fn add(&mut self, name: &'static str) -> anyhow::Result<()> {
        drop(self.draw(name)?);
        self.plan.nodes.push(name);
        self.launch(name).with_context(|| format!("cannot start node {name}"))
    }

    /// Gives a node its identity, folder and port.
    fn draw(&mut self, name: &'static str) -> anyhow::Result<(TcpListener, UdpSocket)> {
        let (port, held) = draw_port()?;
        let (identity, data_dir) = (Identity::generate(), self.folder.join(name));
        self.processes.insert(name, Process { identity, data_dir, port, child: None });
        Ok(held)
    }

    fn launch(&mut self, name: &'static str) -> anyhow::Result<()> {
        let config = self.config(name);
        let process = &self.processes[name];
        std::fs::create_dir(&process.data_dir)?;
        process.identity.save_new(&process.data_dir)?;
        let admitted = self.network.admit(&process.identity.public_key(), Clock::default().now());
        admitted.context("the demo founded its network")?.save_new(&process.data_dir)?;
        std::fs::write(process.data_dir.join("meshwise.toml"), toml::to_string(&config)?)?;
        self.restart(name)
    }

    /// Starts a node that was killed again, with what it has kept, and does not wait for it.
    pub(super) fn restart(&mut self, name: &'static str) -> anyhow::Result<()> {
        let process = &self.processes[name];
        let path = process.data_dir.join("meshwise.toml");
        let log = process.data_dir.join("log");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("node").arg("--config").arg(&path);
        command.arg("--data-dir").arg(&process.data_dir);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).kill_on_drop(true);
        let child = command.spawn()?;
        if let Some(process) = self.processes.get_mut(name) {
            process.child = Some(child);
        }
        Ok(())
    }

    fn config(&self, name: &'static str) -> Config {
        if self.plan.emulated { self.emulating(name) } else { self.default_config(name) }
    }

    fn default_config(&self, name: &str) -> Config {
        let port = self.processes[name].port;
        let others = self.plan.nodes.iter().take(BOOTSTRAP).filter(|other| **other != name);
        let proxy = if self.plan.proxies.contains(&name) { "127.0.0.1:0" } else { "" };
        Config {
            network: NetworkConfig {
                listen: vec![
                    format!("/ip4/127.0.0.1/tcp/{port}"),
                    format!("/ip4/127.0.0.1/udp/{port}/quic-v1"),
                ],
                bootstrap: others
                    .map(|other| format!("/ip4/127.0.0.1/tcp/{}", self.processes[other].port))
                    .collect(),
                mdns: false,
                ..NetworkConfig::default()
            },
            entry: EntryConfig { socks: proxy.into(), ..EntryConfig::default() },
            ..Config::default()
        }
    }

    fn emulating(&self, name: &'static str) -> Config {
        let process = &self.processes[name];
        let neighbour = |wire: &Wire| match name {
            name if name == wire.a => Some((wire.b, wire.link.clone())),
            name if name == wire.b => Some((wire.a, wire.link.clone())),
            _ => None,
        };
        let neighbours: Vec<(&str, EmulatedLink)> =
            self.plan.wires.iter().filter_map(neighbour).collect();
        let far_end = self.plan.apart.and_then(|(a, b)| match name {
            name if name == a => Some(b),
            name if name == b => Some(a),
            _ => None,
        });
        let peer_id = |other: &str| peer_id_text(&self.processes[other].identity.public_key());
        let started = self.plan.nodes.iter().take_while(|other| **other != name);
        let bootstrap = started
            .filter(|other| neighbours.iter().any(|(name, _)| name == *other))
            .map(|other| format!("/ip4/127.0.0.1/tcp/{}", self.processes[other].port));
        let links = neighbours.iter().map(|(other, link)| self.emulated(other, link.clone()));
        Config {
            network: NetworkConfig {
                listen: vec![format!("/ip4/127.0.0.1/tcp/{}", process.port)],
                bootstrap: bootstrap.collect(),
                mdns: false,
                nat: false,
                degree: NetworkConfig::default().degree,
            },
            // Every node would want the same port.
            entry: EntryConfig { socks: String::new(), ..EntryConfig::default() },
            routing: RoutingConfig::default(),
            probing: self.plan.probing.clone(),
            learning: LearningConfig {
                predict: true,
                // Once: the figures are about one model.
                retrain_s: if self.plan.learner == Some(name) { 3_600 } else { 0 },
                first_train_s: super::LEARN_S,
                retrain_rows: 0,
                // The demo shows what is learned from its own links.
                shipped_model: false,
                ..LearningConfig::default()
            },
            emulation: EmulationConfig {
                enabled: true,
                unreachable: far_end.map(peer_id).into_iter().collect(),
                behind_nat: false,
                links: links.collect(),
            },
            ..Config::default()
        }
    }

    fn emulated(&self, neighbour: &str, link: EmulatedLink) -> EmulatedLink {
        let neighbour = self.processes[neighbour].identity.node_id().to_string();
        EmulatedLink { neighbour, ..link }
    }

    /// Waits until a node answers.
    pub(super) async fn wait_up(&mut self, name: &'static str) -> anyhow::Result<()> {
        let client = self.client(name);
        let begun = Instant::now();
        while client.get::<Status>("/v1/status").await.is_err() {
            let process = self.processes.get_mut(name).context("every node has a process")?;
            let ended = process.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if ended.is_some() || begun.elapsed() > super::PATIENCE {
                let log = std::fs::read_to_string(process.data_dir.join("log")).unwrap_or_default();
                let said = log.lines().last().unwrap_or("it said nothing");
                bail!("node {name} did not come up: {said}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Waits until every node knows every other one, and returns how long joining took (ms).
    pub(super) async fn wait_joined(&self, patience: Duration) -> anyhow::Result<Quantiles> {
        let deadline = Instant::now() + patience;
        let mut joins = Vec::new();
        for &name in &self.plan.nodes {
            loop {
                let status: Status = self.client(name).get("/v1/status").await?;
                if status.joined && status.nodes_known == self.plan.nodes.len() {
                    // The first node has nobody to join.
                    joins.extend(status.join_ms.filter(|_| name != self.plan.nodes[0]));
                    break;
                }
                if Instant::now() > deadline {
                    bail!(
                        "node {name} knows {} of {} nodes",
                        status.nodes_known,
                        self.plan.nodes.len()
                    );
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        let quantile = crate::engine::measure::window_statistics::quantile;
        Ok(Quantiles { p50: quantile(&joins, 0.5), p99: quantile(&joins, 1.0) })
    }

    /// The control API of a node.
    pub(super) fn client(&self, name: &str) -> Client {
        Client::new(&self.data_dir(name))
    }

    /// Where a node keeps its things.
    pub(super) fn data_dir(&self, name: &str) -> PathBuf {
        self.processes[name].data_dir.clone()
    }

    /// Letters by node id.
    pub(super) fn ids(&self) -> BTreeMap<String, &'static str> {
        let id = |(name, process): (&&'static str, &Process)| {
            (process.identity.node_id().to_string(), *name)
        };
        self.processes.iter().map(id).collect()
    }

    /// The letter of a node id.
    pub(super) fn name(&self, id: &str) -> String {
        self.ids().get(id).map_or_else(|| id.to_owned(), |name| (*name).to_owned())
    }

    /// The letters of a route.
    pub(super) fn names(&self, route: &[String]) -> String {
        let names: Vec<String> = route.iter().map(|id| self.name(id)).collect();
        names.join("-")
    }

    /// Changes a link in both directions.
    pub(super) async fn change(
        &self,
        a: &str,
        b: &str,
        change: impl Fn(&mut EmulatedLink),
    ) -> anyhow::Result<()> {
        let wire = self.plan.wires.iter().find(|wire| wire.joins(a, b));
        let wire = wire.with_context(|| format!("{a}-{b} is no link of this mesh"))?;
        for (from, to) in [(a, b), (b, a)] {
            let mut link = self.emulated(to, wire.link.clone());
            change(&mut link);
            let _: serde_json::Value = self.client(from).post("/v1/emulation", &link).await?;
        }
        Ok(())
    }

    /// The nodes that were started and not killed.
    pub(super) fn running(&self) -> Vec<&'static str> {
        let running = self.processes.iter().filter(|(_, process)| process.child.is_some());
        running.map(|(name, _)| *name).collect()
    }

    /// The process of a node that runs.
    pub(super) fn pid(&self, name: &str) -> Option<u32> {
        self.processes[name].child.as_ref().and_then(Child::id)
    }

    /// Ends a node without a good-bye (SIGKILL).
    pub(super) fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let process = self.processes.get_mut(name).context("the victim is a node")?;
        if let Some(mut child) = process.child.take() {
            child.start_kill()?;
            // Collects it when it is gone.
            tokio::spawn(async move { child.wait().await });
        }
        Ok(())
    }

    /// Ends all nodes politely (SIGTERM), so that what they measured is on disk.
    pub(super) async fn stop(&mut self) {
        for process in self.processes.values_mut() {
            let Some(child) = &mut process.child else { continue };
            let pid = child.id().and_then(|id| i32::try_from(id).ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
        }
        for process in self.processes.values_mut() {
            let Some(mut child) = process.child.take() else { continue };
            if tokio::time::timeout(Duration::from_secs(8), child.wait()).await.is_err() {
                let _ = child.kill().await;
            }
        }
    }
}
