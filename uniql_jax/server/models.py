"""What the server says of its model: at the size that it has, and at each prune rate that calls may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uniql_jax.runtime.choice import Choice, rate_size
from uniql_jax.runtime.session import Elastic

LISTED = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35)
"""Prune rates that /v1/models lists, in addition to the present one."""


def listed_rates(session: Elastic) -> list[float]:
    """Prune rates that calls may name, rising."""
    listed = LISTED if session.checkpoint.plan is not None else LISTED[:1]
    present = {session.rate} if session.size.setting is None else set()
    return sorted({*listed, *session.warm_rates} | present)


def setting_of(size: Choice) -> dict[str, Any] | None:
    """What a setting of the joint plan of nested bits is, for JSON; None at a prune rate."""
    return None if size.setting is None else {"steps": size.steps, "left_out": size.left_out, "says": str(size)}


def entries(session: Elastic, name: str, quality: Mapping[float, float]) -> list[dict[str, Any]]:
    """The model as it is, and at each prune rate.

    Args:
        session: what runs.
        name: of the model; at a rate it is NAME@RATE.
        quality: prune rate -> measured perplexity.

    Returns:
        An entry each, as /v1/models lists them, but for what is the same of all.
    """
    rates = listed_rates(session)
    sizes = [(name, session.size)]
    sizes += [(f"{name}@{rate:g}", rate_size(session.checkpoint, rate)) for rate in rates]
    return [_entry(session, one, size, quality) for one, size in sizes]


def _entry(session: Elastic, name: str, size: Choice, quality: Mapping[float, float]) -> dict[str, Any]:
    at_a_setting = size.setting is not None
    return {
        "id": name,
        "prune_rate": size.shown_rate,
        "weight_bytes": size.bytes,
        "size": str(size),
        "setting": setting_of(size),
        "running": at_a_setting or size.rate in session.rates_at_work(),
        "available": at_a_setting or session.runs(size.rate),
        "perplexity": None if at_a_setting else quality.get(size.rate),
    }
