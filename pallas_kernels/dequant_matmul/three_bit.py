"""Three-bit weights in memory: tiles of 16 rows by two groups of 128, which one warp reads in three 16-byte loads.

An integer h from 0 to 7 stands for (h - 3.75) * scale: the leading bits of nested codes (uniql_jax/weights/nested.py).
A thread of a warp holds the 32 weights of a row and group that mma.py gives it, two to a pair, in three words. A word
has five pairs, each 3 bits in its low and 3 bits in its high half, and one bit more in either; these make the sixteenth
pair. So 32 weights take 96 bits, and no field straddles two words. Tiles are [row tile, pair of groups, word, thread,
2 * half of the rows + group] for "rows", with the first two exchanged for "groups": the sorted axis leads, and pruning
keeps a prefix. A last group without a partner has one of zeros.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt32

from uniql_jax.pallas_kernels.dequant_matmul.tiling import GROUP, ROWS

BITS = 3
WORDS = 3
"""Words of a thread for a row and group."""
SPAN = 2
"""Groups of a tile."""
FIELDS = 5
"""Pairs that a word holds whole."""
SPARE = 15
"""Bit of either half of a word that belongs to the last pair: its highest bit in the first word."""
PAIRS = WORDS * FIELDS + 1
CENTRE = 3.75
"""Half way between the two 4-bit codes with the same leading bits, in steps of the leading bits."""


@functools.cache
def _table(word: int) -> UInt32[np.ndarray, " 65536"]:
    """Where the bits of two bytes of a plane, numbers `word` and `word` + 1 of a lane's four, lie in a word.

    A byte holds four pairs, the first weight of each lowest. The plane is the lowest one.
    """
    value, table = np.arange(1 << 16), np.zeros(1 << 16, np.uint32)
    for bit in range(16):
        field = 4 * word + bit // 2 - FIELDS * word
        if 0 <= field < FIELDS:
            table |= ((value >> bit & 1) << (BITS * field + 16 * (bit % 2))).astype(np.uint32)
    return table


def tile(leading: UInt8[np.ndarray, "..."], contract: str) -> Int[np.ndarray, "major minor 3 32 4"]:
    """Bit planes as a nested weight has them -> tiles; on the host, where no program is compiled.

    Args:
        leading: uint8 [rows, 3, K / 8] ("last") or [K / 8, 3, features] ("first"), the highest bit first.
        contract: which of the two, and which dimension leads.

    Returns:
        int32 tiles.

    Raises:
        NotImplementedError: K is not a multiple of 128.
    """
    planes = leading if contract == "last" else leading.transpose(2, 1, 0)
    rows, _, width = planes.shape
    if width * 8 % GROUP:
        raise NotImplementedError(f"tiles hold whole groups of {GROUP}, not {8 * width} contracted weights")
    missing = (0, -rows % ROWS), (0, 0), (0, -width % (SPAN * GROUP // 8))
    if any(after for _, after in missing):
        planes = np.pad(planes, missing)
    # Four lanes' bytes move together: row tile, half, row, plane, pair of groups, group, byte of a lane.
    fours = np.ascontiguousarray(planes).view(np.uint32).reshape(-1, 2, 8, BITS, planes.shape[-1] // 32, SPAN, 4)
    fours = np.ascontiguousarray(fours.transpose(6, 3, 0, 4, 2, 1, 5))
    planes = fours.view(np.uint8).reshape(*fours.shape[:-2], 2 * SPAN, 4)
    tiles = np.empty((*planes.shape[2:4], WORDS, 8, 4, 2 * SPAN), np.uint32)
    for word in range(WORDS):
        both = planes[word] | planes[word + 1].astype(np.uint16) << 8
        high, middle, low = _table(word)[both]
        spare = planes[3, word].astype(np.uint32)
        found = high << 2 | middle << 1 | low | (spare >> 6 & 1) << SPARE | (spare >> 7) << (SPARE + 16)
        tiles[:, :, word] = found.swapaxes(-1, -2)
    tiles = tiles.reshape(*tiles.shape[:3], 32, 4).view(np.int32)
    return tiles if contract == "last" else np.ascontiguousarray(tiles.swapaxes(0, 1))


def tiles_shape(rows: int, groups: int, contract: str) -> tuple[int, ...]:
    """Of the tiles of a weight of so many rows ("last") or features ("first")."""
    tiles = -(-rows // ROWS), -(-groups // SPAN)
    return (*(tiles if contract == "last" else tiles[::-1]), WORDS, 32, 4)


def untile(
    tiles: Int[np.ndarray, "major minor 3 32 4"], contract: str, rows: int, groups: int
) -> UInt8[np.ndarray, "..."]:
    """Inverse of `tile`, for a weight of so many rows ("last") or features ("first"), with numpy."""
    found = tiles if contract == "last" else tiles.swapaxes(0, 1)
    words = found.view(np.uint32).reshape(*found.shape[:2], WORDS, 8, 4, 2, SPAN)
    planes = np.zeros((len(words), 2, 8, BITS, words.shape[1], SPAN, 4, 4), np.uint8)
    for pair in range(PAIRS):
        for plane in range(BITS):
            word, at = divmod(pair, FIELDS)
            at = BITS * at + BITS - 1 - plane
            if pair == PAIRS - 1:
                word, at = plane, SPARE
            for half in (0, 1):
                bit = (words[:, :, word] >> np.uint32(at + 16 * half) & 1).astype(np.uint8)
                planes[:, :, :, plane, :, :, pair // 4] |= bit.transpose(0, 4, 2, 1, 5, 3) << (2 * (pair % 4) + half)
    planes = planes.reshape(len(words) * ROWS, BITS, -1)[:rows, :, : groups * GROUP // 8]
    return planes if contract == "last" else np.ascontiguousarray(planes.transpose(2, 1, 0))


def pairs_of(words: list[Int[Array, "..."]]) -> list[Int[Array, "..."]]:
    """Three words as sixteen pairs of integers, each in the lowest bits of either half."""
    found = [(words[p // FIELDS] >> (3 * (p % FIELDS))) & 0x00070007 for p in range(PAIRS - 1)]
    high, middle, low = ((word >> SPARE) & 0x00010001 for word in words)
    return [*found, high << 2 | middle << 1 | low]


def codes(tiles: Int[Array, "major minor 3 32 4"], contract: str) -> Int[Array, "rows padded"]:
    """The integers of tiles as a matrix, filled up to whole tiles; the contraction is last, whatever `contract` is."""
    tiles = tiles if contract == "last" else tiles.swapaxes(0, 1)
    tall, wide = tiles.shape[:2]
    parts = tiles.reshape(tall, wide, WORDS, 8, 4, 2, SPAN)
    pairs = jnp.stack(pairs_of([parts[:, :, word] for word in range(WORDS)]), axis=-1)
    both = jnp.stack([pairs & 7, (pairs >> 16) & 7], axis=-1)
    # row tile, pair of groups, row, lane, half, group, byte, pair of the byte, weight of the pair
    both = both.reshape(tall, wide, 8, 4, 2, SPAN, 4, 4, 2)
    return both.transpose(0, 4, 2, 1, 5, 6, 3, 7, 8).reshape(tall * ROWS, wide * SPAN * GROUP)


def dequantize(
    tiles: Int[Array, "major minor 3 32 4"], scale: Float[Array, "*c d"], contract: str
) -> Float[Array, "rows padded"]:
    """The weight in float32, [rows or features, groups * 128]; the contraction is last.

    scale: [*rows, groups] for contract "last", [groups, features] for "first".
    """
    scale = (scale.reshape(-1, scale.shape[-1]) if contract == "last" else scale.T).astype(jnp.float32)
    rows, groups = scale.shape
    value = codes(tiles, contract)[:rows, : groups * GROUP].astype(jnp.float32) - CENTRE
    return value * jnp.repeat(scale, GROUP, axis=1)


def lookup(
    tiles: Int[Array, "tall wide 3 32 4"], scale: Float[Array, "rows groups"], index: Int[Array, "*b"]
) -> Float[Array, "*b padded"]:
    """Rows of a weight that contracts its last dimension, float32."""
    parts = tiles.reshape(*tiles.shape[:3], 8, 4, 2, SPAN)
    row = index % ROWS
    picked = parts[index // ROWS, :, :, row % 8, :, row // 8]  # [*b, wide, word, lane, group]
    pairs = jnp.stack(pairs_of([picked[..., word, :, :] for word in range(WORDS)]), axis=-1)
    both = jnp.stack([pairs & 7, (pairs >> 16) & 7], axis=-1)
    both = both.reshape(*index.shape, tiles.shape[1], 4, SPAN, 4, 4, 2)
    value = jnp.moveaxis(both, -5, -3)  # lane, group, byte, ... -> group, byte, lane, ...
    value = value.reshape(*index.shape, tiles.shape[1] * SPAN * GROUP)[..., : scale.shape[1] * GROUP]
    return (value.astype(jnp.float32) - CENTRE) * jnp.repeat(scale[index].astype(jnp.float32), GROUP, axis=-1)
