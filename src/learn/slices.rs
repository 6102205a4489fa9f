//! What the traffic of tunnels says about the bandwidth of routes: the rows of the throughput head.
//!
//! How fast a slice of traffic (`route_slice`) was delivered says what its route can carry only when
//! it was the route that held it up, and not an application that had nothing more to send. The rule
//! is that of BBR's bandwidth filter (draft-cardwell-iccrg-bbr-congestion-control: samples that the
//! application limited count only when they are above the estimate), with marks in place of its count
//! of what was under way:
//!
//! - The delivery rate is bytes sent, times the share of datagrams that arrived, by the time that the
//!   slice covers.
//! - It is the route's bandwidth when the traffic met congestion: at least [`MARKED_SHARE_MIN`] of
//!   what arrived had waited in the queue of some link.
//! - Without congestion it is when it is higher than every such rate of the same route in the
//!   [`ESTIMATE_US`] before: the route has become at least so wide. Other slices say nothing.
//!
//! So it is what one tunnel gets of a route beside the traffic of others, which is what a tunnel that
//! chooses a route wants to know. Only what this node sends is counted in bytes, so that nothing is
//! learned from downloads.

use std::collections::BTreeMap;

use crate::engine::measure::ProbeKind;
use crate::store::{ProbeRow, RouteSliceRow};

/// Fewest datagrams that arrived: below, a few marks decide.
pub const DATAGRAMS_MIN: u64 = 100;
/// Shortest time that a slice covers (µs): below, what was under way at its ends decides.
pub const COVERED_MIN_US: u64 = 1_000_000;
/// Share of datagrams with a mark from which on a slice met congestion. A guess: of what passed a
/// link at twice its capacity 13 % had one (`meshwise demo --scenario overload`), and a single burst
/// of somebody else marks less.
pub const MARKED_SHARE_MIN: f64 = 0.01;
/// Slices without congestion are measured by the estimates of so long before (µs): 10 minutes, 60
/// slices. A guess.
pub const ESTIMATE_US: u64 = 600_000_000;

/// A slice of traffic that shows the bandwidth of its route.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Carried {
    /// Where and when, as a row to compute features for: what was known when the slice began. A
    /// tunnel that was at rest in between began earlier than that.
    pub(super) moment: ProbeRow,
    /// What was delivered (bytes/s).
    pub(super) bandwidth: f64,
}

/// Those among the slices, which are in order of `at_us`.
pub(super) fn carried(slices: &[RouteSliceRow]) -> Vec<Carried> {
    // By route the rates that met congestion, with the end of their slice.
    let mut estimates: BTreeMap<&str, Vec<(u64, f64)>> = BTreeMap::new();
    let mut found = Vec::new();
    for slice in slices {
        let Some(bandwidth) = delivery_rate(slice) else { continue };
        let known = estimates.entry(&slice.route).or_default();
        known.retain(|(at_us, _)| slice.at_us - at_us <= ESTIMATE_US);
        let share = slice.marked_datagrams as f64 / slice.received_datagrams as f64;
        let most = known.iter().map(|(_, rate)| *rate).reduce(f64::max);
        if share >= MARKED_SHARE_MIN || most.is_some_and(|most| bandwidth > most) {
            known.push((slice.at_us, bandwidth));
            found.push(Carried { moment: moment(slice), bandwidth });
        }
    }
    found
}

/// Bytes/s that arrived; `None` when there was too little.
fn delivery_rate(slice: &RouteSliceRow) -> Option<f64> {
    let (sent, received) = (slice.sent_datagrams, slice.received_datagrams);
    if received < DATAGRAMS_MIN || slice.duration_us < COVERED_MIN_US || slice.sent_bytes == 0 {
        return None;
    }
    // What was under way when the slice began may arrive in it.
    let arrived = (received as f64 / sent.max(1) as f64).min(1.0);
    Some(slice.sent_bytes as f64 * arrived * 1e6 / slice.duration_us as f64)
}

fn moment(slice: &RouteSliceRow) -> ProbeRow {
    ProbeRow {
        kind: ProbeKind::Route,
        route: slice.route.clone(),
        hops: slice.route.matches('>').count() as u32,
        sent_us: slice.at_us.saturating_sub(slice.duration_us),
        done_us: slice.at_us,
        rtt_us: None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A slice of 10 s that ended at `at_us`: 1,000 bytes a datagram, all of which arrived.
    pub(crate) fn slice(route: &str, at_us: u64, bandwidth: f64, marked: f64) -> RouteSliceRow {
        let datagrams = (bandwidth / 100.0) as u64;
        RouteSliceRow {
            at_us,
            tunnel: 1,
            route: route.into(),
            route_id: 1,
            sent_datagrams: datagrams,
            received_datagrams: datagrams,
            sent_bytes: datagrams * 1_000,
            marked_datagrams: (datagrams as f64 * marked).ceil() as u64,
            rtt_us: Some(20_000),
            back_sent: 10,
            back_received: 10,
            duration_us: 10_000_000,
        }
    }

    const S: u64 = 1_000_000;

    #[test]
    fn traffic_that_met_congestion_shows_the_bandwidth_and_no_other() {
        let met = slice("a>c>b", 100 * S, 500_000.0, 0.02);
        let lossy = RouteSliceRow { sent_datagrams: 10_000, sent_bytes: 10_000_000, ..met.clone() };
        let slices = [
            slice("a>c>b", 50 * S, 900_000.0, 0.0),
            met.clone(),
            slice("a>c>b", 110 * S, 400_000.0, 0.009),
            lossy,
            slice("a>b", 130 * S, 9_900.0, 0.5),
            RouteSliceRow { duration_us: 999_999, ..met.clone() },
            RouteSliceRow { sent_bytes: 0, ..met.clone() },
        ];
        let found = carried(&slices);
        assert_eq!(found.iter().map(|c| c.bandwidth).collect::<Vec<_>>(), [500_000.0; 2]);
        let moment = &found[0].moment;
        assert_eq!((moment.route.as_str(), moment.hops, moment.rtt_us), ("a>c>b", 2, None));
        assert_eq!((moment.sent_us, moment.done_us), (90 * S, 100 * S));
    }

    #[test]
    fn what_is_faster_than_the_estimate_raises_it_as_long_as_there_is_one() {
        let free = |at_s: u64, bandwidth| slice("a>b", at_s * S, bandwidth, 0.0);
        let slices = [
            slice("a>b", 10 * S, 500_000.0, 0.1),
            free(20, 600_000.0),
            free(30, 550_000.0),
            slice("a>c>b", 40 * S, 700_000.0, 0.0),
            free(620, 590_000.0),
            free(621, 900_000.0),
            free(1_222, 950_000.0),
        ];
        let found: Vec<f64> = carried(&slices).iter().map(|c| c.bandwidth).collect();
        assert_eq!(found, [500_000.0, 600_000.0], "the second estimate is over at 620.000001 s");
    }
}
