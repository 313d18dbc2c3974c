"""Scores, orders and GPTQ on inputs without content, without rank, or out of scale: permutations and finite numbers."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from uniql_jax.compression.finite import first_nonfinite
from uniql_jax.compression.math import mlp, rope_pairs, ssm
from uniql_jax.compression.math.gptq import inverse_factor, quantize
from uniql_jax.compression.math.order import descending, greedy
from uniql_jax.compression.settings import CHANNEL_SCORES, MLP_SCORES, PAIR_SCORES, STATE_SCORES
from uniql_jax.compression.sorting import cosine
from uniql_jax.value_bias import free_rank, value_bias

WIDTH, HIDDEN = 16, 12
INPUTS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "zero": lambda rng, n: np.zeros((20, n)),
    "one token": lambda rng, n: rng.standard_normal((1, n)),
    "few tokens": lambda rng, n: rng.standard_normal((n // 3, n)),
    "constant": lambda rng, n: np.ones((20, n)),
    "half dead": lambda rng, n: rng.standard_normal((40, n)) * (np.arange(n) % 2),
    "huge": lambda rng, n: 1e15 * rng.standard_normal((40, n)),
    "tiny": lambda rng, n: 1e-17 * rng.standard_normal((40, n)),
    "outlier": lambda rng, n: rng.standard_normal((40, n)) * np.where(np.arange(n) == 3, 1e4, 1.0),
    "random": lambda rng, n: rng.standard_normal((40, n)),
}
"""Rows of activations or slopes by what is wrong with them."""


def _gram(kind: str, rng: np.random.Generator, width: int, *lead: int) -> jnp.ndarray:
    """Gram matrices [*lead, width, width] of such rows, computed in float32 as the statistics are."""
    rows = np.stack([INPUTS[kind](rng, width) for _ in range(int(np.prod(lead)))]).astype(np.float32)
    return jnp.asarray(np.einsum("lti,ltj->lij", rows, rows) / rows.shape[1]).reshape(*lead, width, width)


def _is_permutation(order: np.ndarray) -> bool:
    return (np.sort(order, axis=0) == np.arange(len(order)).reshape(-1, *[1] * (order.ndim - 1))).all()


@pytest.mark.parametrize("kind", INPUTS)
def test_every_order_is_a_permutation(kind: str, rng: np.random.Generator) -> None:
    other = rng.permutation(list(INPUTS))[0]
    gram, fisher, metric = _gram(kind, rng, WIDTH), _gram(other, rng, WIDTH), _gram(other, rng, HIDDEN)
    for down in (np.zeros((WIDTH, HIDDEN)), 1e20 * rng.standard_normal((WIDTH, HIDDEN))):
        for method in MLP_SCORES:
            order = mlp.order_channels(gram, jnp.asarray(down, jnp.float32), method, 1, metric, fisher)
            assert _is_permutation(np.asarray(order)), (method, other)
        out = jnp.asarray(down, jnp.float32).reshape(4, 4, HIDDEN)
        for method in CHANNEL_SCORES:
            order = ssm.order_head_channels(gram, out, method, 1, metric, fisher, gram)
            assert _is_permutation(np.asarray(order)), (method, other)
    gram_q, gram_k = _gram(kind, rng, 8, 2, 3), _gram(other, rng, 8, 2)
    for method in PAIR_SCORES:
        order = rope_pairs.order_pairs(gram_q, gram_k, method, 1, _gram(kind, rng, 4, 2))
        assert _is_permutation(np.asarray(order)), (method, other)
    squares = np.square(INPUTS[kind](rng, 8)[:1].astype(np.float32)).reshape(4, 2)
    for method in STATE_SCORES:
        states = ssm.order_states(
            jnp.asarray(np.repeat(squares[..., None], 3, axis=2)),
            jnp.asarray(squares),
            method,
            1,
            _gram(kind, rng, 4, 2),
        )
        assert _is_permutation(np.asarray(states)), (method, other)
    scores = np.asarray(mlp.leverage(gram))
    assert ((scores > -1e-3) & (scores < 1 + 1e-3)).all()


def test_equals_keep_their_order() -> None:
    assert np.asarray(greedy(jnp.zeros((7, 7)))).tolist() == list(range(7))
    assert np.asarray(greedy(jnp.eye(7))).tolist() == list(range(7))
    assert np.asarray(descending(jnp.zeros(7))).tolist() == list(range(7))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_greedy_is_a_permutation_whatever_the_values(value: float, rng: np.random.Generator) -> None:
    loss = np.asarray(_gram("random", rng, 9)).copy()
    loss[2, 5] = loss[5, 2] = loss[4, 4] = value
    assert _is_permutation(np.asarray(greedy(jnp.asarray(loss))))
    assert _is_permutation(np.asarray(greedy(jnp.full((9, 9), value))))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", INPUTS)
def test_gptq_is_finite_and_close(kind: str, bits: int, rng: np.random.Generator) -> None:
    hessian = _gram(kind, rng, 32)
    weight = rng.standard_normal((6, 32)).astype(np.float32)
    weight[1], weight[2, 16:], weight[:, 5] = 0, 0, 0
    codes, scale, rounded = quantize(jnp.asarray(weight), hessian, bits=bits, group=16, return_unrounded=True)
    assert first_nonfinite((scale, rounded)) is None
    assert not np.asarray(codes)[1].any()
    got = np.asarray(codes) * np.repeat(np.asarray(scale, np.float32), 16, axis=1)
    missed = (got - weight).astype(np.float64)
    # no worse, to what receives these inputs, than a step's error in every entry
    steps = np.abs(weight).max() / (7 if bits == 4 else 127)
    h = np.asarray(hessian, np.float64)
    assert np.trace(missed @ h @ missed.T) <= weight.shape[0] * steps**2 * np.trace(h) * 4


@pytest.mark.parametrize("size", [1e-45, 1e-39, 3e-38, 1e-30, 1e20, 1e37])
def test_scales_of_tiny_and_huge_weights_are_finite(size: float, rng: np.random.Generator) -> None:
    weight = (rng.uniform(-1, 1, (4, 32)) * size).astype(np.float32)
    weight[0, 1:] = 0  # a group of one entry
    for hessian in (None, _gram("random", rng, 32)):
        codes, scale, _ = quantize(jnp.asarray(weight), hessian, bits=4, group=16)
        assert first_nonfinite(scale) is None
        got = np.asarray(codes, np.float64) * np.repeat(np.asarray(scale, np.float64), 16, axis=1)
        if size > 1e-36:
            assert np.abs(got - weight).max() < 0.5 * size
            assert got[1].any()
        else:
            assert np.abs(got).max() <= 1.1 * size + 1e-37


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_the_scales(value: float, rng: np.random.Generator) -> None:
    weight, hessian = rng.standard_normal((4, 32)).astype(np.float32), np.asarray(_gram("random", rng, 32)).copy()
    broken = weight.copy()
    broken[2, 3] = value
    assert first_nonfinite(quantize(jnp.asarray(broken), None, bits=4, group=16)[1]) is not None
    hessian[3, 4] = value
    assert first_nonfinite(quantize(jnp.asarray(weight), jnp.asarray(hessian), bits=4, group=16)[1]) is not None


@pytest.mark.parametrize("kind", INPUTS)
def test_damping_of_zero_ends(kind: str, rng: np.random.Generator) -> None:
    factor = inverse_factor(_gram(kind, rng, 24), 0.0)
    assert first_nonfinite(factor) is None
    assert (jnp.diagonal(factor) > 0).all()


def test_cosine_of_vectors_of_any_size(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, 5, 16))
    want = np.sum(x * y, -1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    for size in (1e-30, 1.0, 1e30):
        got = cosine(jnp.asarray(size * x, jnp.float32), jnp.asarray(y / size, jnp.float32))
        np.testing.assert_allclose(got, want, atol=1e-5)
    zero = jnp.zeros((5, 16))
    np.testing.assert_array_equal(cosine(zero, zero), 1.0)
    np.testing.assert_array_equal(cosine(zero, jnp.asarray(y, jnp.float32)), 0.0)


def test_value_bias_of_an_output_weight_without_rank(rng: np.random.Generator) -> None:
    o = rng.standard_normal((8, 4, 24)).astype(np.float32)
    o[1], o[2:4] = 0, o[4:6] + 1e-9 * rng.standard_normal((2, 4, 24)).astype(np.float32)
    wanted = rng.standard_normal((8, 2)).astype(np.float32)
    bias = np.einsum("dg,dgmh->h", wanted, o.reshape(8, 2, 2, 24)).astype(np.float32)
    found, gives = value_bias(o, bias, 2)
    np.testing.assert_allclose(gives, bias, atol=1e-5)
    assert np.abs(found).max() <= 2 * np.abs(wanted).max()
    found, gives = value_bias(np.zeros_like(o), bias, 2)
    assert not found.any()
    assert not gives.any()
    v = rng.standard_normal((8, 2, 24)).astype(np.float32)
    assert free_rank(v, o) is None
    v[1, 1] = 0
    assert free_rank(v, o) == (1, 1)
