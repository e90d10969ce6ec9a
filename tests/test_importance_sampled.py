"""The game of the head and its sampled values: against all coalitions, the axioms, and what is refused."""
from itertools import combinations
from math import comb, factorial

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import beta as beta_law

from ecom_importance.importance import Evidence, find, score
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.heads import INTERCEPT_RIDGE
from ecom_importance.importance.sampled import banzhaf, beta_shapley, beta_weights, draw_halves, draw_orders, make_game, query_owen, take_walks, tmc_shapley
from ecom_importance.samples import DataError

N, QUERY = 7, np.array([0, 0, 1, 1, 1, 2, 2])


def make(graded=False, prior=1.0, seed=0):
    rng = np.random.default_rng(seed)
    x, x_valid = rng.normal(size=(N, 2)), rng.normal(size=(12, 2))
    y = rng.choice([0, 0.5, 1.0], N) if graded else rng.permutation([0, 1, 0, 1, 0, 1, 1]).astype(float)
    return make_game(x, y, x_valid, (x_valid[:, 0] > 0).astype(float), ridge=0.1, prior=prior)


def worth_by_scipy(game, members):
    "v from its definition, by another optimiser."
    if not members.any():
        return game.empty
    weights = np.r_[members, game.prior] / (members.sum() + game.prior)
    penalty = np.r_[np.full(game.wide.shape[1] - 1, game.ridge), INTERCEPT_RIDGE]

    def objective(theta):
        z = game.wide @ theta
        return weights @ (np.logaddexp(0, z) - game.y * z) + penalty @ theta**2 / 2, game.wide.T @ (weights * (expit(z) - game.y)) + penalty * theta

    theta = minimize(objective, np.zeros(game.wide.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-10}).x
    z = game.wide_valid @ theta
    return -np.mean(np.logaddexp(0, z) - game.y_valid * z)


@pytest.fixture(scope="module", params=[False, True], ids=["binary", "graded"])
def all_worths(request):
    game = make(request.param)
    return game, {some: worth_by_scipy(game, np.isin(np.arange(N), some)) for size in range(N + 1) for some in combinations(range(N), size)}


def test_worths_are_those_of_another_optimiser(all_worths):
    game, worths = all_worths
    coalitions = np.array([np.isin(np.arange(N), some) for some in worths])
    np.testing.assert_allclose(game.worth(coalitions), list(worths.values()), atol=2e-5)
    assert game.empty == pytest.approx(worths[()]) and game.whole == pytest.approx(worths[tuple(range(N))], abs=2e-5)


def marginal(worths, weigh):
    return np.array([sum(weigh(len(s)) * (worths[tuple(sorted((*s, i)))] - worth) for s, worth in worths.items() if i not in s) for i in range(N)])


def within(values, exact):
    "Each row's mean over independent draws lies within five standard errors of the exact value."
    values = np.asarray(values)
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return (np.abs(values.mean(axis=0) - exact) < 5 * error + 3e-5).all()


def test_every_value_is_that_of_all_coalitions(all_worths):
    game, worths = all_worths
    names = np.arange(N)
    walks = take_walks(game, lambda numbers: draw_orders(names, numbers), permutations=600, truncation=0)
    assert within(walks.values(), marginal(worths, lambda size: factorial(size) * factorial(N - size - 1) / factorial(N)))
    for alpha, beta in ((4.0, 1.0), (1.0, 4.0), (16.0, 1.0)):
        exact = marginal(worths, lambda size: quad(lambda t: t**size * (1 - t) ** (N - 1 - size) * beta_law.pdf(t, beta, alpha), 0, 1)[0])
        assert within(walks.values(beta_weights(N, alpha, beta)), exact)
    runs = [banzhaf(game, names, samples=60, seed=seed) for seed in range(20)]
    assert within(runs, marginal(worths, lambda size: 0.5 ** (N - 1)))


def test_owen_is_that_of_all_coalitions(all_worths):
    game, worths = all_worths
    exact, labels = np.zeros(N), np.unique(QUERY)
    for i in range(N):
        others, mates = [q for q in labels if q != QUERY[i]], [j for j in range(N) if QUERY[j] == QUERY[i] and j != i]
        for size in range(len(others) + 1):
            for unions in combinations(others, size):
                for more in range(len(mates) + 1):
                    for own in combinations(mates, more):
                        s = sorted([*np.flatnonzero(np.isin(QUERY, unions)), *own])
                        exact[i] += (worths[tuple(sorted([*s, i]))] - worths[tuple(s)]) / (len(labels) * comb(len(others), size) * (len(mates) + 1) * comb(len(mates), more))
    walks = take_walks(game, lambda numbers: draw_orders(np.arange(N), numbers, 0, QUERY), permutations=600, truncation=0)
    assert within(walks.values(), exact)
    np.testing.assert_allclose(query_owen(game, np.arange(N), QUERY, permutations=600, truncation=0), walks.values().mean(axis=0))


def test_beta_weights_have_mean_one_and_one_one_is_shapley():
    for alpha, beta in ((1, 1), (4, 1), (1, 16), (2.5, 3)):
        assert beta_weights(50, alpha, beta).mean() == pytest.approx(1)
    np.testing.assert_allclose(beta_weights(50, 1, 1), 1)
    assert beta_weights(50, 4, 1)[0] > beta_weights(50, 4, 1)[-1]


@pytest.mark.parametrize("prior", [0.0, 1.0, 3.0])
def test_shares_add_up_to_the_whole(prior):
    "Efficiency, in every pair of orders, with and without the row of the prior."
    game = make(prior=prior, seed=3)
    walks = take_walks(game, lambda numbers: draw_orders(np.arange(N), numbers), permutations=10, truncation=0)
    np.testing.assert_allclose(walks.values().sum(axis=1), game.whole - game.empty, atol=1e-4)


def test_duplicates_share_alike():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 2)), np.array([0, 1, 0, 1, 1, 0.0])
    x[5], y[5] = x[0], y[0]
    game = make_game(x, y, rng.normal(size=(10, 2)), rng.integers(0, 2, 10).astype(float), ridge=0.1)
    each = take_walks(game, lambda numbers: draw_orders(np.arange(6), numbers), permutations=800, truncation=0).values()
    apart = each[:, 0] - each[:, 5]
    assert abs(apart.mean()) < 5 * apart.std() / np.sqrt(len(apart))


def test_orders_belong_to_names_and_keep_queries_together():
    names = np.array(["杯 1", "灯 2", "a", "b", "c", "d", "e"])
    orders, turned = draw_orders(names, range(5), 3), draw_orders(names[::-1], range(5), 3)
    assert [list(names[order]) for order in orders] == [list(names[::-1][order]) for order in turned]
    assert (orders[1::2] == orders[::2, ::-1]).all() and len({tuple(order) for order in orders}) == 10
    for order in draw_orders(names, range(20), 0, QUERY):
        assert (np.diff(QUERY[order]) != 0).sum() == 2
    halves = draw_halves(np.arange(2000), 100)
    assert halves.shape == (50, 2000) and 0.45 < halves.mean() < 0.55 and np.abs(np.corrcoef(halves[:, :40].T) - np.eye(40)).max() < 0.7


def test_truncation_stops_early_and_costs_what_it_says():
    made, _ = example_evidence(150, 60, d=3)
    game = find(made, "utility_game")
    orders = lambda numbers: draw_orders(made.sample_ids, numbers)
    whole, cut = (take_walks(game, orders, permutations=10, truncation=share) for share in (0.0, 0.05))
    assert (cut.gains != 0).sum() < (whole.gains != 0).sum()
    assert abs(cut.values().sum(axis=1) - (game.whole - game.empty)).max() <= 0.05 * abs(game.whole - game.empty) + 1e-6


def test_tolerance_and_seconds_stop():
    game = make()
    orders = lambda numbers: draw_orders(np.arange(N), numbers)
    early = take_walks(game, orders, permutations=2000, tolerance=0.5)
    assert 20 <= len(early.gains) < 2000
    assert len(take_walks(game, orders, permutations=4000, seconds=1e-6).gains) < 100
    assert np.isfinite(banzhaf(game, np.arange(N), samples=1000, tolerance=0.5)).all()


@pytest.mark.parametrize("call, what", [
    (lambda game: take_walks(game, None, permutations=5), "permutations is 5"), (lambda game: take_walks(game, None, truncation=-1), "truncation -1"),
    (lambda game: banzhaf(game, np.arange(N), samples=3), "samples is 3"), (lambda game: beta_shapley(None, alpha=0), "alpha is 0"),
])
def test_bad_settings_are_named(call, what):
    with pytest.raises(ValueError, match=what):
        call(make())


def test_what_would_take_days_is_refused_and_something_else_named():
    made, _ = example_evidence(40_000, 60, d=4)
    small = Evidence(dict(made.train), {name.removesuffix("_valid"): column for name, column in made.valid.items()}, settings={"head": {"ridge": 0.01}})
    for name, other in (("tmc_shapley", "banzhaf"), ("query_owen", "knn_shapley")):
        with pytest.raises(DataError, match=f"at most some .*{other}"):
            score(small, name, progress=False)


def test_repeats_give_a_standard_error_of_the_right_size():
    made, _ = example_evidence(60, 60, d=2)
    own = Evidence(dict(made.train), {name.removesuffix("_valid"): column for name, column in made.valid.items()}, settings={"row_walks": {"permutations": 10}})
    table, other = (score(own, "tmc_shapley", repeats=6, seed=seed, progress=False) for seed in (0, 50))
    apart = (table["tmc_shapley"] - other["tmc_shapley"]) / np.hypot(table["tmc_shapley_se"], other["tmc_shapley_se"])
    assert 0.4 < np.median(np.abs(apart)) < 1.4
    assert tmc_shapley(find(own, "row_walks")).shape == (60,)
