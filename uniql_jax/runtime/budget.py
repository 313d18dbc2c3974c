"""What a checkpoint needs at each prune rate, before anything of it is loaded, and the least rate that fits a budget.

Weights and cache follow from shapes; the work space of the compiled steps is what the compiler reports for them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from uniql_jax import elastic
from uniql_jax.checkpoint import Checkpoint, packed
from uniql_jax.console import format_bytes
from uniql_jax.errors import UserError
from uniql_jax.limits import MAX_PRUNE_RATE
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.pallas_kernels.dequant_matmul import preferred_layout
from uniql_jax.runtime.compiled import Compiled, Shape
from uniql_jax.runtime.programs import Programs, tree_bytes
from uniql_jax.sizes import memory_size
from uniql_jax.weights.quantized import QuantizedArray

STEPS = 350
"""Rates that are tried for a budget: every 0.001."""
SLACK = 0.02
"""Share of a budget that may stay unused, rather than that more rates are compiled for."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that one prune rate needs: weights, cache, and the compiled steps' work space."""

    rate: float
    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.work

    def __str__(self) -> str:
        parts = f"{format_bytes(self.weights)} of weights, {format_bytes(self.cache)} of cache"
        return f"{format_bytes(self.total)} ({parts}, {format_bytes(self.work)} of work space)"


def memory_capacity() -> int:
    """Bytes of memory of the default device, or of the host (as its control group limits it) where a CPU computes."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"])
    return min([int(psutil.virtual_memory().total), *_group_limits("memory.max")])


def free_memory() -> int:
    """Bytes of that memory which nobody uses."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
    used = _group_limits("memory.current")
    limits = [limit - used[0] for limit in _group_limits("memory.max")] if used else []
    return max(min([int(psutil.virtual_memory().available), *limits]), 0)


def _group_limits(name: str) -> list[int]:
    """A number of this process's control group (version 2), if it has one."""
    try:
        with open(f"/sys/fs/cgroup/{name}", encoding="ascii") as file:
            return [int(file.read())]
    except (OSError, ValueError):  # no such group, or the word max
        return []


def parse_budget(budget: int | float | str, capacity: Callable[[], int] = memory_capacity) -> int:
    """Bytes of a budget: a number of them, a size such as "3GiB", or a share of the device's memory such as "80%".

    Raises:
        UserError: it is none of these.
    """
    if isinstance(budget, str) and (match := re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", budget, re.ASCII)):
        share = float(match[1]) / 100
        if not 0 < share <= 1:
            raise UserError(f"a share of the memory is above 0 % and at most 100 %, not {budget!r}")
        return int(share * capacity())
    if isinstance(budget, str):
        try:
            return memory_size(budget)
        except ValueError as error:
            raise UserError(f"{error}, or 80%") from None
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 1 <= budget < 2**63:
        raise UserError(f"a memory budget is a number of bytes, or looks like 3GiB or 80%, not {budget!r}")
    return int(budget)


def _leaf_shape(checkpoint: Checkpoint, name: str, leaf: elastic.Leaf, keep: Any, dtype: Any, tiles: bool) -> Any:
    """A leaf as `loading.place` gives it, with jax.ShapeDtypeStruct for arrays."""
    tensors = checkpoint.tensors
    parts = [part for part in ((".data", ".scale"), (".last", ".fine")) if name + part[0] in tensors]
    if parts:

        def part(suffix: str, dtype: Any = None) -> jax.ShapeDtypeStruct:
            stored, shape = tensors[name + suffix]
            rows = checkpoint.rows(leaf, suffix, keep)
            return jax.ShapeDtypeStruct(
                (shape[0] if rows is None else min(rows, shape[0]), *shape[1:]), dtype or stored
            )

        # A byte of a bit plane becomes a word of 4-bit weights.
        data = part(parts[0][0], jnp.int32 if parts[0][0] == ".last" else None)
        weight = packed(checkpoint.config, checkpoint.meta, leaf, data, part(parts[0][1]), keep)
        layout = preferred_layout(bits=weight.bits, group=weight.group, contract=weight.contract, dtype=dtype)
        return jax.eval_shape(lambda w: w.in_layout(layout), weight) if tiles and layout != "plain" else weight
    shape = elastic.shape(checkpoint.config, leaf, keep)
    return jax.ShapeDtypeStruct(shape, dtype if leaf.contract else jnp.float32)


def abstract_model(checkpoint: Checkpoint, rate: float, dtype: Any) -> CausalLM:
    """The model as `load` gives it, with jax.ShapeDtypeStruct in place of every array; nothing is read."""
    layers = [
        {
            kind: {
                name: _leaf_shape(checkpoint, f"layers.{i}.{kind}.{name}", leaf, keep, dtype, True)
                for name, leaf in elastic.leaves(checkpoint.config, kind).items()
            }
            for kind in checkpoint.config.pattern[i]
        }
        for i, keep in enumerate(checkpoint.keep(rate))
    ]
    top = {
        name: _leaf_shape(checkpoint, name, leaf, None, dtype, name != "embed")
        for name, leaf in elastic.TOP.items()
        if {name, f"{name}.data", f"{name}.last"} & set(checkpoint.tensors)
    }
    return CausalLM(checkpoint.config, top | {"layers": layers}, checkpoint.plan, rate, None, dtype)


class Needs:
    """What a checkpoint needs at any prune rate, for a batch and a context; programs that were compiled are kept."""

    def __init__(self, checkpoint: Checkpoint, shape: Shape, dtype: Any, programs: Programs, batches: int = 1):
        """batches: how many run at a time at most, each with a cache of its own and all with the same weights."""
        self.checkpoint, self.shape, self.dtype = checkpoint, shape, dtype
        self.batches = batches
        self.highest = MAX_PRUNE_RATE if checkpoint.plan is not None else 0.0
        self._programs = programs
        self._compiled: dict[float, Compiled] = {}
        self._work: dict[float, int] = {}
        self.weights = functools.cache(self._weights)

    def compiled(self, rate: float) -> Compiled:
        """The steps at a rate."""
        if rate not in self._compiled:
            model = abstract_model(self.checkpoint, rate, self.dtype)
            self._compiled[rate] = Compiled(self._programs, model, self.shape)
        return self._compiled[rate]

    def _weights(self, rate: float) -> int:
        return tree_bytes(abstract_model(self.checkpoint, rate, self.dtype).params)

    def cache(self, rate: float) -> int:
        """Bytes of the cache of all rows of one batch."""
        return self.compiled(rate).state_bytes

    def work(self, rate: float) -> int:
        """Bytes of work space, by compiling the steps."""
        if rate not in self._work:
            largest = 0
            if jax.default_backend() == "cpu":  # where a leaf is read into the memory that it will stay in
                largest = max(tree_bytes(leaf) for leaf in _leaves(self.compiled(rate).params)) - self.cache(rate)
            self._work[rate] = max(self.compiled(rate).work_space(), largest)
        return self._work[rate]

    def at(self, rate: float) -> Need:
        """All that a rate needs."""
        return Need(rate, self.weights(rate), self.batches * self.cache(rate), self.work(rate))

    def fitting(self, budget: int, rates: Sequence[float] | None = None) -> Need:
        """What the least rate that fits a budget needs, or one next to it that uses all but a fiftieth.

        Args:
            budget: bytes.
            rates: to choose from; None: every 0.001 from 0 to the highest.

        Raises:
            UserError: not even the highest rate fits; says what it needs.
        """
        choices = sorted(rates) if rates is not None else [round(i * self.highest / STEPS, 6) for i in range(STEPS + 1)]
        work = 0
        while True:
            rate = first_fitting(self._held, budget - work, choices)
            if rate is None:
                least = self.at(choices[-1])  # which needs less work space than lower rates, whose was asked for above
                if least.total <= budget:
                    return least
                raise UserError(
                    f"{format_bytes(budget)} is too little: prune rate {choices[-1]:g} needs {least} "
                    f"for {self.shape.rows} x {self.shape.context} tokens; {_advice(self.shape)}"
                )
            found = self.at(rate)
            if found.total <= budget:
                return self._closer(found, budget, choices)
            work = max(found.work, work + 1)

    def _held(self, rate: float) -> int:
        return self.weights(rate) + self.batches * self.cache(rate)

    def _closer(self, found: Need, budget: int, choices: Sequence[float]) -> Need:
        """A lower rate than one that fits with the work space of rates below, which may need more than it does."""
        lowest = first_fitting(self._held, budget - found.work, choices)
        low, high = choices.index(found.rate if lowest is None else lowest), choices.index(found.rate)
        while low < high and budget - found.total > SLACK * budget:  # compiling takes a while
            middle = (low + high) // 2
            tried = self.at(choices[middle])
            if tried.total <= budget:
                found, high = tried, middle
            else:
                low = middle + 1
        return found


def _advice(shape: Shape) -> str:
    return "lower context= or batch=" if shape.rows > 1 else "lower context="


def first_fitting(size: Callable[[float], int], budget: int, rates: Sequence[float]) -> float | None:
    """The first of rising rates whose size, which falls with the rate, is within a budget; None where none is."""
    low, high = 0, len(rates)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size(rates[middle]) <= budget else (middle + 1, high)
    return rates[low] if low < len(rates) else None


def _leaves(tree: Any) -> list[Any]:
    """Leaves as they are loaded: a packed weight is one."""
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QuantizedArray))
