"""The board: figures are those of SciPy and of hand, and what is missing is never read as good."""
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ecom_importance.benchmark.board import costs, curves, differences, failures, figures, share_rows, split_by_trust, standings
from ecom_importance.samples import DataError

ABILITY = {"good": 0.7, "twin": 0.7, "plain": 0.6, "random": 0.2}


def line(data, noise, seed, task, estimator, metric="", value=np.nan, **more):
    return dict(data=data, noise=noise, rate=0.2, seed=seed, trusted=200, rows=100, task=task, estimator=estimator, metric=metric, value=value, seconds=np.nan, peak_mb=np.nan, status="done", message="") | more


@pytest.fixture(scope="module")
def results():
    rng, lines = np.random.default_rng(1), []
    for data in ("a", "b"):
        for noise in ("flip", "whole_query"):
            for seed in range(10):
                luck, ease = dict.fromkeys(ABILITY, 0.0) | {name: rng.normal(scale=0.02) for name in ("good", "plain", "random")}, rng.normal(scale=0.1)
                luck["twin"] = luck["good"]
                lines += [line(data, noise, seed, "gain", "", "uniform", 0.5 + ease), line(data, noise, seed, "shared", "oof", seconds=2.0)]
                for name, level in ABILITY.items():
                    if (name, data, noise) == ("plain", "b", "whole_query"):
                        lines.append(line(data, noise, seed, "valuing", name, status="did not finish", message="stopped", seconds=9.0))
                        continue
                    lines.append(line(data, noise, seed, "valuing", name, seconds=level if name != "twin" else 0.1, peak_mb=5.0))
                    lines += [line(data, noise, seed, "detection", name, metric, level + ease + luck[name]) for metric in ("ap", "auroc")]
                    lines += [line(data, noise, seed, "gain", name, "weighted", 0.5 + ease + luck[name]), line(data, noise, seed, "curves", name, "all rows", 0.5)]
                    lines += [line(data, noise, seed, "curves", name, f"{end}@{share:g}", 0.5 + sign * share * level) for end, sign in (("worst", 1), ("best", -1)) for share in (0.1, 0.5)]
    return pd.DataFrame(lines)


def test_means_are_of_the_same_conditions_or_not_given(results):
    table = standings(results)
    assert np.isnan(table.loc[("b", "plain"), "mean"]) and not table["mean"].drop(("b", "plain")).isna().any()
    some = results[(results["data"] == "a") & (results["estimator"] == "good") & (results["metric"] == "ap")]
    assert table.loc[("a", "good"), "mean"] == pytest.approx(some["value"].mean()) and table.loc[("a", "good"), "flip"] == pytest.approx(some[some["noise"] == "flip"]["value"].mean())
    for data in "ab":
        means = table.loc[data, "mean"].dropna()
        assert means.is_monotonic_decreasing
    assert standings(results, column="data").loc["plain", "runs"] == 30
    with pytest.raises(DataError, match="no 'app' of the task 'detection'"):
        figures(results, "detection", "app")


def test_intervals_are_scipys_paired_over_seeds(results):
    table = differences(results, "plain", estimators=["good", "plain", "random"])
    wide = results[(results["data"] == "a") & (results["metric"] == "ap")].pivot_table(index=["seed", "noise"], columns="estimator", values="value")
    each = (wide["good"] - wide["plain"]).groupby("seed").mean()
    low, high = stats.ttest_1samp(each, 0).confidence_interval()
    np.testing.assert_allclose(table.loc[("a", "good"), ["difference", "low", "high"]].astype(float), [each.mean(), low, high])
    assert table.loc[("a", "good"), "verdict"] == "better" and table.loc[("a", "random"), "verdict"] == "worse"
    assert table.loc[("b", "good"), "conditions"] == 10, "paired with what ran"
    p = [stats.ttest_1samp((wide[name] - wide["plain"]).groupby("seed").mean(), 0).pvalue for name in ("good", "random")]
    assert table.loc[("a", "good"), "p (Holm)"] == pytest.approx(max(2 * p[1], p[0]) if p[0] > p[1] else 2 * p[0], rel=1e-6)


def test_few_seeds_give_no_verdict_and_two_no_interval(results):
    five = differences(results[results["seed"] < 5], "plain")
    assert set(five["verdict"]) == {"too few seeds"} and five["low"].notna().all()
    assert differences(results[results["seed"] < 2], "plain")["low"].isna().all()


def test_noise_without_effect_gets_no_evidence(results):
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(40):
        values = rng.normal(size=(10, 6))
        lines = [line("a", "flip", seed, "detection", f"e{place}", "ap", values[seed, place]) for seed in range(10) for place in range(6)]
        verdicts += differences(pd.DataFrame(lines), "e0")["verdict"].tolist()
    assert np.mean(np.array(verdicts) != "no evidence") < 0.05


def test_references_are_compared_with_by_name(results):
    table = differences(results, "uniform", "gain", "weighted")
    paired = results[(results["metric"] == "weighted") & (results["estimator"] == "good") & (results["data"] == "a")]["value"].to_numpy() - results[(results["metric"] == "uniform") & (results["data"] == "a")]["value"].to_numpy()
    assert table.loc[("a", "good"), "difference"] == pytest.approx(paired.mean())
    with pytest.raises(DataError, match="'nobody' has no 'ap'"):
        differences(results, "nobody")


def test_equal_rankings_share_a_row_with_the_cost_of_the_cheapest(results):
    shared = share_rows(results)
    assert {"good = twin", "plain", "random"} <= set(shared["estimator"]) and not {"good", "twin"} & set(shared["estimator"])
    assert shared.loc[(shared["task"] == "valuing") & (shared["estimator"] == "good = twin"), "seconds"].eq(0.1).all()
    assert set(shared["task"]) == {"detection", "valuing"}
    pd.testing.assert_series_equal(standings(shared).loc[("a", "good = twin")], standings(results).loc[("a", "good")], check_names=False)


def test_the_same_order_of_other_values_is_one_ranking(results):
    apart = [line(data, "flip", 0, "detection", name, "kmeans_f1", f1) for data in ("a", "b") for name, f1 in (("good", 0.3), ("twin", 0.6))]
    assert "good = twin" in set(share_rows(pd.concat([results, pd.DataFrame(apart)]))["estimator"])


def test_the_mean_counts_columns_alike_and_conditions_of_other_sizes_are_others(results):
    some = pd.DataFrame([line(data, kind, 0, "detection", "good", "ap", value) for data, kind, value in (("a", "flip", 0.2), ("a", "bot", 0.4), ("a", "dup", 0.6), ("b", "flip", 1.0))])
    assert standings(some, column="data").loc["good", "mean"] == pytest.approx(0.7)
    two = pd.concat([results, results.assign(rows=50, value=results["value"] / 2)])
    table = differences(two, "plain").loc[("a", "good")]
    assert table["conditions"] == 2 * differences(results, "plain").loc[("a", "good"), "conditions"] and table["difference"] == pytest.approx(0.75 * differences(results, "plain").loc[("a", "good"), "difference"])


def test_curves_are_changes_against_all_rows(results):
    table = curves(results, ["good"]).set_index(["data", "end", "share"])["change"]
    assert table[("a", "worst", 0.5)] == pytest.approx(0.35) and table[("a", "best", 0.1)] == pytest.approx(-0.07)


def test_costs_add_parts_that_a_registered_estimator_needs(results):
    both = pd.concat([results, pd.DataFrame([line("a", "flip", 0, "valuing", "oof_loss", seconds=0.25, peak_mb=1.0)])])
    table = costs(both)
    assert table.loc["oof_loss", "own"] == 0.25 and table.loc["oof_loss", "with parts"] == 2.25 and table.loc["good", "with parts"] == pytest.approx(0.7)


def test_failures_say_how_many_of_how_many(results):
    table = failures(results)
    assert table[["estimator", "status", "conditions", "of", "data"]].values.tolist() == [["plain", "did not finish", 10, 40, "b"]]
    assert split_by_trust(["oof_loss", "influence", "mine", "el2n = loss"]) == (["oof_loss", "mine", "el2n = loss"], ["influence"])
