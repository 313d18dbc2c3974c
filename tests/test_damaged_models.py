"""Models whose attention lacks rank, through the whole pass: the same function at rate 0, and finite everywhere."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
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

Damage = Callable[[np.ndarray, int, int], None]
"""Changes o_proj [hidden, heads, head size] in place, given how many query heads share a key/value head."""


def _dead_channel(o: np.ndarray, shared: int, size: int) -> None:
    o[:, :shared, size // 3] = 0


def _half_a_head(o: np.ndarray, shared: int, size: int) -> None:
    o[:, :shared, ::2] = 0


def _a_head(o: np.ndarray, shared: int, size: int) -> None:
    o[:, :shared] = 0


DAMAGES: dict[str, Damage] = {"a channel": _dead_channel, "half a head": _half_a_head, "a head": _a_head}
"""All of one key/value head, in every layer."""
_forward = jax.jit(lambda model, tokens: model(tokens))
FAMILIES = ["qwen2", "llama-multihead", "llama-grouped-tied", "bamba", "nemotron_h"]


def _damaged(source: Path, out: Path, damage: Damage) -> Path:
    """A copy of a model folder whose every o_proj is damaged."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    heads = config["num_attention_heads"]
    shared = heads // config["num_key_value_heads"]
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        names = [name for name in tensors if name.endswith("o_proj.weight")]
        for name in names:
            changed = tensors[name].copy()
            by_head = changed.reshape(len(changed), heads, -1)
            damage(by_head, shared, by_head.shape[2])
            tensors[name] = changed
        save_file(tensors, file, metadata={"format": "pt"})
        assert names
    return out


class Case:
    """A family's sources, and how far a checkpoint of one is from it."""

    def __init__(self, made: compressed.Made, family: str, folder: Path, tokens: np.ndarray):
        self.made, self.family, self.folder, self.tokens = made, family, folder, tokens

    @functools.cached_property
    def sources(self) -> dict[str, Path]:
        whole = self.made.source(self.family)
        return {name: _damaged(whole, self.folder / name, damage) for name, damage in DAMAGES.items()}

    def exported(self) -> Path:
        """Our own pruned checkpoint as a dense model: every V/O pair of it has lost ranks."""
        out = self.folder / "exported"
        to_hf.export(
            str(self.made.checkpoint(self.family, CompressionSettings(bits=32))), str(out), 0.35, dtype="float32"
        )
        return out

    def error(self, source: Path, bits: int) -> float:
        """Relative error of the logits at rate 0, once nothing at any rate is found not to be finite."""
        out = self.folder / f"{source.name}-{bits}"
        compress(open_source(source), out, self.tokens, CompressionSettings(bits=bits))
        checkpoint = open_checkpoint(out)
        for i, keep in enumerate(checkpoint.keep(0.0)):
            assert first_nonfinite(checkpoint.layer(i, keep)) is None
        wanted = _forward(uniql_jax.load_source(str(source), dtype=jnp.float32), self.tokens)
        got = _forward(uniql_jax.load(out, 0.0, dtype=jnp.float32), self.tokens)
        return reference.relative_error(np.asarray(got), np.asarray(wanted))


@pytest.fixture(params=FAMILIES)
def case(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rng: np.random.Generator,
) -> Case:
    return Case(compressed.made(tmp_path_factory, seed), request.param, tmp_path, compressed.tokens(rng, 6, 32))


@pytest.mark.parametrize(
    "case",
    [f if f in ("llama-grouped-tied", "nemotron_h") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
    indirect=True,
)
def test_without_quantization_nothing_is_lost(case: Case) -> None:
    for name, source in case.sources.items():
        assert case.error(source, 32) < 1e-4, name


@pytest.mark.parametrize("case", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])],
                         indirect=True)  # fmt: skip
def test_our_own_export_compresses_again(case: Case) -> None:
    source = case.exported()
    assert case.error(source, 32) < 1e-4
    assert case.error(source, 4) < 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("case", FAMILIES,
                         indirect=True)  # fmt: skip
def test_rounding_costs_no_more_than_in_the_undamaged_model(case: Case, bits: int) -> None:
    most = 1.5 * case.error(case.made.source(case.family), bits)
    for name, source in case.sources.items():
        assert case.error(source, bits) < most, name
