"""Unpacking undoes numpy's packing, in the kernels' form and in the model's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_cases import random_case
from uniql_jax.pallas_kernels import packing
from uniql_jax.weights.quantized import QuantizedArray


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("contract", ["last", "first"])
def test_dequantize_is_exact_and_agrees_with_the_model(rng: np.random.Generator, bits: int, contract: str) -> None:
    case = random_case(rng, 13, 300, 128, bits=bits, contract=contract)
    options = dict(bits=bits, group=128, width=300)
    if contract == "last":
        got = np.asarray(packing.dequantize_last(case.data, case.scale, **options))
    else:
        got = np.asarray(packing.dequantize_first(case.data, case.scale, **options)).T
    np.testing.assert_array_equal(got.astype(np.float64), case.dense)
    model = QuantizedArray(case.data, case.scale, inner=(), **case.options).dense()
    np.testing.assert_array_equal(got if contract == "last" else got.T, np.asarray(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bits=5), "5 bits"),
        (dict(contract="both"), "'both'"),
        (dict(width=129), "width 129"),
        (dict(group=64), "groups of 64"),
        (dict(data=jnp.zeros((4, 16), jnp.int8)), "int32"),
        (dict(data=jnp.zeros((5, 16), jnp.int32)), "kept axis"),
        (dict(scale=jnp.zeros((4,), jnp.bfloat16)), "matrices"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    parts = dict(
        data=jnp.zeros((4, 16), jnp.int32),
        scale=jnp.zeros((4, 1), jnp.bfloat16),
        bits=4,
        group=128,
        contract="last",
        width=128,
    )
    packing.check(**parts)
    with pytest.raises(ValueError, match=message):
        packing.check(**(parts | change))
