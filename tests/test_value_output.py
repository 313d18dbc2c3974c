"""V/O of any rank: the same product, finite, ranks without content last and exactly zero."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import uniql_jax
from tests import compressed, reference
from uniql_jax.compression.math import value_output
from uniql_jax.compression.math.gptq import quantize
from uniql_jax.compression.pipeline import compress
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert.source import open_source
from uniql_jax.convert.to_hf import export
from uniql_jax.value_bias import value_bias

D, HIDDEN = 16, 48
SHAPES = {"shared": (2, 6), "one each": (3, 3)}


def _damaged(case: str, v: np.ndarray, o: np.ndarray) -> int:
    """Damage V [d, g, h] and O [d, n, h] in place; the rank that is left in the first group."""
    shared = o.shape[1] // v.shape[1]
    first = slice(0, shared)
    if case == "one dead channel":
        o[3, first] = 0
        return D - 1
    if case == "half of a head":
        o[: D // 2, first] = 0
        return D // 2
    if case == "a whole head":
        o[:, first] = 0
        return 0
    if case == "everything":
        o[:] = 0
        return 0
    if case == "two equal channels":
        o[5, first] = o[2, first]
        return D - 1
    if case == "channels that add up":
        o[4, first] = o[1, first] - 2 * o[2, first]
        return D - 1
    if case == "two equal heads":
        o[:, -1] = o[:, 0]
        return D
    if case == "dead values":
        v[2:5, 0] = 0
        return D - 3
    if case == "dead values and outputs":
        v[2:5, 0] = 0
        o[4:7, first] = 0
        return D - 5
    assert case == "nothing"
    return D


CASES = (
    "nothing", "one dead channel", "half of a head", "a whole head", "everything", "two equal channels",
    "channels that add up", "two equal heads", "dead values", "dead values and outputs",
)  # fmt: skip
GRAMS = ("full", "few tokens", "zero")
METRICS = ("none", "full", "rank one", "zero")


def _psd(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    rows = {"full": 4 * size, "few tokens": 3, "rank one": 1, "zero": 0}[kind]
    x = rng.standard_normal((rows, size)) * np.exp(rng.standard_normal(size))
    return x.T @ x / max(rows, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_every_deficiency_keeps_the_product(shape: str, case: str, rng: np.random.Generator) -> None:
    for gram, metric in itertools.product(GRAMS, METRICS):
        _check_product(shape, case, gram, metric, rng)


def _check_product(shape: str, case: str, gram: str, metric: str, rng: np.random.Generator) -> None:
    groups, heads = SHAPES[shape]
    v = rng.standard_normal((D, groups, HIDDEN)).astype(np.float32)
    o = rng.standard_normal((D, heads, HIDDEN)).astype(np.float32)
    rank = _damaged(case, v, o)
    received = np.stack([_psd(rng, D, gram) for _ in range(groups)])
    weight = None if metric == "none" else jnp.asarray(_psd(rng, HIDDEN, metric), jnp.float32)
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    change, new_v, new_o = value_output.sort_value_output(
        f32(v), f32(o), f32(received), f32(_psd(rng, HIDDEN, "full")), "attention_output", 0, weight
    )
    change, new_v, new_o = (np.asarray(a, np.float64) for a in (change, new_v, new_o))
    assert np.isfinite(change).all()
    assert np.isfinite(new_v).all()
    assert np.isfinite(new_o).all()
    shared = heads // groups
    for head in range(heads):
        was, new = v[:, head // shared].astype(np.float64), new_v[:, head // shared]
        size = np.linalg.norm(was) * np.linalg.norm(o[:, head].astype(np.float64))
        error = np.linalg.norm(new.T @ new_o[:, head] - was.T @ o[:, head].astype(np.float64))
        assert error <= 2e-6 * size, (head, error / max(size, 1e-30))
    content = np.linalg.norm(new_o[:, :shared], axis=(1, 2))
    assert (content > 0).tolist() == [True] * rank + [False] * (D - rank)
    np.testing.assert_array_equal(new_v[rank:, 0], 0.0)
    for bits in (4, 8):
        codes, scale, _ = quantize(f32(new_v[:, 0]), None, bits=bits, group=16)
        assert np.isfinite(np.asarray(scale, np.float32)).all()
        assert not np.asarray(codes)[rank:].any()


def test_content_over_six_decades_is_kept(rng: np.random.Generator) -> None:
    """Full rank, badly conditioned: nothing counts as empty, and the product holds as float32 can hold it."""
    v = rng.standard_normal((D, 1, HIDDEN)).astype(np.float32)
    basis = np.linalg.qr(rng.standard_normal((HIDDEN, D)))[0].T
    o = (np.geomspace(1, 1e-6, D)[:, None] * basis)[:, None].astype(np.float32)
    _, new_v, new_o = value_output.sort_value_output(
        jnp.asarray(v), jnp.asarray(o), jnp.asarray(_psd(rng, D, "full"), jnp.float32)[None],
        jnp.asarray(_psd(rng, HIDDEN, "full"), jnp.float32), metric=jnp.asarray(_psd(rng, HIDDEN, "full"), jnp.float32),
    )  # fmt: skip
    want = v[:, 0].astype(np.float64).T @ o[:, 0].astype(np.float64)
    found = np.asarray(new_v[:, 0], np.float64).T @ np.asarray(new_o[:, 0], np.float64)
    assert np.linalg.norm(found - want) < 2e-6 * np.linalg.norm(v) * np.linalg.norm(o)
    assert np.asarray(new_o).any(axis=(1, 2)).all()


def test_a_direction_that_was_never_seen_is_kept_last(rng: np.random.Generator) -> None:
    v, o = (rng.standard_normal((D, 1, HIDDEN)).astype(np.float32) for _ in range(2))
    seen = np.diag([*[1.0] * (D - 4), *[0.0] * 4]).astype(np.float32)
    o[0] = 0
    change, _, new_o = value_output.sort_value_output(
        jnp.asarray(v), jnp.asarray(o), jnp.asarray(seen)[None], jnp.eye(HIDDEN)
    )
    received = np.einsum("grd,de,gre->gr", change, seen, change)[0]
    assert (received[: D - 5] > 1e-3 * received[0]).all()
    assert (received[D - 5 :] < 1e-6 * received[0]).all()
    assert np.asarray(new_o).any(axis=(1, 2)).tolist() == [True] * (D - 1) + [False]


def test_value_bias_of_a_dead_o_is_finite(rng: np.random.Generator) -> None:
    o = rng.standard_normal((8, 4, 16)).astype(np.float32)
    o[:, :2] = 0
    o[3] = 0
    for wanted in (rng.standard_normal(16).astype(np.float32), np.zeros(16, np.float32)):
        bias, given = value_bias(o, wanted, 2)
        assert np.isfinite(bias).all()
        assert np.isfinite(given).all()


WITH_ATTENTION = ("llama-grouped-tied", "llama-multihead", "qwen2", "bamba", "nemotron_h")


def _dead_channel(folder: Path, channel: int, head_dim: int, shared: int) -> None:
    """One channel of the first key/value head at zero in every o_proj, for all query heads of its group."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("o_proj.weight"):
            value[:, [head * head_dim + channel for head in range(shared)]] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _logits_error(ckpt: Path, original: Path, tokens: np.ndarray) -> float:
    want = np.asarray(uniql_jax.load_source(str(original), dtype=jnp.float32)(jnp.asarray(tokens)))
    return reference.relative_error(np.asarray(uniql_jax.load(ckpt, dtype=jnp.float32)(jnp.asarray(tokens))), want)


@pytest.mark.parametrize("family", WITH_ATTENTION)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_dead_channel_costs_nothing(
    family: str,
    bits: int,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    made = compressed.made(tmp_path_factory, seed)
    source = made.source(family)
    hub = Path(shutil.copytree(source, tmp_path / "hub"))
    config = open_source(hub).config
    _dead_channel(hub, 1, config.head_dim, config.query_groups)
    settings = CompressionSettings(bits=32 if bits == 16 else bits)
    tokens = compressed.tokens(rng, 12, 48)
    compress(open_source(hub), tmp_path / "damaged", tokens, settings)
    error = _logits_error(tmp_path / "damaged", hub, tokens[:2])
    if bits == 16:
        assert error < 2e-5
        return
    compress(open_source(source), tmp_path / "whole", tokens, settings)
    assert error < 1.5 * _logits_error(tmp_path / "whole", source, tokens[:2])


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_our_own_export_compressed_again(
    family: str, tmp_path_factory: pytest.TempPathFactory, seed: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """What a prune at 0.35 filled with zeros: nothing more is lost, at 16 or at 4 bits."""
    made = compressed.made(tmp_path_factory, seed)
    export(str(made.checkpoint(family, CompressionSettings(bits=32))), str(tmp_path / "hub"), 0.35, dtype="float32")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())
    tokens = compressed.tokens(rng, 12, 48)
    for bits, bound in ((32, 2e-5), (4, 0.6)):
        compress(open_source(tmp_path / "hub"), tmp_path / f"{bits}", tokens, CompressionSettings(bits=bits))
        assert _logits_error(tmp_path / f"{bits}", tmp_path / "hub", tokens[:2]) < bound
