"""Our elastic checkpoint, at any prune rate, as a dense Hugging Face checkpoint that stock transformers runs.

What is pruned becomes zeros: RoPE pairs return to their original places, V/O ranks and MLP channels may sit anywhere.
The result has the shapes of the original model and computes exactly what our pruned model computes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from uniql_jax import console, elastic
from uniql_jax.blas import one_blas_thread
from uniql_jax.casting import cast
from uniql_jax.checkpoint import Checkpoint, Setting, open_checkpoint
from uniql_jax.config import ModelConfig
from uniql_jax.convert import tables
from uniql_jax.convert.exporting import Progress
from uniql_jax.convert.full_size import full_size
from uniql_jax.convert.leaves import pass_factors, top_factors
from uniql_jax.errors import UserError
from uniql_jax.files import ShardWriter
from uniql_jax.outputs import check_output, check_space, staged_output
from uniql_jax.plan import check_rate
from uniql_jax.side_files import copy_side_files
from uniql_jax.value_bias import free_rank, value_bias
from uniql_jax.weights.protocol import dense

Tensors = dict[str, Float[np.ndarray, "..."]]
Block = Mapping[str, Any]

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
UNTRUE = ("auto_map", "quantization_config", "compression_config", "_name_or_path", "_commit_hash")
"""Keys of the original's config.json that do not hold for what is written: code and files that are not there."""
RESCALED = ("mamba2", "nemotron_h")
"""Families with `rescale_prenorm_residual`: where it is true, transformers divides out_proj of what it loads."""
RESIDUAL = 1e-5
"""A value bias stands for an output bias when it misses no more than this part of it (float32 rounding)."""


def layer_to_hf(
    config: ModelConfig, i: int, layer: Mapping[str, Block], table: tuple[tables.Row, ...] | None = None
) -> Tensors:
    """One layer's leaves at their kept sizes -> its dense HF tensors by name, float32, zeros for what was cut.

    Args:
        config: the model.
        i: index of the layer.
        layer: {kind: {leaf: array or QuantizedArray}}.
        table: which tensor is which leaf; None: the family's own.

    Returns:
        {name: tensor}.

    Raises:
        ValueError: the family has no output bias and o_bias cannot be carried by a value bias (only possible where no
            V rank was cut).
    """
    table = table or tables.TABLES[config.model_type]
    tensors: Tensors = {}
    for kind in config.pattern[i]:
        rows = list(tables.rows_of(config, table, kind))
        leaves = full_size(config, kind, {name: np.asarray(dense(value)) for name, value in layer[kind].items()})
        for name, factor in pass_factors(config).items():
            if name in leaves:
                leaves[name] = leaves[name] / np.float32(factor)
        has = {part.leaf for row in rows for part in row.parts}
        if "v_bias" in has:
            leaves["v_bias"] = np.zeros(elastic.shape(config, tables.leaf_of(kind, "v_bias")), np.float32)
        if "o_bias" in leaves and "o_bias" not in has:
            _carry_o_bias(config, leaves)
        for row in rows:
            tensors[row.name.format(layer=i)] = tables.from_leaves(config, row, leaves)
    return tensors


@one_blas_thread
def _carry_o_bias(config: ModelConfig, leaves: Tensors) -> None:
    """Move o_bias into a value bias, for a family without an output bias: softmax weights sum to one."""
    free = free_rank(leaves["v"], leaves["o"])
    if free is not None:
        # a channel without content, its value always 1, carries any vector
        rank, group = free
        leaves["v_bias"][rank, group] = 1.0
        leaves["o"][rank, group * config.query_groups] = leaves["o_bias"]
        return
    leaves["v_bias"], carried = value_bias(leaves["o"], leaves["o_bias"], config.kv_heads)
    missed = _missed(carried, leaves["o_bias"])
    if missed > RESIDUAL:
        raise ValueError(f"no value bias gives this o_bias: {missed:.1e} of it would be lost")


def _missed(carried: Float[np.ndarray, " embed"], wanted: Float[np.ndarray, " embed"]) -> float:
    """The part of an output bias that a value bias leaves out."""
    size = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(carried - wanted)) / size if size else 0.0


def top_to_hf(config: ModelConfig, top: Mapping[str, Any], table: tuple[tables.Row, ...] | None = None) -> Tensors:
    """embed, norm and head by their HF names, float32; no head where the embedding serves as it.

    A `head_in` matrix (rotated models apply it to the normed stream x) is multiplied into the head:
    (x @ head_in) @ head.T = x @ (head @ head_in.T).T. Scales of the embedding and the logits are the family's again.

    Args:
        config: the model.
        top: {leaf: array or QuantizedArray}.
        table: which tensor is which leaf; None: the family's own.

    Returns:
        {name: tensor}.
    """
    leaves = {name: np.asarray(dense(value)) for name, value in top.items()}
    head_in = leaves.pop("head_in", None)
    if head_in is not None:
        leaves["head"] = leaves.get("head", leaves["embed"]) @ head_in.T
    factors = top_factors(config, "head" not in leaves)
    leaves |= {name: leaves[name] / np.float32(factor) for name, factor in factors.items() if factor != 1.0}
    table = table or tables.TABLES[config.model_type]
    rows = [row for row in table if row.kind == "top" and all(part.leaf in leaves for part in row.parts)]
    return {row.name: tables.from_leaves(config, row, leaves) for row in rows}


def hf_form(
    config: ModelConfig, hf_config: Mapping[str, Any], tied: bool, o_bias_fits: bool, dtype: str
) -> tuple[dict[str, Any], tuple[tables.Row, ...]]:
    """The config.json and the table of the exported model.

    Where a family's form has no place for o_bias, the model is written as a llama with attention_bias, which computes
    the same and has one.

    Args:
        config: the model.
        hf_config: config.json of the original.
        tied: whether the embedding serves as the head.
        o_bias_fits: see `o_bias_fits`.
        dtype: number format that is written.

    Returns:
        The config, without what holds for the original's files alone, and which tensor is which leaf.
    """
    hf = {key: value for key, value in hf_config.items() if key not in UNTRUE} | {"tie_word_embeddings": tied}
    if "architectures" in hf:
        hf["architectures"] = [tables.CLASSES[config.model_type]]
    if config.model_type in RESCALED:
        hf["rescale_prenorm_residual"] = False
    for key in {"dtype", "torch_dtype"} & set(hf) or {"torch_dtype"}:
        hf[key] = dtype
    if o_bias_fits:
        return hf, tables.TABLES[config.model_type]
    for key in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"):
        hf.pop(key, None)
    hf |= {"model_type": "llama", "architectures": [tables.CLASSES["llama"]], "attention_bias": True, "mlp_bias": False}
    return hf, tables.TABLES["llama"]


class Layers:
    """The layers of a checkpoint at a rate, or at a setting of its joint plan."""

    def __init__(self, checkpoint: Checkpoint, rate: float, setting: Setting | None = None):
        self.checkpoint, self.setting = checkpoint, setting
        self.keep: tuple[Mapping[str, int], ...] = checkpoint.keep(rate)
        if setting is not None:
            self.keep = tuple({axis: setting[i, axis].entries for axis in kept} for i, kept in enumerate(self.keep))

    def read(self, index: int, shared_whole: bool = False) -> dict[str, dict[str, Any]]:
        """One layer, as `Checkpoint.layer` gives it."""
        if self.setting is not None:
            return self.checkpoint.layer_at(index, self.setting, shared_whole)
        return self.checkpoint.layer(index, self.keep[index], shared_whole)


@one_blas_thread
def o_bias_fits(
    checkpoint: Checkpoint,
    keep: Sequence[Mapping[str, int]],
    read: Callable[[int], Mapping[str, Block]] | None = None,
) -> bool:
    """Whether the family's own form can carry every layer's o_bias exactly.

    Args:
        checkpoint: the elastic checkpoint.
        keep: kept sizes of every layer, as `Checkpoint.keep` gives them.
        read: gives a layer at these sizes; None: the checkpoint does.
    """
    config = checkpoint.config
    table = tables.TABLES[config.model_type]
    for i, kinds in enumerate(config.pattern):
        if "attention" not in kinds or "o_bias" not in elastic.leaves(config, "attention"):
            continue
        held = {part.leaf for row in tables.rows_of(config, table, "attention") for part in row.parts}
        if "o_bias" in held or keep[i]["vo"] < config.head_dim:
            continue
        block = (read(i) if read is not None else checkpoint.layer(i, keep[i]))["attention"]
        v, o, o_bias = (np.asarray(dense(block[name])) for name in ("v", "o", "o_bias"))
        if free_rank(v, o) is None and _missed(value_bias(o, o_bias, config.kv_heads)[1], o_bias) > RESIDUAL:
            return False
    return True


def export(
    ckpt: str | Path,
    out: str | Path,
    prune_rate: float = 0.0,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    setting: Setting | None = None,
    say: Callable[[str], object] = lambda text: None,
    progress: Progress = lambda items, _: items,
) -> None:
    """Write an elastic checkpoint, cut at a prune rate, as a dense Hugging Face folder.

    Args:
        ckpt: elastic checkpoint.
        out: folder to create; it appears once it is whole.
        prune_rate: 0 to 0.35.
        dtype: float32, bfloat16, float16, or None for the original model's.
        max_shard_bytes: largest size of one safetensors file, unless one tensor alone is larger.
        overwrite: whether an `out` that is a model folder may be replaced.
        setting: of the joint plan of nested bits, in place of the rate.
        say: receives lines of text on what is done.
        progress: wraps what is iterated over, given a word for it.

    Raises:
        UserError: a bad checkpoint, rate, dtype or output, a full disk, or a weight that does not fit `dtype`.
    """
    check_output(out, overwrite, ckpt)
    checkpoint = open_checkpoint(ckpt)
    config = checkpoint.config
    rate = check_rate(prune_rate)
    layers = Layers(checkpoint, rate, setting)
    dtype = dtype or (config.dtype if config.dtype in DTYPES else "bfloat16")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    shapes = tables.expected(config, tables.TABLES[config.model_type])
    size = sum(math.prod(shape) for shape in shapes.values()) * DTYPES[dtype].itemsize
    kept_part = checkpoint.plan.kept_fraction(rate) if checkpoint.plan is not None else 1.0
    size_of = f"prune rate {rate:g} ({kept_part:.1%} of the prunable parameters kept)"
    say(
        f"{ckpt} at {size_of if setting is None else 'a setting of nested bits'} "
        f"-> {out}: {len(config.pattern)} layers, {dtype}, about {console.format_bytes(size)}"
    )
    with staged_output(out, overwrite, ckpt) as staging:
        check_space(staging, size)
        writer = ShardWriter(staging, max_shard_bytes)
        fits = o_bias_fits(checkpoint, layers.keep, layers.read)
        top = checkpoint.top() if setting is None else checkpoint.top_at(setting)
        hf, table = hf_form(config, checkpoint.hf_config, not {"head", "head_in"} & set(top), fits, dtype)
        if not fits:
            say(f"{config.model_type} has no output bias in attention: written as a llama model, which has")
        for name, value in top_to_hf(config, top, table).items():
            writer.add(name, cast(name, value, DTYPES[dtype]))
        del top
        for i in progress(range(len(config.pattern)), "export"):
            for name, value in layer_to_hf(config, i, layers.read(i, True), table).items():
                writer.add(name, cast(name, value, DTYPES[dtype]))
        writer.finish()
        (staging / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        copy_side_files(checkpoint.folder, staging)


if __name__ == "__main__":
    from uniql_jax.commands import run

    run("export")
