"""Planted noise: the rate, the ledger, what may not be touched, and what happens when a rate is out of reach."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecom_importance.preprocessing.cleaning import drop_bots, flag_bots, measure_sessions
from ecom_importance.preprocessing.demo import load_demo
from ecom_importance.preprocessing.noise import (
    BURST_CLICKS, NOISE, add_foreign_items, choose_items, choose_queries, choose_rows, confusion_matrix, count_noise, find_foreign_items, find_grades, find_still_sold,
    list_noise, make_near_duplicate, neighbour_confusion, order_visits, plant, plant_mixture, propose_cascade_bias, propose_position_bias, propose_stale_items, propose_trust_bias,
    text_match, true_gains)
from ecom_importance.samples import BINARY, ESCI_KDD, ESCI_LINEAR, GRADES_1_3, DataError, check_samples, stable_hash, tokens

KINDS = list(NOISE)
ADDING = [kind for kind in KINDS if NOISE[kind].adds]
PLACED = [kind for kind in KINDS if NOISE[kind].positions]
UP = ["trust_bias", "accidental_click", "bot_burst"]
WORDS = [np.array(theme.split()) for theme in (
    "red kettle steel cup pan 水杯 lid spout", "lamp bulb shade lantern 台灯 switch dimmer", "chair desk shelf stool 书桌 drawer oak", "shoe boot sandal 跑鞋 lace sole",
    "shirt coat scarf glove 外套 sleeve", "drill saw hammer screw 电钻 nail", "novel atlas comic diary 词典 poem", "ball racket net 球拍 glider sled", "soap towel brush comb 毛巾 mirror")]


def make_samples(labels, gain_map, n_items=8, seed=0, positions=True, ints=False) -> pd.DataFrame:
    labels = pd.Series(labels)
    rng = np.random.default_rng(seed)
    n = len(labels)
    query = np.arange(n) // n_items
    table = {"sample_id": np.arange(n) if ints else [f"s{i}" for i in range(n)], "query_id": query if ints else [f"q{q}" for q in query],
             "query": [f"query {q}" for q in query], "item_id": np.arange(n) if ints else [f"i{i}" for i in range(n)],
             "item_text": [" ".join(rng.choice(WORDS[q % len(WORDS)], rng.integers(1, 7))) for q in query], "label": labels, "gain": gain_map(labels),
             "split": np.where(query % 5 == 0, "valid", np.where(query % 7 == 1, "test", "train"))}
    if positions:
        table["position"] = np.arange(n) % n_items + 1
    return check_samples(pd.DataFrame(table))


def esci(n=1600, seed=0, **kwargs) -> pd.DataFrame:
    return make_samples(np.random.default_rng(seed).choice(list("ESCI"), n, p=[0.35, 0.2, 0.15, 0.3]), ESCI_LINEAR, seed=seed, **kwargs)


def wrong_share(before: pd.DataFrame, after: pd.DataFrame) -> float:
    "Counted from the tables, not from the ledger: rows that are new are wrong, and stale rows are true at 0."
    train = after[after["split"] == "train"].set_index("sample_id")
    truth = before.set_index("sample_id")["gain"].reindex(train.index).mask(train["noise"] == "stale_item", 0.0)
    return float((train["gain"] != truth).mean())


def true_before(clean: pd.DataFrame, ledger: pd.DataFrame) -> np.ndarray:
    "What was true of each row of a ledger, by its kind alone."
    gain = clean.set_index("sample_id")["gain"]
    return np.array([0.0 if kind in ("stale_item", "wrong_category") else gain[str(name).removesuffix("-dup") if kind == "duplicate_conflict" else name]
                     for name, kind in ledger["kind"].items()])


def add_people(samples: pd.DataFrame, seed: int = 0, zone: str | None = None) -> pd.DataFrame:
    "A user and a time for each list, its rows ten seconds apart."
    rng, lists = np.random.default_rng(seed), samples["query_id"].unique()
    begin = pd.Series(pd.Timestamp("2024-03-01", tz=zone) + pd.to_timedelta(rng.integers(0, 20 * 86400, len(lists)), unit="s"), index=lists)
    user = pd.Series(rng.integers(1, len(lists), len(lists)), index=lists)
    moment = samples["query_id"].map(begin) + pd.to_timedelta(10 * samples.groupby("query_id").cumcount(), unit="s")
    return samples.assign(user_id=samples["query_id"].map(user), timestamp=moment)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.4])
def test_the_rate_is_the_share_of_wrong_training_rows(kind, rate):
    clean = esci()
    planted, ledger = plant(clean, kind, rate, seed=4)
    n = int((planted["split"] == "train").sum())
    slack = max(0.01, 8 / n if kind == "whole_query" else 1 / n)
    assert abs(wrong_share(clean, planted) - rate) <= slack
    assert ledger.attrs["realised"] == pytest.approx(wrong_share(clean, planted))
    assert ledger.attrs["requested"] == rate and ledger.attrs["kind"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_is_the_difference_of_the_tables(kind):
    clean = esci(seed=1)
    planted, ledger = plant(clean, kind, 0.2, seed=0)
    assert list(ledger.columns) == ["kind", "gain_before", "gain_after"] and ledger.index.name == "sample_id" and ledger.index.is_unique
    assert set(ledger["kind"]) == {kind}
    after = planted.set_index("sample_id")
    assert set(after.index[after["noise"] == kind]) == set(ledger.index)
    assert set(after["noise"]) == {"", kind}
    pd.testing.assert_series_equal(after["gain"].reindex(ledger.index), ledger["gain_after"], check_names=False)
    np.testing.assert_allclose(true_before(clean, ledger), ledger["gain_before"].to_numpy())
    assert (ledger["gain_before"] != ledger["gain_after"]).all()
    check_samples(planted)


@pytest.mark.parametrize("kind", KINDS)
def test_only_training_rows_are_touched(kind):
    clean = esci(seed=2)
    planted, ledger = plant(clean, kind, 0.3, seed=0)
    trusted = planted[planted["split"] != "train"].reset_index(drop=True)
    pd.testing.assert_frame_equal(trusted[clean.columns], clean[clean["split"] != "train"].reset_index(drop=True))
    assert (trusted["noise"] == "").all()
    untouched = planted[(planted["split"] == "train") & (planted["noise"] == "")].set_index("sample_id")
    pd.testing.assert_frame_equal(untouched[["label", "gain", "item_text"]], clean.set_index("sample_id").loc[untouched.index, ["label", "gain", "item_text"]])


@pytest.mark.parametrize("kind", KINDS)
def test_row_order_does_not_matter_and_rates_are_nested(kind):
    clean = esci(seed=3)
    low = plant(clean, kind, 0.1, seed=7)[1]
    pd.testing.assert_frame_equal(low.sort_index(), plant(clean.sample(frac=1, random_state=1), kind, 0.1, seed=7)[1].sort_index())
    assert set(low.index) <= set(plant(clean, kind, 0.25, seed=7)[1].index)
    assert set(low.index) != set(plant(clean, kind, 0.1, seed=8)[1].index)


@pytest.mark.parametrize("kind", KINDS)
def test_rate_zero_does_nothing(kind):
    clean = esci(n=80)
    planted, ledger = plant(clean, kind, 0, seed=0)
    pd.testing.assert_frame_equal(planted[clean.columns], clean)
    assert (planted["noise"] == "").all() and ledger.empty and ledger.attrs["realised"] == 0
    assert list(ledger.columns) == ["kind", "gain_before", "gain_after"]


@pytest.mark.parametrize("kind", KINDS)
def test_integer_ids_and_missing_positions(kind):
    clean = esci(n=400, ints=True, positions=False)
    planted, ledger = plant(clean, kind, 0.1, seed=0)
    assert planted["sample_id"].dtype == clean["sample_id"].dtype and planted["item_id"].dtype == clean["item_id"].dtype
    assert planted["sample_id"].is_unique and len(ledger)
    assert ("position" in planted) == (kind in PLACED)


def test_the_samples_given_are_not_changed():
    clean = esci(n=200)
    before = clean.copy(deep=True)
    for kind in KINDS:
        plant(clean, kind, 0.2)
    pd.testing.assert_frame_equal(clean, before)


def test_flip_is_one_minus_gain_and_labels_follow_on_a_scale():
    grades = np.random.default_rng(0).choice([1, 1.33, 1.67, 2, 2.33, 2.67, 3], 800)
    clean = make_samples(grades, GRADES_1_3)
    planted, ledger = plant(clean, "flip", 0.3)
    np.testing.assert_allclose(ledger["gain_after"], 1 - ledger["gain_before"])
    np.testing.assert_allclose(GRADES_1_3(planted["label"]), planted["gain"], atol=1e-6)
    assert (ledger["gain_before"] != 0.5).all()


def test_integer_labels_stay_integers():
    clean = make_samples(np.random.default_rng(0).integers(0, 2, 400), BINARY)
    planted, _ = plant(clean, "flip", 0.3)
    assert planted["label"].dtype == clean["label"].dtype
    np.testing.assert_allclose(BINARY(planted["label"]), planted["gain"])


@pytest.mark.parametrize("labels, gain_map", [
    (np.random.default_rng(0).choice(list("ESCI"), 1200, p=[0.3, 0.3, 0.2, 0.2]), ESCI_KDD),
    (np.random.default_rng(0).choice([1, 1.33, 1.67, 2, 2.33, 2.67, 3], 1200), GRADES_1_3),
])
def test_confusion_moves_to_a_neighbouring_grade_that_is_valid(labels, gain_map):
    clean = make_samples(labels, gain_map)
    planted, ledger = plant(clean, "grade_confusion", 0.2)
    np.testing.assert_allclose(gain_map(planted["label"]), planted["gain"], atol=1e-6)
    grades = find_grades(clean.loc[clean["split"] == "train", "gain"].to_numpy())
    place = lambda gains: np.abs(np.asarray(gains)[:, None] - grades).argmin(axis=1)
    assert (np.abs(place(ledger["gain_before"]) - place(ledger["gain_after"])) == 1).all()


def test_confusion_follows_the_annotators_matrix():
    clean = esci(n=16000, seed=5)
    planted, _ = plant(clean, "grade_confusion", 0.2)
    shares = clean.loc[clean["split"] == "train", "gain"].round(4).value_counts(normalize=True).sort_index().to_numpy()
    severity = 0.2 / (shares * np.array([0.5, 1, 1, 0.5])).sum()
    wanted = (1 - severity) * np.eye(4) + severity * neighbour_confusion(4)
    np.testing.assert_allclose(confusion_matrix(clean, planted).to_numpy(), wanted, atol=0.03)


def test_rare_averages_are_no_grades_of_their_own():
    gain = np.array([0.0] * 500 + [0.5] * 500 + [1.0] * 500 + [0.613] * 3)
    np.testing.assert_allclose(find_grades(gain), [0, 0.5, 1])


def test_position_bias_follows_the_click_model():
    clean = esci(n=24000, seed=6)
    planted, ledger = plant(clean, "position_bias", 0.1)
    rows = planted.set_index("sample_id").loc[ledger.index]
    truth = clean.set_index("sample_id").loc[ledger.index, "gain"]
    assert set(ledger["gain_after"]) == {0.0, 1.0}
    assert ((truth >= 0.5) == (ledger["gain_after"] == 0)).all()
    train = clean[clean["split"] == "train"]
    for position in (1, 2, 8):  # the share of wrong rows by position, over the whole, is the model's
        odds = propose_position_bias(train).odds
        here = (train["position"] == position).to_numpy()
        wanted = odds[here].sum() / odds.sum()
        assert (rows["position"] == position).mean() == pytest.approx(wanted, abs=0.03)
    # An exact item in the first place is always seen, and so never wrong.
    assert not ((rows["position"] == 1) & (truth == 1.0)).any()


def test_accidental_clicks_hit_irrelevant_items_only():
    _, ledger = plant(esci(), "accidental_click", 0.2)
    assert (ledger["gain_before"] < 0.5).all() and (ledger["gain_after"] == 1).all()


def test_whole_queries_are_wrong_as_wholes():
    clean = esci(n=4000, seed=8)
    planted, ledger = plant(clean, "whole_query", 0.2)
    hit = planted.loc[planted["noise"] != "", "query_id"].unique()
    rows = planted[planted["query_id"].isin(hit)]
    kept = rows[rows["noise"] == ""].set_index("sample_id")["gain"]
    # What is not noise in a spoilt query came out right by chance.
    np.testing.assert_allclose(kept, clean.set_index("sample_id")["gain"][kept.index])
    inverted = borrowed = 0
    for _, group in rows.groupby("query_id"):
        truth = clean.set_index("sample_id")["gain"][group["sample_id"]].to_numpy()
        if np.allclose(group["gain"], 1 - truth):
            inverted += 1
        else:
            borrowed += 1
    assert inverted > 0.3 * len(hit) and borrowed > 0.3 * len(hit)


def test_borrowed_labels_are_another_querys():
    # Each query has one gain of its own, so a borrowed label shows where it comes from.
    levels = {f"g{i}": i / 50 for i in range(50)}
    from ecom_importance.samples import GainMap
    clean = make_samples(np.repeat(list(levels), 8), GainMap("LEVELS", levels))
    _, ledger = plant(clean, "whole_query", 0.5)
    after = ledger["gain_after"].round(9)
    borrowed = after[(after - (1 - ledger["gain_before"])).abs() > 1e-6]
    train_levels = set(clean.loc[clean["split"] == "train", "gain"].round(9))
    assert len(borrowed) and set(borrowed) <= train_levels


def test_duplicates_are_near_opposite_and_added():
    clean = esci(n=800)
    planted, ledger = plant(clean, "duplicate_conflict", 0.2)
    added = planted[planted["noise"] != ""].set_index("sample_id")
    assert len(planted) == len(clean) + len(ledger) and not set(added["item_id"]) & set(clean["item_id"])
    originals = clean.set_index("sample_id").loc[[name.removesuffix("-dup") for name in added.index]]
    np.testing.assert_allclose(added["gain"], 1 - originals["gain"].to_numpy())
    assert (added["item_text"].to_numpy() != originals["item_text"].to_numpy()).all()
    assert (added["query_id"].to_numpy() == originals["query_id"].to_numpy()).all()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.text(min_size=1).filter(lambda text: text.strip()), st.lists(st.sampled_from("red blue 水杯 lamp desk".split()), min_size=1, max_size=9).map(" ".join)), st.floats(0, 1, exclude_max=True))
def test_a_near_duplicate_differs_and_is_near(text, draw):
    again = make_near_duplicate(text, draw)
    assert again.strip() and again != text
    a, b = tokens(text), tokens(again)
    if a:
        assert len(a & b) >= 0.5 * len(a | b)


@pytest.mark.parametrize("title", ["不锈钢保温杯", "儿童书桌 可升降", "杯", "kettle", "a b"])
def test_near_duplicates_of_short_and_chinese_titles(title):
    assert make_near_duplicate(title, 0.9) != title


def test_an_unreachable_rate_says_the_highest():
    clean = make_samples(["E"] * 760 + ["I"] * 40, ESCI_LINEAR)
    with pytest.raises(DataError, match="at most") as error:
        plant(clean, "accidental_click", 0.4)
    highest = float(str(error.value).split("at most ")[1].split("%")[0]) / 100
    reachable = int((clean["split"] == "train").sum() * highest) / int((clean["split"] == "train").sum())
    planted, _ = plant(clean, "accidental_click", reachable)
    assert wrong_share(clean, planted) == pytest.approx(reachable, abs=0.01)
    with pytest.raises(DataError, match="at most"):
        plant(clean, "accidental_click", highest + 0.01)
    with pytest.raises(DataError, match="at most 50"):
        plant(esci(), "duplicate_conflict", 0.6)


def test_no_opposite_label_known_is_an_error():
    clean = make_samples(["E"] * 80, ESCI_LINEAR)
    with pytest.raises(DataError, match="no label near"):
        plant(clean, "flip", 0.1)
    with pytest.raises(DataError, match="at most 0"):
        plant(clean, "grade_confusion", 0.1)


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_rates_outside_are_refused(rate):
    with pytest.raises(DataError, match="rate"):
        plant(esci(n=80), "flip", rate)


def test_unknown_kind_and_no_training_rows():
    with pytest.raises(DataError, match="flip"):
        plant(esci(n=80), "flipp", 0.1)
    with pytest.raises(DataError, match="no training rows"):
        plant(esci(n=80).assign(split="test"), "flip", 0.1)


def test_a_mixture_has_one_kind_a_row_and_every_rate():
    clean = esci(n=8000, seed=9)
    rates = {"flip": 0.05, "position_bias": 0.1, "accidental_click": 0.05, "duplicate_conflict": 0.05, "whole_query": 0.05, "grade_confusion": 0.05}
    planted, ledger = plant_mixture(clean, rates, seed=1)
    assert ledger.index.is_unique
    shares = count_noise(planted)["share"]
    for kind, rate in rates.items():
        assert shares[kind] == pytest.approx(rate, abs=0.01)
    assert wrong_share(clean, planted) == pytest.approx(0.35, abs=0.02)
    np.testing.assert_allclose(ledger["gain_before"], true_before(clean, ledger))


def test_planting_the_same_kind_twice_takes_other_rows():
    clean = esci()
    once, first = plant(clean, "duplicate_conflict", 0.1, seed=0)
    twice, second = plant(once, "duplicate_conflict", 0.1, seed=0)
    assert not set(first.index) & set(second.index) and twice["sample_id"].is_unique
    once, first = plant(clean, "flip", 0.1, seed=0)
    assert not set(first.index) & set(plant(once, "flip", 0.1, seed=0)[1].index)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=60), st.integers(0, 70), st.integers(0, 10**6))
def test_choose_rows_takes_exactly_as_many_as_there_are(odds, n, seed):
    odds = np.array(odds)
    chosen = choose_rows([f"r{i}" for i in range(len(odds))], odds, n, seed)
    assert chosen.sum() == min(n, (odds > 0).sum()) and not chosen[odds == 0].any()


def test_choose_queries_takes_whole_queries():
    queries = np.repeat(list("abcdefgh"), 5)
    chosen = choose_queries(queries, np.ones(40), 18)
    assert chosen.sum() == 20 and len(set(queries[chosen])) == 4


def test_the_list_of_kinds_is_complete():
    assert set(list_noise().index) == {"flip", "grade_confusion", "feature_dependent", "position_bias", "cascade_bias", "trust_bias", "accidental_click", "bot_burst", "false_negative",
                                       "stale_item", "wrong_category", "duplicate_conflict", "whole_query"}
    assert list_noise().notna().all(axis=None)


def test_close_cases_go_wrong_most():
    "Titles with half of the query's words; and the odds fall on both sides of the boundary."
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(40)]
    shares = rng.integers(0, 5, 2000)
    asked = [list(rng.choice(words, 4, replace=False)) for _ in shares]
    table = pd.DataFrame({"sample_id": range(2000), "query_id": np.arange(2000) // 10, "query": map(" ".join, asked), "item_id": range(2000),
                          "item_text": [" ".join(["超长", *query[:share]]) for query, share in zip(asked, shares)], "label": (shares > 2).astype(int), "gain": (shares > 2).astype(float), "split": "train"})
    planted, ledger = plant(table, "feature_dependent", 0.2, seed=1)
    wrong = table["sample_id"].isin(ledger.index).groupby(shares).mean()
    assert wrong.idxmax() in (2, 3) and wrong[0] < wrong.max() / 3 and (ledger["gain_after"] == 1 - ledger["gain_before"]).all()
    assert list(text_match(["不锈钢 杯", "a"], ["不锈钢杯 500ML", "xyz"])) == [0.5, 0.0]


# ---- every kind, on other tables

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["search", "recommendation"])
def test_every_kind_on_the_demos(name, kind):
    clean = load_demo(name)
    clean = clean[~clean["sample_id"].str.endswith("-dup")].drop(columns="noise", errors="ignore").reset_index(drop=True)
    planted, ledger = plant(clean, kind, 0.15, seed=2)
    n = int((planted["split"] == "train").sum())
    assert abs(wrong_share(clean, planted) - 0.15) <= (12 / n if kind == "whole_query" else 0.51 / n) and ledger.attrs["realised"] == pytest.approx(wrong_share(clean, planted))
    np.testing.assert_allclose(true_before(clean, ledger), ledger["gain_before"])
    trusted = planted[planted["split"] != "train"].reset_index(drop=True)
    pd.testing.assert_frame_equal(trusted[clean.columns], clean[clean["split"] != "train"].reset_index(drop=True), check_dtype=False)
    pd.testing.assert_frame_equal(plant(clean, kind, 0.15, seed=2)[0], planted)
    check_samples(planted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_comes_back_from_the_ledger(kind):
    clean = esci(seed=5)
    planted, ledger = plant(clean, kind, 0.2, seed=1)
    back = true_gains(planted, ledger)
    assert list(back.index) == planted["sample_id"].tolist()
    wanted = clean.set_index("sample_id")["gain"].mask(clean["sample_id"].isin(ledger.index).to_numpy() & (kind == "stale_item"), 0.0)
    pd.testing.assert_series_equal(back[clean["sample_id"]], wanted)
    assert (back != planted.set_index("sample_id")["gain"]).sum() == len(ledger)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lacks", [["position"], ["user_id"], ["timestamp"], ["position", "user_id", "timestamp"], []])
def test_with_and_without_the_optional_columns(kind, lacks):
    clean = add_people(esci(n=800, seed=6)).drop(columns=lacks)
    planted, ledger = plant(clean, kind, 0.2, seed=0)
    assert wrong_share(clean, planted) == pytest.approx(0.2, abs=0.012) and set(planted.columns) - set(clean.columns) == {"noise"} | ({"position"} if kind in PLACED and lacks[:1] == ["position"] else set())
    for name in {"user_id", "timestamp"} - set(lacks):
        assert planted[name].dtype == clean[name].dtype and planted[name].notna().all()


@pytest.mark.parametrize("kind", KINDS)
def test_chinese_tables(kind):
    rng = np.random.default_rng(0)
    goods = ["不锈钢保温杯", "儿童升降书桌", "护眼台灯", "男士跑步鞋", "纯棉毛巾", "无线鼠标"]
    query = np.repeat(np.arange(60), 6)
    label = pd.Series(rng.choice(["相关", "不相关"], 360))
    clean = check_samples(pd.DataFrame({
        "sample_id": [f"样{i}" for i in range(360)], "query_id": query, "query": [goods[q % 6][-2:] for q in query], "item_id": np.arange(360),
        "item_text": [f"{rng.choice(['正品', '包邮', '特价'])}{goods[q % 6]}" for q in query], "label": label, "gain": (label == "相关").astype(float),
        "split": np.where(query % 6 == 5, "valid", "train")}))
    planted, ledger = plant(clean, kind, 0.2, seed=0)
    assert wrong_share(clean, planted) == pytest.approx(0.2, abs=0.02)
    assert ((planted["label"] == "相关") == (planted["gain"] == 1)).all() and set(planted["label"]) == {"相关", "不相关"}
    if kind == "wrong_category":
        filed = planted.set_index("sample_id").loc[ledger.index]
        assert not [text for text, asked in zip(filed["item_text"], filed["query"]) if tokens(asked) & tokens(text)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("flip", "feature_dependent", "grade_confusion", "whole_query")])  # these reach any rate here
def test_the_highest_rate_that_an_error_names_can_be_reached(kind):
    clean = esci(n=400, seed=7)
    spoilt, _ = plant(clean, "flip", 0.1, seed=0)
    with pytest.raises(DataError, match=f"{kind} at a rate of 95.0%.*at most") as error:
        plant(spoilt, kind, 0.95)
    highest = float(str(error.value).split("at most ")[1].split("%")[0]) / 100
    assert 0 < highest < 0.95
    planted, ledger = plant(spoilt, kind, highest - 0.001)
    assert ledger.attrs["realised"] == pytest.approx(highest, abs=0.004) and not set(ledger.index) & set(spoilt.loc[spoilt["noise"] != "", "sample_id"])
    with pytest.raises(DataError, match="at most"):
        plant(spoilt, kind, highest + 0.006)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*ADDING, "whole_query", "feature_dependent")])
def test_a_cut_of_the_table_changes_nothing_that_it_need_not(kind):
    "With fewer queries, the rows that went wrong among those that are left go wrong first."
    clean = esci(n=1600, seed=8)
    _, whole = plant(clean, kind, 0.2, seed=3)
    kept = clean[clean["query_id"].isin(clean["query_id"].unique()[::2])]
    wanted = set(whole.index) & set(kept["sample_id"])
    _, part = plant(kept, kind, len(wanted) / int((kept["split"] == "train").sum()), seed=3)
    assert set(part.index) == wanted
    pd.testing.assert_frame_equal(part.sort_index(), whole.loc[list(part.index)].sort_index())


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KINDS), st.integers(2, 8), st.lists(st.tuples(st.sampled_from("ESCI"), st.sampled_from(["train", "train", "valid"]), st.integers(0, 9), st.integers(0, 3)), min_size=2, max_size=40),
       st.floats(0, 1), st.integers(0, 5), st.booleans(), st.booleans())
def test_any_small_table_is_spoilt_as_told_or_refused(kind, n_queries, rows, rate, seed, people, positions):
    label = pd.Series([row[0] for row in rows])
    query = np.arange(len(rows)) % n_queries
    clean = pd.DataFrame({"sample_id": [f"s{i}" for i in range(len(rows))], "query_id": query, "query": [" ".join(WORDS[q][:2]) for q in query], "item_id": [row[2] for row in rows],
                          "item_text": [" ".join(WORDS[row[2] % 9][row[3] : row[3] + 3]) for row in rows], "label": label, "gain": ESCI_LINEAR(label), "split": [row[1] for row in rows]})
    clean = add_people(clean) if people else clean
    clean = check_samples(clean.assign(position=pd.Series(query).groupby(query).cumcount() + 1) if positions else clean)
    try:
        planted, ledger = plant(clean, kind, rate, seed)
    except DataError as error:
        assert "at most" in str(error) or "no label near" in str(error) or "no training rows" in str(error)
        return
    check_samples(planted)
    n = int((planted["split"] == "train").sum())
    assert abs(len(ledger) / n - rate) <= (1 if kind == "whole_query" else 0.51 / n + 1e-9)
    assert wrong_share(clean, planted) == pytest.approx(len(ledger) / n) and (ledger["gain_before"] != ledger["gain_after"]).all()
    np.testing.assert_allclose(ledger["gain_before"], true_before(clean, ledger))
    np.testing.assert_allclose(planted["gain"], ESCI_LINEAR(planted["label"]), atol=1e-9 if set(label) == set("ESCI") else 0.501)  # the nearest label known
    pd.testing.assert_frame_equal(planted.loc[planted["split"] != "train", clean.columns].reset_index(drop=True), clean[clean["split"] != "train"].reset_index(drop=True))
    again = plant(clean.sample(frac=1, random_state=seed), kind, rate, seed)
    pd.testing.assert_frame_equal(again[1].sort_index(), ledger.sort_index())
    texts = [table.set_index("sample_id")["item_text"].sort_index() for table in (again[0], planted)]
    pd.testing.assert_series_equal(*texts)


# ---- position, trust, cascade

def small(gain, query=None, **columns) -> pd.DataFrame:
    n = len(gain)
    query = [0] * n if query is None else query
    table = {"sample_id": [f"s{i}" for i in range(n)], "query_id": query, "query": [f"q {q}" for q in query], "item_id": np.arange(n), "item_text": [f"thing{i}" for i in range(n)],
             "label": np.array(gain, float), "gain": np.array(gain, float), "split": "train"}
    return check_samples(pd.DataFrame(table | columns))


def test_odds_of_the_three_biases_by_hand():
    list_ = small([1, 0, 0.4, 1], position=[1, 2, 4, 5])
    position, cascade, trust = (propose(list_) for propose in (propose_position_bias, propose_cascade_bias, propose_trust_bias))
    np.testing.assert_allclose(position.odds, [0, 0.3 / 2, (0.3 + 0.7 * 0.4) / 4, 1 - 1 / 5])
    np.testing.assert_allclose(cascade.odds, [0, 0, 0, 1])
    np.testing.assert_allclose(trust.odds, [0, 1 / 2, 0.6 / 4, 0])
    np.testing.assert_allclose([position.gain, cascade.gain], [[0, 1, 1, 0]] * 2)
    np.testing.assert_allclose(propose_cascade_bias(list_.assign(gain=[0, 0, 0.4, 1])).odds, [0.3, 0.7 * 0.3, 0.49 * 0.58, 1 - 0.49 * 0.42])


def test_trust_praises_high_items_and_misses_none():
    clean = esci(n=8000, seed=10)
    rows = {kind: clean.set_index("sample_id").loc[plant(clean, kind, 0.1, seed=0)[1].index] for kind in ("trust_bias", "position_bias", "accidental_click")}
    assert (rows["trust_bias"]["gain"] < 0.5).all() and (rows["position_bias"]["gain"] >= 0.5).mean() > 0.5
    shares = rows["trust_bias"]["position"].value_counts(normalize=True)
    train = clean[(clean["split"] == "train")]
    wanted = propose_trust_bias(train).odds
    for place in (1, 2, 8):
        assert shares[place] == pytest.approx(wanted[(train["position"] == place).to_numpy()].sum() / wanted.sum(), abs=0.06)
    assert rows["accidental_click"]["position"].mean() - rows["trust_bias"]["position"].mean() > 1


def test_cascade_and_position_bias_share_positions_and_differ_below_good_items():
    clean = esci(n=8000, seed=11, positions=False)
    one, two = (plant(clean, kind, 0.1, seed=0) for kind in ("position_bias", "cascade_bias"))
    pd.testing.assert_series_equal(one[0]["position"], two[0]["position"])
    below = two[0].set_index("sample_id").loc[two[1].index[two[1]["gain_after"] == 1], "position"]
    assert set(one[1].index) != set(two[1].index) and below.max() < one[0].set_index("sample_id").loc[one[1].index[one[1]["gain_after"] == 1], "position"].max()


# ---- bots

@pytest.mark.parametrize("zone", [None, "Asia/Shanghai"])
@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_cleaning_finds_the_bots_and_nobody_else(rate, zone):
    clean = add_people(esci(n=3200, seed=12), zone=zone)
    planted, ledger = plant(clean, "bot_burst", rate, seed=1)
    assert len(planted) == len(clean) and planted["timestamp"].dtype == clean["timestamp"].dtype and planted["user_id"].dtype == clean["user_id"].dtype
    bots = planted[planted["user_id"] > clean["user_id"].max()]
    sizes = bots["user_id"].value_counts()
    assert set(ledger.index) == set(bots.loc[bots["gain"] != clean.set_index("sample_id")["gain"][bots["sample_id"]].to_numpy(), "sample_id"])
    assert sizes.min() >= BURST_CLICKS and sizes.max() < 2 * BURST_CLICKS and len(sizes) == max(1, len(bots) // BURST_CLICKS)
    right = (clean["gain"] >= 0.5)[clean["split"] == "train"].mean()
    assert (bots["noise"] == "").mean() == pytest.approx(right, abs=4 * np.sqrt(right * (1 - right) / len(bots)))  # no preference
    flagged = flag_bots(measure_sessions(planted))
    assert set(flagged.loc[flagged["bot"], "user_id"]) == set(sizes.index) and not flag_bots(measure_sessions(clean))["bot"].any()
    human, dropped = drop_bots(planted)
    assert dropped == len(bots) and not set(ledger.index) & set(human["sample_id"])
    span = clean.loc[clean["split"] == "train", "timestamp"]
    assert bots["timestamp"].between(span.min(), span.max()).all() and bots.groupby("user_id")["timestamp"].nunique().equals(sizes.sort_index().rename("timestamp"))


def test_a_burst_by_hand():
    clean = small([0, 1, 0, 1, 0, 0.7, 0, 1, 0, 0], query=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4], user_id=list("abcdefghij"), timestamp=pd.date_range("2024-01-01", periods=10, freq="D"))
    planted, ledger = plant(clean, "bot_burst", 0.3, seed=0)
    order = order_visits(clean, stable_hash("bot_burst", seed=0))
    irrelevant = [row for row in order if clean["gain"][row] < 0.5]
    assert set(ledger.index) == {f"s{row}" for row in irrelevant[:3]} and (ledger[["gain_before", "gain_after"]] == [0, 1]).all(axis=None)
    visited = list(order[: list(order).index(irrelevant[2]) + 1])
    assert set(planted.index[planted["user_id"] == "bot-1"]) == set(visited)
    moments = planted.loc[visited, "timestamp"]
    assert (moments.diff().dropna() == pd.Timedelta(seconds=1)).all()
    np.testing.assert_allclose(planted["gain"], [1 if row in irrelevant[:3] else gain for row, gain in enumerate(clean["gain"])])
    pd.testing.assert_frame_equal(planted.drop(index=visited)[clean.columns], clean.drop(index=visited))
    assert np.diff(clean["query_id"][visited]).astype(bool).sum() == clean["query_id"][visited].nunique() - 1  # list after list


@pytest.mark.parametrize("users, name", [(pd.Series(["bot-1", "x"] * 40), "bot-+1"), (pd.Series([7.0, np.nan] * 40), 8.0), (pd.Series([7, None] * 40, dtype="Int64"), 8),
                                         (pd.Series(["a", None] * 40, dtype="category"), "bot-1"), (pd.Series([None] * 80, dtype=object), None)])
def test_bots_are_given_a_name_that_nobody_has(users, name):
    clean = make_samples(np.random.default_rng(0).integers(0, 2, 80), BINARY).assign(user_id=users, timestamp=pd.NaT)
    clean["timestamp"] = pd.to_datetime(clean["timestamp"])
    planted, ledger = plant(clean, "bot_burst", 0.2, seed=0)
    assert set(planted.loc[planted["sample_id"].isin(ledger.index), "user_id"].dropna()) == ({name} if name is not None else set()) and planted["timestamp"].isna().all()


def test_bots_planted_twice_are_other_bots():
    clean = add_people(esci(n=1600, seed=13))
    once, first = plant(clean, "bot_burst", 0.1, seed=0)
    twice, second = plant(once, "bot_burst", 0.1, seed=0)
    assert not set(first.index) & set(second.index)
    users = [set(table.set_index("sample_id").loc[ledger.index, "user_id"]) for table, ledger in ((once, first), (twice, second))]
    assert not users[0] & users[1] and (twice.set_index("sample_id").loc[first.index, "user_id"] == once.set_index("sample_id").loc[first.index, "user_id"]).all()


# ---- stale items

def test_stale_rows_stay_as_they_are_and_the_truth_moves():
    clean = make_samples(["purchase", "click", "none"] * 200, lambda labels: labels.map({"purchase": 1.0, "click": 1.0, "none": 0.0}))
    planted, ledger = plant(clean, "stale_item", 0.3, seed=0)
    pd.testing.assert_frame_equal(planted[clean.columns], clean)
    assert (ledger["gain_before"] == 0).all() and (ledger["gain_after"] == 1).all() and set(planted.loc[planted["noise"] != "", "label"]) == {"purchase", "click"}


def test_older_rows_go_stale_first():
    rng = np.random.default_rng(0)
    clean = esci(n=4000, seed=14).assign(item_id=np.arange(4000) // 16 * 8 + np.arange(4000) % 8)  # each item in two queries
    clean = clean.assign(timestamp=pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.permutation(4000), unit="h"))
    clean["split"] = np.where(np.arange(4000) < 3800, "train", "test")
    train = clean[(clean["split"] == "train") & (clean["gain"] >= 0.5)]
    _, ledger = plant(clean, "stale_item", 0.15, seed=2)
    stale = train["sample_id"].isin(ledger.index)
    age = train["timestamp"].rank(pct=True, ascending=False)
    quarters = stale.groupby(pd.cut(age, [0, 0.25, 0.5, 0.75, 1])).mean()
    assert quarters.is_monotonic_increasing and quarters.iloc[-1] > 2 * quarters.iloc[0]
    for _, rows in train.assign(stale=stale).groupby("item_id"):  # within an item the order is strict
        assert rows.sort_values("timestamp")["stale"].is_monotonic_decreasing


def test_items_go_together_where_there_are_no_times_and_by_rank_where_there_are():
    clean = esci(n=1600, seed=15)
    clean["item_id"] = np.arange(1600) % 100
    clean["split"] = "train"
    _, ledger = plant(clean, "stale_item", 0.25, seed=0)
    shares = clean.assign(stale=clean["sample_id"].isin(ledger.index))[clean["gain"] >= 0.5].groupby("item_id")["stale"].mean()
    assert ((shares > 0) & (shares < 1)).sum() <= 1 and (shares == 1).sum() > 10
    odds = propose_stale_items(small([1, 1, 0, 1, 1], timestamp=pd.to_datetime(["2024-01-03", "2024-01-01", "2024-01-02", "2024-01-05", None]))).odds
    np.testing.assert_allclose(odds, [2 / 3, 1, 0, 1 / 3, 0.5])
    assert choose_items(clean, (clean["gain"] >= 0.5).to_numpy(float), 30, 0).sum() == 30


def test_an_item_that_a_trusted_row_wants_is_still_sold():
    clean = small([1, 1, 0, 1, 0], item_id=[1, 2, 3, 1, 2], split=["train", "train", "train", "valid", "test"])
    np.testing.assert_array_equal(find_still_sold(clean), [True, False, False, True, False])
    planted, ledger = plant(clean, "stale_item", 1 / 3)
    assert list(ledger.index) == ["s1"]
    with pytest.raises(DataError, match="at most 33.3%"):
        plant(clean, "stale_item", 0.5)


# ---- items of another category

def shop() -> pd.DataFrame:
    return check_samples(pd.DataFrame({
        "sample_id": list("abcdef"), "query_id": [1, 1, 2, 2, 3, 3], "query": ["red kettle"] * 2 + ["保温杯"] * 2 + ["desk lamp"] * 2, "item_id": [10, 11, 12, 13, 14, 15],
        "item_text": ["red kettle 1 l", "steel kettle", "不锈钢保温杯", "保温杯 500ml", "oak desk", "lamp for a desk"], "label": [1, 0, 1, 1, 0, 1], "gain": [1.0, 0, 1, 1, 0, 1], "split": "train",
        "position": [1.0, 2, 1, 2, 1, 2], "user_id": list("xxyyzz"), "timestamp": pd.to_datetime(["2024-01-01"] * 2 + ["2024-01-02"] * 2 + ["2024-01-03"] * 2), "price": [30, 20, 12, 9, 99, 25],
        "language": ["en", "en", "zh", "zh", "en", "en"]}))


def test_a_filed_item_brings_its_own_columns_and_takes_the_querys():
    clean = shop()
    planted, ledger = plant(clean, "wrong_category", 0.4, seed=0)
    assert len(planted) == 10 and len(ledger) == 4 and (ledger["gain_before"] == 0).all() and (ledger["gain_after"] == 1).all()
    pd.testing.assert_frame_equal(planted.loc[planted["noise"] == "", clean.columns], clean)
    items, queries = clean.set_index("item_id"), clean.drop_duplicates("query_id").set_index("query_id")
    for row in planted[planted["noise"] != ""].itertuples():
        beside = clean.set_index("sample_id").loc[row.sample_id.removesuffix("-cat")]
        assert (row.item_text, row.price) == tuple(items.loc[row.item_id, ["item_text", "price"]]) and items.loc[row.item_id, "query_id"] != row.query_id
        assert (row.query, row.user_id, row.timestamp, row.language) == tuple(queries.loc[row.query_id, ["query", "user_id", "timestamp", "language"]])
        assert (row.query_id, row.position, row.label, row.gain, row.split) == (beside["query_id"], beside["position"], 1, 1.0, "train")
    assert not planted.duplicated(["query_id", "item_id"]).any() and planted["label"].dtype == clean["label"].dtype


def test_words_are_told_apart_by_their_rarity():
    "Every title says 现货; a lamp says nothing else that the query says, another kettle does."
    clean = small([1, 1, 0], query=[0, 1, 2], item_text=["现货 red kettle", "现货 blue kettle", "现货 lamp"])
    clean["query"] = ["kettle", "blue", "lamp"]
    assert list(find_foreign_items(clean, 0)) == [2, 2, min(find_foreign_items(clean, 0)[2], 1)]
    alone = small([1, 0], query=[0, 0])
    assert list(find_foreign_items(alone, 0)) == [-1, -1]
    with pytest.raises(DataError, match="at most 0"):
        plant(alone, "wrong_category", 0.5)


def test_a_known_category_is_kept_to():
    clean = esci(n=800, seed=16)
    category = pd.Series(np.arange(800) // 8 % 3).map({0: "厨房", 1: "灯", 2: None})
    planted, ledger = plant(clean.assign(category=category), "wrong_category", 0.3, seed=0)
    filed = planted.set_index("sample_id").loc[ledger.index]
    fitting = clean.assign(category=category)[(clean["gain"] >= 0.5) & (clean["split"] == "train")].groupby("query_id")["category"].agg(lambda some: set(some.dropna()))
    assert not [name for name, row in filed.iterrows() if row["category"] in fitting.get(row["query_id"], set())] and filed["category"].notna().any() and filed["category"].isna().any()
    assert not set(filed["item_id"]) & set(clean.loc[clean["split"] != "train", "item_id"])


def test_foreign_items_share_few_words_with_what_fits():
    clean = esci(n=1600, seed=17)
    train = clean[clean["split"] == "train"].reset_index(drop=True)
    beside = add_foreign_items(train, find_foreign_items(train, 4) >= 0, seed=4)
    known = train[train["gain"] >= 0.5].groupby("query_id")["item_text"].agg(lambda texts: set().union(*map(tokens, texts)))
    shared = [len(tokens(row.item_text) & known.get(row.query_id, set())) / len(tokens(row.item_text)) for row in beside.itertuples()]
    assert len(beside) > 0.9 * len(train) and np.mean(shared) < 0.05 and not beside.duplicated(["query_id", "item_id"]).any()


# ---- false negatives, and all together

def test_false_negatives_are_the_mirror_of_accidental_clicks():
    clean = esci(seed=18)
    _, ledger = plant(clean, "false_negative", 0.2)
    assert (ledger["gain_before"] >= 0.5).all() and (ledger["gain_after"] == 0).all()
    places = clean.set_index("sample_id").loc[ledger.index, "position"]
    assert abs(places.mean() - 4.5) < 0.6


def test_a_mixture_of_all_kinds_spoils_each_row_once_at_every_rate():
    clean = add_people(esci(n=4000, seed=19))
    rates = {kind: 0.03 + 0.001 * place for place, kind in enumerate(KINDS)}
    planted, ledger = plant_mixture(clean, rates, seed=1)
    shares = count_noise(planted)["share"]
    for kind, rate in rates.items():
        assert shares[kind] == pytest.approx(rate, abs=0.004 if kind == "whole_query" else 0.0004) and ledger.attrs["realised"][kind] == pytest.approx(shares[kind])
    assert ledger.index.is_unique and wrong_share(clean, planted) == pytest.approx(sum(rates.values()), abs=0.005)
    np.testing.assert_allclose(ledger["gain_before"], true_before(clean, ledger))
    check_samples(planted)
    with pytest.raises(DataError, match="wrong_category and duplicate_conflict"):
        plant_mixture(clean, {"wrong_category": 0.5, "duplicate_conflict": 0.5})
    with pytest.raises(DataError, match="unknown"):
        plant_mixture(clean, {"wrong_categories": 0.1})


@pytest.mark.parametrize("kind", UP)
def test_kinds_that_go_up_hit_irrelevant_rows_only(kind):
    _, ledger = plant(esci(seed=20), kind, 0.2)
    assert (ledger["gain_before"] < 0.5).all() and (ledger["gain_after"] == 1).all()
