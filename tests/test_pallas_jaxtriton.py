"""What runs through jax-triton: its kernels' arithmetic, that they compile for each GPU, and when they are chosen."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_cases import random_case, relative
from uniql_jax.commands import inspect
from uniql_jax.pallas_kernels import compat, dispatch, jaxtriton
from uniql_jax.pallas_kernels.attention import jaxtriton as attention
from uniql_jax.pallas_kernels.attention.caches import Caches, quantize
from uniql_jax.pallas_kernels.attention.prefill import cached_attention
from uniql_jax.pallas_kernels.dequant_matmul import dequant_matmul, pallas, tiling
from uniql_jax.pallas_kernels.dequant_matmul import jaxtriton as products

ROOT = Path(__file__).resolve().parents[1]
BOUND = {"bfloat16": 4e-3, "float32": 1e-6}
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("jax_triton") is None,
    reason="Triton and jax-triton are not installed (make test-triton)",
)


def program(tmp_path: Path, *args: str) -> dict[str, Any]:
    """What triton_program.py prints, with caches of its own."""
    more = dict(XDG_CACHE_HOME=str(tmp_path), TRITON_HOME=str(tmp_path), JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "tests.triton_program", *args]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@with_triton
@pytest.mark.slow
def test_triton_interprets_the_route_right(tmp_path: Path, seed: int) -> None:
    found = program(tmp_path, "interpret", str(seed))
    assert len(found) > 20
    bounds = BOUND | {"model": 2e-2}  # whose values are rounded many times, and in another order
    assert not {what: error for what, error in found.items() if not error < bounds[what.split()[-1]]}


@with_triton
@pytest.mark.slow
def test_each_kernel_compiles_for_each_gpu(tmp_path: Path) -> None:
    """Through jax-triton, then by ptxas: nothing spilled, and shared memory fits the smallest of these GPUs."""
    found = program(tmp_path, "compile")
    assert {what.split(":")[0] for what in found} == {f"sm_{each}" for each in (80, 86, 87, 89, 90, 100)}
    assert not {what: numbers for what, numbers in found.items() if numbers[0] > 99 * 1024 or numbers[2]}


@pytest.mark.parametrize("count", [1, 4, 5, 16, 40, 200])
def test_cuts_fill_a_gpu_and_divide_groups(count: int) -> None:
    for contract in ("last", "first"):
        for bits, group in ((4, 128), (4, 32), (8, 64), (4, 256)):
            weight = products.Weight(bits=bits, group=group, contract=contract, width=4096)
            cut = products.settings(count, 4096, 4096, weight)
            assert not any(size & (size - 1) for size in (cut.n, cut.m, cut.k))
            assert cut.k % group == 0 if count <= products.FEW else group % cut.k == 0
            assert cut.m >= min(count, 128)
            stages = 3 * (cut.k * cut.m * 2 + cut.n * cut.k * bits // 8) if count > products.FEW else 0
            assert stages <= 96 * 1024
            assert cut.split * -(-4096 // cut.n) * -(-count // cut.m) >= compat.cores() // 2


def test_float32_is_three_bf16(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((3, 50)) * 10.0 ** rng.integers(-20, 20, (3, 50)), jnp.float32)
    parts = np.asarray(jax.jit(products.in_thirds)(x)).astype(np.float64).reshape(3, 3, 50)
    np.testing.assert_array_equal(parts.sum(0), np.asarray(x, np.float64))


# --- when it is chosen ----------------------------------------------------------------------------------------------


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Dispatch as on an RTX 30 whose JAX has no Pallas Triton backend; what is computed is computed here."""
    monkeypatch.setattr(compat, "capability", lambda: 8.6)
    monkeypatch.setattr(compat, "plgpu", None)
    monkeypatch.setattr(dispatch, "REFUSALS", {})
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return monkeypatch


def launched(x: jax.Array, data: jax.Array, scale: jax.Array, weight: Any, dtype: Any) -> jax.Array:
    """In the place of the kernels: all ones."""
    return jnp.ones((x.shape[0], scale.shape[0]), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_follows_pallas(ampere: pytest.MonkeyPatch, rng: np.random.Generator, dtype: str) -> None:
    ampere.setattr(jaxtriton, "missing", lambda: None)
    ampere.setattr(products, "launch", launched)
    ampere.setattr(products, "verify", lambda *args: None)
    for bits in (4, 8):
        case = random_case(rng, 32, 256, 128, bits=bits)
        for count in (1, 3, 40):
            got = dequant_matmul(jnp.zeros((count, 256), dtype), case.data, case.scale, **case.options)
            assert (np.asarray(got, np.float32) == (3 if dtype == "float32" and count > products.FEW else 1)).all()


@pytest.mark.parametrize("installed", [True, False])
def test_without_both_blocks_run_and_it_is_said_once(
    ampere: pytest.MonkeyPatch, rng: np.random.Generator, installed: bool
) -> None:
    if installed:
        ampere.setattr(jaxtriton, "missing", lambda: None)

        def wrong(kernel: str, layout: str, bits: int) -> None:
            raise NotImplementedError(f"the kernel {kernel} is off by 1 on this device")

        ampere.setattr(products, "verify", wrong)
    else:
        ampere.setitem(sys.modules, "triton", None)
        jaxtriton._module.cache_clear()
    case = random_case(rng, 32, 256, 128)
    x = jnp.asarray(rng.standard_normal((1, 256)), jnp.bfloat16)
    reason = "is off by 1" if installed else r"triton is not installed: pip install uniql-jax\[triton\]"
    said = rf"no fast kernel .*no Pallas Triton backend.*jax-triton: .*{reason}"
    with pytest.warns(RuntimeWarning, match=said) as warned:
        dequant_matmul(x, case.data, case.scale, **case.options)
    assert len(warned) == 1
    got = dequant_matmul(x, case.data, case.scale, **case.options)  # a second warning would be an error
    assert relative(got, np.asarray(x).astype(np.float64) @ case.dense.T) < BOUND["bfloat16"]
    jaxtriton._module.cache_clear()


def test_inspect_says_why_it_is_missing(ampere: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ampere.setitem(sys.modules, "jax_triton", None)
    ampere.setitem(sys.modules, "triton", None)
    jaxtriton._module.cache_clear()
    inspect.main(["--kernels"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("jax-triton ")]
    assert "not installed: pip install uniql-jax[triton]" in line
    jaxtriton._module.cache_clear()


def test_odd_groups_and_other_dtypes_go_on(ampere: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    ampere.setattr(jaxtriton, "missing", lambda: None)
    case = random_case(rng, 32, 144, 72)
    options = case.options | dict(implementation="jax-triton")
    for dtype, reason in (("float32", "groups of 16, 32, 64, 128, ..., not 72"), ("float8_e5m2", "not float8_e5m2")):
        with pytest.raises(NotImplementedError, match=reason):
            dequant_matmul(jnp.zeros((1, 144), dtype), case.data, case.scale, **options)


def drawn(rng: np.random.Generator, rows: int, bits: int, dtype: str = "bfloat16") -> tuple[Any, ...]:
    """Arguments of cached_attention for one query a row."""
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((rows, 1, 6, 18), (rows, 90, 2, 18), (rows, 90, 2, 20))
    )
    caches = Caches(k, v)
    if bits == 8:
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        caches = Caches(k, v, k_scale, v_scale)
    return q, caches, jnp.asarray(rng.integers(0, 70, rows), jnp.int32), jnp.int32(70)


def test_attention_of_one_token_follows(ampere: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """And of several, in float32, or by a kernel that is wrong here, goes to XLA."""
    ran: list[tuple[int, ...]] = []

    def launch(q: jax.Array, caches: Caches, *_: Any, scale: float) -> jax.Array:
        ran.append(q.shape)
        return jnp.zeros((*q.shape[:3], caches.v.shape[3]), q.dtype)

    def runs(*args: Any) -> int:
        """How many kernels a call launches."""
        ran.clear()
        jax.eval_shape(functools.partial(cached_attention, scale=0.2), *args)
        return len(ran)

    ampere.setattr(jaxtriton, "missing", lambda: None)
    ampere.setattr(attention, "launch", launch)
    ampere.setattr(attention, "verify", lambda: None)
    args = drawn(rng, 2, 8)
    assert runs(*args) == 1
    assert runs(jnp.concatenate([args[0]] * 2, axis=1), *args[1:]) == 0
    assert runs(*drawn(rng, 2, 16, "float32")) == 0

    def wrong() -> None:
        raise NotImplementedError("off by 1")

    ampere.setattr(attention, "verify", wrong)
    assert runs(*args) == 0
    assert dispatch.Refusal("cached_attention", "jax-triton", "off by 1") in dispatch.REFUSALS


# --- on a GPU -------------------------------------------------------------------------------------------------------


@with_triton
@pytest.mark.gpu
@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("layout", ["last", "first", "rows", "groups"])
@pytest.mark.parametrize("bits", [4, 8])
def test_on_the_device(rng: np.random.Generator, layout: str, bits: int) -> None:
    """Each passes its own check, and the product is right for any rows and sizes, jitted, x donated, differentiated."""
    if bits == 8 and layout in tiling.CONTRACTS:
        pytest.skip("tiles hold 4 bits")
    for kernel in products.KERNELS:
        products.verify(kernel, layout, bits)
    contract = tiling.CONTRACTS.get(layout, layout)
    for features, width, group in ((1000, 4096, 128), (4099, 1000, 128), (333, 700, 32)):
        if layout in tiling.CONTRACTS and group != 128:
            continue
        case = random_case(rng, features, width, group, bits=bits, contract=contract)
        data = case.data if layout == contract else tiling.tile(case.data, contract)
        options = case.options | dict(implementation="jax-triton", layout="plain" if layout == contract else layout)

        def call(x: jax.Array, data: jax.Array, scale: jax.Array, options: Any = options) -> jax.Array:
            return dequant_matmul(x, data, scale, **options)

        @functools.partial(jax.jit, donate_argnums=0)
        def donated(*args: jax.Array, call: Any = call) -> tuple[jax.Array, jax.Array]:
            return -args[0], call(*args)

        for count in (1, 2, 4, 5, 9, 16, 33, 64, 200, 400):
            for dtype, bound in BOUND.items():
                x = jnp.asarray(rng.standard_normal((count, width)), dtype)
                want = np.asarray(x).astype(np.float64) @ case.dense.T
                got = donated(x, data, case.scale)[1]
                assert relative(got, want) < bound * (10 if dtype == "float32" else 1), (features, width, count, dtype)
        x = jnp.ones((2, width), jnp.float32)
        slope = jax.grad(lambda *args, call=call: call(*args).sum())(x, data, case.scale)
        assert relative(slope, np.tile(case.dense.sum(0), (2, 1))) < 1e-4


@with_triton
@pytest.mark.gpu
@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("bits", [8, 16])
def test_attention_on_the_device(rng: np.random.Generator, bits: int) -> None:
    """It passes its own check, and agrees with XLA's for any number of rows, jitted, caches donated."""
    attention.verify()
    for rows in (1, 5, 9, 64):
        q, caches, start, slot = drawn(rng, rows, bits)
        want = np.asarray(cached_attention(q, caches, start, slot, scale=0.2, implementation="reference"), np.float64)

        @functools.partial(jax.jit, donate_argnums=1)
        def call(q: jax.Array, caches: Caches, start: jax.Array, slot: jax.Array) -> tuple[jax.Array, Caches]:
            out = cached_attention(q, caches, start, slot, scale=0.2, implementation="jax-triton")
            return out, jax.tree.map(lambda x: -x, caches)

        assert relative(call(q, caches, start, slot)[0], want) < 1e-2


@with_triton
@pytest.mark.gpu
@pytest.mark.usefixtures("checked")
def test_it_runs_where_pallas_has_no_triton(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "plgpu", None)
    monkeypatch.setattr(compat, "mosaic_gpu", None)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert not pallas.available()
    case = random_case(rng, 512, 1024, 128)
    x = jnp.asarray(rng.standard_normal((1, 1024)), jnp.bfloat16)
    lowered = jax.jit(lambda x: dequant_matmul(x, case.data, case.scale, **case.options)).lower(x)
    assert "triton_kernel_call" in lowered.as_text()
    assert relative(lowered.compile()(x), np.asarray(x).astype(np.float64) @ case.dense.T) < BOUND["bfloat16"]
