"""Scores, orders and the V/O decomposition against brute force on fresh random matrices."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from uniql_jax.compression.math import mlp, rope_pairs, value_output
from uniql_jax.compression.math.order import descending, greedy, tail_loss
from uniql_jax.compression.settings import MLP_SCORES, PAIR_SCORES, VALUE_OUTPUTS


def psd(rng: np.random.Generator, size: int, rank: int | None = None) -> np.ndarray:
    """A random positive semidefinite matrix."""
    factor = rng.standard_normal((rank or 2 * size, size))
    return factor.T @ factor / len(factor)


def f32(value: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(value, jnp.float32)


def test_descending_puts_the_largest_first(rng: np.random.Generator) -> None:
    scores = rng.standard_normal(50)
    order = np.asarray(descending(f32(scores)))
    assert sorted(order) == list(range(50))
    assert (np.diff(scores[order].astype(np.float32)) <= 0).all()


def test_greedy_drops_what_adds_least(rng: np.random.Generator) -> None:
    loss = psd(rng, 9, rank=5)
    left, dropped = list(range(9)), []
    while left:
        price = {j: loss[np.ix_([*dropped, j], [*dropped, j])].sum() for j in left}
        cheapest = min(left, key=price.__getitem__)
        left.remove(cheapest)
        dropped.append(cheapest)
    assert np.asarray(greedy(f32(loss))).tolist() == dropped[::-1]


def test_greedy_counts_couplings_that_scores_do_not_see() -> None:
    # Two channels that cancel each other: dropping both is free, dropping either alone is dear.
    loss = np.diag([5.0, 5.0, 1.0, 1.1])
    loss[0, 1] = loss[1, 0] = -5.0
    loss[2, 3] = loss[3, 2] = 1.0
    order = np.asarray(greedy(f32(loss))).tolist()
    assert order[3] == 2  # cheapest alone
    assert sorted(order) == [0, 1, 2, 3]


def test_tail_loss_is_the_block_sum(rng: np.random.Generator) -> None:
    loss = np.stack([psd(rng, 7), psd(rng, 7)])
    want = [[m[k:, k:].sum() for k in range(8)] for m in loss]
    np.testing.assert_allclose(tail_loss(f32(loss)), want, rtol=1e-4, atol=1e-4)


def test_leverage_is_the_ridge_formula(rng: np.random.Generator) -> None:
    gram = psd(rng, 24)
    ridge = 1e-2 * np.trace(gram) / 24
    want = np.diagonal(gram @ np.linalg.inv(gram + ridge * np.eye(24)))
    np.testing.assert_allclose(mlp.leverage(f32(gram)), want, rtol=2e-3)


@pytest.mark.parametrize("method", MLP_SCORES)
def test_every_mlp_order_is_a_permutation(method: str, rng: np.random.Generator) -> None:
    order = mlp.order_channels(
        f32(psd(rng, 20)), f32(rng.standard_normal((20, 8))), method, 3, f32(psd(rng, 8)), f32(psd(rng, 20))
    )
    assert sorted(np.asarray(order).tolist()) == list(range(20))


def test_unknown_methods_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="unknown MLP score"):
        mlp.order_channels(f32(psd(rng, 4)), f32(rng.standard_normal((4, 2))), "luck")
    with pytest.raises(ValueError, match="unknown RoPE-pair score"):
        rope_pairs.order_pairs(f32(psd(rng, 4))[None, None], f32(psd(rng, 4))[None], "luck")
    o = f32(rng.standard_normal((4, 1, 6)))
    with pytest.raises(ValueError, match="unknown V/O method"):
        value_output.sort_value_output(o, o, f32(psd(rng, 4))[None], f32(psd(rng, 6)), "luck")


def test_greedy_order_loses_less_than_random_and_magnitude(rng: np.random.Generator) -> None:
    width, hidden, tokens = 48, 12, 400
    inputs = rng.standard_normal((tokens, width)) * np.exp(rng.standard_normal(width))
    down = rng.standard_normal((width, hidden)) * np.exp(0.5 * rng.standard_normal((width, 1)))
    gram = inputs.T @ inputs / tokens

    def lost(method: str) -> float:
        order = np.asarray(mlp.order_channels(f32(gram), f32(down), method))
        kept = order[: width * 3 // 4]
        return float(((inputs @ down - inputs[:, kept] @ down[kept]) ** 2).mean())

    assert lost("greedy") < 0.9 * min(lost("random"), lost("magnitude"), lost("leverage"))


def test_pair_loss_is_the_expected_squared_change_of_scores(rng: np.random.Generator) -> None:
    groups, heads, width, tokens = 2, 3, 8, 60
    q = rng.standard_normal((tokens, groups, heads, width))
    k = rng.standard_normal((tokens, groups, width))
    gram_q = np.einsum("tgmi,tgmj->gmij", q, q) / tokens
    gram_k = np.einsum("tgi,tgj->gij", k, k) / tokens
    loss = np.asarray(rope_pairs.pair_loss(f32(gram_q), f32(gram_k)))
    for g, dropped in itertools.product(range(groups), ([1], [0, 3], [0, 1, 2])):
        dims = [d for p in dropped for d in (2 * p, 2 * p + 1)]
        change = np.einsum("tmi,si->mts", q[:, g][..., dims], k[:, g][..., dims])
        want = (change**2).mean((1, 2)).sum()
        np.testing.assert_allclose(loss[g][np.ix_(dropped, dropped)].sum(), want, rtol=1e-4)


@pytest.mark.parametrize("method", PAIR_SCORES)
def test_pairs_are_permuted_per_head(method: str, rng: np.random.Generator) -> None:
    gram_q = np.stack([[psd(rng, 16) for _ in range(3)] for _ in range(2)])
    gram_k = np.stack([psd(rng, 16) for _ in range(2)])
    gates = np.stack([psd(rng, 8) for _ in range(2)])
    order = np.asarray(rope_pairs.order_pairs(f32(gram_q), f32(gram_k), method, 1, f32(gates)))
    assert order.shape == (8, 2)
    for head in range(2):
        assert sorted(order[:, head].tolist()) == list(range(8))


def products(v: np.ndarray, o: np.ndarray) -> np.ndarray:
    """W_V W_O of every query head, [n, h, h]."""
    shared = o.shape[1] // v.shape[1]
    return np.stack([v[:, n // shared].T @ o[:, n] for n in range(o.shape[1])])


@pytest.mark.parametrize("method", VALUE_OUTPUTS)
@pytest.mark.parametrize(("groups", "heads"), [(2, 6), (4, 4)])
def test_value_output_is_lossless_at_full_rank(method: str, groups: int, heads: int, rng: np.random.Generator) -> None:
    d, hidden = 8, 40
    v, o = rng.standard_normal((d, groups, hidden)), rng.standard_normal((d, heads, hidden))
    gram = np.stack([psd(rng, d) for _ in range(groups)])
    metric = psd(rng, hidden)
    _, new_v, new_o = value_output.sort_value_output(
        f32(v), f32(o), f32(gram), f32(psd(rng, hidden)), method, 5, f32(metric)
    )
    assert new_v.shape == v.shape
    assert new_o.shape == o.shape
    want = products(v, o)
    assert np.linalg.norm(products(np.asarray(new_v), np.asarray(new_o)) - want) < 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("weighed", [False, True])
def test_value_output_is_the_best_truncation(weighed: bool, rng: np.random.Generator) -> None:
    # One head: nothing can beat the truncated SVD of A^1/2 W_O F^1/2, with A the Gram of what O receives.
    d, hidden, rank = 10, 24, 4
    o = rng.standard_normal((d, 1, hidden))
    received = rng.standard_normal((300, d)) * np.exp(rng.standard_normal(d))
    felt = rng.standard_normal((300, hidden)) * np.exp(rng.standard_normal(hidden)) if weighed else None
    gram = received.T @ received / 300
    metric = felt.T @ felt / 300 if felt is not None else np.eye(hidden)
    change, new_o = value_output.decompose(f32(o), f32(gram)[None], f32(metric) if weighed else None)
    basis, new_o = np.asarray(change[0], np.float64), np.asarray(new_o[:, 0], np.float64)

    def root(m: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(m)
        return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T

    whole = root(gram) @ o[:, 0] @ root(metric)
    kept = root(gram) @ basis[:rank].T @ new_o[:rank] @ root(metric)
    best = np.sqrt((np.linalg.svd(whole, compute_uv=False)[rank:] ** 2).sum())
    assert np.linalg.norm(whole - kept) < best * 1.01
    # What the plan gets as the loss of that cut is what it costs.
    predicted = value_output.rank_loss(change, f32(new_o)[:, None], f32(gram)[None], f32(metric))
    np.testing.assert_allclose(predicted[rank], np.linalg.norm(whole - kept) ** 2, rtol=1e-2)
