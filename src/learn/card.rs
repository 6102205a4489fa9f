//! What a model's card says of the test rows, and what that says against the model.

use super::COVERAGE;
use super::evaluate::score;
use super::head::{self, Example};
use super::reliability::{Outcome, losses};
use crate::engine::predict::schema::index_of;
use crate::engine::predict::{
    ClassCard, FeatureVector, ForestModel, LastValue, Level, ModelCard, MovingAverage,
    QualityModel, ReliabilityCard, ReliabilityHead, Score,
};

/// Classes of paths, by number of links.
pub const PATH_CLASSES: [&str; 3] = ["1 hop", "2 hops", "3+ hops"];
/// Coverage further than this from the stated one is a known failure.
const COVERAGE_TOLERANCE: f64 = 0.02;
/// Fewest test rows of a class that a failure is stated of: below, chance decides.
const FAILURE_ROWS_MIN: usize = 30;
/// A probability is taken to be this far from 0 and 1 at least, so that one wrong certainty does
/// not make the log loss infinite.
const PROBABILITY_MIN: f64 = 1e-6;

/// Fills in the figures of the latency head, overall and by class.
pub(super) fn judge_latency(model: &ForestModel, rows: &[Example<'_>], card: &mut ModelCard) {
    let all = class_card(model, "all", rows);
    card.rows_test = all.rows;
    (card.model, card.moving_average) = (all.model, all.moving_average);
    (card.last_value, card.level) = (all.last_value, all.level);
    (card.coverage, card.width_ln) = (all.coverage, all.width_ln);
    for (index, name) in PATH_CLASSES.into_iter().enumerate() {
        let of_class = |row: &&Example<'_>| class_of(row.features) == index;
        let rows: Vec<Example<'_>> = rows.iter().filter(of_class).copied().collect();
        if !rows.is_empty() {
            card.classes.push(class_card(model, name, &rows));
        }
    }
}

/// Position in [`PATH_CLASSES`].
pub(super) fn class_of(features: &FeatureVector) -> usize {
    let hops = index_of("hop_count").map_or(0.0, |index| features[index]);
    if hops <= 1.0 { 0 } else { 1 + usize::from(hops > 2.0) }
}

fn class_card(model: &ForestModel, class: &str, rows: &[Example<'_>]) -> ClassCard {
    let by = |forecaster: &dyn QualityModel| {
        score(rows.iter().filter_map(|row| {
            Some((row.truth_ln.exp(), forecaster.predict(row.features)?.latency_ms))
        }))
    };
    let held = head::held_on(&model.latency, rows);
    ClassCard {
        class: class.to_owned(),
        rows: rows.len(),
        model: by(model),
        moving_average: by(&MovingAverage),
        last_value: by(&LastValue),
        level: by(&Level),
        coverage: held.coverage,
        width_ln: held.width,
    }
}

/// The reliability head on the test rows, beside the share delivered among `before`.
pub(super) fn judge_reliability(
    head: &ReliabilityHead,
    before: &[Outcome<'_>],
    test: &[Outcome<'_>],
) -> ReliabilityCard {
    let base = 1.0 - losses(before) as f64 / before.len().max(1) as f64;
    let of = |probability: &dyn Fn(&FeatureVector) -> f64| {
        let (mut brier, mut log_loss) = (0.0, 0.0);
        for (features, answered) in test {
            let p = probability(features).clamp(PROBABILITY_MIN, 1.0 - PROBABILITY_MIN);
            let of_truth = if *answered { p } else { 1.0 - p };
            brier += (1.0 - of_truth) * (1.0 - of_truth);
            log_loss -= of_truth.ln();
        }
        let count = test.len().max(1) as f64;
        (brier / count, log_loss / count)
    };
    let (brier, log_loss) = of(&|features| head.probability(features));
    let (brier_base, log_loss_base) = of(&|_| base);
    let lost = losses(test);
    ReliabilityCard { rows: test.len(), lost, brier, brier_base, log_loss, log_loss_base }
}

/// What the figures of a card say against the model.
pub(super) fn known_failures(card: &ModelCard) -> Vec<String> {
    let mut failures = Vec::new();
    if card.shrink == 0.0 {
        failures.push("the latency trees were no better than their reference and are gone".into());
    }
    let all = ClassCard {
        class: "all rows".into(),
        rows: card.rows_test,
        model: card.model,
        moving_average: card.moving_average,
        last_value: card.last_value,
        level: card.level,
        coverage: card.coverage,
        width_ln: card.width_ln,
    };
    for class in [&all].into_iter().chain(&card.classes) {
        if class.rows >= FAILURE_ROWS_MIN {
            failures.extend(class_failures(class));
        }
    }
    if let Some(reliability) = card.reliability {
        if reliability.brier >= reliability.brier_base {
            failures.push(format!(
                "delivery is forecast no better than by the share delivered before: Brier {:.4} \
                 against {:.4}",
                reliability.brier, reliability.brier_base
            ));
        }
        if !reliability.earns_its_place() {
            failures.push("delivery: not used for decisions".into());
        }
    }
    if let Some(throughput) = card.throughput {
        if throughput.rmse_ln > throughput.rmse_ln_reference {
            failures.push(format!(
                "throughput: worse than its reference, {:.4} ln(bytes/s) against {:.4}",
                throughput.rmse_ln, throughput.rmse_ln_reference
            ));
        }
        if let Some(last) = throughput.rmse_ln_last
            && throughput.rmse_ln > last
        {
            failures.push(format!(
                "throughput: worse than the last value of the route, {:.4} ln(bytes/s) against \
                 {last:.4}",
                throughput.rmse_ln
            ));
        }
        if !throughput.earns_its_place() {
            failures.push("throughput: not used for decisions".into());
        }
        if (throughput.coverage - COVERAGE).abs() > COVERAGE_TOLERANCE
            && throughput.rows_test >= FAILURE_ROWS_MIN
        {
            failures.push(format!("throughput: coverage {:.0} %", 100.0 * throughput.coverage));
        }
    }
    failures
}

fn class_failures(class: &ClassCard) -> Vec<String> {
    let name = &class.class;
    let mut failures = Vec::new();
    if (class.coverage - COVERAGE).abs() > COVERAGE_TOLERANCE {
        failures.push(format!(
            "coverage {:.0} % on {name}, {:.0} % were stated",
            100.0 * class.coverage,
            100.0 * COVERAGE
        ));
    }
    let baselines: [(&str, Score); 3] = [
        ("moving average", class.moving_average),
        ("last value", class.last_value),
        ("level", class.level),
    ];
    for (baseline, other) in baselines {
        if class.model.accuracy < other.accuracy {
            failures.push(format!(
                "fewer rows forecast well than by the {baseline} on {name}: {:.1} % against \
                 {:.1} %",
                100.0 * class.model.accuracy,
                100.0 * other.accuracy
            ));
        }
        if class.model.rmse_ln > other.rmse_ln {
            failures.push(format!(
                "worse than the {baseline} on {name}: {:.4} ln(ms) against {:.4}",
                class.model.rmse_ln, other.rmse_ln
            ));
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::{FEATURES, index};
    use crate::engine::predict::{ThroughputCard, Trees};

    #[test]
    fn failures_are_told_with_their_figures() {
        let score = |accuracy, rmse_ln| Score { accuracy, mae_ms: 1.0, rmse_ln };
        let class = |class: &str, rows, coverage| ClassCard {
            class: class.into(),
            rows,
            model: score(0.9, 0.1),
            moving_average: score(0.8, 0.2),
            last_value: score(0.95, 0.05),
            level: score(0.9, 0.1),
            coverage,
            width_ln: 0.3,
        };
        let mut card = ModelCard {
            rows_test: 200,
            shrink: 0.5,
            model: score(0.9, 0.1),
            moving_average: score(0.8, 0.2),
            last_value: score(0.8, 0.2),
            level: score(0.9, 0.1),
            coverage: 0.91,
            ..ModelCard::default()
        };
        assert!(known_failures(&card).is_empty(), "{:?}", known_failures(&card));
        card.classes = vec![class("2 hops", 30, 0.84), class("3+ hops", 29, 0.5)];
        let brier = ReliabilityCard { brier: 0.2, brier_base: 0.1, ..ReliabilityCard::default() };
        card.reliability = Some(brier);
        card.throughput = Some(ThroughputCard {
            rows_test: 50,
            rmse_ln: 0.5,
            rmse_ln_reference: 0.4,
            rmse_ln_last: Some(0.3),
            coverage: 0.95,
            ..ThroughputCard::default()
        });
        card.shrink = 0.0;
        let told = known_failures(&card);
        for expected in [
            "the latency trees were no better than their reference and are gone",
            "coverage 84 % on 2 hops, 90 % were stated",
            "fewer rows forecast well than by the last value on 2 hops: 90.0 % against 95.0 %",
            "worse than the last value on 2 hops: 0.1000 ln(ms) against 0.0500",
            "throughput: worse than its reference, 0.5000 ln(bytes/s) against 0.4000",
            "throughput: worse than the last value of the route, 0.5000 ln(bytes/s) against 0.3000",
            "throughput: not used for decisions",
            "delivery: not used for decisions",
            "throughput: coverage 95 %",
        ] {
            assert!(told.iter().any(|failure| failure == expected), "{expected}: {told:?}");
        }
        assert!(told.iter().any(|failure| failure.contains("Brier 0.2000 against 0.1000")));
        assert_eq!(told.len(), 10, "no word of a class of 29 rows: {told:?}");
    }

    #[test]
    fn brier_score_and_log_loss_of_known_values() {
        // Votes of 0 or 1 by one feature; the sigmoid turns them into 0.2 and 0.8.
        let mut trees = Trees::default();
        let root = trees.push_split(0, 1.5);
        let (left, right) = (trees.push_leaf(0.0), trees.push_leaf(1.0));
        trees.set_children(root, left, right);
        trees.roots.push(root);
        let odds = 4.0_f64.ln();
        let head = ReliabilityHead { trees, platt_a: -2.0 * odds, platt_b: odds };
        let (low, mut high) = ([1.0; FEATURES.len()], [1.0; FEATURES.len()]);
        high[0] = 2.0;
        assert!((head.probability(&low) - 0.2).abs() < 1e-12);
        let before = [(&low, true), (&low, false)];
        let test = [(&low, false), (&high, true), (&high, false)];
        let card = judge_reliability(&head, &before, &test);
        assert_eq!((card.rows, card.lost), (3, 2));
        assert!((card.brier - (0.04 + 0.04 + 0.64) / 3.0).abs() < 1e-12);
        assert!((card.brier_base - 0.25).abs() < 1e-12);
        let log_loss = -(0.8_f64.ln() + 0.8_f64.ln() + 0.2_f64.ln()) / 3.0;
        assert!((card.log_loss - log_loss).abs() < 1e-12);
        assert!((card.log_loss_base - 2.0_f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn classes_are_by_hops() {
        let mut features = [0.0; FEATURES.len()];
        for (hops, class) in [(1.0, 0), (2.0, 1), (3.0, 2), (7.0, 2)] {
            features[index("hop_count")] = hops;
            assert_eq!(class_of(&features), class);
        }
    }
}
