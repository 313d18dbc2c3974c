"""Which implementation runs: named, from the environment, by default, and what happens when it cannot."""

from __future__ import annotations

import jax
import pytest

from uniql_jax.pallas_kernels import dispatch
from uniql_jax.pallas_kernels.attention import prefill
from uniql_jax.pallas_kernels.dequant_matmul import api as dequant_matmul_api
from uniql_jax.pallas_kernels.embedding import api as embedding_api
from uniql_jax.pallas_kernels.rope import api as rope_api


def refuse() -> str:
    raise NotImplementedError("not this shape")


KERNEL = {"reference": lambda: "reference", "blocked": lambda: "blocked", "pallas": refuse}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


def test_every_default_and_kernel_is_a_known_name() -> None:
    tables = (dequant_matmul_api.IMPLEMENTATIONS, rope_api.ONE, rope_api.BOTH, embedding_api.IMPLEMENTATIONS)
    tables += (prefill.CAUSAL,)
    for table in tables:
        assert "reference" in table
        assert set(table) <= set(dispatch.NAMES)
    assert dispatch.DEFAULT in dispatch.NAMES


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_default_follows_the_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert dispatch.pick("k", KERNEL, None)() == "blocked"
    assert dispatch.pick("k", {"reference": lambda: "reference"}, None)() == "reference"


def test_environment_overrides_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.pick("k", KERNEL, None)() == "reference"
    monkeypatch.setenv(dispatch.VARIABLE, "pallas")
    assert dispatch.pick("k", KERNEL, None)() == "blocked", "blocks come before the reference"
    assert dispatch.pick("k", KERNEL | {"blocked": refuse}, None)() == "reference"
    assert dispatch.Refusal("k", "blocked", "not this shape") in dispatch.REFUSALS
    assert dispatch.pick("k", KERNEL | {"pallas": lambda: "pallas"}, None)() == "pallas"
    monkeypatch.setenv(dispatch.VARIABLE, "palas")
    with pytest.raises(
        ValueError, match="UNIQL_KERNELS is one of reference, blocked, pallas, jax-triton, cudnn, not 'palas'"
    ):
        dispatch.pick("k", KERNEL, None)


def test_a_name_that_a_kernel_has_not_leaves_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.MEASURED, ("k", jax.default_backend()), "library")
    monkeypatch.setenv(dispatch.VARIABLE, "pallas")
    table = {"reference": lambda: "reference", "library": lambda: "library"}
    assert dispatch.pick("k", table, None)() == "library"
    assert dispatch.pick("other", table, None)() == "reference"
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.pick("k", table, None)() == "reference"


def test_a_named_implementation_fails_loudly() -> None:
    with pytest.raises(NotImplementedError, match="not this shape"):
        dispatch.pick("k", KERNEL, "pallas")()
    with pytest.raises(ValueError, match="k has no implementation 'mosaic'"):
        dispatch.pick("k", KERNEL, "mosaic")


def test_other_errors_are_not_swallowed() -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        dispatch.pick("k", KERNEL | {dispatch.default(): broken}, None)()
