"""Shards read by prefix and written as a stream; side files."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from uniql_jax import files
from uniql_jax.errors import UserError
from uniql_jax.files import ShardReader, ShardWriter
from uniql_jax.side_files import copy_side_files


def some_tensors(rng):
    return {
        "a": rng.standard_normal((6, 4)).astype(ml_dtypes.bfloat16),
        "b": rng.standard_normal((5, 3, 2)).astype(np.float32),
        "c": rng.integers(-100, 100, (7, 2)).astype(np.int32),
        "d": rng.integers(0, 100, (9,)).astype(np.int8),
        "e": rng.standard_normal((3, 3)).astype(np.float16),
        "f": np.array(2.5, np.float32),
    }


@pytest.mark.parametrize("limit", [60, 130, 10**9])
def test_write_then_read_gives_the_same_bits(tmp_path, rng, limit):
    tensors = some_tensors(rng)
    writer = ShardWriter(tmp_path, limit)
    for name, value in tensors.items():
        writer.add(name, value)
    writer.finish({"made": "here"})
    reader = ShardReader(tmp_path)
    assert reader.names() == {name: (value.dtype, value.shape) for name, value in tensors.items()}
    for name, value in tensors.items():
        np.testing.assert_array_equal(reader.read(name), value)
        assert reader.read(name).dtype == value.dtype
    total = sum(value.nbytes for value in tensors.values())
    assert writer.total_bytes == total
    assert reader.bytes_read == 2 * total
    index = tmp_path / files.INDEX
    assert index.exists() == (limit < 10**9)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["metadata"] == {"total_size": total, "made": "here"}
        for name, file in content["weight_map"].items():
            assert name in load_file(tmp_path / file)
    for path in tmp_path.glob("*.safetensors"):
        # no shard over the limit unless one tensor alone is
        held = load_file(path)
        assert len(held) == 1 or sum(v.nbytes for v in held.values()) <= limit


def test_a_prefix_costs_only_its_bytes(tmp_path, rng):
    tensors = some_tensors(rng)
    save_file(tensors, tmp_path / "model.safetensors")
    reader = ShardReader(tmp_path)
    for name in "abcde":
        before = reader.bytes_read
        for rows in (1, 2):
            np.testing.assert_array_equal(reader.read(name, rows), tensors[name][:rows])
        assert reader.bytes_read - before == 3 * tensors[name][:1].nbytes
    np.testing.assert_array_equal(reader.read("a", 99), tensors["a"])
    with pytest.raises(KeyError):
        reader.read("nothing")


def test_strided_arrays_are_written_as_they_look(tmp_path, rng):
    value = rng.standard_normal((4, 6)).astype(np.float32).T[::2]
    writer = ShardWriter(tmp_path)
    writer.add("x", value)
    writer.finish()
    np.testing.assert_array_equal(ShardReader(tmp_path).read("x"), value)


def test_a_writer_holds_one_shard_at_most(tmp_path, rng):
    writer = ShardWriter(tmp_path, 1000)
    for i in range(20):
        writer.add(f"x{i}", rng.standard_normal(100).astype(np.float32))
        assert sum(v.nbytes for v in writer._held.values()) <= 1000
    assert len(list(tmp_path.iterdir())) > 5  # written while the stream goes on
    with pytest.raises(ValueError, match="twice"):
        writer.add("x3", np.zeros(1))


def test_written_files_have_ordinary_permissions(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add("x", np.zeros(3))
    writer.finish()
    (tmp_path / "plain").touch()
    assert (tmp_path / files.WEIGHTS).stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("cut", [5, 40, -3])
def test_a_truncated_file_is_named(tmp_path, rng, cut):
    path = tmp_path / files.WEIGHTS
    save_file(some_tensors(rng), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated") as error:
        ShardReader(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_shards(tmp_path):
    with pytest.raises(UserError, match="no safetensors"):
        ShardReader(tmp_path)
    for i in (1, 2):
        save_file({"same": np.zeros(2), f"own{i}": np.ones(2)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(UserError, match="'same' is stored twice"):
        ShardReader(tmp_path)
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": {"same": "gone.safetensors"}}))
    with pytest.raises(UserError, match=r"gone\.safetensors"):
        ShardReader(tmp_path)
    (tmp_path / files.INDEX).write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        ShardReader(tmp_path)


def test_side_files_travel_byte_for_byte(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    wanted = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json", "LICENSE"]
    wanted.append("additional_chat_templates/tool.jinja")
    for name in [*wanted, "config.json", "model.safetensors", "pytorch_model.bin", "train.py"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode() + b"\r\n\x00\xff")
    target.mkdir()
    copy_side_files(source, target)
    found = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert found == set(wanted)
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in wanted)
