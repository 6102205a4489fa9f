//! The ranking rule of a model: how pessimistic, and with which margin, its forecasts are compared where models
//! are judged on them alone. Routers learn a rule of their own (`engine::predict::comparing`).
//!
//! The rule is chosen on the calibration rows. Rows of different routes between the same ends that
//! left within [`WINDOW_US`] form a choice: the first row of each route in the window gives forecast,
//! scale and outcome. Every rule of a grid is played over the choices in order of time. Each has a
//! route in use between any two ends of its own, which another one must beat by the rule's margin, and
//! pays what the route it is on then took.
//!
//! - A lost probe counts as the slowest answer of its choice. What a loss costs beyond that is the
//!   business of the score's reliability term; a choice without two forecasts or without any answer
//!   is none.
//! - Where a route in use has no row in a window, the rule takes the lowest bound.
//! - [`Ranking::FORECAST`] stays unless another rule surely saved something (see [`Ledger`]).
//! - Only the bound is played, without the other terms of the score and without the mix with the
//!   baselines: the rows do not hold them.

use std::collections::BTreeMap;

use super::TrainRow;
use crate::engine::predict::{
    CENTRES_COUNT, Head, Ledger, MARGINS, PESSIMISMS, Paid, Prospect, Ranking, RankingCard,
};

/// Rows that left within so long (µs) form a choice: 2 s, the time between two decisions of the
/// router; every candidate is probed once a second.
pub const WINDOW_US: u64 = 2_000_000;
/// Choices before another rule than the default is believed. A guess: with one tunnel and a choice
/// every 2 s, 7 minutes.
pub const CHOICES_MIN: u32 = 200;
/// Blocks that the choices are divided into; of 10 choices at the least.
const BLOCKS: u32 = 20;
/// Standard errors by which a rule's saving must be sure. On choices between routes that were all the
/// same, 400 each, another rule than the default was chosen in 1 of 200 worlds; at 2 standard errors
/// in 20.
const SURENESS: f64 = 3.0;

/// A route that could have been taken.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Offer {
    route: u64,
    forecast_ms: f64,
    /// About the relative error of such forecasts.
    scale: f64,
    /// What it took.
    cost_ms: f64,
}

/// Routes between the same ends, at the same time.
#[derive(Clone, Debug, PartialEq)]
struct Choice {
    ends: u64,
    offers: Vec<Offer>,
}

/// Chooses the rule for a latency head on rows in order of `sent_us`.
pub(super) fn choose(head: &Head, rows: &[&TrainRow]) -> (Ranking, RankingCard) {
    let choices = choices(head, rows);
    let ledger = play(&choices, grid(head));
    let best = ledger.best(CHOICES_MIN, SURENESS);
    let mean_ms = |rule| ledger.mean_cost(rule).unwrap_or(0.0);
    let card = RankingCard {
        choices: ledger.choices(),
        default_ms: mean_ms(&Ranking::FORECAST),
        chosen_ms: mean_ms(&best),
    };
    (best, card)
}

/// The rules that are tried. Without a scale model all forecasts are equally uncertain, so that no
/// pessimism tells routes apart. A margin of 1 would keep a tunnel on whatever it was on first until
/// that dies, and is left out.
fn grid(head: &Head) -> Vec<Ranking> {
    let default = [Ranking::FORECAST.pessimism];
    let pessimisms = if head.scale.is_some() { &PESSIMISMS[..] } else { &default };
    let margins = || MARGINS.into_iter().filter(|margin| *margin < 1.0);
    let rules = pessimisms.iter().flat_map(|pessimism| {
        margins().map(|margin| Ranking { pessimism: *pessimism, margin, ..Ranking::FORECAST })
    });
    rules.collect()
}

/// The choices that the rows hold, in order of time.
fn choices(head: &Head, rows: &[&TrainRow]) -> Vec<Choice> {
    // Of each pair of ends the windows, and in each the first row of each route.
    let mut windows: Vec<(u64, Vec<&TrainRow>)> = Vec::new();
    let mut newest: BTreeMap<u64, usize> = BTreeMap::new();
    for row in rows {
        let open = newest.get(&row.key.ends).copied();
        match open.filter(|at| row.sent_us - windows[*at].1[0].sent_us < WINDOW_US) {
            Some(at) => {
                let seen = &mut windows[at].1;
                if seen.iter().all(|known| known.key.route != row.key.route) {
                    seen.push(row);
                }
            }
            None => {
                newest.insert(row.key.ends, windows.len());
                windows.push((row.key.ends, vec![row]));
            }
        }
    }
    windows.into_iter().filter_map(|(ends, rows)| choice(head, ends, &rows)).collect()
}

/// `None` without two forecasts and an answer.
fn choice(head: &Head, ends: u64, rows: &[&TrainRow]) -> Option<Choice> {
    if rows.len() < 2 {
        return None;
    }
    let slowest_ms = rows.iter().filter_map(|row| row.rtt_ms).reduce(f64::max)?;
    let offer = |row: &&TrainRow| {
        Some(Offer {
            route: row.key.route,
            forecast_ms: head.ln(&row.features)?.exp(),
            scale: head.scale(&row.features),
            cost_ms: row.rtt_ms.unwrap_or(slowest_ms),
        })
    };
    let offers: Vec<Offer> = rows.iter().filter_map(offer).collect();
    (offers.len() >= 2).then_some(Choice { ends, offers })
}

/// What the rules would have paid.
fn play(choices: &[Choice], rules: Vec<Ranking>) -> Ledger {
    let block = (choices.len() as u32 / BLOCKS).max(1);
    let mut ledger = Ledger::new(rules, Ranking::FORECAST, block);
    let count = ledger.rules().count();
    let mut in_use: BTreeMap<u64, Vec<Option<u64>>> = BTreeMap::new();
    for Choice { ends, offers } in choices {
        let prospects: Vec<Prospect> = offers
            .iter()
            .map(|offer| Prospect {
                centre_ms: [offer.forecast_ms; CENTRES_COUNT],
                spread_ms: [offer.forecast_ms * offer.scale; CENTRES_COUNT],
                ..Prospect::default()
            })
            .collect();
        let routes = in_use.entry(*ends).or_insert_with(|| vec![None; count]);
        for (rule, route) in ledger.rules().zip(routes.iter_mut()) {
            let stay = offers.iter().position(|offer| Some(offer.route) == *route);
            *route = rule.choose(&prospects, stay).map(|at| offers[at].route);
        }
        ledger.add(|index, _| {
            let taken = offers.iter().find(|offer| Some(offer.route) == routes[index]);
            Paid { cost: taken.map_or(0.0, |offer| offer.cost_ms), harm: false }
        });
        ledger.end_round();
    }
    ledger
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;
    use crate::engine::predict::schema::{FEATURES, MISSING, index_of};
    use crate::engine::predict::{ForestModel, Trees};
    use crate::learn::registry::tests::model;
    use crate::learn::rows::RouteKey;
    use crate::learn::{TrainConfig, train_rows};

    const SECOND: u64 = 1_000_000;

    /// Forecasts the last value; its scale is 0.02, or 0.6 where the spread is known to be wide.
    fn head() -> Head {
        let mut scale = Trees::default();
        let root = scale.push_split(index_of("route_spread_ln").unwrap() as u16, 0.1);
        let (quiet, noisy) = (scale.push_leaf(0.02_f64.ln()), scale.push_leaf(0.6_f64.ln()));
        scale.set_children(root, quiet, noisy);
        scale.roots.push(root);
        Head { scale: Some(scale), ..model("v1", -0.1).latency }
    }

    fn plain_head() -> Head {
        model("v1", -0.1).latency
    }

    /// A probe of one route between the ends 1 and 2, for which `last_ms` is forecast.
    fn row(relay: u8, at_us: u64, last_ms: f64, spread_ln: f64, rtt_ms: Option<f64>) -> TrainRow {
        let mut features = [MISSING; FEATURES.len()];
        let mut set = |name: &str, value| features[index_of(name).unwrap()] = value;
        set("route_last_ms", last_ms);
        set("route_mean5_ms", last_ms);
        set("route_median3_ms", last_ms);
        set("route_median_5_ms", last_ms);
        set("route_spread_ln", spread_ln);
        TrainRow {
            key: RouteKey::of(&format!("1>{relay}>2")),
            sent_us: at_us,
            done_us: at_us + SECOND / 10,
            rtt_ms,
            bandwidth: None,
            features,
        }
    }

    fn chosen(head: &Head, rows: &[TrainRow]) -> (Ranking, RankingCard) {
        choose(head, &rows.iter().collect::<Vec<_>>())
    }

    /// Mean cost (ms) of a rule on rows.
    fn cost(head: &Head, rows: &[TrainRow], rule: Ranking) -> f64 {
        let choices = choices(head, &rows.iter().collect::<Vec<_>>());
        play(&choices, vec![rule]).mean_cost(&rule).unwrap()
    }

    /// Every 5 s one route that takes 100 ms, as forecast, and four that take 130 ms, for which the
    /// forecast is off by up to `noise`; `spread_ln` says of those whether one knows that.
    fn world(seed: u64, from: u64, count: u64, noise: f64, spread_ln: f64) -> Vec<TrainRow> {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let mut rows = Vec::new();
        for at_us in (from..from + count).map(|index| index * 5 * SECOND) {
            rows.push(row(3, at_us, 100.0 * random.random_range(0.99..1.01), 0.0, Some(100.0)));
            for relay in 4..8 {
                let off = 1.0 + noise * random.random_range(-1.0..1.0);
                let sent_us = at_us + u64::from(relay);
                rows.push(row(relay, sent_us, 130.0 * off, spread_ln, Some(130.0)));
            }
        }
        rows
    }

    #[test]
    fn where_the_lowest_forecast_is_luck_a_margin_is_chosen_and_pays_later() {
        for seed in 0..5 {
            let (rule, card) = chosen(&plain_head(), &world(seed, 0, 400, 0.4, 0.0));
            assert!(rule.margin >= 0.1, "{rule:?}");
            assert_eq!(Ranking { margin: 0.0, ..rule }, Ranking::FORECAST);
            assert_eq!(card.choices, 400);
            assert!(card.chosen_ms < 0.95 * card.default_ms, "{card:?}");
            let later = world(seed + 100, 400, 400, 0.4, 0.0);
            let default = cost(&plain_head(), &later, Ranking::FORECAST);
            assert!(cost(&plain_head(), &later, rule) < 0.95 * default, "{rule:?} {default}");
        }
    }

    /// The same with a second route of which one knows much, which changes places with the first:
    /// to stay on either costs.
    fn changing_world(seed: u64, from: u64) -> Vec<TrainRow> {
        let mut rows = world(seed, from, 400, 0.4, 0.5);
        for first in 0..400 {
            let (at, other_ms) = (5 * first, [100.0, 115.0][first % 6 / 3]);
            let first_ms = 215.0 - other_ms;
            let sent_us = rows[at].sent_us;
            rows[at] = row(3, sent_us, first_ms, 0.0, Some(first_ms));
            rows[at + 1] = row(4, sent_us + 4, other_ms, 0.0, Some(other_ms));
        }
        rows
    }

    #[test]
    fn where_it_is_known_which_forecasts_are_luck_they_are_distrusted() {
        for seed in 0..5 {
            let (rule, card) = chosen(&head(), &changing_world(seed, 0));
            assert!(rule.pessimism > Ranking::FORECAST.pessimism, "{rule:?}");
            assert!(card.chosen_ms < 0.97 * card.default_ms, "{card:?}");
            let later = changing_world(seed + 100, 400);
            let default = cost(&head(), &later, Ranking::FORECAST);
            assert!(cost(&head(), &later, rule) < 0.97 * default, "{rule:?} {default}");
        }
    }

    #[test]
    fn where_forecasts_are_right_or_nothing_can_be_saved_the_default_stays() {
        let (rule, card) = chosen(&head(), &world(1, 0, 400, 0.0, 0.0));
        assert_eq!((rule, card.choices), (Ranking::FORECAST, 400));
        assert_eq!(card.chosen_ms, card.default_ms);
        // Routes that are all the same: whatever is saved is luck.
        let mut kept = 0;
        for seed in 0..40 {
            let mut random = Pcg64Mcg::seed_from_u64(seed + 1_000);
            let mut rows = world(seed, 0, 400, 0.4, 0.5);
            for row in &mut rows {
                row.rtt_ms = Some(100.0 * random.random_range(0.7..1.3));
            }
            kept += u32::from(chosen(&head(), &rows).0 == Ranking::FORECAST);
        }

        assert!(kept >= 38, "{kept} of 40");
    }

    #[test]
    fn too_few_choices_leave_the_default() {
        let few = world(1, 0, u64::from(CHOICES_MIN) - 1, 0.4, 0.0);
        let (rule, card) = chosen(&plain_head(), &few);
        assert_eq!((rule, card.choices), (Ranking::FORECAST, CHOICES_MIN - 1));
        assert_eq!(chosen(&plain_head(), &[]), (Ranking::FORECAST, RankingCard::default()));
    }

    #[test]
    fn a_choice_is_the_first_row_of_each_route_of_a_window() {
        let other = |row: TrainRow| TrainRow { key: RouteKey::of("1>3>9"), ..row };
        let rows = [
            row(3, 0, 10.0, 0.0, Some(11.0)),
            other(row(3, 1, 90.0, 0.0, Some(91.0))),
            row(4, 2, 20.0, 0.5, None),
            row(3, 3, 70.0, 0.0, Some(71.0)),
            row(5, WINDOW_US - 1, 30.0, 0.0, Some(31.0)),
            // The next window: one route alone, then one with nothing but losses.
            row(6, WINDOW_US, 40.0, 0.0, Some(41.0)),
            row(6, 3 * WINDOW_US, 40.0, 0.0, None),
            row(7, 3 * WINDOW_US + 1, 40.0, 0.0, None),
        ];
        let head = head();
        let found = choices(&head, &rows.iter().collect::<Vec<_>>());
        let [Choice { offers, .. }] = &found[..] else { panic!("{found:?}") };
        let told: Vec<(f64, f64, f64)> = offers
            .iter()
            .map(|offer| (offer.forecast_ms.round(), offer.scale, offer.cost_ms))
            .collect();
        let scale = |ln: f64| ln.ln().exp();
        assert_eq!(
            told,
            [(10.0, scale(0.02), 11.0), (20.0, scale(0.6), 31.0), (30.0, scale(0.02), 31.0),]
        );
    }

    #[test]
    fn each_pair_of_ends_has_its_own_route_in_use() {
        let mut rows = Vec::new();
        for (at, [first, second]) in [[10.0, 12.0], [10.0, 9.5]].into_iter().enumerate() {
            for (ends, low, high) in [(2, first, second), (9, second, first)] {
                for (relay, last_ms) in [(3, low), (4, high)] {
                    let made = row(relay, at as u64 * 5 * SECOND, last_ms, 0.0, Some(last_ms));
                    rows.push(TrainRow { key: RouteKey::of(&format!("1>{relay}>{ends}")), ..made });
                }
            }
        }
        let paid = |margin| cost(&plain_head(), &rows, Ranking { margin, ..Ranking::FORECAST });
        assert!((paid(0.0) - (10.0 + 10.0 + 9.5 + 9.5) / 4.0).abs() < 1e-9);
        assert!((paid(0.1) - 10.0).abs() < 1e-9, "5 % lower is not enough: {}", paid(0.1));
    }

    #[test]
    fn training_chooses_on_the_calibration_rows_alone_and_the_same_every_time() {
        let config = TrainConfig { trees: 10, ..TrainConfig::default() };
        let trained = |rows: &[TrainRow]| -> ForestModel { train_rows(rows, &config, 1).unwrap() };
        // Of 1500 choices the newest fifth tests, the fifth before calibrates.
        let noisy = |from, count| world(3, from, count, 0.4, 0.0);
        let right = |from, count| world(3, from, count, 0.0, 0.0);
        let rows = [right(0, 900), noisy(900, 300), right(1_200, 300)].concat();
        let model = trained(&rows);
        let card = model.card.ranking.unwrap();
        assert!((298..=300).contains(&card.choices), "{card:?}");
        assert!(model.ranking != Ranking::FORECAST && card.chosen_ms < card.default_ms, "{card:?}");
        let backwards: Vec<TrainRow> = rows.iter().rev().copied().collect();
        assert_eq!(trained(&backwards).to_json(), model.to_json());
        assert_eq!(ForestModel::from_json(model.to_json().as_bytes()).unwrap(), model);
        let rows = [noisy(0, 900), right(900, 300), noisy(1_200, 300)].concat();
        assert_eq!(trained(&rows).ranking, Ranking::FORECAST);
    }
}
