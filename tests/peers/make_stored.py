"""Values of libraries that cannot be installed beside this one's own requirements: run with an interpreter that has pyDVL 0.10 and OpenDataVal 1.3.

    python tests/peers/make_stored.py

writes `stored.json` beside this file, which the tests read.
"""
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np


def problem(n: int = 60, m: int = 15, d: int = 5, seed: int = 7):
    "Two classes, some labels wrong. The tests draw the same."
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, n + m)
    x = rng.normal(size=(n + m, d)) + truth[:, None]
    y = np.where(np.arange(n + m) % 6 == 0, 1 - truth, truth)
    return x[:n].astype(np.float32), y[:n], x[n:].astype(np.float32), truth[n:]


def made_by(name: str, **settings) -> list:
    "Values of the problem's rows by one library."
    from libraries import value

    return value(name, *problem(), **settings).tolist()


def influence_by_pydvl(theta: list, ridge: float) -> list:
    from libraries import Rows, linear_at, pydvl_influence_terms

    return pydvl_influence_terms(Rows(*problem()), linear_at(np.array(theta), "float64"), ridge).tolist()


if __name__ == "__main__":
    theta, ridge = [0.8, 0.5, 0.9, 0.4, 0.7, -1.6], 0.05
    stored = {"versions": {name: version(name) for name in ("pyDVL", "opendataval", "numpy", "torch", "scikit-learn")},
              "knn_shapley": {name: {k: made_by(f"{name.lower()}_knn_shapley", k=k) for k in (1, 5, 10)} for name in ("pyDVL", "OpenDataVal")},
              "influence": {"theta": theta, "ridge": ridge, "terms": influence_by_pydvl(theta, ridge)}}
    Path(__file__).with_name("stored.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
