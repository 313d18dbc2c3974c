"""The work folder of a run, or of one of its processes, for one set of inputs: what is done stays until all is."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from uniql_jax.compression.artifacts import LayerStore
from uniql_jax.compression.budget import Budget
from uniql_jax.compression.devices import Devices
from uniql_jax.compression.processes import Processes
from uniql_jax.compression.streams import StreamStore, Windows
from uniql_jax.compression.writer import Writer
from uniql_jax.errors import UserError
from uniql_jax.locking import LOCK, OWNER, hold_lock
from uniql_jax.manifest import Manifest
from uniql_jax.outputs import check_output, output_path, replace_output

MANIFEST = "manifest.json"
PROCESSES = "processes"
OURS = (LOCK, OWNER, PROCESSES)
DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


def work_folder(out: str | Path) -> Path:
    """Where a run keeps what is done."""
    target, index = output_path(out), Processes().index
    return target.with_name(f"{target.name}.partial" + (f"-{index}" if index else ""))


class Workspace:
    """A claimed work folder, each process's own. `started` says whether an earlier run left work in it."""

    def __init__(self, folder: Path, target: Path, writer: Writer):
        self.folder, self.target, self.writer, self.processes = folder, target, writer, Processes()
        self.started = (folder / MANIFEST).is_file()

    def begin(self, manifest: Manifest) -> None:
        """Start a run from these inputs, or go on with one from the very same; UserError names what changed."""
        if self.started:
            kept = Manifest.load(self.folder / MANIFEST)
            assert kept is not None
            kept.require(manifest, self.folder)
            path = self.folder / PROCESSES
            before = int(path.read_text()) if path.is_file() else 1
            if before != self.processes.count:
                raise UserError(f"{self.folder} is the work of one of {before} processes; resume it with as many")
        else:
            if self.processes.count > 1:
                (self.folder / PROCESSES).write_text(f"{self.processes.count}\n")
            manifest.save(self.folder / MANIFEST)
            self.started = True

    def layers(self, name: str) -> LayerStore:
        """A store of layers."""
        return LayerStore(self.folder / name, self.writer, self.processes)

    def streams(self, windows: Windows, dtype: str, budget: Budget, devices: Devices) -> StreamStore:
        """The store of streams."""
        return StreamStore(self.folder / "streams", windows, budget.interval, dtype, self.writer, budget.held, devices)

    def publish(self, staging: Path, overwrite: bool) -> None:
        """Put the finished checkpoint of the first process in its place and remove the work folder."""
        self.writer.flush()
        if self.processes.index == 0:
            replace_output(staging, self.target, overwrite)
        self.processes.all(True)  # until it is there, everybody's work may be needed again
        _remove(self.folder)


@contextlib.contextmanager
def workspace(
    out: str | Path, resume: bool, overwrite: bool, source: str | Path | None = None, texts: Sequence[str] = ()
) -> Iterator[Workspace]:
    """Claim the work folder of `out`; a run that cannot start leaves nothing behind.

    Args:
        out: folder to create.
        resume: whether to go on with an unfinished run.
        overwrite: whether `out` may be a model folder, which is replaced.
        source: the model; neither it nor `out` may lie inside the other.
        texts: what else is read; none of it may lie inside `out`.

    Raises:
        UserError: when `out` cannot be written or overlaps an input, when another process works there, when an
            unfinished run is there and `resume` is False, or when the disk refuses to write.
    """
    check_output(out, overwrite, source, texts)
    target, folder = output_path(out), work_folder(out)
    _check_ours(folder)
    made = _missing_parents(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    try:
        with hold_lock(folder), Writer() as writer:
            work = Workspace(folder, target, writer)
            try:
                if work.started and not resume:
                    raise UserError(
                        f"{folder} holds an unfinished run; add --resume to go on with it, or remove it to start anew"
                    )
                yield work
            except OSError as error:
                if error.errno not in DISK_ERRORS or not work.started:
                    raise
                reason = os.strerror(error.errno)
                raise UserError(f"cannot write {folder}: {reason}; it is kept: mend that and add --resume") from None
            finally:
                if not work.started:
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        if not folder.exists() and not target.exists():
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _check_ours(folder: Path) -> None:
    """Refuse a folder that holds something and no manifest: a run writes that first and removes it last."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not (folder / MANIFEST).is_file() and any(name not in OURS and MANIFEST not in name for name in names):
        raise UserError(f"{folder} is needed for the work and holds something else; move it away")


def remove_leftover(out: str | Path, manifest: Manifest) -> None:
    """Remove what a run killed between its last two steps left; work on a checkpoint from other inputs stays.

    Raises:
        UserError: another process is at work there.
    """
    folder = work_folder(out)
    if folder.is_dir():
        with hold_lock(folder):
            kept = Manifest.load(folder / MANIFEST)
            if kept is not None and not kept.differences(manifest):
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a work folder, its manifest last: what a kill leaves of it is still known for what it is."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _missing_parents(folder: Path) -> list[Path]:
    """The parents that will have to be made, the deepest first."""
    return [parent for parent in folder.parents if not parent.exists()]
