"""Other libraries' values, stored because they cannot be installed beside this one; `tests/peers/make_stored.py` made them."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from ecom_importance.importance import Evidence, score
from ecom_importance.importance.gradient import influence, influence_terms
from ecom_importance.importance.heads import head_at
from ecom_importance.importance.shapley import knn_shapley
from ecom_importance.samples import DataError

HERE = Path(__file__).with_name("peers")
STORED = json.loads((HERE / "stored.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def problem():
    "The script's own problem, so that both sides value the same rows."
    spec = importlib.util.spec_from_file_location("make_stored", HERE / "make_stored.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.problem()


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("peer", ["pyDVL", "OpenDataVal"])
def test_knn_shapley_equals_theirs(peer, k, problem):
    x, y, x_valid, y_valid = problem
    ours = knn_shapley(x, y.astype(float), np.arange(len(x), dtype=np.uint32), x_valid, y_valid.astype(float), k=k) / len(x_valid)
    theirs = np.array(STORED["knn_shapley"][peer][str(k)])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.ptp(theirs) > 0.02


def test_knn_shapley_through_score_is_the_same_mean(problem):
    x, y, x_valid, y_valid = problem
    made = Evidence({"sample_id": np.arange(60), "query_id": np.arange(60), "x": x, "y": y.astype(float)}, {"sample_id": np.arange(15), "query_id": np.arange(15), "x": x_valid, "y": y_valid.astype(float)})
    np.testing.assert_allclose(score(made, "knn_shapley", settings={"knn_shapley": {"k": 5}})["knn_shapley"], STORED["knn_shapley"]["pyDVL"]["5"], atol=1e-6)


def test_influence_equals_pydvl(problem):
    "Theirs regularises the whole diagonal; ours has a tiny ridge and the rest as damping."
    x, y, x_valid, y_valid = (np.asarray(part, float) for part in problem)
    theta, ridge, theirs = np.array(STORED["influence"]["theta"]), STORED["influence"]["ridge"], np.array(STORED["influence"]["terms"])
    head = head_at(x, theta, ridge=1e-6)
    own, trusted = head.predict(x) - y, head.predict(x_valid) - y_valid
    terms = np.concatenate(list(influence_terms(x, own, x_valid, trusted, head, damping=ridge - 1e-6)))
    np.testing.assert_allclose(terms, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())
    np.testing.assert_allclose(influence(x, head.predict(x), y, x_valid, trusted, head, damping=ridge - 1e-6), theirs.sum(axis=1), rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("theta, what", [([1.0, 2.0], r"weights of shape \(2,\)"), ([np.nan] * 6, "0 of them finite")])
def test_weights_that_do_not_fit_are_refused(theta, what, problem):
    with pytest.raises(DataError, match=what):
        head_at(problem[0], theta, ridge=0.1)


def test_a_head_from_elsewhere_is_the_one_that_is_explained(problem):
    from sklearn.linear_model import LogisticRegression

    x, y, x_valid, y_valid = problem
    theirs = LogisticRegression(C=1 / (60 * 0.05)).fit(x, y)
    columns = lambda x, y: {"sample_id": np.arange(len(x)), "query_id": np.arange(len(x)), "x": x, "y": y.astype(float)}
    made = Evidence(columns(x, y), columns(x_valid, y_valid), given={"head": head_at(x, np.r_[theirs.coef_[0], theirs.intercept_], ridge=0.05)})
    own = Evidence(columns(x, y), columns(x_valid, y_valid), settings={"head": {"ridge": 0.05}})
    np.testing.assert_allclose(score(made, "influence"), score(own, "influence"), rtol=1e-3, atol=1e-3)
    assert "head" not in made.computed
    with pytest.raises(ValueError, match="ridge is -1"):
        head_at(x, np.zeros(6), ridge=-1)
