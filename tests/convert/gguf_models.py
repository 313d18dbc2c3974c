"""GGUF files of every family as llama.cpp's own converter lays them out, written from Hugging Face tensors by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "embeddings.weight": "token_embd.weight",
    "norm_f.weight": "output_norm.weight",
    "final_layernorm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_ff_layernorm": "ffn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "gate_up_proj": "ffn_up",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "output_linear": "ffn_down",
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "out_proj": "ssm_out",
    "A_log": "ssm_a",
    "dt_bias": "ssm_dt.bias",
}
ARCHITECTURES = {"mistral": "llama", "granitemoehybrid": "granitehybrid", "bamba": "granitehybrid"}
PERMUTED = ("llama", "smollm3", "granite", "granitehybrid")
"""Architectures whose files have the two dimensions that turn together as neighbours."""


def converted(hf: dict[str, Any], name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """One tensor under llama.cpp's name, in llama.cpp's form."""
    layer = re.search(r"layers\.(\d+)\.(.*)", name)
    rest = layer[2] if layer else name.rsplit("model.", 1)[-1].removeprefix("backbone.")
    at, last = f"blk.{layer[1]}." if layer else "", rest.rsplit(".", 1)[0].rsplit(".", 1)[-1]
    if rest == "norm.weight":
        return {f"{at}attn_norm.weight" if layer else "output_norm.weight": value}
    if rest.endswith("norm.weight") and last == "norm":  # the gated one
        return {f"{at}ssm_norm.weight": value.reshape(hf.get("n_groups") or hf["mamba_n_groups"], -1)}
    if rest.endswith(".A_log"):
        return {f"{at}ssm_a": -np.exp(value)[:, None]}
    if rest.endswith(".D"):
        return {f"{at}ssm_d": value[:, None]}
    if rest.endswith(".dt_bias"):
        return {f"{at}ssm_dt.bias": value}
    if last == "input_linear":
        gate, up = np.split(value, 2)
        return {f"{at}ffn_gate.weight": gate, f"{at}ffn_up.weight": up}
    if last == "conv1d" and value.ndim == 3:
        value = value[:, 0]
    family = ARCHITECTURES.get(hf["model_type"], hf["model_type"])
    if last in ("q_proj", "k_proj") and family in PERMUTED:
        value = _neighbours(hf, value, hf["num_attention_heads" if last == "q_proj" else "num_key_value_heads"])
    if rest in NAMES:
        return {NAMES[rest]: value}
    return {f"{at}{NAMES[last]}.{rest.rsplit('.', 1)[1]}": value}


def _neighbours(hf: dict[str, Any], value: np.ndarray, heads: int) -> np.ndarray:
    """The rotating dimensions of every head with j and j + d / 2 next to each other; the others behind them."""
    if hf.get("position_embedding_type") == "nope":
        return value
    head_dim = len(value) // heads
    half = (hf["attn_rotary_emb"] if hf["model_type"] == "bamba" else head_dim) // 2
    order = [j + side * half for j in range(half) for side in (0, 1)] + list(range(2 * half, head_dim))
    return value.reshape(heads, head_dim, *value.shape[1:])[:, order].reshape(value.shape)


def write(path: Path, hf: dict[str, Any], tensors: dict[str, np.ndarray], pieces: list[str]) -> Path:
    """The file, with a byte-level vocabulary of these pieces, the first of which ends a text."""
    import gguf

    family = hf["model_type"]
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(family, family))
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf.get("max_position_embeddings", 2**20))
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_vocab_size(hf["vocab_size"])
    eps = hf["layer_norm_epsilon" if family in ("mamba2", "nemotron_h") else "rms_norm_eps"]
    writer.add_layer_norm_rms_eps(eps)
    writer.add_layer_norm_eps(eps)
    _add_layers(writer, hf)
    if "num_attention_heads" in hf and family != "nemotron_h":
        _add_rotation(writer, hf)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3] + [1] * (len(pieces) - 1))
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_eos_token_id(0)
    for name, value in tensors.items():
        for theirs, tensor in converted(hf, name, value).items():
            writer.add_tensor(theirs, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _kinds(hf: dict[str, Any]) -> list[str]:
    """The block of every layer that is not an MLP's, or the MLP where it stands alone."""
    layers = hf["num_hidden_layers"]
    if hf["model_type"] == "nemotron_h":
        return [{"M": "mamba", "*": "attention", "-": "mlp"}[letter] for letter in hf["hybrid_override_pattern"]]
    if hf["model_type"] == "bamba":
        return ["attention" if i in hf["attn_layer_indices"] else "mamba" for i in range(layers)]
    if hf["model_type"] == "granitemoehybrid":
        return hf["layer_types"]
    return ["mamba" if hf["model_type"] == "mamba2" else "attention"] * layers


def _add_layers(writer: Any, hf: dict[str, Any]) -> None:
    kinds, width = _kinds(hf), hf.get("shared_intermediate_size", hf.get("intermediate_size", 0))
    alone = hf["model_type"] == "nemotron_h"
    writer.add_feed_forward_length([width * (kind == "mlp") for kind in kinds] if alone else width)
    writer.add_head_count(hf.get("num_attention_heads", 0))
    kv_heads = hf.get("num_key_value_heads", 0)
    hybrid = "mamba" in kinds and kv_heads
    writer.add_head_count_kv([kv_heads * (kind == "attention") for kind in kinds] if hybrid else kv_heads)
    if "num_attention_heads" in hf:
        head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if "mamba" in kinds:
        heads = hf.get("num_heads") or hf.get("mamba_num_heads") or hf["mamba_n_heads"]
        size = hf["head_dim"] if hf["model_type"] == "mamba2" else hf.get("mamba_head_dim") or hf["mamba_d_head"]
        writer.add_ssm_conv_kernel(hf.get("conv_kernel") or hf["mamba_d_conv"])
        writer.add_ssm_inner_size(heads * size)
        writer.add_ssm_state_size(hf.get("state_size") or hf.get("ssm_state_size") or hf["mamba_d_state"])
        writer.add_ssm_time_step_rank(heads)
        writer.add_ssm_group_count(hf.get("n_groups") or hf["mamba_n_groups"])


def _add_rotation(writer: Any, hf: dict[str, Any]) -> None:
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    writer.add_rope_freq_base(hf["rope_theta"])
    part = hf.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(hf["attn_rotary_emb"] if hf["model_type"] == "bamba" else int(head_dim * part))
    if hf["model_type"].startswith("granite"):
        writer.add_attention_scale(hf["attention_multiplier"])
        writer.add_embedding_scale(hf["embedding_multiplier"])
        writer.add_residual_scale(hf["residual_multiplier"])
        writer.add_logit_scale(hf["logits_scaling"])
    if hf.get("position_embedding_type"):
        writer.add_rope_scaling_finetuned(hf["position_embedding_type"] == "rope")
    if hf["model_type"] == "phi3":
        scaling, original = hf["rope_scaling"], hf["original_max_position_embeddings"]
        factor = hf["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(factor) / np.log(original))))
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(scaling[f"{kind}_factor"], np.float32))
