"""Arms: alike for all, blind to test, chosen on select; and what happens where an arm cannot be made."""
import numpy as np
import pandas as pd
import pytest

import ecom_importance.finetuning.arms as arms_module
from ecom_importance.evaluation import RankingMetric, compare
from ecom_importance.finetuning.arms import (Arm, auto, choose_arm, draw_training_queries, halve_select, judge, make_arms, run_trial, tabulate_arms, train_arm)
from ecom_importance.preprocessing.noise import plant
from ecom_importance.samples import DataError

METRIC = RankingMetric("ndcg", k=5, min_items=4)
stack = lambda table: np.stack(table["vector"].to_list())


real = arms_module._train_clean


def make_samples(seed=0, d=12, sizes=(60, 20, 24, 40)) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    split = np.repeat(["train", "valid", "select", "test"], [8 * n for n in sizes])
    n, direction = len(split), rng.normal(size=d) / np.sqrt(d)
    vectors = rng.normal(size=(n, d)).astype(np.float32)
    gain = np.digitize(vectors @ direction + 0.4 * rng.normal(size=n), [-0.3, 0.5]) / 2
    query = np.arange(n) // 8
    return pd.DataFrame({"sample_id": [f"s{i}" for i in range(n)], "query_id": query, "query": [f"杯 {i}" for i in query], "item_id": np.arange(n) % 50, "item_text": [f"item {i % 50}" for i in range(n)],
                         "label": gain, "gain": gain, "split": split, "vector": list(vectors)})


def run(samples, **how):
    how = {"estimators": ["random", "trusted_loss"], "seeds": [0, 1], "keep": (0.7,), "levels": (0, 0.5, 1), **how}
    return run_trial(samples, vectorise=stack, metric=METRIC, progress=False, **how)


@pytest.fixture(scope="module")
def trial():
    return run(make_samples(), noise="flip", rate=0.2, references={"first dimension": lambda table: stack(table)[:, 0]})


def test_every_arm_is_judged_on_the_same_rows(trial):
    shapes = {values.shape for values in trial.predictions.values()}
    assert len(shapes) == 1 and shapes.pop() == (2, len(trial.judged))
    assert {"random order", "first dimension", "uniform", "trusted alone", "trusted + uniform", "clean labels", "weighted by trusted_loss"} <= set(trial.predictions)
    assert trial.values("uniform").shape == trial.values("random order").shape and trial.values("uniform").shape[0] == 2


def test_a_trained_arm_beats_a_random_order(trial):
    assert judge(trial, "trusted alone", "random order").kind == "helps"


def test_test_labels_change_nothing_but_the_verdict(trial):
    blind = make_samples()
    blind.loc[blind["split"] == "test", "gain"] = 0.5
    again = run(blind, noise="flip", rate=0.2)
    for name in again.predictions:
        np.testing.assert_array_equal(again.predictions[name], trial.predictions[name])
    assert choose_arm(again) == choose_arm(trial)


def test_auto_takes_uniform_unless_an_arm_stands_after_holm(trial):
    choice = auto(trial, alpha=1e-9)  # no p-value of a randomisation is that small
    assert choice.uniform_wins and choice.arm == "uniform" and choice.sentence.startswith("uniform wins: none of")
    scored = {name for name, arm in trial.arms.items() if arm.estimator == "trusted_loss"}
    assert set(choice.table.index) == {"uniform", *scored}, "arms that act on a baseline are no candidates"
    bold = auto(trial, alpha=0.999)
    standing = choice.table[(choice.table["low"] > 0) & (choice.table["p (Holm)"] < 0.999)]
    assert bold.arm == (standing.index[0] if len(standing) else "uniform")
    from scipy.stats import false_discovery_control  # an upper bound on evidence: Holm is never below Benjamini and Hochberg

    raw = [compare(trial.values(name, "choose"), trial.values("uniform", "choose")).p for name in choice.table.index if name != "uniform"]
    assert (choice.table["p (Holm)"].drop("uniform").to_numpy() >= false_discovery_control(raw) - 1e-12).all()


def test_auto_looks_at_the_choosing_half_alone(trial):
    blind, noise_only = make_samples(), make_samples()
    blind.loc[blind["split"] == "test", "gain"] = 0.5
    pd.testing.assert_frame_equal(auto(run(blind, noise="flip", rate=0.2)).table, auto(trial).table)
    choosing = halve_select(noise_only) == "choose"
    noise_only.loc[choosing, "gain"] = np.random.default_rng(3).permutation(noise_only.loc[choosing, "gain"])
    assert auto(run(noise_only, noise="flip", rate=0.2)).uniform_wins, "where the judgments say nothing, nothing is acted on"


@pytest.mark.parametrize("alpha", [0, 1, -0.1])
def test_auto_names_a_bad_alpha(trial, alpha):
    with pytest.raises(ValueError, match="alpha is"):
        auto(trial, alpha=alpha)


def test_the_choosing_half_changes_no_prediction_but_may_change_the_choice(trial):
    samples = make_samples()
    samples.loc[halve_select(samples) == "choose", "gain"] = 0.5
    again = run(samples, noise="flip", rate=0.2)
    for name in again.predictions:
        np.testing.assert_array_equal(again.predictions[name], trial.predictions[name])


def test_a_seed_is_a_seed(trial):
    again = run(make_samples(), noise="flip", rate=0.2)
    for name in again.predictions:
        np.testing.assert_array_equal(again.predictions[name], trial.predictions[name])
    assert not np.array_equal(trial.predictions["uniform"][0], trial.predictions["uniform"][1])


def test_baselines_are_no_candidates(trial):
    assert trial.arms[choose_arm(trial, only_scored=True)].estimator == "trusted_loss"
    assert "random" not in choose_arm(trial)


def test_the_table_says_what_compare_says(trial):
    table = tabulate_arms(trial)
    name = "weighted by trusted_loss"
    verdict = compare(trial.values(name), trial.values("uniform"), metric=str(METRIC))
    assert table.loc[name, "control"] == "uniform"
    np.testing.assert_allclose(table.loc[name, ["difference", "low", "high"]].astype(float), [verdict.effect, verdict.low, verdict.high])
    assert (table.dropna(subset="control")["p (Holm)"] >= verdict.p).any() and table["select"].is_monotonic_decreasing


def test_seeds_are_remembered():
    kept, calls = {}, []

    def remember(seed, compute):
        if seed not in kept:
            calls.append(seed)
            kept[seed] = compute()
        return kept[seed]

    first, second = run(make_samples(), remember=remember), run(make_samples(), remember=remember)
    assert calls == [0, 1]
    np.testing.assert_array_equal(first.predictions["uniform"], second.predictions["uniform"])


def test_a_seed_is_saved_and_read_back(trial, tmp_path):
    first = trial.seeds[0]
    first.save(tmp_path / "seed-0.npz")
    second = first.load(tmp_path / "seed-0.npz")
    assert [arm.name for arm in second.arms] == [arm.name for arm in first.arms] and second.arms[-1].control == first.arms[-1].control
    assert second.found == first.found and second.rows == first.rows and list(second.predictions) == list(first.predictions)
    for name in first.predictions:
        np.testing.assert_array_equal(second.predictions[name], first.predictions[name])


def test_labels_are_called_clean_only_where_nothing_was_planted_before():
    spoiled, _ = plant(make_samples(), "flip", 0.1, 9)
    result = run(spoiled, noise="flip", rate=0.1, seeds=[0])
    assert "labels before planting" in result.predictions and "clean labels" not in result.predictions


@pytest.mark.parametrize("kind", ["flip", "whole_query", "duplicate_conflict"])
def test_noise_that_changes_the_rows_is_vectorised_again(kind):
    result = run(make_samples(), noise=kind, rate=0.1, seeds=[0])
    figures = result.detected()
    assert set(figures["estimator"]) == {"random", "trusted_loss"} and figures["auroc"].between(0, 1).all()
    assert result.seeds[0].rows >= 0.5 * 480
    assert (result.seeds[0].rows > (draw_training_queries(make_samples(), 0)["split"] == "train").sum()) == (kind == "duplicate_conflict")


def test_goods_that_went_stale_are_learned_as_stale_by_the_clean_arm(monkeypatch):
    learned = []
    monkeypatch.setattr(arms_module, "_train_clean", lambda drawn, *rest: learned.append(drawn) or real(drawn, *rest))
    samples = make_samples().assign(item_id=lambda table: table["sample_id"], item_text=lambda table: "item " + table["sample_id"])
    run(samples, noise="stale_item", rate=0.1, seeds=[0])
    before = draw_training_queries(samples, 0).set_index("sample_id")["gain"]
    stale = plant(draw_training_queries(samples, 0), "stale_item", 0.1, 0)[1].index
    after = learned[0].set_index("sample_id")["gain"]
    assert len(stale) and (after[stale] == 0).all() and (before[stale] > 0).all() and after.drop(stale).equals(before.drop(stale))


def test_rows_without_weight_are_not_learned_from():
    samples = make_samples()
    train = samples.loc[samples["split"] == "train", "sample_id"]
    part = Arm("part", pd.Series(1.0, index=train[:200].to_numpy()))
    zeros = Arm("zeros", pd.Series(np.r_[np.ones(200), np.zeros(len(train) - 200)], index=train.to_numpy()))
    rows = samples[samples["split"] == "test"]
    first, second = (train_arm(samples, arm, metric=METRIC, vectors=stack(samples)).predict(rows, stack(rows)) for arm in (part, zeros))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_each_grade_keeps_its_share():
    rng = np.random.default_rng(0)
    samples = pd.DataFrame({"sample_id": range(300), "split": "train"})
    grade = pd.Series(np.repeat([0, 1], [270, 30]), index=range(300))
    arms = make_arms(samples, pd.DataFrame({"loss": rng.normal(size=300) - 10 * grade}), grade, keep=(0.5,))
    kept = next(arm for arm in arms if "of each grade" in arm.name).weights
    assert (kept[grade == 0] > 0).sum() == 135 and (kept[grade == 1] > 0).sum() == 15
    np.testing.assert_allclose(kept.groupby(grade).mean(), 1)


def test_splits_are_halved_and_drawn_by_cluster():
    samples = make_samples()
    half = halve_select(samples)
    assert (half[samples["split"] == "select"] != "").all() and (half[samples["split"] != "select"] == "").all()
    assert half[half != ""].groupby(samples["query_id"]).nunique().max() == 1
    drawn = draw_training_queries(samples, 3, share=0.5)
    assert drawn[drawn["split"] != "train"].shape == samples[samples["split"] != "train"].shape
    assert set(draw_training_queries(samples.sample(frac=1, random_state=1), 3, share=0.5)["sample_id"]) == set(drawn["sample_id"])


@pytest.mark.parametrize("missing, what", [("select", "choosing half of select"), ("test", "no rows for test")])
def test_missing_splits_are_said(missing, what):
    samples = make_samples()
    with pytest.raises(DataError, match=what):
        run(samples[samples["split"] != missing].reset_index(drop=True))


def test_without_trusted_rows_there_are_no_trusted_arms():
    samples = make_samples()
    result = run(samples[samples["split"] != "valid"].reset_index(drop=True), estimators=["oof_loss"], seeds=[0])
    assert not any("trusted" in name for name in result.predictions) and "weighted by oof_loss" in result.predictions


def test_a_draw_that_leaves_nothing_is_an_error():
    with pytest.raises(DataError, match="no training queries"):
        draw_training_queries(make_samples(), 0, share=0.0)


def test_arms_name_controls_that_exist():
    samples = make_samples()
    train = samples[samples["split"] == "train"]
    scores = pd.DataFrame({"a": np.arange(len(train), dtype=float)}, index=train["sample_id"])
    arms = {arm.name: arm for arm in make_arms(samples, scores, pd.Series(0, index=scores.index))}
    assert len(arms) == 3 + 2 * 5 and all(arm.control in arms for arm in arms.values() if arm.control)
    kept = arms["trusted + best 60% by a"].weights
    assert set(kept.round(9)) == {0.0, 1.0} and (kept > 0).sum() == int(np.ceil(0.6 * len(train))) + (samples["split"] == "valid").sum()
