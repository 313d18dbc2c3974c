"""Second pass, layer by layer: rotate, refit for all rates at once, quantize.

Two streams of calibration windows run side by side: the finished model's own (so that each layer is fitted to what it
will really receive) and, for the refit, the unpruned model's, whose output is the target.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax import elastic
from uniql_jax.checkpoint import reachable_bias, stored
from uniql_jax.compression.math.gptq import quantize
from uniql_jax.compression.math.gram import gram
from uniql_jax.compression.settings import REFIT_RATES, CompressionSettings
from uniql_jax.config import ModelConfig
from uniql_jax.model.layers import KINDS
from uniql_jax.model.layers.context import full_context
from uniql_jax.plan import Plan
from uniql_jax.weights.fake_quantized import unrounded_steps
from uniql_jax.weights.quantized import QuantizedArray, dense, from_codes

Block = Mapping[str, Any]
Keep = dict[str, Int[np.ndarray | Array, " b"]]


def refit_rates(count: int, share: float) -> Float[np.ndarray, " count"]:
    """Prune rate at which each calibration window is seen: `share` of them 0, the others REFIT_RATES in turn.

    Spread evenly, so that every rate sees every kind of text.
    """
    pruned = np.floor(np.arange(1, count + 1) * (1 - share)) > np.floor(np.arange(count) * (1 - share))
    turn = (np.cumsum(pruned) - 1) % len(REFIT_RATES)
    return np.where(pruned, np.asarray(REFIT_RATES)[turn], 0.0)


def keep_per_window(plan: Plan, rates: Sequence[float]) -> tuple[Keep, ...]:
    """Kept sizes per layer and axis, one count for every window."""
    by_rate = {rate: plan.keep(rate) for rate in set(map(float, rates))}
    return tuple(
        {axis: np.asarray([by_rate[float(r)][i][axis] for r in rates], np.int32) for axis in kept}
        for i, kept in enumerate(plan.keep(0.0))
    )


def total(parts: Iterable[Any]) -> Any:
    """Sum of what batches give, arrays or tuples of arrays, holding one batch's at a time."""
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)


def _hidden(config: ModelConfig, kind: str, leaves: Block, x: Array, keep: Keep | None) -> Array:
    context = full_context(jnp.ones(x.shape[:2], bool), padded=False)._replace(keep=keep)
    block = KINDS[kind]
    return block.inner(config, leaves, block.read(config, leaves, x), context)


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def read_gram(config: ModelConfig, kind: str, leaves: Block, x: Float[Array, "b t h"]) -> Float[Array, "h h"]:
    """Summed Gram of what the block's input matrices receive."""
    return gram(KINDS[kind].read(config, leaves, x), x.shape[-1])


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def hidden_gram(
    config: ModelConfig, kind: str, leaves: Block, x: Float[Array, "b t h"], keep: Keep | None
) -> Float[Array, "k k"]:
    """Summed Gram of what the block's output matrix receives, masked per window when `keep` is given."""
    hidden = _hidden(config, kind, leaves, x, keep)
    return gram(hidden, int(np.prod(hidden.shape[2:])))


@functools.partial(jax.jit, static_argnames=("config", "kind", "target"))
def hidden_gram_and_cross(
    config: ModelConfig, kind: str, leaves: Block, teacher: Block, x: Array, t: Array, keep: Keep, target: str
) -> tuple[Float[Array, "k k"], Float[Array, "k h"]]:
    """`hidden_gram`, and the product of those inputs with what the output matrix should give.

    "stream": the unpruned stream after the block less the finished stream before it, so that earlier losses are made
    up for as well; "local": what the unpruned block adds.
    """
    hidden = _hidden(config, kind, leaves, x, keep)
    rows = hidden.reshape(-1, int(np.prod(hidden.shape[2:])))
    wanted = KINDS[kind].write(teacher, _hidden(config, kind, teacher, t, None))
    wanted = wanted - KINDS[kind].write(teacher, jnp.zeros_like(hidden))  # the bias is added anyway
    if target == "stream":
        wanted = wanted + t - x
    return rows.T @ rows, rows.T @ wanted.reshape(-1, wanted.shape[-1])


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def advance(
    config: ModelConfig, kind: str, leaves: Block, x: Float[Array, "b t h"], keep: Keep | None
) -> Float[Array, "b t h"]:
    """The stream after the block."""
    return x + KINDS[kind].write(leaves, _hidden(config, kind, leaves, x, keep))


@jax.jit
def refit(
    gram: Float[Array, "k k"], cross: Float[Array, "k h"], weight: Float[Array, "k h"], ridge: float | Float[Array, ""]
) -> Float[Array, "k h"]:
    """argmin of sum ||y - a W||^2 + lambda ||W - weight||^2, lambda = ridge * mean diagonal of the Gram matrix.

    One matrix for all rates: the Gram holds every rate's masked inputs (method: nested refit).
    """
    amount = ridge * jnp.mean(jnp.diagonal(gram)) + jnp.finfo(jnp.float32).tiny
    factor = jax.scipy.linalg.cho_factor(gram + amount * jnp.eye(gram.shape[0], dtype=gram.dtype))
    return weight + jax.scipy.linalg.cho_solve(factor, cross - gram @ weight)


class Packed(NamedTuple):
    """A packed leaf and, where it was asked for, what was rounded to its integers, in steps and of its logical shape
    (uniql_jax/rounded.py).
    """

    weight: QuantizedArray
    position: Float[Array, "..."] | None


def _quantize_rows(
    rows: Float[Array, "rows width"], hessian: Array | None, options: CompressionSettings, group: int, keep: bool
) -> tuple[Int[Array, "rows width"], Float[Array, "rows groups"], Float[Array, "rows width"] | None]:
    codes, scale, rounded = quantize(
        rows,
        hessian,
        bits=options.bits,
        group=group,
        search=options.scale_search,
        propagate=options.rounding == "gptq",
        damping=options.damping,
        keep=keep,
    )
    return codes, scale, None if rounded is None else unrounded_steps(rounded, codes, scale, group)


def pack_leaf(
    leaf: elastic.Leaf,
    value: Float[Array, "..."],
    hessian: Array | None,
    options: CompressionSettings,
    group: int,
    keep: bool = False,
) -> Packed:
    """Pack one matrix leaf; `hessian` is the Gram of what it contracts, None rounds to nearest. `keep`: what was
    rounded as well.
    """
    width = value.shape[-1] if leaf.contract == "last" else int(np.prod(value.shape[:-1]))
    rows = value.reshape(-1, width) if leaf.contract == "last" else value.reshape(width, -1).T
    codes, scale, places = _quantize_rows(rows, hessian, options, group, keep)
    weight = from_codes(codes, scale, bits=options.bits, group=group, contract=str(leaf.contract), shape=value.shape)
    if places is not None:
        places = (places if leaf.contract == "last" else places.T).reshape(value.shape)
    return Packed(weight, places)


def pack_together(
    values: Mapping[str, Float[Array, "..."]],
    hessian: Array | None,
    options: CompressionSettings,
    group: int,
    keep: bool = False,
) -> dict[str, Packed]:
    """Pack matrices that contract the same input as their last dimension: one Hessian, one factorization for all."""
    flat = {name: value.reshape(-1, value.shape[-1]) for name, value in values.items()}
    codes, scales, places = _quantize_rows(jnp.concatenate(list(flat.values())), hessian, options, group, keep)
    ends = np.cumsum([len(rows) for rows in flat.values()])
    done = {}
    for (name, value), end in zip(values.items(), ends, strict=True):
        own = slice(end - len(flat[name]), end)
        shape = value.shape
        weight = from_codes(codes[own], scales[own], bits=options.bits, group=group, contract="last", shape=shape)
        done[name] = Packed(weight, None if places is None else places[own].reshape(shape))
    return done


class Finisher:
    """Carries the streams through the layers and turns each layer into its stored form."""

    def __init__(
        self,
        config: ModelConfig,
        options: CompressionSettings,
        groups: Mapping[str, int],
        dtype: Any,
        x: list[Array],
        teacher: list[Array] | None,
        keep: Sequence[tuple[Keep, ...]] | None,
        keep_positions: bool = False,
    ):
        """x, teacher: batches [b, t, h]; keep: per batch, kept sizes per layer (with `teacher`, for the refit);
        keep_positions: what was rounded is kept as well.
        """
        self.config, self.options, self.groups, self.dtype = config, options, groups, dtype
        self.x, self.teacher, self.keep = x, teacher, keep
        self.keep_positions = keep_positions
        self.positions: dict[str, dict[str, Array]] = {}

    def _keep(self, batch: int, layer: int) -> Keep | None:
        return self.keep[batch][layer] if self.keep is not None else None

    def replay(self, i: int, finished: Mapping[str, Block], original: Mapping[str, Block]) -> None:
        """Move the streams past a layer that an earlier run finished."""
        for kind in self.config.pattern[i]:
            self._advance(i, kind, self._dense(finished[kind]), original[kind])

    def _dense(self, block: Block) -> dict[str, Any]:
        return {name: dense(value) for name, value in block.items()}

    def _advance(self, i: int, kind: str, working: Block, original: Block) -> None:
        self.x = [advance(self.config, kind, working, x, self._keep(b, i)) for b, x in enumerate(self.x)]
        if self.teacher is not None:
            self.teacher = [advance(self.config, kind, original, t, None) for t in self.teacher]

    def layer(self, i: int, layer: Mapping[str, Block]) -> dict[str, dict[str, Any]]:
        """Finish layer i (dense, sorted, rotated, float32) and move the streams past it.

        With `keep_positions`, `positions` then holds where its packed leaves lay before they were rounded, {kind:
        {leaf: steps}}.
        """
        self.positions = {kind: {} for kind in self.config.pattern[i]}
        return {kind: self._block(i, kind, layer[kind]) for kind in self.config.pattern[i]}

    def _block(self, i: int, kind: str, original: Block) -> dict[str, Any]:
        config, options = self.config, self.options
        leaves = elastic.leaves(config, kind)
        tokens = sum(x.shape[0] * x.shape[1] for x in self.x)
        done: dict[str, Any] = {}
        working = dict(original)

        def settle(name: str, value: Packed | np.ndarray) -> None:
            if isinstance(value, Packed) and value.position is not None:
                self.positions[kind][name] = value.position
            kept = value.weight if isinstance(value, Packed) else value
            done[name], working[name] = kept, dense(kept)

        def output(name: str, value: Array, hessian: Array | None) -> None:
            leaf = leaves[name]
            if options.packed:
                settle(name, pack_leaf(leaf, value, hessian, options, self.groups[leaf.dims[0]], self.keep_positions))
            else:
                settle(name, stored(leaf, value, self.dtype))

        hessian = None
        if options.packed and (options.rounding == "gptq" or options.scale_search):
            hessian = total(read_gram(config, kind, original, x) for x in self.x) / tokens
        reading = {name: original[name] for name, leaf in leaves.items() if options.packed and leaf.contract == "last"}
        if reading:
            packed = pack_together(reading, hessian, options, self.groups["embed"], self.keep_positions)
            for name, value in packed.items():
                settle(name, value)
        for name, leaf in leaves.items():
            if leaf.contract != "first" and name not in reading:
                settle(name, stored(leaf, original[name], self.dtype))
        for name, leaf in leaves.items():
            if leaf.contract != "first":
                continue
            weight = original[name]
            if self.teacher is not None and self.keep is not None:
                inner_gram, cross = total(
                    hidden_gram_and_cross(config, kind, working, original, x, t, keep[i], options.refit_target)
                    for x, t, keep in zip(self.x, self.teacher, self.keep, strict=True)
                )
                inner_gram, cross = inner_gram / tokens, cross / tokens
                flat = weight.reshape(-1, weight.shape[-1])
                weight = refit(inner_gram, cross, flat, options.refit_ridge).reshape(weight.shape)
                output(name, weight, inner_gram)
            elif hessian is not None:
                grams = (hidden_gram(config, kind, working, x, self._keep(b, i)) for b, x in enumerate(self.x))
                output(name, weight, total(grams) / tokens)
            else:
                output(name, weight, None)
        done = reachable_bias(config, kind, done)
        self._advance(i, kind, self._dense(done), original)
        return done
