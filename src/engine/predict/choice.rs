//! Choices whose outcomes became known: what the rules of comparing routes are judged by.
//!
//! They leave the engine as [`Output::Choice`](crate::engine::Output::Choice), and a node that
//! starts again learns from those that it has stored ([`Comparing::remember`](super::Comparing::remember)).

use super::ranking::Prospect;
use crate::engine::types::{NodeId, Route, Timestamp};

/// Newest choices that a node learns from again when it starts: with tunnels to eight destinations those of
/// five hours.
pub const CHOICES_REMEMBERED_MAX: usize = 5_000;

/// One route of a choice.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownOffer {
    /// The route.
    pub route: Route,
    /// What it was compared by.
    pub prospect: Prospect,
    /// What the first probe over it took that left later (ms); of one that was lost, as much as the slowest.
    pub outcome_ms: f64,
}

/// A choice of which it is known what each route would have cost.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownChoice {
    /// When the routes were weighed.
    pub at: Timestamp,
    /// Where to.
    pub destination: NodeId,
    /// How much round trips changed from value to value (mean absolute ln ratio), when the outcomes were known.
    pub volatility: f64,
    /// The routes; two or more.
    pub offers: Vec<KnownOffer>,
    /// Index of the one that another had to beat.
    pub stay: Option<usize>,
}

impl KnownChoice {
    /// Index of the direct route.
    pub fn direct(&self) -> Option<usize> {
        self.offers.iter().position(|offer| offer.route.hop_count() == 1)
    }
}
