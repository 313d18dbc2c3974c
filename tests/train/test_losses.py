"""The losses against plain sums, and what must not count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from train.losses import distillation_loss, next_token_loss


def _inputs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = rng.normal(size=(3, 6, 11)).astype(np.float32)
    return scores, rng.integers(0, 11, (3, 6)).astype(np.int32), (rng.random((3, 6)) < 0.5).astype(np.float32)


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
    assert abs(float(distillation_loss(scores, scores + 3.0))) < 1e-4  # a constant changes no probability
    assert float(distillation_loss(scores, other)) > 0
    # cross entropy = KL + entropy of the teacher: sampled from a one-hot teacher they agree
    sure = 1e4 * jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), scores.shape[-1])
    expected, _ = next_token_loss(scores, tokens, weights)
    np.testing.assert_allclose(distillation_loss(scores, sure, weights), expected, rtol=1e-5)
    gradient = jax.grad(lambda t: distillation_loss(scores, t))(other)
    assert not np.asarray(gradient).any()
