//! `meshwise service`

use super::{Context, output};
use crate::api::types::{Publish, Published, Resolved, Service};
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
        Verb::Publish { name, to, allow, ttl, objective } => {
            let body = Publish { name: name.to_string(), to, allow, ttl_s: ttl, objective };
            let published: Published = client.post("/v1/services", &body).await?;
            if context.json {
                return output::json(&published);
            }
            output::print(&format!("published {} in {:.0} ms", published.name, published.took_ms))
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
    let columns = ["name", "kind", "objective", "provider", "target", "allowed"];
    let mut table = output::table(&columns);
    for service in services {
        table.add_row([
            service.name.clone(),
            service.kind.clone(),
            service.objective.to_string(),
            service.provider.clone(),
            service.target.clone().unwrap_or_else(|| "-".into()),
            if service.allowed.is_empty() { "all".into() } else { service.allowed.join(" ") },
        ]);
    }
    output::rows(&table, "no services are known here")
}
