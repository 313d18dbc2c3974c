"""Formats of the elastic checkpoint (docs/format.md), validated: section `uniql`, plan, and every tensor's header.

Headers only: milliseconds at any model size.
"""

from __future__ import annotations

import collections
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import ml_dtypes
import numpy as np

from uniql_jax import elastic
from uniql_jax.checkpoint_leaves import NESTED, leaf_group, leaf_run, parts_of
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.weights.runs import scale_rows

FORMATS = (1, 2, 3)
SECTION = "uniql"
SCHEMA = Path(__file__).parent / "schemas" / "checkpoint.json"

Headers = Mapping[str, tuple[np.dtype, tuple[int, ...]]]

_BF16, _F16, _F32 = (np.dtype(kind) for kind in (ml_dtypes.bfloat16, np.float16, np.float32))
_FLOATS = {16: (_BF16, _F16), 32: (_F32,)}
_ANY_FLOAT = (_BF16, _F16, _F32)


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Hugging Face config, section `uniql`) of a checkpoint's config.json, the section valid by itself.

    Raises:
        UserError: no config.json, no JSON object, no such section, another format, or a key that breaks the schema.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint: no config.json there")
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON") from None
    if not isinstance(whole, dict):
        raise UserError(f"{path} is not a JSON object")
    if SECTION not in whole:
        raise UserError(f"{folder} is no elastic checkpoint yet; make one with python -m uniql_jax.compress")
    section = whole.pop(SECTION)
    check_section(section, path)
    return whole, section


def check_section(section: Any, path: Path) -> None:
    """Refuse a section `uniql` that breaks its format; `path` names its file. Raises UserError."""
    if not isinstance(section, dict):
        raise UserError(f"{path}: {SECTION} must be an object, not {_shown(section)}")
    found = section.get("format")
    if type(found) is not int or found not in FORMATS:
        readable = " and ".join(map(str, FORMATS))
        advice = ": upgrade uniql-jax" if type(found) is int and found > FORMATS[-1] else ""
        raise UserError(f"{path.parent} has checkpoint format {_shown(found)}; this version reads {readable}{advice}")
    for key, first in (("runs", 2), ("nested", 3)):
        if found < first and section.get(key):
            raise UserError(f"{path}: {SECTION}.{key} is of format {first}, but the format is {found}")
    # The cuts of a large plan are thousands, and `check_plan` looks at each of them anyway.
    light, plan = dict(section), section.get("plan")
    if isinstance(plan, dict) and isinstance(plan.get("order"), list):
        light["plan"] = plan | {"order": []}
    nested = section.get("nested")
    if isinstance(nested, dict):
        if not all(isinstance(nested.get(key), list) for key in ("steps", "bytes", "losses")):
            raise UserError(f"{path}: {SECTION}.nested lacks its lists steps, bytes and losses")
        light["nested"] = nested | {"steps": [], "bytes": [], "losses": []}
    errors = list(_validator().iter_errors(light))
    for error in errors:
        where, said = _explained(error)
        raise UserError(f"{path}: {'.'.join((SECTION, *map(str, where)))} {said}")
    for key in ("influence", "groups", "runs", "plan"):
        if not _finite(light.get(key)):
            raise UserError(f"{path}: {SECTION}.{key} holds a number that is not finite")


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _explained(error: jsonschema.ValidationError) -> tuple[tuple[Any, ...], str]:
    """(path of the key, what is wrong with it), without the value where that is long."""
    if error.validator == "oneOf":  # the plan: null, or what its own schema says
        inner = [e for e in error.context or () if e.schema_path[0] == 1]
        if isinstance(error.instance, dict) and inner:
            where, said = _explained(inner[0])
            return (*error.absolute_path, *where[len(error.absolute_path) :]), said
        return tuple(error.absolute_path), f"must be an object or null, not {_shown(error.instance)}"
    value: Any = error.validator_value
    said = {
        "required": lambda: f"lacks {next((k for k in value if k not in error.instance), '?')!r}",
        "type": lambda: f"must be {_kinds(value)}, not {_shown(error.instance)}",
        "enum": lambda: f"must be one of {', '.join(map(str, value))}, not {_shown(error.instance)}",
        "minimum": lambda: f"must be at least {value}, not {_shown(error.instance)}",
        "maximum": lambda: f"is too large: {_shown(error.instance)}",
        "multipleOf": lambda: f"must be a multiple of {value}, not {_shown(error.instance)}",
    }.get(str(error.validator), lambda: " ".join(error.message.split())[:200])()
    return tuple(error.absolute_path), said


def _kinds(value: Any) -> str:
    return " or ".join([value] if isinstance(value, str) else value)


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = "null" if value is None else json.dumps(value) if isinstance(value, str | bool | float) else _digits(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _digits(value: int) -> str:
    return str(value) if abs(value) < 10**30 else "a very large integer"


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check_plan(section: Mapping[str, Any], config: ModelConfig, path: Path) -> None:
    """Refuse a plan that does not fit its model: sizes, units, costs, cuts, groups. Raises UserError naming the key."""
    plan = section.get("plan")
    if plan is None:
        return

    def refuse(key: str, said: str) -> None:
        raise UserError(f"{path}: {SECTION}.plan.{key} {said}")

    full, axes = elastic.sizes(config), [elastic.layer_axes(config, kinds) for kinds in config.pattern]
    used = {axis for layer in axes for axis in layer}
    for key in ("sizes", "units"):
        for axis in sorted(used ^ set(plan[key])):
            refuse(key, f"lacks the axis {axis!r}" if axis in used else f"has an axis {axis!r} that the model lacks")
    for axis in sorted(used):
        if plan["sizes"][axis] != full[axis]:
            refuse(f"sizes.{axis}", f"is {plan['sizes'][axis]}, but the model has {full[axis]}")
        if plan["units"][axis] > full[axis]:
            refuse(f"units.{axis}", f"is {plan['units'][axis]}, more than the {full[axis]} there are")
        _check_unit(section, config, axis, refuse)
    if len(plan["costs"]) != len(axes):
        refuse("costs", f"has {len(plan['costs'])} layers, but the model has {len(axes)}")
    for i, (kinds, found) in enumerate(zip(config.pattern, plan["costs"], strict=True)):
        wanted = {axis: elastic.axis_cost(config, kinds, axis) for axis in axes[i]}
        if found != wanted:
            refuse(f"costs.{i}", f"is {found}, but the model has {wanted}")
    _check_order(plan, axes, refuse)


def _check_unit(section: Mapping[str, Any], config: ModelConfig, axis: str, refuse: Any) -> None:
    """A cut must not split a quantization group of the leaf that contracts this axis."""
    contracted = [
        leaf
        for kinds in config.pattern
        for kind in kinds
        for leaf in elastic.leaves(config, kind).values()
        if leaf.axis == axis and leaf.contract == "first"
    ]
    group = (section.get("groups") or {}).get(axis)
    if section["bits"] not in (4, 8) or not contracted or group is None:
        return
    unit, run = section["plan"]["units"][axis], leaf_run(section, contracted[0])
    if run > 1 and unit % run:
        refuse(f"units.{axis}", f"is {unit}, which splits runs of {run}")
    if run == 1 and unit * math.prod(elastic.shape(config, contracted[0])[1:-1]) % group:
        refuse(f"units.{axis}", f"is {unit}, which splits quantization groups of {group}")


def _check_order(plan: Mapping[str, Any], axes: list[tuple[str, ...]], refuse: Any) -> None:
    counts: collections.Counter[tuple[int, str]] = collections.Counter()
    for n, entry in enumerate(plan["order"]):
        if not isinstance(entry, list) or len(entry) != 2 or type(entry[0]) is not int or type(entry[1]) is not str:
            refuse(f"order.{n}", "is not a pair of a layer and an axis")
        layer, axis = entry
        if not 0 <= layer < len(axes):
            refuse(f"order.{n}", f"names layer {_digits(layer)}, but the model has {len(axes)}")
        if axis not in axes[layer]:
            refuse(f"order.{n}", f"names the axis {_shown(axis)}, which layer {layer} does not have")
        counts[layer, axis] += 1
    for (layer, axis), count in counts.items():
        possible = -(-plan["sizes"][axis] // plan["units"][axis]) - 1
        if count > possible:
            refuse("order", f"cuts {axis!r} of layer {layer} {count} times, but there are {possible} cuts")


def expected_tensors(
    section: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, tuple[tuple[np.dtype, ...], tuple[int, ...]]], set[str]]:
    """Name -> (allowed dtypes, shape) of every tensor that a checkpoint may have, and the names it may lack."""
    wanted: dict[str, tuple[tuple[np.dtype, ...], tuple[int, ...]]] = {}
    packed = section["bits"] in (4, 8)
    matrices = _FLOATS.get(section["bits"], _ANY_FLOAT)

    def add(name: str, leaf: elastic.Leaf) -> None:
        shape = elastic.shape(config, leaf)
        if leaf.contract is None or name == "head_in" or not packed:
            wanted[name] = ((_F32,) if leaf.contract is None else matrices, shape)
            return
        last = leaf.contract == "last"
        lead, width = (shape[:-1], shape[-1]) if last else (shape[-1:], math.prod(shape[:-1]))
        group, run = leaf_group(section, leaf), leaf_run(section, leaf)
        if parts_of(section) == NESTED:
            groups = -(-width // group)
            planes = groups * group // 8
            kept = {"leading": (3, planes), "last": (planes,), "fine": (groups,), "coarse": (groups,)}
            for part, own in kept.items():
                kind = _BF16 if part in ("fine", "coarse") else np.dtype(np.uint8)
                wanted[f"{name}.{part}"] = ((kind,), (*lead, *own) if last else (*own[::-1], *lead))
            return
        groups = -(-width // group) if run == 1 else scale_rows(shape[0], math.prod(shape[1:-1]), group, run)
        stored = (groups * group if run == 1 else width) // (8 if section["bits"] == 4 else 1)
        kind = np.dtype(np.int32 if section["bits"] == 4 else np.int8)
        wanted[f"{name}.data"] = ((kind,), (*lead, stored) if last else (stored, *lead))
        wanted[f"{name}.scale"] = ((_BF16,), (*lead, groups) if last else (groups, *lead))

    optional = {"head_in"}
    for name, leaf in elastic.TOP.items():
        before = set(wanted)
        add(name, leaf)
        if name == "head" and config.tie_embeddings:
            optional |= set(wanted) - before
    for i, kinds in enumerate(config.pattern):
        for kind in kinds:
            for name, leaf in elastic.leaves(config, kind).items():
                add(f"layers.{i}.{kind}.{name}", leaf)
    return wanted, optional


def check_groups(section: Mapping[str, Any], config: ModelConfig, path: Path) -> None:
    """Refuse a packed checkpoint that lacks the group of a contracted dimension. Raises UserError."""
    if section["bits"] not in (4, 8):
        return
    leaves = [leaf for kinds in config.pattern for kind in kinds for leaf in elastic.leaves(config, kind).values()]
    for key in sorted({"embed"} | {leaf.dims[0] for leaf in leaves if leaf.contract == "first"}):
        if key not in section["groups"]:
            raise UserError(f"{path}: {SECTION}.groups lacks {key!r}")
    full = elastic.sizes(config)
    for axis, run in (section.get("runs") or {}).items():
        if axis not in section["groups"] or axis not in full or section["groups"][axis] % run or full[axis] % run:
            raise UserError(f"{path}: {SECTION}.runs.{axis} is {run}, which divides no group and axis of this model")


def check_tensors(section: Mapping[str, Any], config: ModelConfig, found: Headers, folder: Path) -> None:
    """Refuse tensors that are missing, unknown, or of another shape or dtype than config and section say.

    Raises:
        UserError: naming the tensor.
    """
    wanted, optional = expected_tensors(section, config)
    head = {name for name in wanted if name.startswith("head.")} & optional
    if head & set(found):  # both parts of a packed weight, or neither
        optional = optional - head
    for name in wanted:
        if name not in found and name not in optional:
            raise UserError(f"{folder} lacks the tensor {name!r}")
    for name, (dtype, shape) in found.items():
        if name not in wanted:
            raise UserError(f"{folder} has an unknown tensor {name!r}")
        dtypes, expected = wanted[name]
        if shape != expected:
            raise UserError(f"{folder}: tensor {name!r} has the shape {shape}, but its config says {expected}")
        if dtype not in dtypes:
            kinds = " or ".join(kind.name for kind in dtypes)
            raise UserError(f"{folder}: tensor {name!r} is {dtype.name}, but its config says {kinds}")
