"""What a run reads from, what it may recover with, and what it reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.compression.artifacts import LayerStore
from uniql_jax.compression.budget import Budget
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.config import ModelConfig
from uniql_jax.plan import Plan
from uniql_jax.train.examples import Examples
from uniql_jax.train.settings import OwnText, RecoverySettings

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""progress(items, stage) -> the items, as they are taken."""


@runtime_checkable
class DenseModel(Protocol):
    """Dense layers and what a checkpoint of them needs."""

    @property
    def config(self) -> ModelConfig:
        """Sizes and switches."""
        ...

    @property
    def hf_config(self) -> Mapping[str, Any]:
        """The Hugging Face config, as it will be written."""
        ...

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    def layer(self, index: int) -> dict[str, dict[str, Any]]:
        """Leaves of a layer, dense float32, in the layout of `elastic.BLOCKS`."""
        ...

    def device_layer(self, index: int) -> dict[str, dict[str, Any]]:
        """`layer` as arrays on the device."""
        ...

    def top(self) -> dict[str, Any]:
        """Embedding, final norm and head where untied."""
        ...

    def device_top(self) -> dict[str, Any]:
        """`top` as float32 arrays on the device."""
        ...

    def write_side_files(self, folder: Path, /) -> None:
        """Tokenizer and the like."""
        ...


@runtime_checkable
class Source(DenseModel, Protocol):
    """What a run reads from: `convert.source.Source`."""

    def fingerprints(self, progress: Callable[[Iterable[str], str, int], Iterable[str]], /) -> dict[str, str]:
        """A hash of every layer's tensors and of those outside the layers; UserError for NaN or infinity in one."""
        ...


@dataclasses.dataclass(frozen=True)
class RecoveryData:
    """What to train masked LoRA on between sorting and quantizing, what to validate it by, and how; `tuning` (None: not
    at all): how to go on after quantizing, with every weight rounded as it is stored.

    own: how the model writes a part of it itself, for which there are zeros until it has; text: the other part,
    training and validation together (None: there is none).
    """

    train: Examples
    validation: Examples
    settings: RecoverySettings
    tuning: RecoverySettings | None = None
    own: OwnText | None = None
    text: Examples | None = None


class CalibrationWindows(NamedTuple):
    """Token windows, int32 [n, t] without padding, and one line that says what they are; the first of them
    are zeros until the model has written them, if it is to (`own`).
    """

    tokens: Int[np.ndarray, "n t"]
    description: str
    own: OwnText | None = None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All that a run is made from: the model, calibration windows without padding, settings, and what it may train on.

    `budget` does not change the result. own: how the model writes the first of the windows itself, for which there are
    zeros until it has.
    """

    source: Source
    tokens: Int[np.ndarray, "n t"]
    settings: CompressionSettings
    budget: Budget
    recovery: RecoveryData | None = None
    own: OwnText | None = None

    @property
    def tuning(self) -> RecoverySettings | None:
        """How to train on after quantizing; None: not at all."""
        return None if self.recovery is None else self.recovery.tuning


class SortedModel(NamedTuple):
    """A model as the stages after sorting take it: dense `layers` of full size, and the plan of what goes first."""

    config: ModelConfig
    plan: Plan
    top: Mapping[str, Float[Array, "..."]]
    layers: LayerStore


@dataclasses.dataclass(frozen=True)
class Gains:
    """What a training run won: validation loss (nats) by prune rate before and after, and its steps."""

    before: Mapping[float, float]
    after: Mapping[float, float]
    steps: int
    best_step: int

    def to_json(self) -> dict[str, Any]:
        """Plain data; rates as text."""
        by_rate = {name: {f"{r:g}": v for r, v in getattr(self, name).items()} for name in ("before", "after")}
        return {**by_rate, "steps": self.steps, "best_step": self.best_step}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Gains:
        """Inverse of `to_json`."""
        before, after = ({float(r): v for r, v in data[name].items()} for name in ("before", "after"))
        return cls(before, after, int(data["steps"]), int(data["best_step"]))


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run did: the plan, block influence per layer, bytes of the checkpoint's tensors, what was recovered before
    quantizing and what after.
    """

    plan: Plan
    influence: tuple[float, ...]
    bytes: int
    recovered: Gains | None = None
    tuned: Gains | None = None
