"""One suite over every implementation of RoPE, against complex rotation in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.pallas_cases import nvidia
from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.rope import api, pallas, rope, rope_qk
from uniql_jax.pallas_kernels.rope.pallas import Settings

BOUND = {"float32": 1e-5, "bfloat16": 4e-3}

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", list(api.BOTH))
SHAPES = [
    # (batch, length, pairs, heads, kv_heads), dtype
    ((1, 1, 32, 9, 3), "bfloat16"),
    ((2, 7, 13, 6, 2), "float32"),
    ((3, 5, 64, 8, 8), "bfloat16"),
    ((1, 33, 3, 4, 1), "float32"),
    ((2, 3, 1, 1, 1), "bfloat16"),
]


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, last: int = 4096) -> tuple[jnp.ndarray, ...]:
    batch, length, pairs, heads, kv_heads = shape
    q = jnp.asarray(rng.normal(size=(batch, length, pairs, 2, heads)), jnp.dtype(dtype))
    k = jnp.asarray(rng.normal(size=(batch, length, pairs, 2, kv_heads)), jnp.dtype(dtype))
    positions = jnp.asarray(rng.integers(0, last, (batch, length)), jnp.int32)
    # Every pair and key/value head has a frequency of its own, as after sorting.
    inv_freq = jnp.asarray(rng.uniform(1e-4, 1.0, (pairs, kv_heads)), jnp.float32)
    return q, k, positions, inv_freq


def rotated(x: jnp.ndarray, positions: jnp.ndarray, inv_freq: jnp.ndarray) -> np.ndarray:
    """x as complex numbers, times exp(i angle). The angle's product is rounded to float32, as the contract says."""
    x64 = np.asarray(x).astype(np.float64)
    frequency = np.asarray(inv_freq)[:, np.arange(x.shape[4]) // (x.shape[4] // inv_freq.shape[1])]
    angle = np.asarray(positions).astype(np.float32)[:, :, None, None] * frequency
    turned = (x64[..., 0, :] + 1j * x64[..., 1, :]) * np.exp(1j * angle.astype(np.float64))
    return np.stack([turned.real, turned.imag], axis=3)


def close(got: jnp.ndarray, want: np.ndarray, dtype: str) -> bool:
    assert got.dtype == jnp.dtype(dtype)
    assert got.shape == want.shape
    return np.linalg.norm(np.asarray(got).astype(np.float64) - want) < BOUND[dtype] * np.linalg.norm(want)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_agrees_with_complex_rotation(rng: np.random.Generator, implementation: str, shape, dtype: str) -> None:
    q, k, positions, inv_freq = draw(rng, shape, dtype)
    both = jax.jit(lambda *a: rope_qk(*a, implementation=implementation))
    got_q, got_k = both(q, k, positions, inv_freq)
    assert close(got_q, rotated(q, positions, inv_freq), dtype)
    assert close(got_k, rotated(k, positions, inv_freq), dtype)
    assert close(rope(q, positions, inv_freq, implementation=implementation), rotated(q, positions, inv_freq), dtype)


CUTS = [
    Settings(elements=16, warps=1),
    Settings(elements=64, shared=True),
    Settings(elements=4096, fast=False),
    Settings(elements=512, shared=True, fast=False, warps=8),
]


@pytest.mark.parametrize("settings", CUTS, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 7, 13, 6, 2), (1, 65, 48, 32, 8), (2, 5, 8, 28, 4), (1, 9, 3, 9, 3), (1, 2, 1, 5, 5)], ids=str
)
def test_every_cut(rng: np.random.Generator, shape, settings: Settings) -> None:
    """Whole tiles and parts of one, any number of heads; forward and back."""
    q, k, positions, inv_freq = draw(rng, shape, "float32")
    call = jax.jit(lambda q, k: jax.vjp(lambda *a: pallas.rope_qk(*a, positions, inv_freq, settings), q, k))
    (got_q, got_k), pull = call(q, k)
    assert close(got_q, rotated(q, positions, inv_freq), "float32")
    assert close(got_k, rotated(k, positions, inv_freq), "float32")
    back_q, back_k = pull((q, k))
    assert close(back_q, rotated(q, -positions, inv_freq), "float32")
    assert close(back_k, rotated(k, -positions, inv_freq), "float32")


def test_whole_turns_are_taken_off_exactly(rng: np.random.Generator) -> None:
    """As the kernel does it: each multiply-add is rounded once, as in float64 and then to float32."""
    angle = (rng.uniform(-1, 1, 100_000) * 10.0 ** rng.uniform(-3, 6, 100_000)).astype(np.float32)
    turns = np.rint(angle * pallas.PER_TURN).astype(np.float64)
    within = (angle - turns * pallas.TURN.astype(np.float64)).astype(np.float32)
    within = (within - turns * pallas.REST.astype(np.float64)).astype(np.float32)
    assert np.abs(within).max() < np.pi + 0.02 * 2 * np.pi
    exact = angle.astype(np.float64) - turns * (2 * np.pi)
    assert np.abs(within - exact).max() < 4e-7


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [True, False])
def test_large_angles_on_the_device(rng: np.random.Generator, fast: bool) -> None:
    q, k, positions, inv_freq = draw(rng, (1, 4096, 8, 4, 2), "float32", last=1_000_000)
    q = q.at[:, :, :, 0].set(1).at[:, :, :, 1].set(0)
    turned = jax.jit(lambda *a: pallas.rope_qk(*a, Settings(fast=fast)))(q, k, positions, inv_freq)[0]
    difference = np.abs(np.asarray(turned, np.float64) - rotated(q, positions, inv_freq))
    assert difference.max() < (1.5e-6 if fast else 3e-7)


@IMPLEMENTATIONS
def test_a_prefix_of_pairs_is_the_prefix_of_the_result(rng: np.random.Generator, implementation: str) -> None:
    q, k, positions, inv_freq = draw(rng, (2, 5, 24, 6, 3), "float32")
    whole = rope_qk(q, k, positions, inv_freq, implementation=implementation)
    part = rope_qk(q[:, :, :11], k[:, :, :11], positions, inv_freq[:11], implementation=implementation)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_allclose(np.asarray(a[:, :, :11]), np.asarray(b), rtol=1e-6, atol=1e-6)


@IMPLEMENTATIONS
def test_gradient_against_finite_differences(rng: np.random.Generator, implementation: str) -> None:
    q, k, positions, inv_freq = draw(rng, (2, 3, 5, 6, 3), "float32", last=100)
    call = jax.jit(lambda q, k: rope_qk(q, k, positions, inv_freq, implementation=implementation))
    # A rotation is linear, so a large step of the finite difference is exact but for rounding.
    check_grads(call, (q, k), order=1, modes=["rev"], eps=1.0, atol=1e-3, rtol=1e-3)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", list(BOUND))
def test_gradient_is_the_rotation_back(rng: np.random.Generator, implementation: str, dtype: str) -> None:
    """The cotangent turned by minus the angle; the same as jax.grad of the reference; none for the table."""
    q, k, positions, inv_freq = draw(rng, (2, 7, 13, 6, 2), dtype)
    weight_q, weight_k, _, _ = draw(rng, (2, 7, 13, 6, 2), dtype)

    def loss(q, k, inv_freq, implementation):
        a, b = rope_qk(q, k, positions, inv_freq, implementation=implementation)
        return jnp.vdot(a, weight_q).astype(jnp.float32) + jnp.vdot(b, weight_k).astype(jnp.float32)

    grad = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    got, reference = grad(q, k, inv_freq, implementation), grad(q, k, inv_freq, "reference")
    assert close(got[0], rotated(weight_q, -positions, inv_freq), dtype)
    assert close(got[1], rotated(weight_k, -positions, inv_freq), dtype)
    for a, b in zip(got[:2], reference[:2], strict=True):
        assert close(a, np.asarray(b).astype(np.float64), dtype)
    assert not np.asarray(got[2]).any()


@IMPLEMENTATIONS
def test_no_tracer_leaks(rng: np.random.Generator, implementation: str) -> None:
    arguments = draw(rng, (1, 3, 4, 2, 1), "float32")
    with jax.checking_leaks():
        jax.jit(lambda *a: rope_qk(*a, implementation=implementation))(*arguments)
        jax.grad(lambda q: rope(q, *arguments[2:], implementation=implementation).sum())(arguments[0])


def test_bad_shapes_are_refused(rng: np.random.Generator) -> None:
    q, k, positions, inv_freq = draw(rng, (2, 3, 4, 6, 2), "float32")
    api.check(q, positions, inv_freq)
    with pytest.raises(ValueError, match="a divisor of heads"):
        rope(q[..., :5], positions, inv_freq)
    with pytest.raises(ValueError, match=r"they are \[batch, length"):
        api.check(q, positions[:1], inv_freq)
    with pytest.raises(ValueError, match="a divisor of heads"):
        api.check(k[:, :, :3], positions, inv_freq)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", list(BOUND))
def test_kernel_lowers_for_nvidia_gpus(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    arguments = draw(rng, (2, 7, 13, 9, 3), dtype)

    def loss(q, k, positions, inv_freq):
        a, b = rope_qk(q, k, positions, inv_freq, implementation="pallas")
        return a.astype(jnp.float32).sum() + b.astype(jnp.float32).sum()

    with nvidia():
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") == 2, "one kernel forward, one backward"
