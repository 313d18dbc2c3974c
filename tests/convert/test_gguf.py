"""GGUF in: a tiny file written here, the RoPE factors of Llama 3, a tokenizer without torch, and the demo model."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from tests.convert import common, gguf_models
from uniql_jax import config as configs
from uniql_jax import elastic
from uniql_jax.convert import locate, tables
from uniql_jax.convert.source import open_source
from uniql_jax.errors import UserError

gguf = pytest.importorskip("gguf")

has_demo = pytest.mark.skipif(
    importlib.util.find_spec(locate.DEMO_PACKAGE) is None, reason=f"needs {locate.DEMO_PACKAGE}"
)
PIECES = ["<|end|>", *(chr(c) for c in range(48, 76)), "x", "t", "h", "e", "Ġ", "th", "the", "Ġthe"]  # vocab_size


def write(path, hf, tensors, arch=None, extra=None, quantized=False, vocabulary=False):
    arch = arch or hf["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_key_length(hf["head_dim"])
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(PIECES)
        writer.add_token_types([3] + [1] * (len(PIECES) - 1))
        writer.add_token_merges(["t h", "th e", "Ġ the"])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages }}")
    for name, tensor in tensors.items():
        for theirs, value in gguf_models.converted(hf, name, tensor).items():
            if quantized and value.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(theirs, gguf.quants.quantize(value, kind), raw_dtype=kind)
            else:
                writer.add_tensor(theirs, value)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def leaves_of(opened):
    out = dict(opened.top())
    for i, kinds in enumerate(opened.config.pattern):
        layer = opened.layer(i)
        out |= {f"{i}.{kind}.{name}": value for kind in kinds for name, value in layer[kind].items()}
    return out


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biased", "llama-mha", "qwen2", "qwen2-tied"])
def test_a_gguf_holds_the_same_model(tmp_path, rng, name):
    hf = common.hf_config(name)
    tensors = common.state_dict(hf, rng)
    ours = leaves_of(open_source(common.write(tmp_path / "m", hf, tensors)))
    opened = open_source(write(tmp_path / "m.gguf", hf, tensors))
    assert opened.reader.bytes_read == 0
    theirs = leaves_of(opened)
    assert set(ours) == set(theirs)
    for leaf in ours:
        np.testing.assert_array_equal(theirs[leaf], ours[leaf], err_msg=leaf)
    assert opened.config == configs.from_hf(hf)


def test_quantized_tensors_are_close(tmp_path, rng):
    hf = common.hf_config("llama", hidden_size=32, intermediate_size=64)
    tensors = common.state_dict(hf, rng)
    ours = leaves_of(open_source(common.write(tmp_path / "m", hf, tensors)))
    theirs = leaves_of(open_source(write(tmp_path / "m.gguf", hf, tensors, quantized=True)))
    for leaf in ours:
        assert np.abs(theirs[leaf] - ours[leaf]).max() <= 0.6 * np.abs(ours[leaf]).max() / 127 + 1e-7, leaf


def test_llama3_factors_become_a_config(tmp_path, rng):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    hf = common.hf_config("llama", rope_theta=500000.0)
    tensors = common.state_dict(hf, rng)
    plain = configs.from_hf(hf).rope.inv_freq()
    scaled = configs.from_hf(hf | {"rope_scaling": scaling}).rope
    factors = (plain / scaled.inv_freq()).astype(np.float32)
    assert factors.max() == 8
    opened = open_source(write(tmp_path / "a.gguf", hf, tensors, extra={"rope_freqs.weight": factors}))
    assert opened.config.rope == scaled
    ones = {"rope_freqs.weight": np.ones_like(factors)}
    np.testing.assert_array_equal(
        open_source(write(tmp_path / "b.gguf", hf, tensors, extra=ones)).config.rope.inv_freq(), plain
    )
    odd = {"rope_freqs.weight": factors + rng.uniform(0.1, 1, factors.shape).astype(np.float32)}
    with pytest.raises(UserError, match="rope_freqs"):
        open_source(write(tmp_path / "c.gguf", hf, tensors, extra=odd))


def test_bad_files_are_one_line(tmp_path, rng):
    hf = common.hf_config("llama")
    tensors = common.state_dict(hf, rng)
    good = write(tmp_path / "good.gguf", hf, tensors).read_bytes()
    cases = {"cut.gguf": good[:-50], "head.gguf": good[:200], "other.gguf": b"hello world, no model", "empty.gguf": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is truncated or no GGUF") as error:
            open_source(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown tensor 'odd'"):
        open_source(write(tmp_path / "a.gguf", hf, tensors, extra={"odd": np.zeros(3, np.float32)}))
    del tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"'blk\.0\.ffn_up\.weight' is missing"):
        open_source(write(tmp_path / "b.gguf", hf, tensors))
    with pytest.raises(UserError, match="architecture 'gemma'; we read llama, qwen2"):
        open_source(write(tmp_path / "c.gguf", hf, tensors, arch="gemma"))


def test_tokenizer_files(tmp_path, rng):
    transformers = pytest.importorskip("transformers")
    hf = common.hf_config("llama")
    opened = open_source(write(tmp_path / "m.gguf", hf, common.state_dict(hf, rng), vocabulary=True))
    out = tmp_path / "out"
    out.mkdir()
    opened.write_side_files(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("the the0<|end|>12").input_ids
    assert ids == [PIECES.index(piece) for piece in ("the", "Ġthe", "0", "<|end|>", "1", "2")]
    assert tokenizer.decode(ids) == "the the0<|end|>12"
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.chat_template == "{{ messages }}"
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 0}


@has_demo
def test_demo_model_opens():
    opened = open_source("demo")
    config = opened.config
    assert (config.hidden_size, len(config.pattern), config.heads, config.kv_heads) == (576, 30, 9, 3)
    assert config.tie_embeddings
    layer = opened.layer(29)
    for kind, leaves in layer.items():
        for name, leaf in elastic.leaves(config, kind).items():
            assert leaves[name].shape == elastic.shape(config, leaf)
    top = opened.top()
    assert {n: a.shape for n, a in top.items()} == {"embed": (49152, 576), "norm": (576,)}


@has_demo
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_demo_equals_what_transformers_reads(tmp_path, rng):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    opened, file = open_source("demo"), locate.demo_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    theirs = model.state_dict()
    for i in (0, 17):
        layer = opened.layer(i)
        for kind in opened.config.pattern[i]:
            for row in tables.rows_of(opened.config, tables.LLAMA, kind):
                ours = tables.from_leaves(opened.config, row, layer[kind])
                np.testing.assert_array_equal(ours, theirs[row.name.format(layer=i)].numpy(), err_msg=row.name)
    np.testing.assert_array_equal(opened.top()["embed"], theirs["model.embed_tokens.weight"].numpy())
    opened.write_side_files(tmp_path)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "Hello  world 1234\n\n\tit's <|im_start|>user\nhé 你好 🎉 x=1;  // ok\r\n" + "".join(
        chr(c) for c in rng.integers(32, 0x2FFF, 2000)
    )
    assert ours(text).input_ids == reference(text).input_ids
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat, tokenize=False) == reference.apply_chat_template(chat, tokenize=False)
