"""Selection with coverage: bounds against all subsets, the lazy form against the plain one, and bad input."""
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.spatial.distance import cdist

from ecom_importance.samples import DataError
from ecom_importance.weighting import check_weights, facility_location, k_center
from ecom_importance.weighting.selection import greedy, neighbour_graph
from ecom_importance.weighting.weights import relative_rank

quick = settings(max_examples=30, deadline=None)


def problem(n: int, seed: int, d: int = 3) -> tuple[pd.Series, np.ndarray]:
    rng = np.random.default_rng(seed)
    return pd.Series(rng.normal(size=n), index=[f"s{row}" for row in range(n)], name="score").rename_axis("sample_id"), rng.normal(size=(n, d))


def served(scores, vectors, power=1.0):
    "How well each row is served by each, by the formula, without a library's neighbours."
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.maximum(unit @ unit.T, 0) * relative_rank(scores).to_numpy() ** power


@quick
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([0.0, 1.0, 2.0]))
def test_greedy_reaches_its_bound(seed, n, power):
    scores, vectors = problem(10, seed)
    serves = served(scores, vectors, power)
    value = lambda rows: serves[:, list(rows)].max(axis=1).sum()
    kept = np.flatnonzero(facility_location(scores, vectors, fraction=n / 10, power=power, neighbours=10))
    assert len(kept) == n and value(kept) >= (1 - 1 / np.e) * max(map(value, combinations(range(10), n))) - 1e-6


@quick
@given(st.integers(0, 10_000))
def test_lazy_is_plain_greedy(seed):
    rng = np.random.default_rng(seed)
    serves = sparse.random(30, 30, density=0.3, random_state=seed, format="csc")
    serves.data = rng.integers(1, 5, len(serves.data)).astype(float)  # ties are frequent
    order, dense = rng.permutation(30), serves.toarray()
    kept, best = [], np.zeros(30)
    for _ in range(12):
        gains = np.maximum(dense - best[:, None], 0).sum(axis=0)
        gains[kept] = -1
        row = min(range(30), key=lambda j: (-gains[j], order[j]))
        kept.append(row)
        best = np.maximum(best, dense[:, row])
    assert greedy(serves, 12, order).tolist() == kept


@quick
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_farthest_first_is_within_twice_the_best_radius(seed, n):
    scores, vectors = problem(10, seed)
    vectors = vectors.astype(np.float32)
    radius = lambda rows: cdist(vectors, vectors[list(rows)]).min(axis=1).max()
    kept = np.flatnonzero(k_center(scores, vectors, fraction=n / 10, among=1))
    assert len(kept) == n and radius(kept) <= 2 * min(map(radius, combinations(range(10), n))) + 1e-5


def test_neighbours_are_those_of_the_full_matrix():
    _, vectors = problem(40, 1, d=5)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = np.maximum(unit @ unit.T, 0)
    np.testing.assert_allclose(neighbour_graph(vectors, 40).toarray(), expected, atol=1e-6)
    few = neighbour_graph(vectors, 4)
    assert (np.diff(few.indptr) <= 4).all() and (few.diagonal() == 1).all()
    assert all(expected[row][few[row].indices].min() >= np.sort(expected[row])[-4] - 1e-6 for row in range(40))


@pytest.mark.parametrize("select", [facility_location, k_center])
def test_weights_are_weights_and_names_decide_not_places(select):
    scores, vectors = problem(57, 2)
    for fraction in (0.07, 0.5, 1.0):
        weights = check_weights(select(scores, vectors, fraction=fraction, **({"among": 1.0} if select is k_center else {})))
        assert (weights > 0).sum() == int(np.ceil(round(fraction * 57, 6))) and list(weights.index) == list(scores.index)
    tied = scores.round(0)
    order = np.random.default_rng(0).permutation(57)
    pd.testing.assert_series_equal(select(tied, vectors, fraction=0.3), select(tied.iloc[order], vectors[order], fraction=0.3).reindex(tied.index))


def test_copies_of_a_kept_row_are_left_out_until_all_others_are_in():
    scores, vectors = problem(20, 3)
    many = pd.Series(np.r_[scores, [scores.max()] * 10], index=[f"s{row}" for row in range(30)])
    together = np.vstack([vectors, np.tile(vectors[scores.to_numpy().argmax()], (10, 1))])
    best = scores.to_numpy().argmax()
    kept = np.flatnonzero(facility_location(many, together, fraction=8 / 30, neighbours=30))
    assert np.isin(kept, [best, *range(20, 30)]).sum() == 1
    assert (many.nlargest(8).index == many.index[[best, *range(20, 27)]]).sum() >= 7, "the top fraction would keep eight of the eleven"


def test_the_worst_rows_are_no_centres():
    scores, vectors = problem(50, 4)
    far = vectors.copy()
    far[scores.to_numpy().argmin()] = 100.0
    assert k_center(scores, far, fraction=0.2)[scores.idxmin()] == 0 < k_center(scores, far, fraction=0.2, among=1.0)[scores.idxmin()]


def test_one_row_and_rows_that_are_all_alike():
    scores = pd.Series([1.0], index=["a"])
    assert facility_location(scores, np.ones((1, 2)), fraction=0.5).tolist() == k_center(scores, np.ones((1, 2)), fraction=0.5).tolist() == [1]
    same = pd.Series(np.zeros(6), index=list("abcdef"))
    for select in (facility_location, k_center):
        assert (select(same, np.ones((6, 2)), fraction=0.5) > 0).sum() == (select(same, np.zeros((6, 2)), fraction=0.5) > 0).sum() == 3


@pytest.mark.parametrize("select", [facility_location, k_center])
@pytest.mark.parametrize(("change", "words"), [
    (dict(fraction=0), "fraction is 0"), (dict(fraction=1.2), "fraction is 1.2"), (dict(vectors=np.ones((4, 2))), "have the shape"), (dict(vectors=np.ones(5)), "have the shape"),
    (dict(vectors=np.full((5, 2), np.nan)), "no finite number"), (dict(scores=pd.Series([1, 2, np.nan, 4, 5])), "not finite"),
])
def test_input_that_will_not_do(select, change, words):
    given_ = dict(scores=pd.Series(np.arange(5.0)), vectors=np.eye(5), fraction=0.5) | change
    with pytest.raises(DataError, match=words):
        select(given_["scores"], given_["vectors"], fraction=given_["fraction"])


@pytest.mark.parametrize(("call", "words"), [
    (lambda s, x: facility_location(s, x, fraction=0.5, power=-1), "power is -1"), (lambda s, x: facility_location(s, x, fraction=0.5, neighbours=0), "neighbours 0"),
    (lambda s, x: k_center(s, x, fraction=0.5, among=0.4), "among is 0.4"), (lambda s, x: k_center(s, x, fraction=0.5, among=1.1), "among is 1.1"),
])
def test_settings_that_make_no_sense(call, words):
    with pytest.raises(DataError, match=words):
        call(*problem(8, 0))
