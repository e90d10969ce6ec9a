"""Importance for a ranking: pulls by definition, all subsets, real refits, and queries that say nothing."""
from itertools import permutations
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.evaluation import ndcg
from ecom_importance.importance import Evidence, find, score
from ecom_importance.importance import ranking
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.heads import fit_head
from ecom_importance.importance.ranking import knn_scores, pair_weights, pull, rank_knn_shapley, surrogate

lists = st.integers(1, 9).flatmap(lambda m: st.tuples(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=m, max_size=m), st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.7]), min_size=m, max_size=m)))


@settings(max_examples=60, deadline=None)
@given(made=lists, at=st.integers(1, 12))
def test_pulls_are_the_derivative_and_add_up_to_zero(made, at):
    gains, scores = map(np.array, made)
    lambdas = pull(gains, scores, at)
    assert abs(lambdas.sum()) < 1e-12
    step = 1e-6
    numeric = [-(surrogate(gains, scores + step * one, scores, at) - surrogate(gains, scores - step * one, scores, at)) / (2 * step) for one in np.eye(len(gains))]
    np.testing.assert_allclose(lambdas, numeric, atol=1e-7)
    if len(set(gains)) == 1:
        assert not lambdas.any()
    order = np.random.default_rng(len(gains)).permutation(len(gains))
    np.testing.assert_allclose(pull(gains[order], scores[order], at), lambdas[order], atol=1e-12)


@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.5, 0.5], [0.9, 0.5, 0.5, 0.1], [0.4, 0.3, 0.2, 0.1], [0.2, 0.2, 0.7, 0.7]])
@pytest.mark.parametrize("at", [1, 2, 10])
def test_swaps_are_those_of_ndcg_over_all_ways_to_break_ties(scores, at):
    gains, scores, swaps = np.array([0.0, 1.0, 0.5, 0.25]), np.array(scores), []
    for lot in permutations(range(4)):
        apart, table = scores + 1e-6 * np.array(lot), np.zeros((4, 4))
        for i in range(4):
            for j in range(4):
                swapped = apart.copy()
                swapped[[i, j]] = apart[[j, i]]
                table[i, j] = abs(ndcg(gains, apart, k=at) - ndcg(gains, swapped, k=at)) * (gains[i] > gains[j])
        swaps.append(table)
    np.testing.assert_allclose(pair_weights(gains, scores, at), np.mean(swaps, axis=0), atol=1e-12)


def subsets(n, worth):
    worths = np.array([worth([i for i in range(n) if mask >> i & 1]) for mask in range(2**n)])
    values = np.zeros(n)
    for mask in range(2**n):
        for i in (i for i in range(n) if not mask >> i & 1):
            values[i] += factorial(mask.bit_count()) * factorial(n - mask.bit_count() - 1) / factorial(n) * (worths[mask | 1 << i] - worths[mask])
    return values


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 8), k=st.integers(1, 11), seed=st.integers(0, 999))
def test_equals_all_subsets(n, k, seed):
    "Two queries; k above n too."
    rng = np.random.default_rng(seed)
    x, targets, y, gains, query = rng.normal(size=(n, 2)), rng.normal(size=(7, 2)), rng.integers(0, 3, n) / 2, rng.integers(0, 3, 7) / 2, np.array([0, 0, 0, 1, 1, 1, 1])
    order = [np.argsort(((x - target) ** 2).sum(axis=1)) for target in targets]

    def scores(subset):
        return np.array([sum([y[i] for i in near if i in subset][:k]) / k for near in order])

    everything = scores(set(range(n)))
    np.testing.assert_allclose(knn_scores(x, y, np.arange(n, dtype=np.uint32), targets, k), everything)
    lambdas = np.concatenate([pull(gains[query == q], everything[query == q]) for q in (0, 1)])
    ours = rank_knn_shapley(x, y, np.arange(n, dtype=np.uint32), targets, gains, query, k=k)
    np.testing.assert_allclose(ours, subsets(n, lambda subset: lambdas @ scores(set(subset))), atol=1e-12)


def test_large_queries_are_cut_as_small_ones_are(monkeypatch):
    made, _ = example_evidence(400, 160, d=6)
    whole = score(made, "rank_knn_shapley")["rank_knn_shapley"]
    monkeypatch.setattr(ranking, "CELLS", 400 * 3)
    monkeypatch.setattr(ranking, "LEAST", 3)  # below the eight rows of a query
    np.testing.assert_allclose(score(made, "rank_knn_shapley")["rank_knn_shapley"], whole, rtol=1e-9, atol=1e-15)


def test_influence_is_what_a_refit_does_to_the_surrogate():
    made, _ = example_evidence(300, 80, d=5, seed=4)
    made.settings["head"] = {"ridge": 0.05}
    made.settings["rank_pull_valid"] = {"at": 3}
    values = score(made, "rank_influence")["rank_influence"].to_numpy()
    x, y, x_valid, y_valid = (find(made, name).astype(float) for name in ("x", "y", "x_valid", "y_valid"))
    frozen, bounds = find(made, "head").logit(x_valid), made.query_bounds

    def loss(row, more):
        weights = np.ones(300)
        weights[row] += 300 * more
        logit = fit_head(x, y, ridge=0.05 / (1 + more), weights=weights, tolerance=1e-18).logit(x_valid)
        return np.mean([surrogate(y_valid[a:b], logit[a:b], frozen[a:b], 3) for a, b in zip(bounds, bounds[1:])])

    rows = np.argsort(-np.abs(values))[:12]
    np.testing.assert_allclose([(loss(row, -1e-4) - loss(row, 1e-4)) / 2e-4 for row in rows], values[rows], rtol=2e-3)


@pytest.mark.parametrize("name", ["rank_influence", "rank_knn_shapley"])
def test_queries_that_say_nothing_of_order_add_nothing(name):
    made, _ = example_evidence(200, 48, d=4)
    flat = Evidence(dict(made.train), {key.removesuffix("_valid"): column for key, column in made.valid.items()} | {"y": np.ones(48)})
    assert not score(flat, name)[name].any()
    half = np.where(np.arange(48) < 24, made.valid["y_valid"], 0.0)
    part = Evidence(dict(made.train), {key.removesuffix("_valid"): column for key, column in made.valid.items()} | {"y": half})
    alone = Evidence(dict(made.train), {key.removesuffix("_valid"): column[:24] for key, column in made.valid.items()})
    np.testing.assert_allclose(score(part, name)[name] * 6, score(alone, name)[name] * 3, rtol=1e-9, atol=1e-15)


def test_bad_settings_are_named():
    made, _ = example_evidence(60, 16, d=3)
    for settings_, what in (({"k": 0}, "k is 0"), ({"at": 0}, "at is 0")):
        with pytest.raises(ValueError, match=what):
            score(made, "rank_knn_shapley", settings={"rank_knn_shapley": settings_})
    made.settings["rank_pull_valid"] = {"at": -1}
    with pytest.raises(ValueError, match="at is -1"):
        score(made, "rank_influence")
