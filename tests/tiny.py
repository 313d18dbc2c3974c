"""A tiny random llama with a plan, in memory or as an elastic checkpoint with a tokenizer.

No torch here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.checkpoint_writer import CheckpointWriter
from uniql_jax.evaluation.random_model import SPREAD, weight_shapes
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.plan import grouping, make_plan
from uniql_jax.weights.quantized import QuantizedArray

VOCAB = 320
LINES = (
    "The people of the United States have kept the peace at home and abroad.",
    "Once there was a naïve café owner who sold crêpes — and coffee ☕ — to everyone.",
    "def forward(tokens): return model(tokens)  # 日本語 и русский 🙂🙃",
)
HF: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def config(**changes: Any) -> model_config.ModelConfig:
    """Its config."""
    return model_config.from_hf(HF | changes)


def params(cfg: model_config.ModelConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Random float32 leaves; frequencies as RoPE has them."""

    def draw(leaf: elastic.Leaf, name: str) -> np.ndarray:
        shape = elastic.shape(cfg, leaf)
        if name == "inv_freq":
            assert cfg.rope is not None
            return np.repeat(cfg.rope.inv_freq()[:, None], shape[1], 1)
        if name == "norm":
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return (rng.standard_normal(shape) * 2 / cfg.hidden_size**0.5).astype(np.float32)

    layers = [
        {kind: {n: draw(leaf, n) for n, leaf in elastic.leaves(cfg, kind).items()} for kind in kinds}
        for kinds in cfg.pattern
    ]
    return {"layers": layers, "embed": draw(elastic.TOP["embed"], "embed"), "norm": draw(elastic.TOP["norm"], "norm")}


def model(rng: np.random.Generator, **changes: Any) -> CausalLM:
    """The model in memory, float32; `changes` replace entries of its config.json."""
    cfg = config(**changes)
    tree = params(cfg, rng)
    placed = {
        "layers": [
            {k: {n: jnp.asarray(v) for n, v in b.items()} for k, b in layer.items()} for layer in tree["layers"]
        ],
        "embed": jnp.asarray(tree["embed"]),
        "norm": jnp.asarray(tree["norm"]),
    }
    return CausalLM(cfg, placed, make_plan(cfg, None))


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text survives it, and most characters beyond ASCII take several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def packed(folder: Path, hf: dict[str, Any], bits: int, rng: np.random.Generator) -> Path:
    """An elastic checkpoint at `folder` of random weights of any config.json, in 4, 8 or 16 bits; no tokenizer."""
    cfg = model_config.from_hf(hf)
    plan = make_plan(cfg, None)

    def draw(name: str, like: Any, layer: int) -> np.ndarray:
        if name == "inv_freq":
            return np.repeat(cfg.inv_freq(layer)[:, None], like.shape[1], 1)
        if np.issubdtype(like.dtype, np.integer):
            info = np.iinfo(like.dtype)
            return rng.integers(info.min, info.max, like.shape, like.dtype, endpoint=True)
        center = 1.0 if name.endswith("norm") else 0.0
        value = (center + 0.1 * rng.standard_normal(like.shape)).astype(like.dtype)
        if name in ("q_norm", "k_norm"):  # which all heads share
            value[...] = value[..., :1]
        return value

    def leaf(name: str, like: Any, layer: int = 0) -> Any:
        if not isinstance(like, QuantizedArray):
            return draw(name, like, layer)
        scale = rng.uniform(0.5, 1.5, like.scale.shape) / (SPREAD[bits] * like.width**0.5)
        return dataclasses.replace(like, data=draw(name, like.data, layer), scale=scale.astype(like.scale.dtype))

    shapes = weight_shapes(cfg, bits, 0.0, plan, jnp.bfloat16)
    layers = shapes.pop("layers")
    folder.mkdir()
    writer = CheckpointWriter(
        folder, hf, {"bits": bits, "groups": dict(grouping(cfg)["groups"]), "plan": plan.to_json()}
    )
    writer.add_top({name: leaf(name, like) for name, like in shapes.items()})
    for i, layer in enumerate(layers):
        leaves = {kind: {n: leaf(n, like, i) for n, like in block.items()} for kind, block in layer.items()}
        writer.add_layer(i, leaves)
    writer.finish()
    return folder


def checkpoint(folder: Path, rng: np.random.Generator, with_tokenizer: bool = True) -> Path:
    """The model as a float32 elastic checkpoint at `folder`, with tokenizer and chat template if wanted."""
    folder.mkdir()
    cfg = config()
    tree = params(cfg, rng)
    meta = {"bits": 32, "groups": {}, "plan": make_plan(cfg, None).to_json()}
    writer = CheckpointWriter(folder, HF, meta)
    writer.add_top({"embed": tree["embed"], "norm": tree["norm"]})
    for i, layer in enumerate(tree["layers"]):
        writer.add_layer(i, layer)
    writer.finish()
    if with_tokenizer:
        saved = tokenizer()
        saved.chat_template = CHAT_TEMPLATE
        saved.save_pretrained(folder)
    return folder
