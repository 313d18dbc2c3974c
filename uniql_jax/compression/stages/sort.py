"""Sort: every elastic axis of every layer, most important first, as soon as the layer's statistics are known."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uniql_jax.compression.artifacts import LayerStore, flatten, layer_name, narrowed
from uniql_jax.compression.contract import DenseModel, Progress
from uniql_jax.compression.finite import check_finite
from uniql_jax.compression.log import Clock
from uniql_jax.compression.precision import matmul_precision
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.sorters.base import Statistics
from uniql_jax.compression.sorting import sort_layer
from uniql_jax.compression.stages.calibrate import Layer, Top, backward_sweep
from uniql_jax.compression.streams import StreamStore
from uniql_jax.limits import MAX_PRUNE_RATE


def sort(
    source: DenseModel,
    top: Top,
    settings: CompressionSettings,
    store: LayerStore,
    streams: StreamStore,
    progress: Progress,
    fisher: LayerStore | None = None,
) -> None:
    """Sort the layers from the last to the first into `store`; the record of each is the loss of cutting its axes.

    Goes on below the layers that an earlier run stored. `fisher` gets the Gram matrices of the loss's gradient after
    each block; None: nobody wants them.

    Raises:
        UserError: naming layer and tensor, when a statistic or a sorted weight is not finite.
    """
    config = source.config
    down = range(len(config.pattern) - 1, -1, -1)
    todo = [i for i in down if not store.has(layer_name(i))]
    if not todo:
        return
    processes, clock = streams.devices.processes, Clock()
    at_once = processes.count * len(streams.devices)
    layers = backward_sweep(source, top, streams, todo[0], settings.thorough, at_once)

    def sorted_layer(i: int, layer: Layer, means: dict[str, Statistics]) -> tuple[dict[str, Any], dict[str, Any]]:
        with jax.default_matmul_precision(matmul_precision(settings, solves=True)):
            done, losses = sort_layer(config, config.pattern[i], layer, means, settings, settings.seed + i)
            check_finite((done, losses), f"layer {i}, sorted:")
        if fisher is not None:
            fisher.save(layer_name(i), {kind: found["fisher"].astype(jnp.bfloat16) for kind, found in means.items()})
        return flatten(done), {axis: np.asarray(loss).tolist() for axis, loss in losses.items()}

    def keep(i: int, tensors: Mapping[str, Any], record: dict[str, Any]) -> None:
        store.save(layer_name(i), tensors, record)
        most = {axis: loss[round((1 - MAX_PRUNE_RATE) * (len(loss) - 1))] for axis, loss in record.items()}
        clock.line("sort", i, **{f"loss_{axis}_at_{MAX_PRUNE_RATE}": loss for axis, loss in most.items()})

    def work(i: int, layer: Layer, means: dict[str, Statistics]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        found = sorted_layer(i, layer, means)
        if processes.count == 1:
            return keep(i, *found)
        return narrowed(found[0]), found[1]

    def finish(i: int, future: concurrent.futures.Future | None) -> None:
        found = future.result() if future is not None else None
        if processes.count > 1:
            keep(i, *processes.given(i % processes.count, *(found or (None, None))))

    # Layers are sorted, in part by the host, one on each device, while the devices gather the statistics of the next
    # one; of several processes each sorts every so manyth, and the others get it.
    with concurrent.futures.ThreadPoolExecutor(len(streams.devices), thread_name_prefix="sorter") as pool:
        waiting: collections.deque[tuple[int, concurrent.futures.Future | None]] = collections.deque()
        for index in progress(down, "sort"):
            if index > todo[0]:
                continue
            found = next(layers)
            if len(waiting) == at_once:
                finish(*waiting.popleft())
            own = index % processes.count == processes.index
            waiting.append((index, pool.submit(work, *found) if own else None))
            del found
        while waiting:
            finish(*waiting.popleft())
