"""The kernels of jaxtriton.py in Triton's own language; imported where Triton is installed and a GPU computes.

Sizes of arrays are arguments, so that one compiled kernel serves every pruned size; what decides how wide a load may be
is a compile-time constant. `no_type_check`: functions that Triton compiles must reach it undecorated.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _place(n, at, features, groups, LAYOUT: tl.constexpr, STORED: tl.constexpr):
    """Where the stored element number `at` of row n lies, a group having STORED; see tiling.Weight for the layouts."""
    if LAYOUT == "last":
        place = n * (groups * STORED) + at
    elif LAYOUT == "first":
        place = at * features + n
    elif LAYOUT == "rows":
        place = (n // 16 * groups + at // 16) * 256 + n % 16 * 16 + at % 16
    else:
        place = (at // 16 * ((features + 15) // 16) + n // 16) * 256 + n % 16 * 16 + at % 16
    return place


@triton.jit
@no_type_check
def _order(k, LAYOUT: tl.constexpr):
    """The contracted weight that is stored as number k of its row: tiles permute the words of a group."""
    if LAYOUT == "rows" or LAYOUT == "groups":
        word = k // 8 % 16
        k = k // 128 * 128 + (word % 4 * 4 + word // 4) * 8 + k % 8
    return k


@triton.jit
@no_type_check
def _scale(scale_ptr, n, group, features, groups, mask, LAYOUT: tl.constexpr):
    if LAYOUT == "last" or LAYOUT == "rows":
        place = n * groups + group
    else:
        place = group * features + n
    return tl.load(scale_ptr + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _plane(words, exponent, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """The weight at bit SHIFT of each word, q - 8.

    Four bits of a float32's mantissa are q in units of its last bit if its exponent is chosen so: no integer is
    converted, and what is taken off again leaves it exact. `exponent` is 2 ** 23 as bits, in a register: an and-or with
    two constants is two instructions, with one it is one.
    """
    AT: tl.constexpr = SHIFT - 12 if SHIFT > 16 else SHIFT
    bits = ((words >> (SHIFT - AT)) & (0xF << AT)) | (exponent - (AT << 23))
    return (bits.to(tl.float32, bitcast=True) - float((1 << (23 - AT)) + 8)).to(DTYPE)


@triton.jit
@no_type_check
def _numbers(stored, exponent, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Weights [n, k], in their order, of stored elements [n, ...]; no number moves to another thread."""
    if BITS == 8:
        numbers = stored.to(DTYPE)
    else:
        # The k-th weight of a word is at packing.SHIFTS[k]; each join adds a last axis, the highest bit of k first.
        even = tl.join(
            tl.join(_plane(stored, exponent, 0, DTYPE), _plane(stored, exponent, 8, DTYPE)),
            tl.join(_plane(stored, exponent, 4, DTYPE), _plane(stored, exponent, 12, DTYPE)),
        )
        odd = tl.join(
            tl.join(_plane(stored, exponent, 16, DTYPE), _plane(stored, exponent, 24, DTYPE)),
            tl.join(_plane(stored, exponent, 20, DTYPE), _plane(stored, exponent, 28, DTYPE)),
        )
        numbers = tl.join(even, odd).reshape(stored.shape[0], 8 * stored.shape[1])
    return numbers


@triton.jit
@no_type_check
def gemv(
    x_ptr,
    data_ptr,
    scale_ptr,
    count,
    width,
    features,
    groups,
    exponent,
    out_ptr,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    X_ALIGNED: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out [SPLIT, count, features]: a program multiplies N rows of the weight with all M >= count rows of x, K weights
    of each row at a time, and adds up across threads once, at its end.

    ALIGNED divides `features`, X_ALIGNED `width`: loads along them may be so wide.
    """
    PER: tl.constexpr = 8 if BITS == 4 else 1
    width, features = width // X_ALIGNED * X_ALIGNED, features // ALIGNED * ALIGNED
    n, m = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, M)
    n_in, m_in = (n < features)[:, None], (m < count)[:, None]
    share = tl.program_id(1)
    total = tl.zeros([M, N, K // 8], tl.float32)
    for start in range(share * K, groups * GROUP, K * SPLIT):
        # x beyond its width is zero: whatever the weight holds there is nothing.
        k = _order(start + tl.arange(0, K), LAYOUT)[None, :]
        x = tl.load(x_ptr + m[:, None] * width + k, mask=m_in & (k < width), other=0.0).to(tl.float32)
        group = start // GROUP + tl.arange(0, K // GROUP)[None, :]
        scale = _scale(scale_ptr, n[:, None], group, features, groups, n_in & (group < groups), LAYOUT)
        scale = tl.broadcast_to(scale[:, :, None], (N, K // GROUP, GROUP // 8)).reshape(1, N, K // 8)
        # The last load is the one whose layout the compiler gives to what they meet in: it moves x, not the weight.
        at = start // PER + tl.arange(0, K // PER)[None, :]
        mask = n_in & (at < groups * (GROUP // PER))
        stored = tl.load(data_ptr + _place(n[:, None], at, features, groups, LAYOUT, GROUP // PER), mask=mask, other=0)
        weight = _numbers(stored, exponent, BITS, tl.float32).reshape(1, N, K // 8, 8)
        total += tl.sum(weight * x.reshape(M, 1, K // 8, 8), axis=3) * scale
    out = tl.sum(total, axis=2)
    place = (share * count + m[:, None]) * features + n[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=m_in & (n < features)[None, :])


@triton.jit
@no_type_check
def dot(
    x_ptr,
    data_ptr,
    scale_ptr,
    count,
    width,
    features,
    groups,
    exponent,
    out_ptr,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    X_ALIGNED: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out [SPLIT, count, features]: tiles of N rows of the weight times M rows of x, K weights of one group at a time.

    x is bf16 (Triton's interpreter multiplies float32 alone). ALIGNED, X_ALIGNED: see `gemv`.
    """
    PER: tl.constexpr = 8 if BITS == 4 else 1
    STEPS: tl.constexpr = GROUP // K
    width, features = width // X_ALIGNED * X_ALIGNED, features // ALIGNED * ALIGNED
    n, m = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * M + tl.arange(0, M)
    n_in, m_in = n < features, (m < count)[None, :]
    share = tl.program_id(2)
    per_share = tl.cdiv(groups * STEPS, SPLIT)
    total = tl.zeros([N, M], tl.float32)
    for step in range(share * per_share, tl.minimum((share + 1) * per_share, groups * STEPS)):
        at = step * (K // PER) + tl.arange(0, K // PER)[None, :]
        place = _place(n[:, None], at, features, groups, LAYOUT, GROUP // PER)
        stored = tl.load(data_ptr + place, mask=n_in[:, None], other=0)
        # x beyond its width is zero: whatever the weight holds there is nothing.
        k = _order(step * K + tl.arange(0, K), LAYOUT)[:, None]
        x = tl.load(x_ptr + m[None, :] * width + k, mask=m_in & (k < width), other=0.0)
        scale = _scale(scale_ptr, n, step // STEPS, features, groups, n_in, LAYOUT)
        part = tl.dot(_numbers(stored, exponent, BITS, x.dtype), x, input_precision="ieee")
        total += part * scale[:, None]
    place = (share * count + m[None, :]) * features + n[:, None]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=m_in & n_in[:, None])
