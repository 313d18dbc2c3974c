"""Whole models in bfloat16: our rounding errors against those of the real `transformers` in bfloat16.

Both are measured from float32 transformers on the same bfloat16 weights, on fresh random models and tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import uniql_jax
from tests import published, reference
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import decode, init_cache, prefill

FAMILIES = ["llama-3.1-8b", "qwen2.5-0.5b", "qwen3-0.6b", "mamba2-8b", "bamba-9b-v2", "nemotron-h-8b"]
FAMILIES += ["granite-4.0-h-micro"]
SLOW = ["smollm3-3b", "granite-4.1-3b", "phi-4-mini", *published.ALIKE]
MOST = 1.5
"""Largest error over that of transformers: the same number of roundings in another order stays well below."""
STREAMS = (1.0, 10.0)
"""Factors on the embedding. Trained streams outgrow what single blocks add: 10 shows a rounding after each block."""
LENGTH, PROMPT = 48, 42

_forward = jax.jit(lambda model, tokens: model(tokens))
_prefill, _decode = jax.jit(prefill), jax.jit(decode)


def _models(name: str, stream: float, seed: int, folder: Path) -> tuple[CausalLM, Any, Any]:
    """Ours in bfloat16, transformers in bfloat16 and in float32; `stream` multiplies the embedding."""
    config = published.shrunk(name) | {"torch_dtype": "bfloat16"}
    model = reference.build(config, seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(stream)
    reference.save(model.to(torch.bfloat16), folder, config)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    return uniql_jax.load_source(str(folder), jnp.bfloat16), theirs, reference.load(folder)


def _decoded(model: CausalLM, tokens: np.ndarray) -> np.ndarray:
    """Logits of the tokens behind the prompt, each by one step of decoding."""
    _, cache = _prefill(model, jnp.asarray(tokens[:, :PROMPT]), None, init_cache(model, *tokens.shape))
    found = []
    for place in range(PROMPT, tokens.shape[1]):
        scores, cache = _decode(model, jnp.asarray(tokens[:, place]), cache)
        found.append(np.asarray(scores))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_errors_are_no_larger_than_those_of_transformers(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    for stream in STREAMS:
        model, half, full = _models(name, stream, int(rng.integers(2**31)), tmp_path / str(stream))
        tokens = rng.integers(3, 256, (4, LENGTH)).astype(np.int32)
        truth, rounded = reference.logits(full, tokens), reference.logits(half, tokens)
        late = slice(PROMPT, None)
        for places, ours in ((slice(None), np.asarray(_forward(model, tokens))), (late, _decoded(model, tokens))):
            theirs = reference.relative_error(rounded[:, places], truth[:, places])
            assert 1e-3 < theirs < 0.1, "no bfloat16 model of ordinary size"
            assert reference.relative_error(ours, truth[:, places]) < MOST * theirs, (stream, places)


@pytest.mark.parametrize("wide", [False, True])
def test_mamba2_keeps_its_stream_as_the_config_says(wide: bool, rng: np.random.Generator, tmp_path: Path) -> None:
    """residual_in_fp32 is heeded both ways: the error of a stream that is far larger than its updates shows which."""
    config = published.shrunk("mamba2-8b") | {"torch_dtype": "bfloat16", "residual_in_fp32": wide}
    model = reference.build(config, int(rng.integers(2**31)))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(100.0)
    folder = reference.save(model.to(torch.bfloat16), tmp_path / "m", config)
    full, ours = reference.load(folder), uniql_jax.load_source(str(folder), jnp.bfloat16)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    tokens = rng.integers(3, 256, (4, 32)).astype(np.int32)
    truth = reference.logits(full, tokens)
    error = reference.relative_error(np.asarray(_forward(ours, tokens)), truth)
    assert 2 / 3 < error / reference.relative_error(reference.logits(half, tokens), truth) < MOST
