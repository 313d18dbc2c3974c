"""The compiled steps for a model at its present sizes: what a batch runs, and what a budget must count."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uniql_jax.model.cache import Cache, SsmCache
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import empty_cache
from uniql_jax.runtime import steps
from uniql_jax.runtime.generation import chunk
from uniql_jax.runtime.lengths import SHORTEST, coarse
from uniql_jax.runtime.programs import Programs, tree_bytes, work_space
from uniql_jax.runtime.steps import Sampling, Variant

TOGETHER = {"gpu": 8}
"""Short prompts that are read at once. One alone leaves most of a GPU idle; a CPU has work enough."""
SHORT = 128
"""Most tokens of a short prompt: so many as make a GPU's work last longer than reading the weights, eight at a time."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of a batch, the tokens that each may hold, and the bits of their keys and values.

    `marks`: whether rows of models with SSM states remember the state at their prompt's end, so that prompts to come
    may go on from there.
    """

    rows: int
    context: int
    bits: int = 16
    marks: bool = True

    @property
    def slots(self) -> int:
        """Slots of the cache: some more than the context, so that rows are moved only now and then."""
        spare = max(chunk(), 16, min(256, self.context // 8))
        return -(-(self.context + spare) // 16) * 16

    def padded(self, length: int) -> int:
        """Length that a prompt is padded to, at most the context. Fewer than those of `generate`: `warm_up` compiles
        every one at every rate.
        """
        return min(coarse(length), self.context)

    @property
    def together(self) -> tuple[int, int]:
        """How many prompts are read at once, where they are short, and what they are padded to."""
        many = TOGETHER.get(jax.default_backend(), 1)
        return (many if many <= self.rows else 1), min(SHORT, self.context)

    def lengths(self) -> list[int]:
        """All lengths that `padded` gives."""
        return sorted({self.padded(length) for length in range(1, self.context + 1)})


class Compiled:
    """The steps for a model at its present sizes. The model may hold jax.ShapeDtypeStruct in place of arrays."""

    def __init__(self, programs: Programs, model: CausalLM, shape: Shape):
        self.shape = shape
        self._programs = programs
        self._config, self._dtype = model.config, model.dtype
        self.params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
        self._held: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
        self._empty = functools.partial(_empty_state, model.config, tuple(model.keep), model.dtype, shape)
        self.cache, self.marks = jax.eval_shape(self._empty)

    @property
    def reuses(self) -> bool:
        """Whether prompts may go on from what a row holds: not from SSM states without marks, which are further on."""
        states = (state for layer in self.cache.layers for state in layer.values())
        return self.marks is not None or not any(isinstance(state, SsmCache) for state in states)

    @property
    def state_bytes(self) -> int:
        """Bytes of cache and marks."""
        return tree_bytes((self.cache.layers, self.marks))

    def _once(self, key: Hashable, prepare: Callable[[], Any]) -> Any:
        found = self._held.get(key)
        if found is None:
            found = self._held[key] = prepare()
        else:
            self._programs.used(found)
        return found

    def empty(self) -> Any:
        """The program that makes an empty cache, and marks."""
        shapes = tuple((x.shape, np.dtype(x.dtype)) for x in jax.tree.leaves((self.cache, self.marks)))
        return self._once("empty", lambda: self._programs.prepare(("empty", shapes), self._empty))

    def empty_marks(self) -> Any:
        """The program that makes marks for a cache that is there."""
        function = functools.partial(_empty_marks, self._config, self.shape)
        return self._once("marks", lambda: self._programs.prepare(("marks", self.shape), function, self.cache))

    def admit(self, length: int) -> Any:
        """The program that reads a prompt of a padded length into a row."""

        def prepare() -> Any:
            function = functools.partial(steps.admit, self._config, self._dtype)
            args = self.params, self.cache, self.marks, _ints(), (_ints(1, length), _ints())
            return self._programs.prepare(("admit", self._dtype), function, *args, donate=(1, 2))

        return self._once(("admit", length), prepare)

    def admit_together(self) -> Any:
        """The program that reads several short prompts, each into a row of its own."""
        many, length = self.shape.together

        def prepare() -> Any:
            function = functools.partial(steps.admit_together, self._config, self._dtype)
            args = self.params, self.cache, self.marks, _ints(many), (_ints(many, length), _ints(many))
            return self._programs.prepare(("admit together", self._dtype), function, *args, donate=(1, 2))

        return self._once("admit together", prepare)

    def extend(self, length: int) -> Any:
        """The program that reads so many more tokens into a row, behind those that a row holds."""

        def prepare() -> Any:
            function = functools.partial(steps.extend, self._config, self._dtype)
            args = self.params, self.cache, self.marks, _ints(), _SOURCE, (_ints(1, length), _ints())
            return self._programs.prepare(("extend", self._dtype), function, *args, donate=(1, 2))

        return self._once(("extend", length), prepare)

    def again(self) -> Any:
        """The program that gives a row a prompt that another has the mark of."""
        args = self.cache, self.marks, _ints(), _SOURCE
        return self._once("again", lambda: self._programs.prepare("again", steps.again, *args, donate=(0, 1)))

    def first(self, variant: Variant, rows: int = 1) -> Any:
        """The program that makes the first tokens after so many prompts."""

        def prepare() -> Any:
            logits = jax.ShapeDtypeStruct((rows, self._config.vocab_size), jnp.float32)
            args = logits, _ints(self.shape.rows), _ints(rows), Sampling.empty(rows), _ints(rows)
            return self._programs.prepare(("first", variant), functools.partial(steps.first, variant), *args)

        return self._once(("first", variant, rows), prepare)

    def advance(self, variant: Variant) -> Any:
        """The program that makes the next tokens of every row."""

        def prepare() -> Any:
            function = functools.partial(steps.advance, self._config, self._dtype, variant)
            rows = self.shape.rows
            args = self.params, self.cache, _ints(rows), Sampling.empty(rows), _ints(rows, chunk())
            return self._programs.prepare(("advance", variant, self._dtype), function, *args, donate=(1, 2))

        return self._once(("advance", variant), prepare)

    def shift(self) -> Any:
        """The program that moves rows to other slots."""
        args = self.cache, _ints(self.shape.rows), _ints()
        return self._once("shift", lambda: self._programs.prepare("shift", steps.shift, *args, donate=(0,)))

    def work_space(self) -> int:
        """Bytes that the steps need in addition to weights and cache, whichever needs most."""
        longest = self.shape.context
        needed = [self.advance(Variant()), self.admit(longest), self.shift()]
        if self.reuses and longest > SHORTEST:  # a beginning that is worth it leaves so many
            needed.append(self.extend(self.shape.padded(longest - SHORTEST)))
        if self.shape.together[0] > 1:
            needed.append(self.admit_together())
        rows, count = self.shape.rows, chunk()
        # Tokens and settings that a step is given, and the tokens that the one before chose, which stay for the host.
        given = Sampling.empty(rows), _ints(2, self.shape.context), _ints(rows, count), _ints(2, rows, count)
        return max(work_space(program) for program in needed) + tree_bytes(given)

    def prepare_all(self, variants: Iterable[Variant], lengths: Iterable[int], reuse: bool = True) -> None:
        """Compile whatever these variants and prompt lengths may need; without `reuse`, for prompts read from their
        beginning on.
        """
        self.empty()
        self.shift()
        many, short = self.shape.together
        for variant in variants:
            self.first(variant)
            self.advance(variant)
            if many > 1:
                self.first(variant, many)
        lengths = list(lengths)
        if many > 1 and any(length <= short for length in lengths):
            self.admit_together()
        for length in lengths:
            self.admit(length)
            if reuse and self.reuses:
                self.extend(length)
        if self.marks is not None:
            self.empty_marks()
            if reuse:
                self.again()


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


_SOURCE = steps.Source(_ints(), _ints(), _ints())


def _empty_state(config: Any, keep: Any, dtype: Any, shape: Shape) -> tuple[Cache, Any]:
    cache = empty_cache(config, keep, shape.rows, shape.slots, dtype, shape.bits)
    cache = dataclasses.replace(cache, start=jnp.zeros((shape.rows,), jnp.int32), empty=False)
    return cache, _empty_marks(config, shape, cache)


def _empty_marks(config: Any, shape: Shape, cache: Cache) -> Any:
    return steps.empty_marks(cache, config.vocab_size) if shape.marks else None
