"""From disk to a CausalLM: an elastic checkpoint at any prune rate, or an original one as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uniql_jax import elastic
from uniql_jax.casting import cast
from uniql_jax.checkpoint import Checkpoint, open_checkpoint
from uniql_jax.config import ModelConfig
from uniql_jax.convert.source import Source, open_source
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.pallas_kernels import dispatch
from uniql_jax.pallas_kernels.dequant_matmul import preferred_layout
from uniql_jax.pallas_kernels.dequant_matmul.three_bit import BITS
from uniql_jax.plan import axis_layout, check_rate
from uniql_jax.runtime import hub
from uniql_jax.runtime.budget import parse_budget
from uniql_jax.runtime.choice import Choice, choose
from uniql_jax.runtime.text import Folder
from uniql_jax.weights.mixed import MixedArray, in_parts
from uniql_jax.weights.nested import NestedArray
from uniql_jax.weights.quantized import QuantizedArray
from uniql_jax.weights.shard import spread
from uniql_jax.weights.split import Split, device_mesh, split_of


def default_dtype() -> Any:
    """bfloat16 where a GPU computes, float32 on CPUs, which gain nothing from 16 bits."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def place(
    leaf: elastic.Leaf | None,
    value: Any,
    dtype: Any,
    tiles: bool = True,
    name: str = "(unnamed)",
    split: Split | None = None,
) -> Any:
    """Move a leaf to the device, or to several.

    Args:
        leaf: the row of `elastic` that describes it; None stands for a dense matrix.
        value: an array of numpy, or a packed weight of them.
        dtype: of dense matrices; vectors become float32.
        tiles: whether a packed weight may take the layout that a GPU's kernels read fastest.
        name: names the leaf in messages.
        split: how the model is shared out among several devices.

    Returns:
        The array or packed weight on the default device, or a Shard.

    Raises:
        UserError: a value does not fit `dtype`.
    """
    if split is None or leaf is None:
        return jax.device_put(in_form(leaf, value, dtype, tiles, name))
    return spread(leaf, value, split, lambda part: in_form(leaf, part, dtype, tiles, name))


def in_form(leaf: elastic.Leaf | None, value: Any, dtype: Any, tiles: bool = True, name: str = "(unnamed)") -> Any:
    """A leaf in the dtype and layout that `place` gives it, still in the host's memory; arguments as there."""
    if isinstance(value, NestedArray):
        layout = preferred_layout(bits=BITS, group=value.group, contract=value.contract, dtype=dtype)
        value = in_parts(value, tiles=layout != "plain")
    if isinstance(value, MixedArray):
        return MixedArray(*(in_form(leaf, part, dtype, tiles, name) for part in (value.whole, value.rest)))
    if isinstance(value, NestedArray):
        return value
    if isinstance(value, QuantizedArray):
        check_scales(value, name)
        if dispatch.default("dequant_matmul") in ("pallas", "jax-triton"):
            value = value.in_runs()  # once instead of for every product
        if tiles and value.run == 1:
            layout = preferred_layout(bits=value.bits, group=value.group, contract=value.contract, dtype=dtype)
            value = value.in_layout(layout)
        return value
    is_matrix = leaf is None or leaf.contract is not None
    return cast(name, value, dtype if is_matrix else np.float32)


ONE_DEVICE = "a budget of nested bits is for one device: give a prune rate, at which several can share"
LARGEST_SCALE = 2.0**27
"""Kernels multiply a scale with sums of 136 inputs and more, which must stay below what bfloat16 and float32 hold."""


def check_scales(weight: QuantizedArray, name: str) -> None:
    """Raise UserError for scales that no weight has and kernels cannot multiply with."""
    if not isinstance(weight.scale, np.ndarray):  # shapes alone, or on a device already
        return
    largest = float(np.max(np.abs(np.asarray(weight.scale, np.float32)), initial=0.0))
    if largest >= LARGEST_SCALE:
        raise UserError(f"{name} has a scale of {largest:g}, at or above 2^27: the checkpoint is damaged")


def place_layer(layer: dict[str, dict[str, Any]], dtype: Any, split: Split | None = None) -> dict[str, dict[str, Any]]:
    """`place` for all leaves of a layer."""
    return {
        kind: {
            name: place(elastic.BLOCKS[kind][name], value, dtype, name=f"{kind}.{name}", split=split)
            for name, value in block.items()
        }
        for kind, block in layer.items()
    }


def place_layers(
    layers: Iterable[dict[str, dict[str, Any]]], dtype: Any, split: Split | None = None
) -> list[dict[str, dict[str, Any]]]:
    """`place_layer` for one layer after another.

    Transfers do not wait, and hold what they read from: each layer is waited for, so that however slow the way to a
    device is, the host never holds more than a layer.
    """
    return [jax.block_until_ready(place_layer(layer, dtype, split)) for layer in layers]


def place_top(top: dict[str, Any], dtype: Any, split: Split | None = None) -> dict[str, Any]:
    """`place` for the leaves outside the layers; head_in stays in float32, it is small and square."""
    # Rows of the embedding are looked up one by one, which tiles do not serve.
    return {
        name: place(elastic.TOP[name], value, dtype, tiles=name != "embed", name=name, split=split)
        for name, value in top.items()
    }


def split_for(config: ModelConfig, devices: int | Mesh | None, meta: Mapping[str, Any]) -> Split | None:
    """How a model is shared out.

    Args:
        config: the model.
        devices: how many devices, or a mesh of them.
        meta: groups and runs of packed weights, as `plan.grouping` and checkpoints give them; empty for dense ones.

    Returns:
        Who has what; None: one device has all.
    """
    if devices is None or devices == 1:
        return None
    unit = axis_layout(config, "ffn").unit if config.intermediate_size else 1
    return split_of(config, device_mesh(devices), meta.get("groups") or {}, meta.get("runs") or {}, unit)


def load(
    folder: str | Path,
    prune_rate: float = 0.0,
    dtype: Any = None,
    *,
    budget: int | float | str | None = None,
    revision: str | None = None,
    devices: int | Mesh | None = None,
) -> CausalLM:
    """An elastic checkpoint at a prune rate, or at the size that fits a budget; only the kept bytes are read.

    Args:
        folder: elastic checkpoint, as `compress` writes it, or a hub id (owner/name), of which only the bytes of this
            size are downloaded.
        prune_rate: fraction of the prunable parameters to leave out, from 0 to 0.35.
        dtype: of activations and dense weights (default: bfloat16 on GPUs, float32 on CPUs).
        budget: in place of a rate, bytes that the weights may take: a number, a size ("50MB"), or a share of the
            device's memory ("80%"). A checkpoint of nested bits gives up bits and units in the order of its joint plan,
            any other one takes the least prune rate that fits.
        revision: branch, tag or commit of a hub id (default: its main branch).
        devices: how many devices share the model, or a mesh of them: heads, MLP channels and vocabulary are shared
            out, and of each device's part alone the bytes are read. None: the default device has all of it.

    Returns:
        The model on the device or devices. Its `folder` is absolute. At a setting of the joint plan it has no prune
        rates.

    Raises:
        UserError: a rate outside the range, a budget that is too small, a folder that is no elastic checkpoint, damaged
            files, or a hub that does not give us what is missing.
    """
    rate = check_rate(prune_rate)
    if budget is not None and rate:
        raise UserError("give a prune rate or a budget, not both")
    size = None if budget is None else parse_budget(budget)
    folder = hub.local(folder, revision)
    checkpoint = open_checkpoint(folder)
    return load_size(checkpoint, Choice(0, rate) if size is None else choose(checkpoint, size), dtype, devices)


def load_size(checkpoint: Checkpoint, size: Choice, dtype: Any = None, devices: int | Mesh | None = None) -> CausalLM:
    """`load` of an opened checkpoint at a size that was chosen before."""
    setting = size.setting
    hub.complete(checkpoint, size.rate, setting)
    dtype = default_dtype() if dtype is None else dtype
    split = split_for(checkpoint.config, devices, checkpoint.meta if checkpoint.bits < 16 else {})
    if setting is None:
        lazy = split is not None
        each = (checkpoint.layer(i, kept, lazy=lazy) for i, kept in enumerate(checkpoint.keep(size.rate)))
        top, plan = checkpoint.top(lazy=lazy), checkpoint.plan
    elif split is None:
        each = (checkpoint.layer_at(i, setting) for i in range(len(checkpoint.config.pattern)))
        top, plan = checkpoint.top_at(setting), None  # which has no rates, and none itself
    else:
        raise UserError(ONE_DEVICE)
    layers = place_layers(each, dtype, split)
    params = place_top(top, dtype, split) | {"layers": layers}
    return CausalLM(checkpoint.config, params, plan, size.rate, Folder(checkpoint.folder), dtype)


def load_source(
    ckpt: str, dtype: Any = None, *, dequantize: bool = False, devices: int | Mesh | None = None
) -> CausalLM:
    """The original model, unsorted and unquantized.

    Args:
        ckpt: Hugging Face folder, hub id, .gguf file, Megatron-LM file or the word `demo`.
        dtype: of activations and dense weights (default: bfloat16 on GPUs, float32 on CPUs).
        dequantize: also take a folder of packed integers (GPTQ, AWQ, compressed-tensors), with a warning.
        devices: as for `load`; the host holds a layer at a time.

    Returns:
        The model on the device or devices; its plan is None, so that it cannot be pruned. Its `folder` is `ckpt`,
        absolute where that is a folder.

    Raises:
        UserError: a checkpoint that is missing, damaged, or of a family that is not supported.
    """
    folder = Folder(ckpt) if Path(ckpt).is_dir() else str(ckpt)
    return dense_model(open_source(ckpt, dequantize=dequantize), dtype, devices=devices, folder=folder)


def dense_model(
    source: Source, dtype: Any = None, *, devices: int | Mesh | None = None, folder: Folder | str | None = None
) -> CausalLM:
    """`load_source` of a checkpoint that is open already."""
    dtype = default_dtype() if dtype is None else dtype
    split = split_for(source.config, devices, {})
    layers = place_layers((source.layer(i) for i in range(len(source.config.pattern))), dtype, split)
    params = place_top(source.top(), dtype, split) | {"layers": layers}
    return CausalLM(source.config, params, None, 0.0, folder, dtype)
