"""The public function `compress`: opens the source, reads the text, says the plan, and runs the pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from uniql_jax import data
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.compression import pipeline
from uniql_jax.compression.budget import lay_out
from uniql_jax.compression.contract import CalibrationWindows, Inputs, Progress, RecoveryData, Report
from uniql_jax.compression.describe import describe
from uniql_jax.compression.inputs import manifest_of
from uniql_jax.compression.log import log_file
from uniql_jax.compression.own_windows import asked, described, is_own, own_count
from uniql_jax.compression.processes import Processes
from uniql_jax.compression.recovery import load_recovery, recovery_settings
from uniql_jax.compression.settings import LENGTH, RECOVER_LENGTH, WINDOWS, CompressionSettings, Resources
from uniql_jax.compression.workspace import remove_leftover, workspace
from uniql_jax.convert.source import Source, open_source
from uniql_jax.errors import UserError
from uniql_jax.manifest import Manifest
from uniql_jax.outputs import check_space, free_space
from uniql_jax.tokenizer import source_tokenizer
from uniql_jax.train.settings import RecoverySettings


def compress(
    ckpt: str,
    out: str | Path,
    *,
    calib: Sequence[str] = (),
    calib_windows: int = WINDOWS,
    calib_length: int = LENGTH,
    settings: CompressionSettings = CompressionSettings(),
    resources: Resources = Resources(),
    recover: Sequence[str] = (),
    recover_settings: RecoverySettings = RecoverySettings(),
    recover_length: int = RECOVER_LENGTH,
    recover_tune: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    dequantize_source: bool = False,
    log: str | Path | None = None,
    progress: Progress = lambda items, _: items,
    say: Callable[[str], object] = lambda text: None,
) -> Report | None:
    """Make the elastic checkpoint of a model: one pass, every prune rate.

    Work that is done stays in OUT.partial until the checkpoint is whole, and resume=True goes on from there.

    Args:
        ckpt: Hugging Face folder, hub id, .gguf file, Megatron .pt file, or the word demo.
        out: folder to create.
        calib: specs of text or token ids (see uniql_jax.data), windows shared out evenly; none: a mixed default.
        calib_windows: calibration windows in all.
        calib_length: tokens of a window.
        settings: what decides the result.
        resources: what the run may use.
        recover: specs of instruction sets or text to train masked LoRA on before quantizing, or own:N for N windows
            that the model writes itself; none: no recovery.
        recover_settings: how to train.
        recover_length: tokens of a training example.
        recover_tune: further steps after quantizing, with every weight rounded as it is stored.
        resume: go on with an unfinished run of the very same inputs.
        overwrite: replace `out`, if it is a model folder, once all is done.
        dry_run: say the plan, and end.
        dequantize_source: take a source of packed integers (GPTQ, AWQ, compressed-tensors), with a warning.
        log: file that gets one JSON line a layer (uniql_jax/compression/log.py); None: OUT.partial/log.jsonl, while the
            run lasts.
        progress: called with the items of each stage and its name.
        say: gets the plan before the work.

    Returns:
        What was done; None when `resume` finds a checkpoint from the very same inputs, and for a dry run.

    Raises:
        UserError: for bad input; nothing is left behind by a run that cannot start.
    """
    _check_arguments(settings, calib_length, recover, recover_tune)
    source = open_source(ckpt, dequantize=dequantize_source)

    def read() -> tuple[CalibrationWindows, RecoveryData | None]:
        windows = calibration_windows(source, calib, calib_windows, calib_length, settings.seed)
        if not recover:
            return windows, None
        return windows, load_recovery(source, recover, recover_settings, recover_length, recover_tune)

    processes = Processes()
    if processes.first(resume and not overwrite and Path(out).expanduser().is_dir()):
        windows, recovery = read()
        if processes.index == 0:
            _check_finished(out, manifest_of(source, windows.tokens, settings, recovery, progress, windows.own))
        say(f"{out} is whole already: nothing to resume")
        return None
    named = [spec for spec in (*calib, *recover) if not is_own(spec)]
    with workspace(out, resume, overwrite, ckpt, named) as work:
        training = recovery_settings(source.config, recover_settings, recover_tune) if recover else ()
        training = tuple(filter(None, training))
        if not work.started:  # what a started run still needs is less, and unknown
            smallest = lay_out(
                source.config, settings, resources, (0, 0), training, recover_length, free_space(work.folder)
            )
            check_space(work.folder, smallest.disk)
        windows, recovery = read()
        count, length = windows.tokens.shape
        pipeline.check_processes(work.processes, count, recovery is not None, settings, windows.own is not None)
        shape = (-(-count // work.processes.count), length)
        budget = lay_out(source.config, settings, resources, shape, training, recover_length, free_space(work.folder))
        if not work.started:
            check_space(work.folder, budget.disk)
        say(describe(source, out, settings, budget, windows, recovery))
        if dry_run:
            return None
        with contextlib.ExitStack() as files:
            if log is not None:  # refused before anything is kept
                files.enter_context(log_file(Path(log)))
            manifest = manifest_of(source, windows.tokens, settings, recovery, progress, windows.own)
            work.begin(manifest)
            if log is None:
                files.enter_context(log_file(work.folder / "log.jsonl"))
            inputs = Inputs(source, windows.tokens, settings, budget, recovery, windows.own)
            return pipeline.run(work, inputs, manifest, overwrite, {"calibration": windows.description}, progress)


def _check_arguments(
    settings: CompressionSettings, calib_length: int, recover: Sequence[str], recover_tune: int | None
) -> None:
    if not 0 <= (settings.refit or 0.0) < 1:
        raise UserError(f"--refit is a share of the windows, at least 0 and less than 1, not {settings.refit}")
    if settings.reconstruct and not settings.packed:
        raise UserError(f"--reconstruct trains 4 or 8 bits, not {settings.bits}: leave it out, or lower --bits")
    if settings.nested:
        _check_nested(settings, recover_tune)
    if calib_length < 2:
        raise UserError("--calib-length must be at least 2 tokens")
    if recover_tune is not None and not (recover and settings.packed):
        raise UserError("--recover-tune goes on with --recover after quantizing: it wants --recover and 4 or 8 bits")


def _check_nested(settings: CompressionSettings, recover_tune: int | None) -> None:
    if settings.bits != 4:
        raise UserError(f"--nested-bits makes 4 bits of which 3 can stay, not {settings.bits}: leave --bits at 4")
    if settings.portable:
        raise UserError("--nested-bits wants --groups fast: codes in bit planes have no groups inside a head")
    if recover_tune is not None:
        raise UserError("--recover-tune trains one grid, nested bits have two: leave one of them out")


def _check_finished(out: str | Path, manifest: Manifest) -> None:
    """Raise UserError unless `out` is the checkpoint that this very run would make."""
    found = open_checkpoint(Path(out).expanduser()).meta.get("manifest")
    try:
        made_from = Manifest.from_json(found)
    except ValueError:
        raise UserError(f"{out} exists and does not say what it was made from; add --overwrite to replace it") from None
    made_from.require(manifest, out, "was made", "add --overwrite to replace it")
    remove_leftover(out, manifest)


def calibration_windows(source: Source, specs: Sequence[str], count: int, length: int, seed: int) -> CalibrationWindows:
    """Calibration windows with the source's own tokenizer; no specs: mixed text that is always at hand.

    own:N among the specs: N windows that the model writes itself; own: all of them, or half beside other text.
    """
    limit = source.config.max_position
    cut = f" (asked for {length} tokens; the model's limit is {limit})" if length > limit else ""
    length = min(length, limit)
    texts, wanted = [spec for spec in specs if not is_own(spec)], [spec for spec in specs if is_own(spec)]
    own = None
    if wanted:
        own = asked(source, _own_windows(wanted, texts, count), length, seed, "--calib-length", even=True)
        count -= own.windows
        if not texts:
            return CalibrationWindows(np.zeros((own.windows, length), np.int32), described(own) + cut, own)
    tokenizer = source_tokenizer(source)
    if not texts and tokenizer is None:
        raise UserError(f"{source.name} has no tokenizer: give --calib FILE.npy, int32 token ids [samples, length]")
    named = ""
    if not texts:
        texts = data.default_calibration()[0]
        named = "; the default, since no --calib was given"
    found = data.token_windows(texts, tokenizer, length, count, seed, vocab_size=source.config.vocab_size)
    if own is None:
        return CalibrationWindows(found.tokens, found.description + named + cut)
    nothing = np.zeros((own.windows, found.tokens.shape[1]), np.int32)
    return CalibrationWindows(
        np.concatenate([nothing, found.tokens]), f"{described(own)}; {found.description}{cut}", own
    )


def _own_windows(wanted: Sequence[str], texts: Sequence[str], count: int) -> int:
    """How many of the calibration windows the model writes itself."""
    if len(wanted) > 1:
        raise UserError(f"--calib {' '.join(wanted)}: own text is named once, as own or own:N")
    number = own_count(wanted[0], "--calib") or (count // 2 if texts else count)
    if texts and not 0 < number < count:
        raise UserError(
            f"--calib {wanted[0]}: {count} windows (--calib-windows) leave none for own text or none for the other"
        )
    return number
