"""Search, averages and rounds: held-out values by brute force, searches that are killed, rows that must not be read, bad input."""
import json
import math
import sqlite3

import numpy as np
import pandas as pd
import pytest
import torch
from test_finetuning import FAST, METRIC, table, tiny  # noqa: F401  (tiny is a fixture)

from ecom_importance.evaluation import RankingMetric, spearman
from ecom_importance.features import sample_vectors
from ecom_importance.finetuning import fine_tune, load_ranker, make_ranker
from ecom_importance.finetuning.rounds import average_scores, average_weights, iterate, load_average, pair_vectors, score_round
from ecom_importance.finetuning.tuning import deal_queries, hold_out, hold_out_best, keep_epoch, quiet_optuna, read_space, tune
from ecom_importance.importance import estimator
from ecom_importance.samples import DataError
from ecom_importance.weighting import effective_sample_size, weigh
from ecom_importance.weighting.adaptive import Focal, MetaGradient, SelfPaced, Truncated


pytestmark = pytest.mark.usefixtures("quick_collections")

HEAD = dict(kind="head", metric=METRIC, progress=False, folds=3)


def with_vectors(n_queries=36, d=6, seed=0):
    "Samples of `table`, a third of their training labels wrong, trusted queries among them, and vectors that know the gain."
    samples = table(n_queries=n_queries)
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(len(samples), d)).astype(np.float32)
    vectors[:, 0] += 2 * samples["gain"]
    trusted = samples["query_id"].isin([f"q{number}" for number in range(0, n_queries, 6)])
    samples["split"] = samples["split"].mask(trusted, "valid")
    wrong = (samples["split"] == "train") & (rng.random(len(samples)) < 0.33)
    samples["gain"] = samples["gain"].mask(wrong, 1 - samples["gain"])
    return samples, vectors, wrong


def scores_of(samples, wrong, seed=1):
    train = samples["split"] == "train"
    return pd.Series(np.random.default_rng(seed).normal(size=train.sum()) - 3 * wrong[train].to_numpy(), index=samples.loc[train, "sample_id"].to_numpy())


def same(one, other):
    pd.testing.assert_frame_equal(one.table.drop(columns="seconds"), other.table.drop(columns="seconds"))
    assert one.best_trial == other.best_trial
    np.testing.assert_array_equal(one.nested(), other.nested())


# ---- what a trial is worth

@pytest.mark.parametrize("kind, patience, rate", [("bi-encoder", 1, 3e-3), ("cross-encoder", 1, 1e-2)])
def test_one_training_gives_what_a_training_for_each_fold_gives(tiny, kind, patience, rate):
    samples = table(n_queries=24)
    how = dict(kind=kind, model=tiny, epochs=3, patience=patience, batch_size=16, learning_rate=rate, metric=METRIC, device="cpu", progress=False)
    tuned = tune(samples, space={}, trials=1, folds=3, **how)
    select = samples[samples["split"] == "select"]
    for fold in range(3):
        judged = tuned.plan.query_ids[tuned.plan.fold == fold]
        ranker = fine_tune(samples[~samples["query_id"].isin(judged)], **how)
        found = dict(zip(*METRIC.per_query(select["query_id"], select["gain"], ranker.predict(select))))
        np.testing.assert_array_equal([found[query] for query in judged], tuned.values(0)[tuned.plan.fold == fold])


def test_each_fold_is_judged_after_the_epoch_of_the_others():
    noted = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.4]])
    held, _ = hold_out(noted, np.array([0, 1, 2]))
    # without query 0 the second epoch leads (0.6 to 0.2), without query 1 the first (0.6 to 0.3), without query 2 they tie and the first stays
    assert held.tolist() == [0.2, 0.1, 0.3]


def test_patience_stops_before_a_late_best():
    assert keep_epoch([0.5, 0.4, 0.4, 0.9], 2) == (0, True)
    assert keep_epoch([0.5, 0.4, 0.6, 0.5, 0.9], 2) == (4, False)
    assert keep_epoch([0.5, 0.5], 5) == (0, False)


def test_the_best_of_pure_luck_is_too_good_and_held_out_it_is_not():
    rng, fold, gaps = np.random.default_rng(0), np.arange(30) % 5, []
    for _ in range(60):
        noted = {trial: [rng.normal(size=(2, 30))] for trial in range(12)}
        best = max(hold_out(runs[0], fold)[0].mean() for runs in noted.values())
        gaps.append((best, hold_out_best(noted, fold)[0].mean()))
    best, held = np.mean(gaps, axis=0)
    assert best > 0.2 and abs(held) < 0.08


def test_near_duplicate_queries_share_a_fold():
    select = pd.DataFrame({"query_id": np.repeat(range(9), 2), "query": np.repeat(["red lamp", "lamp red", "杯 红", "杯红", "tea", "pot", "cup", "sock", "shoe"], 2), "item_id": range(18)})
    fold = deal_queries(select, np.arange(9), 3)
    assert fold[0] == fold[1] and set(fold) == {0, 1, 2}
    assert (deal_queries(select.sample(frac=1, random_state=0), np.arange(9), 3) == fold).all()
    with pytest.raises(DataError, match="folds is 9"):
        deal_queries(select, np.arange(9), 9)


# ---- the search

def test_search_finds_that_scores_are_worth_believing():
    samples, vectors, wrong = with_vectors()
    tuned = tune(samples, scores=scores_of(samples, wrong), vectors=vectors, trials=8, **HEAD)
    first, best = tuned.table.loc[0], tuned.table.loc[tuned.best_trial]
    assert math.isinf(first["temperature"]) and first["effective_rows"] == (samples["split"] == "train").sum()
    assert best["value"] == tuned.table["value"].max() and best["value"] >= first["value"]
    weights = tuned.settings_of(3)["weights"]
    assert tuned.table.loc[3, "effective_rows"] == pytest.approx(effective_sample_size(weights)) and weights.mean() == pytest.approx(1)
    assert (np.diff(tuned.table.sort_values("temperature")["effective_rows"]) > 0).all(), "the hotter, the more alike"


def test_settings_go_straight_into_fine_tune(tiny):
    samples = table(n_queries=24)
    scores = scores_of(samples, pd.Series(False, index=samples.index))
    tuned = tune(samples, scores=scores, space={"learning_rate": (1e-3, 1e-2), "train_layers": (1, 3), "batch_size": [4, 8]}, model=tiny, trials=2, folds=3, epochs=1, metric=METRIC, device="cpu", progress=False)
    ranker = fine_tune(samples, **tuned.settings_of(1))
    assert {name: ranker.settings[name] for name in ("learning_rate", "train_layers", "batch_size", "epochs")} == {name: tuned.table.loc[1, name] for name in ("learning_rate", "train_layers", "batch_size")} | {"epochs": 1}
    assert ranker.settings["weighted"] and not fine_tune(samples, **tuned.settings_of(0)).settings["weighted"]


def test_default_space_knows_how_many_layers_there_are(tiny):
    tuned = tune(table(n_queries=24), model=tiny, trials=2, folds=3, epochs=1, metric=METRIC, device="cpu", progress=False)
    assert tuned.plan.space["train_layers"].high == 3 and tuned.plan.first["learning_rate"] == 1e-4 and set(tuned.best) == {"learning_rate", "train_layers", "batch_size"}


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_killed_search_goes_on_to_the_same_trials(tmp_path, after):
    samples, vectors, wrong = with_vectors()
    scores = scores_of(samples, wrong)
    spread = scores.std(ddof=0)
    calls = []

    def weights(temperature):
        calls.append(temperature)
        if len(calls) == 2 + 2 * after:
            raise KeyboardInterrupt
        return weigh(scores, "softmax", temperature=temperature * spread)

    how = HEAD | dict(vectors=vectors, trials=14, space={"temperature": (0.3, math.inf), "ridge": (1e-4, 1.0)})
    calm = lambda temperature: weigh(scores, "softmax", temperature=temperature * spread)
    whole = tune(samples, calm, **how)
    with pytest.raises(KeyboardInterrupt):
        tune(samples, weights, study=tmp_path / "study.db", **how)
    same(tune(samples, calm, study=tmp_path / "study.db", **how), whole)
    same(tune(samples, calm, study=tmp_path / "study.db", **how), whole)
    longer = tune(samples, calm, study=tmp_path / "study.db", **how | dict(trials=16))
    pd.testing.assert_frame_equal(longer.table.loc[:13].drop(columns="seconds"), whole.table.drop(columns="seconds"))


def test_pruned_trials_come_back_from_the_file(tiny, tmp_path):
    import optuna

    class Odd(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number % 2 == 1

    samples = table(n_queries=24)
    how = dict(space={"learning_rate": (1e-6, 1e-2)}, model=tiny, kind="cross-encoder", epochs=2, folds=3, metric=METRIC, device="cpu", progress=False, batch_size=16, pruner=Odd())
    whole = tune(samples, trials=4, **how)
    assert whole.table["state"].tolist() == ["complete", "pruned", "complete", "pruned"] and whole.table["se"].isna().equals(whole.table["state"] != "complete") and whole.table["value"].notna().all()
    tune(samples, trials=3, study=tmp_path / "study.db", **how)
    same(tune(samples, trials=4, study=tmp_path / "study.db", **how), whole)


@pytest.mark.parametrize("name, change", [("training rows", lambda samples, how: (samples.assign(gain=np.where(samples["split"] == "train", 1 - samples["gain"], samples["gain"])), how)),
                                          ("select rows", lambda samples, how: (samples.assign(item_text=samples["item_text"].mask(samples["split"] == "select", "tea")), how)),
                                          ("metric", lambda samples, how: (samples, how | dict(metric=RankingMetric("mrr")))), ("seed", lambda samples, how: (samples, how | dict(seed=5))),
                                          ("space", lambda samples, how: (samples, how | dict(space={"ridge": (0.1, 1.0)}))), ("vectors", lambda samples, how: (samples, how | dict(vectors=2 * how["vectors"]))),
                                          ("weights", lambda samples, how: (samples, how | dict(weights=pd.Series(np.arange(1.0, 1 + len(samples)), index=samples["sample_id"]))))])
def test_the_file_of_another_search_is_refused_by_what_differs(tmp_path, name, change):
    samples, vectors, _ = with_vectors()
    how = HEAD | dict(vectors=vectors, space={"ridge": (0.01, 1.0)}, trials=2)
    tune(samples, study=tmp_path / "study.db", **how)
    other, changed = change(samples, how)
    with pytest.raises(DataError, match=name):
        tune(other, study=tmp_path / "study.db", **changed)
    tune(samples.sample(frac=1).sort_index(), study=tmp_path / "study.db", **how)


def test_no_database_and_another_writer(tmp_path):
    samples, vectors, _ = with_vectors()
    how = HEAD | dict(vectors=vectors, trials=2)
    (tmp_path / "text.db").write_text("this is no database, " * 100, encoding="utf-8")
    with pytest.raises(DataError, match="no study"):
        tune(samples, study=tmp_path / "text.db", **how)
    tune(samples, study=tmp_path / "new folder" / "study.db", **how)
    assert sqlite3.connect(tmp_path / "new folder" / "study.db").execute("select count(*) from trials").fetchone() == (2,)


def test_test_and_valid_rows_are_not_read():
    samples, vectors, wrong = with_vectors()
    spoiled, others = samples.copy(), samples["split"].isin(["valid", "test"])
    spoiled.loc[others, ["query", "item_text"]] = None
    spoiled.loc[others, "gain"] = np.nan
    ruined = vectors.copy()
    ruined[others] = np.nan
    scores = scores_of(samples, wrong)
    same(tune(spoiled, scores=scores, vectors=ruined, trials=5, **HEAD), tune(samples, scores=scores, vectors=vectors, trials=5, **HEAD))


def test_a_loss_that_is_no_number_ends_the_trial_and_not_the_search(tiny, tmp_path):
    samples = table(n_queries=24)
    how = dict(model=tiny, folds=3, epochs=1, metric=METRIC, device="cpu", progress=False, trials=3, batch_size=16, train_layers="all")
    tuned = tune(samples, space={"learning_rate": [1e-3, 1e30]}, study=tmp_path / "study.db", **how)
    assert (tuned.table["state"][tuned.table["learning_rate"] == 1e30] == "failed").all() and (tuned.table["state"] == "failed").any()
    assert tuned.best == {"learning_rate": 1e-3} and tuned.table["value"][tuned.table["state"] == "failed"].isna().all()
    same(tune(samples, space={"learning_rate": [1e-3, 1e30]}, study=tmp_path / "study.db", **how), tuned)
    with pytest.raises(DataError, match="none of 1 trials"):
        tune(samples, space={"learning_rate": [1e30]}, **how | dict(trials=1))


def test_repeats_take_the_mean_over_seeds(tiny):
    samples = table(n_queries=24)
    how = dict(space={}, trials=1, model=tiny, folds=3, epochs=2, metric=METRIC, device="cpu", progress=False, learning_rate=3e-3, kind="cross-encoder")
    both = tune(samples, repeats=2, **how)
    assert len(both.noted[0]) == 2 and not np.array_equal(*both.noted[0])
    first = tune(samples, **how)
    np.testing.assert_array_equal(both.noted[0][0], first.noted[0][0])


def test_optunas_log_level_is_put_back(capsys):
    import optuna

    samples, vectors, _ = with_vectors()
    before = optuna.logging.get_verbosity()
    tune(samples, vectors=vectors, trials=2, **HEAD)
    assert optuna.logging.get_verbosity() == before and "Trial" not in capsys.readouterr().err
    with pytest.raises(RuntimeError), quiet_optuna():
        raise RuntimeError
    assert optuna.logging.get_verbosity() == before


def test_without_optuna_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    samples, vectors, _ = with_vectors()
    with pytest.raises(DataError, match=r"pip install 'ecom_importance\[tune\]'"):
        tune(samples, vectors=vectors, trials=2, **HEAD)


@pytest.mark.parametrize("change, told", [(dict(trials=0), "trials is 0"), (dict(folds=2), "folds is 2"), (dict(folds=50), "folds is 50"), (dict(kind="tree"), "kind is 'tree'"), (dict(repeats=2), "repeats is 2"),
                                          (dict(vectors=None), "needs vectors"), (dict(vectors=np.zeros((3, 2))), "shape"), (dict(ridg=1.0), "did you mean 'ridge'"), (dict(folder="here"), "no setting 'folder'"),
                                          (dict(space={"ridg": (1.0, 2.0)}), "did you mean 'ridge'"), (dict(space={"ridge": (2.0, 1.0)}), "space of ridge"), (dict(space={"ridge": []}), "space of ridge"), (dict(space={"seed": (0, 3)}), "nothing that can be searched"),
                                          (dict(space={"temperature": (0.0, 1.0)}, scores="good"), "space of temperature"), (dict(space={"temperature": (1.0, 2.0)}), "nothing that it could change"),
                                          (dict(scores="alike"), "all alike"), (dict(scores="strangers"), "no score of a training row"), (dict(weights=lambda temperature: None), "space has no temperature")])
def test_bad_input(change, told):
    samples, vectors, wrong = with_vectors()
    good = scores_of(samples, wrong)
    change = dict(change)
    if "scores" in change:
        change["scores"] = {"good": good, "alike": good * 0, "strangers": good.rename(lambda name: f"other {name}")}[change["scores"]]
    with pytest.raises(DataError, match=told):
        tune(samples, **HEAD | dict(vectors=vectors, trials=2) | change)


def test_weights_beside_scores_and_missing_splits_are_refused():
    samples, vectors, wrong = with_vectors()
    with pytest.raises(DataError, match="both weights and scores"):
        tune(samples, pd.Series(1.0, index=samples["sample_id"]), scores=scores_of(samples, wrong), vectors=vectors, trials=2, **HEAD)
    with pytest.raises(DataError, match="split"):
        tune(samples[samples["split"] != "select"], vectors=vectors, trials=2, **HEAD)
    assert read_space({"temperature": (0.5, math.inf)})["1/temperature"].low == 0


# ---- rules in the place of weights

@pytest.mark.parametrize("kind, rule", [("head", SelfPaced(first=0.3)), ("head", MetaGradient()), ("bi-encoder", MetaGradient()), ("cross-encoder", Truncated(most=0.4, ramp=0.3))])
def test_a_search_under_a_rule_notes_what_a_training_for_each_fold_gives(tiny, kind, rule):
    samples, vectors, _ = with_vectors(n_queries=36)
    how = dict(kind=kind, vectors=vectors, ridge=0.02, metric=METRIC) if kind == "head" else FAST | dict(kind=kind, model=tiny, epochs=2, patience=3)
    tuned = tune(samples, rule, space={}, trials=1, folds=3, progress=False, **{name: value for name, value in how.items() if name != "progress"})
    assert tuned.noted[0][0].shape[0] == (6 if kind == "head" else 2 + (kind == "bi-encoder")), "the epochs of the rule, and no others"
    assert np.isnan(tuned.table.loc[0, "effective_rows"]) and tuned.settings["weights"] is rule
    select = samples[samples["split"] == "select"]
    for fold in range(3):
        judged = tuned.plan.query_ids[tuned.plan.fold == fold]
        kept = ~samples["query_id"].isin(judged).to_numpy()
        ranker = fine_tune(samples[kept], rule, **how | (dict(vectors=vectors[kept]) if kind == "head" else {}))
        found = dict(zip(*METRIC.per_query(select["query_id"], select["gain"], ranker.predict(select, vectors[select.index] if kind == "head" else None))))
        np.testing.assert_array_equal([found[query] for query in judged], tuned.values(0)[tuned.plan.fold == fold])


def test_trusted_rows_are_read_by_the_rules_that_ask_them_alone():
    samples, vectors, _ = with_vectors()
    valid = samples["split"] == "valid"
    flipped, ruined = samples.assign(gain=samples["gain"].mask(valid, 1 - samples["gain"])), samples.assign(gain=samples["gain"].mask(valid), item_text=samples["item_text"].mask(valid))
    how = HEAD | dict(vectors=vectors, trials=3)
    asked, other = (tune(table, MetaGradient(), **how) for table in (samples, flipped))
    assert not np.allclose(asked.table["value"], other.table["value"])
    same(tune(ruined, SelfPaced(), **how), tune(samples, SelfPaced(), **how))
    with pytest.raises(DataError, match="item_text.*missing values"):
        tune(ruined, MetaGradient(), **how)
    with pytest.raises(DataError, match="no row is of split 'valid'"):
        tune(samples[~valid], MetaGradient(), **how | dict(vectors=vectors[~valid]))


def test_a_head_under_a_rule_has_one_ridge_even_where_none_is_searched():
    samples, vectors, _ = with_vectors()
    tuned = tune(samples, Focal(), space={}, vectors=vectors, trials=1, **HEAD)
    assert tuned.settings["ridge"] == tune(samples, vectors=vectors, trials=1, **HEAD).plan.first["ridge"] and tuned.noted[0][0].shape[0] == 6


def test_the_file_of_a_search_under_another_rule_is_refused(tmp_path):
    samples, vectors, _ = with_vectors()
    fixed = pd.Series(np.linspace(0.5, 1.5, len(samples)), index=samples["sample_id"])
    how = HEAD | dict(vectors=vectors)
    whole = tune(samples, MetaGradient(fixed=fixed), trials=4, **how)
    tune(samples, MetaGradient(fixed=fixed), trials=2, study=tmp_path / "study.db", **how)
    same(tune(samples, MetaGradient(fixed=fixed), trials=4, study=tmp_path / "study.db", **how), whole)
    for other in (MetaGradient(calm=0.1, fixed=fixed), MetaGradient(fixed=fixed**2), MetaGradient(), Focal(fixed=fixed), fixed, None):
        with pytest.raises(DataError, match="another search, which differs in .*weights"):
            tune(samples, other, trials=4, study=tmp_path / "study.db", **how)
    with pytest.raises(DataError, match="another search, which differs in trusted rows"):
        tune(samples.assign(gain=samples["gain"].mask(samples["split"] == "valid", 0.5)), MetaGradient(fixed=fixed), trials=4, study=tmp_path / "study.db", **how)


def test_a_rule_that_was_not_called_is_no_function_of_the_temperature():
    samples, vectors, _ = with_vectors()
    for space in (None, {"temperature": (1.0, 2.0)}):
        with pytest.raises(DataError, match=r"the class Focal.*call it: Focal\(\)"):
            tune(samples, Focal, space=space, vectors=vectors, trials=2, **HEAD)


def test_weights_are_looked_at_once_and_before_the_first_trial(caplog):
    samples, vectors, _ = with_vectors()
    train = samples["split"] == "train"
    kept = (train & samples["query_id"].isin(["q1", "q2", "q3", "q7"])) | (samples["split"] != "train")
    few, weights = samples[kept], pd.Series(np.linspace(1, 3, len(samples)), index=samples["sample_id"])
    how = HEAD | dict(vectors=vectors[kept], trials=3, space={"ridge": (0.01, 1.0)})
    caplog.set_level("INFO", logger="ecom_importance")
    tuned = tune(few, weights, **how)
    assert caplog.text.count("belong to no training row") == 1 and not [record for record in caplog.records if record.levelname == "WARNING"]
    own = weights[few.loc[few["split"] == "train", "sample_id"]]
    np.testing.assert_allclose(tuned.table["effective_rows"], effective_sample_size(own))
    same(tune(few, own, **how), tuned)
    for wrong, told in ((weights.to_numpy(), "a ndarray"), (weights[5:], "lack these training rows"), (Focal(fixed=-weights), "negative")):
        with pytest.raises(DataError, match=told):
            tune(few, wrong, study="never made", **how)


# ---- averages

def test_average_of_heads_says_what_their_mean_logit_says():
    samples, vectors, _ = with_vectors()
    heads = [fine_tune(samples, kind="head", vectors=vectors, ridge=ridge, metric=METRIC) for ridge in (0.01, 0.1, 1.0)]
    mean = np.mean([head.predict(samples, vectors) for head in heads], axis=0)
    np.testing.assert_allclose(average_weights(heads).predict(samples, vectors), mean, atol=1e-5)
    np.testing.assert_allclose(average_scores(heads).predict(samples, vectors), mean, atol=1e-12)


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_average_of_parameters_is_their_mean_and_leaves_the_members_alone(tiny, tmp_path, kind):
    samples = table()
    rankers = [fine_tune(samples, kind=kind, model=tiny, seed=seed, **FAST) for seed in (0, 1)]
    before = [ranker.predict(samples) for ranker in rankers]
    average = average_weights(rankers)
    for name, values in average.network.state_dict().items():
        if values.is_floating_point():
            torch.testing.assert_close(values, (rankers[0].network.state_dict()[name] + rankers[1].network.state_dict()[name]) / 2)
    for ranker, said in zip(rankers, before):
        np.testing.assert_array_equal(ranker.predict(samples), said)
    opened = load_ranker(average.save(tmp_path / "average"), device="cpu")
    np.testing.assert_allclose(opened.predict(samples), average.predict(samples), atol=1e-5)
    assert [one["seed"] for one in opened.settings["averaged"]] == [0, 1] and "the mean of 2 rankers' parameters" in (tmp_path / "average" / "README.md").read_text(encoding="utf-8")
    np.testing.assert_allclose(average_weights([opened, opened]).predict(samples), opened.predict(samples), atol=1e-5)


def test_other_starts_are_named_and_one_start_is_not(tiny, tmp_path, caplog):
    samples = table()
    start = make_ranker("cross-encoder", tiny, device="cpu").save(tmp_path / "start")
    average_weights([fine_tune(samples, kind="cross-encoder", model=start, seed=seed, **FAST | dict(epochs=1)) for seed in (0, 1)])
    assert "elsewhere" not in caplog.text
    average_weights([fine_tune(samples, kind="cross-encoder", model=tiny, seed=seed, **FAST | dict(epochs=1)) for seed in (0, 1)])
    assert "classifier.weight" in caplog.text


def test_what_cannot_be_averaged_is_refused(tiny, tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizer

    samples, vectors, _ = with_vectors()
    bi, cross = (make_ranker(kind, tiny, device="cpu") for kind in ("bi-encoder", "cross-encoder"))
    vocabulary = BertTokenizer.from_pretrained(tiny).get_vocab()
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64)).save_pretrained(tmp_path / "small")
    BertTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "small")
    head = fine_tune(samples, kind="head", vectors=vectors, metric=METRIC)
    for rankers, told in (([bi, cross], "kinds bi-encoder, cross-encoder"), ([], "no rankers"), ([bi, make_ranker("bi-encoder", tmp_path / "small", device="cpu")], "differ in their parameters"),
                          ([bi, make_ranker("bi-encoder", tiny, max_tokens=8, device="cpu")], "max_tokens"), ([head, fine_tune(samples, kind="head", vectors=vectors[:, :3], metric=METRIC)], "6, 3 dimensions")):
        with pytest.raises(DataError, match=told):
            average_weights(rankers)


class Fixed:
    def __init__(self, scores):
        self.scores = np.asarray(scores, float)

    def predict(self, samples, vectors=None):
        return self.scores[samples.index]


def test_three_ways_to_average_scores():
    samples = pd.DataFrame({"query_id": list("aaabbb")})
    small, large = Fixed([0, 1, 2, 0, 1, 2]), Fixed([1020, 1010, 1000, 520, 510, 500])
    assert (average_scores([small, large]).predict(samples) == [510, 505.5, 501, 260, 255.5, 251]).all()
    np.testing.assert_allclose(np.diff(average_scores([small, large], "standardised", samples=samples).predict(samples)[:3]), 0, atol=1e-9)
    np.testing.assert_allclose(average_scores([small, large], "ranks").predict(samples), 0.5)
    mean = average_scores([small, large], "standardised", samples=samples)
    assert mean.predict(samples.iloc[[4]])[0] == mean.predict(samples)[4], "an item's score does not depend on what is asked along with it"


def test_bad_averages_of_scores():
    samples = pd.DataFrame({"query_id": list("aab")})
    for arguments, told in ((dict(rankers=[]), "no rankers"), (dict(rankers=[Fixed([1, 2, 3])], how="vote"), "how is 'vote'"), (dict(rankers=[Fixed([1, 2, 3])], how="standardised"), "no samples"),
                            (dict(rankers=[Fixed([1, 2, 3]), Fixed([1, 1, 3])], how="standardised", samples=samples), "ranker 1 gives")):
        with pytest.raises(DataError, match=told):
            average_scores(**arguments)


@pytest.mark.parametrize("how", ["logits", "standardised", "ranks"])
def test_an_average_of_scores_is_opened_to_the_same_bits(tiny, tmp_path, how):
    samples, vectors, _ = with_vectors(n_queries=12)
    head = fine_tune(samples, kind="head", vectors=vectors, metric=METRIC)
    # Networks that were read from one layout of the file: products of 32-bit matrices depend, in the last bit, on where in memory they begin.
    bi, cross = (load_ranker(fine_tune(samples, kind=kind, model=tiny, **FAST | dict(epochs=1)).save(tmp_path / kind), device="cpu") for kind in ("bi-encoder", "cross-encoder"))
    inner = average_scores([bi, head])
    average = average_scores([cross, inner], how, samples=samples, vectors=vectors)
    folder = average.save(tmp_path / "平均")
    opened = load_average(folder, device="cpu")
    np.testing.assert_array_equal(opened.predict(samples, vectors), average.predict(samples, vectors))
    assert (opened.how, opened.scale) == (average.how, average.scale) and [type(ranker) for ranker in opened.rankers] == [type(cross), type(average)]
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1", "ranker.json"] and (folder / "0" / "README.md").is_file() and (folder / "1" / "1" / "head.npz").is_file()


def test_an_average_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    samples, vectors, _ = with_vectors()
    heads = [fine_tune(samples, kind="head", vectors=vectors, ridge=ridge, metric=METRIC) for ridge in (0.01, 1.0)]
    folder = average_scores(heads).save(tmp_path / "average")
    with pytest.raises(DataError, match="something stands here already"):
        average_scores(heads).save(folder)
    with pytest.raises(DataError, match="ranker 1 is a Fixed"):
        average_scores([heads[0], Fixed([1, 2, 3])]).save(tmp_path / "strange")
    monkeypatch.setattr(type(heads[0]), "_write", lambda self, place: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="average: the folder cannot be written: No space left") as caught:
        average_scores(heads[:1]).save(folder, replace=True)
    assert caught.value.file == folder and len(load_average(folder).rankers) == 2
    monkeypatch.undo()
    average_scores(heads[:1]).save(folder, replace=True)
    assert len(load_average(folder).rankers) == 1 and [path.name for path in tmp_path.iterdir()] == ["average"]


def test_the_two_loaders_point_to_each_other_and_damage_is_named(tmp_path):
    samples, vectors, _ = with_vectors()
    head = fine_tune(samples, kind="head", vectors=vectors, metric=METRIC)
    average, single = average_scores([head, head]).save(tmp_path / "average"), head.save(tmp_path / "single")
    with pytest.raises(DataError, match=r"an average of scores.*load_average\(folder\)"):
        load_ranker(average)
    with pytest.raises(DataError, match=r"holds a head.*load_ranker\(folder\)"):
        load_average(single)
    with pytest.raises(DataError, match="cannot be read: FileNotFoundError"):
        load_average(tmp_path / "nothing")
    facts = json.loads((average / "ranker.json").read_text(encoding="utf-8"))
    for change, told in (({"how": "vote"}, "does not name a way"), ({"scale": [1.0]}, "does not name a way"), ({"scale": [1.0, 0.0]}, "does not name a way"), ({"members": ["head"] * 3, "scale": [1.0] * 3}, "2: the folder does not exist")):
        (average / "ranker.json").write_text(json.dumps(facts | change), encoding="utf-8")
        with pytest.raises(DataError, match=told):
            load_average(average)
    (average / "ranker.json").write_text("[1", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read: JSONDecodeError"):
        load_average(average)


# ---- rounds

def test_pair_vectors_are_those_of_the_saved_folder(tiny, tmp_path):
    samples = table()
    ranker = fine_tune(samples, model=tiny, **FAST)
    saved = sample_vectors(samples, ranker.save(tmp_path / "ranker"), max_tokens=128, cache=False, progress=False, device="cpu")
    np.testing.assert_allclose(pair_vectors(ranker, samples), saved, atol=1e-5)
    cross = make_ranker("cross-encoder", tiny, device="cpu")
    seen = pair_vectors(cross, samples, rows=7)
    layer = cross.network.classifier
    np.testing.assert_allclose(seen @ layer.weight.detach().numpy()[0] + layer.bias.item(), cross.predict(samples), atol=1e-5)


@pytest.mark.parametrize("kind", ["head", "bi-encoder"])
def test_rounds_are_never_worse_than_uniform_on_select(tiny, kind):
    samples, vectors, _ = with_vectors(n_queries=36 if kind == "head" else 18)
    how = dict(kind="head", vectors=vectors, metric=METRIC) if kind == "head" else FAST | dict(kind=kind, model=tiny, epochs=1)
    went = iterate(samples, "oof_loss", rounds=2, patience=2, **how | dict(progress=False))
    select = samples[samples["split"] == "select"]
    value = METRIC.mean(select["query_id"], select["gain"], went.ranker.predict(select, vectors[select.index] if kind == "head" else None))
    assert value == pytest.approx(went.table["select"].max()) and value >= went.table.loc[0, "select"]
    assert went.table.loc[went.table["kept"], "select"].tolist() == [pytest.approx(value)]
    uniform = fine_tune(samples, **how)
    np.testing.assert_array_equal(METRIC.per_query(select["query_id"], select["gain"], uniform.predict(select, vectors[select.index] if kind == "head" else None))[1], went.rounds[0].values)
    second = went.rounds[2]
    assert second.correlation == pytest.approx(spearman(went.rounds[1].scores["oof_loss"], second.scores["oof_loss"])) and second.correlation < 1
    again = fine_tune(samples, went.rounds[went.best].weights, **how)
    np.testing.assert_array_equal(again.predict(samples, vectors if kind == "head" else None), went.ranker.predict(samples, vectors if kind == "head" else None))


def test_a_round_of_the_head_listens_to_the_last_weights():
    samples, vectors, wrong = with_vectors()
    train = samples["split"] == "train"
    known = pd.Series(np.where(wrong[train], 0.0, 1.0), index=samples.loc[train, "sample_id"])
    kept = score_round(samples, vectors, ["oof_loss"], known)["oof_loss"]
    plain = score_round(samples, vectors, ["oof_loss"], None)["oof_loss"]
    same_as_plain = score_round(samples, vectors, ["oof_loss"], known * 0 + 1)["oof_loss"]
    np.testing.assert_allclose(same_as_plain, plain, atol=1e-4)
    accused = lambda scores: scores[wrong[train].to_numpy()].mean() - scores[~wrong[train].to_numpy()].mean()
    assert accused(kept) < accused(plain) - 0.1


def test_estimators_that_ask_no_model_end_the_rounds():
    samples, vectors, _ = with_vectors()
    went = iterate(samples, "text_length", rounds=4, patience=4, kind="head", vectors=vectors, metric=METRIC, progress=False)
    assert len(went.rounds) == 2 and "scores of round 2 are those of round 1" in went.ended


def test_rounds_end_when_select_does_not_rise():
    samples, vectors, _ = with_vectors()
    went = iterate(samples, ["oof_loss", "trusted_loss"], how=lambda scores: weigh(-scores, "softmax"), rounds=4, kind="head", vectors=vectors, metric=METRIC, progress=False)
    assert len(went.rounds) == went.best + 2 and "has not risen for 1 round" in went.ended and set(went.rounds[1].scores) == {"oof_loss", "trusted_loss"}


@pytest.mark.parametrize("kind", ["head", "cross-encoder"])
def test_labels_of_select_and_test_never_reach_the_estimators(tiny, kind):
    samples, vectors, _ = with_vectors(n_queries=36 if kind == "head" else 18)
    seen = []

    @estimator(family="baseline", source="definition", register=False)
    def spy(x, y, sample_id, oof, x_valid, y_valid, sample_id_valid):
        seen.append((set(sample_id), set(sample_id_valid), y.copy()))
        return -np.abs(oof - y)

    how = (dict(kind="head", vectors=vectors, metric=METRIC) if kind == "head" else FAST | dict(kind=kind, model=tiny, epochs=1)) | dict(rounds=2 if kind == "head" else 1, patience=2, progress=False)
    one = iterate(samples, spy, **how)
    by_split = {split: set(samples.loc[samples["split"] == split, "sample_id"]) for split in ("train", "valid")}
    assert len(seen) == how["rounds"] and all(train == by_split["train"] and valid == by_split["valid"] for train, valid, _ in seen)
    without_test = samples.assign(gain=samples["gain"].mask(samples["split"] == "test"), item_text=samples["item_text"].mask(samples["split"] == "test"))
    pd.testing.assert_frame_equal(iterate(without_test, spy, **how).table.drop(columns="seconds"), one.table.drop(columns="seconds"))
    if kind == "head":  # for the others, select chooses the epoch of the ranker that looks next, and that is said
        flipped = samples.assign(gain=samples["gain"].where(samples["split"] != "select", 1 - samples["gain"]))
        for number in (1, 2):
            pd.testing.assert_frame_equal(one.rounds[number].scores, iterate(flipped, spy, **how).rounds[number].scores)


def test_bad_rounds():
    samples, vectors, _ = with_vectors()
    how = dict(kind="head", vectors=vectors, metric=METRIC, progress=False)
    for change, told in ((dict(rounds=0), "rounds is 0"), (dict(patience=0), "patience is 0"), (dict(estimators=[]), "no estimators"), (dict(estimators="oof_los"), "oof_loss"), (dict(weights=None), "weights is given"),
                         (dict(samples=samples[samples["split"] != "select"]), "there are none"), (dict(vectors=None), "vectors"), (dict(how="rang"), "did you mean 'rank'")):
        with pytest.raises(DataError, match=told):
            iterate(**dict(samples=samples, estimators="oof_loss") | how | change)
