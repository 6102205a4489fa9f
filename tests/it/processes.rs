//! Four separate processes of the real program: join, publish, fetch 5 MB over a forced relay,
//! stop cleanly.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use meshwise::api::types::{Status, Tunnel};
use meshwise::config::Config;
use meshwise::node::Identity;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{PATIENCE, config, prepare};

const PROGRAM: &str = env!("CARGO_BIN_EXE_meshwise");
const FIVE_MB: usize = 5_000_000;

/// A running `meshwise node`.
pub struct Process {
    pub data_dir: PathBuf,
    child: Child,
}

impl Process {
    /// A member of all tests' network.
    fn start(folder: &Path, name: &str, bootstrap: Vec<String>) -> Self {
        let data_dir = folder.join(name);
        prepare(&data_dir, &Identity::generate());
        Self::launch(&data_dir, &config(bootstrap), &[])
    }

    /// Starts a node on a data directory, whatever is in there.
    pub fn launch(data_dir: &Path, config: &Config, arguments: &[&str]) -> Self {
        std::fs::create_dir_all(data_dir).unwrap();
        let data_dir = data_dir.to_owned();
        let settings = data_dir.join("meshwise.toml");
        std::fs::write(&settings, toml::to_string(config).unwrap()).unwrap();
        let log = std::fs::File::create(data_dir.join("log")).unwrap();
        let child = Command::new(PROGRAM)
            .arg("node")
            .args(arguments)
            .arg("--config")
            .arg(&settings)
            .arg("--data-dir")
            .arg(&data_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { data_dir, child }
    }

    /// Runs a command against this node; its JSON, or what it said on standard error.
    pub fn ask<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T, String> {
        let output = Command::new(PROGRAM)
            .args(arguments)
            .arg("--json")
            .arg("--data-dir")
            .arg(&self.data_dir)
            .output()
            .unwrap();
        if output.status.success() {
            Ok(serde_json::from_slice(&output.stdout).unwrap())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Asks until the answer is as it should be.
    pub fn ask_until<T: DeserializeOwned>(
        &self,
        arguments: &[&str],
        good: impl Fn(&T) -> bool,
    ) -> T {
        let begun = Instant::now();
        loop {
            match self.ask::<T>(arguments) {
                Ok(answer) if good(&answer) => return answer,
                Err(error) if begun.elapsed() > PATIENCE => panic!("{arguments:?}: {error}"),
                _ => assert!(begun.elapsed() < PATIENCE, "{arguments:?} never became good"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn status(&self) -> Status {
        self.ask_until(&["status"], |_: &Status| true)
    }

    /// Ends it as a person would, and returns whether it ended well.
    pub fn stop(mut self) -> bool {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.success();
            }
            assert!(begun.elapsed() < PATIENCE, "it does not stop");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A service that sends 5 MB to whoever connects.
async fn file_server(bytes: Vec<u8>) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.write_all(&bytes).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_processes_carry_five_megabytes_over_a_forced_relay() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..FIVE_MB as u32 / 4)
        .flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let server = file_server(bytes.clone()).await;

    let first = Process::start(folder.path(), "relay-1", vec![]);
    let bootstrap = first.status().listening;
    let mut all = vec![first];
    for name in ["relay-2", "edge-1", "edge-2"] {
        all.push(Process::start(folder.path(), name, bootstrap.clone()));
    }
    for process in &all {
        process.ask_until(&["status"], |status: &Status| {
            status.joined && status.nodes_known == 4 && status.links_up == 3
        });
    }
    let [_, relay, source, target] = &all[..] else { unreachable!("four were started") };
    let to = format!("tcp://{server}");
    let publish = ["service", "publish", "files.local", "--to", &to, "--check", "none"];
    target.ask::<serde_json::Value>(&publish).unwrap();

    let relay_id = relay.status().node;
    let before = relay.status().forwarded.bytes;
    let open = ["tunnel", "open", "files.local", "--via", &relay_id];
    let tunnel: Tunnel = source.ask_until(&open, |_| true);
    assert_eq!(tunnel.route.as_ref().map(Vec::len), Some(3), "two hops");
    let mut stream = tokio::net::TcpStream::connect(&tunnel.listen).await.unwrap();
    let mut fetched = Vec::new();
    stream.read_to_end(&mut fetched).await.unwrap();
    assert_eq!(Sha256::digest(&fetched), Sha256::digest(&bytes));
    let carried = relay.status().forwarded.bytes - before;
    assert!(carried >= FIVE_MB as u64, "the relay carried {carried} bytes");

    let other: Tunnel = source.ask(&["tunnel", "open", "files.local"]).unwrap();
    for (this, that) in [(&tunnel, &other), (&other, &tunnel)] {
        let explain = ["route", "explain", "files.local", "--tunnel", &this.tunnel.to_string()];
        let said: serde_json::Value = source.ask(&explain).unwrap();
        assert_eq!(said["tunnel"], this.tunnel);
        assert_eq!(said["other_tunnels"], serde_json::json!([that.tunnel]));
        assert_eq!(said["reason"] == "forced", this.tunnel == tunnel.tunnel, "{said}");
    }
    let explain = ["route", "explain", "files.local", "--tunnel", "999"];
    let no_such = source.ask::<serde_json::Value>(&explain).unwrap_err();
    assert!(no_such.contains("no tunnel 999 to files.local"), "{no_such}");

    let unknown = source.ask::<Tunnel>(&["tunnel", "open", "nobody.local"]).unwrap_err();
    assert!(unknown.contains("nobody publishes nobody.local"), "{unknown}");
    assert_eq!(unknown.trim().lines().count(), 1, "one line: {unknown}");
    for process in all {
        assert!(process.stop(), "a clean end");
    }
}
