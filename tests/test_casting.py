"""Casting weights: exact where it fits, refused where a finite value would become infinite; and what a source holds."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.convert import common
from uniql_jax.casting import all_finite, cast
from uniql_jax.compression.artifacts import LayerStore, flatten, layer_name
from uniql_jax.compression.contract import SortedModel
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.stages.calibrate import Calibration
from uniql_jax.compression.stages.quantize import quantize
from uniql_jax.compression.stored import TOP, StoredLayers
from uniql_jax.compression.streams import StreamStore, Windows
from uniql_jax.convert.from_hf import convert
from uniql_jax.convert.source import open_source
from uniql_jax.errors import UserError
from uniql_jax.plan import make_plan

FORMATS = [np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


@pytest.mark.parametrize("source", FORMATS, ids=str)
@pytest.mark.parametrize("target", FORMATS, ids=str)
def test_cast_is_the_plain_cast_or_a_refusal(rng, source, target):
    value = rng.standard_normal((7, 5)).astype(source)
    np.testing.assert_array_equal(cast("w", value, target), value.astype(target))
    value[3, 2] = ml_dtypes.finfo(source).max
    with np.errstate(over="ignore"):
        plain = value.astype(target)
    if np.isfinite(plain[3, 2]):
        np.testing.assert_array_equal(cast("w", value, target), plain)
        return
    with pytest.raises(UserError, match=f"'w' does not fit {target.name}.*"):
        cast("w", value, target)


@pytest.mark.parametrize("source", FORMATS, ids=str)
@pytest.mark.parametrize("target", FORMATS, ids=str)
def test_nan_of_any_kind_is_cast_without_a_word(source, target):
    """Quiet or signalling, of either sign; and infinity stays what it is."""
    infinity = np.full(4, np.inf, source).view(f"u{source.itemsize}")
    quiet = np.full(1, np.nan, source).view(f"u{source.itemsize}")[0] & ~infinity[0]
    bits = infinity + np.array([0, 1, quiet, quiet + 1], infinity.dtype)
    sign = infinity.dtype.type(1) << infinity.dtype.type(8 * source.itemsize - 1)
    for value in (bits.view(source), (bits | sign).view(source)):
        found = cast("w", value, target)
        with np.errstate(invalid="ignore"):  # bfloat16's own isnan says so
            assert np.isinf(found[:1]).all()
            assert np.isnan(found[1:]).all()


def test_the_advice_names_formats_that_hold_the_value():
    for largest, target, advice in [(1e5, "float16", "bfloat16 or float32"), (3.4e38, "bfloat16", "use float32")]:
        with pytest.raises(UserError, match=advice):
            cast("w", np.array([1.0, largest], np.float32), ml_dtypes.bfloat16 if target == "bfloat16" else target)
    with pytest.raises(UserError, match="no format"):
        cast("w", np.array([1e300]), np.float32)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_all_finite_finds_one_bad_value_anywhere(rng, dtype):
    assert all_finite(np.zeros((0, 3), dtype))
    value = rng.standard_normal((700, 801)).astype(dtype)
    value[1, 1], value[2, 2] = ml_dtypes.finfo(dtype).max, -ml_dtypes.finfo(dtype).max
    assert all_finite(value)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        broken = value.copy()
        broken[tuple(rng.integers(value.shape))] = bad
        assert not all_finite(broken)
        assert not all_finite(broken.T)


@pytest.mark.parametrize("name", ["llama-biased", "qwen2-tied"])
def test_fingerprints_tell_every_part(tmp_path, rng, name):
    hf = common.hf_config(name)
    tensors = {n: v.astype(ml_dtypes.bfloat16) for n, v in common.state_dict(hf, rng).items()}
    whole = open_source(common.write(tmp_path / "whole", hf, tensors)).fingerprints()
    assert list(whole) == ["top", "layer 0", "layer 1"]
    # neither the folder nor the shards count
    split = open_source(common.write(tmp_path / "split", hf, tensors, max_shard_bytes=3000))
    seen = []
    assert split.fingerprints(lambda parts, desc, total: seen.append((desc, total)) or parts) == whole
    assert seen == [("check", 3)]
    for victim in tensors:
        changed = tensors[victim].copy()
        changed.view(np.uint16)[tuple(rng.integers(changed.shape))] ^= 1  # the last bit of one value
        other = open_source(common.write(tmp_path / victim, hf, tensors | {victim: changed})).fingerprints()
        part = f"layer {victim.split('.')[2]}" if ".layers." in victim else "top"
        assert {key for key in whole if whole[key] != other[key]} == {part}, victim


def test_fingerprints_refuse_values_that_are_not_finite(tmp_path, rng):
    hf = common.hf_config("llama")
    tensors = common.state_dict(hf, rng)
    victim = "model.layers.1.mlp.down_proj.weight"
    for i, (bad, dtype) in enumerate([(np.nan, np.float32), (np.inf, np.float16), (-np.inf, ml_dtypes.bfloat16)]):
        broken = tensors[victim].astype(dtype)
        broken[2, 3] = bad
        source = open_source(common.write(tmp_path / str(i), hf, tensors | {victim: broken}))
        with pytest.raises(UserError, match=f"'{victim}' holds NaN or infinity"):
            source.fingerprints()


@pytest.mark.parametrize("name", ["embed", "layers.1.mlp.down", "layers.1.attention.q"])
def test_compression_names_the_tensor_that_does_not_fit(tmp_path, rng, name):
    """Between the largest bfloat16 and the largest float32, when it is finished and when it is read back."""
    hf = common.hf_config("llama")
    source = open_source(common.write(tmp_path / "m", hf, common.state_dict(hf, rng)))
    top, layer = source.top(), source.layer(1)
    victim = top["embed"] if name == "embed" else layer[name.split(".")[2]][name.split(".")[3]]
    victim[(0,) * victim.ndim] = 3.4e38
    layers, done = LayerStore(tmp_path / "dense"), LayerStore(tmp_path / "done")
    layers.save(layer_name(0), flatten(source.layer(0)))
    layers.save(layer_name(1), flatten(layer))
    settings, refusal = CompressionSettings(bits=16), f"tensor '{name}' does not fit bfloat16"
    model = SortedModel(
        source.config,
        make_plan(source.config, None),
        {leaf: jnp.asarray(value) for leaf, value in top.items()},
        layers,
    )
    calibration = Calibration((), jnp.eye(source.config.hidden_size))
    streams = StreamStore(tmp_path / "streams", Windows(np.zeros((1, 4), np.int32), 4), 1)
    with pytest.raises(UserError, match=refusal):
        quantize(model, calibration, settings, done, None, streams, lambda items, _: items)
    layers.save(TOP, top)
    read = StoredLayers(source.config, settings, layers)
    with pytest.raises(UserError, match=refusal):
        read.top() if name == "embed" else read.layer(1)


@pytest.mark.parametrize(
    ("stored", "declared", "scale"),
    [(np.float32, "float16", 1e6), (np.float32, "bfloat16", 1e38), (np.float64, "float32", 1e300)],
)
def test_from_hf_makes_no_infinities(tmp_path, rng, stored, declared, scale):
    hf = common.hf_config("llama", torch_dtype=declared)
    tensors = {name: value.astype(stored) for name, value in common.state_dict(hf, rng).items()}
    tensors["model.embed_tokens.weight"] = np.sign(tensors["model.embed_tokens.weight"]) * stored(3.4 * scale)
    common.write(tmp_path / "m", hf, tensors)
    with pytest.raises(UserError, match=f"embed.*does not fit {declared}"):
        convert(str(tmp_path / "m"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
