"""Rotary embedding of q and k in one kernel that computes sine and cosine itself, so that no table is read or kept.

The backward of a rotation is the rotation by minus the angle: the same kernel with its direction turned.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.compat import pl

ELEMENTS = 1024
"""About how many pairs of one array a program holds in registers."""


def _kernel(*refs: Any, arrays: int, direction: int, lengths: int, pairs_tile: int) -> None:
    """refs: positions, inv_freq, the arrays, their outputs; one program turns a tile of pairs of a few positions.

    Sine and cosine, by far the most of the arithmetic, are taken once for all heads that share a frequency.
    """
    positions_ref, inv_freq_ref = refs[:2]
    inputs, outputs = refs[2 : 2 + arrays], refs[2 + arrays :]
    length, (pairs, kv_heads) = positions_ref.shape[1], inv_freq_ref.shape
    row = pl.program_id(0)
    t = pl.program_id(1) * lengths + jnp.arange(lengths)
    p = pl.program_id(2) * pairs_tile + jnp.arange(pairs_tile)
    kv = jnp.arange(pl.next_power_of_2(kv_heads))
    position = compat.load(positions_ref, (row, t), t < length).astype(jnp.float32)
    frequency = compat.load(inv_freq_ref, (p[:, None], kv[None, :]), (p < pairs)[:, None] & (kv < kv_heads)[None, :])
    angle = position[:, None, None] * frequency.astype(jnp.float32)[None]
    cos, sin = jnp.cos(angle)[..., None], direction * jnp.sin(angle)[..., None]
    t_, p_, kv_ = t[:, None, None, None], p[None, :, None, None], kv[None, None, :, None]
    for x_ref, out_ref in zip(inputs, outputs, strict=True):
        share = x_ref.shape[4] // kv_heads
        of_kv = jnp.arange(pl.next_power_of_2(share))[None, None, None, :]
        head = kv_ * share + of_kv
        inside = (t_ < length) & (p_ < pairs) & (kv_ < kv_heads) & (of_kv < share)
        first = compat.load(x_ref, (row, t_, p_, 0, head), inside).astype(jnp.float32)
        second = compat.load(x_ref, (row, t_, p_, 1, head), inside).astype(jnp.float32)
        compat.store(out_ref, (row, t_, p_, 0, head), first * cos - second * sin, inside)
        compat.store(out_ref, (row, t_, p_, 1, head), second * cos + first * sin, inside)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _turn(
    arrays: tuple[Array, ...], positions: Array, inv_freq: Array, direction: int
) -> tuple[Float[Array, "batch length pairs 2 heads"], ...]:
    batch, length, pairs, _, _ = arrays[0].shape
    kv_heads = inv_freq.shape[1]
    heads = pl.next_power_of_2(kv_heads) * pl.next_power_of_2(max(x.shape[4] for x in arrays) // kv_heads)
    pairs_tile = min(pl.next_power_of_2(pairs), max(1, ELEMENTS // heads))
    lengths = min(pl.next_power_of_2(length), max(1, ELEMENTS // (heads * pairs_tile)))
    return compat.call(
        functools.partial(_kernel, arrays=len(arrays), direction=direction, lengths=lengths, pairs_tile=pairs_tile),
        name="rope" if direction == 1 else "rope_backward",
        grid=(batch, pl.cdiv(length, lengths), pl.cdiv(pairs, pairs_tile)),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays),
    )(positions, inv_freq, *arrays)


def _forward(arrays: Any, positions: Array, inv_freq: Array, direction: int) -> tuple[Any, tuple[Array, Array]]:
    return _turn(arrays, positions, inv_freq, direction), (positions, inv_freq)


def _backward(direction: int, saved: tuple[Array, Array], cotangents: Any) -> tuple[Any, None, None]:
    return _turn(cotangents, *saved, -direction), None, None


_turn.defvjp(_forward, _backward)


def _supported(*arrays: Array) -> None:
    if any(x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) for x in arrays):
        raise NotImplementedError("the Pallas kernel turns 16-bit and 32-bit floats")
    if any(x.size == 0 for x in arrays):
        raise NotImplementedError("nothing to turn")


def rope(
    x: Float[Array, "batch length pairs 2 heads"],
    positions: Int[Array, "batch length"],
    inv_freq: Float[Array, "pairs kv_heads"],
) -> Float[Array, "batch length pairs 2 heads"]:
    """See api.rope. Raises NotImplementedError for float64 and for empty input."""
    _supported(x)
    turned: Any = _turn((x,), positions, inv_freq, 1)
    return turned[0]


def rope_qk(
    q: Float[Array, "batch length pairs 2 heads"],
    k: Float[Array, "batch length pairs 2 kv_heads"],
    positions: Int[Array, "batch length"],
    inv_freq: Float[Array, "pairs kv_heads"],
) -> tuple[Float[Array, "batch length pairs 2 heads"], Float[Array, "batch length pairs 2 kv_heads"]]:
    """See api.rope_qk. Raises NotImplementedError for float64 and for empty input."""
    _supported(q, k)
    turned: Any = _turn((q, k), positions, inv_freq, 1)
    return turned
