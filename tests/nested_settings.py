"""A model of nested weights at a setting of the joint plan, by its leaves' own cuts: what loading is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uniql_jax import elastic
from uniql_jax.joint_plan import TOP, Kept
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.weights.nested import NestedArray


def take_setting(model: CausalLM, setting: Mapping[tuple[int, str], Kept]) -> CausalLM:
    """What a setting keeps of every leaf: a prefix of its entries, and all bits of a shorter one.

    Args:
        model: with nested weights, at this setting or a larger one.
        setting: by layer and axis, as `JointPlan.kept` gives it; what is outside the layers by the leaf's name.

    Returns:
        A model of the smaller leaves, which has no prune rates; `model` is unchanged.

    Raises:
        ValueError: the model keeps less than the setting, or a border would split a group.
    """
    params: dict[str, Any] = dict(model.params)
    layers = []
    for index, layer in enumerate(model.params["layers"]):
        kept = {axis: one for (at, axis), one in setting.items() if at == index}
        cut = elastic.slice_layer(layer, {axis: one.entries for axis, one in kept.items()})
        layers.append(
            {
                kind: {
                    name: _with_bits(value, kept.get(elastic.BLOCKS[kind][name].axis or ""))
                    for name, value in block.items()
                }
                for kind, block in cut.items()
            }
        )
    for (at, name), one in setting.items():
        if at == TOP:
            params[name] = _with_bits(params[name], one)
    return CausalLM(model.config, params | {"layers": layers}, None, 0.0, model.folder, model.dtype)


def _with_bits(value: Any, kept: Kept | None) -> Any:
    return value.take_bits(kept.full) if kept is not None and isinstance(value, NestedArray) else value
