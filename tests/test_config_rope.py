"""Rope settings in every spelling: the frequencies of transformers' own model, or one line that refuses them."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.models.bamba.modeling_bamba import BambaRotaryEmbedding
from transformers.models.granite.modeling_granite import GraniteRotaryEmbedding
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RotaryEmbedding

from tests import published, reference
from uniql_jax.config import ConfigError, from_hf

MODELS = {
    "llama": ("llama-2-7b", LlamaRotaryEmbedding),
    "qwen2": ("qwen2.5-0.5b", Qwen2RotaryEmbedding),
    "qwen3": ("qwen3-0.6b", Qwen3RotaryEmbedding),
    "mistral": ("mistral-7b-v0.3", MistralRotaryEmbedding),
    "smollm3": ("smollm3-3b", SmolLM3RotaryEmbedding),
    "granite": ("granite-4.1-3b", GraniteRotaryEmbedding),
    "granitemoehybrid": ("granite-4.0-micro", GraniteMoeHybridRotaryEmbedding),
    "bamba": ("bamba-9b-v2", BambaRotaryEmbedding),
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 700.0},
    "whole theta": {"rope_theta": 700},
    "parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 900.0}},
    "theta inside wins": {"rope_theta": 700.0, "rope_parameters": PLAIN},
    "theta outside serves parameters": {"rope_theta": 700.0, "rope_parameters": {"rope_type": "default"}},
    "empty dictionaries": {"rope_scaling": {}, "rope_parameters": {}, "rope_theta": 700.0},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": PLAIN},
    "null scaling": {"rope_scaling": None, "rope_parameters": PLAIN},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear below one": {"rope_scaling": {"type": "linear", "factor": 0.5}},
    "whole factor": {"rope_scaling": {"rope_type": "linear", "factor": 4}},
    "linear wins over default": {"rope_parameters": PLAIN, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "default wins over linear": {
        "rope_scaling": {"type": "default"},
        "rope_parameters": {"type": "linear", "factor": 4.0},
    },
    "both, theta outside": {"rope_parameters": PLAIN, "rope_scaling": dict(LLAMA3), "rope_theta": 800.0},
    "llama3 over default": {"rope_parameters": PLAIN, "rope_scaling": LLAMA3 | {"rope_theta": 5000.0}},
    "yarn over default": {"rope_parameters": PLAIN, "rope_scaling": YARN | {"attention_factor": 1.0}},
    "type and rope_type": {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}},
    "factor of default": {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5000.0}},
    "llama3 whole numbers": {"rope_scaling": LLAMA3 | {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
    "llama3 without original": {
        "max_position_embeddings": 96,
        "rope_scaling": {key: value for key, value in LLAMA3.items() if not key.startswith("original")},
    },
    "original outside wins": {"original_max_position_embeddings": 32, "rope_scaling": dict(LLAMA3)},
    "partial outside": {"partial_rotary_factor": 0.25},
    "partial inside": {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.75}},
}
WHOLE: dict[str, dict[str, Any]] = {
    "yarn": {"rope_scaling": dict(YARN), "rope_theta": 5000.0},
    "yarn in parameters": {"rope_parameters": YARN | {"rope_theta": 1e6}},
    "yarn betas": {"rope_scaling": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}, "rope_theta": 5e3},
    "yarn factor": {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "yarn mscale": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}},
    "yarn ratio": {"rope_scaling": YARN | {"factor": None}},
    "yarn without original": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
}
"""Settings that scale attention."""
CASES = [(family, name) for family in MODELS for name in SETTINGS] + [
    (family, name) for family in ("llama", "qwen3", "granite", "bamba") for name in WHOLE
]
PARTS = ("partial outside", "partial inside")


def config_of(family: str, name: str) -> dict[str, Any]:
    hf = published.shrunk(MODELS[family][0])
    for key in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        hf.pop(key, None)
    return hf | (SETTINGS | WHOLE)[name]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_frequencies_are_those_of_transformers(tmp_path, family, name):
    hf = config_of(family, name)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MODELS[family][1](AutoConfig.from_pretrained(tmp_path, local_files_only=True))
    config = from_hf(hf)
    assert config.rope is not None
    np.testing.assert_allclose(config.rope.inv_freq(), theirs.inv_freq.numpy(), rtol=2e-6)
    assert config.rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    scale = hf.get("attention_multiplier", config.head_dim**-0.5)
    assert config.softmax_scale == pytest.approx(scale * theirs.attention_scaling**2, rel=1e-12)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "llama3 over default"),
        ("qwen2", "linear wins over default"),
        ("bamba", "partial inside"),
        ("bamba", "partial outside"),
        ("llama", "partial outside"),
        ("llama", "yarn betas"),
        ("qwen3", "yarn in parameters"),
        ("smollm3", "nothing"),
        ("granite", "yarn factor"),
        ("bamba", "yarn factor"),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, rng, family, name):
    hf = config_of(family, name)
    model = reference.build(hf, int(rng.integers(2**31)))
    reference.check_same_logits(reference.save(model, tmp_path / "m", hf), rng)


def scaled(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {key: value for key, value in (base | changes).items() if value is not ...}}


ORIGINAL = "original_max_position_embeddings"
BAD_NUMBERS = [0, 0.0, -1.0, math.nan, math.inf, -math.inf, True, "4", [4.0], {}]
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"rope_theta": bad}, "rope_theta") for bad in [*BAD_NUMBERS, None, 1e300]),
    *(({"rope_parameters": {"rope_type": "default", "rope_theta": bad}}, "rope_") for bad in [*BAD_NUMBERS, None]),
    *((scaled({"type": "linear"}, factor=bad), "factor|rope_scaling") for bad in [*BAD_NUMBERS, None, ...]),
    *((scaled(LLAMA3, factor=bad), "factor|rope_scaling") for bad in [*BAD_NUMBERS, None, ...]),
    *((scaled(LLAMA3, low_freq_factor=bad), "low_freq|rope_sc") for bad in [*BAD_NUMBERS, None, ..., 4.0, 5.0]),
    *((scaled(LLAMA3, high_freq_factor=bad), "_freq|rope_sc") for bad in [*BAD_NUMBERS, None, ..., 1.0, 0.5]),
    *((scaled(LLAMA3, **{ORIGINAL: bad}), "original|rope_sc") for bad in [*BAD_NUMBERS, None, 6.5]),
    *((scaled(YARN, factor=bad), "factor|rope_scaling") for bad in [*BAD_NUMBERS, ...]),
    *((scaled(YARN, beta_fast=bad), "beta_fast|rope_scaling") for bad in (-1.0, math.nan, "4", [1])),
    *((scaled(YARN, mscale=bad), "mscale|rope_scaling") for bad in (-1.0, math.nan, "4", [1])),
    (scaled(YARN, beta_fast=1.0, beta_slow=32.0), "beta_fast"),
    (scaled(YARN, truncate=3), "truncate"),
    (scaled(YARN, rope_theta=1.0), "rope_theta"),
    *(({key: bad}, key) for key in ("rope_scaling", "rope_parameters") for bad in ([], [1], "linear", 4, True)),
    *(
        ({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, "not supported")
        for kind in ("dynamic", "longrope", "su", "mrope", "proportional", "", None, 3, ["linear"])
    ),
    ({"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}}, "differs by layer"),
    (scaled({"type": "linear"}, factor=2.0, partial_rotary_factor=0.5), "partial_rotary_factor"),
    *(({"rope_parameters": PLAIN | {"partial_rotary_factor": bad}}, "partial_rotary|rope_") for bad in BAD_NUMBERS),
    # each number fits float32, but not what comes of it
    *(({"rope_theta": theta}, "beyond float32") for theta in (1e-45, 1e-320)),
    *((scaled(base, factor=1e-320), "beyond float32") for base in ({"type": "linear"}, LLAMA3, YARN)),
    (scaled(YARN, attention_factor=1e38), "beyond float32"),
    (scaled({"type": "linear"}, factor=1e-39), "beyond float32"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "match"), REFUSED)
def test_settings_that_no_model_has_are_refused_in_one_line(changes, match):
    with pytest.raises(ConfigError, match=match) as error:
        from_hf(config_of("llama", "nothing") | changes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("part", [0.01, 1.5, 0.2])
def test_a_rotating_part_is_an_even_number_of_dimensions(part):
    with pytest.raises(ConfigError, match="dimensions of a head"):
        from_hf(config_of("bamba", "nothing") | {"rope_parameters": PLAIN | {"partial_rotary_factor": part}})
