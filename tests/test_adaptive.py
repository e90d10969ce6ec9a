"""Weights that follow the training: each rule by hand, the total of a step kept, and heads that arrive where they should."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from ecom_importance.importance.heads import fit_head
from ecom_importance.samples import DataError
from ecom_importance.weighting.adaptive import RULES, Focal, MetaGradient, Reweighted, SelfPaced, Step, Truncated, adapt_head, pull


def step_of(probability, gain, progress=0.0, **more):
    probability, gain = np.asarray(probability, float), np.asarray(gain, float)
    loss = -gain * np.log(probability) - (1 - gain) * np.log1p(-probability)
    return Step(loss, 1 - np.abs(probability - gain), gain, progress, **more)


def test_self_paced_admits_the_rows_of_smallest_loss():
    step = step_of([0.9, 0.6, 0.3, 0.1], [1, 1, 1, 1])
    assert SelfPaced().raw(step).tolist() == [1, 1, 0, 0]
    assert SelfPaced(first=0.01).raw(step).tolist() == [1, 0, 0, 0], "never nobody"
    end = step_of([0.9, 0.6, 0.3, 0.1], [1, 1, 1, 1], progress=1.0)
    assert SelfPaced().raw(end).tolist() == [1, 1, 1, 1] and SelfPaced(last=0.75).raw(end).tolist() == [1, 1, 1, 0]


def test_truncated_drops_positive_rows_alone_and_none_at_first():
    probability, gain = [0.9, 0.8, 0.7, 0.6, 0.05, 0.99], [1, 1, 1, 1, 1, 0]
    assert Truncated().raw(step_of(probability, gain)).all()
    assert Truncated().raw(step_of(probability, gain, progress=0.5)).tolist() == [1, 1, 1, 1, 0, 1], "the negative row of huge loss stays"
    assert Truncated(most=0.4).raw(step_of(probability, gain, progress=0.9)).tolist() == [1, 1, 1, 0, 0, 1]
    assert Truncated().raw(step_of([0.9, 0.8], [0, 0], progress=1.0)).all(), "no positive row"


def test_focal_and_reweighted_are_powers_of_the_agreement():
    step = step_of([0.9, 0.25], [1, 1])
    np.testing.assert_allclose(Focal().raw(step), [0.01, 0.5625])
    np.testing.assert_allclose(Reweighted(beta=0.5).raw(step), [0.9**0.5, 0.5])
    np.testing.assert_allclose(Reweighted().raw(step_of([0.75], [0.25])), [0.5**0.2]), "graded gains: 1 − |p − y|"


def test_meta_gradient_is_the_slope_of_the_trusted_loss_after_one_step():
    rng = np.random.default_rng(3)
    x, x_valid, theta = rng.normal(size=(7, 3)) + 2, rng.normal(size=(5, 3)) + 2, rng.normal(size=3)
    y, y_valid, centre = rng.random(7), rng.random(5), x.mean(axis=0)

    def trusted_loss(weights, rate=1e-4):  # of a head on vectors taken from their mean
        slope = expit((x - centre) @ theta) - y
        z = (x_valid - centre) @ (theta - rate * (x - centre).T @ (weights * slope))
        return np.mean(np.logaddexp(0, z) - y_valid * z)

    finite = [(trusted_loss(np.eye(7)[row]) - trusted_loss(-np.eye(7)[row])) / 2e-4 for row in range(7)]
    found = pull(x, expit((x - centre) @ theta) - y, x_valid, expit((x_valid - centre) @ theta) - y_valid)
    np.testing.assert_allclose(found, -np.array(finite), rtol=1e-5)
    assert (MetaGradient(calm=0).raw(Step(np.ones(7), np.ones(7), y, 0.0, found)) == np.maximum(found, 0)).all()
    assert (MetaGradient(calm=0.5).raw(Step(np.ones(7), np.ones(7), y, 0.0, found)) == np.maximum(found + 0.5, 0)).all()


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_learning_to_reweight_does_not_switch_grades_off_where_vectors_are_short_or_point_one_way(scale):
    rng = np.random.default_rng(0)
    x, slope = scale * (rng.normal(size=(900, 8)) + 4), rng.normal(size=8) * 2
    y = (rng.random(900) < expit((x / scale - 4) @ slope)).astype(float)
    given = np.where((np.arange(900) < 600) & (rng.random(900) < 0.3), 1 - y, y)
    for _, weights in adapt_head(x[:600], given[:600], MetaGradient(), x_valid=x[600:], y_valid=y[600:], ridge=1e-4 * scale**2):
        assert min(weights[given[:600] == grade].mean() for grade in (0, 1)) > 0.3
    wrong = (given != y)[:600]
    assert weights[wrong].mean() < 0.7 * weights[~wrong].mean()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(RULES)), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6))
def test_a_step_keeps_its_weight_under_every_rule(name, rows, progress, seed):
    rng = np.random.default_rng(seed)
    fixed = rng.gamma(1.0, size=rows)
    step = step_of(rng.uniform(0.01, 0.99, rows), rng.integers(0, 3, rows) / 2, progress, pull=rng.normal(size=rows))
    weights = RULES[name]()(step, fixed)
    assert (weights >= 0).all() and np.isclose(weights.sum(), fixed.sum())
    raw = RULES[name]().raw(step)
    if (raw * fixed).sum() > 0:  # in proportion to fixed · raw
        np.testing.assert_allclose(weights * (raw * fixed).sum(), raw * fixed * fixed.sum(), atol=1e-9)


def test_where_no_row_pulls_the_right_way_the_fixed_weights_stand():
    step = step_of([0.5, 0.5], [1, 0], pull=np.array([-1.0, -2.0]))
    assert MetaGradient(calm=0)(step, np.array([0.5, 1.5])).tolist() == [0.5, 1.5]


def test_a_rule_that_asks_trusted_rows_says_when_there_are_none():
    with pytest.raises(DataError, match="asks the trusted rows, and there are none"):
        MetaGradient()(step_of([0.5], [1]))


@pytest.mark.parametrize("make", [lambda: SelfPaced(first=0), lambda: SelfPaced(first=0.5, last=0.4), lambda: Focal(power=-1), lambda: Truncated(most=1), lambda: Truncated(ramp=0),
                                  lambda: Reweighted(beta=-0.1), lambda: Reweighted(beta=np.nan), lambda: Focal(power=np.inf), lambda: MetaGradient(calm=-1)])
def test_settings_outside_their_bounds_are_named(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def draw(seed=0, n=400, d=6):
    rng = np.random.default_rng(seed)
    x, slope = rng.normal(size=(n, d)), rng.normal(size=d) * 2
    return x, (rng.random(n) < expit(x @ slope)).astype(float), rng


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_rule_that_changes_nothing_arrives_at_the_head_of_the_fixed_weights(dtype):
    x, y, rng = draw()
    fixed = rng.gamma(1.0, size=len(x))
    *_, (theta, weights) = adapt_head(x.astype(dtype), y, Reweighted(beta=0), fixed=fixed, ridge=0.02, steps=70)
    head = fit_head(x, y, ridge=0.02, weights=fixed)
    np.testing.assert_allclose(theta, np.r_[head.weights, head.intercept], atol=2e-5)
    np.testing.assert_allclose(weights, fixed)


def test_a_head_under_focal_loss_is_at_rest_where_its_weighted_gradient_vanishes():
    x, y, _ = draw(1)
    *_, (theta, weights) = adapt_head(x, y, Focal(power=1), ridge=0.05, steps=200)
    z = torch.tensor(x @ theta[:-1] + theta[-1])
    slope = (torch.sigmoid(z) - torch.tensor(y)).numpy()
    np.testing.assert_allclose(x.T @ (weights * slope) / len(x) + 0.05 * theta[:-1], 0, atol=1e-6)


def test_trusted_rows_turn_a_head_that_is_taught_the_opposite():
    x, y, rng = draw(2, n=600)
    wrong = 1 - y[:400]
    *_, (theta, _) = adapt_head(x[:400], np.where(rng.random(400) < 0.55, wrong, y[:400]), MetaGradient(), x_valid=x[400:500], y_valid=y[400:500])
    *_, (plain, _) = adapt_head(x[:400], wrong, Reweighted())
    right = lambda theta: ((x[500:] @ theta[:-1] + theta[-1] > 0) == y[500:]).mean()
    assert right(plain) < 0.3 < 0.75 < right(theta)


def test_no_steps_are_refused():
    x, y, _ = draw()
    with pytest.raises(ValueError, match="steps is 0"):
        next(adapt_head(x, y, Focal(), steps=0))


def test_a_rule_carries_fixed_weights():
    assert Focal().fixed is None
    weights = pd.Series([1.0], index=["甲"])
    assert SelfPaced(fixed=weights).fixed is weights
    with pytest.raises(TypeError):
        SelfPaced(weights, 0.5, 1.0, 2.0)
