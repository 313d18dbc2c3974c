"""Nested weights drawn at random, as they are stored and what they mean, for tests of 3-bit kernels."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from uniql_jax.pallas_kernels.dequant_matmul.tiling import LAYOUTS, Weight
from uniql_jax.weights.mixed import MixedArray, in_parts
from uniql_jax.weights.nested import NestedArray, from_nested_codes
from uniql_jax.weights.quantized import QuantizedArray

ROUNDING = 4e-3
"""Relative error of a result in bf16, from weights that may be scaled in bf16."""


@dataclasses.dataclass
class Drawn:
    """A nested weight [rows, K] as it is stored, and what it means with 4 bits and with 3, float64."""

    stored: NestedArray
    fine: np.ndarray
    coarse: np.ndarray

    def dense(self, border: int) -> np.ndarray:
        """With 4 bits up to `border` of the axis that leads, in the form that the truth multiplies, [rows, K]."""
        out = self.coarse.copy()
        if self.stored.contract == "last":
            out[:border] = self.fine[:border]
        else:
            out[:, :border] = self.fine[:, :border]
        return out


def draw(rng: np.random.Generator, contract: str, rows: int, width: int, lead: tuple[int, ...] = ()) -> Drawn:
    """lead: dims whose product is the leading side, where that has several."""
    groups, codes = -(-width // 128), rng.integers(-8, 8, (rows, width))
    fine, coarse = rng.uniform(0.01, 0.03, (2, rows, groups)).astype(ml_dtypes.bfloat16)
    spread = functools.partial(np.repeat, repeats=128, axis=1)
    shape = (*(lead or (rows,)), width) if contract == "last" else (*(lead or (width,)), rows)
    made = from_nested_codes(
        jnp.asarray(codes), jnp.asarray(fine), jnp.asarray(coarse), group=128, contract=contract, shape=shape
    )
    four = codes * spread(fine.astype(np.float64))[:, :width]
    three = (codes // 2 + 0.25) * spread(coarse.astype(np.float64))[:, :width]
    return Drawn(jax.device_get(made), four, three)


def three(drawn: Drawn) -> tuple[Weight, QuantizedArray]:
    """The leading bits alone, in tiles; and their static half."""
    leaf = jax.tree.map(jnp.asarray, drawn.stored.take_bits(0).tiled())
    features, groups = drawn.coarse.shape[0], -(-drawn.coarse.shape[1] // 128)
    return Weight(leaf.layout, features, groups, 128, 3), leaf


def held(drawn: Drawn, border: int) -> tuple[Any, np.ndarray]:
    """The leaf as a GPU holds it, with 4 bits up to `border`, and what it means."""
    tile = LAYOUTS[drawn.stored.contract]
    leaf: Any = in_parts(drawn.stored.take_bits(border), tiles=True)
    if isinstance(leaf, MixedArray):
        leaf = dataclasses.replace(leaf, whole=leaf.whole.in_layout(tile))
    elif leaf.bits == 4:
        leaf = leaf.in_layout(tile)
    inner = drawn.stored.shape[0]
    rows = drawn.fine.shape[0 if drawn.stored.contract == "last" else 1]
    return jax.tree.map(jnp.asarray, leaf), drawn.dense(border * rows // inner)
