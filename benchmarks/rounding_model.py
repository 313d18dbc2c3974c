"""A whole model rounded one way: its layers one after the other, fitted to what the rounded ones before feed them."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import stages
from benchmarks.quality import Cached
from benchmarks.rounding_math import Method, by_rows, dequantized, round_columns
from uniql_jax import elastic
from uniql_jax.checkpoint_writer import reachable_bias
from uniql_jax.compression.math.nested import quantize_nested
from uniql_jax.compression.math.refine import output_error
from uniql_jax.compression.refit import advance, hidden_gram, hidden_gram_and_cross, read_gram, refit
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.sorting import sort_layer
from uniql_jax.compression.stages.rotate import rotated_layer, rotated_top, rotation
from uniql_jax.convert.source import open_source
from uniql_jax.model.causal_lm import embed
from uniql_jax.model.layers import KINDS
from uniql_jax.plan import grouping
from uniql_jax.weights.planes import OFFSET
from uniql_jax.weights.quantized import group_size

RIDGE = 1e-2
PLAIN = Method()


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to round a model: matrices of the layers, embedding and head (None: like the layers), whether the stream
    is rotated, whether weights are first fitted to give the original's outputs, a mix of llama.cpp instead of all
    that, and whether tasks are measured.
    """

    name: str
    body: Method = PLAIN
    top: Method | None = None
    rotate: bool = True
    compensate: bool = False
    mix: str | None = None
    tasks: bool = False


class Model(NamedTuple):
    """A sorted model in memory, what it is fitted on, and the estimated losses of its axes, by layer."""

    config: Any
    layers: list[dict[str, dict[str, Any]]]
    top: dict[str, Any]
    final_gram: Any
    batches: list[Any]
    losses: list[dict[str, np.ndarray]]


@dataclasses.dataclass
class View:
    """A rounded model in the making: nested codes have one for 4 and one for 3 bits, all others a single one."""

    label: str
    x: list[Any] = dataclasses.field(default_factory=list)
    layers: list[Any] = dataclasses.field(default_factory=list)
    top: dict[str, Any] = dataclasses.field(default_factory=dict)
    bytes: int = 0


def _summed(function: Callable[..., Any], *streams: Sequence[Any]) -> Any:
    found = [function(*batch) for batch in zip(*streams, strict=True)]
    return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *found)


def round_matrix(columns: Any, hessians: Sequence[Any], method: Method, group: int) -> list[tuple[Any, int]]:
    """(what columns are rounded to, bytes) of every view."""
    width, count = columns.shape
    spare = -width % group
    columns = jnp.pad(columns, ((0, spare), (0, 0)))
    hessians = [jnp.pad(hessian, ((0, spare), (0, spare))) for hessian in hessians]
    scales = 2 * count * (width + spare) // group
    if method.share is None:
        codes, scale = by_rows(round_columns, columns, group, hessians[0], method=method)
        return [(dequantized(codes, scale, group)[:width], width * count * method.bits // 8 + scales)]
    how = {"share": method.share, "sweeps": method.sweeps, "damping": method.damping}
    codes, fine, coarse = by_rows(quantize_nested, columns, group, tuple(hessians), **how)
    whole, leading = dequantized(codes, fine, group), dequantized(jnp.floor(codes / 2), coarse, group, OFFSET)
    return [(whole[:width], width * count * 4 // 8 + 2 * scales), (leading[:width], width * count * 3 // 8 + scales)]


def build(model: Model, row: Row, settings: CompressionSettings) -> tuple[list[View], dict[str, list[float]]]:
    """Round the whole model; relative output errors of the matrices by leaf as well."""
    config = model.config
    q = rotation(config, dataclasses.replace(settings, bits=4, rotate=row.rotate))
    names = ["4 bits", "3 bits"] if row.body.share is not None else [""]
    views = [View(name) for name in names]
    errors: dict[str, list[float]] = {}
    round_top(model, row, q, views)
    turned = rotated_top(model.top, q)
    target = [embed({"embed": turned["embed"]}, batch, jnp.float32) for batch in model.batches]
    for view in views:
        view.x = [embed({"embed": view.top["embed"]}, batch, jnp.float32) for batch in model.batches]
    for index, layer in enumerate(model.layers):
        original = rotated_layer(layer, q)
        done: list[dict[str, Any]] = [{} for _ in views]
        for kind in config.pattern[index]:
            finished = _round_block(config, kind, original[kind], views, target, row, errors)
            for view, blocks, block in zip(views, done, finished, strict=True):
                blocks[kind] = block
                view.x = [advance(config, kind, block, x, None) for x in view.x]
            target = [advance(config, kind, original[kind], t, None) for t in target]
        for view, blocks in zip(views, done, strict=True):
            view.layers.append(blocks)
    return views, errors


def round_top(model: Model, row: Row, q: Any, views: list[View]) -> None:
    """Embedding, norm and head of every view, with the Hessians of the pass."""
    turned, norm, gram = rotated_top(model.top, q), model.top["norm"], model.final_gram
    method = row.top or row.body
    read = norm[:, None] * gram * norm if q is None or "head" not in turned else gram
    read = read if q is None else q.T @ read @ q
    size = read.shape[0]
    mixed = read / jnp.mean(jnp.diagonal(read)) + CompressionSettings.embed_mix * jnp.eye(size)
    hessians = {"head": read, "embed": jnp.eye(size) if "head" in turned else mixed}
    group = _group(model.config, "embed", size, method)
    for name, value in turned.items():
        if name not in hessians:
            for view in views:
                view.top[name] = value
                view.bytes += 2 * value.size
            continue
        found = round_matrix(jnp.asarray(value).T, [hessians[name]] * len(views), method, group)
        for view, (rounded, size) in zip(views, found if len(found) == len(views) else found * 2, strict=True):
            view.top[name] = rounded.T
            view.bytes += size


def _group(config: Any, axis: str, width: int, method: Method) -> int:
    """The pass's own group where the size aimed at is its own."""
    return grouping(config)["groups"][axis] if method.group == PLAIN.group else group_size(width, method.group)


def _round_block(
    config: Any,
    kind: str,
    original: Mapping[str, Any],
    views: list[View],
    target: list[Any],
    row: Row,
    errors: dict[str, list[float]],
) -> list[dict[str, Any]]:
    """A block of every view: first the matrices that read the stream, then the output matrix."""
    leaves, method = elastic.leaves(config, kind), row.body
    tokens = sum(x.shape[0] * x.shape[1] for x in target)
    done: list[dict[str, Any]] = [{} for _ in views]
    hessians = [_summed(lambda x: read_gram(config, kind, original, x), view.x) / tokens for view in views]
    for name, leaf in leaves.items():
        value = jnp.asarray(original[name])
        if leaf.contract is None:
            for view, block in zip(views, done, strict=True):
                block[name] = value
                view.bytes += 2 * value.size
            continue
        if leaf.contract == "first":
            continue
        columns = value.reshape(-1, value.shape[-1]).T
        if row.compensate:
            gram, cross = _summed(functools.partial(_read_and_cross, config, kind, original), views[0].x, target)
            columns = refit(gram / tokens, cross @ columns / tokens, columns, RIDGE)
        group = _group(config, "embed", len(columns), method)
        found = round_matrix(columns, hessians, method, group)
        errors.setdefault(f"{kind}.{name}", []).append(float(output_error(columns, found[0][0], hessians[0])))
        for view, block, (rounded, size) in zip(views, done, found, strict=True):
            block[name] = rounded.T.reshape(value.shape)
            view.bytes += size
    for name, leaf in leaves.items():
        if leaf.contract != "first":
            continue
        value = jnp.asarray(original[name])
        columns, grams = value.reshape(-1, value.shape[-1]), []
        for view, block in zip(views, done, strict=True):
            working = {**original, **block}
            grams.append(_summed(lambda x, w=working: hidden_gram(config, kind, w, x, None), view.x) / tokens)
        if row.compensate:
            working = {**original, **done[0]}
            cross = _summed(
                lambda x, t, w=working: hidden_gram_and_cross(config, kind, w, original, x, t, {}, "stream")[1],
                views[0].x,
                target,
            )
            columns = refit(grams[0], cross / tokens, columns, RIDGE)
        found = round_matrix(columns, grams, method, _group(config, leaf.dims[0], len(columns), method))
        errors.setdefault(f"{kind}.{name}", []).append(float(output_error(columns, found[0][0], grams[0])))
        for view, block, (rounded, size) in zip(views, done, found, strict=True):
            block[name] = rounded.reshape(value.shape)
            view.bytes += size
    return [jax.tree.map(jnp.asarray, reachable_bias(config, kind, block)) for block in done]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read_and_cross(config: Any, kind: str, leaves: Any, x: Any, t: Any) -> tuple[Any, Any]:
    """Gram matrix of what the input matrices receive, and its product with what the original's receive."""
    mine, theirs = (KINDS[kind].read(config, leaves, value).reshape(-1, value.shape[-1]) for value in (x, t))
    return mine.T @ mine, mine.T @ theirs


def sorted_model(ckpt: str, calibration: np.ndarray, settings: CompressionSettings, batch_tokens: int) -> Model:
    """The model as the pass sorts it, and its calibration windows."""
    source = Cached(open_source(ckpt))
    config = source.config
    with tempfile.TemporaryDirectory() as folder:
        measured = stages.measure(source, calibration, Path(folder), batch_tokens)
        layers: dict[int, Any] = {}
        losses: dict[int, dict[str, np.ndarray]] = {}
        for i, layer, means in measured.layers:
            layers[i], found = sort_layer(config, config.pattern[i], layer, means, settings, settings.seed + i)
            losses[i] = {axis: np.asarray(loss, np.float64) for axis, loss in found.items()}
        return Model(
            config,
            [layers[i] for i in range(len(layers))],
            dict(measured.top),
            measured.calibration.final_gram,
            list(measured.windows.batches),
            [losses[i] for i in range(len(layers))],
        )
