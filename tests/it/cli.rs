//! The command line as a person meets it: exit codes, one-line errors, JSON.

use std::path::Path;
use std::process::{Command, Output};

fn run(data_dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_meshwise"))
        .args(arguments)
        .arg("--data-dir")
        .arg(data_dir)
        .output()
        .unwrap()
}

/// Fails with exit code 1 and one line that holds all these words; nothing on standard output.
fn fails(data_dir: &Path, arguments: &[&str], words: &[&str]) {
    fails_with(1, data_dir, arguments, words);
}

fn fails_with(code: i32, data_dir: &Path, arguments: &[&str], words: &[&str]) {
    let output = run(data_dir, arguments);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
    let last = error.lines().last().unwrap_or_default();
    let logs = arguments[0] == "node";
    assert!(logs || error.lines().count() == 1, "one line: {error}");
    for word in words {
        assert!(last.contains(word), "{arguments:?} does not say {word}: {error}");
    }
    assert!(!error.contains("panicked"), "{error}");
    assert!(output.stdout.is_empty());
}

#[test]
fn without_a_node_commands_say_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        &["status"][..],
        &["peer", "list"],
        &["network", "invite"],
        &["network", "members"],
        &["network", "revoke", "x"],
        &["service", "list"],
        &["service", "publish", "a.local", "--to", "tcp://127.0.0.1:1"],
        &["tunnel", "list"],
        &["route", "explain", "a.local"],
        &["model", "predict", "a.local"],
        &["model", "explain", "a.local"],
    ] {
        fails(dir.path(), arguments, &["no node runs on", "meshwise node --data-dir"]);
    }
}

#[test]
fn wrong_usage_is_exit_code_two() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        &["tunnel", "open"][..],
        &["fly"],
        &["service", "publish", "a.local", "--to", "udp://127.0.0.1:1", "--objective", "fast"],
        &["service", "publish", "a.local", "--to", "udp://127.0.0.1:1", "--check", "tcp"],
        &["service", "publish", "a.local", "--to", "tcp://127.0.0.1:1", "--check", "ftp"],
        &["service", "publish", "a.local", "--to", "tcp://127.0.0.1:1", "--check-status", "200"],
        &["tunnel", "open", "a.local", "--paths", "5"],
        &["tunnel", "open", "a.local", "--objective", "Latency"],
        &["tunnel", "open", "a.local", "--listen", "9000"],
        &["tunnel", "open", "a b"],
        &["service", "publish", "a.local", "--to", "127.0.0.1:1"],
        &["service", "publish", "-a", "--to", "tcp://127.0.0.1:1"],
        &["node", "--socks", "localhost"],
    ] {
        let output = run(dir.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{arguments:?}");
    }
}

/// Is wrong usage, and says all these words.
fn wrong_usage(data_dir: &Path, arguments: &[&str], words: &[&str]) {
    let output = run(data_dir, arguments);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
    for word in words {
        assert!(error.contains(word), "{arguments:?} does not say {word}: {error}");
    }
}

#[test]
fn whether_a_replay_measures_by_itself_can_be_said() {
    let dir = tempfile::tempdir().unwrap();
    let replay = ["replay", "--trace", "none.parquet", "--own-probes", "off"];
    fails(dir.path(), &replay, &["none.parquet"]);
}

#[test]
fn how_often_a_service_of_unknown_kind_is_checked_needs_how() {
    let dir = tempfile::tempdir().unwrap();
    let publish = ["service", "publish", "a.local", "--check-interval", "10s"];
    wrong_usage(dir.path(), &publish, &["--check", "--to"]);
}

#[test]
fn a_delegation_lasts_a_year_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let delegate = |time| ["service", "delegate", "a.local", "x", "--expires", time];
    wrong_usage(dir.path(), &delegate("400d"), &["a year"]);
    fails(dir.path(), &delegate("365d"), &["no node runs"]);
}

#[test]
fn a_target_that_is_none_is_taken_apart() {
    let dir = tempfile::tempdir().unwrap();
    for (target, words) in [
        ("tcp://localhost:8080", &["localhost is a name", "tcp://127.0.0.1:8080"][..]),
        ("udp://dns.example:53", &["dns.example is a name"]),
        ("tcp://127.0.0.1:99999", &["port 99999 is above 65535"]),
        ("https://127.0.0.1:443", &["tcp://", "http://", "udp://"]),
        ("tcp://127.0.0.1", &["an address and a port"]),
    ] {
        wrong_usage(dir.path(), &["service", "publish", "a.local", "--to", target], words);
    }
}

#[test]
fn where_a_tunnel_listens_is_an_address_and_a_port() {
    let dir = tempfile::tempdir().unwrap();
    for wrong in ["19005", "localhost:19005", ":19005"] {
        let open = ["tunnel", "open", "a.local", "--listen", wrong];
        wrong_usage(dir.path(), &open, &["write an address and a port, as in 127.0.0.1:19005"]);
    }
}

#[test]
fn a_verb_without_its_group_is_found() {
    let dir = tempfile::tempdir().unwrap();
    wrong_usage(dir.path(), &["publish", "a.local"], &["'meshwise service publish'"]);
    wrong_usage(dir.path(), &["peers"], &["'peer'"]);
    wrong_usage(dir.path(), &["list"], &["'meshwise tunnel list'", "'meshwise peer list'"]);
}

#[test]
fn a_wrong_address_and_a_taken_port_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let listen = ["node", "--listen", "127.0.0.1:1"];
    fails_with(2, dir.path(), &listen, &["not a multiaddress", "/ip4/"]);
    fails_with(
        2,
        dir.path(),
        &["node", "--listen", "/ip4/127.0.0.1/tcp/0", "--bootstrap", "nonsense"],
        &["'nonsense' is not a multiaddress"],
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("/ip4/127.0.0.1/tcp/{}", taken.local_addr().unwrap().port());
    let words = [address.as_str(), "in use", "--listen"];
    fails(dir.path(), &["node", "--listen", &address], &words);
}

#[test]
fn a_foreign_or_damaged_database_is_named_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("meshwise.db");
    let garbage = b"this is no database, but somebody may want it".repeat(100);
    std::fs::write(&path, &garbage).unwrap();
    let node = ["node", "--listen", "/ip4/127.0.0.1/tcp/0"];
    fails(dir.path(), &node, &["meshwise.db", "move"]);
    fails(dir.path(), &["data", "stats"], &["meshwise.db"]);
    assert_eq!(std::fs::read(&path).unwrap(), garbage, "not touched");
}

#[test]
fn unknown_settings_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    std::fs::write(&path, "[routing]\nspeed = 9\n").unwrap();
    let output = run(dir.path(), &["node", "--config", path.to_str().unwrap()]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("c.toml line 2: unknown field `speed`"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    for (settings, words) in [
        ("[routing]\nmax_hops = 9\n", &["c.toml: ", "routing.max_hops"][..]),
        ("[network]\nlisten = ['127.0.0.1:1']\n", &["c.toml: network.listen", "'127.0.0.1:1'"]),
        ("[network]\nbootstrap = ['/dns/x/tcp/1']\n", &["c.toml: network.bootstrap", "/dns/x"]),
    ] {
        std::fs::write(&path, settings).unwrap();
        for command in ["node", "doctor"] {
            fails(dir.path(), &[command, "--config", path.to_str().unwrap()], words);
        }
    }
}

#[test]
fn models_and_data_are_shown_without_a_node() {
    let dir = tempfile::tempdir().unwrap();
    fails(dir.path(), &["model", "show"], &["no model is in use", "model train"]);
    fails(dir.path(), &["model", "show", "../x"], &["../x"]);
    fails(dir.path(), &["model", "promote", "../x"], &["../x"]);
    fails(dir.path(), &["model", "promote", "v1"], &["v1.json", "model list"]);
    fails(dir.path(), &["model", "promote", "challenger"], &["no challenger", "model train"]);
    fails(dir.path(), &["model", "rollback"], &["nothing to go back to", "moving average"]);
    fails(dir.path(), &["model", "compare"], &["no champion"]);
    assert!(!dir.path().join("models").exists(), "nothing is made by asking");
    fails(dir.path(), &["data", "stats"], &["meshwise.db"]);
    let list = run(dir.path(), &["model", "list", "--json"]);
    assert_eq!(String::from_utf8_lossy(&list.stdout).trim(), "[]");
    std::fs::create_dir(dir.path().join("models")).unwrap();
    std::fs::write(dir.path().join("models/v1.json"), "{\"format\":\"mesh").unwrap();
    let list = run(dir.path(), &["model", "list", "--json"]);
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert!(list[0]["error"].as_str().unwrap().contains("damaged"), "{list}");
    std::fs::write(dir.path().join("models/champion"), "v1\n").unwrap();
    let back = run(dir.path(), &["model", "rollback", "--json"]);
    let back: serde_json::Value = serde_json::from_slice(&back.stdout).unwrap();
    assert_eq!((&back["change"]["from"], &back["champion"]), (&"v1".into(), &().into()), "{back}");
    for (file, arguments) in [
        ("models/champion", &["model", "list"][..]),
        ("models/challenger", &["model", "promote", "challenger"]),
        ("models/history.json", &["model", "rollback"]),
    ] {
        std::fs::write(dir.path().join("models/champion"), "v1\n").unwrap();
        std::fs::write(dir.path().join(file), "{not a version").unwrap();
        fails(dir.path(), arguments, &[file]);
        std::fs::remove_file(dir.path().join(file)).unwrap();
    }
}

#[test]
fn data_stats_warns_of_misleading_measurements() {
    use meshwise::engine::measure::{ProbeKind, Sample};
    use meshwise::engine::types::{NodeId, Route, Timestamp};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("meshwise.db");
    let writer = meshwise::store::Writer::start(&path, Default::default()).unwrap();
    for index in 0..1_000_u64 {
        let sent_us = 1_700_000_000_000_000 + index * 1_000_000;
        writer.write(Sample::Probe {
            kind: ProbeKind::Route,
            route: Route::new([NodeId([1; 8]), NodeId([index as u8 % 6; 8].map(|b| b + 2))])
                .unwrap(),
            sent_at: Timestamp(sent_us),
            done_at: Timestamp(sent_us + 900_000),
            rtt_us: (index % 50 != 0).then_some(20_000 + index * index % 7 * 10_000),
        });
    }
    drop(writer);
    let stats = run(dir.path(), &["data", "stats", "--json"]);
    let stats: serde_json::Value = serde_json::from_slice(&stats.stdout).unwrap();
    let [warning] = &stats["warnings"].as_array().unwrap()[..] else { panic!("{stats}") };
    assert_eq!(warning["name"], "quantised");
    assert_eq!(
        (&warning["probes"], &warning["figures"]["step_ms"]),
        (&"route".into(), &10.0.into())
    );
    let text = String::from_utf8(run(dir.path(), &["data", "stats"]).stdout).unwrap();
    let at = |words: &str| text.find(words).unwrap_or_else(|| panic!("{words}: {text}"));
    assert!(at("warning: quantised, route probes") < at("no forecasts"), "{text}");
}

#[test]
fn a_sample_overwrites_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let full = dir.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("notes.txt"), "mine").unwrap();
    let (full, new) = (full.to_str().unwrap(), dir.path().join("new"));
    let new = new.to_str().unwrap();
    fails(dir.path(), &["data", "sample", "--out", full], &["not empty", "--force"]);
    fails(dir.path(), &["data", "sample", "--out", new, "--keep", full], &["new folder"]);
    let output = run(dir.path(), &["data", "sample", "--out", new, "--hours", "0"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(!std::path::Path::new(new).exists());
}

#[test]
fn a_model_of_xgboost_is_imported_and_shown_and_another_file_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/xgboost.json");
    let import = ["model", "import", file, "--version", "fleet-1", "--json"];
    let imported = run(dir.path(), &import);
    let told: serde_json::Value = serde_json::from_slice(&imported.stdout).unwrap();
    assert_eq!((told["version"].as_str(), told["rows"].as_u64()), (Some("fleet-1"), Some(0)));
    assert!(told["card"]["parameters"].as_str().unwrap().contains("not measured"), "{told}");
    let shown = run(dir.path(), &["model", "show", "fleet-1"]);
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(text.contains("XGBoost 3.2.0") && !text.contains("1970"), "{text}");
    let promote = ["the moving average decides", "'meshwise model promote VERSION'"];
    fails(dir.path(), &["model", "show"], &promote);
    fails(dir.path(), &["model", "import", "none.json"], &["none.json", "cannot read"]);
    let damaged = dir.path().join("x.json");
    std::fs::write(&damaged, "{\"learner\":").unwrap();
    fails(dir.path(), &["model", "import", damaged.to_str().unwrap()], &["damaged", "save_model"]);
    let wrong = run(dir.path(), &["model", "import", file, "--reference", "link-bandwidth"]);
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn who_decides_is_said_when_a_model_had_to_go() {
    let dir = tempfile::tempdir().unwrap();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/xgboost.json");
    run(dir.path(), &["model", "import", file, "--version", "fleet-1"]);
    run(dir.path(), &["model", "promote", "fleet-1"]);
    let listed = || String::from_utf8(run(dir.path(), &["model", "list"]).stdout).unwrap();
    let decides = || -> Vec<String> {
        let text = listed();
        let marked = text.lines().filter_map(|line| line.trim_start().strip_prefix("* "));
        marked.filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect()
    };
    assert_eq!(decides()[0], "fleet-1");
    assert!(listed().contains("'meshwise model compare'"), "what errors can be held against");
    run(dir.path(), &["model", "rollback"]);
    let gone = ["the moving average decides: 'fleet-1' was rolled back at 20", "by hand"];
    fails(dir.path(), &["model", "show"], &gone);
    fails(dir.path(), &["model", "rollback"], &["nothing to go back to: the moving average"]);
    assert_eq!(decides()[0], "moving-average");

    run(dir.path(), &["model", "promote", "fleet-1"]);
    let database = dir.path().join("meshwise.db");
    drop(meshwise::store::Writer::start(&database, Default::default()).unwrap());
    let wait = ["0 usable", "wait until 20 more were measured"];
    fails(dir.path(), &["model", "compare"], &wait);
}

#[test]
fn the_configuration_file_that_is_printed_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let printed = run(dir.path(), &["node", "--print-config"]);
    let text = String::from_utf8(printed.stdout).unwrap();
    let config = meshwise::config::Config::parse(&text, "printed").unwrap();
    assert_eq!(config, meshwise::config::Config::default());
}

#[test]
fn completions_are_printed_for_a_shell() {
    let dir = tempfile::tempdir().unwrap();
    let script = run(dir.path(), &["completions", "bash"]);
    assert!(script.status.success());
    assert!(String::from_utf8_lossy(&script.stdout).contains("meshwise"));
}
