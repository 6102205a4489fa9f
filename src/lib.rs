//! meshwise: a peer-to-peer routing node that forecasts route quality and routes real traffic on
//! the forecast.
//!
//! One loop: measure -> store -> features -> train -> predict -> score -> route -> forward ->
//! measure. The modules stand in that order. `engine` is the pure control plane; `node` and `sim`
//! are its two drivers.

pub mod engine;
pub mod sim;

#[cfg(feature = "node")]
pub mod api;
#[cfg(feature = "node")]
pub mod cli;
#[cfg(feature = "node")]
pub mod config;
#[cfg(feature = "node")]
pub mod learn;
#[cfg(feature = "node")]
pub mod net;
#[cfg(feature = "node")]
pub mod node;
#[cfg(feature = "node")]
pub mod replay;
#[cfg(feature = "node")]
pub mod store;
