"""Times the 4-bit matrix product against XLA's bf16 product of the same shape (and PyTorch's own 4-bit one, where torch
is installed), and RoPE against gathered tables and a copy, in one run; writes a JSON record.

    python benchmarks/kernels.py --json benchmarks/results/kernels-h100.json
    python benchmarks/kernels.py --only 4096x28672 M=1 --quick
    python benchmarks/kernels.py --kernels bf16 wgmma --only M=256 --json benchmarks/results/kernels-m256-h100.json
    python benchmarks/kernels.py --record RESULT.json --tune pallas_kernels/dequant_matmul/tuned

A time is the median of several runs of one jit that holds a chain of calls over distinct weights (more than the caches
hold), divided by their number; no profiler, so CUDA graphs are on. Kernels wait for the call before through an operand
they do not read; what needs XLA beside the kernel, and bf16 itself, waits through an addition to x, whose own chain,
over as large an x where that takes longer than a launch, is timed and taken off. Errors are relative, against float64
of the dequantized weights, on a sample of outputs.

Every variant is compiled and timed in a worker process, so that one that fails or crashes costs its own row.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")

BANDWIDTH = 2.9e12
"""Bytes a second that a copy reaches on an H100 (read + write); a run measures its own device's."""
SHAPES = {
    # K, N: contract of the leaf that has this shape
    (4096, 28672): "last",  # gate and up
    (14336, 4096): "first",  # down
    (4096, 6144): "last",  # q, k and v
    (4096, 4096): "first",  # o
    (4096, 128256): "last",  # head
}
COUNTS = (16, 8, 64, 256, 1, 2048, 128)
"""Rows of x, in the order of their urgency: time may run out."""
GROUP = 128
DISTINCT = 190e6
"""Bytes of distinct weights in a chain."""
PATIENCE = 75.0
"""Seconds without a word from a worker after which it is taken for hung."""


# --- what is timed --------------------------------------------------------------------------------------------------


def task(k: int, n: int, count: int, kernel: str, group: int = GROUP, contract: str = "", **settings: Any) -> dict:
    """One row to come."""
    contract = contract or SHAPES[k, n]
    return dict(k=k, n=n, count=count, kernel=kernel, group=group, contract=contract, settings=settings)


PEERS = ("bf16", "unpack", "torch int4")
"""Kernels that are compared with, or are half of one."""


def name(row: dict) -> str:
    """How a row is printed and selected."""
    settings = ",".join(f"{key}={value}" for key, value in row["settings"].items())
    return f"{row['k']}x{row['n']} M={row['count']} {row['contract']} {row['kernel']} {settings}"


def baselines(k: int, n: int, count: int) -> list[dict]:
    """XLA's bf16 product; at M = 1 with the weight laid out either way."""
    natural = SHAPES[k, n]
    contracts = (natural, "first" if natural == "last" else "last") if count == 1 else (natural,)
    return [task(k, n, count, "bf16", contract=contract) for contract in contracts]


def candidates(k: int, n: int, count: int) -> list[dict]:
    """Variants worth timing, above all of the tiles that a model holds on a GPU."""
    tiles = "rows" if SHAPES[k, n] == "last" else "groups"
    make = functools.partial(task, k, n, count, order=tiles)
    narrow = n <= 8192
    rows: list[dict] = []
    if count <= 16:
        for cut in few_rows_cuts(k, count, narrow):
            along_k, batch, r, along_n, split, options = cut
            settings: dict[str, Any] = dict(along_k=along_k, batch=batch, tiles=r)
            settings |= dict(along_n=along_n) if along_n > 1 else {}
            settings |= dict(split=split) if split > 1 else {}
            settings |= dict(gate=True) if "g" in options else {}
            settings |= dict(zero="mma") if "m" in options else {}
            settings |= dict(ordered=True) if "o" in options else {}
            settings |= dict(stream=True) if "s" in options else {}
            settings |= dict(joined=True) if "j" in options else {}
            settings |= dict(ahead=True) if "a" in options else {}
            rows.append(make("mma", **settings))
            if tiles == "rows" and "t" in options:
                rows.append(make("mma", **settings, scale_tiles=True))
        if count == 16:
            for join in (4, 8):
                split = 8 if k > 8192 else 4 if narrow else 1
                rows.append(make("dot", tile_n=128, tile_m=16, warps=4, stages=4, split=split, join=join))
        # x as int32 pairs, which nothing in a model makes for free: what a wider load alone would win.
        rows.append(make("mma", wide=True, gate=True, **plain_cut(count, narrow)))
        rows.append(task(k, n, count, "mma", gate=True, **plain_cut(count, narrow)))
    elif count <= 128:
        split = 8 if k > 8192 else 4 if narrow else 1
        tile_m = min(count, 128)
        for tile_n, warps, stages, parts, join, fold in (
            (128, 8, 3, split, 8, False),
            (128, 8, 3, split, 4, False),
            (128, 8, 3, split, 8, True),
            (64, 4, 3, split, 8, False),
        ):
            cut = dict(tile_n=tile_n, tile_m=tile_m, warps=warps, stages=stages, split=parts, join=join)
            rows.append(make("dot", **cut, **(dict(fold=True) if fold else {})))
        rows.append(task(k, n, count, "dot", tile_n=128, tile_m=tile_m, warps=8, stages=3, split=split, join=8))
        rows += [make("wgmma", **cut) for cut in wgmma_cuts(n, count)]
        rows.append(make("dequantize"))
    else:
        # Up to 256 rows of x at once, so that a weight is unpacked once; registers then hold folded sums alone.
        splits = ((4, 8) if k > 8192 else (2, 4) if narrow else (1,)) if count <= 512 else (1,)
        for tile_n, tile_m, warps, stages, join, fold in (
            (128, 256, 8, 3, 8, True),
            (128, 256, 8, 3, 4, True),
            (64, 128, 4, 3, 8, False),
        ):
            for split in splits:
                cut = dict(tile_n=tile_n, tile_m=tile_m, warps=warps, stages=stages, join=join, split=split)
                rows.append(make("dot", **cut, fold=fold, rows_inner=True))
        for groups, warps in ((4, 4), (8, 4), (2, 2)):
            rows.append(make("dequantize", groups=groups, warps=warps))
        rows += [make("wgmma", **cut) for cut in wgmma_cuts(n, count)]
        rows.append(make("unpack"))
        rows += [make("dense"), task(k, n, count, "dense")]
    plain = [task(k, n, count, "auto")] if count in (1, 64) else []
    return [*rows, *plain, make("auto")]


Cut = tuple[int, int, int, int, int, str]
"""along_k, batch, tiles, along_n, split, and letters: g gate, m zero="mma", o ordered, s stream, j joined, a ahead; t
asks for the same once more with the scales of a tile side by side."""


def few_rows_cuts(k: int, count: int, narrow: bool) -> list[Cut]:
    """Cuts of the mma kernel. The first of each list was the fastest so far."""
    # fmt: off
    if count > 1 and narrow and k > 8192:  # where programs read x from L2 as often as weights from memory
        if count <= 8:
            return [
                (2, 2, 1, 2, 4, "gmos"), (2, 2, 1, 2, 4, "gmosj"), (2, 2, 1, 2, 7, "gmosj"), (2, 2, 1, 2, 8, "gmosj"),
                (4, 2, 1, 2, 2, "gmosj"), (4, 2, 1, 2, 3, "gmosj"), (4, 1, 1, 2, 4, "gmosj"), (4, 1, 1, 2, 7, "gmosj"),
                (8, 1, 1, 2, 2, "gmosj"), (2, 1, 1, 2, 8, "gmosj"), (1, 2, 1, 4, 8, "gmosj"),
                (2, 2, 1, 2, 4, "gmosja"), (4, 1, 1, 2, 4, "gmosja"), (2, 1, 1, 2, 8, "gmosja"),
                (8, 1, 1, 2, 2, "gmosja"), (8, 1, 1, 2, 1, "gmosa"),
            ]
        return [
            (4, 1, 2, 2, 2, "gmos"), (4, 1, 2, 2, 2, "gmosj"), (4, 1, 2, 2, 3, "gmosj"), (4, 1, 2, 1, 4, "gmosj"),
            (4, 1, 2, 1, 7, "gmosj"), (2, 2, 2, 1, 4, "gmosj"), (2, 1, 2, 1, 4, "gmosj"), (2, 1, 2, 2, 4, "gmosj"),
            (2, 1, 2, 1, 8, "gmosj"), (8, 1, 2, 1, 2, "gmosj"),
            (4, 1, 2, 2, 2, "gmosja"), (4, 1, 2, 1, 4, "gmosja"), (2, 1, 2, 1, 8, "gmosja"), (16, 1, 2, 1, 1, "gmosa"),
        ]
    if count == 1 and narrow:
        return [
            (1, 2, 1, 2, 8, "gmt"), (8, 2, 1, 1, 1, "gt"), (16, 1, 1, 1, 1, "g"), (8, 2, 1, 1, 1, ""),
            (8, 2, 1, 1, 1, "gos"), (2, 2, 1, 1, 8, "gs"), (4, 2, 1, 1, 4, "g"), (2, 2, 1, 2, 4, "gm"),
        ]
    if count == 1:
        return [
            (2, 2, 1, 1, 1, "t"), (4, 1, 1, 1, 1, "gt"), (4, 2, 1, 1, 1, "g"), (2, 2, 1, 1, 1, "s"),
            (4, 1, 1, 1, 1, "gst"), (2, 2, 1, 1, 1, "o"), (4, 1, 1, 2, 1, "g"),
        ]
    if count <= 8 and narrow:
        return [
            (1, 2, 1, 2, 8, "gm"), (1, 2, 1, 2, 8, "gmot"), (8, 2, 1, 1, 1, "ot"), (8, 2, 1, 1, 1, "go"),
            (16, 1, 1, 1, 1, "go"), (2, 2, 1, 1, 4, "go"), (4, 2, 1, 1, 2, "gos"), (1, 2, 2, 1, 8, "gmo"),
            (2, 2, 1, 2, 4, "gmos"), (1, 2, 1, 4, 8, "gmo"),
            (1, 2, 1, 2, 8, "gmosj"), (2, 2, 1, 2, 4, "gmosj"), (2, 2, 1, 2, 8, "gmosj"), (4, 2, 1, 2, 2, "gmosj"),
            (4, 2, 1, 2, 4, "gmosj"), (2, 1, 1, 2, 4, "gmosja"),
        ]
    if count <= 8:
        return [
            (2, 2, 1, 1, 1, "t"), (2, 2, 1, 1, 1, "ot"), (2, 2, 1, 1, 1, "go"), (2, 2, 1, 1, 1, "gost"),
            (2, 1, 2, 1, 1, "mot"), (2, 1, 2, 1, 1, "gmo"), (4, 1, 1, 1, 1, "os"), (4, 2, 1, 1, 1, "o"),
            (2, 2, 1, 2, 1, "ost"), (4, 1, 2, 1, 1, "mos"), (1, 2, 2, 4, 1, "mo"), (2, 1, 1, 2, 1, "mo"),
        ]
    if narrow:
        return [
            (4, 1, 2, 1, 1, "gm"), (4, 1, 2, 1, 1, "gmot"), (4, 2, 1, 1, 1, "gmo"), (8, 1, 2, 1, 1, "gmos"),
            (1, 2, 2, 1, 8, "gmot"), (1, 2, 2, 2, 8, "gmo"), (1, 1, 4, 1, 8, "gmo"), (2, 1, 2, 1, 4, "gmos"),
            (1, 1, 4, 2, 4, "gmo"), (1, 1, 2, 4, 8, "gmos"), (1, 2, 1, 2, 8, "gmo"),
            (2, 1, 2, 1, 4, "gmosj"), (1, 2, 2, 1, 8, "gmosj"), (4, 1, 2, 1, 2, "gmosj"), (4, 1, 2, 2, 2, "gmosj"),
            (4, 1, 2, 1, 4, "gmosj"), (2, 1, 2, 1, 4, "gmosja"),
        ]
    return [
        (2, 1, 2, 2, 1, "gm"), (2, 1, 2, 1, 1, "gmot"), (2, 1, 2, 1, 1, "mo"), (2, 1, 2, 2, 1, "gmot"),
        (2, 1, 2, 2, 1, "gmost"), (2, 1, 4, 1, 1, "gmot"), (1, 1, 4, 2, 1, "gmo"), (4, 1, 2, 1, 1, "gmos"),
        (2, 1, 2, 1, 1, "go"), (1, 1, 2, 4, 1, "gmost"), (2, 1, 4, 1, 2, "gmo"), (1, 2, 2, 2, 1, "gmo"),
    ]
    # fmt: on


def wgmma_cuts(n: int, count: int) -> list[dict[str, int]]:
    """Cuts of the wgmma kernel: the fastest so far, and what came close."""
    if count > 512:
        return [
            dict(tile_m=256, cluster=2, x_slots=4, word_slots=4),
            dict(tile_m=256, x_slots=4, word_slots=4),
            dict(tile_m=256, cluster=2, x_slots=5, word_slots=3),
        ]
    narrow = n <= 8192
    if count > 128:
        split = 4 if n <= 4096 else 2 if narrow else 1
        return [
            dict(tile_m=256, split=split, x_slots=4, word_slots=4),
            dict(tile_m=256, cluster=2, split=split, x_slots=4, word_slots=4),
            dict(tile_m=128, split=2 if n <= 4096 else 1, x_slots=6, word_slots=6),
        ]
    split = 4 if n <= 4096 else 2 if narrow else 1
    tall = dict(tile_m=64, tall=2, split=2 * split if narrow else 1, x_slots=8, word_slots=4)
    if count > 64:
        return [dict(tile_m=128, split=split, x_slots=6, word_slots=6), tall]
    return [dict(tile_m=64, split=split, x_slots=8, word_slots=8), tall]


def plain_cut(count: int, narrow: bool) -> dict[str, Any]:
    """One cut that serves every layout, to compare them."""
    if count <= 8:
        return dict(along_k=8 if narrow else 2, batch=2)
    return dict(along_k=4 if narrow else 2, tiles=2, zero="mma")


ODD = [
    # K, N, group, contract, M: sizes that pruning makes
    (4096, 18648, 128, "last", 1),
    (4096, 18648, 128, "last", 13),
    (4096, 9001, 128, "last", 7),
    (2240, 3584, 112, "first", 1),
    (2240, 3584, 112, "first", 9),
    (432, 576, 144, "first", 5),
    (9344, 4096, 128, "first", 3),
    (9344, 4096, 128, "first", 16),
]


def odd_sizes() -> list[dict]:
    """Rows that only say whether a kernel is right."""
    rows = []
    for k, n, group, contract, count in ODD:
        orders = [{}, dict(order=tiling_order(contract))] if group == 128 else [{}]
        for order in orders:
            make = functools.partial(task, k, n, group=group, contract=contract, **order)
            cut: dict[str, Any] = dict(along_k=2, tiles=2, split=2, ordered=bool(order))
            rows.append(make(count, "mma", **cut, zero="mma" if count > 8 else "fma"))
            rows.append(make(count, "mma", along_k=4, batch=2, gate=True))
            if order:
                joined: dict[str, Any] = dict(split=3, ordered=True, joined=True)
                rows.append(make(count, "mma", along_k=2, along_n=2, **joined, gate=True, ahead=True))
                rows.append(make(count, "mma", along_k=1, tiles=2, batch=2, **joined, stream=True))
            rows.append(make(33, "dot", tile_n=64, tile_m=32, warps=4, join=8, fold=True))
            rows.append(make(100, "dot", tile_n=128, tile_m=64, warps=8, split=2))
            rows += [make(each, "auto") for each in (count, 40, 700)]
            if order:
                rows.append(make(64, "dequantize"))
                rows.append(make(100, "wgmma", tile_m=64, tall=2, split=3, x_slots=8))
                rows.append(make(301, "wgmma", tile_m=256, cluster=2))
    rows = [row | {"check_only": True} for row in rows]
    return list({name(row): row for row in rows}.values())


def tiling_order(contract: str) -> str:
    """tiling.ORDERS, which the parent process does not import."""
    return {"last": "rows", "first": "groups"}[contract]


ROPE = ("copy", "gathered", "reference", "pallas")
"""Ways to turn q (32 heads) and k (8) of 4096 tokens; "copy" only moves as many bytes."""


ROPE_CUTS: tuple[dict[str, Any], ...] = (
    dict(elements=1024),
    dict(elements=4096, warps=8),
    dict(warps=8),
    dict(stream=True),
    dict(stream=True, warps=8),
    dict(stream=True, elements=1024),
    dict(shared=True),
    dict(shared=True, warps=8),
    dict(shared=True, stream=True),
    dict(shared=True, stream=True, warps=8),
    dict(shared=True, stream=True, elements=1024),
    dict(fast=False),
)
"""Other cuts of the kernel than its default."""


def rope_rows() -> list[dict]:
    """Rows whose k is the width of a head, n the heads of q and group those of k."""
    rows = []
    for width in (96, 128):
        make = functools.partial(task, width, 32, 4096, group=8, contract="-")
        rows += [make(f"rope {way}") for way in ROPE] + [make("rope pallas", **cut) for cut in ROPE_CUTS]
    return rows


def probes() -> list[dict]:
    """What a launch costs: chains of tiny dependent kernels, and of the addition that chains XLA's products (of a row,
    and of x where it is large); and whether each kernel passes its self-check from inside a trace, as in a model.
    """
    blank = dict(k=0, n=0, count=0, group=0, contract="", settings={})
    checks = [(kernel, order) for kernel in ("mma", "dot") for order in ("rows", "groups", "last", "first")]
    checks += [(kernel, order) for kernel in ("dequantize", "wgmma") for order in ("rows", "groups")]
    large = [dict(rows=count, width=width) for count in (256, 2048) for width in sorted({k for k, _ in SHAPES})]
    return [
        blank | {"kernel": "launch: pallas"},
        *(blank | {"kernel": "launch: xla add", "settings": of} for of in ({}, *large)),
        *(blank | {"kernel": f"self-check: {' '.join(each)}", "check_only": True} for each in checks),
    ]


# --- a worker -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pool:
    """Distinct random weights of one shape, made once: flat, since a reshape to either contract is free."""

    data: list[Any]
    scale: list[Any]
    dense: list[Any]


@functools.lru_cache(maxsize=1)
def pool(k: int, n: int, group: int, copies: int) -> Pool:
    """The last shape's weights are freed when the next shape's are made."""
    import jax
    import jax.numpy as jnp

    data, scale, dense = [], [], []
    for i in range(copies):
        keys = jax.random.split(jax.random.key(i), 2)
        words = -(-n // 16) * 16 * k // 8  # whole tiles
        data.append(jax.lax.bitcast_convert_type(jax.random.bits(keys[0], (words,), jnp.uint32), jnp.int32))
        scale.append(jax.random.uniform(keys[1], (n * k // group,), jnp.bfloat16, 0.01, 0.1))
    for i in range(max(2, -(-int(DISTINCT) // (2 * n * k)))):
        dense.append(jax.random.normal(jax.random.key(100 + i), (n * k,), jnp.bfloat16))
    return Pool(data, scale, dense)


def is_rope(row: dict) -> bool:
    """Whether the row is one of rope_rows."""
    return row["kernel"].startswith("rope ")


def copies_of(row: dict) -> int:
    """Distinct packed weights a chain needs."""
    if row.get("check_only"):
        return 1
    return max(2, -(-int(DISTINCT) // (row["n"] * row["k"] // 2)))


def floor_us(row: dict, bandwidth: float = BANDWIDTH) -> float:
    """Microseconds that reading the weight (for rope: reading and writing q and k) takes at a bandwidth."""
    if is_rope(row):
        return 2 * 2 * row["count"] * row["k"] * (row["n"] + row["group"]) / bandwidth * 1e6
    packed = row["n"] * row["k"] * (0.5 + 2 / row["group"])
    return (2 * row["n"] * row["k"] if row["kernel"] == "bf16" else packed) / bandwidth * 1e6


def multiply(row: dict, x: Any, data: Any, scale: Any, after: Any) -> Any:
    """One call of the row's kernel on flat weights: y [count, n] bf16."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.dequant_matmul import dequant_matmul, dequantize, dot, mma, pallas, plain, wgmma
    from pallas_kernels.dequant_matmul.tiling import Weight

    k, n, group, contract = row["k"], row["n"], row["group"], row["contract"]
    settings = dict(row["settings"])
    if row["kernel"] == "bf16":
        weight = data.reshape((n, k) if contract == "last" else (k, n))
        dims = (((1,), (1 if contract == "last" else 0,)), ((), ()))
        return jax.lax.dot_general(x, weight, dims, preferred_element_type=jnp.float32).astype(jnp.bfloat16)
    shapes = {"last": (n, k // 8), "first": (k // 8, n)}
    order = settings.pop("order", contract)
    shapes |= {"rows": (-(-n // 16), k // group, 2, 32, 4), "groups": (k // group, -(-n // 16), 2, 32, 4)}
    if order == contract and n % 16:
        data = data[: n * k // 8]
    data = data.reshape(shapes[order])
    if settings.pop("scale_tiles", False):
        scale = scale.reshape(n // 16, k // group, 16)
    else:
        scale = scale.reshape((n, k // group) if order in ("last", "rows") else (k // group, n))
    held = "plain" if order == contract else order
    if row["kernel"] == "mma":
        settings.pop("wide", None)
        weight = Weight(order, n, k // group, group)
        parts = mma.product(x, data, scale, weight=weight, settings=mma.Settings(**settings), after=after)
    elif row["kernel"] == "dot":
        weight = Weight(order, n, k // group, group)
        parts = dot.product(x, data, scale, weight=weight, settings=dot.Settings(**settings))
    elif row["kernel"] == "wgmma":
        weight = Weight(order, n, k // group, group)
        parts = wgmma.product(x, data, scale, weight=weight, settings=wgmma.Settings(**settings))
    elif row["kernel"] == "auto":
        run = functools.partial(dequant_matmul, bits=4, group=group, contract=contract, width=k, order=held)
        return run(x, data, scale, implementation="pallas")
    elif row["kernel"] in ("dequantize", "unpack"):
        weight, cut = Weight(order, n, k // group, group), dequantize.Settings(**settings)
        if row["kernel"] == "dequantize":
            return dequantize.product(x, data, scale, weight, cut)
        return dequantize.dense(data, scale, weight, cut)[:, :1].T
    else:
        held_as = plain.Weight(bits=4, group=group, contract=contract, width=k, order=held)
        return pallas.dense(x, data, scale, held_as)
    if parts.shape[0] > 1:
        parts = parts.sum(0, keepdims=True)
    return parts[0].astype(jnp.bfloat16)


def waits_by_operand(row: dict) -> bool:
    """Whether the kernel is all there is, so that an operand it does not read can chain it."""
    return row["kernel"] == "mma" and row["settings"].get("split", 1) == 1 and not row["settings"].get("ordered")


def chain(row: dict, length: int) -> Any:
    """The function that is timed: (x, weights, scales) -> the last product."""
    import jax
    import jax.numpy as jnp

    if row["kernel"].startswith("self-check: "):
        from pallas_kernels.dequant_matmul import selfcheck

        def checked(x: Any, data: Any, scale: Any) -> Any:
            selfcheck.verify(*row["kernel"].split()[1:])
            return x

        return checked

    if row["kernel"] == "launch: pallas":
        from pallas_kernels import compat

        def bump(x_ref: Any, out_ref: Any) -> None:
            out_ref[...] = x_ref[...] + 1

        one = jax.jit(
            compat.call(bump, name="bump", grid=(1,), out_shape=jax.ShapeDtypeStruct((128,), jnp.float32), warps=1)
        )
        return lambda x, data, scale: functools.reduce(lambda y, _: one(y), range(length), x)

    def tied(x: Any, y: Any) -> Any:
        # One kernel that neither side can absorb.
        return jax.lax.optimization_barrier(x + 0 * y[:, :1])

    if row["kernel"] == "launch: xla add":

        def adds(x: Any, data: Any, scale: Any) -> Any:
            for _ in range(length):
                x = tied(x, x)
            return x

        return adds

    if is_rope(row):
        return rope_chain(row, length)
    by_operand = waits_by_operand(row)
    # One trace and one lowering, whatever the length.
    one = jax.jit(functools.partial(multiply, row))

    def run(x: Any, data: Any, scale: Any) -> Any:
        y = jnp.zeros((row["count"], row["n"]), jnp.bfloat16)
        for i in range(length):
            if by_operand:
                y = one(x, data[i % len(data)], scale[i % len(data)], y)
                continue
            operands = x if i == 0 else tied(x, y), data[i % len(data)], scale[i % len(data)]
            # Or XLA would dequantize a weight once for all calls that use it.
            if row["kernel"] in ("dense", "auto", "dequantize", "unpack"):
                operands = jax.lax.optimization_barrier(operands)
            y = one(*operands, None)
        return y

    return run


@functools.lru_cache(maxsize=1)
def rope_arguments(width: int, heads: int, kv_heads: int, tokens: int) -> tuple[Any, list[Any], list[Any]]:
    """Positions, and five distinct q and k, which no cache holds together."""
    import jax
    import jax.numpy as jnp

    def draw(seed: int, count: int) -> Any:
        return jax.random.normal(jax.random.key(seed), (1, tokens, width // 2, 2, count), jnp.bfloat16)

    positions = jnp.arange(tokens, dtype=jnp.int32)[None]
    return positions, [draw(i, heads) for i in range(5)], [draw(9 + i, kv_heads) for i in range(5)]


def turn(row: dict) -> Any:
    """One rotation: (q, k, positions) -> (q, k), [1, tokens, pairs, 2, heads].

    "gathered" has what is usual instead: [1, tokens, heads, 2, pairs], and rows of two tables of cosines and sines,
    whose columns are then picked for each head, since pruning keeps other pairs in each.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.rope import pallas, rope_qk

    pairs, kv_heads, way = row["k"] // 2, row["group"], row["kernel"].removeprefix("rope ")
    base = 500000.0 ** (-np.arange(pairs) / pairs)
    order = np.stack([np.random.default_rng(head).permutation(pairs) for head in range(kv_heads)], axis=1)
    inv_freq = jnp.asarray(base[order], jnp.float32)
    if way == "copy":
        return lambda q, k, positions: (q + 1, k + 1)
    if row["settings"]:
        cut = pallas.Settings(**row["settings"])
        return lambda q, k, positions: pallas.rope_qk(q, k, positions, inv_freq, cut)
    if way != "gathered":
        return lambda q, k, positions: rope_qk(q, k, positions, inv_freq, implementation=way)
    angles = np.arange(row["count"])[:, None] * base
    cos_table, sin_table = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    columns = jnp.asarray(order.T)  # [kv_heads, pairs]

    def one(x: Any, positions: Any) -> Any:
        cos, sin = (table[positions][..., columns][:, :, :, None] for table in (cos_table, sin_table))
        share = x.reshape(*x.shape[:2], kv_heads, -1, 2, pairs).astype(jnp.float32)
        first, second = share[..., 0, :], share[..., 1, :]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
        return turned.astype(x.dtype).reshape(x.shape)

    def gathered(q: Any, k: Any, positions: Any) -> Any:
        positions = jax.lax.optimization_barrier(positions)  # or every call would share one gather
        return one(q, positions), one(k, positions)

    return gathered


def as_rows(row: dict, x: Any) -> Any:
    """[1, tokens, pairs, 2, heads] in the layout that the row turns: for "gathered" a new view of the same bytes."""
    if row["kernel"] != "rope gathered":
        return x
    return x.reshape(*x.shape[:2], x.shape[4], 2, x.shape[2])


def rope_chain(row: dict, length: int) -> Any:
    """Turns five distinct q and k, one after another, again and again."""
    import jax

    one = jax.jit(turn(row))

    def run(positions: Any, qs: Any, ks: Any) -> Any:
        qs, ks = [as_rows(row, q) for q in qs], [as_rows(row, k) for k in ks]
        before = qs[-1]
        for i in range(length):
            # Only an order, no kernel: or XLA might turn several at once.
            q, k, _ = jax.lax.optimization_barrier((qs[i % 5], ks[i % 5], before))
            qs[i % 5], ks[i % 5] = one(q, k, positions)
            before = qs[i % 5]
        return qs, ks  # all of them, or XLA would leave out what nobody asks for

    return run


def check_rope(row: dict) -> float:
    """Relative error of both arrays of one rotation against float64, on some tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    positions, qs, ks = rope_arguments(row["k"], row["n"], row["group"], row["count"])
    pairs, sample = row["k"] // 2, [0, 1, row["count"] // 3, row["count"] - 1]
    base = 500000.0 ** (-np.arange(pairs) / pairs)
    order = np.stack([np.random.default_rng(head).permutation(pairs) for head in range(row["group"])], axis=1)
    worst = 0.0
    q, k = as_rows(row, qs[0]), as_rows(row, ks[0])
    for x, y in zip((q, k), jax.jit(turn(row))(q, k, positions), strict=True):
        x, y = (np.asarray(v[0, jnp.asarray(sample)], np.float64) for v in (x, y))
        if row["kernel"] == "rope gathered":  # [token, head, 2, pair] -> [token, pair, 2, head]
            x, y = (np.moveaxis(v, 1, 3).swapaxes(1, 2) for v in (x, y))
        share = x.shape[-1] // row["group"]
        frequency = base.astype(np.float32)[order][:, np.arange(x.shape[-1]) // share]
        angle = np.asarray(sample, np.float64)[:, None, None] * frequency
        turned = (x[:, :, 0] + 1j * x[:, :, 1]) * np.exp(1j * angle)
        got = y[:, :, 0] + 1j * y[:, :, 1]
        worst = max(worst, float(np.linalg.norm(got - turned) / np.linalg.norm(turned)))
    return worst


def check(row: dict, y: Any, x: Any, data: Any, scale: Any) -> float:
    """Relative error of a sample of outputs against float64 of the dequantized weights."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.dequant_matmul import tiling
    from pallas_kernels.packing import SHIFTS

    k, n, group, contract = row["k"], row["n"], row["group"], row["contract"]
    order = row["settings"].get("order", contract)
    if order in ("rows", "groups"):
        of_rows = -(-n // 16)
        tiles = data.reshape((of_rows, k // group, 2, 32, 4) if order == "rows" else (k // group, of_rows, 2, 32, 4))
        data = tiling.untile(tiles, contract, n)
    else:
        data = data[: n * k // 8].reshape((n, k // 8) if contract == "last" else (k // 8, n))
    data = data if contract == "last" else data.T
    if row["settings"].get("scale_tiles"):
        scale = scale.reshape(-1, k // group, 16).swapaxes(1, 2)
    scale = scale.reshape(n, k // group) if contract == "last" else scale.reshape(k // group, n).T
    generator = np.random.default_rng(0)
    sample = np.unique(np.concatenate([np.arange(40), np.arange(n - 40, n), generator.integers(0, n, 100)]))
    words, scales = np.asarray(data[jnp.asarray(sample)]), np.asarray(scale[jnp.asarray(sample)], np.float64)
    codes = ((words[:, :, None] >> np.asarray(SHIFTS, np.int32)) & 15).reshape(len(sample), k) - 8
    if x.dtype == jnp.int32:
        x = jax.lax.bitcast_convert_type(x, jnp.bfloat16).reshape(row["count"], k)
    want = np.asarray(x, np.float64) @ (codes * np.repeat(scales, group, axis=1)).T
    got = np.asarray(y[:, jnp.asarray(sample)], np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def clock(call: Any, args: tuple[Any, ...], repeats: int) -> float:
    """Median seconds of one execution, several in flight so that the host keeps ahead."""
    import jax

    for _ in range(3):
        jax.block_until_ready(call(*args))
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    several = max(2, min(20, int(6e-3 / (time.perf_counter() - start))))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(several):
            out = call(*args)
        jax.block_until_ready(out)
        taken.append((time.perf_counter() - start) / several)
    return statistics.median(taken)


def copy_speed() -> float:
    """Bytes a second that an addition of one reads and writes, over 2 GiB."""
    import jax
    import jax.numpy as jnp

    big = jnp.zeros((2**29,), jnp.int32)
    return 2 * big.nbytes / clock(jax.jit(lambda x: x + 1), (big,), 5)


def arguments(row: dict) -> tuple[Any, ...]:
    """x and the weights of a row."""
    import jax
    import jax.numpy as jnp

    if row["kernel"] == "launch: pallas" or row["kernel"].startswith("self-check"):
        return jnp.zeros((128,), jnp.float32), None, None
    if row["kernel"] == "launch: xla add":
        of = dict(rows=1, width=4096) | row["settings"]
        return jnp.zeros((of["rows"], of["width"]), jnp.bfloat16), None, None
    if is_rope(row):
        return rope_arguments(row["k"], row["n"], row["group"], row["count"])
    held = pool(row["k"], row["n"], row["group"], copies_of(row))
    x = jax.random.normal(jax.random.key(7), (row["count"], row["k"]), jnp.bfloat16)
    if row["settings"].get("wide"):
        x = jax.lax.bitcast_convert_type(x.reshape(row["count"], -1, 2), jnp.int32)
    weights = held.dense if row["kernel"] == "bf16" else held.data
    return x, weights, held.scale


def length_of(row: dict) -> int:
    """Calls in a chain: about 1.5 ms, so that the host's part hides."""
    if not row["k"]:
        return 200
    if row.get("check_only"):
        return 1
    if is_rope(row):
        return 40
    compute = 2 * row["count"] * row["n"] * row["k"] / 5e8
    return int(max(6, min(120, 1500 / (1.3 * floor_us(row) + 2 + compute))))


def work(tasks: list[dict], threads: int, quick: bool, say: Any) -> None:
    """Compile all rows of a shape and M on several threads, then time them one by one."""
    import jax

    shapes: dict[Any, list[dict]] = {}
    for row in tasks:
        counts = 0 if row.get("check_only") else row["count"]
        shapes.setdefault((row["k"], row["n"], row["group"], counts), []).append(row)

    def compiled(row: dict) -> Any:
        say({"start": name(row)})
        args = arguments(row)
        start = time.perf_counter()
        try:
            return jax.jit(chain(row, length_of(row))).lower(*args).compile(), time.perf_counter() - start
        except Exception as error:
            return error, 0.0

    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
        for rows in shapes.values():
            arguments(rows[0])  # makes the weights, once
            # All of them before the first is timed: threads that trace would hold up the one that launches.
            calls = list(executor.map(compiled, rows))
            for row, (call, seconds) in zip(rows, calls, strict=True):
                row = row | {"compile_s": seconds}
                try:
                    if isinstance(call, Exception):
                        raise call
                    args = arguments(row)
                    y = call(*args)
                    if row["kernel"].startswith("self-check"):
                        row["error"] = 0.0  # its trace went through
                    elif is_rope(row):
                        row["error"] = 0.0 if row["kernel"] == "rope copy" else check_rope(row)
                    elif row["k"] and row["kernel"] not in ("bf16", "unpack"):
                        last = (length_of(row) - 1) % len(args[1])
                        row["error"] = check(row, y, args[0], args[1][last], args[2][last])
                    if not row.get("check_only"):
                        row["us"] = clock(call, args, 5 if quick else 9) * 1e6 / length_of(row)
                    row["adds"] = bool(row["k"]) and not waits_by_operand(row) and not is_rope(row)
                except Exception as error:
                    text = str(error).strip() or type(error).__name__
                    row["failed"] = f"{type(error).__name__}: {text.splitlines()[0][:300]}"
                    row["trace"] = "".join(traceback.format_exception(error))[-3000:]
                say({"row": row})
            del calls


def worker(path: str, threads: int, quick: bool) -> None:
    """Rows from a file of tasks, to stdout as lines of JSON."""
    lock = threading.Lock()

    def say(message: dict) -> None:
        with lock:
            print("@" + json.dumps(message), flush=True)

    import warnings

    warnings.simplefilter("ignore")
    from benchmarks.record import environment

    say({"environment": environment() | {"copy_bytes_per_s": copy_speed()}})
    work(json.loads(Path(path).read_text()), threads, quick, say)


# --- the parent -----------------------------------------------------------------------------------------------------


def supervise(tasks: list[dict], quick: bool, deadline: float, report: Any) -> tuple[list[dict], dict]:
    """Run workers until every task has its row, or time is up; whatever was in flight when one died fails alone."""
    done: list[dict] = []
    environment: dict = {}
    threads, left = 8, list(tasks)
    while left and time.time() < deadline:
        path = Path(tempfile.gettempdir()) / f"kernel-tasks-{os.getpid()}.json"
        path.write_text(json.dumps(left))
        command = [sys.executable, __file__, "--worker", str(path), "--threads", str(threads)]
        child = subprocess.Popen(
            command + (["--quick"] if quick else []), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        errors: list[str] = []

        def read(pipe: Any = child.stdout, into: Any = lines) -> None:
            for line in pipe:
                into.put(line)
            into.put(None)

        threading.Thread(target=read, daemon=True).start()
        threading.Thread(target=lambda pipe=child.stderr, e=errors: e.extend(pipe), daemon=True).start()
        begun: list[str] = []
        hung = False
        while True:
            try:
                line = lines.get(timeout=min(PATIENCE, max(1.0, deadline - time.time())))
            except queue.Empty:
                hung = True
                child.kill()
                break
            if line is None:
                break
            if not line.startswith("@"):
                continue
            message = json.loads(line[1:])
            if "start" in message:
                begun.append(message["start"])
            elif "row" in message:
                done.append(message["row"])
                report(message["row"])
            else:
                environment = message["environment"]
            if time.time() > deadline:
                child.kill()
                break
        child.wait()
        finished = {name(row) for row in done}
        left = [row for row in left if name(row) not in finished]
        if not left or time.time() > deadline or (not begun and threads == 1):
            if child.returncode and left:
                print("".join(errors[-15:]), file=sys.stderr)
            break
        suspects = [row for row in left if name(row) in begun]
        why = "hung" if hung else f"worker died ({child.returncode}): {''.join(errors[-3:])[-300:]}"
        if len(suspects) == 1 or (threads == 1 and suspects):
            row = suspects[0] | {"failed": why}
            done.append(row)
            report(row)
            left = [other for other in left if name(other) != name(row)]
        # Several were in flight: one thread tells them apart.
        threads = 1 if len(suspects) > 1 else 4
    return done, environment


def torch_worker() -> None:
    """PyTorch's own 4-bit product (what torchao runs) over distinct weights in a CUDA graph, to stdout as JSON."""
    import torch

    for k, n in SHAPES:
        copies = copies_of(task(k, n, 1, "torch int4"))
        weights = []
        for _ in range(copies):
            nibbles = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
            packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
            scales = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
            weights.append((packed, scales))
        for count in (1, 8, 16, 64):
            x = torch.randn(count, k, dtype=torch.bfloat16, device="cuda")

            def calls(x: Any = x, weights: Any = weights) -> None:
                for packed, scales in weights:
                    torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)

            calls()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                calls()
            taken = []
            for _ in range(12):
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end) * 1e3 / copies)
            row = task(k, n, count, "torch int4") | dict(us=statistics.median(taken[3:]), torch=torch.__version__)
            print("@" + json.dumps(row), flush=True)


def torch_rows(seconds: float, report: Any) -> list[dict]:
    """Rows of PyTorch's kernel; none, and a word why, where it is missing or does not run."""
    if importlib.util.find_spec("torch") is None:
        print("no torch here: its rows are left out", flush=True)
        return []
    command = [sys.executable, __file__, "--torch"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(10.0, seconds), check=False)
    except subprocess.TimeoutExpired:
        print("torch took too long: its rows are left out", flush=True)
        return []
    rows = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    if done.returncode:
        print(f"torch stopped: {done.stderr.strip().splitlines()[-1:]}", flush=True)
    for row in rows:
        report(row)
    return rows


def summarize(rows: list[dict], bandwidth: float) -> list[str]:
    """Best variant of each shape and M beside bf16, fractions of the floor, and what failed."""
    probe = [row for row in rows if not row["k"] and "us" in row]
    adds = {tuple(row["settings"].values()): row["us"] for row in probe if row["kernel"] == "launch: xla add"}
    for row in rows:
        if "us" in row and row["k"]:
            add = adds.get((row["count"], row["k"]), adds.get((), 0.0))
            row["net_us"] = row["us"] - (add if row.get("adds") else 0.0)
    lines = []
    for row in probe:
        size = " x ".join(map(str, row["settings"].values()))
        lines.append(f"{row['kernel']} {size}".ljust(30) + f"{row['us']:7.2f} us")
    lines.append(f"{'copy':30s}{bandwidth / 1e12:7.2f} TB/s: the floor")
    timed = [row for row in rows if "net_us" in row]
    lines.append("K x N            M   bf16 us  best us  times  floor%  contract order  best variant")
    for key in dict.fromkeys((row["k"], row["n"], row["count"]) for row in timed if not is_rope(row)):
        of_key = [row for row in timed if (row["k"], row["n"], row["count"]) == key]
        base = min((row["net_us"] for row in of_key if row["kernel"] == "bf16"), default=float("nan"))
        ours = [row for row in of_key if row["kernel"] not in PEERS and row.get("error", 1) < 4e-3]
        peer = min((row["net_us"] for row in of_key if row["kernel"] == "torch int4"), default=None)
        if peer is not None:
            lines.append(f"{key[0]}x{key[1]:<8d} {key[2]:4d} {base:9.2f} {peer:8.2f} {base / peer:5.2f}x  torch int4")
        for plain in (True, False):
            some = [row for row in ours if ("order" not in row["settings"]) == plain]
            if not some:
                continue
            best = min(some, key=lambda row: row["net_us"])
            share = 100 * floor_us(best, bandwidth) / best["net_us"]
            ratio = base / best["net_us"]
            shape = f"{key[0]}x{key[1]}"
            layout = best["settings"].get("order", best["contract"])
            lines.append(
                f"{shape:13s} {key[2]:4d} {base:9.2f} {best['net_us']:8.2f} {ratio:5.2f}x {share:6.1f}%  {layout:7s} "
                f"{best['kernel']} {' '.join(f'{k}={v}' for k, v in best['settings'].items())}"
            )
    for row in timed:
        if is_rope(row):
            share = 100 * floor_us(row, bandwidth) / row["us"]
            cut = " ".join(f"{key}={value}" for key, value in row["settings"].items())
            text = f"{row['kernel']:15s} {row['us']:8.2f} us {share:5.1f}% of the floor {cut}"
            lines.append(f"head of {row['k']:3d} {text}")
    wrong = [row for row in rows if row.get("error", 0) >= 4e-3]
    right = [row for row in rows if row.get("check_only") and row.get("error", 1) < 4e-3]
    lines.append(f"self-checks and odd sizes right: {len(right)} of {sum(bool(row.get('check_only')) for row in rows)}")
    lines += [f"WRONG {row['error']:.3g} {name(row)}" for row in wrong[:12]]
    failed = [row for row in rows if "failed" in row]
    lines += [f"FAILED {name(row)}: {row['failed'][:160]}" for row in failed[:12]]
    return lines


def write_tuned(rows: list[dict], environment: dict, folder: Path) -> Path:
    """The fastest right variant of each order, shape and M, as tuned.py reads it, and where it was measured; of wgmma,
    which a GPU may lack, and of the others one each, the faster first.
    """
    from pallas_kernels.dequant_matmul import tuned

    best: dict[Any, dict] = {}
    for row in rows:
        # What was given x in a form that the product does not get it in says nothing about the product.
        if row["kernel"] in tuned.SETTINGS and not {"wide", "scale_tiles"} & set(row["settings"]):
            key = row["settings"].get("order", row["contract"]), row["k"], row["n"], row["count"]
            key = *key, row["kernel"] == "wgmma"
            if "net_us" in row and row.get("error", 1) < 4e-3 and row["net_us"] < best.get(key, row)["net_us"] + 1e-9:
                best[key] = row
    found = []
    for (order, k, n, count, _), row in sorted(best.items(), key=lambda item: (*item[0][:4], item[1]["net_us"])):
        settings = {key: value for key, value in row["settings"].items() if key != "order"}
        us = round(row["net_us"], 2)
        found.append(dict(order=order, k=k, n=n, count=count, kernel=row["kernel"], settings=settings, us=us))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{tuned.slug(environment['device'])}.json"
    versions = {name: environment["versions"][name] for name in ("jax", "jaxlib")}
    head = dict(gpu=environment["device"], versions=versions, date=environment["date"], command=environment["command"])
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    text = ",\n".join("    " + json.dumps(row) for row in found)
    path.write_text("\n".join(["{", *lines, '  "rows": [', text, "  ]", "}"]) + "\n")
    return path


def main() -> None:
    """Parse, run, print the table last, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name has each of these words")
    parser.add_argument("--kernels", nargs="+", default=[], help="rows of these kernels alone: bf16, wgmma, auto, ...")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tune", type=Path, metavar="FOLDER", help="write the table of fastest variants here")
    parser.add_argument("--record", type=Path, metavar="JSON", help="measure nothing; --tune from what this holds")
    parser.add_argument("--minutes", type=float, default=5.5, help="stop after so long, with what there is")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=8, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch:
        torch_worker()
        return
    if args.worker:
        worker(args.worker, args.threads, args.quick)
        return
    if args.record:
        record = json.loads(args.record.read_text())
        print(write_tuned(record["rows"], record["environment"], args.tune or args.record.parent))
        return
    tasks = probes() + rope_rows() + odd_sizes()
    for count in COUNTS:
        for k, n in SHAPES:
            tasks += baselines(k, n, count) + candidates(k, n, count)
    tasks = [row for row in tasks if not row["k"] or all(word in name(row).split(" ") for word in args.only)]
    tasks = [row for row in tasks if not row["k"] or not args.kernels or row["kernel"] in args.kernels]
    print(f"{len(tasks)} rows", flush=True)

    def report(row: dict) -> None:
        said = row.get("failed") or " ".join(
            f"{key} {row[key]:.3g}" for key in ("us", "error", "compile_s") if row.get(key) is not None
        )
        print(f"{name(row)}: {said[:200]}", flush=True)

    deadline = time.time() + 60 * args.minutes
    rows, environment = supervise(tasks, args.quick, deadline, report)
    if not (args.only or args.kernels) and time.time() < deadline:
        rows += torch_rows(deadline - time.time(), report)
    table = summarize(rows, environment.get("copy_bytes_per_s", BANDWIDTH))
    environment["command"] = " ".join(["python", *(Path(word).name if "/" in word else word for word in sys.argv)])
    if args.tune and "device" in environment:
        write_tuned(rows, environment, args.tune)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": environment, "table": table, "rows": rows}, indent=1) + "\n")
    print("\n".join(table), flush=True)


if __name__ == "__main__":
    main()
