"""Other libraries as estimators of ours: what `tests/peers/estimators.py` registers, and the process that it asks."""
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr

from ecom_importance.benchmark.grid import load_estimators
from ecom_importance.evaluation import roc_auc
from ecom_importance.importance import Evidence, score
from ecom_importance.importance.estimators import ESTIMATORS, PARTS, example_evidence
from ecom_importance.importance.gradient import influence
from ecom_importance.importance.heads import head_at
from ecom_importance.samples import DataError

HERE = Path(__file__).with_name("peers")
INTERPRETER = os.environ.get("ECOM_IMPORTANCE_PEERS")
needs_peers = pytest.mark.skipif(not INTERPRETER, reason="ECOM_IMPORTANCE_PEERS names no interpreter with the peers; `make peers` makes one")
CLEANLAB = ["cleanlab_self_confidence", "cleanlab_confident_learning", "cleanlab_knn_shapley"]
FEW = {"pydvl_data_oob": {"bags": 100}, "pydvl_banzhaf": {"subsets": 100}, "pydvl_tmc_shapley": {"permutations": 3}, "opendataval_data_oob": {"bags": 100},
       "opendataval_dvrl": {"epochs": 100}, "opendataval_influence_subsample": {"models": 300}, "opendataval_ame": {"models": 100}, "opendataval_banzhaf": {"models": 300}}
FINDS_FLIPS = ["pydvl_knn_shapley", "pydvl_influence", "pydvl_data_oob", "opendataval_knn_shapley", "opendataval_data_oob", "opendataval_influence",
               "dattri_influence", "dattri_tracin", "dattri_trak", "cleanlab_self_confidence", "cleanlab_confident_learning"]


@contextmanager
def executed():
    "The file's own names, its estimators registered as long as this lasts."
    before = dict(ESTIMATORS), dict(PARTS)
    names = runpy.run_path(str(HERE / "estimators.py"))
    try:
        yield SimpleNamespace(**names, registered=sorted(set(ESTIMATORS) - set(before[0])))
    finally:
        names["stop_all"]()
        for table, kept in zip((ESTIMATORS, PARTS), before):
            table.clear()
            table.update(kept)


@pytest.fixture(scope="module")
def peers():
    with executed() as names:
        yield names


@pytest.fixture(scope="module")
def problem():
    return example_evidence(80, 24, 8)


@pytest.fixture
def server(tmp_path, peers):
    "The command of a server with functions of its own, run by this very interpreter."
    (tmp_path / "server.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
from serve import serve

def fail(**settings):
    raise KeyError("no such row")

def double(x, times=2):
    print("this would disturb the answers")
    return x * times

def leave():
    print("the last words", file=sys.stderr, flush=True)
    import os
    os._exit(3)

serve({{"double": double, "fail": fail, "leave": leave, "process": lambda: __import__("os").getpid(), "surroundings": lambda: dict(__import__("os").environ), "sleep": lambda: time.sleep(60)}})
""")
    command = (sys.executable, str(tmp_path / "server.py"))
    yield command
    peers.stop_all()


def has_ended(process: int, patience: float = 10.0) -> bool:
    "Whether a process ends soon; one that only waits to be asked about has ended."
    until = time.monotonic() + patience
    while not (ended := _is_gone(process)) and time.monotonic() < until:
        time.sleep(0.05)
    return ended


def _is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# ---- the file

def test_the_file_registers_estimators_of_every_library(peers):
    assert {name.partition("_")[0] for name in peers.registered} == {"pydvl", "opendataval", "dattri", "cleanlab"}
    assert set(FINDS_FLIPS) | set(FEW) | set(CLEANLAB) <= set(peers.registered)
    titles = {"pydvl": "pyDVL", "opendataval": "OpenDataVal", "dattri": "dattri", "cleanlab": "cleanlab"}
    for name in peers.registered:
        chosen = ESTIMATORS[name]
        assert chosen.source.startswith(titles[name.partition("_")[0]] + "; ") and not chosen.additive_over and chosen.takes == {"binary", "graded"}
        assert "igh = " in chosen.function.__doc__, "the docstring says the sign"


def test_the_file_can_be_executed_twice_and_leaves_nothing_else_behind(peers):
    before = dict(ESTIMATORS), dict(PARTS), list(sys.meta_path), list(sys.path)
    with executed() as again:
        assert not again.registered and len(ESTIMATORS) == len(before[0]) and ESTIMATORS["dattri_trak"].function is again.dattri_trak
        assert load_estimators(HERE / "estimators.py") == [name for name in ESTIMATORS if name in peers.registered]
    assert (ESTIMATORS, PARTS, sys.meta_path, sys.path) == before


@pytest.mark.parametrize("named, what", [(None, "is not set"), ("nowhere/python", "which is no program"), (sys.executable, "cannot import pydvl.*pydvl")])
def test_without_the_interpreter_the_error_says_what_to_do(named, what, peers, problem, monkeypatch):
    monkeypatch.delenv("ECOM_IMPORTANCE_PEERS", raising=False)
    if named:
        monkeypatch.setenv("ECOM_IMPORTANCE_PEERS", named)
    evidence, _ = example_evidence(80, 24, 8)
    with pytest.raises(DataError, match=what) as raised:
        score(evidence, "pydvl_knn_shapley", progress=False)
    assert raised.value.expected and "make peers" in raised.value.mend
    peers.stop_all()


@pytest.mark.parametrize("name, least", [("cleanlab_self_confidence", 0.8), ("cleanlab_confident_learning", 0.8), ("cleanlab_knn_shapley", 0.7)])
def test_cleanlab_finds_flips(name, least, peers):
    evidence, wrong = example_evidence(600, 24, 4)
    values = score(evidence, name, progress=False)[name].to_numpy()
    assert roc_auc(wrong.astype(int), -values) > least and not any(library in part for part in evidence.seconds for library in ("pydvl", "opendataval", "dattri"))


def test_gains_are_cut_at_one_half(peers, problem):
    evidence, _ = problem
    graded = Evidence(evidence.train | {"y": np.where(evidence.train["y"] > 0.5, 0.6, 0.4)}, {name.removesuffix("_valid"): column for name, column in evidence.valid.items()})
    np.testing.assert_array_equal(score(graded, CLEANLAB, progress=False), score(evidence, CLEANLAB, progress=False))


# ---- the process

def test_a_request_is_answered_whatever_is_printed(server, peers):
    np.testing.assert_array_equal(peers.ask(server, "double", {"x": np.arange(6.0).reshape(2, 3)[:, ::2]}, times=3), [[0, 6], [9, 15]])


def test_the_process_has_one_thread_and_packages_of_its_own(server, peers, monkeypatch):
    for name in ("PYTHONPATH", "MPLBACKEND"):
        monkeypatch.setenv(name, "module://ours")
    found = peers.ask(server, "surroundings")
    assert found["OMP_NUM_THREADS"] == "1" and not {"PYTHONPATH", "MPLBACKEND"} & set(found)


def test_there_is_one_process_until_it_is_asked_to_end(server, peers):
    process = peers.ask(server, "process")
    assert peers.ask(server, "process") == process != os.getpid()
    peers.stop_all()
    assert has_ended(process, 0) and peers.ask(server, "process") != process


def test_an_exception_comes_back_and_the_process_goes_on(server, peers):
    process = peers.ask(server, "process")
    with pytest.raises(peers.PeerError, match="KeyError: 'no such row'") as raised:
        peers.ask(server, "fail", rows=3)
    assert "in fail" in raised.value.__notes__[0]
    with pytest.raises(peers.PeerError, match="KeyError: 'unknown'"):
        peers.ask(server, "unknown")
    assert peers.ask(server, "process") == process


def test_a_process_that_breaks_down_says_its_last_words_and_is_started_anew(server, peers):
    with pytest.raises(peers.PeerError, match="ended with code 3; it wrote last: .*the last words"):
        peers.ask(server, "leave")
    process = peers.ask(server, "process")
    os.kill(process, signal.SIGKILL)
    assert has_ended(process) and peers.ask(server, "process") != process


def test_an_interrupted_request_leaves_no_answer_behind(server, peers, monkeypatch):
    process = peers.ask(server, "process")
    interrupt = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            peers.ask(server, "sleep")
    finally:
        signal.signal(signal.SIGALRM, interrupt)
    assert has_ended(process) and peers.ask(server, "process") != process


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process in the middle of a computation with its parent")
@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_when_its_parent_is_killed(busy, server, tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", f"""
import runpy, sys
peers = runpy.run_path({str(HERE / "estimators.py")!r})
print(peers["ask"]({server!r}, "process"), flush=True)
if {busy}: peers["ask"]({server!r}, "sleep")
sys.stdin.read()
"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = int(parent.stdout.readline())
    time.sleep(0.2 * busy)
    assert not has_ended(process, 0.1)
    parent.kill()
    parent.communicate()
    assert has_ended(process)


# ---- the libraries

@pytest.fixture(scope="module")
def scores(peers, problem):
    return score(problem[0], peers.registered, settings=FEW, progress=False)


@needs_peers
def test_every_peer_values_every_row(scores, peers, problem):
    evidence, _ = problem
    assert list(scores.columns) == peers.registered and len(scores) == evidence.n and np.isfinite(scores.to_numpy()).all()
    assert (scores.nunique() > 1).all() and {"pydvl_process", "opendataval_process", "dattri_process"} <= set(evidence.seconds)


@needs_peers
@pytest.mark.parametrize("name", FINDS_FLIPS)
def test_peers_find_flips(name, scores, problem):
    assert roc_auc(problem[1].astype(int), -scores[name].to_numpy()) > 0.7


@needs_peers
def test_a_seed_is_a_seed(scores, peers, problem):
    drawn = [name for name in peers.registered if "seed" in ESTIMATORS[name].need.settings]
    again = score(problem[0], drawn, settings=FEW, progress=False)
    np.testing.assert_array_equal(again, scores[drawn])
    bagged = ["pydvl_data_oob", "opendataval_data_oob"]
    other = score(problem[0], [*bagged, "dattri_trak", "dattri_tracin"], settings={name: FEW[name] for name in bagged}, seed=1, progress=False)
    assert not (other == scores[other.columns]).all().any()


@needs_peers
@pytest.mark.parametrize("peer", ["pydvl_knn_shapley", "opendataval_knn_shapley"])
@pytest.mark.parametrize("k", [1, 10])
def test_knn_shapley_is_ours(peer, k, peers, problem):
    both = score(problem[0], ["knn_shapley", peer], settings={"knn_shapley": {"k": k}, peer: {"k": k}}, progress=False)
    np.testing.assert_allclose(both[peer], both["knn_shapley"], atol=1e-6)
    assert spearmanr(both[peer], both["knn_shapley"])[0] > 0.999


@needs_peers
@pytest.mark.parametrize("peer", ["pydvl_influence", "dattri_influence"])
def test_influence_is_ours_of_the_same_head(peer, scores, peers, problem):
    from sklearn.linear_model import LogisticRegression

    evidence, _ = problem
    x, y, x_valid, y_valid = (np.asarray(column, float) for column in (evidence.train["x"], evidence.train["y"], evidence.valid["x_valid"], evidence.valid["y_valid"]))
    x, x_valid = x / peers.length(x), x_valid / peers.length(x)
    theirs = LogisticRegression().fit(x.astype(np.float32), y)
    head = head_at(x, np.r_[theirs.coef_[0], theirs.intercept_].astype(float), ridge=1e-6)
    ours = influence(x, head.predict(x), y, x_valid, head.predict(x_valid) - y_valid, head, damping=0.01 - 1e-6) / len(x_valid)
    np.testing.assert_allclose(scores[peer], ours, rtol=1e-3, atol=1e-3 * np.abs(ours).max())


@needs_peers
def test_one_class_alone_is_refused(peers, problem):
    evidence, _ = problem
    alone = Evidence(evidence.train | {"y": np.ones(evidence.n)}, {name.removesuffix("_valid"): column for name, column in evidence.valid.items()})
    with pytest.raises(DataError, match="one side of ½"):
        score(alone, "dattri_trak", progress=False)
