"""Export: pruned and sorted leaves scattered into dense HF tensors compute the same; commands write whole folders."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tests import published
from tests.convert import common
from uniql_jax import config as configs
from uniql_jax import elastic
from uniql_jax.commands import export as export_command
from uniql_jax.commands import from_hf as from_hf_command
from uniql_jax.convert import full_size, to_hf
from uniql_jax.convert.source import open_source
from uniql_jax.errors import UserError
from uniql_jax.files import ShardReader
from uniql_jax.weights import protocol
from uniql_jax.weights import quantized as int4

KEPT = [{"qk": 4, "vo": 8, "ffn": 20}, {"qk": 3, "vo": 5, "ffn": 13}, {"qk": 1, "vo": 1, "ffn": 1}]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("name", ["llama", "llama-biased", "llama-mha", "qwen2"])
@pytest.mark.parametrize("keep", KEPT)
def test_scattered_layer_computes_the_pruned_one(rng, name, keep):
    config = configs.from_hf(common.hf_config(name))
    layer = common.random_layer(config, keep, rng)
    attention = layer["attention"]
    if name == "qwen2":  # what a fold gives: a value bias's image
        bias = rng.standard_normal((keep["vo"], config.heads))
        shared = bias[:, :: config.query_groups].repeat(config.query_groups, 1)
        attention["o_bias"] = np.tensordot(shared, attention["o"], 2).astype(np.float32)
    tensors = to_hf.layer_to_hf(config, 0, layer)
    x = rng.standard_normal((11, config.hidden_size))
    ours = common.our_attention(config, attention, x)
    theirs = common.hf_attention(config, common.strip(tensors, 0, "self_attn"), x)
    assert relative(theirs, ours) < 1e-6
    mlp, dense = layer["mlp"], common.strip(tensors, 0, "mlp")
    for leaf, row in (("gate", "gate_proj"), ("up", "up_proj")):
        np.testing.assert_array_equal(dense[f"{row}.weight"][: keep["ffn"]], mlp[leaf])
        assert not dense[f"{row}.weight"][keep["ffn"] :].any()
    np.testing.assert_array_equal(dense["down_proj.weight"].T[: keep["ffn"]], mlp["down"])


def test_a_freed_channel_carries_any_output_bias(rng):
    config = configs.from_hf(common.hf_config("qwen2"))
    layer = common.random_layer(config, KEPT[1], rng)  # o_bias is random: in no value bias's reach
    tensors = to_hf.layer_to_hf(config, 0, layer)
    assert not any("o_proj.bias" in name for name in tensors)
    x = rng.standard_normal((11, config.hidden_size))
    theirs = common.hf_attention(config, common.strip(tensors, 0, "self_attn"), x)
    assert relative(theirs, common.our_attention(config, layer["attention"], x)) < 1e-6


def test_an_output_bias_without_a_place_is_not_lost_silently(rng):
    # fewer value channels than outputs, so that a random o_bias is out of reach
    config = configs.from_hf(common.hf_config("qwen2"))
    layer = common.random_layer(config, KEPT[0], rng)
    with pytest.raises(ValueError, match="o_bias"):
        to_hf.layer_to_hf(config, 0, layer)
    hf, table = to_hf.hf_form(config, common.hf_config("qwen2"), tied=False, o_bias_fits=False, dtype="float32")
    tensors = to_hf.layer_to_hf(config, 0, layer, table)
    x = rng.standard_normal((11, config.hidden_size))
    theirs = common.hf_attention(config, common.strip(tensors, 0, "self_attn"), x)
    assert relative(theirs, common.our_attention(config, layer["attention"], x)) < 1e-6
    again = configs.from_hf(hf)
    assert (again.model_type, again.qkv_bias, again.o_bias, again.mlp_bias) == ("llama", True, True, False)


def test_equal_frequencies_and_foreign_ones(rng):
    config = configs.from_hf(common.hf_config("llama", rope_theta=1.0))  # every pair turns alike
    frequencies = config.rope.inv_freq()
    assert len(set(frequencies.tolist())) == 1
    found = full_size.original_pairs(config, np.stack([frequencies[:3]] * 2, 1))
    assert all(len(set(column)) == 3 for column in found.T)
    config = configs.from_hf(common.hf_config("llama"))
    frequencies = config.rope.inv_freq()
    order = rng.permutation(4)
    np.testing.assert_array_equal(full_size.original_pairs(config, frequencies[order][:, None])[:, 0], order)
    for towards in (0.0, np.inf):  # as another processor rounds
        other = np.nextafter(frequencies, np.float32(towards))[order][:, None]
        np.testing.assert_array_equal(full_size.original_pairs(config, other)[:, 0], order)
    for bad in (np.full((1, 2), 0.123, np.float32), np.full((2, 2), frequencies[0])):
        with pytest.raises(ValueError, match="frequency"):
            full_size.original_pairs(config, bad)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_head_in_is_multiplied_into_the_head(rng, name):
    config = configs.from_hf(common.hf_config(name))
    h, v = config.hidden_size, config.vocab_size
    top = {"embed": rng.standard_normal((v, h)), "norm": rng.standard_normal(h), "head_in": rng.standard_normal((h, h))}
    if not config.tie_embeddings:
        top["head"] = rng.standard_normal((v, h))
    top = {n: a.astype(np.float32) for n, a in top.items()}
    tensors = to_hf.top_to_hf(config, top)
    x = rng.standard_normal((5, h))
    ours = (x @ top["head_in"]) @ top.get("head", top["embed"]).T
    assert relative(x @ tensors["lm_head.weight"].T, ours) < 1e-5
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], top["embed"])


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_leaves_export_as_their_dense_values(rng, bits):
    config = configs.from_hf(common.hf_config("llama", hidden_size=32))
    layer = common.random_layer(config, {"qk": 3, "vo": 4, "ffn": 16}, rng)

    def packed(shape, contract):
        rows, width = (shape[-1], math.prod(shape[:-1])) if contract == "first" else (math.prod(shape[:-1]), shape[-1])
        codes = jnp.asarray(rng.integers(-7, 8, (rows, width)), jnp.int32)
        scale = jnp.asarray(rng.uniform(0.1, 1, (rows, width // 8)), jnp.float32)
        return int4.from_codes(codes, scale, bits=bits, group=8, contract=contract, shape=shape)

    quantized = {
        kind: {
            name: packed(value.shape, contract) if (contract := elastic.BLOCKS[kind][name].contract) else value
            for name, value in block.items()
        }
        for kind, block in layer.items()
    }
    dense = {
        kind: {name: np.asarray(protocol.dense(value)) for name, value in block.items()}
        for kind, block in quantized.items()
    }
    ours, theirs = to_hf.layer_to_hf(config, 0, quantized), to_hf.layer_to_hf(config, 0, dense)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def test_a_weight_too_large_for_float16_is_refused(tmp_path, rng):
    hf = common.hf_config("llama")
    tensors = folder(tmp_path / "hub", hf, rng)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    common.write(tmp_path / "hub", hf, tensors)
    from_hf_command.main([str(tmp_path / "hub"), str(tmp_path / "ours")])
    with pytest.raises(UserError, match=r"up_proj\.weight' does not fit float16"):
        export_command.main([str(tmp_path / "ours"), str(tmp_path / "out"), "--dtype", "float16"])
    assert not (tmp_path / "out").exists()


def folder(path, hf, rng, limit=10**9):
    tensors = common.state_dict(hf, rng)
    common.write(path, hf, tensors, limit)
    (path / "tokenizer.json").write_bytes(b'{"x": 1}\r\n')
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    return tensors


@pytest.mark.parametrize("name", sorted(common.HF))
def test_commands_there_and_back(tmp_path, rng, name, capsys):
    hf = common.hf_config(name)
    tensors = folder(tmp_path / "hub", hf, rng)
    from_hf_command.main([str(tmp_path / "hub"), str(tmp_path / "ours")])
    export_command.main([str(tmp_path / "ours"), str(tmp_path / "back"), "--max-shard-size", "9kB"])
    assert "100.0% of the prunable" in capsys.readouterr().out
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 1
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == hf | {
        "tie_word_embeddings": hf.get("tie_word_embeddings", False)
    }
    for side in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / side).read_bytes() == (tmp_path / "hub" / side).read_bytes()
    reader = ShardReader(tmp_path / "back")
    assert set(reader.names()) == set(tensors)
    for tensor, value in tensors.items():
        if "v_proj.bias" not in tensor and "o_proj.bias" not in tensor:
            np.testing.assert_array_equal(reader.read(tensor), value, err_msg=tensor)
    for made in ("ours", "back"):
        command, read = (from_hf_command, "hub") if made == "ours" else (export_command, "ours")
        with pytest.raises(UserError, match="--overwrite"):
            command.main([str(tmp_path / read), str(tmp_path / made)])
    export_command.main([str(tmp_path / "ours"), str(tmp_path / "back"), "--overwrite", "--dtype", "bfloat16"])
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert {dtype.name for dtype, _ in ShardReader(tmp_path / "back").names().values()} == {"bfloat16"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hub", "ours"]


def test_commands_leave_nothing_behind_on_bad_input(tmp_path, rng):
    hf = common.hf_config("llama")
    tensors = folder(tmp_path / "hub", hf, rng)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    common.write(tmp_path / "hub", hf, tensors)
    with pytest.raises(UserError, match="NaN"):
        from_hf_command.main([str(tmp_path / "hub"), str(tmp_path / "out")])
    with pytest.raises(UserError):
        export_command.main([str(tmp_path / "hub"), str(tmp_path / "out")])
    for rate in ("-0.1", "0.9", "abc"):
        with pytest.raises(UserError, match="prune rate"):
            export_command.main([str(tmp_path / "hub"), str(tmp_path / "out"), "--prune-rate", rate])
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]


def test_stock_transformers_runs_the_export(tmp_path, rng):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name in ("llama", "qwen2"):
        hf = common.hf_config(name) | {"architectures": [f"{name.capitalize()}ForCausalLM"]}
        tensors = folder(tmp_path / name / "hub", hf, rng)
        small = {n: v * (0.3 if v.ndim > 1 else 1.0) for n, v in tensors.items()}
        common.write(tmp_path / name / "hub", hf, small)
        from_hf_command.main([str(tmp_path / name / "hub"), str(tmp_path / name / "ours")])
        export_command.main([str(tmp_path / name / "ours"), str(tmp_path / name / "back")])
        tokens = torch.tensor(rng.integers(0, hf["vocab_size"], (2, 13)))
        logits = []
        for place in ("hub", "back"):
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / place, dtype=torch.float32)
            with torch.no_grad():
                logits.append(model(tokens).logits.numpy())
        assert relative(logits[1], logits[0]) < 2e-5


@pytest.mark.parametrize("name", ["mamba2-8b", "nemotron-h-8b"])
@pytest.mark.parametrize("given", [{"rescale_prenorm_residual": True}, {}])
def test_transformers_does_not_rescale_what_it_loads(tmp_path, rng, name, given):
    transformers = pytest.importorskip("transformers")
    hf = {k: v for k, v in published.shrunk(name).items() if k != "rescale_prenorm_residual"} | given
    tensors = folder(tmp_path / "hub", hf, rng)
    from_hf_command.main([str(tmp_path / "hub"), str(tmp_path / "ours")])
    export_command.main([str(tmp_path / "ours"), str(tmp_path / "back")])
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rescale_prenorm_residual"] is False
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    loaded = {key.replace("model.", "backbone."): value for key, value in loaded.items()}  # files name it backbone
    assert set(loaded) == set(tensors)
    for tensor, value in tensors.items():
        np.testing.assert_array_equal(loaded[tensor].float().numpy(), value, err_msg=tensor)


def test_source_of_an_export_is_a_model_again(tmp_path, rng):
    hf = common.hf_config("qwen2-tied")
    folder(tmp_path / "hub", hf, rng, limit=4000)
    from_hf_command.main([str(tmp_path / "hub"), str(tmp_path / "ours")])
    export_command.main([str(tmp_path / "ours"), str(tmp_path / "back")])
    a, b = open_source(tmp_path / "hub"), open_source(tmp_path / "back")
    for i in range(2):
        for kind, leaves in a.layer(i).items():
            for leaf, value in leaves.items():
                assert relative(b.layer(i)[kind][leaf], value) < 1e-5
