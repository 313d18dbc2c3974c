"""What stages leave on disk: layers as safetensors files, streams as .npy files, each written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from safetensors import safe_open
from safetensors.numpy import load_file

from uniql_jax.files import save_tensors
from uniql_jax.outputs import sync
from uniql_jax.weights.quantized import QuantizedArray


def layer_name(index: int) -> str:
    """Name of a layer's entry in a store."""
    return f"layer_{index:05d}"


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


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary file, make it durable, rename: a kill or a power cut leaves all of it or nothing."""
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


class LayerStore:
    """Entries (a layer, the top leaves, a summary) in one folder: tensors and a small JSON record each."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether this entry was written."""
        return self._path(name).is_file()

    def save(self, name: str, tensors: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
        """Write one entry; float32 arrays that bfloat16 holds exactly are kept as bfloat16."""
        flat: dict[str, Any] = {}
        for key, value in tensors.items():
            if isinstance(value, QuantizedArray):
                flat[f"{key}.data"], flat[f"{key}.scale"] = value.data, value.scale
            else:
                flat[key] = value
        contiguous = {key: np.ascontiguousarray(value) for key, value in narrowed(flat).items()}
        metadata = {"record": json.dumps(dict(record or {}))}
        _write(self._path(name), lambda path: save_tensors(contiguous, path, metadata))

    def load(self, name: str) -> dict[str, np.ndarray]:
        """Tensors of one entry; whoever computes with bfloat16 ones widens them."""
        return load_file(self._path(name))

    def layer(self, index: int) -> dict[str, dict[str, Array]]:
        """A dense layer, float32 {kind: {leaf: array}}, on the device."""
        loaded = unflatten(self.load(layer_name(index)))
        return {kind: {n: jnp.asarray(v, jnp.float32) for n, v in block.items()} for kind, block in loaded.items()}

    def record(self, name: str) -> dict[str, Any]:
        """The JSON record of one entry."""
        with safe_open(self._path(name), framework="np") as handle:
            return json.loads(handle.metadata()["record"])


def narrowed(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors on the host; float32 ones that bfloat16 holds exactly are narrowed on the device first."""
    wide = {key: jnp.asarray(value) for key, value in tensors.items() if value.dtype == np.float32}
    short = {key: _short(value) for key, value in wide.items()}
    exact = jax.device_get({key: same for key, (_, same) in short.items()})
    chosen = {key: short[key][0] if exact.get(key) else value for key, value in tensors.items()}
    return {key: np.asarray(value) for key, value in jax.device_get(chosen).items()}


@jax.jit
def _short(value: Float[Array, "..."]) -> tuple[Array, Bool[Array, ""]]:
    short = value.astype(jnp.bfloat16)
    return short, jnp.array_equal(short.astype(jnp.float32), value)


class Windows:
    """Calibration windows in batches of a bounded number of tokens; what is computed per batch is summed or joined."""

    def __init__(self, tokens: Int[np.ndarray, "n t"], batch_tokens: int):
        size = max(1, batch_tokens // tokens.shape[1])
        self.tokens = tokens.size
        self.batches = [jnp.asarray(tokens[i : i + size]) for i in range(0, len(tokens), size)]

    @property
    def ends(self) -> list[int]:
        """Where each batch ends among the windows."""
        return np.cumsum([len(batch) for batch in self.batches]).tolist()

    def split(self, value: Float[np.ndarray, "n t h"]) -> list[Float[Array, "b t h"]]:
        """A stream of all windows as one array a batch, on the device."""
        return [jnp.asarray(part) for part in np.split(value, self.ends[:-1])]


class StreamStore:
    """Residual streams (and their gradients) of all calibration windows between layers, [windows, length, hidden].

    Every `interval`-th one is kept on disk, where it outlives a kill; those between are held in memory only when asked.
    """

    def __init__(self, folder: Path, windows: Windows, interval: int):
        self.folder, self.windows, self.interval = folder, windows, interval
        self._held: dict[tuple[str, int], list[Array]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str, index: int) -> Path:
        return self.folder / f"{name}_{index:05d}.npy"

    def has(self, name: str, index: int) -> bool:
        """Whether the stream is at hand."""
        return (name, index) in self._held or self._path(name, index).is_file()

    def save(self, name: str, index: int, value: Sequence[Float[Array, "b t h"]]) -> bool:
        """Keep the stream before layer `index` on disk if the interval says so; whether it was kept."""
        if index % self.interval:
            return False
        if not self._path(name, index).is_file():
            _write(self._path(name, index), lambda path: _save_array(path, value))
        return True

    def hold(self, name: str, index: int, value: Sequence[Float[Array, "b t h"]]) -> None:
        """Keep a stream in memory until it is dropped."""
        self._held[name, index] = list(value)

    def load(self, name: str, index: int) -> list[Float[Array, "b t h"]]:
        """The stream in batches, on the device."""
        if (name, index) in self._held:
            return self._held[name, index]
        return self.windows.split(np.load(self._path(name, index), mmap_mode="r"))

    def nearest(self, name: str, index: int) -> int | None:
        """The last index up to `index` whose stream is at hand."""
        return next((i for i in range(index, -1, -1) if self.has(name, i)), None)

    def drop(self, name: str, indices: Sequence[int]) -> None:
        """Forget streams, where they are there."""
        for index in indices:
            self._held.pop((name, index), None)
            self._path(name, index).unlink(missing_ok=True)


def _save_array(path: Path, value: Sequence[Array]) -> None:
    with path.open("wb") as file:
        np.save(file, np.concatenate([np.asarray(part) for part in value]))
