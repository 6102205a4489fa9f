//! `meshwise replay`

use std::path::PathBuf;

use clap::ArgAction;

use super::{Context, output};
use crate::engine::predict::Ranking;
use crate::learn::TrainConfig;
use crate::replay::report::Calibration;
use crate::replay::{Quantity, ReplayConfig, Report, TRAININGS, replay};

/// Arguments of `meshwise replay`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Parquet file, one row a measurement: t_s (f64), src, dst (text), rtt_ms (f32, null: no
    /// reply), throughput_mbps (f32, optional), changepoint (bool, optional).
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Links that each node measures a round, or 'all'.
    #[arg(long, default_value = "8", value_parser = parse_probes, value_name = "N|all")]
    probes: Probes,
    /// First seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seeds, one run each.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
    /// Decisions of a seed [default: about 40,000].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    decisions: Option<u32>,
    /// Replay the throughput column; costs are milliseconds a megabit over the narrowest hop.
    #[arg(long)]
    throughput: bool,
    /// Leave every decision and the training rows (Parquet), pictures (SVG), the measurements (a store)
    /// and the last model in this folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Replace what an earlier replay left there.
    #[arg(long, requires = "out")]
    force: bool,
    /// Whether meshwise chooses within the budget what it measures, or shares the fair rotation of the
    /// others: tells what measuring gains from what the model does.
    #[arg(long, default_value = "on", value_name = "on|off", value_parser = parse_switch, action = ArgAction::Set)]
    own_probes: bool,
    /// Trainings after the warm-up.
    #[arg(long, default_value_t = TRAININGS as u32, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    trainings: u32,
    /// Train no models: meshwise decides on level and spread alone.
    #[arg(long)]
    no_learning: bool,
}

#[derive(Clone, Copy, Debug)]
struct Probes(Option<usize>);

fn parse_probes(text: &str) -> Result<Probes, String> {
    match text.parse::<usize>() {
        _ if text == "all" => Ok(Probes(None)),
        Ok(count) if count >= 1 => Ok(Probes(Some(count))),
        _ => Err("it is a number from 1, or 'all'".into()),
    }
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("it is 'on' or 'off'".into()),
    }
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    let config = ReplayConfig {
        trace: args.trace.clone(),
        quantity: if args.throughput { Quantity::Throughput } else { Quantity::Latency },
        probes: args.probes.0,
        seeds: (0..args.seeds).map(|index| args.seed.wrapping_add(index)).collect(),
        decisions: args.decisions.map(|count| count as usize),
        learning: !args.no_learning,
        own_probes: args.own_probes,
        trainings: args.trainings as usize,
        force: args.force,
        out: args.out.clone(),
        train: TrainConfig::default(),
    };
    let report = replay(&config, |seed| eprintln!("seed {seed} done"))?;
    if context.json {
        return output::json(&report);
    }
    print(&report)
}

fn print(report: &Report) -> anyhow::Result<()> {
    output::print(&format!(
        "{}: {} rows, {} nodes, {} rounds; {} decisions for {} pairs, {} seeds\n",
        report.trace,
        report.rows,
        report.nodes,
        report.rounds,
        report.decisions,
        report.pairs,
        report.seeds.len(),
    ))?;
    let columns = [
        "policy",
        "mean ms",
        "p95",
        "p99",
        "of direct",
        "95 %",
        "of oracle's gain",
        "95 %",
        "> direct + 10 %",
        "95 %",
        "changes/h",
        "above meshwise ms",
        "95 %",
    ];
    let mut table = output::table(&columns);
    let share = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.4}"));
    let range = |ci: Option<(f64, f64)>| {
        ci.map_or("-".into(), |(low, high)| format!("{low:.4} to {high:.4}"))
    };
    for policy in &report.policies {
        let above = policy.above_meshwise_ms;
        table.add_row([
            policy.name.to_owned(),
            format!("{:.2}", policy.latency_ms.mean),
            format!("{:.1}", policy.latency_ms.p95),
            format!("{:.1}", policy.latency_ms.p99),
            share(policy.relative_to_direct),
            range(policy.ci.relative_to_direct),
            share(policy.share_of_oracle_gain),
            range(policy.ci.share_of_oracle_gain),
            policy.worse_than_direct_10pct.map_or("-".into(), |w| format!("{:.2} %", 100.0 * w)),
            policy.ci.worse_than_direct_10pct.map_or("-".into(), |(low, high)| {
                format!("{:.2} to {:.2}", 100.0 * low, 100.0 * high)
            }),
            format!("{:.3}", policy.route_changes_per_hour),
            format!("{:+.3}", above.value),
            format!("{:+.3} to {:+.3}", above.ci.0, above.ci.1),
        ]);
    }
    output::rows(&table, "no decision could be scored")?;
    if let Some(prediction) = &report.prediction {
        let skill = prediction.skill_vs_best_naive;
        output::print(&format!(
            "\nforecasts: {} compared; within 20 % or 5 ms {:.4} (15 % {:.4}, 10 % {:.4}; last value \
             {:.4}, moving average {:.4}); median error {:.4}; rank correlation {:.4}\n\
             skill against the {}: {:+.4} ({:+.4} to {:+.4}); 90 % interval: coverage {:.4}{}, mean \
             width {:.3} of the truth\nworst pair against the moving average: {} by {:+.4} ln(ms); the mix of \
             all: {:+.4} a forecast, its stated slack {:.4}",
            prediction.forecasts,
            prediction.accuracy,
            prediction.accuracy_15pct,
            prediction.accuracy_10pct,
            prediction.naive_accuracy[0],
            prediction.naive_accuracy[1],
            prediction.mdape,
            prediction.spearman,
            prediction.best_naive,
            skill.value,
            skill.ci.0,
            skill.ci.1,
            prediction.coverage_90,
            prediction
                .coverage_90_after_change
                .map_or(String::new(), |share| format!(" ({share:.4} in the hour after a change)")),
            prediction.width_90,
            prediction.worst_pair.0,
            prediction.worst_pair.1,
            prediction.excess_over_moving_average_ln,
            prediction.slack_ln,
        ))?;
        let level = |level: &Calibration| {
            format!("{:.0} % {:.1}", 100.0 * level.nominal, 100.0 * level.observed)
        };
        let levels: Vec<String> = prediction.calibration.iter().map(level).collect();
        output::print(&format!("intervals stated and held: {}", levels.join(", ")))?;
    }
    if let Some(best) = &report.best_fixed_rule {
        let Ranking { centre, pessimism, staleness, margin } = best.rule;
        let of_direct = best.relative_to_direct;
        output::print(&format!(
            "best fixed rule in hindsight: {centre:?}, pessimism {pessimism}, staleness {staleness}, margin \
             {margin}: {:.2} ms{} in {} decisions, meshwise {:.2}",
            best.mean_ms,
            of_direct.map_or(String::new(), |share| format!(" ({share:.4} of direct)")),
            best.decisions,
            best.meshwise_ms,
        ))?;
    }
    if let Some(judged) = &report.estimators
        && let Some(estimates) = &judged.estimates
    {
        output::print(&format!(
            "judged from a log: truth {:.2} ms; doubly robust {:.2} ({:.2} to {:.2}), IPS {:.2}, SNIPS \
             {:.2}, direct method {:.2}; effective size {:.0} of {}; the doubly robust interval holds \
             the truth in {} of {} logs, {} refused",
            judged.truth_ms,
            estimates.doubly_robust.value,
            estimates.doubly_robust.low,
            estimates.doubly_robust.high,
            estimates.ips.value,
            estimates.snips.value,
            estimates.direct_method.value,
            estimates.effective_sample_size,
            estimates.decisions,
            judged.covered,
            judged.logs,
            judged.refused,
        ))?;
    }
    for file in &report.files {
        eprintln!("wrote {file}");
    }
    output::print(&format!(
        "{} models trained, {} put into use; {} decisions not scored; {:.1} s",
        report.models_trained, report.models_promoted, report.decisions_dropped, report.wall_s
    ))
}
