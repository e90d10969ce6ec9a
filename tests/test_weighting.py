"""Weights from scores: exact properties, an independent solver for the bounds, and what happens with bad input."""
import logging
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import optimize, special
from scipy import stats as sps

from ecom_importance.samples import DataError, stable_hash
from ecom_importance.weighting import WAYS, apply_weights, check_scores, check_weights, effective_sample_size, inverse_propensity, mean_rank, times, weigh
from ecom_importance.weighting.weights import fill_to_mean_one, log_top_fraction

quick = settings(max_examples=40, deadline=None)
# A few levels, so that ties are frequent, beside numbers of every size.
numbers = st.one_of(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0]), st.floats(-1e6, 1e6, allow_nan=False))
score_lists = st.lists(numbers, min_size=1, max_size=40)
# Settings of every way that give weights whatever the scores are (a threshold below all of them is made in `made`).
choices = st.one_of(
    st.tuples(st.just("rank"), st.fixed_dictionaries({"power": st.sampled_from([0, 0.5, 1, 3.0])})),
    st.tuples(st.just("softmax"), st.fixed_dictionaries({"temperature": st.sampled_from([None, 1e-3, 1.0, 1e6, math.inf])})),
    st.tuples(st.just("threshold"), st.fixed_dictionaries({"at": st.just(0.0)})),
    st.tuples(st.just("top_fraction"), st.fixed_dictionaries({"fraction": st.floats(0.01, 1), "seed": st.integers(0, 3)})),
)
floors, ceilings = st.sampled_from([0.0, 0.05, 0.3, 0.99, 1.0]), st.sampled_from([None, 1.0, 1.01, 1.5, 4.0])


def series(values, ids=None) -> pd.Series:
    return pd.Series(np.asarray(values, float), index=pd.Index(ids if ids is not None else [f"s{i}" for i in range(len(values))], name="sample_id"), name="score")


def made(values, choice, **more) -> pd.Series | None:
    "Weights, or None where the settings leave too few rows to carry the mean."
    how, chosen = choice
    try:
        return weigh(series(values), how, **chosen, **more)
    except DataError as error:
        assert "mean 1 are not possible" in str(error) or "no score reaches" in str(error)
        return None


# ---- the three promises -------------------------------------------------------------------------------------------

@quick
@given(score_lists, choices, floors, ceilings)
def test_mean_is_one_within_the_bounds(values, choice, floor, ceiling):
    weights = made(values, choice, floor=floor, ceiling=ceiling)
    if weights is None:
        assert ceiling is not None or choice[0] == "threshold"  # without a ceiling only an empty choice is impossible
        return
    assert weights.index.equals(series(values).index) and weights.name == "weight" and weights.dtype == np.float64
    assert abs(weights.mean() - 1) < 1e-12
    assert weights.min() >= floor and weights.max() <= (ceiling or math.inf)


@quick
@given(score_lists, choices, floors, ceilings)
def test_a_higher_score_never_weighs_less(values, choice, floor, ceiling):
    weights = made(values, choice, floor=floor, ceiling=ceiling)
    if weights is None:
        return
    w = weights.to_numpy()
    higher = np.greater.outer(np.array(values), np.array(values))
    assert (np.subtract.outer(w, w)[higher] >= -1e-12).all()
    if choice[0] != "top_fraction":  # which cuts through ties, to keep its count
        for value in set(values):
            assert np.ptp(w[np.array(values) == value]) == 0


@quick
@given(score_lists, choices, floors, ceilings, st.randoms(use_true_random=False))
def test_row_order_does_not_matter(values, choice, floor, ceiling, random):
    weights = made(values, choice, floor=floor, ceiling=ceiling)
    shuffled = list(range(len(values)))
    random.shuffle(shuffled)
    how, chosen = choice
    if weights is None:
        with pytest.raises(DataError):
            weigh(series(values).iloc[shuffled], how, **chosen, floor=floor, ceiling=ceiling)
        return
    again = weigh(series(values).iloc[shuffled], how, **chosen, floor=floor, ceiling=ceiling)
    np.testing.assert_allclose(again[weights.index], weights, rtol=1e-10, atol=1e-14)


@quick
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40), st.sampled_from([("rank", {}), ("rank", {"power": 2}), ("top_fraction", {"fraction": 0.37})]),
       st.sampled_from([lambda v: v**3, lambda v: np.exp(v / 10), lambda v: 1e6 * v - 3, np.arctan]))
def test_rank_and_top_fraction_see_only_the_order(values, choice, transform):
    plain = made(values, choice, floor=0.1)
    np.testing.assert_array_equal(made(transform(np.array(values, float)), choice, floor=0.1), plain)


# ---- each way against its formula ---------------------------------------------------------------------------------

@quick
@given(score_lists, st.sampled_from([0, 0.5, 1, 2.5]))
def test_rank_is_its_formula(values, power):
    raw = ((sps.rankdata(values) - 0.5) / len(values)) ** power
    np.testing.assert_allclose(weigh(series(values), power=power), raw / raw.mean(), rtol=1e-12)


@quick
@given(score_lists, st.floats(0.5, 1e7))
def test_softmax_is_its_formula(values, temperature):
    expected = special.softmax(np.array(values) / temperature) * len(values)
    np.testing.assert_allclose(weigh(series(values), "softmax", temperature=temperature), expected, rtol=1e-7, atol=1e-300)


def test_softmax_at_the_ends():
    scores = series([-1e6, 0, 1e6 - 1, 1e6])
    sharp = weigh(scores, "softmax", temperature=1.0)
    np.testing.assert_allclose(sharp, [0, 0, 4 / (1 + math.e), 4 * math.e / (1 + math.e)])
    assert (weigh(scores, "softmax", temperature=math.inf) == 1).all()
    distance = [(weigh(scores, "softmax", temperature=t) - 1).abs().max() for t in (1e6, 1e8, 1e10)]
    assert distance[0] > 10 * distance[1] > 100 * distance[2] and distance[2] < 2e-4
    assert weigh(scores, "softmax", temperature=1e-300).tolist() == [0, 0, 0, 4]
    assert weigh(series([-1.7e308, 1.7e308, 0]), "softmax", temperature=1e300).tolist() == [0, 3, 0]
    np.testing.assert_allclose(weigh(series([1.0, 2.0, 4.0]), "softmax"), weigh(series([-10, 990.0, 2990.0]), "softmax"))
    assert np.isfinite(weigh(series([-1.7e308, 1.7e308, 0]), "softmax")).all()


def test_a_cold_softmax_still_fills_up_to_its_ceiling():
    # Rows whose raw weight is far below the smallest float keep their order: the next best row takes what the ceiling leaves.
    weights = weigh(series([0, 1000, 5000, 9000]), "softmax", temperature=1.0, ceiling=1.5)
    np.testing.assert_allclose(weights, [0, 1, 1.5, 1.5], atol=1e-300)
    np.testing.assert_allclose(weigh(series([0, 1000, 5000, 9000]), "softmax", temperature=1.0, ceiling=1.5, floor=0.25), [0.25, 0.75, 1.5, 1.5])


def test_threshold_keeps_what_reaches_it():
    scores = series([0.5, 0.49999, 0.7, -3])
    assert weigh(scores, "threshold", at=0.5).tolist() == [2, 0, 2, 0]
    assert weigh(scores, "threshold", at=-3).tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(weigh(scores, "threshold", at=0.5, floor=0.2), [1.8, 0.2, 1.8, 0.2])


@quick
@given(score_lists, st.integers(1, 1000), st.integers(0, 5))
def test_top_fraction_keeps_exactly_its_number(values, thousandths, seed):
    scores = series(values)
    kept = weigh(scores, "top_fraction", fraction=thousandths / 1000, seed=seed) > 0
    assert kept.sum() == math.ceil(Fraction(thousandths, 1000) * len(values))
    assert kept.all() or scores[kept].min() >= scores[~kept].max()
    edge = scores.index[scores == scores[kept].min()]
    by_hash = sorted(edge, key=lambda name: stable_hash("tie", name, seed=seed))
    assert set(edge[kept[edge]]) == set(by_hash[: kept[edge].sum()])


@pytest.mark.parametrize(("fraction", "n", "kept"), [(0.07, 100, 7), (0.1, 30, 3), (2 / 3, 3, 2), (1 / 3, 3, 1), (0.29, 100, 29), (1e-9, 5, 1), (np.float32(0.5), 4, 2), (1, 3, 3)])
def test_a_fraction_means_what_is_written(fraction, n, kept):
    assert (weigh(series(range(n)), "top_fraction", fraction=fraction) > 0).sum() == kept


@quick
@given(score_lists, st.floats(0.01, 1), st.floats(0.01, 1))
def test_smaller_fractions_are_nested(values, a, b):
    low, high = sorted((a, b))
    few, many = (weigh(series(values), "top_fraction", fraction=f) > 0 for f in (low, high))
    assert (many | ~few).all()


def test_another_seed_breaks_ties_otherwise_and_the_same_seed_alike():
    scores = series(np.zeros(200))
    first, again, other = (weigh(scores, "top_fraction", fraction=0.5, seed=s) for s in (0, 0, 1))
    assert first.equals(again) and not first.equals(other)
    assert 60 < (first[other > 0] > 0).sum() + (first[other == 0] == 0).sum() < 140  # about half of 200 agree


# ---- bounds: an independent solver --------------------------------------------------------------------------------

@quick
@given(npst.arrays(float, st.integers(1, 30), elements=st.floats(-8, 8)), st.floats(0, 0.99), st.floats(1.01, 6))
def test_filling_agrees_with_a_root_finder(log_raw, floor, ceiling):
    raw = np.exp(log_raw)
    excess = lambda log_c: np.clip(np.exp(log_c) * raw, floor, ceiling).mean() - 1  # noqa: E731
    log_c = optimize.brentq(excess, -40, 40, xtol=1e-14, rtol=1e-14)
    np.testing.assert_allclose(fill_to_mean_one(log_raw, floor=floor, ceiling=ceiling), np.clip(np.exp(log_c) * raw, floor, ceiling), rtol=1e-9, atol=1e-12)


@quick
@given(npst.arrays(float, st.integers(1, 40), elements=st.floats(-700, 700)), st.data())
def test_groups_are_filled_as_if_alone(log_raw, data):
    group = np.array(data.draw(st.lists(st.sampled_from(["b", "a", "ü", "鞋"]), min_size=len(log_raw), max_size=len(log_raw))))
    whole = fill_to_mean_one(log_raw, group, floor=0.1, ceiling=1.7)
    for name in set(group):
        np.testing.assert_allclose(whole[group == name], fill_to_mean_one(log_raw[group == name], floor=0.1, ceiling=1.7), rtol=1e-12)


def test_filling_is_not_one_renormalisation():
    log_raw = np.log([0.01, 0.02, 0.5, 1.0, 8.0])
    np.testing.assert_allclose(fill_to_mean_one(log_raw, floor=0.2, ceiling=2), [0.2, 0.2, 13 / 15, 26 / 15, 2], rtol=1e-14)


def test_bounds_at_their_limits():
    scores = series([3, 1, 2, 2])
    for bounds in ({"floor": 1}, {"ceiling": 1}, {"floor": 1, "ceiling": 1}):
        assert weigh(scores, **bounds).tolist() == [1, 1, 1, 1]
    assert weigh(scores, "top_fraction", fraction=0.25, floor=1).tolist() == [1, 1, 1, 1]
    assert weigh(scores, "top_fraction", fraction=0.25, ceiling=4).tolist() == [4, 0, 0, 0]
    # A ceiling that the kept rows only just reach, and by rounding do not quite.
    short = [(n, kept) for n in range(2, 200) for kept in range(1, n) if (n / kept) * kept < n]
    assert len(short) > 10
    for n, kept in short[:10]:
        weights = weigh(series(range(n)), "top_fraction", fraction=kept / n, ceiling=n / kept)
        assert (weights > 0).sum() == kept and abs(weights.mean() - 1) < 1e-12


def test_bounds_that_cannot_be_met():
    with pytest.raises(DataError, match="1 of 4 rows have a raw weight above 0, and at most 3.9 each"):
        weigh(series([3, 1, 2, 2]), "top_fraction", fraction=0.25, ceiling=3.9)
    for bounds in ({"floor": -0.1}, {"floor": 1.1}, {"ceiling": 0.9}, {"floor": math.nan}, {"ceiling": math.nan}, {"ceiling": -math.inf}):
        with pytest.raises(DataError, match="0 ≤ floor ≤ 1 ≤ ceiling"):
            weigh(series([3, 1, 2]), **bounds)
    with pytest.raises(DataError, match="floor is '0.1'"):
        weigh(series([3, 1, 2]), floor="0.1")


# ---- queries ------------------------------------------------------------------------------------------------------

@st.composite
def queried(draw):
    values = draw(st.lists(numbers, min_size=1, max_size=40))
    labels = draw(st.lists(st.sampled_from(["q1", "q2", "rare", "红鞋"]), min_size=len(values), max_size=len(values)))
    scores = series(values)
    return scores, pd.Series(labels, index=scores.index)


@quick
@given(queried(), st.sampled_from([("rank", {}), ("softmax", {}), ("top_fraction", {"fraction": 0.3})]), st.sampled_from(["proportional", "equal"]), st.sampled_from([0, 0.2]))
def test_balances_give_each_query_its_total(pair, choice, balance, floor):
    scores, query = pair
    weights = weigh(scores, choice[0], **choice[1], balance=balance, group=query, floor=floor)
    totals, sizes = weights.groupby(query).sum(), query.value_counts()
    expected = sizes if balance == "proportional" else sizes * 0 + len(scores) / len(sizes)
    np.testing.assert_allclose(totals, expected[totals.index], rtol=1e-12)
    assert abs(weights.mean() - 1) < 1e-12
    mean = query.map(totals / sizes)  # the bounds count in the query's own mean
    assert (weights >= floor * mean * (1 - 1e-12)).all()
    higher = np.greater.outer(scores.to_numpy(), scores.to_numpy()) & np.equal.outer(query.to_numpy(), query.to_numpy())
    assert (np.subtract.outer(weights.to_numpy(), weights.to_numpy())[higher] >= -1e-12).all()


@quick
@given(queried(), st.floats(0.01, 1))
def test_within_query_every_query_keeps_its_share(pair, fraction):
    scores, query = pair
    kept = weigh(scores, "top_fraction", fraction=fraction, within="group", group=query) > 0
    for name, size in query.value_counts().items():
        alone = weigh(scores[query == name], "top_fraction", fraction=fraction) > 0
        assert (kept[query == name] == alone).all() and alone.sum() == max(math.ceil(round(fraction * size, 6)), 1)


def test_where_rows_are_compared():
    scores = series([9, 8, 7, 2, 1])
    query = pd.Series(list("aaabb"), index=scores.index)
    np.testing.assert_allclose(weigh(scores, within="group", group=query), np.array([5 / 3, 1, 1 / 3, 1.5, 0.5]))
    assert (weigh(scores, within="group", group=query, balance="proportional") == weigh(scores, group=query, balance="proportional")).all()
    everywhere = weigh(scores, within="all", group=query, balance="proportional")
    np.testing.assert_allclose(everywhere, [9 / 7, 1, 5 / 7, 1.5, 0.5])  # ranks 4.5, 3.5, 2.5, 1.5, .5 of five
    softly = weigh(scores, "softmax", temperature=1.0, within="group", group=query)
    np.testing.assert_allclose(softly, np.concatenate([special.softmax([9, 8, 7]) * 3, special.softmax([2, 1]) * 2]))
    assert weigh(scores, "threshold", at=2, group=query, balance="equal").tolist() == pytest.approx([5 / 6] * 3 + [2.5, 0])


def test_a_balance_needs_a_row_of_every_query():
    scores = series([9, 8, 7, 2, 1])
    query = pd.Series(list("aaabb"), index=scores.index)
    with pytest.raises(DataError, match=r"in 1 of 2 groups \('b'\).*within='group'"):
        weigh(scores, "threshold", at=5, group=query, balance="equal")


def test_query_ids_may_know_more_rows_and_another_order():
    scores = series([9, 8, 7, 2, 1])
    query = pd.Series(list("xbabaa"), index=["other", "s4", "s2", "s3", "s0", "s1"])
    straight = pd.Series(list("aaabb"), index=scores.index)
    assert weigh(scores, group=query, balance="equal").equals(weigh(scores, group=straight, balance="equal"))


@pytest.mark.parametrize(("query", "words"), [
    (None, "group is missing"), (list("aaabb"), "group is a list"),
    (pd.Series(list("aaab"), index=["s0", "s1", "s2", "s3"]), "1 scored rows have no group; sample_id 's4'"),
    (pd.Series([*"aaa", None, "b"], index=["s0", "s1", "s2", "s3", "s4"]), "sample_id 's3'"),
    (pd.Series(list("aaabbb"), index=["s0", "s1", "s2", "s3", "s4", "s4"]), "share their sample_id"),
])
def test_query_ids_that_cannot_be_used(query, words):
    with pytest.raises(DataError, match=words):
        weigh(series([9, 8, 7, 2, 1]), group=query, balance="equal")


# ---- bad and odd input --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("scores", "words"), [
    (series([1, np.nan, np.inf, 2], list("abcd")), "2 scores are not finite numbers; sample_id 'b', 'c'"),
    (series([1, -np.inf], list("ab")), "'b'"),
    (pd.Series([1, pd.NA, 3], index=list("abc"), dtype="Int64"), "'b'"),
    (pd.Series(["1", "high"], index=list("ab")), "'b'"),
    (pd.Series([1, None], index=list("ab"), dtype=object), "'b'"),
    (series([]), "there are no scores"),
    (series([1, 2, 3], list("aba")), "2 of the scores share their sample_id with another: 'a'"),
    (series([1, 2], ["a", None]), "1 of the scores have no sample_id"),
    (pd.Series([1.0], index=pd.MultiIndex.from_tuples([("a", 1)])), "an index of 2 levels"),
    ([1, 2, 3], "the scores are a list"),
    (np.arange(3.0), "the scores are a ndarray"),
    (pd.DataFrame({"loss": [1], "influence": [2]}), r"2 columns: 'loss', 'influence'.*scores\['loss'\].*mean_rank"),
    (pd.DataFrame({"sample_id": ["a"], "loss": [2]}), r"set_index\('sample_id'\)"),
    (pd.DataFrame(index=["a"]), "0 columns: none"),
])
def test_scores_that_cannot_be_used(scores, words):
    for how, chosen in (("rank", {}), ("softmax", {}), ("threshold", {"at": 0}), ("top_fraction", {"fraction": 0.5})):
        with pytest.raises(DataError, match=words):
            weigh(scores, how, **chosen)


def test_scores_that_can_be_used():
    table = pd.DataFrame({"loss": [1, 2], "loss_se": [0.1, 0.1]}, index=list("ab"))
    assert weigh(table).tolist() == weigh(table["loss"]).tolist() == pytest.approx([0.5, 1.5])
    assert weigh(pd.Series([1, 2, 3], index=[7, 3, 5], dtype="Int64")).to_dict() == pytest.approx({7: 1 / 3, 3: 1, 5: 5 / 3})
    assert weigh(pd.Series([True, False], index=list("ab"))).tolist() == pytest.approx([1.5, 0.5])
    assert weigh(table["loss"].astype(np.float32)).index.name == "sample_id"
    lone = pd.DataFrame({"x_se": [1.0, 2.0]})  # no estimator `x` beside it, so it is one itself
    assert check_scores(lone).tolist() == [1, 2]
    before = table.copy()
    weigh(table, floor=0.9)
    pd.testing.assert_frame_equal(table, before)


def test_equal_scores_give_uniform_weights_and_a_warning(caplog):
    scores = series([0.1] * 5)
    with caplog.at_level(logging.WARNING, logger="ecom_importance"):
        for how, chosen in (("rank", {}), ("rank", {"power": 4}), ("softmax", {}), ("softmax", {"temperature": 1e-9}), ("threshold", {"at": 0.1})):
            np.testing.assert_array_equal(weigh(scores, how, **chosen), np.ones(5))
        kept = weigh(scores, "top_fraction", fraction=0.5)
    assert sorted(kept) == pytest.approx([0, 0, 5 / 3, 5 / 3, 5 / 3])  # the promised number stands; the hash chooses
    assert len(caplog.records) == 6 and "say nothing" in caplog.text
    caplog.clear()
    assert weigh(series([0.4])).tolist() == [1] and not caplog.records


@pytest.mark.parametrize(("how", "chosen", "words"), [
    ("softmax", {"temperature": -1}, "temperature is -1.*standard deviation of 0.816"), ("softmax", {"temperature": 0}, "temperature is 0"),
    ("softmax", {"temperature": math.nan}, "temperature is nan"), ("softmax", {"temperature": "hot"}, "temperature is 'hot'"),
    ("rank", {"power": -1}, "power is -1"), ("rank", {"power": math.inf}, "power is inf"),
    ("top_fraction", {"fraction": 0}, "fraction is 0"), ("top_fraction", {"fraction": 1.01}, "fraction is 1.01"), ("top_fraction", {"fraction": -0.5}, "fraction is -0.5"),
    ("top_fraction", {"fraction": math.nan}, "fraction is nan"), ("top_fraction", {"fraction": [0.5]}, "a number"), ("top_fraction", {"fraction": None}, "fraction is None.*a number"),
    ("top_fraction", {}, "needs fraction"), ("threshold", {}, "needs at"), ("threshold", {"at": math.inf}, "at is inf"), ("threshold", {"at": None}, "at is None"),
    ("threshold", {"at": 4}, "no score reaches at=4; the highest is 3"),
    ("rank", {"power": None}, "power is None"),
    ("top_fraction", {"fraction": 0.5, "seed": None}, "seed is None"),
    ("softmax", {"temprature": 1}, "no setting 'temprature'.*did you mean 'temperature'"), ("rank", {"flor": 0.1}, "did you mean 'floor'"),
    ("rank", {"temperature": 1}, "no setting 'temperature'"), ("sofmax", {}, "did you mean 'softmax'"), (3, {}, "no way of weighting named 3"),
    ("rank", {"balance": "even"}, "balance is 'even'"), ("rank", {"within": "session"}, "within is 'session'"),
    ("threshold", {"at": 0, "within": "group"}, "compares a row with a number"), ("rank", {"group": pd.Series(dtype=object)}, "nothing uses it"),
])
def test_settings_that_cannot_be_used(how, chosen, words):
    with pytest.raises(DataError, match=words):
        weigh(series([1, 2, 3]), how, **chosen)


def test_every_way_is_tested_here():
    assert set(WAYS) == {"rank", "softmax", "threshold", "top_fraction"}  # a new way joins `choices` above


# ---- effective sample size, combination, join ---------------------------------------------------------------------

@quick
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.floats(1e-3, 1e3))
def test_effective_sample_size_lies_between_one_and_n(weights, scale):
    size = effective_sample_size(weights)
    assert 1 - 1e-12 <= size <= len(weights) * (1 + 1e-12)
    assert size == pytest.approx(math.fsum(weights) ** 2 / math.fsum(w * w for w in weights), rel=1e-9)
    assert effective_sample_size(np.array(weights) * scale) == pytest.approx(size, rel=1e-9)
    assert effective_sample_size([*weights, 0.0]) == pytest.approx(size, rel=1e-9)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, np.nan], [1, np.inf], [[1, 2]], 3.0])
def test_effective_sample_size_of_what_is_no_weights(weights):
    with pytest.raises(DataError, match="no effective sample size"):
        effective_sample_size(weights)


def test_effective_sample_size_of_huge_weights():
    assert effective_sample_size([1e300, 1e300]) == 2


@quick
@given(npst.arrays(float, st.tuples(st.integers(1, 20), st.integers(1, 4)), elements=st.sampled_from([-3.0, 0.0, 0.1, 5.0, 1e6])))
def test_mean_rank_is_the_mean_of_ranks(values):
    table = pd.DataFrame(values, columns=[f"e{j}" for j in range(values.shape[1])])
    expected = (sps.rankdata(values, axis=0).mean(axis=1) - 0.5) / len(values)
    combined = mean_rank(table)
    np.testing.assert_allclose(combined, expected, rtol=1e-12)
    assert combined.name == "mean_rank" and combined.mean() == pytest.approx(0.5)
    np.testing.assert_allclose(mean_rank(table * 3 + 1), expected, rtol=1e-12)  # units do not matter
    np.testing.assert_allclose(mean_rank(table.assign(e0_se=1e9)), expected, rtol=1e-12)


def test_mean_rank_names_what_is_wrong():
    with pytest.raises(DataError, match="column 'b'.*sample_id 'y'"):
        mean_rank(pd.DataFrame({"a": [1, 2], "b": [1, np.nan]}, index=["x", "y"]))
    with pytest.raises(DataError, match="column 'sample_id'.*'x'"):
        mean_rank(pd.DataFrame({"a": [1, 2]}, index=["x", "x"]))
    for nothing in (pd.Series([1.0]), pd.DataFrame(index=["x"])):
        with pytest.raises(DataError, match="no estimators to combine"):
            mean_rank(nothing)


def table(ids="abcdz") -> pd.DataFrame:
    return pd.DataFrame({"sample_id": list(ids), "gain": 0.5, "split": ["train"] * (len(ids) - 1) + ["test"]}, index=range(10, 10 + len(ids)))


def test_apply_weights_joins_by_id_and_leaves_zeros_out():
    weights = pd.Series({"d": 0.0, "c": 1.0, "b": 2.0, "a": 1.0})
    joined = apply_weights(table(), weights)
    assert joined["sample_id"].tolist() == ["a", "b", "c"] and joined.index.tolist() == [10, 11, 12]
    np.testing.assert_allclose(joined["weight"], [0.75, 1.5, 0.75])
    whole = apply_weights(table(), weights, drop_zero=False)
    assert whole["weight"].tolist() == [1, 2, 1, 0]
    assert apply_weights(table()[:4].drop(columns="split"), weights, drop_zero=False)["weight"].tolist() == [1, 2, 1, 0]
    assert "weight" not in table() and apply_weights(whole, weights)["weight"].tolist() == joined["weight"].tolist()


@pytest.mark.parametrize(("weights", "words"), [
    (pd.Series(1.0, index=list("abc")), "1 training rows have no weight: 'd'"),
    (pd.Series(1.0, index=list("abcde")), "1 weights belong to no training row: 'e'"),
    (pd.Series(1.0, index=list("abcdz")), "'z'; 1 of them to rows of another split"),
    (pd.Series(1.0, index=list("abcdd")), "share their sample_id"),
    (pd.Series([1, 1, 2, -0.0001], index=list("abcd")), "negative or not finite; sample_id 'd'"),
    (pd.Series([1, 1, 2, np.nan], index=list("abcd")), "negative or not finite; sample_id 'd'"),
    (pd.Series(0.0, index=list("abcd")), "all weights are 0"),
    (pd.Series(2.0, index=list("abcd")), "mean 2"),
    (pd.Series(dtype=float), "the weights are empty"), ([1, 1, 1, 1], "the weights are a list"),
])
def test_weights_that_do_not_fit(weights, words):
    with pytest.raises(DataError, match=words):
        apply_weights(table(), weights)


def test_samples_that_do_not_fit():
    weights = pd.Series(1.0, index=list("abcd"))
    with pytest.raises(DataError, match="2 of the samples share their sample_id with another: 'b'"):
        apply_weights(table("abbdz"), weights)
    with pytest.raises(DataError, match="no column sample_id"):
        apply_weights(table().set_index("sample_id"), weights)
    numbered = table().assign(sample_id=[1, 2, 3, 4, 5])
    with pytest.raises(DataError, match="equal as text: give both the same type"):
        apply_weights(numbered, pd.Series(1.0, index=["1", "2", "3", "4"]))
    assert check_weights(pd.Series([1, 1], index=list("ab"))).dtype == np.float64


def test_many_rows_keep_the_mean_exact():
    rng = np.random.default_rng(0)
    scores = pd.Series(rng.standard_cauchy(200_000))
    query = pd.Series(rng.integers(0, 20_000, 200_000))
    for settings_ in ({}, {"how": "softmax", "floor": 0.1, "ceiling": 3}, {"how": "top_fraction", "fraction": 0.1, "floor": 0.1}, {"balance": "equal", "group": query, "floor": 0.2, "ceiling": 1.8}):
        assert abs(weigh(scores, **settings_).mean() - 1) < 1e-12
    twos = np.repeat([0.0, np.log(0.1)], 100_000)
    assert abs(fill_to_mean_one(twos).mean() - 1) < 1e-14
    assert (log_top_fraction(scores, np.zeros(200_000), fraction=0.25) == 0).sum() == 50_000


# ---- exposure -----------------------------------------------------------------------------------------------------

def log(**columns) -> pd.DataFrame:
    return pd.DataFrame({"sample_id": list("abcd"), "split": "train", "propensity": [1.0, 0.5, 0.05, 0.2], "gain": [1.0, 1.0, 0.5, 0.0]} | columns)


def test_clicks_weigh_the_inverse_of_their_propensity():
    weights = inverse_propensity(log(), clip=0.1)
    np.testing.assert_allclose(weights, np.array([1, 2, 10, 1]) / 3.5)
    assert weights.attrs["clip_rate"] == pytest.approx(1 / 3) and weights.index.name == "sample_id"
    np.testing.assert_allclose(inverse_propensity(log(), clip=1), 1)
    np.testing.assert_allclose(inverse_propensity(log(gain=0.0)), 1)


def test_only_training_rows_and_only_clicks_need_a_propensity():
    table = log(split=["train", "train", "test", "train"], propensity=[1.0, 0.5, np.nan, np.nan])
    np.testing.assert_allclose(inverse_propensity(table), np.array([1, 2, 1]) / (4 / 3))


def test_weighted_clicks_are_unbiased():
    "The share of relevant items by place, from clicks under the position-based model, against the truth."
    rng = np.random.default_rng(1)
    place, relevant = rng.integers(1, 6, 100_000), rng.random(100_000) < 0.4
    clicks = relevant & (rng.random(100_000) < 1 / place)
    weights = inverse_propensity(pd.DataFrame({"sample_id": range(100_000), "propensity": 1 / place, "gain": clicks.astype(float)}))
    found = pd.Series(weights.to_numpy() * clicks).groupby(place).sum()
    truth = pd.Series(relevant).groupby(place).sum()
    np.testing.assert_allclose(found / found.sum(), truth / truth.sum(), rtol=0.05)


@pytest.mark.parametrize(("table", "settings_", "words"), [
    (log(), {"clip": 0}, "clip is 0"), (log(), {"clip": 1.5}, "clip is 1.5"),
    (log().drop(columns="propensity"), {}, "no column propensity.*estimate_propensities"),
    (log(propensity=[1, np.nan, 0.5, 1]), {}, "1 clicked rows have no propensity.*'b'"), (log(propensity=[1, 0.0, 1.5, 1]), {}, "2 clicked rows"),
    (log(sample_id=list("abbc")), {}, "share their sample_id"), (log(split="test"), {}, "no training rows"),
])
def test_propensities_that_cannot_be_used(table, settings_, words):
    with pytest.raises(DataError, match=words):
        inverse_propensity(table, **settings_)


@quick
@given(st.lists(st.lists(st.floats(0.01, 10), min_size=6, max_size=6), min_size=1, max_size=3), st.permutations(range(6)))
def test_the_product_of_factors(values, order):
    factors = [pd.Series(each, index=list("abcdef")) / np.mean(each) for each in values]
    product = times(*factors[:1], *[factor.iloc[order] for factor in factors[1:]])
    raw = np.prod(values, axis=0)
    np.testing.assert_allclose(product, raw / raw.mean(), rtol=1e-9)
    assert list(product.index) == list("abcdef")


@pytest.mark.parametrize(("factors", "words"), [
    ([], "no weights to multiply"),
    ([pd.Series([1.0, 1.0], index=["a", "b"]), pd.Series([1.0, 1.0], index=["a", "c"])], "no training row: 'c'"),
    ([pd.Series([2.0, 0.0], index=["a", "b"]), pd.Series([0.0, 2.0], index=["a", "b"])], "above 0 in all factors"),
    ([pd.Series([3.0, 1.0], index=["a", "b"])], "mean 2"),
])
def test_factors_that_have_no_product(factors, words):
    with pytest.raises(DataError, match=words):
        times(*factors)
