"""Tokenizer files that are damaged, and chat templates that fail, end in one line that names the user's files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests import tiny
from uniql_jax.chat_template import render_chat
from uniql_jax.errors import UserError
from uniql_jax.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path):
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def refused(folder: Path) -> str | None:
    try:
        load_tokenizer(folder, "my/model")
    except UserError as error:
        line = str(error)
        assert "\n" not in line
        assert "my/model" in line
        assert str(folder) not in line
        return line
    return None


def change(folder: Path, file: str, **values) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_files_that_are_no_json_objects(folder):
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        before = (folder / file).read_bytes() if (folder / file).exists() else None
        for content, said in ((b"[]", "not a JSON object"), (b"{", "not JSON"), (b'"\xff"', "not UTF-8"),
                              (b"", "not JSON"),
                              (b"[" * 100_000, "not JSON"), (b"null", "not a JSON object")):  # fmt: skip
            (folder / file).write_bytes(content)
            assert f"{file} of my/model is {said}" in refused(folder)
        (folder / file).unlink() if before is None else (folder / file).write_bytes(before)
    assert refused(folder) is None


def test_parts_that_tokenizers_lacks(folder):
    good = (folder / "tokenizer.json").read_text()
    model = json.loads(good)["model"]
    for values in (
        {"model": {"type": "NoSuch"}},
        {"model": model | {"merges": [["zzz", "qqq"]]}},
        {"model": model | {"vocab": []}},
        {"model": None},
        {"pre_tokenizer": {"type": "NoSuch"}},
        {"decoder": {"type": "NoSuch"}},
        {"normalizer": 5},
        {"added_tokens": [{"id": "a"}]},
        {"post_processor": {"type": "TemplateProcessing"}},
    ):
        (folder / "tokenizer.json").write_text(json.dumps(json.loads(good) | values))
        assert "cannot be loaded" in refused(folder)


def test_settings_of_every_wrong_type(folder):
    good = (folder / "tokenizer_config.json").read_text()
    keys = ("tokenizer_class", "bos_token", "eos_token", "added_tokens_decoder", "model_max_length", "chat_template",
            "extra_special_tokens", "additional_special_tokens", "auto_map", "padding_side")  # fmt: skip
    for key in keys:
        for value in (None, 5, -1.5, True, [], [1], {}, {"a": 1}, "text", "é" * 1000):
            (folder / "tokenizer_config.json").write_text(json.dumps(json.loads(good) | {key: value}))
            refused(folder)


@pytest.mark.parametrize("cases", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_random_damage(folder, rng, cases):
    content = (folder / "tokenizer.json").read_bytes()
    lines = []
    for _ in range(cases):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[place] = rng.choice(bytearray(b'{}[]",:0123456789abNt \xff'))
        (folder / "tokenizer.json").write_bytes(damaged)
        lines.append(refused(folder))
    assert any(lines)


def test_code_of_a_checkpoint_does_not_run(folder):
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Tokenizer: pass\n")
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    refused(folder)
    assert not marker.exists()


def test_missing_sentencepiece_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"any")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else found(name))
    assert "needs the package sentencepiece" in refused(tmp_path)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{% if %}", "{{ nothing.at.all }}", "{{ 1 / 0 }}",
     "{{ messages[9].a.b }}",
     "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for x in 5 %}{% endfor %}", "{{ 'a' + 1 }}"],
)  # fmt: skip
def test_chat_templates_that_fail(folder, template):
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat template does not take these messages") as error:
        render_chat(tokenizer, [{"role": "user", "content": "hi"}])
    assert "\n" not in str(error.value)


def test_chat_is_rendered(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        render_chat(tokenizer, [])
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ add_generation_prompt }}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert render_chat(tokenizer, turns, prompt=True) == "<a><b>True"
