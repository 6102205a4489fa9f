//! Nodes come and go.

use std::collections::BTreeSet;

use futures::future::try_join_all;

use super::names::name_of;
use super::*;
use crate::api::types::{Reach, Resolved};

/// Between two looks at what has changed.
const LOOK: Duration = Duration::from_millis(5);
/// A fifth of the nodes.
const KILLED: usize = NODES.len() / 5;
/// Every pair must keep its route for so long after it has one.
const STAYS: Duration = Duration::from_secs(3);

/// New nodes join, one after the other, until each can resolve a name.
pub(super) async fn join(mesh: &mut Mesh) -> anyhow::Result<Vec<Figure>> {
    let path = format!("/v1/services/{}", name_of(NODES[NODES.len() / 2]));
    let (mut whole_ms, mut inner_ms) = (Vec::new(), Vec::new());
    for name in NEWCOMERS {
        let begun = Instant::now();
        mesh.add(name)?;
        mesh.wait_up(name).await?;
        let client = mesh.client(name);
        while client.get::<Resolved>(&path).await.is_err() {
            if begun.elapsed() > PATIENCE {
                bail!("{name} joined and resolves nothing");
            }
            tokio::time::sleep(LOOK).await;
        }
        let resolved = Instant::now();
        whole_ms.push((resolved - begun).as_secs_f64() * 1e3);
        let status: Status = client.get("/v1/status").await?;
        inner_ms.push((status.uptime_s - resolved.elapsed().as_secs_f64()) * 1e3);
    }
    let of = NEWCOMERS.len();
    let floor = |figure: Figure| figure.below(10_000.0);
    Ok(vec![
        floor(figure(
            format!("join until it can resolve, from the start of its process, p50 of {of}"),
            quantile(&whole_ms, 0.5),
            "ms",
        ))
        .at_most(1_000.0),
        floor(figure("  slowest", quantile(&whole_ms, 1.0), "ms")),
        figure("  from the start of the node in it, p50", quantile(&inner_ms, 0.5), "ms")
            .at_most(1_000.0),
        figure("  slowest", quantile(&inner_ms, 1.0), "ms"),
    ])
}

/// Kills a fifth of the nodes, and waits until each of the others has a route to each other one that
/// leads over living nodes. Nobody is killed when a pair has no route within [`PATIENCE`] before.
pub(super) async fn lose_nodes(
    started: Instant,
    mesh: &mut Mesh,
    random: &mut Pcg64Mcg,
) -> anyhow::Result<Vec<Figure>> {
    let mut all: Vec<&'static str> = NODES.to_vec();
    all.retain(|name| *name != CONSUMER);
    all.shuffle(random);
    let killed = all.split_off(all.len() - KILLED);
    // Those that joined later stay and count too.
    let alive = |mesh: &Mesh| -> Vec<&'static str> {
        mesh.running().into_iter().filter(|name| !killed.contains(name)).collect()
    };
    let survivors = alive(mesh);
    // Providers were killed before, and are back.
    let (all, begun) = (mesh.running(), Instant::now());
    let unready = loop {
        let unready = missing(mesh, &all).await?;
        if unready == 0 || begun.elapsed() >= PATIENCE {
            break unready;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    if unready > 0 {
        return Ok(vec![recovered(unready, None)]);
    }
    let without_before = missing(mesh, &survivors).await?;
    for name in &killed {
        mesh.kill(name)?;
    }
    let begun = Instant::now();
    let (mut since, mut first, mut looks) = (None, None, 0_usize);
    let took = loop {
        let without = missing(mesh, &survivors).await?;
        let now = begun.elapsed();
        first.get_or_insert(without);
        looks += 1;
        if without > 0 {
            since = None;
        } else if now.saturating_sub(*since.get_or_insert(now)) >= STAYS {
            break since;
        }
        if now > RECOVERY_MAX {
            break None;
        }
        tokio::time::sleep(LOOK).await;
    };
    let pairs = survivors.len() * (survivors.len() - 1);
    say(
        started,
        &format!(
            "{} of {pairs} pairs without a route at first, {without_before} before; {looks} looks",
            first.unwrap_or_default(),
        ),
    );
    let recovered = recovered(0, took);
    let links: Vec<f64> =
        status(mesh, &survivors).await?.iter().map(|status| status.links_up as f64).collect();
    Ok(vec![recovered, figure("  links of a node then, fewest", quantile(&links, 0.0), "")])
}

/// How long it took until every pair that is left had a route, when so many of all had none before.
fn recovered(unready: usize, took: Option<Duration>) -> Figure {
    let what =
        format!("{KILLED} of {} killed: until every remaining pair has a route", NODES.len());
    let mut recovered = figure(what, took.map(|took| took.as_secs_f64()), "s");
    recovered = recovered.below(30.0).at_most(5.0);
    if unready > 0 {
        recovered.why_not = Some(format!("{unready} pairs had no route before"));
    } else if took.is_none() {
        recovered.why_not = Some(format!("not within {} s", RECOVERY_MAX.as_secs()));
    }
    recovered
}

/// How many ordered pairs of nodes have no route that leads over these nodes only.
async fn missing(mesh: &Mesh, nodes: &[&'static str]) -> anyhow::Result<usize> {
    let ids: BTreeSet<String> =
        mesh.ids().into_iter().filter(|(_, name)| nodes.contains(name)).map(|(id, _)| id).collect();
    let asked = nodes.iter().map(|name| {
        let client = mesh.client(name);
        async move { client.get::<Vec<Reach>>("/v1/routes").await }
    });
    let answers = try_join_all(asked).await?;
    let reached = answers.iter().map(|reached| {
        let good = reached.iter().filter(|reach| {
            let leads = |route: &Vec<String>| route.iter().all(|node| ids.contains(node));
            ids.contains(&reach.node) && reach.route.as_ref().is_some_and(leads)
        });
        nodes.len() - 1 - good.count().min(nodes.len() - 1)
    });
    Ok(reached.sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_of_a_recovery_when_routes_were_missing_before() {
        assert_eq!(recovered(0, Some(Duration::from_secs(3))).remark(), "");
        let missed = recovered(7, None);
        assert_eq!((missed.value, missed.reached), (None, Some(false)));
        assert_eq!(missed.remark(), "7 pairs had no route before");
        assert_eq!(recovered(0, None).remark(), "not within 45 s");
    }
}
