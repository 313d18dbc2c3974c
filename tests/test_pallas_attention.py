"""One suite over every implementation of attention, against softmax and its derivative in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_cases import relative
from uniql_jax.pallas_kernels import compat, dispatch
from uniql_jax.pallas_kernels.attention import cached, cached_attention, causal_attention, cudnn, prefill, reference
from uniql_jax.pallas_kernels.attention.caches import Caches, dequantize, quantize

BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
"""Of norms. In 16 bits the softmax is rounded before the product with values, and so is the result."""

BACKENDS = ("plain", "blocked", "cudnn")
SHAPES = [
    # (batch, length, heads, kv_heads, width of q and k, width of v)
    (2, 70, 6, 2, 22, 30),
    (1, 129, 3, 3, 16, 8),
    (2, 64, 4, 1, 128, 112),
    pytest.param((1, 515, 8, 2, 96, 104), marks=pytest.mark.gpu),
]
PADDING = ("none", "left", "right", "holes")


def stand_in(q, k, v, *, scale, is_causal, query_seq_lengths, key_value_seq_lengths, implementation):
    """Asks of its input what cuDNN asks; beyond a sequence's length results and gradients are NaN."""
    assert implementation == "cudnn"
    assert is_causal
    assert query_seq_lengths is key_value_seq_lengths
    assert q.shape[3] == k.shape[3] == v.shape[3] <= 128
    assert q.shape[3] % 8 == 0
    assert q.dtype == k.dtype == v.dtype == jnp.bfloat16
    lengths = jnp.full(q.shape[:1], q.shape[1]) if query_seq_lengths is None else query_seq_lengths
    inside = (jnp.arange(q.shape[1]) < lengths[:, None])[:, :, None, None]

    def exact(*arrays):
        wide = (x.astype(jnp.float32) for x in arrays)
        visible = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))[None] & inside[:, None, :, 0, 0]
        out = reference.plain(*wide, visible, scale)
        return jnp.where(inside, out, jnp.nan).astype(jnp.bfloat16)

    @jax.custom_vjp
    def call(*arrays):
        return exact(*arrays)

    def backward(arrays, cotangent):
        found = jax.vjp(exact, *arrays)[1](cotangent)
        return tuple(jnp.where(inside, x, jnp.nan) for x in found)

    call.defvjp(lambda *arrays: (call(*arrays), arrays), backward)
    return call(q, k, v)


@pytest.fixture(params=BACKENDS)
def attend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """causal_attention by one backend; cuDNN's kernel itself where there is a GPU."""
    if request.param == "cudnn" and jax.default_backend() != "gpu":
        monkeypatch.setattr(compat, "capability", lambda: 8.0)
        monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    if request.param == "blocked":
        monkeypatch.setattr(reference, "SCORES", dict.fromkeys(reference.SCORES, 7 * 70 * 6))
    name = "cudnn" if request.param == "cudnn" else "reference"
    call = functools.partial(causal_attention, implementation=name)
    call.dtypes = ("bfloat16",) if name == "cudnn" else ("float32", "bfloat16")
    return call


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> tuple[jnp.ndarray, ...]:
    batch, length, heads, kv_heads, width, value_width = shape
    sizes = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    return tuple(jnp.asarray(rng.normal(size=(batch, length, *size)), jnp.dtype(dtype)) for size in sizes)


def pad(rng: np.random.Generator, kind: str, batch: int, length: int) -> jnp.ndarray | None:
    """Which tokens are real; the last sequence of several has none at all."""
    if kind == "none":
        return None
    counts = rng.integers(1, length, batch)
    place = np.arange(length)[None]
    valid = {
        "left": place >= length - counts[:, None],
        "right": place < counts[:, None],
        "holes": rng.random((batch, length)) < 0.6,
    }[kind]
    valid[1:] = valid[1:] & (np.arange(1, batch) < batch - 1)[:, None]
    return jnp.asarray(valid)


def visible_to(valid: jnp.ndarray | None, batch: int, length: int) -> np.ndarray:
    real = np.ones((batch, length), bool) if valid is None else np.asarray(valid)
    return np.tril(np.ones((length, length), bool))[None] & real[:, None, :] & real[:, :, None]


class Truth:
    """Attention in float64 and, given a cotangent, the derivative, by its formulas."""

    def __init__(self, q, k, v, visible: np.ndarray, scale: float):
        q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
        self.share = q.shape[2] // k.shape[2]
        self.q, self.scale = q, scale
        self.k, self.v = np.repeat(k, self.share, axis=2), np.repeat(v, self.share, axis=2)
        scores = np.where(visible[:, None], np.einsum("btnd,bsnd->bnts", self.q, self.k) * scale, -np.inf)
        top = np.max(scores, axis=-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
        self.p = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        self.out = np.einsum("bnts,bsnr->btnr", self.p, self.v)

    def gradient(self, cotangent) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        d = np.asarray(cotangent).astype(np.float64)
        dp = np.einsum("btnr,bsnr->bnts", d, self.v)
        ds = self.p * (dp - (dp * self.p).sum(-1, keepdims=True)) * self.scale
        dk, dv = np.einsum("bnts,btnd->bsnd", ds, self.q), np.einsum("bnts,btnr->bsnr", self.p, d)
        together = lambda x: x.reshape(*x.shape[:2], -1, self.share, x.shape[3]).sum(3)  # noqa: E731
        return np.einsum("bnts,bsnd->btnd", ds, self.k), together(dk), together(dv)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_softmax(rng: np.random.Generator, attend, shape, padding: str) -> None:
    valid, scale = pad(rng, padding, *shape[:2]), float(rng.uniform(0.05, 0.3))
    for dtype in attend.dtypes:
        q, k, v = draw(rng, shape, dtype)
        got = jax.jit(lambda *a: attend(*a, scale=scale))(q, k, v, valid)
        assert got.dtype == jnp.dtype(dtype)
        assert relative(got, Truth(q, k, v, visible_to(valid, *shape[:2]), scale).out) < BOUND[dtype]
        if valid is not None:
            assert not np.asarray(got)[~np.asarray(valid)].any(), "padding gets zeros"


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
def test_gradient(rng: np.random.Generator, attend, padding: str) -> None:
    shape = SHAPES[0]
    valid, scale = pad(rng, padding, *shape[:2]), 0.2
    for dtype in attend.dtypes:
        q, k, v = draw(rng, shape, dtype)
        cotangent = jnp.asarray(rng.normal(size=(*shape[:3], shape[5])), jnp.dtype(dtype))
        pull = jax.jit(lambda q, k, v, c: jax.vjp(lambda *a: attend(*a, valid, scale=scale), q, k, v)[1](c))
        truth = Truth(q, k, v, visible_to(valid, *shape[:2]), scale)
        for got, want in zip(pull(q, k, v, cotangent), truth.gradient(cotangent), strict=True):
            assert relative(got, want) < 2 * BOUND[dtype]


@pytest.mark.parametrize(("length", "scores"), [(1, 10**9), (37, 10**9), (37, 3000)])
@pytest.mark.parametrize("bits", [8, 16])
def test_new_tokens_over_a_cache(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, length: int, scores: int, bits: int
) -> None:
    """Rows that begin at several slots, over several tiles; a query before its row's start sees nothing."""
    monkeypatch.setattr(reference, "SCORES", dict.fromkeys(reference.SCORES, scores))
    monkeypatch.setattr(cached, "TILE", 16)
    slots, slot = 77, 30
    q, _, _ = draw(rng, (3, length, 6, 3, 10, 1), "float32")
    _, k, v = draw(rng, (3, slots, 6, 3, 10, 7), "float32")
    start = np.asarray([0, 25, 41])
    place, own = np.arange(slots), slot + np.arange(length)
    visible = (place[None, None] >= start[:, None, None]) & (place[None, None] <= own[None, :, None])
    caches = (
        Caches(k, v)
        if bits == 16
        else Caches(*(x for pair in zip(quantize(k), quantize(v), strict=True) for x in pair))
    )
    wide = [dequantize(caches.k, caches.k_scale, jnp.float32), dequantize(caches.v, caches.v_scale, jnp.float32)]
    poison = (place[None] < start[:, None]) | (place[None] > own[-1])
    if bits == 16:
        caches = jax.tree.map(lambda x: jnp.where(poison[:, :, None, None], jnp.nan, x), caches)
    run = jax.jit(functools.partial(cached_attention, scale=0.4))
    got = run(q, caches, jnp.asarray(start, jnp.int32), jnp.int32(slot))
    assert relative(got, Truth(q, *wide, visible, 0.4).out) < BOUND["float32"]
    if length > 1:
        assert not np.asarray(got)[2, :11].any()
    # tiles before the first start and behind the last token are not even looked at
    of_row = jax.tree.map(lambda x: x[2:], caches)
    alone = run(q[2:], of_row, jnp.asarray([41], jnp.int32), jnp.int32(slot))
    np.testing.assert_allclose(alone[0], got[2], atol=1e-6)


def test_no_square_of_scores_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor back: all scores of this case are 64 MiB."""
    monkeypatch.setattr(reference, "SCORES", dict.fromkeys(reference.SCORES, 2**19))
    shapes = [jax.ShapeDtypeStruct((1, 2048, 4, 8), jnp.float32)] * 3
    call = functools.partial(causal_attention, scale=0.3, implementation="reference")
    grad = jax.grad(lambda *a: call(*a).sum(), (0, 1, 2))
    for function in (call, grad):
        assert jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 2**24


def test_what_cudnn_does_not_do(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(rng, (1, 64, 2, 2, 16, 16), "bfloat16")
    call = functools.partial(causal_attention, scale=0.25)
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
            call(q, k, v, implementation="cudnn")
    monkeypatch.setattr(compat, "capability", lambda: 8.9)
    for arrays, match in (
        ([x.astype(jnp.float32) for x in (q, k, v)], "16-bit"),
        ((q, k, v.astype(jnp.float16)), "16-bit"),
        ((q, k, jnp.tile(v, 9)), "144 wide"),
        ((q[:, :63], k[:, :63], v[:, :63]), "from 64 tokens"),
    ):
        with pytest.raises(NotImplementedError, match=match):
            call(*arrays, implementation="cudnn")
        monkeypatch.setenv(dispatch.VARIABLE, "cudnn")
        assert call(*arrays).shape == (*arrays[0].shape[:3], arrays[2].shape[3])
    monkeypatch.setattr(compat, "capability", lambda: 9.0)
    cudnn.supported(q, k, jnp.tile(v, 9))


def test_bad_shapes_are_refused(rng: np.random.Generator) -> None:
    q, k, v = draw(rng, (2, 5, 4, 2, 6, 3), "float32")
    prefill.check(q, k, v)
    for arrays, match in (
        ((q[0], k, v), "are \\[batch, length"),
        ((q[:, :, :3], k, v), "heads divide"),
        ((q[..., :4], k, v), "heads divide"),
        ((q, k, v[:, :3]), "does not fit k"),
    ):
        with pytest.raises(ValueError, match=match):
            prefill.check(*arrays)
