"""Prompts of any length: buckets, pieces, padding that nobody reads, what is reused, and what is compiled."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import published, tiny
from uniql_jax import config as model_config
from uniql_jax.errors import UserError
from uniql_jax.evaluation.random_model import random_model
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import decode
from uniql_jax.runtime import generation, lengths, reading

OFTEN = ("llama-3.1-8b", "bamba-9b-v2")
FAMILIES = [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
    for name in (*OFTEN, "qwen2.5-0.5b", "mamba2-8b", "nemotron-nano-9b-v2")
]


LAYERS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": dict(num_hidden_layers=2),
    "bamba-9b-v2": dict(num_hidden_layers=2, attn_layer_indices=[1]),
}
"""What is smaller still."""


@functools.cache
def the_model(family: str) -> CausalLM:
    """A small model at a prune rate, whose layers differ in their kept sizes."""
    return random_model(model_config.from_hf(published.shrunk(family) | LAYERS.get(family, {})), 8, 0.25, seed=3)


@functools.cache
def _forward() -> Any:
    return jax.jit(lambda model, tokens: model(tokens))


@functools.cache
def _donating() -> Any:
    return jax.jit(decode, donate_argnums=2)


def whole(model: CausalLM, text: np.ndarray) -> np.ndarray:
    """The specification: logits after every token, by one pass over the text without a cache, padding or pieces."""
    padded = np.pad(text, (0, 96 - len(text)))  # of one length, so that one program serves all
    return np.asarray(_forward()(model, padded[None])[0, : len(text)], np.float64)


def distance(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def prompt_of(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(3, 256, length).astype(np.int32)


def small_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setitem(lengths.PIECE, jax.default_backend(), size)


# ------------------------------------------------------------------------------------------------ buckets


def test_padding_costs_little() -> None:
    for length in range(1, 20_000):
        padded = lengths.bucket(length)
        assert padded >= length
        assert padded - length <= max(0.12 * length, 7 if length > 9 else 15)
        assert lengths.bucket(padded) == padded
    assert all(lengths.bucket(2**i) == 2**i for i in range(4, 18))
    assert len({lengths.bucket(n) for n in range(1025, 2049)}) == 9


def test_pieces_cover_a_prompt() -> None:
    for length in (1, 2048, 2049, 5000, 131_072):
        found = lengths.pieces(length)
        assert [at for at, _, _ in found] == [0, *(end for _, end, _ in found[:-1])]
        assert found[-1][1] == length
        assert all(end - at <= padded <= lengths.piece() for at, end, padded in found)
        assert lengths.read_slots(length) >= length


def test_caches_are_few_and_not_much_too_large() -> None:
    wanted = [*range(1, 4098), *range(4098, 131_073, 31)]
    sizes = [lengths.slots_for(n) for n in wanted]
    pairs = list(zip(wanted, sizes, strict=True))
    assert all(size >= n for n, size in pairs)
    assert all(size <= 1.5 * n for n, size in pairs if n >= lengths.SMALLEST_CACHE and n < lengths.WHOLE)
    assert sizes == sorted(sizes)
    assert all(size - n < lengths.WHOLE for n, size in pairs)
    assert len(set(sizes)) < 28


# ------------------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_and_padding_change_nothing(
    family: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of three pieces, rows of several lengths among them one that begins behind the first piece."""
    small_pieces(monkeypatch, 16)
    model = the_model(family)
    texts = [prompt_of(rng, n) for n in (44, 37, 11)]
    tokens, start = np.zeros((3, 42), np.int32), np.asarray([0, 7, 33], np.int32)
    for row, text, first in zip(tokens, texts, start, strict=True):
        row[first:] = text[: 42 - first]
        row[:first] = 5  # padding is no token, whatever it holds
    truth = [whole(model, text) for text in texts]
    logits, cache, _ = reading.read(model, tokens, start, 2)
    step = _donating()
    for i in range(3):
        for row, text, first, want in zip(np.asarray(logits), texts, start, truth, strict=True):
            if 41 - first + i < len(text):
                assert distance(row, want[41 - first + i]) < 2e-5
        if i < 2:
            following = [text[min(42 - first + i, len(text) - 1)] for text, first in zip(texts, start, strict=True)]
            logits, cache = step(model, jnp.asarray(following, jnp.int32), cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_read_is_not_read_again(
    family: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = the_model(family)
    generation.forget(model)
    read: list[int] = []

    def counted(step: Any, model: Any, tokens: Any, count: Any, *rest: Any, **more: Any) -> Any:
        read.append(int(count))
        return step(model, tokens, count, *rest, **more)

    for name in ("_first", "_more"):
        monkeypatch.setattr(reading, name, functools.partial(counted, getattr(reading, name)))
    text = prompt_of(rng, 90)
    other = np.concatenate([text[:50], prompt_of(rng, 40)])
    has_states = model.config.ssm is not None
    for prompt, new in ((text[:60], 60), (text, 30), (text, 0), (other, 90 if has_states else 40)):
        logits, cache, _ = reading.read(model, prompt[None], None, 3)
        assert distance(np.asarray(logits)[0], whole(model, prompt)[-1]) < 2e-5
        assert sum(read) == new
        read.clear()
        # what the next step does to its cache is nothing to those that are held
        next_ones = prompt_of(rng, 2)
        for token in next_ones:
            logits, cache = _donating()(model, token[None], cache)
        assert distance(np.asarray(logits)[0], whole(model, np.concatenate([prompt, next_ones]))[-1]) < 2e-5
    generation.forget(model)


def test_new_weights_forget_what_was_read(rng: np.random.Generator) -> None:
    model, prompt = tiny.model(rng, eos_token_id=None), prompt_of(rng, 40)
    before = uniql_jax.generate_tokens(model, prompt[None], max_new_tokens=4)
    model.params["embed"] = model.params["embed"][::-1]
    after = uniql_jax.generate_tokens(model, prompt[None], max_new_tokens=4)
    assert (after != before).any()
    np.testing.assert_array_equal(
        after, uniql_jax.generate_tokens(CausalLM(model.config, dict(model.params)), prompt[None], max_new_tokens=4)
    )


def test_no_more_is_held_than_the_limit(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(rng, eos_token_id=None)
    sizes = []
    for _ in range(3):
        _, cache, _ = reading.read(model, prompt_of(rng, 20)[None], None, 1)
        sizes.append(cache.nbytes)
    found = reading.prefixes(model)
    assert len(found._entries) == 3
    monkeypatch.setattr(reading, "LIMIT", 2 * sizes[0])
    reading.read(model, prompt_of(rng, 20)[None], None, 1)
    assert len(found._entries) == 2
    monkeypatch.setattr(reading, "LIMIT", sizes[0] - 1)
    generation.forget(model)
    reading.read(model, prompt_of(rng, 20)[None], None, 1)
    assert not reading.prefixes(model)._entries


# ------------------------------------------------------------------------------------------------ 8 bits


def test_a_cache_of_8_bits(rng: np.random.Generator) -> None:
    model, prompt = the_model("llama-3.1-8b"), prompt_of(rng, 40)
    want = whole(model, prompt)
    logits, cache, slots = reading.read(model, prompt[None, :38], None, 2, bits=8)
    _, wide, _ = reading.read(model, prompt[None, :38], None, 2)
    assert cache.nbytes < 0.4 * wide.nbytes  # of float32
    assert slots == 256
    for i, token in enumerate(prompt[38:], 38):
        assert 1e-6 < distance(np.asarray(logits)[0], want[i - 1]) < 0.03
        logits, cache = _donating()(model, token[None], cache)
    state, keep = cache.layers[0]["attention"], model.keep[0]
    fewer = dict(keep) | {"qk": keep["qk"] - 1, "vo": keep["vo"] - 1}
    cut = state.resized(keep, fewer, 2)
    np.testing.assert_array_equal(cut.k, state.k[..., :-2])
    np.testing.assert_array_equal(cut.v, state.v[..., :-1])
    np.testing.assert_array_equal(cut.k_scale, state.k_scale)


def test_cache_bits_that_there_are_not(rng: np.random.Generator) -> None:
    model = the_model("llama-3.1-8b")
    for bits in (4, 0, True):
        with pytest.raises(UserError, match="cache_bits must be 8 or 16"):
            uniql_jax.generate(model, prompt_of(rng, 3), cache_bits=bits)


# ------------------------------------------------------------------------------------------------ compiling


def test_a_new_length_or_number_of_tokens_compiles_nothing(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch, 32)
    model = tiny.model(rng, eos_token_id=None)
    steps = reading._first, reading._more, reading._copied, generation._pick, generation._next, generation._rest

    def go(length: int, new: int) -> None:
        list(uniql_jax.generate(model, prompt_of(rng, length), max_new_tokens=new))
        uniql_jax.generate_tokens(model, prompt_of(rng, length)[None], max_new_tokens=new)

    go(72, 5)
    go(97, 20)
    before = [step._cache_size() for step in steps]
    for length, new in ((70, 1), (65, 33), (100, 50), (71, 4), (103, 90)):
        go(length, new)
    assert [step._cache_size() for step in steps] == before


# ------------------------------------------------------------------------------------------------ long texts


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 8])
def test_long_contexts(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """32,768 tokens, beyond the length that Llama 3.1's rotation was trained on: sampled places against one pass."""
    small_pieces(monkeypatch, 2048)
    hf = published.shrunk("llama-3.1-8b") | dict(max_position_embeddings=131_072, num_hidden_layers=2)
    hf["rope_scaling"] = published.LLAMA_3_1_8B["rope_scaling"]
    config = model_config.from_hf(hf)
    assert config.rope is not None
    assert config.rope.scaling == "llama3"
    model = random_model(config, 8, 0.0, seed=1)
    text = prompt_of(rng, 32_768 + 8)
    hidden = jax.jit(lambda model, tokens: model(tokens)[0, jnp.asarray(PLACES)])
    want = np.asarray(hidden(model, text[None]), np.float64)
    step = jax.jit(decode)
    for place, row in zip(PLACES, want, strict=True):
        generation.forget(model)
        logits, cache, _ = reading.read(model, text[None, : place - 2], None, 8, bits)
        for token in text[place - 2 : place + 1]:
            logits, cache = step(model, token[None], cache)
        assert distance(np.asarray(logits)[0], row) < (1e-4 if bits == 16 else 0.05)


PLACES = (1000, 8191, 8200, 20_000, 32_770)
