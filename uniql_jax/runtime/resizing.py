"""Weights of a layer at other kept sizes: suffixes are dropped in memory, or read from disk and appended.

On a CPU arrays are numpy's, so that nothing is compiled; elsewhere one small program a layer is, once per change.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uniql_jax import elastic
from uniql_jax.checkpoint import Checkpoint
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.pallas_kernels.dequant_matmul import tiling
from uniql_jax.runtime import renesting
from uniql_jax.runtime.budget import Needs
from uniql_jax.runtime.choice import Choice
from uniql_jax.runtime.loading import in_form
from uniql_jax.runtime.programs import Programs
from uniql_jax.weights.quantized import QuantizedArray

Layer = Mapping[str, Mapping[str, Any]]
Keep = Mapping[str, int]


def on_host() -> bool:
    """Whether arrays lie in the host's memory, where numpy can cut them."""
    return jax.default_backend() == "cpu"


CACHES = ("read-again", "extend")
"""What becomes of caches when weights grow."""
ALIGNMENT = 64
"""Bytes that JAX wants an array on a CPU to begin at a multiple of."""


def check_policy(cache: str) -> str:
    """One of `CACHES`, or a UserError."""
    if cache not in CACHES:
        raise UserError(f"cache must be one of {', '.join(CACHES)}, not {cache!r}")
    return cache


def return_memory() -> None:
    """Give what was freed back to the system; glibc keeps it otherwise."""
    if on_host() and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def resize(
    programs: Programs, checkpoint: Checkpoint, model: CausalLM, size: Choice, states: list | None, dtype: Any
) -> None:
    """Bring every layer of a model, in place, to another size of its checkpoint, one after another.

    Args:
        programs: keeps what is compiled for it.
        checkpoint: what the model was loaded from; missing bytes are read of it.
        model: at any sizes, also at those that an interrupted call left.
        size: wanted.
        states: caches of the layers, cut or filled up in the same way; None: there are none.
        dtype: of dense weights.
    """
    pair, layers = elastic.sizes(checkpoint.config)["pair"], model.params["layers"]
    nested = checkpoint.joint_plan is not None
    nested = nested and (on_host() or size.setting is not None or renesting.has_planes(dict(model.params)))
    for i, (have, keep) in enumerate(zip(model.keep, size.keep(checkpoint), strict=True)):
        if states is not None and have != keep:
            states[i] = cut_state(programs, states[i], have, keep, pair)
        if nested:
            renesting.renest(checkpoint, model.params, size, i, dtype, _joined)
        if nested or have == keep:
            continue
        between = {axis: min(have[axis], keep[axis]) for axis in keep}
        if between != have:
            layers[i] = cut(programs, layers[i], have, between)
        if keep != between:
            layers[i] = grow(programs, checkpoint, i, layers[i], between, keep, dtype)
    if nested:
        renesting.renest(checkpoint, model.params, size, None, dtype, _joined)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of numpy as one, in memory of its own."""
    count = sum(len(part) for part in parts)
    return np.concatenate(parts, out=_aligned((count, *parts[0].shape[1:]), parts[0].dtype))


def _apply(programs: Programs, name: Any, function: Any, *args: Any, joins: bool = False) -> Any:
    """Run a function that slices, or that joins: by numpy into memory of its own, or compiled."""
    if on_host():
        done = function(*jax.tree.map(np.asarray, args))
        return jax.device_put(done if joins else jax.tree.map(_owned, done), jax.devices()[0])
    return programs.call(name, function, *jax.tree.map(jnp.asarray, args))


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An empty array at an address that JAX takes as it is, where it would copy from any other."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count].view(dtype).reshape(shape)


def _owned(value: np.ndarray) -> np.ndarray:
    """A copy: JAX would go on with a view, which holds on to what was cut off."""
    out = _aligned(value.shape, value.dtype)
    np.copyto(out, value)
    return out


def _changed(layer: Layer, have: Keep, keep: Keep) -> dict[str, dict[str, Any]]:
    """The leaves that other kept sizes concern."""
    return {
        kind: {
            name: value
            for name, value in block.items()
            if (axis := elastic.BLOCKS[kind][name].axis) is not None and keep[axis] != have[axis]
        }
        for kind, block in layer.items()
    }


def _merged(layer: Layer, new: Layer) -> dict[str, dict[str, Any]]:
    return {kind: dict(block) | dict(new[kind]) for kind, block in layer.items()}


def cut(programs: Programs, layer: Layer, have: Keep, keep: Keep) -> dict[str, dict[str, Any]]:
    """A layer without what it has beyond the kept sizes `keep`, none of which is larger than in `have`."""
    found = _changed(layer, have, keep)
    slices = functools.partial(elastic.slice_layer, keep=dict(keep))
    return _merged(layer, _apply(programs, ("cut", tuple(sorted(keep.items()))), slices, found))


def cut_state(programs: Programs, state: Mapping[str, Any], have: Keep, keep: Keep, pair: int) -> dict[str, Any]:
    """The cache of a layer at other kept sizes: cut where they are smaller, filled up with zeros where larger."""
    resized = functools.partial(_resized, have=have, keep=keep, pair=pair)
    return _apply(programs, _state_name(have, keep), resized, dict(state))


def _resized(state: Mapping[str, Any], have: Keep, keep: Keep, pair: int) -> dict[str, Any]:
    return {kind: None if old is None else old.resized(have, keep, pair) for kind, old in state.items()}


def _state_name(have: Keep, keep: Keep) -> Any:
    return "state", tuple(sorted(have.items())), tuple(sorted(keep.items()))


def grow(
    programs: Programs, checkpoint: Checkpoint, i: int, layer: Layer, have: Keep, keep: Keep, dtype: Any
) -> dict[str, dict[str, Any]]:
    """A layer with what it lacks of the kept sizes `keep`, which is all that is read from disk."""
    old: dict[str, dict[str, Any]] = {}
    new: dict[str, dict[str, Any]] = {}
    for kind, block in _changed(layer, have, keep).items():
        old[kind], new[kind] = {}, {}
        for name, value in block.items():
            leaf = elastic.BLOCKS[kind][name]
            start = dict(have) | {str(leaf.axis): _whole_tiles(value)}
            old[kind][name] = elastic.slice_leaf(leaf, value, start)
            suffix = checkpoint.suffix(i, kind, name, start, keep)
            new[kind][name] = in_form(leaf, suffix, dtype, name=f"{kind}.{name}")
    return _merged(layer, _apply(programs, "join", _join_layers, old, new, joins=True))


def prepare(programs: Programs, needs: Needs, have_rate: float, keep_rate: float) -> None:
    """Compile what `cut`, `cut_state` and `grow` run on the way from one rate to another."""
    checkpoint = needs.checkpoint
    pair = elastic.sizes(checkpoint.config)["pair"]
    old, new = needs.compiled(have_rate), needs.compiled(keep_rate)
    sizes = zip(checkpoint.keep(have_rate), checkpoint.keep(keep_rate), strict=True)
    for i, (have, keep) in enumerate(sizes):
        if have == keep:
            continue
        layer, wanted = old.params["layers"][i], new.params["layers"][i]
        found = _changed(layer, have, keep)
        if keep_rate > have_rate:
            slices = functools.partial(elastic.slice_layer, keep=dict(keep))
            programs.prepare(("cut", tuple(sorted(keep.items()))), slices, found)
        else:
            kept = {
                kind: {
                    name: jax.eval_shape(lambda x, leaf=elastic.BLOCKS[kind][name]: _leading(leaf, x), value)
                    for name, value in block.items()
                }
                for kind, block in found.items()
            }
            missing = {
                kind: {name: _rest(value, wanted[kind][name]) for name, value in block.items()}
                for kind, block in kept.items()
            }
            programs.prepare("join", _join_layers, kept, missing)
        resized = functools.partial(_resized, have=have, keep=keep, pair=pair)
        programs.prepare(_state_name(have, keep), resized, old.cache.layers[i])


def _leading(leaf: elastic.Leaf, value: Any) -> Any:
    return elastic.slice_leaf(leaf, value, {str(leaf.axis): _whole_tiles(value)})


def _rest(part: Any, whole: Any) -> Any:
    """Shapes of what follows `part` in `whole`, along the leading axis."""
    if isinstance(part, QuantizedArray):
        width = whole.width - part.width if part.contract == "first" else part.width
        return dataclasses.replace(
            part, data=_rest(part.data, whole.data), scale=_rest(part.scale, whole.scale), width=width
        )
    return jax.ShapeDtypeStruct((whole.shape[0] - part.shape[0], *whole.shape[1:]), whole.dtype)


def _whole_tiles(value: Any) -> int:
    """Entries of a leaf that can be kept when more are appended: all, or those of whole tiles."""
    count = int(value.shape[0])
    if not isinstance(value, QuantizedArray) or value.layout != tiling.LAYOUTS["last"]:
        return count
    rows = math.prod(value.scale.shape[1:-1])  # of an entry
    entries = tiling.ROWS // math.gcd(tiling.ROWS, rows)
    return count // entries * entries


def _join_layers(old: Layer, new: Layer) -> dict[str, dict[str, Any]]:
    return {kind: {name: _join(value, new[kind][name]) for name, value in block.items()} for kind, block in old.items()}


def _join(old: Any, new: Any) -> Any:
    """Two parts of a leaf as one, along the leading axis."""
    if not isinstance(old, QuantizedArray):
        if not isinstance(old, np.ndarray):
            return jnp.concatenate([old, new])
        return _joined([old, new])
    width = old.width + new.width if old.contract == "first" else old.width
    return dataclasses.replace(old, data=_join(old.data, new.data), scale=_join(old.scale, new.scale), width=width)
