//! The registry: every model version is one file `<version>.json`, and the file `champion` holds
//! the name of the one in use. Files are written beside and renamed, so that a reader sees the
//! old or the new one and never half of it. A version never changes once it is saved.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::{LearnError, file_error};
use crate::engine::predict::ForestModel;

/// The file that names the version in use.
const CHAMPION: &str = "champion";
const EXTENSION: &str = "json";
const VERSION_LENGTH_MAX: usize = 64;

/// Model versions in one folder.
#[derive(Clone, Debug)]
pub struct ModelRegistry {
    folder: PathBuf,
}

/// One version, usable or not.
#[derive(Debug)]
pub struct ListedModel {
    /// Its name.
    pub version: String,
    /// Its file.
    pub path: PathBuf,
    /// Whether the alias names it.
    pub champion: bool,
    /// The model, or why it cannot be used.
    pub model: Result<ForestModel, LearnError>,
}

impl ModelRegistry {
    /// A registry in this folder, which is made when the first model is saved.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Saves a model under its version and returns the file. Saving the same model again changes
    /// nothing.
    ///
    /// # Errors
    /// [`LearnError::VersionName`], [`LearnError::VersionTaken`], [`LearnError::File`].
    pub fn save(&self, model: &ForestModel) -> Result<PathBuf, LearnError> {
        let path = self.path_of(&model.version)?;
        let text = model.to_json();
        match fs::read(&path) {
            Ok(known) if known == text.as_bytes() => return Ok(path),
            Ok(_) => return Err(LearnError::VersionTaken(path)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(file_error("read", &path)(error)),
        }
        fs::create_dir_all(&self.folder).map_err(file_error("make the folder", &self.folder))?;
        replace(&path, text.as_bytes())?;
        Ok(path)
    }

    /// Loads and checks a version.
    ///
    /// # Errors
    /// [`LearnError::VersionName`], [`LearnError::NoSuchVersion`], [`LearnError::Model`],
    /// [`LearnError::File`].
    pub fn load(&self, version: &str) -> Result<ForestModel, LearnError> {
        let path = self.path_of(version)?;
        match fs::read(&path) {
            Ok(bytes) => {
                ForestModel::from_json(&bytes).map_err(|source| LearnError::Model { path, source })
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(LearnError::NoSuchVersion { path })
            }
            Err(error) => Err(file_error("read", &path)(error)),
        }
    }

    /// All versions in order of their names, which is that of age for names made by training. A
    /// damaged file is listed with its error. Empty when the folder does not exist.
    ///
    /// # Errors
    /// [`LearnError::File`] when the folder cannot be read.
    pub fn list(&self) -> Result<Vec<ListedModel>, LearnError> {
        let wrong = file_error("read the folder", &self.folder);
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(wrong(error)),
        };
        let champion = self.champion_version()?;
        let mut models = Vec::new();
        for entry in entries {
            let path = entry.map_err(&wrong)?.path();
            if path.extension().is_none_or(|extension| extension != EXTENSION) {
                continue;
            }
            let version = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            models.push(ListedModel {
                champion: champion.as_ref() == Some(&version),
                model: self.load(&version),
                version,
                path,
            });
        }
        models.sort_by(|a, b| a.version.cmp(&b.version));
        Ok(models)
    }

    /// The version in use; `None` when none was chosen yet.
    ///
    /// # Errors
    /// [`LearnError::File`].
    pub fn champion_version(&self) -> Result<Option<String>, LearnError> {
        let path = self.folder.join(CHAMPION);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(file_error("read", &path)(error)),
        }
    }

    /// The model in use; `None` when none was chosen yet.
    ///
    /// # Errors
    /// As [`ModelRegistry::load`], when the alias names a version that cannot be used.
    pub fn champion(&self) -> Result<Option<ForestModel>, LearnError> {
        self.champion_version()?.map(|version| self.load(&version)).transpose()
    }

    /// Makes a saved, sound version the one in use.
    ///
    /// # Errors
    /// As [`ModelRegistry::load`], and [`LearnError::File`]; the champion stays what it was.
    pub fn set_champion(&self, version: &str) -> Result<(), LearnError> {
        self.load(version)?;
        replace(&self.folder.join(CHAMPION), format!("{version}\n").as_bytes())
    }

    fn path_of(&self, version: &str) -> Result<PathBuf, LearnError> {
        check_version(version)?;
        Ok(self.folder.join(format!("{version}.{EXTENSION}")))
    }
}

/// Whether a version may be a file name here.
///
/// # Errors
/// [`LearnError::VersionName`].
pub(super) fn check_version(version: &str) -> Result<(), LearnError> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.' || b == b'-';
    let good = (1..=VERSION_LENGTH_MAX).contains(&version.len())
        && version.bytes().all(allowed)
        && !version.starts_with(['.', '-']);
    if good { Ok(()) } else { Err(LearnError::VersionName(version.chars().take(80).collect())) }
}

/// Writes beside and renames.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), LearnError> {
    let wrong = file_error("write", path);
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = PathBuf::from(beside);
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|error| {
        // What is half written must not stay; the first error is the one to tell.
        drop(fs::remove_file(&beside));
        wrong(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::{FEATURES, schema_hash};
    use crate::engine::predict::{
        FORMAT, FORMAT_VERSION, Head, Interval, ModelCard, ModelError, Ranking, Reference, Trees,
    };

    fn model(version: &str, base: f64) -> ForestModel {
        let mut trees = Trees { base, ..Trees::default() };
        let root = trees.push_leaf(0.1);
        trees.roots.push(root);
        ForestModel {
            format: FORMAT.into(),
            format_version: FORMAT_VERSION,
            version: version.into(),
            schema_hash: schema_hash(),
            feature_names: FEATURES.iter().map(|feature| feature.name.to_owned()).collect(),
            latency: Head {
                target: "ln_route_rtt_ms".into(),
                reference: Reference::LastValue,
                trees,
                scale: None,
                interval: Interval { coverage: 0.9, low: -1.0, high: 1.0 },
            },
            throughput: None,
            reliability: None,
            ranking: Ranking::default(),
            card: ModelCard::default(),
        }
    }

    #[test]
    fn versions_are_saved_listed_and_chosen() {
        let folder = tempfile::tempdir().unwrap();
        let registry = ModelRegistry::new(folder.path().join("models"));
        assert!(registry.list().unwrap().is_empty());
        assert_eq!(registry.champion().unwrap(), None);
        for (version, base) in [("v2-b", 2.0), ("v1-a", 1.0)] {
            registry.save(&model(version, base)).unwrap();
        }
        registry.set_champion("v1-a").unwrap();
        registry.set_champion("v2-b").unwrap();
        assert_eq!(registry.champion().unwrap(), Some(model("v2-b", 2.0)));
        let listed = registry.list().unwrap();
        let told: Vec<_> = listed.iter().map(|m| (m.version.as_str(), m.champion)).collect();
        assert_eq!(told, [("v1-a", false), ("v2-b", true)]);
        let files = fs::read_dir(registry.folder()).unwrap().count();
        assert_eq!(files, 3, "two versions, the alias, and nothing half written");
    }

    #[test]
    fn a_version_never_changes() {
        let folder = tempfile::tempdir().unwrap();
        let registry = ModelRegistry::new(folder.path());
        registry.save(&model("v1", 1.0)).unwrap();
        registry.save(&model("v1", 1.0)).unwrap();
        let taken = registry.save(&model("v1", 2.0));
        assert!(matches!(taken, Err(LearnError::VersionTaken(_))));
        assert_eq!(registry.load("v1").unwrap(), model("v1", 1.0));
    }

    #[test]
    fn names_cannot_leave_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let registry = ModelRegistry::new(folder.path().join("models"));
        let long = "v".repeat(65);
        for name in ["", ".", "..", "../x", "a/b", "a\\b", "A", "a b", "-x", ".x", "é", &long] {
            let refused = |result| matches!(result, Err(LearnError::VersionName(_)));
            assert!(refused(registry.save(&model(name, 1.0)).map(|_| ())), "{name}");
            assert!(refused(registry.load(name).map(|_| ())), "{name}");
            assert!(refused(registry.set_champion(name)), "{name}");
        }
        assert!(!registry.folder().exists());
        registry.save(&model("v1.2-rc3", 1.0)).unwrap();
    }

    #[test]
    fn a_damaged_version_is_listed_with_its_error_and_never_chosen() {
        let folder = tempfile::tempdir().unwrap();
        let registry = ModelRegistry::new(folder.path());
        let path = registry.save(&model("v1", 1.0)).unwrap();
        registry.save(&model("v2", 2.0)).unwrap();
        registry.set_champion("v1").unwrap();
        let text = fs::read(&path).unwrap();
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        let listed = registry.list().unwrap();
        assert_eq!(listed.len(), 2);
        assert!(matches!(
            listed[0].model,
            Err(LearnError::Model { source: ModelError::Damaged(_), .. })
        ));
        assert!(listed[1].model.is_ok());
        let error = registry.champion().unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(registry.set_champion("v1").is_err());
        assert!(matches!(registry.set_champion("v9"), Err(LearnError::NoSuchVersion { .. })));
        assert_eq!(registry.champion_version().unwrap().as_deref(), Some("v1"));
        registry.set_champion("v2").unwrap();
        assert_eq!(registry.champion().unwrap(), Some(model("v2", 2.0)));
    }
}
