"""Measuring a model on its device: time to the first token, per token and to the last, and the bytes it takes.

Every figure is of the compiled programs that `uniql_jax.generate` and `generate_tokens` run, after a first run that is
not counted.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from uniql_jax.evaluation.timing import Program, Timing, compile_program, device_bytes, measure
from uniql_jax.model.cache import Cache
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import cache_bytes
from uniql_jax.runtime import generation as runtime
from uniql_jax.runtime import reading
from uniql_jax.runtime.lengths import pieces, read_slots, slots_for
from uniql_jax.runtime.sampling import settings_of


class Bench:
    """One model at one batch size, prompt length and answer length (tokens); programs compile when first needed.

    Prompts are random tokens, padded as the runtime pads them; the likeliest token is always taken and nothing stops an
    answer early, so every run does the same work.
    """

    def __init__(
        self,
        model: CausalLM,
        batch: int,
        prompt_len: int,
        gen_len: int,
        repeats: int = 5,
        seed: int = 0,
        sampling: tuple[float, float, int] = (0.0, 1.0, 0),
        cache_bits: int = 16,
    ) -> None:
        self.cache_bits = cache_bits
        self.model, self.batch, self.prompt_len, self.gen_len, self.repeats = model, batch, prompt_len, gen_len, repeats
        rng = np.random.default_rng(seed)
        self.prompts = rng.integers(0, model.config.vocab_size, (batch, prompt_len)).astype(np.int32)
        self._key = jax.random.key(0)
        self._settings = settings_of(*sampling, model.config.vocab_size)
        self._stops = np.full(4, -1, np.int32)  # no token has this id

    # The seam: from here to _run_loop is all that knows how the runtime's compiled steps are called. They are compiled
    # ahead of their call, which alone gives compile time and memory. A test compares them with `generate_tokens`.

    @functools.cached_property
    def slots(self) -> int:
        """Tokens that the cache has room for."""
        return slots_for(max(self.prompt_len + runtime.room(self.gen_len), read_slots(self.prompt_len)))

    @functools.cached_property
    def _pieces(self) -> list[tuple[Array, Any]]:
        """The prompts' pieces, padded, and how many tokens each has."""

        def part(at: int, end: int, padded: int) -> Array:
            return jnp.asarray(np.pad(self.prompts[:, at:end], ((0, 0), (0, padded - (end - at)))))

        return [(part(*each), np.int32(each[1] - each[0])) for each in pieces(self.prompt_len)]

    @functools.cached_property
    def prefill(self) -> Program:
        """Prompts, or the first piece of long ones, to logits and cache."""
        tokens, count = self._pieces[0]
        sizes = dict(slots=self.slots, bits=self.cache_bits)
        return compile_program(reading._first, self.model, tokens, count, None, **sizes)

    @functools.cached_property
    def _more(self) -> dict[int, Program]:
        """Later pieces, by their padded length."""
        cache = self._first()[1]
        parts = {tokens.shape[1]: (tokens, count) for tokens, count in self._pieces[1:]}
        return {padded: compile_program(reading._more, self.model, *part, cache) for padded, part in parts.items()}

    @functools.cached_property
    def _pick(self) -> Program:
        """Logits to first tokens."""
        return compile_program(runtime._pick, self._first()[0], self._key, self._settings)

    @functools.cached_property
    def step(self) -> Program:
        """A chunk of tokens more; the cache is donated."""
        last = (self._key, np.int32(1), self._settings)
        return compile_program(runtime._next, self.model, *self._start(), *last, count=runtime.chunk())

    @functools.cached_property
    def loop(self) -> Program:
        """All tokens after the first, in one while_loop."""
        last = (self._key, self._settings, self._stops, np.int32(self.gen_len))
        return compile_program(runtime._rest, self.model, *self._start(), *last, size=self.slots)

    def _first(self) -> tuple[Array, Cache]:
        return self.prefill.run(self.model, *self._pieces[0], None)

    def _start(self) -> tuple[Array, Cache]:
        logits, cache = self._first()
        for tokens, count in self._pieces[1:]:
            logits, cache = self._more[tokens.shape[1]].run(self.model, tokens, count, cache)
        return self._pick.run(logits, self._key, self._settings), cache

    def _run_step(self, token: Array, cache: Cache, step: int) -> tuple[Array, Array, Cache]:
        return self.step.run(self.model, token, cache, self._key, np.int32(step), self._settings)

    def _run_loop(self, token: Array, cache: Cache) -> tuple[Array, Cache]:
        return self.loop.run(self.model, token, cache, self._key, self._settings, self._stops, np.int32(self.gen_len))

    # What is measured.

    def ttft(self) -> Timing:
        """Seconds from prompts to their first tokens."""
        self._start()  # compiles
        return measure(self._start, self.repeats)

    def tpot_step(self, read: bool = True) -> Timing:
        """Seconds per token when each chunk is a call. `read`: the host reads its tokens once it has asked for the
        next, as `generate` does; else calls are only handed to the device.

        Raises ValueError when the answer is a single token, which takes no step.
        """
        steps = self._steps()

        def chain(token: Array, cache: Cache) -> Array | None:
            before = None
            for step in range(1, steps + 1, runtime.chunk()):
                rows, token, cache = self._run_step(token, cache, step)
                if read and before is not None:
                    np.asarray(before)
                before = rows
            return before

        return measure(chain, self.repeats, self._start).scaled(1 / steps)

    def tpot_loop(self) -> Timing:
        """Seconds per token when all steps are one compiled loop. Raises ValueError as `tpot_step`."""
        steps = self._steps()
        return measure(self._run_loop, self.repeats, self._start).scaled(1 / steps)

    def ttlt(self) -> Timing:
        """Seconds from prompts to the last token of their answers, prefill and compiled loop."""
        return measure(self.answer, self.repeats)

    def answer(self) -> Int[Array, "b new"]:
        """The answers themselves, [batch, gen_len]."""
        return self._run_loop(*self._start())[0][:, : self.gen_len]

    def _steps(self) -> int:
        """Decode steps that an answer takes, in whole chunks."""
        if self.gen_len < 2:
            raise ValueError("an answer of a single token takes no decode step")
        return runtime.room(self.gen_len) - 1

    @property
    def cache_bytes(self) -> int:
        """Bytes that decoding remembers, for the whole batch and length."""
        model = self.model
        return cache_bytes(model.config, model.keep, self.batch, self.slots, model.dtype, self.cache_bits)

    @property
    def step_bytes(self) -> int:
        """Bytes that a decode step, halfway through the answer, must move: all weights but a table that is only looked
        up in, keys and values of the tokens so far, and states, which are read and written.
        """
        model, params = self.model, self.model.params
        looked_up = device_bytes(params["embed"]) if "head" in params else 0
        so_far, states = (
            cache_bytes(model.config, model.keep, self.batch, length, model.dtype, self.cache_bits)
            for length in (self.prompt_len + self.gen_len // 2, 0)
        )
        return device_bytes(params) - looked_up + so_far + states

    @property
    def compiled(self) -> dict[str, Program]:
        """Programs compiled so far."""
        return {name: vars(self)[name] for name in ("prefill", "step", "loop") if name in vars(self)}
