//! `meshwise service`

use std::time::Duration;

use super::{Context, output};
use crate::api::types::{
    Delegate, Delegated, Publish, Published, Resolved, Service, Trust, Trusted,
};
use crate::config::parse_target;
use crate::engine::overlay::Objective;
use crate::engine::types::ServiceName;

/// Publish, find and withdraw services.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Offer a local TCP or UDP service to the mesh under a name.
    Publish {
        /// The name, for example byronwade.local.
        name: ServiceName,
        /// Where its connections go: tcp://, http:// or udp:// and an address, for example
        /// tcp://127.0.0.1:8080.
        #[arg(long, value_name = "TARGET", value_parser = target)]
        to: String,
        /// Let only this node connect (node id or peer id); may be given several times.
        #[arg(long, value_name = "NODE")]
        allow: Vec<String>,
        /// Time to live of each record (s); it is renewed after a third of it.
        #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(3..=86_400))]
        ttl: u32,
        /// What it wants from its routes. Whoever opens a tunnel may want something else.
        #[arg(long, default_value_t, value_parser = super::objective())]
        objective: Objective,
        /// The text that 'meshwise service delegate' printed at the node that owns the name; without it
        /// this node publishes the name as its own.
        #[arg(long, value_name = "TEXT")]
        delegation: Option<String>,
    },
    /// Let another node publish a name of this node's: prints the text for its --delegation.
    Delegate {
        /// The name.
        name: String,
        /// Who may publish it (node id or peer id).
        peer: String,
        /// For how long, for example 30d or 12h, at most a year; not longer than this node's own
        /// membership lasts.
        #[arg(long, default_value = "30d", value_parser = humantime::parse_duration)]
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

pub(super) async fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    let client = context.client();
    match verb {
        Verb::Publish { name, to, allow, ttl, objective, delegation } => {
            let name = name.to_string();
            let body = Publish { name, to, allow, ttl_s: ttl, objective, delegation };
            let published: Published = client.post("/v1/services", &body).await?;
            if context.json {
                return output::json(&published);
            }
            output::print(&format!("published {} in {:.0} ms", published.name, published.took_ms))
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

/// A target as it is sent to the node, once it makes sense.
fn target(text: &str) -> Result<String, String> {
    parse_target(text).map(|_| text.to_owned())
}

fn print(services: &[Service]) -> anyhow::Result<()> {
    let columns = ["name", "kind", "objective", "owner", "provider", "target", "allowed"];
    let mut table = output::table(&columns);
    for service in services {
        table.add_row([
            service.name.clone(),
            service.kind.clone(),
            service.objective.to_string(),
            service.owner.clone(),
            service.provider.clone(),
            service.target.clone().unwrap_or_else(|| "-".into()),
            if service.allowed.is_empty() { "all".into() } else { service.allowed.join(" ") },
        ]);
    }
    output::rows(&table, "no services are known here")
}
