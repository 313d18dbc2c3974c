"""What is installed: one package that works next to a user's own train.py, built from a clean copy without network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import reference, tiny
from uniql_jax.commands import VERBS

ROOT = Path(__file__).parents[1]
LEFT_OUT = (
    ".git",
    ".venv*",
    "build",
    "dist",
    "*.egg-info",
    "demo",
    "site",
    "__pycache__",
    ".*_cache",
    "results",
    "tiny",
)
FOREIGN = ("train", "convert", "tests", "tools", "pallas_kernels", "datasets", "tokenizers", "optax", "console", "plan")
"""Names of ours and of our dependencies that a user's folder may hold as well."""


def output(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Stdout and stderr of a command that must exit with `code`, without this process's own import path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == code, f"{command}\n{done.stdout}"
    return done.stdout


def build(source: Path, out: Path) -> Path:
    """The wheel of a source tree, without build isolation and so without network."""
    output(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-index"),
        *("--no-deps", "--no-build-isolation", "-w", out, source),
        cwd=source,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the checkout with its links."""
    copy = tmp_path_factory.mktemp("source") / "copy"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from it."""
    return build(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel alone and finds its dependencies in this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    python = folder / "bin" / "python"
    output(
        *(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--disable-pip-version-check"),
        *("--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    # A .pth of a folder that a .pth names is not read: an editable install of ours here stays out.
    (purelib / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder whose own modules have our names, or our dependencies', and must not be imported."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in FOREIGN[:2] + FOREIGN[5:]:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('imported the user\\'s {name}.py')\n")
    for name in FOREIGN[2:5]:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('imported the user\\'s {name}/')\n")
    return folder


def expected() -> set[str]:
    """Every module, table and stub of the package folder, links followed, as a wheel names them."""
    kinds = {".py", ".pyi", ".json", ".html", ".css", ".js", ".svg", ".md", ".typed"}
    found = set()
    for folder, _, names in os.walk(ROOT / "uniql_jax", followlinks=True):
        found |= {Path(folder, name).relative_to(ROOT).as_posix() for name in names if Path(name).suffix in kinds}
    return found | {"uniql_jax/py.typed"}


def test_wheel_holds_one_package_and_all_of_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"uniql_jax"}
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == expected()
    for name in (
        "convert/tables.py",
        "train/lora.py",
        "pallas_kernels/dequant_matmul/tuned/nvidia-h100-80gb-hbm3.json",
    ):
        assert f"uniql_jax/{name}" in inside  # real files, not links
    assert {"uniql_jax/__init__.pyi", "uniql_jax/py.typed", "uniql_jax/configs/llama-3.1-8b.json"} <= inside


@pytest.mark.slow
def test_source_distribution_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    output(sys.executable, "-c", program, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    again = zipfile.ZipFile(build(unpacked, tmp_path / "wheel"))
    first = zipfile.ZipFile(wheel)
    record = next(name for name in first.namelist() if name.endswith("RECORD"))
    assert sorted(again.namelist()) == sorted(first.namelist())
    assert sorted(again.read(record).splitlines()) == sorted(first.read(record).splitlines())  # hashes of all files


@pytest.mark.slow
def test_every_verb_explains_itself_anywhere(installed: Path, elsewhere: Path) -> None:
    commands = [(installed / "uniql", verb) for verb in VERBS]
    commands += [(installed / "python", "-m", f"uniql_jax.{verb.replace('-', '_')}") for verb in VERBS]
    with ThreadPoolExecutor(2) as pool:
        helps = list(pool.map(lambda words: output(*words, "--help", cwd=elsewhere), commands))
    for command, text in zip(commands, helps, strict=True):
        assert text.startswith("usage: "), f"{command}\n{text}"
    assert all(verb in output(installed / "uniql", "--help", cwd=elsewhere) for verb in VERBS)


@pytest.mark.slow
def test_a_whole_run_anywhere(installed: Path, elsewhere: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    def run(*words: str | Path) -> str:
        return output(*words, cwd=elsewhere)

    uniql, module = (installed / "uniql",), (installed / "python", "-m")
    hub = reference.save(reference.build(tiny.HF, 0), tmp_path / "hub", tiny.HF)
    tiny.tokenizer().save_pretrained(hub)
    windows, elastic = tmp_path / "windows.npy", tmp_path / "elastic"
    np.save(windows, rng.integers(2, tiny.VOCAB, (4, 16)).astype(np.int32))
    run(*module, "uniql_jax.compress", "--ckpt", hub, "--out", elastic, "--calib", windows, "--calib-length", "16")
    sampling = ("--ckpt", elastic, "--prune-rate", "0.25", "--prompt", "The people", "--max-new-tokens", "4")
    assert run(*uniql, "generate", *sampling) == run(*module, "uniql_jax.generate", *sampling)
    run(*uniql, "export", elastic, tmp_path / "dense", "--prune-rate", "0.25")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "llama"
    matrices = [w for w in load_file(tmp_path / "dense" / "model.safetensors").values() if w.ndim == 2]
    assert any((w == 0).all(axis).any() for w in matrices for axis in (0, 1))  # what was cut is zero


@pytest.mark.slow
def test_the_installed_copy_is_what_runs(installed: Path, elsewhere: Path) -> None:
    program = "import uniql_jax, uniql_jax.train.lora as m; print(uniql_jax.__file__, m.__file__, uniql_jax.load)"
    here = output(installed / "python", "-P", "-c", program, cwd=elsewhere).split()
    assert all(str(installed.parent) in path for path in here[:2])
