"""From disk to a CausalLM: an elastic checkpoint at any prune rate, or an original one as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uniql_jax import elastic
from uniql_jax.casting import cast
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.config import ModelConfig
from uniql_jax.convert.source import open_source
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.pallas_kernels import dispatch
from uniql_jax.pallas_kernels.dequant_matmul import preferred_layout
from uniql_jax.plan import axis_layout, check_rate
from uniql_jax.runtime import hub
from uniql_jax.runtime.text import Folder
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

    def prepare(value: Any) -> Any:
        if isinstance(value, QuantizedArray):
            if dispatch.default("dequant_matmul") == "pallas":
                value = value.in_runs()  # once instead of for every product
            if tiles and value.run == 1:
                layout = preferred_layout(bits=value.bits, group=value.group, contract=value.contract, dtype=dtype)
                value = value.in_layout(layout)
            return value
        is_matrix = leaf is None or leaf.contract is not None
        return cast(name, value, dtype if is_matrix else np.float32)

    if split is None or leaf is None:
        return jax.tree.map(jnp.asarray, prepare(value))
    return spread(leaf, value, split, prepare)


def place_layer(layer: dict[str, dict[str, Any]], dtype: Any, split: Split | None = None) -> dict[str, dict[str, Any]]:
    """`place` for all leaves of a layer."""
    return {
        kind: {
            name: place(elastic.BLOCKS[kind][name], value, dtype, name=f"{kind}.{name}", split=split)
            for name, value in block.items()
        }
        for kind, block in layer.items()
    }


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
    revision: str | None = None,
    devices: int | Mesh | None = None,
) -> CausalLM:
    """An elastic checkpoint at a prune rate; only the kept bytes are read.

    Args:
        folder: elastic checkpoint, as `compress` writes it, or a hub id (owner/name), of which only the bytes of this
            rate are downloaded.
        prune_rate: fraction of the prunable parameters to leave out, from 0 to 0.35.
        dtype: of activations and dense weights (default: bfloat16 on GPUs, float32 on CPUs).
        revision: branch, tag or commit of a hub id (default: its main branch).
        devices: how many devices share the model, or a mesh of them: heads, MLP channels and vocabulary are shared
            out, and of each device's part alone the bytes are read. None: the default device has all of it.

    Returns:
        The model on the device or devices. Its `folder` is absolute.

    Raises:
        UserError: a rate outside the range, a folder that is no elastic checkpoint, damaged files, or a hub that does
            not give us what is missing.
    """
    rate = check_rate(prune_rate)
    folder = hub.local(folder, revision)
    checkpoint = open_checkpoint(folder)
    hub.complete(checkpoint, rate)
    dtype = default_dtype() if dtype is None else dtype
    found = Folder(folder)
    keep = checkpoint.keep(rate)
    split = split_for(checkpoint.config, devices, checkpoint.meta if checkpoint.bits < 16 else {})
    lazy = split is not None
    layers = [place_layer(checkpoint.layer(i, kept, lazy=lazy), dtype, split) for i, kept in enumerate(keep)]
    params = place_top(checkpoint.top(lazy), dtype, split) | {"layers": layers}
    return CausalLM(checkpoint.config, params, checkpoint.plan, rate, found, dtype)


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
    source = open_source(ckpt, dequantize=dequantize)
    dtype = default_dtype() if dtype is None else dtype
    folder = Folder(ckpt) if Path(ckpt).is_dir() else str(ckpt)
    split = split_for(source.config, devices, {})
    layers = [place_layer(source.layer(i), dtype, split) for i in range(len(source.config.pattern))]
    params = place_top(source.top(), dtype, split) | {"layers": layers}
    return CausalLM(source.config, params, None, 0.0, folder, dtype)
