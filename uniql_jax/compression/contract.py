"""What a run reads from, what it may recover with, and what it reports."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from uniql_jax.config import ModelConfig
from uniql_jax.plan import Plan
from uniql_jax.train import recover as recovery
from uniql_jax.train.examples import Examples

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@runtime_checkable
class Source(Protocol):
    """What a run reads from: `convert.source.Source`."""

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

    def top(self) -> dict[str, Any]:
        """Embedding, final norm and head where untied."""
        ...

    def write_side_files(self, folder: Path, /) -> None:
        """Tokenizer and the like."""
        ...


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What to train masked LoRA on between sorting and quantizing, what to judge it by, and how; `tuning` (None: not
    at all): how to go on after quantizing, with every weight rounded as it is stored.
    """

    learnt: Examples
    judged: Examples
    options: recovery.RecoverySettings
    tuning: recovery.RecoverySettings | None = None

    def digest(self) -> str:
        """Names the content."""
        settings = [dataclasses.asdict(one) if one else None for one in (self.options, self.tuning)]
        digest = hashlib.sha256(repr(settings).encode())
        for part in (self.learnt, self.judged):
            for array in (part.tokens, part.valid, part.learn):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run did: the plan, block influence per layer, bytes of the checkpoint's tensors, what was recovered before
    quantizing and what after.
    """

    plan: Plan
    influence: tuple[float, ...]
    bytes: int
    recovered: recovery.Result | None = None
    tuned: recovery.Result | None = None
