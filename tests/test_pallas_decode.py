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
from uniql_jax.pallas_kernels.attention.caches import dequantize, quantize
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


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, bits: int = 16) -> tuple:
    """A token, caches with garbage in the slots before a row's start and from `slot` on, and the rest of the arguments.

    What lies before a start is NaN: it must not be read.
    """
    batch, slots, pairs, pair, passed, groups, heads, ranks = shape

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(size), dtype)

    slot = int(rng.integers(slots // 2, slots))
    token = Token(normal(batch, pairs, pair, heads), normal(batch, pairs, pair, groups), normal(batch, ranks, groups))
    if passed:
        token = token._replace(q_pass=normal(batch, passed, heads), k_pass=normal(batch, passed, groups))
    k, v = normal(batch, slots, groups, pairs * pair + passed), normal(batch, slots, groups, ranks)
    start = jnp.asarray(rng.integers(0, slot + 1, batch), jnp.int32)
    later = jnp.arange(slots)[None, :, None, None] >= slot
    before = jnp.arange(slots)[None, :, None, None] < start[:, None, None, None]
    k, v = (jnp.where(before, jnp.nan, jnp.where(later, x, y)).astype(dtype) for x, y in ((77.0, k), (-55.0, v)))
    caches = Caches(k, v)
    if bits == 8:
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        caches = Caches(k, v, *(jnp.where(before[..., 0], jnp.nan, x) for x in (k_scale, v_scale)))
    inv_freq = jnp.asarray(rng.uniform(0.01, 1, (pairs, groups)), jnp.float32) if pair == 2 else None
    return token, caches, inv_freq, Place(start, jnp.int32(slot))


def relative(got: jax.Array, want: jax.Array) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def brute_force(token: Token, caches: Caches, inv_freq, place: Place, scale: float) -> np.ndarray:
    """Float64, one head after another, with complex numbers for the rotation."""
    token, caches = jax.tree.map(lambda x: np.asarray(x, np.float64), (token, caches))
    if caches.k_scale is not None:
        caches = Caches(caches.k * caches.k_scale[..., None], caches.v * caches.v_scale[..., None])
    positions = place.positions(token.q.shape[0])
    batch, _, _, heads = token.q.shape
    groups = caches.k.shape[2]
    out = np.zeros((batch, caches.v.shape[3], heads))

    def vector(name: str, b: int, head: int) -> np.ndarray:
        x = getattr(token, name)[b, :, :, head]
        if inv_freq is not None:
            column = head if name == "k" else head // (heads // groups)
            angle = float(positions[b]) * np.asarray(inv_freq, np.float64)[:, column]
            turned = (x[:, 0] + 1j * x[:, 1]) * np.exp(1j * angle)
            x = np.stack([turned.real, turned.imag], axis=1)
        passed = getattr(token, f"{name}_pass")
        return np.concatenate([x.reshape(-1), [] if passed is None else passed[b, :, head]])

    for b in range(batch):
        for head in range(heads):
            group = head // (heads // groups)
            keys, values = caches.k[b, :, group].copy(), caches.v[b, :, group].copy()
            keys[int(place.slot)], values[int(place.slot)] = vector("k", b, group), token.v[b, :, group]
            seen = np.arange(keys.shape[0]) <= int(place.slot)
            seen &= np.arange(keys.shape[0]) >= int(place.start[b])
            scores = keys[seen] @ vector("q", b, head) * scale
            weights = np.exp(scores - scores.max())
            out[b, :, head] = weights / weights.sum() @ values[seen]
    return out


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_specification_is_attention(shape: tuple[int, ...], bits: int, rng: np.random.Generator) -> None:
    arguments = draw(rng, shape, "float32", bits)
    out, caches = jax.jit(functools.partial(decode.decode, scale=0.3, implementation="reference"))(*arguments)
    # the new token is rounded as those before it were
    assert relative(out, brute_force(*arguments, scale=0.3)) < (1e-5 if bits == 16 else 4e-3)
    slot = int(arguments[-1].slot)
    if bits == 16:
        np.testing.assert_array_equal(caches.v[:, slot], arguments[0].v.swapaxes(1, 2))
    others = np.arange(shape[1]) != slot
    for after, before in zip(jax.tree.leaves(caches), jax.tree.leaves(arguments[1]), strict=True):
        after, before = (np.asarray(x, np.float32)[:, others] for x in (after, before))
        np.testing.assert_array_equal(after, before)


def test_eight_bits_round_to_a_step(rng: np.random.Generator) -> None:
    """Half a step at most, of a grid that reaches the largest number of each vector; zeros stay zeros."""
    x = jnp.asarray(rng.standard_normal((5, 3, 40)) * 10.0 ** rng.integers(-6, 6, (5, 3, 1)), jnp.float32)
    held, scale = quantize(x.at[0, 0].set(0))
    assert held.dtype == jnp.int8
    error = np.abs(np.asarray(dequantize(held, scale, jnp.float32)) - np.asarray(x.at[0, 0].set(0)))
    assert (error <= np.abs(x).max(-1, keepdims=True) / 127 * 0.51).all()
    assert not np.asarray(held[0, 0]).any()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1100, 64, 2, 0, 8, 32, 128), (16, 300, 48, 2, 0, 8, 32, 112)])
@pytest.mark.parametrize("split", [None, 1, 5])
def test_on_a_gpu(shape: tuple[int, ...], split: int | None, rng: np.random.Generator) -> None:
    the_kernel_is_the_specification(shape, "bfloat16", split, rng)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "split", "bits"),
    [
        ("float32", 4, 16),
        ("bfloat16", 4, 8),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bfloat16", 4, 16), ("float32", 4, 8))),
        *(pytest.param(dtype, 1, 16, marks=pytest.mark.slow) for dtype in BOUND),
    ],
)
def test_the_kernel_is_the_specification(
    shape: tuple[int, ...], dtype: str, split: int, bits: int, rng: np.random.Generator
) -> None:
    the_kernel_is_the_specification(shape, dtype, split, rng, bits)


def the_kernel_is_the_specification(
    shape: tuple[int, ...], dtype: str, split: int | None, rng: np.random.Generator, bits: int = 16
) -> None:
    if jax.default_backend() != "cpu" and dtype == "float32":
        pytest.skip("on a GPU the kernel attends in 16-bit floats")
    token, caches, *rest = draw(rng, shape, dtype, bits)
    specification = jax.jit(functools.partial(decode.decode, scale=0.2, implementation="reference"))
    want, after = specification(token, caches, *rest)
    cut = None if split is None else Settings(tile=16, split=split)
    run = jax.jit(functools.partial(decode_pallas.attend, scale=0.2, cut=cut))
    done = decode_pallas.counters(shape[0], shape[5])
    out, got, done = run(token, caches, *rest, done)
    assert relative(out.reshape(want.shape), want) < BOUND[dtype]
    assert not done.any(), "the counts are zero again, for the next layer"
    for mine, its in zip(jax.tree.leaves(got), jax.tree.leaves(after), strict=True):
        # a rotation in another order of operations; a rounding to 8 bits may then fall the other way
        bound = BOUND[dtype] / 2 if bits == 16 else 1e-2
        assert relative(jnp.nan_to_num(mine), jnp.nan_to_num(its)) < bound
    np.testing.assert_array_equal(*(np.asarray(x.v, np.float32) for x in (got, after)))
    if shape[0] == 1:  # no row is padded, and code is compiled for that
        whole = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0).astype(x.dtype), caches)
        place = Place(jnp.zeros_like(rest[1].start), rest[1].slot)
        padded, *_ = run(token, whole, rest[0], place, done)
        plain, *_ = run(token, whole, rest[0], place._replace(start=None), done)
        np.testing.assert_array_equal(plain, padded)


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
@pytest.mark.parametrize("bits", [8, 16])
def test_lowers_for_nvidia_gpus(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    monkeypatch.setattr(compat, "ampere", lambda: True)
    arguments = draw(rng, (2, 300, 48, 2, 0, 8, 32, 112), "bfloat16", bits)
    done = decode_pallas.counters(2, 8)
    with nvidia():
        traced = jax.jit(functools.partial(decode_pallas.attend, scale=0.1, blocked=True)).trace(*arguments, done)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1
    assert text.count("output_operand_alias<") == (3 if bits == 16 else 5), "caches and counts stay where they are"
