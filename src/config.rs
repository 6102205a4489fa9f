//! One documented configuration tree. Every setting has a working default, unknown keys are
//! refused, and [`Config::template`] is the file that documents them all.

mod template;

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use documented::DocumentedFields;
use serde::{Deserialize, Serialize};

use crate::engine::overlay::{BootstrapPolicy, ServiceKind};
use crate::engine::route::explore::EXPLORE_MAX;
use crate::engine::route::{PathPolicy, ScoreWeights, SwitchingPolicy};
use crate::engine::types::MAX_ROUTE_HOPS;
use crate::engine::{DEGREE, Intervals};

/// Most routes that a tunnel uses at one time.
pub const PATHS_MAX: usize = 4;

/// A configuration that cannot be used. The message names the file or key and what to write.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {error}")]
    Read {
        /// Which file.
        path: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("the configuration {path} is wrong: {error}")]
    Parse {
        /// Which file.
        path: String,
        /// Where and what.
        error: Box<toml::de::Error>,
    },
    /// A value outside its range.
    #[error("the setting {key} is {value}, but must be {expected}")]
    Range {
        /// Which setting.
        key: &'static str,
        /// What it says.
        value: String,
        /// What it may say.
        expected: &'static str,
    },
}

/// All settings of a node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Who to talk to.
    pub network: NetworkConfig,
    /// How local programs enter the mesh.
    pub entry: EntryConfig,
    /// How routes are chosen.
    pub routing: RoutingConfig,
    /// What is passed on for others.
    pub relay: RelayConfig,
    /// How often to measure.
    pub probing: ProbingConfig,
    /// How to learn.
    pub learning: LearningConfig,
    /// How long to keep measurements.
    pub storage: StorageConfig,
    /// Link conditions for demonstrations; never on a normal node.
    pub emulation: EmulationConfig,
}

/// Who to talk to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// Multiaddresses to listen on.
    pub listen: Vec<String>,
    /// Multiaddresses of nodes to join through.
    pub bootstrap: Vec<String>,
    /// Find nodes on the local network by multicast DNS. Has no effect on a node that listens on
    /// loopback only.
    pub mdns: bool,
    /// Find ways around NAT: ask the gateway to map the ports, have members test which addresses can
    /// be reached, be reached over a member when none can, and do the same for other members. Has no
    /// effect on a node that listens on loopback only, unless links are emulated there.
    pub nat: bool,
    /// Links to other nodes that this one wants to have, 3 to 32; more while peers come and go. Better the
    /// same on all nodes of a network.
    pub degree: usize,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            listen: vec!["/ip4/0.0.0.0/tcp/4747".into(), "/ip4/0.0.0.0/udp/4747/quic-v1".into()],
            bootstrap: Vec::new(),
            mdns: true,
            nat: true,
            degree: DEGREE,
        }
    }
}

/// How local programs enter the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields)]
pub struct EntryConfig {
    /// Address and port of the SOCKS5 proxy; empty for none. Whoever can connect to it acts as this
    /// node.
    pub socks: String,
    /// Address and port at which `/metrics` is served by HTTP, for Prometheus; empty for none. Whoever
    /// can connect to it reads what this node counts, who its neighbours are, and which services it uses.
    pub metrics: String,
}

impl Default for EntryConfig {
    fn default() -> Self {
        Self { socks: "127.0.0.1:1080".into(), metrics: String::new() }
    }
}

/// How routes are chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields)]
pub struct RoutingConfig {
    /// Candidate routes for each destination, 1 to 32.
    pub candidates: usize,
    /// Longest candidate (links), 1 to 8. Where no route is that short, longer ones are taken, up to 8.
    pub max_hops: usize,
    /// Routes that a tunnel uses at one time, 1 to 4.
    pub paths: usize,
    /// Bandwidth that scores full marks (bytes/s), above 0.
    pub bandwidth_reference: f64,
    /// What a link is counted on to carry while it was never busy (bytes/s), above 0; of that, up to 80 %
    /// is promised to reservations, half of it to those from one neighbour.
    pub capacity_unknown: f64,
    /// Relative gain in score below which the current route stays, 0 to 1.
    pub switch_margin: f64,
    /// Shortest time between two voluntary changes (ms).
    pub hold_ms: u64,
}

impl Default for RoutingConfig {
    fn default() -> Self {
        let switching = SwitchingPolicy::default();
        let paths = PathPolicy::default();
        Self {
            candidates: paths.candidates,
            max_hops: paths.max_hops,
            paths: 1,
            bandwidth_reference: ScoreWeights::default().bandwidth_reference,
            capacity_unknown: paths.capacity_unknown,
            switch_margin: switching.margin,
            hold_ms: switching.hold.as_millis() as u64,
        }
    }
}

/// What is passed on for others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields)]
pub struct RelayConfig {
    /// Rate at which this node passes on what comes from one neighbour (bytes/s), 20000 or more; 0 is
    /// unlimited.
    pub rate: u64,
}

/// How often to measure and decide.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields)]
pub struct ProbingConfig {
    /// Between two probes of a link (ms), 20 or more.
    pub link_ms: u64,
    /// Between two probes of a route in use (ms), 20 or more.
    pub active_route_ms: u64,
    /// Between two probes of a route that might be used (ms), 20 or more.
    pub candidate_route_ms: u64,
    /// Between two decisions about a tunnel (ms), 20 or more.
    pub decide_ms: u64,
}

impl Default for ProbingConfig {
    fn default() -> Self {
        let intervals = Intervals::default();
        let ms = |duration: Duration| duration.as_millis() as u64;
        Self {
            link_ms: ms(intervals.link_probe),
            active_route_ms: ms(intervals.active_probe),
            candidate_route_ms: ms(intervals.candidate_probe),
            decide_ms: ms(intervals.decide),
        }
    }
}

/// How to learn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields)]
pub struct LearningConfig {
    /// Let a trained model decide. Off: the moving average does; measuring and training go on.
    pub predict: bool,
    /// Start with the model that is shipped with the program, when no model was ever chosen here.
    pub shipped_model: bool,
    /// Between two trainings (s); 0 switches scheduled training off, also that for other reasons.
    pub retrain_s: u64,
    /// Time after the start until the first scheduled training (s).
    pub first_train_s: u64,
    /// New answered route measurements that are a reason to train before the interval is over; 0
    /// for none. Between two trainings there is a pause of 10 minutes at least.
    pub retrain_rows: u64,
    /// Share of the decisions that stay on a route which try another one that is nearly as good, until the
    /// next decision, 0 to 0.1; 'model judge' needs such decisions. 0 for none.
    pub explore: f64,
}

impl Default for LearningConfig {
    fn default() -> Self {
        Self {
            predict: true,
            shipped_model: true,
            retrain_s: 3_600,
            first_train_s: 600,
            retrain_rows: 5_000,
            explore: PathPolicy::default().explore,
        }
    }
}

/// How long to keep measurements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields)]
pub struct StorageConfig {
    /// Oldest measurement kept (days), 1 or more.
    pub max_age_days: u32,
    /// Largest database (MB), 16 or more; the oldest measurements make room.
    pub max_mb: u32,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self { max_age_days: 30, max_mb: 1_024 }
    }
}

/// Link conditions emulated inside the link lanes, for demonstrations and tests on one machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields)]
pub struct EmulationConfig {
    /// Emulate. A normal node leaves this off, and then nothing below has an effect.
    pub enabled: bool,
    /// Peer ids that this node cannot reach and that cannot reach it, but over another member.
    pub unreachable: Vec<String>,
    /// Nobody can open a connection to this node, as behind a NAT.
    pub behind_nat: bool,
    /// Links exist only to the neighbours listed here, each with the conditions of the direction
    /// from this node. Connections with others carry control messages only.
    pub links: Vec<EmulatedLink>,
}

/// Conditions of one direction of one link.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmulatedLink {
    /// Node id of the neighbour (16 hexadecimal digits).
    pub neighbour: String,
    /// Delay (ms).
    pub delay_ms: f64,
    /// Largest deviation from it (ms), uniform on both sides.
    pub jitter_ms: f64,
    /// Share of datagrams lost, 0 to 1.
    pub loss: f64,
    /// Share of the tunnels' packets lost and of nothing else, 0 to 1: a relay that is not honest.
    pub data_loss: f64,
    /// Share of the tunnels' packets in which a bit is changed, 0 to 1.
    pub data_damage: f64,
    /// Rate (bytes/s); 0 is unlimited.
    pub rate: f64,
    /// Height of a slow swing of the delay (ms), as of a path that is busy at times.
    pub wave_ms: f64,
    /// Period of that swing (s).
    pub wave_period_s: f64,
}

impl EmulatedLink {
    /// Checks every range.
    ///
    /// # Errors
    /// [`ConfigError::Range`].
    pub fn check(&self) -> Result<(), ConfigError> {
        let times = [self.delay_ms, self.jitter_ms, self.wave_ms];
        let shares = [self.loss, self.data_loss, self.data_damage];
        let good = times.iter().all(|ms| (0.0..=60_000.0).contains(ms))
            && (0.0..=86_400.0).contains(&self.wave_period_s)
            && shares.iter().all(|share| (0.0..=1.0).contains(share))
            && (self.rate == 0.0 || (1_000.0..=1e12).contains(&self.rate));
        if good {
            return Ok(());
        }
        Err(ConfigError::Range {
            key: "emulation.links",
            value: format!("{self:?}"),
            expected: "times of 0 to 60000 ms, a period of 0 to 86400 s, loss and damage of 0 \
                       to 1, and a rate of 0 or 1000 to 1e12 bytes/s",
        })
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`], naming the file and the key.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::Read { path: path.display().to_string(), error })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Reads and checks text; `path` is for the message.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn parse(text: &str, path: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            error: Box::new(error),
        })?;
        config.check()?;
        Ok(config)
    }

    /// Checks every range.
    ///
    /// # Errors
    /// [`ConfigError::Range`], naming the first setting that is out of its range.
    pub fn check(&self) -> Result<(), ConfigError> {
        let check = |key, good: bool, value: String, expected| {
            if good { Ok(()) } else { Err(ConfigError::Range { key, value, expected }) }
        };
        let degree = self.network.degree;
        check("network.degree", (3..=32).contains(&degree), degree.to_string(), "3 to 32")?;
        let routing = &self.routing;
        let text = |value: &dyn ToString| value.to_string();
        let within = |range: std::ops::RangeInclusive<usize>, value| range.contains(&value);
        check(
            "routing.candidates",
            within(1..=32, routing.candidates),
            text(&routing.candidates),
            "1 to 32",
        )?;
        check(
            "routing.max_hops",
            within(1..=MAX_ROUTE_HOPS, routing.max_hops),
            text(&routing.max_hops),
            "1 to 8",
        )?;
        check(
            "routing.paths",
            within(1..=PATHS_MAX, routing.paths),
            text(&routing.paths),
            "1 to 4",
        )?;
        let rate = self.relay.rate;
        let expected = "0 or a number of bytes/s of 20000 or more";
        check("relay.rate", rate == 0 || rate >= 20_000, text(&rate), expected)?;
        let EntryConfig { socks, metrics } = &self.entry;
        for (key, address, expected) in [
            ("entry.socks", socks, "an address and a port as in 127.0.0.1:1080, or empty"),
            ("entry.metrics", metrics, "an address and a port as in 127.0.0.1:9464, or empty"),
        ] {
            let good = address.is_empty() || address.parse::<SocketAddr>().is_ok();
            check(key, good, format!("'{address}'"), expected)?;
        }
        check(
            "routing.bandwidth_reference",
            routing.bandwidth_reference.is_finite() && routing.bandwidth_reference > 0.0,
            text(&routing.bandwidth_reference),
            "a number of bytes/s above 0",
        )?;
        check(
            "routing.capacity_unknown",
            routing.capacity_unknown.is_finite() && routing.capacity_unknown > 0.0,
            text(&routing.capacity_unknown),
            "a number of bytes/s above 0",
        )?;
        check(
            "routing.switch_margin",
            (0.0..=1.0).contains(&routing.switch_margin),
            text(&routing.switch_margin),
            "0 to 1",
        )?;
        let probing = &self.probing;
        for (key, value) in [
            ("probing.link_ms", probing.link_ms),
            ("probing.active_route_ms", probing.active_route_ms),
            ("probing.candidate_route_ms", probing.candidate_route_ms),
            ("probing.decide_ms", probing.decide_ms),
        ] {
            check(key, (20..=3_600_000).contains(&value), text(&value), "20 to 3600000")?;
        }
        let explore = self.learning.explore;
        check(
            "learning.explore",
            (0.0..=EXPLORE_MAX).contains(&explore),
            text(&explore),
            "0 to 0.1",
        )?;
        let storage = &self.storage;
        let days = storage.max_age_days;
        check("storage.max_age_days", days >= 1, text(&days), "1 or more")?;
        check("storage.max_mb", storage.max_mb >= 16, text(&storage.max_mb), "16 or more")?;
        self.emulation.links.iter().try_for_each(EmulatedLink::check)
    }

    /// How to join, for the engine.
    pub fn bootstrap_policy(&self) -> BootstrapPolicy {
        BootstrapPolicy { addresses: self.network.bootstrap.clone(), ..BootstrapPolicy::default() }
    }

    /// How routes are chosen, for the engine.
    pub fn path_policy(&self) -> PathPolicy {
        let routing = &self.routing;
        PathPolicy {
            candidates: routing.candidates,
            max_hops: routing.max_hops,
            weights: ScoreWeights {
                bandwidth_reference: routing.bandwidth_reference,
                ..ScoreWeights::default()
            },
            capacity_unknown: routing.capacity_unknown,
            switching: SwitchingPolicy {
                margin: routing.switch_margin,
                hold: Duration::from_millis(routing.hold_ms),
            },
            explore: self.learning.explore,
        }
    }

    /// How often to measure, for the engine.
    pub fn intervals(&self) -> Intervals {
        let probing = &self.probing;
        Intervals {
            link_probe: Duration::from_millis(probing.link_ms),
            active_probe: Duration::from_millis(probing.active_route_ms),
            candidate_probe: Duration::from_millis(probing.candidate_route_ms),
            decide: Duration::from_millis(probing.decide_ms),
        }
    }

    /// All settings with their defaults and what each is, as a file.
    pub fn template() -> String {
        template::template()
    }
}

/// Parses the target of a service: `tcp://HOST:PORT`, `http://HOST:PORT` or `udp://HOST:PORT`.
///
/// # Errors
/// One line that says what is expected.
pub fn parse_target(text: &str) -> Result<(ServiceKind, SocketAddr), String> {
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let kinds = [ServiceKind::Tcp, ServiceKind::Http, ServiceKind::Udp];
    let kind = kinds.into_iter().find(|kind| kind.as_str() == scheme);
    let kind = kind.ok_or_else(|| {
        format!("'{text}' is not a target; write tcp://127.0.0.1:8080 or udp://127.0.0.1:8080")
    })?;
    let address = rest.trim_end_matches('/').parse().map_err(|_| {
        format!("'{text}' does not end in an address and a port; write {scheme}://127.0.0.1:8080")
    })?;
    Ok((kind, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_proxy_is_a_setting() {
        assert!(Config::parse("[entry]\nsocks = ''", "no proxy").is_ok());
    }

    #[test]
    fn unknown_keys_and_values_out_of_range_are_named() {
        for (text, word) in [
            ("[network]\nlisten_on = 1", "listen_on"),
            ("[routing]\nmax_hops = 9", "routing.max_hops"),
            ("[routing]\nswitch_margin = 2.0", "routing.switch_margin"),
            ("[routing]\npaths = 5", "routing.paths"),
            ("[relay]\nrate = 100", "relay.rate"),
            ("[entry]\nsocks = 'localhost:1080'", "entry.socks"),
            ("[probing]\nlink_ms = 1", "probing.link_ms"),
            ("[learning]\nexplore = 0.2", "learning.explore"),
            ("[[emulation.links]]\nloss = 2.0", "emulation.links"),
            ("nonsense", "nonsense"),
        ] {
            let error = Config::parse(text, "f.toml").unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn targets_are_addresses_with_a_scheme() {
        assert!(parse_target("tcp://127.0.0.1:80").is_ok());
        assert_eq!(parse_target("http://127.0.0.1:80/").unwrap().0, ServiceKind::Http);
        assert_eq!(parse_target("udp://[::1]:53").unwrap().0, ServiceKind::Udp);
        for wrong in ["127.0.0.1:80", "ftp://127.0.0.1:80", "tcp://localhost", "tcp://:1"] {
            assert!(parse_target(wrong).is_err(), "{wrong}");
        }
    }
}
