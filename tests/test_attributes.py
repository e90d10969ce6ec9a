"""Attributes: nothing of a test row enters a fit, nothing of the future enters a count, and propensities come back as they went in."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.preprocessing.attributes import attach_propensities, band_ages, behaviour_counts, estimate_propensities, fit_attributes
from ecom_importance.preprocessing.reading import BEHAVIOURS
from ecom_importance.samples import DataError

BANDS = ["18-24", "25-34", "35-44"]


def shop(seed: int = 0, n: int = 80) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"sample_id": range(n), "label": "E", "gain": 1.0, "split": ["train"] * (n // 2) + ["test"] * (n - n // 2), "price": rng.lognormal(3, 1, n), "age": rng.integers(18, 80, n),
                          "brand": rng.choice(["Acme", "书桌坊", "Lumen"], n), "band": rng.choice(BANDS, n)})
    table.loc[rng.random(n) < 0.1, ["price", "brand"]] = None
    return table


@pytest.mark.parametrize("how", [{}, {"scale": "minmax"}, {"encode": "ordinal"}, {"log": ["price"]}, {"orders": {"band": BANDS}}, {"scale": "minmax", "orders": {"band": BANDS}, "log": ["price"]}])
@pytest.mark.parametrize("seed", range(3))
def test_test_rows_change_nothing(how, seed):
    table = shop(seed)
    train = table["split"] == "train"
    strange = table.copy()
    strange.loc[~train, "price"], strange.loc[~train, "brand"], strange.loc[~train, "band"] = 1e9, "??", "100+"
    fitted, other, alone = (fit_attributes(one, min_count=2, **how) for one in (table, strange, table[train]))
    assert fitted.feature_names == other.feature_names == alone.feature_names and fitted.rows_fitted == train.sum()
    np.testing.assert_array_equal(fitted.transform(table), other.transform(table))
    np.testing.assert_array_equal(fitted.transform(table), alone.transform(table))
    features = fitted.transform(strange)
    assert np.isfinite(features).all() and features.shape == (len(table), len(fitted.feature_names)) and features.dtype == np.float32
    if how.get("scale") == "minmax":
        assert features.min() >= 0 and features.max() <= 1  # clipped, whatever the test rows hold


def test_scales_are_those_of_the_training_rows():
    table = shop().assign(price=np.arange(80.0))
    train = table["price"][:40]
    z = fit_attributes(table, numeric=["price"], categories=[]).transform(table)[:, 0]
    np.testing.assert_allclose(z, (table["price"] - train.mean()) / train.std(ddof=0), rtol=1e-5)
    unit = fit_attributes(table, numeric=["price"], categories=[], scale="minmax").transform(table)[:, 0]
    np.testing.assert_allclose(unit, np.clip(table["price"] / 39, 0, 1), rtol=1e-5)
    logs = fit_attributes(table, numeric=["price"], categories=[], log=["price"]).transform(table)[:, 0]
    np.testing.assert_allclose(logs, (np.log1p(table["price"]) - np.log1p(train).mean()) / np.log1p(train).std(ddof=0), rtol=1e-5)
    constant = fit_attributes(table.assign(price=7.0), numeric=["price"], categories=[]).transform(table.assign(price=7.0))
    assert (constant == 0).all()


def test_rare_unknown_and_missing_categories():
    table = pd.DataFrame({"split": ["train"] * 12 + ["test"] * 2, "brand": ["a"] * 6 + ["b"] * 4 + ["rare"] + [None] + ["new", "a"]})
    fitted = fit_attributes(table, min_count=3)
    assert fitted.feature_names == ["brand_a", "brand_b", "brand_infrequent_sklearn"]
    np.testing.assert_array_equal(fitted.transform(table)[[0, 6, 10, 11, 12]], np.eye(3)[[0, 1, 2, 2, 2]])
    codes = fit_attributes(table, min_count=1, encode="ordinal").transform(table)[:, 0]
    assert codes[12] == -1 and len(set(codes[:12])) == 4


def test_an_order_is_kept():
    table = pd.DataFrame({"split": "train", "band": ["45+", "18-24", "25-44"]})
    steps = fit_attributes(table, orders={"band": ["18-24", "25-44", "45+"]}, scale="minmax").transform(table)[:, 0]
    assert steps.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("change, how, what", [
    ({}, {"numeric": ["gain"]}, "gives the answer away"), ({}, {"categories": ["label"]}, "gives the answer away"), ({}, {"numeric": ["prize"]}, "no such column"),
    ({"price": np.inf}, {}, "finite"), ({"price": "free"}, {"numeric": ["price"]}, "finite"), ({"split": "test"}, {}, "no training rows"), ({}, {"scale": "robust"}, "'robust'"),
    ({"price": -1.0}, {"log": ["price"]}, "negative"), ({}, {"numeric": [], "categories": []}, "no attribute")])
def test_what_cannot_be_fitted(change, how, what):
    with pytest.raises(DataError, match=what):
        fit_attributes(shop().assign(**change), **how)


@pytest.mark.parametrize("name, values", [("behaviour", "click"), ("timestamp", pd.Timestamp("2024-05-01")), ("sampling_probability", 0.1)])
def test_columns_that_tell_the_label_are_refused_and_never_taken(name, values):
    table = shop().assign(**{name: values})
    assert not any(name in feature for feature in fit_attributes(table).feature_names)
    for how in ({"numeric": [name]}, {"categories": [name]}):
        with pytest.raises(DataError, match="gives the answer away") as error:
            fit_attributes(table, **how)
        assert error.value.column == name


def test_transform_needs_its_columns():
    fitted = fit_attributes(shop())
    with pytest.raises(DataError, match="brand"):
        fitted.transform(shop().drop(columns="brand"))


def test_nullable_numbers_are_numbers():
    table = shop().assign(age=pd.array([None, *range(79)], dtype="Int64"))
    assert np.isfinite(fit_attributes(table, numeric=["age"], categories=[]).transform(table)).all()


def test_ages():
    assert band_ages(pd.Series([0, 64.9, 65, 120])).tolist() == ["under 18", "55-64", "65+", "65+"]


events = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.sampled_from(BEHAVIOURS), st.floats(0, 100) | st.none()), max_size=30)


def as_log(rows) -> pd.DataFrame:
    log = pd.DataFrame(rows, columns=["item_id", "hour", "behaviour", "dwell"]).astype({"item_id": "int64", "behaviour": "str", "dwell": "float64"})
    return log.assign(timestamp=pd.Timestamp("2024-05-01") + pd.to_timedelta(log["hour"].astype("int64"), unit="h"), user_id=(log["item_id"] % 2).astype("int64"))


@settings(max_examples=60, deadline=None)
@given(rows=events, asked=events.filter(len))
def test_counts_equal_brute_force_and_ignore_the_future(rows, asked):
    log, samples = as_log(rows), as_log(asked)[["item_id", "user_id", "timestamp"]].set_index(np.arange(len(asked)) * 3 + 1)
    found = behaviour_counts(log, samples, by=["user_id", "item_id"], dwell="dwell")
    assert found.index.equals(samples.index)
    for at, row in samples.iterrows():
        past = log[(log["item_id"] == row["item_id"]) & (log["user_id"] == row["user_id"]) & (log["timestamp"] < row["timestamp"])]
        got = found.loc[at]
        assert [got[f"user_id_item_id_n_{name}"] for name in BEHAVIOURS] == [(past["behaviour"] == name).sum() for name in BEHAVIOURS]
        np.testing.assert_allclose(got["user_id_item_id_recency_days"], (row["timestamp"] - past["timestamp"].max()).total_seconds() / 86400 if len(past) else np.nan)
        np.testing.assert_allclose(got["user_id_item_id_mean_dwell_s"], past["dwell"].mean(), atol=1e-9)
    moment = samples["timestamp"].max()
    without = log[log["timestamp"] < moment]
    pd.testing.assert_frame_equal(behaviour_counts(without, samples, by=["user_id", "item_id"], dwell="dwell"), found)


def test_one_time_for_all_and_zones():
    log = as_log([(1, 0, "view", None), (1, 5, "view", None), (1, 9, "click", 1.0)])
    samples = pd.DataFrame({"item_id": [1, 2]})
    assert behaviour_counts(log, samples, until="2024-05-01 09:00")["item_id_n_view"].tolist() == [2, 0]
    assert behaviour_counts(log, samples, until="2024-05-01 09:00")["item_id_n_click"].tolist() == [0, 0]  # strictly before
    zoned = log.assign(timestamp=log["timestamp"].dt.tz_localize("UTC").dt.tz_convert("Asia/Shanghai"))
    assert behaviour_counts(zoned, samples, until=pd.Timestamp("2024-05-01 17:30", tz="Asia/Shanghai"))["item_id_n_click"].tolist() == [1, 0]
    nullable = samples.astype({"item_id": "Int64"})
    pd.testing.assert_frame_equal(behaviour_counts(log, nullable, until="2024-06-01"), behaviour_counts(log, samples, until="2024-06-01"))


@pytest.mark.parametrize("change, how, what", [
    (lambda log: log.assign(behaviour="like"), {}, "like"), (lambda log: log.drop(columns="item_id"), {}, "item_id"), (lambda log: log.assign(timestamp=None), {}, "times"),
    (lambda log: log.assign(timestamp="2024"), {}, "not times"), (lambda log: log, {"by": "query"}, "query"), (lambda log: log.assign(item_id="1"), {}, "one type"),
    (lambda log: log.assign(timestamp=log["timestamp"].mask(log["hour"] == 5)), {}, "gaps")])
def test_counts_refuse(change, how, what):
    log = as_log([(1, 0, "view", None), (1, 5, "view", None)])
    with pytest.raises(DataError, match=what):
        behaviour_counts(change(log), log[["item_id", "timestamp"]], **how)


def impressions(true: np.ndarray, queries: int = 200, shows: int = 60, seed: int = 0) -> pd.DataFrame:
    "Clicks of the position-based model, better items mostly higher."
    rng, k = np.random.default_rng(seed), len(true)
    appeal = rng.beta(1, 3, (queries, k))
    order = np.argsort(-(appeal[:, None, :] + rng.normal(0, 0.3, (queries, shows, k))), axis=2)
    shown = np.take_along_axis(np.broadcast_to(appeal[:, None, :], order.shape), order, axis=2)
    query, _, place = np.indices(order.shape)
    return pd.DataFrame({"query": query.ravel(), "item_id": order.ravel(), "position": place.ravel() + 1, "clicked": (rng.random(order.shape) < true * shown).ravel()})


@pytest.mark.parametrize("true", [1 / np.arange(1, 7), np.ones(5), np.array([1, 0.9, 0.3, 0.6, 0.2])], ids=["1/k", "flat", "not monotone"])
@pytest.mark.parametrize("method", ["pairs", "em"])
def test_known_propensities_are_recovered(true, method):
    errors, naive = [], []
    for seed in range(3):
        log = impressions(true, seed=seed)
        found = estimate_propensities(log, method=method, clip=0.01)
        assert found.index.tolist() == list(range(1, len(true) + 1)) and found.iloc[0] == 1 and found.name == "propensity"
        errors.append(np.abs(found.to_numpy() - true).max())
        rates = log.groupby("position")["clicked"].mean().to_numpy()
        naive.append(np.abs(rates / rates[0] - true).max())
    assert np.mean(errors) < 0.06 and np.mean(errors) < 0.5 * np.mean(naive)


def test_pairs_on_exact_rates_are_exact():
    "When each click rate is exactly θγ, the ratios are exact, whatever the numbers of impressions."
    rows = []
    for pair, (appeal, shows) in enumerate([(0.5, {1: 100, 2: 400}), (0.2, {1: 500, 3: 1000}), (0.8, {2: 50, 3: 100})]):
        for position, n in shows.items():
            clicks = round(n * appeal * {1: 1.0, 2: 0.5, 3: 0.25}[position])
            rows += [(f"q{pair}", "A", position, at < clicks) for at in range(n)]
    found = estimate_propensities(pd.DataFrame(rows, columns=["query", "item_id", "position", "clicked"]))
    np.testing.assert_allclose(found, [1, 0.5, 0.25], rtol=1e-9)


def test_clipping_is_counted():
    log = impressions(1 / np.arange(1, 7))
    raw, clipped = estimate_propensities(log, clip=0.01), estimate_propensities(log, clip=0.3)
    low = raw.index[raw < 0.3]
    np.testing.assert_allclose(clipped, raw.clip(lower=0.3))
    assert clipped.attrs["clip_rate"] == pytest.approx(log["position"].isin(low).mean()) and clipped.attrs["clicks_clipped"] == pytest.approx(log.loc[log["clicked"], "position"].isin(low).mean())
    assert raw.attrs["clip_rate"] == 0 and clipped.attrs["clip"] == 0.3 and clipped.attrs["method"] == "pairs"
    np.testing.assert_allclose(clipped.attrs["unclipped"], raw)


def test_only_training_impressions_are_used():
    log = impressions(1 / np.arange(1, 5), queries=60)
    split = log.assign(split=np.where(log["query"] < 40, "train", "test"))
    nonsense = split.assign(clicked=split["clicked"] | (split["split"] == "test"))
    pd.testing.assert_series_equal(estimate_propensities(split), estimate_propensities(nonsense))
    assert not estimate_propensities(split).equals(estimate_propensities(log))


@pytest.mark.parametrize("change, how, what", [
    (lambda log: log.assign(item_id=log["position"]), {}, "no item was shown"), (lambda log: log.assign(clicked=False), {}, "not one click"), (lambda log: log.assign(clicked=2), {}, "not clicked or not"),
    (lambda log: log.drop(columns="clicked"), {}, "clicked"), (lambda log: log, {"method": "oracle"}, "pairs, em"), (lambda log: log, {"clip": 0}, "above 0"), (lambda log: log.iloc[:0], {}, "no impressions")])
def test_propensities_refuse(change, how, what):
    with pytest.raises(DataError, match=what):
        estimate_propensities(change(impressions(np.array([1, 0.5]), queries=20, shows=5)), **how)


def test_wrong_clicks_are_named_by_the_rows_of_the_table_that_was_given():
    log = impressions(np.array([1, 0.5]), queries=20, shows=5).assign(split="train").astype({"clicked": object})
    log.loc[:9, "split"], log.loc[12, "clicked"] = "test", None
    log.loc[3, "clicked"], log.loc[[15, 40], "clicked"] = "unsure", 2  # a test row is not looked at
    with pytest.raises(DataError, match="not clicked or not") as error:
        estimate_propensities(log.set_index(np.arange(len(log)) + 1000))
    assert list(error.value.rows) == [15, 40]


def test_attaching_propensities():
    propensities = pd.Series([1.0, 0.5], index=[1, 2])
    samples = pd.DataFrame({"position": pd.array([2, None, 1], dtype="Int64")})
    attached = attach_propensities(samples, propensities)["propensity"]
    assert attached.tolist()[0::2] == [0.5, 1.0] and pd.isna(attached[1]) and attached.dtype == float
    with pytest.raises(DataError) as error:
        attach_propensities(pd.DataFrame({"position": [1, 3]}), propensities)
    assert error.value.rows == [1]
    with pytest.raises(DataError, match="no positions"):
        attach_propensities(pd.DataFrame({"query": [1]}), propensities)
