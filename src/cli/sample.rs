//! `meshwise data sample`: measurements of a simulated mesh, for notebooks and newcomers.
//!
//! Eight nodes, sixteen links, one observer with three tunnels. The engine is the real one, in
//! virtual time; only the links are modelled:
//!
//! - Each link carries a load: its own level, a daily rhythm (lowest at 04:00, highest at 16:00
//!   UTC), a slow wander, and episodes of congestion. Queueing delay is that of an M/M/1 queue,
//!   in proportion to `load / (1 - load)`; jitter grows with it, loss begins near saturation.
//! - One link is cut for a while, one turns bad for good.
//! - The load is also what the data plane reports as utilisation.
//!
//! The same seed gives the same measurements, and a longer run begins with the shorter one: what a
//! model learned from the first hours can be judged on the next.

use std::f64::consts::{PI, TAU};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::Context;
use crate::engine::Intervals;
use crate::engine::event::{Command, Input};
use crate::engine::measure::LinkReport;
use crate::engine::overlay::Objective;
use crate::engine::route::PathPolicy;
use crate::engine::types::{Timestamp, TunnelId};
use crate::learn::{Exported, LearnError, export, refuse_unless_empty};
use crate::node::DATABASE;
use crate::sim::{LinkModel, World};
use crate::store::{Retention, Writer};

/// Generate measurements of a simulated mesh, and export them.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder to write to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Decides everything that is random; the same seed gives the same rows.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Length of the simulation, from 09:00 UTC on: 0.1 to 48.
    #[arg(long, default_value_t = HOURS, value_parser = hours)]
    hours: f64,
    /// Keep the database in this new folder; `--data-dir` of other commands reads it.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Replace an earlier export there.
    #[arg(long)]
    force: bool,
}

/// Default length (h): the part of the morning in which the daily rhythm rises fastest.
const HOURS: f64 = 3.0;
/// Longest simulation (h): two days.
const HOURS_MAX: f64 = 48.0;
/// When the simulation begins: 2025-09-01, a Monday, 09:00 UTC (µs since the epoch).
const START: Timestamp = Timestamp(1_756_717_200_000_000);
const NODES: usize = 8;
/// The node whose measurements are kept.
const OBSERVER: usize = 0;
/// Where its tunnels end: near, far, and in between.
const FAR_ENDS: [usize; 3] = [5, 6, 7];
/// Candidate routes of each tunnel, the disjoint backup not counted.
const CANDIDATES: usize = 4;
/// The links: two nodes, and the one-way delay of the empty link (ms).
const LINKS: [(usize, usize, f64); 16] = [
    (0, 1, 8.0),
    (0, 2, 14.0),
    (0, 3, 22.0),
    (0, 5, 30.0),
    (0, 7, 52.0),
    (1, 2, 6.0),
    (1, 4, 12.0),
    (2, 4, 20.0),
    (2, 5, 18.0),
    (3, 5, 10.0),
    (3, 6, 16.0),
    (4, 6, 9.0),
    (4, 7, 15.0),
    (5, 6, 7.0),
    (5, 7, 11.0),
    (6, 7, 20.0),
];
/// Sparser than on a real node: hours of it have to fit into a repository.
const INTERVALS: Intervals = Intervals {
    link_probe: Duration::from_secs(15),
    active_probe: Duration::from_secs(15),
    candidate_probe: Duration::from_secs(30),
    decide: Duration::from_secs(60),
};
/// The links change this often.
const STEP: Duration = Duration::from_secs(5);
/// The data plane reports this often, in steps.
const STEPS_PER_SLICE: u64 = 6;
/// What was observed goes to the store this often, in steps.
const STEPS_PER_WRITE: u64 = 360;

/// Which link is cut, from and to which second.
const CUT: (usize, f64, f64) = (0, 2_700.0, 3_000.0);
/// Which link turns bad, and at which second.
const TURNS_BAD: (usize, f64) = (12, 5_400.0);
/// One-way delay (ms) and loss that it then has on top.
const BAD: (f64, f64) = (25.0, 0.02);

/// Queueing delay at half load, each way (ms).
const QUEUE_MS: f64 = 3.0;
/// Highest load: at 0.95 a packet waits behind 19 others on average.
const LOAD_MAX: f64 = 0.95;
/// Load that the daily rhythm adds at its height.
const RHYTHM: f64 = 0.45;
/// Time in which the slow wander forgets (s), and its standard deviation.
const WANDER: (f64, f64) = (180.0, 0.06);
/// Mean time between two episodes of congestion of a link (s).
const EPISODE_GAP_S: f64 = 3_000.0;
/// What links can carry (bytes/s): 10, 20 and 100 Mbit/s.
const RATES: [f64; 3] = [1.25e6, 2.5e6, 1.25e7];
/// Bytes of a datagram in the reports of the data plane.
const DATAGRAM_BYTES: u64 = 1_200;

fn hours(text: &str) -> Result<f64, String> {
    let hours = text.parse::<f64>().map_err(|error| error.to_string())?;
    let good = (0.1..=HOURS_MAX).contains(&hours);
    good.then_some(hours).ok_or_else(|| format!("it must be 0.1 to {HOURS_MAX}"))
}

/// Simulates, stores and exports.
pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    refuse_unless_empty(&args.out, args.force)?;
    let scratch = tempfile::tempdir()?;
    let folder = match &args.keep {
        Some(folder) => {
            std::fs::create_dir(folder).with_context(|| {
                format!("cannot keep the database in {}: name a new folder", folder.display())
            })?;
            folder.as_path()
        }
        None => scratch.path(),
    };
    let database = folder.join(DATABASE);
    simulate(args.seed, args.hours, &database, |hour| {
        eprintln!("simulated {hour:.1} of {:.1} h", args.hours);
    })?;
    eprintln!("computing the features ...");
    let exported: Result<Exported, LearnError> = export(&database, &args.out, args.force);
    super::data::report(&args.out, &exported?, context)
}

/// One link over time.
struct Link {
    ends: (usize, usize),
    delay_ms: f64,
    /// What it can carry (bytes/s).
    rate: f64,
    /// Load without rhythm and episodes.
    level: f64,
    wander: f64,
    /// Begin and end (s since the start) and height of each episode, in order.
    episodes: Vec<(f64, f64, f64)>,
}

impl Link {
    /// Episodes are drawn for the longest run, whatever the length of this one.
    fn draw(ends: (usize, usize), delay_ms: f64, random: &mut Pcg64Mcg) -> Self {
        let mut episodes = Vec::new();
        let mut at = 0.0;
        loop {
            // Exponential gaps: nothing announces an episode.
            at -= EPISODE_GAP_S * (1.0 - random.random::<f64>()).ln();
            if at >= HOURS_MAX * 3_600.0 {
                break;
            }
            let end = at + random.random_range(180.0..900.0);
            episodes.push((at, end, random.random_range(0.2..0.6)));
            at = end;
        }
        let rate = RATES[random.random_range(0..RATES.len())];
        let level = random.random_range(0.1..0.4);
        Self { ends, delay_ms, rate, level, wander: 0.0, episodes }
    }

    /// The load `seconds` after the start, 0 to [`LOAD_MAX`].
    fn load(&mut self, seconds: f64, random: &mut Pcg64Mcg) -> f64 {
        let kept = (-STEP.as_secs_f64() / WANDER.0).exp();
        // A uniform number of this range has the standard deviation 1.
        let noise = (random.random::<f64>() - 0.5) * 12_f64.sqrt();
        self.wander = kept * self.wander + WANDER.1 * (1.0 - kept * kept).sqrt() * noise;
        let hour = (START.as_micros() as f64 / 1e6 + seconds) / 3_600.0;
        let rhythm = RHYTHM * (1.0 - (TAU * (hour - 4.0) / 24.0).cos()) / 2.0;
        let episodes = self.episodes.iter().filter(|(from, to, _)| (*from..*to).contains(&seconds));
        let congestion: f64 = episodes
            .map(|(from, to, height)| height * (PI * (seconds - from) / (to - from)).sin())
            .sum();
        (self.level + self.wander + rhythm + congestion).clamp(0.0, LOAD_MAX)
    }

    fn model(&self, load: f64) -> LinkModel {
        let queueing_ms = QUEUE_MS * load / (1.0 - load);
        LinkModel {
            delay_ms: self.delay_ms + queueing_ms,
            jitter_ms: 0.2 + 0.4 * queueing_ms,
            loss: 0.003 + 0.5 * (load - 0.8).max(0.0),
            rate: None,
        }
    }
}

/// Runs the mesh and stores what the observer measured and decided. `progress` is told the hours
/// that are over.
fn simulate(
    seed: u64,
    hours: f64,
    database: &Path,
    mut progress: impl FnMut(f64),
) -> anyhow::Result<()> {
    let seconds = hours * 3_600.0;
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    let mut world = World::new(random.random(), START);
    let paths = PathPolicy { candidates: CANDIDATES, ..PathPolicy::default() };
    for node in 0..NODES {
        // Everybody dials all earlier neighbours, so that all links exist.
        let earlier = LINKS.iter().filter(|(_, b, _)| *b == node).map(|(a, ..)| *a);
        world.add_node(&earlier.collect::<Vec<_>>(), paths, INTERVALS);
    }
    let mut links: Vec<Link> =
        LINKS.iter().map(|(a, b, delay_ms)| Link::draw((*a, *b), *delay_ms, &mut random)).collect();
    let writer = Writer::start(database, Retention::default())?;
    let (mut samples, mut decisions) = (0, 0);
    let steps = (seconds / STEP.as_secs_f64()).ceil() as u64;
    for step in 0..steps {
        let at_s = step as f64 * STEP.as_secs_f64();
        for (index, link) in links.iter_mut().enumerate() {
            let load = link.load(at_s, &mut random);
            let mut model = link.model(load);
            if index == CUT.0 && (CUT.1..CUT.2).contains(&at_s) {
                model.loss = 1.0;
            }
            if index == TURNS_BAD.0 && at_s >= TURNS_BAD.1 {
                model.delay_ms += BAD.0;
                model.loss += BAD.1;
            }
            world.set_link(link.ends.0, link.ends.1, model);
            if step % STEPS_PER_SLICE == STEPS_PER_SLICE - 1 {
                report(&mut world, link, load);
            }
        }
        if step == 1 {
            for (tunnel, far_end) in (1..).zip(FAR_ENDS) {
                let open = Command::OpenTunnel {
                    tunnel: TunnelId(tunnel),
                    destination: world.id(far_end),
                    forced: None,
                    objective: Objective::Balanced,
                    beside: None,
                    reserve: None,
                };
                world.command(OBSERVER, open);
            }
        }
        world.run_for(STEP);
        if (step + 1) % STEPS_PER_WRITE == 0 || step + 1 == steps {
            let (all, made) = (world.samples(OBSERVER), world.decisions(OBSERVER));
            all[samples..].iter().for_each(|sample| writer.write(sample.clone()));
            // How long a decision took is a matter of this machine and not of the sample.
            made[decisions..].iter().for_each(|decision| writer.decision(decision.clone(), 0));
            (samples, decisions) = (all.len(), made.len());
            writer.flush()?;
            progress((step + 1) as f64 * STEP.as_secs_f64() / 3_600.0);
        }
    }
    match writer.dropped() {
        0 => Ok(()),
        rows => bail!("the store refused {rows} rows; report it with the seed and the hours"),
    }
}

/// Tells both ends of a link what their data planes counted in the last slice.
fn report(world: &mut World, link: &Link, load: f64) {
    let duration_us = STEPS_PER_SLICE * STEP.as_micros() as u64;
    // In whole percent, as coarse as a counter read now and then.
    let busy_us = (load * 100.0).round() as u64 * duration_us / 100;
    let sent_bytes = (link.rate * busy_us as f64 / 1e6) as u64;
    let counted = LinkReport {
        sent_bytes,
        sent_datagrams: sent_bytes / DATAGRAM_BYTES,
        dropped_datagrams: 0,
        busy_us,
        duration_us,
    };
    let (a, b) = link.ends;
    for (here, there) in [(a, b), (b, a)] {
        let there = world.id(there);
        world.input(here, Input::Slice(vec![(there, counted)]));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::engine::measure::ProbeKind;
    use crate::store::{DecisionRow, LinkStateRow, ProbeRow, Reader};

    type Rows = (Vec<ProbeRow>, Vec<ProbeRow>, Vec<LinkStateRow>, Vec<DecisionRow>);

    fn rows(seed: u64, hours: f64) -> Rows {
        let folder = tempfile::tempdir().unwrap();
        let database = folder.path().join(DATABASE);
        simulate(seed, hours, &database, |_| {}).unwrap();
        let reader = Reader::open(&database).unwrap();
        (
            reader.probes(ProbeKind::Route, 0).unwrap(),
            reader.probes(ProbeKind::Link, 0).unwrap(),
            reader.link_states(0).unwrap(),
            reader.decisions(0).unwrap(),
        )
    }

    #[test]
    fn the_same_seed_gives_the_same_rows() {
        let first = rows(1, 0.1);
        assert!(!first.0.is_empty() && !first.1.is_empty() && !first.3.is_empty());
        assert_eq!(first, rows(1, 0.1));
        assert_ne!(first.0, rows(2, 0.1).0);
        let mut longer = rows(1, 0.2);
        let end_us = START.as_micros() + 360_000_000;
        longer.0.retain(|probe| probe.done_us <= end_us);
        longer.1.retain(|probe| probe.done_us <= end_us);
        longer.2.retain(|state| state.at_us <= end_us);
        longer.3.retain(|decision| decision.at_us <= end_us);
        assert_eq!(first, longer, "a longer run begins with the shorter one");
    }

    #[test]
    fn there_is_something_of_everything() {
        let (routes, links, states, decisions) = rows(1, 1.0);
        let hops: BTreeSet<u32> = routes.iter().map(|probe| probe.hops).collect();
        assert!(hops.is_superset(&BTreeSet::from([1, 2, 3])), "{hops:?}");
        for (kind, probes) in [("route", &routes), ("link", &links)] {
            let lost = probes.iter().filter(|probe| probe.rtt_us.is_none()).count();
            assert!(lost > 0 && 4 * lost < probes.len(), "{lost} lost {kind} probes");
        }
        assert!(states.iter().any(|state| state.quality.is_none()), "the cut link is withdrawn");
        let busy = |state: &LinkStateRow| state.quality.is_some_and(|q| q.utilisation > 0.3);
        let known = |state: &LinkStateRow| state.quality.is_some_and(|q| q.bandwidth.is_some());
        assert!(states.iter().any(busy) && states.iter().any(known));
        let far_ends: BTreeSet<&str> = decisions.iter().map(|d| d.destination.as_str()).collect();
        assert_eq!(far_ends.len(), FAR_ENDS.len());
        assert!(decisions.iter().any(|decision| decision.candidates.len() > CANDIDATES - 1));
    }

    #[test]
    fn load_follows_the_day_and_fills_the_queue() {
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let mut link = Link::draw((0, 1), 10.0, &mut random);
        link.episodes = vec![(25_200.0, 25_800.0, 0.5)];
        let mut mean = |link: &mut Link, from_s: f64| {
            let loads = (0..600).map(|step| link.load(from_s + f64::from(step), &mut random));
            loads.sum::<f64>() / 600.0
        };
        let (morning, afternoon) = (mean(&mut link, 0.0), mean(&mut link, 24_000.0));
        assert!(afternoon > morning + 0.15, "{morning} {afternoon}");
        assert!(mean(&mut link, 25_200.0) > afternoon + 0.1);
        let (free, full) = (link.model(0.1), link.model(LOAD_MAX));
        assert!(full.delay_ms > free.delay_ms + 40.0 && full.loss > 0.02 && free.loss < 0.01);
    }
}
