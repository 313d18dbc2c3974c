"""What training minimises, over the positions that count; logits of a whole batch are never held at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.model.causal_lm import head_input
from uniql_jax.model.layers.norm import rms_norm

LOGITS = 2**28
"""About how many logits are in memory at a time, float32: 1 GiB."""


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


def divergence(logits: Float[Array, "*b vocab"], teacher: Float[Array, "*b vocab"]) -> Float[Array, "*b"]:
    """KL(teacher || model) of every position, float32, nats. The teacher gets no gradient."""
    student = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    target = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(target) * (target - student), axis=-1)


@jax.custom_vjp
def head_product(x: Float[Array, "*b h"], head: Float[Array, "vocab h"]) -> Float[Array, "*b vocab"]:
    """x @ head.T in float32; the backward multiplies in x's dtype."""
    return jnp.matmul(x, head.T.astype(x.dtype), preferred_element_type=jnp.float32)


def _head_forward(x: Array, head: Array) -> tuple[Array, tuple[Array, Array]]:
    return head_product(x, head), (x, head)


def _head_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, head = saved
    cotangent = cotangent.astype(x.dtype)
    x_bar = jnp.matmul(cotangent, head.astype(x.dtype))
    # of a head that is not trained nobody asks for this, and XLA leaves it out
    head_bar = jnp.einsum("...v,...h->vh", cotangent, x, preferred_element_type=jnp.float32)
    return x_bar, head_bar.astype(head.dtype)


head_product.defvjp(_head_forward, _head_backward)


def head_losses(
    top: Mapping[str, Any],
    eps: float,
    x: Float[Array, "b t h"],
    tokens: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    teacher: Float[Array, "b t h"] | None = None,
    share: float = 0.0,
    size: int = LOGITS,
    teacher_top: Mapping[str, Any] | None = None,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
    """(what is minimised, (cross entropy, tokens that count)), all summed, from streams before the final norm.

    top: embed, norm and, if untied, head, of x's dtype; weights as for `next_token_loss`. With a teacher's stream,
    `share` of what is minimised is the divergence from it; its own norm and head are in `teacher_top` (default: top).
    About `size` logits are held at a time, and computed again in the backward pass: positions go in pieces, all rows of
    a batch at once, so that rows may lie on many devices.
    """
    rows, length = tokens.shape
    vocabulary = top["embed"].shape[0]
    count = min(length, -(-rows * length * vocabulary // size))
    width = -(-length // count)
    shifted = {
        "tokens": jnp.roll(tokens, -1, axis=1),
        "weights": weights.astype(jnp.float32).at[:, 0].set(0.0),  # the last position predicts nothing
        "x": x,
        "teacher": teacher,
    }
    shifted["weights"] = jnp.roll(shifted["weights"], -1, axis=1)

    def pieces(value: Array) -> Array:
        room = [(0, 0), (0, count * width - length)] + [(0, 0)] * (value.ndim - 2)
        return jnp.pad(value, room).reshape(rows, count, width, *value.shape[2:]).swapaxes(0, 1)

    def scores(stream: Array, top: Mapping[str, Any]) -> Array:
        head = top.get("head", top["embed"]).astype(x.dtype)
        return head_product(head_input(top, rms_norm(stream, top["norm"], eps)), head)

    @jax.checkpoint
    def piece(one: Mapping[str, Any]) -> tuple[Array, Array]:
        counts = one["weights"] > 0
        found = scores(one["x"], top)
        entropy = jnp.sum(jnp.where(counts, token_losses(found, one["tokens"]), 0.0) * one["weights"])
        if one["teacher"] is None:
            return entropy, entropy
        taught = scores(one["teacher"], teacher_top or top)
        apart = jnp.sum(jnp.where(counts, divergence(found, taught), 0.0) * one["weights"])
        return (1 - share) * entropy + share * apart, entropy

    def add(carry: tuple[Array, Array], one: Mapping[str, Any]) -> tuple[tuple[Array, Array], None]:
        return jax.tree.map(jnp.add, carry, piece(one)), None

    (wanted, entropy), _ = jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), jax.tree.map(pieces, shifted))
    return wanted, (entropy, jnp.sum(shifted["weights"]))
