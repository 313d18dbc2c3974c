"""Write: the whole checkpoint, in a folder of its own next to the artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from uniql_jax.checkpoint_writer import CheckpointWriter
from uniql_jax.compression.contract import DenseModel
from uniql_jax.compression.stored import StoredLayers


def write(
    folder: Path,
    source: DenseModel,
    layers: StoredLayers,
    section: Mapping[str, Any],
    nested: Callable[[int], Mapping[str, Any]] | None = None,
) -> int:
    """Write the checkpoint of the finished layers into `folder`, anew; returns the bytes of its tensors.

    section: of config.json, in addition to bits and groups: plan, settings, provenance, manifest. nested: makes the
    part of it that says how nested codes are given up, of the bytes of all tensors.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer = CheckpointWriter(folder, source.hf_config, layers.meta | dict(section))
    writer.add_top(layers.top())
    for i in range(len(source.config.pattern)):
        writer.add_layer(i, layers.layer(i))
    size = writer.finish(meta=None if nested is None else {"nested": nested(writer.total_bytes)})
    source.write_side_files(folder)
    return size
