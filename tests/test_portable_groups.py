"""Groups inside a head: what is stored is what the format says, and the exact properties hold as for other groups."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import compressed, published, reference
from uniql_jax import config as configs
from uniql_jax import elastic
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.compression.packing import pack_leaf
from uniql_jax.compression.pipeline import compress
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert import to_hf
from uniql_jax.convert.source import open_source
from uniql_jax.model.causal_lm import hidden_states, logits
from uniql_jax.model.layers import fused
from uniql_jax.pallas_kernels.packing import SHIFTS
from uniql_jax.plan import PORTABLE, axis_layout, grouping, make_plan
from uniql_jax.weights.fake_quantized import from_quantized
from uniql_jax.weights.quantized import QuantizedArray

O = elastic.BLOCKS["attention"]["o"]  # noqa: E741
COUNT, HEADS, FEATURES, GROUP, RUN = 64, 3, 40, 32, 8
SETTINGS = CompressionSettings(groups="portable", rounding="nearest", scale_search=False)
MODELS: dict[str, dict[str, Any]] = {
    "llama": published.shrink(
        published.SMOLLM2_135M, hidden_size=96, num_attention_heads=3, num_key_value_heads=1, head_dim=64,
        num_hidden_layers=2,
    ),
    "nemotron_h": published.shrink_ssm(
        published.NEMOTRON_H_8B, hybrid_override_pattern="M-*", num_hidden_layers=3, mamba_head_dim=64,
        mamba_num_heads=2, head_dim=32, attention_head_dim=32,
    ),
}  # fmt: skip


def packed(rng: np.random.Generator, bits: int = 4, settings: CompressionSettings = SETTINGS, **more: Any) -> Any:
    value = jnp.asarray(rng.standard_normal((COUNT, HEADS, FEATURES)), jnp.float32)
    settings = dataclasses.replace(settings, bits=bits)
    return value, pack_leaf(O, value, more.pop("hessian", None), settings, GROUP, run=RUN, **more)


def as_the_format_says(weight: QuantizedArray, count: int) -> np.ndarray:
    """docs/format.md, number by number."""
    data, scale = np.asarray(weight.data), np.asarray(weight.scale, np.float32)
    out = np.empty((count, HEADS, data.shape[1]), np.float32)
    for entry in range(count):
        for head in range(HEADS):
            row = (entry // RUN * HEADS + head) * RUN + entry % RUN
            if weight.bits == 4:
                integer = ((data[row // 8] >> SHIFTS[row % 8]) & 15) - 8
            else:
                integer = data[row]
            out[entry, head] = integer * scale[entry // GROUP * HEADS + head]
    return out


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_stored(bits: int, rng: np.random.Generator) -> None:
    value, found = packed(rng, bits)
    weight = found.weight
    assert weight.shape == value.shape
    assert weight.scale.shape == (COUNT // GROUP * HEADS, FEATURES)
    np.testing.assert_array_equal(np.asarray(weight.dense()), as_the_format_says(weight, COUNT))
    groups = np.asarray(value).reshape(COUNT // GROUP, GROUP, HEADS, FEATURES)
    error = np.abs(np.asarray(weight.dense()).reshape(groups.shape) - groups)
    step = np.asarray(weight.scale, np.float32).reshape(COUNT // GROUP, 1, HEADS, FEATURES)
    assert (error <= 1.07 * np.abs(step)).all()  # half a step, or one at the grid's shorter end, of a bfloat16 scale


@pytest.mark.parametrize("count", [8, 24, 32, 40, 64])
def test_a_prefix_commutes_with_dequantizing(count: int, rng: np.random.Generator) -> None:
    """Also where the cut falls inside a group."""
    weight = packed(rng)[1].weight
    small = weight.take_prefix(count)
    assert small.shape == (count, HEADS, FEATURES)
    np.testing.assert_array_equal(np.asarray(small.dense()), np.asarray(weight.dense())[:count])
    assert small.nbytes < weight.nbytes or count == COUNT
    x = jnp.asarray(rng.standard_normal((5, count * HEADS)), jnp.float32)
    want = np.asarray(x, np.float64) @ np.asarray(small.dense(), np.float64).reshape(-1, FEATURES)
    for held in (small, small.in_runs()):
        np.testing.assert_allclose(np.asarray(held.columns(x)), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert small.in_runs().group == RUN
    with pytest.raises(ValueError, match="splits a run of 8"):
        weight.take_prefix(20)


def test_gptq_beats_nearest_by_its_own_measure(rng: np.random.Generator) -> None:
    x = rng.standard_normal((400, COUNT * HEADS)) @ rng.standard_normal((COUNT * HEADS, COUNT * HEADS))
    hessian = jnp.asarray(x.T @ x / len(x), jnp.float32)
    errors = {}
    for rounding in ("nearest", "gptq"):
        settings = dataclasses.replace(SETTINGS, rounding=rounding)
        value, found = packed(np.random.default_rng(1), settings=settings, hessian=hessian)
        change = np.asarray(found.weight.dense() - value, np.float64).reshape(-1, FEATURES)
        errors[rounding] = np.einsum("kf,kl,lf->", change, np.asarray(hessian, np.float64), change)
    assert errors["gptq"] < 0.7 * errors["nearest"]


def test_training_begins_with_and_ends_in_the_same_groups(rng: np.random.Generator) -> None:
    _, found = packed(rng, return_unrounded=True)
    weight, trained = found.weight, from_quantized(found.weight, found.unrounded)
    np.testing.assert_array_equal(np.asarray(trained.dense()), np.asarray(weight.dense()))
    back = trained.quantized()
    assert jax.tree.structure(back) == jax.tree.structure(weight)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(weight), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(np.asarray(trained.take_prefix(40).dense()), np.asarray(weight.dense())[:40])


def test_fused_kernels_leave_such_weights_to_others(rng: np.random.Generator) -> None:
    """They would read activations in another order."""
    with pytest.raises(NotImplementedError, match="span all heads"):
        fused.weight_of(packed(rng)[1].weight)


@pytest.mark.parametrize("name", sorted(published.ALL))
def test_groups_of_published_models_travel(name: str) -> None:
    config = configs.from_hf(published.ALL[name])
    meta = grouping(config, portable=True)
    full, axes = elastic.sizes(config), {a for kinds in config.pattern for a in elastic.layer_axes(config, kinds)}
    for dimension, group in meta["groups"].items():
        size = full[dimension]
        assert size % 32 or group in PORTABLE, (dimension, size, group)
        assert size % 32 or size % group == 0
    for axis in axes & {"vo", "ssm_head"}:
        layout = axis_layout(config, axis, portable=True)
        if full[axis] % 32 == 0:
            assert meta["runs"][axis] == layout.run == layout.unit
            assert layout.group % layout.run == 0
            assert full[axis] // layout.unit >= 8 or layout.unit == 8  # cut as finely as other groups are
    assert make_plan(config, None, portable=True).keep(0.35) != make_plan(config, None, portable=True).keep(0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Any:
    @functools.cache
    def make(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        source = reference.save(reference.build(MODELS[name], seed), root / "hub", MODELS[name])
        compress(open_source(source), root / "ours", compressed.tokens(np.random.default_rng(seed), 8, 48), SETTINGS)
        return root / "ours"

    return make


def held_bytes(model: Any) -> int:
    """Of the layers."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["layers"]))


def layer_bytes(checkpoint: Any, rate: float) -> int:
    """The same on disk."""
    return sum(size for name, size in checkpoint.tensor_bytes(rate).items() if name.startswith("layers."))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_exact_properties(name: str, made: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    """Prefixes of disk and memory are one, masked is sliced, and stock transformers computes the same."""
    folder, tokens = made(name), compressed.tokens(rng, 2, 40)
    checkpoint, full = open_checkpoint(folder), uniql_jax.load(folder, dtype=jnp.float32)
    assert checkpoint.meta["format"] == 2
    assert set(checkpoint.meta["runs"]) == {"llama": {"vo"}, "nemotron_h": {"vo", "ssm_head"}}[name]
    assert held_bytes(full) == layer_bytes(checkpoint, 0.0)
    assert checkpoint.plan is not None
    inside = 0
    call = jax.jit(lambda model, tokens: model(tokens))
    masks = jax.jit(lambda model, tokens, keep: logits(model, hidden_states(model, tokens, keep=keep)))
    for rate in (0.15, 0.35):
        small, pruned = uniql_jax.load(folder, rate, dtype=jnp.float32), uniql_jax.prune(full, rate)
        for a, b in zip(jax.tree.leaves(small.params), jax.tree.leaves(pruned.params), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert held_bytes(small) == layer_bytes(checkpoint, rate)
        sliced = np.asarray(call(small, tokens))
        keep = tuple({a: jnp.int32(n) for a, n in kept.items()} for kept in checkpoint.plan.keep(rate))
        masked = np.asarray(masks(full, tokens, keep))
        assert reference.relative_error(masked, sliced) < 1e-5
        to_hf.export(folder, tmp_path / f"{rate}", rate, dtype="float32")
        theirs = reference.logits(reference.load(tmp_path / f"{rate}"), tokens)
        assert reference.relative_error(theirs, sliced) < 1e-4
        inside += sum(kept[axis] % 32 != 0 for kept in small.keep for axis in checkpoint.meta["runs"] if axis in kept)
    assert inside  # some cuts fall inside groups


@pytest.mark.parametrize(
    ("runs", "match"),
    [({"vo": 24}, "divides no group"), ({"vo": 12}, "multiple of 8"), ({"other": 8}, "divides no group"),
     ({"vo": 16}, "splits runs of 16"), ([], "must be object")],
)  # fmt: skip
def test_damaged_runs_are_named(runs: Any, match: str, made: Any, tmp_path: Path) -> None:
    shutil.copytree(made("llama"), tmp_path / "ck")
    path = tmp_path / "ck" / "config.json"
    config = json.loads(path.read_text())
    config["uniql"]["runs"] = runs
    path.write_text(json.dumps(config))
    with pytest.raises(uniql_jax.UserError, match=match):
        open_checkpoint(tmp_path / "ck")
