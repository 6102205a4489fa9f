//! Nodes come and go, networks are cut apart and healed: small worlds for CI. `benches/churn.rs` plays
//! the same at full size and prints figures.

use std::time::Duration;

use meshwise::sim::Space;

use crate::churning::{
    BOOTSTRAP, Mesh, Recovered, UNREACHABLE_MAX, availability, churn, join_without_the_first, lose,
    part_and_heal, restart_all, revoke, sent, swing,
};

fn seconds(s: u64) -> Option<Duration> {
    Some(Duration::from_secs(s))
}

fn assert_within(recovered: Recovered, services_s: u64, routes_s: u64) {
    println!("{recovered:?}");
    assert!(recovered.services.is_some() && recovered.services <= seconds(services_s));
    assert!(recovered.routes.is_some() && recovered.routes <= seconds(routes_s));
}

#[test]
fn a_small_mesh_under_heavy_churn_keeps_every_invariant() {
    let mut mesh = Mesh::new(1, 30, 10);
    // Ten times what is asked for, so that much happens in five minutes.
    let churned = churn(&mut mesh, 3.0, 300, 600, 2);
    println!("{} left, {:?}, {:?}", churned.left, churned.lookups, churned.worst_reach);
    assert_eq!(churned.wrong, [] as [String; 0]);
    assert!(churned.left >= 5 && churned.lookups.made > 500);
    assert_eq!(churned.lookups.found, churned.lookups.made);
}

#[test]
fn halves_that_were_cut_apart_find_together_again() {
    for cut_s in [30, 150] {
        let mut mesh = Mesh::new(2, 24, 8);
        assert_within(part_and_heal(&mut mesh, Duration::from_secs(cut_s)), 10, 60);
    }
}

#[test]
fn after_all_were_restarted_the_mesh_is_back() {
    let mut mesh = Mesh::new(3, 24, 8);
    assert_within(restart_all(&mut mesh), 10, 30);
}

#[test]
fn when_a_fifth_vanishes_the_rest_has_routes_again() {
    let mut mesh = Mesh::new(4, 30, 10);
    let recovered = lose(&mut mesh, 0.2);
    let bound = UNREACHABLE_MAX.as_secs();
    assert_within(recovered, bound, bound);
}

#[test]
fn newcomers_join_without_the_first_nodes() {
    let mut mesh = Mesh::new(5, 20, 6);
    let took = join_without_the_first(&mut mesh, 5);
    println!("{BOOTSTRAP} gone: {took:?}");
    assert!(took.iter().all(|took| took.is_some() && *took <= seconds(5)));
}

#[test]
fn one_of_two_replicas_can_be_used_nearly_always() {
    let mut mesh = Mesh::new(6, 8, 0);
    let tally = availability(&mut mesh, 3.0, 2);
    println!("{tally:?}");
    assert!(tally.looks > 600 && tally.served * 100 >= tally.possible * 99);
}

#[test]
fn a_revocation_reaches_everybody_and_those_that_were_cut_off_when_they_are_back() {
    // 200 nodes in `benches/churn.rs`: unoptimised, they take ten minutes.
    let mut mesh = Mesh::new(7, 40, 1);
    let (heard, all) = revoke(&mut mesh);
    println!("within {heard:?}; after healing {all:?}");
    assert_eq!(mesh.wrong, [] as [String; 0]);
    assert!(heard.is_some() && heard <= seconds(2));
    assert!(all.is_some() && all <= seconds(60));
}

#[test]
fn links_come_to_rest_also_on_one_machine() {
    // All are about equally near, and what differs is noise.
    let space = Space { nearest_ms: 0.2, side_ms: 0.5, jitter_ms: 0.5, seed: 9 };
    let mut mesh = Mesh::laid_out(space, 9, 30, 1);
    let links = |mesh: &Mesh| -> Vec<Vec<_>> {
        let of = |node: &usize| mesh.world.engine(*node).links().map(|(id, ..)| id).collect();
        mesh.running.keys().map(of).collect()
    };
    let begun = mesh.world.now();
    let (mut before, mut since) = (links(&mesh), begun);
    while mesh.world.now().since(since) < Duration::from_secs(60) {
        assert!(mesh.world.now().since(begun) < Duration::from_secs(240), "they never do");
        mesh.world.run_for(Duration::from_secs(2));
        let now = links(&mesh);
        if now != before {
            (before, since) = (now, mesh.world.now());
        }
    }
    println!("{:?}", since.since(begun));
}

#[test]
fn a_mesh_in_which_nothing_happens_is_quiet() {
    let mut mesh = Mesh::new(8, 30, 5);
    mesh.world.run_for(Duration::from_secs(120));
    let idle = sent(&mut mesh, 120, |_, _| {});
    let swings = sent(&mut mesh, 60, swing);
    println!("idle {idle:?}; one link swings {swings:?}");
    let bytes = |sent: &crate::churning::Sent| sent.values().map(|(_, bytes)| bytes).sum::<f64>();
    // Of 5.1 kB/s, 4.2 were advertisements without content.
    assert!(bytes(&idle) < 2_000.0, "{idle:?}");
    // Both ends of one link, at most as often as they may.
    assert!(bytes(&swings) < bytes(&idle) + 20_000.0, "{swings:?}");
    assert!(swings["link-state"].0 > idle["link-state"].0);
}
