"""Bootstrap heads: draws that belong to rows, optima that SciPy finds too, and rows that every bag has drawn."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import chisquare, poisson

from ecom_importance.importance import Evidence, find, score
from ecom_importance.importance.bagged import bag_counts, fit_bags, name_key
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.heads import INTERCEPT_RIDGE, fit_head


def test_counts_are_poisson_and_belong_to_names():
    counts = bag_counts(name_key([f"杯 {i}" for i in range(4000)]), 30, seed=5)
    seen = np.bincount(np.minimum(counts.ravel(), 5), minlength=6)
    assert chisquare(seen, counts.size * np.r_[poisson.pmf(np.arange(5), 1), poisson.sf(4, 1)]).pvalue > 1e-4
    np.testing.assert_array_equal(bag_counts(name_key(["杯 7", "杯 3"]), 30, seed=5), counts[[7, 3]])
    assert (bag_counts(name_key(["杯 7"]), 30, seed=6) != counts[7]).any()
    np.testing.assert_array_equal(bag_counts(name_key(["杯 7"]), 10, seed=5)[0], counts[7, :10])


@settings(max_examples=8, deadline=None)
@given(n=st.integers(30, 300), d=st.integers(1, 40), ridge=st.sampled_from([1e-3, 1e-2, 1.0]), seed=st.integers(0, 99))
def test_every_bag_is_at_its_optimum(n, d, ridge, seed):
    "Also where the borrowed Hessian serves badly: few rows, many dimensions."
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.random(n)
    bags = fit_bags(x, y, name_key(np.arange(n)), fit_head(x, y, ridge=ridge), bags=4, tolerance=1e-13, seed=seed)
    counts = bag_counts(name_key(np.arange(n)), 4, seed).astype(float)
    wide, penalty = np.c_[x, np.ones(n)], np.r_[np.full(d, ridge), INTERCEPT_RIDGE]
    for bag in range(4):
        share = counts[:, bag] / counts[:, bag].sum()
        goal = lambda theta: (share @ (np.logaddexp(0, wide @ theta) - y * (wide @ theta)) + penalty @ theta**2 / 2, wide.T @ (share * (expit(wide @ theta) - y)) + penalty * theta)
        best = minimize(goal, np.zeros(d + 1), jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10})
        assert goal(bags.thetas[:, bag])[0] <= best.fun + 1e-9


def test_bags_that_the_borrowed_hessian_fails_are_fitted_alone():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 40)), rng.integers(0, 2, 60).astype(float)
    assert fit_bags(x, y, name_key(np.arange(60)), fit_head(x, y, ridge=1e-4), bags=10).alone > 0
    x, y = rng.normal(size=(4000, 5)), rng.integers(0, 2, 4000).astype(float)
    assert fit_bags(x, y, name_key(np.arange(4000)), fit_head(x, y, ridge=1e-2), bags=10).alone == 0


def test_values_are_those_of_a_plain_loop():
    made, wrong = example_evidence(300, 40, d=6)
    for soft in (True, False):
        values = score(made, "data_oob", settings={"data_oob": {"soft": soft, "seed": 3}})["data_oob"].to_numpy()
        counts, told = bag_counts(name_key(made.sample_ids), 100, 3), find(made, "bagged_heads")[3].predict(made.train["x"])
        for i in range(0, 300, 13):
            apart = np.abs(made.train["y"][i] - told[i, counts[i] == 0])
            assert values[i] == pytest.approx((1 - apart if soft else apart < 0.5).mean())


def test_every_row_is_left_out_of_a_bag():
    for bags in (2, 3, 10):
        counts = bag_counts(name_key(np.arange(3000)), bags, seed=1)
        assert (counts == 0).any(axis=1).all() and (counts > 0).any(axis=0).all()
    made, _ = example_evidence(200, 40, d=4)
    few = Evidence(dict(made.train), {}, settings={"bagged_heads": {"bags": 2}})
    counts, told = bag_counts(name_key(made.sample_ids), 2), find(few, "bagged_heads")[0].predict(made.train["x"])
    expected = [np.mean(1 - np.abs(made.train["y"][i] - told[i, counts[i] == 0])) for i in range(200)]
    np.testing.assert_allclose(score(few, "data_oob")["data_oob"], expected)
    with pytest.raises(ValueError, match="bags is 1"):
        score(Evidence(dict(made.train), {}, settings={"bagged_heads": {"bags": 1}}), "data_oob")


def test_seeds_differ_by_about_the_standard_error():
    made, _ = example_evidence(400, 40, d=6)
    table = score(made, "data_oob", repeats=4)
    other = score(made, "data_oob", repeats=4, seed=9)
    apart = (table["data_oob"] - other["data_oob"]) / np.hypot(table["data_oob_se"], other["data_oob_se"])
    assert 0.5 < np.sqrt(np.median(apart**2)) < 1.5 and (table["data_oob"] != other["data_oob"]).all()
