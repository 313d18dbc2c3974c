"""The command of recovery: a sorted checkpoint in, one of the same form out, and one line for what it cannot do."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import tiny
from tests.commands import exit_code
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.commands import finetune as finetune_command
from uniql_jax.train import recover

QUICK = ("--steps", "6", "--batch", "4", "--length", "24", "--lr", "1e-2", "--rank", "4", "--dropout", "0")


_run = functools.partial(exit_code, finetune_command.main)


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n".join(tiny.LINES * 30), encoding="utf-8")
    return path


@pytest.mark.slow  # the same in memory, and in the one pass, is tested in test_recover and test_passes
def test_a_run_killed_and_resumed_gives_a_checkpoint_of_the_same_form(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt, text = tiny.checkpoint(tmp_path / "ckpt", rng), _text(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {i}", "output": f"{i} it is"}) for i in range(20)))
    common = ("--ckpt", ckpt, "--data", rows, "--validation", text, *QUICK, "--length", "200")
    whole, out = tmp_path / "whole", tmp_path / "broken"
    assert _run(*common, "--out", whole) == 0
    shown = capsys.readouterr().out
    for row in ("checkpoint", "training", "validation", "trained", "steps", "memory", "output", "prune rate"):
        assert f"\n{row}" in f"\n{shown}"
    assert not list(tmp_path.glob("*.partial*"))
    before, after = open_checkpoint(ckpt), open_checkpoint(whole)
    assert after._names == before._names  # every tensor, its dtype and shape
    assert after.plan == before.plan
    assert after.bits == before.bits
    assert [p.name for p in after.side_files] == [p.name for p in before.side_files]
    note = after.meta["provenance"]["recovery"]
    assert note["steps"] == 6
    assert note["best_step"] > 0
    assert set(note["loss_before"]) == {"0", "0.15", "0.25", "0.35"}
    assert np.mean(list(note["loss_after"].values())) < np.mean(list(note["loss_before"].values()))
    old, new = (c.layer(1)["attention"] for c in (before, after))
    assert not np.array_equal(old["q"], new["q"])
    np.testing.assert_array_equal(old["inv_freq"], new["inv_freq"])
    tokens = jnp.asarray(rng.integers(0, tiny.VOCAB, (1, 8)), jnp.int32)
    assert np.isfinite(uniql_jax.load(whole, 0.35)(tokens)).all()

    step = recover.Trainer.step

    def dying(self, factors, state, batch, keep, number):
        if number == 4:
            raise KeyboardInterrupt
        return step(self, factors, state, batch, keep, number)

    monkeypatch.setattr(recover.Trainer, "step", dying)
    assert _run(*common, "--out", out) == 130
    assert not out.exists()
    monkeypatch.setattr(recover.Trainer, "step", step)
    capsys.readouterr()
    assert _run(*common, "--out", out) == 2
    assert "--resume" in capsys.readouterr().err
    assert _run(*common, "--out", out, "--seed", "5", "--resume") == 2
    assert "seed (0 -> 5)" in capsys.readouterr().err
    assert _run(*common, "--out", out, "--resume") == 0
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert _run(*common, "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_bad_input_is_one_line_and_leaves_nothing(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str], hf_folder
) -> None:
    ckpt, text = tiny.checkpoint(tmp_path / "ckpt", rng), _text(tmp_path)
    bare = tiny.checkpoint(tmp_path / "bare", rng, with_tokenizer=False)
    unsorted = tiny.checkpoint(tmp_path / "unsorted", rng)
    config = json.loads((unsorted / "config.json").read_text())
    config["uniql"]["plan"] = None
    (unsorted / "config.json").write_text(json.dumps(config))
    packed = Path(shutil.copytree(Path(__file__).parents[1] / "golden" / "llama", tmp_path / "packed"))
    before = sorted(tmp_path.iterdir())
    tail = ("--out", tmp_path / "out", "--data", text)
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("quantized to 4 bits and cannot be trained", ("--ckpt", packed, *tail)),
        ("was never sorted", ("--ckpt", unsorted, *tail)),
        ("no elastic checkpoint", ("--ckpt", hf_folder("llama-2-7b"), *tail)),
        ("no such checkpoint", ("--ckpt", tmp_path / "none", *tail)),
        ("no tokenizer", ("--ckpt", bare, *tail)),
        ("no such text", ("--ckpt", ckpt, "--out", tmp_path / "out", "--data", tmp_path / "none.txt")),
        ("from 2 to 256", ("--ckpt", ckpt, *tail, "--length", "1000")),
        ("does not divide", ("--ckpt", ckpt, *tail, "--batch", "4", "--accumulate", "3")),
        ("the input itself", ("--ckpt", ckpt, "--out", ckpt, "--data", text)),
        ("exists", ("--ckpt", ckpt, "--out", bare, "--data", text)),
        ("distribution of rates", ("--ckpt", ckpt, *tail, "--rates", "sometimes")),
    ]
    for message, argv in cases:
        assert _run(*argv) == 2, message
        lines = capsys.readouterr().err.strip().splitlines()
        assert message in lines[-1]
        assert len([line for line in lines if line.startswith("error:")]) == 1
        assert sorted(tmp_path.iterdir()) == before, message
