"""compressed-tensors export: transformers and the library load it, and it is the dense export to the last bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests import published, reference
from tests.convert import exports
from uniql_jax import config as configs
from uniql_jax.convert import packed_folder as packed
from uniql_jax.convert import tables
from uniql_jax.convert.to_compressed_tensors import STYLE
from uniql_jax.convert.to_hf import export as dense_export
from uniql_jax.errors import UserError
from uniql_jax.files import ShardReader
from uniql_jax.plan import grouping

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
LATER = [pytest.param(name, 4, marks=pytest.mark.slow) for name in ("mistral", "smollm3", "granite", "granite-untied")]


@pytest.fixture(scope="module")
def made(tmp_path_factory, seed):
    return exports.made(tmp_path_factory, seed)


def loaded(folder, dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@pytest.mark.parametrize("rate", [0.0, 0.35])
@pytest.mark.parametrize(
    ("name", "bits"),
    [("tied", 4), ("biased", 4), ("biased", 8), ("qwen2", 4), ("qwen3", 4), ("portable", 4), ("portable", 8), *LATER],
)
def test_transformers_computes_our_model(made, tmp_path, rng, name, bits, rate):
    checkpoint = made.checkpoint(name, bits)
    exports.export(checkpoint, tmp_path / "packed", rate, "compressed-tensors")
    dense_export(checkpoint, tmp_path / "dense", rate, dtype="bfloat16")
    tokens = rng.integers(2, exports.tiny.VOCAB, (1, 60))
    ours = exports.our_logits(checkpoint, rate, tokens[0])[None]
    low = reference.logits(loaded(tmp_path / "packed", torch.bfloat16), tokens)
    dense = reference.logits(loaded(tmp_path / "dense", torch.bfloat16), tokens)
    assert reference.relative_error(low, ours) < 1.2 * reference.relative_error(dense, ours)


@pytest.mark.parametrize("name", ["tied", "biased"])
def test_nothing_is_rounded_but_what_is_not_packed(made, tmp_path, rng, name):
    checkpoint, tokens = made.checkpoint(name, 4), rng.integers(2, exports.tiny.VOCAB, (1, 60))
    exports.export(checkpoint, tmp_path / "packed", 0.35, "compressed-tensors")
    dense_export(checkpoint, tmp_path / "dense", 0.35, dtype="float32")
    theirs, model = loaded(tmp_path / "packed", torch.float32), loaded(tmp_path / "dense", torch.float32)
    got = reference.logits(theirs, tokens)
    left = {n for n, module in theirs.named_modules() if not hasattr(module, "quantization_scheme")}
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            module, _, kind = parameter_name.rpartition(".")
            if module in left or kind == "bias":
                parameter.copy_(parameter.bfloat16().float())
    assert reference.relative_error(got, reference.logits(model, tokens)) < 1e-5


@pytest.mark.parametrize("name", ["tied", "biased", "qwen2", "qwen3", "portable"])
def test_every_packed_number_is_that_of_the_dense_export(made, tmp_path, name):
    checkpoint = made.checkpoint(name, 4)
    exports.export(checkpoint, tmp_path / "packed", 0.35, "compressed-tensors")
    dense_export(checkpoint, tmp_path / "dense", 0.35, dtype="float32")
    model, reader = loaded(tmp_path / "packed", torch.float32), ShardReader(tmp_path / "dense")
    with torch.no_grad():
        model(torch.tensor([[3]]))  # the library unpacks on the first pass
    count = 0
    for module_name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            want, got = reader.read(f"{module_name}.weight"), module.weight.detach().float().numpy()
            if name == "qwen2" and "o_proj" in module_name:
                continue  # the dense export may keep the output bias in a free column
            if "mlp" in module_name:  # of the widest layer instead of the original
                want = want[: got.shape[0], : got.shape[1]]
            np.testing.assert_array_equal(got, want, err_msg=module_name)
            count += 1
    assert count >= 2 * 6


def test_portable_groups_leave_as_they_are(made, tmp_path):
    """Groups that vLLM's kernels take, for every matrix."""
    exports.export(made.checkpoint("portable", 4), tmp_path / "packed", 0.35, "compressed-tensors")
    section = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    groups = section["config_groups"].values()
    assert {group["weights"]["group_size"] for group in groups} <= {32, 64, 128}
    of_output = [group for group in groups if any("o_proj" in target for target in group["targets"])]
    assert [(group["weights"]["group_size"], group["weights"]["num_bits"]) for group in of_output] == [(32, 4)]


def test_the_words_are_the_librarys(rng):
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    for bits in (4, 8):
        codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (5, 40)).astype(np.int8)
        np.testing.assert_array_equal(packed.words(codes, bits), pack_to_int32(torch.from_numpy(codes), bits).numpy())


def test_the_table_is_what_lies_on_disk(made, tmp_path):
    for name in ("tied", "biased", "qwen2"):
        said = exports.export(made.checkpoint(name, 4), tmp_path / name, 0.15, "compressed-tensors")
        reader = ShardReader(tmp_path / name)
        held = sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in reader.names().values())
        assert f"{held / 1000:.3g} kB" in said[1].splitlines()[-1]


@pytest.mark.parametrize(
    ("model", "portable", "most"),
    [("llama-3.1-8b", False, 0.295), ("llama-3.1-8b", True, 0.28), ("qwen3-8b", True, 0.28)],
)
def test_bytes_of_an_8b_model(model, portable, most):
    """By sizes alone: 4 bits for all matrices but the embedding, which takes a byte a weight."""
    config = configs.from_hf(published.PUBLISHED[model])
    table = tables.TABLES[config.model_type]

    def size(ffn: int) -> int:
        form = packed.form_of(STYLE, config, 4, grouping(config, portable), ffn, table)
        return sum(tensor.nbytes for tensor in packed.planned(form, STYLE, True, False))

    parameters = sum(int(np.prod(shape)) for shape in tables.expected(config, table).values())
    assert size(config.intermediate_size) / (2 * parameters) < most
    assert size(config.intermediate_size * 3 // 4) / (2 * parameters) < most - 0.02


def test_the_embedding_leaves_dense_where_it_is_asked_for(made, tmp_path):
    """As runtimes want it that take no quantized one."""
    exports.export(made.checkpoint("tied", 4), tmp_path / "dense", 0.15, "compressed-tensors", dense_embedding=True)
    exports.export(made.checkpoint("tied", 4), tmp_path / "whole", 0.15, "compressed-tensors")
    dense, whole = ShardReader(tmp_path / "dense"), ShardReader(tmp_path / "whole")
    name = "model.embed_tokens"
    codes, scale = (whole.read(f"{name}.{part}") for part in ("weight", "weight_scale"))
    assert codes.dtype == np.int8
    assert f"{name}.weight_scale" not in dense.names()
    value = codes.astype(np.float32) * scale.astype(np.float32).repeat(codes.shape[1] // scale.shape[1], 1)
    np.testing.assert_array_equal(dense.read(f"{name}.weight"), value.astype(dense.read(f"{name}.weight").dtype))
    forms = [
        json.loads((tmp_path / out / "config.json").read_text())["quantization_config"] for out in ("dense", "whole")
    ]
    assert [form["format"] for form in forms] == ["pack-quantized", "mixed-precision"]
    assert {group["format"] for group in forms[0]["config_groups"].values()} == {"pack-quantized"}


def test_config_names_groups_and_what_is_left_out(made, tmp_path):
    exports.export(made.checkpoint("tied", 4), tmp_path / "packed", 0.0, "compressed-tensors", max_shard_bytes=50000)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    section = config["quantization_config"]
    assert section["ignore"] == ["lm_head"]
    assert config["tie_word_embeddings"] is False
    for group in section["config_groups"].values():
        whole = "embed_tokens" in group["targets"][0]
        assert (group["weights"]["num_bits"], group["format"]) == (
            (8, "int-quantized") if whole else (4, "pack-quantized")
        )
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1


def test_a_checkpoint_without_integers_is_refused(tmp_path, rng):
    from tests.convert import common
    from uniql_jax.convert.from_hf import convert

    hf = common.hf_config("llama")
    common.write(tmp_path / "hub", hf, common.state_dict(hf, rng))
    convert(str(tmp_path / "hub"), str(tmp_path / "ours"))
    with pytest.raises(UserError, match="nothing to leave packed"):
        exports.export(tmp_path / "ours", tmp_path / "out", 0.0, "compressed-tensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "ours"]
