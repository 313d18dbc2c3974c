"""The elastic checkpoint on disk: what is written is read, by prefix, and a bad folder is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import tiny
from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.checkpoint import is_elastic, open_checkpoint
from uniql_jax.checkpoint_leaves import assembled
from uniql_jax.checkpoint_writer import CheckpointWriter, stored
from uniql_jax.errors import UserError
from uniql_jax.files import ShardReader
from uniql_jax.plan import grouping, make_plan
from uniql_jax.weights.quantized import QuantizedArray, from_codes

HF = tiny.HF | {"num_hidden_layers": 2, "intermediate_size": 96}
CONFIG = model_config.from_hf(HF)


def _packed(leaf: elastic.Leaf, bits: int, rng: np.random.Generator) -> QuantizedArray:
    shape = elastic.shape(CONFIG, leaf)
    last = leaf.contract == "last"
    width = shape[-1] if last else int(np.prod(shape[:-1]))
    rows = int(np.prod(shape)) // width
    group = grouping(CONFIG)["groups"]["embed" if last else leaf.dims[0]]
    limit = 8 if bits == 4 else 127
    codes = jnp.asarray(rng.integers(-limit, limit, (rows, width)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.01, 0.1, (rows, -(-width // group))), jnp.bfloat16)
    return from_codes(codes, scale, bits=bits, group=group, contract=str(leaf.contract), shape=shape)


def _float(bits: int) -> Any:
    return np.float32 if bits == 32 else jnp.bfloat16


def _layer(bits: int, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    def draw(leaf: elastic.Leaf) -> Any:
        if bits < 16 and leaf.contract:
            return _packed(leaf, bits, rng)
        return stored(leaf, rng.standard_normal(elastic.shape(CONFIG, leaf)), _float(bits), "leaf")

    return {
        kind: {name: draw(leaf) for name, leaf in elastic.leaves(CONFIG, kind).items()} for kind in CONFIG.pattern[0]
    }


def _write(folder: Path, bits: int, rng: np.random.Generator, planned: bool = True, shard: int = 10**9) -> list[Any]:
    folder.mkdir()
    meta: dict[str, Any] = {"bits": bits, "groups": dict(grouping(CONFIG)["groups"]), "plan": None}
    if planned:
        meta["plan"] = make_plan(CONFIG, rng.random(2).tolist()).to_json()
    writer = CheckpointWriter(folder, HF, meta, shard)
    layers = [_layer(bits, rng) for _ in CONFIG.pattern]
    embed = elastic.TOP["embed"]
    writer.add_top(
        {
            "embed": _packed(embed, bits, rng)
            if bits < 16
            else stored(embed, rng.standard_normal((320, 32)), _float(bits), "embed")
        }
    )
    writer.add_top({"norm": np.ones(32, np.float32)})
    for i, layer in enumerate(layers):
        writer.add_layer(i, layer)
    total = writer.finish()
    assert total == open_checkpoint(folder).weight_bytes(0.0)
    return layers


@pytest.mark.parametrize("shard", [10**9, 20_000], ids=["one file", "shards"])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_written_is_read_by_prefix(bits: int, shard: int, tmp_path: Path, rng: np.random.Generator) -> None:
    layers = _write(tmp_path / "ck", bits, rng, shard=shard)
    if shard < 10**6:
        assert len(list((tmp_path / "ck").glob("model-*.safetensors"))) > 1
    for rate in (0.0, 0.2, 0.35):
        checkpoint = open_checkpoint(tmp_path / "ck")
        checkpoint.top()
        for i, keep in enumerate(checkpoint.keep(rate)):
            found = checkpoint.layer(i, keep)
            wanted = elastic.slice_layer(layers[i], keep)
            for kind, block in wanted.items():
                assert list(found[kind]) == list(block)
                for name, value in block.items():
                    got = found[kind][name]
                    assert type(got) is type(value)
                    if isinstance(value, QuantizedArray):
                        assert (got.shape, got.bits, got.group, got.contract, got.inner, got.width) == (
                            (value.shape, value.bits, value.group, value.contract, value.inner, value.width)
                        )
                        np.testing.assert_array_equal(got.data, value.data)
                        np.testing.assert_array_equal(got.scale, value.scale)
                        np.testing.assert_array_equal(got.dense(), value.dense())
                    else:
                        assert got.dtype == value.dtype
                        np.testing.assert_array_equal(got, value)
        assert checkpoint.bytes_read == checkpoint.weight_bytes(rate)


def test_the_config_stays_a_hugging_face_config(tmp_path: Path, rng: np.random.Generator) -> None:
    _write(tmp_path / "ck", 4, rng)
    checkpoint = open_checkpoint(tmp_path / "ck")
    assert checkpoint.hf_config == HF
    assert checkpoint.config == CONFIG
    assert checkpoint.meta["format"] == 1
    assert set(json.loads((tmp_path / "ck" / "config.json").read_text())) == {*HF, "uniql"}


def test_an_unsorted_checkpoint_has_rate_0_only(tmp_path: Path, rng: np.random.Generator) -> None:
    _write(tmp_path / "ck", 32, rng, planned=False)
    checkpoint = open_checkpoint(tmp_path / "ck")
    assert checkpoint.plan is None
    full = elastic.sizes(CONFIG)
    assert checkpoint.keep(0.0) == tuple({a: full[a] for a in ("ffn", "qk", "vo")} for _ in CONFIG.pattern)
    for refused in (lambda: checkpoint.keep(0.1), lambda: checkpoint.weight_bytes(0.1)):
        with pytest.raises(UserError, match="never sorted"):
            refused()
    model = uniql_jax.load(tmp_path / "ck")
    assert model.keep == checkpoint.keep(0.0)
    with pytest.raises(UserError, match="never sorted"):
        uniql_jax.prune(model, 0.1)


@pytest.mark.parametrize("rate", [-0.1, 0.36, float("nan"), float("inf")])
def test_bad_rates_are_refused(rate: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    _write(tmp_path / "ck", 4, rng)
    with pytest.raises(UserError, match="prune rate"):
        open_checkpoint(tmp_path / "ck").keep(rate)


def test_what_is_no_checkpoint(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        open_checkpoint(tmp_path / "empty")
    _write(tmp_path / "ck", 4, rng)
    config = tmp_path / "ck" / "config.json"
    whole = json.loads(config.read_text())
    assert is_elastic(tmp_path / "ck")
    config.write_text(json.dumps(HF))
    with pytest.raises(UserError, match="compress"):
        open_checkpoint(tmp_path / "ck")
    assert not any(is_elastic(tmp_path / name) for name in ("ck", "empty", "nothing"))
    config.write_text(json.dumps(whole | {"uniql": whole["uniql"] | {"format": 99}}))
    with pytest.raises(UserError, match="99"):
        open_checkpoint(tmp_path / "ck")
    config.write_text("{")
    with pytest.raises(UserError, match="JSON"):
        open_checkpoint(tmp_path / "ck")


def test_a_lost_tensor_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    from safetensors.numpy import load_file, save_file

    _write(tmp_path / "ck", 4, rng)
    path = tmp_path / "ck" / "model.safetensors"
    tensors = load_file(path)
    del tensors["layers.1.mlp.down.scale"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down"):
        uniql_jax.load(tmp_path / "ck")


def test_a_bare_leaf_needs_its_shape_only(rng: np.random.Generator) -> None:
    """Two stored tensors make a packed weight again, at any kept size."""
    leaf = elastic.BLOCKS["attention"]["o"]
    meta = {"bits": 4, "groups": dict(grouping(CONFIG)["groups"])}
    value = _packed(leaf, 4, rng)
    again = assembled(CONFIG, meta, leaf, {"data": value.data, "scale": value.scale})
    np.testing.assert_array_equal(again.dense(), value.dense())
    cut = value.take_prefix(6)
    again = assembled(CONFIG, meta, leaf, {"data": cut.data, "scale": cut.scale}, {"vo": 6})
    np.testing.assert_array_equal(again.dense(), value.dense()[:6])


def test_nothing_is_pickled(tmp_path: Path, rng: np.random.Generator) -> None:
    _write(tmp_path / "ck", 8, rng)
    assert {p.suffix for p in (tmp_path / "ck").iterdir()} == {".json", ".safetensors"}
    kinds = {dtype.name for dtype, _ in ShardReader(tmp_path / "ck").names().values()}
    assert kinds == {"int8", "bfloat16", "float32"}
