"""Weights of 4 bits and 3 in one launch, and models of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import pallas_cases, published
from tests.planes_cases import draw, held
from tests.test_decode_fused import SIZES, distance, run
from tests.test_pallas_fused import EPS, close, normal, normed
from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.evaluation import random_nested
from uniql_jax.evaluation.random_model import random_model, weight_shapes
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.layers import fused as layers
from uniql_jax.pallas_kernels import blocks, dispatch
from uniql_jax.pallas_kernels.dequant_matmul import (
    fused,
    mma,
)
from uniql_jax.pallas_kernels.dequant_matmul.fused import Stream
from uniql_jax.pallas_kernels.dequant_matmul.tiling import LAYOUTS
from uniql_jax.plan import make_plan
from uniql_jax.runtime import loading
from uniql_jax.weights.mixed import MixedArray, in_parts


@pytest.mark.parametrize(
    ("count", "border"),
    [(1, 19), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((16, 19), (5, 0), (9, 40)))],
)
def test_read(rng: np.random.Generator, count: int, border: int) -> None:
    """Two leaves of a launch, of which one is all of 4 bits; biases go by the row of the whole."""
    leaves = [held(draw(rng, "last", 40, 384), border), held(draw(rng, "last", 23, 384), 23)]
    x, norm = normal(rng, count, 384), rng.uniform(0.5, 1.5, 384).astype(np.float32)
    biases = [jnp.asarray(rng.standard_normal(len(dense)), jnp.float32) for _, dense in leaves]
    jobs = [layers.job_of([leaf], biased=True) for leaf, _ in leaves]
    operands = [[layers.operands_of(leaf, bias)] for (leaf, _), bias in zip(leaves, biases, strict=True)]
    outs = jax.jit(lambda x: fused.read(fused.prepare(x, jnp.asarray(norm)), jobs, operands, eps=EPS)[0])(x)
    for out, (_, dense), bias in zip(outs, leaves, biases, strict=True):
        close(out, normed(x, norm) @ dense.T + np.asarray(bias))


@pytest.mark.parametrize(
    ("count", "border", "settings"),
    [
        (1, 48, mma.Settings(along_k=1, along_n=2, batch=2, gate=True)),
        pytest.param(9, 77, mma.Settings(along_k=1, tiles=2), marks=pytest.mark.slow),
        pytest.param(1, 0, None, marks=pytest.mark.slow),
        pytest.param(5, 128, None, marks=pytest.mark.slow),
    ],
)
def test_gate_and_up(rng: np.random.Generator, count: int, border: int, settings: Any) -> None:
    (gate, dense), (up, dense_up) = (held(draw(rng, "last", 128, 256), border) for _ in range(2))
    x, norm = normal(rng, count, 256), np.ones(256, np.float32)
    job = layers.job_of([gate, up], activation="silu", blocked=True)
    operands = [[layers.operands_of(gate), layers.operands_of(up)]]
    stream = fused.prepare(x, jnp.asarray(norm))
    [out] = jax.jit(lambda s: fused.read(s, [job], operands, eps=EPS, settings=settings)[0])(stream)
    y = normed(x, norm) @ dense.T
    close(
        jnp.asarray(out if out.ndim == 2 else pallas_cases.from_blocks(out, count)),
        y / (1 + np.exp(-y)) * (normed(x, norm) @ dense_up.T),
    )
    other, _ = held(draw(rng, "last", 128, 256), border // 2)
    with pytest.raises(NotImplementedError, match="one size"):
        layers.job_of([gate, other] if border else [gate, held(draw(rng, "last", 128, 256), 9)[0]])


@pytest.mark.parametrize(
    ("count", "border", "split"), [(1, 384, 1), (9, 256, 3), pytest.param(1, 0, 1, marks=pytest.mark.slow)]
)
def test_write(rng: np.random.Generator, count: int, border: int, split: int) -> None:
    """The contraction is shared out between 4 bits and 3, by warps and by programs."""
    leaf, dense = held(draw(rng, "first", 64, 640), border)
    hidden, x = normal(rng, count, 640), normal(rng, count, 64)
    norm, bias = jnp.ones(64) * 0.7, jnp.asarray(rng.standard_normal(64), jnp.float32)
    cut = mma.Settings(along_k=2, split=split, gate=True)
    weights, operands = layers.weights_of(leaf), layers.operands_of(leaf, bias)
    assert sum(weight.groups for weight in weights) == 5
    call = jax.jit(lambda hidden, x: fused.write(hidden, weights, operands, Stream(x), norm, settings=cut))
    out = call(blocks.in_blocks(hidden) if count > 1 else hidden, x)
    close(out.x, np.asarray(x, np.float32) + np.asarray(hidden, np.float32) @ dense.T + np.asarray(bias))
    np.testing.assert_allclose(out.squares.sum(-1), np.square(np.asarray(out.x, np.float32)).sum(-1), rtol=1e-5)


# --- a model --------------------------------------------------------------------------------------------------------


def model_of(rng: np.random.Generator, share: float) -> CausalLM:
    """A small Llama whose leaves keep 4 bits in a share of their entries, as a GPU would hold them."""
    hf = dict(published.LLAMA_3_1_8B) | SIZES["llama"] | dict(num_hidden_layers=1, vocab_size=200)
    config = model_config.from_hf(hf)

    def leaf(described: elastic.Leaf, name: str) -> Any:
        shape = elastic.shape(config, described)
        if described.contract is None:
            value = np.ones(shape) if name != "inv_freq" else np.repeat(config.inv_freq(0)[:, None], shape[1], 1)
            return jnp.asarray(value, jnp.float32)
        width = shape[-1] if described.contract == "last" else int(np.prod(shape[:-1]))
        drawn = draw(rng, str(described.contract), int(np.prod(shape)) // width, width, shape[:-1])
        step = 32 if described.contract == "first" or "vo" in described.dims else 8
        step = 128 if "ffn" in described.dims else step
        full = round(shape[0] * share / step) * step
        return loading.place(described, drawn.stored.take_bits(full), jnp.bfloat16, tiles=name != "embed")

    params = {name: leaf(elastic.TOP[name], name) for name in ("embed", "norm", "head")}
    layer = {
        kind: {name: leaf(each, name) for name, each in elastic.leaves(config, kind).items()}
        for kind in ("attention", "mlp")
    }
    return CausalLM(config, params | {"layers": [layer]}, None, 0.0, None, jnp.bfloat16)


@pytest.mark.parametrize(
    ("share", "batch"),
    [(0.5, 1), (0.5, 3), (0.0, 1)],
)
@pytest.mark.slow
def test_fused_decode(rng: np.random.Generator, share: float, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block and the head by fused kernels, with what a loaded model has on a GPU; the truth is that without."""
    monkeypatch.setattr(loading, "preferred_layout", lambda *, contract, **_: LAYOUTS[contract])
    model = model_of(rng, share)
    kinds = {type(leaf) for leaf in model.params["layers"][0]["mlp"].values()}
    assert (MixedArray in kinds) == (share > 0)
    decoding = "decode", jax.default_backend()
    monkeypatch.setitem(dispatch.MEASURED, decoding, "blocked")
    want, _ = run(model, batch)
    monkeypatch.setitem(dispatch.MEASURED, decoding, "pallas")
    monkeypatch.setattr(dispatch, "REFUSALS", {})
    got, _ = run(model, batch)
    assert not [refusal for refusal in dispatch.REFUSALS if refusal.kernel.startswith("decode")]
    assert distance(got, want) < 3e-2


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [True, False])
def test_random_models_have_the_shapes_of_loaded_ones(
    rng: np.random.Generator, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `benchmark --bits 3.5` times is what a budget loads."""
    chosen = LAYOUTS if tiles else dict.fromkeys(LAYOUTS, "plain")
    for module in (loading, random_nested):
        monkeypatch.setattr(
            module, "preferred_layout", lambda *, contract, group, **_: chosen[contract] if group == 128 else "plain"
        )
    sizes = SIZES["llama"] | dict(num_hidden_layers=1, intermediate_size=1024, vocab_size=64)
    config = model_config.from_hf(dict(published.LLAMA_3_1_8B) | sizes)
    for name in ("up", "down"):
        described = elastic.BLOCKS["mlp"][name]
        stored = draw(rng, str(described.contract), *((1024, 256) if name == "up" else (256, 1024))).stored
        for share in (0, 0.5):
            found = random_nested.nested_shape(config, described, stored.shape, share, 128, jnp.bfloat16)
            want = in_parts(stored.take_bits(round(1024 * share)), tiles)
            assert jax.tree.structure(found) == jax.tree.structure(want)
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
                assert (one.shape, one.dtype) == (other.shape, other.dtype)
    if tiles:
        shapes = weight_shapes(config, 3.5, 0.0, make_plan(config, None), jnp.bfloat16)
        down, gate = (shapes["layers"][0]["mlp"][name] for name in ("down", "gate"))
        assert [weight.bits for weight in layers.weights_of(down) + layers.weights_of(gate)] == [4, 3, 4, 3]
        assert shapes["head"].bits == 3
    else:
        assert np.isfinite(run(random_model(config, 3.5, dtype=jnp.bfloat16), 1)[0]).all()
