"""`uniql report`: the page is one file that says what the headers say, the card is one that the hub's library reads."""

from __future__ import annotations

import functools
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from tests import tiny
from tests.commands import exit_code
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.commands import report as command
from uniql_jax.console import format_bytes
from uniql_jax.evaluation.report import Report

QUALITY = [
    {"prune_rate": rate, "source": "/home/me/<b>held-out<b>.txt", "metric": "perplexity", "value": value}
    for rate, value in ((None, 10.0), (0.0, 10.25), (0.15, 11.5), (0.35, 14.75))
] + [{"prune_rate": 0.0, "source": "arc", "metric": "acc", "value": 0.5, "stderr": 0.1}]
SPEED = {
    "environment": {"device": "A <device>"},
    "settings": {"batch_size": 1, "prompt_len": 64, "gen_len": 32},
    "rows": [
        {"prune_rate": None, "tpot_loop": {"median": 0.02}},
        {"prune_rate": 0.15, "ttft": {"median": 0.25}, "tpot_loop": {"median": 0.0125}},
    ],
}


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    return tiny.checkpoint(tmp_path / "a <model>", rng)


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


run = functools.partial(exit_code, command.main)


class Page(html.parser.HTMLParser):
    """Tags that must be closed are, and what is loaded from elsewhere is kept."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_the_headers_say(folder: Path, tmp_path: Path) -> None:
    quality, speed = written(tmp_path / "q.json", QUALITY), written(tmp_path / "s.json", SPEED)
    text = Report(folder, quality, speed).html()
    page = Page(text)
    assert page.open == []
    assert page.loaded == []
    assert "script" not in page.tags
    assert not re.search(r"@import|url\(", text)
    checkpoint = open_checkpoint(folder)
    for rate in (0.0, 0.15, 0.35):
        assert format_bytes(checkpoint.weight_bytes(rate)) in page.text
        for i, kept in enumerate(checkpoint.keep(rate)):
            for axis, count in kept.items():
                assert f"layer {i}, rate {rate:g}: {count} of {checkpoint.keep(0.0)[i][axis]}" in page.text
    for value in (
        "10.25",
        "11.50",
        "14.75",
        "10.00",
        "250 ms",
        "12.5 ms",
        "<b>held-out<b>.txt",
        "a <model>",
        "A <device>",
    ):
        assert value in page.text
    assert "/home/me" not in text
    assert page.tags.count("rect") == len(checkpoint.plan.order) + 15 * sum(map(len, checkpoint.keep(0.0)))  # type: ignore[union-attr]


def test_the_card_is_one_that_the_hub_reads(folder: Path, tmp_path: Path) -> None:
    quality = written(tmp_path / "q.json", QUALITY[:4])
    (folder / "LICENSE").write_text("Apache License\n  Version 2.0, January 2004\n")
    text = Report(folder, quality).card("owner/base-1.5")
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "owner/base-1.5"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"
    assert {"uniql", "32-bit", "llama"} <= set(data["tags"])
    assert data["library_name"] == "uniql-jax"
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + 8
    assert "| 0.35 |" in text
    assert "14.75" in text


@pytest.mark.parametrize(
    ("license_text", "wanted"),
    [("MIT License\n", {"license": "mit"}), (None, {}),
     ("My own terms",
      {"license": "other", "license_name": "license-of-the-base-model", "license_link": "LICENSE.txt"})],
)  # fmt: skip
def test_licenses_are_carried_over(folder: Path, license_text: str | None, wanted: dict[str, str]) -> None:
    if license_text is not None:
        (folder / "LICENSE.txt").write_text(license_text)
    report = Report(folder)
    assert report.license() == wanted
    data = ModelCard(report.card()).data.to_dict()
    assert data.get("license") == wanted.get("license")
    assert "base_model" not in data


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    assert (folder / "report.html").read_text() == Report(folder).html()
    assert (folder / "README.md").read_text() == Report(folder).card()
    assert capsys.readouterr().out.split("\n")[:2] == [str(folder / "report.html"), str(folder / "README.md")]
    assert run(folder) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(folder, "--overwrite", "--name", "mine", "--license", "mit") == 0
    assert "# mine" in (folder / "README.md").read_text()
    out = tmp_path / "out"
    out.mkdir()
    assert run(folder, "--out", out) == 0
    assert open_checkpoint(folder).weight_bytes(0.0)  # still a checkpoint


@pytest.mark.parametrize(
    ("option", "content", "says"),
    [("--quality", "{", "JSON"), ("--quality", {"rows": []}, "evaluate"), ("--quality", [{"value": 1}], "evaluate"),
     ("--quality", [QUALITY[0] | {"value": "x"}], "no number"),
     ("--quality", [QUALITY[0] | {"prune_rate": "x"}], "no number"),
     ("--speed", [], "benchmark"), ("--speed", {"rows": [{"prune_rate": 0}]}, "benchmark"),
     ("--speed", SPEED | {"rows": [{"prune_rate": 0, "ttft": 3}]}, "benchmark"), ("--base-model", None, "hub id")],
)  # fmt: skip
def test_what_cannot_be_reported(
    folder: Path, tmp_path: Path, option: str, content: Any, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = "not an id" if content is None else written(tmp_path / "x.json", content)
    assert run(folder, option, value) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert not (folder / "report.html").exists()
    assert run(tmp_path / "nowhere") == 2
