//! The first model: shipped with the program, for a node that has measured nothing yet.
//!
//! It was trained on a simulated mesh (its card says on what, and `models/README.md` by which
//! commands), and forecasts how far the next round trip lies above a level that is measured on the
//! spot, so that it can be asked anywhere. Whether it helps here is watched from the first probe
//! on: the mix follows whoever is right, and a model that does worse than the moving average is
//! taken out of use like any other.

use std::path::Path;

use super::{LearnError, ModelRegistry};
use crate::engine::predict::{ForestModel, ModelError};

/// The file.
const FIRST: &str = include_str!("../../models/first.json");

/// The shipped model. Its card names `shipped` as commit when the file names none.
///
/// # Errors
/// [`ModelError`] when it was trained on another feature schema than this program computes; a
/// test says so before that.
pub fn first_model() -> Result<ForestModel, ModelError> {
    let mut model = ForestModel::from_json(FIRST.as_bytes())?;
    model.card.commit.get_or_insert_with(|| "shipped".into());
    Ok(model)
}

/// Puts the shipped model into a registry that was never used, and makes it champion. Returns
/// whether it did.
///
/// # Errors
/// [`LearnError`] when the registry cannot be read or written; then nothing is promoted.
pub fn install_first(models_dir: &Path, now_us: u64) -> Result<bool, LearnError> {
    let registry = ModelRegistry::new(models_dir);
    if !registry.list()?.is_empty() || !registry.history()?.changes.is_empty() {
        return Ok(false);
    }
    let model = first_model().map_err(|source| LearnError::Model {
        path: Path::new("models/first.json").to_owned(),
        source,
    })?;
    registry.save(&model)?;
    registry.promote(&model.version, now_us, "shipped with the program")?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_model_fits_this_program_and_says_what_it_is() {
        let model = first_model().unwrap();
        assert_eq!(model.version, "first");
        assert_eq!(model.card.commit.as_deref(), Some("shipped"));
        assert!(model.card.rows_train > 1_000 && model.card.rows_test > 100);
        assert!(model.card.model.rmse_ln <= model.card.moving_average.rmse_ln);
    }

    #[test]
    fn it_serves_a_new_node_once_and_never_again() {
        let folder = tempfile::tempdir().unwrap();
        assert!(install_first(folder.path(), 1).unwrap());
        let registry = ModelRegistry::new(folder.path());
        assert_eq!(registry.champion_version().unwrap().as_deref(), Some("first"));
        assert!(!install_first(folder.path(), 2).unwrap());
        registry.rollback(3, "it did harm").unwrap();
        assert!(!install_first(folder.path(), 4).unwrap(), "what had to go stays away");
        assert_eq!(registry.champion_version().unwrap(), None);
    }
}
