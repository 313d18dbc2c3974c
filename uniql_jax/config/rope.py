"""The rotary position embedding of a config.json, read as transformers 5 reads it.

The hub writes rope_theta and rope_scaling, transformers 5 one rope_parameters. Where both dictionaries stand,
rope_scaling counts and rope_parameters is ignored; a key inside the dictionary wins over one of the same name outside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from uniql_jax.config.keys import number, refuse, shown, whole
from uniql_jax.config.types import ConfigError, Rope

THETA = 10000.0
SCALINGS = ("default", "linear", "llama3", "yarn")


def read_rope(
    hf: Mapping[str, Any],
    head_dim: int,
    max_position: int,
    partial: float | None = None,
    base: float = THETA,
    longrope: bool = False,
) -> Rope:
    """Read the rotary embedding of a config.json.

    Args:
        hf: The config.json.
        head_dim: Dimensions of a head.
        max_position: The model's max_position_embeddings.
        partial: The part of a head that rotates where the rope dictionary names none; None for a family whose heads
            rotate whole.
        base: rope_theta where none is named.
        longrope: whether that scaling is served too, by its factors for short texts; older names of it are others'.

    Raises:
        ConfigError: for a scaling that is not supported and for values that no model can have.
    """
    where, parameters = _parameters(hf)
    scaling = parameters.get("rope_type", parameters.get("type", "default"))
    if longrope:
        scaling = "longrope" if scaling in ("su", "yarn") else scaling
    served = ("default", "longrope") if longrope else SCALINGS
    if scaling not in served:
        raise ConfigError(f"RoPE scaling {shown(scaling)} ({where}) is not supported; we have {', '.join(served)}")
    theta = parameters.get("rope_theta", hf.get("rope_theta", base))
    theta = number("rope_theta", theta, above=1.0 if scaling == "yarn" else 0.0)
    rope = Rope(theta=theta, dim=_rotating(hf, parameters, head_dim, partial, scaling), scaling=scaling)
    if scaling == "default":
        return _finite("rope_theta", rope)

    def wanted(key: str) -> float:
        if key not in parameters:
            raise ConfigError(f"{where} in config.json lacks {key}, which the scaling {scaling!r} needs")
        return number(f"{where}.{key}", parameters[key], above=0.0)

    settings: dict[str, Any] = {}
    if scaling != "linear":
        original = parameters.get("original_max_position_embeddings", max_position)
        # as in transformers, one outside the dictionary wins
        original = hf.get("original_max_position_embeddings", original)
        settings["original_max_position"] = original = whole("original_max_position_embeddings", original)
        if scaling == "yarn" and "factor" in parameters and parameters["factor"] is None:
            parameters["factor"] = max_position / original
    if scaling == "longrope":
        settings |= _longrope(where, parameters, rope.dim // 2, max_position, settings["original_max_position"])
        return _finite(where, Rope(theta, rope.dim, scaling, **settings))
    settings["factor"] = wanted("factor")
    if scaling == "llama3":
        settings |= {key: wanted(key) for key in ("low_freq_factor", "high_freq_factor")}
        if settings["low_freq_factor"] >= settings["high_freq_factor"]:
            raise refuse(f"{where}.low_freq_factor", parameters["low_freq_factor"], "below high_freq_factor")
    if scaling == "yarn":
        settings |= _yarn(where, parameters, settings["factor"])
    return _finite(where, Rope(theta, rope.dim, scaling, **settings))


def _finite(where: str, rope: Rope) -> Rope:
    """The same, refused where float32 cannot hold what comes of its numbers, each of which it can."""
    try:
        with np.errstate(all="raise", under="ignore"):
            fits = np.isfinite(rope.inv_freq()).all() and np.isfinite(np.square(np.float32(rope.attention_factor)))
    except (ArithmeticError, ValueError):
        fits = False
    if not fits:
        values = f"rope_theta {rope.theta:g}, factor {rope.factor:g}, attention factor {rope.attention_factor:g}"
        raise ConfigError(f"{where} in config.json gives a rotary embedding beyond float32 ({values})")
    return rope


def _parameters(hf: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The dictionary that counts, and the key it stands under."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(key), Mapping | None):
            raise refuse(key, hf[key], "a dictionary or null")
    where = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    parameters = dict(hf.get(where) or {})
    nested = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(f"{where} in config.json differs by layer ({nested[0]!r}), which is not supported")
    return where, parameters


def _rotating(
    hf: Mapping[str, Any], parameters: Mapping[str, Any], head_dim: int, partial: float | None, scaling: str
) -> int:
    """Dimensions of a head that rotate."""
    outside = hf.get("partial_rotary_factor") if partial is None else partial
    part = parameters.get("partial_rotary_factor", 1.0 if outside is None else outside)
    part = number("partial_rotary_factor", part, above=0.0)
    dim = int(head_dim * part)
    if partial is None:
        if scaling != "default" and dim != head_dim:
            raise refuse("partial_rotary_factor", part, "1: heads of this family rotate whole")
        dim = head_dim  # as in transformers, which has no use for the factor here
    if dim > head_dim or dim < 2 or dim % 2:
        raise ConfigError(f"{dim} of {head_dim} dimensions of a head would rotate, but it must be an even part of them")
    return dim


def _longrope(
    where: str, parameters: Mapping[str, Any], pairs: int, max_position: int, original: int
) -> dict[str, Any]:
    found = {}
    for key in ("short_factor", "long_factor"):
        values = parameters.get(key)
        if not isinstance(values, list) or len(values) != pairs:
            raise refuse(f"{where}.{key}", values, f"a list of {pairs} numbers")
        found[key] = tuple(number(f"{where}.{key}", value, above=0.0) for value in values)
    factor, attention = parameters.get("factor"), parameters.get("attention_factor")
    factor = max_position / original if factor is None else number(f"{where}.factor", factor, above=0.0)
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention = number(f"{where}.attention_factor", attention, above=0.0)
    return dict(factor=factor, attention_factor=attention, short_factor=found["short_factor"])


def _yarn(where: str, parameters: Mapping[str, Any], factor: float) -> dict[str, Any]:
    def optional(key: str) -> float | None:
        value = parameters.get(key)
        return None if value is None else number(f"{where}.{key}", value, least=0.0)

    def scale(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention, mscale, mscale_all = (optional(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None:
        attention = scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale()
    if not isinstance(parameters.get("truncate", True), bool):
        raise refuse(f"{where}.truncate", parameters["truncate"], "true or false")
    fast, slow = optional("beta_fast") or 32.0, optional("beta_slow") or 1.0
    if fast <= slow:
        raise refuse(f"{where}.beta_fast", parameters.get("beta_fast"), f"above beta_slow, {slow:g}")
    truncate = parameters.get("truncate", True)
    return dict(attention_factor=attention, beta_fast=fast, beta_slow=slow, truncate=truncate)
