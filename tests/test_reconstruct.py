"""Training a quantized layer's integers and scales on its output: it begins where GPTQ ended and only ever gains."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import compressed
from tests.compressed import Made
from uniql_jax import elastic
from uniql_jax.commands import compress as command
from uniql_jax.compression import pipeline
from uniql_jax.compression.math import reconstruct as module
from uniql_jax.compression.packing import pack_leaf
from uniql_jax.compression.processes import Processes
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert.source import open_source
from uniql_jax.errors import UserError
from uniql_jax.weights.fake_quantized import from_quantized
from uniql_jax.weights.nested import NestedArray, leading_bits
from uniql_jax.weights.protocol import dense
from uniql_jax.weights.quantized import QuantizedArray

CASES = {
    "4 bits": ("qwen2", CompressionSettings(refit=0.5)),
    "8 bits in runs": ("llama-grouped-tied", CompressionSettings(bits=8, groups="portable")),
    "nested": ("bamba", CompressionSettings(nested=True)),
}


@pytest.fixture
def made(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Made:
    return compressed.made(tmp_path_factory, seed)


def _logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, tokens))


@pytest.mark.parametrize("case", ["4 bits", *(pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[1:])])
def test_outputs_come_closer_to_the_original(
    case: str, made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture, rng: np.random.Generator
) -> None:
    family, settings = CASES[case]
    source, tokens = made.source(family), compressed.tokens(rng, 12, 48)
    with caplog.at_level(logging.INFO, "uniql_jax.compress"):
        for name, steps in (("gptq", 0), ("trained", 40)):
            chosen = dataclasses.replace(settings, reconstruct=steps, stream_dtype="float32")
            pipeline.compress(open_source(source), tmp_path / name, tokens, chosen)
    lines = [json.loads(record.message) for record in caplog.records]
    lines = [line for line in lines if "reconstructed" in line]
    assert [line["layer"] for line in lines] == [0, 1]
    assert all(line["reconstructed"] < 0.95 * line["output_error"] for line in lines)
    truth = _logits(uniql_jax.load_source(str(source), dtype=jnp.float32), tokens)
    errors = [
        np.square(_logits(uniql_jax.load(tmp_path / name, dtype=jnp.float32), tokens) - truth).mean()
        for name in ("gptq", "trained")
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("contract", ["last", "first"])
@pytest.mark.parametrize("case", CASES)
def test_it_begins_with_what_gptq_left(case: str, contract: str, rng: np.random.Generator) -> None:
    """No step moves nothing: every model's values are those that are stored, and so are integers and scales."""
    settings = dataclasses.replace(CASES[case][1], rounding="nearest")
    leaf = elastic.BLOCKS["mlp"]["up" if contract == "last" else "down"]
    original = jnp.asarray(rng.normal(size=(48, 64)), jnp.float32)
    run = 16 if case.endswith("runs") and contract == "first" else 1
    weight = pack_leaf(leaf, original, None, settings, 16, run=run).weight
    grid = module._grid(weight, original)
    moves = module._still(grid)
    views = [dense(weight)] + [dense(leading_bits(weight))] * isinstance(weight, NestedArray)
    for value, view in zip(module._values(weight, grid, moves), views, strict=True):
        np.testing.assert_array_equal(value, view)
    stored, places = module._rounded(weight, grid, moves)
    for ours, theirs in zip(jax.tree.leaves(stored), jax.tree.leaves(weight), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if isinstance(weight, QuantizedArray):  # training after quantizing begins with the same integers
        np.testing.assert_array_equal(from_quantized(weight, places).quantized().data, weight.data)


def test_a_layer_that_gains_nothing_stays(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf, original = elastic.BLOCKS["mlp"]["up"], jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)
    weight = pack_leaf(leaf, original, None, CompressionSettings(rounding="nearest"), 32).weight
    errors = iter([1.0, 1.0])
    monkeypatch.setattr(module, "_error", lambda *_: next(errors))
    monkeypatch.setattr(module, "_step", lambda moves, *_: jax.tree.map(lambda x: x + 1, moves))
    x = jnp.zeros((2, 8, 64))
    served = module.Served(None, ("mlp",), (1.0,))  # type: ignore[arg-type]
    done = module.reconstruct(served, {"mlp": {"up": weight}}, {"mlp": {"up": original}}, [x], x, 3, rng)
    assert done.layer["mlp"]["up"] is weight
    assert done.before == done.after


def test_what_cannot_be_reconstructed_is_refused(tmp_path: Path) -> None:
    argv = ["--ckpt", "demo", "--out", str(tmp_path / "out"), "--bits", "16", "--reconstruct", "5"]
    with pytest.raises(UserError, match="--reconstruct trains 4 or 8 bits, not 16"):
        command.main(argv)
    two = Processes()
    two.count = 2
    with pytest.raises(UserError, match="reconstructed by one process"):
        pipeline.check_processes(two, 8, False, CompressionSettings(reconstruct=5))
    assert not list(tmp_path.iterdir())
