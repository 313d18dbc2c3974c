"""SliceGPT (Ashkboos et al., arXiv 2401.15024): the stream is rotated to its principal directions, and the last ones
go.

With norm weights folded into the matrices that follow, RMSNorm commutes with orthogonal Q. Before every block l, Q_l
has the eigenvectors of C_l = E[x x^T] of the stream there, largest first; the first k columns of it are B_l. Then W_in
<- B_l^T W_in, W_out <- W_out B_l+1, and the residual passes through the adapter B_l^T B_l+1. The norm divides by the
original width. The calibration stream is cut as the model is, block after block; the last block writes all directions,
and the head reads them. (The paper writes of C of the norm's output; its reference code takes the stream's, as here.)
Within the kept directions the basis is turned by a fixed orthogonal matrix, which changes no result in float and
spreads outliers before rounding; the reference code does so at random.

Evaluated: this very form through the package's blocks, with what is cut as zeros, so that one program serves all rates.
Counted: sliced matrices, adapters, and embedding and head, which are no longer one table. k is the largest multiple of
8 at which the matrices of the layers with their adapters have at most 1 - rate of the original's parameters. At 4 bits
the adapters, whose rounding errors go straight into the stream, have 8.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.baselines import sizes
from benchmarks.baselines.dense import KINDS, Block, Calibration, Dense, Made, Streams, matrices
from benchmarks.baselines.gptq import FOUR, rotation, round_block, rounded
from benchmarks.rounding_math import Method
from uniql_jax import elastic
from uniql_jax.compression.math.gram import gram
from uniql_jax.compression.refit import advance
from uniql_jax.compression.sorting import final_gram
from uniql_jax.config import ModelConfig
from uniql_jax.counting import prunable_count
from uniql_jax.model.layers import KINDS as MODULES

STEP = 8
ADAPTER = Method(bits=8)


def _sliced(kind: str) -> types.ModuleType:
    """A block whose residual passes through an adapter."""
    base, made = MODULES[kind], types.ModuleType(f"sliced_{kind}")

    def read(config: ModelConfig, leaves: Block, x: Array) -> Array:
        return x

    def inner(config: ModelConfig, leaves: Block, x: Array, context: Any) -> tuple[Array, Array]:
        return base.inner(config, leaves, base.read(config, leaves, x), context), x

    def write(leaves: Block, hidden: tuple[Array, Array]) -> Array:
        return base.write(leaves, hidden[0]) + hidden[1] @ leaves["adapter"] - hidden[1]

    vars(made).update(read=read, inner=inner, write=write)
    return made


BLOCKS = {f"sliced_{kind}": _sliced(kind) for kind in KINDS}
"""To be added to the package's blocks while a sliced model is evaluated."""


def principal(xs: Streams) -> Float[np.ndarray, "h h"]:
    """Eigenvectors of the mean outer product of the stream, largest first; float64 on the host."""
    total = np.asarray(sum(gram(x, x.shape[-1]) for x in xs), np.float64)
    return np.linalg.eigh(total / np.trace(total))[1][:, ::-1]


def basis(xs: Streams, width: int) -> Float[Array, "h h"]:
    """The `width` leading principal directions, turned among themselves; zeros in the columns that follow."""
    vectors = principal(xs)
    found = np.zeros_like(vectors)
    found[:, :width] = vectors[:, :width] @ np.asarray(rotation(width), np.float64)
    return jnp.asarray(found, jnp.float32)


def layer_parameters(config: ModelConfig, width: int, last: bool = False) -> int:
    """Parameters of a layer's matrices and adapters where the stream has `width` directions."""
    out = config.hidden_size if last else width
    total = width * width + width * out
    for kind, _, leaf, _ in matrices(config):
        inputs, outputs = sizes.inputs_and_outputs(config, leaf)
        after = out if kind == "mlp" else width
        total += width * outputs if leaf.contract == "last" else inputs * after
    return total


def width_at(config: ModelConfig, rate: float) -> int:
    """Directions kept at a prune rate."""
    if rate == 0:
        return config.hidden_size
    room, layers = (1 - rate) * prunable_count(config), len(config.pattern)
    widths = range(STEP, config.hidden_size + 1, STEP)

    def total(width: int) -> int:
        return (layers - 1) * layer_parameters(config, width) + layer_parameters(config, width, last=True)

    return max((width for width in widths if total(width) <= room), default=STEP)


def slice_block(block: Block, before: Array, after: Array) -> dict[str, Array]:
    """A block in the basis of the stream before it and of that after it, with the adapter between them."""
    out = {}
    kind = "attention" if "q" in block else "mlp"
    for name, value in block.items():
        leaf = elastic.BLOCKS[kind][name]
        if leaf.contract == "last":
            value = (value * block["norm"]) @ before
        elif leaf.contract == "first" or (leaf.dims == ("embed",) and name != "norm"):
            value = value @ after
        out[name] = value
    return out | {"norm": jnp.ones_like(block["norm"]), "adapter": before.T @ after}


def slice_model(calibration: Calibration, width: int) -> Dense:
    """The model whose stream has `width` directions, zeros in place of the others."""
    model, xs = calibration.model, calibration.streams()
    before = basis(xs, width)
    top = {"embed": model.top["embed"] @ before, "norm": jnp.ones_like(model.top["norm"])}
    layers, count = [], len(model.layers)
    for index, layer in enumerate(model.layers):
        done = {}
        for kind in KINDS:
            last = index == count - 1 and kind == KINDS[-1]
            xs = [advance(model.config, kind, layer[kind], x @ before @ before.T, None) for x in xs]
            after = basis(xs, model.config.hidden_size if last else width)
            done[f"sliced_{kind}"] = slice_block(layer[kind], before, after)
            before = after
        layers.append(done)
    head = model.top.get("head", model.top["embed"])
    top["head"] = (head * model.top["norm"]) @ before
    pattern = (tuple(BLOCKS),) * count
    config = dataclasses.replace(model.config, pattern=pattern, tie_embeddings=False)
    return Dense(config, layers, top)


def quantize(sliced: Dense, calibration: Calibration) -> Dense:
    """Its matrices by GPTQ at 4 bits, its adapters at 8."""
    config, size = calibration.model.config, sliced.config.hidden_size
    eye = jnp.eye(size)
    top = {**sliced.top, "embed": rounded(sliced.top["embed"].T, eye, FOUR).T}
    xs, layers = calibration.streams(top), []
    for layer in sliced.layers:
        done = {}
        for name, block in layer.items():
            kind, adapter = name.removeprefix("sliced_"), rounded(block["adapter"], eye, ADAPTER)
            bare = {leaf: value for leaf, value in block.items() if leaf != "adapter"}
            new = round_block(config, kind, bare, xs, lambda _kind, _name, columns, h: rounded(columns, h, FOUR))
            xs = [advance(config, kind, new, x, None) - x + x @ adapter for x in xs]
            done[name] = new | {"adapter": adapter}
        layers.append(done)
    read = sum(final_gram(x, config.norm_eps) for x in xs)
    top["head"] = rounded(top["head"].T, jnp.asarray(read), FOUR).T
    return Dense(sliced.config, layers, top)


def stored(config: ModelConfig, width: int, bits: int = 16) -> int:
    """Bytes of the whole sliced model."""
    total = sizes.matrix_bytes(width, config.vocab_size, bits) + sizes.matrix_bytes(
        config.hidden_size, config.vocab_size, bits
    )
    for index in range(len(config.pattern)):
        out = config.hidden_size if index == len(config.pattern) - 1 else width
        adapter = bits if bits >= 16 else ADAPTER.bits
        total += sizes.matrix_bytes(width, width, adapter) + sizes.matrix_bytes(width, out, adapter)
        for kind, _, leaf, _ in matrices(config):
            inputs, outputs = sizes.inputs_and_outputs(config, leaf)
            sides = (width, outputs) if leaf.contract == "last" else (inputs, out if kind == "mlp" else width)
            total += sizes.matrix_bytes(*sides, bits)
        total += 2 * _vectors(config, width, out)
    return total


def _vectors(config: ModelConfig, width: int, out: int) -> int:
    """Biases of a layer; norms have no weights of their own any more."""
    total = 0
    for kind in KINDS:
        for name, leaf in elastic.leaves(config, kind).items():
            if leaf.contract or name in ("norm", "inv_freq"):
                continue
            total += (out if kind == "mlp" else width) if leaf.dims == ("embed",) else elastic.parameters(config, leaf)
    return total


def rows(calibration: Calibration, rates: Sequence[float]) -> Iterator[Made]:
    """The model at every rate."""
    config = calibration.model.config
    count = len(config.pattern)
    for rate in rates:
        width = width_at(config, rate)
        model = slice_model(calibration, width)
        left = (count - 1) * layer_parameters(config, width) + layer_parameters(config, width, last=True)
        size = stored(config, width)
        note: Mapping[str, Any] = {"width": width, "slicing": 1 - width / config.hidden_size}
        made = Made(rate, sizes.removed(config, left), size // 2, size, model, BLOCKS, note=note)

        def four(made: Made = made, width: int = width) -> Made:
            rounded_model = quantize(made.model, calibration)
            return dataclasses.replace(made, bytes=stored(config, width, 4), model=rounded_model)

        yield dataclasses.replace(made, four=four)
