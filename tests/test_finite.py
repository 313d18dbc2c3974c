"""What is not finite is found and named."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from uniql_jax.compression.finite import first_nonfinite
from uniql_jax.weights.quantized import from_codes


def _tree(rng: np.random.Generator) -> dict[str, Any]:
    codes = jnp.asarray(rng.integers(-8, 8, (4, 16)), jnp.int8)
    scale = jnp.ones((4, 2), jnp.bfloat16)
    packed = from_codes(codes, scale, bits=4, group=8, contract="last", shape=(4, 16))
    return {
        "attention": {"o": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32), "q": packed},
        "count": 3,
        "host": np.asarray(rng.standard_normal(5), ml_dtypes.bfloat16),
        "layers": [jnp.zeros(2), jnp.zeros((0, 2)), jnp.arange(3)],
        "none": None,
    }


def test_finite_trees_pass(rng: np.random.Generator) -> None:
    assert first_nonfinite(_tree(rng)) is None
    assert first_nonfinite({}) is None
    assert first_nonfinite(jnp.asarray([1.0, 3e38])) is None  # a sum would overflow


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_leaf_that_is_not_finite_is_named(value: float, rng: np.random.Generator) -> None:
    tree = _tree(rng)
    tree["layers"][0] = jnp.asarray([0.0, value])
    assert first_nonfinite(tree) == "layers.0"
    tree["host"] = np.asarray([1, value], ml_dtypes.bfloat16)
    assert first_nonfinite(tree) == "host"
    packed = tree["attention"]["q"]
    tree["attention"]["q"] = packed.replace(scale=packed.scale.at[1, 1].set(value))
    assert first_nonfinite(tree) == "attention.q.scale"
    tree["attention"]["o"] = tree["attention"]["o"].at[2, 3].set(value)
    assert first_nonfinite(tree) == "attention.o"
    assert first_nonfinite(value) == ""
