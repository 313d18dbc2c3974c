"""What a run recovers with: text that was named, and text that the model writes itself, in a stage of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from uniql_jax.compression.contract import DenseModel, Progress, RecoveryData
from uniql_jax.config import ModelConfig
from uniql_jax.convert.source import Source
from uniql_jax.errors import UserError
from uniql_jax.runtime.loading import dense_model
from uniql_jax.tokenizer import source_tokenizer
from uniql_jax.train import examples
from uniql_jax.train.own_text import beginnings, kept, written
from uniql_jax.train.settings import OwnText, RecoverySettings, resolved

OWN, MOST = "own", 1_000_000


def own_text(spec: str) -> int | None:
    """How many windows of its own text a spec wants of the model; None for a spec of something else.

    Raises:
        UserError: it is neither own nor own:N with a number of at least 2.
    """
    name, colon, count = spec.partition(":")
    if name != OWN:
        return None
    if not colon:
        return OwnText().windows
    if not re.fullmatch("[0-9]{1,7}", count) or not 2 <= int(count) <= MOST:
        raise UserError(f"--recover {spec}: own:N takes a number of windows that the model writes, from 2 to {MOST}")
    return int(count)


def recovery_settings(
    config: ModelConfig, settings: RecoverySettings, tune: int | None
) -> tuple[RecoverySettings, RecoverySettings | None]:
    """Settings before quantizing, and for `tune` steps after it (None: none): the same but for dropout, and with what
    was recovered as the teacher.
    """
    settings = resolved(settings, config)
    if tune is None:
        return settings, None
    return settings, dataclasses.replace(settings, steps=tune, dropout=0.0, adapt=0, teacher="rate 0")


def load_recovery(
    source: Source, specs: Sequence[str], settings: RecoverySettings, length: int, tune: int | None = None
) -> RecoveryData:
    """What `--recover` trains on and is validated by, read with the source's tokenizer; of what the model will write
    itself there are zeros until `with_own_text`. UserError for bad text.
    """
    config = source.config
    settings, tuning = recovery_settings(config, settings, tune)
    counts = {spec: own_text(spec) for spec in specs}
    texts, windows = [spec for spec in specs if counts[spec] is None], sum(filter(None, counts.values()))
    own, found, tokenizer = None, None, source_tokenizer(source)
    if length < 2:
        raise UserError("an example has at least two tokens, one to predict the other: a larger --recover-length")
    if windows:
        if length > config.max_position:
            raise UserError(f"--recover-length must be at most {config.max_position} tokens, the model's limit")
        begin = beginnings(config.vocab_size, tokenizer, config.eos_ids, OwnText().shapes)
        own = OwnText(windows, length, tuple(begin), seed=settings.seed)
    if texts:
        end = config.eos_ids[0] if config.eos_ids else getattr(tokenizer, "eos_token_id", None)
        found = examples.load(texts, tokenizer, length, None, vocab_size=config.vocab_size, end=end, seed=settings.seed)
    nothing = np.zeros((windows, length), np.int32)
    return _shared_out(found, own, nothing, settings, tuning)


def with_own_text(source: DenseModel, data: RecoveryData, folder: Path, progress: Progress) -> RecoveryData:
    """The data with what the model writes itself, if it is to; what is written stays in `folder`, a part of a run's
    work.
    """
    if data.own is None:
        return data
    rows = kept(folder) if folder.is_dir() else None
    if rows is None or len(rows) < data.own.windows:
        assert isinstance(source, Source)
        folder.mkdir(exist_ok=True)
        model, tokenizer = dense_model(source), source_tokenizer(source)
        rows = written(
            model, tokenizer, data.own, folder, lambda batches: progress(list(batches), "write text"), known=True
        )
    return _shared_out(data.text, data.own, rows, data.settings, data.tuning)


def _shared_out(
    text: examples.Examples | None,
    own: OwnText | None,
    rows: Int[np.ndarray, "windows length"],
    settings: RecoverySettings,
    tuning: RecoverySettings | None,
) -> RecoveryData:
    """Training and validation sets of text and of the model's own."""
    found = [text] if text is not None else []
    if own is not None:
        shapes = ", ".join(own.shapes)
        found.append(
            examples.from_windows(
                rows, f"{own.windows} windows of {own.length} tokens that the model writes itself ({shapes})"
            )
        )
    train, validation = examples.split(examples.joined(found), settings.held_share, settings.held_most, settings.seed)
    return RecoveryData(train, validation, settings, tuning, own, text)
