"""Leaves of the elastic checkpoint (docs/format.md): the tensors that a packed one is stored as, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.weights.nested import NestedArray
from uniql_jax.weights.quantized import QuantizedArray

PACKED, NESTED = ("data", "scale"), ("leading", "last", "fine", "coarse")
"""Parts of a packed leaf, and of one of nested codes; a tensor each."""


def parts_of(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Parts of every packed leaf of a checkpoint."""
    return NESTED if section.get("nested") is not None else PACKED


def leaf_group(section: Mapping[str, Any], leaf: elastic.Leaf) -> int:
    """Quantization group of a leaf: along the hidden size, or along the elastic axis that it contracts."""
    return int(section["groups"]["embed" if leaf.contract == "last" else leaf.dims[0]])


def leaf_run(section: Mapping[str, Any], leaf: elastic.Leaf) -> int:
    """Entries of the sorted axis that lie next to one another in a packed leaf (weights/runs.py)."""
    return int((section.get("runs") or {}).get(leaf.dims[0], 1)) if leaf.contract == "first" else 1


def assembled(
    config: ModelConfig,
    meta: Mapping[str, Any],
    leaf: elastic.Leaf,
    parts: Mapping[str, Any],
    keep: Mapping[str, int] | None = None,
) -> QuantizedArray | NestedArray:
    """Put the stored tensors of a packed leaf together again.

    Args:
        config: the model.
        meta: section `uniql` of the checkpoint, which gives bits and groups.
        leaf: the row of `elastic.BLOCKS` or `elastic.TOP` that describes it.
        parts: its tensors, by the names that `parts_of` has for them.
        keep: kept sizes by axis; None: all.

    Returns:
        The weight.
    """
    shape, last = elastic.shape(config, leaf, keep), leaf.contract == "last"
    logical: dict[str, Any] = dict(
        group=leaf_group(meta, leaf),
        contract=str(leaf.contract),
        width=math.prod(shape[-1:] if last else shape[:-1]),
        inner=() if last else shape[1:-1],
    )
    if "data" in parts:
        return QuantizedArray(
            parts["data"], parts["scale"], bits=int(meta["bits"]), run=leaf_run(meta, leaf), **logical
        )
    return NestedArray(*(parts[name] for name in NESTED), **logical)
