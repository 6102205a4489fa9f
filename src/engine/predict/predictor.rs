//! The predictor that keeps a model honest by always asking the baselines too.
//!
//! The champion's forecast is mixed with the baselines' by how well each did of late on the routes to
//! the same node, and its interval is stretched until it holds what it promises ([`Streams`]). The
//! challenger is asked beside it and never decides: its forecasts are kept, so that it can be judged on them.
//! When the [`Watch`] finds the champion worse than the moving average, it is dropped at once. Its
//! forecasts of delivery count while they keep up with what was measured ([`DeliveryWatch`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::baseline::{LastValue, Level, MovingAverage};
use super::comparing::Comparing;
use super::delivery::{DeliveryWatch, measured};
use super::mix::EXPERTS;
use super::model::{Prediction, QualityModel};
use super::ranking::{Prospect, Ranking};
use super::schema::FeatureVector;
use super::streams::{Mixed, Streams};
use super::watch::{Alarm, Expected, Watch};
use crate::engine::measure::RouteHistory;
use crate::engine::measure::prober::OUTSTANDING_MAX;
use crate::engine::types::{NodeId, Route, Timestamp};

/// What is forecast for one route, by everyone asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// The features that the forecasts are made from.
    pub features: FeatureVector,
    /// The trained model's forecast; `None` without a model, when it is switched off or failed.
    pub model: Option<Prediction>,
    /// The model's mixed with the baselines', which decides; `None` as for `model`.
    pub mixed: Option<Prediction>,
    /// That of the model in shadow, which never decides; `None` as for `model`.
    pub challenger: Option<Prediction>,
    /// The moving average's.
    pub moving_average: Option<Prediction>,
    /// The last value's.
    pub last_value: Option<Prediction>,
}

impl Forecast {
    /// What was learned says: the mixed forecast, `None` as for `model`.
    pub fn learned(&self) -> Option<Prediction> {
        self.mixed.or(self.model)
    }

    /// The forecast that the router acts on: the learned one, else the moving average's.
    pub fn best(&self) -> Option<Prediction> {
        self.learned().or(self.moving_average)
    }
}

/// What was said of a probe that is on its way.
#[derive(Clone, Copy, Debug)]
struct Said {
    destination: NodeId,
    mixed: Option<Mixed>,
    /// Probability that it comes back, by the model and by what was measured.
    delivery: Option<(f64, f64)>,
}

/// What the experts of the mix say, ln(ms).
fn experts(model: Option<&Prediction>, features: &FeatureVector) -> [Option<f64>; EXPERTS.len()] {
    let ln = |prediction: Prediction| prediction.latency_ms.ln();
    [
        model.copied().map(ln),
        MovingAverage.predict(features).map(ln),
        LastValue.predict(features).map(ln),
        Level.predict(features).map(ln),
    ]
}

/// How far a model's interval reaches below and above its forecast, ln.
fn offsets(prediction: &Prediction) -> Option<(f64, f64)> {
    let (low, high) = prediction.interval_ms?;
    Some(((low / prediction.latency_ms).ln(), (high / prediction.latency_ms).ln()))
}

/// The trained model in use, if any, beside the baselines that are always there.
#[derive(Clone)]
pub struct RoutePredictor {
    model: Option<Arc<dyn QualityModel>>,
    challenger: Option<Arc<dyn QualityModel>>,
    enabled: bool,
    failures: u64,
    watch: Watch,
    streams: Streams,
    delivery: DeliveryWatch,
    said: BTreeMap<Timestamp, Said>,
    comparing: Comparing,
}

impl RoutePredictor {
    /// Without a model. `enabled` is the operator's switch: when off, no model is asked.
    pub fn new(enabled: bool) -> Self {
        Self {
            model: None,
            challenger: None,
            enabled,
            failures: 0,
            watch: Watch::default(),
            streams: Streams::default(),
            delivery: DeliveryWatch::default(),
            said: BTreeMap::new(),
            comparing: Comparing::default(),
        }
    }

    /// Replaces the model; `None` goes back to the moving average.
    pub fn set_model(&mut self, model: Option<Arc<dyn QualityModel>>) {
        self.model = model;
        self.comparing.model_replaced();
        self.watch.champion_replaced();
        // What was learned of one model's errors is not another's.
        self.streams = Streams::default();
        self.delivery = DeliveryWatch::default();
        self.said.clear();
    }

    /// Replaces the model in shadow; `None` for none.
    pub fn set_challenger(&mut self, challenger: Option<Arc<dyn QualityModel>>) {
        self.challenger = challenger;
        self.watch.challenger_replaced();
    }

    /// Version of the model that decides now; `moving-average` without one.
    pub fn version(&self) -> String {
        match &self.model {
            Some(model) if self.enabled => model.version().to_owned(),
            _ => MovingAverage.version().to_owned(),
        }
    }

    /// How routes are to be compared: with the switch off, by the moving average as it is.
    pub fn ranking(&self) -> Ranking {
        if self.enabled { self.comparing.rule() } else { Ranking::PLAIN }
    }

    /// How routes are compared, and what is learned of that.
    pub fn comparing(&self) -> &Comparing {
        &self.comparing
    }

    /// The same, to be told of links and outcomes.
    pub fn comparing_mut(&mut self) -> &mut Comparing {
        &mut self.comparing
    }

    /// What a route is compared by, by its links or its own `history` at `now`; `None` without a forecast.
    pub fn prospect(
        &self,
        route: &Route,
        history: Option<&RouteHistory>,
        forecast: &Forecast,
        now: Timestamp,
    ) -> Option<Prospect> {
        let known = self.enabled.then(|| self.comparing.prospect(route, history, now)).flatten();
        self.compared(known, forecast)
    }

    /// The same of what is `known` already.
    pub fn compared(&self, known: Option<Prospect>, forecast: &Forecast) -> Option<Prospect> {
        let best = forecast.best()?;
        let usual_ms = self.comparing.volatility() * best.latency_ms;
        let known = known.unwrap_or_else(|| Prospect::certain(best.latency_ms, usual_ms));
        let spread_ms = best.scale.map(|scale| scale * best.latency_ms);
        let foresight = forecast.learned().map(|_| self.comparing.foresight());
        Some(known.foreseeing(best.latency_ms, spread_ms, foresight))
    }

    /// These routes were weighed for a tunnel to `destination`; `stay` is the one that another had to beat.
    pub fn offered(
        &mut self,
        destination: NodeId,
        now: Timestamp,
        offers: impl IntoIterator<Item = (Route, Prospect)>,
        stay: Option<usize>,
    ) {
        if self.enabled {
            self.comparing.offered(destination, now, offers, stay);
        }
    }

    /// Version of the model in shadow that is asked now.
    pub fn challenger_version(&self) -> Option<String> {
        let challenger = self.challenger.as_ref().filter(|_| self.enabled);
        challenger.map(|model| model.version().to_owned())
    }

    /// How both models do beside the moving average.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// What was learned of the champion's errors, by destination.
    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// How forecasts of delivery do beside what was measured.
    pub fn delivery(&self) -> &DeliveryWatch {
        &self.delivery
    }

    /// The model that decides now; `None` without one, or when it is switched off.
    pub fn model(&self) -> Option<Arc<dyn QualityModel>> {
        self.model.clone().filter(|_| self.enabled)
    }

    /// Forecasts of the model that were missing or absurd and were replaced by the moving
    /// average.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// Asks the model and the baselines about a route to `destination`.
    pub fn forecast(&mut self, destination: NodeId, features: FeatureVector) -> Forecast {
        let moving_average = MovingAverage.predict(&features);
        let model = match &self.model {
            // Without any history there is nothing that the model was trained on.
            Some(model) if self.enabled && moving_average.is_some() => {
                let prediction = ask(model, &features);
                if prediction.is_none() {
                    self.failures += 1;
                }
                prediction.map(|prediction| Prediction {
                    delivery: prediction.delivery.filter(|_| self.delivery.allows()),
                    ..prediction
                })
            }
            _ => None,
        };
        let challenger = self.challenger.as_ref().filter(|_| self.enabled);
        let challenger = challenger.filter(|_| moving_average.is_some());
        Forecast {
            features,
            model,
            mixed: model.and_then(|model| self.mixed(destination, model, &features)),
            challenger: challenger.and_then(|challenger| ask(challenger, &features)),
            moving_average,
            last_value: LastValue.predict(&features),
        }
    }

    fn mixed(
        &self,
        destination: NodeId,
        model: Prediction,
        features: &FeatureVector,
    ) -> Option<Prediction> {
        let experts = experts(Some(&model), features);
        let mixed = self.streams.mix(destination, experts, offsets(&model))?;
        let latency_ms = mixed.ln.exp();
        let interval_ms = mixed.interval.map(|(low, high)| (low.exp(), high.exp()));
        let bound_ms = latency_ms * (model.bound_ms / model.latency_ms);
        Some(Prediction { latency_ms, interval_ms, bound_ms, ..model })
    }

    /// A route probe to `destination` leaves at `sent_at`: keeps what the models expect of it.
    /// `features` is called only when there is a model to ask.
    pub fn probe_sent(
        &mut self,
        sent_at: Timestamp,
        destination: NodeId,
        features: impl FnOnce() -> FeatureVector,
    ) {
        if !self.enabled || (self.model.is_none() && self.challenger.is_none()) {
            return;
        }
        let features = features();
        let Some(moving_average) = MovingAverage.predict(&features) else { return };
        let asked = |model: &Option<Arc<dyn QualityModel>>| {
            model.as_ref().map(|model| ask(model, &features))
        };
        let champion = asked(&self.model);
        let ms = |prediction: Option<Prediction>| prediction.map(|p| p.latency_ms);
        let expected = Expected {
            moving_average_ms: moving_average.latency_ms,
            champion: champion.map(ms),
            challenger: asked(&self.challenger).map(ms),
        };
        if let Some(prediction) = champion {
            if self.said.len() >= OUTSTANDING_MAX {
                self.said.pop_first();
            }
            let prediction = prediction.as_ref();
            let experts = experts(prediction, &features);
            let said = Said {
                destination,
                mixed: self.streams.mix(destination, experts, prediction.and_then(offsets)),
                delivery: prediction.and_then(|said| said.delivery.zip(measured(&features))),
            };
            self.said.insert(sent_at, said);
        }
        self.watch.sent(sent_at, expected);
    }

    /// A route probe that left at `sent_at` came back after `rtt_us`, or was lost. Returns the
    /// version of the model that an alarm is about; on [`Alarm::Worse`] it no longer decides.
    pub fn probe_completed(
        &mut self,
        sent_at: Timestamp,
        rtt_us: Option<u64>,
        now: Timestamp,
    ) -> Option<(String, Alarm)> {
        self.learn(sent_at, rtt_us);
        let alarm = self.watch.completed(sent_at, rtt_us, now)?;
        let version = self.version();
        if matches!(alarm, Alarm::Worse(_)) {
            self.set_model(None);
        }
        Some((version, alarm))
    }
}

impl RoutePredictor {
    /// Mix and interval learn from a round trip; a lost probe says nothing about latency, but about
    /// delivery.
    fn learn(&mut self, sent_at: Timestamp, rtt_us: Option<u64>) {
        let Some(said) = self.said.remove(&sent_at) else { return };
        if let Some((forecast, measured)) = said.delivery {
            self.delivery.observe(forecast, measured, rtt_us.is_some());
        }
        let Some(truth) = rtt_us.map(|us| (us.max(1) as f64 / 1e3).ln()) else { return };
        if let Some(mixed) = &said.mixed {
            self.streams.observe(said.destination, truth, mixed);
        }
    }
}

/// A forecast that is believed.
fn ask(model: &Arc<dyn QualityModel>, features: &FeatureVector) -> Option<Prediction> {
    model.predict(features).filter(Prediction::is_sane)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::{FEATURES, MISSING, index_of};

    const THERE: NodeId = NodeId([9; 8]);

    struct Constant(f64);

    impl QualityModel for Constant {
        fn version(&self) -> &str {
            "constant"
        }

        fn predict(&self, _: &FeatureVector) -> Option<Prediction> {
            Some(Prediction::of_latency(self.0))
        }
    }

    fn features() -> FeatureVector {
        let mut features = [MISSING; FEATURES.len()];
        features[index_of("route_mean5_ms").unwrap()] = 30.0;
        features
    }

    #[test]
    fn the_model_decides_and_the_baseline_stands_beside_it() {
        let mut predictor = RoutePredictor::new(true);
        assert_eq!(predictor.version(), "moving-average");
        predictor.set_model(Some(Arc::new(Constant(20.0))));
        let forecast = predictor.forecast(THERE, features());
        assert_eq!(forecast.model.unwrap().latency_ms, 20.0);
        let mixed = forecast.best().unwrap().latency_ms;
        assert!(20.0 < mixed && mixed < 30.0, "nobody has shown anything yet: {mixed}");
        assert_eq!(forecast.moving_average.unwrap().latency_ms, 30.0);
        assert_eq!(predictor.version(), "constant");
    }

    #[test]
    fn the_mix_follows_who_is_right() {
        let mut predictor = RoutePredictor::new(true);
        predictor.set_model(Some(Arc::new(Constant(20.0))));
        for (rtt_us, expected) in [(20_000, 20.0), (30_000, 30.0)] {
            for at in 0..400 {
                predictor.probe_sent(Timestamp(at), THERE, features);
                predictor.probe_completed(Timestamp(at), Some(rtt_us), Timestamp(at));
                if predictor.version() != "constant" {
                    break;
                }
            }
            let best = predictor.forecast(THERE, features()).best().unwrap().latency_ms;
            assert!((best - expected).abs() < 0.5, "{best}, {expected}");
        }
        assert!(predictor.said.is_empty());
    }

    #[test]
    fn an_absurd_model_is_replaced_by_the_moving_average_and_counted() {
        for absurd in [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e9] {
            let mut predictor = RoutePredictor::new(true);
            predictor.set_model(Some(Arc::new(Constant(absurd))));
            assert_eq!(predictor.forecast(THERE, features()).best().unwrap().latency_ms, 30.0);
            assert_eq!(predictor.failures(), 1);
        }
    }

    #[test]
    fn the_challenger_is_asked_and_never_decides() {
        let mut predictor = RoutePredictor::new(true);
        predictor.set_challenger(Some(Arc::new(Constant(20.0))));
        let forecast = predictor.forecast(THERE, features());
        assert_eq!(forecast.challenger.unwrap().latency_ms, 20.0);
        assert_eq!((forecast.model, forecast.best().unwrap().latency_ms), (None, 30.0));
        assert_eq!(predictor.version(), "moving-average");
        assert_eq!(predictor.challenger_version().as_deref(), Some("constant"));
        predictor.set_model(Some(Arc::new(Constant(25.0))));
        assert_eq!(predictor.forecast(THERE, features()).model.unwrap().latency_ms, 25.0);
        predictor.set_challenger(Some(Arc::new(Constant(f64::NAN))));
        assert_eq!(predictor.forecast(THERE, features()).challenger, None);
        assert_eq!(predictor.failures(), 0, "only what decides can fail");
    }

    #[test]
    fn a_model_that_is_worse_than_the_moving_average_stops_deciding() {
        for (bad, both_ms) in [(60.0, 30_000), (f64::NAN, 30_000)] {
            let mut predictor = RoutePredictor::new(true);
            predictor.set_model(Some(Arc::new(Constant(bad))));
            predictor.set_challenger(Some(Arc::new(Constant(30.0))));
            let mut alarms = Vec::new();
            for at in 0..1_000 {
                predictor.probe_sent(Timestamp(at), THERE, features);
                alarms.extend(predictor.probe_completed(
                    Timestamp(at),
                    Some(both_ms),
                    Timestamp(at + 1),
                ));
            }
            let [(version, Alarm::Worse(loss))] = &alarms[..] else { panic!("{alarms:?}") };
            assert_eq!((version.as_str(), loss.moving_average_ln), ("constant", 0.0));
            assert_eq!(predictor.version(), "moving-average");
            assert_eq!(predictor.forecast(THERE, features()).best().unwrap().latency_ms, 30.0);
            assert!(predictor.watch().challenger().probes > 900, "it is watched on");
        }
    }

    #[test]
    fn features_are_not_computed_for_nobody() {
        let mut predictor = RoutePredictor::new(true);
        predictor.probe_sent(Timestamp(1), THERE, || panic!("nobody asks"));
        let mut off = RoutePredictor::new(false);
        off.set_model(Some(Arc::new(Constant(20.0))));
        off.set_challenger(Some(Arc::new(Constant(20.0))));
        off.probe_sent(Timestamp(1), THERE, || panic!("nobody asks"));
        assert_eq!(off.forecast(THERE, features()).challenger, None);
        assert_eq!(off.challenger_version(), None);
    }

    /// Forecasts 30 ms, and that a tenth is lost.
    struct Lossy;

    impl QualityModel for Lossy {
        fn version(&self) -> &str {
            "lossy"
        }

        fn predict(&self, _: &FeatureVector) -> Option<Prediction> {
            Some(Prediction { delivery: Some(0.9), ..Prediction::of_latency(30.0) })
        }
    }

    #[test]
    fn a_forecast_of_loss_is_dropped_where_nothing_is_lost() {
        for (lost_one_in, kept) in [(10, Some(0.9)), (u64::MAX, None)] {
            let mut predictor = RoutePredictor::new(true);
            predictor.set_model(Some(Arc::new(Lossy)));
            let features = || {
                let mut features = features();
                features[index_of("link_loss").unwrap()] = 0.0;
                features
            };
            assert_eq!(predictor.forecast(THERE, features()).best().unwrap().delivery, Some(0.9));
            for at in 1..=400 {
                predictor.probe_sent(Timestamp(at), THERE, features);
                let rtt_us = (at % lost_one_in > 0).then_some(30_000);
                predictor.probe_completed(Timestamp(at), rtt_us, Timestamp(at));
            }
            assert_eq!(predictor.forecast(THERE, features()).best().unwrap().delivery, kept);
            assert_eq!(predictor.delivery().live().probes, 400);
            predictor.set_model(Some(Arc::new(Lossy)));
            assert_eq!(predictor.forecast(THERE, features()).best().unwrap().delivery, Some(0.9));
        }
    }

    #[test]
    fn the_switch_turns_the_model_off() {
        let mut predictor = RoutePredictor::new(false);
        predictor.set_model(Some(Arc::new(Constant(20.0))));
        assert_eq!(predictor.forecast(THERE, features()).best().unwrap().latency_ms, 30.0);
        assert_eq!(predictor.version(), "moving-average");
    }
}
