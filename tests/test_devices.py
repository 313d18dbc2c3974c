"""Several devices: a run on several virtual ones gives what one gives, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Int

from tests import virtual_devices
from uniql_jax import CausalLM, forward, load, load_source
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.compression import pipeline
from uniql_jax.compression.devices import Devices
from uniql_jax.compression.settings import CompressionSettings, Resources
from uniql_jax.convert.source import open_source

RUN = """
import json, sys, jax, numpy as np
from uniql_jax.compression import pipeline
from uniql_jax.compression.settings import CompressionSettings, Resources
from uniql_jax.convert.source import open_source

folder, calib, out = sys.argv[1:4]
count = int(sys.argv[4])
assert len(jax.local_devices()) == count
tokens, source = np.load(calib), open_source(folder)
for bits in json.loads(sys.argv[5]):
    for devices in (1, count):
        settings = CompressionSettings(bits=bits, stream_dtype="float32", refit=0.5 if bits == 4 else None)
        resources = Resources(batch_tokens=64, devices=devices)
        pipeline.compress(source, f"{out}/{bits}-{devices}", tokens, settings, resources=resources)
"""


@pytest.mark.parametrize(
    ("name", "count", "stored"),
    [
        ("smollm2-135m", 2, [4]),
        pytest.param("smollm2-135m", 8, [4, 32], marks=pytest.mark.slow),
        pytest.param("bamba-9b-v2", 8, [4, 32], marks=pytest.mark.slow),
    ],
)
def test_several_devices_give_what_one_gives(
    name: str, count: int, stored: list[int], hf_folder: Callable[[str], Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    """Windows in batches of two, one batch more than a multiple of the devices; each device compiles for itself."""
    calib = tmp_path / "calib.npy"
    np.save(calib, rng.integers(3, 256, (2 * count + 2, 32)).astype(np.int32))
    virtual_devices.run(RUN, count, str(hf_folder(name)), str(calib), str(tmp_path), str(count), str(stored))
    text = jnp.asarray(rng.integers(3, 256, (4, 48)).astype(np.int32))
    original = logits_of(load_source(str(hf_folder(name)), dtype=jnp.float32), text)
    for bits in stored:
        folders = [tmp_path / f"{bits}-{devices}" for devices in (1, count)]
        assert open_checkpoint(folders[0]).plan == open_checkpoint(folders[1]).plan
        for rate in (0.0, 0.15, 0.35):
            one, many = (logits_of(load(str(folder), rate, dtype=jnp.float32), text) for folder in folders)
            if bits == 32:
                np.testing.assert_allclose(many, one, atol=1e-4 * np.abs(one).max())
            else:  # where a sum is another in its last bit, an integer becomes another here and there
                errors = [np.linalg.norm(found - original) for found in (one, many)]
                assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_streams_in_the_hosts_memory_change_no_byte(
    hf_folder: Callable[[str], Path], tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, source = rng.integers(3, 256, (5, 32)).astype(np.int32), open_source(str(hf_folder("smollm2-135m")))
    kept: list[type] = []

    class Parked(Devices):
        def park(self, batch: Any, number: int) -> Any:
            kept.append(type(found := super().park(batch, number)))
            return found

    for name in ("device", "host"):
        settings = CompressionSettings()
        pipeline.compress(source, tmp_path / name, tokens, settings, resources=Resources(batch_tokens=64))
        monkeypatch.setattr(pipeline, "Devices", lambda count, _: Parked(count, parked=True))
    assert set(kept) == {np.ndarray}
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("device", "host"))
    assert ours == theirs


def logits_of(model: CausalLM, tokens: Int[Array, "b t"]) -> Float[np.ndarray, "b t v"]:
    return np.asarray(forward(model, tokens, prune_rate=model.rate))
