//! Import: a model that XGBoost trained elsewhere, on the exports of a whole network, becomes a
//! version of the registry.
//!
//! Train on the columns of `route_features` from `hop_count` on, with the label ln(`rtt_ms`). A
//! feature that is not known stands there as [`MISSING`], not as null, and XGBoost has to be told:
//! `missing=-1000000.0`. A base margin of ln(reference) lets the trees predict the distance from
//! it, as our own do; the file does not say so, [`ImportOptions::reference`] has to.
//!
//! A file brings no held-out rows, so that interval and card are measured on what this node has
//! measured itself, when that is enough.
//!
//! [`MISSING`]: crate::engine::predict::schema::MISSING

use std::fs::File;
use std::io::Read;
use std::path::Path;

use polars::prelude::DataFrame;
use sha2::{Digest, Sha256};

use super::conformal::{Scored, conformal};
use super::dataset::{feature_frame, feature_rows};
use super::evaluate::{RTT_MS_MIN, score};
use super::{COVERAGE, ROWS_MIN, TrainConfig};
use super::{HISTORY_LEAD_US, LearnError, ModelRegistry, file_error, frame_error, xgboost};
use crate::engine::measure::ProbeKind;
use crate::engine::predict::schema::{FEATURES, schema_hash};
use crate::engine::predict::{
    FORMAT, FORMAT_VERSION, FeatureVector, ForestModel, Head, Interval, LastValue, ModelCard,
    MovingAverage, QualityModel, Ranking, Reference,
};
use crate::store::{Reader, StoreError};

/// Largest file that is read (bytes): 195 for each of the most nodes that are taken; XGBoost writes
/// 65 for a node of a small tree and about 100 for one of a large tree.
pub const FILE_BYTES_MAX: u64 = 100_000_000;
/// The interval of a model that was not measured, on the ln scale: from a third to three times.
const WIDE: (f64, f64) = (-1.0, 1.0);

/// How to import.
#[derive(Clone, Debug, PartialEq)]
pub struct ImportOptions {
    /// Name of the version; `None` makes one of time and content.
    pub version: Option<String>,
    /// The base margin in training was the logarithm of this; [`Reference::Zero`]: there was none.
    pub reference: Reference,
    /// Time of the import (µs since the epoch).
    pub now_us: u64,
}

/// What came of an import.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The model, already in the registry.
    pub model: ForestModel,
    /// Route probes of this node that it was measured on; 0: not measured.
    pub rows: usize,
}

/// Reads XGBoost's JSON model. Interval and card say that it was not measured.
///
/// Where no base margin was used, XGBoost's `base_score` is part of the forecast; with one,
/// XGBoost leaves it out, and so do we.
///
/// # Errors
/// [`LearnError::Import`] for whatever is not a regression of ln(ms) on our features by numeric
/// splits, [`LearnError::VersionName`].
pub fn import_xgboost(json: &[u8], options: &ImportOptions) -> Result<ForestModel, LearnError> {
    if let Some(version) = &options.version {
        super::registry::check_version(version)?;
    }
    if options.reference == Reference::LinkBandwidth {
        let what = "a latency cannot be predicted from a bandwidth; choose another reference";
        return Err(LearnError::Import(what.into()));
    }
    if json.len() as u64 > FILE_BYTES_MAX {
        return Err(too_large(json.len() as u64));
    }
    let mut file = xgboost::read(json).map_err(LearnError::Import)?;
    let has_margin = options.reference != Reference::Zero;
    file.trees.base = if has_margin { 0.0 } else { file.base_score };
    let digest = Sha256::digest(json);
    let hash: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let version = format!("v{}-{hash}", options.now_us / 1_000);
    let margin = serde_json::to_string(&options.reference).unwrap_or_default();
    let parameters = format!(
        "imported from XGBoost {}: trees={} base margin={}",
        file.version,
        file.trees.roots.len(),
        margin.trim_matches('"'),
    );
    Ok(ForestModel {
        format: FORMAT.into(),
        format_version: FORMAT_VERSION,
        version: options.version.clone().unwrap_or(version),
        schema_hash: schema_hash(),
        feature_names: FEATURES.iter().map(|feature| feature.name.to_owned()).collect(),
        latency: Head {
            target: "ln_route_rtt_ms".into(),
            reference: options.reference,
            trees: file.trees,
            scale: None,
            interval: Interval { coverage: COVERAGE, low: WIDE.0, high: WIDE.1 },
        },
        throughput: None,
        reliability: None,
        ranking: Ranking::FORECAST,
        card: ModelCard {
            created_us: options.now_us,
            parameters,
            commit: Some("imported".into()),
            ..ModelCard::default()
        },
    })
}

/// Sets interval and scores of an imported model by the answered rows of a
/// [`feature_frame`] and returns their number, or leaves it as it is and
/// returns 0 when there are fewer than [`ROWS_MIN`].
///
/// Interval and scores are of the same rows, and whoever trained the model may have had them too:
/// the card says where they come from.
///
/// # Errors
/// [`LearnError::Frame`] when it is another kind of frame.
pub fn measure(model: &mut ForestModel, frame: &DataFrame) -> Result<usize, LearnError> {
    let wrong = frame_error("read the rows to measure on");
    let truths = frame.column("rtt_ms").and_then(|column| column.f64()).map_err(wrong)?;
    let rows: Vec<(f64, FeatureVector)> = truths
        .iter()
        .zip(feature_rows(frame)?)
        .filter_map(|(rtt_ms, features)| {
            MovingAverage.predict(&features)?;
            Some((rtt_ms.filter(|rtt_ms| rtt_ms.is_finite())?.max(RTT_MS_MIN), features))
        })
        .collect();
    if rows.len() < ROWS_MIN {
        return Ok(0);
    }
    let residual = |(truth, row): &(f64, FeatureVector)| Some(truth.ln() - model.latency.ln(row)?);
    let scored = |row| residual(row).map(|residual| Scored { residual, scale: 1.0 });
    let interval = conformal(&rows.iter().filter_map(scored).collect::<Vec<_>>(), COVERAGE);
    let by = |forecaster: &dyn QualityModel| {
        let forecast = |row| forecaster.predict(row).map(|prediction| prediction.latency_ms);
        score(rows.iter().filter_map(|(truth, row)| Some((*truth, forecast(row)?))))
    };
    let scores = (by(model), by(&MovingAverage), by(&LastValue));
    model.latency.interval = interval;
    model.card.rows_test = rows.len();
    (model.card.model, model.card.moving_average, model.card.last_value) = scores;
    model.card.parameters += "; measured on route probes of this node";
    Ok(rows.len())
}

/// Imports a file into the registry, measured on the newest rows of the store when there are
/// enough. The champion stays what it is.
///
/// # Errors
/// [`LearnError`]; nothing is saved then.
pub fn import_file(
    file: &Path,
    store: &Path,
    models_dir: &Path,
    options: &ImportOptions,
) -> Result<Imported, LearnError> {
    let mut model = import_xgboost(&read_bounded(file)?, options)?;
    let rows = match Reader::open(store) {
        Ok(reader) => {
            let from_us = reader.newest_route_probes_since(TrainConfig::default().rows_max)?;
            let from_us = from_us.unwrap_or(0);
            let lead_us = from_us.saturating_sub(HISTORY_LEAD_US);
            let probes = reader.probes(ProbeKind::Route, lead_us)?;
            let few = probes.iter().filter(|probe| probe.rtt_us.is_some()).count() < ROWS_MIN;
            if few {
                0
            } else {
                let states = reader.link_states(lead_us)?;
                measure(&mut model, &feature_frame(&probes, &states, from_us)?)?
            }
        }
        Err(StoreError::Missing(_)) => 0,
        Err(error) => return Err(error.into()),
    };
    if rows == 0 {
        model.card.parameters += "; not measured: this node has too few route probes";
    }
    ModelRegistry::new(models_dir).save(&model)?;
    Ok(Imported { model, rows })
}

fn too_large(bytes: u64) -> LearnError {
    LearnError::Import(format!(
        "it has more than {FILE_BYTES_MAX} bytes ({bytes}); train fewer or smaller trees"
    ))
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, LearnError> {
    let wrong = file_error("read", path);
    let file = File::open(path).map_err(&wrong)?;
    let bytes = file.metadata().map_err(&wrong)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(too_large(bytes));
    }
    let mut json = Vec::new();
    // A pipe has no length; one byte more tells that it is too long.
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut json).map_err(wrong)?;
    Ok(json)
}

#[cfg(test)]
mod tests {
    use polars::prelude::*;
    use serde::Deserialize;
    use serde_json::{Value, json};

    use super::*;
    use crate::engine::predict::NODES_MAX;
    use crate::engine::predict::schema::{MISSING, index_of};

    const MODEL: &str = include_str!("../../tests/data/xgboost.json");
    const PREDICTIONS: &str = include_str!("../../tests/data/xgboost_predictions.json");
    const NAMES: &str = include_str!("../../tests/data/features.txt");

    #[derive(Deserialize)]
    struct Fixture {
        rows: Vec<Vec<Option<f64>>>,
        predictions: Vec<f64>,
        predictions_with_margin: Vec<f64>,
    }

    fn options(reference: Reference) -> ImportOptions {
        ImportOptions { version: None, reference, now_us: 1_800_000_000_000_000 }
    }

    fn rows(fixture: &Fixture) -> Vec<FeatureVector> {
        let row =
            |row: &Vec<Option<f64>>| std::array::from_fn(|index| row[index].unwrap_or(MISSING));
        fixture.rows.iter().map(row).collect()
    }

    /// The fixture's model with one value replaced; `path` as in JSON pointers.
    fn changed(path: &str, value: Value) -> Result<ForestModel, LearnError> {
        let mut model: Value = serde_json::from_str(MODEL).unwrap();
        *model.pointer_mut(path).unwrap_or_else(|| panic!("{path}")) = value;
        import_xgboost(model.to_string().as_bytes(), &options(Reference::Zero))
    }

    fn refusal(result: Result<ForestModel, LearnError>) -> String {
        let error = result.unwrap_err();
        assert!(matches!(error, LearnError::Import(_)), "{error}");
        error.to_string()
    }

    #[test]
    fn the_fixture_names_the_features_of_the_schema() {
        let names: Vec<&str> = NAMES.lines().collect();
        let schema: Vec<&str> = FEATURES.iter().map(|feature| feature.name).collect();
        assert_eq!(names, schema, "write features.txt anew and run make_xgboost_fixture.py");
    }

    #[test]
    fn forecasts_are_those_of_xgboost() {
        let fixture: Fixture = serde_json::from_str(PREDICTIONS).unwrap();
        assert_eq!(fixture.rows.len(), 60);
        assert!(fixture.rows.iter().flatten().filter(|value| value.is_none()).count() > 500);
        for (reference, expected) in [
            (Reference::Zero, &fixture.predictions),
            (Reference::LastValue, &fixture.predictions_with_margin),
        ] {
            let model = import_xgboost(MODEL.as_bytes(), &options(reference)).unwrap();
            assert_eq!(model.latency.trees.roots.len(), 20);
            for (row, expected) in rows(&fixture).iter().zip(expected) {
                let found = model.latency.ln(row).unwrap();
                assert!((found - expected).abs() < 1e-5, "{reference:?}: {found} {expected}");
            }
            assert_eq!(ForestModel::from_json(model.to_json().as_bytes()).unwrap(), model);
        }
    }

    #[test]
    fn an_imported_forecast_can_be_explained() {
        let fixture: Fixture = serde_json::from_str(PREDICTIONS).unwrap();
        let model = import_xgboost(MODEL.as_bytes(), &options(Reference::Zero)).unwrap();
        let trees = &model.latency.trees;
        let file: Value = serde_json::from_str(MODEL).unwrap();
        let first = &file["learner"]["gradient_booster"]["model"]["trees"][0];
        let root = trees.roots[0] as usize;
        assert_eq!(trees.cover[root], first["sum_hessian"][0].as_f64().unwrap());
        let left = first["left_children"][0].as_u64().unwrap() as usize;
        let cover = trees.cover[trees.nodes[root].children[0] as usize];
        assert_eq!(cover, first["sum_hessian"][left].as_f64().unwrap());
        for row in rows(&fixture) {
            let explanation = model.explain(&row).unwrap();
            let forecast = model.latency.ln(&row).unwrap();
            assert!((explanation.expectation + explanation.sum() - forecast).abs() < 1e-9);
        }
    }

    #[test]
    fn anything_else_is_refused_and_named() {
        let tree = "/learner/gradient_booster/model/trees/3";
        for (path, value, said) in [
            ("/learner/objective/name", json!("binary:logistic"), "binary:logistic"),
            ("/learner/gradient_booster/name", json!("dart"), "'dart'"),
            ("/learner/learner_model_param/num_feature", json!("19"), "19 features"),
            ("/learner/learner_model_param/num_target", json!("2"), "several values"),
            ("/learner/learner_model_param/base_score", json!("[1E0,2E0]"), "[1E0,2E0]"),
            ("/learner/learner_model_param/base_score", json!("[NaN]"), "finite"),
            ("/learner/feature_names", json!([]), "does not name its features"),
            ("/learner/feature_names", json!(["a"]), "1 of them named"),
            ("/learner/feature_names/2", json!("strange"), "'strange'"),
            ("/learner/feature_names/2", json!("strange"), FEATURES[2].name),
            ("/learner/attributes", json!({"best_iteration": "12"}), "number 12"),
            ("/version", json!([1, 7, 6]), "1.7.6"),
            ("/learner/gradient_booster/model/trees", json!([]), "root"),
            (&format!("{tree}/split_type/0"), json!(1), "categories"),
            (&format!("{tree}/categories_nodes"), json!([0]), "categories"),
            (&format!("{tree}/left_children/0"), json!(0), "wrong place"),
            (&format!("{tree}/left_children/0"), json!(2), "wrong place"),
            (&format!("{tree}/left_children/0"), json!(99), "wrong place"),
            (&format!("{tree}/left_children/0"), json!(-1), "wrong place"),
            (&format!("{tree}/split_indices/0"), json!(FEATURES.len()), "does not exist"),
            (&format!("{tree}/split_conditions/0"), json!(1e40), "out of range"),
            (&format!("{tree}/sum_hessian"), json!([]), "differ in length"),
            (&format!("{tree}/sum_hessian/0"), json!(-1.0), "negative"),
            (&format!("{tree}/split_indices"), json!("0"), "damaged"),
        ] {
            let text = refusal(changed(path, value));
            assert!(text.contains(said), "{path}: {text}");
        }
        let deep: Vec<i32> = (1..=200).chain([-1]).collect();
        let text = refusal(changed(tree, chain(&deep)));
        assert!(text.contains("deeper"), "{text}");
        let wide = chain(&vec![-1; NODES_MAX + 1]);
        let text = refusal(changed(tree, wide));
        assert!(text.contains("at most 512000"), "{text}");
        let bandwidth = options(Reference::LinkBandwidth);
        refusal(import_xgboost(MODEL.as_bytes(), &bandwidth));
        assert!(changed("/learner/attributes", json!({"best_iteration": "19"})).is_ok());
        assert!(changed("/learner/learner_model_param/base_score", json!("3.5E0")).is_ok());
    }

    /// A tree whose right children these are; the left ones are leaves behind them.
    fn chain(right: &[i32]) -> Value {
        let count = right.len() as i32;
        let leaves = right.iter().filter(|child| **child != -1).count();
        let nodes = right.len() + leaves;
        let mut left: Vec<i32> = Vec::new();
        for child in right {
            left.push(if *child == -1 { -1 } else { count + child - 1 });
        }
        left.resize(nodes, -1);
        let mut right = right.to_vec();
        right.resize(nodes, -1);
        let zeros = vec![0; nodes];
        json!({
            "left_children": left, "right_children": right, "split_indices": zeros,
            "split_conditions": zeros, "split_type": zeros, "default_left": zeros,
            "sum_hessian": zeros,
        })
    }

    #[test]
    fn every_damaged_file_is_refused() {
        for length in (0..MODEL.len()).step_by(97) {
            refusal(import_xgboost(&MODEL.as_bytes()[..length], &options(Reference::Zero)));
        }
        let nested = "[".repeat(100_000);
        refusal(import_xgboost(nested.as_bytes(), &options(Reference::Zero)));
        let bad = ImportOptions { version: Some("../x".into()), ..options(Reference::Zero) };
        let refused = import_xgboost(MODEL.as_bytes(), &bad);
        assert!(matches!(refused, Err(LearnError::VersionName(_))));
    }

    /// Rows of `route_last_ms` and the round trip that came of it.
    fn frame(count: usize, truth: impl Fn(usize, f64) -> Option<f64>) -> DataFrame {
        let last: Vec<f64> = (0..count).map(|index| 10.0 + index as f64).collect();
        let rtts: Vec<Option<f64>> = last.iter().enumerate().map(|(i, l)| truth(i, *l)).collect();
        let mut columns = vec![Column::new("rtt_ms".into(), rtts)];
        for (index, feature) in FEATURES.iter().enumerate() {
            let known = [index_of("route_last_ms"), index_of("route_mean5_ms")];
            let is_known = known.contains(&Some(index));
            let values = if is_known { last.clone() } else { vec![MISSING; count] };
            columns.push(Column::new(feature.name.into(), values));
        }
        DataFrame::new(count, columns).unwrap()
    }

    #[test]
    fn interval_and_card_are_measured_when_there_are_rows() {
        let mut model = import_xgboost(MODEL.as_bytes(), &options(Reference::LastValue)).unwrap();
        let unmeasured = model.clone();
        assert!(!model.card.earns_its_place(), "nobody measured it");
        assert_eq!(measure(&mut model, &frame(99, |_, last| Some(last))).unwrap(), 0);
        assert_eq!(model, unmeasured);
        // Twice the forecast in 92 of 100 cases, the last value's exp(3) in the others; a lost
        // probe has no round trip.
        let forecast = |last: f64| {
            let mut row = [MISSING; FEATURES.len()];
            row[index_of("route_last_ms").unwrap()] = last;
            row[index_of("route_mean5_ms").unwrap()] = last;
            unmeasured.latency.ln(&row).unwrap().exp()
        };
        let rows = frame(220, |index, last| match index {
            0..20 => None,
            _ if index % 25 < 2 => Some(forecast(last) * 3.0_f64.exp()),
            _ => Some(forecast(last) * 2.0),
        });
        assert_eq!(measure(&mut model, &rows).unwrap(), 200);
        let interval = model.latency.interval;
        assert!((interval.low - 2.0_f64.ln()).abs() < 1e-9, "{interval:?}");
        assert!((interval.high - 3.0).abs() < 1e-9, "{interval:?}");
        assert_eq!((model.card.rows_test, model.card.model.accuracy), (200, 0.0));
        assert_eq!(model.latency.trees, unmeasured.latency.trees);
        assert!(measure(&mut model, &DataFrame::empty()).is_err());
    }

    #[test]
    fn a_file_becomes_a_version_without_a_store() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.json");
        std::fs::write(&file, MODEL).unwrap();
        let (store, models) = (folder.path().join("none.db"), folder.path().join("models"));
        let options = ImportOptions { version: Some("fleet-1".into()), ..options(Reference::Zero) };
        let imported = import_file(&file, &store, &models, &options).unwrap();
        assert_eq!((imported.rows, imported.model.version.as_str()), (0, "fleet-1"));
        assert!(imported.model.card.parameters.contains("not measured"));
        assert!(imported.model.card.parameters.contains("XGBoost 3.2.0"));
        let registry = ModelRegistry::new(&models);
        assert_eq!(registry.load("fleet-1").unwrap(), imported.model);
        assert_eq!(registry.champion_version().unwrap(), None);
        let missing = import_file(&folder.path().join("no.json"), &store, &models, &options);
        assert!(matches!(missing, Err(LearnError::File { .. })));
        let large = std::fs::File::create(&file).unwrap();
        large.set_len(FILE_BYTES_MAX + 1).unwrap();
        let large = import_file(&file, &store, &models, &options).map(|found| found.model);
        assert!(refusal(large).contains("more than 100000000 bytes"));
    }
}
