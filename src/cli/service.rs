//! `meshwise service`

use std::time::Duration;

use super::output::WrongUsage;
use super::{Context, output};
use crate::api::types::{
    DELEGATION_S_MAX, Delegate, Delegated, Publish, Published, Resolved, Service, Trust, Trusted,
};
use crate::config::parse_target;
use crate::engine::measure::{HealthCheck, HealthPolicy};
use crate::engine::overlay::{Objective, ServiceKind};
use crate::engine::types::ServiceName;

/// Publish, find and withdraw services.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Offer a local TCP or UDP service to the mesh under a name. Of a name that this node publishes
    /// already, what is not said stays as it was.
    Publish {
        /// The name, for example byronwade.local.
        name: ServiceName,
        /// Where its connections go: tcp://, http:// or udp:// and an address, for example
        /// tcp://127.0.0.1:8080. Needed for a name that this node does not publish yet.
        #[arg(long, value_name = "TARGET", value_parser = target)]
        to: Option<String>,
        /// Let only this node connect (node id or peer id); may be given several times, or `all` once.
        #[arg(long, value_name = "NODE")]
        allow: Vec<String>,
        /// Time to live of each record (s); it is renewed after a third of it [default: 600].
        #[arg(long, value_parser = clap::value_parser!(u32).range(3..=86_400))]
        ttl: Option<u32>,
        /// What it wants from its routes. Whoever opens a tunnel may want something else
        /// [default: balanced].
        #[arg(long, value_parser = super::objective())]
        objective: Option<Objective>,
        /// The text that 'meshwise service delegate' printed at the node that owns the name; without it
        /// this node publishes the name as its own.
        #[arg(long, value_name = "TEXT")]
        delegation: Option<String>,
        #[command(flatten)]
        check: Check,
    },
    /// Let another node publish a name of this node's: prints the text for its --delegation.
    Delegate {
        /// The name.
        name: String,
        /// Who may publish it (node id or peer id).
        peer: String,
        /// For how long, for example 30d or 12h, at most a year; not longer than this node's own
        /// membership lasts.
        #[arg(long, default_value = "30d", value_parser = lifetime)]
        expires: Duration,
    },
    /// Say to whom a name belongs, as far as this node is concerned, when two nodes claim it.
    Trust {
        /// The name.
        name: String,
        /// Its owner (node id or peer id).
        peer: String,
    },
    /// Stop offering a service.
    Withdraw {
        /// The name.
        name: ServiceName,
    },
    /// List the services known here.
    List,
    /// Find out who provides a name.
    Resolve {
        /// The name.
        name: ServiceName,
        /// Ask the DHT even when gossip brought the answer already.
        #[arg(long)]
        dht: bool,
    },
}

/// How a service is checked.
#[derive(Debug, PartialEq, clap::Args)]
pub struct Check {
    /// How to see whether it works: tcp (its target accepts a connection), http:/PATH (it answers a
    /// request), cmd:COMMAND (the shell's command ends with 0), or none [default: tcp, or none for UDP].
    #[arg(long = "check", value_name = "HOW", value_parser = check)]
    how: Option<HealthCheck>,
    /// The status that is right for http: [default: 200 to 399].
    #[arg(long, value_name = "STATUS", value_parser = clap::value_parser!(u16).range(100..=599))]
    check_status: Option<u16>,
    /// What the body of the answer to http: has to contain.
    #[arg(long, value_name = "TEXT")]
    check_contains: Option<String>,
    /// Time between two checks; a fifth of it while it fails [default: 5s].
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    check_interval: Option<Duration>,
    /// Failures in a row after which it counts as down [default: 3].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    check_failures: Option<u32>,
}

impl Check {
    /// Whether anything was said of it.
    fn is_said(&self) -> bool {
        let nothing = Self {
            how: None,
            check_status: None,
            check_contains: None,
            check_interval: None,
            check_failures: None,
        };
        *self != nothing
    }

    /// How a service of this kind is to be checked; `None` when nothing was said.
    fn policy(self, kind: ServiceKind) -> Result<Option<HealthPolicy>, String> {
        if self.is_said() { self.said(kind).map(Some) } else { Ok(None) }
    }

    fn said(self, kind: ServiceKind) -> Result<HealthPolicy, String> {
        let mut policy = HealthPolicy::of_kind(kind);
        if let Some(interval) = self.check_interval {
            policy.interval_ms = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
        }
        policy.failures = self.check_failures.unwrap_or(policy.failures);
        if let Some(how) = self.how {
            policy.check = how;
        }
        match &mut policy.check {
            HealthCheck::Http { status, contains, .. } => {
                (*status, *contains) = (self.check_status, self.check_contains);
            }
            _ if self.check_status.is_some() || self.check_contains.is_some() => {
                let text = "--check-status and --check-contains are about an answer of HTTP; write \
                            --check http:/PATH";
                return Err(text.into());
            }
            _ => {}
        }
        policy.fits(kind)?;
        Ok(policy)
    }
}

/// A check as it is written on the command line.
fn check(text: &str) -> Result<HealthCheck, String> {
    let http = |path: &str| HealthCheck::Http { path: path.into(), status: None, contains: None };
    match text.split_once(':').unwrap_or((text, "")) {
        ("tcp", "") => Ok(HealthCheck::Tcp),
        ("none", "") => Ok(HealthCheck::None),
        ("http", path) if path.starts_with('/') && !path.starts_with("//") => Ok(http(path)),
        ("cmd", command) if !command.trim().is_empty() => Ok(HealthCheck::Command(command.into())),
        _ => Err("write tcp, none, http:/PATH or cmd:COMMAND".into()),
    }
}

pub(super) async fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    let client = context.client();
    match verb {
        Verb::Publish { name, to, allow, ttl, objective, delegation, check } => {
            let name = name.to_string();
            // The node knows of what kind it is when nothing is said.
            let kind = to.as_deref().map(parse_target).transpose().map_err(WrongUsage)?;
            if kind.is_none() && check.is_said() && check.how.is_none() {
                let text = "say with --check how it is checked, or with --to where it leads";
                return Err(WrongUsage(text.into()).into());
            }
            let kind = kind.map_or(ServiceKind::Tcp, |(kind, _)| kind);
            let check = check.policy(kind).map_err(WrongUsage)?;
            let allow = match allow.as_slice() {
                [] => None,
                [all] if all == "all" => Some(Vec::new()),
                _ => Some(allow),
            };
            let body = Publish { name, to, allow, ttl_s: ttl, objective, delegation, check };
            let published: Published = client.post("/v1/services", &body).await?;
            if context.json {
                return output::json(&published);
            }
            if !published.kept.is_empty() {
                eprintln!("as it was before: {}", published.kept.join("; "));
            }
            output::print(&format!("published {} in {:.0} ms", published.name, published.took_ms))?;
            if let Some(trouble) = &published.trouble {
                eprintln!("{trouble}");
            }
            Ok(())
        }
        Verb::Delegate { name, peer, expires } => {
            let body = Delegate { peer, expires_s: expires.as_secs() };
            let path = format!("/v1/services/{name}/delegations");
            let delegated: Delegated = client.post(&path, &body).await?;
            if context.json {
                return output::json(&delegated);
            }
            eprintln!(
                "{} may publish {} until {}; at that node, run 'meshwise service publish {} --to \
                 TARGET --delegation' with this text:",
                delegated.provider,
                delegated.name,
                output::time(delegated.expires_us),
                delegated.name,
            );
            output::print(&delegated.delegation)
        }
        Verb::Trust { name, peer } => {
            let path = format!("/v1/services/{name}/owner");
            let trusted: Trusted = client.post(&path, &Trust { owner: peer }).await?;
            if context.json {
                return output::json(&trusted);
            }
            output::print(&format!("{} belongs to {} here", trusted.name, trusted.owner))
        }
        Verb::Withdraw { name } => {
            let done: serde_json::Value = client.delete(&format!("/v1/services/{name}")).await?;
            if context.json {
                return output::json(&done);
            }
            output::print(&format!("withdrew {name}"))
        }
        Verb::List => {
            let services: Vec<Service> = client.get("/v1/services").await?;
            if context.json {
                return output::json(&services);
            }
            print(&services)
        }
        Verb::Resolve { name, dht } => {
            let path = format!("/v1/services/{name}?dht={dht}");
            let resolved: Resolved = client.get(&path).await?;
            if context.json {
                return output::json(&resolved);
            }
            eprintln!("found by {} in {:.1} ms", resolved.source, resolved.took_ms);
            print(&resolved.providers)
        }
    }
}

/// How long a delegation lasts.
fn lifetime(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match time.as_secs() <= DELEGATION_S_MAX {
        true => Ok(time),
        false => Err("a delegation lasts a year (365d) at most".into()),
    }
}

/// A target as it is sent to the node, once it makes sense.
fn target(text: &str) -> Result<String, String> {
    match parse_target(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(why) => Err(what_is_wrong(text).unwrap_or(why)),
    }
}

/// What a target that is none should have been, where that can be seen.
fn what_is_wrong(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    if !["tcp", "http", "udp"].contains(&scheme) {
        return Some(format!(
            "{scheme}:// is no kind of service; write tcp://, http:// or udp:// and an address, as in \
             tcp://127.0.0.1:8080"
        ));
    }
    let (host, port) = rest.trim_end_matches('/').rsplit_once(':')?;
    if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_err()
    {
        return Some(format!("port {port} is above 65535"));
    }
    let is_name =
        !host.is_empty() && host.bytes().any(|b| b.is_ascii_alphabetic()) && !host.contains(':');
    (is_name && port.parse::<u16>().is_ok())
        .then(|| format!("{host} is a name; write its address, as in {scheme}://127.0.0.1:{port}"))
}

fn print(services: &[Service]) -> anyhow::Result<()> {
    let columns = [
        "name",
        "kind",
        "health",
        "response",
        "providers",
        "objective",
        "owner",
        "provider",
        "target",
        "allowed",
    ];
    let mut table = output::table(&columns);
    for service in services {
        table.add_row([
            service.name.clone(),
            service.kind.clone(),
            health(service),
            service.response_ms.map_or_else(|| "-".into(), |ms| format!("{ms:.1} ms")),
            service.providers.to_string(),
            service.objective.to_string(),
            service.owner.clone(),
            service.provider.clone(),
            service.target.clone().unwrap_or_else(|| "-".into()),
            if service.allowed.is_empty() { "all".into() } else { service.allowed.join(" ") },
        ]);
    }
    output::rows(&table, "no services are known here")
}

/// How a service is, and why where that is known.
fn health(service: &Service) -> String {
    match (&service.health, &service.why) {
        (Some(health), Some(why)) => format!("{health}: {why}"),
        (Some(health), None) => health.clone(),
        (None, _) => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_words_paths_and_commands() {
        assert_eq!(check("tcp"), Ok(HealthCheck::Tcp));
        assert_eq!(check("none"), Ok(HealthCheck::None));
        assert_eq!(check("cmd:test -e a:b"), Ok(HealthCheck::Command("test -e a:b".into())));
        for path in ["/", "/health?all=1"] {
            let http = HealthCheck::Http { path: path.into(), status: None, contains: None };
            assert_eq!(check(&format!("http:{path}")), Ok(http));
        }
        for wrong in ["", "udp", "tcp:80", "http", "http:health", "http://127.0.0.1/", "cmd: "] {
            assert!(check(wrong).is_err(), "{wrong}");
        }
    }
}
