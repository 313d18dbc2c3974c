"""Logits are made in pieces: 8,192 tokens at a vocabulary of 131,072 fit everywhere, by the compiler's own count.

Programs are compiled from shapes; none runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from uniql_jax import elastic
from uniql_jax.compression.sorting import loss_gradient
from uniql_jax.config import ModelConfig
from uniql_jax.evaluation.likelihood import rows_at_once, token_nll
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.plan import make_plan
from uniql_jax.runtime import reading
from uniql_jax.train.losses import LOGITS, head_losses

VOCABULARY, WINDOW = 131072, 8192
WHOLE = 4 * VOCABULARY * WINDOW
"""Bytes of all logits of a window, in float32: 4 GiB."""


def model() -> CausalLM:
    """One small layer below a large vocabulary, of shapes."""
    cfg: ModelConfig = tiny.config(
        vocab_size=VOCABULARY, max_position_embeddings=2 * WINDOW, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip

    def leaf(row: elastic.Leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(elastic.shape(cfg, row), jnp.float32)

    layers = [
        {kind: {name: leaf(row) for name, row in elastic.leaves(cfg, kind).items()} for kind in kinds}
        for kinds in cfg.pattern
    ]
    top = {name: leaf(elastic.TOP[name]) for name in ("embed", "norm")}
    return CausalLM(cfg, top | {"layers": layers}, make_plan(cfg, None))


def tokens() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, WINDOW), jnp.int32)


def stream(one: CausalLM) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, WINDOW, one.config.hidden_size), jnp.float32)


def calibration() -> Any:
    one = model()
    return loss_gradient.lower(dict(one.params), stream(one), tokens(), eps=1e-5)


def perplexity() -> Any:
    return token_nll.lower(model(), tokens(), rows=rows_at_once(VOCABULARY, WINDOW - 1))


def training() -> Any:
    one = model()
    top = {name: one.params[name] for name in ("embed", "norm")}
    weights = jax.ShapeDtypeStruct((1, WINDOW), jnp.float32)

    def loss(x: Any, top: Any, tokens: Any, weights: Any, teacher: Any) -> Any:
        return head_losses(top, 1e-5, x, tokens, weights, teacher, 0.5)[0]

    assert 4 * WHOLE > 6 * 4 * LOGITS, "four arrays of all logits would not pass"
    return jax.jit(jax.grad(loss)).lower(stream(one), top, tokens(), weights, stream(one))


def prompt() -> Any:
    return reading._first.lower(model(), tokens(), None, None, slots=WINDOW + 16, bits=16)


@pytest.mark.parametrize(
    ("lower", "most"),
    # training holds a piece and what is computed of it, of the model and of its teacher
    [(calibration, WHOLE // 2), (perplexity, WHOLE // 2), (prompt, WHOLE // 2), (training, 6 * 4 * LOGITS)],
)
def test_logits_exist_in_pieces(lower: Callable[[], Any], most: int) -> None:
    assert lower().compile().memory_analysis().temp_size_in_bytes < most
