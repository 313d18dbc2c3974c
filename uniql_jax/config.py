"""What a model is: one frozen, hashable description that every family's Hugging Face config is read into.

A family is one function here (`FAMILIES`) and one table in `convert/`; nothing else in the code knows its name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from uniql_jax.errors import UserError


class ConfigError(UserError):
    """A checkpoint's config.json that cannot be served, said in one line."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, scaling and how many of a head's dimensions rotate."""

    theta: float = 10000.0
    dim: int = 64
    scaling: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def inv_freq(self) -> Float[np.ndarray, " pairs"]:
        """Angle per position of each pair, float32 [dim / 2]; pair j turns dimensions j and j + dim / 2.

        The llama3 rule keeps short wavelengths, divides long ones by `factor` and blends in between.
        """
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        freq = (np.float32(1.0) / np.power(np.float32(self.theta), exponent)).astype(np.float32)
        if self.scaling == "linear":
            return (freq / np.float32(self.factor)).astype(np.float32)
        if self.scaling != "llama3":
            return freq
        wavelength = 2 * math.pi / freq
        turns = self.original_max_position / wavelength
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        scaled = np.where(turns < self.low_freq_factor, freq / self.factor, freq)
        between = (turns >= self.low_freq_factor) & (turns <= self.high_freq_factor)
        return np.where(between, (1 - blend) * freq / self.factor + blend * freq, scaled).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one causal language model (all sizes unpruned).

    `pattern` lists the layers, each a tuple of residual blocks in order: ("attention", "mlp") for a transformer.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    pattern: tuple[tuple[str, ...], ...]
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    intermediate_size: int
    norm_eps: float
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    max_position: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    @property
    def query_groups(self) -> int:
        """Query heads that share one key/value head; query head i belongs to key/value head i // query_groups."""
        return self.heads // self.kv_heads


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config.json, as published on the hub or as transformers 5 writes it.

    Raises ConfigError when the family or one of its options is not supported.
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not supported; we have {', '.join(sorted(FAMILIES))}")
    try:
        config = FAMILIES[model_type](hf)
    except KeyError as error:
        raise ConfigError(f"config.json of a {model_type} model lacks {error.args[0]!r}") from None
    if config.heads % config.kv_heads:
        raise ConfigError(f"{config.heads} query heads cannot share {config.kv_heads} key/value heads evenly")
    return config


def _rope(hf: Mapping[str, Any], dim: int) -> Rope:
    """The hub writes rope_theta and rope_scaling, transformers 5 one rope_parameters."""
    parameters = dict(hf.get("rope_scaling") or {})
    parameters.update(hf.get("rope_parameters") or {})
    theta = parameters.get("rope_theta") or hf.get("rope_theta") or 10000.0
    scaling = parameters.get("rope_type") or parameters.get("type") or "default"
    if scaling not in ("default", "linear", "llama3"):
        raise ConfigError(f"RoPE scaling {scaling!r} is not supported; we have default, linear and llama3")
    limit = parameters.get("original_max_position_embeddings") or hf.get("max_position_embeddings", 8192)
    rotary = int(dim * float(parameters.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0))
    return Rope(
        theta=float(theta),
        dim=rotary,
        scaling=scaling,
        factor=float(parameters.get("factor", 1.0)),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        original_max_position=int(limit),
    )


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)


def _common(hf: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = int(hf["hidden_size"]), int(hf["num_attention_heads"])
    head_dim = int(hf.get("head_dim") or hidden // heads)
    activation = hf.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"activation {activation!r} is not supported for a gated MLP; we have silu")
    return dict(
        model_type=hf["model_type"],
        vocab_size=int(hf["vocab_size"]),
        hidden_size=hidden,
        pattern=(("attention", "mlp"),) * int(hf["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(hf.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        rope=_rope(hf, head_dim),
        intermediate_size=int(hf["intermediate_size"]),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_position=int(hf.get("max_position_embeddings", 2048)),
        bos_id=(_ids(hf.get("bos_token_id")) or (None,))[0],
        eos_ids=_ids(hf.get("eos_token_id")),
        dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16"),
    )


def _llama(hf: Mapping[str, Any]) -> ModelConfig:
    attention_bias = bool(hf.get("attention_bias", False))
    return ModelConfig(
        **_common(hf), qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=bool(hf.get("mlp_bias", False))
    )


def _qwen2(hf: Mapping[str, Any]) -> ModelConfig:
    if hf.get("use_sliding_window"):
        raise ConfigError("sliding-window attention (use_sliding_window: true) is not supported")
    return ModelConfig(**_common(hf), qkv_bias=True)


FAMILIES = {"llama": _llama, "qwen2": _qwen2}
