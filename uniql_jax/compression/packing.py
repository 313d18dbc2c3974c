"""Rounding the matrices of a block to packed integers, one Hessian (or pair of them) for all that share an input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax import elastic
from uniql_jax.compression.devices import Devices
from uniql_jax.compression.math.gptq import quantize
from uniql_jax.compression.math.nested import nearest_coarse, round_rows
from uniql_jax.compression.precision import matmul_precision
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.weights.fake_quantized import unrounded_steps
from uniql_jax.weights.nested import NestedArray, from_nested_codes
from uniql_jax.weights.quantized import QuantizedArray, from_codes
from uniql_jax.weights.runs import from_runs, to_runs

Hessian = Array | tuple[Array, Array] | None
"""Mean Gram matrix of what a leaf contracts, float32 [width, width]: for nested codes one of the model of all bits and
one of that of the leading bits; None rounds to nearest."""


class Packed(NamedTuple):
    """A packed leaf and, where it was asked for, what was rounded to its integers, in steps and of its logical shape
    (uniql_jax/weights/fake_quantized.py).
    """

    weight: QuantizedArray | NestedArray
    unrounded: Float[Array, "..."] | None


READING = elastic.Leaf((), "last")
"""Of every leaf that reads the stream, what assembling it asks for."""


class _Rounded(NamedTuple):
    """Codes, a tuple of scales (those of 3 bits second, where codes are nested), and what was rounded, in steps."""

    codes: Int[Array, "rows width"]
    scales: tuple[Float[Array, "rows groups"], ...]
    unrounded: Float[Array, "rows width"] | None


def _quantize_rows(
    rows: Float[Array, "rows width"],
    hessian: Hessian,
    settings: CompressionSettings,
    group: int,
    return_unrounded: bool,
    devices: Devices | None,
) -> _Rounded:
    devices = devices or Devices()
    with jax.default_matmul_precision(matmul_precision(settings, solves=True)):
        if isinstance(hessian, tuple) and settings.rounding == "gptq":
            codes, *scales = devices.by_rows(
                round_rows,
                rows,
                hessian,
                group=group,
                share=settings.nested_share,
                sweeps=settings.nested_descents,
                damping=settings.damping,
            )
            return _Rounded(codes, tuple(scales), None)
        codes, scale, rounded = devices.by_rows(
            quantize,
            rows,
            hessian[0] if isinstance(hessian, tuple) else hessian,
            bits=settings.bits,
            group=group,
            search=settings.scale_search,
            propagate=settings.rounding == "gptq",
            damping=settings.damping,
            descents=settings.descents,
            return_unrounded=return_unrounded,
        )
    if settings.nested:
        return _Rounded(codes, (scale, nearest_coarse(rows, codes, scale, group)), None)
    return _Rounded(codes, (scale,), None if rounded is None else unrounded_steps(rounded, codes, scale, group))


def _assembled(
    codes: Int[Array, "rows width"],
    scales: tuple[Float[Array, "rows groups"], ...],
    leaf: elastic.Leaf,
    shape: tuple[int, ...],
    settings: CompressionSettings,
    group: int,
    run: int = 1,
) -> QuantizedArray | NestedArray:
    contract = str(leaf.contract)
    if settings.nested:
        return from_nested_codes(codes, *scales, group=group, contract=contract, shape=shape)
    return from_codes(codes, scales[0], bits=settings.bits, group=group, contract=contract, shape=shape, run=run)


def pack_leaf(
    leaf: elastic.Leaf,
    value: Float[Array, "..."],
    hessian: Hessian,
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
        hessian: of what the leaf contracts; None rounds to nearest.
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
    hessian = jax.tree.map(lambda gram: to_runs(to_runs(gram, inner, apart, 0), inner, apart, 1), hessian)
    codes, scales, unrounded = _quantize_rows(rows, hessian, settings, group, return_unrounded, devices)
    codes = from_runs(codes, inner, apart, 1)
    weight = _assembled(codes, scales, leaf, value.shape, settings, group, run)
    if unrounded is not None:
        unrounded = from_runs(unrounded, inner, apart, 1)
        unrounded = (unrounded if leaf.contract == "last" else unrounded.T).reshape(value.shape)
    return Packed(weight, unrounded)


def pack_together(
    values: Mapping[str, Float[Array, "..."]],
    hessian: Hessian,
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
        weight = _assembled(codes[own], tuple(scale[own] for scale in scales), READING, value.shape, settings, group)
        done[name] = Packed(weight, None if unrounded is None else unrounded[own].reshape(value.shape))
    return done
