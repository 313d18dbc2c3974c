"""A weight that trains as it will be stored: rounded to its grid in the forward pass, moved by low-rank factors, or by
a change of its own.

Gradients pass through the rounding as if it were not there (straight-through, Bengio et al., arXiv 1308.3432). What
GPTQ rounded is kept to a fraction of a step, so that training begins with exactly GPTQ's integers and knows which of
them are close to the next.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from uniql_jax.weights.lora import MadeDense
from uniql_jax.weights.quantized import QuantizedArray, from_codes, limits
from uniql_jax.weights.runs import scale_of_runs, scale_rows

FRACTION = 0.46
"""How far from its integer an unrounded weight may lie: below one half, by more than float16 is apart at 127."""


@flax.struct.dataclass
class FakeQuantizedArray(MadeDense):
    """round(unrounded + scale * left @ right / step) * step, clipped to the grid.

    `unrounded` is the weight in steps, float16, of the logical shape [*lead, h]; `step` is the scale of every group,
    [*lead, groups] for contract "last", [groups, h] for "first", both as in a QuantizedArray of this `run`. `left`
    [*lead, rank] and `right` [rank, h] are as in a LoraArray; `change`, in their stead, is of the weight's shape and
    in steps. Without either nothing moves.
    """

    unrounded: Any  # arrays as above; Any, since jax.tree.map and jax.eval_shape may put anything into a pytree
    step: Any
    left: Any = None
    right: Any = None
    change: Any = None
    bits: int = flax.struct.field(pytree_node=False, default=4)
    group: int = flax.struct.field(pytree_node=False, default=128)
    contract: str = flax.struct.field(pytree_node=False, default="last")
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    run: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.unrounded.shape

    def take_prefix(self, count: int) -> FakeQuantizedArray:
        """The first `count` entries of the leading axis. Raises ValueError when the cut would split a group."""
        step, unrounded = self.step, self.unrounded[:count]
        if self.contract == "last":
            step = step[:count]
        elif count != self.shape[0]:
            inner = math.prod(self.shape[1:-1])
            if (count % self.run) if self.run > 1 else (count * inner % self.group):
                raise ValueError(f"a cut at {count} splits a quantization group of {self.group}")
            step = step[: scale_rows(count, inner, self.group, self.run)]
        left, change = (None if part is None else part[:count] for part in (self.left, self.change))
        return dataclasses.replace(self, unrounded=unrounded, step=step, left=left, change=change)

    def dense(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The weight as it would be stored; see `value`."""
        return self.value().astype(dtype)

    def steps(self) -> Float[Array, "..."]:
        """The step of every weight."""
        step = jnp.asarray(self.step, jnp.float32)
        if self.contract == "last":
            return jnp.repeat(step, self.group, axis=-1)[..., : self.shape[-1]]
        count, inner = self.shape[0], math.prod(self.shape[1:-1])
        if self.run > 1:
            return scale_of_runs(step, count, inner, self.group, 1).reshape(self.shape)
        return jnp.repeat(step, self.group, axis=0)[: count * inner].reshape(self.shape)

    def _update(self) -> Float[Array, "..."]:
        if self.change is not None:
            return jnp.asarray(self.change, jnp.float32) * self.steps()
        if self.left is None:
            return jnp.zeros(self.shape, jnp.float32)
        # Half a step decides: float32 products, and few of them, since the rank is low.
        return self.scale * jnp.matmul(self.left, self.right, precision="highest")

    def codes(self) -> Int[Array, "..."]:
        """The integers, int8, of the logical shape."""
        return _on_grid(self._places(self._update()), self.bits).astype(jnp.int8)

    def _places(self, update: Array) -> Float[Array, "..."]:
        steps = self.steps()
        inverse = jnp.where(steps == 0, 0.0, 1.0 / jnp.where(steps == 0, 1.0, steps))
        return jnp.asarray(self.unrounded).astype(jnp.float32) + update * inverse

    def value(self) -> Float[Array, "..."]:
        """The weight as it would be stored, float32; differentiable in `left` and `right`, or `change`."""
        low, high = limits(self.bits)
        update = self._update()
        places = self._places(jax.lax.stop_gradient(update))
        # Beyond the grid's ends a small move changes nothing.
        inside = (places > low - 0.5) & (places < high + 0.5)
        return _passed(update, _on_grid(places, self.bits) * self.steps(), inside)

    def quantized(self) -> QuantizedArray:
        """What is stored of it."""
        shape, step = self.shape, jnp.asarray(self.step)
        last = self.contract == "last"
        flat = self.codes().reshape(-1, shape[-1])
        step = step.reshape(-1, step.shape[-1])
        codes, step = (flat, step) if last else (flat.T, step.T)
        return from_codes(
            codes, step, bits=self.bits, group=self.group, contract=self.contract, shape=shape, run=self.run
        )


def _on_grid(places: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    return jnp.clip(jnp.round(places), *limits(bits))


@jax.custom_vjp
def _passed(update: Array, value: Array, inside: Array) -> Array:
    return value


def _passed_forward(update: Array, value: Array, inside: Array) -> tuple[Array, Array]:
    return value, inside


def _passed_backward(inside: Array, cotangent: Array) -> tuple[Array, None, None]:
    return jnp.where(inside, cotangent, 0.0), None, None


_passed.defvjp(_passed_forward, _passed_backward)


def unrounded_steps(
    rounded: Float[Array, "rows width"], codes: Int[Array, "rows width"], scale: Float[Array, "rows groups"], group: int
) -> Float[Array, "rows width"]:
    """What was rounded to `codes`, in steps, float16: less than half a step from them."""
    steps = jnp.repeat(scale.astype(jnp.float32), group, axis=1)[:, : codes.shape[1]]
    apart = rounded / jnp.where(steps == 0, 1.0, steps) - codes
    return (codes + jnp.clip(apart, -FRACTION, FRACTION)).astype(jnp.float16)


def from_quantized(weight: QuantizedArray, unrounded: Float[np.ndarray | Array, "..."]) -> FakeQuantizedArray:
    """A packed weight, in its plain layout, as one that trains; `unrounded` of its logical shape."""
    return FakeQuantizedArray(
        unrounded, weight.scale, bits=weight.bits, group=weight.group, contract=weight.contract, run=weight.run
    )
