"""Values of libraries that cannot be installed beside this one's own requirements: run with an interpreter that has pyDVL 0.10 and OpenDataVal 1.3.

    python tests/peers/make_stored.py

writes `stored.json` beside this file, which the tests read. OpenDataVal pins libraries of 2023; its estimators' own code needs none of them, only its data loaders do, so empty
modules stand in for those that are missing.
"""
import importlib.abc
import importlib.machinery
import json
import sys
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "transformers", "geomloss", "pykeops", "torcheval", "pandera", "typer", "requests"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module):
        pass


sys.meta_path.append(StandIn())


def problem(n: int = 60, m: int = 15, d: int = 5, seed: int = 7):
    "Two classes, some labels wrong. The tests draw the same."
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, n + m)
    x = rng.normal(size=(n + m, d)) + truth[:, None]
    y = np.where(np.arange(n + m) % 6 == 0, 1 - truth, truth)
    return x[:n].astype(np.float32), y[:n], x[n:].astype(np.float32), truth[n:]


def knn_by_pydvl(k):
    from pydvl.valuation import Dataset, KNNShapleyValuation
    from sklearn.neighbors import KNeighborsClassifier

    x, y, x_valid, y_valid = problem()
    return KNNShapleyValuation(KNeighborsClassifier(k), Dataset(x_valid, y_valid), progress=False).fit(Dataset(x, y)).result.values


def knn_by_opendataval(k):
    import torch
    from opendataval.dataval.knnshap.knnshap import KNNShapley

    x, y, x_valid, y_valid = problem()
    one_hot = lambda labels: torch.nn.functional.one_hot(torch.from_numpy(labels), 2).float()
    valuer = KNNShapley(k_neighbors=k)
    valuer.input_data(torch.from_numpy(x), one_hot(y), torch.from_numpy(x_valid), one_hot(y_valid))
    return valuer.train_data_values().evaluate_data_values()


def influence_by_pydvl(theta, ridge):
    "All terms (training rows, trusted rows) for a logistic head; the regularisation is added to the whole diagonal."
    import torch
    from pydvl.influence.torch import DirectInfluence
    from torch.utils.data import DataLoader, TensorDataset

    x, y, x_valid, y_valid = problem()
    model = torch.nn.Linear(x.shape[1], 1, dtype=torch.float64)
    model.load_state_dict({"weight": torch.tensor([theta[:-1]], dtype=torch.float64), "bias": torch.tensor(theta[-1:], dtype=torch.float64)})
    rows, labels, trusted, trusted_labels = (torch.from_numpy(np.asarray(part, np.float64)) for part in (x, y[:, None], x_valid, y_valid[:, None]))
    fitted = DirectInfluence(model, torch.nn.functional.binary_cross_entropy_with_logits, regularization=ridge).fit(DataLoader(TensorDataset(rows, labels), batch_size=len(x)))
    return fitted.influences(trusted, trusted_labels, rows, labels).numpy().T


if __name__ == "__main__":
    theta, ridge = [0.8, 0.5, 0.9, 0.4, 0.7, -1.6], 0.05
    stored = {"versions": {name: version(name) for name in ("pyDVL", "opendataval", "numpy", "torch", "scikit-learn")},
              "knn_shapley": {name: {k: np.asarray(by(k), float).tolist() for k in (1, 5, 10)} for name, by in (("pyDVL", knn_by_pydvl), ("OpenDataVal", knn_by_opendataval))},
              "influence": {"theta": theta, "ridge": ridge, "terms": influence_by_pydvl(theta, ridge).tolist()}}
    Path(__file__).with_name("stored.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
