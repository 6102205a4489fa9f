//! Growing together again: who was known and is missing is dialled now and then.
//!
//! When a network is cut in two, each part soon has all the links it wants and nobody looks for the
//! other; when the cut is over, they would stay apart. So a node that knows where others listen
//! to whom no path leads any more dials one of them from time to time, those missed last most often.
//! The whole mesh dials about [`DIALS_PER_S`] together, whatever its size: one connection between two
//! parts is enough, because what it brings is told on. Who is missed for longer is sought less often,
//! and after [`GIVE_UP`] no more.
//!
//! Over the first links between two parts some are farther from each other than a route may be long. No
//! more dials are needed then, but links in the right places: the shape of the mesh is looked at more
//! often for a while ([`Reunion::are_too_far`]).

use std::collections::BTreeMap;
use std::time::Duration;

use crate::engine::types::{NodeId, Timestamp};

/// Dials that all nodes that find each other make in a second together, while somebody is missing
/// (a guess: the parts of a mesh meet within seconds, and a single dead node costs next to nothing).
pub const DIALS_PER_S: f64 = 4.0;
/// Shortest time between two dials of one node, and between two looks at who is missing.
pub const INTERVAL_MIN: Duration = Duration::from_secs(2);
/// It is at least this share of the time since somebody was missed last.
pub const PATIENCE: u32 = 60;
/// For how long the shape is looked at more often after nodes came to be too far: some looks. Where no
/// link can be made that brings them nearer, it is no use to go on.
pub const DRAW_TOGETHER: Duration = Duration::from_secs(10);
/// For how long in all while more and more nodes come to be too far, or some again and again: a guess. It
/// begins anew after [`DRAW_TOGETHER`] without such news.
pub const DRAW_TOGETHER_MAX: Duration = Duration::from_secs(60);
/// Who is missing for longer is gone for good.
pub const GIVE_UP: Duration = Duration::from_secs(86_400);

/// Remembers who is missing, at most as many as the bootstrapper knows.
#[derive(Clone, Debug, Default)]
pub struct Reunion {
    missing: BTreeMap<NodeId, Timestamp>,
    dialled_at: Timestamp,
    next_at: Option<Timestamp>,
    /// Nodes that are too far.
    far: usize,
    /// When they last came to be more.
    far_since: Timestamp,
    /// When that began, with less than [`DRAW_TOGETHER`] in between.
    drawn_since: Timestamp,
}

impl Reunion {
    /// When [`Reunion::poll`] wants to be called next; `None` until [`Reunion::start`].
    pub fn next_timeout(&self) -> Option<Timestamp> {
        self.next_at
    }

    /// Begins to look who is missing, when it has not begun yet.
    pub fn start(&mut self, now: Timestamp) {
        self.next_at.get_or_insert(now + INTERVAL_MIN);
    }

    /// So many nodes are reached, but over more links than a route can have. Returns whether links that
    /// bring them nearer are to be looked for soon.
    pub fn are_too_far(&mut self, count: usize, now: Timestamp) -> bool {
        if count > self.far {
            if now.since(self.far_since) >= DRAW_TOGETHER {
                self.drawn_since = now;
            }
            self.far_since = now;
        }
        self.far = count;
        let is_news = now.since(self.far_since) < DRAW_TOGETHER;
        count > 0 && is_news && now.since(self.drawn_since) < DRAW_TOGETHER_MAX
    }

    /// Whom to dial now. `missing` are nodes whose addresses are known and to whom no path leads,
    /// `reached` is how many are reached, and `random` is drawn uniformly from 0 to 1.
    pub fn poll(
        &mut self,
        missing: impl Iterator<Item = NodeId>,
        reached: usize,
        random: impl FnOnce() -> f64,
        now: Timestamp,
    ) -> Option<NodeId> {
        self.next_at = Some(now + INTERVAL_MIN);
        let before = std::mem::take(&mut self.missing);
        let since = |node: NodeId| (node, before.get(&node).copied().unwrap_or(now));
        self.missing = missing.map(since).collect();
        let sought = self.missing.iter().filter(|(_, since)| now.since(**since) < GIVE_UP);
        let mut sought: Vec<(Timestamp, NodeId)> = sought.map(|(n, since)| (*since, *n)).collect();
        sought.sort_unstable();
        let newest = sought.last()?.0;
        let in_turn = Duration::from_secs_f64(reached as f64 / DIALS_PER_S);
        let pause = in_turn.max(now.since(newest) / PATIENCE).max(INTERVAL_MIN);
        if now.since(self.dialled_at) < pause {
            return None;
        }
        self.dialled_at = now;
        // Those missed last come first: the square of a uniform number is small most of the time.
        let back = (random().clamp(0.0, 1.0).powi(2) * sought.len() as f64) as usize;
        sought.iter().rev().nth(back.min(sought.len() - 1)).map(|(_, node)| *node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    fn seconds(s: u64) -> Timestamp {
        Timestamp(s * 1_000_000)
    }

    fn dials(missing: &[u8], reached: usize, from_s: u64, until_s: u64) -> usize {
        let mut reunion = Reunion::default();
        let polls = (0..until_s).step_by(2).map(|at| {
            let missing = missing.iter().map(|byte| node(*byte));
            (at, reunion.poll(missing, reached, || 0.0, seconds(1_000 + at)))
        });
        polls.filter(|(at, dial)| *at >= from_s && dial.is_some()).count()
    }

    #[test]
    fn nobody_is_dialled_while_nobody_is_missing_and_the_mesh_shares_the_work() {
        assert_eq!(dials(&[], 10, 0, 100), 0);
        assert_eq!(dials(&[1, 2], 1, 0, 100), 50);
        assert_eq!(dials(&[1, 2], 200, 0, 100), 2, "once in 50 s");
        assert_eq!(dials(&[1, 2], 1, 600, 720), 10, "after 10 minutes every 12 s");
        let day = GIVE_UP.as_secs();
        assert_eq!(dials(&[1, 2], 1, day, day + 3_600), 0);
    }

    #[test]
    fn who_came_to_be_too_far_is_drawn_nearer_for_a_while() {
        let mut reunion = Reunion::default();
        assert!(!reunion.are_too_far(0, seconds(1_000)));
        assert!(reunion.are_too_far(6, seconds(1_002)) && reunion.are_too_far(6, seconds(1_011)));
        assert!(!reunion.are_too_far(6, seconds(1_012)), "nothing helps");
        assert!(!reunion.are_too_far(2, seconds(1_014)));
        assert!(reunion.are_too_far(3, seconds(1_016)));
        assert!(!reunion.are_too_far(0, seconds(1_018)));
    }

    #[test]
    fn who_comes_to_be_too_far_again_and_again_is_not_drawn_nearer_for_ever() {
        let mut reunion = Reunion::default();
        let mut draws = |count, at_s| reunion.are_too_far(count, seconds(1_000 + at_s));
        let drawn = (0..300).step_by(2).filter(|at| draws(1 + at / 2 % 2, *at as u64));
        let drawn: Vec<usize> = drawn.collect();
        assert_eq!(drawn.last(), Some(&58), "{drawn:?}");
        assert!(draws(3, 320), "it was quiet for long enough");
    }

    #[test]
    fn who_was_missed_last_is_sought_most() {
        let mut reunion = Reunion::default();
        reunion.poll([node(1), node(2), node(3)].into_iter(), 1, || 0.0, seconds(1_000));
        let all = || [node(1), node(2), node(3), node(9)].into_iter();
        assert_eq!(reunion.poll(all(), 1, || 0.0, seconds(1_010)), Some(node(9)));
        assert_eq!(reunion.poll(all(), 1, || 0.4, seconds(1_020)), Some(node(9)));
        assert_eq!(reunion.poll(all(), 1, || 1.0, seconds(1_030)), Some(node(1)));
        assert_eq!(reunion.poll([].into_iter(), 4, || 0.0, seconds(1_040)), None);
    }
}
