"""One suite over every implementation of the dequantizing product, against float64 numpy of the dequantized weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pallas_cases import Case, nvidia, random_case, relative
from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.dequant_matmul import api, blocked, dequant_matmul

BOUND = {"float32": 1e-5, "bfloat16": 4e-3}
"""Relative error. bfloat16's output alone rounds by up to 2e-3."""

SHAPES = [
    # (outputs, width, group), rows of x, its dtype
    ((100, 576, 144), 1, "bfloat16"),  # SmolLM2's hidden size
    ((65, 448, 112), 17, "float32"),
    ((48, 300, 128), 3, "bfloat16"),  # the last group is padded
    ((33, 72, 72), 70, "float32"),  # rows of x of several tiles
]

HERE = [name for name in api.IMPLEMENTATIONS if name != "jax-triton"]  # which has a file of its own: GPUs alone run it
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", HERE)
layouts = pytest.mark.parametrize(("contract", "bits"), [("last", 4), ("last", 8), ("first", 4), ("first", 8)])
two_layouts = pytest.mark.parametrize(("contract", "bits"), [("last", 4), ("first", 8)])
other_layouts = pytest.mark.parametrize(("contract", "bits"), [("last", 8), ("first", 4)])


def inputs(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jnp.ndarray:
    return jnp.asarray(rng.normal(size=shape), jnp.dtype(dtype))


def product(x: jnp.ndarray, case: Case, implementation: str) -> jnp.ndarray:
    """The kernel under jit."""
    call = jax.jit(lambda x, d, s: dequant_matmul(x, d, s, implementation=implementation, **case.options))
    return call(x, case.data, case.scale)


def wanted(x: jnp.ndarray, case: Case) -> np.ndarray:
    return np.asarray(x).astype(np.float64) @ case.dense.T


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that these weights have several of them, and remainders."""
    monkeypatch.setattr(blocked, "BLOCK", 32)
    monkeypatch.setattr(blocked, "LARGE", 0)


@IMPLEMENTATIONS
@layouts
@pytest.mark.parametrize(("shape", "count", "dtype"), SHAPES, ids=str)
def test_agrees_with_float64(
    rng: np.random.Generator, implementation: str, contract: str, bits: int, shape, count: int, dtype: str
) -> None:
    case = random_case(rng, *shape, bits=bits, contract=contract)
    x = inputs(rng, (count, case.width), dtype)
    got = product(x, case, implementation)
    assert got.dtype == x.dtype
    assert got.shape == (count, shape[0])
    assert relative(got, wanted(x, case)) < BOUND[dtype]


@IMPLEMENTATIONS
@settings(max_examples=6)
@given(data=st.data())
def test_agrees_with_float64_at_any_shape(implementation: str, data: st.DataObject) -> None:
    group = 8 * data.draw(st.integers(1, 20), "group / 8")
    width = data.draw(st.integers(1, 3 * group), "width")
    outputs, count = data.draw(st.integers(1, 90), "outputs"), data.draw(st.integers(1, 40), "count")
    bits, contract = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from(["last", "first"]))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    case = random_case(rng, outputs, width, group, bits=bits, contract=contract)
    x = inputs(rng, (count, width), dtype)
    got = product(x, case, implementation)
    want = wanted(x, case)
    # A single output may cancel to nothing, so errors are measured against what was summed.
    summed = np.linalg.norm(np.abs(np.asarray(x).astype(np.float64)) @ np.abs(case.dense.T))
    error = np.linalg.norm(np.asarray(got).astype(np.float64) - want)
    assert error <= BOUND[dtype] * np.linalg.norm(want) + 1e-6 * summed


@IMPLEMENTATIONS
@two_layouts
def test_groups_and_outputs_of_several_tiles(
    rng: np.random.Generator, implementation: str, contract: str, bits: int
) -> None:
    case = random_case(rng, 130, 512, 512, bits=bits, contract=contract)
    x = inputs(rng, (3, 512), "bfloat16")
    assert relative(product(x, case, implementation), wanted(x, case)) < BOUND["bfloat16"]


@IMPLEMENTATIONS
@two_layouts
def test_leading_dimensions(rng: np.random.Generator, implementation: str, contract: str, bits: int) -> None:
    case = random_case(rng, 20, 96, 48, bits=bits, contract=contract)
    x = inputs(rng, (2, 3, 96), "float32")
    got = product(x, case, implementation)
    assert got.shape == (2, 3, 20)
    assert relative(got, wanted(x, case)) < BOUND["float32"]
    one = product(x[0, 0], case, implementation)
    assert one.shape == (20,)
    assert relative(one, wanted(x[0, 0], case)) < BOUND["float32"]


@IMPLEMENTATIONS
@other_layouts
def test_a_prefix_is_the_dense_prefix(rng: np.random.Generator, implementation: str, contract: str, bits: int) -> None:
    """Pruning cuts rows ("last") or whole groups ("first") off the packed arrays and nothing else."""
    case = random_case(rng, 90, 448, 112, bits=bits, contract=contract)
    if contract == "last":
        kept, width = 53, 448
        data, scale, dense = case.data[:kept], case.scale[:kept], case.dense[:kept]
    else:
        kept, width = 90, 224
        data, scale = case.data[: width // (8 if bits == 4 else 1)], case.scale[: width // 112]
        dense = case.dense[:, :width]
    x = inputs(rng, (5, width), "float32")
    options = case.options | dict(width=width)
    got = dequant_matmul(x, data, scale, implementation=implementation, **options)
    assert got.shape == (5, kept)
    assert relative(got, np.asarray(x).astype(np.float64) @ dense.T) < BOUND["float32"]


@IMPLEMENTATIONS
@other_layouts
def test_gradients(rng: np.random.Generator, implementation: str, contract: str, bits: int) -> None:
    """d/dx and d/dscale of sum(c * y) are c W and its sums over groups, in float64."""
    case = random_case(rng, 40, 150, 48, bits=bits, contract=contract)
    x, c = inputs(rng, (4, 150), "float32"), inputs(rng, (4, 40), "float32")

    def loss(x: jnp.ndarray, scale: jnp.ndarray) -> jnp.ndarray:
        return jnp.vdot(c, dequant_matmul(x, case.data, scale, implementation=implementation, **case.options))

    scale = case.scale.astype(jnp.float32)
    x_bar, scale_bar = jax.jit(jax.grad(loss, (0, 1)))(x, scale)
    c64, x64 = np.asarray(c, np.float64), np.asarray(x, np.float64)
    assert relative(x_bar, c64 @ case.dense) < BOUND["float32"]
    numpy_scale = np.asarray(scale if contract == "last" else scale.T, np.float64)
    terms = (c64.T @ x64) * case.dense / np.repeat(numpy_scale, 48, axis=1)[:, :150]
    want = np.add.reduceat(terms, np.arange(0, 150, 48), axis=1)
    assert relative(scale_bar, want if contract == "last" else want.T) < BOUND["float32"]


@IMPLEMENTATIONS
def test_no_tracer_leaks_and_one_trace_serves(rng: np.random.Generator, implementation: str) -> None:
    case = random_case(rng, 40, 96, 48)
    traces = 0

    @jax.jit
    def call(x: jnp.ndarray, data: jnp.ndarray, scale: jnp.ndarray) -> jnp.ndarray:
        nonlocal traces
        traces += 1
        return dequant_matmul(x, data, scale, implementation=implementation, **case.options)

    with jax.checking_leaks():
        for _ in range(2):
            call(inputs(rng, (2, 96), "bfloat16"), case.data, case.scale)
    assert traces == 1


def test_default_is_right_at_sizes_with_real_blocks(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = random_case(rng, 2 * blocked.BLOCK + 37, 576, 144)
    x = inputs(rng, (1, 576), "float32")
    assert relative(dequant_matmul(x, case.data, case.scale, **case.options), wanted(x, case)) < BOUND["float32"]
    # Many rows of x and a weight that fits the cache: blocked declines, the default falls back.
    many = inputs(rng, (blocked.FEW + 1, 576), "float32")
    with pytest.raises(NotImplementedError):
        dequant_matmul(many, case.data, case.scale, implementation="blocked", **case.options)
    assert relative(dequant_matmul(many, case.data, case.scale, **case.options), wanted(many, case)) < 1e-5


def test_non_finite_scale_stays_in_its_row(rng: np.random.Generator) -> None:
    """A masked tile must not drag a neighbour's NaN in."""
    case = random_case(rng, 20, 72, 24)
    scale = case.scale.at[3, 1].set(jnp.nan)
    x = inputs(rng, (2, 72), "float32")
    for implementation in HERE:
        got = np.asarray(product(x, dataclasses.replace(case, scale=scale), implementation))
        assert np.isnan(got[:, 3]).all()
        assert np.isfinite(np.delete(got, 3, axis=1)).all()


def test_bad_input_is_refused(rng: np.random.Generator) -> None:
    case = random_case(rng, 20, 72, 24)
    with pytest.raises(ValueError, match="does not end in the weight's width 72"):
        dequant_matmul(jnp.zeros((2, 71)), case.data, case.scale, **case.options)
    with pytest.raises(ValueError, match="3 groups of 24 hold 72 weights"):
        dequant_matmul(jnp.zeros((2, 73)), case.data, case.scale, **case.options | dict(width=73))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@layouts
def test_kernel_lowers_for_nvidia_gpus(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, contract: str, bits: int
) -> None:
    """The Triton lowering needs no GPU; it refuses what its compiler could not take."""
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    case = random_case(rng, 100, 432, 144, bits=bits, contract=contract)
    for count, dtype in ((1, "bfloat16"), (40, "float32")):
        call = jax.jit(lambda x, d, s: dequant_matmul(x, d, s, implementation="pallas", **case.options))
        x = inputs(rng, (count, 432), dtype)
        with nvidia():
            lowered = call.trace(x, case.data, case.scale).lower(lowering_platforms=("cuda",))
        assert "triton" in lowered.as_text()
