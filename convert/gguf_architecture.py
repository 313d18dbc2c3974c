"""Which architecture of llama.cpp computes a model of ours, what that one cannot express, and its metadata.

`deci` is llama with an MLP width for every layer. It serves every model of rotating attention and gated MLPs without
norms of heads: RoPE factors give each pair its own frequency (none, for dimensions that do not rotate), and the RoPE's
factor of queries and keys carries the scale of attention.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from uniql_jax import elastic
from uniql_jax.config import ModelConfig, Rope
from uniql_jax.convert.integers import Blocks
from uniql_jax.errors import UserError

PER_LAYER = ("deci", "nemotron_h")
"""Architectures with an MLP width for every layer."""
PADDED = ("deci", "smollm3")
"""Architectures in which the one epsilon belongs to norms over the stream alone, which may then be padded."""
STILL = 1e30
"""A RoPE factor so large that a pair does not turn."""
NOPE_STEP = 4
"""llama.cpp's smollm3 rotates all layers but every fourth one."""


def base(config: ModelConfig) -> str:
    """llama.cpp's name of the architecture: `deci` also where `llama` would do.

    Raises:
        UserError: llama.cpp has none.
    """
    found = "deci"
    if config.ssm is not None:
        kinds = {len(kinds) for kinds in config.pattern}
        found = "granitehybrid" if kinds == {2} else "nemotron_h" if config.heads else "mamba2"
    elif config.qk_norm:
        found = "qwen3"
    elif config.unrotated:
        found = "smollm3"
    _check(config, found)
    return found


def _check(config: ModelConfig, name: str) -> None:
    """Refuse what an architecture has no place for."""
    scaled = config.rope is not None and config.rope.scaling != "default"
    ssm, layers = config.ssm, range(len(config.pattern))
    every_fourth = tuple(i for i in layers if (i + 1) % NOPE_STEP == 0)
    missing = {
        "biases in attention": name in ("qwen3", "smollm3") and "o_bias" in elastic.leaves(config, "attention"),
        "biases in MLPs": name in ("qwen3", "smollm3", "granitehybrid") and config.mlp_bias,
        "scaled RoPE": name in ("qwen3", "smollm3", "granitehybrid") and scaled,
        "unrotated layers other than every fourth one": name == "smollm3" and config.unrotated != every_fourth,
        "biases of SSM projections": ssm is not None and ssm.bias,
        "convolutions without a bias": ssm is not None and not ssm.conv_bias,
        "largest SSM steps": ssm is not None and math.isfinite(ssm.dt_max),
    }
    for what, lacks in missing.items():
        if lacks:
            raise UserError(f"llama.cpp's {name} has no {what}; use --format transformers")


def remark(config: ModelConfig) -> str | None:
    """What llama.cpp computes in another way than the model says; None where nothing is."""
    if config.ssm is not None and config.ssm.dt_min > 0:
        return f"llama.cpp does not raise SSM steps to {config.ssm.dt_min:g}, as the model's own code does"
    return None


def rope_factors(config: ModelConfig) -> Float[np.ndarray, " pairs"] | None:
    """What the frequencies of a whole head are divided by; None where they are those of its base alone."""
    if base(config) != "deci":
        return None
    pairs, rope = config.head_dim // 2, config.rope or Rope(dim=0)
    wanted = np.zeros(pairs, np.float32)
    wanted[: rope.dim // 2] = rope.inv_freq()
    plain = Rope(rope.theta, 2 * pairs).inv_freq()
    with np.errstate(divide="ignore"):
        factors = np.where(wanted > 0, plain / wanted, np.float32(STILL)).astype(np.float32)
    return None if (factors == 1).all() else factors


def add_fields(writer: Any, config: ModelConfig, name: str, embed: Blocks, ffn: list[int]) -> None:
    """Sizes and scales of the model, under the keys of llama.cpp.

    Args:
        writer: a gguf.GGUFWriter.
        config: the unpruned model.
        name: of the architecture.
        embed: how the stream is laid out.
        ffn: MLP width of every layer as it is written, 0 where there is none.
    """
    writer.add_quantization_version(2)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(embed.total)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(ffn if name in PER_LAYER else ffn[0])
    # sum / total + epsilon' is (sum / width + epsilon) * width / total
    eps = _norm_eps(config, name) * embed.width / embed.total
    writer.add_layer_norm_rms_eps(eps)
    if name == "nemotron_h":  # whose newer code reads the epsilon of its norms under this key
        writer.add_layer_norm_eps(eps)
    if config.heads:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        _add_rotation(writer, config, name)
    if config.ssm is not None:
        _add_ssm(writer, config)


def _norm_eps(config: ModelConfig, name: str) -> float:
    """The epsilon of all norms: of granitehybrid in units of its own stream, which it scales by `_residual`."""
    return config.gate_norm_eps if name == "granitehybrid" else config.norm_eps


def _residual(config: ModelConfig) -> float:
    """The scale of what blocks add to the stream, from what it did to the epsilons (`scale_fields`)."""
    return math.sqrt(config.gate_norm_eps / config.norm_eps) if config.norm_eps else 1.0


def _add_rotation(writer: Any, config: ModelConfig, name: str) -> None:
    rope, whole = config.rope, name in ("deci", "llama")
    writer.add_rope_freq_base(rope.theta if rope is not None else Rope().theta)
    writer.add_rope_dimension_count(config.head_dim if whole or rope is None else rope.dim)
    if name == "granitehybrid":
        writer.add_rope_scaling_finetuned(rope is not None)
        if config.attention_scale is not None:
            writer.add_attention_scale(config.softmax_scale)
            writer.add_embedding_scale(_residual(config))
            writer.add_residual_scale(_residual(config))
            writer.add_logit_scale(1.0)
    elif name != "nemotron_h" and (factor := config.softmax_scale * math.sqrt(config.head_dim)) != 1.0:
        writer.add_rope_scaling_attn_factors(math.sqrt(factor))


def _add_ssm(writer: Any, config: ModelConfig) -> None:
    ssm = config.ssm
    assert ssm is not None
    writer.add_ssm_conv_kernel(ssm.conv)
    writer.add_ssm_inner_size(ssm.heads * ssm.head_dim)
    writer.add_ssm_state_size(ssm.state)
    writer.add_ssm_time_step_rank(ssm.heads)
    writer.add_ssm_group_count(ssm.groups)


def head_counts(config: ModelConfig) -> tuple[int, int | list[int]]:
    """Query heads, and key/value heads: by layer where only some layers have attention."""
    by_layer = [config.kv_heads if "attention" in kinds else 0 for kinds in config.pattern]
    return config.heads, by_layer if config.ssm is not None and config.heads else config.kv_heads
