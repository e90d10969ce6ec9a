"Rankers and their training: losses by hand, weights that mean what they say, seeds, folders, bad input."

import json
import os
import subprocess
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.evaluation import RankingMetric
from ecom_importance.features import cosine, default_model, load_encoder
from ecom_importance.finetuning import BiEncoder, TrainingError, fine_tune, load_ranker, make_ranker
from ecom_importance.finetuning.rankers import write_folder
from ecom_importance.finetuning.losses import GROUPED, LOSSES
from ecom_importance.finetuning.trainer import draw_batches, rate_at
from ecom_importance.finetuning.training import fit_line, read_weights
from ecom_importance.importance.heads import RIDGE_GRID, fit_head
from ecom_importance.samples import DataError

pytestmark = pytest.mark.usefixtures("quick_collections")
WORDS = "oat milk steel bottle red shoe lamp chair wool sock blue cup tea pot".split()
CHINESE = list("保温杯不锈钢红色鞋灯椅羊毛袜蓝茶壶")
METRIC = RankingMetric("ndcg", k=None)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A random BERT of three small layers with its own vocabulary, Chinese characters among it."
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *dict.fromkeys(CHINESE)]
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, model_max_length=64).save_pretrained(folder)
    return folder


def table(n_queries=12, n_items=4, seed=0):
    "Generated samples: the item whose text holds the query's word is the right one. Every other query is Chinese."
    rng, rows = np.random.default_rng(seed), []
    for number in range(n_queries):
        pool = CHINESE if number % 2 else WORDS
        query = pool[number // 2 % len(pool)]
        for item in range(n_items):
            others = [word for word in rng.choice(pool, 3, replace=False) if word != query]
            gain = [1.0, 0.5, 0.0, 0.0][item % 4]
            words = others if gain == 0 else [query, *others] if gain == 1 else [*others, query, *others]
            rows.append({"query_id": f"q{number}", "query": query, "item_id": f"{number}-{item}", "item_text": " ".join(words), "gain": gain})
    samples = pd.DataFrame(rows)
    split = np.array(["train", "train", "train", "train", "select", "test"])[np.arange(n_queries) % 6]
    return samples.assign(sample_id=[f"s{row}" for row in range(len(samples))], label=samples["gain"], split=split[samples["query_id"].str[1:].astype(int)])


def trained_to_the_end(**shape):
    "Samples without select rows: the last epoch is kept, whatever it is, so that a test sees what training did."
    samples = table(**shape)
    return samples[samples["split"] != "select"].reset_index(drop=True)


FAST = dict(epochs=2, batch_size=8, learning_rate=1e-3, progress=False, device="cpu", metric=METRIC)


def ids(samples, split="train"):
    return samples.loc[samples["split"] == split, "sample_id"]


# Batches and steps


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 60), st.booleans(), st.integers(0, 99))
def test_batches_hold_every_row_once(n, batch_size, n_queries, whole, seed):
    rng = np.random.default_rng(seed)
    lengths, query = rng.integers(1, 50, n), rng.integers(0, n_queries, n) if whole else None
    batches = draw_batches(lengths, batch_size, np.random.default_rng(seed), query)
    assert sorted(np.concatenate(batches)) == list(range(n))
    assert len(batches) == -(-n // batch_size) and min(map(len, batches)) >= 1
    assert max(map(len, batches)) <= (2 * batch_size if whole else batch_size)
    again = draw_batches(lengths, batch_size, np.random.default_rng(seed), query)
    assert all((a == b).all() for a, b in zip(batches, again))
    if whole:
        least = max(n // len(batches), 1)
        for one in range(n_queries):
            if 0 < (query == one).sum() <= least:
                assert sum((query[batch] == one).any() for batch in batches) == 1


def test_learning_rate_rises_and_falls():
    rates = [rate_at(step, 100) for step in range(100)]
    assert np.argmax(rates) == 9 and rates[9] == 1 and 0 < rates[99] < rates[98] < 1
    assert rate_at(0, 1) == 1


def test_line_start_keeps_the_order():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, 500), rng.integers(0, 2, 500).astype(float)
    assert fit_line(x, y, np.ones(500))[0] >= 1
    a, b = fit_line(x, np.ones(500), np.ones(500))
    assert np.isfinite([a, b]).all() and b > 0


# Training


@pytest.mark.parametrize("kind, loss", [("bi-encoder", "pairwise"), ("cross-encoder", "pointwise"), ("cross-encoder", "mse")])
def test_a_tiny_model_learns_its_rows_by_heart(tiny, kind, loss):
    samples = table(n_queries=4).assign(split="train")
    before = METRIC.mean(samples["query_id"], samples["gain"], make_ranker(kind, tiny, device="cpu").predict(samples))
    ranker = fine_tune(samples, kind=kind, loss=loss, model=tiny, epochs=60, batch_size=16, learning_rate=3e-3, train_layers="all", progress=False, device="cpu")
    after = METRIC.mean(samples["query_id"], samples["gain"], ranker.predict(samples))
    assert before < 0.95 and after == pytest.approx(1)
    assert ranker.history["loss"].iloc[-5:].mean() < ranker.history["loss"].iloc[1:6].mean()


@pytest.mark.parametrize("kind, loss", [("bi-encoder", "pointwise"), ("bi-encoder", "pairwise"), ("cross-encoder", "mse")])
def test_weight_0_is_leaving_out_bit_for_bit(tiny, kind, loss):
    samples = trained_to_the_end()
    weights = pd.Series(np.random.default_rng(0).choice([0.0, 0.0, 1.0, 2.5], len(ids(samples))), index=ids(samples))
    kept = samples[~samples["sample_id"].isin(weights.index[weights == 0])]
    a = fine_tune(samples, weights, kind=kind, loss=loss, model=tiny, **FAST)
    b = fine_tune(kept, 7 * weights, kind=kind, loss=loss, model=tiny, **FAST)
    assert (a.predict(samples) == b.predict(samples)).all()
    c = fine_tune(samples, kind=kind, loss=loss, model=tiny, **FAST)
    assert not np.allclose(a.predict(samples), c.predict(samples), atol=1e-6)


def test_weights_are_found_by_id_not_by_place(tiny):
    samples = trained_to_the_end()
    weights = pd.Series(np.linspace(0.1, 2, len(ids(samples))), index=ids(samples))
    a, b, c = (fine_tune(samples, each, model=tiny, **FAST).predict(samples) for each in (weights, weights.sample(frac=1, random_state=1), None))
    assert (a == b).all() and not np.array_equal(a, c)


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_valid_and_test_rows_are_not_read(tiny, kind):
    samples = table()
    spoiled = samples.copy()
    other = spoiled["split"] == "test"
    spoiled.loc[other, ["query", "item_text"]] = None
    spoiled.loc[other, "gain"] = np.nan
    spoiled.loc[other & (spoiled.index % 2 == 0), "split"] = "valid"
    read = samples[samples["split"] != "test"]
    a, b = (fine_tune(each, kind=kind, model=tiny, **FAST).predict(read) for each in (samples, spoiled))
    assert (a == b).all()


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_a_seed_gives_the_same_ranker_and_leaves_the_callers_draws_alone(tiny, kind):
    samples = trained_to_the_end()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = fine_tune(samples, kind=kind, model=tiny, seed=1, **FAST)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    np.random.seed(99)
    b, c = (fine_tune(samples, kind=kind, model=tiny, seed=seed, **FAST) for seed in (1, 2))
    assert (a.predict(samples) == b.predict(samples)).all()
    pd.testing.assert_frame_equal(a.history.drop(columns="seconds"), b.history.drop(columns="seconds"))
    assert not np.array_equal(a.predict(samples), c.predict(samples))


def test_before_training_the_bi_encoder_ranks_as_the_cosine_does(tiny):
    samples = table()
    zero_shot = cosine(samples, tiny, cache=False, progress=False)
    ranker = make_ranker("bi-encoder", tiny, device="cpu")
    np.testing.assert_allclose((ranker.predict(samples) - ranker.offset) / ranker.scale, zero_shot, atol=1e-5)
    select = samples[samples["split"] == "select"]
    trained = fine_tune(samples, model=tiny, **FAST)
    assert trained.history["select"][0] == pytest.approx(METRIC.mean(select["query_id"], select["gain"], zero_shot[select.index]))


def test_the_best_epoch_on_select_is_kept(tiny):
    samples = table(n_queries=24)
    select = samples[samples["split"] == "select"]
    ranker = fine_tune(samples, model=tiny, **{**FAST, "epochs": 6, "learning_rate": 5e-3})
    history = ranker.history
    assert history["kept"].sum() == 1 and history.loc[history["kept"], "select"].item() == history["select"].max()
    assert METRIC.mean(select["query_id"], select["gain"], ranker.predict(select)) == pytest.approx(history["select"].max(), abs=1e-12)


def test_training_that_only_harms_returns_the_untrained_bi_encoder_and_stops_early(tiny):
    samples = table()
    best = make_ranker("bi-encoder", tiny, device="cpu")
    # Select gains that agree perfectly with zero-shot cosine: nothing can be better than epoch 0.
    select = samples["split"] == "select"
    rank = pd.Series(best.predict(samples)).groupby(samples["query_id"]).rank()
    samples.loc[select, "gain"] = (rank[select] - 1) / 3
    ranker = fine_tune(samples, model=tiny, **{**FAST, "epochs": 9, "patience": 2})
    assert ranker.settings["kept_epoch"] == 0 and len(ranker.history) == 3
    np.testing.assert_allclose(ranker.cosine(samples), best.cosine(samples), atol=1e-7)


def test_frozen_layers_stay_as_they_were(tiny):
    before = dict(load_encoder(tiny, device="cpu").network.named_parameters())
    after = dict(fine_tune(table().assign(split="train"), model=tiny, train_layers=1, **FAST).network.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("encoder.layer.2.") for name in changed)
    assert all(parameter.requires_grad for parameter in after.values()), "and can be trained on"


def test_full_training_reaches_the_embeddings(tiny):
    before = load_encoder(tiny, device="cpu").network.embeddings.word_embeddings.weight
    after = fine_tune(table().assign(split="train"), model=tiny, train_layers="all", **FAST).network.embeddings.word_embeddings.weight
    assert not torch.equal(before, after)


def test_equal_steps_for_arms_of_different_size(tiny):
    samples = table()
    weights = pd.Series(np.arange(len(ids(samples))) % 4 == 0, index=ids(samples)).astype(float)
    small, whole = (fine_tune(samples, each, model=tiny, record=True, **FAST, steps_per_epoch=5) for each in (weights, None))
    for ranker in (small, whole):
        assert ranker.record.groupby("epoch").size().between(5 * 4, 5 * 8).all()
    assert set(small.record["sample_id"]) == set(weights.index[weights > 0])


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_record_holds_every_row_of_every_epoch(tiny, loss):
    samples = table()
    ranker = fine_tune(samples, kind="cross-encoder", loss=loss, model=tiny, record=True, **FAST)
    assert list(ranker.record.columns) == ["epoch", "sample_id", "loss", "margin", "weight"]
    for epoch in (1, 2):
        assert sorted(ranker.record.loc[ranker.record["epoch"] == epoch, "sample_id"]) == sorted(ids(samples))
    assert (ranker.record["loss"] >= 0).all() and np.isfinite(ranker.record[["loss", "margin"]]).all(axis=None)
    assert np.corrcoef(ranker.record["loss"], ranker.record["margin"])[0, 1] < (-0.9 if loss in ("pairwise", "margin", "lambda") else 0)
    assert fine_tune(samples, model=tiny, **FAST).record is None


def test_a_loss_that_is_no_number_stops_names_the_batch_and_keeps_the_last_good_epoch(tiny):
    samples = table().assign(split="train")
    with pytest.raises(TrainingError) as caught:
        fine_tune(samples, kind="cross-encoder", model=tiny, train_layers="all", epochs=2, batch_size=8, learning_rate=1e30, warmup=0.01, clip=1e30, progress=False, device="cpu")
    error = caught.value
    assert f"epoch {error.epoch}, batch {error.batch}" in str(error) and repr(error.sample_ids[0]) in str(error)
    assert set(error.sample_ids) <= set(samples["sample_id"]) and len(error.sample_ids) == 8
    assert error.kept == error.epoch - 1 == 0
    np.testing.assert_array_equal(error.ranker.predict(samples), make_ranker("cross-encoder", tiny, device="cpu").predict(samples))


# Folders


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_saved_and_opened_again_it_scores_the_same(tiny, tmp_path, kind):
    samples = trained_to_the_end()
    ranker = fine_tune(samples, kind=kind, model=tiny, record=True, **FAST)
    again = load_ranker(ranker.save(tmp_path / "模型 1"), device="cpu")
    assert (again.predict(samples) == ranker.predict(samples)).all()
    assert again.settings == ranker.settings and again.kind == kind
    pd.testing.assert_frame_equal(again.history, ranker.history)
    pd.testing.assert_frame_equal(again.record, ranker.record)
    assert [file.name for file in tmp_path.iterdir()] == ["模型 1"], "nothing is left beside it"
    assert str(tiny) not in "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "模型 1").glob("*.json"))


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_plain_transformers_opens_the_folder(tiny, tmp_path, kind):
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    samples = trained_to_the_end()
    ranker = fine_tune(samples, kind=kind, model=tiny, **FAST)
    folder = ranker.save(tmp_path / "ranker")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    queries, items = list(samples["query"]), list(samples["item_text"])
    with torch.inference_mode():
        if kind == "cross-encoder":
            scores = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**tokenizer(queries, items, padding=True, return_tensors="pt")).logits[:, 0]
        else:
            model, vectors = AutoModel.from_pretrained(folder).eval(), []
            for texts in (queries, items):
                batch = tokenizer(texts, padding=True, return_tensors="pt")
                mask = batch["attention_mask"][..., None]
                vectors.append(torch.nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1))
            facts = json.loads((folder / "ranker.json").read_text())
            scores = facts["scale"] * (vectors[0] * vectors[1]).sum(1) + facts["offset"]
    np.testing.assert_allclose(scores.numpy(), ranker.predict(samples), atol=1e-4)


def test_a_trained_ranker_can_be_trained_on(tiny, tmp_path):
    samples = table()
    first = fine_tune(samples, model=tiny, **FAST).save(tmp_path / "first")
    assert fine_tune(samples, model=first, **FAST).history["select"][0] >= 0


def test_a_folder_appears_whole_or_not_at_all(tiny, tmp_path):
    ranker = make_ranker("bi-encoder", tiny, device="cpu")
    folder = ranker.save(tmp_path / "ranker")
    content = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(place):
        (place / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(DataError, match="stands here already"):
        ranker.save(folder)
    with pytest.raises(RuntimeError, match="killed"):
        write_folder(folder, fail, replace=True)
    with pytest.raises(RuntimeError, match="killed"):
        write_folder(tmp_path / "new", fail)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == content
    assert [file.name for file in tmp_path.iterdir()] == ["ranker"]
    make_ranker("cross-encoder", tiny, device="cpu").save(folder, replace=True)
    assert load_ranker(folder, device="cpu").kind == "cross-encoder"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not a ranker"):
        ranker.save(tmp_path / "mine", replace=True)
    with pytest.raises(DataError, match="cannot be written"):
        ranker.save(tmp_path / "mine" / "thesis.txt" / "below a file")


def test_a_folder_that_is_no_ranker_is_refused(tiny, tmp_path):
    good = make_ranker("bi-encoder", tiny, device="cpu").save(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")

    def damaged(name, damage):
        import shutil

        damage(shutil.copytree(good, tmp_path / name))
        return tmp_path / name

    facts = json.loads((good / "ranker.json").read_text())
    cases = {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "empty": "no ranker.json",
        tmp_path / "file": "a file, not a folder",
        tiny: "no ranker.json",
        damaged("a", lambda folder: (folder / "ranker.json").write_text("{")): "cannot be read",
        damaged("b", lambda folder: (folder / "ranker.json").write_text(json.dumps(facts | {"kind": "oracle"}))): "cannot be read",
        damaged("c", lambda folder: (folder / "ranker.json").write_text(json.dumps({"kind": "bi-encoder"}))): "lacks max_tokens",
        damaged("d", lambda folder: (folder / "model.safetensors").unlink()): "no weights",
        damaged("e", lambda folder: (folder / "model.safetensors").write_bytes(b"half")): "cannot open",
    }
    for folder, message in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            load_ranker(folder, device="cpu")
        assert caught.value.mend


# The head


def vectors_of(samples, d=6):
    rng = np.random.default_rng(0)
    return (samples["gain"].to_numpy()[:, None] * np.linspace(0.2, 1, d) + rng.normal(0, 0.5, (len(samples), d))).astype(np.float32)


def test_the_head_is_the_convex_one_with_the_ridge_that_select_chose(tmp_path):
    samples = table(n_queries=36)
    x, train = vectors_of(samples), (samples["split"] == "train").to_numpy()
    select = samples[samples["split"] == "select"]
    ranker = fine_tune(samples, kind="head", vectors=x, metric=METRIC, record=True)
    scale = np.var(x[train], axis=0, dtype=float).mean()
    values = {each: METRIC.mean(select["query_id"], select["gain"], fit_head(x[train], samples["gain"].to_numpy()[train], ridge=scale * each).logit(x[select.index])) for each in RIDGE_GRID}
    assert ranker.history["select"].tolist() == pytest.approx([values[each] for each in sorted(values, reverse=True)])
    assert values[min(values, key=lambda each: abs(each * scale - ranker.settings["ridge"]))] == max(values.values())
    expected = fit_head(x[train], samples["gain"].to_numpy()[train], ridge=ranker.settings["ridge"])
    np.testing.assert_allclose(ranker.predict(samples, x), expected.logit(x), rtol=1e-5)
    assert sorted(ranker.record["sample_id"]) == sorted(ids(samples))
    again = load_ranker(ranker.save(tmp_path / "head"))
    assert (again.predict(samples, x) == ranker.predict(samples, x)).all() and again.settings == ranker.settings


def test_a_weight_of_0_is_leaving_out_for_the_head_too():
    samples = table(n_queries=36)
    x = vectors_of(samples)
    weights = pd.Series(np.random.default_rng(1).choice([0.0, 1.0, 3.0], len(ids(samples))), index=ids(samples))
    kept = (~samples["sample_id"].isin(weights.index[weights == 0])).to_numpy()
    a = fine_tune(samples, weights, kind="head", vectors=x, metric=METRIC)
    b = fine_tune(samples[kept], weights, kind="head", vectors=x[kept], metric=METRIC)
    np.testing.assert_array_equal(a.predict(samples, x), b.predict(samples, x))


def test_a_head_refuses_vectors_that_do_not_belong():
    samples = table()
    x = vectors_of(samples)
    ranker = fine_tune(samples, kind="head", vectors=x, ridge=0.1, metric=METRIC)
    broken = x.copy()
    broken[0, 0] = np.nan
    for bad in (None, x[:-1], x[:, 0], broken):
        with pytest.raises(DataError):
            fine_tune(samples, kind="head", vectors=bad)
    for bad in (None, x[:-1], x[:, :3]):
        with pytest.raises(DataError, match="vectors"):
            ranker.predict(samples, bad)


# Bad input

T = table()


@pytest.mark.parametrize("weights, message", [
    (pd.Series(1.0, index=ids(T)[1:]), "'s0'"),
    (pd.Series(1.0, index=ids(T)).mask(lambda w: w.index == "s2"), "no finite number.*'s2'"),
    (pd.Series(1.0, index=ids(T)).where(lambda w: w.index != "s3", np.inf), "no finite number.*'s3'"),
    (pd.Series(1.0, index=ids(T)).where(lambda w: w.index != "s3", -0.5), "negative.*'s3'"),
    (pd.Series("much", index=ids(T)), "no finite number.*and .* more"),
    (pd.Series(0.0, index=ids(T)), "all weights"),
    (pd.Series(1.0, index=[*ids(T), "s0"]), "more than once: 's0'"),
    (pd.Series(1.0, index=range(len(T))), "lack these training rows"),
    (np.ones(len(ids(T))), "a ndarray"),
    ({"s0": 1.0}, "a dict"),
])
def test_bad_weights_are_refused_by_name(weights, message):
    with pytest.raises(DataError, match=message):
        fine_tune(T, weights, model="nowhere")  # refused before a model is looked for


@settings(max_examples=50, deadline=None)
@given(st.lists(st.just(0.0) | st.floats(0, 1e308), min_size=1, max_size=30).filter(any))
def test_weights_read_have_mean_1_over_what_is_kept(values):
    rows = pd.Series([f"r{number}" for number in range(len(values))])
    read = read_weights(pd.Series(values, index=rows), rows)
    assert read[read > 0].mean() == pytest.approx(1)
    assert ((read == 0) == (np.array(values) / max(values) < 1e-12)).all() and np.isfinite(read).all()
    np.testing.assert_allclose(read[read > 0] / read.max(), np.array(values)[read > 0] / max(values))


@pytest.mark.parametrize("given, level", [(ids(T), None), ([*ids(T), *(f"other {number}" for number in range(len(ids(T))))], None), ([*ids(T), *(f"other {number}" for number in range(len(ids(T)) + 1))], "WARNING")])
def test_weights_of_another_table_are_told(caplog, given, level):
    caplog.set_level("INFO", logger="ecom_importance")
    weights = pd.Series(np.linspace(1, 2, len(given)), index=list(given))
    read = read_weights(weights, ids(T), T["sample_id"])
    np.testing.assert_array_equal(read, read_weights(weights[ids(T)], ids(T)))
    assert [record.levelname for record in caplog.records] == ([level] if level else [])
    assert not level or "33 of 65 weights belong to no training row and are not used, 33 of them to no row of the table at all" in caplog.text


def test_weights_of_the_whole_table_are_no_reason_to_warn(caplog):
    caplog.set_level("INFO", logger="ecom_importance")
    few = T.assign(split=T["split"].where(T["query_id"].isin(["q0", "q1"]) | (T["split"] != "train"), "spare"))
    fine_tune(few, pd.Series(1.0, index=T["sample_id"]), kind="head", vectors=np.random.default_rng(0).normal(size=(len(T), 3)), metric=METRIC)
    (told,) = (record for record in caplog.records if "belong to no training row" in record.message)
    assert told.levelname == "INFO" and "40 of 48" in told.message and ", 0 of them" in told.message


@pytest.mark.parametrize("setting, message", [
    (dict(kind="oracle"), "kind is 'oracle'"), (dict(loss="listwise"), "loss is 'listwise'"), (dict(kind="head", loss="pairwise"), "logistic"),
    (dict(epochs=0), "epochs is 0"), (dict(epochs=1.5), "epochs is 1.5"), (dict(batch_size=0), "batch_size"), (dict(learning_rate=0), "learning_rate"),
    (dict(learning_rate=float("nan")), "learning_rate"), (dict(patience=0), "patience"), (dict(steps_per_epoch=0), "steps_per_epoch"), (dict(clip=0), "clip"),
    (dict(ridge=-1, kind="head"), "ridge"), (dict(metric=RankingMetric(min_items=99)), "cannot be measured"), (dict(model="no/such model"), "no folder"),
])
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(DataError, match=message):
        fine_tune(T, **setting)


@pytest.mark.parametrize("samples, message", [
    (T.drop(columns="gain"), "gain"), (T.drop(columns="split"), "split"), (T.assign(split="test"), "no row is of split 'train'"), (T.iloc[:0], "no row"),
    (T.assign(gain=2.0), "gain"), (T.assign(gain=np.nan), "gain"), (T.assign(sample_id="s0"), "sample_id"), (T.assign(item_text=" "), "item_text"),
])
def test_bad_rows_are_refused(samples, message):
    with pytest.raises(DataError, match=message):
        fine_tune(samples, model="nowhere")


def test_more_layers_than_there_are_is_an_error(tiny):
    with pytest.raises(DataError, match="has 3 layers"):
        fine_tune(T, model=tiny, train_layers=4, progress=False)
    with pytest.raises(DataError, match="train_layers is 'most'"):
        fine_tune(T, model=tiny, train_layers="most", progress=False)
    assert [fine_tune(T, kind=kind, model=tiny, **FAST).settings["train_layers"] for kind in ("bi-encoder", "cross-encoder")] == [2, 3]


def test_a_log_of_one_gain_trains_pointwise_and_is_refused_pairwise(tiny):
    one = T.assign(gain=np.where(T["split"] == "train", 1.0, T["gain"]))
    assert np.isfinite(fine_tune(one, model=tiny, **FAST).predict(one)).all()
    for loss in GROUPED:
        with pytest.raises(DataError, match="no pair"):
            fine_tune(one, loss=loss, model=tiny, **FAST)


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_odd_texts_are_scored_and_bad_ones_refused(tiny, kind):
    ranker = make_ranker(kind, tiny, device="cpu")
    odd = pd.DataFrame({"query": ["oat", "保温杯", "🔩", "milk " * 3000], "item_text": ["lamp " * 2000, "不锈钢 保温杯", "未知的文字 🔩", "x" * 10_000]})
    scores = ranker.predict(odd)
    assert scores.shape == (4,) and scores.dtype == np.float64 and np.isfinite(scores).all()
    np.testing.assert_allclose(ranker.predict(odd.iloc[[2]]), scores[[2]], atol=1e-5)
    doubled = ranker.predict(pd.concat([odd, odd]))
    assert (doubled[:4] == doubled[4:]).all()
    assert ranker.predict(odd.iloc[:0]).shape == (0,)
    for bad in (odd.drop(columns="query"), odd.assign(item_text=None), odd.assign(query=3)):
        with pytest.raises(DataError):
            ranker.predict(bad)


def test_training_takes_odd_texts_and_lonely_items(tiny):
    odd = T.copy()
    odd.loc[0, "item_text"] = "lamp " * 2000
    odd.loc[1, "query"] = "🔩"
    alone = pd.concat([odd, odd.iloc[[0]].assign(sample_id="alone", query_id="alone")], ignore_index=True)
    for loss in ("pointwise", "pairwise"):
        assert np.isfinite(fine_tune(alone, loss=loss, model=tiny, **FAST).predict(alone)).all()


def test_importing_the_room_does_not_load_torch():
    code = "import sys, ecom_importance.finetuning; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(not os.path.isdir(default_model()), reason="the packaged encoder is not installed")
def test_the_packaged_encoder_is_the_default():
    rows = pd.DataFrame({"query": ["oat milk"] * 2, "item_text": ["Oat drink, barista, 1 l", "Steel wool pads"]})
    scores = make_ranker(device="cpu").predict(rows)
    assert scores[0] > scores[1] and isinstance(make_ranker(device="cpu"), BiEncoder)


def test_an_encoder_that_does_not_know_the_words_is_reported(tiny, caplog):
    caplog.set_level("WARNING", "ecom_importance")
    fine_tune(T, model=tiny, **FAST)
    assert not caplog.records
    fine_tune(T.assign(item_text="Tischlampe aus Messing"), kind="cross-encoder", model=tiny, **FAST)
    assert "unknown" in caplog.text


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder", "head"])
def test_the_model_card_says_what_was_learned_and_how_well(tiny, tmp_path, kind):
    from huggingface_hub import ModelCard

    samples = table()
    weights = pd.Series(np.linspace(0.5, 1.5, len(ids(samples))), index=ids(samples))
    x = np.random.default_rng(0).normal(size=(len(samples), 5)).astype(np.float32)
    how = dict(vectors=x, metric=METRIC) if kind == "head" else dict(model=tiny, **FAST)
    ranker = fine_tune(samples, weights, kind=kind, **how)
    card = ModelCard.load(ranker.save(tmp_path / "m") / "README.md")
    assert "ecom_importance" in card.data.tags and kind in card.data.tags and str(tmp_path) not in card.content
    done = ranker.settings
    assert done["data"] in card.text and "from 0.5 to 1.5" in card.text and "1.0 = 1, 0.5 = 0.5, 0.0 = 0" in card.text
    value, select = done["on_select"], samples[samples["split"] == "select"]
    again = METRIC.mean(select["query_id"], select["gain"], ranker.predict(select, x[(samples["split"] == "select").to_numpy()]))
    assert value["mean"] == pytest.approx(again, abs=1e-6) and f"{again:.4f}" in card.text and value["low"] <= value["mean"] <= value["high"]
    other = fine_tune(samples.assign(item_text=samples["item_text"] + " lamp"), weights, kind=kind, **how)
    assert other.settings["data"] != done["data"] == fine_tune(samples, weights, kind=kind, **how).settings["data"]


def test_a_folder_whose_network_is_of_another_architecture_is_refused(tiny, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertModel, DistilBertConfig, DistilBertModel

    config = BertConfig.from_pretrained(tiny)
    good = make_ranker("bi-encoder", tiny, device="cpu").save(tmp_path / "good")
    DistilBertModel(DistilBertConfig(vocab_size=config.vocab_size, dim=32, n_layers=2, n_heads=2, hidden_dim=64)).save_pretrained(good)
    with pytest.raises(DataError, match="is about a BertModel, and the folder holds a DistilBertModel"):
        load_ranker(good, device="cpu")
    cross = make_ranker("cross-encoder", tiny, device="cpu").save(tmp_path / "cross")
    BertModel(config).save_pretrained(cross)  # no classifier in it
    with pytest.raises(DataError, match="weights are missing: classifier"):
        load_ranker(cross, device="cpu")
    BertForSequenceClassification(BertConfig.from_pretrained(tiny, num_labels=1)).save_pretrained(cross)
    assert load_ranker(cross, device="cpu").kind == "cross-encoder"


def test_code_that_a_folder_brings_runs_only_when_asked_for_by_name(tiny, tmp_path, monkeypatch):
    import shutil

    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(tiny, tmp_path / "foreign")
    (folder / "mine.py").write_text(f"import pathlib\nfrom transformers import BertConfig, BertModel\npathlib.Path({str(tmp_path / 'ran')!r}).write_text('')\n\nclass MineConfig(BertConfig):\n    model_type = 'mine'\n\nclass Mine(BertModel):\n    config_class = MineConfig\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModel": "mine.Mine"}}))
    with pytest.raises(DataError, match="brings Python code of its own.*trust_remote_code=True"):
        fine_tune(table(), **FAST | dict(model=folder))
    assert not list(tmp_path.rglob("ran")), "nothing of it was run"
    ranker = fine_tune(table(), **FAST | dict(model=folder, trust_remote_code=True))
    assert type(ranker.network).__name__ == "Mine" and list(tmp_path.rglob("ran"))
