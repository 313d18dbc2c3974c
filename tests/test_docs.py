"""What README and docs/ say is true: commands parse, cited records exist, quoted messages are ours."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from uniql_jax.commands import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "guides").glob("*.md"))]
COMMAND = re.compile(r"^ +(?:uniql|python -m uniql_jax\.)\s?([a-z-]+)((?:.*\\\n)*.*)$", re.MULTILINE)


def commands() -> list[tuple[str, str, str]]:
    """(page, verb, arguments) of every command line of a code block, comments left out."""
    found = []
    for page in PAGES:
        for verb, rest in COMMAND.findall(page.read_text()):
            found.append((page.name, verb, re.sub(r"\s#.*", "", rest.replace("\\\n", " ")).strip()))
    return found


def test_there_are_commands() -> None:
    verbs = {verb for _, verb, _ in commands()}
    assert {"compress", "evaluate", "generate", "export", "benchmark"} <= verbs <= set(VERBS)


@pytest.mark.parametrize(("page", "verb", "arguments"), commands(), ids=lambda value: value[:30])
def test_commands_parse(page: str, verb: str, arguments: str) -> None:
    module = importlib.import_module(f"uniql_jax.commands.{verb.replace('-', '_')}")
    if not hasattr(module, "parser"):
        pytest.skip(f"{verb} makes its parser where it runs")
    module.parser().parse_args(shlex.split(arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_cited_records_exist(page: Path) -> None:
    records = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    prefixes = "|".join(sorted({name.split("-")[0] for name in records}))
    cited = set(re.findall(rf"\b((?:{prefixes})-[\w.-]+\.json)", page.read_text()))
    assert cited <= records


def test_quoted_messages_are_ours() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    sources = [
        p for folder in ("uniql_jax", "convert", "train", "pallas_kernels") for p in (ROOT / folder).rglob("*.py")
    ]
    code = re.sub(r"\s+", " ", " ".join(path.read_text() for path in sources))
    code = re.sub(r"\{[^{}]*\}", "...", re.sub(r'" f?"', "", code)).replace("uniql_jax.plan.MAX_PRUNE_RATE", "0.35")
    quoted = [m for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for m in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 10
    for message in quoted:
        for piece in re.split(r"\.\.\.|0\.35|FILE|\bMB\b", message):
            assert piece.strip() in code, message


def test_notebooks_hold_no_outputs() -> None:
    for path in (ROOT / "examples").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path
