"""Hugging Face configs by family: the function that reads each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from uniql_jax.config import dense, hybrid
from uniql_jax.config.defaults import DEFAULTS
from uniql_jax.config.keys import Keys, refuse, shown
from uniql_jax.config.types import ConfigError, ModelConfig

FAMILIES: dict[str, Callable[[Keys], ModelConfig]] = {
    "llama": dense.llama,
    "qwen2": dense.qwen2,
    "qwen3": dense.qwen3,
    "mistral": dense.mistral,
    "smollm3": dense.smollm3,
    "granite": dense.granite,
    "phi3": dense.phi3,
    "granitemoehybrid": hybrid.granitemoehybrid,
    "mamba2": hybrid.mamba2,
    "bamba": hybrid.bamba,
    "nemotron_h": hybrid.nemotron_h,
}


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config.json, as published on the hub or as transformers 5 writes it.

    A key that is absent means what transformers' own config class of the family means by it.

    Args:
        hf: The parsed config.json.

    Raises:
        ConfigError: when the family or one of its options is not supported, or a value is not of its kind.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"model_type {shown(model_type)} is not supported; we have {', '.join(sorted(FAMILIES))}")
    if hf.get("per_layer_config"):
        raise ConfigError("per_layer_config (sizes that differ by layer) is not supported")
    config = FAMILIES[model_type](Keys(hf, DEFAULTS[model_type]))
    if config.kv_heads and config.heads % config.kv_heads:
        raise ConfigError(f"{config.heads} query heads cannot share {config.kv_heads} key/value heads evenly")
    if config.kv_heads and hf.get("is_causal", True) is not True:
        raise refuse("is_causal", hf["is_causal"], "true: attention looks back only")
    return config
