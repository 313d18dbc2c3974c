"""What a checkpoint needs at each prune rate, before anything of it is loaded, and the least rate that fits a budget.

Weights and cache follow from shapes; the work space of the compiled steps is what the compiler reports for them.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from uniql_jax import elastic
from uniql_jax.checkpoint import Checkpoint
from uniql_jax.checkpoint_leaves import assembled
from uniql_jax.console import format_bytes
from uniql_jax.errors import UserError
from uniql_jax.joint_plan import Kept
from uniql_jax.limits import MAX_PRUNE_RATE
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.pallas_kernels.dequant_matmul import preferred_layout
from uniql_jax.pallas_kernels.dequant_matmul.three_bit import BITS
from uniql_jax.runtime.choice import Choice, Sizes, rate_size
from uniql_jax.runtime.compiled import Compiled, Shape
from uniql_jax.runtime.programs import Programs, tree_bytes
from uniql_jax.sizes import memory_size
from uniql_jax.weights.mixed import MixedArray
from uniql_jax.weights.nested import NestedArray
from uniql_jax.weights.quantized import QuantizedArray

SLACK = 0.02
"""Share of a budget that may stay unused, rather than that more rates are compiled for."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that one size of a checkpoint needs: weights, cache, and the compiled steps' work space."""

    size: Choice
    weights: int
    cache: int
    work: int

    @property
    def rate(self) -> float:
        """The prune rate, or of a setting of the joint plan the fraction that it leaves out."""
        return self.size.shown_rate

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
            raise UserError(f"a share of the memory is above 0 % and at most 100 %, not {budget[:60]!r}")
        return int(share * capacity())
    if isinstance(budget, str):
        try:
            return memory_size(budget)
        except ValueError as error:
            raise UserError(f"{error}, or 80%") from None
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not 1 <= budget < 2**63:
        raise UserError(f"a memory budget is a number of bytes, or looks like 3GiB or 80%, not {repr(budget)[:60]}")
    return int(budget)


def _leaf_shape(
    checkpoint: Checkpoint, name: str, leaf: elastic.Leaf, keep: Any, dtype: Any, tiles: bool, kept: Kept | None = None
) -> Any:
    """A leaf as `loading.place` gives it, with jax.ShapeDtypeStruct for arrays; `kept` where bits may differ."""
    tensors = checkpoint.tensors
    if kept is not None and kept.full < kept.entries and f"{name}.leading" in tensors:
        rest = _planes_shape(checkpoint, name, leaf, kept.entries - kept.full, dtype)
        if not kept.full:
            return rest
        return MixedArray(_leaf_shape(checkpoint, name, leaf, {leaf.dims[0]: kept.full}, dtype, tiles), rest)
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
        held = {"data": data, "scale": part(parts[0][1])}
        weight: Any = assembled(checkpoint.config, checkpoint.meta, leaf, held, keep)
        layout = preferred_layout(bits=weight.bits, group=weight.group, contract=weight.contract, dtype=dtype)
        return jax.eval_shape(lambda w: w.in_layout(layout), weight) if tiles and layout != "plain" else weight
    shape = elastic.shape(checkpoint.config, leaf, keep)
    return jax.ShapeDtypeStruct(shape, dtype if leaf.contract else jnp.float32)


def _planes_shape(checkpoint: Checkpoint, name: str, leaf: elastic.Leaf, count: int, dtype: Any) -> Any:
    """The last `count` entries of a weight of which none has all bits, in planes or tiles."""
    axis, whole = leaf.dims[0], elastic.sizes(checkpoint.config)[leaf.dims[0]]

    def part(name_: str) -> jax.ShapeDtypeStruct:
        stored, shape = checkpoint.tensors[f"{name}.{name_}"]
        rows = None if count == whole else checkpoint.rows(leaf, f".{name_}", {axis: count})
        return jax.ShapeDtypeStruct((shape[0] if rows is None else rows, *shape[1:]), stored)

    def none(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((0, *shape.shape[1:]), shape.dtype)

    coarse = part("coarse")
    parts = {"leading": part("leading"), "last": none(part("last")), "fine": none(coarse), "coarse": coarse}
    found: Any = assembled(checkpoint.config, checkpoint.meta, leaf, parts, {axis: count})
    layout = preferred_layout(bits=BITS, group=found.group, contract=found.contract, dtype=dtype)
    return found if layout == "plain" else found.tiled()


def abstract_model(checkpoint: Checkpoint, size: Choice, dtype: Any) -> CausalLM:
    """The model as `load_size` gives it, with jax.ShapeDtypeStruct in place of every array; nothing is read."""
    layers = []
    for i, kept in enumerate(size.kept(checkpoint)):
        keep = {axis: one.entries for axis, one in kept.items()}
        layers.append(
            {
                kind: {
                    name: _leaf_shape(
                        checkpoint, f"layers.{i}.{kind}.{name}", leaf, keep, dtype, True, kept.get(leaf.axis or "")
                    )
                    for name, leaf in elastic.leaves(checkpoint.config, kind).items()
                }
                for kind in checkpoint.config.pattern[i]
            }
        )
    top = {
        name: _leaf_shape(checkpoint, name, leaf, None, dtype, name != "embed", size.kept_top(checkpoint, name))
        for name, leaf in elastic.TOP.items()
        if {name, f"{name}.data", f"{name}.last"} & set(checkpoint.tensors)
    }
    plan = checkpoint.plan if size.setting is None else None
    return CausalLM(checkpoint.config, top | {"layers": layers}, plan, size.rate, None, dtype)


class Needs:
    """What a checkpoint needs at any size, for a batch and a context; programs that were compiled are kept.

    Sizes are those of `choice`; a number stands for a prune rate.
    """

    def __init__(self, checkpoint: Checkpoint, shape: Shape, dtype: Any, programs: Programs, batches: int = 1):
        """batches: how many run at a time at most, each with a cache of its own and all with the same weights."""
        self.checkpoint, self.shape, self.dtype = checkpoint, shape, dtype
        self.batches = batches
        self.highest = MAX_PRUNE_RATE if checkpoint.plan is not None else 0.0
        self.sizes = Sizes(checkpoint)
        self._programs = programs
        self._compiled: dict[Choice, Compiled] = {}
        self._work: dict[Choice, int] = {}

    def size(self, size: Choice | float) -> Choice:
        """A size, or that of a prune rate."""
        return size if isinstance(size, Choice) else rate_size(self.checkpoint, size)

    def compiled(self, size: Choice | float) -> Compiled:
        """The steps at a size."""
        size = self.size(size)
        if size not in self._compiled:
            model = abstract_model(self.checkpoint, size, self.dtype)
            self._compiled[size] = Compiled(self._programs, model, self.shape)
        return self._compiled[size]

    def weights(self, size: Choice | float) -> int:
        """Bytes of the weights as they are held."""
        return tree_bytes(self.compiled(size).params)

    def cache(self, size: Choice | float) -> int:
        """Bytes of the cache of all rows of one batch, and of its marks."""
        return self.compiled(size).state_bytes

    def work(self, size: Choice | float) -> int:
        """Bytes of work space, by compiling the steps."""
        size = self.size(size)
        if size not in self._work:
            largest = 0
            if jax.default_backend() == "cpu":  # where a leaf is read into the memory that it will stay in
                largest = max(tree_bytes(leaf) for leaf in _leaves(self.compiled(size).params)) - self.cache(size)
            self._work[size] = max(self.compiled(size).work_space(), largest)
        return self._work[size]

    def at(self, size: Choice | float) -> Need:
        """All that a size needs."""
        size = self.size(size)
        return Need(size, self.weights(size), self.batches * self.cache(size), self.work(size))

    def fitting(self, budget: int, sizes: Sequence[Choice | float] | None = None) -> Need:
        """What the largest size that fits a budget needs, or one next to it that uses all but a fiftieth.

        Args:
            budget: bytes.
            sizes: to choose from, the largest first, or prune rates; None: every thousandth of a rate, or the settings
                of a joint plan.

        Raises:
            UserError: not even the smallest size fits; says what it needs.
        """
        choices = self.sizes if sizes is None else sizes
        known: dict[int, int] = {}  # work space by the number of a choice: every one has to be compiled
        low, high, found = 0, len(choices), None
        while low < high:
            index = _first_fitting(lambda i: self.held(choices[i]) + _between(known, i), budget, range(low, high))
            if index is None and found is not None:
                break  # by what is known of its neighbours, no larger one fits
            index = high - 1 if index is None else index
            need = self.at(choices[index])
            known[index] = need.work
            if need.total > budget:
                low, tried = index + 1, need
                continue
            high, found = index, need
            if budget - need.total <= SLACK * budget:
                break
        if found is None:
            advice = "lower context= or batch=" if self.shape.rows > 1 else "lower context="
            raise UserError(
                f"{format_bytes(budget)} is too little: {tried.size} needs {tried} "
                f"for {self.shape.rows} x {self.shape.context} tokens; {advice}"
            )
        return found

    def held(self, size: Choice | float) -> int:
        """Bytes of weights and caches, from shapes alone."""
        return self.weights(size) + self.batches * self.cache(size)


def _between(known: Mapping[int, int], index: int) -> float:
    """A value at a number, along straight lines between those that are known, level beyond them; 0 where none is."""
    if not known:
        return 0.0
    where = sorted(known)
    return float(np.interp(index, where, [known[number] for number in where]))


def _first_fitting(size: Callable[[int], float], budget: int, within: range) -> int | None:
    """The first number of ever smaller choices that is within a budget; None where none is."""
    low, high = within.start, within.stop
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) <= budget else (middle + 1, high)
    return low if low < within.stop else None


def _leaves(tree: Any) -> list[Any]:
    """Leaves as they are loaded: a packed weight is one."""
    kinds = QuantizedArray, NestedArray, MixedArray
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kinds))
