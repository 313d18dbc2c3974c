"""The work folder of a training run: the manifest of its inputs, its log, and the newest state to resume from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.locking import LOCK, OWNER
from uniql_jax.manifest import Manifest, hash_array, hash_json, settings_entries
from uniql_jax.outputs import check_space
from uniql_jax.plan import Plan
from uniql_jax.train import lora
from uniql_jax.train.examples import Examples
from uniql_jax.train.settings import RecoverySettings
from uniql_jax.version import __version__

LOG = "log.jsonl"
RUN = "run.json"
RESUME = "; what is done so far is kept: mend the disk and add --resume"
FREE_SETTINGS = ("accumulate", "remat")
"""Settings that say how a step is computed, not what: a run may be resumed with others."""
DISK = re.compile(r"no space left|read-only file system|permission denied|file too large|disk quota", re.IGNORECASE)


def check_work_folder(folder: Path, resume: bool) -> None:
    """Refuse, before anything long begins, a work folder that is in the way.

    Raises:
        UserError: it holds an unfinished run and `resume` is false, or something that is no run of ours.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is needed for the work and is not a folder; move it away")
    names = {path.name for path in folder.iterdir()}
    if RUN in names:
        if not resume:
            raise UserError(
                f"{folder} holds an unfinished run; add --resume to go on with it, or remove it to start anew"
            )
    elif any(name not in (LOCK, OWNER) and not name.startswith(f"{RUN}.") for name in names):
        raise UserError(f"{folder} is needed for the work and holds something else; move it away")


def state_bytes(config: ModelConfig, options: RecoverySettings) -> int:
    """About what the states of a run take on the disk: the newest, and one that is being written."""
    trained, _ = lora.planned(config, options.rank)
    copies = 4  # factors, two means of the optimizer for each, and the best factors so far
    return 2 * 4 * copies * trained


def has_state(folder: Path) -> bool:
    """Whether a work folder holds a state that a run could go on from."""
    return any(place.name.isdigit() for part in (folder, folder / "adapt") for place in (part / "state").glob("*"))


@contextlib.contextmanager
def disk_errors(place: Path, kept: bool = True) -> Iterator[None]:
    """Turn a disk that cannot be written into a UserError of one line.

    Args:
        place: what is being written.
        kept: whether there is work that a resumed run would go on from.
    """
    log = logging.getLogger("absl")  # orbax logs what its threads raise, before it raises it here
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # orbax and tensorstore wrap the system's errors in several kinds of their own
        reason = error.strerror if isinstance(error, OSError) else None
        found = DISK.search(str(error))
        if reason is None and found is None:
            raise
        advice = RESUME if kept else ""
        raise UserError(f"cannot write {place}: {reason or (found and found[0].lower())}{advice}") from None
    finally:
        log.setLevel(level)


def manifest(
    config: ModelConfig,
    layers: Sequence[lora.Layer],
    top: Mapping[str, Any],
    plan: Plan,
    training: Examples,
    validation: Examples,
    options: RecoverySettings,
    teacher: tuple[Sequence[lora.Layer], Mapping[str, Any]] | None = None,
) -> Manifest:
    """Every input that the numbers of a run depend on: each tensor, the data, and the settings."""
    entries = {"version": __version__, "model config": hash_json(repr(config)), "plan": hash_json(plan.digest)}
    for model, (blocks, tables) in {"": (layers, top), "teacher ": teacher or ((), {})}.items():
        entries |= {f"{model}{name}": _hash(value) for name, value in tables.items()}
        for i, layer in enumerate(blocks):
            for kind, block in layer.items():
                entries |= {f"{model}layer {i} {kind}.{name}": _hash(value) for name, value in block.items()}
    for use, part in {"training": training, "validation": validation}.items():
        entries |= {f"{use} {name}": hash_array(getattr(part, name)) for name in ("tokens", "valid", "learn")}
    settings = {name: value for name, value in dataclasses.asdict(options).items() if name not in FREE_SETTINGS}
    return Manifest(entries | settings_entries(settings, ""))


def _hash(value: Any) -> str:
    parts = [hash_array(part) for part in jax.tree.leaves(value)]
    return parts[0] if len(parts) == 1 else hash_json(parts)


class Log:
    """A .jsonl file of losses; a resumed run takes back what came after the state that it goes on from."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = path.read_text().split("\n") if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, path)
        self.last = int(_step_of(kept[-1])) if kept else 0

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(dict(entry)) + "\n")
        self.last = entry["step"]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut short by the kill
        return math.inf


class Saved:
    """The resumable state in a work folder, through orbax: the newest whole one is what counts."""

    def __init__(self, folder: Path, made_from: Manifest):
        """Open a work folder, or make one.

        Raises:
            UserError: the folder belongs to a run with other inputs, or cannot be written.
        """
        import orbax.checkpoint as ocp  # slow to import

        self._args, self.folder = ocp.args, folder
        with disk_errors(folder, has_state(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            kept = Manifest.load(folder / RUN)
            if kept is None:
                made_from.save(folder / RUN)
            else:
                kept.require(made_from, folder)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
            )
            self._manager = ocp.CheckpointManager(
                (folder / "state").absolute(), options=options, item_names=("arrays", "notes")
            )

    def save(self, step: int, arrays: Any, notes: Mapping[str, Any]) -> None:
        """Keep a state, on the disk itself; a kill in the middle leaves the one before.

        Raises:
            UserError: the disk cannot be written.
        """
        state, noted = self._args.StandardSave(arrays), self._args.JsonSave(dict(notes))
        kept = has_state(self.folder)
        try:  # tensorstore's threads print what they raise on a full disk, so better not to begin
            check_space(self.folder, sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)))
        except UserError as error:
            raise UserError(f"{error}{RESUME if kept else ''}") from None
        with disk_errors(self.folder, kept):
            self._manager.save(step, args=self._args.Composite(arrays=state, notes=noted))
            _sync(self.folder / "state" / str(step))
            for older in self._manager.all_steps():
                if older < step:
                    self._manager.delete(older)

    def load(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, arrays placed as those of `like`, notes) of the newest state, or None."""
        step = self._manager.latest_step()
        if step is None:
            return None
        kept, noted = self._args.StandardRestore(like), self._args.JsonRestore()
        found = self._manager.restore(step, args=self._args.Composite(arrays=kept, notes=noted))
        return step, found["arrays"], found["notes"]

    def close(self) -> None:
        """Let go of the folder."""
        self._manager.close()


def _sync(folder: Path) -> None:
    """Flush a folder's files, and the names in it and above it, to the disk."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        with contextlib.suppress(PermissionError, IsADirectoryError):  # systems that cannot open folders
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
