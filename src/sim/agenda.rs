//! What happens when: a queue of events in order of time, and of planning where times are equal.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crate::engine::types::Timestamp;

struct Planned<E> {
    at: Timestamp,
    number: u64,
    event: E,
}

impl<E> PartialEq for Planned<E> {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl<E> Eq for Planned<E> {}

impl<E> PartialOrd for Planned<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Planned<E> {
    /// Reversed, because `BinaryHeap` yields the greatest first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// See the module documentation.
pub(super) struct Agenda<E> {
    queue: BinaryHeap<Planned<E>>,
    planned: u64,
}

impl<E> Default for Agenda<E> {
    fn default() -> Self {
        Self { queue: BinaryHeap::new(), planned: 0 }
    }
}

impl<E> Agenda<E> {
    pub(super) fn plan(&mut self, at: Timestamp, event: E) {
        self.planned += 1;
        self.queue.push(Planned { at, number: self.planned, event });
    }

    /// The next event, unless it is later than `end`.
    pub(super) fn next_until(&mut self, end: Timestamp) -> Option<(Timestamp, E)> {
        if self.queue.peek()?.at > end {
            return None;
        }
        self.queue.pop().map(|planned| (planned.at, planned.event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_in_order_of_time_and_then_of_planning() {
        let mut agenda = Agenda::default();
        for (at, event) in [(5, 'c'), (1, 'a'), (5, 'd'), (9, 'e'), (1, 'b')] {
            agenda.plan(Timestamp(at), event);
        }
        let mut until = |end| {
            std::iter::from_fn(|| agenda.next_until(Timestamp(end))).map(|(_, e)| e).collect()
        };
        let (first, second): (String, String) = (until(8), until(9));
        assert_eq!((first.as_str(), second.as_str()), ("abcd", "e"));
    }
}
