"""Roll-ups: groups as pandas makes them, intervals against SciPy, and what is refused."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ecom_importance.importance import importance_by, score
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.rollups import cluster_intervals
from ecom_importance.samples import DataError


def made(n=300, seed=0):
    rng = np.random.default_rng(seed)
    samples = pd.DataFrame({"sample_id": [f"s{i}" for i in range(n)], "query_id": rng.integers(0, 60, n), "user_id": rng.integers(0, 9, n), "behaviour": rng.choice(["click", "cart"], n), "category": rng.choice(["杯", "袜", None], n)})
    scores = pd.DataFrame({"oof_loss": rng.normal(size=n), "random": rng.random(n), "random_se": rng.random(n)}, index=pd.Index(samples["sample_id"], name="sample_id"))
    order = rng.permutation(n)
    return scores.iloc[order[: n - 20]], samples.iloc[rng.permutation(n)].reset_index(drop=True)


@pytest.mark.parametrize("by", ["user_id", ["behaviour", "category"], "query_id", ["query_id", "behaviour"]])
def test_groups_are_those_of_pandas(by):
    scores, samples = made()
    table = importance_by(scores, samples, by)
    columns = [by] if isinstance(by, str) else by
    assert list(dict.fromkeys(table["estimator"])) == ["oof_loss", "random"]
    joined = scores.join(samples.set_index("sample_id"))
    lowest = joined["oof_loss"] <= joined["oof_loss"].quantile(0.1, interpolation="lower")
    wanted = joined.assign(lowest=lowest).groupby(columns, dropna=False).agg(rows=("oof_loss", "size"), mean=("oof_loss", "mean"), lowest=("lowest", "mean"))
    found = table[table["estimator"] == "oof_loss"].set_index(columns)[["rows", "mean", "lowest"]]
    pd.testing.assert_frame_equal(found.sort_index(), wanted.sort_index(), check_dtype=False)
    assert (table.groupby("estimator")["rows"].sum() == len(scores)).all()
    assert table[table["estimator"] == "random"]["mean"].is_monotonic_increasing


@settings(max_examples=20, deadline=None)
@given(clusters=st.integers(2, 12), size=st.integers(1, 6), level=st.sampled_from([0.8, 0.95, 0.99]), seed=st.integers(0, 99))
def test_equal_clusters_give_students_interval(clusters, size, level, seed):
    values = np.random.default_rng(seed).normal(size=clusters * size)
    means = values.reshape(clusters, size).mean(axis=1)
    one = cluster_intervals(values, np.zeros(len(values), int), np.arange(clusters).repeat(size), level=level).iloc[0]
    np.testing.assert_allclose((one["low"], one["high"]), stats.t.interval(level, clusters - 1, loc=means.mean(), scale=stats.sem(means)))


def test_one_query_has_no_interval_and_small_groups_can_be_left_out():
    scores = pd.Series([1.0, 2.0, 3.0], index=pd.Index([1, 2, 3], name="sample_id"), name="loss")
    samples = pd.DataFrame({"sample_id": [1, 2, 3], "query_id": [7, 7, 8], "user_id": ["a", "a", "b"]})
    table = importance_by(scores, samples, "user_id")
    assert table["queries"].tolist() == [1, 1] and table[["low", "high"]].isna().all().all()
    assert importance_by(scores, samples, "user_id", least=2)["user_id"].tolist() == ["a"]
    assert importance_by(scores, samples, "user_id", cluster=None)["low"].notna().tolist() == [True, False]
    assert importance_by(scores, samples, "query_id")["witnesses"].tolist() == [2, 1]


def test_it_takes_what_score_returns():
    evidence, _ = example_evidence(200, 40, d=4)
    samples = pd.DataFrame({name: evidence.train[name] for name in ("sample_id", "query_id", "behaviour")})
    table = importance_by(score(evidence, ["loss", "random"], repeats=2), samples, "behaviour")
    assert set(table["estimator"]) == {"loss", "random"} and table[["low", "high"]].notna().all().all()


@pytest.mark.parametrize("change, what", [
    (lambda scores, samples: (scores, samples, "colour"), "no column 'colour'"),
    (lambda scores, samples: (scores, samples, []), "no column to group by"),
    (lambda scores, samples: (scores, samples.iloc[:50], "user_id"), "not among the samples"),
    (lambda scores, samples: (scores, pd.concat([samples, samples]), "user_id"), "more than once"),
    (lambda scores, samples: (scores.assign(random=np.nan), samples, "user_id"), "'random' that are NaN"),
    (lambda scores, samples: (scores.iloc[:0], samples, "user_id"), "no scores"),
])
def test_bad_input_is_named(change, what):
    with pytest.raises(DataError, match=what):
        importance_by(*change(*made()))
    with pytest.raises(ValueError, match="level is 1"):
        importance_by(*made(), "user_id", level=1)
