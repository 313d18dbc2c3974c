"""GPTQ (Frantar et al., arXiv 2210.17323) of dense models, one layer after the other, and of the other baselines'
results.

With H = E[x x^T] of what the rounded model feeds a matrix, damped by 1 % of its mean diagonal, and U^T U = H^-1 upper
triangular, columns are rounded in turn and what remains is corrected: w_j+ -= (w_j - q_j) U_j,j+ / U_jj. Groups of 128
inputs share a scale, searched as the package does (the rounding itself is benchmarks/rounding_model.py's).

The published form leaves embedding and head at 16 bits; here they have 4 bits in every row, as the package's do, so
that bytes compare. The stream is rotated first, as the package does, where the published form stays what it is:
ShortGPT, SVD-LLM, MoDeGPT, and rows that say so. Evaluated: the dequantized weights. Counted: sizes.py's bytes of the
codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.baselines import sizes
from benchmarks.baselines.dense import Calibration, Dense, Made, Streams, columns_of, forward, leaf_of
from benchmarks.rounding_math import Method
from benchmarks.rounding_model import Model, Row, View, round_matrix, round_top
from uniql_jax import elastic
from uniql_jax.compression.math.rotation import orthogonal
from uniql_jax.compression.refit import advance, hidden_gram, read_gram
from uniql_jax.compression.sorting import final_gram
from uniql_jax.compression.stages.rotate import rotated_layer

FOUR = Method(bits=4)
RoundLeaf = Callable[[int, str, str, Array, Array], Array]
"""(layer, kind, leaf's name, columns, Gram matrix of their input) -> rounded columns."""


def rounded(columns: Float[Array, "i o"], hessian: Float[Array, "i i"], method: Method) -> Float[Array, "i o"]:
    """GPTQ of one matrix."""
    return round_matrix(columns, [hessian], method, method.group)[0][0]


def plain(method: Method) -> RoundLeaf:
    """Every matrix alike."""
    return lambda index, kind, name, columns, hessian: rounded(columns, hessian, method)


def rotation(size: int) -> Float[Array, "h h"]:
    """The package's orthogonal factor."""
    return jnp.asarray(orthogonal(size, 0), jnp.float32)


def quantize(
    model: Dense, calibration: Calibration, round_leaf: RoundLeaf, q: Float[Array, "h h"] | None = None
) -> tuple[Dense, int]:
    """Round a model, layers in order, each fitted to what the rounded ones before feed it.

    Args:
        model: dense, float32.
        calibration: the windows.
        round_leaf: rounds a matrix.
        q: rotates the stream first; None: it stays as it is.

    Returns:
        The rounded model, and the bytes of embedding, final norm and head.
    """
    top, top_bytes = _rounded_top(model, calibration, q)
    xs, layers = calibration.streams(top), []
    for index, layer in enumerate(model.layers):
        done = {}
        for kind, block in rotated_layer(layer, q).items():  # type: ignore[arg-type]
            done[kind] = round_block(model.config, kind, block, xs, lambda *a, i=index: round_leaf(i, *a))
            xs = [advance(model.config, kind, done[kind], x, None) for x in xs]
        layers.append(done)
    return model._replace(layers=layers, top=top), top_bytes


def _rounded_top(model: Dense, calibration: Calibration, q: Any) -> tuple[dict[str, Array], int]:
    xs = calibration.streams(model.top)
    for layer in model.layers:
        xs = forward(model.config, layer, xs)
    read = sum(final_gram(x, model.config.norm_eps) for x in xs) / sum(x.shape[0] * x.shape[1] for x in xs)
    view = View("")
    round_top(Model(model.config, [], dict(model.top), read, [], []), Row("", top=FOUR), q, [view])
    return {name: jnp.asarray(value) for name, value in view.top.items()}, view.bytes


def round_block(
    config: Any,
    kind: str,
    block: Mapping[str, Array],
    xs: Streams,
    round_leaf: Callable[[str, str, Array, Array], Array],
) -> dict[str, Array]:
    """A block with rounded matrices: first those that read the stream, then the output matrix, fitted to them."""
    tokens = sum(x.shape[0] * x.shape[1] for x in xs)
    done, leaves = dict(block), elastic.leaves(config, kind)
    for side in ("last", "first"):
        if side == "last":
            hessian = sum(read_gram(config, kind, done, x) for x in xs) / tokens
        else:
            hessian = sum(hidden_gram(config, kind, done, x, None) for x in xs) / tokens
        for name, leaf in leaves.items():
            if leaf.contract == side:
                value = round_leaf(kind, name, columns_of(done[name], leaf), jnp.asarray(hessian))
                done[name] = leaf_of(value, leaf, block[name].shape)
    return done


def four_bits(made: Made, calibration: Calibration, keeps: Sequence[sizes.Keep]) -> Made:
    """A model of plain dense layers with the way to its 4 bits; `keeps` are the sizes of its layers."""

    def four() -> Made:
        config = made.model.config
        small, top_bytes = quantize(made.model, calibration, plain(FOUR), rotation(config.hidden_size))
        size = top_bytes + sum(sizes.layer_bytes(config, keep, 4) for keep in keeps)
        return dataclasses.replace(made, bytes=size, model=small, note={**made.note, "rotated": True})

    return dataclasses.replace(made, four=four)


def row(calibration: Calibration, bits: int, rotate: bool) -> Made:
    """The unpruned model at so many bits, on the stream as it is or on the rotated one."""
    model = calibration.model
    q = rotation(model.config.hidden_size) if rotate else None
    small, top_bytes = quantize(model, calibration, plain(Method(bits=bits)), q)
    size = top_bytes + len(model.layers) * sizes.layer_bytes(model.config, None, bits)
    parameters = sizes.kept_parameters(model.config, [{}] * len(model.layers))
    return Made(0.0, 0.0, parameters, size, small, note={"rotated": rotate})
