//! A mesh of real nodes with real sockets on loopback, in this process.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use meshwise::config::{Config, EmulatedLink};
use meshwise::engine::event::CommandError;
use meshwise::engine::measure::ProbeKind;
use meshwise::engine::predict::ForestModel;
use meshwise::engine::predict::schema::FEATURES;
use meshwise::engine::types::{NodeId, ServiceName};
use meshwise::learn::{Action, ModelRegistry, TrainConfig, train_from_store};
use meshwise::node::{DATABASE, Identity, MODELS, Node, NodeOptions, RequestError, TunnelOptions};
use meshwise::store::{ProbeRow, Reader};
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::support::{
    config, echo_server, eventually, exchange, listening, only_links_to, service, start,
};

const NAME: &str = "byronwade.local";

/// S - A - T and S - B - T; no link between S and T, nor between A and B.
pub struct Diamond {
    _folder: TempDir,
    pub nodes: Vec<Node>,
    pub ids: Vec<NodeId>,
}

pub const S: usize = 0;
pub const A: usize = 1;
pub const B: usize = 2;
pub const T: usize = 3;

impl Diamond {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// With other settings.
    pub async fn start_with(change: impl Fn(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let identities: Vec<Identity> = (0..4).map(|_| Identity::generate()).collect();
        let ids: Vec<NodeId> = identities.iter().map(Identity::node_id).collect();
        let links: [&[usize]; 4] = [&[A, B], &[S, T], &[S, T], &[A, B]];
        let mut nodes: Vec<Node> = Vec::new();
        for (index, identity) in identities.iter().enumerate() {
            let mut bootstrap = Vec::new();
            for node in &nodes {
                bootstrap.extend(listening(node).await);
            }
            let mut config = config(bootstrap);
            let neighbours: Vec<NodeId> = links[index].iter().map(|other| ids[*other]).collect();
            config.emulation = only_links_to(&neighbours);
            change(&mut config);
            nodes.push(start(&folder.path().join(index.to_string()), identity, config).await);
        }
        let diamond = Self { _folder: folder, nodes, ids };
        for index in 0..4 {
            eventually("every node knows every other one", || diamond.knows(index)).await;
        }
        diamond
    }

    async fn knows(&self, index: usize) -> bool {
        let complete = |view: &mut meshwise::node::View<'_>| {
            let origins: Vec<usize> =
                view.engine.graph().origins().map(|(_, links)| links).collect();
            origins == [2, 2, 2, 2]
        };
        self.nodes[index].handle().inspect(complete).await.unwrap()
    }

    fn data_dir(&self, index: usize) -> &Path {
        self.nodes[index].handle().data_dir()
    }

    /// Publishes an echo service on T and opens a tunnel from S.
    pub async fn tunnel(&self) -> SocketAddr {
        let target = echo_server().await;
        self.nodes[T].handle().publish(service(NAME), target).await.unwrap();
        let handle = self.nodes[S].handle();
        let listen = "127.0.0.1:0".parse().unwrap();
        let name: ServiceName = NAME.parse().unwrap();
        handle.resolve(name.clone(), true).await.unwrap();
        handle.open_tunnel(name, listen, TunnelOptions::default()).await.unwrap().1
    }

    /// The relay that S uses now.
    pub async fn relay(&self) -> usize {
        let route = |view: &mut meshwise::node::View<'_>| {
            let (_, destination) = view.engine.tunnels().next().unwrap();
            destination.current.clone().unwrap().0
        };
        let route = self.nodes[S].handle().inspect(route).await.unwrap();
        assert_eq!(route.hop_count(), 2, "no direct link: {route}");
        self.ids.iter().position(|id| *id == route.relays()[0]).unwrap()
    }

    pub async fn stop(self) {
        for node in self.nodes {
            node.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_forwards_ciphertext_only() {
    let diamond = Diamond::start().await;
    let address = diamond.tunnel().await;
    let (tap, mut captured) = mpsc::channel(10_000);
    let relay = diamond.relay().await;
    diamond.nodes[relay].handle().inspect(move |view| view.net.plane().set_tap(tap)).await.unwrap();
    let secret = b"attack at dawn, by the northern gate, with everything we have".repeat(50);
    assert_eq!(exchange(address, &secret).await.unwrap(), secret);
    let mut forwarded = Vec::new();
    while let Ok(datagram) = captured.try_recv() {
        forwarded.push(datagram);
    }
    let contains = |word: &[u8]| {
        let holds = |datagram: &Vec<u8>| datagram.windows(word.len()).any(|window| window == word);
        forwarded.iter().filter(|datagram| holds(datagram)).count()
    };
    let bytes: usize = forwarded.iter().map(Vec::len).sum();
    assert!(bytes > 2 * secret.len(), "the relay carried both directions: {bytes} bytes");
    let source = diamond.ids[S].0;
    assert_eq!(contains(&source), forwarded.len(), "the search finds what is in the clear");
    for word in [&b"northern"[..], b"attack", NAME.as_bytes()] {
        assert_eq!(contains(word), 0);
    }
    diamond.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_connection_survives_the_death_of_its_relay() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut diamond = Diamond::start().await;
    let address = diamond.tunnel().await;
    let relay = diamond.relay().await;
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut answer = [0; 5];
    stream.write_all(b"first").await.unwrap();
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"first");
    let node = diamond.nodes.remove(relay);
    node.stop().await;
    stream.write_all(b"after").await.unwrap();
    let reading = stream.read_exact(&mut answer);
    tokio::time::timeout(Duration::from_secs(30), reading).await.unwrap().unwrap();
    assert_eq!(&answer, b"after", "the same connection goes on over the other relay");
    diamond.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_falls_silent_is_left_although_it_stays_connected() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let diamond = Diamond::start().await;
    let address = diamond.tunnel().await;
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut answer = [0; 6];
    stream.write_all(b"before").await.unwrap();
    stream.read_exact(&mut answer).await.unwrap();
    let relay = diamond.relay().await;
    for neighbour in [S, T] {
        let neighbour = diamond.ids[neighbour];
        let silent =
            EmulatedLink { neighbour: neighbour.to_string(), loss: 1.0, ..EmulatedLink::default() };
        assert!(diamond.nodes[relay].handle().emulate(neighbour, silent).await.unwrap());
    }
    let other = A + B - relay;
    eventually("the other relay is used", || async { diamond.relay().await == other }).await;
    stream.write_all(b"later.").await.unwrap();
    let reading = stream.read_exact(&mut answer);
    tokio::time::timeout(Duration::from_secs(30), reading).await.unwrap().unwrap();
    assert_eq!(&answer, b"later.", "the same connection goes on");
    let lost = |probe: &ProbeRow| probe.rtt_us.is_none();
    let database = diamond.data_dir(S).join(DATABASE);
    let probes = || Reader::open(&database).unwrap().probes(ProbeKind::Route, 0).unwrap();
    eventually("the losses are on record", || async { probes().iter().any(lost) }).await;
    diamond.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_recorded_and_a_model_is_swapped_in_without_a_restart() {
    let diamond = Diamond::start().await;
    let address = diamond.tunnel().await;
    assert_eq!(exchange(address, b"x").await.unwrap(), b"x");
    let database = diamond.data_dir(S).join(DATABASE);
    let probes = || Reader::open(&database).unwrap().probes(ProbeKind::Route, 0).unwrap();
    eventually("200 route probes are stored", || async { probes().len() > 200 }).await;
    let reader = Reader::open(&database).unwrap();
    let counts = reader.counts().unwrap();
    for table in ["probe", "link_state", "event", "decision", "candidate"] {
        let rows = counts.tables.iter().find(|count| count.table == table).unwrap().rows;
        assert!(rows > 0, "{table} is empty");
    }
    let decisions = reader.latest_decisions(50).unwrap();
    let both = decisions.iter().any(|decision| decision.candidates.len() == 2);
    assert!(both, "both ways round were weighed");
    let decision = &reader.decisions_apart(0, 0).unwrap()[0];
    assert_eq!(decision.model_version, "moving-average");
    assert!(decision.candidates.iter().all(|c| c.features.len() == FEATURES.len()));

    let models = diamond.data_dir(S).join(MODELS);
    let train = TrainConfig { trees: 5, ..TrainConfig::default() };
    let (at, from) = (1_800_000_000_000_000, database.clone());
    let outcome = tokio::task::spawn_blocking({
        let models = models.clone();
        move || train_from_store(&from, &models, &train, at).unwrap()
    });
    let outcome = outcome.await.unwrap();
    // Whether it earns its place on loopback is chance; here it is only swapped in.
    let registry = ModelRegistry::new(&models);
    registry.promote(&outcome.model.version, at, "a test").unwrap();
    let handle = diamond.nodes[S].handle();
    let version = handle.reload_model().await.unwrap().unwrap();
    assert_eq!(version.as_ref(), Some(&outcome.model.version));
    eventually("decisions are made and logged under the model", || async {
        let decision = reader.latest_decisions(1).unwrap().pop().unwrap();
        decision.model_version == outcome.model.version
            && decision.candidates.iter().any(|c| c.predicted_ms.is_some())
    })
    .await;

    // A damaged champion is refused with a reason, and the good one goes on.
    let file = models.join(format!("{}.json", outcome.model.version));
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, &text[..text.len() / 2]).unwrap();
    let error = handle.reload_model().await.unwrap().unwrap_err();
    assert!(error.contains(&outcome.model.version) && error.contains("train"), "{error}");
    let in_use = |view: &mut meshwise::node::View<'_>| view.engine.predictor().version();
    assert_eq!(handle.inspect(in_use).await.unwrap(), outcome.model.version);
    let foreign = ForestModel { schema_hash: "0123456789abcdef".into(), ..outcome.model.clone() };
    std::fs::write(&file, foreign.to_json()).unwrap();
    let error = handle.reload_model().await.unwrap().unwrap_err();
    assert!(error.contains("0123456789abcdef"), "{error}");
    // A champion that does harm is taken out of use by the node itself, in the registry too; the one
    // before cannot be used, so that the moving average decides.
    let mut harmful = ForestModel { version: "harmful".into(), ..outcome.model.clone() };
    // Off by a factor that no noise of a busy machine comes near.
    harmful.latency.trees.base += 8.0;
    registry.save(&harmful).unwrap();
    registry.promote("harmful", at, "a test").unwrap();
    handle.reload_model().await.unwrap().unwrap();
    assert_eq!(handle.inspect(in_use).await.unwrap(), "harmful");
    let watched = |view: &mut meshwise::node::View<'_>| {
        let predictor = view.engine.predictor();
        predictor.watch().champion().probes > 100 || predictor.version() != "harmful"
    };
    eventually("it is watched", || async { handle.inspect(watched).await.unwrap() }).await;
    eventually("it is out of use", || async {
        registry.champion_version().unwrap().is_none()
            && handle.inspect(in_use).await.unwrap() == "moving-average"
    })
    .await;
    let change = handle.inspect(|view| view.last_change.cloned()).await.unwrap().unwrap();
    assert_eq!((change.action, change.from.as_deref()), (Action::RolledBack, Some("harmful")));
    assert!(change.reason.contains("moving average"), "{}", change.reason);
    assert_eq!(exchange(address, b"y").await.unwrap(), b"y", "traffic never stopped");
    diamond.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_work_says_why() {
    let diamond = Diamond::start().await;
    let address = diamond.tunnel().await;
    let handle = diamond.nodes[S].handle();
    let name = |text: &str| text.parse::<ServiceName>().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();

    let unknown =
        handle.open_tunnel(name("nobody.local"), any, TunnelOptions::default()).await.unwrap_err();
    assert!(matches!(unknown, RequestError::Command(CommandError::UnknownName(_))), "{unknown}");
    let taken =
        handle.open_tunnel(name(NAME), address, TunnelOptions::default()).await.unwrap_err();
    assert!(taken.to_string().contains("--listen"), "{taken}");
    let own = diamond.nodes[T]
        .handle()
        .open_tunnel(name(NAME), any, TunnelOptions::default())
        .await
        .unwrap_err();
    assert!(matches!(own, RequestError::OwnService(_)), "{own}");
    let nowhere = vec![NodeId([9; 8])];
    let options = TunnelOptions { via: Some(nowhere), ..TunnelOptions::default() };
    let forced = handle.open_tunnel(name(NAME), any, options).await.unwrap_err();
    assert!(matches!(forced, RequestError::UnknownNode(_)), "{forced}");
    for end in [S, T] {
        let options =
            TunnelOptions { via: Some(vec![diamond.ids[end]]), ..TunnelOptions::default() };
        let no_relay = handle.open_tunnel(name(NAME), any, options).await.unwrap_err();
        assert!(no_relay.to_string().contains("--via \"\""), "{no_relay}");
    }
    let broken = vec![diamond.ids[A], diamond.ids[B]];
    let options = TunnelOptions { via: Some(broken), ..TunnelOptions::default() };
    let broken = handle.open_tunnel(name(NAME), any, options).await.unwrap_err();
    let RequestError::BrokenPath { from, to } = broken else { panic!("{broken}") };
    assert_eq!((from, to), (diamond.ids[A], diamond.ids[B]), "no link joins them");
    assert_eq!(handle.tunnels().len(), 1, "nothing stays open");
    let bound = |view: &mut meshwise::node::View<'_>| view.engine.tunnels().count();
    eventually("nothing stays bound", || async { handle.inspect(bound).await.unwrap() == 1 }).await;

    // A caller that is not on the allow list gets nothing.
    let mut private = service("private.local");
    private.allowed = vec![diamond.ids[A]];
    let target = echo_server().await;
    diamond.nodes[T].handle().publish(private, target).await.unwrap();
    let (_, refused) =
        handle.open_tunnel(name("private.local"), any, TunnelOptions::default()).await.unwrap();
    let answer = exchange(refused, b"let me in").await;
    assert!(answer.is_err() || answer.is_ok_and(|bytes| bytes.is_empty()));
    let counted = |view: &mut meshwise::node::View<'_>| view.net.plane().counters().dropped();
    eventually("the refusal is counted", || async {
        let dropped = handle.inspect(counted).await.unwrap();
        dropped.get("stream-refused-not-allowed") == Some(&1)
    })
    .await;

    // Withdrawn is gone for everybody.
    diamond.nodes[T].handle().withdraw(name(NAME)).await.unwrap();
    let gone = Arc::new(name(NAME));
    eventually("the withdrawal is known", || {
        let (handle, gone) = (handle.clone(), gone.clone());
        async move { handle.resolve((*gone).clone(), false).await.is_err() }
    })
    .await;
    diamond.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_connect_over_quic_too() {
    let folder = tempfile::tempdir().unwrap();
    let quic = |bootstrap| {
        let mut config = config(bootstrap);
        config.network.listen = vec!["/ip4/127.0.0.1/udp/0/quic-v1".into()];
        config
    };
    let first = start(&folder.path().join("a"), &Identity::generate(), quic(vec![])).await;
    let bootstrap = listening(&first).await;
    assert!(bootstrap[0].contains("/quic-v1/"), "{bootstrap:?}");
    let second = start(&folder.path().join("b"), &Identity::generate(), quic(bootstrap)).await;
    let target = echo_server().await;
    first.handle().publish(service(NAME), target).await.unwrap();
    let name: ServiceName = NAME.parse().unwrap();
    eventually("the service is known", || async {
        second.handle().resolve(name.clone(), false).await.is_ok()
    })
    .await;
    let any = "127.0.0.1:0".parse().unwrap();
    let (_, address) =
        second.handle().open_tunnel(name.clone(), any, TunnelOptions::default()).await.unwrap();
    let long = vec![7; 1_000_000];
    assert_eq!(exchange(address, &long).await.unwrap(), long);
    second.stop().await;
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn training_runs_on_schedule_and_its_failure_harms_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(vec![]);
    config.learning.first_train_s = 1;
    config.learning.retrain_s = 1;
    let options = NodeOptions {
        config,
        data_dir: folder.path().join("a"),
        trainer: Some(env!("CARGO_BIN_EXE_meshwise").into()),
    };
    let node = Node::start(options).await.unwrap();
    let last = |view: &mut meshwise::node::View<'_>| view.last_training.cloned();
    let failed = || async {
        let last = node.handle().inspect(last).await.unwrap();
        last.is_some_and(|(_, result)| result.is_err_and(|why| why.contains("100 are needed")))
    };
    eventually("the child says that there is nothing to learn from yet", failed).await;
    let decides = |view: &mut meshwise::node::View<'_>| view.engine.predictor().version();
    assert_eq!(node.handle().inspect(decides).await.unwrap(), "moving-average");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_that_was_restarted_serves_again_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let user = start(&folder.path().join("user"), &Identity::generate(), config(vec![])).await;
    let settings = config(listening(&user).await);
    let dir = folder.path().join("provider");
    let provider = start(&dir, &Identity::generate(), settings.clone()).await;
    let target = echo_server().await;
    provider.handle().publish(service(NAME), target).await.unwrap();
    let name: ServiceName = NAME.parse().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    eventually("the service is known", || async {
        user.handle().resolve(name.clone(), false).await.is_ok()
    })
    .await;
    let (_, address) =
        user.handle().open_tunnel(name.clone(), any, TunnelOptions::default()).await.unwrap();
    assert_eq!(exchange(address, b"before").await.unwrap(), b"before");

    provider.stop().await;
    eventually("a stopped provider leaves the list", || async {
        user.handle().resolve(name.clone(), false).await.is_err()
    })
    .await;
    let begun = std::time::Instant::now();
    let refused = exchange(address, b"meanwhile").await;
    assert!(refused.is_err() || refused.is_ok_and(|bytes| bytes.is_empty()));
    assert!(begun.elapsed() < Duration::from_secs(20), "an error, not a hanging connection");

    let options = NodeOptions { config: settings, data_dir: dir, trainer: None };
    let provider = Node::start(options).await.unwrap();
    eventually("the tunnel works again", || async {
        exchange(address, b"after").await.is_ok_and(|bytes| bytes == b"after")
    })
    .await;
    // Also without a tunnel that would hold the good-bye up.
    let list = user.handle().tunnels();
    user.handle().close_tunnel(list[0].tunnel).await.unwrap();
    provider.stop().await;
    eventually("it leaves the list again", || async {
        user.handle().resolve(name.clone(), false).await.is_err()
    })
    .await;
    user.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ping_takes_the_route_that_a_tunnel_would_take_and_is_a_sample() {
    let mesh = Diamond::start().await;
    let source = mesh.nodes[S].handle();
    let ping = async || {
        let pinged = source.ping(mesh.ids[T]).await.ok();
        pinged.filter(|(_, rtt_us)| rtt_us.is_some())
    };
    eventually("a ping over a relay is answered", async || ping().await.is_some()).await;
    let (route, rtt_us) = ping().await.unwrap();
    assert_eq!((route.hop_count(), route.destination()), (2, mesh.ids[T]));
    assert!(rtt_us.is_some_and(|us| us > 0));
    let nowhere = NodeId([7; 8]);
    let refused = source.ping(nowhere).await;
    let no_route = CommandError::NoRoute(nowhere);
    assert!(matches!(refused, Err(RequestError::Command(why)) if why == no_route));
    mesh.stop().await;
}
