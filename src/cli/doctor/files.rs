//! What can be checked without a node: the data directory, and what the settings name.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use super::Check;
use crate::config::Config;
use crate::engine::overlay::NotMember;
use crate::engine::types::Timestamp;
use crate::learn::ModelRegistry;
use crate::node::network::{self, Network};
use crate::node::{Clock, DATABASE, IDENTITY_FILE, Identity, MODELS};
use crate::store::{Reader, StoreError};

/// Free disk space below which a node is in trouble (bytes): a busy minute of measurements and the
/// database's log.
const FREE_BYTES_MIN: u64 = 64 << 20;
/// How long a bootstrap address may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether the node can write where it keeps its things.
pub(super) fn data_dir(dir: &Path) -> Check {
    const WHAT: &str = "data directory";
    if !dir.exists() {
        return Check::note(WHAT, format!("{} is not there yet; the node makes it", dir.display()));
    }
    match tempfile::tempfile_in(dir) {
        Ok(_) => Check::ok(WHAT, format!("{} can be written", dir.display())),
        Err(error) => Check::broken(
            WHAT,
            format!("{} cannot be written: {error}", dir.display()),
            "run as the user that owns it, or choose another with --data-dir",
        ),
    }
}

/// Whether there is room for what the node may keep.
pub(super) fn disk(dir: &Path, config: &Config) -> Check {
    const WHAT: &str = "disk space";
    let Some(there) = dir.ancestors().find(|part| part.exists()) else {
        return Check::note(WHAT, "unknown: no part of the data directory's path is there");
    };
    let free = match rustix::fs::statvfs(there) {
        Ok(found) => found.f_bavail.saturating_mul(found.f_frsize),
        Err(error) => return Check::note(WHAT, format!("unknown: {error}")),
    };
    let used = std::fs::metadata(dir.join(DATABASE)).map_or(0, |file| file.len());
    let wanted = (u64::from(config.storage.max_mb) * 1_000_000).saturating_sub(used);
    let found = format!("{} free", super::output::bytes(free));
    if free < FREE_BYTES_MIN {
        Check::broken(WHAT, found, "make room: nothing is measured or kept without")
    } else if free < wanted {
        let wanted = super::output::bytes(wanted);
        let advice =
            format!("make room, or lower storage.max_mb: measurements may take {wanted} more");
        Check::warning(WHAT, found, advice)
    } else {
        Check::ok(WHAT, found)
    }
}

/// Whether the node belongs to its network, and for how long.
pub(super) fn membership(dir: &Path) -> Check {
    const WHAT: &str = "membership";
    let network = match Network::load(dir) {
        Ok(Some(network)) => network,
        Ok(None) => {
            return Check::note(WHAT, "in no network yet: a node founds its own at its start");
        }
        Err(error) => return Check::broken(WHAT, error.to_string(), "see the message"),
    };
    if !dir.join(IDENTITY_FILE).exists() {
        return Check::broken(
            WHAT,
            format!("there is a membership of '{}', but no identity", network.state.name),
            format!("restore {IDENTITY_FILE}, or move {} away", network::STATE_FILE),
        );
    }
    let key = match Identity::load_or_create(dir) {
        Ok(identity) => identity.public_key(),
        Err(error) => return Check::broken(WHAT, error.to_string(), "see the message"),
    };
    let (now, state) = (Clock::default().now(), &network.state);
    let credential = &state.credential;
    let issues = if network.root.is_some() { ", and lets others in" } else { "" };
    let until = super::output::time(credential.expires_at.as_micros());
    let found = format!("in '{}' until {until}{issues}", state.name);
    match state.membership().roster().check(&key, credential, now) {
        Err(NotMember::Revoked) => Check::broken(
            WHAT,
            format!("the root of '{}' has revoked this node, for good", state.name),
            "ask why; with a new identity (another --data-dir) and a new invitation it could come back",
        ),
        Err(why) => Check::broken(
            WHAT,
            format!("not in '{}': {why}", state.name),
            "compare the clock with another; then ask the network's issuer for a new invitation",
        ),
        Ok(()) if is_late(credential.issued_at, credential.expires_at, now) => Check::warning(
            WHAT,
            found,
            "connect with the network's issuer, which renews it by itself",
        ),
        Ok(()) => Check::ok(WHAT, found),
    }
}

/// Whether the last sixth of a time has begun: renewal, due in the last third, has not worked.
fn is_late(from: Timestamp, until: Timestamp, now: Timestamp) -> bool {
    until.since(now) < until.since(from) / 6
}

/// What it means that nobody answers on the socket.
pub(super) fn no_node(dir: &Path) -> Check {
    const WHAT: &str = "node";
    let lock = std::fs::File::open(dir.join("lock"));
    let held = lock
        .is_ok_and(|file| matches!(file.try_lock_shared(), Err(std::fs::TryLockError::WouldBlock)));
    match held {
        true => Check::broken(
            WHAT,
            "a node has the data directory, but does not answer on its control socket",
            "wait if it has just been started, else stop it and start it again",
        ),
        false => Check::note(WHAT, "none runs on this data directory: only files were checked"),
    }
}

/// Whether the database is sound.
pub(super) fn store(dir: &Path) -> Check {
    const WHAT: &str = "database";
    let opened = Reader::open(dir.join(DATABASE));
    match opened.and_then(|reader| Ok((reader.counts()?, reader.peers()?))) {
        Ok((counts, peers)) => {
            let rows: u64 = counts.tables.iter().map(|table| table.rows).sum();
            Check::ok(WHAT, format!("{rows} measurements, {} peers of earlier runs", peers.len()))
        }
        Err(error @ (StoreError::Missing(_) | StoreError::Older { .. })) => {
            Check::note(WHAT, error.to_string())
        }
        Err(error) => Check::broken(WHAT, error.to_string(), "see the message"),
    }
}

/// Whether the model that would decide can be read.
pub(super) fn models(dir: &Path) -> Check {
    const WHAT: &str = "model";
    match ModelRegistry::new(dir.join(MODELS)).champion() {
        Ok(Some(model)) => Check::ok(WHAT, format!("{} decides", model.version)),
        Ok(None) => Check::note(WHAT, "none yet: the node starts with the shipped one"),
        Err(error) => Check::warning(
            WHAT,
            error.to_string(),
            "the moving average decides; see 'meshwise model list' and 'meshwise model rollback'",
        ),
    }
}

/// Whether the ports that the node wants are free.
pub(super) fn listening(config: &Config) -> Vec<Check> {
    const WHAT: &str = "listen address";
    let check = |address: &String| match tcp(address) {
        None => Check::note(WHAT, format!("{address} is tried by a node only")),
        Some(socket) => match TcpListener::bind(socket) {
            Ok(_) => Check::ok(WHAT, format!("{address} is free")),
            Err(error) => Check::broken(
                WHAT,
                format!("{address} cannot be used: {error}"),
                "stop the program that has it, or choose another with --listen",
            ),
        },
    };
    config.network.listen.iter().map(check).collect()
}

/// Whether somebody answers at the bootstrap addresses.
pub(super) fn bootstrap(config: &Config) -> Vec<Check> {
    const WHAT: &str = "bootstrap address";
    let check = |address: &String| match tcp(address) {
        None => Check::note(WHAT, format!("{address} is tried by a node only")),
        Some(socket) => match TcpStream::connect_timeout(&socket, CONNECT_TIMEOUT) {
            Ok(_) => Check::ok(WHAT, format!("{address} takes connections")),
            Err(error) => Check::warning(
                WHAT,
                format!("{address} does not answer: {error}"),
                "see that the node there runs, and that no firewall is in between",
            ),
        },
    };
    let addresses = &config.network.bootstrap;
    std::thread::scope(|scope| {
        let tries: Vec<_> = addresses.iter().map(|it| scope.spawn(move || check(it))).collect();
        tries.into_iter().filter_map(|tried| tried.join().ok()).collect()
    })
}

/// The socket address of `/ip4/IP/tcp/PORT` or `/ip6/IP/tcp/PORT`, with or without a peer.
fn tcp(multiaddress: &str) -> Option<SocketAddr> {
    let mut parts = multiaddress.strip_prefix('/')?.split('/');
    let (family, ip, transport, port) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let plain = matches!(family, "ip4" | "ip6") && transport == "tcp";
    let plain = plain && matches!(parts.next(), None | Some("p2p")) && parts.count() <= 1;
    let ip: IpAddr = plain.then(|| ip.parse().ok()).flatten()?;
    Some((ip, port.parse().ok()?).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Verdict;

    #[test]
    fn plain_tcp_addresses_are_understood() {
        let socket = |text: &str| text.parse::<SocketAddr>().ok();
        assert_eq!(tcp("/ip4/10.0.0.1/tcp/4747"), socket("10.0.0.1:4747"));
        assert_eq!(tcp("/ip6/::1/tcp/1/p2p/12D3"), socket("[::1]:1"));
        for other in
            ["/ip4/10.0.0.1/udp/4747/quic-v1", "/dns4/a/tcp/1", "10.0.0.1:1", "/ip4/a/tcp/1"]
        {
            assert_eq!(tcp(other), None, "{other}");
        }
        assert_eq!(tcp("/ip4/10.0.0.1/tcp/1/p2p/12D3/p2p-circuit/p2p/12D4"), None);
    }

    #[test]
    fn what_is_in_use_or_gone_is_found() {
        let here = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = here.local_addr().unwrap().port();
        let mut config = Config::default();
        config.network.listen = vec![format!("/ip4/127.0.0.1/tcp/{port}")];
        config.network.bootstrap = config.network.listen.clone();
        assert_eq!(listening(&config)[0].verdict, Verdict::Broken);
        assert_eq!(bootstrap(&config)[0].verdict, Verdict::Ok);
        drop(here);
        assert_eq!(listening(&config)[0].verdict, Verdict::Ok);
        assert_eq!(bootstrap(&config)[0].verdict, Verdict::Warning);
    }

    #[test]
    fn a_membership_that_is_over_is_broken_and_one_that_ends_is_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(membership(dir.path()).verdict, Verdict::Note);
        let (issuer, identity) = (Identity::generate(), Identity::generate());
        let now = Clock::default().now();
        let days_ago = |days: u64| Timestamp(now.as_micros() - days * 86_400_000_000);
        let network = Network::found("home", &issuer.public_key(), days_ago(200));
        for (days, expected) in [(0, Verdict::Ok), (80, Verdict::Warning), (100, Verdict::Broken)] {
            let dir = tempfile::tempdir().unwrap();
            let admitted = network.admit(&identity.public_key(), days_ago(days)).unwrap();
            admitted.save_new(dir.path()).unwrap();
            assert_eq!(membership(dir.path()).verdict, Verdict::Broken, "no identity");
            identity.save_new(dir.path()).unwrap();
            let check = membership(dir.path());
            assert_eq!(check.verdict, expected, "{days} days: {}", check.found);
        }
    }
}
