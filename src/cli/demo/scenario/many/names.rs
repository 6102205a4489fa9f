//! Names: how long publishing and looking up take.

use std::time::{Duration, Instant};

use serde_json::json;

use super::*;
use crate::api::types::{Published, Resolved, Service};
use crate::cli::demo::load::WebService;
use crate::engine::measure::window_statistics::mean;

/// Look-ups of each kind.
const LOOKUPS: usize = 300;

/// The name that a node publishes.
pub(super) fn name_of(node: &str) -> String {
    format!("of-{}.local", node.to_lowercase())
}

/// Every node publishes a name.
pub(super) async fn register(mesh: &Mesh) -> anyhow::Result<Vec<Figure>> {
    // What the names lead to need not live longer: they are looked up, not used.
    let web = WebService::start().await?;
    let mut took_ms = Vec::new();
    for node in NODES {
        let to = format!("http://{}", web.address());
        let body = json!({ "name": name_of(node), "to": to, "ttl_s": 600 });
        let published: Published = mesh.client(node).post("/v1/services", &body).await?;
        took_ms.push(published.took_ms);
    }
    let begun = Instant::now();
    for node in NODES {
        while mesh.client(node).get::<Vec<Service>>("/v1/services").await?.len() < NODES.len() {
            if begun.elapsed() > PATIENCE {
                bail!("{node} has not heard of every name");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(vec![
        figure(
            format!("registration, stored by a majority, average of {}", took_ms.len()),
            mean(&took_ms),
            "ms",
        )
        .below(500.0)
        .at_most(100.0),
        figure("  p95", quantile(&took_ms, 0.95), "ms"),
    ])
}

/// Random nodes look names of others up: as everybody does, and in the DHT whatever they know.
pub(super) async fn look_up(mesh: &Mesh, random: &mut Pcg64Mcg) -> anyhow::Result<Vec<Figure>> {
    let (mut known_ms, mut cold_ms) = (Vec::new(), Vec::new());
    let mut found = 0;
    for _ in 0..LOOKUPS {
        for (query, source, took_ms) in
            [("", "gossip", &mut known_ms), ("?dht=true", "dht", &mut cold_ms)]
        {
            let asked = random.random_range(0..NODES.len());
            let of = (asked + random.random_range(1..NODES.len())) % NODES.len();
            let path = format!("/v1/services/{}{query}", name_of(NODES[of]));
            let answer = mesh.client(NODES[asked]).get::<Resolved>(&path).await;
            if let Ok(resolved) = answer
                && resolved.source == source
                && !resolved.providers.is_empty()
            {
                found += 1;
                took_ms.push(resolved.took_ms);
            }
        }
    }
    let success = 100.0 * f64::from(found) / (2 * LOOKUPS) as f64;
    Ok(vec![
        figure(format!("discovery, success of {}", 2 * LOOKUPS), Some(success), "%")
            .above(98.0)
            .at_least(99.9),
        figure("  known by gossip, average", mean(&known_ms), "ms").below(2_000.0),
        figure("  known by gossip, p50", quantile(&known_ms, 0.5), "ms").at_most(1.0),
        figure("  known by gossip, p99", quantile(&known_ms, 0.99), "ms"),
        figure("  cold by DHT, average", mean(&cold_ms), "ms").below(2_000.0),
        figure("  cold by DHT, p50", quantile(&cold_ms, 0.5), "ms").at_most(150.0),
        figure("  cold by DHT, p99", quantile(&cold_ms, 0.99), "ms").at_most(1_000.0),
    ])
}
