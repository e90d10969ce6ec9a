"""Losses by hand, by loops over pairs and lists, and what weights mean under each of them."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecom_importance.finetuning.losses import GROUPED, LOSSES, pairwise_loss, weighted_loss


def brute_pairs(logit, gain, weight, query, of_difference=lambda d: np.log1p(np.exp(-d)), moves=lambda rows, i, j: 1.0):
    "A loss over pairs of a table by loops, as the notebook's formula reads."
    total = 0.0
    for one in set(query):
        rows = [row for row in range(len(query)) if query[row] == one]
        pairs = [(i, j) for i in rows for j in rows if gain[i] > gain[j]]
        counts = [weight[i] * weight[j] * moves(rows, i, j) for i, j in pairs]
        if sum(counts):
            losses = [of_difference(logit[i] - logit[j]) for i, j in pairs]
            total += sum(weight[row] for row in rows) * np.dot(counts, losses) / sum(counts)
    return total


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_losses_over_pairs_and_lists_are_their_formulas(data):
    n = data.draw(st.integers(1, 12))
    of = lambda values: data.draw(st.lists(values, min_size=n, max_size=n))
    logit, gain, weight, query = of(st.floats(-5, 5)), of(st.sampled_from([0, 0.1, 0.5, 1])), of(st.sampled_from([0, 0.5, 1, 3])), of(st.integers(0, 3))
    tensors = [torch.tensor(each, dtype=torch.float64) for each in (logit, gain, weight, query)]

    def moves(rows, i, j):
        "How much NDCG@10 moves, in the mean over the orders of rows that tie."
        rows = [row for row in rows if weight[row] > 0]
        ideal = sum(g / np.log2(place + 2) for place, g in enumerate(sorted((gain[row] for row in rows), reverse=True)[:10]))
        places = lambda one: [place for place in range(len(rows)) if sum(logit[r] > logit[one] for r in rows) <= place < sum(logit[r] >= logit[one] for r in rows)]
        discount = lambda place: 1 / np.log2(place + 2) if place < 10 else 0.0
        apart = [abs(discount(a) - discount(b)) for a in places(i) for b in places(j) if a != b] if i in rows and j in rows else []
        return abs(gain[i] - gain[j]) * np.mean(apart) / ideal if ideal and apart else 0.0

    def brute_listnet():
        total = 0.0
        for one in set(query):
            rows = [row for row in range(n) if query[row] == one]
            mass, everyone = sum(weight[r] * gain[r] for r in rows), sum(weight[r] * np.exp(logit[r]) for r in rows)
            if mass:
                total += sum(weight[r] for r in rows) * -sum(weight[r] * gain[r] / mass * np.log(np.exp(logit[r]) / everyone) for r in rows)
        return total

    expected = {"pairwise": brute_pairs(logit, gain, weight, query), "margin": brute_pairs(logit, gain, weight, query, lambda d: max(0.0, 1 - d)),
                "lambda": brute_pairs(logit, gain, weight, query, moves=moves), "listnet": brute_listnet()}
    assert set(expected) == set(GROUPED)
    for loss, value in expected.items():
        found = LOSSES[loss](*tensors)
        assert all(torch.isfinite(each).all() for each in found) and (found.loss >= 0).all()
        assert float((tensors[2] * found.term).sum()) == pytest.approx(value, abs=1e-7), loss


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(set(LOSSES) - {"lambda"})), st.lists(st.integers(0, 3), min_size=9, max_size=9).filter(any), st.integers(0, 1000))
def test_whole_weights_are_repetition(loss, weight, seed):
    draw = torch.Generator().manual_seed(seed)
    logit, gain, query = torch.randn(9, generator=draw, dtype=torch.float64), torch.randint(0, 3, (9,), generator=draw) / 2.0, torch.arange(9) // 3
    again = torch.repeat_interleave(torch.arange(9), torch.tensor(weight))
    by_weight = weighted_loss(loss, logit, gain.double(), torch.tensor(weight, dtype=torch.float64), query)
    by_repetition = weighted_loss(loss, logit[again], gain.double()[again], torch.ones(len(again), dtype=torch.float64), query[again])
    torch.testing.assert_close(by_weight, by_repetition)


def test_losses_by_hand():
    logit, gain = torch.logit(torch.tensor([0.3, 0.7, 0.2], dtype=torch.float64)), torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    soft = -0.5 * np.log(0.2) - 0.5 * np.log(0.8)
    np.testing.assert_allclose(LOSSES["pointwise"](logit, gain).loss, [-np.log(0.7), -np.log(0.7), soft])
    np.testing.assert_allclose(LOSSES["mse"](logit, gain).loss, [0.09, 0.09, 0.09])
    np.testing.assert_allclose(LOSSES["pointwise"](logit, gain).margin, [np.log(7 / 3), np.log(7 / 3), 0], atol=1e-12)
    # Gains 1 over 0 with a difference of 2, weights 1 and 3: W_q = 4, one pair.
    pair = pairwise_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
    np.testing.assert_allclose(torch.tensor([1.0, 3.0]) @ pair.term, 4 * np.log1p(np.exp(-2)), rtol=1e-6)
    assert pair.margin.tolist() == [2, 2]


def test_losses_neither_overflow_nor_lose_their_gradient():
    logit = torch.tensor([800.0, -800.0], requires_grad=True)
    sum(LOSSES[loss](logit, torch.tensor([0.0, 1.0]), torch.ones(2), torch.zeros(2)).term.sum() for loss in LOSSES).backward()
    assert torch.isfinite(logit.grad).all() and logit.grad[0] > 0 > logit.grad[1]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(LOSSES)), st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=9, max_size=9).filter(any), st.integers(0, 1000))
def test_weight_0_is_leaving_out_and_no_row_teaches_another_query(loss, weight, seed):
    draw = torch.Generator().manual_seed(seed)
    logit, gain, query, weight = torch.randn(9, generator=draw, dtype=torch.float64), torch.randint(0, 3, (9,), generator=draw) / 2.0, torch.arange(9) // 3, torch.tensor(weight, dtype=torch.float64)
    kept = weight > 0
    torch.testing.assert_close(weighted_loss(loss, logit, gain.double(), weight, query), weighted_loss(loss, logit[kept], gain.double()[kept], weight[kept], query[kept]))
    moved = logit + 3.0 * (query == 0)
    if loss in GROUPED:  # a shift of one query changes no order and no share within it
        torch.testing.assert_close(weighted_loss(loss, moved, gain.double(), weight, query), weighted_loss(loss, logit, gain.double(), weight, query))


def test_lambda_looks_at_the_top():
    "The same two swapped pairs, one at the top and one far below: the upper one costs more."
    gain = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    order = torch.arange(8, 0, -1, dtype=torch.float64)
    top, low = order.clone(), order.clone()
    top[[0, 1]], low[[6, 7]] = order[[1, 0]], order[[7, 6]]
    of = lambda logit: float(LOSSES["lambda"](logit, gain, torch.ones(8, dtype=torch.float64), torch.zeros(8)).term.sum())
    assert of(top) > of(low) > of(order)
