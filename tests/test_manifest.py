"""A manifest sees every change of every input, and says which."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from uniql_jax.errors import UserError
from uniql_jax.manifest import Manifest, hash_array, hash_file, hash_json, settings_entries, write_json


def test_any_value_type_or_shape_changes_the_hash(rng: np.random.Generator) -> None:
    array = rng.standard_normal((4, 6)).astype(np.float32)
    last = array.copy()
    last[-1, -1] = np.nextafter(last[-1, -1], np.float32(9))
    variants = [array, last, array.reshape(6, 4), array.view(np.int32), array.astype(ml_dtypes.bfloat16), array[:0]]
    assert len({hash_array(value) for value in variants}) == len(variants)
    assert hash_array(np.asfortranarray(array)) == hash_array(array)
    assert hash_array(np.float32(1)) != hash_array(np.float32(2))


def test_differences_are_named(tmp_path: Path) -> None:
    old = Manifest({"tensor a": "0" * 64, "tensor b": "1" * 64, **settings_entries({"lr": 0.1, "rates": "uniform"})})
    new = Manifest({"tensor a": "2" * 64, "data": "3" * 64, **settings_entries({"lr": 0.2, "rates": "uniform"})})
    assert old.differences(new) == ["data (new)", "settings.lr (0.1 -> 0.2)", "tensor a", "tensor b (missing)"]
    assert old.differences(old) == []
    assert Manifest(dict(reversed(old.entries.items()))).hash == old.hash != new.hash
    with pytest.raises(UserError, match=r"settings.lr \(0.1 -> 0.2\), tensor a and 1 more"):
        old.require(new, tmp_path)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert Manifest.load(path) is None
    manifest = Manifest({"a": "b"})
    manifest.save(path)
    assert Manifest.load(path) == manifest
    assert list(tmp_path.iterdir()) == [path]
    assert hash_file(path) != hash_json(json.loads(path.read_text()))
    for text in ("", "[]", '{"entries": 1}', '{"entries": {"a": 1}}', "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match="does not say"):
            Manifest.load(path)
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "none" / "x.json", {})
