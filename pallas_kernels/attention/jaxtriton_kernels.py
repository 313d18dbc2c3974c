"""The kernel of jaxtriton.py in Triton's own language; imported where Triton is installed and a GPU computes.

Sizes are arguments, so that one compiled kernel serves every pruned head. `no_type_check`: see
dequant_matmul/jaxtriton_kernels.py.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""Score of what is not seen: finite, so that differences are."""


@triton.jit
@no_type_check
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    start_ptr,
    slot_ptr,
    slots,
    groups,
    share,
    width,
    ranks,
    found_ptr,
    top_ptr,
    total_ptr,
    EIGHT: tl.constexpr,
    STARTS: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH_ALIGNED: tl.constexpr,
    RANKS_ALIGNED: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """found [rows, groups, SPLIT, share, ranks], top and total [rows, groups, SPLIT, share]: a program takes every
    SPLIT-th tile of T slots of one key/value head, with a running maximum and sum.

    WIDTH_ALIGNED and RANKS_ALIGNED divide `width` and `ranks`. EIGHT: keys and values are int8 with scales. STARTS:
    rows begin at slots of their own.
    """
    width, ranks = width // WIDTH_ALIGNED * WIDTH_ALIGNED, ranks // RANKS_ALIGNED * RANKS_ALIGNED
    row, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m, d, r = tl.arange(0, M), tl.arange(0, D), tl.arange(0, R)
    m_in, d_in, r_in = m < share, d < width, r < ranks
    slot, start = tl.load(slot_ptr), 0
    if STARTS:
        start = tl.load(start_ptr + row)
    head = (row * groups + group) * share + m
    q = tl.load(q_ptr + head[:, None] * width + d[None, :], mask=m_in[:, None] & d_in[None, :], other=0.0)
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    found = tl.zeros([M, R], tl.float32)
    first = start // T
    for tile in range(first + part, slot // T + 1, SPLIT):
        t = tile * T + tl.arange(0, T)
        seen = (t >= start) & (t <= slot)
        place = (row * slots + t) * groups + group
        # What lies where no token is is never read.
        k = tl.load(k_ptr + place[None, :] * width + d[:, None], mask=seen[None, :] & d_in[:, None], other=0)
        v = tl.load(v_ptr + place[:, None] * ranks + r[None, :], mask=seen[:, None] & r_in[None, :], other=0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * SCALE
        if EIGHT:
            scores *= tl.load(k_scale_ptr + place, mask=seen, other=0.0).to(tl.float32)[None, :]
        scores = tl.where(seen[None, :], scores, LOWEST)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(weights, axis=1)
        if EIGHT:
            weights *= tl.load(v_scale_ptr + place, mask=seen, other=0.0).to(tl.float32)[None, :]
        found = found * fade[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        top = higher
    place = ((row * groups + group) * SPLIT + part) * share + m
    tl.store(found_ptr + place[:, None] * ranks + r[None, :], found, mask=m_in[:, None] & r_in[None, :])
    tl.store(top_ptr + place, top, mask=m_in)
    tl.store(total_ptr + place, total, mask=m_in)
