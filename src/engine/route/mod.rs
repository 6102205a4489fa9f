//! Score and route: which paths exist ([`graph`], [`path`], [`finding`]), what each is worth ([`score`],
//! [`candidate`]), when to change ([`switching`]), when to try another one ([`explore`]), the router that
//! ties them together ([`router`], [`destination`]), and what would have to be otherwise for another choice
//! ([`counterfactual()`]).

pub mod candidate;
mod counterfactual;
pub mod destination;
pub mod explore;
pub mod finding;
pub mod graph;
pub mod path;
pub mod router;
pub mod score;
pub mod switching;
#[cfg(test)]
mod tests;

pub use candidate::{Candidate, Decision, Overlap, Standing, Wanted};
pub use counterfactual::{Counterfactual, counterfactual};
pub use destination::{Destination, Reservation, ReservationState};
pub use graph::{OverlayGraph, Topology};
pub use router::{IntelligentRouter, PathPolicy};
pub use score::ScoreWeights;
pub use switching::{Reason, SwitchingPolicy};
