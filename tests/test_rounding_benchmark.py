"""The benchmark of rounding: its baseline is the package's own GPTQ, and llama.cpp's files are as ggml makes them."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import rounding_model, stages
from benchmarks.llamacpp import through, type_of
from benchmarks.rounding_math import Method
from tests import compressed
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert.source import open_source
from uniql_jax.runtime.loading import load
from uniql_jax.weights.protocol import dense
from uniql_jax.weights.quantized import QuantizedArray


@pytest.mark.slow
def test_the_baseline_is_the_package(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, seed: int, rng: np.random.Generator
) -> None:
    """Nearly every weight equal: the first differing sums send a few codes to their neighbours."""
    folder, settings = (
        str(compressed.made(tmp_path_factory, seed).source("llama-grouped-tied")),
        CompressionSettings(stream_dtype="float32"),
    )
    calibration = compressed.tokens(rng, 8, 64)
    measured = stages.measure(open_source(folder), calibration, tmp_path, 2048)
    want = load(stages.compress(measured, settings, tmp_path / "made")[0]).params
    model = rounding_model.sorted_model(folder, calibration, settings, 2048)
    [view], errors = rounding_model.build(model, rounding_model.Row("gptq"), settings)
    assert set(errors) == {f"{kind}.{name}" for kind, names in LEAVES.items() for name in names}
    compared = 0
    pairs = [
        (view.layers[i][kind][name], layer[kind][name])
        for i, layer in enumerate(want["layers"])
        for kind in LEAVES
        for name in LEAVES[kind]
    ]
    for ours, theirs in [*pairs, (view.top["embed"], want["embed"])]:
        same = np.isclose(np.asarray(ours), np.asarray(dense(theirs)), rtol=1e-3, atol=1e-6)
        assert same.mean() > 0.95
        compared += 1
    assert compared > 7
    packed = [leaf for leaf in jax.tree.leaves(want, is_leaf=_packed) if _packed(leaf)]
    floats = [leaf for leaf in jax.tree.leaves(want, is_leaf=_packed) if not _packed(leaf)]
    # groups that are padded are counted without their padding
    stored = sum(leaf.nbytes for leaf in packed) + 2 * sum(leaf.size for leaf in floats)
    assert view.bytes == pytest.approx(stored, rel=0.1)


LEAVES = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


def _packed(leaf: object) -> bool:
    return isinstance(leaf, QuantizedArray)


@pytest.mark.slow
def test_two_views_of_nested_codes(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rng: np.random.Generator
) -> None:
    """The 3-bit view has fewer bytes and other weights; both are fitted to their own streams."""
    settings = CompressionSettings()
    model = rounding_model.sorted_model(
        str(compressed.made(tmp_path_factory, seed).source("llama-grouped-tied")),
        compressed.tokens(rng, 4, 64),
        settings,
        2048,
    )
    row = rounding_model.Row("nested", Method(share=0.5, sweeps=1))
    four, three = rounding_model.build(model, dataclasses.replace(row, rotate=False), settings)[0]
    assert three.bytes < 0.95 * four.bytes
    for name in ("gate", "down"):
        a, b, c = (
            np.asarray(m)
            for m in (four.layers[0]["mlp"][name], three.layers[0]["mlp"][name], model.layers[0]["mlp"][name])
        )
        assert np.linalg.norm(a - c) < np.linalg.norm(b - c) < np.linalg.norm(c)


def test_types_of_llama_cpp() -> None:
    """SmolLM2-135M (30 layers, rows of 576 and 1536, tied) as llama.cpp's own files of it have them."""

    def kinds(mix: str, part: str, width: int) -> list[str]:
        return [type_of(mix, f"blk.{layer}.{part}.weight", 30, width, True) for layer in range(30)]

    assert type_of("Q4_K_M", "token_embd.weight", 30, 576, True) == "Q8_0"
    assert type_of("Q4_K_M", "token_embd.weight", 32, 4096, False) == "Q4_K"
    assert type_of("Q4_K_M", "output.weight", 32, 4096, False) == "Q6_K"
    assert type_of("Q4_K_M", "blk.0.attn_norm.weight", 30, 576, True) == "F32"
    assert set(kinds("Q4_K_M", "attn_q", 576)) == {"Q5_0"}
    down = kinds("Q4_K_M", "ffn_down", 1536)
    assert set(down) == {"Q4_K", "Q6_K"}
    assert down[:3] == ["Q6_K"] * 3
    assert down.count("Q6_K") == sum(i < 3 or i >= 26 or (i - 3) % 3 == 2 for i in range(30))
    assert set(kinds("Q3_K_M", "ffn_gate", 576)) == {"IQ4_NL"}
    assert kinds("Q3_K_M", "attn_v", 1024)[:3] == ["Q5_K", "Q5_K", "Q4_K"]


def test_ggml_rounds_as_its_format_says(rng: np.random.Generator) -> None:
    """Blocks of 32 bytes against gguf's own rounding; K-quants by their error and size."""
    gguf, spec = pytest.importorskip("gguf"), importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no ggml here")
    [library] = Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")
    value = rng.standard_normal((5, 512)).astype(np.float32)
    found, size = through(str(library), "Q8_0", value)
    kind = gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(found, gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind))
    assert size == value.size * 34 // 32
    for name, bits, error in (("Q4_K", 4.5, 0.08), ("Q3_K", 3.4375, 0.17), ("Q6_K", 6.5625, 0.02)):
        found, size = through(str(library), name, value)
        assert size == value.size * bits / 8
        assert np.linalg.norm(found - value) < error * np.linalg.norm(value)
