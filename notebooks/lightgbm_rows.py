#!/usr/bin/env python3
"""LightGBM on exactly the rows that meshwise was trained on in a replay, and both losses.

    meshwise replay --trace FILE --seeds 5 --out DIR
    notebooks/lightgbm_rows.py DIR...

`training_rows.parquet` holds, for each seed, the rows of one training with the part that each had in it,
and what our latency head forecast. LightGBM is fitted on the rows marked `fit`, for the same target
(distance of ln ms from the same reference), with as many trees of the same depth, and stops early by the
rows marked `calibrate`, which ours chooses by, too. Both are compared on the rows marked `test`, of all
seeds together, by the same two losses: root mean squared and mean absolute error of ln(ms). Several
objectives are fitted, because none is best for both losses; a ratio below 1 is in our favour. Needs
notebooks/requirements.txt.
"""

import sys
from pathlib import Path

import lightgbm
import numpy as np
import polars as pl

OBJECTIVES = {
    "L2": {"objective": "regression"},
    "L1": {"objective": "regression_l1"},
    "Huber": {"objective": "huber", "alpha": 0.1},
    "its own defaults": {
        "objective": "regression", "max_depth": -1, "num_leaves": 31, "min_child_samples": 20,
        "bagging_fraction": 1.0,
    },
}
# The size of our trees; the weight of each and the share of rows are ours too.
OPTIONS = {
    "max_depth": 4, "num_leaves": 16, "learning_rate": 0.1, "min_child_samples": 5,
    "bagging_fraction": 0.5, "bagging_freq": 1, "deterministic": True, "num_threads": 1, "verbosity": -1,
}
TREES = 100
KEYS = {"seed", "split", "sent_us", "done_us", "truth_ln", "reference_ln", "forecast_ln"}


def fitted(rows, objective, seed):
    """LightGBM's forecasts (ln ms) of the test rows of one seed."""
    features = [name for name in rows.columns if name not in KEYS]

    def part(name):
        of = rows.filter(pl.col("split") == name)
        target = (of["truth_ln"] - of["reference_ln"]).to_numpy()
        # Our mark for what is not known; LightGBM has its own.
        matrix = of.select(features).to_numpy().copy()
        matrix[matrix == -1_000_000.0] = np.nan
        return of, matrix, target

    (_, fit, target), (_, held, held_target), (test, unseen, _) = map(part, ("fit", "calibrate", "test"))
    data = lightgbm.Dataset(fit, target)
    booster = lightgbm.train(
        OPTIONS | objective | {"seed": seed}, data, TREES,
        valid_sets=[lightgbm.Dataset(held, held_target, reference=data)],
        callbacks=[lightgbm.early_stopping(20, verbose=False)],
    )
    return test["reference_ln"].to_numpy() + booster.predict(unseen)


def losses(error):
    return float(np.sqrt(np.mean(error**2))), float(np.mean(np.abs(error)))


def compare(folder):
    rows = pl.read_parquet(folder / "training_rows.parquet")
    seeds = rows["seed"].unique(maintain_order=True).to_list()
    test = rows.filter(pl.col("split") == "test")
    truth = test["truth_ln"].to_numpy()
    ours = losses(test["forecast_ln"].to_numpy() - truth)
    print(f"{folder}: {len(seeds)} seeds, {len(rows)} rows, {len(test)} to test on; losses in ln(ms)")
    print(f"  {'':24}{'RMSE':>9}{'ours /':>9}{'MAE':>9}{'ours /':>9}")
    print(f"  {'meshwise':24}{ours[0]:9.5f}{'':9}{ours[1]:9.5f}")
    contestants = {"reference alone": test["reference_ln"].to_numpy()}
    for name, objective in OBJECTIVES.items():
        of_seed = [fitted(rows.filter(pl.col("seed") == seed), objective, seed) for seed in seeds]
        contestants[f"LightGBM, {name}"] = np.concatenate(of_seed)
    best = [np.inf, np.inf]
    for name, forecast in contestants.items():
        rmse, mae = losses(forecast - truth)
        print(f"  {name:24}{rmse:9.5f}{ours[0] / rmse:9.3f}{mae:9.5f}{ours[1] / mae:9.3f}")
        if name.startswith("LightGBM"):
            best = [min(best[0], rmse), min(best[1], mae)]
    print(f"  ratio to LightGBM's best: RMSE {ours[0] / best[0]:.3f}, MAE {ours[1] / best[1]:.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    for argument in sys.argv[1:]:
        compare(Path(argument))
