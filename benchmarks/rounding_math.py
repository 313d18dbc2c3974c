"""Ways to round one matrix, for comparison with the package's GPTQ: other grids and groups, scales by output error,
coordinate descent after GPTQ, and nested codes whose leading bits are a model of their own.

Everything works on columns [width, rows]: a row of the weight is one output, and `width` inputs share the Hessian.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.compiling import jit
from uniql_jax.compression.math.gptq import inverse_factor
from uniql_jax.compression.math.nested import candidates
from uniql_jax.compression.math.refine import nearest, refine

ROWS = 8192
"""Rows rounded at a time where memory would not do for all."""


@dataclasses.dataclass(frozen=True)
class Method:
    """How matrices are rounded.

    bits, group: of codes, and the size aimed at of what shares a scale. scale: "max", "diagonal" (least error weighed
    by the Hessian's diagonal, the package's way) or "loss" (least output error after GPTQ of the group). damping: of
    the Hessian, in parts of "mean" (its mean diagonal) or of each input's "own". order: "stored" or "active" (columns
    of larger inputs first, with scales fixed before). sweeps: coordinate descents over all codes afterwards, each with
    scales refitted by least squares. propagate: False rounds to nearest. share: None, or the weight of the leading
    bits' error in nested codes, from 0 to 1.
    """

    bits: int = 4
    group: int = 128
    scale: str = "diagonal"
    damping: float = 0.01
    damped: str = "mean"
    order: str = "stored"
    sweeps: int = 0
    propagate: bool = True
    share: float | None = None


def factor_of(hessian: Float[Array, "width width"], method: Method) -> Float[Array, "width width"]:
    """GPTQ's factor of the damped Hessian."""
    if method.damped == "mean":
        return inverse_factor(hessian, method.damping)
    diagonal = jnp.diagonal(hessian)
    least = 1e-7 * diagonal.mean()
    return inverse_factor(hessian + jnp.diag(method.damping * jnp.maximum(diagonal, least)), 1e-9)


def _gptq_block(block: Array, scale: Array, square: Array, bits: int) -> tuple[Array, Array]:
    """(codes, errors over the factor's diagonal) of one group, columns one after the other; batched over tries."""

    def one(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        block, codes = state
        column = jax.lax.dynamic_slice_in_dim(block, j, 1, axis=-2)
        code = nearest(column, scale[..., None, :], bits)
        row = jax.lax.dynamic_slice_in_dim(square, j, 1)[0]
        error = (column - code * scale[..., None, :]) / row[j]
        index = jnp.arange(square.shape[0])[:, None]
        block = jnp.where(index > j, block - row[:, None] * error, jnp.where(index == j, error, block))
        return block, jax.lax.dynamic_update_slice_in_dim(codes, code, j, axis=-2)

    errors, codes = jax.lax.fori_loop(0, square.shape[0], one, (block, jnp.zeros_like(block)))
    return codes, errors


def group_scale(block: Array, importance: Array, square: Array, method: Method, bits: int) -> Float[Array, " rows"]:
    tries = candidates(block, bits)[: 1 if method.scale == "max" else None]
    if method.scale == "loss":
        every = jnp.broadcast_to(block, (len(tries), *block.shape))
        cost = jnp.square(_gptq_block(every, tries, square, bits)[1]).sum(-2)
    else:
        error = block - nearest(block, tries[:, None], bits) * tries[:, None]
        cost = (jnp.square(error) * importance[:, None]).sum(-2)
    return jnp.take_along_axis(tries, cost.argmin(0)[None], axis=0)[0]


@functools.partial(jit, static_argnames=("method", "group"))
def round_columns(
    columns: Float[Array, "width rows"], hessian: Float[Array, "width width"], *, method: Method, group: int
) -> tuple[Int[Array, "width rows"], Float[Array, "groups rows"]]:
    """Codes and scales of a matrix whose width is a multiple of the group."""
    width = len(columns)
    hessian = hessian / jnp.maximum(jnp.diagonal(hessian).mean(), 1e-30)
    scales = codes = None
    if method.order == "active":
        importance = jnp.diagonal(hessian)
        first = jnp.argsort(-importance)
        scales = jnp.stack(
            [
                group_scale(
                    columns[at : at + group], importance[at : at + group] + 1e-6, jnp.eye(group), method, method.bits
                )
                for at in range(0, width, group)
            ]
        )
        each = jnp.repeat(scales, group, axis=0)[first]
        factor = factor_of(hessian[first][:, first], method)
        codes = _fixed_scales(columns[first], each, factor, method.bits)
        codes = jnp.zeros_like(codes).at[first].set(codes)
    else:
        factor = factor_of(hessian, method) if method.propagate else None
        codes, scales = _in_order(columns, hessian, factor, method, group)
    if method.sweeps:
        how = {"bits": method.bits, "group": group, "descents": method.sweeps}
        codes, scales, _ = refine(columns, codes, scales, hessian, **how)
    return codes.astype(jnp.int8), scales


def _in_order(columns: Array, hessian: Array, factor: Array | None, method: Method, group: int) -> tuple[Array, Array]:
    width, importance = len(columns), jnp.diagonal(hessian) + 1e-6
    identity = jnp.eye(group, dtype=columns.dtype)

    def one(g: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        columns, codes, scales = state
        start = g * group
        block = jax.lax.dynamic_slice_in_dim(columns, start, group)
        stripe = identity if factor is None else jax.lax.dynamic_slice_in_dim(factor, start, group)
        square = identity if factor is None else jax.lax.dynamic_slice_in_dim(stripe, start, group, axis=1)
        scale = group_scale(block, jax.lax.dynamic_slice_in_dim(importance, start, group), square, method, method.bits)
        code, errors = _gptq_block(block, scale, square, method.bits)
        if factor is not None:
            later = jnp.arange(width) >= start + group
            columns = columns - jnp.where(later, stripe, 0.0).T @ errors
        return (
            columns,
            jax.lax.dynamic_update_slice_in_dim(codes, code, start, axis=0),
            jax.lax.dynamic_update_slice_in_dim(scales, scale[None], g, axis=0),
        )

    begin = columns, jnp.zeros_like(columns), jnp.zeros((width // group, columns.shape[1]), columns.dtype)
    _, codes, scales = jax.lax.fori_loop(0, width // group, one, begin)
    return codes, scales


def _fixed_scales(columns: Array, scale: Array, factor: Array, bits: int) -> Array:
    """GPTQ column by column, each entry with a scale of its own."""

    def one(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        columns, codes = state
        code = nearest(columns[j], scale[j], bits)
        error = (columns[j] - code * scale[j]) / factor[j, j]
        later = jnp.where(jnp.arange(len(columns)) > j, factor[j], 0.0)
        return columns - later[:, None] * error, codes.at[j].set(code)

    return jax.lax.fori_loop(0, len(columns), one, (columns, jnp.zeros_like(columns)))[1]


def dequantized(codes: Array, scales: Array, group: int, offset: float = 0.0) -> Array:
    """(codes + offset) * scale of each entry's group."""
    return (codes.astype(scales.dtype) + offset) * jnp.repeat(scales, group, axis=0)


def by_rows(function: Any, columns: Array, group: int, *arguments: Any, **options: Any) -> Any:
    """A function of columns over parts of the rows, so that temporary arrays stay small; results joined by rows."""
    parts = [
        function(columns[:, at : at + ROWS], *arguments, group=group, **options)
        for at in range(0, columns.shape[1], ROWS)
    ]
    return jax.tree.map(lambda *some: jnp.concatenate(some, axis=-1), *parts)
