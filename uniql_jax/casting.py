"""Casts of weights between number formats that never lose a value to infinity, and a fast test for finite weights."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from uniql_jax.errors import UserError

_EXPONENT: dict[str, tuple[str, int]] = {"float16": ("uint16", 0x7C00), "bfloat16": ("uint16", 0x7F80)}
"""Narrow formats -> the integer type of the same size and its exponent bits, which are all ones in NaN and infinity."""
_PIECE = 1 << 18  # entries looked at together; a piece stays in the CPU's cache


def all_finite(value: Shaped[np.ndarray, "..."]) -> bool:
    """Whether an array holds neither NaN nor infinity; integers always do.

    Args:
        value: Any array. float16 and bfloat16 are tested through their exponent bits, without widening.
    """
    if value.dtype.name in _EXPONENT:
        kind, exponent = _EXPONENT[value.dtype.name]
        bits = np.ascontiguousarray(value).view(kind).reshape(-1)
        pieces = (bits[start : start + _PIECE] for start in range(0, bits.size, _PIECE))
        return all(int((piece & np.uint16(exponent)).max()) < exponent for piece in pieces)
    if value.dtype.kind in "iub" or not value.size:
        return True
    if value.dtype.name not in ("float32", "float64"):  # 8-bit floats: small and rare
        value = value.astype(np.float32)
    # NaN and infinity survive min and max, which need no temporary copy
    return bool(np.isfinite(value.min()) and np.isfinite(value.max()))


def check_finite(name: str, value: Shaped[np.ndarray, "..."]) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Raises:
        UserError: naming the tensor.
    """
    if not all_finite(value):
        raise UserError(f"tensor {name!r} holds NaN or infinity")


def cast(name: str, value: Any, dtype: Any) -> Float[np.ndarray, "..."]:
    """Cast a weight, and refuse to make an infinity of a finite value.

    Args:
        name: The tensor's name, for the message.
        value: Any array of numbers.
        dtype: The target, a floating-point format.

    Returns:
        The array in `dtype`; the same object where it has that format already.

    Raises:
        UserError: when a finite value lies beyond the range of `dtype`.
    """
    value, target = np.asarray(value), np.dtype(dtype)
    if value.dtype == target:
        return value
    with np.errstate(over="ignore", invalid="ignore"):  # invalid: a signalling NaN becomes a quiet one
        out = value.astype(target)
        if not _may_overflow(value.dtype, target) or all_finite(out):
            return out
        lost = np.isfinite(value) & ~np.isfinite(out)
    if lost.any():
        largest = float(np.max(np.abs(value[lost].astype(np.float64))))
        wider = [other for other in ("bfloat16", "float32") if largest <= _largest(np.dtype(other))]
        advice = f"use {' or '.join(wider)} instead" if wider else "no format that we write can hold it"
        raise UserError(f"tensor {name!r} does not fit {target.name}, as it holds {largest:.3g}: {advice}")
    return out


def _largest(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).max) if dtype.kind in "fV" else float("inf")


def _may_overflow(source: np.dtype, target: np.dtype) -> bool:
    """Whether `source` has finite values beyond `target` (rounding up included: equal ranges are safe)."""
    if source.kind in "iub":
        return 2.0 ** (8 * source.itemsize) > _largest(target)
    return _largest(source) > _largest(target)
