"""Transport of the training rows onto the trusted ones: potentials, blocks, memory, and what is refused."""
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from ecom_importance.importance import Evidence, find, score
from ecom_importance.importance import transport as room
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.transport import gaussian_distance, label_distances

ot = pytest.importorskip("ot", reason="POT is an extra of the tests: peers")


def problem(n=60, m=24, d=3, seed=0, **how):
    made, wrong = example_evidence(n, m, d=d, seed=seed)
    return Evidence(dict(made.train), {name.removesuffix("_valid"): column for name, column in made.valid.items()}, settings={"transport": how}), wrong


@settings(max_examples=10, deadline=None)
@given(first=st.integers(1, 30), second=st.integers(2, 30), d=st.integers(1, 6), seed=st.integers(0, 99))
def test_distance_of_groups_is_the_bures_distance(first, second, d, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(first, d)), rng.normal(size=(second, d)) @ rng.normal(size=(d, d)) + 1
    s, t = (np.atleast_2d(np.cov(some.T, bias=True)) if len(some) > 1 else np.zeros((d, d)) for some in (a, b))
    root = sqrtm(t + 1e-14 * np.eye(d)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(root @ s @ root + 1e-16 * np.eye(d)).real)
    assert gaussian_distance(a, b) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert gaussian_distance(a, a) == pytest.approx(0, abs=1e-9) and gaussian_distance(a, b) == pytest.approx(gaussian_distance(b, a))


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
def test_potentials_are_pot_s(share, weight):
    made, _ = problem(regularisation=share, label_weight=weight, tolerance=1e-10, most=50_000)
    values, fitted = score(made, "lava")["lava"].to_numpy(), find(made, "transport")
    x, grade, x_valid, labels = find(made, "x").astype(float), find(made, "grade"), find(made, "x_valid").astype(float), find(made, "y_valid").astype(int)
    cost = ot.dist(x, x_valid) + weight * label_distances(x, grade, x_valid, labels, 2)[grade][:, labels]
    assert fitted.epsilon == pytest.approx(share * cost.mean(), rel=1e-6)
    log = ot.bregman.sinkhorn_log(np.full(60, 1 / 60), np.full(24, 1 / 24), cost, fitted.epsilon, numItermax=50_000, stopThr=1e-13, log=True)[1]
    f = fitted.epsilon * log["log_u"]
    np.testing.assert_allclose(values, -(f - (f.sum() - f) / 59), atol=1e-6 * np.ptp(f))


def test_the_gradient_is_that_of_the_cost():
    "A little more weight on one row, a little less on all others: the regularised cost changes as the value says."
    made, _ = problem(n=20, m=10, regularisation=0.3, tolerance=1e-11, most=50_000)
    values, fitted = score(made, "lava")["lava"].to_numpy(), find(made, "transport")
    x, grade, x_valid, labels = find(made, "x").astype(float), find(made, "grade"), find(made, "x_valid").astype(float), find(made, "y_valid").astype(int)
    cost = ot.dist(x, x_valid) + label_distances(x, grade, x_valid, labels, 2)[grade][:, labels]

    def regularised(a):
        plan = ot.bregman.sinkhorn_log(a, np.full(10, 0.1), cost, fitted.epsilon, numItermax=50_000, stopThr=1e-14)
        return (plan * cost).sum() + fitted.epsilon * (plan * np.log(plan / np.outer(a, np.full(10, 0.1)))).sum()

    for row in (0, 7, 19):
        step = np.full(20, -1e-4 / 19)
        step[row] = 1e-4
        slope = (regularised(np.full(20, 0.05) + step) - regularised(np.full(20, 0.05) - step)) / 2e-4
        assert -values[row] == pytest.approx(slope, abs=1e-3 * np.ptp(values))


def test_blocks_and_what_is_kept_change_nothing(monkeypatch):
    made, _ = problem(n=300, m=60)
    whole = score(made, "lava")["lava"]
    monkeypatch.setattr(room, "TILE", 600)
    np.testing.assert_allclose(score(problem(n=300, m=60)[0], "lava")["lava"], whole, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(room, "PRECISE", 0)  # float32 from here
    np.testing.assert_allclose(score(problem(n=300, m=60)[0], "lava")["lava"], whole, atol=1e-3 * np.ptp(whole))
    monkeypatch.setattr(room, "KEPT", 0)
    np.testing.assert_allclose(score(problem(n=300, m=60)[0], "lava")["lava"], whole, atol=1e-3 * np.ptp(whole))


def test_memory_is_set_by_the_tile(monkeypatch):
    "50,000 × 2,000 costs would take 400 MB as float32."
    made, _ = example_evidence(50_000, 2_000, d=4)
    made.settings["transport"] = {"most": 2}
    find(made, "grade"), find(made, "levels")
    tracemalloc.start()
    find(made, "transport")
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak < 120


def test_what_did_not_converge_is_said(caplog):
    made, _ = problem(most=1, tolerance=1e-12)
    with caplog.at_level("WARNING", logger="ecom_importance"):
        assert np.isfinite(score(made, "lava")["lava"]).all()
    assert "still in the wrong place after 1 rounds" in caplog.text


def test_rows_far_from_all_trusted_ones_are_worth_least():
    made, _ = problem(n=200, m=60)
    made.train["x"] = made.train["x"].copy()
    made.train["x"][:10] += 8
    assert set(np.argsort(score(made, "lava")["lava"].to_numpy())[:10]) == set(range(10))


@pytest.mark.parametrize("how", [{"regularisation": 0.0}, {"label_weight": -1.0}, {"tolerance": 0.0}, {"most": 0}])
def test_bad_settings_are_named(how):
    name, value = next(iter(how.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        score(problem(**how)[0], "lava")
