"""The order in which a weight that contracts its leading dimensions is stored, where groups lie inside a head.

Entries of the sorted axis come in runs: the first `run` entries of one head, then of the next, then the next `run`
entries of the first head. A run of 1 is the order of the logical shape. Runs divide a cut unit, so a prefix stays one.
"""

from __future__ import annotations

from typing import Any, TypeVar

from jaxtyping import Shaped

T = TypeVar("T", bound=Any)


def to_runs(value: T, inner: int, run: int, axis: int = 0) -> T:
    """Values along `axis` from logical order, [count, inner], to stored order, [count / run, inner, run].

    Args:
        value: an array of numpy or JAX.
        inner: entries of the dimensions between the sorted one and the features.
        run: entries of a run.
        axis: the axis, not negative.

    Returns:
        An array of the same shape.
    """
    return _turned(value, (run, inner), axis) if run > 1 else value


def from_runs(value: T, inner: int, run: int, axis: int = 0) -> T:
    """Inverse of `to_runs`."""
    return _turned(value, (inner, run), axis) if run > 1 else value


def _turned(value: Any, parts: tuple[int, int], axis: int) -> Any:
    lead, rest = value.shape[:axis], value.shape[axis + 1 :]
    return value.reshape(*lead, -1, *parts, *rest).swapaxes(axis + 1, axis + 2).reshape(value.shape)


def scale_rows(count: int, inner: int, group: int, run: int) -> int:
    """Scales of a feature: of whole and begun groups, which span `inner` where a run is 1."""
    return -(-count // group) * inner if run > 1 else -(-count * inner // group)


def scale_of_runs(scale: Shaped[Any, "groups features"], count: int, inner: int, group: int, run: int) -> Any:
    """The scale of every run of `count` entries, [count / run * inner, features], from those of the groups."""
    features = scale.shape[-1]
    return scale.reshape(-1, inner, features).repeat(group // run, axis=0)[: count // run].reshape(-1, features)
