"""Several estimators as one score: the fit against scikit-learn and its optimality conditions, what it may see, and bad input."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

import ecom_importance.weighting.combining as combining
from ecom_importance.importance import Evidence, score
from ecom_importance.samples import DataError
from ecom_importance.weighting import Stack, fit_stack, mean_rank, stacked
from ecom_importance.weighting.combining import fit_coefficients

FAST = ("oof_loss", "trusted_loss", "random")


def problem(queries: int = 40, n_items: int = 8, d: int = 6, seed: int = 0, wrong: float = 0.2) -> tuple[pd.DataFrame, np.ndarray]:
    "Separable gains in queries of some rows; a quarter of the queries trusted, flips in the others; a select and a test query."
    rng = np.random.default_rng(seed)
    n = queries * n_items
    x = rng.normal(size=(n, d)).astype(np.float32)
    truth = (x @ np.r_[2.0, -2.0, np.zeros(d - 2)] > 0).astype(float)
    query = np.repeat(np.arange(queries), n_items)
    split = np.where(query % 4 == 0, "valid", "train")
    split[query == queries - 1], split[query == queries - 2] = "select", "test"
    flipped = (rng.random(n) < wrong) & (split == "train")
    gain = np.where(flipped, 1 - truth, truth)
    return pd.DataFrame({"sample_id": [f"s{i}" for i in range(n)], "query_id": [f"q{q}" for q in query], "query": [f"thing{q}" for q in query], "item_id": [f"i{i}" for i in range(n)],
                         "item_text": [f"item{i}" for i in range(n)], "label": gain, "gain": gain, "split": split, "noise": np.where(flipped, "flip", "")}), x


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 5.0]))
@settings(max_examples=25, deadline=None)
def test_fit_is_the_optimum(seed, ridge):
    rng = np.random.default_rng(seed)
    ranks = rng.random((120, 4))
    right = rng.random(120) < expit(ranks @ rng.normal(1, 2, 4))
    if right.all() or not right.any():
        return
    intercept, coefficients = fit_coefficients(ranks, right, ridge=ridge)
    slope = ranks.T @ (expit(intercept + ranks @ coefficients) - right) + ridge * (coefficients - coefficients.mean())
    assert abs((expit(intercept + ranks @ coefficients) - right).sum()) < 1e-3
    inner = (coefficients > 0) & (coefficients < 100)
    assert (coefficients >= 0).all() and np.abs(slope[inner]).max(initial=0) < 1e-3 and (slope[coefficients == 0] > -1e-3).all()  # Karush, Kuhn and Tucker


def test_fit_equals_scikit_learn_where_no_bound_binds():
    rng = np.random.default_rng(1)
    ranks = rng.random((600, 3))
    right = rng.random(600) < expit(ranks @ [3.0, 2.0, 2.0] - 2)
    intercept, coefficients = fit_coefficients(ranks, right, ridge=0)
    peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(ranks, right)
    assert (peer.coef_ > 0).all()
    np.testing.assert_allclose([intercept, *coefficients], [*peer.intercept_, *peer.coef_[0]], atol=1e-4)


def test_a_strong_ridge_makes_the_order_of_the_mean_rank():
    samples, x = problem()
    stack = fit_stack(samples, x, FAST, ridge=1e7, progress=False)
    assert np.ptp(stack.coefficients) < 1e-3 * stack.coefficients.mean()
    expected = mean_rank(stack.scores)
    assert stack.combined.corr(expected) > 0.999999


def test_it_finds_flips_better_than_mean_rank_with_a_member_that_knows_nothing():
    samples, x = problem(queries=80)
    stack = fit_stack(samples, x, FAST, progress=False)
    wrong = samples.loc[samples["split"] == "train", "noise"] != ""
    fraction = lambda values: wrong.to_numpy()[np.argsort(values.to_numpy())[: wrong.sum()]].mean()
    assert stack.coefficients["random"] < 0.5 * stack.coefficients.drop("random").min()
    assert fraction(stack.combined) > fraction(mean_rank(stack.scores)) + 0.1


def test_it_scores_the_training_rows_as_score_does():
    samples, x = problem()
    stack = fit_stack(samples, x, FAST, seed=3, progress=False)
    used = samples["split"].isin(["train", "valid"]).to_numpy()
    expected = score(Evidence.from_samples(samples[used].drop(columns="noise").reset_index(drop=True), x[used]), list(FAST), seed=3, progress=False)
    pd.testing.assert_frame_equal(stack.scores, expected, check_names=False)
    pd.testing.assert_series_equal(stack.combine(expected), stacked(samples, x, FAST, seed=3, progress=False))


def test_neither_the_ledger_nor_other_splits_are_seen():
    samples, x = problem()
    changed = samples.assign(noise=np.random.default_rng(0).permutation(samples["noise"]))
    others = changed["split"].isin(["select", "test"])
    changed.loc[others, "gain"], changed.loc[others, "label"] = 0.5, 0.5
    pd.testing.assert_series_equal(stacked(samples, x, FAST, progress=False), stacked(changed.drop(columns="noise"), x, FAST, progress=False))


def test_no_spoilt_row_is_judged_beside_a_clean_row_of_its_query(monkeypatch):
    samples, x = problem()
    seen = []

    def watched(table, vectors, rows, names, settings, seed):
        seen.append(table.iloc[rows])
        return real(table, vectors, rows, names, settings, seed)

    real = combining._score
    monkeypatch.setattr(combining, "_score", watched)
    fit_stack(samples, x, FAST, copies=2, n_folds=3, progress=False)
    assert len(seen) == 7  # the training rows alone, and two copies in three folds
    train, trusted = set(samples.loc[samples["split"] == "train", "sample_id"]), samples[samples["split"] == "valid"]
    copied = []
    for table in seen[1:]:
        assert "noise" not in table and set(table["split"]) == {"train", "valid"}
        inside = table[(table["split"] == "train") & ~table["sample_id"].isin(train)]
        assert not set(inside["query_id"]) & set(table.loc[table["split"] == "valid", "query_id"])
        pd.testing.assert_series_equal(table.loc[table["split"] == "valid"].set_index("sample_id")["gain"], trusted.set_index("sample_id")["gain"].reindex(table.loc[table["split"] == "valid", "sample_id"]))
        copied += list(inside["sample_id"])
    assert sorted(copied) == sorted([*trusted["sample_id"]] * 2)


def test_held_out_values_come_from_fits_without_the_fold():
    samples, x = problem()
    stack = fit_stack(samples, x, FAST, progress=False)
    table = stack.copies
    for fold in table["fold"].unique():
        out = table["fold"] == fold
        intercept, coefficients = fit_coefficients(table.loc[~out, list(FAST)].to_numpy(), (table.loc[~out, "kind"] == "").to_numpy())
        np.testing.assert_allclose(table.loc[out, "stacked"], intercept + table.loc[out, list(FAST)].to_numpy() @ coefficients, atol=1e-5)
    judged = stack.judge()
    assert list(judged.index) == ["stacked", "mean_rank", *FAST] and judged["AUROC"].between(0, 1).all() and judged.loc["oof_loss", "AUROC"] > judged.loc["random", "AUROC"]


def test_order_of_rows_and_seed():
    samples, x = problem()
    order = np.random.default_rng(5).permutation(len(samples))
    one, other = stacked(samples, x, FAST, progress=False), stacked(samples.iloc[order], x[order], FAST, progress=False)
    np.testing.assert_allclose(other.reindex(one.index), one, atol=1e-4)
    pd.testing.assert_series_equal(one, stacked(samples, x, FAST, progress=False))
    assert not np.allclose(one, stacked(samples, x, FAST, seed=9, progress=False))


def test_chinese_text_and_few_queries():
    samples, x = problem(queries=16)
    samples["query"] = ["红色连衣裙" + "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳"[int(name[1:])] for name in samples["query_id"]]
    assert np.isfinite(stacked(samples, x, FAST, progress=False)).all()


@pytest.mark.parametrize("change, message", [
    ({"names": ["oof_loss"]}, "two or more"),
    ({"names": ["oof_loss", "oof_loss"]}, "two or more different"),
    ({"names": ["oof_loss", "oof_los"]}, "oof_los"),
    ({"rates": {}}, "kinds of list_noise"),
    ({"rates": {"duplicate_conflict": 0.1}}, "add no rows"),
    ({"rates": {"wrong_category": 0.1}}, "add no rows"),
    ({"rates": {"stale_item": 0.1}}, "spoil labels"),
    ({"rates": {"flip": 0.0}}, "above 0"),
    ({"rates": {"flip": 0.5, "whole_query": 0.5}}, "at most 0.8"),
    ({"rates": {"typo": 0.1}}, "unknown"),
    ({"rates": {"flip": 1e-6}}, "were spoilt"),
    ({"copies": 0}, "copies is 0"),
    ({"n_folds": 1}, "n_folds 1"),
    ({"ridge": float("nan")}, "ridge nan"),
])
def test_settings_that_make_no_sense(change, message):
    samples, x = problem()
    with pytest.raises(DataError, match=message):
        fit_stack(samples, x, **({"names": FAST} | change), progress=False)


@pytest.mark.parametrize("change, message", [
    (lambda s, x: (s, x[:-1]), "samples and"),
    (lambda s, x: (s[s["split"] != "valid"], x[(s["split"] != "valid").to_numpy()]), "0 trusted rows"),
    (lambda s, x: (s[s["split"] != "train"], x[(s["split"] != "train").to_numpy()]), "0 training"),
    (lambda s, x: (s[(s["split"] != "valid") | s["query_id"].isin(["q0", "q4"])], x[((s["split"] != "valid") | s["query_id"].isin(["q0", "q4"])).to_numpy()]), "at least 3"),
])
def test_samples_that_will_not_do(change, message):
    with pytest.raises(DataError, match=message):
        fit_stack(*change(*problem()), FAST, progress=False)


def test_a_stack_combines_new_rows_by_the_ranks_of_the_training_rows():
    known = pd.DataFrame({"a": [1.0, 2.0, 3.0, 4.0], "b": [8.0, 6.0, 4.0, 2.0]}, index=pd.Index(list("rstu"), name="sample_id"))
    stack = Stack(pd.Series([1.0, 2.0], index=["a", "b"]), 0.5, known, pd.DataFrame())
    with pytest.raises(DataError, match="lack b"):
        stack.combine(known[["a"]])
    np.testing.assert_allclose(stack.combined, 0.5 + (np.arange(4) + 0.5) / 4 + 2 * (3.5 - np.arange(4)) / 4)
    new = pd.DataFrame({"a": [2.5, 99.0], "b": [5.0, 5.0], "c": [0.0, 0.0]}, index=pd.Index(["x", "y"], name="sample_id"))
    np.testing.assert_allclose(stack.combine(new), [0.5 + 0.5 + 1.0, 0.5 + 3.5 / 4 + 1.0])
    assert stack.combine(new.iloc[:1]).item() == stack.combine(new).iloc[0], "whatever stands beside it"


def test_a_copy_that_teaches_nothing_gives_the_mean_rank(monkeypatch, caplog):
    samples, x = problem()
    monkeypatch.setattr(combining, "fit_coefficients", lambda ranks, right, **how: (0.3, np.zeros(ranks.shape[1])))
    stack = fit_stack(samples, x, FAST, progress=False)
    np.testing.assert_allclose(stack.combined, mean_rank(stack.scores))
    assert "the stack is the mean rank" in caplog.text


@pytest.mark.parametrize("call, message", [
    (lambda s, x: stacked(s, x, "oof_loss", progress=False), "a stack of oof_loss"),
    (lambda s, x: stacked(Evidence.from_samples(s.drop(columns="noise"), x), x, progress=False), "are a Evidence"),
    (lambda s, x: stacked(s.drop(columns="split"), x, progress=False), "without a column split"),
])
def test_what_is_no_table_of_samples_or_no_list_of_names(call, message):
    with pytest.raises(DataError, match=message):
        call(*problem())
