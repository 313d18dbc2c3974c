"""Prompts through an empty cache, whose slots are not read, through a used one, and in parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny
from tests.pallas_cases import relative
from uniql_jax.model.decoding import decode, init_cache, prefill
from uniql_jax.model.layers.context import full_context


def test_a_prompt_sees_the_same_in_an_empty_and_in_a_used_cache(rng: np.random.Generator) -> None:
    """An empty cache is known to be empty, so its slots are not read; two parts of a prompt see each other."""
    model = tiny.model(rng)
    tokens = jnp.asarray(rng.integers(0, tiny.VOCAB, (2, 13)), jnp.int32)
    mask = jnp.asarray([[0] * 4 + [1] * 9, [1] * 13])
    cache = init_cache(model, 2, 20)
    assert cache.empty
    read = jax.jit(prefill)
    logits, after = read(model, tokens, mask, cache)
    assert not after.empty
    through_slots, _ = read(model, tokens, mask, cache.replace(empty=False))
    first, between = read(model, tokens[:, :6], mask[:, :6], cache)
    in_parts, after_parts = read(model, tokens[:, 6:], mask[:, 6:], between)
    for other in (through_slots, in_parts):
        assert relative(other, np.asarray(logits).astype(np.float64)) < 1e-5
    assert relative(first, np.asarray(logits).astype(np.float64)) > 1e-2
    next_token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    step = jax.jit(decode)
    assert relative(step(model, next_token, after_parts)[0], np.asarray(step(model, next_token, after)[0])) < 1e-5
    square = f"f32[2,{model.config.kv_heads},2,13,20]"
    assert square not in str(jax.make_jaxpr(prefill)(model, tokens, mask, cache)), "the cache's slots are scored"
    assert square in str(jax.make_jaxpr(prefill)(model, tokens, mask, cache.replace(empty=False)))


def test_padding_is_known_when_code_is_traced() -> None:
    """A mask may hold padding; where there is none, nothing is compiled for it."""
    valid = jnp.ones((2, 3), bool)
    jax.jit(full_context)(valid)
    assert full_context(valid, padded=False).visible.valid is None  # type: ignore[union-attr]
    assert full_context(valid).visible.valid is valid  # type: ignore[union-attr]
