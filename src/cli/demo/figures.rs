//! The demo's figures: what was measured, the mission's floors beside it.

use std::time::Instant;

use serde::{Serialize, Serializer};
use serde_json::json;

use super::load::{Finished, Requests};
use super::mesh::Plan;
use super::output;
use crate::api::types::Quantiles;
use crate::engine::measure::window_statistics::{mean, quantile};
use crate::learn::Realised;

/// End to end minus the sum of the emulated links (ms).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AddedLatency(Quantiles);

impl AddedLatency {
    /// Of the answered requests before `until` whose route did not change meanwhile; jitter and
    /// lost packets of the emulated links are in it.
    pub(super) fn of(plan: &Plan, finished: &Finished, until: Instant) -> Self {
        let quiet = finished.asked.iter().filter(|asked| asked.begun < until);
        let added = quiet.filter_map(|asked| {
            let took_ms = asked.took?.as_secs_f64() * 1e3;
            let route = finished.route_during(asked)?;
            let ended_s = asked.begun_s + took_ms / 1e3;
            Some(took_ms - plan.emulated_rtt_ms(route, asked.begun_s, ended_s)?)
        });
        let added: Vec<f64> = added.collect();
        Self(Quantiles { p50: quantile(&added, 0.5), p99: quantile(&added, 0.99) })
    }
}

/// How the model's live forecasts did.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct PredictionFigures {
    /// Share of later route measurements within max(20 %, 5 ms) of their forecast.
    accuracy: Option<f64>,
    /// The same of the moving average.
    baseline_accuracy: f64,
    /// The same of the last value.
    last_value_accuracy: f64,
    /// Mean absolute error (ms) of the model and of the moving average.
    mae_ms: Option<f64>,
    baseline_mae_ms: f64,
    /// Later route measurements that were compared.
    rows: usize,
    /// Route measurements in all.
    route_probes: usize,
    model_version: Option<String>,
}

/// Everything that was measured.
#[derive(Clone, Debug, Default)]
pub(super) struct Figures {
    pub(super) registrations_ms: Vec<f64>,
    pub(super) discoveries_ms: Vec<f64>,
    pub(super) lookups: usize,
    /// Median, and in the place of p99 the slowest.
    pub(super) join_ms: Quantiles,
    pub(super) requests: Requests,
    pub(super) hops: usize,
    pub(super) route_calculation_us: Quantiles,
    pub(super) prediction: PredictionFigures,
    pub(super) added_latency_ms: AddedLatency,
    pub(super) degrade_reaction_ms: Option<f64>,
    pub(super) failover_ms: Option<f64>,
    pub(super) samples: u64,
    pub(super) wall_s: f64,
}

/// One line of the table.
struct Line {
    what: &'static str,
    value: Option<f64>,
    unit: &'static str,
    /// The mission's floor, and whether larger is better.
    floor: Option<(f64, bool)>,
    /// Without a floor, but it must have happened.
    needed: bool,
}

impl Line {
    fn missed(&self) -> bool {
        match (self.floor, self.value) {
            (None, value) => self.needed && value.is_none(),
            (Some(_), None) => true,
            (Some((floor, true)), Some(value)) => value <= floor,
            (Some((floor, false)), Some(value)) => value >= floor,
        }
    }
}

impl Figures {
    pub(super) fn set_prediction(
        &mut self,
        realised: &Realised,
        model_version: Option<String>,
        route_probes: usize,
    ) {
        self.prediction = PredictionFigures {
            accuracy: realised.model.map(|score| score.accuracy),
            baseline_accuracy: realised.moving_average.accuracy,
            last_value_accuracy: realised.last_value.accuracy,
            mae_ms: realised.model.map(|score| score.mae_ms),
            baseline_mae_ms: realised.moving_average.mae_ms,
            rows: realised.rows,
            route_probes,
            model_version,
        };
    }

    fn lines(&self) -> Vec<Line> {
        let line = |what, value, unit, floor| Line { what, value, unit, floor, needed: false };
        let below = |what, value, unit, floor| line(what, value, unit, Some((floor, false)));
        let above = |what, value, unit, floor| line(what, value, unit, Some((floor, true)));
        let plain = |what, value, unit| line(what, value, unit, None);
        let percent = |share: f64| 100.0 * share;
        let found = self.discoveries_ms.len() as f64 / self.lookups.max(1) as f64;
        let (total, failed) = (self.requests.total as f64, self.requests.failed as f64);
        let prediction = &self.prediction;
        vec![
            below("registration, mean", mean(&self.registrations_ms), "ms", 500.0),
            below("discovery by DHT, mean", mean(&self.discoveries_ms), "ms", 2_000.0),
            above("discovery success", Some(percent(found)), "%", 98.0),
            below("join, slowest", self.join_ms.p99, "ms", 10_000.0),
            below(
                "route calculation, p99",
                self.route_calculation_us.p99.map(|us| us / 1e3),
                "ms",
                100.0,
            ),
            above("prediction accuracy", prediction.accuracy.map(percent), "%", 85.0),
            plain("  of the moving average", Some(percent(prediction.baseline_accuracy)), "%"),
            plain("  of the last value", Some(percent(prediction.last_value_accuracy)), "%"),
            below("added latency, median", self.added_latency_ms.0.p50, "ms", 50.0),
            plain("added latency, p99", self.added_latency_ms.0.p99, "ms"),
            Line {
                needed: true,
                ..plain("left the degraded link after", self.degrade_reaction_ms, "ms")
            },
            below("failover after a kill", self.failover_ms, "ms", 5_000.0),
            above("availability", Some(percent(1.0 - failed / total.max(1.0))), "%", 99.5),
            plain("requests", Some(total), ""),
            plain("  failed", Some(failed), ""),
            plain("measurements", Some(self.samples as f64), ""),
        ]
    }

    /// The figures that miss their floor.
    pub(super) fn missed(&self) -> Vec<&'static str> {
        self.lines().iter().filter(|line| line.missed()).map(|line| line.what).collect()
    }

    /// Prints the table.
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let mut table = output::table(&["figure", "measured", "floor", ""]);
        for line in self.lines() {
            let digits = match line.value {
                Some(value) if line.unit.is_empty() || value.abs() >= 100.0 => 0,
                Some(value) if value.abs() < 1.0 => 2,
                _ => 1,
            };
            let floor = line.floor.map(|(floor, larger)| {
                format!("{} {floor} {}", if larger { ">" } else { "<" }, line.unit)
            });
            table.add_row([
                line.what.to_owned(),
                format!("{} {}", output::number(line.value, digits), line.unit),
                floor.unwrap_or_default(),
                if line.missed() { "MISSED".into() } else { String::new() },
            ]);
        }
        output::print("")?;
        output::rows(&table, "")?;
        let prediction = &self.prediction;
        output::print(&format!(
            "\nmodel {}, {} later measurements compared; {} hops; {:.0} s in all",
            prediction.model_version.as_deref().unwrap_or("none"),
            prediction.rows,
            self.hops,
            self.wall_s
        ))
    }
}

impl Serialize for Figures {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        json!({
            "registration_ms": mean(&self.registrations_ms),
            "discovery_ms": mean(&self.discoveries_ms),
            "discovery_success": self.discoveries_ms.len() as f64 / self.lookups.max(1) as f64,
            "join_ms": { "p50": self.join_ms.p50, "max": self.join_ms.p99 },
            "requests": self.requests,
            "hops": self.hops,
            "route_calculation_us": self.route_calculation_us,
            "prediction": self.prediction,
            "added_latency_ms": self.added_latency_ms.0,
            "degrade_reaction_ms": self.degrade_reaction_ms,
            "failover_ms": self.failover_ms,
            "samples": self.samples,
            "wall_s": self.wall_s,
            "missed_floors": self.missed(),
        })
        .serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_that_is_missing_misses_its_floor() {
        let missed = Figures::default().missed();
        for what in [
            "registration, mean",
            "prediction accuracy",
            "failover after a kill",
            "left the degraded link after",
        ] {
            assert!(missed.contains(&what), "{missed:?}");
        }
        assert!(!missed.contains(&"requests"));
    }
}
