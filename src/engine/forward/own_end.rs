//! The end of a tunnel that opened it: what it knows of the route in use, and what it tells the
//! engine of it.
//!
//! When one route after the other is left and nothing is answered over any, it is the far end that does
//! not answer ([`OwnEnd::answers`]): other relays will not help.
//!
//! A route that the data plane took by itself keeps its number, which is higher than that of the one
//! it left: it stays in use until the snapshot names one at least as high.

use std::time::Duration;

use super::receipt::Receipt;
use super::snapshot::{Backup, Binding};
use super::starving::{Delivery, Starving};
use super::watch::RouteWatch;
use crate::engine::measure::RouteReport;
use crate::engine::types::{NodeId, Route, Timestamp};

/// How often the engine is told what traffic met.
pub const REPORT_EVERY: Duration = Duration::from_millis(500);
/// Routes that were left one after the other without an answer over any, from which on the far end is
/// suspected. They are chosen to share no relay, so that two are rarely lost at once.
pub const UNANSWERED: u32 = 2;

impl Binding {
    /// The route of the snapshot with its number, unless the one in use is as new.
    pub fn newer_than(&self, in_use: u32) -> Option<(&Route, u32)> {
        let route = self.route.as_ref().filter(|_| self.route_id > in_use)?;
        Some((route, self.route_id))
    }

    /// Where to move when the route in use is lost, if the backup is newer than that and this node
    /// can hand datagrams to its first relay.
    pub fn way_out(&self, left: u32, carries_to: impl Fn(NodeId) -> bool) -> Option<&Backup> {
        let able = |b: &&Backup| b.route_id > left && carries_to(b.route.nodes()[1]);
        self.backup.as_ref().filter(able)
    }
}

/// See the module documentation.
#[derive(Clone, Debug, Default)]
pub struct OwnEnd {
    /// Whether the route in use still answers.
    pub watch: RouteWatch,
    /// Whether it delivers more than answers.
    starving: Starving,
    /// Beats say that the route before is lost, until something is answered over this one.
    resumes: bool,
    /// Number of the route that the engine was told is lost, and nothing was answered since.
    lost: Option<u32>,
    /// Routes that were left since something was answered.
    unanswered: u32,
    /// Newest receipt over the route in use.
    arrived: Receipt,
    /// Bytes sent over the route in use.
    bytes: u64,
    /// What the last report said.
    reported: Reported,
    /// The connection is closed: its last packets go unwatched, because nobody answers them.
    closed: bool,
    /// The two ends shake hands, or have, and nothing was answered yet.
    opens: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Reported {
    at: Timestamp,
    arrived: Receipt,
    bytes: u64,
    back_route: u32,
    back: Receipt,
}

impl OwnEnd {
    /// A packet leaves, in a datagram of this length. Returns whether it asks for a receipt.
    pub fn sent(&mut self, sequence: u64, bytes: usize, now: Timestamp) -> bool {
        self.bytes += bytes as u64;
        !self.closed && self.watch.sent(sequence, now)
    }

    /// A packet leaves that nobody can prove: the two ends have no key yet.
    pub fn shakes_hands(&mut self) {
        self.opens = !self.closed;
    }

    /// Whether the tunnel is being opened: it has shaken hands or still does, and the far end has not
    /// answered over the route in use.
    pub fn opens(&self) -> bool {
        self.opens
    }

    /// A beat leaves with this sequence number.
    pub fn beat(&mut self, sequence: u64, now: Timestamp) {
        self.watch.beat(sequence, now);
        self.starving.beat(sequence);
    }

    /// A receipt over the route in use. Returns what it says of the packets; `None` when it answers
    /// nothing that was asked.
    pub fn receipt(&mut self, sequence: u64, receipt: Receipt, now: Timestamp) -> Option<Delivery> {
        self.watch.receipt(sequence, now)?;
        self.resumes = false;
        self.lost = None;
        self.unanswered = 0;
        self.opens = false;
        if receipt.highest >= self.arrived.highest {
            self.arrived = receipt;
        }
        Some(self.starving.receipt(receipt, now))
    }

    /// A packet of the far end proved itself.
    pub fn heard(&mut self, now: Timestamp) {
        self.watch.heard(now);
        self.starving.heard();
    }

    /// A datagram came over the route in use whose tag is wrong. Returns whether the route starves the
    /// tunnel.
    pub fn forged(&mut self, now: Timestamp) -> bool {
        !self.closed && self.starving.forged(now)
    }

    /// The newest receipt over the route in use.
    pub fn arrived(&self) -> Receipt {
        self.arrived
    }

    /// The route in use, of this number, is lost: it fell silent, or a node says that it is broken, which says
    /// nothing about the far end. Returns whether that is news.
    pub fn lost(&mut self, route_id: u32, fell_silent: bool) -> bool {
        let is_news = self.lost.replace(route_id) != Some(route_id);
        self.unanswered = self.unanswered.saturating_add((is_news && fell_silent).into());
        is_news
    }

    /// Whether the far end answers, as far as is known.
    pub fn answers(&self) -> bool {
        self.unanswered < UNANSWERED
    }

    /// The tunnel takes another route.
    pub fn moved(&mut self, now: Timestamp) {
        self.watch.moved(now);
        self.starving = Starving::default();
        self.lost = None;
        (self.arrived, self.bytes) = Default::default();
        self.reported = Reported { at: now, back_route: self.reported.back_route, ..self.reported };
        (self.reported.arrived, self.reported.bytes) = Default::default();
    }

    /// From now on beats say that the route before is lost, or not.
    pub fn resume(&mut self, resumes: bool) {
        self.resumes = resumes;
    }

    /// Whether beats say so.
    pub fn resumes(&self) -> bool {
        self.resumes
    }

    /// The connection is gone: what was asked will not be answered.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// The connection is closed, and its good-byes are still to leave.
    pub fn close(&mut self) {
        *self = Self { closed: true, ..Self::default() };
    }

    /// What traffic met since the last report, over the route in use of this number; `back` is what
    /// this node has received over the far end's newest route, and that one's number.
    pub fn report(
        &mut self,
        route: Route,
        route_id: u32,
        (back_route, back): (u32, Receipt),
        now: Timestamp,
    ) -> RouteReport {
        let said = self.reported;
        let back_said = if said.back_route == back_route { said.back } else { Receipt::default() };
        // What still comes over a route that was left says nothing about this one.
        let back_of_this = if back_route == route_id { back } else { back_said };
        let (arrived, bytes) = (self.arrived, self.bytes);
        self.reported = Reported { at: now, arrived, bytes, back_route, back };
        RouteReport {
            route,
            route_id,
            sent: arrived.highest.saturating_sub(said.arrived.highest),
            received: arrived.received.saturating_sub(said.arrived.received),
            bytes: bytes.saturating_sub(said.bytes),
            marked: arrived.marked.saturating_sub(said.arrived.marked),
            rtt_us: self.watch.rtt_us(),
            back_sent: back_of_this.highest.saturating_sub(back_said.highest),
            back_received: back_of_this.received.saturating_sub(back_said.received),
            back_marked: back_of_this.marked.saturating_sub(back_said.marked),
            // A tunnel that was not in use was not reported either.
            duration_us: now.since(said.at).min(2 * REPORT_EVERY).as_micros() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(relay: u8) -> Route {
        Route::new([NodeId([0; 8]), NodeId([relay; 8]), NodeId([9; 8])]).unwrap()
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp(ms * 1_000)
    }

    #[test]
    fn a_loss_is_news_once_until_something_is_answered() {
        let mut own = OwnEnd::default();
        assert!(own.sent(1, 100, at(0)));
        assert!(own.lost(3, true) && !own.lost(3, true));
        assert_eq!(own.receipt(7, Receipt::default(), at(5)), None, "nobody asked");
        assert!(!own.lost(3, true));
        assert!(own.receipt(1, Receipt::default(), at(5)).is_some());
        assert!(own.lost(3, true));
        own.moved(at(6));
        assert!(own.lost(3, true));
    }

    #[test]
    fn who_answers_over_no_route_is_suspected_until_something_is_answered() {
        let mut own = OwnEnd::default();
        assert!(own.lost(1, true) && own.answers(), "one route may be lost");
        assert!(own.lost(7, false) && own.answers(), "and others be broken");
        own.moved(at(1));
        assert!(own.lost(2, true));
        assert!(!own.answers(), "two, and none answered");
        own.moved(at(2));
        assert!(!own.answers());
        own.sent(9, 100, at(3));
        assert!(own.receipt(9, Receipt::default(), at(4)).is_some());
        assert!(own.answers());
    }

    #[test]
    fn a_report_holds_what_is_new_on_the_route_in_use() {
        let mut own = OwnEnd::default();
        let receipt = |highest, received| Receipt { highest, received, marked: 1, packets: 1 };
        own.sent(1, 100, at(0));
        own.receipt(1, receipt(10, 9), at(40));
        let first = own.report(route(1), 1, (0, Receipt::default()), at(500));
        assert_eq!((first.sent, first.received, first.bytes), (10, 9, 100));
        assert_eq!(first.rtt_us, Some(40_000));
        own.sent(11, 50, at(510));
        own.receipt(11, receipt(15, 14), at(550));
        let second = own.report(route(1), 1, (0, Receipt::default()), at(1_000));
        assert_eq!((second.sent, second.received, second.bytes, second.marked), (5, 5, 50, 0));
        assert_eq!(second.duration_us, 500_000);
        own.moved(at(1_010));
        let third = own.report(route(2), 2, (0, Receipt::default()), at(1_100));
        assert_eq!((third.sent, third.bytes, third.rtt_us), (0, 0, None));
    }

    #[test]
    fn only_a_newer_backup_whose_relay_is_there_is_a_way_out() {
        let backup = |route_id| Some(Backup { route: route(2), route_id });
        let binding = |route_id, backup| Binding {
            destination: NodeId([9; 8]),
            route: Some(route(1)),
            reachable: true,
            route_id,
            backup,
            copies: false,
            capacity: None,
            reserved: None,
        };
        let known = binding(4, backup(5));
        assert_eq!(known.newer_than(3), Some((&route(1), 4)));
        assert_eq!(known.newer_than(4), None);
        assert_eq!(known.way_out(4, |_| true), backup(5).as_ref());
        assert_eq!(known.way_out(5, |_| true), None, "it is the one that was left");
        assert_eq!(known.way_out(4, |node| node != NodeId([2; 8])), None);
        assert_eq!(binding(4, None).way_out(4, |_| true), None);
    }
}
