//! The control plane among 30 nodes that have the default settings: publish, look up, join, lose a
//! provider, lose a fifth of the nodes, and do nothing.

mod changes;
mod names;
mod replicas;
mod rest;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::{Figure, figure, quantile};
use crate::api::Client;
use crate::api::types::Status;
use crate::cli::demo::mesh::{Mesh, Plan};
use crate::cli::demo::say;

/// The nodes that start first.
const NODES: [&str; 30] = [
    "N01", "N02", "N03", "N04", "N05", "N06", "N07", "N08", "N09", "N10", "N11", "N12", "N13",
    "N14", "N15", "N16", "N17", "N18", "N19", "N20", "N21", "N22", "N23", "N24", "N25", "N26",
    "N27", "N28", "N29", "N30",
];
/// The nodes that join later, one after the other.
const NEWCOMERS: [&str; 6] = ["J01", "J02", "J03", "J04", "J05", "J06"];
/// Who reaches a service through its proxy; it is never killed.
const CONSUMER: &str = "N30";
/// Longest wait until all know each other, or every name.
const PATIENCE: Duration = Duration::from_secs(90);
/// Longest wait for any recovery: what the mission allows, and some.
const RECOVERY_MAX: Duration = Duration::from_secs(45);
/// Which nodes are asked and killed: the same ones in every run.
const SEED: u64 = 30;

/// Runs it all.
pub(super) async fn figures(started: Instant, folder: &Path) -> anyhow::Result<Vec<Figure>> {
    let mut random = Pcg64Mcg::seed_from_u64(SEED);
    say(started, &format!("starting {} nodes on loopback", NODES.len()));
    let mut mesh = Mesh::start(folder, Plan::open(&NODES, &[CONSUMER])).await?;
    mesh.wait_joined(PATIENCE).await?;
    say(started, "all know each other; waiting until the links have settled");
    let mut figures = rest::settle(started, &mesh).await?;
    say(started, "nobody asks for anything for 30 s");
    figures.extend(rest::idle(&mesh).await?);
    say(started, "publishing");
    figures.extend(names::register(&mesh).await?);
    say(started, "looking up");
    figures.extend(names::look_up(&mesh, &mut random).await?);
    say(started, "new nodes join, one after the other");
    figures.extend(changes::join(&mut mesh).await?);
    say(started, "providers with a replica are killed, one after the other");
    figures.extend(replicas::lose_providers(started, &mut mesh).await?);
    say(started, "a fifth of the nodes is killed");
    figures.extend(changes::lose_nodes(started, &mut mesh, &mut random).await?);
    mesh.stop().await;
    Ok(figures)
}

/// The status of each of these nodes.
async fn status(mesh: &Mesh, names: &[&'static str]) -> anyhow::Result<Vec<Status>> {
    let mut all = Vec::new();
    for name in names {
        all.push(mesh.client(name).get("/v1/status").await?);
    }
    Ok(all)
}

/// Median, and the largest, as two figures.
fn median_and_most(what: &str, values: &[f64], unit: &'static str) -> [Figure; 2] {
    let median = figure(format!("{what}, median"), quantile(values, 0.5), unit);
    [median, figure("  most", quantile(values, 1.0), unit)]
}
