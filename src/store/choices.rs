//! Choices that became known, kept and read: what a node learns its rule of comparing routes from.

use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

use super::reader::unsigned;
use super::rows::{integer, text};
use super::{Reader, StoreError};
use crate::engine::predict::{CENTRES_COUNT, KnownChoice, KnownOffer, Prospect};
use crate::engine::types::Timestamp;

/// A route of a choice, as JSON in the column `offers`.
#[derive(Serialize, Deserialize)]
struct Offer {
    route: String,
    centre_ms: [f64; CENTRES_COUNT],
    spread_ms: [f64; CENTRES_COUNT],
    foresight: Option<f64>,
    outcome_ms: f64,
}

/// To the third decimal: shorter, and no probe knows more of a time in milliseconds.
fn to_us(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}

impl Offer {
    fn of(offer: &KnownOffer) -> Self {
        let Prospect { centre_ms, spread_ms, foresight, .. } = offer.prospect;
        let (centre_ms, spread_ms) = (centre_ms.map(to_us), spread_ms.map(to_us));
        let foresight = foresight.map(to_us);
        let (route, outcome_ms) = (offer.route.to_string(), to_us(offer.outcome_ms));
        Self { route, centre_ms, spread_ms, foresight, outcome_ms }
    }

    /// `None` when a person has changed it into nothing that can be.
    fn known(self) -> Option<KnownOffer> {
        let Self { route, centre_ms, spread_ms, foresight, outcome_ms } = self;
        let prospect = Prospect { centre_ms, spread_ms, foresight, stale_ms: 0.0 };
        Some(KnownOffer { route: route.parse().ok()?, prospect, outcome_ms })
    }
}

/// Keeps a choice.
pub(super) fn keep(connection: &Connection, choice: &KnownChoice) -> rusqlite::Result<usize> {
    let offers: Vec<Offer> = choice.offers.iter().map(Offer::of).collect();
    let sql = "INSERT INTO choice (at_us, destination, volatility, stay, offers)
               VALUES (?1, ?2, ?3, ?4, ?5)";
    connection.prepare_cached(sql)?.execute(params![
        integer(choice.at.as_micros()),
        choice.destination.to_string(),
        choice.volatility,
        choice.stay.map(|stay| integer(stay as u64)),
        text(&offers)?,
    ])
}

impl Reader {
    /// The newest `count` choices, oldest first. Those that make no sense are left out.
    ///
    /// # Errors
    /// As [`Reader::counts`].
    pub fn choices(&self, count: usize) -> Result<Vec<KnownChoice>, StoreError> {
        let sql = "SELECT at_us, destination, volatility, stay, offers FROM choice
                   ORDER BY at_us DESC, id DESC LIMIT ?1";
        let rows = self.rows(sql, [integer(count as u64)], |row| {
            let (destination, offers): (String, String) = (row.get(1)?, row.get(4)?);
            let stay: Option<i64> = row.get(3)?;
            let offers: Vec<Offer> = serde_json::from_str(&offers).unwrap_or_default();
            let offers: Option<Vec<KnownOffer>> = offers.into_iter().map(Offer::known).collect();
            let (at, volatility) = (Timestamp(unsigned(row, 0)?), row.get(2)?);
            let known = offers.zip(destination.parse().ok()).map(|(offers, destination)| {
                let stay = stay.map(|stay| usize::try_from(stay).unwrap_or(usize::MAX));
                KnownChoice { at, destination, volatility, offers, stay }
            });
            let is_whole = |known: &KnownChoice| {
                let count = known.offers.len();
                count > 1
                    && known.volatility.is_finite()
                    && known.stay.is_none_or(|stay| stay < count)
            };
            Ok(known.filter(is_whole))
        })?;
        Ok(rows.into_iter().rev().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::{NodeId, Route};
    use crate::store::{Retention, Writer};

    #[test]
    fn the_newest_choices_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let writer = Writer::start(folder.path().join("a.db"), Retention::default()).unwrap();
        let node = |byte| NodeId([byte; 8]);
        let offer = |nodes: &[u8], ms: f64| KnownOffer {
            route: Route::new(nodes.iter().copied().map(node).collect::<Vec<_>>()).unwrap(),
            prospect: Prospect { foresight: Some(0.25), ..Prospect::certain(ms, ms / 8.0) },
            outcome_ms: ms + 1.125,
        };
        let choice = |at| KnownChoice {
            at: Timestamp(at),
            destination: node(9),
            volatility: 0.1 + at as f64,
            offers: vec![offer(&[1, 9], 10.0), offer(&[1, 2, 9], 4.0)],
            stay: (at > 1).then_some(1),
        };
        for at in 1..=3 {
            writer.choice(choice(at));
        }
        writer.flush().unwrap();
        let reader = Reader::open(writer.path()).unwrap();
        assert_eq!(reader.choices(2).unwrap(), [choice(2), choice(3)]);
        assert_eq!(reader.choices(9).unwrap().len(), 3);
        let damaged = rusqlite::Connection::open(writer.path()).unwrap();
        damaged.execute("UPDATE choice SET stay = 7 WHERE at_us = 3", []).unwrap();
        damaged.execute("UPDATE choice SET offers = '{' WHERE at_us = 2", []).unwrap();
        damaged.execute("UPDATE choice SET stay = 1 << 40 WHERE at_us = 2", []).unwrap();
        let left: Vec<u64> = reader.choices(9).unwrap().iter().map(|c| c.at.0).collect();
        assert_eq!(left, [1]);
    }
}
