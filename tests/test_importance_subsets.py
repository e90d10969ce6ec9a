"""Datamodels and the least core: against definitions over all subsets, and other solvers."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ecom_importance.importance import Evidence, find, score
from ecom_importance.importance.bagged import name_key
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.subsets import Subsets, datamodel, draw_subsets, least_core, membership, solve_least_core
from ecom_importance.samples import DataError


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 7), seed=st.integers(0, 999))
def test_the_least_core_over_all_coalitions(n, seed):
    "No complaint is larger than e, no shares do better, and none of those are shorter."
    rng = np.random.default_rng(seed)
    every = (np.arange(1, 2**n - 1)[:, None] >> np.arange(n) & 1).astype(bool)
    worths, whole = rng.normal(size=len(every)), float(rng.normal())
    shares, e = solve_least_core(every, worths, whole)
    assert shares.sum() == pytest.approx(whole) and (worths - every @ shares).max() <= e + 2e-6 * max(np.abs(worths).max(), abs(whole))
    for _ in range(20):  # no other shares have a smaller worst complaint
        other = shares + (lambda step: step - step.mean())(0.1 * rng.normal(size=n))
        assert (worths - every @ other).max() >= e - 1e-9
    shortest = minimize(lambda x: x @ x, shares, jac=lambda x: 2 * x, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
                        constraints=[{"type": "eq", "fun": lambda x: x.sum() - whole}, {"type": "ineq", "fun": lambda x: every @ x + e + 1e-9 - worths}])
    assert shares @ shares <= shortest.fun + 1e-4


def test_among_many_the_shortest_shares_are_taken():
    rng = np.random.default_rng(0)
    half = rng.random((6, 12)) < 0.5
    members = np.concatenate([half, ~half])
    worths = rng.normal(size=12)
    shares, e = solve_least_core(members, worths, 1.0)
    shortest = minimize(lambda x: x @ x, shares, jac=lambda x: 2 * x, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
                        constraints=[{"type": "eq", "fun": lambda x: x.sum() - 1}, {"type": "ineq", "fun": lambda x: members @ x + e + 1e-9 - worths}])
    np.testing.assert_allclose(shares, shortest.x, atol=2e-5)
    twins = members.copy()
    twins[:, 1] = twins[:, 0]
    alike, _ = solve_least_core(twins, worths, 1.0)
    assert alike[0] == pytest.approx(alike[1], abs=1e-9)


def test_coalitions_without_their_complements_are_refused():
    with pytest.raises(ValueError, match="bring the complement"):
        solve_least_core(np.array([[True, False, False], [True, True, False]]), np.array([0.3, 0.1]), 1.0)


def test_scaled_membership_recovers_marginal_effects():
    "Over all subsets with their chances, E[v z] is the average marginal effect, for any v."
    rng = np.random.default_rng(0)
    n = 5
    every = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)
    v = rng.normal(size=2**n)
    for share in (0.2, 0.6):
        chance = np.where(every, share, 1 - share).prod(axis=1)
        z = membership(Subsets(every, np.full(2**n, share), v))
        assert np.abs(chance @ z).max() < 1e-12
        for row in range(n):
            without = np.flatnonzero(~every[:, row])
            effect = (chance[without] / (1 - share)) @ (v[without + 2**row] - v[without])
            assert (chance * v) @ z[:, row] == pytest.approx(effect)


def test_a_worth_that_is_a_sum_is_found_exactly():
    rng = np.random.default_rng(0)
    members, shares = draw_subsets(name_key(np.arange(40)), 2000)
    own = np.where(np.arange(40) < 5, rng.normal(size=40) + 2, 0.0)
    values = datamodel({0: Subsets(members, shares, members @ own)})
    np.testing.assert_allclose(values, own, atol=0.12)  # the LASSO shrinks a little


def test_draws_belong_to_names_and_come_with_complements():
    members, shares = draw_subsets(name_key(["杯 1", "b", "c"]), 40, seed=2)
    other, _ = draw_subsets(name_key(["c", "杯 1"]), 40, seed=2)
    np.testing.assert_array_equal(other, members[:, [2, 0]])
    np.testing.assert_array_equal(members[20:], ~members[:20])
    many, shares = draw_subsets(name_key(np.arange(500)), 400)
    assert np.abs(many.mean(axis=1) - shares).max() < 0.1


def test_shares_add_up_and_bad_settings_are_named():
    made, _ = example_evidence(60, 40, d=3)
    own = lambda **how: Evidence(dict(made.train), {name.removesuffix("_valid"): column for name, column in made.valid.items()}, settings={"valued_subsets": how})
    evidence = own(samples=100)
    game = find(evidence, "utility_game")
    assert score(evidence, "least_core")["least_core"].sum() == pytest.approx(game.whole - game.empty, abs=1e-9)
    np.testing.assert_allclose(least_core(find(evidence, "valued_subsets"), game), score(evidence, "least_core")["least_core"])
    for samples in (6, 9):
        with pytest.raises(ValueError, match=f"samples is {samples}"):
            find(own(samples=samples), "valued_subsets")


def test_too_many_rows_are_refused_and_others_named():
    made, _ = example_evidence(5_100, 40, d=3)
    made.settings["head"] = {"ridge": 0.01}
    with pytest.raises(DataError, match="at most 5,000.*knn_shapley"):
        score(made, "datamodel")
    small, _ = example_evidence(1_100, 40, d=3)
    small.settings |= {"head": {"ridge": 0.01}, "valued_subsets": {"samples": 8}}
    with pytest.raises(DataError, match="at most 1,000"):
        score(small, "least_core")
    assert np.isfinite(score(small, "datamodel")["datamodel"]).all()  # by a ridge
