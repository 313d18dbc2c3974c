"""Measuring a model on its device: time to the first token, per token and to the last, bytes, and the memory's speed.

Every figure is of the compiled programs that `uniql_jax.generate` and `generate_tokens` run, after a first run that is
not counted; a clock stops only once the device is done.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from uniql_jax import runtime
from uniql_jax.cache import Cache
from uniql_jax.model import CausalLM, cache_bytes

COPY_BYTES = {"cpu": 2**28, "gpu": 2**31}
"""Bytes of the array that the memory's speed is measured on: far beyond any device's caches."""
COPIES = 8


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median, least and most of repeated measurements, in seconds unless it says otherwise."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Sum up measurements."""
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))

    def scaled(self, factor: float) -> Timing:
        """The same in another unit, or per step."""
        return Timing(self.median * factor, self.low * factor, self.high * factor, self.repeats)


def measure(run: Callable[..., Any], repeats: int, prepare: Callable[[], tuple] = tuple) -> Timing:
    """Seconds that run(*prepare()) takes until its result is on the device, `prepare` not counted."""
    samples = []
    for turn in range(repeats + 1):
        arguments = jax.block_until_ready(prepare())
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        if turn:  # the first warms up
            samples.append(time.perf_counter() - start)
    return Timing.of(samples)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step: what it took to trace and compile (seconds), and the memory it needs (bytes; None: unknown).

    memory_bytes counts weights, cache, results and scratch, each once.
    """

    run: Callable[..., Any]
    compile_seconds: float
    memory_bytes: int | None


def compile_program(function: Any, *arguments: Any, **static: Any) -> Program:
    """Compile a jitted function for these arguments (arrays or their shapes) and static ones by name."""
    start = time.perf_counter()
    compiled = function.lower(*arguments, **static).compile()
    seconds = time.perf_counter() - start
    sizes = compiled.memory_analysis()
    held = None
    if sizes is not None:
        held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
        held = int(held - sizes.alias_size_in_bytes)
    return Program(compiled, seconds, held)


class Bench:
    """One model at one batch size, prompt length and answer length (tokens); programs compile when first needed.

    Prompts are random tokens, all of them read (no padding); the likeliest token is always taken and nothing stops an
    answer early. The cache has room for prompt and answer.
    """

    def __init__(self, model: CausalLM, batch: int, prompt_len: int, gen_len: int, repeats: int = 5):
        self.model, self.batch, self.prompt_len, self.gen_len = model, batch, prompt_len, gen_len
        self.repeats, self.slots = repeats, prompt_len + gen_len
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(0, model.config.vocab_size, (batch, prompt_len)).astype(np.int32)
        self._mask = np.ones((batch, prompt_len), np.int32)
        self._key = jax.random.key(0)
        self._settings = (np.float32(0.0), np.float32(1.0), np.int32(0))  # greedy
        self._stops = np.full(4, -1, np.int32)  # no token has this id

    @property
    def _prompt(self) -> tuple:
        return self.model, self._tokens, self._mask, self._key, self._settings

    @functools.cached_property
    def _started(self) -> Any:
        """Shapes of what prefill gives: the first token of each row and the cache."""
        return jax.eval_shape(functools.partial(runtime._first, slots=self.slots), *self._prompt)

    @functools.cached_property
    def prefill(self) -> Program:
        """Prompts to first tokens and cache."""
        return compile_program(runtime._first, *self._prompt, slots=self.slots)

    @functools.cached_property
    def step(self) -> Program:
        """One token more; the cache is donated."""
        last = (self._key, np.int32(1), self._settings)
        return compile_program(runtime._next, self.model, *self._started, *last)

    @functools.cached_property
    def loop(self) -> Program:
        """All tokens after the first, in one while_loop."""
        last = (self._key, self._settings, self._stops)
        return compile_program(runtime._rest, self.model, *self._started, *last, count=self.gen_len)

    def _start(self) -> tuple[Array, Cache]:
        return self.prefill.run(*self._prompt)

    def _run_loop(self, token: Array, cache: Cache) -> Any:
        return self.loop.run(self.model, token, cache, self._key, self._settings, self._stops)

    def ttft(self) -> Timing:
        """Seconds from prompts to their first tokens."""
        return measure(self._start, self.repeats)

    def tpot_step(self) -> Timing:
        """Seconds per token when each step is a call, as in streaming; no step waits for the host.

        Raises ValueError when the answer is a single token, which takes no step.
        """
        steps = self._steps()

        def chain(token: Array, cache: Cache) -> Array:
            for step in range(1, steps + 1):
                token, cache = self.step.run(self.model, token, cache, self._key, np.int32(step), self._settings)
            return token

        return measure(chain, self.repeats, self._start).scaled(1 / steps)

    def tpot_loop(self) -> Timing:
        """Seconds per token when all steps are one compiled loop. Raises ValueError as `tpot_step`."""
        return measure(self._run_loop, self.repeats, self._start).scaled(1 / self._steps())

    def ttlt(self) -> Timing:
        """Seconds from prompts to the last token of their answers, prefill and compiled loop."""
        return measure(lambda: self._run_loop(*self._start()), self.repeats)

    def _steps(self) -> int:
        if self.gen_len < 2:
            raise ValueError("an answer of a single token takes no decode step")
        return self.gen_len - 1

    @property
    def cache_bytes(self) -> int:
        """Bytes that decoding remembers, for the whole batch and length."""
        model = self.model
        return cache_bytes(model.config, model.keep, self.batch, self.slots, model.dtype)

    @property
    def step_bytes(self) -> int:
        """Bytes that a decode step must read: all weights and the cache, but not a table that is only looked up in."""
        params = self.model.params
        looked_up = device_bytes(params["embed"]) if "head" in params else 0
        return device_bytes(params) - looked_up + self.cache_bytes

    @property
    def compiled(self) -> dict[str, Program]:
        """Programs compiled so far."""
        return {name: vars(self)[name] for name in ("prefill", "step", "loop") if name in vars(self)}


def decode_step_seconds(model: CausalLM, cache_len: int, batch: int, steps: int, repeats: int = 5) -> Timing:
    """Seconds per decode step after `cache_len` tokens, `steps` (at least 1) of them chained through the cache."""
    return Bench(model, batch, cache_len, steps + 1, repeats).tpot_step()


def device_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(tree))


def copy_bandwidth(repeats: int = 5) -> Timing:
    """Bytes a second, read and written, of an array that is passed through the device's memory."""
    size = COPY_BYTES.get(jax.default_backend(), 2**28)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run(x: Array) -> Array:
        for _ in range(COPIES):
            x = add(x)
        return x

    timing = measure(run, repeats, lambda: (jnp.zeros(size // 4, jnp.int32),))
    moved = 2 * size * COPIES
    return Timing(moved / timing.median, moved / timing.high, moved / timing.low, timing.repeats)


def peak_bytes() -> int | None:
    """Most bytes the device has held at a time since the process began, or None where it does not count them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def environment() -> dict[str, Any]:
    """Device, versions, command and date: where a measurement came from."""
    device = jax.devices()[0]

    def short(word: str) -> str:  # where files lay is nobody's business: their names are enough
        return Path(word).name if Path(word).is_absolute() or Path(word).exists() else word

    return {
        "device": device.device_kind if device.platform != "cpu" else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "flax")},
        "command": " ".join(["python", *map(short, sys.argv)]),
        "date": datetime.date.today().isoformat(),
    }
