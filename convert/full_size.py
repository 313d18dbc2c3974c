"""Leaves of a pruned block at the sizes of the original: RoPE pairs at their places, zeros for what was cut."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from uniql_jax import elastic
from uniql_jax.config import ModelConfig

ROUNDING = 1e-5
"""How far, as a share of itself, a frequency may be from the model's: processors round powers differently, and a
checkpoint is not always exported where it was made.
"""


def original_pairs(config: ModelConfig, inv_freq: Float[np.ndarray, "kept kv_head"]) -> Int[np.ndarray, "kept kv_head"]:
    """Where each kept RoPE pair stood before sorting, read off its frequency; each place is given out once.

    Pairs with equal frequencies are interchangeable.

    Args:
        config: the model.
        inv_freq: frequencies of the kept pairs, float32.

    Returns:
        The original index of every pair.

    Raises:
        ValueError: a frequency that the model does not have.
    """
    assert config.rope is not None
    own = config.rope.inv_freq().astype(np.float64)
    if own.all() and not np.any(inv_freq):  # a layer that does not rotate: no pair differs from another
        return np.broadcast_to(np.arange(len(inv_freq))[:, None], inv_freq.shape)
    found = np.empty(inv_freq.shape, np.int64)
    for head in range(inv_freq.shape[1]):
        free = np.ones(len(own), bool)
        for row, frequency in enumerate(np.asarray(inv_freq[:, head], np.float64)):
            apart = np.where(free, np.abs(own - frequency), np.inf)
            place = int(np.argmin(apart))
            if not apart[place] <= ROUNDING * frequency:
                raise ValueError(f"inv_freq holds {frequency}, which is not (or no longer) a frequency of this model")
            found[row, head], free[place] = place, False
    return found


def full_size(config: ModelConfig, kind: str, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leaves at full size, zeros for what was cut: RoPE pairs at their original places, the rest in front.

    `inv_freq` has the frequency of every pair that a leaf has, or of more.
    """
    places = original_pairs(config, values["inv_freq"]) if "inv_freq" in values else None
    full = {}
    for name, value in values.items():
        leaf = elastic.BLOCKS[kind][name]
        out = np.zeros(elastic.shape(config, leaf), value.dtype)
        if leaf.axis == "qk" and places is not None:
            kept = places[: value.shape[0]]
            kept = np.repeat(kept, config.query_groups, axis=1) if "head" in leaf.dims else kept
            head = leaf.dims.index("head" if "head" in leaf.dims else "kv_head")
            index = kept.reshape([n if d in (0, head) else 1 for d, n in enumerate(value.shape)])
            np.put_along_axis(out, index, value, axis=0)
        else:
            out[tuple(slice(n) for n in value.shape)] = value
        full[name] = out
    return full
