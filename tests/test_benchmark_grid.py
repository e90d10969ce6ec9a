"""The grid: whatever an estimator does is a line of the table, what is finished is not run again, and a run that was stopped goes on."""
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ecom_importance.benchmark import grid
from ecom_importance.benchmark.grid import COLUMNS, SURROUNDINGS, TASKS, Condition, Shelf, cross, gather, load_estimators, prepare, run_grid, run_plan, value
from ecom_importance.importance import score
from ecom_importance.importance.estimators import ESTIMATORS
from ecom_importance.preprocessing.demo import load_demo
from ecom_importance.samples import DataError

pytestmark = pytest.mark.usefixtures("registry_as_it_was")
SMALL = dict(rows=400, trusted=[50])
BASELINES = ["random", "oof_loss", "trusted_loss"]
MINE = '''
import os, time
from pathlib import Path
import numpy as np
from ecom_importance.importance import estimator

def baseline(function):
    return estimator(family="baseline", source="a test")(function)

@baseline
def raises(y) -> np.ndarray:
    "Raises."
    raise RuntimeError("not today\\nsecond line")

@baseline
def too_short(y) -> np.ndarray:
    "Forgets a row."
    return y[:-1]

@baseline
def not_a_number(y) -> np.ndarray:
    "NaN."
    return y * np.nan

@baseline
def seeks_the_ledger(noise) -> np.ndarray:
    "Wants what was planted."
    return noise

@baseline
def seeks_the_truth(true_gain) -> np.ndarray:
    "Wants the gains of before."
    return true_gain

@baseline
def prints(y) -> np.ndarray:
    "Prints, which must not disturb the worker's words."
    print("hello")
    os.write(1, b"more")
    return y

@baseline
def never_ends(y) -> np.ndarray:
    "Sleeps."
    time.sleep(600)
    return y

@baseline
def takes_all_down(y) -> np.ndarray:
    "Ends its process."
    os._exit(7)

@baseline
def counts_its_calls(y) -> np.ndarray:
    "Leaves a mark a call."
    with open(os.environ["MARKS"], "a") as marks:
        marks.write("x")
    return y
'''
BAD = ["raises", "too_short", "not_a_number", "seeks_the_ledger", "seeks_the_truth", "prints", "never_ends", "takes_all_down", "counts_its_calls"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "One condition with everything that goes wrong, and what it left behind."
    before, folder = dict(ESTIMATORS), tmp_path_factory.mktemp("grid")
    mine, marks = folder / "mine.py", folder / "marks"
    mine.write_text(MINE)
    os.environ["MARKS"] = str(marks)
    table = run_grid(cross(["search"], ["flip"], [0.2], **SMALL), [*BASELINES, *BAD, "grad_dot"], folder, files=[mine], budget=8, workers=1, progress=False, tasks=["detection", "gain"])
    yield folder, mine, marks, table
    ESTIMATORS.clear()
    ESTIMATORS.update(before)


def lines(table, estimator, task="valuing"):
    return table[(table["estimator"] == estimator) & (table["task"] == task)]


def test_everything_that_goes_wrong_is_a_line_and_the_rest_goes_on(ran):
    folder, mine, marks, table = ran
    told = {name: lines(table, name)[["status", "message"]].iloc[0].tolist() for name in [*BASELINES, *BAD, "grad_dot"]}
    assert all(len(lines(table, name)) == 1 for name in told)
    assert {name for name, (status, _) in told.items() if status == "done"} == {*BASELINES, "prints", "counts_its_calls", "grad_dot"}
    assert told["raises"] == ["raised", "RuntimeError: not today"]
    assert told["too_short"][0] == "raised" and "expected (396,)" in told["too_short"][1]
    assert told["not_a_number"][0] == "raised" and "396 values that are NaN" in told["not_a_number"][1]
    for name, wanted in (("seeks_the_ledger", "noise"), ("seeks_the_truth", "true_gain")):
        assert told[name][0] == "refused" and f"needs {wanted}, which this evidence does not hold" in told[name][1]
    assert told["never_ends"] == ["did not finish", "stopped after 8 s"] and lines(table, "never_ends")["seconds"].iloc[0] >= 8
    assert told["takes_all_down"][0] == "died" and "code 7" in told["takes_all_down"][1]
    assert list(table.columns) == COLUMNS and table[SURROUNDINGS].drop_duplicates().values.tolist() == [["search", "flip", 0.2, 0, 50, 400]]


def test_figures_are_those_of_the_task_itself(ran):
    folder, _, _, table = ran
    condition = cross(["search"], ["flip"], [0.2], **SMALL)[0]
    problem = prepare(condition)
    scores = score(problem.evidence, [*BASELINES, "grad_dot"], progress=False)
    for task in ("detection", "gain"):
        for line in TASKS[task](problem, scores).itertuples():
            found = lines(table, line.estimator, task).set_index("metric").loc[line.metric, "value"]
            assert found == pytest.approx(line.value, abs=1e-6), (task, line.estimator, line.metric)
    kept = pd.read_parquet(folder / "scores" / f"{condition.key}.parquet")
    # The worker has one thread and this process may have two: sums of single precision in another order, next to a column's size.
    for name in scores:
        np.testing.assert_allclose(kept[name], scores[name], rtol=1e-5, atol=1e-6 * np.abs(scores[name]).max(), err_msg=name)
    assert (lines(table, "grad_dot", "detection")["seconds"] == lines(table, "grad_dot")["seconds"].iloc[0]).all()
    assert {"oof", "trusted_oof", "the data"} <= set(table.loc[table["task"] == "shared", "estimator"])


def test_what_is_finished_is_not_run_again_and_a_new_one_runs_its_own_cells(ran):
    folder, mine, marks, table = ran
    assert marks.read_text() == "x"
    begun = time.perf_counter()
    same = run_grid(cross(["search"], ["flip"], [0.2], **SMALL), [*BASELINES, *BAD, "grad_dot"], folder, files=[mine], budget=8, workers=1, progress=False, tasks=["detection", "gain"])
    assert time.perf_counter() - begun < 4, "a worker was started"
    pd.testing.assert_frame_equal(same, table)
    more = run_grid(cross(["search"], ["flip"], [0.2], **SMALL), [*BASELINES, "counts_its_calls", "tracin"], folder, files=[mine], budget=60, workers=1, progress=False, tasks=["detection"])
    new = more.merge(table, how="left", indicator=True).query("_merge == 'left_only' and task != 'shared'")
    assert set(new["estimator"]) == {"tracin"} and marks.read_text() == "x"
    again = run_grid(cross(["search"], ["flip"], [0.2], **SMALL), ["counts_its_calls"], folder, files=[mine], again=["counts_its_calls"], workers=1, progress=False)
    assert marks.read_text() == "xx" and len(lines(again, "counts_its_calls")) == 1
    with pytest.raises(DataError, match="another folder"):
        run_grid(cross(["search"], ["flip"], [0.2], **SMALL), ["knn_shapley", "tracin"], folder, settings={"tracin": {}, "knn_shapley": {"k": 3}, "checkpoints": {}}, progress=False)


def test_a_changed_file_of_estimators_runs_anew_in_the_whole_folder_and_changed_data_are_refused(tmp_path):
    mine, data, folder = tmp_path / "mine.py", tmp_path / "judged.parquet", tmp_path / "grid"
    text = "import numpy as np\nfrom ecom_importance.importance import estimator\n@estimator(family='baseline', source='a test')\ndef mine(y) -> np.ndarray:\n    'A test.'\n    return {}\n"
    load_demo("search").query("split == 'select'").drop(columns=["split", "noise"]).to_parquet(data)
    both = [Condition("search", "flip", 0.2, rows=400, trusted=50), Condition(str(data), "flip", 0.2, rows=400, trusted=50)]
    mine.write_text(text.format("y"))
    first = run_grid(both, ["mine", "random", "oof_loss"], folder, tasks=["gain", "transfer"], files=[mine], workers=1, progress=False)
    assert first["status"].eq("done").all() and (first["task"] == "transfer").groupby(first["data"]).any().all()
    references = first[first["estimator"] == ""]
    assert not references.duplicated(["data", "task", "metric"]).any()
    mine.write_text(text.format("-y"))
    second = run_grid(both[:1], ["mine"], folder, tasks=["gain", "transfer"], files=[mine], workers=1, progress=False)
    figures = [table[table["task"].isin(["gain", "transfer"]) & (table["estimator"] == "mine")] for table in (first, second)]
    assert set(figures[1]["data"]) == {"search"} and len(lines(second, "random", "gain")) == len(lines(first, "random", "gain")), "the other condition's old figures are gone, and nothing else"
    assert not np.allclose(figures[0][figures[0]["data"] == "search"]["value"], figures[1]["value"])
    pd.testing.assert_frame_equal(second[second["estimator"] == ""].reset_index(drop=True), references.reset_index(drop=True))
    pd.read_parquet(data).assign(gain=lambda table: 1 - table["gain"]).to_parquet(data)
    with pytest.raises(DataError, match="judged.parquet.*not as it was"):
        run_grid(both, ["random"], folder, workers=1, progress=False)


def test_one_run_at_a_time_in_a_folder(tmp_path):
    with grid._alone(tmp_path), pytest.raises(DataError, match="another run is at work"):
        run_grid(cross(["search"], **SMALL), ["random"], tmp_path, progress=False)
    with grid._alone(tmp_path):
        pass


def test_one_estimator_does_not_fail_a_task_for_all():
    def task(problem, scores):
        if "bad" in scores:
            raise ValueError(f"bad among {len(scores.columns)}")
        if "always" in scores:
            raise ValueError("no such rows")
        return pd.DataFrame({"estimator": scores.columns})

    judged = grid._judge(task, None, pd.DataFrame(columns=["a", "b", "bad", "c", "d"]), ["a", "b", "bad", "c", "d"])
    assert [names for names, found, reason in judged if not reason] == [["a", "b"], ["c", "d"]] and [(names, reason) for names, _, reason in judged if reason] == [(["bad"], "ValueError: bad among 1")]
    assert [names for names, *_ in grid._judge(task, None, pd.DataFrame(columns=["always", "b"]), ["always", "b"])] == [["always"], ["b"]]
    assert grid._judge(task, None, pd.DataFrame(), []) == []


def test_scores_that_a_killed_run_did_not_write_are_made_again(tmp_path):
    shelf = Shelf(tmp_path, Condition("search"), 10)
    shelf.add("valuing", "written")
    shelf.add("valuing", "lost")
    shelf.add("detection", "lost", "ap", 0.5)
    shelf.scores = pd.DataFrame({"written": [1.0]}, index=["a"])
    shelf.write()
    assert Shelf(tmp_path, Condition("search"), 10, ["written", "lost"], {"detection": ["written", "lost"]}).missing() == (["lost"], {"detection": ["written", "lost"]})


def test_settings_are_compared_as_they_are_kept(tmp_path):
    one, how = cross(["search"], ["flip"], [0.2], **SMALL), dict(settings={"levels": {"values": (0.0, 0.5, 1.0)}}, workers=1, progress=False)
    first = run_grid(one, ["random"], tmp_path, **how)
    pd.testing.assert_frame_equal(run_grid(one, ["random"], tmp_path, **how), first)


def test_a_larger_budget_tries_again_and_absent_data_are_looked_for_again(tmp_path):
    shelf = Shelf(tmp_path, Condition("search"), 10)
    shelf.add("valuing", "slow", seconds=10.3, status="did not finish")
    shelf.add("valuing", "absent", status="no problem")
    shelf.add("valuing", "raised", status="raised")
    shelf.write()
    names = ["slow", "absent", "raised"]
    assert Shelf(tmp_path, Condition("search"), 10, names).missing()[0] == ["absent"]
    assert Shelf(tmp_path, Condition("search"), 60, names).missing()[0] == ["slow", "absent"]


def test_data_that_are_too_few_or_absent_are_lines(tmp_path):
    few = pd.DataFrame({"query": [f"query {i // 2}" for i in range(12)], "item": [f"item {i}" for i in range(12)], "gain": [0, 1] * 6})
    few = few.assign(query_id=few["query"], item_id=few["item"], item_text=few["item"], sample_id=[f"s{i}" for i in range(12)]).drop(columns="item")
    few.to_csv(tmp_path / "few.csv", index=False)
    table = run_grid(cross([str(tmp_path / "few.csv"), str(tmp_path / "absent.csv"), "search"], ["flip"], [0.2], **SMALL), ["random"], tmp_path / "run", progress=False)
    told = table[table["task"] == "valuing"].set_index("data")
    assert told["status"].tolist().count("no problem") == 2 and told.loc["search", "status"] == "done"
    assert "6 queries, and" in told.loc[str(tmp_path / "few.csv"), "message"] and "are needed" in told.loc[str(tmp_path / "few.csv"), "message"]


def test_a_condition_of_several_parts_is_prepared_once(tmp_path):
    one, other = cross(["search"], ["flip"], [0.2], seeds=range(2), **SMALL)
    heard = []
    table = run_plan([([one, other], ["random"], ["detection"]), ([one], ["random", "oof_loss"], ["gain"])], tmp_path, workers=1, progress=False, told=lambda *counts: heard.append(counts))
    assert heard == [(1, 2), (2, 2)]
    assert table.groupby(["seed", "task"])["estimator"].agg(set).drop("shared", level="task").to_dict() == {
        (0, "valuing"): {"random", "oof_loss"}, (0, "detection"): {"random"}, (0, "gain"): {"", "random", "oof_loss"}, (1, "valuing"): {"random"}, (1, "detection"): {"random"}}
    assert ((table["estimator"] == "the data") & (table["metric"] == "")).sum() == 2


def test_noise_that_does_not_fit_is_a_line():
    table = run_grid([Condition("search", "flips", 0.2, rows=400, trusted=50)], ["random"], progress=False)
    assert table["status"].tolist() == ["no problem"] * 2 and "DataError" in table["message"].iloc[0]


def test_a_run_that_is_killed_goes_on(tmp_path):
    "The keeper is interrupted in the second estimator; what the first said is kept, and it is not run again."
    mine, marks = tmp_path / "mine.py", tmp_path / "marks"
    mine.write_text(MINE)
    script = textwrap.dedent(f"""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
        from ecom_importance.benchmark.grid import *
        run_grid(cross(["search"], ["flip"], [0.2], rows=400, trusted=[50]), ["counts_its_calls", "never_ends"], {str(tmp_path / 'run')!r}, files=[{str(mine)!r}], workers=1, progress=False)
    """)
    surroundings = os.environ | {"MARKS": str(marks)}
    keeper = subprocess.Popen([sys.executable, "-c", script], env=surroundings, stderr=subprocess.PIPE)
    while not marks.exists():
        assert keeper.poll() is None, keeper.stderr.read().decode()
        time.sleep(0.1)
    time.sleep(0.5)
    keeper.send_signal(signal.SIGINT)
    keeper.wait(20)
    os.environ["MARKS"] = str(marks)
    table = run_grid(cross(["search"], ["flip"], [0.2], **SMALL), ["counts_its_calls", "random"], tmp_path / "run", files=[mine], workers=1, progress=False)
    assert marks.read_text() == "x" and len(lines(table, "counts_its_calls")) == 1 and len(lines(table, "counts_its_calls", "detection")) == 12
    assert not lines(table, "never_ends").shape[0]


@pytest.mark.parametrize("text, what", [("x = 1", "registers no estimator"), ("raise ValueError('no')", r"raised ValueError: no \(line 1\)"), ("def broken(:", "raised SyntaxError")])
def test_a_file_that_cannot_be_used_is_told_before_anything_runs(tmp_path, text, what):
    before = dict(ESTIMATORS)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(DataError, match=what):
        run_grid([Condition("search")], ["random"], tmp_path, files=[tmp_path / "mine.py"])
    with pytest.raises(DataError, match="no such file"):
        load_estimators(tmp_path / "absent.py")
    assert ESTIMATORS == before


def test_a_file_is_loaded_anew_and_may_not_take_a_name(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    assert load_estimators(tmp_path / "mine.py") == load_estimators(tmp_path / "mine.py") == BAD
    (tmp_path / "taken.py").write_text(MINE.split("@baseline")[0] + "@baseline\ndef loss(y) -> np.ndarray:\n    'Taken.'\n    return y\n")
    with pytest.raises(DataError, match="loss"):
        load_estimators(tmp_path / "taken.py")


def test_a_file_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "beside_mine.py").write_text("K = 2\n")
    (tmp_path / "mine.py").write_text("import numpy as np\nfrom beside_mine import K\nfrom ecom_importance.importance import estimator\n@estimator(family='baseline', source='a test')\ndef with_help(y) -> np.ndarray:\n    'A test.'\n    return K * y\n")
    before = list(sys.path)
    assert load_estimators(tmp_path / "mine.py") == ["with_help"] and sys.path == before
    monkeypatch.chdir(tmp_path)
    Path("slip.py").write_text("from ecom_importance.importance import estimator\n\n@estimator\ndef one(y):\n    return y\n")
    with pytest.raises(DataError, match=r"\(line 3\)"):
        load_estimators("slip.py")


@pytest.mark.parametrize("given, what", [(dict(tasks=["detektion"]), "no task 'detektion'"), (dict(estimators=["los"]), "no estimator 'los'"), (dict(again=["los"]), "no estimator 'los'"), (dict(workers=0), "at least one worker"), (dict(budget=0), "budget above 0")])
def test_wrong_names_and_numbers(given, what):
    with pytest.raises(DataError, match=what):
        run_grid([Condition("search")], **({"estimators": ["random"]} | given))


def test_memory_is_that_of_the_estimator():
    problem = prepare(Condition("search", "flip", 0.2, rows=400, trusted=50))

    def holds_a_lot(y) -> np.ndarray:
        "Two hundred megabytes."
        return np.ones(25_000_000)[: len(y)] * y

    from ecom_importance.importance import estimator

    estimator(family="baseline", source="a test")(holds_a_lot)
    assert value(problem, "random")[1]["peak_mb"] < 20
    peak = value(problem, "holds_a_lot")[1]["peak_mb"]
    assert np.isnan(peak) or 150 < peak < 300


def test_conditions_have_names_of_their_own(tmp_path):
    every = cross(["search", str(tmp_path / "a" / "x.csv"), str(tmp_path / "b" / "x.csv")], ["flip", "whole_query"], [0.05, 0.1], seeds=range(3), trusted=[50, 200], control=True)
    assert len({one.key for one in every}) == len(every) == 3 * 3 * 2 * 5
    assert [one.seed for one in every] == sorted(one.seed for one in every)


def test_an_empty_folder_gives_an_empty_table(tmp_path):
    assert gather(tmp_path).columns.tolist() == COLUMNS and grid.run_grid([], ["random"], tmp_path).empty
