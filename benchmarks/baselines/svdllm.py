"""SVD-LLM (Wang et al., arXiv 2403.07378): every matrix becomes two of low rank, truncated where outputs change least.

With C = E[x x^T] of a matrix's input in the original model and its Cholesky factor S S^T = C, the SVD S^T W = U D V^T
is cut to rank r, and W' = S^-T U_r D_r V_r^T, the matrix of rank r of the least E |x W - x W'|^2 (truncation-aware
whitening). As S^-T U_r D_r = W V_r, this is W V_r V_r^T with V_r the leading eigenvectors of W^T C W: no inverse is
needed, and inputs that carry nothing do no harm. The factors are (W V_r) D_r^-1/2 and D_r^1/2 V_r^T; their rank r =
floor((1 - rate) m n / (m + n)) leaves 1 - rate of the parameters. The optional update of the paper's second step is
left out.

Evaluated: the product of both factors as a dense matrix. Counted: the factors. At 4 bits both are rounded by GPTQ, the
second with what the rounded first gives it; the stream is rotated before, under which the factors turn and the product
stays the same function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.baselines import sizes
from benchmarks.baselines.dense import Calibration, Dense, Made, changed, columns_of, matrices
from benchmarks.baselines.gptq import FOUR, quantize, rotation, rounded
from uniql_jax import elastic
from uniql_jax.compiling import jit
from uniql_jax.config import ModelConfig

Factors = tuple[Float[Array, "i r"], Float[Array, "r o"]]


@jit
def directions(columns: Float[Array, "i o"], gram: Float[Array, "i i"]) -> tuple[Array, Array]:
    """Principal directions of the outputs [o, min(i, o)], largest first, and the whitened singular values."""
    if columns.shape[1] > columns.shape[0]:  # eigenvectors within the few dimensions that outputs span
        spanning, upper = jnp.linalg.qr(columns.T)
        values, vectors = jnp.linalg.eigh(upper @ gram @ upper.T)
        vectors = spanning @ vectors
    else:
        values, vectors = jnp.linalg.eigh(columns.T @ gram @ columns)
    return vectors[:, ::-1], jnp.sqrt(jnp.maximum(values[::-1], 0.0))


def factors(columns: Float[Array, "i o"], found: tuple[Array, Array], rate: float) -> Factors:
    """Both factors at a prune rate, from `directions`."""
    rank = rank_at(columns.shape[0], columns.shape[1], rate)
    vectors, values = found[0][:, :rank], found[1][:rank]
    half = jnp.sqrt(jnp.maximum(values, 1e-6 * values[0] + jnp.finfo(jnp.float32).tiny))
    return columns @ vectors / half, half[:, None] * vectors.T


def rank_at(inputs: int, outputs: int, rate: float) -> int:
    """Rank that leaves 1 - rate of a matrix's parameters."""
    return max(1, int((1 - rate) * inputs * outputs / (inputs + outputs) + 1e-9))


def layer_bytes(config: ModelConfig, rate: float, bits: int = 16) -> int:
    """Bytes of a layer with factors in place of its matrices."""
    return 2 * sizes.vectors(config) + sum(
        sizes.matrix_bytes(inputs, rank, bits) + sizes.matrix_bytes(rank, outputs, bits)
        for inputs, outputs, rank in _ranks(config, rate)
    )


def _ranks(config: ModelConfig, rate: float) -> Iterator[tuple[int, int, int]]:
    for _, _, leaf, _ in matrices(config):
        inputs, outputs = sizes.inputs_and_outputs(config, leaf)
        yield inputs, outputs, rank_at(inputs, outputs, rate)


def factored(calibration: Calibration) -> list[dict[tuple[str, str], tuple[Any, Any]]]:
    """`directions` of every matrix of the original model, by layer, on the host."""
    config = calibration.model.config
    return [
        {
            (kind, name): jax.device_get(
                directions(columns_of(layer[kind][name], leaf), jnp.asarray(stats[kind][which]))
            )
            for kind, name, leaf, which in matrices(config)
        }
        for layer, stats in zip(calibration.model.layers, calibration.stats, strict=True)
    ]


def low_rank(calibration: Calibration, found: Sequence[Mapping[Any, Any]], rate: float) -> Dense:
    """The model with dense products of the factors at a rate."""
    config, layers = calibration.model.config, []
    for layer, of_layer, stats in zip(calibration.model.layers, found, calibration.stats, strict=True):

        def change(kind: str, name: str, columns: Array, _: Array, of_layer: Mapping[Any, Any] = of_layer) -> Array:
            first, second = factors(columns, of_layer[kind, name], rate)
            return first @ second

        layers.append(changed(config, layer, stats, change))
    return calibration.model._replace(layers=layers)


def four_bits(
    calibration: Calibration, model: Dense, found: Sequence[Mapping[Any, Any]], rate: float
) -> tuple[Dense, int]:
    """Both factors of every matrix at 4 bits, on the rotated stream; and bytes of embedding and head."""
    q = rotation(model.config.hidden_size)

    def round_leaf(index: int, kind: str, name: str, _: Array, hessian: Array) -> Array:
        leaf, block = elastic.BLOCKS[kind][name], calibration.model.layers[index][kind]
        columns = columns_of(block[name], leaf)
        first, second = factors(columns, found[index][kind, name], rate)
        if leaf.contract == "last":
            first = q.T @ (block["norm"][:, None] * first)
        else:
            second = second @ q
        first = rounded(first, hessian, FOUR)
        return first @ rounded(second, first.T @ hessian @ first, FOUR)

    return quantize(model, calibration, round_leaf, q)


def rows(calibration: Calibration, rates: Sequence[float]) -> Iterator[Made]:
    """The model at every rate."""
    config, found = calibration.model.config, factored(calibration)
    count = len(calibration.model.layers)
    outside = sizes.kept_parameters(config, [])
    for rate in rates:
        left = count * sum(rank * (inputs + outputs) for inputs, outputs, rank in _ranks(config, rate))
        parameters = outside + count * layer_bytes(config, rate) // 2
        model = low_rank(calibration, found, rate)
        made = Made(rate, sizes.removed(config, left), parameters, 2 * parameters, model)

        def four(made: Made = made) -> Made:
            small, top_bytes = four_bits(calibration, made.model, found, made.rate)
            size = top_bytes + count * layer_bytes(config, made.rate, 4)
            return dataclasses.replace(made, bytes=size, model=small, note={"rotated": True})

        yield dataclasses.replace(made, four=four)
