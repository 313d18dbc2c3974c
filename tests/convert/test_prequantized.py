"""Sources of packed integers: each layout, packed here as its tool documents it, is read as what it stands for."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import published, reference
from tests.convert import common
from uniql_jax.commands import cli, from_hf
from uniql_jax.convert.source import open_source
from uniql_jax.errors import CheckpointWarning, UserError
from uniql_jax.files import ShardReader

HF = common.hf_config("llama", hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
GROUP = 32
PACKED = ("self_attn.", "mlp.")
pytestmark = pytest.mark.filterwarnings("ignore:.*is quantized already:uniql_jax.errors.CheckpointWarning")


def words(values: np.ndarray, bits: int, axis: int, order=None) -> np.ndarray:
    """Integers, one by one, into int32."""
    count, values = 32 // bits, np.moveaxis(values, axis, -1)
    out = np.zeros((*values.shape[:-1], values.shape[-1] // count), np.uint64)
    for place in range(values.shape[-1]):
        slot = place % count
        shift = (order.index(slot) if order else slot) * bits
        out[..., place // count] |= values[..., place].astype(np.uint64) << np.uint64(shift)
    return np.moveaxis(out.astype(np.uint32).view(np.int32), -1, axis)


def gptq(rng, out, width, bits=4, group=GROUP, version="gptq", shuffled=False):
    groups = width // group if group > 0 else 1
    q = rng.integers(0, 1 << bits, (width, out))
    zero = rng.integers(0, 1 << bits, (groups, out))
    scale = rng.uniform(0.01, 0.1, (groups, out)).astype(np.float16)
    index = np.arange(width) // (group if group > 0 else width)
    if shuffled:
        index = rng.permutation(index)
    stored = (zero - 1) % (1 << bits) if version == "gptq" else zero
    tensors = {"qweight": words(q, bits, 0), "qzeros": words(stored, bits, 1), "scales": scale,
               "g_idx": index.astype(np.int32)}  # fmt: skip
    dense = np.array([[scale[index[k], n] * np.float32(q[k, n] - zero[index[k], n]) for k in range(width)]
                      for n in range(out)], np.float32)  # fmt: skip
    return tensors, dense


def awq(rng, out, width):
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the i-th four bits of a word hold neighbour order[i]
    q, zero = rng.integers(0, 16, (width, out)), rng.integers(0, 16, (width // GROUP, out))
    scale = rng.uniform(0.01, 0.1, (width // GROUP, out)).astype(np.float16)
    tensors = {"qweight": words(q, 4, 1, order), "qzeros": words(zero, 4, 1, order), "scales": scale}
    index = np.arange(width) // GROUP
    return tensors, ((q - zero[index]) * scale.astype(np.float32)[index]).T


def compressed_tensors(rng, out, width, bits=4, symmetric=True):
    """By the library itself, both ways."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {
        "weight": torch.from_numpy(rng.standard_normal((out, width)).astype(np.float32)),
        "weight_scale": torch.from_numpy(rng.uniform(0.1, 0.4, (out, width // GROUP)).astype(np.float32)),
        "weight_zero_point": torch.from_numpy(
            rng.integers(-5, 5, (out, width // GROUP)).astype(np.int8) * (not symmetric)
        ),
    }
    packed = library.PackedQuantizationCompressor.compress(state, scheme)
    dense = library.PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    return {name: value.numpy() for name, value in packed.items()}, dense.float().numpy()


def section(method: str, **changes) -> dict:
    if method == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights | changes}}
        return {"quant_method": method, "format": "pack-quantized", "config_groups": groups}
    return {"quant_method": method, "bits": 4, "group_size": GROUP} | changes


CASES = {
    "gptq": (gptq, section("gptq"), {}),
    "gptq in order of activations": (gptq, section("gptq", desc_act=True), {"shuffled": True}),
    "gptq of 8 bits": (gptq, section("gptq", bits=8), {"bits": 8}),
    "gptq of 2 bits, one group": (gptq, section("gptq", bits=2, group_size=-1), {"bits": 2, "group": -1}),
    "gptq v2": (gptq, section("gptq", checkpoint_format="gptq_v2"), {"version": "gptq_v2"}),
    "awq": (awq, section("awq", version="gemm", zero_point=True), {}),
    "compressed-tensors": (compressed_tensors, section("compressed-tensors"), {}),
    "compressed-tensors of 8 bits": (compressed_tensors, section("compressed-tensors", num_bits=8), {"bits": 8}),
    "compressed-tensors with zero points": (
        compressed_tensors, section("compressed-tensors", symmetric=False), {"symmetric": False},
    ),
}  # fmt: skip


def quantized(folder, rng, maker, quantization, options, hf=HF):
    """A folder of packed matrices, and the dense tensors that it stands for."""
    stored, dense = {}, {}
    for name, value in common.state_dict(hf, rng).items():
        if any(part in name for part in PACKED):
            parts, dense[name] = maker(rng, *value.shape, **options)
            stored |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
        else:
            stored[name] = dense[name] = value
    return common.write(folder, hf | {"quantization_config": quantization}, stored), dense


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_that_the_layout_stands_for(tmp_path, rng, name):
    folder, dense = quantized(tmp_path / "q", rng, *CASES[name])
    with pytest.warns(CheckpointWarning, match="is quantized already"):
        source = open_source(folder, dequantize=True)
    for tensor, want in dense.items():
        got = source.reader.read(tensor)
        assert source.reader.names()[tensor] == (np.dtype(np.float32), want.shape)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)
    plain = open_source(common.write(tmp_path / "dense", HF, dense))
    for ours, theirs in ((source.layer(1), plain.layer(1)), ({"top": source.top()}, {"top": plain.top()})):
        for kind, leaves in theirs.items():
            for leaf, want in leaves.items():
                np.testing.assert_allclose(ours[kind][leaf], want, rtol=1e-6, atol=0)
    assert "quantization_config" not in source.hf_config


def test_our_own_packed_export_comes_back(tmp_path_factory, tmp_path, seed):
    """Through the other direction, with groups of several sizes and a head."""
    from tests.convert import exports
    from uniql_jax.convert.to_hf import export

    checkpoint = exports.made(tmp_path_factory, seed).checkpoint("portable", 4)
    exports.export(checkpoint, tmp_path / "packed", 0.35, "compressed-tensors")
    export(checkpoint, tmp_path / "dense", 0.35, dtype="float32")
    source, dense = open_source(tmp_path / "packed", dequantize=True), ShardReader(tmp_path / "dense")
    assert len(source.reader.packed) >= 14
    for tensor in source.reader.packed:
        got, want = source.reader.read(tensor), dense.read(tensor)
        np.testing.assert_array_equal(got, want[: got.shape[0], : got.shape[1]])


def test_a_command_asks_before_it_goes_on(tmp_path, rng, capsys):
    folder, dense = quantized(tmp_path / "q", rng, *CASES["awq"])
    with pytest.raises(SystemExit) as end:
        cli.run(from_hf.main, [str(folder), str(tmp_path / "ours")])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--dequantize-source" in line
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    with pytest.raises(SystemExit) as end:
        cli.run(from_hf.main, [str(folder), str(tmp_path / "ours"), "--dequantize-source"])
    assert end.value.code == 0
    assert "warning:" in capsys.readouterr().err
    stored = ShardReader(tmp_path / "ours").read("layers.0.mlp.gate")
    np.testing.assert_allclose(stored, dense["model.layers.0.mlp.gate_proj.weight"], rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "changes", "match"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes'"),
        ("gptq", {"quant_method": None}, "quantized by None"),
        ("gptq", {"bits": 3}, "has 3 bits"),
        ("gptq", {"group_size": "all"}, "groups of 'all'"),
        ("gptq", {"group_size": 0}, "groups of 0"),
        ("gptq", {"checkpoint_format": "marlin"}, "layout 'marlin'"),
        ("gptq", {"quant_method": "compressed-tensors"}, "layout None"),
        ("awq", {"version": "gemv"}, "layout 'gemv'"),
        ("awq", {"bits": 8}, "has 8 bits"),
        ("awq", {"group_size": 16}, "do not fit one another"),
        ("compressed-tensors", {"format": "float-quantized"}, "layout 'float-quantized'"),
        ("compressed-tensors", {"config_groups": {}}, "same for all"),
        ("compressed-tensors", {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}}, "same for all"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(tmp_path, rng, case, changes, match):
    maker, quantization, options = CASES[case]
    folder, _ = quantized(tmp_path / "q", rng, maker, quantization | changes, options)
    with pytest.raises(UserError, match=match) as error:
        open_source(folder, dequantize=True).layer(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_damaged_parts_are_named(tmp_path, rng, part, damage):
    folder, _ = quantized(tmp_path / "q", rng, *CASES["gptq"])
    reader, name = ShardReader(folder), f"model.layers.0.mlp.up_proj.{part}"
    tensors = {tensor: reader.read(tensor) for tensor in reader.names()}
    tensors[name] = tensors[name][:1]
    if damage == "missing":
        del tensors[name]
    hf = json.loads((folder / "config.json").read_text())
    common.write(tmp_path / "damaged", hf, tensors)
    if damage == "missing" and part == "g_idx":  # then groups follow one another
        assert open_source(tmp_path / "damaged", dequantize=True).layer(0)
        return
    with pytest.raises(UserError, match="is missing" if damage == "missing" else "do not fit one another"):
        open_source(tmp_path / "damaged", dequantize=True).layer(0)


def test_transformers_computes_with_the_same_numbers(tmp_path, rng):
    """A folder that the library packed, run by transformers and by us."""
    torch = pytest.importorskip("torch")
    hf = published.shrink(published.SMOLLM2_135M, hidden_size=96, num_attention_heads=3, num_key_value_heads=1,
                          head_dim=32, num_hidden_layers=2)  # fmt: skip
    maker, quantization, options = CASES["compressed-tensors"]
    quantization = quantization | {"quantization_status": "compressed", "ignore": ["lm_head"]}
    folder, dense = quantized(tmp_path / "q", rng, maker, quantization, options, hf)
    model = reference.build(hf, 0)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in dense.items()}, strict=False)
    tokens = rng.integers(3, 256, (1, 40))
    ours = uniql_jax.load_source(str(folder), jnp.float32, dequantize=True)(jnp.asarray(tokens, jnp.int32))
    assert reference.relative_error(np.asarray(ours), reference.logits(model, tokens)) < 2e-5
