"""The work folder of a run: finished layers one file each, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from uniql_jax.int4 import QuantizedArray


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
