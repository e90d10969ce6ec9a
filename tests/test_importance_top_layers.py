"""Top layers: gradients that autograd gives too, curvature built by hand, projections, nets from outside, bad settings."""
import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.importance import Evidence, find, score, score_new
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.heads import INTERCEPT_RIDGE
from ecom_importance.importance.top_layers import Recipe, along_pull, draw_sketch, kronecker, margin_pull, net_predict, start_net, summed_pull, trace
from ecom_importance.samples import DataError

torch = pytest.importorskip("torch")


def outside(d=6, width=5, outputs=1, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(d, width), torch.nn.ReLU(), torch.nn.Linear(width, outputs, bias=False)).double()


def with_net(made, net, **more):
    return Evidence(made.train, {name.removesuffix("_valid"): column for name, column in made.valid.items()}, given={"top_net": net, **more})


def loss_of(logits, y):
    return torch.nn.functional.cross_entropy(logits, y) if y.ndim == 2 else torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], y)


def row_gradients(net, x, y):
    "Each row's gradient by one backward pass of its own: (n, weights), weight by weight, in the order of a trace."
    rows = []
    for i in range(len(x)):
        net.zero_grad()
        loss_of(net(torch.from_numpy(x[[i]])), torch.from_numpy(y[[i]])).backward()
        layers = [layer for layer in net.modules() if isinstance(layer, torch.nn.Linear)]
        rows.append(torch.cat([(layer.weight.grad if layer.bias is None else torch.column_stack([layer.weight.grad, layer.bias.grad])).ravel() for layer in layers]).numpy())
    return np.array(rows)


def flat(seen, error):
    return np.concatenate([(b[:, :, None] * a[:, None, :]).reshape(len(a), -1) for b, a in zip(seen.pull(error), seen.inputs)], axis=1)


@settings(max_examples=12, deadline=None)
@given(d=st.integers(1, 6), width=st.integers(1, 7), classes=st.sampled_from([1, 3]), seed=st.integers(0, 999))
def test_factors_multiply_out_to_the_gradients_of_autograd(d, width, classes, seed):
    rng, net = np.random.default_rng(seed), outside(d, width, classes, seed)
    x, y = rng.normal(size=(7, d)), rng.random(7) if classes == 1 else np.eye(3)[rng.integers(0, 3, 7)]
    seen = trace(net, x)
    theirs, error = row_gradients(net, x, y), seen.predict() - y
    np.testing.assert_allclose(flat(seen, error), theirs, atol=1e-6)
    np.testing.assert_allclose(along_pull(net, x, error, summed_pull(net, x, error)), theirs @ theirs.sum(axis=0), atol=1e-9)


@pytest.mark.parametrize("classes", [1, 3])
def test_curvature_is_that_of_all_labels_drawn_by_the_net(classes):
    net, x = outside(4, 3, classes), np.random.default_rng(0).normal(size=(60, 4))
    p = net_predict(net, x)
    shares = [1 - p, p] if classes == 1 else list(p.T)
    under = [row_gradients(net, x, np.full(60, float(c)) if classes == 1 else np.tile(np.eye(3)[c], (60, 1))) for c in range(len(shares))]
    at = 0
    for layer in kronecker(x, net):
        own = slice(at, at + layer.eigenvalues.size)
        basis = np.kron(layer.outputs, layer.inputs)
        by_hand = sum(share @ (some[:, own] @ basis) ** 2 for share, some in zip(shares, under)) / 60
        np.testing.assert_allclose(layer.eigenvalues.ravel(), by_hand, atol=1e-12)
        trace_of = sum((share @ (some[:, own] ** 2).sum(axis=1)) for share, some in zip(shares, under)) / 60
        assert layer.eigenvalues.sum() == pytest.approx(trace_of)  # any basis keeps the trace of the Fisher matrix
        factor = sum(np.einsum("n,noi,npi->op", share, some[:, own].reshape(60, *layer.eigenvalues.shape)[:, :, -1:], some[:, own].reshape(60, *layer.eigenvalues.shape)[:, :, -1:]) for share, some in zip(shares, under))
        if at == 0:  # the first layer has a bias, whose input is 1, so its gradient is b
            turned = layer.outputs.T @ factor @ layer.outputs
            np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-9 * np.abs(turned).max())
        gradient = np.random.default_rng(1).normal(size=layer.eigenvalues.shape)
        dense = (basis * by_hand) @ basis.T + 0.3 * by_hand.mean() * np.eye(len(basis))
        np.testing.assert_allclose(layer.solve(gradient, 0.3).ravel(), np.linalg.solve(dense, gradient.ravel()), rtol=1e-7, atol=1e-8)
        at = own.stop


def test_values_are_the_formulas():
    made, _ = example_evidence(200, 40, d=6)
    net = outside()
    x, y, x_valid, y_valid = (made.train["x"].astype(float), made.train["y"], made.valid["x_valid"].astype(float), made.valid["y_valid"])
    own = with_net(made, net)
    own.train["x"], own.valid["x_valid"] = x, x_valid
    g, trusted = row_gradients(net, x, y), row_gradients(net, x_valid, y_valid)
    layers, at, blocks = find(own, "kronecker"), 0, np.zeros((g.shape[1],) * 2)
    for layer in layers:
        basis, here = np.kron(layer.outputs, layer.inputs), slice(at, at + layer.eigenvalues.size)
        blocks[here, here], at = (basis / (layer.eigenvalues.ravel() + 0.1 * layer.eigenvalues.mean())) @ basis.T, here.stop
    np.testing.assert_allclose(score(own, "ekfac_influence")["ekfac_influence"], g @ blocks @ trusted.mean(axis=0), rtol=1e-8, atol=1e-12)
    p, p_valid = net_predict(net, x), net_predict(net, x_valid)
    Phi, phi = (-rows / np.abs(told - label)[:, None] for rows, told, label in ((g, p, y), (trusted, p_valid, y_valid)))
    gram = Phi.T @ Phi
    inverse = np.linalg.inv(gram + np.trace(gram) / len(gram) * np.eye(len(gram)))
    np.testing.assert_allclose(score(own, "trak")["trak"], (phi @ inverse @ Phi.T).mean(axis=0) * np.abs(p - y), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(score(own, "trak", settings={"trak": {"output": "loss"}})["trak"], (-trusted @ inverse @ Phi.T).mean(axis=0) * np.abs(p - y), rtol=1e-7, atol=1e-12)


def test_the_pull_of_a_margin_is_its_derivative():
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    p = torch.softmax(logits, dim=1)
    own = (p * torch.from_numpy(y)).sum(dim=1)
    (expected,) = torch.autograd.grad(torch.log(own / (1 - own)).sum(), logits)
    np.testing.assert_allclose(margin_pull(p.detach().numpy(), y), expected.numpy(), atol=1e-12)
    np.testing.assert_array_equal(margin_pull(np.array([0.2, 0.9, 0.4]), np.array([0.0, 1.0, 0.5])), [-1, 1, 0])


def test_projections_keep_dot_products_on_average():
    net, x = outside(6, 20), np.random.default_rng(0).normal(size=(30, 6))
    layers, seen = kronecker(x, net), trace(net, x)
    pulls = seen.pull(np.ones(30))
    full = flat(seen, np.ones(30))
    np.testing.assert_allclose(draw_sketch(net, layers, 10_000).project(seen.inputs, pulls), full)  # more columns than weights
    dots, error = full @ full.T, []
    for draws in (2, 200):
        mean = np.mean([(some := draw_sketch(net, layers, 64, seed).project(seen.inputs, pulls)) @ some.T for seed in range(draws)], axis=0)
        error.append(np.linalg.norm(mean - dots) / np.linalg.norm(dots))
    assert error[1] < 0.15 and error[1] < error[0] / 3


def test_projected_values_do_not_depend_on_the_axes():
    made, _ = example_evidence(300, 60, d=6)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0].astype(np.float32)
    values = []
    for rotation in (np.eye(6, dtype=np.float32), turn):
        train, valid = dict(made.train, x=made.train["x"] @ rotation), {name.removesuffix("_valid"): column for name, column in made.valid.items()}
        valid["x"] = valid["x"] @ rotation
        one = Evidence(train, valid, settings={"trak_kernels": {"dimensions": 24}})
        values.append(score(one, "trak")["trak"])
        assert find(one, "trak_kernels")[0][0].sketch.sides is not None
    np.testing.assert_allclose(values[1], values[0], atol=2e-3 * values[0].abs().max())


def test_the_net_is_at_an_optimum_and_folds_do_not_know_their_rows():
    made, _ = example_evidence(300, 60, d=6)
    net, x, y = find(made, "top_net"), torch.from_numpy(made.train["x"].astype(float)), torch.from_numpy(made.train["y"])
    goal = loss_of(net(x), y) + sum((net.recipe.weight_decay if one.ndim > 1 else INTERCEPT_RIDGE) * (one**2).sum() / 2 for one in net.parameters())
    assert max(one.abs().max() for one in torch.autograd.grad(goal, list(net.parameters()))) < 1e-5
    fold, fixed = find(made, "fold"), {"top_net": {"weight_decay": 0.02}}
    first, second = (Evidence(dict(made.train, y=labels), {}, settings=fixed) for labels in (made.train["y"], np.where(fold == 2, 1 - made.train["y"], made.train["y"])))
    np.testing.assert_allclose(find(first, "net_oof")[fold == 2], find(second, "net_oof")[fold == 2], atol=1e-9)
    assert np.abs(find(first, "net_oof") - find(second, "net_oof"))[fold != 2].max() > 1e-2


def test_a_net_from_outside_is_left_as_it_was():
    made, _ = example_evidence(200, 40, d=6)
    net = outside().float().train()
    for one in net.parameters():
        one.requires_grad_(False)  # frozen layers are looked at too
    before = copy.deepcopy(net.state_dict())
    own = with_net(made, net)
    values = score(own, ["ekfac_influence", "trak"])
    assert np.isfinite(values.to_numpy()).all() and (values.nunique() > 100).all()
    assert net.training and not net[0]._forward_hooks and all(torch.equal(before[name], now) for name, now in net.state_dict().items())
    assert find(own, "fold_nets") == {} and "head" not in own.computed
    np.testing.assert_allclose(find(own, "net_oof"), net_predict(net, made.train["x"]))
    told = np.random.default_rng(0).uniform(0.1, 0.9, 200)
    assert not np.allclose(score(with_net(made, net, net_oof=told), "ekfac_influence")["ekfac_influence"], values["ekfac_influence"])


@pytest.mark.parametrize("net, what", [
    (lambda: torch.nn.Sequential(torch.nn.Tanh(), torch.nn.PReLU(6)), "0 linear layers"),
    (lambda: outside(outputs=2), "Expected: one logit, for the gain"),
    (lambda: torch.nn.Sequential(*[torch.nn.Linear(6, 6)] * 2, torch.nn.Linear(6, 1)), "used twice"),
    (lambda: torch.nn.Sequential(torch.nn.Unflatten(1, (2, 3)), torch.nn.Linear(3, 1), torch.nn.Flatten(), torch.nn.Linear(2, 1)), "used twice"),
])
def test_nets_that_cannot_be_looked_at_are_refused(net, what):
    made, _ = example_evidence(60, 20, d=6)
    with pytest.raises(DataError, match=what):
        score(with_net(made, net().float()), "ekfac_influence")


@pytest.mark.parametrize("part, name, setting, what", [
    ("top_net", "ekfac_influence", {"width": 0}, "width is 0"),
    ("top_net", "ekfac_influence", {"weight_decay": 0.0}, "weight_decay is 0.0"),
    ("trak_kernels", "trak", {"dimensions": 0}, "dimensions is 0"),
    (None, "ekfac_influence", {"damping": -1.0}, "damping is -1.0"),
    (None, "trak", {"damping": -1.0}, "damping is -1.0"),
    (None, "trak", {"output": "logit"}, "output is 'logit'"),
])
def test_bad_settings_are_named(part, name, setting, what):
    made, _ = example_evidence(60, 20, d=3)
    made.settings |= {part: setting} if part else {}
    with pytest.raises(ValueError, match=what):
        score(made, name, settings=None if part else {name: setting})


def test_several_nets_need_a_recipe_and_differ():
    made, _ = example_evidence(200, 40, d=6)
    own = with_net(made, outside().float())
    own.settings["trak_kernels"] = {"nets": 2}
    with pytest.raises(ValueError, match="nets is 2, and `top_net` came from outside"):
        score(own, "trak")
    made.settings |= {"trak_kernels": {"nets": 2}, "top_net": {"weight_decay": 0.005}}
    table = score(made, "trak", repeats=2)
    first, second = find(made, "trak_kernels")[0]
    assert first.sketch.net is find(made, "top_net") and not torch.equal(first.sketch.net[1].weight, second.sketch.net[1].weight)
    assert (table["trak_se"] > 0).any()


def test_fewer_rows_than_units_and_a_start_that_belongs_to_names():
    x = np.random.default_rng(0).normal(size=(3, 4))
    net = start_net(x, 1, np.array([2, 0, 1]), Recipe(8, 0.01, 10, 1e-6, 100))
    other = start_net(x[[1, 2, 0]], 1, np.array([0, 1, 2]), Recipe(8, 0.01, 10, 1e-6, 100))
    assert net[1].weight.shape == (3, 4)
    np.testing.assert_allclose(net[1].weight.detach(), other[1].weight.detach())


def test_new_rows_are_scored_with_a_net_from_outside():
    import pandas as pd

    made, _ = example_evidence(200, 40, d=6)
    own = with_net(made, outside().float())
    values = score(own, ["ekfac_influence", "trak"])
    old = pd.DataFrame({name: column[:5] for name, column in made.train.items() if name not in ("x", "y")}).assign(gain=made.train["y"][:5])
    np.testing.assert_allclose(score_new(own, old, made.train["x"][:5], ["ekfac_influence", "trak"]), values.iloc[:5], rtol=1e-6, atol=1e-12)
