"""Files of a model folder that any folder made from it gets too: tokenizer, chat template, license."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files next to the weights that travel with a model unchanged (`config.json` does not: it is rewritten)."""


def side_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of a model folder that are copied unchanged into any folder made from it, sorted."""
    found = {path for pattern in SIDE_FILES for path in Path(folder).glob(pattern) if path.is_file()}
    return sorted(found)


def copy_side_files(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy `side_files` byte for byte, keeping their places below the folder."""
    for path in side_files(source):
        place = Path(target) / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
