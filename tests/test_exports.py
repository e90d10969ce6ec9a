"""Exports: each trained on where it goes, no row of another split, files to the last bit, and bad input."""
import importlib

import lightgbm
import numpy as np
import pandas as pd
import pytest
import torch
import xgboost
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression

from ecom_importance.evaluation import RankingMetric
from ecom_importance.importance.heads import INTERCEPT_RIDGE, fit_head
from ecom_importance.samples import DataError
from ecom_importance.weighting import exports
from ecom_importance.weighting.exports import for_lightgbm, for_xgboost, load_weights, to_dataset, torch_sampler, torch_weights, write_weights
from ecom_importance.weighting.resampling import bootstrap, repeat_rows, smote

quick = settings(max_examples=30, deadline=None)


def problem(seed=0, queries=24, rows=10, d=4, grades=3, whole_ids=False):
    "Generated samples of all splits in random order, vectors on a coarse grid, weights of which a quarter is 0."
    rng = np.random.default_rng(seed)
    query = np.repeat(np.arange(queries), rows)
    x = rng.normal(size=(len(query), d)).round(1)
    gain = np.digitize(x[:, 0] - 0.5 * x[:, 1] + 0.4 * rng.normal(size=len(query)), [0.3, 1.2][: grades - 1]) / (grades - 1)
    ids = 7 + np.arange(len(query)) if whole_ids else np.array([f"样本,{row}" for row in range(len(query))])
    table = pd.DataFrame({"sample_id": ids, "query_id": query, "query": [f"保温杯\r\n“{q}”" for q in query], "item_id": ids, "item_text": [f"不锈钢, 第{row}款 \"大\"" for row in range(len(query))], "label": gain, "gain": gain,
                          "split": np.array(["train", "train", "test", "train", "valid", "select"])[np.arange(queries) % 6][query]})
    order = rng.permutation(len(table))
    table, x = table.iloc[order].reset_index(drop=True), x[order]
    train = table.loc[table["split"] == "train", "sample_id"]
    values = np.where(rng.random(len(train)) < 0.25, 0, rng.gamma(2, size=len(train)))
    return table, x, pd.Series(values / values.mean(), index=pd.Index(train, name="sample_id"), name="weight")


def even(table):
    return pd.Series(1.0, index=pd.Index(table.loc[table["split"] == "train", "sample_id"]))


# ---- all of them

def test_no_row_of_another_split_and_none_of_weight_0_comes_out(tmp_path):
    table, _, weights = problem()
    allowed = set(weights.index[weights > 0])
    ids = table["sample_id"].to_numpy()
    assert set(ids[torch_weights(table, weights).numpy() > 0]) == allowed
    assert set(ids[list(torch_sampler(table, weights, n=20_000))]) == allowed
    assert set(to_dataset(table, weights)["sample_id"]) == allowed
    assert set(ids[for_lightgbm(table, weights).rows]) == set(ids[for_xgboost(table, weights).rows]) == allowed
    assert set(load_weights(write_weights(table, weights, tmp_path / "w.csv", drop_zero=True)).index) == allowed


@pytest.mark.parametrize("call", [torch_weights, torch_sampler, to_dataset, for_lightgbm, for_xgboost, lambda t, w: write_weights(t, w, "never.csv")])
@pytest.mark.parametrize(("change", "words"), [
    (lambda t, w: (t, w * 2), "mean 2"), (lambda t, w: (t, w.iloc[1:] / w.iloc[1:].mean()), "1 training rows have no weight"), (lambda t, w: (t, pd.Series(1.0, index=t["sample_id"])), "to rows of another split"),
    (lambda t, w: (t, w - 1), "negative"), (lambda t, w: (t.drop(columns="sample_id"), w), "no column"), (lambda t, w: (t, w.to_numpy()), "ndarray"),
])
def test_weights_that_do_not_fit_are_refused_everywhere(call, change, words):
    table, _, weights = problem()
    with pytest.raises(DataError, match=words):
        call(*change(table, weights))


def test_means_are_one_and_order_does_not_matter():
    table, x, weights = problem()
    again = table.sample(frac=1, random_state=1)
    tensor = torch_weights(table, weights, dtype="float64").numpy()
    assert tensor[tensor > 0].mean() == pytest.approx(1)
    assert pd.Series(tensor, table["sample_id"]).equals(pd.Series(torch_weights(again, weights, dtype="float64").numpy(), again["sample_id"]).reindex(table["sample_id"]))
    for export in (for_lightgbm, for_xgboost):
        one, other = export(table, weights), export(again, weights)
        assert one.weight.mean() == pytest.approx(1)
        assert table["sample_id"].to_numpy()[one.rows].tolist() == again["sample_id"].to_numpy()[other.rows].tolist()
        np.testing.assert_allclose(one.weight, other.weight)


# ---- PyTorch

def train_torch(x, y, weight, ridge, draws=None):
    "The optimum of the weighted logistic loss, by torch alone."
    inputs, targets, penalty = torch.tensor(x), torch.tensor(y), torch.tensor([ridge] * x.shape[1] + [INTERCEPT_RIDGE], dtype=torch.float64)
    theta = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([theta], max_iter=300, tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def step():
        solver.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ theta[:-1] + theta[-1], targets, reduction="none")
        value = (weight * loss).sum() / weight.sum() + (penalty * theta**2).sum() / 2
        value.backward()
        return value

    solver.step(step)
    return theta.detach().numpy()


def test_weights_on_the_loss_find_the_head_and_draws_find_it_up_to_noise():
    table, x, weights = problem(queries=60)
    y = table["gain"].to_numpy()
    tensor = torch_weights(table, weights, dtype="float64")
    head = fit_head(x, y, ridge=0.05, weights=tensor.numpy(), tolerance=1e-14)
    ours = np.r_[head.weights, head.intercept]
    np.testing.assert_allclose(train_torch(x, y, tensor, 0.05), ours, atol=1e-6)
    n = 100_000
    rows = np.array(list(torch_sampler(table, weights, n=n, seed=3)))
    found = train_torch(x, y, torch.tensor(np.bincount(rows, minlength=len(x)).astype(float)), 0.05)
    # Sandwich: the spread of the optimum over draws of n rows.
    bordered = np.c_[x, np.ones(len(x))]
    p, share = head.predict(x), tensor.numpy() / tensor.sum().item()
    hessian = (bordered * (share * p * (1 - p))[:, None]).T @ bordered + np.diag([0.05] * x.shape[1] + [INTERCEPT_RIDGE])
    score = bordered * (p - y)[:, None]
    mean = share @ score
    spread = np.linalg.inv(hessian) @ ((score * share[:, None]).T @ score - np.outer(mean, mean)) @ np.linalg.inv(hessian) / n
    assert 1e-3 < stats.chi2(len(ours)).sf((found - ours) @ np.linalg.solve(spread, found - ours))
    plain = fit_head(x, y, ridge=0.05, weights=(tensor.numpy() > 0))
    assert (np.abs(np.r_[plain.weights, plain.intercept] - ours) / np.sqrt(np.diag(spread))).max() > 8, "the test could tell the weights from none"


def test_draws_repeat_under_a_seed_and_differ_between_epochs():
    table, _, weights = problem()
    sampler = torch_sampler(table, weights, seed=5)
    first, second = list(sampler), list(sampler)
    assert first == list(torch_sampler(table, weights, seed=5)) and first != second and len(first) == len(weights)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(len(table))), batch_size=16, sampler=torch_sampler(table, weights, n=64, seed=5))
    assert torch.cat([batch[0] for batch in batches]).tolist() == list(torch_sampler(table, weights, n=64, seed=5))


def test_torch_cannot_draw_among_too_many(monkeypatch):
    table, _, weights = problem()
    monkeypatch.setattr(exports, "MOST_DRAWN", 100)
    with pytest.raises(DataError, match="100 rows at most"):
        torch_sampler(table, weights)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="2\\^24"):
        torch.multinomial(torch.ones(exports.MOST_DRAWN + 1), 1)
    with pytest.raises(DataError, match="n is 0"):
        torch_sampler(table, weights, n=0)


# ---- Hugging Face

def test_a_dataset_holds_texts_and_weights_as_they_are():
    table, _, weights = problem(whole_ids=True)
    dataset = to_dataset(table, weights, columns=["sample_id", "item_text"])
    rows = table.set_index("sample_id").loc[dataset["sample_id"]]
    assert dataset.column_names == ["sample_id", "item_text", "weight"] and list(dataset["item_text"]) == rows["item_text"].tolist()
    expected = weights[weights > 0] / weights[weights > 0].mean()
    assert list(dataset["weight"]) == expected[rows.index].tolist() and dataset.features["weight"].dtype == "float64"


def test_a_trainer_learns_from_the_weights(tmp_path):
    "Full batches of gradient descent: counts as weights and copied rows give the same model, no weights another."
    import transformers

    table, x, weights = problem()
    table = table.assign(vector=list(x))
    counts = bootstrap(weights, draws="independent", seed=2)
    copies, _ = repeat_rows(table, counts)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Linear(x.shape[1], 1)
            torch.nn.init.zeros_(self.line.weight), torch.nn.init.zeros_(self.line.bias)

        def forward(self, vector, gain, weight):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(self.line(vector)[:, 0], gain, reduction="none")
            return {"loss": (weight * loss).sum() / weight.sum()}

    def learn(samples, weights):
        how = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=1000, max_steps=4, learning_rate=0.5, lr_scheduler_type="constant", optim="sgd", report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True)
        model = Head()
        transformers.Trainer(model, how, train_dataset=to_dataset(samples, weights, columns=["vector", "gain"])).train()
        return model.line.weight.detach().numpy().ravel()

    by_count, by_copy, alike = learn(table, counts), learn(copies, even(copies)), learn(table, even(table))
    np.testing.assert_allclose(by_count, by_copy, atol=1e-5)
    assert np.abs(by_count - alike).max() > 0.01


def test_synthetic_rows_have_no_text_to_hand_on(tmp_path):
    table, x, _ = problem()
    grown, _, weights = smote(table, x, k_neighbors=2)
    for call in (lambda: to_dataset(grown, weights), lambda: write_weights(grown, weights, tmp_path / "w.csv")):
        with pytest.raises(DataError, match="are synthetic"):
            call()
    assert len(to_dataset(grown, weights, columns=["sample_id"])) == len(weights)
    assert load_weights(write_weights(grown, weights, tmp_path / "w.csv", columns=())).tolist() == weights.tolist()
    assert len(for_lightgbm(grown, weights).rows) == len(weights)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    table, _, weights = problem()
    real = importlib.import_module
    monkeypatch.setattr(exports, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)) if name == "datasets" else real(name))
    with pytest.raises(ImportError, match=r"needs datasets.*pip install 'ecom_importance\[export\]'"):
        to_dataset(table, weights)


def test_columns_that_are_missing_or_of_two_types():
    table, _, weights = problem()
    with pytest.raises(DataError, match="no column 'price'|no column price"):
        to_dataset(table, weights, columns=["price"])
    with pytest.raises(DataError, match="one type"):
        to_dataset(table.assign(price=[object() if row % 2 else 1 for row in range(len(table))]), weights, columns=["price"])


# ---- LightGBM and XGBoost

LGB = {"objective": "lambdarank", "verbose": -1, "num_threads": 1, "deterministic": True, "force_col_wise": True, "num_leaves": 7, "min_data_in_leaf": 1, "min_sum_hessian_in_leaf": 1e-9}
XGB = {"objective": "rank:ndcg", "ndcg_exp_gain": False, "max_depth": 3, "nthread": 1, "base_score": 0.0, "lambda": 0.0, "min_child_weight": 0.0}
NDCG = RankingMetric("ndcg", k=10)


def light(x, a, trees=10, **change):
    given = {"rows": a.rows, "label": a.label, "weight": a.weight, "group": a.group} | change
    data = lightgbm.Dataset(x[given["rows"]], given["label"], weight=given["weight"], group=given["group"], params={"min_data_in_bin": 1, "verbose": -1})
    return lightgbm.train({**LGB, "label_gain": a.gains.tolist()}, data, trees).predict(x)


def boosted(x, a, trees=10, **change):
    given = {"rows": a.rows, "label": a.label, "weight": a.weight, "qid": a.qid} | change
    return xgboost.train(XGB, xgboost.DMatrix(x[given["rows"]], given["label"], qid=given["qid"], weight=given["weight"]), trees).predict(xgboost.DMatrix(x))


def test_arrays_say_what_the_table_says():
    table, _, weights = problem()
    kept = weights[weights > 0] / weights[weights > 0].mean()
    a, b = for_lightgbm(table, weights), for_xgboost(table, weights)
    for arrays in (a, b):
        rows = table.iloc[arrays.rows]
        assert (rows["query_id"].to_numpy() == arrays.query_id[arrays.qid]).all() and arrays.group.sum() == len(rows) and len(set(arrays.query_id)) == len(arrays.group)
    np.testing.assert_array_equal(a.gains[a.label], table["gain"].to_numpy()[a.rows])
    np.testing.assert_allclose(a.weight, kept[table["sample_id"].to_numpy()[a.rows]])
    np.testing.assert_allclose(b.label, table["gain"].to_numpy()[b.rows])
    mean = kept.groupby(table.set_index("sample_id")["query_id"].reindex(kept.index)).mean()
    np.testing.assert_allclose(b.weight, (mean / mean.mean())[b.query_id])


@pytest.mark.parametrize(("train", "export"), [(light, for_lightgbm), (boosted, for_xgboost)])
def test_both_learn_to_rank_from_them_and_weights_act(train, export):
    table, x, weights = problem(queries=60)
    test = (table["split"] == "test").to_numpy()
    value = lambda scores: NDCG.mean(table["query_id"][test], table["gain"][test], scores[test])
    scores = train(x, export(table, weights))
    assert value(scores) > value(np.random.default_rng(0).normal(size=len(x))) + 0.15
    assert np.abs(scores - train(x, export(table, weights), weight=None)).max() > 0.05


def test_lightgbm_keeps_rows_of_weight_0_as_opponents():
    "The reason why they are left out."
    table, x, weights = problem()
    a, full = for_lightgbm(table, weights), for_lightgbm(table, even(table))
    with_zeros = weights[table["sample_id"].to_numpy()[full.rows]].to_numpy()
    assert np.abs(light(x, full, weight=with_zeros) - light(x, a)).max() > 0.05


def test_lightgbm_a_query_of_weight_0_is_absent_and_all_doubled_is_the_same():
    table, x, _ = problem(queries=60)
    x = np.clip(np.round(2 * x) / 2, -1.5, 1.5)  # every value occurs with and without the query, so that the bins are the same
    a = for_lightgbm(table, even(table))
    none = (a.qid >= 3).astype(float)
    assert np.abs(light(x, a, weight=none, trees=3) - light(x, a, trees=3)).max() > 0.01
    np.testing.assert_allclose(light(x, a, weight=none, trees=3), light(x, a, rows=a.rows[none > 0], label=a.label[none > 0], weight=None, group=a.group[3:], trees=3), atol=1e-9)
    some = for_lightgbm(table, problem(queries=60)[2])
    np.testing.assert_allclose(light(x, some), light(x, some, weight=2 * some.weight), atol=1e-9)


def test_xgboost_a_query_of_weight_2_is_there_twice_and_of_weight_0_absent():
    table, x, _ = problem()
    b = for_xgboost(table, even(table))
    few = b.qid < 3
    twice = np.where(np.arange(len(b.group)) < 3, 2.0, 1.0)
    doubled = {"rows": np.r_[b.rows, b.rows[few]], "label": np.r_[b.label, b.label[few]], "qid": np.r_[b.qid, b.qid[few] + len(b.group)], "weight": None}
    np.testing.assert_allclose(boosted(x, b, weight=twice), boosted(x, b, **doubled), atol=1e-5)
    np.testing.assert_allclose(boosted(x, b, weight=twice - 1 + (twice == 1) - (twice == 2)), boosted(x, b, rows=b.rows[~few], label=b.label[~few], qid=b.qid[~few], weight=None), atol=1e-5)


def test_the_targets_refuse_the_other_ones_weights():
    table, x, weights = problem()
    a, b = for_lightgbm(table, weights), for_xgboost(table, weights)
    with pytest.raises(xgboost.core.XGBoostError, match="number of query groups"):
        boosted(x, b, weight=a.weight)
    with pytest.raises(lightgbm.basic.LightGBMError, match="Length of weights"):
        light(x, a, weight=b.weight)
    with pytest.raises(lightgbm.basic.LightGBMError, match="int type"):
        light(x, a, label=b.label)


@pytest.mark.parametrize(("within", "between", "lost"), [(0.0, 0.5, 0.0), (0.5, 0.0, 1.0), (0.0, 0.0, 0.0), (0.3, 0.4, 0.36)])
def test_what_xgboost_loses_is_the_variance_inside_queries(within, between, lost):
    table, *_ = problem()
    train = table[table["split"] == "train"]
    query = train["query_id"].rank(method="dense").astype(int)
    place = train.groupby("query_id").cumcount()
    weights = pd.Series((1 + between * np.where(query % 2, 1, -1) + within * np.where(place % 2, 1, -1)), index=pd.Index(train["sample_id"]))
    assert for_xgboost(table, weights).lost == pytest.approx(lost, abs=1e-9)
    assert for_lightgbm(table, weights).lost == 0


def test_copies_are_exported_like_rows():
    table, x, weights = problem()
    copies, where = repeat_rows(table, bootstrap(weights, seed=1))
    a = for_lightgbm(copies, even(copies))
    assert len(a.rows) == len(weights) and np.isfinite(light(x[where], a, trees=2)).all()


def test_rows_without_a_gain_or_a_query_are_named():
    table, _, weights = problem()
    row = int(np.flatnonzero(table["sample_id"].eq(weights.idxmax()))[0])
    for column, value in (("gain", np.nan), ("gain", 1.5), ("query_id", None)):
        broken = table.astype({column: object})
        broken.loc[row, column] = value
        with pytest.raises(DataError, match="no gain from 0 to 1, or no query") as failure:
            for_xgboost(broken, weights)
        assert failure.value.rows == [row]


# ---- files

@quick
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=20).filter(lambda values: sum(values) > 1e-3), st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1), min_size=20, max_size=20, unique=True))
@example([1.0, 2.0, 3.0], ["\r", "a,\rb", '"茶"\n', *map(str, range(17))])
def test_files_come_back_to_the_last_bit_whatever_the_ids(tmp_path_factory, values, names):
    folder = tmp_path_factory.mktemp("files")
    weights = pd.Series(values, index=pd.Index(names[: len(values)], dtype=object, name="sample_id"), name="weight")
    weights /= weights.mean()
    table = pd.DataFrame({"sample_id": names[: len(values)], "split": "train", "item_text": names[: len(values)]})
    for kind in ("csv", "parquet"):
        back = load_weights(write_weights(table, weights, folder / f"权重.{kind}", columns=["item_text"]), table)
        assert back.tolist() == weights.tolist() and back.index.tolist() == weights.index.tolist()
    assert pd.read_parquet(folder / "权重.parquet")["item_text"].tolist() == table["item_text"].tolist()


def test_scikit_learn_trained_from_the_file_is_the_head(tmp_path):
    table, x, weights = problem(queries=60, grades=2)
    y = table["gain"].to_numpy()
    rows = pd.read_parquet(write_weights(table, weights, tmp_path / "w.parquet"))
    place = pd.Series(np.arange(len(table)), index=table["sample_id"])[rows["sample_id"]].to_numpy()
    model = LogisticRegression(C=1 / (0.05 * rows["weight"].sum()), tol=1e-10, max_iter=2000).fit(x[place], rows["gain"], sample_weight=rows["weight"])
    train = weights.index
    at = pd.Series(np.arange(len(table)), index=table["sample_id"])[train].to_numpy()
    head = fit_head(x[at], y[at], ridge=0.05, weights=weights.to_numpy(), tolerance=1e-14)
    np.testing.assert_allclose(np.r_[model.coef_[0], model.intercept_], np.r_[head.weights, head.intercept], atol=2e-5)


def test_ids_get_their_type_back_and_texts_survive(tmp_path):
    table, _, weights = problem(whole_ids=True)
    path = write_weights(table, weights, tmp_path / "new" / "w.csv")
    assert load_weights(path, table).index.equals(weights.index) and load_weights(path).index[0] == str(weights.index[0])
    train = table[table["split"] == "train"]
    read = pd.read_csv(path)
    assert read["query"].tolist() == train["query"].tolist() and read["item_text"].tolist() == train["item_text"].tolist()
    for_lightgbm(table, load_weights(path, table))


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    table, _, weights = problem()
    path = write_weights(table, weights, tmp_path / "w.csv")
    before = path.read_bytes()

    def broken(self, beside, **settings):
        beside.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", broken)
    with pytest.raises(OSError, match="disk full"):
        write_weights(table, weights, path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["w.csv"]


def test_files_that_will_not_do(tmp_path):
    table, _, weights = problem()
    with pytest.raises(DataError, match="cannot be written as 'w.xlsx'"):
        write_weights(table, weights, tmp_path / "w.xlsx")
    with pytest.raises(DataError, match="no column"):
        write_weights(table, weights, tmp_path / "w.csv", columns=["price"])
    mixed = table.assign(sample_id=[row if row % 2 else f"s{row}" for row in range(len(table))])
    with pytest.raises(DataError, match="several types"):
        write_weights(mixed, even(mixed), tmp_path / "w.parquet")
    (tmp_path / "other.csv").write_text("id,weight\na,1\n")
    (tmp_path / "words.csv").write_text("sample_id,weight\na,heavy\n")
    (tmp_path / "twice.csv").write_text("sample_id,weight\na,1\na,1\n")
    (tmp_path / "mean.csv").write_text("sample_id,weight\na,1\nb,2\n")
    (tmp_path / "broken.parquet").write_text("no parquet")
    for name, words in (("other.csv", "no weights can be read"), ("words.csv", "no weights can be read"), ("absent.csv", "no weights can be read"), ("broken.parquet", "no weights can be read"), ("twice.csv", "share their sample_id"), ("mean.csv", "mean 1.5")):
        with pytest.raises(DataError, match=words):
            load_weights(tmp_path / name)
