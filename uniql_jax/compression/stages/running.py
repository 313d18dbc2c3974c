"""What runs along while layers are finished: the finished model's stream, and for the refit the unpruned model's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from uniql_jax.compression.contract import SortedModel
from uniql_jax.compression.refit import Keep, advance, keep_per_window, refit_rates
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.stages.rotate import Rotation, rotated_layer, rotated_top
from uniql_jax.compression.stored import StoredLayers
from uniql_jax.compression.streams import StreamStore
from uniql_jax.config import ModelConfig
from uniql_jax.model.causal_lm import embed
from uniql_jax.weights.quantized import dense

Block = Mapping[str, Any]
FINISHED, UNPRUNED = "finished", "unpruned"


class Streams(NamedTuple):
    """What runs along, one array [b, t, hidden] a batch: the finished model's stream, and for the refit the unpruned
    model's and the kept sizes at which each window is seen, per batch and layer. `store` keeps them.
    """

    store: StreamStore
    x: list[Float[Array, "_ t h"]]
    unpruned: list[Float[Array, "_ t h"]] | None = None
    keep: list[tuple[Keep, ...]] | None = None

    def kept(self, index: int) -> list[Keep | None]:
        """Kept sizes at layer `index`, per batch."""
        return [None] * len(self.x) if self.keep is None else [batch[index] for batch in self.keep]

    def after(self, config: ModelConfig, index: int, kind: str, finished: Block, original: Sequence[Block]) -> Streams:
        """Both streams after one block: finished, and as it was, of which every device has a copy."""
        held = self.store.devices.everywhere({name: dense(value) for name, value in finished.items()})
        x = self.store.mapped(
            lambda block, x, keep: advance(config, kind, block, x, keep), held, self.x, self.kept(index)
        )
        unpruned = self.unpruned and self.store.mapped(
            lambda block, t: advance(config, kind, block, t, None), original, self.unpruned
        )
        return self._replace(x=x, unpruned=unpruned)

    def save(self, index: int) -> None:
        """Write them before layer `index`, if the store's interval says so."""
        if self.unpruned is not None:
            self.store.save(UNPRUNED, index, self.unpruned)
        self.store.save(FINISHED, index, self.x)

    def drop_before(self, index: int) -> None:
        """Forget what a run that goes on at layer `index` does not need."""
        for name in (FINISHED, UNPRUNED):
            self.store.drop(name, range(self.store.nearest(name, index) or 0))


def resume(
    model: SortedModel,
    q: Rotation,
    settings: CompressionSettings,
    finished: StoredLayers,
    streams: StreamStore,
    start: int,
) -> Streams:
    """The streams before layer `start`, from the nearest ones on disk."""
    config, windows, keep = model.config, streams.windows, None
    if settings.refit is not None:
        rates = refit_rates(windows.count, settings.refit)[windows.own.start : windows.own.stop]
        per_window = keep_per_window(model.plan, rates.tolist())
        keep = [
            tuple({axis: sizes[low:high] for axis, sizes in layer.items()} for layer in per_window)
            for low, high in itertools.pairwise([0, *windows.ends])
        ]
    at = streams.nearest(FINISHED, start)
    if at is None:
        at, unpruned = 0, None
        x = _embedded(streams, finished.top()["embed"])
        if keep is not None:
            unpruned = _embedded(streams, rotated_top(model.top, q)["embed"])
        running = Streams(streams, x, unpruned, keep)
        running.save(0)
    else:
        unpruned = streams.load(UNPRUNED, at) if keep is not None else None
        running = Streams(streams, streams.load(FINISHED, at), unpruned, keep)
    for i in range(at, start):
        original, done = rotated_layer(model.layers.layer(i), q), finished.layer(i)
        for kind in config.pattern[i]:
            running = running.after(config, i, kind, done[kind], streams.devices.everywhere(original[kind]))
    return running


def _embedded(streams: StreamStore, table: Any) -> list[Float[Array, "_ t h"]]:
    """The calibration windows before the first layer."""
    tables = streams.devices.everywhere({"embed": table})
    return streams.mapped(lambda top, batch: embed(top, batch, streams.dtype), tables, streams.windows.batches)
