"""Which kernel runs a 4-bit product of bf16 rows, and how it is cut: a table per GPU, else a rule.

`tuned/<gpu>.json` is what `benchmarks/kernels.py --tune` wrote: the fastest variant per order, shape and rows of x. A
shape that is not in the table (a pruned one, say) takes the kernel of the nearest that is, and its settings, but for
those of wgmma.py: how many programs they make is what counts, and that is known for any shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import compat
from pallas_kernels.dequant_matmul import cluster, dequantize, dot, hopper, mma, tiling, wgmma
from pallas_kernels.dequant_matmul.tiling import CONTRACTS, Weight

FOLDER = Path(__file__).parent / "tuned"

SETTINGS: dict[str, Any] = {
    "mma": mma.Settings,
    "dot": dot.Settings,
    "cluster": cluster.Settings,
    "wgmma": wgmma.Settings,
    "dequantize": dequantize.Settings,
    "dense": dict,
}
"""Kernel -> what its settings are. "dequantize" is a kernel, then XLA's product; "dense" is XLA's alone."""

HOPPER: dict[str, Any] = {"cluster": cluster, "wgmma": wgmma}
"""Kernels that only Hopper runs."""

MOST_DOT = {"last": 256, "rows": 256, "first": 128, "groups": 128}
"""Rows of x up to which, by rule, unpacking in every tile of x beats dequantizing once. On an H100 `dot` won at 256 for
"last" and lost for "first"; tiles, not measured there yet, take after the layout they come from."""

FEW, SMALL = 64, 8192
"""Rows of x up to which, by rule, a weight with more outputs than SMALL goes to `dot` on Hopper, too."""

GROUP_US = {(256, 1): 1.40, (128, 1): 0.87, (64, 1): 0.76, (64, 2): 1.30}
"""Of wgmma: tile_m and tall -> microseconds of a group in a program. With the other three, fitted to the 50 times from
64 rows on of benchmarks/results/kernels-wgmma-h100.json, each of which they give to 20 %, all but two to 9 %."""
TILE_US, LAUNCH_US = 0.55, 0.8
"""Of a tile beside its groups, and of the launch."""
PARTS_US = (3.1, 1.2)
"""Of adding up parts: the launch, and each million numbers."""
SLOTS = {(256, 1): (4, 4), (128, 1): (6, 6), (64, 1): (8, 8), (64, 2): (8, 4)}
"""tile_m and tall -> x_slots and word_slots."""

CLUSTER_US = (2.2, 1.7)
"""Of the kernel of clusters: the launch, and each tile after another."""
BLOCK_US = (0.08, 0.0425)
"""Of a group of 64 rows of the weight in a program: its words, and each eight rows of x."""
BYTES_US = 2.9e6
"""Bytes of a weight that memory yields in a microsecond."""
FEW_CUTS = (
    cluster.Settings(slots=8),
    cluster.Settings(tall=2, slots=8),
    cluster.Settings(cluster=4, tall=3, slots=8),
    cluster.Settings(cluster=4, tall=2, along_k=2, along_n=2, slots=4),
)
MORE_CUTS = (
    cluster.Settings(along_k=2, slots=4, folded=True),
    cluster.Settings(cluster=4, tall=1, along_k=2, slots=4, folded=True),
)
"""Cuts to choose from, up to 16 rows of x and from 17 on."""

FAR = math.log(4)
"""A table's shape whose sides are further off than this factor, taken together, says nothing about another shape."""

Choice = tuple[str, Any]
"""Kernel and its settings."""


def slug(device_kind: str) -> str:
    """File name of a GPU's table: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


@functools.cache
def table(device_kind: str) -> list[dict[str, Any]]:
    """The rows of a GPU's table: order, k, n, count (the largest M a row serves), kernel, settings. Empty if none."""
    path = FOLDER / f"{slug(device_kind)}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def choose(weight: Weight, count: int, device_kind: str | None = None) -> Choice:
    """Kernel and settings for `count` rows of x. Raises NotImplementedError when no kernel here serves the weight."""
    return choices(weight, count, device_kind)[0]


def choices(weight: Weight, count: int, device_kind: str | None = None) -> list[Choice]:
    """The same, and what to take in its stead where it turns out wrong, in that order."""
    rows = table(device_kind or jax.devices()[0].device_kind)
    found = [
        nearest(rows, weight, count) or on_hopper(weight, count),
        nearest([row for row in rows if row["kernel"] not in HOPPER], weight, count),
        by_rule(weight, count),
        by_rule(weight, max(count, mma.MOST + 1)),
    ]
    able = [choice for choice in found if choice is not None and _supported(choice, weight, count)]
    if not able:
        raise NotImplementedError(f"no kernel for {count} rows times {weight}")
    return able


def _supported(choice: Choice, weight: Weight, count: int) -> bool:
    kernel, settings = choice
    try:
        if kernel == "mma":
            mma.supported(weight, settings, count)
        elif kernel in HOPPER:
            HOPPER[kernel].supported(weight, settings, count)
        elif kernel in ("dot", "dequantize"):
            (dot if kernel == "dot" else dequantize).supported(weight)
    except NotImplementedError:
        return False
    return True


def nearest(rows: list[dict[str, Any]], weight: Weight, count: int) -> Choice | None:
    """The row of the next larger M whose shape is nearest, the first of several such, or None."""
    counts = sorted({row["count"] for row in rows if row["order"] == weight.order and row["count"] >= count})
    best: tuple[float, dict[str, Any]] | None = None
    for row in rows:
        if row["order"] == weight.order and counts and row["count"] == counts[0]:
            width = weight.groups * weight.group
            off = abs(math.log(row["k"] / width)) + abs(math.log(row["n"] / weight.features))
            if off <= FAR and (best is None or off < best[0]):
                best = off, row
    if best is None:
        return None
    row = best[1]
    settings = SETTINGS[row["kernel"]](**row["settings"])
    if row["kernel"] in HOPPER:
        measured = dataclasses.replace(weight, features=row["n"], groups=row["k"] // weight.group)
        plan_of = HOPPER[row["kernel"]].plan_of
        # A kernel for few rows computes no more of them than there are; that alone is no other cut.
        asked = row["count"] if row["kernel"] == "cluster" else count
        if plan_of(row["count"], measured, settings) != plan_of(asked, weight, settings):
            settings = (cluster_cut if row["kernel"] == "cluster" else hopper_cut)(weight, count)
    return row["kernel"], settings


def on_hopper(weight: Weight, count: int) -> Choice | None:
    """wgmma for so many rows that it served better than what `by_rule` says, on one Hopper GPU."""
    few = mma.MOST if weight.features <= SMALL else FEW
    return ("wgmma", hopper_cut(weight, count)) if count > few else None


def hopper_cut(weight: Weight, count: int) -> wgmma.Settings:
    """How wgmma should take the least time, by what its programs took on an H100."""

    def settings(tile: tuple[int, int], split: int) -> wgmma.Settings:
        (tile_m, tall), (x_slots, word_slots) = tile, SLOTS[tile]
        # Clusters read x once for two programs: worth it where there is much of it.
        cluster = 2 if tile_m == 256 and count >= 1024 else 1
        return wgmma.Settings(tile_m, tall, x_slots, word_slots, split, cluster)

    # Tiles of 64 rows were timed alone, not several of them, which read a weight as often.
    tiles = [tile for tile in SLOTS if tile[0] > 64 or count <= 128]
    splits = [split for split in (1, 2, 4, 8) if split <= weight.groups]
    cuts = itertools.starmap(settings, itertools.product(tiles, splits))
    return min(cuts, key=functools.partial(hopper_us, weight, count))


def cluster_cut(weight: Weight, count: int) -> cluster.Settings:
    """How the kernel of clusters should take the least time, by what it took on an H100."""
    able = []
    for cut in FEW_CUTS if count <= mma.MOST else MORE_CUTS:
        with contextlib.suppress(NotImplementedError):
            cluster.supported(weight, cut, count)
            able.append(cut)
    return min(able or [MORE_CUTS[0]], key=functools.partial(cluster_us, weight, count))


def cluster_us(weight: Weight, count: int, cut: cluster.Settings) -> float:
    """Microseconds that the kernel of clusters takes on an H100, roughly."""
    plan = cluster.plan_of(count, weight, cut)
    rounds = -(-plan.tiles // plan.clusters)
    work = rounds * plan.per_share * plan.rows / hopper.BLOCK * (BLOCK_US[0] + BLOCK_US[1] * plan.columns)
    memory = weight.features * weight.groups * (tiling.GROUP / 2 + 2) / BYTES_US
    return CLUSTER_US[0] + rounds * CLUSTER_US[1] + max(work, memory)


def hopper_us(weight: Weight, count: int, cut: wgmma.Settings) -> float:
    """Microseconds that wgmma takes on an H100, roughly."""
    plan = wgmma.plan_of(count, weight, cut)
    rounds = -(-plan.tiles * cut.split // plan.clusters)
    parts = PARTS_US[0] + PARTS_US[1] * cut.split * count * weight.features / 1e6 if cut.split > 1 else 0.0
    return LAUNCH_US + rounds * (plan.per_share * GROUP_US[cut.tile_m, cut.tall] + TILE_US) + parts


def by_rule(weight: Weight, count: int) -> Choice:
    """What served on one Hopper GPU: enough warps to fill it, and no more programs than needed for that."""
    wide, tiles = weight.features > 8192, weight.order in CONTRACTS
    fill = 8 if weight.groups >= 16 else max(1, power_below(weight.groups // 2))
    if count <= 8:
        return "mma", mma.Settings(along_k=2 if wide else fill, batch=2, gate=not (wide and tiles))
    if count <= mma.MOST:
        settings = mma.Settings(along_k=2 if wide else fill, zero="mma", gate=True)
        if tiles:
            along = dict(along_k=2, along_n=2) if wide else dict(along_k=min(4, fill))
            settings = dataclasses.replace(settings, tiles=2, **along)
        return "mma", settings
    if count <= MOST_DOT[weight.order]:
        # 128 rows, in three stages, are 112 KiB of shared memory.
        tile_m = 32 if count <= 32 else 64 if count <= 64 or not compat.roomy() else 128
        split = 1 if wide else min(8 if weight.groups > 64 else 4, weight.groups)
        settings = dot.Settings(tile_n=128, tile_m=tile_m, split=split, rows_inner=count > 128)
        # Eight joined planes wait for the tensor cores once a group, and add up once, so that folding saves nothing.
        changes: dict[str, Any] = dict(join=8) if tiles else dict(fold=count > 64)
        return "dot", dataclasses.replace(settings, **changes)
    return ("dequantize", dequantize.Settings()) if tiles else ("dense", {})


def power_below(number: int) -> int:
    """The largest power of two that is not above `number` (1 for less)."""
    return 1 << max(0, number.bit_length() - 1)
