"""The compiled steps of a running batch: a prompt joins a row, all rows advance, all rows move to other slots.

Rows share the slot that the next token goes to, as in every `Cache`; a row's tokens end just before it, wherever they
began, so that rows come and go while the others run. Programs are compiled ahead of time from shapes and kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.config import ModelConfig
from uniql_jax.model.cache import Cache, LayerCache
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


def _put(whole: Array, row: Array, index: Array | Any) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, row.astype(whole.dtype), index, axis=0)


def admit(
    config: ModelConfig,
    dtype: Any,
    variant: Variant,
    params: Params,
    cache: Cache,
    token: Int[Array, " b"],
    row: Int[Array, ""],
    prompt: tuple[Int[Array, "1 p"], Int[Array, ""]],
    sampling: Sampling,
    forced: Int[Array, " one"],
) -> tuple[Chosen, Int[Array, " b"], Cache]:
    """Read a prompt, so many tokens and padding, into one row: its last token sits just before the cache's slot.

    The first token is drawn exactly as `generate` does. Returns it, the rows' next tokens and the cache.
    """
    model = CausalLM(config, dict(params), dtype=dtype)
    tokens, count = prompt
    length = tokens.shape[1]
    logits, own = prefill(model, tokens, None, init_cache(model, 1, length), count)
    first, chosen = _choose(logits, sampling, forced, variant)

    def place(whole: Array, part: Array) -> Array:
        """Slots of one row: the prompt's, turned so that they end before the cache's slot; padding may wrap."""
        wide = jnp.zeros((1, whole.shape[1], *part.shape[2:]), part.dtype).at[:, :length].set(part)
        return _put(whole, jnp.roll(wide, cache.slot - count, axis=1), row)

    layers = tuple(
        {
            kind: jax.tree.map(_placer(state, place, functools.partial(_put, index=row)), state, new[kind])
            for kind, state in old.items()
        }
        for old, new in zip(cache.layers, own.layers, strict=True)
    )
    after = Cache(
        layers=layers,
        start=_put(cache.start, (cache.slot - count)[None], row),
        slot=cache.slot,
    )
    return jax.tree.map(lambda x: x[:, None], chosen), _put(token, first, row), after


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


def shift(cache: Cache, by: Int[Array, ""]) -> Cache:
    """All rows `by` slots further on, or back where it is negative; what falls out at either end must be unused."""

    def turn(x: Array) -> Array:
        return jnp.roll(x, by, axis=1)

    layers = tuple(
        {kind: jax.tree.map(_placer(state, turn, lambda x: x), state) for kind, state in layer.items()}
        for layer in cache.layers
    )
    return Cache(layers=layers, start=cache.start + by, slot=cache.slot + by)


# ------------------------------------------------------------------------------------------------ programs


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


class Programs:
    """Compiled programs by name and shapes; one that is there is never compiled again. Any thread may ask."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._lock = threading.Lock()
        self.compiled = 0

    def prepare(self, name: Hashable, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        """The program of `function` for arguments of these shapes (arrays, or jax.ShapeDtypeStruct in their place).

        Args:
            name: tells apart functions that are given the same shapes.
            function: what to compile.
            args: its arguments.
            donate: numbers of the arguments whose memory the results may take.
        """
        leaves, tree = jax.tree.flatten(args)
        key = (name, tree, tuple((np.shape(x), np.dtype(x.dtype)) for x in leaves))
        with self._lock:
            found = self._made.get(key)
        if found is None:
            found = jax.jit(function, donate_argnums=donate).lower(*_abstract(args)).compile()
            with self._lock:
                self._made[key] = found
                self.compiled += 1
        return found

    def call(self, name: Hashable, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        """`prepare`, and run it."""
        return self.prepare(name, function, *args, donate=donate)(*args)


@functools.lru_cache(maxsize=4)
def programs_of(config: ModelConfig) -> Programs:
    """The programs of a model: sessions of one process share them, as calls of a jitted function do."""
    return Programs()


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or of jax.ShapeDtypeStructs in their place."""
    return sum(math.prod(np.shape(leaf)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def work_space(program: Any) -> int:
    """Bytes that a compiled program needs in addition to its arguments: scratch, and results in new memory."""
    found = program.memory_analysis()
    return int(found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes)
