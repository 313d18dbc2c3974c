"""Generation: a streaming loop for one prompt, and a compiled loop for batches.

Shapes are static: prompts are padded behind their last token, in pieces (lengths.py), and caches have room to spare, so
that each bucket compiles once; the cache is donated from step to step. What a model has read before is not read again
(reading.py).
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from uniql_jax.errors import UserError
from uniql_jax.model.cache import Cache
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import decode
from uniql_jax.runtime.lengths import bucket
from uniql_jax.runtime.prompts import check_prompt, read_prompt, stop_ids, token_array
from uniql_jax.runtime.reading import forget, read
from uniql_jax.runtime.sampling import (
    NOT_FINITE,
    Settings,
    check_cache_bits,
    check_sampling,
    check_seed,
    filtered_logits,
    pick,
    sample,
    settings_of,
)
from uniql_jax.runtime.text import decode_stream, prompt_ids

__all__ = [
    "bucket",
    "chunk",
    "decode_stream",
    "filtered_logits",
    "forget",
    "generate",
    "generate_tokens",
    "prompt_ids",
    "room",
    "sample",
    "stop_ids",
]

# ---------------------------------------------------------------------------------------------- compiled steps


@jax.jit
def _pick(logits: Float[Array, "b vocab"], key: PRNGKeyArray, settings: Settings) -> Int[Array, " b"]:
    return pick(logits, key, 0, settings)


def chunk() -> int:
    """Tokens that one call of a compiled step makes.

    Before each call a GPU's driver records anew what it will launch, which takes the host nearly as long as a step of a
    large model takes the GPU; several steps are recorded once. A CPU has nothing to record, so that each token is shown
    at once.
    """
    return 1 if jax.default_backend() == "cpu" else 8


def room(new: int) -> int:
    """Slots of a cache for `new` tokens: the last call makes a whole chunk, wanted or not."""
    return 1 + -(-(new - 1) // chunk()) * chunk()


# The token is donated as well, so that it stays where it is.
@functools.partial(jax.jit, static_argnames="count", donate_argnames=("token", "cache"))
def _next(
    model: CausalLM,
    token: Int[Array, " b"],
    cache: Cache,
    key: PRNGKeyArray,
    step: Int[Array, ""] | Any,
    settings: Settings,
    count: int,
) -> tuple[Int[Array, "b count"], Int[Array, " b"], Cache]:
    """The next `count` tokens, the first of which has the number `step`; the last of them once more, and the cache."""

    def body(i: Int[Array, ""], state: tuple) -> tuple:
        rows, token, cache = state
        logits, cache = decode(model, token, cache)
        token = pick(logits, key, step + i, settings)
        return rows.at[:, i].set(token), token, cache

    rows = jnp.zeros((token.shape[0], count), jnp.int32)
    if count == 1:
        return body(jnp.int32(0), (rows, token, cache))
    return jax.lax.fori_loop(0, count, body, (rows, token, cache))


@functools.partial(jax.jit, static_argnames="size", donate_argnames="cache")
def _rest(
    model: CausalLM,
    token: Int[Array, " b"],
    cache: Cache,
    key: PRNGKeyArray,
    settings: Settings,
    stops: Int[Array, " s"],
    count: Int[Array, ""] | Any,
    size: int,
) -> tuple[Int[Array, "b size"], Cache]:
    """The whole decode as one while_loop over chunks that ends early once every row has met a stop id.

    Of `size` tokens a row the first `count` are made. A device asks the host whether to go on after each chunk only.
    """
    many = chunk()
    rows = jnp.zeros((token.shape[0], size), jnp.int32).at[:, 0].set(token)

    def stopped(token: Int[Array, "b n"]) -> Any:
        return (token[..., None] == stops).any(-1)

    def go_on(state: tuple) -> Any:
        step, _, _, _, done = state
        return (step < count) & ~done.all()

    def body(state: tuple) -> tuple:
        step, token, cache, rows, done = state
        new, token, cache = _next(model, token, cache, key, step, settings, many)
        rows = jax.lax.dynamic_update_slice(rows, new, (0, step))
        return step + many, token, cache, rows, done | stopped(new).any(-1)

    done = stopped(token[:, None]).any(-1)
    _, _, cache, rows, _ = jax.lax.while_loop(go_on, body, (jnp.int32(1), token, cache, rows, done))
    # A finished row repeats its stop id. The cache is returned so that the donated one has somewhere to go.
    ended = stopped(rows)
    first = jnp.argmax(ended, axis=-1)
    last = jnp.take_along_axis(rows, first[:, None], axis=-1)
    past = ended.any(-1)[:, None] & (jnp.arange(size) > first[:, None])
    return jnp.where(past, last, rows), cache


# ---------------------------------------------------------------------------------------------- public


def generate_tokens(
    model: CausalLM,
    tokens: Int[Array, "b t"] | Int[np.ndarray, "b t"],
    attention_mask: Int[Array, "b t"] | Int[np.ndarray, "b t"] | None = None,
    max_new_tokens: int = 64,
    *,
    temperature: float | int = 0.0,
    top_p: float | int = 1.0,
    top_k: int = 0,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
    cache_bits: int = 16,
) -> Int[np.ndarray, "b new"]:
    """Continue a batch of prompts in one compiled loop.

    Args:
        model: the model, as `load` returns it.
        tokens: integer ids [batch, length], shorter prompts padded on the left.
        attention_mask: [batch, length], 0 on padding and 1 on tokens; None: there is no padding.
        max_new_tokens: tokens to make for each prompt, at least 1.
        temperature: 0 takes the likeliest token, else logits are divided by it and a token is drawn.
        top_p: draw from the fewest tokens whose share reaches this much; 1 is off.
        top_k: draw from so many of the likeliest tokens; 0 is off, more than the vocabulary is all of it.
        seed: from 0 to 2**32 - 1; the same seed draws the same tokens.
        eos_ids: ids that end a row (default: the model's; () never stops).
        cache_bits: 8 holds keys and values as int8 with a scale per head and token; 16 in the model's dtype.

    Returns:
        int32 [batch, max_new_tokens]; a row that meets one of `eos_ids` is filled up with it.

    Raises:
        UserError: settings or prompts that cannot be used, or a model whose logits are not finite.
    """
    check_sampling(temperature, top_p, top_k, max_new_tokens)
    check_cache_bits(cache_bits)
    tokens = token_array(tokens)
    mask = np.ones(tokens.shape, np.int32) if attention_mask is None else np.asarray(attention_mask).astype(np.int32)
    check_prompt(model.config, tokens, mask, max_new_tokens)
    stops = stop_ids(model) if eos_ids is None else tuple(eos_ids)
    if not all(isinstance(i, numbers.Integral) for i in stops):
        raise UserError(f"eos_ids must be integers, not {list(stops)}")
    stops = tuple(int(i) if 0 <= i < model.config.vocab_size else -1 for i in stops)  # -1: never met
    stops = np.asarray(stops + (-1,) * (-len(stops) % 4), np.int32)  # in fours, so that their number rarely compiles
    key = jax.random.key(check_seed(seed))
    settings = settings_of(temperature, top_p, top_k, model.config.vocab_size)
    padding = (mask == 0).sum(axis=1).astype(np.int32)
    start = padding if padding.any() else None
    logits, cache, slots = read(model, tokens.astype(np.int32), start, room(max_new_tokens), cache_bits)
    token, count = _pick(logits, key, settings), np.int32(max_new_tokens)
    rows = np.asarray(_rest(model, token, cache, key, settings, stops, count, size=slots)[0])[:, :max_new_tokens]
    if (rows < 0).any():
        raise UserError(NOT_FINITE)
    return rows


def generate(
    model: CausalLM,
    prompt: str | Sequence[int] | Int[Array, " t"] | Int[np.ndarray, " t"],
    *,
    max_new_tokens: int = 64,
    temperature: float | int = 0.0,
    top_p: float | int = 1.0,
    top_k: int = 0,
    seed: int = 0,
    tokenizer: Any | None = None,
    chat: bool = False,
    cache_bits: int = 16,
) -> Iterator[str] | Iterator[Int[np.ndarray, "1"]]:
    """Stream the continuation of one prompt as it is made, until a stop id or `max_new_tokens`.

    Args:
        model: the model, as `load` returns it.
        prompt: text, or integer token ids [length].
        max_new_tokens: the most tokens to make, at least 1.
        temperature: 0 takes the likeliest token, else logits are divided by it and a token is drawn.
        top_p: draw from the fewest tokens whose share reaches this much; 1 is off.
        top_k: draw from so many of the likeliest tokens; 0 is off, more than the vocabulary is all of it.
        seed: from 0 to 2**32 - 1; the same seed draws the same tokens.
        tokenizer: of transformers (default: for text, the one in the model's folder).
        chat: wrap a text prompt in the chat template as the user's turn.
        cache_bits: 8 holds keys and values as int8 with a scale per head and token; 16 in the model's dtype.

    Returns:
        An iterator of pieces of text, whole characters only, where the prompt is text or a tokenizer is given; else of
        int32 arrays [1], a token each. The stop id is not part of it.

    Raises:
        UserError: at once, on a prompt or settings that cannot be used; on the way, where logits are not finite.
    """
    check_sampling(temperature, top_p, top_k, max_new_tokens)
    check_cache_bits(cache_bits)
    ids, tokenizer = read_prompt(prompt, tokenizer, getattr(model, "folder", None), chat)
    check_prompt(model.config, ids[None], np.ones((1, ids.size), np.int32), max_new_tokens)
    stops = set(stop_ids(model))
    if chat and tokenizer is not None and tokenizer.eos_token_id is not None:
        stops.add(int(tokenizer.eos_token_id))
    settings = settings_of(temperature, top_p, top_k, model.config.vocab_size)
    key, ids = jax.random.key(check_seed(seed)), ids.astype(np.int32)
    new = _stream(model, ids, max_new_tokens, settings, key, stops, cache_bits)
    if tokenizer is None:
        return (np.asarray([token], np.int32) for token in new)
    return decode_stream(tokenizer, new, ids.tolist())


def _stream(
    model: CausalLM,
    ids: Int[np.ndarray, " t"],
    count: int,
    settings: Settings,
    key: PRNGKeyArray,
    stops: set[int],
    bits: int,
) -> Iterator[int]:
    many = chunk()
    logits, cache, _ = read(model, ids[None], None, room(count), bits)
    token = _pick(logits, key, settings)
    shown, left = token[None] + 0, count  # a copy for the host to read, since the next step takes the token itself
    for step in range(1, count + many, many):
        # The next tokens are on their way before the host looks at these, so that the device never waits for it.
        rows = shown
        if step < count:
            shown, token, cache = _next(model, token, cache, key, np.int32(step), settings, many)
        for value in np.asarray(rows)[0, :left].tolist():
            if value < 0:
                raise UserError(NOT_FINITE)
            if value in stops:
                return
            yield value
        left -= rows.shape[1]
