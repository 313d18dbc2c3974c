"""Our elastic checkpoint, at any prune rate, as a Hugging Face folder in the form of the library compressed-tensors.

Integers and scales leave as they are ("pack-quantized"), so nothing is rounded again. All layers have one MLP width,
the largest that the rate keeps; what was cut besides is zeros. Groups along V/O that span all heads become shorter
groups of a head's own ranks with the same scale, for which a few more bytes are spent; portable groups stay as they
are.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Int, Shaped

from uniql_jax import console, elastic
from uniql_jax.casting import cast
from uniql_jax.checkpoint import Checkpoint, leaf_run, open_checkpoint
from uniql_jax.config import ModelConfig
from uniql_jax.convert import tables
from uniql_jax.convert.exporting import Planned, Request, table
from uniql_jax.convert.integers import foreign, integers
from uniql_jax.convert.leaves import top_factors
from uniql_jax.convert.to_hf import hf_form, top_to_hf
from uniql_jax.errors import UserError
from uniql_jax.files import ShardWriter, copy_side_files
from uniql_jax.outputs import check_output, check_space, staged_output
from uniql_jax.plan import check_rate
from uniql_jax.weights.protocol import dense
from uniql_jax.weights.quantized import QuantizedArray

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "granite")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HEAD = "lm_head.weight"
DENSE = "bfloat16"
UNPACKED = ("embed", "head_in")
"""Leaves that stay dense: transformers cannot load a packed embedding."""


@dataclasses.dataclass(frozen=True)
class Form:
    """The model that is written: unpruned but for one MLP width, with the table of its tensors and group sizes.

    `groups` has the weights that share a scale in each packed matrix, by leaf; a leaf that is not in it leaves dense.
    """

    config: ModelConfig
    table: tuple[tables.Row, ...]
    bits: int
    groups: Mapping[str, int]

    def group(self, leaf: str, has_head_in: bool) -> int | None:
        """Group size of a leaf; None where it leaves dense."""
        return None if leaf == "head" and has_head_in else self.groups.get(leaf)


def form_of(
    config: ModelConfig, bits: int, grouping: Mapping[str, Any], ffn: int, table: tuple[tables.Row, ...]
) -> Form:
    """The form of a model at one rate, from sizes alone.

    Args:
        config: the unpruned model.
        bits: 4 or 8.
        grouping: `groups` and, where there are any, `runs` of the checkpoint, as plan.grouping gives them.
        ffn: MLP width of the widest layer at this rate.
        table: which tensor is which leaf.
    """
    found, sizes = {}, elastic.sizes(config) | {"ffn": ffn}
    described = {**elastic.BLOCKS["attention"], **elastic.BLOCKS["mlp"], **elastic.TOP}
    for name, leaf in described.items():
        if leaf.contract is None or name in UNPACKED:
            continue
        along = leaf.dims[-1] if leaf.contract == "last" else leaf.dims[0]
        spans = leaf.contract == "first" and leaf_run(grouping, leaf) == 1
        inner = math.prod(sizes[dim] for dim in leaf.dims[1:-1]) if spans else 1
        group = grouping["groups"][along]
        if group % inner == 0 and sizes[along] % (group // inner) == 0:
            found[name] = group // inner
    return Form(dataclasses.replace(config, intermediate_size=ffn), table, bits, found)


def packed_row(
    form: Form, kind: str, row: tables.Row, weight: QuantizedArray, inv_freq: Any
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The three tensors of a packed matrix: words, scales and its shape."""
    name, config = row.parts[0].leaf, form.config
    leaf, group = tables.leaf_of(kind, name), form.groups[name]
    along = leaf.dims[-1] if leaf.contract == "last" else leaf.dims[0]
    scale = np.asarray(weight.scale)
    if weight.run > 1:
        scale = scale.reshape(-1, *weight.inner, scale.shape[-1])
    elif leaf.contract == "first":  # one scale for a few entries of the axis, whatever lies between it and the features
        shape = (scale.shape[0], *weight.shape[1:-1], scale.shape[-1])
        scale = np.broadcast_to(scale.reshape(scale.shape[0], *(1,) * len(shape[1:-1]), scale.shape[-1]), shape)
    shorter = {"embed": "hidden_size", "ffn": "intermediate_size", "vo": "head_dim"}[along]
    narrow = dataclasses.replace(config, **{shorter: getattr(config, shorter) // group})
    stem = row.name.removesuffix("weight")
    codes = foreign(config, kind, row, integers(weight), inv_freq)
    return {
        f"{stem}weight_packed": words(codes, form.bits),
        f"{stem}weight_scale": foreign(narrow, kind, row, scale, inv_freq),
        f"{stem}weight_shape": np.asarray(codes.shape, np.int64),
    }


def words(codes: Int[np.ndarray, "rows width"], bits: int) -> Int[np.ndarray, "rows words"]:
    """Integers, each with its offset, the first one in the lowest bits of an int32."""
    per_word = 32 // bits
    width = -(-codes.shape[1] // per_word) * per_word
    biased = np.full((codes.shape[0], width), 0, np.uint32)
    biased[:, : codes.shape[1]] = codes.astype(np.int32) + (1 << (bits - 1))
    out = np.zeros((codes.shape[0], width // per_word), np.uint32)
    for k in range(per_word):
        out |= biased[:, k::per_word] << np.uint32(bits * k)
    return out.view(np.int32)


def planned(form: Form, has_head: bool, has_head_in: bool) -> Iterator[Planned]:
    """Every tensor of the model with its type and bytes, from sizes alone."""
    kinds = [("top", None), *((kind, i) for i, kinds in enumerate(form.config.pattern) for kind in kinds)]
    for kind, i in kinds:
        for row in _rows(form, kind, has_head or has_head_in):
            shape, leaf = tables.foreign_shape(form.config, row), row.parts[0].leaf
            group, count = form.group(leaf, has_head_in), math.prod(shape)
            name = row.name.format(layer=i)
            if group is None:
                yield Planned(name, DENSE, count * 2, _why_dense(kind, leaf, has_head_in))
            else:
                per_word = 32 // form.bits
                size = shape[0] * (-(-shape[1] // per_word)) * 4 + count // group * 2 + 16
                yield Planned(name, f"int{form.bits} in groups of {group}", size)


def _why_dense(kind: str, leaf: str, has_head_in: bool) -> str:
    if tables.leaf_of(kind, leaf).contract is None:
        return ""
    if leaf == "embed":
        return "transformers takes embeddings unpacked"
    return "the head times what undoes the rotation" if has_head_in and leaf == "head" else "groups do not divide it"


def _rows(form: Form, kind: str, has_head: bool) -> Iterator[tables.Row]:
    leaves = {"embed", "norm", *(("head",) if has_head else ())}
    if kind != "top":
        leaves = tables.present(form.config, kind)
    return (row for row in form.table if row.kind == kind and row.parts[0].leaf in leaves)


def _tensors(form: Form, kind: str, i: int | None, leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a block ("top" outside the layers)."""
    turned = top_to_hf(form.config, leaves, form.table) if "head_in" in leaves else {}
    factors = top_factors(form.config, "head" not in leaves and not turned) if kind == "top" else {}
    inv_freq = leaves.get("inv_freq")
    for row in _rows(form, kind, "head" in leaves or bool(turned)):
        leaf = row.parts[0].leaf
        name = row.name.format(layer=i)
        if leaf == "v_bias":  # folded into the output bias
            yield name, np.zeros(tables.foreign_shape(form.config, row), BFLOAT16)
        elif leaf == "head" and turned:
            yield name, cast(name, turned[name], BFLOAT16)
        elif form.group(leaf, bool(turned)) is None:
            value = np.asarray(dense(leaves[leaf])) / np.float32(factors.get(leaf, 1.0))
            value = foreign(form.config, kind, row, value, inv_freq)
            yield name, cast(name, value, BFLOAT16)
        else:
            made = packed_row(form, kind, row, leaves[leaf], inv_freq)
            yield from ((tensor.format(layer=i), value) for tensor, value in made.items())


def quantization_config(form: Form, has_head: bool, has_head_in: bool) -> dict[str, Any]:
    """The section of config.json by which the library finds groups and bits of every matrix."""
    targets: dict[int, list[str]] = {}
    for kind in ("top", "attention", "mlp"):
        for row in _rows(form, kind, has_head or has_head_in):
            group = form.group(row.parts[0].leaf, has_head_in)
            if group is not None:
                module = row.name.removesuffix(".weight").rsplit(".", 1)[-1]
                targets.setdefault(group, []).append(f"re:(.*[.])?{module}$")
    weights = {"num_bits": form.bits, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
    groups = {
        f"group_{k}": {"targets": names, "weights": weights | {"group_size": group}}
        for k, (group, names) in enumerate(sorted(targets.items()))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"] if has_head_in else [],
    }


def _form(checkpoint: Checkpoint, rate: float) -> tuple[Form, dict[str, Any]]:
    """What is written, and its config.json without the quantization."""
    config, keep = checkpoint.config, checkpoint.keep(rate)
    # an output bias is written as one: in a value bias it would change what is packed
    held = {part.leaf for row in tables.TABLES[config.model_type] for part in row.parts}
    fits = "o_bias" in held or "o_bias" not in elastic.leaves(config, "attention")
    names = {name.split(".")[0] for name in checkpoint.tensors}
    hf, rows = hf_form(config, checkpoint.hf_config, not {"head", "head_in"} & names, fits, DENSE)
    ffn = max(kept["ffn"] for kept in keep)
    return form_of(config, checkpoint.bits, checkpoint.meta, ffn, rows), hf | {"intermediate_size": ffn}


def write(request: Request) -> None:
    """Write an elastic checkpoint, cut at a prune rate, as a packed Hugging Face folder.

    Raises:
        UserError: a checkpoint without integers or of another family, a bad rate or output, a full disk.
    """
    ckpt, out = request.checkpoint, request.out
    check_output(out, request.overwrite, ckpt)
    checkpoint, rate = open_checkpoint(ckpt), check_rate(request.prune_rate)
    if checkpoint.config.model_type not in FAMILIES:
        raise UserError(
            f"{checkpoint.config.model_type} models cannot leave packed (only {', '.join(FAMILIES)}); "
            "use --format transformers"
        )
    if checkpoint.bits > 8:
        raise UserError(f"{ckpt} has {checkpoint.bits} bits, nothing to leave packed; use --format transformers")
    form, hf = _form(checkpoint, rate)
    top = checkpoint.top()
    head, head_in = "head" in top, "head_in" in top
    plan = list(planned(form, head, head_in))
    size = sum(tensor.nbytes for tensor in plan)
    request.say(f"{ckpt} at prune rate {rate:g} -> {out}: compressed-tensors, about {console.format_bytes(size)}")
    request.say(table(plan))
    with staged_output(out, request.overwrite, ckpt) as staging:
        check_space(staging, size)
        writer = ShardWriter(staging, request.max_shard_bytes)
        for name, value in _tensors(form, "top", None, top):
            writer.add(name, value)
        for i in request.progress(range(len(form.config.pattern)), "export"):
            layer = checkpoint.layer(i, checkpoint.keep(rate)[i], shared_whole=True)
            for kind in form.config.pattern[i]:
                for name, value in _tensors(form, kind, i, layer[kind]):
                    writer.add(name, value)
        writer.finish()
        hf["quantization_config"] = quantization_config(form, head, head_in)
        (staging / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        copy_side_files(checkpoint.folder, staging)
