"""Quantize: bring every layer into its stored form, fitted to what the finished layers before it feed it.

The finished model's stream runs along, and with the nested refit the unpruned model's, whose output is the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from uniql_jax import elastic
from uniql_jax.checkpoint import leaf_group, leaf_run, reachable_bias, stored
from uniql_jax.compression.artifacts import LayerStore, flatten, layer_name
from uniql_jax.compression.compiling import jit
from uniql_jax.compression.contract import Progress, SortedModel
from uniql_jax.compression.devices import Devices
from uniql_jax.compression.finite import check_finite
from uniql_jax.compression.log import Clock
from uniql_jax.compression.packing import Hessian, Packed, pack_leaf, pack_together
from uniql_jax.compression.refit import (
    Keep,
    hidden_gram,
    hidden_gram_and_cross,
    read_gram,
)
from uniql_jax.compression.refit import refit as refitted
from uniql_jax.compression.sensitivity import TOKENS, block_points, top_points
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.stages.calibrate import Calibration, Top, read_ahead
from uniql_jax.compression.stages.rotate import Rotation, rotated_layer, rotated_top, rotation
from uniql_jax.compression.stages.running import Streams, resume
from uniql_jax.compression.stored import TOP, StoredLayers, matrix_dtype
from uniql_jax.compression.streams import StreamStore
from uniql_jax.config import ModelConfig
from uniql_jax.plan import grouping
from uniql_jax.weights.nested import NestedArray
from uniql_jax.weights.quantized import QuantizedArray, dense

Block = Mapping[str, Any]
LOST = "lost"
"""Name of the entry whose record says what embedding and head lose with their last bits."""


def quantize(
    model: SortedModel,
    calibration: Calibration,
    settings: CompressionSettings,
    done: LayerStore,
    unrounded: LayerStore | None,
    streams: StreamStore,
    progress: Progress,
    fisher: LayerStore | None = None,
) -> None:
    """Rotate every layer and write it in its stored form.

    Goes on after the layers that an earlier run finished; nothing is computed when all are there.

    Args:
        model: dense layers, the leaves outside them, and the plan.
        calibration: what the head reads.
        settings: bits, rotation, rounding and refit.
        done: gets the finished layers.
        unrounded: gets what was rounded as well, in steps, for tuning; None: nobody wants it.
        streams: keep what runs along, over the calibration windows.
        progress: called with the layers.
        fisher: Gram matrices of the loss's gradient after every block, where codes are nested: the records of the
            finished layers say what their bits and units lose.

    Raises:
        UserError: naming layer and tensor, when a finished weight or scale is not finite.
    """
    config, q = model.config, rotation(model.config, settings)
    stored_layers, count = StoredLayers(config, settings, done), len(config.pattern)
    if not done.has(TOP):
        finished, offsets = _finish_top(
            config, model.top, q, calibration, settings, unrounded is not None, streams.devices
        )
        check_finite(finished, "outside the layers, quantized:")
        if unrounded is not None:
            unrounded.save(TOP, offsets)
        done.save(TOP, finished)
    start = next((i for i in range(count) if not done.has(layer_name(i))), count)
    if start == count and (not settings.nested or done.has(LOST)):
        return
    running = None
    if settings.packed or settings.refit is not None:
        running = resume(model, q, settings, stored_layers, streams, start)
    qs = streams.devices.everywhere(q)
    dense_layers, clock = read_ahead(model.layers.layer, range(start, count), streams.devices), Clock()
    for index in progress(range(count), "quantize" if settings.packed else "finish"):
        if index < start:
            continue
        i, copies = next(dense_layers)
        originals = [rotated_layer(layer, own) for layer, own in zip(copies, qs, strict=True)]
        original = originals[0]
        finished, offsets, points = {}, {}, {}
        for kind in config.pattern[i]:
            finished[kind], offsets[kind] = _finish_block(
                config, i, kind, [each[kind] for each in originals], running, settings, unrounded is not None,
                streams.devices,
            )  # fmt: skip
            if running is not None and fisher is not None:
                gram = turned_gram(jnp.asarray(fisher.load(layer_name(i))[kind], jnp.float32), q)
                sample = streams.sample(running.x, TOKENS)
                points |= block_points(config, kind, finished[kind], model.plan.units, gram, sample)
            if running is not None:
                running = running.after(config, i, kind, finished[kind], [each[kind] for each in originals])
        check_finite(finished, f"layer {i}, quantized:")
        if unrounded is not None:
            unrounded.save(layer_name(i), flatten(offsets))
        if running is not None:
            running.save(i + 1)
        done.save(layer_name(i), flatten(finished), points)
        error = _relative_error(finished, {kind: dict(original[kind]) for kind in finished})
        clock.line("quantize", i, relative_error=round(float(error), 5))
        if running is not None:
            running.drop_before(i + 1)
    if running is not None and fisher is not None:
        gram = turned_gram(jnp.asarray(fisher.load(layer_name(0))[config.pattern[0][0]], jnp.float32), q)
        tokens, last = (streams.sample(part, TOKENS) for part in (streams.windows.batches, running.x))
        done.save(LOST, {}, top_points(config, stored_layers.top(), tokens, last, gram))


@jit
def _relative_error(finished: Mapping[str, Block], original: Mapping[str, Block]) -> Float[Array, ""]:
    """Norm of what quantizing changed in a layer's packed leaves over their norm."""
    pairs = [
        (dense(value).astype(jnp.float32), original[kind][name])
        for kind, block in finished.items()
        for name, value in block.items()
        if isinstance(value, QuantizedArray | NestedArray)
    ]
    change = sum(jnp.sum(jnp.square(after - before)) for after, before in pairs)
    return jnp.sqrt(change / sum(jnp.sum(jnp.square(before)) for _, before in pairs)) if pairs else jnp.zeros(())


def _finish_top(
    config: ModelConfig,
    top: Top,
    q: Rotation,
    calibration: Calibration,
    settings: CompressionSettings,
    offsets: bool,
    devices: Devices,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Embedding, norm and head as they will be stored, and with `offsets` what was rounded, in steps."""
    norm, gram, dtype = top["norm"], calibration.final_gram, matrix_dtype(settings)
    turned = rotated_top(top, q)
    if not settings.packed:
        return {name: stored(elastic.TOP[name], value, dtype, name) for name, value in turned.items()}, {}
    # A rotated head holds the norm's weight itself.
    read = turned_gram(gram if q is not None and "head" in turned else norm[:, None] * gram * norm, q)
    out: dict[str, Any] = {n: stored(elastic.TOP[n], value, dtype, n) for n, value in turned.items() if n != "head"}
    if "head" in turned:
        hessians = {"head": read, "embed": None}
    else:
        # One table is read as embedding and as head: its errors count in both ways.
        scale = jnp.mean(jnp.diagonal(read)) + jnp.finfo(jnp.float32).tiny
        hessians = {"embed": read / scale + settings.embed_mix * jnp.eye(read.shape[0])}
    before, group = {}, grouping(config, settings.portable)["groups"]["embed"]
    for name, hessian in hessians.items():
        pair = _of_views(settings, hessian, jnp.eye(config.hidden_size))
        done = pack_leaf(elastic.TOP[name], turned[name], pair, settings, group, offsets, devices)
        out[name] = done.weight
        if done.unrounded is not None:
            before[name] = done.unrounded
    return out, before


def _of_views(settings: CompressionSettings, hessian: Array | None, otherwise: Float[Array, "h h"]) -> Hessian:
    """A Hessian for each model that codes serve: nested ones, outside the layers, serve two with the same inputs."""
    if not settings.nested:
        return hessian
    hessian = otherwise if hessian is None else hessian
    return hessian, hessian


@jit
def turned_gram(gram: Float[Array, "h h"], q: Rotation) -> Float[Array, "h h"]:
    """The Gram matrix of the rotated stream."""
    return gram if q is None else q.T @ gram @ q


def _finish_block(
    config: ModelConfig,
    index: int,
    kind: str,
    originals: Sequence[Block],
    running: Streams | None,
    settings: CompressionSettings,
    offsets: bool,
    devices: Devices,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """A block, of which every device has a copy, in its stored form, and with `offsets` what its packed leaves were
    before rounding, in steps.

    First the matrices that read the stream, which share one Hessian, then vectors, then the output matrix, fitted to
    what the finished ones give it.
    """
    leaves, dtype, meta = elastic.leaves(config, kind), matrix_dtype(settings), grouping(config, settings.portable)
    original = originals[0]
    done: dict[str, Any] = {}
    before: dict[str, Array] = {}

    def take(name: str, value: Packed) -> None:
        done[name] = value.weight
        if value.unrounded is not None:
            before[name] = value.unrounded

    hessian = None
    if running is not None and settings.packed and (settings.rounding == "gptq" or settings.scale_search):
        tokens = running.store.windows.tokens
        grams = [
            running.store.summed(lambda block, x: read_gram(config, kind, block, x), originals, x) / tokens
            for x, _ in running.views()
        ]
        hessian = (grams[0], grams[1]) if settings.nested else grams[0]
    reading = {name: original[name] for name, leaf in leaves.items() if settings.packed and leaf.contract == "last"}
    if reading:
        for name, value in pack_together(reading, hessian, settings, meta["groups"]["embed"], offsets, devices).items():
            take(name, value)
    for name, leaf in leaves.items():
        if leaf.contract != "first" and name not in reading:
            done[name] = stored(leaf, original[name], dtype, f"layers.{index}.{kind}.{name}")
    for name, leaf in leaves.items():
        if leaf.contract == "first":
            weight, gram = _output(config, index, kind, originals, done, name, running, settings, hessian is not None)
            if settings.packed:
                group, run = leaf_group(meta, leaf), leaf_run(meta, leaf)
                take(name, pack_leaf(leaf, weight, gram, settings, group, offsets, devices, run))
            else:
                done[name] = stored(leaf, weight, dtype, f"layers.{index}.{kind}.{name}")
    return reachable_bias(config, kind, done), before


def _output(
    config: ModelConfig,
    index: int,
    kind: str,
    originals: Sequence[Block],
    done: Block,
    name: str,
    running: Streams | None,
    settings: CompressionSettings,
    weighted: bool,
) -> tuple[Float[Array, "..."], Hessian]:
    """The output matrix, refitted where that was asked, and the mean Gram matrix of what it contracts if `weighted`;
    of a block whose other matrices are `done`.
    """
    weight = originals[0][name]
    if running is None:
        return weight, None
    tokens = running.store.windows.tokens
    kept: Sequence[Keep | None] = running.kept(index)
    grams = []
    for number, (x, value_of) in enumerate(running.views()):
        working = dict(originals[0]) | {leaf: value_of(value) for leaf, value in done.items()}
        copies = running.store.devices.everywhere(working)
        if running.unpruned is not None and not number:
            weight, gram = _refitted(config, kind, originals, copies, name, running, settings, kept)
            grams.append(gram)
        elif weighted:
            gram = running.store.summed(
                lambda block, x, keep: hidden_gram(config, kind, block, x, keep), copies, x, kept
            )
            grams.append(gram / tokens)
    if not grams:
        return weight, None
    return weight, (grams[0], grams[1]) if len(grams) > 1 else grams[0]


def _refitted(
    config: ModelConfig,
    kind: str,
    originals: Sequence[Block],
    copies: Sequence[Block],
    name: str,
    running: Streams,
    settings: CompressionSettings,
    kept: Sequence[Keep | None],
) -> tuple[Float[Array, "..."], Float[Array, "k k"]]:
    """The output matrix, refitted for all rates, and the mean Gram matrix of what it contracts."""
    weight, target = originals[0][name], settings.refit_target
    tokens = running.store.windows.tokens
    gram, cross = running.store.summed(
        lambda both, x, t, keep: hidden_gram_and_cross(config, kind, *both, x, t, keep, target),
        list(zip(copies, originals, strict=True)),
        running.x,
        running.unpruned or [],
        kept,
    )
    gram, cross = gram / tokens, cross / tokens
    flat = weight.reshape(-1, weight.shape[-1])
    return refitted(gram, cross, flat, settings.refit_ridge).reshape(weight.shape), gram
