"""Which kernels `kernels.py` times: rows of shape, M, kernel and settings; what a row weighs, and how it is called."""

from __future__ import annotations

import functools
from typing import Any

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
        for cut in few_rows_cuts(count, narrow):
            along_k, batch, r, along_n, split, options = cut
            settings: dict[str, Any] = dict(along_k=along_k, batch=batch, tiles=r)
            settings |= dict(along_n=along_n) if along_n > 1 else {}
            settings |= dict(split=split) if split > 1 else {}
            settings |= dict(gate=True) if "g" in options else {}
            settings |= dict(zero="mma") if "m" in options else {}
            settings |= dict(ordered=True) if "o" in options else {}
            settings |= dict(stream=True) if "s" in options else {}
            settings |= dict(ahead=True) if "a" in options else {}
            rows.append(make("mma", **settings))
            if tiles == "rows" and "t" in options:
                rows.append(make("mma", **settings, scale_tiles=True))
        if count == 16:
            for join in (4, 8):
                split = 8 if k > 8192 else 4 if narrow else 1
                rows.append(make("dot", tile_n=128, tile_m=16, warps=4, stages=4, split=split, join=join))
        rows += [make("wgmma", **cut) for cut in wgmma_cuts(n, count)] if narrow and count > 1 else []
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
"""along_k, batch, tiles, along_n, split, and letters: g gate, m zero="mma", o ordered, s stream, a ahead; t asks for
the same once more with the scales of a tile side by side."""


def few_rows_cuts(count: int, narrow: bool) -> list[Cut]:
    """Cuts of the mma kernel. The first of each list was the fastest so far."""
    # fmt: off
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
            (2, 2, 1, 2, 4, "gmos"), (1, 2, 1, 4, 8, "gmo"), (8, 1, 1, 2, 1, "gmosa"),
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
            (1, 1, 4, 2, 4, "gmo"), (1, 1, 2, 4, 8, "gmos"), (1, 2, 1, 2, 8, "gmo"), (4, 1, 2, 2, 2, "gmos"),
            (16, 1, 2, 1, 1, "gmosa"),
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
    if count <= 16:
        tile = 8 if count <= 8 else 16
        deep = dict(tile_m=tile, x_slots=16, word_slots=8)
        return [
            dict(tile_m=tile, tall=2, split=8, x_slots=8, word_slots=7),
            deep | dict(consumers=4, split=8),
            deep | dict(consumers=4, split=8, exchange=False),
            deep | dict(consumers=3, split=6),
            dict(tile_m=tile, consumers=3, tall=2, split=12, x_slots=12, word_slots=6),
            dict(tile_m=tile, consumers=4, tall=2, split=16, x_slots=12, word_slots=5),
        ]
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
    return [
        dict(tile_m=64, split=split, x_slots=8, word_slots=8),
        tall,
        dict(tile_m=64, consumers=4, split=split, x_slots=8, word_slots=6),
        dict(tile_m=64, consumers=4, split=2 * split, x_slots=8, word_slots=6),
        dict(tile_m=64, consumers=3, split=3 * split // 2, x_slots=8, word_slots=6),
    ]


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
    dict(shared=True),
    dict(shared=True, warps=8),
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
