"""The sample table: gain maps that never guess, splits that do not leak, files that are whole."""
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.samples import (BEHAVIOUR, ESCI_KDD, GAIN_MAPS, GRADES_1_3, GRADES_1_4, NEAR, DataError, GainMap, GradeScale, assign_folds, check_samples, check_splits, data_root,
                                     fit_query_clusters, normalise_text, query_clusters, share_of_titles_seen, split_by_query, split_by_time, stable_hash, stable_uniform, tokens, unseen_items, write_whole)

WORDS = ["red", "dress", "shoe", "oat", "milk", "保温杯", "不锈钢", "l", "500ml"]


def make_samples(n_queries=40, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    query = np.repeat(np.arange(n_queries), 6)
    return pd.DataFrame({"sample_id": np.arange(len(query)), "query_id": query, "query": [f"q{q} x{q}" for q in query], "item_id": rng.integers(0, 60, len(query)),
                         "item_text": [f"item {i}" for i in rng.integers(0, 60, len(query))], "label": "E", "gain": 1.0, "split": "train"})


# --- errors and gain maps


def test_an_error_says_everything():
    error = DataError("found X", file="a.csv", column="label", rows=range(10), expected="Y", mend="do Z")
    assert str(error) == "a.csv, column 'label', rows 0, 1, 2, 3, 4 (of 10): found X. Expected: Y. Mend: do Z."
    assert str(DataError("found X", rows=[3])) == "row 3: found X." and str(DataError("is it so?")) == "is it so?"


@pytest.mark.parametrize("gain_map, label, gain", [(ESCI_KDD, "S", 0.1), (ESCI_KDD, "I", 0), (GRADES_1_4, 4, 1), (GRADES_1_4, 2, 1 / 3), (GRADES_1_3, "2.5", 0.75), (BEHAVIOUR, "cart", 2 / 3)])
def test_gains(gain_map, label, gain):
    assert gain_map(pd.Series([label]))[0] == pytest.approx(gain)


@pytest.mark.parametrize("gain_map", GAIN_MAPS.values(), ids=GAIN_MAPS)
@pytest.mark.parametrize("label", ["unheard of", None, np.nan, 99, -1])
def test_an_unknown_label_is_an_error_that_names_it(gain_map, label):
    known = next(iter(gain_map.gains)) if isinstance(gain_map, GainMap) else gain_map.low
    with pytest.raises(DataError, match="row 1:.*" + ("" if label is None else str(label))):
        gain_map(pd.Series([known, label], dtype=object))


def test_gains_stay_with_their_rows():
    labels = pd.Series(["I", "E"], index=[7, 3])
    assert ESCI_KDD(labels).to_dict() == {7: 0.0, 3: 1.0}


@pytest.mark.parametrize("gains", [{}, {"a": 1.2}, {"a": -0.1}])
def test_a_gain_map_holds_gains(gains):
    with pytest.raises(DataError, match="gain map 'bad'"):
        GainMap("bad", gains)


def test_levels_are_the_classes():
    assert ESCI_KDD.levels == (0.0, 0.01, 0.1, 1.0) and GRADES_1_3.levels == (0.0, 0.5, 1.0) and GradeScale("x", 0, 4).levels == (0.0, 0.25, 0.5, 0.75, 1.0)


# --- the table


def test_a_good_table_passes_unchanged():
    samples = make_samples()
    assert check_samples(samples).equals(samples)
    assert check_samples(samples.assign(gain=1))["gain"].dtype == float, "whole gains become floats"


@pytest.mark.parametrize("column, value, what", [
    ("sample_id", 0, "more than once"), ("sample_id", None, "missing"), ("query_id", None, "missing"), ("query", "", "text that is not empty"), ("query", None, "missing|not empty"), ("item_text", "   ", "not empty"),
    ("gain", np.nan, "missing"), ("gain", np.inf, "from 0 to 1"), ("gain", 1.01, "from 0 to 1"), ("gain", "high", "not numbers"), ("split", "dev", "train, valid, select, test"), ("label", None, "missing"),
])
def test_a_bad_row_is_named(column, value, what):
    samples = make_samples().astype({"sample_id": object, "query_id": object, "gain": object})
    samples.loc[5, column] = value
    with pytest.raises(DataError, match=what) as error:
        check_samples(samples, file="log.csv")
    assert 5 in error.value.rows and error.value.column == column and "log.csv" in str(error.value)


@pytest.mark.parametrize("column, value, what", [("position", 0, "counted from 1"), ("propensity", 0, "above 0"), ("propensity", 1.5, "above 0"), ("noise", None, "missing")])
def test_optional_columns_are_checked_when_they_are_there(column, value, what):
    samples = make_samples().assign(**{column: 1 if column != "noise" else ""})
    samples[column] = samples[column].astype(object)
    samples.loc[2, column] = value
    with pytest.raises(DataError, match=what):
        check_samples(samples)


def test_missing_columns_and_empty_tables():
    with pytest.raises(DataError, match="columns gain, split are missing"):
        check_samples(make_samples().drop(columns=["gain", "split"]))
    with pytest.raises(DataError, match="no rows"):
        check_samples(make_samples().iloc[:0])


# --- texts and hashes


@pytest.mark.parametrize("text, expected", [("Oat-MILK, 1 l", {"oat", "milk", "1", "l"}), ("ｉＰｈｏｎｅ　１５", {"iphone", "15"}), ("红色连衣裙 XL", {"红色", "色连", "连衣", "衣裙", "xl"}), ("杯", {"杯"}), ("スニーカー", {"スニ", "ニー", "ーカ", "カー"}), ("💡", set()), ("", set())])
def test_tokens(text, expected):
    assert tokens(text) == expected


@given(st.text(max_size=40))
def test_normalising_twice_is_normalising_once(text):
    once = normalise_text(text)
    assert normalise_text(once) == once or "\u0345" in text  # one combining mark is known not to settle at once under case folding


def test_hashes_are_the_same_in_another_process():
    code = "from ecom_importance.samples import stable_hash, stable_uniform; print(stable_hash('a', 1, seed=3), stable_uniform(['x'], 5)[0])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77", "PATH": ""}).stdout.split()
    assert printed == [str(stable_hash("a", 1, seed=3)), str(stable_uniform(["x"], 5)[0])]


@given(st.lists(st.text(max_size=5), min_size=1, max_size=30, unique=True), st.integers(0, 9))
def test_draws_go_by_name(names, seed):
    draws = dict(zip(names, stable_uniform(names, seed)))
    assert all(0 <= draw < 1 for draw in draws.values())
    assert draws == dict(zip(reversed(names), stable_uniform(names[::-1], seed)))


# --- clusters, splits, folds


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4), st.integers(0, 4)), min_size=1, max_size=14))
def test_clusters_are_the_connected_components(rows):
    "Against a pair-by-pair reading of the rule."
    table = pd.DataFrame({"query": [" ".join(words) for words, _ in rows], "item_id": [item for _, item in rows]})
    sets, items = [tokens(query) for query in table["query"]], {}
    for some, item in zip(sets, table["item_id"]):
        items.setdefault(some, set()).add(item)
    group = list(range(len(rows)))
    for _ in rows:
        for a in range(len(rows)):
            for b in range(len(rows)):
                near = len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= NEAR and items[sets[a]] & items[sets[b]]
                if sets[a] == sets[b] or near:
                    group[a] = group[b] = min(group[a], group[b])
    found = fit_query_clusters(table, block=3).assign(table)
    assert pd.DataFrame({"a": group, "b": found}).drop_duplicates().shape[0] == len(set(group)) == len(set(found))


def test_blocks_of_clusters_change_nothing():
    samples = make_samples(120).assign(query=lambda table: "shoe red " + (table["query_id"] // 2).astype(str))
    assert (fit_query_clusters(samples, block=7).assign(samples) == fit_query_clusters(samples).assign(samples)).all()


def test_new_queries_find_their_cluster():
    old = pd.DataFrame({"query": ["oat milk drink", "red shoe"], "item_id": [1, 2]})
    index = fit_query_clusters(old)
    names = index.assign(pd.DataFrame({"query": ["drink OAT milk", "oat milk", "oat milk", "blue shoe", "tap"], "item_id": [9, 1, 9, 2, 1]}))
    assert names[0] == names[1] == names[2] == "drink milk oat" and names[3] == "blue shoe" and names[4] == "tap"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), order=st.integers(0, 999))
def test_splits_are_disjoint_deterministic_and_of_the_size_asked(seed, order):
    samples = make_samples(60)
    sizes = {"train": None, "valid": 10, "select": 12, "test": 15}
    split = split_by_query(samples, sizes, seed=seed)
    check_splits(split)
    assert split.groupby("split")["query_id"].nunique().to_dict() == {"train": 23, "valid": 10, "select": 12, "test": 15}
    shuffled = split_by_query(samples.sample(frac=1, random_state=order), sizes, seed=seed)
    assert shuffled["split"].sort_index().equals(split["split"])


def test_short_queries_go_to_the_rest():
    samples = make_samples(40)
    short = samples[(samples["query_id"] >= 20) | (samples.groupby("query_id").cumcount() < 2)].reset_index(drop=True)
    split = split_by_query(short, {"train": None, "test": 10}, min_items={"test": 4})
    items = split.groupby("query_id")["item_id"].nunique()
    assert (items[split.loc[split["split"] == "test", "query_id"].unique()] >= 4).all()


@pytest.mark.parametrize("sizes, what", [({"train": None, "test": 41}, "needs 41 queries, and there are 40"), ({"train": None, "test": None}, "exactly one"), ({"train": 3, "test": 4}, "exactly one"), ({"train": None, "dev": 3}, "splits among"),
                                         ({"train": None, "test": 40}, "no query is left")])
def test_splits_that_cannot_be_made(sizes, what):
    with pytest.raises(DataError, match=what):
        split_by_query(make_samples(40), sizes)


def test_clusters_larger_than_the_gap_make_a_split_a_little_larger():
    samples = make_samples(30).assign(query=lambda table: "same " + (table["query_id"] // 3).astype(str))  # ten clusters of three queries
    split = split_by_query(samples, {"train": None, "valid": 4, "test": 8})
    assert split.groupby("split")["query_id"].nunique().to_dict() == {"test": 9, "train": 15, "valid": 6}
    check_splits(split)


def test_short_chinese_queries_stay_apart():
    table = pd.DataFrame({"query": ["大号咖啡机特价", "大号手机壳特价", "保温杯 不锈钢", "不锈钢 保温杯"], "item_id": [1, 1, 2, 3]})
    names = fit_query_clusters(table).assign(table)
    assert names[0] != names[1] and names[2] == names[3]


def test_one_query_cannot_be_split():
    with pytest.raises(DataError, match="no query is left|needs"):
        split_by_query(make_samples(1), {"train": None, "test": 1})


def test_time_splits():
    table = make_samples(10).assign(timestamp=pd.date_range("2026-01-01", periods=60, freq="D"))
    split = split_by_time(table, {"test": "2026-02-20", "valid": "2026-02-01"})
    assert split.groupby("split")["timestamp"].min().to_dict() == {"train": pd.Timestamp("2026-01-01"), "valid": pd.Timestamp("2026-02-01"), "test": pd.Timestamp("2026-02-20")}
    check_splits(split)  # queries recur, but one moment separates them
    with pytest.raises(DataError, match="no rows fall into test"):
        split_by_time(table, {"test": "2027-01-01"})
    with pytest.raises(DataError, match="timestamp"):
        split_by_time(make_samples(10), {"test": "2026-02-20"})


def test_a_leak_is_refused():
    samples = make_samples(20)
    samples.loc[samples["query_id"] == 3, "split"] = "test"
    check_splits(samples)
    samples.loc[samples["query_id"] == 4, ["query", "query_id"]] = ["X3 Q3", 99]
    with pytest.raises(DataError, match="1 clusters? of near-duplicate queries"):
        check_splits(samples)


def test_time_separates_only_the_splits_that_it_separates():
    samples = make_samples(20).assign(timestamp=pd.Timestamp("2026-03-01"))
    samples.loc[samples["query_id"] == 3, "split"] = "select"
    samples.loc[samples["query_id"] == 4, ["query", "split"]] = ["x3 q3", "test"]
    samples.loc[samples["split"] == "train", "timestamp"] = pd.Timestamp("2026-01-01")
    with pytest.raises(DataError, match="1 cluster of near-duplicate"):
        check_splits(samples)
    samples.loc[samples["split"] == "test", "timestamp"] = pd.Timestamp("2026-04-01")
    check_splits(samples)


@pytest.mark.parametrize("times, begins, what", [(["10/1/2017"] * 60, {"tset": "2026-01-01"}, "begin under the names tset"), (["yesterday"] * 60, {"test": "2026-01-01"}, "cannot be read"), (None, {"test": "soon"}, "cannot be read")])
def test_times_that_cannot_be_used(times, begins, what):
    table = make_samples(10).assign(timestamp=times or pd.date_range("2026-01-01", periods=60, tz="Asia/Shanghai"))
    with pytest.raises(DataError, match=what):
        split_by_time(table, begins)


def test_times_with_a_zone_are_cut():
    table = make_samples(10).assign(timestamp=pd.date_range("2026-01-01", periods=60, tz="Asia/Shanghai"))
    assert (split_by_time(table, {"test": "2026-02-01"})["split"] == "test").sum() == 28


def test_times_are_no_texts():
    with pytest.raises(DataError, match="times, not texts"):
        check_samples(make_samples().assign(timestamp="10/1/2017"))


@given(st.integers(2, 7), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_folds_keep_clusters_whole(n_folds, seed):
    samples = make_samples(30)
    fold = assign_folds(samples, n_folds, seed=seed)
    assert set(fold) <= set(range(n_folds)) and pd.Series(fold).groupby(samples["query_id"]).nunique().max() == 1
    assert (assign_folds(samples.iloc[::-1], n_folds, seed=seed)[::-1] == fold).all()


def test_what_training_saw():
    samples = pd.DataFrame({"item_text": ["A b", "a  B", "c", "d"], "split": ["train", "test", "test", "test"]})
    assert unseen_items(samples).tolist() == [False, False, True, True] and share_of_titles_seen(samples) == pytest.approx(1 / 3)
    assert np.isnan(share_of_titles_seen(samples[samples["split"] == "train"]))


def test_query_ids_map_to_clusters():
    samples = make_samples(10)
    clusters = query_clusters(samples)
    assert list(clusters.index) == list(range(10)) and clusters.is_unique


# --- files


def test_a_file_is_whole_or_absent(tmp_path):
    def half(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a" / "x.txt", half)
    assert not list((tmp_path / "a").iterdir())
    assert write_whole(tmp_path / "a" / "x.txt", lambda path: path.write_text("whole")).read_text() == "whole"


def test_the_data_root_is_named_or_found(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOM_IMPORTANCE_DATA", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.setenv("ECOM_IMPORTANCE_DATA", str(tmp_path / "absent"))
    assert data_root() is None
