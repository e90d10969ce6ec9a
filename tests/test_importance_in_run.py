"""In-run Shapley values: autograd, all subsets of a softmax step, batches that belong to names, and bad settings."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.importance import Evidence, find, score
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.in_run import TrainingRun, batch_steps, in_run_shapley


def by_autograd(x, y, x_valid, y_valid, theta, eta, order):
    "The Shapley values of one step with all rows, by torch's gradients and Hessian."
    wide, trusted = (torch.tensor(np.c_[some, np.ones(len(some))]) for some in (x, x_valid))

    def loss(flat, rows, labels):
        z, labels = rows @ flat.reshape(theta.shape), torch.tensor(labels)
        if theta.ndim == 2:
            return -(labels * torch.log_softmax(z, dim=1)).sum()
        return torch.nn.functional.binary_cross_entropy_with_logits(z, labels, reduction="sum")

    flat = torch.tensor(theta.ravel())
    own = torch.stack([torch.autograd.functional.jacobian(lambda at: loss(at, wide[i : i + 1], y[i : i + 1]), flat) for i in range(len(x))])
    wanted = torch.autograd.functional.jacobian(lambda at: loss(at, trusted, y_valid), flat)
    hessian = torch.autograd.functional.hessian(lambda at: loss(at, trusted, y_valid), flat)
    return (eta * own @ (wanted - (order == 2) * eta / 2 * hessian @ own.sum(dim=0))).numpy(), own.sum(dim=0).numpy().reshape(theta.shape)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 8), classes=st.sampled_from([0, 3]), order=st.sampled_from([1, 2]), seed=st.integers(0, 999))
def test_one_step_equals_autograd(n, classes, order, seed):
    rng = np.random.default_rng(seed)
    x, x_valid = rng.normal(size=(n, 3)), rng.normal(size=(9, 3))
    y, y_valid = (np.eye(3)[rng.integers(0, 3, k)] if classes else rng.random(k) for k in (n, 9))
    theta = rng.normal(size=(4, 3) if classes else 4)
    expected, summed = by_autograd(x, y, x_valid, y_valid, theta, 0.1, order)
    run = TrainingRun(np.stack([theta, theta - 0.1 * summed]), 0.1, 1, 0)
    np.testing.assert_allclose(in_run_shapley(x, y, np.arange(n), {0: run}, x_valid, y_valid, order=order), expected, atol=1e-10)


def test_batches_belong_to_names_and_are_even():
    steps = batch_steps([f"杯 {i}" for i in range(6000)], 4, 10, seed=3)
    assert (steps // 10 == np.arange(4)).all()
    counts = np.bincount(steps.ravel(), minlength=40)
    assert len(counts) == 40 and counts.min() > 480 and counts.max() < 720
    np.testing.assert_array_equal(batch_steps(["杯 7", "杯 3"], 4, 10, seed=3), steps[[7, 3]])
    assert (batch_steps(["杯 7"], 4, 10, seed=4) != steps[7]).any()
    assert abs(np.corrcoef(steps[:, 0], steps[:, 1])[0, 1]) < 0.06


def test_values_add_up_to_the_fall_when_steps_are_small():
    made, _ = example_evidence(400, 80, d=8)
    made.settings["training_run"] = {"epochs": 3, "batch": 20, "rate": 0.02}
    run, x, y = find(made, "training_run")[0], made.valid["x_valid"], made.valid["y_valid"]
    loss = lambda at: (np.logaddexp(0, x @ at[:-1] + at[-1]) - y * (x @ at[:-1] + at[-1])).mean()
    total = score(made, "in_run_shapley")["in_run_shapley"].sum()
    assert total == pytest.approx(loss(run.thetas[0]) - loss(run.thetas[-1]), rel=1e-2)


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"batch": 0}, {"rate": 0.0}, {"rate": float("nan")}])
def test_bad_settings_of_the_run_are_named(setting):
    made, _ = example_evidence(40, 16, d=3)
    with pytest.raises(ValueError, match=next(iter(setting))):
        find(Evidence(made.train, {}, settings={"training_run": setting}), "training_run")


def test_a_bad_order_is_named():
    made, _ = example_evidence(40, 16, d=3)
    with pytest.raises(ValueError, match="order is 3; expected 1 or 2"):
        score(made, "in_run_shapley", settings={"in_run_shapley": {"order": 3}})
