"""Which kernels `kernels.py` times: rows of shape, M, kernel and settings; what a row weighs, and how it is called."""

from __future__ import annotations

import functools
import importlib.util
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
COUNTS = (16, 8, 64, 1, 256, 128, 2048, 32, 4)
"""Rows of x, in the order of their urgency: time may run out."""
GROUP = 128
DISTINCT = 190e6
"""Bytes of distinct weights in a chain."""


def task(k: int, n: int, count: int, kernel: str, group: int = GROUP, contract: str = "", **settings: Any) -> dict:
    """One row to come."""
    contract = contract or SHAPES[k, n]
    return dict(k=k, n=n, count=count, kernel=kernel, group=group, contract=contract, settings=settings)


PEERS = ("bf16", "torch int4")
"""Kernels that are compared with."""
NEIGHBOUR = task(4096, 4096, 1, "mma", order="groups", along_k=16, batch=1, tiles=1, gate=True)
"""What a probe chains both ways, to measure what an addition costs next to it."""


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
            rows.append(make("mma", **settings))
        if count == 16 and not narrow:
            rows += [make("dot", tile_n=128, tile_m=16, warps=4, stages=4, split=1, join=join) for join in (4, 8)]
        rows += [make("cluster", **cut) for cut in cluster_cuts(n, count)]
        rows.append(task(k, n, count, "mma", gate=True, **plain_cut(count, narrow)))
    elif count <= 128:
        split = 8 if k > 8192 else 4 if narrow else 1
        tile_m = min(count, 128)
        for tile_n, warps, fold in ((128, 8, True), (64, 4, False)):
            cut = dict(tile_n=tile_n, tile_m=tile_m, warps=warps, stages=3, split=split, join=8)
            rows.append(make("dot", **cut, **(dict(fold=True) if fold else {})))
        rows.append(task(k, n, count, "dot", tile_n=128, tile_m=tile_m, warps=8, stages=3, split=split, join=8))
        rows += [make("wgmma", **cut) for cut in wgmma_cuts(n, count)]
        rows += [make("cluster", **cut) for cut in cluster_cuts(n, count)] if count <= 64 and narrow else []
    else:
        # 256 rows of x at once, so that a weight is unpacked once; registers then hold folded sums alone.
        split = (4 if k > 8192 else 2 if narrow else 1) if count <= 512 else 1
        cut = dict(tile_n=128, tile_m=256, warps=8, stages=3, join=4, split=split)
        rows.append(make("dot", **cut, fold=True, rows_inner=True))
        rows.append(make("dequantize", groups=4, warps=4))
        rows += [make("wgmma", **cut) for cut in wgmma_cuts(n, count)]
        rows.append(task(k, n, count, "dense"))
    plain = [task(k, n, count, "auto")] if count in (1, 64) else []
    return [*rows, *plain, *jax_triton_cuts(k, n, count), make("auto")]


def jax_triton_cuts(k: int, n: int, count: int) -> list[dict]:
    """The kernels that are launched through jax-triton, of plain layouts: by rule, and cut otherwise."""
    if count > 256 or importlib.util.find_spec("jax_triton") is None:
        return []
    cuts: list[dict[str, Any]] = [{}]
    m = 1 << (count - 1).bit_length()
    if count > 4:
        m = min(max(8, m), 64)
        cuts += [dict(n=32, m=m, k=128, split=2), dict(n=128, m=m, k=64, split=1, warps=8)]
    elif SHAPES[k, n] == "first":
        cuts += [dict(n=64, m=m, k=256, split=8), dict(n=32, m=m, k=512, split=4, warps=8)]
    else:
        cuts += [dict(n=16, m=m, k=1024), dict(n=4, m=m, k=1024, warps=1), dict(n=8, m=m, k=2048, warps=8)]
    return [task(k, n, count, "jax-triton") | {"settings": cut} for cut in cuts]


Cut = tuple[int, int, int, int, int, str]
"""along_k, batch, tiles, along_n, split, and letters: g gate, m zero="mma", o ordered, s stream."""


def few_rows_cuts(count: int, narrow: bool) -> list[Cut]:
    """Cuts of the mma kernel. The first of each list was the fastest so far."""
    # fmt: off
    if count == 1 and narrow:
        return [(8, 2, 1, 1, 1, "g"), (16, 1, 1, 1, 1, "g"), (8, 2, 1, 1, 1, "gs"), (2, 2, 1, 1, 8, "gs")]
    if count == 1:
        return [(2, 2, 1, 1, 1, "s"), (4, 1, 1, 1, 1, "g"), (4, 2, 1, 1, 1, "g"), (2, 2, 1, 1, 1, "")]
    if count <= 8 and narrow:
        return [(8, 2, 1, 1, 1, "g"), (16, 1, 1, 1, 1, "g"), (1, 2, 1, 4, 8, "gmo"), (2, 2, 1, 2, 4, "gmos")]
    if count <= 8:
        return [(2, 2, 1, 2, 1, "os"), (4, 2, 1, 1, 1, "o"), (4, 1, 2, 1, 1, "mos"), (2, 2, 1, 2, 1, "s")]
    if narrow:
        return [(8, 1, 2, 1, 1, "gmos"), (4, 1, 2, 2, 2, "gmos")]
    return [(2, 1, 2, 2, 1, "gmos"), (4, 1, 2, 1, 1, "gmos")]
    # fmt: on


def wgmma_cuts(n: int, count: int) -> list[dict[str, Any]]:
    """Cuts of the wgmma kernel: the fastest so far, and what came close."""
    wide = dict(tile_m=256, x_slots=4, word_slots=4)
    if count > 512:
        return [wide | dict(cluster=2), wide]
    narrow = n <= 8192
    split = 4 if n <= 4096 else 2 if narrow else 1
    if count > 128:
        cuts = [wide | dict(split=split), dict(tile_m=128, split=split // 2 or 1, x_slots=6, word_slots=6)]
        return [*cuts, dict(tile_m=128, x_slots=4, word_slots=4, **joined(2)) if narrow else wide | dict(cluster=2)]
    tile = dict(tile_m=64 if count <= 64 else 128)
    if not narrow:
        if count > 64:
            return [tile | dict(x_slots=6, word_slots=6), tile | dict(x_slots=4, word_slots=4, consumers=4)]
        return [
            tile | dict(x_slots=8, word_slots=8),
            tile | dict(tall=2, x_slots=8, word_slots=4),
            tile | dict(x_slots=8, word_slots=6, consumers=4),
        ]
    deep = 8 if count <= 64 else 6
    cuts = [
        tile | dict(split=split, x_slots=deep, word_slots=deep),
        tile | dict(x_slots=4, word_slots=4, **joined(2)),
        tile | dict(x_slots=8, word_slots=4, consumers=2, along_k=2, **joined(2)),
    ]
    if count <= 64:
        cuts.append(tile | dict(x_slots=4, word_slots=3, **joined(2)))
        cuts.append(tile | dict(x_slots=8, word_slots=6, consumers=4, split=2 * split))
        cuts.append(tile | dict(x_slots=8, word_slots=4, consumers=4, along_k=2, **joined(2)))
    return cuts


def joined(programs: int) -> dict[str, Any]:
    """Settings of programs that share a contraction and add up themselves."""
    return dict(split=programs, joined=True)


def cluster_cuts(n: int, count: int) -> list[dict[str, Any]]:
    """Cuts of the kernel whose clusters share a contraction: none for one row, which mma serves better."""
    if count > 16:
        return [dict(along_k=2, slots=4, folded=True), dict(along_k=2, slots=6, folded=True)]
    if count == 1:
        return []
    if n > 8192:
        return [dict(cluster=4, tall=3, slots=8), dict(cluster=4, tall=2, slots=8), dict(tall=2, slots=8)]
    return [
        dict(slots=8),
        dict(slots=8, folded=True),
        dict(tall=2, slots=8),
        dict(tall=2, slots=8, folded=True),
        dict(cluster=4, tall=2, along_k=2, along_n=2, slots=4),
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
        orders = [{}, dict(order=tiling_layout(contract))] if group == 128 else [{}]
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
                rows.append(make(100, "wgmma", tile_m=64, x_slots=8, consumers=4, along_k=2, **joined(4)))
                rows.append(make(count, "cluster"))
                rows.append(make(40, "cluster", cluster=4, along_k=2, slots=4, folded=True))
    rows = [row | {"check_only": True} for row in rows]
    return list({name(row): row for row in rows}.values())


def tiling_layout(contract: str) -> str:
    """tiling.LAYOUTS, which the parent process does not import."""
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
    """What a launch costs: chains of tiny dependent kernels, of the addition that chains XLA's products (of a row, and
    of x where it is large), and of one kernel with and without it; and whether each kernel passes its self-check from
    inside a trace, as in a model.
    """
    blank = dict(k=0, n=0, count=0, group=0, contract="", settings={})
    checks = [(kernel, order) for kernel in ("mma", "dot") for order in ("rows", "groups", "last", "first")]
    checks += [(kernel, order) for kernel in ("dequantize", "cluster", "wgmma") for order in ("rows", "groups")]
    large = [dict(rows=count, width=width) for count in (256, 2048) for width in sorted({k for k, _ in SHAPES})]
    return [
        blank | {"kernel": "launch: pallas"},
        *(blank | {"kernel": "launch: xla add", "settings": of} for of in ({}, *large)),
        *(blank | {"kernel": "launch: mma", "settings": dict(by=by)} for by in ("operand", "add")),
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
