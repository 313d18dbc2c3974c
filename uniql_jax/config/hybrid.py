"""Hugging Face configs of families with SSM blocks: which key says what, and which options cannot be served."""

from __future__ import annotations

import math
from typing import Any

from uniql_jax.config.common import MOST_LAYERS, bias_fields, make_ssm, scale_fields, shared_fields, transformer_fields
from uniql_jax.config.defaults import DEFAULTS
from uniql_jax.config.keys import Keys, number, refuse, shown
from uniql_jax.config.types import ConfigError, ModelConfig, Ssm

NO_ATTENTION: dict[str, Any] = dict(heads=0, kv_heads=0, head_dim=0, rope=None)


def mamba2(keys: Keys) -> ModelConfig:
    """Read a mamba2 config."""
    keys.activation("hidden_act")
    heads, head_dim = keys.size("num_heads"), keys.size("head_dim")
    if heads * head_dim != keys.size("hidden_size") * keys.size("expand"):
        raise ConfigError(f"{heads} heads of {head_dim} channels are not hidden_size times expand")
    dt_min, dt_max = keys.interval("time_step_limit")
    ssm = make_ssm(
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
        **shared_fields(keys),
        **NO_ATTENTION,
        pattern=(("mamba2",),) * keys.size("num_hidden_layers", most=MOST_LAYERS),
        intermediate_size=0,
        norm_eps=keys.number("layer_norm_epsilon", least=0.0),
        ssm=ssm,
        residual_fp32=keys.flag("residual_in_fp32"),  # nemotron_h has the key too, but transformers does not heed it
    )


def _mamba_layers(keys: Keys, hidden: int, norm_eps: float | None = None) -> Ssm:
    """SSM blocks under the keys that begin with mamba_."""
    heads, inner = keys.size("mamba_n_heads"), keys.size("mamba_expand") * hidden
    head_dim = inner // heads if keys.raw("mamba_d_head") == "auto" else keys.size("mamba_d_head")
    if heads * head_dim != inner:
        raise ConfigError(f"{heads} SSM heads of {head_dim} channels are not mamba_expand times hidden_size")
    dt_min, dt_max = keys.interval("time_step_limit")
    return make_ssm(
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
        norm_eps=norm_eps,
    )


def bamba(keys: Keys) -> ModelConfig:
    """Read a bamba config."""
    # Half of a head rotates unless the rope dictionary says otherwise; a factor outside it is ignored.
    common = transformer_fields(keys, partial=0.5)
    layers = len(common["pattern"])
    attention = set(keys.ids("attn_layer_indices", alone=False))
    # other tools list the blocks instead
    kinds = keys.words("layers_block_type") or keys.words("layer_types") or []
    attention |= {i for i, kind in enumerate(kinds) if kind in ("attention", "full_attention")}
    common["pattern"] = tuple(("attention" if i in attention else "mamba2", "mlp") for i in range(layers))
    return ModelConfig(**common, **bias_fields(keys), ssm=_mamba_layers(keys, common["hidden_size"]))


_GRANITE_BLOCKS: dict[str, str] = dict.fromkeys(("mamba", "linear_attention"), "mamba2")
_GRANITE_BLOCKS |= dict.fromkeys(("attention", "full_attention"), "attention")


def _granite_pattern(keys: Keys, layers: int) -> tuple[str, ...]:
    """The first block of every layer, listed under one of two names or under both."""
    found: set[tuple[str, ...]] = set()
    for key in ("layer_types", "layers_block_type"):
        listed = keys.words(key)
        if not listed:
            continue
        for block in listed:
            if block not in _GRANITE_BLOCKS:
                raise ConfigError(f"{shown(block)} layers are not supported ({key})")
        if len(listed) != layers:
            raise ConfigError(f"{key} in config.json lists {len(listed)} layers, num_hidden_layers says {layers}")
        found.add(tuple(_GRANITE_BLOCKS[block] for block in listed))
    if len(found) > 1:
        raise ConfigError("layer_types and layers_block_type in config.json list different layers")
    return found.pop() if found else ("mamba2",) * layers


def granitemoehybrid(keys: Keys) -> ModelConfig:
    """Read a granitemoehybrid config."""
    if experts := keys.size("num_local_experts", least=0):
        raise ConfigError(f"num_local_experts in config.json is {experts}: mixtures of experts are not supported")
    common = transformer_fields(keys)
    layers, eps = len(common["pattern"]), common["norm_eps"]
    pattern = _granite_pattern(keys, layers)
    positions = keys.raw("position_embedding_type")
    if positions not in ("rope", "nope", None):
        raise refuse("position_embedding_type", positions, '"rope", "nope" or null')
    ssm = _mamba_layers(keys, common["hidden_size"], norm_eps=eps)
    common |= scale_fields(keys, eps) | dict(
        pattern=tuple((block, "mlp") for block in pattern),
        intermediate_size=keys.size("shared_intermediate_size"),
        rope=common["rope"] if positions == "rope" else None,
        ssm=ssm if "mamba2" in pattern else None,
    )
    return ModelConfig(**common, **bias_fields(keys, mlp=False))


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


def nemotron_h(keys: Keys) -> ModelConfig:
    """Read a nemotron_h config."""
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
    ssm = make_ssm(
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
    shared: dict[str, Any] = shared_fields(keys)
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
