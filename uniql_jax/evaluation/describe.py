"""What an elastic checkpoint holds, from its headers alone: sizes at every prune rate, kept sizes of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uniql_jax import elastic
from uniql_jax.checkpoint import Checkpoint, open_checkpoint
from uniql_jax.console import format_bytes
from uniql_jax.joint_plan import TOP
from uniql_jax.model.decoding import cache_bytes
from uniql_jax.runtime.choice import Choice, choose

RATES = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35)
CONTEXT = 4096
NO_PARAMETERS = ("inv_freq", "head_in")
"""Leaves that are no parameters of the original model: they follow from its config, or from the rotation."""


def describe_checkpoint(
    folder: str | Path,
    *,
    rates: Sequence[float] | None = None,
    prune_rate: float = 0.0,
    context: int = CONTEXT,
    budget: int | None = None,
) -> dict[str, Any]:
    """Describe an elastic checkpoint without reading its weights.

    Args:
        folder: the checkpoint.
        rates: prune rates of the size table; None: 0 to 0.35, or rate 0 alone when it is unsorted.
        prune_rate: rate at which every layer's sizes are listed.
        budget: bytes of weights, in place of `prune_rate`.
        context: tokens of one sequence whose cache and states are counted, in bfloat16.

    Returns:
        Plain data: `family`, `parameters`, `prunable_parameters`, `bits`, `groups`, `format`, `sorted`, `provenance`,
        `options`, `manifest`; `rates`, a list of {prune_rate, kept_fraction, parameters, prunable_parameters,
        weight_bytes, state_bytes}; `layers`, a list of {layer, blocks, kept, full, weight_bytes} at `prune_rate`, or at
        what fits the budget: then `size` says what that is, and layers have `all_bits` where bits were given up too.
        `nested`: {leading_bits, steps, most_bytes, least_bytes} of a joint plan, or None.

    Raises:
        UserError: no such checkpoint, a damaged one, or a rate that it does not have.
    """
    checkpoint = open_checkpoint(folder)
    if rates is None:
        rates = RATES if checkpoint.plan is not None else RATES[:1]
    meta, total = checkpoint.meta, _parameters(checkpoint, 0.0)
    size = Choice(0, prune_rate) if budget is None else choose(checkpoint, budget)
    return {
        "checkpoint": str(folder),
        "format": meta["format"],
        "family": checkpoint.config.model_type,
        "parameters": total,
        "prunable_parameters": _prunable(checkpoint, 0.0),
        "bits": checkpoint.bits,
        "groups": dict(meta.get("groups") or {}),
        "runs": dict(meta.get("runs") or {}),
        "sorted": checkpoint.plan is not None,
        "provenance": meta.get("provenance") or {key: meta[key] for key in ("source",) if meta.get(key)},
        "options": meta.get("options"),
        "manifest": meta.get("manifest"),
        "context": context,
        "rates": [_at_rate(checkpoint, rate, context) for rate in rates],
        "nested": _nested(checkpoint),
        "prune_rate": size.rate,
        "size": None if budget is None else f"{size}: {format_bytes(size.bytes)} of weights",
        "layers": _layers(checkpoint, size),
    }


def _nested(checkpoint: Checkpoint) -> dict[str, Any] | None:
    plan = checkpoint.joint_plan
    if plan is None:
        return None
    most, least = round(plan.bytes[0]), round(plan.bytes[-1])
    bits = checkpoint.meta["nested"]["leading_bits"]
    return {"leading_bits": bits, "steps": len(plan.steps), "most_bytes": most, "least_bytes": least}


def _at_rate(checkpoint: Checkpoint, rate: float, context: int) -> dict[str, Any]:
    full, kept = _prunable(checkpoint, 0.0), _prunable(checkpoint, rate)
    return {
        "prune_rate": rate,
        "kept_fraction": kept / full if full else 1.0,
        "parameters": _parameters(checkpoint, rate),
        "prunable_parameters": kept,
        "weight_bytes": checkpoint.weight_bytes(rate),
        "state_bytes": cache_bytes(checkpoint.config, checkpoint.keep(rate), 1, context),
    }


def _layers(checkpoint: Checkpoint, size: Choice) -> list[dict[str, Any]]:
    found = [
        {"layer": i, "blocks": list(kinds), "kept": dict(kept), "full": dict(full), "weight_bytes": 0}
        for i, (kinds, kept, full) in enumerate(
            zip(checkpoint.config.pattern, size.keep(checkpoint), checkpoint.keep(0.0), strict=True)
        )
    ]
    if size.setting is not None:
        for (layer, axis), kept in size.setting.items():
            if layer != TOP:
                found[layer].setdefault("all_bits", {})[axis] = kept.full
    for name, count in checkpoint.tensor_bytes(size.rate, size.setting).items():
        if name.startswith("layers."):
            found[int(name.split(".")[1])]["weight_bytes"] += count
    return found


def _prunable(checkpoint: Checkpoint, rate: float) -> int:
    """Entries of matrices with an elastic axis, which is what a prune rate is a fraction of."""
    config = checkpoint.config
    return sum(
        count * elastic.axis_cost(config, kinds, axis)
        for kinds, kept in zip(config.pattern, checkpoint.keep(rate), strict=True)
        for axis, count in kept.items()
    )


def _parameters(checkpoint: Checkpoint, rate: float) -> int:
    """Parameters of the model at a rate: entries of all stored leaves but those of NO_PARAMETERS."""
    config = checkpoint.config
    stored = {name.partition(".")[0] for name in checkpoint.tensors}

    def count(leaves: Mapping[str, elastic.Leaf], kept: Mapping[str, int] | None) -> int:
        return sum(elastic.parameters(config, leaf, kept) for name, leaf in leaves.items() if name not in NO_PARAMETERS)

    layers = zip(config.pattern, checkpoint.keep(rate), strict=True)
    inside = sum(count(elastic.leaves(config, kind), kept) for kinds, kept in layers for kind in kinds)
    return inside + count({name: leaf for name, leaf in elastic.TOP.items() if name in stored}, None)
