"""Our elastic checkpoint, at any prune rate, as a GGUF file for llama.cpp, in the integers and scales that it has.

Blocks of 32 take 4 bits as Q4_0 and 8 bits as Q8_0, without rounding anything again. What such blocks cannot hold
exactly leaves as F16 or F32, which can. MLP channels leave at their true width where the architecture has one for every
layer, else at that of the widest layer; attention and SSM blocks keep their shapes, with zeros for what was cut, since
llama.cpp has one head size, one state size and one set of RoPE frequencies for a whole model.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from uniql_jax import console, elastic
from uniql_jax.casting import cast
from uniql_jax.checkpoint import Checkpoint, open_checkpoint
from uniql_jax.config import ModelConfig
from uniql_jax.convert import gguf_architecture, gguf_head, gguf_tables, tables
from uniql_jax.convert.exporting import Planned, Request, staged_file, table
from uniql_jax.convert.gguf_blocks import BLOCK, DENSE, PACKED, Layout, Widths, resized, stored_as, stored_shape
from uniql_jax.convert.gguf_vocabulary import Vocabulary, read_vocabulary
from uniql_jax.convert.integers import Blocks
from uniql_jax.errors import UserError
from uniql_jax.outputs import check_output, check_output_files, check_space, staged_output
from uniql_jax.plan import check_rate
from uniql_jax.side_files import copy_side_files
from uniql_jax.weights.protocol import dense

BYTES = {"Q4_0": 18 / 32, "Q8_0": 34 / 32, "F16": 2, "BF16": 2, "F32": 4}
"""Bytes of a weight."""
MATRICES = {4: "F16", 8: "F16", 16: "BF16", 32: "F32"}
"""By the checkpoint's bits: what holds a head that the rotation was multiplied into."""
ENTRY = "model.gguf"
TYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


@dataclasses.dataclass(frozen=True)
class Model:
    """One rate of a checkpoint as the tensors of a GGUF file."""

    checkpoint: Checkpoint
    rate: float
    matrices: str | None = None
    """The type of all matrices; None: each in the smallest one that holds it exactly."""
    dense_head: bool = False
    """Whether the head of a tied and rotated model becomes a table of its own, which is not packed."""

    @property
    def config(self) -> ModelConfig:
        """The unpruned model."""
        return self.checkpoint.config

    @functools.cached_property
    def base(self) -> str:
        """llama.cpp's architecture; see `gguf_architecture`."""
        return gguf_architecture.base(self.config)

    @property
    def table(self) -> tuple[tables.Row, ...]:
        """Which tensor is which leaf."""
        return gguf_tables.table(self.architecture, elastic.sizes(self.config)["qk_pass"] > 0)

    def widths(self, layer: int | None = None) -> Widths:
        """The dimensions that may be laid out in blocks, in a layer or outside them."""
        meta, width = self.checkpoint.meta, self.config.hidden_size
        groups, runs = meta.get("groups") or {}, meta.get("runs") or {}
        found = {"embed": Blocks(width, groups["embed"], BLOCK, self.one_table) if groups else Blocks(width, width, 1)}
        if found["embed"].total != width and self.base not in gguf_architecture.PADDED:
            found["embed"] = Blocks.none(width)
        kept = [keep.get("ffn", 0) for keep in self.checkpoint.keep(self.rate)]
        if layer is not None and kept[layer]:
            width = kept[layer] if self.base in gguf_architecture.PER_LAYER else max(kept)
            found["ffn"] = Blocks(width, groups["ffn"], BLOCK) if groups else Blocks(width, width, 1)
        inside = {"vo": self.config.head_dim, "ssm_head": self.config.ssm.head_dim if self.config.ssm else 0}
        for axis in runs:  # groups that lie inside a head, whose size stays
            blocks = Blocks(inside[axis], groups[axis], BLOCK)
            found[axis] = blocks if blocks.total == blocks.width else Blocks.none(blocks.width)
        return found

    @property
    def one_table(self) -> bool:
        """Whether one packed table is embedding and head, with a layer before the head (`gguf_head`)."""
        tied = "head_in" in self.checkpoint.tensors and self.base == "deci"
        return tied and self.checkpoint.bits in PACKED and not self.dense_head

    @property
    def ffn(self) -> list[int]:
        """Width of the MLP of every layer, with zeros; 0 where there is none."""
        widths = (self.widths(i) for i in range(len(self.config.pattern)))
        return [found["ffn"].total if "ffn" in found else 0 for found in widths]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of what is written: `llama` where `deci` need not have widths for every layer."""
        plain = self.base == "deci" and len(set(self.ffn)) == 1 and not self.one_table
        return "llama" if plain else self.base

    def parts(self) -> Iterator[tuple[str, int | None, str, Mapping[str, Any]]]:
        """(prefix of leaves, layer, kind, leaves) of everything, the embedding first."""
        top = dict(self.checkpoint.top())
        if self.one_table:
            top = {"embed": top["embed"]}
        yield "", None, "top", top
        for i, keep in enumerate(self.checkpoint.keep(self.rate)):
            layer = self.checkpoint.layer(i, keep, shared_whole=True)
            for kind in self.config.pattern[i]:
                yield f"layers.{i}.{kind}.", i, kind, layer[kind]

    def plan(self) -> Iterator[tuple[Planned, tuple[int, ...]]]:
        """Every tensor in the order of `tensors`, with its shape; only scales are looked at."""
        for _, i, kind, leaves in self.parts():
            widths = self.widths(i)
            written = resized(self.config, widths)
            for row in self._rows(kind, leaves):
                name, shape = row.name.format(layer=i), tables.foreign_shape(written, row)
                found = [self._type(tables.leaf_of(kind, p.leaf), p.leaf, leaves, widths) for p in row.parts]
                type_, why = max(found, key=lambda one: BYTES[one[0]])
                size = int(math.prod(shape) * BYTES[type_])
                yield Planned(name, type_, size, why), stored_shape(written, name, shape)
        for name, value in self.rest().items():
            why = "undoes the rotation before the head" if name.endswith("attn_output.weight") else ""
            yield Planned(name, "F32", value.nbytes, why), value.shape

    def _type(self, leaf: elastic.Leaf, name: str, leaves: Mapping[str, Any], widths: Widths) -> tuple[str, str]:
        if self.matrices is not None and leaf.contract is not None:
            return self.matrices, ""
        if name == "head" and "head_in" in leaves:
            return MATRICES[self.checkpoint.bits], "the head times what undoes the rotation"
        return stored_as(leaf, leaves[name], widths)

    def rest(self) -> dict[str, np.ndarray]:
        """Tensors that are of no leaf, float32: what turns the stream before the head, and factors of frequencies."""
        found: dict[str, np.ndarray] = {}
        if self.one_table:
            top = self.checkpoint.top()
            norm, head_in = (np.asarray(dense(top[name])) for name in ("norm", "head_in"))
            found |= gguf_head.layer(len(self.config.pattern), norm, head_in, self.widths()["embed"])
        if (factors := gguf_architecture.rope_factors(self.config)) is not None:
            found["rope_freqs.weight"] = factors
        return found

    def _rows(self, kind: str, leaves: Mapping[str, Any]) -> Iterator[tables.Row]:
        """The rows of a block, with the parts that there are."""
        has = {*leaves, *(("head",) if "head_in" in leaves else ())}
        for row in self.table:
            if row.kind == kind and row.parts[0].leaf in has:
                yield dataclasses.replace(row, parts=tuple(part for part in row.parts if part.leaf in has))

    def tensors(self, types: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
        """Name and content, as bytes of blocks or as floats, of every tensor in its planned type."""
        for _, i, kind, leaves in self.parts():
            if "head_in" in leaves:
                leaves = _with_head(leaves)
            layout = Layout(self.config, kind, self.widths(i), leaves.get("inv_freq"))
            for row in self._rows(kind, leaves):
                name = row.name.format(layer=i)
                own = {part.leaf: leaves[part.leaf] for part in row.parts}
                if types[name] in PACKED.values():
                    yield name, layout.blocks(row, own)
                else:
                    value = layout.dense(row, {leaf: np.asarray(dense(value)) for leaf, value in own.items()})
                    yield name, cast(name, value, TYPES[types[name]])
        yield from self.rest().items()


def _with_head(top: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves outside the layers with a head that takes the normed stream as it is."""
    head = np.asarray(dense(top.get("head", top["embed"]))) @ np.asarray(dense(top["head_in"])).T
    return {name: value for name, value in top.items() if name != "head_in"} | {"head": head}


def write(request: Request) -> None:
    """Write an elastic checkpoint, cut at a prune rate, as a GGUF file.

    Args:
        request: `out` is the file where it ends in .gguf, else a folder with model.gguf and the side files.

    Raises:
        UserError: a family or tokenizer that llama.cpp cannot be given, a bad checkpoint, rate or output, a full disk.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--format gguf needs the package gguf: pip install 'uniql-jax[gguf]'")
    ckpt, out, overwrite = request.checkpoint, request.out, request.overwrite
    as_file = Path(out).suffix.lower() == ".gguf"
    if as_file:
        check_output_files([out], overwrite, [ckpt])
    else:
        check_output(out, overwrite, ckpt)
    checkpoint = open_checkpoint(ckpt)
    model = Model(
        checkpoint, check_rate(request.prune_rate), request.dtype and DENSE[request.dtype], request.dense_head
    )
    remark = gguf_architecture.remark(checkpoint.config) if model.base else None
    vocabulary = read_vocabulary(checkpoint.folder, request.load_tokenizer(checkpoint.folder), checkpoint.config)
    planned = list(model.plan())
    size = sum(tensor.nbytes for tensor, _ in planned)
    kind = f"GGUF of the architecture {model.architecture}"
    request.say(f"{ckpt} at prune rate {model.rate:g} -> {out}: {kind}, about {console.format_bytes(size)}")
    request.say(table(tensor for tensor, _ in planned))
    if remark:
        request.say(remark)
    with staged_file(out) if as_file else staged_output(out, overwrite, ckpt) as staging:
        check_space(staging, size)
        _write_file(staging if as_file else staging / ENTRY, model, vocabulary, planned, request)
        if not as_file:
            (staging / "config.json").write_text(json.dumps(checkpoint.hf_config, indent=2) + "\n", encoding="utf-8")
            copy_side_files(checkpoint.folder, staging)


def _write_file(
    path: Path,
    model: Model,
    vocabulary: Vocabulary,
    planned: Sequence[tuple[Planned, tuple[int, ...]]],
    request: Request,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, model.architecture)
    try:
        _add_fields(writer, model, vocabulary)
        vocabulary.add_to(writer)
        for tensor, shape in planned:
            kind = gguf.GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        types = {tensor.name: tensor.type for tensor, _ in planned}
        for _, value in request.progress(model.tensors(types), "export"):
            writer.write_tensor_data(value)
    finally:
        writer.close()


def _add_fields(writer: Any, model: Model, vocabulary: Vocabulary) -> None:
    """The model's name, its sizes, and those of the layer before the head."""
    name = model.checkpoint.folder.resolve().name
    if "<unk>" not in (vocabulary.fields.get("tokens") or ()):
        # llama.cpp takes a model of this name for Phi-3 itself, and fails without its tokens
        name = re.sub("phi-?3", "phi_3", name, flags=re.IGNORECASE)
    writer.add_name(name)
    config, more = model.config, int(model.one_table)
    (heads, kv_heads), count = gguf_architecture.head_counts(config), len(config.pattern)
    if more:  # a layer whose "linear attention" has no key/value heads
        assert isinstance(kv_heads, int)
        heads, kv_heads = [heads] * count + [1], [kv_heads] * count + [0]
    writer.add_block_count(count + more)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    ffn = [*model.ffn, *[gguf_head.WIDTH] * more]
    gguf_architecture.add_fields(writer, config, model.architecture, model.widths()["embed"], ffn)
    writer.add_float32("uniql.prune_rate", model.rate)
