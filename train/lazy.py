"""Adam for weights of which a step may see only a part: what it did not see neither moves nor ages.

A step at a high prune rate gives no gradient to what it cuts. Plain Adam then lets old momentum go on and divides by a
variance that faded meanwhile, so that what only rate 0 keeps jumps by several learning rates whenever it is seen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from uniql_jax.train.settings import RecoverySettings


class LazyAdamState(NamedTuple):
    """Per row, the entries along the last axis: how many steps saw any of them, int32. Per entry: the means of its
    gradient and of the gradient's square.
    """

    seen: Any
    mu: Any
    nu: Any


def scale_by_lazy_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, and `optax.add_decayed_weights` after it, with a clock of its own for every row, which
    stands still where its gradient is zero. What pruning cuts are rows, since every weight's sorted axis comes first.

    Where no row's gradient is zero the two are the same.
    """

    def init(params: Any) -> LazyAdamState:
        seen = jax.tree.map(lambda x: jnp.zeros(x.shape[:-1], jnp.int32), params)
        # buffers of their own, since a step takes them over
        return LazyAdamState(seen, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def one(g: Array, seen: Array, mu: Array, nu: Array, param: Array) -> tuple[Array, Array, Array, Array]:
        now = jnp.any(g != 0, axis=-1, keepdims=True)
        seen = seen + now[..., 0]
        mu = jnp.where(now, b1 * mu + (1 - b1) * g, mu)
        nu = jnp.where(now, b2 * nu + (1 - b2) * g * g, nu)
        clock = jnp.maximum(seen, 1).astype(g.dtype)[..., None]
        step = (mu / (1 - b1**clock)) / (jnp.sqrt(nu / (1 - b2**clock)) + eps)
        return jnp.where(now, step + weight_decay * param, 0.0), seen, mu, nu

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, LazyAdamState]:
        if params is None:
            raise ValueError("weights decay towards zero, so they must be given")
        found = jax.tree.map(one, updates, state.seen, state.mu, state.nu, params)
        parts = [jax.tree.map(lambda _, four, i=i: four[i], updates, found) for i in range(4)]
        return parts[0], LazyAdamState(*parts[1:])

    return optax.GradientTransformation(init, update)


def schedule(options: RecoverySettings, steps: int) -> optax.Schedule:
    """Learning rate at each step: linear warm-up, then linear decay to zero; of `resolved` settings."""
    assert options.lr is not None
    warmup = min(options.warmup, steps // 10)
    fall = optax.linear_schedule(options.lr, 0.0, max(1, steps - warmup))
    if not warmup:
        return fall
    # the first step would change nothing at a rate of exactly zero
    rise = optax.linear_schedule(options.lr / (warmup + 1), options.lr, warmup)
    return optax.join_schedules([rise, fall], [warmup])


def optimizer(options: RecoverySettings, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW that leaves alone what a step did not see."""
    return optax.chain(
        optax.clip_by_global_norm(options.clip),
        scale_by_lazy_adam(weight_decay=options.weight_decay),
        optax.scale_by_learning_rate(schedule(options, steps)),
    )
