"""Which kernel runs a 4-bit product of bf16 rows, and how it is cut: a table per GPU, else a rule.

`tuned/<gpu>.json` is what `benchmarks/kernels.py --tune` wrote: the fastest variant per layout, shape and rows of x. A
shape that is not in the table (a pruned one, say) takes the kernel of the nearest that is, and its settings, but for
Hopper's kernels: how many programs they make is what counts, and that is known for any shape (hopper/cuts.py). So there
the rule comes before another kernel of another shape.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.dequant_matmul import dequantize, dot, mma, three_bit_mma
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster, cuts, wgmma
from uniql_jax.pallas_kernels.dequant_matmul.tiling import CONTRACTS, Weight

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

TRITON = ("mma", "dot", "dequantize")
"""Kernels of Pallas's Triton backend."""

MOST_DOT = {"last": 256, "rows": 256, "first": 128, "groups": 128}
"""Rows of x up to which, by rule, unpacking in every tile of x beats dequantizing once. On an H100 `dot` won at 256 for
"last" and lost for "first"; tiles, not measured there yet, take after the layout they come from."""

FAR = math.log(4)
"""A table's shape whose sides are further off than this factor, taken together, says nothing about another shape."""

Choice = tuple[str, Any]
"""Kernel and its settings."""


def slug(device_kind: str) -> str:
    """File name of a GPU's table: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


@functools.cache
def table(device_kind: str) -> list[dict[str, Any]]:
    """The rows of a GPU's table: order, k, n, count (the largest M a row serves), kernel, settings, and bits where they
    are not 4. Empty if none.
    """
    path = FOLDER / f"{slug(device_kind)}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def choices(weight: Weight, count: int, device_kind: str | None = None) -> list[Choice]:
    """Kernel and settings for `count` rows of x, and what to take in their stead where they turn out wrong, in order.

    Raises NotImplementedError when no kernel here serves the weight.
    """
    rows = table(device_kind or jax.devices()[0].device_kind)
    rows = [row for row in rows if row.get("bits", 4) == weight.bits]
    if count < cuts.LEAST and compat.plgpu is not None:
        rows = [row for row in rows if row["kernel"] != "cluster"]
    first, rule = nearest(rows, weight, count), cuts.choice(weight, count)
    if first is None or (rule is not None and first[0] not in HOPPER and not measured(rows, weight)):
        first = rule
    found = [
        first,
        nearest([row for row in rows if row["kernel"] not in HOPPER], weight, count),
        by_rule(weight, count),
        by_rule(weight, max(count, mma.MOST + 1)),
        *without_triton(weight, count),
    ]
    able = [choice for choice in found if choice is not None and _supported(choice, weight, count)]
    if not able:
        raise NotImplementedError(f"no kernel for {count} rows times {weight}")
    return able


def _supported(choice: Choice, weight: Weight, count: int) -> bool:
    kernel, settings = choice
    if kernel in TRITON and compat.plgpu is None:
        return False
    try:
        if kernel == "mma":
            mma.supported(weight, settings, count)
        elif kernel in HOPPER:
            HOPPER[kernel].supported(weight, settings, count)
        elif kernel == "dense" and weight.bits != 4:
            return False
        elif kernel in ("dot", "dequantize"):
            (dot if kernel == "dot" else dequantize).supported(weight)
    except NotImplementedError:
        return False
    return True


def without_triton(weight: Weight, count: int) -> list[Choice]:
    """Hopper's kernels for any number of rows, where JAX has no Triton backend: not always the fastest ones."""
    if compat.plgpu is not None or compat.mosaic_gpu is None:
        return []
    kernels = ("cluster", "wgmma") if count <= cluster.MOST else ("wgmma",)
    return [(kernel, cuts.cut(kernel, weight, count)) for kernel in kernels]


def measured(rows: list[dict[str, Any]], weight: Weight) -> bool:
    """Whether the table has this very shape."""
    shape = weight.layout, weight.groups * weight.group, weight.features
    return any((row["order"], row["k"], row["n"]) == shape for row in rows)


def nearest(rows: list[dict[str, Any]], weight: Weight, count: int) -> Choice | None:
    """The row of the next larger M whose shape is nearest, the first of several such, or None."""
    counts = sorted({row["count"] for row in rows if row["order"] == weight.layout and row["count"] >= count})
    best: tuple[float, dict[str, Any]] | None = None
    for row in rows:
        if row["order"] == weight.layout and counts and row["count"] == counts[0]:
            width = weight.groups * weight.group
            off = abs(math.log(row["k"] / width)) + abs(math.log(row["n"] / weight.features))
            if off <= FAR and (best is None or off < best[0]):
                best = off, row
    if best is None:
        return None
    row = best[1]
    settings = SETTINGS[row["kernel"]](**row["settings"])
    if row["kernel"] in HOPPER:
        own = dataclasses.replace(weight, features=row["n"], groups=row["k"] // weight.group)
        plan_of = HOPPER[row["kernel"]].plan_of
        # A kernel for few rows computes no more of them than there are; that alone is no other cut.
        asked = row["count"] if row["kernel"] == "cluster" else count
        if plan_of(row["count"], own, settings) != plan_of(asked, weight, settings):
            settings = cuts.cut(row["kernel"], weight, count)
    return row["kernel"], settings


def by_rule(weight: Weight, count: int) -> Choice:
    """What served on one Hopper GPU: enough warps to fill it, and no more programs than needed for that."""
    wide, tiles = weight.features > 8192, weight.layout in CONTRACTS
    steps = weight.groups if weight.bits == 4 else three_bit_mma.steps(weight)
    fill = 8 if steps >= 16 else max(1, power_below(steps // 2))
    if count <= 8:
        return "mma", mma.Settings(along_k=2 if wide else fill, batch=2, gate=weight.bits != 4 or not (wide and tiles))
    if count <= mma.MOST:
        settings = mma.Settings(along_k=2 if wide else fill, zero="mma", gate=True)
        if tiles:
            along = dict(along_k=2, along_n=2) if wide else dict(along_k=min(4, fill))
            settings = dataclasses.replace(settings, tiles=2, **along)
        return "mma", settings
    if count <= MOST_DOT[weight.layout]:
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
