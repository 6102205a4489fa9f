//! `meshwise doctor`, without a node and with one.

use std::path::Path;
use std::process::Command;

use meshwise::api::Server;
use meshwise::node::Identity;
use serde_json::Value;

use crate::support::{config, eventually, listening, start};

/// Whether all is sound, and the checks.
fn doctor(data_dir: &Path, settings: &str) -> (bool, Vec<Value>) {
    let file = data_dir.with_extension("toml");
    std::fs::write(&file, settings).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_meshwise"))
        .args(["doctor", "--json", "--config"])
        .arg(&file)
        .arg("--data-dir")
        .arg(data_dir)
        .output()
        .unwrap();
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let sound = said["sound"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(if sound { 0 } else { 1 }));
    (sound, said["checks"].as_array().unwrap().clone())
}

/// The verdicts on one subject.
fn verdicts(checks: &[Value], what: &str) -> Vec<String> {
    let about = checks.iter().filter(|check| check["what"] == what);
    about.map(|check| check["verdict"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn without_a_node_files_and_addresses_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("node");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let settings = |kind: &str| format!("[network]\n{kind} = ['/ip4/127.0.0.1/tcp/{port}']\n");
    let elsewhere = "listen = ['/ip4/127.0.0.1/tcp/0']\n";

    let (sound, checks) = doctor(&dir, &(settings("bootstrap") + elsewhere));
    assert!(sound, "{checks:?}");
    for (what, verdict) in
        [("node", "note"), ("data directory", "note"), ("bootstrap address", "ok")]
    {
        assert_eq!(verdicts(&checks, what), [verdict], "{checks:?}");
    }
    assert!(!dir.exists(), "nothing is made");

    let (sound, checks) = doctor(&dir, &settings("listen"));
    assert!(!sound);
    assert_eq!(verdicts(&checks, "listen address"), ["broken"]);
    drop(taken);
    let (sound, checks) = doctor(&dir, &(settings("bootstrap") + elsewhere));
    assert!(sound, "a node there may start later");
    assert_eq!(verdicts(&checks, "bootstrap address"), ["warning"]);
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("meshwise.db"), "rubbish, which is no database at all").unwrap();
    let (sound, checks) = doctor(&dir, elsewhere.replace("listen", "[network]\nlisten").as_str());
    assert!(!sound);
    assert_eq!(verdicts(&checks, "database"), ["broken"]);
    assert_eq!(verdicts(&checks, "data directory"), ["ok"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_node_says_what_works() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let first = start(&dir("first"), &Identity::generate(), config(vec![])).await;
    let node = start(&dir("node"), &Identity::generate(), config(listening(&first).await)).await;
    let server = Server::start(node.handle().clone()).unwrap();
    let ask = || async {
        let data_dir = dir("node");
        tokio::task::spawn_blocking(move || doctor(&data_dir, "")).await.unwrap()
    };
    eventually("a member's clock was heard, and the link is up", || async {
        let checks = ask().await.1;
        ["clock", "peers"].iter().all(|what| verdicts(&checks, what) == ["ok"])
    })
    .await;
    let (sound, checks) = ask().await;
    assert!(sound, "{checks:?}");
    for what in ["node", "membership", "database", "bootstrap address", "peers", "data directory"] {
        assert_eq!(verdicts(&checks, what), ["ok"], "{checks:?}");
    }
    for what in ["reachable", "port mapping", "local search"] {
        assert_eq!(verdicts(&checks, what), ["note"], "off on loopback: {checks:?}");
    }
    first.stop().await;
    eventually("being alone is noticed", || async {
        let (sound, checks) = ask().await;
        !sound && verdicts(&checks, "peers") == ["broken"]
    })
    .await;
    drop(server);
    node.stop().await;
}
