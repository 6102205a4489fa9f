//! Measure: what was observed ([`Sample`]), and what it says about this node's links
//! ([`QualityMonitor`]), about every link that is advertised ([`LinkHistories`]), about routes
//! ([`RouteHistories`]), about relays ([`Honesty`]) and about services ([`ServiceMonitor`]).

mod advertised;
pub mod churn;
mod coordinates;
mod honesty;
pub mod link;
pub mod prober;
pub mod quarantine;
mod route;
mod sample;
pub mod service;
mod statistics;
pub mod suspects;
mod window;
pub mod worth;

/// Statistics over a window of values, shared by the features and their offline twin.
pub mod window_statistics {
    pub use super::window::{ln_ratio, mean, mean_absolute_difference, quantile};
}

pub use advertised::{LinkHistories, LinkHistory};
pub use coordinates::Coordinates;
pub use honesty::Honesty;
pub use link::{LinkQuality, LinkReport, LinkState, QualityMonitor};
pub use route::{
    HISTORY_WINDOW, ROUTE_DEAD_AFTER, RouteHistories, RouteHistory, RouteReport, end_to_end_loss,
};
pub use sample::{EventKind, ProbeKind, Sample};
pub use service::{Health, HealthCheck, HealthPolicy, ServiceMonitor, Vantage};
pub use statistics::{STATISTICS, Statistics, WINDOW};
pub use suspects::Suspects;
pub use window::Window;
