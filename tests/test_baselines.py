"""The published baselines do what their papers say: nothing is lost where all is kept, what is cut is the better half,
and bytes are those of a count by hand.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.baselines import __main__ as driver
from benchmarks.baselines import gptq, modegpt, semistructured, shortgpt, sizes, slicegpt, sparsegpt, svdllm, wanda
from benchmarks.baselines.dense import Calibration, Dense, Made, open_dense, silent
from benchmarks.baselines.recovered import Recovery, recovered
from tests import tiny
from uniql_jax.compression.refit import advance
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import logits as logits_of_stream
from uniql_jax.model.layers import KINDS
from uniql_jax.train.examples import from_windows

FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1}}
TOKENS = (4, 24)


@pytest.fixture(params=FAMILIES)
def calibration(request: pytest.FixtureRequest, rng: np.random.Generator) -> Calibration:
    """A tiny random model of three layers and windows of random tokens."""
    return calibrated(rng, num_hidden_layers=3, **FAMILIES[request.param])


def calibrated(rng: np.random.Generator, **changes: object) -> Calibration:
    """A tiny random model and windows of random tokens."""
    model = tiny.model(rng, **changes)
    layers, top = model.params["layers"], {k: v for k, v in model.params.items() if k != "layers"}
    windows = rng.integers(3, tiny.VOCAB, TOKENS).astype(np.int32)
    return Calibration.of(Dense(model.config, list(layers), top), windows, windows.size)


def logits(model: Dense, calibration: Calibration, kinds: Mapping[str, Any] | None = None) -> np.ndarray:
    """Of the calibration windows."""
    with mock.patch.dict(KINDS, kinds or {}):
        return np.asarray(model.causal_lm()(calibration.batches[0]))


def output_error(gram: np.ndarray, change: np.ndarray) -> float:
    """E |x change|^2."""
    return float(np.trace(change.T @ gram @ change))


def correlated(rng: np.random.Generator, width: int) -> np.ndarray:
    """Gram matrix of inputs of very different sizes that depend on one another."""
    x = rng.standard_normal((4 * width, width // 2)) @ rng.standard_normal((width // 2, width))
    x = (x + 0.3 * rng.standard_normal(x.shape)) * np.exp(rng.standard_normal(width))
    return (x.T @ x / len(x)).astype(np.float32)


@pytest.mark.parametrize("method", [shortgpt, slicegpt, modegpt])
def test_nothing_is_lost_at_rate_0(method: ModuleType, calibration: Calibration) -> None:
    [made] = method.rows(calibration, [0.0])
    want = logits(calibration.model, calibration)
    # SliceGPT passes the stream through six adapters in float32, and a random model amplifies their rounding
    np.testing.assert_allclose(logits(made.model, calibration, dict(made.kinds)), want, atol=1e-4 * np.abs(want).max())
    assert abs(made.removed) < 1e-9 or method is slicegpt  # its adapters are parameters in addition


def test_layers_that_change_nothing_go_first(calibration: Calibration) -> None:
    layers = list(calibration.model.layers)
    layers[1] = silent(layers[1])
    changed = dataclasses.replace(calibration, model=calibration.model._replace(layers=layers))
    [made] = shortgpt.rows(changed, [1 / 3])
    assert made.note["layers"] == [0, 2]
    np.testing.assert_allclose(logits(made.model, changed), logits(changed.model, changed), atol=1e-5)
    assert made.removed == pytest.approx(1 / 3)


def test_a_sliced_model_is_one_whose_stream_is_projected(calibration: Calibration) -> None:
    """Its own bases, as projections in full width, around the original's blocks."""
    model, width = calibration.model, 16
    sliced = slicegpt.slice_model(calibration, width)
    [x] = calibration.streams()
    for layer in model.layers:
        for kind in ("attention", "mlp"):
            vectors = np.linalg.svd(np.asarray(x, np.float64).reshape(-1, x.shape[-1]))[2][:width].T
            x = advance(model.config, kind, layer[kind], x @ jnp.asarray(vectors @ vectors.T, jnp.float32), None)
    want = np.asarray(logits_of_stream(model.causal_lm(), x))
    np.testing.assert_allclose(logits(sliced, calibration, slicegpt.BLOCKS), want, atol=5e-3)
    kept = np.asarray(sliced.layers[0]["sliced_attention"]["q"])
    assert not kept[..., width:].any()
    assert kept[..., :width].any()


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 12), (12, 24)])
def test_low_rank_factors_are_those_of_the_whitened_matrix(inputs: int, outputs: int, rng: np.random.Generator) -> None:
    gram, columns = correlated(rng, inputs), rng.standard_normal((inputs, outputs)).astype(np.float32)
    found = svdllm.directions(jnp.asarray(columns), jnp.asarray(gram))
    rate = 0.25
    first, second = svdllm.factors(jnp.asarray(columns), found, rate)
    rank = svdllm.rank_at(inputs, outputs, rate)
    assert rank == first.shape[1] == int(0.75 * inputs * outputs / (inputs + outputs))
    root = np.linalg.cholesky(gram.astype(np.float64))
    left, values, right = np.linalg.svd(root.T @ columns.astype(np.float64), full_matrices=False)
    want = np.linalg.inv(root.T) @ (left[:, :rank] * values[:rank]) @ right[:rank]
    got = np.asarray(first @ second, np.float64)
    assert output_error(gram, got - want) < 1e-6 * output_error(gram, columns)
    assert output_error(gram, got - columns) == pytest.approx(np.sum(values[rank:] ** 2), rel=1e-3)


def test_low_rank_factors_of_full_rank_lose_nothing(calibration: Calibration) -> None:
    with mock.patch.object(svdllm, "rank_at", lambda inputs, outputs, rate: min(inputs, outputs)):
        model = svdllm.low_rank(calibration, svdllm.factored(calibration), 0.0)
    want = logits(calibration.model, calibration)
    np.testing.assert_allclose(logits(model, calibration), want, atol=1e-4 * np.abs(want).max())


def test_two_of_four_by_error(rng: np.random.Generator) -> None:
    """Exactly two weights of every four; SparseGPT loses less than Wanda, Wanda less than magnitude."""
    width, outputs = 192, 48
    gram = correlated(rng, width)
    columns = rng.standard_normal((width, outputs)).astype(np.float32)
    w, h = jnp.asarray(columns), jnp.asarray(gram)
    found = {
        "magnitude": np.where(semistructured.two_of_four(jnp.abs(w)), columns, 0),
        "wanda": np.asarray(wanda.prune(w, h)),
        "sparsegpt": np.asarray(semistructured.prune_columns(w, h)),
    }
    for value in found.values():
        np.testing.assert_array_equal((value.reshape(-1, 4, outputs) != 0).sum(1), 2)
    errors = {name: output_error(gram, value - columns) for name, value in found.items()}
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
    kept = found["sparsegpt"] != 0
    rounded = np.asarray(semistructured.prune_columns(w, h, jnp.asarray(kept), bits=4))
    assert not rounded[~kept].any()
    assert all(len(np.unique(rounded[:128, i])) <= 16 for i in range(outputs))
    assert errors["sparsegpt"] < output_error(gram, rounded - columns) < errors["magnitude"]


def test_columns_in_turn_are_optimal_brain_surgery(rng: np.random.Generator) -> None:
    """The inverse Hessian of the inputs that are left, shrunk input by input, gives the same weights."""
    width = 12
    gram, weights = correlated(rng, width), rng.standard_normal((width, 3)).astype(np.float32)
    want = weights.astype(np.float64)
    inverse = np.linalg.inv(gram + 0.01 * np.diagonal(gram).mean() * np.eye(width))
    for start in range(0, width, 4):
        # each input's entry once those of the same four before it are gone
        shrunk, values = inverse.copy(), []
        for j in range(start, start + 4):
            values.append(shrunk[j, j])
            shrunk -= np.outer(shrunk[:, j], shrunk[j]) / shrunk[j, j]
        score = want[start : start + 4] ** 2 / np.asarray(values)[:, None]
        gone = np.argsort(np.argsort(score, axis=0), axis=0) < 2
        for j in range(start, start + 4):
            error = np.where(gone[j - start], want[j], 0.0) / inverse[j, j]
            want[j:] -= np.outer(inverse[j:, j], error)
            inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    got = np.asarray(semistructured.prune_columns(jnp.asarray(weights), jnp.asarray(gram)))
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("axis", ["ffn", "qk", "vo"])
def test_modules_lose_less_than_at_random(axis: str, rng: np.random.Generator) -> None:
    """MoDeGPT's half of an axis against random halves, where entries matter differently."""
    calibration = calibrated(rng, num_hidden_layers=1)
    config, [layer] = calibration.model.config, calibration.model.layers
    leaves = {"ffn": ("mlp", "gate", "up", "down"), "qk": ("attention", "q", "k"), "vo": ("attention", "v", "o")}
    kind, *names = leaves[axis]
    width = len(layer[kind][names[0]])
    size = np.exp(rng.standard_normal(width)).astype(np.float32)
    scaled = {name: v * size.reshape(-1, *[1] * (v.ndim - 1)) for name in names[:1] for v in [layer[kind][name]]}
    layer = {**layer, kind: {**layer[kind], **scaled}}
    calibration = dataclasses.replace(calibration, model=calibration.model._replace(layers=[layer]))
    want = logits(calibration.model, calibration)

    def error(block: Mapping[str, Any]) -> float:
        model = calibration.model._replace(layers=[{**layer, kind: block}])
        return float(np.square(logits(model, calibration) - want).mean())

    keep = {"qk": 4, "vo": 8, "ffn": 96} | {axis: width // 2}
    cut = modegpt.cut_layer(config, layer, calibration.stats[0], keep)[kind]
    assert all(not np.asarray(cut[name])[width // 2 :].any() for name in names)
    random = []
    for _ in range(4):
        gone = rng.permutation(width)[width // 2 :]
        random.append(error(layer[kind] | {name: layer[kind][name].at[gone].set(0.0) for name in names}))
    assert error(cut) < np.mean(random)


def test_bytes_by_hand() -> None:
    """h 32, 96 channels, 4 query and 2 key/value heads of 8, 2 layers, 320 tokens, tied; norms of 32."""
    config: ModelConfig = tiny.config()
    outside = 320 * 32 + 32
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 96 * 32
    assert sizes.kept_parameters(config, [{}, {}]) == outside + 2 * (layer + 64)
    assert sizes.kept_parameters(config, [{}]) == outside + layer + 64
    keep = {"qk": 3, "vo": 6, "ffn": 64}
    cut = 3 * 2 * 4 * 32 + 3 * 2 * 2 * 32 + 6 * 2 * 32 + 6 * 4 * 32 + 3 * 64 * 32
    assert sizes.kept_parameters(config, [keep, {}]) == outside + cut + layer + 128
    assert sizes.removed(config, sizes.matrices_left(config, [keep, {}])) == pytest.approx(
        1 - (cut + layer) / 2 / layer
    )
    # 4 bits: half a byte a weight, two bytes for each output's scale (no matrix has more than 128 inputs)
    outputs = 32 + 16 + 16 + 32 + 96 + 96 + 32
    assert sizes.layer_bytes(config, None, 4) == layer // 2 + 2 * outputs + 2 * 64
    assert sizes.matrix_bytes(300, 10, 3) == 300 * 10 * 3 // 8 + 2 * 10 * 3
    # 2:4: two values and two 2-bit indices of four weights
    assert semistructured.model_bytes(config, 2) == 2 * (layer // 4 * 36 // 8 + 2 * 64)
    assert semistructured.model_bytes(config, 2, 4) == 2 * (layer // 4 * 12 // 8 + 2 * outputs + 2 * 64)
    # low rank, and a stream of 24 directions with two adapters a layer, all 32 directions after the last block
    ranks = {(32, 32): 12, (32, 16): 8, (32, 96): 18, (96, 32): 18}
    low = 2 * ranks[32, 32] * 64 + 2 * ranks[32, 16] * 48 + 3 * ranks[32, 96] * 128
    assert svdllm.layer_bytes(config, 0.25) == 2 * (low + 64)
    first = 24 * (32 + 16 + 16) + 32 * 24 + 24 * 192 + 96 * 24 + 2 * 24 * 24
    last = first + 96 * 8 + 24 * 8
    assert slicegpt.stored(config, 24) == 2 * (320 * 24 + 320 * 32 + first + last)
    assert slicegpt.width_at(config, 0.0) == 32
    room = 0.75 * 2 * layer
    width = slicegpt.width_at(config, 0.25)

    def total(width: int) -> int:
        return slicegpt.layer_parameters(config, width) + slicegpt.layer_parameters(config, width, last=True)

    assert total(width) <= room < total(width + 8)


@pytest.mark.slow
def test_four_bits_stay_near(rng: np.random.Generator) -> None:
    """Every way to 4 bits: finite, another model than before, and closer to it than 2 bits of the original."""
    calibration = calibrated(rng, num_key_value_heads=4, intermediate_size=32)  # few shapes to compile
    want = logits(calibration.model, calibration)

    def distance(model: Dense, other: np.ndarray, kinds: Mapping[str, Any]) -> float:
        return float(np.square(logits(model, calibration, kinds) - other).mean())

    coarse = distance(gptq.row(calibration, 2, rotate=True).model, want, {})
    rows: list[Callable[[], Made]] = [
        lambda: next(shortgpt.rows(calibration, [0.5])),
        lambda: next(slicegpt.rows(calibration, [0.15])),
        lambda: next(svdllm.rows(calibration, [0.15])),
        lambda: next(sparsegpt.rows(calibration)),
    ]
    for row in rows:
        made = row()
        assert made.four is not None
        four, kinds = made.four(), dict(made.kinds)
        assert 0 < distance(four.model, logits(made.model, calibration, kinds), kinds) < coarse
        assert made.bytes / 4 < four.bytes < made.bytes / 2
        assert four.removed == made.removed > 0
    for layer in four.model.layers:  # the zeros of a sparse model are still there
        down = np.asarray(layer["mlp"]["down"])
        assert ((down.reshape(-1, 4, down.shape[-1]) != 0).sum(1) <= 2).all()


FEW = ["original", "ShortGPT, 16 bits", "Wanda 2:4, 16 bits"]


@pytest.fixture
def command(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The driver's arguments for a tiny model, its calibration windows and its text."""
    model = tiny.model(rng)
    layers, top = model.params["layers"], {k: v for k, v in model.params.items() if k != "layers"}
    source = mock.Mock(config=model.config, hf_config=tiny.HF, layer=lambda i: layers[i])
    source.configure_mock(name="tiny", top=lambda: top, device_top=lambda: top)
    monkeypatch.setattr(driver, "open_source", lambda path: source)
    for name in ("calib", "text"):
        np.save(tmp_path / f"{name}.npy", rng.integers(3, tiny.VOCAB, (4, 32)).astype(np.int32))
    text = f"--text some={tmp_path}/text.npy --eval-window 32"
    return f"--ckpt x --calib {tmp_path}/calib.npy --windows 4 --length 32 {text} --rates .25 --json".split()


def recorded(command: list[str], out: Path, *more: str) -> list[dict[str, Any]]:
    """The rows of a run."""
    driver.main([*command, str(out), *more])
    return json.loads(out.read_text())["rows"]


def test_the_driver_records_rows(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = recorded(command, tmp_path / "record.json", "--only", *FEW)
    assert [row["name"] for row in rows] == FEW
    assert rows[0]["ratio"] == {"some": 1.0}
    assert rows[0]["bytes"] == 2 * sizes.kept_parameters(tiny.config(), [{}, {}])
    assert all(row["perplexity"]["some"] > 1 for row in rows)
    assert FEW[-1] in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_the_driver_runs_every_row(command: list[str], tmp_path: Path, rng: np.random.Generator) -> None:
    examples = tmp_path / "train.npy"
    np.save(examples, rng.integers(3, tiny.VOCAB, (40, 32)).astype(np.int32))
    rows = recorded(command, tmp_path / "record.json", "--recover", "2", "--train", str(examples))
    found = [(row["name"], row["prune_rate"]) for row in rows]
    assert len(found) == len(set(found)) == 1 + 2 * 3 + 2 * (len(driver.METHODS) + 2) + 6
    assert all(row["bytes"] > 0 and row["perplexity"]["some"] > 1 for row in rows)
    at = {row["name"]: row for row in rows if row["prune_rate"] == 0.25}
    for name in ("uniql-jax", "MoDeGPT", "ShortGPT"):
        assert at[f"{name}, recovered, 16 bits"]["bytes"] == at[f"{name}, 16 bits"]["bytes"]
        assert at[f"{name}, 4 bits"]["bytes"] < at[f"{name}, 16 bits"]["bytes"] / 2


@pytest.mark.slow
def test_training_makes_up_for_what_was_cut(rng: np.random.Generator) -> None:
    """Layers dropped and channels cut, trained on the windows themselves."""
    calibration = calibrated(rng)
    tokens = np.tile(np.asarray(calibration.batches[0]), (4, 1))
    recovery = Recovery(from_windows(tokens), 30, {"batch": 8, "lr": 1e-2, "evaluations": 2, "dropout": 0.0})

    def loss(model: Dense) -> float:
        log_p = jax.nn.log_softmax(logits(model, calibration)[:, :-1])
        return -float(np.take_along_axis(np.asarray(log_p), tokens[:4, 1:, None], -1).mean())

    for rows, rate in ((modegpt.rows, 0.35), (shortgpt.rows, 0.5)):
        made = next(rows(calibration, [rate]))
        better = recovered(made, calibration, recovery)
        assert loss(better.model) < loss(made.model) - 0.1
        assert better.parameters == made.parameters
        zeros = [np.asarray(layer["mlp"]["down"]) == 0 for layer in made.model.layers]
        for layer, zero in zip(better.model.layers, zeros, strict=True):
            assert not np.asarray(layer["mlp"]["down"])[zero].any()


def test_other_blocks_are_refused(rng: np.random.Generator) -> None:
    model = tiny.model(rng, model_type="qwen3", head_dim=8)
    with pytest.raises(UserError, match="qwen3"):
        open_dense(mock.Mock(config=model.config))


def test_the_fit_and_the_ranks_are_the_best_there_are(rng: np.random.Generator) -> None:
    """MoDeGPT's down_proj against least squares, its V/O product against an SVD of the whole weighed product."""
    gram, down = correlated(rng, 24), rng.standard_normal((24, 10)).astype(np.float32)
    chosen = rng.permutation(24)[:12]
    root = np.linalg.cholesky(gram.astype(np.float64)).T
    want = np.linalg.lstsq(root[:, chosen], root @ down, rcond=None)[0]
    got = modegpt.fitted(gram, down, chosen)
    np.testing.assert_allclose(root[:, chosen] @ got, root[:, chosen] @ want, atol=1e-3 * np.abs(root @ down).max())

    calibration = calibrated(rng, num_hidden_layers=1, num_key_value_heads=1)
    config, [layer], [stats] = calibration.model.config, calibration.model.layers, calibration.stats
    of_attention = {name: jnp.asarray(value) for name, value in stats["attention"].items()}
    cut = modegpt.cut_attention(config, layer["attention"], of_attention, 4, 3)

    def product(block: Mapping[str, Any]) -> np.ndarray:
        value, output = (np.asarray(block[name], np.float64) for name in ("v", "o"))
        return np.einsum("dgh,dnk->hnk", value, output).reshape(config.hidden_size, -1)

    root = np.linalg.cholesky(stats["attention"]["read"].astype(np.float64) + 1e-9 * np.eye(32)).T
    sizes_of_all = np.linalg.svd(root @ product(layer["attention"]), compute_uv=False)
    error = np.square(root @ (product(cut) - product(layer["attention"]))).sum()
    assert error == pytest.approx(np.sum(sizes_of_all[3:] ** 2), rel=1e-3)
