//! The driver: one loop that hands inputs to the engine and carries out its outputs.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::checks::Checks;
use super::handle::{AnswerSender, Request, RequestError};
use super::hot_swap::HotSwap;
use super::retrain::{self, Schedule};
use super::{Clock, NodeOptions, names, network};
use crate::engine::Engine;
use crate::engine::event::{CLOCK, Command, Input, Notice, Output, RequestId, Usage};
use crate::engine::forward::TUNNEL_ID_MAX;
use crate::engine::measure::{Health, ProbeKind, Sample};
use crate::engine::overlay::topology::Reshape;
use crate::engine::overlay::{Objective, Pin, ServiceKind};
use crate::engine::predict::ModelCard;
use crate::engine::route::Decision;
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};
use crate::learn::{Change, ModelRegistry, Shift};
use crate::net::{Net, SLICE};
use crate::store::Writer;

/// Inputs that are handled before a timeout: a queue's worth.
const EVENTS_FIRST_MAX: usize = crate::net::EVENTS_MAX;
/// How often the connected peers are kept for the next start.
const PEERS_INTERVAL: Duration = Duration::from_secs(60);
/// Route calculations whose duration is kept.
const CALCULATIONS_MAX: usize = 4_096;

/// Durations of the newest route calculations.
#[derive(Clone, Debug, Default)]
pub struct CalculationTimes(VecDeque<u64>);

impl CalculationTimes {
    fn push(&mut self, us: u64) {
        if self.0.len() >= CALCULATIONS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(us);
    }

    /// The `q`-quantile (µs), 0 to 1; `None` before the first calculation.
    pub fn quantile_us(&self, q: f64) -> Option<f64> {
        let values: Vec<f64> = self.0.iter().map(|us| *us as f64).collect();
        crate::engine::measure::window_statistics::quantile(&values, q)
    }
}

/// The node's state, as [`super::NodeHandle::inspect`] shows it.
pub struct View<'a> {
    /// The control plane.
    pub engine: &'a mut Engine,
    /// The network.
    pub net: &'a Net,
    /// The store's writer.
    pub writer: &'a Writer,
    /// The newest decision about each tunnel.
    pub decisions: &'a BTreeMap<TunnelId, Decision>,
    /// How long route calculations took.
    pub calculations: &'a CalculationTimes,
    /// Version and card of the model in use.
    pub model: Option<&'a (String, ModelCard)>,
    /// Why the champion on disk is not in use.
    pub model_error: Option<&'a String>,
    /// Version of the model in shadow.
    pub challenger: Option<&'a String>,
    /// The last promotion or roll-back in the registry.
    pub last_change: Option<&'a Change>,
    /// How far the features have shifted since the training of the champion that was in use at the
    /// newest training.
    pub shift: Option<&'a Shift>,
    /// Whether a scheduled training runs.
    pub training: bool,
    /// What the last scheduled training said, and when it ended.
    pub last_training: Option<&'a (Timestamp, Result<(), String>)>,
    /// Drops that the engine reported, by kind.
    pub dropped: &'a BTreeMap<&'static str, u64>,
    /// Now.
    pub now: Timestamp,
    /// When the node started.
    pub started_at: Timestamp,
}

impl View<'_> {
    /// Whether links that both of their ends have lead from this node to another one. To a node that has
    /// just joined and has no link itself, whoever has one is reached.
    pub fn is_reached(&self, node: NodeId) -> bool {
        let graph = self.engine.graph();
        let reached = graph.reached_from(self.engine.me());
        reached.contains(&node) || reached.len() == 1 && graph.is_linked(node)
    }

    /// Whether this node has heard of another one: it is connected, or its links are known.
    pub fn knows(&self, node: NodeId) -> bool {
        self.engine.peers().contains_key(&node)
            || self.engine.graph().origins().any(|(origin, _)| origin == node)
            || self.engine.tunnels().any(|(_, destination)| destination.node == node)
    }
}

/// Does what waits for the disk or takes the processor for long without holding up the traffic, which may have
/// one thread only. A runtime without others has none to hand it to.
fn aside<T>(work: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::current().runtime_flavor() {
        tokio::runtime::RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}

pub(super) struct Driver {
    engine: Engine,
    net: Net,
    writer: Writer,
    clock: Clock,
    models: HotSwap,
    trainer: Option<PathBuf>,
    data_dir: PathBuf,
    schedule: Schedule,
    training: Option<tokio::task::JoinHandle<Result<(), String>>>,
    last_training: Option<(Timestamp, Result<(), String>)>,
    answers: BTreeMap<RequestId, AnswerSender>,
    next_request: RequestId,
    next_tunnel: u16,
    decisions: BTreeMap<TunnelId, Decision>,
    calculations: CalculationTimes,
    dropped: BTreeMap<&'static str, u64>,
    keep_peers_at: Timestamp,
    checks: Checks,
    checked: mpsc::Receiver<Input>,
}

impl Driver {
    pub(super) fn new(
        engine: Engine,
        net: Net,
        writer: Writer,
        clock: Clock,
        options: &NodeOptions,
        models: Arc<ModelRegistry>,
    ) -> Self {
        let (checks, checked) = Checks::new(net.tunnels().clone());
        Self {
            checks,
            checked,
            engine,
            net,
            writer,
            models: HotSwap::new(models, options.config.learning.predict),
            trainer: options.trainer.clone(),
            data_dir: options.data_dir.clone(),
            schedule: Schedule::new(&options.config.learning, clock.now()),
            keep_peers_at: clock.now() + PEERS_INTERVAL,
            clock,
            training: None,
            last_training: None,
            answers: BTreeMap::new(),
            next_request: 0,
            next_tunnel: 0,
            decisions: BTreeMap::new(),
            calculations: CalculationTimes::default(),
            dropped: BTreeMap::new(),
        }
    }

    pub(super) async fn run(
        mut self,
        mut events: mpsc::Receiver<Input>,
        mut requests: mpsc::Receiver<Request>,
    ) {
        if let Err(error) = self.load_models() {
            tracing::warn!("{error}; the moving average decides");
        }
        let mut slice = tokio::time::interval(SLICE);
        slice.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let now = self.clock.now();
            let timeout = self
                .engine
                .next_timeout(now)
                .min(self.schedule.next().unwrap_or(Timestamp(u64::MAX)))
                .min(self.keep_peers_at);
            tokio::select! {
                input = events.recv() => match input {
                    Some(input) => self.handle(input),
                    None => break,
                },
                request = requests.recv() => match request {
                    Some(Request::Stop) | None => {
                        self.keep_peers();
                        self.say_goodbye();
                        break;
                    }
                    Some(request) => self.request(request),
                },
                () = tokio::time::sleep_until(self.clock.instant(timeout)) => {
                    // What waits has happened before: an answer that is here is not late.
                    for _ in 0..EVENTS_FIRST_MAX {
                        let Ok(input) = events.try_recv() else { break };
                        self.handle(input);
                    }
                    self.timeout();
                }
                _ = slice.tick() => {
                    let reports = self.net.take_slice();
                    self.handle(Input::Slice(reports));
                    let usage = self.usage();
                    self.handle(Input::Usage(usage));
                }
                Some(input) = self.checked.recv() => self.handle(input),
                result = wait(&mut self.training) => self.trained(result),
            }
        }
        self.net.stop().await;
        // Dropping the writer commits what is left.
    }

    /// What this node carries and uses.
    fn usage(&self) -> Usage {
        let tunnels = self.net.tunnels();
        let (served, streams) = tunnels.served();
        let used = tunnels.list().into_iter().filter(|info| info.kind != ServiceKind::Udp);
        let services = used.map(|info| (info.service, info.provider.node_id())).collect();
        Usage { tunnels: served, streams, services }
    }

    /// Keeps to whom names belong.
    fn keep_pins(&self, pins: impl Iterator<Item = Pin>) {
        if let Err(error) = names::keep(&self.data_dir, pins) {
            tracing::error!("{error}; a restart forgets to whom names belong");
        }
    }

    /// Keeps who is connected for the next start, when every configured address may be dead.
    fn keep_peers(&mut self) {
        let now = self.clock.now();
        self.keep_peers_at = now + PEERS_INTERVAL;
        let known = self.engine.known_peers(now);
        if !known.is_empty() {
            self.writer.peers(known);
        }
    }

    /// Withdraws what this node publishes, so that nobody is led to a node that is gone. It is
    /// published again at the next start.
    fn say_goodbye(&mut self) {
        let names: Vec<_> = self.engine.services().own().map(|s| s.name.clone()).collect();
        for name in names {
            self.next_request += 1;
            let request = self.next_request;
            self.handle(Input::Command(Command::Withdraw { request, name }));
        }
        self.keep_pins(self.engine.services().registry().pins().list());
    }

    fn handle(&mut self, input: Input) {
        let begun = Instant::now();
        self.engine.handle(self.clock.now(), input);
        self.drain(begun);
    }

    fn timeout(&mut self) {
        let begun = Instant::now();
        let now = self.clock.now();
        self.engine.handle_timeout(now);
        self.drain(begun);
        if self.keep_peers_at <= now {
            self.keep_peers();
        }
        if let Some(reason) = self.schedule.take_due(now) {
            let Some(program) = self.trainer.clone() else { return self.schedule.ended(now) };
            tracing::info!("training: {}", reason.as_str());
            let data_dir = self.data_dir.clone();
            let task = async move { retrain::train(&program, &data_dir).await };
            self.training = Some(tokio::spawn(task));
        }
    }

    /// Carries out what the engine wants; `begun` is when it was called.
    fn drain(&mut self, begun: Instant) {
        let took_us = begun.elapsed().as_micros() as u64;
        while let Some(output) = self.engine.poll_output() {
            match output {
                Output::Record(sample) => {
                    if let Sample::Probe { kind: ProbeKind::Route, rtt_us: Some(_), .. } = sample {
                        self.schedule.new_row();
                    }
                    self.writer.write(sample);
                }
                Output::Decision(decision) => {
                    self.calculations.push(took_us);
                    if let Some(tunnel) = decision.tunnel {
                        self.decisions.insert(tunnel, (*decision).clone());
                    }
                    self.writer.decision(*decision, took_us);
                }
                Output::Choice(choice) => self.writer.choice(*choice),
                Output::Answer { request, answer } => {
                    if let Some(reply) = self.answers.remove(&request) {
                        let _ = reply.send(answer);
                    }
                }
                Output::CheckService { id, subject, check } => {
                    self.checks.begin(id, subject, check);
                }
                Output::Notice(notice) => self.notice(notice),
                Output::KeepNetwork(state) => {
                    let kept = aside(|| network::keep(&self.data_dir, &state));
                    if let Err(error) = kept {
                        tracing::error!("{error}; a restart forgets who was let in or put out");
                    }
                }
                Output::KeepPins(pins) => self.keep_pins(pins.into_iter()),
                network => self.net.carry_out(network),
            }
        }
    }

    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Shape(Reshape::Make(node)) => tracing::debug!(%node, "makes a link"),
            Notice::Shape(Reshape::GiveUp(node)) => tracing::debug!(%node, "gives a link up"),
            Notice::Revoked { node } if node == self.engine.me() => {
                tracing::error!("{}", RequestError::Revoked);
            }
            Notice::NameGranted { name, owner } => {
                tracing::warn!(
                    "the root of the network has granted {name} to {owner}: this node provides it no longer"
                );
            }
            Notice::Revoked { node } => tracing::warn!(%node, "revoked by the root of the network"),
            Notice::ForeignName(error) => tracing::warn!("{error}"),
            Notice::Joined => tracing::info!("joined the network"),
            Notice::BootstrapGaveUp => {
                tracing::warn!("no bootstrap node answered; waiting to be found");
            }
            Notice::Dropped { what, why } => {
                let times = self.dropped.entry(what).or_default();
                *times += 1;
                if what == CLOCK && times.is_power_of_two() {
                    tracing::warn!(times, "{why}");
                }
                tracing::debug!(what, why, "dropped");
            }
            Notice::Link { neighbour, up } => tracing::info!(%neighbour, up, "link"),
            Notice::RouteChanged { tunnel, route, reason } => {
                let route = route.map(|route| route.to_string());
                tracing::info!(%tunnel, route, reason, "route");
            }
            Notice::ServiceHealth { subject, health, failure } => {
                let (name, provider) = (&subject.name, subject.provider);
                let (by, is) = (subject.vantage.as_str(), health.as_str());
                let why = failure.map(|failure| failure.as_str());
                let own = provider == self.engine.me();
                match health {
                    Health::Down => tracing::warn!(%name, %provider, by, why, "service is down"),
                    _ if own => tracing::info!(%name, by, is, why, "service"),
                    _ => tracing::debug!(%name, %provider, by, is, why, "service"),
                }
            }
            Notice::RouteLost { tunnel, at } => {
                let at = at.map(|node| node.to_string());
                tracing::info!(%tunnel, at, "its route is lost");
            }
            Notice::ModelWithdrawn { version, loss } => {
                if self.models.withdrawn(&version, loss, self.clock.now())
                    && let Err(error) = self.load_models()
                {
                    tracing::warn!("{error}");
                }
            }
            Notice::ModelDrift { version } => {
                tracing::info!(version, "the errors of the model have drifted");
                self.schedule.drifted();
            }
        }
    }

    fn request(&mut self, request: Request) {
        match request {
            Request::Inspect(look) => {
                let now = self.clock.now();
                look(&mut View {
                    engine: &mut self.engine,
                    net: &self.net,
                    writer: &self.writer,
                    decisions: &self.decisions,
                    calculations: &self.calculations,
                    model: self.models.champion.as_ref(),
                    model_error: self.models.error.as_ref(),
                    challenger: self.models.challenger.as_ref(),
                    last_change: self.models.last_change.as_ref(),
                    shift: self.models.shift.as_ref(),
                    training: self.schedule.is_running(),
                    last_training: self.last_training.as_ref(),
                    dropped: &self.dropped,
                    now,
                    started_at: self.clock.started_at(),
                });
            }
            Request::Ask(command, reply) => {
                self.next_request += 1;
                self.answers.retain(|_, reply| !reply.is_closed());
                self.answers.insert(self.next_request, reply);
                self.handle(Input::Command(command(self.next_request)));
            }
            Request::Bind { destination, forced, objective, beside, reserve, reply } => {
                let tunnel = self.bind(destination, forced, objective, beside, reserve);
                if let Err(Some(tunnel)) = reply.send(tunnel) {
                    // Whoever asked is gone.
                    self.handle(Input::Command(Command::CloseTunnel(tunnel)));
                }
            }
            Request::Unbind(tunnel) => {
                self.decisions.remove(&tunnel);
                self.handle(Input::Command(Command::CloseTunnel(tunnel)));
            }
            Request::Doubt(name, provider) => {
                self.handle(Input::ServiceDoubted { name, provider });
            }
            Request::ReloadModel(reply) => self.reload(reply),
            Request::Stop => {}
        }
    }

    fn bind(
        &mut self,
        destination: NodeId,
        forced: Option<Route>,
        objective: Objective,
        beside: Option<TunnelId>,
        reserve: Option<u64>,
    ) -> Option<TunnelId> {
        let taken = |id: u16| self.engine.tunnels().any(|(tunnel, _)| tunnel.0 == id);
        let after = (0..TUNNEL_ID_MAX).map(|step| (self.next_tunnel + step) % TUNNEL_ID_MAX + 1);
        let id = after.into_iter().find(|id| !taken(*id))?;
        self.next_tunnel = id;
        let tunnel = TunnelId(id);
        let open = Command::OpenTunnel { tunnel, destination, forced, objective, beside, reserve };
        self.handle(Input::Command(open));
        self.engine.tunnels().any(|(open, _)| open == tunnel).then_some(tunnel)
    }

    fn trained(&mut self, result: Result<(), String>) {
        self.schedule.ended(self.clock.now());
        match &result {
            Ok(()) => tracing::info!("trained"),
            Err(why) => tracing::warn!("training failed: {why}"),
        }
        let result = result.and_then(|()| self.load_models());
        self.last_training = Some((self.clock.now(), result));
    }

    fn reload(&mut self, reply: oneshot::Sender<Result<Option<String>, String>>) {
        let loaded = self.load_models();
        let version = self.models.champion.as_ref().map(|(version, _)| version.clone());
        let _ = reply.send(loaded.map(|()| version));
    }

    /// Hands champion and challenger to the engine. When the champion cannot be used, the model in
    /// use stays.
    fn load_models(&mut self) -> Result<(), String> {
        let (inputs, result) = aside(|| self.models.load());
        inputs.into_iter().for_each(|input| self.handle(input));
        result
    }
}

/// The result of the running training; never, when there is none.
async fn wait(
    training: &mut Option<tokio::task::JoinHandle<Result<(), String>>>,
) -> Result<(), String> {
    let Some(task) = training else { return std::future::pending().await };
    let result = task.await.unwrap_or_else(|error| Err(error.to_string()));
    *training = None;
    result
}
