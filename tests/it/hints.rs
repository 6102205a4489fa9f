//! What the log and the commands say to somebody who is new, while nodes run.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use meshwise::api::Server;
use meshwise::api::types::Tunnel;
use meshwise::config::Config;
use meshwise::engine::overlay::ServiceKind;
use meshwise::node::{Identity, Node};
use serde_json::Value;

use crate::membership::{found, member};
use crate::processes::Process;
use crate::support::{config, echo_server, eventually, listening, prepare, service, start};

/// The exit code, and what is said on standard output and standard error.
async fn ask(data_dir: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshwise"));
    command.args(arguments).arg("--data-dir").arg(data_dir);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let Output { status, stdout, stderr } = output.await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

/// Waits until the log of a process says this.
async fn logs(process: &Process, words: &str) -> String {
    let log = process.data_dir.join("log");
    let read = || std::fs::read_to_string(&log).unwrap_or_default();
    eventually(words, || async { read().contains(words) }).await;
    read()
}

/// A port of loopback on which nobody listens.
fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("tcp://{}", listener.local_addr().unwrap())
}

/// Two members of one network, the second with a control socket too.
async fn pair(folder: &Path) -> ([PathBuf; 2], [Node; 2], [Server; 2]) {
    let dirs = ["one", "other"].map(|name| folder.join(name));
    let one = start(&dirs[0], &Identity::generate(), config(vec![])).await;
    let settings = config(listening(&one).await);
    let other = start(&dirs[1], &Identity::generate(), settings).await;
    let servers = [&one, &other].map(|node| Server::start(node.handle().clone()).unwrap());
    eventually("the link is up", || async { crate::membership::peers(&other).await.len() == 1 })
        .await;
    (dirs, [one, other], servers)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_does_not_work_is_told_of_when_it_is_published_listed_and_used() {
    let folder = tempfile::tempdir().unwrap();
    let (dirs, nodes, servers) = pair(folder.path()).await;
    let [provider, user] = &dirs;
    let name = "web.local";
    let (code, _, said) = ask(provider, &["service", "publish", name, "--allow", "all"]).await;
    assert!(code == Some(2) && said.contains("say with --to where its connections go"), "{said}");
    let target = nobody();
    let checks = ["--check-interval", "1s", "--check-failures", "1"];
    let publish = [&["service", "publish", name, "--to", &target][..], &checks].concat();
    let (code, _, said) = ask(provider, &publish).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains(&format!("nothing accepts at {target} yet")), "{said}");
    let (code, _, said) = ask(provider, &["service", "publish", name, "--ttl", "60"]).await;
    assert_eq!(code, Some(0), "where it leads is as it was: {said}");
    eventually("why it is down is listed", || async {
        let (_, listed, _) = ask(provider, &["service", "list", "--json"]).await;
        let listed: Value = serde_json::from_str(&listed).unwrap();
        let one = &listed[0];
        (&one["target"], &one["health"], &one["why"])
            == (&target["tcp://".len()..].into(), &"down".into(), &"refused".into())
    })
    .await;
    let (_, listed, _) = ask(provider, &["service", "list"]).await;
    assert!(listed.contains("down: refused"), "{listed}");
    eventually("the user is told", || async {
        let (_, listed, _) = ask(user, &["service", "list", "--json"]).await;
        listed.contains("down")
    })
    .await;
    let (code, _, said) = ask(user, &["tunnel", "open", name]).await;
    assert!(code == Some(0) && said.contains("web.local is down"), "{said}");

    let mut closed = service("closed.local");
    closed.allowed = vec![nodes[0].handle().key().node_id()];
    nodes[0].handle().publish(closed, echo_server().await).await.unwrap();
    let (code, _, said) = ask(user, &["tunnel", "open", "closed.local"]).await;
    let words = "this node may not connect to closed.local";
    assert!(code == Some(0) && said.contains(words), "{said}");

    nodes[0].handle().publish(service("open.local"), echo_server().await).await.unwrap();
    let (code, _, said) = ask(user, &["tunnel", "open", "open.local", "--paths", "1"]).await;
    assert!(code == Some(0) && said.is_empty(), "{said}");
    let (_, explained, _) = ask(user, &["route", "explain", "open.local", "--json"]).await;
    let explained: Value = serde_json::from_str(&explained).unwrap();
    assert_eq!(explained["other_tunnels"], serde_json::json!([]), "those lead to other services");
    let (code, _, said) = ask(user, &["model", "explain", "open.local"]).await;
    assert!(code == Some(1) && said.contains("the moving average decides: no model"), "{said}");
    drop(servers);
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_network_is_named_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let (one, _) = found(&folder.path().join("one"), config(vec![])).await;
    let address = listening(&one).await.remove(0);
    let at = address.split("/p2p/").next().unwrap().to_owned();
    let process = Process::launch(&folder.path().join("other"), &config(vec![address]), &[]);
    let words = format!("{at} is of another network");
    let said = logs(&process, &words).await;
    let line = said.lines().find(|line| line.contains(&words)).unwrap();
    assert!(line.contains("WARN") && line.contains("'meshwise node --join TOKEN'"), "{line}");
    eventually("doctor says what to do", || async {
        let (code, checks, _) = ask(&process.data_dir, &["doctor"]).await;
        let says = |words: &str| checks.contains(words);
        code == Some(1) && says("'meshwise node --join TOKEN'") && says("is of another network")
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let again = logs(&process, &words).await;
    assert_eq!(again.matches(&words).count(), 1, "once an address: {again}");
    drop(process);
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_node_says_so_when_it_is_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let (first, network) = found(&folder.path().join("first"), config(vec![])).await;
    let dir = folder.path().join("out");
    let settings = config(listening(&first).await);
    let out = member(&network, Duration::ZERO, &dir, settings).await;
    let key = out.handle().key();
    eventually("they know each other", || async {
        first.handle().revoke(key).await.is_ok()
            && crate::membership::peers(&first).await.is_empty()
    })
    .await;
    eventually("the node knows", || async {
        let look = move |view: &mut meshwise::node::View<'_>| {
            view.engine.membership().roster().is_revoked(&key)
        };
        out.handle().inspect(look).await.unwrap()
    })
    .await;
    out.stop().await;
    first.stop().await;
    let process = Process::launch(&dir, &config(vec![]), &[]);
    let words = "the root of the network has revoked this node";
    let said = logs(&process, words).await;
    assert!(said.lines().any(|line| line.contains("ERROR") && line.contains(words)), "{said}");
    logs(&process, words).await;
    eventually("a tunnel is refused with the reason", || async {
        let (code, _, said) = ask(&dir, &["tunnel", "open", "a.local"]).await;
        code == Some(1) && said.contains(words)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_says_what_decides_when_prediction_is_off() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("node");
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/xgboost.json");
    ask(&dir, &["model", "import", file, "--version", "fleet-1"]).await;
    ask(&dir, &["model", "promote", "fleet-1"]).await;
    let settings: Config = config(vec![]);
    let process = Process::launch(&dir, &settings, &["--no-predict"]);
    let said = logs(&process, "decides from now on").await;
    assert!(said.contains("version=\"moving-average\""), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_speaks_no_socks_is_told_of_with_what_to_write() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = config(vec![]);
    settings.entry.socks = "127.0.0.1:0".into();
    let process = Process::launch(&folder.path().join("node"), &settings, &[]);
    let proxy = process.status().socks.unwrap();
    let mut program = std::net::TcpStream::connect(proxy).unwrap();
    program.write_all(b"CONNECT a.local:80 HTTP/1.1\r\n\r\n").unwrap();
    logs(&process, "it speaks no SOCKS5; with curl: --proxy socks5h://").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_large_a_udp_payload_may_be_is_logged() {
    let folder = tempfile::tempdir().unwrap();
    let provider = start(&folder.path().join("one"), &Identity::generate(), config(vec![])).await;
    let target = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut spec = service("dns.local");
    spec.kind = ServiceKind::Udp;
    provider.handle().publish(spec, target.local_addr().unwrap()).await.unwrap();
    let dir = folder.path().join("other");
    prepare(&dir, &Identity::generate());
    let process = Process::launch(&dir, &config(listening(&provider).await), &[]);
    let tunnel: Tunnel = process.ask_until(&["tunnel", "open", "dns.local"], |_| true);
    let program = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    eventually("it is too large", || async {
        program.send_to(&[0; 20_000], &tunnel.listen).unwrap();
        std::fs::read_to_string(dir.join("log")).unwrap().contains("a payload has at most ")
    })
    .await;
    provider.stop().await;
}
