"""Other libraries' own data valuation as estimators, to stand beside ours: pyDVL, OpenDataVal and dattri, each computing in its own environment, and cleanlab, which lives in ours.

Executing this file registers them. The interpreter that has the first three is named by the environment variable ECOM_IMPORTANCE_PEERS (`make peers` makes one); one process of
it is started when first needed, answers over pipes (`serve.py`), and ends with this one. Starting it and importing a library is a part of the evidence (`pydvl_process`, …), so
that an estimator's own seconds are those of its computation, of carrying its arrays over, and of fitting whatever models the method wants.

The peers know classes only: gains are cut at ½. Their vectors are divided by the training rows' root mean square length, since the penalty that scikit-learn adds by itself means
nothing without a scale; distances keep their order. Every method retrains or explains scikit-learn's logistic regression as it comes, but `dattri_tracin` and
`opendataval_influence`, which need a descent. Everything has one thread. Numbers of draws are the library's own where that takes less than a minute for 2,000 rows of 384 dimensions
on one core; else the docstring names the library's.
"""
import atexit
import os
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import numpy as np

from ecom_importance.importance.estimators import Array, estimator, part
from ecom_importance.samples import DataError

VARIABLE = "ECOM_IMPORTANCE_PEERS"
SERVER = Path(__file__).with_name("serve.py")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
OWN = ("PYTHONPATH", "PYTHONHOME", "MPLBACKEND")  # of this environment: they would bring its packages, and a notebook's way to draw, into the other
SHOWN = 2000  # characters of what a process wrote before it broke down

# ---- the process of the peers


@dataclass(frozen=True)
class Child:
    "A running process that answers requests."

    process: subprocess.Popen
    requests: Connection
    answers: Connection
    errors: IO[bytes]  # what it writes beside its answers


class PeerError(RuntimeError):
    "What went wrong in the peers' process, in the library's words; its traceback is a note."


_children: dict[tuple, Child] = {}  # a process that was forked from this one has none of its own yet
_one_at_a_time = threading.RLock()


def start(command: list[str]) -> Child:
    "Start a server: the command, and this process's number, with which it ends."
    environment = {name: told for name, told in os.environ.items() if name not in OWN} | dict.fromkeys(THREADS, "1")
    errors = tempfile.TemporaryFile()
    process = subprocess.Popen([*command, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment)
    child = Child(process, Connection(os.dup(process.stdin.fileno()), readable=False), Connection(os.dup(process.stdout.fileno()), writable=False), errors)
    process.stdin.close()
    process.stdout.close()
    return child


def stop(child: Child, patience: float = 5.0) -> None:
    "Close the pipe, at which a server ends by itself unless it is in the middle of something."
    child.requests.close()
    try:
        child.process.wait(patience)
    except subprocess.TimeoutExpired:
        child.process.kill()
        child.process.wait()
    child.answers.close()
    child.errors.close()


def running(command: tuple[str, ...]) -> Child:
    "The one process of a command; a new one when it has ended."
    key = (os.getpid(), *command)
    if key in _children and _children[key].process.poll() is not None:
        stop(_children.pop(key))
    if key not in _children:
        _children[key] = start(list(command))
    return _children[key]


@atexit.register
def stop_all() -> None:
    for key in [key for key in _children if key[0] == os.getpid()]:
        stop(_children.pop(key), patience=0.5)


def ask(command: tuple[str, ...], what: str, arrays: Mapping[str, Array] | None = None, **settings):
    "What a function of the server returns; `PeerError` with the library's message where it fails, or where the process breaks down."
    packed = {key: (array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes()) for key, array in (arrays or {}).items()}
    with _one_at_a_time:
        child = running(command)
        try:
            child.requests.send((what, packed, settings))
            kind, *answer = child.answers.recv()
        except BaseException as failure:  # an interrupted request's answer must not be taken for the next one's
            raise _give_up(command, child, failure) from None
    if kind == "values":
        return answer[0]
    error = PeerError(answer[0])
    error.add_note(answer[1])
    raise error


def _give_up(command: tuple[str, ...], child: Child, failure: BaseException) -> BaseException:
    "End a process that cannot be asked any more; what to raise."
    _children.pop((os.getpid(), *command), None)
    broken = isinstance(failure, (EOFError, OSError))
    if not broken:
        child.process.kill()
    code = child.process.wait()
    child.errors.seek(0)
    said = child.errors.read().decode(errors="replace")[-SHOWN:].strip()
    stop(child)
    return PeerError(f"the peers' process ended with code {code}" + (f"; it wrote last: {said}" if said else "")) if broken else failure


def interpreter() -> str:
    "The interpreter of the peers, as the environment names it."
    found, mend = os.environ.get(VARIABLE, ""), f"`make peers` makes the environment; set {VARIABLE} to its bin/python"
    if not found:
        raise DataError(f"the environment variable {VARIABLE} is not set, so pyDVL, OpenDataVal and dattri cannot be asked", expected="an interpreter that has them", mend=mend)
    if not os.access(found, os.X_OK) or Path(found).is_dir():
        raise DataError(f"{VARIABLE} names {found!r}, which is no program", expected="the path of an interpreter that has pyDVL, OpenDataVal and dattri", mend=mend)
    return found


def process_with(library: str) -> tuple[str, ...]:
    "The command of the running process, once that has imported a library."
    command = (interpreter(), str(SERVER))
    try:
        ask(command, "load", library=library)
    except PeerError as error:
        raise DataError(f"the interpreter that {VARIABLE} names cannot import {library}: {error}", expected="an environment with all of tests/peers/requirements.txt",
                        mend="make it anew by `make peers`") from error
    return command


@part(along=None)
def pydvl_process() -> tuple[str, ...]:
    "The command of the peers' process, with pyDVL imported."
    return process_with("pydvl")


@part(along=None)
def opendataval_process() -> tuple[str, ...]:
    "The command of the peers' process, with OpenDataVal imported."
    return process_with("opendataval")


@part(along=None)
def dattri_process() -> tuple[str, ...]:
    "The command of the peers' process, with dattri imported."
    return process_with("dattri")


def classes(y: Array) -> Array:
    "Gains cut at ½."
    return (np.asarray(y) >= 0.5).astype(np.int64)


def length(x: Array) -> float:
    "Root mean square length of some vectors."
    return float(np.sqrt(np.mean(np.einsum("ij,ij->i", x, x, dtype=float)))) or 1.0


def value(command: tuple[str, ...], name: str, x: Array, y: Array, x_valid: Array, y_valid: Array, **settings) -> Array:
    "One method's values of the training rows, as the library gives them."
    unit = length(x)
    arrays = {"x": np.asarray(x / unit, np.float32), "y": classes(y), "x_valid": np.asarray(x_valid / unit, np.float32), "y_valid": classes(y_valid)}
    if len(np.unique(arrays["y"])) < 2:
        raise DataError("all training gains are on one side of ½", column="gain", expected="both classes: the peers know no others", mend="leave the peers out here")
    return np.array(ask(command, "value", arrays, name=name, **settings), float)


# ---- pyDVL

K = 10  # neighbours that vote, as in our own
BAGS = 1000  # as in OpenDataVal
DAMPING = 0.01  # in pyDVL's and dattri's examples


@estimator(family="shapley", source="pyDVL; Jia et al. 2019, arXiv:1908.08619", sign="high = its label helps its trusted neighbours", cost="O(N M d + M N log N)")
def pydvl_knn_shapley(x: Array, y: Array, x_valid: Array, y_valid: Array, pydvl_process: tuple[str, ...], *, k: int = K) -> Array:
    "KNNShapleyValuation. Sign as in the library: high = helpful."
    return value(pydvl_process, "pydvl_knn_shapley", x, y, x_valid, y_valid, k=k)


@estimator(family="gradient", source="pyDVL; Koh & Liang 2017, arXiv:1703.04730", sign="high = counting it more would lower the trusted loss", cost="O(N d² + d³ + N M d)")
def pydvl_influence(x: Array, y: Array, x_valid: Array, y_valid: Array, pydvl_process: tuple[str, ...], *, regularization: float = DAMPING) -> Array:
    "DirectInfluence of a logistic head, mean over the trusted rows. Sign as in the library's `influences`: high = helpful."
    return value(pydvl_process, "pydvl_influence", x, y, x_valid, y_valid, regularization=regularization)


@estimator(family="learned", source="pyDVL; Kwon & Zou 2023, arXiv:2304.07718", sign="high = label agrees with the bags that left the row out", cost="O(bags · fit)")
def pydvl_data_oob(x: Array, y: Array, x_valid: Array, y_valid: Array, pydvl_process: tuple[str, ...], *, bags: int = BAGS, seed: int = 0) -> Array:
    "DataOOBValuation of a BaggingClassifier. Sign as in the library: high = helpful."
    return value(pydvl_process, "pydvl_data_oob", x, y, x_valid, y_valid, bags=bags, seed=seed)


@estimator(family="shapley", source="pyDVL; Ghorbani & Zou 2019, arXiv:1904.02868", sign="high = adds to the trusted accuracy", cost="O(permutations · N · fit)")
def pydvl_tmc_shapley(x: Array, y: Array, x_valid: Array, y_valid: Array, pydvl_process: tuple[str, ...], *, permutations: int = 15, seed: int = 0) -> Array:
    "TMCShapleyValuation with its own truncation and a few permutations; its own rule goes on until 100 of them agree. Sign as in the library: high = helpful."
    return value(pydvl_process, "pydvl_tmc_shapley", x, y, x_valid, y_valid, permutations=permutations, seed=seed)


@estimator(family="shapley", source="pyDVL; Wang & Jia 2023, arXiv:2205.15466", sign="high = subsets with it have the higher trusted accuracy", cost="O(subsets · fit)")
def pydvl_banzhaf(x: Array, y: Array, x_valid: Array, y_valid: Array, pydvl_process: tuple[str, ...], *, subsets: int = 50, seed: int = 0) -> Array:
    "MSRBanzhafValuation. Sign as in the library: high = helpful."
    return value(pydvl_process, "pydvl_banzhaf", x, y, x_valid, y_valid, subsets=subsets, seed=seed)


@estimator(family="shapley", source="pyDVL; Cook 1977, doi:10.2307/1268249", sign="high = without it the trusted accuracy falls", cost="O(N · fit)")
def pydvl_loo(x: Array, y: Array, x_valid: Array, y_valid: Array, pydvl_process: tuple[str, ...]) -> Array:
    "LOOValuation: the accuracy lost by leaving the row out. Sign as in the library: high = helpful."
    return value(pydvl_process, "pydvl_loo", x, y, x_valid, y_valid)


# ---- OpenDataVal


@estimator(family="shapley", source="OpenDataVal; Jia et al. 2019, arXiv:1908.08619", sign="high = its label helps its trusted neighbours", cost="O(N M d + M N log N)")
def opendataval_knn_shapley(x: Array, y: Array, x_valid: Array, y_valid: Array, opendataval_process: tuple[str, ...], *, k: int = K) -> Array:
    "KNNShapley. Sign as in the library: high = helpful."
    return value(opendataval_process, "opendataval_knn_shapley", x, y, x_valid, y_valid, k=k)


@estimator(family="learned", source="OpenDataVal; Kwon & Zou 2023, arXiv:2304.07718", sign="high = label agrees with the bags that left the row out", cost="O(bags · (fit + N))")
def opendataval_data_oob(x: Array, y: Array, x_valid: Array, y_valid: Array, opendataval_process: tuple[str, ...], *, bags: int = BAGS, seed: int = 0) -> Array:
    "DataOob. Sign as in the library: high = helpful."
    return value(opendataval_process, "opendataval_data_oob", x, y, x_valid, y_valid, bags=bags, seed=seed)


@estimator(family="shapley", source="OpenDataVal; Just et al. 2023, arXiv:2305.00054", sign="high = brings the training rows nearer to the trusted ones", about="",
           cost="O(rounds · (N² + N M) d)")
def opendataval_lava(x: Array, y: Array, x_valid: Array, y_valid: Array, opendataval_process: tuple[str, ...], *, seed: int = 0) -> Array:
    "LavaEvaluator, without an embedding of its own. Sign as in the library, which turns the gradient round: high = helpful."
    return value(opendataval_process, "opendataval_lava", x, y, x_valid, y_valid, seed=seed)


@estimator(family="shapley", source="OpenDataVal; Yoon, Arik & Pfister 2020, arXiv:1909.11671", sign="high = the selector learned to keep such rows",
           cost="O(epochs · fit of 32 rows)")
def opendataval_dvrl(x: Array, y: Array, x_valid: Array, y_valid: Array, opendataval_process: tuple[str, ...], *, epochs: int = 1000, seed: int = 0) -> Array:
    "DVRL with its own settings. Sign as in the library: high = helpful."
    return value(opendataval_process, "opendataval_dvrl", x, y, x_valid, y_valid, epochs=epochs, seed=seed)


@estimator(family="shapley", source="OpenDataVal; Feldman & Zhang 2020, arXiv:2008.03703", sign="high = subsets with it have the higher trusted accuracy", cost="O(models · fit)")
def opendataval_influence_subsample(x: Array, y: Array, x_valid: Array, y_valid: Array, opendataval_process: tuple[str, ...], *, models: int = 1000, seed: int = 0) -> Array:
    "InfluenceSubsample, subsets of 70 %. Sign as in the library: high = helpful."
    return value(opendataval_process, "opendataval_influence_subsample", x, y, x_valid, y_valid, models=models, seed=seed)


@estimator(family="gradient", source="OpenDataVal; Koh & Liang 2017, arXiv:1703.04730", sign="high = its gradient agrees with the trusted rows'", cost="O(epochs · N d + N M d)")
def opendataval_influence(x: Array, y: Array, x_valid: Array, y_valid: Array, opendataval_process: tuple[str, ...], *, epochs: int = 10, seed: int = 0) -> Array:
    "InfluenceFunction, which is without a Hessian, of its torch LogisticRegression (one epoch by itself). Sign as in the library: high = helpful."
    return value(opendataval_process, "opendataval_influence", x, y, x_valid, y_valid, epochs=epochs, seed=seed)


@estimator(family="shapley", source="OpenDataVal; Lin et al. 2022, arXiv:2206.10013", sign="high = subsets with it have the higher trusted accuracy",
           cost="O(models · fit + lasso of N)")
def opendataval_ame(x: Array, y: Array, x_valid: Array, y_valid: Array, opendataval_process: tuple[str, ...], *, models: int = 200, seed: int = 0) -> Array:
    "AME, so many models for each of its four shares (1,000 by itself). Sign as in the library: high = helpful; its lasso gives most rows exactly 0."
    return value(opendataval_process, "opendataval_ame", x, y, x_valid, y_valid, models=models, seed=seed)


@estimator(family="shapley", source="OpenDataVal; Wang & Jia 2023, arXiv:2205.15466", sign="high = subsets with it have the higher trusted accuracy", cost="O(models · fit)")
def opendataval_banzhaf(x: Array, y: Array, x_valid: Array, y_valid: Array, opendataval_process: tuple[str, ...], *, models: int = 1000, seed: int = 0) -> Array:
    "DataBanzhaf. Sign as in the library: high = helpful."
    return value(opendataval_process, "opendataval_banzhaf", x, y, x_valid, y_valid, models=models, seed=seed)


# ---- dattri

EPOCHS, RATE, BATCH, CHECKPOINTS = 10, 0.1, 32, 5  # of the descent that TracIn looks back on
HEADS, DIMENSIONS = 5, 256  # of TRAK: heads of random halves; the library projects to 512, more than a head of 384 dimensions has weights


@estimator(family="gradient", source="dattri; Koh & Liang 2017, arXiv:1703.04730", sign="high = counting it more would lower the trusted loss", cost="O(N d² + d³ + N M d)")
def dattri_influence(x: Array, y: Array, x_valid: Array, y_valid: Array, dattri_process: tuple[str, ...], *, regularization: float = DAMPING) -> Array:
    "IFAttributorExplicit of a logistic head, all rows in one batch, mean over the trusted rows. Sign as in the library with the loss as target: high = helpful."
    return value(dattri_process, "dattri_influence", x, y, x_valid, y_valid, regularization=regularization)


@estimator(family="gradient", source="dattri; Pruthi et al. 2020, arXiv:2002.08484", sign="high = training on it lowered the trusted loss",
           cost="O(epochs · N d + checkpoints · N M d)")
def dattri_tracin(x: Array, y: Array, x_valid: Array, y_valid: Array, dattri_process: tuple[str, ...], *, epochs: int = EPOCHS, rate: float = RATE, batch: int = BATCH,
                  checkpoints: int = CHECKPOINTS, seed: int = 0) -> Array:
    "TracInAttributor without a projection, mean over the trusted rows. Sign as in the library with the loss as target: high = helpful."
    return value(dattri_process, "dattri_tracin", x, y, x_valid, y_valid, epochs=epochs, rate=rate, batch=batch, checkpoints=checkpoints, seed=seed)


@estimator(family="gradient", source="dattri; Park et al. 2023, arXiv:2303.14186", sign="high = counting it more raises the trusted rows' margins",
           cost="O(heads · (fit + N d k + N k² + N M k))")
def dattri_trak(x: Array, y: Array, x_valid: Array, y_valid: Array, dattri_process: tuple[str, ...], *, heads: int = HEADS, dimensions: int = DIMENSIONS, seed: int = 0) -> Array:
    "TRAKAttributor of the margin, mean over the trusted rows. Sign as in the library with the margin as target: high = helpful."
    return value(dattri_process, "dattri_trak", x, y, x_valid, y_valid, heads=heads, dimensions=dimensions, seed=seed)


# ---- cleanlab, in this process

FOLDS = 5


@part(along=None)
def cleanlab_functions() -> SimpleNamespace:
    "What is used of cleanlab and scikit-learn, imported."
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")  # raised by an import of cleanlab's, of no concern here
        from cleanlab.data_valuation import data_shapley_knn
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    return SimpleNamespace(**locals())


def out_of_fold(x: Array, labels: Array, seed: int, use: SimpleNamespace) -> Array:
    "(N, 2) probabilities by scikit-learn, as cleanlab's manual advises."
    folds = use.StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return use.cross_val_predict(use.LogisticRegression(), np.asarray(x) / length(x), labels, cv=folds, method="predict_proba")


@estimator(family="learned", source="cleanlab; Northcutt et al. 2021, arXiv:1911.00068", sign="high = label agrees with the other folds", cost="O(folds · fit)")
def cleanlab_self_confidence(x: Array, y: Array, cleanlab_functions: SimpleNamespace, *, seed: int = 0) -> Array:
    "get_label_quality_scores of out-of-fold probabilities. Sign as in the library: high = the label is probably right."
    labels = classes(y)
    return cleanlab_functions.get_label_quality_scores(labels, out_of_fold(x, labels, seed, cleanlab_functions), method="self_confidence")


@estimator(family="learned", source="cleanlab; Northcutt et al. 2021, arXiv:1911.00068", sign="high = label agrees with the other folds; below 0 = found to be an issue",
           cost="O(folds · fit)")
def cleanlab_confident_learning(x: Array, y: Array, cleanlab_functions: SimpleNamespace, *, seed: int = 0) -> Array:
    "find_label_issues: its issues come last (1 is taken off), and self-confidence orders both groups. High = the label is probably right."
    labels = classes(y)
    told = out_of_fold(x, labels, seed, cleanlab_functions)
    return cleanlab_functions.get_label_quality_scores(labels, told, method="self_confidence") - cleanlab_functions.find_label_issues(labels, told, n_jobs=1)


@estimator(family="shapley", source="cleanlab; Jia et al. 2019, arXiv:1908.08619", sign="high = its label helps its neighbours among the training rows",
           cost="O(N² d + N k), and N² numbers of memory")
def cleanlab_knn_shapley(x: Array, y: Array, cleanlab_functions: SimpleNamespace, *, k: int = K) -> Array:
    "data_shapley_knn: the training rows are their own trusted rows, near by the cosine, and only the k nearest have a value. Sign as in the library: high = helpful."
    return cleanlab_functions.data_shapley_knn(classes(y), features=np.asarray(x), k=k)
