"""What a run recovers with: text that was named, and text that the model writes itself, in a stage of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from uniql_jax.compression.contract import DenseModel, Progress, RecoveryData
from uniql_jax.compression.own_windows import asked, described, is_own, own_count, write
from uniql_jax.config import ModelConfig
from uniql_jax.convert.source import Source
from uniql_jax.errors import UserError
from uniql_jax.tokenizer import source_tokenizer
from uniql_jax.train import examples
from uniql_jax.train.settings import OwnText, RecoverySettings, resolved


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
    texts = [spec for spec in specs if not is_own(spec)]
    windows = sum(own_count(spec, "--recover") or OwnText().windows for spec in specs if is_own(spec))
    own, found, tokenizer = None, None, source_tokenizer(source)
    if length < 2:
        raise UserError("an example has at least two tokens, one to predict the other: a larger --recover-length")
    if windows:
        own = asked(source, windows, length, settings.seed, "--recover-length")
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
    rows = write(source, data.own, folder, progress)
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
        found.append(examples.from_windows(rows, described(own)))
    train, validation = examples.split(examples.joined(found), settings.held_share, settings.held_most, settings.seed)
    return RecoveryData(train, validation, settings, tuning, own, text)
