"""One token per sequence over a cache: the specification against the attention block, and the kernel against it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import pallas_cases
from tests.pallas_cases import nvidia
from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.attention import decode, decode_pallas
from uniql_jax.pallas_kernels.attention.decode import Caches, Place, Token
from uniql_jax.pallas_kernels.attention.decode_pallas import Settings

BOUND = {"float32": 1e-5, "bfloat16": 1.5e-2}
"""Relative, of norms; bf16 weights of the softmax are rounded before and after they are divided by their sum."""

SHAPES = [
    # batch, slots, pairs, pair, passed, kv heads, query heads, ranks
    (1, 40, 8, 2, 0, 2, 8, 16),
    (3, 70, 5, 2, 0, 3, 3, 9),
    (2, 33, 7, 2, 6, 1, 5, 12),
    (2, 130, 24, 1, 0, 2, 4, 40),
]


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> tuple:
    """A token, caches whose slots from `slot` on hold garbage, and the rest of decode's arguments."""
    batch, slots, pairs, pair, passed, groups, heads, ranks = shape

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(size), dtype)

    slot = int(rng.integers(slots // 2, slots))
    token = Token(normal(batch, pairs, pair, heads), normal(batch, pairs, pair, groups), normal(batch, ranks, groups))
    if passed:
        token = token._replace(q_pass=normal(batch, passed, heads), k_pass=normal(batch, passed, groups))
    k, v = normal(batch, slots, groups, pairs * pair + passed), normal(batch, slots, groups, ranks)
    later = jnp.arange(slots)[None, :, None, None] >= slot
    caches = Caches(jnp.where(later, 77.0, k).astype(dtype), jnp.where(later, -55.0, v).astype(dtype))
    positions = rng.integers(0, slot + 1, batch)
    visible = (np.arange(slots) <= slot) & (np.arange(slots) >= slot - positions[:, None])
    inv_freq = jnp.asarray(rng.uniform(0.01, 1, (pairs, groups)), jnp.float32) if pair == 2 else None
    return token, caches, inv_freq, Place(jnp.asarray(positions, jnp.int32), jnp.asarray(visible), jnp.int32(slot))


def relative(got: jax.Array, want: jax.Array) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def brute_force(token: Token, caches: Caches, inv_freq, place: Place, scale: float) -> np.ndarray:
    """Float64, one head after another, with complex numbers for the rotation."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (token, caches))
    token, caches = wide
    batch, _, _, heads = token.q.shape
    groups = caches.k.shape[2]
    out = np.zeros((batch, caches.v.shape[3], heads))

    def vector(name: str, b: int, head: int) -> np.ndarray:
        x = getattr(token, name)[b, :, :, head]
        if inv_freq is not None:
            column = head if name == "k" else head // (heads // groups)
            angle = float(place.positions[b]) * np.asarray(inv_freq, np.float64)[:, column]
            turned = (x[:, 0] + 1j * x[:, 1]) * np.exp(1j * angle)
            x = np.stack([turned.real, turned.imag], axis=1)
        passed = getattr(token, f"{name}_pass")
        return np.concatenate([x.reshape(-1), [] if passed is None else passed[b, :, head]])

    for b in range(batch):
        for head in range(heads):
            group = head // (heads // groups)
            keys, values = caches.k[b, :, group].copy(), caches.v[b, :, group].copy()
            keys[int(place.slot)], values[int(place.slot)] = vector("k", b, group), token.v[b, :, group]
            seen = np.asarray(place.visible[b]) != 0
            scores = keys[seen] @ vector("q", b, head) * scale
            weights = np.exp(scores - scores.max())
            out[b, :, head] = weights / weights.sum() @ values[seen]
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_the_specification_is_attention(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    arguments = draw(rng, shape, "float32")
    out, caches = decode.decode(*arguments, scale=0.3, implementation="reference")
    assert relative(out, brute_force(*arguments, scale=0.3)) < 1e-5
    slot = int(arguments[-1].slot)
    np.testing.assert_array_equal(caches.v[:, slot], arguments[0].v.swapaxes(1, 2))
    others = np.arange(shape[1]) != slot
    for after, before in zip(caches, arguments[1], strict=True):
        np.testing.assert_array_equal(np.asarray(after)[:, others], np.asarray(before)[:, others])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1100, 64, 2, 0, 8, 32, 128), (16, 300, 48, 2, 0, 8, 32, 112)])
@pytest.mark.parametrize("split", [None, 1, 5])
def test_on_a_gpu(shape: tuple[int, ...], split: int | None, rng: np.random.Generator) -> None:
    the_kernel_is_the_specification(shape, "bfloat16", split, rng)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("split", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_kernel_is_the_specification(
    shape: tuple[int, ...], dtype: str, split: int, rng: np.random.Generator
) -> None:
    the_kernel_is_the_specification(shape, dtype, split, rng)


def the_kernel_is_the_specification(
    shape: tuple[int, ...], dtype: str, split: int | None, rng: np.random.Generator
) -> None:
    if jax.default_backend() != "cpu" and dtype == "float32":
        pytest.skip("on a GPU the kernel attends in 16-bit floats")
    token, caches, *rest = draw(rng, shape, dtype)
    want, after = decode.decode(token, caches, *rest, scale=0.2, implementation="reference")
    cut = None if split is None else Settings(tile=16, split=split)
    run = jax.jit(functools.partial(decode_pallas.attend, scale=0.2, cut=cut))
    done = decode_pallas.counters(shape[0], shape[5])
    out, got, done = run(token, caches, *rest, done)
    assert relative(out.reshape(want.shape), want) < BOUND[dtype]
    assert not done.any(), "the counts are zero again, for the next layer"
    for mine, its in zip(got, after, strict=True):
        assert relative(mine, its) < BOUND[dtype] / 2  # a rotation in another order of operations
    np.testing.assert_array_equal(got.v, after.v)


@pytest.mark.parametrize("batch", [2, 9])
def test_blocked_output(batch: int, rng: np.random.Generator) -> None:
    arguments = draw(rng, (batch, 24, 4, 2, 0, 2, 4, 16), "bfloat16")
    done = decode_pallas.counters(batch, 2)
    plain, _, _ = decode_pallas.attend(*arguments, done, scale=0.3)
    blocked, _, _ = decode_pallas.attend(*arguments, done, scale=0.3, blocked=True)
    np.testing.assert_array_equal(pallas_cases.from_blocks(blocked, batch), plain)


def test_refusals(rng: np.random.Generator) -> None:
    token, caches, *rest = draw(rng, SHAPES[0], "bfloat16")
    with pytest.raises(ValueError, match="do not fit q"):
        decode.decode(token, caches._replace(k=caches.k[..., :-1]), *rest, scale=1.0)
    with pytest.raises(ValueError, match="inv_freq"):
        decode.decode(token, caches, rest[0][:-1], rest[1], scale=1.0)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), token)
    many = wide._replace(q=jnp.zeros((1, 8, 2, 34)))
    with pytest.raises(NotImplementedError, match="query heads"):
        decode.decode(many, caches, *rest, scale=1.0, implementation="pallas")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_lowers_for_nvidia_gpus(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    monkeypatch.setattr(compat, "ampere", lambda: True)
    arguments = draw(rng, (2, 300, 48, 2, 0, 8, 32, 112), "bfloat16")
    done = decode_pallas.counters(2, 8)
    with nvidia():
        traced = jax.jit(functools.partial(decode_pallas.attend, scale=0.1, blocked=True)).trace(*arguments, done)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1
    assert text.count("output_operand_alias<") == 3, "caches and counts stay where they are"
