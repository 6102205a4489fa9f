//! Score and route: which paths exist ([`graph`], [`path`]), what each is worth ([`score`]),
//! when to change ([`switching`]), the router that ties them together ([`router`]), and what would
//! have to be otherwise for another choice ([`counterfactual()`]).

mod counterfactual;
pub mod graph;
pub mod path;
pub mod router;
pub mod score;
pub mod switching;

pub use counterfactual::{Counterfactual, counterfactual};
pub use graph::{OverlayGraph, Topology};
pub use router::{Candidate, Decision, Destination, IntelligentRouter, PathPolicy};
pub use score::ScoreWeights;
pub use switching::{Reason, SwitchingPolicy};
