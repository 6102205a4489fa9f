//! How this node compares routes, and what it learns about that from its own choices.
//!
//! A route is compared by a bound ([`Ranking::bound_ms`]) on its [`Prospect`]: by its own newest round trips
//! once there are enough, before that by what is advertised of its links, beside the forecast in both cases.
//! What a model foresees beyond the level of the newest values counts as far as that came true
//! ([`Foresight`]).
//!
//! Which rule is right depends on the network. The first one follows from how much round trips change from
//! value to value ([`Ranking::of_volatility`]). Then the [`RankingTuner`] learns: twice a minute for each
//! destination the candidates of a decision are noted; the first probe over each that left later says what it
//! cost, one that was lost as much as the slowest; and a rule that surely would have paid less, and seldom done
//! harm, is taken. That takes 500 choices in 20 blocks of 25: four hours of tunnels to one destination, half an
//! hour of tunnels to eight. What became known is stored, and a node that starts again learns from it
//! ([`Comparing::remember`]).
//!
//! What it cannot see: that a route in use is slow because of what it carries.

use std::collections::BTreeMap;
use std::time::Duration;

use super::choice::{KnownChoice, KnownOffer};
use super::foresight::Foresight;
use super::posterior::{Ends, Measured};
use super::prospects::{Evidence, LEVEL_VALUES, MEAN_VALUES, prospects};
use super::ranking::{Prospect, Ranking, RankingTuner};
use crate::engine::measure::worth::{VOLATILITY_MAX, VOLATILITY_PRIOR, volatility};
use crate::engine::measure::{LinkHistories, LinkHistory, RouteHistories, RouteHistory};
use crate::engine::types::{NodeId, Route, Timestamp};

/// Choices whose outcomes are waited for; for destinations beyond, none is noted meanwhile.
pub const CHOICES_OPEN_MAX: usize = 64;
/// How long outcomes are waited for, and with that the time between two choices for one destination that are
/// learned from: candidates are probed each second.
const OUTCOMES_WITHIN: Duration = Duration::from_secs(30);
/// A route speaks for itself while its newest probe is no older; else its links do.
const OWN_AGE_MAX: Duration = Duration::from_secs(30);
/// Shortest time between two looks at all links ...
const REFRESH_INTERVAL: Duration = Duration::from_secs(5);
/// ... and so much more for each link, so that a large mesh costs no larger share of the time. A look takes a
/// few microseconds a link.
const REFRESH_PER_LINK: Duration = Duration::from_millis(1);
/// Changes that a volatility of an earlier life counts for: a minute or two of probing the candidates of one tunnel.
const REMEMBERED_CHANGES: f64 = 1_000.0;
/// Below this volatility a network that was volatile counts as steady again: between this and
/// [`VOLATILITY_MAX`] nothing changes.
const STEADY_AGAIN: f64 = 0.75 * VOLATILITY_MAX;

/// A route that was weighed, and what it then cost.
#[derive(Clone, Debug)]
struct Offer {
    route: Route,
    prospect: Prospect,
    /// What the first probe took; infinite when it was lost.
    outcome_ms: Option<f64>,
}

#[derive(Clone, Debug)]
struct Choice {
    at: Timestamp,
    offers: Vec<Offer>,
    /// Index of the route that another one had to beat.
    stay: Option<usize>,
}

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Comparing {
    links: BTreeMap<(NodeId, NodeId), Prospect>,
    refresh_at: Timestamp,
    /// The volatility that is expected before round trips are known, and how many changes that counts for.
    expected: (f64, f64),
    volatility: f64,
    tuner: RankingTuner,
    foresight: Foresight,
    /// The rule in use.
    rule: Ranking,
    choices: BTreeMap<NodeId, Choice>,
    /// Choices that became known, until they are [taken](Self::take_known).
    known: Vec<KnownChoice>,
}

impl Default for Comparing {
    fn default() -> Self {
        let rule = Ranking::default();
        Self {
            links: BTreeMap::new(),
            refresh_at: Timestamp::default(),
            expected: VOLATILITY_PRIOR,
            volatility: VOLATILITY_PRIOR.0,
            tuner: RankingTuner::of_node(rule),
            foresight: Foresight::default(),
            rule,
            choices: BTreeMap::new(),
            known: Vec::new(),
        }
    }
}

impl Comparing {
    /// Brings what is known of all links up to date, when it is time.
    pub fn refresh(&mut self, links: &LinkHistories, routes: &RouteHistories, now: Timestamp) {
        if now < self.refresh_at {
            return;
        }
        let mut ids: Vec<NodeId> = links.live().flat_map(|((a, b), _)| [a, b]).collect();
        ids.sort_unstable();
        ids.dedup();
        let index = |node: NodeId| ids.binary_search(&node).unwrap_or(0);
        let mut known: BTreeMap<Ends, Evidence> = BTreeMap::new();
        for ((a, b), link) in links.live() {
            let other = links.link(b, a).filter(|other| other.quality().is_some());
            known.insert((index(a), index(b)), evidence(Some(link), other));
            if other.is_none() {
                known.insert((index(b), index(a)), evidence(None, Some(link)));
            }
        }
        self.refresh_at = now + REFRESH_INTERVAL + REFRESH_PER_LINK * known.len() as u32;
        let named = |((a, b), prospect): ((usize, usize), Prospect)| ((ids[a], ids[b]), prospect);
        self.links = prospects(ids.len(), &known).into_iter().map(named).collect();
        let was_volatile = self.volatility > VOLATILITY_MAX;
        self.volatility = volatility(self.expected, routes.changes());
        if was_volatile && self.volatility > STEADY_AGAIN {
            self.volatility = self.volatility.max(VOLATILITY_MAX + f64::EPSILON);
        }
        self.tuner.set_fallback(Ranking::of_volatility(self.volatility));
        self.rule = self.tuner.best();
    }

    /// Another model forecasts from now on: what was learned of one's foresight is not another's.
    pub fn model_replaced(&mut self) {
        self.foresight = Foresight::default();
    }

    /// The weight of what the model foresees, 0 to 1.
    pub fn foresight(&self) -> f64 {
        self.foresight.weight()
    }

    /// A route with this prospect then took so long (ms): what was foreseen came true, or not.
    pub fn foresaw(&mut self, prospect: &Prospect, ms: f64) {
        self.foresight.observe(prospect, ms);
    }

    /// The rule in use.
    pub fn rule(&self) -> Ranking {
        self.rule
    }

    /// Compares by this rule from now on, as if it had been learned.
    #[cfg(test)]
    pub fn fix(&mut self, rule: Ranking) {
        self.rule = rule;
    }

    /// How much round trips change from value to value (mean absolute ln ratio).
    pub fn volatility(&self) -> f64 {
        self.volatility
    }

    /// Choices that were learned from.
    pub fn choices(&self) -> u32 {
        self.tuner.ledger().choices()
    }

    /// A route at `now`, by its own values or by its links; `None` when neither says enough.
    pub fn prospect(
        &self,
        route: &Route,
        history: Option<&RouteHistory>,
        now: Timestamp,
    ) -> Option<Prospect> {
        let history = history.filter(|known| now.since(known.last_done_at()) <= OWN_AGE_MAX);
        let own = history.and_then(|history| Prospect::of_values(&history.rtts_ms(MEAN_VALUES)));
        own.or_else(|| {
            let links: Option<Vec<&Prospect>> =
                route.links().map(|ends| self.links.get(&ends)).collect();
            links?.into_iter().copied().reduce(|sum, next| sum.and(&next))
        })
    }

    /// These routes were weighed for a tunnel to `destination`; `stay` is the one that another had to beat.
    pub fn offered(
        &mut self,
        destination: NodeId,
        now: Timestamp,
        offers: impl IntoIterator<Item = (Route, Prospect)>,
        stay: Option<usize>,
    ) {
        self.learn(now);
        if self.choices.contains_key(&destination) || self.choices.len() >= CHOICES_OPEN_MAX {
            return;
        }
        let offer = |(route, prospect)| Offer { route, prospect, outcome_ms: None };
        let offers: Vec<Offer> = offers.into_iter().map(offer).collect();
        if offers.len() > 1 {
            self.choices.insert(destination, Choice { at: now, offers, stay });
        }
    }

    /// A probe over a route that left at `sent_at` came back after `rtt_ms`, or was lost.
    pub fn met(&mut self, route: &Route, sent_at: Timestamp, rtt_ms: Option<f64>) {
        let choice = self.choices.get_mut(&route.destination());
        let Some(choice) = choice.filter(|choice| choice.at <= sent_at) else { return };
        let offers = choice.offers.iter_mut();
        for offer in offers.filter(|o| o.outcome_ms.is_none() && o.route == *route) {
            offer.outcome_ms = Some(rtt_ms.unwrap_or(f64::INFINITY));
        }
    }

    /// Choices that became known since this was asked last, at most `CHOICES_OPEN_MAX` of them.
    pub fn take_known(&mut self) -> Vec<KnownChoice> {
        std::mem::take(&mut self.known)
    }

    /// Learns from choices of an earlier life, in order of time. Of foresight they say nothing: another model
    /// may forecast. A block may end within a moment here, between choices for different destinations.
    pub fn remember(&mut self, choices: &[KnownChoice]) {
        let Some(newest) = choices.last() else { return };
        self.expected = (newest.volatility, REMEMBERED_CHANGES);
        self.volatility = newest.volatility;
        self.tuner.set_fallback(Ranking::of_volatility(self.volatility));
        for choice in choices {
            self.tune(choice);
            self.tuner.end_round();
        }
        self.rule = self.tuner.best();
    }

    fn tune(&mut self, choice: &KnownChoice) {
        let (prospects, outcomes_ms): (Vec<Prospect>, Vec<f64>) =
            choice.offers.iter().map(|offer| (offer.prospect, offer.outcome_ms)).unzip();
        self.tuner.observe(&prospects, choice.stay, choice.direct(), &outcomes_ms);
    }

    /// Choices that have waited long enough teach what became known of them. Where the route to stay on
    /// was not probed, or no route answered, nothing is said.
    fn learn(&mut self, now: Timestamp) {
        let due = |choice: &Choice| now.since(choice.at) >= OUTCOMES_WITHIN;
        let due: Vec<NodeId> =
            self.choices.iter().filter(|(_, choice)| due(choice)).map(|(id, _)| *id).collect();
        for destination in &due {
            let Some(Choice { at, offers, stay }) = self.choices.remove(destination) else {
                continue;
            };
            let probed = |at: usize| offers[at].outcome_ms.is_some();
            let answered = offers.iter().filter_map(|offer| offer.outcome_ms);
            let slowest = answered.filter(|ms| ms.is_finite()).reduce(f64::max);
            let Some(slowest_ms) = slowest.filter(|_| stay.is_none_or(probed)) else { continue };
            let stay = stay.map(|stay| (0..stay).filter(|at| probed(*at)).count());
            let known = offers.into_iter().filter_map(|Offer { route, prospect, outcome_ms }| {
                Some(KnownOffer { route, prospect, outcome_ms: outcome_ms?.min(slowest_ms) })
            });
            let (offers, volatility): (Vec<KnownOffer>, f64) = (known.collect(), self.volatility);
            if offers.len() < 2 {
                continue;
            }
            let known = KnownChoice { at, destination: *destination, volatility, offers, stay };
            known.offers.iter().for_each(|o| self.foresight.observe(&o.prospect, o.outcome_ms));
            self.tune(&known);
            if self.known.len() < CHOICES_OPEN_MAX {
                self.known.push(known);
            }
        }
        if !due.is_empty() {
            self.tuner.end_round();
            self.rule = self.tuner.best();
        }
    }
}

/// What is known of a link by its own direction and the other one. Nodes advertise when something
/// changed: silence is no sign.
fn evidence(own: Option<&LinkHistory>, other: Option<&LinkHistory>) -> Evidence {
    let own = own.map(|link| link.rtts_ms(MEAN_VALUES)).unwrap_or_default();
    let missing = LEVEL_VALUES.saturating_sub(own.len());
    let filling = other.filter(|_| missing > 0).map(|link| link.rtts_ms(missing));
    let measured = Measured::of(&own);
    let values_ms = [filling.unwrap_or_default(), own].concat();
    Evidence { values_ms, own: measured, overdue: 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::LinkQuality;
    use crate::engine::predict::Centre;
    use crate::engine::predict::ranking::CHOICES_MIN;

    const THERE: NodeId = NodeId([9; 8]);
    const NOW: Timestamp = Timestamp(10);

    fn route(relay: u8) -> Route {
        Route::new([0, relay, 9].map(|byte| NodeId([byte; 8]))).unwrap()
    }

    fn links() -> LinkHistories {
        let mut links = LinkHistories::default();
        for at in 1..=6 {
            for (from, to, rtt_ms) in [(0, 1, 10.0), (1, 9, 20.0), (9, 2, 5.0)] {
                let (jitter_ms, loss, utilisation) = (0.0, 0.0, 0.0);
                let quality = LinkQuality { rtt_ms, jitter_ms, loss, bandwidth: None, utilisation };
                let said = [(NodeId([to; 8]), Some(quality))];
                links.advertised(NodeId([from; 8]), Timestamp(at), said);
            }
        }
        links
    }

    fn level(prospect: Prospect) -> f64 {
        Ranking { centre: Centre::Level, ..Ranking::PLAIN }.bound_ms(&prospect)
    }

    #[test]
    fn links_speak_until_the_route_does() {
        let (mut comparing, mut histories) = (Comparing::default(), RouteHistories::default());
        comparing.refresh(&links(), &histories, NOW);
        assert_eq!(comparing.prospect(&route(1), None, NOW).map(level), Some(30.0));
        let back = Route::new([NodeId([2; 8]), NodeId([9; 8])]).unwrap();
        assert_eq!(
            comparing.prospect(&back, None, NOW).map(level),
            Some(5.0),
            "the other direction"
        );
        assert_eq!(comparing.prospect(&route(3), None, NOW), None);
        for at in 1..=LEVEL_VALUES as u64 {
            histories.probed(&route(1), Timestamp(at), Some(50_000));
        }
        let known = |at| comparing.prospect(&route(1), histories.of(&route(1)), at).map(level);
        assert_eq!(known(NOW), Some(50.0));
        assert_eq!(known(Timestamp(60_000_000)), Some(30.0), "too long ago");
        comparing.refresh(&links(), &histories, Timestamp(60_000_000));
        assert!(comparing.volatility() < 0.05, "{}", comparing.volatility());
    }

    #[test]
    fn what_choices_turned_out_to_cost_changes_the_rule() {
        let mut comparing = Comparing::default();
        let first = comparing.rule();
        let second = 1_000_000;
        let mut stored = Vec::new();
        // The first route looks better and is always worse than the one to stay on.
        let offers = || {
            let prospect = |ms| Prospect::of_values(&[ms; LEVEL_VALUES]).unwrap();
            [(route(1), prospect(90.0)), (route(2), prospect(100.0)), (route(3), prospect(9.0))]
        };
        for round in 0..=u64::from(CHOICES_MIN) {
            let at = Timestamp(round * 31 * second);
            comparing.offered(THERE, at, offers(), Some(1));
            comparing.offered(THERE, Timestamp(at.0 + 1), offers(), Some(1));
            comparing.met(&route(1), Timestamp(at.0.saturating_sub(1)), Some(1.0));
            comparing.met(&route(1), Timestamp(at.0 + 1), Some(150.0));
            comparing.met(&route(1), Timestamp(at.0 + 2), Some(1.0));
            comparing.met(&route(2), Timestamp(at.0 + 1), Some(100.0));
            stored.extend(comparing.take_known());
        }
        assert_eq!(comparing.choices(), CHOICES_MIN, "one a time, the last still waits");
        let learned = comparing.rule();
        assert!(learned.margin >= 0.1 && first.margin < 0.1, "{learned:?}");
        assert_eq!(stored.len(), CHOICES_MIN as usize);
        assert_eq!((stored[7].at, stored[7].destination), (Timestamp(7 * 31 * second), THERE));
        let mut again = Comparing::default();
        again.remember(&stored);
        assert_eq!((again.rule(), again.choices()), (learned, CHOICES_MIN));
    }

    #[test]
    fn a_volatile_network_is_one_still_after_a_restart() {
        let prospect = Prospect::of_values(&[9.0; LEVEL_VALUES]).unwrap();
        let offer = |relay| KnownOffer { route: route(relay), prospect, outcome_ms: 9.0 };
        let offers = vec![offer(1), offer(2)];
        let (at, destination) = (Timestamp(1), THERE);
        let known = KnownChoice { at, destination, volatility: 0.7, offers, stay: None };
        let mut again = Comparing::default();
        again.remember(&[known]);
        let cautious = Ranking::of_volatility(0.7);
        assert_eq!(again.rule(), cautious);
        again.refresh(&links(), &RouteHistories::default(), NOW);
        assert_eq!(again.rule(), cautious, "until round trips say otherwise");
    }

    #[test]
    fn a_lost_probe_counts_as_the_slowest_answer() {
        let mut comparing = Comparing::default();
        let prospect = |ms| Prospect::of_values(&[ms; LEVEL_VALUES]).unwrap();
        for round in 0..=u64::from(CHOICES_MIN) {
            let at = Timestamp(round * 31_000_000);
            // The quicker one is mostly lost, and looks as good as ever when it is not.
            let offers = [80.0, 100.0, 300.0].map(prospect);
            let offers = [route(1), route(2), route(3)].into_iter().zip(offers);
            comparing.offered(THERE, at, offers, Some(1));
            let lossy = (round % 5 == 0).then_some(80.0);
            comparing.met(&route(1), Timestamp(at.0 + 1), lossy);
            comparing.met(&route(1), Timestamp(at.0 + 2), Some(80.0));
            comparing.met(&route(2), Timestamp(at.0 + 3), Some(100.0));
            comparing.met(&route(3), Timestamp(at.0 + 4), Some(300.0));
        }
        let learned = comparing.rule();
        assert!(learned.margin >= 0.2, "{learned:?}");
    }

    #[test]
    fn without_the_outcome_of_the_route_to_stay_on_nothing_is_learned() {
        let mut comparing = Comparing::default();
        let prospect = Prospect::of_values(&[9.0; LEVEL_VALUES]).unwrap();
        for node in 0..2 * CHOICES_OPEN_MAX as u8 {
            let offers = [(route(1), prospect), (route(2), prospect)];
            comparing.offered(NodeId([node; 8]), Timestamp(0), offers, Some(0));
        }
        assert_eq!(comparing.choices.len(), CHOICES_OPEN_MAX);
        comparing.met(&route(2), Timestamp(1), Some(9.0));
        comparing.offered(THERE, Timestamp(60_000_000), [], None);
        assert_eq!((comparing.choices(), comparing.choices.len()), (0, 0));
        let offers = [(route(1), prospect), (route(2), prospect)];
        comparing.offered(THERE, Timestamp(60_000_000), offers, None);
        comparing.met(&route(2), Timestamp(60_000_001), Some(9.0));
        comparing.offered(THERE, Timestamp(120_000_000), [], None);
        assert_eq!(comparing.take_known(), [], "one route is no choice");
    }
}
