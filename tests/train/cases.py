"""Tiny models of every family with random LoRA factors, for the tests of recovery."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny
from tools.initialize import complete, initialize
from uniql_jax import config as model_config
from uniql_jax.convert import tables
from uniql_jax.model.causal_lm import CausalLM, logits
from uniql_jax.plan import make_plan
from uniql_jax.train import lora
from uniql_jax.train.loop import Trainer

VOCAB = 64
SSM = {"num_hidden_layers": 2, "tie_word_embeddings": True, "hidden_size": 32, "vocab_size": VOCAB}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": tiny.HF | {"vocab_size": VOCAB},
    "qwen2": tiny.HF | {"vocab_size": VOCAB, "model_type": "qwen2"},
    "qwen3": tiny.HF | {"vocab_size": VOCAB, "model_type": "qwen3", "head_dim": 16},
    "mamba2": SSM
    | {"model_type": "mamba2", "num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "bamba": SSM
    | {"model_type": "bamba", "attn_layer_indices": [1], "intermediate_size": 64, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
    | {"mamba_chunk_size": 8, "mamba_expand": 2, "rms_norm_eps": 1e-5},
    "nemotron_h": SSM
    | {"model_type": "nemotron_h", "hybrid_override_pattern": "M-*", "num_hidden_layers": 3, "n_groups": 2}
    | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "chunk_size": 8, "intermediate_size": 64}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False},
}
MORE: dict[str, dict[str, Any]] = {
    "smollm3": tiny.HF | {"vocab_size": VOCAB, "model_type": "smollm3", "no_rope_layers": [1, 0], "pad_token_id": None},
    "granite": tiny.HF
    | {"vocab_size": VOCAB, "model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
    | {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "phi3": tiny.HF | {"vocab_size": VOCAB, "model_type": "phi3", "partial_rotary_factor": 0.5},
}
"""Families whose training differs in how checkpoints are read alone."""
FAMILIES = [name for name in CONFIGS if name in tables.TABLES and name in model_config.FAMILIES]


def model(family: str, rng: np.random.Generator, **changes: Any) -> CausalLM:
    """A random model with a plan; every leaf is spread, so that no term is invisible."""
    config = model_config.from_hf(CONFIGS[family] | changes)
    params = complete(config, initialize(config, int(rng.integers(1 << 31))))
    layers = [
        {
            kind: {name: value if name == "inv_freq" else _spread(value, rng) for name, value in block.items()}
            for kind, block in layer.items()
        }
        for layer in params["layers"]
    ]
    top = {name: _spread(value, rng) for name, value in params.items() if name != "layers"}
    return CausalLM(config, top | {"layers": layers}, make_plan(config, None))


def _spread(value: Any, rng: np.random.Generator) -> jax.Array:
    value = np.asarray(value)
    noise = rng.standard_normal(value.shape).astype(np.float32)
    matrix = value.ndim > 1 and value.std() > 0  # norms are ones, biases zeros
    return jnp.asarray(noise * 1.5 / max(value.shape[-1], 4) ** 0.5 if matrix else value + 0.2 * noise)


def trainer_logits(
    trainer: Trainer, factors: lora.Factors | None, tokens: np.ndarray, valid: np.ndarray, keep: Any
) -> jax.Array:
    """Logits of what a trainer trains at masked sizes, without dropout."""

    @jax.jit
    def run(factors: Any, frozen: Any, tokens: jax.Array, valid: jax.Array, keep: Any) -> jax.Array:
        frozen = trainer.with_tables(factors, frozen)
        model = CausalLM(trainer.config, {**frozen["top"], "layers": []}, dtype=trainer.dtype)
        return logits(model, trainer.hidden(factors, frozen, tokens, valid, keep))

    return run(factors, trainer.frozen, jnp.asarray(tokens), jnp.asarray(valid), keep)


def factors(config: model_config.ModelConfig, rng: np.random.Generator, rank: int = 4) -> lora.Factors:
    """Factors neither of which is zero, large enough to be felt; at rank 0 changes."""
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.3, jnp.float32), lora.init_factors(config, rank, 0)
    )


def tokens(rng: np.random.Generator, count: int = 2, length: int = 20) -> np.ndarray:
    """Random ids."""
    return rng.integers(0, VOCAB, (count, length)).astype(np.int32)
