"""The selector of DVRL: its rule, its draws, and what it refuses."""
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ecom_importance.importance import Evidence, find, score
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.reinforced import Selector, train_selector
from ecom_importance.samples import DataError


@pytest.fixture(scope="module")
def made():
    return example_evidence(500, 120, d=8)


def short(made, **how):
    evidence = Evidence(dict(made.train), {name.removesuffix("_valid"): column for name, column in made.valid.items()}, settings={"selectors": {"steps": 60, **how}})
    return evidence


def test_the_rewards_rise_and_wrong_rows_are_kept_less(made):
    evidence, wrong = made
    own = short(evidence, steps=200)
    values = score(own, "dvrl", progress=False)["dvrl"]
    rewards = find(own, "selectors")[0].rewards
    assert rewards[-30:].mean() > rewards[:30].mean() and roc_auc_score(wrong, -values) > 0.75 and values.between(0, 1).all()


def test_without_a_reward_nothing_is_learned(made):
    "Trusted rows whose labels are coin flips on constant vectors reward every choice alike: the odds stay even."
    evidence, _ = made
    valid = {name.removesuffix("_valid"): column for name, column in evidence.valid.items()} | {"x": np.zeros((120, 8), np.float32), "y": np.full(120, 0.5)}
    same = {name: column for name, column in evidence.train.items()} | {"x": np.zeros((500, 8), np.float32), "y": np.full(500, 0.5)}
    selector = find(Evidence(same, valid, settings={"selectors": {"steps": 20}}), "selectors")[0]
    assert np.abs(selector.advantages).max() < 1e-6


def test_keep_is_torch_s_own_forward_pass():
    import torch

    rng = np.random.default_rng(0)
    layers = [(rng.normal(size=(4, 5)), rng.normal(size=4)), (rng.normal(size=(4, 4)), rng.normal(size=4)), (rng.normal(size=(1, 4)), rng.normal(size=1))]
    view = rng.normal(size=(7, 5))
    z = torch.from_numpy(view)
    for weights, bias in layers[:-1]:
        z = torch.tanh(torch.nn.functional.linear(z, torch.from_numpy(weights), torch.from_numpy(bias)))
    expected = torch.sigmoid(torch.nn.functional.linear(z, *map(torch.from_numpy, layers[-1])))[:, 0]
    np.testing.assert_allclose(Selector(tuple(layers), np.zeros(1), np.zeros(1)).keep(view), expected, atol=1e-12)


def test_a_reward_is_minus_the_loss_of_a_head_fitted_on_the_kept_rows(made):
    "One step, recomputed: the same draws by hash, the heads by scikit-learn."
    from sklearn.linear_model import LogisticRegression

    from ecom_importance.importance.bagged import hash_bits

    evidence, _ = made
    x, y, view, keys, head, x_valid, y_valid = (find(evidence, name) for name in ("x", "y", "selector_view", "name_key", "head", "x_valid", "y_valid"))
    rewards = train_selector(x, y, view, keys, head, x_valid, y_valid, steps=1, batch=500, seed=3).rewards
    losses = []
    for draw in range(2):
        kept = (hash_bits(keys, "keep", 3, 0, draw) >> np.uint64(11)) * 2.0**-53 < 0.5
        fitted = LogisticRegression(C=1 / (kept.sum() * head.ridge), tol=1e-10, max_iter=1000).fit(x[kept].astype(float), y[kept])
        p = fitted.predict_proba(x_valid.astype(float))[:, 1]
        losses.append(-np.mean(np.where(y_valid == 1, np.log(p), np.log1p(-p))))
    assert rewards[0] == pytest.approx(-np.mean(losses), abs=1e-5)


def test_seeds_differ_and_repeats_average_them(made):
    own = short(made[0])
    table = score(own, "dvrl", repeats=2, progress=False)
    first = score(own, "dvrl", progress=False)["dvrl"]
    assert (table["dvrl_se"] > 0).mean() > 0.9 and not np.allclose(table["dvrl"], first)
    np.testing.assert_array_equal(score(short(made[0]), "dvrl", progress=False)["dvrl"], first)


@pytest.mark.parametrize("how", [{"steps": 0}, {"batch": 1}, {"rate": 0.0}])
def test_bad_settings_are_named(made, how):
    with pytest.raises(ValueError, match=f"{next(iter(how))} is {next(iter(how.values()))}"):
        score(short(made[0], **how), "dvrl")


def test_one_row_is_refused(made):
    one = {name: column[:1] for name, column in made[0].train.items()}
    valid = {name.removesuffix("_valid"): column for name, column in made[0].valid.items()}
    with pytest.raises(DataError, match="quer"):
        score(Evidence(one, valid), "dvrl")
