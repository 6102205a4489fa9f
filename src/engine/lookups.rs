//! Look-ups that wait for the DHT.
//!
//! Those of one name share one question. A search that found nothing is repeated once after
//! [`RETRY_AFTER`]; what gossip brings meanwhile answers too. When nobody is found, the answer stands
//! for [`ABSENT_FOR`], so that a program that asks for an unknown name again and again costs
//! nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use super::event::RequestId;
use super::types::{ServiceName, Timestamp};

/// Most look-ups that wait at one time.
pub const WAITING_MAX: usize = 1_024;
/// How often the DHT is searched for one look-up.
const TRIES: u32 = 2;
/// Pause before the search is repeated: longer than a record takes to arrive.
pub const RETRY_AFTER: Duration = Duration::from_millis(300);
/// How long a look-up may take: longer than its searches, each of which the network bounds.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(12);
/// How long a name that nobody publishes is not searched for again.
pub const ABSENT_FOR: Duration = Duration::from_secs(2);
/// Most such names.
const ABSENT_MAX: usize = 1_024;

/// A name, and whether only the DHT's word counts.
pub(super) type Question = (ServiceName, bool);

/// Those who wait for one question.
pub(super) struct Waiting {
    /// Names the search; the id of the first request.
    search: RequestId,
    tries: u32,
    retry_at: Option<Timestamp>,
    /// Who asked, and when.
    pub(super) requests: Vec<(RequestId, Timestamp)>,
}

/// All look-ups under way, and the names that nobody publishes.
#[derive(Default)]
pub(super) struct Lookups {
    open: BTreeMap<Question, Waiting>,
    searches: BTreeMap<RequestId, Question>,
    absent: BTreeMap<ServiceName, Timestamp>,
}

impl Lookups {
    pub(super) fn is_full(&self) -> bool {
        self.open.values().map(|waiting| waiting.requests.len()).sum::<usize>() >= WAITING_MAX
    }

    /// Whether it was found just now that nobody publishes a name.
    pub(super) fn is_absent(&self, name: &ServiceName, now: Timestamp) -> bool {
        self.absent.get(name).is_some_and(|until| *until > now)
    }

    /// One more waits. Returns whether the DHT has to be searched.
    pub(super) fn ask(&mut self, request: RequestId, question: Question, now: Timestamp) -> bool {
        if let Some(waiting) = self.open.get_mut(&question) {
            waiting.requests.push((request, now));
            return false;
        }
        self.searches.insert(request, question.clone());
        let requests = vec![(request, now)];
        let waiting = Waiting { search: request, tries: 1, retry_at: None, requests };
        self.open.insert(question, waiting);
        true
    }

    /// What a search was for.
    pub(super) fn question(&self, search: RequestId) -> Option<&Question> {
        self.searches.get(&search)
    }

    /// A search found nothing. Returns whether it is repeated.
    pub(super) fn retry(&mut self, question: &Question, now: Timestamp) -> bool {
        let Some(waiting) = self.open.get_mut(question) else { return false };
        if waiting.tries >= TRIES {
            return false;
        }
        waiting.tries += 1;
        waiting.retry_at = Some(now + RETRY_AFTER);
        true
    }

    /// Ends a question; whoever waited is to be answered.
    pub(super) fn end(&mut self, question: &Question) -> Option<Waiting> {
        let waiting = self.open.remove(question)?;
        self.searches.remove(&waiting.search);
        Some(waiting)
    }

    /// Nobody publishes this name.
    pub(super) fn set_absent(&mut self, name: ServiceName, now: Timestamp) {
        if self.absent.len() >= ABSENT_MAX {
            self.absent.retain(|_, until| *until > now);
        }
        if self.absent.len() < ABSENT_MAX {
            self.absent.insert(name, now + ABSENT_FOR);
        }
    }

    /// Somebody publishes it after all.
    pub(super) fn set_present(&mut self, name: &ServiceName) {
        self.absent.remove(name);
    }

    /// The searches that are to be repeated now.
    pub(super) fn take_due(&mut self, now: Timestamp) -> Vec<(RequestId, ServiceName)> {
        let mut due = Vec::new();
        for ((name, _), waiting) in &mut self.open {
            if waiting.retry_at.is_some_and(|at| at <= now) {
                waiting.retry_at = None;
                due.push((waiting.search, name.clone()));
            }
        }
        due
    }

    pub(super) fn next_timeout(&self) -> Option<Timestamp> {
        self.open.values().filter_map(|waiting| waiting.retry_at).min()
    }

    /// Questions that have been open for too long. Forgets names that may be searched for again.
    pub(super) fn late(&mut self, now: Timestamp) -> Vec<Question> {
        self.absent.retain(|_, until| *until > now);
        let late = self.open.iter().filter(|(_, waiting)| {
            let first = waiting.requests.first();
            first.is_some_and(|(_, at)| now.since(*at) > LOOKUP_TIMEOUT)
        });
        late.map(|(question, _)| question.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000_000);

    fn question(name: &str) -> Question {
        (name.parse().unwrap(), false)
    }

    #[test]
    fn one_search_serves_all_who_ask_and_is_repeated_once() {
        let mut lookups = Lookups::default();
        let a = question("a.local");
        assert!(lookups.ask(1, a.clone(), NOW));
        assert!(!lookups.ask(2, a.clone(), NOW));
        assert!(lookups.ask(3, (a.0.clone(), true), NOW), "only the DHT's word counts");
        assert_eq!(lookups.question(1), Some(&a));
        assert_eq!(lookups.next_timeout(), None);
        assert!(lookups.retry(&a, NOW));
        assert_eq!(lookups.next_timeout(), Some(NOW + RETRY_AFTER));
        assert!(lookups.take_due(NOW).is_empty());
        assert_eq!(lookups.take_due(NOW + RETRY_AFTER), [(1, a.0.clone())]);
        assert_eq!(lookups.next_timeout(), None);
        assert!(!lookups.retry(&a, NOW), "twice is enough");
        let waited: Vec<u64> =
            lookups.end(&a).unwrap().requests.iter().map(|(id, _)| *id).collect();
        assert_eq!(waited, [1, 2]);
        assert!(lookups.question(1).is_none() && lookups.question(3).is_some());
        assert!(lookups.late(NOW + LOOKUP_TIMEOUT).is_empty());
        assert_eq!(lookups.late(NOW + 2 * LOOKUP_TIMEOUT).len(), 1);
    }

    #[test]
    fn names_that_nobody_publishes_are_remembered_shortly_and_boundedly() {
        let mut lookups = Lookups::default();
        let name: ServiceName = "a.local".parse().unwrap();
        lookups.set_absent(name.clone(), NOW);
        assert!(lookups.is_absent(&name, NOW));
        assert!(!lookups.is_absent(&name, NOW + ABSENT_FOR));
        lookups.set_present(&name);
        assert!(!lookups.is_absent(&name, NOW));
        for index in 0..2 * ABSENT_MAX {
            lookups.set_absent(format!("{index}.local").parse().unwrap(), NOW);
        }
        assert_eq!(lookups.absent.len(), ABSENT_MAX);
        lookups.set_absent(name.clone(), NOW + ABSENT_FOR);
        assert_eq!(lookups.absent.len(), 1, "the others' time is over");
        for request in 0..WAITING_MAX as u64 {
            assert!(!lookups.is_full());
            lookups.ask(request, question("a.local"), NOW);
        }
        assert!(lookups.is_full());
    }
}
