"""Checkpoints in the forms that people publish: what stock transformers makes of the same folder, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import published, reference
from tests.convert import common
from uniql_jax.commands import cli, from_hf
from uniql_jax.convert.from_hf import convert
from uniql_jax.convert.source import open_source
from uniql_jax.errors import CheckpointWarning, UserError
from uniql_jax.files import INDEX, WEIGHTS

TIED = {"llama": "llama-3.2-1b", "qwen2": "qwen2.5-0.5b", "mamba2": "mamba2-130m", "bamba": "bamba-9b-v2"}
BUFFERS = {
    "model.layers.0.self_attn.k_scale": np.ones((), np.float32),
    "model.layers.1.self_attn.v_scale": np.ones((), np.float32),
    "model.layers.0.self_attn.rotary_emb.cos_cached": np.ones((4, 4), np.float32),
    "mtp.layers.0.weight": np.ones((4, 4), np.int8),
    "no.one.knows": np.zeros(3, np.int32),
}


def tied(family: str, folder: Path, rng: np.random.Generator) -> tuple[Path, dict[str, Any], Any]:
    hf = published.shrunk(TIED[family]) | {"tie_word_embeddings": True}
    model = reference.build(hf, int(rng.integers(2**31)))
    return reference.save(model, folder, hf), hf, model


def rewrite(folder: Path, change: Any) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("family", TIED)
def test_the_base_model_alone(tmp_path, rng, family):
    """What LlamaModel.save_pretrained writes: no prefix before the names, no head."""
    _, hf, model = tied(family, tmp_path / "whole", rng)
    reference.save(model.base_model, tmp_path / "base", hf)
    assert not any(name.startswith(("model.", "backbone.")) for name in load_file(tmp_path / "base" / WEIGHTS))
    reference.check_same_logits(tmp_path / "base", rng)


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_tied_models_that_store_only_their_head(tmp_path, rng, family):
    folder, _, _ = tied(family, tmp_path / "m", rng)

    def change(tensors):
        [embed] = [name for name in tensors if "embed" in name]
        tensors["lm_head.weight"] = tensors.pop(embed)
        return tensors

    rewrite(folder, change)
    reference.check_same_logits(folder, rng)
    assert set(open_source(folder).top()) == {"embed", "norm"}
    assert len(open_source(folder).fingerprints()) == 1 + len(open_source(folder).config.pattern)


@pytest.mark.parametrize("tie", [False, True])
def test_nemotron_h_under_transformers_own_names(tmp_path, rng, tie):
    """Its head is never tied, whatever the config says."""
    hf = published.shrunk("nemotron-h-8b") | {"tie_word_embeddings": tie}
    folder = reference.save(reference.build(hf, int(rng.integers(2**31))), tmp_path / "m", hf)
    assert any(name.startswith("backbone.") for name in load_file(folder / WEIGHTS))
    rewrite(folder, lambda tensors: {name.replace("backbone.", "model.", 1): v for name, v in tensors.items()})
    reference.check_same_logits(folder, rng)


def test_an_untied_base_model_lacks_its_head(tmp_path, rng):
    hf = common.hf_config("llama")
    tensors = {name.removeprefix("model."): value for name, value in common.state_dict(hf, rng).items()}
    del tensors["lm_head.weight"]
    with pytest.raises(UserError, match=r"'lm_head\.weight' is missing"):
        open_source(common.write(tmp_path / "m", hf, tensors))


def test_foreign_tensors_are_skipped_with_one_warning(tmp_path, rng):
    folder, _, _ = tied("llama", tmp_path / "m", rng)
    rewrite(folder, lambda tensors: tensors | BUFFERS)
    with pytest.warns(CheckpointWarning) as caught:
        reference.check_same_logits(folder, rng)
    assert len(caught) == 1
    assert "'model.layers.0.self_attn.k_scale'" in str(caught[0].message)
    assert str(caught[0].message).endswith("and 2 more")


def test_a_command_says_a_warning_in_one_line(tmp_path, rng, capsys):
    folder, _, _ = tied("llama", tmp_path / "m", rng)
    rewrite(folder, lambda tensors: tensors | BUFFERS)
    with pytest.raises(SystemExit) as end:
        cli.run(from_hf.main, [str(folder), str(tmp_path / "ours")])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert "-> " in out
    (line,) = (line for line in err.splitlines() if "warning" in line.lower())
    assert line.startswith(f"warning: {folder}: skipped tensors")
    # the function itself prints nothing
    with pytest.warns(CheckpointWarning):
        convert(str(folder), str(tmp_path / "again"))
    assert capsys.readouterr() == ("", "")


def test_biases_that_the_config_does_not_have_are_foreign(tmp_path, rng):
    hf = common.hf_config("llama")
    biased = common.state_dict(common.hf_config("llama-biased"), rng)
    with pytest.warns(CheckpointWarning, match=r"mlp\.down_proj\.bias"):
        source = open_source(common.write(tmp_path / "m", hf, biased))
    assert "q_bias" not in source.layer(0)["attention"]


def test_a_missing_tensor_is_named_with_what_stands_there_instead(tmp_path, rng):
    hf = common.hf_config("llama")
    tensors = common.state_dict(hf, rng)
    tensors = {name.replace("k_proj.weight", "k_proj.qweight"): value for name, value in tensors.items()}
    with pytest.raises(UserError, match=r"'model\.layers\.0.*k_proj\.weight' and 1 more.*k_proj\.qweight'") as error:
        open_source(common.write(tmp_path / "m", hf, tensors))
    assert "\n" not in str(error.value)


def test_a_number_format_that_numpy_lacks_is_skipped_or_refused(tmp_path, rng):
    hf = common.hf_config("llama")
    tensors = common.state_dict(hf, rng)

    def raw(name: str) -> Path:
        """The checkpoint in which the bytes of a tensor are said to be of type F4."""
        folder = common.write(tmp_path / name, hf, tensors | {"odd": np.zeros(8, np.uint8)})
        data = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        start, stop = header[name]["data_offsets"]
        header[name] |= {"dtype": "F4", "shape": [2 * (stop - start)]}
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        return folder

    with pytest.warns(CheckpointWarning, match="'odd'"):
        assert open_source(raw("odd")).layer(0)
    with pytest.raises(UserError, match=r"'model\.norm\.weight'"):
        open_source(raw("model.norm.weight"))


SLIDING = dict(use_sliding_window=True, sliding_window=8)


@pytest.mark.parametrize(
    "changes",
    [
        SLIDING | {"max_window_layers": 3},
        SLIDING | {"max_window_layers": 28},
        SLIDING | {"layer_types": ["full_attention"] * 3},
        {"sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0},
    ],
)
def test_qwen2_in_which_nothing_slides(tmp_path, rng, changes):
    hf = published.shrunk("qwen2.5-0.5b") | changes
    model = reference.build(hf, int(rng.integers(2**31)))
    reference.check_same_logits(reference.save(model, tmp_path / "m", hf), rng)


@pytest.mark.parametrize(
    "changes",
    [
        SLIDING | {"max_window_layers": 2},
        SLIDING | {"max_window_layers": 0},
        SLIDING | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3},
        {"layer_types": ["full_attention"] * 2},
        {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
    ],
)
def test_qwen2_in_which_something_slides_is_refused(tmp_path, rng, changes):
    hf = common.hf_config("qwen2", num_hidden_layers=3)
    folder = common.write(tmp_path / "m", hf | changes, common.state_dict(hf, rng))
    with pytest.raises(UserError, match="layer_types"):
        open_source(folder)


BAD_CONFIGS: list[tuple[bytes, str]] = [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"null", "not a model's config"),
    (b'{"model_type": "llama\xff"}', "UTF-8"),
    ('{"model_type": "llama"}'.encode("utf-16"), "UTF-8"),
    (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    (b'{"model_type": "llama", "eos_token_id": ' + b"[" * 900 + b"]" * 900 + b"}", "eos_token_id"),
    (b'{"model_type": ' + b"[" * 900 + b"]" * 900 + b"}", "model_type"),
    (b'{"model_type": ["llama"]}', "model_type"),
    (b'{"model_type": "llama", "vocab_size": 1' + b"0" * 5000 + b"}", "JSON"),
    (b'{"model_type": "llama", "num_hidden_layers": 1000000000000}', "num_hidden_layers"),
    (b'{"model_type": "llama", "hidden_act": "' + b"x" * 10_000 + b'"}', "hidden_act"),
    (b'{"model_type": "llama", "per_layer_config": {"0": {"intermediate_size": 3}}}', "per_layer_config"),
    (b'{"model_type": "llama", "is_causal": false}', "is_causal"),
]


@pytest.mark.parametrize(("content", "match"), BAD_CONFIGS, ids=range(len(BAD_CONFIGS)))
def test_bad_config_files_are_one_line(tmp_path, content, match):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=match) as error:
        open_source(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_config_that_is_a_folder_and_one_with_a_byte_order_mark(tmp_path, rng):
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config\.json: Is a directory"):
        open_source(tmp_path / "folder")
    hf = common.hf_config("llama")
    folder = common.write(tmp_path / "m", hf, common.state_dict(hf, rng))
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(hf).encode())
    assert open_source(folder).hf_config == hf


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ([], "maps no tensors"),
        ({}, "maps no tensors"),
        ({"weight_map": []}, "maps no tensors"),
        ({"weight_map": {}}, "maps no tensors"),
        ({"weight_map": {"a": 5}}, "maps no tensors"),
        ({"weight_map": {"a": ["x"], "b": "y"}}, "maps no tensors"),
        ({"weight_map": {"a": None}}, "maps no tensors"),
        ({"weight_map": {"a": "../other.safetensors"}}, "not a file of its folder"),
        ({"weight_map": {"a": "sub/../../other.safetensors"}}, "not a file of its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not a file of its folder"),
        ({"weight_map": {"a": "x\0y"}}, "not a file of its folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "lacks gone"),
        ({"weight_map": {"a": ""}}, "lacks"),
    ],
)
def test_bad_indexes_are_one_line(tmp_path, rng, index, match):
    hf = common.hf_config("llama")
    folder = common.write(tmp_path / "m", hf, common.state_dict(hf, rng))
    (folder / WEIGHTS).rename(tmp_path / "other.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=match) as error:
        open_source(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["short", "long", "offsets", "no header", "folder", "empty"])
def test_damaged_shards_are_one_line(tmp_path, rng, damage):
    hf = common.hf_config("llama")
    tensors = {name: v.astype(ml_dtypes.bfloat16) for name, v in common.state_dict(hf, rng).items()}
    path = common.write(tmp_path / "m", hf, tensors) / WEIGHTS
    data = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        first = next(name for name in header if name != "__metadata__")
        header[first]["data_offsets"][1] += 2
        text = json.dumps(header).encode()
        offsets = len(text).to_bytes(8, "little") + text + data[8 + size :]
        contents = {"short": data[:-2], "long": data + b"xx", "offsets": offsets, "no header": data[:4], "empty": b""}
        path.write_bytes(contents[damage])
    with pytest.raises(UserError, match=r"truncated|damaged|cannot read") as error:
        open_source(tmp_path / "m")
    assert "\n" not in str(error.value)
