//! One integration binary: simulated worlds, the rules of the tree, and (with the default
//! features) real nodes on loopback.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod churn;
mod churning;
mod decoders;
mod health;
mod honesty;
mod hostile;
mod sim;
mod tidy;
mod worlds;

#[cfg(feature = "node")]
mod bootstrap;
#[cfg(feature = "node")]
mod cli;
#[cfg(feature = "node")]
mod doctor;
#[cfg(feature = "node")]
mod entry;
#[cfg(feature = "node")]
mod failover;
#[cfg(feature = "node")]
mod hints;
#[cfg(feature = "node")]
mod judging;
#[cfg(feature = "node")]
mod links;
#[cfg(feature = "node")]
mod membership;
#[cfg(feature = "node")]
mod mesh;
#[cfg(feature = "node")]
mod metrics;
#[cfg(feature = "node")]
mod nat;
#[cfg(feature = "node")]
mod networks;
#[cfg(feature = "node")]
mod processes;
#[cfg(feature = "node")]
mod registry;
#[cfg(feature = "node")]
mod replay;
#[cfg(feature = "node")]
mod replicas;
#[cfg(feature = "node")]
mod support;
