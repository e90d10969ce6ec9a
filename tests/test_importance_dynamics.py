"""Training dynamics: replayed by hand, read off recorded trainings, and where there is no story."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.importance import Evidence, find, score
from ecom_importance.importance.dynamics import aum, confidence, forgetting, loss_mixture, reweighted_loss, self_paced, truncated_loss, variability
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.heads import log_losses
from ecom_importance.samples import DataError

STORIES = ["aum", "confidence", "variability", "forgetting", "self_paced", "truncated_loss", "reweighted_loss"]


def test_predictions_are_those_of_the_path_without_the_rows_fold():
    made, _ = example_evidence(200, 40, d=4)
    told, path, fold = find(made, "epoch_predictions"), find(made, "checkpoints"), find(made, "fold")
    row = 17
    thetas = path.thetas[:, :, 1 + path.folds.index(fold[row])]
    np.testing.assert_allclose(told[row], [1 / (1 + np.exp(-(made.train["x"][row] @ theta[:-1] + theta[-1]))) for theta in thetas], rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 12), epochs=st.integers(1, 8))
def test_two_classes_are_two_gains(seed, n, epochs):
    rng = np.random.default_rng(seed)
    p, y = rng.uniform(0.01, 0.99, (n, epochs)), rng.integers(0, 2, n)
    both, hot = np.stack([1 - p, p], axis=2), np.eye(2)[y]
    np.testing.assert_allclose(aum(both, hot), aum(p, y.astype(float)), atol=1e-10)
    np.testing.assert_array_equal(forgetting(both, y, np.array([0.0, 1.0])), forgetting(p, y, np.array([0.0, 1.0])))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), epochs=st.integers(1, 9))
def test_forgetting_is_replayed(seed, epochs):
    rng = np.random.default_rng(seed)
    p, grade, levels = rng.random((10, epochs)), rng.integers(0, 3, 10), np.array([0.0, 0.5, 1.0])
    for value, row, given_grade in zip(forgetting(p, grade, levels), p, grade):
        right, events = [abs(step - levels).argmin() == given_grade for step in row], 0
        for before, after in zip(right, right[1:]):
            events += before and not after
        assert -value == (events if any(right) else epochs)


def test_a_recorded_training_can_be_given():
    made, _ = example_evidence(120, 40, d=4)
    recorded = np.random.default_rng(0).uniform(0.05, 0.95, (120, 6))
    other = Evidence(dict(made.train), {}, given={"epoch_predictions": recorded})
    y = made.train["y"]
    table = score(other, STORIES)
    agreement = np.where(y[:, None] == 1, recorded, 1 - recorded)
    np.testing.assert_allclose(table["confidence"], agreement.mean(axis=1))
    np.testing.assert_allclose(table["variability"], agreement.std(axis=1))
    np.testing.assert_allclose(table["aum"], np.log(agreement / (1 - agreement)).mean(axis=1))
    assert "checkpoints" not in other.computed
    losses = -np.log(agreement)
    admitted = [losses[:, t] <= np.quantile(losses[:, t], share) for t, share in enumerate(np.linspace(0.5, 1, 6))]
    np.testing.assert_allclose(table["self_paced"], np.mean(admitted, axis=0))
    kept = [(losses[:, t] <= np.quantile(losses[y == 1, t], 1 - share)) | (y == 0) for t, share in enumerate(np.linspace(0, 0.2, 6))]
    np.testing.assert_allclose(table["truncated_loss"], np.mean(kept, axis=0))


def test_the_mixture_is_scikit_learns_and_falls_with_the_loss():
    from sklearn.mixture import GaussianMixture

    made, wrong = example_evidence(800, 80, d=12)
    chance = score(made, "loss_mixture")["loss_mixture"].to_numpy()
    losses = log_losses(find(made, "oof"), find(made, "y"))
    own = GaussianMixture(2, covariance_type="tied", n_init=10, random_state=0, max_iter=500).fit(losses[:, None])
    np.testing.assert_allclose(chance, own.predict_proba(losses[:, None])[:, own.means_.argmin()], atol=0.05)
    assert (np.diff(chance[np.argsort(losses)]) <= 1e-12).all()


def test_equal_losses_are_no_mixture():
    assert loss_mixture(np.full(3, 0.4), np.ones(3), None).tolist() == [1, 1, 1]
    made, _ = example_evidence(60, 16, d=3)
    same = Evidence(dict(made.train), {}, given={"oof": np.full(60, 0.5)})
    assert (score(same, "loss_mixture")["loss_mixture"] == 1).all()


def test_negative_rows_are_never_truncated_and_no_positives_is_no_error():
    made, _ = example_evidence(100, 16, d=3)
    values = score(made, "truncated_loss")["truncated_loss"].to_numpy()
    assert (values[made.train["y"] == 0] == 1).all() and values.min() < 1
    none = Evidence(dict(made.train) | {"y": np.zeros(100)}, {})
    assert (score(none, "truncated_loss")["truncated_loss"] == 1).all()


def test_bad_settings_and_one_query():
    made, _ = example_evidence(60, 16, d=3)
    with pytest.raises(ValueError, match="beta is -1"):
        score(made, "reweighted_loss", settings={"reweighted_loss": {"beta": -1}})
    for part, setting, what in (("pace_thresholds", {"first": 0}, "first is 0"), ("drop_thresholds", {"most": 1}, "most is 1")):
        with pytest.raises(ValueError, match=what):
            score(Evidence(dict(made.train), {}, settings={part: setting}), {"pace_thresholds": "self_paced", "drop_thresholds": "truncated_loss"}[part])
    one = Evidence(dict(made.train) | {"query": np.full(60, "杯", object), "query_id": np.zeros(60)}, {})
    with pytest.raises(DataError, match="at least two different queries"):
        score(one, "aum")
    assert confidence(np.ones((2, 3))).tolist() == [1, 1] and variability(np.ones((2, 3))).tolist() == [0, 0]
    assert self_paced(np.zeros((1, 2)), np.zeros(2)).tolist() == [1] and truncated_loss(np.zeros((1, 2)), np.ones(1), np.ones(2)).tolist() == [1] and reweighted_loss(np.zeros((1, 2))).tolist() == [0]
