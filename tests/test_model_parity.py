"""Our forward, prefill and decode against the real `transformers`, on tiny models of all published configs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import published, reference
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import decode, init_cache, prefill

EVERY = sorted(published.ALL)
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in published.ALIKE else name for name in EVERY]
# mamba2-130m differs from the others in what one forward pass shows: a single group, a tied head.
PADDED = ["llama-3.1-8b", "mamba2-8b", "bamba-9b-v2"]
PADDED += [pytest.param(name, marks=pytest.mark.slow) for name in EVERY if name not in PADDED]
ONCE = ("mamba2-130m", *published.ALIKE)
DECODED = [pytest.param(name, marks=pytest.mark.slow) if name in ONCE else name for name in EVERY]
TOLERANCE = 2e-5
PAD = 0

Folder = Callable[[str], Path]


@functools.cache
def _ours(folder: Path) -> CausalLM:
    return uniql_jax.load_source(str(folder))


@functools.cache
def _theirs(folder: Path) -> Any:
    return reference.load(folder)


@functools.cache
def _jitted() -> tuple[Any, Any, Any]:
    return jax.jit(lambda model, tokens, mask: model(tokens, mask)), jax.jit(prefill), jax.jit(decode)


def _logits(model: CausalLM, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    out = _jitted()[0](model, jnp.asarray(tokens, jnp.int32), None if mask is None else jnp.asarray(mask, jnp.int32))
    assert out.dtype == jnp.float32
    return np.asarray(out)


def _greedy(model: CausalLM, tokens: np.ndarray, count: int, mask: np.ndarray | None = None) -> np.ndarray:
    """Greedy tokens [batch, count] by prefill and one decode a token."""
    _, first, step = _jitted()
    batch, length = tokens.shape
    cache = init_cache(model, batch, length + count)
    attention_mask = None if mask is None else jnp.asarray(mask, jnp.int32)
    scores, cache = first(model, jnp.asarray(tokens, jnp.int32), attention_mask, cache)
    found = [jnp.argmax(scores, axis=-1).astype(jnp.int32)]
    while len(found) < count:
        scores, cache = step(model, found[-1], cache)
        found.append(jnp.argmax(scores, axis=-1).astype(jnp.int32))
    return np.stack([np.asarray(token) for token in found], axis=1)


def _tokens(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    return rng.integers(3, 256, (batch, length)).astype(np.int32)


def _pad(rows: list[np.ndarray], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unequal length as [batch, longest] tokens and mask."""
    longest = max(len(row) for row in rows)
    tokens = np.full((len(rows), longest), PAD, np.int32)
    mask = np.zeros((len(rows), longest), np.int32)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, 1
    return tokens, mask


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, hf_folder: Folder, rng: np.random.Generator) -> None:
    tokens = _tokens(rng, 2, 96)
    theirs = reference.logits(_theirs(hf_folder(name)), tokens)
    assert reference.relative_error(_logits(_ours(hf_folder(name)), tokens), theirs) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_both_styles_of_config_are_one_model(
    name: str, hf_folder: Folder, rng: np.random.Generator, tmp_path: Path
) -> None:
    """config.json as on the hub (rope_theta, rope_scaling) and as transformers 5 writes it (rope_parameters)."""
    hub = hf_folder(name)
    resaved = reference.save(_theirs(hub), tmp_path / "v5")
    config = json.loads((resaved / "config.json").read_text())
    assert ("rope_parameters" in config) == (config["model_type"] not in ("mamba2", "nemotron_h"))
    assert "rope_scaling" not in config
    assert "hybrid_override_pattern" not in config
    tokens = _tokens(rng, 1, 48)
    np.testing.assert_array_equal(_logits(_ours(resaved), tokens), _logits(_ours(hub), tokens))


@pytest.mark.parametrize("name", DECODED)
def test_greedy_tokens(name: str, hf_folder: Folder, rng: np.random.Generator) -> None:
    """64 tokens through the cache, one sequence."""
    prompt = _tokens(rng, 1, 9)
    theirs = reference.greedy(_theirs(hf_folder(name)), prompt, 64)
    np.testing.assert_array_equal(_greedy(_ours(hf_folder(name)), prompt, 64), theirs)


@pytest.mark.parametrize("name", PADDED)
def test_greedy_tokens_of_a_padded_batch(name: str, hf_folder: Folder, rng: np.random.Generator) -> None:
    """64 tokens for three prompts of unequal length, padded on the left; also equal to each prompt alone."""
    ours = _ours(hf_folder(name))
    rows = [_tokens(rng, 1, length)[0] for length in (13, 4, 9)]
    tokens, mask = _pad(rows, left=True)
    found = _greedy(ours, tokens, 64, mask)
    np.testing.assert_array_equal(found, reference.greedy(_theirs(hf_folder(name)), tokens, 64, mask))
    np.testing.assert_array_equal(found[1:2], _greedy(ours, rows[1][None], 64))


@pytest.mark.parametrize(
    "left", [pytest.param(False, id="right", marks=pytest.mark.slow), pytest.param(True, id="left")]
)
@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name: str, left: bool, hf_folder: Folder, rng: np.random.Generator) -> None:
    """Logits at real tokens are those of the row alone, ours and transformers'; padding's content does not matter."""
    ours = _ours(hf_folder(name))
    rows = [_tokens(rng, 1, length)[0] for length in (24, 7, 15)]
    tokens, mask = _pad(rows, left)
    real = mask.astype(bool)
    padded = _logits(ours, tokens, mask)
    assert np.isfinite(padded).all()
    theirs = reference.logits(_theirs(hf_folder(name)), tokens, mask)
    assert reference.relative_error(padded[real], theirs[real]) < TOLERANCE
    assert reference.relative_error(padded[1][real[1]], _logits(ours, rows[1][None])[0]) < TOLERANCE
    other = np.where(real, tokens, 200).astype(np.int32)
    np.testing.assert_array_equal(_logits(ours, other, mask)[real], padded[real])


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 2.5}])
def test_linear_rope_scaling(scaling: dict[str, Any], rng: np.random.Generator, tmp_path: Path, seed: int) -> None:
    """Also under the older key `type`."""
    config = published.shrink(published.LLAMA_2_7B, rope_scaling=scaling)
    model = reference.build(config, seed)
    folder = reference.save(model, tmp_path / "hub", config)
    tokens = _tokens(rng, 1, 80)
    error = reference.relative_error(_logits(_ours(folder), tokens), reference.logits(model, tokens))
    assert error < TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
def test_attention_and_mlp_biases(tied: bool, rng: np.random.Generator, tmp_path: Path, seed: int) -> None:
    """The llama family's optional biases, of v and o too, with tied and untied heads."""
    config = published.shrink(
        published.LLAMA_3_1_8B, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied, head_dim=20
    )
    model = reference.build(config, seed)
    folder = reference.save(model, tmp_path / "hub", config)
    tokens = _tokens(rng, 2, 40)
    error = reference.relative_error(_logits(_ours(folder), tokens), reference.logits(model, tokens))
    assert error < TOLERANCE


def test_a_sharded_checkpoint_is_the_same_model(hf_folder: Folder, rng: np.random.Generator, tmp_path: Path) -> None:
    hub = hf_folder("smollm2-135m")
    sharded = reference.save(_theirs(hub), tmp_path / "sharded", max_shard="300KB")
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    tokens = _tokens(rng, 1, 20)
    np.testing.assert_array_equal(_logits(_ours(sharded), tokens), _logits(_ours(hub), tokens))


def test_logits_are_causal(hf_folder: Folder, rng: np.random.Generator) -> None:
    """A later token never reaches an earlier position."""
    ours = _ours(hf_folder("qwen2.5-0.5b"))
    tokens = _tokens(rng, 1, 32)
    changed = tokens.copy()
    changed[0, 20:] = (changed[0, 20:] + 1) % 256
    a, b = _logits(ours, tokens), _logits(ours, changed)
    np.testing.assert_array_equal(a[:, :20], b[:, :20])
    assert np.abs(a[:, 20:] - b[:, 20:]).max() > 1e-3
