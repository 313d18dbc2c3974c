"""Every verb that writes: its output never takes the place of what it reads."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from uniql_jax.commands import cli

FOLDERS = {
    "compress": ("--ckpt", "MODEL", "--out", "OUT"),
    "from_hf": ("MODEL", "OUT"),
    "export": ("ELASTIC", "OUT"),
    "finetune": ("--ckpt", "ELASTIC", "--out", "OUT", "--data", "TEXT"),
}
FILES = {
    "own_text": ("--ckpt", "ELASTIC", "--out", "ELASTIC/ids.npy"),
    "benchmark": ("--ckpt", "ELASTIC", "--json", "ELASTIC/config.json"),
    "evaluate json": ("--ckpt", "ELASTIC", "--text", "TEXT", "--json", "ELASTIC/config.json"),
    "evaluate plot": ("--ckpt", "ELASTIC", "--text", "TEXT", "--plot", "TEXT"),
    "evaluate baseline": ("--ckpt", "ELASTIC", "--text", "TEXT", "--baseline", "MODEL", "--json", "MODEL/config.json"),
    "inspect json": ("ELASTIC", "--json", "ELASTIC/model.safetensors"),
    "inspect plot": ("ELASTIC", "--plot", "ELASTIC/config.json"),
}
TEXTS = {
    "compress calib": ("--ckpt", "MODEL", "--out", "OLD", "--calib", "OLD/notes.txt"),
    "compress recover": ("--ckpt", "MODEL", "--out", "OLD", "--recover", "TEXT", "OLD"),
    "finetune data": ("--ckpt", "ELASTIC", "--out", "OLD", "--data", "OLD/notes.txt"),
    "finetune validation": ("--ckpt", "ELASTIC", "--out", "OLD", "--data", "TEXT", "--validation", "OLD/notes.txt"),
}


@pytest.fixture
def places(tmp_path: Path, hf_folder: Callable[[str], Path], rng: np.random.Generator) -> dict[str, str]:
    """What the words in capitals stand for; OLD is a model folder that holds text as well."""
    model = shutil.copytree(hf_folder("llama-2-7b"), tmp_path / "model")
    old, text = shutil.copytree(model, tmp_path / "old"), tmp_path / "text.txt"
    for path in (old / "notes.txt", text):
        path.write_text("\n".join(tiny.LINES))
    elastic = tiny.checkpoint(tmp_path / "elastic", rng)
    np.save(elastic / "ids.npy", np.zeros((2, 4), np.int32))
    return {"MODEL": str(model), "ELASTIC": str(elastic), "OLD": str(old), "TEXT": str(text)}


@pytest.fixture
def refusal(tmp_path: Path, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a verb that must refuse; returns what it says."""

    def run(verb: str, argv: tuple[str, ...], **more: str) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for name, place in (places | more).items():
            argv = tuple(word.replace(name, place) for word in argv)
        with pytest.raises(SystemExit) as stop:
            cli.run(importlib.import_module(f"uniql_jax.commands.{verb}").main, argv)
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return line

    return run


@pytest.mark.parametrize("verb", FOLDERS)
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_an_output_folder_is_never_the_source_nor_inside_it(
    verb: str, overwrite: tuple[str, ...], refusal: Callable[..., str], places: dict[str, str]
) -> None:
    source = places["MODEL" if "MODEL" in FOLDERS[verb] else "ELASTIC"]
    argv = (*FOLDERS[verb], *overwrite)
    assert "is the input itself" in refusal(verb, argv, OUT=source)
    assert "lies inside the input" in refusal(verb, argv, OUT=f"{source}/deep/out")
    assert "the input" in refusal(verb, argv, OUT=str(Path(source).parent))


@pytest.mark.parametrize("case", TEXTS)
def test_an_output_folder_that_holds_a_text_is_not_replaced(case: str, refusal: Callable[..., str]) -> None:
    line = refusal(case.split()[0], (*TEXTS[case], "--overwrite"))
    assert "the input" in line
    assert "old" in line


@pytest.mark.parametrize("case", FILES)
def test_an_output_file_is_never_one_of_an_input(case: str, refusal: Callable[..., str]) -> None:
    assert "is a file of the input" in refusal(case.split()[0], (*FILES[case], "--overwrite"))


@pytest.mark.parametrize("verb", ["evaluate", "inspect"])
def test_two_outputs_are_two_files(verb: str, tmp_path: Path, refusal: Callable[..., str]) -> None:
    source = ("--ckpt", "ELASTIC", "--text", "TEXT") if verb == "evaluate" else ("ELASTIC",)
    out = str(tmp_path / "out.png")
    assert "two outputs" in refusal(verb, (*source, "--json", out, "--plot", out))
