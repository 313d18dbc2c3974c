"""Where commands keep compiled programs: on GPUs in the user's cache, elsewhere where they are asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from uniql_jax.commands import compilation_cache


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What is changed of JAX's configuration; the user's cache is a folder of the test's own."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return found


def test_a_gpu_has_the_users_cache(changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compilation_cache.use(None)
    folder = Path(changed["jax_compilation_cache_dir"])
    assert folder.is_dir()
    assert folder.is_relative_to(tmp_path / "cache")
    assert changed["jax_compilation_cache_max_size"] == compilation_cache.COMPILED_BYTES


@pytest.mark.parametrize("case", ["cpu", "none", "given", "unwritable"])
def test_nothing_is_changed(
    case: str, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if case == "cpu" else "gpu")
    if case == "given":
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    if case == "unwritable":
        (tmp_path / "cache").write_text("a file")
    compilation_cache.use("none" if case == "none" else None)
    assert not changed
    assert case == "unwritable" or not (tmp_path / "cache").exists()


def test_a_folder_that_is_asked_for_is_made(changed: dict[str, Any], tmp_path: Path) -> None:
    compilation_cache.use(tmp_path / "a" / "b")
    assert changed["jax_compilation_cache_dir"] == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
