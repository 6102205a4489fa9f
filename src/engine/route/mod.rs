//! Score and route: which paths exist ([`graph`], [`path`]), what each is worth ([`score`]),
//! when to change ([`switching`]), and the router that ties them together ([`router`]).

pub mod graph;
pub mod path;
pub mod router;
pub mod score;
pub mod switching;

pub use graph::{OverlayGraph, Topology};
pub use router::{Candidate, Decision, Destination, IntelligentRouter, PathPolicy};
pub use score::ScoreWeights;
pub use switching::{Reason, SwitchingPolicy};
