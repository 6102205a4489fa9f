//! The settings of a node from their file, and what is wrong with it in words that name the place.

use std::path::{Path, PathBuf};

use crate::config::{Config, ConfigError};
use crate::node::NodeOptions;

/// Reads a file of settings; without one, all are as usual.
pub(super) fn load(path: Option<&Path>) -> anyhow::Result<Config> {
    let Some(path) = path else { return Ok(Config::default()) };
    let file = path.display();
    let read = std::fs::read_to_string(path);
    let text = read.map_err(|error| ConfigError::Read { path: file.to_string(), error })?;
    let config = match Config::parse(&text, &file.to_string()) {
        Ok(config) => config,
        Err(ConfigError::Parse { error, .. }) => {
            let line = error.span().and_then(|span| text.get(..span.start));
            let line = line.map_or(1, |before| before.matches('\n').count() + 1);
            anyhow::bail!("{file} line {line}: {}", error.message());
        }
        Err(error) => anyhow::bail!("{file}: {error}"),
    };
    // Each list by itself, so that the one that is wrong has its name.
    let without = |lists: fn(&mut Config)| {
        let mut config = config.clone();
        lists(&mut config);
        NodeOptions { config, data_dir: PathBuf::new(), trainer: None }.check()
    };
    for (key, checked) in [
        ("network.listen", without(|config| config.network.bootstrap.clear())),
        ("network.bootstrap", without(|config| config.network.listen.clear())),
    ] {
        if let Err(error) = checked {
            anyhow::bail!("{file}: {key}: {error}");
        }
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said_with_file_and_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("c.toml");
        for (text, words) in [
            ("[relay]\nrate = 0\n\n[entry]\nsock = ''\n", "c.toml line 5: unknown field `sock`"),
            ("[relay]\nrate = = 1\n", "c.toml line 2: "),
            ("[relay]\nrate = 1\n", "c.toml: the setting relay.rate is 1"),
            ("[network]\nlisten = ['x']\n", "c.toml: network.listen: 'x' is not a multiaddress"),
            ("[network]\nbootstrap = ['x']\n", "c.toml: network.bootstrap: 'x'"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = load(Some(&file)).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        assert!(load(Some(&folder.path().join("none"))).unwrap_err().to_string().contains("none"));
        assert_eq!(load(None).unwrap(), Config::default());
    }
}
