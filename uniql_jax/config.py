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
class Ssm:
    """State-space blocks (Mamba2): `heads` heads of `head_dim` channels with `state` states each.

    B and C are shared by the heads of a group, which is also what the gated norm averages over. The step size is
    clamped to [dt_min, dt_max]; `chunk` is the length that the scan works on at a time.
    """

    heads: int
    head_dim: int
    state: int
    groups: int = 1
    conv: int = 4
    chunk: int = 256
    dt_min: float = 0.0
    dt_max: float = math.inf
    conv_bias: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one causal language model (all sizes unpruned).

    `pattern` lists the layers, each a tuple of residual blocks in order: ("attention", "mlp") for a transformer,
    ("mamba2",) for a state-space model, a mix for hybrids. Sizes of blocks that a model has not are 0 or None.
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
    gated_mlp: bool = True
    activation: str = "silu"  # silu | relu2
    ssm: Ssm | None = None
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
    if config.kv_heads and config.heads % config.kv_heads:
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


NO_ATTENTION: dict[str, Any] = dict(heads=0, kv_heads=0, head_dim=0, rope=None)
UNBOUNDED = 2**20
"""Longest text of a model whose config sets no limit, as a state-space model's has none."""


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)


def _shared(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What every family says in the same words."""
    return dict(
        model_type=hf["model_type"],
        vocab_size=int(hf["vocab_size"]),
        hidden_size=int(hf["hidden_size"]),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_position=int(hf.get("max_position_embeddings") or UNBOUNDED),
        bos_id=(_ids(hf.get("bos_token_id")) or (None,))[0],
        eos_ids=_ids(hf.get("eos_token_id")),
        dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16"),
    )


def _activation(hf: Mapping[str, Any], key: str, served: str = "silu") -> str:
    found = hf.get(key, served)
    if ("silu" if found == "swish" else found) != served:
        raise ConfigError(f"activation {found!r} ({key}) is not supported; we have {served} there")
    return served


def _transformer(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Attention with RoPE and a gated MLP in every layer."""
    hidden, heads = int(hf["hidden_size"]), int(hf["num_attention_heads"])
    head_dim = int(hf.get("head_dim") or hidden // heads)
    return _shared(hf) | dict(
        pattern=(("attention", "mlp"),) * int(hf["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(hf.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        rope=_rope(hf, head_dim),
        intermediate_size=int(hf["intermediate_size"]),
        activation=_activation(hf, "hidden_act"),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
    )


def _number(value: Any) -> float:
    """transformers 5 writes infinity, which JSON has not, as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _ssm(hf: Mapping[str, Any], **sizes: Any) -> Ssm:
    low, high = hf.get("time_step_limit") or hf.get("mamba_dt_limit") or (0.0, math.inf)
    ssm = Ssm(dt_min=_number(low), dt_max=_number(high), **sizes)
    if ssm.heads % ssm.groups:
        raise ConfigError(f"{ssm.heads} SSM heads cannot share {ssm.groups} groups evenly")
    return ssm


def _llama(hf: Mapping[str, Any]) -> ModelConfig:
    attention_bias = bool(hf.get("attention_bias", False))
    return ModelConfig(
        **_transformer(hf), qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=bool(hf.get("mlp_bias", False))
    )


def _qwen2(hf: Mapping[str, Any]) -> ModelConfig:
    if hf.get("use_sliding_window"):
        raise ConfigError("sliding-window attention (use_sliding_window: true) is not supported")
    return ModelConfig(**_transformer(hf), qkv_bias=True)


def _mamba2(hf: Mapping[str, Any]) -> ModelConfig:
    _activation(hf, "hidden_act")
    heads, head_dim = int(hf["num_heads"]), int(hf["head_dim"])
    if heads * head_dim != int(hf["hidden_size"]) * hf.get("expand", 2):
        raise ConfigError(f"{heads} heads of {head_dim} channels are not hidden_size times expand")
    ssm = _ssm(
        hf,
        heads=heads,
        head_dim=head_dim,
        state=int(hf["state_size"]),
        groups=int(hf.get("n_groups", 1)),
        conv=int(hf.get("conv_kernel", 4)),
        chunk=int(hf.get("chunk_size", 256)),
        conv_bias=bool(hf.get("use_conv_bias", True)),
        bias=bool(hf.get("use_bias", False)),
    )
    return ModelConfig(
        **_shared(hf),
        **NO_ATTENTION,
        pattern=(("mamba2",),) * int(hf["num_hidden_layers"]),
        intermediate_size=0,
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        ssm=ssm,
    )


def _bamba(hf: Mapping[str, Any]) -> ModelConfig:
    layers, hidden = int(hf["num_hidden_layers"]), int(hf["hidden_size"])
    attention: set[int] = set(hf.get("attn_layer_indices") or ())
    # transformers 5 may list the blocks instead
    for i, kind in enumerate(hf.get("layers_block_type") or hf.get("layer_types") or ()):
        if kind in ("attention", "full_attention"):
            attention.add(i)
    heads, head_dim = int(hf["mamba_n_heads"]), hf.get("mamba_d_head", "auto")
    inner = int(hf.get("mamba_expand", 2)) * hidden
    ssm = _ssm(
        hf,
        heads=heads,
        head_dim=inner // heads if head_dim == "auto" else int(head_dim),
        state=int(hf["mamba_d_state"]),
        groups=int(hf.get("mamba_n_groups", 1)),
        conv=int(hf.get("mamba_d_conv", 4)),
        chunk=int(hf.get("mamba_chunk_size", 256)),
        conv_bias=bool(hf.get("mamba_conv_bias", True)),
        bias=bool(hf.get("mamba_proj_bias", False)),
    )
    if ssm.heads * ssm.head_dim != inner:
        raise ConfigError(f"{ssm.heads} SSM heads of {ssm.head_dim} channels are not mamba_expand times hidden_size")
    bias = bool(hf.get("attention_bias", False))
    # Half of a head rotates in every Bamba; older configs do not say so.
    rotary = {"partial_rotary_factor": 0.5} | dict(hf)
    common: dict[str, Any] = _transformer(rotary)
    common["pattern"] = tuple(("attention" if i in attention else "mamba2", "mlp") for i in range(layers))
    return ModelConfig(**common, ssm=ssm, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False)))


_NEMOTRON_BLOCKS = {
    "M": "mamba2",
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "*": "attention",
    "attention": "attention",
    "full_attention": "attention",
    "-": "mlp",
    "mlp": "mlp",
}


def _nemotron_h(hf: Mapping[str, Any]) -> ModelConfig:
    _activation(hf, "mamba_hidden_act")
    blocks = hf.get("layers_block_type") or hf.get("layer_types") or hf["hybrid_override_pattern"]
    for block in blocks:
        if block not in _NEMOTRON_BLOCKS:
            raise ConfigError(f"block {block!r} of nemotron_h is not supported (mixture of experts is not)")
    if hf.get("sliding_window"):
        raise ConfigError("sliding-window attention (sliding_window) is not supported")
    hidden, heads = int(hf["hidden_size"]), int(hf["num_attention_heads"])
    # transformers clamps its steps to time_step_min, whatever time_step_limit says
    ssm = _ssm(
        {"time_step_limit": (hf.get("time_step_min", 0.001), math.inf)},
        heads=int(hf["mamba_num_heads"]),
        head_dim=int(hf["mamba_head_dim"]),
        state=int(hf["ssm_state_size"]),
        groups=int(hf.get("n_groups") or hf.get("mamba_n_groups", 8)),
        conv=int(hf.get("conv_kernel") or hf.get("mamba_d_conv", 4)),
        chunk=int(hf.get("chunk_size") or hf.get("mamba_chunk_size", 128)),
        conv_bias=bool(hf.get("use_conv_bias", hf.get("mamba_conv_bias", True))),
        bias=bool(hf.get("use_bias", False)),
    )
    return ModelConfig(
        **_shared(hf),
        pattern=tuple((_NEMOTRON_BLOCKS[block],) for block in blocks),
        heads=heads,
        kv_heads=int(hf.get("num_key_value_heads") or heads),
        head_dim=int(hf.get("head_dim") or hf.get("attention_head_dim") or hidden // heads),
        rope=None,  # its attention knows no positions
        intermediate_size=int(hf["intermediate_size"]),
        gated_mlp=False,
        activation=_activation(hf, "mlp_hidden_act", "relu2"),
        mlp_bias=bool(hf.get("mlp_bias", False)),
        norm_eps=float(hf.get("layer_norm_epsilon") or hf.get("rms_norm_eps", 1e-5)),
        ssm=ssm,
    )


FAMILIES = {"llama": _llama, "qwen2": _qwen2, "mamba2": _mamba2, "bamba": _bamba, "nemotron_h": _nemotron_h}
