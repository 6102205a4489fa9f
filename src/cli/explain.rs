//! Printing of `meshwise model explain` and `meshwise route explain`.

use std::collections::BTreeMap;

use super::champion::no_champion;
use super::{Context, output};
use crate::api::types::{Attribution, Counterfactual, Explanation, Outcome, RouteCandidate};
use crate::engine::overlay::wire::Objective;
use crate::engine::predict::Centre;
use crate::learn::ModelRegistry;
use crate::node::MODELS;

/// Features whose contributions are printed one by one.
const TOP: usize = 6;
/// What is shown of the features when nothing says which of them mattered: what the moving average
/// reads, and what tells how much that is worth. All are in `--json`.
const SHOWN: [&str; 9] = [
    "hop_count",
    "route_mean5_ms",
    "route_last_ms",
    "route_loss",
    "route_age_s",
    "route_count",
    "link_mean5_sum_ms",
    "link_loss",
    "coordinate_sum_ms",
];

/// `meshwise model explain`
pub(super) async fn model(target: &str, context: &Context) -> anyhow::Result<()> {
    let answer: Explanation = context.client().get(&format!("/v1/routes/{target}")).await?;
    let Some(chosen) = answer.candidates.iter().find(|candidate| candidate.chosen) else {
        anyhow::bail!("no route to {target} is in use; see 'meshwise route explain {target}'");
    };
    let Some(attribution) = &chosen.attribution else {
        let registry = ModelRegistry::new(context.data_dir.join(MODELS));
        let Some(champion) = registry.champion_version()? else {
            anyhow::bail!("{}", no_champion(&registry)?);
        };
        anyhow::bail!(
            "{} decided about {target}, which has no contributions to show; '{champion}' has not decided yet, and \
             never does with --no-predict or learning.predict = false",
            answer.model_version
        );
    };
    if context.json {
        return output::json(&document(&answer, chosen));
    }
    output::print(&format!(
        "{} at {}, chosen with probability {:.2}",
        answer.model_version,
        output::time(answer.at_us),
        answer.propensity,
    ))?;
    contributions(chosen, attribution)?;
    let other = runner_up(&answer);
    if let Some((other, made_of)) = other.and_then(|o| Some((o, o.attribution.as_ref()?))) {
        output::print("")?;
        contributions(other, made_of)?;
    }
    afterwards(&answer)
}

/// What `model explain --json` prints.
fn document(answer: &Explanation, chosen: &RouteCandidate) -> serde_json::Value {
    let runner_up = runner_up(answer).map(|other| {
        serde_json::json!({
            "route": other.route,
            "propensity": other.propensity,
            "predicted_ms": other.predicted_ms,
            "interval_ms": other.interval_ms,
            "attribution": other.attribution,
        })
    });
    serde_json::json!({
        "model_version": answer.model_version,
        "at_us": answer.at_us,
        "reason": answer.reason,
        "propensity": answer.propensity,
        "route": chosen.route,
        "predicted_ms": chosen.predicted_ms,
        "interval_ms": chosen.interval_ms,
        "attribution": chosen.attribution,
        "runner_up": runner_up,
        "counterfactual": answer.counterfactual,
        "outcome": answer.outcome,
    })
}

/// The candidate that the counterfactual is about.
fn runner_up(answer: &Explanation) -> Option<&RouteCandidate> {
    let route = &answer.counterfactual.as_ref()?.runner_up;
    answer.candidates.iter().find(|candidate| candidate.route == *route)
}

/// All that `meshwise route explain` says below the table of candidates.
pub(super) fn reasons(answer: &Explanation) -> anyhow::Result<()> {
    let why = match answer.reason.as_str() {
        "first" => "it is the best of the candidates",
        "better" => "it was better than the one before by more than the margin",
        "current-dead" => "the one before died",
        "best" => "it is still the best",
        "within-margin" => "another is better, but by less than the margin",
        "held" => "another is better, but the last change is too recent",
        "capped" => "another is better, but many tunnels of this node have just moved",
        "refused" => "the one before refused the bandwidth that is to be set aside",
        "explored" => "it was drawn by chance, to be tried until the next decision",
        "forced" => "its path was fixed with --via",
        _ => "no candidate is alive",
    };
    let chosen = answer.candidates.iter().find(|candidate| candidate.chosen);
    let subject = if chosen.is_some() { "* is in use: " } else { "No route is in use: " };
    output::print(&format!(
        "\n{subject}{why}.\n{}Decided by {} at {} with probability {:.2}; milliseconds, round trip.\n\
         Objective: {}{}.\nRule: {}.",
        about(answer.tunnel, &answer.other_tunnels, &answer.other_paths),
        answer.model_version,
        output::time(answer.at_us),
        answer.propensity,
        objective(answer.objective),
        avoided(&answer.avoided),
        rule(answer.centre, answer.pessimism, answer.margin),
    ))?;
    for line in kept_back(&answer.candidates) {
        output::print(&line)?;
    }
    if let Some(chosen) = chosen {
        output::print("")?;
        match &chosen.attribution {
            Some(attribution) => contributions(chosen, attribution)?,
            None => features(answer, chosen)?,
        }
    }
    afterwards(answer)
}

/// What would have turned a decision, and what came of it.
fn afterwards(answer: &Explanation) -> anyhow::Result<()> {
    if let Some(found) = &answer.counterfactual {
        output::print(&format!("\n{}", turn(found, &answer.reason)))?;
    }
    if let Some(outcome) = &answer.outcome {
        output::print(&format!("\n{}", result(outcome)))?;
    }
    Ok(())
}

/// What speaks against relays and routes, a line for each.
fn kept_back(candidates: &[RouteCandidate]) -> Vec<String> {
    let doubted = candidates.iter().flat_map(|candidate| &candidate.doubted);
    let relays: BTreeMap<&str, f64> =
        doubted.map(|doubted| (doubted.relay.as_str(), doubted.delivers)).collect();
    let relay = |(relay, delivers): (&str, f64)| {
        let percent = 100.0 * delivers;
        format!(
            "Doubted: relay {relay} delivers {percent:.0} % of what its links claim, and routes over \
             it score as much less."
        )
    };
    let routes = |is_it: fn(&RouteCandidate) -> bool, why: &'static str| {
        let those = candidates.iter().filter(move |c| c.alive && is_it(c));
        those.map(move |c| format!("{}: {why}.", output::route(&c.route)))
    };
    let mut lines: Vec<String> = relays.into_iter().map(relay).collect();
    lines.extend(routes(
        |c| c.held,
        "held, because it failed of late; used when nothing else is there",
    ));
    lines.extend(routes(|c| c.refused, "has not the bandwidth that is to be set aside"));
    lines
}

/// Which tunnel it is about, as a line.
fn about(tunnel: Option<u16>, tunnels: &[u16], paths: &[u16]) -> String {
    let Some(tunnel) = tunnel else {
        return "No tunnel there is open: this is what one would use.\n".into();
    };
    let named = |what: &str, numbers: &[u16]| {
        let numbers: Vec<String> = numbers.iter().map(u16::to_string).collect();
        match numbers.is_empty() {
            true => String::new(),
            false => {
                format!("; {what}, each with its own route: {} (--tunnel N)", numbers.join(", "))
            }
        }
    };
    let (tunnels, paths) = (named("also there", tunnels), named("its other paths", paths));
    format!("About tunnel {tunnel}{tunnels}{paths}.\n")
}

/// What a route is chosen for, as a sentence without its stop.
fn objective(objective: Objective) -> &'static str {
    match objective {
        Objective::Balanced => "balanced, the mean of latency, room, losses and load of its links",
        Objective::Latency => "latency, a short round trip above all",
        Objective::Throughput => "throughput, room on its narrowest link above all",
        Objective::Reliability => "reliability, few losses from end to end above all",
    }
}

/// What to keep off, as the end of a sentence.
fn avoided(routes: &[Vec<String>]) -> String {
    if routes.is_empty() {
        return String::new();
    }
    let routes: Vec<String> = routes.iter().map(|route| output::route(route)).collect();
    format!("; where possible apart from {}, in use beside it", routes.join(" and "))
}

/// How routes are compared, as a sentence without its stop.
pub(super) fn rule(centre: Centre, pessimism: f64, margin: f64) -> String {
    let by = match centre {
        Centre::Forecast => "the forecast",
        Centre::Level => "the level of the newest round trips",
        Centre::Mean => "the mean of the round trips",
        Centre::Cautious => "the larger of last round trip and level",
        Centre::Blend => "level and mean of the round trips and what is forecast beyond",
    };
    let error = match pessimism {
        0.0 => String::new(),
        _ => format!(", plus {pessimism} of its usual error"),
    };
    let to_beat = match margin {
        0.0 => "as any other".into(),
        _ => format!("as {} % faster", output::number(Some(100.0 * margin), 1)),
    };
    format!(
        "routes are compared by {by}{error}; the direct one, or else the one in use, counts {to_beat}"
    )
}

/// What the forecast is made of.
fn contributions(candidate: &RouteCandidate, made_of: &Attribution) -> anyhow::Result<()> {
    output::print(&format!("Forecast for {}", output::route(&candidate.route)))?;
    let mut table = output::table(&["feature", "value", "adds ln(ms)", "factor"]);
    let mut row = |name: &str, value: String, ln: f64| {
        let factor = format!("{:.3}", ln.exp());
        table.add_row([name.to_owned(), value, format!("{ln:+.4}"), factor]);
    };
    let (top, rest) = made_of.contributions.split_at(made_of.contributions.len().min(TOP));
    for part in top {
        let value = part.value.map_or_else(|| "not known".into(), |value| format!("{value:.3}"));
        row(&part.feature, value, part.ln);
    }
    if !rest.is_empty() {
        let sum = rest.iter().map(|part| part.ln).sum();
        row(&format!("{} others", rest.len()), String::new(), sum);
    }
    row("sum", String::new(), made_of.sum_ln);
    output::print(&format!("expected  {:.2} ms", made_of.expectation_ms))?;
    output::print(&format!(
        "forecast  {:.2} ms = expected x exp({:+.4}): the model's own, which the table takes apart",
        made_of.forecast_ms, made_of.sum_ln,
    ))?;
    if let Some(mixed_ms) = candidate.predicted_ms {
        output::print(&format!(
            "mixed     {mixed_ms:.2} ms with the baselines, by how well each did of late{}",
            interval(candidate.interval_ms),
        ))?;
    }
    output::rows(&table, "")
}

fn interval(interval_ms: Option<(f64, f64)>) -> String {
    interval_ms.map_or_else(String::new, |(low, high)| format!(", interval {low:.1}..{high:.1} ms"))
}

/// What the moving average, or a model that cannot explain itself, was asked with.
fn features(answer: &Explanation, chosen: &RouteCandidate) -> anyhow::Result<()> {
    let other = answer.candidates.iter().find(|candidate| !candidate.chosen);
    let columns: &[&str] =
        if other.is_some() { &["feature", "in use", "best other"] } else { &["feature", "in use"] };
    let mut table = output::table(columns);
    for name in SHOWN {
        let of =
            |candidate: &RouteCandidate| output::number(candidate.features.get(name).copied(), 3);
        let mut row = vec![name.to_owned(), of(chosen)];
        row.extend(other.map(of));
        table.add_row(row);
    }
    output::rows(&table, "")
}

/// What would have turned the decision, as a sentence.
fn turn(found: &Counterfactual, reason: &str) -> String {
    let bound = output::number(found.bound_ms, 1);
    let runner_up =
        format!("Runner-up: {}, compared by {bound} ms.", output::route(&found.runner_up));
    match reason {
        "held" => return format!("{runner_up} It wins as soon as the last change is old enough."),
        "capped" => return format!("{runner_up} It wins as soon as this tunnel may move."),
        _ => {}
    }
    let other = |above: f64| format!("that of the route in use rises above {above:.1} ms");
    let when = match (found.falls_below_ms, found.rises_above_ms) {
        (Some(below), Some(above)) => {
            format!("It wins if that falls below {below:.1} ms, or if {}.", other(above))
        }
        (Some(below), None) => format!("It wins if that falls below {below:.1} ms."),
        (None, Some(above)) => {
            format!("However low that is, it wins only if {}.", other(above))
        }
        (None, None) => "No round trip would make it win: its links, its relays or its past speak \
             against it."
            .into(),
    };
    format!("{runner_up} {when}")
}

/// What came of a decision, as a sentence.
fn result(outcome: &Outcome) -> String {
    let begin = format!(
        "The decision of {} by {} expected {} ms{} over {};",
        output::time(outcome.at_us),
        outcome.model_version,
        output::number(outcome.forecast_ms, 1),
        interval(outcome.interval_ms),
        output::route(&outcome.route),
    );
    let Some(measured) = outcome.measured_ms else {
        return format!("{begin} the next probe was lost.");
    };
    let off = outcome.forecast_ms.map_or_else(String::new, |forecast| {
        format!(", {:+.1} % off the forecast", 100.0 * (measured / forecast - 1.0))
    });
    let inside = match outcome.interval_ms {
        Some((low, high)) if (low..=high).contains(&measured) => ", inside the interval",
        Some(_) => ", outside the interval",
        None => "",
    };
    format!("{begin} the next probe measured {measured:.1} ms{off}{inside}.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::DoubtedRelay;

    #[test]
    fn what_is_shown_are_features() {
        for name in SHOWN {
            assert!(crate::engine::predict::schema::index_of(name).is_some(), "{name}");
        }
    }

    fn candidate(relay: &str, held: bool, refused: bool) -> RouteCandidate {
        RouteCandidate {
            route: vec!["s".into(), relay.into(), "t".into()],
            hops: 2,
            alive: true,
            chosen: false,
            predicted_bandwidth: None,
            predicted_delivery: None,
            held,
            refused,
            doubted: vec![],
            bound_ms: None,
            score: 0.5,
            baseline_score: 0.5,
            propensity: 0.0,
            predicted_ms: None,
            interval_ms: None,
            challenger_ms: None,
            moving_average_ms: None,
            last_value_ms: None,
            features: BTreeMap::new(),
            attribution: None,
        }
    }

    #[test]
    fn a_model_is_explained_with_the_choice_the_runner_up_and_what_came_of_it() {
        let chosen = RouteCandidate { propensity: 0.9, ..candidate("a", false, false) };
        let other = RouteCandidate { propensity: 0.1, ..candidate("b", false, false) };
        let answer = Explanation {
            at_us: 1,
            destination: "t".into(),
            tunnel: Some(1),
            other_tunnels: vec![],
            other_paths: vec![],
            objective: Objective::Balanced,
            avoided: vec![],
            model_version: "v1".into(),
            reason: "best".into(),
            centre: Centre::Forecast,
            pessimism: 0.25,
            margin: 0.0,
            propensity: 0.9,
            candidates: vec![chosen.clone(), other.clone()],
            counterfactual: Some(Counterfactual {
                runner_up: other.route.clone(),
                bound_ms: Some(50.0),
                falls_below_ms: Some(40.0),
                rises_above_ms: None,
            }),
            outcome: Some(Outcome {
                at_us: 0,
                model_version: "v1".into(),
                route: chosen.route.clone(),
                forecast_ms: Some(40.0),
                interval_ms: None,
                probed_us: 1,
                measured_ms: Some(44.0),
            }),
        };
        let said = document(&answer, &answer.candidates[0]);
        assert_eq!(
            (&said["propensity"], &said["runner_up"]["propensity"]),
            (&0.9.into(), &0.1.into())
        );
        assert_eq!(said["runner_up"]["route"], serde_json::json!(["s", "b", "t"]));
        assert_eq!(said["counterfactual"]["falls_below_ms"], 40.0);
        assert_eq!(said["outcome"]["measured_ms"], 44.0);
        let alone = Explanation { counterfactual: None, ..answer };
        assert!(document(&alone, &alone.candidates[0])["runner_up"].is_null());
    }

    #[test]
    fn doubted_relays_and_routes_that_are_kept_back_are_named_once() {
        let mut all = vec![candidate("a", false, false), candidate("b", true, false)];
        all.extend([candidate("a", false, true), candidate("c", false, false)]);
        assert_eq!(kept_back(&all).len(), 2);
        for at in [0, 2] {
            all[at].doubted = vec![DoubtedRelay { relay: "a".into(), delivers: 0.71 }];
        }
        let lines = kept_back(&all);
        assert!(lines[0].contains("relay a delivers 71 % of what its links claim"), "{lines:?}");
        assert!(lines[1].starts_with("s > b > t: held"), "{lines:?}");
        assert!(lines[2].starts_with("s > a > t: has not the bandwidth"), "{lines:?}");
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn the_tunnel_that_is_meant_and_the_others_are_named() {
        assert!(about(None, &[], &[]).starts_with("No tunnel there is open"));
        assert_eq!(about(Some(3), &[], &[]), "About tunnel 3.\n");
        assert!(
            about(Some(3), &[1, 7], &[])
                .contains("tunnel 3; also there, each with its own route: 1, 7")
        );
    }

    #[test]
    fn the_objective_and_what_it_keeps_off_are_said() {
        assert!(objective(Objective::Throughput).starts_with("throughput, room"));
        assert_eq!(avoided(&[]), "");
        let said = avoided(&[vec!["a".into(), "b".into()], vec!["a".into(), "c".into()]]);
        assert!(said.ends_with("apart from a > b and a > c, in use beside it"), "{said}");
    }

    #[test]
    fn the_rule_is_a_sentence_with_its_numbers() {
        let said = rule(Centre::Mean, 0.25, 0.2);
        assert!(said.contains("plus 0.25 of its usual error"), "{said}");
        assert!(said.ends_with("the one in use, counts as 20.0 % faster"), "{said}");
        let plain = rule(Centre::Forecast, 0.0, 0.0);
        assert!(plain.contains("by the forecast;") && plain.ends_with("as any other"), "{plain}");
    }

    #[test]
    fn the_counterfactual_is_a_sentence_with_its_numbers() {
        let found = |falls_below_ms, rises_above_ms| Counterfactual {
            runner_up: vec!["a".into(), "b".into()],
            bound_ms: Some(50.3),
            falls_below_ms,
            rises_above_ms,
        };
        for (falls, rises, reason, said) in [
            (
                Some(38.2),
                Some(55.0),
                "best",
                "falls below 38.2 ms, or if that of the route in use rises above 55.0",
            ),
            (Some(38.2), None, "best", "falls below 38.2 ms."),
            (None, Some(55.0), "best", "wins only if that of the route in use rises above 55.0"),
            (None, None, "best", "No round trip"),
            (Some(60.0), None, "held", "as soon as the last change is old enough"),
            (Some(60.0), None, "capped", "as soon as this tunnel may move"),
        ] {
            let text = turn(&found(falls, rises), reason);
            assert!(text.starts_with("Runner-up: a > b, compared by 50.3 ms. "), "{text}");
            assert!(text.contains(said), "{text}");
        }
    }

    #[test]
    fn the_outcome_is_a_sentence_with_its_numbers() {
        let mut outcome = Outcome {
            at_us: 0,
            model_version: "v1".into(),
            route: vec!["a".into(), "b".into()],
            forecast_ms: Some(40.0),
            interval_ms: Some((35.0, 45.0)),
            probed_us: 1,
            measured_ms: Some(44.0),
        };
        let text = result(&outcome);
        assert!(text.contains("expected 40.0 ms, interval 35.0..45.0 ms over a > b;"), "{text}");
        assert!(text.ends_with("measured 44.0 ms, +10.0 % off the forecast, inside the interval."));
        outcome.measured_ms = Some(46.0);
        assert!(result(&outcome).ends_with("outside the interval."));
        outcome.measured_ms = None;
        assert!(result(&outcome).ends_with("the next probe was lost."));
    }
}
