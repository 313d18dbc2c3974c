"""A JAX without one of the GPU backends still imports, and its kernels decline."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_cases import random_case, relative
from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.dequant_matmul import dequant_matmul


def test_without_triton_kernels_decline_and_the_default_falls_back(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "plgpu", None)
    monkeypatch.setenv("UNIQL_KERNELS", "pallas")
    case = random_case(rng, 20, 72, 24)
    x = jnp.asarray(rng.normal(size=(2, 72)), jnp.float32)
    with pytest.raises(NotImplementedError, match="no Pallas Triton backend"):
        dequant_matmul(x, case.data, case.scale, implementation="pallas", **case.options)
    got = dequant_matmul(x, case.data, case.scale, **case.options)
    assert relative(got, np.asarray(x).astype(np.float64) @ case.dense.T) < 1e-5


def test_kernels_are_interpreted_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, interpreted in (("cpu", True), ("gpu", False)):
        monkeypatch.setattr(compat.jax, "default_backend", lambda backend=backend: backend)
        assert compat.interpreted() is interpreted
