//! The rules of the tree, read from the sources.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn sources(under: &str) -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    walk(&root.join(under), &mut found);
    assert!(!found.is_empty());
    found
}

/// Every `crate::NAME` and `meshwise::NAME` in a text, comments left out; braces too.
fn imports(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code: String = code.flat_map(|line| [line.trim(), " "]).collect();
    {
        for part in code.split("crate::").skip(1) {
            let list = part.strip_prefix('{').unwrap_or(part);
            let ends = |c: char| !(c.is_alphanumeric() || c == '_');
            if part.starts_with('{') {
                let inner = list.split('}').next().unwrap_or_default();
                names.extend(
                    inner.split(',').map(|n| n.trim().split("::").next().unwrap().to_owned()),
                );
            } else {
                names.push(list.split(ends).next().unwrap_or_default().to_owned());
            }
        }
    }
    names
}

/// Which modules of ours each layer may use. A layer not named may be used by nobody below it.
fn allowed() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("engine", &[][..]),
        ("sim", &["engine"]),
        ("config", &["engine"]),
        ("store", &["engine"]),
        ("learn", &["engine", "store"]),
        ("net", &["engine", "config"]),
        ("node", &["engine", "store", "learn", "net", "config"]),
        ("api", &["engine", "node", "store", "learn", "config"]),
        ("replay", &["engine", "store", "learn"]),
        ("cli", &["engine", "store", "learn", "node", "api", "config", "sim", "replay"]),
    ])
}

#[test]
fn no_import_points_up() {
    let allowed = allowed();
    let mut wrong = Vec::new();
    for (path, text) in sources("src") {
        let inside = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
        let layer = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if layer == "lib" || layer == "main" {
            continue;
        }
        let may = allowed.get(layer).unwrap_or_else(|| panic!("{layer} is no known layer"));
        for name in imports(&text) {
            if name != layer && allowed.contains_key(name.as_str()) && !may.contains(&name.as_str())
            {
                wrong.push(format!("{} uses {name}", inside.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "imports that point up:\n{}", wrong.join("\n"));
}

#[test]
fn each_library_stays_in_its_layer() {
    let owners = [
        ("futures_rustls", "net"),
        ("libp2p", "net"),
        ("libp2p_stream", "net"),
        ("libp2p_tls", "net"),
        ("quinn", "net"),
        ("quinn_proto", "net"),
        ("linfa", "learn"),
        ("linfa_trees", "learn"),
        ("rusqlite", "store"),
        ("polars", "learn"),
        ("smartcore", "learn"),
    ];
    for (path, text) in sources("src") {
        for (library, owner) in owners {
            let uses = text
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .any(|line| line.contains(&format!("{library}::")));
            let at_home = path.iter().any(|part| part.to_str() == Some(owner));
            assert!(
                !uses || at_home,
                "{} uses {library}, which only {owner} knows",
                path.display()
            );
        }
    }
}

#[test]
fn the_import_reader_sees_what_it_should() {
    let text = "use crate::net::x;\n// use crate::no::y;\nuse crate::{api, node::Z};\nuse crate::{\n    sim,\n};\nlet a = crate::cli::b();";
    assert_eq!(imports(text), ["net", "api", "node", "sim", "", "cli"]);
}

#[test]
fn nothing_is_left_undone_in_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts = sources("src");
    for name in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"] {
        texts.push((root.join(name), fs::read_to_string(root.join(name)).unwrap()));
    }
    for (path, text) in texts {
        for word in ["todo!(", "unimplemented!(", "TODO", "FIXME", "BUILD_FIGURES", "BUILD_TIME"] {
            assert!(!text.contains(word), "{} contains {word}", path.display());
        }
    }
}

#[test]
fn notebooks_hold_no_outputs() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("notebooks");
    let mut cells = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "ipynb") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let notebook: serde_json::Value = serde_json::from_str(&text).unwrap();
        for cell in notebook["cells"].as_array().unwrap() {
            if cell["cell_type"] == "code" {
                cells += 1;
                let clean = cell["outputs"].as_array().unwrap().is_empty();
                assert!(clean && cell["execution_count"].is_null(), "{}", path.display());
            }
        }
    }
    assert!(cells > 0);
}
