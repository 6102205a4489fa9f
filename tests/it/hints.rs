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
