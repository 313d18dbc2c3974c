"""What a run was made from: a hash of every input by name, so that resuming can tell what has changed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uniql_jax.errors import UserError
from uniql_jax.outputs import sync

DIGITS = 32
"""Hex digits kept of each input's hash: 128 bits."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Inputs of a run, name -> hash or short value."""

    inputs: Mapping[str, str]

    @functools.cached_property
    def hash(self) -> str:
        """One hash of all inputs."""
        return hash_bytes([json.dumps(dict(self.inputs), sort_keys=True).encode()])

    def differences(self, other: Manifest) -> list[str]:
        """Names of the inputs that differ, are missing or are new."""
        names = {*self.inputs, *other.inputs}
        return sorted(name for name in names if self.inputs.get(name) != other.inputs.get(name))

    def check(self, other: Manifest, where: str | os.PathLike[str], otherwise: str) -> None:
        """Raise a UserError that names what changed since the run that left `other` at `where`.

        `otherwise` says what to do instead of repeating that run.
        """
        changed = self.differences(other)
        if changed:
            listed = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise UserError(
                f"{where} was made from other inputs; changed: {listed}; --resume wants those it was made from, "
                f"otherwise {otherwise}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint's config.json."""
        return {"hash": self.hash, "inputs": dict(self.inputs)}

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Inverse of `to_json`; ValueError where the data is none or was changed."""
        inputs = data.get("inputs") if isinstance(data, Mapping) else None
        if not isinstance(inputs, Mapping) or not all(isinstance(v, str) for v in inputs.values()):
            raise ValueError("no manifest")
        found = cls(dict(inputs))
        if found.hash != data.get("hash"):
            raise ValueError("the hash does not belong to the inputs")
        return found

    def save(self, path: Path) -> None:
        """Write the manifest whole or not at all."""
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest; UserError when it is damaged."""
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            raise UserError(f"{path} is damaged; remove {path.parent} to start anew") from None


def hash_bytes(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of parts one after another, shortened to `DIGITS` hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:DIGITS]


def hash_arrays(*arrays: Any) -> str:
    """Hash of arrays with their dtypes and shapes."""
    parts: list[bytes | memoryview] = []
    for array in map(np.ascontiguousarray, arrays):
        parts += [f"{array.dtype.name}{array.shape}".encode(), array.reshape(-1).view(np.uint8).data]
    return hash_bytes(parts)


def settings_inputs(prefix: str, settings: Any, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """One input per field of a dataclass of settings, "PREFIX FIELD"; `leave_out` names those that change nothing."""
    values = dataclasses.asdict(settings)
    return {f"{prefix} {name}": json.dumps(value) for name, value in values.items() if name not in leave_out}
