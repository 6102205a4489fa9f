//! The local control API: HTTP with JSON on `<data-dir>/api.sock` (mode 0600), for the command
//! line and for scripts; what a monitoring system reads, also on an address where one is set. The only
//! JSON types of the control plane are in [`types`].

mod client;
mod explain;
mod learning;
mod metrics;
mod names;
mod network;
mod publishing;
mod reach;
mod reachable;
mod server;
mod service;
mod trace;
mod trouble;
mod tunnel;
pub mod types;

pub use client::{Client, ClientError};
pub use metrics::{MetricsError, MetricsServer};
pub use server::{Server, ServerError};

/// Name of the socket within the data directory.
pub const SOCKET: &str = "api.sock";
