//! What a tunnel with a reservation asks the nodes of its route for, and when.
//!
//! A request that nobody answers is repeated after [`PATIENCE`], [`ASKS_MAX`] times in all. What was
//! granted or refused is asked for again each [`RENEW_EVERY`], and at once when the tunnel has moved;
//! what the route before holds is released after that, so that on links of both there is no gap.

use std::time::Duration;

use super::message::{Answer, Bottleneck};
use crate::engine::forward::Header;
use crate::engine::types::{Route, Timestamp, TunnelId};

/// How often a reservation is asked for again.
pub const RENEW_EVERY: Duration = Duration::from_secs(10);
/// How long an answer may take before the same is asked again.
pub const PATIENCE: Duration = Duration::from_millis(350);
/// So many unanswered requests are a refusal: after about a second.
pub const ASKS_MAX: u32 = 3;

/// A route to ask, with the key that proves who asks.
#[derive(Clone, Debug)]
pub struct Way<K> {
    /// The tunnel.
    pub tunnel: TunnelId,
    /// Its route.
    pub route: Route,
    /// The number of that.
    pub route_id: u32,
    /// What the driver proves requests with.
    pub key: K,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// So many requests are unanswered; the next step is due then.
    Waiting(u32, Timestamp),
    /// Every node has set the rate aside.
    Granted,
    /// Nothing is held.
    Refused,
}

/// The newest request of a tunnel.
#[derive(Clone, Debug)]
pub struct Asked<K> {
    /// Where.
    pub way: Way<K>,
    /// Names the request.
    pub sequence: u64,
    /// What became of it.
    pub state: State,
}

/// What is to be done now.
#[derive(Clone, Debug)]
pub enum Step<K> {
    /// Nothing before then.
    Wait(Timestamp),
    /// The newest request is to be sent again; come back then.
    Again(Timestamp),
    /// Nobody has answered the newest request: it is settled as refused by nobody.
    GiveUp,
    /// A new request: this node sets its own link aside, then the request is sent, and then what the
    /// route before holds is released. Come back at `until`.
    Ask {
        /// Names the request.
        sequence: u64,
        /// When an answer is overdue.
        until: Timestamp,
        /// The request over the route before.
        left: Option<Asked<K>>,
    },
}

/// What one tunnel wants. See the module documentation for the rule.
#[derive(Clone, Debug)]
pub struct Asking<K> {
    /// The rate to be set aside (bytes/s).
    pub rate: u64,
    asked: Option<Asked<K>>,
    renew_at: Timestamp,
}

impl<K: Clone> Asking<K> {
    /// Nothing was asked yet.
    pub fn new(rate: u64) -> Self {
        Self { rate, asked: None, renew_at: Timestamp(0) }
    }

    /// The newest request.
    pub fn asked(&self) -> Option<&Asked<K>> {
        self.asked.as_ref()
    }

    /// Ask with the next step, though the slice is not over.
    pub fn renew(&mut self) {
        self.renew_at = Timestamp(0);
    }

    /// What is to be done at `now`, when the tunnel takes this way.
    pub fn step(&mut self, way: &Way<K>, now: Timestamp) -> Step<K> {
        let moved = self.asked.as_ref().is_some_and(|a| a.way.route_id != way.route_id);
        if let Some(asked) = self.asked.as_mut().filter(|_| !moved) {
            match asked.state {
                State::Waiting(_, until) if now < until => return Step::Wait(until),
                State::Waiting(asks, _) if asks >= ASKS_MAX => return Step::GiveUp,
                State::Waiting(asks, _) => {
                    let until = now + PATIENCE;
                    asked.state = State::Waiting(asks + 1, until);
                    return Step::Again(until);
                }
                _ if now < self.renew_at => return Step::Wait(self.renew_at),
                _ => {}
            }
        }
        // Time goes on, so no two requests of a route have the same name.
        let (until, sequence) = (now + PATIENCE, now.0);
        let asked = Asked { way: way.clone(), sequence, state: State::Waiting(1, until) };
        let left = self.asked.replace(asked).filter(|_| moved);
        self.renew_at = now + RENEW_EVERY;
        Step::Ask { sequence, until, left }
    }

    /// The request of this name has its answer. Returns the request as it was before; `None` when it
    /// is not the newest.
    pub fn settle(&mut self, sequence: u64, granted: bool) -> Option<Asked<K>> {
        let asked = self.asked.as_mut().filter(|asked| asked.sequence == sequence)?;
        let before = asked.clone();
        asked.state = if granted { State::Granted } else { State::Refused };
        Some(before)
    }

    /// What an answer means: `None` when it is not one to the newest request, or did not come back
    /// over the part of its route that was asked, or the newest request has its answer already.
    /// Whether a grant is proved is not looked at.
    pub fn believe(&self, header: &Header, answer: Answer) -> Option<Result<(), Bottleneck>> {
        let Asked { way, sequence, state } = self.asked.as_ref()?;
        let is_it = (header.route_id, header.sequence) == (way.route_id, *sequence);
        let waits = matches!(state, State::Waiting(..));
        if !(header.reply && waits && is_it && header.route.leads_back_over(&way.route)) {
            return None;
        }
        answer.resolve(&way.route, header.route.source())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::NodeId;

    fn way(relay: u8, route_id: u32) -> Way<()> {
        let route = Route::new([NodeId([0; 8]), NodeId([relay; 8]), NodeId([9; 8])]).unwrap();
        Way { tunnel: TunnelId(1), route, route_id, key: () }
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp(5_000_000 + ms * 1_000)
    }

    fn ask(asking: &mut Asking<()>, way: &Way<()>, now: Timestamp) -> (u64, Option<u32>) {
        match asking.step(way, now) {
            Step::Ask { sequence, left, .. } => (sequence, left.map(|left| left.way.route_id)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn silence_is_a_refusal_after_three_requests() {
        let mut asking = Asking::new(9);
        ask(&mut asking, &way(1, 1), at(0));
        assert!(matches!(asking.step(&way(1, 1), at(349)), Step::Wait(until) if until == at(350)));
        for ms in [350, 700] {
            assert!(matches!(asking.step(&way(1, 1), at(ms)), Step::Again(_)));
        }
        assert!(matches!(asking.step(&way(1, 1), at(1_050)), Step::GiveUp));
    }

    #[test]
    fn what_is_settled_is_asked_again_each_slice_and_after_a_move() {
        let mut asking = Asking::new(9);
        let (sequence, _) = ask(&mut asking, &way(1, 1), at(0));
        assert!(asking.settle(sequence + 1, true).is_none(), "another request");
        assert!(matches!(asking.settle(sequence, true).unwrap().state, State::Waiting(1, _)));
        assert!(matches!(asking.step(&way(1, 1), at(9_999)), Step::Wait(_)));
        assert_eq!(ask(&mut asking, &way(1, 1), at(10_000)).1, None);
        assert_eq!(ask(&mut asking, &way(2, 2), at(10_001)).1, Some(1));
        asking.renew();
        asking.settle(at(10_001).0, false);
        assert_eq!(ask(&mut asking, &way(2, 2), at(10_002)).1, None);
    }

    #[test]
    fn only_the_answer_to_the_newest_request_over_its_own_route_is_believed() {
        use crate::engine::forward::DatagramKind;
        let mut asking = Asking::new(9);
        let (sequence, _) = ask(&mut asking, &way(1, 1), at(0));
        let kind = DatagramKind::ReserveAnswer;
        let back = |relay, sequence| Header {
            reply: true,
            ..Header::new(kind, TunnelId(1), 1, sequence, way(relay, 1).route.reversed())
        };
        let granted = Answer::Granted { position: 2 };
        assert_eq!(asking.believe(&back(1, sequence), granted), Some(Ok(())));
        assert_eq!(asking.believe(&back(2, sequence), granted), None);
        assert_eq!(asking.believe(&back(1, sequence + 1), granted), None);
        let no_reply = Header { reply: false, ..back(1, sequence) };
        assert_eq!(asking.believe(&no_reply, granted), None);
        asking.settle(sequence, true);
        assert_eq!(asking.believe(&back(1, sequence), granted), None, "answered");
    }
}
