"""What a resumable run was made from: one entry for each input, so that a changed input can be named."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from uniql_jax.errors import UserError
from uniql_jax.outputs import sync

HASH = re.compile(r"[0-9a-f]{64}")
CHUNK = 1 << 24  # bytes hashed at a time
NAMED = 3  # differences that a message lists


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Named inputs of a run, each with a hash of its content or, for a setting, its value as text."""

    entries: dict[str, str]

    @property
    def hash(self) -> str:
        """One hash over all entries, whatever their order."""
        return hash_json(self.entries)

    def differences(self, other: Manifest) -> list[str]:
        """What differs in `other`, sorted by name: "NAME" for content, "NAME (OLD -> NEW)" for a value."""
        found = []
        for name in sorted({*self.entries, *other.entries}):
            old, new = self.entries.get(name), other.entries.get(name)
            if old != new:
                found.append(name + _change(old, new))
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest as JSON, atomically.

        Raises:
            UserError: the file cannot be written.
        """
        write_json(path, {"entries": self.entries})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest | None:
        """The manifest in a file, or None where there is no such file.

        Raises:
            UserError: the file is not a manifest.
        """
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))["entries"]
            if all(isinstance(value, str) for value in entries.values()):
                return cls(dict(entries))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise UserError(f"{path} does not say what its run was made from; remove the work folder to start anew")

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it (docs/format.md)."""
        return {"hash": self.hash, "inputs": dict(self.entries)}

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Inverse of `to_json`; ValueError where the data is no manifest, or its hash is not that of its inputs."""
        inputs = data.get("inputs") if isinstance(data, Mapping) else None
        if not isinstance(inputs, Mapping) or not all(isinstance(value, str) for value in inputs.values()):
            raise ValueError("no manifest")
        found = cls(dict(inputs))
        if found.hash != data.get("hash"):
            raise ValueError("the hash does not belong to the inputs")
        return found

    def require(
        self,
        other: Manifest,
        where: str | os.PathLike[str],
        holds: str = "holds an unfinished run",
        otherwise: str = "remove the folder to start anew",
    ) -> None:
        """Compare the kept manifest (self) of `where` with that of the present run.

        Args:
            other: of the present run.
            where: the work folder or checkpoint that self is of.
            holds: what that is, for the message.
            otherwise: what to do instead of repeating the run, for the message.

        Raises:
            UserError: they differ; the message names what changed.
        """
        changed = self.differences(other)
        if changed:
            more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
            raise UserError(
                f"{where} {holds} with other inputs or settings ({', '.join(changed[:NAMED])}{more}); "
                f"repeat those, or {otherwise}"
            )


def _change(old: str | None, new: str | None) -> str:
    if any(value is not None and (HASH.fullmatch(value) or len(value) > 60) for value in (old, new)):
        return " (new)" if old is None else " (missing)" if new is None else ""
    return f" ({'none' if old is None else old} -> {'none' if new is None else new})"


def settings_entries(settings: Mapping[str, Any], prefix: str = "settings.") -> dict[str, str]:
    """One entry for each setting, with its value as JSON."""
    return {prefix + name: json.dumps(value, sort_keys=True) for name, value in settings.items()}


def hash_array(array: Shaped[Any, "..."]) -> str:
    """SHA-256 of dtype, shape and values of an array (numpy, or whatever numpy can read), in hex."""
    value = np.asarray(array, order="C")
    digest = hashlib.sha256(f"{value.dtype.name} {value.shape}\n".encode())
    flat = value.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, CHUNK):
        digest.update(flat[start : start + CHUNK].data)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value with its keys sorted, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file so that a crash at any moment leaves the old one or the new one, whole.

    Raises:
        UserError: the file cannot be written.
    """
    place = Path(path)
    temporary = place.with_name(f"{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
        sync(place.parent)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
