//! `meshwise model judge`: what a model that did not decide would have cost.

use super::{Context, output};
use crate::learn::offpolicy::Estimate;
use crate::learn::{Judged, judge_in_store};
use crate::node::{DATABASE, MODELS};

pub(super) fn run(name: &str, context: &Context) -> anyhow::Result<()> {
    let (database, models) = (context.data_dir.join(DATABASE), context.data_dir.join(MODELS));
    let judged = judge_in_store(&database, &models, name)?;
    if context.json {
        return output::json(&judged);
    }
    print(&judged)
}

fn print(judged: &Judged) -> anyhow::Result<()> {
    let estimates = &judged.estimates;
    output::print(&format!(
        "{} on {} logged decisions from {} to {}\nmean round trip that its choices would have had, with \
         intervals of 95 %:\n",
        judged.version,
        estimates.decisions,
        output::time(judged.from_us),
        output::time(judged.to_us),
    ))?;
    let mut table = output::table(&["estimate", "ms", "from", "to"]);
    let mut row = |name: &str, of: &Estimate| {
        let number = |ms: f64| format!("{ms:.2}");
        table.add_row([name.to_owned(), number(of.value), number(of.low), number(of.high)]);
    };
    row("doubly robust", &estimates.doubly_robust);
    row("SNIPS", &estimates.snips);
    row("IPS", &estimates.ips);
    row("direct method", &estimates.direct_method);
    row("what the log chose", &judged.log);
    output::rows(&table, "")?;
    output::print(&format!(
        "\nworth {:.0} decisions of its own (effective sample size; 100 are needed); it would have chosen \
         as the log did in {:.1} %\nleft out: {} decisions in which one route had all the probability, {} \
         without an answered probe after them, {} without a forecast",
        estimates.effective_sample_size,
        100.0 * judged.agreement,
        judged.without_choice,
        judged.without_outcome,
        judged.without_preference,
    ))
}
