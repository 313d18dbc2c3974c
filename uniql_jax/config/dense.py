"""Hugging Face configs of transformers, by family: which key says what, and which options cannot be served."""

from __future__ import annotations

from collections.abc import Callable

from uniql_jax.config.common import MOST_LAYERS, bias_fields, scale_fields, transformer_fields
from uniql_jax.config.defaults import DEFAULTS
from uniql_jax.config.keys import Keys, number, refuse, shown
from uniql_jax.config.types import ConfigError, ModelConfig


def llama(keys: Keys) -> ModelConfig:
    """Read a llama config."""
    return ModelConfig(**transformer_fields(keys), **bias_fields(keys))


def qwen2(keys: Keys) -> ModelConfig:
    """Read a qwen2 config."""
    config = ModelConfig(**transformer_fields(keys), qkv_bias=True)
    _refuse_qwen_sliding(keys, config)
    return config


def qwen3(keys: Keys) -> ModelConfig:
    """Read a qwen3 config."""
    keys.size("head_dim")  # null is no value here, as in transformers
    config = ModelConfig(**transformer_fields(keys), **bias_fields(keys, mlp=False), qk_norm=True)
    _refuse_qwen_sliding(keys, config)
    return config


def _refuse_qwen_sliding(keys: Keys, config: ModelConfig) -> None:
    window = keys.size_or("sliding_window", None, least=0)
    first = keys.size("max_window_layers", least=-MOST_LAYERS)
    window = window if keys.flag("use_sliding_window") else None
    _refuse_sliding(keys, config, window, lambda layer: layer >= first)


def phi3(keys: Keys) -> ModelConfig:
    """Read a phi3 config (Phi-3, Phi-3.5 and Phi-4 mini)."""
    hf = dict(keys.hf) | {"original_max_position_embeddings": keys.size("original_max_position_embeddings", least=2)}
    if "head_dim" in keys.hf:
        keys.size("head_dim")  # null is no value here, as in transformers
    part = number("partial_rotary_factor", keys.raw("partial_rotary_factor"), above=0.0)
    fields = transformer_fields(Keys(hf, DEFAULTS["phi3"]), partial=part, longrope=True)
    if fields["rope"].scaling == "longrope":  # beyond it other frequencies hold, for the whole text
        fields["max_position"] = min(fields["max_position"], fields["rope"].original_max_position)
    config = ModelConfig(**fields)
    _refuse_window(keys, config)
    return config


def _refuse_window(keys: Keys, config: ModelConfig) -> int | None:
    """The window of all layers, refused where it is shorter than the longest text."""
    window = keys.size_or("sliding_window", None)
    if window is not None and window < config.max_position:
        raise ConfigError(
            f"sliding_window {window} in config.json is below max_position_embeddings {config.max_position}: attention "
            f"that slides is not supported (for shorter texts set max_position_embeddings to {window})"
        )
    return window


def mistral(keys: Keys) -> ModelConfig:
    """Read a mistral config."""
    keys.size("num_key_value_heads")  # null is no value here, as in transformers
    config = ModelConfig(**transformer_fields(keys))
    _refuse_sliding(keys, config, _refuse_window(keys, config), lambda layer: False)
    return config


def smollm3(keys: Keys) -> ModelConfig:
    """Read a smollm3 config."""
    common = transformer_fields(keys, base=2e6)
    layers, interval = len(common["pattern"]), keys.size("no_rope_layer_interval")
    rotates = list(keys.ids("no_rope_layers", alone=False))  # a 1 for a layer that rotates, whatever the name says
    if keys.raw("no_rope_layers") is None:
        rotates = [int((i + 1) % interval != 0) for i in range(layers)]
    if len(rotates) < layers or set(rotates) - {0, 1}:
        raise refuse("no_rope_layers", keys.raw("no_rope_layers"), f"a list of {layers} ones and zeros")
    unrotated = tuple(i for i in range(layers) if not rotates[i])
    if unrotated and common["rope"].attention_factor != 1.0:
        raise ConfigError("yarn with an attention factor is supported where all layers rotate only (no_rope_layers)")
    config = ModelConfig(**common, **bias_fields(keys), unrotated=unrotated)
    window = keys.size_or("sliding_window", None, least=0)
    window = window if keys.flag("use_sliding_window") else None
    _refuse_sliding(keys, config, window, lambda layer: layer in unrotated)
    return config


def _refuse_sliding(keys: Keys, config: ModelConfig, window: int | None, slides: Callable[[int], bool]) -> None:
    """Refuse a model in which attention slides: a layer of that kind, and a window shorter than the longest text.

    `slides(layer)` says which layers do where there is a window and no layer_types.
    """
    layers = len(config.pattern)
    kinds = keys.words("layer_types")
    if kinds is None:
        sliding = [window is not None and slides(i) for i in range(layers)]
        kinds = ["sliding_attention" if slide else "full_attention" for slide in sliding]
    if len(kinds) != layers:
        raise ConfigError(f"layer_types in config.json lists {len(kinds)} layers, num_hidden_layers says {layers}")
    for kind in kinds:
        if kind == "sliding_attention" and window is not None and window >= config.max_position:
            continue
        if kind not in ("full_attention", "attention"):
            raise ConfigError(
                f"{shown(kind)} layers are not supported (use_sliding_window, max_window_layers or layer_types)"
            )


def granite(keys: Keys) -> ModelConfig:
    """Read a granite config."""
    common = transformer_fields(keys)
    return ModelConfig(**common | scale_fields(keys, common["norm_eps"]), **bias_fields(keys))
