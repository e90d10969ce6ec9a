"""Further ways to act: each arm does what its name says, has a control that was trained alike, and nothing leaks."""
import numpy as np
import pandas as pd
import pytest

from ecom_importance.evaluation import RankingMetric
from ecom_importance.finetuning.arms import Arm, auto, choose_arm, halve_select, run_trial, tabulate_arms, train_arm
from ecom_importance.finetuning.ways import RULES, adaptive_arms, kept_arms, kept_curve, other_ways, relabelled_arms, resampled_arms
from ecom_importance.importance import Evidence, find, score
from ecom_importance.samples import DataError
from ecom_importance.weighting import MetaGradient, Reweighted

METRIC = RankingMetric("ndcg", k=5, min_items=4)


def generate(seed=0, d=6, sizes={"train": 40, "valid": 10, "select": 16, "test": 20}):
    rng = np.random.default_rng(seed)
    split = np.repeat(list(sizes), [8 * n for n in sizes.values()])
    n, direction = len(split), rng.normal(size=d) / np.sqrt(d)
    vectors = rng.normal(size=(n, d)).astype(np.float32)
    gain, query = np.digitize(vectors @ direction + 0.3 * rng.normal(size=n), [-0.3, 0.5]) / 2, np.arange(n) // 8
    return pd.DataFrame({"sample_id": [f"s{i}" for i in range(n)], "query_id": query, "query": [f"查询 {i}" for i in query], "item_id": np.arange(n), "item_text": [f"商品 {i}" for i in range(n)],
                         "label": gain, "gain": gain, "split": split, "vector": list(vectors)})


def stack(table):
    return np.stack(table["vector"].to_list())


@pytest.fixture(scope="module")
def made():
    samples = generate()
    evidence = Evidence.from_samples(samples, stack(samples))
    return samples, evidence, stack(samples), score(evidence, ["random", "oof_loss", "trusted_loss"])


@pytest.fixture(scope="module")
def trial():
    return run_trial(generate(), vectorise=stack, estimators=["oof_loss", "trusted_loss"], metric=METRIC, seeds=range(2), noise="flip", rate=0.2, keep=(0.6,), progress=False,
                     more_arms=lambda *given: other_ways(*given, curves=["trusted_loss"], fractions=(0.2, 0.5)))


def test_every_arm_has_a_control_that_exists_and_rows_that_may_be_learned_from(made):
    samples, evidence, vectors, scores = made
    arms = other_ways(samples, evidence, vectors, scores, 0, curves=["oof_loss"])
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names)
    known = {*names, "uniform", "trusted + uniform"}
    split = samples.set_index("sample_id")["split"]
    for arm in arms:
        assert arm.control is None or arm.control in known
        assert set(split[arm.weights.index[arm.weights > 0]]) <= {"train", "valid"}
        assert ("valid" in set(split[arm.weights.index])) == arm.name.startswith("trusted +")
    assert {arm.way for arm in arms} == {"", "adaptive", "resampled", "relabelled", "curve"}


def test_adaptive_arms_are_compared_with_uniform_training_in_steps(made):
    arms = {arm.name: arm for arm in adaptive_arms(made[0])}
    assert arms["uniform in steps"].control is None and arms["focal"].control == "uniform in steps" and arms["trusted + focal"].control == "trusted + uniform in steps"
    assert "trusted + learning to reweight" not in arms, "what it asks it cannot learn from"
    without = {arm.name for arm in adaptive_arms(made[0][made[0]["split"] != "valid"])}
    assert without == {"uniform in steps", *RULES} - {"learning to reweight"}


def test_drawn_rows_keep_the_size_of_queries_and_balanced_grades_are_balanced(made):
    samples, _, vectors, scores = made
    arms = {arm.name: arm for arm in resampled_arms(samples, vectors, scores[["oof_loss"]])}
    query, gain = samples.set_index("sample_id")["query_id"], samples.set_index("sample_id")["gain"]
    drawn = arms["drawn by oof_loss"].weights
    np.testing.assert_allclose(drawn.groupby(query).sum(), 8)
    for name in ("grades over-sampled", "grades under-sampled"):
        per_grade = arms[name].weights.groupby(gain).sum()
        np.testing.assert_allclose(per_grade, per_grade.iloc[0])
    assert 0 < (arms["edited by neighbours"].weights == 0).mean() < 1


def test_relabelled_rows_are_the_worst_and_get_what_a_model_that_has_not_seen_them_expects(made):
    samples, evidence, _, scores = made
    (arm,) = [arm for arm in relabelled_arms(samples, scores[["trusted_loss"]], evidence, share=0.25) if arm.name.startswith("worst")]
    assert len(arm.gain) == 80 and scores.loc[arm.gain.index, "trusted_loss"].max() <= scores["trusted_loss"].drop(arm.gain.index).min()
    np.testing.assert_allclose(arm.gain, pd.Series(find(evidence, "trusted_oof"), scores.index)[arm.gain.index])
    ranker = train_arm(samples, arm, metric=METRIC, vectors=stack(samples), record=True)
    by_hand = samples.assign(gain=np.where(samples["sample_id"].isin(arm.gain.index), samples["sample_id"].map(arm.gain), samples["gain"]))
    np.testing.assert_allclose(ranker.head.weights, train_arm(by_hand, Arm("uniform", arm.weights), metric=METRIC, vectors=stack(samples)).head.weights)
    assert not relabelled_arms(samples, scores[["random"]], evidence), "random numbers expect nothing"
    with pytest.raises(DataError, match="share is 0"):
        relabelled_arms(samples, scores, evidence, share=0)


def test_relabelling_touches_no_select_row(made):
    samples = made[0]
    flipped = pd.Series(1 - samples["gain"].to_numpy(), samples["sample_id"])  # of every row there is
    uniform = pd.Series(1.0, samples.loc[samples["split"] == "train", "sample_id"].to_numpy())
    arm = Arm("all", uniform, gain=flipped)
    ranker = train_arm(samples, arm, metric=METRIC, vectors=stack(samples))
    half = halve_select(samples) == "stop"
    value = METRIC.mean(samples["query_id"][half], samples["gain"][half], ranker.predict(samples[half], stack(samples)[half]))
    assert value == pytest.approx(ranker.history["select"].max()), "judged by the right labels, though trained on the opposite"


def test_uniform_in_steps_ends_near_uniform(made):
    samples = made[0]
    uniform = Arm("uniform", pd.Series(1.0, samples.loc[samples["split"] == "train", "sample_id"].to_numpy()))
    without_select = samples.assign(split=samples["split"].replace({"select": "test"}))
    at_once = train_arm(without_select, uniform, metric=METRIC, vectors=stack(samples), ridge=0.05)
    in_steps = train_arm(without_select, Arm("in steps", uniform.weights, rule=Reweighted(beta=0)), metric=METRIC, vectors=stack(samples), ridge=0.05)
    assert np.corrcoef(at_once.predict(samples, stack(samples)), in_steps.predict(samples, stack(samples)))[0, 1] > 0.9999


def test_learning_to_reweight_sees_trusted_rows_and_never_the_choosing_half_or_test(made):
    samples = made[0]
    arm = Arm("meta", pd.Series(1.0, samples.loc[samples["split"] == "train", "sample_id"].to_numpy()), rule=MetaGradient())
    weights = lambda table: train_arm(table, arm, metric=METRIC, vectors=stack(table)).head.weights
    half = halve_select(samples)
    unread = (half == "choose") | (samples["split"] == "test")
    np.testing.assert_array_equal(weights(samples), weights(samples.assign(gain=samples["gain"].where(~unread, 0.5))))
    assert not np.allclose(weights(samples), weights(samples.assign(gain=samples["gain"].where(samples["split"] != "valid", 1 - samples["gain"]))))


def test_curves_are_shown_and_not_chosen_among(trial):
    curve = kept_curve(trial, "trusted_loss")
    assert curve.groupby("end")["fraction"].agg(list).to_dict() == {"best": [0.2, 0.5], "worst": [0.2, 0.5]}
    means = curve.set_index(["end", "fraction"])["metric"]
    assert means["best", 0.5] > means["worst", 0.5]
    assert (curve["low"] <= curve["difference"]).all() and (curve["difference"] <= curve["high"]).all()
    for arm in [choose_arm(trial, only_scored=True), *auto(trial).table.index]:
        assert arm == "uniform" or trial.arms[arm].way != "curve"


def test_the_table_holds_all_ways_corrected_together(trial):
    table = tabulate_arms(trial)
    assert {"focal", "drawn by oof_loss", "worst 20% relabelled by trusted_loss"} <= set(table.index)
    assert (table["p (Holm)"].dropna() <= 1).all() and not any("% kept by" in name for name in table.index)
    assert all(f"arm {name}" in trial.seeds[0].seconds for name in trial.arms)
