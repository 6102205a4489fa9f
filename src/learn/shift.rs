//! Whether the features look otherwise than where the champion was trained: an alert for people, noted
//! by each training, of the champion that was in use then.

use super::history::Shift;
use super::{LearnError, ModelRegistry, TrainRow};
use crate::engine::predict::profile::shifted;
use crate::engine::predict::{FeatureVector, ForestModel};

/// Fewest rows later than the champion's training that say anything: with fewer, shares of a tenth are
/// known to a quarter at best.
pub const ROWS_MIN: usize = 200;

/// Notes in the history how far the rows after the champion's training have shifted.
///
/// # Errors
/// [`LearnError::History`], [`LearnError::File`].
pub(super) fn note(
    registry: &ModelRegistry,
    rows: &[TrainRow],
    now_us: u64,
) -> Result<(), LearnError> {
    // A champion that cannot be used does not decide either.
    let Ok(Some(champion)) = registry.champion() else { return Ok(()) };
    match of(&champion, rows, now_us) {
        Some(shift) => registry.note_shift(shift),
        None => Ok(()),
    }
}

/// `None` with too few rows, or for a model whose card says nothing of its features.
fn of(champion: &ForestModel, rows: &[TrainRow], now_us: u64) -> Option<Shift> {
    let later = rows.iter().filter(|row| row.sent_us > champion.card.created_us);
    let later: Vec<&FeatureVector> = later.map(|row| &row.features).collect();
    if later.len() < ROWS_MIN || champion.card.profile.is_empty() {
        return None;
    }
    let features = shifted(&champion.card.profile, &later).into_iter();
    Some(Shift {
        at_us: now_us,
        version: champion.version.clone(),
        rows: later.len(),
        features: features.map(|(name, index)| (name.to_owned(), index)).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::profile::profile;
    use crate::engine::predict::schema::{FEATURES, index};
    use crate::learn::RouteKey;
    use crate::learn::registry::tests::model;

    /// Rows of which one feature counts up from `from`.
    fn rows(count: u64, from: f64) -> Vec<TrainRow> {
        let row = |at: u64| {
            let mut features = [1.0; FEATURES.len()];
            features[index("route_last_ms")] = from + at as f64;
            let (key, rtt_ms, bandwidth) = (RouteKey::default(), Some(1.0), None);
            TrainRow { key, sent_us: 1_000 + at, done_us: 2_000 + at, rtt_ms, bandwidth, features }
        };
        (0..count).map(row).collect()
    }

    #[test]
    fn what_shifted_after_the_training_of_the_champion_is_noted() {
        let mut champion = model("v1", 0.0);
        let old = rows(300, 0.0);
        assert_eq!(of(&champion, &old, 7), None, "its card says nothing");
        champion.card.profile = profile(&old.iter().map(|row| &row.features).collect::<Vec<_>>());
        champion.card.created_us = 999;
        assert_eq!(of(&champion, &rows(300, 0.0), 7).unwrap().features, []);
        let found = of(&champion, &rows(300, 200.0), 7).unwrap();
        assert_eq!((found.at_us, found.version.as_str(), found.rows), (7, "v1", 300));
        assert_eq!(found.features.len(), 1);
        assert!(found.features[0].0 == "route_last_ms" && found.features[0].1 > 0.25);
        champion.card.created_us = 1_100;
        assert_eq!(of(&champion, &rows(300, 200.0), 7), None, "199 are later");
    }
}
