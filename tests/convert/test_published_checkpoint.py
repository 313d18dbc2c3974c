"""Checkpoints of the published UniQL implementation, packed here weight by weight after the layout of its kernels."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import published, reference
from tests.convert import common
from uniql_jax.convert.published_checkpoint import embedding, matrix
from uniql_jax.convert.source import open_source
from uniql_jax.errors import CheckpointWarning, UserError

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WIDE = {"hidden_size": 160, "num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 16}
MODELS = {
    "llama": published.shrink(published.LLAMA_3_1_8B, **WIDE, intermediate_size=144, num_hidden_layers=2),
    "qwen2": published.shrink(published.QWEN2_5_7B, **WIDE, intermediate_size=144, num_hidden_layers=2),
    "bamba": published.shrink_ssm(
        published.BAMBA_9B_V2, hidden_size=144, mamba_n_heads=18, num_hidden_layers=2, attn_layer_indices=[1],
        num_attention_heads=9, num_key_value_heads=3, head_dim=16,
    ),
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*is quantized already:uniql_jax.errors.CheckpointWarning")


def packed(rng, value: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A matrix [out, in] rounded to 4 bits in groups of 128 inputs: its tensors, and the numbers that they stand for.

    A tile has 16 inputs and 64 outputs. In each 16 by 16 of it a warp's thread 4 c + t holds outputs c and c + 8 and,
    of each, inputs 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, the words of one thread next to each other.
    """
    out, width = value.shape
    outs, ins = -(-out // 256) * 256, -(-width // 128) * 128
    codes, scale = np.full((ins, outs), 8), np.zeros((ins // 128, outs), np.float16)
    scale[:, :out] = rng.uniform(0.5, 1, (ins // 128, out)) * np.abs(value).max() / 8
    of_input = scale.astype(np.float32)[np.arange(width) // 128, :out]
    codes[:width, :out] = np.clip(np.rint(value.T / of_input) + 8, 0, 15)
    k, n = np.ogrid[:ins, :outs]
    thread, column = 4 * (n % 8) + k % 8 // 2, n % 64 // 16
    weight = 4 * (n % 16 // 8) + 2 * (k % 16 // 8) + k % 2
    shift = 4 * np.argsort(ORDER)[weight]
    words = np.zeros((ins // 16, outs * 2), np.uint32)
    np.bitwise_or.at(words, (k // 16, n // 64 * 128 + 4 * thread + column), (codes << shift).astype(np.uint32))
    stored = np.zeros_like(scale)
    n = np.arange(outs)
    stored[:, n // 64 * 64 + n % 8 * 8 + n % 64 // 8] = scale  # eight by eight, transposed
    dense = (codes[:width, :out] - 8).astype(np.float32) * of_input
    return {"weight": words.view(np.int32), "scale": stored, "workspace": np.zeros(64, np.int32)}, dense.T


def packed_embedding(value: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    scale = (np.abs(value).max(1) / 8).astype(np.float16)
    codes = np.clip(np.rint(value / scale[:, None].astype(np.float32)) + 8, 0, 15).astype(np.uint32)
    words = np.zeros((len(value), value.shape[1] // 8), np.uint32)
    for place in range(value.shape[1]):
        words[:, place // 8] |= codes[:, place] << np.uint32(4 * ORDER.index(place % 8))
    dense = (codes.astype(np.float32) - 8) * scale.astype(np.float32)[:, None]
    return {"weight": words.view(np.int32), "scales": scale}, dense


def as_published(folder, hf, tensors, rng, four_bits=True):
    """The folder, and the dense tensors of the family that it stands for."""
    stored, dense = {}, dict(tensors)
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    rotating = hf["attn_rotary_emb"] if hf["model_type"] == "bamba" else head_dim
    orders: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        stem, _, kind = name.rpartition(".")
        if four_bits and kind == "weight" and value.ndim == 2:
            parts, dense[name] = packed_embedding(value) if "embed_tokens" in name else packed(rng, value)
        else:
            parts = {kind: value}
        attention, _, projection = stem.rpartition(".")
        if projection in ("q_proj", "k_proj"):  # what lies at `order` is what the model has at 0, 1, 2 ...
            if attention not in orders:
                half = [rng.permutation(rotating // 2) for _ in range(hf["num_key_value_heads"])]
                orders[attention] = np.stack([np.concatenate([h, h + rotating // 2]) for h in half])
                stored[f"{attention}.indices"] = orders[attention].astype(np.uint8)
            dense[name] = unsorted(dense[name], orders[attention], head_dim)
        stored |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
    if hf["model_type"] == "qwen2":  # whose value bias went into that of the output
        for name in [name for name in stored if name.endswith("v_proj.bias")]:
            del stored[name], dense[name]
            bias = rng.standard_normal(hf["hidden_size"]).astype(np.float32)
            stored[name.replace("v_proj", "o_proj")] = dense[name.replace("v_proj", "o_proj")] = bias
    layers = range(hf["num_hidden_layers"])
    hf = hf | {"compress_config": {"reduced_head_dim": {str(i): head_dim for i in layers}}}
    return common.write(folder, hf, stored), dense


def unsorted(value: np.ndarray, orders: np.ndarray, head_dim: int) -> np.ndarray:
    heads = value.reshape(-1, head_dim, *value.shape[1:]).copy()
    for i, head in enumerate(value.reshape(heads.shape)):
        for place, was in enumerate(orders[i * len(orders) // len(heads)]):
            heads[i, was] = head[place]
    return heads.reshape(value.shape)


@pytest.mark.parametrize("four_bits", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_familys_model(tmp_path, rng, name, four_bits):
    hf = MODELS[name] | {"tie_word_embeddings": False}
    folder, dense = as_published(tmp_path / "p", hf, common.state_dict(hf, rng), rng, four_bits)
    if four_bits:
        with pytest.raises(UserError, match="--dequantize-source"):
            open_source(folder)
        with pytest.warns(CheckpointWarning, match="w4a16"):
            source = open_source(folder, dequantize=True)
    else:
        source = open_source(folder)
    for tensor, want in dense.items():
        np.testing.assert_allclose(source.reader.read(tensor), want, rtol=1e-6, atol=0, err_msg=tensor)
        assert source.reader.names()[tensor][1] == want.shape
    assert source.config.model_type == ("llama" if name == "qwen2" else name)


def test_transformers_computes_with_the_same_numbers(tmp_path, rng):
    torch = pytest.importorskip("torch")
    hf = MODELS["llama"] | {"tie_word_embeddings": False}
    model = reference.build(hf, 0)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    folder, dense = as_published(tmp_path / "p", hf, tensors, rng)
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in dense.items()})
    tokens = rng.integers(3, 256, (1, 40))
    ours = uniql_jax.load_source(str(folder), jnp.float32, dequantize=True)(jnp.asarray(tokens, jnp.int32))
    assert reference.relative_error(np.asarray(ours), reference.logits(model, tokens)) < 2e-5


def test_what_is_cut_or_damaged_is_refused(tmp_path, rng):
    hf = MODELS["llama"] | {"tie_word_embeddings": False}
    folder, _ = as_published(tmp_path / "p", hf, common.state_dict(hf, rng), rng)
    reader = open_source(folder, dequantize=True).reader._reader
    tensors = {name: reader.read(name) for name in reader.names()}
    cut = hf | {"compress_config": {"reduced_head_dim": {"0": 12, "1": 16}}}
    with pytest.raises(UserError, match="cut already"):
        open_source(common.write(tmp_path / "cut", cut, tensors), dequantize=True)
    whole = hf | {"compress_config": {}}
    for name, change in (
        ("layers.0.mlp.up_proj.scale", lambda value: value[:1]),
        ("layers.0.self_attn.indices", lambda value: np.zeros_like(value)),
    ):
        damaged = tensors | {f"model.{name}": change(tensors[f"model.{name}"])}
        source = open_source(common.write(tmp_path / name, whole, damaged), dequantize=True)
        with pytest.raises(UserError, match="do not fit one another"):
            source.layer(0)


def test_one_matrix_and_one_table(rng):
    value = rng.standard_normal((300, 200)).astype(np.float32)
    parts, dense = packed(rng, value)
    np.testing.assert_array_equal(matrix(parts["weight"], parts["scale"], value.shape), dense)
    parts, dense = packed_embedding(value[:, :64])
    np.testing.assert_array_equal(embedding(parts["weight"], parts["scales"]), dense)
