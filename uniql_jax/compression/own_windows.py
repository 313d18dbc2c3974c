"""Windows that the model writes itself within a run, for calibration or recovery: how they are asked for, written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from jaxtyping import Int

from uniql_jax.compression.contract import DenseModel, Progress
from uniql_jax.convert.source import Source
from uniql_jax.errors import UserError
from uniql_jax.runtime.loading import dense_model
from uniql_jax.tokenizer import source_tokenizer
from uniql_jax.train.own_text import beginnings, kept, written
from uniql_jax.train.settings import OwnText

OWN, MOST = "own", 1_000_000


def is_own(spec: str) -> bool:
    """Whether a spec means text that the model writes itself: own, or own:N."""
    return spec.partition(":")[0] == OWN


def own_count(spec: str, option: str) -> int | None:
    """The number of windows in own:N; None for own alone.

    Raises:
        UserError: naming `option`, when N is no number of at least 2.
    """
    _, colon, count = spec.partition(":")
    if not colon:
        return None
    if not re.fullmatch("[0-9]{1,7}", count) or not 2 <= int(count) <= MOST:
        raise UserError(f"{option} {spec}: own:N takes a number of windows that the model writes, from 2 to {MOST}")
    return int(count)


def asked(source: Source, windows: int, length: int, seed: int, option: str, *, even: bool = False) -> OwnText:
    """How the model will write so many windows, in the shapes that its tokenizer has.

    even: as many windows of each shape, where they are few.

    Raises:
        UserError: naming `option`, when the model cannot read windows that long.
    """
    config = source.config
    if length > config.max_position:
        raise UserError(f"{option} must be at most {config.max_position} tokens, the model's limit")
    shapes = tuple(beginnings(config.vocab_size, source_tokenizer(source), config.eos_ids, OwnText().shapes))
    batch = min(OwnText().batch, -(-windows // len(shapes))) if even else OwnText().batch
    return OwnText(windows, length, shapes, batch=batch, seed=seed)


def described(how: OwnText) -> str:
    """Such windows in words."""
    return f"{how.windows} windows of {how.length} tokens that the model writes itself ({', '.join(how.shapes)})"


def write(source: DenseModel, how: OwnText, folder: Path, progress: Progress) -> Int[np.ndarray, "windows length"]:
    """The windows, written now or in an earlier run; what is written stays in `folder`, a part of a run's work."""
    rows = kept(folder) if folder.is_dir() else None
    if rows is None or len(rows) < how.windows:
        assert isinstance(source, Source)
        folder.mkdir(exist_ok=True)
        model, tokenizer = dense_model(source), source_tokenizer(source)
        rows = written(model, tokenizer, how, folder, lambda batches: progress(list(batches), "write text"), known=True)
    return rows
