"""Shapes of weights whose entries have 4 bits or 3, as a device holds them: for random models that are only timed."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.pallas_kernels.dequant_matmul import preferred_layout, three_bit
from uniql_jax.plan import axis_layout
from uniql_jax.weights.mixed import MixedArray
from uniql_jax.weights.nested import NestedArray, from_nested_codes
from uniql_jax.weights.quantized import QuantizedArray, from_codes


def packed_shape(leaf: elastic.Leaf, shape: tuple[int, ...], bits: int, group: int) -> QuantizedArray:
    """A packed leaf of 4 or 8 bits, in plain layout, with jax.ShapeDtypeStruct for arrays."""
    assemble = functools.partial(from_codes, bits=bits, group=group, contract=str(leaf.contract), shape=shape)
    return jax.eval_shape(assemble, *_codes(leaf, shape, group, 1))


def nested_shape(
    config: ModelConfig, leaf: elastic.Leaf, shape: tuple[int, ...], share: float, group: int, dtype: Any
) -> QuantizedArray | NestedArray | MixedArray:
    """A leaf that has 4 bits in a share of its entries, rounded to whole units, and 3 in the others.

    One that is not sorted has as many in all of its entries.
    """
    unit = axis_layout(config, leaf.axis).unit if leaf.axis is not None else shape[0]
    full = min(round(shape[0] * share / unit) * unit, shape[0])
    if full == shape[0]:
        return packed_shape(leaf, shape, 4, group)
    rest = _three_bit_shape(leaf, (shape[0] - full, *shape[1:]), group, dtype)
    return MixedArray(packed_shape(leaf, (full, *shape[1:]), 4, group), rest) if full else rest


def _three_bit_shape(
    leaf: elastic.Leaf, shape: tuple[int, ...], group: int, dtype: Any
) -> QuantizedArray | NestedArray:
    contract = str(leaf.contract)
    assemble = functools.partial(from_nested_codes, group=group, contract=contract, shape=shape)
    planes = jax.eval_shape(lambda *parts: assemble(*parts).take_bits(0), *_codes(leaf, shape, group, 2))
    layout = preferred_layout(bits=three_bit.BITS, group=group, contract=contract, dtype=dtype)
    return planes if layout == "plain" else planes.tiled()


def _codes(leaf: elastic.Leaf, shape: tuple[int, ...], group: int, scales: int) -> list[jax.ShapeDtypeStruct]:
    """Integers and scales that a leaf is assembled from."""
    width = shape[-1] if leaf.contract == "last" else math.prod(shape[:-1])
    rows = math.prod(shape) // width
    scale = jax.ShapeDtypeStruct((rows, -(-width // group)), jnp.float32)
    return [jax.ShapeDtypeStruct((rows, width), jnp.int32), *[scale] * scales]
