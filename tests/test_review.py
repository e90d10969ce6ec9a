"""The review queue: its values against refitting, its order against all subsets, and files that go out and come back."""
import json
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.importance import Evidence, find
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.heads import fit_head
from ecom_importance.importance.ranking import surrogate
from ecom_importance.samples import DataError
from ecom_importance.weighting import apply_corrections, expected_gain, read_corrections, review_queue, write_queue
from ecom_importance.weighting.review import label_slope


@pytest.mark.parametrize("seed", [0, 1])
def test_the_slope_is_what_refitting_gives(seed):
    evidence, _ = example_evidence(150, 60, d=5, seed=seed)
    head, slope = find(evidence, "head"), label_slope(evidence).to_numpy()
    x, y, xv, yv = (find(evidence, name).astype(float) for name in ("x", "y", "x_valid", "y_valid"))
    frozen, query = head.logit(xv), find(evidence, "query_id_valid")
    bounds = np.r_[0, np.flatnonzero(query[1:] != query[:-1]) + 1, len(query)]

    def value(labels):
        scores = fit_head(x, labels, ridge=head.ridge, tolerance=1e-13).logit(xv)
        return -sum(surrogate(yv[a:b], scores[a:b], frozen[a:b]) for a, b in zip(bounds, bounds[1:]))

    rows, found = range(0, 150, 15), []
    for row in rows:
        step = np.eye(1, 150, row)[0] * 0.01
        found.append((value(y + step) - value(y - step)) / 0.02)
    np.testing.assert_allclose(slope[list(rows)], found, atol=2e-3 * np.abs(found).max())


def test_a_label_that_is_as_expected_has_nothing_to_gain():
    evidence, _ = example_evidence(100, 40)
    y = pd.Series(find(evidence, "y"), index=evidence.sample_ids)
    assert (expected_gain(evidence, y) == 0).all()
    np.testing.assert_allclose(expected_gain(evidence, 1 - y), (1 - 2 * y) * label_slope(evidence))
    with pytest.raises(DataError, match="1 training rows have no expected gain"):
        expected_gain(evidence, y.iloc[1:])
    with pytest.raises(DataError, match="no trusted rows"):
        label_slope(Evidence(dict(evidence.train), {}))


@st.composite
def queues(draw):
    n = draw(st.integers(1, 8))
    query = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    value = draw(st.lists(st.floats(-2, 10), min_size=n, max_size=n))
    cost = draw(st.lists(st.floats(0.1, 5), min_size=n, max_size=n))
    return query, value, cost, draw(st.sampled_from([0.0, 1.0, 7.5]))


@settings(max_examples=60, deadline=None)
@given(queues())
def test_the_first_bundle_is_the_densest_set_of_all(problem):
    query, value, cost, opening = problem
    names = [f"s{i}" for i in range(len(query))]
    samples = pd.DataFrame({"sample_id": names, "query_id": query})
    queue = review_queue(samples, pd.Series(value, index=names), row_cost=pd.Series(cost, index=names), query_cost=opening)
    density = lambda rows: sum(value[i] for i in rows) / (sum(cost[i] for i in rows) + opening * len({query[i] for i in rows}))
    able = [i for i in range(len(query)) if value[i] > 0]
    assert sorted(queue["sample_id"]) == sorted(names[i] for i in able)
    if able:
        best = max(density(rows) for n in range(1, len(able) + 1) for rows in combinations(able, n))
        assert (queue["total_value"] / queue["total_cost"]).max() == pytest.approx(best)
        whole = sum(cost[i] for i in able) + opening * len({query[i] for i in able})
        assert queue["total_cost"].iloc[-1] == pytest.approx(whole) and queue["total_value"].iloc[-1] == pytest.approx(sum(value[i] for i in able))


def test_without_a_price_of_queries_it_sorts_by_value_over_cost():
    rng = np.random.default_rng(0)
    samples = pd.DataFrame({"sample_id": range(50), "query_id": rng.integers(0, 9, 50)})
    value, cost = pd.Series(rng.random(50) + 0.1), pd.Series(rng.random(50) + 0.5)
    assert list(review_queue(samples, value, row_cost=cost)["sample_id"]) == list((value / cost).sort_values(ascending=False, kind="stable").index)
    short = review_queue(samples, value, row_cost=cost, budget=5.0)
    assert 0 < len(short) < 50 and short["total_cost"].iloc[-1] <= 5


@pytest.mark.parametrize(("change", "words"), [
    ({"value": [1, 2, 3]}, "no Series"), ({"value": pd.Series([1.0, 1.0], index=["a", "a"])}, "one value a sample_id"), ({"value": pd.Series([1.0], index=["z"])}, "belong to no sample: 'z'"),
    ({"value": pd.Series([np.nan, 1.0], index=["a", "b"])}, "1 values are not finite"), ({"row_cost": 0}, "2 row costs"), ({"row_cost": pd.Series([1.0], index=["a"])}, "1 row costs"),
    ({"query_cost": -1}, "query_cost is -1"), ({"budget": 0}, "budget 0"), ({"samples": pd.DataFrame({"sample_id": ["a", "b"]})}, "no column query_id"),
])
def test_queues_that_cannot_be_made(change, words):
    given_ = {"samples": pd.DataFrame({"sample_id": ["a", "b"], "query_id": [1, 1]}), "value": pd.Series([1.0, 2.0], index=["a", "b"])} | change
    with pytest.raises(DataError, match=words):
        review_queue(given_.pop("samples"), given_.pop("value"), **given_)


@pytest.fixture
def shop():
    return pd.DataFrame({"sample_id": [11, 12, 13, 14], "query_id": [1, 1, 2, 2], "query": ["手机壳", "手机壳", '12" <lamp> & co', '12" <lamp> & co'], "item_text": ["透明手机保护壳", "鞋", "brass, lamp", "=1+1"],
                         "label": ["E", "I", "S", "E"], "gain": [1.0, 0.0, 0.1, 1.0], "split": ["train", "train", "train", "test"]})


def test_a_table_goes_out_and_comes_back(shop, tmp_path):
    queue = review_queue(shop, pd.Series([1.0, 2.0, 3.0], index=[11, 12, 13]))
    file = write_queue(queue, tmp_path / "queue.csv")
    sheet = pd.read_csv(file, dtype=str, keep_default_na=False)
    assert file.read_bytes().startswith(b"\xef\xbb\xbf") and list(sheet["sample_id"]) == ["13", "12", "11"] and sheet["query"][2] == "手机壳"
    assert read_corrections(file).empty
    sheet["corrected"] = ["E", "", " I "]
    sheet.to_csv(file, index=False, encoding="utf-8-sig")
    corrected, changed = apply_corrections(shop, read_corrections(file))
    assert corrected["gain"].tolist() == [0.0, 0.0, 1.0, 1.0] and corrected["label"].tolist() == ["I", "I", "E", "E"] and shop["gain"].tolist() == [1.0, 0.0, 0.1, 1.0]
    assert changed["sample_id"].tolist() == [13, 11] and changed["gain_before"].tolist() == [0.1, 1.0]


def test_label_studio_tasks_and_export(shop, tmp_path):
    queue = review_queue(shop, pd.Series([1.0, 2.0, 3.0], index=[11, 12, 13]))
    file = write_queue(queue, tmp_path / "tasks.json", labels=["E", "S", "I", 'C & "D"'])
    tasks = json.loads(file.read_text(encoding="utf-8"))
    assert [task["data"]["sample_id"] for task in tasks] == [13, 12, 11] and "手机壳" in file.read_text(encoding="utf-8")
    view = ElementTree.fromstring((tmp_path / "tasks.xml").read_text(encoding="utf-8"))
    names = {each.get("name") for each in view.iter() if each.get("name")}
    assert names == {"item", "corrected"} and [each.get("value") for each in view.iter("Choice")] == ["E", "S", "I", 'C & "D"']
    assert {tag for task in tasks for each in task["predictions"][0]["result"] for tag in (each["from_name"], each["to_name"])} == names
    for task, label, cancelled in zip(tasks, ("E", "S", "E"), (False, True, False)):
        task["annotations"] = [{"was_cancelled": cancelled, "result": [{"from_name": "corrected", "to_name": "item", "type": "choices", "value": {"choices": [label]}}]}]
    file.write_text(json.dumps(tasks), encoding="utf-8")
    said = read_corrections(file)
    assert said.to_dict() == {"13": "E", "11": "E"}
    corrected, changed = apply_corrections(shop, said)
    assert corrected["gain"].tolist() == [1.0, 0.0, 1.0, 1.0] and changed["sample_id"].tolist() == [13]


def test_reviewers_who_disagree_are_named(tmp_path):
    (tmp_path / "c.csv").write_text("sample_id,corrected\n1,E\n2,I\n1,I\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 rows were given two labels: '1'"):
        read_corrections(tmp_path / "c.csv")


@pytest.mark.parametrize("name, text", [("a.csv", "x,y\n1,2\n"), ("a.json", "{"), ("a.json", '[{"data": {}, "annotations": [{"result": []}], "x": 1}, 3]'), ("absent.csv", None)])
def test_files_that_hold_no_corrections(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="no corrections can be read"):
        read_corrections(tmp_path / name)


@pytest.mark.parametrize("corrections, words", [
    ({"99": "E"}, "belong to no sample: '99'"), ({"14": "I"}, "rows of other splits: '14'"), ({"11": "X"}, "has the label 'X'"),
])
def test_corrections_that_do_not_fit(shop, corrections, words):
    with pytest.raises(DataError, match=words):
        apply_corrections(shop, pd.Series(corrections))
    assert apply_corrections(shop, pd.Series({14: "I"}), splits=("train", "test"))[0]["gain"].iloc[3] == 0


@pytest.mark.parametrize("name, labels, words", [("q.txt", [], "cannot be written as 'q.txt'"), ("q.json", [], "no labels to choose from")])
def test_queues_that_cannot_be_written(shop, tmp_path, name, labels, words):
    queue = review_queue(shop, pd.Series([1.0], index=[11]))
    with pytest.raises(DataError, match=words):
        write_queue(queue, tmp_path / name, labels=labels)
    with pytest.raises(DataError, match="no column label"):
        write_queue(queue.drop(columns="label"), tmp_path / "q.csv")
    assert not list(tmp_path.iterdir())


def test_a_carriage_return_in_a_title_does_not_end_its_row(tmp_path):
    queue = pd.DataFrame({"sample_id": ["s1", "s2"], "query": ["保温杯", "mug"], "item_text": ["cup\rblue, large", "mug\r\n\"red\""], "label": ["E", "I"], "value": [0.5, 0.25]})
    read = pd.read_csv(write_queue(queue, tmp_path / "queue.csv"), encoding="utf-8-sig")
    assert read["item_text"].tolist() == queue["item_text"].tolist() and read["sample_id"].tolist() == ["s1", "s2"]
