"""A block brought into its stored form: its matrices rounded, its output matrix fitted to what the finished ones give
it; and a whole layer trained on its output after that.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from uniql_jax import elastic
from uniql_jax.checkpoint_leaves import leaf_group, leaf_run
from uniql_jax.checkpoint_writer import reachable_bias, stored
from uniql_jax.compiling import jit
from uniql_jax.compression.devices import Devices
from uniql_jax.compression.math.reconstruct import Reconstructed, Served, reconstruct
from uniql_jax.compression.packing import Hessian, Packed, pack_leaf, pack_together
from uniql_jax.compression.refit import (
    Keep,
    hidden_gram,
    hidden_gram_and_cross,
    read_gram,
)
from uniql_jax.compression.refit import refit as refitted
from uniql_jax.compression.settings import SAMPLE_TOKENS, CompressionSettings
from uniql_jax.compression.stages.rotate import Rotation
from uniql_jax.compression.stages.running import Streams
from uniql_jax.compression.stored import matrix_dtype
from uniql_jax.config import ModelConfig
from uniql_jax.plan import grouping

Block = Mapping[str, Any]


@jit
def turned_gram(gram: Float[Array, "h h"], q: Rotation) -> Float[Array, "h h"]:
    """The Gram matrix of the rotated stream."""
    return gram if q is None else q.T @ gram @ q


def finish_block(
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
    finished = running.store.devices.everywhere(dict(done))
    for number, (x, value_of) in enumerate(running.views()):
        copies = [
            dict(own) | running.computed_with(value_of, others) for own, others in zip(originals, finished, strict=True)
        ]
        if running.keep is not None and not number:
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


def reconstructed(
    config: ModelConfig,
    index: int,
    originals: Mapping[str, Sequence[Block]],
    finished: dict[str, dict[str, Any]],
    before: Streams,
    after: Streams,
    settings: CompressionSettings,
) -> Reconstructed:
    """A finished layer whose integers and scales are trained on its output, on the first device.

    Args:
        config: the model.
        index: of the layer; it decides with the seed which windows a step sees.
        originals: its dense blocks, of which every device has a copy.
        finished: the layer.
        before: the streams before it.
        after: those after it; the unpruned one is the target.
        settings: how many steps, and with nested codes the share of the leading bits.
    """
    assert after.unpruned is not None
    sample = functools.partial(before.store.sample, tokens=SAMPLE_TOKENS)
    share = settings.nested_share
    return reconstruct(
        # a step of 3 bits is twice as wide, its squared error four times as large
        Served(config, tuple(originals), (1 - share, share / 4) if settings.nested else (1.0,)),
        finished,
        {kind: block[0] for kind, block in originals.items()},
        [sample(x) for x, _ in before.views()],
        sample(after.unpruned),
        settings.reconstruct,
        np.random.default_rng([settings.seed, index]),
    )
