"""Other libraries' own data valuation, called alike: arrays of classes 0 and 1 in, a value a training row out. Runs where those libraries are, not where ours is.

A library is imported when it is first asked for. OpenDataVal pins libraries of 2023; its estimators' own code needs none of them but geomloss, only its data loaders do, so empty
modules stand in for those that are missing. Where a method retrains a model, that is scikit-learn's logistic regression as it comes.
"""
import importlib
import importlib.abc
import importlib.machinery
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import MagicMock

import numpy as np

UNNEEDED = ("torchvision", "transformers", "geomloss", "pykeops", "torcheval", "pandera", "typer", "requests")
BATCH = 4096  # rows of which dattri keeps every gradient at a time


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in UNNEEDED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module):
        pass


@contextmanager
def stand_ins() -> Iterator[None]:
    "Empty modules for what cannot be imported, as long as this lasts: the next library must not take them for the real ones."
    finder = StandIn()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, MagicMock)]:
            del sys.modules[name]


def import_pydvl() -> None:
    import pydvl.influence.torch
    import pydvl.valuation  # noqa: F401


def import_opendataval() -> None:
    with stand_ins():
        import opendataval.dataval
        import opendataval.model  # noqa: F401


def import_dattri() -> None:
    for name in ("task", "algorithm.influence_function", "algorithm.tracin", "algorithm.trak"):
        importlib.import_module(f"dattri.{name}")


LIBRARIES = {"pydvl": import_pydvl, "opendataval": import_opendataval, "dattri": import_dattri}


def load(library: str) -> None:
    "Import one library, and keep it to one thread."
    import torch

    torch.set_num_threads(1)
    LIBRARIES[library]()
    importlib.import_module("torch._dynamo")  # seconds long, and else imported at the first gradient of a function, in the middle of a computation


@dataclass(frozen=True)
class Rows:
    "What every method is given."

    x: np.ndarray  # (N, d) float32
    y: np.ndarray  # (N,) int64, 0 or 1
    x_valid: np.ndarray  # (M, d)
    y_valid: np.ndarray  # (M,)

    def tensors(self, dtype="float32") -> list:
        "The same for a head with one output: labels as columns of numbers."
        import torch

        return [torch.from_numpy(np.asarray(part, dtype)) for part in (self.x, self.y[:, None], self.x_valid, self.y_valid[:, None])]

    def one_hot(self) -> list:
        "The same for OpenDataVal."
        import torch

        y, y_valid = (torch.nn.functional.one_hot(torch.from_numpy(labels), 2).float() for labels in (self.y, self.y_valid))
        return [torch.from_numpy(self.x), y, torch.from_numpy(self.x_valid), y_valid]


METHODS: dict[str, Callable] = {}  # name → function of rows, seed and settings → (N,) values


def method(function: Callable) -> Callable:
    METHODS[function.__name__] = function
    return function


def value(name: str, x: np.ndarray, y: np.ndarray, x_valid: np.ndarray, y_valid: np.ndarray, *, seed: int = 0, **settings) -> np.ndarray:
    "Values by one method; whatever draws from a global generator draws the same again."
    import torch

    load(name.partition("_")[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return np.asarray(METHODS[name](Rows(x, y, x_valid, y_valid), seed=seed, **settings), float)


# ---- pyDVL

def _datasets(rows: Rows) -> list:
    from pydvl.valuation import Dataset

    return [Dataset(rows.x, rows.y), Dataset(rows.x_valid, rows.y_valid)]


def _utility(rows: Rows):
    "The accuracy on the trusted rows of a logistic regression; without two classes there is none, and it counts as the larger class's share."
    from pydvl.valuation import ModelUtility, SupervisedScorer
    from sklearn.linear_model import LogisticRegression

    default = max(rows.y_valid.mean(), 1 - rows.y_valid.mean())
    return ModelUtility(LogisticRegression(), SupervisedScorer("accuracy", _datasets(rows)[1], default=float(default), range=(0, 1)), show_warnings=False)


@method
def pydvl_knn_shapley(rows: Rows, *, seed: int, k: int) -> np.ndarray:
    from pydvl.valuation import KNNShapleyValuation
    from sklearn.neighbors import KNeighborsClassifier

    train, valid = _datasets(rows)
    return KNNShapleyValuation(KNeighborsClassifier(k), valid, progress=False).fit(train).result.values


@method
def pydvl_data_oob(rows: Rows, *, seed: int, bags: int) -> np.ndarray:
    from pydvl.valuation.methods.data_oob import DataOOBValuation
    from sklearn.ensemble import BaggingClassifier
    from sklearn.linear_model import LogisticRegression

    bagged = BaggingClassifier(LogisticRegression(), n_estimators=bags, random_state=seed).fit(rows.x, rows.y)
    return DataOOBValuation(bagged).fit(_datasets(rows)[0]).result.values


@method
def pydvl_tmc_shapley(rows: Rows, *, seed: int, permutations: int) -> np.ndarray:
    from pydvl.valuation import MinUpdates, TMCShapleyValuation

    return TMCShapleyValuation(_utility(rows), is_done=MinUpdates(permutations), seed=seed, show_warnings=False).fit(_datasets(rows)[0]).result.values


@method
def pydvl_banzhaf(rows: Rows, *, seed: int, subsets: int) -> np.ndarray:
    from pydvl.valuation import MaxSamples, MSRBanzhafValuation, NoStopping

    valuation = MSRBanzhafValuation(_utility(rows), is_done=NoStopping(), seed=seed, show_warnings=False)
    valuation.is_done = MaxSamples(valuation.sampler, subsets)
    return valuation.fit(_datasets(rows)[0]).result.values


@method
def pydvl_loo(rows: Rows, *, seed: int) -> np.ndarray:
    from pydvl.valuation import LOOValuation

    return LOOValuation(_utility(rows), progress=False).fit(_datasets(rows)[0]).result.values


def pydvl_influence_terms(rows: Rows, model, regularization: float) -> np.ndarray:
    "All terms (training rows, trusted rows) for a logistic head; the regularisation is added to the whole diagonal."
    import torch
    from pydvl.influence.torch import DirectInfluence
    from torch.utils.data import DataLoader, TensorDataset

    x, y, x_valid, y_valid = rows.tensors("float64")
    fitted = DirectInfluence(model, torch.nn.functional.binary_cross_entropy_with_logits, regularization=regularization).fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    return fitted.influences(x_valid, y_valid, x, y).numpy().T


@method
def pydvl_influence(rows: Rows, *, seed: int, regularization: float) -> np.ndarray:
    return pydvl_influence_terms(rows, fit_linear(rows, dtype="float64"), regularization).mean(axis=1)


# ---- OpenDataVal

def _opendataval(evaluator, rows: Rows, model=None, **training) -> np.ndarray:
    "Any of its evaluators, from the rows to the values."
    from opendataval.metrics import accuracy

    if model is not None:
        evaluator.input_model_metric(model, accuracy)
    return evaluator.input_data(*rows.one_hot()).train_data_values(**training).evaluate_data_values()


def _logistic_model():
    from opendataval.model.api import ClassifierSkLearnWrapper
    from sklearn.linear_model import LogisticRegression

    return ClassifierSkLearnWrapper(LogisticRegression, 2)


@method
def opendataval_knn_shapley(rows: Rows, *, seed: int, k: int) -> np.ndarray:
    from opendataval.dataval.knnshap.knnshap import KNNShapley

    return _opendataval(KNNShapley(k_neighbors=k, random_state=seed), rows)


@method
def opendataval_data_oob(rows: Rows, *, seed: int, bags: int) -> np.ndarray:
    from opendataval.dataval.oob.oob import DataOob

    return _opendataval(DataOob(num_models=bags, random_state=seed), rows, _logistic_model())


@method
def opendataval_lava(rows: Rows, *, seed: int) -> np.ndarray:
    from opendataval.dataval.lava import otdd
    from opendataval.dataval.lava.lava import LavaEvaluator

    if isinstance(otdd.geomloss, MagicMock):
        raise ModuleNotFoundError("OpenDataVal's LAVA computes with geomloss, which is not installed there: pip install geomloss==0.2.6")
    return _opendataval(LavaEvaluator(random_state=seed), rows)


@method
def opendataval_dvrl(rows: Rows, *, seed: int, epochs: int) -> np.ndarray:
    from opendataval.dataval.dvrl.dvrl import DVRL

    return _opendataval(DVRL(rl_epochs=epochs, random_state=seed), rows, _logistic_model())


@method
def opendataval_influence_subsample(rows: Rows, *, seed: int, models: int) -> np.ndarray:
    from opendataval.dataval.influence.infsub import InfluenceSubsample

    return _opendataval(InfluenceSubsample(num_models=models, random_state=seed), rows, _logistic_model())


@method
def opendataval_influence(rows: Rows, *, seed: int, epochs: int) -> np.ndarray:
    from opendataval.dataval.influence.influence import InfluenceFunction
    from opendataval.model.logistic_regression import LogisticRegression

    return _opendataval(InfluenceFunction(), rows, LogisticRegression(rows.x.shape[1], 2), epochs=epochs)


@method
def opendataval_ame(rows: Rows, *, seed: int, models: int) -> np.ndarray:
    from opendataval.dataval.ame.ame import AME

    return _opendataval(AME(num_models=models, random_state=np.random.RandomState(seed)), rows, _logistic_model())


@method
def opendataval_banzhaf(rows: Rows, *, seed: int, models: int) -> np.ndarray:
    from opendataval.dataval.margcontrib.banzhaf import DataBanzhaf

    return _opendataval(DataBanzhaf(num_models=models, random_state=seed), rows, _logistic_model())


# ---- dattri, and the heads that it and pyDVL explain

def linear_at(theta: np.ndarray, dtype: str = "float32"):
    "A head with one output at given weights, the intercept last."
    import torch

    model = torch.nn.Linear(len(theta) - 1, 1, dtype=getattr(torch, dtype))
    model.load_state_dict({"weight": torch.from_numpy(np.asarray(theta[None, :-1], dtype)), "bias": torch.from_numpy(np.asarray(theta[-1:], dtype))})
    return model


def fit_linear(rows: Rows, chosen=slice(None), dtype: str = "float32"):
    "The head that scikit-learn's logistic regression finds."
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression().fit(rows.x[chosen], rows.y[chosen])
    return linear_at(np.r_[found.coef_[0], found.intercept_], dtype)


def descend(rows: Rows, *, seed: int, epochs: int, rate: float, batch: int, kept: int) -> list[dict]:
    "Checkpoints of a head by plain gradient descent, evenly spread over the epochs."
    import torch

    x, y, *_ = rows.tensors()
    model, order = linear_at(np.zeros(x.shape[1] + 1)), torch.Generator().manual_seed(seed)
    optimiser, checkpoints = torch.optim.SGD(model.parameters(), lr=rate), []
    for epoch in range(1, epochs + 1):
        for some in torch.randperm(len(x), generator=order).split(batch):
            optimiser.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(model(x[some]), y[some]).backward()
            optimiser.step()
        if epoch * kept // epochs > (epoch - 1) * kept // epochs:
            checkpoints.append({name: part.clone() for name, part in model.state_dict().items()})
    return checkpoints


def _loaders(rows: Rows, batch: int) -> list:
    from torch.utils.data import DataLoader, TensorDataset

    x, y, x_valid, y_valid = rows.tensors()
    return [DataLoader(TensorDataset(*pair), batch_size=batch) for pair in ((x, y), (x_valid, y_valid))]


def _logits(model, parameters, data) -> tuple:
    "dattri asks for one row at a time, with and without a first axis."
    import torch

    rows, targets = data
    rows, targets = (rows.unsqueeze(0), targets.unsqueeze(0)) if rows.ndim == 1 else (rows, targets)
    return torch.func.functional_call(model, parameters, rows), targets


def _task(model, checkpoints: list, margin: bool = False):
    "The log loss to be attributed; or the margin, the log odds of the given label."
    import torch
    from dattri.task import AttributionTask

    def log_loss(parameters, data):
        return torch.nn.functional.binary_cross_entropy_with_logits(*_logits(model, parameters, data))

    def log_odds(parameters, data):
        logits, targets = _logits(model, parameters, data)
        return ((2 * targets - 1) * logits).mean()

    return AttributionTask(loss_func=log_odds if margin else log_loss, model=model, checkpoints=checkpoints)


@method
def dattri_influence(rows: Rows, *, seed: int, regularization: float) -> np.ndarray:
    from dattri.algorithm.influence_function import IFAttributorExplicit

    model = fit_linear(rows)
    valuer = IFAttributorExplicit(_task(model, [model.state_dict()]), regularization=regularization)
    train, valid = _loaders(rows, max(len(rows.x), len(rows.x_valid)))  # it adds up the solutions of batches, which is not the solution of all
    valuer.cache(train)
    return valuer.attribute(train, valid).detach().numpy().mean(axis=1)


@method
def dattri_tracin(rows: Rows, *, seed: int, epochs: int, rate: float, batch: int, checkpoints: int) -> np.ndarray:
    import torch
    from dattri.algorithm.tracin import TracInAttributor

    kept = descend(rows, seed=seed, epochs=epochs, rate=rate, batch=batch, kept=checkpoints)
    valuer = TracInAttributor(_task(linear_at(np.zeros(rows.x.shape[1] + 1)), kept), weight_list=torch.full((len(kept),), rate), normalized_grad=False)
    valuer.projector_kwargs = None  # without this it projects to 512 dimensions
    return valuer.attribute(*_loaders(rows, BATCH)).detach().numpy().mean(axis=1)


@method
def dattri_trak(rows: Rows, *, seed: int, heads: int, dimensions: int) -> np.ndarray:
    import torch
    from dattri.algorithm.trak import TRAKAttributor

    halves = [np.random.default_rng([seed, head]).permutation(len(rows.x))[: len(rows.x) // 2] for head in range(heads)]
    models = [fit_linear(rows, half) for half in halves]

    def probability(parameters, data):
        logits, targets = _logits(models[0], parameters, data)
        return torch.sigmoid((2 * targets - 1) * logits).squeeze()

    # More dimensions than the gradients have, or half the rows, would leave it a matrix without an inverse.
    projector = {"proj_dim": min(dimensions, rows.x.shape[1] + 1, len(rows.x) // 2), "proj_seed": seed % 2**31, "device": "cpu"}
    valuer = TRAKAttributor(_task(models[0], [model.state_dict() for model in models], margin=True), correct_probability_func=probability, projector_kwargs=projector)
    train, valid = _loaders(rows, BATCH)
    return valuer.attribute(valid, train).detach().numpy().mean(axis=1)
