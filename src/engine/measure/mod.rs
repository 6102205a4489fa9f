//! Measure: what was observed ([`Sample`]), and what it says about links ([`QualityMonitor`])
//! and routes ([`RouteHistories`]).

pub mod link;
pub mod prober;
mod route;
mod sample;
mod window;

/// Statistics over a window of values, shared by the features and their offline twin.
pub mod window_statistics {
    pub use super::window::{ln_ratio, mean, mean_absolute_difference, quantile};
}

pub use link::{LinkQuality, LinkReport, LinkState, QualityMonitor};
pub use route::{HISTORY_WINDOW, ROUTE_DEAD_AFTER, RouteHistories, RouteHistory};
pub use sample::{EventKind, ProbeKind, Sample};
pub use window::Window;
