"""The compiled steps of a running batch: a prompt joins a row, all rows advance, all rows move to other slots.

Rows share the slot that the next token goes to, as in every `Cache`; a row's tokens end just before it, wherever they
began, so that rows come and go while the others run. What a row has read stays there when it ends, until another text
takes its place: a prompt that begins like it is read from there on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.config import ModelConfig
from uniql_jax.model.cache import Cache, LayerCache, SsmCache
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import decode, init_cache, prefill
from uniql_jax.runtime.sampling import NO_TOKEN, sample

Params = Mapping[str, Any]
FREE = -1
"""In place of a forced token: the model chooses."""


@flax.struct.dataclass
class Sampling:
    """How each row draws: the settings of `generate`, one entry a row, and the number of the token that comes next."""

    temperature: Any  # arrays of numpy on the host, of JAX in a program: float32 [rows], like top_p
    top_p: Any
    top_k: Any  # int32 [rows], like step
    seed: Any  # uint32 [rows]
    step: Any

    @classmethod
    def empty(cls, rows: int) -> Sampling:
        """Rows that take the likeliest token."""
        return cls(
            temperature=np.zeros(rows, np.float32),
            top_p=np.ones(rows, np.float32),
            top_k=np.zeros(rows, np.int32),
            seed=np.zeros(rows, np.uint32),
            step=np.zeros(rows, np.int32),
        )


@flax.struct.dataclass
class Chosen:
    """Tokens of each row and, where asked for, their log-probabilities and those of the likeliest ones."""

    token: Any  # int32 [rows, tokens]
    logprob: Any  # float32 [rows, tokens], or None
    top: Any  # float32 [rows, tokens, k], or None
    top_token: Any  # int32 like it


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a step is compiled for, in addition to shapes.

    `greedy`: every row takes the likeliest token, and nothing is sorted. `top`: how many of the likeliest tokens come
    back with their log-probabilities; None: none are computed.
    """

    greedy: bool = True
    top: int | None = None


def _choose(
    logits: Float[Array, "b vocab"], sampling: Sampling, forced: Int[Array, " b"], variant: Variant
) -> tuple[Int[Array, " b"], Chosen]:
    """The next token of every row: as `generate` draws it, or the forced one."""
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not variant.greedy:
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(sampling.seed, sampling.step)
        token = sample(logits, keys, sampling.temperature, sampling.top_p, sampling.top_k)
    token = jnp.where(forced >= 0, forced, token)
    token = jnp.where(jnp.isfinite(logits.max(axis=-1)), token, NO_TOKEN)
    if variant.top is None:
        return token, Chosen(token, None, None, None)
    scores = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(scores, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0]
    top, top_token = jax.lax.top_k(scores, variant.top)
    return token, Chosen(token, own, top, top_token.astype(jnp.int32))


def _put(whole: Array, part: Array, rows: Int[Array, " n"]) -> Array:
    """Some rows in the place of those at these indices, each of which is another."""
    part = part.astype(whole.dtype)
    if len(rows) == 1:
        return jax.lax.dynamic_update_slice_in_dim(whole, part, rows[0], axis=0)
    return whole.at[rows].set(part, unique_indices=True)


@flax.struct.dataclass
class Marks:
    """What a row's prompt left, for models whose state cannot go back: the SSM states at its end, one {kind: state} a
    layer, and the logits that follow, float32 [rows, vocabulary].
    """

    layers: tuple[dict[str, Any], ...]
    logits: Any


class Source(NamedTuple):
    """Where the beginning of a prompt was read before: a row, the slot of its first token, and how many to take."""

    row: Any  # int32, like first and count
    first: Any
    count: Any


def empty_marks(cache: Cache, vocab_size: int) -> Marks | None:
    """Marks for the rows of a cache; None where attention alone remembers, which forgets tokens one by one."""
    layers = tuple(
        {kind: jax.tree.map(jnp.zeros_like, state) for kind, state in layer.items() if isinstance(state, SsmCache)}
        for layer in cache.layers
    )
    if not any(layers):
        return None
    [rows] = cache.start.shape
    return Marks(layers, jnp.zeros((rows, vocab_size), jnp.float32))


def admit(
    config: ModelConfig,
    dtype: Any,
    params: Params,
    cache: Cache,
    marks: Marks | None,
    row: Int[Array, ""],
    prompt: tuple[Int[Array, "1 p"], Int[Array, ""]],
) -> tuple[Float[Array, "1 vocab"], Cache, Marks | None]:
    """Read a prompt, so many tokens and padding, into one row: its last token sits just before the cache's slot.

    Returns the logits that follow it, the cache, and the marks.
    """
    model = CausalLM(config, dict(params), dtype=dtype)
    tokens, count = prompt
    logits, own = prefill(model, tokens, None, init_cache(model, 1, tokens.shape[1], cache.bits), count)
    return _placed(cache, marks, row[None], own.layers, count, count[None], logits)


def admit_together(
    config: ModelConfig,
    dtype: Any,
    params: Params,
    cache: Cache,
    marks: Marks | None,
    rows: Int[Array, " n"],
    prompts: tuple[Int[Array, "n p"], Int[Array, " n"]],
) -> tuple[Float[Array, "n vocab"], Cache, Marks | None]:
    """`admit` of several prompts, each into a row of its own: so many tokens at the end of its line, padding before."""
    model = CausalLM(config, dict(params), dtype=dtype)
    tokens, counts = prompts
    length = tokens.shape[1]
    mask = (jnp.arange(length) >= length - counts[:, None]).astype(jnp.int32)
    logits, own = prefill(model, tokens, mask, init_cache(model, len(counts), length, cache.bits))
    return _placed(cache, marks, rows, own.layers, length, counts, logits)


def extend(
    config: ModelConfig,
    dtype: Any,
    params: Params,
    cache: Cache,
    marks: Marks | None,
    row: Int[Array, ""],
    source: Source,
    prompt: tuple[Int[Array, "1 p"], Int[Array, ""]],
) -> tuple[Float[Array, "1 vocab"], Cache, Marks | None]:
    """`admit` of a prompt whose beginning a row holds; `prompt` is the rest of it, of at least one token."""
    model = CausalLM(config, dict(params), dtype=dtype)
    tokens, count = prompt
    before = Cache(layers=_taken(cache, marks, source), start=None, slot=source.count)
    logits, own = prefill(model, tokens, None, before, count)
    count = source.count + count
    return _placed(cache, marks, row[None], own.layers, count, count[None], logits)


def again(
    cache: Cache, marks: Marks, row: Int[Array, ""], source: Source
) -> tuple[Float[Array, "1 vocab"], Cache, Marks | None]:
    """`admit` of the very prompt whose marks a row holds: nothing is read."""
    logits = jax.lax.dynamic_index_in_dim(marks.logits, source.row, 0)
    return _placed(cache, marks, row[None], _taken(cache, marks, source), source.count, source.count[None], logits)


def first(
    variant: Variant,
    logits: Float[Array, "n vocab"],
    token: Int[Array, " b"],
    rows: Int[Array, " n"],
    sampling: Sampling,
    forced: Int[Array, " n"],
) -> tuple[Chosen, Int[Array, " b"]]:
    """The first token of some rows, drawn exactly as `generate` does, and all rows' next tokens with it."""
    own, chosen = _choose(logits, sampling, forced, variant)
    return jax.tree.map(lambda x: x[:, None], chosen), _put(token, own, rows)


def _taken(cache: Cache, marks: Marks | None, source: Source) -> tuple[dict[str, Any], ...]:
    """A row's state by itself, its first token in slot 0; SSM states are those of its mark."""

    def turned(x: Array) -> Array:
        return jnp.roll(jax.lax.dynamic_index_in_dim(x, source.row, 0), -source.first, axis=1)

    def whole(x: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(x, source.row, 0)

    return tuple(
        {
            kind: jax.tree.map(turned, state)
            if isinstance(state, LayerCache)
            else jax.tree.map(whole, state if marks is None else marks.layers[i].get(kind))
            for kind, state in layer.items()
        }
        for i, layer in enumerate(cache.layers)
    )


def _placed(
    cache: Cache,
    marks: Marks | None,
    rows: Int[Array, " n"],
    own: tuple[dict[str, Any], ...],
    end: Int[Array, ""] | int,
    counts: Int[Array, " n"],
    logits: Float[Array, "n vocab"],
) -> tuple[Float[Array, "n vocab"], Cache, Marks | None]:
    """States whose last token is the one before slot `end` as rows of the cache, and their marks."""

    def place(whole: Array, part: Array) -> Array:
        """Slots of the rows: the prompts', turned so that they end before the cache's slot; padding may wrap."""
        wide = jnp.zeros((len(part), *whole.shape[1:]), part.dtype).at[:, : part.shape[1]].set(part)
        return _put(whole, jnp.roll(wide, cache.slot - end, axis=1), rows)

    put = functools.partial(_put, rows=rows)
    layers = tuple(
        {kind: jax.tree.map(_placer(state, place, put), state, new[kind]) for kind, state in old.items()}
        for old, new in zip(cache.layers, own, strict=True)
    )
    after = Cache(layers=layers, start=_put(cache.start, cache.slot - counts, rows), slot=cache.slot)
    if marks is not None:
        marked = tuple(
            {kind: jax.tree.map(put, state, new[kind]) for kind, state in old.items()}
            for old, new in zip(marks.layers, own, strict=True)
        )
        marks = Marks(marked, put(marks.logits, logits))
    return logits, after, marks


def _placer(state: Any, by_slot: Callable[..., Array], whole: Callable[..., Array]) -> Callable[..., Array]:
    """How a row's state enters the batch's: slot by slot where it has slots, else as it is."""
    return by_slot if isinstance(state, LayerCache) else whole


def advance(
    config: ModelConfig,
    dtype: Any,
    variant: Variant,
    params: Params,
    cache: Cache,
    token: Int[Array, " b"],
    sampling: Sampling,
    forced: Int[Array, "b n"],
) -> tuple[Chosen, Int[Array, " b"], Cache]:
    """The next n tokens of every row, their last as the rows' next one, and the cache."""
    model = CausalLM(config, dict(params), dtype=dtype)
    count = forced.shape[1]

    def one(i: Any, token: Array, cache: Cache) -> tuple[Chosen, Array, Cache]:
        logits, cache = decode(model, token, cache)
        now = dataclasses.replace(sampling, step=sampling.step + i)
        token, chosen = _choose(logits, now, forced[:, i], variant)
        return chosen, token, cache

    if count == 1:
        chosen, token, cache = one(0, token, cache)
        return jax.tree.map(lambda x: x[:, None], chosen), token, cache

    def body(i: Any, state: tuple) -> tuple:
        rows, token, cache = state
        chosen, token, cache = one(i, token, cache)
        return jax.tree.map(lambda all_, new: all_.at[:, i].set(new), rows, chosen), token, cache

    shapes = jax.eval_shape(lambda: one(0, token, cache)[0])
    rows = jax.tree.map(lambda s: jnp.zeros((s.shape[0], count, *s.shape[1:]), s.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, (rows, token, cache))


def shift(cache: Cache, by: Int[Array, " b"], slot: Int[Array, ""]) -> Cache:
    """Each row `by` slots further on, or back where it is negative, and the next token to `slot`; what falls out at
    either end must be unused.
    """

    def turn(x: Array) -> Array:
        return jax.vmap(lambda row, count: jnp.roll(row, count, axis=0))(x, by)

    layers = tuple(
        {kind: jax.tree.map(_placer(state, turn, lambda x: x), state) for kind, state in layer.items()}
        for layer in cache.layers
    )
    return Cache(layers=layers, start=cache.start + by, slot=slot)
