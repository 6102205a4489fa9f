#!/usr/bin/env python3
"""LightGBM on exactly the rows that meshwise was trained on in a replay, and both losses.

    meshwise replay --trace FILE --seeds 5 --out DIR
    notebooks/lightgbm_rows.py DIR...

`training_rows.parquet` holds, for each seed, the rows of one training with the part that each had in it,
and what our latency head forecast. LightGBM is fitted on the rows marked `fit`, for the same target
(distance of ln ms from the same reference), with as many trees of the same depth, and stops early by the
rows marked `calibrate`, which ours chooses by, too. Both are compared on the rows marked `test`, of all
seeds together, in ln(ms), by three losses: root mean squared error, mean absolute error, and Huber's loss,
which our trees are fitted for, with the range that they had. LightGBM is fitted for each of the three, and
for the squared error with its own defaults. What is fitted for one loss is worse by the others: each asks
for another number, the mean, the median or something between. So the ratio that counts is that of Huber's
loss; the others show how far a fit for another loss would get. Below 1 is in our favour. Needs
notebooks/requirements.txt.
"""

import sys
from pathlib import Path

import lightgbm
import numpy as np
import polars as pl

OBJECTIVES = {
    "squared": {"objective": "regression"},
    "absolute": {"objective": "regression_l1"},
    "Huber": {"objective": "huber"},
    "squared, its defaults": {
        "objective": "regression", "max_depth": -1, "num_leaves": 31, "min_child_samples": 20,
        "bagging_fraction": 1.0,
    },
}
# Least and most range of our Huber loss, which is the median distance from the reference (src/learn/head.rs).
RANGE = (0.35, 0.7)
# The size of our trees; the weight of each and the share of rows are ours too.
OPTIONS = {
    "max_depth": 4, "num_leaves": 16, "learning_rate": 0.1, "min_child_samples": 5,
    "bagging_fraction": 0.5, "bagging_freq": 1, "deterministic": True, "num_threads": 1, "verbosity": -1,
}
TREES = 100
KEYS = {"seed", "split", "sent_us", "done_us", "truth_ln", "reference_ln", "forecast_ln"}


def parts(rows):
    """Features, target and rows of each part."""
    features = [name for name in rows.columns if name not in KEYS]

    def part(name):
        of = rows.filter(pl.col("split") == name)
        # Our mark for what is not known; LightGBM has its own.
        matrix = of.select(features).to_numpy().copy()
        matrix[matrix == -1_000_000.0] = np.nan
        return matrix, (of["truth_ln"] - of["reference_ln"]).to_numpy(), of

    return {name: part(name) for name in ("fit", "calibrate", "test")}


def fitted(parts, objective, seed):
    """LightGBM's forecasts (ln ms) of the test rows of one seed."""
    (matrix, target, _), (held, held_target, _) = parts["fit"], parts["calibrate"]
    data = lightgbm.Dataset(matrix, target)
    booster = lightgbm.train(
        OPTIONS | objective | {"seed": seed}, data, TREES,
        valid_sets=[lightgbm.Dataset(held, held_target, reference=data)],
        callbacks=[lightgbm.early_stopping(20, verbose=False)],
    )
    unseen, _, test = parts["test"]
    return test["reference_ln"].to_numpy() + booster.predict(unseen)


def losses(error, clip):
    """Root mean squared, mean absolute, and mean Huber error; `clip` is the range of the last, of each row."""
    size = np.abs(error)
    huber = np.where(size < clip, size**2 / 2, clip * (size - clip / 2))
    return float(np.sqrt(np.mean(error**2))), float(np.mean(size)), float(np.mean(huber))


def compare(folder):
    rows = pl.read_parquet(folder / "training_rows.parquet")
    seeds = rows["seed"].unique(maintain_order=True).to_list()
    of_seed = {seed: parts(rows.filter(pl.col("seed") == seed)) for seed in seeds}
    test = pl.concat([of["test"][2] for of in of_seed.values()])
    clips = {seed: float(np.clip(np.median(np.abs(of["fit"][1])), *RANGE)) for seed, of in of_seed.items()}
    clip = np.concatenate([np.full(len(of["test"][1]), clips[seed]) for seed, of in of_seed.items()])
    forecasts = {
        "meshwise": test["forecast_ln"].to_numpy(), "reference alone": test["reference_ln"].to_numpy(),
    }
    for name, objective in OBJECTIVES.items():
        ranged = lambda seed: objective | ({"alpha": clips[seed]} if name == "Huber" else {})
        forecasts[f"LightGBM, {name}"] = np.concatenate(
            [fitted(of, ranged(seed), seed) for seed, of in of_seed.items()]
        )
    truth = test["truth_ln"].to_numpy()
    found = {name: losses(forecast - truth, clip) for name, forecast in forecasts.items()}
    ours = found["meshwise"]
    print(f"{folder}: {len(seeds)} seeds, {len(rows)} rows, {len(test)} to test on; ln(ms), and ours divided by it")
    print(f"  {'':32}" + "".join(f"{of:>11}{'ratio':>7}" for of in ("RMSE", "MAE", "Huber")))
    for name, its in found.items():
        cells = (f"{loss:11.6f}{own / loss:7.3f}" for own, loss in zip(ours, its))
        print(f"  {name:32}" + "".join(cells))
    best = [min(its[loss] for name, its in found.items() if name.startswith("LightGBM")) for loss in range(3)]
    print(f"  {'the best LightGBM by this loss':32}" + "".join(f"{b:11.6f}{o / b:7.3f}" for o, b in zip(ours, best)))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    for argument in sys.argv[1:]:
        compare(Path(argument))
