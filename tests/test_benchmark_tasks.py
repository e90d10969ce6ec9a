"""Tasks of the benchmark: scores that are the answer come out at the top, refits agree with other fits, and nothing of the ledger is in the evidence."""
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from ecom_importance.benchmark.tasks import SHARES, detect, foretell, gains, leave_queries_out, log_likelihoods, make_problem, rank_correlations, refer, remove, see_with
from ecom_importance.evaluation import RankingMetric, detection
from ecom_importance.importance import find, score
from ecom_importance.importance.heads import fit_head
from ecom_importance.samples import DataError

METRIC = RankingMetric("ndcg", k=5, min_items=2)
WIDTH = 6


def samples(queries: int = 70, items: int = 6, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    n = queries * items
    features = rng.normal(size=(n, WIDTH))
    chance = 1 / (1 + np.exp(-features @ np.array([2, -1.5, 1, 0, 0, 0.5])))
    query = np.arange(n) // items
    split = np.select([query < queries * 0.5, query < queries * 0.7], ["train", "valid"], "test")
    table = pd.DataFrame({"sample_id": [f"s{i}" for i in range(n)], "query_id": [f"q{q}" for q in query], "query": [f"query {q}" for q in query], "item_id": [f"i{i}" for i in range(n)],
                          "item_text": [f"item {i}" for i in range(n)], "label": (rng.random(n) < chance).astype(int), "split": split})
    table = table.assign(gain=table["label"].astype(float))
    return table.join(pd.DataFrame(features, columns=[f"f{place}" for place in range(WIDTH)]))


def describe(rows: pd.DataFrame) -> np.ndarray:
    return rows[[f"f{place}" for place in range(WIDTH)]].to_numpy(np.float32)


@pytest.fixture(scope="module")
def problem():
    return make_problem(samples(), describe, METRIC, name="invented", noise="flip", rate=0.2, seed=3)


@pytest.fixture(scope="module")
def scores(problem):
    return score(problem.evidence, ["random", "oof_loss", "trusted_loss", "influence", "knn_shapley"], progress=False)


def value(table: pd.DataFrame, estimator: str, metric: str) -> float:
    found = table[(table["estimator"] == estimator) & (table["metric"] == metric)]["value"]
    assert len(found) == 1
    return float(found.iloc[0])


def test_a_problem_keeps_ledger_truth_and_test_rows_out_of_the_evidence(problem):
    assert problem.wrong.mean() == pytest.approx(0.2, abs=0.01) and problem.n == 210 and problem.n_valid == 84
    clean = samples().set_index("sample_id")["gain"]
    np.testing.assert_array_equal(problem.true_gain, clean[problem.named])
    np.testing.assert_array_equal(np.asarray(find(problem.evidence, "y")) != problem.true_gain, problem.wrong)
    assert not problem.hard[problem.wrong].any() and 0 < problem.hard.sum() <= 21
    assert "noise" not in problem.evidence.train and "noise" not in problem.evidence.valid
    assert not set(problem.test["sample_id"]) & set(problem.evidence.sample_ids)
    assert (problem.seen["sample_id"].to_numpy()[: problem.n] == problem.evidence.sample_ids).all()
    np.testing.assert_allclose(problem.game.y[: len(problem.seen)], problem.seen["gain"])


@pytest.mark.parametrize("kind", ["flip", "duplicate_conflict"])  # the second adds rows, at the end
def test_neither_names_nor_order_tell_what_was_planted(kind):
    mixed = [make_problem(samples(), describe, METRIC, name="invented", noise=kind, rate=0.2, seed=seed) for seed in range(5)]
    for problem in mixed:
        places = np.arange(problem.n, dtype=float)
        by_name = pd.Index(problem.evidence.sample_ids).argsort().argsort().astype(float)
        assert not set(problem.named) & set(problem.evidence.sample_ids)
        for told in (places, by_name):
            assert abs(2 * detection(told, problem.wrong)["auroc"] - 1) < 0.35
    assert abs(np.mean([detection(np.arange(problem.n, dtype=float), problem.wrong)["auroc"] for problem in mixed]) - 0.5) < 0.08
    assert list(mixed[0].evidence.sample_ids) != list(mixed[1].evidence.sample_ids)


def test_refits_are_those_of_a_head_alone(problem):
    weights = np.random.default_rng(0).uniform(0.1, 2, (4, problem.n))
    heads = problem.refit(weights)
    wide, y = problem.game.wide, problem.game.y
    for head, weight in zip(heads, weights):
        every = np.r_[weight, np.zeros(problem.n_valid), problem.game.prior]
        used = every > 0
        alone = fit_head(wide[used, :-1], y[used], ridge=problem.game.ridge, weights=every[used], tolerance=1e-12)
        np.testing.assert_allclose(head, np.r_[alone.weights, alone.intercept], atol=1e-4)


def test_the_ledger_itself_finds_everything(problem, scores):
    truth = scores.assign(ledger=-problem.wrong.astype(float))
    found = detect(problem, truth)
    assert value(found, "ledger", "auroc") == value(found, "ledger", "ap") == value(found, "ledger", "kmeans_f1") == 1 and value(found, "ledger", "hard_flagged") == 0
    assert value(found, "trusted_loss", "auroc") > 0.7 > value(found, "random", "auroc")


def test_nothing_is_detected_where_nothing_is_wrong():
    plain = make_problem(samples(40), describe, METRIC, name="invented")
    assert detect(plain, score(plain.evidence, "oof_loss", progress=False)).empty and not plain.wrong.any()


def test_true_effects_foretell_themselves(problem, scores):
    "Scores made of the queries' true effects have a correlation of 1 with them; influence comes near, random does not."
    codes, queries = pd.factorize(problem.query)
    heads = problem.refit(np.vstack([np.ones(problem.n), codes[None] != np.arange(len(queries))[:, None]]))
    achieved = log_likelihoods(np.asarray(find(problem.evidence, "x_valid"), float), np.asarray(find(problem.evidence, "y_valid"), float), heads).mean(axis=1)
    exact = (achieved[0] - achieved[1:])[codes] / np.bincount(codes)[codes]
    found = leave_queries_out(problem, scores.assign(exact=exact))
    assert value(found, "exact", "query_out_valid") == pytest.approx(1) and value(found, "exact", "query_out_valid_pearson") == pytest.approx(1)
    assert value(found, "influence", "query_out_valid") > 0.95 and abs(value(found, "random", "query_out_valid")) < 0.5


def test_datamodeling_scores(problem, scores):
    found = foretell(problem, scores, subsets=150)
    assert value(found, "influence", "lds_valid") > 0.8 and value(found, "influence", "lds_query") > 0.7 and abs(value(found, "random", "lds_valid")) < 0.35
    assert value(found, "influence", "lds_valid") > value(found, "influence", "lds_test")
    assert set(found.loc[found["metric"] == "lds_query", "estimator"]) == {"influence", "knn_shapley"}, "those that are sums over trusted rows"
    pd.testing.assert_frame_equal(found, foretell(problem, scores, subsets=150))


def test_rank_correlations_are_scipys():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 4, (30, 4)).astype(float), rng.normal(size=(30, 4))
    np.testing.assert_allclose(rank_correlations(a, b), [spearmanr(a[:, place], b[:, place])[0] for place in range(4)])
    assert np.isnan(rank_correlations(np.ones((5, 1)), b[:5, :1])[0])


def test_curves_remove_what_they_say(problem, scores):
    ledger = pd.DataFrame({"ledger": -problem.wrong.astype(float)}, index=scores.index)
    found = remove(problem, ledger, shares=(0.2,))
    wrong_gone = problem.judge(problem.refit((~problem.wrong)[None]))[0]
    assert value(found, "ledger", "worst@0.2") == pytest.approx(wrong_gone) and value(found, "ledger", "all rows") == pytest.approx(problem.judge(problem.refit(np.ones((1, problem.n))))[0])
    whole = remove(problem, scores)
    assert len(whole) == len(scores.columns) * (2 * len(SHARES) + 1)


def test_gains_and_references(problem, scores):
    ledger = pd.DataFrame({"ledger": -problem.wrong.astype(float)}, index=scores.index)
    found, of = gains(problem, ledger), refer(problem).set_index("metric")["value"]
    assert set(found["metric"]) == {"weighted", "best 80%", "best 50%", "trusted + weighted", "trusted + best 80%", "trusted + best 50%"}
    assert value(found, "ledger", "best 80%") == pytest.approx(problem.judge(problem.refit((~problem.wrong)[None]))[0])
    clean = make_problem(samples(), describe, METRIC, name="invented", seed=3)
    np.testing.assert_allclose(of["clean labels"], clean.judge(np.c_[[np.r_[fit_head(clean.game.wide[[*range(clean.n), -1], :-1], np.r_[problem.true_gain, problem.game.y[-1]], ridge=problem.game.ridge, tolerance=1e-12).weights, 0.0]]])[0], atol=1e-3)
    assert of["clean labels"] > of["random order"] and of["trusted alone"] > of["random order"]


def test_another_encoder_reads_the_same_scores(problem, scores):
    same = see_with(problem, describe)
    np.testing.assert_allclose(same.x_test, problem.x_test)
    np.testing.assert_allclose(same.judge(same.refit(np.ones((1, problem.n)))), problem.judge(problem.refit(np.ones((1, problem.n)))), atol=1e-6)
    blind = see_with(problem, lambda rows: np.zeros((len(rows), 2)))
    table = gains(blind, scores)
    assert table["value"].std() == 0 and same.evidence is problem.evidence


def test_single_pairs_are_judged_by_auroc():
    single = make_problem(samples().assign(query_id=lambda table: table["sample_id"]), describe, None, name="invented", noise="flip", rate=0.2)
    assert 0.7 < single.judge(single.refit(np.ones((1, single.n))))[0] <= 1


def test_a_missing_split_is_told():
    with pytest.raises(DataError, match="no rows of split 'test'"):
        make_problem(samples().query("split != 'test'"), describe, METRIC, name="invented")
