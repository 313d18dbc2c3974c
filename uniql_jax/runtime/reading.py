"""Prompts into caches: in pieces of bounded length, and without what a model has read before.

What is reused: of a model with attention alone, whatever a prompt has in common with an earlier one from its beginning
on; of a model with SSM states, which cannot go back, an earlier prompt that the new one begins with or equals.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.model.cache import Cache, LayerCache, SsmCache, _resize
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import init_cache, prefill
from uniql_jax.runtime.lengths import SHORTEST, pieces, read_slots, slots_for

LIMIT = 2**30
"""Most bytes of caches that are held for prompts to come, of each model."""

# ---------------------------------------------------------------------------------------------- compiled steps


@functools.partial(jax.jit, static_argnames=("slots", "bits"))
def _first(
    model: CausalLM,
    tokens: Int[Array, "b t"],
    count: Int[Array, ""] | Any,
    start: Int[Array, " b"] | None,
    slots: int,
    bits: int,
) -> tuple[Float[Array, "b vocab"], Cache]:
    """The first piece of prompts into a new cache."""
    cache = dataclasses.replace(init_cache(model, tokens.shape[0], slots, bits), start=start)
    return prefill(model, tokens, None, cache, count)


@functools.partial(jax.jit, donate_argnames="cache")
def _more(
    model: CausalLM, tokens: Int[Array, "b t"], count: Int[Array, ""] | Any, cache: Cache
) -> tuple[Float[Array, "b vocab"], Cache]:
    """A later piece."""
    return prefill(model, tokens, None, cache, count)


@functools.partial(jax.jit, static_argnames="slots")
def _copied(cache: Cache, slot: Int[Array, ""] | Any, slots: int) -> Cache:
    """A copy of another number of slots, in which the next token goes to `slot`."""

    def resized(state: Any) -> Any:
        if not isinstance(state, LayerCache):
            return state
        return jax.tree.map(lambda x: _resize(x, 1, slots), state)

    layers = tuple({kind: resized(state) for kind, state in layer.items()} for layer in cache.layers)
    # Values that pass through unchanged would be the very arrays that the next step takes for itself.
    layers = jax.tree.map(jnp.copy, layers)
    return Cache(layers=layers, start=cache.start, slot=jnp.asarray(slot, jnp.int32))


# ---------------------------------------------------------------------------------------------- what was read before


@dataclasses.dataclass(frozen=True)
class Entry:
    """A prompt, its cache, and the logits that follow it."""

    tokens: Int[np.ndarray, " t"]
    cache: Cache
    logits: Float[Array, "1 vocab"]
    bits: int

    def usable(self, tokens: Int[np.ndarray, " t"]) -> int:
        """How many tokens at the beginning of a prompt need not be read again; all of them only for the same prompt."""
        shared = min(len(tokens), len(self.tokens))
        differ = np.flatnonzero(tokens[:shared] != self.tokens[:shared])
        common = int(differ[0]) if differ.size else shared
        if common == len(tokens) == len(self.tokens):
            return common
        if any(isinstance(state, SsmCache) for layer in self.cache.layers for state in layer.values()):
            return common if common == len(self.tokens) else 0
        return min(common, len(tokens) - 1)


class Prefixes:
    """Prompts of one model, the latest last; all are forgotten when its weights change."""

    def __init__(self, params: Any) -> None:
        self._entries: list[Entry] = []
        self._weights = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]

    def fits(self, params: Any) -> bool:
        """Whether these are the weights that the caches come from."""
        leaves = jax.tree.leaves(params)
        return len(leaves) == len(self._weights) and all(
            ref() is leaf for ref, leaf in zip(self._weights, leaves, strict=True)
        )

    def find(self, tokens: Int[np.ndarray, " t"], bits: int) -> tuple[int, Entry] | None:
        """The prompt with the longest usable beginning, if any is worth it."""
        found = [(entry.usable(tokens), i) for i, entry in enumerate(self._entries) if entry.bits == bits]
        best, i = max(found, default=(0, 0))
        return (best, self._entries[i]) if best >= SHORTEST else None

    def keep(self, entry: Entry) -> None:
        """Remember a prompt, and forget the oldest ones that do not fit next to it."""
        others = [old for old in self._entries if old.bits != entry.bits or old.usable(entry.tokens) < len(old.tokens)]
        held = entry.cache.nbytes
        self._entries = [entry]
        for old in reversed(others):
            held += old.cache.nbytes
            if held > LIMIT:
                break
            self._entries.insert(0, old)


_PREFIXES: weakref.WeakKeyDictionary[CausalLM, Prefixes] = weakref.WeakKeyDictionary()


def prefixes(model: CausalLM) -> Prefixes:
    """What was read before by a model."""
    found = _PREFIXES.get(model)
    if found is None or not found.fits(model.params):
        found = _PREFIXES[model] = Prefixes(model.params)
    return found


def forget(model: CausalLM) -> None:
    """Free the caches that are held for prompts to come."""
    _PREFIXES.pop(model, None)


# ---------------------------------------------------------------------------------------------- reading


def read(
    model: CausalLM, tokens: Int[np.ndarray, "b t"], start: Int[np.ndarray, " b"] | None, new: int, bits: int = 16
) -> tuple[Float[Array, "b vocab"], Cache, int]:
    """Read prompts into a cache.

    Args:
        model: the model.
        tokens: int32 ids, shorter prompts padded on the left.
        start: how much padding each has; None: none.
        new: slots that are wanted behind the prompts.
        bits: 8 or 16, of keys and values.

    Returns:
        The logits after the last token, float32 [batch, vocabulary], the cache, and its slots.
    """
    length = tokens.shape[1]
    single = tokens.shape[0] == 1 and start is None
    known = prefixes(model).find(tokens[0], bits) if single else None
    done = 0 if known is None else known[0]
    slots = slots_for(max(length + new, read_slots(length, done)))
    logits, cache = (None, None) if known is None else (known[1].logits, _copied(known[1].cache, np.int32(done), slots))
    for at, end, padded in pieces(length - done):
        part = np.pad(tokens[:, done + at : done + end], ((0, 0), (0, padded - (end - at))))
        if cache is None:
            logits, cache = _first(model, part, np.int32(end), start, slots=slots, bits=bits)
        else:
            logits, cache = _more(model, part, np.int32(end - at), cache)
    assert logits is not None
    assert cache is not None
    if single and done < length and length >= SHORTEST and cache.nbytes <= LIMIT:
        entry = Entry(tokens[0].copy(), _copied(cache, np.int32(length), slots), logits, bits)
        prefixes(model).keep(entry)
    return logits, cache, slots
