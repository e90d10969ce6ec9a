"""The Trainer's loop: killed trainings go on, batches that do not fit are halved, rules set weights, adapters are added, reports are written."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from test_finetuning import FAST, METRIC, ids, table, tiny, trained_to_the_end  # noqa: F401  (tiny is a fixture)

from ecom_importance.finetuning import TrainingError, fine_tune, load_ranker, make_ranker
from ecom_importance.finetuning.adapters import add_adapters
from ecom_importance.finetuning.frozen_layers import freeze_layers
from ecom_importance.finetuning.trainer import Training, cut
from ecom_importance.finetuning.training import LEARNING_RATES, LORA_FACTOR
from ecom_importance.samples import DataError
from ecom_importance.weighting.adaptive import Focal, MetaGradient, SelfPaced, Truncated


pytestmark = pytest.mark.usefixtures("quick_collections")


class Kill(transformers.TrainerCallback):
    "Ends the run after so many steps, as a scheduler would."

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **named):
        if state.global_step == self.after:
            raise KeyboardInterrupt


def alike(one, other, samples):
    np.testing.assert_array_equal(one.predict(samples), other.predict(samples))
    pd.testing.assert_frame_equal(one.history.drop(columns="seconds"), other.history.drop(columns="seconds"))
    assert one.settings == other.settings


# ---- going on after a crash

@pytest.mark.parametrize("kind, extra, after", [("bi-encoder", {}, 6), ("cross-encoder", dict(record=True), 9), ("cross-encoder", dict(loss="pairwise", accumulate=2), 3), ("cross-encoder", dict(lora=2), 5),
                                                ("bi-encoder", dict(weights=Truncated(most=0.4)), 11), ("cross-encoder", dict(weights=MetaGradient()), 11), ("cross-encoder", dict(frozen_states=None, train_layers="all"), 6)])
def test_a_killed_training_goes_on_to_the_same_bits(tiny, tmp_path, kind, extra, after):
    samples, how = with_trusted() if "weights" in extra else table(), FAST | dict(kind=kind, model=tiny, epochs=3, patience=3) | extra
    whole = fine_tune(samples, **how)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(samples, folder=tmp_path / "run", callbacks=[Kill(after)], **how)
    assert list((tmp_path / "run").glob("checkpoint-*"))
    alike(fine_tune(samples, folder=tmp_path / "run", **how), whole, samples)
    if whole.record is not None:
        pd.testing.assert_frame_equal(fine_tune(samples, folder=tmp_path / "run", **how).record, whole.record)


def test_killed_before_the_first_checkpoint_it_begins_again(tiny, tmp_path):
    samples, how = table(), FAST | dict(model=tiny)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(samples, folder=tmp_path / "run", callbacks=[Kill(1)], **how)
    alike(fine_tune(samples, folder=tmp_path / "run", **how), fine_tune(samples, **how), samples)


@pytest.mark.parametrize("damage", [lambda path: (path / "trainer_state.json").unlink(), lambda path: (path / "trainer_state.json").write_text('{"epoch": 2.'), lambda path: (path / "choice.json").unlink()])
def test_a_half_written_checkpoint_is_not_gone_on_from(tiny, tmp_path, damage):
    samples, how = table(), FAST | dict(model=tiny, epochs=2, patience=3)
    whole = fine_tune(samples, folder=tmp_path / "run", **how)
    (last,) = (tmp_path / "run").glob("checkpoint-*")
    damage(last)
    alike(fine_tune(samples, folder=tmp_path / "run", **how), whole, samples)


def test_a_finished_folder_gives_its_ranker_without_a_step(tiny, tmp_path):
    samples, how = table(), FAST | dict(model=tiny, epochs=6, patience=1, learning_rate=1e-9)  # nothing gets better: it stops early
    whole = fine_tune(samples, folder=tmp_path / "run", **how)
    assert whole.history["epoch"].max() == 1
    alike(fine_tune(samples, folder=tmp_path / "run", callbacks=[Kill(2), Kill(1)], **how), whole, samples)


def test_the_folder_of_another_run_is_refused_by_what_differs(tiny, tmp_path):
    samples, how = table(), FAST | dict(model=tiny)
    fine_tune(samples, folder=tmp_path / "run", **how)
    for other, word in ((dict(learning_rate=2e-3), "learning_rate: 0.001 there, 0.002 here"), (dict(seed=1), "seed: 0 there, 1 here"), (dict(weights=pd.Series(np.linspace(1, 2, 32), ids(samples))), "data")):
        with pytest.raises(DataError, match="another training lives here.*" + word):
            fine_tune(samples, folder=tmp_path / "run", **how | other)
    with pytest.raises(DataError, match="another training lives here.*select"):
        fine_tune(samples.assign(gain=samples["gain"].where(samples["split"] != "select", 0.5)), folder=tmp_path / "run", **how)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("不要删")
    with pytest.raises(DataError, match="something stands here already"):
        fine_tune(samples, folder=tmp_path / "mine", **how)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_only_the_last_checkpoint_is_kept_and_frozen_layers_are_not_in_it(tiny, tmp_path):
    from safetensors.torch import load_file

    ranker = fine_tune(table(), folder=tmp_path / "run", **FAST | dict(model=tiny, train_layers=1, epochs=3, patience=3))
    (last,) = (tmp_path / "run").glob("checkpoint-*")
    saved = sum(value.numel() for value in load_file(last / "model.safetensors").values())
    assert 0 < saved < 0.6 * sum(parameter.numel() for parameter in ranker.network.parameters())


# ---- memory

def starve(monkeypatch, most, failure=lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")):
    "A machine on which no more rows than this fit."
    look = Training.loss_of
    seen = []

    def starved(self, rows, epoch=1):
        seen.append(len(rows))
        if len(rows) > most:
            raise failure()
        return look(self, rows, epoch)

    monkeypatch.setattr(Training, "loss_of", starved)
    return seen


def without_dropout(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    calm = shutil.copytree(folder, tmp_path / "calm")
    (calm / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    return calm


@pytest.mark.parametrize("failure", [lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), lambda: MemoryError(), lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("loss, accumulate", [("pointwise", 1), ("pointwise", 2), ("pairwise", 1)])
def test_a_batch_that_does_not_fit_is_halved_and_the_steps_are_the_same(tiny, tmp_path, monkeypatch, caplog, failure, loss, accumulate):
    samples, how = trained_to_the_end(), FAST | dict(kind="cross-encoder", model=without_dropout(tiny, tmp_path), loss=loss, accumulate=accumulate, record=True)
    whole = fine_tune(samples, **how)
    seen = starve(monkeypatch, 4, failure)
    halved = fine_tune(samples, **how)
    assert "does not fit in memory" in caplog.text and caplog.text.count("does not fit") == 1, "said once"
    assert max(seen[1:]) <= 4 and seen[0] > 4
    # A loss over pairs has no gradient along the logit's offset; what rounding makes of it there, Adam blows up.
    level = (lambda scores: scores - scores.mean()) if loss == "pairwise" else (lambda scores: scores)
    np.testing.assert_allclose(level(halved.predict(samples)), level(whole.predict(samples)), atol=2e-4)
    np.testing.assert_allclose(halved.history["loss"], whole.history["loss"], rtol=1e-4)
    assert sorted(halved.record["sample_id"]) == sorted(whole.record["sample_id"]), "no row is recorded twice"


def test_a_row_that_does_not_fit_alone_is_an_error(tiny, monkeypatch):
    starve(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        fine_tune(table(), **FAST | dict(model=tiny))


def test_other_errors_are_not_taken_for_memory(tiny, monkeypatch):
    seen = starve(monkeypatch, 0, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        fine_tune(table(), **FAST | dict(model=tiny))
    assert len(seen) == 1


def test_parts_hold_every_row_once_and_queries_whole():
    rng = np.random.default_rng(0)
    query = rng.integers(0, 9, 50)
    for most in (1, 3, 7, 50, None):
        for keep in (None, query):
            parts = cut(rng.permutation(50), most, keep)
            assert sorted(np.concatenate(parts)) == list(range(50))
            if most and keep is None:
                assert max(map(len, parts)) <= most
            if keep is not None:
                assert all(sum((query[part] == one).any() for part in parts) == 1 for one in range(9))


# ---- penalties, accumulation

def test_accumulated_batches_make_one_step(tiny):
    class Count(transformers.TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **named):
            self.steps = state.global_step

    once, twice = Count(), Count()
    fine_tune(trained_to_the_end(), callbacks=[once], **FAST | dict(model=tiny))
    fine_tune(trained_to_the_end(), callbacks=[twice], **FAST | dict(model=tiny, accumulate=2))
    assert (once.steps, twice.steps) == (8, 4)


def test_l1_makes_the_matrices_smaller(tiny):
    samples, how = trained_to_the_end(), FAST | dict(kind="cross-encoder", model=tiny, epochs=4, train_layers=1)
    size = lambda ranker: sum(parameter.abs().sum().item() for name, parameter in ranker.network.named_parameters() if "layer.2." in name and parameter.ndim == 2)
    plain, small = fine_tune(samples, **how), fine_tune(samples, l1=0.05, **how)
    assert size(small) < 0.9 * size(plain)


# ---- adaptive weights

@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_the_weights_of_every_epoch_are_recorded_and_keep_their_total(tiny, kind):
    samples = trained_to_the_end()
    fixed = pd.Series(np.random.default_rng(0).gamma(2, 0.5, len(ids(samples))), ids(samples))
    ranker = fine_tune(samples, SelfPaced(fixed=fixed), **FAST | dict(kind=kind, model=tiny))
    weights = ranker.record.pivot(index="sample_id", columns="epoch", values="weight")
    assert len(weights) == len(fixed) and (weights[1] == 0).any()
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-4)
    assert "SelfPaced" in ranker.settings["rule"]


def test_a_rule_that_changes_nothing_is_no_rule_bit_for_bit(tiny):
    samples = table()
    weights = pd.Series(np.linspace(0.5, 1.5, len(ids(samples))), ids(samples))
    plain, ruled = fine_tune(samples, weights, **FAST | dict(model=tiny)), fine_tune(samples, Focal(power=0, fixed=weights), **FAST | dict(model=tiny))
    np.testing.assert_allclose(ruled.predict(samples), plain.predict(samples), atol=1e-5)


@pytest.mark.parametrize("loss", ["pairwise", "listnet", "mse", "lambda"])
def test_rules_of_the_loss_go_with_every_loss(tiny, loss):
    ranker = fine_tune(trained_to_the_end(), Truncated(most=0.5), **FAST | dict(kind="cross-encoder", model=tiny, loss=loss, epochs=3))
    assert np.isfinite(ranker.history["loss"][1:]).all() and (ranker.record["weight"] == 0).any()


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_the_pull_is_the_product_of_head_gradients(tiny, kind):
    samples = table()
    ranker = make_ranker(kind, tiny, device="cpu", seed=3)
    ranker.network.eval()
    train, trusted = samples[:10], samples[10:16].reset_index(drop=True)
    training = Training(ranker, train, np.ones(10), loss="pointwise", batch_size=8, rule=MetaGradient(), trusted=trusted)
    logit, vectors = ranker.look(training.tokens, np.arange(10))
    gain = training.gain
    found = training._pull((logit.sigmoid() - gain[:10]).detach().numpy(), vectors)
    # Autograd, vectors taken from the batch's mean: a factor for each dimension for the bi-encoder, the last layer's weights for the cross-encoder.
    head = torch.ones(vectors.shape[1]) if kind == "bi-encoder" else ranker.network.classifier.weight[0].detach().clone()
    offset = ranker.line[1].item() if kind == "bi-encoder" else ranker.network.classifier.bias[0].item()
    head.requires_grad_()
    bce, vectors = torch.nn.functional.binary_cross_entropy_with_logits, vectors.detach()
    seen, trusted_logit = (values.detach() for values in ranker.look(training.tokens, np.arange(10, 16))[::-1])
    np.testing.assert_allclose((seen @ head + offset).detach(), trusted_logit, atol=1e-5)
    centre = vectors.mean(dim=0)
    loss_of = lambda vector, gain: bce((vector - centre) @ head + (centre @ head).detach() + offset, gain)
    (wanted,) = torch.autograd.grad(loss_of(seen, gain[10:]), head)
    by_hand = np.array([float(torch.autograd.grad(loss_of(vectors[row], gain[row]), head)[0] @ wanted) for row in range(10)])
    np.testing.assert_allclose(found, by_hand / np.abs(by_hand).mean(), rtol=1e-3, atol=1e-4)


def with_trusted():
    samples = table(n_queries=24)
    return samples.assign(split=samples["split"].replace({"test": "valid"}))


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder", "head"])
def test_learning_to_reweight_reads_the_trusted_rows_and_no_others_do(tiny, kind):
    samples, vectors = with_trusted(), np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
    how = dict(kind=kind, vectors=vectors, metric=METRIC) if kind == "head" else FAST | dict(kind=kind, model=tiny, patience=5)
    changed = samples.assign(gain=samples["gain"].where(samples["split"] != "valid", 1 - samples["gain"]))
    weights = lambda rule, table: fine_tune(table, rule, **how).record["weight"].to_numpy()
    assert not np.allclose(weights(MetaGradient(), samples), weights(MetaGradient(), changed))
    np.testing.assert_array_equal(weights(SelfPaced(), samples), weights(SelfPaced(), changed))


def test_learning_to_reweight_says_what_it_lacks(tiny):
    samples = table()
    with pytest.raises(DataError, match="no row is of split 'valid'"):
        fine_tune(samples, MetaGradient(), **FAST | dict(model=tiny))
    with pytest.raises(DataError, match="compares the gradients of rows"):
        fine_tune(with_trusted(), MetaGradient(), loss="pairwise", **FAST | dict(model=tiny))


@pytest.mark.parametrize("setting", [dict(lora=4), dict(learning_rate=1e-3), dict(accumulate=2), dict(folder="run"), dict(l1=0.1), dict(train_layers=2)])
def test_a_head_refuses_what_it_has_no_use_for(setting):
    with pytest.raises(DataError, match=f"a head has no {next(iter(setting))}"):
        fine_tune(table(), kind="head", vectors=np.zeros((48, 2)), metric=METRIC, **setting)


def test_rules_that_were_not_called_and_words_are_named():
    with pytest.raises(DataError, match=r"the class Truncated.*Truncated\(\)"):
        fine_tune(table(), Truncated, kind="head", vectors=np.ones((48, 2)))
    with pytest.raises(DataError, match="weights are 'Truncated'"):
        fine_tune(table(), "Truncated", kind="head", vectors=np.ones((48, 2)))
    with pytest.raises(DataError, match="lora is '4'"):
        fine_tune(table(), lora="4")


def test_a_head_under_a_rule_keeps_the_best_epoch_on_select(tmp_path):
    samples, vectors = with_trusted(), np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
    ranker = fine_tune(samples, Truncated(), kind="head", vectors=vectors, metric=METRIC)
    assert len(ranker.history) == 6 and ranker.history["select"].max() == ranker.history.loc[ranker.history["kept"], "select"].item()
    assert ranker.record.groupby("epoch").size().eq((samples["split"] == "train").sum()).all()
    select = samples[samples["split"] == "select"]
    assert METRIC.mean(select["query_id"], select["gain"], ranker.predict(select, vectors[select.index])) == pytest.approx(ranker.history["select"].max())
    again = load_ranker(ranker.save(tmp_path / "head"))
    np.testing.assert_array_equal(again.predict(samples, vectors), ranker.predict(samples, vectors))


# ---- adapters

def test_adapters_learn_in_the_place_of_layers_and_leave_a_plain_folder(tiny, tmp_path):
    samples = trained_to_the_end()
    untouched = make_ranker("cross-encoder", tiny, device="cpu").network.state_dict()
    ranker = fine_tune(samples, **FAST | dict(kind="cross-encoder", model=tiny, lora=2, train_layers=1, epochs=4, learning_rate=1e-2))
    network = ranker.network.state_dict()
    assert set(network) == set(untouched), "no adapter is left"
    changed = {name for name in network if not torch.equal(network[name], untouched[name])}
    assert changed and all("layer.2." in name or "pooler" in name or "classifier" in name for name in changed)
    moved = network["bert.encoder.layer.2.attention.self.query.weight"] - untouched["bert.encoder.layer.2.attention.self.query.weight"]
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 2, "of the rank that was asked for"
    folder = ranker.save(tmp_path / "ranker")
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(opened.state_dict()["bert.encoder.layer.2.attention.self.query.weight"], network["bert.encoder.layer.2.attention.self.query.weight"])


def test_adapters_over_all_layers_leave_the_embeddings_alone(tiny):
    ranker = make_ranker("bi-encoder", tiny, device="cpu")
    freeze_layers(ranker.network, "all")
    add_adapters(ranker.network, 2)
    learning = {name for name, parameter in ranker.network.named_parameters() if parameter.requires_grad}
    assert any("layer.0." in name for name in learning) and not any("embeddings" in name for name in learning)
    with pytest.raises(DataError, match="lora is 0"):
        fine_tune(table(), **FAST | dict(model=tiny, lora=0))


def test_adapters_have_a_rate_of_their_own_and_a_few_numbers_that_learn(tiny):
    class Count(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **named):
            self.learn = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    layers, adapters, given = Count(), Count(), Count()
    how = dict(model=tiny, epochs=1, train_layers=1, metric=METRIC, device="cpu", progress=False)
    rates = [fine_tune(table(), callbacks=[count], **how | more).settings["learning_rate"] for count, more in ((layers, {}), (adapters, dict(lora=1)), (given, dict(lora=1, learning_rate=3e-4)))]
    assert rates == [LEARNING_RATES["bi-encoder"], LORA_FACTOR * LEARNING_RATES["bi-encoder"], 3e-4]
    assert adapters.learn == given.learn < layers.learn / 5


def test_adapters_are_taken_away_when_training_breaks_off(tiny):
    with pytest.raises(TrainingError) as caught:
        fine_tune(table().assign(split="train"), kind="cross-encoder", model=tiny, lora=2, epochs=2, batch_size=8, learning_rate=1e30, warmup=0.01, clip=1e30, progress=False, device="cpu")
    assert not any("lora" in name for name, _ in caught.value.ranker.network.named_parameters())
    assert np.isfinite(caught.value.ranker.predict(table())).all()


# ---- what the Trainer brings

def test_reports_are_written_where_the_run_is(tiny, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra [track] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ranker = fine_tune(table(), folder=tmp_path / "run", report_to=["tensorboard"], **FAST | dict(model=tiny))
    events = [path for path in (tmp_path / "run").rglob("*tfevents*")]
    assert events
    read = EventAccumulator(str(events[0].parent)).Reload()
    logged = [event.value for event in read.Scalars("eval/select")]
    np.testing.assert_allclose(logged, ranker.history["select"][1:], rtol=1e-5)


def test_mlflow_gets_the_metric_of_every_epoch(tiny, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra [track] is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions want a database, which the small package does not bring
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "test")
    ranker = fine_tune(table(), folder=tmp_path / "run", report_to=["mlflow"], **FAST | dict(model=tiny))
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (experiment,) = [one for one in client.search_experiments() if one.name == "test"]
    (run,) = client.search_runs([experiment.experiment_id])
    np.testing.assert_allclose([entry.value for entry in client.get_metric_history(run.info.run_id, "eval_select")], ranker.history["select"][1:])


def test_reports_without_a_place_are_refused(tiny):
    with pytest.raises(DataError, match="want a place"):
        fine_tune(table(), report_to=["tensorboard"], **FAST | dict(model=tiny))


def test_further_arguments_of_the_trainer_go_through_and_ours_are_refused(tiny):
    class Logs(transformers.TrainerCallback):
        seen = 0

        def on_log(self, args, state, control, logs=None, **named):
            self.seen += "loss" in logs

    few, many = Logs(), Logs()
    fine_tune(table(), callbacks=[few], **FAST | dict(model=tiny))
    fine_tune(table(), callbacks=[many], trainer={"logging_strategy": "steps", "logging_steps": 1}, **FAST | dict(model=tiny))
    assert few.seen == 2 and many.seen == 8
    with pytest.raises(DataError, match="trainer holds max_grad_norm, which fine_tune sets itself"):
        fine_tune(table(), trainer={"max_grad_norm": 3}, **FAST | dict(model=tiny))


@pytest.mark.parametrize("setting, told", [(dict(trainer={"loging_steps": 5}), r"trainer holds 'loging_steps'.*did you mean 'logging_steps'\?"), (dict(trainer={"save_steps": 5, 7: 5}), "trainer holds 7"), (dict(trainer=["bf16"]), "trainer is a list"),
                                           (dict(report_to=["tensorbord"]), r"report_to holds 'tensorbord'.*did you mean 'tensorboard'\?"), (dict(report_to="paper"), "report_to holds 'paper'.*one of .*mlflow"),
                                           (dict(report_to=["tensorboard"]), r"report_to holds 'tensorboard', which is not installed \(.*pip install 'ecom_importance\[track\]'"), (dict(report_to=["wandb"]), "report_to holds 'wandb', which is not installed .*install it, or report to another")])
def test_misspelt_arguments_and_reporters_that_are_not_there_are_told_before_a_model_is_looked_for(tmp_path, monkeypatch, setting, told):
    for package in ("tensorboard", "tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=told):
        fine_tune(table(), folder=tmp_path / "run", model="nowhere", **setting)
    assert not (tmp_path / "run").exists()


def test_two_processes_by_torchrun_end_with_one_model(tiny, tmp_path):
    script = tmp_path / "train.py"
    table().to_parquet(tmp_path / "samples.parquet")
    script.write_text(f"""
import os, numpy as np, pandas as pd
from ecom_importance.finetuning import fine_tune
samples = pd.read_parquet({str(tmp_path / "samples.parquet")!r})
ranker = fine_tune(samples, model={str(tiny)!r}, epochs=2, batch_size=4, learning_rate=1e-3, progress=False, device="cpu", folder={str(tmp_path / "run")!r})
np.save({str(tmp_path)!r} + "/scores" + os.environ["RANK"] + ".npy", ranker.predict(samples))
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (np.load(tmp_path / f"scores{rank}.npy") for rank in (0, 1))
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert abs(first - make_ranker("bi-encoder", tiny, device="cpu").predict(table())).max() > 1e-3


def test_rows_without_texts_are_refused_by_rankers_that_read_texts(tiny):
    from ecom_importance.weighting import smote

    samples, vectors = table(), np.random.default_rng(0).normal(size=(48, 4)).astype(np.float32)
    grown, more, weights = smote(samples, vectors, k_neighbors=1, sampling_strategy={0: 20})
    assert np.isfinite(fine_tune(grown, weights, kind="head", vectors=more, metric=METRIC).predict(samples, vectors)).all()
    with pytest.raises(DataError, match="synthetic"):
        fine_tune(grown, weights, **FAST | dict(model=tiny))
