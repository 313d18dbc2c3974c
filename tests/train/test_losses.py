"""The losses against plain sums, and what must not count."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uniql_jax.model.layers.linear import apply_columns, apply_rows
from uniql_jax.model.layers.norm import rms_norm
from uniql_jax.train.losses import divergence, head_losses, head_product, next_token_loss
from uniql_jax.weights.lora import LoraArray


def _inputs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = rng.normal(size=(3, 6, 11)).astype(np.float32)
    return scores, rng.integers(0, 11, (3, 6)).astype(np.int32), (rng.random((3, 6)) < 0.5).astype(np.float32)


def _divergence(scores: jax.Array, teacher: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum over positions, each of which counts by the token that it predicts."""
    return jnp.sum(divergence(scores, teacher)[:, :-1] * weights[:, 1:])


def test_next_token_loss_is_the_plain_sum(rng: np.random.Generator) -> None:
    scores, tokens, weights = _inputs(rng)
    total, count = next_token_loss(jnp.asarray(scores), jnp.asarray(tokens), jnp.asarray(weights))
    wide = scores.astype(np.float64)
    p = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    places = [(b, i) for b in range(3) for i in range(1, 6) if weights[b, i]]
    assert float(count) == len(places) > 0
    np.testing.assert_allclose(total, -sum(np.log(p[b, i - 1, tokens[b, i]]) for b, i in places), rtol=1e-5)


def test_unweighted_positions_give_neither_loss_nor_gradient(rng: np.random.Generator) -> None:
    scores, tokens, weights = map(jnp.asarray, _inputs(rng))
    poisoned = jnp.where(weights[:, 1:, None] > 0, scores[:, :-1], jnp.inf)
    poisoned = jnp.concatenate([poisoned, jnp.full_like(scores[:, -1:], jnp.nan)], axis=1)
    clean, _ = next_token_loss(scores, tokens, weights)
    assert float(next_token_loss(poisoned, tokens, weights)[0]) == float(clean)
    gradient = jax.grad(lambda s: next_token_loss(s, tokens, weights)[0])(scores)
    felt = np.abs(np.asarray(gradient)).sum(-1) > 0
    np.testing.assert_array_equal(felt[:, :-1], np.asarray(weights)[:, 1:] > 0)
    assert not felt[:, -1].any()


def test_distillation_is_a_divergence(rng: np.random.Generator) -> None:
    scores, tokens, weights = map(jnp.asarray, _inputs(rng))
    other = scores + jnp.asarray(rng.normal(size=scores.shape), jnp.float32)
    assert float(jnp.abs(divergence(scores, scores + 3.0)).max()) < 1e-5  # a constant changes no probability
    assert float(divergence(scores, other).min()) > 0
    # cross entropy = KL + entropy of the teacher: sampled from a one-hot teacher they agree
    sure = 1e4 * jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), scores.shape[-1])
    expected, _ = next_token_loss(scores, tokens, weights)
    np.testing.assert_allclose(_divergence(scores, sure, weights), expected, rtol=1e-5)
    gradient = jax.grad(lambda t: divergence(scores, t).sum())(other)
    assert not np.asarray(gradient).any()


def _head(rng: np.random.Generator) -> tuple[dict[str, jax.Array], jax.Array, jax.Array, jax.Array, jax.Array]:
    x, teacher = (jnp.asarray(rng.normal(size=(3, 7, 8)), jnp.float32) for _ in range(2))
    top = {
        "embed": jnp.asarray(rng.normal(size=(11, 8)), jnp.float32),
        "norm": jnp.asarray(rng.normal(size=8), jnp.float32),
    }
    weights = jnp.asarray(rng.random((3, 7)) < 0.6, jnp.float32)
    return top, x, teacher, jnp.asarray(rng.integers(0, 11, (3, 7)), jnp.int32), weights


@pytest.mark.parametrize("size", [1, 70, 10**6])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_losses_in_pieces_are_those_of_all_logits(size: int, share: float, rng: np.random.Generator) -> None:
    """Any number of pieces, also such that do not divide the length: the sums and gradients of the plain losses."""
    top, x, teacher, tokens, weights = _head(rng)

    def scores(x: jax.Array) -> jax.Array:
        return rms_norm(x, top["norm"], 1e-5) @ top["embed"].T

    def plain(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        entropy, count = next_token_loss(scores(x), tokens, weights)
        apart = _divergence(scores(x), scores(teacher), weights)
        return (1 - share) * entropy + share * apart, jnp.stack([entropy, count])

    def pieces(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        given = teacher if share else None
        total, sums = head_losses(top, 1e-5, x, tokens, weights, given, share, size)
        return total, jnp.stack(sums)

    (expected, sums), slope = jax.value_and_grad(plain, has_aux=True)(x)
    (found, found_sums), found_slope = jax.value_and_grad(pieces, has_aux=True)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found_sums, sums, rtol=1e-5)
    np.testing.assert_allclose(found_slope, slope, atol=1e-5 * float(jnp.abs(slope).max()))


def test_no_more_logits_at_a_time_than_asked(rng: np.random.Generator) -> None:
    top, x, _, tokens, weights = _head(rng)

    def shapes(size: int) -> str:
        return str(jax.make_jaxpr(jax.grad(lambda x: head_losses(top, 1e-5, x, tokens, weights, size=size)[0]))(x))

    assert "f32[3,7,11]" in shapes(10**6)
    found = shapes(3 * 2 * 11)
    assert "f32[3,2,11]" in found
    assert "f32[3,7,11]" not in found


def test_16_bit_products_go_back_in_16_bits(rng: np.random.Generator) -> None:
    """A float32 cotangent would make the backward products float32, at half the speed or less."""
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.bfloat16)
    base, left, right = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 8), (6, 2), (2, 8)))
    head = jnp.asarray(rng.normal(size=(5, 8)), jnp.bfloat16)

    def loss(x: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
        weight = LoraArray(base.astype(jnp.bfloat16), left, right)
        y = apply_columns(apply_rows(x, weight), weight)
        return jnp.sum(head_product(y, head) ** 2)

    traced = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, left, right))
    inputs = re.findall(r"dot_general\[.*?\] (\w+) (\w+)", traced, re.S)
    kinds = dict(re.findall(r"(\w+):(\w+)\[", traced))
    assert len(inputs) > 12
    assert {kinds[name] for pair in inputs for name in pair} == {"bf16"}
    assert {g.dtype for g in jax.grad(loss, argnums=(1, 2))(x, left, right)} == {jnp.dtype(jnp.float32)}
