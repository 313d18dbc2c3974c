"""Keys that config.json lacks or holds in a wrong form: read as transformers reads them, or refused in one line."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests import published, reference
from uniql_jax.config import ConfigError, from_hf
from uniql_jax.config.defaults import DEFAULTS

NAMES = {
    "llama": "llama-3.2-1b",
    "qwen2": "qwen2.5-0.5b",
    "qwen3": "qwen3-0.6b",
    "mistral": "mistral-7b-v0.3",
    "smollm3": "smollm3-3b",
    "granite": "granite-4.1-3b",
    "phi3": "phi-4-mini",
    "granitemoehybrid": "granite-4.0-h-micro",
    "mamba2": "mamba2-8b",
    "bamba": "bamba-9b-v2",
    "nemotron_h": "nemotron-h-8b",
}
CHANGED: dict[str, dict[str, Any]] = {
    "llama": dict(
        rms_norm_eps=1e-3, attention_bias=True, mlp_bias=True, rope_theta=700.0, rope_scaling=None, bos_token_id=3
    ),
    "qwen2": dict(rms_norm_eps=1e-3, rope_theta=700.0, bos_token_id=3, eos_token_id=[4, 5]),
    "qwen3": dict(rms_norm_eps=1e-3, rope_theta=700.0, bos_token_id=3, eos_token_id=[4, 5], attention_bias=True),
    "mistral": dict(rms_norm_eps=1e-3, rope_theta=700.0, bos_token_id=3, eos_token_id=[4, 5]),
    "smollm3": dict(
        rms_norm_eps=1e-3, attention_bias=True, mlp_bias=True, rope_theta=700.0, no_rope_layers=[0, 1, 1],
        no_rope_layer_interval=2, tie_word_embeddings=False,
    ),
    "phi3": dict(rms_norm_eps=1e-3, rope_theta=700.0, bos_token_id=3, eos_token_id=[4, 5], sliding_window=600),
    "granite": dict(
        rms_norm_eps=1e-3, attention_bias=True, mlp_bias=True, rope_theta=700.0, tie_word_embeddings=True,
        embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=4.0,
    ),
    "granitemoehybrid": dict(
        rms_norm_eps=1e-3, attention_bias=True, rope_theta=700.0, mamba_d_conv=3, mamba_chunk_size=8,
        mamba_n_groups=2, mamba_proj_bias=True, mamba_d_state=8, time_step_limit=[0.05, 0.2],
        position_embedding_type="rope", embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2,
        logits_scaling=4.0,
    ),
    "mamba2": dict(
        layer_norm_epsilon=1e-3, conv_kernel=3, chunk_size=8, use_bias=True, time_step_limit=[0.05, 0.2], n_groups=2
    ),
    "bamba": dict(
        rms_norm_eps=1e-3, attention_bias=True, mlp_bias=True, rope_theta=700.0, mamba_d_conv=3, mamba_chunk_size=8,
        mamba_n_groups=2, mamba_proj_bias=True, mamba_d_state=8, time_step_limit=[0.05, 0.2],
        partial_rotary_factor=0.25,
    ),
    "nemotron_h": dict(
        layer_norm_epsilon=1e-3, conv_kernel=3, chunk_size=8, use_bias=True, mlp_bias=True, time_step_min=0.05,
        n_groups=4,
    ),
}  # fmt: skip
"""Values that are no family's default, so that a missing key shows."""
SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_heads",
    "mamba_n_heads",
    "mamba_num_heads",
}
"""Keys whose defaults are the sizes of a real model: their reading is compared, the model is not built."""
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
CASES = [(family, key) for family in NAMES for key in DEFAULTS[family]]


def small(family: str) -> dict[str, Any]:
    return published.shrunk(NAMES[family]) | CHANGED[family]


def theirs(hf: dict[str, Any], folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(hf))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def reading(hf: dict[str, Any]) -> Any:
    """Our description of a config, or what we say against it."""
    try:
        return from_hf(hf)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("family", NAMES)
def test_the_table_holds_the_defaults_of_transformers(family):
    """The fields of the config class itself, before anything follows from another key."""
    fields = CONFIG_MAPPING[family].__dataclass_fields__
    assert set(CHANGED[family]) - set(ROPE) <= set(DEFAULTS[family])
    for key, value in DEFAULTS[family].items():
        if key in fields:
            assert fields[key].default == value, key


@pytest.mark.parametrize(("family", "key"), CASES)
def test_an_absent_key_means_what_it_means_to_transformers(tmp_path, family, key):
    without = {name: value for name, value in small(family).items() if name != key}
    if key in ("dtype", "torch_dtype") or (family, key) == ("mamba2", "max_position_embeddings"):
        assert reading(without) == reading(without | {key: None} if key.endswith("dtype") else without)
        return
    try:
        config = theirs(without, tmp_path)
    except (StrictDataclassClassValidationError, IndexError):  # SSM heads that do not fill the default size, or alike
        assert isinstance(reading(without), str)
        return
    if not hasattr(config, key):  # keys of other tools, and qwen2's head_dim: what transformers does without them
        assert key in ("head_dim", "layers_block_type", "layer_types")
        return
    value = getattr(config, key)
    if family == "bamba" and key in ("layers_block_type", "layer_types"):
        assert [kinds[0] == "attention" for kinds in from_hf(without).pattern] == [k == "full_attention" for k in value]
        return
    assert reading(without) == reading(without | {key: list(value) if isinstance(value, tuple) else value})


@pytest.mark.parametrize("family", NAMES)
def test_the_forward_pass_without_optional_keys_is_that_of_transformers(tmp_path, rng, family):
    """All keys at once that leave the model small; each one matters, as its value was another."""
    hf = small(family)
    removable = (set(CHANGED[family]) | set(ROPE)) & set(hf)
    kept = {key: value for key, value in hf.items() if key not in removable}
    model = reference.build(kept, int(rng.integers(2**31)))
    reference.save(model, tmp_path / "m", kept)
    assert from_hf(kept) != from_hf(hf)
    reference.check_same_logits(tmp_path / "m", rng)


WRONG = [None, True, "text", "1e9", [], [1], [[1]], {"a": 1}, 1.5, 0, -1, 10**12, 1e12, math.nan, math.inf, "nan"]


@pytest.mark.parametrize("family", NAMES)
def test_wrong_values_are_refused_by_name_or_read_as_transformers_does(tmp_path, family):
    base = small(family)
    served = 0
    for key in DEFAULTS[family]:
        for value in WRONG:
            hf = base | {key: value}
            ours = reading(hf)
            if isinstance(ours, str):
                assert "\n" not in ours
                assert len(ours) < 250
                continue
            served += 1
            if key in ("dtype", "torch_dtype", "layers_block_type", "layer_types"):
                assert not value
                continue
            if isinstance(DEFAULTS[family][key], float) and isinstance(value, int):
                hf |= {key: float(value)}  # JSON makes no difference between them, transformers does
            config = theirs(hf, tmp_path)  # raises where transformers does not take the value
            read = getattr(config, key, value)
            assert ours == reading(hf | {key: list(read) if isinstance(read, tuple) else read}), (key, value)
    assert served


@pytest.mark.parametrize(
    ("family", "key"), [case for case in CASES if "layer" not in case[1] and "dtype" not in case[1]]
)
def test_a_refusal_names_the_key(family, key):
    for value in ({"a": 1}, [["x"]], "no such thing", math.nan):
        with pytest.raises(ConfigError, match=key):
            from_hf(small(family) | {key: value})
