"""How the kernels for Hopper are cut where no table says: by the time that a cut's programs take, roughly.

The times were fitted to one H100's (benchmarks/results/kernels-h100.json, JAX 0.11.2); what counts is how many programs
there are, how many tiles each has, and what is left to add up.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any, NamedTuple

from uniql_jax.pallas_kernels.dequant_matmul import mma, tiling
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster, common, wgmma
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

SMALL = 8192
"""Outputs of a weight up to which few rows of x find too few programs without sharing its contraction."""
LEAST = 5
"""Rows of x from which clusters are for them: they take eights, padded by a launch of its own, and four rows so padded
took up to a quarter longer than by mma.py."""
FEW = 32
"""Rows of x up to which a weight with more outputs than that goes to a kernel of another file."""


class Tile(NamedTuple):
    """A tile of wgmma, and what it takes."""

    tile_m: int
    tall: int
    consumers: int
    along_k: int
    x_slots: int
    word_slots: int
    group_us: float
    """Of a group in a program, where `along_k` are under way at once."""


TILES = (
    Tile(256, 1, 2, 1, 4, 4, 1.42),
    Tile(128, 1, 2, 1, 6, 6, 0.81),
    Tile(128, 1, 4, 1, 4, 4, 1.80),
    Tile(128, 1, 2, 2, 8, 4, 0.97),
    Tile(64, 1, 2, 1, 8, 8, 0.56),
    Tile(64, 1, 4, 1, 8, 6, 1.04),
    Tile(64, 2, 2, 1, 8, 4, 1.02),
    Tile(64, 1, 2, 2, 8, 4, 0.75),
)
LAUNCH_US, TILE_US = 1.11, 2.13
"""Of wgmma: the launch, and each tile of a program next to its groups."""
PARTLY_US = 1.1
"""And of one that x does not fill, as 32 rows do not one of 64."""
PARTS_US = (1.94, 1.86)
"""Of adding up parts: the launch, and each million numbers."""
JOINED_US = 1.0
"""Of adding up within a cluster, each tile."""

CLUSTER_US = (3.13, 0.61)
"""Of the kernel of clusters: the launch, and each tile of a program next to its groups."""
BLOCK_US = (0.030, 0.054)
"""Of a group of 64 rows of the weight in a program: itself, and each eight rows of x."""
BYTES_US = 2.66e6
"""Bytes of a weight that come in a microsecond, what was read ahead included."""
FEW_CUTS = (
    cluster.Settings(slots=8),
    cluster.Settings(tall=2, slots=8),
    cluster.Settings(cluster=4, tall=3, slots=8),
    cluster.Settings(cluster=4, tall=2, along_k=2, along_n=2, slots=4),
)
MORE_CUTS = (cluster.Settings(along_k=2, slots=4, folded=True),)
"""Cuts to choose from, up to 16 rows of x and from 17 on."""


def choice(weight: Weight, count: int) -> tuple[str, Any] | None:
    """Kernel and settings for `count` rows of x; None where kernels of other files served as well or better."""
    if count < LEAST or (weight.features > SMALL and count <= FEW):
        return None
    options: list[tuple[float, str, Any]] = []
    if count <= cluster.MOST:
        cut = cluster_cut(weight, count)
        options.append((cluster_us(weight, count, cut), "cluster", cut))
    if count > mma.MOST:
        wide = wgmma_cut(weight, count)
        options.append((wgmma_us(weight, count, wide), "wgmma", wide))
    _, kernel, settings = min(options, key=lambda option: option[0])
    return kernel, settings


def cut(kernel: str, weight: Weight, count: int) -> Any:
    """The settings of one of the two kernels."""
    return (cluster_cut if kernel == "cluster" else wgmma_cut)(weight, count)


def cluster_cut(weight: Weight, count: int) -> cluster.Settings:
    """How the kernel of clusters should take the least time."""
    cuts = FEW_CUTS if count <= mma.MOST else MORE_CUTS
    able = [each for each in cuts if _fits(cluster, weight, each, count)]
    return min(able or cuts, key=functools.partial(cluster_us, weight, count))


def cluster_us(weight: Weight, count: int, cut: cluster.Settings) -> float:
    """Microseconds that the kernel of clusters takes on an H100, roughly."""
    plan = cluster.plan_of(count, weight, cut)
    rounds = -(-plan.tiles // plan.clusters)
    blocks = rounds * plan.per_share * plan.rows // common.BLOCK
    memory = weight.features * weight.groups * (tiling.GROUP // 2 + 2) / BYTES_US
    return CLUSTER_US[0] + rounds * CLUSTER_US[1] + max(blocks * (BLOCK_US[0] + BLOCK_US[1] * plan.columns), memory)


def wgmma_cut(weight: Weight, count: int) -> wgmma.Settings:
    """How wgmma should take the least time."""

    def settings(tile: Tile, split: int, joined: bool) -> wgmma.Settings:
        # Clusters read x once for two programs: worth it where there is much of it.
        pair = 2 if tile.tile_m == 256 and count >= 1024 else 1
        slots = (4, 4) if joined and tile.along_k == 1 else (tile.x_slots, tile.word_slots)
        shape: dict[str, Any] = dict(tile_m=tile.tile_m, tall=tile.tall, consumers=tile.consumers, along_k=tile.along_k)
        return wgmma.Settings(**shape, x_slots=slots[0], word_slots=slots[1], split=split, cluster=pair, joined=joined)

    # Tiles of 64 rows were timed alone, not several of them, which read a weight as often.
    tiles = [tile for tile in TILES if tile.tile_m > 64 or count <= 128]
    splits = [split for split in (1, 2, 4, 8) if split <= weight.groups]
    cuts = list(itertools.starmap(settings, itertools.product(tiles, splits, (False,))))
    # Clusters of eight were not timed.
    cuts += itertools.starmap(settings, itertools.product(tiles, [split for split in splits if split <= 4], (True,)))
    able = [each for each in cuts if _fits(wgmma, weight, each, count)]
    return min(able or [wgmma.Settings()], key=functools.partial(wgmma_us, weight, count))


def wgmma_us(weight: Weight, count: int, cut: wgmma.Settings) -> float:
    """Microseconds that wgmma takes on an H100, roughly. Raises LookupError for a tile that is not in TILES."""
    plan = wgmma.plan_of(count, weight, cut)
    rounds = -(-plan.tiles * (1 if cut.joined else cut.split) // plan.clusters)
    shape = cut.tile_m, cut.tall, cut.consumers, cut.along_k
    group_us = {tile[:4]: tile.group_us for tile in TILES}[shape]
    add_up = 0.0
    if cut.joined:
        add_up = JOINED_US * rounds
    elif cut.split > 1:
        add_up = PARTS_US[0] + PARTS_US[1] * cut.split * count * weight.features / 1e6
    tile_us = TILE_US + (PARTLY_US if count < cut.tile_m else 0.0)
    return LAUNCH_US + rounds * (-(-plan.per_share // cut.along_k) * group_us + tile_us) + add_up


def _fits(module: Any, weight: Weight, settings: Any, count: int) -> bool:
    with contextlib.suppress(NotImplementedError):
        module.supported(weight, settings, count)
        return True
    return False
