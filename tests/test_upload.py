"""Uploads to a server that speaks the hub's protocol; what arrives is loaded again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import uniql_jax
from tests import hub_server
from tests.test_hub import GOLDEN, REPO, hub  # noqa: F401
from uniql_jax.commands import cli
from uniql_jax.commands import upload as command
from uniql_jax.errors import UserError
from uniql_jax.runtime.upload import upload

# huggingface_hub hands its HTTP client bytes in an old way
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def token(hub: Any, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    return hub


def test_what_is_uploaded_is_the_checkpoint(token: Any, tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    shutil.copytree(GOLDEN / "qwen2", folder)
    (folder / "notes.txt").write_text("private")  # not of the checkpoint
    (folder / "tokenizer.json").write_text("{}")
    said: list[str] = []
    address = upload(folder, "me/elastic", base_model="Qwen/Qwen2.5-0.5B", license="apache-2.0", say=said.append)
    assert address is not None
    assert address.endswith("c" * 40)
    assert token.created == [{"name": "elastic", "organization": "me"} | token.created[0]]
    assert "private" in (token.created[0].get("visibility"), "private" * bool(token.created[0].get("private")))
    assert set(token.uploaded) == {path.name for path in folder.iterdir()} - {"notes.txt", "golden.npz"} | {"README.md"}
    assert any("model.safetensors" in line for line in said)
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, data in token.uploaded.items():
        (arrived / name).write_bytes(data)
    token.add("me/elastic", arrived)
    ours, theirs = uniql_jax.load(folder, 0.35), uniql_jax.load("me/elastic", 0.35)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    from huggingface_hub import ModelCard

    card = ModelCard(token.uploaded["README.md"].decode())
    assert card.data.library_name == "uniql-jax"
    assert card.data.base_model == "Qwen/Qwen2.5-0.5B"
    assert card.data.license == "apache-2.0"
    assert 'uniql_jax.load("me/elastic"' in card.text


def test_a_card_of_ones_own_stays(token: Any, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "qwen2", tmp_path / "ours")
    (tmp_path / "ours" / "README.md").write_text("mine")
    upload(tmp_path / "ours", "me/elastic", public=True, message="first")
    assert token.uploaded["README.md"] == b"mine"
    assert not token.created[0].get("private")
    assert token.commits[0]["summary"] == "first"


def test_a_dry_run_touches_nothing(token: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([str(GOLDEN / "llama"), "me/elastic", "--dry-run"])
    out = capsys.readouterr().out
    assert "model.safetensors" in out
    assert "library_name: uniql-jax" in out
    assert not token.requests


@pytest.mark.parametrize(
    ("repo", "match"),
    [
        ("me", "owner/name"),
        ("me/../x", "owner/name"),
        ("a/b/c", "owner/name"),
        ("me/elastic", "does not let you write"),
    ],
)
def test_refusals_are_one_line(
    hub: Any,  # noqa: F811
    repo: str, match: str, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as end:
        cli.run(command.main, [str(GOLDEN / "llama"), repo])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert match in line
    assert not hub.uploaded


def test_what_is_not_whole_is_not_uploaded(token: Any, tmp_path: Path) -> None:
    part = uniql_jax.load(REPO, 0.35).folder
    with pytest.raises(UserError, match="some prune rates only"):
        upload(str(part), "me/elastic")
    uniql_jax.load(REPO, 0.0)
    assert upload(str(part), "me/elastic")
    with pytest.raises(UserError, match="no such checkpoint folder"):
        upload(tmp_path / "nothing", "me/elastic")
    assert not [name for name in token.uploaded if name.startswith(".")]
