"""What stages leave on disk: layers as safetensors files, each written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped
from safetensors import safe_open

from uniql_jax.compression.processes import Processes
from uniql_jax.compression.writer import Future, Writer
from uniql_jax.files import load_tensors, save_tensors
from uniql_jax.outputs import sync
from uniql_jax.transfer import to_host
from uniql_jax.weights.protocol import as_stored


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


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary file, make it durable, rename: a kill or a power cut leaves all of it or nothing."""
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


class LayerStore:
    """Entries (a layer, the top leaves, a summary) in one folder: tensors and a small JSON record each.

    With a writer, `save` returns at once, and reading an entry waits until it is written. What one of several processes
    lacks, none has.
    """

    def __init__(self, folder: Path, writer: Writer | None = None, processes: Processes | None = None):
        self.folder, self._writer, self._processes = folder, writer, processes or Processes()
        self._pending: dict[str, Future] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        if name in self._pending:
            self._pending.pop(name).result()
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether this entry was written."""
        return self._processes.all(self._path(name).is_file())

    def save(self, name: str, tensors: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
        """Write one entry; float32 arrays that bfloat16 holds exactly are kept as bfloat16."""
        path = self._path(name)
        if self._writer is None:
            self._save(path, tensors, record)
        else:
            self._pending[name] = self._writer.submit(self._save, path, dict(tensors), record)

    def _save(self, path: Path, tensors: Mapping[str, Any], record: Mapping[str, Any] | None) -> None:
        flat: dict[str, Any] = {}
        for key, value in tensors.items():
            if hasattr(value, "take_prefix"):
                flat |= as_stored(value).tensors(key)
            else:
                flat[key] = value
        contiguous = {key: np.ascontiguousarray(value) for key, value in narrowed(flat).items()}
        metadata = {"record": json.dumps(dict(record or {}))}
        write_whole(path, lambda temporary: save_tensors(contiguous, temporary, metadata))

    def load(self, name: str) -> dict[str, np.ndarray]:
        """Tensors of one entry; whoever computes with bfloat16 ones widens them."""
        return load_tensors(self._path(name))

    def stored(self, index: int) -> dict[str, dict[str, np.ndarray]]:
        """A dense layer as it is stored, {kind: {leaf: array}}, in the host's memory."""
        return unflatten(self.load(layer_name(index)))

    def layer(self, index: int) -> dict[str, dict[str, Array]]:
        """A dense layer, float32 {kind: {leaf: array}}, on the device, where it is widened."""
        return unflatten(load_tensors(self._path(layer_name(index)), widened))

    def record(self, name: str) -> dict[str, Any]:
        """The JSON record of one entry."""
        with safe_open(self._path(name), framework="np") as handle:
            return json.loads(handle.metadata()["record"])


def widened(value: Shaped[np.ndarray, "..."]) -> Float[Array, "..."]:
    """A tensor on the device, where it becomes float32."""
    return jax.device_put(value).astype(jnp.float32)


def narrowed(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors on the host; float32 ones that bfloat16 holds exactly are narrowed on the device first."""
    wide = {key: value for key, value in tensors.items() if value.dtype == np.float32}
    short = {key: _short(value) for key, value in wide.items()}
    exact = jax.device_get({key: same for key, (_, same) in short.items()})
    chosen = {key: short[key][0] if exact.get(key) else value for key, value in tensors.items()}
    return to_host(chosen)


@jax.jit
def _short(value: Float[Array, "..."]) -> tuple[Array, Bool[Array, ""]]:
    short = value.astype(jnp.bfloat16)
    return short, jnp.array_equal(short.astype(jnp.float32), value)
