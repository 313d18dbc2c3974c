"""Gram matrices of what a finished model's blocks read and write, and the nested refit of output matrices to them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.compiling import jit
from uniql_jax.compression.math.gram import gram
from uniql_jax.compression.settings import REFIT_RATES
from uniql_jax.config import ModelConfig
from uniql_jax.model.layers import KINDS
from uniql_jax.model.layers.context import full_context
from uniql_jax.plan import Plan

Block = Mapping[str, Any]
Keep = dict[str, Int[np.ndarray | Array, " _"]]


def refit_rates(count: int, share: float) -> Float[np.ndarray, " count"]:
    """Prune rate at which each calibration window is seen: `share` of them 0, the others REFIT_RATES in turn.

    Spread evenly, so that every rate sees every kind of text.
    """
    pruned = np.floor(np.arange(1, count + 1) * (1 - share)) > np.floor(np.arange(count) * (1 - share))
    turn = (np.cumsum(pruned) - 1) % len(REFIT_RATES)
    return np.where(pruned, np.asarray(REFIT_RATES)[turn], 0.0)


def keep_per_window(plan: Plan, rates: Sequence[float]) -> tuple[Keep, ...]:
    """Kept sizes per layer and axis, one count for every window."""
    by_rate = {rate: plan.keep(rate) for rate in set(map(float, rates))}
    return tuple(
        {axis: np.asarray([by_rate[float(r)][i][axis] for r in rates], np.int32) for axis in kept}
        for i, kept in enumerate(plan.keep(0.0))
    )


def _hidden(config: ModelConfig, kind: str, leaves: Block, x: Array, keep: Keep | None) -> Array:
    context = full_context(jnp.ones(x.shape[:2], bool), padded=False)._replace(keep=keep)
    block, x = KINDS[kind], x.astype(jnp.float32)
    return block.inner(config, leaves, block.read(config, leaves, x), context)


@functools.partial(jit, static_argnames=("config", "kind"))
def read_gram(config: ModelConfig, kind: str, leaves: Block, x: Float[Array, "b t h"]) -> Float[Array, "h h"]:
    """Summed Gram of what the block's input matrices receive."""
    return gram(KINDS[kind].read(config, leaves, x.astype(jnp.float32)), x.shape[-1])


@functools.partial(jit, static_argnames=("config", "kind"))
def hidden_gram(
    config: ModelConfig, kind: str, leaves: Block, x: Float[Array, "b t h"], keep: Keep | None
) -> Float[Array, "k k"]:
    """Summed Gram of what the block's output matrix receives, masked per window when `keep` is given."""
    hidden = _hidden(config, kind, leaves, x, keep)
    return gram(hidden, int(np.prod(hidden.shape[2:])))


@functools.partial(jit, static_argnames=("config", "kind", "target"))
def hidden_gram_and_cross(
    config: ModelConfig, kind: str, leaves: Block, teacher: Block, x: Array, t: Array, keep: Keep, target: str
) -> tuple[Float[Array, "k k"], Float[Array, "k h"]]:
    """`hidden_gram`, and the product of those inputs with what the output matrix should give.

    "stream": the unpruned stream after the block less the finished stream before it, so that earlier losses are made
    up for as well; "local": what the unpruned block adds.
    """
    hidden = _hidden(config, kind, leaves, x, keep)
    rows = hidden.reshape(-1, int(np.prod(hidden.shape[2:])))
    wanted = KINDS[kind].write(teacher, _hidden(config, kind, teacher, t, None))
    wanted = wanted - KINDS[kind].write(teacher, jnp.zeros_like(hidden))  # the bias is added anyway
    if target == "stream":
        wanted = wanted + t.astype(jnp.float32) - x.astype(jnp.float32)
    return rows.T @ rows, rows.T @ wanted.reshape(-1, wanted.shape[-1])


def after_block(
    config: ModelConfig, kind: str, leaves: Block, x: Float[Array, "b t h"], keep: Keep | None
) -> Float[Array, "b t h"]:
    """The stream after the block, in x's dtype."""
    return (x + KINDS[kind].write(leaves, _hidden(config, kind, leaves, x, keep))).astype(x.dtype)


advance = functools.partial(jit, static_argnames=("config", "kind"))(after_block)
"""`after_block` as a program of its own."""


@jit
def refit(
    gram: Float[Array, "k k"], cross: Float[Array, "k h"], weight: Float[Array, "k h"], ridge: float | Float[Array, ""]
) -> Float[Array, "k h"]:
    """argmin of sum ||y - a W||^2 + lambda ||W - weight||^2, lambda = ridge * mean diagonal of the Gram matrix.

    One matrix for all rates: the Gram holds every rate's masked inputs (method: nested refit).
    """
    amount = ridge * jnp.mean(jnp.diagonal(gram)) + jnp.finfo(jnp.float32).tiny
    factor = jax.scipy.linalg.cho_factor(gram + amount * jnp.eye(gram.shape[0], dtype=gram.dtype))
    return weight + jax.scipy.linalg.cho_solve(factor, cross - gram @ weight)
