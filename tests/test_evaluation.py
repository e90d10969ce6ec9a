"""Metrics against their peers, statistics against enumeration, bad input against its message."""
import json
import subprocess
import sys
import time
import tracemalloc
from itertools import permutations, product
from math import comb, log2

import numpy as np
import pandas as pd
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import sklearn.cluster
import sklearn.metrics as peer
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ecom_importance import evaluation as ev

SAME = dict(rtol=1e-12, atol=1e-12)
many, some = (settings(max_examples=n, deadline=None, derandomize=True) for n in (100, 40))

tied = st.integers(-3, 3).map(float)                                  # few values: many ties
fine = st.floats(-1e3, 1e3).map(lambda v: round(v, 3))
number = st.one_of(tied, fine)


@st.composite
def columns(draw, *kinds, low=1, high=30):
    "Lists of one random length, one of each kind, as arrays."
    n = draw(st.integers(low, high))
    return tuple(np.array(draw(st.lists(kind, min_size=n, max_size=n))) for kind in kinds)


def same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, **SAME)


# ------------------------------------------------------------------ classification and regression against scikit-learn and SciPy

@many
@given(columns(st.integers(0, 1), st.integers(0, 1)))
def test_decisions_equal_scikit_learn(data):
    y, z = data
    same(ev.accuracy(y, z), peer.accuracy_score(y, z))
    assume(y.any())
    same(ev.precision(y, z), peer.precision_score(y, z, zero_division=0))
    same(ev.recall(y, z), peer.recall_score(y, z))
    same(ev.f1(y, z), peer.f1_score(y, z))


@many
@given(columns(st.sampled_from(["E", "S", "无关"]), st.sampled_from(["E", "S", "无关"])))
def test_decisions_on_string_labels(data):
    y, z = data
    same(ev.accuracy(y, z), peer.accuracy_score(y, z))
    assume("无关" in y)
    same(ev.f1(y, z, positive="无关"), peer.f1_score(y == "无关", z == "无关"))


@many
@given(columns(st.integers(0, 1), number))
def test_auc_and_average_precision_equal_scikit_learn(data):
    y, s = data
    assume(0 < y.sum())
    same(ev.average_precision(y, s), peer.average_precision_score(y, s))
    assume(y.sum() < len(y))
    same(ev.roc_auc(y, s), peer.roc_auc_score(y, s))
    same(ev.roc_auc(y, s), np.mean([(p > n) + .5 * (p == n) for p, n in product(s[y == 1], s[y == 0])]))


@many
@given(columns(st.integers(0, 1), st.one_of(st.sampled_from([0., 1., .5]), st.floats(0, 1))))
def test_log_loss_equals_scikit_learn(data):
    y, p = data
    same(ev.log_loss(y, p), peer.log_loss(y, p, labels=[0, 1]))


@many
@given(columns(st.floats(0, 1), st.floats(1e-9, 1 - 1e-9)))
def test_log_loss_of_soft_labels_equals_scipy(data):
    y, p = data
    by_divergence = (scipy.special.entr(y) + scipy.special.entr(1 - y)
                     + scipy.special.rel_entr(y, p) + scipy.special.rel_entr(1 - y, 1 - p)).mean()
    same(ev.log_loss(y, p), by_divergence)


@many
@given(columns(number, number))
def test_squared_error_equals_scikit_learn(data):
    y, z = data
    same(ev.mse(y, z), peer.mean_squared_error(y, z))
    same(ev.rmse(y, z), peer.root_mean_squared_error(y, z))


@many
@given(columns(number, number, low=3))
def test_agreement_equals_scipy(data):
    a, b = data
    assume(np.linalg.norm(a) > 0 and np.linalg.norm(b) > 0)
    same(ev.cosine(a, b), 1 - scipy.spatial.distance.cosine(a, b))
    assume(np.ptp(a) > 0 and np.ptp(b) > 0)
    same(ev.pearson(a, b), scipy.stats.pearsonr(a, b).statistic)
    same(ev.spearman(a, b), scipy.stats.spearmanr(a, b).statistic)
    same(ev.midranks(a), scipy.stats.rankdata(a))


def test_worked_examples():
    same(ev.mse([0, 1], [.3, .7]), .09)
    assert round(ev.log_loss([0, 1], [.3, .7]), 4) == .3567
    assert round(ev.cosine([1, 2, 3], [2, 3, 4]), 4) == .9926
    assert ev.roc_auc([0, 1], [.5, .5]) == .5
    same(ev.cosine([1e-300, 0], [1e-300, 1e-300]), 2 ** -.5)
    same(ev.cosine([1e300, 0], [1e300, 1e300]), 2 ** -.5)


# ------------------------------------------------------------------ ranked lists

@many
@given(columns(st.integers(0, 4).map(float), number, low=2), st.one_of(st.none(), st.integers(1, 35)))
def test_ndcg_and_dcg_equal_scikit_learn_with_ties(data, k):
    g, s = data
    same(ev.dcg(g, s, k), peer.dcg_score([g], [s], k=k))
    same(ev.dcg(g, s, k, form="exponential"), peer.dcg_score([2 ** g - 1], [s], k=k))
    assume(g.any())
    same(ev.ndcg(g, s, k), peer.ndcg_score([g], [s], k=k))
    same(ev.ndcg(g, s, k, "exponential"), peer.ndcg_score([2 ** g - 1], [s], k=k))


def strict_orders(scores):
    for order in permutations(range(len(scores))):
        if all(scores[order[i]] >= scores[order[i + 1]] for i in range(len(order) - 1)):
            yield list(order)


def plain(name, rel, k):
    "The textbook metric of a list in its order."
    n, k, hits = len(rel), k or len(rel), [i + 1 for i, r in enumerate(rel) if r > 0]
    if name == "mrr":
        return 1 / hits[0] if hits[0] <= k else 0
    if name == "hit_rate":
        return float(hits[0] <= k)
    if name == "average_precision_at":
        return sum((j + 1) / place for j, place in enumerate(hits) if place <= k) / len(hits)
    return sum(rel[i] / log2(i + 2) for i in range(min(n, k)))


@some
@given(columns(st.integers(0, 2).map(float), st.integers(0, 2).map(float), low=1, high=6), st.one_of(st.none(), st.integers(1, 7)))
def test_ties_are_the_mean_over_all_their_orders(data, k):
    g, s = data
    assume(g.any())
    orders = [g[order] for order in strict_orders(s)]
    for name in ("mrr", "hit_rate", "average_precision_at", "dcg"):
        same(getattr(ev, name)(g, s, k), np.mean([plain(name, rel, k) for rel in orders]))


@some
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).filter(any), min_size=1, max_size=6), st.integers(1, 12), st.randoms())
def test_ranking_equals_ir_measures(queries, k, random):
    ir = pytest.importorskip("ir_measures", reason="ir-measures is not installed")
    query, gain, score = [], [], []
    for number, grades in enumerate(queries):
        places = list(range(len(grades)))
        random.shuffle(places)                                      # no ties: trec_eval breaks them by document name
        query += [f"q{number}"] * len(grades)
        gain += grades
        score += [float(p) for p in places]
    docs = [f"d{i}" for i in range(len(query))]
    qrels = [ir.Qrel(q, d, g) for q, d, g in zip(query, docs, gain)]
    run = [ir.ScoredDoc(q, d, s) for q, d, s in zip(query, docs, score)]
    for name, measure, cut in [("ndcg", ir.nDCG @ k, k), ("ndcg", ir.nDCG, None), ("mrr", ir.RR, None), ("mrr", ir.RR @ k, k),
                               ("average_precision_at", ir.AP, None), ("average_precision_at", ir.AP @ k, k), ("hit_rate", ir.Success @ k, k)]:
        theirs = {m.query_id: m.value for m in ir.iter_calc([measure], qrels, run)}
        ids, values = ev.per_query(name, query, gain, score, k=cut)
        same(values, [theirs[i] for i in ids])
    same(ev.mean_average_precision(query, gain, score), ir.calc_aggregate([ir.AP], qrels, run)[ir.AP])


def test_a_tie_across_the_cut_has_its_hypergeometric_chance():
    relevance = np.r_[np.ones(3), np.zeros(47)]
    same(ev.hit_rate(relevance, np.zeros(50), 10), 1 - comb(47, 10) / comb(50, 10))
    assert ev.hit_rate(np.ones(4), np.zeros(4), 1) == 1 and ev.mrr(np.ones(4), np.zeros(4)) == 1


def test_long_tied_list_stays_exact():
    relevance = (np.arange(20_000) % 1000 == 0).astype(float)
    found, n = 20, 20_000
    same(ev.average_precision_at(np.ones(3), np.zeros(3)), 1)
    places = np.arange(1, n + 1)
    expected = (found / n * (1 + (places - 1) * (found - 1) / (n - 1)) / places).sum() / found
    same(ev.average_precision_at(relevance, np.zeros(n)), expected)
    same(ev.ndcg(relevance, np.zeros(n)), found / n * (1 / np.log2(places + 1)).sum() / (1 / np.log2(places[:found] + 1)).sum())


# ------------------------------------------------------------------ tables of queries

@many
@given(columns(st.integers(0, 5), st.integers(0, 2).map(float), tied, low=1, high=40), st.one_of(st.none(), st.integers(1, 6)), st.randoms())
def test_per_query_equals_one_list_at_a_time_in_any_row_order(data, k, random):
    q, g, s = data
    shuffled = np.array(random.sample(range(len(q)), len(q)))
    for name in ("ndcg", "dcg", "mrr", "average_precision_at", "hit_rate"):
        ids, values = ev.per_query(name, q, g, s, k=k)
        assert ids.tolist() == sorted(set(q.tolist()))
        for one, value in zip(ids, values):
            if name != "dcg" and not g[q == one].any():
                assert np.isnan(value)
            else:
                same(value, getattr(ev, name)(g[q == one], s[q == one], k))
        again_ids, again = ev.per_query(getattr(ev, name), q[shuffled], g[shuffled], s[shuffled], k=k)
        assert (ids == again_ids).all()
        same(again, values)


def test_per_query_takes_any_metric_and_only_undefined_becomes_nan():
    ids, values = ev.per_query(ev.roc_auc, ["b", "b", "a", "a", "c"], [1, 0, 1, 1, 0], [2, 1, 2, 1, 0])
    assert ids.tolist() == ["a", "b", "c"]
    np.testing.assert_array_equal(values, [np.nan, 1, np.nan])
    with pytest.raises(ValueError, match="expected 0 and 1"):
        ev.per_query(ev.roc_auc, [1, 1], [.5, 0], [2, 1])
    with pytest.raises(ZeroDivisionError):
        ev.per_query(lambda r, s: 1 / 0, [1], [1], [1])


def test_per_query_takes_pandas_and_string_ids():
    frame = pd.DataFrame({"query_id": ["鞋", "鞋", "x"], "gain": [0., 1, 1], "score": [1., 1, 3]}, index=[7, 8, 9])
    ids, values = ev.per_query(ev.ndcg, frame["query_id"], frame["gain"], frame["score"])
    assert ids.tolist() == ["x", "鞋"]
    same(values, [1, (1 + 1 / np.log2(3)) / 2])
    boxed = np.array([np.int64(2), np.int64(1)], dtype=object)
    assert ev.per_query("mrr", boxed, [1, 1], [0, 0])[0].tolist() == [1, 2]


@pytest.mark.parametrize("as_id", [int, "query {}".format], ids=["numbers", "strings"])
def test_per_query_is_fast(as_id):
    rng = np.random.default_rng(0)
    q = pd.Series([as_id(i % 2000) for i in rng.permutation(20_000)])
    g, s = rng.integers(0, 3, 20_000), rng.normal(size=20_000)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        ev.per_query("ndcg", q, g, s, k=10)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < .2


def test_ranking_metric_keeps_the_same_queries_whatever_the_scores():
    q = np.array(["short"] * 2 + ["none"] * 8 + ["good"] * 8)
    g = np.r_[1, 0, np.zeros(8), 1, .5, np.zeros(6)]
    for s in (np.arange(18.), -np.arange(18.), np.zeros(18)):
        ids, values = ev.HOME_DEPOT.per_query(q, g, s)
        assert ids.tolist() == ["good"]
        same(values, peer.ndcg_score([2 ** (2 * g[10:]) - 1], [s[10:]], k=3))
        same(ev.HOME_DEPOT.mean(q, g, s), values.mean())
    assert ev.RankingMetric("mrr", k=None).per_query(q, g, -np.arange(18.))[1].tolist() == [1, 1]


def test_ranking_metric_prints_its_choices_and_is_frozen():
    assert str(ev.HOME_DEPOT) == "NDCG@3 (exponential gain 2^g − 1, grades 0–2, queries of at least 8 items)"
    assert str(ev.SEARCH_DEMO) == str(ev.RECOMMENDATION_DEMO) == "NDCG@10 (linear gain g, grades 0–1, queries of at least 2 items)"
    assert str(ev.RankingMetric("mrr", None)) == "MRR (relevant where the gain is above 0, queries of at least 1 item)"
    with pytest.raises(AttributeError):
        ev.HOME_DEPOT.k = 5


# ------------------------------------------------------------------ statistics

@some
@given(st.lists(st.one_of(st.integers(-3, 3).map(float), fine), min_size=1, max_size=10))
def test_randomisation_equals_enumeration(d):
    d = np.array(d)
    sums = np.array([abs(np.dot(d, signs)) for signs in product([1, -1], repeat=len(d))])
    exact = np.mean(sums >= abs(d.sum()) - 1e-9)
    assert ev.randomisation_p(d) == exact
    if len(d) >= 8:                                                   # too few draws for all patterns: the drawn p must be near
        drawn = ev.randomisation_p(d, n_resamples=2 ** len(d) - 1, seed=1)
        assert abs(drawn - exact) < 5 * np.sqrt(exact * (1 - exact) / 255) + 2 / 256


def test_randomisation_is_level_under_the_null_and_finds_an_effect():
    rng = np.random.default_rng(0)
    p = np.array([ev.randomisation_p(rng.standard_t(3, size=60), n_resamples=400, seed=i) for i in range(400)])
    assert abs((p <= .05).mean() - .05) < 3.5 * np.sqrt(.05 * .95 / 400)
    assert ev.randomisation_p(rng.normal(size=400) + .5) == 1 / 10_001


def test_crossed_bootstrap_has_the_moments_of_its_definition():
    "Exact variance of the resampled mean, by the law of total variance over multinomial counts."
    rng = np.random.default_rng(0)
    d = rng.normal(size=(4, 6)) + rng.normal(size=(4, 1)) + rng.normal(size=(1, 6))
    s, q = d.shape
    by_seed = d.mean(1, keepdims=True)
    stretched = d - by_seed + d.mean() + np.sqrt(s / (s - 1)) * (by_seed - d.mean())
    cov_s, cov_q = (np.eye(n) / n - 1 / n ** 2 for n in (s, q))
    cov_s, cov_q = cov_s / s, cov_q / q
    second = sum((cov_s[a, c] + 1 / s ** 2) * (cov_q[b, e] + 1 / q ** 2) * stretched[a, b] * stretched[c, e]
                 for a in range(s) for c in range(s) for b in range(q) for e in range(q))
    variance = second - d.mean() ** 2
    means = ev.crossed_bootstrap(d, n_resamples=60_000)
    assert abs(means.mean() - d.mean()) < 4 * np.sqrt(variance / 60_000)
    np.testing.assert_allclose(means.var(), variance, rtol=.04)
    both = ev.crossed_bootstrap(np.stack([d, 2 * d]), n_resamples=50, seed=3)
    same(both, np.stack([ev.crossed_bootstrap(d, n_resamples=50, seed=3)] * 2, axis=1) * [1, 2])


@pytest.mark.parametrize("n_seeds", [2, 3, 10])
def test_resampled_seeds_vary_as_seeds_do(n_seeds):
    "Where only seeds differ, the variance of the mean is the unbiased s^2 / S; a plain bootstrap gives (S - 1) / S of it."
    by_seed = np.random.default_rng(n_seeds).normal(size=n_seeds)
    means = ev.crossed_bootstrap(np.tile(by_seed[:, None], 40), n_resamples=40_000)
    np.testing.assert_allclose(means.var(), by_seed.var(ddof=1) / n_seeds, rtol=.04)
    one = np.random.default_rng(0).normal(size=(1, 40))                   # one seed: nothing to stretch, only queries vary
    np.testing.assert_allclose(ev.crossed_bootstrap(one, n_resamples=40_000).var(), one.var() / 40, rtol=.04)


def test_draws_are_made_once_for_tables_of_one_size_and_are_those_of_a_table_too_large_to_keep(monkeypatch):
    rng, drawn, real = np.random.default_rng(0), [], ev._draws
    monkeypatch.setattr(ev, "_draws", lambda *size: drawn.append(size) or real(*size))
    ev._kept_draws.cache_clear()
    a, b = rng.normal(size=(2, 3, 50))
    kept = [ev.crossed_bootstrap(table, n_resamples=200, seed=1) for table in (a, b, a)]
    assert drawn == [(3, 50, 200, 1)]
    np.testing.assert_array_equal(kept[0], kept[2])
    monkeypatch.setattr(ev, "KEEP_UP_TO", 0)
    np.testing.assert_array_equal(ev.crossed_bootstrap(a, n_resamples=200, seed=1), kept[0])
    assert len(drawn) == 2


@pytest.mark.parametrize("seed_effect, query_effect", [(0, 1), (.1, 1), (.05, .3)])
def test_the_interval_covers(seed_effect, query_effect):
    rng, hits, repeats = np.random.default_rng(5), 0, 300
    for repeat in range(repeats):
        d = seed_effect * rng.normal(size=(10, 1)) + query_effect * rng.normal(size=(1, 150)) + .5 * rng.normal(size=(10, 150))
        v = ev.compare(d + .2, np.full(150, .2), n_resamples=400, seed=repeat)
        hits += v.low <= 0 <= v.high
    share, error = hits / repeats, np.sqrt(.05 * .95 / repeats)
    assert .95 - 3.5 * error < share, share
    if seed_effect < .1 and query_effect == 1:
        assert share < .95 + 3.5 * error, share


def test_compare_counts_what_it_says():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 200)), rng.random(200)
    v = ev.compare(a, b, names=("weighted", "uniform"), metric="NDCG@3", n_resamples=2000)
    assert (v.n_seeds, v.n_queries, v.level) == (3, 200, .95)
    same([v.effect, v.mean_a, v.mean_b], [a.mean() - b.mean(), a.mean(), b.mean()])
    same(v.p, ev.randomisation_p(a.mean(0) - b, n_resamples=2000))
    means = ev.crossed_bootstrap(a - b, n_resamples=2000)
    same([v.low, v.high], np.quantile(means, [.025, .975]))
    same(v.resolves, (scipy.stats.norm.ppf(.975) + scipy.stats.norm.ppf(.8)) * means.std(ddof=1))
    assert v == ev.compare(a, np.tile(b, (3, 1)), names=("weighted", "uniform"), metric="NDCG@3", n_resamples=2000)
    other = ev.compare(b, a, n_resamples=2000)
    same([other.effect, other.low, other.high], [-v.effect, -v.high, -v.low])
    assert json.loads(json.dumps(v.as_dict()))["sentence"] == v.sentence == str(v)


def test_resolves_is_found_with_eighty_per_cent_power():
    rng, found = np.random.default_rng(1), 0
    for repeat in range(300):
        noise = rng.normal(size=200)
        found += ev.compare(noise + 2.8016 / np.sqrt(200), np.zeros(200), n_resamples=300, seed=repeat).kind == "helps"
    assert abs(found / 300 - .8) < 3.5 * np.sqrt(.8 * .2 / 300)
    v = ev.compare(noise, np.zeros(200))
    np.testing.assert_allclose(v.resolves, 2.8016 * noise.std() / np.sqrt(200), rtol=.03)


@pytest.mark.parametrize("shift, kind, opening", [(.1, "helps", "weighted helps: NDCG +0.1"), (-.1, "hurts", "weighted hurts: NDCG −0.1"),
                                                  (0, "no evidence", "No evidence that weighted helps or hurts: NDCG ")])
def test_the_three_sentences(shift, kind, opening):
    noise = np.random.default_rng(2).normal(size=500) * .1
    v = ev.compare(noise - noise.mean() + shift, np.zeros(500), names=("weighted", "uniform"), metric="NDCG", n_resamples=1000)
    assert v.kind == kind and v.sentence.startswith(opening) and "500 queries, 1 seed;" in v.sentence and "against uniform" in v.sentence
    assert ("helps" in v.sentence) == (kind != "hurts")
    assert "one training, which says nothing of other seeds" in v.sentence
    several = ev.compare(np.tile(noise + shift, (2, 1)), np.zeros(500), n_resamples=100)
    assert "2 seeds;" in several.sentence and "one training" not in several.sentence


def test_equal_arms_are_no_evidence():
    a = np.random.default_rng(0).random((2, 30))
    v = ev.compare(a, a)
    assert (v.effect, v.low, v.high, v.p, v.resolves, v.kind) == (0, 0, 0, 1, 0, "no evidence")


def test_compare_is_fast_and_small():
    rng = np.random.default_rng(0)
    a, b = rng.random((10, 1500)), rng.random((10, 1500))
    tracemalloc.start()
    ev.compare(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    started = time.perf_counter()
    ev.compare(a, b)
    assert time.perf_counter() - started < 3 and peak < 500e6


def test_holm_by_hand():
    same(ev.holm([.01, .04, .03, .005]), [.03, .06, .06, .02])        # 3 x .01, not below .06, 2 x .03, 4 x .005
    same(ev.holm([.5, .9]), [1, 1])
    same(ev.holm([.2]), [.2])


@many
@given(st.lists(st.one_of(st.sampled_from([0., .01, .05, 1.]), st.floats(0, 1)), min_size=1, max_size=12), st.sampled_from([.01, .05, .2]))
def test_holm_rejects_what_the_step_down_procedure_rejects(p, level):
    "Holm's own wording: go through the sorted p-values and stop at the first above level / (number left)."
    rejected = set()
    for i, index in enumerate(sorted(range(len(p)), key=lambda j: p[j])):
        if p[index] * (len(p) - i) > level:
            break
        rejected.add(index)
    assert {i for i, adjusted in enumerate(ev.holm(p)) if adjusted <= level} == rejected


def test_recovery_gives_a_share_only_of_a_loss_it_can_resolve():
    rng = np.random.default_rng(0)
    base, noise = rng.random(800), lambda: .03 * rng.normal(size=(5, 800))
    clean, uniform, arm = base + noise(), base - .10 + noise(), base - .04 + noise()
    r = ev.recovery(clean, uniform, arm, names=("clean", "uniform", "weighted"), metric="NDCG@3", n_resamples=2000)
    same(r.share, (arm.mean() - uniform.mean()) / (clean.mean() - uniform.mean()))
    assert r.resolvable and r.low < .6 < r.high and .55 < r.low and r.high < .65
    means = ev.crossed_bootstrap(np.stack([arm - uniform, clean - uniform]), n_resamples=2000)
    np.testing.assert_allclose([r.low, r.high], np.quantile(means[:, 0] / means[:, 1], [.025, .975]), rtol=1e-3)
    assert "weighted wins back 60 %" in r.sentence
    small = ev.recovery(clean, clean - .0099, arm, n_resamples=500)
    assert not small.resolvable and (small.share, small.low, small.high) == (None, None, None) and "too small" in small.sentence
    same([small.lost.effect, small.won.effect], [.0099, arm.mean() - clean.mean() + .0099])
    shaky = rng.normal(size=800)
    wide = ev.recovery(clean + .02 + shaky - shaky.mean(), clean, clean, n_resamples=500)     # a loss of 0.02, but a wide interval
    assert wide.lost.effect > .01 > wide.lost.low and not wide.resolvable and wide.share is None
    assert ev.recovery(clean, clean - .0101, clean, n_resamples=500).share == pytest.approx(1)
    assert ev.recovery(clean, clean - .0101, clean, floor=.02, n_resamples=500).share is None
    for result in (r, small):
        assert json.loads(json.dumps(result.as_dict()))["lost"]["n_queries"] == 800


def test_recovery_is_the_same_for_the_arms_it_knows():
    rng = np.random.default_rng(3)
    clean, uniform = rng.random((4, 300)) + .5, rng.random((4, 300))
    whole, none = (ev.recovery(clean, uniform, arm, n_resamples=500) for arm in (clean, uniform))
    same([whole.share, whole.low, whole.high], [1, 1, 1])
    same([none.share, none.low, none.high], [0, 0, 0])


def test_non_inferiority_looks_at_the_lower_end():
    noise = np.random.default_rng(0).normal(size=1000) * .01
    v = ev.compare(noise - noise.mean(), np.zeros(1000), n_resamples=1000)
    assert ev.is_non_inferior(v) and not ev.is_non_inferior(v, margin=1e-5)
    assert ev.is_non_inferior(v, -v.low + 1e-9) and not ev.is_non_inferior(v, -v.low)


# ------------------------------------------------------------------ detection

@many
@given(columns(st.integers(0, 1), number, low=2, high=40), st.floats(.01, 1))
def test_detection_figures(data, budget):
    noise, s = data
    assume(0 < noise.sum() < len(noise))
    figures = ev.detection(s, noise, budgets=(budget,))
    same(figures["auroc"], peer.roc_auc_score(noise, -s))
    same(figures["ap"], peer.average_precision_score(noise, -s))
    looked = max(1, round(budget * len(s)))
    rng, total = np.random.default_rng(0), []
    for _ in range(1 if len(set(s)) == len(s) else 400):
        total.append(noise[np.lexsort((rng.random(len(s)), s))][:looked].sum())
    assert abs(figures[f"precision@{budget:g}"] * looked - np.mean(total)) <= 5 * np.std(total) / 20 + 1e-9
    same(figures[f"recall@{budget:g}"] * noise.sum(), figures[f"precision@{budget:g}"] * looked)


def test_detection_at_the_stated_budgets():
    noise = np.arange(100) < 20
    figures = ev.detection(np.arange(100.), noise)
    assert list(figures) == ["auroc", "ap", *[f"{what}@{b:g}" for b in (.05, .1, .2, .4) for what in ("precision", "recall")], "kmeans_f1"]
    same([figures["precision@0.05"], figures["recall@0.05"], figures["precision@0.4"], figures["recall@0.4"]], [1, .25, .5, 1])
    assert ev.detection(np.zeros(100), noise)["kmeans_f1"] == 0
    assert ev.detection(-1. * noise, noise)["kmeans_f1"] == 1


@some
@given(st.lists(st.one_of(tied, fine), min_size=2, max_size=25).filter(lambda v: len(set(v)) > 1))
def test_two_means_is_the_best_of_all_cuts_and_no_worse_than_k_means(values):
    v = np.sort(values)
    inertia = lambda edge: sum(((part - part.mean()) ** 2).sum() for part in (v[v <= edge], v[v > edge]))
    best = min(inertia(edge) for edge in set(v[:-1]) - {v[-1]})
    ours = inertia(ev.two_means(values))
    np.testing.assert_allclose(ours, best, rtol=1e-9, atol=1e-9)
    assert ours <= sklearn.cluster.KMeans(2, n_init=2, random_state=0).fit(v[:, None]).inertia_ + 1e-6


def test_two_means_does_not_lose_its_digits_far_from_zero():
    assert ev.two_means(np.array([0, .1, .2, 5, 5.1]) + 1e9) == pytest.approx(1e9 + .2, abs=1e-6)


# ------------------------------------------------------------------ bad input

nan, inf = np.nan, np.inf


@pytest.mark.parametrize("call, says", [
    (lambda: ev.accuracy([], []), "y_true: expected a non-empty list"),
    (lambda: ev.accuracy([1, 0], [1]), "lengths differ: y_true has 2, y_pred has 1"),
    (lambda: ev.accuracy([1, None], [1, 0]), "y_true: 1 values are missing, first at positions .1."),
    (lambda: ev.accuracy(pd.array([1, None], dtype="Int64"), [1, 0]), "missing"),
    (lambda: ev.accuracy([1., nan], [1, 0]), "missing"),
    (lambda: ev.accuracy([1, 0], ["1", "0"]), "one holds strings, the other numbers"),
    (lambda: ev.mse([1, 2], [1, nan]), "y_pred: 1 of 2 values are NaN or infinite, first at positions .1."),
    (lambda: ev.mse([inf], [1]), "y_true: 1 of 1 values are NaN or infinite"),
    (lambda: ev.mse(["a"], [1]), "y_true: not numbers"),
    (lambda: ev.mse([[1, 2]], [1]), "expected one dimension"),
    (lambda: ev.roc_auc([0, 2], [1, 2]), "expected 0 and 1, found 2"),
    (lambda: ev.roc_auc([0, 1], [1, nan]), "scores: 1 of 2"),
    (lambda: ev.log_loss([0, 1], [.5, 1.5]), "probability: expected values from 0 to 1, found 1.5"),
    (lambda: ev.log_loss([0, 2], [.5, .5]), "y_true: expected values from 0 to 1"),
    (lambda: ev.pearson([], []), "empty"),
    (lambda: ev.cosine([1, 2], [1]), "lengths differ"),
    (lambda: ev.ndcg([1, -1], [1, 2]), "relevance: expected 0 or more, found -1"),
    (lambda: ev.ndcg([1, 0], [1, nan]), "NaN"),
    (lambda: ev.ndcg([1, 0], [1, 2], form="log"), "expected 'linear' or 'exponential', found 'log'"),
    (lambda: ev.ndcg([500, 0], [1, 2], form="exponential"), "too large"),
    (lambda: ev.ndcg([1, 0], [1, 2], k=0), "k: expected a whole number from 1"),
    (lambda: ev.mrr([1, 0], [1, 2], k=2.5), "k: expected"),
    (lambda: ev.hit_rate([1, 0], [1, 2], k=True), "k: expected"),
    (lambda: ev.per_query("nDCG", [1], [1], [1]), "unknown name 'nDCG'; known: dcg, ndcg"),
    (lambda: ev.per_query("ndcg", [1, 2], [1], [1]), "lengths differ: query_id has 2"),
    (lambda: ev.per_query("ndcg", [], [], []), "query_id: expected a non-empty list"),
    (lambda: ev.per_query("ndcg", ["a", None], [1, 1], [1, 1]), "query_id: 1 values are missing"),
    (lambda: ev.per_query("ndcg", pd.array(["a", None], dtype="string"), [1, 1], [1, 1]), "query_id: 1 values are missing"),
    (lambda: ev.per_query("ndcg", np.array(["a", 1], dtype=object), [1, 1], [1, 1]), "different types"),
    (lambda: ev.RankingMetric("map"), "name: unknown 'map'"),
    (lambda: ev.RankingMetric(k=0), "k: expected"),
    (lambda: ev.RankingMetric(form="exp"), "form: expected"),
    (lambda: ev.RankingMetric(top_grade=0), "top_grade above 0"),
    (lambda: ev.RankingMetric(top_grade=nan), "top_grade above 0"),
    (lambda: ev.RankingMetric(min_items=0), "min_items of 1 or more"),
    (lambda: ev.SEARCH_DEMO.mean([1, 1], [3, 1], [1, 2]), "gain: expected values from 0 to 1, found 3"),
    (lambda: ev.compare([.5], [.4]), "one query only"),
    (lambda: ev.compare([.5, nan], [.4, .3]), "a: 1 values are NaN or infinite; leave those queries out"),
    (lambda: ev.compare([], []), "a: expected"),
    (lambda: ev.compare([1, 2, 3], [1, 2]), "same seeds and queries"),
    (lambda: ev.compare(np.ones((2, 4)), np.ones((3, 4))), "same seeds and queries"),
    (lambda: ev.compare(np.ones((2, 4)), np.ones((2, 4)), n_resamples=10), "n_resamples of 100 or more"),
    (lambda: ev.compare(np.ones(4), np.ones(4), level=95), "0 < level < 1"),
    (lambda: ev.randomisation_p([.1, nan]), "differences: 1 of 2"),
    (lambda: ev.crossed_bootstrap([.1, .2]), "seeds by queries"),
    (lambda: ev.holm([.1, 1.2]), "p_values: expected values from 0 to 1"),
    (lambda: ev.holm([.1, nan]), "NaN"),
    (lambda: ev.recovery([1, 2], [1, 2], [1, 2, 3]), "same seeds and queries"),
    (lambda: ev.recovery([1, 2], [0, 1], [1, 2], floor=-1), "floor: expected 0 or more"),
    (lambda: ev.is_non_inferior(ev.compare([1, 2], [1, 2]), margin=-1), "margin: expected 0 or more"),
    (lambda: ev.detection([1, nan, nan], [0, 1, 0]), "scores: 2 of 3 values are NaN or infinite"),
    (lambda: ev.detection([1, 2], [0, 1, 0]), "lengths differ: scores has 2, is_noise has 3"),
    (lambda: ev.detection([1, 2], [0, 1], budgets=(5,)), "budgets: expected shares"),
])
def test_bad_input_says_what(call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert not isinstance(caught.value, ev.UndefinedMetric)


@pytest.mark.parametrize("call, says", [
    (lambda: ev.recall([0, 0], [0, 1]), "no true label equals positive=1"),
    (lambda: ev.precision(["E", "S"], ["E", "E"]), "no label equals positive=1; labels found: .'E', 'S'."),
    (lambda: ev.f1([0], [0]), "no label equals"),
    (lambda: ev.roc_auc([1, 1, 1], [1, 2, 3]), "all 3 labels are 1; both classes are needed"),
    (lambda: ev.average_precision([0, 0], [1, 2]), "no positive label"),
    (lambda: ev.pearson([1, 1], [1, 2]), "a is constant"),
    (lambda: ev.spearman([3], [4]), "constant"),
    (lambda: ev.cosine([0, 0], [1, 2]), "zero vector"),
    (lambda: ev.ndcg([0, 0, 0], [1, 2, 3]), "none of the 3 items is relevant"),
    (lambda: ev.mrr([0], [1]), "mrr: none of the 1 items"),
    (lambda: ev.mean_average_precision([1, 2], [0, 0], [1, 1]), "none of the 2 queries"),
    (lambda: ev.HOME_DEPOT.mean([1, 1], [1, 0], [1, 2]), "no query has at least 8 items"),
    (lambda: ev.detection([1, 2], [0, 0]), "both classes are needed"),
    (lambda: ev.two_means([1, 1]), "all 2 values equal 1"),
])
def test_undefined_is_named_as_such(call, says):
    with pytest.raises(ev.UndefinedMetric, match=says):
        call()


def test_documented_values():
    assert ev.precision([1, 0], [0, 0]) == 0 and ev.f1([1, 0], [0, 0]) == 0
    assert ev.dcg([0, 0], [1, 2]) == 0


def test_the_module_needs_numpy_alone():
    code = ("import sys; from ecom_importance import evaluation; "
            "print(sorted({m.split('.')[0] for m in sys.modules} & {'scipy', 'sklearn', 'pandas', 'torch', 'matplotlib', 'fastcore', 'nbdev'}))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
