"""Calibrate: one sweep forward (streams, block influence), one sweep back (what the loss feels, layer by layer)."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uniql_jax.compression.artifacts import LayerStore, layer_name
from uniql_jax.compression.contract import DenseModel, Progress
from uniql_jax.compression.finite import check_finite
from uniql_jax.compression.log import Clock
from uniql_jax.compression.sorters.base import Statistics
from uniql_jax.compression.sorting import final_gram, layer_forward, layer_statistics, loss_gradient
from uniql_jax.compression.streams import StreamStore
from uniql_jax.model.causal_lm import embed

FORWARD, GRADIENT = "forward", "gradient"
SUMMARY = "final"
Layer = dict[str, dict[str, Array]]
Top = Mapping[str, Float[Array, "..."]]


class Calibration(NamedTuple):
    """Block influence per layer, and the mean Gram matrix [hidden, hidden] of what the head reads."""

    influence: tuple[float, ...]
    final_gram: Float[Array, "h h"]


def read_ahead(read: Callable[[int], Layer], indices: Sequence[int]) -> Iterator[tuple[int, Layer]]:
    """(index, layer) on the device; the next layer is read while this one is worked on."""
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        coming = pool.submit(read, indices[0]) if indices else None
        for index, after in zip(indices, [*indices[1:], None], strict=True):
            assert coming is not None
            layer = coming.result()
            coming = pool.submit(read, after) if after is not None else None
            yield index, layer


def forward_sweep(
    source: DenseModel, top: Top, store: LayerStore, streams: StreamStore, progress: Progress
) -> Calibration:
    """Run the calibration windows through the model, keeping the stream before every layer.

    Each layer is read once. Goes on from the last stream that an earlier run kept.

    Raises:
        UserError: naming the layer, when a stream is no longer finite.
    """
    config, count, windows = source.config, len(source.config.pattern), streams.windows
    if not store.has(SUMMARY):
        known = next((i for i in range(count) if not store.has(layer_name(i))), count)
        start = streams.nearest(FORWARD, known)
        if start is None:
            start, xs = 0, [embed(top, batch, streams.dtype) for batch in windows.batches]
            streams.save(FORWARD, 0, xs)
            streams.hold(FORWARD, 0, xs)
        else:
            xs = streams.load(FORWARD, start)
        layers, clock = read_ahead(source.device_layer, range(start, count)), Clock()
        for index in progress(range(count), "calibrate"):
            if index < start:
                continue
            i, layer = next(layers)
            cosine = jnp.zeros(())
            for b, x in enumerate(xs):
                xs[b], part = layer_forward(config, config.pattern[i], layer, x)
                cosine += part
            check_finite(xs, f"layer {i}: the residual stream after it")
            streams.save(FORWARD, i + 1, xs)
            streams.hold(FORWARD, i + 1, xs)
            influence = 1.0 - float(cosine) / windows.tokens
            store.save(layer_name(i), {}, {"influence": influence})
            clock.line("calibrate", i, influence=influence)
        gram = sum(final_gram(x, config.norm_eps) for x in xs) / windows.tokens
        influence = [store.record(layer_name(i))["influence"] for i in range(count)]
        store.save(SUMMARY, {"gram": gram}, {"influence": influence})
    gram = jnp.asarray(store.load(SUMMARY)["gram"], jnp.float32)
    return Calibration(tuple(store.record(SUMMARY)["influence"]), gram)


def backward_sweep(
    source: DenseModel, top: Top, streams: StreamStore, start: int, thorough: bool = False
) -> Iterator[tuple[int, Layer, dict[str, Statistics]]]:
    """(index, layer, mean statistics) of the layers `start`, `start` - 1, ... 0, each read once.

    What one item needed is dropped from the streams when the next one is asked for: by then its layer must be stored.

    Raises:
        UserError: naming the layer and the statistic, when one is not finite.
    """
    config, count, windows = source.config, len(source.config.pattern), streams.windows
    after = next(i for i in range(start + 1, count + 1) if i == count or streams.has(GRADIENT, i))
    if streams.has(GRADIENT, after):
        gradients = streams.load(GRADIENT, after)
    else:
        pairs = zip(_stream(source, streams, count), windows.batches, strict=True)
        gradients = [loss_gradient(top, x, tokens, config.norm_eps) for x, tokens in pairs]
        streams.save(GRADIENT, count, gradients)
    for i, layer in read_ahead(source.device_layer, range(after - 1, -1, -1)):
        stats, before = None, []
        for x, gradient in zip(_stream(source, streams, i), gradients, strict=True):
            gradient, found = layer_statistics(config, config.pattern[i], layer, x, gradient, thorough)
            before.append(gradient)
            stats = found if stats is None else jax.tree.map(jnp.add, stats, found)
        means: Any = jax.tree.map(lambda value: value / windows.tokens, stats)
        check_finite(means, f"layer {i}: the statistic")
        check_finite(before, f"layer {i}: the gradient of the loss before it")
        kept = streams.save(GRADIENT, i, before)
        streams.release(FORWARD, i + 1)
        if i <= start:
            yield i, layer, means
        gradients = before
        if kept:  # nothing above it will be needed again
            streams.drop(GRADIENT, range(i + 1, count + 1))
            streams.drop(FORWARD, range(i, count + 1))


def _stream(source: DenseModel, streams: StreamStore, index: int) -> list[Float[Array, "_ t h"]]:
    """The stream before layer `index`, computed again from the nearest one on disk where it was not kept."""
    if not streams.has(FORWARD, index):
        start = streams.nearest(FORWARD, index)
        assert start is not None, "the stream before layer 0 is always kept"
        xs = streams.load(FORWARD, start)
        for j, layer in read_ahead(source.device_layer, range(start, index)):
            xs = [layer_forward(source.config, source.config.pattern[j], layer, x)[0] for x in xs]
            streams.hold(FORWARD, j + 1, xs, always=True)
    return streams.load(FORWARD, index)
