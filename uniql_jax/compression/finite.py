"""Finds values that are not finite, so that no stage of a run passes them on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from uniql_jax.errors import UserError


@jax.jit
def _finite(leaves: list[Array]) -> Bool[Array, " leaves"]:
    """Whether each array holds finite values only: one reduction an array, one small result for all."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


@jax.jit
def peak(value: Float[Array, "..."]) -> Float[Array, ""]:
    """The largest absolute value: one number that is not finite when any of the array is not."""
    return jnp.max(jnp.abs(value))


def first_nonfinite(tree: Any) -> str | None:
    """The name of the first leaf that holds NaN or an infinity.

    Args:
        tree: any pytree of JAX or NumPy arrays and numbers. Integers and booleans are always finite and cost nothing.
            Arrays on a device are reduced there; a single array of booleans comes back.

    Returns:
        The leaf's path, its keys joined by dots ("attention.o"), "" for a tree that is one leaf; None when all is
        finite.
    """
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    on_device = [leaf for _, leaf in leaves if isinstance(leaf, jax.Array)]
    answers = iter(jax.device_get(_finite(on_device)) if on_device else ())
    for name, leaf in leaves:
        if not (next(answers) if isinstance(leaf, jax.Array) else np.isfinite(leaf).all()):
            return name
    return None


def check_finite(tree: Any, what: str) -> None:
    """Refuse to go on with a value that is not finite.

    Args:
        tree: as in `first_nonfinite`.
        what: whose leaves they are, for the message.

    Raises:
        UserError: naming the leaf.
    """
    name = first_nonfinite(tree)
    if name is not None:
        what = f"{what} {name}".rstrip()
        raise UserError(
            f"{what} holds NaN or infinity: weights or activations of this model leave the range of float32"
        )
