//! Which models were in use, and why that changed: the file `history.json` of a registry.

use std::collections::VecDeque;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{LearnError, file_error};

/// Name of the file.
pub(super) const FILE: &str = "history.json";
/// Champions that one can go back to.
pub const PREVIOUS_MAX: usize = 16;
/// Changes that are remembered.
pub const CHANGES_MAX: usize = 64;

/// What happened to the champion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// A version became champion.
    Promoted,
    /// The champion had to go.
    RolledBack,
}

/// A change of the champion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// When (µs since the epoch).
    pub at_us: u64,
    /// What happened.
    pub action: Action,
    /// The champion before; `None`: the moving average decided.
    pub from: Option<String>,
    /// The champion from then on; `None`: the moving average decides.
    pub to: Option<String>,
    /// Why, in one line for people.
    pub reason: String,
}

/// How far the features of newer rows are from those that a champion was trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shift {
    /// When that was looked at (µs since the epoch).
    pub at_us: u64,
    /// The champion.
    pub version: String,
    /// Rows later than its training.
    pub rows: usize,
    /// Features whose population stability index is above the alert, with it, the largest first.
    pub features: Vec<(String, f64)>,
}

/// The past of a registry's champion.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct History {
    /// Champions before the one in use, the newest last, at most [`PREVIOUS_MAX`].
    pub previous: VecDeque<String>,
    /// What happened, the newest last, at most [`CHANGES_MAX`].
    pub changes: VecDeque<Change>,
    /// What the newest training found of the features; `None` before one looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shift: Option<Shift>,
}

impl History {
    /// Notes a change. A champion that was replaced can be gone back to; one that had to go cannot.
    pub fn note(&mut self, change: Change) {
        if let (Action::Promoted, Some(from)) = (change.action, &change.from) {
            self.previous.push_back(from.clone());
        }
        self.changes.push_back(change);
        self.previous.drain(..self.previous.len().saturating_sub(PREVIOUS_MAX));
        self.changes.drain(..self.changes.len().saturating_sub(CHANGES_MAX));
    }

    /// Whether a version was champion and had to go, as far as is remembered.
    pub fn had_to_go(&self, version: &str) -> bool {
        let gone = |change: &Change| {
            change.action == Action::RolledBack && change.from.as_deref() == Some(version)
        };
        self.changes.iter().any(gone)
    }

    /// Reads the file; there may be none.
    pub(super) fn read(path: &Path) -> Result<Self, LearnError> {
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                let (path, why) = (path.to_owned(), error.to_string());
                LearnError::History { path, why }
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(file_error("read", path)(error)),
        }
    }

    /// The file's bytes.
    pub(super) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a history holds only numbers and text")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(action: Action, from: &str, to: &str) -> Change {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Change { at_us: 7, action, from: some(from), to: some(to), reason: "a test".into() }
    }

    #[test]
    fn only_the_newest_are_remembered() {
        let mut history = History::default();
        for index in 0..100 {
            let (from, to) = (format!("v{index}"), format!("v{}", index + 1));
            history.note(change(Action::Promoted, &from, &to));
        }
        assert_eq!(history.previous.len(), PREVIOUS_MAX);
        assert_eq!(history.previous.back().map(String::as_str), Some("v99"));
        assert_eq!(history.changes.len(), CHANGES_MAX);
        assert_eq!(history.changes.back().and_then(|c| c.to.as_deref()), Some("v100"));
        let again: History = serde_json::from_str(&history.to_json()).unwrap();
        assert_eq!(again, history);
    }

    #[test]
    fn what_had_to_go_is_known_and_not_gone_back_to() {
        let mut history = History::default();
        history.note(change(Action::Promoted, "", "v1"));
        history.note(change(Action::RolledBack, "v1", ""));
        assert!(history.previous.is_empty());
        assert!(history.had_to_go("v1") && !history.had_to_go("v2"));
    }
}
