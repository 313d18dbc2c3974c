"""Our elastic checkpoint, at any prune rate, as a GGUF file for llama.cpp, in the integers and scales that it has.

Blocks of 32 take 4 bits as Q4_0 and 8 bits as Q8_0, without rounding anything again. What such blocks cannot hold
exactly leaves as F16 or F32, which can. MLP channels leave at their true width, layer by layer (architecture `deci`),
or at that of the widest layer where heads have norms of their own (`qwen3`, which has one width for all layers);
attention keeps its shape, with zeros for what was cut, since llama.cpp has one head size and one set of RoPE
frequencies for a whole model.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from uniql_jax import console, elastic
from uniql_jax.casting import cast
from uniql_jax.checkpoint import Checkpoint, open_checkpoint
from uniql_jax.config import ModelConfig, Rope
from uniql_jax.convert import gguf_head, gguf_tables, tables
from uniql_jax.convert.exporting import Planned, Request, staged_file, table
from uniql_jax.convert.gguf_blocks import BLOCK, DENSE, PACKED, Layout, Widths, stored_as
from uniql_jax.convert.gguf_vocabulary import Vocabulary, read_vocabulary
from uniql_jax.convert.integers import Blocks
from uniql_jax.errors import UserError
from uniql_jax.files import copy_side_files
from uniql_jax.outputs import check_output, check_output_files, check_space, staged_output
from uniql_jax.plan import check_rate
from uniql_jax.weights.protocol import dense

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
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

    @property
    def _keep(self) -> dict[str, int]:
        """The most that a layer keeps of each axis."""
        kept = self.checkpoint.keep(self.rate)
        return {axis: max(layer[axis] for layer in kept) for axis in kept[0]}

    @property
    def table(self) -> tuple[tables.Row, ...]:
        """Which tensor is which leaf."""
        return gguf_tables.TABLES.get(self.architecture, gguf_tables.TABLES["llama"])

    def widths(self, layer: int | None = None) -> Widths:
        """The dimensions that may be padded, in a layer or outside them."""
        groups, width = self.checkpoint.meta.get("groups") or {}, self.config.hidden_size
        if not groups:
            found = {"embed": Blocks(width, width, 1)}
        else:
            found = {"embed": Blocks(width, groups["embed"], BLOCK, self.one_table)}
        if layer is not None:
            kept = self._keep["ffn"] if self.config.qk_norm else self.checkpoint.keep(self.rate)[layer]["ffn"]
            found["ffn"] = Blocks(kept, groups["ffn"], BLOCK) if groups else Blocks(kept, kept, 1)
            if "vo" in (self.checkpoint.meta.get("runs") or {}):
                found["vo"] = Blocks(self.config.head_dim, groups["vo"], BLOCK)
        return found

    @property
    def one_table(self) -> bool:
        """Whether one packed table is embedding and head, with a layer before the head (`gguf_head`)."""
        tied = "head_in" in self.checkpoint.tensors and not self.config.qk_norm
        return tied and self.checkpoint.bits in PACKED and not self.dense_head

    @property
    def ffn(self) -> list[int]:
        """Width of the MLP of every layer, with zeros."""
        return [self.widths(i)["ffn"].total for i in range(len(self.config.pattern))]

    @property
    def architecture(self) -> str:
        """llama.cpp's name: `llama` has one MLP width for all layers, `deci` one for each, `qwen3` norms of heads."""
        if self.config.qk_norm:
            return "qwen3"
        return "llama" if len(set(self.ffn)) == 1 and not self.one_table else "deci"

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
            widths, sizes = self.widths(i), self._sizes(i)
            for row in self._rows(kind, leaves):
                name, leaf = row.name.format(layer=i), row.parts[0].leaf
                shape = tuple(math.prod(sizes[d] for d in dim.split()) for dim in row.parts[0].dims)
                type_, why = self._type(tables.leaf_of(kind, leaf), leaf, leaves, widths)
                yield Planned(name, type_, int(math.prod(shape) * BYTES[type_]), why), shape
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
        if (factors := rope_factors(self.config)) is not None:
            found["rope_freqs.weight"] = factors
        return found

    def _sizes(self, layer: int | None) -> dict[str, int]:
        return elastic.sizes(self.config) | {dim: blocks.total for dim, blocks in self.widths(layer).items()}

    def _rows(self, kind: str, leaves: Mapping[str, Any]) -> Iterator[tables.Row]:
        has = {*leaves, *(("head",) if "head_in" in leaves else ())}
        return (row for row in self.table if row.kind == kind and row.parts[0].leaf in has)

    def tensors(self, types: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
        """Name and content, as bytes of blocks or as floats, of every tensor in its planned type."""
        for _, i, kind, leaves in self.parts():
            if "head_in" in leaves:
                leaves = _with_head(leaves)
            rows = {row.parts[0].leaf: row for row in self._rows(kind, leaves)}
            layout = Layout(self.config, kind, rows, self.widths(i), leaves.get("inv_freq"))
            for leaf, row in rows.items():
                name = row.name.format(layer=i)
                if types[name] in PACKED.values():
                    yield name, layout.blocks(leaf, leaves[leaf])
                else:
                    value = layout.dense(leaf, np.asarray(dense(leaves[leaf])))
                    yield name, cast(name, value, TYPES[types[name]])
        yield from self.rest().items()


def _with_head(top: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves outside the layers with a head that takes the normed stream as it is."""
    head = np.asarray(dense(top.get("head", top["embed"]))) @ np.asarray(dense(top["head_in"])).T
    return {name: value for name, value in top.items() if name != "head_in"} | {"head": head}


def rope_factors(config: ModelConfig) -> Float[np.ndarray, " pairs"] | None:
    """What the frequencies of a scaled RoPE are divided by; None where they are those of its base alone."""
    rope = config.rope
    if rope is None or rope.scaling == "default":
        return None
    return (Rope(rope.theta, rope.dim).inv_freq() / rope.inv_freq()).astype(np.float32)


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
    if checkpoint.config.model_type not in FAMILIES:
        raise UserError(
            f"{checkpoint.config.model_type} models cannot leave as GGUF (only {', '.join(FAMILIES)}); "
            "use --format transformers"
        )
    model = Model(
        checkpoint, check_rate(request.prune_rate), request.dtype and DENSE[request.dtype], request.dense_head
    )
    _check_form(model)
    vocabulary = read_vocabulary(checkpoint.folder, request.load_tokenizer(checkpoint.folder), checkpoint.config)
    planned = list(model.plan())
    size = sum(tensor.nbytes for tensor, _ in planned)
    kind = f"GGUF of the architecture {model.architecture}"
    request.say(f"{ckpt} at prune rate {model.rate:g} -> {out}: {kind}, about {console.format_bytes(size)}")
    request.say(table(tensor for tensor, _ in planned))
    with staged_file(out) if as_file else staged_output(out, overwrite, ckpt) as staging:
        check_space(staging, size)
        _write_file(staging if as_file else staging / ENTRY, model, vocabulary, planned, request)
        if not as_file:
            (staging / "config.json").write_text(json.dumps(checkpoint.hf_config, indent=2) + "\n", encoding="utf-8")
            copy_side_files(checkpoint.folder, staging)


def _check_form(model: Model) -> None:
    """Refuse what llama.cpp's form of a model with norms of heads has no place for."""
    if not model.config.qk_norm:
        return
    instead = "use --format transformers"
    if "o_bias" in elastic.leaves(model.config, "attention"):
        raise UserError(f"llama.cpp's {model.architecture} has no biases in attention; {instead}")
    embed = model.widths()["embed"]
    if embed.total != embed.width:  # one epsilon serves all norms, so that no norm may run over added zeros
        raise UserError(f"a stream of {embed.width} in groups of {embed.group} does not fit blocks of 32; {instead}")


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
        _add_fields(writer, model)
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


def _add_fields(writer: Any, model: Model) -> None:
    """The sizes of the model, under the keys of llama.cpp."""
    config, embed, count = model.config, model.widths()["embed"], len(model.config.pattern)
    more = int(model.one_table)  # a layer whose "linear attention" has no key/value heads
    ffn = [*model.ffn, *[gguf_head.WIDTH] * more]
    writer.add_name(model.checkpoint.folder.resolve().name)
    writer.add_quantization_version(2)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(embed.total)
    writer.add_block_count(count + more)
    writer.add_feed_forward_length(ffn if model.architecture == "deci" else ffn[0])
    writer.add_head_count([config.heads] * count + [1] if more else config.heads)
    writer.add_head_count_kv([config.kv_heads] * count + [0] if more else config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    # sum / total + epsilon' is (sum / width + epsilon) * width / total
    writer.add_layer_norm_rms_eps(config.norm_eps * embed.width / embed.total)
    writer.add_vocab_size(config.vocab_size)
    if config.rope is not None:
        writer.add_rope_freq_base(config.rope.theta)
        writer.add_rope_dimension_count(config.rope.dim)
        if config.rope.attention_factor != 1.0:
            writer.add_rope_scaling_attn_factors(config.rope.attention_factor)
    writer.add_float32("uniql.prune_rate", model.rate)
