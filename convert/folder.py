"""A folder's tensors: as they are, or dequantized on request where what it holds is integers already."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from uniql_jax import config as configs
from uniql_jax.convert.prequantized import DequantizingReader
from uniql_jax.convert.published_checkpoint import MARK, PublishedReader
from uniql_jax.errors import CheckpointWarning, UserError
from uniql_jax.files import ShardReader


def read_folder(
    folder: Path, name: str, hf_config: dict[str, Any], dequantize: bool
) -> tuple[ShardReader | DequantizingReader | PublishedReader, dict[str, Any]]:
    """The tensors of a folder and the config.json that they belong to.

    Args:
        folder: with safetensors.
        name: what the user called it.
        hf_config: its config.json.
        dequantize: whether integers are read as what they stand for.

    Raises:
        UserError: a config that cannot be served, integers that were not asked for, no tensors that can be read.
    """
    hf = dict(hf_config)
    section = hf.pop("quantization_config", None) or hf.pop("compression_config", None)
    if section and not dequantize:
        raise _quantized(name)
    _check_config(name, hf)  # what is wrong with the config is said before what is wrong with the tensors
    if not list(folder.glob("*.safetensors*")) and list(folder.glob("*.bin")):
        raise UserError(
            f"{name} holds PyTorch pickles only; load it with transformers and save_pretrained() it as safetensors"
        )
    shards = ShardReader(folder)
    if MARK in hf:
        published = PublishedReader(shards, hf, name)
        if published.packed and not dequantize:
            raise _quantized(name)
        if published.packed:
            _warn_of_loss(name, "UniQL, w4a16")
        return published, published.hf_config
    if not section:
        return shards, hf
    if not isinstance(section, dict):
        raise UserError(f"{folder / 'config.json'}: quantization_config is no JSON object")
    reader = DequantizingReader(shards, section, name)
    _warn_of_loss(name, section.get("quant_method"))
    return reader, hf


def _check_config(name: str, hf_config: dict[str, Any]) -> None:
    try:
        configs.from_hf(hf_config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _quantized(name: str) -> UserError:
    return UserError(
        f"{name} is quantized already; give the original 16- or 32-bit model, or --dequantize-source to go on with "
        "what its integers hold"
    )


def _warn_of_loss(name: str, method: object) -> None:
    text = f"{name} is quantized already ({method}): what that lost stays lost, and is quantized once more"
    warnings.warn(text, CheckpointWarning, stacklevel=4)
