"""Makes xgboost.json and xgboost_predictions.json beside this file, for the tests of import.

Run with xgboost 3.2.0 and numpy 2.4 (`pip install xgboost-cpu==3.2.0 numpy`):

    python tests/data/make_xgboost_fixture.py

features.txt holds the feature names in the order of the schema, one a line; when the schema
changes, a test says so, and both have to be made again.

The predictions are of rows that the model has not seen: half of them drawn, half of them with one
feature set to a threshold of the model or to the 64-bit numbers next to where XGBoost's rounding to
32 bits changes the side. null stands for a value that is not known.
"""

import json
import pathlib

import numpy as np
import xgboost

HERE = pathlib.Path(__file__).parent
MISSING = -1_000_000.0
NAMES = (HERE / "features.txt").read_text().split()
AT = {name: index for index, name in enumerate(NAMES)}
KNOWN = ["hop_count", "coordinate_sum_ms", "hour_sin", "hour_cos"]


def draw(random, count):
    rows = random.uniform(0.0, 100.0, (count, len(NAMES)))
    rows[:, AT["hop_count"]] = random.integers(1, 5, count)
    rows[:, AT["hour_sin"]] = random.uniform(-1.0, 1.0, count)
    rows[:, AT["hour_cos"]] = random.uniform(-1.0, 1.0, count)
    rows[:, AT["route_residual_ms"]] -= 50.0
    rows = rows.round(2)
    unknown = random.random(rows.shape) < 0.3
    unknown[:, [AT[name] for name in KNOWN]] = False
    rows[unknown] = MISSING
    return rows


def ln_last_value(rows):
    """The reference `last-value`: the first of these that is known."""
    columns = [AT[name] for name in ("route_last_ms", "link_last_sum_ms", "coordinate_sum_ms")]
    first = [next(row[column] for column in columns if row[column] > 0.0) for row in rows]
    return np.log(first)


def ln_rtt(random, rows):
    known = np.where(rows == MISSING, 50.0, rows)
    busy = known[:, AT["link_utilisation_max"]] > 60.0
    return (
        ln_last_value(rows)
        + np.where(busy, 0.7, -0.1)
        + 0.004 * known[:, AT["route_residual_ms"]]
        + np.where(rows[:, AT["link_loss"]] == MISSING, 0.3, 0.0)
        + 0.2 * known[:, AT["hour_sin"]]
        + random.normal(0.0, 0.05, len(rows))
    )


def matrix(rows, **more):
    return xgboost.DMatrix(rows, missing=MISSING, feature_names=NAMES, **more)


def edges(random, model, rows):
    """Sets one feature of each row to, or next to, where a threshold of the model lies."""
    for row in rows:
        tree = random.choice(model["learner"]["gradient_booster"]["model"]["trees"])
        splits = [node for node, left in enumerate(tree["left_children"]) if left != -1]
        node = random.choice(splits)
        threshold = np.float32(tree["split_conditions"][node])
        below = np.nextafter(threshold, np.float32(-np.inf))
        middle = (np.float64(below) + np.float64(threshold)) / 2.0
        choices = [below, threshold, middle, *np.nextafter(middle, [-np.inf, np.inf])]
        row[tree["split_indices"][node]] = random.choice(np.array(choices, dtype=np.float64))
    return rows


def main():
    assert xgboost.__version__ == "3.2.0", xgboost.__version__
    random = np.random.default_rng(20)
    rows = draw(random, 4_000)
    labelled = matrix(rows, label=ln_rtt(random, rows))
    parameters = {
        "objective": "reg:squarederror",
        "max_depth": 4,
        "eta": 0.3,
        "subsample": 0.8,
        "tree_method": "hist",
        "nthread": 1,
        "seed": 0,
    }
    booster = xgboost.train(parameters, labelled, num_boost_round=20)
    booster.save_model(HERE / "xgboost.json")
    model = json.loads((HERE / "xgboost.json").read_text())
    test = np.concatenate([draw(random, 30), edges(random, model, draw(random, 30))])
    margin = ln_last_value(test)
    fixture = {
        "xgboost": xgboost.__version__,
        "rows": [[None if value == MISSING else value for value in row] for row in test.tolist()],
        "predictions": booster.predict(matrix(test)).tolist(),
        "predictions_with_margin": booster.predict(matrix(test, base_margin=margin)).tolist(),
    }
    (HERE / "xgboost_predictions.json").write_text(json.dumps(fixture) + "\n")


main()
