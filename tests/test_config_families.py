"""Options of single families: those that are served compute what transformers computes, the others are refused in a
line that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import published, reference
from uniql_jax.config import ConfigError, ModelConfig, from_hf

SLIDING = ["full_attention", "sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope"} | {key: [1.5, 1.0, 2.0, 3.0, 0.9, 1.1] for key in ("short_factor", "long_factor")}
SERVED: list[tuple[str, dict[str, Any]]] = [
    ("qwen3-0.6b", {"rope_scaling": dict(YARN), "max_position_embeddings": 128}),
    ("qwen3-0.6b", {"attention_bias": True, "tie_word_embeddings": False}),
    ("qwen3-0.6b", {"num_key_value_heads": 1, "head_dim": 10}),
    ("qwen3-0.6b", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}),
    ("mistral-7b-v0.3", {"sliding_window": 512}),
    ("mistral-7b-v0.3", {"head_dim": 24, "tie_word_embeddings": True, "hidden_act": "swish"}),
    ("smollm3-3b", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("smollm3-3b", {"no_rope_layers": [0, 0, 0], "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("smollm3-3b", {"no_rope_layers": [1, 1, 1, 0], "rope_scaling": dict(YARN), "max_position_embeddings": 128}),
    ("smollm3-3b", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("phi-4-mini", {"rope_scaling": None}),
    ("phi-4-mini", {"rope_scaling": None, "partial_rotary_factor": 1.0, "tie_word_embeddings": False}),
    ("phi-4-mini", {"rope_scaling": LONGROPE | {"attention_factor": 0.7}, "sliding_window": 256}),
    ("phi-4-mini", {"rope_scaling": LONGROPE | {"type": "yarn", "factor": 3.0}}),
    ("bamba-9b-v2", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}),
    ("granite-4.1-3b", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("granite-4.1-3b", {"embedding_multiplier": 1, "residual_multiplier": 1.5, "rms_norm_eps": 0.1}),
    ("granite-4.0-micro", {"position_embedding_type": None, "attention_bias": True}),
    ("granite-4.0-micro", {"rope_scaling": dict(YARN), "max_position_embeddings": 128}),
    ("granite-4.0-h-micro", {"position_embedding_type": "rope", "tie_word_embeddings": False}),
    ("granite-4.0-h-micro", {"layer_types": ["attention", "mamba"] * 2, "mamba_proj_bias": True, "rms_norm_eps": 0.1}),
    ("granite-4.0-h-micro", {"mamba_d_head": "auto", "mamba_n_groups": 4}),
]  # fmt: skip
OFTEN = (0, 6, 12, 16, 20)
"""One of each family in the fast tests."""


@pytest.mark.parametrize(
    ("name", "changes"),
    [pytest.param(*case, marks=[] if i in OFTEN else pytest.mark.slow) for i, case in enumerate(SERVED)],
)
def test_what_is_served_is_what_transformers_computes(
    name: str, changes: dict[str, Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    hf = published.shrunk(name) | changes
    reference.save(reference.build(hf, int(rng.integers(2**31))), tmp_path / "m", hf)
    reference.check_same_logits(tmp_path / "m", rng)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(("qwen3-0.6b", {"head_dim": bad}, "head_dim") for bad in (None, 0, "16", 2.0)),
    ("qwen3-0.6b", {"head_dim": 15}, "dimensions of a head"),
    ("qwen3-0.6b", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "use_sliding_window"),
    ("qwen3-0.6b", {"layer_types": SLIDING}, "sliding_attention"),
    ("qwen3-0.6b", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("qwen3-0.6b", {"attention_bias": None}, "attention_bias"),
    ("qwen3-0.6b", {"hidden_act": "gelu"}, "hidden_act"),
    ("qwen3-0.6b", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("qwen3-0.6b", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("qwen3-0.6b", {"is_causal": False}, "is_causal"),
    ("mistral-7b-v0.3", {"sliding_window": 511}, "set max_position_embeddings to 511"),
    ("mistral-7b-v0.3", {"sliding_window": 0}, "sliding_window"),
    ("mistral-7b-v0.3", {"sliding_window": "4096"}, "sliding_window"),
    ("mistral-7b-v0.3", {"layer_types": SLIDING}, "sliding_attention"),
    ("mistral-7b-v0.3", {"num_key_value_heads": None}, "num_key_value_heads"),
    ("mistral-7b-v0.3", {"hidden_act": "gelu_new"}, "hidden_act"),
    *(("smollm3-3b", {"no_rope_layers": bad}, "no_rope_layers") for bad in ([1, 0], [1, 2, 0], "101", [1, 0, None], 1)),
    ("smollm3-3b", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ("smollm3-3b", {"rope_scaling": dict(YARN)}, "no_rope_layers"),
    ("smollm3-3b", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
    ("smollm3-3b", {"layer_types": SLIDING}, "sliding_attention"),
    ("smollm3-3b", {"hidden_act": "relu"}, "hidden_act"),
    *(("phi-4-mini", {"rope_scaling": {"type": kind, "factor": 2.0}}, kind) for kind in ("linear", "llama3", "ntk")),
    *(
        ("phi-4-mini", {"rope_scaling": LONGROPE | {key: bad}}, key)
        for key in ("short_factor", "long_factor")
        for bad in (None, [1.0] * 5, [1.0] * 5 + [0.0], 1.0, ["1"] * 6)
    ),
    ("phi-4-mini", {"rope_scaling": LONGROPE | {"factor": -1.0}}, "factor"),
    ("phi-4-mini", {"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
    ("phi-4-mini", {"partial_rotary_factor": None}, "partial_rotary_factor"),
    ("phi-4-mini", {"sliding_window": 255}, "set max_position_embeddings to 255"),
    ("llama-2-7b", {"rope_scaling": {"type": "longrope"} | LONGROPE}, "longrope"),
    *(
        (name, {key: bad}, key)
        for name in ("granite-4.1-3b", "granite-4.0-h-micro")
        for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        for bad in (0, -1.0, None, "1")
    ),
    ("granite-4.1-3b", {"residual_multiplier": 1e-30}, "multipliers"),
    ("granite-4.1-3b", {"embedding_multiplier": 1e38, "residual_multiplier": 0.01}, "multipliers"),
    ("granite-4.1-3b", {"hidden_act": "gelu"}, "hidden_act"),
    *(("granite-4.0-h-micro", {"num_local_experts": bad}, "num_local_experts") for bad in (8, None, -1)),
    ("granite-4.0-h-micro", {"position_embedding_type": "alibi"}, "position_embedding_type"),
    ("granite-4.0-h-micro", {"layer_types": ["mamba"] * 3}, "layer_types"),
    ("granite-4.0-h-micro", {"layer_types": ["mamba", "moe", "attention", "mamba"]}, "moe"),
    ("granite-4.0-h-micro", {"layers_block_type": ["attention"] * 4}, "different layers"),
    ("granite-4.0-h-micro", {"mamba_n_heads": 7}, "mamba_expand"),
    ("granite-4.0-h-micro", {"mamba_n_groups": 3}, "groups"),
    ("nemotron-nano-9b-v2", {"hybrid_override_pattern": "MEM*-"}, "mixture of experts"),
    ("nemotron-nano-9b-v2", {"sliding_window": 64}, "sliding_window"),
    ("nemotron-nano-9b-v2", {"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "match"), REFUSED)
def test_what_is_not_served_is_refused_in_one_line(name: str, changes: dict[str, Any], match: str) -> None:
    from_hf(published.shrunk(name))
    with pytest.raises(ConfigError, match=match) as error:
        from_hf(published.shrunk(name) | changes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("kind", ["qwen3_moe", "granitemoe", "ministral", "phi", "gemma3_text", "falcon_h1", "QWEN3"])
def test_relatives_that_are_not_served_are_named(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"'{kind}' is not supported; we have bamba, granite"):
        from_hf(published.shrunk("qwen3-0.6b") | {"model_type": kind})


def test_a_stream_in_units_of_the_residual_multiplier() -> None:
    """What the four multipliers become: nothing within the layers."""

    def read(**changes: float) -> ModelConfig:
        return from_hf(published.shrunk("granite-4.0-h-micro") | changes)

    config = read(embedding_multiplier=6.0, residual_multiplier=0.5, logits_scaling=4, attention_multiplier=0.25)
    assert (config.embed_scale, config.logit_scale, config.softmax_scale) == (12.0, 0.25, 0.25)
    assert config.norm_eps == pytest.approx(4 * config.gate_norm_eps)
    assert config.gate_norm_eps == 1e-5


def test_texts_end_where_longrope_changes_its_frequencies() -> None:
    """Beyond it transformers computes the whole text with the long factors, which no cache could follow."""
    config = from_hf(published.ALL["phi-4-mini"])
    old = published.PHI_4_MINI["rope_scaling"] | {"type": "su"}  # the name in older files
    assert from_hf(published.PHI_4_MINI | {"rope_scaling": old}) == config
    assert config.rope is not None
    assert config.max_position == 4096
    assert config.rope.attention_factor == pytest.approx(1.1902380714238083)
    assert from_hf(published.shrunk("phi-4-mini") | {"rope_scaling": None}).max_position == 512
