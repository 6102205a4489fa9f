//! How this node compares routes, and what it learns about that from its own choices.
//!
//! A route is compared by a bound ([`Ranking::bound_ms`]) on its [`Prospect`]: by its own newest round trips
//! once there are enough, before that by what is advertised of its links, beside the forecast in both cases.
//! What a model foresees beyond the level of the newest values counts as far as that came true
//! ([`Foresight`]).
//!
//! Which rule is right depends on the network. The first one follows from how much round trips change from
//! value to value ([`Ranking::of_volatility`]), unless training found one that surely did better on its
//! calibration rows. Then the [`RankingTuner`] learns: twice a minute for each tunnel the candidates of a
//! decision are noted, the first answered probe over each that left later is what it cost, and a rule that surely
//! would have paid less is taken. What it learned is forgotten with the process.

use std::collections::BTreeMap;
use std::time::Duration;

use super::foresight::Foresight;
use super::posterior::{Ends, Measured};
use super::prospects::{Evidence, LEVEL_VALUES, MEAN_VALUES, prospects};
use super::ranking::{Prospect, Ranking, RankingTuner};
use crate::engine::measure::worth::volatility;
use crate::engine::measure::{LinkHistories, LinkHistory, RouteHistories, RouteHistory};
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// Choices whose outcomes are waited for; of tunnels beyond, none is noted meanwhile.
pub const CHOICES_OPEN_MAX: usize = 64;
/// How long outcomes are waited for, and with that the time between two choices of one tunnel that are
/// learned from: candidates are probed each second.
const OUTCOMES_WITHIN: Duration = Duration::from_secs(30);

/// A route that was weighed, and what it then cost.
#[derive(Clone, Debug)]
struct Offer {
    route: Route,
    prospect: Prospect,
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
#[derive(Clone, Debug, Default)]
pub struct Comparing {
    links: BTreeMap<(NodeId, NodeId), Prospect>,
    volatility: f64,
    /// The rule that came with the model, where training found one.
    trained: Option<Ranking>,
    tuner: RankingTuner,
    foresight: Foresight,
    /// The one in use.
    rule: Ranking,
    choices: BTreeMap<TunnelId, Choice>,
}

impl Comparing {
    /// Brings what is known of all links up to date.
    pub fn refresh(&mut self, links: &LinkHistories, routes: &RouteHistories) {
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
        let named = |((a, b), prospect): ((usize, usize), Prospect)| ((ids[a], ids[b]), prospect);
        self.links = prospects(ids.len(), &known).into_iter().map(named).collect();
        self.volatility = volatility(routes.changes());
        self.set_rule();
    }

    /// The rule that came with the model now in use, where training found one that surely did better
    /// than the default.
    pub fn set_trained(&mut self, trained: Option<Ranking>) {
        // What was learned of one model's foresight is not another's.
        self.foresight = Foresight::default();
        self.trained = trained;
        self.set_rule();
    }

    /// The weight of what the model foresees, 0 to 1.
    pub fn foresight(&self) -> f64 {
        self.foresight.weight()
    }

    /// The rule in use.
    pub fn rule(&self) -> Ranking {
        self.rule
    }

    fn set_rule(&mut self) {
        let first = self.trained.unwrap_or_else(|| Ranking::of_volatility(self.volatility));
        self.tuner.set_fallback(first);
        self.rule = self.tuner.best();
    }

    /// How much round trips change from value to value (mean absolute ln ratio).
    pub fn volatility(&self) -> f64 {
        self.volatility
    }

    /// Choices that were learned from.
    pub fn choices(&self) -> u32 {
        self.tuner.ledger().choices()
    }

    /// A route by its own values or by its links; `None` when neither says enough.
    pub fn prospect(&self, route: &Route, history: Option<&RouteHistory>) -> Option<Prospect> {
        let own = history.and_then(|history| Prospect::of_values(&history.rtts_ms(MEAN_VALUES)));
        own.or_else(|| {
            let links: Option<Vec<&Prospect>> =
                route.links().map(|ends| self.links.get(&ends)).collect();
            links?.into_iter().copied().reduce(|sum, next| sum.and(&next))
        })
    }

    /// These routes were weighed for a tunnel; `stay` is the one that another had to beat.
    pub fn offered(
        &mut self,
        tunnel: TunnelId,
        now: Timestamp,
        offers: impl IntoIterator<Item = (Route, Prospect)>,
        stay: Option<usize>,
    ) {
        self.learn(now);
        if self.choices.contains_key(&tunnel) || self.choices.len() >= CHOICES_OPEN_MAX {
            return;
        }
        let offer = |(route, prospect)| Offer { route, prospect, outcome_ms: None };
        let offers: Vec<Offer> = offers.into_iter().map(offer).collect();
        if offers.len() > 1 {
            self.choices.insert(tunnel, Choice { at: now, offers, stay });
        }
    }

    /// A probe over a route that left at `sent_at` came back after `rtt_ms`.
    pub fn met(&mut self, route: &Route, sent_at: Timestamp, rtt_ms: f64) {
        for choice in self.choices.values_mut().filter(|choice| choice.at <= sent_at) {
            let offers = choice.offers.iter_mut();
            for offer in offers.filter(|o| o.outcome_ms.is_none() && o.route == *route) {
                offer.outcome_ms = Some(rtt_ms);
            }
        }
    }

    /// Choices that have waited long enough teach what became known of them. Where the route to stay on
    /// was not answered, nothing is said.
    fn learn(&mut self, now: Timestamp) {
        let due = |choice: &Choice| now.since(choice.at) >= OUTCOMES_WITHIN;
        let due: Vec<TunnelId> =
            self.choices.iter().filter(|(_, choice)| due(choice)).map(|(id, _)| *id).collect();
        let is_due = !due.is_empty();
        for tunnel in due {
            let Some(Choice { offers, stay, .. }) = self.choices.remove(&tunnel) else { continue };
            let answered = |at: usize| offers[at].outcome_ms.is_some();
            if stay.is_some_and(|at| !answered(at)) {
                continue;
            }
            let stay = stay.map(|stay| (0..stay).filter(|at| answered(*at)).count());
            let known = offers.iter().filter_map(|offer| Some((offer.prospect, offer.outcome_ms?)));
            let (prospects, outcomes_ms): (Vec<Prospect>, Vec<f64>) = known.unzip();
            prospects.iter().zip(&outcomes_ms).for_each(|(p, ms)| self.foresight.observe(p, *ms));
            self.tuner.observe(&prospects, stay, &outcomes_ms);
            self.tuner.end_round();
        }
        if is_due {
            self.set_rule();
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

    const TUNNEL: TunnelId = TunnelId(1);

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
        comparing.refresh(&links(), &histories);
        assert_eq!(comparing.prospect(&route(1), None).map(level), Some(30.0));
        let back = Route::new([NodeId([2; 8]), NodeId([9; 8])]).unwrap();
        assert_eq!(comparing.prospect(&back, None).map(level), Some(5.0), "the other direction");
        assert_eq!(comparing.prospect(&route(3), None), None);
        for at in 1..=LEVEL_VALUES as u64 {
            histories.probed(&route(1), Timestamp(at), Some(50_000));
        }
        let known = comparing.prospect(&route(1), histories.of(&route(1)));
        assert_eq!(known.map(level), Some(50.0));
        comparing.refresh(&links(), &histories);
        assert!(comparing.volatility() < 0.05, "{}", comparing.volatility());
    }

    #[test]
    fn what_choices_turned_out_to_cost_changes_the_rule() {
        let mut comparing = Comparing::default();
        let first = comparing.rule();
        let second = 1_000_000;
        // The first route looks better and is always worse than the one to stay on.
        let offers = || {
            let prospect = |ms| Prospect::of_values(&[ms; LEVEL_VALUES]).unwrap();
            [(route(1), prospect(90.0)), (route(2), prospect(100.0)), (route(3), prospect(9.0))]
        };
        for round in 0..u64::from(CHOICES_MIN) * 6 {
            let at = Timestamp(round * 31 * second);
            comparing.offered(TUNNEL, at, offers(), Some(1));
            comparing.offered(TUNNEL, Timestamp(at.0 + 1), offers(), Some(1));
            comparing.met(&route(1), Timestamp(at.0.saturating_sub(1)), 1.0);
            comparing.met(&route(1), Timestamp(at.0 + 1), 150.0);
            comparing.met(&route(1), Timestamp(at.0 + 2), 1.0);
            comparing.met(&route(2), Timestamp(at.0 + 1), 100.0);
        }
        assert_eq!(comparing.choices(), CHOICES_MIN * 6 - 1, "one a time, the last still waits");
        let learned = comparing.rule();
        assert!(learned.margin >= 0.1 && first.margin < 0.1, "{learned:?}");
    }

    #[test]
    fn without_the_outcome_of_the_route_to_stay_on_nothing_is_learned() {
        let mut comparing = Comparing::default();
        let prospect = Prospect::of_values(&[9.0; LEVEL_VALUES]).unwrap();
        for tunnel in 0..2 * CHOICES_OPEN_MAX as u16 {
            let offers = [(route(1), prospect), (route(2), prospect)];
            comparing.offered(TunnelId(tunnel), Timestamp(0), offers, Some(0));
        }
        assert_eq!(comparing.choices.len(), CHOICES_OPEN_MAX);
        comparing.met(&route(2), Timestamp(1), 9.0);
        comparing.offered(TUNNEL, Timestamp(60_000_000), [], None);
        assert_eq!((comparing.choices(), comparing.choices.len()), (0, 0));
    }
}
