"""Arrays come into the host's memory as they are, and as copies, on every way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uniql_jax import transfer
from uniql_jax.transfer import SMALL, to_host


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
@pytest.mark.parametrize("size", [1, SMALL // 2, 2 * SMALL + 1])
def test_arrays_arrive(
    pinned: bool, dtype: str, size: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "writes_pinned", lambda _: pinned)
    value = jnp.asarray(rng.integers(0, 2, size), dtype)
    found = to_host({"a": value, "b": [np.arange(3)]})
    assert type(found["a"]) is np.ndarray
    assert found["a"].dtype == value.dtype
    np.testing.assert_array_equal(found["a"], np.asarray(value))
    np.testing.assert_array_equal(found["b"][0], np.arange(3))
    before = found["a"].copy()
    value.delete()
    np.testing.assert_array_equal(found["a"], before)


def test_an_array_that_is_shared_out_arrives_whole(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "writes_pinned", lambda _: True)
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    expected = rng.normal(size=(2, SMALL)).astype(np.float32)
    value = jax.device_put(expected, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_array_equal(to_host(value), expected)


def test_the_host_is_no_detour() -> None:
    assert not transfer.writes_pinned(jax.devices("cpu")[0])
