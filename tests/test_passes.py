"""The one pass: killed and resumed equals never killed, bad starts leave nothing behind, every step earns its place."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import uniql_jax
from tests import compressed, published, reference
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.compression import refit
from uniql_jax.compression.contract import RecoveryData
from uniql_jax.compression.pipeline import compress
from uniql_jax.compression.recovery import load_recovery, with_own_text
from uniql_jax.compression.settings import REFIT_RATES, CompressionSettings, Resources
from uniql_jax.convert.source import Source, open_source
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.train import own_text
from uniql_jax.train import settings as recovery
from uniql_jax.train.examples import from_windows
from uniql_jax.weights.protocol import dense
from uniql_jax.weights.quantized import QuantizedArray

CONFIG = published.shrink(published.LLAMA_2_7B, num_attention_heads=4, num_key_value_heads=2)
QUICK = CompressionSettings(bits=4, rounding="nearest", scale_search=False)
DENSE = CompressionSettings(bits=32, plan="uniform")
RESUMED = {
    "4 bits, refit": (CompressionSettings(bits=4, refit=0.5), Resources(batch_tokens=192)),
    "4 bits, few streams kept": (
        CompressionSettings(bits=4, reconstruct=2),
        Resources(batch_tokens=192, stream_interval=1000),
    ),
    "16 bits": (CompressionSettings(bits=16), Resources(batch_tokens=192)),
}


class Killed(BaseException):
    """Stands for a signal: no handler of ordinary errors may catch it."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    """Three layers, two query heads per key/value head, untied."""
    return reference.save(reference.build(CONFIG, seed + 5), tmp_path_factory.mktemp("passes") / "hub", CONFIG)


@pytest.fixture
def source(folder: Path) -> Source:
    return open_source(folder)


@pytest.fixture(scope="session")
def windows(seed: int) -> np.ndarray:
    """Calibration windows over few token ids: what they feed to the layers is correlated, as text's is."""
    rng = np.random.default_rng([seed, 17])
    return rng.choice(rng.integers(3, 256, 24), (12, 32)).astype(np.int32)


@functools.cache
def _call() -> Any:
    return jax.jit(lambda model, tokens: model(tokens))


def _logits(model: CausalLM, tokens: np.ndarray) -> np.ndarray:
    """With dense weights and without names, so that equal shapes share one program."""
    params = jax.tree.map(dense, model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    return np.asarray(_call()(CausalLM(model.config, params), tokens))


def _loss(at: Path, rate: float, windows: np.ndarray) -> float:
    scores = jax.nn.log_softmax(jnp.asarray(_logits(uniql_jax.load(at, rate, dtype=jnp.float32), windows)))[:, :-1]
    return float(-np.take_along_axis(np.asarray(scores), windows[:, 1:, None], axis=2).mean())


def _error(checkpoint: Path, original: Path, tokens: np.ndarray, rate: float = 0.0) -> float:
    """Relative error of the logits against the original model's."""
    wanted = _logits(uniql_jax.load_source(str(original), dtype=jnp.float32), tokens)
    return reference.relative_error(_logits(uniql_jax.load(checkpoint, rate, dtype=jnp.float32), tokens), wanted)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _stop_at(stage: str, step: int) -> Callable[[Iterable[Any], str], Iterator[Any]]:
    """A progress callback that kills the run before `step` of `stage`."""

    def progress(items: Iterable[Any], desc: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if (desc, number) == (stage, step):
                raise Killed
            yield item

    return progress


# ------------------------------------------------------------------------------- killed and resumed


@pytest.fixture(scope="session")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, windows: np.ndarray
) -> Callable[..., tuple[Path, dict[str, int]]]:
    """CompressionSettings -> checkpoint of a run that nothing stopped, and the steps of each of its stages."""

    @functools.cache
    def made(options: CompressionSettings, resources: Resources) -> tuple[Path, dict[str, int]]:
        stages: dict[str, int] = {}

        def progress(items: Any, desc: str) -> Any:
            stages[desc] = len(items)
            return items

        out = tmp_path_factory.mktemp("uninterrupted") / "out"
        compress(open_source(folder), out, windows, options, resources=resources, progress=progress)
        return out, stages

    return made


@pytest.mark.parametrize(("options", "resources"), RESUMED.values(), ids=RESUMED)
def test_killed_at_any_layer_and_resumed_is_never_killed(
    options: CompressionSettings,
    resources: Resources,
    uninterrupted: Any,
    source: Source,
    windows: np.ndarray,
    tmp_path: Path,
) -> None:
    """One run, killed before the first, a middle and the last layer of every stage, each time resumed."""
    whole, stages = uninterrupted(options, resources)
    assert len(stages) >= 2
    out, kills = tmp_path / "out", 0
    for stage, steps in stages.items():
        for step in range(steps):
            with pytest.raises(Killed):
                compress(
                    source, out, windows, options, resources=resources, resume=kills > 0, progress=_stop_at(stage, step)
                )
            kills += 1
            assert not out.exists()
    compress(source, out, windows, options, resources=resources, resume=True)
    assert kills == sum(stages.values()) >= 6
    assert _contents(out) == _contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "resources"),
    [
        pytest.param(*given, id=name, marks=() if number == 0 else pytest.mark.slow)
        for number, (name, given) in enumerate(RESUMED.items())
    ],
)
def test_killed_before_a_file_gets_its_name(
    options: CompressionSettings,
    resources: Resources,
    uninterrupted: Any,
    source: Source,
    windows: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    """Half-finished layers: what was written but not yet renamed is not taken for done."""
    whole, _ = uninterrupted(options, resources)
    replace, calls = os.replace, 0

    def dying(at: int) -> Callable[..., None]:
        def call(a: Any, b: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            replace(a, b)

        return call

    monkeypatch.setattr(os, "replace", dying(-1))
    compress(source, tmp_path / "counted", windows, options, resources=resources)
    total = calls
    for number, at in enumerate(rng.choice(np.arange(2, total + 1), 3, replace=False)):
        out, calls = tmp_path / f"out{number}", 0
        monkeypatch.setattr(os, "replace", dying(int(at)))
        with pytest.raises(Killed):
            compress(source, out, windows, options, resources=resources)
        monkeypatch.setattr(os, "replace", replace)
        assert not out.exists()
        compress(source, out, windows, options, resources=resources, resume=True)
        assert _contents(out) == _contents(whole), f"killed at rename {at} of {total}"


def test_equal_seeds_give_equal_bytes_and_others_do_not(source: Source, windows: np.ndarray, tmp_path: Path) -> None:
    for name, options in {"a": QUICK, "b": QUICK, "c": dataclasses.replace(QUICK, seed=1)}.items():
        compress(source, tmp_path / name, windows, options)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    assert _contents(tmp_path / "a")["model.safetensors"] != _contents(tmp_path / "c")["model.safetensors"]


def test_resuming_with_other_settings_or_windows_is_refused(
    source: Source, windows: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        compress(source, out, windows, QUICK, progress=_stop_at("sort", 1))
    before = _contents(tmp_path)
    with pytest.raises(UserError, match="setting bits"):
        compress(source, out, windows, dataclasses.replace(QUICK, bits=8), resume=True)
    with pytest.raises(UserError, match="calibration tokens"):
        compress(source, out, windows[:, ::-1].copy(), QUICK, resume=True)
    with pytest.raises(UserError, match="unfinished run"):
        compress(source, out, windows, QUICK)
    assert _contents(tmp_path) == before
    compress(source, out, windows, QUICK, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_resume_without_anything_begun_just_begins(source: Source, windows: np.ndarray, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", windows, QUICK, resume=True)
    assert open_checkpoint(tmp_path / "out").bits == 4


# ------------------------------------------------------------------------------- bad starts


def test_an_existing_output_is_refused_and_spared(source: Source, windows: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        compress(source, out, windows, QUICK)
    assert _contents(tmp_path) == {"out/config.json": b"mine"}
    with pytest.raises(Killed):
        compress(source, out, windows, QUICK, overwrite=True, progress=_stop_at("sort", 1))
    assert (out / "config.json").read_text() == "mine"  # replaced at the very end only
    compress(source, out, windows, QUICK, overwrite=True, resume=True)
    assert open_checkpoint(out).bits == 4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_found_before_anything_is_written(
    source: Source, windows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match="space"):
        compress(source, tmp_path / "deep" / "out", windows, QUICK)
    assert list(tmp_path.iterdir()) == []


def test_side_files_and_provenance_travel(folder: Path, windows: np.ndarray, tmp_path: Path) -> None:
    hub = shutil.copytree(folder, tmp_path / "hub")
    (hub / "tokenizer_config.json").write_text('{"a": 1}')
    compress(open_source(hub), tmp_path / "out", windows, QUICK, provenance={"calibration": "random ids"})
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"a": 1}'
    meta = open_checkpoint(tmp_path / "out").meta
    assert meta["provenance"]["calibration"] == "random ids"
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()  # no paths of this machine


# ------------------------------------------------------------------------------- every step earns its place


def _made(folder: Path, out: Path, windows: np.ndarray, options: CompressionSettings) -> Path:
    compress(open_source(folder), out, windows, options)
    return out


def test_gptq_beats_rounding_to_nearest(folder: Path, windows: np.ndarray, tmp_path: Path) -> None:
    rounding = {
        name: _error(
            _made(folder, tmp_path / name, windows, dataclasses.replace(QUICK, rounding=name)), folder, windows
        )
        for name in ("gptq", "nearest")
    }
    assert rounding["gptq"] < 0.9 * rounding["nearest"]
    assert rounding["nearest"] < 0.6  # and neither is noise


def test_searched_scales_beat_the_largest_magnitude(folder: Path, windows: np.ndarray, tmp_path: Path) -> None:
    plain = _error(_made(folder, tmp_path / "plain", windows, QUICK), folder, windows)
    searched = dataclasses.replace(QUICK, scale_search=True)
    assert _error(_made(folder, tmp_path / "searched", windows, searched), folder, windows) < plain


def test_more_bits_lose_less(folder: Path, windows: np.ndarray, tmp_path: Path) -> None:
    errors = [
        _error(_made(folder, tmp_path / str(bits), windows, dataclasses.replace(QUICK, bits=bits)), folder, windows)
        for bits in (4, 8, 16, 32)
    ]
    assert errors[0] > 5 * errors[1]
    assert errors[1] < 0.05
    assert errors[2] < 0.05
    assert errors[3] < 2e-5


def test_rotation_helps_where_channels_stand_out(folder: Path, windows: np.ndarray, tmp_path: Path) -> None:
    """Two stream coordinates whose weights are eight times the others' spoil every group that they are in."""
    hub = Path(shutil.copytree(folder, tmp_path / "hub"))
    tensors = load_file(hub / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith(tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "gate", "up"))):
            tensors[name] = np.concatenate([value[:, :2] * 8, value[:, 2:]], axis=1) / 2
    save_file(tensors, hub / "model.safetensors", metadata={"format": "pt"})
    error = {
        rotate: _error(
            _made(hub, tmp_path / str(rotate), windows, dataclasses.replace(QUICK, rotate=rotate)), hub, windows
        )
        for rotate in (True, False)
    }
    assert error[True] < 0.8 * error[False]


def test_good_orders_beat_random_ones(folder: Path, windows: np.ndarray, tmp_path: Path) -> None:
    """Each axis on its own: the default score against a random order, sizes equal."""
    good = _error(_made(folder, tmp_path / "good", windows, DENSE), folder, windows, 0.25)
    for axis in ("mlp_score", "pair_score", "value_output"):
        bad = _made(folder, tmp_path / axis, windows, dataclasses.replace(DENSE, **{axis: "random"}))
        assert good < _error(bad, folder, windows, 0.25), axis


def test_the_refit_makes_pruned_rates_better(folder: Path, windows: np.ndarray, tmp_path: Path) -> None:
    plain = _made(folder, tmp_path / "plain", windows, DENSE)
    refitted = _made(folder, tmp_path / "refit", windows, dataclasses.replace(DENSE, refit=0.4))
    for rate in (0.25, 0.35):
        assert _error(refitted, folder, windows, rate) < 0.95 * _error(plain, folder, windows, rate)
    # rate 0 pays, by the dial, and less than pruning does
    assert _error(plain, folder, windows) < 2e-5
    assert 1e-4 < _error(refitted, folder, windows) < _error(refitted, folder, windows, 0.35)
    for name in ("gate", "up"):  # inputs stay as they were
        for a, b in zip(uniql_jax.load(plain).params["layers"], uniql_jax.load(refitted).params["layers"], strict=True):
            np.testing.assert_array_equal(a["mlp"][name], b["mlp"][name])


def test_recovery_in_the_pass(source: Source, folder: Path, windows: np.ndarray, tmp_path: Path) -> None:
    """LoRA is trained on the sorted model and merged before rounding; a kill on the way changes nothing."""
    train, validation = from_windows(windows), from_windows(windows[:4])
    wanted = RecoveryData(
        train, validation, recovery.RecoverySettings(steps=12, batch=4, lr=2e-3, dropout=0.0, evaluations=3)
    )
    plain, out, again = tmp_path / "plain", tmp_path / "out", tmp_path / "again"
    compress(source, plain, windows, DENSE)
    report = compress(source, out, windows, DENSE, recovery=wanted)
    assert report.recovered is not None
    assert np.mean(list(report.recovered.after.values())) < np.mean(list(report.recovered.before.values()))
    assert open_checkpoint(out).meta["provenance"]["recovery"]["steps"] == 12
    before, after = (open_checkpoint(at).layer(0) for at in (plain, out))
    assert not np.array_equal(before["mlp"]["down"], after["mlp"]["down"])
    np.testing.assert_array_equal(before["mlp"]["norm"], after["mlp"]["norm"])
    # what was validated is what was written
    assert _loss(out, 0.35, windows[:4]) == pytest.approx(report.recovered.after[0.35], rel=1e-4)
    for stage, step in (("recover", 7), ("finish", 1)):
        with pytest.raises(Killed):
            compress(
                source, again, windows, DENSE, recovery=wanted, resume=stage == "finish", progress=_stop_at(stage, step)
            )
    compress(source, again, windows, DENSE, recovery=wanted, resume=True)
    assert _contents(again) == _contents(out)


def test_recovery_on_text_that_the_model_writes(
    source: Source, windows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan counts the windows before there are any; a kill while they are written, or later, changes nothing."""
    monkeypatch.setattr(own_text, "EVERY", 1)
    settings = recovery.RecoverySettings(steps=4, batch=4, dropout=0.0, evaluations=1, distill=1.0)
    wanted = load_recovery(source, ["own:80"], settings, 16)
    assert len(wanted.train) + len(wanted.validation) == 80
    assert not wanted.train.tokens.any()
    done = with_own_text(source, wanted, tmp_path / "own", lambda items, _: items)
    model = uniql_jax.load_source(source.name)
    begin = own_text.beginnings(256, None, source.config.eos_ids)
    rows = own_text.own_text(model, recovery.OwnText(80, 16), begin)
    assert sorted(map(tuple, [*done.train.tokens, *done.validation.tokens])) == sorted(map(tuple, rows))
    out, again = tmp_path / "out", tmp_path / "again"
    compress(source, out, windows, DENSE, recovery=wanted)
    for resume, stage, step in ((False, "write text", 1), (True, "recover", 2)):
        with pytest.raises(Killed):
            compress(
                source, again, windows, DENSE, recovery=wanted, resume=resume, progress=_stop_at(stage, step)
            )  # fmt: skip
    with pytest.raises(UserError, match="own text setting windows"):
        compress(source, again, windows, DENSE, recovery=load_recovery(source, ["own:81"], settings, 16), resume=True)
    compress(source, again, windows, DENSE, recovery=wanted, resume=True)
    assert _contents(again) == _contents(out)


@pytest.mark.parametrize("spec", ["own:", "own:1", "own:many", "own:-3", "own:1000001", "own:٣"])
def test_a_number_of_windows_that_is_none_is_refused(spec: str, source: Source) -> None:
    with pytest.raises(UserError, match="--recover own"):
        load_recovery(source, [spec], recovery.RecoverySettings(), 16)


@pytest.mark.parametrize("rank", [pytest.param(8, marks=pytest.mark.slow), 0])
def test_tuning_in_the_pass(source: Source, windows: np.ndarray, tmp_path: Path, rank: int) -> None:
    """After quantizing, training goes on with every weight rounded as it is stored, embedding and head among them: what
    is validated is what is stored, pruned or not, before and after; a kill on the way changes nothing.
    """
    train, validation = from_windows(windows), from_windows(windows[:4])
    first = recovery.RecoverySettings(steps=1, batch=4, lr=1e-9, dropout=0.0, evaluations=1)
    then = dataclasses.replace(first, steps=40, lr=5e-3 if rank else 2e-2, evaluations=4, distill=0.3, rank=rank)
    wanted = RecoveryData(train, validation, first, then)
    options = CompressionSettings(bits=4, plan="uniform")
    plain, out, again = tmp_path / "plain", tmp_path / "out", tmp_path / "again"
    compress(source, plain, windows, options, recovery=dataclasses.replace(wanted, tuning=None))
    report = compress(source, out, windows, options, recovery=wanted)
    assert report.tuned is not None
    for rate in (0.0, 0.35):
        assert _loss(plain, rate, windows[:4]) == pytest.approx(report.tuned.before[rate], rel=1e-4)
        assert _loss(out, rate, windows[:4]) == pytest.approx(report.tuned.after[rate], rel=1e-4)
    assert np.mean(list(report.tuned.after.values())) < np.mean(list(report.tuned.before.values())) - 0.01
    assert open_checkpoint(out).meta["provenance"]["tuning"]["steps"] == 40
    assert open_checkpoint(out).weight_bytes(0.0) == open_checkpoint(plain).weight_bytes(0.0)
    for name, value in open_checkpoint(out).top().items():
        was = open_checkpoint(plain).top()[name]
        assert isinstance(value, QuantizedArray) == (name in ("embed", "head"))
        if isinstance(value, QuantizedArray):
            assert np.any(np.asarray(value.data) != np.asarray(was.data))
            np.testing.assert_array_equal(np.asarray(value.scale), np.asarray(was.scale))
    if not rank:  # a kill in training every weight: tests of `train`
        return
    for stage, step in (("quantize", 1), ("tune", 25)):
        with pytest.raises(Killed):
            compress(
                source, again, windows, options, recovery=wanted, resume=stage == "tune", progress=_stop_at(stage, step)
            )
    compress(source, again, windows, options, recovery=wanted, resume=True)
    assert _contents(again) == _contents(out)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_refit_rates_keep_the_asked_share_at_zero(share: float) -> None:
    rates = refit.refit_rates(200, share)
    assert abs(np.mean(rates == 0) - share) <= 1 / 200 + 1e-9
    assert set(rates[rates > 0].tolist()) == set(REFIT_RATES)
    halves = np.mean(rates[:100] == 0), np.mean(rates[100:] == 0)
    assert abs(halves[0] - halves[1]) <= 0.02  # spread evenly


def test_refit_solves_its_least_squares(rng: np.random.Generator) -> None:
    a, truth = rng.standard_normal((200, 12)), rng.standard_normal((12, 5))
    y, start = a @ truth, rng.standard_normal((12, 5))
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    found = refit.refit(f32(a.T @ a), f32(a.T @ y), f32(start), 1e-9)
    np.testing.assert_allclose(found, truth, atol=1e-3)
    held = refit.refit(f32(a.T @ a), f32(a.T @ y), f32(start), 1e6)
    np.testing.assert_allclose(held, start, atol=1e-3)
    nothing = refit.refit(f32(np.zeros((12, 12))), f32(np.zeros((12, 5))), f32(start), 1e-2)
    np.testing.assert_allclose(nothing, start, rtol=1e-6)  # channels that are never met keep their weights


def test_block_influence_is_what_it_says(source: Source, folder: Path, windows: np.ndarray, tmp_path: Path) -> None:
    """One minus the mean cosine between a layer's input and output, over all tokens."""
    report = compress(source, tmp_path / "out", windows, dataclasses.replace(QUICK, stream_dtype="float32"))
    theirs = reference.load(folder)
    import torch

    with torch.no_grad():
        states = theirs.model(torch.from_numpy(windows.astype(np.int64)), output_hidden_states=True).hidden_states
    # the last entry comes after the final norm, which is not part of a layer
    for i, influence in enumerate(report.influence[:-1]):
        cosine = torch.nn.functional.cosine_similarity(states[i], states[i + 1], dim=-1).mean()
        assert influence == pytest.approx(1 - float(cosine), abs=1e-5)


def test_windows_of_any_number_and_length(source: Source, tmp_path: Path, rng: np.random.Generator) -> None:
    """Fewer rows than channels: Gram matrices are singular, the result is still finite and whole."""
    tokens = compressed.tokens(rng, 1, 5)
    report = compress(source, tmp_path / "out", tokens, CompressionSettings(bits=4, refit=0.5))
    assert np.isfinite(_logits(uniql_jax.load(tmp_path / "out", 0.35, dtype=jnp.float32), tokens)).all()
    assert report.bytes == open_checkpoint(tmp_path / "out").weight_bytes(0.0)
