"""Config.json files as their authors published them, and a shrink that keeps every switch and ratio.

The values are the hub's; a test on a shrunk one meets the same options, head ratios and RoPE rules as the real model.
"""

from __future__ import annotations

import copy
from typing import Any

LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}

LLAMA_3_1_70B: dict[str, Any] = LLAMA_3_1_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}

LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}

QWEN2_5_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

QWEN2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

QWEN3_8B: dict[str, Any] = QWEN3_06B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}

SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}

MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32768,
}

SMOLLM3_3B: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
"""It does not say that it is tied: that is its family's default."""

GRANITE_4_1_3B: dict[str, Any] = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.015625,
    "bos_token_id": 100257,
    "embedding_multiplier": 12.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.1,
    "intermediate_size": 8192,
    "logits_scaling": 10.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 100352,
}

PHI_4_MINI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 199999,
    "embd_pdrop": 0.0,
    "eos_token_id": 199999,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "phi3",
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [
            1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
            2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
            6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
            16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23,
            32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
        ],
        "short_factor": [1.0] * 48,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 200064,
}  # fmt: skip

_GRANITE_HYBRID: dict[str, Any] = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "model_type": "granitemoehybrid",
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.01,
    "shared_intermediate_size": 8192,
}

GRANITE_4_0_MICRO: dict[str, Any] = (
    {key: value for key, value in GRANITE_4_1_3B.items() if key != "mlp_bias"}
    | _GRANITE_HYBRID
    | {
        "layer_types": ["attention"] * 40,
        "mamba_d_head": 64,
        "mamba_n_heads": 80,
        "position_embedding_type": "rope",
    }
)
"""The hybrid family's code with attention in every layer."""

GRANITE_4_0_H_MICRO: dict[str, Any] = GRANITE_4_0_MICRO | {
    "hidden_size": 2048,
    "layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(40)],
    "logits_scaling": 8,
    "mamba_n_heads": 64,
    "num_attention_heads": 32,
    "position_embedding_type": "nope",
    "rope_theta": 10000,
}

MAMBA2_8B: dict[str, Any] = {
    "architectures": ["Mamba2ForCausalLM"],
    "bos_token_id": 0,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 0,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.1,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 8,
    "norm_before_gate": False,
    "num_heads": 128,
    "num_hidden_layers": 56,
    "pad_token_id": 0,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 256000,
}
"""nvidia/mamba2-8b-3t-4k has no config.json of its own: this is the port of mamba2-130m with that model's sizes."""

MAMBA2_130M: dict[str, Any] = {
    "bos_token_id": 0,
    "chunk_size": 256,
    "conv_kernel": 4,
    "eos_token_id": 0,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 768,
    "initializer_range": 0.1,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 1,
    "norm_before_gate": False,
    "num_heads": 24,
    "num_hidden_layers": 24,
    "pad_token_id": 0,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "state_size": 128,
    "tie_word_embeddings": True,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 50288,
}
"""The port of state-spaces/mamba2-130m to transformers; it names neither architecture nor dtype."""

BAMBA_9B_V2: dict[str, Any] = {
    "architectures": ["BambaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_layer_indices": [9, 18, 27],
    "attn_rotary_emb": 64,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "mamba_proj_bias": False,
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "model_type": "bamba",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}

NEMOTRON_H_8B: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_head_dim": 128,
    "auto_map": {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
    },
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "initializer_range": 0.02,
    "intermediate_size": 21504,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 128,
    "mamba_proj_bias": False,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 8,
    "num_attention_heads": 32,
    "num_hidden_layers": 52,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rms_norm_eps": 1e-05,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}

NEMOTRON_NANO_9B_V2: dict[str, Any] = {
    key: value for key, value in NEMOTRON_H_8B.items() if key not in ("attention_head_dim", "expand")
} | {
    "eos_token_id": 12,
    "head_dim": 128,
    "hidden_size": 4480,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "intermediate_size": 15680,
    "mamba_head_dim": 80,
    "max_position_embeddings": 131072,
    "num_attention_heads": 40,
    "num_hidden_layers": 56,
}

PUBLISHED_SSM: dict[str, dict[str, Any]] = {
    "mamba2-8b": MAMBA2_8B,
    "mamba2-130m": MAMBA2_130M,
    "bamba-9b-v2": BAMBA_9B_V2,
    "nemotron-h-8b": NEMOTRON_H_8B,
    "nemotron-nano-9b-v2": NEMOTRON_NANO_9B_V2,
    "granite-4.0-h-micro": GRANITE_4_0_H_MICRO,
}
"""Models with Mamba2 layers: `shrink_ssm` makes them small."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.1-70b": LLAMA_3_1_70B,
    "llama-3.2-1b": LLAMA_3_2_1B,
    "qwen2.5-0.5b": QWEN2_5_05B,
    "qwen2.5-7b": QWEN2_5_7B,
    "qwen3-0.6b": QWEN3_06B,
    "qwen3-8b": QWEN3_8B,
    "smollm2-135m": SMOLLM2_135M,
    "mistral-7b-v0.3": MISTRAL_7B,
    "smollm3-3b": SMOLLM3_3B,
    "granite-4.1-3b": GRANITE_4_1_3B,
    "granite-4.0-micro": GRANITE_4_0_MICRO,
    "phi-4-mini": PHI_4_MINI,
}
ALIKE = ("qwen3-8b", "mistral-7b-v0.3", "granite-4.0-micro", "nemotron-nano-9b-v2")
"""Models whose code paths others show as well: the fast tests look at their sizes alone."""

_SMALL_ATTENTION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL_SSM: dict[str, dict[str, Any]] = {
    "mamba2": {
        "chunk_size": 16,
        "head_dim": 16,
        "hidden_size": 64,
        "n_groups": 2,
        "num_heads": 8,
        "num_hidden_layers": 3,
        "state_size": 16,
    },
    "bamba": {
        **_SMALL_ATTENTION,
        "attn_layer_indices": [2],
        "attn_rotary_emb": 8,
        "mamba_chunk_size": 16,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_heads": 8,
        "num_hidden_layers": 4,
    },
    "granitemoehybrid": {
        **_SMALL_ATTENTION,
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "mamba_chunk_size": 16,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_heads": 8,
        "num_hidden_layers": 4,
        "shared_intermediate_size": 96,
    },
    "nemotron_h": {
        **_SMALL_ATTENTION,
        # published files say attention_head_dim (128, as is transformers' default); transformers reads head_dim only
        "attention_head_dim": 16,
        "chunk_size": 16,
        "head_dim": 16,
        "hybrid_override_pattern": "M-M*-",
        "mamba_head_dim": 16,
        "mamba_num_heads": 8,
        "n_groups": 2,
        "num_hidden_layers": 5,
        "ssm_state_size": 16,
    },
}
"""What `shrink_ssm` changes, by model_type."""


def shrink(config: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """The same model, under a million parameters: switches, query heads per key/value head and RoPE rule stay.

    Several key/value heads stay, so that a wrong pairing with the query heads shows. The head size is 16 and the heads
    fill the hidden size, unless the config names a head_dim: that one then differs from hidden / heads, as it may.
    """
    small = copy.deepcopy(config)
    query_groups = config["num_attention_heads"] // config["num_key_value_heads"]
    kv_heads = {1: 4, 2: 2, 3: 3, 4: 2, 5: 2, 7: 2, 8: 2}[query_groups]
    small.update(
        hidden_size=kv_heads * query_groups * 16,
        intermediate_size=160,
        max_position_embeddings=512,
        num_attention_heads=kv_heads * query_groups,
        num_hidden_layers=3,
        num_key_value_heads=kv_heads,
        vocab_size=256,
        bos_token_id=1,
        eos_token_id=2,
        torch_dtype="float32",
    )
    if "head_dim" in config:
        small.update(head_dim=24)
    if "original_max_position_embeddings" in config:
        # Twelve of sixteen dimensions rotate; texts of the tests are short ones, for which the model has factors too.
        factors = {key: [1.0 + i / 5 for i in range(6)] for key in ("short_factor", "long_factor")}
        small.update(rope_scaling={**config["rope_scaling"], **factors}, original_max_position_embeddings=256)
        small.update(pad_token_id=0)
    elif config.get("rope_scaling"):
        # A short original context and a low base, so that all three bands of the llama3 rule are met at length 64.
        small["rope_scaling"] = {**config["rope_scaling"], "original_max_position_embeddings": 64}
        small["rope_theta"] = 5000.0
    if small.get("sliding_window"):
        small.update(sliding_window=512, max_window_layers=3)
    if "no_rope_layers" in small:
        small.update(no_rope_layers=[1, 0, 1], pad_token_id=0)
    if "layer_types" in small:
        small.update(layer_types=small["layer_types"][:3], shared_intermediate_size=160)
        small.update(mamba_d_head=16, mamba_n_heads=small["mamba_expand"] * small["hidden_size"] // 16)
    small.update(overrides)
    return small


def shrink_ssm(config: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """The same model with Mamba2 layers, under a million parameters: every kind of layer, several groups where it has.

    SSM heads of 16 channels fill expand * hidden, the state has 16 dimensions, a chunk 16 tokens (so that 40 tokens are
    two chunks and a half); attention has 4 query and 2 key/value heads of 16.
    """
    small = copy.deepcopy(config)
    small.update(SMALL_SSM[config["model_type"]], vocab_size=256, torch_dtype="float32")
    if config["model_type"] == "mamba2" and config["n_groups"] == 1:
        small.update(hidden_size=96, num_heads=12, n_groups=1)
    if config["model_type"] == "nemotron_h":
        small.update(mamba_head_dim=config["mamba_head_dim"] // 4)
    if config["bos_token_id"] != config["eos_token_id"]:
        small.update(bos_token_id=1, eos_token_id=2)
    small.update(overrides)
    return small


ALL = PUBLISHED | PUBLISHED_SSM


def shrunk(name: str) -> dict[str, Any]:
    """The small form of a published config, by its name in `ALL`."""
    return shrink(PUBLISHED[name]) if name in PUBLISHED else shrink_ssm(PUBLISHED_SSM[name])
