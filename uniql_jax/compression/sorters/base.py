"""What a kind of block must offer to be measured and sorted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array

from uniql_jax.config import ModelConfig

Block = Mapping[str, Any]
Taps = Mapping[str, Array]
Seed = int | Array
Statistics = dict[str, Array]
Sorted = tuple[dict[str, Any], dict[str, Array]]


class Sorter(NamedTuple):
    """How one kind of block is measured and sorted.

    A tap is an array of zeros added where entries of an elastic axis act: its gradient says what the loss feels there.
    `taps(config)` gives their shapes (after batch and length) by name; `run(config, leaves, normed, context, taps)` is
    the block's inner function with them, and returns what the output matrix receives and whatever `statistics` wants
    to see; `statistics(config, normed, hidden, seen, slopes, thorough)` sums over a batch; `sort(config, leaves, means,
    options, seed)` returns the sorted block and, per axis, the estimated loss of keeping 0 ... all of its entries.
    """

    taps: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
    run: Callable[..., tuple[Array, Any]]
    statistics: Callable[..., Statistics]
    sort: Callable[..., Sorted]
