"""No stage may pass on a value that is not finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uniql_jax.errors import UserError


@jax.jit
def _finite(leaves: list[Any]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def first_nonfinite(tree: Any) -> str | None:
    """The dotted name of the first leaf of a tree that holds NaN or infinity, None where there is none."""
    named = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    if not named:
        return None
    good = np.asarray(_finite([leaf for _, leaf in named]))
    return None if good.all() else _name(named[int(np.argmin(good))][0])


def _name(path: tuple[Any, ...]) -> str:
    parts = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path)
    return ".".join(map(str, parts))


def check_finite(tree: Any, what: str) -> None:
    """Raise a UserError that names the leaf, `what` saying whose it is, where one holds NaN or infinity."""
    name = first_nonfinite(tree)
    if name is not None:
        raise UserError(
            f"{what} {name} holds NaN or infinity: weights or activations of this model leave the range of float32"
        )
