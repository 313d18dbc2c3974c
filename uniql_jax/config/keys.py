"""Values of a config.json, each checked for kind and range; a refusal names the key and what it holds."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from uniql_jax.config.types import ConfigError

LARGEST = 2**31 - 1
"""No size of a model goes beyond; it also keeps a wrong one from being allocated."""
_FLOAT32_MAX = 3.4028234663852886e38
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 60, 60


def refuse(key: str, value: Any, wanted: str) -> ConfigError:
    """The error for a value that cannot be served."""
    return ConfigError(f"{key} in config.json is {shown(value)}, but must be {wanted}")


def shown(value: Any) -> str:
    """A value as JSON spells it, cut short however large or deep it is."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return " ".join(_short.repr(value).split())


def whole(key: str, value: Any, least: int = 1, most: int = LARGEST) -> int:
    """A whole number; no boolean, no text and no float."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise refuse(key, value, f"a whole number from {least} to {most}")
    return value


def number(key: str, value: Any, above: float = -math.inf, least: float = -math.inf, finite: bool = True) -> float:
    """A number within float32, above `above` and not below `least`; infinite ones where `finite` is off.

    transformers 5 writes infinity, which JSON has not, as {"__float__": "Infinity"}.
    """
    found = value
    if isinstance(value, Mapping) and value.get("__float__") in ("Infinity", "-Infinity"):
        found = float(value["__float__"])
    good = isinstance(found, int | float) and not isinstance(found, bool)
    good = (
        good and found > above and found >= least and (abs(found) <= _FLOAT32_MAX or (not finite and math.isinf(found)))
    )
    if not good:
        limits = [f" above {above:g}"] * (above > -math.inf) + [f" of at least {least:g}"] * (least > -math.inf)
        raise refuse(key, value, f"a number{''.join(limits)}")
    return float(found)


class Keys:
    """A config.json together with the defaults of its family: one reading method a kind of value."""

    def __init__(self, hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.hf = hf
        self._defaults = defaults

    def raw(self, key: str) -> Any:
        """The value as it stands, null included, or the family's default where the key is absent."""
        return self.hf[key] if key in self.hf else self._defaults[key]

    def size(self, key: str, least: int = 1, most: int = LARGEST) -> int:
        """A whole number; null is refused."""
        return whole(key, self.raw(key), least, most)

    def size_or(self, key: str, otherwise: int | None, least: int = 1) -> int | None:
        """A whole number, or `otherwise` where the value is null."""
        return otherwise if self.raw(key) is None else self.size(key, least)

    def number(self, key: str, least: float = -math.inf, above: float = -math.inf) -> float:
        """A finite number; null is refused."""
        return number(key, self.raw(key), above, least)

    def interval(self, key: str) -> tuple[float, float]:
        """Two numbers, the second not below the first; either may be infinite."""
        value = self.raw(key)
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise refuse(key, value, "a list of two numbers")
        low, high = (number(key, entry, finite=False) for entry in value)
        if low > high:
            raise refuse(key, value, "a list of two numbers in rising order")
        return low, high

    def flag(self, key: str, or_null: bool = False) -> bool:
        """True or false; null is false where `or_null` allows it."""
        value = self.raw(key)
        if isinstance(value, bool) or (value is None and or_null):
            return bool(value)
        raise refuse(key, value, "true or false")

    def words(self, key: str) -> list[str] | None:
        """A list of words, or null."""
        value = self.raw(key)
        if value is not None and not (isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)):
            raise refuse(key, value, "a list of words")
        return value if value is None else list(value)

    def ids(self, key: str, alone: bool = True) -> tuple[int, ...]:
        """Whole numbers as a list, as one number where `alone` allows it, or none for null."""
        value = self.raw(key)
        entries = value if isinstance(value, list | tuple) else [] if value is None else [value]
        good = all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries)
        if not good or (entries == [value] and not alone):
            raise refuse(key, value, "a whole number or a list of them" if alone else "a list of whole numbers")
        return tuple(entries)

    def activation(self, key: str, served: str = "silu") -> str:
        """The name of the one activation function that is served there."""
        found = self.raw(key)
        if ("silu" if found == "swish" else found) != served:
            raise ConfigError(f"activation {shown(found)} ({key}) is not supported; we have {served} there")
        return served
