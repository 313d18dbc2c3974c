"""Checkpoints that earlier versions wrote load, and compute what stock transformers computed with their exports."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from uniql_jax.checkpoint import open_checkpoint

ROOT = Path(__file__).parent / "golden"
_forward = jax.jit(lambda model, tokens: model(tokens))
FAMILIES = sorted(path.name for path in ROOT.iterdir() if path.is_dir())


def test_every_family_and_every_way_of_storing_is_there() -> None:
    opened = [open_checkpoint(ROOT / family) for family in FAMILIES]
    assert {c.config.model_type for c in opened} == {"llama", "qwen2", "mamba2", "bamba", "nemotron_h"}
    assert {c.bits for c in opened} == {4, 8, 16}
    for family in FAMILIES:
        assert sum(path.stat().st_size for path in (ROOT / family).iterdir()) < 300_000


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_checkpoint(family: str) -> None:
    golden = np.load(ROOT / family / "golden.npz")
    checkpoint = open_checkpoint(ROOT / family)
    for i, rate in enumerate(golden["rates"].tolist()):
        assert checkpoint.weight_bytes(rate) == golden["weight_bytes"][i]
        model = uniql_jax.load(ROOT / family, rate)
        expected = golden["logits"][i]
        difference = np.abs(np.asarray(_forward(model, jnp.asarray(golden["tokens"]))) - expected).max()
        assert difference < 2e-5 * expected.std()
    assert not np.allclose(golden["logits"][0], golden["logits"][1], atol=1e-2)  # the rates differ
