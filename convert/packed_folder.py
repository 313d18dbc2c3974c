"""Folders of packed integers, which several runtimes take with words of their own: the model that is written, and how.

Integers and scales leave as they are, so nothing is rounded again. All layers have one MLP width, the largest that the
rate keeps; what else was cut is zeros. Groups along V/O that span all heads become shorter groups of a head's own
ranks with the same scale; portable groups stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Int, Shaped

from uniql_jax import console, elastic
from uniql_jax.casting import cast
from uniql_jax.checkpoint import Checkpoint, open_checkpoint
from uniql_jax.checkpoint_leaves import leaf_run
from uniql_jax.config import ModelConfig
from uniql_jax.convert import tables
from uniql_jax.convert.exporting import Planned, Request, table
from uniql_jax.convert.integers import foreign, integers
from uniql_jax.convert.leaves import top_factors
from uniql_jax.convert.to_hf import hf_form, top_to_hf
from uniql_jax.errors import UserError
from uniql_jax.files import ShardWriter
from uniql_jax.outputs import check_output, check_space, staged_output
from uniql_jax.plan import check_rate
from uniql_jax.side_files import copy_side_files
from uniql_jax.weights.protocol import dense
from uniql_jax.weights.quantized import QuantizedArray

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DENSE = "bfloat16"
Tensors = dict[str, Shaped[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class Style:
    """What is a format's own.

    `pack` makes the tensors of a matrix from its prefix, integers, scales and bits, and `overhead` counts the bytes of
    those that are neither integers nor scales; `section` makes what config.json says of them. `groups` are the sizes
    that it takes (None: any), `unpacked` leaves that stay dense, with the reason, and `whole_bytes` leaves of which
    every integer takes a byte, with the reason: X.weight int8 and X.weight_scale.
    """

    name: str
    families: tuple[str, ...]
    pack: Callable[[str, np.ndarray, np.ndarray, int], Tensors]
    overhead: Callable[[int, int], int]
    section: Callable[[Form, bool, bool], dict[str, Any]]
    groups: tuple[int, ...] | None
    unpacked: Mapping[str, str]
    whole_bytes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def without_bytes(self, why: str) -> Style:
        """The same with dense leaves for those of whole bytes."""
        return dataclasses.replace(
            self, unpacked={**self.unpacked, **dict.fromkeys(self.whole_bytes, why)}, whole_bytes={}
        )


@dataclasses.dataclass(frozen=True)
class Form:
    """The model that is written: unpruned but for one MLP width, with the table of its tensors and group sizes.

    `groups` has the weights that share a scale in each packed matrix, by leaf, in the checkpoint, and `written` in the
    format, whose groups may be parts of them; a leaf that is in neither leaves dense.
    """

    config: ModelConfig
    table: tuple[tables.Row, ...]
    bits: int
    groups: Mapping[str, int]
    written: Mapping[str, int]

    def group(self, leaf: str, has_head_in: bool) -> int | None:
        """Group size of a leaf as it is written; None where it leaves dense."""
        return None if leaf == "head" and has_head_in else self.written.get(leaf)

    def rows(self, kind: str, has_head: bool) -> Iterator[tables.Row]:
        """The tensors of a block ("top" outside the layers)."""
        leaves = {"embed", "norm", *(("head",) if has_head else ())}
        if kind != "top":
            leaves = tables.present(self.config, kind)
        return (row for row in self.table if row.kind == kind and row.parts[0].leaf in leaves)


def form_of(
    style: Style,
    config: ModelConfig,
    bits: int,
    grouping: Mapping[str, Any],
    ffn: int,
    table: tuple[tables.Row, ...],
) -> Form:
    """The form of a model at one rate, from sizes alone.

    Args:
        style: the format.
        config: the unpruned model.
        bits: 4 or 8.
        grouping: `groups` and, where there are any, `runs` of the checkpoint, as plan.grouping gives them.
        ffn: MLP width of the widest layer at this rate.
        table: which tensor is which leaf.
    """
    found, sizes = {}, elastic.sizes(config) | {"ffn": ffn}
    described = {**elastic.BLOCKS["attention"], **elastic.BLOCKS["mlp"], **elastic.TOP}
    for name, leaf in described.items():
        if leaf.contract is None or name in style.unpacked or name == "head_in":
            continue
        along = leaf.dims[-1] if leaf.contract == "last" else leaf.dims[0]
        spans = leaf.contract == "first" and leaf_run(grouping, leaf) == 1
        inner = math.prod(sizes[dim] for dim in leaf.dims[1:-1]) if spans else 1
        group = grouping["groups"][along]
        if group % inner == 0 and sizes[along] % (group // inner) == 0:
            found[name] = group // inner
    parts = {
        name: group if style.groups is None else max((g for g in style.groups if group % g == 0), default=0)
        for name, group in found.items()
    }
    written = {name: part for name, part in parts.items() if part}
    return Form(dataclasses.replace(config, intermediate_size=ffn), table, bits, found, written)


def packed_row(form: Form, style: Style, kind: str, row: tables.Row, weight: QuantizedArray, inv_freq: Any) -> Tensors:
    """The tensors of a packed matrix."""
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
    scale = np.repeat(foreign(narrow, kind, row, {name: scale}, inv_freq), group // form.written[name], axis=1)
    codes, stem = foreign(config, kind, row, {name: integers(weight)}, inv_freq), row.name.removesuffix("weight")
    if name in style.whole_bytes:
        return {f"{stem}weight": codes.astype(np.int8), f"{stem}weight_scale": scale}
    return style.pack(stem, codes, scale, form.bits)


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


def planned(form: Form, style: Style, has_head: bool, has_head_in: bool) -> Iterator[Planned]:
    """Every tensor of the model with its type and bytes, from sizes alone."""
    kinds = [("top", None), *((kind, i) for i, kinds in enumerate(form.config.pattern) for kind in kinds)]
    for kind, i in kinds:
        for row in form.rows(kind, has_head or has_head_in):
            shape, leaf = tables.foreign_shape(form.config, row), row.parts[0].leaf
            group, count = form.group(leaf, has_head_in), math.prod(shape)
            name = row.name.format(layer=i)
            if group is None:
                yield Planned(name, DENSE, count * 2, _why_dense(style, kind, leaf, has_head_in))
            elif leaf in style.whole_bytes:
                type_ = f"int8 in groups of {group}"
                yield Planned(name, type_, count + count // group * 2, style.whole_bytes[leaf])
            else:
                per_word = 32 // form.bits
                size = shape[0] * (-(-shape[1] // per_word)) * 4 + count // group * 2
                type_ = f"int{form.bits} in groups of {group}"
                yield Planned(name, type_, size + style.overhead(count, group))


def _why_dense(style: Style, kind: str, leaf: str, has_head_in: bool) -> str:
    if tables.leaf_of(kind, leaf).contract is None:
        return ""
    if leaf in style.unpacked:
        return style.unpacked[leaf]
    if has_head_in and leaf == "head":
        return "the head times what undoes the rotation"
    return "groups do not divide it" + (f" into parts of {', '.join(map(str, style.groups))}" if style.groups else "")


def _tensors(
    form: Form, style: Style, kind: str, i: int | None, leaves: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a block ("top" outside the layers)."""
    turned = top_to_hf(form.config, leaves, form.table) if "head_in" in leaves else {}
    factors = top_factors(form.config, "head" not in leaves and not turned) if kind == "top" else {}
    inv_freq = leaves.get("inv_freq")
    for row in form.rows(kind, "head" in leaves or bool(turned)):
        leaf = row.parts[0].leaf
        name = row.name.format(layer=i)
        if leaf == "v_bias":  # folded into the output bias
            yield name, np.zeros(tables.foreign_shape(form.config, row), BFLOAT16)
        elif leaf == "head" and turned:
            yield name, cast(name, turned[name], BFLOAT16)
        elif form.group(leaf, bool(turned)) is None:
            value = np.asarray(dense(leaves[leaf])) / np.float32(factors.get(leaf, 1.0))
            value = foreign(form.config, kind, row, {leaf: value}, inv_freq)
            yield name, cast(name, value, BFLOAT16)
        else:
            made = packed_row(form, style, kind, row, leaves[leaf], inv_freq)
            yield from ((tensor.format(layer=i), value) for tensor, value in made.items())


def _with_embedding(style: Style, checkpoint: Checkpoint, own_head: bool, dense_embedding: bool) -> Style:
    """The format, with a dense embedding where its integers cannot leave as whole bytes, or must not."""
    if dense_embedding:
        return style.without_bytes("asked for")
    if not own_head:
        return style.without_bytes("it is the head as well")
    if top_factors(checkpoint.config, False)["embed"] != 1.0:
        return style.without_bytes("the model scales it")
    return style


def _form(style: Style, checkpoint: Checkpoint, rate: float) -> tuple[Form, dict[str, Any]]:
    """What is written, and its config.json without the quantization."""
    config, keep = checkpoint.config, checkpoint.keep(rate)
    # an output bias is written as one: in a value bias it would change what is packed
    held = {part.leaf for row in tables.TABLES[config.model_type] for part in row.parts}
    fits = "o_bias" in held or "o_bias" not in elastic.leaves(config, "attention")
    names = {name.partition(".")[0] for name in checkpoint.tensors}
    hf, rows = hf_form(config, checkpoint.hf_config, not {"head", "head_in"} & names, fits, DENSE)
    ffn = max(kept["ffn"] for kept in keep)
    form = form_of(style, config, checkpoint.bits, checkpoint.meta, ffn, rows)
    return form, hf | {"intermediate_size": ffn}


def write(request: Request, style: Style) -> None:
    """Write an elastic checkpoint, cut at a prune rate, as a packed folder.

    Raises:
        UserError: a checkpoint without integers or of another family, a bad rate or output, a full disk.
    """
    ckpt, out = request.checkpoint, request.out
    check_output(out, request.overwrite, ckpt)
    checkpoint, rate = open_checkpoint(ckpt), check_rate(request.prune_rate)
    if checkpoint.config.model_type not in style.families:
        raise UserError(
            f"{checkpoint.config.model_type} models cannot leave packed for {style.name} (only "
            f"{', '.join(style.families)}); use --format transformers"
        )
    if checkpoint.bits > 8:
        raise UserError(f"{ckpt} has {checkpoint.bits} bits, nothing to leave packed; use --format transformers")
    top = checkpoint.top()
    head, head_in = "head" in top, "head_in" in top
    style = _with_embedding(style, checkpoint, head or head_in, request.dense_embedding)
    form, hf = _form(style, checkpoint, rate)
    plan = list(planned(form, style, head, head_in))
    size = sum(tensor.nbytes for tensor in plan)
    request.say(f"{ckpt} at prune rate {rate:g} -> {out}: {style.name}, about {console.format_bytes(size)}")
    request.say(table(plan))
    with staged_output(out, request.overwrite, ckpt) as staging:
        check_space(staging, size)
        writer = ShardWriter(staging, request.max_shard_bytes)
        for name, value in _tensors(form, style, "top", None, top):
            writer.add(name, value)
        for i in request.progress(range(len(form.config.pattern)), "export"):
            layer = checkpoint.layer(i, checkpoint.keep(rate)[i], shared_whole=True)
            for kind in form.config.pattern[i]:
                for name, value in _tensors(form, style, kind, i, layer[kind]):
                    writer.add(name, value)
        writer.finish()
        hf |= style.section(form, head, head_in)
        (staging / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        copy_side_files(checkpoint.folder, staging)
