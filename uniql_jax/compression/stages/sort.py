"""Sort: every elastic axis of every layer, most important first, as soon as the layer's statistics are known."""

from __future__ import annotations

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np

from uniql_jax.compression.artifacts import LayerStore, flatten, layer_name
from uniql_jax.compression.compiling import matmul_precision
from uniql_jax.compression.contract import DenseModel, Progress
from uniql_jax.compression.finite import check_finite
from uniql_jax.compression.log import Clock
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
    layers, clock = backward_sweep(source, top, streams, todo[0], settings.thorough), Clock()

    def sorted_and_stored(i: int, layer: Layer, means: dict[str, Statistics]) -> None:
        with jax.default_matmul_precision(matmul_precision(settings, solves=True)):
            done, losses = sort_layer(config, config.pattern[i], layer, means, settings, settings.seed + i)
            check_finite((done, losses), f"layer {i}, sorted:")
        if fisher is not None:
            fisher.save(layer_name(i), {kind: found["fisher"].astype(jnp.bfloat16) for kind, found in means.items()})
        record = {axis: np.asarray(loss).tolist() for axis, loss in losses.items()}
        store.save(layer_name(i), flatten(done), record)
        most = {axis: loss[round((1 - MAX_PRUNE_RATE) * (len(loss) - 1))] for axis, loss in record.items()}
        clock.line("sort", i, **{f"loss_{axis}_at_{MAX_PRUNE_RATE}": loss for axis, loss in most.items()})

    # A layer is sorted, in part by the host, while the devices gather the statistics of the next one.
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sorter") as pool:
        working = None
        for index in progress(down, "sort"):
            if index > todo[0]:
                continue
            found = next(layers)
            if working is not None:
                working.result()
            working = pool.submit(sorted_and_stored, *found)
            del found
        if working is not None:
            working.result()
