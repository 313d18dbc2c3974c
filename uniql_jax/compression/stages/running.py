"""What runs along while layers are finished: the finished model's stream, for the refit the unpruned model's, and with
nested codes that of the finished model at its leading bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from uniql_jax.compression.contract import SortedModel
from uniql_jax.compression.refit import Keep, advance, keep_per_window, refit_rates
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.stages.rotate import Rotation, rotated_layer, rotated_top
from uniql_jax.compression.stored import StoredLayers
from uniql_jax.compression.streams import Batch, StreamStore
from uniql_jax.config import ModelConfig
from uniql_jax.model.causal_lm import embed
from uniql_jax.weights.nested import leading_bits
from uniql_jax.weights.protocol import dense

Block = Mapping[str, Any]
FINISHED, UNPRUNED, LEADING = "finished", "unpruned", "leading"


class Streams(NamedTuple):
    """What runs along, one array [b, t, hidden] a batch: the finished model's stream, and for the refit the unpruned
    model's and the kept sizes at which each window is seen, per batch and layer; with nested codes also that of the
    leading bits. `store` keeps them.
    """

    store: StreamStore
    x: list[Batch]
    unpruned: list[Batch] | None = None
    keep: list[tuple[Keep, ...]] | None = None
    leading: list[Batch] | None = None

    def views(self) -> list[tuple[list[Batch], Callable[[Any], Any]]]:
        """The streams of the finished model, of all bits and of the leading ones if there are any, each with the
        function from a finished leaf to what its model computes with.
        """
        whole = (self.x, dense)
        return [whole] if self.leading is None else [whole, (self.leading, lambda value: dense(leading_bits(value)))]

    @staticmethod
    def computed_with(value_of: Callable[[Any], Any], leaves: Block) -> dict[str, Any]:
        """What a model computes with, of finished leaves on any device."""
        return {name: value_of(value) for name, value in leaves.items()}

    def kept(self, index: int) -> list[Keep | None]:
        """Kept sizes at layer `index`, per batch."""
        return [None] * len(self.x) if self.keep is None else [batch[index] for batch in self.keep]

    def after(self, config: ModelConfig, index: int, kind: str, finished: Block, original: Sequence[Block]) -> Streams:
        """All streams after one block: finished, and as it was, of which every device has a copy."""
        kept, each = self.kept(index), []
        copies = self.store.devices.everywhere(dict(finished))  # packed, as they are: an eighth of the bytes
        for x, value_of in self.views():
            held = [self.computed_with(value_of, copy) for copy in copies]
            each.append(self.store.mapped(lambda block, x, keep: advance(config, kind, block, x, keep), held, x, kept))
        unpruned = self.unpruned and self.store.mapped(
            lambda block, t: advance(config, kind, block, t, None), original, self.unpruned
        )
        return self._replace(x=each[0], unpruned=unpruned, leading=each[1] if len(each) > 1 else None)

    def save(self, index: int) -> None:
        """Write them before layer `index`, if the store's interval says so."""
        for name, stream in ((UNPRUNED, self.unpruned), (LEADING, self.leading)):
            if stream is not None:
                self.store.save(name, index, stream)
        self.store.save(FINISHED, index, self.x)

    def drop_before(self, index: int) -> None:
        """Forget what a run that goes on at layer `index` does not need."""
        for name in (FINISHED, UNPRUNED, LEADING):
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
        if keep is not None or settings.reconstruct:
            unpruned = _embedded(streams, rotated_top(model.top, q)["embed"])
        leading = _embedded(streams, leading_bits(finished.top()["embed"])) if settings.nested else None
        running = Streams(streams, x, unpruned, keep, leading)
        running.save(0)
    else:
        unpruned = streams.load(UNPRUNED, at) if keep is not None or settings.reconstruct else None
        leading = streams.load(LEADING, at) if settings.nested else None
        running = Streams(streams, streams.load(FINISHED, at), unpruned, keep, leading)
    for i in range(at, start):
        original, done = rotated_layer(model.layers.layer(i), q), finished.layer(i)
        for kind in config.pattern[i]:
            running = running.after(config, i, kind, done[kind], streams.devices.everywhere(original[kind]))
    return running


def _embedded(streams: StreamStore, table: Any) -> list[Batch]:
    """The calibration windows before the first layer."""
    tables = streams.devices.everywhere({"embed": table})
    return streams.mapped(lambda top, batch: embed(top, batch, streams.dtype), tables, streams.windows.batches)
