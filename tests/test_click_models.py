"""Click models: closed forms against hand-computed figures and enumeration, simulated sessions against the closed forms."""
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.preprocessing.click_models import (
    CLICK_IF_IRRELEVANT, CLICK_MODELS, attract, cascade_probability, click_probability, examine, examine_in_turn, simulate_clicks)
from ecom_importance.samples import DataError

gains = st.lists(st.floats(0, 1), min_size=1, max_size=9)


def make_lists(n_lists=12, n_items=8, seed=0) -> pd.DataFrame:
    rng, n = np.random.default_rng(seed), n_lists * n_items
    return pd.DataFrame({"sample_id": [f"s{i}" for i in range(n)], "query_id": np.repeat([f"查询{i}" for i in range(n_lists)], n_items), "item_id": np.arange(n),
                         "position": np.tile(np.arange(1.0, n_items + 1), n_lists), "gain": rng.choice([0, 1 / 3, 2 / 3, 1], n, p=[0.6, 0.2, 0.15, 0.05])})


@given(st.floats(0, 1), st.integers(1, 50), st.floats(0.1, 3))
def test_position_based_clicks_are_probabilities_and_fall(gain, position, decay):
    here, lower = click_probability(gain, [position, position + 1], decay=decay)
    assert 0 <= lower < here <= examine([position], decay)[0] <= 1


def test_the_formulas_by_hand():
    np.testing.assert_allclose(attract([0, 0.5, 1], 0.2), [0.2, 0.6, 1])
    np.testing.assert_allclose(click_probability([0, 1], [2, 4], decay=0.5, irrelevant=0.2), [0.2 / np.sqrt(2), 0.5])
    np.testing.assert_allclose(cascade_probability([0, 0.5, 1], [1, 2, 3], ["q"] * 3, irrelevant=0.2), [0.2, 0.8 * 0.6, 0.8 * 0.4])
    np.testing.assert_allclose(examine_in_turn([0, 0, 0], [1, 2, 3], ["q"] * 3), [1, 0.7, 0.49])


@settings(max_examples=30, deadline=None)
@given(gains, st.floats(0, 1))
def test_the_cascade_against_every_way_a_session_can_go(gain, irrelevant):
    a = attract(gain, irrelevant)
    wanted = np.zeros(len(a))
    for liked in product([False, True], repeat=len(a)):
        if any(liked):
            wanted[liked.index(True)] += np.prod(np.where(liked, a, 1 - a))
    found = cascade_probability(gain, np.arange(1, len(a) + 1), ["q"] * len(a), irrelevant=irrelevant)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    np.testing.assert_allclose(found.sum(), 1 - np.prod(1 - a), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(gains, gains, st.randoms(use_true_random=False))
def test_lists_do_not_meet_and_row_order_does_not_matter(one, two, random):
    rows = [(gain, place + 1, name) for name, some in (("a", one), ("b", two)) for place, gain in enumerate(some)]
    random.shuffle(rows)
    together = examine_in_turn(*zip(*rows))
    for name, some in (("a", one), ("b", two)):
        alone = examine_in_turn(some, range(1, len(some) + 1), [name] * len(some))
        assert alone[0] == 1 and (np.diff(alone) <= 0).all()
        np.testing.assert_allclose([seen for seen, row in zip(together, rows) if row[2] == name], [alone[row[1] - 1] for row in rows if row[2] == name])


def test_several_rows_in_a_place_count_as_their_mean_and_gaps_as_nothing():
    seen = examine_in_turn([0, 1, 0.5, 0.5], [1, 1, 2, 7], ["q"] * 4)
    np.testing.assert_allclose(seen, [1, 1, (0.7 + 0) / 2, (0.7 + 0) / 2 * (1 - attract(0.5))])


@pytest.mark.parametrize("model", CLICK_MODELS)
def test_simulated_clicks_are_those_of_the_formula(model):
    lists, n = make_lists(), 1500
    log = simulate_clicks(lists, model, n, seed=3)
    assert len(log) == n * len(lists) and list(log.columns) == ["sample_id", "query_id", "item_id", "position", "session", "clicked"]
    p = pd.Series(CLICK_MODELS[model].probability(lists["gain"], lists["position"], lists["query_id"]), index=lists["sample_id"])
    rate = log.groupby("sample_id")["clicked"].mean().reindex(p.index)
    certain = (p < 1e-12) | (p > 1 - 1e-12)
    np.testing.assert_allclose(rate[certain], p[certain], atol=1e-9)
    z = ((rate - p) / np.sqrt(p * (1 - p) / n))[~certain]
    assert z.abs().max() < 4.5 and abs(z.mean()) < 4 / np.sqrt(len(z)) * 1.5 and 0.7 < z.std() < 1.3
    by_rank = pd.DataFrame({"position": lists["position"].to_numpy(), "p": p.to_numpy(), "variance": (p * (1 - p)).to_numpy()}).groupby("position").sum()
    clicks = log.groupby("position")["clicked"].sum()
    assert (np.abs(clicks - n * by_rank["p"]) <= 4 * np.sqrt(n * by_rank["variance"])).all()


def test_a_cascade_session_has_one_click_at_most_and_the_other_model_more():
    lists = make_lists()
    clicks = {model: simulate_clicks(lists, model, 200, seed=0).groupby(["query_id", "session"])["clicked"].sum() for model in CLICK_MODELS}
    assert clicks["cascade"].max() == 1 and clicks["position_based"].max() > 1


@pytest.mark.parametrize("model", CLICK_MODELS)
def test_a_list_is_drawn_by_its_name_and_the_seed(model):
    lists = make_lists()
    log = simulate_clicks(lists, model, 5, seed=1)
    pd.testing.assert_frame_equal(log, simulate_clicks(lists.sample(frac=1, random_state=0), model, 5, seed=1))
    half = lists[lists["query_id"].isin(lists["query_id"].unique()[::2])]
    pd.testing.assert_frame_equal(log[log["query_id"].isin(half["query_id"])].reset_index(drop=True), simulate_clicks(half, model, 5, seed=1))
    assert not log["clicked"].equals(simulate_clicks(lists, model, 5, seed=2)["clicked"])


def test_what_attracts_is_the_same_under_both_models():
    "A cascade user clicks on the first item that attracts, so nobody clicks above it in the other model."
    lists = make_lists(seed=4)
    logs = {model: simulate_clicks(lists, model, 50, seed=1) for model in CLICK_MODELS}
    first = {model: log[log["clicked"]].groupby(["query_id", "session"])["position"].min() for model, log in logs.items()}
    both = first["position_based"].index.intersection(first["cascade"].index)
    assert len(both) and (first["cascade"][both] <= first["position_based"][both]).all()


def test_bad_input_says_where():
    lists = make_lists(2, 3)
    for broken, match in [(lists.drop(columns="position"), "position"), (lists.assign(position=[1.0, np.nan, 3, 1, 2, 3]), r"row 1.*position"), (lists.assign(position=1.0), "same place")]:
        with pytest.raises(DataError, match=match):
            simulate_clicks(broken)
    with pytest.raises(DataError, match="position_based, cascade"):
        simulate_clicks(lists, "cascades")
    with pytest.raises(DataError, match="at least one"):
        simulate_clicks(lists, n_sessions=0)


def test_an_irrelevant_item_attracts_by_the_constant_alone():
    assert attract(0) == CLICK_IF_IRRELEVANT and attract(1) == 1
