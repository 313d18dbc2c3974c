"""What decoding remembers: static shapes, pruned sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from uniql_jax.pallas_kernels.attention import Caches


def _resize(value: Shaped[Array, "..."] | Shaped[np.ndarray, "..."], axis: int, count: int) -> Any:
    """A prefix of an axis, or the axis with zeros behind it; numpy stays numpy."""
    have = value.shape[axis]
    if count <= have:
        return value[(slice(None),) * axis + (slice(0, count),)]
    pad = [(0, count - have if i == axis else 0) for i in range(value.ndim)]
    return (np if isinstance(value, np.ndarray) else jnp).pad(value, pad)


@flax.struct.dataclass
class LayerCache:
    """Keys [batch, slots, kv heads, 2 * pairs] (rotated) and values [batch, slots, kv heads, ranks] of one layer.

    In 8 bits they are int8 and have scales, bfloat16 [batch, slots, kv heads]; else those are None.
    """

    k: Any  # arrays; Any here and below, since jax.tree.map and jax.eval_shape may put anything into a pytree
    v: Any
    k_scale: Any = None
    v_scale: Any = None

    @property
    def caches(self) -> Caches:
        """The same as kernels take it."""
        return Caches(self.k, self.v, self.k_scale, self.v_scale)

    def resized(self, have: Mapping[str, int], keep: Mapping[str, int], pair: int) -> LayerCache:
        """The same tokens at other kept sizes: what goes is cut off, what was never stored is zero.

        Args:
            have: kept sizes now.
            keep: kept sizes wanted.
            pair: dimensions of one entry of the axis `qk`: 2 where it rotates, else 1.
        """
        split = pair * have["qk"]
        rotated = _resize(self.k[..., :split], 3, pair * keep["qk"])
        passed = _resize(self.k[..., split:], 3, keep.get("qk_pass", 0))
        join: Any = np if isinstance(rotated, np.ndarray) else jnp
        k = join.concatenate([rotated, passed], axis=3) if passed.shape[3] else rotated
        return dataclasses.replace(self, k=k, v=_resize(self.v, 3, keep["vo"]))


@flax.struct.dataclass
class SsmCache:
    """State of one SSM block: the last inputs of its convolutions, x [batch, conv - 1, channels, SSM heads], b and c
    [batch, conv - 1, states, groups], and its states in float32 [batch, SSM heads, channels, states].
    """

    x: Any
    b: Any
    c: Any
    state: Any

    def resized(self, have: Mapping[str, int], keep: Mapping[str, int], pair: int) -> SsmCache:
        """The same tokens at other kept sizes: what goes is cut off, what was never stored is zero."""
        channels, states = keep["ssm_head"], keep["ssm_state"]
        return SsmCache(
            x=_resize(self.x, 2, channels),
            b=_resize(self.b, 2, states),
            c=_resize(self.c, 2, states),
            state=_resize(_resize(self.state, 2, channels), 3, states),
        )


@flax.struct.dataclass
class Cache:
    """State of a batch of sequences: one {kind: state} a layer, which slots hold tokens, and where the next one goes.

    A sequence's tokens lie in the slots from its `start` to `slot`, which the batch shares; what lies outside is never
    read. `start` is None where it is 0 for all, and code is compiled for that. `empty`, known when code is traced, says
    that nothing was written yet: what is read then sees only itself.
    """

    layers: tuple[dict[str, Any], ...]
    start: Any  # int32 [batch], or None
    slot: Any  # int32
    empty: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def bits(self) -> int:
        """8 where keys and values are int8 with scales, else 16, as `init_cache` takes it."""
        states = (state for layer in self.layers for state in layer.values() if isinstance(state, LayerCache))
        return 8 if any(state.k_scale is not None for state in states) else 16

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(self.layers))
