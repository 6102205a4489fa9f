//! The configuration file that documents all settings: their defaults, each below what its docstring says.

use documented::DocumentedFields;

use super::{
    Config, EmulationConfig, EntryConfig, LearningConfig, NetworkConfig, ProbingConfig,
    RelayConfig, RoutingConfig, StorageConfig,
};

/// What a docstring says of a setting; of a section with an empty `section`.
fn docs(section: &str, name: &str) -> Option<&'static str> {
    let docs = match section {
        "" => Config::get_field_docs(name),
        "network" => NetworkConfig::get_field_docs(name),
        "entry" => EntryConfig::get_field_docs(name),
        "routing" => RoutingConfig::get_field_docs(name),
        "relay" => RelayConfig::get_field_docs(name),
        "probing" => ProbingConfig::get_field_docs(name),
        "learning" => LearningConfig::get_field_docs(name),
        "storage" => StorageConfig::get_field_docs(name),
        "emulation" => EmulationConfig::get_field_docs(name),
        _ => return None,
    };
    docs.ok()
}

/// All settings with their defaults.
pub(super) fn template() -> String {
    let bare = toml::to_string(&Config::default()).expect("settings are numbers, text and lists");
    let (mut section, mut text) = ("", String::new());
    for line in bare.lines() {
        let begins = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let said = match (begins, line.split_once(" = ")) {
            (Some(name), _) => {
                section = name;
                docs("", name)
            }
            (None, Some((name, _))) => docs(section, name),
            (None, None) => None,
        };
        for comment in said.into_iter().flat_map(str::lines) {
            text += &format!("# {comment}\n");
        }
        text += line;
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_the_default_and_says_what_each_setting_is() {
        let template = template();
        assert_eq!(Config::parse(&template, "template").unwrap(), Config::default());
        let lines: Vec<&str> = template.lines().collect();
        for (before, line) in lines.iter().zip(&lines[1..]) {
            let is_setting =
                line.starts_with('[') || line.contains(" = ") && !line.starts_with('#');
            assert!(!is_setting || before.starts_with("# "), "nothing is said of {line}");
        }
        assert!(
            template.contains("# Oldest measurement kept (days), 1 or more.\nmax_age_days = 30")
        );
    }
}
