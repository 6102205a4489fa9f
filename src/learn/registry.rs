//! The registry: every model version is one file `<version>.json`. The file `champion` holds the
//! name of the one in use, `challenger` that of the one in shadow, and `history.json` how it came
//! to that. Files are written beside and renamed, so that a reader sees the old or the new one and
//! never half of it; a version never changes once it is saved. The node, a training and a person
//! may change the aliases at the same time: whoever does holds the file `lock`.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::history::{self, Action, Change, History, Shift};
use super::{LearnError, file_error};
use crate::engine::predict::ForestModel;

/// The file that names the version in use.
const CHAMPION: &str = "champion";
/// The file that names the version in shadow.
const CHALLENGER: &str = "challenger";
/// The file that is locked during a change of the aliases.
const LOCK: &str = "lock";
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
    /// Whether it is in use.
    pub champion: bool,
    /// Whether it is in shadow.
    pub challenger: bool,
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
    /// nothing, also when another commit of the program trained it.
    ///
    /// # Errors
    /// [`LearnError::VersionName`], [`LearnError::VersionTaken`], [`LearnError::File`].
    pub fn save(&self, model: &ForestModel) -> Result<PathBuf, LearnError> {
        let path = self.path_of(&model.version)?;
        let text = model.to_json();
        match fs::read(&path) {
            Ok(known) if known == text.as_bytes() || is_but_for_commit(&known, model) => {
                return Ok(path);
            }
            Ok(_) => return Err(LearnError::VersionTaken(path)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(file_error("read", &path)(error)),
        }
        self.make_folder()?;
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
        let (champion, challenger) = (self.champion_version()?, self.challenger_version()?);
        let mut models = Vec::new();
        for entry in entries {
            let path = entry.map_err(&wrong)?.path();
            let is_history = path.file_name().is_some_and(|name| name == history::FILE);
            if is_history || path.extension().is_none_or(|extension| extension != EXTENSION) {
                continue;
            }
            let version = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            models.push(ListedModel {
                champion: champion.as_ref() == Some(&version),
                challenger: challenger.as_ref() == Some(&version),
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
    /// [`LearnError::File`], [`LearnError::Alias`].
    pub fn champion_version(&self) -> Result<Option<String>, LearnError> {
        self.alias(CHAMPION)
    }

    /// The version in shadow, if any.
    ///
    /// # Errors
    /// [`LearnError::File`], [`LearnError::Alias`].
    pub fn challenger_version(&self) -> Result<Option<String>, LearnError> {
        self.alias(CHALLENGER)
    }

    /// The model in use; `None` when none was chosen yet.
    ///
    /// # Errors
    /// As [`ModelRegistry::champion_version`] and [`ModelRegistry::load`], when the alias names a
    /// version that cannot be used.
    pub fn champion(&self) -> Result<Option<ForestModel>, LearnError> {
        self.champion_version()?.map(|version| self.load(&version)).transpose()
    }

    /// The model in shadow, if any.
    ///
    /// # Errors
    /// As [`ModelRegistry::champion`].
    pub fn challenger(&self) -> Result<Option<ForestModel>, LearnError> {
        self.challenger_version()?.map(|version| self.load(&version)).transpose()
    }

    /// What the champion was and why that changed.
    ///
    /// # Errors
    /// [`LearnError::File`], [`LearnError::History`].
    pub fn history(&self) -> Result<History, LearnError> {
        History::read(&self.folder.join(history::FILE))
    }

    /// The version that a name stands for: `champion`, `challenger`, or the name itself.
    ///
    /// # Errors
    /// [`LearnError::NoAlias`], and as [`ModelRegistry::champion_version`].
    pub fn resolve(&self, name: &str) -> Result<String, LearnError> {
        match name {
            CHAMPION => self.champion_version()?.ok_or(LearnError::NoAlias(CHAMPION)),
            CHALLENGER => self.challenger_version()?.ok_or(LearnError::NoAlias(CHALLENGER)),
            version => Ok(version.to_owned()),
        }
    }

    /// Makes a saved, sound version the one in use; `None` when it is already. It is no challenger
    /// any more. `at_us` (µs since the epoch) and `reason` go into the history.
    ///
    /// # Errors
    /// As [`ModelRegistry::load`], [`LearnError::History`], [`LearnError::File`]; the champion
    /// stays what it was.
    pub fn promote(
        &self,
        version: &str,
        at_us: u64,
        reason: &str,
    ) -> Result<Option<Change>, LearnError> {
        self.load(version)?;
        let _lock = self.lock()?;
        let from = match self.champion_version() {
            // This is how a damaged alias is mended.
            Err(LearnError::Alias { .. }) => None,
            known => known?,
        };
        if from.as_deref() == Some(version) {
            return Ok(None);
        }
        let (action, to) = (Action::Promoted, Some(version.to_owned()));
        self.change(self.history()?, Change { at_us, action, from, to, reason: reason.into() })
            .map(Some)
    }

    /// Takes the champion out of use and goes back to the one before, or to none: the newest of
    /// the history that can still be used. `at_us` and `reason` as for [`ModelRegistry::promote`].
    ///
    /// # Errors
    /// [`LearnError::NoAlias`] without a champion, [`LearnError::Alias`], [`LearnError::History`],
    /// [`LearnError::File`]; the champion stays what it was.
    pub fn rollback(&self, at_us: u64, reason: &str) -> Result<Change, LearnError> {
        if !self.folder.exists() {
            return Err(LearnError::NoAlias(CHAMPION));
        }
        let _lock = self.lock()?;
        let from = Some(self.champion_version()?.ok_or(LearnError::NoAlias(CHAMPION))?);
        let mut history = self.history()?;
        let mut to = None;
        while let Some(before) = history.previous.pop_back() {
            if Some(&before) != from.as_ref() && self.load(&before).is_ok() {
                to = Some(before);
                break;
            }
        }
        let action = Action::RolledBack;
        self.change(history, Change { at_us, action, from, to, reason: reason.into() })
    }

    /// Makes a saved, sound version the one in shadow; `None` for none.
    ///
    /// # Errors
    /// As [`ModelRegistry::load`], and [`LearnError::File`]; the challenger stays what it was.
    pub fn set_challenger(&self, version: Option<&str>) -> Result<(), LearnError> {
        if let Some(version) = version {
            self.load(version)?;
        }
        let _lock = self.lock()?;
        self.set_alias(CHALLENGER, version)
    }

    /// Notes how far the features have shifted since the champion's training.
    ///
    /// # Errors
    /// [`LearnError::History`], [`LearnError::File`].
    pub fn note_shift(&self, shift: Shift) -> Result<(), LearnError> {
        let _lock = self.lock()?;
        let history = History { shift: Some(shift), ..self.history()? };
        replace(&self.folder.join(history::FILE), history.to_json().as_bytes())
    }

    /// History first: when the process ends in between, going back finds the champion itself on
    /// top and passes over it.
    fn change(&self, mut history: History, change: Change) -> Result<Change, LearnError> {
        history.note(change.clone());
        replace(&self.folder.join(history::FILE), history.to_json().as_bytes())?;
        self.set_alias(CHAMPION, change.to.as_deref())?;
        // What decides is not in shadow, nor what had to go; a damaged alias is mended here.
        let challenger = self.challenger_version();
        let gone = change.from.as_ref().filter(|_| change.action == Action::RolledBack);
        let over = |version: &String| Some(version) == change.to.as_ref() || Some(version) == gone;
        if challenger.map_or(true, |version| version.as_ref().is_some_and(over)) {
            self.set_alias(CHALLENGER, None)?;
        }
        Ok(change)
    }

    fn alias(&self, name: &str) -> Result<Option<String>, LearnError> {
        let path = self.folder.join(name);
        match fs::read(&path) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                let version = text.trim();
                check_version(version).map_err(|_| LearnError::Alias {
                    path,
                    found: version.chars().take(VERSION_LENGTH_MAX).collect(),
                })?;
                Ok(Some(version.to_owned()))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(file_error("read", &path)(error)),
        }
    }

    fn set_alias(&self, name: &str, version: Option<&str>) -> Result<(), LearnError> {
        let path = self.folder.join(name);
        match version {
            Some(version) => replace(&path, format!("{version}\n").as_bytes()),
            None => match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    Err(file_error("remove", &path)(error))
                }
                _ => Ok(()),
            },
        }
    }

    /// For its owner only, and so the data directory above it where that is not there yet.
    fn make_folder(&self) -> Result<(), LearnError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder);
        made.map_err(file_error("make the folder", &self.folder))
    }

    /// Waits for the lock of the aliases; it ends with what is returned.
    fn lock(&self) -> Result<File, LearnError> {
        self.make_folder()?;
        let path = self.folder.join(LOCK);
        let open = File::options().create(true).truncate(false).write(true).open(&path);
        open.and_then(|file| file.lock().map(|()| file)).map_err(file_error("lock", &path))
    }

    fn path_of(&self, version: &str) -> Result<PathBuf, LearnError> {
        check_version(version)?;
        Ok(self.folder.join(format!("{version}.{EXTENSION}")))
    }
}

/// Whether a file holds this model, whichever commit trained it.
fn is_but_for_commit(file: &[u8], model: &ForestModel) -> bool {
    ForestModel::from_json(file).is_ok_and(|mut known| {
        known.card.commit.clone_from(&model.card.commit);
        known == *model
    })
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
pub(super) mod tests {
    use super::*;
    use crate::engine::predict::schema::{FEATURES, schema_hash};
    use crate::engine::predict::{
        FORMAT, FORMAT_VERSION, Head, Interval, ModelCard, ModelError, Ranking, Reference, Trees,
    };

    /// A model of one leaf, which predicts the last value times e to the power of base + 0.1.
    pub(crate) fn model(version: &str, base: f64) -> ForestModel {
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
            ranking: Ranking::FORECAST,
            card: ModelCard::default(),
        }
    }

    #[test]
    fn the_folders_are_for_their_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let data_dir = folder.path().join("node");
        ModelRegistry::new(data_dir.join("models")).save(&model("v1", 1.0)).unwrap();
        for made in [data_dir.clone(), data_dir.join("models")] {
            assert_eq!(
                fs::metadata(&made).unwrap().permissions().mode() & 0o777,
                0o700,
                "{made:?}"
            );
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
        registry.promote("v1-a", 1, "a test").unwrap();
        registry.set_challenger(Some("v2-b")).unwrap();
        assert_eq!(registry.challenger().unwrap(), Some(model("v2-b", 2.0)));
        assert_eq!(registry.resolve("challenger").unwrap(), "v2-b");
        registry.promote("v2-b", 2, "another").unwrap();
        assert_eq!(registry.champion().unwrap(), Some(model("v2-b", 2.0)));
        let listed = registry.list().unwrap();
        let told: Vec<_> = listed.iter().map(|m| (m.version.as_str(), m.champion)).collect();
        assert_eq!(told, [("v1-a", false), ("v2-b", true)]);
        let files = fs::read_dir(registry.folder()).unwrap().count();
        assert_eq!(files, 5, "two versions, alias, history, lock, and nothing half written");
        assert_eq!(registry.challenger_version().unwrap(), None, "it is in use now");
        assert_eq!(registry.resolve("champion").unwrap(), "v2-b");
        assert!(matches!(registry.resolve("challenger"), Err(LearnError::NoAlias(_))));
    }

    #[test]
    fn a_version_never_changes() {
        let folder = tempfile::tempdir().unwrap();
        let registry = ModelRegistry::new(folder.path());
        registry.save(&model("v1", 1.0)).unwrap();
        registry.save(&model("v1", 1.0)).unwrap();
        let taken = registry.save(&model("v1", 2.0));
        assert!(matches!(taken, Err(LearnError::VersionTaken(_))));
        let mut later = model("v1", 1.0);
        later.card.commit = Some("0123456789ab".into());
        registry.save(&later).unwrap();
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
            assert!(refused(registry.promote(name, 1, "").map(|_| ())), "{name}");
            assert!(refused(registry.set_challenger(Some(name))), "{name}");
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
        registry.promote("v1", 1, "").unwrap();
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
        assert!(registry.promote("v1", 2, "").is_err());
        assert!(matches!(registry.promote("v9", 2, ""), Err(LearnError::NoSuchVersion { .. })));
        assert_eq!(registry.champion_version().unwrap().as_deref(), Some("v1"));
        registry.promote("v2", 3, "").unwrap();
        assert_eq!(registry.champion().unwrap(), Some(model("v2", 2.0)));
    }

    /// A registry in which v1 to v4 were champions in turn.
    fn four(folder: &Path) -> ModelRegistry {
        let registry = ModelRegistry::new(folder);
        for (at_us, version) in (1..).zip(["v1", "v2", "v3", "v4"]) {
            registry.save(&model(version, 1.0)).unwrap();
            registry.promote(version, at_us, "a test").unwrap();
        }
        registry
    }

    #[test]
    fn going_back_finds_the_champion_before_until_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let registry = four(folder.path());
        assert_eq!(registry.promote("v4", 9, "").unwrap(), None, "it is already");
        let back = registry.rollback(5, "worse").unwrap();
        assert_eq!((back.from.as_deref(), back.to.as_deref()), (Some("v4"), Some("v3")));
        assert_eq!(registry.champion_version().unwrap().as_deref(), Some("v3"));
        // One that can no longer be used is passed over.
        fs::write(folder.path().join("v2.json"), "damaged").unwrap();
        assert_eq!(registry.rollback(6, "worse").unwrap().to.as_deref(), Some("v1"));
        let last = registry.rollback(7, "worse").unwrap();
        assert_eq!((last.from.as_deref(), last.to), (Some("v1"), None));
        assert_eq!(registry.champion().unwrap(), None);
        let error = registry.rollback(8, "").unwrap_err();
        assert!(matches!(error, LearnError::NoAlias("champion")), "{error}");
        let history = registry.history().unwrap();
        assert_eq!(history.changes.len(), 7);
        assert_eq!((history.changes[6].at_us, history.changes[6].reason.as_str()), (7, "worse"));
    }

    #[test]
    fn what_had_to_go_is_not_gone_back_to_and_not_in_shadow() {
        let folder = tempfile::tempdir().unwrap();
        let registry = four(folder.path());
        registry.set_challenger(Some("v4")).unwrap();
        registry.rollback(5, "worse").unwrap();
        assert_eq!(registry.challenger_version().unwrap(), None);
        registry.promote("v2", 6, "by hand").unwrap();
        assert_eq!(registry.rollback(7, "").unwrap().to.as_deref(), Some("v3"), "not v4");
        // The process ended between history and alias: the champion is on top of the history.
        let mut history = registry.history().unwrap();
        history.previous.push_back("v3".into());
        fs::write(folder.path().join(history::FILE), history.to_json()).unwrap();
        assert_eq!(registry.rollback(8, "").unwrap().to.as_deref(), Some("v2"));
    }

    #[test]
    fn a_damaged_alias_or_history_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let registry = four(folder.path());
        let garbage: [&[u8]; 3] = [b"", b"../../etc/passwd", &[0xff; 300]];
        for bytes in garbage {
            for name in [CHAMPION, CHALLENGER] {
                fs::write(folder.path().join(name), bytes).unwrap();
                let error = match name {
                    CHAMPION => registry.champion().unwrap_err(),
                    _ => registry.challenger().unwrap_err(),
                };
                assert!(matches!(error, LearnError::Alias { .. }), "{error}");
                let path = folder.path().join(name);
                assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            }
            assert!(registry.rollback(8, "").is_err());
            assert!(registry.promote("v3", 9, "mended").unwrap().is_some());
            assert_eq!(registry.champion_version().unwrap().as_deref(), Some("v3"));
            assert_eq!(registry.challenger_version().unwrap(), None);
        }
        let path = folder.path().join(history::FILE);
        for text in ["", "{", "{\"previous\":7}", "{\"previous\":[],\"changes\":[],\"x\":1}"] {
            fs::write(&path, text).unwrap();
            let errors = [
                registry.history().map(|_| ()),
                registry.promote("v2", 9, "").map(|_| ()),
                registry.rollback(9, "").map(|_| ()),
            ];
            for error in errors {
                let error = error.unwrap_err();
                assert!(matches!(error, LearnError::History { .. }), "{error}");
                assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            }
            assert_eq!(registry.champion_version().unwrap().as_deref(), Some("v3"));
        }
    }
}
