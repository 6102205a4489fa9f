//! What `GET /v1/status` says about models.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::engine::predict::watch::LiveLoss;
use crate::engine::predict::{Centre, EXPERTS, LiveDelivery, Mix, Ranking, RoutePredictor};
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
    /// The champion's forecasts of delivery beside what was measured, on completed route probes; none
    /// before any. They count while they keep up.
    pub delivery_live: Option<LiveDelivery>,
    /// The mix of the champion with the baselines, over all destinations; none without a champion.
    pub mix: Option<MixFigures>,
    /// The destination where the mix did worst beside the moving average, and the mix there.
    pub worst_mix: Option<WorstMix>,
    /// How routes are compared.
    pub rule: Rule,
    /// Whether a scheduled training runs now.
    pub training: bool,
    /// The last promotion or roll-back.
    pub last_change: Option<Change>,
    /// Features that look otherwise than where the champion was trained, with their population
    /// stability index, the largest first; as the newest training found.
    pub features_shifted: Vec<(String, f64)>,
    /// How often the errors of a champion drifted since the start.
    pub drift_alerts: u64,
    /// When last (µs since the epoch).
    pub last_drift_us: Option<u64>,
}

/// How routes are compared, and what that follows from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rule {
    /// What routes are compared by: forecast, level, mean, cautious or blend.
    pub centre: Centre,
    /// So many of its usual errors are added to that.
    pub pessimism: f64,
    /// Share by which the route to beat counts as faster: the direct one, or else the one in use.
    pub margin: f64,
    /// Choices whose outcomes this node learned its rule from.
    pub choices: u32,
    /// Weight of what the model foresees beyond the level of the newest round trips, 0 to 1: how much of
    /// that came true. Counts while the centre is blend.
    pub foresight: f64,
    /// How much round trips change from one to the next (mean absolute ln ratio).
    pub volatility: f64,
}

impl Rule {
    fn of(predictor: &RoutePredictor) -> Self {
        let (Ranking { centre, pessimism, margin, .. }, comparing) =
            (predictor.ranking(), predictor.comparing());
        Self {
            centre,
            pessimism,
            margin,
            choices: comparing.choices(),
            foresight: comparing.foresight(),
            volatility: comparing.volatility(),
        }
    }
}

/// A mix of forecasts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MixFigures {
    /// Weight of each forecaster by name; they sum to 1.
    pub weights: BTreeMap<String, f64>,
    /// By how much its summed loss can exceed the moving average's so far (ln units).
    pub slack_ln: f64,
    /// By how much it does; below 0 when the mix did better.
    pub excess_ln: f64,
    /// Round trips that it learned from.
    pub probes: u64,
}

/// The mix for one destination.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorstMix {
    /// Node id.
    pub destination: String,
    /// Its mix.
    #[serde(flatten)]
    pub mix: MixFigures,
}

impl MixFigures {
    fn of(mix: &Mix) -> Self {
        let weights = EXPERTS.iter().zip(mix.weights());
        Self {
            weights: weights.map(|(name, weight)| ((*name).to_owned(), weight)).collect(),
            slack_ln: mix.slack(),
            excess_ln: mix.excess(),
            probes: mix.rounds(),
        }
    }
}

/// What has shifted since the training of the champion that decides now.
fn shifted(view: &View<'_>) -> Option<Vec<(String, f64)>> {
    let (version, _) = view.model?;
    Some(view.shift.filter(|shift| shift.version == *version)?.features.clone())
}

/// What mixes the champion's forecasts; `None` while nothing is mixed.
fn mixes(predictor: &RoutePredictor) -> Option<(MixFigures, Option<WorstMix>)> {
    predictor.model()?;
    let streams = predictor.streams();
    let worst = streams.worst().map(|(destination, mix)| WorstMix {
        destination: destination.to_string(),
        mix: MixFigures::of(mix),
    });
    Some((MixFigures::of(streams.all()), worst))
}

impl Learning {
    /// From the node's state.
    pub fn of(view: &View<'_>) -> Self {
        let predictor = view.engine.predictor();
        let watch = predictor.watch();
        let (mix, worst_mix) = mixes(predictor).unzip();
        let delivery = predictor.delivery().live();
        let (drift_alerts, drifted_at) = watch.drifts();
        let live = |loss: LiveLoss| (loss.probes > 0).then_some(loss);
        Self {
            champion: view.model.map(|(version, _)| version.clone()),
            challenger: view.challenger.cloned(),
            champion_live: live(watch.champion()),
            challenger_live: live(watch.challenger()),
            delivery_live: (delivery.probes > 0).then_some(delivery),
            mix,
            worst_mix: worst_mix.flatten(),
            rule: Rule::of(predictor),
            training: view.training,
            last_change: view.last_change.cloned(),
            features_shifted: shifted(view).unwrap_or_default(),
            drift_alerts,
            last_drift_us: drifted_at.map(|at| at.as_micros()),
        }
    }
}
