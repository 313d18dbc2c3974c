"""Fused decode products: a norm, several weights, activations and residual sums in the launches of the products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import pallas_cases
from uniql_jax.pallas_kernels import blocks, packing
from uniql_jax.pallas_kernels.dequant_matmul import fused, tiling
from uniql_jax.pallas_kernels.dequant_matmul.fused import Job, Stream
from uniql_jax.pallas_kernels.dequant_matmul.mma import Settings
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

EPS = 1e-5


def draw(rng: np.random.Generator, layout: str, features: int, groups: int) -> tuple[Weight, tuple, np.ndarray]:
    """A random weight in a layout: static half, (data, scale), and dense float32 [features, K]."""
    data = rng.integers(-(2**31), 2**31 - 1, (features, 16 * groups), dtype=np.int32)
    scale = jnp.asarray(rng.uniform(0.01, 0.03, (features, groups)), jnp.bfloat16)
    dense = packing.dequantize_last(jnp.asarray(data), scale, bits=4, group=128, width=128 * groups)
    held, contract = data, "last" if layout in ("rows", "last") else "first"
    if contract == "first":
        held, scale = data.T, scale.T
    if layout in tiling.CONTRACTS:
        held = tiling.tile(np.ascontiguousarray(held), contract)
    return Weight(layout, features, groups, 128), (jnp.asarray(held), scale), np.asarray(dense)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    """bf16 normal numbers."""
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


def normed(x: jax.Array, norm: np.ndarray) -> np.ndarray:
    """RMS norm in float32."""
    wide = np.asarray(x, np.float32)
    return wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * norm


def close(got: jax.Array, want: np.ndarray, bound: float = 8e-3) -> None:
    """Relative error of a whole array."""
    got = np.asarray(got, np.float32)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) < bound * np.linalg.norm(want)


def plain(x: jax.Array, count: int) -> jax.Array:
    """An output that may be in blocks, as a matrix."""
    return x if x.ndim == 2 else pallas_cases.from_blocks(x, count)


@pytest.mark.parametrize("count", [1, 3, 8, 11, 16])
def test_blocks_invert(count: int, rng: np.random.Generator) -> None:
    x = normal(rng, count, 256)
    assert (pallas_cases.from_blocks(blocks.in_blocks(x), count) == x).all()


@pytest.mark.parametrize("count", [1, pytest.param(5, marks=pytest.mark.slow), 12])
@pytest.mark.parametrize("biased", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("layout", ["rows", "last"])
def test_read_takes_several_weights(count: int, biased: bool, layout: str, rng: np.random.Generator) -> None:
    drawn = [draw(rng, layout, features, 3) for features in (40, 16, 23)]
    x, norm = normal(rng, count, 384), rng.uniform(0.5, 1.5, 384).astype(np.float32)
    biases = [jnp.asarray(rng.standard_normal(w.features), jnp.float32) for w, _, _ in drawn]
    jobs = [Job((weight,), biased) for weight, _, _ in drawn]
    operands = [[(*held, bias) if biased else held] for (_, held, _), bias in zip(drawn, biases, strict=True)]
    outs = jax.jit(lambda x: fused.read(fused.prepare(x, jnp.asarray(norm)), jobs, operands, eps=EPS)[0])(x)
    for out, (_, _, dense), bias in zip(outs, drawn, biases, strict=True):
        close(out, normed(x, norm) @ dense.T + (np.asarray(bias) if biased else 0))


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow), 16])
@pytest.mark.parametrize("activation", ["silu", pytest.param("relu2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings", [None, Settings(along_k=2, tiles=2, gate=True), Settings(along_k=1, along_n=2, zero="mma", batch=2)]
)
def test_gate_and_up(count: int, activation: str, settings: Settings | None, rng: np.random.Generator) -> None:
    (weight, gate, dense), (_, up, dense_up) = draw(rng, "rows", 128, 2), draw(rng, "rows", 128, 2)
    x, norm = normal(rng, count, 256), np.ones(256, np.float32)
    job = Job((weight, weight), activation=activation, blocked=True)
    stream = fused.prepare(x, jnp.asarray(norm))
    [out] = jax.jit(lambda s: fused.read(s, [job], [[gate, up]], eps=EPS, settings=settings)[0])(stream)
    assert out.ndim == (2 if count == 1 else 4)
    y = normed(x, norm) @ dense.T
    act = y / (1 + np.exp(-y)) if activation == "silu" else np.maximum(y, 0) ** 2
    close(plain(out, count), act * (normed(x, norm) @ dense_up.T))


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.slow), 9])
@pytest.mark.parametrize("layout", ["groups", "first"])
@pytest.mark.parametrize("biased", [False, True])
def test_write_adds_and_prepares(count: int, layout: str, biased: bool, rng: np.random.Generator) -> None:
    width = 200
    weight, held, dense = draw(rng, layout, width, 3)
    hidden, x = normal(rng, count, 384), normal(rng, count, width)
    norm = jnp.asarray(rng.uniform(0.5, 1.5, width), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(width), jnp.float32)
    if count > 1:  # blocks of 32 hold no 200
        with pytest.raises(NotImplementedError, match="blocks of 32"):
            fused.write(hidden, weight, held, Stream(x), norm)
        width = 256
        weight, held, dense = draw(rng, layout, width, 3)
        x, norm, bias = normal(rng, count, width), jnp.ones(width) * 0.7, jnp.zeros(width) + 0.3
    operands = (*held, bias) if biased else held
    run = jax.jit(lambda hidden, x: fused.write(hidden, weight, operands, Stream(x), norm))
    given = blocks.in_blocks(hidden) if count > 1 else hidden
    out = run(given, x)
    want = np.asarray(x, np.float32) + np.asarray(hidden, np.float32) @ dense.T + (np.asarray(bias) if biased else 0)
    close(out.x, want)
    assert out.scaled is not None
    assert out.squares is not None
    close(plain(out.scaled, count), np.asarray(out.x, np.float32) * np.asarray(norm))
    np.testing.assert_allclose(out.squares.sum(-1), np.square(np.asarray(out.x, np.float32)).sum(-1), rtol=1e-5)


def test_more_rows_are_refused(rng: np.random.Generator) -> None:
    weight, held, _ = draw(rng, "rows", 16, 1)
    with pytest.raises(NotImplementedError, match="16 rows"):
        fused.read(Stream(normal(rng, 17, 128)), [Job((weight,))], [[held]], eps=EPS)


@pytest.mark.parametrize(
    "count", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("split", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_programs_share_a_contraction(count: int, split: int, rng: np.random.Generator) -> None:
    cut = Settings(along_k=2, split=split, tiles=2 if split == 2 else 1)
    (first, held, dense), (second, its, its_dense) = draw(rng, "rows", 128, 8), draw(rng, "rows", 48, 8)
    (weight, down, down_dense), x = draw(rng, "groups", 64, 7), normal(rng, count, 1024)
    jobs, norm = [Job((first,), blocked=True), Job((second,))], jnp.ones(64)
    hidden = normal(rng, count, 7 * 128)

    @jax.jit
    def run(x: jax.Array, hidden: jax.Array) -> tuple:
        outs, stream = fused.read(fused.prepare(x, jnp.ones(1024)), jobs, [[held], [its]], eps=EPS, settings=cut)
        counts = stream.counts
        stream = Stream(x[:, :64], counts=counts)
        return outs, counts, fused.write(hidden, weight, down, stream, norm, settings=cut)

    outs, counts, out = run(x, hidden)
    close(plain(outs[0], count), normed(x, np.ones(1024)) @ dense.T)
    close(outs[1], normed(x, np.ones(1024)) @ its_dense.T)
    close(out.x, np.asarray(x[:, :64], np.float32) + np.asarray(hidden, np.float32) @ down_dense.T)
    np.testing.assert_allclose(out.squares.sum(-1), np.square(np.asarray(out.x, np.float32)).sum(-1), rtol=1e-5)
    assert not counts.any(), "zero again"
    assert not out.counts.any()
