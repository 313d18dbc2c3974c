"""`uniql inspect`: sizes and plan from headers alone, equal to what loading gives."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import uniql_jax
from tests import tiny
from uniql_jax import elastic
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.checkpoint_writer import CheckpointWriter
from uniql_jax.commands import inspect as command
from uniql_jax.errors import UserError
from uniql_jax.evaluation.describe import RATES, describe_checkpoint
from uniql_jax.model.decoding import init_cache

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("family", ["llama", "bamba", "nemotron_h"])
def test_sizes_are_those_of_the_loaded_model(family: str) -> None:
    folder = GOLDEN / family
    found = describe_checkpoint(folder, rates=[0.0, 0.25], prune_rate=0.25, context=50)
    assert found["family"] == family
    assert (found["format"], found["sorted"]) == (1, True)
    for row in found["rates"]:
        checkpoint, model = open_checkpoint(folder), uniql_jax.load(folder, row["prune_rate"], dtype="bfloat16")
        checkpoint.top()
        leaves = [checkpoint.layer(i, kept) for i, kept in enumerate(checkpoint.keep(row["prune_rate"]))]
        assert row["weight_bytes"] == checkpoint.bytes_read
        assert row["state_bytes"] == init_cache(model, 1, 50).nbytes
        assert row["prunable_parameters"] == sum(
            int(np.prod(value.shape))
            for layer in leaves
            for kind, block in layer.items()
            for name, value in block.items()
            if elastic.BLOCKS[kind][name].axis and elastic.BLOCKS[kind][name].contract
        )
        assert row["kept_fraction"] == pytest.approx(checkpoint.plan.kept_fraction(row["prune_rate"]))
    assert [layer["kept"] for layer in found["layers"]] == list(model.keep)
    inside = sum(layer["weight_bytes"] for layer in found["layers"])
    top = sum(leaf.nbytes for name, leaf in model.params.items() if name in ("embed", "norm", "head"))
    assert 0 < inside <= found["rates"][1]["weight_bytes"] - top / 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "mamba2", "bamba", "nemotron_h"])
def test_parameters_are_those_of_the_original(family: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    hf = open_checkpoint(GOLDEN / family).hf_config
    kwargs = {k: v for k, v in hf.items() if k not in ("torch_dtype", "architectures", "model_type")}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **kwargs))
    expected = sum(p.numel() for p in model.parameters())
    found = describe_checkpoint(GOLDEN / family, rates=[0.0])["parameters"]
    if family == "qwen2":  # its bias of V is held as one of O, folded
        config = open_checkpoint(GOLDEN / family).config
        expected += len(config.pattern) * (config.hidden_size - config.kv_heads * config.head_dim)
    assert found == expected


def test_the_command_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = str(GOLDEN / "bamba")
    command.main([folder, "--prune-rate", "0.25"])
    text = capsys.readouterr().out
    rate_lines = [line for line in text.splitlines() if line.lstrip()[:1].isdigit() and "kB" in line]
    assert len(rate_lines) == len(RATES) + 2  # and a line for each layer
    for axis, (kept, full) in {"vo": (12, 16), "ffn": (48, 160)}.items():
        assert axis in text
        assert f"{kept}/{full}" in text
    command.main([folder, "--json", "-", "--rates", "0,0.3"])
    out = json.loads(capsys.readouterr().out)
    assert [row["prune_rate"] for row in out["rates"]] == [0.0, 0.3]
    file, picture = tmp_path / "found.json", tmp_path / "plan.png"
    command.main([folder, "--json", str(file), "--rates", "0,0.3", "--plot", str(picture)])
    assert json.loads(file.read_text()) == out
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="exists"):
        command.main([folder, "--json", str(file)])


def test_nothing_but_headers_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from uniql_jax.files import ShardReader

    monkeypatch.setattr(ShardReader, "read", None)
    assert describe_checkpoint(GOLDEN / "llama")["rates"]


def test_unsorted_checkpoints_have_rate_0(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, folder = tiny.config(), tmp_path / "unsorted"
    folder.mkdir()
    tree = tiny.params(cfg, rng)
    writer = CheckpointWriter(folder, tiny.HF, {"bits": 32, "plan": None, "source": "demo"})
    writer.add_top({"embed": tree["embed"], "norm": tree["norm"]})
    for i, layer in enumerate(tree["layers"]):
        writer.add_layer(i, layer)
    writer.finish()
    found = describe_checkpoint(folder)
    assert [row["prune_rate"] for row in found["rates"]] == [0.0]
    assert (found["sorted"], found["provenance"]) == (False, {"source": "demo"})
    assert found["parameters"] == sum(
        leaf.size for path, leaf in jax.tree.leaves_with_path(tree) if "inv_freq" not in jax.tree_util.keystr(path)
    )
    command.main([str(folder), "--plot", str(tmp_path / "plan.png")])
    assert "rate 0 only" in capsys.readouterr().out
    with pytest.raises(UserError, match="never sorted"):
        command.main([str(folder), "--rates", "0,0.2"])


@pytest.mark.parametrize("argv", [["nothing"], [".", "--rates", "0.9"], [".", "--context", "0"], ["."]])
def test_bad_arguments_are_one_line(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        command.main(argv)
    assert "\n" not in str(error.value)
