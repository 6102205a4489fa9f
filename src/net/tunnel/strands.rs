//! Which connection of a tunnel a new stream travels on.
//!
//! A tunnel of several paths holds several QUIC connections, its strands. Each has its own tunnel
//! number, so that routes are chosen, measured and replaced for each of them; the frames of one
//! connection share a congestion window and could not be split over routes. A stream stays on its
//! strand for life.

/// What is known of a strand when a stream is to be opened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Strand {
    /// It is connected and has a route that is alive.
    pub(super) usable: bool,
    /// What its route can carry (bytes/s).
    pub(super) capacity: Option<f64>,
    /// Streams that are open on it.
    pub(super) open: u64,
}

/// The usable strand with the largest share of capacity for one more stream, the first of equals.
/// Where a capacity is not known, it is taken for the mean of those that are.
pub(super) fn choose(strands: &[Strand]) -> Option<usize> {
    let known = strands.iter().filter_map(|strand| strand.capacity);
    let mean = match known.clone().count() {
        0 => 1.0,
        count => known.sum::<f64>() / count as f64,
    };
    let share = |strand: &Strand| strand.capacity.unwrap_or(mean) / (strand.open + 1) as f64;
    let usable = strands.iter().enumerate().filter(|(_, strand)| strand.usable);
    // `max_by` would return the last of equals.
    let best = usable.rev().max_by(|(_, one), (_, other)| share(one).total_cmp(&share(other)));
    best.map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strand(usable: bool, capacity: Option<f64>, open: u64) -> Strand {
        Strand { usable, capacity, open }
    }

    #[test]
    fn streams_go_where_the_most_is_left_for_them() {
        let equal = |a, b| choose(&[strand(true, None, a), strand(true, None, b)]);
        assert_eq!([equal(0, 0), equal(1, 0), equal(1, 1)], [Some(0), Some(1), Some(0)]);
        let mut open = [0, 0];
        for _ in 0..9 {
            let wide_and_narrow =
                [strand(true, Some(2e6), open[0]), strand(true, Some(1e6), open[1])];
            open[choose(&wide_and_narrow).unwrap()] += 1;
        }
        assert_eq!(open, [6, 3], "in proportion");
        let unknown = [strand(true, Some(4e6), 1), strand(true, None, 0)];
        assert_eq!(choose(&unknown), Some(1), "taken for the mean");
    }

    #[test]
    fn a_strand_that_is_lost_gets_nothing() {
        let lost = strand(false, Some(9e9), 0);
        assert_eq!(choose(&[lost, strand(true, Some(1.0), 100)]), Some(1));
        assert_eq!(choose(&[lost, lost]), None);
        assert_eq!(choose(&[]), None);
    }
}
