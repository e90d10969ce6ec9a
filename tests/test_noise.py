"""Planted noise: the rate, the ledger, what may not be touched, and what happens when a rate is out of reach."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecom_importance.preprocessing.noise import (
    NOISE, choose_queries, choose_rows, click_probability, confusion_matrix, count_noise, examine, find_grades, list_noise, text_match,
    make_near_duplicate, neighbour_confusion, plant, plant_mixture, propose_position_bias)
from ecom_importance.samples import BINARY, ESCI_KDD, ESCI_LINEAR, GRADES_1_3, DataError, check_samples, tokens

KINDS = list(NOISE)


def make_samples(labels, gain_map, n_items=8, seed=0, positions=True, ints=False) -> pd.DataFrame:
    labels = pd.Series(labels)
    rng = np.random.default_rng(seed)
    n = len(labels)
    query = np.arange(n) // n_items
    words = np.array("red blue steel wooden small large kettle lamp chair desk 水杯 台灯".split())
    table = {"sample_id": np.arange(n) if ints else [f"s{i}" for i in range(n)], "query_id": query if ints else [f"q{q}" for q in query],
             "query": [f"query {q}" for q in query], "item_id": np.arange(n) if ints else [f"i{i}" for i in range(n)],
             "item_text": [" ".join(rng.choice(words, rng.integers(1, 7))) for _ in range(n)], "label": labels, "gain": gain_map(labels),
             "split": np.where(query % 5 == 0, "valid", np.where(query % 7 == 1, "test", "train"))}
    if positions:
        table["position"] = np.arange(n) % n_items + 1
    return check_samples(pd.DataFrame(table))


def esci(n=1600, seed=0, **kwargs) -> pd.DataFrame:
    return make_samples(np.random.default_rng(seed).choice(list("ESCI"), n, p=[0.35, 0.2, 0.15, 0.3]), ESCI_LINEAR, seed=seed, **kwargs)


def wrong_share(before: pd.DataFrame, after: pd.DataFrame) -> float:
    "Counted from the tables, not from the ledger: rows that are new are duplicates, all of them wrong."
    train = after[after["split"] == "train"].set_index("sample_id")["gain"]
    truth = before.set_index("sample_id")["gain"].reindex(train.index)
    return float((train != truth).mean())


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
    truth = clean.set_index("sample_id")["gain"]
    originals = [name.removesuffix("-dup") for name in ledger.index] if kind == "duplicate_conflict" else ledger.index
    np.testing.assert_allclose(truth[originals].to_numpy(), ledger["gain_before"].to_numpy())
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
    assert ("position" in planted) == (kind == "position_bias")


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


@given(st.floats(0, 1), st.integers(1, 50), st.floats(0.1, 3))
def test_click_probability_is_one_and_falls(gain, position, decay):
    here, lower = click_probability(gain, [position, position + 1], decay=decay)
    assert 0 <= lower < here <= examine([position], decay)[0] <= 1


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
    truth = clean.set_index("sample_id")["gain"]
    np.testing.assert_allclose(ledger["gain_before"], truth[[str(name).removesuffix("-dup") for name in ledger.index]])


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
    assert set(list_noise().index) == {"flip", "grade_confusion", "feature_dependent", "position_bias", "accidental_click", "duplicate_conflict", "whole_query"}
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
