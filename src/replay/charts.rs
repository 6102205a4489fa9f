//! Pictures of a replay, as SVG.

use std::path::Path;

use plotters::prelude::*;

use super::meshwise::LEVELS;
use super::policy::{NAMES, ORACLE};
use super::run::Run;

/// Size of a picture (pixels).
const SIZE: (u32, u32) = (900, 520);
/// Points of a curve: more do not show.
const POINTS: usize = 200;
/// Policies whose curves are drawn; the others crowd the picture.
const DRAWN: [&str; 7] = ["direct", "last", "ewma", "via", "meshwise", "meshwise-live", "oracle"];

/// Names of the pictures.
pub const FILES: [&str; 4] = ["latency_cdf.svg", "regret.svg", "calibration.svg", "coverage.svg"];

/// A named curve.
type Curve = (&'static str, Vec<(f64, f64)>);

/// Draws all pictures into a folder and returns their names.
///
/// # Errors
/// In words, when a file cannot be written.
pub fn draw(folder: &Path, runs: &[Run]) -> Result<Vec<&'static str>, String> {
    let [cdf_file, regret_file, calibration_file, coverage_file] = FILES;
    let pictures = [
        (cdf_file, "Cost of the chosen routes", "ms", "share of decisions", cdf(runs)),
        (regret_file, "Regret against the oracle", "hours", "mean ms so far", regret(runs)),
        (
            calibration_file,
            "Truths inside the interval",
            "stated share",
            "observed share",
            calibration(runs),
        ),
        (coverage_file, "Truths inside the 90 % interval", "hours", "share inside", coverage(runs)),
    ];
    let mut drawn = Vec::new();
    for (name, title, x, y, curves) in pictures {
        if curves.iter().all(|(_, points)| points.is_empty()) {
            continue;
        }
        lines(&folder.join(name), title, x, y, &curves)
            .map_err(|error| format!("cannot draw {name}: {error}"))?;
        drawn.push(name);
    }
    Ok(drawn)
}

fn policies() -> impl Iterator<Item = (usize, &'static str)> {
    NAMES.into_iter().enumerate().filter(|(_, name)| DRAWN.contains(name))
}

fn cdf(runs: &[Run]) -> Vec<Curve> {
    let curve = |(policy, name)| {
        let all = runs.iter().flat_map(|run| &run.outcomes);
        let mut costs: Vec<f64> = all.map(|outcome| outcome.costs_ms[policy]).collect();
        costs.sort_by(f64::total_cmp);
        // The last percent would stretch the axis over everything else.
        let shares = (0..=POINTS).map(|point| 0.99 * point as f64 / POINTS as f64);
        let at = |share: f64| costs.get((share * costs.len() as f64) as usize).copied();
        let points = shares.filter_map(|share| Some((at(share)?, share))).collect();
        (name, points)
    };
    policies().map(curve).collect()
}

fn regret(runs: &[Run]) -> Vec<Curve> {
    let mut outcomes: Vec<_> = runs.iter().flat_map(|run| &run.outcomes).collect();
    outcomes.sort_by(|a, b| a.t_s.total_cmp(&b.t_s));
    let every = outcomes.len().div_ceil(POINTS).max(1);
    let curve = |(policy, name)| {
        let mut sum = 0.0;
        let mut points = Vec::new();
        for (index, outcome) in outcomes.iter().enumerate() {
            sum += outcome.costs_ms[policy] - outcome.costs_ms[ORACLE];
            if (index + 1) % every == 0 {
                points.push((outcome.t_s / 3_600.0, sum / (index + 1) as f64));
            }
        }
        (name, points)
    };
    // The direct route's regret would dwarf the differences that matter.
    policies().filter(|(_, name)| !["oracle", "direct"].contains(name)).map(curve).collect()
}

/// Stated against observed coverage at each level, of all seeds.
fn calibration(runs: &[Run]) -> Vec<Curve> {
    let all = || runs.iter().flat_map(|run| &run.forecasts);
    let count = all().count();
    if count == 0 {
        return vec![("observed", Vec::new())];
    }
    let observed = |(at, level): (usize, f64)| {
        (level, all().filter(|forecast| forecast.held[at]).count() as f64 / count as f64)
    };
    let observed = LEVELS.into_iter().enumerate().map(observed).collect();
    vec![("observed", observed), ("ideal", vec![(0.0, 0.0), (1.0, 1.0)])]
}

/// Coverage of the 90 % interval over the time of the first run.
fn coverage(runs: &[Run]) -> Vec<Curve> {
    let Some(run) = runs.first() else { return Vec::new() };
    let every = run.forecasts.len().div_ceil(POINTS / 4).max(1);
    let hours = run.scored_s / 3_600.0;
    let blocks = run.forecasts.chunks(every).enumerate();
    let points: Vec<(f64, f64)> = blocks
        .map(|(index, block)| {
            let inside = block
                .iter()
                .filter(|f| f.interval_ms.0 <= f.truth_ms && f.truth_ms <= f.interval_ms.1);
            let at = (index as f64 + 0.5) * every as f64 / run.forecasts.len() as f64;
            (at * hours, inside.count() as f64 / block.len() as f64)
        })
        .collect();
    let nominal = points.iter().map(|(at, _)| (*at, 0.9)).collect();
    vec![("seed of the first run", points), ("nominal", nominal)]
}

fn lines(
    path: &Path,
    title: &str,
    x: &str,
    y: &str,
    curves: &[Curve],
) -> Result<(), Box<dyn std::error::Error>> {
    let all = || curves.iter().flat_map(|(_, points)| points);
    let range = |of: fn(&(f64, f64)) -> f64| {
        let low = all().map(of).fold(f64::INFINITY, f64::min);
        let high = all().map(of).fold(f64::NEG_INFINITY, f64::max);
        low..high.max(low + 1e-6)
    };
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 22))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(range(|point| point.0), range(|point| point.1))?;
    chart.configure_mesh().x_desc(x).y_desc(y).light_line_style(WHITE).draw()?;
    for (index, (name, points)) in curves.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        let width = if *name == "meshwise" { 3 } else { 1 };
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(width)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}
