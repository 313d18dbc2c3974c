"""Tiny random models of every family, compressed once per process and shared by the tests that look at the result."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import published, reference
from uniql_jax.compression.pipeline import compress
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert.source import open_source

TWO = {"num_hidden_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    # three query heads per key/value head; one each; every bias, llama3 RoPE, a head size of its own; Q/K/V biases
    "llama-grouped-tied": published.shrink(published.SMOLLM2_135M, **TWO),
    "llama-multihead": published.shrink(published.LLAMA_2_7B, **TWO),
    "llama-biased": published.shrink(published.LLAMA_3_1_8B, attention_bias=True, mlp_bias=True, head_dim=24, **TWO),
    "qwen2": published.shrink(published.QWEN2_5_05B, **TWO),
    # norms of queries and keys, whose heads do not fill the hidden size
    "qwen3": published.shrink(published.QWEN3_06B, **TWO),
    # its second layer does not rotate; a sliding window that no text reaches; four multipliers
    "smollm3": published.shrink(published.SMOLLM3_3B, no_rope_layers=[1, 0], **TWO),
    "mistral": published.shrink(published.MISTRAL_7B, sliding_window=512, **TWO),
    "granite": published.shrink(published.GRANITE_4_1_3B, **TWO),
    # one tensor for queries, keys and values; most of a head rotates, by longrope
    "phi3": published.shrink(published.PHI_4_MINI, **TWO),
    # several groups of B and C; half of a head rotates; attention without positions, plain MLPs
    "mamba2": published.shrink_ssm(published.MAMBA2_8B, **TWO),
    "mamba2-tied-biased": published.shrink_ssm(published.MAMBA2_130M, use_bias=True, **TWO),
    "bamba": published.shrink_ssm(published.BAMBA_9B_V2, num_hidden_layers=2, attn_layer_indices=[1]),
    "granitemoehybrid": published.shrink_ssm(
        published.GRANITE_4_0_H_MICRO, num_hidden_layers=2, layer_types=["mamba", "attention"], mamba_n_groups=2
    ),
    "nemotron_h": published.shrink_ssm(
        published.NEMOTRON_NANO_9B_V2, hybrid_override_pattern="M-*", num_hidden_layers=3
    ),
}
RATES = (0.05, 0.15, 0.25, 0.35)


def tokens(rng: np.random.Generator, batch: int, length: int, vocab: int = 256) -> np.ndarray:
    """Random ids [batch, length]."""
    return rng.integers(3, vocab, (batch, length)).astype(np.int32)


class Made:
    """Sources and checkpoints by family name, built when first asked for; read only."""

    def __init__(self, root: Path, seed: int):
        self.root, self.seed = root, seed
        self.source = functools.cache(self._source)
        self.checkpoint = functools.cache(self._checkpoint)

    def _source(self, family: str) -> Path:
        config = FAMILIES[family]
        model = reference.build(config, self.seed + zlib.crc32(family.encode()))
        return reference.save(model, self.root / f"{family}-hub", config)

    def _checkpoint(self, family: str, options: CompressionSettings) -> Path:
        out = self.root / f"{family}-{zlib.crc32(repr(options).encode()):08x}"
        rng = np.random.default_rng([self.seed, zlib.crc32(family.encode())])
        compress(open_source(self.source(family)), out, tokens(rng, 12, 48), options)
        return out


_made: list[Made] = []


def made(factory: pytest.TempPathFactory, seed: int) -> Made:
    """The one collection of this process."""
    if not _made:
        _made.append(Made(factory.mktemp("compressed"), seed))
    return _made[0]
