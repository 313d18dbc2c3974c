"""From disk to a CausalLM: an elastic checkpoint at any prune rate, or an original one as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uniql_jax import elastic
from uniql_jax.casting import cast
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.convert.source import open_source
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.pallas_kernels import dispatch
from uniql_jax.pallas_kernels.dequant_matmul import preferred_layout
from uniql_jax.plan import check_rate
from uniql_jax.runtime import hub
from uniql_jax.runtime.text import Folder
from uniql_jax.weights.quantized import QuantizedArray


def default_dtype() -> Any:
    """bfloat16 where a GPU computes, float32 on CPUs, which gain nothing from 16 bits."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def place(leaf: elastic.Leaf | None, value: Any, dtype: Any, tiles: bool = True, name: str = "(unnamed)") -> Any:
    """Move a leaf to the device.

    Args:
        leaf: the row of `elastic` that describes it; None stands for a dense matrix.
        value: an array of numpy, or a packed weight of them.
        dtype: of dense matrices; vectors become float32.
        tiles: whether a packed weight may take the layout that a GPU's kernels read fastest.
        name: names the leaf in messages.

    Returns:
        The array or packed weight on the default device.

    Raises:
        UserError: a value does not fit `dtype`.
    """
    if isinstance(value, QuantizedArray):
        check_scales(value, name)
        if dispatch.default("dequant_matmul") == "pallas":
            value = value.in_runs()  # once instead of for every product
        if tiles and value.run == 1:
            layout = preferred_layout(bits=value.bits, group=value.group, contract=value.contract, dtype=dtype)
            value = value.in_layout(layout)
        return jax.tree.map(jnp.asarray, value)
    is_matrix = leaf is None or leaf.contract is not None
    return jnp.asarray(cast(name, value, dtype if is_matrix else np.float32))


LARGEST_SCALE = 2.0**27
"""Kernels multiply a scale with sums of 136 inputs and more, which must stay below what bfloat16 and float32 hold."""


def check_scales(weight: QuantizedArray, name: str) -> None:
    """Raise UserError for scales that no weight has and kernels cannot multiply with."""
    if not isinstance(weight.scale, np.ndarray):  # shapes alone, or on a device already
        return
    largest = float(np.max(np.abs(np.asarray(weight.scale, np.float32)), initial=0.0))
    if largest >= LARGEST_SCALE:
        raise UserError(f"{name} has a scale of {largest:g}, at or above 2^27: the checkpoint is damaged")


def place_layer(layer: dict[str, dict[str, Any]], dtype: Any) -> dict[str, dict[str, Any]]:
    """`place` for all leaves of a layer."""
    return {
        kind: {
            name: place(elastic.BLOCKS[kind][name], value, dtype, name=f"{kind}.{name}")
            for name, value in block.items()
        }
        for kind, block in layer.items()
    }


def place_top(top: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """`place` for the leaves outside the layers; head_in stays in float32, it is small and square."""
    # Rows of the embedding are looked up one by one, which tiles do not serve.
    return {
        name: place(elastic.TOP[name], value, dtype, tiles=name != "embed", name=name) for name, value in top.items()
    }


def load(folder: str | Path, prune_rate: float = 0.0, dtype: Any = None, *, revision: str | None = None) -> CausalLM:
    """An elastic checkpoint at a prune rate; only the kept bytes are read.

    Args:
        folder: elastic checkpoint, as `compress` writes it, or a hub id (owner/name), of which only the bytes of this
            rate are downloaded.
        prune_rate: fraction of the prunable parameters to leave out, from 0 to 0.35.
        dtype: of activations and dense weights (default: bfloat16 on GPUs, float32 on CPUs).
        revision: branch, tag or commit of a hub id (default: its main branch).

    Returns:
        The model on the default device. Its `folder` is absolute.

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
    layers = [place_layer(checkpoint.layer(i, kept), dtype) for i, kept in enumerate(keep)]
    params = place_top(checkpoint.top(), dtype) | {"layers": layers}
    return CausalLM(checkpoint.config, params, checkpoint.plan, rate, found, dtype)


def load_source(ckpt: str, dtype: Any = None, *, dequantize: bool = False) -> CausalLM:
    """The original model, unsorted and unquantized.

    Args:
        ckpt: Hugging Face folder, hub id, .gguf file, Megatron-LM file or the word `demo`.
        dtype: of activations and dense weights (default: bfloat16 on GPUs, float32 on CPUs).
        dequantize: also take a folder of packed integers (GPTQ, AWQ, compressed-tensors), with a warning.

    Returns:
        The model on the default device; its plan is None, so that it cannot be pruned. Its `folder` is `ckpt`,
        absolute where that is a folder.

    Raises:
        UserError: a checkpoint that is missing, damaged, or of a family that is not supported.
    """
    source = open_source(ckpt, dequantize=dequantize)
    dtype = default_dtype() if dtype is None else dtype
    folder = Folder(ckpt) if Path(ckpt).is_dir() else str(ckpt)
    layers = [place_layer(source.layer(i), dtype) for i in range(len(source.config.pattern))]
    params = place_top(source.top(), dtype) | {"layers": layers}
    return CausalLM(source.config, params, None, 0.0, folder, dtype)
