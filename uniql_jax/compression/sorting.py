"""First pass, layer by layer: gather statistics on calibration windows, then bring every elastic axis into order."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.compiling import jit
from uniql_jax.compression.math.gram import gram
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.sorters import SORTERS
from uniql_jax.compression.sorters.base import Statistics, Taps
from uniql_jax.config import ModelConfig
from uniql_jax.model.causal_lm import apply_layer
from uniql_jax.model.layers import KINDS
from uniql_jax.model.layers.context import full_context
from uniql_jax.model.layers.norm import rms_norm

Block = Mapping[str, Any]


@functools.partial(jit, static_argnames=("config", "kinds"))
def layer_forward(
    config: ModelConfig, kinds: tuple[str, ...], layer: Mapping[str, Block], x: Float[Array, "b t h"]
) -> tuple[Float[Array, "b t h"], Float[Array, ""]]:
    """One batch of windows through a layer: its output in x's dtype, and the sum over tokens of the cosine between the
    layer's input and output (block influence is one minus its mean).
    """
    wide = x.astype(jnp.float32)
    y = apply_layer(config, kinds, layer, wide, full_context(jnp.ones(x.shape[:2], bool), padded=False))
    return y.astype(x.dtype), jnp.sum(cosine(wide, y))


def cosine(x: Float[Array, "*b h"], y: Float[Array, "*b h"]) -> Float[Array, "*b"]:
    """Cosine between vectors of any finite size; 1 between two zero vectors, 0 between a zero vector and another."""

    def unit(z: Array) -> tuple[Array, Array]:
        peak = jnp.max(jnp.abs(z), axis=-1, keepdims=True)
        z = z / jnp.where(peak == 0, 1.0, peak)
        return z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1.0), peak[..., 0]

    (x, of_x), (y, of_y) = unit(x), unit(y)
    return jnp.where((of_x == 0) & (of_y == 0), 1.0, jnp.sum(x * y, axis=-1))


@functools.partial(jit, static_argnames=("config", "kinds", "thorough"), donate_argnames=("stats",))
def layer_statistics(
    config: ModelConfig,
    kinds: tuple[str, ...],
    layer: Mapping[str, Block],
    x: Float[Array, "b t h"],
    gradient: Float[Array, "b t h"],
    stats: Mapping[str, Statistics],
    thorough: bool = False,
) -> tuple[Float[Array, "b t h"], dict[str, Statistics]]:
    """One batch back through a layer: gradient of the loss at its input from the one at its output, in its dtype, and
    every block's float32 sums over tokens added to `stats`, whose memory is taken over; `thorough` adds those that only
    other scores than the defaults need.
    """
    gradient, found = _statistics(config, kinds, layer, x, gradient, thorough)
    return gradient, jax.tree.map(jnp.add, stats, found)


def no_statistics(
    config: ModelConfig,
    kinds: tuple[str, ...],
    layer: Mapping[str, Block],
    shape: tuple[int, ...],
    thorough: bool = False,
) -> dict[str, Statistics]:
    """What `layer_statistics` begins with: zeros; `shape` is that of a batch."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = jax.eval_shape(lambda layer, x: _statistics(config, kinds, layer, x, x, thorough)[1], layer, x)
    return jax.tree.map(lambda value: jnp.zeros(value.shape, value.dtype), found)


def _statistics(
    config: ModelConfig,
    kinds: tuple[str, ...],
    layer: Mapping[str, Block],
    x: Float[Array, "b t h"],
    gradient: Float[Array, "b t h"],
    thorough: bool,
) -> tuple[Float[Array, "b t h"], dict[str, Statistics]]:
    dtype = gradient.dtype
    x, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    context = full_context(jnp.ones(x.shape[:2], bool), padded=False)
    pulls, outputs = [], x
    for kind in kinds:
        leaves = layer[kind]

        def run(x: Array, tap: Taps, kind: str = kind, leaves: Block = leaves) -> tuple[Array, Any]:
            normed = KINDS[kind].read(config, leaves, x)
            hidden, seen = SORTERS[kind].run(config, leaves, normed, context, tap)
            return x + KINDS[kind].write(leaves, hidden), (normed, hidden, seen)

        shapes = SORTERS[kind].taps(config)
        tap = {name: jnp.zeros((*x.shape[:2], *shape), x.dtype) for name, shape in shapes.items()}
        outputs, pull, found = jax.vjp(run, outputs, tap, has_aux=True)
        pulls.append((kind, pull, found))
    stats: dict[str, Statistics] = {}
    for kind, pull, (normed, hidden, seen) in reversed(pulls):
        fisher = gram(gradient, gradient.shape[-1])
        gradient, slope = pull(gradient)
        stats[kind] = SORTERS[kind].statistics(config, normed, hidden, seen, slope, thorough) | {"fisher": fisher}
    return gradient.astype(dtype), stats


def sort_layer(
    config: ModelConfig,
    kinds: tuple[str, ...],
    layer: Mapping[str, Block],
    stats: Mapping[str, Statistics],
    options: CompressionSettings,
    seed: Int[Array, ""] | int = 0,
) -> tuple[dict[str, Block], dict[str, Float[Array, " _"]]]:
    """The layer with every elastic axis sorted, most important first, and per axis the estimated loss of keeping
    0 ... all of its entries; `stats` are means over tokens.

    Not for `jax.jit`: V/O is decomposed on the host.
    """
    done, losses = {}, {}
    for kind in kinds:
        done[kind], found = SORTERS[kind].sort(config, layer[kind], stats[kind], options, seed)
        losses |= found
    return done, losses


@functools.partial(jit, static_argnames=("eps", "rows"))
def loss_gradient(
    top: Mapping[str, Array], x: Float[Array, "b t h"], tokens: Int[Array, "b t"], eps: float, rows: int = 1024
) -> Float[Array, "b t h"]:
    """Gradient of the summed next-token loss at the last layer's output, in x's dtype.

    Logits are large: they exist for `rows` tokens at a time, whatever the windows' length.
    """
    batch, length, hidden = x.shape
    head = top.get("head", top["embed"])

    def loss(x: Array, target: Array, weight: Array) -> Array:
        log_probs = jax.nn.log_softmax(rms_norm(x.astype(jnp.float32), top["norm"], eps) @ head.T)
        return -jnp.sum(weight * jnp.take_along_axis(log_probs, target[:, None], axis=1)[:, 0])

    # A window's last token has no next one.
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    weights = jnp.broadcast_to(jnp.arange(length) < length - 1, tokens.shape).astype(jnp.float32)
    count = batch * length
    pieces = -(-count // rows)
    each = -(-count // pieces)

    def pieced(value: Array) -> Array:
        flat = value.reshape(count, *value.shape[2:])
        padded = jnp.pad(flat, [(0, pieces * each - count)] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(pieces, each, *flat.shape[1:])

    found = jax.lax.map(lambda piece: jax.grad(loss)(*piece), (pieced(x), pieced(targets), pieced(weights)))
    return found.reshape(-1, hidden)[:count].reshape(x.shape)


@functools.partial(jit, static_argnames=("eps",))
def final_gram(x: Float[Array, "b t h"], eps: float) -> Float[Array, "h h"]:
    """Summed Gram matrix of the final norm's output before its weight: what the head will read."""
    x = x.astype(jnp.float32)
    unit = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return gram(unit, x.shape[-1])
