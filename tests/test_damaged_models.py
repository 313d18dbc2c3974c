"""Models whose attention lacks rank, through the whole pass: the same function at rate 0, and finite everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import uniql_jax
from tests import compressed, reference
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.compression.finite import first_nonfinite
from uniql_jax.compression.pipeline import compress
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert import to_hf
from uniql_jax.convert.source import open_source


def _with_dead_channels(source: Path, out: Path) -> Path:
    """A copy whose every second column of o_proj is zero."""
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("o_proj.weight"):
                tensors[name] = tensors[name].copy()
                tensors[name][:, ::2] = 0
        save_file(tensors, file, metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("damage", ["dead channels", "exported"])
@pytest.mark.parametrize("family", ["qwen2", "llama-multihead", "llama-grouped-tied", "bamba", "nemotron_h"])
def test_a_model_without_full_rank_compresses_without_loss(
    family: str,
    damage: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rng: np.random.Generator,
) -> None:
    made = compressed.made(tmp_path_factory, seed)
    source = tmp_path / "source"
    if damage == "exported":
        to_hf.export(str(made.checkpoint(family, CompressionSettings(bits=32))), str(source), 0.35, dtype="float32")
    else:
        _with_dead_channels(made.source(family), source)
    tokens = compressed.tokens(rng, 12, 48)
    some = jnp.asarray(tokens[:4])
    out = tmp_path / "out"
    compress(open_source(source), out, tokens, CompressionSettings(bits=32))
    checkpoint = open_checkpoint(out)
    for i, keep in enumerate(checkpoint.keep(0.0)):
        assert first_nonfinite(checkpoint.layer(i, keep)) is None
    wanted = uniql_jax.load_source(str(source), dtype=jnp.float32)(some)
    got = uniql_jax.load(out, 0.0, dtype=jnp.float32)(some)
    assert reference.relative_error(np.asarray(got), np.asarray(wanted)) < 1e-4
