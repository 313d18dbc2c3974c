"""What a finished block of nested codes loses with the last bits of an axis, and with its units: a few points of each.

All are in the measure of sorting: the mean over tokens of d F d, where d is the change of what the block adds to the
stream and F the Gram matrix of the loss's gradient there. So bits and units can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax import elastic
from uniql_jax.compiling import jit
from uniql_jax.config import ModelConfig
from uniql_jax.joint_plan import TOP, Piece, top_unit
from uniql_jax.model.causal_lm import apply_layer, head_input
from uniql_jax.model.layers import KINDS
from uniql_jax.model.layers.context import full_context
from uniql_jax.model.layers.norm import rms_norm
from uniql_jax.plan import next_cut
from uniql_jax.weights.nested import NestedArray, leading_bits
from uniql_jax.weights.protocol import dense

TOKENS = 4096
"""Calibration tokens that are looked at."""
DROPPED = 0.25
"""Of an axis: what the estimate of sorting is compared with."""
FACTORS = (0.1, 10.0)
"""Bounds of what a measured drop may say of an estimated one."""
TOP_POINTS = 4
"""Points at which embedding and head are measured."""
ROWS = 256
"""Tokens whose logits exist at a time."""
Points = dict[str, Any]


def block_points(
    config: ModelConfig,
    kind: str,
    block: Mapping[str, Any],
    units: Mapping[str, int],
    fisher: Float[Array, "h h"],
    x: Float[Array, "b t h"],
) -> dict[str, Points]:
    """Measure every elastic axis of a block.

    Args:
        config: the model.
        kind: the block's kind.
        block: its finished leaves.
        units: entries that are cut together, by axis.
        fisher: mean Gram matrix of the gradient at the block's output.
        x: the stream before the block.

    Returns:
        By axis {"bits": [[entries that have all bits, loss], ...], "drop": [entries that stay, loss] or None}.
    """
    four = {name: dense(value) for name, value in block.items()}
    three = {name: dense(leading_bits(value)) for name, value in block.items()}
    sizes = {axis: elastic.sizes(config)[axis] for axis in elastic.layer_axes(config, (kind,))}

    def written(full: Mapping[str, int], keep: Mapping[str, int]) -> Array:
        counts = ({axis: jnp.int32(count) for axis, count in some.items()} for some in (full, keep))
        return _written(config, kind, four, three, x, *counts)

    whole, found = written(sizes, sizes), {}
    for axis, size in sizes.items():
        half = size // 2 // units[axis] * units[axis]
        bits = [[full, float(_lost(whole, written(sizes | {axis: full}, sizes), fisher))] for full in sorted({0, half})]
        left = dropped(size, units[axis])
        drop = [left, float(_lost(whole, written(sizes, sizes | {axis: left}), fisher))] if left < size else None
        found[axis] = {"bits": bits, "drop": drop}
    return found


def dropped(size: int, unit: int) -> int:
    """Entries that stay when DROPPED of an axis goes, or one unit of it."""
    count = size
    while count > (1 - DROPPED) * size and next_cut(count, unit) < count:
        count = next_cut(count, unit)
    return count


@functools.partial(jit, static_argnames=("config", "kind"))
def _written(
    config: ModelConfig,
    kind: str,
    four: Mapping[str, Array],
    three: Mapping[str, Array],
    x: Float[Array, "b t h"],
    full: Mapping[str, Array],
    keep: Mapping[str, Array],
) -> Float[Array, "b t h"]:
    """What a block adds to the stream whose first entries of an axis have all bits, at masked sizes."""

    def mixed(name: str) -> Array:
        leaf, value = elastic.BLOCKS[kind][name], four[name]
        if leaf.axis is None or leaf.contract is None:
            return value
        inside = jnp.arange(value.shape[0]) < full[leaf.axis]
        return jnp.where(inside.reshape(-1, *[1] * (value.ndim - 1)), value, three[name])

    leaves = {name: mixed(name) for name in four}
    context = full_context(jnp.ones(x.shape[:2], bool), padded=False)._replace(keep=keep)
    read = KINDS[kind].read(config, leaves, x.astype(jnp.float32))
    return KINDS[kind].write(leaves, KINDS[kind].inner(config, leaves, read, context))


@jit
def _lost(whole: Float[Array, "b t h"], less: Float[Array, "b t h"], fisher: Float[Array, "h h"]) -> Float[Array, ""]:
    change = (whole - less).reshape(-1, whole.shape[-1])
    return jnp.maximum(jnp.mean(jnp.sum((change @ fisher) * change, axis=-1)), 0.0)


def top_points(
    config: ModelConfig,
    top: Mapping[str, Any],
    first: tuple[str, Mapping[str, Any]],
    tokens: Int[Array, "b t"],
    x: Float[Array, "b t h"],
    fisher: Float[Array, "h h"],
) -> dict[str, list[list[float]]]:
    """What embedding and head lose where some of their rows have the leading bits alone, by leaf; one table that serves
    as both loses both.

    Args:
        config: the model.
        top: the finished leaves outside the layers.
        first: kind and finished leaves of the first block: what it makes of an embedding's errors counts as well.
        tokens: of some windows.
        x: the stream after the last layer, of the same or other windows.
        fisher: mean Gram matrix of the gradient at the first block's output.

    Returns:
        By leaf [[rows that have all bits, loss], ...].
    """
    size, unit, tied = config.vocab_size, top_unit(config.vocab_size), "head" not in top
    fulls = sorted({size * part // TOP_POINTS // unit * unit for part in range(TOP_POINTS)})
    kind, block = first
    leaves = {name: dense(value) for name, value in block.items()}
    others = {name: jnp.asarray(top[name], jnp.float32) for name in ("norm", "head_in") if name in top}
    embed, head = top["embed"], top["embed" if tied else "head"]

    def after(table: NestedArray) -> Array:
        return _after(config, kind, leaves, table.lookup(tokens, jnp.float32))

    whole, rows = after(embed), head.dense()
    found: dict[str, list[list[float]]] = {}
    for full in fulls:
        inputs = float(_lost(whole, after(embed.take_bits(full)), fisher))
        # a loss is half of d F d
        outputs = 2 * float(_divergence(others, rows, head.take_bits(full).dense(), x, config.norm_eps))
        for name, loss in {"embed": inputs + outputs}.items() if tied else {"embed": inputs, "head": outputs}.items():
            found.setdefault(name, []).append([full, loss])
    return found


@functools.partial(jit, static_argnames=("config", "kind"))
def _after(config: ModelConfig, kind: str, leaves: Mapping[str, Array], x: Float[Array, "b t h"]) -> Array:
    """The stream after a block at its full size."""
    return apply_layer(config, (kind,), {kind: leaves}, x, full_context(jnp.ones(x.shape[:2], bool), padded=False))


@functools.partial(jit, static_argnames="eps")
def _divergence(
    top: Mapping[str, Array], four: Array, three: Array, x: Float[Array, "b t h"], eps: float
) -> Float[Array, ""]:
    """Mean over tokens of the divergence of next-token distributions."""
    read = head_input(top, rms_norm(x.astype(jnp.float32), top["norm"], eps)).reshape(-1, x.shape[-1])
    read = read[: max(1, len(read) // ROWS * ROWS)]

    def part(rows: Array) -> Array:
        whole, less = (jax.nn.log_softmax(rows @ table.T) for table in (four, three))
        return jnp.sum(jnp.exp(whole) * (whole - less))

    return jax.lax.map(part, read.reshape(-1, min(ROWS, len(read)), read.shape[-1])).sum() / len(read)


def loss_curves(
    pieces: Sequence[Piece],
    points: Sequence[Mapping[str, Points]],
    top: Mapping[str, Sequence[Sequence[float]]],
    estimated: Sequence[Mapping[str, Sequence[float]]],
) -> tuple[list[Float[np.ndarray, " _"]], list[Float[np.ndarray, " _"] | None]]:
    """What every piece loses at each number of entries that have all bits, and at each that stay.

    Args:
        pieces: of the joint plan.
        points: `block_points` of every layer.
        top: `top_points`.
        estimated: of every layer and axis, what sorting estimates of keeping 0 ... all entries; here it gets the factor
            that one measured point asks for.

    Returns:
        Curves for `make_joint_plan`.
    """
    bits: list[np.ndarray] = []
    drops: list[np.ndarray | None] = []
    for piece in pieces:
        if piece.layer == TOP:
            bits.append(_falling(piece.size, top[piece.axis]))
            drops.append(None)
            continue
        found = points[piece.layer][piece.axis]
        bits.append(_falling(piece.size, found["bits"]))
        curve = np.asarray(estimated[piece.layer][piece.axis], np.float64)
        curve, factor = curve - curve[-1], 1.0
        if found["drop"] is not None:
            left, measured = found["drop"]
            factor = float(np.clip(measured / curve[left] if curve[left] > 0 else 1.0, *FACTORS))
        drops.append(curve * factor)
    return bits, drops


def _falling(size: int, measured: Sequence[Sequence[float]]) -> Float[np.ndarray, " _"]:
    """The loss at 0 ... size entries of all bits, from some of them; never less with fewer."""
    at = {int(count): loss for count, loss in measured} | {size: 0.0}
    counts = sorted(at)
    losses = np.maximum.accumulate([at[count] for count in counts][::-1])[::-1]
    return np.interp(np.arange(size + 1), counts, losses)
