"""The manifest of a run: every input that decides its result, by name."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Int

from uniql_jax.compression.contract import Progress, RecoveryData, Source
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.manifest import Manifest, hash_array, hash_file, hash_json, settings_entries
from uniql_jax.train.settings import OwnText, RecoverySettings
from uniql_jax.version import __version__

WITHOUT_EFFECT = ("accumulate", "remat")
"""Settings of a training that change memory and time, not what comes of it."""


def manifest_of(
    source: Source,
    tokens: Int[np.ndarray, "n t"],
    settings: CompressionSettings,
    recovery: RecoveryData | None,
    progress: Progress = lambda items, _: items,
    own: OwnText | None = None,
) -> Manifest:
    """Hash all inputs of a run; reads every tensor of the source once. own: how the model writes calibration windows.

    Raises:
        UserError: naming the tensor of the source that holds NaN or infinity.
    """
    inputs = {
        "version of uniql-jax": __version__,
        "version of jax": importlib.metadata.version("jax"),
        "config of the source": hash_json(json.loads(json.dumps(dict(source.hf_config), default=str))),
        "calibration tokens": hash_array(tokens),
        **_side_files(source),
        **settings_entries(dataclasses.asdict(settings), "setting "),
    }
    if own is not None:
        inputs |= settings_entries(dataclasses.asdict(own), "calibration's own text setting ")
    if recovery is not None:
        for name, part in (("training", recovery.train), ("validation", recovery.validation)):
            inputs[f"{name} examples"] = hash_json(
                [hash_array(value) for value in (part.tokens, part.valid, part.learn)]
            )
        if recovery.own is not None:
            inputs |= settings_entries(dataclasses.asdict(recovery.own), "own text setting ")
        inputs |= _training("recovery", recovery.settings)
        if recovery.tuning is not None:
            inputs |= _training("tuning", recovery.tuning)
    parts = source.fingerprints(lambda names, stage, _: progress(list(names), stage))
    inputs |= {f"tensors of the source, {part}": value for part, value in parts.items()}
    return Manifest(inputs)


def _training(name: str, settings: RecoverySettings) -> dict[str, str]:
    deciding = {key: value for key, value in dataclasses.asdict(settings).items() if key not in WITHOUT_EFFECT}
    return settings_entries(deciding, f"{name} setting ")


def _side_files(source: Source) -> dict[str, str]:
    """Tokenizer and the like, which the checkpoint gets."""
    with tempfile.TemporaryDirectory() as folder:
        source.write_side_files(Path(folder))
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {f"file {path.relative_to(folder)}": hash_file(path) for path in files}
