//! Quality of this node's own links, from probes and from what the data plane counted.
//!
//! The rule:
//! - RTT is smoothed as TCP does (RFC 6298: gain 1/8); jitter is the smoothed absolute
//!   difference of consecutive RTTs (RFC 3550, section 6.4.1: gain 1/16).
//! - Loss is the share of lost probes among the newest [`LOSS_WINDOW`].
//! - Bandwidth is the delivery rate while the sender was busy: bytes sent divided by the time in
//!   which the link could not take more. A link that was never busy has no estimate, because
//!   what an idle sender sends says nothing about capacity (BBR, draft-cardwell-iccrg-bbr:
//!   application-limited samples).
//! - Utilisation is the busy share of the newest slice.
//! - A link is down after [`DEAD_AFTER`] lost probes in a row, or at once when its connection
//!   closes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::window::Window;
use crate::engine::traffic::Capacity;
use crate::engine::types::NodeId;

/// Probes over which loss is counted: at one probe a second, the last minute.
pub const LOSS_WINDOW: usize = 60;
/// Lost probes in a row after which a link is down.
pub const DEAD_AFTER: u32 = 3;
/// Fewest bytes in a slice that give a bandwidth estimate: below, one datagram decides it.
pub const BANDWIDTH_BYTES_MIN: u64 = 2_000;
/// Smallest busy share of a slice that gives a bandwidth estimate: below, a few waits of the
/// sender's own processor decide it.
pub const BUSY_SHARE_MIN: f64 = 0.05;
/// Smallest change of a round-trip time that counts (ms).
pub const RTT_STEP_MS: f64 = 1.0;
/// Changes of a smoothed round-trip time within so many times its jitter are noise: of independent round
/// trips, two smoothed values differ by a standard deviation of a third of the jitter.
pub const NOISE: f64 = 1.5;
/// Probes in a row within [`STEADY_SHARE`] of the smoothed round-trip time after which a link is steady: as
/// many as it takes to forget a change (the gain is 1/8).
pub const STEADY_PROBES: u32 = 10;
/// See [`STEADY_PROBES`]: what is more is a change that others will be told of.
pub const STEADY_SHARE: f64 = 0.2;
/// See [`STEADY_PROBES`]: a single round trip, not a smoothed one, in times the jitter.
const STEADY_NOISE: f64 = 4.0;
/// Datagrams in a second beyond which a link carries more than probes of its two ends and of a few routes
/// (a guess).
const IDLE_DATAGRAMS_PER_S: f64 = 10.0;
/// Most neighbours of one node; further ones are refused. A guess: four times the degree the
/// overlay needs at 10,000 nodes.
pub const NEIGHBOURS_MAX: usize = 64;
/// Gain of the smoothed RTT (RFC 6298, section 2).
const RTT_GAIN: f64 = 1.0 / 8.0;
/// Gain of the jitter (RFC 3550, section 6.4.1).
const JITTER_GAIN: f64 = 1.0 / 16.0;

/// What is said of one direction of a link, by measurement or by advertisement.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkQuality {
    /// Smoothed round-trip time (ms).
    pub rtt_ms: f64,
    /// Smoothed absolute RTT difference (ms).
    pub jitter_ms: f64,
    /// Share of probes lost, 0 to 1.
    pub loss: f64,
    /// Delivery rate while busy (bytes/s); `None` when never busy.
    pub bandwidth: Option<f64>,
    /// Share of time in which the sender was busy, 0 to 1.
    pub utilisation: f64,
}

impl LinkQuality {
    /// Whether every number is finite and in range; anything else is refused on receipt.
    pub fn is_sane(&self) -> bool {
        let unit = 0.0..=1.0;
        (0.0..=60_000.0).contains(&self.rtt_ms)
            && (0.0..=60_000.0).contains(&self.jitter_ms)
            && unit.contains(&self.loss)
            && unit.contains(&self.utilisation)
            && self.bandwidth.is_none_or(|b| b.is_finite() && b >= 0.0)
    }

    /// Whether any number moved by more than `share` of its old value. The smallest moves that count are
    /// 2 points of loss, 10 points of utilisation, and of the round-trip time `step_ms` and
    /// [`NOISE`] times its jitter now: what is within the noise of the link itself is no news, that a noisy time is
    /// over is.
    pub fn differs_by(&self, other: &LinkQuality, share: f64, step_ms: f64) -> bool {
        let moved = |a: f64, b: f64, least: f64| (a - b).abs() > (share * b.abs()).max(least);
        moved(self.rtt_ms, other.rtt_ms, step_ms.max(NOISE * self.jitter_ms))
            || moved(self.loss, other.loss, 0.02)
            || moved(self.utilisation, other.utilisation, 0.1)
            || match (self.bandwidth, other.bandwidth) {
                (Some(a), Some(b)) => moved(a, b, 0.0),
                (a, b) => a.is_some() != b.is_some(),
            }
    }
}

/// What the data plane counted on one link in one slice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkReport {
    /// Bytes handed to the link, headers included.
    pub sent_bytes: u64,
    /// Datagrams handed to the link.
    pub sent_datagrams: u64,
    /// Datagrams dropped because the queue was full.
    pub dropped_datagrams: u64,
    /// Time in which the link could not take more (µs).
    pub busy_us: u64,
    /// Length of the slice (µs).
    pub duration_us: u64,
}

/// Whether a link can carry traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Connected, no probe answered yet.
    New,
    /// Answers probes.
    Up,
    /// Silent; still connected.
    Down,
}

#[derive(Clone, Debug)]
struct Link {
    state: LinkState,
    rtt_ms: Option<f64>,
    last_rtt_ms: f64,
    jitter_ms: f64,
    lost: Window<bool>,
    failure_streak: u32,
    /// Probes in a row that said nothing new.
    steady: u32,
    /// It carried traffic in the newest slice.
    in_use: bool,
    capacity: Capacity,
    utilisation: f64,
}

impl Link {
    fn quality(&self) -> Option<LinkQuality> {
        let lost = self.lost.newest(LOSS_WINDOW).filter(|lost| *lost).count();
        Some(LinkQuality {
            rtt_ms: self.rtt_ms?,
            jitter_ms: self.jitter_ms,
            loss: lost as f64 / self.lost.len().max(1) as f64,
            bandwidth: self.capacity.newest(),
            utilisation: self.utilisation,
        })
    }
}

/// The links of this node and what is known about each.
#[derive(Clone, Debug, Default)]
pub struct QualityMonitor {
    links: BTreeMap<NodeId, Link>,
    revision: u64,
}

impl QualityMonitor {
    /// A number that changes whenever anything that is known of a link does.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether a neighbour is connected.
    pub fn is_connected(&self, neighbour: NodeId) -> bool {
        self.links.contains_key(&neighbour)
    }

    /// A neighbour is connected. Returns false when [`NEIGHBOURS_MAX`] are there already.
    pub fn connected(&mut self, neighbour: NodeId) -> bool {
        if self.links.len() >= NEIGHBOURS_MAX && !self.links.contains_key(&neighbour) {
            return false;
        }
        self.revision += 1;
        self.links.entry(neighbour).or_insert_with(|| Link {
            state: LinkState::New,
            rtt_ms: None,
            last_rtt_ms: 0.0,
            jitter_ms: 0.0,
            lost: Window::new(LOSS_WINDOW),
            failure_streak: 0,
            steady: 0,
            in_use: false,
            capacity: Capacity::default(),
            utilisation: 0.0,
        });
        true
    }

    /// The connection closed. Returns whether the link was there.
    pub fn disconnected(&mut self, neighbour: NodeId) -> bool {
        self.revision += 1;
        self.links.remove(&neighbour).is_some()
    }

    /// A probe came back after `rtt_us`, or was lost. Returns whether the link went up or down
    /// by it.
    pub fn probed(&mut self, neighbour: NodeId, rtt_us: Option<u64>) -> bool {
        let Some(link) = self.links.get_mut(&neighbour) else { return false };
        self.revision += 1;
        let before = link.state;
        link.lost.push(rtt_us.is_none());
        match rtt_us {
            Some(rtt_us) => {
                let rtt_ms = rtt_us as f64 / 1e3;
                link.failure_streak = 0;
                link.state = LinkState::Up;
                match &mut link.rtt_ms {
                    Some(smoothed) => {
                        let noise = (STEADY_SHARE * *smoothed).max(STEADY_NOISE * link.jitter_ms);
                        let is_news = (rtt_ms - *smoothed).abs() > noise.max(RTT_STEP_MS);
                        link.steady = if is_news { 0 } else { link.steady.saturating_add(1) };
                        let difference = (rtt_ms - link.last_rtt_ms).abs();
                        link.jitter_ms += JITTER_GAIN * (difference - link.jitter_ms);
                        *smoothed += RTT_GAIN * (rtt_ms - *smoothed);
                    }
                    None => link.rtt_ms = Some(rtt_ms),
                }
                link.last_rtt_ms = rtt_ms;
            }
            None => {
                link.steady = 0;
                link.failure_streak += 1;
                if link.failure_streak >= DEAD_AFTER {
                    link.state = LinkState::Down;
                }
            }
        }
        link.state != before
    }

    /// A slice of traffic ended.
    pub fn report(&mut self, neighbour: NodeId, report: &LinkReport) {
        let Some(link) = self.links.get_mut(&neighbour) else { return };
        self.revision += 1;
        let seconds = report.duration_us as f64 / 1e6;
        link.in_use = report.sent_datagrams as f64 > IDLE_DATAGRAMS_PER_S * seconds;
        if report.duration_us > 0 {
            link.utilisation = (report.busy_us as f64 / report.duration_us as f64).min(1.0);
        }
        if report.sent_bytes >= BANDWIDTH_BYTES_MIN && link.utilisation >= BUSY_SHARE_MIN {
            link.capacity.estimated(report.sent_bytes as f64 * 1e6 / report.busy_us as f64);
        }
    }

    /// Whether a link has nothing to say: its probes come back in the time that they always take, and it
    /// carries no traffic.
    pub fn is_steady(&self, neighbour: NodeId) -> bool {
        let link = self.links.get(&neighbour);
        link.is_some_and(|link| link.steady >= STEADY_PROBES && !link.in_use)
    }

    /// The links that carry traffic, with their quality, in order of neighbour.
    pub fn up(&self) -> impl Iterator<Item = (NodeId, LinkQuality)> + '_ {
        self.links
            .iter()
            .filter(|(_, link)| link.state == LinkState::Up)
            .filter_map(|(neighbour, link)| Some((*neighbour, link.quality()?)))
    }

    /// Every neighbour, with state and quality.
    pub fn all(&self) -> impl Iterator<Item = (NodeId, LinkState, Option<LinkQuality>)> + '_ {
        self.links.iter().map(|(neighbour, link)| (*neighbour, link.state, link.quality()))
    }

    /// What each link is expected to carry (bytes/s), pessimistically; `unknown` for those that
    /// were never busy.
    pub fn capacities(&self, unknown: f64) -> impl Iterator<Item = (NodeId, f64)> + '_ {
        let capacity = move |link: &Link| link.capacity.predicted().unwrap_or(unknown);
        self.links.iter().map(move |(neighbour, link)| (*neighbour, capacity(link)))
    }

    /// How long to wait for the answer to a probe (ms): three smoothed RTTs, within
    /// `[at_least, at_most]`.
    pub fn probe_timeout_ms(&self, neighbour: NodeId, at_least: f64, at_most: f64) -> f64 {
        let rtt = self.links.get(&neighbour).and_then(|link| link.rtt_ms);
        rtt.map_or(at_most, |rtt| (3.0 * rtt).clamp(at_least, at_most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: NodeId = NodeId([1; 8]);

    fn monitor() -> QualityMonitor {
        let mut monitor = QualityMonitor::default();
        assert!(monitor.connected(PEER));
        monitor
    }

    #[test]
    fn a_link_is_up_with_the_first_answer_and_down_after_three_losses() {
        let mut monitor = monitor();
        assert_eq!(monitor.up().count(), 0);
        assert!(monitor.probed(PEER, Some(10_000)));
        assert_eq!(monitor.up().count(), 1);
        assert!(!monitor.probed(PEER, None));
        assert!(!monitor.probed(PEER, None));
        assert!(monitor.probed(PEER, None), "the third loss in a row");
        assert_eq!(monitor.up().count(), 0);
        assert!(monitor.probed(PEER, Some(10_000)), "up again");
    }

    #[test]
    fn rtt_and_jitter_are_smoothed_as_the_rfcs_say() {
        let mut monitor = monitor();
        monitor.probed(PEER, Some(10_000));
        monitor.probed(PEER, Some(18_000));
        let (_, quality) = monitor.up().next().unwrap();
        assert!((quality.rtt_ms - 11.0).abs() < 1e-12);
        assert!((quality.jitter_ms - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_link_is_steady_until_its_probes_say_something_else_or_it_carries_traffic() {
        let mut monitor = monitor();
        for _ in 0..=STEADY_PROBES {
            assert!(!monitor.is_steady(PEER));
            monitor.probed(PEER, Some(10_000));
        }
        assert!(monitor.is_steady(PEER));
        monitor.probed(PEER, Some(11_500));
        assert!(monitor.is_steady(PEER), "15 %");
        let of = |sent_datagrams| LinkReport {
            sent_datagrams,
            duration_us: 10_000_000,
            ..LinkReport::default()
        };
        let (idle, busy) = (of(95), of(1_000));
        monitor.report(PEER, &idle);
        assert!(monitor.is_steady(PEER));
        monitor.report(PEER, &busy);
        assert!(!monitor.is_steady(PEER), "somebody uses it");
        monitor.report(PEER, &idle);
        assert!(monitor.is_steady(PEER));
        monitor.probed(PEER, Some(13_000));
        assert!(!monitor.is_steady(PEER), "news");
        for _ in 0..40 {
            monitor.probed(PEER, Some(13_000));
        }
        assert!(monitor.is_steady(PEER));
        monitor.probed(PEER, None);
        assert!(!monitor.is_steady(PEER), "a loss");
    }

    #[test]
    fn an_idle_link_has_no_bandwidth_estimate() {
        let mut monitor = monitor();
        monitor.probed(PEER, Some(10_000));
        let idle = LinkReport { sent_bytes: 100, duration_us: 10_000_000, ..Default::default() };
        monitor.report(PEER, &idle);
        assert_eq!(monitor.up().next().unwrap().1.bandwidth, None);
        assert_eq!(monitor.capacities(7.0).next(), Some((PEER, 7.0)));
        let busy = LinkReport { sent_bytes: 500_000, busy_us: 1_000_000, ..idle };
        monitor.report(PEER, &busy);
        let quality = monitor.up().next().unwrap().1;
        assert_eq!(quality.bandwidth, Some(500_000.0));
        let slower = LinkReport { busy_us: 2_000_000, ..busy };
        monitor.report(PEER, &slower);
        monitor.report(PEER, &busy);
        let quality = monitor.up().next().unwrap().1;
        assert_eq!(quality.bandwidth, Some(500_000.0), "the newest estimate");
        let capacity = monitor.capacities(1.0).next().unwrap();
        assert_eq!(capacity, (PEER, 300_000.0), "the 10th percentile of three");
        assert!((quality.utilisation - 0.1).abs() < 1e-12);
    }

    #[test]
    fn neighbours_are_bounded() {
        let mut monitor = QualityMonitor::default();
        for index in 0..NEIGHBOURS_MAX {
            assert!(monitor.connected(NodeId([index as u8; 8])));
        }
        assert!(!monitor.connected(NodeId([200; 8])));
        assert!(monitor.connected(NodeId([0; 8])), "one that is there stays");
    }

    #[test]
    fn insane_numbers_are_recognised() {
        let good = LinkQuality {
            rtt_ms: 1.0,
            jitter_ms: 0.0,
            loss: 0.0,
            bandwidth: None,
            utilisation: 0.0,
        };
        assert!(good.is_sane());
        for bad in [
            LinkQuality { rtt_ms: f64::NAN, ..good },
            LinkQuality { rtt_ms: -1.0, ..good },
            LinkQuality { loss: 1.1, ..good },
            LinkQuality { bandwidth: Some(f64::INFINITY), ..good },
        ] {
            assert!(!bad.is_sane(), "{bad:?}");
        }
    }
}
