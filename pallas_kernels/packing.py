"""How integers lie in 32-bit words, as every kernel here reads them: eight 4-bit weights, each stored as weight + 8."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Bit offset of a word's k-th weight; a pair (2j, 2j+1) sits at 4j and 4j + 16, one shift and one mask away."""


def words(width: int, bits: int) -> int:
    """Stored elements that hold `width` weights: int32 words of eight at 4 bits, int8 at 8 bits."""
    return -(-width // 8) if bits == 4 else width


def check(data: Array, scale: Array, *, bits: int, group: int, contract: str, width: int) -> None:
    """Raise ValueError, naming the numbers, when a packed weight's parts do not fit each other."""
    if bits not in (4, 8):
        raise ValueError(f"weights of {bits} bits are not packed; bits is 4 or 8")
    if contract not in ("first", "last"):
        raise ValueError(f"contract is 'first' or 'last', not {contract!r}")
    if data.ndim != 2 or scale.ndim != 2:
        raise ValueError(f"data and scale are matrices, not of shapes {data.shape} and {scale.shape}")
    axis = 0 if contract == "first" else 1
    if data.shape[1 - axis] != scale.shape[1 - axis]:
        raise ValueError(f"data {data.shape} and scale {scale.shape} differ in their kept axis")
    groups = scale.shape[axis]
    if data.shape[axis] != words(groups * group, bits) or not (groups - 1) * group < width <= groups * group:
        raise ValueError(
            f"{groups} groups of {group} hold {groups * group} weights, not data {data.shape} of {bits} bits "
            f"and width {width}"
        )
    expected = jnp.int32 if bits == 4 else jnp.int8
    if data.dtype != expected:
        raise ValueError(f"{bits}-bit data is {expected.__name__}, not {data.dtype}")


def unpack_last(data: Int[Array, "*lead stored"], bits: int) -> Int[Array, "*lead padded"]:
    """Signed integers along the last axis."""
    if bits == 8:
        return data
    nibbles = (data[..., None] >> jnp.asarray(SHIFTS, jnp.int32)) & 0xF
    return (nibbles - 8).reshape(*data.shape[:-1], 8 * data.shape[-1])


def unpack_first(data: Int[Array, "stored features"], bits: int) -> Int[Array, "padded features"]:
    """Signed integers along the first axis."""
    if bits == 8:
        return data
    nibbles = (data[:, None] >> jnp.asarray(SHIFTS, jnp.int32)[:, None]) & 0xF
    return (nibbles - 8).reshape(8 * data.shape[0], data.shape[-1])


def dequantize_last(
    data: Int[Array, "*lead stored"], scale: Float[Array, "*lead groups"], *, bits: int, group: int, width: int
) -> Float[Array, "*lead width"]:
    """Weights in float32, contracted axis last."""
    values = unpack_last(data, bits).astype(jnp.float32)
    grouped = values.reshape(*scale.shape, group) * scale.astype(jnp.float32)[..., None]
    return jax.lax.slice_in_dim(grouped.reshape(values.shape), 0, width, axis=-1)


def dequantize_first(
    data: Int[Array, "stored features"], scale: Float[Array, "groups features"], *, bits: int, group: int, width: int
) -> Float[Array, "width features"]:
    """Weights in float32, contracted axis first."""
    values = unpack_first(data, bits).astype(jnp.float32)
    grouped = values.reshape(scale.shape[0], group, -1) * scale.astype(jnp.float32)[:, None]
    return grouped.reshape(values.shape)[:width]
