"""The contract that every registered estimator keeps, and what no notebook shows: cuts, leaks, new rows, bad input."""
import os
import subprocess
import sys
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.importance import Evidence, estimate_cost, explain, explain_query, find, list_estimators, score, score_new
from ecom_importance.importance import estimators as contract
from ecom_importance.importance import heads
from ecom_importance.importance.estimators import ESTIMATORS, PARTS, cut, gather, part
from ecom_importance.importance.heads import choose_ridge, fit_head, log_losses, trusted_head
from ecom_importance.importance.shapley import knn_shapley, share_out
from ecom_importance.samples import DataError

NAMES = sorted(ESTIMATORS)
BY_VALID = [name for name in NAMES if "valid" in ESTIMATORS[name].additive_over]
BY_TRAIN = [name for name in NAMES if "train" in ESTIMATORS[name].additive_over]


# Cheaper settings for what is slow by nature, in the tests over the whole registry: estimator or part → setting → value.
CHEAP: dict[str, dict] = {"selectors": {"steps": 60}, "row_walks": {"permutations": 10}, "banzhaf": {"samples": 300}, "query_owen": {"permutations": 6}, "valued_subsets": {"samples": 1000}}


def make_samples(n=240, m=60, d=6, levels=2, seed=0) -> tuple[pd.DataFrame, np.ndarray]:
    "Rows in queries of uneven size, splits interleaved, Chinese and English text, gains on some levels."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n + m, d)).astype(np.float32)
    gain = np.clip(np.digitize(x[:, 0] + 0.4 * rng.normal(size=n + m), np.linspace(-0.7, 0.7, levels - 1) if levels > 2 else [0]), 0, levels - 1) / (levels - 1)
    train_query, valid_query = np.sort(rng.integers(0, n // 6, n)), rng.integers(1000, 1000 + m // 5, m)
    query = np.r_[train_query, valid_query]
    samples = pd.DataFrame({
        "sample_id": [f"s{i}" for i in range(n + m)], "query_id": query, "query": [f"杯 {q}" for q in query], "item_id": rng.integers(0, 90, n + m),
        "item_text": ["保温杯" * int(1 + k) for k in rng.integers(0, 9, n + m)], "label": gain, "gain": gain, "split": ["train"] * n + ["valid"] * m, "noise": "flip",
        "user_id": rng.integers(0, 25, n + m), "position": rng.integers(1, 11, n + m), "behaviour": np.where(gain > 0.5, "click", "view"),
    })
    order = rng.permutation(n + m)
    return samples.iloc[order].reset_index(drop=True), x[order]


def evidence_of(samples, x, **how) -> Evidence:
    "Evidence with the cheap settings of parts."
    parts = {name: CHEAP[name] for name in CHEAP if name in PARTS}
    return Evidence.from_samples(samples, x, settings=parts | how.pop("settings", {}), **how)


def make_evidence(**how) -> Evidence:
    return evidence_of(*make_samples(**how))


@lru_cache
def made_once(levels: int) -> Evidence:
    "Evidence whose parts are shared between tests."
    return make_evidence(levels=levels)


def scores_of(evidence, names, **how) -> pd.DataFrame:
    "Scores with the cheap settings of estimators."
    names = [names] if isinstance(names, str) else names
    return score(evidence, names, settings={name: CHEAP[name] for name in names if name in CHEAP}, **how)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return make_evidence()


@pytest.mark.parametrize("levels", [2, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_gives_a_finite_value_a_row(name, levels):
    made = make_evidence(levels=levels)
    if made.kind not in ESTIMATORS[name].takes:
        return  # refused by name, in a test of its own
    values = scores_of(made, name)[name]
    assert values.shape == (made.n,) and np.isfinite(values).all() and values.dtype == np.float64
    assert values.nunique() > 1, "a constant values nothing"
    assert list(values.index) == list(made.sample_ids)


def check_cuts(name, made, rng):
    chosen = ESTIMATORS[name]
    arguments, own = gather(made, chosen.need, name), CHEAP.get(name, {})
    whole = chosen.function(**arguments, **own)
    if "train" in chosen.additive_over:
        bounds = np.r_[0, np.sort(rng.choice(np.arange(1, made.n), 4, replace=False)), made.n]
        pieces = [chosen.function(**cut(arguments, "train", slice(a, b)), **own) for a, b in zip(bounds, bounds[1:])]
        np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-6, atol=1e-6 * np.abs(whole).max())
    if "valid" in chosen.additive_over:
        at = np.sort(rng.choice(made.query_bounds[1:-1], 3, replace=False))
        bounds = np.r_[0, at, made.m]
        total = sum(chosen.function(**cut(arguments, "valid", slice(a, b)), **own) for a, b in zip(bounds, bounds[1:]))
        np.testing.assert_allclose(total, whole, rtol=1e-6, atol=1e-6 * np.abs(whole).max())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_cuts_change_nothing(name, seed):
    "Every declaration of `additive_over`, cut at random places."
    made = made_once(3 if "graded" in ESTIMATORS[name].takes else 2)
    check_cuts(name, made, np.random.default_rng(seed))


@pytest.mark.parametrize("engine", ["local", "threads"])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_engines_agree(name, engine, evidence, monkeypatch):
    whole = scores_of(evidence, name)[name]
    monkeypatch.setattr(contract, "BLOCK_CELLS", 1500)
    assert not ESTIMATORS[name].additive_over or len(contract.block_bounds(evidence, ESTIMATORS[name])) > 1 or "valid" not in {contract._along(need) for need in ESTIMATORS[name].need.required}
    np.testing.assert_allclose(scores_of(evidence, name, engine=engine)[name], whole, rtol=1e-6, atol=1e-6 * whole.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_rows_changes_nothing(name):
    samples, x = make_samples(levels=3 if "graded" in ESTIMATORS[name].takes else 2)
    order = np.random.default_rng(5).permutation(len(samples))
    first = scores_of(evidence_of(samples, x), name)[name]
    second = scores_of(evidence_of(samples.iloc[order].reset_index(drop=True), x[order]), name)[name]
    np.testing.assert_allclose(second.reindex(first.index), first, rtol=1e-4, atol=1e-4 * first.abs().max())


# Trees ask about one axis at a time, so a rotation gives them other questions.
@pytest.mark.parametrize("name", [name for name in NAMES if ESTIMATORS[name].family in ("learned", "gradient", "shapley", "language model", "dynamics") and name not in ("tree_score", "forest_score")])
def test_rotating_the_vectors_changes_nothing(name):
    samples, x = make_samples()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(x.shape[1], x.shape[1])))[0].astype(np.float32)
    first, second = (scores_of(evidence_of(samples, some), name)[name] for some in (x, x @ rotation))
    np.testing.assert_allclose(second, first, rtol=2e-3, atol=2e-3 * first.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_finds_flipped_labels_if_it_says_so(name):
    if ESTIMATORS[name].about != "noise" and not ESTIMATORS[name].label_blind:
        return  # it says nothing of the kind
    made, wrong = contract.example_evidence(800, 160, d=12)
    made.settings |= {part: CHEAP[part] for part in CHEAP if part in PARTS}
    values = scores_of(made, name)[name]
    lower = values[wrong].to_numpy()[:, None] < values[~wrong].to_numpy()
    tied = values[wrong].to_numpy()[:, None] == values[~wrong].to_numpy()
    auroc = (lower + tied / 2).mean()
    chosen = ESTIMATORS[name]
    if chosen.label_blind:
        assert 0.4 < auroc < 0.6, "whoever does not read the labels cannot know"
    elif chosen.about == "noise":
        assert auroc > 0.65


def class_evidence(seed=0):
    samples, x = make_samples(levels=3, seed=seed)
    return evidence_of(samples.assign(label=np.array(["杯", "lamp", "sofa"])[(samples["gain"] * 2).astype(int)]), x, classes=True)


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_valued_or_refused_by_name(name):
    made = class_evidence()
    assert made.kind == "classes" and made.train["y"].shape == (240, 3) and list(made.class_names) == ["lamp", "sofa", "杯"]
    if "classes" in ESTIMATORS[name].takes:
        values = scores_of(made, name)[name]
        assert np.isfinite(values).all() and values.nunique() > 1
        check_cuts(name, made, np.random.default_rng(3))
    else:
        with pytest.raises(DataError, match=f"{name} takes .*these are classes.*score with one of"):
            score(made, name)


@pytest.mark.parametrize("kind, levels", [("binary", 2), ("graded", 3)])
@pytest.mark.parametrize("name", NAMES)
def test_gains_of_another_kind_are_refused_by_name(name, kind, levels):
    if kind not in ESTIMATORS[name].takes:
        with pytest.raises(DataError, match=f"{name} takes .*these are {kind}"):
            score(make_evidence(levels=levels), name)


def test_new_rows_of_an_unknown_class_are_refused():
    samples, x = make_samples(levels=3)
    named = samples.assign(label=np.array(["a", "b", "c"])[(samples["gain"] * 2).astype(int)])
    made = evidence_of(named, x, classes=True)
    new = named.iloc[:3].assign(label=["a", "b", "z"], sample_id=["n1", "n2", "n3"])
    name = next(name for name in BY_TRAIN if "classes" in ESTIMATORS[name].takes)
    with pytest.raises(DataError, match="row 2: .*'z'.*a, b, c"):
        score_new(made, new, x[:3], name)
    assert len(score_new(made, new.iloc[:2], x[:2], name)) == 2


def test_no_estimator_sees_the_ledger_or_other_splits():
    samples, x = make_samples()
    plain = scores_of(evidence_of(samples, x), NAMES)
    extra = samples.iloc[:40].assign(sample_id=[f"e{i}" for i in range(40)], split=["select"] * 20 + ["test"] * 20, query=[f"other {i}" for i in range(40)])
    more = pd.concat([samples.assign(noise="other"), extra], ignore_index=True)
    made = evidence_of(more, np.r_[x, x[:40] * 100])
    assert not {"noise", "split", "noise_valid", "split_valid", "gain"} & {*made.train, *made.valid}
    pd.testing.assert_frame_equal(scores_of(made, NAMES), plain)


@pytest.mark.parametrize("levels", [2, 3])
def test_nothing_is_computed_twice(levels):
    made = make_evidence(levels=levels)
    names = [name for name in NAMES if made.kind in ESTIMATORS[name].takes]
    assert len(names) > 8
    scores_of(made, names)
    scores_of(made, names)
    assert made.computed and set(made.computed.values()) == {1}


@pytest.mark.parametrize("name", BY_VALID)
def test_explanations_add_up(name, evidence):
    ids = list(evidence.sample_ids[[3, 100, 7]])
    values = scores_of(evidence, name)[name]
    own = CHEAP.get(name)
    terms = explain(evidence, name, ids, settings=own)
    assert terms.shape == (3, len(evidence.query_bounds) - 1) and list(terms.index) == ids
    np.testing.assert_allclose(terms.sum(axis=1), values.loc[ids], rtol=1e-6, atol=1e-6 * values.abs().max())
    pd.testing.assert_frame_equal(explain(evidence, name, ids[0], settings=own), terms.iloc[:1])
    query = terms.columns[2]
    table = explain_query(evidence, name, query, most=4, settings=own)
    assert len(table) == 8 and table["effect"].is_monotonic_decreasing
    np.testing.assert_allclose(explain(evidence, name, [table.index[0]], settings=own)[query].iloc[0], table["effect"].iloc[0], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(BY_VALID)))
def test_others_refuse_to_be_explained_and_name_those_that_can(name, evidence):
    with pytest.raises(DataError, match="explain one of: .*grad_dot.*knn_shapley"):
        explain(evidence, name, [evidence.sample_ids[0]])
    with pytest.raises(DataError, match="not a sum over trusted rows"):
        explain_query(evidence, name, 1000)


@pytest.mark.parametrize("name", BY_TRAIN)
def test_old_rows_scored_as_new_get_their_scores(name):
    samples, x = make_samples(levels=3 if "graded" in ESTIMATORS[name].takes else 2)
    made = evidence_of(samples, x)
    values = scores_of(made, name)[name]
    rows = np.flatnonzero(samples["split"] == "train")[[5, 50, 120, 3]]
    again = score_new(made, samples.iloc[rows], x[rows], name, settings={name: CHEAP[name]} if name in CHEAP else None)[name]
    np.testing.assert_allclose(again, values.loc[again.index], rtol=1e-6, atol=1e-6 * values.abs().max())
    assert set(made.computed.values()) <= {1}


def test_new_rows_do_not_read_old_ones():
    samples, x = make_samples()
    made = evidence_of(samples, x)
    before = scores_of(made, BY_TRAIN)
    for name in ("x", "y", "item_text", "query", "item_id", "user_id"):
        made.train[name] = None  # whoever reads it now fails
    rows = np.flatnonzero(samples["split"] == "train")[:9]
    own = {name: CHEAP[name] for name in BY_TRAIN if name in CHEAP}
    pd.testing.assert_frame_equal(score_new(made, samples.iloc[rows], x[rows], BY_TRAIN, settings=own), before.loc[samples["sample_id"].iloc[rows]], check_names=False, rtol=1e-6)


def test_estimators_that_compare_rows_refuse_new_ones(evidence):
    samples, x = make_samples()
    with pytest.raises(DataError, match="values rows against each other"):
        score_new(evidence, samples.iloc[:3], x[:3], "knn_shapley")


def test_repeats_give_a_standard_error():
    table = score(make_evidence(), ["random", "loss"], repeats=5)
    assert list(table) == ["random", "random_se", "loss"]
    assert 0.08 < table["random_se"].mean() < 0.18


def test_a_seed_is_a_seed(evidence):
    np.testing.assert_array_equal(score(evidence, "random", seed=3), score(evidence, "random", seed=3))
    assert (score(evidence, "random", seed=3) != score(evidence, "random", seed=4)).all().all()


def test_cost_names_each_part_once_and_predicts_memory():
    "Memory is what it is on every machine, so the prediction of it can be held to; seconds are shown in the notebook."
    import tracemalloc

    made, _ = contract.example_evidence(12_000, 400)
    table = estimate_cost(made, ["knn_shapley", "oof_loss", "loss"]).set_index("name")
    assert table.index.is_unique and {"knn_shapley", "oof_loss", "loss", "head", "fold_heads"} <= set(table.index)
    assert set(table["kind"]) == {"part", "estimator"} and (table[["seconds", "mb"]].to_numpy() > 0).all() and "head" not in made.computed
    fresh, _ = contract.example_evidence(12_000, 400)
    find(fresh, "fold")
    tracemalloc.start()
    find(fresh, "head")
    measured = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert measured / 4 < table.loc["head", "mb"] < measured * 4


# --- brute force and real retraining -------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 8), k=st.integers(1, 10), seed=st.integers(0, 999))
def test_knn_shapley_equals_all_subsets(n, k, seed):
    from itertools import permutations

    agreement = np.random.default_rng(seed).random(n)
    if n > 6:
        agreement = agreement[:6]
    n = len(agreement)
    worth = lambda some: sum(agreement[sorted(some)][:k]) / k if len(some) else 0.0
    values, orders = np.zeros(n), list(permutations(range(n)))
    for order in orders:
        for place, row in enumerate(order):
            values[row] += worth(list(order[: place + 1])) - worth(list(order[:place]))
    np.testing.assert_allclose(share_out(agreement, k), values / len(orders), atol=1e-12)


def test_knn_shapley_shares_add_up(evidence):
    values = score(evidence, "knn_shapley", settings={"knn_shapley": {"k": 7}})["knn_shapley"]
    x, y, x_valid, y_valid = (find(evidence, name).astype(float) for name in ("x", "y", "x_valid", "y_valid"))
    nearest = np.argsort(((x_valid[:, None] - x) ** 2).sum(-1), axis=1)[:, :7]
    np.testing.assert_allclose(values.sum(), (1 - np.abs(y[nearest] - y_valid[:, None])).mean(), rtol=1e-6)


@pytest.mark.parametrize("n, least", [(480, 0.99), (160, 0.95)])
def test_influence_is_leave_one_out(n, least):
    made, _ = contract.example_evidence(n, 80, d=8, seed=2)
    made.settings["head"] = {"ridge": 0.01}
    quick = score(made, "influence")["influence"].to_numpy()
    x, y, x_valid, y_valid = (find(made, name).astype(float) for name in ("x", "y", "x_valid", "y_valid"))
    keep, true = np.ones(n), []
    for row in range(0, n, 8):
        keep[row] = 0
        true.append(log_losses(fit_head(x, y, ridge=0.01, weights=keep, tolerance=1e-16).predict(x_valid), y_valid).mean())
        keep[row] = 1
    assert np.corrcoef(true, quick[::8])[0, 1] > least


@pytest.mark.parametrize("gains", ["binary", "graded"])
@pytest.mark.parametrize("ratio, least", [(40, 0.9999), (20, 0.999), (6, 0.95)])
def test_leave_one_out_is_leave_one_out(ratio, least, gains):
    d = 8
    made, _ = contract.example_evidence(ratio * d, 80, d=d, seed=3)
    made.settings["head"] = {"ridge": 0.01}
    if gains == "graded":
        made.train["y"] = np.clip(made.train["y"] * 0.6 + 0.1 + 0.2 * np.random.default_rng(0).random(made.n), 0, 1)
    quick = score(made, "leave_one_out")["leave_one_out"].to_numpy()
    x, y, x_valid, y_valid = (find(made, name).astype(float) for name in ("x", "y", "x_valid", "y_valid"))
    fit = lambda keep: log_losses(fit_head(x, y, ridge=0.01, weights=keep, tolerance=1e-16).predict(x_valid), y_valid).mean()
    rows, whole = np.arange(0, made.n, max(1, made.n // 40)), fit(np.ones(made.n))
    true = np.array([fit(np.arange(made.n) != row) - whole for row in rows])
    assert np.corrcoef(true, quick[rows])[0, 1] > least
    if ratio >= 20:
        np.testing.assert_allclose(quick[rows], true, atol=0.05 * np.abs(true).max())
    again = Evidence(dict(made.train), {name.removesuffix("_valid"): column for name, column in made.valid.items()}, settings={"head": {"ridge": 0.01}, "refitted_heads": {"exact": True}})
    np.testing.assert_allclose(score(again, "leave_one_out")["leave_one_out"].to_numpy()[rows], true, atol=1e-3 * np.abs(true).max())


def test_exact_leave_one_out_refuses_what_would_take_hours():
    made, _ = contract.example_evidence(5_008, 16, d=2)
    made.settings["refitted_heads"] = {"exact": True}
    with pytest.raises(DataError, match="5,008 training rows, a head for each"):
        score(made, "leave_one_out")


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), ridge=st.sampled_from([1e-4, 1e-2, 1.0]), d=st.integers(1, 12))
def test_head_is_the_optimum(seed, ridge, d):
    "SciPy finds no better point, whole labels, soft labels and weights alike."
    from scipy.optimize import minimize
    from scipy.special import expit

    rng = np.random.default_rng(seed)
    x, y, w = rng.normal(size=(80, d)), rng.random(80) ** 2, rng.random(80)
    head = fit_head(x, y, ridge=ridge, weights=w)

    def objective(theta):
        z = x @ theta[:-1] + theta[-1]
        return w @ (np.logaddexp(0, z) - y * z) / w.sum() + ridge / 2 * theta[:-1] @ theta[:-1] + 5e-7 * theta[-1] ** 2

    best = minimize(objective, np.zeros(d + 1), method="BFGS", options={"gtol": 1e-9})
    assert objective(np.r_[head.weights, head.intercept]) <= best.fun + 1e-8
    np.testing.assert_allclose(head.predict(x), expit(x @ best.x[:-1] + best.x[-1]), atol=2e-3)


def nearly_constant(spread, n=400, d=24, far=1.0):
    "Vectors of 32 bits that lie close together and far from 0, and gains that the first dimension knows."
    rng = np.random.default_rng(0)
    z = rng.normal(size=(n, d))
    return (far + spread * z).astype(np.float32), (z[:, 0] + 0.5 * rng.normal(size=n) > 0).astype(float)


@pytest.mark.parametrize("spread, far, n", [(1e-3, 1, 400), (1e-4, 1, 400), (3e-5, 1, 5000), (1e-2, 10, 400), (1e-3, 10, 5000)])
@pytest.mark.parametrize("classes", [0, 3])
def test_nearly_constant_vectors_of_32_bits_are_fitted_in_64(spread, far, n, classes):
    x, y = nearly_constant(spread, n, far=far)
    y = np.eye(3)[np.digitize(x[:, 0] + x[:, 1], np.quantile(x[:, 0] + x[:, 1], [0.3, 0.6]))] if classes else y
    weights = np.random.default_rng(1).gamma(2, 0.5, n)
    head, wide = (fit_head(vectors, y, ridge=0.02 * spread**2, weights=weights) for vectors in (x, x.astype(np.float64)))
    np.testing.assert_array_equal(head.weights, wide.weights)
    np.testing.assert_allclose(head.predict(x), wide.predict(x.astype(np.float64)), atol=heads.LOST)
    assert np.mean(head.predict(x).argmax(1) == y.argmax(1) if classes else (head.predict(x) > 0.5) == y) > 0.75


def test_ordinary_vectors_are_fitted_once_and_as_they_are():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 8)).astype(np.float32), rng.random(300)
    how = dict(ridge=0.01, weights=rng.random(300), start=None, tolerance=1e-9, most=100)
    once = heads._fit_gain_head(x, y, **how)
    head = fit_head(x, y, **how)
    assert head.weights.tobytes() == once.weights.tobytes() and head.curvature.tobytes() == once.curvature.tobytes() and head.curvature.tobytes() != fit_head(x.astype(np.float64), y, **how).curvature.tobytes()


def test_vectors_that_cannot_be_fitted_say_what_to_do():
    x, y = nearly_constant(1e-7)
    with pytest.raises(DataError, match="float32 is too coarse.*subtract their mean"):
        fit_head(x, y, ridge=1e-16)
    assert np.mean((fit_head(x - x.mean(axis=0), y, ridge=1e-16).predict(x - x.mean(axis=0)) > 0.5) == y) > 0.75
    with pytest.raises(DataError, match="no head can be fitted: .*not positive definite"):
        fit_head(np.zeros((20, 3)), y[:20], ridge=0.0)
    with pytest.raises(DataError, match="no head can be fitted: it did not converge in 1 steps"):
        fit_head(np.random.default_rng(0).normal(size=(50, 3)), y[:50], most=1)


@pytest.mark.parametrize("joint", [True, False])
def test_class_head_is_the_optimum_and_solves(joint, monkeypatch):
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    monkeypatch.setattr(heads, "JOINT", 4000 if joint else 10)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5))
    grade = np.digitize(x @ rng.normal(size=5) + rng.normal(size=400), [-1, 1])
    columns, ridge = np.eye(3)[grade], 0.02
    head = fit_head(x, columns, ridge=ridge)
    assert head.joint == joint
    peer = LogisticRegression(C=1 / (400 * ridge), tol=1e-10, max_iter=2000)
    expected = peer.fit(x, grade).predict_proba(x) if joint else np.stack([one.predict_proba(x)[:, 1] for one in OneVsRestClassifier(peer).fit(x, grade).estimators_], axis=1)
    np.testing.assert_allclose(head.predict(x), expected, atol=2e-4)
    p, wide = head.predict(x), np.c_[x, np.ones(400)]
    hessian = np.zeros((3, 6, 3, 6))
    for a in range(3):
        for b in range(3):
            if joint or a == b:
                share = p[:, a] * ((a == b) - (p[:, b] if joint else p[:, a]))
                hessian[a, :, b] = wide.T @ (share[:, None] * wide) / 400 + (a == b) * np.diag([ridge] * 5 + [heads.INTERCEPT_RIDGE])
    gradients = rng.normal(size=(6, 3, 2))
    solved = np.linalg.solve(hessian.reshape(18, 18), np.swapaxes(gradients, 0, 1).reshape(18, 2)).reshape(3, 6, 2)
    np.testing.assert_allclose(head.solve(gradients), np.swapaxes(solved, 0, 1), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(head.solve(gradients[..., 0]), head.solve(gradients)[..., 0])


def test_label_quality_equals_cleanlab():
    from cleanlab.rank import get_label_quality_scores

    made = make_evidence(levels=3)
    for method, adjust in (("self_confidence", False), ("normalized_margin", True), ("self_confidence", True), ("confidence_weighted_entropy", False)):
        values = score(made, "label_quality", settings={"label_quality": {"method": method, "adjust": adjust}})["label_quality"]
        np.testing.assert_allclose(values, get_label_quality_scores(find(made, "grade"), find(made, "oof_proba"), method=method, adjust_pred_probs=adjust), atol=1e-10)


def test_folds_keep_near_duplicates_together(evidence):
    fold = pd.Series(find(evidence, "fold"))
    assert fold.groupby(evidence.train["query"]).nunique().max() == 1 and fold.nunique() == 5


def test_an_out_of_fold_prediction_does_not_know_its_row():
    samples, x = make_samples()
    row = int(np.flatnonzero(samples["split"] == "train")[17])
    fixed = {"head": {"ridge": 0.1}}
    first = Evidence.from_samples(samples, x, settings=fixed)
    samples.loc[row, "gain"] = 1 - samples.loc[row, "gain"]
    second = Evidence.from_samples(samples, x, settings=fixed)
    place = list(first.sample_ids).index(samples.loc[row, "sample_id"])
    assert abs(find(first, "oof")[place] - find(second, "oof")[place]) < 1e-5
    assert abs(find(first, "fitted")[place] - find(second, "fitted")[place]) > 1e-4


# --- bad input ------------------------------------------------------------------------------------------------------


def test_no_trusted_rows_is_said_by_those_that_need_them():
    samples, x = make_samples()
    train = (samples["split"] == "train").to_numpy()
    made = evidence_of(samples[train].reset_index(drop=True), x[train])
    trusting = set(list_estimators().query("`trusted rows`")["name"])
    needing = {name for name in NAMES if contract._missing(made, ESTIMATORS[name].need)}
    assert trusting <= needing and all(ESTIMATORS[name].label_blind for name in needing - trusting), "who needs trusted rows reads their labels, or no labels at all"
    for name in NAMES:
        if name in needing:
            with pytest.raises(DataError, match="_valid.*mark trusted rows"):
                scores_of(made, name)
        else:
            assert np.isfinite(scores_of(made, name)[name]).all()


def one_query(samples):
    return samples.assign(query="the same", query_id=np.where(samples["split"] == "train", 1, 2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["one row", "all ones", "one query", "constant vectors", "duplicated rows", "one trusted row", "fewer rows than neighbours", "nothing relevant", "queries of one row"])
def test_hard_input_gives_a_value_or_a_reason(name, case):
    samples, x = make_samples()
    train = (samples["split"] == "train").to_numpy()
    if case == "one row":
        keep = ~train | (np.cumsum(train) == 1)
        samples, x = samples[keep].reset_index(drop=True), x[keep]
    elif case == "all ones":
        samples = samples.assign(gain=1.0)
    elif case == "one query":
        samples = one_query(samples)
    elif case == "constant vectors":
        x = np.ones_like(x)
    elif case == "duplicated rows":
        rows = np.flatnonzero(train)
        samples.loc[rows, ["query", "query_id", "gain"]] = samples.loc[rows[::2].repeat(2)[: len(rows)], ["query", "query_id", "gain"]].to_numpy()
        samples["gain"] = samples["gain"].astype(float)
        x[rows] = x[rows[::2].repeat(2)[: len(rows)]]
    elif case == "fewer rows than neighbours":
        keep = ~train | (np.cumsum(train) <= 4)
        samples, x = samples[keep].reset_index(drop=True), x[keep]
    elif case == "nothing relevant":
        samples.loc[~train, "gain"] = 0.0
    elif case == "queries of one row":
        samples = samples.assign(query_id=np.arange(len(samples)), query=[f"杯 {i}" for i in range(len(samples))])
    else:
        keep = train | (np.cumsum(~train) == 1)
        samples, x = samples[keep].reset_index(drop=True), x[keep]
    try:
        values = scores_of(evidence_of(samples, x), name)[name]
    except DataError as error:
        assert case in ("one row", "one query", "one trusted row", "fewer rows than neighbours") and "quer" in str(error), error
    else:
        assert np.isfinite(values).all()


@pytest.mark.parametrize("value, what", [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite")])
def test_vectors_must_be_finite(value, what):
    samples, x = make_samples()
    x[7, 2] = value
    with pytest.raises(DataError, match=f"row 7: vectors.*{what}"):
        Evidence.from_samples(samples, x)


@pytest.mark.parametrize("gain", [np.nan, -0.1, 1.1])
def test_gains_must_be_gains(gain):
    samples, x = make_samples()
    samples.loc[9, "gain"] = gain
    with pytest.raises(DataError, match="'gain', row 9"):
        Evidence.from_samples(samples, x)


def test_ids_must_be_unique_and_vectors_aligned():
    samples, x = make_samples()
    with pytest.raises(DataError, match="299 vectors for 300 samples"):
        Evidence.from_samples(samples, x[1:])
    samples.loc[3, "sample_id"] = samples.loc[4, "sample_id"]
    with pytest.raises(DataError, match="rows 3, 4"):
        Evidence.from_samples(samples, x)


@pytest.mark.parametrize("call, what", [
    (lambda e: score(e, "knn_shaply"), "did you mean 'knn_shapley'?"),
    (lambda e: score(e, "knn_shapley", settings={"knn_shapley": {"neighbours": 3}}), "no setting 'neighbours'"),
    (lambda e: score(e, "knn_shapley", settings={"loss": {}}), "which is not scored"),
    (lambda e: score(e, "loss", engine="ray"), "engine 'ray'"),
    (lambda e: explain(e, "influence", ["nobody"]), "not among the training rows"),
    (lambda e: explain_query(e, "influence", "nobody"), "not a trusted query"),
    (lambda e: Evidence(e.train, {}, given={"heads": 1}), "did you mean 'head'?"),
    (lambda e: Evidence(e.train, {}, given={"oof": np.ones(3)}), "has 3 rows"),
    (lambda e: Evidence(e.train, {}, settings={"head": {"rigde": 1}}), "did you mean 'ridge'?"),
])
def test_mistakes_are_named(call, what, evidence):
    with pytest.raises(DataError) as error:
        call(evidence)
    assert what in str(error.value)


def test_a_wrong_result_is_refused(evidence):
    @contract.estimator(family="example", source="none", register=False)
    def short(y):
        return y[1:]

    @contract.estimator(family="example", source="none", register=False)
    def broken(y):
        return y / 0 * np.nan

    for one, what in ((short, "expected \\(240,\\)"), (broken, "NaN or infinite")):
        with pytest.raises(ValueError, match=what), np.errstate(all="ignore"):
            score(evidence, one)


@pytest.mark.parametrize("engine", ["local", "threads"])
def test_progress_silences_bars_however_deep(evidence, engine, capsys):
    @contract.estimator(family="example", source="none", register=False, additive_over={"train"})
    def slow(y):
        return np.array([value for value in contract.progress_bar(y, desc="deep inside")])

    score(evidence, slow, engine=engine, progress=False)
    assert not capsys.readouterr().err
    score(evidence, slow, engine=engine)
    assert "deep inside" in capsys.readouterr().err


def test_a_taken_name_is_an_error_and_the_same_source_is_not():
    def declare():
        def random(y):
            return y

        return random

    with pytest.raises(ValueError, match="is taken by"):
        contract.estimator(family="example", source="none")(declare())
    with pytest.raises(ValueError, match="is taken by"):
        part(along="train")(declare())
    again = ESTIMATORS["random"].function
    contract.estimator(family="baseline", source="definition", additive_over={"train"}, label_blind=True, sign="none", cost="O(N)")(again)
    assert ESTIMATORS["random"].function is again


def test_a_part_from_outside_is_used(evidence):
    samples, x = make_samples()
    outside = np.random.default_rng(0).random(240)
    made = Evidence.from_samples(samples, x, given={"fitted": outside})
    np.testing.assert_allclose(score(made, "loss")["loss"], -log_losses(outside, made.train["y"]))
    assert "head" not in made.computed


def test_parts_from_outside_are_asked_for_again():
    samples, x = make_samples()
    outside = np.random.default_rng(0).random(240)
    made = Evidence.from_samples(samples, x, given={"oof": outside})
    values = score(made, "oof_loss")["oof_loss"]
    rows = np.flatnonzero(samples["split"] == "train")[[4, 9]]
    with pytest.raises(DataError, match="'oof' of the old rows came from outside"):
        score_new(made, samples.iloc[rows], x[rows], "oof_loss")
    np.testing.assert_allclose(score_new(made, samples.iloc[rows], x[rows], "oof_loss", given={"oof": outside[[4, 9]]})["oof_loss"], values.iloc[[4, 9]])


def test_settings_of_parts_are_kept_for_new_rows():
    samples, x = make_samples()
    made = Evidence.from_samples(samples, x, settings={"fold": {"n_folds": 3}, "head": {"ridge": 0.5}})
    assert set(find(made, "fold")) == {0, 1, 2} and find(made, "head").ridge == 0.5


def test_memory_is_set_by_the_block():
    "N × M as one matrix would take 800 MB."
    import tracemalloc

    made, _ = contract.example_evidence(50_000, 2_000, d=4)
    arguments = gather(made, ESTIMATORS["knn_shapley"].need, "knn_shapley")
    tracemalloc.start()
    knn_shapley(**{name: value[:40] if name.endswith("_valid") else value for name, value in arguments.items()})
    assert tracemalloc.get_traced_memory()[1] < 160 * 2**20
    tracemalloc.stop()


UNDER_A_CAP = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
from ecom_importance.importance import score
from ecom_importance.importance.estimators import example_evidence
made, _ = example_evidence(200_000, 2_000, d=16)
made.settings["head"] = {"ridge": 0.01}
values = score(made, sys.argv[1], progress=False)[sys.argv[1]]
assert len(values) == 200_000 and values.nunique() > 1000
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is capped on Linux only")
@pytest.mark.parametrize("name", ["grad_dot", "influence", "knn_shapley"])
def test_large_problems_fit_under_a_cap_of_the_address_space(name):
    "N = 200,000 by M = 2,000 would be 1.6 GB as float32, in a process of at most 2 GB that has imported everything."
    ran = subprocess.run([sys.executable, "-c", UNDER_A_CAP, name], capture_output=True, text=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.fixture(scope="module")
def old_and_new():
    "Rows of one source with equal noise, cut in two: evidence of the old, and the new."
    made, _ = contract.example_evidence(12_000, 400, d=40)
    old = {name: column[:6000] for name, column in made.train.items()}
    valid = {name.removesuffix("_valid"): column for name, column in made.valid.items()}
    new = {name: column[6000:] for name, column in made.train.items()}
    return Evidence(old, valid), pd.DataFrame({name: column for name, column in new.items() if name not in ("x", "y")}).assign(gain=new["y"]), new["x"]


@pytest.mark.parametrize("name", [name for name in BY_TRAIN if ESTIMATORS[name].about == "noise" and not ESTIMATORS[name].label_blind and name != "forest_score"])
def test_old_and_new_rows_are_comparable(name, old_and_new):
    "At equal noise a threshold flags as many new rows as old ones, within two points. (The forest, five seconds here, was .6 apart.)"
    made, new, x = old_and_new
    old = scores_of(made, name)[name]
    found = score_new(made, new, x, name, settings={name: CHEAP[name]} if name in CHEAP else None, progress=False)[name]
    for share in (0.1, 0.2, 0.4):
        threshold = old.quantile(share)
        assert abs((found <= threshold).mean() - (old <= threshold).mean()) < 0.02


def test_ridge_grows_with_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 60))
    y = (x[:, 0] > 0).astype(float)
    fold = np.arange(400) % 5
    noisy = np.where(rng.random(400) < 0.4, 1 - y, y)
    assert choose_ridge(x, noisy, fold) > choose_ridge(x, y, fold)


def test_trusted_queries_that_fall_into_one_fold_are_folds_of_their_own():
    "Three queries are drawn into one fold of five once in 25 times; a head of them can be had all the same."
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 3)), (rng.random(12) < 0.5).astype(float)
    names = np.repeat(["a", "b", "c"], 4)
    head = trusted_head(x, y, np.zeros(12, int), names)
    assert head.ridge == choose_ridge(x, y, np.repeat([0, 1, 2], 4))
    with pytest.raises(DataError, match="one cluster"):
        trusted_head(x, y, np.zeros(12, int), np.repeat("a", 12))


def test_new_rows_that_are_no_samples_are_refused_by_column():
    evidence, _ = contract.example_evidence(60, 20)
    with pytest.raises(DataError, match="no column 'gain'"):
        score_new(evidence, pd.DataFrame({"sample_id": [1], "query": ["a"]}), np.zeros((1, evidence.train["x"].shape[1])), "oof_loss")
