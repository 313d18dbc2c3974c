"""Compressed models with a tokenizer, as the tests of export formats need them."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import compressed, published, reference, tiny
from uniql_jax.compression.pipeline import compress
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert.exporting import Request
from uniql_jax.convert.formats import export_as
from uniql_jax.convert.source import open_source
from uniql_jax.tokenizer import load_tokenizer

HEADS_OF_64 = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64}
SMALL = {"num_hidden_layers": 2, "vocab_size": tiny.VOCAB, "bos_token_id": 0, "eos_token_id": 1}
SSM = SMALL | {"hidden_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    # groups of 144 along the stream, one table for embedding and head
    "tied": published.shrink(published.SMOLLM2_135M, **SMALL),
    # every bias, llama3 RoPE, a head size of its own
    "biased": published.shrink(published.LLAMA_3_1_8B, attention_bias=True, mlp_bias=True, head_dim=24, **SMALL),
    # more rows than tokens
    "qwen2": published.shrink(published.QWEN2_5_05B, **SMALL | {"vocab_size": tiny.VOCAB + 8}),
    # norms of heads
    "qwen3": published.shrink(published.QWEN3_06B, **SMALL),
    "mistral": published.shrink(published.MISTRAL_7B, **SMALL),
    "smollm3": published.shrink(published.SMOLLM3_3B, no_rope_layers=[0, 1], **SMALL),
    # scales of the embedding and the logits, in one table and in two
    "granite": published.shrink(published.GRANITE_4_1_3B, **SMALL),
    "granite-untied": published.shrink(published.GRANITE_4_1_3B, tie_word_embeddings=False, **SMALL),
    # most of a head rotates
    "phi3": published.shrink(published.PHI_4_MINI, **SMALL),
    # every fourth layer does not rotate, which is what llama.cpp knows of it
    "smollm3-four": published.shrink(
        published.SMOLLM3_3B, no_rope_layers=[1, 1, 1, 0], **SMALL | {"num_hidden_layers": 4}
    ),
    "mamba2": published.shrink_ssm(published.MAMBA2_8B, **SSM),
    "bamba": published.shrink_ssm(published.BAMBA_9B_V2, attn_layer_indices=[1], **SSM),
    "granitehybrid": published.shrink_ssm(
        published.GRANITE_4_0_H_MICRO, layer_types=["mamba", "attention"], mamba_n_groups=2, **SSM
    ),
    "nemotron_h": published.shrink_ssm(
        published.NEMOTRON_NANO_9B_V2,
        hybrid_override_pattern="M-*-",
        time_step_min=1e-12,
        **SSM | {"num_hidden_layers": 4},
    ),
    # groups inside the heads of SSM blocks
    "portable-ssm": published.shrink_ssm(published.MAMBA2_8B, head_dim=32, num_heads=4, **SSM),
    # heads of 64 and a stream of 96, so that groups lie inside heads and no dimension is padded
    "portable": published.shrink(published.SMOLLM2_135M, **HEADS_OF_64, **SMALL),
    "untied": published.shrink(published.SMOLLM2_135M, **HEADS_OF_64, **SMALL, tie_word_embeddings=False),
}


PORTABLE = ("portable", "untied", "portable-ssm")
"""Compressed for real, with portable groups; the others have random integers, which leave in the same way."""


class Made:
    """Checkpoints by name of the model and bits, built when first asked for; read only."""

    def __init__(self, root: Path, seed: int):
        self.root, self.seed = root, seed
        self.checkpoint = functools.cache(self._checkpoint)

    def _checkpoint(self, name: str, bits: int = 4) -> Path:
        out, hf = self.root / f"{name}-{bits}", MODELS[name]
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        if name not in PORTABLE:
            tiny.packed(out, hf, bits, rng)
            tiny.tokenizer().save_pretrained(out)
            return out
        source = reference.save(reference.build(hf, self.seed), self.root / f"{name}-hub", hf)
        tiny.tokenizer().save_pretrained(source)
        settings = CompressionSettings(bits=bits, groups="portable", rounding="nearest", scale_search=False)
        compress(open_source(source), out, compressed.tokens(rng, 4, 48), settings)
        return out


_made: list[Made] = []


def made(factory: pytest.TempPathFactory, seed: int) -> Made:
    """The one collection of this process."""
    if not _made:
        _made.append(Made(factory.mktemp("exports"), seed))
    return _made[0]


def export(checkpoint: Path, out: Path, rate: float, kind: str, **options: Any) -> list[str]:
    """Export without a process of its own; the lines that it says."""
    said: list[str] = []
    export_as(kind, Request(checkpoint, out, rate, load_tokenizer=load_tokenizer, say=said.append, **options))
    return said


def our_logits(checkpoint: Path, rate: float, tokens: np.ndarray) -> np.ndarray:
    """Our float32 logits of one sequence, [length, vocab]."""
    model = uniql_jax.load(checkpoint, prune_rate=rate, dtype=jnp.float32)
    return np.asarray(model(jnp.asarray(tokens[None], jnp.int32)), np.float32)[0]
