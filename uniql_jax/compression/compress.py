"""One pass over a model, from its original weights to one elastic checkpoint for every prune rate."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError

from uniql_jax import data
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.compression import pipeline as run
from uniql_jax.compression.contract import Progress, Recovery, Report
from uniql_jax.compression.describe import describe, work_folder
from uniql_jax.compression.estimate import disk_bytes
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.config import ModelConfig
from uniql_jax.convert.source import Source, open_source
from uniql_jax.errors import UserError
from uniql_jax.files import check_output, check_space
from uniql_jax.tokenizer import source_tokenizer
from uniql_jax.train import examples
from uniql_jax.train.loop import RecoverySettings, resolved

DEFAULTS = CompressionSettings()
WINDOWS, LENGTH = 128, 512
RECOVERY, RECOVER_LENGTH = RecoverySettings(), 256


def recovery_settings(
    config: ModelConfig, options: RecoverySettings, tune: int | None
) -> tuple[RecoverySettings, RecoverySettings | None]:
    """Settings before quantizing, and for `tune` steps after it (None: none): the same but for dropout, and with what
    was recovered as the teacher.
    """
    options = resolved(options, config)
    if tune is None:
        return options, None
    return options, dataclasses.replace(options, steps=tune, dropout=0.0, adapt=0, teacher="rate 0")


def load_recovery(
    source: Source, specs: Sequence[str], options: RecoverySettings, length: int, tune: int | None = None
) -> Recovery:
    """What `--recover` trains on and is judged by, read with the source's tokenizer, and its `recovery_settings`;
    UserError for bad text.
    """
    tokenizer = source_tokenizer(source)
    config = source.config
    options, tuning = recovery_settings(config, options, tune)
    end = config.eos_ids[0] if config.eos_ids else getattr(tokenizer, "eos_token_id", None)
    found = examples.load(
        list(specs), tokenizer, length, None, vocab_size=config.vocab_size, end=end, seed=options.seed
    )
    learnt, judged = examples.split(found, options.held_share, options.held_most, options.seed)
    return Recovery(learnt, judged, options, tuning)


def refuse_early(out: str | Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError for what stands in the way at `out`, before anything long begins."""
    check_output(out, overwrite)
    folder = work_folder(out)
    if folder.exists() and not resume:
        raise UserError(f"{folder} holds an unfinished run; add --resume to go on with it, or remove it to start anew")
    place = folder.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"cannot write {out}: {place} is no folder that you may write to")


def is_done(
    out: str | Path, name: str, options: CompressionSettings, training: Sequence[RecoverySettings | None] = (None, None)
) -> bool:
    """Whether `out` is what this very run would make: its last act was the rename, and --resume has nothing to do."""
    if work_folder(out).exists() or not Path(out).expanduser().is_dir():
        return False
    try:
        meta = open_checkpoint(Path(out).expanduser()).meta
    except UserError:
        return False
    told = meta.get("provenance", {})
    found = [told.get(part, {}).get("options") for part in ("recovery", "tuning")]
    # as they were written: a tuple is a list there
    wanted = json.loads(json.dumps([dataclasses.asdict(one) if one else None for one in training]))
    same = told.get("source") == Path(name).name and found == wanted
    return same and meta.get("options") == dataclasses.asdict(options)


def calibration_windows(source: Source, specs: Sequence[str], count: int, length: int, seed: int) -> data.Windows:
    """Calibration windows with the source's own tokenizer; no specs: mixed text that is always at hand."""
    limit = source.config.max_position
    tokenizer = source_tokenizer(source)
    if not specs and tokenizer is None:
        raise UserError(f"{source.name} has no tokenizer: give --calib FILE.npy, int32 token ids [samples, length]")
    named = ""
    if not specs:
        specs = data.default_calibration()[0]
        named = "; the default, since no --calib was given"
    found = data.token_windows(specs, tokenizer, min(length, limit), count, seed, vocab_size=source.config.vocab_size)
    if length > limit:
        named += f" (asked for {length} tokens; the model's limit is {limit})"
    return found._replace(description=found.description + named)


def check_weights(source: Source, progress: Progress) -> None:
    """Read every tensor once, so that a damaged one is found before hours of work and not after them."""
    source.top()
    for i in progress(range(len(source.config.pattern)), "check"):
        source.layer(i)


def compress(
    ckpt: str,
    out: str | Path,
    *,
    calib: Sequence[str] = (),
    calib_windows: int = WINDOWS,
    calib_length: int = LENGTH,
    options: CompressionSettings = DEFAULTS,
    recover: Sequence[str] = (),
    recover_options: RecoverySettings = RECOVERY,
    recover_length: int = RECOVER_LENGTH,
    recover_tune: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda items, _: items,
    say: Callable[[str], object] = lambda text: None,
) -> Report | None:
    """Make the elastic checkpoint `out` of the model `ckpt`; None when `resume` finds it whole already.

    calib: specs of text or token ids (see uniql_jax.data), windows shared out evenly; none: a mixed default.
    recover: specs of instruction sets or text to train masked LoRA on before quantizing, in examples of
    `recover_length` tokens, as `recover_options` say; recover_tune: further steps after quantizing, with every weight
    rounded as it is stored.
    `say` gets the plan before the work. Work that is done stays in OUT.partial until the checkpoint is whole, and
    resume=True goes on from there. Raises UserError for bad input; nothing is left behind by a run that cannot start.
    """
    if not 0 <= (options.refit or 0.0) < 1:
        raise UserError(f"--refit is a share of the windows, at least 0 and less than 1, not {options.refit}")
    if calib_length < 2:
        raise UserError("--calib-length must be at least 2 tokens")
    if recover_tune is not None and not (recover and options.packed):
        raise UserError("--recover-tune goes on with --recover after quantizing: it wants --recover and 4 or 8 bits")
    source = None
    if resume and Path(out).expanduser().exists() and not overwrite:
        source = open_source(ckpt)
        training = recovery_settings(source.config, recover_options, recover_tune) if recover else (None, None)
        if is_done(out, source.name, options, training):
            say(f"{out} is whole already: nothing to resume")
            return None
    refuse_early(out, resume, overwrite)
    source = source or open_source(ckpt)
    started = work_folder(out).exists()
    if not started:  # what a started run still needs is less, and unknown
        check_space(work_folder(out), disk_bytes(source.config, options, 0, recover_tune is not None))
    calibration = calibration_windows(source, calib, calib_windows, calib_length, options.seed)
    if not started:
        tuned = recover_tune is not None
        check_space(work_folder(out), disk_bytes(source.config, options, calibration.tokens.size, tuned))
    wanted = load_recovery(source, recover, recover_options, recover_length, recover_tune) if recover else None
    say(describe(source, out, options, calibration, wanted))
    if not started:
        check_weights(source, progress)
    try:
        return run.compress(
            source,
            out,
            calibration.tokens,
            options,
            resume=resume,
            overwrite=overwrite,
            provenance={"calibration": calibration.description},
            progress=progress,
            recover=wanted,
        )
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
        if not full:
            raise
        raise UserError(f"no space left on the disk; free some and add --resume: {work_folder(out)} is kept") from None
