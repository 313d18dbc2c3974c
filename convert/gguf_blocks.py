"""Leaves of ours as tensors of a GGUF file: llama.cpp's layout and its blocks of 32 integers with one scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.convert import tables
from uniql_jax.convert.integers import Blocks, foreign, integers, scales
from uniql_jax.weights.quantized import QuantizedArray

BLOCK = 32
PACKED = {4: "Q4_0", 8: "Q8_0"}
DENSE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
Widths = Mapping[str, Blocks]
"""Contracted dimension, embed, ffn, or vo where groups lie inside a head -> how it is laid out in blocks."""


def resized(config: ModelConfig, widths: Widths, blocks_of: str = "") -> ModelConfig:
    """The sizes of what is written; `blocks_of`: a dimension of which only one entry a block is."""
    sizes = {dim: blocks.total // (BLOCK if dim == blocks_of else 1) for dim, blocks in widths.items()}
    return dataclasses.replace(
        config,
        hidden_size=sizes["embed"],
        intermediate_size=sizes.get("ffn", config.intermediate_size),
        head_dim=sizes.get("vo", config.head_dim),
        ssm=config.ssm and dataclasses.replace(config.ssm, head_dim=sizes.get("ssm_head", config.ssm.head_dim)),
    )


def stored_shape(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a tensor in the file: gated norms have a dimension of groups."""
    if name.endswith("ssm_norm.weight"):
        assert config.ssm is not None
        return (config.ssm.groups, shape[0] // config.ssm.groups)
    return shape


@dataclasses.dataclass(frozen=True)
class Layout:
    """Leaves of a block at their kept sizes -> tensors of llama.cpp's shapes."""

    config: ModelConfig
    kind: str
    widths: Widths
    inv_freq: Any

    def dense(self, row: tables.Row, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """A tensor of floats; a norm weight makes up for the mean over more entries."""
        embed = self.widths["embed"]
        if "norm" in values:
            values = {"norm": values["norm"] * np.float32(math.sqrt(embed.width / embed.total))}
        if "a_log" in values:
            values = {"a_log": -np.exp(values["a_log"])}
        value = self._foreign(row, {leaf: self._pad(leaf, value) for leaf, value in values.items()})
        return value.reshape(stored_shape(resized(self.config, self.widths), row.name, value.shape))

    def blocks(self, row: tables.Row, weights: Mapping[str, QuantizedArray]) -> np.ndarray:
        """A packed tensor as Q4_0 or Q8_0: a float16 scale and 32 integers a block, bytes [rows, bytes of a row]."""
        leaf = tables.leaf_of(self.kind, row.parts[0].leaf)
        contracted = leaf.dims[-1] if leaf.contract == "last" else leaf.dims[0]
        codes = self._foreign(row, {name: self._pad(name, integers(weight)) for name, weight in weights.items()})
        scale = {name: self._pad(name, scales(weight), contracted) for name, weight in weights.items()}
        return encoded(codes, self._foreign(row, scale, contracted), next(iter(weights.values())).bits)

    def _pad(self, name: str, value: np.ndarray, blocks_of: str = "") -> np.ndarray:
        for axis, dim in enumerate(tables.leaf_of(self.kind, name).dims):
            if dim in self.widths:
                width = self.widths[dim]
                value = width.per_block(value, axis) if dim == blocks_of else width.pad(value, axis)
        return value

    def _foreign(self, row: tables.Row, values: Mapping[str, np.ndarray], blocks_of: str = "") -> np.ndarray:
        """Leaves, at the sizes of the written model, in llama.cpp's layout."""
        return foreign(resized(self.config, self.widths, blocks_of), self.kind, row, values, self.inv_freq)


def stored_as(leaf: elastic.Leaf, value: Any, widths: Widths) -> tuple[str, str]:
    """The smallest type that holds a leaf exactly, and why it is not one of the checkpoint's own bits.

    Args:
        leaf: the row of `elastic.BLOCKS` or `elastic.TOP`.
        value: an array or QuantizedArray.
        widths: contracted dimensions that can be laid out in blocks.
    """
    if leaf.contract is None:
        return "F32", ""
    if not isinstance(value, QuantizedArray):
        return DENSE[np.dtype(value.dtype).name], ""
    scale = scales(value)
    with np.errstate(over="ignore"):
        in_range = bool((scale.astype(np.float16).astype(np.float32) == scale).all())
    contracted = leaf.dims[-1] if leaf.contract == "last" else leaf.dims[0]
    blocks = widths.get(contracted)
    if in_range and blocks is not None and blocks.exact:
        return PACKED[value.bits], ""
    why = "a scale beyond float16" if not in_range else f"groups of {value.group} along {contracted}"
    # three bits of an integer and eight of its scale are the eleven of float16
    fits = in_range and value.bits == 4 and float(scale.max(initial=0.0)) * 8 <= float(np.finfo(np.float16).max)
    return "F16" if fits else "F32", why


def encoded(
    codes: Int[np.ndarray, "rows width"], scale: Float[np.ndarray, "rows blocks"], bits: int
) -> UInt8[np.ndarray, "rows bytes"]:
    """Blocks of 32 integers as llama.cpp stores them.

    Args:
        codes: integers, int8.
        scale: one of a block, exact in float16.
        bits: 4 or 8.

    Returns:
        uint8.
    """
    rows, blocks = scale.shape
    codes = codes.reshape(rows, blocks, BLOCK)
    if bits == 4:
        nibbles = (codes + 8).astype(np.uint8)
        data = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)
    else:
        data = codes.view(np.uint8)
    halves = np.ascontiguousarray(scale.astype("<f2")[..., None]).view(np.uint8)
    return np.concatenate([halves, data], axis=-1).reshape(rows, -1)
