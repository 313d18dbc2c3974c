"""Tiny random checkpoints, written with safetensors alone, and attention in plain numpy in both layouts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from uniql_jax import config as configs
from uniql_jax import elastic
from uniql_jax.convert import tables
from uniql_jax.files import ShardWriter

HF: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
}
BASE = dict(
    hidden_size=24, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=37,
    num_hidden_layers=2, rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=64, torch_dtype="float32",
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def hf_config(name: str, **changes: Any) -> dict[str, Any]:
    return BASE | HF[name] | changes


def state_dict(hf: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    config = configs.from_hf(hf)
    shapes = tables.expected(config, tables.TABLES[config.model_type])
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, hf: dict[str, Any], tensors: dict[str, np.ndarray], max_shard_bytes: int = 10**9):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    writer = ShardWriter(folder, max_shard_bytes)
    for name, value in tensors.items():
        writer.add(name, value)
    writer.finish()
    return folder


def random_layer(config: configs.ModelConfig, keep: dict[str, int], rng: np.random.Generator, layer: int = 0):
    """Leaves at kept sizes, the RoPE pairs of each key/value head in an order of its own."""
    blocks = {}
    for kind in config.pattern[layer]:
        blocks[kind] = {
            name: rng.standard_normal(elastic.shape(config, leaf, keep)).astype(np.float32)
            for name, leaf in elastic.leaves(config, kind).items()
        }
    frequencies = config.rope.inv_freq()
    orders = [rng.permutation(len(frequencies))[: keep["qk"]] for _ in range(config.kv_heads)]
    blocks["attention"]["inv_freq"] = np.stack([frequencies[order] for order in orders], 1)
    return blocks


def softmax_causal(scores: np.ndarray) -> np.ndarray:
    length = scores.shape[-1]
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def our_attention(config: configs.ModelConfig, leaves: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Causal attention of x [length, embed] on our leaves, float64."""
    leaves = {name: value.astype(np.float64) for name, value in leaves.items()}
    positions = np.arange(len(x))[:, None]
    kv = np.arange(config.heads) // config.query_groups
    out = np.zeros_like(x)
    for head in range(config.heads):
        turned = []
        for side, index in (("q", head), ("k", kv[head])):
            y = np.einsum("te,pje->tpj", x, leaves[side][:, :, index])
            if f"{side}_bias" in leaves:
                y = y + leaves[f"{side}_bias"][:, :, index]
            angle = positions * leaves["inv_freq"][:, kv[head]]
            a, b, cos, sin = y[..., 0], y[..., 1], np.cos(angle), np.sin(angle)
            turned.append(np.stack([a * cos - b * sin, b * cos + a * sin], -1))
        weights = softmax_causal(np.einsum("tpj,spj->ts", *turned) * config.head_dim**-0.5)
        out += weights @ (x @ leaves["v"][:, kv[head]].T) @ leaves["o"][:, head]
    return out + leaves.get("o_bias", 0.0)


def hf_attention(config: configs.ModelConfig, tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The same on HF tensors (names without their prefix), written as HF computes it: rotate_half, repeated KV."""
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
    d, half = config.head_dim, config.head_dim // 2
    angle = np.arange(len(x))[:, None] * np.tile(config.rope.inv_freq().astype(np.float64), 2)

    def linear(name: str, value: np.ndarray) -> np.ndarray:
        return value @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0.0)

    def rope(y: np.ndarray) -> np.ndarray:
        turned = np.concatenate([-y[..., half:], y[..., :half]], -1)
        return y * np.cos(angle)[:, None] + turned * np.sin(angle)[:, None]

    q = rope(linear("q_proj", x).reshape(len(x), config.heads, d))
    k = rope(linear("k_proj", x).reshape(len(x), config.kv_heads, d)).repeat(config.query_groups, 1)
    v = linear("v_proj", x).reshape(len(x), config.kv_heads, d).repeat(config.query_groups, 1)
    weights = softmax_causal(np.einsum("thd,shd->hts", q, k) / np.sqrt(d))
    return linear("o_proj", np.einsum("hts,shd->thd", weights, v).reshape(len(x), -1))


def strip(tensors: dict[str, np.ndarray], layer: int, part: str) -> dict[str, np.ndarray]:
    prefix = f"model.layers.{layer}.{part}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
