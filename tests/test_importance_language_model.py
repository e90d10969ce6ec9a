"""What the model says about its own rows, and rollout: definitions, limits, other encoders, bad settings."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from scipy.stats import rankdata

from ecom_importance.features import import_torch, load_encoder
from ecom_importance.importance import Evidence, find, score, score_new
from ecom_importance.importance.estimators import ESTIMATORS, example_evidence
from ecom_importance.importance.language_model import attend, attention_flow, el2n, entropy, loss, margin, pair_tokens, rho_loss, roll_out, share_between
from ecom_importance.samples import DataError

WORDS = "steel bottle oat milk red running shoe wool sock lamp for with".split()
CHARACTERS = list("保温杯不锈钢红色鞋")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A random BERT of three small layers that knows English words and Chinese characters."
    torch = import_torch()
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *dict.fromkeys(CHARACTERS)]
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64, initializer_range=0.5)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, model_max_length=64).save_pretrained(folder)
    return folder


def some_pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda least, most: [" ".join(rng.choice(WORDS + CHARACTERS, rng.integers(least, most))) for _ in range(n)]
    return np.array(draw(1, 5), object), np.array(draw(1, 25), object)


def class_evidence(n=300, classes=4, d=8, seed=0, share=0.2):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, n)
    x = (1.5 * np.eye(classes, d)[truth] + rng.normal(size=(n, d)) * 0.7).astype(np.float32)
    wrong = (rng.random(n) < share) & (np.arange(n) < n - 60)
    given_class = np.where(wrong, (truth + rng.integers(1, classes, n)) % classes, truth)
    samples = pd.DataFrame({"sample_id": np.arange(n), "query_id": np.arange(n) // 5, "query": [f"query {i // 5}" for i in range(n)], "item_id": np.arange(n), "item_text": "",
                            "label": np.array(["a", "b", "c", "d", "e"])[given_class], "gain": 0.0, "split": np.where(np.arange(n) < n - 60, "train", "valid")})
    return Evidence.from_samples(samples, x, classes=True), wrong[: n - 60]


# --- the model's own probabilities ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 40))
def test_with_two_labels_all_four_are_one_ranking(seed, n):
    rng = np.random.default_rng(seed)
    p, y = rng.uniform(0.01, 0.99, n), rng.integers(0, 2, n).astype(float)
    own = np.where(y == 1, p, 1 - p)
    np.testing.assert_allclose(loss(p, y), np.log(own), atol=1e-12)
    np.testing.assert_allclose(margin(p, y, y.astype(int), np.array([0.0, 1.0])), 2 * own - 1, atol=1e-12)
    np.testing.assert_allclose(el2n(p, y), -np.linalg.norm(np.c_[1 - p, p] - np.c_[1 - y, y], axis=1), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 20), classes=st.integers(2, 6))
def test_classes_by_the_definition(seed, n, classes):
    rng = np.random.default_rng(seed)
    p, label = rng.dirichlet(np.ones(classes), n), rng.integers(0, classes, n)
    y = np.eye(classes)[label]
    for row in range(n):
        others = [p[row, c] for c in range(classes) if c != label[row]]
        assert margin(p, y, label, np.arange(classes))[row] == pytest.approx(p[row, label[row]] - max(others))
        assert el2n(p, y)[row] == pytest.approx(-np.sqrt(sum((p[row, c] - (c == label[row])) ** 2 for c in range(classes))))
    np.testing.assert_allclose(entropy(p), scipy_entropy(p, axis=1), atol=1e-12)
    np.testing.assert_allclose(loss(p, y), np.log(np.maximum(p[np.arange(n), label], 1e-12)))


def test_two_classes_as_columns_are_the_binary_case():
    rng = np.random.default_rng(0)
    p, label = rng.random(50), rng.integers(0, 2, 50)
    both, y = np.c_[1 - p, p], np.eye(2)[label]
    levels = np.array([0.0, 1.0])
    np.testing.assert_allclose(margin(both, y, label, levels), margin(p, label.astype(float), label, levels))
    np.testing.assert_allclose(el2n(both, y), el2n(p, label.astype(float)))
    np.testing.assert_allclose(entropy(both), entropy(p))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), grades=st.integers(2, 6))
def test_the_margin_is_positive_where_the_given_grade_is_nearest(seed, grades):
    rng = np.random.default_rng(seed)
    levels, p, grade = np.linspace(0, 1, grades), rng.random(30), rng.integers(0, grades, 30)
    nearest = np.abs(p[:, None] - levels).argmin(axis=1)
    np.testing.assert_array_equal(margin(p, levels[grade], grade, levels) > 0, nearest == grade)


def test_graded_estimators_part_ways():
    made, _ = example_evidence(300, 60, d=6)
    made.train["y"] = np.round(made.train["y"] * 0.5 + 0.5 * np.random.default_rng(0).integers(0, 2, 300), 1)
    table = score(made, ["loss", "margin", "el2n"])
    assert made.kind == "graded" and all(len(np.unique(rankdata(table[a]) - rankdata(table[b]))) > 10 for a, b in (("loss", "margin"), ("loss", "el2n"), ("margin", "el2n")))


def test_the_limits_of_a_margin():
    np.testing.assert_allclose(margin(np.array([0.7]), np.array([1.0]), np.array([0]), np.array([1.0])), 0.7)  # one grade: the rival is a whole gain away
    np.testing.assert_allclose(margin(np.array([[1.0]]), np.array([[1.0]]), np.array([0]), np.array([0.0])), 1.0)  # one class
    assert entropy(np.array([0.0, 1.0, 0.5])).tolist() == [0, 0, np.log(2)]


def test_wrong_classes_are_found():
    made, wrong = class_evidence(seed=1)
    table = score(made, ["loss", "margin", "el2n", "entropy", "rho_loss"])
    for name in ("loss", "margin", "el2n"):
        assert (table[name][wrong].to_numpy()[:, None] < table[name][~wrong].to_numpy()).mean() > 0.9
    assert np.isfinite(table).all().all() and table["entropy"].max() <= np.log(4)


def test_entropy_does_not_read_the_rows_own_label():
    made, _ = example_evidence(400, 40, d=6)
    made.settings["head"] = {"ridge": 0.1}
    flipped = Evidence(dict(made.train) | {"y": np.where(np.arange(400) == 7, 1 - made.train["y"], made.train["y"])}, {}, settings=made.settings)
    change = score(flipped, "entropy")["entropy"] - score(made, "entropy")["entropy"]
    others = change.drop(7).abs().max()  # the other folds' heads have met the label
    assert others > 1e-3 and abs(change[7]) < others / 100  # not 0: the fold's head starts elsewhere, and stops within the tolerance


def test_reducible_loss_is_the_difference_of_two_losses():
    made, _ = example_evidence(300, 120, d=6)
    table = score(made, ["rho_loss", "oof_loss", "trusted_loss"])
    np.testing.assert_allclose(table["rho_loss"], table["trusted_loss"] - table["oof_loss"], atol=1e-12)
    assert rho_loss(np.array([0.5]), np.array([0.9]), np.array([1.0]))[0] > 0 > rho_loss(np.array([0.5]), np.array([0.1]), np.array([1.0]))[0]


@pytest.mark.parametrize("name", ["loss", "margin", "el2n"])
def test_new_rows_have_no_training_loss(name):
    made, _ = example_evidence(200, 40, d=6)
    assert "train" not in ESTIMATORS[name].additive_over
    table = pd.DataFrame({key: made.train[key] for key in ("sample_id", "query_id", "query", "item_id")}).assign(gain=made.train["y"])
    with pytest.raises(DataError, match="loo_loss"):
        score_new(made, table.iloc[:3], made.train["x"][:3], name)


# --- attention ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), layers=st.integers(1, 5), heads=st.integers(1, 3), tokens=st.integers(2, 8))
def test_rollout_equals_the_product_of_matrices(seed, layers, heads, tokens):
    rng = np.random.default_rng(seed)
    attentions = [rng.dirichlet(np.ones(tokens), (2, heads, tokens)) for _ in range(layers)]
    sources = rng.random((2, tokens, 3))
    for text in range(2):
        whole = np.eye(tokens)
        for layer in attentions:
            whole = (0.5 * layer[text].mean(0) + 0.5 * np.eye(tokens)) @ whole
        np.testing.assert_allclose(roll_out(attentions, sources)[text], whole @ sources[text], atol=1e-12)
        np.testing.assert_allclose(whole.sum(1), 1)


def by_hand(folder, query, item, layers=None):
    "One pair, transformers' own attentions, full matrices."
    torch = import_torch()
    encoder = load_encoder(folder, device="cpu")
    encoder.network.set_attn_implementation("eager")
    inputs = encoder.tokenizer(query, item, return_tensors="pt", truncation=True, max_length=64)
    with torch.inference_mode():
        attentions = encoder.network(**inputs, output_attentions=True).attentions
    whole = np.eye(inputs["input_ids"].shape[1])
    for layer in attentions if layers is None else [attentions[one] for one in layers]:
        whole = (0.5 * layer[0].mean(0).double().numpy() + 0.5 * np.eye(len(whole))) @ whole
    sides = np.array([-1 if side is None else side for side in inputs.sequence_ids(0)])
    if not (sides == 0).any() or not (sides == 1).any():
        return 0.0
    return (whole[np.ix_(sides == 0, sides == 1)].sum(1).mean() + whole[np.ix_(sides == 1, sides == 0)].sum(1).mean()) / 2


@pytest.mark.parametrize("layers", [None, (-1,), (0, 2)])
@pytest.mark.parametrize("token_budget", [1, 200])
def test_flow_equals_one_pair_at_a_time(tiny, layers, token_budget):
    query, item = some_pairs(25)
    query[3], item[4], item[5] = "保温杯", "", "oat milk " * 60
    flow = attention_flow(query, item, model=tiny, layers=layers, token_budget=token_budget, device="cpu")
    np.testing.assert_allclose(flow, [by_hand(tiny, *pair, layers) for pair in zip(query, item)], rtol=1e-4, atol=1e-6)
    assert flow[4] == 0 and flow.min() >= 0 and flow.max() <= 1


def test_equal_pairs_run_once(tiny, monkeypatch):
    from ecom_importance.importance import language_model

    seen, real = [], attend
    monkeypatch.setattr(language_model, "attend", lambda encoder, tokens, layers: seen.append(len(tokens)) or real(encoder, tokens, layers))
    query, item = some_pairs(6)
    rows = np.random.default_rng(1).integers(0, 6, 80)
    flow = attention_flow(query[rows], item[rows], model=tiny, device="cpu")
    assert sum(seen) == len(set(rows))
    np.testing.assert_allclose(flow, attention_flow(query, item, model=tiny, device="cpu")[rows], rtol=1e-5)


def test_a_hand_made_network_of_two_tokens(tiny):
    "A Bert whose attention is uniform, since its queries and keys are 0: every token takes 1 / T from each token a layer."
    torch = import_torch()
    encoder = load_encoder(tiny, device="cpu")
    encoder.network.set_attn_implementation("eager")
    with torch.no_grad():
        for layer in encoder.network.encoder.layer:
            for linear in (layer.attention.self.query, layer.attention.self.key):
                linear.weight.zero_()
                linear.bias.zero_()
    tokens = pair_tokens(encoder, [("steel", "bottle")])
    assert tokens[0][2] == [-1, 0, -1, 1, -1]
    # One layer: ½ · 1/5 from the other side's token. After L layers the whole matrix is 2^−L I + (1 − 2^−L) / 5.
    for layers in (1, 2, 3):
        np.testing.assert_allclose(attend(encoder, tokens, range(layers)), (1 - 0.5**layers) / 5, rtol=1e-5)


def test_a_side_without_tokens_has_no_share():
    members = np.zeros((1, 3, 2))
    members[0, 0, 0] = 1
    assert share_between(np.ones((1, 3, 2)), members).tolist() == [0.0]


@pytest.mark.parametrize("how, error, what", [
    ({"max_tokens": 4}, ValueError, "max_tokens is 4"),
    ({"layers": ()}, ValueError, "layers is empty"),
    ({"layers": (3,)}, ValueError, "3 layers"),
    ({"device": "tpu"}, DataError, "device 'tpu'"),
    ({"model": "/nowhere/at/all"}, DataError, "no folder here"),
])
def test_bad_settings_are_named(tiny, how, error, what):
    query, item = some_pairs(3)
    with pytest.raises(error, match=what):
        attention_flow(query, item, **({"model": tiny} | how))


def test_a_missing_text_is_named(tiny):
    query, item = some_pairs(3)
    item[1] = None
    with pytest.raises(DataError, match="row 1"):
        attention_flow(query, item, model=tiny)


def test_attention_reads_no_label(tiny):
    made, _ = example_evidence(60, 16, d=4)
    made.train["query"], made.train["item_text"] = some_pairs(60)
    how = {"attention_flow": {"model": tiny, "device": "cpu"}}
    first, second = (score(Evidence(dict(made.train) | {"y": y}, {}, settings=how), "attention") for y in (made.train["y"], 1 - made.train["y"]))
    pd.testing.assert_frame_equal(first, second)
    assert first["attention"].nunique() > 5 and find(Evidence(made.train, {}, settings=how), "attention_flow").shape == (60,)
