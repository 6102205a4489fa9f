//! The life of the models of a replay: by the rules of a node (`learn::promotion`), without its
//! registry.
//!
//! A trained model waits as challenger and is judged just before the next one is trained, by the
//! node's own code: paired moving-block bootstrap of |ln error| on rows later than everything that
//! its training saw. The first one does not wait when its card says that it earns its place.

use super::ReplayError;
use super::meshwise::{ms_of_bandwidth, of_throughput};
use super::world::Quantity;
use crate::engine::predict::{FeatureVector, ForestModel, Prediction, QualityModel};
use crate::learn::promotion::judge;
use crate::learn::{LearnError, TrainConfig, TrainRow, train_rows};

/// The model that waits, and how many there were.
pub(super) struct Life {
    quantity: Quantity,
    challenger: Option<ForestModel>,
    /// Models that were trained.
    pub(super) trained: usize,
    /// Models that were put into use.
    pub(super) promoted: usize,
}

impl Life {
    pub(super) fn new(quantity: Quantity) -> Self {
        Self { quantity, challenger: None, trained: 0, promoted: 0 }
    }

    /// Judges the challenger on rows in order of time, then trains the next one. Returns the model
    /// to put into use, if that changes.
    ///
    /// # Errors
    /// [`ReplayError::Learn`] when training fails for another reason than too few rows.
    pub(super) fn train(
        &mut self,
        rows: &[TrainRow],
        champion: Option<&ForestModel>,
        config: &TrainConfig,
    ) -> Result<Option<ForestModel>, ReplayError> {
        let judged = self.challenger.take();
        let mut next = judged.filter(|challenger| self.is_better(rows, challenger, champion));
        let now_us = rows.last().map_or(0, |row| row.done_us);
        match train_rows(rows, config, now_us) {
            Ok(model) => {
                self.trained += 1;
                if champion.is_none() && next.is_none() && self.earns_its_place(&model) {
                    next = Some(model);
                } else {
                    self.challenger = Some(model);
                }
            }
            Err(LearnError::TooFewRows { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        self.promoted += usize::from(next.is_some());
        Ok(next)
    }

    fn is_better(
        &self,
        rows: &[TrainRow],
        challenger: &ForestModel,
        champion: Option<&ForestModel>,
    ) -> bool {
        let after_us = challenger.card.created_us;
        let rival = champion.map(|model| model as &dyn QualityModel);
        match self.quantity {
            Quantity::Latency => judge(rows, after_us, challenger, rival).promoted,
            Quantity::Throughput => {
                let costs: Vec<TrainRow> = rows.iter().copied().map(cost_of_bandwidth).collect();
                let rival = champion.map(OfThroughput);
                let rival = rival.as_ref().map(|model| model as &dyn QualityModel);
                judge(&costs, after_us, &OfThroughput(challenger), rival).promoted
            }
        }
    }

    fn earns_its_place(&self, model: &ForestModel) -> bool {
        match self.quantity {
            Quantity::Latency => model.card.earns_its_place(),
            Quantity::Throughput => {
                model.card.throughput.is_some_and(|card| card.earns_its_place())
            }
        }
    }
}

/// A row of throughput as one of latency: the time that a megabit takes.
fn cost_of_bandwidth(row: TrainRow) -> TrainRow {
    TrainRow { rtt_ms: row.bandwidth.map(ms_of_bandwidth), ..row }
}

/// The throughput head as a forecast of the time that a megabit takes.
struct OfThroughput<'a>(&'a ForestModel);

impl QualityModel for OfThroughput<'_> {
    fn version(&self) -> &str {
        &self.0.version
    }

    fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
        of_throughput(self.0.throughput.as_ref()?, features)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::{FEATURES, MISSING, index};
    use crate::learn::RouteKey;

    /// Rows once a second whose value is 20 or 80 by a rule on their number, and what was known of
    /// the past: the last value, and the number within a period of 6.
    fn rows(count: u64, high: fn(u64) -> bool, quantity: Quantity) -> Vec<TrainRow> {
        let value = |number| if high(number) { 80.0 } else { 20.0 };
        let row = |number: u64| {
            let mut features = [MISSING; FEATURES.len()];
            features[const { index("link_mean5_sum_ms") }] = 50.0;
            features[const { index("route_mean5_ms") }] = 50.0;
            features[const { index("link_bandwidth_min") }] = 1e6 / 40.0;
            features[const { index("route_last_ms") }] = value(number.saturating_sub(1));
            features[const { index("route_age_s") }] = (number % 6) as f64;
            let (rtt_ms, bandwidth) = match quantity {
                Quantity::Latency => (value(number), None),
                Quantity::Throughput => (1.0, Some(1e6 / value(number))),
            };
            TrainRow {
                key: RouteKey::default(),
                sent_us: number * 1_000_000,
                done_us: number * 1_000_000 + 1,
                rtt_ms: Some(rtt_ms),
                bandwidth,
                features,
            }
        };
        (0..count).map(row).collect()
    }

    #[test]
    fn the_first_good_model_decides_and_the_next_ones_wait_for_later_rows() {
        for quantity in [Quantity::Latency, Quantity::Throughput] {
            let mut life = Life::new(quantity);
            let config = TrainConfig { trees: 20, learning_rate: 0.3, ..TrainConfig::default() };
            // Another rule from row 900 on, which the second model has seen and the first has not.
            let high = |number: u64| {
                if number < 900 { number.is_multiple_of(2) } else { number.is_multiple_of(3) }
            };
            let all = rows(4_300, high, quantity);
            let named = |name: &str| TrainConfig { version: Some(name.into()), ..config.clone() };
            let first = life.train(&all[..900], None, &named("a")).unwrap().unwrap();
            assert_eq!(first.version, "a");
            let none = life.train(&all[..4_000], Some(&first), &named("b")).unwrap();
            assert!(none.is_none(), "{quantity:?}: in shadow");
            let next = life.train(&all, Some(&first), &named("c")).unwrap().unwrap();
            assert_eq!(next.version, "b", "{quantity:?}");
            // The third knows nothing that the second does not.
            let none = life.train(&all, Some(&next), &named("d")).unwrap();
            assert!(none.is_none(), "{quantity:?}: no later rows");
            assert_eq!((life.trained, life.promoted), (4, 2));
            let few = life.train(&all[..50], Some(&next), &named("e")).unwrap();
            assert!(few.is_none() && life.trained == 4);
        }
    }

    #[test]
    fn throughput_is_judged_by_its_own_head() {
        let row = rows(1, |_| true, Quantity::Throughput)[0];
        // 12,500 bytes/s are 0.1 Mbit/s.
        let cost = cost_of_bandwidth(row).rtt_ms.unwrap();
        assert!((cost - 10_000.0).abs() < 1e-6, "{cost}");
    }
}
