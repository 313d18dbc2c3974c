"""The package's own rows: sorted once, at 16 and at 4 bits, pruned by masks (the same result as slices)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from benchmarks import stages
from benchmarks.baselines import sizes
from benchmarks.quality import Cached
from benchmarks.tasks import unpacked
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.evaluation.likelihood import Masks, masks
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.plan import Plan
from uniql_jax.runtime.loading import load


class Own(NamedTuple):
    """A checkpoint of ours at a rate; see `dense.Made`."""

    rate: float
    removed: float
    parameters: int
    bytes: int
    model: CausalLM
    keep: Masks


def rows(
    measured: stages.Measured,
    bits: int,
    rates: Sequence[float],
    train: Callable[[Plan, list[Any]], list[Any]] | None = None,
) -> Iterator[Own]:
    """One checkpoint at every rate, its sorted layers trained before if `train` is given.

    Bytes at 4 bits are those of its tensors as stored.
    """
    config = measured.source.config
    settings = CompressionSettings(bits=32 if bits == 16 else bits)
    with tempfile.TemporaryDirectory() as folder:
        made, _ = stages.compress(measured, settings, Path(folder), train)
        checkpoint, loaded = open_checkpoint(made), load(made, dtype=jnp.float32)
        plan, model = loaded.plan, unpacked(loaded)
        assert plan is not None
        for rate in rates:
            keeps = plan.keep(rate)
            parameters = sizes.kept_parameters(config, keeps)
            stored = 2 * parameters if bits == 16 else checkpoint.weight_bytes(rate)
            share = sizes.removed(config, sizes.matrices_left(config, keeps))
            yield Own(rate, share, parameters, stored, model, masks(plan, rate))


def measure(source: Any, windows: Any, folder: Path, batch_tokens: int) -> stages.Measured:
    """Both calibration sweeps of the package."""
    return stages.measure(Cached(source), windows, folder, batch_tokens)
