"""The compiled steps for a model at its present sizes: what a batch runs, and what a budget must count."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from uniql_jax.model.cache import Cache
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import empty_cache
from uniql_jax.runtime import steps
from uniql_jax.runtime.generation import chunk
from uniql_jax.runtime.lengths import coarse
from uniql_jax.runtime.steps import Programs, Sampling, Variant


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of a batch, and the tokens that each may hold."""

    rows: int
    context: int

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
        self._held: dict[Hashable, Any] = {}
        self._empty = functools.partial(_empty_cache, model.config, tuple(model.keep), model.dtype, shape)
        self.cache: Any = jax.eval_shape(self._empty)

    def _once(self, key: Hashable, prepare: Callable[[], Any]) -> Any:
        if key not in self._held:
            self._held[key] = prepare()
        return self._held[key]

    def empty(self) -> Any:
        """The program that makes an empty cache."""
        widths = tuple(x.shape for x in jax.tree.leaves(self.cache))
        return self._once("empty", lambda: self._programs.prepare(("empty", widths, self._dtype), self._empty))

    def admit(self, variant: Variant, length: int) -> Any:
        """The program that reads a prompt of a padded length into a row."""

        def prepare() -> Any:
            function = functools.partial(steps.admit, self._config, self._dtype, variant)
            state = self.params, self.cache, _ints(self.shape.rows)
            prompt = _ints(1, length), _ints()
            args = (*state, _ints(), prompt, Sampling.empty(1), _ints(1))
            return self._programs.prepare(("admit", variant, self._dtype), function, *args, donate=(1, 2))

        return self._once(("admit", variant, length), prepare)

    def advance(self, variant: Variant) -> Any:
        """The program that makes the next tokens of every row."""

        def prepare() -> Any:
            function = functools.partial(steps.advance, self._config, self._dtype, variant)
            rows = self.shape.rows
            args = self.params, self.cache, _ints(rows), Sampling.empty(rows), _ints(rows, chunk())
            return self._programs.prepare(("advance", variant, self._dtype), function, *args, donate=(1, 2))

        return self._once(("advance", variant), prepare)

    def shift(self) -> Any:
        """The program that moves all rows to other slots."""
        return self._once(
            "shift", lambda: self._programs.prepare("shift", steps.shift, self.cache, _ints(), donate=(0,))
        )

    def work_space(self) -> int:
        """Bytes that the steps need in addition to weights and cache, whichever needs most."""
        needed = self.advance(Variant()), self.admit(Variant(), self.shape.context), self.shift()
        rows, count = self.shape.rows, chunk()
        # Tokens and settings that a step is given, and the tokens that the one before chose, which stay for the host.
        given = Sampling.empty(rows), _ints(2, self.shape.context), _ints(rows, count), _ints(2, rows, count)
        return max(steps.work_space(program) for program in needed) + steps.tree_bytes(given)

    def prepare_all(self, variants: Iterable[Variant], lengths: Iterable[int]) -> None:
        """Compile whatever these variants and prompt lengths may need."""
        self.empty()
        self.shift()
        lengths = list(lengths)
        for variant in variants:
            self.advance(variant)
            for length in lengths:
                self.admit(variant, length)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _empty_cache(config: Any, keep: Any, dtype: Any, shape: Shape) -> Cache:
    cache = empty_cache(config, keep, shape.rows, shape.slots, dtype)
    return dataclasses.replace(cache, start=jnp.zeros((shape.rows,), jnp.int32), empty=False)
