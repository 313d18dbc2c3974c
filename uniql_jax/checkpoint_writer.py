"""Writes an elastic checkpoint (docs/format.md): tensors layer by layer, then config.json; and how a leaf is stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from uniql_jax import elastic
from uniql_jax.casting import cast
from uniql_jax.checkpoint_format import SECTION
from uniql_jax.config import ModelConfig
from uniql_jax.files import ShardWriter
from uniql_jax.side_files import copy_side_files
from uniql_jax.value_bias import free_rank, value_bias
from uniql_jax.weights.protocol import as_stored, dense


class CheckpointWriter:
    """Writes an elastic checkpoint layer by layer into a folder that exists (stage it: see files.staged_output)."""

    def __init__(
        self,
        folder: str | Path,
        hf_config: Mapping[str, Any],
        meta: Mapping[str, Any],
        max_shard_bytes: int = 5 * 10**9,
    ):
        self.folder = Path(folder)
        self._hf_config = dict(hf_config)
        self._meta = dict(meta)
        self._shards = ShardWriter(self.folder, max_shard_bytes)

    def add(self, name: str, value: Any) -> None:
        """One leaf, dense or packed; a packed one becomes two tensors."""
        for tensor, array in as_stored(value).tensors(name).items():
            self._shards.add(tensor, array)

    def add_layer(self, i: int, layer: Mapping[str, Mapping[str, Any]]) -> None:
        """All leaves of one layer."""
        for kind, block in layer.items():
            for name, value in block.items():
                self.add(f"layers.{i}.{kind}.{name}", value)

    def add_top(self, top: Mapping[str, Any]) -> None:
        """Leaves outside the layers."""
        for name, value in top.items():
            self.add(name, value)

    @property
    def total_bytes(self) -> int:
        """Of all tensors so far."""
        return self._shards.total_bytes

    def finish(self, side_files_of: str | Path | None = None, meta: Mapping[str, Any] | None = None) -> int:
        """Write what is left, config.json with more of `meta`, and side files; returns the bytes of all tensors."""
        self._shards.finish()
        section = self._meta | dict(meta or {})
        needed = 3 if section.get("nested") is not None else 2 if section.get("runs") else 1
        config = self._hf_config | {SECTION: {"format": needed} | section}
        (self.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if side_files_of is not None:
            copy_side_files(side_files_of, self.folder)
        return self._shards.total_bytes


def stored(leaf: elastic.Leaf, value: Any, dtype: Any, name: str) -> Shaped[np.ndarray, "..."]:
    """How a dense leaf is kept on disk: matrices in `dtype`, vectors in float32.

    Args:
        leaf: the row of `elastic.BLOCKS` or `elastic.TOP` that describes it.
        value: its numbers.
        dtype: of matrices.
        name: of the tensor, for the message.

    Raises:
        UserError: naming the tensor, where a finite value lies beyond the range of the format.
    """
    return cast(name, value, dtype if leaf.contract else np.float32)


def reachable_bias(config: ModelConfig, kind: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """A stored block whose o_bias is one that a value bias can give, where the family has no output bias of its own.

    What rounding took from O, a value bias would lose as well; so the model can be written in its family's own form.
    """
    if "o_bias" not in elastic.leaves(config, kind) or config.o_bias:
        return dict(block)
    v, o, bias = (np.asarray(dense(block[name])) for name in ("v", "o", "o_bias"))
    if free_rank(v, o) is not None:
        return dict(block)
    return dict(block) | {"o_bias": value_bias(o, bias, config.kv_heads)[1]}
