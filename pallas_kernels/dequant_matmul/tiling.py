"""How a 4-bit weight lies in memory, and a layout in which each load of the mma kernel is contiguous across a warp.

A tile is 16 rows by 128 contracted weights: words [half, 4 * row + lane, i], where `half` picks rows 0-7 or 8-15 and
the word is number 4 i + lane of its row. So a tile is 16 rows of 16 words after one another, only their order in a row
differs. "rows" orders tiles [row tile, group], so that a prefix of rows is contiguous; "groups" orders them
[group, row tile], so that a prefix of the contraction is. Scales stay as they are.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

ROWS = 16
"""Rows of a tile."""
GROUP = 128
"""Contracted weights of a tile; each has one scale a row."""
LAYOUTS = {"last": "rows", "first": "groups"}
"""Contract of a weight -> layout of its tiles, which keeps the sorted axis outermost."""
SHAPES = {4: (2, 1), 3: (3, 2)}
"""Bits -> sixteen-byte loads that a warp reads a tile in, and groups that it spans."""
CONTRACTS = {layout: contract for contract, layout in LAYOUTS.items()}
"""Layout of tiles -> contract of their weight."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """The static half of a packed weight of `groups` groups of `group` contracted weights.

    `layout` of its data: "last" [features, K / 8], "first" [K / 8, features], "rows" [features / 16, groups, 2, 32, 4],
    "groups" [groups, features / 16, 2, 32, 4]. Scales are [features, groups] for "last" and "rows", else transposed.
    3 bits come in tiles alone, those of three_bit.py.
    """

    layout: str
    features: int
    groups: int
    group: int
    bits: int = 4


def tile(
    data: Int[Array, "a b"] | Shaped[np.ndarray, "a b"], contract: str
) -> Int[Array, "major minor 2 32 4"] | Shaped[np.ndarray, "major minor 2 32 4"]:
    """Words [rows, K / 8] ("last") or [K / 8, features] ("first") -> tiles, in the order that `contract` prunes.

    A numpy array yields a numpy array: nothing is compiled, whatever its shape. Rows are padded with zeros to whole
    tiles. Raises NotImplementedError when K is not a multiple of 128.
    """
    words = data if contract == "last" else data.T
    rows, width = words.shape
    if width % 16:
        raise NotImplementedError(f"tiles hold whole groups of {GROUP}, not {8 * width} contracted weights")
    if rows % ROWS:
        words = (np if isinstance(words, np.ndarray) else jnp).pad(words, ((0, -rows % ROWS), (0, 0)))
    parts = words.reshape(-1, 2, 8, width // 16, 4, 4)  # row tile, half, row, group, i, lane
    tiles = parts.transpose(0, 3, 1, 2, 5, 4).reshape(-1, width // 16, 2, 32, 4)
    return tiles if contract == "last" else tiles.swapaxes(0, 1)


def untile(tiles: Int[Array, "major minor 2 32 4"], contract: str, rows: int) -> Int[Array, "a b"]:
    """Inverse of `tile` for a weight of `rows` rows ("last") or features ("first")."""
    tiles = tiles if contract == "last" else tiles.swapaxes(0, 1)
    row_tiles, groups = tiles.shape[:2]
    parts = tiles.reshape(row_tiles, groups, 2, 8, 4, 4).transpose(0, 2, 3, 1, 5, 4)
    words = parts.reshape(row_tiles * ROWS, groups * 16)[:rows]
    return words if contract == "last" else words.T


def take_prefix(
    tiles: Int[Array | np.ndarray, "a b c 32 4"], contract: str, count: int
) -> Int[Array | np.ndarray, "kept b c 32 4"]:
    """The tiles of the first `count` rows ("last") or contracted weights ("first"): one contiguous block.

    Raises ValueError when a cut of the contraction splits a group; a cut of the rows keeps the tile it falls in.
    """
    if contract == "first" and count % GROUP:
        raise ValueError(f"a cut at {count} splits a quantization group of {GROUP}")
    return tiles[: -(-count // (ROWS if contract == "last" else GROUP))]


def plain(data: Int[Array, "..."], layout: str, features: int) -> Int[Array, "a b"]:
    """Data in any layout ("plain" or a tiles') as the matrix that `packing` describes."""
    return data if layout == "plain" else untile(data, CONTRACTS[layout], features)


def check(data: Array, scale: Array, *, bits: int, group: int, contract: str, width: int, layout: str) -> None:
    """Raise ValueError, naming the numbers, when tiles do not fit their scales."""
    if layout != LAYOUTS.get(contract) or bits not in SHAPES or group != GROUP:
        raise ValueError(f"tiles {layout!r} do not hold {bits} bits in groups of {group} contracted {contract!r}")
    if scale.ndim != 2 or data.dtype != jnp.int32:
        raise ValueError(f"tiles are int32 and scales a matrix, not {data.dtype} and of shape {scale.shape}")
    features, groups = scale.shape if contract == "last" else scale.shape[::-1]
    row_tiles = -(-features // ROWS)
    words, span = SHAPES[bits]
    wide = -(-groups // span)
    expected = (row_tiles, wide) if layout == "rows" else (wide, row_tiles)
    if data.shape != (*expected, words, 32, 4) or not (groups - 1) * group < width <= groups * group:
        raise ValueError(f"tiles {data.shape} do not hold {features} rows, {groups} groups and width {width}")


def by_row(data: Int[Array, "major minor 2 32 4"]) -> Int[Array, "major minor 16 16"]:
    """Tiles as their rows' words, the p-th of which is number 4 (p % 4) + p // 4 of its row and group."""
    return data.reshape(*data.shape[:2], ROWS, GROUP // 8)
