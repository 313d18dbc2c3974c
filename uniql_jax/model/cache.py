"""What decoding remembers: static shapes, pruned sizes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class LayerCache:
    """Keys [batch, slots, kv heads, 2 * pairs] (rotated) and values [batch, slots, kv heads, ranks] of one layer."""

    k: Float[Array, "b s g dk"]
    v: Float[Array, "b s g dv"]


@flax.struct.dataclass
class SsmCache:
    """State of one SSM block: the last inputs of its convolutions [batch, conv - 1, ...], and its states in float32
    [batch, SSM heads, channels, states].
    """

    x: Float[Array, "b w hd nh"]
    b: Float[Array, "b w ds g"]
    c: Float[Array, "b w ds g"]
    state: Float[Array, "b nh hd ds"]


@flax.struct.dataclass
class Cache:
    """State of a batch of sequences: one {kind: state} a layer, which slots hold tokens, and where the next one goes.

    `slot` is shared by the batch (padding sits on the left); `position` is each sequence's own count of real tokens.
    `empty`, known when code is traced, says that nothing was written yet: what is read then sees only itself.
    """

    layers: tuple[dict[str, Any], ...]
    valid: Bool[Array, "b s"]
    position: Int[Array, " b"]
    slot: Int[Array, ""]
    empty: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(self.layers))
