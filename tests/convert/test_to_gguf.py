"""GGUF export: what the gguf package reads is, number for number, the dense export that transformers is tested with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.convert import common, exports, test_gguf
from uniql_jax import config as configs
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.commands import export as export_command
from uniql_jax.convert import gguf_architecture, gguf_head
from uniql_jax.convert.from_hf import convert
from uniql_jax.convert.integers import Blocks
from uniql_jax.convert.source import open_source
from uniql_jax.convert.to_hf import export as dense_export
from uniql_jax.errors import UserError
from uniql_jax.files import ShardReader

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "mlp.down_proj.bias": "ffn_down.bias",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, seed):
    return exports.made(tmp_path_factory, seed)


def content(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str], dict]:
    """Values (float32), types and metadata of a GGUF file, as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    values = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    return values, types, {name: field.contents() for name, field in reader.fields.items()}


def spread(width: int, group: int) -> list[int]:
    """Where entries go when every group starts a new block of 32."""
    places, at = [], 0
    for start in range(0, width, group):
        count = min(group, width - start)
        places += range(at, at + count)
        at += -(-count // 32) * 32
    return places


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K as llama.cpp rotates them: j and j + d / 2 next to each other."""
    d = len(rows) // heads
    order = [head * d + half * d // 2 + j for head in range(heads) for j in range(d // 2) for half in (0, 1)]
    return rows[order]


@pytest.mark.parametrize("rate", [0.0, 0.35])
@pytest.mark.parametrize(
    ("name", "bits"),
    [("tied", 4), ("biased", 4), ("biased", 8), ("qwen2", 4), ("qwen3", 4), ("portable", 4), ("portable", 8)],
)
def test_every_number_is_that_of_the_dense_export(made, tmp_path, name, bits, rate):
    checkpoint = made.checkpoint(name, bits)
    exports.export(checkpoint, tmp_path / "m.gguf", rate, "gguf", dense_head=rate > 0)
    dense_export(checkpoint, tmp_path / "dense", rate, dtype="float32")
    values, types, fields = content(tmp_path / "m.gguf")
    hf, reader = exports.MODELS[name], ShardReader(tmp_path / "dense")
    groups = json.loads((checkpoint / "config.json").read_text())["uniql"]["groups"]
    columns = spread(hf["hidden_size"], groups["embed"])
    width = len(values["blk.0.attn_norm.weight"])
    assert width == fields[f"{fields['general.architecture']}.embedding_length"]
    gain = np.float32(np.sqrt(hf["hidden_size"] / width))
    packed = "Q4_0" if bits == 4 else "Q8_0"
    for layer in range(2):
        for theirs, ours in NAMES.items():
            tensor = f"model.layers.{layer}.{theirs}"
            if tensor not in reader.names():
                continue
            want, got = reader.read(tensor), values[f"blk.{layer}.{ours}"]
            kind = types[f"blk.{layer}.{ours}"]
            if ours in ("attn_q.weight", "attn_k.weight", "attn_q.bias") and name != "qwen3":
                heads = hf["num_attention_heads" if "_q" in ours else "num_key_value_heads"]
                want = interleaved(want, heads)
            if "_norm" in theirs:
                np.testing.assert_array_equal(got, want)
            elif "norm" in ours:
                np.testing.assert_allclose(got[columns], want * gain, rtol=1e-6)
            elif "ffn" in ours and "weight" in ours:
                want, got = (want.T, got.T) if "down" in ours else (want, got)
                kept = int(want.any(1).sum())
                rows = spread(kept, groups["ffn"])
                np.testing.assert_array_equal(got[np.ix_(rows, columns)], want[:kept])
                assert np.abs(got).sum(dtype=np.float64) == np.abs(want).sum(dtype=np.float64)
                assert kind == packed
            elif "attn_output" in ours:
                if name == "qwen2" and rate:  # the dense export may keep the output bias in a free column
                    free = np.flatnonzero((want != got[columns]).any(0))
                    want[:, free] = 0
                np.testing.assert_array_equal(got[columns], want)
                assert kind == (packed if name == "portable" else "F16" if bits == 4 else "F32")
            elif want.ndim == 2:
                np.testing.assert_array_equal(got[:, columns], want)
                assert not np.delete(got, columns, 1).any()
                assert kind == packed
            elif "q" in ours:
                np.testing.assert_array_equal(got, want)
            else:
                np.testing.assert_array_equal(got[columns], want)
    np.testing.assert_array_equal(values["token_embd.weight"][:, columns], reader.read("model.embed_tokens.weight"))
    head = reader.read("lm_head.weight")
    if rate == 0 and hf["tie_word_embeddings"] and name != "qwen3":  # whose llama.cpp form has no layer before the head
        assert "output.weight" not in values
        return
    np.testing.assert_allclose(values["output.weight"][:, columns], head, rtol=2**-11, atol=2**-24)
    if not hf["tie_word_embeddings"]:
        assert types["output.weight"] == packed
    assert all(kind == "F32" for tensor, kind in types.items() if values[tensor].ndim == 1)


@pytest.mark.parametrize(("width", "group"), [(576, 144), (576, 96), (576, 72), (100, 32), (40, 40), (24, 24), (33, 8)])
def test_blocks_never_span_two_groups_or_say_so(rng, width, group):
    blocks, values = Blocks(width, group), rng.standard_normal((3, width, 2))
    padded = blocks.pad(values, 1)
    assert padded.shape[1] == blocks.total
    if not blocks.exact:
        assert blocks.total == width
        return
    places = spread(width, group)
    np.testing.assert_array_equal(padded[:, places], values)
    assert not np.delete(padded, places, 1).any()
    scale = rng.standard_normal(-(-width // group))
    of_block = np.full(blocks.total // 32, np.nan)
    for entry, place in enumerate(places):
        assert of_block[place // 32] in (scale[entry // group],) or np.isnan(of_block[place // 32])
        of_block[place // 32] = scale[entry // group]
    np.testing.assert_array_equal(blocks.per_block(scale, 0), of_block)


@pytest.mark.parametrize(("width", "group"), [(144, 144), (128, 64)])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
def test_a_layer_before_the_head_undoes_the_rotation(rng, width, group, size):
    blocks, norm = Blocks(width, group, spare=True), rng.uniform(0.5, 2, width).astype(np.float32)
    head_in = rng.standard_normal((width, width)).astype(np.float32) / np.sqrt(width, dtype=np.float32)
    made = gguf_head.layer(7, norm, head_in, blocks)
    x = (size * rng.standard_normal((20, width))).astype(np.float32)

    def rms(values):  # epsilon as the file has it
        return values / np.sqrt(np.mean(values**2, -1, keepdims=True) + np.float32(1e-5 * width / values.shape[-1]))

    want = (rms(x) * norm) @ head_in
    stream = blocks.pad(x, 1)
    stream = stream + (rms(stream) * made["blk.7.attn_norm.weight"]) @ made["blk.7.attn_output.weight"].T
    stream = stream + made["blk.7.ffn_down.bias"]
    got = rms(stream) * made["output_norm.weight"]
    places = spread(width, group)
    np.testing.assert_allclose(got[:, places], want, rtol=0, atol=2e-5 * np.abs(want).max())
    assert not np.delete(got, places, 1).any()
    assert got.dtype == np.float32


def test_a_scale_beyond_float16_leaves_wider(made, tmp_path):
    checkpoint = tmp_path / "ours"
    checkpoint.mkdir()
    for file in made.checkpoint("biased", 4).iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    from safetensors.numpy import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    scale = weights["layers.1.attention.v.scale"].copy()
    scale[0, 0, 0] = 2.0**-30
    weights["layers.1.attention.v.scale"] = scale
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    said = exports.export(checkpoint, tmp_path / "m.gguf", 0.0, "gguf")
    _, types, _ = content(tmp_path / "m.gguf")
    assert (types["blk.0.attn_v.weight"], types["blk.1.attn_v.weight"]) == ("Q4_0", "F32")
    assert any("beyond float16" in line for line in said[1].splitlines())


def test_the_table_says_what_is_written(made, tmp_path, capsys):
    arguments = [str(made.checkpoint("tied", 4)), str(tmp_path / "m.gguf"), "--format", "gguf", "--dense-head"]
    export_command.main(arguments)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    _, types, _ = content(tmp_path / "m.gguf")
    for tensor, kind in types.items():
        general = tensor.replace("blk.0.", "blk.*.").replace("blk.1.", "blk.*.")
        assert lines[general].split()[1] == kind
    assert "rotation" in lines["output.weight"]
    assert "along vo" in lines["blk.*.attn_output.weight"]
    total = sum(t.n_bytes for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert abs(float(lines["total"].split()[1]) * 1000 - total) < 500


def test_mlps_leave_at_their_own_widths(made, tmp_path):
    checkpoint, sizes = made.checkpoint("qwen2", 4), []
    group = open_checkpoint(checkpoint).meta["groups"]["ffn"]
    for rate in (0.0, 0.35):
        exports.export(checkpoint, tmp_path / f"{rate}.gguf", rate, "gguf", dense_head=True)
        values, _, fields = content(tmp_path / f"{rate}.gguf")
        kept = [layer["ffn"] for layer in open_checkpoint(checkpoint).keep(rate)]
        shapes = [values[f"blk.{i}.ffn_up.weight"].shape[0] for i in range(2)]
        assert shapes == [spread(width, group)[-1] // 32 * 32 + 32 for width in kept]
        arch = fields["general.architecture"]
        assert arch == ("llama" if len(set(shapes)) == 1 else "deci")
        assert fields[f"{arch}.feed_forward_length"] == (shapes[0] if arch == "llama" else shapes)
        exports.export(checkpoint, tmp_path / "shared.gguf", rate, "gguf", overwrite=True)
        assert content(tmp_path / "shared.gguf")[2]["deci.feed_forward_length"] == [*shapes, 32]
        sizes.append(sum(shapes))
    assert sizes[1] < sizes[0]


def test_a_folder_takes_side_files_and_is_a_model_that_we_read(made, tmp_path, capsys):
    checkpoint = made.checkpoint("tied", 4)
    for _ in range(2):  # the second time it replaces the first one
        exports.export(checkpoint, tmp_path / "out", 0.0, "gguf", overwrite=True, dense_head=True)
    assert {"model.gguf", "config.json", "tokenizer.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    source = open_source(tmp_path / "out" / "model.gguf")
    assert source.config.head_dim == 16
    for out in ("out", "file.gguf"):
        exports.export(checkpoint, tmp_path / out, 0.0, "gguf", overwrite=True)
        with pytest.raises(UserError, match="--overwrite"):
            exports.export(checkpoint, tmp_path / out, 0.0, "gguf")


def test_unpacked_checkpoints_keep_their_numbers(tmp_path, rng):
    hf = common.hf_config("llama-biased") | {"hidden_size": 32, "num_attention_heads": 4}
    tensors = common.state_dict(hf, rng)
    common.write(tmp_path / "hub", hf, tensors)
    convert(str(tmp_path / "hub"), str(tmp_path / "ours"))
    exports.export(tmp_path / "ours", tmp_path / "m.gguf", 0.0, "gguf")
    values, types, _ = content(tmp_path / "m.gguf")
    assert set(types.values()) == {"F32"}
    np.testing.assert_array_equal(values["blk.1.ffn_down.weight"], tensors["model.layers.1.mlp.down_proj.weight"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (["--format", "gguf", "--prune-rate", "0.5"], "prune rate must be"),
        (["--format", "ggml"], "invalid choice"),
        (["--format", "compressed-tensors", "--dtype", "float16"], "takes no --dtype"),
        (["--format", "transformers", "--dense-head"], "takes no --dense-head"),
    ],
)
def test_impossible_arguments(made, tmp_path, changes, match):
    with pytest.raises(UserError, match=match):
        export_command.main([str(made.checkpoint("tied", 4)), str(tmp_path / "out"), *changes])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "bits", "rate"),
    [
        ("smollm3-four", 4, 0.0),
        ("mamba2", 4, 0.35),
        ("mamba2", 16, 0.0),
        ("nemotron_h", 8, 0.0),
        ("granitehybrid", 4, 0.0),
        ("bamba", 4, 0.0),
        ("portable-ssm", 4, 0.35),
    ],
)
def test_what_leaves_comes_back(made, tmp_path, name, bits, rate):
    """Architectures that we read as well: the model is that of the dense export."""
    checkpoint = made.checkpoint(name, bits)
    exports.export(checkpoint, tmp_path / "m.gguf", rate, "gguf")
    dense_export(checkpoint, tmp_path / "dense", rate, dtype="float32")
    ours, theirs = (test_gguf.leaves_of(open_source(tmp_path / out)) for out in ("m.gguf", "dense"))
    assert set(ours) == set(theirs)
    for leaf, want in theirs.items():
        most = 2**-10 if leaf == "head" else 2e-6  # a head that the rotation went into leaves as float16 or bfloat16
        most = 2**-7 if leaf == "head" and bits == 16 else most
        got = ours[leaf]
        if got.shape != want.shape:  # an MLP whose groups start new blocks
            got = got[np.abs(got).reshape(len(got), -1).any(1)]
        np.testing.assert_allclose(got, want, rtol=most, atol=most * np.abs(want).max(), err_msg=leaf)
    packed = content(tmp_path / "m.gguf")[1].get("blk.0.ssm_out.weight")
    assert packed == {"portable-ssm": "Q4_0"}.get(name, packed)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("compressed-tensors", {}, "mamba2 models cannot leave"),
        ("gguf", {"use_bias": True}, "llama.cpp's mamba2 has no biases of SSM projections"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(tmp_path, rng, kind, changes, match):
    exports.tiny.packed(tmp_path / "ours", exports.MODELS["mamba2"] | changes, 4, rng)
    for out in ("out", "out.gguf"):
        with pytest.raises(UserError, match=match):
            exports.export(tmp_path / "ours", tmp_path / out, 0.0, kind)
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("smollm3", {"no_rope_layers": [0, 1]}, "unrotated layers other than every fourth one"),
        ("qwen3", {"attention_bias": True}, "biases in attention"),
        ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "scaled RoPE"),
        ("bamba", {"mlp_bias": True}, "biases in MLPs"),
        ("granitehybrid", {"mamba_conv_bias": False}, "convolutions without a bias"),
        ("granitehybrid", {"time_step_limit": [0.0, 0.5]}, "largest SSM steps"),
    ],
)
def test_what_an_architecture_lacks(name, changes, what):
    with pytest.raises(UserError, match=f"has no {what}"):
        gguf_architecture.base(configs.from_hf(exports.MODELS[name] | changes))


def test_nothing_is_left_behind_when_the_disk_is_full(made, tmp_path, monkeypatch):
    def full(self, tensor, tensor_endianess=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    for out in ("out", "out.gguf"):
        with pytest.raises((UserError, OSError), match=r"[Nn]o space left"):
            exports.export(made.checkpoint("tied", 4), tmp_path / out, 0.0, "gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_extra_is_named(made, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    monkeypatch.delitem(sys.modules, "gguf")
    with pytest.raises(UserError, match=r"uniql-jax\[gguf\]"):
        exports.export(made.checkpoint("tied", 4), tmp_path / "m.gguf", 0.0, "gguf")


def test_norms_of_heads_leave_with_one_width(made, tmp_path):
    """llama.cpp's form of them has one MLP width for all layers: that of the widest one, the rest zeros."""
    exports.export(made.checkpoint("qwen3", 4), tmp_path / "m.gguf", 0.35, "gguf")
    kept = [layer["ffn"] for layer in open_checkpoint(made.checkpoint("qwen3", 4)).keep(0.35)]
    values, _, fields = content(tmp_path / "m.gguf")
    assert fields["qwen3.feed_forward_length"] >= max(kept) > min(kept)
    assert [int(values[f"blk.{i}.ffn_up.weight"].any(1).sum()) for i in range(2)] == kept


@pytest.mark.slow
def test_norms_of_heads_stay_where_llama_cpp_has_no_place(tmp_path, monkeypatch, seed):
    monkeypatch.setitem(exports.MODELS, "odd", exports.MODELS["qwen3"] | {"attention_bias": True})
    odd = exports.Made(tmp_path, seed).checkpoint("odd", 4)
    with pytest.raises(UserError, match="no biases"):
        exports.export(odd, tmp_path / "odd.gguf", 0.0, "gguf")
    assert not (tmp_path / "odd.gguf").exists()


@pytest.mark.slow
def test_a_width_that_blocks_of_32_do_not_divide_leaves_at_16_bits(tmp_path, monkeypatch, seed):
    monkeypatch.setitem(exports.MODELS, "odd", exports.MODELS["qwen3"] | {"hidden_size": 40})
    odd = exports.Made(tmp_path, seed).checkpoint("odd", 4)
    exports.export(odd, tmp_path / "odd.gguf", 0.0, "gguf")
    kinds = content(tmp_path / "odd.gguf")[1]
    assert {kinds[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_up", "ffn_gate")} == {"F16"}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"  # contracts the MLP's width, which they divide
