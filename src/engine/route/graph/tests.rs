use proptest::prelude::*;

use super::*;

fn node(byte: u8) -> NodeId {
    NodeId([byte; 8])
}

fn quality(rtt_ms: f64) -> LinkQuality {
    LinkQuality { rtt_ms, jitter_ms: 0.0, loss: 0.0, bandwidth: None, utilisation: 0.0 }
}

fn advertise(graph: &mut OverlayGraph, from: u8, sequence: u64, to: &[u8], at: u64) {
    let links = to.iter().map(|to| (node(*to), quality(10.0)));
    let links: BTreeMap<_, _> = links.collect();
    graph.accept(node(from), sequence, links, Timestamp(at)).unwrap();
}

#[test]
fn a_link_counts_when_both_ends_advertise_it() {
    let mut graph = OverlayGraph::default();
    advertise(&mut graph, 1, 1, &[2, 3], 0);
    assert!(!graph.is_link(node(1), node(2)));
    advertise(&mut graph, 2, 1, &[1], 0);
    assert!(graph.is_link(node(1), node(2)) && graph.is_link(node(2), node(1)));
    let topology = graph.topology();
    let edge = |to| vec![Edge { to, cost_ms: 11.0, back_ms: 11.0 }];
    assert_eq!(topology.edges, [edge(1), edge(0)]);
    advertise(&mut graph, 3, 1, &[1], 0);
    advertise(&mut graph, 4, 1, &[5], 0);
    let topology = graph.topology();
    assert_eq!(topology.reached_from(node(2)), [1, 2, 3].map(node).into());
    assert_eq!(topology.reached_from(node(4)), [node(4)].into());
    assert_eq!(topology.reached_from(node(5)), [].into());
    let farther = |links| topology.farther_than(node(2), links);
    assert_eq!([0, 1, 2].map(farther), [2, 1, 0]);
    assert_eq!(topology.farther_than(node(5), 0), 0);
}

#[test]
fn an_own_link_that_is_gone_counts_no_more_and_the_next_advertisement_says_so() {
    let mut graph = OverlayGraph::default();
    advertise(&mut graph, 1, 1, &[2], 0);
    advertise(&mut graph, 2, 1, &[1], 0);
    assert_eq!(graph.topology().edges[0].len(), 1);
    graph.own_link(node(1), node(2), false);
    assert!(!graph.is_link(node(1), node(2)) && graph.topology().edges[0].is_empty());
    graph.own_link(node(1), node(2), true);
    assert!(graph.is_link(node(1), node(2)) && graph.topology().edges[1].len() == 1);
    graph.own_link(node(1), node(2), false);
    graph.own_link(node(1), node(3), false);
    let changes = graph.accept(node(1), 2, BTreeMap::new(), Timestamp(9)).unwrap();
    assert_eq!(changes, [(node(1), node(2), None)]);
    advertise(&mut graph, 1, 3, &[2], 10);
    assert!(graph.is_link(node(1), node(2)), "it came back");
}

#[test]
fn the_fullest_link_limits_a_route_and_an_unknown_one_hides_it() {
    let mut graph = OverlayGraph::default();
    let filled = |bandwidth, utilisation| LinkQuality {
        bandwidth: Some(bandwidth),
        utilisation,
        ..quality(1.0)
    };
    let route = Route::new([node(1), node(2), node(3)]).unwrap();
    let mut say = |from, to, sequence, quality| {
        let links = BTreeMap::from([(node(to), quality)]);
        graph.accept(node(from), sequence, links, Timestamp(0)).unwrap();
        graph.residual(&route)
    };
    assert_eq!(say(1, 2, 1, filled(100.0, 0.5)), None);
    assert_eq!(say(2, 3, 1, filled(80.0, 0.75)), Some(20.0));
    assert_eq!(say(1, 2, 2, filled(100.0, 0.9375)), Some(6.25));
    assert_eq!(say(2, 3, 2, quality(1.0)), None);
}

#[test]
fn an_older_advertisement_never_replaces_a_newer_one() {
    let mut graph = OverlayGraph::default();
    advertise(&mut graph, 1, 5, &[2], 0);
    for sequence in [4, 5] {
        let result = graph.accept(node(1), sequence, BTreeMap::new(), Timestamp(9));
        assert_eq!(result, Err(Refused::Stale));
    }
    let changes = graph.accept(node(1), 6, BTreeMap::new(), Timestamp(9)).unwrap();
    assert_eq!(changes, [(node(1), node(2), None)]);
}

#[test]
fn silence_is_forgotten_and_my_own_advertisement_is_not() {
    let mut graph = OverlayGraph::default();
    advertise(&mut graph, 1, 1, &[2], 0);
    advertise(&mut graph, 2, 1, &[1], 0);
    let expiry = Timestamp(0) + LIFETIME;
    assert!(graph.expire(node(1), Timestamp(expiry.0 - 1)).is_empty());
    assert_eq!(graph.expire(node(1), expiry), [(node(2), node(1), None)]);
    assert_eq!(graph.origins().collect::<Vec<_>>(), [(node(1), 1)]);
}

#[test]
fn what_was_said_long_ago_is_not_kept_for_its_coming_late() {
    let mut graph = OverlayGraph::default();
    let said = Timestamp(1_760_000_000_000_000);
    let came = said + LIFETIME;
    advertise(&mut graph, 2, said.0, &[1], came.0);
    let last = said + LIFETIME + CLOCK_SKEW;
    assert!(graph.expire(node(1), Timestamp(last.0 - 1)).is_empty());
    assert_eq!(graph.expire(node(1), last), [(node(2), node(1), None)]);
}

#[test]
fn loss_makes_a_link_dearer() {
    let lossy = LinkQuality { loss: 0.5, ..quality(10.0) };
    assert_eq!(link_cost_ms(&lossy), 21.0);
}

#[test]
fn who_is_doubted_is_dearer_to_leave_by_and_nobody_else_is() {
    let mut graph = OverlayGraph::default();
    for (from, to) in [(1, [2, 3]), (2, [1, 3]), (3, [1, 2])] {
        advertise(&mut graph, from, 1, &to, 0);
    }
    graph.topology();
    let version = graph.version();
    graph.doubt([(node(2), 0.5), (node(9), 0.5)].into());
    let costs = |graph: &mut OverlayGraph| {
        let topology = graph.topology();
        [(0, 1), (1, 0), (1, 2), (2, 1), (0, 2)].map(|(a, b)| topology.cost_ms(a, b))
    };
    assert_eq!(costs(&mut graph), [11.0, 21.0, 21.0, 11.0, 11.0]);
    assert_eq!(graph.changes_since(version).unwrap().count(), 2);
    let route = Route::new([node(1), node(2), node(3)]).unwrap();
    assert_eq!(graph.doubted_on(&route), [(node(2), 0.5)]);
    assert_eq!(graph.doubted_on(&Route::new([node(2), node(3)]).unwrap()), []);
    let version = graph.version();
    graph.doubt([(node(2), 0.5), (node(9), 0.25)].into());
    assert_eq!(graph.version(), version, "nothing new of a node that is there");
    graph.doubt(BTreeMap::new());
    assert_eq!(costs(&mut graph), [11.0; 5]);
}

#[test]
fn changes_are_told_until_nodes_come_or_go() {
    let mut graph = OverlayGraph::default();
    for from in 1..=3 {
        advertise(&mut graph, from, 1, &[1, 2, 3].map(|to| if to == from { 9 } else { to }), 0);
    }
    graph.topology();
    let before = graph.version();
    advertise(&mut graph, 1, 2, &[2, 3], 0);
    assert_eq!(graph.version(), before, "nothing new was said of a link that counts");
    advertise(&mut graph, 1, 3, &[2], 0);
    let told: Vec<EdgeChange> = graph.changes_since(before).unwrap().copied().collect();
    let gone = |from, to| EdgeChange { from, to, before_ms: 11.0, after_ms: f64::INFINITY };
    assert_eq!(told, [gone(0, 2), gone(2, 0)]);
    assert_eq!(graph.changes_since(graph.version()).unwrap().count(), 0);
    advertise(&mut graph, 4, 1, &[], 0);
    assert!(graph.changes_since(before).is_none());
}

proptest! {
    #[test]
    fn what_is_patched_is_what_would_be_built(
        adverts in proptest::collection::vec(
            (0u8..6, proptest::collection::btree_map(0u8..6, 1u32..9, 0..5), 0u64..30),
            1..40,
        ),
    ) {
        let mut graph = OverlayGraph::default();
        let mut now = 0;
        for (index, (from, links, seconds)) in adverts.into_iter().enumerate() {
            now += seconds * 1_000_000;
            let links = links.into_iter().filter(|(to, _)| *to != from);
            let links = links.map(|(to, ms)| (node(to), quality(ms.into())));
            let links: BTreeMap<_, _> = links.collect();
            let version = graph.version();
            let before = graph.topology();
            graph.reached_from(node(0));
            graph.accept(node(from), index as u64 + 1, links, Timestamp(now)).unwrap();
            graph.expire(node(0), Timestamp(now));
            let patched = graph.topology();
            let anew = OverlayGraph { topology: None, ..graph.clone() }.topology();
            prop_assert_eq!(&patched, &anew);
            prop_assert!(graph.version() != version || before == patched);
            for from in [node(0), node(1)] {
                prop_assert_eq!(&*graph.reached_from(from), &graph.walk_from(from));
            }
            // Who knows the old edges and is told the changes knows the new ones.
            let Some(changes) = graph.changes_since(version) else { continue };
            let mut costs = BTreeMap::new();
            for (from, edges) in (0..).zip(&before.edges) {
                costs.extend(edges.iter().map(|edge| ((from, edge.to), edge.cost_ms)));
            }
            for EdgeChange { from, to, before_ms, after_ms } in changes.copied() {
                let known = costs.insert((from, to), after_ms).unwrap_or(f64::INFINITY);
                prop_assert_eq!(known, before_ms);
            }
            costs.retain(|_, cost| cost.is_finite());
            let mut expected = BTreeMap::new();
            for (from, edges) in (0..).zip(&patched.edges) {
                expected.extend(edges.iter().map(|edge| ((from, edge.to), edge.cost_ms)));
            }
            prop_assert_eq!(costs, expected);
        }
    }
}
