"""Writes trace.parquet: a small mesh whose links have levels, noise, outliers and losses.

One link in five is three times slower than the way over some relay. Seeded: the same file again.
Needs numpy 2 and polars 2.
"""

from pathlib import Path

import numpy as np
import polars as pl

random = np.random.default_rng(1)
NODES, ROUNDS, EVERY_S = 12, 60, 60.0
places = random.uniform(0, 100, (NODES, 2))
slow = random.random((NODES, NODES)) < 0.2
rows = []
for round_ in range(ROUNDS):
    for src in range(NODES):
        for dst in range(NODES):
            if src == dst:
                continue
            level = 5 + np.hypot(*(places[src] - places[dst])) * (3 if slow[src, dst] else 1)
            rtt = level * random.lognormal(0, 0.05)
            rtt = rtt * 8 if random.random() < 0.01 else rtt
            lost = random.random() < 0.01
            rows.append((round_ * EVERY_S, f"n{src:02}", f"n{dst:02}", None if lost else rtt))
frame = pl.DataFrame(rows, schema=["t_s", "src", "dst", "rtt_ms"], orient="row")
frame = frame.with_columns(pl.col("rtt_ms").cast(pl.Float32).round(2))
frame.write_parquet(Path(__file__).parent / "trace.parquet", compression="zstd")
