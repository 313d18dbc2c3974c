"""The work folder of a run: whose it is, and finished layers one file each, so that a killed run goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Int
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from uniql_jax.compression.contract import Recovery, Source
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.errors import UserError
from uniql_jax.files import check_space
from uniql_jax.version import __version__
from uniql_jax.weights.quantized import QuantizedArray


def fingerprint(
    source: Source, tokens: Int[np.ndarray, "n t"], options: CompressionSettings, recover: Recovery | None
) -> str:
    """Names a run: its source, its settings and its text; another one must not go on with its work."""
    facts = [__version__, source.name, dict(source.hf_config), dataclasses.asdict(options), tokens.shape]
    facts.append(recover.digest() if recover else None)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(np.ascontiguousarray(tokens).tobytes())
    # Other weights under the same name: a layer at either end tells.
    for i in sorted({0, len(source.config.pattern) - 1}):
        for name, value in sorted(flatten(source.layer(i)).items()):
            digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def prepare(folder: Path, name: str, resume: bool, needed: int) -> None:
    """The work folder of the run `name`, new or gone on with; nothing is created when it cannot start.

    Raises UserError where another run's work is in the way, the disk lacks `needed` bytes, or nothing may be written.
    """
    note = folder / "run.json"
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()  # killed before it began
    if folder.exists():
        same = note.is_file() and json.loads(note.read_text())["fingerprint"] == name
        if resume and not same:
            raise UserError(f"{folder} holds a run with other settings; remove it or repeat those settings")
        if not resume:
            state = "add --resume to go on with it" if same else "remove it to start anew"
            raise UserError(f"{folder} holds an unfinished run; {state}")
        return
    check_space(folder, needed)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    temporary = folder / "run.tmp"
    temporary.write_text(json.dumps({"fingerprint": name}))
    os.replace(temporary, note)


class LayerStore:
    """Layers as safetensors files in one folder, written whole or not at all, with a small JSON record each."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether this entry was finished."""
        return self._path(name).is_file()

    def save(self, name: str, tensors: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
        """Write one entry; float32 arrays that bfloat16 holds exactly are kept as bfloat16."""
        flat: dict[str, np.ndarray] = {}
        for key, value in tensors.items():
            if isinstance(value, QuantizedArray):
                flat[f"{key}.data"], flat[f"{key}.scale"] = np.asarray(value.data), np.asarray(value.scale)
            else:
                flat[key] = _narrow(np.asarray(value))
        temporary = self._path(name).with_suffix(".tmp")
        contiguous = {key: np.ascontiguousarray(value) for key, value in flat.items()}
        save_file(contiguous, temporary, metadata={"record": json.dumps(dict(record or {}))})
        os.replace(temporary, self._path(name))

    def load(self, name: str) -> dict[str, np.ndarray]:
        """Tensors of one entry, bfloat16 widened again by whoever computes with them."""
        return load_file(self._path(name))

    def record(self, name: str) -> dict[str, Any]:
        """The JSON record of one entry."""
        with safe_open(self._path(name), framework="np") as handle:
            return json.loads(handle.metadata()["record"])


def _narrow(value: np.ndarray) -> np.ndarray:
    if value.dtype != np.float32:
        return value
    short = value.astype(ml_dtypes.bfloat16)
    return short if np.array_equal(short.astype(np.float32), value) else value


class StreamStore:
    """Streams of calibration windows, [windows, length, hidden] float32: in memory while they fit, else on disk.

    Those on disk outlive a kill; those in memory are cheap to compute again.
    """

    def __init__(self, folder: Path, bytes_needed: int, memory_budget: int):
        self.folder = folder
        self._memory: dict[str, np.ndarray] | None = {} if bytes_needed <= memory_budget else None
        if self._memory is None:
            folder.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether the stream is at hand."""
        return name in self._memory if self._memory is not None else (self.folder / f"{name}.npy").is_file()

    def save(self, name: str, value: np.ndarray) -> None:
        """Keep one stream."""
        if self._memory is not None:
            self._memory[name] = value
            return
        temporary = self.folder / f"{name}.tmp.npy"
        np.save(temporary, value)
        os.replace(temporary, self.folder / f"{name}.npy")

    def load(self, name: str) -> np.ndarray:
        """One stream; from disk it is read as it is used."""
        if self._memory is not None:
            return self._memory[name]
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def drop(self, name: str) -> None:
        """Forget one stream, if it is there."""
        if self._memory is not None:
            self._memory.pop(name, None)
        else:
            (self.folder / f"{name}.npy").unlink(missing_ok=True)


def flatten(layer: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{kind: {leaf: value}} -> {"kind.leaf": value}."""
    return {f"{kind}.{name}": value for kind, block in layer.items() for name, value in block.items()}


def unflatten(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Inverse of `flatten`."""
    out: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        out.setdefault(kind, {})[name] = value
    return out
