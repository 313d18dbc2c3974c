"""The pass, stage by stage, from an opened source to a whole elastic checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from uniql_jax.blas import one_blas_thread
from uniql_jax.compression.budget import lay_out
from uniql_jax.compression.contract import Gains, Inputs, Progress, RecoveryData, Report, SortedModel, Source
from uniql_jax.compression.devices import Devices
from uniql_jax.compression.inputs import manifest_of
from uniql_jax.compression.own_windows import write as write_own
from uniql_jax.compression.precision import matmul_precision
from uniql_jax.compression.processes import Processes
from uniql_jax.compression.recovery import with_own_text
from uniql_jax.compression.settings import RECOVER_LENGTH, CompressionSettings, Resources
from uniql_jax.compression.stages.calibrate import Calibration, Top, forward_sweep
from uniql_jax.compression.stages.plan import joint_plan
from uniql_jax.compression.stages.plan import plan as make
from uniql_jax.compression.stages.quantize import quantize
from uniql_jax.compression.stages.recover import Recovered, recover
from uniql_jax.compression.stages.sort import sort
from uniql_jax.compression.stages.tune import tune
from uniql_jax.compression.stages.write import write
from uniql_jax.compression.stored import StoredLayers
from uniql_jax.compression.streams import StreamStore, Windows
from uniql_jax.compression.workspace import Workspace, workspace
from uniql_jax.errors import UserError
from uniql_jax.manifest import Manifest
from uniql_jax.outputs import check_space, free_space
from uniql_jax.version import __version__


def compress(
    source: Source,
    out: str | Path,
    tokens: Int[np.ndarray, "n t"],
    settings: CompressionSettings | None = None,
    *,
    resources: Resources | None = None,
    recovery: RecoveryData | None = None,
    resume: bool = False,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = lambda items, _: items,
) -> Report:
    """Calibrate, sort, plan, recover if asked, rotate, quantize, tune if asked, write.

    One layer is in memory at a time (while training, the whole model). Work that is done lies in `OUT.partial` until
    the checkpoint is whole; after a kill, resume=True goes on from there and gives the same bytes.

    Args:
        source: the opened model.
        out: folder to create.
        tokens: calibration windows without padding, int32 [windows, length].
        settings: what decides the result.
        resources: what the run may use; does not change the result.
        recovery: what to train on, and how.
        resume: go on with an unfinished run of the very same inputs.
        overwrite: replace `out`, if it is a model folder, at the very end.
        provenance: what the checkpoint says of where it comes from.
        progress: called with the items of each stage and its name.

    Returns:
        What was done.

    Raises:
        UserError: when `out` exists, another process or another run's work is in the way, an input has changed since
            the run that is resumed, the disk is too small, or a value is not finite.
    """
    settings = settings or CompressionSettings()
    with workspace(out, resume, overwrite, source.name) as work:
        training = () if recovery is None else tuple(filter(None, (recovery.settings, recovery.tuning)))
        check_processes(work.processes, len(tokens), recovery is not None, settings)
        shape = (-(-len(tokens) // work.processes.count), tokens.shape[1])
        length = recovery.train.tokens.shape[1] if recovery is not None else RECOVER_LENGTH
        budget = lay_out(
            source.config, settings, resources or Resources(), shape, training, length, free_space(work.folder)
        )
        if not work.started:
            check_space(work.folder, budget.disk)
        manifest = manifest_of(source, tokens, settings, recovery, progress)
        work.begin(manifest)
        inputs = Inputs(source, tokens, settings, budget, recovery)
        return run(work, inputs, manifest, overwrite, provenance or {}, progress)


def check_processes(
    processes: Processes, windows: int, recovery: bool, settings: CompressionSettings, own: bool = False
) -> None:
    """Raise UserError where several processes cannot do together what was asked for."""
    if processes.count > windows:
        raise UserError(f"{windows} calibration windows are too few for {processes.count} processes")
    if processes.count > 1 and recovery:
        raise UserError("recovery is the work of one process: compress without --recover, or with one process")
    if processes.count > 1 and own:
        raise UserError("own text is written by one process: give --calib other text, or compress with one process")
    if processes.count > 1 and settings.reconstruct:
        raise UserError("layers are reconstructed by one process: compress without --reconstruct, or with one process")
    if processes.count > 1 and settings.nested:
        raise UserError("nested bits are the work of one process: compress without --nested-bits, or with one process")


@one_blas_thread
def run(
    work: Workspace,
    inputs: Inputs,
    manifest: Manifest,
    overwrite: bool,
    provenance: Mapping[str, Any],
    progress: Progress,
) -> Report:
    """All stages in a workspace whose inputs are known to be the manifest's.

    Args:
        work: the claimed work folder, begun with `manifest`.
        inputs: what the run is made from.
        manifest: of the inputs; goes into the checkpoint.
        overwrite: replace the output, if it is a model folder, at the very end.
        provenance: what the checkpoint says of where it comes from.
        progress: called with the items of each stage and its name.

    Returns:
        What was done.
    """
    source, settings, recovery = inputs.source, inputs.settings, inputs.recovery
    if inputs.own is not None:
        rows = write_own(source, inputs.own, work.folder / "own-calibration", progress)
        inputs = dataclasses.replace(inputs, tokens=np.concatenate([rows, inputs.tokens[len(rows) :]]))
    top = source.device_top()
    # Statistics and what is solved from them want float32 products; training wants fast ones.
    with jax.default_matmul_precision(matmul_precision(settings)):
        calibration, original = _sorted(work, inputs, top, progress)
    gained, tuned, model = None, None, original
    if recovery is not None:
        recovery = with_own_text(source, recovery, work.folder / "own", progress)
        recovered = Recovered(work.folder / "recovered", original.layers, recovery.settings.alpha, work.writer)
        gained = recover(original, recovery, work.folder / "recover", recovered, progress, manifest)
        model = original._replace(layers=recovered)
    finished, unrounded = work.layers("quantized"), work.layers("unrounded") if inputs.tuning else None
    fisher = work.layers("fisher") if settings.nested else None
    with jax.default_matmul_precision(matmul_precision(settings)):
        quantize(model, calibration, settings, finished, unrounded, _streams(work, inputs), progress, fisher)
    stored = StoredLayers(source.config, settings, finished)
    if recovery is not None and inputs.tuning is not None and unrounded is not None:
        store = work.layers("tuned")
        teacher = original if inputs.tuning.teacher == "original" else model
        tuned = tune(teacher, stored, unrounded, recovery, work.folder / "tune", store, progress, manifest)
        stored = StoredLayers(source.config, settings, store)
    section = {
        "plan": original.plan.to_json(),
        "influence": list(calibration.influence),
        "options": dataclasses.asdict(settings),
        "provenance": _provenance(source, provenance, recovery, gained, tuned),
        "manifest": manifest.to_json(),
    }

    def nested(total: int) -> dict[str, Any]:
        return joint_plan(source.config, original.plan, original.layers, finished, total).to_json()

    folder, size = work.folder / "checkpoint", 0
    if work.processes.index == 0:
        size = write(folder, source, stored, section, nested if settings.nested else None)
    work.publish(work.folder / "checkpoint", overwrite)
    return Report(original.plan, calibration.influence, size, gained, tuned)


def _sorted(work: Workspace, inputs: Inputs, top: Top, progress: Progress) -> tuple[Calibration, SortedModel]:
    """Calibrate, sort, plan."""
    source, settings, layers = inputs.source, inputs.settings, work.layers("sorted")
    streams = _streams(work, inputs)
    calibration = forward_sweep(source, top, work.layers("calibration"), streams, progress)
    sort(source, top, settings, layers, streams, progress, work.layers("fisher") if settings.nested else None)
    return calibration, SortedModel(source.config, make(source.config, calibration, layers, settings), top, layers)


def _streams(work: Workspace, inputs: Inputs) -> StreamStore:
    """The store of streams, as the budget lays it out."""
    budget = inputs.budget
    own = work.processes.share(len(inputs.tokens))
    windows = Windows(inputs.tokens, budget.batch_tokens, budget.devices, own)
    return work.streams(windows, inputs.settings.stream_dtype, budget, Devices(budget.devices, budget.parked))


def _provenance(
    source: Source,
    given: Mapping[str, Any],
    recovery: RecoveryData | None,
    gained: Gains | None,
    tuned: Gains | None,
) -> dict[str, Any]:
    """Where a checkpoint comes from: version, source, text, and what training won at which settings."""
    found = {"version": __version__, "source": Path(source.name).name, **given}
    if recovery is not None and gained is not None:
        found["recovery"] = {"options": dataclasses.asdict(recovery.settings), **gained.to_json()}
    if recovery is not None and recovery.tuning is not None and tuned is not None:
        found["tuning"] = {"options": dataclasses.asdict(recovery.tuning), **tuned.to_json()}
    return found
