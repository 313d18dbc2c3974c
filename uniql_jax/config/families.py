"""Hugging Face configs by family: which key says what, and which options cannot be served."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from uniql_jax.config.defaults import DEFAULTS
from uniql_jax.config.keys import Keys, number, refuse, shown
from uniql_jax.config.rope import read_rope
from uniql_jax.config.types import ConfigError, ModelConfig, Ssm

NO_ATTENTION: dict[str, Any] = dict(heads=0, kv_heads=0, head_dim=0, rope=None)
MOST_LAYERS = 10_000
_DTYPES = ("float16", "bfloat16", "float32", "float64", "auto")


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


def _shared(keys: Keys) -> dict[str, Any]:
    """What every family says in the same words."""
    return dict(
        model_type=keys.hf["model_type"],
        vocab_size=keys.size("vocab_size"),
        hidden_size=keys.size("hidden_size"),
        tie_embeddings=keys.flag("tie_word_embeddings"),
        max_position=keys.size("max_position_embeddings"),
        bos_id=keys.size_or("bos_token_id", None, least=-1),
        eos_ids=keys.ids("eos_token_id"),
        dtype=_dtype(keys),
    )


def _dtype(keys: Keys) -> str:
    """The number format of the weights; bfloat16 where the config names none."""
    for key in ("dtype", "torch_dtype"):
        found = keys.raw(key)
        if found is None:
            continue
        name = found.removeprefix("torch.") if isinstance(found, str) else found
        if name not in _DTYPES:
            raise refuse(key, found, f"one of {', '.join(_DTYPES)}")
        return "bfloat16" if name == "auto" else str(name)
    return "bfloat16"


def _transformer(keys: Keys, partial: float | None = None) -> dict[str, Any]:
    """Attention with RoPE and a gated MLP in every layer."""
    shared = _shared(keys)
    hidden, heads = shared["hidden_size"], keys.size("num_attention_heads")
    head_dim = keys.size_or("head_dim", None)
    if head_dim is None and hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and no head_dim is set"
        )
    head_dim = head_dim or hidden // heads
    return shared | dict(
        pattern=(("attention", "mlp"),) * keys.size("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        kv_heads=keys.size_or("num_key_value_heads", heads),
        head_dim=head_dim,
        rope=read_rope(keys.hf, head_dim, shared["max_position"], partial),
        intermediate_size=keys.size("intermediate_size"),
        activation=keys.activation("hidden_act"),
        norm_eps=keys.number("rms_norm_eps", least=0.0),
    )


def _ssm(**sizes: Any) -> Ssm:
    ssm = Ssm(**sizes)
    if ssm.heads % ssm.groups:
        raise ConfigError(f"{ssm.heads} SSM heads cannot share {ssm.groups} groups evenly")
    return ssm


def _llama(keys: Keys) -> ModelConfig:
    bias = keys.flag("attention_bias")
    return ModelConfig(**_transformer(keys), qkv_bias=bias, o_bias=bias, mlp_bias=keys.flag("mlp_bias"))


def _qwen2(keys: Keys) -> ModelConfig:
    config = ModelConfig(**_transformer(keys), qkv_bias=True)
    _refuse_sliding(keys, config)
    return config


def _qwen3(keys: Keys) -> ModelConfig:
    keys.size("head_dim")  # null is no value here, as in transformers
    bias = keys.flag("attention_bias")
    config = ModelConfig(**_transformer(keys), qkv_bias=bias, o_bias=bias, qk_norm=True)
    _refuse_sliding(keys, config)
    return config


def _refuse_sliding(keys: Keys, config: ModelConfig) -> None:
    """Refuse a qwen in which attention slides: a layer of that kind, and a window shorter than the longest text."""
    layers = len(config.pattern)
    window = keys.size_or("sliding_window", None, least=0)
    window = window if keys.flag("use_sliding_window") else None
    first = keys.size("max_window_layers", least=-MOST_LAYERS)
    kinds = keys.words("layer_types")
    if kinds is None:
        kinds = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(layers)]
    if len(kinds) != layers:
        raise ConfigError(f"layer_types in config.json lists {len(kinds)} layers, num_hidden_layers says {layers}")
    for kind in kinds:
        if kind == "sliding_attention" and window is not None and window >= config.max_position:
            continue
        if kind not in ("full_attention", "attention"):
            raise ConfigError(
                f"{shown(kind)} layers are not supported (use_sliding_window, max_window_layers or layer_types)"
            )


def _mamba2(keys: Keys) -> ModelConfig:
    keys.activation("hidden_act")
    heads, head_dim = keys.size("num_heads"), keys.size("head_dim")
    if heads * head_dim != keys.size("hidden_size") * keys.size("expand"):
        raise ConfigError(f"{heads} heads of {head_dim} channels are not hidden_size times expand")
    dt_min, dt_max = keys.interval("time_step_limit")
    ssm = _ssm(
        heads=heads,
        head_dim=head_dim,
        state=keys.size("state_size"),
        groups=keys.size("n_groups"),
        conv=keys.size("conv_kernel"),
        chunk=keys.size("chunk_size"),
        dt_min=dt_min,
        dt_max=dt_max,
        conv_bias=keys.flag("use_conv_bias"),
        bias=keys.flag("use_bias"),
    )
    return ModelConfig(
        **_shared(keys),
        **NO_ATTENTION,
        pattern=(("mamba2",),) * keys.size("num_hidden_layers", most=MOST_LAYERS),
        intermediate_size=0,
        norm_eps=keys.number("layer_norm_epsilon", least=0.0),
        ssm=ssm,
        residual_fp32=keys.flag("residual_in_fp32"),  # nemotron_h has the key too, but transformers does not heed it
    )


def _bamba(keys: Keys) -> ModelConfig:
    # Half of a head rotates unless the rope dictionary says otherwise; a factor outside it is ignored.
    common = _transformer(keys, partial=0.5)
    layers = len(common["pattern"])
    attention = set(keys.ids("attn_layer_indices", alone=False))
    # other tools list the blocks instead
    kinds = keys.words("layers_block_type") or keys.words("layer_types") or []
    attention |= {i for i, kind in enumerate(kinds) if kind in ("attention", "full_attention")}
    common["pattern"] = tuple(("attention" if i in attention else "mamba2", "mlp") for i in range(layers))
    heads, inner = keys.size("mamba_n_heads"), keys.size("mamba_expand") * common["hidden_size"]
    head_dim = inner // heads if keys.raw("mamba_d_head") == "auto" else keys.size("mamba_d_head")
    if heads * head_dim != inner:
        raise ConfigError(f"{heads} SSM heads of {head_dim} channels are not mamba_expand times hidden_size")
    dt_min, dt_max = keys.interval("time_step_limit")
    ssm = _ssm(
        heads=heads,
        head_dim=head_dim,
        state=keys.size("mamba_d_state"),
        groups=keys.size("mamba_n_groups"),
        conv=keys.size("mamba_d_conv"),
        chunk=keys.size("mamba_chunk_size"),
        dt_min=dt_min,
        dt_max=dt_max,
        conv_bias=keys.flag("mamba_conv_bias", or_null=True),
        bias=keys.flag("mamba_proj_bias", or_null=True),
    )
    bias = keys.flag("attention_bias")
    return ModelConfig(**common, ssm=ssm, qkv_bias=bias, o_bias=bias, mlp_bias=keys.flag("mlp_bias"))


_NEMOTRON_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_NEMOTRON_BLOCKS = {
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
}
_NEMOTRON_OLD_KEYS = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}
"""Old name -> today's; as in transformers the old one wins."""


def _nemotron_blocks(keys: Keys) -> list[str]:
    """The kinds of the layers, by the first key that lists them."""
    for key in ("layer_types", "layers_block_type"):
        if keys.hf.get(key) is not None:
            return Keys(keys.hf, {}).words(key) or []
    pattern = keys.hf.get("hybrid_override_pattern")
    if pattern is None:
        return ["linear_attention", "moe", "full_attention", "mlp"]  # transformers' default
    if not isinstance(pattern, str):
        raise refuse("hybrid_override_pattern", pattern, "a text of the letters M, * and -")
    return [_NEMOTRON_LETTERS.get(letter, letter) for letter in pattern]


def _nemotron_h(keys: Keys) -> ModelConfig:
    hf = dict(keys.hf)
    keys = Keys(hf | {new: hf[old] for old, new in _NEMOTRON_OLD_KEYS.items() if old in hf}, DEFAULTS["nemotron_h"])
    keys.activation("mamba_hidden_act")
    blocks = _nemotron_blocks(keys)
    for block in blocks:
        if block not in _NEMOTRON_BLOCKS:
            raise ConfigError(f"block {shown(block)} of nemotron_h is not supported (mixture of experts is not)")
    if not 1 <= len(blocks) <= MOST_LAYERS:
        raise ConfigError(f"the config lists {len(blocks)} layers; a model has 1 to {MOST_LAYERS}")
    if keys.size_or("sliding_window", None):
        raise ConfigError("sliding-window attention (sliding_window) is not supported")
    ssm = _ssm(
        heads=keys.size("mamba_num_heads"),
        head_dim=keys.size("mamba_head_dim"),
        state=keys.size("ssm_state_size"),
        groups=keys.size("n_groups"),
        conv=keys.size("conv_kernel"),
        chunk=keys.size("chunk_size"),
        # transformers clamps its steps to time_step_min, whatever time_step_limit says
        dt_min=number("time_step_min", keys.raw("time_step_min")),
        dt_max=math.inf,
        conv_bias=keys.flag("use_conv_bias"),
        bias=keys.flag("use_bias"),
    )
    shared: dict[str, Any] = _shared(keys)
    shared["tie_embeddings"] = False  # as in transformers, whose class ties nothing
    return ModelConfig(
        **shared,
        pattern=tuple((_NEMOTRON_BLOCKS[block],) for block in blocks),
        heads=keys.size("num_attention_heads"),
        kv_heads=keys.size("num_key_value_heads"),
        head_dim=keys.size("head_dim"),
        rope=None,  # its attention knows no positions
        intermediate_size=keys.size("intermediate_size"),
        gated_mlp=False,
        activation=keys.activation("mlp_hidden_act", "relu2"),
        mlp_bias=keys.flag("mlp_bias"),
        norm_eps=keys.number("layer_norm_epsilon", least=0.0),
        ssm=ssm,
    )


FAMILIES = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mamba2": _mamba2,
    "bamba": _bamba,
    "nemotron_h": _nemotron_h,
}
