"""Calibrate: one sweep forward (streams, block influence), one sweep back (what the loss feels, layer by layer)."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.compiling import jit
from uniql_jax.compression.artifacts import LayerStore, layer_name
from uniql_jax.compression.contract import DenseModel, Progress
from uniql_jax.compression.devices import Devices
from uniql_jax.compression.finite import check_finite, peak
from uniql_jax.compression.log import Clock
from uniql_jax.compression.sorters.base import Statistics
from uniql_jax.compression.sorting import final_gram, layer_forward, layer_statistics, loss_gradient, no_statistics
from uniql_jax.compression.streams import Batch, Stream, StreamStore
from uniql_jax.config import ModelConfig
from uniql_jax.model.causal_lm import embed

FORWARD, GRADIENT = "forward", "gradient"
SUMMARY = "final"
Kinds = tuple[str, ...]
Layer = dict[str, dict[str, Array]]
Top = Mapping[str, Float[Array, "..."]]


class Calibration(NamedTuple):
    """Block influence per layer, and the mean Gram matrix [hidden, hidden] of what the head reads."""

    influence: tuple[float, ...]
    final_gram: Float[Array, "h h"]


def read_ahead(
    read: Callable[[int], Layer], indices: Sequence[int], devices: Devices
) -> Iterator[tuple[int, list[Layer]]]:
    """(index, copies of the layer for every device); the next layer is read while this one is worked on."""

    def place(index: int) -> list[Layer]:
        return devices.everywhere(read(index))

    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        coming = pool.submit(place, indices[0]) if indices else None
        for index, after in zip(indices, [*indices[1:], None], strict=True):
            assert coming is not None
            layer = coming.result()
            coming = pool.submit(place, after) if after is not None else None
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
    tops = streams.devices.everywhere(top)
    if not store.has(SUMMARY):
        known = next((i for i in range(count) if not store.has(layer_name(i))), count)
        start = streams.nearest(FORWARD, known)
        if start is None:
            start, xs = 0, streams.mapped(lambda top, batch: embed(top, batch, streams.dtype), tops, windows.batches)
            streams.save(FORWARD, 0, xs)
            streams.hold(FORWARD, 0, xs)
        else:
            xs = streams.load(FORWARD, start)
        layers, clock = read_ahead(source.device_layer, range(start, count), streams.devices), Clock()
        for index in progress(range(count), "calibrate"):
            if index < start:
                continue
            i, copies = next(layers)
            xs, cosine = _forward(config, config.pattern[i], copies, xs, streams)
            check_finite(cosine, f"layer {i}: the residual stream after it")
            streams.save(FORWARD, i + 1, xs)
            streams.hold(FORWARD, i + 1, xs)
            influence = 1.0 - float(cosine) / windows.tokens
            store.save(layer_name(i), {}, {"influence": influence})
            clock.line("calibrate", i, influence=influence)
        gram = streams.summed(lambda _, x: final_gram(x, config.norm_eps), tops, xs) / windows.tokens
        influence = [store.record(layer_name(i))["influence"] for i in range(count)]
        store.save(SUMMARY, {"gram": gram}, {"influence": influence})
    gram = jnp.asarray(store.load(SUMMARY)["gram"], jnp.float32)
    return Calibration(tuple(store.record(SUMMARY)["influence"]), gram)


def backward_sweep(
    source: DenseModel, top: Top, streams: StreamStore, start: int, thorough: bool = False, behind: int = 1
) -> Iterator[tuple[int, Layer, dict[str, Statistics]]]:
    """(index, layer, mean statistics) of the layers `start`, `start` - 1, ... 0, each read once, on one device each.

    What one item needed is dropped from the streams once `behind` more have been asked for after the next: by then its
    layer must be stored.

    Raises:
        UserError: naming the layer and the statistic, when one is not finite.
    """
    config, count, windows = source.config, len(source.config.pattern), streams.windows
    tops = streams.devices.everywhere(top)
    after = next(i for i in range(start + 1, count + 1) if i == count or streams.has(GRADIENT, i))
    if streams.has(GRADIENT, after):
        gradients = streams.load(GRADIENT, after)
    else:
        xs = _stream(source, streams, count)
        gradients = streams.mapped(
            lambda top, x, tokens: loss_gradient(top, x, tokens, config.norm_eps), tops, xs, windows.batches
        )
        streams.save(GRADIENT, count, gradients)
    outdated: collections.deque[int | None] = collections.deque([None] * behind)
    for i, copies in read_ahead(source.device_layer, range(after - 1, -1, -1), streams.devices):
        xs = _stream(source, streams, i)
        gradients, stats, peaks = _backward(config, config.pattern[i], copies, xs, gradients, streams, thorough)
        means = mean(streams.devices.total(stats, i), windows.tokens)
        del stats
        check_finite(means, f"layer {i}: the statistic")
        check_finite(peaks, f"layer {i}: the gradient of the loss before it, batch")
        kept = streams.save(GRADIENT, i, gradients)
        streams.release(FORWARD, i + 1)
        if i <= start:
            yield i, copies[i % len(copies)], means
        if (stored := outdated.popleft()) is not None:  # nothing above it will be needed again
            streams.drop(GRADIENT, range(stored + 1, count + 1))
            streams.drop(FORWARD, range(stored, count + 1))
        outdated.append(i if kept else None)


def _forward(
    config: ModelConfig, kinds: Kinds, copies: Sequence[Layer], xs: Stream, streams: StreamStore
) -> tuple[list[Batch], Array]:
    """The stream after a layer, and the cosine between input and output summed over tokens."""
    cosines = []

    def forward(layer: Layer, x: Array) -> Array:
        y, cosine = layer_forward(config, kinds, layer, x)
        cosines.append(cosine)
        return y

    return streams.mapped(forward, copies, xs), streams.devices.total(cosines)


def _backward(
    config: ModelConfig,
    kinds: Kinds,
    copies: Sequence[Layer],
    xs: Stream,
    gradients: Stream,
    streams: StreamStore,
    thorough: bool,
) -> tuple[list[Batch], list[dict[str, Statistics]], list[Array]]:
    """Gradients before a layer, its statistics summed over the tokens of each device, and the gradients' peaks."""
    none = no_statistics(config, kinds, copies[0], xs[0].shape, thorough)
    stats, peaks = streams.devices.everywhere(none), []
    del none

    def backward(own: tuple[int, Layer], x: Array, gradient: Array) -> Array:
        at, layer = own
        gradient, stats[at] = layer_statistics(config, kinds, layer, x, gradient, stats[at], thorough)
        peaks.append(peak(gradient))
        return gradient

    done = streams.mapped(backward, list(enumerate(copies)), xs, gradients)
    return done, stats, streams.devices.on(0, peaks)


@functools.partial(jit, donate_argnums=0)
def mean(stats: Any, tokens: int | Int[Array, ""]) -> Any:
    """Means over tokens, in the memory of the sums."""
    return jax.tree.map(lambda value: value / tokens, stats)


def _stream(source: DenseModel, streams: StreamStore, index: int) -> list[Batch]:
    """The stream before layer `index`, computed again from the nearest one on disk where it was not kept."""
    if not streams.has(FORWARD, index):
        start = streams.nearest(FORWARD, index)
        assert start is not None, "the stream before layer 0 is always kept"
        xs = streams.load(FORWARD, start)
        for j, copies in read_ahead(source.device_layer, range(start, index), streams.devices):
            xs, _ = _forward(source.config, source.config.pattern[j], copies, xs, streams)
            streams.hold(FORWARD, j + 1, xs, always=True)
    return streams.load(FORWARD, index)
