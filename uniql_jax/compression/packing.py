"""Rounding the matrices of a block to packed integers, one Hessian for all that share an input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax import elastic
from uniql_jax.compression.compiling import matmul_precision
from uniql_jax.compression.devices import Devices
from uniql_jax.compression.math.gptq import quantize
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.weights.fake_quantized import unrounded_steps
from uniql_jax.weights.quantized import QuantizedArray, from_codes
from uniql_jax.weights.runs import from_runs, to_runs


class Packed(NamedTuple):
    """A packed leaf and, where it was asked for, what was rounded to its integers, in steps and of its logical shape
    (uniql_jax/weights/fake_quantized.py).
    """

    weight: QuantizedArray
    unrounded: Float[Array, "..."] | None


def _quantize_rows(
    rows: Float[Array, "rows width"],
    hessian: Array | None,
    settings: CompressionSettings,
    group: int,
    return_unrounded: bool,
    devices: Devices | None,
) -> tuple[Int[Array, "rows width"], Float[Array, "rows groups"], Float[Array, "rows width"] | None]:
    with jax.default_matmul_precision(matmul_precision(settings, solves=True)):
        codes, scale, rounded = (devices or Devices()).by_rows(
            quantize,
            rows,
            hessian,
            bits=settings.bits,
            group=group,
            search=settings.scale_search,
            propagate=settings.rounding == "gptq",
            damping=settings.damping,
            descents=settings.descents,
            return_unrounded=return_unrounded,
        )
    return codes, scale, None if rounded is None else unrounded_steps(rounded, codes, scale, group)


def pack_leaf(
    leaf: elastic.Leaf,
    value: Float[Array, "..."],
    hessian: Array | None,
    settings: CompressionSettings,
    group: int,
    return_unrounded: bool = False,
    devices: Devices | None = None,
    run: int = 1,
) -> Packed:
    """Pack one matrix leaf.

    Args:
        leaf: the row of `elastic.BLOCKS` or `elastic.TOP` that describes it.
        value: the weight.
        hessian: float32 [width, width], the Gram matrix of what the leaf contracts; None rounds to nearest.
        settings: bits, rounding, scale search and damping.
        group: contracted weights that share a scale; with runs, entries of the leading axis in one head.
        return_unrounded: also return what was rounded.
        devices: take some rows each; None: the first one takes all.
        run: see QuantizedArray.

    Returns:
        The packed weight and, with `return_unrounded`, what was rounded to its integers.
    """
    width = value.shape[-1] if leaf.contract == "last" else int(np.prod(value.shape[:-1]))
    rows = value.reshape(-1, width) if leaf.contract == "last" else value.reshape(width, -1).T
    # Rounded group after group; a group's entries lie next to one another meanwhile.
    inner, apart = int(np.prod(value.shape[1:-1])), group if run > 1 else 1
    rows = to_runs(rows, inner, apart, 1)
    if hessian is not None:
        hessian = to_runs(to_runs(hessian, inner, apart, 0), inner, apart, 1)
    codes, scale, unrounded = _quantize_rows(rows, hessian, settings, group, return_unrounded, devices)
    codes = from_runs(codes, inner, apart, 1)
    contract, shape = str(leaf.contract), value.shape
    weight = from_codes(codes, scale, bits=settings.bits, group=group, contract=contract, shape=shape, run=run)
    if unrounded is not None:
        unrounded = from_runs(unrounded, inner, apart, 1)
        unrounded = (unrounded if leaf.contract == "last" else unrounded.T).reshape(value.shape)
    return Packed(weight, unrounded)


def pack_together(
    values: Mapping[str, Float[Array, "..."]],
    hessian: Array | None,
    settings: CompressionSettings,
    group: int,
    return_unrounded: bool = False,
    devices: Devices | None = None,
) -> dict[str, Packed]:
    """Pack matrices that contract the same input as their last dimension: one Hessian, one factorization for all."""
    flat = {name: value.reshape(-1, value.shape[-1]) for name, value in values.items()}
    codes, scales, unrounded = _quantize_rows(
        jnp.concatenate(list(flat.values())), hessian, settings, group, return_unrounded, devices
    )
    ends = np.cumsum([len(rows) for rows in flat.values()])
    done = {}
    for (name, value), end in zip(values.items(), ends, strict=True):
        own = slice(end - len(flat[name]), end)
        shape = value.shape
        weight = from_codes(codes[own], scales[own], bits=settings.bits, group=group, contract="last", shape=shape)
        done[name] = Packed(weight, None if unrounded is None else unrounded[own].reshape(shape))
    return done
