//! From the registry to the engine without a restart: which champion and challenger the engine
//! has, and what the registry says now.

use std::sync::Arc;

use crate::engine::event::Input;
use crate::engine::predict::watch::LiveLoss;
use crate::engine::predict::{ForestModel, ModelCard, QualityModel};
use crate::engine::types::Timestamp;
use crate::learn::{Change, ModelRegistry, Shift};

/// The models that the engine has.
#[derive(Debug)]
pub(super) struct HotSwap {
    registry: Arc<ModelRegistry>,
    /// Whether the engine lets models decide.
    predicts: bool,
    /// Version and card of the champion in use.
    pub(super) champion: Option<(String, ModelCard)>,
    /// Version of the challenger in shadow.
    pub(super) challenger: Option<String>,
    /// Why the champion on disk is not in use.
    pub(super) error: Option<String>,
    /// The last promotion or roll-back.
    pub(super) last_change: Option<Change>,
    /// How far the features have shifted since a champion's training.
    pub(super) shift: Option<Shift>,
}

impl HotSwap {
    pub(super) fn new(registry: Arc<ModelRegistry>, predicts: bool) -> Self {
        Self {
            registry,
            predicts,
            champion: None,
            challenger: None,
            error: None,
            last_change: None,
            shift: None,
        }
    }

    /// What the engine has to be told after the registry changed; or why the champion cannot be
    /// used: then the one in use stays. A challenger that cannot be used is left out and logged.
    pub(super) fn load(&mut self) -> (Vec<Input>, Result<(), String>) {
        let mut inputs = Vec::new();
        match self.registry.history() {
            Ok(history) => {
                self.last_change = history.changes.back().cloned();
                self.shift = history.shift;
            }
            Err(error) => tracing::warn!("{error}"),
        }
        let champion = self.registry.champion().map_err(|error| error.to_string());
        self.error = champion.as_ref().err().cloned();
        let known = self.champion.as_ref().map(|(version, _)| version.clone());
        let result = champion.map(|champion| {
            if champion.as_ref().map(|model| &model.version) != known.as_ref() {
                let version = champion.as_ref().map(|model| model.version.as_str());
                match version.filter(|_| !self.predicts) {
                    Some(model) => tracing::info!(
                        version = "moving-average",
                        "decides from now on: prediction is off, {model} does not decide"
                    ),
                    None => tracing::info!(
                        version = version.unwrap_or("moving-average"),
                        "decides from now on"
                    ),
                }
                self.champion =
                    champion.as_ref().map(|model| (model.version.clone(), model.card.clone()));
                inputs.push(Input::Model(shared(champion)));
            }
        });
        let challenger = self.registry.challenger().unwrap_or_else(|error| {
            tracing::warn!("no challenger: {error}");
            None
        });
        let version = challenger.as_ref().map(|model| model.version.clone());
        if version != self.challenger {
            self.challenger = version;
            inputs.push(Input::Challenger(shared(challenger)));
        }
        (inputs, result)
    }

    /// The engine has dropped a model: takes it out of use in the registry too. Returns whether
    /// there may be another one to load.
    pub(super) fn withdrawn(&mut self, version: &str, loss: LiveLoss, now: Timestamp) -> bool {
        self.champion = None;
        let reason = format!(
            "its error over the last {} route measurements was {:.4} ln(ms), the moving average's \
             {:.4}; {} forecasts were missing or absurd",
            loss.probes, loss.model_ln, loss.moving_average_ln, loss.failures
        );
        tracing::warn!(version, "the model no longer decides: {reason}");
        match self.registry.champion_version() {
            Ok(Some(champion)) if champion == version => {}
            // Somebody has already chosen another one.
            _ => return true,
        }
        let back = self.registry.rollback(now.as_micros(), &reason);
        if let Err(error) = &back {
            tracing::warn!("the registry keeps it as champion: {error}");
        }
        back.is_ok()
    }
}

fn shared(model: Option<ForestModel>) -> Option<Arc<dyn QualityModel>> {
    model.map(|model| Arc::new(model) as Arc<dyn QualityModel>)
}
