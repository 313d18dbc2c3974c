"""Decoding by fused kernels is decoding: logits and caches, token after token, for every kind of block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import published
from uniql_jax import config as model_config
from uniql_jax.evaluation.random_model import random_model
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import decode, init_cache, prefill
from uniql_jax.model.layers import fused
from uniql_jax.weights.quantized import QuantizedArray

SIZES: dict[str, dict[str, Any]] = {
    "llama": dict(hidden_size=256, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=64),
    # biases, and groups of 112 in o: 7 heads
    "qwen2": dict(hidden_size=256, intermediate_size=256, num_attention_heads=7, num_key_value_heads=1, head_dim=32),
    "qwen3": dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
    # scales, and an epsilon of its own for the gated norm
    "granitemoehybrid": dict(
        hidden_size=256,
        layer_types=["mamba", "attention"],
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_expand=1,
        mamba_n_heads=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        shared_intermediate_size=256,
    ),
    # most of a head rotates
    "phi3": dict(
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_scaling={"type": "longrope", "short_factor": [1.5] * 24, "long_factor": [2.0] * 24},
    ),
    "mamba2": dict(hidden_size=256, expand=1, num_heads=8, head_dim=32, state_size=32, n_groups=2),
    "bamba": dict(
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        mamba_expand=1,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_n_groups=1,
        attn_layer_indices=[1],
    ),
    "nemotron_h": dict(
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=40,  # as in Nemotron Nano v2 no power of two
        ssm_state_size=32,
        n_groups=2,
        hybrid_override_pattern="M*-",
    ),
}
BASE = {
    "llama": published.LLAMA_3_1_8B,
    "qwen2": published.QWEN2_5_7B,
    "qwen3": published.QWEN3_8B,
    "granitemoehybrid": published.GRANITE_4_0_H_MICRO,
    "phi3": published.PHI_4_MINI,
    "mamba2": published.MAMBA2_8B,
    "bamba": published.BAMBA_9B_V2,
    "nemotron_h": published.NEMOTRON_NANO_9B_V2,
}


def model_of(family: str, rate: float, tiles: bool) -> CausalLM:
    """A small model of 4-bit random weights in bfloat16, held as tiles where they fit if asked."""
    layers = 3 if family == "nemotron_h" else 2
    hf = dict(BASE[family]) | SIZES[family] | dict(num_hidden_layers=layers, vocab_size=200)
    model = random_model(model_config.from_hf(hf), 4, rate, dtype=jnp.bfloat16)
    if tiles:
        layouts = {"last": "rows", "first": "groups"}

        def tiled(leaf: Any) -> Any:
            if isinstance(leaf, QuantizedArray) and leaf.group == 128:
                return leaf.in_layout(layouts[leaf.contract])
            return leaf

        for layer in model.params["layers"]:
            for block in layer.values():
                block.update({name: tiled(leaf) for name, leaf in block.items()})
    return model


def run(model: CausalLM, batch: int) -> tuple[np.ndarray, Any]:
    """Logits after each of three decoded tokens, and the cache."""
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 200, (batch, 6)), jnp.int32)
    mask = jnp.asarray(np.arange(6) >= np.arange(batch)[:, None] % 3, jnp.int32)
    # functions of their own are traced anew
    _, cache = jax.jit(lambda *arguments: prefill(*arguments))(model, tokens, mask, init_cache(model, batch, 12))
    step = jax.jit(lambda *arguments: decode(*arguments))
    found = []
    for token in rng.integers(0, 200, (3, batch)):
        logits, cache = step(model, jnp.asarray(token, jnp.int32), cache)
        found.append(np.asarray(logits))
    return np.stack(found), cache


def distance(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


MORE = [pytest.param(0.0, 1, True, marks=pytest.mark.slow), pytest.param(0.25, 1, False, marks=pytest.mark.slow)]


OFTEN = ("mamba2",)


@pytest.mark.parametrize(
    "family", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
)
@pytest.mark.parametrize(("rate", "batch", "tiles"), [(0.25, 3, True), *MORE])
def test_fused_decode_is_decode(
    family: str, rate: float, batch: int, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family, rate, tiles)
    want, its = run(model, batch)
    calls: list[str] = []
    for kind, function in fused.KINDS.items():

        def counted(*args: Any, kind: str = kind, function: Any = function) -> Any:
            out = function(*args)
            calls.append(kind)
            return out

        monkeypatch.setitem(fused.KINDS, kind, counted)
    monkeypatch.setattr(fused, "wanted", lambda: True)
    got, mine = run(model, batch)
    assert len(calls) == sum(map(len, model.config.pattern)), "every block went the short way, in one trace"
    # bf16 rounds at other places
    assert distance(got, want) < 0.03
    assert (got.argmax(-1) == want.argmax(-1)).mean() > 0.7
    for ours, theirs in zip(jax.tree.leaves(mine.layers), jax.tree.leaves(its.layers), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert distance(ours, theirs) < 0.03
    np.testing.assert_array_equal(mine.start, its.start)
    assert int(mine.slot) == int(its.slot)


@pytest.mark.slow
def test_other_weights_go_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense leaves in one block of two; the other is fused, from weights in plain layout."""
    model = model_of("llama", 0.0, False)
    for layer in model.params["layers"]:
        layer["mlp"] = {
            k: v.dense(jnp.bfloat16) if isinstance(v, QuantizedArray) else v for k, v in layer["mlp"].items()
        }
    want, _ = run(model, 2)
    monkeypatch.setattr(fused, "wanted", lambda: True)
    got, _ = run(model, 2)
    assert distance(got, want) < 0.03
