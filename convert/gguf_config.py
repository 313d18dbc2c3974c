"""The metadata of a GGUF file as the config.json that the model would have on the hub: one function an architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from uniql_jax.convert.gguf_architecture import NOPE_STEP
from uniql_jax.convert.gguf_metadata import LONG, SHORT, Metadata
from uniql_jax.errors import UserError


def _biases(meta: Metadata) -> dict[str, Any]:
    return {"attention_bias": meta.has("attn_q.bias"), "mlp_bias": meta.has("ffn_gate.bias")}


def _llama(meta: Metadata) -> dict[str, Any]:
    return {"model_type": "llama"} | meta.attention() | meta.rotation() | _biases(meta)


def _qwen2(meta: Metadata) -> dict[str, Any]:
    return {"model_type": "qwen2", "use_sliding_window": False} | meta.attention() | meta.rotation()


def _qwen3(meta: Metadata) -> dict[str, Any]:
    bias = {"attention_bias": meta.has("attn_q.bias")}
    return {"model_type": "qwen3", "use_sliding_window": False} | meta.attention() | meta.rotation() | bias


def _smollm3(meta: Metadata) -> dict[str, Any]:
    layers = [int((i + 1) % NOPE_STEP != 0) for i in range(meta.layers)]
    return {"model_type": "smollm3", "no_rope_layers": layers} | meta.attention() | meta.rotation() | _biases(meta)


def _multipliers(meta: Metadata) -> dict[str, Any]:
    return {
        "embedding_multiplier": meta.number("embedding_scale", 1.0),
        "residual_multiplier": meta.number("residual_scale", 1.0),
        "attention_multiplier": meta.scale,
        "logits_scaling": meta.number("logit_scale", 1.0),
    }


def _granite(meta: Metadata) -> dict[str, Any]:
    if not meta.file.flag(meta.key("rope.scaling.finetuned"), True):
        raise UserError(f"{meta.path} is a granite model without positions, which is not supported")
    found = meta.attention() | meta.whole_rotation()
    return {"model_type": "granite"} | found | _biases(meta) | _multipliers(meta)


def _phi3(meta: Metadata) -> dict[str, Any]:
    found = meta.attention() | {"rope_theta": meta.theta, "partial_rotary_factor": meta.rotating / meta.head_dim}
    found["original_max_position_embeddings"] = meta.file.size(
        meta.key("rope.scaling.original_context_length"), found["max_position_embeddings"]
    )
    found["sliding_window"] = meta.file.count(meta.key("attention.sliding_window"), None) or None
    if SHORT in meta.tensors and LONG in meta.tensors:
        scaling = {"type": "longrope", "attention_factor": meta.number("rope.scaling.attn_factor", 1.0)}
        for key, name in (("short_factor", SHORT), ("long_factor", LONG)):
            scaling[key] = [float(str(factor)) for factor in meta.factors(name)]
        found["rope_scaling"] = scaling
    return {"model_type": "phi3"} | found


def _mamba2(meta: Metadata) -> dict[str, Any]:
    ssm = meta.ssm("mamba")
    names = {"n_heads": "num_heads", "d_head": "head_dim", "n_groups": "n_groups", "d_state": "state_size"}
    names |= {"d_conv": "conv_kernel", "expand": "expand"}
    found = meta.shared() | {theirs: ssm[f"mamba_{ours}"] for ours, theirs in names.items()}
    return {"model_type": "mamba2", "layer_norm_epsilon": meta.eps} | found


def _nemotron_h(meta: Metadata) -> dict[str, Any]:
    ssm, kv_heads = meta.ssm("nemotron"), meta.per_layer("attention.head_count_kv")
    ffn = meta.per_layer("feed_forward_length")
    names = {"n_heads": "mamba_num_heads", "d_head": "mamba_head_dim", "n_groups": "n_groups"}
    names |= {"d_state": "ssm_state_size", "d_conv": "conv_kernel"}
    return {
        "model_type": "nemotron_h",
        **meta.attention(),
        **{theirs: ssm[f"nemotron_{ours}"] for ours, theirs in names.items()},
        "layers_block_type": [
            "mlp" if width else "attention" if heads else "mamba" for width, heads in zip(ffn, kv_heads, strict=True)
        ],
        "layer_norm_epsilon": meta.eps,
        "mlp_bias": meta.has("ffn_up.bias"),
        "mlp_hidden_act": "relu2",
        "use_conv_bias": meta.has("ssm_conv1d.bias"),
    }


def _granitehybrid(meta: Metadata) -> dict[str, Any]:
    """Granite 4 where there are multipliers, else Bamba, which llama.cpp takes for the same architecture."""
    kv_heads = meta.per_layer("attention.head_count_kv")
    found = meta.attention() | meta.ssm("mamba") | {"mamba_conv_bias": meta.has("ssm_conv1d.bias")} | _biases(meta)
    if not any(meta.key(f"{name}_scale") in meta.file for name in ("embedding", "residual", "logit")):
        rotation = {"rope_type": "default", "rope_theta": meta.theta}
        rotation["partial_rotary_factor"] = meta.rotating / meta.head_dim
        layers = [i for i, heads in enumerate(kv_heads) if heads]
        return {"model_type": "bamba", "attn_layer_indices": layers, "rope_parameters": rotation} | found
    rotates = meta.file.flag(meta.key("rope.scaling.finetuned"), True)
    return {
        "model_type": "granitemoehybrid",
        **found,
        **_multipliers(meta),
        **(meta.whole_rotation() if rotates else {}),
        "layer_types": ["attention" if heads else "mamba" for heads in kv_heads],
        "num_local_experts": 0,
        "position_embedding_type": "rope" if rotates else "nope",
        "shared_intermediate_size": found["intermediate_size"],
    }


ARCHITECTURES: Mapping[str, Callable[[Metadata], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "granite": _granite,
    "phi3": _phi3,
    "mamba2": _mamba2,
    "nemotron_h": _nemotron_h,
    "granitehybrid": _granitehybrid,
}
"""By GGUF's general.architecture."""
