"""Which tensor of a checkpoint is which of our leaves: one row a tensor, one table a family.

A row names the dimensions of the foreign tensor in its own order; ours are in `elastic`. The transposition and its
inverse both follow from the names, so there is no code per tensor or per family.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.convert import rows
from uniql_jax.convert.rows import Part as Part
from uniql_jax.convert.rows import Row as Row
from uniql_jax.elastic import Leaf

RAW: dict[str, dict[str, Leaf]] = {"attention": {"v_bias": Leaf(("vo", "kv_head"))}}
"""Leaves that checkpoints have and the core has not: they are folded into others while reading."""


LLAMA: tuple[Row, ...] = (
    *rows.top("model.embed_tokens", "model.norm"),
    *rows.norm("input_layernorm", "attention"),
    *rows.attention("self_attn"),
    *rows.norm("post_attention_layernorm", "mlp"),
    *rows.mlp("mlp"),
)
QWEN3: tuple[Row, ...] = (*LLAMA, *rows.head_norms("self_attn"))

TABLES: dict[str, tuple[Row, ...]] = {
    "llama": LLAMA,
    "qwen2": tuple(row for row in LLAMA if not row.name.endswith("o_proj.bias")),
    "qwen3": QWEN3,
    "mistral": LLAMA,
    "smollm3": LLAMA,
    "granite": LLAMA,
    "granitemoehybrid": (
        *rows.top("model.embed_tokens", "model.norm"),
        *rows.norm("input_layernorm", "attention", "mamba2"),
        *rows.attention("self_attn"),
        *rows.mamba2("mamba"),
        *rows.norm("post_attention_layernorm", "mlp"),
        *rows.packed_mlp("shared_mlp", "input_linear", "output_linear"),
    ),
    "phi3": (
        *rows.top("model.embed_tokens", "model.norm"),
        *rows.norm("input_layernorm", "attention"),
        *rows.packed_attention("self_attn"),
        *rows.norm("post_attention_layernorm", "mlp"),
        *rows.packed_mlp("mlp", "gate_up_proj", "down_proj"),
    ),
    "mamba2": rows.backbone(
        (*rows.top("model.embeddings", "model.norm_f"), *rows.norm("norm", "mamba2"), *rows.mamba2("mixer"))
    ),
    "bamba": (
        *rows.top("model.embed_tokens", "model.final_layernorm"),
        *rows.norm("input_layernorm", "attention", "mamba2"),
        *rows.partly_rotary(rows.attention("self_attn")),
        *rows.mamba2("mamba"),
        *rows.norm("pre_ff_layernorm", "mlp"),
        *rows.mlp("feed_forward"),
    ),
    "nemotron_h": rows.backbone(
        (
            *rows.top("model.embeddings", "model.norm_f"),
            *rows.norm("norm", "attention", "mamba2", "mlp"),
            *rows.attention("mixer"),
            *rows.mamba2("mixer"),
            *rows.mlp("mixer"),
        )
    ),
}
"""By HF's model_type."""

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "bamba": "BambaForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
}
"""The classes that stock runtimes serve a family with, by model_type."""

PREFIXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(TABLES, ("model.", "")),
    "mamba2": ("backbone.", ""),
    "nemotron_h": ("backbone.", "model.", ""),
}
"""What may stand before a tensor's name, the table's own first; files of base models (LlamaModel) have nothing."""


def leaf_of(kind: str, name: str) -> Leaf:
    """Our description of a leaf, raw ones and those outside the layers included."""
    if kind == "top":
        return elastic.TOP[name]
    return RAW.get(kind, {}).get(name) or elastic.BLOCKS[kind][name]


def present(config: ModelConfig, kind: str) -> set[str]:
    """The leaves of a block kind ("top" outside layers) that a checkpoint of this model has, raw ones included."""
    if kind == "top":
        return {"embed", "norm"} | (set() if config.tie_embeddings else {"head"})
    raw = {"v_bias"} if kind == "attention" and config.qkv_bias else set()
    return set(elastic.leaves(config, kind)) | raw


def rows_of(config: ModelConfig, table: tuple[Row, ...], kind: str) -> Iterator[Row]:
    """The rows of one block kind whose leaves this model has, with the parts that it has."""
    leaves = present(config, kind)
    for row in table:
        if row.kind == kind and row.parts[0].leaf in leaves:
            parts = tuple(part for part in row.parts if part.leaf in leaves)
            yield row if len(parts) == len(row.parts) else replace(row, parts=parts)


def as_stored(config: ModelConfig, names: Collection[str]) -> tuple[Row, ...]:
    """The family's table under the names that a checkpoint uses.

    Args:
        config: The model.
        names: The tensors of the checkpoint. Their prefix may be another one, and a tied model may hold its embedding
            under the name of the head.
    """
    table = TABLES[config.model_type]
    own, *others = PREFIXES[config.model_type]
    forms = [table]
    for prefix in others:
        renamed = ((row, row.name.removeprefix(own)) for row in table)
        forms.append(tuple(row if row.name == rest else replace(row, name=prefix + rest) for row, rest in renamed))
    table = max(forms, key=lambda form: len(expected(config, form).keys() & set(names)))  # the first one of equals
    top = {row.parts[0].leaf: row for row in table if row.kind == "top"}
    if config.tie_embeddings and top["embed"].name not in names and top["head"].name in names:
        rest = tuple(row for row in table if row not in (top["embed"], top["head"]))
        return (replace(top["embed"], name=top["head"].name), *rest)
    return table


def _count(sizes: Mapping[str, int], dim: str) -> int:
    return math.prod(sizes[d] for d in dim.split())


def foreign_shape(config: ModelConfig, row: Row) -> tuple[int, ...]:
    """Shape of the foreign tensor."""
    sizes = elastic.sizes(config)
    first = sum(_count(sizes, part.within) * _count(sizes, part.dims[0]) for part in row.parts)
    return (first, *(_count(sizes, dim) for dim in row.parts[0].dims[1:]))


def expected(config: ModelConfig, table: tuple[Row, ...]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this model must hold."""
    names = {row.name: foreign_shape(config, row) for row in rows_of(config, table, "top")}
    for layer, kinds in enumerate(config.pattern):
        for kind in kinds:
            for row in rows_of(config, table, kind):
                names[row.name.format(layer=layer)] = foreign_shape(config, row)
    return names


def to_leaves(config: ModelConfig, row: Row, value: Float[np.ndarray, "..."]) -> dict[str, Float[np.ndarray, "..."]]:
    """The leaves that a foreign tensor holds, in our layout (contiguous)."""
    return {name: np.ascontiguousarray(leaf) for name, leaf in laid_out(config, row, value).items()}


def _sections(row: Row) -> Iterator[tuple[str, list[Part]]]:
    """Parts that alternate inside the entries of one dimension, with that dimension."""
    for within, parts in itertools.groupby(row.parts, key=lambda part: part.within):
        yield within, list(parts)


def laid_out(config: ModelConfig, row: Row, value: Any) -> dict[str, Any]:
    """The leaves that a foreign tensor holds as views in our layout: numpy or, inside a jit, JAX arrays."""
    sizes = elastic.sizes(config)
    leaves, begin = {}, 0
    for within, parts in _sections(row):
        entries, start = _count(sizes, within), 0
        end = begin + entries * sum(_count(sizes, part.dims[0]) for part in parts)
        section = value[begin:end].reshape(entries, -1, *value.shape[1:])
        begin = end
        for part in parts:
            stop = start + _count(sizes, part.dims[0])
            theirs = " ".join((within, *part.dims)).split()
            split = section[:, start:stop].reshape([sizes[dim] for dim in theirs])
            leaf = leaf_of(row.kind, part.leaf)
            split = split.transpose([theirs.index(dim) for dim in leaf.dims if dim not in leaf.shared])
            for place, dim in enumerate(leaf.dims):
                if dim in leaf.shared:
                    split = split[(slice(None),) * place + (None,)].repeat(sizes[dim], place)
            leaves[part.leaf] = split
            start = stop
    return leaves


def from_leaves(
    config: ModelConfig, row: Row, leaves: Mapping[str, Shaped[np.ndarray, "..."]]
) -> Shaped[np.ndarray, "..."]:
    """The foreign tensor that holds these full-size leaves: the inverse of `to_leaves`."""
    sections = []
    sizes = elastic.sizes(config)
    for within, parts in _sections(row):
        pieces = []
        for part in parts:
            leaf, value = leaf_of(row.kind, part.leaf), leaves[part.leaf]
            for place, dim in reversed(list(enumerate(leaf.dims))):
                if dim in leaf.shared:
                    value = _merged(value, place)
            ours = [dim for dim in leaf.dims if dim not in leaf.shared]
            theirs = " ".join((within, *part.dims)).split()
            value = value.transpose([ours.index(dim) for dim in theirs])
            pieces.append(value.reshape([_count(sizes, within), *(_count(sizes, dim) for dim in part.dims)]))
        section = np.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]
        sections.append(section.reshape(-1, *section.shape[2:]))
    return np.ascontiguousarray(np.concatenate(sections) if len(sections) > 1 else sections[0])


def _merged(value: Shaped[np.ndarray, "..."], place: int) -> Shaped[np.ndarray, "..."]:
    """The one value that copies along a dimension share; a copy is zero where its head was cut."""
    where = np.expand_dims(np.abs(value).argmax(place), place)
    return np.take_along_axis(value, where, place).squeeze(place)
