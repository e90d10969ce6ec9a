"""Resampling: counts that are weights, draws that names decide, imbalanced-learn by hand, and SMOTE rows that lie where they may."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ecom_importance.finetuning import fine_tune
from ecom_importance.importance.heads import fit_head
from ecom_importance.samples import DataError, check_samples, stable_hash
from ecom_importance.weighting.resampling import SYNTHETIC_TEXT, bootstrap, edited_neighbours, grades, oversample, refuse_synthetic, repeat_rows, smote, tomek_links, undersample
from ecom_importance.weighting.weights import apply_weights, check_weights

quick = settings(max_examples=40, deadline=None)
raw_weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 50)), min_size=1, max_size=30).filter(any)


def series(values, name="weight") -> pd.Series:
    values = np.asarray(values, float)
    return pd.Series(values / values.mean(), index=pd.Index([f"行{row}" for row in range(len(values))], name="sample_id"), name=name)


def problem(seed=0, queries=12, rows=10, d=4, whole_ids=False) -> tuple[pd.DataFrame, np.ndarray]:
    "Generated samples of all splits: three grades, of which the highest is rare; Chinese queries."
    rng = np.random.default_rng(seed)
    query = np.repeat(np.arange(queries), rows)
    gain = np.tile(np.r_[1.0, 1.0, 0.5, 0.5, 0.5, np.zeros(rows - 5)], queries)
    split = np.array(["train", "train", "train", "valid", "select", "test"])[np.arange(queries) % 6][query]
    ids = np.arange(len(query)) + 7 if whole_ids else np.array([f"样本{row}" for row in range(len(query))])
    table = pd.DataFrame({"sample_id": ids, "query_id": query, "query": [f"保温杯 {q}" for q in query], "item_id": ids, "item_text": [f"不锈钢 {row}" for row in range(len(query))], "label": gain, "gain": gain, "split": split, "position": 1.0, "propensity": 0.5})
    return table, rng.normal(size=(len(query), d)) + gain[:, None]


# ---- bootstrap

@quick
@given(raw_weights, st.integers(1, 60), st.integers(0, 50))
def test_systematic_counts_are_expected_counts_rounded_down_or_up(values, n, seed):
    weights = series(values)
    drawn = bootstrap(weights, n, seed=seed)
    counts, expected = drawn * n / len(weights), weights / weights.sum() * n
    assert check_weights(drawn).index.equals(weights.index) and drawn.attrs["rows"] == n
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-9)
    assert (np.abs(counts - expected) < 1 + 1e-6).all() and (counts[weights == 0] == 0).all()


@quick
@given(raw_weights, st.integers(1, 6), st.sampled_from(["systematic", "independent"]), st.integers(0, 50))
def test_every_query_keeps_its_rows(values, n_groups, draws, seed):
    weights = series(values)
    group = pd.Series([f"词{row % n_groups}" for row in range(len(weights))], index=weights.index)
    drawn = bootstrap(weights, group=group, draws=draws, seed=seed)
    rows = (drawn * drawn.attrs["rows"] / len(drawn)).groupby(group).sum().round(6)
    alive = weights.groupby(group).sum() > 0
    assert rows.to_dict() == (group.value_counts().sort_index() * alive).to_dict()


def test_groups_share_another_number_of_rows_in_proportion():
    group = pd.Series(np.repeat(["a", "b", "c"], [30, 15, 5]), index=series(np.ones(50)).index)
    for seed in range(5):
        drawn = bootstrap(series(np.arange(1, 51)), 10, group=group, seed=seed)
        assert (drawn * 10 / 50).groupby(group).sum().round(6).tolist() == [6, 3, 1]


@pytest.mark.parametrize("draws", ["systematic", "independent"])
def test_the_expectation_is_the_weight(draws):
    weights = series([0, 0.2, 0.7, 1, 1, 1.3, 2.4, 5])
    drawn = np.array([bootstrap(weights, draws=draws, seed=seed) for seed in range(1500)])
    error = (drawn.mean(axis=0) - weights) / np.maximum(drawn.std(axis=0) / np.sqrt(1500), 1e-9)
    assert np.abs(error).max() < 4 and drawn[:, 0].max() == 0


def test_independent_draws_are_multinomial():
    "Row 1 of three equal ones among three draws: binomial (3, ⅓), by a chi-square test."
    first = [round(bootstrap(series([1, 1, 1]), draws="independent", seed=seed).iloc[0]) for seed in range(1500)]
    assert stats.chisquare(np.bincount(first, minlength=4), 1500 * stats.binom(3, 1 / 3).pmf(range(4))).pvalue > 1e-3
    assert set(bootstrap(series([1, 1, 1]), seed=1)) == {1.0}, "systematic draws of equal weights take each row once"


@pytest.mark.parametrize("draws", ["systematic", "independent"])
def test_draws_do_not_depend_on_the_order_of_rows(draws):
    weights = series(np.random.default_rng(0).gamma(1, size=40))
    group = pd.Series(np.arange(40) % 7, index=weights.index)
    other = weights.sample(frac=1, random_state=3)
    for more in ({}, {"group": group}, {"n": 13, "group": group}):
        pd.testing.assert_series_equal(bootstrap(weights, draws=draws, seed=5, **more), bootstrap(other, draws=draws, seed=5, **more).reindex(weights.index))
    assert not bootstrap(weights, draws=draws, seed=5).equals(bootstrap(weights, draws=draws, seed=6))


def test_a_group_without_weight_is_left_out_and_said(caplog):
    weights = series([0, 0, 1, 2])
    drawn = bootstrap(weights, group=pd.Series(list("aabb"), index=weights.index))
    assert drawn.iloc[:2].tolist() == [0, 0] and "1 of 2 groups" in caplog.text
    assert check_weights(drawn).sum() == 4


# ---- classes

def test_grades_are_classes_of_training_gains():
    table, _ = problem()
    found = grades(table)
    assert set(found.index) == set(table.loc[table["split"] == "train", "sample_id"])
    assert found.groupby(table.set_index("sample_id")["gain"]).unique().map(list).to_dict() == {0.0: [0], 0.5: [1], 1.0: [2]}


@pytest.mark.parametrize("draw", [oversample, undersample])
def test_classes_become_as_large_as_one(draw):
    table, _ = problem()
    weights = draw(table, grades(table), seed=2)
    rows = (weights * weights.attrs["rows"] / len(weights)).groupby(grades(table)).sum().round(6)
    size = grades(table).value_counts()
    assert set(rows) == {size.max() if draw is oversample else size.min()}
    assert (weights > 0).all() if draw is oversample else weights.nunique() == 2
    assert len(apply_weights(table, weights)) == (weights > 0).sum()


@pytest.mark.parametrize(("draw", "name"), [(oversample, "RandomOverSampler"), (undersample, "RandomUnderSampler")])
def test_imbalanced_learn_by_hand_gives_the_same(draw, name):
    from imblearn import over_sampling, under_sampling

    table, _ = problem()
    train = table[table["split"] == "train"]
    train = train.iloc[np.argsort([stable_hash("resample", each, seed=4) for each in train["sample_id"]])]
    rows, _ = getattr(over_sampling if draw is oversample else under_sampling, name)(random_state=4).fit_resample(train[["sample_id"]], (train["gain"] * 2).astype(int))
    counts = rows["sample_id"].value_counts()
    weights = draw(table, grades(table), seed=4)
    assert (weights * weights.attrs["rows"] / len(weights)).round(6)[weights > 0].sort_index().to_dict() == counts.sort_index().to_dict()


@pytest.mark.parametrize("draw", [lambda t, x: oversample(t, grades(t), seed=1), lambda t, x: undersample(t, grades(t), seed=1), lambda t, x: tomek_links(t, grades(t), x), lambda t, x: edited_neighbours(t, grades(t), x)])
def test_class_draws_do_not_depend_on_the_order_of_rows(draw):
    table, x = problem()
    order = np.random.default_rng(1).permutation(len(table))
    first, second = draw(table, x), draw(table.iloc[order], x[order])
    assert first.equals(second.reindex(first.index)) and 0 < (first > 0).sum() and first.nunique() > 1


def test_any_column_is_a_class_and_strategies_name_its_labels():
    table, _ = problem()
    behaviour = table.set_index("sample_id")["gain"].map({0.0: "浏览", 0.5: "加购", 1.0: "购买"})  # of all splits: those of others are not read
    weights = oversample(table, behaviour, sampling_strategy={"购买": 25})
    rows = (weights * weights.attrs["rows"] / len(weights)).groupby(behaviour).sum().round(6)
    assert rows.to_dict() == {"浏览": 30, "加购": 18, "购买": 25}


def test_tomek_links_by_brute_force():
    table, x = problem(3)
    train = (table["split"] == "train").to_numpy()
    some, grade = x[train], grades(table).to_numpy()
    distance = np.linalg.norm(some[:, None] - some[None], axis=2) + np.diag(np.full(len(some), np.inf))
    nearest = distance.argmin(axis=1)
    linked = (nearest[nearest] == np.arange(len(some))) & (grade != grade[nearest])
    dropped = (tomek_links(table, grades(table), x) == 0).to_numpy()
    assert linked.sum() > 4 and (dropped == linked & (grade != 2)).all()
    assert ((tomek_links(table, grades(table), x, sampling_strategy="all") == 0).to_numpy() == linked).all()


@pytest.mark.parametrize("agreeing", ["all", "mode"])
def test_edited_neighbours_by_brute_force(agreeing):
    table, x = problem(4)
    train = (table["split"] == "train").to_numpy()
    some, grade = x[train], grades(table).to_numpy()
    distance = np.linalg.norm(some[:, None] - some[None], axis=2) + np.diag(np.full(len(some), np.inf))
    near = grade[np.argsort(distance, axis=1)[:, :3]]
    agree = (near == grade[:, None]).all(axis=1) if agreeing == "all" else np.array([np.bincount(row).argmax() for row in near]) == grade
    kept = (edited_neighbours(table, grades(table), x, agreeing=agreeing) > 0).to_numpy()
    assert (kept == agree | (grade == 2)).all() and 0 < kept.sum() < len(kept)


# ---- rows

@quick
@given(st.lists(st.integers(0, 4), min_size=36, max_size=36).filter(any))
def test_copies_are_as_many_as_counted(counts):
    table, x = problem(queries=6, rows=12)
    train = table["split"] == "train"
    weights = pd.Series(np.array(counts) / np.mean(counts), index=table.loc[train, "sample_id"].rename("sample_id"))
    copies, rows = repeat_rows(table, weights, n=sum(counts))
    assert copies[copies["split"] == "train"].groupby("drawn_from").size().to_dict() == {name: count for name, count in zip(weights.index, counts) if count}
    assert check_samples(copies)["sample_id"].is_unique and (table["sample_id"].to_numpy()[rows] == copies["drawn_from"]).all() and (table["item_text"].to_numpy()[rows] == copies["item_text"]).all()
    assert copies.loc[copies["split"] != "train", "sample_id"].tolist() == table.loc[~train, "sample_id"].tolist()


def test_training_on_copies_is_training_on_counts():
    table, x = problem(whole_ids=True)
    weights = bootstrap(oversample(table, grades(table)), draws="independent", n=90, seed=1)
    copies, rows = repeat_rows(table, weights)
    by_count, by_copy = fine_tune(table, weights, kind="head", vectors=x, ridge=0.1), fine_tune(copies, kind="head", vectors=x[rows], ridge=0.1)
    np.testing.assert_allclose(by_count.head.weights, by_copy.head.weights, atol=1e-6)
    assert np.abs(by_count.head.weights - fine_tune(table, kind="head", vectors=x, ridge=0.1).head.weights).max() > 0.01


def test_weights_that_are_no_counts_are_not_copied():
    table, _ = problem()
    ids = grades(table).index
    with pytest.raises(DataError, match="no whole number of copies"):
        repeat_rows(table, pd.Series(np.linspace(0.5, 1.5, len(ids)), index=ids))
    clash = table.assign(sample_id=[1, "1", *table["sample_id"][2:]])
    with pytest.raises(DataError, match="equal as text"):
        repeat_rows(clash, pd.Series(1.0, index=grades(clash).index))


# ---- smote

@pytest.mark.parametrize("within", ["query", "all"])
@pytest.mark.parametrize("whole_ids", [False, True])
def test_new_rows_lie_between_training_rows_of_their_grade(within, whole_ids):
    table, x = problem(whole_ids=whole_ids)
    grown, vectors, weights = smote(table, x, within=within, k_neighbors=3, seed=2)
    assert check_samples(grown)["sample_id"].is_unique and len(grown) == len(vectors)
    pd.testing.assert_frame_equal(grown[table.columns][: len(table)], check_samples(table), check_dtype=False)
    np.testing.assert_array_equal(vectors[: len(table)], x)
    new, made = grown[len(table):], vectors[len(table):]
    place = pd.Series(np.arange(len(table)), index=table["sample_id"])
    a, b, step = place[new["parent"]].to_numpy(), place[new["other_parent"]].to_numpy(), new["step"].to_numpy()
    np.testing.assert_allclose(made, x[a] + step[:, None] * (x[b] - x[a]), atol=1e-12)
    assert (a != b).all() and step.min() >= 0 and step.max() <= 0.5 and len(np.unique(step)) > len(step) / 2
    for column in ("split", "gain") + (("query_id",) if within == "query" else ()):
        assert (table[column].to_numpy()[a] == table[column].to_numpy()[b]).all() and (table[column].to_numpy()[a] == new[column]).all()
    assert set(new["split"]) == {"train"} and set(new["item_text"]) == {SYNTHETIC_TEXT} and new["position"].isna().all()
    assert grades(grown).value_counts().nunique() == 1, "all grades are as large as the largest"
    assert check_weights(weights).index.tolist() == grades(grown).index.tolist()
    if within == "all":
        assert (table["query_id"].to_numpy()[a] != table["query_id"].to_numpy()[b]).any()


def test_partners_are_the_nearest_rows_of_the_query_and_grade():
    table, x = problem(5)
    grown, *_ = smote(table, x, k_neighbors=1, seed=0)
    new, place = grown[len(table):], pd.Series(np.arange(len(table)), index=table["sample_id"])
    nearest = {}
    for rows in table.groupby(["query_id", "gain"]).indices.values():
        distance = np.linalg.norm(x[rows][:, None] - x[rows][None], axis=2) + np.diag(np.full(len(rows), np.inf))
        nearest |= {row: rows[distance[number].argmin()] for number, row in enumerate(rows)}
    for a, b in zip(place[new["parent"]], place[new["other_parent"]]):
        assert nearest[a] == b or nearest[b] == a


def test_folds_are_not_mixed_and_weightless_rows_are_no_parents():
    table, x = problem(queries=18)
    ids = grades(table).index
    fold = pd.Series(np.arange(len(ids)) % 2, index=ids)
    weights = pd.Series(np.where(np.arange(len(ids)) % 5 == 0, 0.0, 1.0 + np.arange(len(ids)) % 3), index=ids)
    grown, _, new_weights = smote(table, x, weights / weights.mean(), within="all", fold=fold, k_neighbors=3)
    new = grown[len(table):]
    assert len(new) > 20 and (fold[new["parent"]].to_numpy() == fold[new["other_parent"]].to_numpy()).all()
    assert not (set(new["parent"]) | set(new["other_parent"])) & set(ids[weights == 0])
    between = (1 - new["step"]).to_numpy() * weights[new["parent"]].to_numpy() + new["step"].to_numpy() * weights[new["other_parent"]].to_numpy()
    np.testing.assert_allclose(new_weights[new["sample_id"]] / new_weights[ids[1]] * weights[ids[1]], between, rtol=1e-9)


def test_smote_does_not_depend_on_the_order_of_rows():
    table, x = problem(6)
    order = np.random.default_rng(2).permutation(len(table))
    first, second = smote(table, x, seed=3), smote(table.iloc[order], x[order], seed=3)
    new = [one.samples[len(table):].assign(vector=list(map(tuple, one.vectors[len(table):]))).sort_values("sample_id")[["sample_id", "step", "vector"]].to_numpy().tolist() for one in (first, second)]
    assert new[0] == new[1] and smote(table, x, seed=4).samples["step"].dropna().tolist() != first.samples["step"].dropna().tolist()


def test_a_head_learns_from_new_rows_and_a_model_of_texts_is_refused_them():
    table, x = problem()
    grown, vectors, weights = smote(table, x)
    learned = fine_tune(grown, weights, kind="head", vectors=vectors, ridge=0.1).head
    train = (grown["split"] == "train").to_numpy()
    by_hand = fit_head(vectors[train], grown.loc[train, "gain"].to_numpy(), ridge=0.1, weights=weights.to_numpy())
    np.testing.assert_allclose(learned.weights, by_hand.weights, atol=1e-7)
    refuse_synthetic(table)
    for call in (lambda: refuse_synthetic(grown), lambda: smote(grown, vectors)):
        with pytest.raises(DataError, match="are synthetic"):
            call()


def test_nothing_to_grow_gives_the_table_back():
    table, x = problem()
    same = table[table["gain"] < 1].groupby(["split", "gain"]).head(3)
    grown = smote(same, x[same.index])
    assert len(grown.samples) == len(same) and set(grown.weights) == {1.0}


# ---- bad input

def changed(**columns):
    return problem()[0].assign(**columns)


@pytest.mark.parametrize(("call", "words"), [
    (lambda t, x, w: bootstrap(w * 2), "mean 2"), (lambda t, x, w: bootstrap(w - 2), "negative"), (lambda t, x, w: bootstrap(w.where(w.index != w.index[0])), "not finite"), (lambda t, x, w: bootstrap(w.to_numpy()), "ndarray"),
    (lambda t, x, w: bootstrap(w, 0), "n is 0"), (lambda t, x, w: bootstrap(w, 2.5), "n is 2.5"), (lambda t, x, w: bootstrap(w, draws="residual"), "draws is 'residual'"), (lambda t, x, w: bootstrap(w, seed=-1), "seed is -1"),
    (lambda t, x, w: bootstrap(w, group=w.iloc[3:]), "3 training rows have none"), (lambda t, x, w: bootstrap(w, group=list("ab")), "found list"),
    (lambda t, x, w: oversample(t, grades(t).iloc[2:]), "2 training rows have none"), (lambda t, x, w: oversample(t, grades(t) * 0), "all 60 training rows are of one class"),
    (lambda t, x, w: oversample(t, grades(t), sampling_strategy={9: 100}), "names classes that no training row has: 9"), (lambda t, x, w: oversample(t, grades(t), sampling_strategy={2: 3}), "imbalanced-learn refuses"),
    (lambda t, x, w: undersample(t, grades(t), sampling_strategy="some"), "imbalanced-learn refuses"), (lambda t, x, w: undersample(t, grades(t), sampling_strategy=3), "sampling_strategy is 3"),
    (lambda t, x, w: oversample(t.assign(split="test"), w), "no row is of split 'train'"), (lambda t, x, w: oversample(t.drop(columns="split"), w), "column split is missing"), (lambda t, x, w: grades(t.assign(gain=np.nan)), "gains are missing"),
    (lambda t, x, w: tomek_links(t, grades(t), x[:-1]), "have the shape"), (lambda t, x, w: tomek_links(t, grades(t), np.where(x > 0, x, np.inf)), "no finite number"), (lambda t, x, w: edited_neighbours(t, grades(t), x, agreeing="none"), "imbalanced-learn refuses"),
    (lambda t, x, w: smote(t, x, within="item"), "within is 'item'"), (lambda t, x, w: smote(t, x, k_neighbors=0), "k_neighbors is 0"), (lambda t, x, w: smote(t, x[:-1]), "have the shape"), (lambda t, x, w: smote(t, x * np.nan), "no finite number"),
    (lambda t, x, w: smote(t, x, k_neighbors=12), "grade 2 has 12 rows"), (lambda t, x, w: smote(t.assign(query_id=t["sample_id"]), x), "no query has two rows of grade"),
    (lambda t, x, w: smote(t, x, w.iloc[1:]), "1 training rows have no weight"), (lambda t, x, w: smote(t, x, pd.Series(1.0, index=t["sample_id"])), "60 of them to rows of another split"), (lambda t, x, w: smote(t.drop(columns="item_text"), x), "item_text is missing"),
    (lambda t, x, w: smote(t, x, sampling_strategy={2: 1}), "imbalanced-learn refuses"), (lambda t, x, w: smote(t, x, within="all", fold=w.iloc[5:]), "5 training rows have none"),
    (lambda t, x, w: apply_weights(t, pd.Series(1.0, index=t["sample_id"])), "rows of another split"),
])
def test_input_that_will_not_do(call, words):
    table, x = problem()
    with pytest.raises(DataError, match=words):
        call(table, x, pd.Series(1.0, index=grades(table).index))
