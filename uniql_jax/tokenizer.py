"""Tokenizers of checkpoint folders: loading them, with one-line errors for damaged files."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniql_jax.errors import UserError

if TYPE_CHECKING:
    from uniql_jax.convert.source import Source

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# what transformers reads in addition; each holds a JSON object
_JSON_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "config.json",
)  # fmt: skip


def load_tokenizer(folder: str | Path, name: str | None = None) -> Any | None:
    """The tokenizer of a checkpoint folder, from its own files only; no code of the checkpoint is run.

    Args:
      folder: where the files lie.
      name: what error messages call it, where `folder` is a temporary copy of the user's files.

    Returns:
      A transformers tokenizer; None when the folder has none.

    Raises:
      UserError: the files are there but cannot be used.
    """
    folder = Path(folder)
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        return None
    shown = str(folder) if name is None else name
    for file in _JSON_FILES:
        _check_json(folder / file, f"{file} of {shown}")
    has_json = (folder / "tokenizer.json").exists()
    if not has_json and (folder / "tokenizer.model").exists() and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(f"tokenizer.model of {shown} needs the package sentencepiece: pip install sentencepiece")
    from transformers import AutoTokenizer  # slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer("a")  # a vocabulary may be too damaged to be used and load all the same
    except Exception as error:  # tokenizers raises bare Exception, transformers whatever a wrong type leads to
        raise UserError(f"the tokenizer of {shown} cannot be loaded: {_reason(error, folder, shown)}") from None
    except BaseException as error:  # a panic in the Rust of tokenizers, which is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer of {shown} cannot be loaded: {_reason(error, folder, shown)}") from None
    return tokenizer


def source_tokenizer(source: Source) -> Any | None:
    """The tokenizer of an opened original checkpoint, wherever it lies; None when it has none.

    Raises:
      UserError: the files are there but cannot be used; the message names the user's own checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        source.write_side_files(folder)
        return load_tokenizer(folder, source.name)


def _check_json(path: Path, shown: str) -> None:
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{shown} is not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise UserError(f"{shown} is not JSON") from None
    except OSError as error:
        raise UserError(f"cannot read {shown}: {error.strerror or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{shown} is not a JSON object")


def _reason(error: BaseException, folder: Path, shown: str) -> str:
    """The first line of an error, with the user's own name for the folder."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].replace(str(folder), shown)
