//! Exploration: now and then a tunnel takes a route that is nearly as good, so that the log of
//! decisions tells something of the routes that are not chosen, and other models can be judged on it.
//!
//! The rule:
//! - Off, unless the operator names a share of decisions, at most [`EXPLORE_MAX`].
//! - Only a decision that would stay on the route in use explores. Who moves, has lost the route, is
//!   held back, has a fixed path or wants bandwidth set aside does not.
//! - Only candidates that live are drawn, against which no more speaks than against the route in
//!   use, that are not held, whose bound is at most [`BOUND_FACTOR`] times and whose score at least
//!   [`SCORE_SHARE`] of that one's.
//! - The route in use keeps the probability `1 - share`; the others divide the share evenly. The
//!   probability of each candidate is logged with every decision, before anything is drawn.
//! - The next decision begins where the tunnel was: it returns, unless there is another reason to be
//!   elsewhere, and the time for which that route was kept goes on as if nothing had happened.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::candidate::Candidate;

/// Largest share of decisions that may explore: beyond a tenth, traffic would pay for the log.
pub const EXPLORE_MAX: f64 = 0.1;
/// How much slower than the route in use a drawn one may be forecast to be. A guess: what most
/// connections do not notice for one interval between decisions.
pub const BOUND_FACTOR: f64 = 1.25;
/// Share of that one's score that a drawn one has at least, so that neither loss nor a narrow link is
/// drawn. A guess.
pub const SCORE_SHARE: f64 = 0.9;

/// Draws.
pub(super) struct Explorer {
    share: f64,
    random: Pcg64Mcg,
}

impl Explorer {
    /// Explores in a share of the decisions, 0 to [`EXPLORE_MAX`].
    pub(super) fn new(share: f64, seed: u64) -> Self {
        let share = if share > 0.0 { share.min(EXPLORE_MAX) } else { 0.0 };
        Self { share, random: Pcg64Mcg::seed_from_u64(seed) }
    }

    /// Notes with which probability each candidate is taken, and returns the one that is: `usual`, or
    /// one that was drawn instead where the decision `may` explore.
    pub(super) fn draw(&mut self, candidates: &mut [Candidate], usual: usize, may: bool) -> usize {
        let others: Vec<usize> = match may && self.share > 0.0 {
            true => {
                let fit = |at: &usize| {
                    *at != usual && is_nearly_as_good(&candidates[*at], &candidates[usual])
                };
                (0..candidates.len()).filter(fit).collect()
            }
            false => Vec::new(),
        };
        candidates[usual].propensity = 1.0;
        if others.is_empty() {
            return usual;
        }
        candidates[usual].propensity = 1.0 - self.share;
        let each = self.share / others.len() as f64;
        others.iter().for_each(|other| candidates[*other].propensity = each);
        let draw: f64 = self.random.random();
        // Rounding may reach the end of the list.
        let at = ((draw / each) as usize).min(others.len() - 1);
        if draw < self.share { others[at] } else { usual }
    }
}

fn is_nearly_as_good(other: &Candidate, usual: &Candidate) -> bool {
    let (Some(other_ms), Some(usual_ms)) = (other.bound_ms, usual.bound_ms) else { return false };
    other.alive
        && !other.standing.held
        && other.standing <= usual.standing
        && other_ms <= usual_ms * BOUND_FACTOR
        && other.score >= usual.score * SCORE_SHARE
}
