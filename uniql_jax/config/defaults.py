"""What a key that config.json does not have means, for every family.

These are the defaults of transformers' own config classes, as a table of ours: a checkpoint then reads the same
whichever transformers is installed, and reading a config imports none of it. A test holds the two equal.
"""

from __future__ import annotations

import math
from typing import Any

UNBOUNDED = 2**20
"""Longest text of a model whose config sets no limit, as a state-space model's has none."""

_ANY: dict[str, Any] = {"dtype": None, "torch_dtype": None, "tie_word_embeddings": False}
_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        **_ANY,
        **_TRANSFORMER,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "qwen2": {
        **_ANY,
        **_TRANSFORMER,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    "mamba2": {
        **_ANY,
        "vocab_size": 32768,
        "hidden_size": 4096,
        "num_hidden_layers": 64,
        "num_heads": 128,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 8,
        "expand": 2,
        "conv_kernel": 4,
        "chunk_size": 256,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": True,
        "time_step_limit": (0.0, math.inf),
        "bos_token_id": 0,
        "eos_token_id": 2,
        "max_position_embeddings": UNBOUNDED,
    },
    "bamba": {
        **_ANY,
        **_TRANSFORMER,
        "vocab_size": 128000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
        "attn_layer_indices": None,
        "layers_block_type": None,
        "layer_types": None,
        "mamba_n_heads": 128,
        "mamba_d_head": "auto",
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_limit": (0.0, math.inf),
    },
    "nemotron_h": {
        **_ANY,
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "layers_block_type": None,
        "sliding_window": None,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "mamba_hidden_act": "silu",
        "n_groups": 8,
        "conv_kernel": 4,
        "chunk_size": 128,
        "time_step_min": 0.001,
        "use_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
    },
}
"""By model_type. Null stands for what follows from other keys."""
