"""Quantize: bring every layer into its stored form, fitted to what the finished layers before it feed it.

The finished model's stream runs along, and with the nested refit the unpruned model's, whose output is the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from uniql_jax import elastic
from uniql_jax.checkpoint_writer import stored
from uniql_jax.compiling import jit
from uniql_jax.compression.artifacts import LayerStore, flatten, layer_name
from uniql_jax.compression.contract import Progress, SortedModel
from uniql_jax.compression.devices import Devices
from uniql_jax.compression.finite import check_finite
from uniql_jax.compression.log import Clock
from uniql_jax.compression.packing import Hessian, pack_leaf
from uniql_jax.compression.sensitivity import TOKENS, block_points, top_points
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.stages.blocks import finish_block, reconstructed, turned_gram
from uniql_jax.compression.stages.calibrate import Calibration, Top, read_ahead
from uniql_jax.compression.stages.rotate import Rotation, rotated_layer, rotated_top, rotation
from uniql_jax.compression.stages.running import Streams, resume
from uniql_jax.compression.stored import TOP, StoredLayers, matrix_dtype
from uniql_jax.compression.streams import StreamStore
from uniql_jax.config import ModelConfig
from uniql_jax.plan import grouping
from uniql_jax.weights.nested import NestedArray
from uniql_jax.weights.protocol import dense
from uniql_jax.weights.quantized import QuantizedArray

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

    def lost(i: int, kind: str, block: Block, running: Streams) -> dict[str, Any]:
        """What a block's bits and units lose, where codes are nested."""
        if fisher is None:
            return {}
        gram = turned_gram(jnp.asarray(fisher.load(layer_name(i))[kind], jnp.float32), q)
        return block_points(config, kind, block, model.plan.units, gram, streams.sample(running.x, TOKENS))

    qs = streams.devices.everywhere(q)
    dense_layers, clock = read_ahead(model.layers.layer, range(start, count), streams.devices), Clock()
    for index in progress(range(count), "quantize" if settings.packed else "finish"):
        if index < start:
            continue
        i, copies = next(dense_layers)
        originals = [rotated_layer(layer, own) for layer, own in zip(copies, qs, strict=True)]
        original = originals[0]
        own = {kind: [each[kind] for each in originals] for kind in config.pattern[i]}
        finished, offsets, points, logged = {}, {}, {}, {}
        before = running if settings.reconstruct else None
        for kind, block in own.items():
            finished[kind], offsets[kind] = finish_block(
                config, i, kind, block, running, settings, unrounded is not None, streams.devices
            )
            if running is not None:
                points |= lost(i, kind, finished[kind], running)
                running = running.after(config, i, kind, finished[kind], block)
        if before is not None and running is not None:
            trained = reconstructed(config, i, own, finished, before, running, settings)
            finished, running = trained.layer, before
            logged = {"output_error": trained.before, "reconstructed": trained.after}
            offsets = {kind: {name: trained.places[kind][name] for name in block} for kind, block in offsets.items()}
            for kind, block in own.items():
                points |= lost(i, kind, finished[kind], running)
                running = running.after(config, i, kind, finished[kind], block)
        check_finite(finished, f"layer {i}, quantized:")
        if unrounded is not None:
            unrounded.save(layer_name(i), flatten(offsets))
        if running is not None:
            running.save(i + 1)
        done.save(layer_name(i), flatten(finished), points)
        error = _relative_error(finished, {kind: dict(original[kind]) for kind in finished})
        clock.line("quantize", i, relative_error=round(float(error), 5), **logged)
        if running is not None:
            running.drop_before(i + 1)
    if running is not None and fisher is not None:
        kind = config.pattern[0][0]
        gram = turned_gram(jnp.asarray(fisher.load(layer_name(0))[kind], jnp.float32), q)
        tokens, last = (streams.sample(part, TOKENS) for part in (streams.windows.batches, running.x))
        first = kind, stored_layers.layer(0)[kind]
        done.save(LOST, {}, top_points(config, stored_layers.top(), first, tokens, last, gram))


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
