"""What the files in docker/ name exists, and a device's list holds what generating imports."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

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
