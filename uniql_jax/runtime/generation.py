"""Generation: sampling, a streaming loop for one prompt, and a compiled loop for batches.

Shapes are static: prompts are padded on the left to a power of two and the cache has room for every new token, so
each bucket compiles once; the cache is donated from step to step.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from uniql_jax.errors import UserError
from uniql_jax.model.cache import Cache
from uniql_jax.model.causal_lm import CausalLM, decode, init_cache, prefill
from uniql_jax.tokenizer import load_tokenizer

SHORTEST_BUCKET = 16
CONTEXT = 8  # prompt tokens decoded before the first new one, for tokenizers whose spaces depend on what precedes

# ---------------------------------------------------------------------------------------------- sampling


def filtered_logits(
    logits: Float[Array, "b vocab"],
    temperature: Float[Array, ""] | float | int,
    top_p: Float[Array, ""] | float | int = 1.0,
    top_k: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "b vocab"], Int[Array, "b vocab"]]:
    """Logits over temperature in falling order, -inf where filtered out, and the token each belongs to.

    top_k > 0 keeps the k likeliest; then top_p < 1 keeps the smallest set whose share of what is left reaches top_p.
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where((top_k <= 0) | (rank < top_k), ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    # the likeliest always stays; at 1 nothing may go, although a rounded sum can reach 1 early
    ranked = jnp.where((before < top_p) | (rank == 0) | (top_p >= 1), ranked, -jnp.inf)
    return ranked, order


def sample(
    logits: Float[Array, "b vocab"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float | int,
    top_p: Float[Array, ""] | float | int = 1.0,
    top_k: Int[Array, ""] | int = 0,
) -> Int[Array, " b"]:
    """One token per row: the likeliest at temperature 0, else drawn from `filtered_logits`. Settings may be traced."""

    def draw() -> Int[Array, " b"]:
        ranked, order = filtered_logits(logits, jnp.maximum(temperature, 1e-6), top_p, top_k)
        pick = jax.random.categorical(key, ranked, axis=-1)
        return jnp.take_along_axis(order, pick[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(jnp.asarray(temperature) > 0, draw, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


def _check_sampling(temperature: float | int, top_p: float | int, top_k: int, max_new_tokens: int) -> None:
    if not temperature >= 0 or not np.isfinite(temperature):
        raise UserError(f"temperature must be 0 or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")
    if top_k < 0:
        raise UserError(f"top_k must be 0 (off) or more, not {top_k}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")


# ---------------------------------------------------------------------------------------------- compiled steps

# Temperature, top_p, top_k: traced, so that changing them compiles nothing. None takes the likeliest token: known when
# code is traced, or every step would make a device ask the host which branch to run.
Settings = tuple[Any, Any, Any] | None


def _pick(
    logits: Float[Array, "b vocab"], key: PRNGKeyArray, step: Int[Array, ""] | int, settings: Settings
) -> Int[Array, " b"]:
    if settings is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return sample(logits, jax.random.fold_in(key, step), *settings)


@functools.partial(jax.jit, static_argnames="slots")
def _first(
    model: CausalLM,
    tokens: Int[Array, "b t"],
    mask: Int[Array, "b t"],
    key: PRNGKeyArray,
    settings: Settings,
    slots: int,
) -> tuple[Int[Array, " b"], Cache]:
    logits, cache = prefill(model, tokens, mask, init_cache(model, tokens.shape[0], slots))
    return _pick(logits, key, 0, settings), cache


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
        token = _pick(logits, key, step + i, settings)
        return rows.at[:, i].set(token), token, cache

    rows = jnp.zeros((token.shape[0], count), jnp.int32)
    if count == 1:
        return body(jnp.int32(0), (rows, token, cache))
    return jax.lax.fori_loop(0, count, body, (rows, token, cache))


@functools.partial(jax.jit, static_argnames="count", donate_argnames="cache")
def _rest(
    model: CausalLM,
    token: Int[Array, " b"],
    cache: Cache,
    key: PRNGKeyArray,
    settings: Settings,
    stops: Int[Array, " s"],
    count: int,
) -> tuple[Int[Array, "b count"], Cache]:
    """The whole decode as one while_loop over chunks that ends early once every row has met a stop id.

    A device asks the host whether to go on after each chunk only.
    """
    many = chunk()
    if count == 1:
        return token[:, None], cache
    rows = jnp.zeros((token.shape[0], room(count)), jnp.int32).at[:, 0].set(token)

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
    past = ended.any(-1)[:, None] & (jnp.arange(rows.shape[1]) > first[:, None])
    return jnp.where(past, last, rows)[:, :count], cache


def bucket(length: int) -> int:
    """Padded length of a prompt: the next power of two, at least 16."""
    return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def _padded(
    tokens: Int[np.ndarray, "b t"], mask: Int[np.ndarray, "b t"]
) -> tuple[Int[np.ndarray, "b p"], Int[np.ndarray, "b p"]]:
    extra = ((0, 0), (bucket(tokens.shape[1]) - tokens.shape[1], 0))
    return np.pad(tokens, extra), np.pad(mask, extra)


# ---------------------------------------------------------------------------------------------- public


def stop_ids(model: CausalLM) -> tuple[int, ...]:
    """Ids that end a text: the config's, and those of generation_config.json in the model's folder."""
    ids = set(model.config.eos_ids)
    folder = getattr(model, "folder", None)
    path = Path(folder) / "generation_config.json" if folder else None
    if path and path.exists():
        try:
            more = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError):
            raise UserError(f"{path} is not a JSON object") from None
        ids.update(more if isinstance(more, list) else [] if more is None else [more])
    return tuple(sorted(int(i) for i in ids))


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
) -> Int[np.ndarray, "b new"]:
    """Continue a batch of prompts, padded on the left where `attention_mask` is 0, in one compiled loop.

    Returns int32 [batch, max_new_tokens]; a row that meets one of `eos_ids` (default: the model's; () never stops)
    is filled up with it. Greedy at temperature 0. Raises UserError on settings or prompts that cannot be used.
    """
    _check_sampling(temperature, top_p, top_k, max_new_tokens)
    tokens = np.asarray(tokens)
    mask = np.ones(tokens.shape, np.int32) if attention_mask is None else np.asarray(attention_mask).astype(np.int32)
    _check_prompt(model, tokens, mask, max_new_tokens)
    stops = tuple(stop_ids(model) if eos_ids is None else eos_ids)
    stops = np.asarray(stops + (-1,) * (-len(stops) % 4), np.int32)  # in fours, so that their number rarely compiles
    length = bucket(tokens.shape[1]) + room(max_new_tokens)
    key, settings = jax.random.key(seed), _settings(temperature, top_p, top_k)
    token, cache = _first(model, *_padded(tokens.astype(np.int32), mask), key, settings, length)
    rows, _ = _rest(model, token, cache, key, settings, stops, max_new_tokens)
    return np.asarray(rows)


def generate(
    model: CausalLM,
    prompt: str | Int[Array, " t"] | Int[np.ndarray, " t"],
    *,
    max_new_tokens: int = 64,
    temperature: float | int = 0.0,
    top_p: float | int = 1.0,
    top_k: int = 0,
    seed: int = 0,
    tokenizer: Any | None = None,
    chat: bool = False,
) -> Iterator[str] | Iterator[Int[np.ndarray, "1"]]:
    """Stream the continuation of one prompt as it is made, until a stop id or `max_new_tokens`.

    A text prompt yields pieces of text, whole characters only; `chat` wraps it in the chat template as the user's
    turn. The tokenizer is the one in the model's folder unless one is given. A prompt of token ids [length] yields
    text where a tokenizer is given, else int32 arrays of one token. Greedy at temperature 0.
    Raises UserError, at once, on a prompt or settings that cannot be used.
    """
    _check_sampling(temperature, top_p, top_k, max_new_tokens)
    if isinstance(prompt, str):
        tokenizer = tokenizer or _folder_tokenizer(getattr(model, "folder", None))
        if tokenizer is None:
            raise UserError("this checkpoint has no tokenizer; give token ids instead of text")
        ids = prompt_ids(tokenizer, prompt, chat)
    elif chat:
        raise UserError("a chat prompt must be text")
    else:
        ids = np.asarray(prompt)
    _check_prompt(model, ids[None], np.ones((1, ids.size), np.int32), max_new_tokens)
    stops = set(stop_ids(model))
    if chat and tokenizer is not None and tokenizer.eos_token_id is not None:
        stops.add(int(tokenizer.eos_token_id))
    settings = _settings(temperature, top_p, top_k)
    new = _stream(model, ids.astype(np.int32), max_new_tokens, settings, jax.random.key(seed), stops)
    if tokenizer is None:
        return (np.asarray([token], np.int32) for token in new)
    return decode_stream(tokenizer, new, ids.tolist())


def _stream(
    model: CausalLM, ids: Int[np.ndarray, " t"], count: int, settings: Settings, key: PRNGKeyArray, stops: set[int]
) -> Iterator[int]:
    mask, many = np.ones((1, ids.size), np.int32), chunk()
    token, cache = _first(model, *_padded(ids[None], mask), key, settings, bucket(ids.size) + room(count))
    shown, left = token[None] + 0, count  # a copy for the host to read, since the next step takes the token itself
    for step in range(1, count + many, many):
        # The next tokens are on their way before the host looks at these, so that the device never waits for it.
        rows = shown
        if step < count:
            shown, token, cache = _next(model, token, cache, key, np.int32(step), settings, many)
        for value in np.asarray(rows)[0, :left].tolist():
            if value in stops:
                return
            yield value
        left -= rows.shape[1]


def prompt_ids(tokenizer: Any, prompt: str, chat: bool = False) -> Int[np.ndarray, " t"]:
    """Token ids of a prompt, int32 [length]; `chat` applies the chat template with the prompt as the user's turn."""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("this checkpoint has no chat template; leave chat off")
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    # a chat template writes its own special tokens
    ids = tokenizer(prompt, add_special_tokens=not chat, return_attention_mask=False, verbose=False)["input_ids"]
    return np.asarray(ids, np.int32)


def decode_stream(tokenizer: Any, tokens: Iterator[int], context: Sequence[int] = ()) -> Iterator[str]:
    """Text of tokens as they arrive; a character whose bytes span tokens waits until it is whole.

    `context` holds the ids before the first one. Bytes that never make a character are dropped at the end.
    """

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    ids = list(context)[-CONTEXT:]
    start, known = 0, text(ids)
    for token in tokens:
        ids.append(token)
        whole = text(ids[start:])
        if len(whole) > len(known) and not whole.endswith("\ufffd"):
            yield whole[len(known) :]
            # keep this piece as the context of the next, forget what is before it
            start = max(start, len(ids) - CONTEXT)
            known = text(ids[start:])
    rest = text(ids[start:])[len(known) :].rstrip("\ufffd")
    if rest:
        yield rest


@functools.lru_cache(maxsize=4)
def _folder_tokenizer(folder: str | None) -> Any | None:
    return load_tokenizer(folder) if folder else None


def _settings(temperature: float | int, top_p: float | int, top_k: int) -> Settings:
    if temperature == 0:
        return None
    return np.float32(temperature), np.float32(top_p), np.int32(top_k)


def _check_prompt(model: CausalLM, tokens: np.ndarray, mask: np.ndarray, max_new_tokens: int) -> None:
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"a prompt must be integer token ids, not {tokens.dtype} of shape {tokens.shape}")
    if tokens.size == 0:
        raise UserError("the prompt is empty")
    if mask.shape != tokens.shape or not mask[:, -1].all():
        raise UserError("attention_mask must have the prompts' shape, with padding on the left")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.config.vocab_size:
        raise UserError(f"token id {low if low < 0 else high} is outside the vocabulary of {model.config.vocab_size}")
    longest = int(mask.sum(1).max())
    if longest + max_new_tokens > model.config.max_position:
        raise UserError(
            f"{longest} prompt tokens and {max_new_tokens} new ones exceed the model's {model.config.max_position}"
        )
