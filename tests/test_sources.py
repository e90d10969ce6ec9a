"""Adapters on small files in each source's exact format, and on the real files where they are; tables of one's own."""

import gzip
import json
from importlib import import_module

import numpy as np
import pandas as pd
import pytest

from ecom_importance.preprocessing import sources
from ecom_importance.preprocessing.sources import (SOURCES, complete_samples, list_sources, read_esci, read_event_log, read_home_depot, read_samples, read_ubi, read_wands,
                                                   split_trusted)
from ecom_importance.samples import BINARY, ESCI_KDD, ESCI_LINEAR, GAIN_MAPS, DataError, GradeScale, check_samples, check_splits, data_root

ROOT = data_root()
real = pytest.mark.skipif(ROOT is None, reason="the public data sets are not here (ECOM_IMPORTANCE_DATA)")


def ready(samples: pd.DataFrame) -> pd.DataFrame:
    "An adapter's table passes the check that every room relies on, once it has a split."
    return check_samples(samples if "split" in samples else samples.assign(split="train"))


# ---------------------------------------------------------------- the list


def test_every_listed_adapter_and_gain_map_exists():
    table = list_sources()
    assert list(table.index) == list(SOURCES) and table.index.is_unique
    for source in SOURCES.values():
        assert callable(getattr(import_module(f"ecom_importance.preprocessing.{source.room}"), source.adapter)), source.name
        assert source.gain_map in GAIN_MAPS
        assert source.licence and source.where and source.files


# ---------------------------------------------------------------- ESCI


@pytest.fixture
def esci(tmp_path):
    examples = pd.DataFrame({
        "example_id": range(6), "query": ["oat milk", "oat milk", "leche de avena", "オーツミルク", "oat milk", "oat milk"], "query_id": [7, 7, 8, 9, 7, 7],
        "product_id": ["P1", "P2", "P1", "P1", "P9", "P3"], "product_locale": ["us", "us", "es", "jp", "us", "us"], "esci_label": ["E", "C", "E", "E", "I", "S"],
        "small_version": [1, 1, 0, 1, 1, 0], "large_version": 1, "split": ["train", "train", "test", "train", "train", "train"]})
    products = pd.DataFrame({
        "product_id": ["P1", "P1", "P1", "P2", "P3"], "product_title": ["Oat drink", "Bebida de avena", "オーツ飲料", "Oat biscuits", "Soy drink"],
        "product_description": [None, "rica", None, None, None], "product_bullet_point": None, "product_brand": ["Haver", "Haver", None, "Crumb", " "],
        "product_color": None, "product_locale": ["us", "es", "jp", "us", "us"]})
    examples.to_parquet(tmp_path / "examples.parquet")
    products.to_parquet(tmp_path / "products.parquet")
    return tmp_path / "examples.parquet", tmp_path / "products.parquet"


def test_esci_joins_on_product_and_locale(esci):
    samples = read_esci(*esci)
    assert len(samples) == 5 and samples.attrs["left_out"] == {"items without text": 1}
    assert samples.set_index("locale").loc[["es", "jp"], "item_text"].tolist() == ["Bebida de avena", "オーツ飲料"]
    assert samples["gain"].tolist() == [1, 0.01, 1, 1, 0.1]
    assert samples["split"].tolist() == ["train", "train", "test", "train", "train"]
    ready(samples)


def test_esci_filters_and_fields(esci):
    assert set(read_esci(*esci, locale="us")["locale"]) == {"us"}
    assert read_esci(*esci, small_version=True)["sample_id"].tolist() == [0, 1, 3]
    assert read_esci(*esci, small_version=False)["sample_id"].tolist() == [2, 5]
    named = read_esci(*esci, item_fields=("product_title", "product_brand"), gain_map=ESCI_LINEAR)
    assert named["item_text"].tolist() == ["Oat drink, Haver", "Oat biscuits, Crumb", "Bebida de avena, Haver", "オーツ飲料", "Soy drink"]
    assert named["gain"].iloc[1] == pytest.approx(1 / 3)
    frames = read_esci(pd.read_parquet(esci[0]), pd.read_parquet(esci[1]))
    assert frames.equals(read_esci(*esci))


def test_esci_merged_copies_and_spelled_out_grades(tmp_path):
    pd.DataFrame({"query": ["a", "b"], "product_id": ["x", "y"], "locale": ["us", "jp"], "esci_label": ["Exact", "Irrelevant"], "product_title": ["t", "u"]}).to_csv(
        tmp_path / "merged.csv", index=False)
    samples = read_esci(tmp_path / "merged.csv")
    assert samples["label"].tolist() == ["E", "I"] and samples["query_id"].tolist() == ["us:a", "jp:b"] and samples["sample_id"].is_unique
    ready(samples)


def test_esci_refusals(esci, tmp_path):
    with pytest.raises(DataError, match="not a file of ESCI: the columns query, esci_label are missing.*shopping_queries_dataset_examples"):
        read_esci(esci[1], esci[0])
    with pytest.raises(DataError, match="product_title"):
        read_esci(esci[0])
    with pytest.raises(DataError, match="no row of ESCI is left"):
        read_esci(*esci, locale="fr")
    odd = pd.read_parquet(esci[0]).assign(esci_label="X")
    with pytest.raises(DataError, match="'X'"):
        read_esci(odd, esci[1])
    with pytest.raises(DataError, match="small_version"):
        read_esci(pd.read_parquet(esci[0]).drop(columns="small_version"), esci[1], small_version=True)


@real
def test_esci_real_counts():
    union = read_esci(ROOT / "esci_small_union.csv.gz")
    assert len(union) == 3_353 and len(read_esci(ROOT / "esci_small_us_titles.csv.gz")) == 2_409
    assert union["label"].value_counts().to_dict() == {"E": 2168, "S": 736, "I": 348, "C": 101}
    assert set(union["locale"]) == {"us", "jp", "es"}
    ready(union)


# ---------------------------------------------------------------- WANDS


@pytest.fixture
def wands(tmp_path):
    (tmp_path / "query.csv").write_text('query_id\tquery\tquery_class\n0\tsalón chair, 24"\tMassage Chairs\n1\tblue rug\tArea Rugs\n', encoding="utf-8")
    (tmp_path / "product.csv").write_text(
        "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\tproduct_features\trating_count\taverage_rating\treview_count\n"
        "0\toak stool , 29 ''\tBar Stools\tFurniture / Bar\ta stool\tmaterial : oak|height:29\t3.0\t4.5\t2.0\n1\twool rug\tArea Rugs\tRugs\t\t\t\t\t\n", encoding="utf-8")
    (tmp_path / "label.csv").write_text("id\tquery_id\tproduct_id\tlabel\n0\t0\t0\tPartial\n1\t1\t1\tExact\n2\t1\t0\tIrrelevant\n3\t7\t0\tExact\n4\t1\t9\tExact\n", encoding="utf-8")
    return tmp_path


def test_wands_reads_tabs_under_a_csv_name(wands):
    samples = read_wands(wands)
    assert samples["label"].tolist() == ["Partial", "Exact", "Irrelevant"] and samples["gain"].tolist() == [0.5, 1, 0]
    assert samples["query"].tolist() == ['salón chair, 24"', "blue rug", "blue rug"] and samples["item_text"][0] == "oak stool , 29 '', Bar Stools"
    assert samples.attrs["left_out"] == {"grades of unknown queries": 1, "items without text": 1}
    assert samples["item_id"].dtype.kind == "i"
    ready(samples)
    parts = read_wands(queries=wands / "query.csv", products=wands / "product.csv", labels=wands / "label.csv", item_fields=("product_name", "category hierarchy"))
    assert parts["item_text"][1] == "wool rug, Rugs"


def test_wands_refusals(wands):
    with pytest.raises(DataError, match="product_id, label are missing.*separated by tabs"):
        read_wands(wands, labels=wands / "query.csv")
    with pytest.raises(DataError, match="neither a folder nor all three"):
        read_wands(queries=wands / "query.csv")
    with pytest.raises(DataError, match="no such file"):
        read_wands(wands / "elsewhere")
    commas = wands / "commas.csv"
    commas.write_text("id,query_id,product_id,label\n0,0,0,Exact\n", encoding="utf-8")
    with pytest.raises(DataError, match="',' would give 4"):
        read_wands(wands, labels=commas)


# ---------------------------------------------------------------- Home Depot


def test_home_depot_format(tmp_path):
    train = tmp_path / "train.csv"
    train.write_bytes('"id","product_uid","product_title","search_term","relevance"\n2,100001,"Angle, 90°","angle bracket",2.33\n3,100002,"Deck paint","angle bracket",1\n'.encode("latin-1"))
    (tmp_path / "product_descriptions.csv").write_text('"product_uid","product_description"\n100001,"Made of steel"\n', encoding="utf-8")
    samples = read_home_depot(train, encoding="latin-1", descriptions=tmp_path / "product_descriptions.csv")
    assert samples["item_text"].tolist() == ["Angle, 90°. Made of steel", "Deck paint"]
    np.testing.assert_allclose(samples["gain"], [0.665, 0])
    assert samples["query_id"].tolist() == ["angle bracket"] * 2 and samples["sample_id"].tolist() == [2, 3]
    ready(samples)
    with pytest.raises(DataError, match="latin-1"):
        read_home_depot(train)


def test_home_depot_test_file_has_no_grades(tmp_path):
    (tmp_path / "test.csv").write_text('"id","product_uid","product_title","search_term"\n1,1,"a","b"\n', encoding="utf-8")
    with pytest.raises(DataError, match="relevance is missing.*train.csv"):
        read_home_depot(tmp_path / "test.csv")


@real
def test_home_depot_real_counts():
    samples = ready(read_home_depot(ROOT / "home_depot_train.csv.gz"))
    assert (len(samples), samples["query_id"].nunique(), samples["item_id"].nunique()) == (74_067, 11_795, 54_667)
    assert samples.groupby(["query", "item_text"])["label"].nunique().gt(1).sum() == 392
    assert samples["label"].between(1, 3).all() and samples["query_id"].value_counts().max() == 16


# ---------------------------------------------------------------- UBI

SHOP = {"A": "oat drink", "B": "oat drink barista", "C": "oat biscuits", "D": "rice drink", "E": "茶"}


def query_line(query_id, text, second=0, application="shop", hits=(), **more):
    return {"application": application, "query_id": query_id, "client_id": "c-1", "user_query": text, "query_response_hit_ids": list(hits),
            "query_attributes": {}, "timestamp": f"2026-03-01T10:00:{second:02d}.000Z"} | more


def event_line(action, query_id, item=None, place=None, second=0, application="shop", **more):
    attributes = {}
    if item is not None:
        attributes["object"] = {"object_id": item, "object_id_field": "sku"}
    if place is not None:
        attributes["position"] = {"ordinal": place}
    return {"application": application, "action_name": action, "query_id": query_id, "session_id": "s-1", "client_id": "c-1", "timestamp": f"2026-03-01T10:00:{second:02d}.000Z",
            "message_type": None, "message": None, "event_attributes": attributes} | more


def write_lines(path, lines, bulk=None):
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            if bulk:
                file.write(json.dumps({"index": {"_index": "ubi_events" if "action_name" in line else "ubi_queries", "_id": "1"}}) + "\n")
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def a_search():
    return [query_line("q1", "oat milk", hits=["A", "B", "C"]), event_line("impression", "q1", "A", 0, 1), event_line("impression", "q1", "B", 1, 1),
            event_line("impression", "q1", "C", 2, 1), event_line("click", "q1", "B", 1, 5), event_line("add_to_cart", "q1", "B", 1, 6),
            event_line("purchase", "q1", "B", None, 9), event_line("click", "q1", "A", 0, 7)]


@pytest.mark.parametrize("bulk", [True, False])
def test_ubi_one_sample_an_item_with_its_furthest_behaviour(tmp_path, bulk):
    samples = read_ubi(write_lines(tmp_path / "ubi.ndjson", a_search(), bulk), products=SHOP).set_index("item_id")
    assert samples["label"].to_dict() == {"A": "click", "B": "purchase", "C": "view"}
    assert samples["gain"].to_dict() == {"A": pytest.approx(1 / 3), "B": 1, "C": 0}
    assert samples["position"].to_dict() == {"A": 1, "B": 2, "C": 3}, "positions are counted from 1"
    assert set(samples["query"]) == {"oat milk"} and set(samples["user_id"]) == {"c-1"}
    assert samples.loc["B", "timestamp"] == pd.Timestamp("2026-03-01 10:00:01"), "the moment at which it was shown"
    ready(samples.reset_index())


def test_ubi_two_files_equal_one(tmp_path):
    lines = a_search()
    one = read_ubi(write_lines(tmp_path / "both.jsonl", lines, True), products=SHOP)
    asked = write_lines(tmp_path / "queries.jsonl", [line for line in lines if "action_name" not in line])
    done = write_lines(tmp_path / "events.jsonl", [line for line in lines if "action_name" in line])
    pd.testing.assert_frame_equal(one, read_ubi(asked, done, products=SHOP))


@pytest.mark.parametrize("name", ["dump.jsonl", "dump.jsonl.gz"])
def test_ubi_dumps_of_an_index(tmp_path, name):
    lines = a_search()
    bare = read_ubi(write_lines(tmp_path / "bare.jsonl", lines), products=SHOP)
    dumped = [{"_index": "ubi_events" if "action_name" in line else "ubi_queries", "_id": str(n), "_source": line} for n, line in enumerate(lines)]
    text = "".join(json.dumps(line) + "\n" for line in dumped)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    pd.testing.assert_frame_equal(bare, read_ubi(tmp_path / name, products=SHOP))


def test_ubi_positions_start_where_each_application_starts_them(tmp_path):
    lines = a_search() + [query_line("q2", "tea", application="app"), event_line("impression", "q2", "E", 1, 1, "app"), event_line("impression", "q2", "D", 2, 1, "app")]
    samples = read_ubi(write_lines(tmp_path / "ubi.ndjson", lines), products=SHOP)
    assert samples.loc[samples["query_id"] == "q2", "position"].tolist() == [1, 2]
    assert samples.loc[samples["query_id"] == "q1", "position"].min() == 1


def test_ubi_without_positions_or_impressions(tmp_path):
    lines = [query_line("q1", "oat milk", hits=["A", "B"]), event_line("click", "q1", "B", None, 5)]
    path = write_lines(tmp_path / "ubi.ndjson", lines)
    bare = read_ubi(path, products=SHOP)
    assert bare["label"].tolist() == ["click"] and "position" not in bare
    ready(bare)
    seen = read_ubi(path, products=SHOP, hits_as_views=True).set_index("item_id")
    assert seen["label"].to_dict() == {"A": "view", "B": "click"} and seen["position"].to_dict() == {"A": 1, "B": 2}


def test_ubi_hits_do_not_replace_impressions(tmp_path):
    lines = [query_line("q1", "oat milk", hits=["A", "B", "C"]), event_line("impression", "q1", "B", 1, 1)]
    samples = read_ubi(write_lines(tmp_path / "ubi.ndjson", lines), products=SHOP, hits_as_views=True)
    assert samples["item_id"].tolist() == ["B"]


def test_ubi_what_is_left_out_is_counted(tmp_path):
    lines = a_search() + [event_line("brand_filter", "q1", "F", 3), event_line("brand_filter", "q1", "F", 3), event_line("click", "lost", "A", 1), event_line("click", "q1")]
    samples = read_ubi(write_lines(tmp_path / "ubi.ndjson", lines), products=SHOP)
    assert samples.attrs["left_out"] == {"events of action brand_filter": 2, "events without object_id or query_id": 1, "events whose query has no text": 1}
    with_filter = read_ubi(write_lines(tmp_path / "more.ndjson", lines), products=SHOP | {"F": "a brand"}, actions={**sources.UBI_ACTIONS, "brand_filter": "click"})
    assert "F" in set(with_filter["item_id"])


def test_ubi_texts_of_reused_query_ids_and_two_kinds_of_times(tmp_path):
    lines = [query_line("q1", "oat", 1), query_line("q1", "oat milk", 2), event_line("click", "q1", "A", 1, 3),
             query_line("q2", "te", 1), event_line("click", "q2", "E", 1, timestamp=1772359205000, user_query="tea")]
    samples = read_ubi(write_lines(tmp_path / "ubi.ndjson", lines), products=SHOP).set_index("query_id")
    assert samples["query"].to_dict() == {"q1": "oat milk", "q2": "tea"}
    assert samples.loc["q2", "timestamp"] == pd.Timestamp("2026-03-01 10:00:05")


def test_ubi_reads_attributes_of_very_different_events(tmp_path):
    lines = a_search()
    for at in range(40):  # many kinds of detail make the reader's type of `object` a map
        lines.append(event_line("page_exit", "q1", second=10) | {"event_attributes": {"object": {f"detail_{at}": {"a": at}, f"flag_{at}": True, f"list_{at}": [at]}}})
    lines.append(event_line("purchase", "q1", "0012", None, 30))
    samples = read_ubi(write_lines(tmp_path / "ubi.ndjson", lines), products=SHOP | {"0012": "jam"}).set_index("item_id")
    assert samples["label"].to_dict() == {"A": "click", "B": "purchase", "C": "view", "0012": "purchase"} and samples.loc["C", "position"] == 3


def test_ubi_texts_come_from_products_then_description_and_never_silently_from_ids(tmp_path):
    lines = a_search()
    lines[2]["event_attributes"]["object"]["description"] = "described B"
    path = write_lines(tmp_path / "ubi.ndjson", lines)
    with pytest.raises(DataError, match="2 of 3 items of UBI have no text.*without_text='id'"):
        read_ubi(path)
    assert read_ubi(path, without_text="drop")["item_text"].tolist() == ["described B"]
    assert read_ubi(path, without_text="id").set_index("item_id")["item_text"].to_dict() == {"A": "A", "B": "described B", "C": "C"}
    assert read_ubi(path, products=pd.DataFrame({"item_id": ["A", "B", "C"], "item_text": ["a", "b", "c"]}))["item_text"].tolist() == ["a", "b", "c"]
    with pytest.raises(DataError, match="'refuse', 'drop' or 'id'"):
        read_ubi(path, without_text="ids")


def test_ubi_warns_when_numbers_stand_for_texts(tmp_path, caplog):
    read_ubi(write_lines(tmp_path / "ubi.ndjson", a_search()), without_text="id")
    assert "3 items have no text" in caplog.text


def test_ubi_judgments_are_the_trusted_rows(tmp_path):
    told = {"name": "j", "type": "IMPORT_JUDGMENT", "judgmentRatings": [{"query": "oat milk", "ratings": [{"docId": "A", "rating": "100.000"}, {"docId": "C", "rating": "1.000"}]},
                                                                        {"query": "茶", "ratings": [{"docId": "E", "rating": 10}]}]}
    (tmp_path / "judgments.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    path = write_lines(tmp_path / "ubi.ndjson", a_search())
    samples = ready(read_ubi(path, judgments=tmp_path / "judgments.json", products=SHOP))
    judged = samples[samples["split"] == "test"]
    assert judged["gain"].tolist() == [1, 0.01, 0.1] and judged["label"].tolist()[0] == "100.000"
    assert (samples["split"] == "train").sum() == 3
    samples.to_parquet(tmp_path / "samples.parquet")  # words and ratings in one column are all text
    flat = pd.DataFrame({"query": ["tea"], "docId": ["E"], "rating": [2]})
    scaled = read_ubi(path, judgments=flat, products=SHOP, ratings=GradeScale("0_3", 0, 3))
    assert scaled.loc[scaled["split"] == "test", "gain"].item() == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="off the scale"):
        read_ubi(path, judgments=flat.assign(rating=101), products=SHOP)
    (tmp_path / "judgments.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="not a judgment list"):
        read_ubi(path, judgments=tmp_path / "judgments.json", products=SHOP)


def test_ubi_wrong_files(tmp_path):
    (tmp_path / "log.csv").write_text("user,item\n1,2\n", encoding="utf-8")
    with pytest.raises(DataError, match="query_id, user_query are missing"):
        read_ubi(tmp_path / "log.csv")
    asked = write_lines(tmp_path / "queries.jsonl", [query_line("q1", "oat milk")])
    with pytest.raises(DataError, match="action_name is missing.*ubi_events"):
        read_ubi(asked, asked, products=SHOP)
    events = write_lines(tmp_path / "events.jsonl", [event_line("search", "q1")])
    with pytest.raises(DataError, match="no row of UBI is left.*events of action search"):
        read_ubi(asked, events, products=SHOP)


@real
def test_ubi_real_counts():
    samples = read_ubi(ROOT / "esci_ubi" / "ubi_queries_events.ndjson", judgments=ROOT / "esci_ubi" / "esci_us_judgments.json", without_text="id")
    judged, logged = samples[samples["split"] == "test"], samples[samples["split"] == "train"]
    assert (len(judged), judged["query"].nunique()) == (6_678, 150)
    assert judged["gain"].value_counts().to_dict() == {1.0: 3389, 0.1: 1898, 0.0: 1086, 0.01: 305}
    assert logged["label"].value_counts().to_dict() == {"view": 1768, "cart": 126, "click": 60}
    assert logged["position"].between(1, 20).all()
    ready(samples)
    actions = sum(count for reason, count in samples.attrs["left_out"].items() if reason.startswith("events of action"))
    assert actions == 506 + 86 + 62 + 62 + 61 + 59 + 54 + 11 + 5 + 2 + 1
    assert len(logged) < 3_446 - actions, "several events make one sample"


# ---------------------------------------------------------------- a log and its judgments


def test_split_trusted_takes_training_rows_of_trusted_queries_away():
    rng = np.random.default_rng(0)
    log = pd.DataFrame({"query": [f"word{n % 60} thing" for n in range(600)], "item_id": rng.integers(0, 300, 600), "split": "train"})
    judged = pd.DataFrame({"query": np.repeat([f"thing word{n}" for n in range(30)], 5), "item_id": rng.integers(0, 300, 150), "split": "test"})
    samples = pd.concat([log, judged], ignore_index=True)
    samples["query_id"] = samples["split"] + samples["query"]
    parts = split_trusted(samples, {"valid": 8, "select": 7, "test": None})
    check_splits(parts)
    assert (parts["split"] == "train").sum() == 300 and parts.attrs["left_out"]["training rows of trusted queries"] == 300
    assert parts.groupby("split")["query_id"].nunique().to_dict() == {"train": 30, "valid": 8, "select": 7, "test": 15}
    with pytest.raises(DataError, match="valid, select and test"):
        split_trusted(samples, {"train": None, "test": 3})
    with pytest.raises(DataError, match="0 of 600 rows are trusted"):
        split_trusted(log.assign(query_id=log["query"]), {"valid": 1, "test": None})
    with pytest.raises(DataError, match="every training row"):
        split_trusted(pd.concat([judged.assign(split="train"), judged]).assign(query_id=lambda rows: rows["query"]), {"valid": 1, "test": None})


def test_split_trusted_mends_an_official_split(esci):
    samples = read_esci(*esci)
    samples.loc[samples["locale"] == "jp", "split"] = "test"
    parts = split_trusted(samples, {"valid": 1, "test": None})
    assert sorted(parts["split"].unique()) == ["test", "train", "valid"]
    ready(parts)


# ---------------------------------------------------------------- generic logs

COLUMNS = {"visitor": "user_id", "kw": "query", "sku": "item_id", "event": "behaviour", "ts": "timestamp", "rank": "position"}
WORDS = {"expose": "view", "pv": "click", "buy": "purchase"}


def visits():
    return pd.DataFrame([("v1", "oat milk", "A", "expose", "2026-03-01 10:00", 1), ("v1", "oat milk", "B", "expose", "2026-03-01 10:00", 2), ("v1", "Oat  milk", "B", "buy", "2026-03-01 10:29", 2),
                         ("v1", "oat milk", "A", "pv", "2026-03-01 11:30", 1), ("v2", "oat milk", "A", "pv", "2026-03-01 10:00", 1)],
                        columns=["visitor", "kw", "sku", "event", "ts", "rank"])


def test_event_log_occurrences_end_with_a_pause(tmp_path):
    visits().to_csv(tmp_path / "log.csv.gz", index=False)
    samples = read_event_log(tmp_path / "log.csv.gz", columns=COLUMNS, behaviours=WORDS, products=SHOP)
    assert samples["query_id"].nunique() == 3
    first = samples[samples["query_id"] == samples["query_id"].iloc[0]].set_index("item_id")
    assert first["label"].to_dict() == {"A": "view", "B": "purchase"} and first["position"].to_dict() == {"A": 1, "B": 2}
    assert list(samples)[3:5] == ["item_id", "item_text"]
    ready(samples)
    together = read_event_log(visits(), columns=COLUMNS, behaviours=WORDS, products=SHOP, gap="2h")
    assert together["query_id"].nunique() == 2
    visits().assign(ts=[1_772_359_200_000, 1_772_359_200_000, 1_772_359_260_000, 1_772_359_200_000 + 3_600_000, 1_772_359_200_000]).to_csv(tmp_path / "epochs.tsv", sep="\t", index=False)
    epochs = read_event_log(tmp_path / "epochs.tsv", columns=COLUMNS, behaviours=WORDS, products=SHOP, types={"timestamp": "epoch_ms"})
    assert epochs["query_id"].nunique() == 3 and epochs["timestamp"].min() == pd.Timestamp("2026-03-01 10:00")
    nobody = read_event_log(visits(), columns={"kw": "query", "sku": "item_id", "event": "behaviour"}, behaviours=WORDS, products=SHOP)
    assert nobody["query_id"].nunique() == 1 and nobody.set_index("item_id")["label"].to_dict() == {"A": "click", "B": "purchase"}
    nameless = {name: ours for name, ours in COLUMNS.items() if ours not in ("user_id", "session_id")}
    assert read_event_log(visits(), columns=nameless, behaviours=WORDS, products=SHOP)["query_id"].nunique() == 1  # times alone part nothing
    timeless = {name: ours for name, ours in COLUMNS.items() if ours != "timestamp"}
    assert read_event_log(visits(), columns=timeless, behaviours=WORDS, products=SHOP)["query_id"].nunique() == 2  # one a user


def test_event_log_does_not_depend_on_the_order_of_rows():
    told = {"columns": COLUMNS, "behaviours": WORDS, "products": SHOP}
    one = read_event_log(visits(), **told).set_index("sample_id").sort_index()
    other = read_event_log(visits().sample(frac=1, random_state=1), **told).set_index("sample_id").sort_index()
    pd.testing.assert_frame_equal(one, other, check_like=True)


def test_event_log_sessions_first_then_users():
    table = visits().assign(session=["s1", "s2", None, None, None], visitor=["v1", "v1", "v1", "v2", None])
    samples = read_event_log(table, columns=COLUMNS | {"session": "session_id"}, behaviours=WORDS, products=SHOP)
    assert samples["query_id"].str.split("|").str[0].tolist().count("s1") == 1 and set(samples["query_id"].str.split("|").str[0]) == {"s1", "s2", "v1", "v2", ""}


def test_event_log_with_its_own_query_ids_and_texts():
    table = visits().assign(qid=["x", "x", "x", "x", None], title="a title")
    samples = read_event_log(table, columns=COLUMNS | {"qid": "query_id", "title": "item_text"}, behaviours=WORDS)
    assert samples["query_id"].unique().tolist() == ["x"] and samples.attrs["left_out"] == {"events without a query_id": 1}
    assert set(samples["item_text"]) == {"a title"}


def test_event_log_refusals():
    told = {"columns": COLUMNS, "products": SHOP}
    with pytest.raises(DataError, match="labels are not in gain map 'BEHAVIOUR': 'expose'"):
        read_event_log(visits(), **told)
    with pytest.raises(DataError, match="does not name: 'buy'"):
        read_event_log(visits(), behaviours={"expose": "view", "pv": "click"}, **told)
    with pytest.raises(DataError, match="nothing is mapped to query"):
        read_event_log(visits(), columns={"sku": "item_id", "event": "behaviour"})
    with pytest.raises(DataError, match="shade is no column of an event"):
        read_event_log(visits(), columns=COLUMNS | {"rank": "shade"})
    with pytest.raises(DataError, match="the columns keyword, code are missing"):
        read_event_log(visits(), columns={"keyword": "query", "code": "item_id", "event": "behaviour"})
    with pytest.raises(DataError, match="have no text"):
        read_event_log(visits(), columns=COLUMNS, behaviours=WORDS)


# ---------------------------------------------------------------- a table of one's own


def own_table() -> pd.DataFrame:
    return pd.DataFrame({"query": ["mixer tap", "mixer tap", "水龙头"], "item_text": ["Chrome mixer tap", "Garden hose", "厨房水龙头"], "label": [1, 0, 1]})


def test_columns_are_renamed_and_ids_derived(tmp_path):
    own_table().rename(columns={"query": "search_term", "item_text": "title", "label": "relevance"}).to_csv(tmp_path / "log.tsv", sep="\t", index=False)
    samples = read_samples(tmp_path / "log.tsv", gain_map="BINARY", columns={"search_term": "query", "title": "item_text", "relevance": "label"})
    assert samples["query_id"].nunique() == 2 and samples["item_id"].is_unique and set(samples["split"]) == {"train"} and samples["sample_id"].tolist() == [0, 1, 2]
    assert samples["gain"].tolist() == [1, 0, 1]


def test_what_the_table_says_itself_is_kept(tmp_path):
    told = own_table().assign(sample_id=["a", "b", "c"], query_id=[7, 7, 8], item_id=[1, 2, 3], split=["train", "valid", "test"], gain=[0.25, 0.5, 1.0], user_id=[1, 1, 2])
    told.to_parquet(tmp_path / "told.parquet")
    samples = read_samples(tmp_path / "told.parquet")
    pd.testing.assert_frame_equal(samples[told.columns], told.astype(samples[told.columns].dtypes))
    assert read_samples(tmp_path / "told.parquet", gain_map="BINARY")["gain"].tolist() == [1, 0, 1], "a map that was asked for counts"


def test_trusted_rows_of_a_second_file_are_valid_whatever_it_says(tmp_path):
    own_table().to_parquet(tmp_path / "log.parquet")
    own_table().assign(split="test").to_parquet(tmp_path / "judged.parquet")
    samples = read_samples(tmp_path / "log.parquet", tmp_path / "judged.parquet", gain_map="BINARY")
    assert samples["split"].value_counts().to_dict() == {"train": 3, "valid": 3} and samples["sample_id"].is_unique
    assert set(samples.loc[samples["split"] == "valid", "sample_id"]) == {f"valid-{row}" for row in range(3)}


def test_trusted_rows_may_have_our_names_already(tmp_path):
    own_table().rename(columns={"query": "search_term"}).to_csv(tmp_path / "log.csv", index=False)
    own_table().to_csv(tmp_path / "judged.csv", index=False)
    told = {"gain_map": "BINARY", "columns": {"search_term": "query"}}
    assert len(read_samples(tmp_path / "log.csv", tmp_path / "judged.csv", **told)) == 6
    with pytest.raises(DataError, match="judged.csv: there is no column 'search_term'"):
        read_samples(tmp_path / "judged.csv", tmp_path / "log.csv", **told)


def test_two_columns_do_not_become_one(tmp_path):
    own_table().assign(title="a title").to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(DataError, match="item_text, title would all be 'item_text'"):
        read_samples(tmp_path / "log.csv", gain_map="BINARY", columns={"title": "item_text"})


def test_gains_without_labels_are_their_own_labels(tmp_path):
    own_table().drop(columns="label").assign(gain=[1.0, 0.5, 0.0]).to_csv(tmp_path / "gains.csv", index=False)
    assert read_samples(tmp_path / "gains.csv")["label"].tolist() == ["1.0", "0.5", "0.0"]


def test_completing_a_table_leaves_the_original_alone():
    table = own_table()
    before = table.copy()
    complete_samples(table, gain_map=BINARY)
    pd.testing.assert_frame_equal(table, before)


def test_a_table_of_ones_own_is_refused_with_the_nearest_name(tmp_path):
    own_table().to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(DataError, match="x.csv: there is no column 'item_text'; found query, label.*columns=.*--columns THEIRS=item_text"):
        complete_samples(own_table().drop(columns="item_text"), gain_map=BINARY, file="x.csv")
    with pytest.raises(DataError, match="neither a label nor a gain"):
        complete_samples(own_table().drop(columns="label"))
    with pytest.raises(DataError, match="x.csv, column 'label': labels need a gain map.*BINARY.*--gain-map"):
        read_samples(tmp_path / "x.csv")
    with pytest.raises(DataError, match="unknown gain map 'BINARI'.*did you mean 'BINARY'"):
        read_samples(tmp_path / "x.csv", gain_map="BINARI")
    with pytest.raises(DataError, match="x.csv: there is no column 'item_txt' to rename.*did you mean 'item_text'"):
        read_samples(tmp_path / "x.csv", gain_map="BINARY", columns={"item_txt": "item_text"})
    with pytest.raises(DataError, match="choose one of these"):
        read_samples(tmp_path / "x.csv", gain_map="ZZZ")
    with pytest.raises(DataError, match="not in gain map 'ESCI_KDD'"):
        read_samples(tmp_path / "x.csv", gain_map=ESCI_KDD.name)
    with pytest.raises(DataError, match="x.csv"):
        read_samples(tmp_path / "y.csv", gain_map="BINARY")
