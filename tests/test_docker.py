"""What the files in docker/ name exists, and a device's list holds what generating imports."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.pallas_cases import lowered_for_nvidia
from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.dequant_matmul import dot, mma, tuned

ROOT = Path(__file__).parents[1]


def names(lines: list[str]) -> set[str]:
    """Packages of requirement lines."""
    found = (re.match(r"[A-Za-z0-9_.-]+", line) for line in lines if line and not line.startswith("#"))
    return {match[0].lower().replace("-", "_") for match in found if match}


def test_the_context_holds_what_the_build_needs() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    links = {path.resolve().name for path in (ROOT / "uniql_jax").iterdir() if path.is_symlink()}
    assert links <= set(kept)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["readme"] in kept
    extras = re.findall(r"EXTRAS=([\w,]+)", (ROOT / "docker" / "Dockerfile").read_text())
    assert len(extras) == 2
    assert set(",".join(extras).split(",")) <= set(project["optional-dependencies"])


def test_a_devices_list_is_enough_to_generate() -> None:
    """Importing what generating uses loads no dependency that the list lacks."""
    listed = names((ROOT / "docker" / "requirements-jetson.txt").read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lacking = names(project["dependencies"]) - listed
    assert listed <= names(project["dependencies"])
    modules = {name: {"orbax_checkpoint": "orbax"}.get(name, name) for name in lacking}
    program = (
        "import sys\nfrom uniql_jax.runtime import generation, hub, loading, prompts, text\n"
        f"print([name for name in {sorted(modules.values())} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_devices_list_can_be_met_and_the_command_exists() -> None:
    """What is installed here meets every bound, and the image's entry point is a console script of the project."""
    lines = (ROOT / "docker" / "requirements-jetson.txt").read_text().splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            wanted = Requirement(line)
            assert wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True), line
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r'^ENTRYPOINT \["(\w+)"\]', (ROOT / "docker" / "Dockerfile").read_text(), re.M)) <= set(
        project["scripts"]
    )


SHARED = {8.6: 99, 8.7: 163, 8.9: 99}
"""KiB of shared memory that one program may hold, by compute capability (CUDA C++ Programming Guide)."""


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_of_jetsons_and_consumer_gpus(monkeypatch: pytest.MonkeyPatch, capability: float) -> None:
    """No kernel of Hopper's is chosen, tiles fit the shared memory, and what is chosen lowers for such a GPU."""
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "capability", lambda: capability)
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    lowered = set()
    for layout in ("rows", "groups"):
        for features, width in ((4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096)):
            weight = tuned.Weight(layout, features, width // 128, 128)
            for count in (1, 8, 16, 17, 64, 128, 200, 256, 600):
                kernel, settings = tuned.choices(weight, count, "Orin")[0]
                assert kernel in ("mma", "dot", "dequantize", "dense")
                if kernel == "dot":  # a tile of x and one of words in each of its stages
                    stage = settings.tile_m * weight.group * 2 + settings.tile_n * weight.group // 2
                    assert settings.stages * stage <= SHARED[capability] * 1024
                new = kernel in ("mma", "dot") and (layout, kernel, settings) not in lowered
                if new and capability == 8.7 and features == width:
                    lowered.add((layout, kernel, settings))
                    product = (mma if kernel == "mma" else dot).product
                    text = lowered_for_nvidia(product, weight, count, settings).as_text()
                    assert "xla.gpu.triton" in text
    assert bool(lowered) is (capability == 8.7)
