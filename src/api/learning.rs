//! What `GET /v1/status` says about models.

use serde::{Deserialize, Serialize};

use crate::engine::predict::watch::LiveLoss;
use crate::learn::Change;
use crate::node::View;

/// The life of the models on this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Learning {
    /// Version of the model that decides; none when the moving average does.
    pub champion: Option<String>,
    /// Version of the model in shadow.
    pub challenger: Option<String>,
    /// The champion beside the moving average, on route measurements since it decides.
    pub champion_live: Option<LiveLoss>,
    /// The challenger beside the moving average, on route measurements since it is in shadow.
    pub challenger_live: Option<LiveLoss>,
    /// Whether a scheduled training runs now.
    pub training: bool,
    /// The last promotion or roll-back.
    pub last_change: Option<Change>,
    /// How often the errors of a champion drifted since the start.
    pub drift_alerts: u64,
    /// When last (µs since the epoch).
    pub last_drift_us: Option<u64>,
}

impl Learning {
    /// From the node's state.
    pub fn of(view: &View<'_>) -> Self {
        let watch = view.engine.predictor().watch();
        let (drift_alerts, drifted_at) = watch.drifts();
        let live = |loss: LiveLoss| (loss.probes > 0).then_some(loss);
        Self {
            champion: view.model.map(|(version, _)| version.clone()),
            challenger: view.challenger.cloned(),
            champion_live: live(watch.champion()),
            challenger_live: live(watch.challenger()),
            training: view.training,
            last_change: view.last_change.cloned(),
            drift_alerts,
            last_drift_us: drifted_at.map(|at| at.as_micros()),
        }
    }
}
