"""What training minimises, over the positions that count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(logits: Float[Array, "b t vocab"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """-log p(target) of every position, float32, nats."""
    wide = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(wide, axis=-1) - chosen


def next_token_loss(
    logits: Float[Array, "b t vocab"], tokens: Int[Array, "b t"], weights: Float[Array, "b t"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of weighted losses, sum of weights) of predicting tokens[:, i + 1] from position i.

    weights[:, i] is what token i counts as a target (1 or 0); None counts all. The first token is never one.
    """
    losses = token_losses(logits[:, :-1], tokens[:, 1:])
    weight = jnp.ones(losses.shape, jnp.float32) if weights is None else weights[:, 1:].astype(jnp.float32)
    # where: a padded position may hold anything, and 0 * inf is not 0
    return jnp.sum(jnp.where(weight > 0, losses, 0.0) * weight), jnp.sum(weight)


def distillation_loss(
    logits: Float[Array, "b t vocab"], teacher: Float[Array, "b t vocab"], weights: Float[Array, "b t"] | None = None
) -> Float[Array, ""]:
    """Sum over weighted positions of KL(teacher || model), nats; weights as for `next_token_loss`.

    Each position is counted by the token that it predicts. The teacher gets no gradient.
    """
    student = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    target = jax.nn.log_softmax(jax.lax.stop_gradient(teacher)[:, :-1].astype(jnp.float32), axis=-1)
    divergence = jnp.sum(jnp.exp(target) * (target - student), axis=-1)
    if weights is None:
        return jnp.sum(divergence)
    weight = weights[:, 1:].astype(jnp.float32)
    return jnp.sum(jnp.where(weight > 0, divergence, 0.0) * weight)
