"""Reconstruction of a quantized layer: its integers and scales are trained until its output is that of the original.

GPTQ fits one matrix at a time to its own output. Here all matrices of a layer move together, by signed gradient descent
on the error of the layer's output: every weight by at most half a step before it is rounded, every scale by a few
percent (SignRound, Cheng et al., arXiv 2309.05516; BRECQ, Li et al., arXiv 2102.05426). It begins with GPTQ's integers,
and what it finds is taken only if the error over all tokens is lower.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uniql_jax.compiling import jit
from uniql_jax.compression.refit import after_block
from uniql_jax.compression.settings import STEP_TOKENS
from uniql_jax.config import ModelConfig
from uniql_jax.weights.fake_quantized import FRACTION, FakeQuantizedArray
from uniql_jax.weights.nested import NestedArray, from_nested_codes
from uniql_jax.weights.planes import OFFSET
from uniql_jax.weights.quantized import QuantizedArray, as_stored, from_codes, limits

Layer = dict[str, dict[str, Any]]
Packed = QuantizedArray | NestedArray
SCALE_RATE = 0.1
"""How fast scales move, as a share of how fast weights do."""


class Served(NamedTuple):
    """What is trained for: the model, the kinds of the layer's blocks in their order, and the weight of the squared
    error of every model that the codes serve (of all bits; of the leading ones).
    """

    config: ModelConfig
    kinds: tuple[str, ...]
    weights: tuple[float, ...]


class Grid(NamedTuple):
    """Where a leaf begins: its places in steps, close to GPTQ's integers, and its scales, those of all bits first."""

    places: Float[Array, "..."]
    scales: tuple[Float[Array, "..."], ...]


class Moves(NamedTuple):
    """What is trained of a leaf: an offset of every place, and the logarithm of a factor of every scale."""

    offset: Float[Array, "..."]
    factors: tuple[Float[Array, "..."], ...]


class Reconstructed(NamedTuple):
    """The layer {kind: {leaf: value}}; where its packed leaves lay before they were rounded, in steps, float16, of
    their logical shapes; the mean squared error of its output before and after.
    """

    layer: Layer
    places: Layer
    before: float
    after: float


def reconstruct(
    served: Served,
    layer: Layer,
    original: Mapping[str, Mapping[str, Any]],
    streams: Sequence[Float[Array, "n t h"]],
    target: Float[Array, "n t h"],
    steps: int,
    rng: np.random.Generator,
) -> Reconstructed:
    """Train a quantized layer's integers and scales on the error of its output.

    Args:
        served: the layer's blocks, and how much each model that it serves counts.
        layer: the quantized layer {kind: {leaf: value}}, packed leaves in their plain layout.
        original: its dense leaves.
        streams: what the layer reads, in every model that it serves.
        target: what it should give.
        steps: of the descent, of about STEP_TOKENS tokens each.
        rng: draws the windows of each step.

    Returns:
        The trained layer; where the error did not fall, the layer as it came.
    """
    grids = {
        kind: {n: _grid(leaf, original[kind][n]) for n, leaf in block.items() if isinstance(leaf, Packed)}
        for kind, block in layer.items()
    }
    moves = jax.tree.map(_still, grids, is_leaf=lambda part: isinstance(part, Grid))
    rows = min(len(target), max(1, STEP_TOKENS // target.shape[1]))

    def parts(chosen: Any) -> tuple[list[Array], Array]:
        return [x[chosen] for x in streams], target[chosen]

    def error(moves: Any) -> float:
        starts = range(0, len(target) - rows + 1, rows)
        return float(np.mean([_error(moves, grids, layer, *parts(slice(i, i + rows)), served) for i in starts]))

    before, order = error(moves), []
    for step in range(steps):
        if len(order) < rows:
            order = rng.permutation(len(target)).tolist()
        chosen, order = np.asarray(order[:rows]), order[rows:]
        rate = (1 - step / steps) / steps  # all steps together: half a step of the grid
        moves = _step(moves, grids, layer, *parts(chosen), rate, served)
    after = error(moves)
    if not after < before:
        moves, after = jax.tree.map(jnp.zeros_like, moves), before
    done, places = {kind: dict(block) for kind, block in layer.items()}, {kind: {} for kind in layer}
    for kind, block in grids.items():
        for name, grid in block.items():
            leaf, places[kind][name] = _rounded(layer[kind][name], grid, moves[kind][name])
            if after < before:
                done[kind][name] = leaf
    return Reconstructed(done, places, before, after)


def _still(grid: Grid) -> Moves:
    return Moves(jnp.zeros_like(grid.places), tuple(jnp.zeros_like(scale) for scale in grid.scales))


def _steps(weight: Packed, scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The scale of every weight, of the logical shape."""
    like = jax.ShapeDtypeStruct(weight.shape, jnp.float16)
    run = 1 if isinstance(weight, NestedArray) else weight.run
    return FakeQuantizedArray(like, scale, group=weight.group, contract=str(weight.contract), run=run).steps()


@jax.jit
def _grid(weight: Packed, original: Float[Array, "..."]) -> Grid:
    """Where a packed weight's original lies, or as near to that as keeps its integer."""
    if isinstance(weight, NestedArray):
        codes, scales = (
            dataclasses.replace(weight, fine=jnp.ones_like(weight.fine)).dense(),
            (weight.fine, weight.coarse),
        )
    else:
        codes, scales = dataclasses.replace(weight, scale=jnp.ones_like(weight.scale)).dense(), (weight.scale,)
    scales = tuple(scale.astype(jnp.float32) for scale in scales)
    steps = _steps(weight, scales[0])
    apart = jnp.where(steps == 0, 0.0, original / jnp.where(steps == 0, 1.0, steps) - codes)
    return Grid(codes + jnp.clip(apart, -FRACTION, FRACTION), scales)


def _through(value: Array, rounded: Array) -> Array:
    """`rounded`, with the gradient of `value` (straight-through)."""
    return value + jax.lax.stop_gradient(rounded - value)


def _scale(scale: Array, factor: Array) -> Array:
    moved = scale * jnp.exp(factor)
    return _through(moved, as_stored(moved))


def _places(weight: Packed, grid: Grid, moves: Moves) -> Array:
    shrunk = grid.places * jnp.exp(-_steps(weight, moves.factors[0]))
    return jnp.clip(shrunk + moves.offset, *limits(4 if isinstance(weight, NestedArray) else weight.bits))


def _values(weight: Packed, grid: Grid, moves: Moves) -> tuple[Float[Array, "..."], ...]:
    """What a leaf stands for in every model, float32, differentiable in the moves."""
    steps = [_steps(weight, _scale(*pair)) for pair in zip(grid.scales, moves.factors, strict=True)]
    places = _places(weight, grid, moves)
    codes = _through(places, jnp.round(places))
    if not isinstance(weight, NestedArray):
        return (codes * steps[0],)
    leading = _through(codes / 2, jnp.floor(codes / 2))
    return codes * steps[0], (leading + OFFSET) * steps[1]


def _loss(moves: Any, grids: Any, layer: Layer, streams: Sequence[Array], target: Array, served: Served) -> Array:
    views: list[Layer] = [{kind: dict(block) for kind, block in layer.items()} for _ in served.weights]
    for kind, block in grids.items():
        for name, grid in block.items():
            for view, value in zip(views, _values(layer[kind][name], grid, moves[kind][name]), strict=True):
                view[kind][name] = value
    total = jnp.zeros(())
    for view, weight, x in zip(views, served.weights, streams, strict=True):
        found = x.astype(jnp.float32)
        for kind in served.kinds:
            found = after_block(served.config, kind, view[kind], found, None)
        total += weight * jnp.mean(jnp.square(found - target.astype(jnp.float32)))
    return total


_error: Callable[..., Array] = functools.partial(jit, static_argnames="served")(_loss)


@functools.partial(jit, static_argnames="served", donate_argnums=0)
def _step(
    moves: Any, grids: Any, layer: Layer, streams: Sequence[Array], target: Array, rate: Array | float, served: Served
) -> Any:
    """The moves after one step against the signs of their gradient."""
    gradient = jax.grad(_loss)(moves, grids, layer, streams, target, served)

    def moved(old: Moves, slope: Moves) -> Moves:
        factors = [f - SCALE_RATE * rate * jnp.sign(s) for f, s in zip(old.factors, slope.factors, strict=True)]
        return Moves(old.offset - rate * jnp.sign(slope.offset), tuple(factors))

    return jax.tree.map(moved, moves, gradient, is_leaf=lambda part: isinstance(part, Moves))


def _rounded(weight: Packed, grid: Grid, moves: Moves) -> tuple[Packed, Float[Array, "..."]]:
    """A leaf as it is stored, and where it lay before it was rounded."""
    places = _places(weight, grid, moves)
    codes = jnp.round(places)
    near = (codes + jnp.clip(places - codes, -FRACTION, FRACTION)).astype(jnp.float16)
    scales = [_scale(*pair) for pair in zip(grid.scales, moves.factors, strict=True)]
    codes, *scales = (part.reshape(-1, part.shape[-1]) for part in (codes.astype(jnp.int8), *scales))
    if weight.contract == "first":
        codes, *scales = (part.T for part in (codes, *scales))
    common: dict[str, Any] = {"group": weight.group, "contract": str(weight.contract), "shape": tuple(weight.shape)}
    if isinstance(weight, NestedArray):
        return from_nested_codes(codes, *scales, **common), near
    return from_codes(codes, scales[0], bits=weight.bits, run=weight.run, **common), near
