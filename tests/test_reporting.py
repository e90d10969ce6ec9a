"""Strict runs: what is refused, what is kept, and what a kill leaves behind."""
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance import reporting
from ecom_importance.reporting import (
    Parameter, ReportFailed, Run, UsageError, check_parameters, claim, draw_formula, find_report, fingerprint, identify, list_reports,
    package_fingerprint, read_parameters, read_stages, render_html, run_report, to_json,
)

SETTINGS = '''rows: int = 4
label: str = "全部"
fail: bool = False
sleep: float = 0.0
out: str = ""'''
WORK = '''
import os, time, warnings
import numpy as np
from ecom_importance.reporting import Run
run = Run(out)
def count(name):
    with open(os.environ["COUNT"], "a") as log:
        print(name, os.getpid(), file=log)
def first():
    count("first")
    return np.arange(rows)
def second():
    count("second")
    time.sleep(sleep or float(os.environ.get("SLEEP", 0)))
    return {"sum": int(a.sum())}
a = run.keep("first.npy", first, inputs={"rows": rows})
b = run.keep("second.json", second, inputs={"a": a})
'''


def write_report(path: Path, *cells) -> Path:
    "A report with the usual parameters, two stages, and further cells."
    markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [markdown("# Two stages\n\nWith $w_i \\ge 0$."), code(SETTINGS, metadata={"tags": ["parameters"]}), markdown("## Counting"), code(WORK),
             markdown("## 结论"), *cells, code("if fail:\n    raise RuntimeError('as\\n told')\nrun.record(b=b, verdicts=['counted'])\nrun.write_results();")]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture
def counted(tmp_path, monkeypatch):
    "The lines that stages append when they are computed."
    monkeypatch.setenv("COUNT", str(tmp_path / "count.log"))
    return lambda: [line.split()[0] for line in (tmp_path / "count.log").read_text().splitlines()] if (tmp_path / "count.log").exists() else []


@pytest.fixture
def report(tmp_path):
    return write_report(tmp_path / "two.ipynb")


# ---- parameters

DECLARED = read_parameters(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('''
seeds: int = 3  # how many
rate: float = 0.0
name: str = "a"  # a text with a # in "it"
flag: bool = False
top: int | None = None
either: Optional[Literal["x", "y"]] = None
arms: list[str] = ["uniform"]
sizes: dict[str, int] = {"a": 1}
keep: list = [0.6, 0.8]
names = ["a", "b"]
plain = 7
negative = -0.5
''', metadata={"tags": ["parameters"]})]))


def test_parameters_are_read_with_types_defaults_and_help():
    assert {p.name: (p.kind, p.default) for p in DECLARED.values()}["top"] == (int | None, None)
    assert DECLARED["plain"].kind is int and DECLARED["negative"] == Parameter("negative", float, -0.5)
    assert DECLARED["seeds"].help == "how many" and DECLARED["name"].help == 'a text with a # in "it"' and DECLARED["rate"].help == ""
    assert list(DECLARED) == ["seeds", "rate", "name", "flag", "top", "either", "arms", "sizes", "keep", "names", "plain", "negative"]


@pytest.mark.parametrize(("name", "text", "value"), [
    ("seeds", "5", 5), ("seeds", "-5", -5), ("rate", "1e-3", 1e-3), ("rate", "2", 2.0), ("name", "12", "12"), ("name", "", ""), ("name", "水龙头 🚰", "水龙头 🚰"),
    ("flag", "true", True), ("flag", "No", False), ("top", "none", None), ("top", "4", 4), ("either", "x", "x"), ("either", "none", None),
    ("arms", "a, b", ["a", "b"]), ("arms", "['a', 'b,c']", ["a", "b,c"]), ("arms", "", []), ("sizes", "{'a': 2}", {"a": 2}), ("sizes", "a=2, b = 3", {"a": 2, "b": 3}), ("sizes", "", {}), ("keep", "0.5,1", [0.5, 1.0]), ("names", "c,1", ["c", "1"]),
])
def test_texts_are_read_as_the_declared_type(name, text, value):
    checked = check_parameters(DECLARED, {name: text}, texts=True)[name]
    assert checked == value and type(checked) is type(value)


@pytest.mark.parametrize(("name", "text"), [
    ("seeds", "5.5"), ("seeds", "five"), ("seeds", ""), ("rate", "high"), ("rate", "nan"), ("flag", "2"), ("top", "1.5"), ("either", "z"), ("sizes", "{'a': 'b'}"),
    ("sizes", "a"), ("sizes", "a=b"), ("keep", "half"), ("names", "[1, 2]"), ("arms", "[1, 2]"), ("arms", "[oops"),
])
def test_ill_typed_texts_are_refused_by_name(name, text):
    with pytest.raises(UsageError, match=f"parameter '{name}' is "):
        check_parameters(DECLARED, {name: text}, texts=True)


@pytest.mark.parametrize(("name", "value"), [("seeds", True), ("seeds", 3.0), ("seeds", "3"), ("rate", "0.1"), ("rate", True), ("name", 1), ("name", None), ("flag", 1), ("arms", "a"), ("arms", [1])])
def test_values_from_python_are_checked_but_not_converted(name, value):
    with pytest.raises(UsageError, match=f"parameter '{name}' is "):
        check_parameters(DECLARED, {name: value})


def test_values_from_python_that_fit():
    fits = {"seeds": np.int64(4), "rate": 1, "name": Path("a"), "arms": ("a", "b"), "top": None}
    assert check_parameters(DECLARED, fits) == {"seeds": 4, "rate": 1, "name": "a", "arms": ["a", "b"], "top": None}


@pytest.mark.parametrize(("typed", "meant"), [("seed", "seeds"), ("Rate", "rate"), ("arm", "arms"), ("eithre", "either")])
def test_an_unknown_parameter_suggests_the_nearest(typed, meant):
    with pytest.raises(UsageError, match=f"unknown parameter '{typed}': did you mean '{meant}'"):
        check_parameters(DECLARED, {typed: "1"}, texts=True)


@pytest.mark.parametrize("source", ["x = open", "x: int = 1 + y", "x: DataFrame = None"])
def test_a_parameters_cell_that_cannot_be_checked_is_an_error_of_the_report(source):
    with pytest.raises(UsageError, match="parameter 'x' of the report"):
        read_parameters(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})]))


# ---- fingerprints

plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(plain, plain)
def test_values_have_equal_fingerprints_when_they_are_written_alike(a, b):
    def canonical(value):
        return {key: canonical(value[key]) for key in sorted(value)} if isinstance(value, dict) else [canonical(one) for one in value] if isinstance(value, list) else value

    assert (fingerprint(a) == fingerprint(b)) == (repr(canonical(a)) == repr(canonical(b)))


def test_nesting_cannot_be_mistaken_for_a_row():
    assert len({fingerprint(value) for value in ([[1], 2], [[1, 2]], [[1], [2]], [1, 2], [[], 1, 2])}) == 5


def test_arrays_tables_and_files_count_by_content(tmp_path):
    array = np.random.default_rng(0).random((1000, 7)).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    assert fingerprint(np.load(tmp_path / "a.npy", mmap_mode="r")[:]) == fingerprint(array) == fingerprint(np.asfortranarray(array))
    changed = array.copy()
    changed[999, 6] += 1
    assert fingerprint(changed) != fingerprint(array)
    (tmp_path / "x").write_text("水龙头")
    (tmp_path / "y").write_text("水龙头")
    assert fingerprint(tmp_path / "x") == fingerprint(tmp_path / "y")
    (tmp_path / "y").write_text("水龙")
    assert fingerprint(tmp_path / "x") != fingerprint(tmp_path / "y")


def test_large_arrays_are_hashed_in_blocks_without_a_change(monkeypatch):
    array = np.arange(10_000, dtype=np.int64).reshape(100, 100)
    whole = fingerprint(array)
    monkeypatch.setattr(reporting, "BLOCK", 1_000)
    assert fingerprint(array) == whole


def test_what_has_no_content_has_no_fingerprint():
    with pytest.raises(TypeError, match="function has no fingerprint"):
        fingerprint({"f": lambda: 1})


# ---- results

@settings(max_examples=100, deadline=None)
@given(st.recursive(plain | st.floats() | st.just(np.float32("nan")) | st.just(pd.NaT) | st.just(np.arange(3)), lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_every_figure_becomes_strict_json(value):
    json.loads(json.dumps(to_json(value), allow_nan=False))


def test_tables_become_rows_or_mappings():
    frame = pd.DataFrame({"effect": [0.1, np.nan]}, index=["weighted", "uniform"])
    assert to_json(frame) == {"weighted": {"effect": 0.1}, "uniform": {"effect": None}}
    assert to_json(frame.reset_index(drop=True)) == [{"effect": 0.1}, {"effect": None}]
    assert to_json(pd.Timestamp("2017-01-02")) == "2017-01-02T00:00:00" and to_json(Path("a/b")) == "a/b" and to_json(pd.NA) is None


# ---- stages

def test_a_value_is_read_back_as_it_was(tmp_path):
    run = Run(tmp_path)
    frame = pd.DataFrame({"sample_id": ["a", "b"], "score": [1.5, np.nan]}).set_index("sample_id")
    weights = pd.Series([0.5, 1.5], index=pd.Index(["a", "b"], name="sample_id"), name="weight")
    for _ in range(2):
        pd.testing.assert_frame_equal(run.keep("scores.parquet", lambda: frame, inputs=1), frame)
        pd.testing.assert_series_equal(run.keep("weights.parquet", lambda: weights, inputs=1), weights)
        np.testing.assert_array_equal(run.keep("vectors.npy", lambda: np.eye(3, dtype=np.float32), inputs=1), np.eye(3))
        assert run.keep("found.json", lambda: {"n": np.int64(3), "词": "水"}, inputs=1) == {"n": 3, "词": "水"}
    assert {entry["state"] for entry in run.stages.values()} == {"kept"}


def test_a_folder_may_be_kept_and_is_replaced_whole(tmp_path):
    def save(value, path):
        path.mkdir()
        (path / f"{value}.txt").write_text(value)

    run, load = Run(tmp_path), lambda path: sorted(file.name for file in path.iterdir())
    assert run.keep("model", lambda: "a", inputs="a", save=save, load=load) == ["a.txt"]
    assert run.keep("model", lambda: "b", inputs="b", save=save, load=load) == ["b.txt"]
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_stage_that_fails_leaves_no_file_and_is_computed_again(tmp_path):
    run = Run(tmp_path)
    run.keep("a.npy", lambda: np.zeros(2), inputs=1)
    with pytest.raises(ZeroDivisionError):
        run.keep("a.npy", lambda: 1 / 0, inputs=2)
    assert read_stages(tmp_path)["a"]["state"] == "failed"
    assert Run(tmp_path).keep("a.npy", lambda: np.ones(2), inputs=1).tolist() == [1, 1], "the old entry was taken back before the attempt"


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    run = Run(tmp_path)
    run.keep("a.json", lambda: [1], inputs=1)
    def save(value, path):
        path.write_text("[2")
        raise OSError("disk full")
    with pytest.raises(OSError):
        run.keep("a.json", lambda: [2], inputs=2, save=save)
    assert json.loads((tmp_path / "a.json").read_text()) == [1] and sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "stages.json"]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[::-1])])
def test_a_damaged_file_is_not_trusted(tmp_path, damage):
    Run(tmp_path).keep("a.npy", lambda: np.zeros(2), inputs=1)
    damage(tmp_path / "a.npy")
    assert Run(tmp_path).keep("a.npy", lambda: np.ones(2), inputs=1).tolist() == [1, 1]


def test_a_damaged_list_of_stages_costs_a_computation_only(tmp_path):
    Run(tmp_path).keep("a.npy", lambda: np.zeros(2), inputs=1)
    (tmp_path / "stages.json").write_text('{"a": ')
    assert Run(tmp_path).keep("a.npy", lambda: np.ones(2), inputs=1).tolist() == [1, 1]


def test_other_code_computes_again(tmp_path, monkeypatch):
    Run(tmp_path).keep("a.npy", lambda: np.zeros(2), inputs=1)
    monkeypatch.setattr(reporting, "package_fingerprint", lambda: "edited")
    assert Run(tmp_path).keep("a.npy", lambda: np.ones(2), inputs=1).tolist() == [1, 1]


def test_a_terminal_shows_how_far_a_stage_is_and_a_file_does_not(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, file, run = Terminal(), io.StringIO(), Run(tmp_path)
    watching = [reporting._Progress(tmp_path, stream) for stream in (terminal, file, None)]
    with run.stage("grid"):
        for so_far in ("a first and long word", "2 of 3"):
            run.tell("grid", so_far)
            for watch in watching:
                watch()
    for watch in watching:
        watch()
    shown, *rest = terminal.getvalue().split("\n")
    lines = [line.rstrip() for line in shown.split("\r")]
    assert rest == [""] and [line.split()[1:4] for line in lines[1:3]] == [["a", "first", "and"], ["2", "of", "3"]] and re.fullmatch(r"  grid +0\.\d s +[\d,]+ MB", lines[-1])
    assert all(len(after) >= len(before.rstrip()) for before, after in zip(shown.split("\r"), shown.split("\r")[1:])), "nothing of a longer line is left"
    assert re.fullmatch(r"  grid +0\.\d s +[\d,]+ MB\n", file.getvalue())
    assert "so_far" not in read_stages(tmp_path)["grid"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("")
    with run.stage("work"):
        pass
    assert run.keep("a.npy", lambda: [1], inputs=1) == [1]
    run.record(a=1)
    assert run.write_results() == {"a": 1} and not list(tmp_path.iterdir())


def test_peak_memory_is_that_of_the_stage(tmp_path):
    run = Run(tmp_path)
    with run.stage("large"):
        np.ones(60_000_000, dtype=np.uint8).sum()
    with run.stage("small"):
        pass
    large, small = run.stages["large"]["peak_mb"], run.stages["small"]["peak_mb"]
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system keeps one mark for the whole process")
    assert large - small > 40


# ---- folders

def test_a_folder_that_is_not_a_run_is_never_touched(tmp_path, report):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(UsageError, match="not a run's folder .it holds thesis.txt"):
            run_report(report, out=mine, resume=resume)
    assert [file.name for file in mine.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, report):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        run_report(report, out=tmp_path / "file")
    with pytest.raises(UsageError, match="cannot make"):
        run_report(report, out=tmp_path / "file" / "below")


def test_a_read_only_folder_is_refused_before_anything_runs(tmp_path, report, monkeypatch):
    # Root may write anywhere, so the system's refusal is imitated where it would come from.
    def refuse(path, write):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(reporting, "write_whole", refuse)
    monkeypatch.setattr(reporting, "_execute", lambda *_: pytest.fail("the notebook was started"))
    with pytest.raises(UsageError, match="cannot write to .*Permission denied"):
        run_report(report, out=tmp_path / "ro")


def test_a_broken_manifest_is_refused(tmp_path, report):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="manifest .* cannot be read"):
        run_report(report, out=tmp_path / "run")


def test_starting_over_removes_what_the_run_made_and_nothing_else(tmp_path):
    notebook = nbformat.v4.new_notebook()
    claim(tmp_path, identify("r", notebook, {"a": 1}))
    Run(tmp_path).keep("x.npy", lambda: np.zeros(1), inputs=1)
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path, identify("r", notebook, {"a": 2}), resume=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "notes.txt"]


def test_the_identity_counts_parameters_source_data_code_and_libraries(tmp_path, monkeypatch):
    data = tmp_path / "log.csv"
    data.write_text("a,b\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    same = identify("r", notebook, {"data": str(data), "glob": str(tmp_path / "*.csv")})
    assert same == identify("r", notebook, {"data": str(data), "glob": str(tmp_path / "*.csv")}) and set(same["data"]) == {"data", "glob"}
    claim(tmp_path / "run" if (tmp_path / "run").mkdir() else tmp_path / "run", same)

    def refused(identity) -> str:
        with pytest.raises(UsageError) as error:
            claim(tmp_path / "run", identity)
        return str(error.value)

    values = {"data": str(data), "glob": str(tmp_path / "*.csv")}
    assert "parameters.glob was" in refused(identify("r", notebook, {**values, "glob": ""}))
    assert "source has changed" in refused(identify("r", nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("2")]), values))
    assert "report was 'r', is now 's'" in refused(identify("s", notebook, values))
    data.write_text("a,c\n")
    assert f"data.data.{data} has changed" in refused(identify("r", notebook, values))
    data.write_text("a,b\n")
    claim(tmp_path / "run", identify("r", notebook, values))
    monkeypatch.setattr(reporting, "package_fingerprint", lambda: "edited")
    assert "package.code has changed" in refused(identify("r", notebook, values))


def test_outputs_of_the_source_do_not_change_the_identity():
    bare = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    ran = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", text="1")], execution_count=3)])
    assert identify("r", bare, {}) == identify("r", ran, {})


def test_the_package_fingerprint_sees_an_edit(tmp_path, monkeypatch):
    (tmp_path / "room.py").write_text("a = 1")
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(reporting.ecom_importance, "__file__", str(tmp_path / "__init__.py"))
    before = package_fingerprint.__wrapped__()
    (tmp_path / "room.py").write_text("a = 2")
    assert package_fingerprint.__wrapped__() != before


# ---- whole runs

def test_a_run_makes_every_file_and_is_taken_up(tmp_path, report, counted, capfd):
    result = run_report(report, parameters={"rows": 3}, out=tmp_path / "run")
    assert {file.name for file in result.folder.iterdir()} == {"manifest.json", "stages.json", "results.json", "first.npy", "second.json", "report.ipynb", "report.html"}
    assert result.results == {"b": {"sum": 3}, "verdicts": ["counted"]}
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["parameters"] == {"rows": 3, "label": "全部", "fail": False, "sleep": 0.0} and manifest["finished"] and manifest["seconds"] > 0
    assert manifest["versions"]["numpy"] == np.__version__ and set(manifest["stages"]) == {"first", "second"}
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == ["first", "second"] and all(re.search(r"\d+\.\d s +[\d,]+ MB$", line) for line in lines)

    again = run_report(report, parameters={"rows": 3}, out=tmp_path / "run")
    assert counted() == ["first", "second"] and again.results == result.results
    assert "kept from before" in capfd.readouterr().err
    with pytest.raises(UsageError, match="parameters.rows was 3, is now 4"):
        run_report(report, out=tmp_path / "run")
    fresh = run_report(report, out=tmp_path / "run", resume=False, progress=False)
    assert fresh.results["b"] == {"sum": 6} and counted() == ["first", "second"] * 2 and "first" not in capfd.readouterr().err


def test_the_folder_is_named_after_the_run(tmp_path, report, counted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_report("two.ipynb", progress=False)
    assert re.fullmatch(r"two-[0-9a-f]{8}", result.folder.name) and result.folder.parent == tmp_path / "runs"


def test_a_failing_cell_leaves_the_partial_notebook_and_one_line(tmp_path, report, counted):
    with pytest.raises(ReportFailed) as failed:
        run_report(report, parameters={"fail": True}, out=tmp_path / "run", progress=False)
    assert str(failed.value) == "RuntimeError: as told [section “结论”]"
    left = {file.name for file in (tmp_path / "run").iterdir()}
    assert left == {"manifest.json", "stages.json", "first.npy", "second.json", "report.partial.ipynb"}
    partial = nbformat.read(failed.value.partial, as_version=4)
    assert any(output.output_type == "error" for cell in partial.cells for output in cell.get("outputs", []))
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["finished"] is None


def test_a_dead_kernel_is_one_line_too(tmp_path, counted):
    report = write_report(tmp_path / "dies.ipynb", nbformat.v4.new_code_cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"))
    with pytest.raises(ReportFailed, match="DeadKernelError: the kernel ended by itself.*section “结论”"):
        run_report(report, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "report.ipynb").exists()


def start(report: Path, out: Path, **environment) -> subprocess.Popen:
    code = f"from ecom_importance.cli import main; raise SystemExit(main(['report', {str(report)!r}, '--out', {str(out)!r}]))"
    # What runs in the background of a script ignores Ctrl-C, and so would its children: these must not.
    return subprocess.Popen([sys.executable, "-c", code], cwd=out.parent, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    "Whether a process has ended; a dead one that nobody has collected counts as ended."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks up processes in /proc")
def test_a_run_killed_in_its_second_stage_goes_on_from_there(tmp_path, report, counted):
    process = start(report, tmp_path / "run", SLEEP="600")
    wait_until(lambda: counted() == ["first", "second"])
    process.kill()
    process.wait()
    process.stderr.close()
    kernel = int((tmp_path / "count.log").read_text().split()[-1])
    wait_until(lambda: gone(kernel), 10)
    assert read_stages(tmp_path / "run")["second"] == {"state": "running", "at": read_stages(tmp_path / "run")["second"]["at"]}
    assert not {"second.json", "report.ipynb", "report.html", "results.json"} & {file.name for file in (tmp_path / "run").iterdir()}
    result = run_report(report, out=tmp_path / "run", progress=False)
    assert counted() == ["first", "second", "second"] and result.stages["first"]["state"] == "kept" and result.results["b"] == {"sum": 6}
    assert not (result.folder / "report.partial.ipynb").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks up processes in /proc")
def test_ctrl_c_ends_the_kernel_and_returns_130(tmp_path, report, counted):
    process = start(report, tmp_path / "run", SLEEP="600")
    wait_until(lambda: counted() == ["first", "second"])
    with pytest.raises(UsageError, match="another process is running"):
        run_report(report, out=tmp_path / "run", resume=False)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 130 and complaint.splitlines()[-1].startswith("ecom-importance: interrupted")
    assert gone(int((tmp_path / "count.log").read_text().split()[-1]))
    assert (tmp_path / "run" / "first.npy").exists() and not (tmp_path / "run" / "report.ipynb").exists()


def test_the_kernel_is_this_interpreter_whatever_jupyter_lists(tmp_path, counted, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/nowhere/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    report = write_report(tmp_path / "who.ipynb", nbformat.v4.new_code_cell("import sys\nrun.record(python=sys.executable, here=os.getcwd(), omp=os.environ['OMP_WAIT_POLICY'])"))
    monkeypatch.chdir(tmp_path)
    results = run_report(report, out="run {with} braces", progress=False).results
    assert (results["python"], results["here"], results["omp"]) == (sys.executable, str(tmp_path), "PASSIVE")


def test_papermill_alone_can_run_a_report(tmp_path, report, counted):
    import papermill

    papermill.execute_notebook(str(report), str(tmp_path / "done.ipynb"), {"rows": 2, "out": str(tmp_path / "kept")}, kernel_name="python3", progress_bar=False)
    assert json.loads((tmp_path / "kept" / "results.json").read_text())["b"] == {"sum": 1}


# ---- names

def test_an_unknown_report_suggests_the_nearest(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="there is no notebook"):
        run_report(tmp_path / "absent.ipynb")
    monkeypatch.setattr(reporting, "_packaged", lambda: {"importance": None, "speed": None})
    with pytest.raises(UsageError, match="unknown report 'importanse': did you mean 'importance'"):
        with find_report("importanse"):
            pass


def test_every_packaged_report_declares_parameters_that_can_be_checked():
    listed = list_reports()
    if listed.empty:
        pytest.skip("no report is in the package yet")
    for name in listed.index:
        with find_report(name) as (_, source):
            declared = read_parameters(source)
            assert "out" in declared and not declared["out"].default, f"{name}: on its own, a report writes nothing"
            assert check_parameters(declared, {p.name: p.default for p in declared.values()}) == {p.name: p.default for p in declared.values()}
            assert [p.name for p in declared.values() if not p.help and p.name != "out"] == [], f"{name}: parameters without a comment"


# ---- pages

def page_of(*sources: str) -> str:
    return render_html(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source) for source in sources]))


def fetched(page: str) -> list[str]:
    return re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//[^"'\s>]+|url\(["']?https?://[^)]+""", page)


def test_a_page_fetches_nothing_and_folds_code(tmp_path):
    picture = nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    code = nbformat.v4.new_code_cell("secret = 1", outputs=[picture, nbformat.v4.new_output("stream", name="stderr", text="a warning")], execution_count=1)
    page = render_html(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 报告 🚰\n\n$x^2$ and `$code$`, $5 or $6"), code]))
    assert not fetched(page) and "data:image/png;base64,iVBORw0KGgo=" in page and "<title>报告 🚰</title>" in page
    for word, text in (("code", "secret"), ("messages", "a warning")):
        assert text in page.split(f"<summary>{word}</summary>")[1].split("</details>")[0]
    assert page.count('class="formula"') >= 1 and "$code$" in page


def test_a_formula_beyond_the_typesetter_is_left_to_the_script():
    known, unknown = page_of(r"$$\sum_i \hat w_i \le \frac{1}{2}$$"), page_of(r"$$\sum_i w_i$$", r"$$\begin{cases}1\\0\end{cases}$$")
    assert not fetched(known) and r'alt="\sum_i \hat w_i \le \frac{1}{2}"' in known
    assert any("mathjax" in address.lower() for address in fetched(unknown)) and r"\begin{cases}" in unknown
    assert not fetched(page_of("again $x$")), "one page's script must not follow into the next"


@pytest.mark.parametrize("tex", [
    r"p = \sigma(w^\top h)", r"\text{NDCG}@k", r"\lVert x \rVert_2^2", r"\mathbb{E}[x \mid y]", r"\arg\max_i s_i", r"\operatorname{rank}(s)", r"2^{r-1} - 1",
    r"\mathcal{L}(\theta)", r"\frac{\partial \ell}{\partial w}", r"H^{-1} \nabla_\theta", r"\phi_i = \sum_{S \subseteq D \setminus i} \binom{n-1}{|S|}^{-1}", r"\hat\beta", r"x \in \{0, 1\}",
    r"\frac1M \sum_m g_m^\top H^{-1} g_i", r"\left(\frac{\rho_i - \tfrac12}{n}\right)^{p}", r"\frac\alpha{1+\alpha}", r"\Bigl(\frac1M \sum_m \bigl[p_m - y_m\bigr]\Bigr)", r"\binom nk",
])
def test_formulas_of_this_field_can_be_drawn(tex):
    assert draw_formula(tex) is not None


def test_drawings_are_the_same_every_time():
    assert draw_formula.__wrapped__(r"\frac{a}{b}") == draw_formula.__wrapped__(r"\frac{a}{b}")
