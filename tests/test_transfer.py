"""Arrays come into the host's memory as they are, and as copies, on every way."""

from __future__ import annotations

import concurrent.futures

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


@pytest.mark.gpu
def test_many_copies_by_threads_while_the_device_computes() -> None:
    """As the pass parks its batches: each is made, copied by a thread, and dropped, while the next is computed."""
    step = jax.jit(lambda key: jax.random.bits(key, (2**12, 2**12), "uint32"))
    whole = jax.jit(lambda value: (value.sum(dtype=value.dtype), (value * (value >> 16)).sum(dtype=value.dtype)))

    def checked(value: jax.Array, sums: tuple[jax.Array, ...]) -> bool:
        found = to_host(value)
        own = found.sum(dtype=np.uint32), (found * (found >> 16)).sum(dtype=np.uint32)
        return tuple(map(int, sums)) == tuple(map(int, own))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        right = []
        for number in range(400):
            value = step(jax.random.key(number))
            right.append(pool.submit(checked, value, whole(value)))
            if number >= 8:
                assert right[number - 8].result(), f"copy {number - 8} is not what the device held"
        assert all(each.result() for each in right)
