"""What 2:4 sparsity is: of every four inputs in a row, each output keeps two weights. Masks, bytes, and GPTQ under a
mask.

Four weights take two values and two indices of two bits: 36 bits at 16 bits a value, 12 at 4 (and a 16-bit scale for
every 128 inputs of an output). Inputs of o_proj are counted head by head, as checkpoints have them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from benchmarks.baselines import sizes
from benchmarks.baselines.dense import Calibration, Dense, Layer, Made, Stats, changed, matrices
from benchmarks.baselines.gptq import quantize
from benchmarks.rounding_math import Method, group_scale
from uniql_jax.compiling import jit
from uniql_jax.compression.math.gptq import inverse_factor
from uniql_jax.compression.math.refine import nearest
from uniql_jax.config import ModelConfig

GROUP = sizes.GROUP
DAMPING = 0.01


def two_of_four(scores: Float[Array, "i o"]) -> Bool[Array, "i o"]:
    """Which weights stay: of every four inputs the two of the highest score, the first ones where scores are equal."""
    four = scores.reshape(-1, 4, scores.shape[-1])
    rank = jnp.argsort(jnp.argsort(-four, axis=1, stable=True), axis=1, stable=True)
    return (rank < 2).reshape(scores.shape)


@functools.partial(jit, static_argnames=("bits",))
def prune_columns(
    columns: Float[Array, "i o"],
    hessian: Float[Array, "i i"],
    mask: Bool[Array, "i o"] | None = None,
    bits: int | None = None,
) -> Float[Array, "i o"]:
    """SparseGPT's columns in turn: what is cut or rounded in one is made up for in those that follow.

    Args:
        columns: the weight; a multiple of four inputs.
        hessian: mean outer product of the inputs.
        mask: which weights stay. None: chosen at every fourth input, w_j^2 / U_jj^2, of what the weights are then.
        bits: round what stays to so many. None: as it is.

    Returns:
        The new weight, zero where it is cut.
    """
    width, spare = len(columns), -len(columns) % GROUP
    method, diagonal = Method(bits=bits or 16), jnp.diagonal(hessian)
    importance = jnp.pad(diagonal + 1e-6 * diagonal.mean(), (0, spare))
    factor = jnp.pad(inverse_factor(hessian, DAMPING), (0, spare)) + jnp.diag(
        (jnp.arange(width + spare) >= width) * 1.0
    )
    columns = jnp.pad(columns, ((0, spare), (0, 0)))
    stays = None if mask is None else jnp.pad(mask, ((0, spare), (0, 0)))
    inside = jnp.arange(GROUP)[:, None]

    def one_group(g: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        columns, out = state
        start = g * GROUP
        part = lambda value: jax.lax.dynamic_slice_in_dim(value, start, GROUP)  # noqa: E731
        block, stripe = part(columns), part(factor)
        square = jax.lax.dynamic_slice_in_dim(stripe, start, GROUP, axis=1)
        given = None if stays is None else part(stays)
        scale = None
        if bits is not None:
            kept = block if given is None else jnp.where(given, block, 0.0)
            scale = group_scale(kept, part(importance), square, method, bits)

        def four(f: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            block, done, errors = state
            at = 4 * f
            rows = jax.lax.dynamic_slice_in_dim(block, at, 4)
            if given is None:
                size = jax.lax.dynamic_slice_in_dim(jnp.diagonal(square), at, 4)
                keep = two_of_four(jnp.square(rows / size[:, None]))
            else:
                keep = jax.lax.dynamic_slice_in_dim(given, at, 4)
            for i in range(4):
                row = jax.lax.dynamic_index_in_dim(block, at + i, keepdims=False)
                new = row if scale is None else nearest(row, scale, method.bits) * scale
                new = jnp.where(keep[i], new, 0.0)
                weights = jax.lax.dynamic_index_in_dim(square, at + i, keepdims=False)
                error = (row - new) / weights[at + i]
                block = block - jnp.where(inside > at + i, weights[:, None], 0.0) * error
                done = jax.lax.dynamic_update_index_in_dim(done, new, at + i, 0)
                errors = jax.lax.dynamic_update_index_in_dim(errors, error, at + i, 0)
            return block, done, errors

        empty = jnp.zeros_like(block)
        _, done, errors = jax.lax.fori_loop(0, GROUP // 4, four, (block, empty, empty))
        later = jnp.arange(len(columns)) >= start + GROUP
        columns = columns - jnp.where(later, stripe, 0.0).T @ errors
        return columns, jax.lax.dynamic_update_slice_in_dim(out, done, start, axis=0)

    begin = columns, jnp.zeros_like(columns)
    return jax.lax.fori_loop(0, len(columns) // GROUP, one_group, begin)[1][:width]


def by_heads(
    config: ModelConfig, name: str, function: Callable[..., Array], columns: Array, hessian: Array
) -> Float[Array, "i o"]:
    """`function(columns, hessian)` with o_proj's inputs head by head."""
    if name != "o":
        return function(columns, hessian)
    order = jnp.arange(len(columns)).reshape(-1, config.heads).T.reshape(-1)
    found = function(columns[order], hessian[order][:, order])
    return jnp.zeros_like(found).at[order].set(found)


def sparse_bytes(inputs: int, outputs: int, bits: int = 16) -> int:
    """Bytes of a matrix of 2:4 sparsity."""
    scales = 0 if bits >= 16 else 2 * outputs * -(-inputs // GROUP)
    return inputs * outputs * (2 * bits + 4) // 32 + scales


def model_bytes(config: ModelConfig, layers: int, bits: int = 16) -> int:
    """Bytes of the layers."""
    pairs = [sizes.inputs_and_outputs(config, leaf) for _, _, leaf, _ in matrices(config)]
    return layers * (2 * sizes.vectors(config) + sum(sparse_bytes(*pair, bits) for pair in pairs))


def rows(calibration: Calibration, prune: Callable[[Array, Array], Array]) -> Iterator[Made]:
    """The model with all matrices of its layers at 2:4, pruned by `prune(columns, Gram matrix of the inputs)`.

    Layers one after another: the four (two) matrices of a block see the dense block on the stream of the pruned layers.
    """
    model, config = calibration.model, calibration.model.config
    count = len(model.layers)

    def change(layer: Layer, stats: Mapping[str, Stats]) -> Layer:
        return changed(config, layer, stats, lambda _, name, w, h: by_heads(config, name, prune, w, h))

    small = calibration.one_after_another(change)
    left = sum(sum(int(jnp.sum(layer[k][n] != 0)) for k, n, _, _ in matrices(config)) for layer in small.layers)
    whole = sizes.matrices_left(config, [{}] * count)
    outside = 2 * sizes.kept_parameters(config, [])
    parameters = outside // 2 + count * sizes.vectors(config) + whole // 2
    made = Made(0.5, 1 - left / whole, parameters, outside + model_bytes(config, count), small, note={"pattern": "2:4"})

    def four() -> Made:
        found, top_bytes = _quantized(small, calibration)
        return dataclasses.replace(made, bytes=top_bytes + model_bytes(config, count, 4), model=found)

    yield dataclasses.replace(made, four=four)


def _quantized(small: Dense, calibration: Calibration) -> tuple[Dense, int]:
    def round_leaf(index: int, kind: str, name: str, columns: Array, hessian: Array) -> Array:
        def masked(w: Array, h: Array) -> Array:
            return prune_columns(w, h, w != 0, bits=4)

        return by_heads(small.config, name, masked, columns, hessian)

    return quantize(small, calibration, round_leaf)
