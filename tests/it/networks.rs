//! Who is let in and who is put out, as a person meets it: the commands, their errors, and what is
//! kept over a restart.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use meshwise::api::types::{Certified, Invited, Members, Network, Peer, Status};
use meshwise::config::Config;
use meshwise::engine::event::Input;
use meshwise::engine::overlay::issuer::NotLetIn;
use meshwise::engine::overlay::token::{Invite, Token};
use meshwise::engine::overlay::wire::{self, JoinRequest};
use meshwise::engine::types::Timestamp;
use meshwise::node::network::Network as Files;
use meshwise::node::{Clock, Identity, Node, NodeOptions, peer_id_text};

use crate::processes::Process;
use crate::support::{config, eventually};

/// Runs a command with this text on standard input; exit code, standard output, standard error.
fn run(data_dir: &Path, arguments: &[&str], input: &str) -> (i32, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_meshwise"))
        .args(arguments)
        .arg("--data-dir")
        .arg(data_dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may have ended without reading.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// Fails with exit code 1, or 2 for a value that cannot be, and one line that holds all these words;
/// nothing on standard output.
fn fails(data_dir: &Path, arguments: &[&str], words: &[&str]) {
    let (code, out, error) = run(data_dir, arguments, "");
    assert!(matches!((code, out.as_str()), (1 | 2, "")), "{arguments:?}: {code}: {error}");
    assert_eq!(error.lines().count(), 1, "one line: {error}");
    for word in words {
        assert!(error.contains(word), "{arguments:?} does not say '{word}': {error}");
    }
}

/// Succeeds; its JSON.
fn json<T: serde::de::DeserializeOwned>(data_dir: &Path, arguments: &[&str], input: &str) -> T {
    let (code, out, error) = run(data_dir, &[arguments, &["--json"]].concat(), input);
    assert_eq!(code, 0, "{arguments:?}: {error}");
    serde_json::from_str(&out).unwrap()
}

/// A node on a port of its own, which it has after a restart too.
fn on_one_port() -> Config {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut config = config(vec![]);
    config.network.listen = vec![format!("/ip4/127.0.0.1/tcp/{port}")];
    config
}

#[test]
fn a_network_is_founded_once_and_shown_without_a_node() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = &dir.path().join("new");
    fails(data_dir, &["network", "show"], &["no network", "network create", "network join"]);
    fails(data_dir, &["network", "create", "--name", "My Home"], &["My Home", "lower-case"]);
    assert!(!data_dir.exists(), "nothing is made by what fails");
    let made: serde_json::Value = json(data_dir, &["network", "create", "--name", "home"], "");
    let shown: Network = json(data_dir, &["network", "show"], "");
    assert_eq!((shown.name.as_str(), shown.holds_root_key), ("home", true));
    assert_eq!(made["root"], shown.root);
    let founded = ["'home'", "--data-dir", "root.key"];
    fails(data_dir, &["network", "create", "--name", "other"], &founded);
    let (code, text, _) = run(data_dir, &["network", "show"], "");
    assert!(code == 0 && text.contains(made["peer_id"].as_str().unwrap()), "{text}");
}

#[test]
fn tokens_that_do_not_let_in_say_why_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = &dir.path().join("new");
    fails(data_dir, &["network", "join", "hello"], &["neither an invitation nor a certificate"]);
    let past = Invite {
        name: "home".into(),
        root: Identity::generate().public_key(),
        issuer: Identity::generate().public_key(),
        addresses: vec!["/ip4/127.0.0.1/tcp/1".into()],
        secret: [1; 16],
        expires_at: Timestamp(1),
    };
    let token = Token::Invite(past).to_string();
    fails(data_dir, &["network", "join", &token[..token.len() - 4]], &["damaged", "copy all"]);
    fails(data_dir, &["network", "join", &token], &["expired", "new one"]);
    fails(data_dir, &["node", "--join", "hello"], &["neither an invitation"]);
    let founder = Identity::generate();
    let now = Clock::default().now();
    let network = Files::found("home", &founder.public_key(), now);
    let key = Identity::generate().public_key();
    let certificate = meshwise::engine::overlay::token::Certificate {
        name: "home".into(),
        root: network.state.root,
        issuer: network.state.issuer,
        key,
        credential: network.admit(&key, now).unwrap().state.credential,
    };
    let token = Token::Certificate(certificate).to_string();
    fails(data_dir, &["network", "join", &token], &[&peer_id_text(&key), "peer id"]);
    fails(data_dir, &["network", "show"], &["no network"]);
    for arguments in [
        &["network", "invite", "--uses", "0"][..],
        &["network", "invite", "--uses", "1001"],
        &["network", "invite", "--expires", "31days"],
        &["network", "invite", "--expires", "0s"],
        &["network", "invite", "--expires", "soon"],
        &["network", "join"],
    ] {
        assert_eq!(run(data_dir, arguments, "").0, 2, "{arguments:?}");
    }
}

#[test]
fn what_cannot_start_founds_and_joins_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("node");
    fails(&dir, &["node", "--listen", "/ip4/127.0.0.1/tpc/0"], &["/tpc/", "multiaddress"]);
    fails(&dir, &["node", "--join", "-"], &["no token on standard input", "network invite"]);
    assert!(!dir.exists(), "nothing was written");
    let (code, _, said) = run(&dir, &["network", "create", "--name", "home"], "");
    let hint = format!("meshwise node --data-dir {}", dir.display());
    assert!(code == 0 && said.contains(&hint), "the next command is about the same node: {said}");
}

#[test]
fn the_holder_of_the_root_key_invites_certifies_grants_and_revokes() {
    let folder = tempfile::tempdir().unwrap();
    let (first_dir, second_dir) = (folder.path().join("first"), folder.path().join("second"));
    let config = config(vec![]);
    let first = Process::launch(&first_dir, &config, &[]);
    let status = first.status();
    assert_eq!((status.network.name.as_str(), status.network.holds_root_key), ("default", true));
    let busy = ["another node runs", "--data-dir"];
    fails(&first_dir, &["network", "create", "--name", "home"], &busy);

    let (code, token, said) = run(&first_dir, &["network", "invite", "--uses", "2"], "");
    assert_eq!(code, 0, "{said}");
    // What is read from a pipe is not shown beside it.
    assert!(said.contains("meshwise node --join -") && !said.contains(token.trim()), "{said}");
    assert!(said.contains("2 nodes") && said.contains("loopback only"), "{said}");
    let Token::Invite(invite) = token.parse().unwrap() else { panic!("{token}") };
    assert_eq!(peer_id_text(&invite.issuer), status.peer_id);
    let listening = status.listening[0].split("/p2p/").next().unwrap();
    assert_eq!(invite.addresses, [listening]);
    let with_router = ["network", "invite", "--address", "/ip4/203.0.113.5/tcp/4747"];
    let invited: Invited = first.ask(&with_router).unwrap();
    assert_eq!(invited.addresses, ["/ip4/203.0.113.5/tcp/4747", listening]);
    fails(&first_dir, &["network", "invite", "--address", "home:4747"], &["home:4747", "/ip4/"]);

    let second = Identity::generate();
    std::fs::create_dir(&second_dir).unwrap();
    second.save_new(&second_dir).unwrap();
    let (second_id, peer_id) = (second.node_id().to_string(), peer_id_text(&second.public_key()));
    fails(&first_dir, &["network", "certify", &second_id], &["not a peer id", "12D3KooW"]);
    fails(&first_dir, &["network", "revoke", &second_id], &["not known here", "peer id"]);
    let certified: Certified = first.ask(&["network", "certify", &peer_id]).unwrap();
    assert_eq!(certified.node, second_id);
    let joined: serde_json::Value =
        json(&second_dir, &["network", "join", "-"], &format!("{}\n", certified.token));
    assert_eq!((&joined["network"], &joined["already"]), (&"default".into(), &false.into()));
    let shown: Network = json(&second_dir, &["network", "show"], "");
    assert_eq!((shown.root, shown.holds_root_key), (status.network.root, false));
    let belongs = ["'default'", "--data-dir", "network.state"];
    fails(&second_dir, &["network", "create"], &belongs);

    let other = Process::launch(&second_dir, &config, &["--join", &certified.token]);
    let seen: Members = other.ask_until(&["network", "members"], |_| true);
    let this: Vec<_> = seen.members.iter().filter(|member| member.this).collect();
    assert!(!seen.complete && this.len() == 1 && this[0].peer_id == peer_id, "{seen:?}");
    fails(&second_dir, &["network", "invite"], &["root key", "where the network was created"]);
    assert!(other.stop());

    let name = ["network", "grant", "files.local", &second_id];
    first.ask::<serde_json::Value>(&name).unwrap();
    let myself = status.node.as_str();
    fails(&first_dir, &["network", "revoke", myself], &["cannot revoke itself"]);
    first.ask::<serde_json::Value>(&["network", "revoke", &second_id]).unwrap();
    let is_out = |first: &Process| {
        let members: Members = first.ask_until(&["network", "members"], |_| true);
        assert!(members.complete && members.members.len() == 2, "{members:?}");
        let second = members.members.iter().find(|member| member.node == second_id).unwrap();
        assert!(second.revoked && second.since_us.is_some(), "{members:?}");
        fails(&first_dir, &["network", "certify", &peer_id], &["revoked", "final"]);
    };
    is_out(&first);
    assert!(first.stop());
    let first = Process::launch(&first_dir, &config, &[]);
    is_out(&first);
    assert!(first.stop());
    let kept = Files::load(&first_dir).unwrap().unwrap().state;
    assert_eq!((kept.grants.len(), kept.revocations.len()), (1, 1));
    assert_eq!(kept.ledger.invitations.len(), 2);
}

/// Hands a node what a stranger who asks to be let in would send.
async fn redeem(node: &Node, invite: &Invite, stranger: &Identity) {
    let bytes = wire::encode(&JoinRequest::Redeem(invite.secret));
    let from = stranger.public_key();
    let ask = move |view: &mut meshwise::node::View<'_>| {
        let token = u64::MAX;
        view.engine.handle(view.now, Input::JoinAsked { token, from, bytes });
    };
    node.handle().inspect(ask).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invitation_that_was_used_up_stays_used_up_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let options =
        NodeOptions { config: config(vec![]), data_dir: dir.path().to_owned(), trainer: None };
    let node = Node::start(options.clone()).await.unwrap();
    let hour = Duration::from_secs(3_600);
    let invite = node.handle().invite(1, hour, vec![]).await.unwrap();
    let (first, second) = (Identity::generate(), Identity::generate());
    redeem(&node, &invite, &first).await;
    let key = first.public_key();
    eventually("it is kept who was let in", async || {
        let kept = Files::load(dir.path()).unwrap().unwrap();
        kept.state.ledger.issued.contains_key(&key)
    })
    .await;
    node.stop().await;
    let node = Node::start(options).await.unwrap();
    let issuer = node.handle().inspect(|view| view.engine.issuer().unwrap().clone()).await;
    let (mut issuer, now) = (issuer.unwrap(), Clock::default().now());
    let refused = issuer.redeem(&invite.secret, &second.public_key(), now);
    assert_eq!(refused, Err(NotLetIn::Unknown));
    assert!(issuer.redeem(&invite.secret, &key, now).is_ok(), "whom it let in may ask again");
    node.stop().await;
}

#[test]
fn a_second_machine_joins_by_a_token_and_is_put_out_again() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let settings = on_one_port();
    json::<serde_json::Value>(&dir("first"), &["network", "create", "--name", "home"], "");
    let first = Process::launch(&dir("first"), &settings, &[]);
    let invited: Invited = first.ask_until(&["network", "invite"], |_| true);
    // A node that has founded its own network before.
    let alone = Process::launch(&dir("second"), &config(vec![]), &[]);
    assert_eq!(alone.status().network.name, "default");
    assert!(alone.stop());
    let second = Process::launch(&dir("second"), &config(vec![]), &["--join", &invited.token]);
    second.ask_until(&["status"], |status: &Status| {
        status.joined && status.network.name == "home" && status.links_up == 1
    });
    let second_id = second.status().node;
    first.ask_until(&["network", "members"], |members: &Members| {
        members.members.iter().any(|member| member.node == second_id && member.connected)
    });
    fails(&dir("third"), &["network", "join", &invited.token], &["used up", "new one"]);
    assert!(first.stop());
    let first = Process::launch(&dir("first"), &settings, &[]);
    first.ask_until(&["status"], |status: &Status| status.links_up == 1);
    fails(&dir("third"), &["network", "join", &invited.token], &["used up", "new one"]);

    assert!(second.stop());
    let second = Process::launch(&dir("second"), &config(vec![]), &["--join", &invited.token]);
    second.ask_until(&["status"], |status: &Status| status.links_up == 1);
    let other: Invited = first.ask(&["network", "invite"]).unwrap();
    assert!(first.stop());
    fails(&dir("third"), &["network", "join", &other.token], &["/tcp/"]);
    let first = Process::launch(&dir("first"), &settings, &[]);
    first.status();
    json::<serde_json::Value>(&dir("third"), &["network", "join", "-"], &other.token);
    let third = Process::launch(&dir("third"), &config(vec![]), &[]);
    third.ask_until(&["status"], |status: &Status| status.links_up == 2);

    first.ask::<serde_json::Value>(&["network", "revoke", &second_id]).unwrap();
    for process in [&first, &third] {
        process.ask_until(&["peer", "list"], |peers: &Vec<Peer>| {
            peers.iter().all(|peer| peer.node != second_id)
        });
    }
    second.ask_until(&["peer", "list"], |peers: &Vec<Peer>| peers.is_empty());
    // Nobody lets it in any more, but it is shown why.
    second.ask_until(&["status"], |status: &Status| status.network.revoked);
    let (_, said, _) = run(&dir("second"), &["status"], "");
    assert!(said.contains("REVOKED"), "{said}");
    let (code, said, _) = run(&dir("second"), &["doctor"], "");
    assert!(code == 1 && said.contains("has revoked this node"), "{code}: {said}");
    for process in [first, second, third] {
        assert!(process.stop(), "a clean end");
    }
}
